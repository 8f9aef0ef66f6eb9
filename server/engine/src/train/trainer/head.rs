//! A classification head in training: its loss on states, and the gradients of both.

use std::ops::Range;

use espalier_adapters::linear::{AdapterGrads, HeadTrace, ResidentAdapter};
use espalier_adapters::ops::{Backend, Buffer, Ops};
use espalier_adapters::train::loss::{LossBuffers, LossSum};

use super::objective::{Objective, Wanted};
use crate::model::Buf;

/// What a head reads and makes, and their gradients.
pub(super) struct HeadBuffers {
    /// `[targets, hidden]`.
    pub(super) states: Buf,
    dstates: Buf,
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
        adapter.score_traced(ops, (states.all(), rows), trace, logits.all_mut());
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
        let on = (states.all(), dlogits.all());
        if wanted {
            ops.resize(dstates, states.len());
            ops.clear(dstates.all_mut());
        }
        let dstates = wanted.then(|| dstates.all_mut());
        adapter.score_backward(ops, on, trace, grads, dstates);
    }

    /// The same on the targets' rows of `hidden`, the share's rows being `rows` of it; with `(dstates, grads)`, the gradients
    /// of both are added.
    pub(super) fn judge_rows(
        &mut self,
        (ops, adapter): (&Backend, &ResidentAdapter),
        (hidden, rows, width): (&Buf, &Range<usize>, usize),
        (objective, wanted): (&Objective, &Wanted),
        gradients: Option<(&mut Buf, &mut AdapterGrads)>,
        loss: &mut LossBuffers<Backend>,
    ) -> LossSum {
        let chosen = wanted
            .targets
            .iter()
            .map(|target| (rows.start + target.row) as u32);
        let chosen: Vec<u32> = chosen.collect();
        let chosen = ops.ids(&chosen);
        ops.resize(&mut self.states, wanted.targets.len() * width);
        ops.take_rows(hidden.all(), chosen, self.states.all_mut());
        let sum = self.judge((ops, adapter), (objective, wanted), loss);
        if let Some((dstates, grads)) = gradients {
            self.back((ops, adapter), grads, true);
            ops.add_rows(self.dstates.all(), chosen, dstates.all_mut());
        }
        sum
    }

    /// The logits of the last call, on the host.
    pub(super) fn read_logits(&self, ops: &Backend) -> Vec<f32> {
        let mut logits = vec![0.0; self.logits.len()];
        ops.read(self.logits.all(), &mut logits);
        logits
    }
}
