//! A base and one adapter made into one model, written as a Hugging Face directory that any runtime loads: `W + s B A` in f64, DoRA's
//! rows included, rows or columns times (IA)3's vectors, `W + d` where a
//! tensor was unfrozen, a head as a sequence classifier's. The base is held once, as its file stores it, and leaves memory as it is written.

use std::fs::File;
use std::path::{Path, PathBuf};

use espalier_adapters::config::{BaseTensor, LayerTensor, ScaleOn, Site};
use espalier_adapters::linear::{merged, scaled};
use espalier_adapters::weights::AdapterWeights;
use serde_json::{Map, Value, json};

use super::error::ModelError;
use super::hf_write::{FileNumbers, TensorsFile, config_json, tokenizer_json};
use super::load::LoadedModel;
use super::weights::{Part, Slot};

const SCORE: &str = "score.weight";

/// What a Hugging Face directory has beside its weights that a merged one keeps as it is.
const TEXT_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
];

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergedModel {
    /// Tensors.
    pub tensors: usize,
    /// Bytes of the weights' file.
    pub bytes: u64,
    /// How its numbers are kept.
    pub numbers: FileNumbers,
}

/// Writes base and adapter as one model into the directory `out`, which must not be there yet, or be empty. It appears when it is
/// complete and not before. `source` is the directory that the base came from, when it came from one: its tokenizer's files are copied.
///
/// # Errors
/// [`ModelError`] when the adapter does not fit the base, when `out` holds something, or when a file cannot be written.
pub fn write_merged(
    base: LoadedModel,
    source: Option<&Path>,
    adapter: &AdapterWeights,
    numbers: FileNumbers,
    out: &Path,
) -> Result<MergedModel, ModelError> {
    if let Some((path, wrong)) = adapter.misfit(&base.config.base_shape()) {
        return Err(ModelError::file(
            Path::new(&base.name),
            format!("adapter: {path}: {wrong}"),
        ));
    }
    let head = adapter.head.as_ref();
    if let Some(why) = head.and_then(|head| head.settings.beyond_score()) {
        return Err(ModelError::file(
            Path::new(&base.name),
            format!(
                "adapter: {why} in a sequence classifier: serve the version here, or train one without"
            ),
        ));
    }
    let io = |source| ModelError::io(out, source);
    if out.exists() && std::fs::read_dir(out).map_err(io)?.next().is_some() {
        return Err(ModelError::file(out, "is not empty; name a new directory"));
    }
    let mut name = out.as_os_str().to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = PathBuf::from(name);
    std::fs::create_dir(&part).map_err(|source| ModelError::io(&part, source))?;
    let written = write_files(base, source, adapter, numbers, &part)
        .and_then(|model| std::fs::rename(&part, out).map_err(io).map(|()| model));
    if written.is_err() {
        // The first error is the one to tell; what stays behind is never taken for a model.
        std::fs::remove_dir_all(&part).ok();
    }
    written
}

fn write_files(
    mut base: LoadedModel,
    source: Option<&Path>,
    adapter: &AdapterWeights,
    numbers: FileNumbers,
    dir: &Path,
) -> Result<MergedModel, ModelError> {
    write_text(&base, source, dir)?;
    let labels = adapter.head.as_ref().map(|head| head.labels.as_slice());
    let mut config = config_json(&base.name, &base.config, numbers, labels)?;
    config.extend(token_ids(&base, source)?);
    write_json(&dir.join("config.json"), &Value::Object(config))?;

    let mut slots = Slot::all(&base.config);
    if adapter.head.is_some() {
        slots.retain(|slot| *slot != Slot::LmHead);
    }
    let mut names: Vec<_> = slots
        .iter()
        .map(|slot| (slot.hf(), slot.shape(&base.config)))
        .collect();
    if let Some(head) = &adapter.head {
        names.push((
            SCORE.to_owned(),
            vec![head.labels.len(), base.config.hidden],
        ));
    }
    let mut file = TensorsFile::create(&dir.join("model.safetensors"), numbers, &names)?;
    for slot in slots {
        let missing =
            || ModelError::file(Path::new(&base.name), format!("{} is missing", slot.hf()));
        let mut values = base.weights.take(slot).ok_or_else(missing)?.into_f32();
        if let Some(update) = site_of(slot).and_then(|site| adapter.sites.get(&site)) {
            values = merged(&values, update);
        }
        if let Some(scale) = scaled_site(slot).and_then(|(site, bias)| {
            let scale = adapter.scales.get(&site)?;
            (!bias || scale.on == ScaleOn::Outputs).then_some(scale)
        }) {
            values = scaled(&values, scale);
        }
        if let Some(delta) = adapter.full.get(&tensor_of(slot)) {
            let pairs = values.iter_mut().zip(&delta.values);
            pairs.for_each(|(w, d)| *w += *d);
        }
        file.add(&slot.hf(), &values)?;
    }
    if let Some(head) = &adapter.head {
        file.add(SCORE, &head.weight)?;
    }
    let (tensors, bytes) = (names.len(), file.bytes);
    file.finish()?;
    Ok(MergedModel {
        tensors,
        bytes,
        numbers,
    })
}

