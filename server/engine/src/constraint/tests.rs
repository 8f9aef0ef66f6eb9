//! Constraints against oracles: every text that a random walk through the masks gives is accepted by the regex crate or
//! by a small validator of JSON schemas; whatever a client writes ends in an answer or an error, within its limits.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod random;

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use espalier_adapters::text::Tokenizer;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::machine::Fault;
use super::{Compiler, Constraint, ConstraintLimits, ConstraintSource, Masker, Progress};
use crate::error::EngineError;
use crate::model;
pub(crate) use random::{regex, satisfies, schema};

fn tiny() -> (Arc<Tokenizer>, usize, Vec<u32>) {
    let model = model::load("tiny:1").unwrap();
    (model.tokenizer, model.config.vocab, model.stop_ids)
}

fn compiler(limits: ConstraintLimits) -> Compiler {
    let (tokenizer, vocab, stop_ids) = tiny();
    Compiler::start(tokenizer, vocab, stop_ids, limits).unwrap()
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    runtime.unwrap().block_on(future)
}

/// Compiles for `tiny:SEED`, whose vocabulary is the same for every seed.
pub(crate) fn compile(source: ConstraintSource) -> Result<Constraint, EngineError> {
    static COMPILER: LazyLock<Compiler> = LazyLock::new(|| {
        compiler(ConstraintLimits {
            compile_timeout: Duration::from_secs(60),
            ..ConstraintLimits::default()
        })
    });
    wait(COMPILER.compile("t", source))
}

/// Tokens drawn evenly from the masks until the text is complete, or an end is drawn, or there are `most`.
fn walk(
    constraint: &Constraint,
    tokenizer: &Tokenizer,
    stop_ids: &[u32],
    seed: u64,
    most: usize,
) -> Result<(String, bool), Fault> {
    let masker = Masker::start(1).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (mut candidate, mut bytes) = (constraint.candidate(), Vec::new());
    for _ in 0..most {
        let allowed = candidate.allowed()?;
        let ids: Vec<u32> = (0..tokenizer.vocab_size() as u32)
            .filter(|&id| allowed.allows(id))
            .collect();
        let token = *ids.choose(&mut rng).unwrap();
        if stop_ids.contains(&token) {
            return Ok((String::from_utf8(bytes).unwrap(), true));
        }
        assert!(!tokenizer.is_control(token), "text matched a control token");
        bytes.extend_from_slice(tokenizer.piece(token).unwrap());
        if candidate.commit(token, &masker)? == Progress::Complete {
            return Ok((String::from_utf8(bytes).unwrap(), true));
        }
    }
    Ok((String::from_utf8_lossy(&bytes).into_owned(), false))
}

#[test]
fn every_walk_through_a_regex_matches_it() {
    let (tokenizer, _, stop_ids) = tiny();
    let mut complete = 0;
    for seed in 0..60 {
        let pattern = regex(&mut ChaCha8Rng::seed_from_u64(seed));
        let oracle = ::regex::Regex::new(&format!("^(?:{pattern})$")).unwrap();
        if oracle.is_match("")
            && !["a", "b", "7", "-", "é"]
                .iter()
                .any(|text| oracle.is_match(text))
        {
            continue;
        }
        let constraint = compile(ConstraintSource::Regex(pattern.clone())).unwrap();
        for walks in 0..4 {
            let walked = walk(&constraint, &tokenizer, &stop_ids, 100 * seed + walks, 400);
            let (text, ended) = walked.unwrap();
            assert!(ended, "{pattern} did not end: {text}");
            assert!(oracle.is_match(&text), "{text:?} is not of {pattern}");
            complete += 1;
        }
    }
    assert!(complete > 100, "only {complete} walks");
}

#[test]
fn every_walk_through_a_schema_satisfies_it() {
    let (tokenizer, _, stop_ids) = tiny();
    for seed in 0..40 {
        let schema = schema(&mut ChaCha8Rng::seed_from_u64(seed), 3);
        let constraint = compile(ConstraintSource::JsonSchema(schema.to_string())).unwrap();
        for walks in 0..3 {
            let walked = walk(&constraint, &tokenizer, &stop_ids, 100 * seed + walks, 4000);
            let (text, ended) = walked.unwrap();
            assert!(ended, "{schema} did not end: {text}");
            let value = serde_json::from_str(&text);
            let value = value.unwrap_or_else(|error| panic!("{error}: {text}"));
            assert!(satisfies(&value, &schema), "{text} is not of {schema}");
        }
    }
}

