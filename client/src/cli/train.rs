//! `espalier train`: a file of examples becomes a job, and the job is followed to its end.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::{Args, ValueEnum};
use sha2::{Digest, Sha256};

use crate::{
    cli::{
        Session,
        adapters::read_profile,
        classification::HeadArgs,
        data::{FileArgs, guess_kind, id_of, print_report},
        documents,
        output::Failure,
        progress::{View, follow, print_job},
        statistics,
    },
    error::Error,
    transfer::DatasetUpload,
    v1::{
        self, TrainingData,
        training_data::Source,
        training_spec::{Method, Validation},
    },
};

/// Files up to this size travel inside the request; larger ones become datasets. A message is
/// limited to 4 MiB, and a job may bring two files.
const INLINE_BYTES: usize = 1 << 20;
/// The same as lines: what servers take inline by default.
const INLINE_LINES: usize = 1000;

/// What is learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MethodArg {
    /// Labels of texts.
    Classify,
    /// Completions of prompts, answers in chats, or outputs of instructions.
    Sft,
    /// Raw text.
    Text,
}

/// Which turns of a row are learned.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum TrainOnArg {
    /// Every answer.
    Assistant,
    /// The last answer.
    Last,
    /// Everything but the first token.
    All,
}

/// How the learning rate moves after the warmup.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ScheduleArg {
    /// Stays.
    Constant,
    /// Falls in a line.
    Linear,
    /// Falls along half a cosine.
    Cosine,
}

/// Train an adapter from a file of examples, and watch it.
#[derive(Debug, Args)]
pub(crate) struct Train {
    /// JSONL, CSV, TSV or text; a folder, of which every .txt and .md file is a document; or the name of an uploaded dataset.
    data: String,
    /// The adapter that receives the new version; registered when its name is new.
    #[arg(long, short)]
    adapter: String,
    /// What is learned; left out: guessed from the columns.
    #[arg(long, value_enum)]
    method: Option<MethodArg>,
    #[command(flatten)]
    columns: FileArgs,
    /// A file (or dataset) to validate on.
    #[arg(long, value_name = "DATA", conflicts_with = "valid_fraction")]
    valid: Option<String>,
    /// The part of the data to validate on, above 0 and at most 0.5.
    #[arg(long)]
    valid_fraction: Option<f64>,
    #[command(flatten)]
    head: HeadArgs,
    /// Sft: which turns are learned; left out: every answer.
    #[arg(long, value_enum)]
    train_on: Option<TrainOnArg>,
    /// Text: tokens of a window; left out: by the size of the text.
    #[arg(long, value_name = "TOKENS")]
    window: Option<u32>,
    /// Go on from this version.
    #[arg(long, value_name = "VERSION")]
    from: Option<String>,
    /// System prompt in training and, for the new version, in serving.
    #[arg(long)]
    system: Option<String>,
    /// A serving profile: JSON in the form of the contract's ServingProfile.
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// An alias that moves to the new version; may be given several times [usual: default].
    #[arg(long)]
    alias: Vec<String>,
    /// Move no alias.
    #[arg(long, conflicts_with = "alias")]
    no_alias: bool,
    /// For people.
    #[arg(long, default_value = "", hide_default_value = true)]
    description: String,
    #[command(flatten)]
    hyper: HyperArgs,
    #[command(flatten)]
    lora: LoraArgs,
    /// Let the server check everything and store nothing.
    #[arg(long)]
    dry_run: bool,
    /// Create the job and do not watch it.
    #[arg(long)]
    detach: bool,
    /// No loss curve at the end.
    #[arg(long)]
    no_chart: bool,
}

