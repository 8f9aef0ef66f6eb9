//! Keys and values of a GGUF: typed, bounded, with getters that name the key when it is missing or of another type.

use std::collections::BTreeMap;
use std::io::Read;

use super::GgufError;
use super::header::Header;

const MAX_KEY_BYTES: u64 = 1 << 16;
const MAX_STRING_BYTES: u64 = 64 << 20;
const MAX_ARRAY: u64 = 1 << 26;

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An unsigned integer of any width.
    Unsigned(u64),
    /// A signed integer of any width.
    Signed(i64),
    /// A float of either width.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// A list of values of one type.
    Array(Array),
}

/// A list of values of one type. Nested lists are not used by any model and are refused.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Bytes, which also carry truth values.
    Bytes(Vec<u8>),
    /// Integers up to 32 bits, widened.
    Ints(Vec<i64>),
    /// Floats; f64 is narrowed, no key of a model carries one.
    Floats(Vec<f32>),
    /// Strings.
    Strings(Vec<String>),
}

/// The metadata of one file. Getters return `None` for a missing key and an error for one of another type.
#[derive(Debug, Clone, PartialEq)]
pub struct Metadata {
    file: String,
    values: BTreeMap<String, Value>,
}

impl Metadata {
    /// Metadata that did not come from a file, for instance a built-in model's; `file` is its name in errors.
    pub fn new(file: &str, values: BTreeMap<String, Value>) -> Self {
        Self {
            file: file.to_owned(),
            values,
        }
    }

    pub(super) fn read<R: Read>(header: &mut Header<'_, R>, count: u64) -> Result<Self, GgufError> {
        let mut metadata = Self {
            file: header.file_name().to_owned(),
            values: BTreeMap::new(),
        };
        for index in 0..count {
            header.place = format!("metadata key {index} of {count}");
            let key = header.string(MAX_KEY_BYTES)?;
            header.place = format!("metadata key {key:?}");
            let kind = u32::from_le_bytes(header.bytes()?);
            let value = if kind == 9 {
                Value::Array(array(header)?)
            } else {
                scalar(header, kind)?
            };
            if metadata.values.insert(key, value).is_some() {
                return Err(header.error("stands twice"));
            }
        }
        Ok(metadata)
    }

    /// The file's name, as in errors.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The value of a key, of whatever type.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// The error that says what a key breaks.
    pub fn error(&self, key: &str, rule: impl Into<String>) -> GgufError {
        GgufError::rule(&self.file, format!("metadata key {key:?}"), rule)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        pick: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.values.get(key) else {
            return Ok(None);
        };
        pick(value)
            .map(Some)
            .ok_or_else(|| self.error(key, format!("must be {wanted}")))
    }

    /// The value of a required key.
    ///
    /// # Errors
    /// [`GgufError`] when `found`, a getter's result, is an error or none.
    pub fn required<T>(
        &self,
        key: &str,
        found: Result<Option<T>, GgufError>,
    ) -> Result<T, GgufError> {
        found?.ok_or_else(|| self.error(key, "is missing"))
    }

    /// A non-negative integer.
    ///
    /// # Errors
    /// [`GgufError`] when the key holds something else.
    pub fn size(&self, key: &str) -> Result<Option<usize>, GgufError> {
        self.typed(key, "a non-negative integer", |value| match value {
            Value::Unsigned(value) => usize::try_from(*value).ok(),
            Value::Signed(value) => usize::try_from(*value).ok(),
            _ => None,
        })
    }

    /// A number, as f32 like every float of a model's metadata.
    ///
    /// # Errors
    /// [`GgufError`] when the key holds something else.
    pub fn float(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.typed(key, "a number", |value| match value {
            Value::Float(value) => Some(*value as f32),
            Value::Unsigned(value) => Some(*value as f32),
            Value::Signed(value) => Some(*value as f32),
            _ => None,
        })
    }

