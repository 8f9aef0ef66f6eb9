//! Tests of jobs against something that behaves like the engine: order of writing, recovery, cancelling, watching, turns.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use espalier_adapters::config::LoraConfig;
use espalier_adapters::peft;
use espalier_adapters::profile::ServingProfile;
use espalier_adapters::train::dataset::{ColumnNames, DataLimits, Format};
use espalier_adapters::weights::{AdapterWeights, ScoreHead};
use espalier_engine::model;
use espalier_engine::train::trainer::{
    EvalReport, Finished, Footprint, StepReport, Summary, TrainEvent,
};

use super::*;
use crate::database::RequestKey;
use crate::datasets::DatasetLimits;
use crate::names::{AdapterName, AdapterRef, Alias, DatasetName, VersionName};
use crate::principal::Principal;
use crate::registry::RegistryLimits;

/// Steps of a job here; a checkpoint comes after every fourth.
const STEPS: u64 = 10;

/// Steps that a held trainer does.
const HELD: u64 = 5;

/// Takes jobs as the engine does: a pure function of plan and checkpoint. It stops dead after `die_after` steps, as a killed
/// process would, and waits before each step while `hold` is set.
#[derive(Default)]
struct Fake {
    die_after: Option<u64>,
    /// The same, of runs with LoRA alone.
    die_with_lora: Option<u64>,
    /// What runs with LoRA get right.
    lora_accuracy: f64,
    hold: Arc<AtomicBool>,
    started: Arc<Mutex<Vec<(String, u64)>>>,
    busy: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
}

fn loss_at(seed: u64, step: u64) -> f64 {
    ((seed % 97) as f64 + 1.0) / step as f64
}

fn artifact(
    seed: u64,
    labels: &[String],
    hidden: usize,
) -> espalier_adapters::version::AdapterArtifact {
    let config = LoraConfig::head_only();
    let weight = (0..labels.len() * hidden)
        .map(|at| (at as f32).sin() + (seed % 1000) as f32)
        .collect();
    let head = ScoreHead {
        labels: labels.to_vec(),
        weight,
        ..ScoreHead::default()
    };
    let weights = AdapterWeights {
        head: Some(head),
        ..AdapterWeights::default()
    };
    write(&config, &weights)
}

fn write(
    config: &LoraConfig,
    weights: &AdapterWeights,
) -> espalier_adapters::version::AdapterArtifact {
    peft::write(config, weights).unwrap()
}

fn checkpoint(step: u64, seed: u64) -> TrainEvent {
    let mut bytes = step.to_le_bytes().to_vec();
    bytes.extend(seed.to_le_bytes());
    TrainEvent::Checkpoint { step, bytes }
}

