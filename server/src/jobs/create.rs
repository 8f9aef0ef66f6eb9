//! Accepting a job: everything that can be known to go wrong is found before the reply.

use espalier_adapters::head::stack;
use espalier_adapters::peft;
use espalier_adapters::train::dataset::DataReport;
use espalier_adapters::train::statistics::Statistics;
use espalier_adapters::weights::AdapterWeights;
use rusqlite::Transaction;

use super::classification::{ClassOptions, problem_of};
use super::defaults::{self, Choices};
use super::estimate::Estimate;
use super::events::{DataStats, Job, JobState, Progress};
use super::ladder;
use super::plan::{Base, DataBytes, Material, Wanted};
use super::rows::{self, NewJob};
use super::spec::{
    DataInput, DataSource, JobMethod, JobRequest, JobSpec, LoraSpec, Validation, ValidationInput,
};
use super::ways::WaySpec;
use super::{JobError, JobService, Parts};
use crate::artifact_store::{BlobDigest, Pin};
use crate::database::{EarlierUse, RequestKey, earlier_use, now_ms, remember_request};
use crate::names::{Alias, JobId, JobName};
use crate::registry::{self, Version, VersionState};

/// A job that would be accepted.
#[derive(Debug, Clone)]
pub struct Quote {
    /// What it would do.
    pub spec: JobSpec,
    /// Counts of its data.
    pub stats: DataStats,
    /// What is known of its rows.
    pub statistics: Statistics,
    /// Its steps.
    pub total_steps: u64,
    /// Doubtful lines that are taken nevertheless.
    pub warnings: DataReport,
}

struct Prepared {
    quote: Quote,
    material: Material,
    train: DataBytes,
    valid: Option<DataBytes>,
}

impl JobService {
    /// Checks a job and says what it would do and take; stores nothing.
    pub async fn quote(&self, request: JobRequest) -> Result<(Quote, Estimate), JobError> {
        let tenant = request.adapter.tenant.clone();
        let Prepared {
            quote, material, ..
        } = self.prepare(request).await?;
        let (service, spec) = (self.clone(), quote.spec.clone());
        let plan = self
            .inner
            .parts
            .store
            .run(move |_| {
                let parts = &service.inner.parts;
                let init = initial_weights(&spec, parts);
                let plan = init.and_then(|init| material.plan(&spec, &parts.base, init));
                Ok(plan.map(|plan| (plan, spec)))
            })
            .await?;
        let (plan, spec) = plan?;
        let estimate = self.estimate(tenant, &spec, plan).await?;
        Ok((quote, estimate))
    }

    /// Checks a job, stores it and queues it. Durable when this returns. The same request id and payload gives the first job.
    pub async fn create(
        &self,
        request: JobRequest,
        idempotency: Option<RequestKey>,
    ) -> Result<(Job, DataReport), JobError> {
        if let Some(key) = idempotency.clone() {
            let earlier = self
                .inner
                .parts
                .database
                .read(move |tx| seen(tx, &key))
                .await?;
            if let Some(job) = earlier {
                return Ok((job, DataReport::default()));
            }
        }
        let adapter = request.adapter.clone();
        let description = request.description.clone();
        let prepared = self.prepare(request).await?;
        let (train, valid) = (prepared.train.bytes, prepared.valid.map(|v| v.bytes));
        let pins: (Pin, Option<Pin>) = self
            .inner
            .parts
            .store
            .run(move |store| {
                let train = store.put(&train)?;
                let valid = valid.map(|bytes| store.put(&bytes)).transpose()?;
                Ok((train, valid))
            })
            .await?;
        let job = JobId::parse(&uuid::Uuid::now_v7().simple().to_string())
            .map_err(|error| rows::damaged("jobs.job", error))?;
        let Quote {
            spec,
            stats,
            total_steps,
            warnings,
            ..
        } = prepared.quote;
        let new = NewJob {
            name: JobName::new(adapter.tenant.clone(), job),
            adapter,
            spec,
            stats,
            progress: Progress {
                total_steps,
                ..Progress::default()
            },
            train: pins.0.digest(),
            valid: pins.1.as_ref().map(Pin::digest),
        };
        let limits = self.inner.parts.limits.clone();
        let names = *self.inner.parts.registry.limits();
        let job = self
            .inner
            .parts
            .database
            .write(move |tx| {
                // Held until the row names the blobs.
                let _pins = pins;
                if let Some(key) = &idempotency {
                    if let Some(job) = seen(tx, key)? {
                        return Ok(job);
                    }
                    remember_request(tx, key, &new.name.to_string())?;
                }
                let count = rows::unfinished_of(tx, &new.name.tenant)? + 1;
                if count > limits.max_per_tenant {
                    return Err(JobError::Limit {
                        what: "unfinished jobs of the tenant",
                        value: count,
                        limit: limits.max_per_tenant,
                    });
                }
                registry::ensure_adapter(tx, &new.adapter, &description, &names)?;
                let key = rows::insert(tx, &new)?;
                rows::by_key(tx, key)
            })
            .await?;
        self.inner.bell.notify_one();
        Ok((job, warnings))
    }

