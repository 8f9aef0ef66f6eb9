//! What a classification job is asked beside its labels, and what its head was found to be worth.
//!
//! Stored with the job. This file must not know the wire, nor how a head is trained.

use std::collections::BTreeMap;

use espalier_adapters::head::{Activation, Pooling, Problem, check_hidden};
use espalier_adapters::train::dataset::Kind;
use espalier_adapters::train::examples::{Example, Examples};
use espalier_adapters::train::quality::Quality;
use espalier_engine::train::trainer::{HeadOptions, HeldOut};
use serde::{Deserialize, Serialize};

use super::JobError;
use super::defaults::Choices;
use crate::registry::VersionSummary;

/// The share of right answers that may be called out of scope, where the request names none.
const OUT_OF_SCOPE_SHARE: f64 = 0.05;
/// A label may count so many times as much as another at most.
const MAX_CLASS_WEIGHT: f64 = 1e4;
/// Why a head alone reads the mean of all states. On a tenth of banking77's training rows that was held out, 83.5 % were right with
/// it and 80.1 % without.
const HEAD_ALONE_POOLS: &str = "a frozen base says more in all states than in the last one; \"last\" is what PEFT's files can hold";
/// Labels above which the confusion matrix is left out of a result: it would be larger than all else together.
const MAX_CONFUSION_LABELS: usize = 256;

/// How a head is to learn and answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClassOptions {
    /// What it answers; the rows decide.
    pub problem: Problem,
    /// Weigh labels by how seldom they are.
    pub balance: bool,
    /// What an example of each label counts; labels that are not named count 1.
    pub class_weights: BTreeMap<String, f64>,
    /// The share of right answers on validation that the fitted threshold may call out of scope.
    pub out_of_scope_share: Option<f64>,
    /// Fit and publish a head alone first.
    pub ladder: bool,
    /// Outputs of the fully connected layers below `score`, the first one first.
    pub hidden_layers: Vec<usize>,
    /// Behind each of them.
    pub activation: Option<Activation>,
    /// Which states it reads; settled in a job.
    pub pooling: Option<Pooling>,
    /// The probability that an input of one of its layers is dropped in training.
    pub dropout: f64,
}

/// What the kept head is worth, on the validation examples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassificationResult {
    /// What it answers.
    pub problem: Problem,
    /// Names of its rows.
    pub labels: Vec<String>,
    /// Examples that it was measured on.
    pub examples: u64,
    /// How well it answers; the confusion matrix is empty above 256 labels.
    pub quality: Quality,
    /// Mean of `-ln p(right label)` under the calibrated scores.
    pub log_loss: Option<f64>,
    /// Its fitted temperature.
    pub temperature: Option<f32>,
    /// Its fitted threshold.
    pub out_of_scope_below: Option<f32>,
}

/// Refuses a field of the method.
pub(super) fn invalid(field: &str, reason: impl Into<String>) -> JobError {
    JobError::InvalidField {
        field: format!("spec.classification.{field}"),
        reason: reason.into(),
    }
}

/// What a head answers that learns from rows of this kind.
pub(super) fn problem_of(kind: Kind) -> Problem {
    match kind {
        Kind::Labels => Problem::MultiLabel,
        Kind::Score => Problem::Regression,
        _ => Problem::SingleLabel,
    }
}

// === impl ClassOptions ===

