//! A cold adapter's first token beside a warm one's.

use std::time::Duration;

use espalier_benches::Fallible;
use espalier_benches::turns::median;
use espalier_server::artifact_store::ArtifactStore;

use crate::served::{PROMPT, Reply, artifact, ask, engine};
use crate::{Args, verdict};

/// Adapters that fill the memory: each cold one takes the place of one that idles.
const FULL: usize = 3;

pub(crate) async fn run(args: &Args) -> Fallible<()> {
    let directory = tempfile::tempdir()?;
    let store = ArtifactStore::open(directory.path())?;
    let shape = espalier_engine::model::load(&args.model)?
        .config
        .base_shape();
    let mut digests = Vec::new();
    for seed in 0..(args.pairs + 2 * FULL) as u64 {
        let artifact = artifact(&shape, 16, 1_000_000 + seed)?;
        store.put_artifact(&artifact)?;
        digests.push(artifact.digest());
    }
    let probe = engine(args, 1 << 30, &store)?;
    let room = FULL * probe.activate(digests[0]).await?.bytes;
    probe.drain(Duration::ZERO).await?;
    // A store that was just opened has hashed nothing yet, as after a restart.
    let restarted = engine(args, room, &ArtifactStore::open(directory.path())?)?;
    let growing = engine(args, 1 << 30, &store)?;
    let engine = engine(args, room, &store)?;
    for engine in [&engine, &restarted] {
        for turn in 0..3 * FULL {
            ask(engine, digests[turn % (2 * FULL)], turn as u64).await?;
        }
    }
    let (mut cold, mut warm, mut hashed) = (vec![], vec![], vec![]);
    let (mut grown, mut load) = (vec![], vec![]);
    for (turn, digest) in digests.iter().enumerate().skip(2 * FULL) {
        let first = |reply: Reply| reply.timings.time_to_first_token.as_secs_f64() * 1e3;
        let seed = 100 + turn as u64;
        // Whatever is measured follows a request on the same engine: an idle engine's caches are another's.
        let (previous, before) = (digests[turn - 1], seed + 2000);
        // The system may have taken the file out of its cache since it was written.
        drop(store.get_artifact(digest)?);
        ask(&engine, previous, before).await?;
        cold.push(first(ask(&engine, *digest, seed).await?));
        if let Some(found) = engine.residency_of(digest) {
            load.push(found.load_duration.as_secs_f64() * 1e3);
        }
        warm.push(first(ask(&engine, *digest, seed + 1000).await?));
        ask(&growing, previous, before).await?;
        grown.push(first(ask(&growing, *digest, seed).await?));
        ask(&restarted, previous, before).await?;
        hashed.push(first(ask(&restarted, *digest, seed).await?));
    }
    let pairs = cold.iter().zip(&warm).map(|(cold, warm)| cold - warm);
    let more = median(&pairs.collect::<Vec<_>>());
    println!(
        "\n## A cold adapter's first token (rank 16, all sites, f32 file, page cache warm, memory full), {PROMPT} in, medians of {}\n",
        args.pairs
    );
    println!("| | first token, ms |\n|---|---|");
    println!("| warm | {:.1} |", median(&warm));
    println!(
        "| cold | {:.1} (its load {:.1}) |",
        median(&cold),
        median(&load)
    );
    println!(
        "| cold, into memory that this process never used before | {:.1} |",
        median(&grown)
    );
    println!(
        "| cold, the first load after a restart: hashed once more | {:.1} |",
        median(&hashed)
    );
    let miss = format!("{more:.1} ms later");
    let failures = if more > 25.0 { vec![miss] } else { Vec::new() };
    verdict(
        &format!(
            "a cold adapter's first token comes {more:.1} ms after a warm one's, 25 are allowed"
        ),
        &failures,
    );
    for engine in [engine, growing, restarted] {
        engine.drain(Duration::ZERO).await?;
    }
    Ok(())
}
