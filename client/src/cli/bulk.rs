//! `espalier bulk`: a file of requests in, a file of answers out, whatever happens to this command meanwhile.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueEnum};
use futures::StreamExt;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    bulk::{BulkUpload, is_final},
    cli::{
        PAGE, Session, all_pages,
        output::{Failure, Out, age},
    },
    names::short,
    v1::{self, BulkJob, BulkJobState},
};

/// Answer a file of requests, durably and at the lowest priority.
#[derive(Debug, Subcommand)]
pub(crate) enum Bulk {
    /// Create a job, follow it and fetch its answers.
    Run(Run),
    /// Create a job and return.
    Create(Create),
    /// A tenant's jobs, newest first.
    #[command(visible_alias = "ls")]
    List,
    /// One job.
    Get(Name),
    /// Follow a job to its end.
    Watch(Name),
    /// End a job; what is answered stays.
    Cancel(Name),
    /// Fetch the answers, as far as there are any.
    Download(Download),
    /// Remove a job that has ended.
    #[command(visible_alias = "rm")]
    Delete(Name),
}

/// What every line asks for.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Operation {
    /// Lines are GenerateRequests.
    Generate,
    /// Lines are ChatRequests.
    Chat,
    /// Lines are ClassifyRequests.
    Classify,
}

/// A job to create.
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// What is done with every line.
    #[arg(long, value_enum)]
    operation: Operation,
    /// JSON Lines: {"key": "...", "request": {...}} each.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Adapter that answers all lines; the base model without it.
    #[arg(long, short)]
    adapter: Option<String>,
    /// Id of the job; the server draws one without it.
    #[arg(long)]
    id: Option<String>,
    /// For people.
    #[arg(long, default_value = "")]
    description: String,
    /// Check every line and create nothing.
    #[arg(long)]
    validate_only: bool,
}

