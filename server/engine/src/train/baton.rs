//! Turns: trainers work only while they hold the baton that the engine thread lends, and give it back when their time is
//! over, when a command waits, or when they wait for company.
//!
//! Exactly one of engine step and training quantum runs at any time. Who is lent the baton, and for how long, is the
//! worker's business.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use espalier_adapters::ops::{Backend, Ops};
use espalier_adapters::pace::{Pace, Stopped};
use tokio::sync::mpsc;

use super::meeting::Meeting;
use crate::command::{CommandSender, EngineCommand};
use crate::handle::Gauges;
use crate::train::trainer::{Company, Interrupted, RunPass, Share, by_itself};
use crate::train::{JobEvent, JobFlags, TrainingImpact};

/// Who may work: the engine, or the job named.
#[derive(Default)]
pub(super) struct Baton {
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
    meeting: Meeting,
    /// Nobody will lend it again.
    closed: bool,
}

/// A job's side: everything its thread needs to take turns.
pub(super) struct JobTurns {
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

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The states guarded here are whole after every statement, so a panic elsewhere does not spoil them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl BatonState ===

impl BatonState {
    /// Whether a job that waits for its turn is on its way to a small pass.
    fn expects(&self) -> bool {
        self.ready.iter().any(|job| self.meeting.is_coming(*job))
    }
}

// === impl Baton ===

impl Baton {
    /// Engine side: lends and waits until it is back. Returns how long it was away.
    pub(super) fn lend(&self, job: u64, quantum: Duration) -> Duration {
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

    /// Jobs that can use a turn. Who has posted a share can not before those on their way have come, and who waits for a
    /// host's pass not before it is over.
    pub(super) fn candidates(&self) -> Vec<u64> {
        let state = lock(&self.state);
        let expects = state.expects();
        let waits =
            |job: u64| state.meeting.is_away(job) || (expects && state.meeting.is_posted(job));
        let ready = state.ready.iter().copied();
        ready.filter(|job| !waits(*job)).collect()
    }

    /// Whether a job waits for its turn.
    pub(super) fn wanted(&self) -> bool {
        !lock(&self.state).ready.is_empty()
    }

    /// Jobs that have ended since this was asked last.
    pub(super) fn take_ended(&self) -> Vec<u64> {
        std::mem::take(&mut lock(&self.state).ended)
    }

    /// Makes waiting jobs look at their flags.
    pub(super) fn wake(&self) {
        self.changed.notify_all();
    }

    /// Nobody will lend it again: whoever waits for it is to stop.
    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.wake();
    }
}

// === impl JobTurns ===

impl JobTurns {
    pub(super) fn new(
        job: u64,
        baton: &Arc<Baton>,
        flags: &Arc<JobFlags>,
        gauges: &Arc<Gauges>,
        commands: CommandSender,
        ops: Backend,
    ) -> Self {
        Self {
            job,
            baton: Arc::clone(baton),
            flags: Arc::clone(flags),
            gauges: Arc::clone(gauges),
            commands,
            ops,
            impact: Mutex::default(),
            turn_began: Mutex::new(None),
        }
    }

    /// Time held, time waited, turns.
    pub(super) fn impact(&self) -> TrainingImpact {
        *lock(&self.impact)
    }

