//! Datasets, jobs and their events between the wire and the job service.

use espalier_adapters::train::dataset::{ColumnNames, DataFinding, DataReport, Format, Kind};
use espalier_adapters::train::examples::{TokenStats, TrainOn};
use espalier_adapters::train::schedule::Decay;
use espalier_adapters::train::statistics::Statistics;
use espalier_engine::train::trainer::HyperParameters;
use espalier_proto::{google, v1};
use prost_types::Duration;
use tonic::Code;

use super::adapter::{ProfileLimits, aliases, profile, profile_reply, timestamp};
use super::{classification, outcome, ways};
use crate::datasets::{DataShape, Dataset};
use crate::jobs::{
    DataInput, DataSource, DataStats, Event, Finding, Happening, HyperRequest, Job, JobFailure,
    JobMethod, JobRequest, JobSpec, JobState, LoraRequest, LoraSpec, Progress, Validation,
    ValidationInput, WatchItem,
};
use crate::names::{AdapterName, AdapterRef, DatasetName, JobName, TenantId};
use crate::status::Refusal;

pub(super) fn invalid(field: impl Into<String>, why: impl Into<String>) -> Refusal {
    Refusal::invalid_field(field, why)
}

/// How rows are spelled.
pub(crate) fn format(field: &str, number: i32) -> Result<Format, Refusal> {
    match v1::DataFormat::try_from(number) {
        Ok(v1::DataFormat::Jsonl) => Ok(Format::Jsonl),
        Ok(v1::DataFormat::Csv) => Ok(Format::Csv),
        Ok(v1::DataFormat::Tsv) => Ok(Format::Tsv),
        Ok(v1::DataFormat::Text) => Ok(Format::Text),
        Ok(v1::DataFormat::Unspecified) => {
            Err(invalid(field, "it must be JSONL, CSV, TSV or TEXT"))
        }
        Err(_) => Err(invalid(field, format!("{number} is no format"))),
    }
}

fn format_reply(format: Format) -> i32 {
    match format {
        Format::Jsonl => v1::DataFormat::Jsonl,
        Format::Csv => v1::DataFormat::Csv,
        Format::Tsv => v1::DataFormat::Tsv,
        Format::Text => v1::DataFormat::Text,
    }
    .into()
}

/// Column names, empty ones as usual. Each is at most 256 bytes.
pub(crate) fn columns(field: &str, given: Option<v1::ColumnNames>) -> Result<ColumnNames, Refusal> {
    let mut names = ColumnNames::default();
    let Some(given) = given else {
        return Ok(names);
    };
    for (name, target, text) in [
        ("text", &mut names.text, given.text),
        ("label", &mut names.label, given.label),
        ("prompt", &mut names.prompt, given.prompt),
        ("completion", &mut names.completion, given.completion),
        ("messages", &mut names.messages, given.messages),
        ("instruction", &mut names.instruction, given.instruction),
        ("input", &mut names.input, given.input),
        ("output", &mut names.output, given.output),
        ("labels", &mut names.labels, given.labels),
        ("score", &mut names.score, given.score),
    ] {
        if text.len() > 256 {
            return Err(Refusal::over_limit(
                format!("{field}.{name}"),
                text.len(),
                256,
            ));
        }
        if !text.is_empty() {
            *target = text;
        }
    }
    Ok(names)
}

fn columns_reply(columns: &ColumnNames) -> v1::ColumnNames {
    v1::ColumnNames {
        text: columns.text.clone(),
        label: columns.label.clone(),
        prompt: columns.prompt.clone(),
        completion: columns.completion.clone(),
        messages: columns.messages.clone(),
        instruction: columns.instruction.clone(),
        input: columns.input.clone(),
        output: columns.output.clone(),
        labels: columns.labels.clone(),
        score: columns.score.clone(),
    }
}

/// A dataset for the wire.
pub(crate) fn dataset(dataset: Dataset) -> v1::Dataset {
    let mut reply = shape(&dataset.shape, dataset.size, dataset.digest.to_string());
    reply.name = dataset.name.to_string();
    reply.create_time = Some(timestamp(dataset.create_time));
    reply
}

