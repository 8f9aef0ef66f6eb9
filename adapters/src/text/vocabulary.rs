//! Builds a tokenizer from a GGUF's metadata, which carries tokens, merges or scores, and the *name* of a pre-tokeniser only:
//! what the name means is written here, as transformers' `tokenizer.json` of the same models has it.

use std::collections::HashMap;

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer as Inner,
};

use super::TextError;
use super::tokenizer::{Ends, Spelling};
use crate::gguf::Metadata;

pub(super) struct Built {
    pub(super) inner: Inner,
    pub(super) spelling: Spelling,
    pub(super) ends: Ends,
    /// Spellings by id, which a map by spelling cannot give back where two ids share one.
    pub(super) tokens: Vec<String>,
}

/// `enum llama_token_type`.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const NORMAL: i64 = 1;
const BYTE: i64 = 6;

/// Llama 3's split, from its `tokenizer.json`.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen2's, which differs in taking digits one by one.
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

pub(super) fn from_gguf(metadata: &Metadata) -> Result<Built, TextError> {
    let key = "tokenizer.ggml.tokens";
    let tokens = metadata.required(key, metadata.texts(key))?.to_vec();
    let key = "tokenizer.ggml.token_type";
    let kinds = metadata.ints(key)?.unwrap_or_default();
    if !kinds.is_empty() && kinds.len() != tokens.len() {
        let rule = format!("has {} elements for {} tokens", kinds.len(), tokens.len());
        return Err(metadata.error(key, rule).into());
    }
    let kind = |id: usize| kinds.get(id).copied().unwrap_or(NORMAL);
    let key = "tokenizer.ggml.model";
    let (mut inner, spelling) = match metadata.required(key, metadata.text(key))? {
        "gpt2" => (byte_level(metadata, &tokens)?, Spelling::ByteLevel),
        "llama" => sentence_piece(metadata, &tokens, &kind)?,
        other => {
            let rule = format!(
                "is {other:?}; gpt2 (byte-level BPE) and llama (SentencePiece) are supported"
            );
            return Err(metadata.error(key, rule).into());
        }
    };
    let added: Vec<AddedToken> = tokens
        .iter()
        .enumerate()
        .filter_map(|(id, token)| match kind(id) {
            CONTROL | UNKNOWN => Some(AddedToken::from(token.as_str(), true).normalized(false)),
            USER_DEFINED => Some(AddedToken::from(token.as_str(), false).normalized(false)),
            _ => None,
        })
        .filter(|token| !token.content.is_empty())
        .collect();
    inner
        .add_tokens(added)
        .map_err(|error| TextError::Tokenizer(error.to_string()))?;
    let ends = ends(metadata, tokens.len(), spelling)?;
    Ok(Built {
        inner,
        spelling,
        ends,
        tokens,
    })
}

/// BOS and EOS and whether they go around every text. SentencePiece models add BOS unless told otherwise, as in llama.cpp.
fn ends(metadata: &Metadata, vocab: usize, spelling: Spelling) -> Result<Ends, TextError> {
    let id = |key: &str| -> Result<Option<u32>, TextError> {
        match metadata.size(key)? {
            Some(id) if id >= vocab => Err(metadata
                .error(key, format!("is {id}, the vocabulary has {vocab} tokens"))
                .into()),
            found => Ok(found.map(|id| id as u32)),
        }
    };
    let sentence_piece = spelling != Spelling::ByteLevel;
    // Llama 3's files often leave the key out, and its tokenizer.json adds BOS.
    let bos_by_default = sentence_piece
        || matches!(
            metadata.text("tokenizer.ggml.pre")?,
            Some("llama-bpe" | "llama3" | "llama-v3")
        );
    Ok(Ends {
        bos: id("tokenizer.ggml.bos_token_id")?,
        eos: id("tokenizer.ggml.eos_token_id")?,
        add_bos: Some(
            metadata
                .flag("tokenizer.ggml.add_bos_token")?
                .unwrap_or(bos_by_default),
        ),
        add_eos: Some(
            metadata
                .flag("tokenizer.ggml.add_eos_token")?
                .unwrap_or(false),
        ),
    })
}

fn vocabulary(tokens: &[String]) -> Vocab {
    let mut vocab = Vocab::default();
    for (id, token) in (0u32..).zip(tokens) {
        // The first of two equal spellings wins, so that ids are found in file order.
        vocab.entry(token.clone()).or_insert(id);
    }
    vocab
}

