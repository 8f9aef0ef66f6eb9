//! What a decoder-only base model looks like: sizes, norms, rope, biases. The loaders fill it in from GGUF metadata or `config.json`;
//! the decoder reads it and never asks which file it came from.

use espalier_adapters::config::BaseShape;
use espalier_adapters::gguf::LoraBase;

use super::error::ModelError;

/// The families whose blocks the decoder can run. They differ in biases and norms only, which [`ModelConfig`] states field by
/// field; the family itself is for names and reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3, SmolLM2.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2 and 2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: an RMS norm on each head of q and k.
    Qwen3,
}

impl Family {
    /// The name as `model_type` in `config.json` and as a GGUF architecture spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// `general.architecture` of a GGUF of this family: llama.cpp converts Mistral as Llama.
    pub fn gguf_architecture(self) -> &'static str {
        match self {
            Self::Llama | Self::Mistral => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// Whether a GGUF of this family has the rows of q and k in pairs (`gguf::half_of_pair`).
    pub fn paired_in_gguf(self) -> bool {
        self.gguf_architecture() == "llama"
    }
}

/// How rotary frequencies are stretched for long contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor, at least 1.
        factor: f32,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// The divisor of long wavelengths.
        factor: f32,
        /// Wavelengths above `original_context_length / low_freq_factor` are long.
        low_freq_factor: f32,
        /// Wavelengths below `original_context_length / high_freq_factor` are short.
        high_freq_factor: f32,
        /// The context length of the first training, in tokens.
        original_context_length: usize,
    },
    /// One divisor for each frequency, `[head_dim / 2]`: how a GGUF states Llama 3.1's rule (`rope_freqs.weight`).
    Factors(Vec<f32>),
}

/// Rotary position embedding over the two halves of a head (HF order, not interleaved pairs).
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub theta: f32,
    /// The stretch for long contexts.
    pub scaling: RopeScaling,
}

impl RopeConfig {
    /// The angle per position of each of the `head_dim / 2` rotated pairs, rounded where transformers rounds to f32, because an error
    /// here is multiplied by the position. Llama 3.1's rule is `_compute_llama3_parameters` of transformers' `modeling_rope_utils`.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        let plain = (0..head_dim / 2).map(|pair| {
            let exponent = (2 * pair) as f32 / head_dim as f32;
            1.0 / f64::from(self.theta).powf(f64::from(exponent)) as f32
        });
        match &self.scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|freq| freq / factor).collect(),
            RopeScaling::Factors(factors) => plain
                .zip(factors)
                .map(|(freq, factor)| freq / factor)
                .collect(),
            &RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context_length,
            } => {
                let original = original_context_length as f32;
                plain
                    .map(|freq| {
                        let wavelength = 2.0 * std::f32::consts::PI / freq;
                        if wavelength > original / low_freq_factor {
                            freq / factor
                        } else if wavelength < original / high_freq_factor {
                            freq
                        } else {
                            let smooth = (original / wavelength - low_freq_factor)
                                / (high_freq_factor - low_freq_factor);
                            (1.0 - smooth) * freq / factor + smooth * freq
                        }
                    })
                    .collect()
            }
        }
    }
}

/// The sizes and options of a base model. [`ModelConfig::validate`] holds for every one that a loader hands out.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Which family's file it was.
    pub family: Family,
    /// Number of blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; `heads * head_dim` need not equal `hidden`.
    pub head_dim: usize,
    /// Rows of the embedding table.
    pub vocab: usize,
    /// Epsilon of every RMS norm.
    pub rms_eps: f32,
    /// Rotary positions.
    pub rope: RopeConfig,
    /// Longest sequence, in tokens.
    pub context_length: usize,
    /// The embedding table is the output head too.
    pub tie_embeddings: bool,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// q and k are RMS-normed per head, before rope.
    pub qk_norm: bool,
    /// A token sees itself and the `window - 1` before it; `None` sees all.
    pub sliding_window: Option<usize>,
}

