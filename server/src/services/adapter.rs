//! `AdapterService`: names, versions, aliases, and artifacts in and out. Every call asks first whether the caller may use
//! the tenant that the resource's name says, so that a refusal is the same for what exists and what does not.

mod combine;
mod download;
pub(crate) mod residency;
mod upload;

use std::sync::Arc;

use espalier_adapters::peft;
use espalier_engine::EngineHandle;
use espalier_proto::v1;
use prost::Message;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::Call;
use super::control::{page, request_key};
use crate::artifact_store::ArtifactStore;
use crate::config::Config;
use crate::convert::adapter as convert;
use crate::convert::adapter::ProfileLimits;
use crate::names::{AdapterId, AdapterName, AdapterRef, TenantId, TenantName, VersionName};
use crate::paging::next_token;
use crate::registry::Registry;
use crate::status::Refusal;

use upload::{BaseOf, Uploads};

/// The service.
#[derive(Clone)]
pub(crate) struct AdapterService {
    registry: Registry,
    store: ArtifactStore,
    engine: EngineHandle,
    config: Arc<Config>,
    base: Arc<BaseOf>,
    uploads: Uploads,
}

/// The limits on an adapter's files, from the configuration.
pub(crate) fn artifact_limits(config: &Config) -> peft::Limits {
    let adapters = &config.adapters;
    peft::Limits {
        max_config_bytes: adapters.max_config_bytes.0 as usize,
        max_labels_bytes: adapters.max_config_bytes.0 as usize,
        max_weights_bytes: adapters.max_adapter_bytes.0 as usize,
        max_rank: adapters.max_rank,
        max_labels: adapters.max_head_labels,
        ..peft::Limits::default()
    }
}

/// The limits on a serving profile, from the configuration.
pub(crate) fn profile_limits(config: &Config) -> ProfileLimits {
    ProfileLimits {
        max_text_bytes: config.adapters.max_config_bytes.0 as usize,
        max_stop_strings: config.limits.max_stop_strings,
        max_stop_string_bytes: config.limits.max_stop_string_bytes,
        max_labels: config.limits.max_labels,
        max_label_bytes: config.limits.max_label_bytes,
    }
}

impl AdapterService {
    /// The service on its stores and the engine whose base uploads are checked against.
    pub(crate) fn new(
        registry: Registry,
        store: ArtifactStore,
        engine: EngineHandle,
        config: Arc<Config>,
        base_resource: String,
    ) -> Self {
        let model = engine.model();
        let base = BaseOf {
            name: model.name.clone(),
            resource: base_resource,
            digest: model.digest.clone(),
            shape: model.config.base_shape(),
            gguf: model.config.gguf_lora_base(),
            limits: artifact_limits(&config),
        };
        Self {
            registry,
            store,
            uploads: Uploads {
                open: Arc::default(),
                limit: config.adapters.max_uploads_per_tenant,
            },
            base: Arc::new(base),
            engine,
            config,
        }
    }

    /// Parses an adapter's name and asks whether the caller may use its tenant.
    fn adapter_name(call: &Call, field: &str, text: &str) -> Result<AdapterName, Refusal> {
        let name = AdapterName::parse(text)
            .map_err(|error| Refusal::invalid_field(field, error.to_string()))?;
        call.principal.authorize(&name.tenant)?;
        Ok(name)
    }

    fn reference(call: &Call, text: &str) -> Result<AdapterRef, Refusal> {
        let reference = AdapterRef::parse(text)
            .map_err(|error| Refusal::invalid_field("name", error.to_string()))?;
        call.principal.authorize(&reference.adapter.tenant)?;
        Ok(reference)
    }

    fn tenant(call: &Call, text: &str) -> Result<TenantId, Refusal> {
        let name = TenantName::parse(text)
            .map_err(|error| Refusal::invalid_field("parent", error.to_string()))?;
        call.principal.authorize(&name.0)?;
        Ok(name.0)
    }

