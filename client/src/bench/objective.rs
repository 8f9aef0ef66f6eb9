//! Objectives: what a server promises over a whole test (`ttft:p99<200ms`), and what one request
//! must reach to count as good (`ttft:200ms`). It knows how they are written and judged.

use std::{fmt, str::FromStr};

use crate::bench::{
    quantity,
    record::{Measured, Metric, Row},
    statistics::rounded,
};

/// What an objective is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    Time(Metric),
    Errors,
}

/// Which figure of it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Statistic {
    Mean,
    Max,
    Quantile(f64),
}

/// One objective of a whole test.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Objective {
    text: String,
    subject: Subject,
    statistic: Statistic,
    /// Milliseconds, or a share of errors.
    limit: f64,
    or_equal: bool,
}

/// What became of an objective.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) objective: String,
    /// In the unit of the objective; `None` when nothing was measured.
    pub(crate) found: Option<f64>,
    pub(crate) is_met: bool,
    is_share: bool,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.is_met { "met" } else { "missed" };
        write!(f, "{word}: {} ", self.objective)?;
        match self.found {
            None => write!(f, "(nothing was measured)"),
            Some(found) if self.is_share => write!(f, "({:.2} %)", found * 100.0),
            Some(found) => write!(f, "({} ms)", rounded(found)),
        }
    }
}

const FORMS: &str =
    "write for example 'ttft:p99<200ms', 'tpot:mean<=50ms', 'e2e:max<3s' or 'errors<1%'";

fn time(name: &str) -> Result<Metric, String> {
    match name {
        "ttft" => Ok(Metric::Ttft),
        "tpot" => Ok(Metric::Tpot),
        "itl" => Ok(Metric::Itl),
        "e2e" | "e2el" => Ok(Metric::E2e),
        _ => Err(format!(
            "{name:?} is not measured; use ttft, tpot, itl, e2e or errors"
        )),
    }
}

fn statistic(name: &str) -> Result<Statistic, String> {
    match name {
        "mean" => Ok(Statistic::Mean),
        "max" => Ok(Statistic::Max),
        "median" => Ok(Statistic::Quantile(0.5)),
        _ => {
            let digits = name.strip_prefix('p').unwrap_or_default();
            match digits.parse::<f64>() {
                Ok(percent) if (0.0..=100.0).contains(&percent) => {
                    Ok(Statistic::Quantile(percent / 100.0))
                }
                _ => Err(format!(
                    "{name:?} is no statistic; use mean, median, max or p50 to p99.99"
                )),
            }
        }
    }
}

impl FromStr for Objective {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (what, limit) = text
            .split_once('<')
            .ok_or_else(|| format!("has no '<'; {FORMS}"))?;
        let or_equal = limit.starts_with('=');
        let limit = limit.trim_start_matches('=').trim();
        let what = what.trim();
        if what == "errors" {
            return Ok(Self {
                text: text.to_owned(),
                subject: Subject::Errors,
                statistic: Statistic::Mean,
                limit: quantity::share(limit)?,
                or_equal,
            });
        }
        let (name, figure) = what
            .split_once(':')
            .ok_or_else(|| format!("names no statistic; {FORMS}"))?;
        Ok(Self {
            text: text.to_owned(),
            subject: Subject::Time(time(name)?),
            statistic: statistic(figure)?,
            limit: quantity::duration(limit)?.as_secs_f64() * 1e3,
            or_equal,
        })
    }
}

// === impl Objective ===

impl Objective {
    pub(crate) fn judge(&self, measured: &Measured) -> Verdict {
        let found = match self.subject {
            Subject::Errors => {
                let failed = measured.rows.iter().filter(|row| !row.is_ok()).count();
                let all = measured.rows.len();
                (all > 0).then(|| failed as f64 / all as f64)
            }
            Subject::Time(metric) => {
                let cells = measured.histograms.get(metric);
                let quantile = |q| cells.value_at_quantile(q).min(cells.max()) as f64;
                let micros = match self.statistic {
                    Statistic::Mean => cells.mean(),
                    Statistic::Max => cells.max() as f64,
                    Statistic::Quantile(q) => quantile(q),
                };
                (!cells.is_empty()).then_some(micros / 1e3)
            }
        };
        let holds = |found: f64| found < self.limit || (self.or_equal && found <= self.limit);
        Verdict {
            objective: self.text.clone(),
            // What was not measured cannot be promised.
            is_met: found.is_some_and(holds),
            found,
            is_share: self.subject == Subject::Errors,
        }
    }

