//! A frozen weight in whichever format it is kept, behind one set of products.
//!
//! It must not know how a format's kernel works, only which one belongs to it.

use std::ops::Range;

use half::{bf16, f16};

use super::cpu_blocks::BlockPanels;
use super::cpu_matmul::Panels;
use super::cpu_tile::Isa;
use super::weight::{Weight, WeightKind};

/// A frozen weight of the CPU path. The only copy of it.
#[derive(Clone, Debug)]
pub struct Matrix(Layout);

#[derive(Clone, Debug)]
enum Layout {
    F32(Panels<f32>),
    Bf16(Panels<bf16>),
    F16(Panels<f16>),
    Blocks(BlockPanels),
}

/// The same expression for each layout.
macro_rules! each {
    ($self:expr, $panels:ident => $result:expr) => {
        match &$self.0 {
            Layout::F32($panels) => $result,
            Layout::Bf16($panels) => $result,
            Layout::F16($panels) => $result,
            Layout::Blocks($panels) => $result,
        }
    };
}

// === impl Matrix ===

impl Matrix {
    /// Packs a row-major `[outputs, inputs]` weight in its own format.
    pub(super) fn pack(weight: &Weight, outputs: usize, inputs: usize) -> Self {
        Matrix(match weight {
            Weight::F32(values) => Layout::F32(Panels::pack(values, outputs, inputs)),
            Weight::Bf16(values) => Layout::Bf16(Panels::pack(values, outputs, inputs)),
            Weight::F16(values) => Layout::F16(Panels::pack(values, outputs, inputs)),
            Weight::Blocks(blocks) => Layout::Blocks(BlockPanels::pack(blocks, outputs, inputs)),
            Weight::Uniform(uniform) => return Self::pack(&uniform.written(), outputs, inputs),
        })
    }

    /// Packs plain numbers.
    pub(super) fn pack_f32(weight: &[f32], outputs: usize, inputs: usize) -> Self {
        Matrix(Layout::F32(Panels::pack(weight, outputs, inputs)))
    }

    /// The format.
    pub(super) fn kind(&self) -> WeightKind {
        match &self.0 {
            Layout::F32(_) => WeightKind::F32,
            Layout::Bf16(_) => WeightKind::Bf16,
            Layout::F16(_) => WeightKind::F16,
            Layout::Blocks(panels) => panels.kind(),
        }
    }

    /// `(outputs, inputs)`.
    pub(super) fn dims(&self) -> (usize, usize) {
        each!(self, panels => panels.dims())
    }

    /// Bytes of the packed copy.
    pub(super) fn bytes(&self) -> usize {
        each!(self, panels => panels.bytes())
    }

    /// Row `ids[i]` into `out[i]`, widened.
    pub(super) fn gather(&self, ids: &[u32], out: &mut [f32]) {
        each!(self, panels => panels.gather(ids, out));
    }

    /// Columns `outputs` of `y = x W^T`.
    pub(super) fn matmul(&self, isa: Isa, x: &[f32], outputs: Range<usize>, y: &mut [f32]) {
        each!(self, panels => panels.matmul(isa, x, outputs, y));
    }

    /// `dx += dy[:, outputs] W[outputs, :]`.
    pub(super) fn backward(&self, isa: Isa, dy: &[f32], outputs: Range<usize>, dx: &mut [f32]) {
        each!(self, panels => panels.backward(isa, dy, outputs, dx));
    }
}
