//! When training may run: trainers have threads of their own, but work only while they hold the baton that the engine
//! thread lends. Exactly one of engine step and training quantum runs at any time.
//!
//! While no request runs, quanta follow one another, each ending early when a command arrives. Beside running requests
//! training lives on credit: every step earns it `training_max_tpot_impact` of the step's time, and a quantum takes
//! place only when the credit covers it, so the mean time per output token grows by no more than that share. Tenants
//! take turns, and a tenant's jobs take turns within its own. The worker knows nothing of what a trainer computes.

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use espalier_adapters::linear::BaseSites;
use espalier_adapters::ops::{Backend, Ops, OutOfMemory};
use espalier_adapters::pace::{Pace, Stopped};
use tokio::sync::mpsc;

use crate::command::{CommandSender, EngineCommand};
use crate::config::EngineConfig;
use crate::error::EngineError;
use crate::handle::Gauges;
use crate::metrics;
use crate::model::Model;
use crate::train::trainer::{Finished, TrainError, TrainEvent, Trainer};
use crate::train::{JobEvent, JobFlags, TrainingImpact, TrainingStart, TrainingSubmission};

/// Beside running requests a quantum shorter than this share of the configured one costs more in hand-overs than it does.
const LEAST_QUANTUM_SHARE: u32 = 4;

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
    quantum: Duration,
    max_impact: f64,
    /// Seconds that training may take beside running requests; below zero when a quantum ran over.
    credit: f64,
    busy: Arc<Mutex<BusyTime>>,
    gauges: Arc<Gauges>,
    commands: CommandSender,
}

struct JobBook {
    tenant: Arc<str>,
    flags: Arc<JobFlags>,
    last_turn: u64,
}

/// Who may work: the engine, or the job named.
#[derive(Default)]
struct Baton {
    state: Mutex<BatonState>,
    changed: Condvar,
}

#[derive(Default)]
struct BatonState {
    holder: Option<u64>,
    /// When the holder gives it back.
    until: Option<Instant>,
    /// Jobs that wait for their turn.
    ready: Vec<u64>,
    ended: Vec<u64>,
}

