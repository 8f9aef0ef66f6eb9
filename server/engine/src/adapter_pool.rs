//! Which adapter versions are in memory, who holds them, and which one goes when room is needed.
//!
//! A version in use is leased, and a leased version is never evicted; a pinned one neither. Bytes are reserved before a
//! version is built and come back when the last holder drops it. The book is open to whoever asks for a version (a load
//! begins when its request arrives, not when the engine comes round to it), to the loaders (which make room themselves)
//! and to the engine (which alone gives leases), so it is locked; nothing is done under the lock that takes long. The
//! pool must not know requests, files or tensors' layout.

mod book;
mod budget;
mod residency;
#[cfg(test)]
mod tests;

use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use espalier_adapters::profile::MergePolicy;
use espalier_adapters::version::VersionDigest;
use tokio::sync::Notify;

use crate::adapter_loader::LoadJob;
use crate::error::EngineError;
use crate::handle::RETRY_AFTER;
use crate::merger::{MergedCopy, MergedWeights};
use crate::metrics;
use crate::model::ResidentAdapter;

use book::{Book, MergeSlot, Resident, Slot, describe, leases};
pub(crate) use budget::{Budget, Reservation};
pub(crate) use residency::PoolCounts;
pub use residency::{AdapterMemory, AdapterResidency, Merging, ResidencyState};

/// After so long without room the least recently used versions take no new requests, so that they end and make room:
/// steady traffic on the resident ones cannot keep the others out for ever.
const ROOM_PATIENCE: Duration = Duration::from_millis(500);

/// So long a version that nobody has used yet waits for the request that asked for it; then it goes like any other.
const FRESH: Duration = ROOM_PATIENCE;

/// How often a loader without room looks again: leases end without telling anybody.
const ROOM_LOOK: Duration = Duration::from_millis(2);

/// Policies other than AUTO that are remembered; beyond that they are told again by the next request.
const MAX_POLICIES: usize = 1 << 16;

/// Failures that residency lists; the oldest is forgotten first.
const MAX_FAILURES: usize = 256;

/// A version in memory.
#[derive(Debug)]
pub(crate) struct ResidentVersion {
    pub(crate) adapter: Arc<ResidentAdapter>,
    pub(crate) labels: Arc<[String]>,
    pub(crate) reservation: Reservation,
}

/// Bytes that a load may fill, and the last adapter that had to go for them: its memory is as good as new.
pub(crate) struct Room {
    pub(crate) reservation: Reservation,
    pub(crate) spare: Option<ResidentAdapter>,
}

/// A version that cannot be evicted while this lives, and the weights that answer: decided once, when it is given.
#[derive(Clone, Debug)]
pub(crate) struct AdapterLease {
    version: Arc<ResidentVersion>,
    merged: Option<Arc<MergedCopy>>,
}

/// A version in memory as whoever judges merging sees it.
pub(crate) struct MergeView {
    pub(crate) digest: VersionDigest,
    pub(crate) policy: MergePolicy,
    pub(crate) adapter: Arc<ResidentAdapter>,
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

/// Which place in the line for room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RoomTicket(u64);

/// The book of adapter versions as the loaders see it.
pub(crate) struct Shelf {
    budget: Budget,
    pinned_limit: usize,
    /// Of merged copies, beside `budget`.
    merged_budget: Budget,
    book: Mutex<Book>,
    room: Condvar,
    changed: Notify,
}

/// The book with the way to the loaders: for whoever may ask for a version. Cheap to clone.
#[derive(Clone)]
pub(crate) struct AdapterPool {
    shelf: Arc<Shelf>,
    jobs: SyncSender<LoadJob>,
    max_loads: usize,
}

// === impl AdapterLease ===

impl std::ops::Deref for AdapterLease {
    type Target = ResidentVersion;

    fn deref(&self) -> &ResidentVersion {
        &self.version
    }
}

impl AdapterLease {
    /// The weights that take the base's place, with the update in them.
    pub(crate) fn merged(&self) -> Option<&Arc<MergedWeights>> {
        self.merged.as_ref().map(|copy| &copy.weights)
    }
}

// === impl AdapterPool ===

impl AdapterPool {
    /// `jobs` must hold `max_loads` of them.
    pub(crate) fn new(shelf: Arc<Shelf>, max_loads: usize, jobs: SyncSender<LoadJob>) -> Self {
        AdapterPool {
            shelf,
            jobs,
            max_loads,
        }
    }

