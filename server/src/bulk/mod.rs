//! Durable bulk jobs: a file of requests, a file of answers, and a row that says how far the one has become the other.
//!
//! What is acknowledged is durable first: the input before the row that names it, the answers before the row that counts
//! them. After a crash the output is cut to what its row counts, so that every line is answered once. This file must not
//! know what a line asks, nor the wire.

mod files;
mod rows;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use tokio::sync::{Notify, watch as signal};

pub use files::{Input, Output};

use crate::database::{Database, DatabaseError, RequestKey, now_ms};
use crate::names::{BulkJobName, TenantId, TenantName};
use crate::paging::{Page, PageRequest};
use crate::registry::RegistryError;

/// Why a bulk job was not accepted, found or changed.
#[derive(Debug, thiserror::Error)]
pub enum BulkError {
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
        name: BulkJobName,
    },
    /// The id is taken.
    #[error("{name} exists already")]
    Exists {
        /// The job.
        name: BulkJobName,
    },
    /// The job has ended, or has not.
    #[error("{name} is {state}; {next}")]
    InvalidState {
        /// The job.
        name: BulkJobName,
        /// Its state.
        state: State,
        /// What can be done.
        next: &'static str,
    },
    /// A count is over its limit.
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
    /// The version that was chosen is gone.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The server stops.
    #[error("the server stops; the job goes on after its restart")]
    Stopping,
    /// A file of the job failed.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl From<rusqlite::Error> for BulkError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error.into())
    }
}

/// Declares an enum whose values are stored as words.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$item:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$item])* $variant,)+ }

        impl $name {
            fn parse(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)+ _ => None }
            }

            /// The word.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

words! {
    /// What is done with every line.
    Operation {
        /// Continue a text.
        Generate = "generate",
        /// Answer a chat.
        Chat = "chat",
        /// Choose among labels.
        Classify = "classify",
    }
}

words! {
    /// Where a job is.
    State {
        /// Waits for its turn.
        Queued = "queued",
        /// Answers lines.
        Running = "running",
        /// Every line is answered.
        Succeeded = "succeeded",
        /// Could not go on.
        Failed = "failed",
        /// Ended by a caller.
        Cancelled = "cancelled",
    }
}

impl State {
    /// Whether it never changes again.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// How far a job is; only what is durable counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Lines of the input.
    pub items: u64,
    /// Lines answered: the first so many.
    pub done: u64,
    /// Of these, answered with an error.
    pub failed: u64,
    /// Tokens of the prompts.
    pub input_tokens: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// Bytes of the output.
    pub output_bytes: u64,
}

/// A job.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its name.
    pub name: BulkJobName,
    /// Never used twice: the name of its directory.
    pub uid: String,
    /// What is done with every line.
    pub operation: Operation,
    /// The version that answers, by its canonical name; `None` is the base model.
    pub version: Option<String>,
    /// Where it is.
    pub state: State,
    /// Why it failed.
    pub error: Option<String>,
    /// For people.
    pub description: String,
    /// Bytes of the input.
    pub input_bytes: u64,
    /// SHA-256 (hex) of the input.
    pub input_sha256: String,
    /// How far it is.
    pub progress: Progress,
    /// Unix milliseconds.
    pub create_time: i64,
    /// When it first ran.
    pub start_time: Option<i64>,
    /// When it ended.
    pub end_time: Option<i64>,
    /// When it will be removed.
    pub expire_time: Option<i64>,
}

/// A job's row id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct JobKey(i64);

/// Bounds on bulk jobs.
#[derive(Debug, Clone, Copy)]
pub struct BulkLimits {
    /// Jobs of one tenant, ended ones included.
    pub max_jobs: usize,
    /// Jobs that run at once.
    pub max_active: usize,
    /// Characters of an id.
    pub max_id_length: usize,
    /// How long a job is kept after its end.
    pub retention: Duration,
}

/// Jobs of all tenants. Cheap to clone.
#[derive(Clone)]
pub struct BulkStore {
    inner: Arc<Inner>,
}

struct Inner {
    database: Database,
    files: files::Files,
    limits: BulkLimits,
    /// Rung when a job is queued or the store stops.
    bell: Notify,
    /// By job: changed whenever its row has. Made when somebody first asks.
    signals: DashMap<i64, signal::Sender<u64>>,
    stopping: signal::Sender<bool>,
}

// === impl BulkStore ===

