//! The async front of the engine: nothing here waits for a step except where it says so, and nothing is held while
//! waiting. The engine thread is reached by [`EngineCommand`] only.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use espalier_adapters::ops::Backend;
use espalier_adapters::profile::MergePolicy;
use espalier_adapters::text::{ChatTemplate, Tokenizer};
use espalier_adapters::version::VersionDigest;
use tokio::sync::{mpsc, oneshot};

use crate::adapter_loader::AdapterSource;
use crate::adapter_pool::{AdapterMemory, AdapterPool, AdapterResidency};
use crate::command::{CommandSender, EngineCommand, SendRefused, Submission};
use crate::config::EngineConfig;
use crate::constraint::{Compiler, Constraint, ConstraintSource};
use crate::error::EngineError;
use crate::metrics::{self, EngineStats};
use crate::model::{Dtype, LoadedModel, ModelConfig, WeightFormats};
use crate::request::{Event, Request};
use crate::train::{TrainingJob, TrainingStart, TrainingSubmission};

/// When a caller that was shed may try again. A step lasts tens of milliseconds and frees several places.
pub(crate) const RETRY_AFTER: Duration = Duration::from_millis(500);

/// The way to one engine. Cheap to clone; the engine ends when the last clone is gone or after [`EngineHandle::drain`].
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
}

/// What is known of the base model without asking the engine thread.
#[derive(Clone)]
pub struct ModelInfo {
    /// Name from the file.
    pub name: String,
    /// Digest of the source weights.
    pub digest: String,
    /// Sizes and options.
    pub config: ModelConfig,
    /// What its matrices were asked to be kept in.
    pub dtype: Dtype,
    /// What they are kept in, and their bytes.
    pub formats: WeightFormats,
    /// Tokens of one sequence, prompt and output: the least of context length, configuration and KV cache.
    pub max_sequence_tokens: usize,
    /// The tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The chat template, if the model has one.
    pub template: Option<Arc<ChatTemplate>>,
    /// Ids that end a generation.
    pub stop_ids: Vec<u32>,
}

/// State shared between handles and the engine thread: counters, and the book of adapters, which is locked for moments only.
pub(crate) struct Shared {
    pub(crate) config: EngineConfig,
    pub(crate) model: ModelInfo,
    pub(crate) commands: CommandSender,
    pub(crate) gauges: Arc<Gauges>,
    pub(crate) pool: AdapterPool,
    pub(crate) compiler: Compiler,
}

/// Counters that both sides touch.
pub(crate) struct Gauges {
    /// Requests accepted and not yet begun.
    pub(crate) queued: AtomicUsize,
    /// Commands sent and not yet drained: a training quantum ends early for them.
    pub(crate) pending: AtomicUsize,
    /// Training jobs in the engine.
    pub(crate) training_jobs: AtomicUsize,
    /// Set once.
    pub(crate) draining: AtomicBool,
    /// Refreshed after every step.
    pub(crate) stats: Mutex<(Instant, EngineStats)>,
}

/// A place in the bounded queue, given back on drop.
pub(crate) struct Ticket(Arc<Gauges>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.queued.fetch_sub(1, Ordering::Relaxed);
    }
}

// === impl Gauges ===

impl Gauges {
    pub(crate) fn new() -> Self {
        Gauges {
            queued: AtomicUsize::new(0),
            pending: AtomicUsize::new(0),
            training_jobs: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            stats: Mutex::new((Instant::now(), EngineStats::default())),
        }
    }

    /// Takes a place if one is free.
    fn ticket(self: &Arc<Self>, limit: usize) -> Result<Ticket, EngineError> {
        let taken = self
            .queued
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |queued| {
                (queued < limit).then_some(queued + 1)
            });
        match taken {
            Ok(_) => Ok(Ticket(Arc::clone(self))),
            Err(waiting) => Err(EngineError::Overloaded {
                waiting,
                limit,
                retry_after: RETRY_AFTER,
            }),
        }
    }
}

// === impl EngineHandle ===

impl EngineHandle {
    /// Starts the engine thread on a loaded model, whose weights go to where `ops` work.
    ///
    /// # Errors
    /// A configuration that cannot work, or a thread that cannot be started.
    pub fn start(
        config: EngineConfig,
        ops: Backend,
        model: LoadedModel,
        source: Arc<dyn AdapterSource>,
    ) -> Result<EngineHandle, EngineError> {
        crate::engine::start(config, ops, model, source).map(|shared| EngineHandle {
            shared: Arc::new(shared),
        })
    }

