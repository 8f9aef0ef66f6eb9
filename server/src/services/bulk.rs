//! `BulkService`: uploads an input, checks every line of it, creates the job; then shows, ends and hands out. Every call asks
//! first whether the caller may use the tenant.

mod runner;

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_engine::request::Priority;
use espalier_proto::v1;
use futures::Stream;
use prost::Message;
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use self::runner::Runner;
use super::Call;
use super::control::{Incoming, next_message, page, request_key};
use super::inference::InferenceService;
use crate::bulk::{BulkError, BulkStore, Job, Operation, Progress, State};
use crate::config::Config;
use crate::convert::bulk as convert;
use crate::database::now_ms;
use crate::names::{BulkJobId, BulkJobName, TenantId, TenantName};
use crate::paging::next_token;
use crate::status::Refusal;

/// Bad lines that one error carries at most: a status must fit in a header. `validate_only` gives more.
const MAX_VIOLATIONS: usize = 25;
/// Bytes of one piece of a download.
const PIECE: usize = 256 * 1024;

/// The service.
#[derive(Clone)]
pub(crate) struct BulkService {
    store: BulkStore,
    inference: InferenceService,
    config: Arc<Config>,
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What was found in an input.
struct Checked {
    items: u64,
    findings: Vec<v1::BulkLineFinding>,
    omitted: u64,
}

impl BulkService {
    /// The service on its store; its jobs begin to run.
    pub(crate) fn start(
        store: BulkStore,
        inference: InferenceService,
        config: Arc<Config>,
    ) -> Self {
        Runner {
            store: store.clone(),
            inference: inference.clone(),
            window: config.bulk.max_batch_window,
            max_key_bytes: config.limits.max_request_id_bytes,
        }
        .start();
        Self {
            store,
            inference,
            config,
        }
    }

    fn tenant(call: &Call, field: &str, text: &str) -> Result<TenantId, Refusal> {
        let name = TenantName::parse(text)
            .map_err(|error| Refusal::invalid_field(field, error.to_string()))?;
        call.principal.authorize(&name.0)?;
        Ok(name.0)
    }

    fn name(call: &Call, text: &str) -> Result<BulkJobName, Refusal> {
        let name = BulkJobName::parse(text)?;
        call.principal.authorize(&name.tenant)?;
        Ok(name)
    }

    async fn create(
        &self,
        call: Call,
        mut stream: Streaming<v1::CreateBulkJobRequest>,
    ) -> Result<v1::CreateBulkJobResponse, Refusal> {
        use v1::create_bulk_job_request::Payload;
        let idle = self.config.adapters.upload_idle_timeout;
        let first = next_message(&mut stream, idle).await?;
        let Some(Payload::Metadata(metadata)) = first.and_then(|message| message.payload) else {
            let why = "the first message must be the metadata";
            return Err(Refusal::invalid_field("metadata", why));
        };
        let tenant = Self::tenant(&call, "metadata.parent", &metadata.parent)?;
        let operation = convert::operation("metadata.operation", metadata.operation)?;
        let payload = v1::BulkJobMetadata {
            request_id: String::new(),
            ..metadata.clone()
        };
        let request = request_key(
            "CreateBulkJob",
            tenant.as_str(),
            &metadata.request_id,
            &payload.encode_to_vec(),
            &self.config.limits,
        )?;
        let mut job = self.plan(&call, tenant, operation, &metadata).await?;
        let limit = self.config.bulk.max_bulk_input_bytes.0;
        let (size, sha256) = (metadata.size_bytes, metadata.sha256.as_str());
        let mut file = Incoming::expect("the input", "metadata", size, sha256, limit)?;
        while let Some(message) = next_message(&mut stream, idle).await? {
            let Some(Payload::Chunk(piece)) = message.payload else {
                let why = "only chunks follow the metadata";
                return Err(Refusal::invalid_field("chunk", why));
            };
            let most = self.config.adapters.max_chunk_bytes.0;
            file.take(piece.offset, &piece.data, most)?;
        }
        let input = file.finish()?;
        let checked = self.check(&call, &job, &input).await?;
        job.progress.items = checked.items;
        if metadata.validate_only {
            return Ok(v1::CreateBulkJobResponse {
                job: None,
                items: checked.items,
                findings: checked.findings,
                omitted_findings: checked.omitted,
            });
        }
        if !checked.findings.is_empty() {
            return Err(checked.refusal());
        }
        let job = self.store.create(job, input, request).await?;
        Ok(v1::CreateBulkJobResponse {
            items: job.progress.items,
            job: Some(convert::job(job)),
            findings: Vec::new(),
            omitted_findings: 0,
        })
    }

