//! Several tests in a row, at one load after the other: a sweep over given loads, or the search
//! for the highest load at which the objectives hold.

use std::fmt;

use serde_json::{Value, json};

use crate::{
    bench::{
        driver::Stop,
        record::Metric,
        schedule::Pattern,
        search::{Axis, Search},
        statistics::rounded,
        summary::Summary,
    },
    cli::{
        bench::{Ended, args::RunArgs, document, live::milliseconds, plan::Plan, run},
        output::{Failure, Out, aligned},
    },
};

/// Two rates that differ by less give the same answer in practice.
const PRECISION: f64 = 0.05;

/// Which loads are tried.
#[derive(Debug)]
pub(crate) enum Steps {
    Sweep(Axis, Vec<f64>),
    Search(Axis, Search),
}

/// One load for people.
struct Load(Axis, f64);

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Axis::Clients => write!(f, "{} clients", self.1),
            Axis::Rate => write!(f, "{} requests/s", rounded(self.1)),
        }
    }
}

// === impl Steps ===

impl Steps {
    /// `None` when the options ask for a single test.
    pub(crate) fn of(args: &RunArgs) -> Result<Option<Self>, Failure> {
        let load = &args.load;
        let whole = |(from, to): (usize, usize)| (from as f64, to as f64);
        let bounds = [
            (Axis::Rate, load.search),
            (Axis::Clients, load.search_clients.map(whole)),
        ];
        for (axis, range) in bounds {
            let Some((from, to)) = range else { continue };
            if args.output.slo.is_empty() {
                let why =
                    "--search: what must hold at the highest load? Add --slo 'ttft:p99<200ms'";
                return Err(Failure::Usage(why.to_owned()));
            }
            if from >= to {
                let why = format!("--search {from}..{to}: the second load must be above the first");
                return Err(Failure::Usage(why));
            }
            return Ok(Some(Self::Search(
                axis,
                Search::new(axis, from, to, PRECISION),
            )));
        }
        if !load.sweep.is_empty() {
            return Ok(Some(Self::Sweep(Axis::Rate, load.sweep.clone())));
        }
        if !load.sweep_clients.is_empty() {
            let loads = load.sweep_clients.iter().map(|count| *count as f64);
            return Ok(Some(Self::Sweep(Axis::Clients, loads.collect())));
        }
        Ok(None)
    }

    pub(crate) async fn run(
        self,
        args: &RunArgs,
        plan: &Plan,
        server: &Value,
        stop: &Stop,
        out: Out,
    ) -> Result<Ended, Failure> {
        let mut ended = Ended {
            tested: Vec::new(),
            documents: Vec::new(),
            search: None,
            is_judged: true,
        };
        let runner = Runner {
            args,
            plan,
            server,
            stop,
            out,
        };
        match self {
            Self::Sweep(axis, loads) => {
                let all = loads.len();
                for (number, load) in loads.into_iter().enumerate() {
                    let title = format!("step {} of {all}, {}: ", number + 1, Load(axis, load));
                    if !runner.step(axis, load, title, &mut ended).await? {
                        break;
                    }
                }
                runner.table(axis, &ended)?;
            }
            Self::Search(axis, mut search) => {
                while let Some(load) = search.next() {
                    let title = format!("trying {}: ", Load(axis, load));
                    if !runner.step(axis, load, title, &mut ended).await? {
                        break;
                    }
                    let holds = ended
                        .tested
                        .last()
                        .is_some_and(|tested| holds(&tested.summary));
                    search.found(load, holds);
                }
                runner.table(axis, &ended)?;
                runner.answer(axis, &search, &mut ended)?;
            }
        }
        Ok(ended)
    }
}

/// A server that answers nothing promises nothing.
fn holds(summary: &Summary) -> bool {
    summary.completed > 0 && summary.is_met()
}

struct Runner<'a> {
    args: &'a RunArgs,
    plan: &'a Plan,
    server: &'a Value,
    stop: &'a Stop,
    out: Out,
}

// === impl Runner ===

