//! Proofs of a device: every operation against the reference, whether it brings its tables, names its kernel and hands over its
//! operands as the kernel has them; and the row rule. Tests run them in the emulator, `espalierd check` on the device at hand.

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::driver::Element;
use super::*;
use crate::ops::{Factor, KvRows, NO_ROW, Reference, Uniform};

type Exact = Reference<f64>;
const EXACT: fn() -> Exact = Exact::default;

/// Makes operations with a working element.
pub type Open<'a> = &'a dyn Fn(Element) -> Cuda;

/// Compares one kind of operations with the reference.
pub type Proof = fn(Open<'_>);

/// What is proved, by name. A proof panics with the first number that is wrong.
pub const PROOFS: &[(&str, Proof)] = &[
    ("buffers", buffers_keep_what_they_are_given),
    ("gather", rows_are_gathered_from_every_format),
    ("products", products_equal_the_reference),
    ("row rule", products_keep_the_row_rule),
    ("uniform weights", uniform_weights_are_the_hosts),
    ("thin products", thin_products_equal_the_reference),
    (
        "low-rank updates",
        updates_of_many_adapters_equal_the_reference,
    ),
    ("rows", row_operations_equal_the_reference),
    ("paged attention", paged_attention_equals_the_reference),
    (
        "flat attention",
        flat_attention_and_its_gradients_equal_the_reference,
    ),
    ("draws", draws_follow_their_probabilities),
    ("loss and optimizer", loss_and_optimizer_equal_the_reference),
];

/// On each element; the numbers of both sides are of it, so that only what the operation does can differ.
fn each(open: Open<'_>, run: impl Fn(Cuda, &mut Draw)) {
    for element in [Element::F32, Element::Bf16] {
        let mut draw = Draw {
            rng: ChaCha8Rng::seed_from_u64(5),
            element,
        };
        run(open(element), &mut draw);
    }
}

struct Draw {
    rng: ChaCha8Rng,
    element: Element,
}

impl Draw {
    /// Numbers that the working element holds.
    fn numbers(&mut self, len: usize) -> Vec<f32> {
        let element = self.element;
        let number = |x: f32| match element {
            Element::F32 => x,
            _ => bf16::from_f32(x).to_f32(),
        };
        (0..len)
            .map(|_| number(self.rng.random_range(-1.0..1.0)))
            .collect()
    }

    /// Fails where a number is not as near as the element allows.
    fn close(&self, what: &str, found: &[f32], exact: &[f64]) {
        let bound = match self.element {
            Element::F32 => 1e-5,
            _ => 1.0 / 128.0,
        };
        self.within(bound, what, found, exact);
    }

    fn within(&self, bound: f64, what: &str, found: &[f32], exact: &[f64]) {
        assert_eq!(found.len(), exact.len(), "{what}");
        let typical = exact.iter().map(|x| x.abs()).sum::<f64>() / exact.len().max(1) as f64;
        for (i, (found, exact)) in found.iter().zip(exact).enumerate() {
            let error = (f64::from(*found) - exact).abs();
            assert!(
                error <= bound * (exact.abs() + typical),
                "{what}[{i}] in {:?}: {found} instead of {exact}",
                self.element
            );
        }
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// A buffer that holds numbers.
fn put(ops: &Cuda, mut buffer: CudaBuf, numbers: &[f32]) -> CudaBuf {
    ops.resize(&mut buffer, numbers.len());
    ops.write(numbers, buffer.all_mut());
    buffer
}

fn working(ops: &Cuda, numbers: &[f32]) -> CudaBuf {
    put(ops, ops.working(), numbers)
}

fn exact(ops: &Cuda, numbers: &[f32]) -> CudaBuf {
    put(ops, ops.exact(), numbers)
}

fn read(ops: &Cuda, view: CudaView<'_>) -> Vec<f32> {
    let mut host = vec![f32::NAN; view.len];
    ops.read(view, &mut host);
    host
}

fn buffers_keep_what_they_are_given(open: Open<'_>) {
    each(open, |ops, draw| {
        let numbers = draw.numbers(300);
        let mut buffer = working(&ops, &numbers);
        assert_eq!(read(&ops, buffer.part(7..290)), numbers[7..290]);
        ops.copy_within(&mut buffer, 0..100, 200);
        assert_eq!(read(&ops, buffer.part(200..300)), numbers[..100]);
        ops.clear(buffer.part_mut(10..20));
        assert_eq!(read(&ops, buffer.part(9..21))[1..11], [0.0; 10]);
        let mut other = working(&ops, &draw.numbers(300));
        ops.copy(buffer.part(100..200), other.part_mut(0..100));
        assert_eq!(read(&ops, other.part(0..100)), numbers[100..200]);
    });
}

fn rows_are_gathered_from_every_format(open: Open<'_>) {
    each(open, |ops, draw| {
        let (outputs, inputs) = (9, 70);
        let numbers = draw.numbers(outputs * inputs);
        let kinds = [WeightKind::F32, WeightKind::Bf16, WeightKind::Q8_0];
        for kind in kinds {
            let weight = Weight::F32(numbers.clone()).rounded(kind, inputs);
            let matrix = ops.pack_weight(&weight, outputs, inputs);
            let plain = weight.widened();
            let ids = [8, NO_ROW, 0, 3];
            let mut out = ops.exact();
            ops.resize(&mut out, ids.len() * inputs);
            ops.gather(&matrix, ops.ids(&ids), out.all_mut());
            let found = read(&ops, out.all());
            assert_eq!(found[..inputs], plain[8 * inputs..], "{kind}");
            assert_eq!(found[inputs..2 * inputs], [0.0; 70], "{kind}");
            assert_eq!(found[3 * inputs..], plain[3 * inputs..][..inputs], "{kind}");
        }
    });
}

fn products_equal_the_reference(open: Open<'_>) {
    each(open, |ops, draw| {
        for (rows, outputs, inputs) in [
            (1, 40, 48),
            (9, 17, 64),
            (20, 33, 40),
            (40, 32, 24),
            (70, 130, 64),
        ] {
            let numbers = draw.numbers(outputs * inputs);
            for kind in [WeightKind::Bf16, WeightKind::Q8_0] {
                let weight = Weight::F32(numbers.clone()).rounded(kind, inputs);
                let matrix = ops.pack_weight(&weight, outputs, inputs);
                let plain = EXACT().pack(&weight.widened(), outputs, inputs);
                let (x, dy) = (draw.numbers(rows * inputs), draw.numbers(rows * outputs));
                let dx = draw.numbers(rows * inputs);
                let mut y = vec![0.0; rows * outputs];
                EXACT().matmul(&wide(&x), &plain, &mut y);
                let what = format!("{rows} rows, {kind}");
                let mut fast = exact(&ops, &vec![9.0; y.len()]);
                ops.matmul(working(&ops, &x).all(), &matrix, fast.all_mut());
                draw.within(1e-4, &what, &read(&ops, fast.all()), &y);
                let mut fast = working(&ops, &vec![9.0; y.len()]);
                ops.matmul(working(&ops, &x).all(), &matrix, fast.all_mut());
                draw.close(&what, &read(&ops, fast.all()), &y);
                let mut back = wide(&dx);
                EXACT().matmul_backward(&wide(&dy), &plain, &mut back);
                let mut fast = working(&ops, &dx);
                ops.matmul_backward(working(&ops, &dy).all(), &matrix, fast.all_mut());
                draw.close(&format!("back, {what}"), &read(&ops, fast.all()), &back);
            }
        }
    });
}

/// Numbers by formula are the host's, rounded.
fn uniform_weights_are_the_hosts(open: Open<'_>) {
    each(open, |ops, draw| {
        let uniform = Uniform {
            kind: WeightKind::Bf16,
            len: 9 * 300,
            seed: 77,
            bound: 0.25,
        };
        let matrix = ops.pack_weight(&Weight::Uniform(uniform), 9, 300);
        let mut out = ops.exact();
        ops.resize(&mut out, 300);
        ops.gather(&matrix, ops.ids(&[4]), out.all_mut());
        let host: Vec<f64> = uniform.numbers().map(f64::from).collect();
        draw.within(
            1.0 / 256.0,
            "uniform",
            &read(&ops, out.all()),
            &host[1200..1500],
        );
    });
}

/// A row's bits are the same alone and beside any number of others, through every program for products.
fn products_keep_the_row_rule(open: Open<'_>) {
    each(open, |ops, draw| {
        let (most, outputs, inputs) = (150, 40, 96);
        let weight = Weight::F32(draw.numbers(outputs * inputs));
        let matrix = ops.pack_weight(&weight, outputs, inputs);
        let x = draw.numbers(most * inputs);
        let product = |rows: Range<usize>| {
            let x = working(&ops, &x[rows.start * inputs..rows.end * inputs]);
            let mut y = exact(&ops, &vec![9.0; rows.len() * outputs]);
            ops.matmul(x.all(), &matrix, y.all_mut());
            read(&ops, y.all())
        };
        let alone = product(65..66);
        for rows in [60..66, 50..66, 40..70, 20..80, 0..most] {
            let at = (65 - rows.start) * outputs;
            let beside = &product(rows.clone())[at..at + outputs];
            let same = alone
                .iter()
                .zip(beside)
                .all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "row 65 among {rows:?} in {:?}", draw.element);
        }
    });
}

fn thin_products_equal_the_reference(open: Open<'_>) {
    each(open, |ops, draw| {
        for (rows, width, rank) in [(1, 40, 1), (70, 136, 9), (33, 64, 17)] {
            let (x, a) = (draw.numbers(rows * width), draw.numbers(rank * width));
            let (h, dw) = (draw.numbers(rows * rank), draw.numbers(rank * width));
            let mut out = vec![0.0; rows * rank];
            EXACT().shrink(&wide(&x), &wide(&a), rank, &mut out);
            let mut fast = exact(&ops, &vec![9.0; out.len()]);
            ops.shrink(
                working(&ops, &x).all(),
                exact(&ops, &a).all(),
                rank,
                fast.all_mut(),
            );
            draw.within(1e-4, "shrink", &read(&ops, fast.all()), &out);
            let mut out = wide(&x);
            EXACT().expand(&wide(&h), &wide(&a), rank, 0.75, &mut out);
            let mut fast = working(&ops, &x);
            ops.expand(
                exact(&ops, &h).all(),
                exact(&ops, &a).all(),
                rank,
                0.75,
                fast.all_mut(),
            );
            draw.close("expand", &read(&ops, fast.all()), &out);
            let mut out = wide(&dw);
            EXACT().outer(&wide(&h), &wide(&x), rank, 0.75, &mut out);
            let mut fast = exact(&ops, &dw);
            ops.outer(
                exact(&ops, &h).all(),
                working(&ops, &x).all(),
                rank,
                0.75,
                fast.all_mut(),
            );
            draw.within(1e-4, "outer", &read(&ops, fast.all()), &out);
        }
    });
}

/// Three adapters in an arena each: rows with two of them, rows with one, rows with none; one site that only one adapts.
fn updates_of_many_adapters_equal_the_reference(open: Open<'_>) {
    each(open, |ops, draw| {
        let (rows, inputs, widths) = (90, 40, [24, 136]);
        // (rows, output, rank, factor kind): a row's updates stand together, in the order of outputs.
        let planned = [
            (3..80, 0, 5, 0),
            (3..80, 0, 9, 1),
            (3..80, 1, 5, 0),
            (85..90, 1, 17, 2),
        ];
        let mut arenas = Vec::new();
        let mut factors = Vec::new();
        for (_, output, rank, kind) in &planned {
            let (a, bt) = (rank * inputs, rank * widths[*output]);
            let numbers = draw.numbers(a + bt);
            let narrow: Vec<bf16> = numbers.iter().map(|x| bf16::from_f32(*x)).collect();
            let size = if *kind == 0 {
                ArenaSize {
                    full: a + bt,
                    half: 0,
                }
            } else {
                ArenaSize {
                    full: 8,
                    half: a + bt,
                }
            };
            let arena = ops.arena(None, size, &mut |full, half| {
                full.fill(7.0);
                if *kind == 0 {
                    full.copy_from_slice(&numbers);
                }
                for (half, number) in half.iter_mut().zip(&narrow) {
                    *half = match kind {
                        1 => number.to_bits(),
                        _ => half::f16::from_f32(number.to_f32()).to_bits(),
                    };
                }
            });
            arenas.push(arena.expect("a small arena fits"));
            let values: Vec<f64> = match kind {
                0 => wide(&numbers),
                1 => narrow.iter().map(|x| x.to_f64()).collect(),
                _ => narrow
                    .iter()
                    .map(|x| half::f16::from_f32(x.to_f32()).to_f64())
                    .collect(),
            };
            factors.push((values, a));
        }
        let span = |kind: usize, at: Range<usize>| match kind {
            0 => Span::Full(at),
            1 => Span::Bf16(at),
            _ => Span::F16(at),
        };
        let list: Vec<_> = planned
            .iter()
            .zip(&arenas)
            .map(|((rows, output, rank, kind), arena)| {
                let (a, bt) = (rank * inputs, rank * widths[*output]);
                LowRank {
                    rows: rows.clone(),
                    output: *output,
                    rank: *rank,
                    scale: 0.5,
                    a: Cuda::factor(arena, &span(*kind, 0..a)),
                    bt: Cuda::factor(arena, &span(*kind, a..a + bt)),
                }
            })
            .collect();
        let plain: Vec<_> = planned
            .iter()
            .zip(&factors)
            .map(|((rows, output, rank, _), (values, a))| LowRank {
                rows: rows.clone(),
                output: *output,
                rank: *rank,
                scale: 0.5,
                a: Factor::Full(&values[..*a]),
                bt: Factor::Full(&values[*a..]),
            })
            .collect();
        let x = draw.numbers(rows * inputs);
        let y = widths.map(|width| draw.numbers(rows * width));
        let [mut left, mut right] = y.clone().map(|y| wide(&y));
        let lists = vec![Vec::new(), plain];
        EXACT().low_rank(&wide(&x), &lists, 1, vec![&mut left, &mut right]);
        let [mut fast_left, mut fast_right] = y.map(|y| working(&ops, &y));
        let updates = ops.updates(vec![Vec::new(), list]);
        let outputs = vec![fast_left.all_mut(), fast_right.all_mut()];
        ops.low_rank(working(&ops, &x).all(), &updates, 1, outputs);
        draw.close("left", &read(&ops, fast_left.all()), &left);
        draw.close("right", &read(&ops, fast_right.all()), &right);
    });
}

fn row_operations_equal_the_reference(open: Open<'_>) {
    each(open, |ops, draw| {
        let (rows, width) = (5, 48);
        let len = rows * width;
        let (x, y, dy) = (draw.numbers(len), draw.numbers(len), draw.numbers(len));
        let weight = draw.numbers(width);
        let w = working(&ops, &weight);
        let mut out = vec![0.0; len];
        EXACT().rms_norm(&wide(&x), &wide(&weight), 1e-5, &mut out);
        let mut fast = working(&ops, &y);
        ops.rms_norm(working(&ops, &x).all(), w.all(), 1e-5, fast.all_mut());
        draw.close("norm", &read(&ops, fast.all()), &out);

        let (mut residual, mut fast_residual) = (wide(&y), working(&ops, &y));
        EXACT().add_rms_norm(&wide(&x), &mut residual, &wide(&weight), 1e-5, &mut out);
        let x_there = working(&ops, &x);
        ops.add_rms_norm(
            x_there.all(),
            &mut fast_residual,
            w.all(),
            1e-5,
            fast.all_mut(),
        );
        draw.close("sum", &read(&ops, fast_residual.all()), &residual);
        draw.close("norm of the sum", &read(&ops, fast.all()), &out);

        let (mut back, mut fast) = (wide(&y), working(&ops, &y));
        EXACT().rms_norm_backward(&wide(&x), &wide(&weight), 1e-5, &wide(&dy), &mut back);
        let dy_there = working(&ops, &dy);
        ops.rms_norm_backward(x_there.all(), w.all(), 1e-5, dy_there.all(), fast.all_mut());
        draw.close("norm back", &read(&ops, fast.all()), &back);

        for inverse in [false, true] {
            let angles = draw.numbers(2 * rows * 8);
            let (cos, sin) = angles.split_at(rows * 8);
            let (mut turned, mut fast) = (wide(&x), working(&ops, &x));
            EXACT().rope(&mut turned, 16, &wide(cos), &wide(sin), inverse);
            let (cos, sin) = (exact(&ops, cos), exact(&ops, sin));
            ops.rope(fast.all_mut(), 16, cos.all(), sin.all(), inverse);
            draw.close("rope", &read(&ops, fast.all()), &turned);
        }

        let (mut out, mut fast) = (vec![0.0; len], working(&ops, &x));
        EXACT().swiglu(&wide(&x), &wide(&y), &mut out);
        ops.swiglu(x_there.all(), working(&ops, &y).all(), fast.all_mut());
        draw.close("swiglu", &read(&ops, fast.all()), &out);
        let (mut gate, mut up) = (wide(&x), wide(&y));
        EXACT().swiglu_backward(&mut gate, &mut up, &wide(&dy));
        let (mut fast_gate, mut fast_up) = (working(&ops, &x), working(&ops, &y));
        ops.swiglu_backward(fast_gate.all_mut(), fast_up.all_mut(), dy_there.all());
        draw.close("gate back", &read(&ops, fast_gate.all()), &gate);
        draw.close("up back", &read(&ops, fast_up.all()), &up);

        let (mut sum, mut fast) = (wide(&y), working(&ops, &y));
        EXACT().add(&wide(&x), &mut sum);
        EXACT().add_bias(&wide(&weight), &mut sum);
        EXACT().scale_columns(&wide(&weight), &mut sum);
        ops.add(x_there.all(), fast.all_mut());
        ops.add_bias(w.all(), fast.all_mut());
        ops.scale_columns(exact(&ops, &weight).all(), fast.all_mut());
        draw.within(0.02, "sums", &read(&ops, fast.all()), &sum);

        let (mut product, mut fast) = (wide(&y), exact(&ops, &y));
        EXACT().multiply(&wide(&x), &mut product);
        ops.multiply(x_there.all(), fast.all_mut());
        draw.close("products", &read(&ops, fast.all()), &product);

        let chosen = [4, 0, 3];
        let mut taken = working(&ops, &vec![9.0; 3 * width]);
        ops.take_rows(x_there.all(), ops.ids(&chosen), taken.all_mut());
        let found = read(&ops, taken.all());
        assert_eq!(found[..width], x[4 * width..]);
        assert_eq!(found[2 * width..], x[3 * width..4 * width]);
        let (mut sum, mut fast) = (wide(&y), working(&ops, &y));
        EXACT().add_rows(&wide(&found), &chosen, &mut sum);
        ops.add_rows(taken.all(), ops.ids(&chosen), fast.all_mut());
        draw.close("added rows", &read(&ops, fast.all()), &sum);

        let keys: Vec<u64> = (0..rows as u64).map(|key| key * 77 + 5).collect();
        for add in [false, true] {
            let (mut out, mut fast) = (wide(&y), working(&ops, &y));
            EXACT().dropout(&wide(&x), &keys, 12, 0.25, &mut out, add);
            ops.dropout(x_there.all(), &keys, 12, 0.25, fast.all_mut(), add);
            draw.close("dropout", &read(&ops, fast.all()), &out);
        }
    });
}

const SHAPE: AttentionShape = AttentionShape {
    heads: 6,
    kv_heads: 2,
    head_dim: 16,
    window: None,
};

/// A prompt's chunk, two sequences that decode, one of them beyond a split, all over one paged cache.
fn paged_attention_equals_the_reference(open: Open<'_>) {
    each(open, |ops, draw| {
        let (q_width, kv_width) = (SHAPE.q_width(), SHAPE.kv_width());
        let tables: [Vec<u32>; 3] = [vec![12, 3], (0..9).map(|b| 25 - b).collect(), vec![1, 0, 2]];
        let spans = [(0..7, 15, 0), (7..8, 140, 1), (9..10, 33, 2)];
        let blocks = 26;
        let mut q = draw.numbers(10 * q_width);
        let cache = || vec![0.0; blocks * CUDA_BLOCK_SIZE * kv_width];
        let (mut k, mut v) = (wide(&cache()), wide(&cache()));
        let (mut fast_k, mut fast_v) = (working(&ops, &cache()), working(&ops, &cache()));
        for (rows, start, table) in &spans {
            let kv = KvRows::Paged {
                table: &tables[*table],
                block_size: CUDA_BLOCK_SIZE,
            };
            let count = start + rows.len();
            let mut places: Vec<u32> = (0..count).map(|t| kv.row(t) as u32).collect();
            let (keys, values) = (
                draw.numbers(count * kv_width),
                draw.numbers(count * kv_width),
            );
            let head_dim = SHAPE.head_dim;
            EXACT().store_keys(&wide(&keys), head_dim, &places, CUDA_BLOCK_SIZE, &mut k);
            EXACT().store_values(&wide(&values), head_dim, &places, CUDA_BLOCK_SIZE, &mut v);
            // A row that is none, as in a step that was filled up.
            places.push(NO_ROW);
            let padded = |numbers: &[f32]| [numbers, &vec![9.0; kv_width]].concat();
            let (keys, values) = (
                working(&ops, &padded(&keys)),
                working(&ops, &padded(&values)),
            );
            let ids = ops.ids(&places);
            let size = CUDA_BLOCK_SIZE;
            ops.store_keys(keys.all(), head_dim, ids, size, fast_k.all_mut());
            ops.store_values(values.all(), head_dim, ids, size, fast_v.all_mut());
        }
        let spans: Vec<AttentionSpan<'_>> = spans
            .iter()
            .map(|(rows, start, table)| AttentionSpan {
                rows: rows.clone(),
                start: *start,
                kv: KvRows::Paged {
                    table: &tables[*table],
                    block_size: CUDA_BLOCK_SIZE,
                },
            })
            .collect();
        q[3] = 0.5;
        for window in [None, Some(20)] {
            let shape = AttentionShape { window, ..SHAPE };
            let mut out = vec![3.0; q.len()];
            EXACT().attention(shape, &wide(&q), &k, &v, &spans, &mut out, None);
            let mut fast = working(&ops, &vec![3.0; q.len()]);
            ops.attention(
                shape,
                working(&ops, &q).all(),
                fast_k.all(),
                fast_v.all(),
                &ops.spans(spans.clone()),
                fast.all_mut(),
                None,
            );
            draw.close("attention", &read(&ops, fast.all()), &out);
        }
    });
}

fn flat_attention_and_its_gradients_equal_the_reference(open: Open<'_>) {
    each(open, |ops, draw| {
        let (rows, q_width, kv_width) = (75, SHAPE.q_width(), SHAPE.kv_width());
        let span = |rows: Range<usize>| AttentionSpan {
            kv: KvRows::Flat { first: rows.start },
            rows,
            start: 0,
        };
        let spans = vec![span(0..70), span(70..75)];
        let q = draw.numbers(rows * q_width);
        let (k, v) = (draw.numbers(rows * kv_width), draw.numbers(rows * kv_width));
        let dout = draw.numbers(rows * q_width);
        let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; rows * SHAPE.heads]);
        let (wq, wk, wv) = (wide(&q), wide(&k), wide(&v));
        EXACT().attention(SHAPE, &wq, &wk, &wv, &spans, &mut out, Some(&mut lse));
        let (fq, fk, fv) = (working(&ops, &q), working(&ops, &k), working(&ops, &v));
        let mut fast_out = working(&ops, &q);
        let mut fast_lse = exact(&ops, &vec![9.0; lse.len()]);
        let fast_spans = ops.spans(spans.clone());
        ops.attention(
            SHAPE,
            fq.all(),
            fk.all(),
            fv.all(),
            &fast_spans,
            fast_out.all_mut(),
            Some(fast_lse.all_mut()),
        );
        draw.close("out", &read(&ops, fast_out.all()), &out);
        draw.close("lse", &read(&ops, fast_lse.all()), &lse);

        let (mut dq, mut dk, mut dv) = (wide(&q), wide(&k), wide(&v));
        let saved = AttentionSaved {
            q: wq.as_slice(),
            k: &wk,
            v: &wv,
            out: &out,
            lse: &lse,
        };
        let grads = AttentionGrads {
            dq: dq.as_mut_slice(),
            dk: &mut dk,
            dv: &mut dv,
        };
        EXACT().attention_backward(SHAPE, saved, &spans, &wide(&dout), grads);
        let (mut fast_dq, mut fast_dk, mut fast_dv) =
            (working(&ops, &q), working(&ops, &k), working(&ops, &v));
        let saved = AttentionSaved {
            q: fq.all(),
            k: fk.all(),
            v: fv.all(),
            out: fast_out.all(),
            lse: fast_lse.all(),
        };
        let grads = AttentionGrads {
            dq: fast_dq.all_mut(),
            dk: fast_dk.all_mut(),
            dv: fast_dv.all_mut(),
        };
        let dout = working(&ops, &dout);
        ops.attention_backward(SHAPE, saved, &fast_spans, dout.all(), grads);
        // In 16 bits the output that is subtracted from each score's gradient is rounded, which cancels less.
        let bound = match draw.element {
            Element::F32 => 1e-4,
            _ => 0.05,
        };
        draw.within(bound, "dq", &read(&ops, fast_dq.all()), &dq);
        draw.within(bound, "dk", &read(&ops, fast_dk.all()), &dk);
        draw.within(bound, "dv", &read(&ops, fast_dv.all()), &dv);
    });
}

