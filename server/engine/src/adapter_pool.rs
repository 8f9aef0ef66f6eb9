//! Which adapter versions are in memory, who holds them, and which one goes when room is needed.
//!
//! A version in use is leased, and a leased version is never evicted. Bytes are reserved before a version is built and
//! come back when the last holder drops it. The pool must not know requests, files or tensors' layout.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::{Duration, Instant};

use espalier_adapters::version::VersionDigest;
use tokio::sync::oneshot;

use crate::adapter_loader::LoadJob;
use crate::error::EngineError;
use crate::handle::RETRY_AFTER;
use crate::metrics;
use crate::model::ResidentAdapter;

/// After so long without room the least recently used versions take no new requests, so that they end and make room:
/// steady traffic on the resident ones cannot keep the others out for ever.
const ROOM_PATIENCE: Duration = Duration::from_millis(500);

/// Failures that residency lists; the oldest is forgotten first.
const MAX_FAILURES: usize = 256;

/// One version as the engine sees it now.
#[derive(Clone, Debug)]
pub struct AdapterResidency {
    /// The version.
    pub digest: VersionDigest,
    /// Loading, resident, or failed.
    pub state: ResidencyState,
    /// Bytes of the arena and the head.
    pub bytes: usize,
    /// Requests that hold it now.
    pub leases: usize,
    /// Time since it was last asked for.
    pub idle: Duration,
    /// How long its load took.
    pub load_duration: Duration,
}

/// How far a version has come.
#[derive(Clone, Debug)]
pub enum ResidencyState {
    /// The loader has it, or it waits for the loader.
    Loading,
    /// It answers requests.
    Resident,
    /// Its last load failed; the next request tries again.
    Failed(EngineError),
}

/// Bytes of adapters, counted where they are held.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    used: Arc<AtomicUsize>,
    limit: usize,
}

/// Bytes of the budget, given back on drop.
#[derive(Debug)]
pub(crate) struct Reservation {
    used: Arc<AtomicUsize>,
    bytes: usize,
}

/// A version in memory.
#[derive(Debug)]
pub(crate) struct ResidentVersion {
    pub(crate) adapter: Arc<ResidentAdapter>,
    pub(crate) labels: Arc<[String]>,
    pub(crate) reservation: Reservation,
}

/// A version that cannot be evicted while this lives.
#[derive(Clone, Debug)]
pub(crate) struct AdapterLease(Arc<ResidentVersion>);

/// The loader's question for room, answered when there is some.
pub(crate) struct RoomRequest {
    pub(crate) digest: VersionDigest,
    pub(crate) bytes: usize,
    pub(crate) asked: Instant,
    pub(crate) reply: oneshot::Sender<Result<Reservation, EngineError>>,
}

/// What [`AdapterPool::lease`] found.
#[derive(Debug)]
pub(crate) enum Lookup {
    /// It is there.
    Ready(AdapterLease),
    /// Ask again later.
    Wait,
    /// It cannot be had.
    Failed(EngineError),
}

enum Slot {
    Loading {
        since: Instant,
    },
    Resident {
        version: Arc<ResidentVersion>,
        last_used: Instant,
        load_duration: Duration,
        /// No new leases: it is to make room.
        closing: bool,
    },
    Failed {
        error: EngineError,
        at: Instant,
    },
}

/// The engine's book of adapter versions.
pub(crate) struct AdapterPool {
    slots: HashMap<VersionDigest, Slot>,
    budget: Budget,
    loader: SyncSender<LoadJob>,
    max_loads: usize,
    loading: usize,
    room: VecDeque<RoomRequest>,
}

// === impl Budget ===

impl Budget {
    pub(crate) fn new(limit: usize) -> Self {
        Budget {
            used: Arc::new(AtomicUsize::new(0)),
            limit,
        }
    }

    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::SeqCst)
    }

    pub(crate) fn reserve(&self, bytes: usize) -> Option<Reservation> {
        let fits = |used: usize| used.checked_add(bytes).filter(|&sum| sum <= self.limit);
        self.used
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, fits)
            .ok()
            .map(|_| Reservation {
                used: Arc::clone(&self.used),
                bytes,
            })
    }
}

impl Reservation {
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::SeqCst);
    }
}

// === impl AdapterLease ===

impl std::ops::Deref for AdapterLease {
    type Target = ResidentVersion;

    fn deref(&self) -> &ResidentVersion {
        &self.0
    }
}

