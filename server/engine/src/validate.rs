//! What the engine refuses before it takes a request: every number and every list has a limit, and an error that names
//! it. Whatever passes here cannot overrun the engine later.

use std::ops::RangeInclusive;

use crate::config::{EngineConfig, RequestLimits};
use crate::error::EngineError;
use crate::handle::ModelInfo;
use crate::request::{
    Generate, MAX_TARGETS, MAX_WEIGHT, Request, RequestKind, SamplingParams, StopConditions,
};

/// A bias beyond this decides alone; more would only overflow.
const MAX_BIAS: f32 = 1000.0;

type Checked = Result<(), EngineError>;

impl Request {
    /// Checks every field against the limits.
    ///
    /// # Errors
    /// [`EngineError::InvalidField`] or [`EngineError::ContextLengthExceeded`] for the first field that is outside.
    pub(crate) fn validate(&self, config: &EngineConfig, model: &ModelInfo) -> Checked {
        let limits = &config.limits;
        at_most("id", self.id.len(), limits.max_id_bytes, "bytes")?;
        at_most("tenant", self.tenant.len(), limits.max_id_bytes, "bytes")?;
        at_most("target", self.target.len(), MAX_TARGETS, "versions")?;
        for (index, target) in self.target.iter().enumerate() {
            within("target.weight", target.weight, -MAX_WEIGHT..=MAX_WEIGHT)?;
            if self.target[..index]
                .iter()
                .any(|t| t.digest == target.digest)
            {
                let reason = format!("{} stands there twice; add its weights", target.digest);
                return invalid("target", reason);
            }
        }
        match &self.kind {
            RequestKind::Generate(generate) => generate.validate(limits, model),
            RequestKind::Classify { inputs } | RequestKind::Embed { inputs, .. } => {
                between("inputs", inputs.len(), 1..=limits.max_inputs)?;
                if matches!(self.kind, RequestKind::Classify { .. }) && self.target.is_empty() {
                    let what = "the base model has no classification head; name labels to score them by likelihood";
                    return Err(EngineError::Unsupported {
                        what: what.to_owned(),
                    });
                }
                inputs
                    .iter()
                    .try_for_each(|input| tokens("inputs", input, 0, model))
            }
            RequestKind::LabelLikelihood {
                prompts,
                labels,
                label_tokens,
            } => {
                between("inputs", prompts.len(), 1..=limits.max_inputs)?;
                between("labels", labels.len(), 1..=limits.max_continuations)?;
                if labels.len() != label_tokens.len() {
                    return invalid(
                        "labels",
                        format!(
                            "{} names for {} lists of tokens",
                            labels.len(),
                            label_tokens.len()
                        ),
                    );
                }
                at_most(
                    "inputs times labels",
                    prompts.len() * labels.len(),
                    limits.max_sequences,
                    "sequences",
                )?;
                let longest = label_tokens.iter().map(Vec::len).max().unwrap_or(0);
                label_tokens
                    .iter()
                    .try_for_each(|label| tokens("labels", label, 0, model))?;
                prompts
                    .iter()
                    .try_for_each(|prompt| tokens("inputs", prompt, longest, model))
            }
            RequestKind::Score {
                prompt,
                continuations,
            } => {
                between(
                    "continuations",
                    continuations.len(),
                    1..=limits.max_continuations,
                )?;
                let longest = continuations.iter().map(Vec::len).max().unwrap_or(0);
                continuations
                    .iter()
                    .try_for_each(|tail| tokens("continuations", tail, 0, model))?;
                tokens("prompt", prompt, longest, model)
            }
        }
    }
}

impl Generate {
    fn validate(&self, limits: &RequestLimits, model: &ModelInfo) -> Checked {
        // Without max_tokens the output may fill the context, but there must be room for one token.
        tokens(
            "prompt",
            &self.prompt,
            self.stop.max_tokens.unwrap_or(1),
            model,
        )?;
        if let Some(top) = self.logprobs {
            at_most("logprobs.top", top, limits.max_top_logprobs, "alternatives")?;
        }
        self.sampling.validate(limits, model)?;
        self.stop.validate(limits, model)
    }
}

