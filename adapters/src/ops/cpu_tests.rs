//! Proofs of the fast path: it equals the reference, keeps the row rule bit for bit, and gives the same bits on every instruction set and any number of
//! threads.

#![allow(
    clippy::unwrap_used,
    reason = "a test may stop at the first broken promise"
)]

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::cpu_lanes::{LANES, Lanes};
use super::cpu_team::Team;
use super::{Cpu, Ops, Reference};

/// Sizes that leave a tail everywhere: inputs, outputs.
const ODD: [(usize, usize); 5] = [(1, 1), (19, 33), (64, 96), (100, 77), (257, 130)];
const ROWS: [usize; 5] = [1, 2, 7, 13, 33];

pub(super) fn random(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

pub(super) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// Within 1e-5 of each number's own size plus the typical size of all.
pub(super) fn assert_close(what: &str, fast: &[f32], exact: &[f64]) {
    assert_eq!(fast.len(), exact.len(), "{what}");
    let typical = exact.iter().map(|x| x.abs()).sum::<f64>() / exact.len().max(1) as f64;
    for (i, (fast, exact)) in fast.iter().zip(exact).enumerate() {
        let error = (f64::from(*fast) - exact).abs();
        assert!(
            error <= 1e-5 * (exact.abs() + typical),
            "{what}[{i}]: {fast} instead of {exact}"
        );
    }
}

pub(super) fn assert_same_bits(what: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}[{i}]: {a} and {b}");
    }
}

/// The same bits on every path and with one thread and with two.
pub(super) fn everywhere(what: &str, run: impl Fn(Cpu) -> Vec<f32>) -> Vec<f32> {
    let expected = run(Cpu::default());
    for cpu in Cpu::every_path() {
        for threads in [1, 2] {
            let team = Team::new(threads);
            let label = format!("{what} on {} with {threads} threads", cpu.path());
            assert_same_bits(&label, &team.lend(|| run(cpu)), &expected);
        }
    }
    expected
}

#[test]
fn matmul_equals_the_reference() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (cpu, exact) = (Cpu::default(), Reference::<f64>::default());
    for (inputs, outputs) in ODD {
        let weight = random(&mut rng, inputs * outputs);
        let (packed, plain) = (
            cpu.pack(&weight, outputs, inputs),
            exact.pack(&weight, outputs, inputs),
        );
        for rows in ROWS {
            let x = random(&mut rng, rows * inputs);
            let mut y = vec![f32::NAN; rows * outputs];
            let mut z = vec![0.0; rows * outputs];
            cpu.matmul(&x, &packed, &mut y);
            exact.matmul(&wide(&x), &plain, &mut z);
            assert_close(&format!("{rows} x {inputs} x {outputs}"), &y, &z);

            let dy = random(&mut rng, rows * outputs);
            let mut dx = random(&mut rng, rows * inputs);
            let mut dz = wide(&dx);
            cpu.matmul_backward(&dy, &packed, &mut dx);
            exact.matmul_backward(&wide(&dy), &plain, &mut dz);
            assert_close(&format!("back {rows} x {inputs} x {outputs}"), &dx, &dz);
        }
    }
}

#[test]
fn matmul_rows_do_not_know_each_other() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let cpu = Cpu::default();
    for (inputs, outputs) in ODD {
        let weight = cpu.pack(&random(&mut rng, inputs * outputs), outputs, inputs);
        let x = random(&mut rng, 33 * inputs);
        let dy = random(&mut rng, 33 * outputs);
        let (mut y, mut dx) = (vec![0.0; 33 * outputs], vec![0.5; 33 * inputs]);
        cpu.matmul(&x, &weight, &mut y);
        cpu.matmul_backward(&dy, &weight, &mut dx);
        for rows in [1, 2, 7, 16] {
            for first in (0..33 - rows).step_by(5) {
                let part = |width: usize| first * width..(first + rows) * width;
                let mut alone = vec![0.0; rows * outputs];
                cpu.matmul(&x[part(inputs)], &weight, &mut alone);
                assert_same_bits("forward", &alone, &y[part(outputs)]);
                let mut alone = vec![0.5; rows * inputs];
                cpu.matmul_backward(&dy[part(outputs)], &weight, &mut alone);
                assert_same_bits("backward", &alone, &dx[part(inputs)]);
            }
        }
    }
}

