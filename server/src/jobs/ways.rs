//! The ways to train beside LoRA, as a request names them and as a job keeps them.
//!
//! This file must not know data, storage or time.

use espalier_adapters::config::{AdapterConfig, Ia3Config, Modules, Site};
use serde::{Deserialize, Serialize};

use super::JobError;
use super::spec::HyperRequest;
use crate::registry::VersionSummary;

/// Peak learning rate of (IA)3's vectors: that of the paper (Liu et al., 2022, section 3.2), whatever the width of the base.
const IA3_LEARNING_RATE: f64 = 3e-3;

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
}

/// What is trained in LoRA's place, frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaySpec {
    /// Vectors of (IA)3.
    Ia3(Ia3Spec),
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
        }
    }

    /// Fills the gaps and checks the rest.
    pub(super) fn decide(&self, head_only: bool) -> Result<WaySpec, JobError> {
        if head_only {
            let field = self.field();
            let reason = "head_only trains a head alone: leave one of them out";
            return Err(invalid(field, reason));
        }
        match self {
            Self::Ia3 {
                target_modules,
                feedforward_modules,
            } => ia3(target_modules, feedforward_modules).map(WaySpec::Ia3),
        }
    }

    /// The hyperparameters that are asked for, with the defaults that are this way's own.
    pub(super) fn hyper(&self, asked: &HyperRequest) -> Result<HyperRequest, JobError> {
        if let Some(ratio) = asked.lora_plus_ratio.filter(|ratio| *ratio != 1.0) {
            let reason = format!(
                "{ratio} needs LoRA's B to apply to, and {} has none: leave it out",
                self.field()
            );
            return Err(invalid("hyper_parameters.lora_plus_ratio", reason));
        }
        let rate = match self {
            Self::Ia3 { .. } => IA3_LEARNING_RATE,
        };
        Ok(HyperRequest {
            learning_rate: asked.learning_rate.or(Some(rate)),
            ..asked.clone()
        })
    }
}

fn ia3(targets: &[String], feedforward: &[String]) -> Result<Ia3Spec, JobError> {
    let names = |sites: &[Site]| sites.iter().map(|site| site.module().to_owned()).collect();
    let target_modules: Vec<String> = match targets {
        [] => names(&Ia3Config::DEFAULT_TARGETS),
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
    }
    Ok(Ia3Spec {
        target_modules,
        feedforward_modules,
    })
}

// === impl WaySpec ===

impl WaySpec {
    /// That of a version; `None` of LoRA and of a head alone.
    pub(super) fn of(summary: &VersionSummary) -> Option<Self> {
        let feedforward_modules = summary.feedforward_modules.clone()?;
        Some(Self::Ia3(Ia3Spec {
            target_modules: summary.target_modules.clone(),
            feedforward_modules,
        }))
    }

    /// As the trainer and the artifact want it.
    pub(super) fn config(&self, base_name: &str, classify: bool) -> AdapterConfig {
        let config = match self {
            Self::Ia3(spec) => Ia3Config {
                target_modules: Modules::List(spec.target_modules.clone()),
                feedforward_modules: match spec.feedforward_modules.as_slice() {
                    [] => Modules::Nothing,
                    some => Modules::List(some.to_vec()),
                },
                base_model_name_or_path: Some(base_name.to_owned()),
                ..Ia3Config::default()
            },
        };
        let config = AdapterConfig::from(config);
        if classify {
            config.with_score_head()
        } else {
            config
        }
    }
}

impl std::fmt::Display for WaySpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ia3(spec) => {
                let sorted = |modules: &[String]| {
                    let mut modules = modules.to_vec();
                    modules.sort_unstable();
                    modules.join(", ")
                };
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn request(targets: &[&str], feedforward: &[&str]) -> WayRequest {
        let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        WayRequest::Ia3 {
            target_modules: owned(targets),
            feedforward_modules: owned(feedforward),
        }
    }

    #[test]
    fn gaps_are_filled_as_the_paper_has_it() {
        let all = request(&[], &[]).decide(false).unwrap();
        let text = "(IA)3 on down_proj, k_proj, v_proj, on the inputs of down_proj";
        assert_eq!(all.to_string(), text);
        let config = all.config("base", true);
        assert!(config.wants_score());
        let queries = request(&["q_proj"], &[]).decide(false).unwrap();
        assert_eq!(queries.to_string(), "(IA)3 on q_proj");
        let hyper = request(&[], &[]).hyper(&HyperRequest::default()).unwrap();
        assert_eq!(hyper.learning_rate, Some(3e-3));
    }

    #[test]
    fn what_cannot_be_is_refused_by_field_value_and_next_step() {
        let refused = |request: WayRequest, head_only: bool| {
            request.decide(head_only).unwrap_err().to_string()
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
        let error = request(&[], &[]).hyper(&ratio).unwrap_err().to_string();
        assert!(
            error.contains("lora_plus_ratio") && error.contains("ia3"),
            "{error}"
        );
    }
}
