//! The calls of TrainingService, and a watch that survives lost connections.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{StreamExt, stream};
use tonic::transport::Channel;

use crate::{
    client::{Client, MAX_REPLY_BYTES, Repeat, Replies},
    error::Error,
    transfer::{self, DatasetUpload},
    v1::{
        self, TrainingEvent, TrainingJobState, training_event::Event,
        training_service_client::TrainingServiceClient,
    },
};

/// Attempts to take up a watch again without an event between them.
const WATCH_ATTEMPTS: u32 = 20;

fn stub(channel: Channel) -> TrainingServiceClient<Channel> {
    TrainingServiceClient::new(channel).max_decoding_message_size(MAX_REPLY_BYTES)
}

/// Whether a job in this state will never change again.
#[must_use]
pub fn is_final(state: TrainingJobState) -> bool {
    use TrainingJobState as S;
    matches!(state, S::Succeeded | S::Failed | S::Cancelled)
}

impl Client {
    /// Creates a job; safe to repeat, for it is named by a request id.
    pub async fn create_training_job(
        &self,
        mut request: v1::CreateTrainingJobRequest,
    ) -> Result<v1::CreateTrainingJobResponse, Error> {
        transfer::draw_request_id(&mut request.request_id);
        let call = |channel, request| async move {
            // Inline data may be larger than the stub's default.
            let mut stub = stub(channel).max_encoding_message_size(usize::MAX);
            stub.create_training_job(request).await
        };
        self.unary(self.timeouts().transfer, Repeat::Safe, request, call)
            .await
    }