    async fn create(
        &self,
        call: Call,
        message: v1::CreateAdapterRequest,
    ) -> Result<v1::Adapter, Refusal> {
        let tenant = Self::tenant(&call, &message.parent)?;
        let id = AdapterId::parse(&message.adapter_id)
            .map_err(|error| Refusal::invalid_field("adapter_id", error.to_string()))?;
        let payload = v1::CreateAdapterRequest {
            request_id: String::new(),
            ..message.clone()
        };
        let request = request_key(
            "CreateAdapter",
            tenant.as_str(),
            &message.request_id,
            &payload.encode_to_vec(),
            &self.config.limits,
        )?;
        let description = message.adapter.unwrap_or_default().description;
        let name = AdapterName::new(tenant, id);
        let made = self
            .registry
            .create_adapter(name, description, request)
            .await?;
        Ok(convert::adapter(made))
    }

    async fn list(
        &self,
        call: Call,
        message: v1::ListAdaptersRequest,
    ) -> Result<v1::ListAdaptersResponse, Refusal> {
        let tenant = Self::tenant(&call, &message.parent)?;
        let scope = format!("ListAdapters {tenant}");
        let request = page(
            &scope,
            message.page_size,
            &message.page_token,
            &self.config.catalog,
        )?;
        let found = self.registry.list_adapters(tenant, request).await?;
        Ok(v1::ListAdaptersResponse {
            next_page_token: next_token(&scope, found.next.as_deref()),
            adapters: found.items.into_iter().map(convert::adapter).collect(),
        })
    }

    async fn list_versions(
        &self,
        call: Call,
        message: v1::ListAdapterVersionsRequest,
    ) -> Result<v1::ListAdapterVersionsResponse, Refusal> {
        let name = Self::adapter_name(&call, "parent", &message.parent)?;
        let scope = format!("ListAdapterVersions {name}");
        let request = page(
            &scope,
            message.page_size,
            &message.page_token,
            &self.config.catalog,
        )?;
        let found = self.registry.list_versions(name, request).await?;
        Ok(v1::ListAdapterVersionsResponse {
            next_page_token: next_token(&scope, found.next.as_deref()),
            versions: found.items.into_iter().map(convert::version).collect(),
        })
    }
}

