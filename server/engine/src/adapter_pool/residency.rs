//! What the pool tells about itself: one version's place in memory, and counts of all. Plain data for lists and metrics.

use std::time::Duration;

use espalier_adapters::version::VersionDigest;

use crate::error::EngineError;

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
    /// Requests that it has served since it was loaded.
    pub requests: u64,
    /// It is never evicted.
    pub pinned: bool,
    /// Whether a merged copy serves it.
    pub merging: Merging,
    /// Time since it was last asked for.
    pub idle: Duration,
    /// How long its load took, from the request that asked for it.
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

/// How far a merged copy has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merging {
    /// None is there or to come.
    No,
    /// It is being made.
    Underway,
    /// New requests are served from it.
    Merged {
        /// Bytes of the copy.
        bytes: usize,
    },
}

/// Bytes of adapters by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AdapterMemory {
    /// What adapters in memory may take.
    pub budget: usize,
    /// What they take, those of loads in progress included.
    pub used: usize,
    /// What pinned ones may take of the budget.
    pub pinned_budget: usize,
    /// What they take.
    pub pinned: usize,
    /// What merged copies may take, beside the budget.
    pub merged_budget: usize,
    /// What they take.
    pub merged: usize,
}

/// The pool in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PoolCounts {
    pub(crate) resident: usize,
    pub(crate) bytes: usize,
    pub(crate) leases: usize,
    pub(crate) pinned: usize,
    pub(crate) pinned_bytes: usize,
    pub(crate) merged: usize,
    /// Those of copies in the making included.
    pub(crate) merged_bytes: usize,
}
