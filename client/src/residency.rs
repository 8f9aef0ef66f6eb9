//! The calls of AdapterService about the server's memory.

use tonic::transport::Channel;

use crate::{
    client::{Client, MAX_REPLY_BYTES, Repeat},
    error::Error,
    v1::{self, adapter_service_client::AdapterServiceClient},
};

fn stub(channel: Channel) -> AdapterServiceClient<Channel> {
    AdapterServiceClient::new(channel).max_decoding_message_size(MAX_REPLY_BYTES)
}

impl Client {
    /// One page of what is in memory.
    pub async fn list_residency(
        &self,
        request: v1::ListResidencyRequest,
    ) -> Result<v1::ListResidencyResponse, Error> {
        let call = |channel, request| async move { stub(channel).list_residency(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// Where one version is, by any reference.
    pub async fn get_residency(&self, name: &str) -> Result<v1::AdapterResidency, Error> {
        let request = v1::GetResidencyRequest {
            name: name.to_owned(),
        };
        let call = |channel, request| async move { stub(channel).get_residency(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// Brings a version into memory; with `wait` returns when it is there.
    pub async fn warm_adapter_version(
        &self,
        name: &str,
        wait: bool,
    ) -> Result<v1::AdapterResidency, Error> {
        let request = v1::WarmAdapterVersionRequest {
            name: name.to_owned(),
            wait,
        };
        let call =
            |channel, request| async move { stub(channel).warm_adapter_version(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// Keeps a version in memory.
    pub async fn pin_adapter_version(&self, name: &str) -> Result<v1::AdapterResidency, Error> {
        let request = v1::PinAdapterVersionRequest {
            name: name.to_owned(),
        };
        let call =
            |channel, request| async move { stub(channel).pin_adapter_version(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// Lets a version be evicted again.
    pub async fn unpin_adapter_version(&self, name: &str) -> Result<v1::AdapterResidency, Error> {
        let request = v1::UnpinAdapterVersionRequest {
            name: name.to_owned(),
        };
        let call =
            |channel, request| async move { stub(channel).unpin_adapter_version(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// Says whether a version may be served from merged weights.
    pub async fn set_merge_policy(
        &self,
        name: &str,
        policy: v1::MergePolicy,
    ) -> Result<v1::AdapterVersion, Error> {
        let request = v1::SetMergePolicyRequest {
            name: name.to_owned(),
            merge_policy: policy.into(),
        };
        let call = |channel, request| async move { stub(channel).set_merge_policy(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }
}