/// A job's side: everything its thread needs to take turns.
struct JobTurns {
    job: u64,
    baton: Arc<Baton>,
    flags: Arc<JobFlags>,
    gauges: Arc<Gauges>,
    commands: CommandSender,
    /// What works for it, which may still be busy when the trainer's thread is not.
    ops: Backend,
    /// Of this job: time held, time waited, turns.
    impact: Mutex<TrainingImpact>,
    /// When the current turn began.
    turn_began: Mutex<Option<Instant>>,
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
            quantum: config.training_quantum,
            max_impact: config.training_max_tpot_impact,
            credit: 0.0,
            busy: Arc::default(),
            gauges,
            commands,
        }
    }

    /// Gives a job its thread. It waits for its first turn before it does anything.
    pub(crate) fn start(&mut self, start: TrainingStart, model: Arc<Model>) {
        let job = self.next_job;
        self.next_job += 1;
        let turns = JobTurns {
            job,
            baton: Arc::clone(&self.baton),
            flags: Arc::clone(&start.flags),
            gauges: Arc::clone(&self.gauges),
            commands: self.commands.clone(),
            ops: model.ops().clone(),
            impact: Mutex::default(),
            turn_began: Mutex::new(None),
        };
        let book = JobBook {
            tenant: Arc::clone(&start.submission.tenant),
            flags: Arc::clone(&start.flags),
            last_turn: 0,
        };
        let (busy, events) = (Arc::clone(&self.busy), start.events.clone());
        let spawned = std::thread::Builder::new()
            .name(format!("trainer-{job}"))
            .spawn(move || run_job(start, &turns, model, &busy));
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
        !lock(&self.baton.state).ready.is_empty()
    }

    /// Jobs whose threads have not ended.
    pub(crate) fn active(&self) -> usize {
        self.jobs.len()
    }

    /// Makes waiting jobs look at their flags, and forgets those that have ended.
    pub(crate) fn look(&mut self) {
        let ended = std::mem::take(&mut lock(&self.baton.state).ended);
        for job in ended {
            self.jobs.remove(&job);
        }
        let jobs = &self.jobs;
        self.tenants
            .retain(|tenant, _| jobs.values().any(|job| job.tenant == *tenant));
        self.baton.changed.notify_all();
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
        // Unused credit is worth two quanta at most: a long quiet time must not be made up for at once.
        let most = 2.0 * self.quantum.as_secs_f64();
        self.credit = (self.credit + step.as_secs_f64() * self.max_impact).min(most);
    }

    /// Lends the baton for one quantum, if a job wants it and the policy allows. `busy`: requests run beside.
    pub(crate) fn turn(&mut self, busy: bool) {
        let quantum = if busy {
            let affordable = Duration::from_secs_f64(self.credit.max(0.0)).min(self.quantum);
            if affordable < self.quantum / LEAST_QUANTUM_SHARE {
                return;
            }
            affordable
        } else {
            self.quantum
        };
        let Some(job) = self.next() else { return };
        self.turns += 1;
        if let Some(book) = self.jobs.get_mut(&job) {
            book.last_turn = self.turns;
            self.tenants.insert(Arc::clone(&book.tenant), self.turns);
        }
        let held = self.baton.lend(job, quantum);
        metrics::training_quantum(held);
        if busy {
            self.credit -= held.as_secs_f64();
            lock(&self.busy).training += held;
        }
        self.look();
    }

    /// The tenant whose last turn is longest ago, and of its jobs the one likewise.
    fn next(&self) -> Option<u64> {
        let ready = lock(&self.baton.state).ready.clone();
        ready
            .into_iter()
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The states guarded here are whole after every statement, so a panic elsewhere does not spoil them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Baton ===

impl Baton {
    /// Engine side: lends and waits until it is back. Returns how long it was away.
    fn lend(&self, job: u64, quantum: Duration) -> Duration {
        let began = Instant::now();
        let mut state = lock(&self.state);
        state.ready.retain(|&ready| ready != job);
        state.holder = Some(job);
        state.until = Some(began + quantum);
        self.changed.notify_all();
        while state.holder.is_some() {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        began.elapsed()
    }
}

// === impl JobTurns ===

impl JobTurns {
    /// Waits for the baton.
    ///
    /// # Errors
    /// The job was stopped while it waited; the baton is not held.
    fn acquire(&self) -> Result<(), Stopped> {
        self.wait_for_turn(lock(&self.baton.state))
    }

    fn wait_for_turn(&self, mut state: MutexGuard<'_, BatonState>) -> Result<(), Stopped> {
        let began = Instant::now();
        state.ready.push(self.job);
        while state.holder != Some(self.job) {
            if self.stopping() {
                state.ready.retain(|&ready| ready != self.job);
                return Err(Stopped);
            }
            state = self
                .baton
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        lock(&self.impact).waited += began.elapsed();
        *lock(&self.turn_began) = Some(Instant::now());
        Ok(())
    }

    /// Gives the baton back, if it is held.
    fn release(&self) {
        self.book_turn();
        let mut state = lock(&self.baton.state);
        if state.holder == Some(self.job) {
            state.holder = None;
            self.baton.changed.notify_all();
        }
    }

    fn book_turn(&self) {
        if let Some(began) = lock(&self.turn_began).take() {
            let mut impact = lock(&self.impact);
            let held = began.elapsed();
            impact.held += held;
            impact.quanta += 1;
            impact.longest_quantum = impact.longest_quantum.max(held);
        }
    }

    fn stopping(&self) -> bool {
        self.flags.cancelled.load(Ordering::SeqCst) || self.flags.suspended.load(Ordering::SeqCst)
    }

    /// Hands an event to the server. A reader that is behind is waited for without the baton.
    fn report(&self, events: &mpsc::Sender<JobEvent>, event: JobEvent) {
        let event = match events.try_send(event) {
            Ok(()) => return,
            Err(mpsc::error::TrySendError::Full(event)) => event,
            Err(mpsc::error::TrySendError::Closed(_)) => {
                self.flags.cancelled.store(true, Ordering::SeqCst);
                return;
            }
        };
        let held = lock(&self.baton.state).holder == Some(self.job);
        self.release();
        if events.blocking_send(event).is_err() {
            self.flags.cancelled.store(true, Ordering::SeqCst);
        }
        if held {
            self.wake_engine();
            // A stop is seen at the next breath, which is before any more work.
            let _ = self.acquire();
        }
    }

    /// The engine may sleep, because it saw no job that is ready.
    fn wake_engine(&self) {
        let _ = self.commands.send(EngineCommand::Wake);
    }
}

impl Pace for JobTurns {
    fn breathe(&self) -> Result<(), Stopped> {
        if self.stopping() {
            return Err(Stopped);
        }
        // A turn ends when its work does, not when it has been handed to a device.
        self.ops.wait();
        let mut state = lock(&self.baton.state);
        let has_turn = state.holder == Some(self.job)
            && state.until.is_some_and(|until| Instant::now() < until);
        if has_turn && self.gauges.pending.load(Ordering::SeqCst) == 0 {
            return Ok(());
        }
        self.book_turn();
        if state.holder == Some(self.job) {
            state.holder = None;
            self.baton.changed.notify_all();
        }
        // Ready in the same breath: the engine must not think that nobody wants a turn.
        self.wait_for_turn(state)
    }

    fn quantum_flops(&self) -> usize {
        self.ops.quantum_flops()
    }
}

// === a job's thread ===

fn run_job(start: TrainingStart, turns: &JobTurns, model: Arc<Model>, busy: &Mutex<BusyTime>) {
    let TrainingStart {
        submission,
        events,
        flags,
        ticket,
    } = start;
    let before = *lock(busy);
    turns.wake_engine();
    let last = match train(submission, turns, model, &events) {
        Ok(finished) => {
            let tpot_impact = share(*lock(busy), before);
            let impact = TrainingImpact {
                tpot_impact,
                ..*lock(&turns.impact)
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
    lock(&turns.baton.state).ended.push(turns.job);
    turns.wake_engine();
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
    model: Arc<Model>,
    events: &mpsc::Sender<JobEvent>,
) -> Result<Finished, Ended> {
    let TrainingSubmission {
        plan, checkpoint, ..
    } = submission;
    turns.acquire().map_err(|_| Ended::Stopped)?;
    let mut trainer = caught(|| match checkpoint {
        Some(bytes) => Trainer::resume(model, plan, &bytes),
        None => Trainer::new(model, plan),
    })?;
    turns.report(events, JobEvent::Started);
    let result = caught(|| {
        trainer.run(turns, &mut |event| {
            if let TrainEvent::Step(step) = &event {
                metrics::training_step(step.tokens);
            }
            turns.report(events, JobEvent::Progress(event));
        })
    });
    let suspended = turns.flags.suspended.load(Ordering::SeqCst)
        && !turns.flags.cancelled.load(Ordering::SeqCst);
    if matches!(result, Err(Ended::Stopped)) && suspended && trainer.steps_done() > 0 {
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
