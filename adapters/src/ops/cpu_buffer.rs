//! Memory for the CPU path: numbers aligned to cache lines, scratch that each thread keeps, and the cut of work over threads.
//!
//! A vector load that crosses a cache line costs two; weights and scratch therefore start on one. Scratch grows to the largest use and stays, so no operation
//! allocates in a steady state. It must not know which operation asks.

#![allow(unsafe_code, reason = "aligned lines are viewed as numbers")]

use std::cell::Cell;

use rayon::prelude::*;

/// One cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Numbers that start on a cache line; the length is rounded up to whole lines.
#[derive(Clone, Debug, Default)]
pub(super) struct Aligned(Vec<Line>);

impl Aligned {
    /// At least `len` zeros.
    pub(super) fn zeros(len: usize) -> Self {
        Aligned(vec![Line([0.0; 16]); len.div_ceil(16)])
    }

    /// The numbers.
    pub(super) fn as_slice(&self) -> &[f32] {
        // SAFETY: a line is sixteen f32 without padding, so the lines are 16 times as many f32 in a row.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * 16) }
    }

    /// The numbers, to be written.
    pub(super) fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: as in `as_slice`; the exclusive borrow is passed on.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * 16) }
    }

    /// The first `len` numbers, growing to hold them; their values are whatever was there.
    pub(super) fn first(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(16);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0.0; 16]));
        }
        &mut self.as_mut_slice()[..len]
    }
}

/// Buffers that one thread reuses between calls. Which is which belongs to the caller.
#[derive(Debug, Default)]
pub(super) struct Scratch(pub(super) [Aligned; 8]);

thread_local! {
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

/// Lends this thread's scratch to `f`. A nested call (a stolen task inside `f`) gets fresh buffers instead of a panic.
pub(super) fn with_scratch<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    let mut scratch = SCRATCH.take().unwrap_or_default();
    let result = f(&mut scratch);
    SCRATCH.set(Some(scratch));
    result
}

/// Work (multiply-adds, or numbers touched times a small cost) below which a second thread costs more than it saves.
const WORTH_A_THREAD: usize = 60_000;

/// Whether `work` is worth cutting up.
pub(super) fn worth_threads(work: usize) -> bool {
    work >= WORTH_A_THREAD && rayon::current_num_threads() > 1
}

/// Runs tasks `0..tasks`, in any order and on any thread if there is enough work.
pub(super) fn spread(tasks: usize, work: usize, task: impl Fn(usize) + Sync) {
    if tasks > 1 && worth_threads(work) {
        (0..tasks).into_par_iter().for_each(&task);
    } else {
        (0..tasks).for_each(task);
    }
}

/// Rows in one task, so that rows of `width` numbers costing `cost` each are worth the cut: all rows when they are few.
pub(super) fn rows_per_task(rows: usize, width: usize, cost: usize) -> usize {
    if !worth_threads(rows * width * cost) {
        return rows.max(1);
    }
    (WORTH_A_THREAD / 2 / (width * cost).max(1)).clamp(1, rows.div_ceil(2))
}