    /// The base model.
    pub fn model(&self) -> &ModelInfo {
        &self.shared.model
    }

    /// The configuration that the engine runs with.
    pub fn config(&self) -> &EngineConfig {
        &self.shared.config
    }

    /// Hands over a request. Never waits. Dropping the receiver cancels: the sequences leave at the next step.
    ///
    /// # Errors
    /// A field outside of the limits, a full queue, or an engine that drains or has stopped.
    pub fn submit(&self, request: Request) -> Result<mpsc::Receiver<Event>, EngineError> {
        self.refuse_if_draining()?;
        request.validate(&self.shared.config, &self.shared.model)?;
        let ticket = self
            .shared
            .gauges
            .ticket(self.shared.config.max_queue)
            .inspect_err(|_| metrics::admission("queue_full"))?;
        let submitted = Instant::now();
        let mut adapters_missing = 0;
        if !request.require_resident {
            // The load begins now, not when the engine comes round to the request after its step.
            for target in &request.target {
                let missing = self.shared.pool.prefetch(target.digest, submitted);
                adapters_missing += usize::from(missing);
            }
        }
        let (events, receiver) = mpsc::channel(self.shared.config.event_buffer);
        self.send(EngineCommand::Submit(Box::new(Submission {
            request,
            events,
            ticket,
            submitted,
            adapters_missing,
        })))?;
        Ok(receiver)
    }

    /// Compiles a constraint for [`Generate`](crate::request::Generate), or takes it from the cache. Waits for the
    /// compiler's threads, never for a step.
    ///
    /// # Errors
    /// [`EngineError::ConstraintInvalid`] with the parser's words; [`EngineError::ConstraintTooComplex`] beyond the limits
    /// of bytes, fuel or time; [`EngineError::Overloaded`] when too many wait for the compiler.
    pub async fn compile_constraint(
        &self,
        tenant: &str,
        source: ConstraintSource,
    ) -> Result<Constraint, EngineError> {
        self.refuse_if_draining()?;
        self.shared.compiler.compile(tenant, source).await
    }

    /// Whether [`EngineHandle::submit`] would take a request, overload and drain aside.
    ///
    /// # Errors
    /// A field outside of the limits.
    pub fn check(&self, request: &Request) -> Result<(), EngineError> {
        request.validate(&self.shared.config, &self.shared.model)
    }

    /// Hands over a training job. It begins when its turn comes; its first events tell.
    ///
    /// # Errors
    /// Too many jobs, or an engine that drains or has stopped. What the trainer refuses comes as an event.
    pub fn train(&self, submission: TrainingSubmission) -> Result<TrainingJob, EngineError> {
        self.refuse_if_draining()?;
        let (start, job) = TrainingStart::new(submission, self)?;
        self.send(EngineCommand::Train(Box::new(start)))?;
        Ok(job)
    }

    /// Loads a version now. Returns when it is resident. Waits for the loader, not for a step.
    ///
    /// # Errors
    /// What a request for that version would get.
    pub async fn activate(&self, digest: VersionDigest) -> Result<AdapterResidency, EngineError> {
        self.refuse_if_draining()?;
        self.shared.pool.activate(digest).await
    }

    /// Begins to load a version unless it is there. Never waits; whether it comes is told by [`EngineHandle::residency_of`].
    pub fn prefetch(&self, digest: VersionDigest) {
        self.shared.pool.prefetch(digest, Instant::now());
    }

    /// Loads a version and keeps it in memory until [`EngineHandle::unpin`].
    ///
    /// # Errors
    /// What a request for that version would get, and [`EngineError::PinnedCapacity`].
    pub async fn pin(&self, digest: VersionDigest) -> Result<AdapterResidency, EngineError> {
        self.refuse_if_draining()?;
        self.shared.pool.pin(digest).await
    }

    /// Lets a version be evicted again. Says whether it was pinned.
    pub fn unpin(&self, digest: &VersionDigest) -> bool {
        self.shared.pool.unpin(digest)
    }

    /// Says whether a version may be served from merged weights, from the next judgement on. Cheap enough for every request.
    pub fn set_merge_policy(&self, digest: VersionDigest, policy: MergePolicy) {
        self.shared.pool.set_policy(digest, policy);
    }

    /// Evicts a version now.
    ///
    /// # Errors
    /// [`EngineError::AdapterInUse`], [`EngineError::AdapterPinned`], [`EngineError::AdapterNotResident`].
    pub async fn deactivate(&self, digest: VersionDigest) -> Result<(), EngineError> {
        self.shared.pool.evict(digest)
    }

