//! Durable training jobs: checked before they are accepted, run in turn, told as numbered events, and finished after any
//! crash as if there had been none.
//!
//! What is acknowledged is in the database first: a job before its reply, an event before its watcher, a checkpoint's bytes
//! before its row. A job's success and its version are one transaction. After a restart every job that has not ended goes
//! on from its last checkpoint, and since training is a pure function of the job, its result is the same. This file must not
//! know the wire, nor how training is done.

mod classification;
mod create;
mod defaults;
mod estimate;
mod events;
mod ladder;
mod plan;
mod rows;
mod runner;
mod spec;
#[cfg(test)]
mod tests;
mod watch;
mod ways;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use dashmap::DashMap;
use espalier_adapters::peft;
use espalier_adapters::train::dataset::DataReport;
use espalier_adapters::train::statistics::Statistics;
use espalier_engine::error::EngineError;
use espalier_engine::handle::EngineHandle;
use espalier_engine::train::{JobEvent, TrainingSubmission};
use tokio::sync::{Notify, mpsc, watch as signal};

pub use classification::{ClassOptions, ClassificationResult};
pub use create::Quote;
pub use defaults::Choice;
pub use estimate::Estimate;
pub use events::{
    DataStats, Event, Finding, Happening, Job, JobFailure, JobState, Measured, Outcome, Progress,
};
pub use ladder::FirstRung;
pub use plan::Base;
pub use spec::{
    DataInput, DataSource, HyperRequest, JobLimits, JobMethod, JobRequest, JobSpec, LoraRequest,
    LoraSpec, Validation, ValidationInput,
};
pub use watch::WatchItem;
pub use ways::{Ia3Spec, UnfreezeSpec, WayRequest, WaySpec};

use crate::artifact_store::{ArtifactStore, StoreError};
use crate::database::{Database, DatabaseError};
use crate::datasets::{DatasetError, DatasetStore};
use crate::names::{JobName, TenantId, TenantName};
use crate::paging::{Page, PageRequest};
use crate::registry::{Registry, RegistryError};

/// Why a job was not accepted, found or changed.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// No such tenant.
    #[error("{name} does not exist")]
    TenantNotFound {
        /// The tenant.
        name: TenantName,
    },
    /// No such job.
    #[error("{name} does not exist")]
    NotFound {
        /// The job.
        name: JobName,
    },
    /// Rows that cannot be used: all of them.
    #[error("{field}: {report}")]
    Data {
        /// `data` or `validation_data`.
        field: String,
        /// Every bad line.
        report: Box<DataReport>,
        /// What the rows are, where they could be read and only some of them cannot be learned.
        statistics: Option<Box<Statistics>>,
    },
    /// A field outside of its range or against another.
    #[error("{field}: {reason}")]
    InvalidField {
        /// The field.
        field: String,
        /// Value and limit.
        reason: String,
    },
    /// The version to go on from does not fit the base or the method.
    #[error("{version} cannot be trained further: expected {expected}, found {found}")]
    Incompatible {
        /// The version.
        version: String,
        /// What would fit.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The job has ended.
    #[error("{name} is {state}")]
    InvalidState {
        /// The job.
        name: JobName,
        /// Its state.
        state: JobState,
    },
    /// The tenant has too many jobs that have not ended.
    #[error("{what} would be {value}, the limit is {limit}")]
    Limit {
        /// What is counted.
        what: &'static str,
        /// The value it would have.
        value: usize,
        /// The limit.
        limit: usize,
    },
    /// The request id was used with another payload.
    #[error("request_id {request_id:?} was used before with another payload")]
    RequestIdReused {
        /// The id.
        request_id: String,
    },
    /// A dataset could not be had.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// An adapter or version could not be had or changed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The server stops; a watch goes on from the next number after its restart.
    #[error("the server stops; watch on from the next number after its restart")]
    Stopping,
    /// The engine refused.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl From<rusqlite::Error> for JobError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error.into())
    }
}

impl JobError {
    fn data(field: &str, report: DataReport, statistics: Option<Statistics>) -> Self {
        Self::Data {
            field: format!("spec.{field}"),
            report: Box::new(report),
            statistics: statistics.map(Box::new),
        }
    }
}

