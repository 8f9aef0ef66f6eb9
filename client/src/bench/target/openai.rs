//! Calls of any server with OpenAI's HTTP interface: completions, chat and embeddings, streamed
//! as server-sent events. An adapter is named as the model, or by a field of the server's own.

use std::{borrow::Cow, time::Duration};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    bench::{
        target::{Clock, Refusal, Reply, Tokens, espalier::Sampling, sse::Lines},
        workload::{Call, Input, Operation, Tenant},
    },
    v1,
};

/// Fields that are added to every request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Template(Map<String, Value>);

/// Stands for the adapter's name in a template.
const NAME: &str = "{adapter}";
/// Stands for its place in the list, as a number where it is a whole string.
const PLACE: &str = "{adapter_index}";

// === impl Template ===

impl Template {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        match serde_json::from_str(text) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err("is no JSON object; write for example '{\"top_k\": 1}'".to_owned()),
            Err(error) => Err(format!("is no JSON: {error}")),
        }
    }

    /// The fields of one request. Fields that name an adapter are left out for the base.
    fn filled(&self, adapter: Option<(&str, usize)>) -> Map<String, Value> {
        let mut fields = Map::new();
        for (key, value) in &self.0 {
            let names_one = value.to_string().contains(NAME) || value.to_string().contains(PLACE);
            match adapter {
                Some(adapter) if names_one => fields.insert(key.clone(), fill(value, adapter)),
                None if names_one => None,
                _ => fields.insert(key.clone(), value.clone()),
            };
        }
        fields
    }
}

fn fill(value: &Value, adapter: (&str, usize)) -> Value {
    match value {
        Value::String(text) if text == PLACE => json!(adapter.1),
        Value::String(text) => {
            let text = text.replace(NAME, adapter.0);
            Value::String(text.replace(PLACE, &adapter.1.to_string()))
        }
        Value::Array(items) => items.iter().map(|item| fill(item, adapter)).collect(),
        Value::Object(fields) => {
            let fields = fields
                .iter()
                .map(|(key, item)| (key.clone(), fill(item, adapter)));
            Value::Object(fields.collect())
        }
        other => other.clone(),
    }
}

/// The server and what does not change from one request to the next.
#[derive(Debug)]
pub(crate) struct OpenAi {
    pub(crate) tokens: Tokens,
    http: reqwest::Client,
    /// Without a slash at its end.
    base: String,
    key: Option<String>,
    model: String,
    tenants: Vec<Tenant>,
    template: Template,
    /// Whether an adapter is named as the model.
    adapter_is_model: bool,
    sampling: Sampling,
    timeout: Duration,
}

/// What a stream's events say; everything else is skipped without a copy.
#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    usage: Option<Used>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    content: Option<Cow<'a, str>>,
    #[serde(borrow)]
    reasoning_content: Option<Cow<'a, str>>,
}

#[derive(Clone, Copy, Default, Deserialize)]
struct Used {
    #[serde(default)]
    prompt_tokens: u32,
    #[serde(default)]
    completion_tokens: u32,
    prompt_tokens_details: Option<Details>,
}

#[derive(Clone, Copy, Default, Deserialize)]
struct Details {
    #[serde(default)]
    cached_tokens: Option<u32>,
}

impl Choice<'_> {
    /// Whether there is text of the model in it.
    fn has_text(&self) -> bool {
        let some = |text: &Option<Cow<str>>| text.as_ref().is_some_and(|text| !text.is_empty());
        let delta = self.delta.as_ref();
        some(&self.text) || delta.is_some_and(|d| some(&d.content) || some(&d.reasoning_content))
    }
}

/// Everything that [`OpenAi::connect`] needs to know.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) url: String,
    pub(crate) key: Option<String>,
    /// The base's name; the first of the server's list when it is left out.
    pub(crate) model: Option<String>,
    pub(crate) tenants: Vec<Tenant>,
    pub(crate) template: Template,
    pub(crate) sampling: Sampling,
    pub(crate) timeout: Duration,
}

// === impl OpenAi ===