    /// The version, for a request that has waited since `since`; starts its load when it is not there. A failure from
    /// before `since` is not the request's: it gets an attempt of its own.
    pub(crate) fn lease(&self, digest: VersionDigest, since: Instant, now: Instant) -> Lookup {
        let mut book = self.shelf.book();
        let unmerged = book.policy(&digest) == MergePolicy::Unmerged;
        match book.slots.get_mut(&digest) {
            Some(Slot::Resident(resident)) if !resident.closing => {
                resident.last_used = now;
                resident.requests += 1;
                let merged = match &resident.merge {
                    MergeSlot::Done(copy) if !unmerged => Some(Arc::clone(copy)),
                    _ => None,
                };
                let version = Arc::clone(&resident.version);
                Lookup::Ready(AdapterLease { version, merged })
            }
            Some(Slot::Resident(_) | Slot::Loading { .. }) => Lookup::Wait,
            Some(Slot::Failed { error, at }) if *at >= since => Lookup::Failed(error.clone()),
            Some(Slot::Failed { .. }) | None => self.start_load(&mut book, digest, now),
        }
    }

    /// Starts the load of a version that is not there, so that it comes while its request still waits for the engine.
    /// Says whether it was missing. What goes wrong is told to the request by [`AdapterPool::lease`].
    pub(crate) fn prefetch(&self, digest: VersionDigest, now: Instant) -> bool {
        let mut book = self.shelf.book();
        match book.slots.get(&digest) {
            Some(Slot::Resident(_)) => false,
            Some(Slot::Loading { .. }) => true,
            Some(Slot::Failed { .. }) | None => {
                let _ = self.start_load(&mut book, digest, now);
                true
            }
        }
    }

    fn start_load(&self, book: &mut Book, digest: VersionDigest, now: Instant) -> Lookup {
        let overloaded = EngineError::Overloaded {
            waiting: book.loading,
            limit: self.max_loads,
            retry_after: RETRY_AFTER,
        };
        if book.loading >= self.max_loads {
            return Lookup::Failed(overloaded);
        }
        match self.jobs.try_send(LoadJob { digest }) {
            Ok(()) => {
                book.loading += 1;
                book.slots.insert(digest, Slot::Loading { since: now });
                Lookup::Wait
            }
            Err(TrySendError::Full(_)) => Lookup::Failed(overloaded),
            Err(TrySendError::Disconnected(_)) => Lookup::Failed(EngineError::Stopped),
        }
    }

    /// Loads a version and waits until it is there; it is then as any other, and may be evicted.
    ///
    /// # Errors
    /// What a request for it would get.
    pub(crate) async fn activate(
        &self,
        digest: VersionDigest,
    ) -> Result<AdapterResidency, EngineError> {
        let since = Instant::now();
        loop {
            let changed = self.shelf.changed.notified();
            tokio::pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            match self.lease(digest, since, Instant::now()) {
                Lookup::Ready(lease) => {
                    // The asker holds nothing: the list must not count this look as a holder.
                    drop(lease);
                    if let Some(found) = self.residency_of(&digest, Instant::now()) {
                        return Ok(found);
                    }
                }
                Lookup::Wait => changed.await,
                Lookup::Failed(error) => return Err(error),
            }
        }
    }

    /// Loads a version and keeps it in memory until [`AdapterPool::unpin`].
    ///
    /// # Errors
    /// What a request for it would get, or [`EngineError::PinnedCapacity`].
    pub(crate) async fn pin(&self, digest: VersionDigest) -> Result<AdapterResidency, EngineError> {
        loop {
            self.activate(digest).await?;
            // It may have left again in between, but not for ever: each look makes it the last to go.
            if let Some(found) = self.shelf.pin(digest, Instant::now())? {
                return Ok(found);
            }
        }
    }

    /// Lets a version be evicted again; says whether it was pinned.
    pub(crate) fn unpin(&self, digest: &VersionDigest) -> bool {
        match self.shelf.book().slots.get_mut(digest) {
            Some(Slot::Resident(resident)) => std::mem::take(&mut resident.pinned),
            _ => false,
        }
    }

    pub(crate) fn is_resident(&self, digest: &VersionDigest) -> bool {
        matches!(self.shelf.book().slots.get(digest), Some(Slot::Resident(_)))
    }

