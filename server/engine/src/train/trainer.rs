//! Trains one adapter: cuts examples in batches and micro-batches, runs the decoder forward and back, steps the optimizer.
//!
//! What a micro-batch holds, and in what order, is a pure function of the plan; pauses move only the moments at which
//! it goes on. The trainer must not know serving, jobs or storage: it breathes, and it reports.

mod company;
mod diagnosis;
mod footprint;
mod head;
mod learner;
mod objective;
mod passes;
mod plan;
mod share;
mod start;
#[cfg(test)]
mod tests;
mod validation;

use std::sync::Arc;

use espalier_adapters::config::{AdapterConfig, LoraConfig};
use espalier_adapters::linear::{BuildError, ResidentAdapter, Tensor};
use espalier_adapters::ops::{Backend, Buffer, Ops};
use espalier_adapters::peft;
use espalier_adapters::train::checkpoint::{BestEval, Bits, Checkpoint, RunState};
use espalier_adapters::train::examples::Example;
use espalier_adapters::train::loss::LossSum;
use espalier_adapters::train::optimizer::{AdamW, Group, clip};
use espalier_adapters::train::schedule::Schedule;
use espalier_adapters::weights::AdapterWeights;
use rand::seq::SliceRandom;

use crate::model::{Buf, Model};
use learner::Learner;
use objective::{Objective, Wanted};
use share::Numbered;

pub use company::{Company, Interrupted, RunPass, by_itself};
pub use diagnosis::Diagnosis;
pub use espalier_adapters::pace::{Pace, Stopped};
pub use espalier_adapters::train::schedule::Decay;
pub use footprint::Footprint;
pub use plan::{
    EvalReport, Finished, HeadOptions, HeldOut, HyperParameters, Method, StepReport, Summary,
    TrainError, TrainEvent, TrainPlan,
};
pub use share::Share;

/// Parameters that the optimizer updates between two breaths.
const UPDATE_CHUNK: usize = 1 << 19;

/// Steps between two checkpoints where the plan says nothing.
const CHECKPOINT_STEPS: u64 = 50;

/// A training run between two steps.
pub struct Trainer {
    plan: Arc<TrainPlan>,
    learner: Learner,
    optimizer: AdamW<Backend>,
    state: RunState,
    best: Option<Vec<f32>>,
    footprint: Footprint,
    schedule: Schedule,
    /// At the last step.
    noticed: Vec<Diagnosis>,
    /// `[examples, hidden]` of the training and validation examples, when the head trains alone; computed when first needed.
    states: Option<(Vec<f32>, Vec<f32>)>,
}

impl std::fmt::Debug for Trainer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trainer")
            .field("state", &self.state)
            .field("schedule", &self.schedule)
            .finish_non_exhaustive()
    }
}

// === impl Trainer ===

impl Trainer {
    /// A run before its first step.
    ///
    /// # Errors
    /// [`TrainError::Plan`] when the plan cannot be carried out on this model.
    pub fn new(model: Arc<Model>, plan: TrainPlan) -> Result<Self, TrainError> {
        plan.validate(model.config().vocab, model.config().context_length)?;
        let weights = start::initial(&plan, &model)?;
        let adapter =
            ResidentAdapter::trainable(&weights, model.as_ref()).map_err(|error| match error {
                BuildError::Misfit(misfit) => TrainError::plan("init", misfit.to_string()),
                BuildError::OutOfMemory(error) => TrainError::OutOfMemory(error),
            })?;
        let state = RunState {
            plan: plan.digest(model.config()),
            ..RunState::default()
        };
        let lora = plan.adapter.as_ref().and_then(AdapterConfig::lora);
        let dropout = lora.map_or(0.0, |lora| lora.lora_dropout as f32);
        let limits = (plan.hp.activation_bytes, dropout);
        let objective = Objective::of(&plan.method);
        let learner = Learner::new(Arc::clone(&model), (adapter, objective), limits, plan.seed);
        let footprint = Footprint::of(&plan, &learner, model.config());
        let optimizer = AdamW::new(&learner.ops, learner.adapter.parameter_count());
        let schedule = schedule(&plan);
        Ok(Self {
            plan: Arc::new(plan),
            learner,
            optimizer,
            state,
            best: None,
            footprint,
            schedule,
            noticed: Vec::new(),
            states: None,
        })
    }

