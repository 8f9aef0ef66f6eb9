//! What a training run is told, what it reports, and why it may fail. Plain types.

use espalier_adapters::config::AdapterConfig;
use espalier_adapters::head::{Activation, HeadSettings, Pooling, Problem};
use espalier_adapters::ops::OutOfMemory;
use espalier_adapters::train::examples::{Example, Examples};
use espalier_adapters::train::quality::Quality;
use espalier_adapters::version::AdapterArtifact;
use espalier_adapters::weights::AdapterWeights;

use espalier_adapters::pace::Stopped;
use espalier_adapters::train::optimizer::AdamWConfig;
use espalier_adapters::train::schedule::Decay;
use sha2::{Digest, Sha256};

use super::diagnosis::Diagnosis;
use super::footprint::Footprint;
use crate::model::ModelConfig;

/// The numbers of a training run.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HyperParameters {
    /// Peak learning rate; `None` is 1e-3.
    pub learning_rate: Option<f64>,
    /// Peak learning rate of the classification head; `None` is `learning_rate`.
    pub head_learning_rate: Option<f64>,
    /// Learning rate of B over that of A (LoRA+), above 0 and at most 1000.
    pub lora_plus_ratio: f64,
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
    /// Passes over the training examples; `None` is 3, or 100 when the head trains alone.
    pub epochs: Option<u64>,
    /// Stops after so many steps at the latest.
    pub max_steps: Option<u64>,
    /// Examples of one optimizer step.
    pub batch_size: usize,
    /// Every epoch has an order of its own, drawn by the seed; else all have that of the data.
    pub shuffle: bool,
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
            learning_rate: None,
            head_learning_rate: None,
            lora_plus_ratio: 1.0,
            decay: Decay::Linear,
            warmup_steps: None,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            max_grad_norm: Some(1.0),
            epochs: None,
            max_steps: None,
            batch_size: 8,
            shuffle: true,
            eval_steps: None,
            early_stopping_patience: None,
            checkpoint_steps: None,
            activation_bytes: 512 << 20,
        }
    }
}

/// How a head learns and answers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadOptions {
    /// What it answers.
    pub problem: Problem,
    /// What an example of each label counts, above 0; `None` is 1 each. A batch's loss is the weighted mean, as torch's.
    pub class_weights: Option<Vec<f32>>,
    /// The share of right answers on validation that the fitted threshold may call out of scope, in 0..=0.5; `None` fits none.
    pub out_of_scope_share: Option<f64>,
    /// Outputs of the fully connected layers below `score`; none is a head of one layer.
    pub hidden_layers: Vec<usize>,
    /// Behind each of them; there if and only if they are.
    pub activation: Option<Activation>,
    /// Which states it reads.
    pub pooling: Pooling,
    /// The probability that an input of one of its layers is dropped in training, in 0..1.
    pub dropout: f32,
}

/// What is learnt.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// The next token, where an example says so.
    Lm,
    /// A label from the last token's state.
    Class {
        /// Names of the head's rows, in their order; examples hold indices into it.
        labels: Vec<String>,
        /// Train the head alone, on states of the frozen base that are computed once.
        head_only: bool,
        /// How it learns and answers.
        options: HeadOptions,
    },
}

