//! Proofs of the fast attention: it equals the reference, does not see how rows, blocks or threads are cut, and gives the same bits everywhere.

use std::ops::Range;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::cpu_tests::{assert_close, assert_same_bits, everywhere, random, wide};
use super::{
    AttentionGrads, AttentionSaved, AttentionShape, AttentionSpan, Cpu, KvRows, Ops, Reference,
};

/// One attention problem: two sequences in one set of key rows, flat and paged.
struct Problem {
    shape: AttentionShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// Rows and first positions of the two sequences' queries.
const FIRST: (usize, usize) = (45, 0);
const SECOND: (usize, usize) = (9, 61);
const KV_ROWS: usize = 45 + 70;

impl Problem {
    fn new(heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(13);
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim,
            window,
        };
        let rows = FIRST.0 + SECOND.0;
        let mut q = random(&mut rng, rows * shape.q_width());
        q.iter_mut().for_each(|q| *q *= 4.0);
        Problem {
            shape,
            q,
            k: random(&mut rng, KV_ROWS * shape.kv_width()),
            v: random(&mut rng, KV_ROWS * shape.kv_width()),
        }
    }

    fn all() -> Vec<Self> {
        vec![
            Problem::new(4, 2, 16, None),
            Problem::new(6, 2, 20, Some(11)),
            Problem::new(3, 3, 40, Some(64)),
            Problem::new(2, 1, 8, None),
        ]
    }

    fn rows(&self) -> usize {
        FIRST.0 + SECOND.0
    }

    /// The spans cut after `cut` rows of each sequence.
    fn spans(&self, cut: usize) -> Vec<AttentionSpan<'static>> {
        let mut spans = Vec::new();
        for (rows, start, first) in [
            (0..FIRST.0, FIRST.1, 0),
            (FIRST.0..self.rows(), SECOND.1, FIRST.0),
        ] {
            for at in rows.clone().step_by(cut) {
                spans.push(AttentionSpan {
                    rows: at..rows.end.min(at + cut),
                    start: start + at - rows.start,
                    kv: KvRows::Flat { first },
                });
            }
        }
        spans
    }

    fn forward(&self, cpu: Cpu, spans: &Vec<AttentionSpan<'_>>, k: &[f32], v: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; self.q.len()];
        let mut lse = vec![0.0; self.rows() * self.shape.heads];
        cpu.attention(self.shape, &self.q, k, v, spans, &mut out, Some(&mut lse));
        out.extend(lse);
        out
    }

    fn backward(&self, cpu: Cpu, spans: &Vec<AttentionSpan<'_>>, dout: &[f32]) -> Vec<f32> {
        let forward = self.forward(cpu, spans, &self.k, &self.v);
        let (out, lse) = forward.split_at(self.q.len());
        let saved = AttentionSaved {
            q: self.q.as_slice(),
            k: &self.k,
            v: &self.v,
            out,
            lse,
        };
        let mut dq = vec![f32::NAN; self.q.len()];
        let (mut dk, mut dv) = (vec![0.5; self.k.len()], vec![0.25; self.v.len()]);
        let grads = AttentionGrads {
            dq: dq.as_mut_slice(),
            dk: &mut dk,
            dv: &mut dv,
        };
        cpu.attention_backward(self.shape, saved, spans, dout, grads);
        [dq, dk, dv].concat()
    }
}

#[test]
fn attention_equals_the_reference() {
    for problem in Problem::all() {
        let spans = problem.spans(1000);
        let fast = problem.forward(Cpu::default(), &spans, &problem.k, &problem.v);
        let exact = Reference::<f64>::default();
        let (q, k, v) = (wide(&problem.q), wide(&problem.k), wide(&problem.v));
        let mut out = vec![0.0; q.len()];
        let mut lse = vec![0.0; problem.rows() * problem.shape.heads];
        exact.attention(problem.shape, &q, &k, &v, &spans, &mut out, Some(&mut lse));
        assert_close("out", &fast[..q.len()], &out);
        assert_close("lse", &fast[q.len()..], &lse);

        let mut rng = ChaCha8Rng::seed_from_u64(14);
        let dout = random(&mut rng, q.len());
        let fast = problem.backward(Cpu::default(), &spans, &dout);
        let saved = AttentionSaved {
            q: q.as_slice(),
            k: &k,
            v: &v,
            out: &out,
            lse: &lse,
        };
        let mut dq = vec![0.0; q.len()];
        let (mut dk, mut dv) = (vec![0.5; k.len()], vec![0.25; v.len()]);
        let grads = AttentionGrads {
            dq: dq.as_mut_slice(),
            dk: &mut dk,
            dv: &mut dv,
        };
        exact.attention_backward(problem.shape, saved, &spans, &wide(&dout), grads);
        let (fast_q, fast_kv) = fast.split_at(q.len());
        assert_close("dq", fast_q, &dq);
        assert_close("dk", &fast_kv[..k.len()], &dk);
        assert_close("dv", &fast_kv[k.len()..], &dv);
    }
}

