//! In which format the base's weights are kept in memory: what `--dtype` chooses.
//!
//! Knows names and formats; nothing of files or kernels.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use espalier_adapters::ops::{Weight, WeightKind};

/// The format of the base's matrices. Vectors (norms, biases) are always f32.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// Four bytes a number: exactly what the file says.
    #[default]
    F32,
    /// Two bytes, eight bits of precision.
    Bf16,
    /// Two bytes, eleven bits of precision; a tensor with a number beyond 65,504 stays f32.
    F16,
    /// One byte, and a scale for each 32 inputs (GGUF's Q8_0).
    Q8,
    /// As the file stores them: GGUF's Q8_0, Q4_0 and Q4_1 blocks, bf16 and f16. Other types are kept in the smallest of bf16, f16 and
    /// f32 that holds every number exactly.
    Stored,
}

/// A name that is no dtype.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no dtype; f32, bf16, f16, q8 and stored are")]
pub struct UnknownDtype(String);

impl Dtype {
    /// Every one, largest first.
    pub const ALL: [Self; 5] = [Self::F32, Self::Bf16, Self::F16, Self::Q8, Self::Stored];

    /// The name, as `--dtype` takes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Q8 => "q8",
            Self::Stored => "stored",
        }
    }

    /// A matrix with rows of `inputs`, as this choice keeps it. `values` are its numbers.
    pub(crate) fn keep(self, stored: Weight, inputs: usize) -> Weight {
        match (self, stored) {
            (Self::F32, stored) => stored.rounded(WeightKind::F32, inputs),
            (Self::Bf16, stored) => stored.rounded(WeightKind::Bf16, inputs),
            (Self::F16, stored) => stored.rounded(WeightKind::F16, inputs),
            (Self::Q8, stored) => stored.rounded(WeightKind::Q8_0, inputs),
            (Self::Stored, Weight::F32(values)) => Weight::narrowed(values),
            (Self::Stored, stored) => stored,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Dtype {
    type Err = UnknownDtype;

    fn from_str(text: &str) -> Result<Self, UnknownDtype> {
        Self::ALL
            .into_iter()
            .find(|dtype| dtype.as_str() == text)
            .ok_or_else(|| UnknownDtype(text.to_owned()))
    }
}

/// How many matrices of each format a model holds, and their bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WeightFormats(BTreeMap<WeightKind, (usize, usize)>);

impl WeightFormats {
    /// Counts one matrix.
    pub(crate) fn add(&mut self, kind: WeightKind, bytes: usize) {
        let entry = self.0.entry(kind).or_default();
        entry.0 += 1;
        entry.1 += bytes;
    }

    /// Format, matrices, bytes.
    pub fn iter(&self) -> impl Iterator<Item = (WeightKind, usize, usize)> + '_ {
        self.0
            .iter()
            .map(|(kind, (matrices, bytes))| (*kind, *matrices, *bytes))
    }

    /// Bytes of all matrices.
    pub fn bytes(&self) -> usize {
        self.0.values().map(|(_, bytes)| bytes).sum()
    }
}

impl fmt::Display for WeightFormats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (kind, matrices, bytes)) in self.iter().enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            write!(
                f,
                "{comma}{matrices} {kind} ({:.1} MiB)",
                bytes as f64 / f64::from(1 << 20)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for dtype in Dtype::ALL {
            assert_eq!(dtype.as_str().parse(), Ok(dtype));
        }
        let error = "int4".parse::<Dtype>().map_err(|error| error.to_string());
        assert_eq!(
            error,
            Err("\"int4\" is no dtype; f32, bf16, f16, q8 and stored are".to_owned())
        );
    }
}
