//! Fills the gaps of a request with numbers, and checks the rest.
//!
//! Every default is recorded in the job with its reason, so that a job means the same for ever. The numbers come from what adapters of tenant
//! size were found to want (Tinker's learning rate by width, PEFT's and SetFit's practice). This file must not know storage or
//! time.

use espalier_adapters::config::Site;
use espalier_adapters::train::schedule::Decay;
use espalier_engine::model::Family;
use espalier_engine::train::trainer::HyperParameters;
use serde::{Deserialize, Serialize};

use super::JobError;
use super::spec::{HyperRequest, JobLimits, LoraRequest, LoraSpec};

/// Steps below which a run is too short to settle; the default number of epochs grows until it is reached.
const WANTED_STEPS: u64 = 100;
/// The same where a head begins from nothing above LoRA: it has every label to learn.
const WANTED_STEPS_OF_A_HEAD: u64 = 250;
/// Passes of a head that learns alone, and the steps that bound them.
const HEAD_EPOCHS: u64 = 40;
const HEAD_STEPS: u64 = 15_000;
/// Evaluations of a run when the request names no interval.
const EVALUATIONS: u64 = 10;
/// Evaluations without progress after which a run with defaulted epochs ends.
const PATIENCE: u64 = 5;

/// A value that the request left open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// The field of the job's description, `hyper_parameters.epochs` for example.
    pub field: String,
    /// What was chosen.
    pub value: String,
    /// Why.
    pub reason: String,
}

/// The values that a request left open, in the order in which they were chosen.
#[derive(Debug, Default)]
pub(super) struct Choices(pub(super) Vec<Choice>);

impl Choices {
    /// Notes a choice, and gives it back.
    pub(super) fn make<T: std::fmt::Display>(
        &mut self,
        field: &str,
        value: T,
        reason: impl Into<String>,
    ) -> T {
        self.0.push(Choice {
            field: field.to_owned(),
            value: value.to_string(),
            reason: reason.into(),
        });
        value
    }
}

/// What the defaults depend on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Circumstances {
    /// Examples to train on.
    pub examples: usize,
    /// Whether there is something to measure on.
    pub validated: bool,
    /// Whether a head is trained.
    pub classifies: bool,
    /// Width of the base.
    pub hidden: usize,
    /// Layers of the base.
    pub layers: usize,
    /// Family of the base.
    pub family: Family,
}

fn invalid(field: &str, reason: impl Into<String>) -> JobError {
    JobError::InvalidField {
        field: field.to_owned(),
        reason: reason.into(),
    }
}

/// Refuses what is not a number between two bounds; the message names field, value and limits.
fn within(field: &str, value: f64, low: f64, high: f64) -> Result<f64, JobError> {
    if (low..=high).contains(&value) {
        Ok(value)
    } else {
        Err(invalid(
            field,
            format!("{value} is outside {low} to {high}"),
        ))
    }
}

fn positive(field: &str, value: f64, high: f64) -> Result<f64, JobError> {
    if value > 0.0 && value <= high {
        Ok(value)
    } else {
        Err(invalid(
            field,
            format!("{value} must be above 0 and at most {high}"),
        ))
    }
}

/// Peak learning rate of LoRA for a base of this width: 5e-5 * 10 * (2000 / H)^p with p = 0.781 for Llama's kin and 0.0775
/// for Qwen's (Tinker's fit, reported within 0.5 % of the best loss).
pub(super) fn lora_learning_rate(at: &Circumstances) -> (f64, String) {
    let power = match at.family {
        Family::Llama | Family::Mistral => 0.781,
        Family::Qwen2 | Family::Qwen3 => 0.0775,
    };
    let rate = 5e-4 * (2000.0 / at.hidden as f64).powf(power);
    let formula = format!(
        "5e-4 * (2000 / {})^{power} for a base of this width",
        at.hidden
    );
    (rate, formula)
}

/// The same for a run of so many steps: half as much again where they are few.
fn lora_learning_rate_for(at: &Circumstances, steps: u64) -> (f64, String) {
    let (rate, formula) = lora_learning_rate(at);
    if steps < WANTED_STEPS {
        let why = format!("{formula}, half as much again because {steps} steps are few");
        (rate * 1.5, why)
    } else {
        (rate, formula)
    }
}

/// How long a run is: examples of a step, passes, steps.
struct Length {
    batch_size: usize,
    epochs: f64,
    steps: u64,
}

