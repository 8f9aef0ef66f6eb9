//! The tokenizer of a base model over the `tokenizers` crate: its normaliser, pre-tokeniser, merges. Added tokens are found by
//! [`added`](super::added), because who wrote them matters here; ids become bytes through one table, so that decoding is the same
//! whole, streamed or token by token.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use tokenizers::normalizer::Range;
use tokenizers::{
    AddedToken, DecoderWrapper, Model, NormalizedString, Normalizer, OffsetReferential, OffsetType,
    PreTokenizedString, PreTokenizer, Token, Tokenizer as Inner,
};

use super::added::{Added, Controls, Protected};
use super::vocabulary;
use super::{StreamDecoder, TextError};
use crate::gguf::Metadata;

/// A tokenizer file larger than this is refused; the largest known are about 35 MB.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Turns text into ids and ids into text. Cheap to share, never changed.
pub struct Tokenizer {
    inner: Inner,
    /// Looked for in the text as it stands.
    added: Added,
    /// Looked for after normalising.
    added_normalized: Added,
    /// Control tokens as they are spelled, whenever they are looked for.
    spelled: Added,
    /// Ids in front of and behind every text that is encoded as a whole: BOS where the tokenizer adds it.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    /// The bytes of every id, one after the other.
    bytes: Vec<u8>,
    /// `bytes[ends[id - 1]..ends[id]]` are the bytes of `id`.
    ends: Vec<usize>,
    control: Vec<bool>,
    drops_leading_space: bool,
    bos: Option<u32>,
    eos: Option<u32>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .finish_non_exhaustive()
    }
}

/// How a token's spelling in the vocabulary maps to bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's: each byte is a printable character.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0x0A>` a byte.
    SentencePiece {
        /// A text's first space was put there by the tokenizer.
        leading_space: bool,
    },
}

/// What a loader knows beside the tokenizer's own tables.
#[derive(Debug, Clone, Default)]
pub(super) struct Ends {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    /// BOS goes in front of every text; `None` leaves that to the tokenizer's own post-processor.
    pub(super) add_bos: Option<bool>,
    pub(super) add_eos: Option<bool>,
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF's `tokenizer.ggml.*` keys describe.
    ///
    /// # Errors
    /// [`TextError`] naming the key that is missing, malformed or of an unsupported kind.
    pub fn from_gguf(metadata: &Metadata) -> Result<Self, TextError> {
        let built = vocabulary::from_gguf(metadata)?;
        Self::assemble(built.inner, built.spelling, &built.ends, Some(built.tokens))
    }

    /// Reads a `tokenizer.json`; `bos` and `eos` are what `tokenizer_config.json` names, if anything.
    ///
    /// # Errors
    /// [`TextError`] naming the file, and the part that is malformed or of an unsupported kind.
    pub fn from_file(path: &Path, bos: Option<&str>, eos: Option<&str>) -> Result<Self, TextError> {
        let io = |source| TextError::Io {
            file: path.display().to_string(),
            source,
        };
        let len = std::fs::metadata(path).map_err(io)?.len();
        if len > MAX_FILE_BYTES {
            return Err(TextError::Tokenizer(format!(
                "file has {len} bytes, at most {MAX_FILE_BYTES} are read"
            )));
        }
        Self::from_json(&std::fs::read(path).map_err(io)?, bos, eos)
    }

    /// The same from the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// As [`Tokenizer::from_file`].
    pub fn from_json(json: &[u8], bos: Option<&str>, eos: Option<&str>) -> Result<Self, TextError> {
        // The crate asserts some rules of the format instead of returning them; a malformed file must not take the process down.
        let parsed = std::panic::catch_unwind(|| Inner::from_bytes(json)).map_err(|_| {
            TextError::Tokenizer(
                "tokenizer.json breaks a rule of the tokenizers library".to_owned(),
            )
        })?;
        let mut inner =
            parsed.map_err(|error| TextError::Tokenizer(format!("tokenizer.json: {error}")))?;
        let fails = |error: tokenizers::Error| TextError::Tokenizer(error.to_string());
        inner.with_truncation(None).map_err(fails)?;
        inner.with_padding(None);
        let spelling = spelling_of(inner.get_decoder())?;
        let id = |token: Option<&str>| token.and_then(|token| inner.token_to_id(token));
        let ends = Ends {
            bos: id(bos),
            eos: id(eos),
            ..Ends::default()
        };
        Self::assemble(inner, spelling, &ends, None)
    }

