//! Runs bulk jobs: reads lines ahead, keeps a window of them open in the engine, and writes the answers in the order of the
//! lines. Answers reach the disk in batches and are counted after that, so a crash costs the batch and never an answer
//! twice. What passes (an overload, a drain) is waited for and is no answer. This file must not know rows or JSON.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_engine::request::Priority;
use espalier_proto::v1;
use futures::FutureExt;
use tokio::task::JoinSet;
use tonic::Code;

use crate::bulk::{BulkError, BulkStore, Input, Job, JobKey, Output, Progress, State};
use crate::convert::bulk::{self as convert, BulkRequest};
use crate::middleware::trace::caught;
use crate::principal::Principal;
use crate::services::Call;
use crate::services::inference::InferenceService;
use crate::status::{self, Refusal};
use crate::telemetry::metric;

/// Answers are written when they have so many bytes,
const WRITE_BYTES: usize = 256 * 1024;
/// or when the first of them has waited so long.
const WRITE_AFTER: Duration = Duration::from_millis(250);
/// How far lines may be read beyond the first that is not answered, in windows: one long answer does not hold up the rest.
const AHEAD: u64 = 4;
/// How often jobs whose time is over are looked for.
const EXPIRY: Duration = Duration::from_secs(600);
/// Waits between two tries of a line that met an overload.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// Runs jobs until the store stops.
#[derive(Clone)]
pub(crate) struct Runner {
    pub(crate) store: BulkStore,
    pub(crate) inference: InferenceService,
    /// Lines of one job that are open at once.
    pub(crate) window: usize,
    pub(crate) max_key_bytes: usize,
}

/// A line's answer.
struct Answered {
    line: Vec<u8>,
    failed: bool,
    usage: v1::Usage,
}

/// One job at work.
struct Run {
    key: JobKey,
    job: Job,
    input: Input,
    output: Option<Output>,
    /// What is durable.
    progress: Progress,
    /// Index of the next line to read.
    next: u64,
    at_end: bool,
    open: JoinSet<(u64, Answered)>,
    /// Answers that wait for those of the lines before them.
    early: BTreeMap<u64, Answered>,
    /// Answers to write, and what holds once they are written.
    buffer: Vec<u8>,
    after: Progress,
    write_at: Option<Instant>,
}

// === impl Runner ===

impl Runner {
    /// Starts as many workers as jobs may run at once. Needs the runtime.
    pub(crate) fn start(&self) {
        for _ in 0..self.store.limits().max_active {
            let runner = self.clone();
            tokio::spawn(async move {
                while let Some((key, job)) = runner.store.next().await {
                    let name = job.name.clone();
                    if let Err(error) = runner.run(key, job).await {
                        tracing::error!(job = %name, %error, "a bulk job failed");
                        let text = "the server failed to go on; its log has the cause".to_owned();
                        if let Err(error) = runner.store.end(key, State::Failed, Some(text)).await {
                            tracing::error!(job = %name, %error, "a bulk job could not be ended");
                        }
                    }
                }
            });
        }
        let store = self.store.clone();
        tokio::spawn(async move {
            loop {
                if let Err(error) = store.expire().await {
                    tracing::warn!(%error, "bulk jobs whose time is over could not be removed");
                }
                tokio::select! {
                    () = store.stopped() => return,
                    () = tokio::time::sleep(EXPIRY) => {}
                }
            }
        });
    }

    async fn run(&self, key: JobKey, job: Job) -> Result<(), BulkError> {
        tracing::info!(job = %job.name, done = job.progress.done, items = job.progress.items, "bulk job");
        let mut run = Run {
            key,
            input: self.store.input(&job).await?,
            output: Some(self.store.output(&job).await?),
            progress: job.progress,
            next: job.progress.done,
            at_end: false,
            open: JoinSet::new(),
            early: BTreeMap::new(),
            buffer: Vec::new(),
            after: job.progress,
            write_at: None,
            job,
        };
        let mut changed = self.store.signal(run.job.name.clone()).await?;
        loop {
            self.fill(&mut run)?;
            let idle = run.open.is_empty();
            if (idle || run.is_due()) && !self.write(&mut run).await? {
                return Ok(());
            }
            if idle {
                return self.store.end(key, State::Succeeded, None).await;
            }
            tokio::select! {
                Some(done) = run.open.join_next() => match done {
                    Ok((index, answered)) => run.take(index, answered),
                    // Panics are caught inside the task, so only a runtime that ends can be meant.
                    Err(_) => return Ok(()),
                },
                () = wait(run.write_at) => {}
                _ = changed.changed() => {
                    if self.store.get(run.job.name.clone()).await?.state.is_final() {
                        return Ok(());
                    }
                }
                () = self.store.stopped() => {
                    self.write(&mut run).await?;
                    return Ok(());
                }
            }
        }
    }

