//! Causal attention of query rows over one sequence's keys and values, wherever these lie.
//!
//! A task is a few query rows of one sequence and one key head, with all query heads that share it. Keys are read in panels of 32 positions (the cache's
//! blocks have them so, flat ones are turned first), scores of a block of queries are computed with the tile kernel, their softmax is exact (the whole row is there, nothing is rescaled), and the weighted sum over values
//! runs in ascending positions. Panels are aligned to absolute positions, so a row's bits depend on its position and its sequence only: not on how a prompt
//! was cut into chunks, nor on the other rows. It must not know about requests or cache policy.

#![allow(unsafe_code, reason = "tiles are pointers")]

use std::ops::Range;

use super::cpu_buffer::{Scratch, spread, with_scratch};
use super::cpu_keys::Keys;
use super::cpu_rows::scaled;
use super::cpu_softmax::exponentials;
use super::cpu_tile::{HALF, Isa, Out, PANEL, Tile};
use super::cpu_transpose::prefetch;
use super::{AttentionShape, AttentionSpan, KvRows};

/// Query rows in one task: enough to pay for turning the keys, few enough to share the work out.
const ROWS_PER_TASK: usize = 64;

/// Scores kept at a time by one thread: 1 MiB.
const SCORES: usize = 256 * 1024;

/// Query rows of one sequence that share a key head.
pub(super) struct Task<'a> {
    /// Where the sequence's keys and values lie.
    pub(super) kv: &'a KvRows<'a>,
    /// Rows of `q`.
    pub(super) rows: Range<usize>,
    /// Position of the first row.
    pub(super) start: usize,
    /// The key head.
    pub(super) kv_head: usize,
}

/// Cuts spans into tasks of at most `rows_per_task` rows and one key head.
pub(super) fn tasks<'a>(
    shape: AttentionShape,
    spans: &'a [AttentionSpan<'a>],
    rows_per_task: usize,
) -> Vec<Task<'a>> {
    let mut tasks = Vec::new();
    for span in spans {
        for first in span.rows.clone().step_by(rows_per_task) {
            for kv_head in 0..shape.kv_heads {
                tasks.push(Task {
                    kv: &span.kv,
                    rows: first..span.rows.end.min(first + rows_per_task),
                    start: span.start + (first - span.rows.start),
                    kv_head,
                });
            }
        }
    }
    tasks
}

/// Multiply-adds that the spans need, roughly.
pub(super) fn work(shape: AttentionShape, spans: &[AttentionSpan<'_>]) -> usize {
    let seen = |span: &AttentionSpan<'_>| {
        let end = span.start + span.rows.len();
        span.rows.len() * (end - shape.first_visible(span.start))
    };
    spans.iter().map(seen).sum::<usize>() * shape.q_width() * 2
}

/// Every row that the spans name must exist, because what follows uses pointers.
pub(super) fn check(
    shape: AttentionShape,
    spans: &[AttentionSpan<'_>],
    q: &[f32],
    k: &[f32],
    v: &[f32],
) {
    assert!(
        shape.kv_heads > 0 && shape.heads.is_multiple_of(shape.kv_heads),
        "query heads come in whole groups"
    );
    assert_eq!(k.len(), v.len(), "keys and values have one shape");
    let kv_rows = k.len() / shape.kv_width().max(1);
    for span in spans {
        if let KvRows::Paged { block_size, .. } = span.kv {
            assert!(kv_rows.is_multiple_of(block_size), "blocks come whole");
        }
        assert!(
            span.rows.end * shape.q_width() <= q.len(),
            "rows {:?} of q",
            span.rows
        );
        let seen = shape.first_visible(span.start)..span.start + span.rows.len();
        let last = runs(&span.kv, seen).map(|run| run.row + run.len).max();
        assert!(
            last.unwrap_or(0) <= kv_rows,
            "a block table names row {last:?} of {kv_rows}"
        );
    }
}

/// Positions whose values follow each other in memory.
pub(super) struct Run {
    /// The first position.
    pub(super) position: usize,
    /// Its row.
    pub(super) row: usize,
    /// How many.
    pub(super) len: usize,
}

/// `positions` as runs of adjacent rows, ascending.
pub(super) fn runs<'a>(
    kv: &'a KvRows<'a>,
    positions: Range<usize>,
) -> impl Iterator<Item = Run> + 'a {
    let mut at = positions.start;
    std::iter::from_fn(move || {
        if at >= positions.end {
            return None;
        }
        let (position, row) = (at, kv.row(at));
        at = match *kv {
            KvRows::Flat { .. } => positions.end,
            KvRows::Paged { block_size, .. } => {
                ((at / block_size + 1) * block_size).min(positions.end)
            }
        };
        Some(Run {
            position,
            row,
            len: at - position,
        })
    })
}

