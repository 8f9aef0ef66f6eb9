//! From a job's description and bytes to what the trainer runs: a pure function, called once to check a new job and again at
//! every start of it, so that a resumed job sees the same examples in the same order.
//!
//! This file must not know storage, queues or states.

use std::collections::HashSet;
use std::sync::Arc;

use espalier_adapters::config::{AdapterConfig, BaseShape};
use espalier_adapters::profile::ServingProfile;
use espalier_adapters::text::{ChatTemplate, Tokenizer};
use espalier_adapters::train::dataset::{
    ColumnNames, DataLimits, DataReport, Dataset, Format, Kind, Row,
};
use espalier_adapters::train::examples::{
    self, Encoded, Encoding, Examples, TrainOn, default_window,
};
use espalier_adapters::train::statistics::{Part, Statistics};
use espalier_adapters::weights::AdapterWeights;
use espalier_engine::model::Family;
use espalier_engine::train::trainer::{Method, TrainPlan};

use super::JobError;
use super::defaults::Circumstances;
use super::events::DataStats;
use super::spec::{JobMethod, JobSpec};
use crate::datasets::inspect;

/// What the server knows of the base model.
#[derive(Clone)]
pub struct Base {
    /// What its file calls it.
    pub name: String,
    /// Its resource name, `models/{m}`.
    pub resource: String,
    /// Digest of its source weights.
    pub digest: String,
    /// Its sizes.
    pub shape: BaseShape,
    /// Its family.
    pub family: Family,
    /// Tokens of one sequence at most.
    pub max_tokens: usize,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template, if it has one.
    pub template: Option<Arc<ChatTemplate>>,
    /// Ids that end a generation.
    pub stop_ids: Vec<u32>,
}

/// Bytes of rows and how to read them.
#[derive(Debug, Clone)]
pub(super) struct DataBytes {
    pub(super) bytes: Vec<u8>,
    pub(super) format: Format,
    pub(super) columns: ColumnNames,
}

/// What decides the examples, before any default is filled in.
pub(super) struct Wanted<'a> {
    pub(super) method: &'a JobMethod,
    pub(super) profile: &'a ServingProfile,
    /// The classes in the order of the head's rows, when they are given; else those of the rows, sorted bytewise.
    pub(super) labels: Option<&'a [String]>,
    pub(super) seed: u64,
    pub(super) fraction: Option<f64>,
    pub(super) max_tokens: usize,
}

impl Wanted<'_> {
    /// Tokens of a window, for the method that cuts its rows.
    fn window(&self, rows: &Dataset) -> Option<usize> {
        match self.method {
            JobMethod::Unsupervised { window_tokens } => {
                Some(window_tokens.unwrap_or_else(|| default_window(rows, self.max_tokens)))
            }
            _ => None,
        }
    }
}

/// Rows of one input and what became of them.
struct Side {
    rows: Dataset,
    encoded: Encoded,
}

impl Side {
    fn part(&self) -> Part<'_> {
        Part {
            rows: self.rows.rows.iter().collect(),
            examples: &self.encoded.examples,
            too_long: &self.encoded.too_long,
        }
    }
}

/// Examples to train on and to measure on.
pub(super) struct Material {
    pub(super) train: Examples,
    pub(super) valid: Option<Examples>,
    /// Tokens of a window of raw text.
    pub(super) window: Option<usize>,
    /// Doubtful lines that were taken.
    pub(super) warnings: DataReport,
    rows: Dataset,
    /// Unless the validation part was carved from `rows`.
    valid_rows: Option<Dataset>,
}

