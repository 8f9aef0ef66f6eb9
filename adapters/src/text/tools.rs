//! Tools that a chat may call: what is shown to the template, and in which form a model writes its calls. A template
//! decides both; nothing is shown to a model that its template does not render.
//!
//! Knows no request and runs no tool. A name is a plain word, so that neither a template nor a grammar can be made to
//! write more than a name through it.

use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

/// Longest name or id of a call, in bytes: what OpenAI's clients send.
pub const MAX_NAME_BYTES: usize = 64;

/// A function that the model may ask its caller to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tool {
    /// A plain word: see [`is_plain_name`].
    pub name: String,
    /// What it does, for the model.
    pub description: String,
    /// A JSON schema of its arguments, an object.
    pub parameters: Value,
}

/// A call that the model has asked for, in a conversation's earlier turns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// What the tool's answer refers to; may be empty.
    pub id: String,
    /// The tool.
    pub name: String,
    /// Its arguments by name.
    pub arguments: Map<String, Value>,
}

/// How a family of models writes its calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// Hermes, Qwen 2.5, Qwen 3, SmolLM 3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number, text between.
    Hermes,
    /// Llama 3.1 and later: the whole answer is `{"name": ..., "parameters": {...}}`.
    Llama3,
    /// Mistral: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`.
    Mistral,
}

/// Why a template cannot be used with tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoTools {
    /// It never reads `tools`.
    #[error("its chat template does not render tool definitions (it never reads `tools`)")]
    NotRendered,
    /// It writes calls in a way that is not known here.
    #[error(
        "its chat template writes tool calls in none of the known forms (<tool_call> JSON, Llama 3 JSON, [TOOL_CALLS] JSON)"
    )]
    UnknownForm,
}

/// Letters, digits, `_`, `-` and `.`, up to [`MAX_NAME_BYTES`].
pub fn is_plain_name(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
}

// === impl ToolFormat ===

impl ToolFormat {
    /// Reads off a template's text how calls are written.
    ///
    /// # Errors
    /// What the template lacks.
    pub fn of(jinja: &str) -> Result<Self, NoTools> {
        let has = |part: &str| jinja.contains(part);
        if !names_tools(jinja) {
            return Err(NoTools::NotRendered);
        }
        // Relatives of these forms that are no JSON: Mistral's with [ARGS], Qwen 3 Coder's and GLM's with tags.
        if has("[ARGS]") || has("<function=") || has("<arg_key>") {
            return Err(NoTools::UnknownForm);
        }
        if has("[TOOL_CALLS]") {
            Ok(ToolFormat::Mistral)
        } else if has("<tool_call>") {
            Ok(ToolFormat::Hermes)
        } else if has("\"parameters\": ") || has("\"parameters\":") {
            Ok(ToolFormat::Llama3)
        } else {
            Err(NoTools::UnknownForm)
        }
    }

    /// What stands before a call, and after it where anything does.
    pub fn marks(self) -> (&'static str, Option<&'static str>) {
        match self {
            ToolFormat::Hermes => ("<tool_call>", Some("</tool_call>")),
            ToolFormat::Llama3 => ("<|python_tag|>", None),
            ToolFormat::Mistral => ("[TOOL_CALLS]", None),
        }
    }

    /// What the arguments are called.
    pub fn arguments_key(self) -> &'static str {
        match self {
            ToolFormat::Hermes | ToolFormat::Mistral => "arguments",
            ToolFormat::Llama3 => "parameters",
        }
    }
}

/// Whether the word `tools` stands inside a Jinja tag.
fn names_tools(jinja: &str) -> bool {
    let word = |character: char| character.is_alphanumeric() || character == '_';
    jinja.split('{').skip(1).any(|after| {
        let Some(tag) = after.strip_prefix(['%', '{']).or(Some(after)) else {
            return false;
        };
        let inner = tag.split("%}").next().unwrap_or(tag);
        inner.match_indices("tools").any(|(at, found)| {
            !inner[..at].chars().next_back().is_some_and(word)
                && !inner[at + found.len()..].chars().next().is_some_and(word)
        })
    })
}

// === what a template sees: the shapes of transformers' apply_chat_template ===

impl Serialize for Tool {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        json!({"type": "function", "function": {
            "name": self.name, "description": self.description, "parameters": self.parameters}})
        .serialize(serializer)
    }
}

impl Serialize for ToolCall {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let function = json!({"name": self.name, "arguments": self.arguments});
        let mut call = Map::new();
        if !self.id.is_empty() {
            call.insert("id".to_owned(), self.id.clone().into());
        }
        call.insert("type".to_owned(), "function".into());
        call.insert("function".to_owned(), function);
        call.serialize(serializer)
    }
}

// === strings inside ===

impl Tool {
    /// The same with `change` applied to every text that the request wrote.
    pub(super) fn map_texts(&self, change: &impl Fn(&str) -> String) -> Self {
        Tool {
            name: self.name.clone(),
            description: change(&self.description),
            parameters: map_value(&self.parameters, change),
        }
    }
}

impl ToolCall {
    /// As [`Tool::map_texts`].
    pub(super) fn map_texts(&self, change: &impl Fn(&str) -> String) -> Self {
        ToolCall {
            id: self.id.clone(),
            name: self.name.clone(),
            arguments: map_fields(&self.arguments, change),
        }
    }
}

fn map_fields(fields: &Map<String, Value>, change: &impl Fn(&str) -> String) -> Map<String, Value> {
    fields
        .iter()
        .map(|(key, value)| (change(key), map_value(value, change)))
        .collect()
}

fn map_value(value: &Value, change: &impl Fn(&str) -> String) -> Value {
    match value {
        Value::String(text) => Value::String(change(text)),
        Value::Array(items) => items.iter().map(|item| map_value(item, change)).collect(),
        Value::Object(fields) => Value::Object(map_fields(fields, change)),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_is_read_off_the_template() {
        let cases = [
            (
                "{% for m in messages %}{{ m.content }}{% endfor %}",
                Err(NoTools::NotRendered),
            ),
            (
                "no tools here {% if messages %}x{% endif %}",
                Err(NoTools::NotRendered),
            ),
            (
                "{% if my_tools %}<tool_call>{% endif %}",
                Err(NoTools::NotRendered),
            ),
            ("{% if tools %}x{% endif %}", Err(NoTools::UnknownForm)),
            (
                "{%- if tools %}<tool_call>\n{\"name\": <name>}{% endif %}",
                Ok(ToolFormat::Hermes),
            ),
            (
                "{% for t in tools %}{{ t }}{% endfor %}<tool_call>\n<function=x>",
                Err(NoTools::UnknownForm),
            ),
            (
                "{%- if tools is not none %}{{ '[TOOL_CALLS] [' }}{% endif %}",
                Ok(ToolFormat::Mistral),
            ),
            (
                "{%- if tools is not none %}{{ '{\"name\": ' + '\"parameters\": ' }}{% endif %}",
                Ok(ToolFormat::Llama3),
            ),
        ];
        for (jinja, expected) in cases {
            assert_eq!(ToolFormat::of(jinja), expected, "{jinja}");
        }
    }

    #[test]
    fn names_are_plain() {
        for good in ["get_weather", "a", "ns.tool-2"] {
            assert!(is_plain_name(good));
        }
        let long = "x".repeat(MAX_NAME_BYTES + 1);
        for bad in ["", "a b", "a\"", "é", "<|im_end|>", "a\n", long.as_str()] {
            assert!(!is_plain_name(bad), "{bad}");
        }
    }
}
