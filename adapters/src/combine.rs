//! Adapters added up into one: `sum of w s B A` as one pair of factors a site, exact, or of a lower rank by the best approximation
//! there is. Sums and decompositions in f64. Knows weights and configuration; nothing of files, names or who owns what.

mod thin;

use std::collections::{BTreeMap, BTreeSet};

use crate::config::{LoraConfig, Modules, Site};
use crate::weights::{AdapterWeights, ScoreHead, SiteAdapter};

/// The largest sum of ranks at one site.
pub const MAX_STACKED_RANK: usize = 512;

/// One adapter and its factor.
#[derive(Clone, Copy, Debug)]
pub struct Term<'a> {
    /// For errors: how the caller knows it.
    pub name: &'a str,
    /// Its numbers.
    pub weights: &'a AdapterWeights,
    /// What its update is multiplied by.
    pub factor: f64,
}

/// The sum as one adapter.
#[derive(Clone, Debug)]
pub struct Combined {
    /// Ranks and targets; every scale is one.
    pub config: LoraConfig,
    /// The factors in f32, and the head of the one term that has one.
    pub weights: AdapterWeights,
    /// The Frobenius norm of what was cut off over that of the whole sum, all sites together; 0 without a cut.
    pub relative_error: f64,
}

/// Why adapters cannot be added up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CombineError {
    /// DoRA's update depends on the base, so it is no sum.
    #[error(
        "{name}: {site} has a DoRA magnitude, which cannot be added up; serve it alone, or merge it into its base"
    )]
    Dora {
        /// The term.
        name: String,
        /// The module.
        site: String,
    },
    /// (IA)3 multiplies what the base makes, so it is no sum.
    #[error(
        "{name}: {site} is scaled by (IA)3, which cannot be added up; serve it alone, or merge it into its base"
    )]
    Scale {
        /// The term.
        name: String,
        /// The module.
        site: String,
    },
    /// A delta of a whole tensor has no low-rank factors.
    #[error(
        "{name}: {tensor} is unfrozen, and a delta of a whole tensor has no factors to add up; serve it alone, or merge it into its base"
    )]
    Full {
        /// The term.
        name: String,
        /// The tensor.
        tensor: String,
    },
    /// A head is a whole and no update: there can be one.
    #[error(
        "{first} and {second} both have a classification head; at most one of the adapters may have one"
    )]
    TwoHeads {
        /// The first term with a head.
        first: String,
        /// The second.
        second: String,
    },
    /// The stacked factors are too large.
    #[error(
        "{site}: the ranks add up to {rank}, limit {MAX_STACKED_RANK}; combine fewer adapters at a time, with a rank to cut to"
    )]
    Rank {
        /// The module.
        site: String,
        /// The sum.
        rank: usize,
    },
    /// Neither weights nor a head.
    #[error("the adapters hold neither low-rank weights nor a head; there is nothing to combine")]
    Nothing,
}

