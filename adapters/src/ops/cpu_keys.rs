//! Keys as attention reads them: panels of positions, in the cache's own blocks or turned for the task; and how the cache gets them.
//!
//! Copies only, no arithmetic. It must not know scores.

#![allow(unsafe_code, reason = "blocks are written by several threads")]

use std::ops::Range;

use super::cpu_attention::Task;
use super::cpu_buffer::spread;
use super::cpu_tile::{HALF, Isa, Out, PANEL};
use super::cpu_transpose::{prefetch, transpose_block};
use super::{AttentionShape, KvRows, NO_ROW};

/// What a missing position reads: as long as one side of a transposed block.
static ZEROS: [f32; 16] = [0.0; 16];

/// What a number costs that lies on a cache line of its own, in multiply-adds.
const LINE_COST: usize = 8;

/// Keys (or values) as panels of 32 positions.
pub(super) enum Keys<'a> {
    /// `[positions / 32][head_dim][32]`.
    Turned(&'a [f32]),
    /// In the cache's own blocks.
    Blocks(Blocks<'a>),
}

/// One head's keys in a sequence's blocks, which hold a multiple of 16 positions each.
pub(super) struct Blocks<'a> {
    k: &'a [f32],
    table: &'a [u32],
    block_size: usize,
    width: usize,
    head: usize,
    seen: Range<usize>,
    origin: usize,
}

/// The right side of a tile: see [`Tile::w`].
pub(super) struct Panel {
    pub(super) w: *const f32,
    pub(super) w_k: usize,
    pub(super) w_half: isize,
}

impl<'a> Keys<'a> {
    /// The keys of a task from position `origin` on: where the cache has them if its blocks hold whole halves of panels, else turned
    /// into `turned [positions / 32][head_dim][32]`.
    pub(super) fn of(
        isa: Isa,
        shape: AttentionShape,
        k: &'a [f32],
        task: &Task<'a>,
        seen: Range<usize>,
        origin: usize,
        turned: &'a mut [f32],
    ) -> Self {
        match *task.kv {
            KvRows::Paged { table, block_size } if block_size.is_multiple_of(HALF as usize) => {
                Keys::Blocks(Blocks {
                    k,
                    table,
                    block_size,
                    width: shape.kv_width(),
                    head: task.kv_head * shape.head_dim,
                    seen,
                    origin,
                })
            }
            KvRows::Paged { .. } => {
                gather_keys(shape, k, task, seen, origin, turned);
                Keys::Turned(turned)
            }
            KvRows::Flat { .. } => {
                turn_rows(isa, shape, k, task, seen, origin, turned);
                Keys::Turned(turned)
            }
        }
    }
}

impl Keys<'_> {
    /// The panel of positions `origin + lane..origin + lane + 32`. What is not seen reads as anything.
    pub(super) fn panel(&self, head_dim: usize, lane: usize) -> Panel {
        match self {
            Keys::Turned(panels) => Panel {
                w: panels[lane * head_dim..][..PANEL * head_dim].as_ptr(),
                w_k: PANEL,
                w_half: HALF,
            },
            Keys::Blocks(blocks) => {
                let left = blocks.half(lane);
                let right = blocks.half(lane + HALF as usize);
                // A half that nobody sees reads its neighbour: its scores count for nothing.
                let w = left.or(right).unwrap_or(0);
                let right = right.unwrap_or(w);
                Panel {
                    w: blocks.k[w..].as_ptr(),
                    w_k: blocks.block_size,
                    w_half: right as isize - w as isize,
                }
            }
        }
    }
}

impl Blocks<'_> {
    /// Where sixteen positions' first element lies; none if no position is seen.
    fn half(&self, lane: usize) -> Option<usize> {
        let position = self.origin + lane;
        let seen = position < self.seen.end && position + HALF as usize > self.seen.start;
        seen.then(|| {
            let block = self.table[position / self.block_size] as usize;
            let first = (block * self.width + self.head) * self.block_size;
            first + position % self.block_size
        })
    }

    /// The hardware cannot know where the next block lies.
    pub(super) fn prefetch(&self, lane: usize) {
        if let Some(at) = self.half(lane) {
            prefetch(&self.k[at..]);
        }
    }
}