    /// Waits for the first turn. Until it is known how large its passes are, others may wait for it.
    ///
    /// # Errors
    /// As [`JobTurns::acquire`].
    pub(super) fn begin(&self) -> Result<(), Stopped> {
        let mut state = lock(&self.baton.state);
        state.meeting.come(self.job);
        self.wait_for_turn(state)
    }

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
            if self.must_stop(&state) {
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
    pub(super) fn release(&self) {
        self.give_back(&mut lock(&self.baton.state));
    }

    fn give_back(&self, state: &mut BatonState) {
        self.book_turn();
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

    fn book_company(&self, shared: bool) {
        lock(&self.impact).shared_passes += u64::from(shared);
    }

    fn stopping(&self) -> bool {
        self.flags.cancelled.load(Ordering::SeqCst) || self.flags.suspended.load(Ordering::SeqCst)
    }

    /// Whether the job is to end at a checkpoint, to go on later.
    pub(super) fn suspended(&self) -> bool {
        self.flags.suspended.load(Ordering::SeqCst) && !self.flags.cancelled.load(Ordering::SeqCst)
    }

    /// A host finishes the pass that others wait for, and a guest waits for its share, which is soon, unless nobody lends the
    /// baton any more.
    fn must_stop(&self, state: &BatonState) -> bool {
        let bound = state.meeting.is_host(self.job) || state.meeting.is_away(self.job);
        state.closed || (self.stopping() && !bound)
    }

    /// Hands an event to the server. A reader that is behind is waited for without the baton.
    pub(super) fn report(&self, events: &mpsc::Sender<JobEvent>, event: JobEvent) {
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

    /// The job's thread ends.
    pub(super) fn end(&self) {
        let mut state = lock(&self.baton.state);
        state.meeting.forget(self.job);
        state.ended.push(self.job);
        drop(state);
        self.wake_engine();
    }

    /// The engine may sleep, because it saw no job that is ready.
    pub(super) fn wake_engine(&self) {
        let _ = self.commands.send(EngineCommand::Wake);
    }

    /// Posts a share if others are here or on their way, and waits for a turn: who comes last is not who runs the pass, or
    /// those who do not go with it would wait for ever.
    fn meet(&self, share: Share) -> Result<Met, Interrupted> {
        let mut state = lock(&self.baton.state);
        state.meeting.leave(self.job);
        if !state.expects() && state.meeting.is_empty() {
            return Ok(Met::Nobody(share));
        }
        state.meeting.post(self.job, share);
        self.give_back(&mut state);
        let waited = self.wait_for_turn(state);
        let mut state = lock(&self.baton.state);
        let posted = state.meeting.withdraw(self.job);
        let back = state.meeting.take_back(self.job);
        waited?;
        match (posted, back) {
            (Some(share), _) => Ok(Met::Nobody(share)),
            (None, Some(Some(share))) => {
                self.book_company(true);
                Ok(Met::Host(share))
            }
            (None, _) => Err(Interrupted::Lost),
        }
    }

    /// Runs a pass for this job's share and for those that go with it.
    fn host(&self, share: Share, run: RunPass<'_>) -> Result<Share, Interrupted> {
        let guests = lock(&self.baton.state).meeting.board(self.job, &share);
        let (names, guests): (Vec<u64>, Vec<Share>) = guests.into_iter().unzip();
        let mut hosting = Hosting {
            baton: &self.baton,
            guests: names,
            shares: Vec::new(),
        };
        let mut shares = vec![share];
        shares.extend(guests);
        self.book_company(shares.len() > 1);
        run(&mut shares)?;
        hosting.shares = shares.split_off(1);
        drop(hosting);
        lock(&self.baton.state).meeting.come(self.job);
        shares.pop().ok_or(Interrupted::Lost)
    }
}

/// Whom a job has met with its share.
enum Met {
    /// No host: the share is as it was, and the job is the host of whoever is there.
    Nobody(Share),
    /// A host, whose pass the share has been through.
    Host(Share),
}

/// The guests of a pass. Whatever becomes of it, they get something back.
struct Hosting<'a> {
    baton: &'a Baton,
    guests: Vec<u64>,
    /// Of the guests, in their order, once the pass is over.
    shares: Vec<Share>,
}

impl Drop for Hosting<'_> {
    fn drop(&mut self) {
        let mut shares = self.shares.drain(..);
        let mut state = lock(&self.baton.state);
        for guest in &self.guests {
            state.meeting.bring_back(*guest, shares.next());
        }
    }
}

impl Pace for JobTurns {
    fn breathe(&self) -> Result<(), Stopped> {
        // A turn ends when its work does, not when it has been handed to a device.
        self.ops.wait();
        let mut state = lock(&self.baton.state);
        if self.must_stop(&state) {
            return Err(Stopped);
        }
        let has_turn = state.holder == Some(self.job)
            && state.until.is_some_and(|until| Instant::now() < until);
        if has_turn && self.gauges.pending.load(Ordering::SeqCst) == 0 {
            return Ok(());
        }
        self.give_back(&mut state);
        // Ready in the same breath: the engine must not think that nobody wants a turn.
        self.wait_for_turn(state)
    }

    fn quantum_flops(&self) -> usize {
        self.ops.quantum_flops()
    }
}

impl Company for JobTurns {
    fn pass(&self, share: Share, run: RunPass<'_>) -> Result<Share, Interrupted> {
        if !Meeting::is_for(&share) {
            self.alone();
            return Ok(by_itself(share, run)?);
        }
        match self.meet(share)? {
            Met::Nobody(share) => self.host(share, run),
            Met::Host(share) => Ok(share),
        }
    }

    fn alone(&self) {
        lock(&self.baton.state).meeting.leave(self.job);
    }
}