    /// A truth value.
    ///
    /// # Errors
    /// [`GgufError`] when the key holds something else.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a truth value", |value| match value {
            Value::Bool(value) => Some(*value),
            _ => None,
        })
    }

    /// A string.
    ///
    /// # Errors
    /// [`GgufError`] when the key holds something else.
    pub fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a string", |value| match value {
            Value::String(value) => Some(value.as_str()),
            _ => None,
        })
    }

    /// A list of strings.
    ///
    /// # Errors
    /// [`GgufError`] when the key holds something else.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        self.typed(key, "a list of strings", |value| match value {
            Value::Array(Array::Strings(values)) => Some(values.as_slice()),
            _ => None,
        })
    }

    /// A list of integers.
    ///
    /// # Errors
    /// [`GgufError`] when the key holds something else.
    pub fn ints(&self, key: &str) -> Result<Option<&[i64]>, GgufError> {
        self.typed(key, "a list of integers", |value| match value {
            Value::Array(Array::Ints(values)) => Some(values.as_slice()),
            _ => None,
        })
    }

    /// A list of floats.
    ///
    /// # Errors
    /// [`GgufError`] when the key holds something else.
    pub fn floats(&self, key: &str) -> Result<Option<&[f32]>, GgufError> {
        self.typed(key, "a list of floats", |value| match value {
            Value::Array(Array::Floats(values)) => Some(values.as_slice()),
            _ => None,
        })
    }
}

/// One value of a type that is not a list. The numbers are those of `enum gguf_metadata_value_type`.
fn scalar<R: Read>(header: &mut Header<'_, R>, kind: u32) -> Result<Value, GgufError> {
    Ok(match kind {
        0 => Value::Unsigned(u8::from_le_bytes(header.bytes()?).into()),
        1 => Value::Signed(i8::from_le_bytes(header.bytes()?).into()),
        2 => Value::Unsigned(u16::from_le_bytes(header.bytes()?).into()),
        3 => Value::Signed(i16::from_le_bytes(header.bytes()?).into()),
        4 => Value::Unsigned(u32::from_le_bytes(header.bytes()?).into()),
        5 => Value::Signed(i32::from_le_bytes(header.bytes()?).into()),
        6 => Value::Float(f32::from_le_bytes(header.bytes()?).into()),
        7 => match header.bytes::<1>()? {
            [0] => Value::Bool(false),
            [1] => Value::Bool(true),
            [other] => {
                return Err(header.error(format!("a truth value is {other}, it must be 0 or 1")));
            }
        },
        8 => Value::String(header.string(MAX_STRING_BYTES)?),
        10 => Value::Unsigned(u64::from_le_bytes(header.bytes()?)),
        11 => Value::Signed(i64::from_le_bytes(header.bytes()?)),
        12 => Value::Float(f64::from_le_bytes(header.bytes()?)),
        other => return Err(header.error(format!("value type {other} is unknown"))),
    })
}

fn array<R: Read>(header: &mut Header<'_, R>) -> Result<Array, GgufError> {
    let kind = u32::from_le_bytes(header.bytes()?);
    let count = u64::from_le_bytes(header.bytes()?);
    let width = match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        9 => return Err(header.error("lists within lists are not supported")),
        other => return Err(header.error(format!("value type {other} is unknown"))),
    };
    // Every element takes `width` bytes at least, so what is allocated is bounded by the file's own size.
    header.bound("list elements", count, width, MAX_ARRAY)?;
    let count = count as usize;
    match kind {
        0 | 7 => {
            let mut bytes = vec![0; count];
            header.fill(&mut bytes)?;
            Ok(Array::Bytes(bytes))
        }
        6 => (0..count)
            .map(|_| header.bytes().map(f32::from_le_bytes))
            .collect::<Result<_, _>>()
            .map(Array::Floats),
        12 => {
            let narrowed =
                (0..count).map(|_| header.bytes().map(|bytes| f64::from_le_bytes(bytes) as f32));
            narrowed.collect::<Result<_, _>>().map(Array::Floats)
        }
        8 => (0..count)
            .map(|_| header.string(MAX_STRING_BYTES))
            .collect::<Result<_, _>>()
            .map(Array::Strings),
        _ => {
            let ints = (0..count).map(|_| match scalar(header, kind)? {
                Value::Unsigned(value) => i64::try_from(value)
                    .map_err(|_| header.error(format!("{value} does not fit into 63 bits"))),
                Value::Signed(value) => Ok(value),
                _ => Err(header.error("is not a list of integers")),
            });
            ints.collect::<Result<_, _>>().map(Array::Ints)
        }
    }
}
