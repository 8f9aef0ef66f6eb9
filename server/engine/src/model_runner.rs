//! Carries a planned step to the model: a flat list of tokens, cut in spans by sequence and in segments by adapter.
//!
//! Owns the keys and values and every buffer of a step, so that a step allocates next to nothing. The wanted states stay where
//! the operations work, known by their rows. It must not know what becomes of them.

use std::ops::Range;
use std::sync::Arc;

use espalier_adapters::batch::{Covered, Mixture, Segment};
use espalier_adapters::ops::{Backend, Buffer, Ops, TokenDraw};

use crate::block_manager::BlockCopy;
use crate::config::BLOCK_SIZE;
use crate::merger::MergedWeights;
use crate::model::{BaseSites, Batch, Buf, KvCache, Model, ResidentAdapter, SeqSpan, Workspace};

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

/// Some of the wanted states of a step, and what was added to the base for them; `None` where nothing was.
pub(crate) struct OwnedStates<'a> {
    pub(crate) rows: Range<usize>,
    pub(crate) adapters: Option<&'a Mixture>,
}

/// The model with all that a step needs.
pub(crate) struct ModelRunner {
    model: Arc<Model>,
    kv: KvCache,
    /// For self-checks, so that they touch nobody's keys and values.
    scratch_kv: KvCache,
    workspace: Workspace,
    tokens: Vec<u32>,
    /// The wanted states of a step, `[rows, hidden]`.
    states: Buf,
    /// Those of them whose logits are computed.
    chosen: Buf,
    /// Row numbers on their way to the operations.
    rows: Vec<u32>,
    /// Exact.
    logits: Buf,
    /// The logits on the host, where that is not where they are computed.
    host_logits: Vec<f32>,
}

/// From which a next token follows.
pub(crate) enum Choice<'a> {
    /// A row of logits `[vocab]`.
    Row(&'a mut [f32]),
    /// The token; `None` where a logit was not finite.
    Drawn(Option<u32>),
}

// === impl ModelRunner ===

impl ModelRunner {
    pub(crate) fn new(model: Arc<Model>, kv_blocks: usize) -> Self {
        let ops = model.ops();
        ModelRunner {
            kv: KvCache::new(ops, model.config(), kv_blocks, BLOCK_SIZE),
            scratch_kv: KvCache::new(ops, model.config(), 1, BLOCK_SIZE),
            workspace: Workspace::new(ops),
            tokens: Vec::new(),
            states: ops.working(),
            chosen: ops.working(),
            rows: Vec::new(),
            logits: ops.exact(),
            host_logits: Vec::new(),
            model,
        }
    }

    pub(crate) fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Copies the blocks of sequences that part from their prefix.
    pub(crate) fn copy_blocks(&mut self, copies: &[BlockCopy]) {
        for copy in copies {
            self.kv.copy_block(self.model.ops(), copy.from, copy.to);
        }
    }