    /// The job that the metadata ask for, its version fixed.
    async fn plan(
        &self,
        call: &Call,
        tenant: TenantId,
        operation: Operation,
        metadata: &v1::BulkJobMetadata,
    ) -> Result<Job, Refusal> {
        let uid = Uuid::new_v4().to_string();
        let id = match metadata.bulk_job_id.as_str() {
            "" => format!("bulk-{uid}"),
            given => given.to_owned(),
        };
        let id = BulkJobId::parse(&id)
            .map_err(|error| Refusal::invalid_field("metadata.bulk_job_id", error.to_string()))?;
        let (bytes, most) = (
            metadata.description.len(),
            self.config.catalog.max_description_bytes,
        );
        if bytes > most {
            return Err(Refusal::over_limit("metadata.description", bytes, most));
        }
        let mut target = metadata.target.clone().unwrap_or_default();
        let own = format!("tenants/{tenant}");
        if !target.tenant.is_empty() && target.tenant != own {
            let why = format!("{} is not the job's parent {own}", target.tenant);
            return Err(Refusal::invalid_field("metadata.target.tenant", why));
        }
        for entry in &target.adapters {
            if !entry.adapter.starts_with(&format!("{own}/")) {
                let why = format!("{} does not belong to {own}", entry.adapter);
                return Err(Refusal::invalid_field("metadata.target.adapters", why));
            }
        }
        target.tenant = own;
        let call = uncounted(call);
        let version = self.inference.version_of(&call, target).await?;
        Ok(Job {
            name: BulkJobName::new(tenant, id),
            uid,
            operation,
            version,
            state: State::Queued,
            error: None,
            description: metadata.description.clone(),
            input_bytes: metadata.size_bytes,
            input_sha256: metadata.sha256.clone(),
            progress: Progress::default(),
            create_time: now_ms(),
            start_time: None,
            end_time: None,
            expire_time: None,
        })
    }

    /// Reads every line as the job will, up to the engine.
    async fn check(&self, call: &Call, job: &Job, input: &[u8]) -> Result<Checked, Refusal> {
        let bulk = &self.config.bulk;
        let max_key = self.config.limits.max_request_id_bytes;
        let max_line = self.config.limits.max_message_bytes.as_usize();
        let mut checked = Checked {
            items: 0,
            findings: Vec::new(),
            omitted: 0,
        };
        let mut keys = HashSet::new();
        let text = input.strip_suffix(b"\n").unwrap_or(input);
        for (index, bytes) in text.split(|byte| *byte == b'\n').enumerate() {
            let number = index as u64 + 1;
            checked.items = number;
            if index >= bulk.max_bulk_rows {
                let limit = bulk.max_bulk_rows;
                return Err(Refusal::over_limit(
                    "the input",
                    "its number of lines",
                    limit,
                ));
            }
            let mut found = |field: &str, reason: String| {
                if checked.findings.len() >= self.config.training.max_report_findings {
                    checked.omitted += 1;
                    return;
                }
                checked.findings.push(v1::BulkLineFinding {
                    line: number,
                    field: field.to_owned(),
                    reason,
                });
            };
            if bytes.len() > max_line {
                found(
                    "",
                    format!("{} bytes, the limit is {max_line}", bytes.len()),
                );
                continue;
            }
            let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
            let mut line = match convert::line(bytes, job.operation, max_key) {
                Ok(line) => line,
                Err((field, why)) => {
                    found(field, why);
                    continue;
                }
            };
            line.request.set_target(runner::target(job));
            if let Err(refusal) = self.inference.check(&uncounted(call), line.request).await {
                found("request", refusal.message().to_owned());
            }
            if !keys.insert(line.key.clone()) {
                found(
                    "key",
                    format!("{:?} is the key of an earlier line", line.key),
                );
            }
            if index % 64 == 63 {
                // Short lines never wait for anything, and other calls have their turn too.
                tokio::task::yield_now().await;
            }
        }
        Ok(checked)
    }

