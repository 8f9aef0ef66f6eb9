//! Unfreezing: which tensors of the base are trained whole.
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

/// A tensor of the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BaseTensor {
    /// One of a decoder layer, counted from 0.
    Layer(usize, LayerTensor),
    /// The embedding table, `[vocab, hidden]`; the output head too where the base ties the two.
    Embedding,
    /// The norm behind the last layer, `[hidden]`.
    FinalNorm,
    /// The output head, `[vocab, hidden]`, where it is not the embedding table.
    Output,
}

/// Which tensors are unfrozen: modules of layers, and modules that stand outside of them.
#[derive(Clone, Debug, PartialEq)]
pub struct FullConfig {
    /// The layers, ascending.
    pub layers: Vec<usize>,
    /// Names of modules, as [`BaseTensor::module`] has them: those of layers, all where none of them is named, and those that
    /// stand outside.
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

    /// The layers' module of this name.
    #[must_use]
    pub fn named(module: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.module() == module)
    }

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

    fn path(self, layer: usize) -> String {
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

    fn shape(self, base: &BaseShape) -> Vec<usize> {
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
}

// === impl BaseTensor ===

impl BaseTensor {
    /// Every tensor that stands outside the layers.
    pub const OUTSIDE: [Self; 3] = [Self::Embedding, Self::FinalNorm, Self::Output];

    /// The module outside the layers of this name.
    #[must_use]
    pub fn outside(module: &str) -> Option<Self> {
        Self::OUTSIDE.into_iter().find(|t| t.module() == module)
    }

    /// A projection's weight.
    #[must_use]
    pub const fn weight(layer: usize, site: Site) -> Self {
        Self::Layer(layer, LayerTensor::Weight(site))
    }

    /// The module that it belongs to, by its own name: `q_proj`, `input_layernorm`, `embed_tokens`.
    #[must_use]
    pub const fn module(self) -> &'static str {
        match self {
            Self::Layer(_, tensor) => tensor.module(),
            Self::Embedding => "embed_tokens",
            Self::FinalNorm => "norm",
            Self::Output => "lm_head",
        }
    }

    /// Its name in the base model: `model.layers.3.self_attn.q_proj.weight`.
    #[must_use]
    pub fn path(self) -> String {
        match self {
            Self::Layer(layer, tensor) => tensor.path(layer),
            Self::Embedding => "model.embed_tokens.weight".to_owned(),
            Self::FinalNorm => "model.norm.weight".to_owned(),
            Self::Output => "lm_head.weight".to_owned(),
        }
    }

    /// Its shape in a base.
    #[must_use]
    pub fn shape(self, base: &BaseShape) -> Vec<usize> {
        match self {
            Self::Layer(_, tensor) => tensor.shape(base),
            Self::Embedding | Self::Output => vec![base.vocab, base.hidden],
            Self::FinalNorm => vec![base.hidden],
        }
    }

    /// Whether it is multiplied by or looked up in, and not added or multiplied with number by number.
    #[must_use]
    pub const fn is_matrix(self) -> bool {
        matches!(
            self,
            Self::Layer(_, LayerTensor::Weight(_)) | Self::Embedding | Self::Output
        )
    }

    /// Whether every family has it.
    #[must_use]
    pub const fn everywhere(self) -> bool {
        match self {
            Self::Layer(_, tensor) => matches!(
                tensor,
                LayerTensor::Weight(_) | LayerTensor::AttnNorm | LayerTensor::MlpNorm
            ),
            Self::Embedding | Self::FinalNorm => true,
            Self::Output => false,
        }
    }

    /// Why a base of this shape has no such tensor, if it has none. Biases and norms of heads are the family's and not told by
    /// its shape.
    #[must_use]
    pub fn absent(self, base: &BaseShape) -> Option<String> {
        match self {
            Self::Layer(layer, _) if layer >= base.layers => Some(format!(
                "layer {layer} of a base with {} layers",
                base.layers
            )),
            Self::Output if base.tied_embeddings => {
                Some("a base whose output head is its embedding table".to_owned())
            }
            _ => None,
        }
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

    /// The whole of a base: every module of every layer, and what stands outside.
    #[must_use]
    pub fn whole(base: &BaseShape) -> Self {
        let outside = BaseTensor::OUTSIDE.into_iter();
        let outside = outside.filter(|tensor| tensor.absent(base).is_none());
        Self {
            modules: outside.map(|tensor| tensor.module().to_owned()).collect(),
            ..Self::new((0..base.layers).collect())
        }
    }

    /// Every tensor that it unfreezes, those that not every family has included.
    #[must_use]
    pub fn tensors(&self) -> BTreeSet<BaseTensor> {
        let named = |tensor: &BaseTensor| self.modules.iter().any(|m| m == tensor.module());
        let layers = self.layers.iter().flat_map(|layer| {
            let all = LayerTensor::ALL.into_iter();
            all.map(|tensor| BaseTensor::Layer(*layer, tensor))
        });
        let mut modules = self.modules.iter();
        let all = !modules.any(|module| LayerTensor::named(module).is_some());
        let layers = layers.filter(|tensor| all || named(tensor));
        layers
            .chain(BaseTensor::OUTSIDE.into_iter().filter(named))
            .collect()
    }
}
