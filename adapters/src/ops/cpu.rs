//! The fast operations of a CPU: f32, vectors where the machine has them, both the row rule and equal bits on every path.
//!
//! This file only joins the parts to the trait. `cpu_tile` is the inner loop of every product, `cpu_lanes` sixteen numbers at a time; `cpu_matrix` holds the
//! packed base weights (`cpu_matmul` those of plain numbers, `cpu_blocks` those in blocks), `cpu_thin` the low-rank factors, `cpu_low_rank` a step's updates
//! by many adapters at once, `cpu_attention` and its backward the attention, `cpu_keys` what it reads, `cpu_rows` and
//! `cpu_softmax` what looks at one row at a time.

use std::ops::Range;

use super::cpu_matrix::Matrix;
use super::cpu_tile::Isa;
use super::host::host_memory;
use super::{
    AttentionGrads, AttentionSaved, AttentionShape, AttentionSpan, Ops, Weight, WeightKind,
};
use super::{
    cpu_attention, cpu_attention_backward, cpu_keys, cpu_low_rank, cpu_peak, cpu_rows, cpu_softmax,
    cpu_thin,
};

/// Operations in f32 on this machine's CPU.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    isa: Isa,
}

impl Default for Cpu {
    fn default() -> Self {
        Cpu {
            isa: Isa::detected(),
        }
    }
}

impl Cpu {
    /// One `Cpu` for each instruction set that this machine can run, best first: they all give the same bits.
    pub fn every_path() -> Vec<Self> {
        Isa::available()
            .into_iter()
            .map(|isa| Cpu { isa })
            .collect()
    }

    /// Multiply-adds in f32 on this thread's registers alone, for benchmarks: how many operations `rounds` rounds were.
    pub fn burn_f32(&self, rounds: usize) -> usize {
        cpu_peak::burn_f32(self.isa, rounds)
    }

    /// The same for products of bytes added in 32 bits; zero where the machine has no instruction for them.
    pub fn burn_i8(&self, rounds: usize) -> usize {
        cpu_peak::burn_i8(self.isa, rounds)
    }

    /// What the inner loops use, for logs and benchmarks.
    pub fn path(&self) -> &'static str {
        match self.isa {
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Portable => "portable",
        }
    }
}

impl Ops for Cpu {
    type Matrix = Matrix;
    host_memory!(f32);

    fn pack(&self, weight: &[f32], outputs: usize, inputs: usize) -> Matrix {
        Matrix::pack_f32(weight, outputs, inputs)
    }

    fn pack_weight(&self, weight: &Weight, outputs: usize, inputs: usize) -> Matrix {
        Matrix::pack(weight, outputs, inputs)
    }

    fn kind(&self, weight: &Matrix) -> WeightKind {
        weight.kind()
    }

    fn dims(&self, weight: &Matrix) -> (usize, usize) {
        weight.dims()
    }

    fn bytes(&self, weight: &Matrix) -> usize {
        weight.bytes()
    }

    fn gather(&self, weight: &Matrix, ids: &[u32], out: &mut [f32]) {
        weight.gather(ids, out);
    }

    fn matmul_part(&self, x: &[f32], weight: &Matrix, outputs: Range<usize>, y: &mut [f32]) {
        weight.matmul(self.isa, x, outputs, y);
    }

    fn matmul_backward_part(
        &self,
        dy: &[f32],
        weight: &Matrix,
        outputs: Range<usize>,
        dx: &mut [f32],
    ) {
        weight.backward(self.isa, dy, outputs, dx);
    }

    fn shrink(&self, x: &[f32], a: &[f32], rank: usize, h: &mut [f32]) {
        cpu_thin::shrink(self.isa, x, a, rank, h);
    }

    fn expand(&self, h: &[f32], bt: &[f32], rank: usize, scale: f32, y: &mut [f32]) {
        cpu_thin::expand(self.isa, h, bt, rank, scale, y);
    }

    fn outer(&self, h: &[f32], x: &[f32], rank: usize, scale: f32, dw: &mut [f32]) {
        cpu_thin::outer(self.isa, h, x, rank, scale, dw);
    }

    fn low_rank(
        &self,
        x: &[f32],
        updates: &Self::Updates<'_>,
        list: usize,
        mut outputs: Vec<&mut [f32]>,
    ) {
        cpu_low_rank::low_rank(self.isa, x, &updates[list], &mut outputs);
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f64, y: &mut [f32]) {
        cpu_rows::rms_norm(self.isa, x, weight, eps, y);
    }

    fn rms_norm_backward(&self, x: &[f32], weight: &[f32], eps: f64, dy: &[f32], dx: &mut [f32]) {
        cpu_rows::rms_norm_backward(self.isa, x, weight, eps, dy, dx);
    }

    fn rope(&self, x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], inverse: bool) {
        cpu_rows::rope(self.isa, x, head_dim, cos, sin, inverse);
    }

    fn swiglu(&self, gate: &[f32], up: &[f32], y: &mut [f32]) {
        cpu_rows::swiglu(self.isa, gate, up, y);
    }

    fn swiglu_backward(&self, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        cpu_rows::swiglu_backward(self.isa, gate, up, dy);
    }

    fn store_keys(&self, from: &[f32], _: usize, rows: &[u32], block_size: usize, k: &mut [f32]) {
        cpu_keys::store_keys(self.isa, from, rows, block_size, k);
    }

    fn attention(
        &self,
        shape: AttentionShape,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        spans: &Vec<AttentionSpan<'_>>,
        out: &mut [f32],
        lse: Option<&mut [f32]>,
    ) {
        cpu_attention::attention(self.isa, shape, q, k, v, spans, out, lse);
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        saved: AttentionSaved<&[f32]>,
        spans: &Vec<AttentionSpan<'_>>,
        dout: &[f32],
        grads: AttentionGrads<&mut [f32]>,
    ) {
        cpu_attention_backward::attention_backward(self.isa, shape, saved, spans, dout, grads);
    }

    fn add(&self, x: &[f32], y: &mut [f32]) {
        cpu_rows::add(x, y);
    }

    fn cross_entropy(
        &self,
        logits: &[f32],
        labels: &[u32],
        weights: &[f32],
        gradient: &mut [f32],
        judged: &mut [f32],
    ) {
        cpu_softmax::cross_entropy(self.isa, logits, labels, weights, gradient, judged);
    }
}