    async fn list(
        &self,
        call: Call,
        message: v1::ListBulkJobsRequest,
    ) -> Result<v1::ListBulkJobsResponse, Refusal> {
        let tenant = Self::tenant(&call, "parent", &message.parent)?;
        let scope = format!("ListBulkJobs {tenant}");
        let (size, token) = (message.page_size, message.page_token.as_str());
        let request = page(&scope, size, token, &self.config.catalog)?;
        let found = self.store.list(tenant, request).await?;
        Ok(v1::ListBulkJobsResponse {
            next_page_token: next_token(&scope, found.next.as_deref()),
            jobs: found.items.into_iter().map(convert::job).collect(),
        })
    }

    async fn watch(
        &self,
        call: Call,
        message: v1::WatchBulkJobRequest,
    ) -> Result<Replies<v1::BulkJob>, Refusal> {
        let name = Self::name(&call, &message.name)?;
        let watch = Watch {
            changed: self.store.signal(name.clone()).await?,
            store: self.store.clone(),
            heartbeat: self.config.training.watch_heartbeat,
            seen: false,
            name,
        };
        let next = |state: Option<Watch>| async move {
            let mut watch = state?;
            match watch.next().await {
                Ok(job) => {
                    let more = (!job.state.is_final()).then_some(watch);
                    Some((Ok(convert::job(job)), more))
                }
                Err(error) => Some((Err(Refusal::from(error).into()), None)),
            }
        };
        Ok(Box::pin(futures::stream::unfold(Some(watch), next)))
    }

