//! An engine on `tiny:1` with a few random adapters, and replies collected whole.

use espalier_adapters::ops::Backend;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_adapters::config::{BaseShape, LoraConfig, Site};
use espalier_adapters::peft;
use espalier_adapters::version::{AdapterArtifact, VersionDigest};
use espalier_adapters::weights::{AdapterWeights, ScoreHead, SiteAdapter};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc;

use crate::adapter_loader::{AdapterSource, SourceError};
use crate::config::EngineConfig;
use crate::error::EngineError;
use crate::handle::EngineHandle;
use crate::model;
use crate::request::{
    Candidate, Delta, Event, Output, Priority, Request, RequestKind, TargetVersion, TokenLogprob,
    Usage,
};

pub(super) struct Fixture {
    pub(super) engine: EngineHandle,
    digests: Vec<VersionDigest>,
    broken: VersionDigest,
    overflowing: VersionDigest,
}

struct Store(BTreeMap<VersionDigest, AdapterArtifact>);

impl AdapterSource for Store {
    fn fetch(&self, digest: &VersionDigest, _: Vec<u8>) -> Result<AdapterArtifact, SourceError> {
        self.0.get(digest).cloned().ok_or(SourceError::NotFound)
    }
}

/// Everything that came of one request.
#[derive(Debug, Default)]
pub(super) struct Reply {
    deltas: Vec<Delta>,
    pub(super) finished: Vec<Candidate>,
    pub(super) outputs: BTreeMap<usize, Output>,
    pub(super) usage: Option<Usage>,
    pub(super) error: Option<EngineError>,
}

/// Small enough that batches fill.
pub(super) fn small() -> EngineConfig {
    EngineConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: 48,
        prefill_chunk_tokens: 16,
        kv_blocks: 64,
        ..EngineConfig::default()
    }
}

pub(super) fn prompt(seed: u64, len: usize) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(4..200)).collect()
}

fn adapter(seed: u64, base: &BaseShape) -> AdapterArtifact {
    scaled(seed, base, 1.0)
}

/// As [`adapter`], with A and B so many times larger.
fn scaled(seed: u64, base: &BaseShape, factor: f32) -> AdapterArtifact {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Ranks, sites and heads differ, alpha is not r.
    let rank = [3, 4, 8][seed as usize % 3];
    let sites: Vec<Site> = Site::ALL.into_iter().skip(seed as usize % 2).collect();
    let mut config = LoraConfig::new(rank, 2.5 * rank as f64, &sites);
    let mut weights = AdapterWeights::default();
    let mut numbers =
        |count: usize| -> Vec<f32> { (0..count).map(|_| rng.random_range(-0.3..0.3)).collect() };
    for layer in 0..base.layers {
        for &site in &sites {
            let (inputs, outputs) = base.dims(site);
            let mut factors =
                |count: usize| -> Vec<f32> { numbers(count).iter().map(|n| n * factor).collect() };
            let (a, b) = (factors(rank * inputs), factors(outputs * rank));
            weights.sites.insert(
                (layer, site),
                SiteAdapter {
                    r: rank,
                    scale: 2.5,
                    a: a.into(),
                    b: b.into(),
                    magnitude: None,
                },
            );
        }
    }
    if seed % 3 == 2 {
        config = config.with_score_head();
        let labels = ["bug", "praise", "question"].map(str::to_owned).to_vec();
        weights.head = Some(ScoreHead {
            weight: numbers(labels.len() * base.hidden),
            labels,
            ..ScoreHead::default()
        });
    }
    peft::write(&config, &weights).unwrap()
}

pub(super) fn fixture(config: EngineConfig) -> Fixture {
    fixture_on(config, Backend::default())
}

pub(super) fn fixture_on(config: EngineConfig, ops: Backend) -> Fixture {
    let loaded = model::load("tiny:1").unwrap();
    let base = loaded.config.base_shape();
    let artifacts: Vec<_> = (0..6).map(|seed| adapter(seed, &base)).collect();
    let digests: Vec<_> = artifacts.iter().map(AdapterArtifact::digest).collect();
    let mut store: BTreeMap<_, _> = digests.iter().copied().zip(artifacts).collect();
    let mut broken = store[&digests[0]].clone();
    let half = broken.safetensors.len() / 2;
    broken.safetensors.truncate(half);
    let broken_digest = broken.digest();
    store.insert(broken_digest, broken);
    store.insert(lying(), store[&digests[1]].clone());
    let overflowing = scaled(2, &base, 1e30);
    let overflowing_digest = overflowing.digest();
    store.insert(overflowing_digest, overflowing);
    let engine = EngineHandle::start(config, ops, loaded, Arc::new(Store(store))).unwrap();
    Fixture {
        engine,
        digests,
        broken: broken_digest,
        overflowing: overflowing_digest,
    }
}