#[test]
fn attention_does_not_see_how_rows_are_cut() {
    let mut rng = ChaCha8Rng::seed_from_u64(15);
    for problem in Problem::all() {
        let whole = problem.forward(Cpu::default(), &problem.spans(1000), &problem.k, &problem.v);
        let dout = random(&mut rng, problem.q.len());
        let grads = problem.backward(Cpu::default(), &problem.spans(1000), &dout);
        for cut in [1, 2, 7, 33] {
            let spans = problem.spans(cut);
            let parts = problem.forward(Cpu::default(), &spans, &problem.k, &problem.v);
            assert_same_bits("forward", &parts, &whole);
            let parts = problem.backward(Cpu::default(), &spans, &dout);
            assert_same_bits("backward", &parts, &grads);
        }
    }
}

/// Moves flat rows of keys and values into blocks of `size`, as `table` says.
fn paged(
    problem: &Problem,
    rows: Range<usize>,
    size: usize,
    table: &[u32],
) -> (Vec<f32>, Vec<f32>) {
    let width = problem.shape.kv_width();
    let mut k = vec![f32::MAX; (KV_ROWS * 2).next_multiple_of(size) * width];
    let mut v = k.clone();
    let kv = KvRows::Paged {
        table,
        block_size: size,
    };
    let places: Vec<u32> = (0..rows.len())
        .map(|position| kv.row(position) as u32)
        .collect();
    let from = &problem.v[rows.start * width..rows.end * width];
    Cpu::default().store_values(from, problem.shape.head_dim, &places, size, &mut v);
    let from = &problem.k[rows.start * width..rows.end * width];
    // As a prompt in chunks does: runs that begin and end anywhere.
    let (first, rest) = places.split_at(21);
    let head_dim = problem.shape.head_dim;
    Cpu::default().store_keys(&from[..21 * width], head_dim, first, size, &mut k);
    Cpu::default().store_keys(&from[21 * width..], head_dim, rest, size, &mut k);
    (k, v)
}

#[test]
fn paged_keys_give_the_bits_of_flat_ones() {
    let tables: [(usize, &[u32]); 4] = [
        (16, &[7, 2, 3, 4, 0]),
        (32, &[3, 0, 5]),
        (48, &[2, 0]),
        (
            4,
            &[
                9, 1, 2, 17, 4, 5, 30, 7, 8, 0, 10, 11, 12, 13, 14, 15, 16, 3,
            ],
        ),
    ];
    for problem in Problem::all() {
        let flat = problem.forward(Cpu::default(), &problem.spans(1000), &problem.k, &problem.v);
        for (block_size, table) in tables {
            let (k, v) = paged(&problem, FIRST.0..KV_ROWS, block_size, table);
            let spans = vec![AttentionSpan {
                rows: FIRST.0..problem.rows(),
                start: SECOND.1,
                kv: KvRows::Paged { table, block_size },
            }];
            everywhere("paged", |cpu| problem.forward(cpu, &spans, &k, &v));
            let got = problem.forward(Cpu::default(), &spans, &k, &v);
            let part = FIRST.0 * problem.shape.q_width()..problem.q.len();
            assert_same_bits("paged", &got[part.clone()], &flat[part]);
        }
    }
}

#[test]
fn attention_is_the_same_everywhere() {
    let mut rng = ChaCha8Rng::seed_from_u64(16);
    for problem in Problem::all() {
        let dout = random(&mut rng, problem.q.len());
        everywhere("attention", |cpu| {
            problem.forward(cpu, &problem.spans(20), &problem.k, &problem.v)
        });
        everywhere("attention_backward", |cpu| {
            problem.backward(cpu, &problem.spans(1000), &dout)
        });
    }
}
