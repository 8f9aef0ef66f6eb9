//! How well a head answers held-out examples: pure functions of its logits and of what was right.
//!
//! All in f64 over counts, so that the same logits give the same numbers anywhere. This file must not know models or examples' texts.

use serde::{Deserialize, Serialize};

use crate::head::Problem;

/// How well a head answers. Means over labels leave out those that neither occur nor are ever said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quality {
    /// One label each.
    SingleLabel {
        /// Share of right answers.
        accuracy: f64,
        /// Mean over labels of F1.
        macro_f1: f64,
        /// Counts `[right label, label said]`, row-major.
        confusion: Vec<u64>,
    },
    /// Any number of labels each; a label is said where its sigmoid is above 0.5.
    MultiLabel {
        /// Share of examples with exactly the right labels.
        accuracy: f64,
        /// Mean over labels of F1.
        macro_f1: f64,
        /// F1 of all labels' decisions together.
        micro_f1: f64,
    },
    /// A number each.
    Regression {
        /// Mean of squared errors.
        mean_squared_error: f64,
        /// Mean of absolute errors.
        mean_absolute_error: f64,
        /// One less the squared errors over those of the mean; `None` where all right numbers are the same.
        r_squared: Option<f64>,
    },
}

/// A label's decisions.
#[derive(Clone, Copy, Default)]
struct Decisions {
    /// Said and right.
    hits: u64,
    /// Said and wrong.
    alarms: u64,
    /// Right and not said.
    misses: u64,
}

impl Decisions {
    /// `2 hits / (2 hits + alarms + misses)`; `None` where the label neither occurs nor is said.
    fn f1(self) -> Option<f64> {
        let all = 2 * self.hits + self.alarms + self.misses;
        (all > 0).then(|| 2.0 * self.hits as f64 / all as f64)
    }
}

fn macro_f1(labels: &[Decisions]) -> f64 {
    let f1: Vec<f64> = labels.iter().filter_map(|label| label.f1()).collect();
    f1.iter().sum::<f64>() / f1.len().max(1) as f64
}

/// The first of the largest.
#[must_use]
pub fn likeliest(logits: &[f32]) -> usize {
    let mut best = 0;
    for (at, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = at;
        }
    }
    best
}

impl Quality {
    /// Of `logits [examples, labels]` against what is right of each: the row of its label.
    #[must_use]
    pub fn of_labels(logits: &[f32], right: &[u32], labels: usize) -> Self {
        let mut confusion = vec![0; labels * labels];
        for (row, right) in logits.chunks_exact(labels).zip(right) {
            confusion[*right as usize * labels + likeliest(row)] += 1;
        }
        let of = |label: usize| {
            let hits = confusion[label * labels + label];
            let said: u64 = (0..labels).map(|r| confusion[r * labels + label]).sum();
            let occurs: u64 = (0..labels).map(|s| confusion[label * labels + s]).sum();
            Decisions {
                hits,
                alarms: said - hits,
                misses: occurs - hits,
            }
        };
        let decisions: Vec<Decisions> = (0..labels).map(of).collect();
        let hits: u64 = decisions.iter().map(|label| label.hits).sum();
        Self::SingleLabel {
            accuracy: hits as f64 / right.len().max(1) as f64,
            macro_f1: macro_f1(&decisions),
            confusion,
        }
    }

    /// Of `logits [examples, labels]` against `wanted` of the same shape, 1 where a label applies; or against numbers, with one
    /// label.
    #[must_use]
    pub fn of_dense(problem: Problem, logits: &[f32], wanted: &[f32], labels: usize) -> Self {
        match problem {
            Problem::Regression => regression(logits, wanted),
            _ => multi_label(logits, wanted, labels),
        }
    }

    /// Share of right answers; regression has none.
    #[must_use]
    pub fn accuracy(&self) -> Option<f64> {
        match self {
            Self::SingleLabel { accuracy, .. } | Self::MultiLabel { accuracy, .. } => {
                Some(*accuracy)
            }
            Self::Regression { .. } => None,
        }
    }

    /// Mean over labels of F1; regression has none.
    #[must_use]
    pub fn macro_f1(&self) -> Option<f64> {
        match self {
            Self::SingleLabel { macro_f1, .. } | Self::MultiLabel { macro_f1, .. } => {
                Some(*macro_f1)
            }
            Self::Regression { .. } => None,
        }
    }
}

