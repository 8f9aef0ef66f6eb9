//! The threads that share an operation's tasks.
//!
//! A decode step is some three hundred operations of a few microseconds each, so handing one out must cost far less than that. One thread leads: it
//! publishes a job, works on it like the others, and returns when all of it is done. Helpers look for the next job for a moment before they sleep, so that
//! within a step nobody is woken. There is one team in a process, as large as the setting `threads` says: whoever finds it busy does its work alone, so two
//! engines never put more threads on the cores than there are. It must not know what a task computes.

#![allow(
    unsafe_code,
    reason = "helpers run a closure that lives on the leader's stack"
)]

use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a helper looks for the next job before it sleeps: longer than what lies between two operations of a step.
const WATCH: Duration = Duration::from_micros(50);

/// Looks between two readings of the clock.
const LOOKS: u32 = 64;

/// In the gate's lowest bit: a job may be entered. Above it, the helpers inside, and above these the job's number.
const OPEN: usize = 1;
const INSIDE: usize = 2;
const NUMBER: usize = 1 << 16;

/// On a line of its own, so that who writes one does not slow down who reads another.
#[repr(align(128))]
struct Apart<T>(T);

type Task = *const (dyn Fn(usize) + Sync);

struct Shared {
    gate: Apart<AtomicUsize>,
    next: Apart<AtomicUsize>,
    /// Whether a leader is at work.
    led: Apart<AtomicBool>,
    /// Written by the leader while the gate is closed and nobody inside, read by helpers inside.
    job: UnsafeCell<(Option<Task>, usize)>,
    panicked: AtomicBool,
    stop: AtomicBool,
    asleep: Vec<Apart<AtomicBool>>,
}

// SAFETY: `job` is written only while the gate is closed and no helper is inside, and read only by helpers that entered through the gate, whose
// modifications order the two; the closure behind the pointer is `Sync` and outlives the stay of every helper (see `Team::run`).
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it belongs to a thread.
unsafe impl Send for Shared {}

/// A leader's helpers.
pub(super) struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    threads: Vec<Thread>,
}

thread_local! {
    /// The team that a test lends to this thread.
    static LENT: Cell<Option<*const Team>> = const { Cell::new(None) };
}

static ALL: OnceLock<Team> = OnceLock::new();

/// Sets how many threads work on operations in this process, 0 for one on each core; only before the first operation.
///
/// # Errors
/// The number that is already in force, if it is another one.
pub fn set_threads(threads: usize) -> Result<(), usize> {
    let wanted = if threads == 0 { cores() } else { threads };
    let found = ALL.get_or_init(|| Team::new(wanted)).size();
    if found == wanted { Ok(()) } else { Err(found) }
}

/// How many threads work on operations.
pub fn threads() -> usize {
    with_team(Team::size)
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn with_team<R>(f: impl FnOnce(&Team) -> R) -> R {
    match LENT.get() {
        // SAFETY: whoever lent it takes it back before it is gone (see `Team::lend`).
        Some(lent) => f(unsafe { &*lent }),
        None => f(ALL.get_or_init(|| Team::new(cores()))),
    }
}

/// Runs tasks `0..tasks` on all threads that are free; returns when all are done. For work beside the operations too, so that
/// no second pool of threads fights with them.
///
/// # Panics
/// When a task panics.
pub fn run(tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    with_team(|team| team.run(tasks, task));
}

// === impl Team ===

impl Team {
    /// A team of `size` threads, the leader's own included. A helper that cannot be started is done without.
    pub(super) fn new(size: usize) -> Self {
        let count = size.max(1) - 1;
        let shared = Arc::new(Shared {
            gate: Apart(AtomicUsize::new(0)),
            next: Apart(AtomicUsize::new(0)),
            led: Apart(AtomicBool::new(false)),
            job: UnsafeCell::new((None, 0)),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            asleep: (0..count).map(|_| Apart(AtomicBool::new(false))).collect(),
        });
        let helpers: Vec<JoinHandle<()>> = (0..count)
            .map_while(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("espalier-ops-{index}"))
                    .spawn(move || shared.help(index))
                    .ok()
            })
            .collect();
        let threads = helpers
            .iter()
            .map(|helper| helper.thread().clone())
            .collect();
        Team {
            shared,
            helpers,
            threads,
        }
    }

    fn size(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Makes this the team of what `f` does on this thread.
    #[cfg(test)]
    pub(super) fn lend<R>(&self, f: impl FnOnce() -> R) -> R {
        let before = LENT.replace(Some(self));
        let result = catch_unwind(AssertUnwindSafe(f));
        LENT.set(before);
        result.unwrap_or_else(|panic| resume_unwind(panic))
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // A busy team, or a task of its own that has tasks: then this thread works alone.
        if self.helpers.is_empty() || shared.led.0.swap(true, Ordering::Acquire) {
            (0..tasks).for_each(task);
            return;
        }
        // SAFETY: the lifetime is only forgotten until this function closes the gate and has seen every helper leave, which it does before it returns
        // or unwinds.
        let erased: Task = unsafe { std::mem::transmute(task as *const (dyn Fn(usize) + Sync)) };
        // SAFETY: the gate is closed and nobody is inside: the last leader saw to it before it gave `led` back.
        unsafe { *shared.job.get() = (Some(erased), tasks) };
        shared.next.0.store(0, Ordering::Relaxed);
        let number = shared.gate.0.load(Ordering::Relaxed) & !(NUMBER - 1);
        shared
            .gate
            .0
            .store(number.wrapping_add(NUMBER) | OPEN, Ordering::SeqCst);
        for (asleep, thread) in shared.asleep.iter().zip(&self.threads) {
            if asleep.0.load(Ordering::SeqCst) && asleep.0.swap(false, Ordering::SeqCst) {
                thread.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| shared.work(task, tasks)));
        shared.gate.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0_u32;
        while shared.gate.0.load(Ordering::Acquire) & (NUMBER - 1) != 0 {
            looks += 1;
            if looks.is_multiple_of(4096) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        let panicked = shared.panicked.swap(false, Ordering::Relaxed);
        shared.led.0.store(false, Ordering::Release);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!panicked, "a task panicked on a helping thread");
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in &self.threads {
            thread.unpark();
        }
        for helper in self.helpers.drain(..) {
            let _ = helper.join();
        }
    }
}

