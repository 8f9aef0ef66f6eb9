//! The numbers that bound the engine. Plain data, filled in by the server; the environment is not read here.

use std::time::Duration;

use espalier_adapters::peft::Limits;

use crate::constraint::ConstraintLimits;
use crate::error::EngineError;

/// Events that a request needs room for, whatever it is: see `sequence`.
const LEAST_EVENT_BUFFER: usize = 8;

/// Tokens in one KV block.
pub const BLOCK_SIZE: usize = 16;

/// Limits and policies of one engine.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EngineConfig {
    /// Sequences that run at the same time. A request with n candidates is n sequences.
    pub max_num_seqs: usize,
    /// Rows of one step: decode rows and prefill chunks together.
    pub max_num_batched_tokens: usize,
    /// Rows of prefill in a step that also decodes; bounds what a long prompt adds to the others' time per token.
    pub prefill_chunk_tokens: usize,
    /// What prompts may add to the time of a step that also decodes, as a share of its time without them: 1.25 is 125 %.
    pub prefill_max_step_impact: f64,
    /// KV blocks of 16 tokens in the cache.
    pub kv_blocks: usize,
    /// Keep the blocks of whole prompts and outputs after their requests, for requests of the same tenant and version that
    /// begin with the same tokens. They go when blocks run out.
    pub prefix_cache: bool,
    /// Tokens of one sequence, prompt and output; the model's context length bounds it too.
    pub max_sequence_tokens: usize,
    /// Requests that may wait, those that wait for an adapter included.
    pub max_queue: usize,
    /// Events that one request may have unread before its sequences pause.
    pub event_buffer: usize,
    /// A paused sequence whose reader takes nothing for so long is cut off, so that it cannot hold KV blocks for ever.
    pub slow_reader_limit: Duration,
    /// Bytes of resident adapters.
    pub adapter_bytes: usize,
    /// Share of `adapter_bytes` that pinned adapters may take, 0 to 1: the rest always goes round.
    pub max_pinned_share: f64,
    /// Bytes of merged copies of the base, beside `adapter_bytes`. 0 makes none.
    pub merged_bytes: usize,
    /// Share of all computed rows from which an adapter may be merged; below half of it its copy is given up.
    pub merge_share: f64,
    /// Half-life of the counters that the share is taken from.
    pub merge_window: Duration,
    /// Distinct adapters that may be loading or waiting for the loader.
    pub max_adapter_loads: usize,
    /// Bounds of an adapter's files.
    pub adapter_limits: Limits,
    /// Whether a new adapter whose numbers are large enough to overflow runs a few tokens before it serves.
    pub adapter_self_check: bool,
    /// Limits of one request.
    pub limits: RequestLimits,
    /// Bounds of constrained output.
    pub constraints: ConstraintLimits,
    /// Bytes of saved activations of one training job's micro-batch.
    pub training_activation_bytes: usize,
    /// Bytes that one training job may hold beside the base.
    pub training_job_bytes: usize,
    /// Longest stretch of training between two looks at the serving queue.
    pub training_quantum: Duration,
    /// What training may add to the mean time per output token while requests run: 0.25 is 25 %.
    pub training_max_tpot_impact: f64,
    /// Training jobs that the engine holds at once; they take turns.
    pub max_training_jobs: usize,
}

/// Bounds of what one request may ask for.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RequestLimits {
    /// Candidates of one Generate.
    pub max_n: usize,
    /// Stop strings of one Generate.
    pub max_stop_strings: usize,
    /// Bytes of one stop string.
    pub max_stop_bytes: usize,
    /// Stop token ids of one Generate.
    pub max_stop_ids: usize,
    /// Alternatives listed per token.
    pub max_top_logprobs: usize,
    /// Entries of the logit bias.
    pub max_logit_bias: usize,
    /// Inputs of one Classify or Embed.
    pub max_inputs: usize,
    /// Labels of one label-likelihood Classify, continuations of one Score.
    pub max_continuations: usize,
    /// Sequences of one request: inputs times labels, for instance.
    pub max_sequences: usize,
    /// Bytes of a request id or tenant name.
    pub max_id_bytes: usize,
}