/// The forward pass; see [`Ops::attention`](super::Ops::attention).
#[allow(clippy::too_many_arguments, reason = "operands of an operation")]
pub(super) fn attention(
    isa: Isa,
    shape: AttentionShape,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    spans: &[AttentionSpan<'_>],
    out: &mut [f32],
    lse: Option<&mut [f32]>,
) {
    check(shape, spans, q, k, v);
    assert_eq!(q.len(), out.len(), "q and out have one shape");
    let rows = q.len() / shape.q_width().max(1);
    let lse = lse.map(|lse| {
        assert_eq!(lse.len(), rows * shape.heads, "lse is [rows, heads]");
        Out(lse.as_mut_ptr())
    });
    let out = Out(out.as_mut_ptr());
    let tasks = tasks(shape, spans, ROWS_PER_TASK);
    spread(tasks.len(), work(shape, spans), |t| {
        with_scratch(|scratch| {
            let attend = Attend {
                isa,
                shape,
                q,
                k,
                v,
                out,
                lse,
            };
            attend.task(&tasks[t], scratch);
        });
    });
}

/// Operands of the forward pass.
#[derive(Clone, Copy)]
struct Attend<'a> {
    isa: Isa,
    shape: AttentionShape,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    out: Out,
    lse: Option<Out>,
}

/// A block of query rows with the positions that it sees.
struct Block {
    rows: Range<usize>,
    /// Positions that some row of the block sees.
    seen: Range<usize>,
    /// Position of column 0 of the scores, a multiple of 32.
    origin: usize,
    /// Columns of the scores.
    width: usize,
    kv_head: usize,
}

impl Attend<'_> {
    fn task(&self, task: &Task<'_>, scratch: &mut Scratch) {
        let shape = self.shape;
        let group = shape.heads / shape.kv_heads;
        let seen = shape.first_visible(task.start)..task.start + task.rows.len();
        let origin = seen.start / PANEL * PANEL;
        let width = (seen.end - origin).next_multiple_of(PANEL);
        let [keys, queries, scores, sums, totals, ..] = &mut scratch.0;
        let keys = keys.first(width * shape.head_dim);
        let keys = Keys::of(self.isa, shape, self.k, task, seen, origin, keys);

        let height = (SCORES / (width * group)).clamp(1, 32);
        for first in task.rows.clone().step_by(height) {
            let rows = first..task.rows.end.min(first + height);
            let start = task.start + (first - task.rows.start);
            let block = Block {
                seen: shape.first_visible(start)..start + rows.len(),
                rows,
                origin,
                width,
                kv_head: task.kv_head,
            };
            let n = block.rows.len() * group;
            let queries = queries.first(n * shape.head_dim);
            let scores = scores.first(n * width);
            let sums = sums.first(n * shape.head_dim);
            let totals = totals.first(n);
            pack_heads(shape, self.q, &block.rows, task.kv_head, queries);
            let lanes = panel_scores(self.isa, shape, &block, queries, &keys, scores);
            for (i, row) in scores.chunks_exact_mut(width).enumerate() {
                let position = start + i / group;
                totals[i] = self.softmax(&block, i, position, lanes.clone(), row);
            }
            self.weigh(task.kv, &block, scores, sums);
            self.store(&block, totals, sums);
        }
    }

    /// Exponentials of query `i` of the block over columns `lanes`; returns their sum and notes its logarithm.
    fn softmax(
        &self,
        block: &Block,
        i: usize,
        position: usize,
        lanes: Range<usize>,
        row: &mut [f32],
    ) -> f32 {
        let shape = self.shape;
        let group = shape.heads / shape.kv_heads;
        let (first, last) = (
            shape.first_visible(position) - block.origin,
            position - block.origin,
        );
        row[lanes.start..first].fill(f32::NEG_INFINITY);
        row[last + 1..lanes.end].fill(f32::NEG_INFINITY);
        let row = &mut row[lanes];
        // SAFETY: `row` is whole panels and holds the position's own score.
        let (highest, total) =
            unsafe { exponentials(self.isa, row.as_mut_ptr(), row.len(), shape.scale() as f32) };
        if let Some(lse) = self.lse {
            let head = block.kv_head * group + i % group;
            let at = (block.rows.start + i / group) * shape.heads + head;
            // SAFETY: this row and head belong to this task alone, and `lse` was checked to be [rows, heads].
            unsafe { *lse.at(at) = highest + total.ln() };
        }
        total
    }

    /// `sums = scores V`, positions ascending.
    fn weigh(&self, kv: &KvRows<'_>, block: &Block, scores: &[f32], sums: &mut [f32]) {
        let shape = self.shape;
        let w_k = match kv {
            KvRows::Flat { .. } => shape.kv_width(),
            KvRows::Paged { .. } => shape.head_dim,
        };
        for (r, run) in runs(kv, block.seen.clone()).enumerate() {
            let run_at = kv.value(shape, run.position, block.kv_head);
            if let KvRows::Paged { .. } = kv
                && run.position + run.len < block.seen.end
            {
                let next = kv.value(shape, run.position + run.len, block.kv_head);
                prefetch(&self.v[next..]);
            }
            for first in (0..shape.head_dim).step_by(PANEL) {
                let at = run_at + first;
                // SAFETY: `check` proved that the run's rows exist; scores and sums are [n, width] and [n, head_dim] of this thread.
                unsafe {
                    Tile {
                        x: scores.as_ptr().add(run.position - block.origin),
                        x_row: block.width,
                        x_k: 1,
                        w: self.v.as_ptr().add(at),
                        w_k,
                        w_half: HALF,
                        k: run.len,
                        y: sums.as_mut_ptr().add(first),
                        y_row: shape.head_dim,
                        rows: scores.len() / block.width,
                        cols: PANEL.min(shape.head_dim - first),
                        accumulate: r > 0,
                    }
                    .run(self.isa);
                }
            }
        }
    }

    /// Divides by the totals into the heads' places.
    fn store(&self, block: &Block, totals: &[f32], sums: &[f32]) {
        let shape = self.shape;
        let group = shape.heads / shape.kv_heads;
        for (i, (sums, total)) in sums.chunks_exact(shape.head_dim).zip(totals).enumerate() {
            let head = block.kv_head * group + i % group;
            let at = shape.q_at(block.rows.start + i / group, head);
            // SAFETY: this row and head of `out` belong to this task alone; `out` is as long as `q`, which `check` compared with the spans.
            unsafe {
                scaled(
                    self.isa,
                    sums.as_ptr(),
                    1.0 / total,
                    self.out.at(at.start),
                    shape.head_dim,
                );
            }
        }
    }
}

