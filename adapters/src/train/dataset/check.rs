//! What makes a row good, wherever it came from, and what makes a set of good rows doubtful.
//!
//! This file must not know files or their spelling.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{ChatMessage, DataFinding, DataLimits, DataReport, DataRule, Dataset, Kind, Role, Row};

/// Rows that were not read from a file, under the same rules; a finding's line is the row's number, from 1.
///
/// # Errors
/// The report of every bad row.
pub fn from_rows(rows: Vec<Row>, limits: &DataLimits) -> Result<Dataset, DataReport> {
    let mut collector = Collector::new(limits);
    for (row, line) in rows.into_iter().zip(1..) {
        if !collector.room(line) {
            break;
        }
        let limit = limits.row_bytes(row.kind());
        if bytes(&row) > limit {
            let reason = format!("has {} bytes, limit {limit}", bytes(&row));
            collector.error(line, "", DataRule::Limit, reason);
        } else {
            collector.add(line, row);
        }
    }
    collector.finish()
}

fn bytes(row: &Row) -> usize {
    match row {
        Row::Completion { prompt, completion } => prompt.len() + completion.len(),
        Row::Chat { messages } => messages.iter().map(|m| m.content.len()).sum(),
        Row::Class { text, label } => text.len() + label.len(),
        Row::Labels { text, labels } => text.len() + labels.iter().map(String::len).sum::<usize>(),
        Row::Score { text, .. } => text.len() + size_of::<f64>(),
        Row::Text { text } => text.len(),
        Row::Instruction {
            instruction,
            input,
            output,
        } => instruction.len() + input.len() + output.len(),
    }
}

/// Pairs of row numbers, from 0: an earlier row and one that comes again.
pub(crate) struct Repeats {
    /// The same in full.
    pub(crate) same: Vec<(usize, usize)>,
    /// The same text with another label.
    pub(crate) conflicting: Vec<(usize, usize)>,
}

/// Rows that are the same, and texts that have two labels.
pub(crate) fn repeats<'a>(rows: impl Iterator<Item = &'a Row>) -> Repeats {
    let (mut whole, mut texts) = (HashMap::new(), HashMap::new());
    let (mut same, mut conflicting) = (Vec::new(), Vec::new());
    for (number, row) in rows.enumerate() {
        if let Some(first) = whole.insert(row, number) {
            same.push((first, number));
        } else if let Row::Class { text, .. } | Row::Labels { text, .. } | Row::Score { text, .. } =
            row
            && let Some(first) = texts.insert(text, number)
        {
            conflicting.push((first, number));
        }
    }
    Repeats { same, conflicting }
}

/// Takes rows one by one and keeps what is to be said about them.
pub(super) struct Collector<'a> {
    limits: &'a DataLimits,
    report: DataReport,
    kind: Option<Kind>,
    rows: Vec<Row>,
    lines: Vec<u64>,
    labels: BTreeSet<String>,
    /// Fields that are not used, with the number of rows that have them.
    ignored: BTreeMap<String, u64>,
}

impl<'a> Collector<'a> {
    pub(super) fn new(limits: &'a DataLimits) -> Self {
        Self {
            limits,
            report: DataReport::default(),
            kind: None,
            rows: Vec::new(),
            lines: Vec::new(),
            labels: BTreeSet::new(),
            ignored: BTreeMap::new(),
        }
    }

    pub(super) fn error(
        &mut self,
        line: u64,
        field: &str,
        rule: DataRule,
        reason: impl Into<String>,
    ) {
        let (field, reason) = (field.to_owned(), reason.into());
        let finding = DataFinding {
            line,
            field,
            rule,
            reason,
        };
        self.report.error(finding, self.limits.max_findings);
    }

    fn warning(&mut self, line: u64, field: &str, rule: DataRule, reason: String) {
        let finding = DataFinding {
            line,
            field: field.to_owned(),
            rule,
            reason,
        };
        self.report.warning(finding, self.limits.max_findings);
    }

    /// The kind of the first row, where that is a text with an answer.
    pub(super) fn labelled(&self) -> Option<Kind> {
        self.kind
            .filter(|kind| matches!(kind, Kind::Class | Kind::Labels | Kind::Score))
    }

