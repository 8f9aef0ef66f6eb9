//! `config.json` of a Hugging Face directory, in the spellings of transformers 4 and 5. A field that would change the model and is
//! not known here is refused rather than overlooked.

use serde_json::Value;

use super::config::{Family, ModelConfig, RopeConfig, RopeScaling};
use super::error::ModelError;

const DEFAULT_THETA: f32 = 10_000.0;
const DEFAULT_EPSILON: f32 = 1e-6;

/// The fields of one JSON object; `null` counts as absent.
pub(super) struct Fields<'a> {
    file: &'a str,
    prefix: &'a str,
    json: &'a Value,
}

impl<'a> Fields<'a> {
    pub(super) fn new(file: &'a str, json: &'a Value) -> Self {
        Self {
            file,
            prefix: "",
            json,
        }
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        self.json.get(name).filter(|value| !value.is_null())
    }

    fn error(&self, name: &str, rule: impl Into<String>) -> ModelError {
        let found = self
            .get(name)
            .map_or_else(|| "is missing".to_owned(), |value| format!("is {value}"));
        ModelError::field(self.file, &format!("{}{name}", self.prefix), found, rule)
    }

    fn typed<T>(
        &self,
        name: &str,
        wanted: &str,
        pick: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        pick(value)
            .map(Some)
            .ok_or_else(|| self.error(name, format!("must be {wanted}")))
    }

    fn size(&self, name: &str) -> Result<Option<usize>, ModelError> {
        self.typed(name, "a non-negative integer", |value| {
            usize::try_from(value.as_u64()?).ok()
        })
    }

    fn required(&self, name: &str) -> Result<usize, ModelError> {
        self.size(name)?
            .ok_or_else(|| self.error(name, "must be a non-negative integer"))
    }

    fn float(&self, name: &str) -> Result<Option<f32>, ModelError> {
        self.typed(name, "a number", |value| {
            value.as_f64().map(|value| value as f32)
        })
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, ModelError> {
        self.typed(name, "true or false", Value::as_bool)
    }

    fn text(&self, name: &str) -> Result<Option<&'a str>, ModelError> {
        self.typed(name, "text", Value::as_str)
    }

    /// One token id, a list of them, or none.
    pub(super) fn ids(&self, name: &str) -> Result<Vec<u32>, ModelError> {
        let one = |value: &Value| u32::try_from(value.as_u64()?).ok();
        let ids = self.typed(name, "a token id or a list of them", |value| match value {
            Value::Array(values) => values.iter().map(one).collect::<Option<Vec<u32>>>(),
            value => one(value).map(|id| vec![id]),
        });
        Ok(ids?.unwrap_or_default())
    }

