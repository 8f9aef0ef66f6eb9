//! `TrainingService`: datasets, jobs and their events. Every call asks first whether the caller may use the tenant.

use std::sync::Arc;

use espalier_proto::v1;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::Call;
use super::adapter::profile_limits;
use super::control::{Incoming, next_message, page, request_key};
use crate::artifact_store::BlobDigest;
use crate::config::Config;
use crate::convert::{outcome, training as convert};
use crate::datasets::{DatasetError, DatasetStore};
use crate::jobs::{JobError, JobService};
use crate::names::{DatasetId, DatasetName, JobId, JobName, TenantId, TenantName};
use crate::paging::next_token;
use crate::registry::Registry;
use crate::status::Refusal;

/// The service.
#[derive(Clone)]
pub(crate) struct TrainingService {
    jobs: JobService,
    datasets: DatasetStore,
    registry: Registry,
    config: Arc<Config>,
}

impl TrainingService {
    /// The service on its stores; the registry lets go of the bytes of deleted datasets.
    pub(crate) fn new(
        jobs: JobService,
        datasets: DatasetStore,
        registry: Registry,
        config: Arc<Config>,
    ) -> Self {
        Self {
            jobs,
            datasets,
            registry,
            config,
        }
    }

    fn tenant(call: &Call, field: &str, text: &str) -> Result<TenantId, Refusal> {
        let name = TenantName::parse(text)
            .map_err(|error| Refusal::invalid_field(field, error.to_string()))?;
        call.principal.authorize(&name.0)?;
        Ok(name.0)
    }

    fn job_name(call: &Call, text: &str) -> Result<JobName, Refusal> {
        let name = JobName::parse(text)?;
        call.principal.authorize(&name.tenant)?;
        Ok(name)
    }

    fn dataset_name(call: &Call, text: &str) -> Result<DatasetName, Refusal> {
        let name = DatasetName::parse(text)?;
        call.principal.authorize(&name.tenant)?;
        Ok(name)
    }

    async fn create_job(
        &self,
        call: Call,
        message: v1::CreateTrainingJobRequest,
    ) -> Result<v1::CreateTrainingJobResponse, Refusal> {
        let tenant = Self::tenant(&call, "parent", &message.parent)?;
        let payload = v1::CreateTrainingJobRequest {
            request_id: String::new(),
            ..message.clone()
        };
        let request = request_key(
            "CreateTrainingJob",
            tenant.as_str(),
            &message.request_id,
            &payload.encode_to_vec(),
            &self.config.limits,
        )?;
        let spec = message
            .spec
            .ok_or_else(|| Refusal::invalid_field("spec", "it is required"))?;
        let wanted = convert::job_request(&tenant, spec, &profile_limits(&self.config))?;
        if message.validate_only {
            return self.quote(tenant, wanted).await;
        }
        let (job, warnings) = self.jobs.create(wanted, request).await?;
        let rows = job.stats.train_examples + job.stats.valid_examples;
        Ok(v1::CreateTrainingJobResponse {
            job: Some(convert::job(job)),
            report: Some(convert::report(&warnings, rows)),
            statistics: None,
            estimate: None,
        })
    }

    /// What a job would be; bad rows are a report and no error.
    async fn quote(
        &self,
        tenant: TenantId,
        wanted: crate::jobs::JobRequest,
    ) -> Result<v1::CreateTrainingJobResponse, Refusal> {
        match self.jobs.quote(wanted).await {
            Ok((quote, estimate)) => {
                let rows = quote.stats.train_examples + quote.stats.valid_examples;
                let report = convert::report(&quote.warnings, rows);
                let statistics = convert::statistics(&quote.statistics);
                let nobody = JobName::new(tenant, JobId::parse("unnamed")?);
                let job = v1::TrainingJob {
                    name: String::new(),
                    create_time: None,
                    ..convert::job(quote.into_job(nobody))
                };
                Ok(v1::CreateTrainingJobResponse {
                    job: Some(job),
                    report: Some(report),
                    statistics: Some(statistics),
                    estimate: Some(outcome::estimate(estimate)),
                })
            }
            Err(JobError::Data {
                report, statistics, ..
            }) => Ok(v1::CreateTrainingJobResponse {
                job: None,
                report: Some(convert::report(&report, 0)),
                statistics: statistics.as_deref().map(convert::statistics),
                estimate: None,
            }),
            Err(error) => Err(error.into()),
        }
    }

