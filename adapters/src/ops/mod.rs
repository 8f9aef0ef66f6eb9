//! The dozen operations that a decoder with adapters is made of, forward and backward.
//!
//! Everything above is written once, generic over [`Ops`]: the plain [`Reference`] in f64 proves the derivatives by
//! finite differences, [`Cpu`] serves and train. Numbers lie in buffers where the operations work
//! ([`buffer`]), flat and row-major; outputs belong to the caller. An operation must not know what a layer, an adapter
//! or a request is.
//!
//! **The row rule.** An output row depends only on its own input row and on the weights. Its sums run in an order
//! fixed by their length alone, never by the number of rows, by threads or by neighbours: cutting a batch elsewhere
//! changes no bit. Where an operation sums over rows ([`Ops::outer`], the key and value gradients of attention) it
//! adds them one row after the other onto what the output holds, so that cutting the rows changes no bit either.

use crate::weights::Numbers;
use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Range, Sub, SubAssign};

mod backend;
mod buffer;
mod cpu;
mod cpu_arena;
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
pub mod cuda;
mod host;
mod low_rank;
mod reference;
mod weight;

pub use backend::Backend;
pub use buffer::{ArenaSize, Buffer, Fill, OutOfMemory, Span, View, ViewMut};
pub use cpu::Cpu;
pub use cpu_buffer::for_each;
pub use cpu_matrix::Matrix;
pub use cpu_team::{set_threads, threads};
pub use cuda::Cuda;
pub use low_rank::{Factor, HostLowRank, LowRank};
pub use reference::Reference;
pub use weight::{BLOCK, Blocks, Uniform, Weight, WeightKind};

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
pub struct AttentionSaved<V> {
    /// Queries `[rows, heads * head_dim]`.
    pub q: V,
    /// Keys `[kv rows, kv_heads * head_dim]`.
    pub k: V,
    /// Values `[kv rows, kv_heads * head_dim]`.
    pub v: V,
    /// The output `[rows, heads * head_dim]`.
    pub out: V,
    /// The logarithm of each softmax's denominator, maximum included: `[rows, heads]`, exact.
    pub lse: V,
}

/// Gradients of attention's inputs, shaped as these.
#[derive(Debug)]
pub struct AttentionGrads<V> {
    /// Overwritten in the spans' rows.
    pub dq: V,
    /// Added to, query row after query row.
    pub dk: V,
    /// Added to, query row after query row.
    pub dv: V,
}

impl<V> AttentionSaved<V> {
    fn map<W>(self, of: impl Fn(V) -> W) -> AttentionSaved<W> {
        AttentionSaved {
            q: of(self.q),
            k: of(self.k),
            v: of(self.v),
            out: of(self.out),
            lse: of(self.lse),
        }
    }
}

impl<V> AttentionGrads<V> {
    fn map<W>(self, of: impl Fn(V) -> W) -> AttentionGrads<W> {
        AttentionGrads {
            dq: of(self.dq),
            dk: of(self.dk),
            dv: of(self.dv),
        }
    }
}

/// How a token is drawn from a row of logits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenDraw {
    /// Divides the logits; 0 takes the likeliest token, the lowest id among equals.
    pub temperature: f32,
    /// Tokens within this share of the probability, the likeliest first; 1 is all.
    pub top_p: f32,
    /// Tokens at least this likely beside the likeliest; 0 is all.
    pub min_p: f32,
    /// So many of the likeliest tokens; 0 is all.
    pub top_k: u32,
    /// With `counter`, the random number of this draw.
    pub seed: u64,
    /// Draws of this seed before.
    pub counter: u64,
}

/// The numbers of one AdamW step, worked out by [`crate::train::optimizer`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Gradients are multiplied by this first (clipping).
    pub scale: f64,
    /// What the mean gradient keeps; the new one gets the rest.
    pub keep1: f64,
    /// What the mean squared gradient keeps.
    pub keep2: f64,
    /// The correction of the mean square's root.
    pub root: f64,
    /// Keeps the denominator away from zero.
    pub epsilon: f64,
    /// Parameters are multiplied by this before the step.
    pub shrink: f64,
    /// The length of the step, the mean's correction in it.
    pub size: f64,
}

