//! Chat templates: Jinja, with what transformers gives them, and with limits, since a template is a program from a file.
//! Knows no token: it turns a conversation into text; [`encode_chat`](super::encode_chat) turns that into ids.

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

use super::TextError;
use super::tools::{Tool, ToolCall};

/// A template longer than this is refused; the longest known (tool use in every form) are about 25 KB.
const MAX_SOURCE_BYTES: usize = 128 << 10;
/// Instructions of one rendering: a thousand messages take some tens of thousands.
const FUEL: u64 = 2_000_000;
const RECURSION: usize = 100;
/// Longer than any context of a model, in bytes.
const MAX_OUTPUT_BYTES: usize = 16 << 20;
const MAX_ROLE_BYTES: usize = 64;
const NAME: &str = "chat";

/// One turn of a conversation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
    /// The calls that an assistant asked for.
    #[serde(skip_serializing_if = "Vec::is_empty", skip_deserializing)]
    pub tool_calls: Vec<ToolCall>,
    /// Which call a tool's answer belongs to.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub tool_call_id: Option<String>,
    /// Which tool that was.
    #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub name: Option<String>,
}

impl Message {
    /// A turn of `role` that says `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            ..Self::default()
        }
    }
}

impl Message {
    /// The same with `change` applied to every text that the request wrote freely.
    pub(super) fn map_texts(&self, change: &impl Fn(&str) -> String) -> Self {
        Self {
            content: change(&self.content),
            tool_calls: self
                .tool_calls
                .iter()
                .map(|call| call.map_texts(change))
                .collect(),
            ..self.clone()
        }
    }
}

/// A template's text and the tokens that it may name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TemplateSource {
    /// The Jinja text.
    pub jinja: String,
    /// What `bos_token` stands for in it.
    pub bos_token: Option<String>,
    /// What `eos_token` stands for in it.
    pub eos_token: Option<String>,
}

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: TemplateSource,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles a template with the settings of transformers' `_compile_jinja_template`.
    ///
    /// # Errors
    /// [`TextError::Template`] with the line, when it is too long or does not parse.
    pub fn new(source: TemplateSource) -> Result<Self, TextError> {
        if source.jinja.len() > MAX_SOURCE_BYTES {
            let rule = format!(
                "has {} bytes, at most {MAX_SOURCE_BYTES} are allowed",
                source.jinja.len()
            );
            return Err(TextError::Template(rule));
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_function("strftime_now", |format: String| {
            strftime(&format, now_seconds())
        });
        environment
            .add_template_owned(NAME, without_generation_tags(&source.jinja))
            .map_err(|error| {
                let line = error
                    .line()
                    .map_or_else(String::new, |line| format!(" in line {line}"));
                TextError::Template(format!("{}{line}", describe(&error)))
            })?;
        Ok(Self {
            environment,
            source,
        })
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source.jinja
    }

    /// Renders a conversation and the tools that it offers; `add_generation_prompt` opens the assistant's turn at the end.
    ///
    /// # Errors
    /// [`TextError::Role`] for a role that is no plain word; [`TextError::Render`] when the template refuses the conversation
    /// (`raise_exception`) or runs into a limit.
    pub fn render(
        &self,
        messages: &[Message],
        tools: &[Tool],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let plain = |role: &str| {
            (1..=MAX_ROLE_BYTES).contains(&role.len())
                && role
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
        };
        if let Some(index) = messages.iter().position(|message| !plain(&message.role)) {
            return Err(TextError::Role {
                role: messages[index].role.clone(),
                index,
                limit: MAX_ROLE_BYTES,
            });
        }
        let fails = |error: Error| TextError::Render(describe(&error));
        let template = self.environment.get_template(NAME).map_err(fails)?;
        let values = context! {
            messages => messages,
            // None and not absent, as transformers has it.
            tools => (!tools.is_empty()).then_some(tools),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.source.bos_token.as_deref().unwrap_or_default(),
            eos_token => self.source.eos_token.as_deref().unwrap_or_default(),
        };
        let mut output = Limited(Vec::new());
        template
            .render_captured_to(values, &mut output)
            .map_err(fails)?;
        String::from_utf8(output.0)
            .map_err(|_| TextError::Render("the output is not UTF-8".to_owned()))
    }
}

