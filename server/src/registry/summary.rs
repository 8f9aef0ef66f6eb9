//! What is told about a version, taken from its checked artifact once, when it is published.

use espalier_adapters::config::{LoraConfig, Modules, Site};
use espalier_adapters::version::AdapterArtifact;
use espalier_adapters::weights::AdapterWeights;

use super::{PartSummary, VersionSummary};
use crate::artifact_store::BlobDigest;

/// Sums up an artifact that passed its check.
pub fn summarize(
    config: &LoraConfig,
    weights: &AdapterWeights,
    artifact: &AdapterArtifact,
) -> VersionSummary {
    // The tensors say what is really adapted; the configuration may name modules by a pattern.
    let target_modules = match &config.target_modules {
        Modules::List(list) => list.clone(),
        _ => Site::ALL
            .into_iter()
            .filter(|site| weights.sites.keys().any(|(_, found)| found == site))
            .map(|site| site.module().to_owned())
            .collect(),
    };
    let parts = [
        (AdapterArtifact::CONFIG_FILE, Some(&artifact.config_json)),
        (AdapterArtifact::WEIGHTS_FILE, Some(&artifact.safetensors)),
        (AdapterArtifact::LABELS_FILE, artifact.labels_json.as_ref()),
        (AdapterArtifact::HEAD_FILE, artifact.head_json.as_ref()),
    ];
    VersionSummary {
        rank: config.r as u32,
        alpha: config.lora_alpha,
        dropout: config.lora_dropout,
        target_modules,
        use_rslora: config.use_rslora,
        use_dora: config.use_dora,
        rank_pattern: config
            .rank_pattern
            .iter()
            .map(|(pattern, rank)| (pattern.clone(), *rank as u32))
            .collect(),
        alpha_pattern: config.alpha_pattern.clone(),
        layers: config
            .layers_to_transform
            .iter()
            .flatten()
            .map(|layer| *layer as u32)
            .collect(),
        labels: weights
            .head
            .as_ref()
            .map(|head| head.labels.clone())
            .unwrap_or_default(),
        problem: weights
            .head
            .as_ref()
            .map(|head| head.settings.problem)
            .unwrap_or_default(),
        parts: parts
            .into_iter()
            .filter_map(|(file, bytes)| {
                bytes.map(|bytes| PartSummary {
                    file: file.to_owned(),
                    size: bytes.len() as u64,
                    sha256: BlobDigest::of(bytes).to_string(),
                })
            })
            .collect(),
    }
}