    /// As a goal of each single request, where it can be one.
    pub(crate) fn as_goal(&self) -> Option<Goal> {
        match self.subject {
            Subject::Time(metric) if metric != Metric::Itl => Some(Goal {
                metric,
                limit: (self.limit * 1e3) as u64,
            }),
            _ => None,
        }
    }
}

/// What one request must reach: TTFT, TPOT or E2E within so many microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Goal {
    metric: Metric,
    limit: u64,
}

impl FromStr for Goal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let forms = "write for example ttft:200ms, tpot:50ms or e2e:3s";
        let (name, limit) = text
            .split_once(':')
            .ok_or_else(|| format!("{text:?} is no goal; {forms}"))?;
        let metric = match time(name) {
            Ok(Metric::Itl) | Err(_) => {
                return Err(format!("{name:?} is no figure of one request; {forms}"));
            }
            Ok(metric) => metric,
        };
        Ok(Self {
            metric,
            limit: quantity::micros(quantity::duration(limit)?),
        })
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.metric {
            Metric::Ttft => "ttft",
            Metric::Tpot => "tpot",
            _ => "e2e",
        };
        write!(f, "{name}:{}ms", self.limit as f64 / 1e3)
    }
}

// === impl Goal ===

impl Goal {
    /// A figure that a request does not have, such as TPOT of one token, is no fault of it.
    pub(crate) fn is_reached(self, row: &Row) -> bool {
        let found = match self.metric {
            Metric::Ttft => row.ttft(),
            Metric::Tpot => row.tpot(),
            _ => Some(row.e2e()),
        };
        row.is_ok() && found.is_none_or(|found| found <= self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{record::tests::row, statistics};

    fn measured() -> Measured {
        let mut measured = Measured::default();
        for ms in 1..=100 {
            statistics::record(measured.histograms.get_mut(Metric::Ttft), ms * 1000);
            measured.rows.push(row(ms, 0, ms * 1000, ms * 2000, 3));
        }
        measured.rows[0].error = Some(0);
        measured
    }

    #[test]
    fn objectives_are_judged_by_their_statistic() {
        let check = |text: &str, expected: bool| {
            let verdict = text.parse::<Objective>().unwrap().judge(&measured());
            assert_eq!(verdict.is_met, expected, "{verdict}");
        };
        check("ttft:p99<100ms", true);
        check("ttft:p99<98ms", false);
        check("ttft:max<101ms", true);
        check("ttft:max<100ms", false);
        check("ttft:mean<=51ms", true);
        check("ttft:median<49ms", false);
        check("ttft:p12.5<14ms", true);
        check("errors<2%", true);
        check("errors<0.01", false);
        check("errors<=1%", true);
        // Nothing was measured, so nothing is promised.
        check("itl:p50<1h", false);
    }

    #[test]
    fn refusals_say_what_to_write() {
        for (wrong, hint) in [
            ("ttft:p99=200ms", "'<'"),
            ("ttft<200ms", "no statistic"),
            ("speed:p99<1s", "use ttft"),
            ("ttft:p101<1s", "mean, median"),
            ("ttft:p99<200", "unit is missing"),
            ("errors<200%", "between 0 and 1"),
        ] {
            let error = wrong.parse::<Objective>().unwrap_err();
            assert!(error.contains(hint), "{wrong}: {error}");
        }
        assert!("itl:5ms".parse::<Goal>().is_err());
        assert!("ttft".parse::<Goal>().is_err());
    }

    #[test]
    fn a_request_is_good_when_it_reaches_its_goals() {
        let goal: Goal = "tpot:50ms".parse().unwrap();
        // 200 ms for four tokens after the first.
        assert!(goal.is_reached(&row(0, 0, 100_000, 300_000, 5)));
        assert!(!goal.is_reached(&row(0, 0, 100_000, 300_000, 4)));
        assert!(goal.is_reached(&row(0, 0, 100_000, 100_000, 1)));
        let mut failed = row(0, 0, 1, 2, 1);
        failed.error = Some(0);
        assert!(!goal.is_reached(&failed));
        assert_eq!(goal.to_string(), "tpot:50ms");
        let objective: Objective = "e2e:p99<3s".parse().unwrap();
        assert_eq!(objective.as_goal(), Some("e2e:3s".parse().unwrap()));
    }
}
