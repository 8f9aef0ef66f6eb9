//! What a job is asked to do, and what it will do: a request with gaps, and the frozen description without any.
//!
//! This file must not know storage, time, or how gaps are filled.

use espalier_adapters::config::{LoraConfig, Modules};
use espalier_adapters::head::Problem;
use espalier_adapters::profile::ServingProfile;
use espalier_adapters::train::dataset::{ColumnNames, Format, Kind};
use espalier_adapters::train::examples::TrainOn;
use espalier_adapters::train::schedule::Decay;
use espalier_engine::train::trainer::HyperParameters;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use super::classification::ClassOptions;
use super::defaults::Choice;
use super::ways::{WayRequest, WaySpec};
use crate::names::{AdapterName, AdapterRef, Alias, DatasetName};

/// Where rows come from, as a request says it.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "there is one in a request")]
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    /// Labels or a number, by a head on the last token's state.
    Classification {
        /// The head alone, on cached states of the frozen base.
        head_only: bool,
        /// The labels that may appear; empty is those of the data.
        labels: Vec<String>,
        /// How the head learns and answers.
        #[serde(default)]
        options: ClassOptions,
    },
}

impl JobSpec {
    /// Whether a head is all that is trained.
    pub(super) fn head_only(&self) -> bool {
        matches!(
            self.method,
            JobMethod::Classification {
                head_only: true,
                ..
            }
        )
    }
}

impl JobMethod {
    /// The kinds of rows that it learns from.
    pub(super) fn kinds(&self) -> &'static [Kind] {
        match self {
            Self::Supervised { .. } => &[Kind::Completion, Kind::Chat, Kind::Instruction],
            Self::Unsupervised { .. } => &[Kind::Text],
            Self::Classification { .. } => &[Kind::Class, Kind::Labels, Kind::Score],
        }
    }

    /// A measured share of right answers, for the methods that have one: regression has none.
    pub(super) fn accuracy(&self, share: f64) -> Option<f64> {
        let regression = matches!(
            self,
            Self::Classification { options, .. } if options.problem == Problem::Regression
        );
        (!regression).then_some(share)
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
    /// Those of the head that is fitted first, on a ladder.
    #[serde(default)]
    pub first_rung: Option<HyperParameters>,
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
    /// What the request left open, and why it became what it is.
    #[serde(default)]
    pub choices: Vec<Choice>,
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
    /// Bytes that one job holds beside the base while it trains.
    pub training_job_bytes: u64,
    /// Bytes of a description.
    pub max_description_bytes: usize,
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
mod tests;
