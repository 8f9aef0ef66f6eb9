//! The serving profile of an adapter version: what was fixed around the adapter when it was trained, and what a request
//! gets when it does not say otherwise. Training and serving both go through the helpers here, so that they cannot differ.
//!
//! This file must not know requests, limits of the server or how a template is rendered.

use serde::{Deserialize, Serialize};

/// Whether a version may be served from merged weights, a copy of the base with the update added in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MergePolicy {
    /// While it dominates traffic and fewer bytes are read that way.
    #[default]
    Auto,
    /// As soon as it is asked for, as far as the budget of merged copies goes.
    Merged,
    /// Never.
    Unmerged,
}

/// Settings of a version, all optional; a request overrides each one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServingProfile {
    /// First message of every chat that brings no system message of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_prompt: Option<String>,
    /// A chat template (Jinja) in place of the model's. Whether one is accepted is the server's policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// Text around the raw prompt of Generate and of prompt/completion rows; holds `{prompt}` exactly once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_template: Option<String>,
    /// Sampling temperature, 0 is greedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Nucleus sampling.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Keep the k most probable tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Keep tokens with at least this share of the most probable one's probability.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// Divides or multiplies the logits of tokens seen before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    /// Subtracted from a logit for each time the token was generated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
    /// Subtracted from the logits of tokens that were generated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
    /// Seed of the sampler.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Strings that end the generation, not part of the reply.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<Vec<String>>,
    /// Tokens generated at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// Labels that Classify scores by likelihood when the version has no head. With a head its own labels count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<Vec<String>>,
}

impl ServingProfile {
    /// The placeholder of `prompt_template`.
    pub const PROMPT: &'static str = "{prompt}";

    /// The raw text that a prompt stands for: inside the prompt template when there is one.
    #[must_use]
    pub fn raw_prompt(&self, prompt: &str) -> String {
        match &self.prompt_template {
            Some(template) => template.replacen(Self::PROMPT, prompt, 1),
            None => prompt.to_owned(),
        }
    }

    /// The system message to put before a chat, unless the chat begins with one.
    #[must_use]
    pub fn system_for(&self, first_role: Option<&str>) -> Option<&str> {
        match first_role {
            Some("system") => None,
            _ => self.system_prompt.as_deref(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_prompt_is_put_in_once_and_is_never_a_template_itself() {
        let mut profile = ServingProfile::default();
        assert_eq!(profile.raw_prompt("x {prompt}"), "x {prompt}");
        profile.prompt_template = Some("Q: {prompt}\nA:".to_owned());
        assert_eq!(profile.raw_prompt("x {prompt}"), "Q: x {prompt}\nA:");
    }

    #[test]
    fn a_chat_with_its_own_system_message_keeps_it() {
        let mut profile = ServingProfile::default();
        assert_eq!(profile.system_for(Some("user")), None);
        profile.system_prompt = Some("be brief".to_owned());
        assert_eq!(profile.system_for(Some("user")), Some("be brief"));
        assert_eq!(profile.system_for(None), Some("be brief"));
        assert_eq!(profile.system_for(Some("system")), None);
    }

    #[test]
    fn only_what_is_set_is_written_and_a_misspelt_field_is_an_error() {
        let profile = ServingProfile {
            temperature: Some(0.0),
            ..ServingProfile::default()
        };
        let text = serde_json::to_string(&profile).unwrap();
        assert_eq!(text, r#"{"temperature":0.0}"#);
        assert_eq!(
            serde_json::from_str::<ServingProfile>(&text).unwrap(),
            profile
        );
        assert!(serde_json::from_str::<ServingProfile>(r#"{"temprature":0.0}"#).is_err());
    }
}
