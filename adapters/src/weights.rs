//! An adapter's numbers: A, B and magnitude of each adapted site, and a classification head.
//!
//! Always f32, widened exactly from what the file stored. This file must not know files, names of tensors or devices.

use std::collections::BTreeMap;

use crate::config::{BaseShape, Site};

/// The low-rank update of one site: y += scale * B (A x), and with a magnitude DoRA's renormalisation.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteAdapter {
    /// Rank, at least 1.
    pub r: usize,
    /// The factor on B A x, by [`crate::config::LoraConfig::scaling`].
    pub scale: f32,
    /// A, [r, in] row-major.
    pub a: Vec<f32>,
    /// B, [out, r] row-major.
    pub b: Vec<f32>,
    /// DoRA's magnitude, [out].
    pub magnitude: Option<Vec<f32>>,
}

/// A classification head without bias: logits = weight h, h the last token's state after the final norm.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreHead {
    /// Names of the rows, in their order.
    pub labels: Vec<String>,
    /// [labels, hidden] row-major.
    pub weight: Vec<f32>,
}

/// Everything an adapter changes in its base.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterWeights {
    /// Adapted sites by (layer, site).
    pub sites: BTreeMap<(usize, Site), SiteAdapter>,
    /// The head, when the adapter classifies.
    pub head: Option<ScoreHead>,
}

impl AdapterWeights {
    /// Numbers held, head included.
    #[must_use]
    pub fn parameters(&self) -> usize {
        let sites = self.sites.values();
        let low_rank: usize = sites
            .map(|s| s.a.len() + s.b.len() + s.magnitude.as_ref().map_or(0, Vec::len))
            .sum();
        low_rank + self.head.as_ref().map_or(0, |h| h.weight.len())
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
        let head = self.head.as_ref()?;
        let expected = head.labels.len() * base.hidden;
        (head.weight.len() != expected).then(|| {
            let found = head.weight.len();
            let wrong = format!(
                "weight has {found} values, not {} labels x {}",
                head.labels.len(),
                base.hidden
            );
            ("score".to_owned(), wrong)
        })
    }
}
