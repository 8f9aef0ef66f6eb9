//! The ways to train beside LoRA, as a request names them and as a job keeps them.
//!
//! This file must not know data, storage or time.

use espalier_adapters::config::{
    AdapterConfig, BaseShape, BaseTensor, FullConfig, Ia3Config, LayerTensor, Modules, Site,
};
use serde::{Deserialize, Serialize};

use super::JobError;
use super::defaults::{Choices, Circumstances, lora_learning_rate};
use super::spec::{HyperRequest, JobLimits};
use crate::registry::VersionSummary;

/// Peak learning rate of (IA)3's vectors: that of the paper (Liu et al., 2022, section 3.2), whatever the width of the base.
const IA3_LEARNING_RATE: f64 = 3e-3;

/// Peak learning rate of whole tensors, as a share of LoRA's: what full fine-tuning usually takes.
const UNFREEZE_RATE_SHARE: f64 = 0.1;

/// Bytes that a trained number takes: its delta, its gradient, two moments, the sum that is multiplied by, and the best so far.
const TRAINED_BYTES: u64 = 24;

/// What is trained in LoRA's place, as a request names it.
#[derive(Debug, Clone)]
pub enum WayRequest {
    /// Vectors of (IA)3.
    Ia3 {
        /// Module names; empty is k_proj, v_proj and down_proj.
        target_modules: Vec<String>,
        /// Those of them whose input is multiplied; empty is down_proj, where it is targeted.
        feedforward_modules: Vec<String>,
    },
    /// Tensors, whole.
    Unfreeze {
        /// Every one of the base.
        whole_model: bool,
        /// So many from the top.
        last_layers: Option<u32>,
        /// These.
        layers: Vec<u32>,
        /// Modules of theirs, all where none is named, and outside of them.
        modules: Vec<String>,
    },
}

/// What is trained in LoRA's place, frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaySpec {
    /// Vectors of (IA)3.
    Ia3(Ia3Spec),
    /// Tensors, whole.
    Unfreeze(UnfreezeSpec),
}

/// What is unfrozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnfreezeSpec {
    /// The layers, ascending.
    pub layers: Vec<u32>,
    /// Modules of theirs, all where none is named, and outside of them.
    pub modules: Vec<String>,
}

/// Which modules (IA)3 scales.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ia3Spec {
    /// Module names.
    pub target_modules: Vec<String>,
    /// Those of them whose input is multiplied.
    pub feedforward_modules: Vec<String>,
}

fn invalid(field: &str, reason: impl Into<String>) -> JobError {
    JobError::InvalidField {
        field: field.to_owned(),
        reason: reason.into(),
    }
}

// === impl WayRequest ===

impl WayRequest {
    /// The name of its field in a request.
    fn field(&self) -> &'static str {
        match self {
            Self::Ia3 { .. } => "ia3",
            Self::Unfreeze { .. } => "unfreeze",
        }
    }

    /// Fills the gaps and checks the rest.
    pub(super) fn decide(
        &self,
        (head_only, base): (bool, &BaseShape),
        limits: &JobLimits,
        choices: &mut Choices,
    ) -> Result<WaySpec, JobError> {
        if head_only {
            let field = self.field();
            let reason = "head_only trains a head alone: leave one of them out";
            return Err(invalid(field, reason));
        }
        match self {
            Self::Ia3 {
                target_modules,
                feedforward_modules,
            } => ia3(target_modules, feedforward_modules, choices).map(WaySpec::Ia3),
            Self::Unfreeze {
                whole_model,
                last_layers,
                layers,
                modules,
            } => {
                let spec = match whole_model {
                    true => whole((*last_layers, layers), modules, base)?,
                    false => unfreeze((*last_layers, layers), modules, base)?,
                };
                fits(&spec, base, limits)?;
                Ok(WaySpec::Unfreeze(spec))
            }
        }
    }

    /// The hyperparameters that are asked for, with the defaults that are this way's own.
    pub(super) fn hyper(
        &self,
        (asked, at): (&HyperRequest, &Circumstances),
        choices: &mut Choices,
    ) -> Result<HyperRequest, JobError> {
        if let Some(ratio) = asked.lora_plus_ratio.filter(|ratio| *ratio != 1.0) {
            let reason = format!(
                "{ratio} needs LoRA's B to apply to, and {} has none: leave it out",
                self.field()
            );
            return Err(invalid("hyper_parameters.lora_plus_ratio", reason));
        }
        let (rate, why) = match self {
            Self::Ia3 { .. } => {
                let why = "(IA)3's own, whatever the width of the base";
                (IA3_LEARNING_RATE, why.to_owned())
            }
            Self::Unfreeze { .. } => {
                let (rate, formula) = lora_learning_rate(at);
                let why = format!("whole tensors want a tenth of LoRA's, which is {formula}");
                (UNFREEZE_RATE_SHARE * rate, why)
            }
        };
        let rate = asked
            .learning_rate
            .unwrap_or_else(|| choices.make("hyper_parameters.learning_rate", rate, why));
        Ok(HyperRequest {
            learning_rate: Some(rate),
            ..asked.clone()
        })
    }
}

