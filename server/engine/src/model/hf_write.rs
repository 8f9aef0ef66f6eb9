//! A Hugging Face directory to write: `config.json` in the spelling that transformers 4 and 5 both read, and `model.safetensors`
//! a tensor at a time, because a whole model in memory once more is what a machine often has no room for.
//! Knows how files are spelled; what is written into them is the caller's business.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use espalier_adapters::text::Tokenizer;
use half::bf16;
use serde_json::{Map, Value, json};

use super::config::{Family, ModelConfig, RopeConfig, RopeScaling};
use super::error::ModelError;

/// How numbers stand in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileNumbers {
    /// Four bytes.
    F32,
    /// The upper half of an f32, rounded to nearest.
    Bf16,
}

impl FileNumbers {
    /// transformers' word.
    fn torch(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        }
    }

    /// safetensors' word.
    fn dtype(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
        }
    }

    fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// A `model.safetensors` that is being written: its header names every tensor before the first of them is there.
pub(super) struct TensorsFile {
    path: PathBuf,
    out: BufWriter<File>,
    numbers: FileNumbers,
    /// Name and number of values of those that are still to come, the next one last.
    awaited: Vec<(String, usize)>,
    /// Bytes of header and tensors.
    pub(super) bytes: u64,
}

impl TensorsFile {
    /// Begins the file; `tensors` are names and shapes in the order in which they will come.
    pub(super) fn create(
        path: &Path,
        numbers: FileNumbers,
        tensors: &[(String, Vec<usize>)],
    ) -> Result<Self, ModelError> {
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        let mut awaited = Vec::with_capacity(tensors.len());
        let mut start = 0;
        for (name, shape) in tensors {
            let count: usize = shape.iter().product();
            let end = start + count as u64 * numbers.bytes();
            let entry =
                json!({"dtype": numbers.dtype(), "shape": shape, "data_offsets": [start, end]});
            header.insert(name.clone(), entry);
            awaited.push((name.clone(), count));
            start = end;
        }
        awaited.reverse();
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let io = |source| ModelError::io(path, source);
        let mut out = BufWriter::with_capacity(1 << 20, File::create_new(path).map_err(io)?);
        out.write_all(&(header.len() as u64).to_le_bytes())
            .map_err(io)?;
        out.write_all(&header).map_err(io)?;
        Ok(Self {
            path: path.to_owned(),
            out,
            numbers,
            awaited,
            bytes: 8 + header.len() as u64 + start,
        })
    }

    /// The next tensor.
    ///
    /// # Errors
    /// One that is not the next, a number that the file's type cannot hold, or what the operating system says.
    pub(super) fn add(&mut self, name: &str, values: &[f32]) -> Result<(), ModelError> {
        let fail = |rule: String| Err(ModelError::file(&self.path, format!("{name}: {rule}")));
        let next = self.awaited.pop();
        if next
            .as_ref()
            .is_none_or(|(awaited, count)| awaited != name || *count != values.len())
        {
            return fail(format!(
                "{} values came where {next:?} was due",
                values.len()
            ));
        }
        let rounded = |x: &f32| match self.numbers {
            FileNumbers::F32 => *x,
            FileNumbers::Bf16 => bf16::from_f32(*x).to_f32(),
        };
        if let Some(at) = values.iter().position(|x| !rounded(x).is_finite()) {
            let found = values[at];
            return fail(format!(
                "value {at} is {found}; the adapter does not belong to this base"
            ));
        }
        for values in values.chunks(1 << 16) {
            let bytes: Vec<u8> = match self.numbers {
                FileNumbers::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
                FileNumbers::Bf16 => {
                    let halves = values.iter().map(|x| bf16::from_f32(*x));
                    halves.flat_map(|x| x.to_le_bytes()).collect()
                }
            };
            self.out
                .write_all(&bytes)
                .map_err(|source| ModelError::io(&self.path, source))?;
        }
        Ok(())
    }

    /// Ends the file; its bytes are on the disk when this returns.
    pub(super) fn finish(self) -> Result<(), ModelError> {
        if let Some((name, _)) = self.awaited.last() {
            return Err(ModelError::file(&self.path, format!("{name} never came")));
        }
        let io = |source| ModelError::io(&self.path, source);
        let file = self
            .out
            .into_inner()
            .map_err(|error| io(error.into_error()))?;
        file.sync_all().map_err(io)
    }
}

/// `config.json` of a base as a causal language model, or as a sequence classifier where it has `labels`.
///
/// # Errors
/// [`ModelError::Field`] for what Hugging Face's classes of these families cannot say.
pub(super) fn config_json(
    file: &str,
    config: &ModelConfig,
    numbers: FileNumbers,
    labels: Option<&[String]>,
) -> Result<Map<String, Value>, ModelError> {
    let family = hf_family(file, config)?;
    let class = match family {
        Family::Llama => "Llama",
        Family::Mistral => "Mistral",
        Family::Qwen2 => "Qwen2",
        Family::Qwen3 => "Qwen3",
    };
    let task = if labels.is_some() {
        "SequenceClassification"
    } else {
        "CausalLM"
    };
    let mut json = object(json!({
        "architectures": [format!("{class}For{task}")],
        "model_type": family.as_str(),
        "torch_dtype": numbers.torch(),
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": shortest(config.rms_eps),
        "rope_theta": shortest(config.rope.theta),
        "rope_scaling": rope_scaling(file, config)?,
        "tie_word_embeddings": config.tie_embeddings,
        "sliding_window": config.sliding_window,
    }));
    match family {
        Family::Llama => json.extend(object(json!({"attention_bias": false, "mlp_bias": false}))),
        Family::Mistral => {}
        Family::Qwen2 | Family::Qwen3 => {
            // Layers from this one on have the window.
            let (window, first) = (config.sliding_window.is_some(), 0);
            json.extend(object(
                json!({"use_sliding_window": window, "max_window_layers": first}),
            ));
        }
    }
    if let Some(labels) = labels {
        let names = || labels.iter().enumerate();
        let by_row: Map<_, _> = names()
            .map(|(row, label)| (row.to_string(), json!(label)))
            .collect();
        let by_name: Map<_, _> = names()
            .map(|(row, label)| (label.clone(), json!(row)))
            .collect();
        json.insert("id2label".to_owned(), Value::Object(by_row));
        json.insert("label2id".to_owned(), Value::Object(by_name));
        json.insert(
            "problem_type".to_owned(),
            json!("single_label_classification"),
        );
    }
    Ok(json)
}

