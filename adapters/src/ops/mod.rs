//! The dozen operations that a decoder with adapters is made of, forward and backward.
//!
//! Everything above is written once, generic over [`Ops`]: the plain [`Reference`] in f64 proves the derivatives by
//! finite differences, the fast CPU path serves and trains. Slices are flat and row-major, outputs belong to the
//! caller. An operation must not know what a layer, an adapter or a request is.
//!
//! **The row rule.** An output row depends only on its own input row and on the weights. Its sums run in an order
//! fixed by their length alone, never by the number of rows, by threads or by neighbours: cutting a batch elsewhere
//! changes no bit. Where an operation sums over rows ([`Ops::outer`], the key and value gradients of attention) it
//! adds them one row after the other onto what the output holds, so that cutting the rows changes no bit either.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Range, Sub, SubAssign};

mod cpu;
mod cpu_attention;
mod cpu_attention_backward;
#[cfg(test)]
mod cpu_attention_tests;
mod cpu_blocks;
mod cpu_buffer;
mod cpu_dot;
mod cpu_keys;
mod cpu_lanes;
mod cpu_low_rank;
#[cfg(test)]
mod cpu_low_rank_tests;
mod cpu_matmul;
mod cpu_matrix;
mod cpu_peak;
#[cfg(test)]
mod cpu_precision_tests;
mod cpu_rounded_rows;
mod cpu_rows;
mod cpu_softmax;
mod cpu_stored;
mod cpu_team;
#[cfg(test)]
mod cpu_tests;
mod cpu_thin;
mod cpu_tile;
mod cpu_transpose;
mod low_rank;
mod reference;
mod weight;

pub use cpu::Cpu;
pub use cpu_buffer::for_each;
pub use cpu_matrix::Matrix;
pub use cpu_team::{set_threads, threads};
pub use low_rank::{Factor, LowRank};
pub use reference::Reference;
pub use weight::{BLOCK, Blocks, Weight, WeightKind};

/// The numbers that operations work on: f32 in service, f64 in proofs.
pub trait Real:
    Copy
    + Debug
    + Default
    + PartialEq
    + PartialOrd
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + Sum
    + 'static
{
    /// Nothing.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// Below every number: what a maximum starts from.
    const LOWEST: Self;
    /// From single precision, exactly.
    fn from_f32(value: f32) -> Self;
    /// From double precision, rounded to nearest.
    fn from_f64(value: f64) -> Self;
    /// To single precision, rounded to nearest.
    fn to_f32(self) -> f32;
    /// To double precision, exactly.
    fn to_f64(self) -> f64;
    /// `self * factor + addend`, rounded once.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The square root.
    fn sqrt(self) -> Self;
    /// `e` to the power of `self`.
    fn exp(self) -> Self;
    /// The natural logarithm.
    fn ln(self) -> Self;
}

macro_rules! real {
    ($float:ident) => {
        impl Real for $float {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const LOWEST: Self = $float::NEG_INFINITY;
            fn from_f32(value: f32) -> Self {
                value as $float
            }
            fn from_f64(value: f64) -> Self {
                value as $float
            }
            fn to_f32(self) -> f32 {
                self as f32
            }
            fn to_f64(self) -> f64 {
                self as f64
            }
            fn mul_add(self, factor: Self, addend: Self) -> Self {
                $float::mul_add(self, factor, addend)
            }
            fn sqrt(self) -> Self {
                $float::sqrt(self)
            }
            fn exp(self) -> Self {
                $float::exp(self)
            }
            fn ln(self) -> Self {
                $float::ln(self)
            }
        }
    };
}

real!(f32);
real!(f64);

/// The heads of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads; a multiple of `kv_heads`. Query head `h` reads key head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Numbers in one head. Scores are scaled by `1 / sqrt(head_dim)`.
    pub head_dim: usize,
    /// With `Some(w)`, position `i` sees positions `j` with `i - w < j <= i` only.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// The first position that `position` sees.
    pub fn first_visible(&self, position: usize) -> usize {
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// The width of a row of queries.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// The width of a row of keys or values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// What scores are multiplied by.
    pub fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// The slice of a query row that is head `head`.
    pub fn q_at(&self, row: usize, head: usize) -> Range<usize> {
        let start = row * self.q_width() + head * self.head_dim;
        start..start + self.head_dim
    }

    /// The slice of a key row that query head `head` reads.
    pub fn kv_at(&self, row: usize, head: usize) -> Range<usize> {
        let start = row * self.kv_width() + head / (self.heads / self.kv_heads) * self.head_dim;
        start..start + self.head_dim
    }
}