fn ia3(
    targets: &[String],
    feedforward: &[String],
    choices: &mut Choices,
) -> Result<Ia3Spec, JobError> {
    let names = |sites: &[Site]| sites.iter().map(|site| site.module().to_owned()).collect();
    let target_modules: Vec<String> = match targets {
        [] => {
            let names: Vec<String> = names(&Ia3Config::DEFAULT_TARGETS);
            let why = "as in the paper: keys, values and what the feed-forward network makes of its input";
            choices.make("ia3.target_modules", names.join(", "), why);
            names
        }
        some => some.to_vec(),
    };
    if let Some(module) = target_modules
        .iter()
        .find(|module| Site::from_module(module).is_none())
    {
        let known = Site::ALL.map(Site::module).join(", ");
        let reason = format!("{module:?} is none of {known}");
        return Err(invalid("ia3.target_modules", reason));
    }
    if let Some(module) = feedforward.iter().find(|m| !target_modules.contains(m)) {
        let reason = format!(
            "{module:?} is none of target_modules, which are {}: name it there too, or leave it out",
            target_modules.join(", ")
        );
        return Err(invalid("ia3.feedforward_modules", reason));
    }
    let mut feedforward_modules = feedforward.to_vec();
    if feedforward.is_empty() {
        feedforward_modules = names(&[Site::Down]);
        feedforward_modules.retain(|module| target_modules.contains(module));
        let why = "its input is what the feed-forward network made, which is what is scaled";
        choices.make(
            "ia3.feedforward_modules",
            feedforward_modules.join(", "),
            why,
        );
    }
    Ok(Ia3Spec {
        target_modules,
        feedforward_modules,
    })
}

fn whole(
    (last, layers): (Option<u32>, &[u32]),
    modules: &[String],
    base: &BaseShape,
) -> Result<UnfreezeSpec, JobError> {
    let others = [
        ("last_layers", last.is_some()),
        ("layers", !layers.is_empty()),
        ("modules", !modules.is_empty()),
    ];
    if let Some((other, _)) = others.iter().find(|(_, set)| *set) {
        let reason = format!("{other} is set too: the whole is all of them, so leave one out");
        return Err(invalid("unfreeze.whole_model", reason));
    }
    let FullConfig {
        layers, modules, ..
    } = FullConfig::whole(base);
    let layers = layers.into_iter().map(|layer| layer as u32).collect();
    Ok(UnfreezeSpec { layers, modules })
}

fn unfreeze(
    (last, layers): (Option<u32>, &[u32]),
    modules: &[String],
    base: &BaseShape,
) -> Result<UnfreezeSpec, JobError> {
    for module in modules {
        known(module, base)?;
    }
    let outside = modules.iter().any(|m| BaseTensor::outside(m).is_some());
    let inside = modules.iter().any(|m| LayerTensor::named(m).is_some());
    let count = u32::try_from(base.layers).unwrap_or(u32::MAX);
    let mut layers = match (last, layers) {
        (Some(last), []) if (1..=count).contains(&last) => (count - last..count).collect(),
        (Some(last), []) => {
            let reason = format!("{last} is outside 1 to {count}, the layers of the base");
            return Err(invalid("unfreeze.last_layers", reason));
        }
        (Some(_), _) => {
            let reason = "layers is set too: name one of them";
            return Err(invalid("unfreeze.last_layers", reason));
        }
        (None, []) if inside || !outside => {
            let reason = "last_layers, layers or whole_model is required";
            return Err(invalid("unfreeze", reason));
        }
        (None, layers) => layers.to_vec(),
    };
    layers.sort_unstable();
    layers.dedup();
    if let Some(layer) = layers.iter().find(|layer| **layer >= count) {
        let reason = format!("layer {layer} does not exist: the base has {count}");
        return Err(invalid("unfreeze.layers", reason));
    }
    let modules = modules.to_vec();
    Ok(UnfreezeSpec { layers, modules })
}