impl Trainers for Fake {
    fn start(&self, submission: TrainingSubmission) -> Result<Started, EngineError> {
        let (sender, events) = mpsc::channel(4);
        let told = Arc::new(Mutex::new(Wish::GoOn));
        let first = submission.checkpoint.as_ref().map_or(0, |bytes| {
            u64::from_le_bytes(bytes[..8].try_into().unwrap())
        });
        self.started
            .lock()
            .unwrap()
            .push((submission.job.clone(), first));
        let busy = self.busy.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(busy, Ordering::SeqCst);
        let (stop, hold, die) = (
            Arc::clone(&told),
            Arc::clone(&self.hold),
            match &submission.plan.adapter {
                Some(_) => self.die_with_lora,
                None => self.die_after,
            },
        );
        let lora = submission.plan.adapter.as_ref().map(|_| self.lora_accuracy);
        let count = Arc::clone(&self.busy);
        tokio::spawn(async move {
            let seed = submission.plan.seed;
            let _ = sender.send(JobEvent::Started(Footprint::default())).await;
            for step in first + 1..=STEPS {
                let wish = || *stop.lock().unwrap();
                while step > HELD && hold.load(Ordering::SeqCst) && wish() == Wish::GoOn {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                if wish() != Wish::GoOn {
                    count.fetch_sub(1, Ordering::SeqCst);
                    let last = match wish() {
                        Wish::Pause => {
                            let event = checkpoint(step - 1, seed);
                            let _ = sender.send(JobEvent::Progress(event)).await;
                            JobEvent::Suspended
                        }
                        _ => JobEvent::Cancelled,
                    };
                    let _ = sender.send(last).await;
                    return;
                }
                let report = StepReport {
                    step,
                    total: STEPS,
                    loss: loss_at(seed, step),
                    total_tokens: step * 10,
                    ..StepReport::default()
                };
                let _ = sender
                    .send(JobEvent::Progress(TrainEvent::Step(report)))
                    .await;
                if step % 4 == 0 {
                    let event = checkpoint(step, seed);
                    let _ = sender.send(JobEvent::Progress(event)).await;
                }
                if die == Some(step) {
                    // Neither an event nor a closed channel: the process is gone.
                    std::future::pending::<()>().await;
                }
            }
            let eval = EvalReport {
                macro_f1: None,
                step: STEPS,
                loss: 0.5,
                accuracy: lora.unwrap_or(0.75),
                best: true,
            };
            let _ = sender
                .send(JobEvent::Progress(TrainEvent::Eval(eval)))
                .await;
            let labels = submission.plan.train.labels.clone().unwrap();
            let finished = Finished {
                artifact: artifact(seed + u64::from(lora.is_some()), &labels, 64),
                summary: Summary {
                    steps: STEPS,
                    kept_step: STEPS,
                    best: Some(eval),
                    ..Summary::default()
                },
            };
            count.fetch_sub(1, Ordering::SeqCst);
            let done = JobEvent::Finished {
                finished: Box::new(finished),
                impact: Default::default(),
            };
            let _ = sender.send(done).await;
        });
        Ok(Started {
            events,
            end: Box::new(move |wish| *told.lock().unwrap() = wish),
        })
    }
}

struct Bench {
    jobs: JobService,
    registry: Registry,
    database: Database,
    dir: Arc<tempfile::TempDir>,
}

fn base() -> Base {
    let loaded = model::load("tiny:7").unwrap();
    let mut shape = loaded.config.base_shape();
    // The fake's head is this wide.
    shape.hidden = 64;
    Base {
        name: "tiny".into(),
        resource: "models/tiny".into(),
        digest: loaded.digest,
        shape,
        family: loaded.config.family,
        max_tokens: 128,
        tokenizer: loaded.tokenizer,
        template: loaded.template,
        stop_ids: loaded.stop_ids,
    }
}

async fn open(dir: &Arc<tempfile::TempDir>, fake: Fake) -> Bench {
    let database = Database::open(dir.path()).unwrap();
    database
        .write(|tx| {
            tx.execute(
                "INSERT OR IGNORE INTO tenants VALUES ('acme', '', 0), ('globex', '', 0)",
                [],
            )?;
            Ok::<_, DatabaseError>(())
        })
        .await
        .unwrap();
    let store = ArtifactStore::open(dir.path()).unwrap();
    let names = RegistryLimits {
        max_adapters: 100,
        max_versions: 100,
        max_aliases: 8,
        max_description_bytes: 100,
        max_id_length: 63,
        cache_entries: 100,
    };
    let registry = Registry::new(database.clone(), store.clone(), names);
    registry.sweep().await.unwrap();
    let limits = DatasetLimits {
        max_datasets: 10,
        max_id_length: 63,
        data: DataLimits::default(),
    };
    let parts = Parts {
        database: database.clone(),
        store: store.clone(),
        registry: registry.clone(),
        datasets: DatasetStore::new(database.clone(), store, limits),
        base: base(),
        limits: JobLimits {
            max_active: 2,
            max_per_tenant: 5,
            activation_bytes: 1 << 28,
            checkpoint_steps: 4,
            max_example_tokens: 128,
            max_inline_rows: 100,
            max_epochs: 100,
            max_steps: 1000,
            max_batch_size: 64,
            max_rank: 64,
            max_labels: 16,
            max_adapter_bytes: 1 << 30,
            adapter_cache_bytes: 1 << 30,
            training_job_bytes: 8 << 30,
            max_description_bytes: 100,
        },
        artifact_limits: peft::Limits::default(),
    };
    let jobs = JobService::start(parts, Arc::new(fake)).await.unwrap();
    Bench {
        jobs,
        registry,
        database,
        dir: Arc::clone(dir),
    }
}

fn request(tenant: &str, adapter: &str, seed: u64) -> JobRequest {
    let rows: String = (0..12)
        .map(|n| {
            format!(
                "{{\"text\": \"row {n}\", \"label\": \"{}\"}}\n",
                ["no", "yes"][n % 2]
            )
        })
        .collect();
    JobRequest {
        adapter: AdapterName::parse(&format!("tenants/{tenant}/adapters/{adapter}")).unwrap(),
        from: None,
        method: JobMethod::Classification {
            head_only: true,
            labels: vec![],
            options: ClassOptions::default(),
        },
        data: DataInput::Inline {
            format: Format::Jsonl,
            columns: ColumnNames::default(),
            bytes: rows.into_bytes(),
        },
        validation: ValidationInput::None,
        hyper: HyperRequest::default(),
        lora: LoraRequest::default(),
        way: None,
        seed: Some(seed),
        profile: ServingProfile::default(),
        aliases: vec![],
        keep_aliases: false,
        description: String::new(),
    }
}

async fn until(bench: &Bench, name: &JobName, what: impl Fn(&Job) -> bool) -> Job {
    // Long, because every state is written to a disk that others may keep busy.
    for _ in 0..8000 {
        let job = bench.jobs.get(name.clone()).await.unwrap();
        if what(&job) {
            return job;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!(
        "{name} did not get there: {:?}",
        bench.jobs.get(name.clone()).await
    );
}

async fn watched(bench: &Bench, name: &JobName, from: u64) -> Vec<Event> {
    let mut items = bench
        .jobs
        .watch(name.clone(), from, Duration::from_secs(9))
        .await
        .unwrap();
    let mut events = Vec::new();
    while let Some(item) = items.recv().await {
        if let WatchItem::Event(event) = item.unwrap() {
            events.push(*event);
        }
    }
    events
}

fn losses(events: &[Event]) -> Vec<(u64, f64)> {
    events
        .iter()
        .filter_map(|event| match event.happening {
            Happening::Step { step, loss, .. } => Some((step, loss)),
            _ => None,
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_ends_in_a_live_version_and_a_gapless_story() {
    let bench = open(&Arc::new(tempfile::tempdir().unwrap()), Fake::default()).await;
    let (job, _) = bench
        .jobs
        .create(request("acme", "tickets", 5), None)
        .await
        .unwrap();
    let watching = watched(&bench, &job.name, 0).await;
    let numbers: Vec<u64> = watching.iter().map(|event| event.sequence).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    let last = watching.last().unwrap();
    assert_eq!(last.state, JobState::Succeeded);
    let curve: Vec<(u64, f64)> = (1..=STEPS).map(|step| (step, loss_at(5, step))).collect();
    assert_eq!(losses(&watching), curve);
    let done = bench.jobs.get(job.name.clone()).await.unwrap();
    assert_eq!(done.last_sequence, last.sequence);
    assert_eq!(
        done.version.as_deref(),
        Some("tenants/acme/adapters/tickets/versions/1")
    );
    let reference = AdapterRef::parse("tenants/acme/adapters/tickets").unwrap();
    let live = bench
        .registry
        .resolve(&Principal::LocalAnonymous, &reference)
        .await
        .unwrap();
    assert_eq!(live.labels, ["no", "yes"]);
    let version = bench.registry.get_version(reference).await.unwrap();
    assert_eq!(version.content.metrics["accuracy"], 0.75);
    assert_eq!(watched(&bench, &job.name, 5).await, watching[4..]);
    assert!(watched(&bench, &job.name, 1000).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_job_goes_on_from_its_checkpoint_to_the_same_end() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let fake = Fake {
        die_after: Some(7),
        ..Fake::default()
    };
    let bench = open(&dir, fake).await;
    let (job, _) = bench
        .jobs
        .create(request("acme", "tickets", 5), None)
        .await
        .unwrap();
    until(&bench, &job.name, |job| job.progress.step == 7).await;
    // Nothing is closed: the first service stays as a killed process leaves its files.
    let fake = Fake::default();
    let started = Arc::clone(&fake.started);
    let again = open(&bench.dir, fake).await;
    let done = until(&again, &job.name, |job| job.state.is_final()).await;
    assert_eq!((done.state, done.attempt), (JobState::Succeeded, 2));
    assert_eq!(
        started.lock().unwrap().as_slice(),
        [(job.name.to_string(), 4)]
    );
    let story = watched(&again, &job.name, 0).await;
    let curve: Vec<(u64, f64)> = (1..=STEPS).map(|step| (step, loss_at(5, step))).collect();
    assert_eq!(losses(&story), curve, "a step is missing or told twice");
    let whole = open(&Arc::new(tempfile::tempdir().unwrap()), Fake::default()).await;
    let (uninterrupted, _) = whole
        .jobs
        .create(request("acme", "tickets", 5), None)
        .await
        .unwrap();
    until(&whole, &uninterrupted.name, |job| job.state.is_final()).await;
    let reference = AdapterRef::parse("tenants/acme/adapters/tickets").unwrap();
    let ours = again.registry.get_version(reference.clone()).await.unwrap();
    let theirs = whole.registry.get_version(reference).await.unwrap();
    assert_eq!(ours.content.digest, theirs.content.digest);
    assert_eq!(ours.name.number.get(), 1);
    let left: i64 = again
        .database
        .read(|tx| {
            Ok::<_, DatabaseError>(
                tx.query_row("SELECT count(*) FROM checkpoints", [], |r| r.get(0))?,
            )
        })
        .await
        .unwrap();
    assert_eq!(left, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_job_never_publishes() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let hold = Arc::new(AtomicBool::new(true));
    let fake = Fake {
        hold: Arc::clone(&hold),
        ..Fake::default()
    };
    let bench = open(&dir, fake).await;
    let mut names = Vec::new();
    for seed in 0..3 {
        let (job, _) = bench
            .jobs
            .create(request("acme", "tickets", seed), None)
            .await
            .unwrap();
        names.push(job.name);
    }
    until(&bench, &names[0], |job| job.state == JobState::Running).await;
    // The third waits for a place and has not begun.
    for name in [&names[2], &names[0]] {
        let job = bench.jobs.cancel(name.clone()).await.unwrap();
        assert_eq!(job.state, JobState::Cancelled);
        assert!(matches!(
            bench.jobs.cancel(name.clone()).await,
            Err(JobError::InvalidState {
                state: JobState::Cancelled,
                ..
            })
        ));
    }
    hold.store(false, Ordering::SeqCst);
    let done = until(&bench, &names[1], |job| job.state.is_final()).await;
    assert_eq!(
        done.version.as_deref(),
        Some("tenants/acme/adapters/tickets/versions/1")
    );
    let adapter = AdapterName::parse("tenants/acme/adapters/tickets").unwrap();
    assert_eq!(
        bench
            .registry
            .get_adapter(adapter)
            .await
            .unwrap()
            .version_count,
        1
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_job_holds_nothing_and_goes_on_where_it_was() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let hold = Arc::new(AtomicBool::new(true));
    let started: Arc<Mutex<Vec<(String, u64)>>> = Arc::default();
    let fake = || Fake {
        hold: Arc::clone(&hold),
        started: Arc::clone(&started),
        ..Fake::default()
    };
    let bench = open(&dir, fake()).await;
    let mut names = Vec::new();
    for seed in 0..3 {
        let job = request("acme", "tickets", seed);
        names.push(bench.jobs.create(job, None).await.unwrap().0.name);
    }
    until(&bench, &names[0], |job| job.state == JobState::Running).await;
    let unasked = bench.jobs.resume(names[0].clone()).await;
    assert!(matches!(unasked, Err(JobError::InvalidState { .. })));
    // The first is at work, the third waits for a place; pausing twice changes nothing.
    for name in [&names[2], &names[0], &names[0]] {
        let job = bench.jobs.pause(name.clone()).await.unwrap();
        assert_eq!((job.state, job.end_time), (JobState::Paused, None));
    }
    // A paused job that is cancelled ends at once.
    let ended = bench.jobs.cancel(names[2].clone()).await.unwrap();
    assert_eq!(ended.state, JobState::Cancelled);
    let late = bench.jobs.pause(names[2].clone()).await;
    assert!(matches!(late, Err(JobError::InvalidState { .. })));

    // It stays aside over a restart.
    drop(bench);
    hold.store(false, Ordering::SeqCst);
    let bench = open(&dir, fake()).await;
    until(&bench, &names[1], |job| job.state.is_final()).await;
    let still = bench.jobs.get(names[0].clone()).await.unwrap();
    assert_eq!(still.state, JobState::Paused);
    let queued = bench.jobs.resume(names[0].clone()).await.unwrap();
    assert!(!queued.pause_asked);
    let done = until(&bench, &names[0], |job| job.state.is_final()).await;
    assert_eq!(done.state, JobState::Succeeded);
    let story = watched(&bench, &names[0], 0).await;
    let steps: Vec<u64> = story
        .iter()
        .filter_map(|event| match event.happening {
            Happening::Step { step, .. } => Some(step),
            _ => None,
        })
        .collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>());
    let first_steps = started.lock().unwrap();
    let of_first = |(name, _): &&(String, u64)| *name == names[0].to_string();
    let began: Vec<u64> = first_steps.iter().filter(of_first).map(|s| s.1).collect();
    assert_eq!(began, [0, HELD]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_that_was_answered_survives_a_crash() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let fake = Fake {
        die_after: Some(2),
        ..Fake::default()
    };
    let bench = open(&dir, fake).await;
    let (job, _) = bench
        .jobs
        .create(request("acme", "tickets", 1), None)
        .await
        .unwrap();
    until(&bench, &job.name, |job| job.progress.step == 2).await;
    let key = bench
        .database
        .write({
            let name = job.name.clone();
            move |tx| {
                let (key, _) = rows::by_name(tx, &name)?;
                rows::ask_cancel(tx, key)?;
                Ok::<_, JobError>(key)
            }
        })
        .await
        .unwrap();
    assert!(key.0 > 0);
    let again = open(&bench.dir, Fake::default()).await;
    let done = again.jobs.get(job.name).await.unwrap();
    assert_eq!((done.state, done.version), (JobState::Cancelled, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_take_turns_and_the_engine_is_not_flooded() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let hold = Arc::new(AtomicBool::new(true));
    let fake = Fake {
        hold: Arc::clone(&hold),
        ..Fake::default()
    };
    let (started, most) = (Arc::clone(&fake.started), Arc::clone(&fake.most));
    let bench = open(&dir, fake).await;
    let mut names = Vec::new();
    for seed in 0..4 {
        names.push(
            bench
                .jobs
                .create(request("acme", "a", seed), None)
                .await
                .unwrap()
                .0
                .name,
        );
    }
    until(&bench, &names[1], |job| job.state == JobState::Running).await;
    names.push(
        bench
            .jobs
            .create(request("globex", "a", 9), None)
            .await
            .unwrap()
            .0
            .name,
    );
    hold.store(false, Ordering::SeqCst);
    for name in &names {
        until(&bench, name, |job| job.state == JobState::Succeeded).await;
    }
    let order: Vec<String> = started
        .lock()
        .unwrap()
        .iter()
        .map(|(job, _)| job.clone())
        .collect();
    let place = order.iter().position(|job| job.contains("globex")).unwrap();
    assert_eq!(place, 2, "globex waited behind a flooder: {order:?}");
    assert_eq!(most.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_request_id_is_the_same_job() {
    let hold = Arc::new(AtomicBool::new(true));
    let fake = Fake {
        hold,
        ..Fake::default()
    };
    let bench = open(&Arc::new(tempfile::tempdir().unwrap()), fake).await;
    let key = |payload: u8| {
        Some(RequestKey {
            tenant: "acme".into(),
            method: "CreateTrainingJob",
            request_id: "r".into(),
            payload: [payload; 32],
        })
    };
    let racing: Vec<_> = (0..4)
        .map(|_| {
            let jobs = bench.jobs.clone();
            tokio::spawn(async move {
                jobs.create(request("acme", "a", 1), key(1))
                    .await
                    .unwrap()
                    .0
                    .name
            })
        })
        .collect();
    let mut names = Vec::new();
    for task in racing {
        names.push(task.await.unwrap());
    }
    names.dedup();
    assert_eq!(names.len(), 1);
    assert!(matches!(
        bench.jobs.create(request("acme", "a", 2), key(2)).await,
        Err(JobError::RequestIdReused { .. })
    ));
    for _ in 0..4 {
        bench
            .jobs
            .create(request("acme", "a", 3), None)
            .await
            .unwrap();
    }
    assert!(matches!(
        bench.jobs.create(request("acme", "a", 3), None).await,
        Err(JobError::Limit {
            value: 6,
            limit: 5,
            ..
        })
    ));
    let tenant = TenantId::parse("acme").unwrap();
    let page = bench
        .jobs
        .list(
            tenant.clone(),
            PageRequest {
                size: 2,
                after: None,
            },
        )
        .await
        .unwrap();
    let rest = bench
        .jobs
        .list(
            tenant,
            PageRequest {
                size: 9,
                after: page.next,
            },
        )
        .await
        .unwrap();
    assert_eq!(
        (page.items.len(), rest.items.len(), rest.next),
        (2, 3, None)
    );
    assert_eq!(rest.items[2].name, names[0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_work_is_refused_before_it_starts() {
    let bench = open(&Arc::new(tempfile::tempdir().unwrap()), Fake::default()).await;
    let refused = |change: fn(&mut JobRequest)| {
        let jobs = bench.jobs.clone();
        let mut asked = request("acme", "a", 1);
        change(&mut asked);
        async move { jobs.create(asked, None).await.map(|_| ()).unwrap_err() }
    };
    let inline = |text: &str| DataInput::Inline {
        format: Format::Jsonl,
        columns: ColumnNames::default(),
        bytes: text.as_bytes().to_vec(),
    };
    let _ = inline;
    let error = refused(|job| {
        job.data = DataInput::Inline {
            format: Format::Jsonl,
            columns: ColumnNames::default(),
            bytes: b"{\"text\":\"a\",\"label\":\"x\"}\nnot json\n{\"text\":\"\",\"label\":\"y\"}\n"
                .to_vec(),
        }
    })
    .await;
    let JobError::Data { field, report, .. } = &error else {
        panic!("{error}");
    };
    let lines: Vec<u64> = report.errors.iter().map(|finding| finding.line).collect();
    assert_eq!((field.as_str(), lines), ("spec.data", vec![2, 3]));
    let error = refused(|job| {
        job.method = JobMethod::Supervised {
            train_on: espalier_adapters::train::examples::TrainOn::All,
        }
    })
    .await;
    assert!(
        matches!(&error, JobError::InvalidField { field, .. } if field == "spec.data"),
        "{error}"
    );
    let error = refused(|job| job.validation = ValidationInput::Fraction(0.6)).await;
    assert!(matches!(&error, JobError::InvalidField { .. }), "{error}");
    let error =
        refused(|job| job.from = Some(AdapterRef::parse("tenants/acme/adapters/zz").unwrap()))
            .await;
    assert!(matches!(
        error,
        JobError::Registry(RegistryError::AdapterNotFound { .. })
    ));
    let error = refused(|job| {
        job.data = DataInput::Dataset(DatasetName::parse("tenants/acme/datasets/zz").unwrap());
    })
    .await;
    assert!(matches!(
        error,
        JobError::Dataset(DatasetError::NotFound { .. })
    ));
    let error = refused(|job| {
        job.keep_aliases = true;
        job.aliases = vec![Alias::default_alias()];
    })
    .await;
    assert!(matches!(error, JobError::InvalidField { .. }));
    let error = refused(|job| {
        job.adapter = AdapterName::parse("tenants/nobody/adapters/a").unwrap();
    })
    .await;
    assert!(matches!(error, JobError::TenantNotFound { .. }));
    // A dry run of a good job stores nothing either.
    let (quote, estimate) = bench.jobs.quote(request("acme", "a", 1)).await.unwrap();
    assert_eq!(quote.stats.labels, ["no", "yes"]);
    assert_eq!(
        (estimate.queue_position, estimate.unmeasured.as_str()),
        (0, "")
    );
    assert!(estimate.seconds.unwrap() > 0.0 && estimate.tokens_per_second > 0.0);
    let page = PageRequest {
        size: 9,
        after: None,
    };
    let none = bench
        .jobs
        .list(TenantId::parse("acme").unwrap(), page)
        .await
        .unwrap();
    assert!(none.items.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_in_a_job_and_its_dataset_cannot_be_deleted() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let hold = Arc::new(AtomicBool::new(false));
    let fake = Fake {
        hold: Arc::clone(&hold),
        ..Fake::default()
    };
    let bench = open(&dir, fake).await;
    let (first, _) = bench
        .jobs
        .create(request("acme", "a", 1), None)
        .await
        .unwrap();
    until(&bench, &first.name, |job| job.state == JobState::Succeeded).await;
    hold.store(true, Ordering::SeqCst);
    let mut next = request("acme", "b", 2);
    next.from = Some(AdapterRef::parse("tenants/acme/adapters/a").unwrap());
    next.keep_aliases = true;
    let (job, _) = bench.jobs.create(next, None).await.unwrap();
    assert_eq!(
        job.spec.from_version.as_deref(),
        Some("tenants/acme/adapters/a/versions/1")
    );
    let adapter = AdapterName::parse("tenants/acme/adapters/a").unwrap();
    assert!(matches!(
        bench
            .registry
            .delete_adapter(adapter.clone(), None, true)
            .await,
        Err(RegistryError::InUse { .. })
    ));
    hold.store(false, Ordering::SeqCst);
    until(&bench, &job.name, |job| job.state == JobState::Succeeded).await;
    bench
        .registry
        .delete_adapter(adapter, None, true)
        .await
        .unwrap();
    let kept = VersionName::parse("tenants/acme/adapters/b/versions/1").unwrap();
    let version = bench.registry.get_version(kept.into()).await.unwrap();
    assert!(version.aliases.is_empty(), "keep_aliases moved one");
}

/// A job that climbs: what its rows are measured on is carved from them.
fn ladder(adapter: &str) -> JobRequest {
    JobRequest {
        method: JobMethod::Classification {
            head_only: false,
            labels: vec![],
            options: ClassOptions {
                ladder: true,
                ..ClassOptions::default()
            },
        },
        validation: ValidationInput::Fraction(0.25),
        ..request("acme", adapter, 5)
    }
}

fn published(events: &[Event]) -> Vec<String> {
    let version = |event: &Event| match &event.happening {
        Happening::Published { version, .. } => Some(version.clone()),
        _ => None,
    };
    events.iter().filter_map(version).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ladder_promotes_lora_only_where_it_is_better() {
    for (accuracy, versions) in [(0.9, 2), (0.75, 1), (0.5, 1)] {
        let fake = Fake {
            lora_accuracy: accuracy,
            ..Fake::default()
        };
        let bench = open(&Arc::new(tempfile::tempdir().unwrap()), fake).await;
        let (job, _) = bench.jobs.create(ladder("climbs"), None).await.unwrap();
        let events = watched(&bench, &job.name, 0).await;
        let numbers: Vec<u64> = events.iter().map(|event| event.sequence).collect();
        assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
        // Both rungs are shown, each from its first step.
        let curve: Vec<u64> = losses(&events).into_iter().map(|(step, _)| step).collect();
        assert_eq!(curve, (1..=STEPS).chain(1..=STEPS).collect::<Vec<_>>());
        let name = |n: usize| format!("tenants/acme/adapters/climbs/versions/{n}");
        let all: Vec<String> = (1..=versions).map(name).collect();
        assert_eq!(published(&events), all, "LoRA had {accuracy}");
        let done = bench.jobs.get(job.name.clone()).await.unwrap();
        assert_eq!(done.state, JobState::Succeeded);
        assert_eq!(done.version, all.last().cloned());
        let alias = AdapterRef::parse("tenants/acme/adapters/climbs").unwrap();
        let live = bench.registry.get_version(alias).await.unwrap();
        assert_eq!(Some(live.name.to_string()), done.version);
        let Happening::State { reason, .. } = &events.last().unwrap().happening else {
            panic!("the last event brings the state")
        };
        assert_eq!(reason.contains("stays live"), versions == 1, "{reason}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ladder_killed_on_either_rung_goes_on_where_it_was() {
    for (head, lora, heads) in [(Some(7), None, 2), (None, Some(7), 1)] {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let fake = Fake {
            die_after: head,
            die_with_lora: lora,
            lora_accuracy: 0.9,
            ..Fake::default()
        };
        let bench = open(&dir, fake).await;
        let (job, _) = bench.jobs.create(ladder("climbs"), None).await.unwrap();
        let climbed = lora.is_some();
        until(&bench, &job.name, |job| {
            job.progress.step == 7 && job.progress.first_rung.is_some() == climbed
        })
        .await;
        let head_is_live = bench.jobs.get(job.name.clone()).await.unwrap().version;
        assert_eq!(head_is_live.is_some(), climbed);
        drop(bench);
        let started = Arc::new(Mutex::new(Vec::new()));
        let again = Fake {
            started: Arc::clone(&started),
            lora_accuracy: 0.9,
            ..Fake::default()
        };
        let bench = open(&dir, again).await;
        let done = until(&bench, &job.name, |job| job.state.is_final()).await;
        assert_eq!(done.state, JobState::Succeeded, "{:?}", done.error);
        let events = watched(&bench, &job.name, 0).await;
        assert_eq!(published(&events).len(), 2, "each rung once");
        assert_eq!(losses(&events).len() as u64, 2 * STEPS);
        // From the checkpoint of the rung that was cut; the next rung from its beginning.
        let from: Vec<u64> = started.lock().unwrap().iter().map(|(_, at)| *at).collect();
        assert_eq!(from, [4, 0][..heads]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ladder_without_a_way_up_is_refused() {
    let bench = open(&Arc::new(tempfile::tempdir().unwrap()), Fake::default()).await;
    let refused = async |change: &dyn Fn(&mut JobRequest)| {
        let mut request = ladder("climbs");
        change(&mut request);
        bench
            .jobs
            .create(request, None)
            .await
            .unwrap_err()
            .to_string()
    };
    let why = refused(&|request| request.validation = ValidationInput::None).await;
    assert!(
        why.contains("ladder") && why.contains("validation"),
        "{why}"
    );
    let why = refused(&|request| {
        if let JobMethod::Classification { head_only, .. } = &mut request.method {
            *head_only = true;
        }
    })
    .await;
    assert!(why.contains("ladder") && why.contains("head_only"), "{why}");
}
