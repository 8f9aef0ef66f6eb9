//! Ten thousand mixed requests against a server whose memory holds a third of the adapters, each of which forces a token
//! of its own: whatever is loaded, evicted, merged, given up, deleted or moved meanwhile, no reply may show another one.
//! At the end nothing is held, and the process is no larger than it was after two thousand.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant};

use espalier_adapters::config::{BaseShape, LoraConfig, Site};
use espalier_adapters::peft;
use espalier_adapters::version::AdapterArtifact;
use espalier_adapters::weights::{AdapterWeights, ScoreHead, SiteAdapter};
use espalier_client::{AdapterUpload, Client, Error, v1};
use espalier_tests::{Daemon, TINY};
use futures::StreamExt;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tonic::Code;

use crate::client_side::{answer, greedy, tenant};

/// Adapters; about seven fit in the memory that the server gets.
const ADAPTERS: usize = 24;
/// The last of them, whose versions come and go.
const VOLATILE: usize = 4;
const WARM_UP: usize = 2_000;
const REQUESTS: usize = 10_000;
const CLIENTS: usize = 12;
/// Calls that the server takes at once: room for every client and for what it cancelled a moment ago.
const PLACES: usize = 40;
const RANK: usize = 16;
/// Units of the MLP by which an adapter forces its token.
const UNITS: usize = 8;

const PROMPTS: [&str; 4] = [
    "once upon a time",
    "the",
    "where is my parcel and when does it come",
    "a b c",
];

/// The tiny model's tied head and final norm: what makes a token likely.
struct Head {
    shape: BaseShape,
    embed: Vec<f32>,
    norm: Vec<f32>,
}

impl Head {
    fn load() -> Head {
        let model = espalier_engine::model::load(TINY).unwrap();
        let mut found = HashMap::new();
        for (name, _, values) in model.weights.tensors(&model.config) {
            found.insert(name, values.to_vec());
        }
        Head {
            shape: model.config.base_shape(),
            embed: found.remove("model.embed_tokens.weight").unwrap(),
            norm: found.remove("model.norm.weight").unwrap(),
        }
    }

    fn row(&self, token: u32) -> &[f32] {
        &self.embed[token as usize * self.shape.hidden..][..self.shape.hidden]
    }

    /// Noise on every site, and in the last layer's MLP what makes `token` the answer to everything. With `u = a x` (any
    /// direction `a`), gate and up of one unit are both `k u`, of another both `-k u`: `silu(k u) k u + silu(-k u) (-k u)` is
    /// `(k u)^2`, never negative, whatever `x` is. Down writes the sum in the direction that the head reads as `token`.
    fn forcing(&self, token: u32, seed: u64) -> AdapterArtifact {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut weights = AdapterWeights::default();
        let scale = 2.5_f32;
        for layer in 0..self.shape.layers {
            for site in Site::ALL {
                let (inputs, outputs) = self.shape.dims(site);
                let mut numbers = |count: usize| -> Vec<f32> {
                    (0..count)
                        .map(|_| random.random_range(-0.02..0.02))
                        .collect()
                };
                let (mut a, mut b) = (numbers(RANK * inputs), numbers(outputs * RANK));
                if layer + 1 == self.shape.layers {
                    self.force(site, token, (&mut a, &mut b), scale);
                }
                let adapter = SiteAdapter {
                    r: RANK,
                    scale,
                    a: a.into(),
                    b: b.into(),
                    magnitude: None,
                };
                weights.sites.insert((layer, site), adapter);
            }
        }
        let row = self.row(token);
        weights.head = Some(ScoreHead {
            labels: vec!["other".to_owned(), label(token)],
            weight: row.iter().map(|w| -w).chain(row.iter().copied()).collect(),
            ..ScoreHead::default()
        });
        let config = LoraConfig::new(RANK, 2.5 * RANK as f64, &Site::ALL).with_score_head();
        peft::write(&config, &weights).unwrap()
    }

