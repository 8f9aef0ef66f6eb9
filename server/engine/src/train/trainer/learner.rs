//! The adapter in training: its parameters and gradients, and how a batch is cut in micro-batches.
//!
//! Sums run over micro-batches in order and over rows in order, so the same examples in the same order give the same
//! bits, however they are cut, whenever it pauses and whoever shares a pass.

use std::ops::Range;
use std::sync::Arc;

use espalier_adapters::batch::Dropout;
use espalier_adapters::config::Site;
use espalier_adapters::linear::{AdapterGrads, ResidentAdapter};
use espalier_adapters::ops::{Backend, Buffer, Ops, View, ViewMut};
use espalier_adapters::pace::{Pace, Stopped, Unpaced};
use espalier_adapters::train::loss::LossSum;
use espalier_adapters::train::optimizer::norm;

use super::company::{Company, Interrupted};
use super::objective::{Objective, Wanted};
use super::passes::Passes;
use super::share::{Numbered, Share};
use crate::model::{Model, Saved};

/// Rows of a micro-batch that keeps nothing: enough for the matrix products, little memory.
pub(super) const FORWARD_ROWS: usize = 512;

/// Whoever changes the adapter is the only one who holds it: passes give it back when they end.
const ALONE: &str = "no pass holds the adapter";

/// The adapter in training.
pub(super) struct Learner {
    pub(super) ops: Backend,
    pub(super) adapter: Arc<ResidentAdapter>,
    pub(super) objective: Arc<Objective>,
    /// `None` where a pass that did not end had them.
    grads: Option<AdapterGrads>,
    passes: Passes,
    activation_bytes: usize,
    dropout_rate: f32,
    seed: u64,
}

// === impl Learner ===

impl Learner {
    pub(super) fn new(
        model: Arc<Model>,
        (adapter, objective): (ResidentAdapter, Objective),
        limits: (usize, f32),
        seed: u64,
    ) -> Self {
        let passes = Passes::new(model);
        let ops = passes.ops.clone();
        Self {
            grads: Some(AdapterGrads::of(&ops, &adapter)),
            ops,
            passes,
            adapter: Arc::new(adapter),
            objective: Arc::new(objective),
            activation_bytes: limits.0,
            dropout_rate: limits.1,
            seed,
        }
    }

    /// Every parameter, on the host.
    pub(super) fn parameters(&self) -> Vec<f32> {
        let mut parameters = vec![0.0; self.adapter.parameter_count()];
        self.ops.read(self.adapter.parameters(), &mut parameters);
        parameters
    }

    /// Replaces every parameter.
    pub(super) fn set_parameters(&mut self, parameters: &[f32]) {
        let all = 0..self.adapter.parameter_count();
        let adapter = Arc::get_mut(&mut self.adapter).expect(ALONE);
        self.ops.write(parameters, adapter.part_mut(all));
        self.renew(&Unpaced);
    }

    /// DoRA's gains and whole tensors of the parameters as they are now.
    pub(super) fn renew(&mut self, pace: &dyn Pace) {
        let adapter = Arc::get_mut(&mut self.adapter).expect(ALONE);
        let model = self.passes.model.as_ref();
        adapter.renew_gains(model, &self.ops, pace);
        adapter.renew_whole(model, &self.ops, pace);
    }

    /// The part of a decay of whole tensors that their deltas do not see: `d -= factor W`.
    pub(super) fn decay_whole(&mut self, factor: f64) {
        if factor > 0.0 {
            let adapter = Arc::get_mut(&mut self.adapter).expect(ALONE);
            adapter.decay_whole(self.passes.model.as_ref(), &self.ops, factor as f32);
        }
    }

    /// The norm of all gradients.
    pub(super) fn gradient_norm(&self) -> f64 {
        let grads = self.grads.as_ref();
        grads.map_or(0.0, |grads| norm(&self.ops, grads.all()))
    }

    /// The norm of each module's gradients.
    pub(super) fn module_norms(&self) -> Vec<((usize, Site), f64)> {
        let grads = self.grads.as_ref();
        grads.map_or_else(Vec::new, |grads| grads.norms(&self.ops))
    }

    /// The parameters of a range, to be changed, and their gradients.
    pub(super) fn parameters_and_gradients(
        &mut self,
        range: Range<usize>,
    ) -> Option<(ViewMut<'_, Backend>, View<'_, Backend>)> {
        let grads = self.grads.as_ref()?.part(range.clone());
        let adapter = Arc::get_mut(&mut self.adapter).expect(ALONE);
        Some((adapter.part_mut(range), grads))
    }

    pub(super) fn clear_gradients(&mut self) {
        let (ops, adapter) = (&self.ops, &self.adapter);
        self.grads
            .get_or_insert_with(|| AdapterGrads::of(ops, adapter))
            .clear(ops);
    }

