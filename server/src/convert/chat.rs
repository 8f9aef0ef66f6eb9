//! A chat on its way in: messages, the tools that it offers and which of them must be called. Names and ids are plain
//! words here, arguments and schemas are JSON, so that what reaches a template has a known shape.

use std::collections::HashMap;

use espalier_adapters::text::tools::{MAX_NAME_BYTES, is_plain_name};
use espalier_adapters::text::{Message, Tool, ToolCall};
use espalier_proto::v1;
use serde_json::{Map, Value, json};

use super::Faults;
use super::request::unknown_enum;
use crate::config::Limits;
use crate::status::Refusal;

/// Whether the model calls tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Calls {
    /// As it likes.
    Free,
    /// The answer is one call of one of the tools.
    Required,
}

/// The tools of a chat that has any.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Offer {
    pub(crate) tools: Vec<Tool>,
    pub(crate) calls: Calls,
    /// Those that the answer may call: all, or the one that the request names.
    pub(crate) callable: Vec<usize>,
}

/// A conversation. Roles become the words that chat templates know.
pub(crate) fn messages(
    messages: Vec<v1::ChatMessage>,
    limits: &Limits,
) -> Result<Vec<Message>, Refusal> {
    let mut faults = Faults::default();
    if messages.is_empty() {
        faults.add("messages", "is empty; at least one message is needed");
    }
    faults.limit("messages", messages.len(), limits.max_messages, "messages");
    let call = |call: &v1::ToolCall| call.name.len() + call.arguments.len();
    let bytes = messages
        .iter()
        .map(|message| message.content.len() + message.tool_calls.iter().map(call).sum::<usize>())
        .sum();
    faults.limit(
        "messages",
        bytes,
        limits.max_prompt_bytes.as_usize(),
        "bytes",
    );
    let mut known = Vec::with_capacity(messages.len().min(limits.max_messages));
    // The tool of every call so far, by the call's id.
    let mut called = HashMap::new();
    for (index, message) in messages.into_iter().enumerate().take(limits.max_messages) {
        let field = format!("messages[{index}]");
        let Some(role) = role(&field, message.role, &mut faults) else {
            continue;
        };
        if !message.tool_calls.is_empty() && role != "assistant" {
            faults.add(
                format!("{field}.tool_calls"),
                "only an assistant's turn has tool calls",
            );
        }
        let tool_calls: Vec<ToolCall> = message
            .tool_calls
            .into_iter()
            .take(limits.max_tools)
            .enumerate()
            .filter_map(|(at, call)| {
                tool_call(&format!("{field}.tool_calls[{at}]"), call, &mut faults)
            })
            .collect();
        let answered = tool_result(&field, role, message.tool_call_id, &called, &mut faults);
        for call in tool_calls.iter().filter(|call| !call.id.is_empty()) {
            called.insert(call.id.clone(), call.name.clone());
        }
        known.push(Message {
            role: role.to_owned(),
            content: message.content,
            tool_calls,
            name: answered.as_ref().and_then(|id| called.get(id).cloned()),
            tool_call_id: answered,
        });
    }
    faults.finish()?;
    Ok(known)
}

fn role(field: &str, number: i32, faults: &mut Faults) -> Option<&'static str> {
    match v1::Role::try_from(number) {
        Ok(v1::Role::System) => Some("system"),
        Ok(v1::Role::User) => Some("user"),
        Ok(v1::Role::Assistant) => Some("assistant"),
        Ok(v1::Role::Tool) => Some("tool"),
        Ok(v1::Role::Unspecified) | Err(_) => {
            faults.add(
                format!("{field}.role"),
                unknown_enum(number, "ROLE_SYSTEM, _USER, _ASSISTANT or _TOOL"),
            );
            None
        }
    }
}

fn tool_call(field: &str, call: v1::ToolCall, faults: &mut Faults) -> Option<ToolCall> {
    let v1::ToolCall {
        id,
        name,
        arguments,
    } = call;
    check_name(&format!("{field}.name"), &name, faults);
    if !id.is_empty() {
        check_name(&format!("{field}.id"), &id, faults);
    }
    match object(&arguments) {
        Ok(arguments) => Some(ToolCall {
            id,
            name,
            arguments,
        }),
        Err(why) => {
            faults.add(format!("{field}.arguments"), why);
            None
        }
    }
}