    /// Counts a field that this row has and training does not use.
    pub(super) fn ignore(&mut self, field: &str) {
        // A file of ever new names must not grow the table.
        if self.ignored.len() < self.limits.max_findings || self.ignored.contains_key(field) {
            *self
                .ignored
                .entry(field.chars().take(80).collect())
                .or_insert(0) += 1;
        }
    }

    /// Whether another row may come; leaves an error and says no at the limit.
    pub(super) fn room(&mut self, line: u64) -> bool {
        let limit = self.limits.max_rows;
        if self.rows.len() < limit {
            return true;
        }
        let reason = format!("more than {limit} rows, which is the limit");
        self.error(line, "", DataRule::Limit, reason);
        false
    }

    /// Takes a row, or says why not.
    pub(super) fn add(&mut self, line: u64, mut row: Row) {
        if let Row::Labels { labels, .. } = &mut row {
            labels.sort_unstable();
        }
        let kind = *self.kind.get_or_insert(row.kind());
        let sound = if kind == row.kind() {
            self.check(line, &row)
        } else {
            let (first, this) = (kind.as_str(), row.kind().as_str());
            let reason =
                format!("a {this} row in a dataset that begins with {first} rows; split it in two");
            self.error(line, "", DataRule::MixedKinds, reason);
            false
        };
        if sound {
            match &row {
                Row::Class { label, .. } => drop(self.labels.insert(label.clone())),
                Row::Labels { labels, .. } => self.labels.extend(labels.iter().cloned()),
                _ => {}
            }
            self.rows.push(row);
            self.lines.push(line);
        }
    }

    fn check(&mut self, line: u64, row: &Row) -> bool {
        let before = self.report.error_count();
        match row {
            Row::Completion { completion, .. } if completion.is_empty() => {
                self.error(
                    line,
                    "completion",
                    DataRule::Empty,
                    "is empty: there is nothing to learn",
                );
            }
            Row::Completion { .. } => {}
            Row::Class { text, label } => {
                self.classified(line, text);
                self.label(line, "label", label);
            }
            Row::Labels { text, labels } => {
                self.classified(line, text);
                self.label_set(line, labels);
            }
            Row::Score { text, .. } => self.classified(line, text),
            Row::Text { text } if text.trim().is_empty() => {
                let reason = "holds nothing but white space: there is nothing to learn";
                self.error(line, "text", DataRule::Empty, reason);
            }
            Row::Text { .. } => {}
            Row::Instruction {
                instruction,
                output,
                ..
            } => {
                for (field, part) in [("instruction", instruction), ("output", output)] {
                    if part.is_empty() {
                        self.error(line, field, DataRule::Empty, "is empty");
                    }
                }
            }
            Row::Chat { messages } => self.chat(line, messages),
        }
        self.report.error_count() == before
    }

    fn classified(&mut self, line: u64, text: &str) {
        if text.is_empty() {
            self.error(line, "text", DataRule::Empty, "is empty");
        }
    }

    /// Each label is good, and none comes twice.
    fn label_set(&mut self, line: u64, labels: &[String]) {
        if labels.len() > self.limits.max_labels {
            let (count, limit) = (labels.len(), self.limits.max_labels);
            let reason = format!("has {count} labels, limit {limit}");
            return self.error(line, "labels", DataRule::Limit, reason);
        }
        for label in labels {
            self.label(line, "labels", label);
        }
        if let Some(pair) = labels.windows(2).find(|pair| pair[0] == pair[1]) {
            let reason = format!("names {:?} twice", pair[0]);
            self.error(line, "labels", DataRule::FieldType, reason);
        }
    }

    fn label(&mut self, line: u64, field: &str, label: &str) {
        let (max_bytes, max_labels) = (self.limits.max_label_bytes, self.limits.max_labels);
        if label.is_empty() {
            self.error(line, field, DataRule::Empty, "is empty");
        } else if label.len() > max_bytes {
            let reason = format!("has {} bytes, limit {max_bytes}", label.len());
            self.error(line, field, DataRule::Limit, reason);
        } else if label.chars().any(char::is_control) {
            self.error(
                line,
                field,
                DataRule::FieldType,
                "holds a control character, such as a line break",
            );
        } else if self.labels.len() == max_labels && !self.labels.contains(label) {
            let reason = format!("more than {max_labels} different labels, which is the limit");
            self.error(line, field, DataRule::Limit, reason);
        }
    }

