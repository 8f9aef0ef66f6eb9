//! A test as JSON: the keys of `vllm bench serve` first, then what is ours, with everything that
//! is needed to run it again. And the two lines around the table that say the same in words.

use std::time::SystemTime;

use serde_json::{Map, Value, json};

use crate::{
    bench::{
        arrival::Spread,
        record::Metric,
        schedule::{Extent, Pattern},
        statistics::quantile_ms,
        workload::Operation,
    },
    cli::bench::{args::RunArgs, live::milliseconds, plan::Plan, run::Tested},
};

/// The result of one test.
pub(crate) fn of(args: &RunArgs, plan: &Plan, tested: &Tested, server: &Value) -> Value {
    let mut keys = Map::new();
    let mut put = |key: &str, value: Value| keys.insert(key.to_owned(), value);
    let (rate, burstiness) = match &plan.pattern {
        Pattern::Open { sources, spread } => {
            let rate = sources.iter().map(|source| source.rate.to).sum::<f64>();
            let burstiness = match spread {
                Spread::Poisson => json!(1.0),
                Spread::Gamma(shape) => json!(shape),
                Spread::Constant => json!("inf"),
            };
            (json!(rate), burstiness)
        }
        // As vLLM writes it when nothing holds requests back.
        _ => (json!("inf"), json!(1.0)),
    };
    let concurrency = match plan.pattern {
        Pattern::Closed { from, to } => json!(from.max(to)),
        _ => Value::Null,
    };
    let prompts = tested.summary.completed + tested.summary.failed;
    put("date", date(tested.began).into());
    put("backend", plan.target.backend().into());
    put("label", json!(args.output.label));
    put("model_id", server["model"]["name"].clone());
    put("num_prompts", prompts.into());
    put("request_rate", rate);
    put("burstiness", burstiness);
    put("max_concurrency", concurrency);
    keys.extend(tested.summary.vllm_keys());
    keys.extend(tested.summary.own_keys());
    let mut put = |key: &str, value: Value| keys.insert(key.to_owned(), value);
    put("format", "espalier-bench-1".into());
    put("seed", plan.workload.seed.into());
    put("interrupted", tested.interrupted.into());
    put("load", load(plan.extent, &plan.pattern));
    put("workload", workload(args, plan));
    put(
        "client",
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cpu_seconds": tested.cpu,
            "connections": plan.target.connections(),
            "began_unix": unix(tested.began),
        }),
    );
    put("server", server.clone());
    Value::Object(keys)
}

fn load(extent: Extent, pattern: &Pattern) -> Value {
    json!({
        "pattern": pattern_text(pattern),
        "warmup_s": extent.warmup.as_secs_f64(),
        "warmup_requests": extent.warmup_requests,
        "duration_s": extent.duration.map(|span| span.as_secs_f64()),
        "requests": extent.requests,
    })
}

fn workload(args: &RunArgs, plan: &Plan) -> Value {
    let tenants = &plan.workload.tenants;
    let work = &args.work;
    let prompts = work.prompts.as_ref().map(|path| path.display().to_string());
    json!({
        "operations": work.op.to_string(),
        "input": prompts.unwrap_or_else(|| work.input.to_string()),
        "output": work.output.to_string(),
        "shared_prefix": work.shared_prefix,
        "prefixes": work.shared_prefix.map(|_| work.prefixes),
        "adapters": tenants.iter().map(|tenant| tenant.adapters.len()).sum::<usize>(),
        "tenants": tenants.len(),
        "popularity": work.popularity.to_string(),
        "base_share": work.base_share,
        "temperature": work.temperature,
        "stop_at_eos": work.stop_at_eos,
        "beside": args.load.beside.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "streams": work.op.has(Operation::Generate) || work.op.has(Operation::Chat),
    })
}

fn pattern_text(pattern: &Pattern) -> String {
    let range = |from: f64, to: f64| {
        if from == to {
            format!("{from}")
        } else {
            format!("{from} to {to}")
        }
    };
    match pattern {
        Pattern::Closed { from, to } => {
            let word = if from.max(to) == &1 {
                "client"
            } else {
                "clients"
            };
            format!("closed loop, {} {word}", range(*from as f64, *to as f64))
        }
        Pattern::Trace(rows) => format!("trace of {} requests", rows.len()),
        Pattern::Open { spread, sources } => {
            let from = sources.iter().map(|source| source.rate.from).sum();
            let to = sources.iter().map(|source| source.rate.to).sum();
            let spread = match spread {
                Spread::Poisson => "poisson".to_owned(),
                Spread::Constant => "constant".to_owned(),
                Spread::Gamma(shape) => format!("gamma:{shape}"),
            };
            format!("open loop, {} requests/s ({spread})", range(from, to))
        }
    }
}

/// What is measured, in a line.
pub(crate) fn headline(plan: &Plan) -> String {
    let tenants = &plan.workload.tenants;
    let adapters: usize = tenants.iter().map(|tenant| tenant.adapters.len()).sum();
    let mut text = format!("{} · {}", plan.workload.mix, pattern_text(&plan.pattern));
    if adapters > 0 {
        text.push_str(&format!(" · {adapters} adapters"));
    }
    if tenants.len() > 1 {
        text.push_str(&format!(" · {} tenants", tenants.len()));
    }
    text.push_str(&format!(" · seed {}", plan.workload.seed));
    text
}

/// What the client itself cost, and how late it was.
pub(crate) fn client_line(tested: &Tested, plan: &Plan) -> String {
    let lag = tested.summary.histograms.get(Metric::Lag);
    let mut text = "client    ".to_owned();
    if let Some(cpu) = tested.cpu {
        let share = 100.0 * cpu / tested.summary.duration.max(1e-3);
        text.push_str(&format!(
            "{cpu:.2} s of processor time ({share:.1} % of one core), "
        ));
    }
    if matches!(plan.pattern, Pattern::Closed { .. }) {
        text.push_str("sends when it has its answer");
    } else {
        let p = |q| milliseconds(quantile_ms(lag, q));
        text.push_str(&format!(
            "sent late by p50 {}, p99 {}, max {}",
            p(0.5),
            p(0.99),
            p(1.0)
        ));
    }
    text
}

/// Seconds since 1970.
pub(crate) fn unix(time: SystemTime) -> f64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}

/// As vLLM writes it: `20251123-102646`, in UTC.
pub(crate) fn date(time: SystemTime) -> String {
    let seconds = unix(time) as i64;
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Years begin in March here, so that the leap day is their last; 400 of them repeat.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest % 3600 / 60, rest % 60);
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_are_civil() {
        let at = |seconds| date(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "19700101-000000");
        assert_eq!(at(951_782_400), "20000229-000000");
        assert_eq!(at(1_763_893_606), "20251123-102646");
    }
}