impl Material {
    /// Reads rows, tokenizes them as serving would, and carves the validation part.
    pub(super) fn build(
        wanted: &Wanted<'_>,
        train: &DataBytes,
        valid: Option<&DataBytes>,
        base: &Base,
        limits: &DataLimits,
    ) -> Result<Self, JobError> {
        let rows = read(train, "data", wanted.method, limits)?;
        let window = wanted.window(&rows);
        let max_tokens = window.unwrap_or(wanted.max_tokens);
        let train = tokenize(rows, wanted, (max_tokens, wanted.labels), base, limits);
        let valid = match valid {
            None => None,
            Some(valid) => {
                let rows = read(valid, "validation_data", wanted.method, limits)?;
                same_kind(&train.rows, &rows)?;
                let given = (max_tokens, train.encoded.examples.labels.as_deref());
                Some(tokenize(rows, wanted, given, base, limits))
            }
        };
        refuse_bad_rows(&train, valid.as_ref(), wanted.max_tokens)?;
        if let Some(found) = &train.encoded.examples.labels
            && found.len() < least_labels(train.rows.kind)
        {
            return Err(JobError::InvalidField {
                field: "spec.data".to_owned(),
                reason: format!(
                    "a classifier needs at least {} labels, the rows have {}",
                    least_labels(train.rows.kind),
                    found.len()
                ),
            });
        }
        let mut warnings = train.rows.report.clone();
        if let Some(valid) = &valid {
            for warning in valid.rows.report.warnings.iter().cloned() {
                warnings.warning(warning, limits.max_findings);
            }
        }
        let (rows, examples) = (train.rows, train.encoded.examples);
        let (valid_rows, valid) = valid.map(|side| (side.rows, side.encoded.examples)).unzip();
        let (train, valid) = match wanted.fraction {
            Some(fraction) if valid.is_none() => carve(examples, &rows, wanted.seed, fraction)?,
            _ => (examples, valid),
        };
        Ok(Self {
            train,
            valid,
            window,
            warnings,
            rows,
            valid_rows,
        })
    }

    /// What the rows are.
    pub(super) fn kind(&self) -> Kind {
        self.rows.kind
    }

    /// What is known of the rows, when an example may have `limit` tokens.
    pub(super) fn statistics(&self, limit: usize) -> Statistics {
        let carved: HashSet<u64> = match (&self.valid, &self.valid_rows) {
            (Some(valid), None) => valid.lines.iter().copied().collect(),
            _ => HashSet::new(),
        };
        let (mut kept, mut held): (Vec<&Row>, Vec<&Row>) = Default::default();
        for (row, line) in self.rows.rows.iter().zip(&self.rows.lines) {
            let side = if carved.contains(line) {
                &mut held
            } else {
                &mut kept
            };
            side.push(row);
        }
        let train = Part {
            rows: kept,
            examples: &self.train,
            too_long: &[],
        };
        let valid = self.valid.as_ref().map(|examples| Part {
            rows: match &self.valid_rows {
                Some(data) => data.rows.iter().collect(),
                None => held,
            },
            examples,
            too_long: &[],
        });
        Statistics::of(&train, valid.as_ref(), limit)
    }

    /// What the defaults depend on.
    pub(super) fn circumstances(&self, base: &Base) -> Circumstances {
        Circumstances {
            examples: self.train.items.len(),
            validated: self.valid.is_some(),
            classifies: self.train.labels.is_some(),
            hidden: base.shape.hidden,
            layers: base.shape.layers,
            family: base.family,
        }
    }

    /// Counts, for the job's description.
    pub(super) fn stats(&self) -> DataStats {
        let train = self.train.stats();
        DataStats {
            train_examples: train.examples,
            valid_examples: self.valid.as_ref().map_or(0, |v| v.items.len() as u64),
            train_tokens: train.tokens,
            train_targets: train.targets,
            labels: self.train.labels.clone().unwrap_or_default(),
        }
    }

    /// The trainer's plan of a frozen job.
    pub(super) fn plan(
        self,
        spec: &JobSpec,
        base: &Base,
        init: Option<AdapterWeights>,
    ) -> Result<TrainPlan, JobError> {
        let (method, classify, head_only) = match &spec.method {
            JobMethod::Supervised { .. } | JobMethod::Unsupervised { .. } => {
                (Method::Lm, false, false)
            }
            JobMethod::Classification {
                head_only, options, ..
            } => {
                let labels = self.train.labels.clone().unwrap_or_default();
                let (head_only, options) = (*head_only, options.head(&labels, &self.train)?);
                let method = Method::Class {
                    labels,
                    head_only,
                    options,
                };
                (method, true, head_only)
            }
        };
        let adapter: Option<AdapterConfig> = match (&spec.way, &spec.lora) {
            (Some(way), _) => Some(way.config(&base.name, classify)),
            (None, Some(lora)) if !head_only => Some(lora.config(&base.name, classify).into()),
            _ => None,
        };
        Ok(TrainPlan {
            method,
            adapter,
            hp: spec.hyper.clone(),
            seed: spec.seed,
            train: self.train,
            valid: self.valid,
            init,
        })
    }
}