/// Raw scores of a block of queries, panel by panel; returns the columns that were written.
fn panel_scores(
    isa: Isa,
    shape: AttentionShape,
    block: &Block,
    queries: &[f32],
    keys: &Keys<'_>,
    scores: &mut [f32],
) -> Range<usize> {
    let lanes = (block.seen.start - block.origin) / PANEL * PANEL
        ..(block.seen.end - block.origin).next_multiple_of(PANEL);
    products(
        isa,
        shape.head_dim,
        queries,
        keys,
        lanes.clone(),
        block.width,
        scores,
    );
    lanes
}

/// `scores[:, lanes] = queries * keys`, for whole panels of positions.
pub(super) fn products(
    isa: Isa,
    head_dim: usize,
    queries: &[f32],
    keys: &Keys<'_>,
    lanes: Range<usize>,
    width: usize,
    scores: &mut [f32],
) {
    let n = queries.len() / head_dim;
    assert!(
        scores.len() >= n * width && lanes.end <= width,
        "scores are [n, width]"
    );
    for lane in lanes.clone().step_by(PANEL) {
        let panel = keys.panel(head_dim, lane);
        if let Keys::Blocks(blocks) = keys {
            blocks.prefetch(lane + PANEL);
            blocks.prefetch(lane + PANEL + HALF as usize);
        }
        // SAFETY: `queries` is [n, head_dim] and `scores` [n, width], checked above; a panel is [head_dim][32] of a live slice, or two halves
        // of blocks whose rows `check` found in the cache.
        unsafe {
            Tile {
                x: queries.as_ptr(),
                x_row: head_dim,
                x_k: 1,
                w: panel.w,
                w_k: panel.w_k,
                w_half: panel.w_half,
                k: head_dim,
                y: scores.as_mut_ptr().add(lane),
                y_row: width,
                rows: n,
                cols: PANEL,
                accumulate: false,
            }
            .run(isa);
        }
    }
}

/// Copies the heads of one group to `[rows * group, head_dim]`, row after row.
pub(super) fn pack_heads(
    shape: AttentionShape,
    q: &[f32],
    rows: &Range<usize>,
    kv_head: usize,
    packed: &mut [f32],
) {
    let group = shape.heads / shape.kv_heads;
    let heads = group * shape.head_dim;
    for (row, packed) in rows.clone().zip(packed.chunks_exact_mut(heads)) {
        packed.copy_from_slice(&q[shape.q_at(row, kv_head * group).start..][..heads]);
    }
}
