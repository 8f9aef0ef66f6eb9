//! The calls of ModelService.

use tonic::transport::Channel;

use crate::{
    client::{Client, MAX_REPLY_BYTES, Repeat},
    error::Error,
    v1::{self, model_service_client::ModelServiceClient},
};

fn stub(channel: Channel) -> ModelServiceClient<Channel> {
    ModelServiceClient::new(channel).max_decoding_message_size(MAX_REPLY_BYTES)
}

impl Client {
    /// One base model, `models/{m}`.
    pub async fn get_model(&self, name: &str) -> Result<v1::Model, Error> {
        let request = v1::GetModelRequest {
            name: name.to_owned(),
        };
        let call = |channel, request| async move { stub(channel).get_model(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// One page of base models.
    pub async fn list_models(
        &self,
        request: v1::ListModelsRequest,
    ) -> Result<v1::ListModelsResponse, Error> {
        let call = |channel, request| async move { stub(channel).list_models(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// The server's version, state and load.
    pub async fn server_info(&self) -> Result<v1::ServerInfo, Error> {
        let request = v1::GetServerInfoRequest {};
        let call = |channel, request| async move { stub(channel).get_server_info(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }
}
