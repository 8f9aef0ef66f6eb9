//! Every backward operation against finite differences in f64, and the row rule bit for bit.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::ops::KvRows;

const OPS: Reference<f64> = Reference(PhantomData);

fn random(seed: u64, len: usize) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|v| *v as f32).collect()
}

/// Compares `gradient` with the slope of `f . weights` in every coordinate of `x`, to 1e-6 relative.
fn check(name: &str, x: &[f64], gradient: &[f64], mut f: impl FnMut(&[f64]) -> Vec<f64>) {
    assert_eq!(x.len(), gradient.len(), "{name}");
    assert!(
        gradient.iter().any(|g| g.abs() > 1e-3),
        "{name}: a gradient of zeros proves nothing"
    );
    let scale = gradient.iter().fold(0.0f64, |a, g| a.max(g.abs()));
    let mut x = x.to_vec();
    let h = 1e-5;
    for index in 0..x.len() {
        let at = x[index];
        let mut value = |x: &mut Vec<f64>, offset: f64| {
            x[index] = at + offset;
            f(x).iter()
                .zip(upstream(1 << 10))
                .map(|(y, w)| y * w)
                .sum::<f64>()
        };
        // Fourth order: the error of the formula is far below the tolerance.
        let near = value(&mut x, h) - value(&mut x, -h);
        let far = value(&mut x, 2.0 * h) - value(&mut x, -2.0 * h);
        x[index] = at;
        let slope = (8.0 * near - far) / (12.0 * h);
        assert!(
            (slope - gradient[index]).abs() <= 1e-6 * scale,
            "{name}[{index}]: {slope}, not {}",
            gradient[index]
        );
    }
}

/// The gradient of `f . weights` with respect to `f`.
fn upstream(len: usize) -> Vec<f64> {
    let mut all = random(99, 1 << 16);
    all.truncate(len);
    all
}

#[test]
fn products() {
    let (rows, inputs, outputs, rank) = (3, 5, 40, 2);
    let weight = OPS.pack(&narrow(&random(1, outputs * inputs)), outputs, inputs);
    let x = random(2, rows * inputs);
    let dy = upstream(rows * outputs);
    let mut dx = vec![0.0; x.len()];
    OPS.matmul_backward(&dy, &weight, &mut dx);
    check("matmul dx", &x, &dx, |x| {
        let mut y = vec![0.0; dy.len()];
        OPS.matmul(x, &weight, &mut y);
        y
    });
    let (a, bt, scale) = (random(3, rank * inputs), random(4, rank * outputs), 1.7);
    let delta = |x: &[f64], a: &[f64], bt: &[f64]| {
        let (mut h, mut y) = (vec![0.0; rows * rank], vec![0.0; rows * outputs]);
        OPS.shrink(x, a, rank, &mut h);
        OPS.expand(&h, bt, rank, scale, &mut y);
        y
    };
    let (mut h, mut dh) = (vec![0.0; rows * rank], vec![0.0; rows * rank]);
    let (mut dx, mut da, mut dbt) = (vec![0.0; x.len()], vec![0.0; a.len()], vec![0.0; bt.len()]);
    OPS.shrink(&x, &a, rank, &mut h);
    OPS.shrink(&dy, &bt, rank, &mut dh);
    OPS.expand(&dh, &a, rank, scale, &mut dx);
    OPS.outer(&dh, &x, rank, scale, &mut da);
    OPS.outer(&h, &dy, rank, scale, &mut dbt);
    check("lora dx", &x, &dx, |x| delta(x, &a, &bt));
    check("lora da", &a, &da, |a| delta(&x, a, &bt));
    check("lora db", &bt, &dbt, |bt| delta(&x, &a, bt));
}

#[test]
fn norm_rope_swiglu() {
    let (rows, width) = (4, 6);
    let (x, weight, dy) = (
        random(1, rows * width),
        random(2, width),
        upstream(rows * width),
    );
    let mut dx = vec![0.0; x.len()];
    OPS.rms_norm_backward(&x, &weight, 1e-5, &dy, &mut dx);
    check("rms_norm", &x, &dx, |x| {
        let mut y = vec![0.0; x.len()];
        OPS.rms_norm(x, &weight, 1e-5, &mut y);
        y
    });
    let angles = random(3, rows * 2);
    let cos: Vec<f64> = angles.iter().map(|a| a.cos()).collect();
    let sin: Vec<f64> = angles.iter().map(|a| a.sin()).collect();
    let (x, mut dx) = (random(4, rows * 12), upstream(rows * 12));
    OPS.rope(&mut dx, 4, &cos, &sin, true);
    check("rope", &x, &dx, |x| {
        let mut y = x.to_vec();
        OPS.rope(&mut y, 4, &cos, &sin, false);
        y
    });
    let (gate, up, dy) = (random(5, 20), random(6, 20), upstream(20));
    let swiglu = |gate: &[f64], up: &[f64]| {
        let mut y = vec![0.0; gate.len()];
        OPS.swiglu(gate, up, &mut y);
        y
    };
    let (mut dgate, mut dup) = (gate.clone(), up.clone());
    OPS.swiglu_backward(&mut dgate, &mut dup, &dy);
    check("swiglu gate", &gate, &dgate, |gate| swiglu(gate, &up));
    check("swiglu up", &up, &dup, |up| swiglu(&gate, up));
}

