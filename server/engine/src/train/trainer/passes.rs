//! Passes of training: shares of one or more jobs through the model, forward and back, and the buffers that they reuse.
//!
//! A share's losses and gradients are the same alone and beside others: rows do not see each other, and sums run over a
//! share's own rows in their order.

use std::ops::Range;
use std::sync::Arc;

use espalier_adapters::batch::{Dropout, Pass, Segment};
use espalier_adapters::linear::{AdapterGrads, BaseSites};
use espalier_adapters::ops::{Backend, Buffer, Ops};
use espalier_adapters::pace::{Pace, Stopped};
use espalier_adapters::train::loss::{Learning, LossBuffers, Target, linear_cross_entropy};

use super::head::HeadBuffers;
use super::share::Share;
use crate::model::{Buf, Model, Saved, TrainRows, Workspace};

/// A model and the buffers of passes over it.
pub(super) struct Passes {
    pub(super) model: Arc<Model>,
    /// Beside the steps'.
    pub(super) ops: Backend,
    pub(super) head: HeadBuffers,
    pub(super) loss: LossBuffers<Backend>,
    workspace: Workspace,
    saved: Saved,
    dstates: Buf,
}

/// The rows of several shares, one after the other.
struct Joint {
    tokens: Vec<u32>,
    sequences: Vec<Range<usize>>,
    /// Of each share.
    rows: Vec<Range<usize>>,
    dropout: Option<Dropout>,
}

// === impl Joint ===

impl Joint {
    fn of(shares: &[Share]) -> Self {
        let mut joint = Self {
            tokens: Vec::new(),
            sequences: Vec::new(),
            rows: Vec::new(),
            dropout: None,
        };
        for share in shares {
            let start = joint.tokens.len();
            joint.tokens.extend_from_slice(&share.tokens);
            let moved = share.sequences.iter();
            let moved = moved.map(|rows| start + rows.start..start + rows.end);
            joint.sequences.extend(moved);
            joint.rows.push(start..joint.tokens.len());
            if let Some(dropout) = &share.dropout {
                let all = joint.dropout.get_or_insert_with(|| Dropout {
                    rate: dropout.rate,
                    row_keys: Vec::new(),
                });
                all.row_keys.extend_from_slice(&dropout.row_keys);
            }
        }
        joint
    }

    fn rows(&self) -> TrainRows<'_> {
        TrainRows {
            tokens: &self.tokens,
            sequences: &self.sequences,
        }
    }
}

// === impl Passes ===

impl Passes {
    pub(super) fn new(model: Arc<Model>) -> Self {
        let ops = model.ops().apart();
        Self {
            head: HeadBuffers::new(&ops),
            loss: LossBuffers::new(&ops),
            workspace: Workspace::new(&ops),
            saved: Saved::new(&ops),
            dstates: ops.working(),
            model,
            ops,
        }
    }

    /// Forward over the shares, and back where they have gradients: all of them, or none.
    pub(super) fn run(&mut self, shares: &mut [Share], pace: &dyn Pace) -> Result<(), Stopped> {
        let joint = Joint::of(shares);
        let mut grads: Vec<_> = shares.iter_mut().map(|share| share.grads.take()).collect();
        let learns = grads.iter().any(Option::is_some);
        let lowest = shares
            .iter()
            .filter_map(|share| share.adapter.lowest_layer());
        self.saved.lowest = lowest.min().filter(|_| learns);
        self.saved.inputs_only = shares.iter().any(|share| share.recompute);
        let segments: Vec<Segment> = shares
            .iter()
            .zip(&joint.rows)
            .map(|(share, rows)| Segment {
                rows: rows.clone(),
                adapters: Some(Arc::clone(&share.adapter)).into(),
            })
            .collect();
        let (ops, model) = (&self.ops, &self.model);
        ops.begin_pass();
        let pass = Pass::new(ops, model.config().layers, &segments, pace)
            .with_dropout(joint.dropout.as_ref());
        let hidden =
            model.forward_train(&pass, joint.rows(), &mut self.saved, &mut self.workspace)?;
        let dstates = learns.then_some(&mut self.dstates);
        let buffers = (&mut self.head, &mut self.loss);
        judge(
            &pass,
            model,
            hidden,
            shares,
            &joint,
            (dstates, &mut grads),
            buffers,
        )?;
        if learns {
            let (saved, workspace) = (&mut self.saved, &mut self.workspace);
            model.backward(
                &pass,
                joint.rows(),
                saved,
                &self.dstates,
                &mut grads,
                workspace,
            )?;
        }
        for (share, grads) in shares.iter_mut().zip(grads) {
            share.grads = grads;
        }
        Ok(())
    }

