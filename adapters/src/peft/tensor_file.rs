//! The safetensors container: from owned, untrusted bytes to named tensors whose offsets are known to be right.
//!
//! Written here and not taken from the `safetensors` crate because we want our own limit on the header before it is parsed, keys
//! given twice refused, and every bad tensor named, not the first. This file must not know what the tensors mean.
//!
//! Format: u64 little-endian header length, a JSON header from names to `{dtype, shape, data_offsets}`, then the data,
//! which the tensors tile without gap or overlap.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use half::{bf16, f16};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::Checker;
use super::config_file::cut;
use crate::report::Rule;
use crate::version::AdapterArtifact;
use crate::weights::Numbers;

const FILE: &str = AdapterArtifact::WEIGHTS_FILE;

/// The data types that adapters come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "F32" => Some(Self::F32),
            "F16" => Some(Self::F16),
            "BF16" => Some(Self::Bf16),
            _ => None,
        }
    }

    const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// A tensor whose bytes are exactly as long as its shape says.
pub(super) struct Tensor<'a> {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    dtype: Dtype,
    data: &'a [u8],
}

impl Tensor<'_> {
    /// The values as they are stored.
    pub(super) fn numbers(&self) -> Numbers {
        let pairs = || self.data.as_chunks::<2>().0.iter();
        let fours = || self.data.as_chunks::<4>().0.iter();
        match self.dtype {
            Dtype::F32 => Numbers::F32(fours().map(|b| f32::from_le_bytes(*b)).collect()),
            Dtype::F16 => Numbers::F16(pairs().map(|b| f16::from_le_bytes(*b)).collect()),
            Dtype::Bf16 => Numbers::Bf16(pairs().map(|b| bf16::from_le_bytes(*b)).collect()),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The header's tensors in file order, names unique.
struct Header(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from tensor names to dtype, shape and data_offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut names, mut entries) = (HashSet::new(), Vec::new());
                while let Some(name) = map.next_key::<String>()? {
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format!("'{}' is given twice", cut(&name))));
                    }
                    if name == "__metadata__" {
                        map.next_value::<BTreeMap<String, String>>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// The tensors of a file.
pub(super) struct Tensors<'a> {
    /// Those whose type and bytes are right.
    pub(super) sound: Vec<Tensor<'a>>,
    /// Names of the others, for which a finding was left.
    pub(super) unsound: Vec<String>,
}

/// Every tensor of the file. `None` when the container itself cannot be read; findings say why.
pub(super) fn read<'a>(bytes: &'a [u8], check: &mut Checker) -> Option<Tensors<'a>> {
    let limit = check.limits.max_weights_bytes;
    if bytes.len() > limit {
        let found = format!("{} bytes", bytes.len());
        let next = "use a lower rank or f16, or have the server's limit raised";
        check.error(
            FILE,
            Rule::Limit,
            found,
            format!("at most {limit} bytes"),
            next,
        );
        return None;
    }
    if let Some(found) = other_format(bytes) {
        let next = "save the adapter with safe_serialization=True (PEFT's default) and upload adapter_model.safetensors";
        check.error(FILE, Rule::FileFormat, found, "safetensors", next);
        return None;
    }
    let (header, data) = split(bytes, check)?;
    let Header(entries) = match serde_json::from_slice(header) {
        Ok(header) => header,
        Err(reason) => {
            let next = "save the file again; this one is damaged";
            check.error(
                FILE,
                Rule::Header,
                reason.to_string(),
                "a safetensors header",
                next,
            );
            return None;
        }
    };
    if entries.is_empty() {
        let next = "save the adapter after adding it to the model";
        check.error(
            FILE,
            Rule::Header,
            "no tensors",
            "the adapter's tensors",
            next,
        );
    }
    tiling(&entries, data.len(), check);
    let (mut sound, mut unsound) = (Vec::new(), Vec::new());
    for (name, entry) in entries {
        match tensor(&name, &entry, data, check) {
            Some((shape, dtype, data)) => sound.push(Tensor {
                name,
                shape,
                dtype,
                data,
            }),
            None => unsound.push(name),
        }
    }
    Some(Tensors { sound, unsound })
}