    /// Optional system, then user and assistant in turn, ending with the assistant, of whom something is learned.
    fn chat(&mut self, line: u64, messages: &[ChatMessage]) {
        let limit = self.limits.max_messages;
        if messages.len() > limit {
            let reason = format!("has {} messages, limit {limit}", messages.len());
            return self.error(line, "messages", DataRule::Limit, reason);
        }
        if messages.is_empty() {
            return self.error(line, "messages", DataRule::Empty, "is empty");
        }
        let mut expected = Role::User;
        for (i, message) in messages.iter().enumerate() {
            let field = format!("messages[{i}]");
            match message.role {
                Role::System if i == 0 => continue,
                Role::System => {
                    let reason = "a system message may only come first";
                    return self.error(line, &field, DataRule::Role, reason);
                }
                role if role != expected => {
                    let reason =
                        format!("role is {}, expected {}", role.as_str(), expected.as_str());
                    return self.error(line, &field, DataRule::Role, reason);
                }
                Role::User => expected = Role::Assistant,
                Role::Assistant => {
                    expected = Role::User;
                    if message.learn && message.content.is_empty() {
                        self.error(
                            line,
                            &field,
                            DataRule::Empty,
                            "an empty answer: there is nothing to learn",
                        );
                    }
                }
            }
        }
        if messages.last().is_some_and(|m| m.role != Role::Assistant) {
            let reason =
                "the last message must be the assistant's: nothing is learned from what follows it";
            self.error(line, "messages", DataRule::Role, reason);
        } else if !messages
            .iter()
            .any(|m| m.role == Role::Assistant && m.learn)
        {
            let reason = "every answer has weight 0: there is nothing to learn";
            self.error(line, "messages", DataRule::NothingToLearn, reason);
        }
    }

    pub(super) fn finish(mut self) -> Result<Dataset, DataReport> {
        if self.rows.is_empty() && self.report.error_count() == 0 {
            self.error(0, "", DataRule::TooFewRows, "there are no rows");
        }
        for (field, rows) in std::mem::take(&mut self.ignored) {
            let reason = format!("this field is not used ({rows} rows)");
            self.warning(0, &field, DataRule::IgnoredField, reason);
        }
        self.repeated();
        self.suspicious_labels();
        match self.kind {
            Some(kind) if self.report.error_count() == 0 => Ok(Dataset {
                kind,
                rows: self.rows,
                lines: self.lines,
                report: self.report,
            }),
            _ => Err(self.report),
        }
    }

    /// Rows that are the same, and texts that have two labels.
    fn repeated(&mut self) {
        let Repeats { same, conflicting } = repeats(self.rows.iter());
        let lines = |pair: Option<&(usize, usize)>| {
            let (first, again) = pair?;
            Some((*self.lines.get(*first)?, *self.lines.get(*again)?))
        };
        let (first_same, first_conflict) = (lines(same.first()), lines(conflicting.first()));
        if let Some((first, line)) = first_same {
            let reason = format!(
                "{} rows repeat an earlier one, the first that of line {first}",
                same.len()
            );
            self.warning(line, "", DataRule::Duplicate, reason);
        }
        if let Some((first, line)) = first_conflict {
            let count = conflicting.len();
            let reason = format!(
                "{count} texts come again with another label, the first that of line {first}"
            );
            self.warning(line, "label", DataRule::ConflictingLabel, reason);
        }
    }

    /// Labels that a person would take for the same.
    fn suspicious_labels(&mut self) {
        let mut folded: BTreeMap<String, Vec<&String>> = BTreeMap::new();
        for label in &self.labels {
            folded
                .entry(label.trim().to_lowercase())
                .or_default()
                .push(label);
        }
        let mut reasons = Vec::new();
        for labels in folded.into_values() {
            if let [one] = labels[..] {
                if one.trim() != one {
                    reasons.push(format!("{one:?} begins or ends with white space"));
                }
            } else {
                reasons.push(format!("{labels:?} are different labels but look the same"));
            }
        }
        for reason in reasons {
            self.warning(0, "label", DataRule::SuspiciousLabel, reason);
        }
    }
}