/// Labels without which there is nothing to choose.
fn least_labels(kind: Kind) -> usize {
    match kind {
        Kind::Class => 2,
        _ => 1,
    }
}

fn read(
    data: &DataBytes,
    field: &str,
    method: &JobMethod,
    limits: &DataLimits,
) -> Result<Dataset, JobError> {
    let (rows, _) = inspect(&data.bytes, data.format, &data.columns, limits)
        .map_err(|report| JobError::data(field, report, None))?;
    let kinds = method.kinds();
    if kinds.contains(&rows.kind) {
        return Ok(rows);
    }
    let wants: Vec<&str> = kinds.iter().map(|kind| kind.as_str()).collect();
    Err(JobError::InvalidField {
        field: format!("spec.{field}"),
        reason: format!(
            "the method learns from {} rows, these are {} rows: choose the method for them, or other columns",
            wants.join(", "),
            rows.kind.as_str()
        ),
    })
}

/// A head that learns from one kind of rows cannot be measured on another.
fn same_kind(train: &Dataset, valid: &Dataset) -> Result<(), JobError> {
    let answered = |kind| matches!(kind, Kind::Class | Kind::Labels | Kind::Score);
    if train.kind == valid.kind || !answered(train.kind) {
        return Ok(());
    }
    let (train, valid) = (train.kind.as_str(), valid.kind.as_str());
    Err(JobError::InvalidField {
        field: "spec.validation_data".to_owned(),
        reason: format!("these are {valid} rows, and those to train on are {train} rows"),
    })
}

fn tokenize(
    rows: Dataset,
    wanted: &Wanted<'_>,
    (max_tokens, labels): (usize, Option<&[String]>),
    base: &Base,
    limits: &DataLimits,
) -> Side {
    let encoding = Encoding {
        tokenizer: &base.tokenizer,
        template: base.template.as_deref(),
        profile: wanted.profile,
        stop_ids: &base.stop_ids,
        train_on: match wanted.method {
            JobMethod::Supervised { train_on } => *train_on,
            _ => TrainOn::default(),
        },
        max_tokens,
        labels,
        max_findings: limits.max_findings,
    };
    let encoded = examples::encode(&rows, &encoding);
    Side { rows, encoded }
}

/// One bad row refuses them all; what is known of the others is told with it.
fn refuse_bad_rows(train: &Side, valid: Option<&Side>, limit: usize) -> Result<(), JobError> {
    for (field, side) in [("data", Some(train)), ("validation_data", valid)] {
        let bad = side.filter(|side| side.encoded.report.error_count() > 0);
        if let Some(side) = bad {
            let valid = valid.map(Side::part);
            let statistics = Statistics::of(&train.part(), valid.as_ref(), limit);
            let report = side.encoded.report.clone();
            return Err(JobError::data(field, report, Some(statistics)));
        }
    }
    Ok(())
}

/// Holds a part of the examples out.
fn carve(
    examples: Examples,
    rows: &Dataset,
    seed: u64,
    fraction: f64,
) -> Result<(Examples, Option<Examples>), JobError> {
    let (train, valid) = examples.split(seed, fraction, true);
    if valid.is_some() {
        return Ok((train, valid));
    }
    let count = train.items.len();
    let reason = match rows.kind {
        Kind::Text => format!(
            "{fraction} of {} documents ({count} windows) leaves nothing to validate on, because a document is held out \
             whole: send more documents, or validation_data",
            rows.rows.len()
        ),
        _ => format!("{fraction} of {count} examples leaves nothing to validate on"),
    };
    Err(JobError::InvalidField {
        field: "spec.validation_fraction".to_owned(),
        reason,
    })
}