/// What the file is when its first bytes say that it is something else. A pickle is never opened: it is a program.
fn other_format(bytes: &[u8]) -> Option<&'static str> {
    // The length of a safetensors header can look like another format's first bytes; its brace then tells.
    if bytes.get(8) == Some(&b'{') {
        return None;
    }
    let starts = |magic: &[u8]| bytes.starts_with(magic);
    if matches!(bytes, [0x80, 2..=5, ..]) {
        Some("a Python pickle (.bin, .pt), which may run code when it is opened")
    } else if starts(b"PK\x03\x04") {
        Some("a zip archive (.bin, .pt, .npz), which may hold a Python pickle")
    } else if starts(b"GGUF") {
        Some("a GGUF file")
    } else if starts(b"\x1f\x8b") {
        Some("a gzip archive")
    } else if starts(b"version https://git-lfs") {
        Some("a Git LFS pointer, not the file itself (run git lfs pull)")
    } else {
        None
    }
}

fn split<'a>(bytes: &'a [u8], check: &mut Checker) -> Option<(&'a [u8], &'a [u8])> {
    let next = "save or upload the file again; this one is cut or damaged";
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        let found = format!("{} bytes", bytes.len());
        check.error(
            FILE,
            Rule::Header,
            found,
            "at least 8 bytes of header length",
            next,
        );
        return None;
    };
    let length = u64::from_le_bytes(*length);
    let limit = check.limits.max_header_bytes;
    if length > limit as u64 {
        let found = format!("a header of {length} bytes");
        check.error(FILE, Rule::Limit, found, format!("at most {limit}"), next);
        return None;
    }
    // The limit is a usize, so the length fits one.
    let split = usize::try_from(length)
        .ok()
        .and_then(|length| rest.split_at_checked(length));
    if split.is_none() {
        let found = format!(
            "a header of {length} bytes in a file with {} after it",
            rest.len()
        );
        check.error(FILE, Rule::Header, found, "the whole header", next);
    }
    split
}

/// Tensors must cover the data once and whole: bytes between them could hide anything, overlaps make one tensor another.
fn tiling(entries: &[(String, Entry)], data: usize, check: &mut Checker) {
    let mut spans: Vec<_> = entries
        .iter()
        .map(|(name, e)| (e.data_offsets, name))
        .collect();
    spans.sort_unstable();
    let next = "save the file again; this one is damaged";
    let mut at = 0;
    for ([begin, end], name) in spans {
        if begin != at || end < begin {
            let found = format!("data_offsets [{begin}, {end}]");
            check.error(
                cut(name),
                Rule::Header,
                found,
                format!("to begin at {at}"),
                next,
            );
        }
        at = at.max(end);
    }
    if at != data as u64 {
        let found = format!("{data} bytes of data");
        check.error(
            FILE,
            Rule::Header,
            found,
            format!("{at} by the header"),
            next,
        );
    }
}

/// The shape, type and bytes of one tensor, when they agree.
fn tensor<'a>(
    name: &str,
    entry: &Entry,
    data: &'a [u8],
    check: &mut Checker,
) -> Option<(Vec<usize>, Dtype, &'a [u8])> {
    let Some(dtype) = Dtype::parse(&entry.dtype) else {
        let next = "save the adapter in float32, float16 or bfloat16";
        check.error(
            cut(name),
            Rule::Dtype,
            cut(&entry.dtype),
            "F32, F16 or BF16",
            next,
        );
        return None;
    };
    let sizes = entry.shape.iter().map(|d| usize::try_from(*d).ok());
    let shape: Option<Vec<usize>> = sizes.collect();
    let length = shape
        .as_ref()
        .and_then(|s| s.iter().try_fold(dtype.bytes(), |n, d| n.checked_mul(*d)));
    let [begin, end] = entry.data_offsets.map(|o| usize::try_from(o).ok());
    let bytes = begin.zip(end).and_then(|(begin, end)| data.get(begin..end));
    match (shape, bytes) {
        (Some(shape), Some(bytes)) if length == Some(bytes.len()) => Some((shape, dtype, bytes)),
        _ => {
            let found = format!(
                "data_offsets {:?} of {} bytes",
                entry.data_offsets,
                data.len()
            );
            let shape = cut(&format!("{:?}", entry.shape));
            let expected = format!("the bytes of {} {shape}", entry.dtype);
            let next = "save or upload the file again; this one is cut or damaged";
            check.error(cut(name), Rule::Header, found, expected, next);
            None
        }
    }
}
