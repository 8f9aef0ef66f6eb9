//! A test in figures: what `vllm bench serve` writes, under its names, and what it does not have:
//! lateness of the client, the server's own times, breakdowns, objectives, course, identity.

use std::{collections::BTreeMap, time::Duration};

use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};

use crate::bench::{
    objective::{Goal, Objective, Verdict},
    record::{Failures, Histograms, Measured, Metric, Row, TICK},
    schedule::Extent,
    series::Series,
    statistics::{Figures, PERCENTILES, quantile_ms, rounded},
    workload::Tenant,
};

/// What is judged.
#[derive(Clone, Debug, Default)]
pub(crate) struct Judging {
    pub(crate) objectives: Vec<Objective>,
    pub(crate) goals: Vec<Goal>,
}

/// The figures of some of the requests: an operation's, an adapter's, a tenant's.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) completed: u64,
    pub(crate) failed: u64,
    pub(crate) output_tokens: u64,
    pub(crate) ttft: Option<Figures>,
    pub(crate) tpot: Option<Figures>,
    pub(crate) e2e: Option<Figures>,
}

/// A finished test.
#[derive(Clone, Debug)]
pub(crate) struct Summary {
    /// Seconds from the first measured request to the last answer.
    pub(crate) duration: f64,
    pub(crate) completed: u64,
    pub(crate) failed: u64,
    pub(crate) warmup: u64,
    pub(crate) input_tokens: u64,
    pub(crate) output_tokens: u64,
    pub(crate) cached_tokens: u64,
    /// Requests that reached every goal; `None` without goals.
    pub(crate) good: Option<u64>,
    pub(crate) goals: Vec<Goal>,
    /// Output tokens a second while requests were still being sent: without the tail in which
    /// the last ones end.
    pub(crate) steady_output_throughput: Option<f64>,
    pub(crate) most_tokens_a_second: f64,
    pub(crate) most_in_flight: u64,
    pub(crate) histograms: Histograms,
    pub(crate) failures: BTreeMap<String, Failures>,
    pub(crate) verdicts: Vec<Verdict>,
    pub(crate) operations: Vec<Part>,
    pub(crate) adapters: Vec<Part>,
    pub(crate) tenants: Vec<Part>,
    pub(crate) series: Series,
}

/// The span that was measured, in microseconds since the start.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Window {
    begin: u64,
    /// The last request was due.
    close: u64,
    /// The last answer has come.
    end: u64,
}

// === impl Window ===

impl Window {
    fn of(rows: &[Row], extent: Extent, stopped: Option<Duration>) -> Self {
        let micros = crate::bench::quantity::micros;
        let first = rows.iter().map(|row| row.due).min().unwrap_or(0);
        let begin = if extent.warmup_requests > 0 || extent.duration.is_none() {
            first
        } else {
            micros(extent.warmup)
        };
        let last_due = rows.iter().map(|row| row.due).max().unwrap_or(0);
        let planned = extent.end().map_or(last_due, micros);
        let close = stopped.map_or(planned, |at| micros(at).min(planned.max(last_due)));
        let last = rows.iter().map(|row| row.end).max().unwrap_or(0);
        Self {
            begin,
            close,
            end: last.max(close),
        }
    }

    fn seconds(self) -> f64 {
        self.end.saturating_sub(self.begin) as f64 / 1e6
    }

    /// Tokens a second in the whole ticks up to the last request.
    fn steady(self, tokens: &[u32]) -> Option<f64> {
        let tick = crate::bench::quantity::micros(TICK);
        let from = self.begin.div_ceil(tick) as usize;
        let to = ((self.close / tick) as usize).min(tokens.len());
        let spans = tokens.get(from..to).filter(|spans| spans.len() >= 10)?;
        let sum: u64 = spans.iter().map(|count| u64::from(*count)).sum();
        Some(sum as f64 / (spans.len() as f64 * TICK.as_secs_f64()))
    }
}

// === impl Summary ===

impl Summary {
    /// `stopped` is when a person ended the test.
    pub(crate) fn of(
        measured: &Measured,
        extent: Extent,
        stopped: Option<Duration>,
        tenants: &[Tenant],
        judging: &Judging,
    ) -> Self {
        let window = Window::of(&measured.rows, extent, stopped);
        let ok = || measured.rows.iter().filter(|row| row.is_ok());
        let sum = |field: fn(&Row) -> u32| ok().map(|row| u64::from(field(row))).sum::<u64>();
        let goals = if judging.goals.is_empty() {
            judging
                .objectives
                .iter()
                .filter_map(Objective::as_goal)
                .collect()
        } else {
            judging.goals.clone()
        };
        let is_good = |row: &&Row| goals.iter().all(|goal| goal.is_reached(row));
        let a_second = measured
            .tokens
            .chunks(10)
            .map(|ticks| ticks.iter().sum::<u32>());
        Self {
            duration: window.seconds(),
            completed: ok().count() as u64,
            failed: measured.rows.iter().filter(|row| !row.is_ok()).count() as u64,
            warmup: measured.warmup,
            input_tokens: sum(|row| row.input),
            output_tokens: sum(|row| row.output),
            cached_tokens: sum(|row| row.cached),
            good: (!goals.is_empty()).then(|| ok().filter(is_good).count() as u64),
            steady_output_throughput: window.steady(&measured.tokens),
            most_tokens_a_second: f64::from(a_second.max().unwrap_or(0)),
            most_in_flight: measured.most_in_flight,
            verdicts: judging
                .objectives
                .iter()
                .map(|one| one.judge(measured))
                .collect(),
            operations: parts(&measured.rows, |row| row.operation.name().to_owned()),
            adapters: parts(&measured.rows, |row| adapter_name(row, tenants)),
            tenants: parts(&measured.rows, |row| {
                tenants[row.tenant as usize].name.clone()
            }),
            series: Series::of(measured),
            histograms: measured.histograms.clone(),
            failures: measured.failures.clone(),
            goals,
        }
    }

