//! What a job is asked to do, and what it will do: a request with gaps, and the frozen description without any.
//!
//! Every default that is filled in here is recorded in the job, so that a job means the same for ever. The numbers come
//! from what adapters of tenant size were found to want (Tinker's learning rate by width, PEFT's and SetFit's practice).
//! This file must not know storage or time.

use espalier_adapters::config::{LoraConfig, Modules, Site};
use espalier_adapters::profile::ServingProfile;
use espalier_adapters::train::dataset::{ColumnNames, Format, Kind};
use espalier_adapters::train::examples::TrainOn;
use espalier_adapters::train::schedule::Decay;
use espalier_engine::model::Family;
use espalier_engine::train::trainer::HyperParameters;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use super::JobError;
use super::ways::{WayRequest, WaySpec};
use crate::names::{AdapterName, AdapterRef, Alias, DatasetName};

/// Steps below which a run is too short to settle; the default number of epochs grows until it is reached.
const WANTED_STEPS: u64 = 100;
/// Evaluations of a run when the request names no interval.
const EVALUATIONS: u64 = 10;
/// Evaluations without progress after which a run with defaulted epochs ends.
const PATIENCE: u64 = 5;

/// Where rows come from, as a request says it.
#[derive(Debug, Clone)]
pub enum DataInput {
    /// A dataset of the same tenant.
    Dataset(DatasetName),
    /// The rows themselves.
    Inline {
        /// How they are spelled.
        format: Format,
        /// The columns they are read with.
        columns: ColumnNames,
        /// The rows.
        bytes: Vec<u8>,
    },
}

/// What the run is measured on, as a request says it.
#[derive(Debug, Clone)]
pub enum ValidationInput {
    /// Nothing.
    None,
    /// Rows of their own.
    Data(Box<DataInput>),
    /// A part of the training rows, above 0 and at most 0.5.
    Fraction(f64),
}

/// What is learned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobMethod {
    /// Completions and turns of chats.
    Supervised {
        /// Which turns.
        #[serde(default)]
        train_on: TrainOn,
    },
    /// Raw text.
    Unsupervised {
        /// Tokens of a window; `None` in a request alone.
        window_tokens: Option<usize>,
    },
    /// Labels, by a head on the last token's state.
    Classification {
        /// The head alone, on cached states of the frozen base.
        head_only: bool,
        /// The labels that may appear; empty is those of the data.
        labels: Vec<String>,
    },
}

impl JobMethod {
    /// The kinds of rows that it learns from.
    pub(super) fn kinds(&self) -> &'static [Kind] {
        match self {
            Self::Supervised { .. } => &[Kind::Completion, Kind::Chat, Kind::Instruction],
            Self::Unsupervised { .. } => &[Kind::Text],
            Self::Classification { .. } => &[Kind::Class],
        }
    }

    /// What a mean loss in nats a token says as perplexity, for the method that is measured by it.
    pub(super) fn perplexity(&self, loss: f64) -> Option<f64> {
        matches!(self, Self::Unsupervised { .. }).then(|| loss.exp().min(f64::MAX))
    }
}

/// A stored method; the first jobs wrote the supervised one as a bare word.
fn stored_method<'de, D: Deserializer<'de>>(from: D) -> Result<JobMethod, D::Error> {
    let value = serde_json::Value::deserialize(from)?;
    if value == "supervised" {
        return Ok(JobMethod::Supervised {
            train_on: TrainOn::default(),
        });
    }
    serde_json::from_value(value).map_err(D::Error::custom)
}

