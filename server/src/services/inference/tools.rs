//! Tools of one chat: the grammar of a call that must come, and the calls found in what the model writes. What the marks
//! of a call are to the tokenizer (control tokens, which leave no text, or plain text) is known here and nowhere else.

use std::collections::HashMap;

use espalier_adapters::text::{CallReader, Read, Tokenizer, ToolFormat, WrittenCall};
use espalier_engine::constraint::{ConstraintSource, spaced_schema};
use espalier_engine::request::Delta;
use espalier_proto::v1;
use rand::Rng;
use rand::distr::Alphanumeric;
use serde_json::Value;

use crate::convert::chat::{Calls, Offer};

/// Length of a call's id: Mistral's templates insist on nine letters and digits.
const ID_LENGTH: usize = 9;

/// How the answers to one chat are read.
#[derive(Debug, Clone)]
pub(super) struct ToolUse {
    format: ToolFormat,
    names: Vec<String>,
    /// Control tokens that mark calls, with the text that a reader knows them by.
    marks: Vec<(u32, &'static str)>,
}

/// The readers of all candidates.
#[derive(Debug)]
pub(super) struct Readers {
    tools: Option<ToolUse>,
    open: HashMap<usize, CallReader>,
}

// === impl ToolUse ===

impl ToolUse {
    pub(super) fn new(format: ToolFormat, offer: &Offer, tokenizer: &Tokenizer) -> Self {
        let (open, close) = format.marks();
        let marks = [Some(open), close].into_iter().flatten();
        let control = |mark: &'static str| {
            let id = tokenizer.token_id(mark)?;
            tokenizer.is_control(id).then_some((id, mark))
        };
        ToolUse {
            format,
            names: offer.tools.iter().map(|tool| tool.name.clone()).collect(),
            marks: marks.filter_map(control).collect(),
        }
    }

    /// The grammar of the one call that must come, if one must.
    pub(super) fn required(&self, offer: &Offer) -> Option<ConstraintSource> {
        if offer.calls != Calls::Required {
            return None;
        }
        let mark = |mark: &str| match self.marks.iter().find(|(_, text)| *text == mark) {
            Some((id, _)) => format!("<[{id}]>"),
            None => quoted(mark),
        };
        let (open, close) = self.format.marks();
        let (before, after) = match self.format {
            ToolFormat::Hermes => {
                let close = close.map(mark).unwrap_or_default();
                (
                    format!("{} \"\\n\"", mark(open)),
                    format!("\"\\n\" {close}"),
                )
            }
            ToolFormat::Llama3 => (String::new(), String::new()),
            ToolFormat::Mistral => (format!("{} \" [\"", mark(open)), "\"]\"".to_owned()),
        };
        let key = self.format.arguments_key();
        let mut lines = Vec::new();
        let mut calls = Vec::new();
        for &index in &offer.callable {
            let tool = &offer.tools[index];
            let head = quoted(&format!("{{\"name\": \"{}\", \"{key}\": ", tool.name));
            lines.push(format!("call{index}: {head} arguments{index} \"}}\""));
            let schema = spaced_schema(tool.parameters.clone());
            lines.push(format!("arguments{index}: %json {schema}"));
            calls.push(format!("call{index}"));
        }
        let start = format!("start: {before} ({}) {after}", calls.join(" | "));
        Some(ConstraintSource::Grammar(
            [vec![start], lines].concat().join("\n"),
        ))
    }
}

/// A text as the grammar's string, which is JSON's.
fn quoted(text: &str) -> String {
    Value::String(text.to_owned()).to_string()
}

// === impl Readers ===

impl Readers {
    /// Without tools every text passes as it is.
    pub(super) fn new(tools: Option<ToolUse>) -> Self {
        Readers {
            tools,
            open: HashMap::new(),
        }
    }

    /// Takes a delta's text and leaves in it what belongs to no call; gives the calls that became whole.
    pub(super) fn read(&mut self, delta: &mut Delta) -> Vec<v1::ToolCall> {
        let Some(tools) = &self.tools else {
            return Vec::new();
        };
        let reader = self
            .open
            .entry(delta.candidate)
            .or_insert_with(|| CallReader::new(tools.format, tools.names.clone()));
        let mut piece = String::new();
        for token in &delta.tokens {
            let mark = tools.marks.iter().find(|(id, _)| id == token);
            piece.push_str(mark.map_or("", |(_, text)| text));
        }
        // A control token has no text, so what came with it was written before.
        piece.insert_str(0, &delta.text);
        let Read { text, calls } = reader.push(&piece);
        delta.text = text;
        calls.into_iter().map(numbered).collect()
    }

    /// What a candidate's end leaves: text that was held back, and calls that end with the answer.
    pub(super) fn finish(&mut self, candidate: usize) -> (String, Vec<v1::ToolCall>) {
        let read = self
            .open
            .remove(&candidate)
            .map(|mut reader| reader.finish());
        let Read { text, calls } = read.unwrap_or_default();
        (text, calls.into_iter().map(numbered).collect())
    }
}

/// A call with an id for its result to name.
fn numbered(call: WrittenCall) -> v1::ToolCall {
    let id = rand::rng()
        .sample_iter(Alphanumeric)
        .take(ID_LENGTH)
        .map(char::from)
        .collect();
    v1::ToolCall {
        id,
        name: call.name,
        arguments: Value::Object(call.arguments).to_string(),
    }
}