/// The id of the call that a tool's turn answers to.
fn tool_result(
    field: &str,
    role: &str,
    id: String,
    called: &HashMap<String, String>,
    faults: &mut Faults,
) -> Option<String> {
    let field = format!("{field}.tool_call_id");
    match (role, id.is_empty()) {
        ("tool", true) if !called.is_empty() => {
            faults.add(field, "is empty; name the call that this is the result of");
        }
        ("tool", false) if called.is_empty() => check_name(&field, &id, faults),
        ("tool", false) if !called.contains_key(&id) => {
            faults.add(field, "is the id of no call of an earlier turn");
        }
        (_, true) | ("tool", false) => {}
        (_, false) => faults.add(field, "only a tool's turn has it"),
    }
    (!id.is_empty()).then_some(id)
}

fn check_name(field: &str, name: &str, faults: &mut Faults) {
    if !is_plain_name(name) {
        faults.add(
            field,
            format!(
                "must be 1 to {MAX_NAME_BYTES} letters, digits, '_', '-' or '.', and has {} bytes",
                name.len()
            ),
        );
    }
}

fn object(text: &str) -> Result<Map<String, Value>, String> {
    if text.is_empty() {
        return Ok(Map::new());
    }
    match serde_json::from_str(text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err("is JSON, but no object".to_owned()),
        Err(error) => Err(format!("is not JSON: {error}")),
    }
}

/// The tools that a chat offers.
pub(crate) fn tools(tools: Vec<v1::Tool>, limits: &Limits) -> Result<Vec<Tool>, Refusal> {
    let mut faults = Faults::default();
    faults.limit("tools", tools.len(), limits.max_tools, "tools");
    let bytes = tools
        .iter()
        .map(|tool| tool.description.len() + tool.parameters.len())
        .sum();
    faults.limit("tools", bytes, limits.max_prompt_bytes.as_usize(), "bytes");
    let mut known: Vec<Tool> = Vec::new();
    for (index, tool) in tools.into_iter().enumerate().take(limits.max_tools) {
        let field = format!("tools[{index}]");
        check_name(&format!("{field}.name"), &tool.name, &mut faults);
        if known.iter().any(|other| other.name == tool.name) {
            faults.add(format!("{field}.name"), "is named twice");
        }
        let parameters = match object(&tool.parameters) {
            Ok(schema) if schema.is_empty() => json!({"type": "object", "properties": {}}),
            Ok(schema) => {
                if schema.get("type").is_none_or(|kind| kind != "object") {
                    faults.add(
                        format!("{field}.parameters"),
                        "is no schema of an object: its \"type\" must be \"object\"",
                    );
                }
                Value::Object(schema)
            }
            Err(why) => {
                faults.add(format!("{field}.parameters"), why);
                continue;
            }
        };
        known.push(Tool {
            name: tool.name,
            description: tool.description,
            parameters,
        });
    }
    faults.finish()?;
    Ok(known)
}

