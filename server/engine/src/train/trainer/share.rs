//! One job's part of a pass: a micro-batch of its examples, what they are to predict, and where its gradients go.

use std::ops::Range;
use std::sync::Arc;

use espalier_adapters::batch::Dropout;
use espalier_adapters::linear::{AdapterGrads, ResidentAdapter};
use espalier_adapters::train::examples::Example;
use espalier_adapters::train::loss::{LossSum, Target};

use super::objective::{Objective, Wanted};

/// An example and its number in the data set, which its dropout depends on.
pub(super) type Numbered<'a> = (u64, &'a Example);

/// A micro-batch on its way through the model.
#[derive(Debug)]
pub struct Share {
    pub(super) tokens: Vec<u32>,
    /// The rows of each example.
    pub(super) sequences: Vec<Range<usize>>,
    /// Their rows count from the share's first.
    pub(super) wanted: Wanted,
    pub(super) objective: Arc<Objective>,
    pub(super) adapter: Arc<ResidentAdapter>,
    /// What the pass adds to; without, it only judges.
    pub(super) grads: Option<AdapterGrads>,
    pub(super) dropout: Option<Dropout>,
    /// Keep the blocks' inputs alone, and compute the rest again on the way back.
    pub(super) recompute: bool,
    /// Rows that its job's memory holds in one pass.
    pub(super) room: usize,
    /// What the pass found.
    pub(super) sum: LossSum,
    /// A head's `[targets, labels]`, where the pass only judged.
    pub(super) logits: Vec<f32>,
}

// === impl Share ===

impl Share {
    /// Examples to judge. Targets weigh `weight`, times what the objective has them count.
    pub(super) fn of(
        examples: &[Numbered<'_>],
        (adapter, objective): (&Arc<ResidentAdapter>, &Arc<Objective>),
        weight: f32,
    ) -> Self {
        let (mut tokens, mut sequences) = (Vec::new(), Vec::new());
        let mut wanted = Wanted::default();
        for (_, example) in examples {
            let start = tokens.len();
            tokens.extend_from_slice(example.ids());
            sequences.push(start..tokens.len());
            let targets = &mut wanted.targets;
            let mut target = |row: usize, label: u32| targets.push(Target { row, label, weight });
            match example {
                Example::Lm { ids, learn } => (1..ids.len())
                    .filter(|position| learn[*position])
                    .for_each(|position| target(start + position - 1, ids[position])),
                answered => objective.want(tokens.len() - 1, answered, weight, &mut wanted),
            }
        }
        Self {
            tokens,
            sequences,
            wanted,
            objective: Arc::clone(objective),
            adapter: Arc::clone(adapter),
            grads: None,
            dropout: None,
            recompute: false,
            room: usize::MAX,
            sum: LossSum::default(),
            logits: Vec::new(),
        }
    }

    /// Rows that the pass computes for it.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Rows that a pass may have which its job runs.
    #[must_use]
    pub fn room(&self) -> usize {
        self.room
    }

    /// Whether one pass can carry both.
    #[must_use]
    pub fn goes_with(&self, other: &Share) -> bool {
        let rate = |share: &Share| share.dropout.as_ref().map(|dropout| dropout.rate.to_bits());
        let learns = |share: &Share| share.grads.is_some() && !share.recompute;
        learns(self) && learns(other) && rate(self) == rate(other)
    }
}
