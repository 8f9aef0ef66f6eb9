//! Training data as rows: what a file may hold, and a report of every line that does not hold it.
//!
//! Nothing is dropped in silence: a row is taken, or its line is an error; a field that is not used is a warning.
//! This file must not know tokens, templates or models.

mod answer;
mod check;
mod parse;
mod table;
#[cfg(test)]
mod tests;

use std::fmt;

pub use answer::{MAX_SCORE, Score};
pub use check::from_rows;
pub(crate) use check::repeats;
pub use parse::parse;
use serde::{Deserialize, Serialize};

/// Who speaks in a chat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Instructions before the conversation.
    System,
    /// The one who asks.
    User,
    /// The one whose answers are learned.
    Assistant,
}

impl Role {
    /// The name in data, templates and requests.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One message of a chat row.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ChatMessage {
    /// Who speaks.
    pub role: Role,
    /// What is said; never parsed for control tokens.
    pub content: String,
    /// False for `weight` 0: the message is only read, whoever speaks and whichever turns are learned.
    pub learn: bool,
}

/// One training row.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Row {
    /// Raw text and its continuation; only the continuation is learned.
    Completion {
        /// Raw text, as a Generate request would send it.
        prompt: String,
        /// What should follow.
        completion: String,
    },
    /// A conversation.
    Chat {
        /// In order: an optional system message, then user and assistant in turn.
        messages: Vec<ChatMessage>,
    },
    /// A text and its class.
    Class {
        /// Raw text, as a Classify request would send it.
        text: String,
        /// The name of the class.
        label: String,
    },
    /// A text and every label that applies to it.
    Labels {
        /// Raw text, as a Classify request would send it.
        text: String,
        /// Names, sorted bytewise; may be none.
        labels: Vec<String>,
    },
    /// A text and the number to answer it with.
    Score {
        /// Raw text, as a Classify request would send it.
        text: String,
        /// The number.
        score: Score,
    },
    /// A document; all of it is learned.
    Text {
        /// Raw text.
        text: String,
    },
    /// A task and its answer; learned as a conversation of two messages.
    Instruction {
        /// What is to be done.
        instruction: String,
        /// What it is to be done with; may be empty.
        input: String,
        /// The answer.
        output: String,
    },
}

/// What kind of rows a dataset holds; all of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// [`Row::Completion`].
    Completion,
    /// [`Row::Chat`].
    Chat,
    /// [`Row::Class`].
    Class,
    /// [`Row::Labels`].
    Labels,
    /// [`Row::Score`].
    Score,
    /// [`Row::Text`].
    Text,
    /// [`Row::Instruction`].
    Instruction,
}

impl Kind {
    /// The name in messages.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Completion => "prompt/completion",
            Self::Chat => "chat",
            Self::Class => "classification",
            Self::Labels => "multi-label classification",
            Self::Score => "regression",
            Self::Text => "raw text",
            Self::Instruction => "instruction",
        }
    }
}

impl Row {
    /// The row's kind.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Completion { .. } => Kind::Completion,
            Self::Chat { .. } => Kind::Chat,
            Self::Class { .. } => Kind::Class,
            Self::Labels { .. } => Kind::Labels,
            Self::Score { .. } => Kind::Score,
            Self::Text { .. } => Kind::Text,
            Self::Instruction { .. } => Kind::Instruction,
        }
    }
}

/// How a file spells its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// One JSON object a line.
    Jsonl,
    /// Comma-separated with a header, quoted by RFC 4180.
    Csv,
    /// Tab-separated with a header, quoted in the same way.
    Tsv,
    /// The whole file is one document.
    Text,
}

impl Format {
    /// By the ending of a file's name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name.rsplit_once('.')?.1.to_ascii_lowercase().as_str() {
            "jsonl" | "ndjson" => Some(Self::Jsonl),
            "csv" => Some(Self::Csv),
            "tsv" => Some(Self::Tsv),
            "txt" | "md" => Some(Self::Text),
            _ => None,
        }
    }
}

/// The fields or columns that hold a row's parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ColumnNames {
    /// Text to classify, or to learn when there is no label.
    pub text: String,
    /// Its label.
    pub label: String,
    /// Raw prompt.
    pub prompt: String,
    /// Its continuation.
    pub completion: String,
    /// List of messages; JSONL only.
    pub messages: String,
    /// What is to be done.
    pub instruction: String,
    /// What it is to be done with; the column may be absent.
    pub input: String,
    /// The answer to an instruction.
    pub output: String,
    /// Every label that applies: a list, or in a table names between bars.
    pub labels: String,
    /// The number to answer with.
    pub score: String,
}

impl Default for ColumnNames {
    fn default() -> Self {
        Self {
            text: "text".to_owned(),
            label: "label".to_owned(),
            prompt: "prompt".to_owned(),
            completion: "completion".to_owned(),
            messages: "messages".to_owned(),
            instruction: "instruction".to_owned(),
            input: "input".to_owned(),
            output: "output".to_owned(),
            labels: "labels".to_owned(),
            score: "score".to_owned(),
        }
    }
}

/// Bounds on a dataset; each is named by the finding that it causes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataLimits {
    /// Bytes of the whole file.
    pub max_bytes: usize,
    /// Bytes of one line or record, but for raw text.
    pub max_line_bytes: usize,
    /// Bytes of one document of raw text: a tokenizer takes it whole, at about a hundred bytes for each.
    pub max_document_bytes: usize,
    /// Rows.
    pub max_rows: usize,
    /// Different labels.
    pub max_labels: usize,
    /// Bytes of one label.
    pub max_label_bytes: usize,
    /// Messages of one chat.
    pub max_messages: usize,
    /// Findings listed; the rest are counted.
    pub max_findings: usize,
}