/// Greedy draws are the highest logits, random ones as frequent as they are likely, and a row that is not finite is said to be so.
fn draws_follow_their_probabilities(open: Open<'_>) {
    let ops = open(Element::F32);
    let (rows, vocab) = (400, 40);
    let row: Vec<f32> = (0..vocab).map(|i| [0.0, 1.0, 2.0, -9.0][i % 4]).collect();
    let mut logits = row.repeat(rows);
    logits[vocab + 5] = f32::NAN;
    let random = |counter: usize| TokenDraw {
        temperature: 1.0,
        top_p: 1.0,
        seed: 9,
        counter: counter as u64,
        ..TokenDraw::default()
    };
    let mut draws: Vec<TokenDraw> = (0..rows).map(random).collect();
    draws[0].temperature = 0.0;
    let tokens = ops.draw(exact(&ops, &logits).all(), &draws);
    let tokens = tokens.expect("a device draws");
    assert_eq!((tokens[0], tokens[1]), (Some(2), None));
    let likeliest = tokens.iter().flatten().filter(|token| *token % 4 == 2);
    let expected = 1.0 / (1.0 + (-1.0f64).exp() + (-2.0f64).exp());
    let share = likeliest.count() as f64 / rows as f64;
    assert!((share - expected).abs() < 0.1, "{share}, not {expected}");
}

