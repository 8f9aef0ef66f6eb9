//! Tables to rows: CSV and TSV with a header, record by record, each bad one with its line.
//!
//! Bytes are untrusted. This file must not know what makes a row good beyond its form.

use super::answer::{Score, split_labels};
use super::check::Collector;
use super::parse::{kind_of, used};
use super::{ColumnNames, DataLimits, DataRule, Kind, Row};

/// The columns of a table: their kind, and where each of [`used`] stands, if it does.
struct Columns {
    kind: Kind,
    places: Vec<Option<usize>>,
    width: usize,
}

impl Columns {
    /// The row that a record's fields make; `None` for chats, which no table holds, and with an error for what is no number.
    fn row(&self, line: u64, fields: &[&str], collector: &mut Collector) -> Option<Row> {
        let mut parts = self.places.iter().map(|place| {
            let field = place.and_then(|at| fields.get(at));
            field.map_or(String::new(), |field| (*field).to_owned())
        });
        let mut next = || parts.next().unwrap_or_default();
        Some(match self.kind {
            Kind::Completion => Row::Completion {
                prompt: next(),
                completion: next(),
            },
            Kind::Class => Row::Class {
                text: next(),
                label: next(),
            },
            Kind::Labels => Row::Labels {
                text: next(),
                labels: split_labels(&next()),
            },
            Kind::Score => Row::Score {
                text: next(),
                score: number(line, &next(), collector)?,
            },
            Kind::Text => Row::Text { text: next() },
            Kind::Instruction => Row::Instruction {
                instruction: next(),
                input: next(),
                output: next(),
            },
            Kind::Chat => return None,
        })
    }
}

/// A cell's number, or an error for its line.
fn number(line: u64, cell: &str, collector: &mut Collector) -> Option<Score> {
    let reason = match cell.trim().parse::<f64>() {
        Ok(value) => match Score::new(value) {
            Ok(score) => return Some(score),
            Err(reason) => reason,
        },
        Err(_) => {
            let shown: String = cell.chars().take(40).collect();
            format!("is '{shown}', expected a number")
        }
    };
    collector.error(line, "score", DataRule::FieldType, reason);
    None
}

/// Reads a table's rows, separated by `delimiter`, by the columns that its header names.
pub(super) fn read(
    bytes: &[u8],
    delimiter: u8,
    columns: &ColumnNames,
    limits: &DataLimits,
    collector: &mut Collector,
) {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .has_headers(false)
        .flexible(true)
        .from_reader(bytes);
    let mut header: Option<Columns> = None;
    let mut record = csv::ByteRecord::new();
    loop {
        let begin = usize::try_from(reader.position().byte()).unwrap_or(usize::MAX);
        // Reading from memory into bytes has no way to fail; a reader that stops early must still be told.
        match reader.read_byte_record(&mut record) {
            Ok(true) => {}
            Ok(false) => return,
            Err(e) => return collector.error(0, "", DataRule::Record, e.to_string()),
        }
        let end = usize::try_from(reader.position().byte()).unwrap_or(usize::MAX);
        let raw = bytes.get(begin..end).unwrap_or_default();
        // Blank lines before the record, and the end of CR LF behind the last one, belong to the span that was read.
        let blank = raw
            .iter()
            .take_while(|b| matches!(b, b'\n' | b'\r'))
            .count();
        let skipped = raw[..blank].iter().filter(|b| **b == b'\n').count() as u64;
        let line = record.position().map_or(1, csv::Position::line) + skipped;
        let Some(fields) = record_fields(line, &raw[blank..], &record, limits, collector) else {
            if header.is_none() {
                return;
            }
            continue;
        };
        let Some(columns) = &header else {
            header = find_columns(line, &fields, columns, collector);
            if header.is_none() {
                return;
            }
            continue;
        };
        if !collector.room(line) {
            return;
        }
        if fields.len() != columns.width {
            let reason = format!(
                "has {} columns, the header has {}",
                fields.len(),
                columns.width
            );
            collector.error(line, "", DataRule::Record, reason);
            continue;
        }
        if let Some(row) = columns.row(line, &fields, collector) {
            collector.add(line, row);
        }
    }
}

/// The record's fields as text, or an error for its line.
fn record_fields<'a>(
    line: u64,
    raw: &[u8],
    record: &'a csv::ByteRecord,
    limits: &DataLimits,
    collector: &mut Collector,
) -> Option<Vec<&'a str>> {
    if raw.len() > limits.max_line_bytes {
        let reason = format!(
            "has {} bytes, limit {}; is a quote not closed?",
            raw.len(),
            limits.max_line_bytes
        );
        collector.error(line, "", DataRule::Limit, reason);
        return None;
    }
    // The reader forgives a quote that is never closed and would take all that follows for one field.
    if raw.iter().filter(|b| **b == b'"').count() % 2 == 1 {
        let reason = "a quote is not closed; write \"\" for a quote inside a quoted field";
        collector.error(line, "", DataRule::Record, reason);
        return None;
    }
    let fields: Result<Vec<&str>, _> = record.iter().map(std::str::from_utf8).collect();
    if fields.is_err() {
        collector.error(line, "", DataRule::Utf8, "is not UTF-8");
    }
    fields.ok()
}

fn find_columns(
    line: u64,
    header: &[&str],
    columns: &ColumnNames,
    collector: &mut Collector,
) -> Option<Columns> {
    let kind = match kind_of(header, columns) {
        Ok(Kind::Chat) => {
            let reason = "chats cannot be written as a table; use JSONL";
            collector.error(line, &columns.messages, DataRule::Header, reason);
            return None;
        }
        // A table with a text and something else was made for labels: the one whose name is not known is asked for.
        Ok(Kind::Text) if header.len() > 1 => Kind::Class,
        Ok(kind) => kind,
        Err((rule, reason)) => {
            let rule = if rule == DataRule::Unsupported {
                rule
            } else {
                DataRule::Header
            };
            collector.error(line, "", rule, reason);
            return None;
        }
    };
    let names = used(kind, columns);
    let mut places = Vec::new();
    for name in &names {
        let mut found = header.iter().enumerate().filter(|(_, h)| *h == name);
        let reason = match (found.next(), found.next()) {
            (Some((at, _)), None) => {
                places.push(Some(at));
                continue;
            }
            (None, _) if kind == Kind::Instruction && *name == columns.input => {
                places.push(None);
                continue;
            }
            (Some(_), Some(_)) => "the header has this column twice".to_owned(),
            (None, _) => {
                let found: String = header.join(", ").chars().take(200).collect();
                format!(
                    "the header does not have this column; it has: {found}. Another name can be given"
                )
            }
        };
        collector.error(line, name, DataRule::Header, reason);
        return None;
    }
    for name in header.iter().filter(|h| !names.contains(h)) {
        collector.ignore(name);
    }
    Some(Columns {
        kind,
        places,
        width: header.len(),
    })
}
