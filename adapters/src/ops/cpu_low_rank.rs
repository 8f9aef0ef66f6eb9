//! A step's low-rank updates, of many adapters at once: what each reads is its own factors, so the list of all of them is what there is to share out.
//!
//! An update of a few rows is bound by reading its factors. One thread reads an update's factors from end to end, in the order in which they lie in memory, and
//! threads take runs of the list that are about equally long. It must not know which adapters these are.

#![allow(unsafe_code, reason = "tasks write rows of outputs they share")]

use std::ops::Range;

use super::cpu_buffer::{Aligned, spread, with_scratch};
use super::cpu_thin::{FEW_ROWS, FactorAt, axpys, dots};
use super::cpu_tile::{HALF, Isa, Out, PANEL, Tile};
use super::{Factor, HostLowRank, threads};

/// Rows of one update that a thread does at a time; a multiple of the tallest tile.
const ROWS_PER_TASK: usize = 48;

/// Runs of the list for each thread: more of them even out what is not equally fast.
const RUNS_PER_THREAD: usize = 2;

/// What must be done by one thread, in this order: updates of the same rows and output.
struct Unit {
    updates: Range<usize>,
    rows: Range<usize>,
    cost: usize,
}

/// `outputs[u.output][u.rows] += u.scale * (x[u.rows] A^T) Bt` for each update `u`.
pub(super) fn low_rank(
    isa: Isa,
    x: &[f32],
    updates: &[HostLowRank<'_, f32>],
    outputs: &mut [&mut [f32]],
) {
    let Some(first) = updates.first() else { return };
    let inputs = first.a.len() / first.rank.max(1);
    check(x, inputs, updates, outputs);
    let outs: Vec<Out> = outputs.iter_mut().map(|y| Out(y.as_mut_ptr())).collect();
    let units = units(updates);
    let cost: usize = units.iter().map(|unit| unit.cost).sum();
    let runs = runs(&units, cost);
    spread(runs.len(), cost, |run| {
        for unit in &units[runs[run].clone()] {
            for update in &updates[unit.updates.clone()] {
                let x = &x[unit.rows.start * inputs..unit.rows.end * inputs];
                // SAFETY: the rows of this output belong to this unit alone; `check` proved that they and the factors are inside their slices.
                unsafe { add(isa, x, update, &unit.rows, outs[update.output]) };
            }
        }
    });
}

fn check(x: &[f32], inputs: usize, updates: &[HostLowRank<'_, f32>], outputs: &[&mut [f32]]) {
    let rows = x.len() / inputs.max(1);
    assert_eq!(x.len(), rows * inputs, "x is [rows, in]");
    for update in updates {
        let (rank, a, bt) = (update.rank, update.a.len(), update.bt.len());
        let width = bt / rank.max(1);
        assert!(
            rank > 0 && a == rank * inputs && bt == rank * width,
            "factors of {a} and {bt} numbers are not [{rank}, {inputs}] and [{rank}, out]"
        );
        let y = outputs[update.output].len();
        assert_eq!(y, rows * width, "outputs are [rows, out] of the same rows");
        assert!(
            update.rows.start <= update.rows.end && update.rows.end <= rows,
            "rows {:?} of {rows}",
            update.rows
        );
    }
}

/// Updates that share rows and output are one unit; many rows are several.
fn units(updates: &[HostLowRank<'_, f32>]) -> Vec<Unit> {
    let mut units = Vec::with_capacity(updates.len());
    let same = |l: &HostLowRank<'_, f32>, r: &HostLowRank<'_, f32>| {
        l.rows == r.rows && l.output == r.output
    };
    let mut next = 0;
    for together in updates.chunk_by(same) {
        let numbers: usize = together.iter().map(|u| u.a.len() + u.bt.len()).sum();
        let updates = next..next + together.len();
        next = updates.end;
        let all = together[0].rows.clone();
        for start in all.clone().step_by(ROWS_PER_TASK) {
            let rows = start..all.end.min(start + ROWS_PER_TASK);
            units.push(Unit {
                updates: updates.clone(),
                cost: numbers * rows.len(),
                rows,
            });
        }
    }
    units
}

/// Runs of about equal cost, in the list's order.
fn runs(units: &[Unit], cost: usize) -> Vec<Range<usize>> {
    let wanted = RUNS_PER_THREAD * threads();
    let mut runs: Vec<Range<usize>> = Vec::with_capacity(wanted + 1);
    let (mut start, mut spent) = (0, 0);
    for (index, unit) in units.iter().enumerate() {
        spent += unit.cost;
        if spent * wanted >= cost * (runs.len() + 1) {
            runs.push(start..index + 1);
            start = index + 1;
        }
    }
    if start < units.len() {
        runs.push(start..units.len());
    }
    runs
}

/// One update of `rows`, whose inputs are `x`, onto `y`.
///
/// # Safety
/// The rows of `y` exist and no other thread touches them; the factors are `[rank, in]` and `[rank, out]`; the machine has `isa`.
unsafe fn add(isa: Isa, x: &[f32], update: &HostLowRank<'_, f32>, rows: &Range<usize>, y: Out) {
    let (rank, count) = (update.rank, rows.len());
    let (inputs, width) = (update.a.len() / rank, update.bt.len() / rank);
    with_scratch(|scratch| {
        let [h, widened, ..] = &mut scratch.0;
        let h = h.first(count * rank);
        // SAFETY: `x` is [count, in] and `h` [count, rank]; the rest is promised by the caller.
        unsafe {
            let (x, a) = (x.as_ptr(), stored(&update.a));
            dots(
                isa,
                x,
                count,
                a,
                rank,
                inputs,
                update.scale,
                h.as_mut_ptr(),
                rank,
            );
            let y = y.at(rows.start * width);
            if count <= FEW_ROWS {
                for (row, h) in h.chunks_exact(rank).enumerate() {
                    let (s, bt) = (h.as_ptr(), stored(&update.bt));
                    axpys(isa, s, rank, bt, width, y.add(row * width), width);
                }
            } else {
                tiles(isa, h, wide(&update.bt, widened), rank, width, y);
            }
        }
    });
}

/// `y += h Bt`, tile by tile.
///
/// # Safety
/// `h` is `[rows, rank]`, `bt` `[rank, width]`, `y` `[rows, width]` and no other thread's; the machine has `isa`.
unsafe fn tiles(isa: Isa, h: &[f32], bt: &[f32], rank: usize, width: usize, y: *mut f32) {
    for first in (0..width).step_by(PANEL) {
        // SAFETY: promised by the caller.
        unsafe {
            Tile {
                x: h.as_ptr(),
                x_row: rank,
                x_k: 1,
                w: bt.as_ptr().add(first),
                w_k: width,
                w_half: HALF,
                k: rank,
                y: y.add(first),
                y_row: width,
                rows: h.len() / rank,
                cols: PANEL.min(width - first),
                accumulate: true,
            }
            .run(isa);
        }
    }
}

fn stored(factor: &Factor<'_, f32>) -> FactorAt {
    match factor {
        Factor::Full(numbers) => FactorAt::F32(numbers.as_ptr()),
        Factor::Bf16(numbers) => FactorAt::Bf16(numbers.as_ptr()),
        Factor::F16(numbers) => FactorAt::F16(numbers.as_ptr()),
    }
}

/// The factor as tiles read it: itself, or widened into `scratch`.
fn wide<'a>(factor: &Factor<'a, f32>, scratch: &'a mut Aligned) -> &'a [f32] {
    match factor {
        Factor::Full(numbers) => numbers,
        narrow => {
            let numbers = scratch.first(narrow.len());
            narrow.widen(numbers);
            numbers
        }
    }
}