/// Adds up `factor * s B A` of every term. With `rank`, each site is cut to that rank where it has more (Eckart and Young 1936).
/// A head is kept as it stands, whatever its term's factor: it is no update of the base.
///
/// # Errors
/// [`CombineError`].
pub fn combine(terms: &[Term<'_>], rank: Option<usize>) -> Result<Combined, CombineError> {
    let head = head_of(terms)?;
    refuse_scales(terms)?;
    let keys: BTreeSet<(usize, Site)> = terms
        .iter()
        .flat_map(|term| term.weights.sites.keys().copied())
        .collect();
    if keys.is_empty() && head.is_none() {
        return Err(CombineError::Nothing);
    }
    let mut sites = BTreeMap::new();
    let (mut lost, mut whole) = (0.0, 0.0);
    for (layer, site) in keys {
        let stacked = Stacked::of(terms, layer, site)?;
        let Some(rank) = rank else {
            sites.insert((layer, site), stacked.site());
            continue;
        };
        let singular = thin::decompose(&stacked.a, &stacked.b, stacked.rank);
        whole += singular.squares(0);
        if stacked.rank <= rank {
            sites.insert((layer, site), stacked.site());
        } else {
            lost += singular.squares(rank);
            let (a, b) = singular.factors(rank);
            sites.insert((layer, site), site_of(rank, &a, &b));
        }
    }
    let config = config_of(&sites, head.is_some());
    let relative_error = if lost > 0.0 {
        (lost / whole).sqrt()
    } else {
        0.0
    };
    Ok(Combined {
        config,
        weights: AdapterWeights {
            sites,
            head,
            ..AdapterWeights::default()
        },
        relative_error,
    })
}

fn refuse_scales(terms: &[Term<'_>]) -> Result<(), CombineError> {
    for term in terms {
        // By name, so that a new part does not compile before it has been thought of here.
        let AdapterWeights {
            sites: _,
            scales,
            full,
            head: _,
        } = term.weights;
        if let Some(tensor) = full.keys().next() {
            let (name, tensor) = (term.name.to_owned(), tensor.path());
            return Err(CombineError::Full { name, tensor });
        }
        if let Some((layer, site)) = scales.keys().next() {
            let (name, site) = (term.name.to_owned(), site.path(*layer));
            return Err(CombineError::Scale { name, site });
        }
    }
    Ok(())
}

fn head_of(terms: &[Term<'_>]) -> Result<Option<ScoreHead>, CombineError> {
    let mut with = terms.iter().filter(|term| term.weights.head.is_some());
    match (with.next(), with.next()) {
        (Some(first), Some(second)) => Err(CombineError::TwoHeads {
            first: first.name.to_owned(),
            second: second.name.to_owned(),
        }),
        (one, _) => Ok(one.and_then(|term| term.weights.head.clone())),
    }
}

/// The factors of all terms at one site side by side: `[B1 B2] [A1; A2]` is their sum. Every factor stands in B.
struct Stacked {
    rank: usize,
    /// `[rank, in]`.
    a: Vec<f64>,
    /// `[out, rank]`.
    b: Vec<f64>,
}

impl Stacked {
    fn of(terms: &[Term<'_>], layer: usize, site: Site) -> Result<Self, CombineError> {
        let mut parts = Vec::new();
        for term in terms {
            let Some(adapter) = term.weights.sites.get(&(layer, site)) else {
                continue;
            };
            // By name, so that a new part of a site does not compile before it has been thought of here.
            let SiteAdapter {
                r,
                scale,
                a,
                b,
                magnitude,
            } = adapter;
            if magnitude.is_some() {
                let (name, site) = (term.name.to_owned(), site.path(layer));
                return Err(CombineError::Dora { name, site });
            }
            parts.push((*r, term.factor * f64::from(*scale), a.to_f32(), b.to_f32()));
        }
        let rank: usize = parts.iter().map(|part| part.0).sum();
        if rank > MAX_STACKED_RANK {
            let site = site.path(layer);
            return Err(CombineError::Rank { site, rank });
        }
        let outputs = parts.first().map_or(0, |(r, _, _, b)| b.len() / r);
        let a = parts
            .iter()
            .flat_map(|(_, _, a, _)| a.iter().map(|x| f64::from(*x)))
            .collect();
        let mut b = Vec::with_capacity(outputs * rank);
        for row in 0..outputs {
            for (r, factor, _, from) in &parts {
                b.extend(from[row * r..][..*r].iter().map(|x| factor * f64::from(*x)));
            }
        }
        Ok(Self { rank, a, b })
    }

    fn site(&self) -> SiteAdapter {
        site_of(self.rank, &self.a, &self.b)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "factors are kept in f32")]
fn site_of(r: usize, a: &[f64], b: &[f64]) -> SiteAdapter {
    SiteAdapter {
        r,
        scale: 1.0,
        a: a.iter().map(|x| *x as f32).collect(),
        b: b.iter().map(|x| *x as f32).collect(),
        magnitude: None,
    }
}

/// The configuration that says exactly these sites and ranks. Alpha equals the rank everywhere, so that every scale is one; modules are
/// named alone where all layers have them alike, and by their paths otherwise.
#[expect(clippy::cast_precision_loss, reason = "ranks are far below 2^52")]
fn config_of(sites: &BTreeMap<(usize, Site), SiteAdapter>, head: bool) -> LoraConfig {
    let r = sites.values().map(|site| site.r).max().unwrap_or(8);
    let mut config = LoraConfig::new(r, r as f64, &[]);
    let layers = sites.keys().map(|(layer, _)| layer + 1).max().unwrap_or(0);
    let modules: BTreeSet<Site> = sites.keys().map(|(_, site)| *site).collect();
    let modules: Vec<Site> = modules.into_iter().collect();
    config.target_modules = if sites.is_empty() {
        Modules::Nothing
    } else if sites.len() == layers * modules.len() {
        config.layers_to_transform = Some((0..layers).collect());
        Modules::sites(&modules)
    } else {
        Modules::List(
            sites
                .keys()
                .map(|(layer, site)| site.path(*layer))
                .collect(),
        )
    };
    for (&(layer, site), adapter) in sites.iter().filter(|(_, adapter)| adapter.r != r) {
        let path = site.path(layer).replace('.', r"\.");
        config.rank_pattern.push((path.clone(), adapter.r));
        config.alpha_pattern.push((path, adapter.r as f64));
    }
    if head {
        config.with_score_head()
    } else {
        config
    }
}

#[cfg(test)]
mod tests;