impl ClassOptions {
    /// The same with the layers below `score` and what they read settled: as asked for, else as in the version to go on from. GELU
    /// stands behind layers whose activation is not named; the last token's state is read where nothing is said.
    ///
    /// # Errors
    /// [`JobError::InvalidField`] with field, value and limit.
    pub(super) fn stacked(
        &self,
        (from, head_only): (Option<&VersionSummary>, bool),
        choices: &mut Choices,
    ) -> Result<Self, JobError> {
        let mut stacked = self.clone();
        let open = self.hidden_layers.is_empty() && self.activation.is_none();
        if let Some(from) = from.filter(|from| open && !from.hidden_layers.is_empty()) {
            let widths: Vec<String> = from.hidden_layers.iter().map(usize::to_string).collect();
            let found = widths.join(", ");
            choices.make(
                "classification.hidden_layers",
                found,
                "those of from_version",
            );
            stacked.hidden_layers.clone_from(&from.hidden_layers);
            stacked.activation = from.activation;
        } else if !self.hidden_layers.is_empty() && self.activation.is_none() {
            let field = "classification.activation";
            choices.make(
                field,
                Activation::Gelu.as_str(),
                "smooth, and not flat at 0",
            );
            stacked.activation = Some(Activation::Gelu);
        }
        let with_head = from.filter(|from| !from.labels.is_empty());
        stacked.pooling = Some(match (self.pooling, with_head) {
            (Some(asked), _) => asked,
            (None, None) if head_only => {
                let (field, why) = ("classification.pooling", HEAD_ALONE_POOLS);
                choices.make(field, Pooling::Mean.reads(), why);
                Pooling::Mean
            }
            (None, None) => Pooling::Last,
            (None, Some(from)) => {
                if from.pooling != Pooling::Last {
                    let (field, why) = ("classification.pooling", "that of from_version");
                    choices.make(field, from.pooling.reads(), why);
                }
                from.pooling
            }
        });
        if !(0.0..1.0).contains(&self.dropout) {
            let reason = format!("{} is outside 0 to 1, 1 left out", self.dropout);
            return Err(invalid("dropout", reason));
        }
        check_hidden(&stacked.hidden_layers, stacked.activation)
            .map_err(|(field, reason)| invalid(field, reason))?;
        Ok(stacked)
    }

    /// The options of a new job: the rows' problem and every default. What the problem has no use for is refused.
    ///
    /// # Errors
    /// [`JobError::InvalidField`] with field, value and limit.
    pub(super) fn settled(&self, problem: Problem, validated: bool) -> Result<Self, JobError> {
        let single = problem == Problem::SingleLabel;
        let (balance, weights) = (self.balance, &self.class_weights);
        let rows = match problem {
            Problem::SingleLabel => "one label",
            Problem::MultiLabel => "several labels",
            Problem::Regression => "a number",
        };
        if !single && (balance || !weights.is_empty()) {
            let field = if balance {
                "balance_classes"
            } else {
                "class_weights"
            };
            return Err(invalid(
                field,
                format!(
                    "is for rows with one label each, and these have {rows} each: leave it out"
                ),
            ));
        }
        if balance && !weights.is_empty() {
            let reason = "class_weights is set too: name one of them";
            return Err(invalid("balance_classes", reason));
        }
        let least = 1.0 / MAX_CLASS_WEIGHT;
        if let Some((label, weight)) = weights
            .iter()
            .find(|(_, weight)| !(least..=MAX_CLASS_WEIGHT).contains(*weight))
        {
            let reason = format!("{weight} is outside {least} to {MAX_CLASS_WEIGHT}");
            return Err(invalid(&format!("class_weights[{label}]"), reason));
        }
        let share = match self.out_of_scope_share {
            Some(_) if !single => {
                let reason = format!("is for rows with one label each, and these have {rows} each");
                return Err(invalid("out_of_scope_share", reason));
            }
            Some(share) if !(0.0..=0.5).contains(&share) => {
                let reason = format!("{share} is outside 0 to 0.5");
                return Err(invalid("out_of_scope_share", reason));
            }
            Some(_) if !validated => {
                let reason = "there is no validation data to fit a threshold on: set validation_data or validation_fraction";
                return Err(invalid("out_of_scope_share", reason));
            }
            Some(share) => Some(share),
            None => (single && validated).then_some(OUT_OF_SCOPE_SHARE),
        };
        Ok(Self {
            problem,
            out_of_scope_share: share,
            ..self.clone()
        })
    }

    /// The trainer's options for these labels and examples.
    ///
    /// # Errors
    /// [`JobError::InvalidField`] on a weight of a label that is not there, or where a label without examples cannot be balanced.
    pub(super) fn head(
        &self,
        labels: &[String],
        train: &Examples,
    ) -> Result<HeadOptions, JobError> {
        Ok(HeadOptions {
            problem: self.problem,
            class_weights: if self.balance {
                Some(balanced(labels, train)?)
            } else {
                self.named(labels)?
            },
            out_of_scope_share: self.out_of_scope_share,
            hidden_layers: self.hidden_layers.clone(),
            activation: self.activation,
            pooling: self.pooling.unwrap_or_default(),
            dropout: self.dropout as f32,
        })
    }

