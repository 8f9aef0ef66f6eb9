//! Products with the frozen base weights, from one packed copy of them.
//!
//! A weight `[outputs, inputs]` is stored in panels of 32 outputs, each `[inputs][32]`, the last one padded with zeros. Forward, a panel streams through the
//! tile kernel once for every few rows: at decode that is one pass over the weights at memory speed, at prefill the panel stays in L2 while rows stream.
//! Backward, 32 inputs at a time are transposed on the fly into the same shape, so that the same kernel serves and no second copy of the weights exists.
//! Numbers are kept as they are stored (f32, bf16, f16) and widened in registers. This file must not know which site of which layer a weight is.

#![allow(unsafe_code, reason = "tiles are pointers")]

use std::ops::Range;

use super::cpu_buffer::{Aligned, spread, spread_parts, with_scratch};
use super::cpu_stored::Stored;
use super::cpu_tile::{HALF, Isa, Out, PANEL, Tile};
use super::cpu_transpose::{prefetch, transpose};

/// Numbers of `x` that one task keeps in L2 beside a panel.
const ROWS_IN_CACHE: usize = 96 * 1024;

/// Up to this many rows, the way back is bound by reading the weights.
const FEW_ROWS: usize = 32;

/// Outputs whose weights are transposed at a time on the way back: 128 bytes each, so a chunk stays in L2.
const CHUNK: usize = 1536;

/// Rows of a product between `wide` `[rows, outputs]` and `thin` `[rows, inputs]`, of which `outputs` are computed. Wrong lengths panic.
pub(super) fn checked_rows(
    dims: (usize, usize),
    wide: &[f32],
    thin: &[f32],
    outputs: &Range<usize>,
) -> usize {
    let rows = wide.len() / dims.0.max(1);
    assert_eq!(wide.len(), rows * dims.0, "whole rows of {}", dims.0);
    assert_eq!(thin.len(), rows * dims.1, "as many rows on both sides");
    assert!(
        outputs.start.is_multiple_of(PANEL)
            && outputs.end <= dims.0
            && (outputs.end.is_multiple_of(PANEL) || outputs.end == dims.0),
        "columns {outputs:?} are not whole panels"
    );
    rows
}

/// A frozen weight in panels of 32 outputs.
#[derive(Clone, Debug)]
pub(super) struct Panels<W> {
    outputs: usize,
    inputs: usize,
    /// `[outputs / 32, rounded up][inputs][32]`.
    panels: Aligned<W>,
}

impl<W: Stored> Panels<W> {
    /// Packs a row-major `[outputs, inputs]` weight.
    pub(super) fn pack(weight: &[W], outputs: usize, inputs: usize) -> Self {
        assert_eq!(
            weight.len(),
            outputs * inputs,
            "a weight is [outputs, inputs]"
        );
        let mut panels = Aligned::zeros(outputs.div_ceil(PANEL) * PANEL * inputs);
        if inputs > 0 {
            let panels = &mut panels.as_mut_slice()[..outputs.div_ceil(PANEL) * PANEL * inputs];
            spread_parts(panels, PANEL * inputs, 4 * weight.len(), |i, panel| {
                let rows = &weight[i * PANEL * inputs..weight.len().min((i + 1) * PANEL * inputs)];
                // A few inputs at a time, so that the lines of every row that is read stay in the first-level cache.
                for first in (0..inputs).step_by(32) {
                    let last = inputs.min(first + 32);
                    for (o, row) in rows.chunks_exact(inputs).enumerate() {
                        for (i, w) in row[first..last].iter().enumerate() {
                            panel[(first + i) * PANEL + o] = *w;
                        }
                    }
                }
            });
        }
        Panels {
            outputs,
            inputs,
            panels,
        }
    }

    /// `(outputs, inputs)`.
    pub(super) fn dims(&self) -> (usize, usize) {
        (self.outputs, self.inputs)
    }

