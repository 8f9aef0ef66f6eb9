//! `espalier jobs`: training jobs, listed, followed, put aside, stopped and reported on.

use clap::{Args, Subcommand};

use crate::{
    cli::{
        PAGE, Session, all_pages,
        output::{Failure, Out, age},
        progress::{View, follow, print_job},
        report::Report,
    },
    names::short,
    training::is_final,
    v1,
};

/// List, watch, pause, cancel and report on training jobs.
#[derive(Debug, Subcommand)]
pub(crate) enum Jobs {
    /// A tenant's jobs, newest first.
    #[command(visible_alias = "ls")]
    List(List),
    /// One job.
    Get(Name),
    /// Follow a job to its end.
    Watch(Watch),
    /// Stop a job.
    Cancel(Name),
    /// Put a job aside; its steps so far are kept.
    Pause(Name),
    /// Let a paused job go on.
    Resume(Name),
    /// What a job learned from, how it went and what it cost, as a page with its curve.
    Report(Report),
}

/// A tenant's jobs.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Jobs that have not ended.
    #[arg(long)]
    active: bool,
}

/// A job.
#[derive(Debug, Args)]
pub(crate) struct Name {
    /// Its id or whole name.
    job: String,
}

/// Follow a job to its end.
#[derive(Debug, Args)]
pub(crate) struct Watch {
    /// Its id or whole name.
    job: String,
    /// Begin with the event of this number.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// No loss curve at the end.
    #[arg(long)]
    no_chart: bool,
}

impl Jobs {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let Session { client, out } = session;
        match self {
            Self::List(command) => command.run(session).await,
            Self::Get(Name { job }) => {
                let name = client.names().job(&job)?;
                show(*out, &client.get_training_job(&name).await?)
            }
            Self::Watch(Watch {
                job,
                from,
                no_chart,
            }) => {
                let job = client.names().job(&job)?;
                follow(session, &job, from, View { no_chart }).await
            }
            Self::Cancel(Name { job }) => {
                let name = client.names().job(&job)?;
                show(*out, &client.cancel_training_job(&name).await?)
            }
            Self::Pause(Name { job }) => {
                let name = client.names().job(&job)?;
                show(*out, &client.pause_training_job(&name).await?)
            }
            Self::Resume(Name { job }) => {
                let name = client.names().job(&job)?;
                show(*out, &client.resume_training_job(&name).await?)
            }
            Self::Report(command) => command.run(session).await,
        }
    }
}

fn show(out: Out, job: &v1::TrainingJob) -> Result<(), Failure> {
    if out.is_json() {
        out.document(job)
    } else {
        print_job(out, job)
    }
}

impl List {
    async fn run(self, Session { client, out }: &Session) -> Result<(), Failure> {
        let parent = client.names().parent()?;
        let mut jobs = all_pages(|page_token| async {
            let parent = parent.clone();
            let request = v1::ListTrainingJobsRequest {
                parent,
                page_size: PAGE,
                page_token,
            };
            let page = client.list_training_jobs(request).await?;
            Ok((page.jobs, page.next_page_token))
        })
        .await?;
        jobs.retain(|job| !self.active || !is_final(job.state()));
        if out.is_json() {
            return out.documents(&jobs);
        }
        let row = |job: &v1::TrainingJob| {
            let progress = job.progress.unwrap_or_default();
            let adapter = job.spec.as_ref().map_or("-", |spec| short(&spec.adapter));
            let state = job
                .state()
                .as_str_name()
                .trim_start_matches("TRAINING_JOB_STATE_");
            let number = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.4}"));
            vec![
                short(&job.name).to_owned(),
                state.to_lowercase(),
                adapter.to_owned(),
                format!("{}/{}", progress.step, progress.total_steps),
                number(progress.loss),
                number(progress.validation_loss),
                if job.version.is_empty() {
                    "-".to_owned()
                } else {
                    short(&job.version).to_owned()
                },
                age(job.create_time.as_ref()),
            ]
        };
        let rows: Vec<_> = jobs.iter().map(row).collect();
        let head = [
            "JOB", "STATE", "ADAPTER", "STEP", "LOSS", "VALID", "VERSION", "CREATED",
        ];
        out.table(
            &head,
            &rows,
            "no jobs; `espalier train FILE --adapter NAME` makes one",
        )
    }
}
