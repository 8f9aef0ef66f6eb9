//! What a run holds beside the base: counted from its plan before the first step, so that a job can be told what it will take.
//!
//! It is a bound: rows as many as a micro-batch may have, and every buffer at its largest. Allocators and the host's copies of
//! examples are not in it.

use espalier_adapters::config::BaseTensor;
use espalier_adapters::head::Pooling;
use espalier_adapters::ops::{Backend, Ops};
use espalier_adapters::train::examples::Examples;

use super::learner::{FORWARD_ROWS, Learner};
use super::plan::{Method, TrainPlan};
use crate::model::{ModelConfig, Saved, Workspace};

/// Bytes of an f32.
const F32: usize = 4;

/// What a run trains and holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Numbers that are trained.
    pub parameters: u64,
    /// Bytes held at most, beside the base.
    pub bytes: u64,
}

impl Footprint {
    pub(super) fn of(plan: &TrainPlan, learner: &Learner, config: &ModelConfig) -> Self {
        let parameters = learner.adapter.parameter_count();
        // Gradients and AdamW's two moments; the best weights so far, on the host.
        let best = usize::from(plan.valid.is_some());
        let state = learner.adapter.bytes() + (3 + best) * parameters * F32;
        // A checkpoint: weights, two moments and the best, as numbers and as a file, and one of them in between.
        let state = state + (2 * (3 + best) + 1) * parameters * F32;
        let state = state + looked_up(learner, config);
        let rows = rows(plan, learner);
        let bytes =
            state + rows.passes(&learner.ops, config) + loss(plan, rows, &learner.ops, config);
        Self {
            parameters: parameters as u64,
            bytes: (bytes + cached_states(plan, config)) as u64,
        }
    }
}

/// The sums of rows that are looked up, which are kept apart where the table is the output head too.
fn looked_up(learner: &Learner, config: &ModelConfig) -> usize {
    let apart = config.tie_embeddings && learner.adapter.trains(BaseTensor::Embedding);
    usize::from(apart) * config.vocab * config.hidden * F32
}

/// Rows of the largest passes.
#[derive(Clone, Copy)]
struct Rows {
    /// That keep what the way back reads, in so many layers.
    kept: usize,
    layers: usize,
    /// That keep nothing.
    forward: usize,
}

fn rows(plan: &TrainPlan, learner: &Learner) -> Rows {
    let longest = |examples: &Examples| {
        let lens = examples.items.iter().map(|example| example.ids().len());
        lens.max().unwrap_or(0)
    };
    let train = longest(&plan.train);
    let valid = plan.valid.as_ref().map_or(0, longest);
    let judged = if plan.head_only() {
        train.max(valid)
    } else {
        valid
    };
    let lowest = learner.adapter.lowest_layer();
    let layers = lowest.map_or(0, |lowest| learner.layers() - lowest);
    let budget = learner.row_budget().max(train);
    Rows {
        kept: match lowest {
            None => 0,
            Some(_) => budget.min(train * plan.hp.batch_size),
        },
        layers,
        forward: match judged {
            0 => 0,
            _ => FORWARD_ROWS.max(judged),
        },
    }
}

impl Rows {
    /// Saved activations, and what every pass needs.
    fn passes(self, ops: &Backend, config: &ModelConfig) -> usize {
        let saved = Saved::<Backend>::row_bytes(ops, config, self.layers);
        let working = Workspace::<Backend>::row_bytes(ops, config);
        self.kept * saved + self.kept.max(self.forward) * working
    }
}

/// Logits and their gradients of as many targets as are judged together.
fn loss(plan: &TrainPlan, rows: Rows, ops: &Backend, config: &ModelConfig) -> usize {
    match &plan.method {
        Method::Lm => {
            let targets = rows.kept.max(rows.forward).min(ops.loss_rows());
            targets * config.vocab * (F32 + ops.working_bytes())
        }
        Method::Class {
            labels, options, ..
        } => {
            // Logits and their gradients; of hidden layers also sums, outputs and the gradients of both.
            let hidden: usize = options.hidden_layers.iter().sum();
            let stack = F32 * (2 * labels.len() + 4 * hidden) * plan.hp.batch_size;
            // Every state's gradient, before it is added to those of the pass.
            let pooled = match options.pooling {
                Pooling::Last => 0,
                Pooling::Mean => rows.kept * config.hidden * ops.working_bytes(),
            };
            stack + pooled
        }
    }
}

/// Of all examples, when the head trains alone.
fn cached_states(plan: &TrainPlan, config: &ModelConfig) -> usize {
    if !plan.head_only() {
        return 0;
    }
    let valid = plan.valid.as_ref().map_or(0, |valid| valid.items.len());
    (plan.train.items.len() + valid) * config.hidden * F32
}
