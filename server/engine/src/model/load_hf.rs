//! A Hugging Face directory as a base model: `config.json`, safetensors in one file or many, tokenizer and chat template.
//! Never runs what a directory brings, and reads no file outside of it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Component, Path, PathBuf};

use espalier_adapters::strict_json;
use espalier_adapters::text::Tokenizer;
use serde_json::Value;

use super::config::ModelConfig;
use super::dtype::Dtype;
use super::error::ModelError;
use super::hf_config::{self, Fields};
use super::load::{self, LoadedModel, Parts, ReadWeights};
use super::safetensors_file::SafetensorsFile;
use super::weights::Slot;

/// Larger than any configuration, tokenizer configuration or index.
const MAX_JSON_BYTES: u64 = 32 << 20;
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

pub(super) fn load(directory: &Path, dtype: Dtype) -> Result<LoadedModel, ModelError> {
    let config_path = directory.join("config.json");
    let config_file = config_path.display().to_string();
    let Some(json) = read_json(&config_path)? else {
        let rule = "is a directory without config.json".to_owned();
        return Err(ModelError::Spec {
            spec: directory.display().to_string(),
            rule,
        });
    };
    let fields = Fields::new(&config_file, &json);
    let mut config = hf_config::read(&fields)?;
    let mut stop_ids = fields.ids("eos_token_id")?;
    let generation_path = directory.join("generation_config.json");
    if let Some(json) = read_json(&generation_path)? {
        stop_ids.extend(
            Fields::new(&generation_path.display().to_string(), &json).ids("eos_token_id")?,
        );
    }
    let (tokenizer, jinja) = read_text(directory)?;
    config.validate(&config_file)?;
    let read = read_weights(directory, &mut config, dtype)?;
    let file = directory.display().to_string();
    load::finish(Parts {
        file,
        name: load::name_of(directory, false),
        config,
        read,
        tokenizer,
        jinja,
        stop_ids,
    })
}

/// A JSON file, or none when there is no such file.
fn read_json(path: &Path) -> Result<Option<Value>, ModelError> {
    let Some(bytes) = read_small(path)? else {
        return Ok(None);
    };
    strict_json::parse(&bytes)
        .map(Some)
        .map_err(|error| ModelError::file(path, format!("is no JSON: {error}")))
}

fn read_small(path: &Path) -> Result<Option<Vec<u8>>, ModelError> {
    let len = match std::fs::metadata(path) {
        Ok(about) => about.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ModelError::io(path, error)),
    };
    if len > MAX_JSON_BYTES {
        return Err(ModelError::file(
            path,
            format!("has {len} bytes, at most {MAX_JSON_BYTES} are read"),
        ));
    }
    std::fs::read(path)
        .map(Some)
        .map_err(|source| ModelError::io(path, source))
}

/// Tokenizer and template. The template: `chat_template.jinja`, else what `tokenizer_config.json` holds.
fn read_text(directory: &Path) -> Result<(Tokenizer, Option<String>), ModelError> {
    let config_path = directory.join("tokenizer_config.json");
    let config = read_json(&config_path)?.unwrap_or(Value::Null);
    let token = |name: &str| {
        let value = config.get(name)?;
        value.as_str().or_else(|| value.get("content")?.as_str())
    };
    let path = directory.join("tokenizer.json");
    let tokenizer =
        Tokenizer::from_file(&path, token("bos_token"), token("eos_token")).map_err(|source| {
            ModelError::Text {
                file: path.display().to_string(),
                source,
            }
        })?;
    let jinja_path = directory.join("chat_template.jinja");
    let jinja = match read_small(&jinja_path)? {
        Some(bytes) => Some(
            String::from_utf8(bytes).map_err(|_| ModelError::file(&jinja_path, "is not UTF-8"))?,
        ),
        None => match config.get("chat_template") {
            None | Some(Value::Null) => None,
            Some(Value::String(jinja)) => Some(jinja.clone()),
            Some(Value::Array(named)) => default_template(named),
            Some(other) => {
                let found = other.to_string();
                return Err(ModelError::field(
                    &config_path.display().to_string(),
                    "chat_template",
                    found,
                    "must be text",
                ));
            }
        },
    };
    Ok((tokenizer, jinja))
}

