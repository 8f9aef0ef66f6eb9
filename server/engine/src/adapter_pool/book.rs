//! What the pool knows of every version: where it is on its way, who goes when room is needed, what is told to the outside.
//!
//! Plain data under the pool's lock: nothing here waits.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_adapters::profile::MergePolicy;
use espalier_adapters::version::VersionDigest;

use super::{
    AdapterResidency, Budget, FRESH, MAX_FAILURES, MergeView, Merging, ResidencyState,
    ResidentVersion, Room, RoomTicket,
};
use crate::error::EngineError;
use crate::merger::MergedCopy;
use crate::metrics;

/// A version on its way into memory, in it, or failed.
pub(super) enum Slot {
    Loading { since: Instant },
    Resident(Resident),
    Failed { error: EngineError, at: Instant },
}

pub(super) struct Resident {
    pub(super) version: Arc<ResidentVersion>,
    pub(super) last_used: Instant,
    pub(super) load_duration: Duration,
    pub(super) requests: u64,
    pub(super) pinned: bool,
    /// No new leases: it is to make room.
    pub(super) closing: bool,
    pub(super) merge: MergeSlot,
}

pub(super) enum MergeSlot {
    None,
    Underway,
    Done(Arc<MergedCopy>),
}

/// All versions, and who waits for room.
#[derive(Default)]
pub(super) struct Book {
    pub(super) slots: HashMap<VersionDigest, Slot>,
    pub(super) loading: usize,
    /// Loaders that wait for room, in the order in which they asked: a small adapter does not take a large one's room.
    pub(super) line: VecDeque<RoomTicket>,
    pub(super) next_ticket: u64,
    /// What is not AUTO.
    pub(super) policies: HashMap<VersionDigest, MergePolicy>,
    pub(super) stopped: bool,
}

// === impl Resident ===

impl Resident {
    /// Nobody holds it, nobody is about to, and it is not to stay.
    pub(super) fn is_idle(&self, now: Instant) -> bool {
        let awaited = self.requests == 0 && now.saturating_duration_since(self.last_used) < FRESH;
        !self.pinned && !awaited && leases(&self.version) == 0
    }
}

// === impl Book ===

impl Book {
    pub(super) fn policy(&self, digest: &VersionDigest) -> MergePolicy {
        self.policies.get(digest).copied().unwrap_or_default()
    }

    pub(super) fn view(&self, digest: VersionDigest, resident: &Resident) -> MergeView {
        MergeView {
            digest,
            policy: self.policy(&digest),
            adapter: Arc::clone(&resident.version.adapter),
        }
    }

    pub(super) fn residents(&self) -> impl Iterator<Item = (&VersionDigest, &Resident)> {
        self.slots.iter().filter_map(|(digest, slot)| match slot {
            Slot::Resident(resident) => Some((digest, resident)),
            _ => None,
        })
    }

    pub(super) fn residents_mut(&mut self) -> impl Iterator<Item = &mut Resident> {
        self.slots.values_mut().filter_map(|slot| match slot {
            Slot::Resident(resident) => Some(resident),
            _ => None,
        })
    }

    pub(super) fn pinned_bytes(&self) -> usize {
        let pinned = self.residents().filter(|(_, resident)| resident.pinned);
        pinned
            .map(|(_, resident)| resident.version.reservation.bytes())
            .sum()
    }

    pub(super) fn forget_old_failures(&mut self) {
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

    pub(super) fn reserve_evicting(
        &mut self,
        budget: &Budget,
        bytes: usize,
        now: Instant,
    ) -> Option<Room> {
        let mut spare = None;
        loop {
            if let Some(reservation) = budget.reserve(bytes) {
                return Some(Room { reservation, spare });
            }
            let idle = |(digest, resident): (&VersionDigest, &Resident)| {
                resident
                    .is_idle(now)
                    .then_some((resident.last_used, *digest))
            };
            let (_, digest) = self.residents().filter_map(idle).min()?;
            if let Some(Slot::Resident(evicted)) = self.slots.remove(&digest) {
                // Nobody holds an idle version, so this is the last of it.
                let version = Arc::into_inner(evicted.version);
                spare = version.and_then(|version| Arc::into_inner(version.adapter));
            }
            metrics::adapter_evicted();
        }
    }

    /// Least recently used first, until their bytes would do.
    pub(super) fn close_for(&mut self, budget: &Budget, bytes: usize) {
        let free = budget.limit().saturating_sub(budget.used());
        let mut missing = bytes.saturating_sub(free);
        let mut residents: Vec<_> = self.residents_mut().filter(|r| !r.pinned).collect();
        residents.sort_by_key(|resident| resident.last_used);
        // Those that close already count, so that waiting longer closes no more than needed.
        for resident in residents {
            if missing == 0 {
                return;
            }
            resident.closing = true;
            missing = missing.saturating_sub(resident.version.reservation.bytes());
        }
    }

    /// Nobody waits for room: what was to make it may take requests again.
    pub(super) fn reopen(&mut self) {
        self.residents_mut().for_each(|r| r.closing = false);
    }
}

pub(super) fn describe(digest: VersionDigest, slot: &Slot, now: Instant) -> AdapterResidency {
    let nothing = AdapterResidency {
        digest,
        state: ResidencyState::Loading,
        bytes: 0,
        leases: 0,
        requests: 0,
        pinned: false,
        merging: Merging::No,
        idle: Duration::ZERO,
        load_duration: Duration::ZERO,
    };
    match slot {
        Slot::Loading { since } => AdapterResidency {
            load_duration: now - *since,
            ..nothing
        },
        Slot::Resident(resident) => AdapterResidency {
            state: ResidencyState::Resident,
            bytes: resident.version.reservation.bytes(),
            leases: leases(&resident.version),
            requests: resident.requests,
            pinned: resident.pinned,
            merging: match &resident.merge {
                MergeSlot::None => Merging::No,
                MergeSlot::Underway => Merging::Underway,
                MergeSlot::Done(copy) => Merging::Merged {
                    bytes: copy.reservation.bytes(),
                },
            },
            idle: now.saturating_duration_since(resident.last_used),
            load_duration: resident.load_duration,
            ..nothing
        },
        Slot::Failed { error, at } => AdapterResidency {
            state: ResidencyState::Failed(error.clone()),
            idle: now.saturating_duration_since(*at),
            ..nothing
        },
    }
}

/// The pool itself holds one.
pub(super) fn leases(version: &Arc<ResidentVersion>) -> usize {
    Arc::strong_count(version) - 1
}
