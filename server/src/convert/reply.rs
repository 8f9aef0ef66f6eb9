//! Engine events on their way out, as messages of the contract.

use std::sync::Arc;
use std::time::Duration;

use espalier_adapters::head::Problem;
use espalier_adapters::text::Tokenizer;
use espalier_engine::request as engine;
use espalier_proto::v1;

use super::request::Settings;
use super::{classification, count};
use crate::registry::ResolvedVersion;

/// What every reply says about who answered.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    /// `models/{m}`.
    pub(crate) name: String,
    /// SHA-256 (hex) of the source weights.
    pub(crate) digest: String,
}

/// Which weights answered.
pub(crate) fn effective(
    base: &Base,
    versions: &[(Arc<ResolvedVersion>, f32)],
) -> v1::EffectiveTarget {
    v1::EffectiveTarget {
        adapters: versions
            .iter()
            .map(|(version, weight)| v1::EffectiveAdapter {
                version: version.name.to_string(),
                digest: version.digest.to_string(),
                weight: *weight,
            })
            .collect(),
        base_model: base.name.clone(),
        base_digest: base.digest.clone(),
    }
}

/// The settings that held, every field set.
pub(crate) fn settings(settings: &Settings) -> v1::EffectiveSettings {
    let (sampling, stop) = (&settings.sampling, &settings.stop);
    v1::EffectiveSettings {
        sampling: Some(v1::SamplingParams {
            temperature: Some(sampling.temperature),
            top_p: Some(sampling.top_p),
            top_k: Some(count(sampling.top_k)),
            min_p: Some(sampling.min_p),
            repetition_penalty: Some(sampling.repetition_penalty),
            frequency_penalty: Some(sampling.frequency_penalty),
            presence_penalty: Some(sampling.presence_penalty),
            seed: sampling.seed,
            n: Some(count(sampling.n)),
            logit_bias: sampling.logit_bias.clone().into_iter().collect(),
        }),
        stop: Some(v1::StopConditions {
            max_tokens: stop.max_tokens.map(count),
            min_tokens: Some(count(stop.min_tokens)),
            stop: stop.stop.clone(),
            stop_token_ids: stop.stop_token_ids.clone(),
            ignore_eos: Some(stop.ignore_eos),
            include_stop: Some(stop.include_stop_str),
        }),
        system_prompt: settings.system_prompt.clone(),
    }
}

pub(crate) fn usage(usage: engine::Usage) -> v1::Usage {
    v1::Usage {
        input_tokens: count(usage.input_tokens),
        output_tokens: count(usage.output_tokens),
        cached_input_tokens: count(usage.cached_input_tokens),
    }
}

/// `longest` is the number of tokens of the longest candidate: they run side by side, so the time of each further token
/// is counted along that one. Zero where nothing is generated.
pub(crate) fn timings(timings: engine::Timings, longest: usize) -> v1::Timings {
    v1::Timings {
        queue: Some(duration(timings.queue)),
        adapter_load: Some(duration(timings.adapter_load)),
        time_to_first_token: (longest > 0).then(|| duration(timings.time_to_first_token)),
        time_per_output_token: per_token(timings, longest).map(duration),
        total: Some(duration(timings.total)),
    }
}

/// Mean time of each token after the first; `None` below two tokens.
pub(crate) fn per_token(timings: engine::Timings, longest: usize) -> Option<Duration> {
    let further = u32::try_from(longest.checked_sub(1)?)
        .ok()
        .filter(|further| *further > 0)?;
    Some(timings.total.saturating_sub(timings.time_to_first_token) / further)
}

pub(crate) fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        // Below 10^9 by definition.
        nanos: duration.subsec_nanos() as i32,
    }
}

pub(crate) fn finish_reason(reason: engine::FinishReason) -> v1::FinishReason {
    match reason {
        engine::FinishReason::Eos => v1::FinishReason::Eos,
        engine::FinishReason::StopToken => v1::FinishReason::StopToken,
        engine::FinishReason::StopString => v1::FinishReason::StopString,
        engine::FinishReason::Length => v1::FinishReason::Length,
        engine::FinishReason::Complete => v1::FinishReason::Constraint,
    }
}

pub(crate) fn delta(
    delta: engine::Delta,
    tool_calls: Vec<v1::ToolCall>,
    tokenizer: &Tokenizer,
) -> v1::TokenDelta {
    v1::TokenDelta {
        index: count(delta.candidate),
        text: delta.text,
        tool_calls,
        token_ids: delta.tokens,
        logprobs: delta
            .logprobs
            .iter()
            .map(|entry| logprob(entry, tokenizer))
            .collect(),
    }
}

pub(crate) fn finished(candidate: engine::Candidate) -> v1::CandidateFinished {
    v1::CandidateFinished {
        index: count(candidate.candidate),
        finish_reason: finish_reason(candidate.finish_reason).into(),
        stop_match: candidate.stop_string.unwrap_or_default(),
        output_tokens: count(candidate.output_tokens),
    }
}