    /// A run that goes on after a checkpoint's steps. It ends bit-equal to one without a break.
    ///
    /// # Errors
    /// [`TrainError::Checkpoint`] when the bytes are broken or another plan's.
    pub fn resume(
        model: Arc<Model>,
        plan: TrainPlan,
        checkpoint: &[u8],
    ) -> Result<Self, TrainError> {
        let mut trainer = Self::new(model, plan)?;
        let broken = |error: &dyn std::fmt::Display| TrainError::Checkpoint(error.to_string());
        let checkpoint = Checkpoint::from_bytes(checkpoint).map_err(|error| broken(&error))?;
        if checkpoint.state.plan != trainer.state.plan {
            return Err(broken(&"it was made with another plan, data set or base"));
        }
        let count = trainer.learner.adapter.parameter_count();
        if count != checkpoint.params.len() {
            return Err(broken(&format!(
                "{} parameters, not {count}",
                checkpoint.params.len(),
            )));
        }
        trainer.learner.set_parameters(&checkpoint.params);
        let (ops, optimizer) = (&trainer.learner.ops, &mut trainer.optimizer);
        ops.write(&checkpoint.mean, optimizer.mean.all_mut());
        ops.write(&checkpoint.square, optimizer.square.all_mut());
        optimizer.step = checkpoint.state.step;
        trainer.state = checkpoint.state;
        trainer.best = checkpoint.best;
        Ok(trainer)
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.state.step
    }

    /// What it trains and holds.
    pub fn footprint(&self) -> Footprint {
        self.footprint
    }

    /// Steps in all, without early stopping.
    pub fn total_steps(&self) -> u64 {
        self.schedule.total
    }

    /// The adapter as it is now.
    pub fn weights(&self) -> AdapterWeights {
        let weights = self.learner.adapter.weights(&self.learner.ops);
        weights.unwrap_or_default()
    }

    /// All remaining steps. After [`Stopped`] it may be called again: the interrupted step starts anew.
    ///
    /// # Errors
    /// [`TrainError::Stopped`] when the pace says so, [`TrainError::NotFinite`] when the run diverged.
    pub fn run(
        &mut self,
        pace: &dyn Company,
        events: &mut dyn FnMut(TrainEvent),
    ) -> Result<Finished, TrainError> {
        if self.plan.head_only() {
            pace.alone();
        }
        self.embed(pace, events)?;
        self.evaluate_if_due(pace, events)?;
        while self.state.step < self.schedule.total && !self.state.stopped_early {
            let report = self.next_step(pace)?;
            let step = report.step;
            events(TrainEvent::Step(report));
            for diagnosis in self.noticed.drain(..) {
                events(TrainEvent::Diagnosis { step, diagnosis });
            }
            self.evaluate_if_due(pace, events)?;
            let every = self.plan.hp.checkpoint_steps.unwrap_or(CHECKPOINT_STEPS);
            let running = step < self.schedule.total && !self.state.stopped_early;
            if every > 0 && step.is_multiple_of(every) && running {
                events(TrainEvent::Checkpoint {
                    step,
                    bytes: self.checkpoint()?,
                });
            }
        }
        self.finish(pace)
    }

    /// The run as bytes, for [`Trainer::resume`].
    ///
    /// # Errors
    /// [`TrainError::Checkpoint`] when the numbers cannot be written.
    pub fn checkpoint(&self) -> Result<Vec<u8>, TrainError> {
        let read = |moments: &Buf| {
            let mut numbers = vec![0.0; moments.len()];
            self.learner.ops.read(moments.all(), &mut numbers);
            numbers
        };
        let checkpoint = Checkpoint {
            state: self.state.clone(),
            params: self.learner.parameters(),
            mean: read(&self.optimizer.mean),
            square: read(&self.optimizer.square),
            best: self.best.clone(),
        };
        checkpoint
            .to_bytes()
            .map_err(|error| TrainError::Checkpoint(error.to_string()))
    }