    fn named(&self, labels: &[String]) -> Result<Option<Vec<f32>>, JobError> {
        if let Some(unknown) = self
            .class_weights
            .keys()
            .find(|label| !labels.contains(label))
        {
            let reason = format!("{unknown:?} is not among the labels {}", labels.join(", "));
            return Err(invalid("class_weights", reason));
        }
        let weight = |label| self.class_weights.get(label).map_or(1.0, |w| *w as f32);
        let weights = labels.iter().map(weight).collect();
        Ok((!self.class_weights.is_empty()).then_some(weights))
    }
}

/// `n / (k * n_c)` for each of k labels, n_c of the n examples to train on having it: scikit-learn's `balanced`.
fn balanced(labels: &[String], train: &Examples) -> Result<Vec<f32>, JobError> {
    let mut counts = vec![0_u64; labels.len()];
    for example in &train.items {
        if let Example::Class { label, .. } = example
            && let Some(count) = counts.get_mut(*label)
        {
            *count += 1;
        }
    }
    if let Some((label, _)) = labels.iter().zip(&counts).find(|(_, count)| **count == 0) {
        let reason = format!(
            "no example to train on has the label {label:?}, so that no weight balances it: add examples, or leave the label out"
        );
        return Err(invalid("balance_classes", reason));
    }
    let all = counts.iter().sum::<u64>() as f64 / labels.len() as f64;
    Ok(counts
        .iter()
        .map(|count| (all / *count as f64) as f32)
        .collect())
}

// === impl ClassificationResult ===

impl ClassificationResult {
    /// What a finished run found.
    pub(super) fn of(held: &HeldOut, labels: &[String]) -> Self {
        let mut quality = held.quality.clone();
        if let Quality::SingleLabel { confusion, .. } = &mut quality
            && labels.len() > MAX_CONFUSION_LABELS
        {
            confusion.clear();
        }
        Self {
            problem: held.settings.problem,
            labels: labels.to_vec(),
            examples: held.examples,
            quality,
            log_loss: held.log_loss,
            temperature: held.settings.temperature,
            out_of_scope_below: held.settings.out_of_scope_below,
        }
    }

