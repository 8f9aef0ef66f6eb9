//! Tool calls in a model's answer, found while it is written: text outside of calls passes on, a call is held back until
//! it is whole. What looks like a call and is none (broken JSON, a tool that nobody offered) stays text, as it was written.

use serde_json::{Map, Value};

use super::tools::ToolFormat;

/// Reads one answer.
#[derive(Debug, Clone)]
pub struct CallReader {
    format: ToolFormat,
    /// The tools that were offered.
    names: Vec<String>,
    /// Text whose meaning is not known yet.
    held: String,
    place: Place,
    found: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nothing but space has come.
    Start,
    /// Between calls.
    Text,
    /// After an opening mark.
    Call,
}

/// What a piece of an answer brought.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Read {
    /// Text that belongs to no call.
    pub text: String,
    /// Calls that became whole.
    pub calls: Vec<WrittenCall>,
}

/// A call as the model wrote it.
#[derive(Debug, Clone, PartialEq)]
pub struct WrittenCall {
    /// The tool.
    pub name: String,
    /// Its arguments by name.
    pub arguments: Map<String, Value>,
}

// === impl CallReader ===

impl CallReader {
    /// A reader for an answer to a chat that offered the tools `names`.
    pub fn new(format: ToolFormat, names: Vec<String>) -> Self {
        CallReader {
            format,
            names,
            held: String::new(),
            place: Place::Start,
            found: false,
        }
    }

    /// More of the answer.
    pub fn push(&mut self, piece: &str) -> Read {
        let mut read = Read::default();
        self.held.push_str(piece);
        loop {
            let before = (self.place, self.held.len());
            match self.place {
                Place::Start => self.begin(),
                Place::Text => self.between(&mut read),
                Place::Call => self.inside(piece, &mut read),
            }
            if (self.place, self.held.len()) == before || self.held.is_empty() {
                return read;
            }
        }
    }

    /// The answer is over.
    pub fn finish(&mut self) -> Read {
        let mut read = Read::default();
        let rest = std::mem::take(&mut self.held);
        let (open, _) = self.format.marks();
        match self.place {
            // A call whose closing mark was cut off, or one of a form that has none.
            Place::Call => match self.calls(&rest) {
                Some(calls) => read.calls = calls,
                None if self.format == ToolFormat::Llama3 => read.text = rest,
                None => read.text = format!("{open}{rest}"),
            },
            // Space after a call is the format's and not the answer's.
            _ if self.found && rest.trim().is_empty() => {}
            _ => read.text = rest,
        }
        self.found |= !read.calls.is_empty();
        self.place = Place::Text;
        read
    }

    /// Llama's calls have no mark of their own: the answer is one from its first character, or it is text.
    fn begin(&mut self) {
        let Some(first) = self.held.trim_start().chars().next() else {
            return;
        };
        self.place = match (self.format, first) {
            (ToolFormat::Llama3, '{') => Place::Call,
            _ => Place::Text,
        };
    }

    fn between(&mut self, read: &mut Read) {
        let (open, _) = self.format.marks();
        if let Some(at) = self.held.find(open) {
            read.text.push_str(self.held[..at].trim_end());
            self.held.drain(..at + open.len());
            self.place = Place::Call;
            return;
        }
        // What could begin a mark is held back, and the space before it, which is dropped if a mark it is.
        let partial = (1..open.len())
            .rev()
            .find(|&len| self.held.ends_with(&open[..len]))
            .unwrap_or(0);
        let plain = self.held[..self.held.len() - partial].trim_end().len();
        read.text.extend(self.held.drain(..plain));
    }

