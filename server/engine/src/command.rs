//! Everything that can happen to the engine, as one closed enum: the only way in for every other thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use crate::handle::{Gauges, Ticket};
use crate::model::ResidentAdapter;
use crate::request::{Event, Request};
use crate::train::TrainingStart;

/// One message to the engine thread.
pub(crate) enum EngineCommand {
    /// Work from a tenant.
    Submit(Box<Submission>),
    /// A training job, prepared for its own thread.
    Train(Box<TrainingStart>),
    /// The loaders have brought a version, or could not: whoever waits for it looks again.
    AdapterReady,
    /// A version whose numbers could overflow runs a few tokens before it serves.
    SelfCheck {
        /// As it would serve.
        adapter: Arc<ResidentAdapter>,
        /// Whether all states were finite.
        reply: oneshot::Sender<bool>,
    },
    /// Does the engine still look at its commands?
    Probe(oneshot::Sender<()>),
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
    /// So many of its adapters were not in memory then; their loads have begun.
    pub(crate) adapters_missing: usize,
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