    /// `tokens` are the spellings by id where the caller has them; otherwise they are taken from the vocabulary.
    fn assemble(
        inner: Inner,
        spelling: Spelling,
        ends: &Ends,
        tokens: Option<Vec<String>>,
    ) -> Result<Self, TextError> {
        let fails = |error: tokenizers::Error| TextError::Tokenizer(error.to_string());
        let added_by_id: HashMap<u32, AddedToken> =
            inner.get_added_tokens_decoder().into_iter().collect();
        let mut spelled = tokens.unwrap_or_default();
        if spelled.is_empty() {
            let vocab = inner.get_vocab(true);
            // Ids far beyond the count of tokens would make the table larger than the file; no model leaves such gaps.
            let limit = 2 * vocab.len() + 4096;
            for (token, id) in vocab {
                let id = id as usize;
                if id >= limit {
                    return Err(TextError::Tokenizer(format!(
                        "token {token:?} has id {id}, at most {limit} is allowed"
                    )));
                }
                if spelled.len() <= id {
                    spelled.resize(id + 1, String::new());
                }
                spelled[id] = token;
            }
        }
        let (mut bytes, mut table_ends, mut control) = (Vec::new(), Vec::new(), Vec::new());
        for (id, token) in (0u32..).zip(&spelled) {
            match added_by_id.get(&id) {
                Some(added) => bytes.extend_from_slice(added.content.as_bytes()),
                None => spelling.append_bytes(token, &mut bytes),
            }
            table_ends.push(bytes.len());
            control.push(added_by_id.get(&id).is_some_and(|added| added.special));
        }
        let specials = added_by_id.iter().filter(|(_, token)| token.special);
        let spelled_controls =
            Added::new(specials.map(|(id, token)| (token.content.clone(), *id, token.clone())));
        let (plain, normalized): (Vec<_>, Vec<_>) = added_by_id
            .into_iter()
            .partition(|(_, token)| !token.normalized || inner.get_normalizer().is_none());
        let mut patterns = Vec::new();
        for (id, token) in normalized {
            let mut content = NormalizedString::from(token.content.as_str());
            if let Some(normalizer) = inner.get_normalizer() {
                normalizer.normalize(&mut content).map_err(fails)?;
            }
            patterns.push((content.get().to_owned(), id, token));
        }
        let mut tokenizer = Self {
            added: Added::new(
                plain
                    .into_iter()
                    .map(|(id, token)| (token.content.clone(), id, token)),
            ),
            added_normalized: Added::new(patterns),
            spelled: spelled_controls,
            prefix: Vec::new(),
            suffix: Vec::new(),
            bytes,
            ends: table_ends,
            control,
            drops_leading_space: spelling
                == Spelling::SentencePiece {
                    leading_space: true,
                },
            bos: ends.bos,
            eos: ends.eos,
            inner,
        };
        tokenizer.learn_ends(ends)?;
        Ok(tokenizer)
    }

    /// Finds out what the post-processor puts around a text, unless the loader says so itself.
    fn learn_ends(&mut self, ends: &Ends) -> Result<(), TextError> {
        let fails = |error: tokenizers::Error| TextError::Tokenizer(error.to_string());
        let bare = self.inner.encode("a", false).map_err(fails)?;
        let full = self.inner.encode("a", true).map_err(fails)?;
        let (bare, full) = (bare.get_ids(), full.get_ids());
        if let Some(at) = full
            .windows(bare.len().max(1))
            .position(|window| window == bare)
        {
            self.prefix = full[..at].to_vec();
            self.suffix = full[at + bare.len()..].to_vec();
        }
        let one = |add: bool, id: Option<u32>| {
            if add {
                id.into_iter().collect()
            } else {
                Vec::new()
            }
        };
        if let Some(add) = ends.add_bos {
            self.prefix = one(add, self.bos);
        }
        if let Some(add) = ends.add_eos {
            self.suffix = one(add, self.eos);
        }
        Ok(())
    }

