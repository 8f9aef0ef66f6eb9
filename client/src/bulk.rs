//! The calls of BulkService: a file of requests up, a job, a file of answers down.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use futures::{StreamExt, stream};
use tokio::io::{AsyncSeekExt, AsyncWriteExt};
use tonic::{Code, transport::Channel};

use crate::{
    client::{Client, MAX_REPLY_BYTES, Repeat, Replies},
    error::Error,
    transfer::{self, Source, pieces},
    v1::{self, bulk_service_client::BulkServiceClient, create_bulk_job_request::Payload},
};

fn stub(channel: Channel) -> BulkServiceClient<Channel> {
    BulkServiceClient::new(channel).max_decoding_message_size(MAX_REPLY_BYTES)
}

/// Whether a job in this state will never change again.
#[must_use]
pub fn is_final(state: v1::BulkJobState) -> bool {
    use v1::BulkJobState as S;
    matches!(state, S::Succeeded | S::Failed | S::Cancelled)
}

/// A job to create from a file.
#[derive(Clone, Debug, Default)]
pub struct BulkUpload {
    /// `tenants/{t}`.
    pub parent: String,
    /// The job's last name part; the server draws one when empty.
    pub job_id: String,
    /// What is done with every line.
    pub operation: v1::BulkOperation,
    /// Which weights answer; unset is the base model.
    pub target: Option<v1::InferenceTarget>,
    /// The file: JSON Lines of key and request.
    pub file: PathBuf,
    /// For people.
    pub description: String,
    /// Check every line, create nothing.
    pub validate_only: bool,
    /// Drawn when empty.
    pub request_id: String,
}

impl Client {
    /// Uploads an input and creates its job; safe to repeat, for it is named by a request id.
    pub async fn create_bulk_job(
        &self,
        upload: BulkUpload,
    ) -> Result<v1::CreateBulkJobResponse, Error> {
        let source = Source::File(upload.file);
        let (size_bytes, sha256) = source.measure().await?;
        let mut metadata = v1::BulkJobMetadata {
            parent: upload.parent,
            bulk_job_id: upload.job_id,
            operation: upload.operation.into(),
            target: upload.target,
            size_bytes,
            sha256,
            description: upload.description,
            request_id: upload.request_id,
            validate_only: upload.validate_only,
        };
        transfer::draw_request_id(&mut metadata.request_id);
        let message = |payload| v1::CreateBulkJobRequest {
            payload: Some(payload),
        };
        let broken = Arc::new(Mutex::new(None));
        let once = |remaining| {
            *broken.lock().unwrap_or_else(PoisonError::into_inner) = None;
            let chunks =
                pieces(vec![source.clone()], Arc::clone(&broken)).map(move |(_, offset, data)| {
                    message(Payload::Chunk(v1::BulkInputChunk { offset, data }))
                });
            let first = message(Payload::Metadata(metadata.clone()));
            let request = self.request(stream::iter([first]).chain(chunks), remaining);
            let channel = self.channel();
            async move { stub(channel).create_bulk_job(request).await }
        };
        let limit = Some(self.timeouts().transfer);
        let reply = self.attempts(limit, Repeat::Safe, once).await;
        if let Some(error) = broken.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error);
        }
        Ok(reply?.into_inner())
    }

    /// One job.
    pub async fn get_bulk_job(&self, name: &str) -> Result<v1::BulkJob, Error> {
        let request = v1::GetBulkJobRequest {
            name: name.to_owned(),
        };
        let call = |channel, request| async move { stub(channel).get_bulk_job(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// One page of jobs.
    pub async fn list_bulk_jobs(
        &self,
        request: v1::ListBulkJobsRequest,
    ) -> Result<v1::ListBulkJobsResponse, Error> {
        let call = |channel, request| async move { stub(channel).list_bulk_jobs(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// Ends a job.
    pub async fn cancel_bulk_job(&self, name: &str) -> Result<v1::BulkJob, Error> {
        let request = v1::CancelBulkJobRequest {
            name: name.to_owned(),
        };
        let call = |channel, request| async move { stub(channel).cancel_bulk_job(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// Removes a job that has ended.
    pub async fn delete_bulk_job(&self, name: &str) -> Result<(), Error> {
        let request = v1::DeleteBulkJobRequest {
            name: name.to_owned(),
        };
        let call = |channel, request| async move { stub(channel).delete_bulk_job(request).await };
        self.unary(self.timeouts().control, Repeat::Never, request, call)
            .await
    }

    /// A job now and after every change, over one connection.
    pub async fn watch_bulk_job(&self, name: &str) -> Result<Replies<v1::BulkJob>, Error> {
        let request = v1::WatchBulkJobRequest {
            name: name.to_owned(),
        };
        let call = |channel, request| async move { stub(channel).watch_bulk_job(request).await };
        self.streaming(None, request, call).await
    }

    /// The output from `offset` on, as far as it is durable.
    pub async fn bulk_results(
        &self,
        name: &str,
        offset: u64,
    ) -> Result<Replies<v1::DownloadBulkResultsResponse>, Error> {
        let request = v1::DownloadBulkResultsRequest {
            name: name.to_owned(),
            offset,
        };
        let call =
            |channel, request| async move { stub(channel).download_bulk_results(request).await };
        self.streaming(Some(self.timeouts().transfer), request, call)
            .await
    }

    /// Writes the output to a file and says how many bytes it has and whether the job has ended. A file that is there is
    /// taken for an earlier part of the same output and gets what it lacks.
    pub async fn download_bulk_results(
        &self,
        name: &str,
        path: &Path,
    ) -> Result<(u64, bool), Error> {
        let wrong = |error| Error::file(path, &error);
        let mut options = tokio::fs::OpenOptions::new();
        let opened = options.create(true).truncate(false).write(true).open(path);
        let mut file = opened.await.map_err(wrong)?;
        let mut at = file.seek(std::io::SeekFrom::End(0)).await.map_err(wrong)?;
        let mut complete = false;
        let mut replies = self.bulk_results(name, at).await?;
        while let Some(piece) = replies.next().await {
            let piece = piece?;
            if piece.offset != at {
                let text = format!("bytes {at} were due, bytes {} came", piece.offset);
                return Err(Error::local(Code::DataLoss, "DOWNLOAD", text));
            }
            file.write_all(&piece.data).await.map_err(wrong)?;
            at += piece.data.len() as u64;
            complete = piece.complete;
        }
        file.flush().await.map_err(wrong)?;
        file.sync_all().await.map_err(wrong)?;
        Ok((at, complete))
    }
}