/// Turns the `seen` rows of `k` (or `v`) into panels of 32 positions from `origin` on: `[positions / 32][head_dim][32]`, zeros where nothing is seen.
pub(super) fn turn_rows(
    isa: Isa,
    shape: AttentionShape,
    k: &[f32],
    task: &Task<'_>,
    seen: Range<usize>,
    origin: usize,
    panels: &mut [f32],
) {
    let head_dim = shape.head_dim;
    let head = task.kv_head * head_dim;
    let end = origin + panels.len() / head_dim;
    for (half, first) in (origin..end).step_by(16).enumerate() {
        let lines: [Option<*const f32>; 16] = std::array::from_fn(|i| {
            let position = first + i;
            seen.contains(&position)
                .then(|| k[task.kv.row(position) * shape.kv_width() + head..][..head_dim].as_ptr())
        });
        let into = &mut panels[half / 2 * PANEL * head_dim..][..PANEL * head_dim];
        for d in (0..head_dim).step_by(16) {
            let lines = lines.map(|line| line.map_or(ZEROS.as_ptr(), |line| line.wrapping_add(d)));
            let cols = (head_dim - d).min(16);
            // SAFETY: every line is `head_dim - d` numbers of a row, or sixteen zeros; the block ends inside `into`.
            unsafe {
                let to = into.as_mut_ptr().add(d * PANEL + half % 2 * 16);
                transpose_block(isa, &lines, 0, 16, cols, to, PANEL);
            }
        }
    }
}

/// As [`turn_rows`], from blocks that do not hold whole halves of panels.
fn gather_keys(
    shape: AttentionShape,
    k: &[f32],
    task: &Task<'_>,
    seen: Range<usize>,
    origin: usize,
    panels: &mut [f32],
) {
    let head_dim = shape.head_dim;
    panels.fill(0.0);
    for position in seen {
        let lane = position - origin;
        let panel = &mut panels[lane / PANEL * PANEL * head_dim..][..PANEL * head_dim];
        for (d, row) in panel.chunks_exact_mut(PANEL).enumerate() {
            row[lane % PANEL] = k[task.kv.key(shape, position, task.kv_head, d)];
        }
    }
}

/// Writes keys to turned blocks; see [`Ops::store_keys`](super::Ops::store_keys). Sixteen rows that fill a column of vectors go
/// together; a single row touches as many cache lines as it has numbers, so rows are shared out. No row stands there twice.
pub(super) fn store_keys(isa: Isa, from: &[f32], rows: &[u32], block_size: usize, k: &mut [f32]) {
    let Some(width) = from.len().checked_div(rows.len()) else {
        return;
    };
    let stored = rows.iter().filter(|row| **row != NO_ROW);
    let last = stored.max().map_or(0, |row| *row as usize / block_size + 1);
    assert!(
        last * block_size * width <= k.len(),
        "a row beyond the cache"
    );
    let side = HALF as usize;
    let whole = |at: usize| {
        let run = rows[at..].iter().take(side).enumerate();
        let next = |i: usize| rows[at].wrapping_add(i as u32);
        let adjacent = run.take_while(|(i, row)| **row == next(*i)).count();
        adjacent == side && next(0).is_multiple_of(HALF as u32) && block_size.is_multiple_of(side)
    };
    let k = Out(k.as_mut_ptr());
    spread(rows.len(), rows.len() * width * LINE_COST, |at| {
        if rows[at] == NO_ROW {
            return;
        }
        let row = rows[at] as usize;
        let (block, lane) = (row / block_size * block_size * width, row % block_size);
        let first = at.checked_sub(row % side).filter(|first| whole(*first));
        match first {
            Some(first) if first == at => {
                let lines: [&[f32]; 16] =
                    std::array::from_fn(|i| &from[(at + i) * width..][..width]);
                let lines = lines.map(<[f32]>::as_ptr);
                for d in (0..width).step_by(side) {
                    // SAFETY: sixteen rows of `width` numbers, into rows `d..` of a block that was found to be inside, sixteen columns from a
                    // multiple of 16 on; these rows belong to this task.
                    unsafe {
                        let to = k.at(block + d * block_size + lane);
                        transpose_block(
                            isa,
                            &lines,
                            d,
                            side,
                            (width - d).min(side),
                            to,
                            block_size,
                        );
                    }
                }
            }
            // The first row of its column wrote it.
            Some(_) => {}
            None => {
                for (d, number) in from[at * width..][..width].iter().enumerate() {
                    // SAFETY: an element of a block that was found to be inside, and of this row alone.
                    unsafe { *k.at(block + d * block_size + lane) = *number };
                }
            }
        }
    });
}
