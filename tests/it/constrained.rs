//! Constrained output over a real socket: what comes back matches, streamed or whole, with adapters and candidates; what
//! cannot be used is refused by name; and the real model writes JSON that a schema accepts.

use std::path::PathBuf;

use espalier_proto::v1;
use espalier_proto::v1::constraint::Kind;
use espalier_tests::TestServer;
use tokio_stream::StreamExt;
use tonic::Code;

use crate::inference_api::{generate, inference, refused, user};

const PERSON: &str = r#"{"type": "object", "properties": {
    "name": {"type": "string", "minLength": 1, "maxLength": 20},
    "age": {"type": "integer", "minimum": 0, "maximum": 120},
    "likes": {"type": "array", "items": {"enum": ["tea", "coffee"]}, "maxItems": 2}},
    "required": ["name", "age", "likes"], "additionalProperties": false}"#;

fn constrained(kind: Kind, seed: u64) -> v1::GenerateRequest {
    let mut request = generate("tell me", 1500);
    request.sampling = Some(v1::SamplingParams {
        temperature: Some(1.0),
        seed: Some(seed),
        ..Default::default()
    });
    request.stop.as_mut().unwrap().ignore_eos = None;
    request.constraint = Some(v1::Constraint { kind: Some(kind) });
    request
}

fn choices(texts: &[&str]) -> Kind {
    Kind::Choices(v1::Choices {
        texts: texts.iter().map(|text| (*text).to_owned()).collect(),
    })
}

/// A person as the schema has it.
fn is_person(text: &str) -> bool {
    let Ok(value) = serde_json::from_str::<serde_json::Value>(text) else {
        return false;
    };
    let name = value["name"]
        .as_str()
        .is_some_and(|name| (1..=20).contains(&name.chars().count()));
    let age = value["age"].as_u64().is_some_and(|age| age <= 120);
    let likes = value["likes"].as_array().is_some_and(|likes| {
        likes.len() <= 2 && likes.iter().all(|like| like == "tea" || like == "coffee")
    });
    name && age && likes && value.as_object().is_some_and(|fields| fields.len() == 3)
}

#[tokio::test]
async fn what_comes_back_matches() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let grammar = "start: (\"a\" | \"b\"){2,4} NUMBER\nNUMBER: /-?[0-9]{1,3}/";
    let pattern = regex::Regex::new("^[ab]{2,4}-?[0-9]{1,3}$").unwrap();
    for seed in 0..8 {
        let mut request = constrained(Kind::JsonSchema(PERSON.to_owned()), seed);
        request.sampling.as_mut().unwrap().n = Some(2);
        let reply = client.generate(request).await.unwrap().into_inner();
        assert_eq!(reply.candidates.len(), 2);
        for candidate in reply.candidates {
            assert!(is_person(&candidate.text), "{}", candidate.text);
            assert_eq!(candidate.finish_reason(), v1::FinishReason::Constraint);
        }
        let request = constrained(choices(&["yes", "no", "not at all"]), seed);
        let reply = client.generate(request).await.unwrap().into_inner();
        assert!(["yes", "no", "not at all"].contains(&reply.candidates[0].text.as_str()));
        let request = constrained(Kind::Grammar(grammar.to_owned()), seed);
        let text = client
            .generate(request)
            .await
            .unwrap()
            .into_inner()
            .candidates
            .remove(0)
            .text;
        assert!(pattern.is_match(&text), "{text}");
    }
    server.ended().await;
}

#[tokio::test]
async fn a_constrained_chat_streams_the_same_text() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let inner = constrained(Kind::Regex("[A-Z][a-z]{2,8} [0-9]{4}".to_owned()), 5);
    let request = v1::ChatRequest {
        messages: vec![user("when?")],
        sampling: inner.sampling,
        stop: inner.stop,
        constraint: inner.constraint,
        ..Default::default()
    };
    let whole = client.chat(request.clone()).await.unwrap().into_inner();
    let mut stream = client.stream_chat(request).await.unwrap().into_inner();
    let (mut text, mut reason) = (String::new(), None);
    while let Some(chunk) = stream.next().await {
        match chunk.unwrap().event.unwrap() {
            v1::chat_chunk::Event::Delta(delta) => text.push_str(&delta.text),
            v1::chat_chunk::Event::Finished(end) => reason = Some(end.finish_reason()),
            _ => {}
        }
    }
    assert_eq!(text, whole.candidates[0].text);
    assert_eq!(reason, Some(v1::FinishReason::Constraint));
    let pattern = regex::Regex::new("^[A-Z][a-z]{2,8} [0-9]{4}$").unwrap();
    assert!(pattern.is_match(&text), "{text}");
    server.ended().await;
}

