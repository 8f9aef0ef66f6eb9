//! Proofs of a step's updates: they equal the reference, a row's bits are those of the plain products on widened factors, and neither neighbours, nor threads,
//! nor instruction sets show.

#![allow(
    clippy::unwrap_used,
    reason = "a test may stop at the first broken promise"
)]

use std::ops::Range;

use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::cpu_tests::{assert_close, assert_same_bits, everywhere, random, wide};
use super::{Cpu, Factor, HostLowRank, LowRank, Ops, Reference};

/// A factor that owns its numbers.
enum Owned {
    Full(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Owned {
    fn random(rng: &mut ChaCha8Rng, len: usize, kind: usize) -> Self {
        let numbers = random(rng, len).into_iter();
        match kind % 3 {
            0 => Owned::Full(numbers.collect()),
            1 => Owned::Bf16(numbers.map(bf16::from_f32).collect()),
            _ => Owned::F16(numbers.map(f16::from_f32).collect()),
        }
    }

    fn view(&self) -> Factor<'_, f32> {
        match self {
            Owned::Full(numbers) => Factor::Full(numbers),
            Owned::Bf16(numbers) => Factor::Bf16(numbers),
            Owned::F16(numbers) => Factor::F16(numbers),
        }
    }
}

/// One update with its factors.
struct Made {
    rows: Range<usize>,
    output: usize,
    rank: usize,
    scale: f32,
    a: Owned,
    bt: Owned,
}

impl Made {
    fn update(&self) -> HostLowRank<'_, f32> {
        LowRank {
            rows: self.rows.clone(),
            output: self.output,
            rank: self.rank,
            scale: self.scale,
            a: self.a.view(),
            bt: self.bt.view(),
        }
    }
}

/// Widths with tails, ranks with tails, segments of every kind of length, two adapters on the same rows.
struct Problem {
    inputs: usize,
    widths: [usize; 2],
    rows: usize,
    made: Vec<Made>,
    x: Vec<f32>,
    y: [Vec<f32>; 2],
}

impl Problem {
    fn new(seed: u64, inputs: usize, widths: [usize; 2]) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut made = Vec::new();
        let (mut start, mut kind) = (1, 0);
        for (index, count) in [1, 2, 1, 5, 100, 3, 1].into_iter().enumerate() {
            let rows = start..start + count;
            // Rows between segments are the base's.
            start = rows.end + index % 2;
            for (output, width) in widths.into_iter().enumerate() {
                for _ in 0..1 + usize::from(index % 3 == 1) {
                    let rank = [1, 16, 3, 37, 9][kind % 5];
                    made.push(Made {
                        rows: rows.clone(),
                        output,
                        rank,
                        scale: rng.random_range(-2.0..2.0),
                        a: Owned::random(&mut rng, rank * inputs, kind),
                        bt: Owned::random(&mut rng, rank * width, kind),
                    });
                    kind += 1;
                }
            }
        }
        let rows = start + 2;
        Problem {
            inputs,
            widths,
            rows,
            x: random(&mut rng, rows * inputs),
            y: widths.map(|width| random(&mut rng, rows * width)),
            made,
        }
    }

    fn run(&self, cpu: Cpu) -> Vec<f32> {
        let updates = vec![self.made.iter().map(Made::update).collect()];
        let [mut left, mut right] = self.y.clone();
        cpu.low_rank(&self.x, &updates, 0, vec![&mut left, &mut right]);
        [left, right].concat()
    }

    /// Each update by the plain products, on factors widened before.
    fn plainly(&self, cpu: Cpu) -> Vec<f32> {
        let [mut left, mut right] = self.y.clone();
        for made in &self.made {
            let (width, y) = match made.output {
                0 => (self.widths[0], &mut left),
                _ => (self.widths[1], &mut right),
            };
            let (a, bt) = (made.a.view().to_vec(), made.bt.view().to_vec());
            let mut h = vec![0.0; made.rows.len() * made.rank];
            let x = &self.x[made.rows.start * self.inputs..made.rows.end * self.inputs];
            cpu.shrink(x, &a, made.rank, &mut h);
            let y = &mut y[made.rows.start * width..made.rows.end * width];
            cpu.expand(&h, &bt, made.rank, made.scale, y);
        }
        [left, right].concat()
    }
}

const SHAPES: [(usize, [usize; 2]); 3] = [(33, [70, 19]), (130, [64, 257]), (576, [192, 1536])];

#[test]
fn updates_equal_the_reference() {
    let exact = Reference::<f64>::default();
    for (seed, (inputs, widths)) in SHAPES.into_iter().enumerate() {
        let problem = Problem::new(seed as u64, inputs, widths);
        let fast = problem.run(Cpu::default());
        let wides: Vec<_> = problem
            .made
            .iter()
            .map(|made| {
                (
                    wide(&made.a.view().to_vec()),
                    wide(&made.bt.view().to_vec()),
                )
            })
            .collect();
        let updates: Vec<_> = problem
            .made
            .iter()
            .zip(&wides)
            .map(|(made, (a, bt))| LowRank {
                rows: made.rows.clone(),
                output: made.output,
                rank: made.rank,
                scale: f64::from(made.scale),
                a: Factor::Full(a),
                bt: Factor::Full(bt),
            })
            .collect();
        let [mut left, mut right] = problem.y.clone().map(|y| wide(&y));
        exact.low_rank(
            &wide(&problem.x),
            &vec![updates],
            0,
            vec![&mut left, &mut right],
        );
        assert_close(&format!("{inputs} wide"), &fast, &[left, right].concat());
    }
}

#[test]
fn updates_have_the_bits_of_the_plain_products() {
    for (seed, (inputs, widths)) in SHAPES.into_iter().enumerate() {
        let problem = Problem::new(10 + seed as u64, inputs, widths);
        let plain = problem.plainly(Cpu::default());
        let got = everywhere("low_rank", |cpu| problem.run(cpu));
        assert_same_bits("low_rank", &got, &plain);
    }
}

#[test]
fn rows_without_an_update_keep_their_bits() {
    let problem = Problem::new(20, 130, [64, 257]);
    let got = problem.run(Cpu::default());
    let touched = |row: usize| problem.made.iter().any(|made| made.rows.contains(&row));
    assert!(!touched(0) && touched(1) && !touched(problem.rows - 1));
    let (left, right) = got.split_at(problem.rows * 64);
    for row in (0..problem.rows).filter(|row| !touched(*row)) {
        assert_same_bits(
            "left",
            &left[row * 64..][..64],
            &problem.y[0][row * 64..][..64],
        );
        let at = row * 257;
        assert_same_bits("right", &right[at..][..257], &problem.y[1][at..][..257]);
    }
}

#[test]
fn an_update_alone_is_the_same_in_any_list() {
    let problem = Problem::new(30, 100, [77, 96]);
    let cpu = Cpu::default();
    let together = problem.run(cpu);
    // Every row alone, with all updates of it, in their order.
    for row in 0..problem.rows {
        let updates: Vec<_> = problem
            .made
            .iter()
            .filter(|made| made.rows.contains(&row))
            .map(|made| LowRank {
                rows: 0..1,
                ..made.update()
            })
            .collect();
        let mut left = problem.y[0][row * 77..][..77].to_vec();
        let mut right = problem.y[1][row * 96..][..96].to_vec();
        let x = &problem.x[row * 100..][..100];
        cpu.low_rank(x, &vec![updates], 0, vec![&mut left, &mut right]);
        assert_same_bits("left", &left, &together[row * 77..][..77]);
        let at = problem.rows * 77 + row * 96;
        assert_same_bits("right", &right, &together[at..][..96]);
    }
}