    fn object(&self, name: &str, prefix: &'a str) -> Result<Option<Fields<'a>>, ModelError> {
        let json = self.typed(name, "an object", |value| {
            value.is_object().then_some(value)
        })?;
        Ok(json.map(|json| Fields {
            file: self.file,
            prefix,
            json,
        }))
    }
}

/// Reads the configuration of a decoder; sizes are as the file says, [`ModelConfig::validate`] bounds them.
pub(super) fn read(fields: &Fields<'_>) -> Result<ModelConfig, ModelError> {
    let family = family(fields)?;
    refuse(fields, family)?;
    let (hidden, heads) = (
        fields.required("hidden_size")?,
        fields.required("num_attention_heads")?,
    );
    // Qwen3 alone has a head size that does not follow from the others when it is left out.
    let head_dim = if family == Family::Qwen3 {
        128
    } else {
        hidden / heads.max(1)
    };
    let layers = fields.required("num_hidden_layers")?;
    Ok(ModelConfig {
        family,
        layers,
        hidden,
        intermediate: fields.required("intermediate_size")?,
        heads,
        kv_heads: fields.size("num_key_value_heads")?.unwrap_or(heads),
        head_dim: fields.size("head_dim")?.unwrap_or(head_dim),
        vocab: fields.required("vocab_size")?,
        rms_eps: fields.float("rms_norm_eps")?.unwrap_or(DEFAULT_EPSILON),
        rope: rope(fields)?,
        context_length: fields.required("max_position_embeddings")?,
        tie_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        qkv_bias: family == Family::Qwen2,
        qk_norm: family == Family::Qwen3,
        sliding_window: sliding_window(fields, family, layers)?,
    })
}

fn family(fields: &Fields<'_>) -> Result<Family, ModelError> {
    let (family, class) = match fields.text("model_type")? {
        Some("llama") => (Family::Llama, "LlamaForCausalLM"),
        Some("mistral") => (Family::Mistral, "MistralForCausalLM"),
        Some("qwen2") => (Family::Qwen2, "Qwen2ForCausalLM"),
        Some("qwen3") => (Family::Qwen3, "Qwen3ForCausalLM"),
        _ => {
            return Err(fields.error(
                "model_type",
                "must be llama (which includes SmolLM2), mistral, qwen2 or qwen3",
            ));
        }
    };
    let classes = fields.typed("architectures", "a list of class names", Value::as_array)?;
    if classes.is_some_and(|classes| !classes.iter().any(|name| name.as_str() == Some(class))) {
        return Err(fields.error(
            "architectures",
            format!("must name {class}; other heads are no base model"),
        ));
    }
    Ok(family)
}

/// What would change the model's arithmetic and has no counterpart in the decoder.
fn refuse(fields: &Fields<'_>, family: Family) -> Result<(), ModelError> {
    if fields.get("quantization_config").is_some() {
        return Err(fields.error(
            "quantization_config",
            "quantised checkpoints are not read; use the f32, f16 or bf16 weights, or a GGUF",
        ));
    }
    if !matches!(fields.text("hidden_act")?, None | Some("silu" | "swish")) {
        return Err(fields.error("hidden_act", "must be silu"));
    }
    // Qwen2's own biases are fixed by its family, whatever this field says there.
    if family != Family::Qwen2 && fields.flag("attention_bias")? == Some(true) {
        return Err(fields.error(
            "attention_bias",
            "biases on all four projections are not supported",
        ));
    }
    for (name, rule) in [
        ("mlp_bias", "biases in the MLP are not supported"),
        (
            "rope_interleaved",
            "interleaved rotary pairs are not supported",
        ),
    ] {
        if fields.flag(name)? == Some(true) {
            return Err(fields.error(name, rule));
        }
    }
    if fields
        .float("partial_rotary_factor")?
        .is_some_and(|factor| factor != 1.0)
    {
        return Err(fields.error("partial_rotary_factor", "must be 1: heads are turned whole"));
    }
    Ok(())
}

/// transformers 5 writes `rope_parameters`, which holds theta too; 4 writes `rope_theta` and `rope_scaling`, whose kind was called
/// `type` before it was called `rope_type`.
fn rope(fields: &Fields<'_>) -> Result<RopeConfig, ModelError> {
    let parameters = fields.object("rope_parameters", "rope_parameters.")?;
    let scaling = match &parameters {
        Some(_) => parameters,
        None => fields.object("rope_scaling", "rope_scaling.")?,
    };
    let inner_theta = match &scaling {
        Some(inner) => inner.float("rope_theta")?,
        None => None,
    };
    let theta = inner_theta
        .or(fields.float("rope_theta")?)
        .unwrap_or(DEFAULT_THETA);
    let Some(inner) = scaling else {
        return Ok(RopeConfig {
            theta,
            scaling: RopeScaling::None,
        });
    };
    let kind_name = if inner.get("rope_type").is_some() {
        "rope_type"
    } else {
        "type"
    };
    let number = |name: &str| {
        inner
            .float(name)?
            .ok_or_else(|| inner.error(name, "must be a number"))
    };
    if inner
        .float("partial_rotary_factor")?
        .is_some_and(|factor| factor != 1.0)
    {
        return Err(inner.error("partial_rotary_factor", "must be 1: heads are turned whole"));
    }
    let scaling = match inner.text(kind_name)? {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear {
            factor: number("factor")?,
        },
        Some("llama3") => RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_context_length: inner.required("original_max_position_embeddings")?,
        },
        Some(_) => return Err(inner.error(kind_name, "must be default, linear or llama3")),
    };
    Ok(RopeConfig { theta, scaling })
}

/// One window for all layers or none; a mixture is refused. Qwen's files name a window that `use_sliding_window` switches off.
fn sliding_window(
    fields: &Fields<'_>,
    family: Family,
    layers: usize,
) -> Result<Option<usize>, ModelError> {
    let window = fields.size("sliding_window")?;
    if let Some(types) = fields.typed("layer_types", "a list of layer types", Value::as_array)? {
        let all = |kind: &str| types.iter().all(|name| name.as_str() == Some(kind));
        return match (all("full_attention"), all("sliding_attention"), window) {
            (true, ..) => Ok(None),
            (_, true, Some(window)) => Ok(Some(window)),
            _ => Err(fields.error("layer_types", "must be full_attention throughout, or sliding_attention throughout with sliding_window")),
        };
    }
    match family {
        Family::Llama => Ok(None),
        Family::Mistral => Ok(window),
        Family::Qwen2 | Family::Qwen3 => {
            // Layers from `max_window_layers` on have the window, those before see all.
            let full = fields.size("max_window_layers")?.unwrap_or(28).min(layers);
            match (fields.flag("use_sliding_window")?.unwrap_or(false), full) {
                (false, _) => Ok(None),
                (true, full) if full == layers => Ok(None),
                (true, 0) => Ok(window),
                (true, _) => Err(fields.error(
                    "max_window_layers",
                    "layers with and without a window are not supported in one model",
                )),
            }
        }
    }
}