/// Of several named templates the one named `default`, as in transformers.
fn default_template(named: &[Value]) -> Option<String> {
    let default = named
        .iter()
        .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))?;
    default.get("template")?.as_str().map(str::to_owned)
}

/// The files that hold the weights, each with the tensors that the index places in it.
fn weight_files(
    directory: &Path,
) -> Result<BTreeMap<PathBuf, Option<HashSet<String>>>, ModelError> {
    let index_path = directory.join(INDEX);
    let Some(index) = read_json(&index_path)? else {
        let single = directory.join(SINGLE);
        if std::fs::metadata(&single).is_err() {
            let rule = format!(
                "holds neither {SINGLE} nor {INDEX}; weights in pickle files (.bin, .pt) are not read, convert them"
            );
            return Err(ModelError::file(directory, rule));
        }
        return Ok(BTreeMap::from([(single, None)]));
    };
    let rule = "weight_map must be an object of tensor names and file names";
    let map = index
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| ModelError::file(&index_path, rule))?;
    let mut files: BTreeMap<PathBuf, Option<HashSet<String>>> = BTreeMap::new();
    for (tensor, file) in map {
        let file = file
            .as_str()
            .ok_or_else(|| ModelError::file(&index_path, rule))?;
        let mut components = Path::new(file).components();
        let plain = matches!(
            (components.next(), components.next()),
            (Some(Component::Normal(_)), None)
        );
        if !plain || !file.ends_with(".safetensors") || file.contains(['\\', '\0']) {
            let rule = format!(
                "tensor {tensor:?}: file {file:?} must be the plain name of a .safetensors file beside the index"
            );
            return Err(ModelError::file(&index_path, rule));
        }
        files
            .entry(directory.join(file))
            .or_default()
            .get_or_insert_default()
            .insert(tensor.clone());
    }
    Ok(files)
}

fn read_weights(
    directory: &Path,
    config: &mut ModelConfig,
    dtype: Dtype,
) -> Result<ReadWeights, ModelError> {
    let mut findings = Vec::new();
    let mut files = Vec::new();
    let mut place: HashMap<String, usize> = HashMap::new();
    for (path, expected) in weight_files(directory)? {
        let file = SafetensorsFile::open(&path)?;
        if let Some(expected) = expected {
            let misplaced = expected
                .iter()
                .filter(|name| !file.tensors.contains_key(*name));
            findings.extend(misplaced.map(|name| {
                format!(
                    "{name}: the index places it in {}, which has none",
                    path.display()
                )
            }));
        }
        for name in file.tensors.keys() {
            if place.insert(name.clone(), files.len()).is_some() {
                findings.push(format!("{name}: stands in two files"));
            }
        }
        files.push(file);
    }
    let head_stored = place.contains_key(&Slot::LmHead.hf());
    let mut slots = Slot::all(config);
    if head_stored && config.tie_embeddings {
        slots.push(Slot::LmHead);
    }
    let names: HashSet<String> = slots.iter().map(|slot| slot.hf()).collect();
    for (name, &file) in &place {
        // Older exports of Llama store the table of rotary frequencies, which follows from the configuration.
        if !names.contains(name) && !name.ends_with(".rotary_emb.inv_freq") {
            let shape = &files[file].tensors[name].shape;
            findings.push(format!(
                "{name} {shape:?}: a {} model of this configuration has no such tensor",
                config.family.as_str()
            ));
        }
    }
    for slot in &slots {
        let (name, shape) = (slot.hf(), slot.shape(config));
        match place
            .get(&name)
            .map(|file| &files[*file].tensors[&name].shape)
        {
            None => findings.push(format!("{name}: is missing")),
            Some(found) if *found != shape => {
                findings.push(format!("{name}: has shape {found:?}, it must be {shape:?}"))
            }
            Some(_) => {}
        }
    }
    let refuse = |mut findings: Vec<String>| {
        findings.sort();
        Err(ModelError::Weights {
            file: directory.display().to_string(),
            findings,
        })
    };
    if !findings.is_empty() {
        return refuse(findings);
    }
    let mut read = ReadWeights::new(config, dtype, &slots);
    for slot in slots {
        let name = slot.hf();
        let weight = files[place[&name]].read(&name)?;
        findings.extend(read.add(config, slot, &name, weight).err());
    }
    if findings.is_empty() {
        Ok(read)
    } else {
        refuse(findings)
    }
}