/// A dataset that was only checked: without a name.
pub(crate) fn shape(shape: &DataShape, size: u64, sha256: String) -> v1::Dataset {
    v1::Dataset {
        name: String::new(),
        format: format_reply(shape.format),
        kind: match shape.kind {
            Kind::Completion => v1::RowKind::Completion,
            Kind::Chat => v1::RowKind::Chat,
            Kind::Class => v1::RowKind::Class,
            Kind::Labels => v1::RowKind::Labels,
            Kind::Score => v1::RowKind::Score,
            Kind::Text => v1::RowKind::Text,
            Kind::Instruction => v1::RowKind::Instruction,
        }
        .into(),
        rows: shape.rows,
        size_bytes: size,
        sha256,
        columns: Some(columns_reply(&shape.columns)),
        label_counts: shape.label_counts.clone(),
        create_time: None,
    }
}

/// A data report for the wire; `rows` can be used.
pub(crate) fn report(report: &DataReport, rows: u64) -> v1::DataReport {
    let problems = |findings: &[DataFinding]| {
        findings
            .iter()
            .map(|finding| v1::DataProblem {
                line: finding.line,
                field: finding.field.clone(),
                reason: finding.reason.clone(),
                rule: finding.rule.as_str().to_owned(),
            })
            .collect()
    };
    v1::DataReport {
        rows,
        problems: problems(&report.errors),
        problem_count: report.error_count(),
        warnings: problems(&report.warnings),
        warning_count: report.warning_count(),
    }
}

/// A job from the wire. `tenant` is the request's parent, to which all that it names must belong.
pub(crate) fn job_request(
    tenant: &TenantId,
    mut spec: v1::TrainingSpec,
    limits: &ProfileLimits,
) -> Result<JobRequest, Refusal> {
    let adapter = AdapterName::parse(&spec.adapter)
        .map_err(|error| invalid("spec.adapter", error.to_string()))?;
    let from = match spec.from_version.as_str() {
        "" => None,
        text => Some(
            AdapterRef::parse(text)
                .map_err(|error| invalid("spec.from_version", error.to_string()))?,
        ),
    };
    let belongs = |field: &str, owner: &TenantId| {
        if owner == tenant {
            Ok(())
        } else {
            Err(invalid(
                field,
                format!("it must belong to tenants/{tenant}"),
            ))
        }
    };
    belongs("spec.adapter", &adapter.tenant)?;
    if let Some(from) = &from {
        belongs("spec.from_version", &from.adapter.tenant)?;
    }
    let way = ways::request(&mut spec)?;
    let data = data("spec.data", tenant, spec.data)?;
    let validation = match spec.validation {
        None => ValidationInput::None,
        Some(v1::training_spec::Validation::ValidationFraction(part)) => {
            ValidationInput::Fraction(part)
        }
        Some(v1::training_spec::Validation::ValidationData(given)) => {
            let rows = self::data("spec.validation_data", tenant, Some(given))?;
            ValidationInput::Data(Box::new(rows))
        }
    };
    let method = method(spec.method)?;
    Ok(JobRequest {
        adapter,
        from,
        method,
        data,
        validation,
        hyper: hyper_request(spec.hyper_parameters.unwrap_or_default())?,
        lora: lora_request(spec.lora.unwrap_or_default()),
        way,
        seed: spec.seed,
        profile: profile("spec.profile", spec.profile, limits)?,
        aliases: aliases("spec.set_aliases_on_success", &spec.set_aliases_on_success)?,
        keep_aliases: spec.keep_aliases,
        description: spec.description,
    })
}

