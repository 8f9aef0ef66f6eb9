//! Two sides that take turns: each runs as a process of its own and says what it measured in one line of JSON; the
//! medians count, because machines are noisy. Knows no side.

use std::process::Command;

use serde_json::Value;

use crate::Fallible;

/// The middle value (the upper one of two).
///
/// # Panics
/// Without values there is no middle.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The value that `share` of the values do not exceed, by rank.
///
/// # Panics
/// Without values there is none.
#[must_use]
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() as f64 * share) as usize;
    sorted[rank.min(sorted.len() - 1)]
}

/// Runs a side to its end and reads its last line.
///
/// # Errors
/// A process that fails, with what it said, or that prints no JSON.
pub fn last_json_line(mut command: Command) -> Fallible<Value> {
    let output = command.output()?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{command:?} ended with {}: {text}", output.status).into());
    }
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().last().ok_or("the process printed nothing")?;
    eprintln!("  {line}");
    Ok(serde_json::from_str(line)?)
}

/// One figure of every round.
///
/// # Errors
/// A round that does not have it.
pub fn figures(rows: &[Value], key: &str) -> Fallible<Vec<f64>> {
    rows.iter()
        .map(|row| Ok(row[key].as_f64().ok_or(format!("no {key} in {row}"))?))
        .collect()
}

/// The rounds, as `theirs : ours, theirs : ours`.
#[must_use]
pub fn pairs(theirs: &[f64], ours: &[f64]) -> String {
    let pairs: Vec<String> = theirs
        .iter()
        .zip(ours)
        .map(|(theirs, ours)| format!("{theirs:.1} : {ours:.1}"))
        .collect();
    pairs.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_ranks() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(median(&values), 51.0);
        assert_eq!(quantile(&values, 0.99), 100.0);
        assert_eq!(quantile(&values, 0.0), 1.0);
        assert_eq!(quantile(&[7.0], 0.99), 7.0);
    }
}