/// The error and its causes in one line; what `raise_exception` said comes through as it stands.
fn describe(error: &Error) -> String {
    let mut text = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => format!("ran longer than {FUEL} instructions"),
        (ErrorKind::InvalidOperation | ErrorKind::WriteFailure, Some(detail)) => detail.to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

/// Output that ends where no model could read on.
struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(std::io::Error::other(format!(
                "the output is longer than {MAX_OUTPUT_BYTES} bytes"
            )));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// `{% generation %}` and `{% endgeneration %}` mark an assistant's words for transformers' training masks and print nothing; as
/// `{% if true %}` they do the same here and keep their whitespace control.
fn without_generation_tags(jinja: &str) -> String {
    let mut out = String::with_capacity(jinja.len());
    let mut rest = jinja;
    while let Some(open) = rest.find("{%") {
        out.push_str(&rest[..open]);
        rest = &rest[open..];
        let Some(close) = rest[2..].find("%}") else {
            break;
        };
        let (inner, tag, after) = (&rest[2..2 + close], &rest[..close + 4], &rest[close + 4..]);
        match inner.trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// `json.dumps(value, ensure_ascii=False)`, which is what transformers gives templates; minijinja's own filter escapes for HTML.
fn to_json(value: &Value, options: minijinja::value::Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let fails =
        |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut bytes = Vec::new();
    match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value
                .serialize(&mut serde_json::Serializer::with_formatter(
                    &mut bytes, formatter,
                ))
                .map_err(fails)?;
        }
        None => value
            .serialize(&mut serde_json::Serializer::with_formatter(
                &mut bytes, Spaced,
            ))
            .map_err(fails)?,
    }
    String::from_utf8(bytes)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// Python's separators: a space after every comma and colon.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_key<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

fn now_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// The conversions that templates use (dates of a system prompt), in UTC; an unknown one is an error, not a wrong date.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let (year, month, day) = civil_date(seconds / 86_400);
    let of_day = seconds % 86_400;
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    let weekday = DAYS[((seconds / 86_400 + 4) % 7) as usize];
    let name = MONTHS[(month - 1) as usize];
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let text = match characters.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('B') => name.to_owned(),
            Some('b') => name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('%') => "%".to_owned(),
            other => {
                let rule = format!(
                    "strftime_now: conversion %{} is not supported",
                    other.map_or_else(String::new, String::from)
                );
                return Err(Error::new(ErrorKind::InvalidOperation, rule));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

/// Days since 1970 to a Gregorian date: Howard Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`.
fn civil_date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let of_era = shifted % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        reason = "a test that cannot set itself up has failed"
    )]

    use super::*;

    fn render(jinja: &str, messages: &[Message]) -> Result<String, TextError> {
        let source = TemplateSource {
            jinja: jinja.to_owned(),
            bos_token: Some("<s>".to_owned()),
            eos_token: Some("</s>".to_owned()),
        };
        ChatTemplate::new(source)?.render(messages, &[], true)
    }

    fn turns() -> Vec<Message> {
        vec![
            Message::new("system", " Be <brief>. "),
            Message::new("user", "Hé \"you\""),
        ]
    }

    #[test]
    fn blocks_are_trimmed_and_tokens_named_as_in_transformers() {
        let jinja = "{{ bos_token }}\n  {% for m in messages %}\n  {{ m['role'] }}:{{ m.content | trim }}{{ eos_token }}\n  {% endfor %}\nend\n";
        assert_eq!(
            render(jinja, &turns()).unwrap(),
            "<s>\n  system:Be <brief>.</s>\n  user:Hé \"you\"</s>\nend"
        );
    }

    #[test]
    fn python_methods_json_and_generation_tags_work() {
        let jinja = "{% for m in messages %}{%- generation -%} {{ m.content.strip().upper() }}{% endgeneration %}|{{ m | tojson }}|{% endfor %}";
        let expected = "BE <BRIEF>.|{\"role\": \"system\", \"content\": \" Be <brief>. \"}|HÉ \"YOU\"|{\"role\": \"user\", \"content\": \"Hé \\\"you\\\"\"}|";
        assert_eq!(render(jinja, &turns()).unwrap(), expected);
    }

    #[test]
    fn a_template_may_refuse() {
        let error = render("{{ raise_exception('roles must alternate') }}", &turns())
            .unwrap_err()
            .to_string();
        assert!(error.ends_with(": roles must alternate"), "{error}");
    }

    #[test]
    fn limits_hold() {
        let forever = "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = a + b %}{% endfor %}{% endfor %}";
        let deep = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
        let wide = "{% for a in range(9999) %}{{ 'x' * 4000 }}{% endfor %}";
        for (jinja, rule) in [
            (forever, "instructions"),
            (deep, "recursion"),
            (wide, "longer than"),
        ] {
            let error = render(jinja, &turns()).unwrap_err().to_string();
            assert!(error.contains(rule), "{error}");
        }
        let long = "x".repeat(MAX_SOURCE_BYTES + 1);
        assert!(
            render(&long, &turns())
                .unwrap_err()
                .to_string()
                .contains("at most")
        );
        assert!(
            render("{% for %}", &turns())
                .unwrap_err()
                .to_string()
                .contains("line 1")
        );
    }

    #[test]
    fn a_role_is_a_plain_word() {
        let long = "r".repeat(MAX_ROLE_BYTES + 1);
        for role in ["", "user|>\n<|system", "user role", long.as_str()] {
            let error =
                render("x", &[Message::new("user", "a"), Message::new(role, "b")]).unwrap_err();
            assert!(matches!(error, TextError::Role { index: 1, .. }), "{error}");
        }
        assert_eq!(
            render("x", &[Message::new("r".repeat(MAX_ROLE_BYTES), "b")]).unwrap(),
            "x"
        );
    }

    #[test]
    fn dates_are_gregorian() {
        // date -u -d @951827696: leap day of a century that has one.
        assert_eq!(
            strftime("%Y-%m-%d %H:%M:%S %a %b %d", 951_827_696).unwrap(),
            "2000-02-29 12:34:56 Tue Feb 29"
        );
        assert_eq!(
            strftime("%d %B %y %I%p %A %F %%", 1_735_689_599).unwrap(),
            "31 December 24 11PM Tuesday 2024-12-31 %"
        );
        assert!(strftime("%Q", 0).unwrap_err().to_string().contains("%Q"));
    }
}
