//! A test as it goes: a panel with sparklines while a person looks at a terminal, a line every
//! ten seconds where nobody does. It looks at the recorder a few times a second and costs the
//! requests nothing.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    bench::{
        record::{Metric, Recorder},
        schedule::Extent,
        statistics::quantile_ms,
        target::Target,
    },
    cli::output::Out,
};

/// How often a person's panel moves.
const FRAME: Duration = Duration::from_millis(500);
/// How often a log gets a line.
const LINE: Duration = Duration::from_secs(10);
/// Frames that a sparkline shows.
const WIDTH: usize = 40;

/// Shows a test until it is dropped.
#[derive(Debug)]
pub(crate) struct Live {
    task: tokio::task::JoinHandle<()>,
    bar: Option<ProgressBar>,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.task.abort();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

// === impl Live ===

impl Live {
    /// `title` stands before everything else where several tests follow each other.
    pub(crate) fn show(
        out: Out,
        title: String,
        recorder: Arc<Recorder>,
        target: Arc<Target>,
        extent: Extent,
    ) -> Self {
        let bar = out.is_watched().then(|| {
            let bar = ProgressBar::new(1000);
            if let Ok(style) = ProgressStyle::with_template("{spinner} {bar:32} {msg}") {
                bar.set_style(style.progress_chars("━╸ "));
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        let mut view = View {
            recorder,
            target,
            extent,
            title,
            tokens_before: 0,
            looked: Instant::now(),
            rows_before: 0,
            token_rates: VecDeque::new(),
            first_tokens: VecDeque::new(),
        };
        let shown = bar.clone();
        let task = tokio::spawn(async move {
            let every = if shown.is_some() { FRAME } else { LINE };
            loop {
                tokio::time::sleep(every).await;
                let glance = view.look();
                match &shown {
                    Some(bar) => {
                        bar.set_position((glance.done * 1000.0) as u64);
                        bar.set_message(view.panel(&glance));
                    }
                    None => out.remark(glance.line(&view.title)),
                }
            }
        });
        Self { task, bar }
    }
}

/// What is remembered from one look to the next.
struct View {
    recorder: Arc<Recorder>,
    target: Arc<Target>,
    extent: Extent,
    title: String,
    tokens_before: u64,
    looked: Instant,
    rows_before: usize,
    token_rates: VecDeque<f64>,
    first_tokens: VecDeque<f64>,
}

/// One look.
#[derive(Clone, Debug, Default)]
struct Glance {
    elapsed: f64,
    /// Part of the test, 0 to 1.
    done: f64,
    total: String,
    answered: usize,
    warmup: u64,
    failed: u64,
    in_flight: u64,
    tokens_a_second: f64,
    /// p50 and p99.
    ttft: Option<[f64; 2]>,
    tpot: Option<[f64; 2]>,
    e2e: Option<[f64; 2]>,
}

// === impl View ===

impl View {
    fn look(&mut self) -> Glance {
        let elapsed = self.recorder.start().elapsed();
        let since = self.looked.elapsed().as_secs_f64().max(1e-3);
        self.looked = Instant::now();
        let tokens = self.target.tokens().count();
        let tokens_a_second = tokens.saturating_sub(self.tokens_before) as f64 / since;
        self.tokens_before = tokens;
        let measured = self.recorder.lock();
        let pair = |metric| {
            let cells = measured.histograms.get(metric);
            (!cells.is_empty()).then(|| [quantile_ms(cells, 0.5), quantile_ms(cells, 0.99)])
        };
        let new = measured.rows.get(self.rows_before..).unwrap_or_default();
        let slowest = new.iter().filter_map(|row| row.ttft()).max();
        let answered = measured.rows.len();
        let by_count = self.extent.requests.map(|all| answered as f64 / all as f64);
        let by_time = self
            .extent
            .end()
            .map(|end| elapsed.as_secs_f64() / end.as_secs_f64());
        let glance = Glance {
            elapsed: elapsed.as_secs_f64(),
            done: by_count.unwrap_or(0.0).max(by_time.unwrap_or(0.0)).min(1.0),
            total: match (self.extent.end(), self.extent.requests) {
                (Some(end), _) => format!(" of {:.0} s", end.as_secs_f64()),
                (None, Some(requests)) => format!(" s, of {requests} requests"),
                (None, None) => " s".to_owned(),
            },
            answered,
            warmup: measured.warmup,
            failed: measured
                .failures
                .values()
                .map(|failures| failures.count)
                .sum(),
            in_flight: self.recorder.in_flight(),
            tokens_a_second,
            ttft: pair(Metric::Ttft),
            tpot: pair(Metric::Tpot),
            e2e: pair(Metric::E2e),
        };
        drop(measured);
        self.rows_before = answered;
        push(&mut self.token_rates, tokens_a_second);
        if let Some(slowest) = slowest {
            push(&mut self.first_tokens, slowest as f64);
        }
        glance
    }

    fn panel(&self, glance: &Glance) -> String {
        let mut text = format!(
            "{}{:.0}{} · {} answered · {} in flight · {} failed{}",
            self.title,
            glance.elapsed,
            glance.total,
            glance.answered,
            glance.in_flight,
            glance.failed,
            if glance.answered == 0 && glance.warmup > 0 {
                " · warming up"
            } else {
                ""
            },
        );
        let rates = sparkline(&self.token_rates);
        if glance.ttft.is_some() {
            text.push_str(&format!(
                "\n  tokens {rates} {:.0}/s",
                glance.tokens_a_second
            ));
        }
        let mut row = |name: &str, line: &str, pair: Option<[f64; 2]>| {
            if let Some([p50, p99]) = pair {
                let (p50, p99) = (milliseconds(p50), milliseconds(p99));
                text.push_str(&format!("\n  {name}   {line} p50 {p50}  p99 {p99}"));
            }
        };
        let blank = " ".repeat(WIDTH);
        row("ttft", &sparkline(&self.first_tokens), glance.ttft);
        row("tpot", &blank, glance.tpot);
        row("e2e ", &blank, glance.e2e);
        text
    }
}

// === impl Glance ===

impl Glance {
    fn line(&self, title: &str) -> String {
        let mut text = format!(
            "{title}{:.0}{} · {} answered, {} in flight, {} failed · {:.0} tokens/s",
            self.elapsed,
            self.total,
            self.answered,
            self.in_flight,
            self.failed,
            self.tokens_a_second
        );
        for (name, pair) in [("ttft", self.ttft), ("tpot", self.tpot), ("e2e", self.e2e)] {
            if let Some([p50, p99]) = pair {
                let (p50, p99) = (milliseconds(p50), milliseconds(p99));
                text.push_str(&format!(" · {name} p50 {p50} p99 {p99}"));
            }
        }
        text
    }
}

fn push(values: &mut VecDeque<f64>, value: f64) {
    if values.len() == WIDTH {
        values.pop_front();
    }
    values.push_back(value);
}

/// Values as blocks of eight heights over their largest.
fn sparkline(values: &VecDeque<f64>) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = values.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let block = |value: &f64| BLOCKS[((value / most * 7.0).round() as usize).min(7)];
    let blanks = std::iter::repeat_n(' ', WIDTH - values.len().min(WIDTH));
    blanks.chain(values.iter().map(block)).collect()
}

/// Three digits are enough for a person.
pub(crate) fn milliseconds(value: f64) -> String {
    match value {
        ..10.0 => format!("{value:.2} ms"),
        ..100.0 => format!("{value:.1} ms"),
        ..10_000.0 => format!("{value:.0} ms"),
        _ => format!("{:.1} s", value / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparklines_scale_to_their_largest_value() {
        let line = sparkline(&VecDeque::from([0.0, 50.0, 100.0]));
        assert_eq!(line.trim_start(), "▁▅█");
        assert_eq!(line.chars().count(), WIDTH);
    }

    #[test]
    fn three_digits() {
        assert_eq!(milliseconds(1.2345), "1.23 ms");
        assert_eq!(milliseconds(123.4), "123 ms");
        assert_eq!(milliseconds(12_345.0), "12.3 s");
    }
}