    /// One optimizer step on a batch of the caller's choice, which need not be of the plan's data.
    ///
    /// # Errors
    /// As [`Trainer::run`]; [`TrainError::Plan`] on an empty batch.
    pub fn step_on(
        &mut self,
        batch: &[Example],
        pace: &dyn Company,
    ) -> Result<StepReport, TrainError> {
        let numbered: Vec<Numbered<'_>> = batch
            .iter()
            .enumerate()
            .map(|(i, e)| (i as u64, e))
            .collect();
        if numbered.is_empty() {
            return Err(TrainError::plan("batch", "holds no example"));
        }
        let states = match self.plan.head_only() {
            true => Some(self.learner.pooled_states(&numbered, pace, &mut |_| ())?),
            false => None,
        };
        self.step(&numbered, states.as_deref(), pace)
    }

    /// States of all examples, once, when the head trains alone.
    fn embed(
        &mut self,
        pace: &dyn Pace,
        events: &mut dyn FnMut(TrainEvent),
    ) -> Result<(), TrainError> {
        if !self.plan.head_only() || self.states.is_some() {
            return Ok(());
        }
        let plan = Arc::clone(&self.plan);
        let valid = plan.valid.as_ref().map_or(&[][..], |valid| &valid.items);
        let total = plan.train.items.len() + valid.len();
        let mut before = 0;
        let mut cached = Vec::new();
        for items in [&plan.train.items[..], valid] {
            let mut report = |done: usize| {
                events(TrainEvent::Embedded {
                    done: before + done,
                    total,
                })
            };
            cached.push(
                self.learner
                    .pooled_states(&numbered(items), pace, &mut report)?,
            );
            before += items.len();
        }
        self.states = cached.pop().and_then(|valid| Some((cached.pop()?, valid)));
        Ok(())
    }

    /// The examples of step `step`, counted from 0, in order: each epoch is a permutation of its own, drawn by seed, unless the
    /// plan keeps that of the data.
    fn batch(&self, step: u64) -> Vec<usize> {
        let count = self.plan.train.items.len();
        let (epoch, first) = position(&self.plan, step);
        let mut order: Vec<usize> = (0..count).collect();
        if self.plan.hp.shuffle {
            order.shuffle(&mut start::order(self.plan.seed, epoch));
        }
        order[first..(first + self.plan.hp.batch_size).min(count)].to_vec()
    }

    fn next_step(&mut self, pace: &dyn Company) -> Result<StepReport, TrainError> {
        let plan = Arc::clone(&self.plan);
        let chosen = self.batch(self.state.step);
        let batch: Vec<Numbered<'_>> = chosen
            .iter()
            .map(|i| (*i as u64, &plan.train.items[*i]))
            .collect();
        let states = self.states.as_ref().map(|(train, _)| {
            let width = train.len() / plan.train.items.len();
            chosen
                .iter()
                .flat_map(|i| &train[i * width..][..width])
                .copied()
                .collect::<Vec<f32>>()
        });
        self.step(&batch, states.as_deref(), pace)
    }

