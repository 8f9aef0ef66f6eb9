//! What a job would take: its own first steps, tried on the engine and thrown away.
//!
//! A formula knows neither the machine nor the traffic beside it, so the trainer is given the job's plan for about a second. The
//! trial has its turns as a job of the tenant would. This file must not know what a step is made of.

use std::time::{Duration, Instant};

use espalier_engine::error::EngineError;
use espalier_engine::train::trainer::{Footprint, TrainEvent, TrainPlan};
use espalier_engine::train::{JobEvent, TrainingSubmission};
use tokio::time::timeout_at;

use super::spec::JobSpec;
use super::{JobError, JobService, Started, Wish, rows};
use crate::names::TenantId;

/// A trial that has measured something ends after this long.
const TRIAL: Duration = Duration::from_secs(1);
/// And every one after this long.
const LONGEST_TRIAL: Duration = Duration::from_secs(15);
/// Steps that say enough; the first of them also touches the memory.
const STEPS: u64 = 3;
/// A pass that only judges, as a part of one that learns: half of its products.
const JUDGING: f64 = 0.5;

/// What a job would take.
#[derive(Debug, Clone, Default)]
pub struct Estimate {
    /// Seconds from its start to its end, beside what the server does now.
    pub seconds: Option<f64>,
    /// Tokens a second that were measured.
    pub tokens_per_second: f64,
    /// What it would train and hold; `None` when the engine had no place to try it.
    pub footprint: Option<Footprint>,
    /// Jobs that would have their turn before it.
    pub queue_position: u32,
    /// Why nothing was measured, in words.
    pub unmeasured: String,
}

/// The whole run.
struct Work {
    tokens_per_example: f64,
    /// Tokens in passes that learn.
    learned: f64,
    /// Tokens in passes that judge.
    judged: f64,
}

/// What a trial has seen.
#[derive(Default)]
struct Trial {
    footprint: Option<Footprint>,
    /// When the first and the last report came, and the tokens done by then.
    first: Option<(Instant, f64)>,
    last: Option<(Instant, f64)>,
    reports: u64,
}

impl JobService {
    pub(super) async fn estimate(
        &self,
        tenant: TenantId,
        spec: &JobSpec,
        plan: TrainPlan,
    ) -> Result<Estimate, JobError> {
        let work = Work::of(spec, &plan);
        let submission = TrainingSubmission {
            job: "estimate".to_owned(),
            tenant: tenant.as_str().into(),
            plan: tried(plan),
            checkpoint: None,
        };
        let mut estimate = Estimate {
            queue_position: self.queue_position().await?,
            ..Estimate::default()
        };
        let started = match self.inner.trainers.start(submission) {
            Ok(started) => started,
            Err(
                error @ (EngineError::TrainingCapacity { .. } | EngineError::Overloaded { .. }),
            ) => {
                estimate.unmeasured = error.to_string();
                return Ok(estimate);
            }
            Err(error) => return Err(error.into()),
        };
        let trial = Trial::run(started, work.tokens_per_example).await?;
        estimate.footprint = trial.footprint;
        match trial.rate() {
            Some(rate) => {
                estimate.tokens_per_second = rate;
                estimate.seconds = Some(work.seconds(rate));
            }
            None => estimate.unmeasured = "no step was done in time: the server is busy".to_owned(),
        }
        Ok(estimate)
    }

    async fn queue_position(&self) -> Result<u32, JobError> {
        let waiting = self.inner.parts.database.read(rows::queued).await?;
        let free = self.inner.parts.limits.max_active > self.at_work().len();
        Ok(if free { 0 } else { waiting })
    }
}

/// The plan with so little to measure on that its first steps come soon.
fn tried(mut plan: TrainPlan) -> TrainPlan {
    if let Some(valid) = &mut plan.valid {
        valid.items.truncate(1);
        valid.lines.truncate(1);
    }
    plan
}

// === impl Work ===

impl Work {
    fn of(spec: &JobSpec, plan: &TrainPlan) -> Self {
        let train = plan.train.stats();
        let valid = plan.valid.as_ref().map_or(0, |valid| valid.stats().tokens) as f64;
        let examples = train.examples.max(1) as f64;
        let tokens_per_example = train.tokens as f64 / examples;
        if spec.head_only() {
            // Every state is computed once; the head's own steps are nothing beside that.
            return Self {
                tokens_per_example,
                learned: train.tokens as f64 + valid,
                judged: 0.0,
            };
        }
        let steps = spec.hyper.max_steps.unwrap_or_default() as f64;
        let pass = (examples / plan.hp.batch_size as f64).ceil().max(1.0);
        let every = plan.hp.eval_steps.map_or(pass, |steps| steps as f64);
        Self {
            tokens_per_example,
            learned: steps / pass * train.tokens as f64,
            // The one before the first step, and the last.
            judged: (steps / every + 2.0).floor() * valid,
        }
    }

    fn seconds(&self, tokens_per_second: f64) -> f64 {
        (self.learned + JUDGING * self.judged) / tokens_per_second
    }
}

// === impl Trial ===

impl Trial {
    /// Follows a trainer until enough is known, and ends it.
    async fn run(mut started: Started, tokens_per_example: f64) -> Result<Self, JobError> {
        let mut trial = Self::default();
        let end = tokio::time::Instant::now() + LONGEST_TRIAL;
        while let Ok(Some(event)) = timeout_at(end, started.events.recv()).await {
            match event {
                JobEvent::Started(footprint) => {
                    trial.footprint = Some(footprint);
                    trial.first = Some((Instant::now(), 0.0));
                }
                JobEvent::Progress(TrainEvent::Step(report)) => {
                    trial.report(report.total_tokens as f64);
                }
                JobEvent::Progress(TrainEvent::Embedded { done, .. }) => {
                    trial.report(done as f64 * tokens_per_example);
                }
                JobEvent::Progress(_) => {}
                JobEvent::Failed(error) => return Err(error.into()),
                JobEvent::Finished { .. } | JobEvent::Cancelled | JobEvent::Suspended => break,
            }
            if trial.knows_enough() {
                break;
            }
        }
        (started.end)(Wish::Cancel);
        Ok(trial)
    }

    fn report(&mut self, tokens: f64) {
        let now = (Instant::now(), tokens);
        self.reports += 1;
        // The first one grew every buffer, so what follows is measured from it.
        if self.reports == 1 {
            self.last = Some(now);
            return;
        }
        if self.reports == 2 {
            self.first = self.last;
        }
        self.last = Some(now);
    }

    fn knows_enough(&self) -> bool {
        let began = self.first.map(|(began, _)| began.elapsed());
        self.reports >= STEPS && began.is_some_and(|began| began >= TRIAL)
    }

    fn rate(&self) -> Option<f64> {
        let ((began, before), (ended, after)) = (self.first?, self.last?);
        let seconds = ended.duration_since(began).as_secs_f64();
        (seconds > 0.0 && after > before).then(|| (after - before) / seconds)
    }
}
