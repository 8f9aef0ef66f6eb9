//! Writing GGUF: version 3, little-endian, plain f32 tensors at the default alignment. The numbers in a file's header have the widths
//! that its readers insist on, so a value's width is the caller's choice and not guessed. Knows no key and no tensor's name.
//!
//! Format: `docs/gguf.md` of ggml-org/ggml.

use std::io::{self, Write};

use super::tensor::DEFAULT_ALIGNMENT;

const VERSION: u32 = 3;
/// ggml's number of F32.
const F32: u32 = 0;

/// A metadata value to be written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NewValue<'a> {
    /// UTF-8 text.
    Text(&'a str),
    /// A float of 32 bits.
    F32(f32),
    /// An unsigned integer of 32 bits.
    U32(u32),
}

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct NewTensor {
    /// Its name.
    pub name: String,
    /// Dimensions, slowest first: `[out, in]` for a matrix (the file stores them the other way round).
    pub shape: Vec<usize>,
    /// Its numbers, row-major; as many as the shape says.
    pub values: Vec<f32>,
}

/// Writes a whole file. Tensors stand in the given order, each at a multiple of 32 bytes.
///
/// # Errors
/// What `out` says.
pub fn write(
    out: &mut impl Write,
    metadata: &[(&str, NewValue<'_>)],
    tensors: &[NewTensor],
) -> io::Result<()> {
    let mut header = b"GGUF".to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut header, key);
        put_value(&mut header, *value);
    }
    let mut offset: u64 = 0;
    for tensor in tensors {
        put_text(&mut header, &tensor.name);
        header.extend((tensor.shape.len() as u32).to_le_bytes());
        for size in tensor.shape.iter().rev() {
            header.extend((*size as u64).to_le_bytes());
        }
        header.extend(F32.to_le_bytes());
        header.extend(offset.to_le_bytes());
        offset += padded(4 * tensor.values.len());
    }
    header.resize(padded(header.len()) as usize, 0);
    out.write_all(&header)?;
    for tensor in tensors {
        let mut bytes: Vec<u8> = tensor.values.iter().flat_map(|x| x.to_le_bytes()).collect();
        bytes.resize(padded(bytes.len()) as usize, 0);
        out.write_all(&bytes)?;
    }
    Ok(())
}

fn padded(bytes: usize) -> u64 {
    (bytes as u64).next_multiple_of(DEFAULT_ALIGNMENT)
}

/// A string: its length, then its bytes.
fn put_text(header: &mut Vec<u8>, text: &str) {
    header.extend((text.len() as u64).to_le_bytes());
    header.extend(text.as_bytes());
}

/// The numbers are those of `enum gguf_metadata_value_type`.
fn put_value(header: &mut Vec<u8>, value: NewValue<'_>) {
    match value {
        NewValue::U32(value) => {
            header.extend(4_u32.to_le_bytes());
            header.extend(value.to_le_bytes());
        }
        NewValue::F32(value) => {
            header.extend(6_u32.to_le_bytes());
            header.extend(value.to_le_bytes());
        }
        NewValue::Text(text) => {
            header.extend(8_u32.to_le_bytes());
            put_text(header, text);
        }
    }
}
