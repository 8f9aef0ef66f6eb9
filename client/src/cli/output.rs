//! Where results, remarks and errors go: results to stdout, the rest to stderr, all of it as
//! JSON when asked. A reader that has gone away ends the command quietly.

use std::{
    fmt::Display,
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use prost::{Message, Name};
use serde_json::{Value, json};
use tonic::Code;

use crate::{cli::json, error::Error};

/// Why a command ended early.
#[derive(Debug)]
pub(crate) enum Failure {
    /// A call failed.
    Call(Error),
    /// Something on this machine failed.
    Local(String),
    /// The arguments contradict each other.
    Usage(String),
    /// What was checked was refused; the report is printed already.
    Refused,
    /// The job did not succeed; what happened is printed already.
    Job,
    /// A load test missed an objective, or a figure got worse; which one is printed already.
    Missed,
    /// The person interrupted it; what to know is printed already.
    Interrupted,
    /// Nobody reads stdout any more.
    ClosedPipe,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Call(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::ClosedPipe,
            _ => Self::Local(format!("cannot write: {error}")),
        }
    }
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Local(_) | Self::Refused => 1,
            Self::Job => 6,
            Self::Missed => 7,
            Self::Interrupted => 130,
            Self::ClosedPipe => 0,
            Self::Call(error) => match error.code {
                Code::Unavailable => 3,
                Code::Unauthenticated | Code::PermissionDenied => 4,
                Code::NotFound => 5,
                _ => 1,
            },
        }
    }
}

/// How to print.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Out {
    json: bool,
    quiet: bool,
}

// === impl Out ===

impl Out {
    pub(crate) fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet }
    }

    /// Whether results are JSON.
    pub(crate) fn is_json(self) -> bool {
        self.json
    }

    /// Whether a person looks at stderr.
    pub(crate) fn is_watched(self) -> bool {
        !self.quiet && !self.json && io::stderr().is_terminal()
    }

    /// A line of a result.
    pub(crate) fn line(self, text: impl Display) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{text}")?;
        Ok(stdout.flush()?)
    }

    /// A piece of a result, shown at once.
    pub(crate) fn piece(self, text: &str) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        Ok(stdout.flush()?)
    }

    /// A remark. Nothing depends on it, so that a closed stderr is no failure.
    pub(crate) fn remark(self, text: impl Display) {
        if !self.quiet && !self.json {
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// A message as the command's JSON document.
    pub(crate) fn document<M: Message + Name>(self, message: &M) -> Result<(), Failure> {
        self.json_document(&json::value(message))
    }

    /// Messages as one JSON document, an array.
    pub(crate) fn documents<M: Message + Name>(self, messages: &[M]) -> Result<(), Failure> {
        self.json_document(&Value::Array(messages.iter().map(json::value).collect()))
    }

    /// A JSON document.
    pub(crate) fn json_document(self, value: &Value) -> Result<(), Failure> {
        self.line(format_args!("{value:#}"))
    }

    /// A message as one JSON line of a stream.
    pub(crate) fn json_line<M: Message + Name>(self, message: &M) -> Result<(), Failure> {
        self.line(json::value(message))
    }

    /// A table with aligned columns; nothing but a remark when it is empty.
    pub(crate) fn table(
        self,
        head: &[&str],
        rows: &[Vec<String>],
        empty: &str,
    ) -> Result<(), Failure> {
        if rows.is_empty() {
            self.remark(empty);
            return Ok(());
        }
        for line in aligned(head, rows) {
            self.line(line)?;
        }
        Ok(())
    }

    /// Says what went wrong and what to do, and gives the exit code.
    pub(crate) fn fail(self, failure: &Failure) -> ExitCode {
        let text = match (failure, self.json) {
            (Failure::Call(error), true) => Some(error_document(error).to_string()),
            (Failure::Call(error), false) => Some(error_text(error)),
            (Failure::Local(text) | Failure::Usage(text), true) => {
                Some(json!({"error": {"code": "CLIENT", "message": text}}).to_string())
            }
            (Failure::Local(text) | Failure::Usage(text), false) => Some(format!("error: {text}")),
            _ => None,
        };
        if let Some(text) = text {
            let _ = writeln!(io::stderr(), "{text}");
        }
        ExitCode::from(failure.exit_code())
    }
}

fn error_text(error: &Error) -> String {
    let mut text = format!("error: {error}");
    if let Some(step) = error.next_step() {
        text.push_str(&format!("\n  next: {step}"));
    }
    if let Some(id) = error.request_id.as_ref().filter(|id| !id.is_empty()) {
        text.push_str(&format!("\n  request id: {id}"));
    }
    text
}

fn error_document(error: &Error) -> Value {
    let violations: Vec<Value> = error
        .field_violations
        .iter()
        .map(|v| json!({"field": v.field, "description": v.description}))
        .collect();
    json!({"error": {
        "code": code_name(error.code),
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
        "field_violations": violations,
        "resource": error.resource,
        "retry_after_ms": error.retry_after.map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)),
        "request_id": error.request_id,
        "attempts": error.attempts,
        "next_step": error.next_step(),
    }})
}