/// Create, follow, fetch.
#[derive(Debug, Args)]
pub(crate) struct Run {
    #[command(flatten)]
    create: Create,
    /// Where the answers go: line n answers line n of the input.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

/// A job.
#[derive(Debug, Args)]
pub(crate) struct Name {
    /// Its id or whole name.
    job: String,
}

/// Fetch answers.
#[derive(Debug, Args)]
pub(crate) struct Download {
    /// Its id or whole name.
    job: String,
    /// Where they go. A file that is there is an earlier part of them and gets what it lacks.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

impl Bulk {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let Session { client, out } = session;
        let name = |job: &str| client.names().bulk_job(job);
        match self {
            Self::Run(command) => command.run(session).await,
            Self::Create(command) => match command.run(session).await? {
                Some(job) => show(*out, &job),
                None => Ok(()),
            },
            Self::List => list(session).await,
            Self::Get(Name { job }) => show(*out, &client.get_bulk_job(&name(&job)?).await?),
            Self::Watch(Name { job }) => {
                let job = follow(session, &name(&job)?).await?;
                show(*out, &job)?;
                outcome(&job)
            }
            Self::Cancel(Name { job }) => show(*out, &client.cancel_bulk_job(&name(&job)?).await?),
            Self::Download(Download { job, output }) => {
                let (bytes, complete) = client.download_bulk_results(&name(&job)?, &output).await?;
                let more = if complete { "" } else { "; the job goes on" };
                out.remark(format_args!("{}: {bytes} bytes{more}", output.display()));
                Ok(())
            }
            Self::Delete(Name { job }) => {
                let name = name(&job)?;
                client.delete_bulk_job(&name).await?;
                out.remark(format_args!("{name} is removed"));
                Ok(())
            }
        }
    }
}

impl Create {
    /// The job; `None` when it was only checked.
    async fn run(self, Session { client, out }: &Session) -> Result<Option<BulkJob>, Failure> {
        let upload = BulkUpload {
            parent: client.names().parent()?,
            job_id: self.id.unwrap_or_default(),
            operation: match self.operation {
                Operation::Generate => v1::BulkOperation::Generate,
                Operation::Chat => v1::BulkOperation::Chat,
                Operation::Classify => v1::BulkOperation::Classify,
            },
            target: Some(client.target(self.adapter.as_deref())?),
            file: self.input,
            description: self.description,
            validate_only: self.validate_only,
            request_id: String::new(),
        };
        let reply = client.create_bulk_job(upload).await?;
        if !self.validate_only {
            return Ok(reply.job);
        }
        if out.is_json() {
            out.document(&reply)?;
        } else {
            for finding in &reply.findings {
                let at = match finding.field.as_str() {
                    "" => String::new(),
                    field => format!("{field}: "),
                };
                out.line(format_args!(
                    "line {}: {at}{}",
                    finding.line, finding.reason
                ))?;
            }
            if reply.omitted_findings > 0 {
                out.line(format_args!("and {} more", reply.omitted_findings))?;
            }
        }
        out.remark(format_args!("{} lines checked", reply.items));
        if reply.findings.is_empty() {
            Ok(None)
        } else {
            Err(Failure::Refused)
        }
    }
}

impl Run {
    async fn run(self, session: &Session) -> Result<(), Failure> {
        let Session { client, out } = session;
        if self.output.exists() {
            let text = format!(
                "{} exists; name another file, or remove it",
                self.output.display()
            );
            return Err(Failure::Usage(text));
        }
        let Some(job) = self.create.run(session).await? else {
            return Ok(());
        };
        out.remark(format_args!("{}", job.name));
        let job = follow(session, &job.name).await?;
        let (bytes, _) = client
            .download_bulk_results(&job.name, &self.output)
            .await?;
        show(*out, &job)?;
        out.remark(format_args!("{}: {bytes} bytes", self.output.display()));
        outcome(&job)
    }
}

/// Follows a job to its end, over as many connections as it takes. Ctrl-C leaves the job alone.
async fn follow(Session { client, out }: &Session, name: &str) -> Result<BulkJob, Failure> {
    let bar = out.is_watched().then(|| {
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template("{bar:32} {pos}/{len} {msg} {eta}") {
            bar.set_style(style.progress_chars("━╸ "));
        }
        bar
    });
    let clear = || {
        if let Some(bar) = &bar {
            bar.finish_and_clear();
        }
    };
    let mut failures = 0;
    loop {
        let mut jobs = client.watch_bulk_job(name).await?;
        loop {
            let next = tokio::select! {
                next = jobs.next() => next,
                _ = tokio::signal::ctrl_c() => {
                    clear();
                    out.remark(format_args!(
                        "the job goes on; come back with\n  espalier bulk watch {name}\n  espalier bulk download {name} --output FILE"
                    ));
                    return Err(Failure::Interrupted);
                }
            };
            let job = match next {
                Some(Ok(job)) => job,
                // A server that restarts goes on with the job, so its watcher goes on too.
                Some(Err(error)) if failures >= 20 => {
                    clear();
                    return Err(error.into());
                }
                Some(Err(_)) | None => break,
            };
            failures = 0;
            let progress = job.progress.unwrap_or_default();
            if let Some(bar) = &bar {
                bar.set_length(progress.items);
                bar.set_position(progress.done);
                bar.set_message(state(job.state()));
            } else if out.is_json() {
                out.json_line(&job)?;
            }
            if is_final(job.state()) {
                clear();
                return Ok(job);
            }
        }
        failures += 1;
        tokio::time::sleep(Duration::from_millis(100 * failures)).await;
    }
}

fn outcome(job: &BulkJob) -> Result<(), Failure> {
    match job.state() {
        BulkJobState::Succeeded => Ok(()),
        _ => Err(Failure::Job),
    }
}

fn state(state: BulkJobState) -> String {
    let name = state.as_str_name();
    name.trim_start_matches("BULK_JOB_STATE_").to_lowercase()
}

fn operation(job: &BulkJob) -> String {
    let name = job.operation().as_str_name();
    name.trim_start_matches("BULK_OPERATION_").to_lowercase()
}

fn answered_by(job: &BulkJob) -> &str {
    match job.adapter_version.as_str() {
        "" => "the base model",
        version => short(version),
    }
}

fn show(out: Out, job: &BulkJob) -> Result<(), Failure> {
    if out.is_json() {
        return out.document(job);
    }
    let progress = job.progress.unwrap_or_default();
    out.line(format_args!("{}  {}", job.name, state(job.state())))?;
    out.line(format_args!(
        "  {} by {}, {}/{} lines answered, {} with an error",
        operation(job),
        answered_by(job),
        progress.done,
        progress.items,
        progress.failed
    ))?;
    out.line(format_args!(
        "  {} tokens in, {} out, {} bytes of output",
        progress.input_tokens, progress.output_tokens, progress.output_bytes
    ))?;
    match &job.error {
        Some(error) => out.line(format_args!("  {}", error.message)),
        None => Ok(()),
    }
}

async fn list(Session { client, out }: &Session) -> Result<(), Failure> {
    let parent = client.names().parent()?;
    let jobs = all_pages(|page_token| async {
        let request = v1::ListBulkJobsRequest {
            parent: parent.clone(),
            page_size: PAGE,
            page_token,
        };
        let page = client.list_bulk_jobs(request).await?;
        Ok((page.jobs, page.next_page_token))
    })
    .await?;
    if out.is_json() {
        return out.documents(&jobs);
    }
    let row = |job: &BulkJob| {
        let progress = job.progress.unwrap_or_default();
        vec![
            short(&job.name).to_owned(),
            state(job.state()),
            operation(job),
            answered_by(job).to_owned(),
            format!("{}/{}", progress.done, progress.items),
            progress.failed.to_string(),
            age(job.create_time.as_ref()),
        ]
    };
    let rows: Vec<_> = jobs.iter().map(row).collect();
    let head = [
        "JOB",
        "STATE",
        "OPERATION",
        "ANSWERED BY",
        "LINES",
        "ERRORS",
        "CREATED",
    ];
    let none =
        "no jobs; `espalier bulk run --operation classify --input FILE --output FILE` makes one";
    out.table(&head, &rows, none)
}
