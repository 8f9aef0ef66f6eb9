//! Jobs with small micro-batches: all at once, whose passes are shared, beside one after the other, on the same data.
//!
//! `cargo build --bins && target/debug/company --model MODEL`. Each round runs both ways, in an order that changes from round
//! to round; both end in the same adapters, which is checked.

use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use espalier_adapters::config::{LoraConfig, Site};
use espalier_adapters::train::examples::{Example, Examples};
use espalier_adapters::version::AdapterArtifact;
use espalier_benches::Fallible;
use espalier_benches::in_process::start;
use espalier_benches::turns::median;
use espalier_engine::config::EngineConfig;
use espalier_engine::handle::EngineHandle;
use espalier_engine::model::Dtype;
use espalier_engine::train::trainer::{HyperParameters, Method};
use espalier_engine::train::{
    JobEvent, TrainPlan, TrainingImpact, TrainingJob, TrainingSubmission,
};
use rand::{Rng, SeedableRng};

#[derive(Parser)]
#[command(about = "Several small training jobs at once, beside one after the other")]
struct Args {
    /// The model: a GGUF or a Hugging Face directory.
    #[arg(long)]
    model: String,
    /// Jobs, each of a tenant of its own.
    #[arg(long, default_value_t = 8)]
    jobs: u64,
    /// Tokens of each job's micro-batch, which is one example.
    #[arg(long, default_value_t = 24)]
    tokens: usize,
    /// Steps of each job.
    #[arg(long, default_value_t = 12)]
    steps: u64,
    /// Rank, on every linear layer.
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Rounds; the medians count.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

/// What all jobs ended in, and how long it took.
struct Run {
    seconds: f64,
    artifacts: Vec<AdapterArtifact>,
    shared: u64,
}

fn main() -> Fallible<()> {
    let args = Args::parse();
    let config = EngineConfig {
        max_training_jobs: args.jobs as usize,
        ..EngineConfig::default()
    };
    let (engine, _) = start(&args.model, Dtype::F32, config, &[])?;
    let (mut single, mut together, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    // The first round warms up.
    for round in 0..=args.rounds {
        let first_single = round % 2 == 0;
        let (one, all) = if first_single {
            let one = one_by_one(&engine, &args)?;
            (one, at_once(&engine, &args)?)
        } else {
            let all = at_once(&engine, &args)?;
            (one_by_one(&engine, &args)?, all)
        };
        if one.artifacts != all.artifacts {
            return Err("jobs ended in other adapters at once than one by one".into());
        }
        println!(
            "round {round}: one by one {:.2} s, at once {:.2} s, {} passes shared",
            one.seconds, all.seconds, all.shared
        );
        if round > 0 {
            ratios.push(all.seconds / one.seconds);
            single.push(one.seconds);
            together.push(all.seconds);
        }
    }
    println!(
        "{} jobs x {} steps x {} tokens, r {}: one by one {:.2} s, at once {:.2} s, ratio {:.2} (of rounds {:.2})",
        args.jobs,
        args.steps,
        args.tokens,
        args.rank,
        median(&single),
        median(&together),
        median(&together) / median(&single),
        median(&ratios),
    );
    Ok(())
}

fn one_by_one(engine: &EngineHandle, args: &Args) -> Fallible<Run> {
    let began = Instant::now();
    let ended = (0..args.jobs).map(|number| end(submit(engine, args, number)?));
    run(began, ended.collect::<Fallible<_>>()?)
}

fn at_once(engine: &EngineHandle, args: &Args) -> Fallible<Run> {
    let began = Instant::now();
    let jobs = (0..args.jobs).map(|number| submit(engine, args, number));
    let jobs: Vec<_> = jobs.collect::<Fallible<_>>()?;
    run(began, jobs.into_iter().map(end).collect::<Fallible<_>>()?)
}

fn run(began: Instant, ended: Vec<(AdapterArtifact, TrainingImpact)>) -> Fallible<Run> {
    let seconds = began.elapsed().as_secs_f64();
    let (artifacts, impacts): (Vec<_>, Vec<_>) = ended.into_iter().unzip();
    Ok(Run {
        seconds,
        artifacts,
        shared: impacts.iter().map(|impact| impact.shared_passes).sum(),
    })
}

fn submit(engine: &EngineHandle, args: &Args, number: u64) -> Fallible<TrainingJob> {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(number);
    let items: Vec<Example> = (0..args.steps)
        .map(|_| Example::Lm {
            ids: (0..args.tokens)
                .map(|_| random.random_range(100..40_000))
                .collect(),
            learn: (0..args.tokens).map(|i| i > 0).collect(),
        })
        .collect();
    let plan = TrainPlan {
        method: Method::Lm,
        adapter: Some(LoraConfig::new(args.rank, 32.0, &Site::ALL).into()),
        hp: HyperParameters {
            batch_size: 1,
            epochs: Some(1),
            checkpoint_steps: Some(0),
            ..HyperParameters::default()
        },
        seed: number,
        train: Examples {
            lines: (1..=args.steps).collect(),
            labels: None,
            items,
        },
        valid: None,
        init: None,
    };
    Ok(engine.train(TrainingSubmission {
        job: number.to_string(),
        tenant: Arc::from(format!("tenant-{number}")),
        plan,
        checkpoint: None,
    })?)
}

fn end(mut job: TrainingJob) -> Fallible<(AdapterArtifact, TrainingImpact)> {
    let mut last = None;
    while let Some(event) = job.events.blocking_recv() {
        last = Some(event);
    }
    match last {
        Some(JobEvent::Finished { finished, impact }) => Ok((finished.artifact, impact)),
        other => Err(format!("a job ended with {other:?}").into()),
    }
}
