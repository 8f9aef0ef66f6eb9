//! Files that a test reads and leaves: JSON, the HTML report, a CSV row for each request, and
//! histograms that merge.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use crate::{
    bench::{
        histogram_log::{self, Counts},
        record::Row,
        report,
    },
    cli::{
        bench::{Ended, args::OutputArgs, document, plan::Plan, run::Tested},
        output::{Failure, Out},
    },
};

/// The HTML report of results that were written before.
#[derive(Debug, Args)]
pub(crate) struct Report {
    /// JSON files of `espalier bench --out`; several tests of one file are all shown.
    #[arg(required = true)]
    results: Vec<PathBuf>,
    /// Where the page is written.
    #[arg(long, short = 'o', value_name = "FILE")]
    out: PathBuf,
}

// === impl Report ===

impl Report {
    pub(crate) fn run(self, out: Out) -> Result<(), Failure> {
        let mut all = Vec::new();
        for path in &self.results {
            all.extend(tests_of(&read_json(path)?));
        }
        write(&self.out, report::page(&all).as_bytes())?;
        out.remark(format_args!("{} is written", self.out.display()));
        Ok(())
    }
}

/// The tests in a result: its steps, or itself.
fn tests_of(result: &Value) -> Vec<Value> {
    match result["steps"].as_array() {
        Some(steps) if !steps.is_empty() => steps.clone(),
        _ => vec![result.clone()],
    }
}

/// A JSON file.
pub(crate) fn read_json(path: &Path) -> Result<Value, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::Local(format!("cannot read {}: {error}", path.display())))?;
    serde_json::from_str(&text).map_err(|error| {
        let why = "it is no result of `espalier bench --out`";
        Failure::Local(format!("{}: {why}: {error}", path.display()))
    })
}

/// A result must not be lost because its directory is missing.
pub(crate) fn check_places(args: &OutputArgs) -> Result<(), Failure> {
    for path in [&args.out, &args.html, &args.csv, &args.hist]
        .into_iter()
        .flatten()
    {
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        if parent.is_some_and(|parent| !parent.is_dir()) {
            let text = format!(
                "cannot write {}: its directory does not exist",
                path.display()
            );
            return Err(Failure::Usage(text));
        }
    }
    Ok(())
}

pub(crate) fn write_all(
    args: &OutputArgs,
    ended: &Ended,
    result: &Value,
    plan: &Plan,
) -> Result<(), Failure> {
    if let Some(path) = &args.out {
        write(path, format!("{result:#}\n").as_bytes())?;
    }
    if let Some(path) = &args.html {
        write(path, report::page(&ended.documents).as_bytes())?;
    }
    if let Some(path) = &args.csv {
        write(path, &requests(ended, plan)?)?;
    }
    // The last step's, as the table's.
    if let (Some(path), Some(tested)) = (&args.hist, ended.tested.last()) {
        let began = document::unix(tested.began);
        let counts = Counts::of(&tested.summary, began);
        let log = histogram_log::write(&counts, &tested.summary.histograms);
        write(path, &log.map_err(Failure::Local)?)?;
    }
    Ok(())
}

pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    std::fs::write(path, bytes)
        .map_err(|error| Failure::Local(format!("cannot write {}: {error}", path.display())))
}

const HEAD: [&str; 21] = [
    "step",
    "index",
    "operation",
    "tenant",
    "adapter",
    "due_us",
    "sent_us",
    "first_us",
    "last_us",
    "end_us",
    "ttft_us",
    "tpot_us",
    "e2e_us",
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "server_queue_us",
    "server_adapter_load_us",
    "server_ttft_us",
    "server_total_us",
    "error",
];

/// A CSV row for each measured request, microseconds since the start of its step.
fn requests(ended: &Ended, plan: &Plan) -> Result<Vec<u8>, Failure> {
    let failed = |error: csv::Error| Failure::Local(format!("--csv: {error}"));
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(HEAD).map_err(failed)?;
    for (step, tested) in ended.tested.iter().enumerate() {
        for row in &tested.rows {
            writer
                .write_record(cells(step, row, tested, plan))
                .map_err(failed)?;
        }
    }
    writer
        .into_inner()
        .map_err(|error| Failure::Local(format!("--csv: {error}")))
}

fn cells(step: usize, row: &Row, tested: &Tested, plan: &Plan) -> [String; 21] {
    let tenant = &plan.workload.tenants[row.tenant as usize];
    let adapter = row
        .adapter
        .and_then(|place| tenant.adapters.get(place as usize));
    let some = |value: Option<u64>| value.map_or(String::new(), |value| value.to_string());
    let server = |value: Option<u32>| some(value.map(u64::from));
    let error = row
        .error
        .and_then(|place| tested.reasons.get(usize::from(place)));
    [
        step.to_string(),
        row.index.to_string(),
        row.operation.name().to_owned(),
        tenant.name.clone(),
        adapter.cloned().unwrap_or_default(),
        row.due.to_string(),
        row.sent.to_string(),
        some(row.first),
        some(row.last),
        row.end.to_string(),
        some(row.ttft()),
        some(row.tpot()),
        row.e2e().to_string(),
        row.input.to_string(),
        row.output.to_string(),
        row.cached.to_string(),
        server(row.server.queue),
        server(row.server.adapter_load),
        server(row.server.first_token),
        server(row.server.total),
        error.cloned().unwrap_or_default(),
    ]
}
