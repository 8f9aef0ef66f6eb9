//! Proofs of the formats below f32: plain ones have the bits of f32 on the rounded weight; blocks equal the sum as its definition writes it, bit for bit, on
//! every instruction set, with any threads and beside any neighbours.

#![allow(
    clippy::unwrap_used,
    reason = "a test may stop at the first broken promise"
)]

use half::f16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::cpu_tests::{assert_close, assert_same_bits, everywhere, random, wide};
use super::{BLOCK, Blocks, Cpu, Ops, Reference, Weight, WeightKind};

/// Inputs and outputs: tails of blocks and panels, the model's own 576, and several tasks.
const SIZES: [(usize, usize); 6] = [
    (1, 1),
    (32, 32),
    (70, 33),
    (257, 130),
    (576, 192),
    (1536, 70),
];
const ROWS: [usize; 4] = [1, 2, 7, 33];
const PLAIN: [WeightKind; 2] = [WeightKind::Bf16, WeightKind::F16];
const BLOCKS: [WeightKind; 3] = [WeightKind::Q8_0, WeightKind::Q4_0, WeightKind::Q4_1];

/// A weight of any format. The four-bit ones have random codes, scales and minima, as a file brings them.
fn weight(rng: &mut ChaCha8Rng, kind: WeightKind, outputs: usize, inputs: usize) -> Weight {
    if matches!(kind, WeightKind::Q4_0 | WeightKind::Q4_1) {
        let mut bytes = Vec::new();
        for _ in 0..outputs * inputs.div_ceil(BLOCK) {
            bytes.extend(f16::from_f32(rng.random_range(-0.3..0.3)).to_le_bytes());
            if kind == WeightKind::Q4_1 {
                bytes.extend(f16::from_f32(rng.random_range(-2.0..2.0)).to_le_bytes());
            }
            bytes.extend((0..16).map(|_| rng.random::<u8>()));
        }
        return Weight::Blocks(Blocks::new(kind, inputs, bytes).unwrap());
    }
    let rounded = Weight::F32(random(rng, outputs * inputs)).rounded(kind, inputs);
    assert_eq!(rounded.kind(), kind);
    rounded
}

/// `y = x W^T` as the definition writes it, from the blocks' bytes and nothing of the fast path.
fn oracle(x: &[f32], weight: &Blocks, outputs: usize) -> Vec<f32> {
    let (inputs, kind) = (weight.inputs(), weight.kind());
    let mut y = Vec::new();
    for x in x.chunks_exact(inputs) {
        for output in 0..outputs {
            let row = &weight.bytes()[output * weight.row_bytes()..][..weight.row_bytes()];
            let mut acc = 0.0_f32;
            for (x, block) in x.chunks(BLOCK).zip(row.chunks_exact(kind.block_bytes())) {
                let largest = x.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
                let (scale, factor) = match largest {
                    0.0 => (0.0, 0.0),
                    _ => (largest / 127.0, 127.0 / largest),
                };
                let codes: Vec<i32> = x
                    .iter()
                    .map(|x| (x * factor).round_ties_even() as i32)
                    .collect();
                let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
                let code = |i: usize| match kind {
                    WeightKind::Q8_0 => i32::from(block[2 + i] as i8),
                    WeightKind::Q4_0 => i32::from(block[2 + i % 16] >> (i / 16 * 4) & 15) - 8,
                    _ => i32::from(block[4 + i % 16] >> (i / 16 * 4) & 15),
                };
                let dot: i32 = codes.iter().enumerate().map(|(i, c)| c * code(i)).sum();
                acc = (dot as f32).mul_add(half(0) * scale, acc);
                if kind == WeightKind::Q4_1 {
                    acc = half(2).mul_add(scale * codes.iter().sum::<i32>() as f32, acc);
                }
            }
            y.push(acc);
        }
    }
    y
}

#[test]
fn plain_formats_have_the_bits_of_f32() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for kind in PLAIN {
        for (inputs, outputs) in SIZES {
            let weight = weight(&mut rng, kind, outputs, inputs);
            let wide = weight.widened().into_owned();
            for rows in ROWS {
                let (x, dy) = (
                    random(&mut rng, rows * inputs),
                    random(&mut rng, rows * outputs),
                );
                for cpu in Cpu::every_path() {
                    let (narrow, full) = (
                        cpu.pack_weight(&weight, outputs, inputs),
                        cpu.pack(&wide, outputs, inputs),
                    );
                    assert_eq!(cpu.kind(&narrow), kind);
                    let (mut a, mut b) = (vec![1.0; dy.len()], vec![2.0; dy.len()]);
                    cpu.matmul(&x, &narrow, &mut a);
                    cpu.matmul(&x, &full, &mut b);
                    let label = format!("{kind} {rows} x {inputs} x {outputs} {}", cpu.path());
                    assert_same_bits(&label, &a, &b);
                    let (mut a, mut b) = (vec![0.5; x.len()], vec![0.5; x.len()]);
                    cpu.matmul_backward(&dy, &narrow, &mut a);
                    cpu.matmul_backward(&dy, &full, &mut b);
                    assert_same_bits(&format!("back {label}"), &a, &b);
                }
            }
        }
    }
}