    async fn prepare(&self, request: JobRequest) -> Result<Prepared, JobError> {
        let parts = &self.inner.parts;
        if request.description.len() > parts.limits.max_description_bytes {
            return Err(JobError::InvalidField {
                field: "spec.description".to_owned(),
                reason: format!(
                    "{} bytes, the limit is {}",
                    request.description.len(),
                    parts.limits.max_description_bytes
                ),
            });
        }
        let tenant = request.adapter.tenant.clone();
        parts
            .database
            .read(move |tx| rows::tenant_exists(tx, &tenant))
            .await?;
        let (train, data) = self.fetch(&request.data, "data").await?;
        let (valid, validation) = match &request.validation {
            ValidationInput::None => (None, Validation::None),
            ValidationInput::Fraction(part) if *part > 0.0 && *part <= 0.5 => {
                (None, Validation::Fraction(*part))
            }
            ValidationInput::Fraction(part) => {
                return Err(JobError::InvalidField {
                    field: "spec.validation_fraction".to_owned(),
                    reason: format!("{part} must be above 0 and at most 0.5"),
                });
            }
            ValidationInput::Data(input) => {
                let (bytes, source) = self.fetch(input, "validation_data").await?;
                (Some(bytes), Validation::Data(Box::new(source)))
            }
        };
        let from = match &request.from {
            None => None,
            Some(reference) => {
                let version = parts.registry.get_version(reference.clone()).await?;
                fits(&version, &request, &parts.base)?;
                Some(version)
            }
        };
        let service = self.clone();
        parts
            .store
            .run(move |_| {
                let sources = Sources { data, validation };
                let parts = &service.inner.parts;
                Ok(
                    quote(&request, sources, from, &train, valid.as_ref(), parts).map(
                        |(quote, material)| Prepared {
                            quote,
                            material,
                            train,
                            valid,
                        },
                    ),
                )
            })
            .await?
    }

    /// The bytes that an input means, and how the job will name them.
    async fn fetch(
        &self,
        input: &DataInput,
        field: &str,
    ) -> Result<(DataBytes, DataSource), JobError> {
        let parts = &self.inner.parts;
        let (bytes, format, columns, dataset) = match input {
            DataInput::Inline {
                format,
                columns,
                bytes,
            } => {
                let lines = bytes.iter().filter(|byte| **byte == b'\n').count();
                // A record may span lines, so this refuses only what is surely over; the parser counts exactly.
                if lines > 64 * parts.limits.max_inline_rows {
                    return Err(JobError::InvalidField {
                        field: format!("spec.{field}.inline"),
                        reason: format!(
                            "{lines} lines, the limit for inline rows is {}: upload a dataset",
                            parts.limits.max_inline_rows
                        ),
                    });
                }
                (bytes.clone(), *format, columns.clone(), None)
            }
            DataInput::Dataset(name) => {
                let dataset = parts.datasets.get(name.clone()).await?;
                let digest = dataset.digest;
                let bytes = parts.store.run(move |store| store.get(digest)).await?;
                let shape = dataset.shape;
                (bytes, shape.format, shape.columns, Some(name.to_string()))
            }
        };
        let source = DataSource {
            dataset,
            format,
            columns: columns.clone(),
            sha256: BlobDigest::of(&bytes).to_string(),
        };
        let data = DataBytes {
            bytes,
            format,
            columns,
        };
        Ok((data, source))
    }
}

