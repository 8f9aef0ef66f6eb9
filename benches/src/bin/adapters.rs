//! Adapters beyond memory: throughput and time to first token against the number of rank-4 adapters under Zipf(1.0) with
//! room for 50, a cold adapter's first token beside a warm one's, and what 10,000 registered adapters cost at rest.
//!
//! Everything is measured in one run, points in turn, medians of the rounds. Artifacts lie in a real store on the disk
//! and come through the real loader; the third part asks a real `espalierd` over gRPC.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use espalier_adapters::config::{BaseShape, LoraConfig, Site};
use espalier_adapters::peft;
use espalier_adapters::version::{AdapterArtifact, VersionDigest};
use espalier_adapters::weights::{AdapterWeights, SiteAdapter};
use espalier_benches::Fallible;
use espalier_client::{AdapterUpload, Client, ClientConfig, v1};
use espalier_engine::adapter_loader::{AdapterSource, SourceError};
use espalier_engine::config::EngineConfig;
use espalier_engine::handle::EngineHandle;
use espalier_engine::metrics::EngineStats;
use espalier_engine::request::{
    Event, Generate, Priority, Request, RequestKind, StopConditions, TargetVersion, Timings,
};
use espalier_server::artifact_store::ArtifactStore;
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Numbers of adapters, in the order of the table.
const POINTS: [usize; 6] = [5, 50, 51, 200, 1000, 2000];
/// Adapters that fit in memory.
const BUDGET: usize = 50;
const CLIENTS: usize = 8;
const PROMPT: usize = 128;
const NEW: usize = 32;
/// Adapters that fill the memory of the second part: each cold one takes the place of one that idles.
const FULL: usize = 3;
/// Requests of one client in one round that have a draw of their own; more repeat them.
const DRAWS: usize = 40;

#[derive(Parser)]
#[command(
    about = "Adapters beyond memory: throughput against their number, cold beside warm, and 10,000 at rest"
)]
struct Args {
    /// The base: a GGUF or a Hugging Face directory.
    #[arg(long, env = "ESPALIER_MODEL")]
    model: String,
    /// Rounds of every point; medians count.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of one point in one round.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Pairs of cold and warm.
    #[arg(long, default_value_t = 15)]
    pairs: usize,
    /// Parts to run: zipf, cold, rest.
    #[arg(long, value_delimiter = ',', default_value = "zipf,cold,rest")]
    parts: Vec<String>,
    /// The server of the third part; left out: beside this program.
    #[arg(long)]
    espalierd: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> Fallible<()> {
    let args = Args::parse();
    let runs = |part: &str| args.parts.iter().any(|given| given == part);
    if runs("zipf") {
        zipf(&args).await?;
    }
    if runs("cold") {
        cold(&args).await?;
    }
    if runs("rest") {
        rest(&args).await?;
    }
    Ok(())
}

// === adapters ===

/// An adapter on all linear sites; every number of it is random, and small enough that text stays text.
fn artifact(base: &BaseShape, rank: usize, seed: u64) -> Fallible<AdapterArtifact> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut numbers = |count: usize, spread: f32| -> Vec<f32> {
        let mut bytes = vec![0; count * 2];
        random.fill_bytes(&mut bytes);
        let (pairs, _) = bytes.as_chunks::<2>();
        let number = |pair: &[u8; 2]| f32::from(i16::from_le_bytes(*pair)) / 32768.0 * spread;
        pairs.iter().map(number).collect()
    };
    let mut weights = AdapterWeights::default();
    for layer in 0..base.layers {
        for site in Site::ALL {
            let (inputs, outputs) = base.dims(site);
            let adapter = SiteAdapter {
                r: rank,
                scale: 2.0,
                a: numbers(rank * inputs, 0.04).into(),
                b: numbers(outputs * rank, 0.01).into(),
                magnitude: None,
            };
            weights.sites.insert((layer, site), adapter);
        }
    }
    let config = LoraConfig::new(rank, 2.0 * rank as f64, &Site::ALL);
    Ok(peft::write(&config, &weights)?)
}

/// The store as the engine sees it.
struct Stored(ArtifactStore);

impl AdapterSource for Stored {
    fn fetch(
        &self,
        digest: &VersionDigest,
        spare: Vec<u8>,
    ) -> Result<AdapterArtifact, SourceError> {
        let read = self.0.get_artifact_into(digest, spare);
        read.map_err(|error| SourceError::Unavailable(error.to_string()))
    }

    fn verifies(&self) -> bool {
        true
    }
}

