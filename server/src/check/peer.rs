//! The same work by Python's libraries, on the same device and in the same shape, beside this program's own figures.
//!
//! The script is part of the program, so that a machine needs no checkout; what it cannot import, it says.

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use espalier_adapters::ops::Backend;
use espalier_engine::model::BaseSites;
use serde_json::{Value, json};

use super::base::{Base, RANK};
use super::ceilings::Ceilings;
use super::report::{Found, Report, Row};
use super::serve::{decode, filled, resident};
use super::train::Training;
use crate::config::Config;

const SCRIPT: &str = include_str!("../../../scripts/peer-check.py");

/// Rows of the decode step, each with an adapter of its own.
const ROWS: usize = 16;

/// What the script leaves of the budget, for its own last line.
const SPARE: Duration = Duration::from_secs(15);

pub(super) fn run(config: &Config, budget: Duration) -> Result<ExitCode, Box<dyn Error>> {
    let began = Instant::now();
    let base = Base::open(config)?;
    let report = Report::start("peer", base.about(), budget.saturating_sub(began.elapsed()));
    let task = task(&base);
    match missing(&task) {
        Ok(None) => {}
        Ok(Some(missing)) => {
            report.not_run(&missing);
            return Ok(report.finish());
        }
        Err(error) => {
            report.not_run(&format!("python3: {error}"));
            return Ok(report.finish());
        }
    }
    let decoded = report.row(json!({"ours": "decode"}), || ours_decoding(&base));
    let trained = report.row(json!({"ours": "train"}), || ours_training(&base, config));
    // The device is the other's now.
    drop(base);
    let mut theirs = Vec::new();
    let outcome = script(
        &task,
        report.time_left().saturating_sub(SPARE),
        &mut |found| {
            theirs.extend(report.row(json!({"theirs": found["step"]}), || outcome_of(found)));
        },
    );
    if let Err(error) = outcome {
        report.row(json!({"theirs": "script"}), || Err(error));
    }
    for (name, ours, keys) in [
        ("decode", decoded, &["tokens/s"][..]),
        ("train", trained, &["tokens/s", "GB above the base"]),
    ] {
        let theirs = theirs.iter().find(|row| row["theirs"] == name);
        if let Some((ours, theirs)) = ours.as_ref().zip(theirs) {
            report.row(json!({"ours to theirs": name}), || {
                Ok(ratios(ours, theirs, keys))
            });
        }
    }
    Ok(report.finish())
}

/// What the script is to do.
fn task(base: &Base) -> Value {
    let (config, scale) = (base.model.config(), base.scale);
    json!({
        "device": match base.model.ops() {
            Backend::Cpu(_) => "cpu",
            Backend::Cuda(_) => "cuda",
        },
        "layers": config.layers,
        "hidden": config.hidden,
        "intermediate": config.intermediate,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab": config.vocab,
        "tied": config.tie_embeddings,
        "rope_theta": config.rope.theta,
        "rank": RANK,
        "rows": ROWS,
        "context": scale.context,
        "steps": scale.steps,
        "examples": scale.examples,
        "example_tokens": scale.example_tokens,
        "train_steps": scale.train_steps,
    })
}

fn ours_decoding(base: &Base) -> Found {
    let adapters = resident(base, &base.adapter(1), ROWS)?;
    let mut sequences = filled(base, ROWS);
    let seconds = decode(base, &mut sequences, ROWS, &adapters);
    Ok(json!({"ms": seconds * 1e3, "tokens/s": ROWS as f64 / seconds}))
}

fn ours_training(base: &Base, config: &Config) -> Found {
    let mut training = Training::new(base, config)?;
    training.first()?;
    let mut found = training.others(Ceilings::default())?;
    found["GB above the base"] = json!(training.peak_gb());
    if let Some(found) = found.as_object_mut() {
        found.shift_remove("share of products");
    }
    Ok(found)
}

/// Ours over theirs.
fn ratios(ours: &Row, theirs: &Row, keys: &[&str]) -> Value {
    let ratio = |key: &&str| {
        let numbers = ours[*key].as_f64().zip(theirs[*key].as_f64());
        (
            (*key).to_owned(),
            json!(numbers.map(|(ours, theirs)| ours / theirs)),
        )
    };
    Value::Object(keys.iter().map(ratio).collect())
}

fn outcome_of(mut found: Value) -> Found {
    let members = found.as_object_mut().ok_or("no object")?;
    members.shift_remove("step");
    match members.shift_remove("failed") {
        Some(failed) => Err(failed.to_string().into()),
        None => Ok(found),
    }
}

/// What Python lacks, in words.
fn missing(task: &Value) -> std::io::Result<Option<String>> {
    let output = Command::new("python3")
        .args(["-c", SCRIPT, "missing", &task.to_string()])
        .stderr(Stdio::inherit())
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    Ok((!said.is_empty()).then_some(said))
}

/// Runs the script, which writes a line of JSON for each result.
fn script(
    task: &Value,
    limit: Duration,
    each: &mut dyn FnMut(Value),
) -> Result<(), Box<dyn Error>> {
    let mut child = Command::new("python3")
        .args(["-c", SCRIPT, "measure", &task.to_string()])
        .arg(limit.as_secs().to_string())
        .stdout(Stdio::piped())
        .spawn()?;
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            // Libraries may talk as well.
            if let Ok(found) = serde_json::from_str(&line?) {
                each(found);
            }
        }
    }
    let status = child.wait()?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("python3: {status}").into()),
    }
}
