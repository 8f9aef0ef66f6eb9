//! The operations of memory where that is the host's: buffers are vectors, ids, spans and updates what the caller has.

use super::{AdamWStep, NO_ROW, Real};

/// The part of [`Ops`](super::Ops) that any operations on vectors of `$T` share.
macro_rules! host_memory {
    ($T:ty) => {
        type T = $T;
        type Buf = Vec<$T>;
        type Arena = $crate::ops::cpu_arena::HostArena<$T>;
        type Factor<'a> = $crate::ops::Factor<'a, $T>;
        type Ids<'a> = &'a [u32];
        type Spans<'a> = Vec<$crate::ops::AttentionSpan<'a>>;
        type Updates<'a> = Vec<Vec<$crate::ops::HostLowRank<'a, $T>>>;

        fn loss_rows(&self) -> usize {
            64
        }

        fn loss_outputs(&self) -> usize {
            1024
        }

        fn working(&self) -> Vec<$T> {
            Vec::new()
        }

        fn exact(&self) -> Vec<$T> {
            Vec::new()
        }

        fn resize(&self, buffer: &mut Vec<$T>, len: usize) {
            $crate::ops::host::resize(buffer, len);
        }

        fn write(&self, from: &[$T], to: &mut [$T]) {
            to.copy_from_slice(from);
        }

        fn read(&self, from: &[$T], to: &mut [$T]) {
            to.copy_from_slice(from);
        }

        fn on_host<'a>(&self, buffer: &'a mut Vec<$T>) -> Option<&'a mut [$T]> {
            Some(buffer)
        }

        fn clear(&self, view: &mut [$T]) {
            view.fill(<$T as $crate::ops::Real>::ZERO);
        }

        fn copy(&self, from: &[$T], to: &mut [$T]) {
            to.copy_from_slice(from);
        }

        fn copy_within(&self, buffer: &mut Vec<$T>, from: std::ops::Range<usize>, to: usize) {
            buffer.copy_within(from, to);
        }

        fn ids<'a>(&self, ids: &'a [u32]) -> &'a [u32] {
            ids
        }

        fn spans<'a>(
            &self,
            spans: Vec<$crate::ops::AttentionSpan<'a>>,
        ) -> Vec<$crate::ops::AttentionSpan<'a>> {
            spans
        }

        fn updates<'a>(
            &'a self,
            lists: Vec<Vec<$crate::ops::HostLowRank<'a, $T>>>,
        ) -> Self::Updates<'a> {
            lists
        }

        fn arena(
            &self,
            spare: Option<Self::Arena>,
            size: $crate::ops::ArenaSize,
            fill: $crate::ops::Fill<'_, $T>,
        ) -> Result<Self::Arena, $crate::ops::OutOfMemory> {
            Ok(Self::Arena::filled(spare, size, fill))
        }

        fn arena_bytes(&self, size: $crate::ops::ArenaSize) -> usize {
            Self::Arena::bytes(size)
        }

        fn numbers(arena: &Self::Arena, at: std::ops::Range<usize>) -> &[$T] {
            arena.numbers(at)
        }

        fn numbers_mut(arena: &mut Self::Arena, at: std::ops::Range<usize>) -> &mut [$T] {
            arena.numbers_mut(at)
        }

        fn factor<'a>(
            arena: &'a Self::Arena,
            span: &$crate::ops::Span,
        ) -> $crate::ops::Factor<'a, $T> {
            arena.factor(span)
        }

        fn read_factor(&self, factor: $crate::ops::Factor<'_, $T>) -> $crate::weights::Numbers {
            $crate::ops::cpu_arena::stored(factor)
        }

        fn dropout(
            &self,
            x: &[$T],
            row_keys: &[u64],
            site: usize,
            rate: f32,
            out: &mut [$T],
            add: bool,
        ) {
            $crate::batch::drop_out(x, row_keys, site, rate, out, add);
        }

        fn add_bias(&self, bias: &[$T], y: &mut [$T]) {
            for row in y.chunks_exact_mut(bias.len()) {
                self.add(bias, row);
            }
        }

        fn scale_columns(&self, gain: &[$T], y: &mut [$T]) {
            for row in y.chunks_exact_mut(gain.len()) {
                row.iter_mut().zip(gain).for_each(|(y, gain)| *y *= *gain);
            }
        }

        fn multiply(&self, x: &[$T], y: &mut [$T]) {
            assert_eq!(x.len(), y.len(), "both sides of a product have one length");
            y.iter_mut().zip(x).for_each(|(y, x)| *y *= *x);
        }

        fn take_rows(&self, from: &[$T], rows: &[u32], out: &mut [$T]) {
            $crate::ops::host::take_rows(from, rows, out);
        }

        fn add_rows(&self, x: &[$T], rows: &[u32], y: &mut [$T]) {
            let Some(width) = x.len().checked_div(rows.len()) else {
                return;
            };
            for (x, row) in x.chunks_exact(width).zip(rows) {
                self.add(x, &mut y[*row as usize * width..][..width]);
            }
        }

        fn store_values(
            &self,
            from: &[$T],
            head_dim: usize,
            rows: &[u32],
            block_size: usize,
            v: &mut [$T],
        ) {
            $crate::ops::host::store_values(from, head_dim, rows, block_size, v);
        }

        fn sum_of_squares(&self, numbers: &[$T]) -> f64 {
            $crate::ops::host::sum_of_squares(numbers)
        }

        fn adamw(
            &self,
            step: &$crate::ops::AdamWStep,
            params: &mut [$T],
            grads: &[$T],
            mean: &mut [$T],
            square: &mut [$T],
        ) {
            $crate::ops::host::adamw(step, params, grads, mean, square);
        }
    };
}
pub(super) use host_memory;