/// The base has a module of this name.
fn known(module: &str, base: &BaseShape) -> Result<(), JobError> {
    let reason = match BaseTensor::outside(module) {
        None if LayerTensor::named(module).is_some() => return Ok(()),
        None => format!(
            "{module:?} is none of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, input_layernorm, \
             post_attention_layernorm, q_norm, k_norm, embed_tokens, norm and lm_head"
        ),
        Some(tensor) if tensor.absent(base).is_some() => {
            format!("the base has no {module:?} of its own: embed_tokens is its output head too")
        }
        Some(_) => return Ok(()),
    };
    Err(invalid("unfreeze.modules", reason))
}

/// The version that comes of it can be stored, and served: what cannot is refused before anything is trained.
fn fits(spec: &UnfreezeSpec, base: &BaseShape, limits: &JobLimits) -> Result<(), JobError> {
    let tensors = spec.config().tensors();
    // Biases and head norms that the family lacks are counted: next to nothing.
    let numbers = |tensor: &BaseTensor| -> usize { tensor.shape(base).iter().product() };
    let count: usize = tensors.iter().map(numbers).sum();
    let (bytes, trained) = (4 * count as u64, TRAINED_BYTES * count as u64);
    let limits = [
        (
            bytes,
            "a version's file may have (max_adapter_bytes)",
            limits.max_adapter_bytes,
        ),
        (
            bytes,
            "all versions in memory may have (adapter_cache_bytes)",
            limits.adapter_cache_bytes,
        ),
        (
            trained,
            "a job may hold (training_job_bytes)",
            limits.training_job_bytes,
        ),
    ];
    match limits.into_iter().find(|(asked, _, limit)| asked > limit) {
        None => Ok(()),
        Some((asked, what, limit)) => {
            let reason = format!(
                "{count} numbers make a version of {bytes} bytes and take {trained} while it trains; {asked} is more than the {limit} \
                 that {what}: unfreeze fewer layers or modules, or have the limit raised"
            );
            Err(invalid("unfreeze", reason))
        }
    }
}

impl UnfreezeSpec {
    fn config(&self) -> FullConfig {
        FullConfig {
            modules: self.modules.clone(),
            ..FullConfig::new(self.layers.iter().map(|layer| *layer as usize).collect())
        }
    }
}

// === impl WaySpec ===

impl WaySpec {
    /// That of a version; `None` of LoRA and of a head alone.
    pub(super) fn of(summary: &VersionSummary) -> Option<Self> {
        if summary.unfrozen {
            return Some(Self::Unfreeze(UnfreezeSpec {
                layers: summary.layers.clone(),
                modules: summary.target_modules.clone(),
            }));
        }
        let feedforward_modules = summary.feedforward_modules.clone()?;
        Some(Self::Ia3(Ia3Spec {
            target_modules: summary.target_modules.clone(),
            feedforward_modules,
        }))
    }

    /// As the trainer and the artifact want it.
    pub(super) fn config(&self, base_name: &str, classify: bool) -> AdapterConfig {
        let base_model_name_or_path = Some(base_name.to_owned());
        let config = match self {
            Self::Ia3(spec) => AdapterConfig::Ia3(Ia3Config {
                target_modules: Modules::List(spec.target_modules.clone()),
                feedforward_modules: match spec.feedforward_modules.as_slice() {
                    [] => Modules::Nothing,
                    some => Modules::List(some.to_vec()),
                },
                base_model_name_or_path,
                ..Ia3Config::default()
            }),
            Self::Unfreeze(spec) => AdapterConfig::Full(FullConfig {
                base_model_name_or_path,
                ..spec.config()
            }),
        };
        if classify {
            config.with_score_head()
        } else {
            config
        }
    }
}

impl std::fmt::Display for WaySpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sorted = |modules: &[String]| {
            let mut modules = modules.to_vec();
            modules.sort_unstable();
            modules.join(", ")
        };
        match self {
            Self::Unfreeze(spec) => spec.fmt(f),
            Self::Ia3(spec) => {
                let targets = sorted(&spec.target_modules);
                write!(f, "(IA)3 on {targets}")?;
                match sorted(&spec.feedforward_modules) {
                    none if none.is_empty() => Ok(()),
                    inputs => write!(f, ", on the inputs of {inputs}"),
                }
            }
        }
    }
}

