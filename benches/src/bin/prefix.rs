//! The prefix cache: time to first token with a prompt whose beginning is known, beside the same for another tenant and
//! for another version, to whom it must be as if nobody had ever asked.
//!
//! `cargo build --bins && target/debug/prefix --model MODEL`. A round takes a new prefix, asks once cold, and then, in an
//! order that changes from round to round, again, as another tenant, for another version and for the base model.

use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use espalier_adapters::ops::Backend;
use espalier_adapters::version::VersionDigest;
use espalier_benches::Fallible;
use espalier_benches::random_adapters::RandomAdapters;
use espalier_benches::turns::median;
use espalier_engine::config::EngineConfig;
use espalier_engine::handle::EngineHandle;
use espalier_engine::model::{Dtype, load_as};
use espalier_engine::request::{
    Event, Generate, Priority, Request, RequestKind, StopConditions, TargetVersion,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Rank of the two adapters, on every linear layer.
const RANK: usize = 16;

#[derive(Parser)]
#[command(about = "Time to first token with a known prefix, and that nobody else sees it")]
struct Args {
    /// The model: a GGUF or a Hugging Face directory.
    #[arg(long)]
    model: String,
    /// What the base's weights are kept in.
    #[arg(long, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// Tokens of the shared prefix.
    #[arg(long, default_value_t = 512)]
    prefix: usize,
    /// Tokens of each request's own.
    #[arg(long, default_value_t = 32)]
    own: usize,
    /// Rounds; the medians count.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
}

/// Who asks, after the cold request.
const SIDES: [&str; 4] = [
    "the same tenant and version",
    "another tenant",
    "another version",
    "the base model",
];

#[tokio::main(flavor = "current_thread")]
async fn main() -> Fallible<()> {
    let args = Args::parse();
    let loaded = load_as(&args.model, args.dtype)?;
    let mut source = RandomAdapters::default();
    let mut version = |seed| source.add(seed, RANK, &loaded.config);
    let versions = [version(1)?, version(2)?];
    let engine = EngineHandle::start(
        EngineConfig::default(),
        Backend::default(),
        loaded,
        Arc::new(source),
    )?;
    for version in &versions {
        engine.activate(*version).await?;
    }
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let mut cold = Vec::new();
    let mut times: [Vec<f64>; SIDES.len()] = Default::default();
    for round in 0..=args.rounds {
        let prefix = tokens(&mut random, args.prefix);
        let mut ask = async |tenant: &str, version: Option<VersionDigest>| {
            let mut prompt = prefix.clone();
            prompt.extend(tokens(&mut random, args.own));
            first_token(&engine, tenant, version, prompt).await
        };
        let (first, found) = ask("one", Some(versions[0])).await?;
        expect(found == 0, "a new prefix is not known")?;
        let mut this_round = [0.0; SIDES.len()];
        for turn in 0..SIDES.len() {
            let side = (turn + round) % SIDES.len();
            let (tenant, version) = match side {
                0 => ("one", Some(versions[0])),
                1 => ("two", Some(versions[0])),
                2 => ("one", Some(versions[1])),
                _ => ("one", None),
            };
            let (seconds, found) = ask(tenant, version).await?;
            let expected = if side == 0 { args.prefix / 16 * 16 } else { 0 };
            expect(found == expected, SIDES[side])?;
            this_round[side] = seconds;
        }
        // The first round warms up.
        if round > 0 {
            cold.push(first);
            times
                .iter_mut()
                .zip(this_round)
                .for_each(|(times, seconds)| times.push(seconds));
        }
    }
    println!(
        "{} shared and {} own tokens, rank {RANK} adapters, {}, {} rounds",
        args.prefix, args.own, args.dtype, args.rounds
    );
    println!("| who asks after the first | time to first token, ms | cold : this |");
    println!("|---|---|---|");
    println!("| (cold, the first) | {:.1} | 1.00 |", 1e3 * median(&cold));
    for (side, times) in SIDES.iter().zip(&times) {
        let ratio = median(&cold) / median(times);
        println!("| {side} | {:.1} | {ratio:.2} |", 1e3 * median(times));
    }
    Ok(())
}

/// Seconds to the first token, and prompt tokens that were known.
async fn first_token(
    engine: &EngineHandle,
    tenant: &str,
    version: Option<VersionDigest>,
    prompt: Vec<u32>,
) -> Fallible<(f64, usize)> {
    let begin = Instant::now();
    let target = version.map(|digest| TargetVersion {
        digest,
        weight: 1.0,
    });
    let mut events = engine.submit(Request {
        id: "bench".to_owned(),
        tenant: tenant.into(),
        target: target.into_iter().collect(),
        require_resident: false,
        priority: Priority::Interactive,
        kind: RequestKind::Generate(Generate {
            prompt,
            stop: StopConditions {
                max_tokens: Some(1),
                ignore_eos: true,
                ..StopConditions::default()
            },
            ..Generate::default()
        }),
        deadline: None,
        received: begin,
    })?;
    let mut first = None;
    loop {
        match events.recv().await.ok_or("the engine stopped")? {
            Event::Delta(_) => {
                first.get_or_insert(begin.elapsed().as_secs_f64());
            }
            Event::Done { usage, .. } => {
                return Ok((first.ok_or("no token")?, usage.cached_input_tokens));
            }
            Event::Failed(error) => return Err(error.into()),
            _ => {}
        }
    }
}

fn tokens(random: &mut ChaCha8Rng, count: usize) -> Vec<u32> {
    (0..count)
        .map(|_| random.random_range(100..40_000))
        .collect()
}

fn expect(holds: bool, what: &str) -> Fallible<()> {
    if holds {
        Ok(())
    } else {
        Err(format!("{what}: the cache found something else than it should").into())
    }
}