    /// Sums the examples' losses and adds `scale` times their gradients.
    pub(super) fn learn(
        &mut self,
        examples: &[Numbered<'_>],
        (step, scale): (u64, f32),
        company: &dyn Company,
    ) -> Result<LossSum, Interrupted> {
        let budget = self.row_budget();
        let mut sum = LossSum::default();
        for part in parts(examples, budget) {
            let mut share = Share::of(part, (&self.adapter, &self.objective), scale);
            share.room = budget;
            share.recompute = part.len() == 1 && share.rows() > budget;
            share.wanted.dropout = self.objective.dropout(part, (self.seed, step));
            share.dropout = (self.dropout_rate > 0.0).then(|| self.dropout(part, step));
            share.grads = self.grads.take();
            let passes = &mut self.passes;
            let run = &mut |shares: &mut [Share]| passes.run(shares, company);
            let share = company.pass(share, run)?;
            self.grads = share.grads;
            sum.add(share.sum);
        }
        if let Some(grads) = &mut self.grads {
            grads.settle(&self.ops);
        }
        Ok(sum)
    }

    /// Layers of the base.
    pub(super) fn layers(&self) -> usize {
        self.passes.model.config().layers
    }

    /// Rows whose saved activations fit.
    pub(super) fn row_budget(&self) -> usize {
        let config = self.passes.model.config();
        let row_bytes = self.adapter.lowest_layer().map_or(0, |lowest| {
            Saved::row_bytes(&self.ops, config, config.layers - lowest)
        });
        self.activation_bytes
            .checked_div(row_bytes)
            .unwrap_or(FORWARD_ROWS)
    }

    /// Sums the examples' losses, and gives a head's logits `[examples, labels]`.
    pub(super) fn judge(
        &mut self,
        examples: &[Numbered<'_>],
        pace: &dyn Pace,
    ) -> Result<(LossSum, Vec<f32>), Stopped> {
        let (mut sum, mut logits) = (LossSum::default(), Vec::new());
        for part in parts(examples, FORWARD_ROWS) {
            let mut shares = [Share::of(part, (&self.adapter, &self.objective), 0.0)];
            self.passes.run(&mut shares, pace)?;
            sum.add(shares[0].sum);
            logits.append(&mut shares[0].logits);
        }
        Ok((sum, logits))
    }

    /// What a head reads of the base's states after the final norm, `[examples, hidden]`, one `done(count)` after each micro-batch.
    pub(super) fn pooled_states(
        &mut self,
        examples: &[Numbered<'_>],
        pace: &dyn Pace,
        done: &mut dyn FnMut(usize),
    ) -> Result<Vec<f32>, Stopped> {
        let width = self.passes.model.config().hidden;
        let mut states = Vec::with_capacity(examples.len() * width);
        for part in parts(examples, FORWARD_ROWS) {
            let share = Share::of(part, (&self.adapter, &self.objective), 0.0);
            self.passes.pooled_states(&share, pace, &mut states)?;
            done(states.len() / width);
        }
        Ok(states)
    }

    /// The head's loss on cached states `[examples, hidden]` and its logits there; where it `learns`, adds its gradient.
    pub(super) fn head_pass(
        &mut self,
        states: &[f32],
        wanted: &Wanted,
        learns: bool,
    ) -> (LossSum, Vec<f32>) {
        let (ops, Passes { head, loss, .. }) = (&self.ops, &mut self.passes);
        ops.begin_pass();
        ops.resize(&mut head.states, states.len());
        ops.write(states, head.states.all_mut());
        let grads = self.grads.as_mut().filter(|_| learns);
        let asked = (self.objective.as_ref(), wanted);
        let sum = head.judge((ops, &self.adapter), asked, loss);
        if let Some(grads) = grads {
            head.back((ops, &self.adapter), grads, false);
        }
        let logits = if learns {
            Vec::new()
        } else {
            head.read_logits(ops)
        };
        (sum, logits)
    }

    fn dropout(&self, examples: &[Numbered<'_>], step: u64) -> Dropout {
        let keys = examples.iter().flat_map(|(number, example)| {
            let positions = 0..example.ids().len() as u64;
            positions.map(move |position| Dropout::row_key(self.seed, step, *number, position))
        });
        Dropout {
            rate: self.dropout_rate,
            row_keys: keys.collect(),
        }
    }
}

/// Cuts examples, in order, in parts of at most `budget` rows; an example that alone has more is a part of its own.
fn parts<'a, 'b>(examples: &'a [Numbered<'b>], budget: usize) -> Vec<&'a [Numbered<'b>]> {
    let mut parts = Vec::new();
    let (mut start, mut rows) = (0, 0);
    for (index, (_, example)) in examples.iter().enumerate() {
        let len = example.ids().len();
        if rows > 0 && rows + len > budget {
            parts.push(&examples[start..index]);
            (start, rows) = (index, 0);
        }
        rows += len;
    }
    if rows > 0 {
        parts.push(&examples[start..]);
    }
    parts
}