// === impl EngineConfig ===

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            prefill_chunk_tokens: 128,
            prefill_max_step_impact: 1.25,
            kv_blocks: 2048,
            prefix_cache: true,
            max_sequence_tokens: 8192,
            max_queue: 256,
            event_buffer: 64,
            slow_reader_limit: Duration::from_secs(30),
            adapter_bytes: 1 << 30,
            max_pinned_share: 0.5,
            merged_bytes: 0,
            merge_share: 0.5,
            merge_window: Duration::from_secs(30),
            max_adapter_loads: 256,
            adapter_limits: Limits::default(),
            adapter_self_check: true,
            limits: RequestLimits::default(),
            constraints: ConstraintLimits::default(),
            training_activation_bytes: 512 << 20,
            training_job_bytes: 8 << 30,
            training_quantum: Duration::from_millis(10),
            training_max_tpot_impact: 0.25,
            max_training_jobs: 8,
        }
    }
}

impl Default for RequestLimits {
    fn default() -> Self {
        RequestLimits {
            max_n: 16,
            max_stop_strings: 4,
            max_stop_bytes: 256,
            max_stop_ids: 64,
            max_top_logprobs: 20,
            max_logit_bias: 512,
            max_inputs: 32,
            max_continuations: 128,
            max_sequences: 512,
            max_id_bytes: 256,
        }
    }
}

impl EngineConfig {
    /// Checks that the numbers can work together.
    ///
    /// # Errors
    /// [`EngineError::InvalidField`] with the first number that cannot.
    pub fn validate(&self) -> Result<(), EngineError> {
        positive("max_num_seqs", self.max_num_seqs)?;
        positive("prefill_chunk_tokens", self.prefill_chunk_tokens)?;
        positive("kv_blocks", self.kv_blocks)?;
        positive("max_sequence_tokens", self.max_sequence_tokens)?;
        positive("max_queue", self.max_queue)?;
        if self.event_buffer < LEAST_EVENT_BUFFER {
            let reason = format!(
                "{} is below the least, {LEAST_EVENT_BUFFER}",
                self.event_buffer
            );
            return Err(invalid("event_buffer", reason));
        }
        positive("max_adapter_loads", self.max_adapter_loads)?;
        if !(0.0..=1.0).contains(&self.max_pinned_share) {
            let reason = format!("{} is not a share from 0 to 1", self.max_pinned_share);
            return Err(invalid("max_pinned_share", reason));
        }
        positive("max_training_jobs", self.max_training_jobs)?;
        positive("constraints.max_waiting", self.constraints.max_waiting)?;
        if self.max_num_batched_tokens < self.max_num_seqs {
            return Err(invalid(
                "max_num_batched_tokens",
                format!(
                    "{} is below max_num_seqs = {}: a step must hold one row of every running sequence",
                    self.max_num_batched_tokens, self.max_num_seqs
                ),
            ));
        }
        if !(self.merge_share > 0.0 && self.merge_share <= 1.0) {
            let reason = format!("{} is not above 0 and at most 1", self.merge_share);
            return Err(invalid("merge_share", reason));
        }
        if self.merge_window.is_zero() {
            return Err(invalid("merge_window", "must be above zero".to_owned()));
        }
        if self.training_quantum.is_zero() {
            return Err(invalid("training_quantum", "must be above zero".to_owned()));
        }
        if !(self.prefill_max_step_impact.is_finite() && self.prefill_max_step_impact >= 0.0) {
            return Err(invalid(
                "prefill_max_step_impact",
                format!(
                    "{} is not a number from zero up",
                    self.prefill_max_step_impact
                ),
            ));
        }
        if !(self.training_max_tpot_impact.is_finite() && self.training_max_tpot_impact >= 0.0) {
            return Err(invalid(
                "training_max_tpot_impact",
                format!(
                    "{} is not a number from zero up",
                    self.training_max_tpot_impact
                ),
            ));
        }
        Ok(())
    }

    /// Bytes that pinned adapters may take.
    pub(crate) fn pinned_bytes(&self) -> usize {
        (self.adapter_bytes as f64 * self.max_pinned_share) as usize
    }
}

fn positive(field: &'static str, value: usize) -> Result<(), EngineError> {
    if value == 0 {
        return Err(invalid(field, "must be above zero".to_owned()));
    }
    Ok(())
}

fn invalid(field: &'static str, reason: String) -> EngineError {
    EngineError::InvalidField { field, reason }
}
