//! An adapter as a directory: what a user has on disk, and what PEFT and other runtimes load.
//!
//! Only the named regular files are opened, each up to its limit; a symbolic link could lead anywhere and is refused.
//! This file must not know what the bytes mean, but for the labels that a model's `config.json` holds.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Limits;
use crate::error::AdapterError;
use crate::strict_json;
use crate::version::AdapterArtifact;

/// Reads `adapter_config.json`, `adapter_model.safetensors` and, if there, `labels.json` and `head.json`. Without labels those of a classifier come from `id2label` in a `config.json` beside.
///
/// # Errors
/// A file that is missing, too large, no regular file, or unreadable.
pub fn from_dir(dir: &Path, limits: &Limits) -> Result<AdapterArtifact, AdapterError> {
    let config_json = required(dir, AdapterArtifact::CONFIG_FILE, limits.max_config_bytes)?;
    let safetensors = required(dir, AdapterArtifact::WEIGHTS_FILE, limits.max_weights_bytes)?;
    let labels = read_file(
        &dir.join(AdapterArtifact::LABELS_FILE),
        limits.max_labels_bytes,
    )?;
    let labels_json = match labels {
        Some(bytes) => Some(bytes),
        // A `config.json` beside a generator is its base's, with two labels that mean nothing.
        None if is_classifier(&config_json) => {
            let config = read_file(&dir.join("config.json"), limits.max_config_bytes)?;
            config.and_then(|bytes| id2label(&bytes))
        }
        None => None,
    };
    let head = dir.join(AdapterArtifact::HEAD_FILE);
    Ok(AdapterArtifact {
        config_json,
        safetensors,
        labels_json,
        head_json: read_file(&head, limits.max_config_bytes)?,
    })
}

/// Writes the parts into a directory, which is made if it is not there; each file appears whole or not at all.
///
/// # Errors
/// What the operating system says.
pub fn to_dir(artifact: &AdapterArtifact, dir: &Path) -> Result<(), AdapterError> {
    fs::create_dir_all(dir).map_err(|source| AdapterError::Io {
        path: dir.to_owned(),
        source,
    })?;
    let labels = artifact.labels_json.as_deref();
    let parts = [
        (
            AdapterArtifact::CONFIG_FILE,
            Some(artifact.config_json.as_slice()),
        ),
        (
            AdapterArtifact::WEIGHTS_FILE,
            Some(artifact.safetensors.as_slice()),
        ),
        (AdapterArtifact::LABELS_FILE, labels),
        (AdapterArtifact::HEAD_FILE, artifact.head_json.as_deref()),
    ];
    for (name, bytes) in parts {
        let path = dir.join(name);
        let done = match bytes {
            Some(bytes) => write_file(&path, bytes),
            // Labels and settings of an adapter that was here before would be read as this one's.
            None => match fs::remove_file(&path) {
                Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
                _ => Ok(()),
            },
        };
        done.map_err(|source| AdapterError::Io { path, source })?;
    }
    Ok(())
}

fn write_file(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = PathBuf::from(name);
    let written = File::create_new(&part).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    // A rename replaces a symbolic link; opening it would follow it.
    let done = written.and_then(|()| fs::rename(&part, path));
    if done.is_err() {
        // The first error is the one to tell; a part that stays behind is never read.
        fs::remove_file(&part).ok();
    }
    done
}

fn required(dir: &Path, name: &str, limit: usize) -> Result<Vec<u8>, AdapterError> {
    let path = dir.join(name);
    if let Some(bytes) = read_file(&path, limit)? {
        return Ok(bytes);
    }
    let old = dir.join("adapter_model.bin");
    let next_step = if name == AdapterArtifact::WEIGHTS_FILE && fs::symlink_metadata(old).is_ok() {
        "adapter_model.bin is a Python pickle and is not read; save the adapter with safe_serialization=True"
    } else {
        "name the directory that PEFT's save_pretrained wrote"
    };
    Err(AdapterError::Missing { path, next_step })
}

/// The file's bytes; `None` when there is no such file.
fn read_file(path: &Path, limit: usize) -> Result<Option<Vec<u8>>, AdapterError> {
    let io = |source| AdapterError::Io {
        path: path.to_owned(),
        source,
    };
    let named = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io(e)),
    };
    if !named.is_file() {
        return Err(AdapterError::NotAFile {
            path: path.to_owned(),
        });
    }
    let file = File::open(path).map_err(io)?;
    let opened = file.metadata().map_err(io)?;
    // Between the two calls the name may have become a link to something else.
    if !same_file(&named, &opened) {
        return Err(AdapterError::NotAFile {
            path: path.to_owned(),
        });
    }
    let limit = limit as u64;
    let too_large = |bytes| AdapterError::TooLarge {
        path: path.to_owned(),
        bytes,
        limit,
    };
    if opened.len() > limit {
        return Err(too_large(opened.len()));
    }
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > limit {
        return Err(too_large(bytes.len() as u64));
    }
    Ok(Some(bytes))
}

#[cfg(unix)]
fn same_file(named: &fs::Metadata, opened: &fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    opened.is_file() && named.dev() == opened.dev() && named.ino() == opened.ino()
}

#[cfg(not(unix))]
fn same_file(_named: &fs::Metadata, opened: &fs::Metadata) -> bool {
    opened.is_file()
}

fn is_classifier(config_json: &[u8]) -> bool {
    let config = strict_json::parse(config_json).ok();
    config.is_some_and(|c| c.get("task_type").and_then(Value::as_str) == Some("SEQ_CLS"))
}

/// `id2label` as `labels.json`: transformers writes `{"0": "no", "1": "yes"}`. `None` when it is not such a table.
fn id2label(config: &[u8]) -> Option<Vec<u8>> {
    let config = strict_json::parse(config).ok()?;
    let table = config.get("id2label")?.as_object()?;
    let names: Option<Vec<&str>> = (0..table.len())
        .map(|row| table.get(&row.to_string()).and_then(Value::as_str))
        .collect();
    serde_json::to_vec_pretty(&names?).ok()
}