struct Sources {
    data: DataSource,
    validation: Validation,
}

/// The job that this request id made before, if it did.
fn seen(tx: &Transaction<'_>, key: &RequestKey) -> Result<Option<Job>, JobError> {
    match earlier_use(tx, key)? {
        EarlierUse::None => Ok(None),
        EarlierUse::Different => Err(JobError::RequestIdReused {
            request_id: key.request_id.clone(),
        }),
        EarlierUse::Same(resource) => {
            let name = JobName::parse(&resource)
                .map_err(|error| rows::damaged("requests.resource", error))?;
            Ok(Some(rows::by_name(tx, &name)?.1))
        }
    }
}

/// The classes that a request fixes: those it names, in bytewise order, or those of the classifier that it goes on from.
fn given_labels(method: &JobMethod, from: Option<&Version>) -> Option<Vec<String>> {
    let JobMethod::Classification { labels, .. } = method else {
        return None;
    };
    if labels.is_empty() {
        let of_version = &from?.content.summary.labels;
        return (!of_version.is_empty()).then(|| of_version.clone());
    }
    let mut labels = labels.clone();
    labels.sort_unstable();
    labels.dedup();
    Some(labels)
}

/// Fills in every default and checks the rest.
fn quote(
    request: &JobRequest,
    sources: Sources,
    from: Option<Version>,
    train: &DataBytes,
    valid: Option<&DataBytes>,
    parts: &Parts,
) -> Result<(Quote, Material), JobError> {
    let (limits, base) = (&parts.limits, &parts.base);
    let mut data_limits = parts.datasets.limits().data;
    let longest = limits.max_example_tokens.min(base.max_tokens);
    let mut choices = Choices::default();
    let max_example_tokens = match request.hyper.max_example_tokens {
        None => {
            let why = "the longest that base and server take";
            choices.make("hyper_parameters.max_example_tokens", longest, why)
        }
        Some(tokens) if (1..=longest).contains(&(tokens as usize)) => tokens as usize,
        Some(tokens) => {
            return Err(JobError::InvalidField {
                field: "hyper_parameters.max_example_tokens".to_owned(),
                reason: format!("{tokens} is outside 1 to {longest}"),
            });
        }
    };
    if let JobMethod::Unsupervised {
        window_tokens: Some(tokens),
    } = request.method
        && !(2..=max_example_tokens).contains(&tokens)
    {
        return Err(JobError::InvalidField {
            field: "spec.unsupervised.window_tokens".to_owned(),
            reason: format!(
                "{tokens} is outside 2 to {max_example_tokens}, the longest example that fits"
            ),
        });
    }
    let seed = match request.seed {
        Some(seed) => seed,
        None => choices.make("seed", rand::random(), "drawn"),
    };
    let labels = given_labels(&request.method, from.as_ref());
    let wanted = Wanted {
        method: &request.method,
        profile: &request.profile,
        labels: labels.as_deref(),
        seed,
        fraction: match sources.validation {
            Validation::Fraction(part) => Some(part),
            _ => None,
        },
        max_tokens: max_example_tokens,
    };
    if sources.data.dataset.is_none() {
        data_limits.max_rows = data_limits.max_rows.min(limits.max_inline_rows);
    }
    let material = Material::build(&wanted, train, valid, base, &data_limits)?;
    if let Some(labels) = &material.train.labels
        && labels.len() > limits.max_labels
    {
        return Err(JobError::InvalidField {
            field: "spec.data".to_owned(),
            reason: format!(
                "{} labels, the limit is {}",
                labels.len(),
                limits.max_labels
            ),
        });
    }
    let at = material.circumstances(base);
    let head_only = matches!(
        request.method,
        JobMethod::Classification {
            head_only: true,
            ..
        }
    );
    let options = match &request.method {
        JobMethod::Classification { options, .. } => {
            let summary = from.as_ref().map(|version| &version.content.summary);
            let options = options.stacked((summary, head_only), &mut choices)?;
            let options = options.settled(problem_of(material.kind()), at.validated)?;
            let labels = material.train.labels.as_deref().unwrap_or_default();
            // Found to be wrong now rather than when the job begins.
            options.head(labels, &material.train)?;
            options
        }
        _ => ClassOptions::default(),
    };
    if let (
        JobMethod::Unsupervised {
            window_tokens: None,
        },
        Some(window),
    ) = (&request.method, material.window)
    {
        let why = "by the size of the text, at most 1024";
        choices.make("unsupervised.window_tokens", window, why);
    }
    let way = request.way.as_ref();
    let hyper = match way {
        Some(way) => way.hyper((&request.hyper, &at), &mut choices)?,
        None => request.hyper.clone(),
    };
    let way = way.map(|way| way.decide((head_only, &base.shape), limits, &mut choices));
    let way = way.transpose()?;
    let (hyper, epochs) = defaults::hyper_parameters(&hyper, &at, head_only, limits, &mut choices)?;
    let asked = (&request.method, &options);
    let first_rung = ladder::first_rung(asked, from.is_some(), &at, limits)?;
    let total_steps = hyper.max_steps.unwrap_or_default();
    let lora = if head_only || way.is_some() {
        None
    } else {
        Some(defaults::lora(&request.lora, &at, limits, &mut choices)?)
    };
    let (stats, statistics) = (material.stats(), material.statistics(max_example_tokens));
    if let Some(version) = &from {
        let shape = (lora.as_ref(), way.as_ref());
        fits_shape(version, shape, &stats, &options)?;
    }
    let aliases = match (request.keep_aliases, request.aliases.as_slice()) {
        (true, []) => Vec::new(),
        (true, _) => {
            return Err(JobError::InvalidField {
                field: "spec.keep_aliases".to_owned(),
                reason: "set_aliases_on_success is set too: name one of them".to_owned(),
            });
        }
        (false, []) => vec![Alias::default_alias().to_string()],
        (false, some) => some.iter().map(Alias::to_string).collect(),
    };
    let spec = JobSpec {
        adapter: request.adapter.to_string(),
        from_version: from.as_ref().map(|v| v.name.to_string()),
        from_digest: from.as_ref().map(|v| v.content.digest.to_string()),
        method: match &request.method {
            JobMethod::Classification {
                head_only, labels, ..
            } => JobMethod::Classification {
                head_only: *head_only,
                labels: labels.clone(),
                options,
            },
            JobMethod::Unsupervised { .. } => JobMethod::Unsupervised {
                window_tokens: material.window,
            },
            other => other.clone(),
        },
        labels: stats.labels.clone(),
        data: sources.data,
        validation: sources.validation,
        hyper,
        first_rung,
        epochs,
        gradient_accumulation_steps: request
            .hyper
            .gradient_accumulation_steps
            .unwrap_or(1)
            .max(1),
        max_example_tokens,
        lora,
        way,
        seed,
        profile: request.profile.clone(),
        aliases,
        description: request.description.clone(),
        base_digest: base.digest.clone(),
        choices: choices.0,
    };
    let quote = Quote {
        spec,
        stats,
        statistics,
        total_steps,
        warnings: material.warnings.clone(),
    };
    Ok((quote, material))
}

