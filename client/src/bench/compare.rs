//! Two results beside each other: ratios of figures that mean the same in both, and which of
//! them got worse. It reads any JSON with the keys of `vllm bench serve`.

use serde_json::Value;

/// One figure of both results.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Ratio {
    pub(crate) key: &'static str,
    pub(crate) old: f64,
    pub(crate) new: f64,
    /// Whether more is better.
    pub(crate) up_is_good: bool,
}

/// What is compared, and whether more of it is better.
const KEYS: [(&str, bool); 18] = [
    ("request_throughput", true),
    ("request_goodput", true),
    ("output_throughput", true),
    ("steady_output_throughput", true),
    ("total_token_throughput", true),
    ("mean_ttft_ms", false),
    ("p50_ttft_ms", false),
    ("p90_ttft_ms", false),
    ("p99_ttft_ms", false),
    ("mean_tpot_ms", false),
    ("p50_tpot_ms", false),
    ("p99_tpot_ms", false),
    ("p50_itl_ms", false),
    ("p99_itl_ms", false),
    ("mean_e2el_ms", false),
    ("p50_e2el_ms", false),
    ("p90_e2el_ms", false),
    ("p99_e2el_ms", false),
];

/// The figures that both results have.
pub(crate) fn ratios(old: &Value, new: &Value) -> Vec<Ratio> {
    let figure = |document: &Value, key: &str| {
        // vLLM writes the median under a name of its own.
        let other = key
            .strip_prefix("p50_")
            .map(|rest| format!("median_{rest}"));
        let found = document[key].as_f64();
        found.or_else(|| other.and_then(|key| document[key.as_str()].as_f64()))
    };
    let both = KEYS.iter().filter_map(|(key, up_is_good)| {
        let (old, new) = (figure(old, key)?, figure(new, key)?);
        // Zero means that there was nothing to measure.
        (old > 0.0 && new > 0.0).then_some(Ratio {
            key,
            old,
            new,
            up_is_good: *up_is_good,
        })
    });
    both.collect()
}

// === impl Ratio ===

impl Ratio {
    pub(crate) fn ratio(&self) -> f64 {
        self.new / self.old
    }

    /// How many times worse: above 1 is worse, whichever way the figure goes.
    pub(crate) fn worse(&self) -> f64 {
        if self.up_is_good {
            self.old / self.new
        } else {
            self.new / self.old
        }
    }
}

/// What makes two results no comparison: they were asked different things.
pub(crate) fn differences(old: &Value, new: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let places = [
        ("model", "/server/model/digest"),
        ("dtype", "/server/model/dtype"),
        ("load", "/load/pattern"),
        ("operations", "/workload/operations"),
        ("input", "/workload/input"),
        ("output", "/workload/output"),
        ("adapters", "/workload/adapters"),
        ("popularity", "/workload/popularity"),
        ("seed", "/seed"),
    ];
    for (name, place) in places {
        if let (Some(old), Some(new)) = (old.pointer(place), new.pointer(place))
            && old != new
        {
            found.push(format!("{name}: {old} then, {new} now"));
        }
    }
    let settings = |document: &Value| {
        let found = document.pointer("/server/info/configuration");
        found
            .and_then(Value::as_object)
            .cloned()
            .unwrap_or_default()
    };
    let (before, after) = (settings(old), settings(new));
    if !before.is_empty() && !after.is_empty() {
        let keys: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
        for key in keys {
            let (old, new) = (before.get(key), after.get(key));
            if old != new {
                let text =
                    |value: Option<&Value>| value.map_or("unset".to_owned(), Value::to_string);
                found.push(format!(
                    "setting {key}: {} then, {} now",
                    text(old),
                    text(new)
                ));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn more_throughput_and_less_latency_are_better() {
        let old = json!({"output_throughput": 100.0, "p99_ttft_ms": 50.0, "median_tpot_ms": 8.0, "request_goodput": null});
        let new = json!({"output_throughput": 80.0, "p99_ttft_ms": 40.0, "p50_tpot_ms": 8.0, "request_goodput": 3.0});
        let found = ratios(&old, &new);
        let keys: Vec<_> = found.iter().map(|ratio| ratio.key).collect();
        assert_eq!(keys, ["output_throughput", "p99_ttft_ms", "p50_tpot_ms"]);
        assert_eq!(found[0].ratio(), 0.8);
        assert_eq!(found[0].worse(), 1.25);
        assert_eq!(found[1].worse(), 0.8);
        assert_eq!(found[2].worse(), 1.0);
    }

    #[test]
    fn different_questions_are_named() {
        let document = |seed: u64, blocks: u64| json!({"seed": seed, "server": {"info": {"configuration": {"blocks": blocks}}}});
        assert!(differences(&document(1, 2), &document(1, 2)).is_empty());
        let found = differences(&document(1, 2), &document(3, 4));
        assert_eq!(
            found,
            ["seed: 1 then, 3 now", "setting blocks: 2 then, 4 now"]
        );
    }
}
