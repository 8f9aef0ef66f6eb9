//! The names of what the engine counts, and the snapshot that health checks read. No label holds a tenant, an adapter
//! or text of a prompt: the number of series is fixed.

use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

use crate::config::{BLOCK_SIZE, EngineConfig};
use crate::error::EngineError;
use crate::request::{Timings, Usage};
pub use crate::step_clock::StepTimes;

/// The engine at one moment, refreshed after every step.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct EngineStats {
    /// Sequences that run.
    pub running: usize,
    /// Sequences that wait, and requests that wait for an adapter.
    pub waiting: usize,
    /// Requests that were accepted and have not begun.
    pub queued_requests: usize,
    /// KV blocks in use.
    pub kv_blocks_used: usize,
    /// KV blocks that no request holds, kept for what is in them.
    pub kv_blocks_kept: usize,
    /// KV blocks in all.
    pub kv_blocks: usize,
    /// Resident adapters.
    pub adapters_resident: usize,
    /// Their bytes, reservations of loads in progress included.
    pub adapter_bytes_used: usize,
    /// The budget.
    pub adapter_bytes: usize,
    /// Leases that requests hold.
    pub adapter_leases: usize,
    /// Adapters that are never evicted.
    pub adapters_pinned: usize,
    /// Their bytes.
    pub adapter_bytes_pinned: usize,
    /// Training jobs in the engine.
    pub training_jobs: usize,
    /// Steps since the start.
    pub steps: u64,
    /// Adapters that have a merged copy.
    pub merged: usize,
    /// Bytes of merged copies, those in the making included.
    pub merged_bytes: usize,
    /// Bytes of the distinct adapters of every step, summed over the steps since the start.
    pub adapter_bytes_read: u64,
    /// Tokens generated since the start.
    pub output_tokens: u64,
    /// Prompt tokens computed since the start.
    pub input_tokens: u64,
    /// Prompt tokens found in the prefix cache since the start.
    pub cached_input_tokens: u64,
    /// Kept KV blocks that made room for others since the start.
    pub kv_evictions: u64,
    /// Sequences that lost their blocks and were computed again.
    pub preemptions: u64,
    /// What the engine thread did with its time.
    pub times: StepTimes,
    /// Panics caught in steps.
    pub panics: u64,
    /// Milliseconds since the engine thread last looked at its queue; a large number means that it hangs.
    pub heartbeat_ms: u64,
    /// Time that training took between steps of running requests, as a share of the time that those steps took. 0.25 is
    /// 25 %.
    pub training_impact: f64,
}

const REQUESTS_RUNNING: &str = "espalier_requests_running";
const REQUESTS_WAITING: &str = "espalier_requests_waiting";
const KV_USAGE: &str = "espalier_kv_cache_usage_ratio";
const KV_KEPT: &str = "espalier_kv_cache_kept_ratio";
const KV_EVICTIONS: &str = "espalier_kv_cache_evictions_total";
const CACHE_CONFIG: &str = "espalier_cache_config_info";
const LORA_RESIDENT: &str = "espalier_lora_slots_used";
const LORA_BYTES: &str = "espalier_lora_device_bytes";
const LORA_LEASES: &str = "espalier_lora_leases";
const LORA_PINNED: &str = "espalier_lora_pinned_bytes";
const MERGED_COPIES: &str = "espalier_merged_copies";
const MERGED_BYTES: &str = "espalier_merged_bytes";
const MERGES: &str = "espalier_merges_total";
const MERGE_DURATION: &str = "espalier_merge_duration_seconds";
const DEMOTIONS: &str = "espalier_demotions_total";
const ADAPTER_LOADS: &str = "espalier_adapter_loads_total";
const ADAPTER_EVICTIONS: &str = "espalier_adapter_evictions_total";
const ADAPTER_FAILURES: &str = "espalier_adapter_load_failures_total";
const ADAPTER_LOAD_DURATION: &str = "espalier_adapter_load_duration_seconds";
const ADAPTER_LOAD_STAGE: &str = "espalier_adapter_load_stage_seconds";
const ADAPTER_CACHE: &str = "espalier_adapter_cache_requests_total";
const ADMISSION: &str = "espalier_admission_total";
const QUEUE_DURATION: &str = "espalier_queue_duration_seconds";
const BATCH_SIZE: &str = "espalier_batch_size";
const BATCH_TOKENS: &str = "espalier_batch_tokens";
const BATCH_ADAPTERS: &str = "espalier_batch_distinct_adapters";
const STEP_DURATION: &str = "espalier_step_duration_seconds";
const INTER_TOKEN: &str = "espalier_inter_token_latency_seconds";
const TIME_TO_FIRST: &str = "gen_ai_server_time_to_first_token_seconds";
const TIME_PER_TOKEN: &str = "gen_ai_server_time_per_output_token_seconds";
const TOKENS: &str = "espalier_tokens_total";
const FAIRNESS_GAP: &str = "espalier_fairness_service_gap_tokens";
const PREEMPTIONS: &str = "espalier_preemptions_total";
const PANICS: &str = "espalier_panics_caught_total";
const TRAINING_STEPS: &str = "espalier_training_steps_total";
const TRAINING_TOKENS: &str = "espalier_training_tokens_total";
const TRAINING_QUANTUM: &str = "espalier_training_quantum_duration_seconds";
const TRAINING_IMPACT: &str = "espalier_training_tpot_impact_ratio";