/// The version to go on from is usable and made for this base.
fn fits(version: &Version, request: &JobRequest, base: &Base) -> Result<(), JobError> {
    let refuse = |expected: String, found: String| {
        Err(JobError::Incompatible {
            version: version.name.to_string(),
            expected,
            found,
        })
    };
    if version.name.adapter.tenant != request.adapter.tenant {
        return Err(JobError::InvalidField {
            field: "spec.from_version".to_owned(),
            reason: format!("it must belong to tenants/{}", request.adapter.tenant),
        });
    }
    if version.state != VersionState::Active {
        return refuse("an active version".to_owned(), version.state.to_string());
    }
    if version.content.base_digest != base.digest {
        return refuse(
            format!("base {}", base.digest),
            format!("base {}", version.content.base_digest),
        );
    }
    let classify = matches!(request.method, JobMethod::Classification { .. });
    let has_head = !version.content.summary.labels.is_empty();
    match (classify, has_head) {
        (false, true) => refuse(
            "an adapter without a head".to_owned(),
            "a classifier".to_owned(),
        ),
        _ => Ok(()),
    }
}

/// The new adapter has the old one's rank, modules and labels, since training goes on with its very tensors.
fn fits_shape(
    version: &Version,
    (lora, way): (Option<&LoraSpec>, Option<&WaySpec>),
    stats: &DataStats,
    options: &ClassOptions,
) -> Result<(), JobError> {
    let (summary, problem) = (&version.content.summary, options.problem);
    let refuse = |expected: String, found: String| {
        Err(JobError::Incompatible {
            version: version.name.to_string(),
            expected,
            found,
        })
    };
    let kind =
        |way: Option<&WaySpec>| way.map_or("LoRA or a head alone".to_owned(), WaySpec::to_string);
    let (wanted, found) = (kind(way), kind(WaySpec::of(summary).as_ref()));
    if wanted != found {
        return refuse(wanted, found);
    }
    if lora.is_none() && way.is_none() && !summary.target_modules.is_empty() {
        return refuse(
            "a head alone".to_owned(),
            "a head with LoRA below it".to_owned(),
        );
    }
    if let Some(lora) = lora {
        if lora.use_dora != summary.use_dora {
            let kind = |dora| {
                if dora {
                    "DoRA (use_dora)"
                } else {
                    "LoRA without use_dora"
                }
            };
            return refuse(
                kind(lora.use_dora).to_owned(),
                kind(summary.use_dora).to_owned(),
            );
        }
        let mut modules = (lora.target_modules.clone(), summary.target_modules.clone());
        modules.0.sort_unstable();
        modules.1.sort_unstable();
        if lora.rank != summary.rank || modules.0 != modules.1 {
            return refuse(
                format!("rank {} on {}", lora.rank, modules.0.join(", ")),
                format!("rank {} on {}", summary.rank, modules.1.join(", ")),
            );
        }
    }
    if !summary.labels.is_empty() && summary.problem != problem {
        return refuse(
            format!("a head of {}", problem.as_str()),
            format!("a head of {}", summary.problem.as_str()),
        );
    }
    let layers = (
        stack(
            &options.hidden_layers,
            options.activation,
            options.pooling.unwrap_or_default(),
        ),
        stack(&summary.hidden_layers, summary.activation, summary.pooling),
    );
    if !summary.labels.is_empty() && layers.0 != layers.1 {
        let head = |layers: &str| format!("a head with {layers}");
        return refuse(head(&layers.0), head(&layers.1));
    }
    if !summary.labels.is_empty() && summary.labels != stats.labels {
        return refuse(
            format!("labels {}", stats.labels.join(", ")),
            format!("labels {}", summary.labels.join(", ")),
        );
    }
    Ok(())
}