    /// What is resident, loading or failed, by the engine's own book.
    ///
    /// # Errors
    /// None today; a book elsewhere may have some.
    pub async fn residency(&self) -> Result<Vec<AdapterResidency>, EngineError> {
        Ok(self.shared.pool.residency(Instant::now()))
    }

    /// One version's place; `None` when it is not in memory.
    pub fn residency_of(&self, digest: &VersionDigest) -> Option<AdapterResidency> {
        self.shared.pool.residency_of(digest, Instant::now())
    }

    /// Bytes of adapters by what they are for.
    pub fn adapter_memory(&self) -> AdapterMemory {
        let (config, counts) = (&self.shared.config, self.shared.pool.counts());
        AdapterMemory {
            budget: config.adapter_bytes,
            used: counts.bytes,
            pinned_budget: config.pinned_bytes(),
            pinned: counts.pinned_bytes,
            merged_budget: config.merged_bytes,
            merged: counts.merged_bytes,
        }
    }

    /// Answers when the engine thread next looks at its commands: whoever waits in vain knows that it hangs.
    ///
    /// # Errors
    /// [`EngineError::Stopped`], [`EngineError::Overloaded`].
    pub async fn probe(&self) -> Result<(), EngineError> {
        let (reply, answer) = oneshot::channel();
        self.send(EngineCommand::Probe(reply))?;
        answer.await.map_err(|_| EngineError::Stopped)
    }

    /// The engine after its last step. Never waits for the engine.
    pub fn stats(&self) -> EngineStats {
        let guard = self
            .shared
            .gauges
            .stats
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (seen, stats) = &*guard;
        let heartbeat_ms = u64::try_from(seen.elapsed().as_millis()).unwrap_or(u64::MAX);
        EngineStats {
            heartbeat_ms,
            queued_requests: self.shared.gauges.queued.load(Ordering::Relaxed),
            training_jobs: self.shared.gauges.training_jobs.load(Ordering::Relaxed),
            ..stats.clone()
        }
    }

    /// Refuses new work, finishes what runs, stops training at checkpoints, and ends the engine thread. What still
    /// runs after `grace` is cut off with [`EngineError::Draining`].
    ///
    /// # Errors
    /// [`EngineError::Stopped`] when the thread was gone already.
    pub async fn drain(&self, grace: Duration) -> Result<(), EngineError> {
        self.shared.gauges.draining.store(true, Ordering::SeqCst);
        let (reply, answer) = oneshot::channel();
        self.send(EngineCommand::Drain {
            deadline: Instant::now() + grace,
            reply,
        })?;
        answer.await.map_err(|_| EngineError::Stopped)
    }

    /// Whether [`EngineHandle::drain`] was called.
    pub fn is_draining(&self) -> bool {
        self.shared.gauges.draining.load(Ordering::SeqCst)
    }

    pub(crate) fn gauges(&self) -> &Arc<Gauges> {
        &self.shared.gauges
    }

    /// Makes the engine thread look at its jobs. A full channel means that it will look anyway.
    pub(crate) fn wake(&self) {
        let _ = self.send(EngineCommand::Wake);
    }

    fn refuse_if_draining(&self) -> Result<(), EngineError> {
        if self.is_draining() {
            Err(EngineError::Draining)
        } else {
            Ok(())
        }
    }

    /// The command channel has a place for every request of the queue and some for control, so it is full only when
    /// control messages come in a flood.
    fn send(&self, command: EngineCommand) -> Result<(), EngineError> {
        self.shared
            .commands
            .send(command)
            .map_err(|refused| match refused {
                SendRefused::Full => EngineError::Overloaded {
                    waiting: self.shared.gauges.queued.load(Ordering::Relaxed),
                    limit: self.shared.config.max_queue,
                    retry_after: RETRY_AFTER,
                },
                SendRefused::Stopped => EngineError::Stopped,
            })
    }
}

/// The last handle is gone: nobody can ask for anything any more.
impl Drop for Shared {
    fn drop(&mut self) {
        self.gauges.draining.store(true, Ordering::SeqCst);
        let (reply, _) = oneshot::channel();
        let _ = self.commands.send(EngineCommand::Drain {
            deadline: Instant::now(),
            reply,
        });
    }
}

impl std::fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineHandle")
            .field("model", &self.shared.model.name)
            .finish_non_exhaustive()
    }
}