const CONSTRAINT_COMPILE: &str = "espalier_constraint_compile_duration_seconds";
const CONSTRAINT_CACHE: &str = "espalier_constraint_cache_requests_total";
const CONSTRAINT_ENTRIES: &str = "espalier_constraint_cache_entries";
const CONSTRAINT_BYTES: &str = "espalier_constraint_cache_bytes";
const CONSTRAINT_MASK: &str = "espalier_constraint_mask_duration_seconds";
const CONSTRAINT_WAIT: &str = "espalier_constraint_mask_wait_seconds";

/// States units and meanings once, and the numbers that never change.
pub(crate) fn describe(config: &EngineConfig) {
    describe_gauge!(REQUESTS_RUNNING, "sequences in the batch");
    describe_gauge!(
        REQUESTS_WAITING,
        "sequences that wait, and requests that wait for an adapter"
    );
    describe_gauge!(KV_USAGE, "share of the KV blocks in use");
    describe_gauge!(
        KV_KEPT,
        "share of the KV blocks that no request holds and the prefix cache keeps"
    );
    describe_counter!(KV_EVICTIONS, "kept KV blocks that made room for others");
    describe_gauge!(
        CACHE_CONFIG,
        "always 1; the labels say how large the KV cache is"
    );
    describe_gauge!(LORA_RESIDENT, "adapters in memory");
    describe_gauge!(
        LORA_BYTES,
        "bytes of adapters in memory, loads in progress included"
    );
    describe_gauge!(LORA_LEASES, "requests that hold an adapter");
    describe_gauge!(LORA_PINNED, "bytes of adapters that are never evicted");
    describe_gauge!(MERGED_COPIES, "adapters that have a merged copy");
    describe_gauge!(
        MERGED_BYTES,
        "bytes of merged copies, those in the making included"
    );
    describe_counter!(
        MERGES,
        "merged copies made, or given up before they were made"
    );
    describe_histogram!(MERGE_DURATION, "time that making a merged copy took");
    describe_counter!(DEMOTIONS, "merged copies given up");
    describe_counter!(ADAPTER_LOADS, "adapters loaded");
    describe_counter!(ADAPTER_EVICTIONS, "adapters evicted");
    describe_counter!(ADAPTER_FAILURES, "adapter loads that failed, by reason");
    describe_histogram!(
        ADAPTER_LOAD_DURATION,
        "time from the first request to residency"
    );
    describe_histogram!(ADAPTER_LOAD_STAGE, "where a load's time goes");
    describe_counter!(
        ADAPTER_CACHE,
        "requests that found their adapter in memory, or not"
    );
    describe_counter!(ADMISSION, "requests by outcome");
    describe_histogram!(
        QUEUE_DURATION,
        "time in the queue, without loading adapters"
    );
    describe_histogram!(BATCH_SIZE, "sequences of a step");
    describe_histogram!(BATCH_TOKENS, "rows of a step");
    describe_histogram!(BATCH_ADAPTERS, "distinct adapters of a step");
    describe_histogram!(
        STEP_DURATION,
        "time of a step; prefill when any row of it is"
    );
    describe_histogram!(INTER_TOKEN, "time between two outputs of a request");
    describe_histogram!(
        TIME_TO_FIRST,
        "time from arrival to the first token or result"
    );
    describe_histogram!(TIME_PER_TOKEN, "mean time per output token after the first");
    describe_counter!(TOKENS, "tokens by kind");
    describe_gauge!(
        FAIRNESS_GAP,
        "largest minus smallest service of the tenants that wait, in virtual tokens"
    );
    describe_counter!(
        PREEMPTIONS,
        "sequences that lost their blocks and are computed again"
    );
    describe_counter!(PANICS, "panics caught, by site");
    describe_counter!(TRAINING_STEPS, "optimizer steps");
    describe_counter!(TRAINING_TOKENS, "tokens trained");
    describe_histogram!(
        TRAINING_QUANTUM,
        "time that a quantum of training held the machine"
    );
    describe_gauge!(
        TRAINING_IMPACT,
        "time of training between steps of running requests, as a share of theirs"
    );
    describe_histogram!(CONSTRAINT_COMPILE, "time to compile a constraint");
    describe_counter!(
        CONSTRAINT_CACHE,
        "constraints that were found compiled, or not"
    );
    describe_gauge!(CONSTRAINT_ENTRIES, "compiled constraints kept");
    describe_gauge!(CONSTRAINT_BYTES, "their bytes, estimated");
    describe_histogram!(
        CONSTRAINT_MASK,
        "time to work out which tokens may come next"
    );
    describe_histogram!(CONSTRAINT_WAIT, "time that the engine waited for that");
    let labels = [
        ("block_size", BLOCK_SIZE.to_string()),
        ("num_device_blocks", config.kv_blocks.to_string()),
    ];
    gauge!(CACHE_CONFIG, &labels).set(1.0);
}