fn method(given: Option<v1::training_spec::Method>) -> Result<JobMethod, Refusal> {
    use v1::training_spec::Method;
    match given {
        None => Err(invalid(
            "spec.method",
            "supervised, unsupervised or classification is required",
        )),
        Some(Method::Supervised(given)) => Ok(JobMethod::Supervised {
            train_on: match v1::TrainOn::try_from(given.train_on) {
                Ok(v1::TrainOn::Unspecified | v1::TrainOn::Assistant) => TrainOn::Assistant,
                Ok(v1::TrainOn::LastAssistant) => TrainOn::LastAssistant,
                Ok(v1::TrainOn::All) => TrainOn::All,
                Err(_) => {
                    let why = format!(
                        "{} is none of TRAIN_ON_ASSISTANT, TRAIN_ON_LAST_ASSISTANT and TRAIN_ON_ALL",
                        given.train_on
                    );
                    return Err(invalid("spec.supervised.train_on", why));
                }
            },
        }),
        Some(Method::Unsupervised(given)) => Ok(JobMethod::Unsupervised {
            window_tokens: given.window_tokens.map(|tokens| tokens as usize),
        }),
        Some(Method::Classification(given)) => Ok(JobMethod::Classification {
            options: classification::options(&given)?,
            head_only: given.head_only.unwrap_or(false),
            labels: given.labels,
        }),
    }
}

fn method_reply(method: JobMethod) -> v1::training_spec::Method {
    use v1::training_spec::Method;
    match method {
        JobMethod::Supervised { train_on } => Method::Supervised(v1::SupervisedMethod {
            train_on: match train_on {
                TrainOn::Assistant => v1::TrainOn::Assistant,
                TrainOn::LastAssistant => v1::TrainOn::LastAssistant,
                TrainOn::All => v1::TrainOn::All,
            }
            .into(),
        }),
        JobMethod::Unsupervised { window_tokens } => Method::Unsupervised(v1::UnsupervisedMethod {
            window_tokens: window_tokens.and_then(|tokens| u32::try_from(tokens).ok()),
        }),
        JobMethod::Classification {
            head_only,
            labels,
            options,
        } => Method::Classification(classification::method_reply(head_only, labels, options)),
    }
}

fn data(
    field: &str,
    tenant: &TenantId,
    given: Option<v1::TrainingData>,
) -> Result<DataInput, Refusal> {
    match given.and_then(|given| given.source) {
        None => Err(invalid(field, "dataset or inline is required")),
        Some(v1::training_data::Source::Dataset(name)) => {
            let name = DatasetName::parse(&name)
                .map_err(|error| invalid(format!("{field}.dataset"), error.to_string()))?;
            if name.tenant != *tenant {
                return Err(invalid(
                    format!("{field}.dataset"),
                    format!("it must belong to tenants/{tenant}"),
                ));
            }
            Ok(DataInput::Dataset(name))
        }
        Some(v1::training_data::Source::Inline(inline)) => {
            let at = format!("{field}.inline");
            Ok(DataInput::Inline {
                format: format(&format!("{at}.format"), inline.format)?,
                columns: columns(&format!("{at}.columns"), inline.columns)?,
                bytes: inline.content,
            })
        }
    }
}

fn hyper_request(given: v1::HyperParameters) -> Result<HyperRequest, Refusal> {
    let decay = match v1::LearningRateSchedule::try_from(given.schedule) {
        Ok(v1::LearningRateSchedule::Unspecified) => None,
        Ok(v1::LearningRateSchedule::Constant) => Some(Decay::Constant),
        Ok(v1::LearningRateSchedule::Linear) => Some(Decay::Linear),
        Ok(v1::LearningRateSchedule::Cosine) => Some(Decay::Cosine),
        Err(_) => {
            return Err(invalid(
                "spec.hyper_parameters.schedule",
                format!("{} is no schedule", given.schedule),
            ));
        }
    };
    Ok(HyperRequest {
        epochs: given.epochs,
        max_steps: given.max_steps,
        batch_size: given.batch_size,
        gradient_accumulation_steps: given.gradient_accumulation_steps,
        learning_rate: given.learning_rate,
        head_learning_rate: given.head_learning_rate,
        weight_decay: given.weight_decay,
        beta1: given.adam_beta1,
        beta2: given.adam_beta2,
        epsilon: given.adam_epsilon,
        max_grad_norm: given.max_grad_norm,
        decay,
        warmup_steps: given.warmup_steps,
        warmup_ratio: given.warmup_ratio,
        eval_every_steps: given.eval_every_steps,
        early_stopping_patience: given.early_stopping_patience,
        checkpoint_every_steps: given.checkpoint_every_steps,
        max_example_tokens: given.max_example_tokens,
        shuffle: given.shuffle,
        lora_plus_ratio: given.lora_plus_ratio,
    })
}

