//! Training inside the engine: what a job is handed over as, and what it reports.
//!
//! The trainer knows mathematics and nothing about serving; the worker knows when a trainer may run and nothing about
//! mathematics. Names, durability and publishing belong to the server.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;

use crate::error::EngineError;
use crate::handle::{EngineHandle, Gauges};

mod baton;
mod budget;
mod meeting;
pub mod trainer;
pub(crate) mod worker;

pub use trainer::{Finished, Footprint, TrainEvent, TrainPlan};

/// Events that a job may have unread. The trainer pauses, without holding the machine, when they are not taken.
const EVENT_BUFFER: usize = 64;

/// A job for the engine. Everything about data was validated before.
pub struct TrainingSubmission {
    /// For logs only.
    pub job: String,
    /// Whose turn it takes: jobs of one tenant share that tenant's turn.
    pub tenant: Arc<str>,
    /// What to train.
    pub plan: TrainPlan,
    /// The bytes of the last [`TrainEvent`] checkpoint, to go on from there; the end is bit-equal to a run without a
    /// break.
    pub checkpoint: Option<Vec<u8>>,
}

/// A job in the engine.
#[derive(Debug)]
pub struct TrainingJob {
    /// What happens, in order; the last one is `Finished`, `Cancelled`, `Suspended` or `Failed`. Dropping the receiver
    /// cancels the job. A channel that closes without a last event means that the engine died.
    pub events: mpsc::Receiver<JobEvent>,
    /// To cancel it.
    pub control: TrainingControl,
}

/// What a job reports.
#[derive(Debug)]
pub enum JobEvent {
    /// The trainer exists and has had its first turn.
    Started(Footprint),
    /// Steps, evaluations, checkpoints: the trainer's own events, in order. A checkpoint is to be stored before it is
    /// relied on.
    Progress(TrainEvent),
    /// The job is done; nothing is published yet.
    Finished {
        /// The artifact and the trainer's summary.
        finished: Box<Finished>,
        /// What the job cost serving.
        impact: TrainingImpact,
    },
    /// [`TrainingControl::cancel`] was called or the receiver dropped.
    Cancelled,
    /// [`TrainingControl::suspend`] was called, or the engine drains; the job goes on from its last checkpoint.
    Suspended,
    /// The trainer refused the plan or failed. Texts hold no data of the job.
    Failed(EngineError),
}

/// What training cost the requests that ran beside it, measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TrainingImpact {
    /// Time this job held the machine.
    pub held: Duration,
    /// Time this job waited while others had it.
    pub waited: Duration,
    /// Turns.
    pub quanta: u64,
    /// Passes in which other jobs' examples were too.
    pub shared_passes: u64,
    /// Longest turn.
    pub longest_quantum: Duration,
    /// Time that training (all jobs) took between steps of running requests during this job, as a share of the time of
    /// those steps; 0.25 is 25 %.
    pub tpot_impact: f64,
}

/// The way to one job. Cheap to clone.
#[derive(Clone)]
pub struct TrainingControl {
    flags: Arc<JobFlags>,
    engine: EngineHandle,
}

/// Read by the trainer's thread at every breath.
#[derive(Default)]
pub(crate) struct JobFlags {
    pub(crate) cancelled: AtomicBool,
    pub(crate) suspended: AtomicBool,
}

/// A job on its way to the engine thread.
pub(crate) struct TrainingStart {
    pub(crate) submission: TrainingSubmission,
    pub(crate) events: mpsc::Sender<JobEvent>,
    pub(crate) flags: Arc<JobFlags>,
    pub(crate) ticket: JobTicket,
}

/// A place among the engine's jobs, given back on drop.
pub(crate) struct JobTicket(Arc<Gauges>);

impl Drop for JobTicket {
    fn drop(&mut self) {
        self.0.training_jobs.fetch_sub(1, Ordering::Relaxed);
    }
}

// === impl TrainingControl ===

impl TrainingControl {
    /// Ends the job within one quantum at a checkpoint, to go on from later; its last event is [`JobEvent::Suspended`].
    pub fn suspend(&self) {
        self.flags.suspended.store(true, Ordering::SeqCst);
        self.engine.wake();
    }

    /// Ends the job within one quantum; its last event is [`JobEvent::Cancelled`]. Cancelling twice does nothing.
    pub fn cancel(&self) {
        self.flags.cancelled.store(true, Ordering::SeqCst);
        self.engine.wake();
    }
}

impl std::fmt::Debug for TrainingControl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrainingControl")
            .field("cancelled", &self.flags.cancelled.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}

// === impl TrainingStart ===

impl TrainingStart {
    /// Takes a place among the engine's jobs.
    pub(crate) fn new(
        submission: TrainingSubmission,
        engine: &EngineHandle,
    ) -> Result<(TrainingStart, TrainingJob), EngineError> {
        let (gauges, limit) = (engine.gauges(), engine.config().max_training_jobs);
        gauges
            .training_jobs
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |jobs| {
                (jobs < limit).then_some(jobs + 1)
            })
            .map_err(|active| EngineError::TrainingCapacity { active, limit })?;
        let ticket = JobTicket(Arc::clone(gauges));
        let (sender, events) = mpsc::channel(EVENT_BUFFER);
        let flags = Arc::new(JobFlags::default());
        let control = TrainingControl {
            flags: Arc::clone(&flags),
            engine: engine.clone(),
        };
        Ok((
            TrainingStart {
                submission,
                events: sender,
                flags,
                ticket,
            },
            TrainingJob { events, control },
        ))
    }
}