    /// A second.
    pub(crate) fn rate(&self, count: u64) -> f64 {
        if self.duration > 0.0 {
            count as f64 / self.duration
        } else {
            0.0
        }
    }

    pub(crate) fn figures(&self, metric: Metric) -> Option<Figures> {
        Figures::of(self.histograms.get(metric))
    }

    pub(crate) fn is_met(&self) -> bool {
        self.verdicts.iter().all(|verdict| verdict.is_met)
    }

    /// The keys that `vllm bench serve` writes about results.
    pub(crate) fn vllm_keys(&self) -> Map<String, Value> {
        let mut keys = Map::new();
        let mut put = |key: &str, value: Value| keys.insert(key.to_owned(), value);
        let total = self.input_tokens + self.output_tokens;
        put("duration", rounded(self.duration).into());
        put("completed", self.completed.into());
        put("failed", self.failed.into());
        put("total_input_tokens", self.input_tokens.into());
        put("total_output_tokens", self.output_tokens.into());
        put(
            "request_throughput",
            rounded(self.rate(self.completed)).into(),
        );
        let goodput = self.good.map(|good| rounded(self.rate(good)));
        put("request_goodput", json!(goodput));
        put(
            "output_throughput",
            rounded(self.rate(self.output_tokens)).into(),
        );
        put("total_token_throughput", rounded(self.rate(total)).into());
        put("max_output_tokens_per_s", self.most_tokens_a_second.into());
        put("max_concurrent_requests", self.most_in_flight.into());
        for (name, metric) in [
            ("ttft", Metric::Ttft),
            ("tpot", Metric::Tpot),
            ("itl", Metric::Itl),
            ("e2el", Metric::E2e),
        ] {
            let figures = self.figures(metric).unwrap_or_default();
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
        keys
    }

    /// What it has beyond them.
    pub(crate) fn own_keys(&self) -> Map<String, Value> {
        let figures = |metric| self.figures(metric).map(|figures| figures.to_json());
        let list = |parts: &[Part]| parts.iter().map(Part::to_json).collect::<Vec<_>>();
        let errors = self.failures.iter().map(|(reason, failures)| {
            let value = json!({"count": failures.count, "example": failures.example});
            (reason.clone(), value)
        });
        let verdicts = self.verdicts.iter().map(|verdict| {
            json!({"objective": verdict.objective, "found": verdict.found.map(rounded), "met": verdict.is_met})
        });
        let goals: Vec<String> = self.goals.iter().map(ToString::to_string).collect();
        let curves = [Metric::Ttft, Metric::Tpot, Metric::Itl, Metric::E2e].map(|metric| {
            let points = curve(self.histograms.get(metric));
            (metric.tag().to_owned(), json!(points))
        });
        let value = json!({
            "warmup_requests": self.warmup,
            "cached_input_tokens": self.cached_tokens,
            "steady_output_throughput": self.steady_output_throughput.map(rounded),
            "goodput_goals": goals,
            "good_requests": self.good,
            "objectives": verdicts.collect::<Vec<_>>(),
            "objectives_met": self.is_met(),
            "send_lag_ms": figures(Metric::Lag),
            "ttft_from_send_ms": figures(Metric::SentTtft),
            "e2el_from_send_ms": figures(Metric::SentE2e),
            "server_queue_ms": figures(Metric::Queue),
            "server_adapter_load_ms": figures(Metric::AdapterLoad),
            "server_ttft_ms": figures(Metric::ServerTtft),
            "errors": errors.collect::<Map<_, _>>(),
            "operations": list(&self.operations),
            "adapters": list(&self.adapters),
            "tenants": list(&self.tenants),
            "quantiles_ms": curves.into_iter().collect::<Map<_, _>>(),
            "series": self.series.to_json(),
        });
        match value {
            Value::Object(keys) => keys,
            _ => Map::new(),
        }
    }
}

/// Points of a cumulative curve: quantile and milliseconds, denser towards the end.
fn curve(cells: &Histogram<u64>) -> Vec<[f64; 2]> {
    if cells.is_empty() {
        return Vec::new();
    }
    let coarse = (0..100).map(|percent| f64::from(percent) / 100.0);
    let fine = [0.992, 0.994, 0.996, 0.998, 0.999, 0.9995, 0.9999, 1.0];
    let points = coarse.chain(fine);
    points
        .map(|q| [q, rounded(quantile_ms(cells, q))])
        .collect()
}

fn adapter_name(row: &Row, tenants: &[Tenant]) -> String {
    let tenant = &tenants[row.tenant as usize];
    let Some(adapter) = row
        .adapter
        .and_then(|place| tenant.adapters.get(place as usize))
    else {
        return "base".to_owned();
    };
    if tenants.len() > 1 {
        format!("{}/{adapter}", tenant.name)
    } else {
        adapter.clone()
    }
}

/// Groups requests by a name, most frequent first.
fn parts(rows: &[Row], name: impl Fn(&Row) -> String) -> Vec<Part> {
    let mut groups: BTreeMap<String, Vec<&Row>> = BTreeMap::new();
    for row in rows {
        groups.entry(name(row)).or_default().push(row);
    }
    let mut parts: Vec<Part> = groups
        .into_iter()
        .map(|(name, rows)| Part::of(name, &rows))
        .collect();
    parts.sort_by_key(|part| std::cmp::Reverse(part.completed + part.failed));
    parts
}

// === impl Part ===

impl Part {
    fn of(name: String, rows: &[&Row]) -> Self {
        let ok = || rows.iter().filter(|row| row.is_ok());
        let figures = |value: fn(&Row) -> Option<u64>| {
            let mut values: Vec<u64> = ok().filter_map(|row| value(row)).collect();
            Figures::of_values(&mut values)
        };
        Self {
            name,
            completed: ok().count() as u64,
            failed: (rows.len() - ok().count()) as u64,
            output_tokens: ok().map(|row| u64::from(row.output)).sum(),
            ttft: figures(Row::ttft),
            tpot: figures(Row::tpot),
            e2e: figures(|row| Some(row.e2e())),
        }
    }