/// Hyperparameters as a request names them; what is `None` gets a default.
#[derive(Debug, Clone, Default)]
pub struct HyperRequest {
    /// Passes over the data; may be a fraction.
    pub epochs: Option<f64>,
    /// Upper bound of steps.
    pub max_steps: Option<u64>,
    /// Examples of one step.
    pub batch_size: Option<u32>,
    /// Into how many micro-batches a step is cut at least.
    pub gradient_accumulation_steps: Option<u32>,
    /// Peak learning rate.
    pub learning_rate: Option<f64>,
    /// Peak learning rate of the head.
    pub head_learning_rate: Option<f64>,
    /// Decoupled weight decay.
    pub weight_decay: Option<f64>,
    /// AdamW's first decay rate.
    pub beta1: Option<f64>,
    /// AdamW's second decay rate.
    pub beta2: Option<f64>,
    /// AdamW's epsilon.
    pub epsilon: Option<f64>,
    /// Bound of the gradient norm; 0 is off.
    pub max_grad_norm: Option<f64>,
    /// What follows the warmup.
    pub decay: Option<Decay>,
    /// Steps of warmup.
    pub warmup_steps: Option<u64>,
    /// Warmup as a part of all steps.
    pub warmup_ratio: Option<f64>,
    /// Steps between evaluations; 0 is at the end of each epoch.
    pub eval_every_steps: Option<u64>,
    /// Evaluations without progress after which the run ends; 0 is off.
    pub early_stopping_patience: Option<u32>,
    /// Steps between checkpoints.
    pub checkpoint_every_steps: Option<u64>,
    /// Longest example.
    pub max_example_tokens: Option<u32>,
    /// A new order each epoch.
    pub shuffle: Option<bool>,
    /// Learning rate of B over that of A.
    pub lora_plus_ratio: Option<f64>,
}

/// The adapter's shape as a request names it.
#[derive(Debug, Clone, Default)]
pub struct LoraRequest {
    /// Rank.
    pub rank: Option<u32>,
    /// Alpha.
    pub alpha: Option<f64>,
    /// Dropout.
    pub dropout: Option<f64>,
    /// Module names; empty is all seven.
    pub target_modules: Vec<String>,
    /// Scale alpha / sqrt(r).
    pub use_rslora: Option<bool>,
    /// Weight-decomposed.
    pub use_dora: Option<bool>,
    /// Ranks by pattern.
    pub rank_pattern: Vec<(String, u32)>,
    /// Alphas by pattern.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Layers; empty is all.
    pub layers: Vec<u32>,
}

/// A job as it is asked for.
#[derive(Debug, Clone)]
pub struct JobRequest {
    /// Receives the new version; registered when its name is new.
    pub adapter: AdapterName,
    /// A version to go on from.
    pub from: Option<AdapterRef>,
    /// What is learned.
    pub method: JobMethod,
    /// The rows.
    pub data: DataInput,
    /// What it is measured on.
    pub validation: ValidationInput,
    /// Numbers.
    pub hyper: HyperRequest,
    /// Shape.
    pub lora: LoraRequest,
    /// What is trained in LoRA's place.
    pub way: Option<WayRequest>,
    /// Decides everything random; drawn when absent.
    pub seed: Option<u64>,
    /// Renders the rows and is given to the version.
    pub profile: ServingProfile,
    /// Aliases that move on success; empty with `keep_aliases` unset is `default`.
    pub aliases: Vec<Alias>,
    /// Move none.
    pub keep_aliases: bool,
    /// For people.
    pub description: String,
}

/// Where rows come from, frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataSource {
    /// The dataset's name; `None` for inline rows.
    pub dataset: Option<String>,
    /// How the bytes are spelled.
    pub format: Format,
    /// The columns.
    pub columns: ColumnNames,
    /// SHA-256 of the bytes, hex.
    pub sha256: String,
}

/// What the run is measured on, frozen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Validation {
    /// Nothing.
    None,
    /// Rows of their own.
    Data(Box<DataSource>),
    /// A part of the training rows, carved by the seed.
    Fraction(f64),
}

