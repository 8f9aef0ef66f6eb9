//! The configuration's numbers, handed to each owner in the shape that it asks for. The only place where a setting's name
//! and its use meet; nothing is decided here.

use espalier_adapters::ops::Backend;
use espalier_adapters::train::dataset::DataLimits;
use espalier_engine::EngineHandle;
use espalier_engine::config::{EngineConfig, RequestLimits};
use espalier_engine::constraint::ConstraintLimits;
use espalier_engine::device::block_bytes;
use espalier_engine::model::config::ModelConfig;

use crate::bulk::BulkLimits;
use crate::config::Config;
use crate::datasets::DatasetLimits;
use crate::jobs::JobLimits;
use crate::registry::RegistryLimits;
use crate::services::adapter::artifact_limits;
use crate::tenants::TenantLimits;

/// The engine's numbers out of the configuration; KV blocks are counted from bytes, because operators think in memory. 0 of
/// them, and of a training job's activations, is left to the plan.
pub(super) fn engine_config(config: &Config, ops: &Backend, model: &ModelConfig) -> EngineConfig {
    let (limits, engine, training) = (&config.limits, &config.engine, &config.training);
    let blocks = match engine.kv_cache_bytes.as_usize() {
        0 => 0,
        bytes => (bytes / block_bytes(ops, model).max(1)).max(1),
    };
    EngineConfig {
        max_num_seqs: engine.max_sequences,
        max_num_batched_tokens: engine.max_batched_tokens,
        prefill_max_step_impact: engine.prefill_max_step_impact,
        prefill_chunk_tokens: engine.prefill_chunk_tokens.min(engine.max_batched_tokens),
        kv_blocks: blocks,
        prefix_cache: engine.prefix_cache,
        max_sequence_tokens: model.context_length,
        max_queue: engine.max_queue,
        event_buffer: limits.stream_buffer,
        slow_reader_limit: limits.slow_reader_timeout,
        adapter_bytes: engine.adapter_cache_bytes.as_usize(),
        max_adapter_loads: engine.max_adapter_loads,
        max_pinned_share: engine.max_pinned_share,
        merged_bytes: engine.merged_bytes.as_usize(),
        merge_share: engine.merge_share,
        merge_window: engine.merge_window,
        limits: RequestLimits {
            max_n: limits.max_candidates as usize,
            // A serving profile adds its own to the request's.
            max_stop_strings: 2 * limits.max_stop_strings,
            max_stop_bytes: limits.max_stop_string_bytes,
            max_stop_ids: limits.max_stop_token_ids,
            max_top_logprobs: limits.max_logprobs as usize,
            max_logit_bias: limits.max_logit_bias,
            max_inputs: limits.max_inputs,
            max_continuations: limits.max_labels.max(limits.max_inputs),
            max_sequences: limits.max_inputs * limits.max_labels.max(limits.max_inputs),
            max_id_bytes: limits.max_request_id_bytes.max(128),
        },
        constraints: ConstraintLimits {
            max_bytes: config.constraints.max_constraint_bytes.as_usize(),
            compile_timeout: config.constraints.constraint_compile_timeout,
            max_waiting: config.constraints.max_constraint_queue,
            compile_fuel: config.constraints.constraint_compile_fuel,
            max_grammar_symbols: config.constraints.max_grammar_symbols,
            token_fuel: config.constraints.constraint_token_fuel,
            token_items: config.constraints.constraint_token_items,
            max_lexer_states: config.constraints.max_lexer_states,
            cache_entries: config.constraints.constraint_cache_entries,
            cache_bytes: config.constraints.constraint_cache_bytes.as_usize(),
        },
        adapter_limits: artifact_limits(config),
        training_activation_bytes: training.training_activation_bytes.as_usize(),
        training_job_bytes: training.training_job_bytes.as_usize(),
        training_quantum: training.training_quantum,
        training_max_tpot_impact: training.training_max_tpot_impact,
        max_training_jobs: training.max_active_jobs,
        ..EngineConfig::default()
    }
}

pub(super) fn tenant_limits(config: &Config) -> TenantLimits {
    TenantLimits {
        max_tenants: config.catalog.max_tenants,
        max_keys: config.catalog.max_keys_per_tenant,
        max_display_name_bytes: config.catalog.max_description_bytes,
        max_id_length: config.catalog.max_id_length,
    }
}

pub(super) fn registry_limits(config: &Config) -> RegistryLimits {
    RegistryLimits {
        max_adapters: config.catalog.max_adapters_per_tenant,
        max_versions: config.catalog.max_versions_per_adapter,
        max_aliases: config.catalog.max_aliases_per_adapter,
        max_description_bytes: config.catalog.max_description_bytes,
        max_id_length: config.catalog.max_id_length,
        cache_entries: config.catalog.name_cache_entries,
    }
}

pub(super) fn bulk_limits(config: &Config) -> BulkLimits {
    BulkLimits {
        max_jobs: config.bulk.max_bulk_jobs_per_tenant,
        max_active: config.bulk.max_active_bulk_jobs,
        max_id_length: config.catalog.max_id_length,
        retention: config.bulk.bulk_retention,
    }
}

pub(super) fn dataset_limits(config: &Config) -> DatasetLimits {
    let training = &config.training;
    DatasetLimits {
        max_datasets: config.catalog.max_datasets_per_tenant,
        max_id_length: config.catalog.max_id_length,
        data: DataLimits {
            max_bytes: training.max_dataset_bytes.as_usize(),
            max_line_bytes: training.max_row_bytes.as_usize(),
            max_document_bytes: training.max_document_bytes.as_usize(),
            max_rows: training.max_dataset_rows,
            max_labels: config.adapters.max_head_labels,
            max_label_bytes: config.limits.max_label_bytes,
            max_messages: config.limits.max_messages,
            max_findings: training.max_report_findings,
        },
    }
}

/// A configured 0 tokens of an example stand for what one sequence may hold.
pub(super) fn job_limits(config: &Config, engine: &EngineHandle) -> JobLimits {
    let (training, context) = (&config.training, engine.model().max_sequence_tokens);
    JobLimits {
        max_active: training.max_active_jobs,
        max_per_tenant: training.max_jobs_per_tenant,
        activation_bytes: engine.config().training_activation_bytes,
        checkpoint_steps: training.checkpoint_steps as u64,
        max_example_tokens: match training.max_example_tokens {
            0 => context,
            tokens => tokens.min(context),
        },
        max_inline_rows: training.max_inline_rows,
        max_epochs: training.max_epochs,
        max_steps: training.max_steps,
        max_batch_size: training.max_batch_size,
        max_rank: u32::try_from(config.adapters.max_rank).unwrap_or(u32::MAX),
        max_labels: config.adapters.max_head_labels,
        max_adapter_bytes: config.adapters.max_adapter_bytes.0,
        adapter_cache_bytes: engine.config().adapter_bytes as u64,
        training_job_bytes: engine.config().training_job_bytes as u64,
        max_description_bytes: config.catalog.max_description_bytes,
    }
}