fn length(
    request: &HyperRequest,
    at: &Circumstances,
    head_only: bool,
    limits: &JobLimits,
    choices: &mut Choices,
) -> Result<Length, JobError> {
    let batch_size = match request.batch_size {
        Some(size) => within(
            "hyper_parameters.batch_size",
            f64::from(size),
            1.0,
            f64::from(limits.max_batch_size),
        )? as usize,
        None => default_batch_size(at, head_only, choices),
    };
    let per_epoch = at.examples.div_ceil(batch_size).max(1) as u64;
    let epochs = match request.epochs {
        Some(epochs) => {
            let most = f64::from(limits.max_epochs);
            positive("hyper_parameters.epochs", epochs, most)?
        }
        None => default_epochs((per_epoch, at), head_only, limits, choices),
    };
    let mut steps = ((epochs * per_epoch as f64).ceil() as u64).max(1);
    if let Some(bound) = request.max_steps {
        steps = steps.min(bound.max(1));
    }
    if steps > limits.max_steps {
        // A bound that is itself too high is the field to change, whatever the epochs make.
        let (field, makes) = match request.max_steps {
            Some(_) => ("hyper_parameters.max_steps", "it allows"),
            None => ("hyper_parameters.epochs", "they make"),
        };
        let reason = format!("{makes} {steps} steps, the limit is {}", limits.max_steps);
        return Err(invalid(field, reason));
    }
    Ok(Length {
        batch_size,
        epochs,
        steps,
    })
}

fn default_batch_size(at: &Circumstances, head_only: bool, choices: &mut Choices) -> usize {
    let examples = at.examples;
    let (size, why) = match examples {
        _ if head_only => (
            32,
            "a head on cached states learns from many at once".to_owned(),
        ),
        ..512 => (8, format!("{examples} examples are below 512")),
        _ => (16, format!("{examples} examples; LoRA loses above 32")),
    };
    choices.make("hyper_parameters.batch_size", size, why)
}

fn default_epochs(
    (per_epoch, at): (u64, &Circumstances),
    head_only: bool,
    limits: &JobLimits,
    choices: &mut Choices,
) -> f64 {
    let (epochs, why) = if head_only {
        let epochs = (HEAD_STEPS / per_epoch).clamp(3, HEAD_EPOCHS);
        let why = format!(
            "a step on cached states costs next to nothing: {HEAD_EPOCHS} passes, fewer where they make more than {HEAD_STEPS} steps"
        );
        (epochs, why)
    } else {
        let wanted = if at.classifies {
            WANTED_STEPS_OF_A_HEAD
        } else {
            WANTED_STEPS
        };
        let epochs = wanted.div_ceil(per_epoch).clamp(3, 10);
        let why = format!("3 to 10 passes, as many as make {wanted} steps of {per_epoch} a pass");
        (epochs, why)
    };
    let epochs = epochs.min(u64::from(limits.max_epochs));
    choices.make("hyper_parameters.epochs", epochs, why) as f64
}

/// Fills the gaps of a request's hyperparameters and checks the rest. Returns the trainer's numbers and the epochs.
pub(super) fn hyper_parameters(
    request: &HyperRequest,
    at: &Circumstances,
    head_only: bool,
    limits: &JobLimits,
    choices: &mut Choices,
) -> Result<(HyperParameters, f64), JobError> {
    let length = length(request, at, head_only, limits, choices)?;
    let (learning_rate, head_learning_rate) =
        learning_rates(request, at, head_only, length.steps, choices)?;
    let warmup_steps = warmup_steps(request, length.steps, choices)?;
    let eval_steps = eval_steps(request, at, length.steps, choices);
    let patience = patience(request, at, choices)?;
    let accumulation = request.gradient_accumulation_steps.unwrap_or(1).max(1);
    let checkpoint_steps = request.checkpoint_every_steps.filter(|steps| *steps > 0);
    let optimizer = optimizer(request, head_only, choices)?;
    let hyper = HyperParameters {
        learning_rate: Some(learning_rate),
        head_learning_rate: Some(head_learning_rate),
        lora_plus_ratio: lora_plus_ratio(request, head_only, choices)?,
        decay: match request.decay {
            Some(decay) => decay,
            None => {
                let why = "a rate that falls in a line to zero settles best on small data";
                choices.make("hyper_parameters.schedule", "linear", why);
                Decay::Linear
            }
        },
        warmup_steps: Some(warmup_steps),
        epochs: Some((length.epochs.ceil() as u64).max(1)),
        max_steps: Some(length.steps),
        batch_size: length.batch_size,
        shuffle: request.shuffle.unwrap_or(true),
        eval_steps,
        early_stopping_patience: patience,
        checkpoint_steps: Some(match checkpoint_steps {
            Some(steps) => steps,
            None => {
                let why = "the server's setting";
                choices.make(
                    "hyper_parameters.checkpoint_every_steps",
                    limits.checkpoint_steps,
                    why,
                )
            }
        }),
        activation_bytes: limits.activation_bytes / accumulation as usize,
        ..optimizer
    };
    Ok((hyper, length.epochs))
}