    async fn list_jobs(
        &self,
        call: Call,
        message: v1::ListTrainingJobsRequest,
    ) -> Result<v1::ListTrainingJobsResponse, Refusal> {
        let tenant = Self::tenant(&call, "parent", &message.parent)?;
        let scope = format!("ListTrainingJobs {tenant}");
        let request = page(
            &scope,
            message.page_size,
            &message.page_token,
            &self.config.catalog,
        )?;
        let found = self.jobs.list(tenant, request).await?;
        Ok(v1::ListTrainingJobsResponse {
            next_page_token: next_token(&scope, found.next.as_deref()),
            jobs: found.items.into_iter().map(convert::job).collect(),
        })
    }

    async fn watch(
        &self,
        call: Call,
        message: v1::WatchTrainingJobRequest,
    ) -> Result<ReceiverStream<Result<v1::TrainingEvent, Status>>, Refusal> {
        let name = Self::job_name(&call, &message.name)?;
        let heartbeat = self.config.training.watch_heartbeat;
        let mut items = self
            .jobs
            .watch(name.clone(), message.from_sequence, heartbeat)
            .await?;
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(async move {
            while let Some(item) = items.recv().await {
                let message = item
                    .map(|item| convert::watch_item(&name, item))
                    .map_err(|error| Refusal::from(error).into());
                if sender.send(message).await.is_err() {
                    return;
                }
            }
        });
        Ok(ReceiverStream::new(receiver))
    }

    async fn upload(
        &self,
        call: Call,
        mut stream: Streaming<v1::UploadDatasetRequest>,
    ) -> Result<v1::UploadDatasetResponse, Refusal> {
        use v1::upload_dataset_request::Payload;
        let idle = self.config.adapters.upload_idle_timeout;
        let metadata = match next_message(&mut stream, idle)
            .await?
            .and_then(|m| m.payload)
        {
            Some(Payload::Metadata(metadata)) => metadata,
            _ => {
                return Err(Refusal::invalid_field(
                    "metadata",
                    "the first message must be the metadata",
                ));
            }
        };
        let tenant = Self::tenant(&call, "metadata.parent", &metadata.parent)?;
        let id = DatasetId::parse(&metadata.dataset_id)
            .map_err(|error| Refusal::invalid_field("metadata.dataset_id", error.to_string()))?;
        let name = DatasetName::new(tenant, id);
        let format = convert::format("metadata.format", metadata.format)?;
        let columns = convert::columns("metadata.columns", metadata.columns.clone())?;
        let payload = v1::UploadDatasetMetadata {
            request_id: String::new(),
            ..metadata.clone()
        };
        let request = request_key(
            "UploadDataset",
            name.tenant.as_str(),
            &metadata.request_id,
            &payload.encode_to_vec(),
            &self.config.limits,
        )?;
        let limit = self.config.training.max_dataset_bytes.0;
        let mut file = Incoming::expect(
            "the dataset",
            "metadata",
            metadata.size_bytes,
            &metadata.sha256,
            limit,
        )?;
        while let Some(message) = next_message(&mut stream, idle).await? {
            let Some(Payload::Chunk(piece)) = message.payload else {
                return Err(Refusal::invalid_field(
                    "chunk",
                    "only chunks follow the metadata",
                ));
            };
            file.take(
                piece.offset,
                &piece.data,
                self.config.adapters.max_chunk_bytes.0,
            )?;
        }
        let bytes = file.finish()?;
        let size = bytes.len() as u64;
        let (bytes, shape) = match self.datasets.check(bytes, format, columns).await {
            Ok(checked) => checked,
            Err(DatasetError::Data(report)) if metadata.validate_only => {
                return Ok(v1::UploadDatasetResponse {
                    dataset: None,
                    report: Some(convert::report(&report, 0)),
                });
            }
            Err(error) => return Err(error.into()),
        };
        let report = convert::report(&shape.warnings, shape.rows);
        let dataset = if metadata.validate_only {
            convert::shape(&shape, size, BlobDigest::of(&bytes).to_string())
        } else {
            convert::dataset(self.datasets.create(name, bytes, shape, request).await?)
        };
        Ok(v1::UploadDatasetResponse {
            dataset: Some(dataset),
            report: Some(report),
        })
    }

