//! What a check says: a table that grows line by line, and one line of JSON at the end, which also comes when time is up.
//!
//! It must not know what is checked.

use std::error::Error;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

/// Names and values, in the table's order.
pub(super) type Row = Map<String, Value>;

/// What a row's work ends with: more names and values.
pub(super) type Found = Result<Value, Box<dyn Error>>;

/// The table of one part.
pub(super) struct Report {
    state: Arc<Mutex<State>>,
    deadline: Instant,
}

struct State {
    part: &'static str,
    device: String,
    rows: Vec<Row>,
    /// The names above the last line.
    heading: Vec<String>,
    failed: bool,
    cut: bool,
}

// === impl Report ===

impl Report {
    /// An empty table. When `budget` is over the process prints what it has and ends, whatever it is doing.
    pub(super) fn start(part: &'static str, device: String, budget: Duration) -> Self {
        print(&format!("check {part} on {device}"));
        let report = Report::empty(part, device, Instant::now() + budget);
        let watched = Arc::clone(&report.state);
        thread::spawn(move || {
            thread::sleep(budget);
            let mut state = watched.lock().unwrap_or_else(PoisonError::into_inner);
            state.cut = true;
            state.print_json();
            std::process::exit(i32::from(state.failed));
        });
        report
    }

    fn empty(part: &'static str, device: String, deadline: Instant) -> Self {
        let state = State {
            part,
            device,
            rows: Vec::new(),
            heading: Vec::new(),
            failed: false,
            cut: false,
        };
        Report {
            state: Arc::new(Mutex::new(state)),
            deadline,
        }
    }

    /// What is left until the table is cut.
    pub(super) fn time_left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// One row: what it is about, and what `work` finds. A failure or a panic is the row's, and the next one goes on.
    pub(super) fn row(&self, about: Value, work: impl FnOnce() -> Found) -> Option<Row> {
        let found = match catch_unwind(AssertUnwindSafe(work)) {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(error)) => Err(error.to_string()),
            Err(panic) => Err(said(&*panic)),
        };
        let mut row = members(about);
        let mut state = self.state();
        match found {
            Ok(found) => {
                row.extend(members(found));
                state.add(row.clone());
                Some(row)
            }
            Err(error) => {
                state.failed = true;
                row.insert("failed".to_owned(), error.into());
                state.add(row);
                None
            }
        }
    }

    /// A row that says why there is nothing more.
    pub(super) fn not_run(&self, why: &str) {
        self.state().add(members(json!({"not run": why})));
    }

    /// The line of JSON, and whether nothing failed.
    pub(super) fn finish(self) -> ExitCode {
        // Kept until the process has ended, so that the line is not printed twice.
        let state = self.state();
        state.print_json();
        let code = ExitCode::from(u8::from(state.failed));
        std::mem::forget(state);
        code
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl State ===

impl State {
    fn add(&mut self, row: Row) {
        let row: Row = row.into_iter().map(|(key, v)| (key, rounded(v))).collect();
        let heading: Vec<String> = row.keys().cloned().collect();
        if heading != self.heading {
            print(&format!("\n| {} |", heading.join(" | ")));
            print(&format!("|{}", "---|".repeat(heading.len())));
            self.heading = heading;
        }
        let cells: Vec<String> = row.values().map(shown).collect();
        print(&format!("| {} |", cells.join(" | ")));
        self.rows.push(row);
    }

    fn print_json(&self) {
        let line = json!({
            "part": self.part,
            "device": self.device,
            "rows": self.rows,
            "cut": self.cut,
        });
        print(&format!("\n{line}"));
    }
}

/// A line that is seen at once, also by whoever reads a file; a reader that is gone is no failure.
fn print(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn said(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panic: {}", text.unwrap_or("without words"))
}

fn members(value: Value) -> Row {
    match value {
        Value::Object(members) => members,
        other => Row::from_iter([("value".to_owned(), other)]),
    }
}

/// Four digits: more were not measured.
fn rounded(value: Value) -> Value {
    match value.as_f64().filter(|_| value.is_f64()) {
        Some(number) => json!(format!("{number:.3e}").parse().unwrap_or(number)),
        None => value,
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.replace('\n', " "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn a_row_that_fails_says_so_and_the_next_one_goes_on() {
        let report = Report::empty("test", "nowhere".to_owned(), Instant::now());
        let row = report.row(json!({"step": 1}), || panic!("so {}", "it is"));
        assert!(row.is_none());
        let row = report.row(json!({"step": 2}), || Ok(json!({"ms": 1.234_567})));
        assert_eq!(
            Value::from(row.unwrap()),
            json!({"step": 2, "ms": 1.234_567})
        );
        let state = report.state();
        assert!(state.failed);
        assert_eq!(state.rows[0]["failed"], "panic: so it is");
        assert_eq!(state.rows[1]["ms"], 1.235);
    }
}
