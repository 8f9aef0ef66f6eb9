//! The tensor table of a GGUF, and the widening of its block formats to f32 (the blocks are candle's).

use std::collections::BTreeMap;
use std::io::Read;

use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;

use super::header::Header;
use super::{GgufError, Metadata};
use crate::ops::WeightKind;

/// Blocks that are read at a time: small beside any tensor, large beside a system call.
pub(super) const CHUNK_BLOCKS: usize = 1 << 14;
const MAX_NAME_BYTES: u64 = 256;
const MAX_DIMENSIONS: u32 = 4;
/// Of every tensor's place, where the metadata says nothing else.
pub(super) const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 16;

/// How a tensor's values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorType(GgmlDType);

impl TensorType {
    /// The type of ggml's number, if its values can be widened. Q8_1 and Q8_K exist in memory only.
    fn from_ggml(number: u32) -> Option<Self> {
        Some(Self(match number {
            0 => GgmlDType::F32,
            1 => GgmlDType::F16,
            2 => GgmlDType::Q4_0,
            3 => GgmlDType::Q4_1,
            6 => GgmlDType::Q5_0,
            7 => GgmlDType::Q5_1,
            8 => GgmlDType::Q8_0,
            10 => GgmlDType::Q2K,
            11 => GgmlDType::Q3K,
            12 => GgmlDType::Q4K,
            13 => GgmlDType::Q5K,
            14 => GgmlDType::Q6K,
            30 => GgmlDType::BF16,
            _ => return None,
        }))
    }

    /// Whether values are plain f32.
    pub fn is_f32(self) -> bool {
        self.0 == GgmlDType::F32
    }

    /// The format in which operations use such a tensor as it is stored, if they can.
    pub(super) fn stored(self) -> Option<WeightKind> {
        match self.0 {
            GgmlDType::F32 => Some(WeightKind::F32),
            GgmlDType::F16 => Some(WeightKind::F16),
            GgmlDType::BF16 => Some(WeightKind::Bf16),
            GgmlDType::Q8_0 => Some(WeightKind::Q8_0),
            GgmlDType::Q4_0 => Some(WeightKind::Q4_0),
            GgmlDType::Q4_1 => Some(WeightKind::Q4_1),
            _ => None,
        }
    }

    pub(super) fn block_elements(self) -> usize {
        self.0.block_size()
    }

    pub(super) fn block_bytes(self) -> usize {
        self.0.type_size()
    }

    /// Appends the values of whole blocks to `values`.
    pub(super) fn widen(self, bytes: &[u8], values: &mut Vec<f32>) -> candle_core::Result<()> {
        if self.0 == GgmlDType::F32 {
            values.extend(
                bytes
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            );
            return Ok(());
        }
        let elements = bytes.len() / self.block_bytes() * self.block_elements();
        match self.0.from_data(bytes.into()).dequantize(elements)? {
            CpuStorage::F32(chunk) => values.extend_from_slice(&chunk),
            _ => candle_core::bail!("widening {:?} gave no f32 values", self.0),
        }
        Ok(())
    }
}

impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// One entry of the tensor table, checked: its bytes lie within the file and overlap no other tensor's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Dimensions, slowest first: `[out, in]` for a matrix (the file stores them the other way round).
    pub shape: Vec<usize>,
    /// How the values are stored.
    pub kind: TensorType,
    /// Absolute position in the file.
    pub(super) start: u64,
    pub(super) bytes: u64,
}

impl TensorInfo {
    /// Number of values.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Bytes whose start is aligned for every block format, which candle asserts. A `Vec<u8>` promises no alignment.
pub(super) struct AlignedBytes {
    bytes: Vec<u8>,
    offset: usize,
}

const BLOCK_ALIGNMENT: usize = 16;

impl AlignedBytes {
    pub(super) fn new(len: usize) -> Self {
        let bytes = vec![0; len + BLOCK_ALIGNMENT];
        let offset = bytes.as_ptr().align_offset(BLOCK_ALIGNMENT);
        Self { bytes, offset }
    }

    pub(super) fn prefix(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.offset..self.offset + len]
    }
}

