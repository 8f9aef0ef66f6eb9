//! Throughput and time to first token against the number of adapters under Zipf(1.0), with room for 50 of them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use espalier_adapters::config::BaseShape;
use espalier_adapters::version::VersionDigest;
use espalier_benches::Fallible;
use espalier_benches::turns::{median, quantile};
use espalier_engine::handle::EngineHandle;
use espalier_engine::metrics::EngineStats;
use espalier_server::artifact_store::ArtifactStore;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::served::{NEW, PROMPT, artifact, ask, base_bytes, engine};
use crate::{Args, verdict};

/// Numbers of adapters, in the order of the table.
const POINTS: [usize; 6] = [5, 50, 51, 200, 1000, 2000];
/// Adapters that fit in memory.
const BUDGET: usize = 50;
/// Clients that ask again as soon as they are answered.
const CLIENTS: usize = 8;
/// Requests of one client in one round that have a draw of their own; more repeat them.
const DRAWS: usize = 40;

/// Adapter ranks 0..n, the k-th with a chance of 1 / (k + 1).
struct Zipf(Vec<f64>);

impl Zipf {
    fn new(n: usize) -> Self {
        let mut sum = 0.0;
        let sums = (0..n).map(|k| {
            sum += 1.0 / (k + 1) as f64;
            sum
        });
        Zipf(sums.collect())
    }

    fn draw(&self, random: &mut ChaCha8Rng) -> usize {
        let total = self.0.last().copied().unwrap_or(1.0);
        let at = random.random_range(0.0..total);
        self.0.partition_point(|sum| *sum < at)
    }
}

/// What one point gave over all rounds.
#[derive(Default)]
struct Point {
    rates: Vec<f64>,
    first: Vec<f64>,
    distinct_bytes: f64,
    steps: f64,
    requests: usize,
    loads: usize,
}

/// Adapters in the order in which each client of a point asks for them.
type Draws = Vec<Vec<usize>>;

fn draws(round: usize, adapters: usize) -> Draws {
    let zipf = Zipf::new(adapters);
    let of = |client: usize| {
        let seed = (round * POINTS.len() + adapters) as u64 * 1000 + client as u64;
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        (0..DRAWS).map(|_| zipf.draw(&mut random)).collect()
    };
    (0..CLIENTS).map(of).collect()
}

/// Writes every adapter that any client will ask for.
fn publish(
    store: &ArtifactStore,
    base: &BaseShape,
    wanted: &BTreeSet<usize>,
) -> Fallible<BTreeMap<usize, VersionDigest>> {
    let mut digests = BTreeMap::new();
    for &adapter in wanted {
        let artifact = artifact(base, 4, adapter as u64)?;
        store.put_artifact(&artifact)?;
        digests.insert(adapter, artifact.digest());
    }
    Ok(digests)
}

pub(crate) async fn run(args: &Args) -> Fallible<()> {
    let directory = tempfile::tempdir()?;
    let store = ArtifactStore::open(directory.path())?;
    let plan: Vec<Vec<Draws>> = (0..args.rounds)
        .map(|round| POINTS.iter().map(|n| draws(round, *n)).collect())
        .collect();
    let wanted: BTreeSet<usize> = plan.iter().flatten().flatten().flatten().copied().collect();
    let shape = espalier_engine::model::load(&args.model)?
        .config
        .base_shape();
    let began = Instant::now();
    let digests = publish(&store, &shape, &wanted)?;
    let took = began.elapsed().as_secs_f64();
    eprintln!("{} adapters written in {took:.1} s", digests.len());
    // One alone says how large an adapter is in memory.
    let probe = engine(args, 1 << 30, &store)?;
    let size = probe.activate(digests[&0]).await?.bytes;
    let base = base_bytes(&probe);
    probe.drain(Duration::ZERO).await?;
    let engine = engine(args, BUDGET * size, &store)?;
    for adapter in 0..3 {
        ask(&engine, digests[&adapter], u64::MAX - adapter as u64).await?;
    }
    let mut points: Vec<Point> = POINTS.iter().map(|_| Point::default()).collect();
    for (round, plan) in plan.iter().enumerate() {
        eprintln!("round {} of {}", round + 1, args.rounds);
        for (point, draws) in points.iter_mut().zip(plan) {
            measure(args, &engine, draws, &digests, point).await?;
        }
    }
    report(&mut points, base, size as f64);
    engine.drain(Duration::ZERO).await?;
    Ok(())
}