    /// Evicts a version that nobody holds.
    pub(crate) fn evict(&self, digest: VersionDigest) -> Result<(), EngineError> {
        let mut book = self.shelf.book();
        match book.slots.get(&digest) {
            Some(Slot::Resident(resident)) => {
                let leases = leases(&resident.version);
                if resident.pinned {
                    return Err(EngineError::AdapterPinned { digest });
                }
                if leases > 0 {
                    return Err(EngineError::AdapterInUse { digest, leases });
                }
                book.slots.remove(&digest);
                drop(book);
                metrics::adapter_evicted();
                self.shelf.changed.notify_waiters();
                Ok(())
            }
            _ => Err(EngineError::AdapterNotResident { digest }),
        }
    }

    pub(crate) fn residency(&self, now: Instant) -> Vec<AdapterResidency> {
        let book = self.shelf.book();
        let mut list: Vec<_> = book
            .slots
            .iter()
            .map(|(digest, slot)| describe(*digest, slot, now))
            .collect();
        drop(book);
        list.sort_by_key(|residency| residency.digest);
        list
    }

    pub(crate) fn residency_of(
        &self,
        digest: &VersionDigest,
        now: Instant,
    ) -> Option<AdapterResidency> {
        let book = self.shelf.book();
        let slot = book.slots.get(digest)?;
        Some(describe(*digest, slot, now))
    }

    pub(crate) fn counts(&self) -> PoolCounts {
        let mut counts = PoolCounts {
            bytes: self.shelf.budget.used(),
            merged_bytes: self.shelf.merged_budget.used(),
            ..PoolCounts::default()
        };
        for slot in self.shelf.book().slots.values() {
            let Slot::Resident(resident) = slot else {
                continue;
            };
            counts.resident += 1;
            counts.leases += leases(&resident.version);
            counts.merged += usize::from(matches!(resident.merge, MergeSlot::Done(_)));
            if resident.pinned {
                counts.pinned += 1;
                counts.pinned_bytes += resident.version.reservation.bytes();
            }
        }
        counts
    }

    /// Remembers what a version's owner wants; the next judgement goes by it.
    pub(crate) fn set_policy(&self, digest: VersionDigest, policy: MergePolicy) {
        let mut book = self.shelf.book();
        if policy == MergePolicy::Auto {
            book.policies.remove(&digest);
            return;
        }
        if book.policies.len() >= MAX_POLICIES {
            book.policies.clear();
        }
        book.policies.insert(digest, policy);
    }

    /// Versions with a merged copy.
    pub(crate) fn merged(&self) -> Vec<MergeView> {
        let book = self.shelf.book();
        let merged = book
            .residents()
            .filter(|(_, resident)| matches!(resident.merge, MergeSlot::Done(_)));
        merged
            .map(|(digest, resident)| book.view(*digest, resident))
            .collect()
    }

    /// A version in memory that has no merged copy and none underway.
    pub(crate) fn unmerged(&self, digest: &VersionDigest) -> Option<MergeView> {
        let book = self.shelf.book();
        match book.slots.get(digest)? {
            Slot::Resident(resident) if matches!(resident.merge, MergeSlot::None) => {
                Some(book.view(*digest, resident))
            }
            _ => None,
        }
    }

    pub(crate) fn reserve_merged(&self, bytes: usize) -> Option<Reservation> {
        self.shelf.merged_budget.reserve(bytes)
    }

    /// Marks a copy as underway. The lease keeps the version until it is made.
    pub(crate) fn begin_merge(&self, digest: &VersionDigest) -> Option<AdapterLease> {
        match self.shelf.book().slots.get_mut(digest)? {
            Slot::Resident(resident) => {
                resident.merge = MergeSlot::Underway;
                let version = Arc::clone(&resident.version);
                Some(AdapterLease {
                    version,
                    merged: None,
                })
            }
            _ => None,
        }
    }

    /// New requests are served unmerged; says whether there was a copy. Its bytes come back with the last request on it.
    pub(crate) fn demote(&self, digest: &VersionDigest) -> bool {
        match self.shelf.book().slots.get_mut(digest) {
            Some(Slot::Resident(resident)) => {
                let before = std::mem::replace(&mut resident.merge, MergeSlot::None);
                matches!(before, MergeSlot::Done(_))
            }
            _ => false,
        }
    }

