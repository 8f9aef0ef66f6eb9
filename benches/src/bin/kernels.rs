//! How close the CPU operations come to what this machine can do: each number beside the ceiling measured in the same run, and beside candle's matmul.
//!
//! Shapes are SmolLM2-135M's. `--quick` leaves the largest ones out. Run on an idle machine: threads share the ceilings with whoever else is there.

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use espalier_adapters::ops::{
    AttentionGrads, AttentionSaved, AttentionShape, AttentionSpan, Buffer, Cpu, KvRows, Ops,
};
use espalier_benches::ceilings::{Ceilings, Probe};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Seconds of the fastest of several runs, at least a fifth of a second altogether.
fn fastest(mut run: impl FnMut()) -> f64 {
    run();
    let (start, mut best, mut runs) = (Instant::now(), f64::MAX, 0);
    while runs < 3 || start.elapsed() < Duration::from_millis(200) {
        let one = Instant::now();
        run();
        best = best.min(one.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

fn random(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// One line: the rate, and its share of the tighter ceiling.
fn line(ceilings: &Ceilings, what: &str, flops: f64, bytes: f64, seconds: f64, rival: Option<f64>) {
    let bound = (flops / ceilings.f32).max(bytes / ceilings.bytes);
    let rival = rival.map_or(String::new(), |rival| {
        format!("  candle {:9.3} ms, {:5.2} x", rival * 1e3, rival / seconds)
    });
    println!(
        "{what:44} {:9.3} ms {:7.1} GFLOP/s {:6.1} GB/s  {:4.0} % of the ceiling{rival}",
        seconds * 1e3,
        flops / seconds * 1e-9,
        bytes / seconds * 1e-9,
        100.0 * bound / seconds
    );
}

/// Weights in turn, so that small ones come from memory as they do in a model and not from a cache.
const COLD_BYTES: usize = 96 << 20;

fn matmul(cpu: &Cpu, ceilings: &Ceilings, outputs: usize, inputs: usize, rows: &[usize]) {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let weight = random(&mut rng, outputs * inputs);
    let bytes = 4 * outputs * inputs;
    let copies: Vec<_> = (0..(COLD_BYTES / bytes).max(1))
        .map(|_| cpu.pack(&weight, outputs, inputs))
        .collect();
    let rival: Vec<_> = (0..copies.len())
        .filter_map(|_| Tensor::from_slice(&weight, (outputs, inputs), &Device::Cpu).ok())
        .collect();
    for &rows in rows {
        let (x, dy) = (
            random(&mut rng, rows * inputs),
            random(&mut rng, rows * outputs),
        );
        let (mut y, mut dx) = (vec![0.0; rows * outputs], vec![0.0; rows * inputs]);
        let flops = 2.0 * (rows * inputs * outputs) as f64;
        let moved = (bytes + 4 * rows * (inputs + outputs)) as f64;
        let mut turn = 0;
        let mut next = || {
            turn += 1;
            turn % copies.len()
        };
        let forward = fastest(|| cpu.matmul(&x, &copies[next()], &mut y));
        let backward = fastest(|| cpu.matmul_backward(&dy, &copies[next()], &mut dx));
        let theirs = Tensor::from_slice(&x, (rows, inputs), &Device::Cpu).map(|x| {
            fastest(|| {
                let product = rival[next()].t().and_then(|weight| x.matmul(&weight));
                black_box(product.is_ok());
            })
        });
        let name = format!("[{outputs}, {inputs}] x {rows}");
        line(ceilings, &name, flops, moved, forward, theirs.ok());
        line(
            ceilings,
            &format!("{name} backward"),
            flops,
            moved,
            backward,
            None,
        );
    }
}

fn thin(cpu: &Cpu, ceilings: &Ceilings, rows: usize) {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let (rank, width) = (16, 1536);
    let copies = if rows < 16 {
        COLD_BYTES / (4 * rank * width)
    } else {
        1
    };
    let factors: Vec<_> = (0..copies)
        .map(|_| random(&mut rng, rank * width))
        .collect();
    let (x, mut h) = (
        random(&mut rng, rows * width),
        random(&mut rng, rows * rank),
    );
    let (mut y, mut dw) = (vec![0.0; rows * width], vec![0.0; rank * width]);
    let flops = 2.0 * (rows * rank * width) as f64;
    let moved = (4 * (rank * width + rows * width)) as f64;
    let mut turn = 0;
    let mut next = || {
        turn += 1;
        turn % factors.len()
    };
    let shrink = fastest(|| cpu.shrink(&x, &factors[next()], rank, &mut h));
    let expand = fastest(|| cpu.expand(&h, &factors[next()], rank, 1e-6, &mut y));
    let outer = fastest(|| cpu.outer(&h, &x, rank, 1e-6, &mut dw));
    for (name, seconds) in [("shrink", shrink), ("expand", expand), ("outer", outer)] {
        let name = format!("{name} rank {rank}, {width} x {rows}");
        line(ceilings, &name, flops, moved, seconds, None);
    }
}

fn attention(cpu: &Cpu, ceilings: &Ceilings, length: usize, decode: bool) {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let shape = AttentionShape {
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        window: None,
    };
    let sequences = 8;
    let rows = if decode {
        sequences
    } else {
        sequences * length
    };
    let per_sequence = rows / sequences;
    let q = random(&mut rng, rows * shape.q_width());
    let k = random(&mut rng, sequences * length * shape.kv_width());
    let v = random(&mut rng, sequences * length * shape.kv_width());
    let spans: Vec<_> = (0..sequences)
        .map(|s| AttentionSpan {
            rows: s * per_sequence..(s + 1) * per_sequence,
            start: length - per_sequence,
            kv: KvRows::Flat { first: s * length },
        })
        .collect();
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; rows * shape.heads]);
    let pairs = if decode {
        length
    } else {
        length * (length + 1) / 2
    } * sequences;
    let flops = 4.0 * (pairs * shape.q_width()) as f64;
    let moved = 4.0 * (2 * k.len() + 2 * q.len()) as f64;
    let seconds = fastest(|| {
        cpu.attention(shape, &q, &k, &v, &spans, &mut out, Some(&mut lse));
    });
    let name = format!("attention {sequences} x {per_sequence} rows at {length}");
    line(ceilings, &name, flops, moved, seconds, None);
    if decode {
        return;
    }
    let dout = random(&mut rng, q.len());
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    let seconds = fastest(|| {
        let saved = AttentionSaved {
            q: q.all(),
            k: k.all(),
            v: v.all(),
            out: out.all(),
            lse: lse.all(),
        };
        let grads = AttentionGrads {
            dq: dq.all_mut(),
            dk: dk.all_mut(),
            dv: dv.all_mut(),
        };
        cpu.attention_backward(shape, saved, &spans, &dout, grads);
    });
    line(
        ceilings,
        &format!("{name} backward"),
        2.5 * flops,
        moved,
        seconds,
        None,
    );
}

fn rows(cpu: &Cpu, ceilings: &Ceilings, rows: usize) {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let (hidden, inner) = (576, 1536);
    let x = random(&mut rng, rows * inner);
    let (mut up, mut y) = (x.clone(), x.clone());
    let weight = random(&mut rng, hidden);
    let narrow = rows * hidden;
    let norm = fastest(|| cpu.rms_norm(&x[..narrow], &weight, 1e-5, &mut y[..narrow]));
    let bytes = |n: usize| (4 * n) as f64;
    line(
        ceilings,
        &format!("rms_norm {hidden} x {rows}"),
        0.0,
        bytes(2 * narrow),
        norm,
        None,
    );
    let swiglu = fastest(|| cpu.swiglu(&x, &up, &mut y));
    line(
        ceilings,
        &format!("swiglu {inner} x {rows}"),
        0.0,
        bytes(3 * x.len()),
        swiglu,
        None,
    );
    let back = fastest(|| cpu.swiglu_backward(&mut y, &mut up, &x));
    line(
        ceilings,
        &format!("swiglu_backward {inner} x {rows}"),
        0.0,
        bytes(5 * x.len()),
        back,
        None,
    );
    let vocab = 49152;
    let labels: Vec<u32> = (0..rows.min(64) as u32).collect();
    let logits = random(&mut rng, labels.len() * vocab);
    let (mut gradient, mut judged) = (logits.clone(), vec![0.0; 2 * labels.len()]);
    let weights = vec![1.0; labels.len()];
    let loss =
        fastest(|| cpu.cross_entropy(&logits, &labels, &weights, &mut gradient, &mut judged));
    let name = format!("cross_entropy {vocab} x {}", labels.len());
    line(ceilings, &name, 0.0, bytes(2 * logits.len()), loss, None);
}

fn report(quick: bool) {
    let cpu = Cpu::default();
    let ceilings = Probe::new().measure();
    println!("{ceilings}");
    let all: &[usize] = if quick {
        &[1, 8, 128]
    } else {
        &[1, 8, 16, 32, 128, 512, 1024]
    };
    for (outputs, inputs) in [(576, 576), (192, 576), (1536, 576), (576, 1536)] {
        matmul(&cpu, &ceilings, outputs, inputs, all);
    }
    matmul(
        &cpu,
        &ceilings,
        49152,
        576,
        if quick { &[1, 8] } else { &[1, 8, 16, 32, 128] },
    );
    for rows in [1, 8, 128, 1024] {
        thin(&cpu, &ceilings, rows);
    }
    for length in [128, 1024] {
        attention(&cpu, &ceilings, length, false);
        attention(&cpu, &ceilings, length, true);
    }
    rows(&cpu, &ceilings, 8);
    rows(&cpu, &ceilings, 1024);
}

fn main() {
    report(std::env::args().any(|arg| arg == "--quick"));
}