    async fn download(
        &self,
        call: Call,
        message: v1::DownloadBulkResultsRequest,
    ) -> Result<Replies<v1::DownloadBulkResultsResponse>, Refusal> {
        let name = Self::name(&call, &message.name)?;
        let job = self.store.get(name).await?;
        let total = job.progress.output_bytes;
        if message.offset > total {
            let why = format!("{} is behind the output's {total} bytes", message.offset);
            return Err(Refusal::invalid_field("offset", why));
        }
        let complete = job.state.is_final();
        let store = self.store.clone();
        let next = move |at: Option<u64>| {
            let (store, job) = (store.clone(), job.clone());
            async move {
                let offset = at?;
                let most = usize::try_from(total - offset).unwrap_or(PIECE).min(PIECE);
                let data = match store.read_output(&job, offset, most).await {
                    Ok(data) => data,
                    Err(error) => return Some((Err(Refusal::from(error).into()), None)),
                };
                let end = offset + data.len() as u64;
                // An output without bytes is told by one empty piece.
                let more = (end < total && !data.is_empty()).then_some(end);
                let piece = v1::DownloadBulkResultsResponse {
                    offset,
                    data,
                    total_bytes: total,
                    complete,
                };
                Some((Ok(piece), more))
            }
        };
        Ok(Box::pin(futures::stream::unfold(
            Some(message.offset),
            next,
        )))
    }
}

/// A watcher: the job now, and again when it has changed or nothing was said for a while.
struct Watch {
    store: BulkStore,
    name: BulkJobName,
    changed: tokio::sync::watch::Receiver<u64>,
    heartbeat: Duration,
    seen: bool,
}

impl Watch {
    async fn next(&mut self) -> Result<Job, BulkError> {
        if self.seen {
            tokio::select! {
                // A closed signal means that the job has ended; the look below tells.
                _ = self.changed.changed() => {}
                () = tokio::time::sleep(self.heartbeat) => {}
                () = self.store.stopped() => return Err(BulkError::Stopping),
            }
        }
        self.seen = true;
        self.changed.mark_unchanged();
        self.store.get(self.name.clone()).await
    }
}

/// A call that asks nothing of the engine, so that it needs no place.
fn uncounted(call: &Call) -> Call {
    Call {
        received: Instant::now(),
        priority: Priority::Bulk,
        counted: false,
        ..call.clone()
    }
}

impl Checked {
    /// Every bad line, as far as a status can hold them.
    fn refusal(self) -> Refusal {
        let all = self.findings.len() as u64 + self.omitted;
        let shown = self.findings.into_iter().take(MAX_VIOLATIONS);
        let mut fields: Vec<(String, String)> = shown
            .map(|finding| {
                let mut field = format!("input[line {}]", finding.line);
                if !finding.field.is_empty() {
                    field.push('.');
                    field.push_str(&finding.field);
                }
                (field, finding.reason.chars().take(200).collect())
            })
            .collect();
        let more = all - fields.len() as u64;
        if more > 0 {
            let why = format!("and {more} more; validate_only lists them");
            fields.push(("input".to_owned(), why));
        }
        Refusal::invalid_fields(fields).with("problem_count", all)
    }
}

#[tonic::async_trait]
impl v1::bulk_service_server::BulkService for BulkService {
    async fn create_bulk_job(
        &self,
        request: Request<Streaming<v1::CreateBulkJobRequest>>,
    ) -> Result<Response<v1::CreateBulkJobResponse>, Status> {
        let (call, stream) = Call::of(request)?;
        Ok(Response::new(self.create(call, stream).await?))
    }

    async fn get_bulk_job(
        &self,
        request: Request<v1::GetBulkJobRequest>,
    ) -> Result<Response<v1::BulkJob>, Status> {
        let (call, message) = Call::of(request)?;
        let name = Self::name(&call, &message.name)?;
        let job = self.store.get(name).await.map_err(Refusal::from)?;
        Ok(Response::new(convert::job(job)))
    }

    async fn list_bulk_jobs(
        &self,
        request: Request<v1::ListBulkJobsRequest>,
    ) -> Result<Response<v1::ListBulkJobsResponse>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.list(call, message).await?))
    }

    async fn cancel_bulk_job(
        &self,
        request: Request<v1::CancelBulkJobRequest>,
    ) -> Result<Response<v1::BulkJob>, Status> {
        let (call, message) = Call::of(request)?;
        let name = Self::name(&call, &message.name)?;
        let job = self.store.cancel(name).await.map_err(Refusal::from)?;
        Ok(Response::new(convert::job(job)))
    }

    async fn delete_bulk_job(
        &self,
        request: Request<v1::DeleteBulkJobRequest>,
    ) -> Result<Response<()>, Status> {
        let (call, message) = Call::of(request)?;
        let name = Self::name(&call, &message.name)?;
        self.store.delete(name).await.map_err(Refusal::from)?;
        Ok(Response::new(()))
    }

    type WatchBulkJobStream = Replies<v1::BulkJob>;

    async fn watch_bulk_job(
        &self,
        request: Request<v1::WatchBulkJobRequest>,
    ) -> Result<Response<Self::WatchBulkJobStream>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.watch(call, message).await?))
    }

    type DownloadBulkResultsStream = Replies<v1::DownloadBulkResultsResponse>;

    async fn download_bulk_results(
        &self,
        request: Request<v1::DownloadBulkResultsRequest>,
    ) -> Result<Response<Self::DownloadBulkResultsStream>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.download(call, message).await?))
    }
}
