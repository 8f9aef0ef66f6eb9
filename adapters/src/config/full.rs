//! Unfreezing: which tensors of decoder layers are trained whole.
//!
//! This file must know neither files nor values.

use std::collections::BTreeSet;

use super::{BaseShape, Site, TaskType};

/// A tensor of a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerTensor {
    /// A projection's weight, `[out, in]`.
    Weight(Site),
    /// A projection's bias, `[out]`, where the family has one.
    Bias(Site),
    /// The norm before attention, `[hidden]`.
    AttnNorm,
    /// The norm before the MLP, `[hidden]`.
    MlpNorm,
    /// The norm of each query head, `[head_dim]`, where the family has one.
    QNorm,
    /// The norm of each key head, `[head_dim]`, where the family has one.
    KNorm,
}

/// Which layers are unfrozen, and which of their modules.
#[derive(Clone, Debug, PartialEq)]
pub struct FullConfig {
    /// The layers, ascending.
    pub layers: Vec<usize>,
    /// Names of modules, as [`LayerTensor::module`] has them; all of a layer's when empty.
    pub modules: Vec<String>,
    /// Modules saved whole beside the deltas: the `score` head.
    pub modules_to_save: Option<Vec<String>>,
    /// What the adapter is for; `None` when the file does not say.
    pub task_type: Option<TaskType>,
    /// The base that it was trained on, as its author called it. Information, not identity.
    pub base_model_name_or_path: Option<String>,
}

// === impl LayerTensor ===

impl LayerTensor {
    /// Every tensor that a layer may have.
    pub const ALL: [Self; 14] = [
        Self::Weight(Site::Q),
        Self::Weight(Site::K),
        Self::Weight(Site::V),
        Self::Weight(Site::O),
        Self::Weight(Site::Gate),
        Self::Weight(Site::Up),
        Self::Weight(Site::Down),
        Self::Bias(Site::Q),
        Self::Bias(Site::K),
        Self::Bias(Site::V),
        Self::AttnNorm,
        Self::MlpNorm,
        Self::QNorm,
        Self::KNorm,
    ];

    /// The module that it belongs to, by its own name: `q_proj`, `input_layernorm`.
    #[must_use]
    pub const fn module(self) -> &'static str {
        match self {
            Self::Weight(site) | Self::Bias(site) => site.module(),
            Self::AttnNorm => "input_layernorm",
            Self::MlpNorm => "post_attention_layernorm",
            Self::QNorm => "q_norm",
            Self::KNorm => "k_norm",
        }
    }

    /// Its name in the base model: `model.layers.3.self_attn.q_proj.weight`.
    #[must_use]
    pub fn path(self, layer: usize) -> String {
        let block = match self {
            Self::Weight(site) | Self::Bias(site) => format!("{}.", site.block()),
            Self::QNorm | Self::KNorm => "self_attn.".to_owned(),
            Self::AttnNorm | Self::MlpNorm => String::new(),
        };
        let part = if matches!(self, Self::Bias(_)) {
            "bias"
        } else {
            "weight"
        };
        format!("model.layers.{layer}.{block}{}.{part}", self.module())
    }

    /// Its shape in a base.
    #[must_use]
    pub fn shape(self, base: &BaseShape) -> Vec<usize> {
        match self {
            Self::Weight(site) => {
                let (inputs, outputs) = base.dims(site);
                vec![outputs, inputs]
            }
            Self::Bias(site) => vec![base.dims(site).1],
            Self::AttnNorm | Self::MlpNorm => vec![base.hidden],
            Self::QNorm | Self::KNorm => vec![base.head_dim],
        }
    }

    /// Whether every family has it.
    #[must_use]
    pub const fn everywhere(self) -> bool {
        matches!(self, Self::Weight(_) | Self::AttnNorm | Self::MlpNorm)
    }
}

// === impl FullConfig ===

impl FullConfig {
    /// These layers, whole.
    #[must_use]
    pub fn new(layers: Vec<usize>) -> Self {
        Self {
            layers,
            modules: Vec::new(),
            modules_to_save: None,
            task_type: Some(TaskType::CausalLm),
            base_model_name_or_path: None,
        }
    }

    /// Every tensor that it unfreezes, those that not every family has included.
    #[must_use]
    pub fn tensors(&self) -> BTreeSet<(usize, LayerTensor)> {
        let named = |tensor: &LayerTensor| {
            let mut modules = self.modules.iter();
            self.modules.is_empty() || modules.any(|module| module == tensor.module())
        };
        let layers = self.layers.iter();
        layers
            .flat_map(|layer| LayerTensor::ALL.map(|tensor| (*layer, tensor)))
            .filter(|(_, tensor)| named(tensor))
            .collect()
    }
}
