//! The calls about memory: what is there, what is to come or to stay, and who may be merged. The engine keeps the book of
//! what is in memory; the registry keeps what its owner wants of a version, so that it survives a restart.

use std::collections::HashMap;

use espalier_adapters::version::VersionDigest;
use espalier_engine::EngineHandle;
use espalier_engine::adapter_pool::AdapterResidency;
use espalier_proto::v1;

use super::super::Call;
use super::super::control::page;
use super::AdapterService;
use crate::convert::adapter as convert;
use crate::paging::{Page, next_token};
use crate::registry::{Registry, RegistryError, ServingChange, Version, VersionState};
use crate::status::Refusal;

impl AdapterService {
    pub(super) async fn list_residency(
        &self,
        call: Call,
        message: v1::ListResidencyRequest,
    ) -> Result<v1::ListResidencyResponse, Refusal> {
        let tenant = Self::tenant(&call, &message.parent)?;
        let scope = format!("ListResidency {tenant}");
        let request = page(
            &scope,
            message.page_size,
            &message.page_token,
            &self.config.catalog,
        )?;
        let held = self.engine.residency().await?;
        let held: HashMap<VersionDigest, AdapterResidency> = held
            .into_iter()
            .map(|entry| (entry.digest, entry))
            .collect();
        let mut named: Vec<v1::AdapterResidency> = self
            .registry
            .names_of(tenant, held.keys().copied().collect())
            .await?
            .iter()
            .filter_map(|(name, digest)| Some(convert::residency(name, held.get(digest)?)))
            .collect();
        named.sort_by(|a, b| a.version.cmp(&b.version));
        named.retain(|entry| {
            request
                .after
                .as_ref()
                .is_none_or(|after| entry.version > *after)
        });
        let found = Page::cut(named, &request, |entry| entry.version.clone());
        let memory = self.engine.adapter_memory();
        Ok(v1::ListResidencyResponse {
            next_page_token: next_token(&scope, found.next.as_deref()),
            residency: found.items,
            budget_bytes: memory.budget as u64,
            used_bytes: memory.used as u64,
            pinned_budget_bytes: memory.pinned_budget as u64,
            pinned_bytes: memory.pinned as u64,
            merged_budget_bytes: memory.merged_budget as u64,
            merged_bytes: memory.merged as u64,
        })
    }

    pub(super) async fn residency(
        &self,
        call: Call,
        name: &str,
    ) -> Result<v1::AdapterResidency, Refusal> {
        let version = self.usable(&call, name).await?;
        Ok(self.place(&version))
    }

    pub(super) async fn warm(
        &self,
        call: Call,
        message: v1::WarmAdapterVersionRequest,
    ) -> Result<v1::AdapterResidency, Refusal> {
        let version = self.usable(&call, &message.name).await?;
        let digest = version.content.digest;
        if message.wait {
            self.engine.activate(digest).await?;
        } else {
            self.engine.prefetch(digest);
        }
        Ok(self.place(&version))
    }

    pub(super) async fn pin(
        &self,
        call: Call,
        message: v1::PinAdapterVersionRequest,
    ) -> Result<v1::AdapterResidency, Refusal> {
        let version = self.usable(&call, &message.name).await?;
        // In memory first: a pin that does not fit is refused and not stored.
        self.engine.pin(version.content.digest).await?;
        let change = ServingChange {
            pinned: Some(true),
            ..ServingChange::default()
        };
        let stored = self
            .registry
            .set_serving(version.name.clone(), change)
            .await;
        if let Err(error) = stored {
            release(&self.engine, &self.registry, version.content.digest).await?;
            return Err(error.into());
        }
        Ok(self.place(&version))
    }

    pub(super) async fn unpin(
        &self,
        call: Call,
        message: v1::UnpinAdapterVersionRequest,
    ) -> Result<v1::AdapterResidency, Refusal> {
        let reference = Self::reference(&call, &message.name)?;
        let version = self.registry.get_version(reference).await?;
        let change = ServingChange {
            pinned: Some(false),
            ..ServingChange::default()
        };
        let version = self.registry.set_serving(version.name, change).await?;
        release(&self.engine, &self.registry, version.content.digest).await?;
        Ok(self.place(&version))
    }

    pub(super) async fn set_merge_policy(
        &self,
        call: Call,
        message: v1::SetMergePolicyRequest,
    ) -> Result<v1::AdapterVersion, Refusal> {
        let reference = Self::reference(&call, &message.name)?;
        let policy = convert::merge_policy("merge_policy", message.merge_policy())?;
        let version = self.registry.get_version(reference).await?;
        let change = ServingChange {
            merge_policy: Some(policy),
            ..ServingChange::default()
        };
        let version = self.registry.set_serving(version.name, change).await?;
        self.engine.set_merge_policy(version.content.digest, policy);
        Ok(convert::version(version))
    }

    /// The version that a reference means, if it can be served here.
    async fn usable(&self, call: &Call, name: &str) -> Result<Version, Refusal> {
        let reference = Self::reference(call, name)?;
        let version = self.registry.get_version(reference).await?;
        if version.state == VersionState::Active {
            return Ok(version);
        }
        Err(RegistryError::VersionNotActive {
            name: version.name,
            state: version.state,
            error: version.error.unwrap_or_default(),
        }
        .into())
    }

    fn place(&self, version: &Version) -> v1::AdapterResidency {
        match self.engine.residency_of(&version.content.digest) {
            Some(found) => convert::residency(&version.name, &found),
            None => convert::on_disk(&version.name, version.content.digest),
        }
    }
}

/// Gives up what nobody wants any more: the pin of a digest that no version pins, and the memory of one that no version
/// has. Requests that run keep what they hold.
pub(super) async fn release(
    engine: &EngineHandle,
    registry: &Registry,
    digest: VersionDigest,
) -> Result<(), Refusal> {
    let (named, pinned) = registry.kept(digest).await?;
    if !pinned {
        engine.unpin(&digest);
    }
    if !named {
        // In use or not there: then it goes with the others, when room is needed.
        let _ = engine.deactivate(digest).await;
    }
    Ok(())
}

/// Brings pinned versions back into memory, one after the other, after a start. One that does not come is logged and stays
/// pinned: the next start tries again.
pub(crate) async fn restore_pins(engine: EngineHandle, registry: Registry) {
    let digests = match registry.pinned().await {
        Ok(digests) => digests,
        Err(error) => return tracing::error!(%error, "the pinned versions could not be listed"),
    };
    for digest in digests {
        if let Err(error) = engine.pin(digest).await {
            tracing::warn!(%digest, %error, "a pinned version could not be loaded");
        }
    }
}