fn multi_label(logits: &[f32], wanted: &[f32], labels: usize) -> Quality {
    let mut decisions = vec![Decisions::default(); labels];
    let (mut exact, mut examples) = (0_u64, 0_u64);
    for (row, wanted) in logits.chunks_exact(labels).zip(wanted.chunks_exact(labels)) {
        let mut all = true;
        for ((logit, wanted), label) in row.iter().zip(wanted).zip(&mut decisions) {
            match (*logit > 0.0, *wanted > 0.5) {
                (true, true) => label.hits += 1,
                (true, false) => label.alarms += 1,
                (false, true) => label.misses += 1,
                (false, false) => continue,
            }
            all &= (*logit > 0.0) == (*wanted > 0.5);
        }
        exact += u64::from(all);
        examples += 1;
    }
    let together = decisions
        .iter()
        .fold(Decisions::default(), |sum, label| Decisions {
            hits: sum.hits + label.hits,
            alarms: sum.alarms + label.alarms,
            misses: sum.misses + label.misses,
        });
    Quality::MultiLabel {
        accuracy: exact as f64 / examples.max(1) as f64,
        macro_f1: macro_f1(&decisions),
        micro_f1: together.f1().unwrap_or(0.0),
    }
}

fn regression(found: &[f32], wanted: &[f32]) -> Quality {
    let count = wanted.len().max(1) as f64;
    let errors = || {
        let pairs = found.iter().zip(wanted);
        pairs.map(|(found, wanted)| f64::from(*found) - f64::from(*wanted))
    };
    let squares: f64 = errors().map(|error| error * error).sum();
    let mean = wanted.iter().map(|w| f64::from(*w)).sum::<f64>() / count;
    let spread: f64 = wanted.iter().map(|w| (f64::from(*w) - mean).powi(2)).sum();
    Quality::Regression {
        mean_squared_error: squares / count,
        mean_absolute_error: errors().map(f64::abs).sum::<f64>() / count,
        r_squared: (spread > 0.0).then(|| 1.0 - squares / spread),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As scikit-learn 1.5 computes them for the same answers.
    #[test]
    fn one_label() {
        let says = |label: usize| {
            let mut row = [0.0f32; 4];
            row[label] = 1.0;
            row
        };
        let said = [0, 0, 1, 2, 2, 2].map(says).concat();
        let quality = Quality::of_labels(&said, &[0, 1, 1, 2, 2, 0], 4);
        let Quality::SingleLabel {
            accuracy,
            macro_f1,
            confusion,
        } = quality
        else {
            panic!("{quality:?}")
        };
        assert!((accuracy - 4.0 / 6.0).abs() < 1e-12);
        // F1 of 0.5, 2/3 and 0.8; the fourth label neither occurs nor is said.
        assert!((macro_f1 - (0.5 + 2.0 / 3.0 + 0.8) / 3.0).abs() < 1e-12);
        assert_eq!(confusion[..4], [1, 0, 1, 0]);
        assert_eq!(confusion[4..8], [1, 1, 0, 0]);
    }

    #[test]
    fn several_labels() {
        let logits = [1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -2.0, 3.0, -1.0];
        let wanted = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0];
        let quality = Quality::of_dense(Problem::MultiLabel, &logits, &wanted, 3);
        let Quality::MultiLabel {
            accuracy,
            macro_f1,
            micro_f1,
        } = quality
        else {
            panic!("{quality:?}")
        };
        assert!((accuracy - 1.0 / 3.0).abs() < 1e-12);
        assert!((macro_f1 - 2.0 / 3.0).abs() < 1e-12, "1, 0 and 1");
        assert!((micro_f1 - 6.0 / 8.0).abs() < 1e-12);
    }

    #[test]
    fn numbers() {
        let quality = Quality::of_dense(Problem::Regression, &[1.0, 2.0, 5.0], &[1.0, 3.0, 2.0], 1);
        let Quality::Regression {
            mean_squared_error,
            mean_absolute_error,
            r_squared,
        } = quality
        else {
            panic!("{quality:?}")
        };
        assert!((mean_squared_error - 10.0 / 3.0).abs() < 1e-12);
        assert!((mean_absolute_error - 4.0 / 3.0).abs() < 1e-12);
        assert!((r_squared.unwrap_or(0.0) + 4.0).abs() < 1e-12);
        let flat = Quality::of_dense(Problem::Regression, &[1.0, 2.0], &[3.0, 3.0], 1);
        assert!(matches!(
            flat,
            Quality::Regression {
                r_squared: None,
                ..
            }
        ));
    }
}
