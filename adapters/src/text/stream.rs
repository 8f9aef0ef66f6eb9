//! Decoding token by token: text comes out as soon as its characters are whole, and never half a character.

use std::sync::Arc;

use super::{TextError, Tokenizer};

/// Turns a growing list of ids into a growing text. The texts of all [`step`](Self::step)s and of [`finish`](Self::finish), joined,
/// are what [`Tokenizer::decode`] gives for the whole list.
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    /// The bytes of a character that is not whole yet; at most three.
    pending: Vec<u8>,
    /// A leading space that the tokenizer put in front of a text is still to be dropped.
    drop_space: bool,
}

impl StreamDecoder {
    pub(super) fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        let drop_space = tokenizer.drops_leading_space();
        Self {
            tokenizer,
            skip_special,
            pending: Vec::new(),
            drop_space,
        }
    }

    /// Keeps a first space that the tokenizer may have put there: for a text of which every character was chosen.
    #[must_use]
    pub fn with_first_space(mut self) -> Self {
        self.drop_space = false;
        self
    }

    /// Adds a token and returns the text that it completes, which may be empty.
    ///
    /// # Errors
    /// [`TextError::Id`] for an id beyond the vocabulary; the decoder stays as it was.
    pub fn step(&mut self, id: u32) -> Result<String, TextError> {
        let piece = self.tokenizer.piece(id)?;
        if self.skip_special && self.tokenizer.is_control(id) {
            return Ok(String::new());
        }
        self.pending.extend_from_slice(piece);
        if self.drop_space && !self.pending.is_empty() {
            self.drop_space = false;
            if self.pending[0] == b' ' {
                self.pending.remove(0);
            }
        }
        let mut text = String::new();
        let mut bytes = self.pending.as_slice();
        loop {
            match std::str::from_utf8(bytes) {
                Ok(whole) => {
                    text.push_str(whole);
                    self.pending.clear();
                    return Ok(text);
                }
                Err(error) => {
                    let (whole, rest) = bytes.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(whole));
                    let Some(broken) = error.error_len() else {
                        self.pending = rest.to_vec();
                        return Ok(text);
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    bytes = &rest[broken..];
                }
            }
        }
    }

    /// The bytes held back, as one U+FFFD, when the tokens ended within a character.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}
