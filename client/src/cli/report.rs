//! `espalier jobs report`: a job as one page that can be mailed and kept: what it learned from, the numbers that were chosen
//! and why, its curve, what it started from against what it came to, what it cost, and by digest what decided it.

use std::{fmt::Write as _, path::PathBuf};

use clap::Args;
use futures::StreamExt;

use crate::{
    cli::{
        Session,
        chart::Curve,
        output::{Failure, bytes, seconds_of, span},
        progress::state_name,
        svg,
    },
    names::short,
    v1::{self, training_event::Event},
};

const PAGE: &str = include_str!("report.html");

/// What a job learned from, how it went and what it cost, as a page with its curve.
#[derive(Debug, Args)]
pub(crate) struct Report {
    /// Its id or whole name.
    job: String,
    /// Where to write it: a page (`.html`), or the curve alone (`.svg`).
    #[arg(long, short, value_name = "FILE")]
    out: PathBuf,
}

/// A row of a table: a name, and what is told of it.
type Row = (String, String);

impl Report {
    pub(crate) async fn run(self, Session { client, out }: &Session) -> Result<(), Failure> {
        let kind = self.out.extension().and_then(|kind| kind.to_str());
        let is_page = match kind {
            Some("html") => true,
            Some("svg") => false,
            _ => {
                let path = self.out.display();
                return Err(Failure::Usage(format!(
                    "--out {path}: a report is a page (.html) or a curve (.svg)"
                )));
            }
        };
        let name = client.names().job(&self.job)?;
        let job = client.get_training_job(&name).await?;
        let curve = past(
            client.watch_training_job(&name, 0).await?,
            job.last_sequence,
        )
        .await?;
        let drawn = svg::render(&curve);
        let text = match (is_page, drawn) {
            (true, drawn) => page(&job, drawn.as_deref()),
            (false, Some(drawn)) => drawn,
            (false, None) => {
                return Err(Failure::Local(format!(
                    "{name} has no curve yet: it has done {} steps",
                    job.progress.unwrap_or_default().step
                )));
            }
        };
        let path = self.out.display();
        tokio::fs::write(&self.out, text)
            .await
            .map_err(|error| Failure::Local(format!("{path} cannot be written: {error}")))?;
        out.remark(format_args!("wrote {path}"));
        Ok(())
    }
}

/// The curve up to an event that has been.
async fn past(
    mut events: crate::client::Replies<v1::TrainingEvent>,
    last: u64,
) -> Result<Curve, Failure> {
    let mut curve = Curve::default();
    while let Some(event) = events.next().await {
        let event = event?;
        curve.add(&event);
        if event.sequence >= last {
            break;
        }
    }
    Ok(curve)
}

impl Curve {
    /// Takes what an event says of the loss.
    #[allow(clippy::cast_precision_loss, reason = "an axis of a chart")]
    pub(crate) fn add(&mut self, event: &v1::TrainingEvent) {
        match &event.event {
            Some(Event::Step(step)) => self.train.push((step.step as f64, step.loss)),
            Some(Event::Evaluation(found)) => self.validation.push((found.step as f64, found.loss)),
            _ => {}
        }
    }
}

fn page(job: &v1::TrainingJob, curve: Option<&str>) -> String {
    let spec = job.spec.clone().unwrap_or_default();
    let mut body = String::new();
    let state = state_name(job.state());
    let _ = writeln!(
        body,
        "<header><h1>{}</h1><p>{} · {}</p></header>",
        escaped(short(&spec.adapter)),
        escaped(&job.name),
        escaped(&state)
    );
    let nothing = "<p>No two points of a curve yet.</p>";
    let _ = writeln!(
        body,
        "<section><h2>Loss</h2>{}</section>",
        curve.unwrap_or(nothing)
    );
    table(&mut body, "Result", &result(job));
    table(&mut body, "Cost", &cost(job));
    table(&mut body, "Data", &data(job, &spec));
    choices(&mut body, job);
    table(&mut body, "Lineage", &lineage(job, &spec));
    PAGE.replacen("<!--REPORT-->", &body, 1)
}

fn table(body: &mut String, title: &str, rows: &[Row]) {
    if rows.is_empty() {
        return;
    }
    let _ = writeln!(body, "<section><h2>{title}</h2><table>");
    for (name, value) in rows {
        let (name, value) = (escaped(name), escaped(value));
        let _ = writeln!(body, "<tr><th>{name}</th><td>{value}</td></tr>");
    }
    body.push_str("</table></section>\n");
}

/// What was chosen, with the reason beside it.
fn choices(body: &mut String, job: &v1::TrainingJob) {
    if job.choices.is_empty() {
        return;
    }
    body.push_str("<section><h2>Chosen for this job</h2><table>\n");
    for choice in &job.choices {
        let _ = writeln!(
            body,
            "<tr><th>{}</th><td>{}</td><td class=\"why\">{}</td></tr>",
            escaped(&choice.field),
            escaped(&choice.value),
            escaped(&choice.reason)
        );
    }
    body.push_str("</table></section>\n");
}

fn row(name: &str, value: impl Into<String>) -> Row {
    (name.to_owned(), value.into())
}