/// A code as gRPC writes it.
fn code_name(code: Code) -> String {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.extend(letter.to_uppercase());
    }
    name
}

/// Rows with aligned columns, below a head unless it is empty.
pub(crate) fn aligned(head: &[&str], rows: &[Vec<String>]) -> Vec<String> {
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    let heads = (!head.is_empty()).then_some(&head);
    let all: Vec<&Vec<String>> = heads.into_iter().chain(rows).collect();
    let columns = all.iter().map(|row| row.len()).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = all.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    all.into_iter().map(line).collect()
}

/// Bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
    let value = count as f64;
    match count {
        0..1024 => format!("{count} B"),
        1024..1_048_576 => format!("{:.1} KiB", value / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", value / 1_048_576.0),
        _ => format!("{:.2} GiB", value / 1_073_741_824.0),
    }
}

/// A protobuf duration in seconds.
pub(crate) fn seconds_of(duration: &prost_types::Duration) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "shown in milliseconds")]
    let whole = duration.seconds as f64;
    whole + f64::from(duration.nanos) / 1e9
}

/// A time span for people.
pub(crate) fn span(seconds: f64) -> String {
    if seconds < 1.0 {
        format!("{:.0} ms", seconds * 1e3)
    } else if seconds < 60.0 {
        format!("{seconds:.1} s")
    } else {
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "whole seconds of a span"
        )]
        let whole = seconds.round().max(0.0) as u64;
        match whole / 3600 {
            0 => format!("{}m{:02}s", whole / 60, whole % 60),
            hours => format!("{hours}h{:02}m", whole % 3600 / 60),
        }
    }
}

/// How long ago a time was.
pub(crate) fn age(time: Option<&prost_types::Timestamp>) -> String {
    let Some(time) = time else {
        return "-".to_owned();
    };
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| {
            i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
        });
    match now.saturating_sub(time.seconds).max(0) {
        age @ 0..60 => format!("{age}s ago"),
        age @ 60..3600 => format!("{}m ago", age / 60),
        age @ 3600..86400 => format!("{}h ago", age / 3600),
        age => format!("{}d ago", age / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_by_characters_not_bytes() {
        let rows = vec![
            vec!["größe".to_owned(), "1".to_owned()],
            vec!["a".to_owned(), "22".to_owned()],
        ];
        let lines = aligned(&["name", "n"], &rows);
        assert_eq!(lines, ["name   n", "größe  1", "a      22"]);
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(3 << 30), "3.00 GiB");
        assert_eq!(span(0.0123), "12 ms");
        assert_eq!(span(59.96), "60.0 s");
        assert_eq!(span(61.0), "1m01s");
        assert_eq!(span(3661.0), "1h01m");
    }

    #[test]
    fn codes_are_named_as_grpc_names_them() {
        assert_eq!(code_name(Code::FailedPrecondition), "FAILED_PRECONDITION");
        assert_eq!(code_name(Code::NotFound), "NOT_FOUND");
    }

    #[test]
    fn exit_codes_tell_causes_apart() {
        let code = |code| {
            let error = Error::local(code, "X", "x");
            Failure::from(error).exit_code()
        };
        assert_eq!(code(Code::Unavailable), 3);
        assert_eq!(code(Code::Unauthenticated), 4);
        assert_eq!(code(Code::NotFound), 5);
        assert_eq!(code(Code::Internal), 1);
        let closed = io::Error::from(io::ErrorKind::BrokenPipe);
        assert_eq!(Failure::from(closed).exit_code(), 0);
    }
}