#[test]
fn parts_of_a_matmul_make_the_whole() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let cpu = Cpu::default();
    let (rows, inputs, outputs) = (9, 50, 150);
    let weight = cpu.pack(&random(&mut rng, inputs * outputs), outputs, inputs);
    let (x, dy) = (
        random(&mut rng, rows * inputs),
        random(&mut rng, rows * outputs),
    );
    let (mut whole, mut dx) = (vec![0.0; rows * outputs], vec![0.0; rows * inputs]);
    cpu.matmul(&x, &weight, &mut whole);
    cpu.matmul_backward(&dy, &weight, &mut dx);
    let (mut parts, mut dparts) = (vec![0.0; rows * outputs], vec![0.0; rows * inputs]);
    for part in [0..64, 64..96, 96..150] {
        cpu.matmul_part(&x, &weight, part.clone(), &mut parts);
        cpu.matmul_backward_part(&dy, &weight, part, &mut dparts);
    }
    assert_same_bits("forward", &parts, &whole);
    assert_same_bits("backward", &dparts, &dx);
}

#[test]
fn matmul_is_the_same_on_every_path_and_with_any_threads() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for (inputs, outputs, rows) in [(37, 45, 3), (130, 200, 40)] {
        let weight = random(&mut rng, inputs * outputs);
        let (x, dy) = (
            random(&mut rng, rows * inputs),
            random(&mut rng, rows * outputs),
        );
        everywhere("matmul", |cpu| {
            let packed = cpu.pack(&weight, outputs, inputs);
            let mut y = vec![0.0; rows * outputs];
            cpu.matmul(&x, &packed, &mut y);
            y
        });
        everywhere("matmul_backward", |cpu| {
            let packed = cpu.pack(&weight, outputs, inputs);
            let mut dx = vec![0.25; rows * inputs];
            cpu.matmul_backward(&dy, &packed, &mut dx);
            dx
        });
    }
}

#[test]
fn gathered_rows_are_the_weights_bits() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let weight = random(&mut rng, 70 * 21);
    let ids = [0, 69, 31, 32, 5];
    let expected: Vec<f32> = ids
        .iter()
        .flat_map(|id| &weight[*id as usize * 21..][..21])
        .copied()
        .collect();
    let got = everywhere("gather", |cpu| {
        let mut out = vec![0.0; ids.len() * 21];
        cpu.gather(&cpu.pack(&weight, 70, 21), &ids, &mut out);
        out
    });
    assert_same_bits("gather", &got, &expected);
}

#[test]
fn thin_products_equal_the_reference() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let (cpu, exact) = (Cpu::default(), Reference::<f64>::default());
    for (rank, width) in [(1, 5), (3, 33), (8, 64), (16, 100), (37, 257)] {
        for rows in ROWS {
            let factor = random(&mut rng, rank * width);
            let (x, h) = (
                random(&mut rng, rows * width),
                random(&mut rng, rows * rank),
            );
            let label = format!("{rows} rows, rank {rank}, {width} wide");
            let (mut a, mut b) = (vec![0.0; rows * rank], vec![0.0; rows * rank]);
            cpu.shrink(&x, &factor, rank, &mut a);
            exact.shrink(&wide(&x), &wide(&factor), rank, &mut b);
            assert_close(&format!("shrink {label}"), &a, &b);

            let mut a = random(&mut rng, rows * width);
            let mut b = wide(&a);
            cpu.expand(&h, &factor, rank, 1.5, &mut a);
            exact.expand(&wide(&h), &wide(&factor), rank, 1.5, &mut b);
            assert_close(&format!("expand {label}"), &a, &b);

            let mut a = random(&mut rng, rank * width);
            let mut b = wide(&a);
            cpu.outer(&h, &x, rank, 1.5, &mut a);
            exact.outer(&wide(&h), &wide(&x), rank, 1.5, &mut b);
            assert_close(&format!("outer {label}"), &a, &b);
        }
    }
}