fn loss_and_optimizer_equal_the_reference(open: Open<'_>) {
    each(open, |ops, draw| {
        let (rows, vocab) = (5, 70);
        let logits: Vec<f32> = draw.numbers(rows * vocab).iter().map(|x| 8.0 * x).collect();
        let labels = [0, 69, 3, 33, 7];
        let (mut gradient, mut judged) = (vec![0.0; logits.len()], vec![0.0; 2 * rows]);
        let weights = [0.25, 1.0, -2.0, 0.0, 0.125];
        EXACT().cross_entropy(
            &wide(&logits),
            &labels,
            &wide(&weights),
            &mut gradient,
            &mut judged,
        );
        let mut fast = working(&ops, &logits);
        let mut fast_judged = exact(&ops, &vec![9.0; 2 * rows]);
        ops.cross_entropy(
            exact(&ops, &logits).all(),
            ops.ids(&labels),
            exact(&ops, &weights).all(),
            fast.all_mut(),
            fast_judged.all_mut(),
        );
        draw.close("gradient", &read(&ops, fast.all()), &gradient);
        draw.within(1e-5, "judged", &read(&ops, fast_judged.all()), &judged);

        let numbers = draw.numbers(9001);
        let found = ops.sum_of_squares(exact(&ops, &numbers).all());
        let sum = EXACT().sum_of_squares(&wide(&numbers));
        assert!((found / sum - 1.0).abs() < 1e-12, "{found}, not {sum}");

        let step = AdamWStep {
            scale: 0.5,
            keep1: 0.9,
            keep2: 0.99,
            root: 0.3,
            epsilon: 1e-8,
            shrink: 0.999,
            size: 0.01,
        };
        let grads = draw.numbers(1000);
        let mut state = [
            draw.numbers(1000),
            draw.numbers(1000),
            draw.numbers(1000).iter().map(|x| x.abs()).collect(),
        ];
        let mut there = state.each_ref().map(|numbers| exact(&ops, numbers));
        let [params, mean, square] = &mut state;
        let mut plain = [wide(params), wide(mean), wide(square)];
        let [p, m, v] = &mut plain;
        EXACT().adamw(&step, p, &wide(&grads), m, v);
        let [p, m, v] = &mut there;
        let grads = exact(&ops, &grads);
        ops.adamw(&step, p.all_mut(), grads.all(), m.all_mut(), v.all_mut());
        for (there, plain) in there.iter().zip(&plain) {
            draw.within(1e-5, "adamw", &read(&ops, there.all()), plain);
        }
    });
}
