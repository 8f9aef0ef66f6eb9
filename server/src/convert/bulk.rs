//! Bulk jobs between the wire and their store, and the lines of their files: proto3 JSON by the contract's own
//! descriptors, so that a field which is added to a request is known here without a word.

use std::sync::LazyLock;

use espalier_proto::{rpc, v1};
use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use serde_json::{Value, json};

use super::adapter::timestamp;
use crate::bulk::{Job, Operation, State};
use crate::status::Refusal;

// Were the compiled-in set broken, every line would be refused, which tests see.
static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(espalier_proto::FILE_DESCRIPTOR_SET).unwrap_or_default()
});

/// A line of an input.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) key: String,
    pub(crate) request: BulkRequest,
}

/// What a line asks.
#[derive(Debug, Clone)]
pub(crate) enum BulkRequest {
    Generate(v1::GenerateRequest),
    Chat(v1::ChatRequest),
    Classify(v1::ClassifyRequest),
}

/// What a line got.
#[derive(Debug)]
pub(crate) enum BulkResponse {
    Generate(v1::GenerateResponse),
    Chat(v1::ChatResponse),
    Classify(v1::ClassifyResponse),
}

/// Why a line cannot be read: the field and the reason.
pub(crate) type Fault = (&'static str, String);

impl BulkRequest {
    /// Every line runs on the job's target.
    pub(crate) fn set_target(&mut self, target: v1::InferenceTarget) {
        *self.target() = Some(target);
    }

    fn target(&mut self) -> &mut Option<v1::InferenceTarget> {
        match self {
            Self::Generate(request) => &mut request.target,
            Self::Chat(request) => &mut request.target,
            Self::Classify(request) => &mut request.target,
        }
    }
}

impl BulkResponse {
    pub(crate) fn usage(&self) -> v1::Usage {
        match self {
            Self::Generate(response) => response.usage,
            Self::Chat(response) => response.usage,
            Self::Classify(response) => response.usage,
        }
        .unwrap_or_default()
    }
}

/// Reads one line.
pub(crate) fn line(
    bytes: &[u8],
    operation: Operation,
    max_key_bytes: usize,
) -> Result<Line, Fault> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|error| ("", format!("it is not a JSON object: {error}")))?;
    let Value::Object(mut fields) = value else {
        return Err(("", "it is not a JSON object".to_owned()));
    };
    let key = match fields.remove("key") {
        Some(Value::String(key)) => key,
        Some(_) => return Err(("key", "it is not a string".to_owned())),
        None => return Err(("key", "it is missing".to_owned())),
    };
    if key.is_empty() || key.len() > max_key_bytes {
        let why = format!("{} bytes, allowed are 1 to {max_key_bytes}", key.len());
        return Err(("key", why));
    }
    let request = fields
        .remove("request")
        .ok_or_else(|| ("request", "it is missing".to_owned()))?;
    if let Some((unknown, _)) = fields.into_iter().next() {
        let why = format!("{unknown:?} is no field of a line; it has key and request");
        return Err(("", why));
    }
    let mut request = match operation {
        Operation::Generate => BulkRequest::Generate(message(request)?),
        Operation::Chat => BulkRequest::Chat(message(request)?),
        Operation::Classify => BulkRequest::Classify(message(request)?),
    };
    if request.target().is_some() {
        let why = "the job names the target once, for all lines; leave it out";
        return Err(("request.target", why.to_owned()));
    }
    Ok(Line { key, request })
}

fn message<M: Message + Name + Default>(value: Value) -> Result<M, Fault> {
    let wrong = |why: String| ("request", why);
    let descriptor = POOL
        .get_message_by_name(&M::full_name())
        .ok_or_else(|| wrong("its message is not in the contract".to_owned()))?;
    let dynamic =
        DynamicMessage::deserialize(descriptor, value).map_err(|error| wrong(error.to_string()))?;
    M::decode(dynamic.encode_to_vec().as_slice()).map_err(|error| wrong(error.to_string()))
}

fn to_json<M: Message + Name>(message: &M) -> Result<Value, Refusal> {
    let options = SerializeOptions::new()
        .use_proto_field_name(true)
        .stringify_64_bit_integers(false);
    let descriptor = POOL
        .get_message_by_name(&M::full_name())
        .ok_or_else(|| Refusal::internal("a message is not in the contract"))?;
    DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())
        .map_err(Refusal::internal)?
        .serialize_with_options(serde_json::value::Serializer, &options)
        .map_err(Refusal::internal)
}

/// One line of the output, its end included.
pub(crate) fn answer(key: &str, result: Result<&BulkResponse, &rpc::Status>) -> Vec<u8> {
    let shown = match result {
        Ok(BulkResponse::Generate(response)) => to_json(response).map(|json| ("response", json)),
        Ok(BulkResponse::Chat(response)) => to_json(response).map(|json| ("response", json)),
        Ok(BulkResponse::Classify(response)) => to_json(response).map(|json| ("response", json)),
        Err(error) => to_json(error).map(|json| ("error", json)),
    };
    let line = match shown {
        Ok((name, value)) => json!({"key": key, name: value}),
        Err(refusal) => json!({"key": key, "error": {"message": refusal.message(), "code": 13}}),
    };
    let mut bytes = line.to_string().into_bytes();
    bytes.push(b'\n');
    bytes
}