pub(crate) fn logprob(entry: &engine::TokenLogprob, tokenizer: &Tokenizer) -> v1::TokenLogprob {
    v1::TokenLogprob {
        token_id: entry.token,
        text: piece(tokenizer, entry.token),
        logprob: entry.logprob,
        top: entry
            .top
            .iter()
            .map(|(token, logprob)| v1::TokenAlternative {
                token_id: *token,
                text: piece(tokenizer, *token),
                logprob: *logprob,
            })
            .collect(),
    }
}

/// One token's text alone; a fragment of a character shows as U+FFFD.
pub(crate) fn piece(tokenizer: &Tokenizer, id: u32) -> String {
    tokenizer.decode(&[id], false).unwrap_or_default()
}

/// One text's classes, the most likely first; equal ones in the labels' order. Of regression the value alone.
pub(crate) fn classes(
    labels: &Arc<[String]>,
    (probabilities, logits): (&[f32], &[f32]),
    (problem, out_of_scope): (Problem, bool),
) -> v1::Classification {
    let problem_type = classification::problem(problem);
    if problem == Problem::Regression {
        return v1::Classification {
            value: probabilities.first().copied(),
            problem_type,
            ..v1::Classification::default()
        };
    }
    let mut scores: Vec<v1::LabelScore> = labels
        .iter()
        .zip(probabilities)
        .zip(logits)
        .enumerate()
        .map(|(index, ((label, probability), logit))| v1::LabelScore {
            label: label.clone(),
            probability: *probability,
            score: *logit,
            index: count(index),
        })
        .collect();
    scores.sort_by(|a, b| {
        b.probability
            .total_cmp(&a.probability)
            .then(a.index.cmp(&b.index))
    });
    let above = scores.iter().filter(|score| score.probability > 0.5);
    let said = match problem {
        Problem::MultiLabel => above.map(|score| score.label.clone()).collect(),
        _ => Vec::new(),
    };
    v1::Classification {
        label: scores
            .first()
            .map(|best| best.label.clone())
            .unwrap_or_default(),
        labels: said,
        out_of_scope,
        value: None,
        problem_type,
        scores,
    }
}

/// One continuation's score; the tokens themselves only when they were asked for.
pub(crate) fn score(
    tokens: &[engine::TokenLogprob],
    top: Option<usize>,
    tokenizer: &Tokenizer,
) -> v1::ScoreResult {
    let logprob: f64 = tokens.iter().map(|token| f64::from(token.logprob)).sum();
    let entries = top.map(|top| {
        tokens
            .iter()
            .map(|token| {
                let mut entry = self::logprob(token, tokenizer);
                entry.top.truncate(top);
                entry
            })
            .collect()
    });
    v1::ScoreResult {
        logprob,
        tokens: count(tokens.len()),
        perplexity: (-logprob / tokens.len().max(1) as f64).exp(),
        token_logprobs: entries.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_sorted_and_keep_their_place() {
        let labels: Arc<[String]> = ["a", "b", "c"].map(str::to_owned).into();
        let result = classes(
            &labels,
            (&[0.2, 0.5, 0.3], &[-1.0, 2.0, 0.5]),
            (Problem::SingleLabel, true),
        );
        assert!(result.out_of_scope && result.labels.is_empty() && result.value.is_none());
        assert_eq!(result.label, "b");
        let order: Vec<_> = result
            .scores
            .iter()
            .map(|score| (score.label.as_str(), score.index))
            .collect();
        assert_eq!(order, [("b", 1), ("c", 2), ("a", 0)]);
        assert_eq!(result.scores[0].score, 2.0);
    }

    #[test]
    fn several_labels_are_said_and_a_number_stands_alone() {
        let labels: Arc<[String]> = ["a", "b", "c"].map(str::to_owned).into();
        let given: (&[f32], &[f32]) = (&[0.6, 0.5, 0.9], &[0.4, 0.0, 2.2]);
        let result = classes(&labels, given, (Problem::MultiLabel, false));
        assert_eq!(result.labels, ["c", "a"]);
        assert_eq!((result.label.as_str(), result.scores.len()), ("c", 3));
        let labels: Arc<[String]> = ["score".to_owned()].into();
        let result = classes(&labels, (&[-2.5], &[-2.5]), (Problem::Regression, false));
        assert_eq!((result.value, result.scores.len()), (Some(-2.5), 0));
        assert_eq!(result.problem_type(), v1::ProblemType::Regression);
    }

    #[test]
    fn time_per_token_needs_two_tokens() {
        let measured = engine::Timings {
            time_to_first_token: Duration::from_millis(100),
            total: Duration::from_millis(500),
            ..Default::default()
        };
        assert_eq!(per_token(measured, 1), None);
        assert_eq!(per_token(measured, 5), Some(Duration::from_millis(100)));
        assert!(timings(measured, 0).time_to_first_token.is_none());
    }
}
