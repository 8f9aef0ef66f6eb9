//! Files to rows: JSONL line by line, each bad line with its number; a text that is one row as a whole; and what kind a row is.
//!
//! Bytes are untrusted. This file must not know what makes a row good beyond its form.

use serde_json::{Map, Value};

use super::answer::Score;
use super::check::Collector;
use super::table;
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
        Format::Csv => table::read(bytes, b',', columns, limits, &mut collector),
        Format::Tsv => table::read(bytes, b'\t', columns, limits, &mut collector),
        Format::Text => document(bytes, limits, &mut collector),
    }
    collector.finish()
}

/// The whole file is one row.
fn document(bytes: &[u8], limits: &DataLimits, collector: &mut Collector) {
    let limit = limits.max_document_bytes;
    if bytes.len() > limit {
        let reason = format!(
            "the document has {} bytes, limit {limit}; split it in several, one a row",
            bytes.len()
        );
        return collector.error(0, "text", DataRule::Limit, reason);
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => {
            let text = text.to_owned();
            collector.add(1, Row::Text { text });
        }
        Err(e) => {
            let reason = format!("is not UTF-8 from byte {}", e.valid_up_to() + 1);
            collector.error(0, "text", DataRule::Utf8, reason);
        }
    }
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
            // A document may be longer than other rows, and what a line is shows once it is read.
            if self.is_over(
                line,
                text,
                limits.max_line_bytes.max(limits.max_document_bytes),
            ) {
                continue;
            }
            if let Some(object) = self.object(line, text)
                && let Some(row) = self.row(line, &object)
                && !self.is_over(line, text, limits.row_bytes(row.kind()))
            {
                self.collector.add(line, row);
            }
        }
    }

    fn is_over(&mut self, line: u64, text: &[u8], limit: usize) -> bool {
        let over = text.len() > limit;
        if over {
            let reason = format!("has {} bytes, limit {limit}", text.len());
            self.collector.error(line, "", DataRule::Limit, reason);
        }
        over
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
            // Among labelled rows a text alone is a row whose label was forgotten.
            Ok(Kind::Text) => self.collector.labelled().unwrap_or(Kind::Text),
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
            instruction,
            input,
            output,
            labels,
            score,
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
            Kind::Labels => {
                let text = self.string(line, object, text);
                let labels = self.labels(line, object, labels);
                Row::Labels {
                    text: text?,
                    labels: labels?,
                }
            }
            Kind::Score => {
                let text = self.string(line, object, text);
                let score = self.score(line, object, score);
                Row::Score {
                    text: text?,
                    score: score?,
                }
            }
            Kind::Chat => Row::Chat {
                messages: self.messages(line, object, messages)?,
            },
            Kind::Text => Row::Text {
                text: self.string(line, object, text)?,
            },
            Kind::Instruction => {
                let instruction = self.string(line, object, instruction);
                let input = match object.get(input) {
                    None | Some(Value::Null) => Some(String::new()),
                    Some(_) => self.string(line, object, input),
                };
                let output = self.string(line, object, output);
                Row::Instruction {
                    instruction: instruction?,
                    input: input?,
                    output: output?,
                }
            }
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

    /// A list of names, each once; it may be empty.
    fn labels(
        &mut self,
        line: u64,
        object: &Map<String, Value>,
        field: &str,
    ) -> Option<Vec<String>> {
        let reason = match object.get(field) {
            Some(Value::Array(items)) => {
                let names = items.iter().map(|item| item.as_str().map(str::to_owned));
                match names.collect::<Option<Vec<String>>>() {
                    Some(names) => return Some(names),
                    None => "holds something that is no string".to_owned(),
                }
            }
            None => {
                self.collector
                    .error(line, field, DataRule::MissingField, "is missing");
                return None;
            }
            Some(other) => format!("is {}, expected a list of labels", type_of(other)),
        };
        self.collector
            .error(line, field, DataRule::FieldType, reason);
        None
    }

    fn score(&mut self, line: u64, object: &Map<String, Value>, field: &str) -> Option<Score> {
        let (rule, reason) = match object.get(field) {
            None | Some(Value::Null) => (DataRule::MissingField, "is missing".to_owned()),
            Some(value) => match value.as_f64().map(Score::new) {
                Some(Ok(score)) => return Some(score),
                Some(Err(reason)) => (DataRule::Limit, reason),
                None => {
                    let reason = format!("is {}, expected a number", type_of(value));
                    (DataRule::FieldType, reason)
                }
            },
        };
        self.collector.error(line, field, rule, reason);
        None
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

    /// Weight 0 is for every message; weight 1 for answers alone, because it would promise that the words of others are learned.
    fn learn(
        &mut self,
        line: u64,
        field: &str,
        role: Role,
        weight: Option<&Value>,
    ) -> Option<bool> {
        let number = match weight {
            None | Some(Value::Null) => return Some(true),
            Some(weight) => weight.as_f64(),
        };
        let reason = match (number, role) {
            (Some(0.0), _) => return Some(false),
            (Some(1.0), Role::Assistant) => return Some(true),
            (Some(1.0), _) => {
                "is 1, but only the assistant's messages have one; to learn every turn, train on all"
                    .to_owned()
            }
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

pub(super) fn used(kind: Kind, columns: &ColumnNames) -> Vec<&str> {
    match kind {
        Kind::Completion => vec![&columns.prompt, &columns.completion],
        Kind::Class => vec![&columns.text, &columns.label],
        Kind::Labels => vec![&columns.text, &columns.labels],
        Kind::Score => vec![&columns.text, &columns.score],
        Kind::Chat => vec![&columns.messages],
        Kind::Text => vec![&columns.text],
        Kind::Instruction => vec![&columns.instruction, &columns.input, &columns.output],
    }
}

/// What kind of row has these fields. A row that could be of two kinds is refused: which one is meant changes what is learned.
pub(super) fn kind_of(names: &[&str], columns: &ColumnNames) -> Result<Kind, (DataRule, String)> {
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
    let instruction = has(&columns.instruction);
    match (has(&columns.messages), completion, class, instruction) {
        (true, false, false, false) => Ok(Kind::Chat),
        (false, true, false, false) => Ok(Kind::Completion),
        (false, false, true, false) => labelled(&has, columns),
        (false, false, false, true) => Ok(Kind::Instruction),
        (false, false, false, false) => {
            let found: String = names.join(", ").chars().take(200).collect();
            let ColumnNames {
                text,
                label,
                prompt,
                completion,
                messages,
                instruction,
                output,
                labels,
                score,
                ..
            } = columns;
            let reason = format!(
                "needs {text} and {label} ({labels} for several, {score} for a number), or {text} alone, or {prompt} and {completion}, or {instruction} and {output}, \
                 or {messages} (JSONL only); found: {found}. Other names can be given"
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

/// What a text's answer is: one label, several, a number, or none, which makes it raw text. A field of numbers beside a label is
/// ignored, as any other that is not used.
fn labelled(
    has: &dyn Fn(&String) -> bool,
    columns: &ColumnNames,
) -> Result<Kind, (DataRule, String)> {
    match (
        has(&columns.label),
        has(&columns.labels),
        has(&columns.score),
    ) {
        (true, false, _) => Ok(Kind::Class),
        (false, true, false) => Ok(Kind::Labels),
        (false, false, true) => Ok(Kind::Score),
        (false, false, false) => Ok(Kind::Text),
        _ => {
            let ColumnNames {
                label,
                labels,
                score,
                ..
            } = columns;
            let reason = format!(
                "has two of {label}, {labels} and {score}, so that what is to be learned is not plain; remove one"
            );
            Err((DataRule::MixedKinds, reason))
        }
    }
}
