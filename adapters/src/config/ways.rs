//! The ways to adapt a base beside LoRA, and one configuration for whichever an adapter has.
//!
//! Fields bear PEFT's names. This file must know neither JSON nor tensors.

use super::{FullConfig, LoraConfig, Modules, Site, TaskType};

/// Which side of a projection a vector of (IA)3 multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleOn {
    /// `y = l * (W x + b)`, `l [out]`.
    Outputs,
    /// `y = W (l * x) + b`, `l [in]`: PEFT's feedforward modules.
    Inputs,
}

impl ScaleOn {
    /// How many numbers the vector has at a projection of these `(inputs, outputs)`.
    #[must_use]
    pub const fn width(self, (inputs, outputs): (usize, usize)) -> usize {
        match self {
            Self::Outputs => outputs,
            Self::Inputs => inputs,
        }
    }
}

/// The part of PEFT's `IA3Config` that decides what an adapter computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Ia3Config {
    /// Which modules are scaled.
    pub target_modules: Modules,
    /// Which of those are not after all.
    pub exclude_modules: Option<Modules>,
    /// Which of the targets are scaled on their inputs; the others are on their outputs.
    pub feedforward_modules: Modules,
    /// Modules saved whole beside the vectors: the `score` head.
    pub modules_to_save: Option<Vec<String>>,
    /// What the adapter is for; `None` when the file does not say.
    pub task_type: Option<TaskType>,
    /// The base that the adapter was trained on, as its author called it. Information, not identity.
    pub base_model_name_or_path: Option<String>,
}

/// How an adapter changes its base: what its `adapter_config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub enum AdapterConfig {
    /// Low-rank updates: LoRA, rsLoRA, DoRA, and a head alone.
    Lora(LoraConfig),
    /// Vectors that scale keys, values and the MLP's inner state.
    Ia3(Ia3Config),
    /// Whole tensors of the base, as deltas.
    Full(FullConfig),
}

// === impl Ia3Config ===

impl Ia3Config {
    /// What the paper scales (Liu et al., 2022, section 3.3), and PEFT by default for Llama: keys, values, and what `down_proj`
    /// reads.
    pub const DEFAULT_TARGETS: [Site; 3] = [Site::K, Site::V, Site::Down];

    /// These sites, those of `feedforward` on their inputs.
    #[must_use]
    pub fn new(targets: &[Site], feedforward: &[Site]) -> Self {
        Self {
            target_modules: Modules::sites(targets),
            exclude_modules: None,
            feedforward_modules: Modules::sites(feedforward),
            modules_to_save: None,
            task_type: Some(TaskType::CausalLm),
            base_model_name_or_path: None,
        }
    }
}

impl Default for Ia3Config {
    fn default() -> Self {
        Self::new(&Self::DEFAULT_TARGETS, &[Site::Down])
    }
}

// === impl AdapterConfig ===

impl AdapterConfig {
    /// The configuration of an adapter of low-rank updates.
    #[must_use]
    pub fn lora(&self) -> Option<&LoraConfig> {
        match self {
            Self::Lora(lora) => Some(lora),
            Self::Ia3(_) | Self::Full(_) => None,
        }
    }

    /// The same with a `score` head saved beside it, as PEFT spells a sequence classifier.
    #[must_use]
    pub fn with_score_head(self) -> Self {
        let modules_to_save = Some(vec!["classifier".to_owned(), "score".to_owned()]);
        let task_type = Some(TaskType::SeqCls);
        match self {
            Self::Lora(lora) => Self::Lora(lora.with_score_head()),
            Self::Ia3(ia3) => Self::Ia3(Ia3Config {
                modules_to_save,
                task_type,
                ..ia3
            }),
            Self::Full(full) => Self::Full(FullConfig {
                modules_to_save,
                task_type,
                ..full
            }),
        }
    }

    /// Whether it promises a head. PEFT adds the names itself for a sequence classifier.
    #[must_use]
    pub fn wants_score(&self) -> bool {
        let (modules, task) = match self {
            Self::Lora(lora) => (&lora.modules_to_save, lora.task_type),
            Self::Ia3(ia3) => (&ia3.modules_to_save, ia3.task_type),
            Self::Full(full) => (&full.modules_to_save, full.task_type),
        };
        let named = modules.as_ref();
        named.is_some_and(|names| names.iter().any(|name| name == "score"))
            || task == Some(TaskType::SeqCls)
    }

    /// Which modules it targets by PEFT's rules; `None` of whole tensors, which are named by layer.
    #[must_use]
    pub fn target_modules(&self) -> Option<&Modules> {
        match self {
            Self::Lora(lora) => Some(&lora.target_modules),
            Self::Ia3(ia3) => Some(&ia3.target_modules),
            Self::Full(_) => None,
        }
    }

    /// The base that it was trained on, as its author called it.
    #[must_use]
    pub fn base_name(&self) -> Option<&str> {
        match self {
            Self::Lora(lora) => lora.base_model_name_or_path.as_deref(),
            Self::Ia3(ia3) => ia3.base_model_name_or_path.as_deref(),
            Self::Full(full) => full.base_model_name_or_path.as_deref(),
        }
    }
}

impl From<LoraConfig> for AdapterConfig {
    fn from(config: LoraConfig) -> Self {
        Self::Lora(config)
    }
}

impl From<Ia3Config> for AdapterConfig {
    fn from(config: Ia3Config) -> Self {
        Self::Ia3(config)
    }
}

impl From<FullConfig> for AdapterConfig {
    fn from(config: FullConfig) -> Self {
        Self::Full(config)
    }
}

impl From<&LoraConfig> for AdapterConfig {
    fn from(config: &LoraConfig) -> Self {
        Self::Lora(config.clone())
    }
}

impl From<&Ia3Config> for AdapterConfig {
    fn from(config: &Ia3Config) -> Self {
        Self::Ia3(config.clone())
    }
}

impl From<&FullConfig> for AdapterConfig {
    fn from(config: &FullConfig) -> Self {
        Self::Full(config.clone())
    }
}

impl From<&Self> for AdapterConfig {
    fn from(config: &Self) -> Self {
        config.clone()
    }
}
