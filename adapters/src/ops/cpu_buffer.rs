//! Memory for the CPU path: numbers aligned to cache lines, scratch that each thread keeps, and the cut of work over threads.
//!
//! A vector load that crosses a cache line costs two; weights and scratch therefore start on one. Scratch grows to the largest use and stays, so no operation
//! allocates in a steady state. It must not know which operation asks.

#![allow(unsafe_code, reason = "aligned lines are viewed as numbers")]

use std::cell::Cell;
use std::marker::PhantomData;

use super::cpu_rounded_rows::RoundedRows;
use super::cpu_team;

/// Numbers without padding for which all bits zero is the number zero, aligned to at most a cache line.
pub(super) trait Plain: Copy + 'static {
    /// Zero.
    const ZERO: Self;
}

impl Plain for f32 {
    const ZERO: Self = 0.0;
}

impl Plain for half::bf16 {
    const ZERO: Self = half::bf16::ZERO;
}

impl Plain for half::f16 {
    const ZERO: Self = half::f16::ZERO;
}

impl Plain for u8 {
    const ZERO: Self = 0;
}

impl Plain for i8 {
    const ZERO: Self = 0;
}

impl Plain for i32 {
    const ZERO: Self = 0;
}

/// One cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([u64; 8]);

/// Bytes of a cache line.
const LINE: usize = size_of::<Line>();

/// Numbers that start on a cache line; the length is rounded up to whole lines.
#[derive(Clone, Debug)]
pub(super) struct Aligned<T = f32>(Vec<Line>, PhantomData<T>);

impl<T> Default for Aligned<T> {
    fn default() -> Self {
        Aligned(Vec::new(), PhantomData)
    }
}

impl<T: Plain> Aligned<T> {
    /// At least `len` zeros.
    pub(super) fn zeros(len: usize) -> Self {
        let lines = (len * size_of::<T>()).div_ceil(LINE);
        Aligned(vec![Line([0; 8]); lines], PhantomData)
    }

    /// How many numbers it holds.
    fn len(&self) -> usize {
        self.0.len() * (LINE / size_of::<T>())
    }

    /// The numbers.
    pub(super) fn as_slice(&self) -> &[T] {
        // SAFETY: a line is plain numbers without padding, aligned for each kind of them, and every bit of it is written.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.len()) }
    }

    /// The numbers, to be written.
    pub(super) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`; the exclusive borrow is passed on.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.len()) }
    }

    /// The first `len` numbers, growing to hold them; their values are whatever was there.
    pub(super) fn first(&mut self, len: usize) -> &mut [T] {
        let lines = (len * size_of::<T>()).div_ceil(LINE);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0; 8]));
        }
        &mut self.as_mut_slice()[..len]
    }
}

/// Buffers that one thread reuses between calls. Which is which belongs to the caller.
#[derive(Debug, Default)]
pub(super) struct Scratch(pub(super) [Aligned; 8]);

thread_local! {
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
    static ROUNDED: Cell<Option<Box<RoundedRows>>> = const { Cell::new(None) };
}

/// Lends this thread's scratch to `f`. A nested call (a stolen task inside `f`) gets fresh buffers instead of a panic.
pub(super) fn with_scratch<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    let mut scratch = SCRATCH.take().unwrap_or_default();
    let result = f(&mut scratch);
    SCRATCH.set(Some(scratch));
    result
}

/// Lends this thread's rounded rows to `f`, as [`with_scratch`].
pub(super) fn with_rounded_rows<R>(f: impl FnOnce(&mut RoundedRows) -> R) -> R {
    let mut rows = ROUNDED.take().unwrap_or_default();
    let result = f(&mut rows);
    ROUNDED.set(Some(rows));
    result
}

/// Work (multiply-adds, or numbers touched times a small cost) below which a second thread costs more than it saves.
const WORTH_A_THREAD: usize = 30_000;

/// Whether `work` is worth cutting up.
pub(super) fn worth_threads(work: usize) -> bool {
    work >= WORTH_A_THREAD && cpu_team::threads() > 1
}

/// Runs tasks `0..tasks`, in any order and on any thread if there is enough work.
pub(super) fn spread(tasks: usize, work: usize, task: impl Fn(usize) + Sync) {
    if tasks > 1 && worth_threads(work) {
        cpu_team::run(tasks, &task);
    } else {
        (0..tasks).for_each(task);
    }
}

/// Runs `task(i, part)` for each part of `len` numbers (the last one may be shorter), as [`spread`].
pub(super) fn spread_parts<T: Send>(
    numbers: &mut [T],
    len: usize,
    work: usize,
    task: impl Fn(usize, &mut [T]) + Sync,
) {
    let (whole, len) = (numbers.len(), len.max(1));
    let first = Start(numbers.as_mut_ptr());
    spread(whole.div_ceil(len), work, |i| {
        let start = i * len;
        // SAFETY: parts do not overlap, lie inside `numbers`, and each belongs to one task.
        let part =
            unsafe { std::slice::from_raw_parts_mut(first.at(start), len.min(whole - start)) };
        task(i, part);
    });
}

/// Runs `task` once for each item, on the threads that operations run on: work between operations must not bring a second
/// pool that competes for the cores.
pub fn for_each<T: Send>(items: &mut [T], task: impl Fn(&mut T) + Sync) {
    spread_parts(items, 1, usize::MAX, |_, item| {
        item.iter_mut().for_each(&task)
    });
}

/// Where the parts begin.
struct Start<T>(*mut T);

// SAFETY: tasks make disjoint parts out of it, of numbers that may be sent.
unsafe impl<T: Send> Sync for Start<T> {}

impl<T> Start<T> {
    /// # Safety
    /// `n` stays inside the allocation.
    unsafe fn at(&self, n: usize) -> *mut T {
        // SAFETY: promised by the caller.
        unsafe { self.0.add(n) }
    }
}

/// Rows in one task, so that rows of `width` numbers costing `cost` each are worth the cut: all rows when they are few.
pub(super) fn rows_per_task(rows: usize, width: usize, cost: usize) -> usize {
    if !worth_threads(rows * width * cost) {
        return rows.max(1);
    }
    (WORTH_A_THREAD / 2 / (width * cost).max(1)).clamp(1, rows.div_ceil(2))
}
