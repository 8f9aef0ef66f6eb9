//! A frozen weight in a device's memory, and its products.
//!
//! Products of few rows run on our kernels, which add in one order whatever the number of rows; those of many rows run on
//! the vendor's library unless the same bits are wanted in any company. It must not know which site a weight is.

use half::f16;

use super::driver::{Address, Arg, DeviceError, Element, ProductKind, VendorProduct};
use super::memory::{CudaView, CudaViewMut, Memory};
use super::{Cuda, ELEMENTS, at};
use crate::ops::weight::BLOCK;
use crate::ops::{Blocks, Uniform, Weight, WeightKind};

/// Rows from which the vendor's library multiplies.
const VENDOR_ROWS: usize = 65;

/// `[outputs, inputs]`, row-major: plain numbers, or signed bytes beside the f16 scales of 32 inputs each.
#[derive(Debug)]
pub struct CudaMatrix {
    pub(super) numbers: Memory,
    pub(super) scales: Option<Memory>,
    pub(super) kind: WeightKind,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

/// What a program for products takes: `rows` up to `rows`, a grid and shared memory by its kind.
enum Form {
    Few {
        name: &'static str,
        outputs: usize,
        rows: usize,
        shared: usize,
    },
    Many,
}

// === impl CudaMatrix ===

impl CudaMatrix {
    /// Brings a weight, in its own kind or a plain one. It is there at return: the other lane may read it next.
    pub(super) fn pack(
        cuda: &Cuda,
        weight: &Weight,
        dims: (usize, usize),
        plain: Element,
    ) -> Result<Self, DeviceError> {
        let packed = Self::bring(cuda, weight, dims, plain)?;
        cuda.device.driver.wait(cuda.lane)?;
        Ok(packed)
    }

    fn bring(
        cuda: &Cuda,
        weight: &Weight,
        (outputs, inputs): (usize, usize),
        plain: Element,
    ) -> Result<Self, DeviceError> {
        assert_eq!(
            weight.len(),
            outputs * inputs,
            "a weight is [outputs, inputs]"
        );
        if let Weight::Uniform(uniform) = weight {
            let numbers = cuda.uniform(uniform, plain)?;
            return Ok(Self {
                numbers,
                scales: None,
                kind: kind_of(plain),
                outputs,
                inputs,
            });
        }
        let (numbers, scales, kind) = match weight {
            Weight::Blocks(blocks) if blocks.kind() == WeightKind::Q8_0 => {
                let (codes, scales) = apart(blocks);
                (codes, Some(scales), WeightKind::Q8_0)
            }
            Weight::Bf16(numbers) if plain != Element::F16 => {
                let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
                (bytes, None, WeightKind::Bf16)
            }
            Weight::F16(numbers) if plain != Element::Bf16 => {
                let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
                (bytes, None, WeightKind::F16)
            }
            other => (plain.encode(&other.widened()), None, kind_of(plain)),
        };
        let hold = |bytes: &[u8]| Memory::holding(&cuda.device.driver, cuda.lane, bytes);
        Ok(Self {
            numbers: hold(&numbers)?,
            scales: scales.as_deref().map(hold).transpose()?,
            kind,
            outputs,
            inputs,
        })
    }

    pub(super) fn bytes(&self) -> usize {
        self.numbers.bytes() + self.scales.as_ref().map_or(0, Memory::bytes)
    }

    /// As kernels' names have it.
    pub(super) fn name(&self) -> &'static str {
        match self.kind {
            WeightKind::F32 => "f32",
            WeightKind::Bf16 => "bf16",
            WeightKind::F16 => "f16",
            WeightKind::Q8_0 => "q8",
            WeightKind::Q4_0 | WeightKind::Q4_1 => unreachable!("these were widened"),
        }
    }

    /// The numbers and their scales, as kernels take them.
    pub(super) fn args(&self) -> [Arg; 2] {
        let scales = self
            .scales
            .as_ref()
            .map_or(Address::NULL, |scales| scales.at(0));
        [Arg::At(self.numbers.at(0)), Arg::At(scales)]
    }

    /// The element, where the numbers are plain.
    fn plain(&self) -> Option<Element> {
        match self.kind {
            WeightKind::F32 => Some(Element::F32),
            WeightKind::Bf16 => Some(Element::Bf16),
            WeightKind::F16 => Some(Element::F16),
            _ => None,
        }
    }

    /// Bytes of a number.
    fn number_bytes(&self) -> usize {
        self.plain().map_or(1, Element::bytes)
    }
}

fn kind_of(element: Element) -> WeightKind {
    match element {
        Element::F32 => WeightKind::F32,
        Element::Bf16 => WeightKind::Bf16,
        Element::F16 => WeightKind::F16,
    }
}

/// GGUF's blocks as two arrays, codes and scales, so that both lie aligned.
fn apart(blocks: &Blocks) -> (Vec<u8>, Vec<u8>) {
    let inputs = blocks.inputs();
    let (mut codes, mut scales) = (Vec::with_capacity(blocks.bytes().len()), Vec::new());
    for row in blocks.bytes().chunks_exact(blocks.row_bytes().max(1)) {
        let whole = row.chunks_exact(WeightKind::Q8_0.block_bytes());
        for (block, first) in whole.zip((0..inputs).step_by(BLOCK)) {
            let (scale, bytes) = block.split_at(size_of::<f16>());
            scales.extend(scale);
            codes.extend(&bytes[..BLOCK.min(inputs - first)]);
        }
    }
    (codes, scales)
}