/// `tokenizer.json` of a tokenizer that need not have come from one. A GGUF says by a key of its own that a text begins with BOS;
/// here that is a step after the others.
///
/// # Errors
/// [`ModelError::Text`] when the file would not read back as the same tokenizer.
pub(super) fn tokenizer_json(file: &str, tokenizer: &Tokenizer) -> Result<Value, ModelError> {
    let text = |source| ModelError::Text {
        file: file.to_owned(),
        source,
    };
    let ids = |tokenizer: &Tokenizer| tokenizer.encode("a").map_err(text);
    let mut json: Value = serde_json::from_str(&tokenizer.to_json().map_err(text)?)
        .map_err(|error| ModelError::file(Path::new(file), format!("tokenizer: {error}")))?;
    let (bos, eos) = (tokenizer.bos_token(), tokenizer.eos_token());
    let read = |json: &Value| {
        Tokenizer::from_json(json.to_string().as_bytes(), bos.as_deref(), eos.as_deref())
            .map_err(text)
    };
    let wanted = ids(tokenizer)?;
    if ids(&read(&json)?)? == wanted {
        return Ok(json);
    }
    if let Some((id, name)) = tokenizer.bos_id().zip(bos.as_ref()) {
        let begin = json!({"SpecialToken": {"id": name, "type_id": 0}});
        let sequence = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
        json["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [begin, sequence("A")],
            "pair": [begin, sequence("A"), sequence("B")],
            "special_tokens": {name.as_str(): {"id": name, "ids": [id], "tokens": [name]}},
        });
        if ids(&read(&json)?)? == wanted {
            return Ok(json);
        }
    }
    let rule = "the tokenizer has no form as tokenizer.json; merge into the model's Hugging Face directory instead";
    Err(ModelError::file(Path::new(file), rule))
}

/// A GGUF calls Mistral Llama; only the window tells. Biases on q, k and v alone are Qwen2's.
fn hf_family(file: &str, config: &ModelConfig) -> Result<Family, ModelError> {
    if config.qkv_bias != (config.family == Family::Qwen2) {
        let rule = "Hugging Face's class for it has no such model";
        let found = format!("qkv_bias {}", config.qkv_bias);
        return Err(ModelError::field(file, config.family.as_str(), found, rule));
    }
    Ok(match (config.family, config.sliding_window) {
        (Family::Llama, Some(_)) => Family::Mistral,
        (family, _) => family,
    })
}

/// The stretch of the rotary frequencies. A GGUF states Llama 3.1's rule by its results, so the published rules are tried.
fn rope_scaling(file: &str, config: &ModelConfig) -> Result<Value, ModelError> {
    let known = |factor| RopeScaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context_length: 8192,
    };
    let found = match &config.rope.scaling {
        RopeScaling::Factors(_) => [8.0, 32.0]
            .map(known)
            .into_iter()
            .find(|rule| same(config, rule)),
        other => Some(other.clone()),
    };
    match found {
        Some(RopeScaling::None) => Ok(Value::Null),
        Some(RopeScaling::Linear { factor }) => {
            Ok(json!({"rope_type": "linear", "factor": shortest(factor)}))
        }
        Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context_length,
        }) => Ok(json!({
            "rope_type": "llama3",
            "factor": shortest(factor),
            "low_freq_factor": shortest(low_freq_factor),
            "high_freq_factor": shortest(high_freq_factor),
            "original_max_position_embeddings": original_context_length,
        })),
        Some(RopeScaling::Factors(_)) | None => Err(ModelError::field(
            file,
            "rope_freqs.weight",
            "frequencies of an unknown rule",
            "only those of Llama 3.1 and 3.2 have a name in config.json; merge into the model's Hugging Face directory instead",
        )),
    }
}

fn same(config: &ModelConfig, rule: &RopeScaling) -> bool {
    let ruled = RopeConfig {
        theta: config.rope.theta,
        scaling: rule.clone(),
    };
    let (ours, theirs) = (
        config.rope.inverse_frequencies(config.head_dim),
        ruled.inverse_frequencies(config.head_dim),
    );
    ours.iter()
        .zip(&theirs)
        .all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs())
}

/// The number that a person would have written for this f32.
fn shortest(value: f32) -> Value {
    value
        .to_string()
        .parse::<f64>()
        .map_or(Value::Null, |value| json!(value))
}

/// The members of a literal.
fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(members) => members,
        _ => Map::new(),
    }
}
