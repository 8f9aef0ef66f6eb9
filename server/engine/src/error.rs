//! Everything that can go wrong between a submitted request and its answer, as one closed enum.
//!
//! The server turns each variant into one status and one `ErrorInfo` reason; this file must not know about either.
//! Errors are cheap to clone, because one failed adapter load answers every request that waited for it.

use std::sync::Arc;
use std::time::Duration;

use espalier_adapters::report::Report;
use espalier_adapters::version::VersionDigest;

/// Why the engine refused or ended a request.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A field of the request is outside of what the engine accepts (reason `INVALID_FIELD`).
    #[error("{field}: {reason}")]
    InvalidField {
        /// The field as the engine names it, such as `sampling.top_p`.
        field: &'static str,
        /// What was found and what is allowed.
        reason: String,
    },
    /// Prompt and requested output do not fit in the context or in the KV cache (reason `CONTEXT_LENGTH_EXCEEDED`).
    #[error("{given} tokens were asked for, the limit is {limit} ({what})")]
    ContextLengthExceeded {
        /// Tokens that the request needs.
        given: usize,
        /// Tokens that one sequence may have.
        limit: usize,
        /// Which limit that is.
        what: &'static str,
    },
    /// The waiting queue is full (reason `SERVER_OVERLOADED`).
    #[error("the waiting queue is full: {waiting} of {limit} requests wait")]
    Overloaded {
        /// Requests waiting now.
        waiting: usize,
        /// The configured bound.
        limit: usize,
        /// When a new attempt may succeed.
        retry_after: Duration,
    },
    /// The engine no longer accepts work (reason `SERVER_DRAINING`).
    #[error("the engine is draining and accepts no new work")]
    Draining,
    /// The source knows no artifact of this digest (reason `ADAPTER_NOT_FOUND`).
    #[error("no adapter version {digest} is stored")]
    AdapterNotFound {
        /// The version asked for.
        digest: VersionDigest,
    },
    /// The stored bytes do not have the digest that names them (reason `ARTIFACT_CORRUPT`).
    #[error("adapter version {digest} is corrupt: {detail}")]
    ArtifactCorrupt {
        /// The version asked for.
        digest: VersionDigest,
        /// What the check found.
        detail: String,
    },
    /// The artifact cannot be served on this base model (reason `ADAPTER_INCOMPATIBLE`).
    #[error("adapter version {digest} cannot be served on this base model: {report}")]
    AdapterIncompatible {
        /// The version asked for.
        digest: VersionDigest,
        /// Every finding.
        report: Arc<Report>,
    },
    /// The source could not be read just now (reason `SOURCE_UNAVAILABLE`).
    #[error("adapter version {digest} could not be fetched: {detail}")]
    AdapterSource {
        /// The version asked for.
        digest: VersionDigest,
        /// What the source said, without paths.
        detail: String,
    },
    /// The adapter's first forward gave NaN or infinity (reason `NON_FINITE_LOGITS`).
    #[error(
        "adapter version {digest} failed its self-check: the state after {tokens} tokens is not finite"
    )]
    AdapterSelfCheck {
        /// The version asked for.
        digest: VersionDigest,
        /// Tokens of the check.
        tokens: usize,
    },
    /// The adapter does not fit beside those in use (reason `ADAPTER_CAPACITY`).
    #[error(
        "adapter version {digest} needs {requested} bytes; {in_use} of {budget} are in use and cannot be evicted"
    )]
    AdapterCapacity {
        /// The version asked for.
        digest: VersionDigest,
        /// Bytes it needs.
        requested: usize,
        /// Bytes of adapters that are leased.
        in_use: usize,
        /// The configured budget.
        budget: usize,
    },
    /// The budget has room for the adapter, but the device has none (reason `ADAPTER_CAPACITY`).
    #[error(
        "adapter version {digest} needs {requested} bytes of the device's memory; {free} are free: \
         lower adapter_cache_bytes or kv_cache_bytes"
    )]
    DeviceMemory {
        /// The version asked for.
        digest: VersionDigest,
        /// Bytes it needs.
        requested: usize,
        /// Bytes that are free.
        free: usize,
    },
    /// Pinned adapters would take more than their share of the budget (reason `PINNED_CAPACITY`).
    #[error(
        "adapter version {digest} has {requested} bytes; {pinned} are pinned already and at most {limit} may be \
         (max_pinned_share of adapter_cache_bytes): unpin another version or raise one of the two"
    )]
    PinnedCapacity {
        /// The version asked for.
        digest: VersionDigest,
        /// Bytes it has.
        requested: usize,
        /// Bytes of pinned versions.
        pinned: usize,
        /// The bound.
        limit: usize,
    },
    /// A pinned adapter is not evicted (reason `RESOURCE_IN_USE`).
    #[error("adapter version {digest} is pinned; unpin it first")]
    AdapterPinned {
        /// The version asked for.
        digest: VersionDigest,
    },
    /// The request wanted a resident adapter only (reason `ADAPTER_NOT_RESIDENT`).
    #[error("adapter version {digest} is not resident")]
    AdapterNotResident {
        /// The version asked for.
        digest: VersionDigest,
    },
    /// An adapter cannot be unloaded while requests hold it (reason `RESOURCE_IN_USE`).
    #[error("adapter version {digest} is in use by {leases} sequences")]
    AdapterInUse {
        /// The version asked for.
        digest: VersionDigest,
        /// Sequences that hold it.
        leases: usize,
    },
    /// The deadline passed before the first step (reason `DEADLINE_IN_QUEUE`).
    #[error("the deadline passed in the queue after {waited_ms} ms")]
    DeadlineInQueue {
        /// Time in the queue.
        waited_ms: u64,
    },
    /// The deadline passed while the request ran (reason `DEADLINE_IN_DECODE`).
    #[error("the deadline passed after {output_tokens} output tokens")]
    DeadlineInDecode {
        /// Tokens that were generated until then.
        output_tokens: usize,
    },
    /// The work was cancelled by its owner (reason `CANCELLED`).
    #[error("cancelled")]
    Cancelled,
    /// The reader took no event for longer than the limit (reason `SLOW_READER`).
    #[error("the reader took no event for {limit_ms} ms and was cut off")]
    SlowReader {
        /// The configured limit.
        limit_ms: u64,
    },
    /// The model gave NaN or infinity (reason `NON_FINITE_LOGITS`).
    #[error("the logits after {position} tokens are not finite")]
    NonFiniteLogits {
        /// Tokens of the sequence at that point.
        position: usize,
    },
    /// A constraint is malformed, or no text of this model's tokens can satisfy it (reason `CONSTRAINT_INVALID`).
    #[error("{kind}: {reason}")]
    ConstraintInvalid {
        /// `json_schema`, `regex`, `choices` or `grammar`.
        kind: &'static str,
        /// The parser's words.
        reason: String,
    },
    /// A constraint is beyond a limit of size, work or time (reason `CONSTRAINT_TOO_COMPLEX`).
    #[error("{kind}: {reason}")]
    ConstraintTooComplex {
        /// As above; `constraint` once the text is under way.
        kind: &'static str,
        /// What was reached.
        reason: String,
    },
    /// No token of this model continues the text under its constraint (reason `CONSTRAINT_DEAD_END`).
    #[error(
        "constraint: after {output_tokens} output tokens no token of this model continues the text, and it is not complete"
    )]
    ConstraintDeadEnd {
        /// Tokens generated until then.
        output_tokens: usize,
    },
    /// The model or adapter cannot do this (reason `UNSUPPORTED_BY_MODEL`).
    #[error("{what}")]
    Unsupported {
        /// What is missing.
        what: String,
    },
    /// Too many training jobs are in the engine (reason `TRAINING_CAPACITY`).
    #[error("{active} training jobs are in the engine, the limit is {limit}")]
    TrainingCapacity {
        /// Jobs now.
        active: usize,
        /// The configured bound.
        limit: usize,
    },
    /// The trainer refused its plan or checkpoint, or its numbers ran away (reason `TRAINING_FAILED`).
    #[error("training failed: {detail}")]
    TrainingFailed {
        /// The trainer's reason.
        detail: String,
    },
    /// The engine cannot start on this model (no wire reason: the server does not start).
    #[error("the engine cannot start: {detail}")]
    CannotStart {
        /// What the model or the system refused.
        detail: String,
    },
    /// The engine thread is gone (reason `BACKEND_FAILED`).
    #[error("the engine has stopped")]
    Stopped,
    /// An invariant is broken or a panic was caught (reason `INTERNAL`).
    #[error("internal error: {detail}")]
    Internal {
        /// For the log; holds no prompt text.
        detail: String,
    },
}
