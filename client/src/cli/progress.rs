//! Following a job: a bar with loss, metric and time to go while a person looks, lines when
//! nobody does, JSON lines when asked; a loss curve and the result at the end.

use std::time::Duration;

use futures::StreamExt;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    cli::{
        Session,
        chart::{self, Curve},
        classification::print_result,
        output::{Failure, Out, seconds_of, span},
    },
    training::is_final,
    v1::{self, TrainingEvent, TrainingJobState, training_event::Event},
};

/// How a followed job is shown.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct View {
    /// No loss curve at the end.
    pub(crate) no_chart: bool,
}

/// Follows a job to its end. Ctrl-C leaves the job alone and says how to come back.
pub(crate) async fn follow(
    session: &Session,
    job: &str,
    from: u64,
    view: View,
) -> Result<(), Failure> {
    let Session { client, out } = session;
    let mut events = client.watch_training_job(job, from).await?;
    let mut shown = Shown::new(*out);
    let mut next = from;
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            _ = tokio::signal::ctrl_c() => {
                shown.clear();
                return detach(*out, job, next);
            }
        };
        let Some(event) = event else { break };
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                shown.clear();
                out.remark(watch_again(job, next));
                return Err(error.into());
            }
        };
        next = event.sequence + 1;
        if out.is_json() {
            out.json_line(&event)?;
        }
        shown.add(&event);
    }
    shown.clear();
    let job = client.get_training_job(job).await?;
    if out.is_json() {
        out.json_line(&job)?;
    } else {
        print_end(*out, &job, &shown.curve, view)?;
    }
    if job.state() == TrainingJobState::Succeeded {
        Ok(())
    } else {
        Err(Failure::Job)
    }
}

fn watch_again(job: &str, next: u64) -> String {
    format!("the job goes on; watch it again with\n  espalier jobs watch {job} --from {next}")
}

fn detach(out: Out, job: &str, next: u64) -> Result<(), Failure> {
    out.remark(watch_again(job, next));
    out.remark(format_args!(
        "or stop it with\n  espalier jobs cancel {job}"
    ));
    Err(Failure::Interrupted)
}

/// What has been seen, and the bar that shows it.
struct Shown {
    out: Out,
    bar: Option<ProgressBar>,
    curve: Curve,
    /// The tenth of the way that a line was last written for.
    tenth: u64,
}

// === impl Shown ===

impl Shown {
    fn new(out: Out) -> Self {
        let bar = out.is_watched().then(|| {
            let bar = ProgressBar::new(0);
            let template = "{spinner} {bar:32} {pos}/{len} {msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("━╸ "));
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            bar.set_message("queued");
            bar
        });
        Self {
            out,
            bar,
            curve: Curve::default(),
            tenth: 0,
        }
    }

    fn add(&mut self, event: &TrainingEvent) {
        self.curve.add(event);
        if let Some(Event::Diagnosis(found)) = &event.event {
            self.warn(found);
        }
        let progress = event.progress.unwrap_or_default();
        let text = progress_text(event.state(), &progress);
        if let Some(bar) = &self.bar {
            bar.set_length(progress.total_steps);
            bar.set_position(progress.step);
            bar.set_message(text);
        } else if self.is_worth_a_line(event, &progress) {
            let (step, total) = (progress.step, progress.total_steps);
            self.out.remark(format_args!("{step}/{total} {text}"));
        }
    }

    fn warn(&self, found: &v1::Diagnosis) {
        let text = format!("warning: step {}: {}", found.step, found.message);
        match &self.bar {
            Some(bar) => bar.println(text),
            None => self.out.remark(format_args!("{text}")),
        }
    }

