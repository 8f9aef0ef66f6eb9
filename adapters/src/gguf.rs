//! GGUF files: versions 2 and 3 read, version 3 written, models in and adapters out.
//!
//! Metadata and tensors are read within bounds. A file is a stranger's: every length in it is checked
//! against what is left of the file before anything is allocated, every product against overflow, every name against duplicates.
//! candle's reader allocates what the file says, so only its block formats are used here. Knows no model: which tensors and keys
//! there should be is the loader's business.
//!
//! Format: `docs/gguf.md` of ggml-org/ggml.

mod header;
mod lora;
#[cfg(test)]
mod lora_tests;
mod metadata;
mod tensor;
#[cfg(test)]
mod tests;
mod write;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

pub use lora::{LoraBase, NotInGguf, half_of_pair, write_lora};
pub use metadata::{Array, Metadata, Value};
pub use tensor::{TensorInfo, TensorType};
pub use write::{NewTensor, NewValue, write};

use half::{bf16, f16};
use header::Header;

use crate::ops::{Blocks, Weight, WeightKind};

/// A GGUF file that cannot be used: which file, where in it, and which rule it breaks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The operating system refused a read.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file breaks a rule of its format, or asks for something unsupported.
    #[error("{file}: {place}: {rule}")]
    Rule {
        /// The file.
        file: String,
        /// The header, a metadata key or a tensor.
        place: String,
        /// The rule.
        rule: String,
    },
}

impl GgufError {
    pub(crate) fn rule(file: &str, place: impl Into<String>, rule: impl Into<String>) -> Self {
        Self::Rule {
            file: file.to_owned(),
            place: place.into(),
            rule: rule.into(),
        }
    }

    fn io(file: &str, source: std::io::Error) -> Self {
        Self::Io {
            file: file.to_owned(),
            source,
        }
    }
}

/// An open GGUF file whose header has been read and checked. Tensors are read one at a time, so that memory stays near the size of
/// what the caller keeps.
#[derive(Debug)]
pub struct Gguf<R = BufReader<File>> {
    file: String,
    reader: R,
    metadata: Metadata,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Gguf {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`GgufError`], naming file, key or tensor, and rule.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let file = path.display().to_string();
        let handle = File::open(path).map_err(|source| GgufError::io(&file, source))?;
        Self::read(&file, BufReader::with_capacity(1 << 20, handle))
    }
}

impl<R: Read + Seek> Gguf<R> {
    /// Reads the header of a GGUF from any seekable source; `file` is its name in errors.
    ///
    /// # Errors
    /// [`GgufError`], naming file, key or tensor, and rule.
    pub fn read(file: &str, mut reader: R) -> Result<Self, GgufError> {
        let io = |source| GgufError::io(file, source);
        let len = reader.seek(SeekFrom::End(0)).map_err(io)?;
        reader.rewind().map_err(io)?;
        let mut header = Header::new(file, &mut reader, len);
        let (tensor_count, key_count) = header.counts()?;
        let metadata = Metadata::read(&mut header, key_count)?;
        let tensors = tensor::read_table(&mut header, tensor_count, &metadata, len)?;
        Ok(Self {
            file: file.to_owned(),
            reader,
            metadata,
            tensors,
        })
    }

    /// The metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensor table, by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Reads one tensor and widens it to f32, row-major in the order of [`TensorInfo::shape`].
    ///
    /// # Errors
    /// [`GgufError`] when there is no such tensor or the file cannot be read.
    pub fn dequantize(&mut self, name: &str) -> Result<Vec<f32>, GgufError> {
        let (info, place) = self.info(name)?;
        let file = self.file.clone();
        let mut values = Vec::with_capacity(info.elements());
        self.chunks(&info, |chunk| {
            info.kind
                .widen(chunk, &mut values)
                .map_err(|source| GgufError::rule(&file, &place, source.to_string()))
        })?;
        Ok(values)
    }

    /// Reads one tensor as it is stored where operations can use that (plain types, Q8_0, Q4_0, Q4_1), and widened to f32 otherwise.
    ///
    /// # Errors
    /// [`GgufError`] when there is no such tensor or the file cannot be read.
    pub fn weight(&mut self, name: &str) -> Result<Weight, GgufError> {
        let (info, _) = self.info(name)?;
        let Some(kind) = info.kind.stored() else {
            return self.dequantize(name).map(Weight::F32);
        };
        let mut bytes = Vec::with_capacity(info.bytes as usize);
        self.chunks(&info, |chunk| {
            bytes.extend_from_slice(chunk);
            Ok(())
        })?;
        let halves = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        let inputs = info.shape.last().copied().unwrap_or(0);
        match kind {
            WeightKind::Bf16 => Ok(Weight::Bf16(halves().map(bf16::from_le_bytes).collect())),
            WeightKind::F16 => Ok(Weight::F16(halves().map(f16::from_le_bytes).collect())),
            WeightKind::F32 => self.dequantize(name).map(Weight::F32),
            kind => Blocks::new(kind, inputs, bytes)
                .map(Weight::Blocks)
                .ok_or_else(|| self.no_blocks(name)),
        }
    }

    fn no_blocks(&self, name: &str) -> GgufError {
        let place = format!("tensor {name:?}");
        GgufError::rule(&self.file, place, "is not made of whole rows of blocks")
    }

    fn info(&self, name: &str) -> Result<(TensorInfo, String), GgufError> {
        let place = format!("tensor {name:?}");
        match self.tensors.get(name) {
            Some(info) => Ok((info.clone(), place)),
            None => Err(GgufError::rule(&self.file, place, "no such tensor")),
        }
    }

    /// Reads a tensor's blocks, many at a time.
    fn chunks(
        &mut self,
        info: &TensorInfo,
        mut take: impl FnMut(&[u8]) -> Result<(), GgufError>,
    ) -> Result<(), GgufError> {
        let io = |source| GgufError::io(&self.file, source);
        self.reader.seek(SeekFrom::Start(info.start)).map_err(io)?;
        let mut bytes = tensor::AlignedBytes::new(tensor::CHUNK_BLOCKS * info.kind.block_bytes());
        let mut left = info.elements() / info.kind.block_elements();
        while left > 0 {
            let blocks = left.min(tensor::CHUNK_BLOCKS);
            let chunk = bytes.prefix(blocks * info.kind.block_bytes());
            self.reader.read_exact(chunk).map_err(io)?;
            take(chunk)?;
            left -= blocks;
        }
        Ok(())
    }
}