    fn to_json(&self) -> Value {
        let figures = |figures: &Option<Figures>| figures.as_ref().map(Figures::to_json);
        json!({
            "name": self.name,
            "completed": self.completed,
            "failed": self.failed,
            "output_tokens": self.output_tokens,
            "ttft_ms": figures(&self.ttft),
            "tpot_ms": figures(&self.tpot),
            "e2el_ms": figures(&self.e2e),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::record::tests::row;

    fn measured() -> Measured {
        let mut measured = Measured {
            tokens: vec![4; 30],
            ..Measured::default()
        };
        for i in 0..20 {
            let due = 1_000_000 + i * 100_000;
            let mut row = row(i, due, due + 50_000, due + 150_000, 6);
            row.adapter = (i % 2 == 0).then_some(0);
            measured.observe(&row, &[]);
            measured.rows.push(row);
        }
        measured
    }

    fn summary(measured: Measured, extent: Extent) -> Summary {
        let tenants = [Tenant {
            name: String::new(),
            adapters: vec!["a".to_owned()],
        }];
        let judging = Judging {
            goals: vec!["e2e:150ms".parse().unwrap()],
            ..Judging::default()
        };
        Summary::of(&measured, extent, None, &tenants, &judging)
    }

    #[test]
    fn throughput_is_over_the_measured_window() {
        let extent = Extent {
            warmup: Duration::from_secs(1),
            duration: Some(Duration::from_secs(2)),
            ..Extent::default()
        };
        let found = summary(measured(), extent);
        // From the end of the warm-up to the last answer, at 3.05 s.
        assert!((found.duration - 2.05).abs() < 1e-9, "{}", found.duration);
        let keys = found.vllm_keys();
        assert_eq!(keys["completed"], 20);
        assert_eq!(keys["total_output_tokens"], 120);
        assert_eq!(keys["output_throughput"], rounded(120.0 / 2.05));
        assert_eq!(keys["request_goodput"], rounded(20.0 / 2.05));
        // 4 tokens each tenth of a second, whatever the tail does.
        assert_eq!(found.steady_output_throughput, Some(40.0));
        let tpot = keys["p99_tpot_ms"].as_f64().unwrap();
        assert!((tpot / 20.0 - 1.0).abs() < 2e-3, "{tpot}");
    }

    #[test]
    fn breakdowns_name_the_base_and_the_adapters() {
        let mut measured = measured();
        measured.rows[1].error = Some(0);
        let found = summary(measured, Extent::default());
        let names: Vec<_> = found
            .adapters
            .iter()
            .map(|part| part.name.as_str())
            .collect();
        assert_eq!(names, ["a", "base"]);
        assert_eq!(
            (found.adapters[1].completed, found.adapters[1].failed),
            (9, 1)
        );
        assert_eq!(found.operations.len(), 1);
        assert_eq!(found.good, Some(19));
        let own = found.own_keys();
        assert_eq!(own["adapters"][0]["output_tokens"], 60);
    }

    #[test]
    fn nothing_measured_is_no_division_by_zero() {
        let found = summary(Measured::default(), Extent::default());
        let keys = found.vllm_keys();
        assert_eq!(keys["request_throughput"], 0.0);
        assert_eq!(keys["mean_ttft_ms"], 0.0);
    }
}