/// Eight clients in a closed loop for so many seconds; requests under way at the end are finished and counted whole.
async fn measure(
    args: &Args,
    engine: &EngineHandle,
    draws: &Draws,
    digests: &BTreeMap<usize, VersionDigest>,
    point: &mut Point,
) -> Fallible<()> {
    let before = engine.stats();
    let began = Instant::now();
    let until = began + Duration::from_secs_f64(args.seconds);
    let clients = draws.iter().enumerate().map(|(client, draws)| async move {
        let mut replies = Vec::new();
        for (turn, adapter) in draws.iter().cycle().enumerate() {
            if Instant::now() >= until {
                break;
            }
            let seed = (client * 100_000 + turn) as u64 * 7919 + before.steps;
            replies.push(
                ask(engine, digests[adapter], seed)
                    .await
                    .map_err(|e| e.to_string())?,
            );
        }
        Ok::<_, String>(replies)
    });
    let replies = futures::future::try_join_all(clients).await?;
    let seconds = began.elapsed().as_secs_f64();
    let after = engine.stats();
    let tokens: usize = replies.iter().flatten().map(|reply| reply.tokens).sum();
    point.rates.push(tokens as f64 / seconds);
    let added = |of: fn(&EngineStats) -> u64| (of(&after) - of(&before)) as f64;
    point.distinct_bytes += added(|stats| stats.adapter_bytes_read);
    point.steps += added(|stats| stats.steps);
    for reply in replies.iter().flatten() {
        let first = reply.timings.time_to_first_token.as_secs_f64() * 1e3;
        point.first.push(first);
        point.requests += 1;
        point.loads += usize::from(reply.loaded);
    }
    Ok(())
}

fn report(points: &mut [Point], base: f64, size: f64) {
    println!(
        "\n## Throughput against the number of rank-4 adapters, Zipf(1.0), room for {BUDGET}, {CLIENTS} clients, {PROMPT} in / {NEW} out, f32 base\n"
    );
    println!(
        "An adapter has {:.2} MB in memory, the base's projections and head {:.0} MB.\n",
        size / 1e6,
        base / 1e6
    );
    println!(
        "| adapters | tokens/s | of 5 adapters | bytes allow | beyond the bytes | adapters a step | TTFT p50 ms | p99 ms | p99 of 5 | waited for a load |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let rate = |point: &Point| median(&point.rates);
    let step_bytes = |point: &Point| base + point.distinct_bytes / point.steps.max(1.0);
    let (first_rate, first_bytes) = (rate(&points[0]), step_bytes(&points[0]));
    let first_p99 = quantile(&points[0].first, 0.99);
    let mut failures = Vec::new();
    for (n, point) in POINTS.iter().zip(points.iter()) {
        let (ratio, allowed) = (rate(point) / first_rate, first_bytes / step_bytes(point));
        let p99 = quantile(&point.first, 0.99);
        println!(
            "| {n} | {:.1} | {ratio:.3} | {allowed:.3} | {:+.1} % | {:.2} | {:.0} | {p99:.0} | {:.2} | {} of {} |",
            rate(point),
            (ratio / allowed - 1.0) * 100.0,
            point.distinct_bytes / point.steps.max(1.0) / size,
            median(&point.first),
            p99 / first_p99,
            point.loads,
            point.requests,
        );
        if ratio < 0.9 * allowed {
            failures.push(format!(
                "{n} adapters: throughput is {ratio:.3}, at least {:.3} is wanted",
                0.9 * allowed
            ));
        }
        if p99 > 2.0 * first_p99 {
            failures.push(format!(
                "{n} adapters: p99 of the first token is {:.2} times that of 5",
                p99 / first_p99
            ));
        }
    }
    let cliff = rate(&points[2]) / rate(&points[1]);
    println!(
        "\nFrom {BUDGET} to {} adapters: {:+.1} % tokens/s.",
        BUDGET + 1,
        (cliff - 1.0) * 100.0
    );
    if cliff < 0.95 {
        failures.push(format!(
            "the step beyond the budget costs {:.1} %",
            (1.0 - cliff) * 100.0
        ));
    }
    verdict(
        "falls no more than 10 % beyond the bytes, p99 TTFT within 2x, no cliff",
        &failures,
    );
}