#[test]
fn cross_entropy() {
    let (logits, labels) = (random(1, 3 * 7), [2u32, 0, 6]);
    let upstream = upstream(3);
    let mut gradient = vec![0.0; logits.len()];
    OPS.cross_entropy(&logits, &labels, &upstream, &mut gradient, &mut [0.0; 6]);
    check("cross_entropy", &logits, &gradient, |logits| {
        let (mut gradient, mut judged) = (vec![0.0; logits.len()], vec![0.0; 6]);
        OPS.cross_entropy(logits, &labels, &[1.0; 3], &mut gradient, &mut judged);
        judged.into_iter().step_by(2).collect()
    });
}

fn shape(window: Option<usize>) -> AttentionShape {
    AttentionShape {
        heads: 4,
        kv_heads: 2,
        head_dim: 4,
        window,
    }
}

/// Two sequences of 5 and 3 rows, the first one cut after 2.
fn spans() -> Vec<AttentionSpan<'static>> {
    let (first, second) = (KvRows::Flat { first: 0 }, KvRows::Flat { first: 5 });
    vec![
        AttentionSpan {
            rows: 0..2,
            start: 0,
            kv: first,
        },
        AttentionSpan {
            rows: 2..5,
            start: 2,
            kv: first,
        },
        AttentionSpan {
            rows: 5..8,
            start: 0,
            kv: second,
        },
    ]
}

#[test]
fn attention() {
    for window in [None, Some(2)] {
        let (shape, spans) = (shape(window), spans());
        let (q, k, v) = (random(1, 8 * 16), random(2, 8 * 8), random(3, 8 * 8));
        let forward = |q: &[f64], k: &[f64], v: &[f64]| {
            let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; 8 * 4]);
            OPS.attention(shape, q, k, v, &spans, &mut out, Some(&mut lse));
            (out, lse)
        };
        let (out, lse) = forward(&q, &k, &v);
        let dout = upstream(out.len());
        let (mut dq, mut dk, mut dv) = (vec![9.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        let saved = AttentionSaved {
            q: q.as_slice(),
            k: &k,
            v: &v,
            out: &out,
            lse: &lse,
        };
        let grads = AttentionGrads {
            dq: dq.as_mut_slice(),
            dk: &mut dk,
            dv: &mut dv,
        };
        OPS.attention_backward(shape, saved, &spans, &dout, grads);
        check("attention dq", &q, &dq, |q| forward(q, &k, &v).0);
        check("attention dk", &k, &dk, |k| forward(&q, k, &v).0);
        check("attention dv", &v, &dv, |v| forward(&q, &k, v).0);
    }
}

#[test]
fn paged_is_flat() {
    let shape = shape(Some(3));
    let (q, k, v) = (random(1, 5 * 16), random(2, 5 * 8), random(3, 5 * 8));
    let table = [2, 0, 1];
    let (mut paged_k, mut paged_v) = (vec![f64::NAN; 6 * 8], vec![f64::NAN; 6 * 8]);
    let place = KvRows::Paged {
        table: &table,
        block_size: 2,
    };
    let rows: Vec<u32> = (0..5).map(|position| place.row(position) as u32).collect();
    OPS.store_keys(&k, 4, &rows, 2, &mut paged_k);
    OPS.store_values(&v, 4, &rows, 2, &mut paged_v);
    for (position, element) in (0..5).flat_map(|position| (0..8).map(move |d| (position, d))) {
        let (head, d) = (element / 4, element % 4);
        let stored = paged_k[place.key(shape, position, head, d)];
        assert_eq!(stored, k[position * 8 + element]);
        let stored = paged_v[place.value(shape, position, head) + d];
        assert_eq!(stored, v[position * 8 + element]);
    }
    let (mut flat, mut paged) = (vec![0.0; q.len()], vec![0.0; q.len()]);
    let span = |kv| {
        vec![AttentionSpan {
            rows: 0..5,
            start: 0,
            kv,
        }]
    };
    OPS.attention(
        shape,
        &q,
        &k,
        &v,
        &span(KvRows::Flat { first: 0 }),
        &mut flat,
        None,
    );
    OPS.attention(
        shape,
        &q,
        &paged_k,
        &paged_v,
        &span(place),
        &mut paged,
        None,
    );
    assert_eq!(flat, paged);
}
