//! What a job would take, and what came of it, for the wire.

use espalier_proto::v1;
use prost_types::Duration;

use crate::jobs::{Choice, Estimate, JobSpec, Measured, Outcome, Validation};

/// A span of time that is finite and not below zero.
fn duration(seconds: f64) -> Duration {
    let seconds = seconds.clamp(0.0, 1e11);
    Duration {
        seconds: seconds as i64,
        nanos: (seconds.fract() * 1e9) as i32,
    }
}

/// An estimate for the wire.
pub(crate) fn estimate(estimate: Estimate) -> v1::TrainingEstimate {
    let footprint = estimate.footprint.unwrap_or_default();
    v1::TrainingEstimate {
        duration: estimate.seconds.map(duration),
        tokens_per_second: estimate.tokens_per_second,
        trained_parameters: footprint.parameters,
        peak_bytes: footprint.bytes,
        queue_position: estimate.queue_position,
        unmeasured: estimate.unmeasured,
    }
}

/// An outcome for the wire.
pub(super) fn outcome(outcome: Outcome) -> v1::TrainingOutcome {
    v1::TrainingOutcome {
        baseline: outcome.baseline.map(|found| measured(found, false)),
        result: outcome.result.map(|found| measured(found, true)),
        kept_step: outcome.kept_step,
        stopped_early: outcome.stopped_early,
        trained_parameters: outcome.trained_parameters,
        size_bytes: outcome.size_bytes,
        peak_bytes: outcome.peak_bytes,
        held: Some(duration(outcome.held_seconds)),
        waited: Some(duration(outcome.waited_seconds)),
        quanta: outcome.quanta,
        longest_quantum: Some(duration(outcome.longest_quantum_seconds)),
        shared_passes: outcome.shared_passes,
        tpot_impact: outcome.tpot_impact,
    }
}

fn measured(found: Measured, best: bool) -> v1::EvaluationReport {
    v1::EvaluationReport {
        step: found.step,
        loss: found.loss,
        accuracy: found.accuracy,
        perplexity: found.perplexity,
        macro_f1: found.macro_f1,
        best,
    }
}

/// A choice for the wire.
pub(super) fn choice(choice: &Choice) -> v1::ChosenValue {
    v1::ChosenValue {
        field: choice.field.clone(),
        value: choice.value.clone(),
        reason: choice.reason.clone(),
    }
}

/// What decided a job's result.
pub(super) fn lineage(spec: &JobSpec) -> v1::TrainingLineage {
    v1::TrainingLineage {
        base_digest: spec.base_digest.clone(),
        data_sha256: spec.data.sha256.clone(),
        validation_sha256: match &spec.validation {
            Validation::Data(source) => source.sha256.clone(),
            Validation::None | Validation::Fraction(_) => String::new(),
        },
        parent_digest: spec.from_digest.clone().unwrap_or_default(),
    }
}