/// How to train; what is left out takes the server's defaults.
#[derive(Debug, Args)]
#[command(next_help_heading = "Training")]
struct HyperArgs {
    /// Passes over the data.
    #[arg(long)]
    epochs: Option<f64>,
    /// At most so many optimizer steps.
    #[arg(long)]
    max_steps: Option<u64>,
    /// Examples of an optimizer step.
    #[arg(long)]
    batch_size: Option<u32>,
    /// Micro-batches of a step, at least.
    #[arg(long)]
    accumulate: Option<u32>,
    /// Peak learning rate.
    #[arg(long)]
    lr: Option<f64>,
    /// Peak learning rate of a head.
    #[arg(long)]
    head_lr: Option<f64>,
    /// Learning rate of B over that of A (LoRA+); the authors found about 16 good.
    #[arg(long)]
    lora_plus_ratio: Option<f64>,
    /// Decoupled weight decay.
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Bound of the gradient's norm; 0 is off.
    #[arg(long)]
    clip: Option<f64>,
    /// After the warmup.
    #[arg(long, value_enum)]
    schedule: Option<ScheduleArg>,
    /// Steps of warmup.
    #[arg(long)]
    warmup_steps: Option<u64>,
    /// The same as a part of all steps.
    #[arg(long)]
    warmup_ratio: Option<f64>,
    /// Steps between evaluations.
    #[arg(long)]
    eval_every: Option<u64>,
    /// End after so many evaluations without improvement.
    #[arg(long)]
    patience: Option<u32>,
    /// Steps between checkpoints.
    #[arg(long)]
    checkpoint_every: Option<u64>,
    /// Longest example in tokens; a longer one is refused.
    #[arg(long)]
    max_example_tokens: Option<u32>,
    /// Keep the order of the data.
    #[arg(long)]
    no_shuffle: bool,
    /// Makes the whole job repeatable.
    #[arg(long)]
    seed: Option<u64>,
}

/// The adapter's shape; what is left out takes the server's defaults.
#[derive(Debug, Args)]
#[command(next_help_heading = "Adapter")]
struct LoraArgs {
    /// Rank.
    #[arg(long, short)]
    rank: Option<u32>,
    /// Scale: alpha / rank.
    #[arg(long)]
    alpha: Option<f32>,
    /// Dropout before the adapter.
    #[arg(long)]
    dropout: Option<f32>,
    /// Any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj (unfreezing: norms of layers too).
    #[arg(long, value_delimiter = ',')]
    targets: Vec<String>,
    /// Layers that are adapted; left out: all.
    #[arg(long, value_delimiter = ',')]
    layers: Vec<u32>,
    /// Rank-stabilised scaling.
    #[arg(long)]
    rslora: bool,
    /// Weight-decomposed LoRA.
    #[arg(long)]
    dora: bool,
    /// Train vectors of (IA)3 in place of LoRA; with --targets, those modules.
    #[arg(long, conflicts_with_all = ["rank", "alpha", "dropout", "layers", "rslora", "dora", "head_only"])]
    ia3: bool,
    /// (IA)3: modules whose input is multiplied; left out: down_proj.
    #[arg(long, value_delimiter = ',', requires = "ia3")]
    feedforward: Vec<String>,
    /// Train so many layers whole, counted from the top, in place of LoRA; with --targets, those modules of theirs.
    #[arg(long, value_name = "LAYERS", conflicts_with_all = ["ia3", "unfreeze_layers", "unfreeze_all", "rank", "alpha", "dropout", "layers", "rslora", "dora", "head_only"])]
    unfreeze_last: Option<u32>,
    /// The same for these layers.
    #[arg(long, value_name = "LAYERS", value_delimiter = ',', conflicts_with_all = ["ia3", "unfreeze_all", "rank", "alpha", "dropout", "layers", "rslora", "dora", "head_only"])]
    unfreeze_layers: Vec<u32>,
    /// Train modules that stand outside of layers whole, alone or beside layers: any of embed_tokens, norm, lm_head.
    #[arg(long, value_name = "MODULES", value_delimiter = ',', conflicts_with_all = ["ia3", "unfreeze_all", "rank", "alpha", "dropout", "layers", "rslora", "dora", "head_only"])]
    unfreeze_outside: Vec<String>,
    /// Train the whole model in place of LoRA.
    #[arg(long, conflicts_with_all = ["ia3", "targets", "rank", "alpha", "dropout", "layers", "rslora", "dora", "head_only"])]
    unfreeze_all: bool,
}

