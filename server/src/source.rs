//! Where the engine's loader gets artifacts: from the store, by digest. A version whose bytes fail their digest is
//! quarantined here, so that the next request learns it from the registry instead of from the loader. This file must not
//! know what an artifact holds.

use espalier_adapters::version::{AdapterArtifact, VersionDigest};
use espalier_engine::adapter_loader::{AdapterSource, SourceError};
use tokio::runtime::Handle;

use crate::artifact_store::{ArtifactStore, StoreError};
use crate::registry::Registry;

/// The store as the engine sees it.
pub(crate) struct StoredAdapters {
    store: ArtifactStore,
    registry: Registry,
    /// The loader's thread is not the runtime's, and the registry is asynchronous.
    runtime: Handle,
}

impl StoredAdapters {
    pub(crate) fn new(store: ArtifactStore, registry: Registry, runtime: Handle) -> Self {
        StoredAdapters {
            store,
            registry,
            runtime,
        }
    }

    fn quarantine(&self, digest: VersionDigest, why: String) {
        let registry = self.registry.clone();
        self.runtime.spawn(async move {
            if let Err(error) = registry.quarantine(digest, why).await {
                tracing::error!(%digest, %error, "a corrupt version could not be quarantined");
            }
        });
    }
}

impl AdapterSource for StoredAdapters {
    /// The store checks every read.
    fn verifies(&self) -> bool {
        true
    }

    fn fetch(
        &self,
        digest: &VersionDigest,
        spare: Vec<u8>,
    ) -> Result<AdapterArtifact, SourceError> {
        match self.store.get_artifact_into(digest, spare) {
            Ok(artifact) => Ok(artifact),
            Err(StoreError::NotFound { .. }) => Err(SourceError::NotFound),
            Err(error @ StoreError::Corrupt { .. }) => {
                self.quarantine(*digest, error.to_string());
                Err(SourceError::Corrupt(error.to_string()))
            }
            Err(StoreError::Io { action, source }) => {
                tracing::error!(%digest, action, %source, "an artifact could not be read");
                Err(SourceError::Unavailable(format!(
                    "the store failed to {action}"
                )))
            }
        }
    }
}
