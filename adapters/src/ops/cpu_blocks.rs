//! Products with weights that are kept in blocks of 32 inputs with shared scales (Q8_0, Q4_0, Q4_1).
//!
//! A weight `[outputs, inputs]` is stored in panels of 32 outputs. A panel is a row of *cells*, one for each block of 32 inputs, so that it streams through
//! the kernel from end to end: the codes of the 32 outputs, then their 32 scales, then (Q4_1) their 32 minima, in f16. Codes lie in groups of four inputs, as
//! the dot product instructions take them: `[8 groups][32 outputs][4]` for bytes, `[4 groups][32 outputs][4]` for nibbles, whose lower halves are
//! inputs 0..16 and whose upper halves are inputs 16..32. Bytes are kept with 128 added, because those instructions take one side unsigned.
//!
//! Forward, the rows are rounded to bytes (`cpu_rounded_rows`), integer sums of a block are exact, and blocks are added in f32 in ascending order. Backward,
//! and where a row is looked up, the weights are what their blocks stand for, in f32. This file must not know which site of which layer a weight is.

#![allow(unsafe_code, reason = "tiles are pointers")]

use std::ops::Range;

use half::f16;

use super::cpu_buffer::{Aligned, spread, with_rounded_rows};
use super::cpu_dot::DotTile;
use super::cpu_matmul::{backward, checked_rows};
use super::cpu_tile::{Isa, Out, PANEL};
use super::weight::{BLOCK, Blocks, WeightKind};

/// Bytes of rounded rows that one task keeps in L2 beside a panel.
const ROWS_IN_CACHE: usize = 192 * 1024;

/// Up to this many rows, a product is bound by reading the weights, and each thread should read long stretches of them.
const FEW_ROWS: usize = 16;

/// What is added to a byte code.
const BIAS: u8 = 128;

/// A frozen weight in panels of 32 outputs, block by block.
#[derive(Clone, Debug)]
pub(super) struct BlockPanels {
    kind: WeightKind,
    outputs: usize,
    inputs: usize,
    /// `[outputs / 32, rounded up][inputs / 32, rounded up][cell]`.
    cells: Aligned<u8>,
}

/// Bytes of the codes of one cell.
pub(super) const fn code_bytes(kind: WeightKind) -> usize {
    match kind {
        WeightKind::Q8_0 => BLOCK * PANEL,
        _ => BLOCK * PANEL / 2,
    }
}

/// Bytes of one cell: a whole number of cache lines.
pub(super) const fn cell_bytes(kind: WeightKind) -> usize {
    let halves = match kind {
        WeightKind::Q4_1 => 2 * PANEL,
        _ => PANEL,
    };
    code_bytes(kind) + 2 * halves
}

// === impl BlockPanels ===

impl BlockPanels {
    /// Packs rows of blocks.
    pub(super) fn pack(blocks: &Blocks, outputs: usize, inputs: usize) -> Self {
        assert_eq!(
            (blocks.inputs(), blocks.bytes().len()),
            (inputs, outputs * blocks.row_bytes()),
            "a weight is [outputs, inputs]"
        );
        let kind = blocks.kind();
        let (count, cell) = (inputs.div_ceil(BLOCK), cell_bytes(kind));
        let panels = outputs.div_ceil(PANEL);
        let mut cells = Aligned::zeros(panels * count * cell);
        let out = Bytes(cells.as_mut_slice().as_mut_ptr());
        spread(panels, 16 * outputs * inputs, |panel| {
            // SAFETY: a panel's cells belong to one task.
            let own = unsafe {
                std::slice::from_raw_parts_mut(out.at(panel * count * cell), count * cell)
            };
            for output in 0..PANEL.min(outputs - panel * PANEL) {
                let row = &blocks.bytes()[(panel * PANEL + output) * blocks.row_bytes()..]
                    [..blocks.row_bytes()];
                for (block, cell) in row
                    .chunks_exact(kind.block_bytes())
                    .zip(own.chunks_exact_mut(cell))
                {
                    place(kind, block, output, cell);
                }
            }
        });
        BlockPanels {
            kind,
            outputs,
            inputs,
            cells,
        }
    }

    /// The format.
    pub(super) fn kind(&self) -> WeightKind {
        self.kind
    }

    /// `(outputs, inputs)`.
    pub(super) fn dims(&self) -> (usize, usize) {
        (self.outputs, self.inputs)
    }

    /// Bytes of the packed copy.
    pub(super) fn bytes(&self) -> usize {
        self.cells.as_slice().len()
    }

    /// Blocks of one row.
    fn blocks(&self) -> usize {
        self.inputs.div_ceil(BLOCK)
    }

    /// The cell of `panel` and `block`.
    fn cell(&self, panel: usize, block: usize) -> &[u8] {
        let cell = cell_bytes(self.kind);
        &self.cells.as_slice()[(panel * self.blocks() + block) * cell..][..cell]
    }

    /// Row `ids[i]` into `out[i]`.
    pub(super) fn gather(&self, ids: &[u32], out: &mut [f32]) {
        assert_eq!(out.len(), ids.len() * self.inputs, "one row for each id");
        if self.inputs == 0 {
            return;
        }
        for (id, out) in ids.iter().zip(out.chunks_exact_mut(self.inputs)) {
            let id = *id as usize;
            assert!(id < self.outputs, "row {id} of {}", self.outputs);
            for (block, out) in out.chunks_mut(BLOCK).enumerate() {
                let values = widen(self.kind, self.cell(id / PANEL, block), id % PANEL);
                out.copy_from_slice(&values[..out.len()]);
            }
        }
    }