    /// Bytes of the packed copy.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.panels.as_slice())
    }

    /// Row `ids[i]` into `out[i]`.
    pub(super) fn gather(&self, ids: &[u32], out: &mut [f32]) {
        assert_eq!(out.len(), ids.len() * self.inputs, "one row for each id");
        let panels = self.panels.as_slice();
        if self.inputs == 0 {
            return;
        }
        // Each number of a row lies in a cache line of its own.
        let cost = 16 * out.len();
        spread_parts(out, self.inputs, cost, |i, out| {
            let id = ids[i] as usize;
            assert!(id < self.outputs, "row {id} of {}", self.outputs);
            let lane = &panels[id / PANEL * PANEL * self.inputs + id % PANEL..];
            for (out, x) in out.iter_mut().zip(lane.iter().step_by(PANEL)) {
                *out = x.widen();
            }
        });
    }

    /// Columns `outputs` of `y = x W^T`.
    pub(super) fn matmul(&self, isa: Isa, x: &[f32], outputs: Range<usize>, y: &mut [f32]) {
        let rows = checked_rows(self.dims(), y, x, &outputs);
        if rows == 0 || outputs.is_empty() {
            return;
        }
        let k = self.inputs;
        let first = outputs.start / PANEL;
        let panels = outputs.end.div_ceil(PANEL) - first;
        // Whole blocks of 12 rows, as many as stay in L2.
        let rows_per_task = (ROWS_IN_CACHE / k.max(1)).clamp(48, 240) / 12 * 12;
        let out = Out(y.as_mut_ptr());
        spread(
            rows.div_ceil(rows_per_task) * panels,
            rows * k * outputs.len(),
            |task| {
                let row = task / panels * rows_per_task;
                let panel = first + task % panels;
                // SAFETY: rows `row..` and columns of `panel` belong to this task alone and lie inside `y`; `x` has as many rows, `checked_rows` proved both, and
                // the panel is k * 32 numbers of `panels`.
                unsafe {
                    Tile {
                        x: x.as_ptr().add(row * k),
                        x_row: k,
                        x_k: 1,
                        w: self.panels.as_slice().as_ptr().add(panel * PANEL * k),
                        w_k: PANEL,
                        w_half: HALF,
                        k,
                        y: out.at(row * self.outputs + panel * PANEL),
                        y_row: self.outputs,
                        rows: rows_per_task.min(rows - row),
                        cols: PANEL.min(self.outputs - panel * PANEL),
                        accumulate: false,
                    }
                    .run(isa);
                }
            },
        );
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
                self.turn(isa, outputs, inputs, turned);
            },
        );
    }

    /// `turned[o][i] = W[outputs.start + o][inputs.start + i]`, rows of 32.
    fn turn(&self, isa: Isa, outputs: Range<usize>, inputs: Range<usize>, turned: &mut [f32]) {
        let panels = self.panels.as_slice();
        let mut spare = [0.0; PANEL * PANEL];
        for start in outputs.clone().step_by(PANEL) {
            let block =
                &panels[start * self.inputs + inputs.start * PANEL..][..inputs.len() * PANEL];
            let block = W::widened(block, &mut spare);
            let count = PANEL.min(outputs.end - start);
            let into = &mut turned[(start - outputs.start) * PANEL..][..count * PANEL];
            if start + PANEL < outputs.end {
                prefetch(&panels[(start + PANEL) * self.inputs + inputs.start * PANEL..]);
            }
            assert!(block.len() >= inputs.len() * PANEL && inputs.len() <= PANEL);
            // SAFETY: `block` is [inputs, 32] of one panel, `into` is [count, 32]; both lengths were just checked.
            unsafe {
                transpose(
                    isa,
                    block.as_ptr(),
                    PANEL,
                    inputs.len(),
                    count,
                    into.as_mut_ptr(),
                    PANEL,
                );
            }
        }
    }
}

/// `dx += dy[:, outputs] W[outputs, :]` for a weight of `(outputs, inputs)` that `turn` brings into rows: `turn(outputs, inputs, turned)` writes
/// `turned[o][i] = W[outputs.start + o][inputs.start + i]`, rows of 32, for at most 32 inputs from a multiple of 32 on.
pub(super) fn backward(
    isa: Isa,
    dims: (usize, usize),
    dy: &[f32],
    outputs: Range<usize>,
    dx: &mut [f32],
    turn: impl Fn(Range<usize>, Range<usize>, &mut [f32]) + Sync,
) {
    let rows = checked_rows(dims, dy, dx, &outputs);
    if rows == 0 || outputs.is_empty() {
        return;
    }
    // With few rows the weights' bytes are the cost: they are walked panel by panel, as they lie in memory. With many rows arithmetic is: a chunk of
    // outputs is turned once and meets all rows. The chains are the same.
    let (width, inputs) = dims;
    let few = rows <= FEW_ROWS;
    let (blocks, chunk) = if few {
        (inputs.div_ceil(PANEL).div_ceil(8), PANEL)
    } else {
        (1, CHUNK)
    };
    let out = Out(dx.as_mut_ptr());
    spread(
        inputs.div_ceil(PANEL * blocks),
        rows * inputs * outputs.len(),
        |task| {
            let own = task * blocks * PANEL..inputs.min((task + 1) * blocks * PANEL);
            with_scratch(|scratch| {
                let turned = scratch.0[0].first(chunk.min(outputs.len()) * PANEL);
                for start in outputs.clone().step_by(chunk) {
                    let part = start..outputs.end.min(start + chunk);
                    for first in own.clone().step_by(PANEL) {
                        let cols = PANEL.min(inputs - first);
                        turn(part.clone(), first..first + cols, turned);
                        // SAFETY: these columns of `dx` belong to this task alone, `turned` holds the part of the weights that leads there, and `dy`
                        // and `dx` were checked to be whole rows.
                        unsafe {
                            Tile {
                                x: dy.as_ptr().add(part.start),
                                x_row: width,
                                x_k: 1,
                                w: turned.as_ptr(),
                                w_k: PANEL,
                                w_half: HALF,
                                k: part.len(),
                                y: out.at(first),
                                y_row: inputs,
                                rows,
                                cols,
                                accumulate: true,
                            }
                            .run(isa);
                        }
                    }
                }
            });
        },
    );
}
