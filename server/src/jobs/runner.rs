//! Running jobs: whose turn it is, what the trainer reports, and how a job ends.
//!
//! Order of writing is everything here. A checkpoint's bytes are stored before its row, the row before the event is shown.
//! The result's bytes are stored before the one transaction that inserts the version, moves the aliases and ends the job. So a
//! crash at any point leaves either a job that goes on from its last checkpoint, or a finished one. Steps that were shown
//! before a crash are computed again (bit for bit the same) and not shown twice.

use std::time::{Duration, Instant};

use espalier_adapters::peft;
use espalier_engine::error::EngineError;
use espalier_engine::train::trainer::{
    Diagnosis, EvalReport, Finished, StepReport, Summary, TrainEvent, TrainPlan,
};
use espalier_engine::train::{JobEvent, TrainingImpact, TrainingSubmission};
use tokio::sync::watch as signal;

use super::classification::ClassificationResult;
use super::create::initial_weights;
use super::events::{Finding, Happening, Job, JobFailure, JobState, Measured, Outcome, Progress};
use super::ladder::FirstRung;
use super::plan::{DataBytes, Material, Wanted};
use super::spec::{JobSpec, Validation};
use super::{JobError, JobKey, JobService, Started, Wish, rows};
use crate::artifact_store::BlobDigest;
use crate::names::{AdapterName, Alias, VersionName};
use crate::registry::{self, AliasPlan, NewVersion, Provenance, Publish, RegistryError};

/// Events that one transaction stores at most.
const BATCH: usize = 64;
/// How long the dispatcher waits when the engine had no place for a job.
const ENGINE_FULL_PAUSE: Duration = Duration::from_millis(500);
/// How often and how long apart a failing write is tried again before the job is left to the next start.
const WRITE_ATTEMPTS: u32 = 5;

/// How a run of a job ended.
enum Ending {
    /// Everything is stored, nothing is left to do.
    Done,
    /// It waits for another turn, or for the next start.
    Later {
        reason: &'static str,
        pause: Duration,
    },
    /// It cannot go on.
    Failed(JobFailure),
    /// It was told to end, and has.
    Cancelled,
}

/// What the runner knows of a job while it runs.
struct Run {
    key: JobKey,
    job: Job,
    progress: Progress,
    /// When and at how many tokens the rate was last measured.
    measured: Option<(Instant, u64, u64)>,
    wish: signal::Receiver<Wish>,
}

impl JobService {
    /// Puts every job that was at work back in the queue, or aside if it was told to pause; ends those that were told to.
    pub(super) async fn recover(&self) -> Result<(), JobError> {
        self.inner
            .parts
            .database
            .write(|tx| {
                for (key, job) in rows::unfinished(tx)? {
                    if job.cancel_asked {
                        let why = "cancelled before the server stopped";
                        rows::change_state(tx, key, JobState::Cancelled, why, None)?;
                    } else if matches!(job.state, JobState::Preparing | JobState::Running) {
                        let why =
                            "the server was restarted; the job goes on from its last checkpoint";
                        rows::set_aside(tx, key, why)?;
                    }
                }
                Ok(())
            })
            .await
    }