    /// What a head reads of the states after the final norm, `[sequences, hidden]`, in a pass of the base alone.
    pub(super) fn pooled_states(
        &mut self,
        share: &Share,
        pace: &dyn Pace,
        states: &mut Vec<f32>,
    ) -> Result<(), Stopped> {
        self.saved.lowest = None;
        self.saved.inputs_only = false;
        let (ops, config) = (&self.ops, self.model.config());
        ops.begin_pass();
        let pass = Pass::new(ops, config.layers, &[], pace);
        let rows = TrainRows {
            tokens: &share.tokens,
            sequences: &share.sequences,
        };
        let (saved, workspace) = (&mut self.saved, &mut self.workspace);
        let hidden = self.model.forward_train(&pass, rows, saved, workspace)?;
        let pooling = share.objective.pooling();
        let on = (hidden, share.sequences.as_slice(), config.hidden);
        self.head.pool((ops, pooling), on);
        let (pooled, first) = (&self.head.states, states.len());
        states.resize(first + pooled.len(), 0.0);
        ops.read(pooled.all(), &mut states[first..]);
        Ok(())
    }
}

/// Each share's losses; with `dstates`, the gradients of the states, and of heads into the shares' gradients.
fn judge(
    pass: &Pass<'_, Backend>,
    model: &Model,
    hidden: &Buf,
    shares: &mut [Share],
    joint: &Joint,
    (mut dstates, grads): (Option<&mut Buf>, &mut [Option<AdapterGrads>]),
    (head, loss): (&mut HeadBuffers, &mut LossBuffers<Backend>),
) -> Result<(), Stopped> {
    let ops = pass.ops;
    if let Some(dstates) = dstates.as_deref_mut() {
        ops.resize(dstates, hidden.len());
        ops.clear(dstates.all_mut());
    }
    let mut targets = Vec::new();
    let on: (&Backend, &dyn Pace) = (ops, pass.pace);
    for ((share, rows), grads) in shares.iter_mut().zip(&joint.rows).zip(grads) {
        if share.adapter.labels().is_empty() {
            let own = share.wanted.targets.iter().map(|target| Target {
                row: rows.start + target.row,
                ..*target
            });
            let Some(output) = model.vocabulary.own_output(&share.adapter) else {
                targets.extend(own);
                continue;
            };
            let learning = dstates.as_deref_mut().map(|states| Learning {
                states,
                output: grads.as_mut().zip(Some(model.vocabulary.output_tensor())),
            });
            let own: Vec<Target> = own.collect();
            let judged = linear_cross_entropy(on, output, hidden, &own, learning, loss)?;
            share.sum = judged.iter().collect();
            continue;
        }
        let gradients = dstates.as_deref_mut().zip(grads.as_mut());
        let on = (ops, share.adapter.as_ref());
        let asked = (share.objective.as_ref(), &share.wanted);
        let sequences = share.sequences.iter();
        let sequences = sequences.map(|own| rows.start + own.start..rows.start + own.end);
        let sequences: Vec<Range<usize>> = sequences.collect();
        share.sum = head.judge_sequences(
            on,
            (hidden, &sequences, model.config().hidden),
            asked,
            gradients,
            loss,
        );
        if dstates.is_none() {
            share.logits = head.read_logits(ops);
        }
    }
    let learning = dstates.map(|states| Learning {
        states,
        output: None,
    });
    let judged = linear_cross_entropy(on, model.head(), hidden, &targets, learning, loss)?;
    let mut judged = judged.iter();
    for share in shares.iter_mut() {
        let own = model.vocabulary.own_output(&share.adapter).is_some();
        if share.adapter.labels().is_empty() && !own {
            share.sum = judged.by_ref().take(share.wanted.targets.len()).collect();
        }
    }
    Ok(())
}
