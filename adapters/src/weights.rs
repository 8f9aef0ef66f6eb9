//! An adapter's numbers: A, B and magnitude of each site with a low-rank update, the vector of each site that (IA)3 scales, and
//! a classification head.
//!
//! A and B stay in the dtype that their file stores; the rest is f32. This file must not know files, names of tensors or devices.

use std::borrow::Cow;
use std::collections::BTreeMap;

use half::{bf16, f16};

use crate::config::{BaseShape, BaseTensor, ScaleOn, Site};
use crate::head::HeadSettings;

/// Numbers in the dtype that their file stores.
#[derive(Clone, Debug, PartialEq)]
pub enum Numbers {
    /// Single precision.
    F32(Vec<f32>),
    /// The upper halves of f32.
    Bf16(Vec<bf16>),
    /// IEEE half precision.
    F16(Vec<f16>),
}

/// The low-rank update of one site: y += scale * B (A x), and with a magnitude DoRA's renormalisation.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteAdapter {
    /// Rank, at least 1.
    pub r: usize,
    /// The factor on B A x, by [`crate::config::LoraConfig::scaling`].
    pub scale: f32,
    /// A, [r, in] row-major.
    pub a: Numbers,
    /// B, [out, r] row-major.
    pub b: Numbers,
    /// DoRA's magnitude, [out].
    pub magnitude: Option<Vec<f32>>,
}

/// (IA)3's vector at one site (Liu et al., 2022): `y = l * (W x + b)` on the outputs, `y = W (l * x) + b` on the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteScale {
    /// Which side of the projection it multiplies.
    pub on: ScaleOn,
    /// The vector, `[out]` or `[in]`.
    pub l: Vec<f32>,
}

/// What is added to a whole tensor of the base.
#[derive(Clone, Debug, PartialEq)]
pub struct Delta {
    /// Outputs of a projection's weight; 1 of a vector.
    pub rows: usize,
    /// Row-major.
    pub values: Vec<f32>,
}

/// A fully connected layer below `score`: `x = activation(W x + b)`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HiddenLayer {
    /// W, [out, in] row-major.
    pub weight: Vec<f32>,
    /// b, [out].
    pub bias: Vec<f32>,
}

/// A classification head: logits = weight x, without bias, x what the hidden layers make of the last token's state after the final
/// norm; without any, the state.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ScoreHead {
    /// Names of the rows, in their order.
    pub labels: Vec<String>,
    /// What stands below, as the settings describe it.
    pub hidden: Vec<HiddenLayer>,
    /// [labels, hidden] row-major; of the last hidden layer's outputs where there are any.
    pub weight: Vec<f32>,
    /// What its logits mean.
    pub settings: HeadSettings,
}

/// Everything an adapter changes in its base.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterWeights {
    /// Sites with a low-rank update, by (layer, site).
    pub sites: BTreeMap<(usize, Site), SiteAdapter>,
    /// Sites that (IA)3 scales, by (layer, site).
    pub scales: BTreeMap<(usize, Site), SiteScale>,
    /// What is added to whole tensors of the base.
    pub full: BTreeMap<BaseTensor, Delta>,
    /// The head, when the adapter classifies.
    pub head: Option<ScoreHead>,
}

// === impl Numbers ===

impl Numbers {
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(numbers) => numbers.len(),
            Self::Bf16(numbers) => numbers.len(),
            Self::F16(numbers) => numbers.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers, widened exactly.
    #[must_use]
    pub fn to_f32(&self) -> Cow<'_, [f32]> {
        match self {
            Self::F32(numbers) => Cow::Borrowed(numbers),
            Self::Bf16(numbers) => numbers.iter().map(|n| n.to_f32()).collect(),
            Self::F16(numbers) => numbers.iter().map(|n| n.to_f32()).collect(),
        }
    }
}

impl From<Vec<f32>> for Numbers {
    fn from(numbers: Vec<f32>) -> Self {
        Self::F32(numbers)
    }
}

impl FromIterator<f32> for Numbers {
    fn from_iter<I: IntoIterator<Item = f32>>(numbers: I) -> Self {
        Self::F32(numbers.into_iter().collect())
    }
}

// === impl ScoreHead ===

impl ScoreHead {
    /// Numbers held.
    #[must_use]
    pub fn parameters(&self) -> usize {
        let hidden = self.hidden.iter();
        let hidden: usize = hidden.map(|l| l.weight.len() + l.bias.len()).sum();
        hidden + self.weight.len()
    }

