//! Inference requests on their way in: every field is checked against the configured limits here or, for what only the
//! engine can judge (ranges of sampling, token ids), by the engine's own validation. Unknown enum numbers and missing
//! alternatives are errors; a default never hides a mistake.

use espalier_adapters::profile::ServingProfile;
use espalier_engine::constraint::ConstraintSource;
use espalier_engine::request::{MAX_TARGETS, MAX_WEIGHT, Pooling, SamplingParams, StopConditions};
use espalier_proto::v1;

use super::Faults;
use crate::config::Limits;
use crate::names::{AdapterRef, TenantId, TenantName};
use crate::principal::Principal;
use crate::status::Refusal;

/// Which weights are asked for, and on whose behalf.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// The adapters with their weights, in the request's order; none is the base model.
    pub(crate) adapters: Vec<(AdapterRef, f32)>,
    /// The tenant that the call acts for; `None` only for callers that belong to none and name none.
    pub(crate) tenant: Option<TenantId>,
}

/// How to generate, after the request's fields were laid over the profile's and the server's.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) sampling: SamplingParams,
    pub(crate) stop: StopConditions,
    /// The request itself named `max_tokens`: then it must fit, while a default is cut to what fits.
    pub(crate) max_tokens_asked: bool,
    pub(crate) logprobs: Option<usize>,
    pub(crate) system_prompt: String,
}

/// A text or its ids.
#[derive(Debug, Clone)]
pub(crate) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

/// Who asks and for what. Whether the caller may is asked here too, before anything is looked up.
pub(crate) fn target(
    target: Option<v1::InferenceTarget>,
    principal: &Principal,
) -> Result<Target, Refusal> {
    let target = target.unwrap_or_default();
    let mut faults = Faults::default();
    let adapters = weighted("target.adapters", &target.adapters, &mut faults);
    let mut named = None;
    if !target.tenant.is_empty() {
        match TenantName::parse(&target.tenant) {
            Ok(name) => named = Some(name.0),
            Err(error) => faults.add("target.tenant", error.to_string()),
        }
    }
    let owner = adapters.first().map(|(first, _)| &first.adapter.tenant);
    if let (Some(named), Some(implied)) = (&named, owner)
        && named != implied
    {
        faults.add(
            "target.tenant",
            format!("tenants/{named} is not the adapter's tenant, tenants/{implied}"),
        );
    }
    faults.finish()?;
    let tenant = owner
        .cloned()
        .or(named)
        .or_else(|| principal.tenant().cloned());
    match &tenant {
        Some(tenant) => principal.authorize(tenant)?,
        None => principal.authorize_base()?,
    }
    Ok(Target { adapters, tenant })
}

/// A mixture belongs to one tenant, and its weights are numbers that a request can mean. `at` is the field's path.
pub(crate) fn weighted(
    at: &str,
    entries: &[v1::AdapterWeight],
    faults: &mut Faults,
) -> Vec<(AdapterRef, f32)> {
    faults.limit(at, entries.len(), MAX_TARGETS, "adapters in one request");
    let mut adapters: Vec<(AdapterRef, f32)> = Vec::new();
    for (index, entry) in entries.iter().take(MAX_TARGETS).enumerate() {
        let weight = entry.weight.unwrap_or(1.0);
        // NaN is in no range.
        if !(-MAX_WEIGHT..=MAX_WEIGHT).contains(&weight) {
            faults.add(
                format!("{at}[{index}].weight"),
                format!("{weight} is outside -{MAX_WEIGHT} to {MAX_WEIGHT}"),
            );
        }
        let field = format!("{at}[{index}].adapter");
        match AdapterRef::parse(&entry.adapter) {
            Ok(reference) => {
                if let Some((first, _)) = adapters.first()
                    && first.adapter.tenant != reference.adapter.tenant
                {
                    faults.add(
                        field,
                        format!(
                            "belongs to tenants/{}, the first one to tenants/{}; adapters of one request belong to one tenant",
                            reference.adapter.tenant, first.adapter.tenant
                        ),
                    );
                }
                adapters.push((reference, weight));
            }
            Err(error) => faults.add(field, error.to_string()),
        }
    }
    adapters
}