impl Runner<'_> {
    /// False when the test was stopped.
    async fn step(
        &self,
        axis: Axis,
        load: f64,
        title: String,
        ended: &mut Ended,
    ) -> Result<bool, Failure> {
        let number = ended.tested.len() as u64;
        let plan = self.plan.at(axis, load, number);
        let tested = run::test(&plan, self.stop, self.out, title).await;
        let mut document = document::of(self.args, &plan, &tested, self.server);
        let name = match axis {
            Axis::Rate => "rate",
            Axis::Clients => "clients",
        };
        document["step"] = json!({"axis": name, "load": rounded(load)});
        let word = if holds(&tested.summary) {
            ""
        } else {
            ", objectives missed"
        };
        let summary = &tested.summary;
        self.out.remark(format_args!(
            "{}: {:.2}/s completed, {} failed{}",
            Load(axis, load),
            summary.rate(summary.completed),
            summary.failed,
            if summary.verdicts.is_empty() {
                ""
            } else {
                word
            },
        ));
        ended.documents.push(document);
        ended.tested.push(tested);
        Ok(!self.stop.is_set())
    }

    /// One row a step, by load.
    fn table(&self, axis: Axis, ended: &Ended) -> Result<(), Failure> {
        if self.out.is_json() {
            return Ok(());
        }
        self.out.line(document::headline(self.plan))?;
        let first = match axis {
            Axis::Rate => "requests/s",
            Axis::Clients => "clients",
        };
        let head = [
            first,
            "completed/s",
            "failed",
            "tokens/s",
            "ttft p50",
            "ttft p99",
            "tpot p50",
            "tpot p99",
            "e2e p50",
            "e2e p99",
            "goodput/s",
            "objectives",
        ];
        let mut steps: Vec<_> = ended.tested.iter().zip(&ended.documents).collect();
        steps.sort_by(|a, b| {
            let load = |document: &Value| document["step"]["load"].as_f64().unwrap_or(0.0);
            load(a.1).total_cmp(&load(b.1))
        });
        let rows = steps.into_iter().map(|(tested, document)| {
            let load = document["step"]["load"].as_f64().unwrap_or_default();
            row(load, &tested.summary)
        });
        for line in aligned(&head, &rows.collect::<Vec<_>>()) {
            self.out.line(line)?;
        }
        Ok(())
    }

    fn answer(&self, axis: Axis, search: &Search, ended: &mut Ended) -> Result<(), Failure> {
        let found = search.answer();
        let step = found.and_then(|(load, _)| {
            let is_it = |document: &Value| document["step"]["load"] == json!(rounded(load));
            ended.documents.iter().position(is_it)
        });
        let text = match found {
            None => "not even the lowest load meets the objectives".to_owned(),
            Some((load, true)) => format!(
                "highest load that meets the objectives: {}",
                Load(axis, load)
            ),
            Some((load, false)) => format!(
                "all loads up to {} meet the objectives; search higher",
                Load(axis, load)
            ),
        };
        if !self.out.is_json() {
            self.out.line(text)?;
        }
        ended.search = Some(json!({
            "load": found.map(|(load, _)| rounded(load)),
            "is_bounded": found.is_some_and(|(_, bounded)| bounded),
            "step": step,
        }));
        // A search runs into missed objectives by design; only finding nothing is a failure.
        ended.is_judged = found.is_none();
        Ok(())
    }
}

fn row(load: f64, summary: &Summary) -> Vec<String> {
    let p = |metric: Metric, name: &str| match summary.figures(metric) {
        Some(figures) => milliseconds(figures.percentile(name).unwrap_or_default()),
        None => "-".to_owned(),
    };
    let tokens = summary
        .steady_output_throughput
        .unwrap_or_else(|| summary.rate(summary.output_tokens));
    let verdict = match summary.verdicts.is_empty() {
        true => "-",
        false if holds(summary) => "met",
        false => "missed",
    };
    vec![
        format!("{load}"),
        format!("{:.2}", summary.rate(summary.completed)),
        summary.failed.to_string(),
        format!("{tokens:.1}"),
        p(Metric::Ttft, "p50"),
        p(Metric::Ttft, "p99"),
        p(Metric::Tpot, "p50"),
        p(Metric::Tpot, "p99"),
        p(Metric::E2e, "p50"),
        p(Metric::E2e, "p99"),
        summary
            .good
            .map_or("-".to_owned(), |good| format!("{:.2}", summary.rate(good))),
        verdict.to_owned(),
    ]
}

// === impl Plan ===

impl Plan {
    /// The same test at this load, with requests of its own.
    fn at(&self, axis: Axis, load: f64, number: u64) -> Self {
        let mut plan = self.clone();
        plan.workload = self.workload.reseeded(number);
        match axis {
            Axis::Clients => {
                let clients = load as usize;
                plan.pattern = Pattern::Closed {
                    from: clients,
                    to: clients,
                };
            }
            Axis::Rate => plan.pattern = self.pattern_at(load),
        }
        plan
    }
}