    /// Numbers in the states that it reads, by its first layer; 0 without labels.
    #[must_use]
    pub fn inputs(&self) -> usize {
        let (first, outputs) = match self.hidden.first() {
            Some(layer) => (&layer.weight, layer.bias.len()),
            None => (&self.weight, self.labels.len()),
        };
        first.len().checked_div(outputs).unwrap_or(0)
    }

    /// The first layer whose sizes are not those of its settings on states of `hidden` numbers, as (path, what is wrong).
    #[must_use]
    pub fn misfit(&self, hidden: usize) -> Option<(String, String)> {
        let widths = &self.settings.hidden_layers;
        if self.hidden.len() != widths.len() {
            let (found, named) = (self.hidden.len(), widths.len());
            let wrong = format!("{found} hidden layers, its settings name {named}");
            return Some(("score".to_owned(), wrong));
        }
        let mut inputs = hidden;
        for (index, (layer, outputs)) in self.hidden.iter().zip(widths).enumerate() {
            let (weight, bias) = (layer.weight.len(), layer.bias.len());
            if weight != outputs * inputs || bias != *outputs {
                let wrong = format!(
                    "weight has {weight} values and bias {bias}, not {outputs} x {inputs} and {outputs}"
                );
                return Some((format!("score.hidden.{index}"), wrong));
            }
            inputs = *outputs;
        }
        let (found, labels) = (self.weight.len(), self.labels.len());
        (found != labels * inputs).then(|| {
            let wrong = format!("weight has {found} values, not {labels} labels x {inputs}");
            ("score".to_owned(), wrong)
        })
    }
}

// === impl AdapterWeights ===

impl AdapterWeights {
    /// The same numbers, all in f32: what training changes.
    #[must_use]
    pub fn widened(mut self) -> Self {
        for site in self.sites.values_mut() {
            for factor in [&mut site.a, &mut site.b] {
                *factor = Numbers::F32(factor.to_f32().into_owned());
            }
        }
        self
    }

    /// Numbers held, head included.
    #[must_use]
    pub fn parameters(&self) -> usize {
        let sites = self.sites.values();
        let low_rank: usize = sites
            .map(|s| s.a.len() + s.b.len() + s.magnitude.as_ref().map_or(0, Vec::len))
            .sum();
        let scales: usize = self.scales.values().map(|s| s.l.len()).sum();
        let full: usize = self.full.values().map(|delta| delta.values.len()).sum();
        low_rank + scales + full + self.head.as_ref().map_or(0, ScoreHead::parameters)
    }

    /// The largest rank, 0 without any site.
    #[must_use]
    pub fn max_rank(&self) -> usize {
        self.sites.values().map(|s| s.r).max().unwrap_or(0)
    }

    /// The first site or head whose sizes do not fit the base, as (path, what is wrong).
    #[must_use]
    pub fn misfit(&self, base: &BaseShape) -> Option<(String, String)> {
        for (&(layer, site), adapter) in &self.sites {
            let (inputs, outputs) = base.dims(site);
            let r = adapter.r;
            let wrong = if layer >= base.layers {
                format!("layer {layer} of a base with {} layers", base.layers)
            } else if r == 0 {
                "rank 0".to_owned()
            } else if adapter.a.len() != r * inputs {
                format!("A has {} values, not {r} x {inputs}", adapter.a.len())
            } else if adapter.b.len() != outputs * r {
                format!("B has {} values, not {outputs} x {r}", adapter.b.len())
            } else if adapter
                .magnitude
                .as_ref()
                .is_some_and(|m| m.len() != outputs)
            {
                format!("magnitude does not have {outputs} values")
            } else {
                continue;
            };
            return Some((site.path(layer), wrong));
        }
        for (&(layer, site), scale) in &self.scales {
            let expected = scale.on.width(base.dims(site));
            let wrong = if layer >= base.layers {
                format!("layer {layer} of a base with {} layers", base.layers)
            } else if scale.l.len() != expected {
                format!("l has {} values, not {expected}", scale.l.len())
            } else {
                continue;
            };
            return Some((site.path(layer), wrong));
        }
        for (tensor, delta) in &self.full {
            let expected: usize = tensor.shape(base).iter().product();
            let wrong = if let Some(absent) = tensor.absent(base) {
                absent
            } else if delta.values.len() != expected {
                let found = delta.values.len();
                format!("the delta has {found} values, not {expected}")
            } else {
                continue;
            };
            return Some((tensor.path(), wrong));
        }
        self.head.as_ref()?.misfit(base.hidden)
    }
}