    fn inside(&mut self, piece: &str, read: &mut Read) {
        let (open, Some(close)) = self.format.marks() else {
            return;
        };
        // A mark ends in what came last; before that nothing can have changed.
        if !piece.contains('>') {
            return;
        }
        let ends: Vec<usize> = self.held.match_indices(close).map(|(at, _)| at).collect();
        // The mark may stand in an argument, so the first end that makes a call is the end.
        for at in &ends {
            if let Some(calls) = self.calls(&self.held[..*at]) {
                read.calls.extend(calls);
                self.found = true;
                self.held.drain(..at + close.len());
                self.place = Place::Text;
                return;
            }
        }
        // An end without a call and then another beginning: what lies before it is text, marks and all.
        let next = self.held.find(open);
        if let (Some(end), Some(next)) = (ends.first(), next)
            && *end < next
        {
            read.text.push_str(open);
            read.text.push_str(self.held[..next].trim_end());
            self.held.drain(..next);
            self.place = Place::Text;
        }
    }

    /// The calls that a body holds, if it holds nothing else and every one is to a tool that was offered.
    fn calls(&self, body: &str) -> Option<Vec<WrittenCall>> {
        let mut calls = Vec::new();
        for part in values(body)? {
            let parts = match part {
                Value::Array(parts) if self.format == ToolFormat::Mistral => parts,
                other => vec![other],
            };
            for part in parts {
                calls.push(self.call(part)?);
            }
        }
        (!calls.is_empty()).then_some(calls)
    }

    fn call(&self, value: Value) -> Option<WrittenCall> {
        let Value::Object(mut fields) = value else {
            return None;
        };
        let name = fields.get("name")?.as_str()?.to_owned();
        if !self.names.contains(&name) {
            return None;
        }
        // Models mix the two words up; the format's own comes first.
        let keys = [self.format.arguments_key(), "arguments", "parameters"];
        let arguments = keys.into_iter().find_map(|key| fields.remove(key));
        let arguments = match arguments.unwrap_or(Value::Null) {
            Value::Object(arguments) => arguments,
            Value::Null => Map::new(),
            // Some write the arguments as a text of JSON.
            Value::String(text) => serde_json::from_str(&text).ok()?,
            _ => return None,
        };
        Some(WrittenCall { name, arguments })
    }
}

