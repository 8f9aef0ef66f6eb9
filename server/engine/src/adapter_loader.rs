//! Brings adapter versions from wherever the server keeps them into memory, on threads of its own, so that others go on
//! being served. Knows no names, no tenants and no layout of files: a version is its digest.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use espalier_adapters::config::{BaseShape, Site};
use espalier_adapters::linear::BuildError;
use espalier_adapters::ops::OutOfMemory;
use espalier_adapters::peft::{self, Limits};
use espalier_adapters::version::{AdapterArtifact, VersionDigest};
use espalier_adapters::weights::{AdapterWeights, Numbers, SiteAdapter};
use tokio::sync::oneshot;

use crate::adapter_pool::{ResidentVersion, Room, Shelf};
use crate::command::{CommandSender, EngineCommand};
use crate::config::EngineConfig;
use crate::error::EngineError;
use crate::metrics;
use crate::model::{Model, ResidentAdapter};
use crate::model_runner::SELF_CHECK_TOKENS;

/// Two, so that one source that hangs or one adapter that waits for room does not hold up all others.
const LOADERS: usize = 2;

/// An update that cannot make a normed state larger than this (by the bound on its factors) cannot overflow f32 anywhere
/// in a block: the MLP multiplies two projections (1e8), the third one makes 1e12 of them, whose squares the next norm
/// can still add up.
const SAFE_GAIN: f32 = 1e4;

/// Versions whose check is remembered; 32 bytes each.
const MAX_CHECKED: usize = 1 << 16;

/// Bytes of an artifact that a loader thread keeps to read the next one into.
const MAX_SPARE: usize = 64 << 20;

/// Where artifacts come from. Called on the loader threads only; may block.
pub trait AdapterSource: Send + Sync + 'static {
    /// The artifact of one version, bytes exactly as stored. `spare` is an allocation that its weights may be read into: memory
    /// that the system has to find first costs more than the reading.
    ///
    /// # Errors
    /// [`SourceError`]; the requests that wait for the version get it.
    fn fetch(&self, digest: &VersionDigest, spare: Vec<u8>)
    -> Result<AdapterArtifact, SourceError>;

    /// Whether `fetch` itself makes sure that the bytes are those of the digest, so that they need not be hashed again.
    fn verifies(&self) -> bool {
        false
    }
}

/// Why an artifact could not be had. Texts hold no paths: clients see them.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SourceError {
    /// Nothing is stored under the digest.
    #[error("not stored")]
    NotFound,
    /// The stored bytes are not what the digest names.
    #[error("corrupt: {0}")]
    Corrupt(String),
    /// The store cannot be read just now.
    #[error("unavailable: {0}")]
    Unavailable(String),
}

/// One version to bring.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoadJob {
    pub(crate) digest: VersionDigest,
}

/// What a loader thread works with.
struct Loader {
    source: Arc<dyn AdapterSource>,
    model: Arc<Model>,
    base: BaseShape,
    limits: Limits,
    /// Whether a version that could overflow runs a few tokens before it serves.
    self_check: bool,
    /// Versions that need no check any more.
    checked: Mutex<HashSet<VersionDigest>>,
    shelf: Arc<Shelf>,
    commands: CommandSender,
}

/// Starts the loader threads. They end when the sender of jobs is dropped.
///
/// # Errors
/// A thread that cannot be started.
pub(crate) fn start(
    source: Arc<dyn AdapterSource>,
    model: Arc<Model>,
    config: &EngineConfig,
    shelf: Arc<Shelf>,
    commands: CommandSender,
) -> std::io::Result<SyncSender<LoadJob>> {
    let (sender, jobs) = sync_channel(config.max_adapter_loads);
    let jobs = Arc::new(Mutex::new(jobs));
    let base = model.config().base_shape();
    let loader = Arc::new(Loader {
        source,
        model,
        base,
        limits: config.adapter_limits,
        self_check: config.adapter_self_check,
        checked: Mutex::default(),
        shelf,
        commands,
    });
    for number in 0..LOADERS {
        let (jobs, loader) = (Arc::clone(&jobs), Arc::clone(&loader));
        std::thread::Builder::new()
            .name(format!("adapter-loader-{number}"))
            .spawn(move || loader.run(&jobs))?;
    }
    Ok(sender)
}

// === impl Loader ===

impl Loader {
    fn run(&self, jobs: &Mutex<Receiver<LoadJob>>) {
        let mut spare = Vec::new();
        loop {
            let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(LoadJob { digest }) = job else { return };
            let loaded = catch_unwind(AssertUnwindSafe(|| self.load(digest, &mut spare)));
            let result = loaded.unwrap_or_else(|_| {
                Err(EngineError::Internal {
                    detail: format!("loading adapter version {digest} panicked"),
                })
            });
            if let Err(error) = &result {
                tracing::warn!(%digest, %error, "adapter load failed");
            }
            self.shelf.loaded(digest, result, Instant::now());
            if self
                .commands
                .send_blocking(EngineCommand::AdapterReady)
                .is_err()
            {
                return;
            }
        }
    }

