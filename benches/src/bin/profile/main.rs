//! Where a step's time goes, through the whole engine: decode at 1, 8 and 32 rows with as many adapters, and a prefill.
//!
//! `benches/run-profile.sh MODEL` makes the table. A case drives the engine and lets `perf` sample the process while it is
//! in its stride; the table is made of the samples of the thread that walks through the step (its stack says where it is),
//! so it counts what the step waits for, not what processors do beside each other. The engine's own clock is printed too.

mod stacks;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use espalier_adapters::ops::Backend;
use espalier_adapters::version::VersionDigest;
use espalier_benches::Fallible;
use espalier_benches::random_adapters::RandomAdapters;
use espalier_engine::config::EngineConfig;
use espalier_engine::handle::EngineHandle;
use espalier_engine::metrics::{EngineStats, StepTimes};
use espalier_engine::model::{Dtype, load_as};
use espalier_engine::request::{
    Event, Generate, Priority, Request, RequestKind, SamplingParams, StopConditions, TargetVersion,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc;

/// Rank of the adapters, on every linear layer.
const RANK: usize = 16;
/// Prompt tokens of a decode case.
const CONTEXT: usize = 128;

#[derive(Parser)]
#[command(about = "Where a step's time goes")]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Drives one case under `perf record` and prints the engine's own clock.
    Drive(Drive),
    /// Makes the table of the outputs of `perf script`, one `NAME=FILE` for each column.
    Table {
        /// `decode-1=a.txt`
        columns: Vec<String>,
        /// Root of the sources, where the stacks' lines are looked up.
        #[arg(long, default_value = ".")]
        sources: PathBuf,
    },
}

#[derive(clap::Args)]
struct Drive {
    /// The model: a GGUF or a Hugging Face directory.
    #[arg(long)]
    model: String,
    /// What the base's weights are kept in.
    #[arg(long, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// Rows of a decode step, each with an adapter of its own; 0 prefills prompts of 512 tokens, one a step.
    #[arg(long, default_value_t = 8)]
    rows: usize,
    /// How long to look.
    #[arg(long, default_value_t = 8)]
    seconds: u64,
    /// Draw at a temperature, within the nucleus, instead of taking the best token.
    #[arg(long)]
    sampled: bool,
    /// Where `perf` leaves its samples; without it only the engine's clock is read.
    #[arg(long)]
    perf: Option<PathBuf>,
}

