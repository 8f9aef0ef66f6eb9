//! An engine over a real store of random adapters, and one request to it.

use std::sync::Arc;
use std::time::Instant;

use espalier_adapters::config::{BaseShape, LoraConfig, Site};
use espalier_adapters::ops::Backend;
use espalier_adapters::peft;
use espalier_adapters::version::{AdapterArtifact, VersionDigest};
use espalier_adapters::weights::{AdapterWeights, SiteAdapter};
use espalier_benches::Fallible;
use espalier_engine::adapter_loader::{AdapterSource, SourceError};
use espalier_engine::config::EngineConfig;
use espalier_engine::handle::EngineHandle;
use espalier_engine::request::{
    Event, Generate, Priority, Request, RequestKind, StopConditions, TargetVersion, Timings,
};
use espalier_server::artifact_store::ArtifactStore;
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Args;

/// Prompt tokens of a request.
pub(crate) const PROMPT: usize = 128;
/// Its output tokens.
pub(crate) const NEW: usize = 32;

/// An adapter on all linear sites; every number of it is random, and small enough that text stays text.
pub(crate) fn artifact(base: &BaseShape, rank: usize, seed: u64) -> Fallible<AdapterArtifact> {
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
pub(crate) struct Stored(ArtifactStore);

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

pub(crate) fn engine(
    args: &Args,
    adapter_bytes: usize,
    store: &ArtifactStore,
) -> Fallible<EngineHandle> {
    let config = EngineConfig {
        adapter_bytes,
        ..EngineConfig::default()
    };
    let model = espalier_engine::model::load(&args.model)?;
    Ok(EngineHandle::start(
        config,
        Backend::default(),
        model,
        Arc::new(Stored(store.clone())),
    )?)
}

/// Bytes of the weights that a step reads, in f32.
pub(crate) fn base_bytes(engine: &EngineHandle) -> f64 {
    let (config, base) = (&engine.model().config, engine.model().config.base_shape());
    let sites: usize = Site::ALL
        .into_iter()
        .map(|site| base.dims(site).0 * base.dims(site).1)
        .sum();
    ((config.layers * sites + config.vocab * config.hidden) * size_of::<f32>()) as f64
}

/// What came of a request.
pub(crate) struct Reply {
    pub(crate) tokens: usize,
    pub(crate) timings: Timings,
    pub(crate) loaded: bool,
}

pub(crate) async fn ask(
    engine: &EngineHandle,
    digest: VersionDigest,
    seed: u64,
) -> Fallible<Reply> {
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
