//! One adapter on one base: losses and gradients of a list of examples, in micro-batches that fit the memory budget.
//!
//! It must not know steps, epochs or the optimizer: the same examples in the same order give the same bits, however
//! they are cut and whenever it pauses.

use std::ops::Range;
use std::sync::Arc;

use espalier_adapters::batch::{Dropout, Pass, Segment};
use espalier_adapters::linear::{AdapterGrads, BaseSites, ResidentAdapter};
use espalier_adapters::ops::Ops;
use espalier_adapters::pace::{Pace, Stopped};
use espalier_adapters::train::examples::Example;
use espalier_adapters::train::loss::{
    LossBuffers, LossSum, Target, linear_cross_entropy, softmax_cross_entropy,
};

use crate::model::{Model, Saved, TrainRows, Workspace};

/// An example and its number in the data set, which its dropout depends on.
pub(super) type Numbered<'a> = (u64, &'a Example);

/// Rows of a micro-batch that keeps nothing: enough for the matrix products, little memory.
const FORWARD_ROWS: usize = 512;

/// The adapter in training and the buffers that its passes reuse.
pub(super) struct Learner {
    model: Arc<Model>,
    pub(super) adapter: Arc<ResidentAdapter>,
    /// One entry: the gradients of the only segment.
    grads: Vec<Option<AdapterGrads>>,
    activation_bytes: usize,
    dropout_rate: f32,
    seed: u64,
    workspace: Workspace,
    saved: Saved,
    loss: LossBuffers<f32>,
    dstates: Vec<f32>,
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

// === impl Learner ===

impl Learner {
    pub(super) fn new(
        model: Arc<Model>,
        adapter: ResidentAdapter,
        limits: (usize, f32),
        seed: u64,
    ) -> Self {
        let grads = vec![Some(AdapterGrads::of(&adapter))];
        Self {
            model,
            adapter: Arc::new(adapter),
            grads,
            activation_bytes: limits.0,
            dropout_rate: limits.1,
            seed,
            workspace: Workspace::new(),
            saved: Saved::default(),
            loss: LossBuffers::default(),
            dstates: Vec::new(),
        }
    }

    /// Every gradient; in the order of the adapter's parameters.
    pub(super) fn gradients(&self) -> &[f32] {
        self.grads[0].as_ref().map_or(&[], AdapterGrads::all)
    }

    /// Parameters to change and gradients to read.
    pub(super) fn parameters_and_gradients(&mut self) -> (&mut [f32], &[f32]) {
        let grads = self.grads[0].as_ref().map_or(&[][..], AdapterGrads::all);
        (Arc::make_mut(&mut self.adapter).parameters_mut(), grads)
    }

    pub(super) fn clear_gradients(&mut self) {
        self.grads
            .iter_mut()
            .flatten()
            .for_each(|grads| grads.all_mut().fill(0.0));
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
            Saved::<f32>::row_bytes(config, config.layers - lowest)
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
            let pass = Pass {
                ops: self.model.ops(),
                segments: &[],
                overlays: &[],
                pace,
                dropout: None,
            };
            let rows = packed.rows();
            let hidden =
                self.model
                    .forward_train(&pass, rows, &mut self.saved, &mut self.workspace)?;
            for sequence in &packed.sequences {
                states.extend_from_slice(&hidden[(sequence.end - 1) * width..sequence.end * width]);
            }
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
        let classes = self.adapter.labels().len();
        let mut logits = vec![0.0; labels.len() * classes];
        let mut losses = vec![0.0; labels.len()];
        let ops = self.model.ops();
        self.adapter.score(ops, states, &mut logits);
        let sum =
            softmax_cross_entropy(ops, &mut logits, labels, scale.unwrap_or(0.0), &mut losses);
        let head = self.grads[0].as_mut().and_then(AdapterGrads::head_mut);
        if let (Some(head), Some(_)) = (head, scale) {
            ops.outer(&logits, states, classes, 1.0, head);
        }
        sum
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
        let model = Arc::clone(&self.model);
        let segments = [Segment {
            rows: 0..packed.tokens.len(),
            adapters: Some(Arc::clone(&self.adapter)).into(),
        }];
        let pass = Pass {
            ops: model.ops(),
            segments: &segments,
            overlays: &[],
            pace,
            dropout,
        };
        let hidden =
            model.forward_train(&pass, packed.rows(), &mut self.saved, &mut self.workspace)?;
        self.dstates.clear();
        self.dstates
            .resize(if scale.is_some() { hidden.len() } else { 0 }, 0.0);
        let dstates = scale.is_some().then_some(self.dstates.as_mut_slice());
        let factor = scale.unwrap_or(0.0);
        let targets = targets(examples, &packed);
        let sum = if self.adapter.labels().is_empty() {
            let context = (model.ops(), pace);
            linear_cross_entropy(
                context,
                model.head(),
                hidden,
                &targets,
                factor,
                dstates,
                &mut self.loss,
            )?
        } else {
            let head = self.grads[0].as_mut().and_then(AdapterGrads::head_mut);
            let gradients = dstates.zip(head);
            class_loss(
                model.ops(),
                &self.adapter,
                hidden,
                &targets,
                factor,
                gradients,
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
fn class_loss<O: Ops<T = f32>>(
    ops: &O,
    adapter: &ResidentAdapter,
    hidden: &[f32],
    targets: &[Target],
    scale: f32,
    gradients: Option<(&mut [f32], &mut [f32])>,
) -> LossSum {
    let Some(head) = adapter.head() else {
        return LossSum::default();
    };
    let classes = adapter.labels().len();
    let width = head.len() / classes;
    let rows = |target: &Target| target.row * width..(target.row + 1) * width;
    let states: Vec<f32> = targets
        .iter()
        .flat_map(|target| &hidden[rows(target)])
        .copied()
        .collect();
    let labels: Vec<u32> = targets.iter().map(|target| target.label).collect();
    let (mut logits, mut losses) = (vec![0.0; targets.len() * classes], vec![0.0; targets.len()]);
    adapter.score(ops, &states, &mut logits);
    let sum = softmax_cross_entropy(ops, &mut logits, &labels, scale, &mut losses);
    if let Some((dstates, dhead)) = gradients {
        ops.outer(&logits, &states, classes, 1.0, dhead);
        for (target, dlogits) in targets.iter().zip(logits.chunks_exact(classes)) {
            ops.expand(dlogits, head, classes, 1.0, &mut dstates[rows(target)]);
        }
    }
    sum
}