#[test]
fn thin_products_keep_the_row_rule() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let cpu = Cpu::default();
    let (rows, rank, width) = (33, 13, 75);
    let factor = random(&mut rng, rank * width);
    let (x, h) = (
        random(&mut rng, rows * width),
        random(&mut rng, rows * rank),
    );
    let (mut small, mut large) = (vec![0.0; rows * rank], vec![0.5; rows * width]);
    cpu.shrink(&x, &factor, rank, &mut small);
    cpu.expand(&h, &factor, rank, 2.0, &mut large);
    let mut sum = vec![0.0; rank * width];
    cpu.outer(&h, &x, rank, 2.0, &mut sum);
    let mut pieces = vec![0.0; rank * width];
    let mut first = 0;
    for n in [1, 2, 7, 3, 20] {
        let part = |width: usize| first * width..(first + n) * width;
        let mut alone = vec![0.0; n * rank];
        cpu.shrink(&x[part(width)], &factor, rank, &mut alone);
        assert_same_bits("shrink", &alone, &small[part(rank)]);
        let mut alone = vec![0.5; n * width];
        cpu.expand(&h[part(rank)], &factor, rank, 2.0, &mut alone);
        assert_same_bits("expand", &alone, &large[part(width)]);
        cpu.outer(&h[part(rank)], &x[part(width)], rank, 2.0, &mut pieces);
        first += n;
    }
    assert_same_bits("outer", &pieces, &sum);
}

#[test]
fn thin_products_are_the_same_everywhere() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    for (rows, rank, width) in [(2, 24, 1500), (70, 10, 210)] {
        let factor = random(&mut rng, rank * width);
        let (x, h) = (
            random(&mut rng, rows * width),
            random(&mut rng, rows * rank),
        );
        everywhere("shrink", |cpu| {
            let mut out = vec![0.0; rows * rank];
            cpu.shrink(&x, &factor, rank, &mut out);
            out
        });
        everywhere("expand", |cpu| {
            let mut out = vec![1.0; rows * width];
            cpu.expand(&h, &factor, rank, 0.5, &mut out);
            out
        });
        everywhere("outer", |cpu| {
            let mut out = vec![1.0; rank * width];
            cpu.outer(&h, &x, rank, 0.5, &mut out);
            out
        });
    }
}

#[test]
fn the_exponential_is_good_to_the_last_bits() {
    let mut worst = 0.0_f64;
    for step in -86_599..88_700 {
        let x = step as f32 * 1e-3;
        let got = exp_of([x; LANES]);
        let exact = f64::from(x).exp();
        worst = worst.max((f64::from(got) - exact).abs() / exact);
    }
    assert!(worst < 2e-7, "relative error {worst:e}");
    assert_eq!(exp_of([f32::NEG_INFINITY; LANES]), 0.0);
    assert_eq!(exp_of([-100.0; LANES]), 0.0);
    assert_eq!(exp_of([89.0; LANES]), f32::INFINITY);
    assert_eq!(exp_of([0.0; LANES]), 1.0);
    assert!(exp_of([f32::NAN; LANES]).is_nan());
}

#[allow(unsafe_code, reason = "plain arrays need no instruction set")]
fn exp_of(x: [f32; LANES]) -> f32 {
    // SAFETY: the portable lanes run on every machine and touch no memory here.
    unsafe { x.exp()[0] }
}

#[test]
fn row_operations_equal_the_reference() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let (cpu, exact) = (Cpu::default(), Reference::<f64>::default());
    for width in [1, 16, 37, 64, 131] {
        for rows in ROWS {
            let (x, dy) = (
                random(&mut rng, rows * width),
                random(&mut rng, rows * width),
            );
            let weight = random(&mut rng, width);
            let (mut a, mut b) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            cpu.rms_norm(&x, &weight, 1e-5, &mut a);
            exact.rms_norm(&wide(&x), &wide(&weight), 1e-5, &mut b);
            assert_close("rms_norm", &a, &b);

            let mut a = random(&mut rng, x.len());
            let mut b = wide(&a);
            cpu.rms_norm_backward(&x, &weight, 1e-5, &dy, &mut a);
            exact.rms_norm_backward(&wide(&x), &wide(&weight), 1e-5, &wide(&dy), &mut b);
            assert_close("rms_norm_backward", &a, &b);

            let gate: Vec<f32> = x.iter().map(|x| x * 9.0).collect();
            let (mut a, mut b) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            cpu.swiglu(&gate, &dy, &mut a);
            exact.swiglu(&wide(&gate), &wide(&dy), &mut b);
            assert_close("swiglu", &a, &b);

            let (mut ga, mut ua) = (gate.clone(), x.clone());
            let (mut gb, mut ub) = (wide(&gate), wide(&x));
            cpu.swiglu_backward(&mut ga, &mut ua, &dy);
            exact.swiglu_backward(&mut gb, &mut ub, &wide(&dy));
            assert_close("swiglu_backward gate", &ga, &gb);
            assert_close("swiglu_backward up", &ua, &ub);
        }
    }
}