    /// One step. `items` of one mixture should stand together. Says which rows each item's wanted states after the final norm
    /// are from now on: they come after the first `kept` rows, which stay as they are.
    pub(crate) fn run(&mut self, items: &[RunItem<'_>], kept: usize) -> Vec<Range<usize>> {
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
        self.rows.clear();
        let mut found = Vec::with_capacity(items.len());
        for (item, span) in items.iter().zip(&spans) {
            let rows = span.rows.start + item.wanted.start..span.rows.start + item.wanted.end;
            let first = kept + self.rows.len();
            self.rows.extend(rows.map(|row| row as u32));
            found.push(first..kept + self.rows.len());
        }
        self.make_room(kept, self.rows.len());
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
        let (model, width) = (&self.model, self.model.config().hidden);
        let hidden = model.forward(&batch, &mut self.kv, &mut self.workspace);
        let states = kept * width..self.states.len();
        let (rows, states) = (model.ops().ids(&self.rows), self.states.part_mut(states));
        model.ops().take_rows(hidden.all(), rows, states);
        if self.rows.is_empty() {
            // Nobody reads anything of this step, so nobody else would wait for it: it is over when a device has done it.
            model.ops().wait();
        }
        found
    }

    /// Room for `more` states after the first `kept`.
    fn make_room(&mut self, kept: usize, more: usize) {
        let (ops, width) = (self.model.ops(), self.model.config().hidden);
        let (kept, len) = (kept * width, (kept + more) * width);
        if kept == 0 {
            return ops.resize(&mut self.states, len);
        }
        // A buffer that grows forgets.
        let mut states = ops.working();
        ops.resize(&mut states, len);
        ops.copy(self.states.part(0..kept), states.part_mut(0..kept));
        self.states = states;
    }

    /// The states of `rows`, `[rows, hidden]`.
    pub(crate) fn read_states(&self, rows: Range<usize>) -> Vec<f32> {
        let width = self.model.config().hidden;
        let mut states = vec![0.0; rows.len() * width];
        let from = self.states.part(rows.start * width..rows.end * width);
        self.model.ops().read(from, &mut states);
        states
    }

    /// The logits `[rows, vocab]` of some states.
    pub(crate) fn logits(&mut self, states: &[OwnedStates<'_>]) -> &mut [f32] {
        let count = self.multiply(states);
        let (ops, vocab) = (self.model.ops(), self.model.config().vocab);
        if ops.on_host(&mut self.logits).is_none() {
            self.host_logits.resize(count * vocab, 0.0);
            ops.read(self.logits.all(), &mut self.host_logits);
            return &mut self.host_logits;
        }
        ops.on_host(&mut self.logits).unwrap_or_default()
    }

    /// From which the next tokens of some states follow: the tokens themselves where the device drew them by `draws`, else the
    /// rows of logits.
    pub(crate) fn choose(
        &mut self,
        states: &[OwnedStates<'_>],
        draws: &[Option<TokenDraw>],
    ) -> Vec<Choice<'_>> {
        self.multiply(states);
        let (ops, vocab) = (self.model.ops(), self.model.config().vocab);
        let asked: Vec<TokenDraw> = draws.iter().map(|draw| draw.unwrap_or_default()).collect();
        let Some(tokens) = ops.draw(self.logits.all(), &asked) else {
            let logits = ops.on_host(&mut self.logits).unwrap_or_default();
            return logits.chunks_exact_mut(vocab).map(Choice::Row).collect();
        };
        let rest = draws.iter().filter(|draw| draw.is_none()).count();
        self.host_logits.resize(rest * vocab, 0.0);
        let mut host = self.host_logits.chunks_exact_mut(vocab);
        let mut choices = Vec::with_capacity(draws.len());
        for (row, (draw, token)) in draws.iter().zip(tokens).enumerate() {
            if draw.is_some() {
                choices.push(Choice::Drawn(token));
            } else if let Some(to) = host.next() {
                ops.read(self.logits.part(row * vocab..(row + 1) * vocab), to);
                choices.push(Choice::Row(to));
            }
        }
        choices
    }

    /// The logits of some states, and how many there are.
    fn multiply(&mut self, states: &[OwnedStates<'_>]) -> usize {
        let (ops, config) = (self.model.ops(), self.model.config());
        self.rows.clear();
        let rows = states.iter().flat_map(|states| states.rows.clone());
        self.rows.extend(rows.map(|row| row as u32));
        let count = self.rows.len();
        ops.resize(&mut self.chosen, count * config.hidden);
        let rows = ops.ids(&self.rows);
        ops.take_rows(self.states.all(), rows, self.chosen.all_mut());
        ops.resize(&mut self.logits, count * config.vocab);
        let segments = Segment::join(states.iter().map(|states| {
            let adapters = states.adapters.cloned();
            (states.rows.len(), adapters.unwrap_or_default())
        }));
        self.model.logits(&self.chosen, &segments, &mut self.logits);
        count
    }

    /// The head's logits `[labels]` of one state `[hidden]`.
    pub(crate) fn score(&self, adapter: &ResidentAdapter, state: &[f32]) -> Vec<f32> {
        let ops = self.model.ops();
        let mut there = ops.working();
        ops.resize(&mut there, state.len());
        ops.write(state, there.all_mut());
        let mut scores = ops.exact();
        ops.resize(&mut scores, adapter.labels().len());
        adapter.score(ops, (there.all(), 1), scores.all_mut());
        let mut logits = vec![0.0; scores.len()];
        ops.read(scores.all(), &mut logits);
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
        let mut states = vec![0.0; hidden.len()];
        self.model.ops().read(hidden.all(), &mut states);
        states.iter().all(|value| value.is_finite())
    }

    /// New buffers, after a panic may have left the old ones in any state. Keys and values stay: who was in the
    /// failed step writes its rows again or is gone.
    pub(crate) fn renew_buffers(&mut self) {
        self.workspace = Workspace::new(self.model.ops());
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