fn form(rows: usize) -> Form {
    let few = |name, outputs, rows, shared| Form::Few {
        name,
        outputs,
        rows,
        shared,
    };
    match rows {
        0..=8 => few("8", 16, 8, 4096),
        9..=16 => few("16", 16, 16, 8192),
        17..=32 => few("32", 32, 32, 32768),
        33..=64 => few("64", 32, 64, 65536),
        _ => Form::Many,
    }
}

/// Outputs or inputs that a block of a large product takes.
fn many_columns(x: Element) -> usize {
    if x == Element::F32 { 64 } else { 128 }
}

// === impl Cuda ===

impl Cuda {
    /// Random numbers, made where they stay.
    fn uniform(&self, uniform: &Uniform, element: Element) -> Result<Memory, DeviceError> {
        let memory = Memory::new(&self.device.driver, uniform.len * element.bytes())?;
        let args = [
            Arg::At(memory.at(0)),
            Arg::Long(0),
            Arg::Long(uniform.len as i64),
            Arg::Unsigned(uniform.seed),
            Arg::Float(uniform.bound),
        ];
        let blocks = uniform.len.div_ceil(ELEMENTS);
        self.launch(
            named!(element, "fill_uniform"),
            [blocks, 1, 1],
            256,
            0,
            &args,
        );
        Ok(memory)
    }

    /// `y = x W^T`.
    pub(super) fn product(&self, x: CudaView<'_>, w: &CudaMatrix, y: &CudaViewMut<'_>) {
        let (rows, dims) = (x.len / w.inputs.max(1), (w.outputs, w.inputs));
        assert_eq!(
            (x.len, y.len),
            (rows * w.inputs, rows * w.outputs),
            "x [rows, in], y [rows, out] of {dims:?}"
        );
        if rows == 0 || self.by_vendor(ProductKind::Forward, x, w, y, rows) {
            return;
        }
        let (from, to) = (x.element, y.element);
        let stem = format!("matmul_{}_{}_{}", from.name(), w.name(), to.name());
        let [numbers, scales] = w.args();
        let args = [
            x.into(),
            numbers,
            scales,
            y.into(),
            at(rows),
            at(w.inputs),
            at(w.outputs),
        ];
        match form(rows) {
            Form::Few {
                name,
                outputs,
                rows: most,
                shared,
            } => {
                let grid = [w.outputs.div_ceil(outputs), rows.div_ceil(most), 1];
                self.launch(&format!("{stem}_{name}"), grid, 256, shared, &args);
            }
            Form::Many => {
                let columns = many_columns(from);
                let grid = [rows.div_ceil(128), w.outputs.div_ceil(columns), 1];
                let shared = 96 * (128 * from.bytes() + columns * w.number_bytes());
                self.launch(&format!("{stem}_many"), grid, 256, shared, &args);
            }
        }
    }

    /// `dx += dy W`.
    pub(super) fn product_backward(&self, dy: CudaView<'_>, w: &CudaMatrix, dx: &CudaViewMut<'_>) {
        let rows = dy.len / w.outputs.max(1);
        assert_eq!(
            (dy.len, dx.len, dx.element),
            (rows * w.outputs, rows * w.inputs, dy.element),
            "dy [rows, out], dx [rows, in], of one element"
        );
        if rows == 0 || self.by_vendor(ProductKind::Backward, dy, w, dx, rows) {
            return;
        }
        let (columns, shared) = match (dy.element, w.kind) {
            (Element::F32, WeightKind::F32 | WeightKind::Q8_0) => (64, 54272),
            (Element::F32, _) => (64, 46080),
            (_, WeightKind::Q8_0) => (64, 37888),
            _ => (128, 37888),
        };
        let [numbers, scales] = w.args();
        let args = [
            dy.into(),
            numbers,
            scales,
            dx.into(),
            at(rows),
            at(w.inputs),
            at(w.outputs),
        ];
        let name = format!("matmul_backward_{}_{}", dy.element.name(), w.name());
        let grid = [rows.div_ceil(128), w.inputs.div_ceil(columns), 1];
        self.launch(&name, grid, 256, shared, &args);
    }

    /// Whether the vendor's library did it.
    fn by_vendor(
        &self,
        kind: ProductKind,
        x: CudaView<'_>,
        w: &CudaMatrix,
        y: &CudaViewMut<'_>,
        rows: usize,
    ) -> bool {
        let same = x.element != Element::F32 && w.plain() == Some(x.element);
        if self.device.deterministic || rows < VENDOR_ROWS || !same {
            return false;
        }
        let product = VendorProduct {
            kind,
            x: x.at,
            w: w.numbers.at(0),
            y: y.at,
            rows,
            inputs: w.inputs,
            outputs: w.outputs,
            from: x.element,
            to: y.element,
        };
        super::memory::must(self.device.driver.product(self.lane, &product))
    }
}