/// The shortest decimal of the wire's f32, so that 0.1 does not become 0.10000000149.
fn widen(value: f32) -> f64 {
    value
        .to_string()
        .parse()
        .unwrap_or_else(|_| f64::from(value))
}

fn lora_request(given: v1::LoraConfig) -> LoraRequest {
    LoraRequest {
        rank: given.rank,
        alpha: given.alpha.map(widen),
        dropout: given.dropout.map(widen),
        target_modules: given.target_modules,
        use_rslora: given.use_rslora,
        use_dora: given.use_dora,
        rank_pattern: given.rank_pattern.into_iter().collect(),
        alpha_pattern: given
            .alpha_pattern
            .into_iter()
            .map(|(pattern, alpha)| (pattern, widen(alpha)))
            .collect(),
        layers: given.layers_to_transform,
    }
}

/// A job for the wire.
pub(crate) fn job(job: Job) -> v1::TrainingJob {
    v1::TrainingJob {
        name: job.name.to_string(),
        choices: job.spec.choices.iter().map(outcome::choice).collect(),
        lineage: Some(outcome::lineage(&job.spec)),
        outcome: job.outcome.map(outcome::outcome),
        spec: Some(spec(job.spec)),
        state: state(job.state),
        progress: Some(progress(&job.progress)),
        version: job.version.unwrap_or_default(),
        error: job.error.as_ref().map(failure),
        data_stats: Some(stats(job.stats)),
        create_time: Some(timestamp(job.create_time)),
        start_time: job.start_time.map(timestamp),
        end_time: job.end_time.map(timestamp),
        last_sequence: job.last_sequence,
        attempt: job.attempt,
        classification_result: job.result.map(classification::result),
    }
}

/// What is known of a job's rows, for the wire.
pub(crate) fn statistics(found: &Statistics) -> v1::DataStatistics {
    let tokens = |of: &TokenStats| v1::TokenCounts {
        total: of.tokens,
        shortest: of.shortest as u64,
        median: of.median as u64,
        p95: of.p95 as u64,
        longest: of.longest as u64,
    };
    v1::DataStatistics {
        examples: found.tokens.examples,
        tokens: Some(tokens(&found.tokens)),
        learned_tokens: found.tokens.targets,
        masked_tokens: found.masked,
        validation_examples: found.validation.examples,
        validation_tokens: Some(tokens(&found.validation)),
        max_example_tokens: found.limit,
        too_long_rows: found.too_long,
        longest_refused_tokens: found.longest_refused,
        prompt_too_long_rows: found.prompt_alone,
        duplicate_rows: found.duplicates,
        conflicting_labels: found.conflicting_labels,
        label_counts: found.label_counts.clone(),
        leaked_rows: found.leaked,
        nearly_leaked_rows: found.nearly_leaked,
    }
}

fn stats(stats: DataStats) -> v1::TrainingDataStats {
    v1::TrainingDataStats {
        train_examples: stats.train_examples,
        validation_examples: stats.valid_examples,
        train_tokens: stats.train_tokens,
        learned_tokens: stats.train_targets,
        labels: stats.labels,
    }
}

fn source(source: DataSource) -> v1::TrainingData {
    let inline = |source: DataSource| v1::InlineData {
        format: format_reply(source.format),
        content: Vec::new(),
        columns: Some(columns_reply(&source.columns)),
        sha256: source.sha256,
    };
    v1::TrainingData {
        source: Some(match source.dataset {
            Some(name) => v1::training_data::Source::Dataset(name),
            None => v1::training_data::Source::Inline(inline(source)),
        }),
    }
}

