//! One adapter on one base: losses and gradients of a list of examples, in micro-batches that fit the memory budget.
//!
//! It must not know steps, epochs or the optimizer: the same examples in the same order give the same bits, however
//! they are cut and whenever it pauses.

use std::ops::Range;
use std::sync::Arc;

use espalier_adapters::batch::{Dropout, Pass, Segment};
use espalier_adapters::linear::{AdapterGrads, BaseSites, ResidentAdapter};
use espalier_adapters::ops::{Backend, Buffer, Ops, View, ViewMut};
use espalier_adapters::pace::{Pace, Stopped};
use espalier_adapters::train::examples::Example;
use espalier_adapters::train::loss::{
    LossBuffers, LossSum, Target, linear_cross_entropy, softmax_cross_entropy,
};
use espalier_adapters::train::optimizer::norm;

use crate::model::{Buf, Model, Saved, TrainRows, Workspace};

/// An example and its number in the data set, which its dropout depends on.
pub(super) type Numbered<'a> = (u64, &'a Example);

/// Rows of a micro-batch that keeps nothing: enough for the matrix products, little memory.
const FORWARD_ROWS: usize = 512;

/// Whoever changes the adapter is the only one who holds it: passes give it back when they end.
const ALONE: &str = "no pass holds the adapter";

/// The adapter in training and the buffers that its passes reuse.
pub(super) struct Learner {
    model: Arc<Model>,
    /// Beside the steps'.
    pub(super) ops: Backend,
    pub(super) adapter: Arc<ResidentAdapter>,
    /// One entry: the gradients of the only segment.
    grads: Vec<Option<AdapterGrads>>,
    activation_bytes: usize,
    dropout_rate: f32,
    seed: u64,
    workspace: Workspace,
    saved: Saved,
    loss: LossBuffers<Backend>,
    dstates: Buf,
    head: HeadBuffers,
}

/// What the head reads and makes, and their gradients.
struct HeadBuffers {
    /// `[targets, hidden]`.
    states: Buf,
    dstates: Buf,
    /// `[targets, labels]`, exact.
    logits: Buf,
    dlogits: Buf,
    /// Exact.
    judged: Buf,
}

/// A micro-batch as the decoder reads it.
struct Packed {
    tokens: Vec<u32>,
    sequences: Vec<Range<usize>>,
}

impl Packed {
    fn of(examples: &[Numbered<'_>]) -> Self {
        let mut packed = Self {
            tokens: Vec::new(),
            sequences: Vec::new(),
        };
        for (_, example) in examples {
            let start = packed.tokens.len();
            packed.tokens.extend_from_slice(example.ids());
            packed.sequences.push(start..packed.tokens.len());
        }
        packed
    }

    fn rows(&self) -> TrainRows<'_> {
        TrainRows {
            tokens: &self.tokens,
            sequences: &self.sequences,
        }
    }
}

// === impl HeadBuffers ===

impl HeadBuffers {
    fn new(ops: &Backend) -> Self {
        Self {
            states: ops.working(),
            dstates: ops.working(),
            logits: ops.exact(),
            dlogits: ops.exact(),
            judged: ops.exact(),
        }
    }

    /// The cross-entropy of the head on `states`; with `dhead`, its gradient is added.
    fn judge(
        &mut self,
        ops: &Backend,
        adapter: &ResidentAdapter,
        labels: &[u32],
        scale: f32,
        dhead: Option<ViewMut<'_, Backend>>,
    ) -> LossSum {
        let classes = adapter.labels().len();
        let Self {
            states,
            logits,
            dlogits,
            judged,
            ..
        } = self;
        ops.resize(logits, labels.len() * classes);
        adapter.score(ops, states.all(), logits.all_mut());
        let sum = softmax_cross_entropy(ops, logits, labels, scale, dlogits, judged);
        if let Some(dhead) = dhead {
            ops.outer(dlogits.all(), states.all(), classes, 1.0, dhead);
        }
        sum
    }
}

// === impl Learner ===

