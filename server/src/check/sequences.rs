//! Sequences that a model runs side by side, each with keys and values of its own: a step as the engine makes it, without
//! requests.

use std::sync::Arc;

use espalier_adapters::batch::Segment;
use espalier_adapters::ops::{Buffer, Ops, TokenDraw};
use espalier_engine::config::BLOCK_SIZE;
use espalier_engine::model::{
    BaseSites, Batch, Buf, KvCache, Model, ResidentAdapter, SeqSpan, Workspace,
};

/// Sequences with room for their tokens.
pub(super) struct Sequences<'a> {
    model: &'a Model,
    kv: KvCache,
    tables: Vec<Vec<u32>>,
    workspace: Workspace,
    /// States of each run's last row, and their logits.
    states: Buf,
    logits: Buf,
}

/// Rows of one sequence in a pass.
pub(super) struct Run<'r> {
    pub(super) sequence: usize,
    pub(super) tokens: &'r [u32],
    /// The position of the first of them.
    pub(super) start: usize,
    pub(super) adapter: Option<Arc<ResidentAdapter>>,
}

/// Blocks of so many tokens.
fn blocks(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_SIZE)
}

impl<'a> Sequences<'a> {
    /// So many sequences of at most `tokens` tokens.
    pub(super) fn new(model: &'a Model, count: usize, tokens: usize) -> Self {
        let (ops, each) = (model.ops(), blocks(tokens));
        let table = |sequence| (0..each).map(move |block| (block * count + sequence) as u32);
        Sequences {
            model,
            kv: KvCache::new(ops, model.config(), count * each, BLOCK_SIZE),
            tables: (0..count)
                .map(|sequence| table(sequence).collect())
                .collect(),
            workspace: Workspace::new(ops),
            states: ops.working(),
            logits: ops.exact(),
        }
    }

    /// One pass: keys and values of all rows, and the logits of each run's last one. On a device it may return before they are there.
    pub(super) fn pass(&mut self, runs: &[Run<'_>]) {
        let (mut tokens, mut spans, mut last) = (Vec::new(), Vec::new(), Vec::new());
        for run in runs {
            let first = tokens.len();
            tokens.extend_from_slice(run.tokens);
            spans.push(SeqSpan {
                rows: first..tokens.len(),
                start_pos: run.start,
                block_table: &self.tables[run.sequence],
            });
            last.push(tokens.len() as u32 - 1);
        }
        let adapters = runs
            .iter()
            .map(|run| (run.tokens.len(), run.adapter.clone()));
        let segments = Segment::join(adapters);
        let batch = Batch {
            tokens: &tokens,
            spans: &spans,
            segments: &segments,
            overlays: &[],
        };
        let (ops, config) = (self.model.ops(), self.model.config());
        let hidden = self
            .model
            .forward(&batch, &mut self.kv, &mut self.workspace);
        ops.resize(&mut self.states, runs.len() * config.hidden);
        ops.take_rows(hidden.all(), ops.ids(&last), self.states.all_mut());
        ops.resize(&mut self.logits, runs.len() * config.vocab);
        self.model.logits(&self.states, &[], &mut self.logits);
    }

    /// Draws the likeliest tokens, where the device draws, and waits for the pass.
    pub(super) fn draw(&self) {
        let ops = self.model.ops();
        let count = self.logits.len() / self.model.config().vocab;
        if ops
            .draw(self.logits.all(), &vec![TokenDraw::default(); count])
            .is_none()
        {
            ops.wait();
        }
    }

    /// The logits of the last pass, a row for each run.
    pub(super) fn read_logits(&self) -> Vec<f32> {
        let mut logits = vec![0.0; self.logits.len()];
        self.model.ops().read(self.logits.all(), &mut logits);
        logits
    }

    /// Fills every sequence with the same tokens: computed for the first, copied for all others.
    pub(super) fn fill(&mut self, tokens: &[u32]) {
        self.pass(&[Run {
            sequence: 0,
            tokens,
            start: 0,
            adapter: None,
        }]);
        let (first, others) = self.tables.split_at(1);
        for table in others {
            for (from, to) in first[0].iter().zip(table).take(blocks(tokens.len())) {
                self.kv.copy_block(self.model.ops(), *from, *to);
            }
        }
        self.model.ops().wait();
    }
}
