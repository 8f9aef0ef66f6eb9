//! Tools in a chat over a real socket, on a tiny model with templates of the families that have them: a call that must
//! come satisfies its schema, whole and streamed; definitions are rendered; and a model without is refused by name.

use std::path::Path;

use espalier_engine::model;
use espalier_proto::v1;
use espalier_proto::v1::tool_choice::Choice;
use espalier_tests::TestServer;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_stream::StreamExt;
use tonic::Code;

use crate::inference_api::{Inference, inference, refused, user};

const HERMES: &str = "{%- if tools %}Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}\nWrite <tool_call>{...}</tool_call>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
const LLAMA3: &str = "{%- for m in messages %}<|im_start|>{{ m.role }}\n{% if tools is not none and loop.first %}{% for tool in tools %}{{ tool | tojson }}{% endfor %} Respond with {\"name\": function, \"parameters\": object}.\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
const MISTRAL: &str = "{%- for m in messages %}{% if tools is not none and loop.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% if m.tool_calls %}[TOOL_CALLS] {{ m.tool_calls | tojson }}{% endif %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}";

/// `tiny:1` as a Hugging Face directory with another template and one more control token.
fn directory(jinja: &str, control: &str) -> TempDir {
    let tiny = model::load("tiny:1").unwrap();
    let (config, vocab) = (&tiny.config, tiny.config.vocab);
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    let about = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "hidden_size": config.hidden, "intermediate_size": config.intermediate, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "vocab_size": vocab + 1, "rms_norm_eps": config.rms_eps, "max_position_embeddings": config.context_length,
        "rope_theta": config.rope.theta, "tie_word_embeddings": true, "eos_token_id": 2,
    });
    write("config.json", about.to_string().as_bytes());
    let mut tokenizer: Value = serde_json::from_str(&tiny.tokenizer.to_json().unwrap()).unwrap();
    let added = json!({"id": vocab, "content": control, "special": true, "single_word": false,
        "lstrip": false, "rstrip": false, "normalized": false});
    tokenizer["added_tokens"]
        .as_array_mut()
        .unwrap()
        .push(added);
    write("tokenizer.json", tokenizer.to_string().as_bytes());
    write(
        "tokenizer_config.json",
        json!({"eos_token": "<|im_end|>"}).to_string().as_bytes(),
    );
    write("chat_template.jinja", jinja.as_bytes());
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, mut shape, values) in tiny.weights.tensors(config) {
        let mut values = values.to_vec();
        if shape == [vocab, config.hidden] {
            shape[0] += 1;
            values.extend_from_within(..config.hidden);
        }
        let bytes = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        tensors.push((name, shape, bytes));
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (name.as_str(), view.unwrap())
    });
    write(
        "model.safetensors",
        &safetensors::serialize(views, None).unwrap(),
    );
    dir
}

async fn serve(model: &Path) -> (TestServer, Inference) {
    let server = TestServer::start(&[("model", model.to_str().unwrap())]).await;
    let client = inference(&server).await;
    (server, client)
}

fn tools() -> Vec<v1::Tool> {
    let city = r##"{"type": "object", "properties": {"city": {"enum": ["Rome", "Köln"]}, "days": {"$ref": "#/$defs/count"}},
        "required": ["city", "days"], "additionalProperties": false, "$defs": {"count": {"type": "integer", "minimum": 1, "maximum": 9}}}"##;
    let stop = r#"{"type": "object", "properties": {"now": {"type": "boolean"}}, "required": ["now"], "additionalProperties": false}"#;
    [
        ("weather", "Looks outside.", city),
        ("stop", "Stops <|im_end|>.", stop),
    ]
    .map(|(name, description, parameters)| v1::Tool {
        name: name.to_owned(),
        description: description.to_owned(),
        parameters: parameters.to_owned(),
    })
    .to_vec()
}

