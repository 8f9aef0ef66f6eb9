//! The tokenizer against the tokenizers crate on its own, against golden ids, and against users who write control tokens.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has failed"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use tokenizers::Tokenizer as Inner;

use super::{ChatTemplate, Message, TemplateSource, Tokenizer, byte_spelling, encode_chat};
use crate::gguf::{Array, Gguf, Metadata, Value};

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn strings(values: &[&str]) -> Value {
    Value::Array(Array::Strings(
        values.iter().map(|value| (*value).to_owned()).collect(),
    ))
}

/// GPT-2's alphabet, by byte.
fn alphabet() -> Vec<String> {
    (0..=255u8)
        .map(|byte| byte_spelling(byte).to_string())
        .collect()
}

fn byte_level_metadata(pre: &str) -> Metadata {
    let mut tokens: Vec<String> = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        .map(str::to_owned)
        .to_vec();
    tokens.extend(alphabet());
    let merges = [
        "h e", "Ġ t", "Ġt he", "i m", "1 2", "' t", "l l", "Ġ Ġ", "ĠĠ Ġ",
    ];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    tokens.push("<think>".to_owned());
    let mut kinds = vec![1; tokens.len()];
    kinds[..3].fill(3);
    *kinds.last_mut().unwrap() = 4;
    let borrowed: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let values = BTreeMap::from([
        (
            "tokenizer.ggml.model".to_owned(),
            Value::String("gpt2".to_owned()),
        ),
        (
            "tokenizer.ggml.pre".to_owned(),
            Value::String(pre.to_owned()),
        ),
        ("tokenizer.ggml.tokens".to_owned(), strings(&borrowed)),
        ("tokenizer.ggml.merges".to_owned(), strings(&merges)),
        (
            "tokenizer.ggml.token_type".to_owned(),
            Value::Array(Array::Ints(kinds)),
        ),
        ("tokenizer.ggml.bos_token_id".to_owned(), Value::Unsigned(1)),
        ("tokenizer.ggml.eos_token_id".to_owned(), Value::Unsigned(2)),
        (
            "tokenizer.ggml.add_bos_token".to_owned(),
            Value::Bool(false),
        ),
    ]);
    Metadata::new("byte_level.gguf", values)
}

pub(super) fn byte_level() -> &'static Arc<Tokenizer> {
    static BUILT: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    BUILT.get_or_init(|| Arc::new(Tokenizer::from_gguf(&byte_level_metadata("smollm")).unwrap()))
}

fn sentence_piece_metadata() -> Metadata {
    let mut tokens = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    let mut kinds = vec![2, 3, 3];
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    kinds.resize(tokens.len(), 6);
    let pieces = [
        "▁", "h", "e", "l", "o", "▁h", "he", "ll", "lo", "▁he", "llo", "hello", "▁hello", "é",
    ];
    tokens.extend(pieces.map(str::to_owned));
    kinds.resize(tokens.len(), 1);
    let scores: Vec<f32> = (0..tokens.len()).map(|id| -(id as f32)).collect();
    let borrowed: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let values = BTreeMap::from([
        (
            "tokenizer.ggml.model".to_owned(),
            Value::String("llama".to_owned()),
        ),
        ("tokenizer.ggml.tokens".to_owned(), strings(&borrowed)),
        (
            "tokenizer.ggml.scores".to_owned(),
            Value::Array(Array::Floats(scores)),
        ),
        (
            "tokenizer.ggml.token_type".to_owned(),
            Value::Array(Array::Ints(kinds)),
        ),
        ("tokenizer.ggml.bos_token_id".to_owned(), Value::Unsigned(1)),
        ("tokenizer.ggml.eos_token_id".to_owned(), Value::Unsigned(2)),
    ]);
    Metadata::new("sentence_piece.gguf", values)
}

fn sentence_piece() -> &'static Arc<Tokenizer> {
    static BUILT: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    BUILT.get_or_init(|| Arc::new(Tokenizer::from_gguf(&sentence_piece_metadata()).unwrap()))
}

fn chatml() -> ChatTemplate {
    ChatTemplate::new(TemplateSource {
        jinja: CHATML.to_owned(),
        ..TemplateSource::default()
    })
    .unwrap()
}

/// Texts that mix words, control tokens, their fragments and any character.
fn texts() -> impl Strategy<Value = String> {
    let words = prop::sample::select(vec![
        "<|im_start|>",
        "<|im_end|>",
        "<|im_",
        "start|>",
        "<|",
        "|>",
        "<",
        "<think>",
        "</s>",
        "<s>",
        " the",
        "he",
        "hello",
        "12",
        "  ",
        "\n",
        "é",
        "ﬁ½",
        "😀",
        "'t",
        "▁",
    ]);
    let part =
        prop_oneof![3 => words.prop_map(str::to_owned), 1 => any::<char>().prop_map(String::from)];
    prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
}