// === impl AdapterPool ===

impl AdapterPool {
    /// `loader` must hold `max_loads` jobs.
    pub(crate) fn new(limit: usize, max_loads: usize, loader: SyncSender<LoadJob>) -> Self {
        AdapterPool {
            slots: HashMap::new(),
            budget: Budget::new(limit),
            loader,
            max_loads,
            loading: 0,
            room: VecDeque::new(),
        }
    }

    /// The version, for a request that has waited since `since`; starts its load when it is not there. A failure from
    /// before `since` is not the request's: it gets an attempt of its own.
    pub(crate) fn lease(&mut self, digest: VersionDigest, since: Instant, now: Instant) -> Lookup {
        match self.slots.get_mut(&digest) {
            Some(Slot::Resident {
                version,
                last_used,
                closing: false,
                ..
            }) => {
                *last_used = now;
                Lookup::Ready(AdapterLease(Arc::clone(version)))
            }
            Some(Slot::Resident { .. } | Slot::Loading { .. }) => Lookup::Wait,
            Some(Slot::Failed { error, at }) if *at >= since => Lookup::Failed(error.clone()),
            Some(Slot::Failed { .. }) | None => self.start_load(digest, now),
        }
    }

    pub(crate) fn is_resident(&self, digest: &VersionDigest) -> bool {
        matches!(self.slots.get(digest), Some(Slot::Resident { .. }))
    }

    fn start_load(&mut self, digest: VersionDigest, now: Instant) -> Lookup {
        let overloaded = EngineError::Overloaded {
            waiting: self.loading,
            limit: self.max_loads,
            retry_after: RETRY_AFTER,
        };
        if self.loading >= self.max_loads {
            return Lookup::Failed(overloaded);
        }
        match self.loader.try_send(LoadJob { digest }) {
            Ok(()) => {
                self.loading += 1;
                self.slots.insert(digest, Slot::Loading { since: now });
                Lookup::Wait
            }
            Err(TrySendError::Full(_)) => Lookup::Failed(overloaded),
            Err(TrySendError::Disconnected(_)) => Lookup::Failed(EngineError::Stopped),
        }
    }

    /// Books the end of a load.
    pub(crate) fn loaded(
        &mut self,
        digest: VersionDigest,
        result: Result<ResidentVersion, EngineError>,
        now: Instant,
    ) {
        let since = match self.slots.remove(&digest) {
            Some(Slot::Loading { since }) => since,
            _ => now,
        };
        self.loading = self.loading.saturating_sub(1);
        metrics::adapter_load(&result, now - since);
        let slot = match result {
            Ok(version) => Slot::Resident {
                version: Arc::new(version),
                last_used: now,
                load_duration: now - since,
                closing: false,
            },
            Err(error) => Slot::Failed { error, at: now },
        };
        self.slots.insert(digest, slot);
        self.forget_old_failures();
    }

    fn forget_old_failures(&mut self) {
        let failed = |(digest, slot): (&VersionDigest, &Slot)| match slot {
            Slot::Failed { at, .. } => Some((*at, *digest)),
            _ => None,
        };
        if self.slots.iter().filter_map(failed).count() > MAX_FAILURES
            && let Some((_, digest)) = self.slots.iter().filter_map(failed).min()
        {
            self.slots.remove(&digest);
        }
    }

    /// Takes the loader's question.
    pub(crate) fn ask_room(&mut self, request: RoomRequest) {
        self.room.push_back(request);
    }

    pub(crate) fn waits_for_room(&self) -> bool {
        !self.room.is_empty()
    }

    /// Answers the loader's questions in order, as far as there is room or room can be made.
    pub(crate) fn make_room(&mut self, now: Instant) {
        while let Some(request) = self.room.front() {
            let (digest, bytes, asked) = (request.digest, request.bytes, request.asked);
            let answer = if bytes > self.budget.limit {
                Err(EngineError::AdapterCapacity {
                    digest,
                    requested: bytes,
                    in_use: 0,
                    budget: self.budget.limit,
                })
            } else {
                match self.reserve_evicting(bytes) {
                    Some(reservation) => Ok(reservation),
                    None => {
                        if now - asked > ROOM_PATIENCE {
                            self.close_for(bytes);
                        }
                        return;
                    }
                }
            };
            if let Some(request) = self.room.pop_front() {
                // A loader that is gone drops its reservation at once.
                let _ = request.reply.send(answer);
            }
        }
    }

