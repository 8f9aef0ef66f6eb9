//! Held-out examples: judging them while a run goes on, and what is fitted on them when it ends.
//!
//! Nothing here changes what is learned, but for the choice of the best evaluation's weights.

use std::sync::Arc;

use espalier_adapters::head::Problem;
use espalier_adapters::pace::{Pace, Stopped};
use espalier_adapters::train::calibration;
use espalier_adapters::train::checkpoint::{BestEval, Bits};
use espalier_adapters::train::loss::LossSum;
use espalier_adapters::train::quality::Quality;

use super::objective::Wanted;
use super::plan::{EvalReport, HeldOut, Method, TrainError};
use super::{Trainer, numbered};

/// Validation examples as a run's parameters answer them.
struct Judgement {
    sum: LossSum,
    /// `[examples, labels]` of a head; empty without one.
    logits: Vec<f32>,
    /// What was right.
    wanted: Wanted,
}

impl Trainer {
    /// Judges the validation examples, keeps the weights if they are the best so far, and says when patience has run out. What
    /// the run starts from is measured, not kept: who asks for training gets what was trained.
    pub(super) fn evaluate(&mut self, pace: &dyn Pace) -> Result<EvalReport, TrainError> {
        let judged = self.judge(pace)?;
        let quality = self.quality(&judged);
        let (step, loss) = (self.state.step, judged.sum.mean());
        let accuracy = match &quality {
            Some(quality) => quality.accuracy().unwrap_or(0.0),
            None => judged.sum.accuracy(),
        };
        if !loss.is_finite() {
            return Err(TrainError::NotFinite {
                what: "the validation loss",
                value: loss,
                step,
            });
        }
        let found = BestEval {
            step,
            loss: Bits(loss),
            accuracy: Bits(accuracy),
        };
        let best = step > 0 && self.state.best.is_none_or(|best| loss < best.loss.0);
        if step == 0 {
            self.state.baseline = Some(found);
        } else if best {
            self.state.best = Some(found);
            self.best = Some(self.learner.parameters());
            self.state.evals_without_better = 0;
        } else {
            self.state.evals_without_better += 1;
        }
        let patience = self.plan.hp.early_stopping_patience;
        self.state.stopped_early =
            patience.is_some_and(|patience| self.state.evals_without_better >= patience);
        Ok(EvalReport {
            step,
            loss,
            accuracy,
            macro_f1: quality.as_ref().and_then(Quality::macro_f1),
            best,
        })
    }

    /// How the weights that are kept answer the validation examples, and what is fitted on their answers; `None` without a head or
    /// without such examples. Temperature first, then the threshold on the scores that it gives.
    pub(super) fn held_out(&mut self, pace: &dyn Pace) -> Result<Option<HeldOut>, TrainError> {
        let plan = Arc::clone(&self.plan);
        let Method::Class {
            labels, options, ..
        } = &plan.method
        else {
            return Ok(None);
        };
        if plan.valid.is_none() {
            return Ok(None);
        }
        let judged = match self.best.clone() {
            Some(best) => {
                let last = self.learner.parameters();
                self.learner.set_parameters(&best);
                let judged = self.judge(pace);
                self.learner.set_parameters(&last);
                judged?
            }
            None => self.judge(pace)?,
        };
        let Some(quality) = self.quality(&judged) else {
            return Ok(None);
        };
        let mut settings = options.settings();
        let mut log_loss = None;
        if options.problem == Problem::SingleLabel {
            let right: Vec<u32> = judged.wanted.targets.iter().map(|t| t.label).collect();
            let given = (judged.logits.as_slice(), right.as_slice(), labels.len());
            let fitted = calibration::temperature(given.0, given.1, given.2);
            settings.temperature = fitted.map(|temperature| temperature as f32);
            settings.out_of_scope_below = options
                .out_of_scope_share
                .and_then(|share| calibration::out_of_scope_below(&settings, given, share));
            log_loss = Some(calibration::log_loss(&settings, given));
        }
        Ok(Some(HeldOut {
            examples: judged.wanted.targets.len() as u64,
            quality,
            log_loss,
            settings,
        }))
    }

    /// The validation examples' losses and, of a head, logits, with the parameters as they are now.
    fn judge(&mut self, pace: &dyn Pace) -> Result<Judgement, Stopped> {
        let plan = Arc::clone(&self.plan);
        let items = plan.valid.as_ref().map_or(&[][..], |valid| &valid.items);
        let examples = numbered(items);
        let mut wanted = Wanted::default();
        let objective = Arc::clone(&self.learner.objective);
        for (row, (_, example)) in examples.iter().enumerate() {
            objective.want(row, example, 0.0, &mut wanted);
        }
        let (sum, logits) = match self.states.take() {
            Some(states) => {
                let judged = self.learner.head_pass(&states.1, &wanted, false);
                self.states = Some(states);
                judged
            }
            None => self.learner.judge(&examples, pace)?,
        };
        Ok(Judgement {
            sum,
            logits,
            wanted,
        })
    }

    /// `None` of tokens.
    fn quality(&self, judged: &Judgement) -> Option<Quality> {
        let Method::Class {
            labels, options, ..
        } = &self.plan.method
        else {
            return None;
        };
        let (logits, labels) = (judged.logits.as_slice(), labels.len());
        Some(match options.problem {
            Problem::SingleLabel => {
                let right: Vec<u32> = judged.wanted.targets.iter().map(|t| t.label).collect();
                Quality::of_labels(logits, &right, labels)
            }
            problem => Quality::of_dense(problem, logits, &judged.wanted.dense, labels),
        })
    }
}
