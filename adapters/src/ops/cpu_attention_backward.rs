//! The gradients of attention, without ever keeping the score matrix.
//!
//! A task is one sequence and one key head (or every sequence of one key head, when two spans share keys). Blocks of query rows go upwards; each computes
//! its scores again from the saved log-denominators, then adds to the gradients of keys and values query row after query row. The order of additions is
//! fixed by positions alone, so neither threads nor the cut into blocks show in a bit.

#![allow(unsafe_code, reason = "tiles are pointers")]

use std::ops::Range;

use super::cpu_attention::{Task, check, pack_heads, products, runs, work};
use super::cpu_buffer::{Scratch, spread, with_scratch};
use super::cpu_keys::{Keys, turn_rows};
use super::cpu_rows::dot;
use super::cpu_softmax::score_gradients;
use super::cpu_tile::{HALF, Isa, Out, PANEL, Tile};
use super::{AttentionGrads, AttentionSaved, AttentionShape, AttentionSpan, KvRows};

/// Scores kept at a time by one thread, twice: 512 KiB.
const SCORES: usize = 64 * 1024;

/// See [`Ops::attention_backward`](super::Ops::attention_backward).
pub(super) fn attention_backward(
    isa: Isa,
    shape: AttentionShape,
    saved: AttentionSaved<&[f32]>,
    spans: &[AttentionSpan<'_>],
    dout: &[f32],
    grads: AttentionGrads<&mut [f32]>,
) {
    check(shape, spans, saved.q, saved.k, saved.v);
    let flat = |span: &AttentionSpan<'_>| matches!(span.kv, KvRows::Flat { .. });
    assert!(spans.iter().all(flat), "nothing trains on a paged cache");
    let (q, k) = (saved.q.len(), saved.k.len());
    assert!(
        saved.out.len() == q && dout.len() == q && grads.dq.len() == q,
        "out, dout and dq have the shape of q"
    );
    assert!(
        grads.dk.len() == k && grads.dv.len() == k,
        "dk and dv have the shape of k"
    );
    assert_eq!(saved.lse.len() * shape.head_dim, q, "lse is [rows, heads]");
    let back = Backward {
        isa,
        shape,
        saved,
        dout,
        dq: Out(grads.dq.as_mut_ptr()),
        dk: Out(grads.dk.as_mut_ptr()),
        dv: Out(grads.dv.as_mut_ptr()),
    };
    let span = |span: usize, kv_head: usize, scratch: &mut Scratch| {
        let task = Task {
            kv: &spans[span].kv,
            rows: spans[span].rows.clone(),
            start: spans[span].start,
            kv_head,
        };
        back.task(&task, scratch);
    };
    let heads = shape.kv_heads;
    let work = work(shape, spans) * 3;
    if share_rows(shape, spans) {
        spread(heads, work, |kv_head| {
            with_scratch(|scratch| (0..spans.len()).for_each(|s| span(s, kv_head, scratch)));
        });
    } else {
        spread(spans.len() * heads, work, |t| {
            with_scratch(|scratch| span(t / heads, t % heads, scratch));
        });
    }
}

/// Whether two spans see a common row of keys, or write a common row of queries; if so they must not run at the same time.
fn share_rows(shape: AttentionShape, spans: &[AttentionSpan<'_>]) -> bool {
    let mut keys: Vec<Range<usize>> = Vec::new();
    let mut queries: Vec<Range<usize>> = Vec::new();
    for span in spans.iter().filter(|span| !span.rows.is_empty()) {
        let seen = shape.first_visible(span.start)..span.start + span.rows.len();
        keys.extend(runs(&span.kv, seen).map(|run| run.row..run.row + run.len));
        queries.push(span.rows.clone());
    }
    [keys, queries].iter_mut().any(|ranges| {
        ranges.sort_unstable_by_key(|range| range.start);
        ranges.windows(2).any(|pair| pair[1].start < pair[0].end)
    })
}

/// Operands of the backward pass.
struct Backward<'a> {
    isa: Isa,
    shape: AttentionShape,
    saved: AttentionSaved<&'a [f32]>,
    dout: &'a [f32],
    dq: Out,
    dk: Out,
    dv: Out,
}

/// A block of query rows and the positions that it sees.
struct Block {
    rows: Range<usize>,
    start: usize,
    seen: Range<usize>,
    origin: usize,
    width: usize,
}

impl Backward<'_> {
    fn task(&self, task: &Task<'_>, scratch: &mut Scratch) {
        let (shape, isa) = (self.shape, self.isa);
        let group = shape.heads / shape.kv_heads;
        if task.rows.is_empty() {
            return;
        }
        let seen = shape.first_visible(task.start)..task.start + task.rows.len();
        let origin = seen.start / PANEL * PANEL;
        let width = (seen.end - origin).next_multiple_of(PANEL);
        let [keys, values, queries, douts, scores, slopes, dqs, ..] = &mut scratch.0;
        let keys = keys.first(width * shape.head_dim);
        let values = values.first(width * shape.head_dim);
        turn_rows(isa, shape, self.saved.k, task, seen.clone(), origin, keys);
        turn_rows(isa, shape, self.saved.v, task, seen, origin, values);
        let (keys, values) = (Keys::Turned(keys), Keys::Turned(values));

        let height = (SCORES / (width * group)).clamp(1, 32);
        for first in task.rows.clone().step_by(height) {
            let rows = first..task.rows.end.min(first + height);
            let start = task.start + (first - task.rows.start);
            let block = Block {
                seen: shape.first_visible(start)..start + rows.len(),
                rows,
                start,
                origin,
                width,
            };
            let n = block.rows.len() * group;
            let queries = queries.first(n * shape.head_dim);
            let douts = douts.first(n * shape.head_dim);
            let scores = scores.first(n * width);
            let slopes = slopes.first(n * width);
            let dqs = dqs.first(n * shape.head_dim);
            pack_heads(shape, self.saved.q, &block.rows, task.kv_head, queries);
            pack_heads(shape, self.dout, &block.rows, task.kv_head, douts);
            let lanes = (block.seen.start - origin) / PANEL * PANEL
                ..(block.seen.end - origin).next_multiple_of(PANEL);
            let head_dim = shape.head_dim;
            products(isa, head_dim, queries, &keys, lanes.clone(), width, scores);
            products(isa, head_dim, douts, &values, lanes.clone(), width, slopes);
            for i in 0..n {
                let at = i * width;
                let row = at + lanes.start..at + lanes.end;
                let (scores, slopes) = (&mut scores[row.clone()], &mut slopes[row]);
                self.gradients(&block, task.kv_head, i, lanes.start, scores, slopes);
            }
            self.keys_and_values(task, &block, (scores, slopes), (queries, douts));
            self.queries(task, &block, slopes, dqs);
        }
    }

    /// Scores of query `i` become probabilities, `dout . v` becomes the gradient of the raw score.
    fn gradients(
        &self,
        block: &Block,
        kv_head: usize,
        i: usize,
        lane: usize,
        scores: &mut [f32],
        slopes: &mut [f32],
    ) {
        let shape = self.shape;
        let group = shape.heads / shape.kv_heads;
        let (row, head) = (block.rows.start + i / group, kv_head * group + i % group);
        let position = block.start + i / group;
        let first = shape.first_visible(position) - block.origin - lane;
        let last = position - block.origin - lane;
        scores[..first].fill(f32::NEG_INFINITY);
        scores[last + 1..].fill(f32::NEG_INFINITY);
        let at = shape.q_at(row, head);
        let (dout, out) = (&self.dout[at.clone()], &self.saved.out[at]);
        // SAFETY: pairs of slices of one length.
        unsafe {
            let mean = dot(self.isa, dout.as_ptr(), out.as_ptr(), out.len());
            score_gradients(
                self.isa,
                scores.as_mut_ptr(),
                slopes.as_mut_ptr(),
                scores.len(),
                shape.scale() as f32,
                self.saved.lse[row * shape.heads + head],
                mean,
            );
        }
    }

    /// `dv += p^T dout` and `dk += ds^T q`, query row after query row.
    fn keys_and_values(
        &self,
        task: &Task<'_>,
        block: &Block,
        (scores, slopes): (&[f32], &[f32]),
        (queries, douts): (&[f32], &[f32]),
    ) {
        let shape = self.shape;
        for run in runs(task.kv, block.seen.clone()) {
            for first in (0..shape.head_dim).step_by(PANEL) {
                let at = run.row * shape.kv_width() + task.kv_head * shape.head_dim + first;
                let column = run.position - block.origin;
                let sides = [(scores, douts, self.dv), (slopes, queries, self.dk)];
                for (left, right, into) in sides {
                    // SAFETY: `check` proved that the run's rows exist, and no other task writes this key head of them; `left` is [n, width], `right` is
                    // [n, head_dim].
                    unsafe {
                        Tile {
                            x: left.as_ptr().add(column),
                            x_row: 1,
                            x_k: block.width,
                            w: right.as_ptr().add(first),
                            w_k: shape.head_dim,
                            w_half: HALF,
                            k: left.len() / block.width,
                            y: into.at(at),
                            y_row: shape.kv_width(),
                            rows: run.len,
                            cols: PANEL.min(shape.head_dim - first),
                            accumulate: true,
                        }
                        .run(self.isa);
                    }
                }
            }
        }
    }

    /// `dq = ds K`, positions ascending, into the heads' places.
    fn queries(&self, task: &Task<'_>, block: &Block, slopes: &[f32], dqs: &mut [f32]) {
        let shape = self.shape;
        let group = shape.heads / shape.kv_heads;
        for (r, run) in runs(task.kv, block.seen.clone()).enumerate() {
            for first in (0..shape.head_dim).step_by(PANEL) {
                let at = run.row * shape.kv_width() + task.kv_head * shape.head_dim + first;
                // SAFETY: `check` proved that the run's rows exist; slopes and dqs are [n, width] and [n, head_dim] of this thread.
                unsafe {
                    Tile {
                        x: slopes.as_ptr().add(run.position - block.origin),
                        x_row: block.width,
                        x_k: 1,
                        w: self.saved.k.as_ptr().add(at),
                        w_k: shape.kv_width(),
                        w_half: HALF,
                        k: run.len,
                        y: dqs.as_mut_ptr().add(first),
                        y_row: shape.head_dim,
                        rows: slopes.len() / block.width,
                        cols: PANEL.min(shape.head_dim - first),
                        accumulate: r > 0,
                    }
                    .run(self.isa);
                }
            }
        }
        let heads = group * shape.head_dim;
        for (row, dq) in block.rows.clone().zip(dqs.chunks_exact(heads)) {
            let at = shape.q_at(row, task.kv_head * group).start;
            // SAFETY: these heads of this row belong to this task alone; `dq` of the caller is as long as `q`.
            unsafe { std::slice::from_raw_parts_mut(self.dq.at(at), heads) }.copy_from_slice(dq);
        }
    }
}