    /// The numbers that a version is told with.
    pub(super) fn metrics(&self) -> Vec<(&'static str, f64)> {
        let quality: Vec<(&str, Option<f64>)> = match &self.quality {
            Quality::SingleLabel { macro_f1, .. } => vec![("macro_f1", Some(*macro_f1))],
            Quality::MultiLabel {
                macro_f1, micro_f1, ..
            } => vec![("macro_f1", Some(*macro_f1)), ("micro_f1", Some(*micro_f1))],
            Quality::Regression {
                mean_squared_error,
                mean_absolute_error,
                r_squared,
            } => vec![
                ("mean_squared_error", Some(*mean_squared_error)),
                ("mean_absolute_error", Some(*mean_absolute_error)),
                ("r_squared", *r_squared),
            ],
        };
        let fitted = [("calibrated_log_loss", self.log_loss)];
        let all = quality.into_iter().chain(fitted);
        all.filter_map(|(name, value)| Some((name, value?)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    fn train(labels: &[usize]) -> Examples {
        let class = |label: &usize| Example::Class {
            ids: vec![1],
            label: *label,
        };
        Examples {
            items: labels.iter().map(class).collect(),
            lines: (1..=labels.len() as u64).collect(),
            labels: None,
        }
    }

    #[test]
    fn balanced_weights_are_those_of_scikit_learn() {
        let names = ["a", "b", "c"].map(str::to_owned);
        let options = ClassOptions {
            balance: true,
            ..ClassOptions::default()
        };
        let head = options.head(&names, &train(&[0, 0, 0, 1, 1, 2])).unwrap();
        let expected = [6.0 / 9.0, 1.0, 2.0];
        let weights = head.class_weights.unwrap();
        for (found, expected) in weights.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{weights:?}");
        }
        let error = options
            .head(&names, &train(&[0, 1]))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("balance_classes") && error.contains("\"c\""),
            "{error}"
        );
    }

    #[test]
    fn layers_are_settled_and_bounded() {
        let asked = |layers: &[usize], activation| ClassOptions {
            hidden_layers: layers.to_vec(),
            activation,
            ..ClassOptions::default()
        };
        let mut choices = Choices::default();
        let settled = asked(&[64, 8], None)
            .stacked((None, false), &mut choices)
            .unwrap();
        assert_eq!(settled.activation, Some(Activation::Gelu));
        assert_eq!(choices.0.len(), 1, "{choices:?}");
        let from = VersionSummary {
            hidden_layers: vec![16],
            activation: Some(Activation::Tanh),
            ..VersionSummary::default()
        };
        let settled = asked(&[], None)
            .stacked((Some(&from), false), &mut choices)
            .unwrap();
        let expected = ClassOptions {
            pooling: Some(Pooling::Last),
            ..asked(&[16], Some(Activation::Tanh))
        };
        assert_eq!(settled, expected);
        let from = VersionSummary {
            labels: vec!["a".to_owned()],
            pooling: Pooling::Mean,
            ..VersionSummary::default()
        };
        let settled = asked(&[], None)
            .stacked((Some(&from), true), &mut choices)
            .unwrap();
        assert_eq!(settled.pooling, Some(Pooling::Mean));
        let alone = asked(&[], None).stacked((None, true), &mut choices);
        assert_eq!(alone.unwrap().pooling, Some(Pooling::Mean));
        let told = choices.0.last().unwrap();
        assert_eq!(told.field, "classification.pooling");
        for dropout in [-0.1, 1.0, f64::NAN] {
            let refused = ClassOptions {
                dropout,
                ..ClassOptions::default()
            };
            let error = refused
                .stacked((None, false), &mut choices)
                .unwrap_err()
                .to_string();
            assert!(error.contains("classification.dropout"), "{error}");
        }
        for (layers, activation, named) in [
            (&[12][..], None, "hidden_layers"),
            (&[0], None, "width of 0"),
            (&[8200], None, "8192"),
            (&[8; 9], None, "9 layers"),
            (&[], Some(Activation::Relu), "activation"),
        ] {
            let refused = asked(layers, activation).stacked((None, false), &mut choices);
            let error = refused.unwrap_err().to_string();
            assert!(error.contains(named), "{layers:?}: {error}");
        }
    }

    #[test]
    fn weights_by_name_and_what_is_refused() {
        let names = ["a", "b"].map(str::to_owned);
        let with = |label: &str, weight| ClassOptions {
            class_weights: [(label.to_owned(), weight)].into(),
            ..ClassOptions::default()
        };
        let weights = with("b", 2.5).head(&names, &train(&[0, 1])).unwrap();
        assert_eq!(weights.class_weights, Some(vec![1.0, 2.5]));
        let error = with("x", 2.0).head(&names, &train(&[0, 1])).unwrap_err();
        assert!(error.to_string().contains("\"x\""), "{error}");
        let single = |options: &ClassOptions, validated| {
            let settled = options.settled(Problem::SingleLabel, validated);
            settled.map_err(|error| error.to_string())
        };
        assert!(
            single(&with("a", 0.0), true)
                .unwrap_err()
                .contains("class_weights[a]")
        );
        let share = |share| ClassOptions {
            out_of_scope_share: Some(share),
            ..ClassOptions::default()
        };
        assert!(single(&share(0.6), true).unwrap_err().contains("0.6"));
        assert!(
            single(&share(0.1), false)
                .unwrap_err()
                .contains("validation")
        );
        let settled = single(&ClassOptions::default(), true).unwrap();
        assert_eq!(settled.out_of_scope_share, Some(OUT_OF_SCOPE_SHARE));
        let error = with("a", 2.0)
            .settled(Problem::Regression, true)
            .unwrap_err();
        assert!(error.to_string().contains("a number each"), "{error}");
    }
}
