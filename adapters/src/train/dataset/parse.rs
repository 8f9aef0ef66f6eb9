//! Files to rows: JSONL, CSV and TSV, line by line, each bad line with its number.
//!
//! Bytes are untrusted. This file must not know what makes a row good beyond its form.

use serde_json::{Map, Value};

use super::check::Collector;
use super::{
    ChatMessage, ColumnNames, DataLimits, DataReport, DataRule, Dataset, Format, Kind, Role, Row,
};
use crate::strict_json;

/// Reads a file's rows. A byte order mark and CR LF are taken as what they are; blank lines hold no row.
///
/// # Errors
/// The report of every bad line, up to the limit, with the number of the rest.
pub fn parse(
    bytes: &[u8],
    format: Format,
    columns: &ColumnNames,
    limits: &DataLimits,
) -> Result<Dataset, DataReport> {
    let mut collector = Collector::new(limits);
    if bytes.len() > limits.max_bytes {
        let reason = format!(
            "the file has {} bytes, limit {}",
            bytes.len(),
            limits.max_bytes
        );
        collector.error(0, "", DataRule::Limit, reason);
        return collector.finish();
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    match format {
        Format::Jsonl => Jsonl {
            columns,
            collector: &mut collector,
            label_type: None,
        }
        .read(bytes, limits),
        Format::Csv => table(bytes, b',', columns, limits, &mut collector),
        Format::Tsv => table(bytes, b'\t', columns, limits, &mut collector),
    }
    collector.finish()
}

struct Jsonl<'a, 'b> {
    columns: &'a ColumnNames,
    collector: &'a mut Collector<'b>,
    /// What the first label was: a string, a number or a boolean; all must be the same.
    label_type: Option<&'static str>,
}

impl Jsonl<'_, '_> {
    fn read(&mut self, bytes: &[u8], limits: &DataLimits) {
        for (line, text) in (1..).zip(bytes.split(|b| *b == b'\n')) {
            let text = text.strip_suffix(b"\r").unwrap_or(text);
            if text.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            if !self.collector.room(line) {
                return;
            }
            if text.len() > limits.max_line_bytes {
                let reason = format!("has {} bytes, limit {}", text.len(), limits.max_line_bytes);
                self.collector.error(line, "", DataRule::Limit, reason);
                continue;
            }
            if let Some(object) = self.object(line, text)
                && let Some(row) = self.row(line, &object)
            {
                self.collector.add(line, row);
            }
        }
    }

    fn object(&mut self, line: u64, text: &[u8]) -> Option<Map<String, Value>> {
        if let Err(e) = std::str::from_utf8(text) {
            let reason = format!("is not UTF-8 from byte {}", e.valid_up_to() + 1);
            self.collector.error(line, "", DataRule::Utf8, reason);
            return None;
        }
        match strict_json::parse(text) {
            Ok(Value::Object(object)) => return Some(object),
            Ok(_) => self
                .collector
                .error(line, "", DataRule::Json, "is JSON but no object"),
            Err(reason) => {
                // The parser counts lines of its input, which is one line.
                let reason = reason.replace(" at line 1 column ", " at column ");
                self.collector.error(line, "", DataRule::Json, reason);
            }
        }
        None
    }

    fn row(&mut self, line: u64, object: &Map<String, Value>) -> Option<Row> {
        let names = object.keys().map(String::as_str);
        let kind = match kind_of(&names.collect::<Vec<_>>(), self.columns) {
            Ok(kind) => kind,
            Err((rule, reason)) => {
                self.collector.error(line, "", rule, reason);
                return None;
            }
        };
        for tools in ["tools", "functions"] {
            if kind == Kind::Chat && object.get(tools).is_some_and(|v| !v.is_null()) {
                let reason = "tool definitions are not supported in training";
                self.collector
                    .error(line, tools, DataRule::Unsupported, reason);
                return None;
            }
        }
        let used = used(kind, self.columns);
        for key in object.keys().filter(|k| !used.contains(&k.as_str())) {
            self.collector.ignore(key);
        }
        let ColumnNames {
            text,
            label,
            prompt,
            completion,
            messages,
        } = self.columns;
        Some(match kind {
            Kind::Completion => {
                let prompt = self.string(line, object, prompt);
                let completion = self.string(line, object, completion);
                Row::Completion {
                    prompt: prompt?,
                    completion: completion?,
                }
            }
            Kind::Class => {
                let text = self.string(line, object, text);
                let label = self.label(line, object, label);
                Row::Class {
                    text: text?,
                    label: label?,
                }
            }
            Kind::Chat => Row::Chat {
                messages: self.messages(line, object, messages)?,
            },
        })
    }

    fn string(&mut self, line: u64, object: &Map<String, Value>, field: &str) -> Option<String> {
        let reason = match object.get(field) {
            Some(Value::String(text)) => return Some(text.clone()),
            None | Some(Value::Null) => {
                self.collector
                    .error(line, field, DataRule::MissingField, "is missing");
                return None;
            }
            Some(Value::Array(_)) => {
                "is a list; a conversation goes in one field 'messages'".to_owned()
            }
            Some(other) => format!("is {}, expected a string", type_of(other)),
        };
        self.collector
            .error(line, field, DataRule::FieldType, reason);
        None
    }

    /// A label may be a string, a whole number or a boolean, as long as all are the same.
    fn label(&mut self, line: u64, object: &Map<String, Value>, field: &str) -> Option<String> {
        let (kind, label) = match object.get(field) {
            Some(Value::Number(n)) if !n.is_f64() => ("a number", n.to_string()),
            Some(Value::Bool(b)) => ("a boolean", b.to_string()),
            _ => ("a string", self.string(line, object, field)?),
        };
        let first = *self.label_type.get_or_insert(kind);
        if first != kind {
            let reason = format!("is {kind}, but the first label is {first}; write them alike");
            self.collector
                .error(line, field, DataRule::FieldType, reason);
            return None;
        }
        Some(label)
    }

    fn messages(
        &mut self,
        line: u64,
        object: &Map<String, Value>,
        field: &str,
    ) -> Option<Vec<ChatMessage>> {
        let Some(Value::Array(items)) = object.get(field) else {
            self.collector
                .error(line, field, DataRule::FieldType, "is no list of messages");
            return None;
        };
        // Every bad message of the line is told, so none may end the loop.
        let messages: Vec<Option<ChatMessage>> = items
            .iter()
            .enumerate()
            .map(|(i, item)| self.message(line, &format!("{field}[{i}]"), item))
            .collect();
        messages.into_iter().collect()
    }

    fn message(&mut self, line: u64, field: &str, item: &Value) -> Option<ChatMessage> {
        let Value::Object(object) = item else {
            let reason = format!("is {}, expected a message", type_of(item));
            self.collector
                .error(line, field, DataRule::FieldType, reason);
            return None;
        };
        for (key, _) in object.iter().filter(|(_, v)| !v.is_null()) {
            match key.as_str() {
                "role" | "content" | "weight" => {}
                "tool_calls" | "function_call" | "tool_call_id" => {
                    let field = format!("{field}.{key}");
                    self.collector.error(
                        line,
                        &field,
                        DataRule::Unsupported,
                        "tool calls are not supported in training",
                    );
                    return None;
                }
                _ => self.collector.ignore(&format!("messages[].{key}")),
            }
        }
        let role = self.role(line, field, object.get("role"));
        let content = match object.get("content") {
            Some(Value::String(content)) => Some(content.clone()),
            other => {
                let found = other.map_or("missing", type_of);
                let reason = format!("is {found}, expected a string");
                self.collector.error(
                    line,
                    &format!("{field}.content"),
                    DataRule::FieldType,
                    reason,
                );
                None
            }
        };
        let learn = self.learn(line, field, role?, object.get("weight"))?;
        Some(ChatMessage {
            role: role?,
            content: content?,
            learn,
        })
    }

    fn role(&mut self, line: u64, field: &str, value: Option<&Value>) -> Option<Role> {
        let reason = match value {
            Some(Value::String(role)) => {
                match [Role::System, Role::User, Role::Assistant]
                    .into_iter()
                    .find(|r| r.as_str() == role)
                {
                    Some(role) => return Some(role),
                    None => format!(
                        "is '{}', expected system, user or assistant",
                        role.chars().take(40).collect::<String>()
                    ),
                }
            }
            other => format!(
                "is {}, expected system, user or assistant",
                other.map_or("missing", type_of)
            ),
        };
        self.collector
            .error(line, &format!("{field}.role"), DataRule::Role, reason);
        None
    }

    /// Answers are learned unless their weight is 0; nobody else's words are.
    fn learn(
        &mut self,
        line: u64,
        field: &str,
        role: Role,
        weight: Option<&Value>,
    ) -> Option<bool> {
        let number = match weight {
            None | Some(Value::Null) => return Some(role == Role::Assistant),
            Some(weight) => weight.as_f64(),
        };
        let reason = match (number, role) {
            (Some(0.0), _) => return Some(false),
            (Some(1.0), Role::Assistant) => return Some(true),
            (Some(1.0), _) => "is 1, but only the assistant's messages can be learned".to_owned(),
            _ => "is neither 0 nor 1".to_owned(),
        };
        self.collector
            .error(line, &format!("{field}.weight"), DataRule::Weight, reason);
        None
    }
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn used(kind: Kind, columns: &ColumnNames) -> Vec<&str> {
    match kind {
        Kind::Completion => vec![&columns.prompt, &columns.completion],
        Kind::Class => vec![&columns.text, &columns.label],
        Kind::Chat => vec![&columns.messages],
    }
}

/// What kind of row has these fields. A row that could be of two kinds is refused: which one is meant changes what is learned.
fn kind_of(names: &[&str], columns: &ColumnNames) -> Result<Kind, (DataRule, String)> {
    let has = |name: &String| names.contains(&name.as_str());
    let completion = has(&columns.prompt) || has(&columns.completion);
    let class = has(&columns.text) || has(&columns.label);
    if has(&columns.prompt) && has(&columns.completion) && has(&columns.label) {
        let reason = format!(
            "'{}' beside '{}' and '{}' is feedback on answers, which is not supported; remove or rename it",
            columns.label, columns.prompt, columns.completion
        );
        return Err((DataRule::Unsupported, reason));
    }
    match (has(&columns.messages), completion, class) {
        (true, false, false) => Ok(Kind::Chat),
        (false, true, false) => Ok(Kind::Completion),
        (false, false, true) => Ok(Kind::Class),
        (false, false, false) => {
            let found: String = names.join(", ").chars().take(200).collect();
            let reason = format!(
                "needs {} and {}, or {} and {}, or {} (JSONL only); found: {found}. Other names can be given",
                columns.text, columns.label, columns.prompt, columns.completion, columns.messages
            );
            Err((DataRule::MissingField, reason))
        }
        _ => {
            let reason =
                "has the fields of two kinds of rows; remove those that are not meant".to_owned();
            Err((DataRule::MixedKinds, reason))
        }
    }
}

/// The two columns of a table: their kind, and where they stand.
struct Columns {
    kind: Kind,
    places: [usize; 2],
    width: usize,
}

fn table(
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
        let [first, second] = columns.places.map(|place| fields[place].to_owned());
        let row = match columns.kind {
            Kind::Class => Row::Class {
                text: first,
                label: second,
            },
            _ => Row::Completion {
                prompt: first,
                completion: second,
            },
        };
        collector.add(line, row);
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
    let mut places = [0; 2];
    for (place, name) in places.iter_mut().zip(&names) {
        let mut found = header.iter().enumerate().filter(|(_, h)| *h == name);
        let reason = match (found.next(), found.next()) {
            (Some((at, _)), None) => {
                *place = at;
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
