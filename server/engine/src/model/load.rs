//! From what `--model` names to a model in memory: a built-in random one, a GGUF file or a Hugging Face directory.
//! Knows files and their spellings; knows nothing of how a model runs.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use espalier_adapters::ops::Weight;
use espalier_adapters::text::{ChatTemplate, TemplateSource, Tokenizer};

use super::config::ModelConfig;
use super::dtype::Dtype;
use super::error::ModelError;
use super::weights::{BaseDigest, ModelWeights, Slot, values_digest};
use super::{load_gguf, load_hf, synthetic, tiny};

/// A base model in memory, before its weights are packed.
#[derive(Debug)]
pub struct LoadedModel {
    /// The file's name without its extension, the directory's, or `tiny-SEED`.
    pub name: String,
    /// Sizes and options.
    pub config: ModelConfig,
    /// What the weights were rounded to.
    pub dtype: Dtype,
    /// Whether the source has every matrix as f32: neither 16 bits nor quantised.
    pub single_precision: bool,
    /// The weights, which fit `config` and are all finite.
    pub weights: ModelWeights,
    /// Text to ids and back.
    pub tokenizer: Arc<Tokenizer>,
    /// The chat template, if the model brings one.
    pub template: Option<Arc<ChatTemplate>>,
    /// What the base is known by: the digest of its source weights, the same for every dtype.
    pub digest: String,
    /// Tokens that end a reply, ascending: every one that the model's files name.
    pub stop_ids: Vec<u32>,
}

/// [`load_as`] in f32.
///
/// # Errors
/// As [`load_as`].
pub fn load(spec: &str) -> Result<LoadedModel, ModelError> {
    load_as(spec, Dtype::F32)
}

/// Loads the model that `spec` names: `tiny:SEED`, `synthetic:NAME`, a GGUF file, or a Hugging Face directory. Each matrix is brought into `dtype` as soon
/// as it is read, so that memory never holds more than one of them in f32 besides.
///
/// # Errors
/// [`ModelError`] naming the file, the tensor or field, and the rule; a file that lies about its sizes is refused before anything
/// is allocated for it.
pub fn load_as(spec: &str, dtype: Dtype) -> Result<LoadedModel, ModelError> {
    if let Some(seed) = spec.strip_prefix("tiny:") {
        return tiny::load(spec, seed, dtype);
    }
    if let Some(name) = spec.strip_prefix("synthetic:") {
        return synthetic::load(spec, name, dtype);
    }
    let path = Path::new(spec);
    let about = std::fs::metadata(path).map_err(|source| ModelError::io(path, source))?;
    if about.is_dir() {
        load_hf::load(path, dtype)
    } else if path
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
    {
        load_gguf::load(path, dtype)
    } else {
        Err(ModelError::Spec {
            spec: spec.to_owned(),
            rule: "is a file but no .gguf".to_owned(),
        })
    }
}

/// What the loaders have in hand at the end.
pub(super) struct Parts {
    pub(super) file: String,
    pub(super) name: String,
    pub(super) config: ModelConfig,
    pub(super) read: ReadWeights,
    pub(super) tokenizer: Tokenizer,
    pub(super) jinja: Option<String>,
    pub(super) stop_ids: Vec<u32>,
}

