//! Added tokens (control tokens and words of their own) in text: where they stand, and where they must not be seen.
//! Follows `AddedVocabulary::find_matches` of the tokenizers crate, which cannot be told that a stretch of text came from a user.

use std::collections::BTreeSet;

use tokenizers::AddedToken;

/// Byte positions in a text at which a control token's spelling came from a message, not from the template.
#[derive(Debug, Default)]
pub(super) struct Protected(BTreeSet<usize>);

impl Protected {
    /// Removes every `mark` and remembers where it stood.
    pub(super) fn take_marks(text: &str, mark: char) -> (String, Self) {
        let mut clean = String::with_capacity(text.len());
        let mut starts = BTreeSet::new();
        for character in text.chars() {
            if character == mark {
                starts.insert(clean.len());
            } else {
                clean.push(character);
            }
        }
        (clean, Self(starts))
    }

    fn covers(&self, start: usize) -> bool {
        self.0.contains(&start)
    }
}

/// Which control tokens a text may contain.
#[derive(Debug, Clone, Copy)]
pub(super) enum Controls<'a> {
    /// Every one that is spelled.
    Parse,
    /// None: they are text.
    Ignore,
    /// Those that do not begin at a protected position.
    Except(&'a Protected),
}

impl Controls<'_> {
    fn allow(&self, start: usize) -> bool {
        match self {
            Self::Parse => true,
            Self::Ignore => false,
            Self::Except(protected) => !protected.covers(start),
        }
    }
}

/// A stretch of text: an added token's id, or none for plain text.
pub(super) type Piece = (Option<u32>, std::ops::Range<usize>);

/// A set of added tokens, found leftmost and longest first.
#[derive(Debug, Clone)]
pub(super) struct Added {
    /// By first byte, longest first.
    by_first: Vec<Vec<(String, u32, AddedToken)>>,
}

impl Added {
    /// The tokens with the text to look for, which differs from the token's content where that is normalised first.
    pub(super) fn new(tokens: impl IntoIterator<Item = (String, u32, AddedToken)>) -> Self {
        let mut by_first = vec![Vec::new(); 256];
        for (pattern, id, token) in tokens {
            if let Some(&first) = pattern.as_bytes().first() {
                by_first[usize::from(first)].push((pattern, id, token));
            }
        }
        for tokens in &mut by_first {
            tokens.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then(a.1.cmp(&b.1)));
        }
        Self { by_first }
    }

    fn at<'a>(&'a self, rest: &'a [u8]) -> impl Iterator<Item = &'a (String, u32, AddedToken)> {
        let candidates = rest.first().map_or(&[][..], |first| {
            self.by_first[usize::from(*first)].as_slice()
        });
        candidates
            .iter()
            .filter(|(pattern, ..)| rest.starts_with(pattern.as_bytes()))
    }

    /// Cuts `text` into added tokens and what lies between. `origin` maps a byte of `text` to its place in the user's text.
    pub(super) fn split(
        &self,
        text: &str,
        controls: Controls<'_>,
        origin: impl Fn(usize) -> usize,
    ) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let (mut plain, mut position) = (0, 0);
        while position < text.len() {
            let found = self
                .at(&text.as_bytes()[position..])
                .find(|(pattern, _, token)| {
                    (!token.special || controls.allow(origin(position)))
                        && stands_alone(text, position, pattern.len(), token)
                });
            let Some((pattern, id, token)) = found else {
                position += 1;
                continue;
            };
            let (mut start, mut end) = (position, position + pattern.len());
            if token.lstrip {
                start = text[..start].trim_end().len().max(plain);
            }
            if token.rstrip {
                end = text.len() - text[end..].trim_start().len();
            }
            if plain < start {
                pieces.push((None, plain..start));
            }
            pieces.push((Some(*id), start..end));
            (plain, position) = (end, end);
        }
        if plain < text.len() {
            pieces.push((None, plain..text.len()));
        }
        pieces
    }

    /// Puts `mark` in front of every place where a control token is spelled, or where the text's end could begin one.
    pub(super) fn mark(&self, text: &str, mark: char) -> String {
        let bytes = text.as_bytes();
        let mut marked = String::with_capacity(text.len());
        for (position, character) in text.char_indices() {
            let rest = &bytes[position..];
            let spelled = self.by_first[usize::from(rest[0])]
                .iter()
                .any(|(pattern, _, token)| {
                    token.special
                        && (rest.starts_with(pattern.as_bytes())
                            || pattern.as_bytes().starts_with(rest))
                });
            if spelled {
                marked.push(mark);
            }
            marked.push(character);
        }
        marked
    }
}

fn stands_alone(text: &str, start: usize, len: usize, token: &AddedToken) -> bool {
    let word = |character: char| character.is_alphanumeric() || character == '_';
    !token.single_word
        || (!text[..start].chars().next_back().is_some_and(word)
            && !text[start + len..].chars().next().is_some_and(word))
}