fn main() -> Fallible<()> {
    match Args::parse().verb {
        Verb::Drive(options) => drive(&options),
        Verb::Table { columns, sources } => stacks::table(&columns, &sources),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn drive(options: &Drive) -> Fallible<()> {
    let loaded = load_as(&options.model, options.dtype)?;
    let count = options.rows.max(1);
    let mut source = RandomAdapters::default();
    let versions = (0..count as u64)
        .map(|seed| source.add(seed, RANK, &loaded.config))
        .collect::<Result<Vec<_>, _>>()?;
    let config = EngineConfig {
        prefix_cache: false,
        ..EngineConfig::default()
    };
    let engine = EngineHandle::start(config, Backend::default(), loaded, Arc::new(source))?;
    for version in &versions {
        engine.activate(*version).await?;
    }
    let (before, after) = if options.rows == 0 {
        prefill(&engine, versions[0], options).await?
    } else {
        decode(&engine, &versions, options).await?
    };
    print_clock(&before, &after);
    Ok(())
}

/// All rows decode while the clock runs; the streams are read, or they would pause.
async fn decode(
    engine: &EngineHandle,
    versions: &[VersionDigest],
    options: &Drive,
) -> Fallible<(EngineStats, EngineStats)> {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut readers = Vec::new();
    for version in versions {
        let mut events = ask(
            engine,
            *version,
            tokens(&mut random, CONTEXT),
            4096,
            options.sampled,
        )?;
        // The first token says that the prompt is done.
        while !matches!(next(&mut events).await?, Event::Delta(_)) {}
        readers.push(tokio::spawn(async move {
            while events.recv().await.is_some() {}
        }));
    }
    let before = engine.stats();
    look(options).await?;
    let after = engine.stats();
    readers.iter().for_each(|reader| reader.abort());
    Ok((before, after))
}

/// Prompts of 512 tokens, one after the other.
async fn prefill(
    engine: &EngineHandle,
    version: VersionDigest,
    options: &Drive,
) -> Fallible<(EngineStats, EngineStats)> {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let looking = look(options);
    tokio::pin!(looking);
    let mut before = None;
    loop {
        let mut events = ask(
            engine,
            version,
            tokens(&mut random, 512),
            1,
            options.sampled,
        )?;
        while !matches!(next(&mut events).await?, Event::Done { .. }) {}
        let stats = engine.stats();
        let first = before.get_or_insert_with(|| stats.clone());
        tokio::select! {
            biased;
            done = &mut looking => return done.map(|()| (first.clone(), stats)),
            () = tokio::task::yield_now() => {}
        }
    }
}

/// Lets `perf` sample this process, or waits as long.
async fn look(options: &Drive) -> Fallible<()> {
    let seconds = options.seconds;
    let Some(file) = options.perf.clone() else {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        return Ok(());
    };
    let status = tokio::task::spawn_blocking(move || {
        Command::new("perf")
            .args(["record", "--quiet", "--event", "cpu-clock", "--freq", "499"])
            .args([
                "--call-graph",
                "dwarf,32768",
                "--pid",
                &std::process::id().to_string(),
            ])
            .arg("--output")
            .arg(file)
            .args(["--", "sleep", &seconds.to_string()])
            .status()
    })
    .await??;
    if status.success() {
        Ok(())
    } else {
        Err(format!("perf ended with {status}; may this user sample, and is it installed?").into())
    }
}

fn ask(
    engine: &EngineHandle,
    version: VersionDigest,
    prompt: Vec<u32>,
    max_tokens: usize,
    sampled: bool,
) -> Fallible<mpsc::Receiver<Event>> {
    let sampling = SamplingParams {
        temperature: if sampled { 0.8 } else { 0.0 },
        top_p: if sampled { 0.95 } else { 1.0 },
        ..SamplingParams::default()
    };
    Ok(engine.submit(Request {
        id: "bench".to_owned(),
        tenant: "bench".into(),
        target: vec![TargetVersion {
            digest: version,
            weight: 1.0,
        }],
        require_resident: false,
        priority: Priority::Interactive,
        kind: RequestKind::Generate(Generate {
            prompt,
            sampling,
            stop: StopConditions {
                max_tokens: Some(max_tokens),
                ignore_eos: true,
                ..StopConditions::default()
            },
            ..Generate::default()
        }),
        deadline: None,
        received: Instant::now(),
    })?)
}

async fn next(events: &mut mpsc::Receiver<Event>) -> Fallible<Event> {
    match events.recv().await.ok_or("the engine stopped")? {
        Event::Failed(error) => Err(error.into()),
        event => Ok(event),
    }
}

fn print_clock(before: &EngineStats, after: &EngineStats) {
    let steps = (after.steps - before.steps).max(1) as f64;
    let part = |of: fn(&StepTimes) -> Duration| {
        (of(&after.times) - of(&before.times)).as_secs_f64() / steps * 1e3
    };
    let parts = [
        ("commands", part(|t| t.commands)),
        ("schedule", part(|t| t.schedule)),
        ("model", part(|t| t.model)),
        ("logits", part(|t| t.logits)),
        ("sampling", part(|t| t.sampling)),
        ("results", part(|t| t.results)),
        ("training", part(|t| t.training)),
        ("publish", part(|t| t.publish)),
    ];
    let whole: f64 = parts.iter().map(|(_, ms)| ms).sum();
    println!("{steps} steps, {whole:.3} ms each, by the engine's clock:");
    for (name, ms) in parts {
        println!("  {name:9} {ms:9.4} ms  {:5.2} %", 100.0 * ms / whole);
    }
}

fn tokens(random: &mut ChaCha8Rng, count: usize) -> Vec<u32> {
    (0..count)
        .map(|_| random.random_range(100..40_000))
        .collect()
}

/// A file of the sources by its last component, wherever it lies.
fn find_source(root: &Path, name: &str) -> Option<PathBuf> {
    [
        "server/engine/src/model",
        "server/engine/src",
        "adapters/src",
    ]
    .iter()
    .map(|place| root.join(place).join(name))
    .find(|path| path.is_file())
}
