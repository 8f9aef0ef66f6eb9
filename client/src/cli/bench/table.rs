//! The end of a test as text for people.

use serde_json::Value;

use crate::{
    bench::{
        record::Metric,
        statistics::Figures,
        summary::{Part, Summary},
    },
    cli::{
        bench::live::milliseconds,
        output::{Failure, Out, aligned},
    },
};

/// Rows of a breakdown; the JSON has all of them.
const MOST_PARTS: usize = 10;

const HEAD: [&str; 7] = ["", "mean", "p50", "p90", "p99", "p99.9", "max"];

/// Prints everything about one test.
pub(crate) fn print(out: Out, summary: &Summary, client: &str) -> Result<(), Failure> {
    for line in lines(summary, client) {
        out.line(line)?;
    }
    Ok(())
}

fn lines(summary: &Summary, client: &str) -> Vec<String> {
    let mut lines = totals(summary);
    lines.push(String::new());
    lines.extend(latencies(|metric| summary.figures(metric)));
    for (title, parts) in [
        ("by operation", &summary.operations),
        ("by adapter", &summary.adapters),
        ("by tenant", &summary.tenants),
    ] {
        if parts.len() > 1 {
            lines.push(String::new());
            lines.extend(breakdown(title, parts));
        }
    }
    if !summary.failures.is_empty() {
        lines.push(String::new());
        lines.extend(errors(summary));
    }
    lines.push(String::new());
    lines.push(client.to_owned());
    lines.extend(summary.verdicts.iter().map(ToString::to_string));
    lines
}

fn totals(summary: &Summary) -> Vec<String> {
    let rate = |count| summary.rate(count);
    let mut requests = format!(
        "requests  {} completed, {} failed in {:.2} s, {:.2}/s",
        summary.completed,
        summary.failed,
        summary.duration,
        rate(summary.completed)
    );
    if summary.warmup > 0 {
        requests.push_str(&format!(" (after {} of warm-up)", summary.warmup));
    }
    let mut lines = vec![requests];
    if let Some(good) = summary.good {
        let goals: Vec<String> = summary.goals.iter().map(ToString::to_string).collect();
        lines.push(format!(
            "goodput   {:.2}/s, {:.1} % of requests within {}",
            rate(good),
            100.0 * good as f64 / (summary.completed + summary.failed).max(1) as f64,
            goals.join(" ")
        ));
    }
    lines.push(format!(
        "input     {} tokens, {:.1}/s{}",
        summary.input_tokens,
        rate(summary.input_tokens),
        match summary.cached_tokens {
            0 => String::new(),
            cached => format!(", {cached} of them cached"),
        }
    ));
    if summary.output_tokens > 0 {
        let steady = summary.steady_output_throughput;
        lines.push(format!(
            "output    {} tokens, {:.1}/s{}",
            summary.output_tokens,
            rate(summary.output_tokens),
            steady.map_or(String::new(), |steady| format!(
                ", {steady:.1}/s while requests were sent"
            ))
        ));
    }
    lines
}

fn row(name: &str, figures: &Figures) -> Vec<String> {
    let p = |name| milliseconds(figures.percentile(name).unwrap_or_default());
    vec![
        name.to_owned(),
        milliseconds(figures.mean),
        p("p50"),
        p("p90"),
        p("p99"),
        p("p999"),
        milliseconds(figures.max),
    ]
}

/// The table of times, of whatever has figures.
pub(crate) fn latencies(figures: impl Fn(Metric) -> Option<Figures>) -> Vec<String> {
    let all = [
        ("time to first token", Metric::Ttft),
        ("time per output token", Metric::Tpot),
        ("between tokens", Metric::Itl),
        ("end to end", Metric::E2e),
        ("server: queue", Metric::Queue),
        ("server: adapter load", Metric::AdapterLoad),
        ("client: sent late by", Metric::Lag),
    ];
    let rows = all.iter().filter_map(|(name, metric)| {
        let found = figures(*metric)?;
        Some(row(name, &found))
    });
    aligned(&HEAD, &rows.collect::<Vec<_>>())
}

fn breakdown(title: &str, parts: &[Part]) -> Vec<String> {
    let head = [
        title, "requests", "failed", "tokens", "ttft p50", "ttft p99", "tpot p50", "e2e p50",
        "e2e p99",
    ];
    let cell = |figures: &Option<Figures>, name| match figures {
        Some(figures) => milliseconds(figures.percentile(name).unwrap_or_default()),
        None => "-".to_owned(),
    };
    let row = |part: &Part| {
        vec![
            part.name.clone(),
            part.completed.to_string(),
            part.failed.to_string(),
            part.output_tokens.to_string(),
            cell(&part.ttft, "p50"),
            cell(&part.ttft, "p99"),
            cell(&part.tpot, "p50"),
            cell(&part.e2e, "p50"),
            cell(&part.e2e, "p99"),
        ]
    };
    let rows: Vec<Vec<String>> = parts.iter().take(MOST_PARTS).map(row).collect();
    let mut lines = aligned(&head, &rows);
    if parts.len() > MOST_PARTS {
        let more = parts.len() - MOST_PARTS;
        lines.push(format!(
            "and {more} more; the JSON of --out has all of them"
        ));
    }
    lines
}

/// What was done beside the requests.
pub(crate) fn beside(out: Out, document: Option<&Value>) -> Result<(), Failure> {
    let Some(work) = document.and_then(|document| document["beside"].as_object()) else {
        return Ok(());
    };
    let time = |value: &Value| value.as_f64().map_or("-".to_owned(), milliseconds);
    let row = |(kind, done): (&String, &Value)| {
        let example = done["example"].as_str().unwrap_or_default();
        vec![
            kind.clone(),
            done["completed"].to_string(),
            done["failed"].to_string(),
            done["unfinished"].to_string(),
            time(&done["ms"]["p50"]),
            time(&done["ms"]["max"]),
            example.chars().take(100).collect(),
        ]
    };
    let rows: Vec<Vec<String>> = work.iter().map(row).collect();
    let head = [
        "beside",
        "completed",
        "failed",
        "unfinished",
        "p50",
        "max",
        "the first error",
    ];
    out.line("")?;
    for line in aligned(&head, &rows) {
        out.line(line)?;
    }
    Ok(())
}

fn errors(summary: &Summary) -> Vec<String> {
    let rows = summary.failures.iter().map(|(reason, failures)| {
        let example: String = failures.example.chars().take(100).collect();
        vec![reason.clone(), failures.count.to_string(), example]
    });
    aligned(
        &["errors", "count", "the first one"],
        &rows.collect::<Vec<_>>(),
    )
}
