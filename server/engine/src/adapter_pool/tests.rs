//! The pool alone, with a clock of the test's own: who goes, who waits, and that every byte comes back.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::sync::mpsc::{Receiver, sync_channel};

use espalier_adapters::ops::Backend;

use super::*;

fn digest(n: u8) -> VersionDigest {
    VersionDigest::from_bytes([n; 32])
}

struct Fixture {
    pool: AdapterPool,
    jobs: Receiver<LoadJob>,
    start: Instant,
}

/// A loader that waits for room.
struct Asked {
    digest: VersionDigest,
    ticket: RoomTicket,
    bytes: usize,
    at: Instant,
}

fn fixture(limit: usize) -> Fixture {
    let (sender, jobs) = sync_channel(8);
    let shelf = Arc::new(Shelf::new(limit, limit / 2, 0));
    Fixture {
        pool: AdapterPool::new(shelf, 8, sender),
        jobs,
        start: Instant::now(),
    }
}

impl Fixture {
    fn at(&self, ms: u64) -> Instant {
        self.start + Duration::from_millis(ms)
    }

    fn lease(&self, n: u8, ms: u64) -> Lookup {
        self.pool.lease(digest(n), self.at(ms), self.at(ms))
    }

    fn waits(&self, n: u8, ms: u64) -> bool {
        matches!(self.lease(n, ms), Lookup::Wait)
    }

    /// Plays the loader up to its question.
    fn ask(&self, bytes: usize, ms: u64) -> Asked {
        let LoadJob { digest } = self.jobs.try_recv().unwrap();
        let ticket = self.pool.shelf.ask_room();
        let at = self.at(ms);
        Asked {
            digest,
            ticket,
            bytes,
            at,
        }
    }

    fn look(&self, asked: &Asked, ms: u64) -> Option<Result<Reservation, EngineError>> {
        let what = (asked.digest, asked.bytes);
        self.pool
            .shelf
            .look_for_room(asked.ticket, what, asked.at, self.at(ms))
            .map(|answer| answer.map(|room| room.reservation))
    }

    fn finish(&self, asked: &Asked, ms: u64) {
        let reservation = self.look(asked, ms).unwrap();
        let result = reservation.map(|reservation| ResidentVersion {
            adapter: Arc::new(ResidentAdapter::empty(&Backend::default(), 1)),
            labels: Arc::from([]),
            reservation,
        });
        self.pool.shelf.loaded(asked.digest, result, self.at(ms));
    }

    fn load(&self, n: u8, bytes: usize, ms: u64) -> AdapterLease {
        assert!(self.waits(n, ms));
        self.finish(&self.ask(bytes, ms), ms);
        match self.lease(n, ms) {
            Lookup::Ready(lease) => lease,
            other => panic!("{other:?}"),
        }
    }

    fn used(&self) -> usize {
        self.pool.counts().bytes
    }

    fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(work)
    }
}

#[test]
fn the_least_recently_used_goes_and_the_budget_holds() {
    let fixture = fixture(100);
    drop(fixture.load(1, 40, 0));
    drop(fixture.load(2, 40, 1));
    assert!(matches!(fixture.lease(1, 2), Lookup::Ready(_)));
    drop(fixture.load(3, 50, 3));
    assert!(!fixture.pool.is_resident(&digest(2)), "1 was used later");
    assert!(fixture.pool.is_resident(&digest(1)));
    assert_eq!(fixture.used(), 90);
}

#[test]
fn a_lease_holds_and_starved_loads_close_the_door() {
    let fixture = fixture(100);
    let held = fixture.load(1, 80, 0);
    assert!(fixture.waits(2, 1));
    let asked = fixture.ask(50, 1);
    assert!(fixture.look(&asked, 1).is_none());
    assert!(matches!(fixture.lease(1, 2), Lookup::Ready(_)));
    assert!(fixture.look(&asked, 1000).is_none());
    assert!(fixture.waits(1, 1001), "closing: no new leases");
    assert_eq!(fixture.used(), 80);
    drop(held);
    fixture.finish(&asked, 1002);
    assert!(matches!(fixture.lease(2, 1003), Lookup::Ready(_)));
    assert_eq!(fixture.used(), 50);
    assert!(fixture.waits(1, 1004), "evicted: loads again");
}

#[test]
fn steady_traffic_on_the_residents_cannot_keep_one_out() {
    let fixture = fixture(100);
    // Every 10 ms each resident gets a request of 30 ms, so that one always holds it.
    let mut held = vec![(fixture.load(1, 50, 0), 30), (fixture.load(2, 50, 0), 30)];
    assert!(fixture.waits(3, 1));
    let asked = fixture.ask(50, 1);
    let mut came = None;
    for ms in (2..5_000).step_by(10) {
        held.retain(|(_, end)| *end > ms);
        if fixture.look(&asked, ms).is_some() {
            came = Some(ms);
            break;
        }
        for n in 1..=2 {
            if let Lookup::Ready(lease) = fixture.lease(n, ms) {
                held.push((lease, ms + 30));
            }
        }
    }
    let came = came.unwrap();
    assert!((500..700).contains(&came), "room after {came} ms");
}

