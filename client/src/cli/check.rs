//! `espalier adapters check`: the server's own check of a PEFT directory, run here, against
//! the base of a server or of a file. Nothing is sent.

use std::path::{Path, PathBuf};

use clap::Args;
use espalier_adapters::{
    config::{AdapterConfig, BaseShape},
    peft::{self, Limits},
    report::Report,
};
use serde_json::{Value, json};

use crate::{
    cli::output::{Failure, Out},
    client::Client,
    error::Error,
    v1,
};

/// Check a PEFT directory without uploading it.
#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Holds `adapter_config.json` and `adapter_model.safetensors`.
    dir: PathBuf,
    /// The `config.json` of the base it is for (Hugging Face form), when no server is at hand.
    #[arg(long, value_name = "FILE")]
    base: Option<PathBuf>,
}

impl Check {
    /// The sizes that the adapter must fit, as the server tells them.
    pub(crate) async fn shape_of(&self, client: &Client) -> Result<(BaseShape, String), Error> {
        let page = client.list_models(v1::ListModelsRequest::default()).await?;
        let missing = || {
            Error::local(
                tonic::Code::NotFound,
                "BASE",
                "the server lists no base model",
            )
        };
        let model = page.models.into_iter().next().ok_or_else(missing)?;
        let shape = model.shape.ok_or_else(missing)?;
        Ok((from_model(&shape), model.name))
    }

    /// Checks against the file of `--base`, else against the server's base.
    pub(crate) fn run(
        self,
        server: Result<(BaseShape, String), Error>,
        out: Out,
    ) -> Result<(), Failure> {
        let (base, name) = match (&self.base, server) {
            (Some(path), _) => (from_file(path)?, path.display().to_string()),
            (None, Ok(found)) => found,
            (None, Err(error)) => {
                return Err(Failure::Local(format!(
                    "{error}\n  next: start a server, or name the base's config.json with --base"
                )));
            }
        };
        let limits = Limits::default();
        let artifact = peft::from_dir(&self.dir, &limits)
            .map_err(|error| Failure::Local(error.to_string()))?;
        let digest = artifact.digest().to_string();
        let (report, summary) = match peft::read(&artifact, &base, &limits) {
            Ok((config, weights, report)) => {
                let kind = match &config {
                    AdapterConfig::Lora(lora) => {
                        format!("rank {}, alpha {}", lora.r, lora.lora_alpha)
                    }
                    AdapterConfig::Ia3(_) => "(IA)3".to_owned(),
                    AdapterConfig::Full(full) => format!("layers {:?} unfrozen", full.layers),
                };
                let text = format!(
                    "{kind}, {} sites, {} parameters, {} labels",
                    weights.sites.len() + weights.scales.len() + weights.full.len(),
                    weights.parameters(),
                    weights.head.as_ref().map_or(0, |head| head.labels.len()),
                );
                (report, Some(text))
            }
            Err(report) => (report, None),
        };
        print_report(out, &report, &digest, &name, summary.as_deref())?;
        if report.is_ok() {
            Ok(())
        } else {
            Err(Failure::Refused)
        }
    }
}

fn print_report(
    out: Out,
    report: &Report,
    digest: &str,
    base: &str,
    summary: Option<&str>,
) -> Result<(), Failure> {
    if out.is_json() {
        let findings = serde_json::to_value(&report.findings).unwrap_or(Value::Null);
        return out.json_document(&json!({
            "accepted": report.is_ok(),
            "base": base,
            "digest": digest,
            "findings": findings,
            "omitted_errors": report.omitted_errors,
            "omitted_warnings": report.omitted_warnings,
        }));
    }
    let verdict = if report.is_ok() {
        "accepted"
    } else {
        "refused"
    };
    out.line(format_args!("{verdict} for {base}: {report}"))?;
    out.line(format_args!("digest {digest}"))?;
    summary.map_or(Ok(()), |summary| out.line(summary))
}

fn from_model(shape: &v1::ModelShape) -> BaseShape {
    BaseShape {
        layers: shape.layers as usize,
        hidden: shape.hidden as usize,
        intermediate: shape.intermediate as usize,
        heads: shape.heads as usize,
        kv_heads: shape.kv_heads as usize,
        head_dim: shape.head_dim as usize,
        vocab: shape.vocab as usize,
        tied_embeddings: shape.tied_embeddings,
    }
}

/// The sizes in a Hugging Face `config.json`.
fn from_file(path: &Path) -> Result<BaseShape, Failure> {
    let wrong = |why: String| Failure::Local(format!("{}: {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let config: Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let get = |key: &str| config.get(key).and_then(Value::as_u64);
    let need = |key: &str| {
        let value = get(key).and_then(|value| usize::try_from(value).ok());
        value.ok_or_else(|| wrong(format!("{key} is missing or no size")))
    };
    let (hidden, heads) = (need("hidden_size")?, need("num_attention_heads")?);
    if heads == 0 {
        return Err(wrong("num_attention_heads is 0".to_owned()));
    }
    let or = |key: &str, other: usize| {
        if get(key).is_some() {
            need(key)
        } else {
            Ok(other)
        }
    };
    Ok(BaseShape {
        layers: need("num_hidden_layers")?,
        hidden,
        intermediate: need("intermediate_size")?,
        heads,
        kv_heads: or("num_key_value_heads", heads)?,
        head_dim: or("head_dim", hidden / heads)?,
        vocab: need("vocab_size")?,
        tied_embeddings: config.get("tie_word_embeddings") == Some(&Value::Bool(true)),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn the_shape_of_a_base_is_read_from_its_config() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        write(
            r#"{"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128,
                "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}"#,
        );
        let shape = from_file(&path).unwrap();
        assert_eq!((shape.layers, shape.kv_heads, shape.head_dim), (3, 2, 16));
        for wrong in [
            "{}",
            "[]",
            "nonsense",
            r#"{"hidden_size": 64, "num_attention_heads": 0}"#,
        ] {
            write(wrong);
            assert!(from_file(&path).is_err(), "{wrong}");
        }
    }
}