/// The weights of the version that a job goes on from.
pub(super) fn initial_weights(
    spec: &JobSpec,
    parts: &Parts,
) -> Result<Option<AdapterWeights>, JobError> {
    let Some(digest) = &spec.from_digest else {
        return Ok(None);
    };
    let version = spec.from_version.clone().unwrap_or_default();
    let digest = digest
        .parse()
        .map_err(|error| rows::damaged("jobs.spec", error))?;
    let artifact = parts.store.get_artifact(&digest)?;
    let (_, weights, _) = peft::read(&artifact, &parts.base.shape, &parts.artifact_limits)
        .map_err(|report| JobError::Incompatible {
            version,
            expected: "an artifact that fits the base".to_owned(),
            found: report.to_string(),
        })?;
    Ok(Some(weights))
}

impl Quote {
    /// The job as it would look, queued, under a name that is not kept.
    pub fn into_job(self, name: JobName) -> Job {
        Job {
            name,
            spec: self.spec,
            state: JobState::Queued,
            progress: Progress {
                total_steps: self.total_steps,
                ..Progress::default()
            },
            stats: self.stats,
            version: None,
            error: None,
            result: None,
            last_sequence: 0,
            attempt: 0,
            cancel_asked: false,
            pause_asked: false,
            outcome: None,
            create_time: now_ms(),
            start_time: None,
            end_time: None,
        }
    }
}