impl Learner {
    pub(super) fn new(
        model: Arc<Model>,
        adapter: ResidentAdapter,
        limits: (usize, f32),
        seed: u64,
    ) -> Self {
        let ops = model.ops().apart();
        let grads = vec![Some(AdapterGrads::of(&ops, &adapter))];
        Self {
            workspace: Workspace::new(&ops),
            saved: Saved::new(&ops),
            loss: LossBuffers::new(&ops),
            dstates: ops.working(),
            head: HeadBuffers::new(&ops),
            model,
            ops,
            adapter: Arc::new(adapter),
            grads,
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
    }

    /// The norm of all gradients.
    pub(super) fn gradient_norm(&self) -> f64 {
        let grads = self.grads[0].as_ref();
        grads.map_or(0.0, |grads| norm(&self.ops, grads.all()))
    }

    /// The parameters of a range, to be changed, and their gradients.
    pub(super) fn parameters_and_gradients(
        &mut self,
        range: Range<usize>,
    ) -> Option<(ViewMut<'_, Backend>, View<'_, Backend>)> {
        let grads = self.grads[0].as_ref()?.part(range.clone());
        let adapter = Arc::get_mut(&mut self.adapter).expect(ALONE);
        Some((adapter.part_mut(range), grads))
    }

    pub(super) fn clear_gradients(&mut self) {
        let ops = &self.ops;
        self.grads
            .iter_mut()
            .flatten()
            .for_each(|grads| grads.clear(ops));
    }

    /// Sums the examples' losses and adds `scale` times their gradients.
    pub(super) fn learn(
        &mut self,
        examples: &[Numbered<'_>],
        (step, scale): (u64, f32),
        pace: &dyn Pace,
    ) -> Result<LossSum, Stopped> {
        let lowest = self.adapter.lowest_layer();
        let config = self.model.config();
        let row_bytes = lowest.map_or(0, |lowest| {
            Saved::row_bytes(&self.ops, config, config.layers - lowest)
        });
        let budget = self
            .activation_bytes
            .checked_div(row_bytes)
            .unwrap_or(FORWARD_ROWS);
        let mut sum = LossSum::default();
        for part in parts(examples, budget) {
            let dropout = (self.dropout_rate > 0.0).then(|| self.dropout(part, step));
            self.saved.lowest = lowest;
            self.saved.inputs_only = part.len() == 1 && part[0].1.ids().len() > budget;
            sum.add(self.pass(part, Some(scale), dropout.as_ref(), pace)?);
        }
        Ok(sum)
    }

    /// Sums the examples' losses.
    pub(super) fn judge(
        &mut self,
        examples: &[Numbered<'_>],
        pace: &dyn Pace,
    ) -> Result<LossSum, Stopped> {
        let mut sum = LossSum::default();
        for part in parts(examples, FORWARD_ROWS) {
            self.saved.lowest = None;
            self.saved.inputs_only = false;
            sum.add(self.pass(part, None, None, pace)?);
        }
        Ok(sum)
    }

    /// The last token's states after the final norm, `[examples, hidden]`, one `done(count)` after each micro-batch.
    pub(super) fn last_states(
        &mut self,
        examples: &[Numbered<'_>],
        pace: &dyn Pace,
        done: &mut dyn FnMut(usize),
    ) -> Result<Vec<f32>, Stopped> {
        let width = self.model.config().hidden;
        let mut states = Vec::with_capacity(examples.len() * width);
        for part in parts(examples, FORWARD_ROWS) {
            self.saved.lowest = None;
            self.saved.inputs_only = false;
            let packed = Packed::of(part);
            let (ops, layers) = (&self.ops, self.model.config().layers);
            ops.begin_pass();
            let pass = Pass::new(ops, layers, &[], pace);
            let rows = packed.rows();
            let hidden =
                self.model
                    .forward_train(&pass, rows, &mut self.saved, &mut self.workspace)?;
            let sequences = packed.sequences.iter();
            let last: Vec<u32> = sequences.map(|rows| rows.end as u32 - 1).collect();
            let (chosen, first) = (&mut self.head.states, states.len());
            ops.resize(chosen, last.len() * width);
            ops.take_rows(hidden.all(), ops.ids(&last), chosen.all_mut());
            states.resize(first + last.len() * width, 0.0);
            ops.read(chosen.all(), &mut states[first..]);
            done(states.len() / width);
        }
        Ok(states)
    }

    /// The head's loss on cached states `[examples, hidden]`; with `scale`, adds its gradient.
    pub(super) fn head_pass(
        &mut self,
        states: &[f32],
        labels: &[u32],
        scale: Option<f32>,
    ) -> LossSum {
        let ops = &self.ops;
        ops.begin_pass();
        ops.resize(&mut self.head.states, states.len());
        ops.write(states, self.head.states.all_mut());
        let grads = self.grads[0].as_mut().filter(|_| scale.is_some());
        let dhead = grads.and_then(AdapterGrads::head_mut);
        let scale = scale.unwrap_or(0.0);
        self.head.judge(ops, &self.adapter, labels, scale, dhead)
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

    /// Forward over one micro-batch, and back where there is a scale.
    fn pass(
        &mut self,
        examples: &[Numbered<'_>],
        scale: Option<f32>,
        dropout: Option<&Dropout>,
        pace: &dyn Pace,
    ) -> Result<LossSum, Stopped> {
        let packed = Packed::of(examples);
        let segments = [Segment {
            rows: 0..packed.tokens.len(),
            adapters: Some(Arc::clone(&self.adapter)).into(),
        }];
        let (ops, model) = (&self.ops, &self.model);
        ops.begin_pass();
        let pass = Pass::new(ops, model.config().layers, &segments, pace).with_dropout(dropout);
        let hidden =
            model.forward_train(&pass, packed.rows(), &mut self.saved, &mut self.workspace)?;
        if scale.is_some() {
            ops.resize(&mut self.dstates, hidden.len());
            ops.clear(self.dstates.all_mut());
        }
        let dstates = scale.is_some().then_some(&mut self.dstates);
        let factor = scale.unwrap_or(0.0);
        let targets = targets(examples, &packed);
        let sum = if self.adapter.labels().is_empty() {
            linear_cross_entropy(
                (ops, pace),
                model.head(),
                hidden,
                &targets,
                factor,
                dstates,
                &mut self.loss,
            )?
        } else {
            let head = self.grads[0].as_mut().and_then(AdapterGrads::head_mut);
            class_loss(
                (ops, &self.adapter),
                hidden,
                &targets,
                factor,
                dstates.zip(head),
                &mut self.head,
            )
        };
        if scale.is_some() {
            let rows = packed.rows();
            model.backward(
                &pass,
                rows,
                &mut self.saved,
                &self.dstates,
                &mut self.grads,
                &mut self.workspace,
            )?;
        }
        Ok(sum)
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

/// What the rows of a micro-batch are to predict.
fn targets(examples: &[Numbered<'_>], packed: &Packed) -> Vec<Target> {
    let mut targets = Vec::new();
    for ((_, example), rows) in examples.iter().zip(&packed.sequences) {
        match example {
            Example::Lm { ids, learn } => {
                let learnt = (1..ids.len()).filter(|position| learn[*position]);
                targets.extend(learnt.map(|p| Target {
                    row: rows.start + p - 1,
                    label: ids[p],
                }));
            }
            Example::Class { label, .. } => targets.push(Target {
                row: rows.end - 1,
                label: *label as u32,
            }),
        }
    }
    targets
}

/// The head's cross-entropy on the targets' rows; with `(dstates, dhead)`, their gradients are added.
fn class_loss(
    (ops, adapter): (&Backend, &ResidentAdapter),
    hidden: &Buf,
    targets: &[Target],
    scale: f32,
    gradients: Option<(&mut Buf, ViewMut<'_, Backend>)>,
    buffers: &mut HeadBuffers,
) -> LossSum {
    let (Some(head), Some(range)) = (adapter.head(), adapter.head_range()) else {
        return LossSum::default();
    };
    let classes = adapter.labels().len();
    let rows: Vec<u32> = targets.iter().map(|target| target.row as u32).collect();
    let labels: Vec<u32> = targets.iter().map(|target| target.label).collect();
    let (rows, len) = (ops.ids(&rows), rows.len() * (range.len() / classes));
    ops.resize(&mut buffers.states, len);
    ops.take_rows(hidden.all(), rows, buffers.states.all_mut());
    let (dstates, dhead) = gradients.unzip();
    let sum = buffers.judge(ops, adapter, &labels, scale, dhead);
    if let Some(dstates) = dstates {
        let from = &mut buffers.dstates;
        ops.resize(from, len);
        ops.clear(from.all_mut());
        ops.expand(buffers.dlogits.all(), head, classes, 1.0, from.all_mut());
        ops.add_rows(from.all(), rows, dstates.all_mut());
    }
    sum
}
