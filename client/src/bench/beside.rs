//! What goes on beside the requests: training jobs, uploads and alias moves, over and over until
//! the test ends, each timed. It is load that the requests' latencies are measured under, and
//! takes no part in their figures.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};
use tokio::task::JoinSet;

use crate::{
    bench::{quantity, statistics::Figures},
    client::Client,
    error::Error,
    training::is_final,
    transfer::AdapterUpload,
    v1,
};

/// How often a job is asked whether it has ended.
const GLANCE: Duration = Duration::from_millis(200);

/// One kind of work, as a command line writes it: `train:file=rows.jsonl,adapter=x,jobs=2`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Beside {
    /// So many jobs at a time; when one has ended the next begins.
    Train(Box<Train>),
    /// A directory again and again, each time as a new version.
    Upload {
        dir: PathBuf,
        adapter: String,
        every: Duration,
    },
    /// An alias around a list of versions.
    Alias {
        adapter: String,
        alias: String,
        versions: Vec<String>,
        every: Duration,
    },
}

impl fmt::Display for Beside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Train(train) => write!(
                f,
                "train:file={},adapter={},jobs={},steps={}",
                train.file.display(),
                train.adapter,
                train.jobs,
                train.steps
            ),
            Self::Upload {
                dir,
                adapter,
                every,
            } => {
                let ms = every.as_millis();
                write!(
                    f,
                    "upload:dir={},adapter={adapter},every={ms}ms",
                    dir.display()
                )
            }
            Self::Alias {
                adapter,
                alias,
                versions,
                every,
            } => {
                let (versions, ms) = (versions.join("/"), every.as_millis());
                write!(
                    f,
                    "alias:adapter={adapter}@{alias},versions={versions},every={ms}ms"
                )
            }
        }
    }
}

/// Training jobs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Train {
    pub(crate) file: PathBuf,
    pub(crate) adapter: String,
    pub(crate) jobs: usize,
    pub(crate) steps: u64,
    classifies: bool,
    head_only: bool,
    columns: v1::ColumnNames,
}

const FORMS: &str = "write train:file=FILE,adapter=NAME[,jobs=1][,steps=100][,method=sft|classify|head][,COLUMN=NAME], \
     upload:dir=DIR,adapter=NAME[,every=5s] or alias:adapter=NAME@ALIAS,versions=1/2[,every=1s]";

/// `key=value` pairs that are taken one by one, so that one left over is noticed.
struct Pairs(BTreeMap<String, String>);

impl Pairs {
    fn read(text: &str) -> Result<Self, String> {
        let mut pairs = BTreeMap::new();
        for part in text.split(',') {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| format!("{part:?} is not KEY=VALUE; {FORMS}"))?;
            pairs.insert(key.trim().to_owned(), value.to_owned());
        }
        Ok(Self(pairs))
    }

    fn needed(&mut self, key: &str) -> Result<String, String> {
        let found = self.0.remove(key).filter(|value| !value.is_empty());
        found.ok_or_else(|| format!("{key}= is missing; {FORMS}"))
    }

    fn number(&mut self, key: &str, otherwise: u64, limit: usize) -> Result<u64, String> {
        match self.0.remove(key) {
            Some(text) => quantity::count(&text, limit)
                .map(|count| count as u64)
                .map_err(|error| format!("{key}: {error}")),
            None => Ok(otherwise),
        }
    }

    fn every(&mut self, otherwise: Duration) -> Result<Duration, String> {
        match self.0.remove("every") {
            Some(text) => quantity::duration(&text).map_err(|error| format!("every: {error}")),
            None => Ok(otherwise),
        }
    }

    fn column(&mut self, key: &str) -> String {
        self.0.remove(key).unwrap_or_default()
    }

    fn end(self) -> Result<(), String> {
        match self.0.into_keys().next() {
            Some(key) => Err(format!("{key}= is not known here; {FORMS}")),
            None => Ok(()),
        }
    }
}

impl FromStr for Beside {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, rest) = text
            .split_once(':')
            .ok_or_else(|| format!("{text:?} is no work; {FORMS}"))?;
        let mut pairs = Pairs::read(rest)?;
        let work = match kind {
            "train" => {
                let method = pairs.column("method");
                if !["", "sft", "classify", "head"].contains(&method.as_str()) {
                    return Err(format!("method {method:?} is none of sft, classify, head"));
                }
                Self::Train(Box::new(Train {
                    file: pairs.needed("file")?.into(),
                    adapter: pairs.needed("adapter")?,
                    jobs: pairs.number("jobs", 1, 64)? as usize,
                    steps: pairs.number("steps", 100, 1_000_000)?,
                    classifies: method == "classify" || method == "head",
                    head_only: method == "head",
                    columns: v1::ColumnNames {
                        text: pairs.column("text"),
                        label: pairs.column("label"),
                        prompt: pairs.column("prompt"),
                        completion: pairs.column("completion"),
                        messages: pairs.column("messages"),
                        ..Default::default()
                    },
                }))
            }
            "upload" => Self::Upload {
                dir: pairs.needed("dir")?.into(),
                adapter: pairs.needed("adapter")?,
                every: pairs.every(Duration::from_secs(5))?,
            },
            "alias" => {
                let named = pairs.needed("adapter")?;
                let (adapter, alias) = named
                    .split_once('@')
                    .ok_or_else(|| format!("{named:?} names no alias; {FORMS}"))?;
                let versions = pairs.needed("versions")?;
                Self::Alias {
                    adapter: adapter.to_owned(),
                    alias: alias.to_owned(),
                    versions: versions.split('/').map(str::to_owned).collect(),
                    every: pairs.every(Duration::from_secs(1))?,
                }
            }
            _ => return Err(format!("{kind:?} is no work; {FORMS}")),
        };
        pairs.end()?;
        Ok(work)
    }
}

