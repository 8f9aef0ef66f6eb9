//! The calls of AdapterService.

use std::{
    collections::BTreeMap,
    future::Future,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use futures::StreamExt;
use tonic::{Request, Response, Status, transport::Channel};

use crate::{
    client::{Client, MAX_REPLY_BYTES, Repeat, Replies},
    error::Error,
    transfer::{self, AdapterUpload, Receiver},
    v1::{
        self, adapter_service_client::AdapterServiceClient,
        download_adapter_version_response::Payload,
    },
};

fn stub(channel: Channel) -> AdapterServiceClient<Channel> {
    AdapterServiceClient::new(channel).max_decoding_message_size(MAX_REPLY_BYTES)
}

impl Client {
    /// Registers an adapter.
    pub async fn create_adapter(
        &self,
        mut request: v1::CreateAdapterRequest,
    ) -> Result<v1::Adapter, Error> {
        transfer::draw_request_id(&mut request.request_id);
        let call = |channel, request| async move { stub(channel).create_adapter(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// One adapter, `tenants/{t}/adapters/{a}`.
    pub async fn get_adapter(&self, name: &str) -> Result<v1::Adapter, Error> {
        let request = v1::GetAdapterRequest {
            name: name.to_owned(),
        };
        let call = |channel, request| async move { stub(channel).get_adapter(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// One page of adapters.
    pub async fn list_adapters(
        &self,
        request: v1::ListAdaptersRequest,
    ) -> Result<v1::ListAdaptersResponse, Error> {
        let call = |channel, request| async move { stub(channel).list_adapters(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// Removes an adapter.
    pub async fn delete_adapter(&self, request: v1::DeleteAdapterRequest) -> Result<(), Error> {
        let call = |channel, request| async move { stub(channel).delete_adapter(request).await };
        self.delete(request, call).await
    }

    /// One version, by any reference.
    pub async fn get_adapter_version(&self, name: &str) -> Result<v1::AdapterVersion, Error> {
        let request = v1::GetAdapterVersionRequest {
            name: name.to_owned(),
        };
        let call =
            |channel, request| async move { stub(channel).get_adapter_version(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// One page of an adapter's versions.
    pub async fn list_adapter_versions(
        &self,
        request: v1::ListAdapterVersionsRequest,
    ) -> Result<v1::ListAdapterVersionsResponse, Error> {
        let call =
            |channel, request| async move { stub(channel).list_adapter_versions(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// Removes a version.
    pub async fn delete_adapter_version(&self, name: &str) -> Result<(), Error> {
        let request = v1::DeleteAdapterVersionRequest {
            name: name.to_owned(),
        };
        let call =
            |channel, request| async move { stub(channel).delete_adapter_version(request).await };
        self.delete(request, call).await
    }

    /// Moves and removes aliases in one step.
    pub async fn set_adapter_aliases(
        &self,
        request: v1::SetAdapterAliasesRequest,
    ) -> Result<v1::Adapter, Error> {
        // With an etag a repetition of what has already happened would be refused.
        let repeat = if request.etag.is_empty() {
            Repeat::Safe
        } else {
            Repeat::Never
        };
        let call =
            |channel, request| async move { stub(channel).set_adapter_aliases(request).await };
        self.unary(self.timeouts().control, repeat, request, call)
            .await
    }

    /// Points one alias at a version.
    pub async fn set_alias(
        &self,
        adapter: &str,
        alias: &str,
        version: &str,
    ) -> Result<v1::Adapter, Error> {
        self.set_adapter_aliases(v1::SetAdapterAliasesRequest {
            name: adapter.to_owned(),
            set: BTreeMap::from([(alias.to_owned(), version.to_owned())]),
            ..Default::default()
        })
        .await
    }

    /// Adds up versions into a new one.
    pub async fn combine_adapters(
        &self,
        mut request: v1::CombineAdaptersRequest,
    ) -> Result<v1::AdapterVersion, Error> {
        transfer::draw_request_id(&mut request.request_id);
        let call = |channel, request| async move { stub(channel).combine_adapters(request).await };
        // Large ranks take seconds to decompose.
        self.unary(self.timeouts().transfer, Repeat::Safe, request, call)
            .await
    }

    /// Uploads a PEFT directory in chunks, checksums first.
    pub async fn upload_adapter(
        &self,
        upload: AdapterUpload,
    ) -> Result<v1::UploadAdapterVersionResponse, Error> {
        let prepared = upload.prepare().await?;
        let broken = Arc::new(Mutex::new(None));
        let once = |remaining| {
            *broken.lock().unwrap_or_else(PoisonError::into_inner) = None;
            let messages = prepared.messages(Arc::clone(&broken));
            let request = self.request(messages, remaining);
            let channel = self.channel();
            async move { stub(channel).upload_adapter_version(request).await }
        };
        let reply = self
            .attempts(Some(self.timeouts().transfer), Repeat::Safe, once)
            .await;
        // A file that could not be read explains what the server thought of the gap.
        if let Some(error) = broken.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error);
        }
        Ok(reply?.into_inner())
    }

    /// A version's files as they come: the header, then chunks.
    pub async fn download_adapter_stream(
        &self,
        request: v1::DownloadAdapterVersionRequest,
    ) -> Result<Replies<v1::DownloadAdapterVersionResponse>, Error> {
        let call =
            |channel, request| async move { stub(channel).download_adapter_version(request).await };
        self.streaming(Some(self.timeouts().transfer), request, call)
            .await
    }

    /// Downloads a version into a directory, as PEFT's files. Files appear under their names only when size
    /// and checksum are right.
    pub async fn download_adapter(
        &self,
        name: &str,
        dir: &Path,
    ) -> Result<v1::AdapterVersion, Error> {
        let format = v1::ExportFormat::Peft;
        self.download(name, format, |version| Receiver::into_dir(dir, version))
            .await
    }

    /// Downloads a version's files as the server keeps them, also where only it reads them: a head with hidden layers.
    pub async fn download_stored(
        &self,
        name: &str,
        dir: &Path,
    ) -> Result<v1::AdapterVersion, Error> {
        let format = v1::ExportFormat::Stored;
        self.download(name, format, |version| Receiver::into_dir(dir, version))
            .await
    }

    /// Downloads a version as the one file that llama.cpp loads beside a GGUF of the same base.
    pub async fn download_gguf(
        &self,
        name: &str,
        file: &Path,
    ) -> Result<v1::AdapterVersion, Error> {
        let format = v1::ExportFormat::GgufLora;
        let part = v1::ArtifactPart::Gguf;
        let place = |version| async move { Receiver::into_file(file, part, version) };
        self.download(name, format, place).await
    }

    async fn download<F: Future<Output = Result<Receiver, Error>>>(
        &self,
        name: &str,
        format: v1::ExportFormat,
        place: impl Fn(v1::AdapterVersion) -> F,
    ) -> Result<v1::AdapterVersion, Error> {
        let request = v1::DownloadAdapterVersionRequest {
            name: name.to_owned(),
            format: format.into(),
        };
        let mut replies = self.download_adapter_stream(request).await?;
        let mut receiver = None;
        while let Some(reply) = replies.next().await {
            match (reply?.payload, &mut receiver) {
                (Some(Payload::Version(version)), None) => receiver = Some(place(version).await?),
                (Some(Payload::Chunk(chunk)), Some(receiver)) => receiver.write(chunk).await?,
                _ => return Err(Receiver::disorder("a message came out of its order")),
            }
        }
        match receiver {
            Some(receiver) => receiver.finish().await,
            None => Err(Receiver::disorder("the stream ended before its header")),
        }
    }

    /// Deletes; what an earlier attempt has deleted already counts as done.
    pub(crate) async fn delete<Q, R, F, Fut>(&self, request: Q, call: F) -> Result<(), Error>
    where
        Q: Clone,
        F: Fn(Channel, Request<Q>) -> Fut,
        Fut: Future<Output = Result<Response<R>, Status>>,
    {
        match self
            .unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
        {
            Ok(_) => Ok(()),
            Err(error) if error.code == tonic::Code::NotFound && error.attempts > 1 => Ok(()),
            Err(error) => Err(error),
        }
    }
}