impl BulkStore {
    /// Opens the jobs under `data_dir`: running ones are queued again, files without a row are removed.
    ///
    /// # Errors
    /// A directory or a database that fails.
    pub async fn open(
        database: Database,
        data_dir: &std::path::Path,
        limits: BulkLimits,
    ) -> Result<Self, BulkError> {
        let files = files::Files::open(data_dir)?;
        let uids = database
            .write(|tx| {
                rows::queue_again(tx)?;
                rows::uids(tx)
            })
            .await?;
        files.remove_others(&uids);
        Ok(Self {
            inner: Arc::new(Inner {
                database,
                files,
                limits,
                bell: Notify::new(),
                signals: DashMap::new(),
                stopping: signal::Sender::new(false),
            }),
        })
    }

    /// The bounds that were configured.
    pub fn limits(&self) -> &BulkLimits {
        &self.inner.limits
    }

    /// Stores checked input under a new job. Input and job are durable when this returns. With a request id that was used
    /// before with the same payload, the job that it made.
    ///
    /// # Errors
    /// An id that is taken, too many jobs, a tenant that is gone.
    pub async fn create(
        &self,
        job: Job,
        input: Vec<u8>,
        request: Option<RequestKey>,
    ) -> Result<Job, BulkError> {
        let files = self.inner.files.clone();
        let uid = job.uid.clone();
        blocking(move || files.create(&uid, &input)).await?;
        let limits = self.inner.limits;
        let uid = job.uid.clone();
        let created = self
            .inner
            .database
            .write(move |tx| rows::insert(tx, &job, request.as_ref(), &limits))
            .await;
        let ours = created.as_ref().is_ok_and(|created| created.uid == uid);
        if !ours {
            self.inner.files.remove(&uid);
        }
        self.inner.bell.notify_one();
        created
    }

    /// One job.
    ///
    /// # Errors
    /// None of that name.
    pub async fn get(&self, name: BulkJobName) -> Result<Job, BulkError> {
        Ok(self.find(name).await?.1)
    }

    async fn find(&self, name: BulkJobName) -> Result<(JobKey, Job), BulkError> {
        self.inner
            .database
            .read(move |tx| rows::by_name(tx, &name))
            .await
    }

    /// A tenant's jobs, newest first.
    ///
    /// # Errors
    /// No such tenant.
    pub async fn list(&self, tenant: TenantId, page: PageRequest) -> Result<Page<Job>, BulkError> {
        let found = self
            .inner
            .database
            .read(move |tx| {
                rows::require_tenant(tx, &tenant)?;
                let jobs = rows::list(tx, &tenant, &page)?;
                Ok::<_, BulkError>(Page::cut(jobs, &page, |(key, _)| key.0.to_string()))
            })
            .await?;
        Ok(found.map(|(_, job)| job))
    }

    /// Ends a job; what is answered stays.
    ///
    /// # Errors
    /// A job that has ended.
    pub async fn cancel(&self, name: BulkJobName) -> Result<Job, BulkError> {
        let expires = now_ms() + self.retention_ms();
        let (key, job) = self
            .inner
            .database
            .write(move |tx| {
                let (key, job) = rows::by_name(tx, &name)?;
                if job.state.is_final() {
                    return Err(BulkError::InvalidState {
                        name,
                        state: job.state,
                        next: "it has ended already",
                    });
                }
                rows::end(tx, key, State::Cancelled, None, expires)?;
                rows::by_name(tx, &name)
            })
            .await?;
        self.changed(key);
        Ok(job)
    }

    /// Removes a job that has ended, with its files.
    ///
    /// # Errors
    /// A job that has not ended.
    pub async fn delete(&self, name: BulkJobName) -> Result<(), BulkError> {
        let uid = self
            .inner
            .database
            .write(move |tx| {
                let (key, job) = rows::by_name(tx, &name)?;
                if !job.state.is_final() {
                    return Err(BulkError::InvalidState {
                        name,
                        state: job.state,
                        next: "cancel it first",
                    });
                }
                rows::delete(tx, key, &job)?;
                Ok(job.uid)
            })
            .await?;
        self.inner.files.remove(&uid);
        Ok(())
    }

    /// Removes jobs whose time is over, and files that nothing names any more.
    ///
    /// # Errors
    /// A database that fails.
    pub async fn expire(&self) -> Result<(), BulkError> {
        let gone = self
            .inner
            .database
            .write(|tx| rows::delete_expired(tx, now_ms()))
            .await?;
        for uid in gone {
            self.inner.files.remove(&uid);
        }
        Ok(())
    }