pub(crate) fn gauges(stats: &EngineStats, service_gap: u64) {
    gauge!(REQUESTS_RUNNING).set(stats.running as f64);
    gauge!(REQUESTS_WAITING).set(stats.waiting as f64);
    gauge!(KV_USAGE).set(stats.kv_blocks_used as f64 / stats.kv_blocks.max(1) as f64);
    gauge!(KV_KEPT).set(stats.kv_blocks_kept as f64 / stats.kv_blocks.max(1) as f64);
    counter!(KV_EVICTIONS).absolute(stats.kv_evictions);
    counter!(TOKENS, "kind" => "input_cached").absolute(stats.cached_input_tokens);
    gauge!(LORA_RESIDENT).set(stats.adapters_resident as f64);
    gauge!(LORA_BYTES).set(stats.adapter_bytes_used as f64);
    gauge!(LORA_LEASES).set(stats.adapter_leases as f64);
    gauge!(MERGED_COPIES).set(stats.merged as f64);
    gauge!(MERGED_BYTES).set(stats.merged_bytes as f64);
    gauge!(LORA_PINNED).set(stats.adapter_bytes_pinned as f64);
    gauge!(FAIRNESS_GAP).set(service_gap as f64);
    gauge!(TRAINING_IMPACT).set(stats.training_impact);
    counter!(PREEMPTIONS).absolute(stats.preemptions);
}

pub(crate) fn step(
    sequences: usize,
    rows: usize,
    decodes: usize,
    adapters: usize,
    duration: Duration,
) {
    let phase = if decodes == rows { "decode" } else { "prefill" };
    histogram!(BATCH_SIZE, "phase" => phase).record(sequences as f64);
    histogram!(BATCH_TOKENS, "phase" => phase).record(rows as f64);
    histogram!(BATCH_ADAPTERS, "phase" => phase).record(adapters as f64);
    histogram!(STEP_DURATION, "phase" => phase).record(duration.as_secs_f64());
    counter!(TOKENS, "kind" => "input").increment((rows - decodes) as u64);
}

pub(crate) fn output_token() {
    counter!(TOKENS, "kind" => "output").increment(1);
}

pub(crate) fn between_tokens(duration: Duration) {
    histogram!(INTER_TOKEN).record(duration.as_secs_f64());
}

pub(crate) fn queued(duration: Duration) {
    histogram!(QUEUE_DURATION).record(duration.as_secs_f64());
}

