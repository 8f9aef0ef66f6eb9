//! Trains one adapter: cuts examples in batches and micro-batches, runs the decoder forward and back, steps the optimizer.
//!
//! What a micro-batch holds, and in what order, is a pure function of the plan; pauses move only the moments at which
//! it goes on. The trainer must not know serving, jobs or storage: it breathes, and it reports.

use espalier_adapters::config::LoraConfig;
use espalier_adapters::train::examples::Examples;
use espalier_adapters::version::AdapterArtifact;
use espalier_adapters::weights::AdapterWeights;

pub use espalier_adapters::pace::{Pace, Stopped};

/// How the learning rate moves after the warmup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Stays.
    Constant,
    /// Falls in a line to zero at the last step.
    #[default]
    Linear,
    /// Falls along half a cosine to zero at the last step.
    Cosine,
}

/// The numbers of a training run.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HyperParameters {
    /// Peak learning rate of A and B.
    pub learning_rate: f64,
    /// Peak learning rate of the classification head; `None` is `learning_rate`, or 1e-2 when the head trains alone.
    pub head_learning_rate: Option<f64>,
    /// What the learning rate does after the warmup.
    pub decay: Decay,
    /// Steps in which the learning rate rises in a line; `None` is a twentieth of all steps.
    pub warmup_steps: Option<u64>,
    /// Decoupled decay per unit of learning rate, on every trained tensor.
    pub weight_decay: f64,
    /// AdamW's first decay rate.
    pub beta1: f64,
    /// AdamW's second decay rate.
    pub beta2: f64,
    /// AdamW's epsilon.
    pub epsilon: f64,
    /// The global gradient norm is scaled down to this; `None` never.
    pub max_grad_norm: Option<f64>,
    /// Passes over the training examples.
    pub epochs: u64,
    /// Stops after so many steps at the latest.
    pub max_steps: Option<u64>,
    /// Examples of one optimizer step.
    pub batch_size: usize,
    /// Steps between two evaluations; `None` is once an epoch. Nothing is evaluated without validation examples.
    pub eval_steps: Option<u64>,
    /// Evaluations without a better one after which training stops; `None` never stops early.
    pub early_stopping_patience: Option<u64>,
    /// Steps between two checkpoints; `None` is every 50. 0 makes none.
    pub checkpoint_steps: Option<u64>,
    /// Bytes that saved activations may take: bounds the tokens of a micro-batch.
    pub activation_bytes: usize,
}

impl Default for HyperParameters {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            head_learning_rate: None,
            decay: Decay::Linear,
            warmup_steps: None,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            max_grad_norm: Some(1.0),
            epochs: 3,
            max_steps: None,
            batch_size: 8,
            eval_steps: None,
            early_stopping_patience: None,
            checkpoint_steps: None,
            activation_bytes: 512 << 20,
        }
    }
}

/// What is learnt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Method {
    /// The next token, where an example says so.
    Lm,
    /// A label from the last token's state.
    Class {
        /// Names of the head's rows, in their order; `Example::Class` holds indices into it.
        labels: Vec<String>,
        /// Train the head alone, on states of the frozen base that are computed once.
        head_only: bool,
    },
}

/// All that decides what a training run computes.
#[derive(Clone, Debug)]
pub struct TrainPlan {
    /// What is learnt.
    pub method: Method,
    /// The adapter's shape; `None` only with `head_only`.
    pub lora: Option<LoraConfig>,
    /// The numbers.
    pub hp: HyperParameters,
    /// Decides initial values, order and dropout.
    pub seed: u64,
    /// What it learns from.
    pub train: Examples,
    /// What it is judged on.
    pub valid: Option<Examples>,
    /// Where it starts; `None` is A uniform and B zero.
    pub init: Option<AdapterWeights>,
}

/// What a run reports, in order.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum TrainEvent {
    /// Head-only: so many of the examples' states are computed.
    Embedded {
        /// Done.
        done: usize,
        /// Of.
        total: usize,
    },
    /// An optimizer step is done.
    Step(StepReport),
    /// The validation examples were judged after `step` steps.
    Eval(EvalReport),
    /// All that is needed to go on after `step` steps.
    Checkpoint {
        /// Steps done.
        step: u64,
        /// For [`Trainer::resume`].
        bytes: Vec<u8>,
    },
}

/// One optimizer step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    /// Steps in all, without early stopping.
    pub total: u64,
    /// Passes over the data done, this step included.
    pub epoch: f64,
    /// Mean over the batch's targets.
    pub loss: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Learning rate of A and B (of the head when it trains alone).
    pub learning_rate: f64,
    /// Targets of this batch: label tokens, or examples.
    pub targets: u64,
    /// Tokens of this batch.
    pub tokens: u64,
    /// Tokens of the run so far.
    pub total_tokens: u64,
}

/// One evaluation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EvalReport {
    /// Steps done.
    pub step: u64,
    /// Mean over the validation set's targets.
    pub loss: f64,
    /// Share of examples with the right label; of targets whose token is the likeliest in `Lm`.
    pub accuracy: f64,
    /// Better than all before.
    pub best: bool,
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The adapter, as it is uploaded and served. That of the best evaluation where there was one, else the last.
    pub artifact: AdapterArtifact,
    /// How it went.
    pub summary: Summary,
}

/// How a run went.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Steps done.
    pub steps: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Of the first step.
    pub first_loss: f64,
    /// Of the last step.
    pub last_loss: f64,
    /// The step whose weights the artifact holds.
    pub kept_step: u64,
    /// Its evaluation.
    pub best: Option<EvalReport>,
    /// Patience ran out.
    pub stopped_early: bool,
}

/// Why a run cannot start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The pace ended it.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// The plan cannot be carried out.
    #[error("{field}: {reason}")]
    Plan {
        /// Which part of the plan.
        field: &'static str,
        /// What is wrong, with value and limit.
        reason: String,
    },
    /// The checkpoint is broken or belongs to another plan.
    #[error("checkpoint: {0}")]
    Checkpoint(String),
    /// A loss or gradient is not a number any more.
    #[error("{what} is {value} at step {step}; a lower learning rate may help")]
    NotFinite {
        /// Loss or gradient norm.
        what: &'static str,
        /// NaN or infinite.
        value: f64,
        /// Counted from 1.
        step: u64,
    },
}
