//! Everything that can happen to the engine, as one closed enum: the only way in for every other thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Instant;

use espalier_adapters::version::VersionDigest;
use tokio::sync::{mpsc, oneshot};

use crate::adapter_loader::LoadOutcome;
use crate::adapter_pool::{AdapterResidency, RoomRequest};
use crate::error::EngineError;
use crate::handle::{Gauges, Ticket};
use crate::request::{Event, Request};
use crate::train::TrainingStart;

/// One message to the engine thread.
pub(crate) enum EngineCommand {
    /// Work from a tenant.
    Submit(Box<Submission>),
    /// A training job, prepared for its own thread.
    Train(Box<TrainingStart>),
    /// Load a version now.
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
    /// The loader needs room for a version.
    Room(RoomRequest),
    /// The loader is done with one version.
    Loaded(Box<LoadOutcome>),
    /// What is resident now.
    Residency(oneshot::Sender<Vec<AdapterResidency>>),
    /// Look at the training jobs: one was cancelled, has ended or wants its turn.
    Wake,
    /// Finish what runs, stop training at a checkpoint, then answer and end the thread.
    Drain {
        /// Requests still running then are cut off.
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
    pub(crate) submitted: Instant,
}

/// Sends commands and counts those not yet drained: a training quantum ends early for them.
#[derive(Clone)]
pub(crate) struct CommandSender {
    channel: SyncSender<EngineCommand>,
    gauges: Arc<Gauges>,
}

/// Why a command was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SendRefused {
    /// Control messages came in a flood; requests have places of their own.
    Full,
    /// The engine thread is gone.
    Stopped,
}

// === impl CommandSender ===

impl CommandSender {
    pub(crate) fn new(channel: SyncSender<EngineCommand>, gauges: Arc<Gauges>) -> Self {
        CommandSender { channel, gauges }
    }

    /// Never waits.
    pub(crate) fn send(&self, command: EngineCommand) -> Result<(), SendRefused> {
        self.gauges.pending.fetch_add(1, Ordering::SeqCst);
        self.channel.try_send(command).map_err(|error| {
            self.gauges.pending.fetch_sub(1, Ordering::SeqCst);
            match error {
                TrySendError::Full(_) => SendRefused::Full,
                TrySendError::Disconnected(_) => SendRefused::Stopped,
            }
        })
    }

    /// Waits for a place; for threads that may.
    pub(crate) fn send_blocking(&self, command: EngineCommand) -> Result<(), SendRefused> {
        self.gauges.pending.fetch_add(1, Ordering::SeqCst);
        self.channel.send(command).map_err(|_| {
            self.gauges.pending.fetch_sub(1, Ordering::SeqCst);
            SendRefused::Stopped
        })
    }
}
