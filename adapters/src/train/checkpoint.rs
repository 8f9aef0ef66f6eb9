//! A training run between two steps as bytes: a safetensors file, so that it can be looked at, with its counters in the
//! header.
//!
//! Counters name what comes **next**, so that nothing is trained twice or skipped. Fractions are kept as bits: a
//! run that goes on is bit-equal to one without a break. Where the bytes are kept is not known here.

use std::borrow::Cow;
use std::collections::HashMap;

use safetensors::tensor::{Dtype, SafeTensors, View, serialize};
use serde::{Deserialize, Serialize};

/// A run after some steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Counters.
    pub state: RunState,
    /// Parameters.
    pub params: Vec<f32>,
    /// AdamW's mean gradients.
    pub mean: Vec<f32>,
    /// AdamW's mean squared gradients.
    pub square: Vec<f32>,
    /// Parameters of the best evaluation, once there was one.
    pub best: Option<Vec<f32>>,
}

/// Counters of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Identifies plan and base: another plan's checkpoint is refused.
    pub plan: String,
    /// Optimizer steps done. The order of examples and every mask follow from seed and step alone.
    pub step: u64,
    /// The epoch that the next step belongs to.
    pub epoch: u64,
    /// The next step's first example, as an index into that epoch's permutation.
    pub next_index: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// The first step's loss.
    pub first_loss: Bits,
    /// The last step's loss.
    pub last_loss: Bits,
    /// The best evaluation so far.
    pub best: Option<BestEval>,
    /// Evaluations since then.
    pub evals_without_better: u64,
    /// Early stopping ended the run.
    pub stopped_early: bool,
    /// The step of the last evaluation.
    #[serde(default)]
    pub evaluated: Option<u64>,
    /// The evaluation of what the run started from.
    #[serde(default)]
    pub baseline: Option<BestEval>,
    /// Steps in a row with a high loss, up to the last one.
    #[serde(default)]
    pub high_losses: u64,
}

/// An evaluation of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BestEval {
    /// After so many steps.
    pub step: u64,
    /// Mean loss.
    pub loss: Bits,
    /// Share of right targets.
    pub accuracy: Bits,
}

/// An f64 that is written as its bits, because decimal digits may round.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bits(pub f64);

impl Serialize for Bits {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0.to_bits())
    }
}

impl<'de> Deserialize<'de> for Bits {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        u64::deserialize(deserializer).map(|bits| Self(f64::from_bits(bits)))
    }
}

/// Bytes that are no checkpoint.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BrokenCheckpoint(String);

const STATE: &str = "espalier.training";
const PARAMS: &str = "params";
const MEAN: &str = "mean";
const SQUARE: &str = "square";
const BEST: &str = "best";

/// Numbers as a tensor of the file. They become bytes when it is their turn to be written, one tensor at a time.
struct Numbers<'a> {
    shape: [usize; 1],
    values: &'a [f32],
}

// === impl Numbers ===

impl<'a> Numbers<'a> {
    fn of(values: &'a [f32]) -> Self {
        let shape = [values.len()];
        Self { shape, values }
    }
}

impl View for Numbers<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}

// === impl Checkpoint ===

impl Checkpoint {
    /// The run as bytes; equal runs give equal bytes.
    ///
    /// # Errors
    /// [`BrokenCheckpoint`] when the numbers cannot be written, which sizes of one length each never cause.
    pub fn to_bytes(&self) -> Result<Vec<u8>, BrokenCheckpoint> {
        let state = serde_json::to_string(&self.state)
            .map_err(|error| BrokenCheckpoint(error.to_string()))?;
        let tensors = [
            (PARAMS, Some(&self.params)),
            (MEAN, Some(&self.mean)),
            (SQUARE, Some(&self.square)),
            (BEST, self.best.as_ref()),
        ];
        let views = tensors
            .into_iter()
            .filter_map(|(name, values)| Some((name, Numbers::of(values?))));
        let metadata = HashMap::from([(STATE.to_owned(), state)]);
        serialize(views, Some(metadata)).map_err(|error| BrokenCheckpoint(error.to_string()))
    }

    /// Reads what [`Checkpoint::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`BrokenCheckpoint`] says what is missing or does not fit.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, BrokenCheckpoint> {
        let broken = |error: &dyn std::fmt::Display| BrokenCheckpoint(error.to_string());
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| broken(&error))?;
        let state = metadata
            .metadata()
            .as_ref()
            .and_then(|metadata| metadata.get(STATE));
        let state = state.ok_or_else(|| broken(&format!("no {STATE} in the header")))?;
        let state: RunState = serde_json::from_str(state).map_err(|error| broken(&error))?;
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| broken(&error))?;
        let read = |name: &str| -> Result<Vec<f32>, BrokenCheckpoint> {
            let tensor = tensors.tensor(name).map_err(|error| broken(&error))?;
            if tensor.dtype() != Dtype::F32 {
                return Err(broken(&format!("{name} is {:?}, not F32", tensor.dtype())));
            }
            Ok(tensor
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect())
        };
        let best = tensors
            .names()
            .contains(&BEST)
            .then(|| read(BEST))
            .transpose()?;
        let found = Self {
            state,
            params: read(PARAMS)?,
            mean: read(MEAN)?,
            square: read(SQUARE)?,
            best,
        };
        let len = found.params.len();
        let lens = [
            found.mean.len(),
            found.square.len(),
            found.best.as_ref().map_or(len, Vec::len),
        ];
        if lens.iter().any(|other| *other != len) {
            return Err(broken(&format!(
                "{len} parameters, but {lens:?} moments and best parameters"
            )));
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Checkpoint {
        let best = BestEval {
            step: 4,
            loss: Bits(0.1 + 0.2),
            accuracy: Bits(1.0 / 3.0),
        };
        let state = RunState {
            step: 7,
            next_index: 3,
            first_loss: Bits(f64::MIN_POSITIVE),
            ..RunState::default()
        };
        Checkpoint {
            state: RunState {
                plan: "ab".to_owned(),
                best: Some(best),
                ..state
            },
            params: vec![1.5, -2.0, 1e-40],
            mean: vec![0.1, 0.2, 0.3],
            square: vec![0.4, 0.5, 0.6],
            best: Some(vec![7.0, 8.0, 9.0]),
        }
    }

    #[test]
    fn comes_back_bit_for_bit() -> Result<(), BrokenCheckpoint> {
        for best in [None, example().best] {
            let checkpoint = Checkpoint { best, ..example() };
            let bytes = checkpoint.to_bytes()?;
            assert_eq!(Checkpoint::from_bytes(&bytes)?, checkpoint);
            assert_eq!(checkpoint.to_bytes()?, bytes, "equal runs, equal bytes");
        }
        Ok(())
    }

    #[test]
    fn broken_bytes_are_errors() -> Result<(), BrokenCheckpoint> {
        let bytes = example().to_bytes()?;
        for end in (0..bytes.len()).step_by(7) {
            assert!(
                Checkpoint::from_bytes(&bytes[..end]).is_err(),
                "cut at {end}"
            );
        }
        let uneven = Checkpoint {
            mean: vec![1.0],
            ..example()
        };
        assert!(Checkpoint::from_bytes(&uneven.to_bytes()?).is_err());
        Ok(())
    }
}
