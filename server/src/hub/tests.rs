//! Models by name, against a server that behaves like the hub, and against caches without one.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::*;
use crate::setting::Secret;

const REPO: &str = "acme/tiny-model";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Files of one model, over HTTP as the hub serves them.
struct FakeHub {
    endpoint: String,
    /// What was asked for, with the credential that came along.
    asked: Arc<Mutex<Vec<String>>>,
}

impl FakeHub {
    fn start(files: &[(&str, &str)]) -> FakeHub {
        let files: Vec<(String, String)> = files
            .iter()
            .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
            .collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (files, seen) = (files.clone(), Arc::clone(&seen));
                std::thread::spawn(move || answer(stream.unwrap(), &files, &seen));
            }
        });
        FakeHub { endpoint, asked }
    }
}

fn answer(mut stream: TcpStream, files: &[(String, String)], seen: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    while let Some(Ok(first)) = lines.next() {
        let headers: Vec<String> = lines
            .by_ref()
            .map_while(Result::ok)
            .take_while(|line| !line.is_empty())
            .collect();
        let header = |name: &str| {
            headers.iter().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name)
                    .then(|| value.trim().to_owned())
            })
        };
        let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
        let key = header("authorization").unwrap_or_default();
        seen.lock().unwrap().push(format!("{path} {key}"));
        let from = header("range").and_then(|range| {
            range
                .strip_prefix("bytes=")?
                .split('-')
                .next()?
                .parse()
                .ok()
        });
        let reply = reply(&path, from.unwrap_or(0), files);
        if stream.write_all(&reply).is_err() {
            return;
        }
    }
}

fn reply(path: &str, from: usize, files: &[(String, String)]) -> Vec<u8> {
    let known = |revision: &str| revision == "main" || revision == COMMIT;
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{REPO}/revision/"))
        && known(revision)
    {
        let siblings: Vec<_> = files
            .iter()
            .map(|(name, _)| serde_json::json!({"rfilename": name}))
            .collect();
        let body = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
        let length = body.len();
        return format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}").into_bytes();
    }
    let file = path
        .strip_prefix(&format!("/{REPO}/resolve/{COMMIT}/"))
        .and_then(|name| files.iter().find(|(known, _)| known == name));
    let Some((_, text)) = file else {
        return b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_vec();
    };
    let (size, etag) = (text.len(), hex::encode(Sha256::digest(text)));
    let body = &text[from.min(size)..];
    let length = body.len();
    format!(
        "HTTP/1.1 206 Partial Content\r\netag: \"{etag}\"\r\nx-repo-commit: {COMMIT}\r\n\
         content-range: bytes {from}-{}/{size}\r\ncontent-length: {length}\r\n\r\n{body}",
        size.saturating_sub(1)
    )
    .into_bytes()
}

fn hub(cache: &TempDir, endpoint: &str, offline: bool) -> Hub {
    Hub {
        cache: cache.path().to_owned(),
        offline,
        token: Secret::new("hf_token"),
        endpoint: endpoint.to_owned(),
    }
}

const SHARDED: &[(&str, &str)] = &[
    ("README.md", "not needed"),
    ("config.json", "{}"),
    ("tokenizer.json", "{\"t\":1}"),
    ("generation_config.json", "{\"g\":1}"),
    (
        INDEX,
        r#"{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors","c":"model-1.safetensors"}}"#,
    ),
    ("model-1.safetensors", "first shard"),
    ("model-2.safetensors", "second shard"),
    ("pytorch_model.bin", "never downloaded"),
];

fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[test]
fn a_sharded_model_is_fetched_once_and_then_served_without_the_hub() {
    let server = FakeHub::start(SHARDED);
    let cache = tempfile::tempdir().unwrap();
    let found = locate(REPO, &hub(&cache, &server.endpoint, false)).unwrap();
    assert_eq!(found.name.as_deref(), Some("tiny-model"));
    let read = |name: &str| std::fs::read_to_string(Path::new(&found.spec).join(name)).ok();
    for (name, text) in SHARDED {
        let needed = !["README.md", "pytorch_model.bin"].contains(name);
        let expected = needed.then_some(*text);
        assert_eq!(read(name).as_deref(), expected, "{name}");
    }
    let asked = std::mem::take(&mut *server.asked.lock().unwrap());
    assert!(
        asked.iter().all(|line| line.ends_with("Bearer hf_token")),
        "{asked:?}"
    );
    // Everything is there: only what the branch is now is asked again.
    let again = locate(REPO, &hub(&cache, &server.endpoint, false)).unwrap();
    assert_eq!((again, server.asked.lock().unwrap().len()), (found, 1));
    // Offline, and online without an answer, and by commit.
    let offline = locate(REPO, &hub(&cache, &nobody(), true)).unwrap();
    let silent = locate(REPO, &hub(&cache, &nobody(), false)).unwrap();
    let commit = format!("{REPO}@{COMMIT}");
    let pinned = locate(&commit, &hub(&cache, &nobody(), true)).unwrap();
    assert_eq!(offline, silent);
    assert_eq!(offline, pinned);
    // A shard that went missing is no model.
    std::fs::remove_file(Path::new(&offline.spec).join("model-2.safetensors")).unwrap();
    let error = locate(REPO, &hub(&cache, &nobody(), true)).unwrap_err();
    assert!(
        error.to_string().contains("lacks model-2.safetensors"),
        "{error}"
    );
}