/// The name that the client gave its call, if it is usable.
pub(crate) fn request_id(given: &str, limits: &Limits) -> Result<(), Refusal> {
    let mut faults = Faults::default();
    faults.limit(
        "request_id",
        given.len(),
        limits.max_request_id_bytes,
        "bytes",
    );
    if !given.bytes().all(|byte| byte.is_ascii_graphic()) {
        faults.add(
            "request_id",
            "has characters other than printable ASCII without space",
        );
    }
    faults.finish()
}

/// Sampling, stop conditions and log-probabilities: request over profile over defaults.
pub(crate) fn settings(
    sampling: Option<v1::SamplingParams>,
    stop: Option<v1::StopConditions>,
    logprobs: Option<v1::LogprobOptions>,
    profile: &ServingProfile,
    limits: &Limits,
) -> Result<Settings, Refusal> {
    let (sampling, stop) = (sampling.unwrap_or_default(), stop.unwrap_or_default());
    let mut faults = Faults::default();
    let n = sampling.n.unwrap_or(1);
    if n == 0 || n > limits.max_candidates {
        faults.add(
            "sampling.n",
            format!("{n} is outside 1 to {}", limits.max_candidates),
        );
    }
    faults.limit(
        "sampling.logit_bias",
        sampling.logit_bias.len(),
        limits.max_logit_bias,
        "entries",
    );
    if let Some(options) = &logprobs
        && options.top > limits.max_logprobs
    {
        faults.add(
            "logprobs.top",
            format!("{} is outside 0 to {}", options.top, limits.max_logprobs),
        );
    }
    check_stop(&stop, limits, &mut faults);
    faults.finish()?;
    Ok(Settings {
        max_tokens_asked: stop.max_tokens.is_some(),
        logprobs: logprobs.map(|options| options.top as usize),
        system_prompt: String::new(),
        sampling: SamplingParams {
            temperature: sampling.temperature.or(profile.temperature).unwrap_or(1.0),
            top_p: sampling.top_p.or(profile.top_p).unwrap_or(1.0),
            top_k: sampling.top_k.or(profile.top_k).unwrap_or(0) as usize,
            min_p: sampling.min_p.or(profile.min_p).unwrap_or(0.0),
            repetition_penalty: sampling
                .repetition_penalty
                .or(profile.repetition_penalty)
                .unwrap_or(1.0),
            frequency_penalty: sampling
                .frequency_penalty
                .or(profile.frequency_penalty)
                .unwrap_or(0.0),
            presence_penalty: sampling
                .presence_penalty
                .or(profile.presence_penalty)
                .unwrap_or(0.0),
            // Drawn here and not by the engine, so that a stream's first message can name it.
            seed: Some(sampling.seed.or(profile.seed).unwrap_or_else(rand::random)),
            n: n as usize,
            logit_bias: sampling.logit_bias.into_iter().collect(),
        },
        stop: StopConditions {
            max_tokens: stop
                .max_tokens
                .or(profile.max_tokens)
                .map(|max| max as usize),
            min_tokens: stop.min_tokens.unwrap_or(0) as usize,
            stop: union(stop.stop, profile.stop.as_deref().unwrap_or_default()),
            stop_token_ids: stop.stop_token_ids,
            ignore_eos: stop.ignore_eos.unwrap_or(false),
            include_stop_str: stop.include_stop.unwrap_or(false),
        },
    })
}

fn check_stop(stop: &v1::StopConditions, limits: &Limits, faults: &mut Faults) {
    let ceiling = limits.max_output_tokens;
    if let Some(max) = stop.max_tokens {
        if max == 0 {
            faults.add(
                "stop.max_tokens",
                "0 is below 1; leave it unset for the default",
            );
        } else if ceiling > 0 && max as usize > ceiling {
            faults.add(
                "stop.max_tokens",
                format!("{max} is outside 1 to {ceiling}"),
            );
        }
        if stop.min_tokens.is_some_and(|min| min > max) {
            faults.add(
                "stop.min_tokens",
                format!("{} is above max_tokens {max}", stop.min_tokens.unwrap_or(0)),
            );
        }
    }
    faults.limit(
        "stop.stop",
        stop.stop.len(),
        limits.max_stop_strings,
        "strings",
    );
    faults.limit(
        "stop.stop_token_ids",
        stop.stop_token_ids.len(),
        limits.max_stop_token_ids,
        "ids",
    );
    for (index, text) in stop.stop.iter().enumerate() {
        if text.is_empty() {
            faults.add(format!("stop.stop[{index}]"), "is empty");
        }
        faults.limit(
            format!("stop.stop[{index}]"),
            text.len(),
            limits.max_stop_string_bytes,
            "bytes",
        );
    }
}

