//! GGUF files, version 2 and 3: metadata and tensors, read within bounds. A file is a stranger's: every length in it is checked
//! against what is left of the file before anything is allocated, every product against overflow, every name against duplicates.
//! candle's reader allocates what the file says, so only its block formats are used here. Knows no model: which tensors and keys
//! there should be is the loader's business.
//!
//! Format: `docs/gguf.md` of ggml-org/ggml.

mod header;
mod metadata;
mod tensor;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

pub use metadata::{Array, Metadata, Value};
pub use tensor::{TensorInfo, TensorType};

use header::Header;

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
        let place = || format!("tensor {name:?}");
        let info = self
            .tensors
            .get(name)
            .ok_or_else(|| GgufError::rule(&self.file, place(), "no such tensor"))?;
        let io = |source| GgufError::io(&self.file, source);
        self.reader.seek(SeekFrom::Start(info.start)).map_err(io)?;
        let mut values = Vec::with_capacity(info.elements());
        let mut bytes = tensor::AlignedBytes::new(tensor::CHUNK_BLOCKS * info.kind.block_bytes());
        let mut left = info.elements() / info.kind.block_elements();
        while left > 0 {
            let blocks = left.min(tensor::CHUNK_BLOCKS);
            let chunk = bytes.prefix(blocks * info.kind.block_bytes());
            self.reader.read_exact(chunk).map_err(io)?;
            info.kind
                .widen(chunk, &mut values)
                .map_err(|source| GgufError::rule(&self.file, place(), source.to_string()))?;
            left -= blocks;
        }
        Ok(values)
    }
}