fn spec(spec: JobSpec) -> v1::TrainingSpec {
    let hyper_parameters = hyper_reply(&spec);
    v1::TrainingSpec {
        adapter: spec.adapter,
        from_version: spec.from_version.unwrap_or_default(),
        method: Some(method_reply(spec.method)),
        data: Some(source(spec.data)),
        validation: match spec.validation {
            Validation::None => None,
            Validation::Fraction(part) => {
                Some(v1::training_spec::Validation::ValidationFraction(part))
            }
            Validation::Data(data) => {
                Some(v1::training_spec::Validation::ValidationData(source(*data)))
            }
        },
        hyper_parameters: Some(hyper_parameters),
        ia3: ways::ia3_reply(spec.way.as_ref()),
        unfreeze: ways::unfreeze_reply(spec.way.as_ref()),
        lora: spec.lora.map(lora_reply),
        seed: Some(spec.seed),
        profile: Some(profile_reply(&spec.profile)),
        keep_aliases: spec.aliases.is_empty(),
        set_aliases_on_success: spec.aliases,
        description: spec.description,
    }
}

fn hyper_reply(spec: &JobSpec) -> v1::HyperParameters {
    let hyper: &HyperParameters = &spec.hyper;
    let schedule = match hyper.decay {
        Decay::Constant => v1::LearningRateSchedule::Constant,
        Decay::Linear => v1::LearningRateSchedule::Linear,
        Decay::Cosine => v1::LearningRateSchedule::Cosine,
    };
    v1::HyperParameters {
        epochs: Some(spec.epochs),
        max_steps: hyper.max_steps,
        batch_size: u32::try_from(hyper.batch_size).ok(),
        gradient_accumulation_steps: Some(spec.gradient_accumulation_steps),
        learning_rate: hyper.learning_rate,
        head_learning_rate: hyper.head_learning_rate,
        weight_decay: Some(hyper.weight_decay),
        adam_beta1: Some(hyper.beta1),
        adam_beta2: Some(hyper.beta2),
        adam_epsilon: Some(hyper.epsilon),
        max_grad_norm: Some(hyper.max_grad_norm.unwrap_or(0.0)),
        schedule: schedule.into(),
        warmup_steps: hyper.warmup_steps,
        warmup_ratio: None,
        eval_every_steps: Some(hyper.eval_steps.unwrap_or(0)),
        early_stopping_patience: Some(
            hyper
                .early_stopping_patience
                .and_then(|patience| u32::try_from(patience).ok())
                .unwrap_or(0),
        ),
        checkpoint_every_steps: hyper.checkpoint_steps,
        max_example_tokens: u32::try_from(spec.max_example_tokens).ok(),
        shuffle: Some(hyper.shuffle),
        lora_plus_ratio: Some(hyper.lora_plus_ratio),
    }
}

fn lora_reply(lora: LoraSpec) -> v1::LoraConfig {
    v1::LoraConfig {
        rank: Some(lora.rank),
        alpha: Some(lora.alpha as f32),
        dropout: Some(lora.dropout as f32),
        target_modules: lora.target_modules,
        use_rslora: Some(lora.use_rslora),
        use_dora: Some(lora.use_dora),
        rank_pattern: lora.rank_pattern.into_iter().collect(),
        alpha_pattern: lora
            .alpha_pattern
            .into_iter()
            .map(|(pattern, alpha)| (pattern, alpha as f32))
            .collect(),
        layers_to_transform: lora.layers,
    }
}

/// A state for the wire.
pub(crate) fn state(state: JobState) -> i32 {
    match state {
        JobState::Queued => v1::TrainingJobState::Queued,
        JobState::Preparing => v1::TrainingJobState::Preparing,
        JobState::Running => v1::TrainingJobState::Running,
        JobState::Succeeded => v1::TrainingJobState::Succeeded,
        JobState::Failed => v1::TrainingJobState::Failed,
        JobState::Cancelled => v1::TrainingJobState::Cancelled,
        JobState::Paused => v1::TrainingJobState::Paused,
    }
    .into()
}

