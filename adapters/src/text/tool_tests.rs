//! Tools through templates of the three families, against strings written by hand; and no text of a tool, a call or a
//! result becomes a control token, however it is spelled.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has failed"
)]

use proptest::prelude::*;
use serde_json::json;

use super::tests::byte_level;
use super::{ChatTemplate, Message, TemplateSource, Tool, ToolCall, ToolFormat, encode_chat};

/// As Qwen 2.5 has it, without its prose.
const HERMES: &str = "{%- if tools %}{{- '<|im_start|>system\nTools:' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}{%- for message in messages %}{%- if message.role == 'assistant' and message.tool_calls %}{{- '<|im_start|>assistant' }}{%- if message.content %}{{- '\n' + message.content }}{%- endif %}{%- for tool_call in message.tool_calls %}{%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}{{- '\n<tool_call>\n{\"name\": \"' + tool_call.name + '\", \"arguments\": ' }}{{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- elif message.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}";

/// As Llama 3.1 has it, with ChatML's control tokens.
const LLAMA3: &str = "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}{%- for message in messages %}{%- if 'tool_calls' in message %}{%- if not message.tool_calls | length == 1 %}{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}{%- set tool_call = message.tool_calls[0].function %}{{- '<|im_start|>assistant\n{\"name\": \"' + tool_call.name + '\", \"parameters\": ' }}{{- tool_call.arguments | tojson }}{{- '}<|im_end|>\n' }}{%- elif message.role == 'tool' or message.role == 'ipython' %}{{- '<|im_start|>ipython\n' }}{%- if message.content is mapping %}{{- message.content | tojson }}{%- else %}{{- message.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>' + message.role + '\n' }}{%- if message.role == 'user' and tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}{%- endif %}{{- message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}";

/// As Mistral 7B Instruct v0.3 has it.
const MISTRAL: &str = "{%- for message in messages %}{%- if message.role == 'user' %}{%- if tools is not none and loop.last %}{{- '[AVAILABLE_TOOLS] [' }}{%- for tool in tools %}{%- set tool = tool.function %}{{- '{\"type\": \"function\", \"function\": {' }}{%- for key, val in tool.items() if key != 'return' %}{%- if val is string %}{{- '\"' + key + '\": \"' + val + '\"' }}{%- else %}{{- '\"' + key + '\": ' + val|tojson }}{%- endif %}{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- '}}' }}{%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' }}{%- endif %}{%- endfor %}{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}{{- '[INST] ' + message.content + '[/INST]' }}{%- elif message.tool_calls is defined and message.tool_calls is not none %}{{- '[TOOL_CALLS] [' }}{%- for tool_call in message.tool_calls %}{%- set out = tool_call.function|tojson %}{{- out[:-1] }}{%- if not tool_call.id is defined or tool_call.id|length != 9 %}{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}{{- ', \"id\": \"' + tool_call.id + '\"}' }}{%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' + eos_token }}{%- endif %}{%- endfor %}{%- elif message.role == 'assistant' %}{{- ' ' + message.content|trim + eos_token }}{%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS] {\"content\": ' + message.content|string + ', ' }}{{- '\"call_id\": \"' + message.tool_call_id + '\"}[/TOOL_RESULTS]' }}{%- endif %}{%- endfor %}";

fn template(jinja: &str) -> ChatTemplate {
    ChatTemplate::new(TemplateSource {
        jinja: jinja.to_owned(),
        bos_token: None,
        eos_token: Some("<|im_end|>".to_owned()),
    })
    .unwrap()
}

fn weather(text: &str) -> Tool {
    Tool {
        name: "weather".to_owned(),
        description: format!("Looks outside. {text}"),
        parameters: json!({"type": "object", "properties": {"city": {"type": "string", "description": text}}, "required": ["city"]}),
    }
}

/// A question, a call and its result, and the next question.
fn conversation(text: &str) -> Vec<Message> {
    let arguments = json!({"city": text}).as_object().unwrap().clone();
    vec![
        Message::new("user", "Köln?"),
        Message {
            role: "assistant".to_owned(),
            tool_calls: vec![ToolCall {
                id: "a1b2c3d4e".to_owned(),
                name: "weather".to_owned(),
                arguments,
            }],
            ..Message::default()
        },
        Message {
            tool_call_id: Some("a1b2c3d4e".to_owned()),
            name: Some("weather".to_owned()),
            ..Message::new("tool", "{\"sky\": \"grey\"}")
        },
        Message::new("user", "And now?"),
    ]
}