impl HyperArgs {
    fn message(&self) -> v1::HyperParameters {
        use v1::LearningRateSchedule as S;
        let schedule = match self.schedule {
            None => S::Unspecified,
            Some(ScheduleArg::Constant) => S::Constant,
            Some(ScheduleArg::Linear) => S::Linear,
            Some(ScheduleArg::Cosine) => S::Cosine,
        };
        v1::HyperParameters {
            epochs: self.epochs,
            max_steps: self.max_steps,
            batch_size: self.batch_size,
            gradient_accumulation_steps: self.accumulate,
            learning_rate: self.lr,
            head_learning_rate: self.head_lr,
            weight_decay: self.weight_decay,
            adam_beta1: None,
            adam_beta2: None,
            adam_epsilon: None,
            max_grad_norm: self.clip,
            schedule: schedule.into(),
            warmup_steps: self.warmup_steps,
            warmup_ratio: self.warmup_ratio,
            eval_every_steps: self.eval_every,
            early_stopping_patience: self.patience,
            checkpoint_every_steps: self.checkpoint_every,
            max_example_tokens: self.max_example_tokens,
            shuffle: self.no_shuffle.then_some(false),
            lora_plus_ratio: self.lora_plus_ratio,
        }
    }
}

impl LoraArgs {
    fn message(&self) -> Option<v1::LoraConfig> {
        let other = self.ia3 || self.unfreezes();
        (!other).then(|| v1::LoraConfig {
            rank: self.rank,
            alpha: self.alpha,
            dropout: self.dropout,
            target_modules: self.targets.clone(),
            use_rslora: self.rslora.then_some(true),
            use_dora: self.dora.then_some(true),
            layers_to_transform: self.layers.clone(),
            ..Default::default()
        })
    }

    fn unfreezes(&self) -> bool {
        let named = !(self.unfreeze_layers.is_empty() && self.unfreeze_outside.is_empty());
        self.unfreeze_all || self.unfreeze_last.is_some() || named
    }

    fn unfreeze(&self) -> Option<v1::UnfreezeConfig> {
        self.unfreezes().then(|| v1::UnfreezeConfig {
            whole_model: self.unfreeze_all,
            last_layers: self.unfreeze_last,
            layers: self.unfreeze_layers.clone(),
            modules: [&self.targets[..], &self.unfreeze_outside].concat(),
        })
    }

    fn ia3(&self) -> Option<v1::Ia3Config> {
        self.ia3.then(|| v1::Ia3Config {
            target_modules: self.targets.clone(),
            feedforward_modules: self.feedforward.clone(),
        })
    }
}

// === impl Train ===

