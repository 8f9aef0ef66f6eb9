//! Windows: a document's ids as examples that a context can hold.
//!
//! A window begins with the last token of the one before it, which it only reads. So every token of a document but the first
//! is learned exactly once, and one token a window is computed twice: an overlap that gave a window's first tokens more to
//! read would compute all of it twice in every epoch. Windows of one document are of equal length but for one token, so that
//! none is a stump whose few tokens are guessed from nothing. Each is an example of its own, and attention never crosses
//! examples: several short documents in one micro-batch do not see each other.

use super::Example;
use crate::train::dataset::{Dataset, Row};

/// Windows that a small text should give: fewer make steps of one example, or no validation part.
const WANTED_WINDOWS: usize = 64;
/// Below this a window's tokens have too little before them: it is about a paragraph.
const SHORTEST: usize = 128;
/// Above this a longer window costs attention and brings little: few tokens depend on what is further back.
const LONGEST: usize = 1024;
/// Of English text; a default needs no more.
const BYTES_A_TOKEN: usize = 4;

/// Tokens of a window when nobody names them: what cuts the text in [`WANTED_WINDOWS`], from 128 to 1024, and no more than `limit`.
#[must_use]
pub fn default_window(data: &Dataset, limit: usize) -> usize {
    let bytes: usize = data
        .rows
        .iter()
        .map(|row| match row {
            Row::Text { text } => text.len(),
            _ => 0,
        })
        .sum();
    (bytes / BYTES_A_TOKEN / WANTED_WINDOWS)
        .clamp(SHORTEST, LONGEST)
        .min(limit)
}

/// Cuts a document of at least 2 ids in windows of at most `window` (and at least 2) ids.
pub(super) fn cut(ids: &[u32], window: usize) -> Vec<Example> {
    let targets = ids.len().saturating_sub(1);
    let count = targets.div_ceil(window.max(2) - 1);
    let begin = |number: usize| targets * number / count;
    (0..count)
        .map(|number| {
            let ids = ids[begin(number)..=begin(number + 1)].to_vec();
            let learn = (0..ids.len()).map(|i| i > 0).collect();
            Example::Lm { ids, learn }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use proptest::prelude::*;

    use super::*;
    use crate::train::dataset::{DataLimits, from_rows};

    proptest! {
        #[test]
        fn every_token_but_the_first_is_learned_once(count in 2..200_u32, window in 2..40_usize) {
            let ids: Vec<u32> = (0..count).collect();
            let windows = cut(&ids, window);
            let (mut learned, mut lengths) = (Vec::new(), Vec::new());
            for example in &windows {
                let Example::Lm { ids, learn } = example else { unreachable!() };
                prop_assert!(ids.len() <= window && ids.len() == learn.len());
                prop_assert!(ids.windows(2).all(|pair| pair[1] == pair[0] + 1), "a gap inside a window");
                learned.extend(ids.iter().zip(learn).filter(|(_, learn)| **learn).map(|(id, _)| *id));
                lengths.push(ids.len());
            }
            prop_assert_eq!(learned, &ids[1..]);
            prop_assert!(lengths.iter().max().unwrap() - lengths.iter().min().unwrap() <= 1);
            // No more windows than their size needs.
            prop_assert_eq!(windows.len(), (ids.len() - 1).div_ceil(window - 1));
        }
    }

    #[test]
    fn the_default_window_follows_the_size_of_the_text() {
        let of = |bytes: usize, limit| {
            let row = |text: String| Row::Text { text };
            let rows = vec![row("a".repeat(bytes / 2)), row("b".repeat(bytes / 2))];
            default_window(&from_rows(rows, &DataLimits::default()).unwrap(), limit)
        };
        assert_eq!([of(8_000, 2048), of(76_800, 2048)], [128, 300]);
        assert_eq!(
            [of(1_000_000, 2048), of(1_000_000, 512), of(8_000, 64)],
            [1024, 512, 64]
        );
    }
}
