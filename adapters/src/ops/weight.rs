//! Frozen weights on their way from a file into a layout, and what each number format means.
//!
//! The definitions here are plain loops over rows; the layouts of the fast path hold exactly these numbers. Block formats are
//! those of GGUF (`ggml-common.h` of ggml-org/ggml): 32 inputs of one row share a scale. It must not know which site a weight is.

use std::borrow::Cow;
use std::fmt;

use half::{bf16, f16};

use crate::batch::{GOLDEN, mix};

/// Inputs that share a scale.
pub const BLOCK: usize = 32;

/// How the numbers of a weight are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WeightKind {
    /// Four bytes a number.
    F32,
    /// The upper half of an f32.
    Bf16,
    /// IEEE half precision.
    F16,
    /// GGUF's Q8_0: an f16 scale `d` and 32 signed bytes, `w = d q`.
    Q8_0,
    /// GGUF's Q4_0: an f16 scale `d` and 32 nibbles, `w = d (q - 8)`.
    Q4_0,
    /// GGUF's Q4_1: an f16 scale `d`, an f16 minimum `m` and 32 nibbles, `w = d q + m`.
    Q4_1,
}

/// A weight `[outputs, inputs]`, row-major, as its file or a rounding left it.
#[derive(Clone, Debug, PartialEq)]
pub enum Weight {
    /// Plain numbers.
    F32(Vec<f32>),
    /// Plain numbers.
    Bf16(Vec<bf16>),
    /// Plain numbers.
    F16(Vec<f16>),
    /// Rows of blocks.
    Blocks(Blocks),
    /// Numbers that nobody has written down.
    Uniform(Uniform),
}

/// Random numbers by formula: number `i` is uniform in `-bound..bound`, a function of `(seed, i)` alone (SplitMix64). So a model
/// of any size needs no file, and a device makes its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Uniform {
    /// How they are kept: a plain format.
    pub kind: WeightKind,
    /// How many.
    pub len: usize,
    /// Which.
    pub seed: u64,
    /// How large.
    pub bound: f32,
}

/// Rows of blocks; the last block of a row is filled up with zeros where the inputs are no multiple of 32.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    kind: WeightKind,
    inputs: usize,
    bytes: Vec<u8>,
}

// === impl WeightKind ===

impl WeightKind {
    /// Bytes of one block; zero for formats that have none.
    pub fn block_bytes(self) -> usize {
        match self {
            WeightKind::F32 | WeightKind::Bf16 | WeightKind::F16 => 0,
            WeightKind::Q8_0 => 34,
            WeightKind::Q4_0 => 18,
            WeightKind::Q4_1 => 20,
        }
    }
}

impl fmt::Display for WeightKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WeightKind::F32 => "f32",
            WeightKind::Bf16 => "bf16",
            WeightKind::F16 => "f16",
            WeightKind::Q8_0 => "q8_0",
            WeightKind::Q4_0 => "q4_0",
            WeightKind::Q4_1 => "q4_1",
        })
    }
}

// === impl Uniform ===

impl Uniform {
    /// The numbers, before they are rounded to their format.
    pub fn numbers(&self) -> impl Iterator<Item = f32> + use<> {
        let Uniform {
            seed, bound, len, ..
        } = *self;
        (0..len as u64).map(move |i| {
            let steps = mix(seed.wrapping_add(i.wrapping_mul(GOLDEN))) >> 40;
            bound * (steps as f32 / (1 << 23) as f32 - 1.0)
        })
    }

    /// The numbers as they are kept.
    pub(super) fn written(&self) -> Weight {
        match self.kind {
            WeightKind::Bf16 => Weight::Bf16(self.numbers().map(bf16::from_f32).collect()),
            WeightKind::F16 => Weight::F16(self.numbers().map(f16::from_f32).collect()),
            _ => Weight::F32(self.numbers().collect()),
        }
    }
}

// === impl Blocks ===

