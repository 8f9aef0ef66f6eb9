//! The names of what the engine counts, and the snapshot that health checks read. No label holds a tenant, an adapter
//! or text of a prompt.

/// The engine at one moment, refreshed after every step.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct EngineStats {
    /// Sequences that run.
    pub running: usize,
    /// Sequences that wait, those that wait for an adapter included.
    pub waiting: usize,
    /// Requests that were accepted and have not begun.
    pub queued_requests: usize,
    /// KV blocks in use.
    pub kv_blocks_used: usize,
    /// KV blocks in all.
    pub kv_blocks: usize,
    /// Resident adapters.
    pub adapters_resident: usize,
    /// Their bytes, reservations of loads in progress included.
    pub adapter_bytes_used: usize,
    /// The budget.
    pub adapter_bytes: usize,
    /// Leases that sequences hold.
    pub adapter_leases: usize,
    /// Training jobs in the engine.
    pub training_jobs: usize,
    /// Steps since the start.
    pub steps: u64,
    /// Tokens generated since the start.
    pub output_tokens: u64,
    /// Prompt tokens computed since the start.
    pub input_tokens: u64,
    /// Sequences that lost their blocks and were computed again.
    pub preemptions: u64,
    /// Panics caught in steps.
    pub panics: u64,
    /// Milliseconds since the engine thread last looked at its queue; a large number means that it hangs.
    pub heartbeat_ms: u64,
    /// Time that training took between decode steps, as a share of the time that those steps took. 0.25 is 25 %.
    pub training_impact: f64,
}