    /// Columns `outputs` of `y = x W^T`.
    pub(super) fn matmul(&self, isa: Isa, x: &[f32], outputs: Range<usize>, y: &mut [f32]) {
        let rows = checked_rows(self.dims(), y, x, &outputs);
        if rows == 0 || outputs.is_empty() {
            return;
        }
        let (k, blocks) = (self.inputs, self.blocks());
        let first = outputs.start / PANEL;
        let panels = outputs.end.div_ceil(PANEL) - first;
        // Stretches of rows that stay in L2, of about the same height.
        let tallest = (ROWS_IN_CACHE / (blocks * BLOCK).max(1)).clamp(48, 240);
        let tall = rows.div_ceil(rows.div_ceil(tallest)).next_multiple_of(6);
        let wide = if rows <= FEW_ROWS {
            panels.div_ceil(16)
        } else {
            1
        };
        let strips = panels.div_ceil(wide);
        let out = Out(y.as_mut_ptr());
        with_rounded_rows(|rounded| {
            let rounded = rounded.round(isa, x, k);
            spread(
                rows.div_ceil(tall) * strips,
                rows * k * outputs.len(),
                |task| {
                    let row = task / strips * tall;
                    let from = first + task % strips * wide;
                    for panel in from..(from + wide).min(first + panels) {
                        // SAFETY: these rows and the columns of `panel` belong to this task alone and lie inside `y`; `rounded` has as many rows as
                        // `x`, `checked_rows` proved both, and the panel is `blocks` cells.
                        unsafe {
                            DotTile {
                                kind: self.kind,
                                cells: self
                                    .cells
                                    .as_slice()
                                    .as_ptr()
                                    .add(panel * blocks * cell_bytes(self.kind)),
                                x: rounded.at_row(row),
                                y: out.at(row * self.outputs + panel * PANEL),
                                y_row: self.outputs,
                                rows: tall.min(rows - row),
                                cols: PANEL.min(self.outputs - panel * PANEL),
                            }
                            .run(isa);
                        }
                    }
                },
            );
        });
    }

    /// `dx += dy[:, outputs] W[outputs, :]`, outputs in ascending order.
    pub(super) fn backward(&self, isa: Isa, dy: &[f32], outputs: Range<usize>, dx: &mut [f32]) {
        backward(
            isa,
            self.dims(),
            dy,
            outputs,
            dx,
            |outputs, inputs, turned| {
                for (output, turned) in outputs.zip(turned.chunks_exact_mut(PANEL)) {
                    let cell = self.cell(output / PANEL, inputs.start / BLOCK);
                    turned.copy_from_slice(&widen(self.kind, cell, output % PANEL));
                }
            },
        );
    }
}

/// A pointer to cells that several threads write at disjoint places.
#[derive(Clone, Copy)]
struct Bytes(*mut u8);

// SAFETY: each panel's bytes are written by one task.
unsafe impl Send for Bytes {}
// SAFETY: as above.
unsafe impl Sync for Bytes {}

impl Bytes {
    /// # Safety
    /// `n` stays inside the allocation.
    unsafe fn at(self, n: usize) -> *mut u8 {
        // SAFETY: promised by the caller.
        unsafe { self.0.add(n) }
    }
}

/// Puts a block of output `output` of the panel into its cell.
fn place(kind: WeightKind, block: &[u8], output: usize, cell: &mut [u8]) {
    let codes_at = kind.block_bytes() - code_bytes(kind) / PANEL;
    let bias = if kind == WeightKind::Q8_0 { BIAS } else { 0 };
    for (group, codes) in block[codes_at..].chunks_exact(4).enumerate() {
        let to = &mut cell[(group * PANEL + output) * 4..][..4];
        for (to, code) in to.iter_mut().zip(codes) {
            *to = code.wrapping_add(bias);
        }
    }
    for (i, half) in block[..codes_at].chunks_exact(2).enumerate() {
        let at = code_bytes(kind) + (i * PANEL + output) * 2;
        cell[at..at + 2].copy_from_slice(half);
    }
}

/// What the block of output `output` stands for.
fn widen(kind: WeightKind, cell: &[u8], output: usize) -> [f32; BLOCK] {
    let half = |i: usize| {
        let at = code_bytes(kind) + (i * PANEL + output) * 2;
        f16::from_le_bytes([cell[at], cell[at + 1]]).to_f32()
    };
    let byte = |i: usize| cell[(i / 4 * PANEL + output) * 4 + i % 4];
    let nibble = |i: usize| {
        let byte = byte(i % 16);
        f32::from(if i < 16 { byte & 15 } else { byte >> 4 })
    };
    let d = half(0);
    match kind {
        WeightKind::Q8_0 => {
            std::array::from_fn(|i| d * f32::from(byte(i).wrapping_sub(BIAS) as i8))
        }
        WeightKind::Q4_1 => {
            let m = half(1);
            std::array::from_fn(|i| d * nibble(i) + m)
        }
        _ => std::array::from_fn(|i| d * (nibble(i) - 8.0)),
    }
}