fn streamed(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip: bool) -> String {
    let mut stream = tokenizer.decode_stream(skip);
    let mut text: String = ids.iter().map(|id| stream.step(*id).unwrap()).collect();
    text.push_str(&stream.finish());
    text
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn encoding_is_the_crates_own(text in texts()) {
        for tokenizer in [byte_level(), sentence_piece()] {
            let inner = Inner::from_bytes(tokenizer.to_json().unwrap()).unwrap();
            let bare = inner.encode(text.as_str(), false).unwrap();
            let mut ids = tokenizer.encode(&text).unwrap();
            if tokenizer.drops_leading_space() {
                prop_assert_eq!(ids.remove(0), 1, "a SentencePiece model begins with BOS");
            }
            prop_assert_eq!(ids, bare.get_ids());
        }
    }

    #[test]
    fn plain_text_round_trips_without_control(text in texts()) {
        for tokenizer in [byte_level(), sentence_piece()] {
            let ids = tokenizer.encode_plain(&text).unwrap();
            prop_assert!(!ids.iter().any(|id| tokenizer.is_control(*id)), "{ids:?}");
            // SentencePiece cannot tell its own mark from a space.
            let expected = if tokenizer.drops_leading_space() { text.replace('▁', " ") } else { text.clone() };
            prop_assert_eq!(tokenizer.decode(&ids, true).unwrap(), expected);
        }
    }

    #[test]
    fn streams_say_what_decode_says(ids in prop::collection::vec(0u32..269, 0..24), skip in any::<bool>()) {
        for tokenizer in [byte_level(), sentence_piece()] {
            prop_assert_eq!(streamed(tokenizer, &ids, skip), tokenizer.decode(&ids, skip).unwrap());
        }
    }

    #[test]
    fn a_message_cannot_write_control_tokens(contents in prop::collection::vec(texts(), 1..4)) {
        let template = chatml();
        let messages: Vec<_> = contents.iter().map(|content| Message::new("user", content)).collect();
        let ids = encode_chat(byte_level(), &template, &messages, &[], true).unwrap();
        let controls: Vec<u32> = ids.iter().copied().filter(|id| byte_level().is_control(*id)).collect();
        let mut expected = [1, 2].repeat(messages.len());
        expected.push(1);
        prop_assert_eq!(controls, expected);
        prop_assert_eq!(byte_level().decode(&ids, false).unwrap(), template.render(&messages, &[], true).unwrap());
    }

    #[test]
    fn a_harmless_conversation_is_encoded_as_rendered(content in "[a-z12 \\n']{0,40}") {
        let template = chatml();
        let messages = [Message::new("system", &content), Message::new("user", content.trim())];
        let rendered = template.render(&messages, &[], true).unwrap();
        prop_assert_eq!(encode_chat(byte_level(), &template, &messages, &[], true).unwrap(), byte_level().encode(&rendered).unwrap());
    }

    #[test]
    fn any_template_text_is_an_error_or_a_template(jinja in "(\\{%|%\\}|\\{\\{|\\}\\}|for|in|if|endif| |messages|\\[|\\]|'|x|\\+|~|generation|-|\\||trim|\\(|\\)|\\n|\\PC){0,30}") {
        if let Ok(template) = ChatTemplate::new(TemplateSource { jinja, ..TemplateSource::default() }) {
            let _ = template.render(&[Message::new("user", "x")], &[], true);
        }
    }

    #[test]
    fn any_tokenizer_json_is_an_error_or_a_tokenizer(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        static JSON: OnceLock<String> = OnceLock::new();
        let mut json = JSON.get_or_init(|| byte_level().to_json().unwrap()).clone().into_bytes();
        for (index, byte) in flips {
            let at = index.index(json.len());
            json[at] = byte;
        }
        if let Ok(tokenizer) = Tokenizer::from_json(&json, None, None) {
            let _ = tokenizer.encode("the 12 <|im_start|>");
        }
    }
}

#[test]
fn pieces_are_bytes() {
    let tokenizer = byte_level();
    for byte in 0..=255u8 {
        assert_eq!(tokenizer.piece(3 + u32::from(byte)).unwrap(), [byte]);
    }
    assert_eq!(
        tokenizer
            .piece(tokenizer.token_id("Ġthe").unwrap())
            .unwrap(),
        b" the"
    );
    assert_eq!(tokenizer.piece(1).unwrap(), b"<|im_start|>");
    let error = tokenizer.piece(9999).unwrap_err().to_string();
    assert!(
        error.contains("9999") && error.contains(&tokenizer.vocab_size().to_string()),
        "{error}"
    );
}

