//! Text as it may be shown: whole characters only, and never the beginning of what might become a stop string.
//!
//! The tokenizer's stream yields whole characters; [`StopFilter`] holds back the longest end of the text with which a
//! stop string could begin. What was shown plus what is held is always the text itself.

/// What became of new text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Filtered {
    /// To be shown now.
    pub(crate) text: String,
    /// The stop string that is complete, by its place in the list. Nothing more may be pushed.
    pub(crate) matched: Option<usize>,
}

/// Looks for stop strings in a text that arrives in pieces. Of those that end first the longest counts.
#[derive(Debug)]
pub(crate) struct StopFilter {
    stops: Vec<String>,
    include: bool,
    held: String,
}

// === impl StopFilter ===

impl StopFilter {
    /// `include` shows the stop string itself at the end. Empty stop strings are ignored.
    pub(crate) fn new(stops: Vec<String>, include: bool) -> Self {
        StopFilter {
            stops,
            include,
            held: String::new(),
        }
    }

    /// Adds a piece of text.
    pub(crate) fn push(&mut self, piece: &str) -> Filtered {
        self.held.push_str(piece);
        if let Some((index, start, end)) = self.first_match() {
            let shown = if self.include { end } else { start };
            self.held.truncate(shown);
            return Filtered {
                text: std::mem::take(&mut self.held),
                matched: Some(index),
            };
        }
        let keep_from = self.held.len() - self.possible_beginning();
        let held = self.held.split_off(keep_from);
        Filtered {
            text: std::mem::replace(&mut self.held, held),
            matched: None,
        }
    }

    /// Shows a piece that cannot stop anything (before `min_tokens`); a stop string cannot begin in it either.
    pub(crate) fn pass(&mut self, piece: &str) -> String {
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        text
    }

    /// The text ends here: what was held back was no stop string.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// `(stop, start, end)` of the match that ends first, the longest of those.
    fn first_match(&self) -> Option<(usize, usize, usize)> {
        let found = self
            .stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty());
        found
            .filter_map(|(index, stop)| {
                self.held
                    .find(stop.as_str())
                    .map(|start| (index, start, start + stop.len()))
            })
            .min_by_key(|&(_, start, end)| (end, start))
    }

    /// Length of the longest end of the held text that is a beginning of a stop string.
    fn possible_beginning(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let earliest = (self.held.len() + 1).saturating_sub(longest.max(1));
        (earliest..self.held.len())
            .filter(|&start| self.held.is_char_boundary(start))
            .find(|&start| {
                self.stops
                    .iter()
                    .any(|stop| stop.starts_with(&self.held[start..]))
            })
            .map_or(0, |start| self.held.len() - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, slowly: the first end at which any stop string ends, the longest such string.
    fn truncated(text: &str, stops: &[String], include: bool) -> (String, Option<usize>) {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let ends_here = |stop: &&(usize, &String)| {
                !stop.1.is_empty() && text[..end].ends_with(stop.1.as_str())
            };
            let longest = stops.iter().enumerate().collect::<Vec<_>>();
            let longest = longest
                .iter()
                .filter(ends_here)
                .max_by_key(|(index, stop)| (stop.len(), usize::MAX - index));
            if let Some((index, stop)) = longest {
                let shown = if include { end } else { end - stop.len() };
                return (text[..shown].to_owned(), Some(*index));
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn the_deltas_are_the_text_up_to_the_stop(
            pieces in prop::collection::vec("[abé猫]{0,4}", 0..12),
            stops in prop::collection::hash_set("[abé猫]{1,4}", 0..4),
            include in any::<bool>(),
        ) {
            let stops: Vec<String> = stops.into_iter().collect();
            let text = pieces.concat();
            let (expected, index) = truncated(&text, &stops, include);
            let mut filter = StopFilter::new(stops.clone(), include);
            let (mut shown, mut matched) = (String::new(), None);
            for piece in &pieces {
                let filtered = filter.push(piece);
                shown.push_str(&filtered.text);
                prop_assert!(expected.starts_with(&shown), "{shown:?} shows more than {expected:?}");
                matched = filtered.matched;
                if matched.is_some() {
                    break;
                }
            }
            if matched.is_none() {
                shown.push_str(&filter.finish());
            }
            prop_assert_eq!(shown, expected);
            prop_assert_eq!(matched, index);
        }
    }

    #[test]
    fn without_stop_strings_nothing_is_held() {
        let mut filter = StopFilter::new(Vec::new(), false);
        assert_eq!(
            filter.push("all of it"),
            Filtered {
                text: "all of it".to_owned(),
                matched: None
            }
        );
    }

    #[test]
    fn what_passes_cannot_stop() {
        let mut filter = StopFilter::new(vec!["stop".to_owned()], false);
        assert_eq!(filter.pass("stop st"), "stop st");
        assert_eq!(filter.push("op").text, "op");
        assert_eq!(filter.push(" stop").matched, Some(0));
    }
}