/// All that decides what a training run computes.
#[derive(Clone, Debug)]
pub struct TrainPlan {
    /// What is learnt.
    pub method: Method,
    /// The way to adapt, and its shape; `None` only with `head_only`.
    pub adapter: Option<AdapterConfig>,
    /// The numbers.
    pub hp: HyperParameters,
    /// Decides initial values, order and dropout.
    pub seed: u64,
    /// What it learns from.
    pub train: Examples,
    /// What it is judged on.
    pub valid: Option<Examples>,
    /// Where it starts; `None` is A uniform and B zero, and vectors of ones.
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
    /// Something was noticed at a step, after its report.
    Diagnosis {
        /// The step.
        step: u64,
        /// What.
        diagnosis: Diagnosis,
    },
    /// All that is needed to go on after `step` steps.
    Checkpoint {
        /// Steps done.
        step: u64,
        /// For `Trainer::resume`.
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
    /// Learning rate of A, or of vectors (of the head when it trains alone).
    pub learning_rate: f64,
    /// Targets of this batch: label tokens, or examples.
    pub targets: u64,
    /// Tokens of this batch.
    pub tokens: u64,
    /// Tokens of the run so far.
    pub total_tokens: u64,
}

/// One evaluation. The one at step 0 is of what training starts from.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EvalReport {
    /// Steps done.
    pub step: u64,
    /// Mean over the validation set's targets.
    pub loss: f64,
    /// Share of examples with the right label (all the right ones of several); of targets whose token is the likeliest in `Lm`;
    /// 0 of regression, which has none.
    pub accuracy: f64,
    /// Mean over labels of F1, of a head that chooses labels.
    pub macro_f1: Option<f64>,
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
    /// The evaluation of what training started from.
    pub baseline: Option<EvalReport>,
    /// Patience ran out.
    pub stopped_early: bool,
    /// What it trained and held.
    pub footprint: Footprint,
    /// How the kept head answers the validation examples; `None` without a head or without such examples.
    pub held_out: Option<HeldOut>,
}

/// How a head answers examples that it was not trained on.
#[derive(Clone, Debug, PartialEq)]
pub struct HeldOut {
    /// How many.
    pub examples: u64,
    /// How well.
    pub quality: Quality,
    /// Mean of `-ln p(right label)` under the calibrated scores, of one label each.
    pub log_loss: Option<f64>,
    /// What was fitted on them.
    pub settings: HeadSettings,
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
    /// The adapter does not fit beside what the device holds.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
    /// It would hold more than a job may.
    #[error(
        "the job would hold up to {bytes} bytes beside the base, more than the {limit} that one may (training_job_bytes): give it \
         shorter examples, a smaller batch or rank, or fewer modules or layers, or have the limit raised"
    )]
    TooLarge {
        /// Its footprint.
        bytes: u64,
        /// The most.
        limit: usize,
    },
    /// The first step gave nothing a gradient, so that no step will change anything.
    #[error(
        "no parameter got a gradient at step {step}: nothing can be learned from these rows with these target modules"
    )]
    NoGradient {
        /// Counted from 1.
        step: u64,
    },
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

impl TrainError {
    pub(super) fn plan(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Plan {
            field,
            reason: reason.into(),
        }
    }
}

impl HyperParameters {
    /// Peak learning rates of A, and of the head.
    pub(super) fn rates(&self) -> (f64, f64) {
        let rate = self.learning_rate.unwrap_or(1e-3);
        (rate, self.head_learning_rate.unwrap_or(rate))
    }

    pub(super) fn optimizer(&self) -> AdamWConfig {
        AdamWConfig {
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay,
        }
    }

    fn validate(&self) -> Result<(), TrainError> {
        let (low, high) = (0.0..1.0, 0.0..=1.0);
        let fractions = [("beta1", self.beta1), ("beta2", self.beta2)];
        let rates = [
            ("learning_rate", self.rates().0),
            ("head_learning_rate", self.rates().1),
        ];
        if let Some((field, value)) = fractions
            .into_iter()
            .find(|(_, value)| !low.contains(value))
        {
            return Err(TrainError::plan(field, format!("{value} is not in 0..1")));
        }
        if let Some((field, value)) = rates
            .into_iter()
            .find(|(_, rate)| !(*rate > 0.0 && *rate <= 1.0))
        {
            return Err(TrainError::plan(
                field,
                format!("{value} is not above 0 and at most 1"),
            ));
        }
        if !(self.lora_plus_ratio > 0.0 && self.lora_plus_ratio <= 1e3) {
            return Err(TrainError::plan(
                "lora_plus_ratio",
                format!("{} is not above 0 and at most 1000", self.lora_plus_ratio),
            ));
        }
        if !high.contains(&self.weight_decay) {
            return Err(TrainError::plan(
                "weight_decay",
                format!("{} is not in 0..=1", self.weight_decay),
            ));
        }
        if !(self.epsilon > 0.0 && self.epsilon <= 1.0) {
            return Err(TrainError::plan(
                "epsilon",
                format!("{} is not above 0 and at most 1", self.epsilon),
            ));
        }
        if self
            .max_grad_norm
            .is_some_and(|limit| !(limit > 0.0 && limit.is_finite()))
        {
            return Err(TrainError::plan("max_grad_norm", "is not above 0"));
        }
        let counts = [
            ("batch_size", Some(self.batch_size as u64)),
            ("epochs", self.epochs),
            ("max_steps", self.max_steps),
            ("eval_steps", self.eval_steps),
            ("early_stopping_patience", self.early_stopping_patience),
        ];
        match counts.into_iter().find(|(_, count)| *count == Some(0)) {
            Some((field, _)) => Err(TrainError::plan(field, "0 is not at least 1")),
            None => Ok(()),
        }
    }
}

