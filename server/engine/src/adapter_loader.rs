//! Brings adapter versions from wherever the server keeps them into memory, on threads of its own, so that others go on
//! being served. Knows no names, no tenants and no layout of files: a version is its digest.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use espalier_adapters::config::BaseShape;
use espalier_adapters::peft::{self, Limits};
use espalier_adapters::version::{AdapterArtifact, VersionDigest};
use tokio::sync::oneshot;

use crate::adapter_pool::{Reservation, ResidentVersion, RoomRequest};
use crate::command::{CommandSender, EngineCommand};
use crate::error::EngineError;
use crate::model::{Model, ModelConfig, ResidentAdapter};

/// Two, so that one source that hangs or one adapter that waits for room does not hold up all others.
const LOADERS: usize = 2;

/// Where artifacts come from. Called on the loader threads only; may block.
pub trait AdapterSource: Send + Sync + 'static {
    /// The artifact of one version, bytes exactly as stored.
    ///
    /// # Errors
    /// [`SourceError`]; the requests that wait for the version get it.
    fn fetch(&self, digest: &VersionDigest) -> Result<AdapterArtifact, SourceError>;
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

/// What became of it.
pub(crate) struct LoadOutcome {
    pub(crate) digest: VersionDigest,
    pub(crate) result: Result<ResidentVersion, EngineError>,
}

/// What a loader thread works with.
struct Loader {
    source: Arc<dyn AdapterSource>,
    model: Arc<Model>,
    base: BaseShape,
    limits: Limits,
    commands: CommandSender,
}

/// Starts the loader threads. They end when the sender of jobs is dropped.
///
/// # Errors
/// A thread that cannot be started.
pub(crate) fn start(
    source: Arc<dyn AdapterSource>,
    model: Arc<Model>,
    limits: Limits,
    max_loads: usize,
    commands: CommandSender,
) -> std::io::Result<SyncSender<LoadJob>> {
    let (sender, jobs) = sync_channel(max_loads);
    let jobs = Arc::new(Mutex::new(jobs));
    let base = base_shape(model.config());
    let loader = Arc::new(Loader {
        source,
        model,
        base,
        limits,
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
        loop {
            let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(LoadJob { digest }) = job else { return };
            let loaded = catch_unwind(AssertUnwindSafe(|| self.load(digest)));
            let result = loaded.unwrap_or_else(|_| {
                Err(EngineError::Internal {
                    detail: format!("loading adapter version {digest} panicked"),
                })
            });
            let outcome = Box::new(LoadOutcome { digest, result });
            if self
                .commands
                .send_blocking(EngineCommand::Loaded(outcome))
                .is_err()
            {
                return;
            }
        }
    }

    fn load(&self, digest: VersionDigest) -> Result<ResidentVersion, EngineError> {
        let artifact = self
            .source
            .fetch(&digest)
            .map_err(|error| from_source(digest, error))?;
        let found = artifact.digest();
        if found != digest {
            let detail = format!("its bytes have the digest {found}");
            return Err(EngineError::ArtifactCorrupt { digest, detail });
        }
        let incompatible = |report| EngineError::AdapterIncompatible {
            digest,
            report: Arc::new(report),
        };
        let (_, weights, _) =
            peft::read(&artifact, &self.base, &self.limits).map_err(incompatible)?;
        drop(artifact);
        let reservation = self.reserve(
            digest,
            ResidentAdapter::<f32>::bytes_for(&weights, self.base.layers),
        )?;
        let adapter = ResidentAdapter::build(&weights, &*self.model).map_err(|misfit| {
            EngineError::Internal {
                detail: misfit.to_string(),
            }
        })?;
        let labels = adapter.labels().into();
        Ok(ResidentVersion {
            adapter: Arc::new(adapter),
            labels,
            reservation,
        })
    }

    /// Waits until the engine has room. The engine answers every question or drops it.
    fn reserve(&self, digest: VersionDigest, bytes: usize) -> Result<Reservation, EngineError> {
        let (reply, answer) = oneshot::channel();
        let request = RoomRequest {
            digest,
            bytes,
            asked: Instant::now(),
            reply,
        };
        self.commands
            .send_blocking(EngineCommand::Room(request))
            .map_err(|_| EngineError::Stopped)?;
        answer.blocking_recv().unwrap_or(Err(EngineError::Stopped))
    }
}

fn base_shape(config: &ModelConfig) -> BaseShape {
    BaseShape {
        layers: config.layers,
        hidden: config.hidden,
        intermediate: config.intermediate,
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        vocab: config.vocab,
    }
}

fn from_source(digest: VersionDigest, error: SourceError) -> EngineError {
    match error {
        SourceError::NotFound => EngineError::AdapterNotFound { digest },
        SourceError::Corrupt(detail) => EngineError::ArtifactCorrupt { digest, detail },
        SourceError::Unavailable(detail) => EngineError::AdapterSource { digest, detail },
    }
}
