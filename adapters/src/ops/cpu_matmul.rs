//! Products with the frozen base weights, from one packed copy of them.
//!
//! A weight `[outputs, inputs]` is stored in panels of 32 outputs, each `[inputs][32]`, the last one padded with zeros. Forward, a panel streams through the
//! tile kernel once for every few rows: at decode that is one pass over the weights at memory speed, at prefill the panel stays in L2 while rows stream.
//! Backward, 32 inputs at a time are transposed on the fly into the same shape, so that the same kernel serves and no second copy of the weights exists.
//! This file must not know which site of which layer a weight is.

#![allow(unsafe_code, reason = "tiles are pointers")]

use std::ops::Range;

use rayon::prelude::*;

use super::cpu_buffer::{Aligned, spread, with_scratch, worth_threads};
use super::cpu_tile::{Isa, Out, PANEL, Tile};
use super::cpu_transpose::{prefetch, transpose};

/// Numbers of `x` that one task keeps in L2 beside a panel.
const ROWS_IN_CACHE: usize = 96 * 1024;

/// Up to this many rows, the way back is bound by reading the weights.
const FEW_ROWS: usize = 32;

/// Outputs whose weights are transposed at a time on the way back: 128 bytes each, so a chunk stays in L2.
const CHUNK: usize = 1536;

/// A frozen weight in panels of 32 outputs.
#[derive(Clone, Debug)]
pub struct Panels {
    outputs: usize,
    inputs: usize,
    /// `[outputs / 32, rounded up][inputs][32]`.
    panels: Aligned,
}

impl Panels {
    /// Packs a row-major `[outputs, inputs]` weight.
    pub(super) fn pack(isa: Isa, weight: &[f32], outputs: usize, inputs: usize) -> Self {
        assert_eq!(
            weight.len(),
            outputs * inputs,
            "a weight is [outputs, inputs]"
        );
        let mut panels = Aligned::zeros(outputs.div_ceil(PANEL) * PANEL * inputs);
        if inputs > 0 {
            panels
                .as_mut_slice()
                .par_chunks_mut(PANEL * inputs)
                .zip(weight.par_chunks(PANEL * inputs))
                .for_each(|(panel, rows)| {
                    let outputs = rows.len() / inputs;
                    // SAFETY: `rows` is [outputs, inputs] and `panel` is [inputs, 32] with outputs <= 32.
                    unsafe {
                        transpose(
                            isa,
                            rows.as_ptr(),
                            inputs,
                            outputs,
                            inputs,
                            panel.as_mut_ptr(),
                            PANEL,
                        );
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
        let row = |(id, out): (&u32, &mut [f32])| {
            let id = *id as usize;
            assert!(id < self.outputs, "row {id} of {}", self.outputs);
            let lane = &panels[id / PANEL * PANEL * self.inputs + id % PANEL..];
            for (out, x) in out.iter_mut().zip(lane.iter().step_by(PANEL)) {
                *out = *x;
            }
        };
        // Each number of a row lies in a cache line of its own.
        if worth_threads(16 * out.len()) {
            ids.par_iter()
                .zip(out.par_chunks_exact_mut(self.inputs))
                .with_min_len(4)
                .for_each(row);
        } else {
            ids.iter()
                .zip(out.chunks_exact_mut(self.inputs))
                .for_each(row);
        }
    }

    fn check(&self, wide: &[f32], thin: &[f32], outputs: &Range<usize>) -> usize {
        let rows = wide.len() / self.outputs.max(1);
        assert_eq!(
            wide.len(),
            rows * self.outputs,
            "whole rows of {}",
            self.outputs
        );
        assert_eq!(thin.len(), rows * self.inputs, "as many rows on both sides");
        assert!(
            outputs.start.is_multiple_of(PANEL)
                && outputs.end <= self.outputs
                && (outputs.end.is_multiple_of(PANEL) || outputs.end == self.outputs),
            "columns {outputs:?} are not whole panels"
        );
        rows
    }

    /// Columns `outputs` of `y = x W^T`.
    pub(super) fn matmul(&self, isa: Isa, x: &[f32], outputs: Range<usize>, y: &mut [f32]) {
        let rows = self.check(y, x, &outputs);
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
                // SAFETY: rows `row..` and columns of `panel` belong to this task alone and lie inside `y`; `x` has as many rows, `check` proved both, and
                // the panel is k * 32 numbers of `panels`.
                unsafe {
                    Tile {
                        x: x.as_ptr().add(row * k),
                        x_row: k,
                        x_k: 1,
                        w: self.panels.as_slice().as_ptr().add(panel * PANEL * k),
                        w_k: PANEL,
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
        let rows = self.check(dy, dx, &outputs);
        if rows == 0 || outputs.is_empty() {
            return;
        }
        // With few rows the weights' bytes are the cost: they are walked panel by panel, as they lie in memory. With many rows arithmetic is: a chunk of
        // outputs is turned once and meets all rows. The chains are the same.
        let few = rows <= FEW_ROWS;
        let (blocks, chunk) = if few {
            (self.inputs.div_ceil(PANEL).div_ceil(8), PANEL)
        } else {
            (1, CHUNK)
        };
        let out = Out(dx.as_mut_ptr());
        spread(
            self.inputs.div_ceil(PANEL * blocks),
            rows * self.inputs * outputs.len(),
            |task| {
                let own = task * blocks * PANEL..self.inputs.min((task + 1) * blocks * PANEL);
                with_scratch(|scratch| {
                    let turned = scratch.0[0].first(chunk.min(outputs.len()) * PANEL);
                    for start in outputs.clone().step_by(chunk) {
                        let part = start..outputs.end.min(start + chunk);
                        for first in own.clone().step_by(PANEL) {
                            let inputs = first..self.inputs.min(first + PANEL);
                            self.turn(isa, part.clone(), inputs.clone(), turned);
                            // SAFETY: columns `inputs` of `dx` belong to this task alone, and `turned` holds the part of the weights that leads there.
                            unsafe { self.back_tile(isa, dy, part.clone(), inputs, turned, out) }
                        }
                    }
                });
            },
        );
    }

    /// `dx[:, inputs] += dy[:, outputs] turned`.
    ///
    /// # Safety
    /// No other thread touches columns `inputs` of `dx`; `turned` is `[outputs, 32]`; `dy` and `dx` were checked to be whole rows.
    unsafe fn back_tile(
        &self,
        isa: Isa,
        dy: &[f32],
        outputs: Range<usize>,
        inputs: Range<usize>,
        turned: &[f32],
        dx: Out,
    ) {
        // SAFETY: promised by the caller.
        unsafe {
            Tile {
                x: dy.as_ptr().add(outputs.start),
                x_row: self.outputs,
                x_k: 1,
                w: turned.as_ptr(),
                w_k: PANEL,
                k: outputs.len(),
                y: dx.at(inputs.start),
                y_row: self.inputs,
                rows: dy.len() / self.outputs,
                cols: inputs.len(),
                accumulate: true,
            }
            .run(isa);
        }
    }

    /// `turned[o][i] = W[outputs.start + o][inputs.start + i]`, rows of 32.
    fn turn(&self, isa: Isa, outputs: Range<usize>, inputs: Range<usize>, turned: &mut [f32]) {
        let panels = self.panels.as_slice();
        for start in outputs.clone().step_by(PANEL) {
            let block = &panels[start * self.inputs + inputs.start * PANEL..];
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
