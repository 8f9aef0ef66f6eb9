//! Sends a workload at its moments. An open loop is paced by a thread of its own that prepares a
//! request before it is due and then hands it over, whatever has become of those before it; a
//! closed loop is a number of clients that each wait for their answer. It measures moments and
//! knows no figures.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::{Semaphore, oneshot, watch},
    task::JoinSet,
};

use crate::bench::{
    record::{Finished, Recorder},
    schedule::{Due, Extent, Pattern, Schedule},
    target::Target,
    workload::{Call, Workload},
};

/// The pacer looks at least this often whether the test was stopped.
const GLANCE: Duration = Duration::from_millis(20);

/// Ends a test early.
#[derive(Clone, Debug)]
pub(crate) struct Stop(Arc<watch::Sender<bool>>);

// === impl Stop ===

impl Stop {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::channel(false).0))
    }

    pub(crate) fn set(&self) {
        self.0.send_replace(true);
    }

    pub(crate) fn is_set(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns when it is set.
    pub(crate) async fn wait(&self) {
        let mut seen = self.0.subscribe();
        // The sender lives as long as this value, so that waiting cannot fail.
        let _ = seen.wait_for(|is_set| *is_set).await;
    }
}

/// One test.
#[derive(Clone, Debug)]
pub(crate) struct Drive {
    pub(crate) target: Arc<Target>,
    pub(crate) workload: Arc<Workload>,
    pub(crate) pattern: Pattern,
    pub(crate) extent: Extent,
    /// The most requests in flight; a request that waits here is late, and its latency says so.
    pub(crate) max_in_flight: usize,
    pub(crate) stop: Stop,
    pub(crate) recorder: Arc<Recorder>,
}

// === impl Drive ===

impl Drive {
    /// Returns when every request has its answer, or at once when it is stopped.
    pub(crate) async fn run(&self) {
        match Schedule::new(&self.pattern, self.extent, self.workload.seed) {
            Some(schedule) => self.open(schedule).await,
            None => self.closed().await,
        }
    }

    async fn open(&self, schedule: Schedule) {
        let places = Arc::new(Semaphore::new(self.max_in_flight));
        let (ended, end) = oneshot::channel();
        let pacer = Pacer {
            drive: self.clone(),
            places: Arc::clone(&places),
            runtime: tokio::runtime::Handle::current(),
        };
        std::thread::spawn(move || {
            pacer.run(schedule);
            // Nobody waits any more after a stop.
            let _ = ended.send(());
        });
        let all = async {
            let _ = end.await;
            let places_of_all = u32::try_from(self.max_in_flight).unwrap_or(u32::MAX);
            let _ = places.acquire_many(places_of_all).await;
        };
        tokio::select! {
            () = all => {}
            () = self.stop.wait() => {}
        }
    }

    async fn closed(&self) {
        let Pattern::Closed { from, to } = self.pattern else {
            return;
        };
        let tickets = Arc::new(Tickets::new(self.extent));
        let mut clients = JoinSet::new();
        let most = from.max(to);
        for number in 0..most {
            let life = Life::of(number, from, to, self.extent.end());
            clients.spawn(self.clone().client(Arc::clone(&tickets), life));
        }
        let all = async { while clients.join_next().await.is_some() {} };
        tokio::select! {
            () = all => {}
            () = self.stop.wait() => {}
        }
    }

    /// One client of a closed loop.
    async fn client(self, tickets: Arc<Tickets>, life: Life) {
        let start = self.recorder.start();
        tokio::time::sleep_until((start + life.from).into()).await;
        while !self.stop.is_set() {
            let at = Instant::now().saturating_duration_since(start);
            if life.to.is_some_and(|to| at >= to) {
                return;
            }
            let Some(mut due) = tickets.next(at) else {
                return;
            };
            let call = self.workload.call(&due);
            // A client without a schedule is never late: its request is due when it is ready.
            due.at = Instant::now().saturating_duration_since(start);
            self.recorder.sending();
            self.send(due, call).await;
        }
    }

    async fn send(&self, due: Due, call: Call) {
        let (operation, tenant, adapter) = (call.operation, call.tenant, call.adapter);
        let sent = Instant::now();
        let outcome = self.target.send(call).await;
        self.recorder.add(Finished {
            due,
            operation,
            tenant,
            adapter,
            sent,
            end: Instant::now(),
            outcome,
        });
    }
}

/// When a client of a closed loop begins and ends, since the start.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Life {
    from: Duration,
    to: Option<Duration>,
}

// === impl Life ===

impl Life {
    /// Of the client with this number, where their count goes from one to another over the test.
    fn of(number: usize, from: usize, to: usize, end: Option<Duration>) -> Self {
        let always = Self {
            from: Duration::ZERO,
            to: None,
        };
        let Some(end) = end else { return always };
        let moment = |steps: usize, all: usize| end.mul_f64(steps as f64 / all as f64);
        if number < from.min(to) {
            always
        } else if from < to {
            // As many even steps as clients are to come, the last of them before the end.
            Self {
                from: moment(number - from + 1, to - from + 1),
                to: None,
            }
        } else {
            Self {
                from: Duration::ZERO,
                to: Some(moment(from - number, from - to + 1)),
            }
        }
    }
}

/// Numbers for the requests of a closed loop, in the order in which clients become ready.
#[derive(Debug)]
struct Tickets {
    extent: Extent,
    /// The next index, and how many measured requests were given.
    given: Mutex<(u64, u64)>,
}

// === impl Tickets ===

impl Tickets {
    fn new(extent: Extent) -> Self {
        Self {
            extent,
            given: Mutex::default(),
        }
    }

    fn next(&self, at: Duration) -> Option<Due> {
        if self.extent.end().is_some_and(|end| at >= end) {
            return None;
        }
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let (index, measured) = *given;
        if self.extent.requests.is_some_and(|limit| measured >= limit) {
            return None;
        }
        let warmup = self.extent.is_warmup(index, at);
        *given = (index + 1, measured + u64::from(!warmup));
        Some(Due {
            index,
            at,
            warmup,
            tenant: None,
            row: None,
        })
    }
}

/// The thread that keeps an open loop's time: the system's sleep is precise to some tens of
/// microseconds, the runtime's to a millisecond.
struct Pacer {
    drive: Drive,
    places: Arc<Semaphore>,
    runtime: tokio::runtime::Handle,
}

// === impl Pacer ===

impl Pacer {
    fn run(&self, schedule: Schedule) {
        for due in schedule {
            let call = self.drive.workload.call(&due);
            if !self.sleep_until(self.drive.recorder.start() + due.at) {
                return;
            }
            let Some(place) = self.place() else { return };
            let drive = self.drive.clone();
            drive.recorder.sending();
            self.runtime.spawn(async move {
                drive.send(due, call).await;
                drop(place);
            });
        }
    }

    /// False when the test was stopped meanwhile.
    fn sleep_until(&self, moment: Instant) -> bool {
        loop {
            if self.drive.stop.is_set() {
                return false;
            }
            let left = moment.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(GLANCE));
        }
    }

    fn place(&self) -> Option<tokio::sync::OwnedSemaphorePermit> {
        let places = Arc::clone(&self.places);
        if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
            return Some(place);
        }
        let stop = self.drive.stop.clone();
        self.runtime.block_on(async move {
            tokio::select! {
                place = places.acquire_owned() => place.ok(),
                () = stop.wait() => None,
            }
        })
    }
}