#[tonic::async_trait]
impl v1::adapter_service_server::AdapterService for AdapterService {
    async fn create_adapter(
        &self,
        request: Request<v1::CreateAdapterRequest>,
    ) -> Result<Response<v1::Adapter>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.create(call, message).await?))
    }

    async fn get_adapter(
        &self,
        request: Request<v1::GetAdapterRequest>,
    ) -> Result<Response<v1::Adapter>, Status> {
        let (call, message) = Call::of(request)?;
        let name = Self::adapter_name(&call, "name", &message.name)?;
        let found = self
            .registry
            .get_adapter(name)
            .await
            .map_err(Refusal::from)?;
        Ok(Response::new(convert::adapter(found)))
    }

    async fn list_adapters(
        &self,
        request: Request<v1::ListAdaptersRequest>,
    ) -> Result<Response<v1::ListAdaptersResponse>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.list(call, message).await?))
    }

    async fn delete_adapter(
        &self,
        request: Request<v1::DeleteAdapterRequest>,
    ) -> Result<Response<()>, Status> {
        let (call, message) = Call::of(request)?;
        let name = Self::adapter_name(&call, "name", &message.name)?;
        let etag = (!message.etag.is_empty()).then_some(message.etag);
        let digests = self
            .registry
            .delete_adapter(name, etag, message.force)
            .await
            .map_err(Refusal::from)?;
        for digest in digests {
            residency::release(&self.engine, &self.registry, digest).await?;
        }
        Ok(Response::new(()))
    }

    async fn upload_adapter_version(
        &self,
        request: Request<Streaming<v1::UploadAdapterVersionRequest>>,
    ) -> Result<Response<v1::UploadAdapterVersionResponse>, Status> {
        let (call, stream) = Call::of(request)?;
        Ok(Response::new(self.upload(call, stream).await?))
    }

    async fn get_adapter_version(
        &self,
        request: Request<v1::GetAdapterVersionRequest>,
    ) -> Result<Response<v1::AdapterVersion>, Status> {
        let (call, message) = Call::of(request)?;
        let reference = Self::reference(&call, &message.name)?;
        let found = self
            .registry
            .get_version(reference)
            .await
            .map_err(Refusal::from)?;
        Ok(Response::new(convert::version(found)))
    }

    async fn list_adapter_versions(
        &self,
        request: Request<v1::ListAdapterVersionsRequest>,
    ) -> Result<Response<v1::ListAdapterVersionsResponse>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.list_versions(call, message).await?))
    }

    async fn delete_adapter_version(
        &self,
        request: Request<v1::DeleteAdapterVersionRequest>,
    ) -> Result<Response<()>, Status> {
        let (call, message) = Call::of(request)?;
        let name = VersionName::parse(&message.name).map_err(Refusal::from)?;
        call.principal
            .authorize(&name.adapter.tenant)
            .map_err(Refusal::from)?;
        let digest = self
            .registry
            .delete_version(name)
            .await
            .map_err(Refusal::from)?;
        residency::release(&self.engine, &self.registry, digest).await?;
        Ok(Response::new(()))
    }

    type DownloadAdapterVersionStream =
        ReceiverStream<Result<v1::DownloadAdapterVersionResponse, Status>>;

    async fn download_adapter_version(
        &self,
        request: Request<v1::DownloadAdapterVersionRequest>,
    ) -> Result<Response<Self::DownloadAdapterVersionStream>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.download(call, message).await?))
    }

    async fn set_adapter_aliases(
        &self,
        request: Request<v1::SetAdapterAliasesRequest>,
    ) -> Result<Response<v1::Adapter>, Status> {
        let (call, message) = Call::of(request)?;
        let name = Self::adapter_name(&call, "name", &message.name)?;
        let change = convert::alias_change(&name, &message)?;
        let changed = self
            .registry
            .set_aliases(name, change)
            .await
            .map_err(Refusal::from)?;
        Ok(Response::new(convert::adapter(changed)))
    }

    async fn combine_adapters(
        &self,
        request: Request<v1::CombineAdaptersRequest>,
    ) -> Result<Response<v1::AdapterVersion>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.combine(call, message).await?))
    }

    async fn list_residency(
        &self,
        request: Request<v1::ListResidencyRequest>,
    ) -> Result<Response<v1::ListResidencyResponse>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(
            AdapterService::list_residency(self, call, message).await?,
        ))
    }

    async fn get_residency(
        &self,
        request: Request<v1::GetResidencyRequest>,
    ) -> Result<Response<v1::AdapterResidency>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.residency(call, &message.name).await?))
    }

    async fn warm_adapter_version(
        &self,
        request: Request<v1::WarmAdapterVersionRequest>,
    ) -> Result<Response<v1::AdapterResidency>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.warm(call, message).await?))
    }

    async fn pin_adapter_version(
        &self,
        request: Request<v1::PinAdapterVersionRequest>,
    ) -> Result<Response<v1::AdapterResidency>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.pin(call, message).await?))
    }

    async fn unpin_adapter_version(
        &self,
        request: Request<v1::UnpinAdapterVersionRequest>,
    ) -> Result<Response<v1::AdapterResidency>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.unpin(call, message).await?))
    }

    async fn set_merge_policy(
        &self,
        request: Request<v1::SetMergePolicyRequest>,
    ) -> Result<Response<v1::AdapterVersion>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(
            AdapterService::set_merge_policy(self, call, message).await?,
        ))
    }
}
