//! Which adapter versions are in memory, who holds them, and which one goes when room is needed.

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
    /// Sequences that hold it now.
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