#[test]
fn rope_equals_the_reference_and_turns_back() {
    let mut rng = ChaCha8Rng::seed_from_u64(10);
    let (cpu, exact) = (Cpu::default(), Reference::<f64>::default());
    for (rows, heads, head_dim) in [(1, 1, 2), (7, 3, 24), (5, 9, 64)] {
        let angles = random(&mut rng, rows * head_dim / 2);
        let cos: Vec<f32> = angles.iter().map(|a| (3.0 * a).cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| (3.0 * a).sin()).collect();
        let x = random(&mut rng, rows * heads * head_dim);
        let (mut a, mut b) = (x.clone(), wide(&x));
        cpu.rope(&mut a, head_dim, &cos, &sin, false);
        exact.rope(&mut b, head_dim, &wide(&cos), &wide(&sin), false);
        assert_close("rope", &a, &b);
        cpu.rope(&mut a, head_dim, &cos, &sin, true);
        assert_close("rope back", &a, &wide(&x));
    }
}

#[test]
fn cross_entropy_equals_the_reference() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let (cpu, exact) = (Cpu::default(), Reference::<f64>::default());
    for (rows, vocab) in [(1, 2), (3, 1001), (33, 77)] {
        let logits: Vec<f32> = random(&mut rng, rows * vocab)
            .iter()
            .map(|x| x * 12.0)
            .collect();
        let labels: Vec<u32> = (0..rows)
            .map(|_| rng.random_range(0..vocab as u32))
            .collect();
        let (mut a, mut b) = (vec![0.0; rows * vocab], vec![0.0; rows * vocab]);
        let (mut ja, mut jb) = (vec![0.0; 2 * rows], vec![0.0; 2 * rows]);
        let weights = random(&mut rng, rows);
        cpu.cross_entropy(&logits, &labels, &weights, &mut a, &mut ja);
        exact.cross_entropy(&wide(&logits), &labels, &wide(&weights), &mut b, &mut jb);
        assert_close("gradient", &a, &b);
        assert_close("judged", &ja, &jb);
    }
}

#[test]
fn row_operations_are_the_same_everywhere() {
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    let (rows, width) = (150, 450);
    let (x, dy) = (
        random(&mut rng, rows * width),
        random(&mut rng, rows * width),
    );
    let weight = random(&mut rng, width);
    let angles = random(&mut rng, rows * 25);
    let labels: Vec<u32> = (0..rows as u32).collect();
    everywhere("norms and activations", |cpu| {
        let mut out = vec![0.0; x.len()];
        cpu.rms_norm(&x, &weight, 1e-5, &mut out);
        let mut back = dy.clone();
        cpu.rms_norm_backward(&x, &weight, 1e-5, &dy, &mut back);
        out.extend(back);
        let mut y = vec![0.0; x.len()];
        cpu.swiglu(&x, &dy, &mut y);
        out.extend(y);
        let (mut gate, mut up) = (x.clone(), dy.clone());
        cpu.swiglu_backward(&mut gate, &mut up, &x);
        out.extend(gate);
        out.extend(up);
        out
    });
    everywhere("rope and loss", |cpu| {
        let mut out = x.clone();
        cpu.rope(&mut out, 50, &angles, &angles, false);
        let (mut gradient, mut judged) = (vec![0.0; x.len()], vec![0.0; 2 * rows]);
        cpu.cross_entropy(&x, &labels, &dy[..rows], &mut gradient, &mut judged);
        out.extend(gradient);
        out.extend(judged);
        out
    });
}
