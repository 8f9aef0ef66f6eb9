//! When training may run: whom the engine thread lends the baton between its steps, and for how long.
//!
//! While no request runs, quanta follow one another, each ending early when a command arrives. Beside running requests
//! training lives within its [`Budget`]. Tenants take turns, and a tenant's jobs take turns within its own. The worker knows
//! nothing of what a trainer computes.

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use espalier_adapters::linear::BaseSites;
use espalier_adapters::ops::OutOfMemory;
use tokio::sync::mpsc;

use super::baton::{Baton, JobTurns, lock};
use super::budget::Budget;
use crate::command::CommandSender;
use crate::config::EngineConfig;
use crate::error::EngineError;
use crate::handle::Gauges;
use crate::metrics;
use crate::model::Model;
use crate::train::trainer::{Finished, TrainError, TrainEvent, Trainer};
use crate::train::{JobEvent, JobFlags, TrainingImpact, TrainingStart, TrainingSubmission};

/// Time spent in steps of running requests, and in training between them.
#[derive(Clone, Copy, Debug, Default)]
struct BusyTime {
    steps: Duration,
    training: Duration,
}

/// The engine thread's side of training.
pub(crate) struct TrainingWorker {
    baton: Arc<Baton>,
    jobs: HashMap<u64, JobBook>,
    /// When each tenant had its last turn.
    tenants: HashMap<Arc<str>, u64>,
    next_job: u64,
    turns: u64,
    budget: Budget,
    /// Bytes that a job may hold beside the base.
    most_bytes: usize,
    busy: Arc<Mutex<BusyTime>>,
    gauges: Arc<Gauges>,
    commands: CommandSender,
}

struct JobBook {
    tenant: Arc<str>,
    flags: Arc<JobFlags>,
    last_turn: u64,
}

// === impl TrainingWorker ===

impl TrainingWorker {
    pub(crate) fn new(config: &EngineConfig, gauges: Arc<Gauges>, commands: CommandSender) -> Self {
        TrainingWorker {
            baton: Arc::default(),
            jobs: HashMap::new(),
            tenants: HashMap::new(),
            next_job: 0,
            turns: 0,
            budget: Budget::new(config.training_quantum, config.training_max_tpot_impact),
            most_bytes: config.training_job_bytes,
            busy: Arc::default(),
            gauges,
            commands,
        }
    }

    /// Gives a job its thread. It waits for its first turn before it does anything.
    pub(crate) fn start(&mut self, start: TrainingStart, model: Arc<Model>) {
        let job = self.next_job;
        self.next_job += 1;
        let (baton, flags, gauges) = (&self.baton, &start.flags, &self.gauges);
        let (commands, ops) = (self.commands.clone(), model.ops().clone());
        let turns = JobTurns::new(job, baton, flags, gauges, commands, ops);
        let book = JobBook {
            tenant: Arc::clone(&start.submission.tenant),
            flags: Arc::clone(&start.flags),
            last_turn: 0,
        };
        let (busy, events) = (Arc::clone(&self.busy), start.events.clone());
        let most_bytes = self.most_bytes;
        let spawned = std::thread::Builder::new()
            .name(format!("trainer-{job}"))
            .spawn(move || run_job(start, &turns, (model, most_bytes), &busy));
        match spawned {
            Ok(_) => {
                self.jobs.insert(job, book);
            }
            Err(error) => {
                let detail = format!("no thread for the trainer: {error}");
                let _ = events.try_send(JobEvent::Failed(EngineError::Internal { detail }));
            }
        }
    }

    /// Whether a job waits for its turn.
    pub(crate) fn ready(&self) -> bool {
        self.baton.wanted()
    }

    /// Jobs whose threads have not ended.
    pub(crate) fn active(&self) -> usize {
        self.jobs.len()
    }

    /// Makes waiting jobs look at their flags, and forgets those that have ended.
    pub(crate) fn look(&mut self) {
        for job in self.baton.take_ended() {
            self.jobs.remove(&job);
        }
        let jobs = &self.jobs;
        self.tenants
            .retain(|tenant, _| jobs.values().any(|job| job.tenant == *tenant));
        self.baton.wake();
    }

    /// Ends all jobs at a checkpoint.
    pub(crate) fn suspend_all(&mut self) {
        for job in self.jobs.values() {
            job.flags.suspended.store(true, Ordering::SeqCst);
        }
        self.look();
    }

    /// Books a step of running requests.
    pub(crate) fn after_step(&mut self, step: Duration) {
        lock(&self.busy).steps += step;
        self.budget.earn(step);
    }

    /// Lends the baton for one quantum, if a job wants it and the policy allows. `busy`: requests run beside.
    pub(crate) fn turn(&mut self, busy: bool) {
        let quantum = if busy {
            self.budget.busy()
        } else {
            Some(self.budget.idle())
        };
        let Some(quantum) = quantum else { return };
        let Some(job) = self.next() else { return };
        self.turns += 1;
        if let Some(book) = self.jobs.get_mut(&job) {
            book.last_turn = self.turns;
            self.tenants.insert(Arc::clone(&book.tenant), self.turns);
        }
        let held = self.baton.lend(job, quantum);
        metrics::training_quantum(held);
        if busy {
            self.budget.spend(held);
            lock(&self.busy).training += held;
        }
        self.look();
    }