/// Where the keys and values of one sequence lie. Flat: position `t` is a row of `[rows, kv_heads * head_dim]`. In blocks each
/// head's numbers stand together, and keys are turned, so that a vector holds one element of adjacent positions.
#[derive(Clone, Copy, Debug)]
pub enum KvRows<'a> {
    /// Position `t` is row `first + t` (training: the rows of the micro-batch themselves).
    Flat {
        /// The row of position 0.
        first: usize,
    },
    /// Position `t` is row `table[t / block_size] * block_size + t % block_size` (serving: the paged cache). The keys of a
    /// block are `[kv_heads, head_dim, block_size]`, its values `[kv_heads, block_size, head_dim]`; [`Ops::store_keys`] and
    /// [`Ops::store_values`] write them.
    Paged {
        /// The sequence's blocks in order.
        table: &'a [u32],
        /// Rows in one block.
        block_size: usize,
    },
}

impl KvRows<'_> {
    /// The row of position `position`.
    pub fn row(&self, position: usize) -> usize {
        match *self {
            KvRows::Flat { first } => first + position,
            KvRows::Paged { table, block_size } => {
                table[position / block_size] as usize * block_size + position % block_size
            }
        }
    }

    /// Where element `d` of key head `head` of a position lies.
    pub fn key(&self, shape: AttentionShape, position: usize, head: usize, d: usize) -> usize {
        let (row, first) = (self.row(position), head * shape.head_dim);
        match *self {
            KvRows::Flat { .. } => row * shape.kv_width() + first + d,
            KvRows::Paged { block_size, .. } => {
                let block = row / block_size * shape.kv_width();
                (block + first + d) * block_size + row % block_size
            }
        }
    }

    /// Where value head `head` of a position begins: `head_dim` numbers.
    pub fn value(&self, shape: AttentionShape, position: usize, head: usize) -> usize {
        let (row, first) = (self.row(position), head * shape.head_dim);
        match *self {
            KvRows::Flat { .. } => row * shape.kv_width() + first,
            KvRows::Paged { block_size, .. } => {
                let block = row / block_size * shape.kv_width();
                (block + first) * block_size + row % block_size * shape.head_dim
            }
        }
    }
}

/// Adjacent query rows of one sequence.
#[derive(Clone, Debug)]
pub struct AttentionSpan<'a> {
    /// Which rows of `q` and `out`.
    pub rows: Range<usize>,
    /// The position in its sequence of the first of them: row `rows.start + i` sees positions `..= start + i`.
    pub start: usize,
    /// Where the sequence's keys and values lie.
    pub kv: KvRows<'a>,
}

/// What the forward pass of attention read and wrote, for its backward pass. All of one micro-batch, flat.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSaved<'a, T> {
    /// Queries `[rows, heads * head_dim]`.
    pub q: &'a [T],
    /// Keys `[kv rows, kv_heads * head_dim]`.
    pub k: &'a [T],
    /// Values `[kv rows, kv_heads * head_dim]`.
    pub v: &'a [T],
    /// The output `[rows, heads * head_dim]`.
    pub out: &'a [T],
    /// The logarithm of each softmax's denominator, maximum included: `[rows, heads]`.
    pub lse: &'a [T],
}

/// Gradients of attention's inputs, shaped as these.
#[derive(Debug)]
pub struct AttentionGrads<'a, T> {
    /// Overwritten in the spans' rows.
    pub dq: &'a mut [T],
    /// Added to, query row after query row.
    pub dk: &'a mut [T],
    /// Added to, query row after query row.
    pub dv: &'a mut [T],
}