    /// Encodes raw text: control tokens are parsed, BOS (and EOS) added only if the tokenizer adds them.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] when the text has a character that the vocabulary cannot express at all.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let mut ids = self.prefix.clone();
        self.append(text, Controls::Parse, &mut ids)?;
        ids.extend_from_slice(&self.suffix);
        Ok(ids)
    }

    /// Encodes text in which a control token's spelling is text; nothing is put around it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        self.append(text, Controls::Ignore, &mut ids)?;
        Ok(ids)
    }

    pub(super) fn encode_protected(
        &self,
        text: &str,
        protected: &Protected,
    ) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        self.append(text, Controls::Except(protected), &mut ids)?;
        Ok(ids)
    }

    pub(super) fn mark_controls(&self, text: &str, mark: char) -> String {
        self.spelled.mark(text, mark)
    }

    /// The crate's pipeline (`TokenizerImpl::encode_single_sequence`) with our own search for added tokens.
    fn append(
        &self,
        text: &str,
        controls: Controls<'_>,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        let fails = |error: tokenizers::Error| TextError::Tokenizer(error.to_string());
        let mut parts = PreTokenizedString::from(text);
        parts
            .split(|_, part| Ok(cut(&self.added, part, controls)))
            .map_err(fails)?;
        parts
            .split(|_, mut part| {
                if let Some(normalizer) = self.inner.get_normalizer() {
                    normalizer.normalize(&mut part)?;
                }
                Ok(cut(&self.added_normalized, part, controls))
            })
            .map_err(fails)?;
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut parts).map_err(fails)?;
        }
        parts
            .tokenize(|part| self.inner.get_model().tokenize(part.get()))
            .map_err(fails)?;
        for (_, _, tokens) in parts.get_splits(OffsetReferential::Original, OffsetType::None) {
            ids.extend(tokens.iter().flatten().map(|token| token.id));
        }
        Ok(())
    }

    /// The text of `ids`; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves control tokens out.
    ///
    /// # Errors
    /// [`TextError::Id`] for an id beyond the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        let mut bytes = Vec::new();
        for &id in ids {
            let piece = self.piece(id)?;
            if !(skip_special && self.is_control(id)) {
                bytes.extend_from_slice(piece);
            }
        }
        let text = if self.drops_leading_space && bytes.first() == Some(&b' ') {
            &bytes[1..]
        } else {
            &bytes
        };
        Ok(String::from_utf8_lossy(text).into_owned())
    }

    /// A decoder that takes one id at a time and yields whole characters only.
    pub fn decode_stream(self: &Arc<Self>, skip_special: bool) -> StreamDecoder {
        StreamDecoder::new(Arc::clone(self), skip_special)
    }

    /// The bytes that a token stands for, which need not be whole characters.
    ///
    /// # Errors
    /// [`TextError::Id`] for an id beyond the vocabulary.
    pub fn piece(&self, id: u32) -> Result<&[u8], TextError> {
        let index = id as usize;
        let end = *self.ends.get(index).ok_or(TextError::Id {
            id,
            vocab: self.ends.len(),
        })?;
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        Ok(&self.bytes[start..end])
    }

    /// One more than the largest id. A model's embedding table may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.ends.len()
    }

    /// The id of a token by its spelling in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token marks structure (BOS, end of turn, ...) and is left out of replies.
    pub fn is_control(&self, id: u32) -> bool {
        self.control.get(id as usize).copied().unwrap_or(false)
    }

    /// The token that begins a text, if the model names one.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text, if the model names one.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// The spelling of BOS, for templates.
    pub fn bos_token(&self) -> Option<String> {
        self.bos.and_then(|id| self.inner.id_to_token(id))
    }

    /// The spelling of EOS, for templates.
    pub fn eos_token(&self) -> Option<String> {
        self.eos.and_then(|id| self.inner.id_to_token(id))
    }

    /// The tokenizer as a `tokenizer.json`, for writing a base out as a Hugging Face directory.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] when the library cannot express it.
    pub fn to_json(&self) -> Result<String, TextError> {
        self.inner
            .to_string(false)
            .map_err(|error| TextError::Tokenizer(error.to_string()))
    }

    /// SentencePiece: what is encoded gets a space in front, and what is decoded loses it.
    pub fn drops_leading_space(&self) -> bool {
        self.drops_leading_space
    }
}