/// What a chat offers and demands; `None` without tools, or with tools that it leaves out.
pub(crate) fn offer(
    tools: Vec<v1::Tool>,
    choice: Option<v1::ToolChoice>,
    limits: &Limits,
) -> Result<Option<Offer>, Refusal> {
    use v1::tool_choice::Choice;
    let tools = self::tools(tools, limits)?;
    let choice = choice.and_then(|choice| choice.choice);
    let all = (0..tools.len()).collect();
    let (calls, callable): (_, Vec<usize>) = match choice {
        None => (Calls::Free, all),
        Some(Choice::Mode(number)) => match v1::ToolChoiceMode::try_from(number) {
            Ok(v1::ToolChoiceMode::Unspecified | v1::ToolChoiceMode::Auto) => (Calls::Free, all),
            Ok(v1::ToolChoiceMode::None) => return Ok(None),
            Ok(v1::ToolChoiceMode::Required) => (Calls::Required, all),
            Err(_) => {
                return Err(Refusal::invalid_field(
                    "tool_choice.mode",
                    unknown_enum(number, "TOOL_CHOICE_MODE_AUTO, _NONE or _REQUIRED"),
                ));
            }
        },
        Some(Choice::Tool(name)) => match tools.iter().position(|tool| tool.name == name) {
            Some(index) => (Calls::Required, vec![index]),
            None => {
                return Err(Refusal::invalid_field(
                    "tool_choice.tool",
                    "is none of the chat's tools",
                ));
            }
        },
    };
    if tools.is_empty() {
        return match calls {
            Calls::Free => Ok(None),
            Calls::Required => Err(Refusal::invalid_field(
                "tools",
                "is empty, but tool_choice requires a call",
            )),
        };
    }
    Ok(Some(Offer {
        tools,
        calls,
        callable,
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;
    use crate::config::Config;

    fn limits() -> Limits {
        Config::from_pairs(&[]).unwrap().limits
    }

    fn turn(role: v1::Role) -> v1::ChatMessage {
        v1::ChatMessage {
            role: role.into(),
            content: "x".to_owned(),
            ..Default::default()
        }
    }

    fn call(id: &str, arguments: &str) -> v1::ToolCall {
        v1::ToolCall {
            id: id.to_owned(),
            name: "add".to_owned(),
            arguments: arguments.to_owned(),
        }
    }

    fn asked(calls: Vec<v1::ToolCall>) -> v1::ChatMessage {
        v1::ChatMessage {
            tool_calls: calls,
            ..turn(v1::Role::Assistant)
        }
    }

    fn result(id: &str) -> v1::ChatMessage {
        v1::ChatMessage {
            tool_call_id: id.to_owned(),
            ..turn(v1::Role::Tool)
        }
    }

    #[test]
    fn a_result_names_its_tool() {
        let chat = vec![
            turn(v1::Role::User),
            asked(vec![call("a1", "{\"b\": 1}")]),
            result("a1"),
        ];
        let found = messages(chat, &limits()).unwrap();
        assert_eq!(found[1].tool_calls[0].arguments["b"], 1);
        assert_eq!(found[2].name.as_deref(), Some("add"));
        assert_eq!(found[2].tool_call_id.as_deref(), Some("a1"));
    }

    #[test]
    fn turns_that_do_not_fit_are_refused() {
        let user = || turn(v1::Role::User);
        let mut wrong = user();
        wrong.tool_calls = vec![call("a", "{}")];
        let mut answered = user();
        answered.tool_call_id = "a".to_owned();
        let cases = [
            (vec![wrong], "messages[0].tool_calls"),
            (vec![answered], "messages[0].tool_call_id"),
            (
                vec![asked(vec![call("a", "[1]")])],
                "messages[0].tool_calls[0].arguments",
            ),
            (
                vec![asked(vec![call("a", "{")])],
                "messages[0].tool_calls[0].arguments",
            ),
            (
                vec![asked(vec![call("<|im_end|>", "{}")])],
                "messages[0].tool_calls[0].id",
            ),
            (
                vec![asked(vec![call("a", "{}")]), result("b")],
                "messages[1].tool_call_id",
            ),
            (
                vec![asked(vec![call("a", "{}")]), result("")],
                "messages[1].tool_call_id",
            ),
        ];
        for (chat, field) in cases {
            let refusal = tonic::Status::from(messages(chat, &limits()).unwrap_err());
            assert!(
                refusal.message().contains(field),
                "{field}: {}",
                refusal.message()
            );
        }
    }

    #[test]
    fn an_offer_knows_what_may_be_called() {
        let tool = |name: &str, parameters: &str| v1::Tool {
            name: name.to_owned(),
            description: String::new(),
            parameters: parameters.to_owned(),
        };
        let two = || vec![tool("a", ""), tool("b", "{\"type\": \"object\"}")];
        let choose = |choice| {
            Some(v1::ToolChoice {
                choice: Some(choice),
            })
        };
        let mode = |mode: v1::ToolChoiceMode| choose(v1::tool_choice::Choice::Mode(mode.into()));
        let named = |name: &str| choose(v1::tool_choice::Choice::Tool(name.to_owned()));
        let offered = |choice| {
            offer(two(), choice, &limits())
                .unwrap()
                .map(|o| (o.calls, o.callable))
        };
        assert_eq!(offered(None), Some((Calls::Free, vec![0, 1])));
        assert_eq!(
            offered(mode(v1::ToolChoiceMode::Required)),
            Some((Calls::Required, vec![0, 1]))
        );
        assert_eq!(offered(named("b")), Some((Calls::Required, vec![1])));
        assert_eq!(offered(mode(v1::ToolChoiceMode::None)), None);
        let refused =
            |tools, choice| tonic::Status::from(offer(tools, choice, &limits()).unwrap_err());
        for (tools, choice, field) in [
            (two(), named("c"), "tool_choice.tool"),
            (vec![], mode(v1::ToolChoiceMode::Required), "tools"),
            (vec![tool("a b", "")], None, "tools[0].name"),
            (vec![tool("a", ""), tool("a", "")], None, "tools[1].name"),
            (
                vec![tool("a", "{\"type\": \"string\"}")],
                None,
                "tools[0].parameters",
            ),
            (vec![tool("a", "nope")], None, "tools[0].parameters"),
        ] {
            let status = refused(tools, choice);
            assert!(
                status.message().contains(field),
                "{field}: {}",
                status.message()
            );
        }
    }
}
