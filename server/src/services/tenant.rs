//! `TenantService`: tenants and the keys that act for them. Every call asks first whether the caller may.

use espalier_proto::v1;
use prost::Message;
use tonic::{Request, Response, Status};

use super::Call;
use super::control::{page, request_key};
use crate::config::{Catalog, Limits};
use crate::convert::tenant;
use crate::database::now_ms;
use crate::names::{ApiKeyName, KeyParent, TenantId, TenantName};
use crate::paging::next_token;
use crate::principal::Principal;
use crate::registry::Registry;
use crate::status::Refusal;
use crate::tenants::TenantStore;

/// The service.
#[derive(Clone)]
pub(crate) struct TenantService {
    tenants: TenantStore,
    registry: Registry,
    catalog: Catalog,
    limits: Limits,
}

impl TenantService {
    /// The service on its store; the registry hears of tenants that go.
    pub(crate) fn new(
        tenants: TenantStore,
        registry: Registry,
        catalog: Catalog,
        limits: Limits,
    ) -> Self {
        Self {
            tenants,
            registry,
            catalog,
            limits,
        }
    }

    /// Keys of a tenant may be listed by whoever may use it; made and revoked by administrators alone.
    fn may_list_keys(principal: &Principal, parent: &KeyParent) -> Result<(), Refusal> {
        match parent {
            KeyParent::Tenant(tenant) => Ok(principal.authorize_tenant_read(tenant)?),
            KeyParent::Server => Ok(principal.authorize_admin()?),
        }
    }

    async fn create_tenant(
        &self,
        call: Call,
        message: v1::CreateTenantRequest,
    ) -> Result<v1::Tenant, Refusal> {
        call.principal.authorize_admin()?;
        let id = TenantId::parse(&message.tenant_id)
            .map_err(|error| Refusal::invalid_field("tenant_id", error.to_string()))?;
        let payload = v1::CreateTenantRequest {
            request_id: String::new(),
            ..message.clone()
        };
        let request = request_key(
            "CreateTenant",
            "-",
            &message.request_id,
            &payload.encode_to_vec(),
            &self.limits,
        )?;
        let display_name = message.tenant.unwrap_or_default().display_name;
        let made = self
            .tenants
            .create_tenant(id, display_name, request)
            .await?;
        Ok(tenant::tenant(made))
    }

    async fn list_tenants(
        &self,
        call: Call,
        message: v1::ListTenantsRequest,
    ) -> Result<v1::ListTenantsResponse, Refusal> {
        let scope = "ListTenants";
        let request = page(scope, message.page_size, &message.page_token, &self.catalog)?;
        // Whoever may not see all sees those that it may act for.
        let own: Option<Vec<TenantId>> = match &call.principal {
            Principal::Tenant { tenant, .. } => Some(vec![tenant.clone()]),
            Principal::Service {
                tenants: Some(some),
                ..
            } => Some(some.iter().cloned().collect()),
            _ => None,
        };
        let (found, next) = match own {
            None => {
                let found = self.tenants.list_tenants(request).await?;
                (found.items, found.next)
            }
            Some(own) => {
                let mut found = Vec::new();
                let mut next = None;
                for id in own {
                    if request
                        .after
                        .as_deref()
                        .is_some_and(|after| id.as_str() <= after)
                    {
                        continue;
                    }
                    if found.len() == request.size {
                        next = found
                            .last()
                            .map(|t: &crate::tenants::Tenant| t.id.to_string());
                        break;
                    }
                    found.push(self.tenants.get_tenant(id).await?);
                }
                (found, next)
            }
        };
        Ok(v1::ListTenantsResponse {
            tenants: found.into_iter().map(tenant::tenant).collect(),
            next_page_token: next_token(scope, next.as_deref()),
        })
    }