/// Cuts one part into added tokens, which get their id at once, and text.
fn cut(
    added: &Added,
    part: NormalizedString,
    controls: Controls<'_>,
) -> Vec<(NormalizedString, Option<Vec<Token>>)> {
    let first = part.offsets_original().0;
    let origin = |position: usize| {
        // The place in the user's text of what stands at `position` after normalising.
        let width = part.get()[position..]
            .chars()
            .next()
            .map_or(0, char::len_utf8);
        let place = part.convert_offsets(Range::Normalized(position..position + width));
        first + place.map_or(position, |range| range.start)
    };
    let pieces = added.split(part.get(), controls, origin);
    let slices = pieces.into_iter().filter_map(|(id, range)| {
        let slice = part.slice(Range::Normalized(range))?;
        let value = slice.get().to_owned();
        let tokens = id.map(|id| vec![Token::new(id, value.clone(), (0, value.len()))]);
        Some((slice, tokens))
    });
    slices.collect()
}

impl Spelling {
    fn append_bytes(self, token: &str, bytes: &mut Vec<u8>) {
        match self {
            Self::ByteLevel => {
                let start = bytes.len();
                for character in token.chars() {
                    let Some(byte) = byte_of(character) else {
                        // Not spelled in GPT-2's alphabet: the crate's decoder takes such a token as it stands.
                        bytes.truncate(start);
                        bytes.extend_from_slice(token.as_bytes());
                        return;
                    };
                    bytes.push(byte);
                }
            }
            Self::SentencePiece { .. } => {
                let hex = token
                    .strip_prefix("<0x")
                    .and_then(|rest| rest.strip_suffix('>'))
                    .filter(|hex| hex.len() == 2);
                match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => bytes.push(byte),
                    None => bytes.extend_from_slice(token.replace('▁', " ").as_bytes()),
                }
            }
        }
    }
}

/// The byte that a character of GPT-2's alphabet stands for: printable Latin-1 is itself, the other 68 follow from U+0100.
fn byte_of(character: char) -> Option<u8> {
    match u32::from(character) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The character that spells a byte in byte-level vocabularies, for building one.
pub fn byte_spelling(byte: u8) -> char {
    let code = match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u32::from(byte),
        0x00..=0x20 => 0x100 + u32::from(byte),
        0x7F..=0xA0 => 0x121 + u32::from(byte) - 0x7F,
        0xAD => 0x143,
    };
    char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// Which alphabet a `tokenizer.json`'s decoder undoes.
fn spelling_of(decoder: Option<&DecoderWrapper>) -> Result<Spelling, TextError> {
    let steps = match decoder {
        Some(DecoderWrapper::Sequence(sequence)) => sequence.get_decoders(),
        Some(single) => std::slice::from_ref(single),
        None => &[],
    };
    let has = |pick: fn(&DecoderWrapper) -> bool| steps.iter().any(pick);
    if has(|step| matches!(step, DecoderWrapper::ByteLevel(_))) {
        return Ok(Spelling::ByteLevel);
    }
    if has(|step| {
        matches!(
            step,
            DecoderWrapper::ByteFallback(_) | DecoderWrapper::Metaspace(_)
        )
    }) {
        let leading_space = has(|step| match step {
            DecoderWrapper::Strip(strip) => strip.content == ' ' && strip.start > 0,
            DecoderWrapper::Metaspace(metaspace) => {
                metaspace.get_prepend_scheme()
                    != tokenizers::pre_tokenizers::metaspace::PrependScheme::Never
            }
            _ => false,
        });
        return Ok(Spelling::SentencePiece { leading_space });
    }
    Err(TextError::Tokenizer(
        "tokenizer.json's decoder is neither ByteLevel nor ByteFallback or Metaspace; only these are supported".to_owned(),
    ))
}