fn progress(progress: &Progress) -> v1::TrainingProgress {
    let eta = progress
        .eta_seconds
        .filter(|eta| eta.is_finite() && *eta < 1e9);
    v1::TrainingProgress {
        step: progress.step,
        total_steps: progress.total_steps,
        epoch: progress.epoch,
        loss: progress.loss,
        validation_loss: progress.valid_loss,
        validation_accuracy: progress.valid_accuracy,
        validation_perplexity: progress.valid_perplexity,
        baseline_loss: progress.baseline_loss,
        baseline_accuracy: progress.baseline_accuracy,
        best_step: progress.best_step,
        tokens: progress.tokens,
        tokens_per_second: progress.tokens_per_second,
        eta: eta.map(|eta| Duration {
            seconds: eta as i64,
            nanos: (eta.fract() * 1e9) as i32,
        }),
    }
}

fn failure(failure: &JobFailure) -> google::rpc::Status {
    let code = match (failure.reason.as_str(), failure.by_request) {
        ("ADAPTER_INCOMPATIBLE", _) => Code::FailedPrecondition,
        ("ADAPTER_NOT_FOUND", _) => Code::NotFound,
        ("QUOTA_EXCEEDED", _) => Code::ResourceExhausted,
        ("ARTIFACT_CORRUPT", _) => Code::DataLoss,
        (_, true) => Code::InvalidArgument,
        (_, false) => Code::Internal,
    };
    google::rpc::Status {
        code: i32::from(code),
        message: format!("{}: {}", failure.reason, failure.message),
        details: Vec::new(),
    }
}

/// A watcher's item for the wire.
pub(crate) fn watch_item(job: &JobName, item: WatchItem) -> v1::TrainingEvent {
    match item {
        WatchItem::Event(found) => event(job, *found),
        WatchItem::Heartbeat { sequence, last } => {
            let standing = last.as_deref();
            v1::TrainingEvent {
                job: job.to_string(),
                sequence,
                time: Some(timestamp(crate::database::now_ms())),
                state: standing.map_or(0, |last| state(last.state)),
                progress: standing.map(|last| progress(&last.progress)),
                event: Some(v1::training_event::Event::Heartbeat(v1::WatchHeartbeat {})),
            }
        }
    }
}

fn diagnosis(step: u64, finding: Finding, message: String) -> v1::Diagnosis {
    let (kind, modules) = match finding {
        Finding::SilentModules(modules) => (v1::DiagnosisKind::SilentModules, modules),
        Finding::Diverging => (v1::DiagnosisKind::Diverging, Vec::new()),
    };
    v1::Diagnosis {
        step,
        kind: kind.into(),
        message,
        modules,
    }
}

fn event(job: &JobName, event: Event) -> v1::TrainingEvent {
    use v1::training_event::Event as Wire;
    let what = match event.happening {
        Happening::State {
            from,
            to,
            reason,
            error,
        } => Wire::StateChanged(v1::StateChanged {
            from: from.map_or(0, state),
            to: state(to),
            reason,
            error: error.as_ref().map(failure),
        }),
        Happening::Step {
            step,
            loss,
            grad_norm,
            learning_rate,
            tokens,
        } => Wire::Step(v1::StepReport {
            step,
            loss,
            grad_norm,
            learning_rate,
            tokens,
        }),
        Happening::Evaluation {
            step,
            loss,
            accuracy,
            macro_f1,
            perplexity,
            best,
        } => Wire::Evaluation(v1::EvaluationReport {
            step,
            loss,
            accuracy,
            macro_f1,
            best,
            perplexity,
        }),
        Happening::Diagnosis {
            step,
            finding,
            message,
        } => Wire::Diagnosis(diagnosis(step, finding, message)),
        Happening::Checkpoint { step, size } => Wire::Checkpoint(v1::CheckpointReport {
            step,
            size_bytes: size,
        }),
        Happening::Published {
            version,
            digest,
            aliases,
            step,
        } => Wire::Published(v1::VersionPublished {
            version,
            digest,
            aliases,
            step,
        }),
    };
    v1::TrainingEvent {
        job: job.to_string(),
        sequence: event.sequence,
        time: Some(timestamp(event.time)),
        state: state(event.state),
        progress: Some(progress(&event.progress)),
        event: Some(what),
    }
}
