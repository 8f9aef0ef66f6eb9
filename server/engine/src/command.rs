//! Everything that can happen to the engine, as one closed enum: the only way in for every other thread.

use std::sync::Arc;
use std::time::Instant;

use espalier_adapters::version::VersionDigest;
use tokio::sync::{mpsc, oneshot};

use crate::adapter_loader::LoadOutcome;
use crate::adapter_pool::AdapterResidency;
use crate::error::EngineError;
use crate::handle::Ticket;
use crate::request::{Event, Request};
use crate::train::TrainingStart;

/// One message to the engine thread.
pub(crate) enum EngineCommand {
    /// Work from a tenant.
    Submit(Box<Submission>),
    /// A training job, prepared for its own thread.
    Train(Box<TrainingStart>),
    /// Load a version now, or keep it warm.
    Activate {
        /// The version.
        digest: VersionDigest,
        /// Answered when it is resident or has failed.
        reply: oneshot::Sender<Result<AdapterResidency, EngineError>>,
    },
    /// Evict a version now.
    Deactivate {
        /// The version.
        digest: VersionDigest,
        /// Answered at once.
        reply: oneshot::Sender<Result<(), EngineError>>,
    },
    /// The loader is done with one version.
    Loaded(Box<LoadOutcome>),
    /// What is resident now.
    Residency(oneshot::Sender<Vec<AdapterResidency>>),
    /// Look at the training jobs: one was cancelled or has ended.
    Wake,
    /// Finish what runs, stop training at a checkpoint, then answer and end the thread.
    Drain {
        /// Sequences still running then are cut off.
        deadline: Instant,
        /// Answered when all is done.
        reply: oneshot::Sender<()>,
    },
}

/// A request with its way back.
pub(crate) struct Submission {
    pub(crate) request: Request,
    pub(crate) events: mpsc::Sender<Event>,
    /// The place in the bounded queue; given back when the request starts or ends.
    pub(crate) ticket: Ticket,
}

impl std::fmt::Debug for EngineCommand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            EngineCommand::Submit(_) => "Submit",
            EngineCommand::Train(_) => "Train",
            EngineCommand::Activate { .. } => "Activate",
            EngineCommand::Deactivate { .. } => "Deactivate",
            EngineCommand::Loaded(_) => "Loaded",
            EngineCommand::Residency(_) => "Residency",
            EngineCommand::Wake => "Wake",
            EngineCommand::Drain { .. } => "Drain",
        })
    }
}