    /// Starts jobs while there are places, until the service stops.
    pub(super) async fn dispatch(self) {
        let stopping = self.inner.stopping.subscribe();
        loop {
            while !*stopping.borrow() && self.at_work().len() < self.inner.parts.limits.max_active {
                let claimed = self.inner.parts.database.write(rows::claim).await;
                match claimed {
                    Ok(Some((key, job))) => self.clone().launch(key, job),
                    Ok(None) => break,
                    Err(error) => {
                        tracing::error!(%error, "the job queue cannot be read");
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                }
            }
            if *stopping.borrow() {
                return;
            }
            self.inner.bell.notified().await;
        }
    }

    fn launch(self, key: JobKey, job: Job) {
        let (sender, wish) = signal::channel(Wish::GoOn);
        self.at_work().insert(key, sender);
        let progress = job.progress.clone();
        let name = job.name.to_string();
        let run = Run {
            key,
            job,
            progress,
            measured: None,
            wish,
        };
        tokio::spawn(async move {
            tracing::info!(job = name, "a training job starts");
            if let Err(error) = self.run(run).await {
                // The rows are as they were: the next start takes the job up again.
                tracing::error!(job = name, %error, "a training job is left to the next start");
            }
            self.at_work().remove(&key);
            self.inner.bell.notify_one();
        });
    }

    /// Runs a job to an ending and stores the ending.
    async fn run(&self, mut run: Run) -> Result<(), JobError> {
        self.ring(run.key).await?;
        let ending = match self.train(&mut run).await {
            Ok(ending) => ending,
            Err(error) => match failure(&error) {
                Some(failure) => Ending::Failed(failure),
                None => return Err(error),
            },
        };
        let key = run.key;
        let (state, reason, error) = match ending {
            Ending::Done => return self.after(&run).await,
            Ending::Later { reason, pause } => {
                tokio::time::sleep(pause).await;
                self.write(move |tx| rows::set_aside(tx, key, reason))
                    .await?;
                return self.after(&run).await;
            }
            Ending::Failed(failure) => (JobState::Failed, failure.message.clone(), Some(failure)),
            Ending::Cancelled => (JobState::Cancelled, "cancelled".to_owned(), None),
        };
        self.write(move |tx| rows::change_state(tx, key, state, &reason, error.clone()))
            .await?;
        self.after(&run).await
    }

    /// Tells watchers, and lets go of bytes that the job no longer needs.
    async fn after(&self, run: &Run) -> Result<(), JobError> {
        let key = run.key;
        self.ring(key).await?;
        let (train, valid) = self
            .inner
            .parts
            .database
            .read(move |tx| rows::data_of(tx, key))
            .await?;
        let digests = std::iter::once(train).chain(valid).collect();
        Ok(self.inner.parts.registry.release(digests).await?)
    }

    /// Trains to an ending; on a ladder, a head and then LoRA.
    async fn train(&self, run: &mut Run) -> Result<Ending, JobError> {
        loop {
            let first = run.job.spec.on_first_rung(&run.progress);
            let ending = self.train_rung(run).await?;
            let climbs = first && !run.job.spec.on_first_rung(&run.progress);
            if !(climbs && matches!(ending, Ending::Done)) {
                return Ok(ending);
            }
        }
    }

    async fn train_rung(&self, run: &mut Run) -> Result<Ending, JobError> {
        let submission = self.prepare_run(run).await?;
        match self.wish_of(run).await? {
            Wish::GoOn => {}
            Wish::Pause => return Ok(aside()),
            Wish::Cancel => return Ok(Ending::Cancelled),
        }
        let started = match self.inner.trainers.start(submission) {
            Ok(started) => started,
            Err(EngineError::TrainingCapacity { .. } | EngineError::Overloaded { .. }) => {
                return Ok(Ending::Later {
                    reason: "the engine had no place for another job",
                    pause: ENGINE_FULL_PAUSE,
                });
            }
            Err(EngineError::Draining | EngineError::Stopped) => return Ok(draining()),
            Err(error) => return Err(error.into()),
        };
        self.follow(run, started).await
    }

    /// What the job was told up to now, before it could hear of it.
    async fn wish_of(&self, run: &Run) -> Result<Wish, JobError> {
        let (key, database) = (run.key, &self.inner.parts.database);
        let asked = database.read(move |tx| rows::asked(tx, key)).await?;
        Ok(match asked {
            (true, _) => Wish::Cancel,
            (false, true) => Wish::Pause,
            (false, false) => Wish::GoOn,
        })
    }

    /// Reads what the job needs and builds the trainer's plan, beside the runtime.
    async fn prepare_run(&self, run: &Run) -> Result<TrainingSubmission, JobError> {
        let key = run.key;
        let (data, checkpoint) = self
            .inner
            .parts
            .database
            .read(move |tx| {
                Ok::<_, JobError>((rows::data_of(tx, key)?, rows::checkpoint(tx, key)?))
            })
            .await?;
        let service = self.clone();
        let first = run.job.spec.on_first_rung(&run.progress);
        let spec = Material::rung(&run.job.spec, first);
        let built = self
            .inner
            .parts
            .store
            .run(move |store| {
                let checkpoint = checkpoint.map(|digest| store.get(digest)).transpose()?;
                Ok(service.plan(&spec, data).map(|plan| (plan, checkpoint)))
            })
            .await?;
        let (plan, checkpoint) = built?;
        Ok(TrainingSubmission {
            job: run.job.name.to_string(),
            tenant: run.job.name.tenant.as_str().into(),
            plan,
            checkpoint,
        })
    }

    fn plan(
        &self,
        spec: &JobSpec,
        (train, valid): (BlobDigest, Option<BlobDigest>),
    ) -> Result<TrainPlan, JobError> {
        let parts = &self.inner.parts;
        if spec.base_digest != parts.base.digest {
            return Err(JobError::Incompatible {
                version: spec.adapter.clone(),
                expected: format!("base {}", spec.base_digest),
                found: format!("base {}", parts.base.digest),
            });
        }
        let bytes = |digest, source: &super::spec::DataSource| {
            Ok::<_, JobError>(DataBytes {
                bytes: parts.store.get(digest)?,
                format: source.format,
                columns: source.columns.clone(),
            })
        };
        let train = bytes(train, &spec.data)?;
        let valid = match (&spec.validation, valid) {
            (Validation::Data(source), Some(digest)) => Some(bytes(digest, source)?),
            _ => None,
        };
        let wanted = Wanted {
            method: &spec.method,
            profile: &spec.profile,
            labels: (!spec.labels.is_empty()).then_some(spec.labels.as_slice()),
            seed: spec.seed,
            fraction: match spec.validation {
                Validation::Fraction(part) => Some(part),
                _ => None,
            },
            max_tokens: spec.max_example_tokens,
        };
        let limits = parts.datasets.limits().data;
        let material = Material::build(&wanted, &train, valid.as_ref(), &parts.base, &limits)?;
        let init = initial_weights(spec, parts)?;
        material.plan(spec, &parts.base, init)
    }

    /// Stores what the trainer reports until it has ended.
    async fn follow(&self, run: &mut Run, mut started: Started) -> Result<Ending, JobError> {
        let mut told = Wish::GoOn;
        loop {
            let event = tokio::select! {
                event = started.events.recv() => event,
                Ok(wish) = run.wish.wait_for(|wish| *wish != told) => {
                    told = *wish;
                    (started.end)(told);
                    continue;
                }
            };
            let mut happenings = Vec::new();
            let mut next = event;
            loop {
                match next {
                    None => return Ok(draining()),
                    Some(JobEvent::Progress(TrainEvent::Checkpoint { step, bytes })) => {
                        self.store_events(run, std::mem::take(&mut happenings))
                            .await?;
                        self.store_checkpoint(run, step, bytes).await?;
                    }
                    Some(JobEvent::Progress(event)) => happenings.extend(run.take(&event)),
                    Some(last) => {
                        self.store_events(run, happenings).await?;
                        match self.end(run, last).await? {
                            Some(ending) => return Ok(ending),
                            None => break,
                        }
                    }
                }
                // Whatever came meanwhile goes into the same transaction.
                match started.events.try_recv() {
                    Ok(event) if happenings.len() < BATCH => next = Some(event),
                    Ok(event) => {
                        self.store_events(run, std::mem::take(&mut happenings))
                            .await?;
                        next = Some(event);
                    }
                    Err(_) => {
                        self.store_events(run, happenings).await?;
                        break;
                    }
                }
            }
        }
    }

    /// What an event that is no progress means; `None` when the job goes on.
    async fn end(&self, run: &mut Run, event: JobEvent) -> Result<Option<Ending>, JobError> {
        Ok(match event {
            JobEvent::Started(_) => {
                let key = run.key;
                let why = match &run.progress.first_rung {
                    Some(_) => "the head alone is live; training with LoRA began",
                    None => "training began",
                };
                self.write(move |tx| rows::change_state(tx, key, JobState::Running, why, None))
                    .await?;
                self.ring(run.key).await?;
                None
            }
            JobEvent::Progress(_) => None,
            JobEvent::Finished { finished, impact } => {
                Some(self.publish(run, *finished, impact).await?)
            }
            JobEvent::Cancelled => Some(Ending::Cancelled),
            JobEvent::Suspended => Some(draining()),
            JobEvent::Failed(error) => return Err(error.into()),
        })
    }

    async fn store_events(&self, run: &Run, happenings: Vec<Happening>) -> Result<(), JobError> {
        if happenings.is_empty() {
            return Ok(());
        }
        let (key, progress) = (run.key, run.progress.clone());
        self.write(move |tx| rows::append(tx, key, JobState::Running, &progress, &happenings))
            .await?;
        self.ring(run.key).await
    }

    async fn store_checkpoint(&self, run: &Run, step: u64, bytes: Vec<u8>) -> Result<(), JobError> {
        let size = bytes.len() as u64;
        let stored = self
            .inner
            .parts
            .store
            .run(move |store| store.put(&bytes))
            .await;
        let pin = match stored {
            Ok(pin) => pin,
            Err(error) => {
                // The job is no worse off than before; it only has further to go back after a crash.
                tracing::error!(job = %run.job.name, %error, "a checkpoint could not be stored");
                return Ok(());
            }
        };
        let (key, digest, progress) = (run.key, pin.digest(), run.progress.clone());
        let before = self
            .write(move |tx| {
                let before = rows::set_checkpoint(tx, key, step, digest, size)?;
                let happening = Happening::Checkpoint { step, size };
                rows::append(tx, key, JobState::Running, &progress, &[happening])?;
                Ok(before)
            })
            .await?;
        drop(pin);
        self.ring(run.key).await?;
        if let Some(before) = before {
            self.inner.parts.registry.release(vec![before]).await?;
        }
        Ok(())
    }

    /// Stores the result and, in one transaction, publishes it and ends the job, or has it climb to the second rung.
    async fn publish(
        &self,
        run: &mut Run,
        finished: Finished,
        impact: TrainingImpact,
    ) -> Result<Ending, JobError> {
        if let Some(head) = &run.progress.first_rung
            && !head.beaten_by(&run.job.spec.method, &finished.summary)
        {
            let why = head.stays(&run.job.spec.method, &finished.summary);
            return self.keep_first_rung(run.key, why).await;
        }
        let service = self.clone();
        let summary = finished.summary;
        let artifact = finished.artifact;
        let outcome = outcome(&run.job.spec, &summary, impact, artifact.bytes() as u64);
        let (pin, version) = self
            .inner
            .parts
            .store
            .run(move |store| {
                let parts = &service.inner.parts;
                let checked = peft::read(&artifact, &parts.base.shape, &parts.artifact_limits);
                let pin = store.put_artifact(&artifact)?;
                Ok(checked.map(|(config, weights, report)| {
                    let summary = registry::summarize(&config, &weights, &artifact);
                    let version = NewVersion {
                        digest: artifact.digest(),
                        size: artifact.bytes() as u64,
                        base_name: parts.base.resource.clone(),
                        base_digest: parts.base.digest.clone(),
                        profile: espalier_adapters::profile::ServingProfile::default(),
                        summary,
                        report,
                        provenance: Provenance::Upload,
                        metrics: std::collections::BTreeMap::new(),
                    };
                    (pin, version)
                }))
            })
            .await?
            .map_err(|report| {
                JobError::Engine(EngineError::Internal {
                    detail: format!("training wrote an adapter that does not read back: {report}"),
                })
            })?;
        let spec = run.job.spec.clone();
        let adapter =
            AdapterName::parse(&spec.adapter).map_err(|e| rows::damaged("jobs.spec", e))?;
        let aliases = spec
            .aliases
            .iter()
            .map(|alias| Alias::parse(alias).map_err(|e| rows::damaged("jobs.spec", e)))
            .collect::<Result<Vec<_>, _>>()?;
        let mut metrics = std::collections::BTreeMap::from([
            ("train_loss".to_owned(), summary.last_loss),
            ("steps".to_owned(), summary.steps as f64),
        ]);
        if let Some(best) = summary.best {
            metrics.insert("loss".to_owned(), best.loss);
            let accuracy = spec.method.accuracy(best.accuracy);
            metrics.extend(accuracy.map(|value| ("accuracy".to_owned(), value)));
            let perplexity = spec.method.perplexity(best.loss);
            metrics.extend(perplexity.map(|value| ("perplexity".to_owned(), value)));
        }
        if let Some(baseline) = summary.baseline {
            metrics.insert("baseline_loss".to_owned(), baseline.loss);
            let accuracy = spec.method.accuracy(baseline.accuracy);
            metrics.extend(accuracy.map(|value| ("baseline_accuracy".to_owned(), value)));
        }
        let held = summary.held_out.as_ref();
        let result = held.map(|held| ClassificationResult::of(held, &spec.labels));
        let found = result.iter().flat_map(ClassificationResult::metrics);
        metrics.extend(found.map(|(name, value)| (name.to_owned(), value)));
        metrics.retain(|_, value| value.is_finite());
        let publish = Publish {
            adapter: adapter.clone(),
            create: Some(spec.description.clone()),
            version: NewVersion {
                profile: spec.profile.clone(),
                provenance: Provenance::TrainingJob(run.job.name.to_string()),
                metrics,
                ..version
            },
            aliases: AliasPlan::Set(aliases),
            request: None,
        };
        run.progress.eta_seconds = Some(0.0);
        let first = spec.on_first_rung(&run.progress);
        let (key, progress, step) = (run.key, run.progress.clone(), summary.kept_step);
        let names = *self.inner.parts.registry.limits();
        let published: Option<(VersionName, Option<Progress>)> = self
            .write(move |tx| {
                if rows::by_key(tx, key)?.cancel_asked {
                    return Ok(None);
                }
                let name = registry::publish_in(tx, &publish, &names)?;
                rows::set_result(tx, key, &name.to_string(), &outcome, result.as_ref())?;
                let happening = Happening::Published {
                    version: name.to_string(),
                    digest: publish.version.digest.to_string(),
                    aliases: spec.aliases.clone(),
                    step,
                };
                rows::append(tx, key, JobState::Running, &progress, &[happening])?;
                if first {
                    let head = FirstRung::of(name.to_string(), &spec.method, &summary);
                    let next = Progress {
                        first_rung: Some(head),
                        ..Progress::default()
                    };
                    rows::append(tx, key, JobState::Running, &next, &[])?;
                    rows::drop_checkpoint(tx, key)?;
                    return Ok(Some((name, Some(next))));
                }
                let reason = format!("{name} is live");
                rows::change_state(tx, key, JobState::Succeeded, &reason, None)?;
                Ok(Some((name, None)))
            })
            .await?;
        drop(pin);
        let Some((name, next)) = published else {
            return Ok(Ending::Cancelled);
        };
        self.inner.parts.registry.forget(&adapter);
        if let Some(next) = next {
            (run.progress, run.measured) = (next, None);
            self.ring(run.key).await?;
            tracing::info!(job = %run.job.name, version = %name, "a training job's head is live, LoRA follows");
        } else {
            tracing::info!(job = %run.job.name, version = %name, "a training job is done");
        }
        Ok(Ending::Done)
    }

    /// Ends a job whose second rung is no better than its first.
    async fn keep_first_rung(&self, key: JobKey, why: String) -> Result<Ending, JobError> {
        let ended = self
            .write(move |tx| {
                if rows::by_key(tx, key)?.cancel_asked {
                    return Ok(false);
                }
                rows::change_state(tx, key, JobState::Succeeded, &why, None)?;
                Ok(true)
            })
            .await?;
        Ok(if ended {
            Ending::Done
        } else {
            Ending::Cancelled
        })
    }

    /// A write that is tried again when the database itself fails (a full disk, say), not when it refuses.
    async fn write<T, F>(&self, work: F) -> Result<T, JobError>
    where
        F: Fn(&rusqlite::Transaction<'_>) -> Result<T, JobError> + Send + Sync + 'static,
        T: Send + 'static,
    {
        let work = std::sync::Arc::new(work);
        let mut attempt = 0;
        loop {
            let once = std::sync::Arc::clone(&work);
            match self.inner.parts.database.write(move |tx| once(tx)).await {
                Err(JobError::Database(error)) if attempt < WRITE_ATTEMPTS => {
                    tracing::error!(%error, attempt, "a job's event could not be stored, trying again");
                    tokio::time::sleep(Duration::from_millis(200 << attempt)).await;
                    attempt += 1;
                }
                answer => return answer,
            }
        }
    }
}

/// A job that is put aside: its row says that it was told to pause.
fn aside() -> Ending {
    Ending::Later {
        reason: "paused",
        pause: Duration::ZERO,
    }
}

/// What came of a run and what it cost.
fn outcome(spec: &JobSpec, summary: &Summary, impact: TrainingImpact, size_bytes: u64) -> Outcome {
    let measured = |report: EvalReport| Measured {
        step: report.step,
        loss: finite(report.loss),
        accuracy: spec.method.accuracy(finite(report.accuracy)),
        macro_f1: report.macro_f1.map(finite),
        perplexity: spec.method.perplexity(report.loss),
    };
    Outcome {
        baseline: summary.baseline.map(measured),
        result: summary.best.map(measured),
        kept_step: summary.kept_step,
        stopped_early: summary.stopped_early,
        trained_parameters: summary.footprint.parameters,
        size_bytes,
        peak_bytes: summary.footprint.bytes,
        held_seconds: impact.held.as_secs_f64(),
        waited_seconds: impact.waited.as_secs_f64(),
        quanta: impact.quanta,
        longest_quantum_seconds: impact.longest_quantum.as_secs_f64(),
        shared_passes: impact.shared_passes,
        tpot_impact: finite(impact.tpot_impact),
    }
}

fn draining() -> Ending {
    Ending::Later {
        reason: "the server stops; the job goes on after its next start",
        pause: Duration::ZERO,
    }
}

/// What a job's failure is told as; `None` when the job itself is not to blame and the next start may do better.
fn failure(error: &JobError) -> Option<JobFailure> {
    let (reason, by_request) = match error {
        JobError::Database(_) | JobError::Engine(EngineError::Stopped | EngineError::Draining) => {
            return None;
        }
        JobError::Data { .. } | JobError::InvalidField { .. } => ("INVALID_FIELD", true),
        JobError::Engine(EngineError::TrainingFailed { .. }) => ("TRAINING_FAILED", true),
        JobError::Incompatible { .. } => ("ADAPTER_INCOMPATIBLE", true),
        JobError::Registry(RegistryError::Limit { .. }) => ("QUOTA_EXCEEDED", true),
        JobError::Registry(_) => ("ADAPTER_NOT_FOUND", true),
        JobError::Store(_) => ("ARTIFACT_CORRUPT", false),
        _ => ("INTERNAL", false),
    };
    Some(JobFailure {
        reason: reason.to_owned(),
        message: error.to_string(),
        by_request,
    })
}

/// JSON has no infinity.
fn finite(value: f64) -> f64 {
    if value.is_finite() { value } else { f64::MAX }
}

// === impl Run ===

impl Run {
    /// Notes what a report changes; gives the event to show unless it was shown before a restart.
    fn take(&mut self, event: &TrainEvent) -> Option<Happening> {
        match event {
            TrainEvent::Step(report) => self.step(report),
            TrainEvent::Eval(report) => {
                if self
                    .progress
                    .evaluated_step
                    .is_some_and(|step| report.step <= step)
                {
                    return None;
                }
                let perplexity = self.job.spec.method.perplexity(report.loss);
                let progress = &mut self.progress;
                progress.evaluated_step = Some(report.step);
                if report.step == 0 {
                    progress.baseline_loss = Some(finite(report.loss));
                    let accuracy = self.job.spec.method.accuracy(finite(report.accuracy));
                    progress.baseline_accuracy = accuracy;
                }
                progress.valid_perplexity = perplexity;
                progress.valid_loss = Some(finite(report.loss));
                let accuracy = self.job.spec.method.accuracy(finite(report.accuracy));
                progress.valid_accuracy = accuracy;
                if report.best {
                    progress.best_step = Some(report.step);
                }
                Some(Happening::Evaluation {
                    step: report.step,
                    loss: finite(report.loss),
                    accuracy,
                    macro_f1: report.macro_f1.map(finite),
                    perplexity,
                    best: report.best,
                })
            }
            TrainEvent::Diagnosis { step, diagnosis } => self.diagnosis(*step, diagnosis),
            _ => None,
        }
    }

    fn diagnosis(&mut self, step: u64, diagnosis: &Diagnosis) -> Option<Happening> {
        if self
            .progress
            .diagnosed_step
            .is_some_and(|last| step <= last)
        {
            return None;
        }
        self.progress.diagnosed_step = Some(step);
        let finding = match diagnosis {
            Diagnosis::SilentModules { modules, .. } => Finding::SilentModules(modules.clone()),
            Diagnosis::Diverging { .. } => Finding::Diverging,
        };
        Some(Happening::Diagnosis {
            step,
            finding,
            message: diagnosis.to_string(),
        })
    }

    fn step(&mut self, report: &StepReport) -> Option<Happening> {
        self.measure(report);
        if report.step <= self.progress.step {
            return None;
        }
        let progress = &mut self.progress;
        progress.step = report.step;
        progress.total_steps = report.total;
        progress.epoch = report.epoch;
        progress.loss = Some(finite(report.loss));
        progress.tokens = report.total_tokens;
        Some(Happening::Step {
            step: report.step,
            loss: finite(report.loss),
            grad_norm: finite(report.grad_norm),
            learning_rate: report.learning_rate,
            tokens: report.tokens,
        })
    }

    /// Tokens a second and the time that is left, over at least half a second of steps.
    fn measure(&mut self, report: &StepReport) {
        let now = Instant::now();
        let Some((since, tokens, step)) = self.measured else {
            self.measured = Some((now, report.total_tokens, report.step));
            return;
        };
        let seconds = now.duration_since(since).as_secs_f64();
        let steps = report.step.saturating_sub(step);
        if seconds < 0.5 || steps == 0 {
            return;
        }
        let done = report.total_tokens.saturating_sub(tokens);
        let left = report.total.saturating_sub(report.step);
        self.progress.tokens_per_second = done as f64 / seconds;
        self.progress.eta_seconds = Some(left as f64 * seconds / steps as f64);
        self.measured = Some((now, report.total_tokens, report.step));
    }
}