    async fn delete_tenant(
        &self,
        call: Call,
        message: v1::DeleteTenantRequest,
    ) -> Result<(), Refusal> {
        call.principal.authorize_admin()?;
        let name = TenantName::parse(&message.name)?;
        self.tenants
            .delete_tenant(name.0.clone(), message.force)
            .await?;
        self.registry.forget_tenant(&name.0);
        Ok(self.registry.sweep().await?)
    }

    async fn create_key(
        &self,
        call: Call,
        message: v1::CreateApiKeyRequest,
    ) -> Result<v1::CreateApiKeyResponse, Refusal> {
        call.principal.authorize_admin()?;
        let parent = KeyParent::parse(&message.parent)
            .map_err(|error| Refusal::invalid_field("parent", error.to_string()))?;
        let new = tenant::new_key(parent, message.api_key.unwrap_or_default())?;
        let (key, secret) = self.tenants.create_key(new).await?;
        tracing::info!(key = %key.name, time = now_ms(), "an API key was made");
        Ok(v1::CreateApiKeyResponse {
            api_key: Some(tenant::api_key(key)),
            secret,
        })
    }

    async fn list_keys(
        &self,
        call: Call,
        message: v1::ListApiKeysRequest,
    ) -> Result<v1::ListApiKeysResponse, Refusal> {
        let parent = KeyParent::parse(&message.parent)
            .map_err(|error| Refusal::invalid_field("parent", error.to_string()))?;
        Self::may_list_keys(&call.principal, &parent)?;
        let scope = format!("ListApiKeys {parent}");
        let request = page(
            &scope,
            message.page_size,
            &message.page_token,
            &self.catalog,
        )?;
        let found = self.tenants.list_keys(parent, request).await?;
        Ok(v1::ListApiKeysResponse {
            next_page_token: next_token(&scope, found.next.as_deref()),
            api_keys: found.items.into_iter().map(tenant::api_key).collect(),
        })
    }
}

#[tonic::async_trait]
impl v1::tenant_service_server::TenantService for TenantService {
    async fn create_tenant(
        &self,
        request: Request<v1::CreateTenantRequest>,
    ) -> Result<Response<v1::Tenant>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(
            TenantService::create_tenant(self, call, message).await?,
        ))
    }

    async fn get_tenant(
        &self,
        request: Request<v1::GetTenantRequest>,
    ) -> Result<Response<v1::Tenant>, Status> {
        let (call, message) = Call::of(request)?;
        let id = tenant::tenant_name("name", &message.name)?;
        call.principal
            .authorize_tenant_read(&id)
            .map_err(Refusal::from)?;
        let found = self.tenants.get_tenant(id).await.map_err(Refusal::from)?;
        Ok(Response::new(tenant::tenant(found)))
    }

    async fn list_tenants(
        &self,
        request: Request<v1::ListTenantsRequest>,
    ) -> Result<Response<v1::ListTenantsResponse>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(
            TenantService::list_tenants(self, call, message).await?,
        ))
    }

    async fn delete_tenant(
        &self,
        request: Request<v1::DeleteTenantRequest>,
    ) -> Result<Response<()>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(
            TenantService::delete_tenant(self, call, message).await?,
        ))
    }

    async fn create_api_key(
        &self,
        request: Request<v1::CreateApiKeyRequest>,
    ) -> Result<Response<v1::CreateApiKeyResponse>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.create_key(call, message).await?))
    }

    async fn list_api_keys(
        &self,
        request: Request<v1::ListApiKeysRequest>,
    ) -> Result<Response<v1::ListApiKeysResponse>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.list_keys(call, message).await?))
    }

    async fn revoke_api_key(
        &self,
        request: Request<v1::RevokeApiKeyRequest>,
    ) -> Result<Response<v1::ApiKey>, Status> {
        let (call, message) = Call::of(request)?;
        call.principal.authorize_admin().map_err(Refusal::from)?;
        let name = ApiKeyName::parse(&message.name).map_err(Refusal::from)?;
        let key = self.tenants.revoke_key(name).await.map_err(Refusal::from)?;
        Ok(Response::new(tenant::api_key(key)))
    }
}
