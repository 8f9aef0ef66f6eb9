//! What a classification row asks for beside one label: a set of labels, or a number.
//!
//! This file must not know files or their spelling.

use std::hash::{Hash, Hasher};

use serde::{Deserialize, Serialize};

/// The largest number that a row may ask for, either way: squared errors of more would leave nothing of f32's digits.
pub const MAX_SCORE: f64 = 1e6;

/// A finite number that regression learns, within [`MAX_SCORE`]; rows are compared by its bits.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Score(f64);

impl Score {
    /// # Errors
    /// What is wrong with the number, with value and limit.
    pub fn new(value: f64) -> Result<Self, String> {
        if value.abs() <= MAX_SCORE {
            // Zero has two spellings and one meaning.
            return Ok(Self(value + 0.0));
        }
        Err(format!(
            "is {value}, expected a number from -{MAX_SCORE} to {MAX_SCORE}"
        ))
    }

    /// The number.
    #[must_use]
    pub const fn value(self) -> f64 {
        self.0
    }
}

impl PartialEq for Score {
    fn eq(&self, other: &Self) -> bool {
        self.0.to_bits() == other.0.to_bits()
    }
}

impl Eq for Score {}

impl Hash for Score {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.to_bits().hash(state);
    }
}

impl TryFrom<f64> for Score {
    type Error = String;

    fn try_from(value: f64) -> Result<Self, String> {
        Self::new(value)
    }
}

impl From<Score> for f64 {
    fn from(score: Score) -> Self {
        score.0
    }
}

/// The label sets of a table's cell: names between bars, none where the cell is empty.
pub(super) fn split_labels(cell: &str) -> Vec<String> {
    if cell.trim().is_empty() {
        return Vec::new();
    }
    cell.split('|')
        .map(|label| label.trim().to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::super::{ColumnNames, DataLimits, Dataset, Format, Kind, Row, parse};
    use super::*;

    fn read(text: &str, format: Format) -> Result<Dataset, String> {
        let (columns, limits) = (ColumnNames::default(), DataLimits::default());
        parse(text.as_bytes(), format, &columns, &limits).map_err(|report| report.to_string())
    }

    #[test]
    fn a_table_and_lines_hold_the_same_rows() {
        let lines =
            "{\"text\": \"x\", \"labels\": [\"b\", \"a\"]}\n{\"text\": \"y\", \"labels\": []}";
        let from_lines = read(lines, Format::Jsonl).unwrap();
        let table = read("text,labels\nx,a|b\ny,\n", Format::Csv).unwrap();
        assert_eq!(from_lines.rows, table.rows);
        assert_eq!(table.kind, Kind::Labels);
        let Row::Labels { labels, .. } = &table.rows[0] else {
            panic!("{table:?}")
        };
        assert_eq!(labels, &["a", "b"]);
        let lines = "{\"text\": \"x\", \"score\": 2}\n{\"text\": \"y\", \"score\": -0.5}";
        let from_lines = read(lines, Format::Jsonl).unwrap();
        let table = read("text\tscore\nx\t2.0\ny\t -5e-1\n", Format::Tsv).unwrap();
        assert_eq!(from_lines.rows, table.rows);
        assert_eq!(table.kind, Kind::Score);
    }

    #[test]
    fn bad_answers_are_named_by_line() {
        for (text, named) in [
            (
                "{\"text\": \"x\", \"labels\": \"a\"}",
                "line 1: labels: is a string, expected a list",
            ),
            (
                "{\"text\": \"x\", \"labels\": [\"a\", 3]}",
                "line 1: labels: holds something",
            ),
            (
                "{\"text\": \"x\", \"labels\": [\"a\", \"a\"]}",
                "line 1: labels: names \"a\" twice",
            ),
            (
                "{\"text\": \"x\", \"labels\": [\"\"]}",
                "line 1: labels: is empty",
            ),
            (
                "{\"text\": \"x\", \"score\": \"4\"}",
                "line 1: score: is a string, expected a number",
            ),
            (
                "{\"text\": \"x\", \"score\": 2e6}",
                "from -1000000 to 1000000",
            ),
            (
                "{\"text\": \"x\", \"score\": 1}\n{\"text\": \"y\"}",
                "line 2: score: is missing",
            ),
            (
                "{\"text\": \"x\", \"labels\": [], \"score\": 1}",
                "has two of label, labels and score",
            ),
            (
                "{\"text\": \"x\", \"score\": 1}\n{\"text\": \"y\", \"label\": \"a\"}",
                "line 2: a classification row in a dataset that begins with regression rows",
            ),
        ] {
            let report = read(text, Format::Jsonl).unwrap_err();
            assert!(report.contains(named), "{text}: {report}");
        }
        let report = read("text,score\nx,high\n", Format::Csv).unwrap_err();
        assert!(report.contains("line 2: score: is 'high'"), "{report}");
        // A number beside a label is not used, as it always was.
        let both = read("text,label,score\nx,a,1\ny,b,2\n", Format::Csv).unwrap();
        assert_eq!((both.kind, both.report.warning_count()), (Kind::Class, 1));
    }

    #[test]
    fn scores_are_finite_and_within_bounds() {
        assert_eq!(Score::new(-0.0).unwrap(), Score::new(0.0).unwrap());
        for bad in [f64::NAN, f64::INFINITY, 1e6 + 1.0] {
            assert!(Score::new(bad).unwrap_err().contains("1000000"));
        }
    }

    #[test]
    fn a_cell_holds_labels_between_bars() {
        assert_eq!(split_labels(" a | b c|"), ["a", "b c", ""]);
        assert!(split_labels("  ").is_empty());
    }
}
