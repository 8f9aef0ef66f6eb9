//! The ladder of a classification job: a head on cached states of the frozen base goes live first; LoRA with a head of its own
//! follows in the same job, and takes the head's place only where the validation rows say that it is better.
//!
//! Which rung a job is on stands in its progress, written in the transaction that publishes the head: after a crash at any
//! point the head is fitted again from its last checkpoint, or it is live and LoRA goes on from its own. This file must not
//! know the wire, nor how either is trained.

use espalier_adapters::train::checkpoint::Bits;
use espalier_engine::train::trainer::{HyperParameters, Summary};
use serde::{Deserialize, Serialize};

use super::JobError;
use super::classification::{ClassOptions, invalid};
use super::defaults::{Choices, Circumstances, hyper_parameters};
use super::events::Progress;
use super::plan::Material;
use super::spec::{HyperRequest, JobLimits, JobMethod, JobSpec};

/// The head that is live, and what LoRA has to beat.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FirstRung {
    /// Canonical name of its version.
    pub version: String,
    /// Of the validation rows. As bits: a decimal may come back as another number, which would decide otherwise after a crash.
    pub loss: Bits,
    /// Of them; regression has none.
    pub accuracy: Option<Bits>,
}

/// The hyperparameters of the first rung, which are the server's for heads: those of the request are LoRA's.
///
/// # Errors
/// [`JobError::InvalidField`] where there is nothing to climb from, to or by.
pub(super) fn first_rung(
    (method, options): (&JobMethod, &ClassOptions),
    from: bool,
    at: &Circumstances,
    limits: &JobLimits,
) -> Result<Option<HyperParameters>, JobError> {
    if !options.ladder {
        return Ok(None);
    }
    let head_only = matches!(
        method,
        JobMethod::Classification {
            head_only: true,
            ..
        }
    );
    let reason = if head_only {
        "head_only is set too, and the ladder ends in LoRA: leave one of them out"
    } else if from {
        "from_version is set too, and the ladder begins with a head of its own: leave one of them out"
    } else if !at.validated {
        "there is no validation data to choose by: set validation_data or validation_fraction"
    } else {
        // The choices that a job tells are those of the rung that it was asked for.
        let choices = &mut Choices::default();
        let (hyper, _) = hyper_parameters(&HyperRequest::default(), at, true, limits, choices)?;
        return Ok(Some(hyper));
    };
    Err(invalid("ladder", reason))
}

// === impl JobSpec ===

impl JobSpec {
    /// Whether a job with this progress is to fit the ladder's head.
    pub(super) fn on_first_rung(&self, progress: &Progress) -> bool {
        self.first_rung.is_some() && progress.first_rung.is_none()
    }
}

// === impl Material ===

impl Material {
    /// The spec of the rung that a job is on.
    pub(super) fn rung(spec: &JobSpec, first: bool) -> JobSpec {
        let mut spec = spec.clone();
        if let (true, Some(hyper)) = (first, spec.first_rung.take()) {
            spec.hyper = hyper;
            (spec.lora, spec.way) = (None, None);
            if let JobMethod::Classification { head_only, .. } = &mut spec.method {
                *head_only = true;
            }
        }
        spec
    }
}

// === impl FirstRung ===

impl FirstRung {
    /// Of a head that has just been published.
    pub(super) fn of(version: String, method: &JobMethod, summary: &Summary) -> Self {
        let (accuracy, loss) = measured(method, summary);
        Self {
            version,
            loss: Bits(loss),
            accuracy: accuracy.map(Bits),
        }
    }

    /// Whether a run is better: more right answers, or as many with less loss; of numbers, less loss.
    pub(super) fn beaten_by(&self, method: &JobMethod, summary: &Summary) -> bool {
        let (accuracy, loss) = measured(method, summary);
        match (accuracy, self.accuracy) {
            (Some(new), Some(Bits(old))) if new != old => new > old,
            _ => loss < self.loss.0,
        }
    }

    /// Why it stays, in words.
    pub(super) fn stays(&self, method: &JobMethod, summary: &Summary) -> String {
        let says = |accuracy: Option<f64>, loss: f64| match accuracy {
            Some(share) => format!("{:.1} % right, loss {loss:.4}", share * 100.0),
            None => format!("loss {loss:.4}"),
        };
        let (accuracy, loss) = measured(method, summary);
        format!(
            "{} stays live: on the validation rows LoRA is no better ({}) than the head alone ({})",
            self.version,
            says(accuracy, loss),
            says(self.accuracy.map(|bits| bits.0), self.loss.0)
        )
    }
}

/// Accuracy and loss of the evaluation whose weights are kept; a run that was never measured is worse than any.
fn measured(method: &JobMethod, summary: &Summary) -> (Option<f64>, f64) {
    match summary.best {
        Some(best) => (method.accuracy(best.accuracy), best.loss),
        None => (method.accuracy(0.0), f64::INFINITY),
    }
}

#[cfg(test)]
mod tests {
    use espalier_adapters::head::Problem;
    use espalier_engine::train::trainer::EvalReport;

    use super::*;

    fn method(problem: Problem) -> JobMethod {
        JobMethod::Classification {
            head_only: false,
            labels: Vec::new(),
            options: ClassOptions {
                problem,
                ..ClassOptions::default()
            },
        }
    }

    fn summary(accuracy: f64, loss: f64) -> Summary {
        Summary {
            best: Some(EvalReport {
                accuracy,
                loss,
                ..EvalReport::default()
            }),
            ..Summary::default()
        }
    }

    #[test]
    fn more_right_answers_win_and_loss_breaks_ties() {
        let labels = method(Problem::SingleLabel);
        let head = FirstRung::of("v/1".to_owned(), &labels, &summary(0.8, 0.5));
        for (accuracy, loss, wins) in [
            (0.81, 0.9, true),
            (0.8, 0.4, true),
            (0.8, 0.5, false),
            (0.8, 0.6, false),
            (0.7, 0.1, false),
        ] {
            let found = head.beaten_by(&labels, &summary(accuracy, loss));
            assert_eq!(found, wins, "{accuracy} {loss}");
        }
        assert!(!head.beaten_by(&labels, &Summary::default()));
        let said = head.stays(&labels, &summary(0.7, 0.1));
        assert!(said.contains("v/1") && said.contains("70.0 %"), "{said}");
        let number = method(Problem::Regression);
        let head = FirstRung::of("v/1".to_owned(), &number, &summary(0.0, 0.5));
        assert!(head.beaten_by(&number, &summary(0.0, 0.4)));
        assert!(!head.beaten_by(&number, &summary(1.0, 0.6)));
    }
}