impl TrainPlan {
    /// Whether only a head is trained.
    pub(super) fn head_only(&self) -> bool {
        matches!(
            self.method,
            Method::Class {
                head_only: true,
                ..
            }
        )
    }

    /// Checks all that can be checked before anything is computed.
    ///
    /// # Errors
    /// [`TrainError::Plan`] with the first thing that cannot be carried out.
    pub(super) fn validate(&self, vocab: usize, context_length: usize) -> Result<(), TrainError> {
        self.hp.validate()?;
        if self.train.items.is_empty() {
            return Err(TrainError::plan("train", "holds no example"));
        }
        let named = [("train", Some(&self.train)), ("valid", self.valid.as_ref())];
        for (field, examples) in named {
            for example in examples.iter().flat_map(|examples| &examples.items) {
                self.validate_example(field, example, vocab, context_length)?;
            }
        }
        if let Method::Class {
            labels, options, ..
        } = &self.method
        {
            options.validate(labels.len())?;
        }
        let lora = self.adapter.as_ref().and_then(AdapterConfig::lora);
        match lora {
            Some(lora) if lora.use_dora && lora.lora_dropout > 0.0 => Err(TrainError::plan(
                "lora_dropout",
                format!(
                    "{} with use_dora: DoRA's gain scales the base's output too, which dropout does not reach; set it to 0",
                    lora.lora_dropout
                ),
            )),
            Some(lora) if !(0.0..1.0).contains(&lora.lora_dropout) => Err(TrainError::plan(
                "lora_dropout",
                format!("{} is not in 0..1", lora.lora_dropout),
            )),
            _ => match &self.adapter {
                Some(_) if self.head_only() => Err(TrainError::plan(
                    "adapter",
                    "a head that is trained alone has nothing below it that is trained",
                )),
                None if !self.head_only() => Err(TrainError::plan("adapter", "is missing")),
                Some(AdapterConfig::Ia3(_) | AdapterConfig::Full(_))
                    if self.hp.lora_plus_ratio != 1.0 =>
                {
                    Err(TrainError::plan(
                        "lora_plus_ratio",
                        format!(
                            "{} is for LoRA's factors, which this plan does not train; leave it at 1",
                            self.hp.lora_plus_ratio
                        ),
                    ))
                }
                _ => Ok(()),
            },
        }
    }

    fn validate_example(
        &self,
        field: &'static str,
        example: &Example,
        vocab: usize,
        context_length: usize,
    ) -> Result<(), TrainError> {
        let ids = example.ids();
        if ids.is_empty() || ids.len() > context_length {
            let reason = format!(
                "an example has {} tokens, not 1..={context_length}",
                ids.len()
            );
            return Err(TrainError::plan(field, reason));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
            return Err(TrainError::plan(
                field,
                format!("token {id} is not below the vocabulary's {vocab}"),
            ));
        }
        match (&self.method, example) {
            (Method::Lm, Example::Lm { ids, learn }) => {
                let fits = learn.len() == ids.len()
                    && learn.first() == Some(&false)
                    && learn.contains(&true);
                fits.then_some(())
                    .ok_or_else(|| TrainError::plan(field, "an example has no token to learn"))
            }
            (
                Method::Class {
                    labels, options, ..
                },
                answered,
            ) => answer_fits(field, answered, options.problem, labels.len()),
            _ => Err(TrainError::plan(
                field,
                "an example is of another kind than the method",
            )),
        }
    }

