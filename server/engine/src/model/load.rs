//! From what `--model` names to a model in memory: a built-in random one, a GGUF file or a Hugging Face directory.
//! Knows files and their spellings; knows nothing of how a model runs.

use std::path::Path;
use std::sync::Arc;

use espalier_adapters::text::{ChatTemplate, TemplateSource, Tokenizer};

use super::config::ModelConfig;
use super::error::ModelError;
use super::weights::{ModelWeights, Slot};
use super::{load_gguf, load_hf, tiny};

/// A base model in memory, before its weights are packed.
#[derive(Debug)]
pub struct LoadedModel {
    /// The file's name without its extension, the directory's, or `tiny-SEED`.
    pub name: String,
    /// Sizes and options.
    pub config: ModelConfig,
    /// The weights, which fit `config` and are all finite.
    pub weights: ModelWeights,
    /// Text to ids and back.
    pub tokenizer: Arc<Tokenizer>,
    /// The chat template, if the model brings one.
    pub template: Option<Arc<ChatTemplate>>,
    /// [`ModelWeights::digest`]: what the base is known by.
    pub digest: String,
    /// Tokens that end a reply, ascending: every one that the model's files name.
    pub stop_ids: Vec<u32>,
}

/// Loads the model that `spec` names: `tiny:SEED`, a GGUF file, or a Hugging Face directory.
///
/// # Errors
/// [`ModelError`] naming the file, the tensor or field, and the rule; a file that lies about its sizes is refused before anything
/// is allocated for it.
pub fn load(spec: &str) -> Result<LoadedModel, ModelError> {
    if let Some(seed) = spec.strip_prefix("tiny:") {
        return tiny::load(spec, seed);
    }
    let path = Path::new(spec);
    let about = std::fs::metadata(path).map_err(|source| ModelError::io(path, source))?;
    if about.is_dir() {
        load_hf::load(path)
    } else if path
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
    {
        load_gguf::load(path)
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
    pub(super) weights: ModelWeights,
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
        weights,
        tokenizer,
        jinja,
        mut stop_ids,
    } = parts;
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
    let digest = weights.digest(&config);
    Ok(LoadedModel {
        name,
        config,
        weights,
        tokenizer: Arc::new(tokenizer),
        template: template.transpose()?,
        digest,
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
pub(super) fn finite(name: &str, values: &[f32]) -> Result<(), String> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(format!(
            "{name}: value {index} is {}, every weight must be finite",
            values[index]
        )),
    }
}

/// Ties the head to the embedding where both hold the same values, so that one model has one digest whichever way a file stores it;
/// a differing head under a configuration that ties them is a finding.
pub(super) fn settle_head(
    config: &mut ModelConfig,
    weights: &mut ModelWeights,
    findings: &mut Vec<String>,
) {
    let Some(head) = &weights.lm_head else { return };
    if *head == weights.embed {
        weights.lm_head = None;
        config.tie_embeddings = true;
    } else if config.tie_embeddings {
        let rule = "differs from the embedding table, to which the configuration ties it";
        findings.push(format!("{}: {rule}", Slot::LmHead.hf()));
    }
}
