//! What is told about a version, taken from its checked artifact once, when it is published.

use espalier_adapters::config::{AdapterConfig, LoraConfig, Modules, ScaleOn, Site};
use espalier_adapters::version::AdapterArtifact;
use espalier_adapters::weights::AdapterWeights;

use super::{PartSummary, VersionSummary};
use crate::artifact_store::BlobDigest;

/// Sums up an artifact that passed its check.
pub fn summarize(
    config: &AdapterConfig,
    weights: &AdapterWeights,
    artifact: &AdapterArtifact,
) -> VersionSummary {
    // The tensors say what is really adapted; the configuration may name modules by a pattern.
    let named = |changed: &dyn Fn(Site) -> bool| {
        let sites = Site::ALL.into_iter().filter(|site| changed(*site));
        sites.map(|site| site.module().to_owned()).collect()
    };
    let target_modules = match (config, config.target_modules()) {
        (AdapterConfig::Full(full), _) => full.modules.clone(),
        (_, Some(Modules::List(list))) => list.clone(),
        _ => named(&|site| {
            let mut changed = weights.sites.keys().chain(weights.scales.keys());
            changed.any(|(_, found)| *found == site)
        }),
    };
    let feedforward_modules = match config {
        AdapterConfig::Lora(_) | AdapterConfig::Full(_) => None,
        AdapterConfig::Ia3(_) => Some(named(&|site| {
            let mut scales = weights.scales.iter();
            scales.any(|((_, found), scale)| *found == site && scale.on == ScaleOn::Inputs)
        })),
    };
    let parts = [
        (AdapterArtifact::CONFIG_FILE, Some(&artifact.config_json)),
        (AdapterArtifact::WEIGHTS_FILE, Some(&artifact.safetensors)),
        (AdapterArtifact::LABELS_FILE, artifact.labels_json.as_ref()),
        (AdapterArtifact::HEAD_FILE, artifact.head_json.as_ref()),
    ];
    VersionSummary {
        target_modules,
        feedforward_modules,
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
        hidden_layers: weights
            .head
            .as_ref()
            .map(|head| head.settings.hidden_layers.clone())
            .unwrap_or_default(),
        activation: weights
            .head
            .as_ref()
            .and_then(|head| head.settings.activation),
        pooling: weights
            .head
            .as_ref()
            .map(|head| head.settings.pooling)
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
        ..match config {
            AdapterConfig::Lora(lora) => low_rank(lora),
            AdapterConfig::Ia3(_) => VersionSummary::default(),
            AdapterConfig::Full(full) => VersionSummary {
                layers: full.layers.iter().map(|layer| *layer as u32).collect(),
                unfrozen: true,
                ..VersionSummary::default()
            },
        }
    }
}

/// What LoRA's configuration says beside its modules.
fn low_rank(config: &LoraConfig) -> VersionSummary {
    VersionSummary {
        rank: config.r as u32,
        alpha: config.lora_alpha,
        dropout: config.lora_dropout,
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
        ..VersionSummary::default()
    }
}