impl SamplingParams {
    fn validate(&self, limits: &RequestLimits, model: &ModelInfo) -> Checked {
        within("sampling.temperature", self.temperature, 0.0..=100.0)?;
        within("sampling.top_p", self.top_p, f32::MIN_POSITIVE..=1.0)?;
        within("sampling.min_p", self.min_p, 0.0..=1.0)?;
        within(
            "sampling.repetition_penalty",
            self.repetition_penalty,
            0.01..=100.0,
        )?;
        within(
            "sampling.frequency_penalty",
            self.frequency_penalty,
            -100.0..=100.0,
        )?;
        within(
            "sampling.presence_penalty",
            self.presence_penalty,
            -100.0..=100.0,
        )?;
        between("sampling.n", self.n, 1..=limits.max_n)?;
        at_most(
            "sampling.logit_bias",
            self.logit_bias.len(),
            limits.max_logit_bias,
            "entries",
        )?;
        for (&token, &bias) in &self.logit_bias {
            known("sampling.logit_bias", token, model)?;
            within("sampling.logit_bias", bias, -MAX_BIAS..=MAX_BIAS)?;
        }
        Ok(())
    }
}

impl StopConditions {
    fn validate(&self, limits: &RequestLimits, model: &ModelInfo) -> Checked {
        if self.max_tokens == Some(0) {
            return invalid("stop.max_tokens", "0 is below the least, 1".to_owned());
        }
        let most = self.max_tokens.unwrap_or(model.max_sequence_tokens);
        at_most(
            "stop.min_tokens",
            self.min_tokens,
            most,
            "tokens (max_tokens)",
        )?;
        at_most(
            "stop.stop",
            self.stop.len(),
            limits.max_stop_strings,
            "strings",
        )?;
        for stop in &self.stop {
            between("stop.stop", stop.len(), 1..=limits.max_stop_bytes)?;
        }
        at_most(
            "stop.stop_token_ids",
            self.stop_token_ids.len(),
            limits.max_stop_ids,
            "ids",
        )?;
        self.stop_token_ids
            .iter()
            .try_for_each(|&id| known("stop.stop_token_ids", id, model))
    }
}

fn invalid(field: &'static str, reason: String) -> Checked {
    Err(EngineError::InvalidField { field, reason })
}

fn at_most(field: &'static str, found: usize, limit: usize, unit: &str) -> Checked {
    if found > limit {
        return invalid(
            field,
            format!("{found} is above the limit of {limit} {unit}"),
        );
    }
    Ok(())
}

fn between(field: &'static str, found: usize, range: RangeInclusive<usize>) -> Checked {
    if range.contains(&found) {
        return Ok(());
    }
    invalid(
        field,
        format!("{found} is outside {} to {}", range.start(), range.end()),
    )
}

/// NaN is in no range.
fn within(field: &'static str, found: f32, range: RangeInclusive<f32>) -> Checked {
    if range.contains(&found) {
        return Ok(());
    }
    invalid(
        field,
        format!("{found} is outside {} to {}", range.start(), range.end()),
    )
}

fn known(field: &'static str, token: u32, model: &ModelInfo) -> Checked {
    if (token as usize) < model.config.vocab {
        return Ok(());
    }
    invalid(
        field,
        format!(
            "token id {token} is not below the vocabulary's {}",
            model.config.vocab
        ),
    )
}

/// A list of ids that fits with `more` tokens after it.
fn tokens(field: &'static str, ids: &[u32], more: usize, model: &ModelInfo) -> Checked {
    if ids.is_empty() {
        return invalid(field, "no tokens".to_owned());
    }
    let (given, limit) = (ids.len().saturating_add(more), model.max_sequence_tokens);
    if given > limit {
        let what = "prompt and output of one sequence";
        return Err(EngineError::ContextLengthExceeded { given, limit, what });
    }
    ids.iter().try_for_each(|&id| known(field, id, model))
}