/// The adapter's shape, frozen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraSpec {
    /// Rank.
    pub rank: u32,
    /// Alpha.
    pub alpha: f64,
    /// Dropout.
    pub dropout: f64,
    /// Module names.
    pub target_modules: Vec<String>,
    /// Scale alpha / sqrt(r).
    pub use_rslora: bool,
    /// Weight-decomposed.
    pub use_dora: bool,
    /// Ranks by pattern.
    pub rank_pattern: Vec<(String, u32)>,
    /// Alphas by pattern.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Layers; empty is all.
    pub layers: Vec<u32>,
}

/// Everything that decides what a job computes and where its result goes. Written once, with the job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Full name of the adapter.
    pub adapter: String,
    /// Canonical name of the version that it goes on from.
    pub from_version: Option<String>,
    /// Digest of that version, hex.
    pub from_digest: Option<String>,
    /// What is learned.
    #[serde(deserialize_with = "stored_method")]
    pub method: JobMethod,
    /// The classes in the order of the head's rows; empty without a head.
    pub labels: Vec<String>,
    /// The rows.
    pub data: DataSource,
    /// What it is measured on.
    pub validation: Validation,
    /// The trainer's numbers, every one decided.
    pub hyper: HyperParameters,
    /// Passes over the data as asked, a fraction allowed.
    pub epochs: f64,
    /// Micro-batches of a step at least.
    pub gradient_accumulation_steps: u32,
    /// Longest example.
    pub max_example_tokens: usize,
    /// The adapter's shape; `None` when the head trains alone, or something in LoRA's place.
    pub lora: Option<LoraSpec>,
    /// What is trained in LoRA's place.
    #[serde(default)]
    pub way: Option<WaySpec>,
    /// Decides everything random.
    pub seed: u64,
    /// Renders the rows and is given to the version.
    pub profile: ServingProfile,
    /// Aliases that move on success.
    pub aliases: Vec<String>,
    /// For people.
    pub description: String,
    /// Digest of the base that it trains on.
    pub base_digest: String,
}

/// Bounds on jobs.
#[derive(Debug, Clone)]
pub struct JobLimits {
    /// Jobs that train at once.
    pub max_active: usize,
    /// Jobs of one tenant that have not ended.
    pub max_per_tenant: usize,
    /// Bytes that saved activations may take.
    pub activation_bytes: usize,
    /// Steps between checkpoints when the request names none.
    pub checkpoint_steps: u64,
    /// Tokens of one example at most.
    pub max_example_tokens: usize,
    /// Rows of inline data.
    pub max_inline_rows: usize,
    /// Epochs of one job.
    pub max_epochs: u32,
    /// Steps of one job.
    pub max_steps: u64,
    /// Examples of one step.
    pub max_batch_size: u32,
    /// Rank.
    pub max_rank: u32,
    /// Labels of a head.
    pub max_labels: usize,
    /// Bytes of a version's file.
    pub max_adapter_bytes: u64,
    /// Bytes of all versions in memory.
    pub adapter_cache_bytes: u64,
    /// Bytes of a description.
    pub max_description_bytes: usize,
}