/// The site that an adapter may change in this place.
fn site_of(slot: Slot) -> Option<(usize, Site)> {
    let Slot::Layer(layer, part) = slot else {
        return None;
    };
    let site = match part {
        Part::Q => Site::Q,
        Part::K => Site::K,
        Part::V => Site::V,
        Part::O => Site::O,
        Part::Gate => Site::Gate,
        Part::Up => Site::Up,
        Part::Down => Site::Down,
        _ => return None,
    };
    Some((layer, site))
}

/// The tensor that an unfrozen version may have changed in this place.
fn tensor_of(slot: Slot) -> BaseTensor {
    let (layer, part) = match slot {
        Slot::Embed => return BaseTensor::Embedding,
        Slot::Norm => return BaseTensor::FinalNorm,
        Slot::LmHead => return BaseTensor::Output,
        Slot::Layer(layer, part) => (layer, part),
    };
    let tensor = match part {
        Part::AttnNorm => LayerTensor::AttnNorm,
        Part::MlpNorm => LayerTensor::MlpNorm,
        Part::QNorm => LayerTensor::QNorm,
        Part::KNorm => LayerTensor::KNorm,
        Part::QBias => LayerTensor::Bias(Site::Q),
        Part::KBias => LayerTensor::Bias(Site::K),
        Part::VBias => LayerTensor::Bias(Site::V),
        Part::Q => LayerTensor::Weight(Site::Q),
        Part::K => LayerTensor::Weight(Site::K),
        Part::V => LayerTensor::Weight(Site::V),
        Part::O => LayerTensor::Weight(Site::O),
        Part::Gate => LayerTensor::Weight(Site::Gate),
        Part::Up => LayerTensor::Weight(Site::Up),
        Part::Down => LayerTensor::Weight(Site::Down),
    };
    BaseTensor::Layer(layer, tensor)
}

/// The site whose vector multiplies what is in this place, and whether that is its bias.
fn scaled_site(slot: Slot) -> Option<((usize, Site), bool)> {
    let site = match slot {
        Slot::Layer(layer, Part::QBias) => (layer, Site::Q),
        Slot::Layer(layer, Part::KBias) => (layer, Site::K),
        Slot::Layer(layer, Part::VBias) => (layer, Site::V),
        other => return site_of(other).map(|site| (site, false)),
    };
    Some((site, true))
}

/// Tokenizer and chat template: the source's own files, or what was read out of a GGUF in their spelling.
fn write_text(base: &LoadedModel, source: Option<&Path>, dir: &Path) -> Result<(), ModelError> {
    if let Some(source) = source {
        for name in TEXT_FILES {
            let from = source.join(name);
            if from.is_file() {
                std::fs::copy(&from, dir.join(name))
                    .map_err(|error| ModelError::io(&from, error))?;
            }
        }
        return Ok(());
    }
    let tokenizer = &base.tokenizer;
    let json = tokenizer_json(&base.name, tokenizer)?;
    write_json(&dir.join("tokenizer.json"), &json)?;
    if let Some(template) = &base.template {
        let path = dir.join("chat_template.jinja");
        let written = std::fs::write(&path, template.source());
        written.map_err(|source| ModelError::io(&path, source))?;
    }
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token(),
        "eos_token": tokenizer.eos_token(),
        "model_max_length": base.config.context_length,
    });
    write_json(&dir.join("tokenizer_config.json"), &config)
}

/// The ids of `config.json` that end, begin and fill a text. Padding has no part in the arithmetic and is known to the source alone.
fn token_ids(base: &LoadedModel, source: Option<&Path>) -> Result<Map<String, Value>, ModelError> {
    let mut ids = Map::new();
    if let Some(bos) = base.tokenizer.bos_id() {
        ids.insert("bos_token_id".to_owned(), json!(bos));
    }
    let eos = match base.stop_ids.as_slice() {
        [] => json!(base.tokenizer.eos_id()),
        [one] => json!(one),
        several => json!(several),
    };
    ids.insert("eos_token_id".to_owned(), eos);
    if let Some(source) = source {
        let path = source.join("config.json");
        let bytes = std::fs::read(&path).map_err(|source| ModelError::io(&path, source))?;
        let read: Value = serde_json::from_slice(&bytes)
            .map_err(|error| ModelError::file(&path, format!("is no JSON: {error}")))?;
        if let Some(pad) = read.get("pad_token_id").filter(|pad| !pad.is_null()) {
            ids.insert("pad_token_id".to_owned(), pad.clone());
        }
    }
    Ok(ids)
}

fn write_json(path: &Path, value: &Value) -> Result<(), ModelError> {
    let io = |source| ModelError::io(path, source);
    let file = File::create_new(path).map_err(io)?;
    serde_json::to_writer_pretty(&file, value).map_err(|error| io(error.into()))?;
    file.sync_all().map_err(io)
}