    /// Changes whenever the job has; subscribe before reading, so that no change is missed.
    ///
    /// # Errors
    /// None of that name.
    pub async fn signal(&self, name: BulkJobName) -> Result<signal::Receiver<u64>, BulkError> {
        let (key, _) = self.find(name).await?;
        Ok(self.inner.signals.entry(key.0).or_default().subscribe())
    }

    fn changed(&self, key: JobKey) {
        if let Some(signal) = self.inner.signals.get(&key.0) {
            signal.send_modify(|count| *count += 1);
        }
        // One without listeners is made again when somebody asks.
        self.inner
            .signals
            .remove_if(&key.0, |_, signal| signal.receiver_count() == 0);
    }

    fn retention_ms(&self) -> i64 {
        i64::try_from(self.inner.limits.retention.as_millis()).unwrap_or(i64::MAX / 2)
    }

    // --- for whoever runs the jobs ---

    /// The next queued job, running from now on; waits for one. `None` once the store stops.
    pub async fn next(&self) -> Option<(JobKey, Job)> {
        loop {
            if self.is_stopping() {
                return None;
            }
            let taken = self.inner.database.write(rows::take_next).await;
            match taken {
                Ok(Some(taken)) => {
                    self.changed(taken.0);
                    return Some(taken);
                }
                Ok(None) => {}
                Err(error) => tracing::error!(%error, "the next bulk job cannot be read"),
            }
            let mut stopping = self.inner.stopping.subscribe();
            tokio::select! {
                () = self.inner.bell.notified() => {}
                _ = stopping.wait_for(|stop| *stop) => {}
                // Once in a while without a bell: two may ring as one.
                () = tokio::time::sleep(Duration::from_secs(5)) => {}
            }
        }
    }

    /// The job's input from its first line that is not answered.
    ///
    /// # Errors
    /// A file that fails.
    pub async fn input(&self, job: &Job) -> Result<Input, BulkError> {
        let (files, uid, skip) = (self.inner.files.clone(), job.uid.clone(), job.progress.done);
        blocking(move || files.input(&uid, skip)).await
    }

    /// The job's output, cut to what is durable.
    ///
    /// # Errors
    /// A file that fails, or is shorter than its row says.
    pub async fn output(&self, job: &Job) -> Result<Output, BulkError> {
        let (files, uid) = (self.inner.files.clone(), job.uid.clone());
        let length = job.progress.output_bytes;
        blocking(move || files.output(&uid, length)).await
    }

    /// Up to `most` bytes of the output from `offset`, which must not lie behind what is durable.
    ///
    /// # Errors
    /// A file that fails.
    pub async fn read_output(
        &self,
        job: &Job,
        offset: u64,
        most: usize,
    ) -> Result<Vec<u8>, BulkError> {
        let (files, uid) = (self.inner.files.clone(), job.uid.clone());
        blocking(move || files.read_output(&uid, offset, most)).await
    }

    /// Counts answers that are on the disk. False when the job was cancelled meanwhile: then nothing is counted.
    ///
    /// # Errors
    /// A database that fails.
    pub async fn commit(&self, key: JobKey, progress: Progress) -> Result<bool, BulkError> {
        let counted = self
            .inner
            .database
            .write(move |tx| rows::commit(tx, key, &progress))
            .await?;
        self.changed(key);
        Ok(counted)
    }

    /// Ends a running job.
    ///
    /// # Errors
    /// A database that fails.
    pub async fn end(
        &self,
        key: JobKey,
        state: State,
        error: Option<String>,
    ) -> Result<(), BulkError> {
        let expires = now_ms() + self.retention_ms();
        self.inner
            .database
            .write(move |tx| rows::end(tx, key, state, error, expires))
            .await?;
        self.changed(key);
        Ok(())
    }

    /// Starts no further job; those at work stop soon and go on after the next start.
    pub fn stop(&self) {
        self.inner.stopping.send_replace(true);
        self.inner.bell.notify_waiters();
    }

    /// Whether [`BulkStore::stop`] was called.
    pub fn is_stopping(&self) -> bool {
        *self.inner.stopping.borrow()
    }

    /// Resolves once the store stops.
    pub async fn stopped(&self) {
        let _ = self.inner.stopping.subscribe().wait_for(|stop| *stop).await;
    }
}

/// Files block; the runtime must not.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BulkError> + Send + 'static,
) -> Result<T, BulkError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(BulkError::Database(DatabaseError::Closed)))
}

#[cfg(test)]
mod tests;