impl OpenAi {
    /// Asks the server for its models, so that an address at which nobody listens is an error
    /// before the test begins.
    pub(crate) async fn connect(setup: Setup) -> Result<Self, String> {
        // Another part of the process may have chosen a provider already; any will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .tcp_nodelay(true)
            .pool_max_idle_per_host(usize::MAX)
            .connect_timeout(Duration::from_secs(5))
            .build()
            .map_err(|error| format!("no HTTP client: {}", causes(&error)))?;
        let trimmed = setup.url.trim_end_matches('/');
        let base = trimmed.strip_suffix("/v1").unwrap_or(trimmed).to_owned();
        let mut target = Self {
            tokens: Tokens::default(),
            http,
            base,
            key: setup.key,
            model: setup.model.clone().unwrap_or_default(),
            adapter_is_model: setup.template.filled(Some(("a", 0))) == setup.template.0,
            tenants: setup.tenants,
            template: setup.template,
            sampling: setup.sampling,
            timeout: setup.timeout,
        };
        let models = target.models().await?;
        if setup.model.is_none() {
            let first = models["data"][0]["id"].as_str();
            target.model = first
                .ok_or("the server lists no model; name one with --openai-model")?
                .to_owned();
        }
        Ok(target)
    }

    async fn models(&self) -> Result<Value, String> {
        let url = format!("{}/v1/models", self.base);
        let mut request = self.http.get(&url).timeout(Duration::from_secs(10));
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let not_reached = |error: reqwest::Error| {
            format!(
                "cannot reach {url}: {}\n  next: is the server running there? --target openai=http://HOST:PORT names its root",
                causes(&error)
            )
        };
        let response = request.send().await.map_err(not_reached)?;
        let status = response.status();
        let body = response.bytes().await.map_err(not_reached)?;
        if !status.is_success() {
            let text = String::from_utf8_lossy(&body);
            let text: String = text.chars().take(200).collect();
            return Err(format!(
                "{url} answers {status}: {text}\n  next: is it an OpenAI-compatible server, and OPENAI_API_KEY its key?"
            ));
        }
        serde_json::from_slice(&body).map_err(|error| format!("{url} sends no JSON: {error}"))
    }

    pub(crate) async fn describe(&self) -> Value {
        let models = self.models().await.unwrap_or_default();
        json!({
            "kind": "openai",
            "address": self.base,
            "model": {"name": self.model},
            "models": models["data"],
        })
    }

    pub(crate) async fn send(&self, call: Call) -> Result<Reply, Refusal> {
        match tokio::time::timeout(self.timeout, self.stream(call)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Refusal::deadline(self.timeout)),
        }
    }

    async fn stream(&self, call: Call) -> Result<Reply, Refusal> {
        let mut response = self.post(&call).await?;
        if call.operation == Operation::Embed {
            let body = response.bytes().await.map_err(lost)?;
            return embedded(&body);
        }
        let mut lines = Lines::default();
        let mut clock = Clock::expecting(call.output);
        let mut usage = None;
        let mut is_done = false;
        while let Some(piece) = response.chunk().await.map_err(lost)? {
            let long = |error| Refusal::new("CLIENT_STREAM", error);
            lines.push(&piece).map_err(long)?;
            while let Some(data) = lines.next_data() {
                if data == b"[DONE]" {
                    is_done = true;
                    continue;
                }
                let chunk: Chunk = serde_json::from_slice(data)
                    .map_err(|error| Refusal::new("CLIENT_STREAM", error.to_string()))?;
                if let Some(error) = chunk.error {
                    return Err(reported(&error, "STREAM_ERROR"));
                }
                if chunk.choices.iter().any(Choice::has_text) {
                    clock.tick();
                    self.tokens.add(1);
                }
                usage = chunk.usage.or(usage);
            }
        }
        if !is_done && usage.is_none() {
            let why = "the stream ended before [DONE]";
            return Err(Refusal::new("CLIENT_STREAM", why));
        }
        Ok(streamed(clock, usage))
    }

    async fn post(&self, call: &Call) -> Result<reqwest::Response, Refusal> {
        let path = match call.operation {
            Operation::Chat => "chat/completions",
            Operation::Embed => "embeddings",
            _ => "completions",
        };
        let mut request = self
            .http
            .post(format!("{}/v1/{path}", self.base))
            .header("content-type", "application/json")
            .body(self.body(call).to_string());
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let response = request.send().await.map_err(lost)?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.bytes().await.unwrap_or_default();
        let named = format!("HTTP_{}", status.as_u16());
        match serde_json::from_slice::<Value>(&body) {
            Ok(value) if value["error"].is_object() => Err(reported(&value["error"], &named)),
            _ => {
                let text = String::from_utf8_lossy(&body);
                Err(Refusal::new(
                    named,
                    text.chars().take(300).collect::<String>(),
                ))
            }
        }
    }

    fn body(&self, call: &Call) -> Value {
        let adapter = call.adapter.map(|place| {
            let name = self.tenants[call.tenant].adapters[place].as_str();
            (name, place)
        });
        let model = adapter
            .filter(|_| self.adapter_is_model)
            .map_or(self.model.as_str(), |(name, _)| name);
        let mut body = json!({"model": model});
        let words = |input: &Input| match input {
            Input::Text(text) => text.clone(),
            Input::Messages(messages) => {
                let contents: Vec<&str> = messages.iter().map(|m| m.content.as_str()).collect();
                contents.join("\n")
            }
        };
        match (&call.operation, &call.input) {
            (Operation::Embed, input) => {
                body["input"] = words(input).into();
                return body;
            }
            (Operation::Chat, Input::Messages(messages)) => {
                body["messages"] = messages.iter().map(message).collect();
            }
            (Operation::Chat, Input::Text(text)) => {
                body["messages"] = json!([{"role": "user", "content": text}]);
            }
            (_, input) => body["prompt"] = words(input).into(),
        }
        body["max_tokens"] = call.output.into();
        body["stream"] = true.into();
        body["stream_options"] = json!({"include_usage": true});
        if let Some(temperature) = self.sampling.temperature {
            body["temperature"] = temperature.into();
        }
        if self.sampling.ignore_eos {
            body["ignore_eos"] = true.into();
        }
        for (key, value) in self.template.filled(adapter) {
            body[key] = value;
        }
        body
    }
}