/// Upper bounds that no known model of these families reaches: a file that states more is broken or hostile, and sizes below them
/// cannot overflow when multiplied.
const MAX_LAYERS: usize = 1024;
const MAX_WIDTH: usize = 1 << 18;
const MAX_HEADS: usize = 4096;
const MAX_HEAD_DIM: usize = 1024;
const MAX_VOCAB: usize = 1 << 22;
const MAX_CONTEXT: usize = 1 << 26;

impl ModelConfig {
    /// Width of q: `heads * head_dim`.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of k and of v: `kv_heads * head_dim`.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The sizes that an adapter has to fit.
    pub fn base_shape(&self) -> BaseShape {
        BaseShape {
            layers: self.layers,
            hidden: self.hidden,
            intermediate: self.intermediate,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            vocab: self.vocab,
            tied_embeddings: self.tie_embeddings,
        }
    }

    /// What a GGUF adapter for this model has to know.
    pub fn gguf_lora_base(&self) -> LoraBase {
        LoraBase {
            architecture: self.family.gguf_architecture(),
            paired_rows: self.family.paired_in_gguf(),
            head_dim: self.head_dim,
        }
    }

    /// Checks what the decoder relies on.
    ///
    /// # Errors
    /// [`ModelError::Field`] with `file` as given and the first field that is out of range.
    pub fn validate(&self, file: &str) -> Result<(), ModelError> {
        let sizes = [
            ("layers", self.layers, MAX_LAYERS),
            ("hidden", self.hidden, MAX_WIDTH),
            ("intermediate", self.intermediate, MAX_WIDTH),
            ("heads", self.heads, MAX_HEADS),
            ("kv_heads", self.kv_heads, MAX_HEADS),
            ("head_dim", self.head_dim, MAX_HEAD_DIM),
            ("vocab", self.vocab, MAX_VOCAB),
            ("context_length", self.context_length, MAX_CONTEXT),
        ];
        for (name, value, limit) in sizes {
            if value == 0 || value > limit {
                return Err(ModelError::field(
                    file,
                    name,
                    value,
                    format!("must lie in 1..={limit}"),
                ));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let rule = format!("must divide heads, which is {}", self.heads);
            return Err(ModelError::field(file, "kv_heads", self.kv_heads, rule));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ModelError::field(
                file,
                "head_dim",
                self.head_dim,
                "must be even, rope turns pairs",
            ));
        }
        if !(self.rms_eps > 0.0 && self.rms_eps < 1.0) {
            return Err(ModelError::field(
                file,
                "rms_eps",
                self.rms_eps,
                "must lie between 0 and 1",
            ));
        }
        if !(self.rope.theta.is_finite() && self.rope.theta > 1.0) {
            return Err(ModelError::field(
                file,
                "rope theta",
                self.rope.theta,
                "must be finite and above 1",
            ));
        }
        if self.sliding_window == Some(0) {
            return Err(ModelError::field(
                file,
                "sliding_window",
                0,
                "must be at least 1; leave it out for full attention",
            ));
        }
        self.validate_scaling(file)
    }

    fn validate_scaling(&self, file: &str) -> Result<(), ModelError> {
        let positive = |value: f32| value.is_finite() && value > 0.0;
        let fine = match &self.rope.scaling {
            RopeScaling::None => true,
            RopeScaling::Linear { factor } => positive(*factor),
            RopeScaling::Factors(factors) => {
                factors.len() == self.head_dim / 2 && factors.iter().all(|f| positive(*f))
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context_length,
            } => {
                positive(*factor)
                    && positive(*low_freq_factor)
                    && high_freq_factor.is_finite()
                    && high_freq_factor > low_freq_factor
                    && *original_context_length > 0
            }
        };
        if fine {
            return Ok(());
        }
        let rule = "factors must be finite and positive, one for each pair of a head, and high_freq_factor above low_freq_factor";
        Err(ModelError::field(
            file,
            "rope scaling",
            format!("{:?}", self.rope.scaling),
            rule,
        ))
    }
}