    /// One optimizer step. The loss is the mean over all targets of the batch, however it is cut.
    fn step(
        &mut self,
        batch: &[Numbered<'_>],
        states: Option<&[f32]>,
        pace: &dyn Company,
    ) -> Result<StepReport, TrainError> {
        let step = self.state.step + 1;
        let total = self.learner.objective.total(batch.iter().map(|(_, e)| *e));
        let scale = (1.0 / total) as f32;
        let sum = loop {
            self.learner.clear_gradients();
            let Some(states) = states else {
                match self.learner.learn(batch, (step, scale), pace) {
                    // Another job's failure, which ended that job: this one's step begins anew.
                    Err(Interrupted::Lost) => continue,
                    Err(Interrupted::Stopped(stopped)) => return Err(stopped.into()),
                    Ok(sum) => break sum,
                }
            };
            let mut wanted = self.wanted(batch, scale);
            let drawn = (self.plan.seed, step);
            wanted.dropout = self.learner.objective.dropout(batch, drawn);
            break self.learner.head_pass(states, &wanted, true).0;
        };
        pace.breathe()?;
        let grad_norm = self.learner.gradient_norm();
        for (what, value) in [("the loss", sum.mean()), ("the gradient norm", grad_norm)] {
            if !value.is_finite() {
                return Err(TrainError::NotFinite { what, value, step });
            }
        }
        self.notice(step, sum.mean(), grad_norm)?;
        let learning_rate = self.update(step, grad_norm, pace);
        let tokens: usize = batch.iter().map(|(_, example)| example.ids().len()).sum();
        Ok(self.advance(step, sum, tokens as u64, (grad_norm, learning_rate)))
    }

    /// What a head that trains alone is to say about a batch, a row each.
    fn wanted(&self, batch: &[Numbered<'_>], scale: f32) -> Wanted {
        let mut wanted = Wanted::default();
        for (row, (_, example)) in batch.iter().enumerate() {
            let objective = &self.learner.objective;
            objective.want(row, example, scale, &mut wanted);
        }
        wanted
    }

    /// Looks at a step's gradients, if it is the first, and at its loss.
    fn notice(&mut self, step: u64, loss: f64, grad_norm: f64) -> Result<(), TrainError> {
        self.noticed.clear();
        if step == 1 {
            if diagnosis::is_none(grad_norm, loss) {
                return Err(TrainError::NoGradient { step });
            }
            let silent = diagnosis::silent(&self.learner.module_norms());
            self.noticed.extend(silent);
            return Ok(());
        }
        let (high, first) = (&mut self.state.high_losses, self.state.first_loss.0);
        self.noticed.extend(diagnosis::diverging(high, loss, first));
        Ok(())
    }

    /// The optimizer's step. It is not left half done: whether the run was stopped meanwhile is asked again soon.
    fn update(&mut self, step: u64, grad_norm: f64, pace: &dyn Pace) -> f64 {
        let hp = &self.plan.hp;
        let share = self.schedule.share(step.min(self.schedule.total));
        let scale = clip(grad_norm, hp.max_grad_norm);
        let config = hp.optimizer();
        self.optimizer.step += 1;
        let ops = self.learner.ops.clone();
        for Group {
            range,
            learning_rate,
        } in groups(hp, &self.learner.adapter, share)
        {
            for start in range.clone().step_by(UPDATE_CHUNK) {
                let group = Group {
                    range: start..(start + UPDATE_CHUNK).min(range.end),
                    learning_rate,
                };
                let found = self.learner.parameters_and_gradients(group.range.clone());
                if let Some((params, grads)) = found {
                    self.optimizer
                        .update(&ops, &config, &group, scale, params, grads);
                }
                let _asked_again_at_the_next_step = pace.breathe();
            }
        }
        let (rate, head_rate) = hp.rates();
        self.learner.decay_whole(rate * share * hp.weight_decay);
        self.learner.renew(pace);
        if self.plan.head_only() {
            head_rate * share
        } else {
            rate * share
        }
    }

    fn advance(
        &mut self,
        step: u64,
        sum: LossSum,
        tokens: u64,
        (grad_norm, learning_rate): (f64, f64),
    ) -> StepReport {
        let (epoch, next_index) = position(&self.plan, step);
        let first = if step == 1 {
            Bits(sum.mean())
        } else {
            self.state.first_loss
        };
        self.state.step = step;
        self.state.epoch = epoch;
        self.state.next_index = next_index as u64;
        self.state.tokens += tokens;
        self.state.first_loss = first;
        self.state.last_loss = Bits(sum.mean());
        StepReport {
            step,
            total: self.schedule.total,
            epoch: step as f64 / steps_per_epoch(&self.plan) as f64,
            loss: sum.mean(),
            grad_norm,
            learning_rate,
            targets: sum.targets,
            tokens,
            total_tokens: self.state.tokens,
        }
    }

    /// Judges what the run is at now, unless that was done before a break.
    fn evaluate_if_due(
        &mut self,
        pace: &dyn Company,
        events: &mut dyn FnMut(TrainEvent),
    ) -> Result<(), TrainError> {
        let step = self.state.step;
        if self.eval_due(step) && self.state.evaluated.is_none_or(|last| last < step) {
            pace.alone();
            let report = self.evaluate(pace)?;
            self.state.evaluated = Some(step);
            events(TrainEvent::Eval(report));
        }
        Ok(())
    }

    /// At the start, every so many steps, and at the end.
    fn eval_due(&self, step: u64) -> bool {
        let every = self
            .plan
            .hp
            .eval_steps
            .unwrap_or_else(|| steps_per_epoch(&self.plan));
        self.plan.valid.is_some() && (step.is_multiple_of(every) || step == self.schedule.total)
    }

    fn finish(&mut self, pace: &dyn Pace) -> Result<Finished, TrainError> {
        let held_out = self.held_out(pace)?;
        let (ops, adapter) = (&self.learner.ops, &self.learner.adapter);
        let weights = match &self.best {
            Some(best) => adapter.weights_with(ops, best),
            None => adapter.weights(ops),
        };
        let mut weights = weights.unwrap_or_default();
        if let (Some(head), Some(held_out)) = (&mut weights.head, &held_out) {
            head.settings = held_out.settings.clone();
        }
        let config = match (&self.plan.adapter, &self.plan.method) {
            (Some(adapter), Method::Lm) => adapter.clone(),
            (Some(adapter), Method::Class { .. }) => adapter.clone().with_score_head(),
            (None, _) => LoraConfig::head_only().into(),
        };
        let artifact = peft::write(config, &weights)
            .map_err(|error| TrainError::plan("adapter", error.to_string()))?;
        let report = |found: BestEval, best: bool| EvalReport {
            step: found.step,
            loss: found.loss.0,
            accuracy: found.accuracy.0,
            macro_f1: held_out
                .as_ref()
                .filter(|_| best)
                .and_then(|held| held.quality.macro_f1()),
            best,
        };
        let best = self.state.best.map(|found| report(found, true));
        let baseline = self.state.baseline.map(|found| report(found, false));
        let summary = Summary {
            steps: self.state.step,
            tokens: self.state.tokens,
            first_loss: self.state.first_loss.0,
            last_loss: self.state.last_loss.0,
            kept_step: best.map_or(self.state.step, |best| best.step),
            best,
            baseline,
            stopped_early: self.state.stopped_early,
            footprint: self.footprint,
            held_out,
        };
        Ok(Finished { artifact, summary })
    }
}

/// The parameters in runs of one learning rate, ascending. LoRA+ (Hayou et al., 2024, section 5): B learns at a multiple of A's rate,
/// and a magnitude with B, as PEFT's optimizer groups them.
fn groups(hp: &HyperParameters, adapter: &ResidentAdapter, share: f64) -> Vec<Group> {
    let (rate, head_rate) = hp.rates();
    let mut groups: Vec<Group> = Vec::new();
    for (range, tensor) in adapter.tensors() {
        let peak = match tensor {
            Tensor::A | Tensor::Scale | Tensor::Whole => rate,
            Tensor::B | Tensor::Magnitude => rate * hp.lora_plus_ratio,
            Tensor::Head => head_rate,
        };
        let learning_rate = peak * share;
        match groups.last_mut() {
            Some(last) if last.learning_rate == learning_rate => last.range.end = range.end,
            _ => groups.push(Group {
                range,
                learning_rate,
            }),
        }
    }
    groups
}

fn numbered(items: &[Example]) -> Vec<Numbered<'_>> {
    items
        .iter()
        .enumerate()
        .map(|(i, example)| (i as u64, example))
        .collect()
}

fn steps_per_epoch(plan: &TrainPlan) -> u64 {
    plan.train.items.len().div_ceil(plan.hp.batch_size) as u64
}

/// The epoch of the step after `done` steps, and the index in its order where that step begins.
fn position(plan: &TrainPlan, done: u64) -> (u64, usize) {
    let per_epoch = steps_per_epoch(plan);
    (
        done / per_epoch,
        (done % per_epoch) as usize * plan.hp.batch_size,
    )
}

fn schedule(plan: &TrainPlan) -> Schedule {
    let epochs = plan
        .hp
        .epochs
        .unwrap_or(if plan.head_only() { 100 } else { 3 });
    let all = steps_per_epoch(plan).saturating_mul(epochs);
    let total = plan.hp.max_steps.map_or(all, |limit| limit.min(all));
    let warmup = plan.hp.warmup_steps.unwrap_or(total / 20);
    Schedule {
        warmup,
        total,
        decay: plan.hp.decay,
    }
}