    fn load(
        &self,
        digest: VersionDigest,
        spare: &mut Vec<u8>,
    ) -> Result<ResidentVersion, EngineError> {
        let mut stage = Stage::begin();
        let artifact = self
            .source
            .fetch(&digest, std::mem::take(spare))
            .map_err(|error| from_source(digest, error))?;
        if !self.source.verifies() {
            let found = artifact.digest();
            if found != digest {
                let detail = format!("its bytes have the digest {found}");
                return Err(EngineError::ArtifactCorrupt { digest, detail });
            }
        }
        stage.end("read");
        let incompatible = |report| EngineError::AdapterIncompatible {
            digest,
            report: Arc::new(report),
        };
        let (_, weights, _) =
            peft::read(&artifact, &self.base, &self.limits).map_err(incompatible)?;
        if artifact.safetensors.capacity() <= MAX_SPARE {
            *spare = artifact.safetensors;
        }
        stage.end("parse");
        let bytes = ResidentAdapter::bytes_for(&weights, &*self.model);
        let Room { reservation, spare } = self.shelf.reserve(digest, bytes)?;
        stage.end("room");
        let adapter = ResidentAdapter::build_in(spare, &weights, &*self.model)
            .map_err(|error| from_build(digest, error))?;
        let adapter = Arc::new(adapter);
        stage.end("build");
        self.check(digest, &weights, &adapter)?;
        stage.end("check");
        let labels = adapter.labels().into();
        Ok(ResidentVersion {
            adapter,
            labels,
            reservation,
        })
    }

    /// Once a version: either its numbers are too small to overflow anything, or the engine runs a few tokens through it.
    fn check(
        &self,
        digest: VersionDigest,
        weights: &AdapterWeights,
        adapter: &Arc<ResidentAdapter>,
    ) -> Result<(), EngineError> {
        let checked = || self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.self_check || checked().contains(&digest) {
            return Ok(());
        }
        if largest_gain(weights, &self.base) > SAFE_GAIN {
            let (reply, answer) = oneshot::channel();
            let adapter = Arc::clone(adapter);
            self.commands
                .send_blocking(EngineCommand::SelfCheck { adapter, reply })
                .map_err(|_| EngineError::Stopped)?;
            if !answer.blocking_recv().map_err(|_| EngineError::Stopped)? {
                return Err(EngineError::AdapterSelfCheck {
                    digest,
                    tokens: SELF_CHECK_TOKENS,
                });
            }
        }
        let mut checked = checked();
        if checked.len() >= MAX_CHECKED {
            checked.clear();
        }
        checked.insert(digest);
        Ok(())
    }
}

/// Where a load's time goes.
struct Stage(Instant);

impl Stage {
    fn begin() -> Self {
        Stage(Instant::now())
    }

    fn end(&mut self, stage: &'static str) {
        let now = Instant::now();
        metrics::adapter_load_stage(stage, now - std::mem::replace(&mut self.0, now));
    }
}

/// How many times larger than a normed state (length sqrt(n)) an entry of the update's output can be:
/// `s r n max|A| max|B|`. DoRA divides by a norm that may be next to nothing, (IA)3 multiplies what the base makes and a
/// whole tensor takes its place, so they have no bound.
fn largest_gain(weights: &AdapterWeights, base: &BaseShape) -> f32 {
    let largest = |values: &Numbers| {
        let values = values.to_f32();
        values.iter().fold(0.0_f32, |most, v| most.max(v.abs()))
    };
    let gain = |((_, site), adapter): (&(usize, Site), &SiteAdapter)| {
        if adapter.magnitude.is_some() {
            return f32::INFINITY;
        }
        let products = (adapter.r * base.dims(*site).0) as f32;
        adapter.scale.abs() * products * largest(&adapter.a) * largest(&adapter.b)
    };
    if !(weights.scales.is_empty() && weights.full.is_empty()) {
        return f32::INFINITY;
    }
    weights.sites.iter().map(gain).fold(0.0, f32::max)
}

fn from_build(digest: VersionDigest, error: BuildError) -> EngineError {
    match error {
        BuildError::Misfit(misfit) => EngineError::Internal {
            detail: misfit.to_string(),
        },
        BuildError::OutOfMemory(OutOfMemory { asked, free }) => EngineError::DeviceMemory {
            digest,
            requested: asked,
            free,
        },
    }
}

fn from_source(digest: VersionDigest, error: SourceError) -> EngineError {
    match error {
        SourceError::NotFound => EngineError::AdapterNotFound { digest },
        SourceError::Corrupt(detail) => EngineError::ArtifactCorrupt { digest, detail },
        SourceError::Unavailable(detail) => EngineError::AdapterSource { digest, detail },
    }
}