/// A job's row id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct JobKey(pub(crate) i64);

/// A job that the engine took.
pub struct Started {
    /// What happens, in order; closed without a last event when the engine died.
    pub events: mpsc::Receiver<JobEvent>,
    /// Ends the job soon.
    pub end: Box<dyn Fn(Wish) + Send + Sync>,
}

/// How a job at work is to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// As it is.
    GoOn,
    /// It ends at a checkpoint; its last event is `Suspended`.
    Pause,
    /// It ends; its last event is `Cancelled`.
    Cancel,
}

/// Whoever trains: the engine, or in tests something that behaves like it.
pub trait Trainers: Send + Sync + 'static {
    /// Hands a job over; never waits.
    ///
    /// # Errors
    /// The engine is full, drains or has stopped.
    fn start(&self, submission: TrainingSubmission) -> Result<Started, EngineError>;
}

impl Trainers for EngineHandle {
    fn start(&self, submission: TrainingSubmission) -> Result<Started, EngineError> {
        let job = self.train(submission)?;
        let control = job.control;
        Ok(Started {
            events: job.events,
            end: Box::new(move |wish| match wish {
                Wish::GoOn => {}
                Wish::Pause => control.suspend(),
                Wish::Cancel => control.cancel(),
            }),
        })
    }
}

/// What the job service stands on.
pub struct Parts {
    /// Rows.
    pub database: Database,
    /// Bytes.
    pub store: ArtifactStore,
    /// Where results go.
    pub registry: Registry,
    /// Where rows come from.
    pub datasets: DatasetStore,
    /// The base that is trained on.
    pub base: Base,
    /// Bounds.
    pub limits: JobLimits,
    /// Bounds on an adapter's files.
    pub artifact_limits: peft::Limits,
}

/// The job service. Cheap to clone.
#[derive(Clone)]
pub struct JobService {
    inner: Arc<Inner>,
}

struct Inner {
    parts: Parts,
    trainers: Arc<dyn Trainers>,
    /// Rung when a job is queued, a place is free or the service stops.
    bell: Notify,
    /// By job: the number of its last event, for watchers.
    signals: DashMap<JobKey, signal::Sender<u64>>,
    /// Jobs at work, and how to tell them to end.
    at_work: Mutex<HashMap<JobKey, signal::Sender<Wish>>>,
    stopping: signal::Sender<bool>,
}

impl JobService {
    /// Takes up every job that had not ended, and runs jobs until [`JobService::stop`]. Needs the runtime.
    pub async fn start(parts: Parts, trainers: Arc<dyn Trainers>) -> Result<Self, JobError> {
        let service = Self {
            inner: Arc::new(Inner {
                parts,
                trainers,
                bell: Notify::new(),
                signals: DashMap::new(),
                at_work: Mutex::default(),
                stopping: signal::Sender::new(false),
            }),
        };
        service.recover().await?;
        let dispatcher = service.clone();
        tokio::spawn(async move { dispatcher.dispatch().await });
        Ok(service)
    }

    /// Starts no further job; those at work end when the engine drains, and go on after the next start.
    pub fn stop(&self) {
        self.inner.stopping.send_replace(true);
        self.inner.bell.notify_one();
    }

    /// One job.
    pub async fn get(&self, name: JobName) -> Result<Job, JobError> {
        self.inner
            .parts
            .database
            .read(move |tx| Ok(rows::by_name(tx, &name)?.1))
            .await
    }

    /// A tenant's jobs, newest first.
    pub async fn list(&self, tenant: TenantId, page: PageRequest) -> Result<Page<Job>, JobError> {
        let found = self
            .inner
            .parts
            .database
            .read(move |tx| {
                rows::tenant_exists(tx, &tenant)?;
                let jobs = rows::list(tx, &tenant, &page)?;
                Ok::<_, JobError>(Page::cut(jobs, &page, |(key, _)| key.0.to_string()))
            })
            .await?;
        Ok(found.map(|(_, job)| job))
    }