    /// Reads lines while the window has places.
    fn fill(&self, run: &mut Run) -> Result<(), BulkError> {
        let ahead = AHEAD * self.window as u64;
        while !run.at_end && run.open.len() < self.window && run.next < run.after.done + ahead {
            let Some(bytes) = run.input.next_line()? else {
                run.at_end = true;
                break;
            };
            let index = run.next;
            run.next += 1;
            let runner = self.clone();
            let job = run.job.clone();
            run.open
                .spawn(async move { (index, runner.answer(&job, index, &bytes).await) });
        }
        Ok(())
    }

    /// Brings the answers that are in order to the disk, and counts them. False when the job was cancelled.
    async fn write(&self, run: &mut Run) -> Result<bool, BulkError> {
        run.write_at = None;
        if run.buffer.is_empty() {
            return Ok(true);
        }
        let lines = std::mem::take(&mut run.buffer);
        let Some(mut output) = run.output.take() else {
            return Ok(false);
        };
        let written = tokio::task::spawn_blocking(move || {
            output.append(&lines)?;
            Ok::<_, BulkError>(output)
        });
        let output = written.await.unwrap_or(Err(BulkError::Stopping))?;
        run.after.output_bytes = output.length();
        run.output = Some(output);
        run.progress = run.after;
        self.store.commit(run.key, run.progress).await
    }

    /// Answers one line, however long it takes.
    async fn answer(&self, job: &Job, index: u64, bytes: &[u8]) -> Answered {
        let (key, result) = match convert::line(bytes, job.operation, self.max_key_bytes) {
            Ok(line) => {
                let mut request = line.request;
                request.set_target(target(job));
                (line.key, self.ask(job, index, request).await)
            }
            // Every line was read when the job was created; the file has changed since.
            Err((field, why)) => (String::new(), Err(Refusal::invalid_field(field, why))),
        };
        let outcome = match &result {
            Ok(_) => "ok",
            Err(refusal) => refusal.reason(),
        };
        metrics::counter!(metric::BULK_ITEMS, "operation" => job.operation.as_str(), "outcome" => outcome)
            .increment(1);
        match result {
            Ok(response) => Answered {
                line: convert::answer(&key, Ok(&response)),
                failed: false,
                usage: response.usage(),
            },
            Err(refusal) => {
                let status = status::complete(refusal.into(), &request_id(job, index));
                Answered {
                    line: convert::answer(&key, Err(&status::in_message(&status))),
                    failed: true,
                    usage: v1::Usage::default(),
                }
            }
        }
    }

    async fn ask(
        &self,
        job: &Job,
        index: u64,
        request: BulkRequest,
    ) -> Result<convert::BulkResponse, Refusal> {
        let mut wait = FIRST_WAIT;
        loop {
            let call = Call {
                id: request_id(job, index),
                // Whoever created the job was asked for its rights then; the target says for whom it works.
                principal: Principal::Admin { key: None },
                deadline: None,
                received: Instant::now(),
                priority: Priority::Bulk,
                counted: true,
            };
            let work = AssertUnwindSafe(self.inference.answer(&call, request.clone()));
            let result = work
                .catch_unwind()
                .await
                .unwrap_or_else(|panic| Err(caught(&*panic, "bulk line")));
            match result {
                Err(refusal) if passes(&refusal) => {
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(LONGEST_WAIT);
                }
                result => return result,
            }
        }
    }
}

/// Whether waiting helps: then it is no answer.
fn passes(refusal: &Refusal) -> bool {
    refusal.code() == Code::Unavailable || refusal.reason() == "RATE_LIMIT_EXCEEDED"
}

fn request_id(job: &Job, index: u64) -> Arc<str> {
    format!("{}.{}", job.uid, index + 1).into()
}

/// The job's target as a request names it.
pub(super) fn target(job: &Job) -> v1::InferenceTarget {
    let adapter = job.version.iter().map(|version| v1::AdapterWeight {
        adapter: version.clone(),
        weight: None,
    });
    v1::InferenceTarget {
        adapters: adapter.collect(),
        tenant: format!("tenants/{}", job.name.tenant),
    }
}

async fn wait(until: Option<Instant>) {
    match until {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

// === impl Run ===

impl Run {
    /// Takes an answer, and moves those that are in order to the buffer.
    fn take(&mut self, index: u64, answered: Answered) {
        self.early.insert(index, answered);
        while let Some(answered) = self.early.remove(&self.after.done) {
            self.after.done += 1;
            self.after.failed += u64::from(answered.failed);
            self.after.input_tokens += u64::from(answered.usage.input_tokens);
            self.after.output_tokens += u64::from(answered.usage.output_tokens);
            self.buffer.extend_from_slice(&answered.line);
            self.write_at
                .get_or_insert_with(|| Instant::now() + WRITE_AFTER);
        }
    }

    fn is_due(&self) -> bool {
        self.buffer.len() >= WRITE_BYTES || self.write_at.is_some_and(|at| at <= Instant::now())
    }
}
