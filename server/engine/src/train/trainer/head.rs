//! A classification head in training: its loss on states, and the gradients of both.

use std::ops::Range;

use espalier_adapters::linear::ResidentAdapter;
use espalier_adapters::ops::{Backend, Buffer, Ops, ViewMut};
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
}

// === impl HeadBuffers ===

impl HeadBuffers {
    pub(super) fn new(ops: &Backend) -> Self {
        Self {
            states: ops.working(),
            dstates: ops.working(),
            logits: ops.exact(),
            dlogits: ops.exact(),
        }
    }

    /// The head's loss on `states`; with `dhead`, its gradient is added.
    pub(super) fn judge(
        &mut self,
        (ops, adapter): (&Backend, &ResidentAdapter),
        (objective, wanted): (&Objective, &Wanted),
        dhead: Option<ViewMut<'_, Backend>>,
        loss: &mut LossBuffers<Backend>,
    ) -> LossSum {
        let classes = adapter.labels().len();
        let Self {
            states,
            logits,
            dlogits,
            ..
        } = self;
        ops.resize(logits, wanted.targets.len() * classes);
        adapter.score(ops, states.all(), logits.all_mut());
        let judged = objective.judge(ops, (logits, wanted), dlogits, loss);
        if let Some(dhead) = dhead {
            ops.outer(dlogits.all(), states.all(), classes, 1.0, dhead);
        }
        let mut sum = LossSum::default();
        for (judged, target) in judged.iter().zip(&wanted.targets) {
            sum.push(judged, objective.counts(target));
        }
        sum
    }

    /// The same on the targets' rows of `hidden`, the share's rows being `rows` of it; with `(dstates, dhead)`, the gradients
    /// of both are added.
    pub(super) fn judge_rows(
        &mut self,
        (ops, adapter): (&Backend, &ResidentAdapter),
        (hidden, rows): (&Buf, &Range<usize>),
        (objective, wanted): (&Objective, &Wanted),
        gradients: Option<(&mut Buf, ViewMut<'_, Backend>)>,
        loss: &mut LossBuffers<Backend>,
    ) -> LossSum {
        let (Some(head), Some(range)) = (adapter.head(), adapter.head_range()) else {
            return LossSum::default();
        };
        let classes = adapter.labels().len();
        let chosen = wanted
            .targets
            .iter()
            .map(|target| (rows.start + target.row) as u32);
        let chosen: Vec<u32> = chosen.collect();
        let (chosen, len) = (
            ops.ids(&chosen),
            wanted.targets.len() * (range.len() / classes),
        );
        ops.resize(&mut self.states, len);
        ops.take_rows(hidden.all(), chosen, self.states.all_mut());
        let (dstates, dhead) = gradients.unzip();
        let sum = self.judge((ops, adapter), (objective, wanted), dhead, loss);
        if let Some(dstates) = dstates {
            let from = &mut self.dstates;
            ops.resize(from, len);
            ops.clear(from.all_mut());
            ops.expand(self.dlogits.all(), head, classes, 1.0, from.all_mut());
            ops.add_rows(from.all(), chosen, dstates.all_mut());
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