fn message(message: &v1::ChatMessage) -> Value {
    let role = match message.role() {
        v1::Role::System => "system",
        v1::Role::Assistant => "assistant",
        v1::Role::Tool => "tool",
        v1::Role::User | v1::Role::Unspecified => "user",
    };
    json!({"role": role, "content": message.content})
}

fn streamed(clock: Clock, usage: Option<Used>) -> Reply {
    // Servers that report no usage send a token an event.
    let events = clock.gaps.len() as u32 + u32::from(clock.first.is_some());
    let usage = usage.unwrap_or(Used {
        completion_tokens: events,
        ..Used::default()
    });
    let details = usage.prompt_tokens_details.unwrap_or_default();
    Reply {
        first: clock.first,
        last: clock.last,
        gaps: clock.gaps,
        input_tokens: usage.prompt_tokens,
        output_tokens: usage.completion_tokens,
        cached_tokens: details.cached_tokens.unwrap_or(0),
        ..Reply::default()
    }
}

fn embedded(body: &[u8]) -> Result<Reply, Refusal> {
    #[derive(Deserialize)]
    struct Embedded {
        usage: Option<Used>,
    }
    let found: Embedded = serde_json::from_slice(body)
        .map_err(|error| Refusal::new("CLIENT_REPLY", error.to_string()))?;
    Ok(Reply {
        input_tokens: found.usage.unwrap_or_default().prompt_tokens,
        ..Reply::default()
    })
}

/// An error object of the interface.
fn reported(error: &Value, otherwise: &str) -> Refusal {
    let kinds = ["code", "type"];
    let kind = kinds.iter().find_map(|key| error[*key].as_str());
    let message = error["message"].as_str().map(str::to_owned);
    Refusal::new(
        kind.unwrap_or(otherwise),
        message.unwrap_or_else(|| error.to_string()),
    )
}

fn lost(error: reqwest::Error) -> Refusal {
    let reason = if error.is_connect() {
        "CLIENT_CONNECT"
    } else {
        "CLIENT_TRANSPORT"
    };
    Refusal::new(reason, causes(&error))
}

/// The innermost cause says what happened.
fn causes(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = cause.to_string();
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_name_adapters_and_leave_the_base_alone() {
        let template =
            Template::parse(r#"{"lora": [{"id": "{adapter_index}", "scale": 1.0}], "top_k": 1}"#)
                .unwrap();
        let fields = Value::Object(template.filled(Some(("a7", 7))));
        assert_eq!(
            fields,
            json!({"lora": [{"id": 7, "scale": 1.0}], "top_k": 1})
        );
        let fields = Value::Object(template.filled(None));
        assert_eq!(fields, json!({"top_k": 1}));
        assert!(Template::parse("[1]").is_err() && Template::parse("{").is_err());
    }

    #[test]
    fn events_with_text_are_told_from_those_without() {
        let has = |text: &str| {
            let chunk: Chunk = serde_json::from_str(text).unwrap();
            chunk.choices.iter().any(Choice::has_text)
        };
        assert!(has(r#"{"choices": [{"text": "a \" quote", "index": 0}]}"#));
        assert!(has(r#"{"choices": [{"delta": {"content": "x"}}]}"#));
        assert!(!has(r#"{"choices": [{"delta": {"role": "assistant"}}]}"#));
        assert!(!has(r#"{"choices": [{"text": ""}]}"#));
        assert!(!has(r#"{"choices": [], "usage": {"prompt_tokens": 3}}"#));
    }
}