#[test]
fn who_asked_for_room_first_gets_it_and_the_door_opens_again() {
    let fixture = fixture(100);
    let held = fixture.load(1, 80, 0);
    assert!(fixture.waits(2, 1) && fixture.waits(3, 1));
    let (large, small) = (fixture.ask(60, 1), fixture.ask(20, 2));
    assert!(fixture.look(&large, 3).is_none());
    assert!(
        fixture.look(&small, 3).is_none(),
        "the small one would fit, but the large one came first"
    );
    assert!(fixture.look(&large, 900).is_none());
    assert!(fixture.waits(1, 901), "closing");
    drop(held);
    fixture.finish(&large, 902);
    fixture.finish(&small, 902);
    assert_eq!(fixture.used(), 80);
    assert!(matches!(fixture.lease(2, 903), Lookup::Ready(_)));
}

#[test]
fn a_closed_version_that_was_not_needed_serves_again() {
    let fixture = fixture(100);
    let (first, second) = (fixture.load(1, 50, 0), fixture.load(2, 50, 1));
    assert!(fixture.waits(3, 2));
    let asked = fixture.ask(40, 2);
    assert!(fixture.look(&asked, 900).is_none());
    assert!(fixture.waits(1, 901), "1 was used least recently: closing");
    drop(second);
    fixture.finish(&asked, 902);
    assert!(!fixture.pool.is_resident(&digest(2)), "2 ended sooner");
    assert!(matches!(fixture.lease(1, 903), Lookup::Ready(_)));
    drop(first);
}

#[test]
fn what_just_came_waits_for_its_request() {
    let fixture = fixture(100);
    fixture.pool.prefetch(digest(1), fixture.at(0));
    fixture.finish(&fixture.ask(80, 0), 1);
    assert!(fixture.waits(2, 2));
    let asked = fixture.ask(50, 2);
    assert!(fixture.look(&asked, 3).is_none(), "1 is still awaited");
    let lease = fixture.lease(1, 4);
    assert!(matches!(lease, Lookup::Ready(_)));
    drop(lease);
    assert!(fixture.look(&asked, 5).is_some(), "1 has been used");
}

#[test]
fn a_failure_answers_who_waited_and_the_next_one_tries_again() {
    let fixture = fixture(100);
    assert!(fixture.waits(1, 0));
    let asked = fixture.ask(101, 0);
    fixture.finish(&asked, 5);
    let (since, now) = (fixture.at(0), fixture.at(6));
    let failed = fixture.pool.lease(digest(1), since, now);
    assert!(matches!(
        failed,
        Lookup::Failed(EngineError::AdapterCapacity { requested: 101, .. })
    ));
    assert!(fixture.waits(1, 7), "a later request has its own attempt");
    assert_eq!(fixture.used(), 0);
}

#[test]
fn bytes_come_back_with_the_last_holder() {
    let fixture = fixture(100);
    let held = fixture.load(1, 60, 0);
    assert!(matches!(
        fixture.pool.evict(digest(1)),
        Err(EngineError::AdapterInUse { leases: 1, .. })
    ));
    drop(held);
    fixture.pool.evict(digest(1)).unwrap();
    assert_eq!(fixture.used(), 0);
}

#[test]
fn pinned_versions_stay_within_their_share() {
    let fixture = fixture(100);
    drop(fixture.load(1, 40, 0));
    drop(fixture.load(2, 40, 1));
    let pinned = fixture.block_on(fixture.pool.pin(digest(1))).unwrap();
    assert!(pinned.pinned && pinned.bytes == 40);
    assert!(matches!(
        fixture.block_on(fixture.pool.pin(digest(2))),
        Err(EngineError::PinnedCapacity {
            requested: 40,
            pinned: 40,
            limit: 50,
            ..
        })
    ));
    assert!(matches!(
        fixture.pool.evict(digest(1)),
        Err(EngineError::AdapterPinned { .. })
    ));
    drop(fixture.load(3, 60, 2_000));
    assert!(fixture.pool.is_resident(&digest(1)), "older, but pinned");
    assert!(!fixture.pool.is_resident(&digest(2)));
    assert!(fixture.waits(4, 2_001));
    fixture.finish(&fixture.ask(61, 2_001), 2_001);
    assert!(matches!(
        fixture
            .pool
            .lease(digest(4), fixture.at(0), fixture.at(2_002)),
        Lookup::Failed(EngineError::AdapterCapacity { in_use: 40, .. })
    ));
    assert!(fixture.pool.unpin(&digest(1)) && !fixture.pool.unpin(&digest(1)));
    drop(fixture.load(5, 90, 2_003));
    assert!(!fixture.pool.is_resident(&digest(1)));
}