#[test]
fn one_gguf_is_taken_and_of_several_one_must_be_named() {
    let several = [("a-Q4.gguf", "four"), ("a-Q8.gguf", "eight")];
    let server = FakeHub::start(&several);
    let cache = tempfile::tempdir().unwrap();
    let with = |spec: &str| locate(spec, &hub(&cache, &server.endpoint, false));
    let error = with(REPO).unwrap_err().to_string();
    assert!(
        error.contains("acme/tiny-model:FILE: a-Q4.gguf, a-Q8.gguf"),
        "{error}"
    );
    let found = with("acme/tiny-model:a-Q8.gguf").unwrap();
    assert_eq!(std::fs::read_to_string(&found.spec).unwrap(), "eight");
    assert_eq!(found.name.as_deref(), Some("a-Q8"));
    let error = with("acme/tiny-model:b.gguf").unwrap_err().to_string();
    assert!(error.contains("no file b.gguf"), "{error}");
    let one = FakeHub::start(&several[..1]);
    let cache = tempfile::tempdir().unwrap();
    let found = locate(REPO, &hub(&cache, &one.endpoint, false)).unwrap();
    assert!(found.spec.ends_with("a-Q4.gguf"), "{found:?}");
}

#[test]
fn what_cannot_be_had_says_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let server = FakeHub::start(&[("README.md", "words")]);
    let online = hub(&cache, &server.endpoint, false);
    for (spec, hub, parts) in [
        (
            "acme/unknown",
            &online,
            vec!["has no model acme/unknown", "HF_TOKEN"],
        ),
        (
            REPO,
            &online,
            vec!["neither config.json", "nor a GGUF file"],
        ),
        (
            REPO,
            &hub(&cache, &nobody(), true),
            vec![
                "acme/tiny-model is not in the cache",
                cache.path().to_str().unwrap(),
                "HF_HUB_OFFLINE",
                "hf download acme/tiny-model",
                "path of a local file",
            ],
        ),
        (
            "acme/tiny-model@v1:x.gguf",
            &hub(&cache, &nobody(), false),
            vec![
                "did not answer",
                "hf download acme/tiny-model x.gguf --revision v1",
            ],
        ),
        (
            "models/absent.gguf",
            &online,
            vec![
                "no file or directory models/absent.gguf",
                "org/name",
                "tiny:7",
            ],
        ),
        ("absent", &online, vec!["no file or directory absent"]),
    ] {
        let error = locate(spec, hub).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{spec}: {part} in {error}");
        }
    }
}

#[test]
fn names_of_the_hub_and_paths_are_told_apart() {
    let parse = |spec: &str| Reference::parse(spec);
    let found = parse("Org/name-1.5@refs/pr/7:sub/f.GGUF").unwrap();
    assert_eq!(
        found,
        Reference {
            repo: "Org/name-1.5".to_owned(),
            revision: Some("refs/pr/7".to_owned()),
            file: Some("sub/f.GGUF".to_owned()),
        }
    );
    for wrong in [
        "",
        "name",
        "a/b/c",
        "/a",
        "./a",
        "../a",
        "a/..",
        "a/b@",
        "a/b@../x",
        "a/b:../x.gguf",
        "a/b:x.bin",
        "a/b.gguf",
        "a b/c",
    ] {
        assert_eq!(parse(wrong), None, "{wrong}");
    }
    let cache = tempfile::tempdir().unwrap();
    let local = cache.path().to_string_lossy().into_owned();
    let hub = hub(&cache, &nobody(), true);
    let found = locate(&local, &hub).unwrap();
    assert_eq!((found.spec, found.name), (local, None));
    assert_eq!(locate("tiny:7", &hub).unwrap().spec, "tiny:7");
}

#[test]
fn files_that_would_leave_the_cache_are_not_there() {
    let server = FakeHub::start(&[
        ("../../escape.gguf", "bad"),
        ("/abs.gguf", "bad"),
        ("good.gguf", "good"),
    ]);
    let cache = tempfile::tempdir().unwrap();
    let found = locate(REPO, &hub(&cache, &server.endpoint, false)).unwrap();
    assert!(found.spec.ends_with("good.gguf"));
    let index = r#"{"weight_map":{"a":"../../evil.safetensors"}}"#;
    let files = [
        ("config.json", "{}"),
        ("tokenizer.json", "{}"),
        (INDEX, index),
    ];
    let server = FakeHub::start(&files);
    let cache = tempfile::tempdir().unwrap();
    let error = locate(REPO, &hub(&cache, &server.endpoint, false)).unwrap_err();
    assert!(
        error.to_string().contains("is no name of a file"),
        "{error}"
    );
}