/// Operations on flat row-major numbers. The number of rows is a view's length over its row's width; zero rows are
/// allowed everywhere. Wrong lengths are programming errors and panic; so does a device that fails, and whoever runs steps
/// and jobs catches it.
///
/// A buffer is *working* (what activations are made of: 16 bits on a device that says so) or *exact* ([`Ops::T`]). Where
/// nothing is said, an operand is working.
pub trait Ops: Clone + Debug + Send + Sync + 'static {
    /// What a number is on the host.
    type T: Real;
    /// Numbers where the operations work.
    type Buf: Buffer;
    /// A frozen weight `[out, in]` in the layout that this implementation likes best. The only copy of it.
    type Matrix: Debug + Send + Sync;
    /// An adapter's numbers, in one piece: exact ones and factors of 16 bits.
    type Arena: Debug + Send + Sync;
    /// A low-rank factor `[rank, width]` in an arena.
    type Factor<'a>: Copy + Debug;
    /// Row numbers or token ids of a pass.
    type Ids<'a>: Copy + Debug;
    /// Spans of a pass.
    type Spans<'a>: Debug;
    /// Lists of low-rank updates of a pass, one for each place where updates share an input.
    type Updates<'a>: Debug;

    /// Rows whose logits a loss holds at a time.
    fn loss_rows(&self) -> usize;
    /// Outputs whose gradients one product with the head adds up; see [`crate::train::loss`].
    fn loss_outputs(&self) -> usize;

    // --- memory ---

    /// The same operations for a thread beside the steps: its work does not wait for theirs.
    fn beside(&self) -> Self {
        self.clone()
    }
    /// The same operations for passes that others interrupt: what is brought for one stays while steps bring theirs.
    fn apart(&self) -> Self {
        self.clone()
    }
    /// An empty working buffer.
    fn working(&self) -> Self::Buf;
    /// An empty exact buffer.
    fn exact(&self) -> Self::Buf;
    /// Bytes of a number in a working buffer.
    fn working_bytes(&self) -> usize {
        size_of::<Self::T>()
    }
    /// Gives a buffer a length. What it holds then is anything.
    fn resize(&self, buffer: &mut Self::Buf, len: usize);
    /// Numbers from the host; rounded to nearest where the buffer is working.
    fn write(&self, from: &[Self::T], to: ViewMut<'_, Self>);
    /// Numbers to the host, after all work on them.
    fn read(&self, from: View<'_, Self>, to: &mut [Self::T]);
    /// The memory itself where it is the host's.
    fn on_host<'a>(&self, buffer: &'a mut Self::Buf) -> Option<&'a mut [Self::T]>;
    /// Zeros.
    fn clear(&self, view: ViewMut<'_, Self>);
    /// A copy; both are working or both exact.
    fn copy(&self, from: View<'_, Self>, to: ViewMut<'_, Self>);
    /// The numbers `from` of a buffer to its place `to`; the two do not overlap.
    fn copy_within(&self, buffer: &mut Self::Buf, from: Range<usize>, to: usize);
    /// Waits until all work is done.
    fn wait(&self) {}
    /// Floating point operations of about two milliseconds: what long work does at a time.
    fn quantum_flops(&self) -> usize {
        1 << 28
    }
    /// A pass begins: what was brought for the one before is not needed any more.
    fn begin_pass(&self) {}
    /// The rows that a step of `rows` decoding rows is filled up to with [`NO_ROW`], so that few shapes recur.
    fn padded(&self, rows: usize) -> usize {
        rows
    }
    /// Runs the operations of a step that will come again with other tables, or replays them as they were. `run` brings nothing
    /// itself: it reads what this pass has brought, frozen weights, and buffers that stand or fall with those whose places are
    /// `over`.
    fn recurring(&self, over: &[u64], run: &mut dyn FnMut()) {
        let _ = over;
        run();
    }

    /// Brings ids or row numbers to where operations read them; they stay until the pass is over. [`NO_ROW`] is no row:
    /// gathered it is zeros, stored it is skipped.
    fn ids<'a>(&self, ids: &'a [u32]) -> Self::Ids<'a>;
    /// The same for spans.
    fn spans<'a>(&self, spans: Vec<AttentionSpan<'a>>) -> Self::Spans<'a>;
    /// The same for updates. Those of one list share their input; updates of the same rows and output stand together and
    /// are added in their order.
    fn updates<'a>(
        &'a self,
        lists: Vec<Vec<LowRank<Self::Factor<'a>, Self::T>>>,
    ) -> Self::Updates<'a>;

    // --- adapters ---

    /// Memory for an adapter, in that of `spare` if it fits, filled by `fill` (exact numbers, numbers of 16 bits), which
    /// writes all of it.
    ///
    /// # Errors
    /// [`OutOfMemory`] of the device.
    fn arena(
        &self,
        spare: Option<Self::Arena>,
        size: ArenaSize,
        fill: Fill<'_, Self::T>,
    ) -> Result<Self::Arena, OutOfMemory>;
    /// Bytes of an arena.
    fn arena_bytes(&self, size: ArenaSize) -> usize;
    /// Exact numbers of an arena.
    fn numbers(arena: &Self::Arena, at: Range<usize>) -> View<'_, Self>;
    /// As [`Ops::numbers`], to be changed.
    fn numbers_mut(arena: &mut Self::Arena, at: Range<usize>) -> ViewMut<'_, Self>;
    /// A factor in an arena.
    fn factor<'a>(arena: &'a Self::Arena, span: &Span) -> Self::Factor<'a>;
    /// A factor's numbers as they are stored, on the host.
    fn read_factor(&self, factor: Self::Factor<'_>) -> Numbers;

    // --- frozen weights ---

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
    /// Row `ids[i]` of `weight` into `out[i]`: embeddings, angles, weight rows for norms. `out [ids, inputs]`, working or exact.
    fn gather(&self, weight: &Self::Matrix, ids: Self::Ids<'_>, out: ViewMut<'_, Self>);

    /// Columns `outputs` of `y = x W^T`: `x [rows, in]`, `y [rows, out]` whole rows, working or exact, of which only columns
    /// `outputs` are written. `outputs` begins at a multiple of [`PANEL`] and ends at one or at the weight's end.
    fn matmul_part(
        &self,
        x: View<'_, Self>,
        weight: &Self::Matrix,
        outputs: Range<usize>,
        y: ViewMut<'_, Self>,
    );
    /// `dx += dy[:, outputs] W[outputs, :]`: `dy [rows, out]` whole rows, `dx [rows, in]`; `outputs` as in
    /// [`Ops::matmul_part`]. Sums run over outputs in ascending order onto what `dx` holds.
    fn matmul_backward_part(
        &self,
        dy: View<'_, Self>,
        weight: &Self::Matrix,
        outputs: Range<usize>,
        dx: ViewMut<'_, Self>,
    );
    /// `y = x W^T`, every column.
    fn matmul(&self, x: View<'_, Self>, weight: &Self::Matrix, y: ViewMut<'_, Self>) {
        self.matmul_part(x, weight, 0..self.dims(weight).0, y);
    }
    /// `dx += dy W`.
    fn matmul_backward(&self, dy: View<'_, Self>, weight: &Self::Matrix, dx: ViewMut<'_, Self>) {
        self.matmul_backward_part(dy, weight, 0..self.dims(weight).0, dx);
    }

    // --- low rank ---

    /// `h = x A^T`, thin: `x [rows, in]`, `a [rank, in]` exact, `h [rows, rank]` exact. Also, but for the scale, the gradient of
    /// `h` through [`Ops::expand`].
    fn shrink(&self, x: View<'_, Self>, a: View<'_, Self>, rank: usize, h: ViewMut<'_, Self>);
    /// `y += scale * h Bt`, thin: `h [rows, rank]` exact, `bt [rank, out]` (B **transposed**) exact, `y [rows, out]`. Also the
    /// gradient of `x` through [`Ops::shrink`].
    fn expand(
        &self,
        h: View<'_, Self>,
        bt: View<'_, Self>,
        rank: usize,
        scale: Self::T,
        y: ViewMut<'_, Self>,
    );
    /// `dw += scale * h^T x`, row after row: `h [rows, rank]` exact, `x [rows, width]`, `dw [rank, width]` exact. Each element
    /// is `dw = (scale * h) * x + dw`, fused or not but always the same.
    fn outer(
        &self,
        h: View<'_, Self>,
        x: View<'_, Self>,
        rank: usize,
        scale: Self::T,
        dw: ViewMut<'_, Self>,
    );

    /// The updates of list `list`, whose outputs share the input `x [rows, in]`: `outputs[i]` is `[rows, out of i]`. A row's
    /// bits are those of [`Ops::shrink`] and then [`Ops::expand`] on the widened factors, whatever else is in the list.
    fn low_rank(
        &self,
        x: View<'_, Self>,
        updates: &Self::Updates<'_>,
        list: usize,
        outputs: Vec<ViewMut<'_, Self>>,
    );

    /// `out = mask * x / (1 - rate)`, or `out += ...` where `add`, in rows of one key each: [`crate::batch::Dropout`] says
    /// what the mask is.
    fn dropout(
        &self,
        x: View<'_, Self>,
        row_keys: &[u64],
        site: usize,
        rate: f32,
        out: ViewMut<'_, Self>,
        add: bool,
    );

    // --- row by row ---

    /// `y = x / sqrt(mean(x^2) + eps) * weight` in rows of `weight`'s length.
    fn rms_norm(&self, x: View<'_, Self>, weight: View<'_, Self>, eps: f64, y: ViewMut<'_, Self>);
    /// `residual += x`, then `y = rms_norm(residual)`.
    fn add_rms_norm(
        &self,
        x: View<'_, Self>,
        residual: &mut Self::Buf,
        weight: View<'_, Self>,
        eps: f64,
        y: ViewMut<'_, Self>,
    ) {
        self.add(x, residual.all_mut());
        self.rms_norm(residual.all(), weight, eps, y);
    }
    /// `dx += d rms_norm(x) / dx` applied to `dy`.
    fn rms_norm_backward(
        &self,
        x: View<'_, Self>,
        weight: View<'_, Self>,
        eps: f64,
        dy: View<'_, Self>,
        dx: ViewMut<'_, Self>,
    );

    /// Rotates each head of `x [rows, heads * head_dim]` in place, in halves as Hugging Face lays them out:
    /// `(a, b) -> (a cos - b sin, b cos + a sin)` with `a = x[i]`, `b = x[i + head_dim / 2]`. `cos` and `sin` are
    /// `[rows, head_dim / 2]`, exact. `inverse` rotates back, which is also the gradient.
    fn rope(
        &self,
        x: ViewMut<'_, Self>,
        head_dim: usize,
        cos: View<'_, Self>,
        sin: View<'_, Self>,
        inverse: bool,
    );

    /// `y = silu(gate) * up`, elementwise.
    fn swiglu(&self, gate: View<'_, Self>, up: View<'_, Self>, y: ViewMut<'_, Self>);
    /// Replaces `gate` and `up` by their gradients for `dy`, the gradient of [`Ops::swiglu`]'s output.
    fn swiglu_backward(&self, gate: ViewMut<'_, Self>, up: ViewMut<'_, Self>, dy: View<'_, Self>);

    /// `y += x`.
    fn add(&self, x: View<'_, Self>, y: ViewMut<'_, Self>);
    /// `y += bias` in each row of `bias`'s length; both are working or both exact.
    fn add_bias(&self, bias: View<'_, Self>, y: ViewMut<'_, Self>);
    /// `y *= gain` in each row of `gain`'s length; `gain` is exact.
    fn scale_columns(&self, gain: View<'_, Self>, y: ViewMut<'_, Self>);
    /// `y *= x`, number by number; `y` is exact, `x` working or exact.
    fn multiply(&self, x: View<'_, Self>, y: ViewMut<'_, Self>);
    /// Row `rows[i]` of `from` into row `i` of `out`.
    fn take_rows(&self, from: View<'_, Self>, rows: Self::Ids<'_>, out: ViewMut<'_, Self>);
    /// Row `i` of `x` onto row `rows[i]` of `y`; no row stands twice.
    fn add_rows(&self, x: View<'_, Self>, rows: Self::Ids<'_>, y: ViewMut<'_, Self>);

    // --- attention ---

    /// Row `i` of `from [rows, width]` becomes the key of row `rows[i]` of the paged cache `k`, whose blocks are turned
    /// (see [`KvRows::Paged`]).
    fn store_keys(
        &self,
        from: View<'_, Self>,
        head_dim: usize,
        rows: Self::Ids<'_>,
        block_size: usize,
        k: ViewMut<'_, Self>,
    );

    /// Row `i` of `from [rows, kv_heads * head_dim]` becomes the value of row `rows[i]` of the paged cache `v` (see
    /// [`KvRows::Paged`]).
    fn store_values(
        &self,
        from: View<'_, Self>,
        head_dim: usize,
        rows: Self::Ids<'_>,
        block_size: usize,
        v: ViewMut<'_, Self>,
    );

    /// Causal attention of the spans' rows of `q [rows, heads * head_dim]` over `k`, `v [kv rows, kv_heads *
    /// head_dim]`, into the same rows of `out`. With `lse [rows, heads]`, exact, the log of each softmax's denominator goes
    /// there (see [`AttentionSaved::lse`]). Sums run over positions in ascending order.
    #[allow(
        clippy::too_many_arguments,
        reason = "an operation names its operands; a struct would only rename them"
    )]
    fn attention(
        &self,
        shape: AttentionShape,
        q: View<'_, Self>,
        k: View<'_, Self>,
        v: View<'_, Self>,
        spans: &Self::Spans<'_>,
        out: ViewMut<'_, Self>,
        lse: Option<ViewMut<'_, Self>>,
    );
    /// The gradients of [`Ops::attention`] for `dout [rows, heads * head_dim]`, over the spans' rows only. Scores are
    /// computed again from `q`, `k` and `lse`; no score matrix is kept. The spans are flat: nothing trains on a paged cache.
    fn attention_backward(
        &self,
        shape: AttentionShape,
        saved: AttentionSaved<View<'_, Self>>,
        spans: &Self::Spans<'_>,
        dout: View<'_, Self>,
        grads: AttentionGrads<ViewMut<'_, Self>>,
    );

    /// Draws a token for each row of `logits [rows, vocab]`, exact; `None` for a row with a logit that is NaN or infinite. Nothing
    /// at all where logits are the host's, which draws by rules of its own.
    fn draw(&self, logits: View<'_, Self>, draws: &[TokenDraw]) -> Option<Vec<Option<u32>>> {
        let _ = (logits, draws);
        None
    }

    // --- loss and optimizer ---

    /// For each row of `logits [rows, vocab]`, exact, `weights[row] * (softmax(row) - onehot(label))` to `gradient`, and to
    /// `judged [rows, 2]`, exact, `-log softmax(row)[label]` (not weighted) and 1 where no logit is above the label's, else
    /// 0. `weights [rows]` are exact.
    fn cross_entropy(
        &self,
        logits: View<'_, Self>,
        labels: Self::Ids<'_>,
        weights: View<'_, Self>,
        gradient: ViewMut<'_, Self>,
        judged: ViewMut<'_, Self>,
    );

    /// The sum of the squares of exact numbers, added up in double precision in an order of their own.
    fn sum_of_squares(&self, numbers: View<'_, Self>) -> f64;

    /// One step of AdamW on exact numbers (see [`crate::train::optimizer`]).
    fn adamw(
        &self,
        step: &AdamWStep,
        params: ViewMut<'_, Self>,
        grads: View<'_, Self>,
        mean: ViewMut<'_, Self>,
        square: ViewMut<'_, Self>,
    );
}

/// Bytes on whose multiples the parts of an arena begin: a cache line, and more than a device asks for.
pub const ARENA_ALIGN: usize = 64;

/// After so many rows of any width operands may begin on a device.
pub(crate) const ALIGNED_ROWS: usize = 8;

/// No row: see [`Ops::ids`].
pub const NO_ROW: u32 = u32::MAX;

/// Outputs are packed in panels of this many; a part of a matrix product begins and ends at one.
pub const PANEL: usize = 32;
