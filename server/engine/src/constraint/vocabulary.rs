//! The model's vocabulary as llguidance wants it: the bytes of every token in one trie. A control token's spelling lies
//! behind a byte that no text has, so that text can never match it; the model's stop ids are the grammar's end.

use std::sync::Arc;

use espalier_adapters::text::Tokenizer;
use toktrie::{INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

/// A trie's path is this long at most; a longer token (some vocabularies have runs of spaces) is never used.
const MAX_TOKEN_BYTES: usize = 1000;

struct Vocabulary {
    trie: TokTrie,
    tokenizer: Arc<Tokenizer>,
    /// Encoding a part of a text gives the tokens that the model has seen for it. SentencePiece puts a space in front of
    /// whatever it is given, so there it does not, and the model chooses among all spellings.
    canonical: bool,
}

/// `vocab` is the model's, which may have more rows than the tokenizer has tokens.
pub(super) fn vocabulary(tokenizer: &Arc<Tokenizer>, vocab: usize, stop_ids: &[u32]) -> TokEnv {
    let word = |id: u32| {
        let piece = tokenizer.piece(id).unwrap_or_default();
        if piece.len() > MAX_TOKEN_BYTES {
            return Vec::new();
        }
        let mark = tokenizer
            .is_control(id)
            .then_some(TokTrie::SPECIAL_TOKEN_MARKER);
        mark.into_iter().chain(piece.iter().copied()).collect()
    };
    let words: Vec<Vec<u8>> = (0..vocab as u32).map(word).collect();
    let stops: Vec<u32> = stop_ids
        .iter()
        .copied()
        .filter(|&id| (id as usize) < vocab)
        .collect();
    let first = stops.first().copied().unwrap_or(INVALID_TOKEN);
    let mut trie = TokTrie::from(&TokRxInfo::new(vocab as u32, first), &words);
    if !stops.is_empty() {
        trie = trie.with_eos_tokens(&stops);
    }
    Arc::new(Vocabulary {
        trie,
        tokenizer: Arc::clone(tokenizer),
        canonical: !tokenizer.drops_leading_space(),
    })
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    /// The tokens of a text that the grammar forces. A tokenizer that changes characters (NFC) must not change the
    /// grammar's, so its answer counts only when it spells the same bytes.
    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let encoded = std::str::from_utf8(bytes)
            .ok()
            .and_then(|text| self.tokenizer.encode_plain(text).ok())
            .filter(|ids| self.trie.decode_raw(ids) == bytes);
        encoded.unwrap_or_else(|| self.trie.greedy_tokenize(bytes))
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.canonical
    }
}