    fn is_worth_a_line(&mut self, event: &TrainingEvent, progress: &v1::TrainingProgress) -> bool {
        let tenth = progress.step * 10 / progress.total_steps.max(1);
        let passed = tenth > self.tenth;
        self.tenth = tenth;
        passed
            || matches!(
                event.event,
                Some(Event::StateChanged(_) | Event::Evaluation(_))
            )
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

pub(crate) fn state_name(state: TrainingJobState) -> String {
    state
        .as_str_name()
        .trim_start_matches("TRAINING_JOB_STATE_")
        .to_lowercase()
}

fn progress_text(state: TrainingJobState, progress: &v1::TrainingProgress) -> String {
    let mut parts = Vec::new();
    if state != TrainingJobState::Running || progress.loss.is_none() {
        parts.push(state_name(state));
    }
    if let Some(loss) = progress.loss {
        parts.push(format!("loss {loss:.4}"));
    }
    if let Some(loss) = progress.validation_loss {
        parts.push(format!("valid {loss:.4}"));
    }
    if let Some(perplexity) = progress.validation_perplexity {
        parts.push(format!("perplexity {perplexity:.2}"));
    }
    if let Some(accuracy) = progress.validation_accuracy {
        parts.push(format!("accuracy {:.1} %", accuracy * 100.0));
    }
    if let Some(best) = progress.best_step.filter(|_| is_final(state)) {
        parts.push(format!("kept step {best}"));
    }
    if progress.tokens_per_second > 0.0 {
        parts.push(format!("{:.0} tok/s", progress.tokens_per_second));
    }
    if let Some(eta) = progress.eta.as_ref().filter(|_| !is_final(state)) {
        parts.push(format!("{} to go", span(seconds_of(eta))));
    }
    parts.join(" · ")
}

fn print_end(out: Out, job: &v1::TrainingJob, curve: &Curve, view: View) -> Result<(), Failure> {
    if !view.no_chart
        && let Some(chart) = chart::render(curve)
    {
        out.line(chart)?;
    }
    print_job(out, job)
}

/// A job in a few lines.
pub(crate) fn print_job(out: Out, job: &v1::TrainingJob) -> Result<(), Failure> {
    let progress = job.progress.unwrap_or_default();
    let took = match (&job.start_time, &job.end_time) {
        (Some(start), Some(end)) => {
            #[allow(clippy::cast_precision_loss, reason = "shown in tenths of seconds")]
            let whole = (end.seconds - start.seconds) as f64;
            format!(
                " in {}",
                span(whole + f64::from(end.nanos - start.nanos) / 1e9)
            )
        }
        _ => String::new(),
    };
    out.line(format_args!(
        "{} {}{took}",
        job.name,
        state_name(job.state())
    ))?;
    let text = progress_text(
        TrainingJobState::Running,
        &v1::TrainingProgress {
            eta: progress.eta.filter(|_| !is_final(job.state())),
            ..progress
        },
    );
    out.line(format_args!(
        "step {} of {} · {text}",
        progress.step, progress.total_steps
    ))?;
    if let Some(stats) = &job.data_stats {
        let labels = match stats.labels.len() {
            // A number is answered under one name, which is no label.
            0 | 1 => String::new(),
            labels => format!(", {labels} labels"),
        };
        out.line(format_args!(
            "{} examples, {} to validate{labels}",
            stats.train_examples, stats.validation_examples,
        ))?;
    }
    if let Some((before, after)) = compared(job) {
        out.line(format_args!(
            "held-out loss {before:.4} before, {after:.4} after"
        ))?;
    }
    if let Some(result) = &job.classification_result {
        print_result(out, result)?;
    }
    if !job.version.is_empty() {
        out.line(format_args!("live as {}", job.version))?;
    }
    if let Some(error) = &job.error {
        out.line(format_args!("failed: {}", error.message))?;
    }
    Ok(())
}

/// The held-out losses of what training started from and of what it came to.
fn compared(job: &v1::TrainingJob) -> Option<(f64, f64)> {
    let outcome = job.outcome.as_ref()?;
    Some((
        outcome.baseline.as_ref()?.loss,
        outcome.result.as_ref()?.loss,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_says_loss_metric_speed_and_time_to_go() {
        let progress = v1::TrainingProgress {
            loss: Some(1.25),
            validation_loss: Some(1.5),
            validation_accuracy: Some(0.875),
            validation_perplexity: Some(4.4817),
            tokens_per_second: 512.4,
            eta: Some(prost_types::Duration {
                seconds: 75,
                nanos: 0,
            }),
            ..Default::default()
        };
        let text = progress_text(TrainingJobState::Running, &progress);
        assert_eq!(
            text,
            "loss 1.2500 · valid 1.5000 · perplexity 4.48 · accuracy 87.5 % · 512 tok/s · 1m15s to go"
        );
        let text = progress_text(TrainingJobState::Succeeded, &progress);
        assert!(
            text.starts_with("succeeded · ") && !text.contains("to go"),
            "{text}"
        );
    }
}