/// The last checks, which no file format changes.
pub(super) fn finish(parts: Parts) -> Result<LoadedModel, ModelError> {
    let Parts {
        file,
        name,
        config,
        read,
        tokenizer,
        jinja,
        mut stop_ids,
    } = parts;
    let ReadWeights {
        dtype,
        single_precision,
        weights,
        digest,
        ..
    } = read;
    config.validate(&file)?;
    weights.check(&config, &file)?;
    if tokenizer.vocab_size() > config.vocab {
        let rule = format!(
            "is smaller than the tokenizer's {} ids",
            tokenizer.vocab_size()
        );
        return Err(ModelError::field(&file, "vocab", config.vocab, rule));
    }
    stop_ids.sort_unstable();
    stop_ids.dedup();
    if let Some(id) = stop_ids.iter().find(|id| **id as usize >= config.vocab) {
        let rule = format!("is no token of the vocabulary, which has {}", config.vocab);
        return Err(ModelError::field(&file, "end-of-text token", id, rule));
    }
    let template = jinja.map(|jinja| {
        let source = TemplateSource {
            jinja,
            bos_token: tokenizer.bos_token(),
            eos_token: tokenizer.eos_token(),
        };
        ChatTemplate::new(source)
            .map(Arc::new)
            .map_err(|source| ModelError::Text {
                file: file.clone(),
                source,
            })
    });
    Ok(LoadedModel {
        name,
        config,
        dtype,
        single_precision,
        weights,
        tokenizer: Arc::new(tokenizer),
        template: template.transpose()?,
        digest: digest.finish(),
        stop_ids,
    })
}

/// The name of a file or directory, for people.
pub(super) fn name_of(path: &Path, strip_extension: bool) -> String {
    let absolute = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let name = if strip_extension {
        absolute.file_stem()
    } else {
        absolute.file_name()
    };
    name.map_or_else(
        || "base".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// The finding for a tensor that holds NaN or infinity, which would poison every answer in silence.
fn finite(name: &str, values: &[f32]) -> Result<(), String> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(format!(
            "{name}: value {index} is {}, every weight must be finite",
            values[index]
        )),
    }
}

/// Weights as they come out of a file, one tensor after the other in canonical order.
pub(super) struct ReadWeights {
    dtype: Dtype,
    /// Whether every matrix so far came as f32; a loader that widened one says no.
    pub(super) single_precision: bool,
    weights: ModelWeights,
    digest: BaseDigest,
    head_comes: bool,
    /// Of the embedding's values, to know a head that equals it.
    embed: Option<[u8; 32]>,
}

impl ReadWeights {
    /// `slots` are the tensors that will come.
    pub(super) fn new(config: &ModelConfig, dtype: Dtype, slots: &[Slot]) -> Self {
        ReadWeights {
            dtype,
            single_precision: true,
            weights: ModelWeights::empty(config.layers),
            digest: BaseDigest::new(),
            head_comes: slots.contains(&Slot::LmHead),
            embed: None,
        }
    }

    /// The next tensor, named `name` in its file. Ties the head to the embedding where both hold the same values, so that one model has one
    /// digest whichever way a file stores it.
    ///
    /// # Errors
    /// A finding: a value that is not finite, or a differing head under a configuration that ties them.
    pub(super) fn add(
        &mut self,
        config: &mut ModelConfig,
        slot: Slot,
        name: &str,
        stored: Weight,
    ) -> Result<(), String> {
        let shape = slot.shape(config);
        self.single_precision &= shape.len() == 1 || matches!(stored, Weight::F32(_));
        let values = stored.widened();
        finite(name, &values)?;
        if slot == Slot::Embed && self.head_comes {
            self.embed = Some(values_digest(&values));
        }
        if slot == Slot::LmHead {
            if self.embed == Some(values_digest(&values)) {
                config.tie_embeddings = true;
                return Ok(());
            }
            if config.tie_embeddings {
                let rule = "differs from the embedding table, to which the configuration ties it";
                return Err(format!("{}: {rule}", slot.hf()));
            }
        }
        self.digest.add(&slot.hf(), &shape, &values);
        match *shape.as_slice() {
            // For f32 the widened copy is the one to keep.
            [_, inputs] if self.dtype != Dtype::F32 => {
                drop(values);
                self.weights.keep(slot, self.dtype.keep(stored, inputs));
            }
            _ => {
                let owned = match values {
                    Cow::Owned(values) => Some(values),
                    Cow::Borrowed(_) => None,
                };
                let values = owned.unwrap_or_else(|| stored.into_f32());
                self.weights.set(slot, values);
            }
        }
        Ok(())
    }
}