/// What the defaults depend on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Circumstances {
    /// Examples to train on.
    pub examples: usize,
    /// Whether there is something to measure on.
    pub validated: bool,
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
/// for Qwen's (Tinker's fit, reported within 0.5 % of the best loss), half as much again for runs below 100 steps.
fn lora_learning_rate(at: &Circumstances, steps: u64) -> f64 {
    let power = match at.family {
        Family::Llama | Family::Mistral => 0.781,
        Family::Qwen2 | Family::Qwen3 => 0.0775,
    };
    let rate = 5e-4 * (2000.0 / at.hidden as f64).powf(power);
    if steps < WANTED_STEPS {
        rate * 1.5
    } else {
        rate
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
) -> Result<Length, JobError> {
    let batch_size = match request.batch_size {
        Some(size) => within(
            "hyper_parameters.batch_size",
            f64::from(size),
            1.0,
            f64::from(limits.max_batch_size),
        )? as usize,
        None if head_only => 32,
        None if at.examples < 512 => 8,
        None => 16,
    };
    let per_epoch = at.examples.div_ceil(batch_size).max(1) as u64;
    let max_epochs = f64::from(limits.max_epochs);
    let epochs = match request.epochs {
        Some(epochs) => positive("hyper_parameters.epochs", epochs, max_epochs)?,
        None if head_only => (4 * WANTED_STEPS).div_ceil(per_epoch).clamp(3, 30) as f64,
        None => WANTED_STEPS.div_ceil(per_epoch).clamp(3, 10) as f64,
    }
    .min(max_epochs);
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

/// Fills the gaps of a request's hyperparameters and checks the rest. Returns the trainer's numbers and the epochs.
pub(super) fn hyper_parameters(
    request: &HyperRequest,
    at: &Circumstances,
    head_only: bool,
    limits: &JobLimits,
) -> Result<(HyperParameters, f64), JobError> {
    let field = |name: &str| format!("hyper_parameters.{name}");
    refuse_unsupported(request)?;
    let length = length(request, at, head_only, limits)?;
    let rate = |name: &str, value: Option<f64>, default: f64| match value {
        Some(value) => positive(&field(name), value, 1.0),
        None => Ok(default),
    };
    let default_rate = if head_only {
        1e-2
    } else {
        lora_learning_rate(at, length.steps)
    };
    let learning_rate = rate("learning_rate", request.learning_rate, default_rate)?;
    let default_head = if head_only {
        learning_rate
    } else {
        1e-3_f64.max(learning_rate)
    };
    let warmup_steps = match (request.warmup_steps, request.warmup_ratio) {
        (Some(steps), None) => steps.min(length.steps),
        (None, Some(ratio)) => {
            let ratio = within(&field("warmup_ratio"), ratio, 0.0, 1.0)?;
            (ratio * length.steps as f64).round() as u64
        }
        (Some(_), Some(_)) => {
            return Err(invalid(
                &field("warmup_ratio"),
                "warmup_steps is set too: name one of them",
            ));
        }
        (None, None) => length.steps.div_ceil(20),
    };
    let eval_steps = match request.eval_every_steps {
        Some(0) => None,
        Some(steps) => Some(steps),
        None => Some(length.steps.div_ceil(EVALUATIONS).max(1)),
    };
    let patience = match request.early_stopping_patience {
        Some(0) => None,
        Some(_) if !at.validated => {
            return Err(invalid(
                &field("early_stopping_patience"),
                "there is no validation data to judge by: set validation_data or validation_fraction",
            ));
        }
        Some(patience) => Some(u64::from(patience)),
        None => (at.validated && request.epochs.is_none()).then_some(PATIENCE),
    };
    let accumulation = request.gradient_accumulation_steps.unwrap_or(1).max(1);
    let beta = |name: &str, value: Option<f64>, default| {
        within(&field(name), value.unwrap_or(default), 0.0, 0.999_999)
    };
    let hyper = HyperParameters {
        learning_rate: Some(learning_rate),
        head_learning_rate: Some(rate(
            "head_learning_rate",
            request.head_learning_rate,
            default_head,
        )?),
        lora_plus_ratio: lora_plus_ratio(request, head_only)?,
        decay: request.decay.unwrap_or(Decay::Linear),
        warmup_steps: Some(warmup_steps),
        weight_decay: within(
            &field("weight_decay"),
            request.weight_decay.unwrap_or(0.0),
            0.0,
            1.0,
        )?,
        beta1: beta("adam_beta1", request.beta1, 0.9)?,
        beta2: beta("adam_beta2", request.beta2, 0.999)?,
        epsilon: positive(&field("adam_epsilon"), request.epsilon.unwrap_or(1e-8), 1.0)?,
        max_grad_norm: match request.max_grad_norm {
            Some(0.0) => None,
            Some(norm) => Some(positive(&field("max_grad_norm"), norm, 1e9)?),
            None => Some(1.0),
        },
        epochs: Some((length.epochs.ceil() as u64).max(1)),
        max_steps: Some(length.steps),
        batch_size: length.batch_size,
        eval_steps: eval_steps.filter(|_| at.validated),
        early_stopping_patience: patience,
        checkpoint_steps: Some(
            request
                .checkpoint_every_steps
                .filter(|steps| *steps > 0)
                .unwrap_or(limits.checkpoint_steps),
        ),
        activation_bytes: limits.activation_bytes / accumulation as usize,
    };
    Ok((hyper, length.epochs))
}

/// What the contract has and the trainer does not do is refused, never ignored.
fn refuse_unsupported(request: &HyperRequest) -> Result<(), JobError> {
    if request.shuffle == Some(false) {
        return Err(invalid(
            "hyper_parameters.shuffle",
            "false is not supported: rows are always shuffled by the seed",
        ));
    }
    Ok(())
}

/// B's learning rate over A's. A head that trains alone has neither.
fn lora_plus_ratio(request: &HyperRequest, head_only: bool) -> Result<f64, JobError> {
    let field = "hyper_parameters.lora_plus_ratio";
    match request.lora_plus_ratio {
        Some(ratio) if head_only && ratio != 1.0 => Err(invalid(
            field,
            format!(
                "{ratio} needs a B to apply to, and head_only trains a head alone: leave it out, or train LoRA too"
            ),
        )),
        Some(ratio) => positive(field, ratio, 1e3),
        None => Ok(1.0),
    }
}

/// Fills the gaps of a request's LoRA shape and checks the rest: rank 16 (8 below 500 examples, 32 above 20,000), alpha 32,
/// all seven modules.
pub(super) fn lora(
    request: &LoraRequest,
    at: &Circumstances,
    limits: &JobLimits,
) -> Result<LoraSpec, JobError> {
    let max_rank = f64::from(limits.max_rank);
    let rank = match request.rank {
        Some(rank) => within("lora.rank", f64::from(rank), 1.0, max_rank)? as u32,
        None if at.examples < 500 => 8.min(limits.max_rank),
        None if at.examples > 20_000 => 32.min(limits.max_rank),
        None => 16.min(limits.max_rank),
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
    let target_modules = if request.target_modules.is_empty() {
        Site::ALL
            .iter()
            .map(|site| site.module().to_owned())
            .collect()
    } else {
        request.target_modules.clone()
    };
    let dropout = request.dropout.unwrap_or(0.0);
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
    Ok(LoraSpec {
        rank,
        alpha: positive("lora.alpha", request.alpha.unwrap_or(32.0), 1e6)?,
        dropout,
        target_modules,
        use_rslora: request.use_rslora.unwrap_or(false),
        use_dora: request.use_dora.unwrap_or(false),
        rank_pattern: request.rank_pattern.clone(),
        alpha_pattern: request.alpha_pattern.clone(),
        layers: request.layers.clone(),
    })
}

impl LoraSpec {
    /// As the trainer and PEFT's file want it.
    pub(super) fn config(&self, base_name: &str, classify: bool) -> LoraConfig {
        let plain = LoraConfig::new(self.rank as usize, self.alpha, &[]);
        let config = LoraConfig {
            lora_dropout: self.dropout,
            target_modules: Modules::List(self.target_modules.clone()),
            layers_to_transform: (!self.layers.is_empty())
                .then(|| self.layers.iter().map(|layer| *layer as usize).collect()),
            rank_pattern: self
                .rank_pattern
                .iter()
                .map(|(pattern, rank)| (pattern.clone(), *rank as usize))
                .collect(),
            alpha_pattern: self.alpha_pattern.clone(),
            use_rslora: self.use_rslora,
            use_dora: self.use_dora,
            base_model_name_or_path: Some(base_name.to_owned()),
            ..plain
        };
        if classify {
            config.with_score_head()
        } else {
            config
        }
    }
}

#[cfg(test)]
#[path = "spec_tests.rs"]
pub(super) mod tests;
