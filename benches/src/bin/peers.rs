//! Espalier beside transformers + PEFT, in one run on one machine: mixed-adapter prefill and decode, and training.
//!
//! Each side runs as a process of its own, so that peak memory is its own; the two take turns, and the table shows the
//! medians and their ratio. `benches/run-peers.sh` prepares what it needs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use clap::{Parser, Subcommand};
use espalier_adapters::config::{LoraConfig, Site};
use espalier_adapters::pace::Unpaced;
use espalier_adapters::train::examples::{Example, Examples};
use espalier_adapters::version::{AdapterArtifact, VersionDigest};
use espalier_engine::adapter_loader::{AdapterSource, SourceError};
use espalier_engine::config::EngineConfig;
use espalier_engine::handle::EngineHandle;
use espalier_engine::model::Model;
use espalier_engine::request::{
    Event, Generate, Priority, Request, RequestKind, StopConditions, TargetVersion,
};
use espalier_engine::train::trainer::{HyperParameters, Method, TrainEvent, TrainPlan, Trainer};
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// Prompt tokens of each row, as the peer's default.
const PROMPT: usize = 128;
/// Decoded tokens of each row, as the peer's default.
const NEW: usize = 32;
/// Timed repeats inside one process; the median counts, as in the peer.
const REPEATS: usize = 3;

#[derive(Parser)]
#[command(about = "Espalier beside transformers + PEFT, alternating, ratios of medians")]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Both sides in turn; prints the table.
    Compare(Compare),
    /// One row for each adapter directory: prefill and decode tokens per second, as one JSON line.
    Generate {
        /// The model: a GGUF or a Hugging Face directory.
        #[arg(long)]
        model: String,
        /// PEFT directories, one row each.
        adapters: Vec<PathBuf>,
    },
    /// LoRA r = 16 on all linear layers, every token in the loss: tokens per second, as one JSON line.
    Train {
        /// The model: a GGUF or a Hugging Face directory.
        #[arg(long)]
        model: String,
        /// Sequences in a batch.
        #[arg(long, default_value_t = 8)]
        rows: usize,
        /// Tokens in a sequence.
        #[arg(long, default_value_t = 128)]
        tokens: usize,
    },
}

#[derive(clap::Args)]
struct Compare {
    /// The model that Espalier loads.
    #[arg(long)]
    model: String,
    /// The same model as a Hugging Face directory, for the peer.
    #[arg(long)]
    hf: PathBuf,
    /// A directory of PEFT directories a0, a1, ...
    #[arg(long)]
    adapters: PathBuf,
    /// A Python with torch, transformers and peft.
    #[arg(long)]
    python: PathBuf,
    /// peft_peer.py
    #[arg(long)]
    peer: PathBuf,
    /// How often the two sides take turns.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

fn main() -> Fallible<()> {
    match Args::parse().verb {
        Verb::Compare(options) => compare(&options),
        Verb::Generate { model, adapters } => generate(&model, &adapters),
        Verb::Train {
            model,
            rows,
            tokens,
        } => train(&model, rows, tokens),
    }
}

// === the two sides in turn ===

fn compare(options: &Compare) -> Fallible<()> {
    let adapters: Vec<PathBuf> = (0..8)
        .map(|i| options.adapters.join(format!("a{i}")))
        .collect();
    let mut rows: [Vec<Value>; 4] = Default::default();
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        rows[0].push(peer(options, "generate", &adapters)?);
        rows[1].push(ours(options, "generate", &adapters)?);
        rows[2].push(peer(options, "train", &[])?);
        rows[3].push(ours(options, "train", &[])?);
    }
    println!(
        "| 8 rows x 8 adapters (r 16), {PROMPT} in / {NEW} out; training 8 x 128, r 16 | PEFT | Espalier | ratio | rounds |"
    );
    println!("|---|---|---|---|---|");
    let [peer_generate, our_generate, peer_train, our_train] = rows;
    for (name, key, peer, ours) in [
        (
            "prefill, tok/s",
            "prefill_tok_s",
            &peer_generate,
            &our_generate,
        ),
        (
            "decode, tok/s",
            "decode_tok_s",
            &peer_generate,
            &our_generate,
        ),
        (
            "serving, peak GiB",
            "peak_rss_gib",
            &peer_generate,
            &our_generate,
        ),
        ("training, tok/s", "train_tok_s", &peer_train, &our_train),
        (
            "training, peak GiB",
            "peak_rss_gib",
            &peer_train,
            &our_train,
        ),
    ] {
        let (peer, ours) = (figures(peer, key)?, figures(ours, key)?);
        println!(
            "| {name} | {:.2} | {:.2} | {:.2} | {} |",
            median(&peer),
            median(&ours),
            median(&ours) / median(&peer),
            pairs(&peer, &ours)
        );
    }
    Ok(())
}