/// Operations on flat row-major slices. The number of rows is the slice's length over its row's width; zero rows are
/// allowed everywhere. Wrong lengths are programming errors and panic.
pub trait Ops: Clone + Debug + Default + Send + Sync + 'static {
    /// What activations are made of.
    type T: Real;
    /// A frozen weight `[out, in]` in the layout that this implementation likes best. The only copy of it.
    type Matrix: Debug + Send + Sync;

    /// Brings a row-major `[outputs, inputs]` weight into this implementation's layout.
    fn pack(&self, weight: &[f32], outputs: usize, inputs: usize) -> Self::Matrix;
    /// The same for a weight that keeps its format. Products with plain formats have the bits of products with the f32 weight of the same
    /// numbers; products with blocks round the rows too (to 8 bits with a scale for each 32 inputs). What is gathered, and the way back,
    /// are in f32 from what the format stands for.
    fn pack_weight(&self, weight: &Weight, outputs: usize, inputs: usize) -> Self::Matrix {
        self.pack(&weight.widened(), outputs, inputs)
    }
    /// The format that a packed weight is kept in.
    fn kind(&self, weight: &Self::Matrix) -> WeightKind;
    /// `(outputs, inputs)` of a packed weight.
    fn dims(&self, weight: &Self::Matrix) -> (usize, usize);
    /// Bytes that the packed weight occupies.
    fn bytes(&self, weight: &Self::Matrix) -> usize;
    /// Row `ids[i]` of `weight` into `out[i]`: embeddings, and weight rows for norms. `out [ids, inputs]`.
    fn gather(&self, weight: &Self::Matrix, ids: &[u32], out: &mut [Self::T]);

    /// Columns `outputs` of `y = x W^T`: `x [rows, in]`, `y [rows, out]` whole rows, of which only columns `outputs`
    /// are written. `outputs` begins at a multiple of [`PANEL`] and ends at one or at the weight's end.
    fn matmul_part(
        &self,
        x: &[Self::T],
        weight: &Self::Matrix,
        outputs: Range<usize>,
        y: &mut [Self::T],
    );
    /// `dx += dy[:, outputs] W[outputs, :]`: `dy [rows, out]` whole rows, `dx [rows, in]`; `outputs` as in
    /// [`Ops::matmul_part`]. Sums run over outputs in ascending order onto what `dx` holds.
    fn matmul_backward_part(
        &self,
        dy: &[Self::T],
        weight: &Self::Matrix,
        outputs: Range<usize>,
        dx: &mut [Self::T],
    );
    /// `y = x W^T`, every column.
    fn matmul(&self, x: &[Self::T], weight: &Self::Matrix, y: &mut [Self::T]) {
        self.matmul_part(x, weight, 0..self.dims(weight).0, y);
    }
    /// `dx += dy W`.
    fn matmul_backward(&self, dy: &[Self::T], weight: &Self::Matrix, dx: &mut [Self::T]) {
        self.matmul_backward_part(dy, weight, 0..self.dims(weight).0, dx);
    }

    /// `h = scale * x A^T`, thin: `x [rows, in]`, `a [rank, in]`, `h [rows, rank]`. Also the gradient of `h` through
    /// [`Ops::expand`].
    fn shrink(&self, x: &[Self::T], a: &[Self::T], rank: usize, scale: Self::T, h: &mut [Self::T]);
    /// `y += scale * h Bt`, thin: `h [rows, rank]`, `bt [rank, out]` (B **transposed**), `y [rows, out]`. Also the
    /// gradient of `x` through [`Ops::shrink`].
    fn expand(&self, h: &[Self::T], bt: &[Self::T], rank: usize, scale: Self::T, y: &mut [Self::T]);
    /// `dw += scale * h^T x`, row after row: `h [rows, rank]`, `x [rows, width]`, `dw [rank, width]`. Each element is
    /// `dw = (scale * h) * x + dw`, fused or not but always the same.
    fn outer(&self, h: &[Self::T], x: &[Self::T], rank: usize, scale: Self::T, dw: &mut [Self::T]);

    /// Every update of outputs that share the input `x [rows, in]`: `outputs[i]` is `[rows, out of i]`. Updates of the same
    /// rows and output stand together and are added in their order. A row's bits are those of [`Ops::shrink`] and then
    /// [`Ops::expand`] on the widened factors, whatever else is in the list.
    fn low_rank(
        &self,
        x: &[Self::T],
        updates: &[LowRank<'_, Self::T>],
        outputs: &mut [&mut [Self::T]],
    );

    /// `y = x / sqrt(mean(x^2) + eps) * weight` in rows of `weight.len()`.
    fn rms_norm(&self, x: &[Self::T], weight: &[Self::T], eps: f64, y: &mut [Self::T]);
    /// `dx += d rms_norm(x) / dx` applied to `dy`.
    fn rms_norm_backward(
        &self,
        x: &[Self::T],
        weight: &[Self::T],
        eps: f64,
        dy: &[Self::T],
        dx: &mut [Self::T],
    );

    /// Rotates each head of `x [rows, heads * head_dim]` in place, in halves as Hugging Face lays them out:
    /// `(a, b) -> (a cos - b sin, b cos + a sin)` with `a = x[i]`, `b = x[i + head_dim / 2]`. `cos` and `sin` are
    /// `[rows, head_dim / 2]`. `inverse` rotates back, which is also the gradient.
    fn rope(
        &self,
        x: &mut [Self::T],
        head_dim: usize,
        cos: &[Self::T],
        sin: &[Self::T],
        inverse: bool,
    );

    /// `y = silu(gate) * up`, elementwise.
    fn swiglu(&self, gate: &[Self::T], up: &[Self::T], y: &mut [Self::T]);
    /// Replaces `gate` and `up` by their gradients for `dy`, the gradient of [`Ops::swiglu`]'s output.
    fn swiglu_backward(&self, gate: &mut [Self::T], up: &mut [Self::T], dy: &[Self::T]);

    /// Row `i` of `from [rows, width]` becomes the key of row `rows[i]` of the paged cache `k`, whose blocks are turned
    /// (see [`KvRows::Paged`]).
    fn store_keys(&self, from: &[Self::T], rows: &[usize], block_size: usize, k: &mut [Self::T]) {
        let Some(width) = from.len().checked_div(rows.len()) else {
            return;
        };
        for (from, row) in from.chunks_exact(width).zip(rows) {
            let block = &mut k[row / block_size * block_size * width..][..block_size * width];
            let column = block.iter_mut().skip(row % block_size).step_by(block_size);
            column.zip(from).for_each(|(to, from)| *to = *from);
        }
    }

    /// Row `i` of `from [rows, kv_heads * head_dim]` becomes the value of row `rows[i]` of the paged cache `v` (see
    /// [`KvRows::Paged`]).
    fn store_values(
        &self,
        from: &[Self::T],
        head_dim: usize,
        rows: &[usize],
        block_size: usize,
        v: &mut [Self::T],
    ) {
        let Some(width) = from.len().checked_div(rows.len()) else {
            return;
        };
        for (from, row) in from.chunks_exact(width).zip(rows) {
            let block = &mut v[row / block_size * block_size * width..][..block_size * width];
            let heads = block.chunks_exact_mut(block_size * head_dim);
            for (to, from) in heads.zip(from.chunks_exact(head_dim)) {
                to[row % block_size * head_dim..][..head_dim].copy_from_slice(from);
            }
        }
    }

    /// Causal attention of the spans' rows of `q [rows, heads * head_dim]` over `k`, `v [kv rows, kv_heads *
    /// head_dim]`, into the same rows of `out`. With `lse [rows, heads]`, the log of each softmax's denominator goes
    /// there (see [`AttentionSaved::lse`]). Sums run over positions in ascending order.
    #[allow(
        clippy::too_many_arguments,
        reason = "an operation names its operands; a struct would only rename them"
    )]
    fn attention(
        &self,
        shape: AttentionShape,
        q: &[Self::T],
        k: &[Self::T],
        v: &[Self::T],
        spans: &[AttentionSpan<'_>],
        out: &mut [Self::T],
        lse: Option<&mut [Self::T]>,
    );
    /// The gradients of [`Ops::attention`] for `dout [rows, heads * head_dim]`, over the spans' rows only. Scores are
    /// computed again from `q`, `k` and `lse`; no score matrix is kept. The spans are flat: nothing trains on a paged cache.
    fn attention_backward(
        &self,
        shape: AttentionShape,
        saved: AttentionSaved<'_, Self::T>,
        spans: &[AttentionSpan<'_>],
        dout: &[Self::T],
        grads: AttentionGrads<'_, Self::T>,
    );

    /// Replaces each row of `logits [rows, vocab]` by `scale * (softmax(row) - onehot(label))` and writes the row's
    /// `-log softmax(row)[label]` (not scaled) to `losses [rows]`.
    fn cross_entropy(
        &self,
        logits: &mut [Self::T],
        labels: &[u32],
        scale: Self::T,
        losses: &mut [Self::T],
    );

    /// `y += x`.
    fn add(&self, x: &[Self::T], y: &mut [Self::T]) {
        assert_eq!(x.len(), y.len(), "both sides of a sum have one length");
        for (y, x) in y.iter_mut().zip(x) {
            *y += *x;
        }
    }
    /// `y += bias` in each row of `bias.len()`.
    fn add_bias(&self, bias: &[Self::T], y: &mut [Self::T]) {
        for row in y.chunks_exact_mut(bias.len()) {
            self.add(bias, row);
        }
    }
    /// `y *= gain` in each row of `gain.len()`.
    fn scale_columns(&self, gain: &[Self::T], y: &mut [Self::T]) {
        for row in y.chunks_exact_mut(gain.len()) {
            for (y, gain) in row.iter_mut().zip(gain) {
                *y *= *gain;
            }
        }
    }
}

/// Outputs are packed in panels of this many; a part of a matrix product begins and ends at one.
pub const PANEL: usize = 32;

/// The operations that the server runs on.
pub type Backend = Cpu;