/// Reads the table and checks each entry against the file's size and against the others.
pub(super) fn read_table<R: Read>(
    header: &mut Header<'_, R>,
    count: u64,
    metadata: &Metadata,
    file_bytes: u64,
) -> Result<BTreeMap<String, TensorInfo>, GgufError> {
    let alignment = metadata
        .size("general.alignment")?
        .map_or(DEFAULT_ALIGNMENT, |value| value as u64);
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        let rule = format!("is {alignment}, it must be a power of two of at most {MAX_ALIGNMENT}");
        return Err(metadata.error("general.alignment", rule));
    }
    let mut tensors = BTreeMap::new();
    for index in 0..count {
        header.place = format!("tensor {index} of {count}");
        let name = header.string(MAX_NAME_BYTES)?;
        header.place = format!("tensor {name:?}");
        let info = read_entry(header, alignment)?;
        if tensors.insert(name, info).is_some() {
            return Err(header.error("stands twice"));
        }
    }
    let data_start = header.position().next_multiple_of(alignment);
    place_within(header, &mut tensors, data_start, file_bytes)?;
    Ok(tensors)
}

/// One entry; `start` is still relative to the data section.
fn read_entry<R: Read>(
    header: &mut Header<'_, R>,
    alignment: u64,
) -> Result<TensorInfo, GgufError> {
    let dimensions = u32::from_le_bytes(header.bytes()?);
    if dimensions == 0 || dimensions > MAX_DIMENSIONS {
        return Err(header.error(format!(
            "has {dimensions} dimensions, 1 to {MAX_DIMENSIONS} are allowed"
        )));
    }
    let mut shape = Vec::with_capacity(dimensions as usize);
    let mut elements: u64 = 1;
    for _ in 0..dimensions {
        let dimension = u64::from_le_bytes(header.bytes()?);
        elements = match elements.checked_mul(dimension) {
            Some(product) if product > 0 && product <= i64::MAX as u64 => product,
            _ => {
                return Err(header.error(format!(
                    "dimension {dimension} makes the number of values zero or overflow"
                )));
            }
        };
        shape.push(dimension as usize);
    }
    let number = u32::from_le_bytes(header.bytes()?);
    let kind = TensorType::from_ggml(number).ok_or_else(|| {
        header.error(format!(
            "type {number} is not supported; F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K are"
        ))
    })?;
    let block = kind.block_elements() as u64;
    if !(shape[0] as u64).is_multiple_of(block) {
        return Err(header.error(format!(
            "a row of {} values is no multiple of {kind}'s block of {block}",
            shape[0]
        )));
    }
    shape.reverse();
    let bytes = (elements / block)
        .checked_mul(kind.block_bytes() as u64)
        .ok_or_else(|| header.error("its size in bytes overflows"))?;
    let start = u64::from_le_bytes(header.bytes()?);
    if !start.is_multiple_of(alignment) {
        return Err(header.error(format!(
            "offset {start} is no multiple of the alignment {alignment}"
        )));
    }
    Ok(TensorInfo {
        shape,
        kind,
        start,
        bytes,
    })
}

/// Makes offsets absolute; refuses what reaches beyond the file and what overlaps.
fn place_within<R: Read>(
    header: &mut Header<'_, R>,
    tensors: &mut BTreeMap<String, TensorInfo>,
    data_start: u64,
    file_bytes: u64,
) -> Result<(), GgufError> {
    for (name, info) in tensors.iter_mut() {
        let start = info.start.checked_add(data_start);
        let end = start.and_then(|start| start.checked_add(info.bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_bytes => info.start = start,
            _ => {
                header.place = format!("tensor {name:?}");
                return Err(header.error(format!(
                    "{} bytes at offset {} end beyond the file, which has {file_bytes}; the file may be cut short",
                    info.bytes, info.start
                )));
            }
        }
    }
    let mut by_place: Vec<_> = tensors.iter().collect();
    by_place.sort_by_key(|(_, info)| info.start);
    for pair in by_place.windows(2) {
        let ((first, before), (second, after)) = (pair[0], pair[1]);
        if before.start + before.bytes > after.start {
            header.place = format!("tensor {second:?}");
            return Err(header.error(format!("overlaps tensor {first:?}")));
        }
    }
    Ok(())
}