#[tokio::test]
async fn what_cannot_be_used_is_refused_by_name() {
    let limits = [
        ("max_constraint_bytes", "3000"),
        ("constraint_compile_fuel", "1000"),
    ];
    let server = TestServer::start(&limits).await;
    let mut client = inference(&server).await;
    let long = "a".repeat(3001);
    let words: Vec<String> = (0..300)
        .map(|i| format!("word{}", i * 7919 % 1000))
        .collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let cases = [
        (
            Kind::JsonSchema("{".to_owned()),
            "CONSTRAINT_INVALID",
            "constraint.json_schema",
            "is not JSON",
        ),
        (
            Kind::Regex("(a".to_owned()),
            "CONSTRAINT_INVALID",
            "constraint.regex",
            "",
        ),
        (
            choices(&[]),
            "CONSTRAINT_INVALID",
            "constraint.choices",
            "empty",
        ),
        (
            Kind::Grammar("start: nothing".to_owned()),
            "CONSTRAINT_INVALID",
            "constraint.grammar",
            "nothing",
        ),
        (
            Kind::Regex(long),
            "CONSTRAINT_TOO_COMPLEX",
            "constraint.regex",
            "3001 bytes, the limit is 3000 bytes",
        ),
        (
            choices(&words),
            "CONSTRAINT_TOO_COMPLEX",
            "constraint.choices",
            "",
        ),
    ];
    for (kind, expected, field, part) in cases {
        let request = constrained(kind, 1);
        let (code, reason, message) = refused(client.generate(request.clone()).await);
        assert_eq!(
            (code, reason.as_str()),
            (Code::InvalidArgument, expected),
            "{message}"
        );
        assert!(
            message.contains(field) && message.contains(part),
            "{message}"
        );
        let streamed = refused(client.stream_generate(request).await.map(|_| ()));
        assert_eq!(streamed.1, expected);
    }
    let mut request = generate("x", 3);
    request.constraint = Some(v1::Constraint { kind: None });
    assert_eq!(refused(client.generate(request).await).1, "INVALID_FIELD");
    server.ended().await;
}

/// The model, when the machine has it.
fn model() -> Option<PathBuf> {
    let found = std::env::var_os("ESPALIER_MODEL").map(PathBuf::from);
    let found = found.filter(|path| path.exists());
    if found.is_none() {
        eprintln!("skipped: ESPALIER_MODEL names no model file (scripts/test.sh fetches it)");
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_real_model_writes_what_the_schema_says() {
    let Some(model) = model() else { return };
    let settings = [
        ("model", model.to_str().unwrap()),
        ("kv_cache_bytes", "128MiB"),
    ];
    let server = TestServer::start(&settings).await;
    let mut client = inference(&server).await;
    for seed in 0..4 {
        let mut inner = constrained(Kind::JsonSchema(PERSON.to_owned()), seed);
        inner.stop.as_mut().unwrap().max_tokens = Some(600);
        let request = v1::ChatRequest {
            messages: vec![user(
                "Describe a person named Ada, aged 36, who likes tea, as JSON.",
            )],
            sampling: inner.sampling,
            stop: inner.stop,
            constraint: inner.constraint,
            ..Default::default()
        };
        let reply = client.chat(request).await.unwrap().into_inner();
        let candidate = &reply.candidates[0];
        assert!(is_person(&candidate.text), "{}", candidate.text);
        assert_eq!(candidate.finish_reason(), v1::FinishReason::Constraint);
    }
    server.ended().await;
}