#[test]
fn blocks_equal_their_definition_bit_for_bit() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for kind in BLOCKS {
        for (inputs, outputs) in SIZES {
            let weight = weight(&mut rng, kind, outputs, inputs);
            let Weight::Blocks(blocks) = &weight else {
                panic!("{kind} is made of blocks");
            };
            for rows in ROWS {
                let mut x = random(&mut rng, rows * inputs);
                // A block of zeros has no scale.
                x[..inputs.min(BLOCK)].fill(0.0);
                let expected = oracle(&x, blocks, outputs);
                let label = format!("{kind} {rows} x {inputs} x {outputs}");
                let got = everywhere(&label, |cpu| {
                    let mut y = vec![f32::NAN; rows * outputs];
                    cpu.matmul(&x, &cpu.pack_weight(&weight, outputs, inputs), &mut y);
                    y
                });
                assert_same_bits(&label, &got, &expected);
            }
        }
    }
}

#[test]
fn rows_of_blocks_do_not_know_each_other() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let cpu = Cpu::default();
    let (inputs, outputs) = (576, 200);
    for kind in BLOCKS {
        let weight = cpu.pack_weight(&weight(&mut rng, kind, outputs, inputs), outputs, inputs);
        let x = random(&mut rng, 300 * inputs);
        let mut y = vec![0.0; 300 * outputs];
        cpu.matmul(&x, &weight, &mut y);
        for rows in [1, 2, 7, 33] {
            for first in (0..300 - rows).step_by(29) {
                let mut alone = vec![0.0; rows * outputs];
                cpu.matmul(
                    &x[first * inputs..(first + rows) * inputs],
                    &weight,
                    &mut alone,
                );
                assert_same_bits("row", &alone, &y[first * outputs..(first + rows) * outputs]);
            }
        }
        let mut parts = vec![0.0; 300 * outputs];
        for part in [0..64, 64..96, 96..200] {
            cpu.matmul_part(&x, &weight, part, &mut parts);
        }
        assert_same_bits("parts", &parts, &y);
    }
}

/// Rounding rows to eight bits is worth less than one percent of a product's size.
#[test]
fn blocks_are_near_the_exact_product() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let (cpu, exact) = (Cpu::default(), Reference::<f64>::default());
    let (rows, inputs, outputs) = (5, 576, 64);
    for kind in BLOCKS {
        let weight = weight(&mut rng, kind, outputs, inputs);
        let x = random(&mut rng, rows * inputs);
        let (mut y, mut z) = (vec![0.0; rows * outputs], vec![0.0; rows * outputs]);
        cpu.matmul(&x, &cpu.pack_weight(&weight, outputs, inputs), &mut y);
        exact.matmul(
            &wide(&x),
            &exact.pack_weight(&weight, outputs, inputs),
            &mut z,
        );
        let norm = z.iter().map(|z| z * z).sum::<f64>().sqrt();
        let off = y
            .iter()
            .zip(&z)
            .map(|(y, z)| (f64::from(*y) - z).powi(2))
            .sum::<f64>()
            .sqrt();
        assert!(off < 0.01 * norm, "{kind} is off by {}", off / norm);
        assert!(off > 0.0, "{kind} rounds something");
    }
}

#[test]
fn the_way_back_and_the_rows_are_what_blocks_stand_for() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let exact = Reference::<f64>::default();
    for kind in BLOCKS {
        for (inputs, outputs) in SIZES {
            let weight = weight(&mut rng, kind, outputs, inputs);
            for rows in [1, 40] {
                let dy = random(&mut rng, rows * outputs);
                let got = everywhere("backward", |cpu| {
                    let mut dx = vec![0.25; rows * inputs];
                    cpu.matmul_backward(&dy, &cpu.pack_weight(&weight, outputs, inputs), &mut dx);
                    dx
                });
                let mut dz = vec![0.25; rows * inputs];
                exact.matmul_backward(
                    &wide(&dy),
                    &exact.pack_weight(&weight, outputs, inputs),
                    &mut dz,
                );
                assert_close(&format!("{kind} {rows} x {inputs} x {outputs}"), &got, &dz);
            }
            let ids = [0, outputs as u32 - 1, outputs as u32 / 2];
            let expected: Vec<f32> = ids
                .iter()
                .flat_map(|id| weight.widened()[*id as usize * inputs..][..inputs].to_vec())
                .collect();
            let cpu = Cpu::default();
            let mut rows = vec![0.0; expected.len()];
            cpu.gather(&cpu.pack_weight(&weight, outputs, inputs), &ids, &mut rows);
            assert_same_bits("gather", &rows, &expected);
        }
    }
}

#[test]
fn what_is_not_finite_stays_visible() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let (inputs, outputs) = (96, 40);
    for kind in BLOCKS {
        let weight = weight(&mut rng, kind, outputs, inputs);
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = random(&mut rng, 2 * inputs);
            x[inputs + 50] = poison;
            for cpu in Cpu::every_path() {
                let mut y = vec![0.0; 2 * outputs];
                cpu.matmul(&x, &cpu.pack_weight(&weight, outputs, inputs), &mut y);
                assert!(y[..outputs].iter().all(|y| y.is_finite()));
                assert!(y[outputs..].iter().all(|y| y.is_nan()), "{kind} {poison}");
            }
        }
    }
}