#[test]
fn half_a_character_waits_and_ends_as_one_replacement() {
    let tokenizer = byte_level();
    let ids: Vec<u32> = "é😀".bytes().map(|byte| 3 + u32::from(byte)).collect();
    let mut stream = tokenizer.decode_stream(true);
    let steps: Vec<String> = ids.iter().map(|id| stream.step(*id).unwrap()).collect();
    assert_eq!(steps, ["", "é", "", "", "", "😀"]);
    assert_eq!(stream.finish(), "");
    let mut stream = tokenizer.decode_stream(true);
    assert_eq!(
        ids[2..5]
            .iter()
            .map(|id| stream.step(*id).unwrap())
            .collect::<String>(),
        ""
    );
    assert_eq!(stream.finish(), "\u{FFFD}");
}

#[test]
fn pre_tokenisers_split_digits_and_contractions_by_name() {
    let ids = |pre: &str, text: &str| {
        Tokenizer::from_gguf(&byte_level_metadata(pre))
            .unwrap()
            .encode(text)
            .unwrap()
    };
    let whole = byte_level().token_id("12").unwrap();
    for pre in ["gpt-2", "smollm", "llama-bpe"] {
        assert_eq!(ids(pre, "12"), [whole], "{pre}");
    }
    assert_eq!(ids("qwen2", "12").len(), 2);
    assert_eq!(
        ids("qwen2", "e\u{301}"),
        ids("qwen2", "é"),
        "qwen2 composes characters first"
    );
    assert_ne!(ids("gpt-2", "e\u{301}"), ids("gpt-2", "é"));
    let error = Tokenizer::from_gguf(&byte_level_metadata("tekken"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("byte_level.gguf")
            && error.contains("tokenizer.ggml.pre")
            && error.contains("tekken"),
        "{error}"
    );
}

#[test]
fn a_tokenizer_json_reads_back_the_same() {
    for tokenizer in [byte_level(), sentence_piece()] {
        let again =
            Tokenizer::from_json(tokenizer.to_json().unwrap().as_bytes(), Some("<s>"), None)
                .unwrap();
        let text = " hello the 12 <|im_start|> é</s>";
        assert_eq!(
            again.encode_plain(text).unwrap(),
            tokenizer.encode_plain(text).unwrap()
        );
        let ids: Vec<u32> = (0..tokenizer.vocab_size() as u32).collect();
        assert_eq!(
            again.decode(&ids, false).unwrap(),
            tokenizer.decode(&ids, false).unwrap()
        );
        assert!((0..300).all(|id| again.is_control(id) == tokenizer.is_control(id)));
    }
}

fn golden_file() -> PathBuf {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/golden");
    let named = std::env::var_os("ESPALIER_GOLDEN").map(PathBuf::from);
    named.unwrap_or(default).join("tokenizer.json")
}

#[test]
fn golden_texts_and_chats() {
    let golden = golden_file();
    let (Ok(json), Some(model)) = (std::fs::read(&golden), std::env::var_os("ESPALIER_MODEL"))
    else {
        eprintln!(
            "not checked: no {} (ESPALIER_GOLDEN names its directory) or no ESPALIER_MODEL",
            golden.display()
        );
        return;
    };
    let golden: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let gguf = Gguf::open(Path::new(&model)).unwrap();
    let tokenizer = Arc::new(Tokenizer::from_gguf(gguf.metadata()).unwrap());
    let jinja = gguf
        .metadata()
        .text("tokenizer.chat_template")
        .unwrap()
        .unwrap()
        .to_owned();
    let source = TemplateSource {
        jinja,
        bos_token: tokenizer.bos_token(),
        eos_token: tokenizer.eos_token(),
    };
    let template = ChatTemplate::new(source).unwrap();
    let texts = golden["texts"].as_array().unwrap();
    for case in texts {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        assert_eq!(streamed(&tokenizer, &ids, false), text);
    }
    let chats = golden["chats"].as_array().unwrap();
    for case in chats {
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let rendered = case["rendered"].as_str().unwrap();
        assert_eq!(template.render(&messages, &[], true).unwrap(), rendered);
        assert_eq!(
            encode_chat(&tokenizer, &template, &messages, &[], true).unwrap(),
            tokenizer.encode(rendered).unwrap()
        );
    }
    assert!(
        !texts.is_empty() && !chats.is_empty(),
        "the golden file holds no case"
    );
}