/// What was done, by kind: how long each took, in microseconds, and what failed.
#[derive(Clone, Debug, Default)]
struct Done {
    took: Vec<u64>,
    failed: u64,
    /// The first error.
    example: Option<String>,
    /// Begun and not ended when the test was over.
    unfinished: u64,
}

type Ledger = Arc<Mutex<BTreeMap<&'static str, Done>>>;

/// Work that goes on until [`Work::end`].
#[derive(Debug)]
pub(crate) struct Work {
    workers: JoinSet<()>,
    ledger: Ledger,
    /// Jobs that run now; those left at the end are cancelled.
    jobs: Arc<Mutex<Vec<String>>>,
    client: Client,
}

// === impl Work ===

impl Work {
    /// Files are read before anything begins, so that a wrong path is an error and no result.
    pub(crate) fn begin(all: &[Beside], client: &Client) -> Result<Self, Error> {
        let ledger = Ledger::default();
        let jobs = Arc::default();
        let mut workers = JoinSet::new();
        for work in all {
            let worker = Worker {
                client: client.clone(),
                ledger: Arc::clone(&ledger),
                jobs: Arc::clone(&jobs),
            };
            match work {
                Beside::Train(train) => {
                    let request = train.request(client)?;
                    for number in 0..train.jobs {
                        let (worker, request) = (worker.clone(), request.clone());
                        workers.spawn(worker.train(request, number as u64));
                    }
                }
                Beside::Upload {
                    dir,
                    adapter,
                    every,
                } => {
                    let upload = AdapterUpload {
                        adapter: client.names().adapter(adapter)?,
                        dir: dir.clone(),
                        create_if_missing: true,
                        ..AdapterUpload::default()
                    };
                    if !dir.is_dir() {
                        let text = format!("--beside upload: {} is no directory", dir.display());
                        return Err(Error::argument(text));
                    }
                    workers.spawn(worker.upload(upload, *every));
                }
                Beside::Alias {
                    adapter,
                    alias,
                    versions,
                    every,
                } => {
                    let name = client.names().adapter(adapter)?;
                    let (alias, versions) = (alias.clone(), versions.clone());
                    workers.spawn(worker.alias(name, alias, versions, *every));
                }
            }
        }
        Ok(Self {
            workers,
            ledger,
            jobs,
            client: client.clone(),
        })
    }

    /// Ends the work, cancels jobs that still run, and says what was done: one entry a kind.
    pub(crate) async fn end(mut self) -> Map<String, Value> {
        self.workers.shutdown().await;
        let left = std::mem::take(&mut *self.jobs.lock().unwrap_or_else(PoisonError::into_inner));
        for job in &left {
            // One that has ended meanwhile cannot be cancelled, and need not be.
            let _ = self.client.cancel_training_job(job).await;
        }
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        if !left.is_empty() {
            ledger.entry("train").or_default().unfinished = left.len() as u64;
        }
        let entry = |(kind, done): (&&str, &mut Done)| {
            let figures = Figures::of_values(&mut done.took);
            let value = json!({
                "completed": done.took.len(),
                "failed": done.failed,
                "unfinished": done.unfinished,
                "example": done.example,
                "ms": figures.map(|figures| figures.to_json()),
            });
            ((*kind).to_owned(), value)
        };
        ledger.iter_mut().map(entry).collect()
    }
}

#[derive(Clone)]
struct Worker {
    client: Client,
    ledger: Ledger,
    jobs: Arc<Mutex<Vec<String>>>,
}

// === impl Worker ===

impl Worker {
    fn book(&self, kind: &'static str, began: Instant, outcome: Result<(), Error>) {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let done = ledger.entry(kind).or_default();
        match outcome {
            Ok(()) => done.took.push(quantity::micros(began.elapsed())),
            Err(error) => {
                done.failed += 1;
                done.example.get_or_insert_with(|| error.to_string());
            }
        }
    }