fn lying() -> VersionDigest {
    VersionDigest::from_bytes([7; 32])
}

/// Waits for what another thread brings about.
#[track_caller]
pub(super) fn eventually(what: &str, holds: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < until, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(super) fn collect(mut receiver: mpsc::Receiver<Event>) -> Reply {
    let mut reply = Reply::default();
    while let Some(event) = receiver.blocking_recv() {
        match event {
            Event::Started(_) => {}
            Event::Delta(delta) => reply.deltas.push(delta),
            Event::Finished(candidate) => reply.finished.push(candidate),
            Event::Output { index, output } => {
                reply.outputs.insert(index, output);
            }
            Event::Done { usage, .. } => reply.usage = Some(usage),
            Event::Failed(error) => reply.error = Some(error),
        }
    }
    assert_ne!(
        reply.usage.is_some(),
        reply.error.is_some(),
        "one last event"
    );
    reply
}

impl Fixture {
    pub(super) fn adapters(&self) -> usize {
        self.digests.len()
    }

    pub(super) fn digest(&self, adapter: usize) -> VersionDigest {
        self.digests[adapter]
    }

    pub(super) fn unknown(&self) -> VersionDigest {
        VersionDigest::from_bytes([9; 32])
    }

    /// Stored under a digest that is not its own.
    pub(super) fn lying(&self) -> VersionDigest {
        lying()
    }

    pub(super) fn broken(&self) -> VersionDigest {
        self.broken
    }

    /// Has a head; its updates are beyond f32.
    pub(super) fn overflowing(&self) -> VersionDigest {
        self.overflowing
    }

    pub(super) fn request(&self, adapter: Option<usize>, kind: RequestKind) -> Request {
        Request {
            id: "test".to_owned(),
            tenant: Arc::from(format!("t{}", adapter.unwrap_or(0) % 2)),
            target: adapter
                .map(|adapter| TargetVersion {
                    digest: self.digests[adapter],
                    weight: 1.0,
                })
                .into_iter()
                .collect(),
            require_resident: false,
            priority: Priority::Interactive,
            kind,
            deadline: None,
            received: Instant::now(),
        }
    }

    /// As [`Fixture::request`], of several adapters with their weights.
    pub(super) fn mixture(&self, parts: &[(usize, f32)], kind: RequestKind) -> Request {
        let target = parts.iter().map(|&(adapter, weight)| TargetVersion {
            digest: self.digests[adapter],
            weight,
        });
        Request {
            target: target.collect(),
            ..self.request(None, kind)
        }
    }

    pub(super) fn submit(
        &self,
        adapter: Option<usize>,
        kind: RequestKind,
    ) -> mpsc::Receiver<Event> {
        self.engine.submit(self.request(adapter, kind)).unwrap()
    }

    pub(super) fn ask(&self, adapter: Option<usize>, kind: RequestKind) -> Reply {
        collect(self.submit(adapter, kind))
    }

    pub(super) fn engine_bytes_of(&self, adapter: usize) -> usize {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime
            .block_on(self.engine.activate(self.digests[adapter]))
            .unwrap()
            .bytes
    }

    /// Nothing runs, waits, or is held.
    #[track_caller]
    pub(super) fn settled(&self) {
        eventually("settled", || {
            let stats = self.engine.stats();
            [
                stats.running,
                stats.waiting,
                stats.queued_requests,
                stats.kv_blocks_used,
                stats.adapter_leases,
            ] == [0; 5]
        });
    }
}

impl Reply {
    pub(super) fn tokens(&self, candidate: usize) -> Vec<u32> {
        let own = self
            .deltas
            .iter()
            .filter(|delta| delta.candidate == candidate);
        own.flat_map(|delta| delta.tokens.clone()).collect()
    }

    pub(super) fn text(&self, candidate: usize) -> String {
        let own = self
            .deltas
            .iter()
            .filter(|delta| delta.candidate == candidate);
        own.map(|delta| delta.text.as_str()).collect()
    }

    pub(super) fn logprobs(&self, candidate: usize) -> Vec<TokenLogprob> {
        let own = self
            .deltas
            .iter()
            .filter(|delta| delta.candidate == candidate);
        own.flat_map(|delta| delta.logprobs.clone()).collect()
    }

    /// Everything that a request's neighbours must not change.
    pub(super) fn results(
        &self,
    ) -> (
        Vec<u32>,
        String,
        Vec<TokenLogprob>,
        &BTreeMap<usize, Output>,
    ) {
        (
            self.tokens(0),
            self.text(0),
            self.logprobs(0),
            &self.outputs,
        )
    }
}
