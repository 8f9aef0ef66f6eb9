//! What this machine can do at most, measured beside what is compared with it: bytes read, multiply-adds, byte products.

use std::hint::black_box;
use std::time::Instant;

use espalier_adapters::ops::{self, Cpu};

/// Bytes that no cache holds.
const MEMORY: usize = 256 << 20;
/// Rounds of arithmetic in one try.
const BURNS: usize = 1000;
/// Tries, of which the best counts: a ceiling is what nobody disturbed.
const TRIES: usize = 3;

/// Rates of all threads together.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Bytes read per second from memory that no cache holds.
    pub bytes: f64,
    /// f32 operations per second on registers alone; a multiply-add is two.
    pub f32: f64,
    /// Operations per second of byte products added in 32 bits; 0 where the processor has no instruction for them.
    pub i8: f64,
}

/// The memory that reads are measured on: allocated once, because filling it takes longer than reading it.
pub struct Probe {
    cpu: Cpu,
    memory: Vec<f32>,
}

// === impl Probe ===

impl Probe {
    /// Fills the memory.
    #[must_use]
    pub fn new() -> Self {
        Probe {
            cpu: Cpu::default(),
            memory: vec![1.0; MEMORY / size_of::<f32>()],
        }
    }

    /// Takes all three rates, which lasts about a fifth of a second.
    #[must_use]
    pub fn measure(&self) -> Ceilings {
        let share = self.memory.len() / ops::threads();
        Ceilings {
            bytes: rate(|thread| {
                let part = &self.memory[thread * share..(thread + 1) * share];
                black_box(sum(part));
                size_of_val(part) as f64
            }),
            f32: rate(|_| self.cpu.burn_f32(BURNS) as f64),
            i8: rate(|_| self.cpu.burn_i8(BURNS) as f64),
        }
    }
}

impl Default for Probe {
    fn default() -> Self {
        Self::new()
    }
}

// === impl Ceilings ===

impl std::fmt::Display for Ceilings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} with {} threads: {:.1} GB/s read, {:.0} GFLOP/s f32, {:.0} GOP/s int8",
            Cpu::default().path(),
            ops::threads(),
            self.bytes * 1e-9,
            self.f32 * 1e-9,
            self.i8 * 1e-9
        )
    }
}

/// Does `work` on as many threads as operations use: what they return in all, over the seconds until the last is done.
fn rate(work: impl Fn(usize) -> f64 + Sync) -> f64 {
    let once = || {
        let begin = Instant::now();
        let done: f64 = std::thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = (0..ops::threads())
                .map(|thread| scope.spawn(move || work(thread)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or(f64::NAN))
                .sum()
        });
        done / begin.elapsed().as_secs_f64()
    };
    (0..TRIES).map(|_| once()).fold(0.0, f64::max)
}

/// The sum of a part of memory, four streams at a time, so that the hardware's prefetchers are not the limit.
fn sum(part: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 16];
    for page in part.chunks_exact(1 << 16) {
        let (left, right) = page.split_at(page.len() / 2);
        let (a, b) = left.split_at(left.len() / 2);
        let (c, d) = right.split_at(right.len() / 2);
        let lines = a.chunks_exact(16).zip(b.chunks_exact(16));
        for ((a, b), (c, d)) in lines.zip(c.chunks_exact(16).zip(d.chunks_exact(16))) {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum += (a[i] + b[i]) + (c[i] + d[i]);
            }
        }
    }
    sums.iter().sum()
}
