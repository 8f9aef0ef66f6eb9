//! A classification head in training: its loss on states, and the gradients of both.

use std::ops::Range;

use espalier_adapters::head::Pooling;
use espalier_adapters::linear::{AdapterGrads, HeadTrace, ResidentAdapter};
use espalier_adapters::ops::{Backend, Buffer, Ops};
use espalier_adapters::train::loss::{LossBuffers, LossSum};

use super::objective::{Objective, Wanted};
use crate::model::Buf;
use crate::pooling;

/// What a head reads and makes, and their gradients.
pub(super) struct HeadBuffers {
    /// `[targets, hidden]`.
    pub(super) states: Buf,
    dstates: Buf,
    /// The gradient of every state that was pooled `[rows, hidden]`.
    spread: Buf,
    /// `[targets, labels]`, exact.
    logits: Buf,
    dlogits: Buf,
    trace: HeadTrace,
}

// === impl HeadBuffers ===

impl HeadBuffers {
    pub(super) fn new(ops: &Backend) -> Self {
        Self {
            states: ops.working(),
            dstates: ops.working(),
            spread: ops.working(),
            logits: ops.exact(),
            dlogits: ops.exact(),
            trace: HeadTrace::new(ops),
        }
    }

    /// The head's loss on `states`.
    pub(super) fn judge(
        &mut self,
        (ops, adapter): (&Backend, &ResidentAdapter),
        (objective, wanted): (&Objective, &Wanted),
        loss: &mut LossBuffers<Backend>,
    ) -> LossSum {
        let (classes, rows) = (adapter.labels().len(), wanted.targets.len());
        let Self {
            states,
            logits,
            dlogits,
            trace,
            ..
        } = self;
        ops.resize(logits, rows * classes);
        let on = (states.all(), rows, wanted.dropout.as_ref());
        adapter.score_traced(ops, on, trace, logits.all_mut());
        let judged = objective.judge(ops, (logits, wanted), dlogits, loss);
        let mut sum = LossSum::default();
        for (judged, target) in judged.iter().zip(&wanted.targets) {
            sum.push(judged, objective.counts(target));
        }
        sum
    }

    /// Adds the gradients of the last call's loss: of every layer to `grads`, and where they are `wanted` those of the states to
    /// buffers of its own.
    pub(super) fn back(
        &mut self,
        (ops, adapter): (&Backend, &ResidentAdapter),
        grads: &mut AdapterGrads,
        wanted: bool,
    ) {
        let Self {
            states,
            dstates,
            dlogits,
            trace,
            ..
        } = self;
        if wanted {
            ops.resize(dstates, states.len());
            ops.clear(dstates.all_mut());
        }
        let dstates = wanted.then(|| dstates.all_mut());
        adapter.score_backward(ops, dlogits.all(), trace, grads, dstates);
    }

    /// The same on what the head reads of the `sequences` of `hidden`, one a target; with `(dstates, grads)`, the gradients of both
    /// are added.
    pub(super) fn judge_sequences(
        &mut self,
        (ops, adapter): (&Backend, &ResidentAdapter),
        (hidden, sequences, width): (&Buf, &[Range<usize>], usize),
        (objective, wanted): (&Objective, &Wanted),
        gradients: Option<(&mut Buf, &mut AdapterGrads)>,
        loss: &mut LossBuffers<Backend>,
    ) -> LossSum {
        let pooling = objective.pooling();
        self.pool((ops, pooling), (hidden, sequences, width));
        let sum = self.judge((ops, adapter), (objective, wanted), loss);
        if let Some((dstates, grads)) = gradients {
            self.back((ops, adapter), grads, true);
            self.spread((ops, pooling), (sequences, width), dstates);
        }
        sum
    }

    /// What a head reads of the sequences of `hidden` into the states `[sequences, width]`: with the same numbers as in serving.
    pub(super) fn pool(
        &mut self,
        (ops, pooling): (&Backend, Pooling),
        (hidden, sequences, width): (&Buf, &[Range<usize>], usize),
    ) {
        ops.resize(&mut self.states, sequences.len() * width);
        match pooling {
            Pooling::Last => {
                let last = last_rows(sequences);
                ops.take_rows(hidden.all(), ops.ids(&last), self.states.all_mut());
            }
            Pooling::Mean => {
                let mut pooled = Vec::with_capacity(self.states.len());
                for rows in sequences {
                    let mut states = vec![0.0; rows.len() * width];
                    let at = rows.start * width..rows.end * width;
                    ops.read(hidden.part(at), &mut states);
                    pooled.extend(pooling::mean_of(&states, width));
                }
                ops.write(&pooled, self.states.all_mut());
            }
        }
    }

    /// Adds the gradients of what was pooled to those of the states `[rows, width]` that it was pooled of.
    fn spread(
        &mut self,
        (ops, pooling): (&Backend, Pooling),
        (sequences, width): (&[Range<usize>], usize),
        dstates: &mut Buf,
    ) {
        if pooling == Pooling::Last {
            let last = last_rows(sequences);
            return ops.add_rows(self.dstates.all(), ops.ids(&last), dstates.all_mut());
        }
        let mut gradients = vec![0.0; self.dstates.len()];
        ops.read(self.dstates.all(), &mut gradients);
        for (gradient, rows) in gradients.chunks_exact_mut(width).zip(sequences) {
            let share = 1.0 / rows.len() as f32;
            gradient.iter_mut().for_each(|number| *number *= share);
        }
        ops.write(&gradients, self.dstates.all_mut());
        let numbered = (0_u32..).zip(sequences);
        let of_each: Vec<u32> = numbered
            .flat_map(|(number, rows)| std::iter::repeat_n(number, rows.len()))
            .collect();
        let rows: Vec<u32> = sequences
            .iter()
            .flat_map(|r| r.start as u32..r.end as u32)
            .collect();
        ops.resize(&mut self.spread, rows.len() * width);
        ops.take_rows(self.dstates.all(), ops.ids(&of_each), self.spread.all_mut());
        ops.add_rows(self.spread.all(), ops.ids(&rows), dstates.all_mut());
    }

    /// The logits of the last call, on the host.
    pub(super) fn read_logits(&self, ops: &Backend) -> Vec<f32> {
        let mut logits = vec![0.0; self.logits.len()];
        ops.read(self.logits.all(), &mut logits);
        logits
    }
}

/// The row of each sequence's last token.
fn last_rows(sequences: &[Range<usize>]) -> Vec<u32> {
    sequences.iter().map(|rows| rows.end as u32 - 1).collect()
}