pub(crate) fn request_done(usage: &Usage, timings: &Timings) {
    histogram!(TIME_TO_FIRST).record(timings.time_to_first_token.as_secs_f64());
    if usage.output_tokens > 1 {
        let after_first = timings.total.saturating_sub(timings.time_to_first_token);
        histogram!(TIME_PER_TOKEN)
            .record(after_first.as_secs_f64() / (usage.output_tokens - 1) as f64);
    }
}

/// `outcome`: admitted, queue_full, expired, cancelled, draining.
pub(crate) fn admission(outcome: &'static str) {
    counter!(ADMISSION, "outcome" => outcome).increment(1);
}

pub(crate) fn request_failed(error: &EngineError) {
    match error {
        EngineError::DeadlineInQueue { .. } | EngineError::DeadlineInDecode { .. } => {
            admission("expired")
        }
        EngineError::Draining => admission("draining"),
        _ => {}
    }
}

pub(crate) fn adapter_load<T>(result: &Result<T, EngineError>, duration: Duration) {
    match result {
        Ok(_) => {
            counter!(ADAPTER_LOADS).increment(1);
            histogram!(ADAPTER_LOAD_DURATION).record(duration.as_secs_f64());
        }
        Err(error) => counter!(ADAPTER_FAILURES, "reason" => load_failure(error)).increment(1),
    }
}

/// `outcome`: made, stopped.
pub(crate) fn merge_ended(made: bool, duration: Duration) {
    let outcome = if made { "made" } else { "stopped" };
    counter!(MERGES, "outcome" => outcome).increment(1);
    if made {
        histogram!(MERGE_DURATION).record(duration.as_secs_f64());
    }
}

pub(crate) fn demoted() {
    counter!(DEMOTIONS).increment(1);
}

/// `stage`: read, parse, room, build, check.
pub(crate) fn adapter_load_stage(stage: &'static str, duration: Duration) {
    histogram!(ADAPTER_LOAD_STAGE, "stage" => stage).record(duration.as_secs_f64());
}

fn load_failure(error: &EngineError) -> &'static str {
    match error {
        EngineError::AdapterNotFound { .. } => "not_found",
        EngineError::ArtifactCorrupt { .. } => "corrupt",
        EngineError::AdapterIncompatible { .. } => "incompatible",
        EngineError::AdapterSource { .. } => "source",
        EngineError::AdapterSelfCheck { .. } => "self_check",
        EngineError::AdapterCapacity { .. } | EngineError::DeviceMemory { .. } => "capacity",
        _ => "internal",
    }
}

pub(crate) fn adapter_evicted() {
    counter!(ADAPTER_EVICTIONS).increment(1);
}

pub(crate) fn adapter_lookup(missed: bool) {
    counter!(ADAPTER_CACHE, "result" => if missed { "miss" } else { "device_hit" }).increment(1);
}

pub(crate) fn constraint_lookup(hit: bool) {
    counter!(CONSTRAINT_CACHE, "result" => if hit { "hit" } else { "miss" }).increment(1);
}

pub(crate) fn constraint_compiled(failed: Option<&EngineError>, duration: Duration) {
    let result = match failed {
        None => "ok",
        Some(EngineError::ConstraintTooComplex { .. }) => "too_complex",
        Some(_) => "invalid",
    };
    histogram!(CONSTRAINT_COMPILE, "result" => result).record(duration.as_secs_f64());
}

pub(crate) fn constraint_cache(entries: usize, bytes: usize) {
    gauge!(CONSTRAINT_ENTRIES).set(entries as f64);
    gauge!(CONSTRAINT_BYTES).set(bytes as f64);
}

pub(crate) fn mask_computed(duration: Duration) {
    histogram!(CONSTRAINT_MASK).record(duration.as_secs_f64());
}

pub(crate) fn mask_waited(duration: Duration) {
    histogram!(CONSTRAINT_WAIT).record(duration.as_secs_f64());
}

pub(crate) fn panic_caught(site: &'static str) {
    counter!(PANICS, "site" => site).increment(1);
}

pub(crate) fn training_quantum(held: Duration) {
    histogram!(TRAINING_QUANTUM).record(held.as_secs_f64());
}

pub(crate) fn training_step(tokens: u64) {
    counter!(TRAINING_STEPS).increment(1);
    counter!(TRAINING_TOKENS).increment(tokens);
    counter!(TOKENS, "kind" => "trained").increment(tokens);
}