impl Train {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let Session { client, out } = session;
        let (data, kind) = self.data_of(session, &self.data).await?;
        let spec = self.spec(session, data, kind).await?;
        let request = v1::CreateTrainingJobRequest {
            parent: client.names().parent()?,
            spec: Some(spec),
            request_id: String::new(),
            validate_only: self.dry_run,
        };
        let reply = client.create_training_job(request).await?;
        let bad = reply
            .report
            .as_ref()
            .map_or(0, |report| report.problem_count);
        if self.dry_run || self.detach {
            if out.is_json() {
                out.document(&reply)?;
            } else {
                print_report(*out, reply.report.as_ref())?;
                if let Some(found) = &reply.statistics {
                    statistics::print(*out, found, reply.estimate.as_ref())?;
                }
                match reply.job {
                    Some(job) if !self.dry_run => print_job(*out, &job)?,
                    _ => out.line(if bad == 0 {
                        "would be accepted"
                    } else {
                        "would be refused"
                    })?,
                }
            }
            return if bad == 0 {
                Ok(())
            } else {
                Err(Failure::Refused)
            };
        }
        let missing = || Error::local(tonic::Code::DataLoss, "REPLY", "the reply names no job");
        let job = reply.job.ok_or_else(missing)?;
        if !out.is_json() {
            print_report(*out, reply.report.as_ref())?;
        }
        out.remark(format_args!(
            "{} is accepted; Ctrl-C leaves it running",
            job.name
        ));
        follow(
            session,
            &job.name,
            0,
            View {
                no_chart: self.no_chart,
            },
        )
        .await
    }

    async fn spec(
        &self,
        session: &Session,
        data: TrainingData,
        kind: v1::RowKind,
    ) -> Result<v1::TrainingSpec, Failure> {
        let names = session.client.names();
        let validation = match (&self.valid, self.valid_fraction) {
            (Some(valid), _) => Some(Validation::ValidationData(
                self.data_of(session, valid).await?.0,
            )),
            (None, Some(part)) => Some(Validation::ValidationFraction(part)),
            (None, None) => None,
        };
        let mut profile = self.profile.as_deref().map(read_profile).transpose()?;
        if let Some(system) = &self.system {
            profile.get_or_insert_default().system_prompt = Some(system.clone());
        }
        let from = self
            .from
            .as_deref()
            .map(|name| names.adapter(name))
            .transpose()?;
        Ok(v1::TrainingSpec {
            adapter: names.adapter(&self.adapter)?,
            from_version: from.unwrap_or_default(),
            method: Some(self.method_for(kind)?),
            data: Some(data),
            validation,
            hyper_parameters: Some(self.hyper.message()),
            lora: self.lora.message(),
            ia3: self.lora.ia3(),
            unfreeze: self.lora.unfreeze(),
            seed: self.hyper.seed,
            profile,
            set_aliases_on_success: self.alias.clone(),
            keep_aliases: self.no_alias,
            description: self.description.clone(),
        })
    }

    fn method_for(&self, kind: v1::RowKind) -> Result<Method, Failure> {
        let guessed = match kind {
            v1::RowKind::Class | v1::RowKind::Labels | v1::RowKind::Score => MethodArg::Classify,
            v1::RowKind::Text => MethodArg::Text,
            _ => MethodArg::Sft,
        };
        let method = self.method.unwrap_or(guessed);
        self.options_fit(method)?;
        Ok(match method {
            MethodArg::Classify => Method::Classification(self.head.message()),
            MethodArg::Sft => Method::Supervised(v1::SupervisedMethod {
                train_on: match self.train_on {
                    None => v1::TrainOn::Unspecified,
                    Some(TrainOnArg::Assistant) => v1::TrainOn::Assistant,
                    Some(TrainOnArg::Last) => v1::TrainOn::LastAssistant,
                    Some(TrainOnArg::All) => v1::TrainOn::All,
                }
                .into(),
            }),
            MethodArg::Text => Method::Unsupervised(v1::UnsupervisedMethod {
                window_tokens: self.window,
            }),
        })
    }

    /// Refuses an option of another method, which would be ignored in silence.
    fn options_fit(&self, method: MethodArg) -> Result<(), Failure> {
        let heads = self.head.given();
        let heads = heads.map(|(option, given)| (option, given, MethodArg::Classify));
        let others = [
            ("--train-on", self.train_on.is_some(), MethodArg::Sft),
            ("--window", self.window.is_some(), MethodArg::Text),
        ];
        let name = |method| match method {
            MethodArg::Classify => "classify",
            MethodArg::Sft => "sft",
            MethodArg::Text => "text",
        };
        match heads
            .into_iter()
            .chain(others)
            .find(|(_, given, of)| *given && *of != method)
        {
            None => Ok(()),
            Some((option, _, of)) => Err(Failure::Usage(format!(
                "{option} is for --method {}, and this is --method {}",
                name(of),
                name(method)
            ))),
        }
    }

    /// A file as it is, a large one by way of a dataset, or a dataset that is there already.
    async fn data_of(
        &self,
        session: &Session,
        given: &str,
    ) -> Result<(TrainingData, v1::RowKind), Failure> {
        let client = &session.client;
        let path = Path::new(given);
        let is_folder = match std::fs::metadata(path) {
            Ok(found) if found.is_file() => false,
            Ok(found) if found.is_dir() => true,
            Ok(_) => return Err(Failure::Usage(format!("{given} is no file or folder"))),
            Err(error) if given.contains(['.', '\\']) || given.starts_with('/') => {
                return Err(Error::file(path, &error).into());
            }
            Err(_) => {
                let name = client.names().dataset(given)?;
                let dataset = client.get_dataset(&name).await?;
                return Ok((source(Source::Dataset(name)), dataset.kind()));
            }
        };
        let rows = match is_folder {
            false => self.file_rows(path)?,
            true => Rows {
                format: v1::DataFormat::Jsonl,
                columns: v1::ColumnNames::default(),
                content: documents::jsonl(path, session.out)?,
                kind: v1::RowKind::Text,
            },
        };
        let kind = rows.kind;
        let lines = rows.content.iter().filter(|byte| **byte == b'\n').count();
        let large = rows.content.len() > INLINE_BYTES || lines > INLINE_LINES;
        if large && !self.dry_run {
            let name = push(session, path, rows).await?;
            return Ok((source(Source::Dataset(name)), kind));
        }
        let Rows {
            format,
            columns,
            content,
            ..
        } = rows;
        let inline = v1::InlineData {
            format: format.into(),
            content: content.to_vec(),
            columns: Some(columns),
            sha256: String::new(),
        };
        Ok((source(Source::Inline(inline)), kind))
    }

    fn file_rows(&self, path: &Path) -> Result<Rows, Failure> {
        let format = self.columns.format_of(path)?;
        let columns = self.columns.columns();
        let content = std::fs::read(path).map_err(|error| Error::file(path, &error))?;
        let text = String::from_utf8_lossy(&content);
        let kind = match guess_kind(&text, format, &columns) {
            Ok(kind) => kind,
            // With a method named, the server's report says more than a guess.
            Err(_) if self.method.is_some() => v1::RowKind::Unspecified,
            Err(mut error) => {
                error.message = format!("{}: {}", path.display(), error.message);
                return Err(error.into());
            }
        };
        Ok(Rows {
            format,
            columns,
            content: content.into(),
            kind,
        })
    }
}