/// Peak rates of the adapter and of a head.
fn learning_rates(
    request: &HyperRequest,
    at: &Circumstances,
    head_only: bool,
    steps: u64,
    choices: &mut Choices,
) -> Result<(f64, f64), JobError> {
    let (field, head_field) = (
        "hyper_parameters.learning_rate",
        "hyper_parameters.head_learning_rate",
    );
    let rate = match request.learning_rate {
        Some(rate) => positive(field, rate, 1.0)?,
        None if head_only => {
            let (rate, why) = match steps {
                ..5_000 => (5e-3, "a head on frozen states"),
                _ => (2e-3, "a head on frozen states, with time to settle"),
            };
            choices.make(field, rate, why)
        }
        None => {
            let (rate, why) = lora_learning_rate_for(at, steps);
            choices.make(field, rate, why)
        }
    };
    let head_rate = match request.head_learning_rate {
        Some(rate) => positive(head_field, rate, 1.0)?,
        None if head_only => choices.make(head_field, rate, "the head is all that is trained"),
        None => {
            let why = "a head learns at the adapter's rate, and at 1e-3 at least";
            choices.make(head_field, rate.max(1e-3), why)
        }
    };
    Ok((rate, head_rate))
}

fn warmup_steps(
    request: &HyperRequest,
    steps: u64,
    choices: &mut Choices,
) -> Result<u64, JobError> {
    let field = "hyper_parameters.warmup_ratio";
    match (request.warmup_steps, request.warmup_ratio) {
        (Some(warmup), None) => Ok(warmup.min(steps)),
        (None, Some(ratio)) => {
            let ratio = within(field, ratio, 0.0, 1.0)?;
            Ok((ratio * steps as f64).round() as u64)
        }
        (Some(_), Some(_)) => Err(invalid(field, "warmup_steps is set too: name one of them")),
        (None, None) => {
            let (field, why) = ("hyper_parameters.warmup_steps", "a twentieth of all steps");
            Ok(choices.make(field, steps.div_ceil(20), why))
        }
    }
}

/// Steps between evaluations; `None` is once an epoch, or never without rows to measure on.
fn eval_steps(
    request: &HyperRequest,
    at: &Circumstances,
    steps: u64,
    choices: &mut Choices,
) -> Option<u64> {
    let every = match request.eval_every_steps {
        _ if !at.validated => None,
        Some(0) => None,
        Some(every) => Some(every),
        None => {
            let every = steps.div_ceil(EVALUATIONS).max(1);
            let why = format!("{EVALUATIONS} evaluations of {steps} steps");
            Some(choices.make("hyper_parameters.eval_every_steps", every, why))
        }
    };
    every.filter(|_| at.validated)
}

fn patience(
    request: &HyperRequest,
    at: &Circumstances,
    choices: &mut Choices,
) -> Result<Option<u64>, JobError> {
    let field = "hyper_parameters.early_stopping_patience";
    match request.early_stopping_patience {
        Some(0) => Ok(None),
        Some(_) if !at.validated => Err(invalid(
            field,
            "there is no validation data to judge by: set validation_data or validation_fraction",
        )),
        Some(patience) => Ok(Some(u64::from(patience))),
        None if at.validated && request.epochs.is_none() => {
            let why = "passes were not named, so the run ends when it no longer gains";
            Ok(Some(choices.make(field, PATIENCE, why)))
        }
        None => {
            let why = if at.validated {
                "the passes were named"
            } else {
                "there is nothing to measure on"
            };
            choices.make(field, 0, why);
            Ok(None)
        }
    }
}

/// AdamW and the bound on gradients.
fn optimizer(
    request: &HyperRequest,
    head_only: bool,
    choices: &mut Choices,
) -> Result<HyperParameters, JobError> {
    const ADAM: &str = "AdamW's usual value";
    let mut number = |name: &str, given: Option<f64>, default: f64, why: &str| {
        let field = format!("hyper_parameters.{name}");
        let value = given.unwrap_or_else(|| choices.make(&field, default, why));
        (field, value)
    };
    let (decay, why) = match head_only {
        true => (0.1, "many passes over few states would be learned by heart"),
        false => (0.0, "an adapter is small beside its base, which holds it"),
    };
    let (decay_field, weight_decay) = number("weight_decay", request.weight_decay, decay, why);
    let (beta1_field, beta1) = number("adam_beta1", request.beta1, 0.9, ADAM);
    let (beta2_field, beta2) = number("adam_beta2", request.beta2, 0.999, ADAM);
    let (epsilon_field, epsilon) = number("adam_epsilon", request.epsilon, 1e-8, ADAM);
    let norm_why = "one bad batch must not undo the others";
    let (norm_field, norm) = number("max_grad_norm", request.max_grad_norm, 1.0, norm_why);
    Ok(HyperParameters {
        weight_decay: within(&decay_field, weight_decay, 0.0, 1.0)?,
        beta1: within(&beta1_field, beta1, 0.0, 0.999_999)?,
        beta2: within(&beta2_field, beta2, 0.0, 0.999_999)?,
        epsilon: positive(&epsilon_field, epsilon, 1.0)?,
        max_grad_norm: match norm {
            0.0 => None,
            norm => Some(positive(&norm_field, norm, 1e9)?),
        },
        ..HyperParameters::default()
    })
}