fn engine(args: &Args, adapter_bytes: usize, store: &ArtifactStore) -> Fallible<EngineHandle> {
    let config = EngineConfig {
        adapter_bytes,
        ..EngineConfig::default()
    };
    let model = espalier_engine::model::load(&args.model)?;
    Ok(EngineHandle::start(
        config,
        model,
        Arc::new(Stored(store.clone())),
    )?)
}

/// Bytes of the weights that a step reads, in f32.
fn base_bytes(engine: &EngineHandle) -> f64 {
    let (config, base) = (&engine.model().config, engine.model().config.base_shape());
    let sites: usize = Site::ALL
        .into_iter()
        .map(|site| base.dims(site).0 * base.dims(site).1)
        .sum();
    ((config.layers * sites + config.vocab * config.hidden) * size_of::<f32>()) as f64
}

// === one request ===

/// What came of a request.
struct Reply {
    tokens: usize,
    timings: Timings,
    loaded: bool,
}

async fn ask(engine: &EngineHandle, digest: VersionDigest, seed: u64) -> Fallible<Reply> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let prompt = (0..PROMPT).map(|_| random.random_range(100..40_000));
    let mut events = engine.submit(Request {
        id: format!("{seed}"),
        tenant: Arc::from("bench"),
        target: vec![TargetVersion {
            digest,
            weight: 1.0,
        }],
        require_resident: false,
        priority: Priority::Interactive,
        kind: RequestKind::Generate(Generate {
            prompt: prompt.collect(),
            stop: StopConditions {
                max_tokens: Some(NEW),
                ignore_eos: true,
                ..StopConditions::default()
            },
            ..Generate::default()
        }),
        deadline: None,
        received: Instant::now(),
    })?;
    loop {
        match events.recv().await.ok_or("the engine stopped")? {
            Event::Done { usage, timings } => {
                return Ok(Reply {
                    tokens: usage.output_tokens,
                    timings,
                    loaded: usage.adapter_loads > 0,
                });
            }
            Event::Failed(error) => return Err(error.into()),
            _ => {}
        }
    }
}

// === throughput against the number of adapters ===

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

