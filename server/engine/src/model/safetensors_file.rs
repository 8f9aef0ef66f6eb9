//! One safetensors file, read a tensor at a time: the safetensors crate wants the whole file in memory (or mapped, which a writer
//! elsewhere could change under us). The header's rules are the crate's, checked here against the file's size before allocating.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use espalier_adapters::ops::Weight;
use espalier_adapters::strict_json;
use half::{bf16, f16};
use serde_json::Value;

use super::error::ModelError;

/// A header of ten thousand tensors is about 1 MB.
const MAX_HEADER_BYTES: u64 = 32 << 20;
const CHUNK_BYTES: usize = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    F32,
    F16,
    Bf16,
}

impl Kind {
    fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Room for `count` numbers.
    fn empty(self, count: usize) -> Weight {
        match self {
            Self::F32 => Weight::F32(Vec::with_capacity(count)),
            Self::F16 => Weight::F16(Vec::with_capacity(count)),
            Self::Bf16 => Weight::Bf16(Vec::with_capacity(count)),
        }
    }
}

/// Appends the numbers that `bytes` hold, in the type that `weight` has.
fn append(weight: &mut Weight, bytes: &[u8]) {
    let halves = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match weight {
        Weight::F32(values) => values.extend(
            bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        ),
        Weight::F16(values) => values.extend(halves().map(f16::from_le_bytes)),
        Weight::Bf16(values) => values.extend(halves().map(bf16::from_le_bytes)),
        // No safetensors type is made of blocks.
        Weight::Blocks(_) | Weight::Uniform(_) => {}
    }
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) shape: Vec<usize>,
    kind: Kind,
    start: u64,
    bytes: u64,
}

/// An open file whose header has been checked.
#[derive(Debug)]
pub(super) struct SafetensorsFile {
    path: PathBuf,
    reader: BufReader<File>,
    pub(super) tensors: BTreeMap<String, Entry>,
}

impl SafetensorsFile {
    pub(super) fn open(path: &Path) -> Result<Self, ModelError> {
        let io = |source| ModelError::io(path, source);
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let mut reader = BufReader::new(file);
        let refuse = |rule: String| ModelError::file(path, rule);
        if len < 8 {
            return Err(refuse(format!(
                "has {len} bytes, the length of the header alone takes 8"
            )));
        }
        let mut size = [0; 8];
        reader.read_exact(&mut size).map_err(io)?;
        let header_bytes = u64::from_le_bytes(size);
        if header_bytes > MAX_HEADER_BYTES || header_bytes > len - 8 {
            let limit = MAX_HEADER_BYTES.min(len - 8);
            return Err(refuse(format!(
                "the header says it has {header_bytes} bytes, at most {limit} are possible"
            )));
        }
        let mut header = vec![0; header_bytes as usize];
        reader.read_exact(&mut header).map_err(io)?;
        let parsed = strict_json::parse(&header)
            .map_err(|error| refuse(format!("the header is no JSON: {error}")))?;
        let data = 8 + header_bytes;
        let tensors = entries(&parsed, data, len - data).map_err(refuse)?;
        Ok(Self {
            path: path.to_path_buf(),
            reader,
            tensors,
        })
    }

    /// One tensor in its own type; `name` must be one of `tensors`.
    pub(super) fn read(&mut self, name: &str) -> Result<Weight, ModelError> {
        let missing = || ModelError::file(&self.path, format!("tensor {name:?} is missing"));
        let entry = self.tensors.get(name).ok_or_else(missing)?;
        let io = |source| ModelError::io(&self.path, source);
        self.reader.seek(SeekFrom::Start(entry.start)).map_err(io)?;
        let mut values = entry
            .kind
            .empty((entry.bytes / entry.kind.bytes()) as usize);
        let mut chunk = vec![0; CHUNK_BYTES.min(entry.bytes as usize)];
        let mut left = entry.bytes as usize;
        while left > 0 {
            let now = left.min(CHUNK_BYTES);
            self.reader.read_exact(&mut chunk[..now]).map_err(io)?;
            append(&mut values, &chunk[..now]);
            left -= now;
        }
        Ok(values)
    }
}

/// The header's tensors, placed: offsets in order, without holes or overlaps, and exactly as long as the data.
fn entries(
    header: &Value,
    data_start: u64,
    data_bytes: u64,
) -> Result<BTreeMap<String, Entry>, String> {
    let object = header.as_object().ok_or("the header is no JSON object")?;
    let mut tensors = BTreeMap::new();
    for (name, value) in object.iter().filter(|(name, _)| *name != "__metadata__") {
        let entry = entry(value, data_start, data_bytes)
            .map_err(|rule| format!("tensor {name:?}: {rule}"))?;
        tensors.insert(name.clone(), entry);
    }
    let mut by_place: Vec<_> = tensors.iter().collect();
    by_place.sort_by_key(|(_, entry)| (entry.start, entry.bytes));
    let mut expected = data_start;
    for (name, entry) in by_place {
        if entry.start != expected {
            return Err(format!(
                "tensor {name:?}: begins at byte {}, the one before ends at {expected}",
                entry.start
            ));
        }
        expected += entry.bytes;
    }
    if expected != data_start + data_bytes {
        return Err(format!(
            "the tensors end at byte {expected}, the file at {}",
            data_start + data_bytes
        ));
    }
    Ok(tensors)
}

fn entry(value: &Value, data_start: u64, data_bytes: u64) -> Result<Entry, String> {
    let kind = match value.get("dtype").and_then(Value::as_str) {
        Some("F32") => Kind::F32,
        Some("F16") => Kind::F16,
        Some("BF16") => Kind::Bf16,
        other => {
            return Err(format!(
                "dtype {} is not supported; F32, F16 and BF16 are",
                other.unwrap_or("is missing: it")
            ));
        }
    };
    let numbers = |field: &str| -> Option<Vec<u64>> {
        value
            .get(field)?
            .as_array()?
            .iter()
            .map(Value::as_u64)
            .collect()
    };
    let shape = numbers("shape").ok_or("shape must be a list of sizes")?;
    let elements = shape
        .iter()
        .try_fold(1u64, |product, size| product.checked_mul(*size));
    let bytes = elements.and_then(|elements| elements.checked_mul(kind.bytes()));
    let bytes = bytes.ok_or_else(|| format!("shape {shape:?} overflows"))?;
    match numbers("data_offsets").as_deref() {
        Some(&[start, end]) if start <= end && end <= data_bytes => {
            if end - start != bytes {
                return Err(format!(
                    "shape {shape:?} takes {bytes} bytes, its offsets hold {}",
                    end - start
                ));
            }
            let shape = shape.into_iter().map(|size| size as usize).collect();
            Ok(Entry {
                shape,
                kind,
                start: data_start + start,
                bytes,
            })
        }
        Some(&[start, end]) => Err(format!(
            "offsets {start} to {end} lie outside of the data, which has {data_bytes} bytes"
        )),
        _ => Err("data_offsets must be two positions".to_owned()),
    }
}
