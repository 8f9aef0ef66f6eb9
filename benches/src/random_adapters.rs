//! Adapters of random numbers on every linear layer, B not zero, and the source that an engine fetches them from. It must
//! not know what is measured.

use std::collections::BTreeMap;

use espalier_adapters::config::{LoraConfig, Site};
use espalier_adapters::error::AdapterError;
use espalier_adapters::peft;
use espalier_adapters::version::{AdapterArtifact, VersionDigest};
use espalier_adapters::weights::{AdapterWeights, SiteAdapter};
use espalier_engine::adapter_loader::{AdapterSource, SourceError};
use espalier_engine::model::config::ModelConfig;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Artifacts by digest, held in memory.
#[derive(Debug, Default)]
pub struct RandomAdapters(BTreeMap<VersionDigest, AdapterArtifact>);

impl RandomAdapters {
    /// Makes the adapter of a seed and returns its version. Alpha is twice the rank.
    ///
    /// # Errors
    /// A rank that does not fit the model.
    pub fn add(
        &mut self,
        seed: u64,
        rank: usize,
        model: &ModelConfig,
    ) -> Result<VersionDigest, AdapterError> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let scale = 2.0;
        let config = LoraConfig::new(rank, f64::from(scale) * rank as f64, &Site::ALL);
        let mut weights = AdapterWeights::default();
        let base = model.base_shape();
        for layer in 0..model.layers {
            for site in Site::ALL {
                let (inputs, outputs) = base.dims(site);
                let mut numbers = |count: usize| -> Vec<f32> {
                    (0..count)
                        .map(|_| random.random_range(-0.02..0.02))
                        .collect()
                };
                let (a, b) = (numbers(rank * inputs), numbers(outputs * rank));
                let lora = SiteAdapter {
                    r: rank,
                    scale,
                    a: a.into(),
                    b: b.into(),
                    magnitude: None,
                };
                weights.sites.insert((layer, site), lora);
            }
        }
        let artifact = peft::write(&config, &weights)?;
        let digest = artifact.digest();
        self.0.insert(digest, artifact);
        Ok(digest)
    }
}

impl AdapterSource for RandomAdapters {
    fn fetch(&self, digest: &VersionDigest, _: Vec<u8>) -> Result<AdapterArtifact, SourceError> {
        self.0.get(digest).cloned().ok_or(SourceError::NotFound)
    }
}