impl Blocks {
    /// Blocks as a GGUF file holds them, row after row; `None` when `kind` has no blocks or the bytes are not whole rows.
    pub fn new(kind: WeightKind, inputs: usize, bytes: Vec<u8>) -> Option<Self> {
        let row = inputs.div_ceil(BLOCK) * kind.block_bytes();
        let whole = if row == 0 {
            bytes.is_empty() && kind.block_bytes() > 0
        } else {
            bytes.len().is_multiple_of(row)
        };
        whole.then_some(Blocks {
            kind,
            inputs,
            bytes,
        })
    }

    /// The format.
    pub fn kind(&self) -> WeightKind {
        self.kind
    }

    /// Numbers of a row.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.inputs.div_ceil(BLOCK) * self.kind.block_bytes()
    }

    /// The blocks, row after row.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Q8_0 of plain rows; `None` where a scale would not fit f16. The scale is rounded first, so that the integers are the nearest
    /// ones to what they will stand for.
    fn q8(values: &[f32], inputs: usize) -> Option<Self> {
        let mut bytes = Vec::with_capacity(values.len() / BLOCK * 34 + 34);
        for row in values.chunks(inputs.max(1)) {
            for block in row.chunks(BLOCK) {
                let largest = block.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
                let scale = f16::from_f32(largest / 127.0);
                if !scale.is_finite() {
                    return None;
                }
                bytes.extend(scale.to_le_bytes());
                let d = scale.to_f32();
                let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
                for i in 0..BLOCK {
                    let x = block.get(i).copied().unwrap_or(0.0);
                    let q = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
                    bytes.push(q as u8);
                }
            }
        }
        Some(Blocks {
            kind: WeightKind::Q8_0,
            inputs,
            bytes,
        })
    }

    fn widened(&self) -> Vec<f32> {
        let mut values = Vec::with_capacity(self.bytes.len() / self.kind.block_bytes() * BLOCK);
        if self.inputs == 0 {
            return values;
        }
        for row in self.bytes.chunks_exact(self.row_bytes()) {
            for (b, block) in row.chunks_exact(self.kind.block_bytes()).enumerate() {
                let count = BLOCK.min(self.inputs - b * BLOCK);
                let block = widen_block(self.kind, block);
                values.extend(&block[..count]);
            }
        }
        values
    }
}

/// The f16 at `at`.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The numbers of one block. Nibbles: byte `i` holds input `i` below and input `i + 16` above.
fn widen_block(kind: WeightKind, block: &[u8]) -> [f32; BLOCK] {
    let d = half_at(block, 0);
    let nibble = |codes: usize, i: usize| {
        let byte = block[codes + i % 16];
        f32::from(if i < 16 { byte & 15 } else { byte >> 4 })
    };
    match kind {
        WeightKind::Q8_0 => std::array::from_fn(|i| d * f32::from(block[2 + i] as i8)),
        WeightKind::Q4_0 => std::array::from_fn(|i| d * (nibble(2, i) - 8.0)),
        WeightKind::Q4_1 => {
            let m = half_at(block, 2);
            std::array::from_fn(|i| d * nibble(4, i) + m)
        }
        WeightKind::F32 | WeightKind::Bf16 | WeightKind::F16 => [0.0; BLOCK],
    }
}

// === impl Weight ===

impl From<Vec<f32>> for Weight {
    fn from(values: Vec<f32>) -> Self {
        Weight::F32(values)
    }
}

impl Default for Weight {
    fn default() -> Self {
        Weight::F32(Vec::new())
    }
}

impl Weight {
    /// The format.
    pub fn kind(&self) -> WeightKind {
        match self {
            Weight::F32(_) => WeightKind::F32,
            Weight::Bf16(_) => WeightKind::Bf16,
            Weight::F16(_) => WeightKind::F16,
            Weight::Blocks(blocks) => blocks.kind,
            Weight::Uniform(uniform) => uniform.kind,
        }
    }