    fn reserve_evicting(&mut self, bytes: usize) -> Option<Reservation> {
        loop {
            if let Some(reservation) = self.budget.reserve(bytes) {
                return Some(reservation);
            }
            let idle = |(digest, slot): (&VersionDigest, &Slot)| match slot {
                Slot::Resident {
                    version, last_used, ..
                } if leases(version) == 0 => Some((*last_used, *digest)),
                _ => None,
            };
            let (_, digest) = self.slots.iter().filter_map(idle).min()?;
            self.slots.remove(&digest);
            metrics::adapter_evicted();
        }
    }

    /// Least recently used first, until their bytes would do.
    fn close_for(&mut self, bytes: usize) {
        let free = self.budget.limit.saturating_sub(self.budget.used());
        let mut missing = bytes.saturating_sub(free);
        let mut residents: Vec<_> = self
            .slots
            .values_mut()
            .filter_map(|slot| match slot {
                Slot::Resident {
                    version,
                    last_used,
                    closing,
                    ..
                } => Some((*last_used, version.reservation.bytes(), closing)),
                _ => None,
            })
            .collect();
        residents.sort_by_key(|(last_used, ..)| *last_used);
        // Those that close already count, so that waiting longer closes no more than needed.
        for (_, held, closing) in residents {
            if missing == 0 {
                return;
            }
            *closing = true;
            missing = missing.saturating_sub(held);
        }
    }

    /// Evicts a version that nobody holds.
    pub(crate) fn evict(&mut self, digest: VersionDigest) -> Result<(), EngineError> {
        match self.slots.get(&digest) {
            Some(Slot::Resident { version, .. }) => {
                let leases = leases(version);
                if leases > 0 {
                    return Err(EngineError::AdapterInUse { digest, leases });
                }
                self.slots.remove(&digest);
                metrics::adapter_evicted();
                Ok(())
            }
            _ => Err(EngineError::AdapterNotResident { digest }),
        }
    }

    pub(crate) fn residency(&self, now: Instant) -> Vec<AdapterResidency> {
        let mut list: Vec<_> = self
            .slots
            .keys()
            .filter_map(|digest| self.residency_of(digest, now))
            .collect();
        list.sort_by_key(|residency| residency.digest);
        list
    }

    pub(crate) fn residency_of(
        &self,
        digest: &VersionDigest,
        now: Instant,
    ) -> Option<AdapterResidency> {
        let digest = *digest;
        Some(match self.slots.get(&digest)? {
            Slot::Loading { since } => AdapterResidency {
                digest,
                state: ResidencyState::Loading,
                bytes: 0,
                leases: 0,
                idle: Duration::ZERO,
                load_duration: now - *since,
            },
            Slot::Resident {
                version,
                last_used,
                load_duration,
                ..
            } => AdapterResidency {
                digest,
                state: ResidencyState::Resident,
                bytes: version.reservation.bytes(),
                leases: leases(version),
                idle: now - *last_used,
                load_duration: *load_duration,
            },
            Slot::Failed { error, at } => AdapterResidency {
                digest,
                state: ResidencyState::Failed(error.clone()),
                bytes: 0,
                leases: 0,
                idle: now - *at,
                load_duration: Duration::ZERO,
            },
        })
    }

    pub(crate) fn bytes_used(&self) -> usize {
        self.budget.used()
    }

    pub(crate) fn resident(&self) -> usize {
        self.slots
            .values()
            .filter(|slot| matches!(slot, Slot::Resident { .. }))
            .count()
    }

    pub(crate) fn leases(&self) -> usize {
        let of = |slot: &Slot| match slot {
            Slot::Resident { version, .. } => leases(version),
            _ => 0,
        };
        self.slots.values().map(of).sum()
    }
}