fn request(choice: Option<Choice>, seed: u64) -> v1::ChatRequest {
    v1::ChatRequest {
        messages: vec![user("What is it like in Rome?")],
        tools: tools(),
        tool_choice: choice.map(|choice| v1::ToolChoice {
            choice: Some(choice),
        }),
        sampling: Some(v1::SamplingParams {
            // A random model has strong likes: hot enough, it calls either tool.
            temperature: Some(6.0),
            seed: Some(seed),
            ..Default::default()
        }),
        stop: Some(v1::StopConditions {
            max_tokens: Some(1200),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn required() -> Option<Choice> {
    Some(Choice::Mode(v1::ToolChoiceMode::Required.into()))
}

/// The one call of an answer, checked against its tool's schema.
fn checked(calls: &[v1::ToolCall]) -> &str {
    let [call] = calls else {
        panic!("{calls:?}");
    };
    assert!(call.id.len() == 9 && call.id.bytes().all(|byte| byte.is_ascii_alphanumeric()));
    let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
    match call.name.as_str() {
        "weather" => {
            assert!(
                arguments["city"] == "Rome" || arguments["city"] == "Köln",
                "{arguments}"
            );
            assert!(
                (1..=9).contains(&arguments["days"].as_i64().unwrap()),
                "{arguments}"
            );
        }
        "stop" => assert!(arguments["now"].is_boolean(), "{arguments}"),
        other => panic!("{other}"),
    }
    &call.name
}

#[tokio::test]
async fn a_required_call_satisfies_its_schema_in_every_form() {
    // Marks as text, and as control tokens that leave no text.
    let forms = [
        (HERMES, "<unused>"),
        (HERMES, "<tool_call>"),
        (LLAMA3, "<|python_tag|>"),
        (MISTRAL, "<unused>"),
        (MISTRAL, "[TOOL_CALLS]"),
    ];
    let mut names = std::collections::BTreeSet::new();
    for (jinja, control) in forms {
        let model = directory(jinja, control);
        let (server, mut client) = serve(model.path()).await;
        for seed in 0..8 {
            let whole = client
                .chat(request(required(), seed))
                .await
                .unwrap()
                .into_inner();
            let candidate = &whole.candidates[0];
            assert_eq!(candidate.text, "", "{control}: {candidate:?}");
            assert_eq!(candidate.finish_reason(), v1::FinishReason::Constraint);
            names.insert(checked(&candidate.tool_calls).to_owned());
            let mut stream = client
                .stream_chat(request(required(), seed))
                .await
                .unwrap()
                .into_inner();
            let (mut text, mut calls) = (String::new(), Vec::new());
            while let Some(chunk) = stream.next().await {
                if let Some(v1::chat_chunk::Event::Delta(delta)) = chunk.unwrap().event {
                    text.push_str(&delta.text);
                    calls.extend(delta.tool_calls);
                }
            }
            checked(&calls);
            let same = |call: &v1::ToolCall| (call.name.clone(), call.arguments.clone());
            assert_eq!(
                (text.as_str(), same(&calls[0])),
                ("", same(&candidate.tool_calls[0]))
            );
        }
        let only = client
            .chat(request(Some(Choice::Tool("stop".to_owned())), 3))
            .await
            .unwrap();
        assert_eq!(checked(&only.into_inner().candidates[0].tool_calls), "stop");
        server.ended().await;
    }
    assert_eq!(names.len(), 2, "only {names:?}");
}

#[tokio::test]
async fn definitions_are_rendered_and_results_go_back() {
    let model = directory(HERMES, "<unused>");
    let (server, mut client) = serve(model.path()).await;
    let mut tokenize = async |tools: Vec<v1::Tool>, messages: Vec<v1::ChatMessage>| {
        let chat = v1::ChatInput {
            messages,
            tools,
            ..Default::default()
        };
        let request = v1::TokenizeRequest {
            input: Some(v1::tokenize_request::Input::Chat(chat)),
            ..Default::default()
        };
        let reply = client.tokenize(request).await.unwrap().into_inner();
        (reply.pieces.concat(), reply.token_ids)
    };
    let (text, ids) = tokenize(tools(), vec![user("hi")]).await;
    assert!(
        text.contains("\"name\": \"weather\"") && text.contains("Stops <|im_end|>."),
        "{text}"
    );
    // What the description spells stays text: the turn's own end and nothing else.
    assert_eq!(ids.iter().filter(|&&id| id == 2).count(), 1);
    let call = v1::ToolCall {
        id: "abc123def".to_owned(),
        name: "stop".to_owned(),
        arguments: "{\"now\": true}".to_owned(),
    };
    let turns = vec![
        user("hi"),
        v1::ChatMessage {
            role: v1::Role::Assistant.into(),
            tool_calls: vec![call],
            ..Default::default()
        },
        v1::ChatMessage {
            role: v1::Role::Tool.into(),
            content: "done".to_owned(),
            tool_call_id: "abc123def".to_owned(),
            ..Default::default()
        },
    ];
    let (text, _) = tokenize(tools(), turns).await;
    assert!(
        text.contains(
            "<tool_call>{\"name\": \"stop\", \"arguments\": {\"now\": true}}</tool_call>"
        ),
        "{text}"
    );
    assert!(text.contains("<|im_start|>tool\ndone<|im_end|>"), "{text}");
    let free = client.chat(request(None, 1)).await.unwrap().into_inner();
    let none = Some(Choice::Mode(v1::ToolChoiceMode::None.into()));
    let left_out = client.chat(request(none, 1)).await.unwrap().into_inner();
    assert!(free.usage.unwrap().input_tokens > left_out.usage.unwrap().input_tokens + 100);
    server.ended().await;
}

#[tokio::test]
async fn what_cannot_be_done_is_refused_by_name() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let (code, reason, message) = refused(client.chat(request(None, 1)).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::Unimplemented, "UNSUPPORTED_BY_MODEL")
    );
    assert!(message.contains("never reads `tools`"), "{message}");
    // Left out, they are not needed.
    let none = Some(Choice::Mode(v1::ToolChoiceMode::None.into()));
    assert!(client.chat(request(none, 1)).await.is_ok());
    server.ended().await;

    let model = directory(HERMES, "<unused>");
    let (server, mut client) = serve(model.path()).await;
    let mut both = request(None, 1);
    both.constraint = Some(v1::Constraint {
        kind: Some(v1::constraint::Kind::Regex("a".to_owned())),
    });
    assert!(
        refused(client.chat(both).await)
            .2
            .contains("constraint: cannot stand beside tools")
    );
    let mut schema = request(required(), 1);
    schema.tools[0].parameters =
        r#"{"type": "object", "properties": {"a": {"type": "strnig"}}}"#.to_owned();
    let (code, reason, message) = refused(client.chat(schema).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::InvalidArgument, "CONSTRAINT_INVALID")
    );
    assert!(
        message.starts_with("tools:") && message.contains("strnig"),
        "{message}"
    );
    server.ended().await;
}