    /// How many numbers it has.
    pub fn len(&self) -> usize {
        match self {
            Weight::F32(values) => values.len(),
            Weight::Bf16(values) => values.len(),
            Weight::F16(values) => values.len(),
            Weight::Blocks(blocks) => {
                blocks.bytes.len() / blocks.row_bytes().max(1) * blocks.inputs
            }
            Weight::Uniform(uniform) => uniform.len,
        }
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers in f32, row-major; every format widens to it exactly (Q4_1: rounded once).
    pub fn widened(&self) -> Cow<'_, [f32]> {
        match self {
            Weight::F32(values) => Cow::Borrowed(values),
            Weight::Bf16(values) => Cow::Owned(values.iter().map(|x| x.to_f32()).collect()),
            Weight::F16(values) => Cow::Owned(values.iter().map(|x| x.to_f32()).collect()),
            Weight::Blocks(blocks) => Cow::Owned(blocks.widened()),
            Weight::Uniform(uniform) => Cow::Owned(uniform.written().into_f32()),
        }
    }

    /// The numbers in f32, without a copy where they are.
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Weight::F32(values) => values,
            narrow => narrow.widened().into_owned(),
        }
    }

    /// Rows of `inputs` in another order: row `i` becomes row `place(i)`.
    pub fn reordered(self, inputs: usize, place: impl Fn(usize) -> usize) -> Self {
        match self {
            Weight::F32(values) => Weight::F32(reordered(&values, inputs, place)),
            Weight::Bf16(values) => Weight::Bf16(reordered(&values, inputs, place)),
            Weight::F16(values) => Weight::F16(reordered(&values, inputs, place)),
            Weight::Blocks(Blocks {
                kind,
                inputs,
                bytes,
            }) => {
                let row = inputs.div_ceil(BLOCK) * kind.block_bytes();
                Weight::Blocks(Blocks {
                    kind,
                    inputs,
                    bytes: reordered(&bytes, row, place),
                })
            }
            Weight::Uniform(uniform) => uniform.written().reordered(inputs, place),
        }
    }

    /// The same weight with its numbers rounded to `kind`, rows of `inputs`. What `kind` cannot hold (a number beyond f16's
    /// largest) stays as it is, and so does a weight for which `kind` is no rounding target (Q4_0, Q4_1).
    pub fn rounded(self, kind: WeightKind, inputs: usize) -> Self {
        if self.kind() == kind {
            return self;
        }
        if let (Weight::Uniform(uniform), 0) = (&self, kind.block_bytes()) {
            return Weight::Uniform(Uniform { kind, ..*uniform });
        }
        let values = self.widened();
        let rounded = match kind {
            WeightKind::F32 => Some(Weight::F32(values.into_owned())),
            WeightKind::Bf16 => {
                finite(values.iter().map(|x| bf16::from_f32(*x)), |x| x.is_finite())
                    .map(Weight::Bf16)
            }
            WeightKind::F16 => {
                finite(values.iter().map(|x| f16::from_f32(*x)), |x| x.is_finite()).map(Weight::F16)
            }
            WeightKind::Q8_0 => Blocks::q8(&values, inputs).map(Weight::Blocks),
            WeightKind::Q4_0 | WeightKind::Q4_1 => None,
        };
        match rounded {
            Some(rounded) => rounded,
            None => self,
        }
    }

    /// The smallest plain format that holds every number exactly.
    pub fn narrowed(values: Vec<f32>) -> Self {
        if values.iter().all(|x| bf16::from_f32(*x).to_f32() == *x) {
            Weight::Bf16(values.iter().map(|x| bf16::from_f32(*x)).collect())
        } else if values.iter().all(|x| f16::from_f32(*x).to_f32() == *x) {
            Weight::F16(values.iter().map(|x| f16::from_f32(*x)).collect())
        } else {
            Weight::F32(values)
        }
    }
}