/// What is done with every line.
pub(crate) fn operation(field: &str, number: i32) -> Result<Operation, Refusal> {
    match v1::BulkOperation::try_from(number) {
        Ok(v1::BulkOperation::Generate) => Ok(Operation::Generate),
        Ok(v1::BulkOperation::Chat) => Ok(Operation::Chat),
        Ok(v1::BulkOperation::Classify) => Ok(Operation::Classify),
        Ok(v1::BulkOperation::Unspecified) => {
            let why = "it must be GENERATE, CHAT or CLASSIFY";
            Err(Refusal::invalid_field(field, why))
        }
        Err(_) => {
            let why = format!("{number} is no operation");
            Err(Refusal::invalid_field(field, why))
        }
    }
}

fn state(state: State) -> v1::BulkJobState {
    match state {
        State::Queued => v1::BulkJobState::Queued,
        State::Running => v1::BulkJobState::Running,
        State::Succeeded => v1::BulkJobState::Succeeded,
        State::Failed => v1::BulkJobState::Failed,
        State::Cancelled => v1::BulkJobState::Cancelled,
    }
}

/// A job for the wire.
pub(crate) fn job(job: Job) -> v1::BulkJob {
    let operation = match job.operation {
        Operation::Generate => v1::BulkOperation::Generate,
        Operation::Chat => v1::BulkOperation::Chat,
        Operation::Classify => v1::BulkOperation::Classify,
    };
    v1::BulkJob {
        name: job.name.to_string(),
        operation: operation.into(),
        adapter_version: job.version.unwrap_or_default(),
        state: state(job.state).into(),
        progress: Some(v1::BulkProgress {
            items: job.progress.items,
            done: job.progress.done,
            failed: job.progress.failed,
            input_tokens: job.progress.input_tokens,
            output_tokens: job.progress.output_tokens,
            output_bytes: job.progress.output_bytes,
        }),
        error: job.error.map(|message| rpc::Status {
            code: tonic::Code::Internal.into(),
            message,
            details: Vec::new(),
        }),
        description: job.description,
        input_bytes: job.input_bytes,
        input_sha256: job.input_sha256,
        create_time: Some(timestamp(job.create_time)),
        start_time: job.start_time.map(timestamp),
        end_time: job.end_time.map(timestamp),
        expire_time: job.expire_time.map(timestamp),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    fn fault(text: &str) -> String {
        let (field, why) = line(text.as_bytes(), Operation::Generate, 8).unwrap_err();
        format!("{field}: {why}")
    }

    #[test]
    fn lines_are_read_in_both_spellings() {
        for stop in ["maxTokens", "max_tokens"] {
            let text = format!(r#"{{"key":"a","request":{{"text":"hi","stop":{{"{stop}":3}}}}}}"#);
            let found = line(text.as_bytes(), Operation::Generate, 8).unwrap();
            let BulkRequest::Generate(request) = found.request else {
                panic!("another operation");
            };
            assert_eq!(request.stop.unwrap().max_tokens, Some(3));
        }
    }

    #[test]
    fn what_is_no_line_is_named() {
        for (text, expected) in [
            ("[1]", "not a JSON object"),
            ("{", "not a JSON object"),
            (r#"{"request":{}}"#, "key: it is missing"),
            (r#"{"key":7,"request":{}}"#, "key: it is not a string"),
            (r#"{"key":"","request":{}}"#, "key: 0 bytes"),
            (r#"{"key":"123456789","request":{}}"#, "key: 9 bytes"),
            (r#"{"key":"a"}"#, "request: it is missing"),
            (r#"{"key":"a","request":{},"id":1}"#, "\"id\" is no field"),
            (r#"{"key":"a","request":{"txt":"x"}}"#, "txt"),
            (r#"{"key":"a","request":{"text":7}}"#, "request: "),
            (
                r#"{"key":"a","request":{"target":{}}}"#,
                "request.target: the job names",
            ),
        ] {
            let found = fault(text);
            assert!(found.contains(expected), "{text}: {found}");
        }
    }

    #[test]
    fn errors_keep_their_details() {
        let status = Refusal::over_limit("text", 7, 5).into();
        let line = answer("k", Err(&crate::status::in_message(&status)));
        let found: Value = serde_json::from_slice(&line).unwrap();
        let info = &found["error"]["details"][0];
        assert_eq!(info["@type"], "type.googleapis.com/google.rpc.ErrorInfo");
        assert_eq!(info["reason"], "INVALID_FIELD");
        assert_eq!(found["key"], "k");
        assert_eq!(line.last(), Some(&b'\n'));
    }
}