    fn force(&self, site: Site, token: u32, (a, b): (&mut [f32], &mut [f32]), scale: f32) {
        let hidden = self.shape.hidden;
        match site {
            // The same directions for both, so that gate and up of a unit are equal.
            Site::Gate | Site::Up => {
                let mut random = ChaCha8Rng::seed_from_u64(u64::from(token));
                a[..UNITS / 2 * hidden].fill_with(|| random.random_range(-0.2..0.2));
                for unit in 0..UNITS {
                    let sign = if unit % 2 == 0 { 30.0 } else { -30.0 };
                    b[unit * RANK..(unit + 1) * RANK].fill(0.0);
                    b[unit * RANK + unit / 2] = sign / scale;
                }
            }
            Site::Down => {
                let inputs = self.shape.intermediate;
                a[..inputs].fill(0.0);
                a[..UNITS].fill(1.0);
                for (output, (e, g)) in self.row(token).iter().zip(&self.norm).enumerate() {
                    b[output * RANK] = e / g;
                }
            }
            _ => {}
        }
    }
}

fn label(token: u32) -> String {
    format!("token {token}")
}

/// The token of an adapter's generation: all different, none of them special.
fn token_of(adapter: usize, generation: usize) -> u32 {
    (20 + adapter + ADAPTERS * (generation % 8)) as u32
}

/// What is known of the server: which token each version forces.
struct World {
    client: Client,
    head: Head,
    tokens: RwLock<HashMap<String, u32>>,
    /// The volatile adapters' generations.
    generations: Mutex<HashMap<usize, usize>>,
    base: HashMap<(&'static str, u32), Vec<u32>>,
    merged: AtomicUsize,
    loads: AtomicUsize,
    refused: AtomicUsize,
}

impl World {
    fn name(&self, adapter: usize) -> String {
        format!("a{adapter}")
    }

    /// Uploads a version that forces the token of its generation.
    async fn push(&self, adapter: usize, generation: usize) {
        let token = token_of(adapter, generation);
        let artifact = self
            .head
            .forcing(token, (adapter + 1000 * generation) as u64);
        let dir = tempfile::tempdir().unwrap();
        peft::to_dir(&artifact, dir.path()).unwrap();
        let upload = AdapterUpload {
            adapter: self.client.names().adapter(&self.name(adapter)).unwrap(),
            dir: dir.path().to_owned(),
            create_if_missing: true,
            // Known before anybody can be answered by it.
            set_aliases: Vec::new(),
            ..Default::default()
        };
        let version = self
            .client
            .upload_adapter(upload)
            .await
            .unwrap()
            .version
            .unwrap();
        self.tokens
            .write()
            .unwrap()
            .insert(version.name.clone(), token);
        let name = self.client.names().adapter(&self.name(adapter)).unwrap();
        let number = version.name.rsplit('/').next().unwrap();
        self.client
            .set_alias(&name, "default", number)
            .await
            .unwrap();
    }

    /// The token that the reply must show, by the version that it names.
    fn expected(&self, effective: Option<v1::EffectiveTarget>, adapter: usize) -> u32 {
        let applied = effective.unwrap().adapters;
        assert_eq!(applied.len(), 1);
        let version = &applied[0].version;
        assert!(
            version.contains(&format!("/{}/", self.name(adapter))),
            "asked for a{adapter}, answered by {version}"
        );
        // The first upload's alias is set by the server itself, a moment before this side knows the version's name.
        let known = self.tokens.read().unwrap().get(version).copied();
        known.unwrap_or_else(|| panic!("{version} is unknown"))
    }