    /// Tells a job to end. One that has not started ends at once; one at work within a moment, which this waits for briefly.
    /// Once this has answered, the job never publishes a version.
    pub async fn cancel(&self, name: JobName) -> Result<Job, JobError> {
        let wanted = name.clone();
        let key = self
            .inner
            .parts
            .database
            .write(move |tx| {
                let (key, job) = rows::by_name(tx, &wanted)?;
                if job.state.is_final() {
                    return Err(JobError::InvalidState {
                        name: wanted,
                        state: job.state,
                    });
                }
                rows::ask_cancel(tx, key)?;
                let (state, why) = (JobState::Cancelled, "cancelled while it did not run");
                if matches!(job.state, JobState::Queued | JobState::Paused) {
                    rows::change_state(tx, key, state, why, None)?;
                }
                Ok(key)
            })
            .await?;
        if let Some(ends) = self.at_work().get(&key) {
            ends.send_replace(Wish::Cancel);
        }
        self.ring(key).await?;
        self.settled(key, name, JobState::is_final).await
    }

    /// Puts a job aside, until [`JobService::resume`]. One that waits is put aside at once, one at work at its next breath: its
    /// steps so far are in a checkpoint, and it holds no memory. It waits for that briefly.
    pub async fn pause(&self, name: JobName) -> Result<Job, JobError> {
        let wanted = name.clone();
        let key = self
            .inner
            .parts
            .database
            .write(move |tx| {
                let (key, job) = rows::by_name(tx, &wanted)?;
                if job.state.is_final() {
                    return Err(JobError::InvalidState {
                        name: wanted,
                        state: job.state,
                    });
                }
                rows::ask_pause(tx, key, true)?;
                if job.state == JobState::Queued {
                    rows::set_aside(tx, key, "paused")?;
                }
                Ok(key)
            })
            .await?;
        if let Some(wish) = self.at_work().get(&key) {
            wish.send_if_modified(|wish| match wish {
                Wish::GoOn => {
                    *wish = Wish::Pause;
                    true
                }
                Wish::Pause | Wish::Cancel => false,
            });
        }
        self.ring(key).await?;
        let rests = |state: JobState| state == JobState::Paused || state.is_final();
        self.settled(key, name, rests).await
    }

    /// Queues a paused job. One that is about to be put aside goes on after that.
    pub async fn resume(&self, name: JobName) -> Result<Job, JobError> {
        let wanted = name.clone();
        let key = self
            .inner
            .parts
            .database
            .write(move |tx| {
                let (key, job) = rows::by_name(tx, &wanted)?;
                if !job.pause_asked || job.state.is_final() {
                    return Err(JobError::InvalidState {
                        name: wanted,
                        state: job.state,
                    });
                }
                rows::ask_pause(tx, key, false)?;
                if job.state == JobState::Paused {
                    rows::set_aside(tx, key, "resumed")?;
                }
                Ok(key)
            })
            .await?;
        self.ring(key).await?;
        self.inner.bell.notify_one();
        self.get(name).await
    }

    /// The job once its state is as wanted, or as it is after a short while.
    async fn settled(
        &self,
        key: JobKey,
        name: JobName,
        wanted: impl Fn(JobState) -> bool,
    ) -> Result<Job, JobError> {
        let settled = async {
            loop {
                let mut changed = self.signal_of(key).subscribe();
                let job = self.get(name.clone()).await?;
                if wanted(job.state) {
                    return Ok(job);
                }
                // A closed signal means that the job has ended; the next look tells.
                let _ = changed.changed().await;
            }
        };
        match tokio::time::timeout(std::time::Duration::from_secs(5), settled).await {
            Ok(job) => job,
            Err(_) => self.get(name).await,
        }
    }

    fn at_work(&self) -> std::sync::MutexGuard<'_, HashMap<JobKey, signal::Sender<Wish>>> {
        self.inner
            .at_work
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The signal of a job's last event number; made when somebody first asks.
    fn signal_of(&self, key: JobKey) -> signal::Sender<u64> {
        self.inner.signals.entry(key).or_default().clone()
    }

    /// Tells watchers how far the table is; forgets the signal of a job that has ended.
    async fn ring(&self, key: JobKey) -> Result<(), JobError> {
        let job = self
            .inner
            .parts
            .database
            .read(move |tx| rows::by_key(tx, key))
            .await?;
        self.signal_of(key).send_replace(job.last_sequence);
        if job.state.is_final() {
            self.inner.signals.remove(&key);
        }
        Ok(())
    }
}
