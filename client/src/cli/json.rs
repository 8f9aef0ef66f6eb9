//! Messages as JSON and back, by the contract's own descriptors: field names as in the protos,
//! enums by name, numbers as numbers. Knows no message in particular.

use std::sync::OnceLock;

use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use serde_json::Value;

use crate::error::Error;

fn pool() -> &'static DescriptorPool {
    static POOL: OnceLock<DescriptorPool> = OnceLock::new();
    POOL.get_or_init(|| {
        // The set was made by the build from the same protos; were it broken, every message
        // would show as null.
        DescriptorPool::decode(espalier_proto::FILE_DESCRIPTOR_SET).unwrap_or_default()
    })
}

/// A message as JSON. Fields without a value are left out.
pub(crate) fn value<M: Message + Name>(message: &M) -> Value {
    let Some(descriptor) = pool().get_message_by_name(&M::full_name()) else {
        return Value::Null;
    };
    let options = SerializeOptions::new()
        .use_proto_field_name(true)
        .stringify_64_bit_integers(false);
    DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())
        .ok()
        .and_then(|dynamic| {
            dynamic
                .serialize_with_options(serde_json::value::Serializer, &options)
                .ok()
        })
        .unwrap_or(Value::Null)
}

/// A message from JSON. Unknown fields are refused.
pub(crate) fn parse<M: Message + Name + Default>(what: &str, text: &str) -> Result<M, Error> {
    let wrong = |why: String| Error::argument(format!("{what}: {why}"));
    let Some(descriptor) = pool().get_message_by_name(&M::full_name()) else {
        return Err(wrong("its message is not in the contract".to_owned()));
    };
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let dynamic = DynamicMessage::deserialize(descriptor, &mut deserializer)
        .map_err(|error| wrong(error.to_string()))?;
    deserializer
        .end()
        .map_err(|error| wrong(error.to_string()))?;
    M::decode(dynamic.encode_to_vec().as_slice()).map_err(|error| wrong(error.to_string()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use serde_json::json;

    use crate::v1;

    use super::*;

    #[test]
    fn messages_go_to_json_and_back() {
        let profile = v1::ServingProfile {
            system_prompt: Some("Be brief.".to_owned()),
            sampling: Some(v1::SamplingParams {
                temperature: Some(0.0),
                ..Default::default()
            }),
            stop: Some(v1::StopConditions {
                stop: vec!["\n".to_owned()],
                ..Default::default()
            }),
            ..Default::default()
        };
        let found = value(&profile);
        assert_eq!(
            found,
            json!({
                "system_prompt": "Be brief.",
                "sampling": {"temperature": 0.0},
                "stop": {"stop": ["\n"]},
            })
        );
        let back: v1::ServingProfile = parse("profile", &found.to_string()).unwrap();
        assert_eq!(back, profile);
    }

    #[test]
    fn enums_have_names_and_large_numbers_stay_numbers() {
        let job = v1::TrainingJob {
            name: "tenants/a/trainingJobs/j".to_owned(),
            state: v1::TrainingJobState::Running.into(),
            last_sequence: 1 << 40,
            ..Default::default()
        };
        let found = value(&job);
        assert_eq!(found["state"], "TRAINING_JOB_STATE_RUNNING");
        assert_eq!(found["last_sequence"], 1_u64 << 40);
    }

    #[test]
    fn a_misspelt_field_is_refused_by_name() {
        let error = parse::<v1::ServingProfile>("p.json", r#"{"sytem_prompt": "x"}"#).unwrap_err();
        assert!(error.message.contains("sytem_prompt"), "{error}");
    }
}