#[test]
fn choices_are_texts_and_no_patterns() {
    let (tokenizer, _, stop_ids) = tiny();
    let choices = [
        "a.c",
        "(x)|y*",
        "a",
        "<|im_end|>",
        "back\\slash / \"q\"\n",
        "猫",
        "<b>",
    ];
    let choices = choices.map(str::to_owned).to_vec();
    let constraint = compile(ConstraintSource::Choices(choices.clone())).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..200 {
        let (text, ended) = walk(&constraint, &tokenizer, &stop_ids, seed, 60).unwrap();
        assert!(ended && choices.contains(&text), "{text:?}");
        seen.insert(text);
    }
    assert_eq!(seen.len(), choices.len(), "{seen:?}");
}

#[test]
fn a_grammar_is_larks() {
    let (tokenizer, _, stop_ids) = tiny();
    let lark = "start: pair (\",\" pair){0,2}\npair: KEY \"=\" value\nvalue: /[0-9]{1,3}/ | \"(\" value \")\"\nKEY: /[a-c]+/";
    let constraint = compile(ConstraintSource::Grammar(lark.to_owned())).unwrap();
    let nested =
        ::regex::Regex::new(r"^([a-c]+=\(*[0-9]{1,3}\)*)(,[a-c]+=\(*[0-9]{1,3}\)*){0,2}$").unwrap();
    let mut complete = 0;
    for seed in 0..30 {
        let (text, ended) = walk(&constraint, &tokenizer, &stop_ids, seed, 300).unwrap();
        if ended {
            complete += 1;
            assert!(nested.is_match(&text), "{text}");
            let count = |c| text.matches(c).count();
            assert_eq!(count('('), count(')'), "{text}");
        }
    }
    assert!(complete > 15);
}

#[test]
fn anchors_around_the_whole_are_accepted() {
    let (tokenizer, _, stop_ids) = tiny();
    let constraint = compile(ConstraintSource::Regex(r"^[ab]{2}\$$".to_owned())).unwrap();
    let (text, _) = walk(&constraint, &tokenizer, &stop_ids, 1, 10).unwrap();
    assert!(text.len() == 3 && text.ends_with('$'), "{text}");
}

