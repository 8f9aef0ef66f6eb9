//! `--compare` and `espalier bench compare`: a table of ratios, and whether a figure got worse
//! than allowed.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use crate::{
    bench::{compare, quantity},
    cli::{
        bench::files::read_json,
        output::{Failure, Out, aligned},
    },
};

/// Ratios of two results, and exit status 7 when a figure got worse.
#[derive(Debug, Args)]
pub(crate) struct Compare {
    /// JSON of `--out`, or of `vllm bench serve`.
    old: PathBuf,
    /// The same, of the later test.
    new: PathBuf,
    /// Exit with 7 when a figure is worse by more than this: 10%
    #[arg(long, value_name = "SHARE", value_parser = quantity::share)]
    fail_if_worse: Option<f64>,
}

// === impl Compare ===

impl Compare {
    pub(crate) fn run(self, out: Out) -> Result<(), Failure> {
        let (old, new) = (read_json(&self.old)?, read_json(&self.new)?);
        let document = document(&old, &new, self.fail_if_worse);
        let got_worse = if out.is_json() {
            out.json_document(&document)?;
            is_any_worse(&document)
        } else {
            print(out, &old, &new, self.fail_if_worse)?
        };
        if got_worse {
            return Err(Failure::Missed);
        }
        Ok(())
    }
}

/// Whether a figure of the document is worse than allowed.
pub(crate) fn is_any_worse(document: &Value) -> bool {
    let figures = document["figures"].as_array();
    figures
        .into_iter()
        .flatten()
        .any(|figure| figure["worse"] == true)
}

/// The ratios as JSON; `worse` names the figures that are worse by more than the share.
pub(crate) fn document(old: &Value, new: &Value, allowed: Option<f64>) -> Value {
    let figures = compare::ratios(old, new).into_iter().map(|ratio| {
        json!({
            "key": ratio.key,
            "old": ratio.old,
            "new": ratio.new,
            "ratio": ratio.ratio(),
            "worse": allowed.is_some_and(|share| ratio.worse() > 1.0 + share),
        })
    });
    json!({
        "figures": figures.collect::<Vec<_>>(),
        "differences": compare::differences(old, new),
    })
}

/// Prints the ratios; true when one is worse by more than the share.
pub(crate) fn print(
    out: Out,
    old: &Value,
    new: &Value,
    allowed: Option<f64>,
) -> Result<bool, Failure> {
    let ratios = compare::ratios(old, new);
    if ratios.is_empty() {
        let why = "the two results have no figure in common; both must be JSON of `espalier bench --out` or `vllm bench serve`";
        return Err(Failure::Local(why.to_owned()));
    }
    let is_worse =
        |ratio: &compare::Ratio| allowed.is_some_and(|share| ratio.worse() > 1.0 + share);
    let worse: Vec<&str> = ratios
        .iter()
        .filter(|r| is_worse(r))
        .map(|r| r.key)
        .collect();
    out.line("")?;
    let row = |ratio: &compare::Ratio| {
        let word = match ratio.worse() {
            _ if is_worse(ratio) => "worse than allowed",
            worse if worse > 1.02 => "worse",
            worse if worse < 1.0 / 1.02 => "better",
            _ => "same",
        };
        vec![
            ratio.key.to_owned(),
            format!("{:.2}", ratio.old),
            format!("{:.2}", ratio.new),
            format!("{:.3}", ratio.ratio()),
            word.to_owned(),
        ]
    };
    let rows: Vec<Vec<String>> = ratios.iter().map(row).collect();
    for line in aligned(&["figure", "old", "new", "new/old", ""], &rows) {
        out.line(line)?;
    }
    for difference in compare::differences(old, new) {
        out.line(format_args!("note: not the same test: {difference}"))?;
    }
    Ok(!worse.is_empty())
}