fn peer(options: &Compare, verb: &str, adapters: &[PathBuf]) -> Fallible<Value> {
    let mut command = Command::new(&options.python);
    command
        .arg(&options.peer)
        .arg(verb)
        .arg(&options.hf)
        .args(adapters);
    last_json_line(command)
}

fn ours(options: &Compare, verb: &str, adapters: &[PathBuf]) -> Fallible<Value> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg(verb)
        .arg("--model")
        .arg(&options.model)
        .args(adapters);
    last_json_line(command)
}

fn last_json_line(mut command: Command) -> Fallible<Value> {
    let output = command.output()?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{command:?} ended with {}: {text}", output.status).into());
    }
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().last().ok_or("the process printed nothing")?;
    eprintln!("  {line}");
    Ok(serde_json::from_str(line)?)
}

fn figures(rows: &[Value], key: &str) -> Fallible<Vec<f64>> {
    rows.iter()
        .map(|row| Ok(row[key].as_f64().ok_or(format!("no {key} in {row}"))?))
        .collect()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn pairs(peer: &[f64], ours: &[f64]) -> String {
    let pairs: Vec<String> = peer
        .iter()
        .zip(ours)
        .map(|(peer, ours)| format!("{peer:.1} : {ours:.1}"))
        .collect();
    pairs.join(", ")
}

// === our side: serving ===

/// Artifacts read from directories and named by their digests.
struct Directories(Vec<(VersionDigest, AdapterArtifact)>);

impl AdapterSource for Directories {
    fn fetch(&self, digest: &VersionDigest) -> Result<AdapterArtifact, SourceError> {
        let found = self.0.iter().find(|(known, _)| known == digest);
        found
            .map(|(_, artifact)| artifact.clone())
            .ok_or(SourceError::NotFound)
    }
}

#[tokio::main(flavor = "current_thread")]
async fn generate(model: &str, directories: &[PathBuf]) -> Fallible<()> {
    let artifacts: Vec<_> = directories
        .iter()
        .map(|path| read_artifact(path))
        .collect::<Fallible<_>>()?;
    let digests: Vec<VersionDigest> = artifacts.iter().map(|(digest, _)| *digest).collect();
    let config = EngineConfig {
        max_num_batched_tokens: 1024,
        ..EngineConfig::default()
    };
    let source = Arc::new(Directories(artifacts));
    let engine = EngineHandle::start(config, espalier_engine::model::load(model)?, source)?;
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    let prompts: Vec<Vec<u32>> = digests
        .iter()
        .map(|_| {
            (0..PROMPT)
                .map(|_| random.random_range(100..40_000))
                .collect()
        })
        .collect();

    batch(&engine, &digests, &prompts, 2).await?;
    let (mut first, mut whole) = (Vec::new(), Vec::new());
    for _ in 0..REPEATS {
        first.push(batch(&engine, &digests, &prompts, 1).await?);
        whole.push(batch(&engine, &digests, &prompts, NEW + 1).await?);
    }
    let (first, whole, n) = (median(&first), median(&whole), digests.len() as f64);
    println!(
        "{}",
        json!({
            "peer": "espalier", "rows": digests.len(), "adapters": digests.len(), "dtype": "float32",
            "prefill_tok_s": n * PROMPT as f64 / first,
            "decode_tok_s": n * NEW as f64 / (whole - first),
            "end_to_end_out_tok_s": n * (NEW + 1) as f64 / whole,
            "peak_rss_gib": peak_rss_gib()?,
        })
    );
    Ok(())
}

/// Seconds until every row has its `new` tokens.
async fn batch(
    engine: &EngineHandle,
    digests: &[VersionDigest],
    prompts: &[Vec<u32>],
    new: usize,
) -> Fallible<f64> {
    let begin = Instant::now();
    let mut streams = Vec::new();
    for (i, (digest, prompt)) in digests.iter().zip(prompts).enumerate() {
        streams.push(engine.submit(Request {
            id: format!("row-{i}"),
            tenant: Arc::from("bench"),
            target: vec![TargetVersion {
                digest: *digest,
                weight: 1.0,
            }],
            require_resident: false,
            priority: Priority::Interactive,
            kind: RequestKind::Generate(Generate {
                prompt: prompt.clone(),
                stop: StopConditions {
                    max_tokens: Some(new),
                    ignore_eos: true,
                    ..StopConditions::default()
                },
                ..Generate::default()
            }),
            deadline: None,
            received: begin,
        })?);
    }
    for mut stream in streams {
        loop {
            match stream.recv().await.ok_or("the engine stopped")? {
                Event::Done { usage, .. } if usage.output_tokens == new => break,
                Event::Done { usage, .. } => {
                    return Err(format!("{} tokens instead of {new}", usage.output_tokens).into());
                }
                Event::Failed(error) => return Err(error.into()),
                _ => {}
            }
        }
    }
    Ok(begin.elapsed().as_secs_f64())
}

fn read_artifact(path: &Path) -> Fallible<(VersionDigest, AdapterArtifact)> {
    let artifact = AdapterArtifact {
        config_json: std::fs::read(path.join(AdapterArtifact::CONFIG_FILE))?,
        safetensors: std::fs::read(path.join(AdapterArtifact::WEIGHTS_FILE))?,
        labels_json: None,
    };
    Ok((artifact.digest(), artifact))
}

/// The highest resident set of this process so far.
fn peak_rss_gib() -> Fallible<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(kib.ok_or("no VmHWM in /proc/self/status")?.parse::<f64>()? / f64::from(1 << 20))
}

