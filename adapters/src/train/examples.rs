//! Rows as token ids with the mask of what is learned: exactly the ids that serving would see.
//!
//! Tokenizer, chat template and profile meet the rows in `encode`; raw text is cut in `window`s; what is held out for
//! validation is decided in `split`.
//! This file must not know losses, batches or models.

mod encode;
mod split;
#[cfg(test)]
mod tests;
mod window;

pub use encode::{Encoded, Encoding, SCORE_LABEL, TooLong, build, encode};
pub use window::default_window;

use serde::{Deserialize, Serialize};

use super::dataset::Score;

/// Which turns of a row are learned. A chat message of weight 0 is not, whichever they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainOn {
    /// Every answer of the assistant; of a prompt/completion row the completion.
    #[default]
    Assistant,
    /// The last answer; of a prompt/completion row the completion.
    LastAssistant,
    /// Every token of the row but the first, prompts included.
    All,
}

/// One training example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Example {
    /// Next-token prediction.
    Lm {
        /// Token ids.
        ids: Vec<u32>,
        /// Whether token i is a label, predicted from the tokens before it. As long as `ids`; the first is never one.
        learn: Vec<bool>,
    },
    /// Classification by the state of the last token.
    Class {
        /// Token ids.
        ids: Vec<u32>,
        /// Row of the head.
        label: usize,
    },
    /// The same with any number of labels.
    Labels {
        /// Token ids.
        ids: Vec<u32>,
        /// Rows of the head that apply, ascending.
        labels: Vec<usize>,
    },
    /// Regression by the state of the last token.
    Score {
        /// Token ids.
        ids: Vec<u32>,
        /// The number.
        score: Score,
    },
}

impl Example {
    /// Token ids.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        match self {
            Self::Lm { ids, .. }
            | Self::Class { ids, .. }
            | Self::Labels { ids, .. }
            | Self::Score { ids, .. } => ids,
        }
    }

    /// Number of predictions that the loss sees: label tokens, or 1 for an answer of a head.
    #[must_use]
    pub fn targets(&self) -> usize {
        match self {
            Self::Lm { learn, .. } => learn.iter().filter(|l| **l).count(),
            Self::Class { .. } | Self::Labels { .. } | Self::Score { .. } => 1,
        }
    }
}

/// Counts of tokens, for estimates and reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenStats {
    /// Examples.
    pub examples: u64,
    /// Tokens read.
    pub tokens: u64,
    /// Tokens (or classes) learned.
    pub targets: u64,
    /// Tokens of the shortest example.
    pub shortest: usize,
    /// Tokens of the median example.
    pub median: usize,
    /// Tokens that 95 % of the examples do not exceed.
    pub p95: usize,
    /// Tokens of the longest example.
    pub longest: usize,
}

/// Examples of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Examples {
    /// At least one, in the order of the rows.
    pub items: Vec<Example>,
    /// The line each came from; a chat can give several.
    pub lines: Vec<u64>,
    /// Names of the head's rows, sorted bytewise; `None` for next-token prediction.
    pub labels: Option<Vec<String>>,
}

impl Examples {
    /// Counts over all examples.
    #[must_use]
    pub fn stats(&self) -> TokenStats {
        let mut lengths: Vec<usize> = self.items.iter().map(|e| e.ids().len()).collect();
        lengths.sort_unstable();
        TokenStats {
            examples: lengths.len() as u64,
            tokens: lengths.iter().map(|l| *l as u64).sum(),
            targets: self.items.iter().map(|e| e.targets() as u64).sum(),
            shortest: lengths.first().copied().unwrap_or(0),
            median: lengths.get(lengths.len() / 2).copied().unwrap_or(0),
            p95: match (lengths.len() * 95).div_ceil(100) {
                0 => 0,
                rank => lengths[rank - 1],
            },
            longest: lengths.last().copied().unwrap_or(0),
        }
    }
}