    /// One job.
    pub async fn get_training_job(&self, name: &str) -> Result<v1::TrainingJob, Error> {
        let request = v1::GetTrainingJobRequest {
            name: name.to_owned(),
        };
        let call = |channel, request| async move { stub(channel).get_training_job(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// One page of jobs.
    pub async fn list_training_jobs(
        &self,
        request: v1::ListTrainingJobsRequest,
    ) -> Result<v1::ListTrainingJobsResponse, Error> {
        let call =
            |channel, request| async move { stub(channel).list_training_jobs(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// Stops a job.
    pub async fn cancel_training_job(&self, name: &str) -> Result<v1::TrainingJob, Error> {
        let request = v1::CancelTrainingJobRequest {
            name: name.to_owned(),
        };
        let call =
            |channel, request| async move { stub(channel).cancel_training_job(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// Puts a job aside, until it is resumed.
    pub async fn pause_training_job(&self, name: &str) -> Result<v1::TrainingJob, Error> {
        let request = v1::PauseTrainingJobRequest {
            name: name.to_owned(),
        };
        let call =
            |channel, request| async move { stub(channel).pause_training_job(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// Lets a paused job go on.
    pub async fn resume_training_job(&self, name: &str) -> Result<v1::TrainingJob, Error> {
        let request = v1::ResumeTrainingJobRequest {
            name: name.to_owned(),
        };
        let call =
            |channel, request| async move { stub(channel).resume_training_job(request).await };
        self.unary(self.timeouts().control, Repeat::Never, request, call)
            .await
    }

    /// One connection's worth of a job's events.
    pub async fn watch_training_job_once(
        &self,
        name: &str,
        from_sequence: u64,
    ) -> Result<Replies<TrainingEvent>, Error> {
        let request = v1::WatchTrainingJobRequest {
            name: name.to_owned(),
            from_sequence,
        };
        let call =
            |channel, request| async move { stub(channel).watch_training_job(request).await };
        self.streaming(None, request, call).await
    }

    /// A job's events to its end, each once and in order, without heartbeats. A connection that
    /// breaks is made again, from the event after the last one seen.
    pub async fn watch_training_job(
        &self,
        name: &str,
        from_sequence: u64,
    ) -> Result<Replies<TrainingEvent>, Error> {
        let watch = Watch {
            client: self.clone(),
            name: name.to_owned(),
            next: from_sequence.max(1),
            failures: 0,
            ended: false,
            last: TrainingJobState::Unspecified,
            replies: Some(self.watch_training_job_once(name, from_sequence).await?),
        };
        Ok(stream::unfold(watch, Watch::step).boxed())
    }

    /// Uploads a dataset in chunks, checksum first.
    pub async fn upload_dataset(
        &self,
        upload: DatasetUpload,
    ) -> Result<v1::UploadDatasetResponse, Error> {
        let prepared = upload.prepare().await?;
        let broken = Arc::new(Mutex::new(None));
        let once = |remaining| {
            *broken.lock().unwrap_or_else(PoisonError::into_inner) = None;
            let messages = prepared.messages(Arc::clone(&broken));
            let request = self.request(messages, remaining);
            let channel = self.channel();
            async move { stub(channel).upload_dataset(request).await }
        };
        let reply = self
            .attempts(Some(self.timeouts().transfer), Repeat::Safe, once)
            .await;
        if let Some(error) = broken.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error);
        }
        Ok(reply?.into_inner())
    }

    /// One dataset.
    pub async fn get_dataset(&self, name: &str) -> Result<v1::Dataset, Error> {
        let request = v1::GetDatasetRequest {
            name: name.to_owned(),
        };
        let call = |channel, request| async move { stub(channel).get_dataset(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// One page of datasets.
    pub async fn list_datasets(
        &self,
        request: v1::ListDatasetsRequest,
    ) -> Result<v1::ListDatasetsResponse, Error> {
        let call = |channel, request| async move { stub(channel).list_datasets(request).await };
        self.unary(self.timeouts().control, Repeat::Safe, request, call)
            .await
    }

    /// Removes a dataset.
    pub async fn delete_dataset(&self, name: &str) -> Result<(), Error> {
        let request = v1::DeleteDatasetRequest {
            name: name.to_owned(),
        };
        let call = |channel, request| async move { stub(channel).delete_dataset(request).await };
        self.delete(request, call).await
    }
}

/// A watch between two events.
struct Watch {
    client: Client,
    name: String,
    next: u64,
    failures: u32,
    ended: bool,
    last: TrainingJobState,
    replies: Option<Replies<TrainingEvent>>,
}

// === impl Watch ===

impl Watch {
    async fn step(mut self) -> Option<(Result<TrainingEvent, Error>, Self)> {
        while !self.ended {
            let found = match &mut self.replies {
                Some(replies) => replies.next().await,
                None => match self
                    .client
                    .watch_training_job_once(&self.name, self.next)
                    .await
                {
                    Ok(replies) => {
                        self.replies = Some(replies);
                        continue;
                    }
                    Err(error) => Some(Err(error)),
                },
            };
            match found {
                Some(Ok(event)) => {
                    self.failures = 0;
                    if let Some(event) = self.accept(event) {
                        return Some((Ok(event), self));
                    }
                }
                Some(Err(error)) if error.is_retryable() && self.failures < WATCH_ATTEMPTS => {
                    self.pause(error.retry_after.unwrap_or_default()).await;
                }
                Some(Err(error)) => {
                    self.ended = true;
                    return Some((Err(error), self));
                }
                None if is_over(&self.client, &self.name, self.last, self.next).await => {
                    self.ended = true;
                }
                // The server went away in good order, and the job is not over.
                None if self.failures < WATCH_ATTEMPTS => self.pause(Duration::ZERO).await,
                None => {
                    self.ended = true;
                    let text = "the event stream keeps ending before the job does";
                    let error = Error::local(tonic::Code::Unavailable, "WATCH", text);
                    return Some((Err(error), self));
                }
            }
        }
        None
    }

    /// The event, unless it is a sign of life or was seen before.
    fn accept(&mut self, event: TrainingEvent) -> Option<TrainingEvent> {
        let beat = matches!(event.event, Some(Event::Heartbeat(_)));
        if beat || event.sequence < self.next {
            return None;
        }
        self.next = event.sequence + 1;
        self.last = event.state();
        Some(event)
    }

    async fn pause(&mut self, asked: Duration) {
        self.replies = None;
        self.failures += 1;
        let wait = Duration::from_millis(100) * self.failures.min(20);
        tokio::time::sleep(wait.max(asked)).await;
    }
}

/// Whether a stream may end: a final state was seen, or a watch from behind the last event
/// finds the job in one.
async fn is_over(client: &Client, name: &str, last: TrainingJobState, next: u64) -> bool {
    is_final(last)
        || match client.get_training_job(name).await {
            Ok(job) => is_final(job.state()) && job.last_sequence < next,
            Err(_) => false,
        }
}