// === our side: training ===

/// Steps that are timed, after one that is not.
const STEPS: u64 = 4;

fn train(model: &str, rows: usize, tokens: usize) -> Fallible<()> {
    let loaded = espalier_engine::model::load(model)?;
    let model = Arc::new(Model::new(loaded.config, loaded.weights)?);
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    let items: Vec<Example> = (0..rows)
        .map(|_| Example::Lm {
            ids: (0..tokens)
                .map(|_| random.random_range(100..40_000))
                .collect(),
            learn: (0..tokens).map(|i| i > 0).collect(),
        })
        .collect();
    let plan = TrainPlan {
        method: Method::Lm,
        lora: Some(LoraConfig::new(16, 32.0, &Site::ALL)),
        hp: HyperParameters {
            batch_size: rows,
            epochs: Some(STEPS + 1),
            checkpoint_steps: Some(0),
            ..HyperParameters::default()
        },
        seed: 0,
        train: Examples {
            lines: (1..=rows as u64).collect(),
            labels: None,
            items,
        },
        valid: None,
        init: None,
    };
    let (mut seconds, mut last) = (Vec::new(), Instant::now());
    let mut loss = 0.0;
    Trainer::new(model, plan)?.run(&Unpaced, &mut |event| {
        if let TrainEvent::Step(step) = event {
            seconds.push(last.elapsed().as_secs_f64());
            last = Instant::now();
            loss = step.loss;
        }
    })?;
    println!(
        "{}",
        json!({
            "peer": "espalier", "shape": [rows, tokens], "dtype": "float32", "last_loss": loss,
            "train_tok_s": (rows * tokens) as f64 / median(&seconds[1..]),
            "peak_rss_gib": peak_rss_gib()?,
        })
    );
    Ok(())
}
