//! Rules of the house that no compiler knows, read off the sources.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                walk(&path, found);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Every Rust file of the workspace with its text, by its path from the root.
fn sources() -> BTreeMap<String, String> {
    let mut paths = Vec::new();
    for part in ["proto", "adapters", "server", "client", "tests", "benches"] {
        walk(&root().join(part), &mut paths);
    }
    let read = |path: PathBuf| {
        let name = path
            .strip_prefix(root())
            .unwrap()
            .to_string_lossy()
            .into_owned();
        (name, std::fs::read_to_string(&path).unwrap())
    };
    let found: BTreeMap<_, _> = paths.into_iter().map(read).collect();
    assert!(found.len() > 100, "the sources were not found");
    found
}

/// Lines without comments; a rule about code is not broken by a sentence.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(|line| line.split("//").next().unwrap_or_default())
}

fn is_test(path: &str) -> bool {
    path.starts_with("tests/") || path.starts_with("benches/") || path.contains("tests")
}

/// Whether the text has the word, and not as a part of another.
fn has_word(text: &str, word: &str) -> bool {
    code(text).any(|line| {
        line.match_indices(word).any(|(at, _)| {
            let before = line[..at].chars().next_back();
            let after = line[at + word.len()..].chars().next();
            let joins = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
            !joins(before) && !joins(after)
        })
    })
}

#[test]
fn every_file_says_why_it_exists() {
    let silent =
        |(path, text): &(String, String)| (!text.starts_with("//! ")).then(|| path.clone());
    let found: Vec<_> = sources()
        .into_iter()
        .filter_map(|file| silent(&file))
        .collect();
    assert!(found.is_empty(), "no //! at the top: {found:?}");
}

#[test]
fn no_file_is_a_drawer_for_everything() {
    for path in sources().keys() {
        for part in Path::new(path).iter() {
            let name = part.to_string_lossy();
            let stem = name.strip_suffix(".rs").unwrap_or(&name);
            let drawers = [
                "utils", "util", "common", "helpers", "helper", "misc", "shared",
            ];
            assert!(
                !drawers.contains(&stem),
                "{path}: name it after what it is about"
            );
        }
    }
}

#[test]
fn the_environment_is_read_in_one_place() {
    // The client is configured by its command line, which names its variables there.
    for (path, text) in sources() {
        let allowed =
            path == "server/src/config.rs" || path.ends_with("/build.rs") || is_test(&path);
        let reads = |line: &str| line.contains("env::var");
        // Tests inside a file stand at its end.
        let own = text.split("#[cfg(test)]").next().unwrap_or_default();
        assert!(
            allowed || !code(own).any(reads),
            "{path} reads the environment"
        );
    }
}

#[test]
fn who_must_not_know_whom() {
    let rules: [(&[&str], &[&str]); 4] = [
        // Batches and blocks are arithmetic: they run in tests without any tensor.
        (
            &[
                "server/engine/src/scheduler",
                "server/engine/src/block_manager",
                "server/engine/src/prefix_cache",
                "server/engine/src/cache_key",
            ],
            &["candle_core", "candle_nn", "candle_transformers"],
        ),
        // Adapters and engine know no wire.
        (
            &["adapters/", "server/engine/"],
            &[
                "tonic",
                "prost",
                "espalier_proto",
                "espalier_server",
                "espalier_client",
            ],
        ),
        (&["adapters/"], &["espalier_engine", "tokio"]),
        // The client knows the contract, not who keeps it.
        (&["client/src/"], &["espalier_engine", "espalier_server"]),
    ];
    let sources = sources();
    for (places, words) in rules {
        for place in places {
            let mut files = sources
                .iter()
                .filter(|(path, _)| path.starts_with(place))
                .peekable();
            assert!(
                files.peek().is_some(),
                "{place} has moved: move its rule too"
            );
            for (path, text) in files {
                for word in words {
                    assert!(!has_word(text, word), "{path} knows {word}");
                }
            }
        }
    }
    for manifest in ["adapters/Cargo.toml", "server/engine/Cargo.toml"] {
        let text = std::fs::read_to_string(root().join(manifest)).unwrap();
        assert!(
            !text.contains("tonic") && !text.contains("prost"),
            "{manifest}"
        );
    }
}

#[test]
fn unsafe_code_stays_in_the_cpu_operations_and_the_devices() {
    let places = [
        "adapters/src/ops/cpu",
        "adapters/src/ops/cuda/gpu",
        "adapters/src/ops/cuda/emulated",
    ];
    for (path, text) in sources() {
        let allowed =
            places.iter().any(|place| path.starts_with(place)) || path.ends_with("tidy.rs");
        assert!(
            allowed || !has_word(&text, "unsafe"),
            "{path} has unsafe code"
        );
    }
}

/// Names in quotes or backquotes that look like a metric of ours.
fn metric_names(text: &str, quote: char) -> BTreeSet<String> {
    let prefixes = ["espalier_", "gen_ai_server_", "rpc_server_", "grpc_server_"];
    let kinds = [
        "_total", "_seconds", "_ratio", "_info", "_bytes", "_used", "_leases", "_tokens",
    ];
    let others = [
        "espalier_requests_",
        "espalier_batch_",
        "espalier_training_jobs",
    ];
    text.split(quote)
        .filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)))
        .filter(|name| {
            name.bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
        })
        .filter(|name| {
            kinds.iter().any(|kind| name.ends_with(kind))
                || others
                    .iter()
                    .any(|other| name.len() > other.len() && name.starts_with(other))
        })
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_metric_is_in_the_table_of_metrics() {
    let mut used = BTreeSet::new();
    for (path, text) in sources() {
        if path.starts_with("server/") && !is_test(&path) {
            used.extend(metric_names(&text, '"'));
        }
    }
    assert!(used.len() > 25, "the metrics were not found: {used:?}");
    let page = std::fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    let listed = metric_names(&page, '`');
    let missing: Vec<_> = used.difference(&listed).collect();
    assert!(missing.is_empty(), "not in docs/metrics.md: {missing:?}");
    let gone: Vec<_> = listed.difference(&used).collect();
    assert!(
        gone.is_empty(),
        "in docs/metrics.md and nowhere else: {gone:?}"
    );
}

#[test]
fn every_metric_that_is_described_is_recorded() {
    let sources = sources();
    for path in ["server/engine/src/metrics.rs", "server/src/telemetry.rs"] {
        for line in sources[path].lines() {
            let Some((_, rest)) = line.split_once("const ") else {
                continue;
            };
            let Some((name, _)) = rest.split_once(": &str = \"") else {
                continue;
            };
            let mut all = sources
                .iter()
                .filter(|(path, _)| path.starts_with("server/"));
            let recorded = all.any(|(_, text)| {
                let flat: String = text.split_whitespace().collect();
                ["", "metric::"].iter().any(|prefix| {
                    ["counter!(", "gauge!(", "histogram!("].iter().any(|kind| {
                        flat.match_indices(&format!("{kind}{prefix}{name}"))
                            .any(|(at, _)| !flat[..at].ends_with("describe_"))
                    })
                })
            });
            assert!(recorded, "{path}: nothing ever records {name}");
        }
    }
}