// === impl Shared ===

impl Shared {
    /// Takes tasks until none is left.
    fn work(&self, task: &(dyn Fn(usize) + Sync), tasks: usize) {
        loop {
            let next = self.next.0.fetch_add(1, Ordering::Relaxed);
            if next >= tasks {
                return;
            }
            task(next);
        }
    }

    /// A helper's life.
    fn help(&self, index: usize) {
        let mut done = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let Some(gate) = self.next_job(index, done) else {
                continue;
            };
            done = gate & !(NUMBER - 1);
            // Only an open gate may be entered, so a helper that comes late never sees a closure that is gone.
            let entered = self.gate.0.compare_exchange(
                gate,
                gate + INSIDE,
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            if entered.is_err() {
                // Another helper entered at the same moment, or the job has ended.
                done = done.wrapping_sub(NUMBER);
                continue;
            }
            // SAFETY: this thread is inside, so the leader neither changes the job nor returns.
            let (task, tasks) = unsafe { *self.job.get() };
            if let Some(task) = task {
                // SAFETY: as above: the closure lives until the leader has seen this thread leave.
                let task = unsafe { &*task };
                if catch_unwind(AssertUnwindSafe(|| self.work(task, tasks))).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
            }
            self.gate.0.fetch_sub(INSIDE, Ordering::AcqRel);
        }
    }

    /// The gate of a job that is open and not the one numbered `done`; `None` after a sleep.
    fn next_job(&self, index: usize, done: usize) -> Option<usize> {
        let fresh = |gate: usize| gate & OPEN != 0 && gate & !(NUMBER - 1) != done;
        let since = Instant::now();
        loop {
            for _ in 0..LOOKS {
                let gate = self.gate.0.load(Ordering::Acquire);
                if fresh(gate) {
                    return Some(gate);
                }
                std::hint::spin_loop();
            }
            if since.elapsed() > WATCH {
                break;
            }
        }
        let asleep = &self.asleep[index].0;
        asleep.store(true, Ordering::SeqCst);
        // The leader opens the gate and then looks who sleeps; this thread says that it sleeps and then looks at the gate: one of them sees the other.
        if !fresh(self.gate.0.load(Ordering::SeqCst)) && !self.stop.load(Ordering::SeqCst) {
            std::thread::park();
        }
        asleep.store(false, Ordering::SeqCst);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_team() {
        for size in [1, 2, 3, 5] {
            let team = Team::new(size);
            for tasks in [0, 1, 2, 17, 1000] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                team.lend(|| {
                    run(tasks, &|t| {
                        counts[t].fetch_add(1, Ordering::Relaxed);
                        // A task may have tasks.
                        run(2, &|_| {
                            counts[t].fetch_add(10, Ordering::Relaxed);
                        });
                    });
                });
                assert!(counts.iter().all(|n| n.load(Ordering::Relaxed) == 21));
            }
        }
    }

    #[test]
    fn many_short_jobs_with_pauses_lose_none() {
        let team = Team::new(3);
        let total = AtomicUsize::new(0);
        team.lend(|| {
            for round in 0..3000 {
                run(4, &|t| {
                    total.fetch_add(t, Ordering::Relaxed);
                });
                if round % 500 == 0 {
                    // Long enough that the helpers sleep.
                    std::thread::sleep(WATCH * 20);
                }
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 3000 * 6);
    }

    #[test]
    fn a_panic_reaches_the_leader_and_the_team_goes_on() {
        let team = Team::new(3);
        for bad in [0, 5, 63] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                team.lend(|| run(64, &|t| assert_ne!(t, bad, "this task fails")));
            }));
            assert!(result.is_err());
            let done = AtomicUsize::new(0);
            team.lend(|| {
                run(64, &|_| {
                    done.fetch_add(1, Ordering::Relaxed);
                });
            });
            assert_eq!(done.load(Ordering::Relaxed), 64);
        }
    }

    #[test]
    fn two_leaders_both_finish() {
        let team = Team::new(2);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    team.lend(|| {
                        for _ in 0..500 {
                            run(8, &|_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        }
                    });
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 8000);
    }
}