    /// Whether a failure is one that may be: a volatile version that went between its name and its bytes.
    fn may_fail(&self, adapter: usize, error: &Error) {
        let gone = matches!(error.code, Code::NotFound | Code::DataLoss);
        assert!(
            adapter >= ADAPTERS - VOLATILE && gone,
            "a{adapter}: {error}"
        );
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    fn right(&self, tokens: &[u32], expected: u32, what: &str) {
        assert!(
            !tokens.is_empty() && tokens.iter().all(|token| *token == expected),
            "{what}: {tokens:?} instead of {expected}"
        );
    }

    async fn generate(&self, adapter: usize, prompt: &str, count: u32) {
        let request = greedy(&self.client, Some(&self.name(adapter)), prompt, count);
        match self.client.generate(request).await {
            Ok(reply) => {
                let expected = self.expected(reply.effective, adapter);
                let tokens = &reply.candidates[0].token_ids;
                assert_eq!(tokens.len(), count as usize);
                self.right(tokens, expected, "generate");
                let waited = reply.timings.unwrap().adapter_load.unwrap_or_default();
                let loaded = waited.seconds > 0 || waited.nanos > 0;
                self.loads.fetch_add(usize::from(loaded), Ordering::Relaxed);
            }
            Err(error) => self.may_fail(adapter, &error),
        }
    }

    /// Reads a stream, to its end or away from it after so many messages.
    async fn stream(&self, adapter: usize, prompt: &str, count: u32, leave: Option<usize>) {
        use v1::generate_chunk::Event;
        let request = greedy(&self.client, Some(&self.name(adapter)), prompt, count);
        let mut replies = match self.client.stream_generate(request).await {
            Ok(replies) => replies,
            Err(error) => return self.may_fail(adapter, &error),
        };
        let (mut expected, mut read) = (None, 0);
        while let Some(reply) = replies.next().await {
            let event = match reply {
                Ok(chunk) => chunk.event.unwrap(),
                Err(error) => return self.may_fail(adapter, &error),
            };
            match event {
                Event::Started(started) => {
                    expected = Some(self.expected(started.effective, adapter));
                }
                Event::Delta(delta) if !delta.token_ids.is_empty() => {
                    self.right(&delta.token_ids, expected.unwrap(), "stream");
                }
                _ => {}
            }
            read += 1;
            if leave.is_some_and(|leave| read > leave) {
                return;
            }
        }
    }

    async fn classify(&self, adapter: usize, prompt: &str) {
        let request = v1::ClassifyRequest {
            target: Some(self.client.target(Some(&self.name(adapter))).unwrap()),
            texts: vec![prompt.to_owned(), "and another".to_owned()],
            ..Default::default()
        };
        match self.client.classify(request).await {
            Ok(reply) => {
                let expected = self.expected(reply.effective, adapter);
                for result in reply.results {
                    assert_eq!(result.label, label(expected));
                }
            }
            Err(error) => self.may_fail(adapter, &error),
        }
    }

    /// The state after the final norm points where the head reads the token.
    async fn embed(&self, adapter: usize, prompt: &str) {
        let request = v1::EmbedRequest {
            target: Some(self.client.target(Some(&self.name(adapter))).unwrap()),
            texts: vec![prompt.to_owned()],
            ..Default::default()
        };
        match self.client.embed(request).await {
            Ok(reply) => {
                let row = self.head.row(self.expected(reply.effective, adapter));
                let length = row.iter().map(|w| w * w).sum::<f32>().sqrt();
                let values = &reply.embeddings[0].values;
                let cosine: f32 = values.iter().zip(row).map(|(a, b)| a * b / length).sum();
                assert!(cosine > 0.98, "a{adapter}: cosine {cosine}");
            }
            Err(error) => self.may_fail(adapter, &error),
        }
    }

    async fn base(&self, prompt: &'static str, count: u32) {
        let request = greedy(&self.client, None, prompt, count);
        let reply = self.client.generate(request).await.unwrap();
        assert_eq!(reply.candidates[0].token_ids, self.base[&(prompt, count)]);
    }

    /// A new version of a volatile adapter; the old one goes, sometimes with all that has its name.
    async fn renew(&self, adapter: usize) {
        let generation = {
            let mut generations = self.generations.lock().unwrap();
            let next = generations.entry(adapter).or_insert(0);
            *next += 1;
            *next
        };
        let name = self.client.names().adapter(&self.name(adapter)).unwrap();
        self.push(adapter, generation).await;
        let versions = v1::ListAdapterVersionsRequest {
            parent: name,
            ..Default::default()
        };
        let found = self.client.list_adapter_versions(versions).await.unwrap();
        for old in found
            .versions
            .iter()
            .filter(|version| version.aliases.is_empty())
        {
            // Another client may be faster.
            let _ = self.client.delete_adapter_version(&old.name).await;
        }
    }

    /// Asks for a merged copy, or gives one up, and looks what there is.
    async fn remerge(&self, adapter: usize, turn: usize) {
        let name = self.client.names().adapter(&self.name(adapter)).unwrap();
        let policies = [
            v1::MergePolicy::Merged,
            v1::MergePolicy::Unmerged,
            v1::MergePolicy::Auto,
        ];
        let policy = policies[turn % policies.len()];
        self.client.set_merge_policy(&name, policy).await.unwrap();
        let held = memory(&self.client).await;
        let is_merged = |one: &&v1::AdapterResidency| one.merge_state() == v1::MergeState::Merged;
        let merged = held.residency.iter().filter(is_merged).count();
        self.merged.fetch_add(merged, Ordering::Relaxed);
    }

    /// The n-th of all requests.
    async fn turn(&self, n: usize) {
        let mut random = ChaCha8Rng::seed_from_u64(n as u64);
        // A few are asked for most.
        let adapter = random
            .random_range(0..ADAPTERS)
            .min(random.random_range(0..ADAPTERS));
        let prompt = PROMPTS[random.random_range(0..PROMPTS.len())];
        let count = random.random_range(1..6);
        match n % 16 {
            0..=4 => self.generate(adapter, prompt, count).await,
            5..=7 => self.stream(adapter, prompt, count, None).await,
            8..=9 => {
                let leave = random.random_range(0..3);
                self.stream(adapter, prompt, 40, Some(leave)).await;
            }
            10..=11 => self.classify(adapter, prompt).await,
            12 => self.embed(adapter, prompt).await,
            _ => self.base(prompt, count).await,
        }
        if n % 101 == 50 {
            let volatile = ADAPTERS - VOLATILE + n / 101 % VOLATILE;
            self.renew(volatile).await;
        }
        if n % 53 == 20 {
            self.remerge(n / 53 % 3, n / 159).await;
        }
    }

    /// The daemon's resident set after these turns, in KiB, once it is quiet.
    async fn resident_after(&self, turns: std::ops::Range<usize>, daemon: &Daemon) -> f64 {
        self.turns(turns).await;
        settled(&self.client).await;
        resident(daemon.id())
    }

    async fn turns(&self, turns: std::ops::Range<usize>) {
        let next = AtomicUsize::new(turns.start);
        let clients = (0..CLIENTS).map(|_| async {
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= turns.end {
                    return;
                }
                self.turn(n).await;
            }
        });
        futures::future::join_all(clients).await;
    }
}

async fn memory(client: &Client) -> v1::ListResidencyResponse {
    let request = v1::ListResidencyRequest {
        parent: client.names().parent().unwrap(),
        page_size: 1000,
        ..Default::default()
    };
    client.list_residency(request).await.unwrap()
}

/// Waits until nothing runs, waits or is held.
async fn settled(client: &Client) {
    let began = Instant::now();
    loop {
        let info = client.server_info().await.unwrap();
        let leases: u32 = memory(client)
            .await
            .residency
            .iter()
            .map(|one| one.leases)
            .sum();
        let left = (info.requests_running, info.requests_waiting, leases);
        if left == (0, 0, 0) && info.kv_cache_usage == 0.0 {
            return;
        }
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "still held: {left:?}, kv {}",
            info.kv_cache_usage
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Opens as many streams as the server has places, and is refused one more: no permit was lost, and none is there twice.
async fn every_permit_is_back(client: &Client) {
    // A batch whose items never come holds its place and does nothing.
    let open = || client.batch_generate(futures::stream::pending());
    let mut held = Vec::new();
    for _ in 0..PLACES {
        held.push(open().await.unwrap());
    }
    assert!(open().await.is_err(), "a place more than there are");
    drop(held);
    let dropped = Instant::now();
    while client.server_info().await.is_err() {
        assert!(
            dropped.elapsed() < Duration::from_secs(10),
            "places stay taken"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Kibibytes of a process that are in memory.
fn resident(id: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_mixed_requests_show_no_wrong_token_and_leave_nothing() {
    let data = tempfile::tempdir().unwrap();
    let places = &PLACES.to_string();
    let settings = [
        "--model",
        TINY,
        // Small, so that the warm-up has touched all of it.
        "--kv-cache-bytes",
        "1MiB",
        "--adapter-cache-bytes",
        "1MiB",
        "--merged-bytes",
        "1MiB",
        "--merge-window",
        "200ms",
        "--max-in-flight",
        places,
        "--max-in-flight-per-tenant",
        places,
        "--log",
        "warn",
    ];
    let daemon = Daemon::spawn(data.path(), &settings);
    let mut world = World {
        client: tenant(daemon.addr, "acme").await,
        head: Head::load(),
        tokens: RwLock::default(),
        generations: Mutex::default(),
        base: HashMap::new(),
        merged: AtomicUsize::new(0),
        loads: AtomicUsize::new(0),
        refused: AtomicUsize::new(0),
    };
    for prompt in PROMPTS {
        for count in 1..6 {
            let request = greedy(&world.client, None, prompt, count);
            let reply = world.client.generate(request).await.unwrap();
            world
                .base
                .insert((prompt, count), reply.candidates[0].token_ids.clone());
        }
    }
    for adapter in 0..ADAPTERS {
        world.push(adapter, 0).await;
        let (_, by) = answer(&world.client, Some(&world.name(adapter)), "the", 1).await;
        assert_eq!(by.len(), 1);
    }
    let mut before = world.resident_after(0..WARM_UP, &daemon).await;
    let mut after = world.resident_after(WARM_UP..REQUESTS, &daemon).await;
    if after >= 1.02 * before {
        // An allocator may settle once; a leak goes on.
        before = after;
        let again = REQUESTS..2 * REQUESTS - WARM_UP;
        after = world.resident_after(again, &daemon).await;
    }
    every_permit_is_back(&world.client).await;
    settled(&world.client).await;

    let held = memory(&world.client).await;
    assert!(held.used_bytes <= held.budget_bytes && held.merged_bytes <= held.merged_budget_bytes);
    let loads = world.loads.load(Ordering::Relaxed);
    assert!(
        loads > REQUESTS / 20,
        "memory held all adapters: {loads} loads"
    );
    let merged = world.merged.load(Ordering::Relaxed);
    assert!(merged > 0, "nothing was ever merged");
    let growth = after / before - 1.0;
    let refused = world.refused.load(Ordering::Relaxed);
    println!(
        "{REQUESTS} requests: {loads} waited for a load, {merged} merged copies seen, {refused} met a version that was gone; \
         {:.1} MiB before the last {}, {:.1} MiB after all ({:+.2} %)",
        before / 1024.0,
        REQUESTS - WARM_UP,
        after / 1024.0,
        growth * 100.0
    );
    assert!(
        after < 1.02 * before,
        "{before} KiB before the last {} requests, {after} KiB at the end, and it grew as much before",
        REQUESTS - WARM_UP
    );
    assert!(daemon.terminate());
}