/// Rows of `width` numbers in another order.
fn reordered<T: Copy>(rows: &[T], width: usize, place: impl Fn(usize) -> usize) -> Vec<T> {
    let mut turned = rows.to_vec();
    for (i, row) in rows.chunks_exact(width.max(1)).enumerate() {
        turned[place(i) * width..][..width].copy_from_slice(row);
    }
    turned
}

/// All of them, or none when one is not finite.
fn finite<T: Copy>(
    values: impl Iterator<Item = T>,
    is_finite: impl Fn(T) -> bool,
) -> Option<Vec<T>> {
    values.map(|x| is_finite(x).then_some(x)).collect()
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    reason = "a test may stop at the first broken promise"
)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn eight_bits_are_within_half_a_step() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for inputs in [1, 31, 32, 70] {
            let values: Vec<f32> = (0..5 * inputs)
                .map(|_| rng.random_range(-3.0..3.0))
                .collect();
            let rounded = Weight::F32(values.clone()).rounded(WeightKind::Q8_0, inputs);
            assert_eq!(rounded.kind(), WeightKind::Q8_0);
            assert_eq!(rounded.len(), values.len());
            let back = rounded.widened();
            for (row, back) in values.chunks(inputs).zip(back.chunks(inputs)) {
                for (block, back) in row.chunks(BLOCK).zip(back.chunks(BLOCK)) {
                    let step = block.iter().fold(0.0_f32, |m, x| m.max(x.abs())) / 127.0;
                    for (x, y) in block.iter().zip(back) {
                        assert!((x - y).abs() <= 0.58 * step, "{x} became {y}, step {step}");
                    }
                }
            }
        }
    }

    #[test]
    fn nibbles_are_where_the_format_puts_them() {
        let mut bytes = f16::from_f32(0.5).to_le_bytes().to_vec();
        bytes.extend(f16::from_f32(-1.0).to_le_bytes());
        bytes.extend((0..16_u8).map(|i| i | ((15 - i) << 4)));
        let weight = Weight::Blocks(Blocks::new(WeightKind::Q4_1, 32, bytes).unwrap());
        let values = weight.widened();
        assert_eq!(values[3], 0.5 * 3.0 - 1.0);
        assert_eq!(values[16 + 3], 0.5 * 12.0 - 1.0);
        assert!(Blocks::new(WeightKind::Q4_1, 32, vec![0; 21]).is_none());
        assert!(Blocks::new(WeightKind::F32, 32, vec![0; 128]).is_none());
    }

    #[test]
    fn what_a_format_cannot_hold_stays() {
        let huge = Weight::F32(vec![1.0, 1e30]);
        assert_eq!(huge.clone().rounded(WeightKind::F16, 2), huge);
        assert_eq!(huge.clone().rounded(WeightKind::Q8_0, 2), huge);
        assert_eq!(huge.rounded(WeightKind::Bf16, 2).kind(), WeightKind::Bf16);
        assert_eq!(Weight::narrowed(vec![1.5, -2.0]).kind(), WeightKind::Bf16);
        assert_eq!(
            Weight::narrowed(vec![1.0 + 1.0 / 1024.0]).kind(),
            WeightKind::F16
        );
        assert_eq!(Weight::narrowed(vec![0.1]).kind(), WeightKind::F32);
    }

    #[test]
    fn rows_change_places_whole() {
        let values: Vec<f32> = (0..3 * 64).map(|i| (i / 64 * 64) as f32).collect();
        let turned = Weight::F32(values)
            .rounded(WeightKind::Q8_0, 64)
            .reordered(64, |row| (row + 1) % 3);
        let back = turned.widened();
        for (row, expected) in [(0, 128.0), (1, 0.0), (2, 64.0)] {
            assert!((back[row * 64 + 5] - expected).abs() < 0.1, "row {row}");
        }
    }
}
