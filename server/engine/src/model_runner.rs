//! Carries a planned step to the model: a flat list of tokens, cut in spans by sequence and in segments by adapter.
//!
//! Owns the keys and values and every buffer of a step, so that a step allocates next to nothing. It must not know what
//! becomes of the states that it returns.

use std::ops::Range;
use std::sync::Arc;

use espalier_adapters::batch::{Covered, Mixture, Segment};
use espalier_adapters::ops::{Backend, Ops};

use crate::block_manager::BlockCopy;
use crate::config::BLOCK_SIZE;
use crate::merger::MergedWeights;
use crate::model::{BaseSites, Batch, KvCache, Model, ResidentAdapter, SeqSpan, Workspace};

/// Tokens of an adapter's self-check; they fit in one block.
pub(crate) const SELF_CHECK_TOKENS: usize = 4;

/// In tests, a step whose rows begin so panics.
#[cfg(test)]
pub(crate) const POISON: [u32; 4] = [3, 3, 3, 3];

/// One sequence's rows in a step.
pub(crate) struct RunItem<'a> {
    pub(crate) tokens: &'a [u32],
    /// Position of the first of them.
    pub(crate) start: usize,
    pub(crate) block_table: &'a [u32],
    pub(crate) adapters: &'a Mixture,
    /// The weights that answer in the base's place; the update is in them, so that `adapters` is empty.
    pub(crate) merged: Option<&'a Arc<MergedWeights>>,
    /// Whose states are wanted, counted from the first of these rows.
    pub(crate) wanted: Range<usize>,
}

/// The model with all that a step needs.
pub(crate) struct ModelRunner {
    model: Arc<Model>,
    kv: KvCache,
    /// For self-checks, so that they touch nobody's keys and values.
    scratch_kv: KvCache,
    workspace: Workspace,
    tokens: Vec<u32>,
    logits: Vec<f32>,
}

// === impl ModelRunner ===

impl ModelRunner {
    pub(crate) fn new(model: Arc<Model>, kv_blocks: usize) -> Self {
        let kv = KvCache::new(model.config(), kv_blocks, BLOCK_SIZE);
        let scratch_kv = KvCache::new(model.config(), 1, BLOCK_SIZE);
        ModelRunner {
            model,
            kv,
            scratch_kv,
            workspace: Workspace::new(),
            tokens: Vec::new(),
            logits: Vec::new(),
        }
    }

    pub(crate) fn model(&self) -> &Arc<Model> {
        &self.model
    }

    pub(crate) fn hidden_size(&self) -> usize {
        self.model.config().hidden
    }

    /// Copies the blocks of sequences that part from their prefix.
    pub(crate) fn copy_blocks(&mut self, copies: &[BlockCopy]) {
        for copy in copies {
            self.kv.copy_block(copy.from, copy.to);
        }
    }

    /// One step. `items` of one mixture should stand together. The wanted states after the final norm go to `states`,
    /// item after item, `[wanted rows, hidden]`.
    pub(crate) fn run(&mut self, items: &[RunItem<'_>], states: &mut Vec<f32>) {
        #[cfg(test)]
        for item in items {
            assert!(
                !item.tokens.starts_with(&POISON),
                "a test asked for this panic"
            );
        }
        self.tokens.clear();
        let mut spans = Vec::with_capacity(items.len());
        for item in items {
            let first = self.tokens.len();
            self.tokens.extend_from_slice(item.tokens);
            spans.push(SeqSpan {
                rows: first..self.tokens.len(),
                start_pos: item.start,
                block_table: item.block_table,
            });
        }
        let segments = Segment::join(
            items
                .iter()
                .map(|item| (item.tokens.len(), item.adapters.clone())),
        );
        let overlays = covered(items, &spans);
        let batch = Batch {
            tokens: &self.tokens,
            spans: &spans,
            segments: &segments,
            overlays: &overlays,
        };
        let hidden_size = self.model.config().hidden;
        let (model, kv, workspace) = (&self.model, &mut self.kv, &mut self.workspace);
        let hidden = model.forward(&batch, kv, workspace);
        states.clear();
        for (item, span) in items.iter().zip(&spans) {
            let rows = span.rows.start + item.wanted.start..span.rows.start + item.wanted.end;
            states.extend_from_slice(&hidden[rows.start * hidden_size..rows.end * hidden_size]);
        }
    }

    /// The logits `[rows, vocab]` of states `[rows, hidden]`.
    pub(crate) fn logits(&mut self, states: &[f32]) -> &mut [f32] {
        let config = self.model.config();
        self.logits
            .resize(states.len() / config.hidden * config.vocab, 0.0);
        let (model, logits) = (&self.model, &mut self.logits);
        model.logits(states, logits);
        &mut self.logits
    }

    /// The head's logits `[labels]` of one state.
    pub(crate) fn score(&self, adapter: &ResidentAdapter, state: &[f32]) -> Vec<f32> {
        let mut logits = vec![0.0; adapter.labels().len()];
        adapter.score(self.model.ops(), state, &mut logits);
        logits
    }

    /// Whether a few tokens through the adapter give finite states.
    pub(crate) fn self_check(&mut self, adapter: &Arc<ResidentAdapter>) -> bool {
        let vocab = self.model.config().vocab as u32;
        let tokens: Vec<u32> = (0..SELF_CHECK_TOKENS as u32)
            .map(|i| (i * 7 + 1) % vocab)
            .collect();
        let spans = [SeqSpan {
            rows: 0..tokens.len(),
            start_pos: 0,
            block_table: &[0],
        }];
        let segments = [Segment {
            rows: 0..tokens.len(),
            adapters: Some(Arc::clone(adapter)).into(),
        }];
        let batch = Batch {
            tokens: &tokens,
            spans: &spans,
            segments: &segments,
            overlays: &[],
        };
        let hidden = self
            .model
            .forward(&batch, &mut self.scratch_kv, &mut self.workspace);
        hidden.iter().all(|value| value.is_finite())
    }

    /// New buffers, after a panic may have left the old ones in any state. Keys and values stay: who was in the
    /// failed step writes its rows again or is gone.
    pub(crate) fn renew_buffers(&mut self) {
        self.workspace = Workspace::new();
    }
}

/// Adjacent items of one merged copy in one piece.
fn covered<'a>(
    items: &[RunItem<'a>],
    spans: &[SeqSpan<'_>],
) -> Vec<Covered<'a, <Backend as Ops>::Matrix>> {
    let mut covered: Vec<Covered<'a, _>> = Vec::new();
    for (item, span) in items.iter().zip(spans) {
        let Some(overlay) = item.merged.map(|merged| &**merged) else {
            continue;
        };
        let joins = |last: &&mut Covered<'a, _>| {
            last.rows.end == span.rows.start && std::ptr::eq(last.overlay, overlay)
        };
        match covered.last_mut().filter(joins) {
            Some(last) => last.rows.end = span.rows.end,
            None => covered.push(Covered {
                rows: span.rows.clone(),
                overlay,
            }),
        }
    }
    covered
}