fn result(job: &v1::TrainingJob) -> Vec<Row> {
    let mut rows = Vec::new();
    if let Some(outcome) = &job.outcome {
        if let (Some(before), Some(after)) = (&outcome.baseline, &outcome.result) {
            rows.push(row(
                "held-out loss",
                format!("{:.4} before, {:.4} after", before.loss, after.loss),
            ));
            if let (Some(before), Some(after)) = (before.perplexity, after.perplexity) {
                rows.push(row(
                    "perplexity",
                    format!("{before:.2} before, {after:.2} after"),
                ));
            }
            if let (Some(before), Some(after)) = (before.accuracy, after.accuracy) {
                let [before, after] = [before, after].map(|share| 100.0 * share);
                rows.push(row(
                    "accuracy",
                    format!("{before:.1} % before, {after:.1} % after"),
                ));
            }
        }
        let early = if outcome.stopped_early {
            ", ended when it no longer gained"
        } else {
            ""
        };
        rows.push(row(
            "weights of step",
            format!("{}{early}", outcome.kept_step),
        ));
    }
    let progress = job.progress.unwrap_or_default();
    rows.push(row(
        "steps",
        format!("{} of {}", progress.step, progress.total_steps),
    ));
    if let Some(loss) = progress.loss {
        rows.push(row("last training loss", format!("{loss:.4}")));
    }
    if let Some(error) = &job.error {
        rows.push(row("failed", error.message.clone()));
    }
    rows
}

fn cost(job: &v1::TrainingJob) -> Vec<Row> {
    let Some(outcome) = &job.outcome else {
        return Vec::new();
    };
    let time = |given: &Option<prost_types::Duration>| span(given.as_ref().map_or(0.0, seconds_of));
    vec![
        row(
            "trained",
            format!("{} parameters", outcome.trained_parameters),
        ),
        row(
            "memory",
            format!("{} at most, beside the base", bytes(outcome.peak_bytes)),
        ),
        row("files", bytes(outcome.size_bytes)),
        row(
            "machine",
            format!(
                "{} in {} turns, the longest {}; waited {}",
                time(&outcome.held),
                outcome.quanta,
                time(&outcome.longest_quantum),
                time(&outcome.waited)
            ),
        ),
        row(
            "shared with other jobs",
            format!("{} passes", outcome.shared_passes),
        ),
        row(
            "requests beside it",
            format!(
                "their steps took {:.1} % longer",
                100.0 * outcome.tpot_impact
            ),
        ),
    ]
}

fn data(job: &v1::TrainingJob, spec: &v1::TrainingSpec) -> Vec<Row> {
    let mut rows = Vec::new();
    if let Some(v1::training_data::Source::Dataset(name)) =
        spec.data.as_ref().and_then(|data| data.source.as_ref())
    {
        rows.push(row("dataset", name.clone()));
    }
    if let Some(stats) = &job.data_stats {
        rows.push(row(
            "to train on",
            format!(
                "{} examples, {} tokens",
                stats.train_examples, stats.train_tokens
            ),
        ));
        rows.push(row(
            "to measure on",
            format!("{} examples", stats.validation_examples),
        ));
        rows.push(row(
            "learned",
            format!("{} tokens or labels", stats.learned_tokens),
        ));
        if !stats.labels.is_empty() {
            rows.push(row("labels", stats.labels.join(", ")));
        }
    }
    rows
}

fn lineage(job: &v1::TrainingJob, spec: &v1::TrainingSpec) -> Vec<Row> {
    let found = job.lineage.clone().unwrap_or_default();
    let rows = [
        ("version", job.version.clone()),
        ("went on from", spec.from_version.clone()),
        ("its digest", found.parent_digest),
        ("base", found.base_digest),
        ("rows to train on", found.data_sha256),
        ("rows to measure on", found.validation_sha256),
        (
            "seed",
            spec.seed.map_or_else(String::new, |seed| seed.to_string()),
        ),
    ];
    let there = rows.into_iter().filter(|(_, value)| !value.is_empty());
    there.map(|(name, value)| row(name, value)).collect()
}

/// Text that cannot become markup.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_tells_what_is_known_and_nothing_of_a_tenant_becomes_markup() {
        let measured = |loss, accuracy| v1::EvaluationReport {
            loss,
            accuracy: Some(accuracy),
            ..Default::default()
        };
        let job = v1::TrainingJob {
            name: "tenants/acme/trainingJobs/j1".to_owned(),
            state: v1::TrainingJobState::Succeeded.into(),
            spec: Some(v1::TrainingSpec {
                adapter: "tenants/acme/adapters/<script>".to_owned(),
                ..Default::default()
            }),
            choices: vec![v1::ChosenValue {
                field: "lora.rank".to_owned(),
                value: "8".to_owned(),
                reason: "9 examples & few".to_owned(),
            }],
            outcome: Some(v1::TrainingOutcome {
                baseline: Some(measured(2.5, 0.25)),
                result: Some(measured(1.25, 0.75)),
                tpot_impact: 0.25,
                ..Default::default()
            }),
            ..Default::default()
        };
        let text = page(&job, Some("<svg></svg>"));
        for part in [
            "&lt;script&gt;",
            "2.5000 before, 1.2500 after",
            "25.0 % before, 75.0 % after",
            "9 examples &amp; few",
            "took 25.0 % longer",
            "<svg></svg>",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("<script") && !text.contains("<!--REPORT-->"));
    }
}