/// A length for a buffer. New memory comes zeroed from the system, which touches no page of it: a cache that is mostly unused
/// stays so.
pub(super) fn resize<T: Real>(buffer: &mut Vec<T>, len: usize) {
    if buffer.capacity() < len {
        *buffer = vec![T::ZERO; len];
    } else {
        buffer.resize(len, T::ZERO);
    }
}

/// Row `rows[i]` of `from` into row `i` of `out`.
pub(super) fn take_rows<T: Real>(from: &[T], rows: &[u32], out: &mut [T]) {
    let Some(width) = out.len().checked_div(rows.len()) else {
        return;
    };
    for (out, row) in out.chunks_exact_mut(width).zip(rows) {
        out.copy_from_slice(&from[*row as usize * width..][..width]);
    }
}

/// Rows into the turned blocks of the cache's values, head by head.
pub(super) fn store_values<T: Real>(
    from: &[T],
    head_dim: usize,
    rows: &[u32],
    block_size: usize,
    v: &mut [T],
) {
    let Some(width) = from.len().checked_div(rows.len()) else {
        return;
    };
    for (from, row) in from.chunks_exact(width).zip(rows) {
        if *row == NO_ROW {
            continue;
        }
        let row = *row as usize;
        let block = &mut v[row / block_size * block_size * width..][..block_size * width];
        let heads = block.chunks_exact_mut(block_size * head_dim);
        for (to, from) in heads.zip(from.chunks_exact(head_dim)) {
            to[row % block_size * head_dim..][..head_dim].copy_from_slice(from);
        }
    }
}

/// In order, in double precision.
pub(super) fn sum_of_squares<T: Real>(numbers: &[T]) -> f64 {
    let squares = numbers.iter().map(|x| x.to_f64() * x.to_f64());
    squares.sum()
}

/// A step of AdamW: mean and mean square first, then what they make of the parameter.
pub(super) fn adamw<T: Real>(
    step: &AdamWStep,
    params: &mut [T],
    grads: &[T],
    mean: &mut [T],
    square: &mut [T],
) {
    let (keep1, new1) = (T::from_f64(step.keep1), T::from_f64(1.0 - step.keep1));
    let (keep2, new2) = (T::from_f64(step.keep2), T::from_f64(1.0 - step.keep2));
    let (root, epsilon) = (T::from_f64(step.root), T::from_f64(step.epsilon));
    let (scale, shrink) = (T::from_f64(step.scale), T::from_f64(step.shrink));
    let size = T::from_f64(step.size);
    let state = mean.iter_mut().zip(square);
    for ((p, g), (m, v)) in params.iter_mut().zip(grads).zip(state) {
        let g = *g * scale;
        *m = keep1 * *m + new1 * g;
        *v = keep2 * *v + new2 * (g * g);
        *p = shrink * *p - size * (*m / (v.sqrt() / root + epsilon));
    }
}