async fn zipf(args: &Args) -> Fallible<()> {
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
    let rate = |point: &Point| quantile(&point.rates, 0.5);
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
            quantile(&point.first, 0.5),
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

fn verdict(what: &str, failures: &[String]) {
    if failures.is_empty() {
        println!("PASS: {what}");
    } else {
        println!("MISS: {what}: {}", failures.join("; "));
    }
}

fn quantile(values: &[f64], at: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (at * sorted.len() as f64).ceil() as usize;
    sorted
        .get(index.clamp(1, sorted.len().max(1)) - 1)
        .copied()
        .unwrap_or(f64::NAN)
}

// === a cold adapter's first token beside a warm one's ===

async fn cold(args: &Args) -> Fallible<()> {
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
        cold.push(first(ask(&engine, *digest, seed).await?));
        if let Some(found) = engine.residency_of(digest) {
            load.push(found.load_duration.as_secs_f64() * 1e3);
        }
        warm.push(first(ask(&engine, *digest, seed + 1000).await?));
        grown.push(first(ask(&growing, *digest, seed).await?));
        hashed.push(first(ask(&restarted, *digest, seed).await?));
    }
    let median = |values: &[f64]| quantile(values, 0.5);
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

// === ten thousand at rest ===

/// `espalierd` as a child, killed when dropped.
struct Daemon {
    child: Child,
    addr: String,
    startup: Duration,
}

impl Daemon {
    fn spawn(program: &Path, data: &Path) -> Fallible<Daemon> {
        let ready = data.join("ready");
        let _ = std::fs::remove_file(&ready);
        let began = Instant::now();
        let child = Command::new(program)
            .args([
                "--model",
                "tiny:1",
                "--listen",
                "127.0.0.1:0",
                "--metrics-listen",
                "off",
            ])
            .args(["--log", "error"])
            .arg("--data-dir")
            .arg(data)
            .arg("--ready-file")
            .arg(&ready)
            .stdout(Stdio::null())
            .spawn()?;
        let mut daemon = Daemon {
            child,
            addr: String::new(),
            startup: Duration::ZERO,
        };
        while began.elapsed() < Duration::from_secs(60) {
            if let Ok(line) = std::fs::read_to_string(&ready) {
                daemon.startup = began.elapsed();
                daemon.addr = format!("http://{}", line.trim());
                return Ok(daemon);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err("espalierd did not become ready".into())
    }

    async fn client(&self) -> Fallible<Client> {
        let mut config = ClientConfig::new(self.addr.clone());
        config.tenant = Some("bench".to_owned());
        Ok(Client::connect(config).await?)
    }

    /// Megabytes in memory now.
    fn resident(&self) -> Fallible<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(kib.ok_or("no VmRSS")?.parse::<f64>()? / 1024.0)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn rest(args: &Args) -> Fallible<()> {
    let beside = std::env::current_exe()?.with_file_name("espalierd");
    let program = args.espalierd.clone().unwrap_or(beside);
    let shape = espalier_engine::model::load("tiny:1")?.config.base_shape();
    let data = tempfile::tempdir()?;
    println!("\n## What registered adapters cost at rest (tiny model, a real server over gRPC)\n");
    println!(
        "| registered | ready after, ms | resident after the start, MB | after one request, MB | registering one, ms |\n|---|---|---|---|---|"
    );
    let mut registered = 0;
    let mut table = Vec::new();
    for count in [0, 2_000, 10_000] {
        let mut each = None;
        if count > registered {
            let daemon = Daemon::spawn(&program, data.path())?;
            let client = daemon.client().await?;
            if registered == 0 {
                let tenant = v1::CreateTenantRequest {
                    tenant_id: "bench".to_owned(),
                    ..Default::default()
                };
                client.create_tenant(tenant).await?;
            }
            let began = Instant::now();
            register(&client, &shape, registered..count).await?;
            each = Some(began.elapsed().as_secs_f64() * 1e3 / (count - registered) as f64);
            registered = count;
        }
        let mut starts = Vec::new();
        let (mut idle, mut busy) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let daemon = Daemon::spawn(&program, data.path())?;
            starts.push(daemon.startup.as_secs_f64() * 1e3);
            idle.push(daemon.resident()?);
            let client = daemon.client().await?;
            let target = (count > 0).then(|| v1::InferenceTarget {
                adapters: vec![v1::AdapterWeight {
                    adapter: format!("tenants/bench/adapters/a{}", count - 1),
                    weight: None,
                }],
                tenant: String::new(),
            });
            let request = v1::GenerateRequest {
                target,
                ..generate("once upon a time")
            };
            client.generate(request).await?;
            busy.push(daemon.resident()?);
        }
        let median = |values: &[f64]| quantile(values, 0.5);
        println!(
            "| {count} | {:.0} | {:.1} | {:.1} | {} |",
            median(&starts),
            median(&idle),
            median(&busy),
            each.map_or("-".to_owned(), |each| format!("{each:.2}"))
        );
        table.push((median(&starts), median(&busy)));
    }
    let mut failures = Vec::new();
    let (more_time, more_memory) = (table[2].0 - table[0].0, table[2].1 - table[0].1);
    if more_time > 250.0 {
        failures.push(format!("{more_time:.0} ms of start-up"));
    }
    if more_memory > 16.0 {
        failures.push(format!("{more_memory:.1} MB"));
    }
    verdict(
        &format!(
            "10,000 registered adapters cost {more_memory:+.1} MB and {more_time:+.0} ms of start-up (allowed 16 MB, 250 ms)"
        ),
        &failures,
    );
    Ok(())
}

fn generate(prompt: &str) -> v1::GenerateRequest {
    v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Text(prompt.to_owned())),
        stop: Some(v1::StopConditions {
            max_tokens: Some(4),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Through the upload as any client does it; fifty contents, shared in turn.
async fn register(client: &Client, shape: &BaseShape, ids: std::ops::Range<usize>) -> Fallible<()> {
    let mut kinds = Vec::new();
    for kind in 0..50 {
        let dir = tempfile::tempdir()?;
        peft::to_dir(&artifact(shape, 2, (ids.start + kind) as u64)?, dir.path())?;
        kinds.push(dir);
    }
    let next = std::sync::atomic::AtomicUsize::new(ids.start);
    let workers = (0..4).map(|_| async {
        loop {
            let id = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if id >= ids.end {
                return Ok::<_, String>(());
            }
            let upload = AdapterUpload {
                adapter: format!("tenants/bench/adapters/a{id}"),
                dir: kinds[id % kinds.len()].path().to_owned(),
                set_aliases: vec!["default".to_owned()],
                create_if_missing: true,
                ..Default::default()
            };
            let mut tries = 0;
            while let Err(error) = client.upload_adapter(upload.clone()).await {
                tries += 1;
                if tries > 100 {
                    return Err(error.to_string());
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
    futures::future::try_join_all(workers).await?;
    Ok(())
}