fn union(mut asked: Vec<String>, profile: &[String]) -> Vec<String> {
    for text in profile {
        if !asked.contains(text) {
            asked.push(text.clone());
        }
    }
    asked
}

impl Settings {
    /// Settles `max_tokens` once the prompt's length is known; `context` is what one sequence may hold.
    ///
    /// # Errors
    /// CONTEXT_LENGTH_EXCEEDED when the prompt leaves no place, or not the place that the request itself asked for.
    pub(crate) fn fit(
        &mut self,
        prompt: usize,
        context: usize,
        limits: &Limits,
    ) -> Result<(), Refusal> {
        fits(prompt + 1, context)?;
        let left = context - prompt;
        let wanted = self.stop.max_tokens.unwrap_or(limits.default_max_tokens);
        if self.max_tokens_asked && wanted > left {
            return Err(too_long(
                prompt + wanted,
                context,
                format!("{prompt} tokens of prompt and max_tokens {wanted}"),
            ));
        }
        let ceiling = if limits.max_output_tokens == 0 {
            left
        } else {
            limits.max_output_tokens.min(left)
        };
        self.stop.max_tokens = Some(wanted.min(ceiling));
        Ok(())
    }
}

/// Refuses what is longer than a sequence may be.
pub(crate) fn fits(tokens: usize, context: usize) -> Result<(), Refusal> {
    if tokens <= context {
        Ok(())
    } else {
        Err(too_long(tokens, context, format!("{tokens} tokens")))
    }
}

fn too_long(given: usize, limit: usize, what: String) -> Refusal {
    let message = format!("{what} make {given} tokens, one sequence holds {limit}");
    Refusal::new(
        tonic::Code::InvalidArgument,
        "CONTEXT_LENGTH_EXCEEDED",
        message,
    )
    .with("given", given)
    .with("limit", limit)
}

/// Generate's input.
pub(crate) fn prompt(
    input: Option<v1::generate_request::Input>,
    limits: &Limits,
) -> Result<Prompt, Refusal> {
    match input {
        Some(v1::generate_request::Input::Text(text)) => {
            let mut faults = Faults::default();
            check_text(&mut faults, "text", &text, limits);
            faults.finish()?;
            Ok(Prompt::Text(text))
        }
        Some(v1::generate_request::Input::TokenIds(ids)) if !ids.ids.is_empty() => {
            Ok(Prompt::Ids(ids.ids))
        }
        Some(v1::generate_request::Input::TokenIds(_)) => Err(Refusal::invalid_field(
            "token_ids.ids",
            "is empty; at least one id is needed",
        )),
        None => Err(Refusal::invalid_field(
            "input",
            "is missing; set text or token_ids",
        )),
    }
}

/// One text.
pub(crate) fn one_text(field: &str, text: &str, limits: &Limits) -> Result<(), Refusal> {
    let mut faults = Faults::default();
    check_text(&mut faults, field, text, limits);
    faults.finish()
}

fn check_text(faults: &mut Faults, field: impl Into<String>, text: &str, limits: &Limits) {
    faults.limit(
        field,
        text.len(),
        limits.max_prompt_bytes.as_usize(),
        "bytes",
    );
}

/// What the output must match. How large it may be is the engine's to say.
pub(crate) fn constraint(
    constraint: Option<v1::Constraint>,
) -> Result<Option<ConstraintSource>, Refusal> {
    use v1::constraint::Kind;
    let Some(constraint) = constraint else {
        return Ok(None);
    };
    match constraint.kind {
        Some(Kind::JsonSchema(text)) => Ok(Some(ConstraintSource::JsonSchema(text))),
        Some(Kind::Regex(text)) => Ok(Some(ConstraintSource::Regex(text))),
        Some(Kind::Choices(choices)) => Ok(Some(ConstraintSource::Choices(choices.texts))),
        Some(Kind::Grammar(text)) => Ok(Some(ConstraintSource::Grammar(text))),
        None => Err(Refusal::invalid_field(
            "constraint",
            "has no kind; set json_schema, regex, choices or grammar, or leave it out",
        )),
    }
}

pub(super) fn unknown_enum(number: i32, expected: &str) -> String {
    match number {
        0 => format!("is not set; say {expected}"),
        number => format!("{number} is not one of {expected}"),
    }
}