    async fn train(self, mut request: v1::CreateTrainingJobRequest, number: u64) {
        let mut round = 0;
        loop {
            if let Some(spec) = &mut request.spec {
                spec.seed = Some(number * 1_000_003 + round);
            }
            round += 1;
            let began = Instant::now();
            let outcome = self.one_job(request.clone()).await;
            let failed = outcome.is_err();
            self.book("train", began, outcome);
            if failed {
                // A server that refuses must not be asked in a tight loop.
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }

    /// From the request to the new version.
    async fn one_job(&self, request: v1::CreateTrainingJobRequest) -> Result<(), Error> {
        let reply = self.client.create_training_job(request).await?;
        let name = reply.job.map(|job| job.name).unwrap_or_default();
        let lock = || self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        lock().push(name.clone());
        let state = loop {
            tokio::time::sleep(GLANCE).await;
            let job = self.client.get_training_job(&name).await?;
            if is_final(job.state()) {
                break job.state();
            }
        };
        lock().retain(|one| *one != name);
        if state == v1::TrainingJobState::Succeeded {
            Ok(())
        } else {
            Err(Error::argument(format!(
                "{name} ended as {}",
                state.as_str_name()
            )))
        }
    }

    async fn upload(self, upload: AdapterUpload, every: Duration) {
        let mut ticks = tokio::time::interval(every.max(Duration::from_millis(1)));
        loop {
            ticks.tick().await;
            let began = Instant::now();
            let outcome = self.client.upload_adapter(upload.clone()).await;
            self.book("upload", began, outcome.map(drop));
        }
    }

    async fn alias(self, adapter: String, alias: String, versions: Vec<String>, every: Duration) {
        let mut ticks = tokio::time::interval(every.max(Duration::from_millis(1)));
        for version in versions.iter().cycle() {
            ticks.tick().await;
            let began = Instant::now();
            let outcome = self.client.set_alias(&adapter, &alias, version).await;
            self.book("alias", began, outcome.map(drop));
        }
    }
}

fn format_of(path: &Path) -> v1::DataFormat {
    match path.extension().and_then(|found| found.to_str()) {
        Some("csv") => v1::DataFormat::Csv,
        Some("tsv") => v1::DataFormat::Tsv,
        _ => v1::DataFormat::Jsonl,
    }
}

// === impl Train ===

impl Train {
    fn request(&self, client: &Client) -> Result<v1::CreateTrainingJobRequest, Error> {
        use v1::training_spec::Method;
        let content = std::fs::read(&self.file).map_err(|error| Error::file(&self.file, &error))?;
        let rows = v1::InlineData {
            format: format_of(&self.file).into(),
            content,
            columns: Some(self.columns.clone()),
            sha256: String::new(),
        };
        let method = if self.classifies {
            Method::Classification(v1::ClassificationMethod {
                head_only: self.head_only.then_some(true),
                ..v1::ClassificationMethod::default()
            })
        } else {
            Method::Supervised(v1::SupervisedMethod::default())
        };
        Ok(v1::CreateTrainingJobRequest {
            parent: client.names().parent()?,
            spec: Some(v1::TrainingSpec {
                adapter: client.names().adapter(&self.adapter)?,
                method: Some(method),
                data: Some(v1::TrainingData {
                    source: Some(v1::training_data::Source::Inline(rows)),
                }),
                hyper_parameters: Some(v1::HyperParameters {
                    max_steps: Some(self.steps),
                    // The most that a server takes; the steps above decide.
                    epochs: Some(100.0),
                    ..v1::HyperParameters::default()
                }),
                ..v1::TrainingSpec::default()
            }),
            ..v1::CreateTrainingJobRequest::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_read_with_its_defaults() {
        let train: Beside = "train:file=a.csv,adapter=x,method=head,text=ticket"
            .parse()
            .unwrap();
        let Beside::Train(train) = train else {
            panic!("training")
        };
        assert_eq!((train.jobs, train.steps), (1, 100));
        assert!(train.classifies && train.head_only);
        assert_eq!(train.columns.text, "ticket");
        let alias: Beside = "alias:adapter=x@live,versions=1/2,every=100ms"
            .parse()
            .unwrap();
        let Beside::Alias {
            adapter,
            alias,
            versions,
            every,
        } = alias
        else {
            panic!("alias")
        };
        assert_eq!((adapter.as_str(), alias.as_str()), ("x", "live"));
        assert_eq!((versions.len(), every), (2, Duration::from_millis(100)));
    }

    #[test]
    fn refusals_name_the_key() {
        for (wrong, hint) in [
            ("train", "is no work"),
            ("dance:a=b", "is no work"),
            ("train:adapter=x", "file= is missing"),
            ("train:file=a,adapter=x,jobs=0", "jobs"),
            ("train:file=a,adapter=x,method=magic", "none of sft"),
            ("upload:dir=a,adapter=x,often=1", "often= is not known"),
            ("upload:dir=a,adapter=x,every=5", "unit is missing"),
            ("alias:adapter=x,versions=1", "names no alias"),
        ] {
            let error = wrong.parse::<Beside>().unwrap_err();
            assert!(error.contains(hint), "{wrong}: {error}");
        }
    }
}
