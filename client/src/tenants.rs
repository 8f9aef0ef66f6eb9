//! The calls of TenantService.

use tonic::transport::Channel;

use crate::{
    client::{Client, MAX_REPLY_BYTES, Repeat},
    error::Error,
    v1::{self, tenant_service_client::TenantServiceClient},
};

fn stub(channel: Channel) -> TenantServiceClient<Channel> {
    TenantServiceClient::new(channel).max_decoding_message_size(MAX_REPLY_BYTES)
}

impl Client {
    /// Registers a tenant.
    pub async fn create_tenant(
        &self,
        mut request: v1::CreateTenantRequest,
    ) -> Result<v1::Tenant, Error> {
        crate::transfer::draw_request_id(&mut request.request_id);
        let call = |channel, request| async move { stub(channel).create_tenant(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// One tenant, `tenants/{t}`.
    pub async fn get_tenant(&self, name: &str) -> Result<v1::Tenant, Error> {
        let request = v1::GetTenantRequest {
            name: name.to_owned(),
        };
        let call = |channel, request| async move { stub(channel).get_tenant(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// One page of tenants.
    pub async fn list_tenants(
        &self,
        request: v1::ListTenantsRequest,
    ) -> Result<v1::ListTenantsResponse, Error> {
        let call = |channel, request| async move { stub(channel).list_tenants(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// Removes a tenant; with all that it owns when `force` is set.
    pub async fn delete_tenant(&self, name: &str, force: bool) -> Result<(), Error> {
        let request = v1::DeleteTenantRequest {
            name: name.to_owned(),
            force,
        };
        let call = |channel, request| async move { stub(channel).delete_tenant(request).await };
        self.delete(request, call).await
    }

    /// Makes a key. Never repeated by itself: a second key would be made.
    pub async fn create_api_key(
        &self,
        request: v1::CreateApiKeyRequest,
    ) -> Result<v1::CreateApiKeyResponse, Error> {
        let call = |channel, request| async move { stub(channel).create_api_key(request).await };
        self.unary(self.timeouts().control, Repeat::Never, request, call)
            .await
    }

    /// One page of keys.
    pub async fn list_api_keys(
        &self,
        request: v1::ListApiKeysRequest,
    ) -> Result<v1::ListApiKeysResponse, Error> {
        let call = |channel, request| async move { stub(channel).list_api_keys(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// Ends a key.
    pub async fn revoke_api_key(&self, name: &str) -> Result<v1::ApiKey, Error> {
        let request = v1::RevokeApiKeyRequest {
            name: name.to_owned(),
        };
        let call = |channel, request| async move { stub(channel).revoke_api_key(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }
}
