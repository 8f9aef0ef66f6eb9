//! A cursor over the front of a GGUF file that cannot read past the file's end, nor past the size any honest header has.

use std::io::Read;

use super::GgufError;

/// No known header is near this: a vocabulary of 256k tokens with merges takes about 16 MiB.
const MAX_HEADER_BYTES: u64 = 256 << 20;
/// Bounds of counts: the largest models of our families have a few thousand tensors and about a hundred keys.
const MAX_TENSORS: u64 = 1 << 17;
const MAX_KEYS: u64 = 1 << 16;

/// The smallest entry of the tensor table (empty name, no dimension) and of the metadata (empty key, one byte).
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 4 + 8;
const MIN_KEY_BYTES: u64 = 8 + 4 + 1;

pub(super) struct Header<'a, R> {
    file: &'a str,
    reader: &'a mut R,
    position: u64,
    limit: u64,
    /// What is being read, for errors.
    pub(super) place: String,
}

impl<'a, R: Read> Header<'a, R> {
    pub(super) fn new(file: &'a str, reader: &'a mut R, file_bytes: u64) -> Self {
        Self {
            file,
            reader,
            position: 0,
            limit: file_bytes.min(MAX_HEADER_BYTES),
            place: "header".to_owned(),
        }
    }

    pub(super) fn error(&self, rule: impl Into<String>) -> GgufError {
        GgufError::rule(self.file, self.place.clone(), rule)
    }

    pub(super) fn file_name(&self) -> &str {
        self.file
    }

    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Magic and version, then the numbers of tensors and of metadata keys.
    pub(super) fn counts(&mut self) -> Result<(u64, u64), GgufError> {
        if &self.bytes()? != b"GGUF" {
            return Err(self.error("does not begin with the magic bytes GGUF"));
        }
        match u32::from_le_bytes(self.bytes()?) {
            2 | 3 => {}
            other if matches!(other.swap_bytes(), 1..=3) => {
                return Err(self.error("is big-endian; only little-endian files are read"));
            }
            other => {
                return Err(self.error(format!(
                    "version {other} is not supported; versions 2 and 3 are"
                )));
            }
        }
        let tensors = u64::from_le_bytes(self.bytes()?);
        let keys = u64::from_le_bytes(self.bytes()?);
        self.bound("tensors", tensors, MIN_TENSOR_BYTES, MAX_TENSORS)?;
        self.bound("metadata keys", keys, MIN_KEY_BYTES, MAX_KEYS)?;
        Ok((tensors, keys))
    }

    /// Refuses a count whose entries, at `min_bytes` each, cannot fit into what is left of the file.
    pub(super) fn bound(
        &self,
        what: &str,
        count: u64,
        min_bytes: u64,
        max: u64,
    ) -> Result<(), GgufError> {
        let left = self.limit - self.position;
        if count > max {
            return Err(self.error(format!("{count} {what}, at most {max} are allowed")));
        }
        if count
            .checked_mul(min_bytes)
            .is_none_or(|bytes| bytes > left)
        {
            return Err(self.error(format!(
                "{count} {what} do not fit into the {left} bytes that are left"
            )));
        }
        Ok(())
    }

    pub(super) fn bytes<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn fill(&mut self, bytes: &mut [u8]) -> Result<(), GgufError> {
        let left = self.limit - self.position;
        if bytes.len() as u64 > left {
            return Err(self.error(format!(
                "needs {} more bytes, the file has {left} left",
                bytes.len()
            )));
        }
        self.reader
            .read_exact(bytes)
            .map_err(|source| GgufError::io(self.file, source))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    /// A string: its length as u64, then UTF-8.
    pub(super) fn string(&mut self, max_bytes: u64) -> Result<String, GgufError> {
        let len = u64::from_le_bytes(self.bytes()?);
        self.bound("bytes of a string", len, 1, max_bytes)?;
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| self.error("a string is not UTF-8"))
    }
}