/// The rows of a file or folder, as they are sent.
struct Rows {
    format: v1::DataFormat,
    columns: v1::ColumnNames,
    content: Arc<[u8]>,
    kind: v1::RowKind,
}

fn source(source: Source) -> TrainingData {
    TrainingData {
        source: Some(source),
    }
}

/// Uploads a large file under a name that its content decides: the same file is sent once.
async fn push(session: &Session, path: &Path, rows: Rows) -> Result<String, Failure> {
    let Session { client, out } = session;
    let stem: String = id_of(path)?.chars().take(46).collect();
    let digest = hex::encode(Sha256::digest(&rows.content));
    let dataset_id = format!("{}-{}", stem.trim_end_matches('-'), &digest[..16]);
    let name = client.names().dataset(&dataset_id)?;
    let upload = DatasetUpload {
        parent: client.names().parent()?,
        dataset_id,
        file: path.to_owned(),
        content: Some(rows.content),
        format: rows.format,
        columns: Some(rows.columns),
        validate_only: false,
        request_id: String::new(),
    };
    match client.upload_dataset(upload).await {
        Ok(reply) => {
            out.remark(format_args!("{} is uploaded as {name}", path.display()));
            print_report(*out, reply.report.as_ref())?;
            Ok(name)
        }
        Err(error) if error.code == tonic::Code::AlreadyExists => Ok(name),
        Err(error) => Err(error.into()),
    }
}