fn byte_level(metadata: &Metadata, tokens: &[String]) -> Result<Inner, TextError> {
    let key = "tokenizer.ggml.merges";
    let lines = metadata.required(key, metadata.texts(key))?;
    let mut merges = Merges::with_capacity(lines.len());
    for (index, line) in lines.iter().enumerate() {
        let (left, right) = line
            .split_once(' ')
            .ok_or_else(|| metadata.error(key, format!("element {index}, {line:?}, is no pair")))?;
        merges.push((left.to_owned(), right.to_owned()));
    }
    let key = "tokenizer.ggml.pre";
    let bytes = |use_regex| PreTokenizerWrapper::from(ByteLevel::new(false, false, use_regex));
    let mut whole_words_first = false;
    let mut composed = false;
    let steps = match metadata.text(key)?.unwrap_or("default") {
        // SmolLM's own tokenizer.json splits digits one by one before this; its vocabulary has no token of two digits, and
        // transformers, which our goldens come from, reads the GGUF without that step.
        "default" | "gpt-2" | "gpt2" | "smollm" => vec![bytes(true)],
        "llama-bpe" | "llama3" | "llama-v3" => {
            whole_words_first = true;
            vec![split(LLAMA3_SPLIT)?, bytes(false)]
        }
        "qwen2" => {
            composed = true;
            vec![split(QWEN2_SPLIT)?, bytes(false)]
        }
        other => {
            let rule =
                format!("is {other:?}; default, gpt-2, smollm, llama-bpe and qwen2 are supported");
            return Err(metadata.error(key, rule).into());
        }
    };
    let model = BPE::builder()
        .vocab_and_merges(vocabulary(tokens), merges)
        .ignore_merges(whole_words_first)
        .build();
    let model = model.map_err(|error| {
        TextError::Tokenizer(format!(
            "{}: vocabulary and merges: {error}",
            metadata.file()
        ))
    })?;
    let mut inner = Inner::new(model);
    inner.with_pre_tokenizer(Some(Sequence::new(steps)));
    inner.with_decoder(Some(ByteLevel::default()));
    if composed {
        inner
            .with_normalizer(Some(NFC))
            .map_err(|error| TextError::Tokenizer(error.to_string()))?;
    }
    Ok(inner)
}

fn split(pattern: &str) -> Result<PreTokenizerWrapper, TextError> {
    let pattern = SplitPattern::Regex(pattern.to_owned());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
    split
        .map(Into::into)
        .map_err(|error| TextError::Tokenizer(error.to_string()))
}

/// SentencePiece's greedy merging by score is BPE with every pair that forms a piece as a merge, best score first: the conversion
/// that transformers' `generate_merges` does.
fn sentence_piece(
    metadata: &Metadata,
    tokens: &[String],
    kind: &dyn Fn(usize) -> i64,
) -> Result<(Inner, Spelling), TextError> {
    let key = "tokenizer.ggml.scores";
    let scores = metadata.required(key, metadata.floats(key))?;
    if scores.len() != tokens.len() || scores.iter().any(|score| !score.is_finite()) {
        return Err(metadata
            .error(
                key,
                format!("must be {} finite numbers, one a token", tokens.len()),
            )
            .into());
    }
    let vocab = vocabulary(tokens);
    let pieces: HashMap<&str, u32> = (0u32..)
        .zip(tokens)
        .filter(|(id, _)| !matches!(kind(*id as usize), CONTROL | UNKNOWN | BYTE))
        .map(|(id, token)| (token.as_str(), id))
        .collect();
    let mut merges: Vec<(f32, u32, u32, &str, &str)> = Vec::new();
    for (&piece, &id) in &pieces {
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(&left_id), Some(&right_id)) = (pieces.get(left), pieces.get(right)) {
                merges.push((scores[id as usize], left_id, right_id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    let merges = merges
        .into_iter()
        .map(|(_, _, _, left, right)| (left.to_owned(), right.to_owned()))
        .collect();
    let unknown = tokens
        .iter()
        .enumerate()
        .find(|(id, _)| kind(*id) == UNKNOWN)
        .map(|(_, token)| token.clone());
    let mut builder = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some(unknown) = unknown {
        builder = builder.unk_token(unknown);
    }
    let fails =
        |error: tokenizers::Error| TextError::Tokenizer(format!("{}: {error}", metadata.file()));
    let mut inner = Inner::new(builder.build().map_err(fails)?);
    let leading_space = metadata
        .flag("tokenizer.ggml.add_space_prefix")?
        .unwrap_or(true);
    let spaces = NormalizerWrapper::from(Replace::new(" ", "▁").map_err(fails)?);
    let mut steps = vec![spaces];
    if leading_space {
        steps.insert(0, Prepend::new("▁".to_owned()).into());
    }
    inner
        .with_normalizer(Some(NormalizerSequence::new(steps)))
        .map_err(fails)?;
    inner.with_decoder(Some(sentence_piece_decoder(leading_space).map_err(fails)?));
    Ok((inner, Spelling::SentencePiece { leading_space }))
}

/// What transformers writes for Llama 2, so that [`Tokenizer::to_json`](super::Tokenizer::to_json) reads back the same.
fn sentence_piece_decoder(
    leading_space: bool,
) -> tokenizers::Result<tokenizers::decoders::sequence::Sequence> {
    use tokenizers::decoders::{
        byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence, strip::Strip,
    };
    let mut steps = vec![
        Replace::new("▁", " ")?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if leading_space {
        steps.push(Strip::new(' ', 1, 0).into());
    }
    Ok(Sequence::new(steps))
}