const DEFINITION: &str = "{\"type\": \"function\", \"function\": {\"name\": \"weather\", \"description\": \"Looks outside. é\", \"parameters\": {\"type\": \"object\", \"properties\": {\"city\": {\"type\": \"string\", \"description\": \"é\"}}, \"required\": [\"city\"]}}}";

#[test]
fn hermes_renders_as_written() {
    let expected = format!(
        "<|im_start|>system\nTools:\n{DEFINITION}<|im_end|>\n<|im_start|>user\nKöln?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{{\"name\": \"weather\", \"arguments\": {{\"city\": \"K\\\"ln\"}}}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n{{\"sky\": \"grey\"}}\n</tool_response><|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(ToolFormat::of(HERMES), Ok(ToolFormat::Hermes));
    let rendered = template(HERMES).render(&conversation("K\"ln"), &[weather("é")], true);
    assert_eq!(rendered.unwrap(), expected);
    let ids = encode_chat(
        byte_level(),
        &template(HERMES),
        &conversation("K\"ln"),
        &[weather("é")],
        true,
    );
    assert_eq!(ids.unwrap(), byte_level().encode(&expected).unwrap());
}

#[test]
fn llama_renders_as_written() {
    let indented = serde_json::from_str::<serde_json::Value>(DEFINITION).unwrap();
    let mut pretty = Vec::new();
    let four = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut pretty, four);
    serde::Serialize::serialize(&indented, &mut serializer).unwrap();
    let pretty = String::from_utf8(pretty).unwrap();
    let expected = format!(
        "<|im_start|>user\n{pretty}\n\nKöln?<|im_end|>\n<|im_start|>assistant\n{{\"name\": \"weather\", \"parameters\": {{\"city\": \"Köln\"}}}}<|im_end|>\n<|im_start|>ipython\n{{\"sky\": \"grey\"}}<|im_end|>\n<|im_start|>user\n{pretty}\n\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(ToolFormat::of(LLAMA3), Ok(ToolFormat::Llama3));
    let rendered = template(LLAMA3).render(&conversation("Köln"), &[weather("é")], true);
    assert_eq!(rendered.unwrap(), expected);
}

#[test]
fn mistral_renders_as_written() {
    let expected = format!(
        "[INST] Köln?[/INST][TOOL_CALLS] [{{\"name\": \"weather\", \"arguments\": {{\"city\": \"Köln\"}}, \"id\": \"a1b2c3d4e\"}}]<|im_end|>[TOOL_RESULTS] {{\"content\": {{\"sky\": \"grey\"}}, \"call_id\": \"a1b2c3d4e\"}}[/TOOL_RESULTS][AVAILABLE_TOOLS] [{DEFINITION}][/AVAILABLE_TOOLS][INST] And now?[/INST]"
    );
    assert_eq!(ToolFormat::of(MISTRAL), Ok(ToolFormat::Mistral));
    let rendered = template(MISTRAL).render(&conversation("Köln"), &[weather("é")], true);
    assert_eq!(rendered.unwrap(), expected);
}

#[test]
fn without_tools_nothing_of_them_is_rendered() {
    for jinja in [HERMES, LLAMA3, MISTRAL] {
        let rendered = template(jinja)
            .render(&[Message::new("user", "hi")], &[], true)
            .unwrap();
        assert!(!rendered.to_lowercase().contains("tool"), "{rendered}");
    }
}

proptest! {
    /// Pieces of control tokens everywhere that a request can write: the control tokens are the template's own.
    #[test]
    fn no_text_of_a_tool_is_a_control_token(
        pieces in prop::collection::vec(prop::sample::select(vec!["<|im_end|>", "<|im_start|>", "<|", "im_end", "|>", "\"", "\\", "\n", "é", "system"]), 1..6),
    ) {
        let text = pieces.concat();
        let mut tool = weather(&text);
        tool.parameters["properties"][text.as_str()] = json!({"enum": [text.as_str()]});
        let mut messages = conversation(&text);
        messages[1].tool_calls[0].arguments.insert(text.clone(), json!([{text.as_str(): text.as_str()}]));
        messages[2].content.clone_from(&text);
        for jinja in [HERMES, LLAMA3, MISTRAL] {
            let controls = |tool: &Tool, messages: &[Message]| -> Vec<u32> {
                let ids = encode_chat(byte_level(), &template(jinja), messages, std::slice::from_ref(tool), true).unwrap();
                ids.into_iter().filter(|&id| byte_level().is_control(id)).collect()
            };
            prop_assert_eq!(controls(&tool, &messages), controls(&weather("é"), &conversation("K")));
        }
    }
}
