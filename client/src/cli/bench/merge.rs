//! `espalier bench merge`: several processes' histogram files as one result.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Map, Value, json};

use crate::{
    bench::{
        histogram_log::{self, Counts},
        record::{Histograms, Metric},
        statistics::{Figures, PERCENTILES, rounded},
    },
    cli::{
        bench::{files, table},
        output::{Failure, Out},
    },
};

/// One result from the histogram files of several processes.
#[derive(Debug, Args)]
pub(crate) struct Merge {
    /// Files of `espalier bench --hist`.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Write the result as JSON.
    #[arg(long, short = 'o', value_name = "FILE")]
    out: Option<PathBuf>,
    /// Write the merged histograms.
    #[arg(long, value_name = "FILE")]
    hist: Option<PathBuf>,
}

// === impl Merge ===

impl Merge {
    pub(crate) fn run(self, out: Out) -> Result<(), Failure> {
        let mut read = Vec::new();
        for path in &self.files {
            let named = |error| Failure::Local(format!("{}: {error}", path.display()));
            let log = std::fs::read(path).map_err(|error| named(error.to_string()))?;
            read.push(histogram_log::read(&log).map_err(named)?);
        }
        let (counts, histograms) = histogram_log::merge(&read)
            .ok_or_else(|| Failure::Local("the histograms cannot be added".to_owned()))?;
        let document = document(&counts, &histograms, self.files.len());
        if let Some(path) = &self.out {
            files::write(path, format!("{document:#}\n").as_bytes())?;
        }
        if let Some(path) = &self.hist {
            let log = histogram_log::write(&counts, &histograms).map_err(Failure::Local)?;
            files::write(path, &log)?;
        }
        if out.is_json() {
            return out.json_document(&document);
        }
        out.line(format_args!(
            "{} processes · {} completed, {} failed in {:.2} s, {:.2}/s · {} output tokens, {:.1}/s",
            self.files.len(),
            counts.completed,
            counts.failed,
            counts.duration,
            a_second(counts.completed, &counts),
            counts.output_tokens,
            a_second(counts.output_tokens, &counts)
        ))?;
        for line in table::latencies(|metric| Figures::of(histograms.get(metric))) {
            out.line(line)?;
        }
        for (reason, count) in &counts.errors {
            out.line(format_args!("error     {reason}: {count}"))?;
        }
        Ok(())
    }
}

fn a_second(count: u64, counts: &Counts) -> f64 {
    if counts.duration > 0.0 {
        count as f64 / counts.duration
    } else {
        0.0
    }
}

/// The keys that a single test has too, as far as counts and histograms tell.
fn document(counts: &Counts, histograms: &Histograms, processes: usize) -> Value {
    let mut keys = Map::new();
    let mut put = |key: &str, value: Value| keys.insert(key.to_owned(), value);
    let rate = |count| rounded(a_second(count, counts));
    put("format", "espalier-bench-merged-1".into());
    put("processes", processes.into());
    put("duration", rounded(counts.duration).into());
    put("completed", counts.completed.into());
    put("failed", counts.failed.into());
    put("total_input_tokens", counts.input_tokens.into());
    put("total_output_tokens", counts.output_tokens.into());
    put("request_throughput", rate(counts.completed).into());
    put("request_goodput", json!(counts.good.map(rate)));
    put("output_throughput", rate(counts.output_tokens).into());
    let total = counts.input_tokens + counts.output_tokens;
    put("total_token_throughput", rate(total).into());
    for metric in Metric::ALL {
        let figures = Figures::of(histograms.get(metric)).unwrap_or_default();
        let name = metric.tag();
        put(&format!("mean_{name}_ms"), rounded(figures.mean).into());
        put(
            &format!("median_{name}_ms"),
            rounded(figures.percentiles[0]).into(),
        );
        put(&format!("std_{name}_ms"), rounded(figures.deviation).into());
        for ((percentile, _), found) in PERCENTILES.iter().zip(figures.percentiles) {
            put(&format!("{percentile}_{name}_ms"), rounded(found).into());
        }
    }
    put("warmup_requests", counts.warmup.into());
    put("cached_input_tokens", counts.cached_tokens.into());
    put("errors", json!(counts.errors));
    Value::Object(keys)
}