fn reason(source: ConstraintSource) -> (&'static str, String) {
    match compile(source) {
        Ok(_) => ("ok", String::new()),
        Err(EngineError::ConstraintInvalid { reason, .. }) => ("invalid", reason),
        Err(EngineError::ConstraintTooComplex { reason, .. }) => ("too complex", reason),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn what_cannot_be_used_is_refused_with_its_reason() {
    let schema = |text: &str| ConstraintSource::JsonSchema(text.to_owned());
    let regex = |text: &str| ConstraintSource::Regex(text.to_owned());
    let lark = |text: &str| ConstraintSource::Grammar(text.to_owned());
    let cases = [
        (schema("{"), "is not JSON"),
        (schema("{\"type\":\"strnig\"}"), "strnig"),
        (schema("false"), "nsatisfiable"),
        (schema("{\"$ref\":\"https://example.com/x\"}"), ""),
        (schema("{\"$ref\":\"#/nowhere\"}"), "nowhere"),
        (regex("(a"), ""),
        (regex("a\\"), "backslash"),
        (regex("(?=a)b"), ""),
        (regex(""), "is empty"),
        (regex("(?:)"), "empty"),
        (ConstraintSource::Choices(vec![]), "is empty"),
        (
            ConstraintSource::Choices(vec!["a".to_owned(), String::new()]),
            "at 1 is empty",
        ),
        (lark("start: missing"), "missing"),
        (lark("no start here"), ""),
    ];
    for (source, part) in cases {
        let (kind, text) = reason(source.clone());
        assert_eq!(kind, "invalid", "{source:?}: {text}");
        assert!(text.contains(part), "{source:?}: {text}");
        assert!(
            !text.is_empty() && !text.contains("backtrace") && !text.contains("verbose"),
            "{text}"
        );
    }
}

#[test]
fn too_much_is_too_complex() {
    let long = ConstraintSource::Regex("a".repeat((64 << 10) + 1));
    let (kind, text) = reason(long);
    assert_eq!(kind, "too complex");
    assert!(
        text.contains("65537 bytes") && text.contains("65536"),
        "{text}"
    );
    let little = ConstraintLimits {
        compile_fuel: 1000,
        max_grammar_symbols: 50,
        ..ConstraintLimits::default()
    };
    let compiler = compiler(little);
    let words: Vec<String> = (0..900)
        .map(|i| format!("word{}", i * 7919 % 1000))
        .collect();
    let rules: String = (0..60)
        .map(|i| format!("r{i}: \"a\" r{} | \"b\"\n", i + 1))
        .collect();
    for source in [
        ConstraintSource::Choices(words),
        ConstraintSource::Grammar(format!("start: r0\n{rules}r60: \"c\"")),
    ] {
        let error = wait(compiler.compile("t", source)).unwrap_err();
        assert!(
            matches!(error, EngineError::ConstraintTooComplex { .. }),
            "{error}"
        );
    }
}

/// None of these may take the process down, and each must end in time.
#[test]
fn deep_and_wide_constraints_come_back() {
    let chain: String = (0..4000).map(|i| format!("T{i}: T{}\n", i + 1)).collect();
    let refs: String = (0..1500)
        .map(|i| format!("\"d{i}\":{{\"$ref\":\"#/$defs/d{}\"}},", i + 1))
        .collect();
    let sources = [
        ConstraintSource::Regex(format!("{}a{}", "(".repeat(30_000), ")".repeat(30_000))),
        ConstraintSource::Regex("(a|b".repeat(10_000)),
        ConstraintSource::Regex("[ab]?".repeat(12_000)),
        ConstraintSource::Regex("(.*a){40}".to_owned()),
        ConstraintSource::Grammar(format!(
            "start: {}\"a\"{}",
            "(".repeat(30_000),
            ")".repeat(30_000)
        )),
        ConstraintSource::Grammar(format!(
            "start: {}\"a\"{}",
            "[".repeat(30_000),
            "]".repeat(30_000)
        )),
        ConstraintSource::Grammar(format!("start: T0\n{chain}T4000: \"x\"")),
        ConstraintSource::Grammar(format!(
            "start: /{}a{}/",
            "(".repeat(30_000),
            ")".repeat(30_000)
        )),
        ConstraintSource::Grammar(format!("start: {}", "%lark { start: ".repeat(4000))),
        ConstraintSource::Grammar("start: start start | \"a\"".to_owned()),
        ConstraintSource::JsonSchema(format!(
            "{{\"$ref\":\"#/$defs/d0\",\"$defs\":{{{refs}\"d1500\":{{\"type\":\"null\"}}}}}}"
        )),
        ConstraintSource::JsonSchema("{\"$ref\":\"#\"}".to_owned()),
        ConstraintSource::JsonSchema("{\"items\":".repeat(7000)),
        ConstraintSource::JsonSchema("{\"anyOf\":[{\"$ref\":\"#\"},{\"$ref\":\"#\"}]}".to_owned()),
        ConstraintSource::JsonSchema("{\"type\":\"string\",\"minLength\":100000}".to_owned()),
        ConstraintSource::JsonSchema("{\"type\":\"array\",\"minItems\":1000000}".to_owned()),
        ConstraintSource::JsonSchema(
            "{\"type\":\"string\",\"pattern\":\"(a{1000}){1000}{1000}\"}".to_owned(),
        ),
    ];
    let (tokenizer, _, stop_ids) = tiny();
    for source in sources {
        let since = std::time::Instant::now();
        let shown: String = format!("{source:?}").chars().take(60).collect();
        if let Ok(constraint) = compile(source) {
            let walked = walk(&constraint, &tokenizer, &stop_ids, 3, 50);
            assert!(
                !matches!(walked, Err(Fault::Broken(_))),
                "{shown}: {walked:?}"
            );
        }
        assert!(since.elapsed() < Duration::from_secs(30), "{shown}");
    }
}

/// Any text at all as any kind: an answer or an error.
#[test]
fn noise_is_refused_or_compiled() {
    let alphabet: Vec<char> = "ab01 \n\"\\/()[]{}|*+?.^$:,<>%_-#@éstart$refTOKEN"
        .chars()
        .collect();
    for seed in 0..300 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let len = rng.random_range(1..60);
        let text: String = (0..len)
            .map(|_| *alphabet.choose(&mut rng).unwrap())
            .collect();
        for source in [
            ConstraintSource::Regex(text.clone()),
            ConstraintSource::Grammar(format!("start: {text}")),
            ConstraintSource::JsonSchema(format!(
                "{{\"type\":\"string\",\"pattern\":{}}}",
                serde_json::json!(text)
            )),
        ] {
            let _ = reason(source);
        }
    }
}

#[test]
fn a_late_constraint_is_an_error_and_kept_for_the_next_try() {
    let limits = ConstraintLimits {
        compile_timeout: Duration::ZERO,
        ..ConstraintLimits::default()
    };
    let compiler = compiler(limits);
    // A compiler's thread may be quicker than the first look at its answer, but not every time.
    let source = |i: usize| ConstraintSource::Regex(format!("w{i}[a-z]{{3}}"));
    let late = (0..500).find_map(|i| Some((i, wait(compiler.compile("t", source(i))).err()?)));
    let (i, error) = late.unwrap();
    assert!(
        matches!(&error, EngineError::ConstraintTooComplex { reason, .. } if reason.contains("limit of time")),
        "{error}"
    );
    let until = std::time::Instant::now() + Duration::from_secs(20);
    while wait(compiler.compile("t", source(i))).is_err() {
        assert!(std::time::Instant::now() < until);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_cache_is_bounded_and_each_tenants_own() {
    let limits = ConstraintLimits {
        cache_entries: 3,
        ..ConstraintLimits::default()
    };
    let compiler = compiler(limits);
    let source = |i: usize| ConstraintSource::Regex(format!("[a-z]{{{i}}}"));
    for i in 1..10 {
        wait(compiler.compile("t", source(i))).unwrap();
        assert!(compiler.cached() <= 3);
    }
    assert!(compiler.has("t", &source(9)) && !compiler.has("t", &source(1)));
    assert!(!compiler.has("u", &source(9)));
    // Other texts of the same bytes, and other kinds of the same text.
    assert!(!compiler.has("t", &ConstraintSource::Grammar("[a-z]{9}".to_owned())));
    let small = ConstraintLimits {
        cache_bytes: 10,
        ..ConstraintLimits::default()
    };
    let nothing = super::tests::compiler(small);
    wait(nothing.compile("t", source(2))).unwrap();
    assert_eq!(nothing.cached(), 0);
}

/// A vocabulary without a byte for every character: SentencePiece's, with a few bytes to fall back on.
#[test]
fn byte_fallback_spells_what_no_piece_does() {
    let tokenizer = sentence_piece(true);
    let vocab = tokenizer.vocab_size() + 5;
    let compiler = Compiler::start(
        Arc::clone(&tokenizer),
        vocab,
        vec![2],
        ConstraintLimits::default(),
    )
    .unwrap();
    let source = ConstraintSource::Regex(" (yes|é!)".to_owned());
    let constraint = wait(compiler.compile("t", source)).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..40 {
        let (text, ended) = walk(&constraint, &tokenizer, &[2], seed, 20).unwrap();
        assert!(ended);
        seen.insert(text);
    }
    let seen: Vec<_> = seen.iter().map(String::as_str).collect();
    assert_eq!(seen, [" yes", " é!"]);
}

#[test]
fn a_character_that_no_token_spells_is_a_dead_end() {
    let tokenizer = sentence_piece(false);
    let vocab = tokenizer.vocab_size();
    let compiler = Compiler::start(
        Arc::clone(&tokenizer),
        vocab,
        vec![2],
        ConstraintLimits::default(),
    )
    .unwrap();
    let compile =
        |regex: &str| wait(compiler.compile("t", ConstraintSource::Regex(regex.to_owned())));
    let constraint = compile("yes é").unwrap();
    assert_eq!(
        walk(&constraint, &tokenizer, &[2], 1, 20),
        Err(Fault::DeadEnd)
    );
    let error = compile("éy").unwrap_err();
    assert!(
        error.to_string().contains("no token may come first"),
        "{error}"
    );
}

fn sentence_piece(with_bytes: bool) -> Arc<Tokenizer> {
    let mut tokens = ["<unk>", "<s>", "</s>", "▁", "y", "e", "s", "!", "▁y", "es"]
        .map(str::to_owned)
        .to_vec();
    if with_bytes {
        tokens.extend([0xC3u8, 0xA9].map(|byte| format!("<0x{byte:02X}>")));
    }
    let vocab: serde_json::Map<String, serde_json::Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), id.into()))
        .collect();
    let special = |id: usize, content: &str| serde_json::json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "post_processor": null, "pre_tokenizer": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["▁ y", "e s"], "byte_fallback": with_bytes, "unk_token": "<unk>",
            "fuse_unk": true, "dropout": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "ignore_merges": false},
    });
    Arc::new(Tokenizer::from_json(json.to_string().as_bytes(), Some("<s>"), Some("</s>")).unwrap())
}