    async fn list_datasets(
        &self,
        call: Call,
        message: v1::ListDatasetsRequest,
    ) -> Result<v1::ListDatasetsResponse, Refusal> {
        let tenant = Self::tenant(&call, "parent", &message.parent)?;
        let scope = format!("ListDatasets {tenant}");
        let request = page(
            &scope,
            message.page_size,
            &message.page_token,
            &self.config.catalog,
        )?;
        let found = self.datasets.list(tenant, request).await?;
        Ok(v1::ListDatasetsResponse {
            next_page_token: next_token(&scope, found.next.as_deref()),
            datasets: found.items.into_iter().map(convert::dataset).collect(),
        })
    }
}

#[tonic::async_trait]
impl v1::training_service_server::TrainingService for TrainingService {
    async fn create_training_job(
        &self,
        request: Request<v1::CreateTrainingJobRequest>,
    ) -> Result<Response<v1::CreateTrainingJobResponse>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.create_job(call, message).await?))
    }

    async fn get_training_job(
        &self,
        request: Request<v1::GetTrainingJobRequest>,
    ) -> Result<Response<v1::TrainingJob>, Status> {
        let (call, message) = Call::of(request)?;
        let name = Self::job_name(&call, &message.name)?;
        let found = self.jobs.get(name).await.map_err(Refusal::from)?;
        Ok(Response::new(convert::job(found)))
    }

    async fn list_training_jobs(
        &self,
        request: Request<v1::ListTrainingJobsRequest>,
    ) -> Result<Response<v1::ListTrainingJobsResponse>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.list_jobs(call, message).await?))
    }

    type WatchTrainingJobStream = ReceiverStream<Result<v1::TrainingEvent, Status>>;

    async fn watch_training_job(
        &self,
        request: Request<v1::WatchTrainingJobRequest>,
    ) -> Result<Response<Self::WatchTrainingJobStream>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.watch(call, message).await?))
    }

    async fn cancel_training_job(
        &self,
        request: Request<v1::CancelTrainingJobRequest>,
    ) -> Result<Response<v1::TrainingJob>, Status> {
        let (call, message) = Call::of(request)?;
        let name = Self::job_name(&call, &message.name)?;
        let job = self.jobs.cancel(name).await.map_err(Refusal::from)?;
        Ok(Response::new(convert::job(job)))
    }

    async fn pause_training_job(
        &self,
        request: Request<v1::PauseTrainingJobRequest>,
    ) -> Result<Response<v1::TrainingJob>, Status> {
        let (call, message) = Call::of(request)?;
        let name = Self::job_name(&call, &message.name)?;
        let job = self.jobs.pause(name).await.map_err(Refusal::from)?;
        Ok(Response::new(convert::job(job)))
    }

    async fn resume_training_job(
        &self,
        request: Request<v1::ResumeTrainingJobRequest>,
    ) -> Result<Response<v1::TrainingJob>, Status> {
        let (call, message) = Call::of(request)?;
        let name = Self::job_name(&call, &message.name)?;
        let job = self.jobs.resume(name).await.map_err(Refusal::from)?;
        Ok(Response::new(convert::job(job)))
    }

    async fn upload_dataset(
        &self,
        request: Request<Streaming<v1::UploadDatasetRequest>>,
    ) -> Result<Response<v1::UploadDatasetResponse>, Status> {
        let (call, stream) = Call::of(request)?;
        Ok(Response::new(self.upload(call, stream).await?))
    }

    async fn get_dataset(
        &self,
        request: Request<v1::GetDatasetRequest>,
    ) -> Result<Response<v1::Dataset>, Status> {
        let (call, message) = Call::of(request)?;
        let name = Self::dataset_name(&call, &message.name)?;
        let found = self.datasets.get(name).await.map_err(Refusal::from)?;
        Ok(Response::new(convert::dataset(found)))
    }

    async fn list_datasets(
        &self,
        request: Request<v1::ListDatasetsRequest>,
    ) -> Result<Response<v1::ListDatasetsResponse>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(
            TrainingService::list_datasets(self, call, message).await?,
        ))
    }

    async fn delete_dataset(
        &self,
        request: Request<v1::DeleteDatasetRequest>,
    ) -> Result<Response<()>, Status> {
        let (call, message) = Call::of(request)?;
        let name = Self::dataset_name(&call, &message.name)?;
        let digest = self.datasets.delete(name).await.map_err(Refusal::from)?;
        self.registry
            .release(vec![digest])
            .await
            .map_err(Refusal::from)?;
        Ok(Response::new(()))
    }
}