    /// The tenant whose last turn is longest ago, and of its jobs the one likewise.
    fn next(&self) -> Option<u64> {
        let ready = self.baton.candidates().into_iter();
        ready
            .filter_map(|id| {
                let book = self.jobs.get(&id)?;
                let tenant_turn = self.tenants.get(&book.tenant).copied().unwrap_or(0);
                Some((tenant_turn, book.last_turn, id))
            })
            .min()
            .map(|(_, _, id)| id)
    }

    /// What training has added to the time of steps beside which it ran, since the start.
    pub(crate) fn impact(&self) -> f64 {
        share(*lock(&self.busy), BusyTime::default())
    }
}

/// An engine thread that ends must not leave trainers waiting for a turn that never comes.
impl Drop for TrainingWorker {
    fn drop(&mut self) {
        self.suspend_all();
        self.baton.close();
    }
}

fn share(now: BusyTime, before: BusyTime) -> f64 {
    let steps = (now.steps - before.steps).as_secs_f64();
    if steps > 0.0 {
        (now.training - before.training).as_secs_f64() / steps
    } else {
        0.0
    }
}

// === a job's thread ===

fn run_job(
    start: TrainingStart,
    turns: &JobTurns,
    within: (Arc<Model>, usize),
    busy: &Mutex<BusyTime>,
) {
    let TrainingStart {
        submission,
        events,
        flags,
        ticket,
    } = start;
    let before = *lock(busy);
    turns.wake_engine();
    let last = match train(submission, turns, within, &events) {
        Ok(finished) => {
            let tpot_impact = share(*lock(busy), before);
            let impact = TrainingImpact {
                tpot_impact,
                ..turns.impact()
            };
            JobEvent::Finished {
                finished: Box::new(finished),
                impact,
            }
        }
        Err(_) if flags.cancelled.load(Ordering::SeqCst) => JobEvent::Cancelled,
        Err(Ended::Stopped) => JobEvent::Suspended,
        Err(Ended::Failed(error)) => JobEvent::Failed(error),
    };
    turns.release();
    // The place is free before the last event tells so.
    drop(ticket);
    let _ = events.blocking_send(last);
    turns.end();
}

enum Ended {
    Stopped,
    Failed(EngineError),
}

impl From<TrainError> for Ended {
    fn from(error: TrainError) -> Self {
        match error {
            TrainError::Stopped(_) => Ended::Stopped,
            other => Ended::Failed(EngineError::TrainingFailed {
                detail: other.to_string(),
            }),
        }
    }
}

fn train(
    submission: TrainingSubmission,
    turns: &JobTurns,
    (model, most_bytes): (Arc<Model>, usize),
    events: &mpsc::Sender<JobEvent>,
) -> Result<Finished, Ended> {
    let TrainingSubmission {
        plan, checkpoint, ..
    } = submission;
    turns.begin().map_err(|_| Ended::Stopped)?;
    let mut trainer = caught(|| match checkpoint {
        Some(bytes) => Trainer::resume(model, plan, &bytes),
        None => Trainer::new(model, plan),
    })?;
    let bytes = trainer.footprint().bytes;
    if bytes > most_bytes as u64 {
        let limit = most_bytes;
        return Err(TrainError::TooLarge { bytes, limit }.into());
    }
    turns.report(events, JobEvent::Started(trainer.footprint()));
    let result = caught(|| {
        trainer.run(turns, &mut |event| {
            if let TrainEvent::Step(step) = &event {
                metrics::training_step(step.tokens);
            }
            turns.report(events, JobEvent::Progress(event));
        })
    });
    if matches!(result, Err(Ended::Stopped)) && turns.suspended() && trainer.steps_done() > 0 {
        let step = trainer.steps_done();
        let bytes = caught(|| trainer.checkpoint())?;
        turns.report(
            events,
            JobEvent::Progress(TrainEvent::Checkpoint { step, bytes }),
        );
    }
    result
}

/// A device that has no room says so by a panic, because it may happen in any operation; everything else is a mistake of ours.
fn panicked(panic: &dyn Any) -> EngineError {
    if let Some(full) = panic.downcast_ref::<OutOfMemory>() {
        return EngineError::TrainingFailed {
            detail: format!(
                "{full}; lower training_activation_bytes, or the job's batch size or rank"
            ),
        };
    }
    metrics::panic_caught("trainer");
    EngineError::Internal {
        detail: "the trainer panicked".to_owned(),
    }
}

/// A trainer that panics costs its own job only.
fn caught<T>(work: impl FnOnce() -> Result<T, TrainError>) -> Result<T, Ended> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(Ended::from),
        Err(panic) => Err(Ended::Failed(panicked(panic.as_ref()))),
    }
}