    /// The engine is gone: nobody waits any more.
    pub(crate) fn stop(&self) {
        self.shelf.book().stopped = true;
        self.shelf.room.notify_all();
        self.shelf.changed.notify_waiters();
    }
}

// === impl Shelf ===

impl Shelf {
    /// Room for `limit` bytes, of which pinned versions take at most `pinned_limit`, and beside it for merged copies.
    pub(crate) fn new(limit: usize, pinned_limit: usize, merged_limit: usize) -> Self {
        Shelf {
            budget: Budget::new(limit),
            pinned_limit,
            merged_budget: Budget::new(merged_limit),
            book: Mutex::default(),
            room: Condvar::new(),
            changed: Notify::new(),
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Books the end of a load.
    pub(crate) fn loaded(
        &self,
        digest: VersionDigest,
        result: Result<ResidentVersion, EngineError>,
        now: Instant,
    ) {
        let mut book = self.book();
        let since = match book.slots.remove(&digest) {
            Some(Slot::Loading { since }) => since,
            _ => now,
        };
        book.loading = book.loading.saturating_sub(1);
        metrics::adapter_load(&result, now - since);
        let slot = match result {
            Ok(version) => Slot::Resident(Resident {
                version: Arc::new(version),
                last_used: now,
                load_duration: now - since,
                requests: 0,
                pinned: false,
                closing: false,
                merge: MergeSlot::None,
            }),
            Err(error) => Slot::Failed { error, at: now },
        };
        book.slots.insert(digest, slot);
        book.forget_old_failures();
        drop(book);
        self.changed.notify_waiters();
    }

    /// Books the end of a merge. A version that was evicted meanwhile, or whose copy is not wanted any more, gets none.
    pub(crate) fn merged(&self, digest: VersionDigest, copy: Option<MergedCopy>) {
        let mut book = self.book();
        if let Some(Slot::Resident(resident)) = book.slots.get_mut(&digest)
            && matches!(resident.merge, MergeSlot::Underway)
        {
            resident.merge = match copy {
                Some(copy) => MergeSlot::Done(Arc::new(copy)),
                None => MergeSlot::None,
            };
        }
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.book().stopped
    }

    /// Waits until `bytes` are free, evicting what nobody holds. For loader threads.
    ///
    /// # Errors
    /// [`EngineError::AdapterCapacity`] when they never can be, [`EngineError::Stopped`].
    pub(crate) fn reserve(&self, digest: VersionDigest, bytes: usize) -> Result<Room, EngineError> {
        let ticket = self.ask_room();
        let asked = Instant::now();
        loop {
            if let Some(answer) = self.look_for_room(ticket, (digest, bytes), asked, Instant::now())
            {
                return answer;
            }
            let book = self.book();
            let waited = self.room.wait_timeout(book, ROOM_LOOK);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Takes a place in the line.
    fn ask_room(&self) -> RoomTicket {
        let mut book = self.book();
        let ticket = RoomTicket(book.next_ticket);
        book.next_ticket += 1;
        book.line.push_back(ticket);
        ticket
    }

    /// One look for room: an answer leaves the line, `None` stays in it.
    fn look_for_room(
        &self,
        ticket: RoomTicket,
        (digest, bytes): (VersionDigest, usize),
        asked: Instant,
        now: Instant,
    ) -> Option<Result<Room, EngineError>> {
        let mut book = self.book();
        let pinned = book.pinned_bytes();
        let answer = if book.stopped {
            Err(EngineError::Stopped)
        } else if bytes > self.budget.limit().saturating_sub(pinned) {
            Err(EngineError::AdapterCapacity {
                digest,
                requested: bytes,
                in_use: pinned,
                budget: self.budget.limit(),
            })
        } else if book.line.front() != Some(&ticket) {
            return None;
        } else {
            match book.reserve_evicting(&self.budget, bytes, now) {
                Some(room) => Ok(room),
                None => {
                    if now.saturating_duration_since(asked) > ROOM_PATIENCE {
                        book.close_for(&self.budget, bytes);
                    }
                    return None;
                }
            }
        };
        book.line.retain(|waiting| *waiting != ticket);
        if book.line.is_empty() {
            book.reopen();
        }
        drop(book);
        self.room.notify_all();
        self.changed.notify_waiters();
        Some(answer)
    }

    fn pin(
        &self,
        digest: VersionDigest,
        now: Instant,
    ) -> Result<Option<AdapterResidency>, EngineError> {
        let mut book = self.book();
        let pinned = book.pinned_bytes();
        let Some(Slot::Resident(resident)) = book.slots.get_mut(&digest) else {
            return Ok(None);
        };
        let bytes = resident.version.reservation.bytes();
        if !resident.pinned && pinned + bytes > self.pinned_limit {
            return Err(EngineError::PinnedCapacity {
                digest,
                requested: bytes,
                pinned,
                limit: self.pinned_limit,
            });
        }
        resident.pinned = true;
        resident.closing = false;
        let slot = book.slots.get(&digest);
        Ok(slot.map(|slot| describe(digest, slot, now)))
    }
}