/// The texts of Classify and Embed.
pub(crate) fn texts(texts: &[String], limits: &Limits) -> Result<(), Refusal> {
    let mut faults = Faults::default();
    if texts.is_empty() {
        faults.add("texts", "is empty; at least one text is needed");
    }
    faults.limit("texts", texts.len(), limits.max_inputs, "texts");
    for (index, text) in texts.iter().enumerate().take(limits.max_inputs) {
        if text.is_empty() {
            faults.add(format!("texts[{index}]"), "is empty");
        }
        check_text(&mut faults, format!("texts[{index}]"), text, limits);
    }
    faults.finish()
}

/// The labels of Classify; none is a question of its own, answered elsewhere.
pub(crate) fn labels(labels: &[String], limits: &Limits) -> Result<(), Refusal> {
    let mut faults = Faults::default();
    if labels.len() == 1 {
        faults.add("labels", "1 label, at least 2 are needed to choose");
    }
    faults.limit("labels", labels.len(), limits.max_labels, "labels");
    let mut seen = std::collections::HashSet::new();
    for (index, label) in labels.iter().enumerate().take(limits.max_labels) {
        let field = || format!("labels[{index}]");
        if label.is_empty() {
            faults.add(field(), "is empty");
        }
        faults.limit(field(), label.len(), limits.max_label_bytes, "bytes");
        if !seen.insert(label) {
            faults.add(field(), "is named twice");
        }
    }
    faults.finish()
}

/// How Embed pools.
pub(crate) fn pooling(number: i32) -> Result<Pooling, Refusal> {
    match v1::Pooling::try_from(number) {
        Ok(v1::Pooling::Unspecified | v1::Pooling::Last) => Ok(Pooling::Last),
        Ok(v1::Pooling::Mean) => Ok(Pooling::Mean),
        Err(_) => Err(Refusal::invalid_field(
            "pooling",
            unknown_enum(number, "POOLING_LAST or _MEAN"),
        )),
    }
}

/// Score's items: context (`None` when it is left out) and continuation.
pub(crate) fn score_items(
    items: Vec<v1::ScoreItem>,
    limits: &Limits,
) -> Result<Vec<(Option<Prompt>, Prompt)>, Refusal> {
    use v1::score_item::{Context, Continuation};
    let mut faults = Faults::default();
    if items.is_empty() {
        faults.add("items", "is empty; at least one item is needed");
    }
    faults.limit("items", items.len(), limits.max_inputs, "items");
    let mut known = Vec::with_capacity(items.len().min(limits.max_inputs));
    for (index, item) in items.into_iter().enumerate().take(limits.max_inputs) {
        let context = match item.context {
            Some(Context::ContextText(text)) if !text.is_empty() => {
                check_text(
                    &mut faults,
                    format!("items[{index}].context_text"),
                    &text,
                    limits,
                );
                Some(Prompt::Text(text))
            }
            Some(Context::ContextTokenIds(ids)) if !ids.ids.is_empty() => {
                Some(Prompt::Ids(ids.ids))
            }
            _ => None,
        };
        let continuation = match item.continuation {
            Some(Continuation::ContinuationText(text)) if !text.is_empty() => {
                check_text(
                    &mut faults,
                    format!("items[{index}].continuation_text"),
                    &text,
                    limits,
                );
                Prompt::Text(text)
            }
            Some(Continuation::ContinuationTokenIds(ids)) if !ids.ids.is_empty() => {
                Prompt::Ids(ids.ids)
            }
            _ => {
                faults.add(
                    format!("items[{index}].continuation"),
                    "is missing or empty; set continuation_text or continuation_token_ids",
                );
                continue;
            }
        };
        known.push((context, continuation));
    }
    faults.finish()?;
    Ok(known)
}

/// `logprobs.top` of Score.
pub(crate) fn score_logprobs(
    options: Option<v1::LogprobOptions>,
    limits: &Limits,
) -> Result<Option<usize>, Refusal> {
    match options {
        Some(options) if options.top > limits.max_logprobs => Err(Refusal::invalid_field(
            "logprobs.top",
            format!("{} is outside 0 to {}", options.top, limits.max_logprobs),
        )),
        options => Ok(options.map(|options| options.top as usize)),
    }
}

#[cfg(test)]
mod tests;