impl std::fmt::Display for UnfreezeSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut modules: Vec<&str> = self.modules.iter().map(String::as_str).collect();
        modules.sort_unstable();
        let of_layers = |module: &&str| LayerTensor::named(module).is_some();
        let (inside, outside): (Vec<&str>, Vec<&str>) = modules.into_iter().partition(of_layers);
        let mut parts = Vec::new();
        if !self.layers.is_empty() {
            let inside = match inside.as_slice() {
                [] => "all modules".to_owned(),
                some => some.join(", "),
            };
            parts.push(format!("{inside} of layers {:?}", self.layers));
        }
        if !outside.is_empty() {
            parts.push(outside.join(", "));
        }
        write!(f, "{}, unfrozen", parts.join(" and "))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use espalier_engine::model::Family;

    use super::*;
    use crate::jobs::defaults::tests::limits;

    const AT: Circumstances = Circumstances {
        examples: 100,
        validated: true,
        classifies: false,
        hidden: 2000,
        layers: 4,
        family: Family::Llama,
    };

    const BASE: BaseShape = BaseShape {
        layers: 4,
        hidden: 6,
        intermediate: 10,
        heads: 4,
        kv_heads: 1,
        head_dim: 2,
        vocab: 11,
        tied_embeddings: false,
    };

    fn decide(request: &WayRequest, head_only: bool) -> Result<WaySpec, JobError> {
        request.decide((head_only, &BASE), &limits(), &mut Choices::default())
    }

    fn unfreeze(last: Option<u32>, layers: &[u32], modules: &[&str]) -> WayRequest {
        WayRequest::Unfreeze {
            whole_model: false,
            last_layers: last,
            layers: layers.to_vec(),
            modules: modules.iter().map(|m| (*m).to_owned()).collect(),
        }
    }

    #[test]
    fn layers_are_named_from_the_top_or_one_by_one() {
        let text = |request| decide(&request, false).unwrap().to_string();
        let top = text(unfreeze(Some(2), &[], &[]));
        assert_eq!(top, "all modules of layers [2, 3], unfrozen");
        let some = text(unfreeze(None, &[3, 0, 3], &["up_proj", "input_layernorm"]));
        assert_eq!(some, "input_layernorm, up_proj of layers [0, 3], unfrozen");
        let ends = text(unfreeze(None, &[], &["norm", "embed_tokens"]));
        assert_eq!(ends, "embed_tokens, norm, unfrozen");
        let both = text(unfreeze(Some(1), &[], &["lm_head", "v_proj"]));
        assert_eq!(both, "v_proj of layers [3] and lm_head, unfrozen");
        let top = text(unfreeze(Some(1), &[], &["norm", "lm_head"]));
        assert_eq!(top, "all modules of layers [3] and lm_head, norm, unfrozen");
        let refused = |request| decide(&request, false).unwrap_err().to_string();
        for (request, expected) in [
            (
                unfreeze(None, &[], &[]),
                "unfreeze: last_layers, layers or whole_model is required",
            ),
            (
                unfreeze(Some(5), &[], &[]),
                "unfreeze.last_layers: 5 is outside 1 to 4",
            ),
            (
                unfreeze(Some(1), &[1], &[]),
                "unfreeze.last_layers: layers is set too",
            ),
            (
                unfreeze(None, &[4], &[]),
                "unfreeze.layers: layer 4 does not exist",
            ),
            (
                unfreeze(None, &[], &["norm", "up_proj"]),
                "unfreeze: last_layers, layers or whole_model is required",
            ),
            (unfreeze(Some(1), &[], &["w1"]), "\"w1\" is none of q_proj"),
        ] {
            let error = refused(request);
            assert!(error.contains(expected), "{error}");
        }
        let decided = |limits: JobLimits| {
            let choices = &mut Choices::default();
            unfreeze(Some(1), &[], &[]).decide((false, &BASE), &limits, choices)
        };
        let told = |limits: JobLimits, expected: &str| {
            let error = decided(limits).unwrap_err().to_string();
            let made = "328 numbers make a version of 1312 bytes and take 7872 while it trains";
            assert!(error.contains(made) && error.contains(expected), "{error}");
            assert!(error.contains("fewer layers"), "{error}");
        };
        let mut narrow = limits();
        narrow.adapter_cache_bytes = 4 * 328 - 1;
        told(narrow, "1312 is more than the 1311 that all versions");
        let mut narrow = limits();
        narrow.training_job_bytes = 24 * 328 - 1;
        told(
            narrow.clone(),
            "7872 is more than the 7871 that a job may hold",
        );
        narrow.training_job_bytes += 1;
        decided(narrow).unwrap();
        let mut choices = Choices::default();
        let asked = unfreeze(Some(1), &[], &[]);
        let hyper = asked.hyper((&HyperRequest::default(), &AT), &mut choices);
        assert!((hyper.unwrap().learning_rate.unwrap() - 5e-5).abs() < 1e-12);
        assert!(
            choices.0[0].reason.contains("a tenth of LoRA's"),
            "{choices:?}"
        );
    }

    #[test]
    fn the_whole_model_is_named_alone() {
        let whole = |last_layers, layers: &[u32], modules: &[&str]| WayRequest::Unfreeze {
            whole_model: true,
            last_layers,
            layers: layers.to_vec(),
            modules: modules.iter().map(|m| (*m).to_owned()).collect(),
        };
        let tied = BaseShape {
            tied_embeddings: true,
            ..BASE
        };
        let decide = |request: &WayRequest, base: &BaseShape| {
            request.decide((false, base), &limits(), &mut Choices::default())
        };
        let all = "all modules of layers [0, 1, 2, 3] and embed_tokens, ";
        for (base, rest) in [(BASE, "lm_head, norm, unfrozen"), (tied, "norm, unfrozen")] {
            let spec = decide(&whole(None, &[], &[]), &base).unwrap();
            assert_eq!(spec.to_string(), format!("{all}{rest}"));
        }
        let refused =
            |request: &WayRequest, base: &BaseShape| decide(request, base).unwrap_err().to_string();
        for (request, other) in [
            (whole(Some(1), &[], &[]), "last_layers"),
            (whole(None, &[0], &[]), "layers"),
            (whole(None, &[], &["norm"]), "modules"),
        ] {
            let error = refused(&request, &BASE);
            let expected = format!("unfreeze.whole_model: {other} is set too");
            assert!(error.contains(&expected), "{error}");
        }
        let error = refused(&unfreeze(None, &[], &["lm_head"]), &tied);
        assert!(
            error.contains("embed_tokens is its output head too"),
            "{error}"
        );
    }

    fn request(targets: &[&str], feedforward: &[&str]) -> WayRequest {
        let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        WayRequest::Ia3 {
            target_modules: owned(targets),
            feedforward_modules: owned(feedforward),
        }
    }

    #[test]
    fn gaps_are_filled_as_the_paper_has_it() {
        let all = decide(&request(&[], &[]), false).unwrap();
        let text = "(IA)3 on down_proj, k_proj, v_proj, on the inputs of down_proj";
        assert_eq!(all.to_string(), text);
        let config = all.config("base", true);
        assert!(config.wants_score());
        let queries = decide(&request(&["q_proj"], &[]), false).unwrap();
        assert_eq!(queries.to_string(), "(IA)3 on q_proj");
        let mut choices = Choices::default();
        let hyper = request(&[], &[])
            .hyper((&HyperRequest::default(), &AT), &mut choices)
            .unwrap();
        assert_eq!(hyper.learning_rate, Some(3e-3));
        let [choice] = choices.0.as_slice() else {
            panic!("{choices:?}")
        };
        assert_eq!(
            (choice.field.as_str(), choice.value.as_str()),
            ("hyper_parameters.learning_rate", "0.003")
        );
    }

    #[test]
    fn what_cannot_be_is_refused_by_field_value_and_next_step() {
        let refused = |request: WayRequest, head_only: bool| {
            decide(&request, head_only).unwrap_err().to_string()
        };
        let error = refused(request(&["lm_head"], &[]), false);
        assert!(
            error.contains("ia3.target_modules") && error.contains("lm_head"),
            "{error}"
        );
        let error = refused(request(&["k_proj"], &["down_proj"]), false);
        assert!(
            error.contains("ia3.feedforward_modules: \"down_proj\""),
            "{error}"
        );
        let error = refused(request(&[], &[]), true);
        assert!(error.contains("head_only"), "{error}");
        let ratio = HyperRequest {
            lora_plus_ratio: Some(16.0),
            ..HyperRequest::default()
        };
        let error = request(&[], &[]).hyper((&ratio, &AT), &mut Choices::default());
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("lora_plus_ratio") && error.contains("ia3"),
            "{error}"
        );
    }
}
