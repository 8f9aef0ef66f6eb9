//! What a head learns of an example: its target, what it counts, and the loss that its problem has.
//!
//! It must not know passes, steps or whose examples they are.

use espalier_adapters::batch::Dropout;
use espalier_adapters::head::{HeadSettings, Pooling, Problem, check_hidden};
use espalier_adapters::ops::Backend;
use espalier_adapters::train::examples::Example;
use espalier_adapters::train::head_loss::dense_loss;
use espalier_adapters::train::loss::{Judged, LossBuffers, Target, softmax_cross_entropy};

use super::plan::{HeadOptions, Method, TrainError};
use super::share::Numbered;
use crate::model::Buf;

/// What examples are to a job: tokens that count one each, or answers of a head.
#[derive(Debug, Default)]
pub(super) struct Objective {
    options: HeadOptions,
    /// Rows of the head; 0 without one.
    labels: usize,
}

/// What a head is to say about some examples.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub(super) targets: Vec<Target>,
    /// `[targets, labels]`, for problems that do not ask for one label.
    pub(super) dense: Vec<f32>,
    /// Of what a head reads in training, one key for each target.
    pub(super) dropout: Option<Dropout>,
}

// === impl Objective ===

impl Objective {
    pub(super) fn of(method: &Method) -> Self {
        match method {
            Method::Lm => Self::default(),
            Method::Class {
                labels, options, ..
            } => Self {
                options: options.clone(),
                labels: labels.len(),
            },
        }
    }

    /// Which states a head reads.
    pub(super) fn pooling(&self) -> Pooling {
        self.options.pooling
    }

    /// What a head drops of its inputs in a step on these examples; nothing where none is asked for.
    pub(super) fn dropout(
        &self,
        examples: &[Numbered<'_>],
        (seed, step): (u64, u64),
    ) -> Option<Dropout> {
        let rate = self.options.dropout;
        // No token stands there, so what is dropped of a head says nothing of what is dropped of LoRA's inputs.
        let key = |number| Dropout::row_key(seed, step, number, u64::MAX);
        (rate > 0.0).then(|| Dropout {
            rate,
            row_keys: examples.iter().map(|(number, _)| key(*number)).collect(),
        })
    }

    /// What a target counts in its batch's mean.
    pub(super) fn counts(&self, target: &Target) -> f64 {
        let weights = self.options.class_weights.as_ref();
        let weight = weights.and_then(|weights| weights.get(target.label as usize));
        weight.map_or(1.0, |weight| f64::from(*weight))
    }

    /// The sum of what the examples' targets count.
    pub(super) fn total<'a>(&self, examples: impl Iterator<Item = &'a Example>) -> f64 {
        let of = |example: &Example| match example {
            Example::Class { label, .. } => self.counts(&target(0, *label as u32, 1.0)),
            other => other.targets() as f64,
        };
        examples.map(of).sum()
    }

    /// Notes what is wanted of an example at a row of states, by `scale` times what it counts. Tokens are not its matter.
    pub(super) fn want(&self, row: usize, example: &Example, scale: f32, wanted: &mut Wanted) {
        let first = wanted.dense.len();
        let label = match example {
            Example::Lm { .. } => return,
            Example::Class { label, .. } => *label as u32,
            Example::Labels { labels, .. } => {
                wanted.dense.resize(first + self.labels, 0.0);
                labels
                    .iter()
                    .for_each(|label| wanted.dense[first + label] = 1.0);
                0
            }
            Example::Score { score, .. } => {
                wanted.dense.push(score.value() as f32);
                0
            }
        };
        let mut target = target(row, label, scale);
        if matches!(example, Example::Class { .. }) && self.options.class_weights.is_some() {
            target.weight *= self.counts(&target) as f32;
        }
        wanted.targets.push(target);
    }

    /// Losses of logits `[targets, labels]`, exact, and their weighted gradients.
    pub(super) fn judge(
        &self,
        ops: &Backend,
        (logits, wanted): (&Buf, &Wanted),
        dlogits: &mut Buf,
        loss: &mut LossBuffers<Backend>,
    ) -> Vec<Judged> {
        let problem = self.options.problem;
        match problem {
            Problem::SingleLabel => {
                softmax_cross_entropy(ops, logits, &wanted.targets, dlogits, loss)
            }
            Problem::MultiLabel | Problem::Regression => {
                let wanted = (wanted.targets.as_slice(), wanted.dense.as_slice());
                dense_loss(ops, problem, logits, wanted, dlogits)
            }
        }
    }
}

fn target(row: usize, label: u32, weight: f32) -> Target {
    Target { row, label, weight }
}

// === impl HeadOptions ===

impl HeadOptions {
    /// What is known of the head before anything is fitted.
    pub(super) fn settings(&self) -> HeadSettings {
        HeadSettings {
            problem: self.problem,
            hidden_layers: self.hidden_layers.clone(),
            activation: self.activation,
            pooling: self.pooling,
            ..HeadSettings::default()
        }
    }

    /// # Errors
    /// [`TrainError::Plan`] on labels, weights or a share that the problem has no use for.
    pub(super) fn validate(&self, labels: usize) -> Result<(), TrainError> {
        let (least, most) = match self.problem {
            Problem::SingleLabel => (2, usize::MAX),
            Problem::MultiLabel => (1, usize::MAX),
            Problem::Regression => (1, 1),
        };
        if labels < least || labels > most {
            let wanted = if labels < least {
                "at least"
            } else {
                "at most"
            };
            let limit = labels.clamp(least, most);
            return Err(TrainError::plan(
                "labels",
                format!("{labels} is not {wanted} {limit}"),
            ));
        }
        if let Some(weights) = &self.class_weights {
            self.validate_weights(weights, labels)?;
        }
        if let Err((field, reason)) = check_hidden(&self.hidden_layers, self.activation) {
            return Err(TrainError::plan(field, reason));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let reason = format!("{} is not in 0..1", self.dropout);
            return Err(TrainError::plan("dropout", reason));
        }
        match self.out_of_scope_share {
            Some(_) if self.problem != Problem::SingleLabel => Err(TrainError::plan(
                "out_of_scope_share",
                format!("{} has no best label to doubt", self.problem.as_str()),
            )),
            Some(share) if !(0.0..=0.5).contains(&share) => Err(TrainError::plan(
                "out_of_scope_share",
                format!("{share} is not in 0..=0.5"),
            )),
            _ => Ok(()),
        }
    }

    fn validate_weights(&self, weights: &[f32], labels: usize) -> Result<(), TrainError> {
        let wrong = |reason: String| Err(TrainError::plan("class_weights", reason));
        if self.problem != Problem::SingleLabel {
            return wrong(format!("{} has none", self.problem.as_str()));
        }
        if weights.len() != labels {
            return wrong(format!("{} weights for {labels} labels", weights.len()));
        }
        match weights
            .iter()
            .find(|weight| !(**weight > 0.0 && weight.is_finite()))
        {
            Some(weight) => wrong(format!("{weight} is not above 0")),
            None => Ok(()),
        }
    }
}