/// B's learning rate over A's. A head that trains alone has neither.
fn lora_plus_ratio(
    request: &HyperRequest,
    head_only: bool,
    choices: &mut Choices,
) -> Result<f64, JobError> {
    let field = "hyper_parameters.lora_plus_ratio";
    match request.lora_plus_ratio {
        Some(ratio) if head_only && ratio != 1.0 => Err(invalid(
            field,
            format!(
                "{ratio} needs a B to apply to, and head_only trains a head alone: leave it out, or train LoRA too"
            ),
        )),
        Some(ratio) => positive(field, ratio, 1e3),
        None if head_only => Ok(1.0),
        None => Ok(choices.make(field, 1.0, "LoRA+ has to be asked for")),
    }
}

/// Fills the gaps of a request's LoRA shape and checks the rest: rank 16 (8 below 500 examples, 32 above 20,000), alpha 32,
/// all seven modules.
pub(super) fn lora(
    request: &LoraRequest,
    at: &Circumstances,
    limits: &JobLimits,
    choices: &mut Choices,
) -> Result<LoraSpec, JobError> {
    let max_rank = f64::from(limits.max_rank);
    let rank = match request.rank {
        Some(rank) => within("lora.rank", f64::from(rank), 1.0, max_rank)? as u32,
        None => {
            let rank = match at.examples {
                ..500 => 8,
                500..=20_000 => 16,
                _ => 32,
            };
            let why = format!(
                "{} examples: 8 below 500, 32 above 20000, else 16",
                at.examples
            );
            choices.make("lora.rank", rank.min(limits.max_rank), why)
        }
    };
    for (pattern, rank) in &request.rank_pattern {
        within(
            &format!("lora.rank_pattern[{pattern}]"),
            f64::from(*rank),
            1.0,
            max_rank,
        )?;
    }
    for (pattern, alpha) in &request.alpha_pattern {
        positive(&format!("lora.alpha_pattern[{pattern}]"), *alpha, 1e6)?;
    }
    for module in &request.target_modules {
        if Site::from_module(module).is_none() {
            let known: Vec<&str> = Site::ALL.iter().map(|site| site.module()).collect();
            return Err(invalid(
                "lora.target_modules",
                format!("{module:?} is none of {}", known.join(", ")),
            ));
        }
    }
    if let Some(layer) = request.layers.iter().find(|l| **l as usize >= at.layers) {
        return Err(invalid(
            "lora.layers_to_transform",
            format!("layer {layer} does not exist: the base has {}", at.layers),
        ));
    }
    let target_modules = target_modules(request, choices);
    let dropout = match request.dropout {
        Some(dropout) => dropout,
        None => choices.make(
            "lora.dropout",
            0.0,
            "short runs on small data do not need it",
        ),
    };
    if !(0.0..1.0).contains(&dropout) {
        return Err(invalid(
            "lora.dropout",
            format!("{dropout} is outside 0 to below 1"),
        ));
    }
    if request.use_dora == Some(true) && dropout > 0.0 {
        return Err(invalid(
            "lora.dropout",
            format!(
                "{dropout} cannot be combined with use_dora, whose gain scales the base's output too: set it to 0, or train without DoRA"
            ),
        ));
    }
    let alpha = match request.alpha {
        Some(alpha) => positive("lora.alpha", alpha, 1e6)?,
        None => {
            let why =
                "with alpha over r as scale the best learning rate hardly depends on the rank";
            choices.make("lora.alpha", 32.0, why)
        }
    };
    Ok(LoraSpec {
        rank,
        alpha,
        dropout,
        target_modules,
        use_rslora: request.use_rslora.unwrap_or(false),
        use_dora: request.use_dora.unwrap_or(false),
        rank_pattern: request.rank_pattern.clone(),
        alpha_pattern: request.alpha_pattern.clone(),
        layers: request.layers.clone(),
    })
}

fn target_modules(request: &LoraRequest, choices: &mut Choices) -> Vec<String> {
    if !request.target_modules.is_empty() {
        return request.target_modules.clone();
    }
    let all: Vec<&str> = Site::ALL.iter().map(|site| site.module()).collect();
    let why = "LoRA on every projection learns as full fine-tuning does, on attention alone less";
    choices.make("lora.target_modules", all.join(", "), why);
    all.into_iter().map(str::to_owned).collect()
}

#[cfg(test)]
#[path = "defaults_tests.rs"]
pub(super) mod tests;
