//! What an adapter adapts: the seven linear sites of a decoder layer, the shape of the base, and PEFT's `LoraConfig`; the other
//! ways to adapt stand in `ways`.
//!
//! Plain values that everything else in the workspace may hold. Which module a pattern matches is decided in `targets`,
//! how the file is spelled in `peft`; this file must know neither JSON nor regular expressions, and nothing of tensors.

mod full;
mod targets;
mod ways;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use full::{BaseTensor, FullConfig, LayerTensor};
pub use targets::{MAX_PATTERN_BYTES, SitePlan};
pub use ways::{AdapterConfig, Ia3Config, ScaleOn};

/// One of the seven linear projections of a decoder layer that an adapter may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Site {
    /// `self_attn.q_proj`, [heads * head_dim, hidden].
    Q,
    /// `self_attn.k_proj`, [kv_heads * head_dim, hidden].
    K,
    /// `self_attn.v_proj`, [kv_heads * head_dim, hidden].
    V,
    /// `self_attn.o_proj`, [hidden, heads * head_dim].
    O,
    /// `mlp.gate_proj`, [intermediate, hidden].
    Gate,
    /// `mlp.up_proj`, [intermediate, hidden].
    Up,
    /// `mlp.down_proj`, [hidden, intermediate].
    Down,
}

impl Site {
    /// Every site, in the order of [`Site::index`].
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// Position in [`Site::ALL`], for tables by site.
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The module's own name, as `target_modules` lists it: `q_proj`.
    #[must_use]
    pub const fn module(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// The block that holds the module: `self_attn` or `mlp`.
    #[must_use]
    pub const fn block(self) -> &'static str {
        match self {
            Self::Q | Self::K | Self::V | Self::O => "self_attn",
            Self::Gate | Self::Up | Self::Down => "mlp",
        }
    }

    /// The module's path in the base model: `model.layers.3.self_attn.q_proj`.
    #[must_use]
    pub fn path(self, layer: usize) -> String {
        format!("model.layers.{layer}.{}.{}", self.block(), self.module())
    }

    /// The site whose module has this name.
    #[must_use]
    pub fn from_module(module: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|site| site.module() == module)
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.module())
    }
}

/// The sizes of a base model that decide the shapes of its adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BaseShape {
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of one head; not always `hidden / heads`.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Whether the embedding table is the output head too.
    #[serde(default)]
    pub tied_embeddings: bool,
}

impl BaseShape {
    /// (in, out) of a site's weight, which is stored as [out, in].
    #[must_use]
    pub const fn dims(&self, site: Site) -> (usize, usize) {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match site {
            Site::Q => (self.hidden, q),
            Site::K | Site::V => (self.hidden, kv),
            Site::O => (q, self.hidden),
            Site::Gate | Site::Up => (self.hidden, self.intermediate),
            Site::Down => (self.intermediate, self.hidden),
        }
    }
}

/// How PEFT names modules: by a list of names, by one regular expression, or all at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Modules {
    /// A module matches when it equals an entry or ends with `.` and the entry.
    List(Vec<String>),
    /// A module matches when the whole path matches (Python's `re.fullmatch`).
    Pattern(String),
    /// PEFT's `"all-linear"`: every linear module but the output head, here the seven sites.
    AllLinear,
    /// PEFT's `"dummy-target-modules"`: no module at all; an adapter that is only a head.
    Nothing,
}

impl Modules {
    /// The list of these sites' module names.
    #[must_use]
    pub fn sites(sites: &[Site]) -> Self {
        Self::List(sites.iter().map(|s| s.module().to_owned()).collect())
    }
}

/// `init_lora_weights`: how A and B were initialised. Reading an adapter needs it only to refuse those whose base was
/// changed by the initialisation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Init {
    /// `true` (A Kaiming uniform, B zero) or `false` (both random).
    Default(bool),
    /// A named method, such as `gaussian`.
    Named(String),
}

/// What the adapter was trained for, as PEFT names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TaskType {
    /// Next-token prediction.
    #[serde(rename = "CAUSAL_LM")]
    CausalLm,
    /// Classification by a `score` head on the last token.
    #[serde(rename = "SEQ_CLS")]
    SeqCls,
}

impl TaskType {
    /// PEFT's spelling.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::CausalLm => "CAUSAL_LM",
            Self::SeqCls => "SEQ_CLS",
        }
    }
}

/// The part of PEFT's `LoraConfig` that decides what an adapter computes. Fields bear PEFT's names.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank where `rank_pattern` names no other.
    pub r: usize,
    /// Alpha where `alpha_pattern` names no other.
    pub lora_alpha: f64,
    /// Dropout of the adapter's input in training, 0 to 1; serving ignores it.
    pub lora_dropout: f64,
    /// Which modules carry an adapter.
    pub target_modules: Modules,
    /// Which of those do not after all.
    pub exclude_modules: Option<Modules>,
    /// Only these layers; all when `None` or empty.
    pub layers_to_transform: Option<Vec<usize>>,
    /// The name before the layer number (`layers`); any when `None` or empty.
    pub layers_pattern: Option<Vec<String>>,
    /// Ranks of modules that match a pattern; the first match in this order counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of modules that match a pattern; the first match in this order counts.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Scale by alpha / sqrt(r) instead of alpha / r.
    pub use_rslora: bool,
    /// The adapter has magnitudes: weight-decomposed LoRA.
    pub use_dora: bool,
    /// How the weights were initialised.
    pub init_lora_weights: Init,
    /// Modules saved whole beside the adapter: the `score` head.
    pub modules_to_save: Option<Vec<String>>,
    /// What the adapter is for; `None` when the file does not say.
    pub task_type: Option<TaskType>,
    /// The base that the adapter was trained on, as its author called it. Information, not identity.
    pub base_model_name_or_path: Option<String>,
}

impl LoraConfig {
    /// A plain LoRA on these sites, as PEFT would write it for generation.
    #[must_use]
    pub fn new(r: usize, lora_alpha: f64, sites: &[Site]) -> Self {
        Self {
            r,
            lora_alpha,
            lora_dropout: 0.0,
            target_modules: Modules::sites(sites),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            use_rslora: false,
            use_dora: false,
            init_lora_weights: Init::Default(true),
            modules_to_save: None,
            task_type: Some(TaskType::CausalLm),
            base_model_name_or_path: None,
        }
    }

    /// No low-rank part at all: only a `score` head on the frozen base.
    #[must_use]
    pub fn head_only() -> Self {
        Self {
            target_modules: Modules::Nothing,
            ..Self::new(8, 8.0, &[]).with_score_head()
        }
    }

    /// The same with a `score` head saved beside it, as PEFT spells a sequence classifier.
    #[must_use]
    pub fn with_score_head(self) -> Self {
        Self {
            modules_to_save: Some(vec!["classifier".to_owned(), "score".to_owned()]),
            task_type: Some(TaskType::SeqCls),
            ..self
        }
    }

    /// The factor on B A x: alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023).
    ///
    /// Computed in f64 and rounded once, as PEFT's Python floats are.
    #[must_use]
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        reason = "ranks are far below 2^52, and the factor multiplies f32 values"
    )]
    pub fn scaling(&self, rank: usize, alpha: f64) -> f32 {
        let r = rank as f64;
        (alpha / if self.use_rslora { r.sqrt() } else { r }) as f32
    }
}