impl Default for DataLimits {
    fn default() -> Self {
        Self {
            max_bytes: 256 << 20,
            max_line_bytes: 1 << 20,
            max_document_bytes: 4 << 20,
            max_rows: 1_000_000,
            max_labels: 4096,
            max_label_bytes: 256,
            max_messages: 1024,
            max_findings: 100,
        }
    }
}

impl DataLimits {
    /// Bytes of one row of a kind.
    #[must_use]
    pub const fn row_bytes(&self, kind: Kind) -> usize {
        match kind {
            Kind::Text => self.max_document_bytes,
            _ => self.max_line_bytes,
        }
    }
}

/// Which rule a line breaks. The snake-case name is stable and may be matched by programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataRule {
    /// File, line, rows, labels or messages over a limit.
    Limit,
    /// Not UTF-8.
    Utf8,
    /// Not a JSON object, or a key given twice.
    Json,
    /// A record with another number of columns than the header, or broken quoting.
    Record,
    /// A header without the columns needed, or with one twice.
    Header,
    /// A field that the row needs is not there.
    MissingField,
    /// A field of the wrong type.
    FieldType,
    /// A row of another kind than the first one.
    MixedKinds,
    /// A field that may not be empty is.
    Empty,
    /// A role that does not exist, or stands in the wrong place.
    Role,
    /// A message weight other than 0 and 1.
    Weight,
    /// A feature of other systems' data that we do not compute, such as tool calls.
    Unsupported,
    /// No rows at all, or too few.
    TooFewRows,
    /// Warning: fields that are not used.
    IgnoredField,
    /// Warning: rows that are the same.
    Duplicate,
    /// Warning: the same text with different labels.
    ConflictingLabel,
    /// Warning: white space around a label, or labels that differ in case alone.
    SuspiciousLabel,
    /// A row that has more tokens than allowed.
    TooLong,
    /// A row from which nothing could be learned.
    NothingToLearn,
    /// A label that is not in the given set.
    UnknownLabel,
    /// The chat template is missing, failed, or renders a message differently once others follow.
    Template,
}

impl DataRule {
    /// The stable snake-case name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::Utf8 => "utf8",
            Self::Json => "json",
            Self::Record => "record",
            Self::Header => "header",
            Self::MissingField => "missing_field",
            Self::FieldType => "field_type",
            Self::MixedKinds => "mixed_kinds",
            Self::Empty => "empty",
            Self::Role => "role",
            Self::Weight => "weight",
            Self::Unsupported => "unsupported",
            Self::TooFewRows => "too_few_rows",
            Self::IgnoredField => "ignored_field",
            Self::Duplicate => "duplicate",
            Self::ConflictingLabel => "conflicting_label",
            Self::SuspiciousLabel => "suspicious_label",
            Self::TooLong => "too_long",
            Self::NothingToLearn => "nothing_to_learn",
            Self::UnknownLabel => "unknown_label",
            Self::Template => "template",
        }
    }
}

/// One bad or doubtful line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFinding {
    /// Line of the file, from 1 (for inline rows: the row's number, from 1); 0 is the whole file.
    pub line: u64,
    /// The field or column, empty for the whole line.
    pub field: String,
    /// The rule.
    pub rule: DataRule,
    /// What is wrong, with value and limit.
    pub reason: String,
}

impl fmt::Display for DataFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "line {}: ", self.line)?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.reason)
    }
}

/// Every finding of a dataset. As an error it holds at least one in `errors`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataReport {
    /// Lines that refuse the dataset, up to the limit.
    pub errors: Vec<DataFinding>,
    /// Errors beyond the limit.
    pub more_errors: u64,
    /// What the dataset is taken with, up to the limit.
    pub warnings: Vec<DataFinding>,
    /// Warnings beyond the limit.
    pub more_warnings: u64,
}

impl DataReport {
    /// Number of errors, listed or not.
    #[must_use]
    pub fn error_count(&self) -> u64 {
        self.errors.len() as u64 + self.more_errors
    }

    /// Number of warnings, listed or not.
    #[must_use]
    pub fn warning_count(&self) -> u64 {
        self.warnings.len() as u64 + self.more_warnings
    }

    /// Adds an error; beyond `limit` only its number is kept.
    pub fn error(&mut self, finding: DataFinding, limit: usize) {
        if self.errors.len() < limit {
            self.errors.push(finding);
        } else {
            self.more_errors += 1;
        }
    }

    /// Adds a warning; beyond `limit` only its number is kept.
    pub fn warning(&mut self, finding: DataFinding, limit: usize) {
        if self.warnings.len() < limit {
            self.warnings.push(finding);
        } else {
            self.more_warnings += 1;
        }
    }
}

impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (errors, warnings) = (self.error_count(), self.warning_count());
        write!(f, "{errors} errors, {warnings} warnings")?;
        for finding in &self.errors {
            write!(f, "\n  error: {finding}")?;
        }
        if self.more_errors > 0 {
            write!(f, "\n  and {} more errors", self.more_errors)?;
        }
        for finding in &self.warnings {
            write!(f, "\n  warning: {finding}")?;
        }
        if self.more_warnings > 0 {
            write!(f, "\n  and {} more warnings", self.more_warnings)?;
        }
        Ok(())
    }
}

impl std::error::Error for DataReport {}

/// Checked rows of one kind, with the lines they came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// What the rows are.
    pub kind: Kind,
    /// At least one.
    pub rows: Vec<Row>,
    /// The line of each row, from 1.
    pub lines: Vec<u64>,
    /// Warnings; no errors.
    pub report: DataReport,
}