    /// Identifies plan and base, so that a checkpoint goes on only where it began.
    pub(super) fn digest(&self, base: &ModelConfig) -> String {
        let mut hash = Sha256::new();
        hash.update(format!(
            "espalier-plan-v1 {:?} {:?} {:?} {} {base:?}",
            self.method, self.adapter, self.hp, self.seed
        ));
        for examples in [Some(&self.train), self.valid.as_ref()] {
            let items = examples.map_or(&[][..], |examples| &examples.items);
            hash.update((items.len() as u64).to_le_bytes());
            items
                .iter()
                .for_each(|example| hash_example(&mut hash, example));
        }
        for ((layer, site), adapter) in self.init.iter().flat_map(|init| &init.sites) {
            hash.update(format!("{} {}", site.path(*layer), adapter.scale.to_bits()));
            for factor in [&adapter.a, &adapter.b] {
                factor
                    .to_f32()
                    .iter()
                    .for_each(|x| hash.update(x.to_le_bytes()));
            }
            let magnitude = adapter.magnitude.iter().flatten();
            magnitude.for_each(|x| hash.update(x.to_le_bytes()));
        }
        for ((layer, site), scale) in self.init.iter().flat_map(|init| &init.scales) {
            hash.update(format!("{} {:?}", site.path(*layer), scale.on));
            scale.l.iter().for_each(|x| hash.update(x.to_le_bytes()));
        }
        for (tensor, delta) in self.init.iter().flat_map(|init| &init.full) {
            hash.update(tensor.path());
            let values = delta.values.iter();
            values.for_each(|x| hash.update(x.to_le_bytes()));
        }
        if let Some(head) = self.init.as_ref().and_then(|init| init.head.as_ref()) {
            let hidden = head
                .hidden
                .iter()
                .flat_map(|l| l.weight.iter().chain(&l.bias));
            let numbers = hidden.chain(&head.weight);
            numbers.for_each(|x| hash.update(x.to_le_bytes()));
        }
        hex::encode(hash.finalize())
    }
}

/// An example asks what the head answers, of rows that it has.
fn answer_fits(
    field: &'static str,
    example: &Example,
    problem: Problem,
    rows: usize,
) -> Result<(), TrainError> {
    let named = match (problem, example) {
        (Problem::SingleLabel, Example::Class { label, .. }) => std::slice::from_ref(label),
        (Problem::MultiLabel, Example::Labels { labels, .. }) => labels,
        (Problem::Regression, Example::Score { .. }) => &[],
        _ => {
            let reason = format!("an example is of another kind than {}", problem.as_str());
            return Err(TrainError::plan(field, reason));
        }
    };
    match named.iter().find(|label| **label >= rows) {
        Some(label) => Err(TrainError::plan(
            field,
            format!("label {label} is not below {rows}"),
        )),
        None => Ok(()),
    }
}

fn hash_example(hash: &mut Sha256, example: &Example) {
    hash.update((example.ids().len() as u64).to_le_bytes());
    example
        .ids()
        .iter()
        .for_each(|id| hash.update(id.to_le_bytes()));
    match example {
        Example::Lm { learn, .. } => learn
            .iter()
            .for_each(|learn| hash.update([u8::from(*learn)])),
        Example::Class { label, .. } => hash.update((*label as u64).to_le_bytes()),
        Example::Labels { labels, .. } => {
            hash.update((labels.len() as u64).to_le_bytes());
            labels
                .iter()
                .for_each(|label| hash.update((*label as u64).to_le_bytes()));
        }
        Example::Score { score, .. } => hash.update(score.value().to_bits().to_le_bytes()),
    }
}
