//! `espalier bench`: a load test from options to exit status. Its parts stand beside it; this
//! file says in which order they run.

mod args;
mod compare;
mod document;
mod files;
mod live;
mod merge;
mod plan;
mod run;
mod steps;
mod table;

use clap::{Args, Subcommand};
use serde_json::Value;

use crate::cli::{
    Global,
    output::{Failure, Out},
};
use args::RunArgs;
use plan::Plan;
use run::{Tested, stop_on_ctrl_c};
use steps::Steps;

/// Put load on a server and measure: latencies, throughput, goodput.
///
/// Open loop (--rate, --trace): requests are due at moments fixed before the test, and their
/// latency counts from there, so that a stalling server cannot hide behind a waiting client.
/// Closed loop (--clients): each client sends when it has its answer. Without either, one client.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Bench {
    #[command(subcommand)]
    command: Option<BenchCommand>,
    #[command(flatten)]
    run: RunArgs,
}

/// What is done with results.
#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Ratios of two results, and exit status 7 when a figure got worse.
    Compare(compare::Compare),
    /// One result from the histogram files (--hist) of several processes.
    Merge(merge::Merge),
    /// The HTML report of results that were written before.
    Report(files::Report),
}

// === impl Bench ===

impl Bench {
    pub(crate) async fn run(self, global: &Global, out: Out) -> Result<(), Failure> {
        match self.command {
            Some(BenchCommand::Compare(command)) => command.run(out),
            Some(BenchCommand::Merge(command)) => command.run(out),
            Some(BenchCommand::Report(command)) => command.run(out),
            None => load_test(&self.run, global, out).await,
        }
    }
}

async fn load_test(args: &RunArgs, global: &Global, out: Out) -> Result<(), Failure> {
    // Before the test: a path that cannot be read would be found out too late.
    let old = args
        .output
        .compare
        .as_deref()
        .map(files::read_json)
        .transpose()?;
    files::check_places(&args.output)?;
    let steps = Steps::of(args)?;
    let plan = Plan::of(args, global).await?;
    let server = plan.target.describe().await;
    let stop = stop_on_ctrl_c();
    let work = plan.begin_work()?;
    let outcome = match steps {
        None => single(args, &plan, &server, &stop, out).await,
        Some(steps) => steps.run(args, &plan, &server, &stop, out).await,
    };
    let beside = match work {
        Some(work) => work.end().await,
        None => serde_json::Map::new(),
    };
    let mut ended = outcome?;
    if let (false, Some(last)) = (beside.is_empty(), ended.documents.last_mut()) {
        last["beside"] = Value::Object(beside);
    }
    let mut result = ended.result();
    let allowed = args.output.fail_if_worse;
    if let Some(old) = &old {
        result["compare"] = compare::document(old, &result, allowed);
    }
    files::write_all(&args.output, &ended, &result, &plan)?;
    if out.is_json() {
        out.json_document(&result)?;
    } else {
        table::beside(out, ended.documents.last())?;
    }
    let got_worse = match &old {
        Some(old) if !out.is_json() => compare::print(out, old, &result, allowed)?,
        _ => compare::is_any_worse(&result["compare"]),
    };
    run::outcome(&ended, got_worse)
}

/// All that a command measured, in the order of its steps.
pub(crate) struct Ended {
    pub(crate) tested: Vec<Tested>,
    /// One for each test.
    pub(crate) documents: Vec<Value>,
    /// What a search found; part of the result.
    pub(crate) search: Option<Value>,
    /// Of several steps, whether the objectives decide about the exit status.
    pub(crate) is_judged: bool,
}

// === impl Ended ===

impl Ended {
    /// The JSON: the one test, or the step that answers with all steps below it.
    fn result(&self) -> Value {
        let mut result = match (&self.search, self.documents.as_slice()) {
            (None, [one]) => return one.clone(),
            (Some(search), all) => {
                let answer = search["step"]
                    .as_u64()
                    .and_then(|step| all.get(step as usize));
                answer.or(all.last()).cloned().unwrap_or_default()
            }
            (None, all) => all.last().cloned().unwrap_or_default(),
        };
        result["steps"] = Value::Array(self.documents.clone());
        if let Some(search) = &self.search {
            result["search"] = search.clone();
        }
        result
    }
}

async fn single(
    args: &RunArgs,
    plan: &Plan,
    server: &Value,
    stop: &crate::bench::driver::Stop,
    out: Out,
) -> Result<Ended, Failure> {
    let tested = run::test(plan, stop, out, String::new()).await;
    if !out.is_json() {
        out.line(document::headline(plan))?;
        table::print(out, &tested.summary, &document::client_line(&tested, plan))?;
    }
    Ok(Ended {
        documents: vec![document::of(args, plan, &tested, server)],
        tested: vec![tested],
        search: None,
        is_judged: true,
    })
}