/// The pool itself holds one.
fn leases(version: &Arc<ResidentVersion>) -> usize {
    Arc::strong_count(version) - 1
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use std::sync::mpsc::{Receiver, sync_channel};

    use super::*;

    fn digest(n: u8) -> VersionDigest {
        VersionDigest::from_bytes([n; 32])
    }

    struct Fixture {
        pool: AdapterPool,
        jobs: Receiver<LoadJob>,
        start: Instant,
    }

    fn fixture(limit: usize) -> Fixture {
        let (sender, jobs) = sync_channel(8);
        Fixture {
            pool: AdapterPool::new(limit, 8, sender),
            jobs,
            start: Instant::now(),
        }
    }

    impl Fixture {
        fn at(&self, ms: u64) -> Instant {
            self.start + Duration::from_millis(ms)
        }

        fn lease(&mut self, n: u8, ms: u64) -> Lookup {
            self.pool.lease(digest(n), self.at(ms), self.at(ms))
        }

        /// Plays the loader up to its question.
        fn ask(
            &mut self,
            bytes: usize,
            ms: u64,
        ) -> oneshot::Receiver<Result<Reservation, EngineError>> {
            let job = self.jobs.try_recv().unwrap();
            let (reply, answer) = oneshot::channel();
            let asked = self.at(ms);
            self.pool.ask_room(RoomRequest {
                digest: job.digest,
                bytes,
                asked,
                reply,
            });
            self.pool.make_room(asked);
            answer
        }

        fn finish(
            &mut self,
            n: u8,
            mut answer: oneshot::Receiver<Result<Reservation, EngineError>>,
            ms: u64,
        ) {
            let reservation = answer.try_recv().unwrap();
            let result = reservation.map(|reservation| ResidentVersion {
                adapter: Arc::new(ResidentAdapter::empty(1)),
                labels: Arc::from([]),
                reservation,
            });
            let now = self.at(ms);
            self.pool.loaded(digest(n), result, now);
        }

        fn load(&mut self, n: u8, bytes: usize, ms: u64) -> AdapterLease {
            assert!(matches!(self.lease(n, ms), Lookup::Wait));
            let answer = self.ask(bytes, ms);
            self.finish(n, answer, ms);
            match self.lease(n, ms) {
                Lookup::Ready(lease) => lease,
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn the_least_recently_used_goes_and_the_budget_holds() {
        let mut fixture = fixture(100);
        drop(fixture.load(1, 40, 0));
        drop(fixture.load(2, 40, 1));
        assert!(matches!(fixture.lease(1, 2), Lookup::Ready(_)));
        drop(fixture.load(3, 50, 3));
        assert!(!fixture.pool.is_resident(&digest(2)), "1 was used later");
        assert!(fixture.pool.is_resident(&digest(1)));
        assert_eq!(fixture.pool.bytes_used(), 90);
    }

    #[test]
    fn a_lease_holds_and_starved_loads_close_the_door() {
        let mut fixture = fixture(100);
        let held = fixture.load(1, 80, 0);
        assert!(matches!(fixture.lease(2, 1), Lookup::Wait));
        let answer = fixture.ask(50, 1);
        assert!(matches!(fixture.lease(1, 2), Lookup::Ready(_)));
        let later = fixture.at(1000);
        fixture.pool.make_room(later);
        assert!(
            matches!(fixture.lease(1, 1001), Lookup::Wait),
            "closing: no new leases"
        );
        assert_eq!(fixture.pool.bytes_used(), 80);
        drop(held);
        fixture.pool.make_room(later);
        fixture.finish(2, answer, 1002);
        assert!(matches!(fixture.lease(2, 1003), Lookup::Ready(_)));
        assert_eq!(fixture.pool.bytes_used(), 50);
        assert!(
            matches!(fixture.lease(1, 1004), Lookup::Wait),
            "evicted: loads again"
        );
    }

    #[test]
    fn a_failure_answers_who_waited_and_the_next_one_tries_again() {
        let mut fixture = fixture(100);
        assert!(matches!(fixture.lease(1, 0), Lookup::Wait));
        let answer = fixture.ask(101, 0);
        fixture.finish(1, answer, 5);
        let (since, now) = (fixture.at(0), fixture.at(6));
        let failed = fixture.pool.lease(digest(1), since, now);
        assert!(matches!(
            failed,
            Lookup::Failed(EngineError::AdapterCapacity { requested: 101, .. })
        ));
        assert!(
            matches!(fixture.lease(1, 7), Lookup::Wait),
            "a later request has its own attempt"
        );
        assert_eq!(fixture.pool.bytes_used(), 0);
    }

    #[test]
    fn bytes_come_back_with_the_last_holder() {
        let mut fixture = fixture(100);
        let held = fixture.load(1, 60, 0);
        assert!(matches!(
            fixture.pool.evict(digest(1)),
            Err(EngineError::AdapterInUse { leases: 1, .. })
        ));
        drop(held);
        fixture.pool.evict(digest(1)).unwrap();
        assert_eq!(fixture.pool.bytes_used(), 0);
    }
}