/// JSON values one after the other, with `;` between them as Llama writes it.
fn values(body: &str) -> Option<Vec<Value>> {
    let mut found = Vec::new();
    let mut rest = body.trim();
    while !rest.is_empty() {
        let mut stream = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        found.push(stream.next()?.ok()?);
        rest = rest[stream.byte_offset()..].trim_start();
        rest = rest.strip_prefix(';').unwrap_or(rest).trim_start();
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ToolFormat::{Hermes, Llama3, Mistral};
    use proptest::prelude::*;

    fn reader(format: ToolFormat) -> CallReader {
        CallReader::new(format, vec!["weather".to_owned(), "add".to_owned()])
    }

    /// Text and calls of an answer that comes in these pieces.
    fn read<'a>(
        format: ToolFormat,
        pieces: impl IntoIterator<Item = &'a str>,
    ) -> (String, Vec<String>) {
        let mut reader = reader(format);
        let mut reads: Vec<Read> = pieces.into_iter().map(|piece| reader.push(piece)).collect();
        reads.push(reader.finish());
        let text = reads.iter().map(|read| read.text.as_str()).collect();
        let calls = reads.iter().flat_map(|read| &read.calls);
        let shown =
            |call: &WrittenCall| format!("{}{}", call.name, Value::Object(call.arguments.clone()));
        (text, calls.map(shown).collect())
    }

    const ANSWERS: [(ToolFormat, &str, &str, &[&str]); 18] = [
        (Hermes, "Just text, a < b.", "Just text, a < b.", &[]),
        (
            Hermes,
            "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\"}}\n</tool_call>",
            "",
            &["weather{\"city\":\"Köln\"}"],
        ),
        (
            Hermes,
            "Let me see.\n<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}}</tool_call>\n<tool_call>{\"name\": \"weather\"}</tool_call>\n",
            "Let me see.",
            &["add{\"a\":1}", "weather{}"],
        ),
        (
            Hermes,
            "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": \"</tool_call>\"}}</tool_call> Done.",
            " Done.",
            &["add{\"a\":\"</tool_call>\"}"],
        ),
        (
            Hermes,
            "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 2}}",
            "",
            &["add{\"a\":2}"],
        ),
        (
            Hermes,
            "<tool_call>{\"name\": \"add\", \"argum",
            "<tool_call>{\"name\": \"add\", \"argum",
            &[],
        ),
        (
            Hermes,
            "<tool_call>{\"name\": \"rm\", \"arguments\": {}}</tool_call>",
            "<tool_call>{\"name\": \"rm\", \"arguments\": {}}</tool_call>",
            &[],
        ),
        (
            Hermes,
            "<tool_call>oops</tool_call> then <tool_call>{\"name\":\"add\",\"arguments\":{}}</tool_call>",
            "<tool_call>oops</tool_call> then",
            &["add{}"],
        ),
        (
            Hermes,
            "<tool_call>{\"name\": \"add\", \"arguments\": \"{\\\"a\\\": 3}\"}</tool_call>",
            "",
            &["add{\"a\":3}"],
        ),
        (Hermes, "a <tool_cal", "a <tool_cal", &[]),
        (
            Llama3,
            "{\"name\": \"weather\", \"parameters\": {\"city\": \"Rome\"}}",
            "",
            &["weather{\"city\":\"Rome\"}"],
        ),
        (
            Llama3,
            " {\"name\": \"add\", \"parameters\": {}}; {\"name\": \"add\", \"parameters\": {\"b\": 2}}",
            "",
            &["add{}", "add{\"b\":2}"],
        ),
        (
            Llama3,
            "<|python_tag|>{\"name\": \"add\", \"arguments\": {}}",
            "",
            &["add{}"],
        ),
        (Llama3, "{\"city\": \"Rome\"}", "{\"city\": \"Rome\"}", &[]),
        (
            Llama3,
            "I say {\"name\": \"add\"}",
            "I say {\"name\": \"add\"}",
            &[],
        ),
        (
            Mistral,
            "[TOOL_CALLS] [{\"name\": \"add\", \"arguments\": {\"a\": 1}, \"id\": \"abcdefghi\"}, {\"name\": \"weather\", \"arguments\": {}}]",
            "",
            &["add{\"a\":1}", "weather{}"],
        ),
        (
            Mistral,
            "[TOOL_CALLS] [{\"name\": \"add\", \"argu",
            "[TOOL_CALLS] [{\"name\": \"add\", \"argu",
            &[],
        ),
        (Mistral, "Hello [TOOL_", "Hello [TOOL_", &[]),
    ];

    #[test]
    fn whole_answers() {
        for (format, answer, text, calls) in ANSWERS {
            assert_eq!(
                read(format, [answer]),
                (
                    text.to_owned(),
                    calls.iter().map(|&c| c.to_owned()).collect()
                ),
                "{answer}"
            );
        }
    }

    proptest! {
        /// However an answer is cut, the same comes out; and text of another piece than the first is never lost.
        #[test]
        fn pieces_do_not_matter(which in 0..ANSWERS.len(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12)) {
            let (format, answer, text, calls) = ANSWERS[which];
            let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(answer.len() + 1)).filter(|&at| answer.is_char_boundary(at)).collect();
            places.extend([0, answer.len()]);
            places.sort_unstable();
            let pieces = places.windows(2).map(|pair| &answer[pair[0]..pair[1]]);
            prop_assert_eq!(read(format, pieces), (text.to_owned(), calls.iter().map(|&c| c.to_owned()).collect()));
        }

        /// Without a call the text is the answer, to the last space.
        #[test]
        fn text_without_calls_is_untouched(answer in "[ a\\n<>tool_call/{}\"\\[\\]TOOL_CALLS]{0,80}") {
            for format in [Hermes, Llama3, Mistral] {
                let (text, calls) = read(format, answer.char_indices().map(|(at, c)| &answer[at..at + c.len_utf8()]));
                prop_assert!(calls.is_empty());
                if !answer.contains(format.marks().0) {
                    prop_assert_eq!(&text, &answer);
                }
            }
        }
    }
}
