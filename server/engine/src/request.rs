//! What a caller may ask the engine for, and what comes back: plain data without proto, names or text of prompts.
//!
//! Prompts arrive as token ids, because chat templates and control-token rules belong to whoever read the request.
//! Generated text leaves as text, because only the engine knows when a character or a stop string is complete.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use espalier_adapters::head::Pooling;
use espalier_adapters::head::Problem;
use espalier_adapters::version::VersionDigest;

use crate::constraint::Constraint;
use crate::error::EngineError;

/// Versions that one request may name.
pub const MAX_TARGETS: usize = 8;
/// The largest weight of a version, to either side of 0.
pub const MAX_WEIGHT: f32 = 8.0;

/// One unit of work from one tenant against the base model, a version, or a mixture of versions.
#[derive(Clone, Debug)]
pub struct Request {
    /// For logs and errors only.
    pub id: String,
    /// Whom the scheduler's fairness counts this for.
    pub tenant: Arc<str>,
    /// Who goes first.
    pub priority: Priority,
    /// The versions that answer, with their weights; empty is the base model. Their updates are added exactly and in this
    /// order; no version stands there twice.
    pub target: Vec<TargetVersion>,
    /// Refuse rather than load when the version is not resident.
    pub require_resident: bool,
    /// What to do.
    pub kind: RequestKind,
    /// When the answer is worthless; enforced in the queue and at every step.
    pub deadline: Option<Instant>,
    /// When the server received the request, so that timings include its share.
    pub received: Instant,
}

/// Who goes first when not all can run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Somebody waits for the answer.
    #[default]
    Interactive,
    /// Runs on what interactive work leaves, and gives it back when interactive work comes.
    Bulk,
}

/// One version and its weight in the answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TargetVersion {
    /// The version.
    pub digest: VersionDigest,
    /// Its weight: 0 adds nothing, to the last bit. A DoRA version has weight 1 and stands alone, because its gain scales
    /// the base's output too.
    pub weight: f32,
}

/// The kinds of work. Every input is a list of token ids, never empty.
#[derive(Clone, Debug)]
pub enum RequestKind {
    /// Continue a prompt. Answered by deltas and one [`Event::Finished`] per candidate.
    Generate(Generate),
    /// The adapter's head on each input. Answered by one [`Output::Classes`] per input.
    Classify {
        /// One sequence each.
        inputs: Vec<Vec<u32>>,
    },
    /// Label likelihood: softmax over the labels' summed log-probabilities. One [`Output::Classes`] per prompt.
    LabelLikelihood {
        /// One prompt per input.
        prompts: Vec<Vec<u32>>,
        /// The labels' names, in the order of the answer.
        labels: Vec<String>,
        /// Each label's tokens, as they follow the prompt.
        label_tokens: Vec<Vec<u32>>,
    },
    /// A vector for each input. One [`Output::Embedding`] per input.
    Embed {
        /// One sequence each.
        inputs: Vec<Vec<u32>>,
        /// Which rows make the vector.
        pooling: Pooling,
        /// Scale to unit length.
        normalize: bool,
    },
    /// Log-probabilities of given continuations. One [`Output::Score`] per continuation.
    Score {
        /// What comes before.
        prompt: Vec<u32>,
        /// What to score.
        continuations: Vec<Vec<u32>>,
    },
}

/// A Generate's input and options.
#[derive(Clone, Debug, Default)]
pub struct Generate {
    /// The prompt's ids.
    pub prompt: Vec<u32>,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// When to stop.
    pub stop: StopConditions,
    /// `Some(k)`: the chosen token's log-probability and the k most likely ones, of the model's own distribution
    /// (before temperature, penalties and bias).
    pub logprobs: Option<usize>,
    /// What every candidate's text must match.
    pub constraint: Option<Constraint>,
}

/// How tokens are chosen. Defaults: greedy, one candidate, no penalties.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus: the smallest set of tokens with at least this probability; 1 is off.
    pub top_p: f32,
    /// The k most likely tokens; 0 is off.
    pub top_k: usize,
    /// Tokens of at least this share of the most likely one's probability; 0 is off.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt and output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once per occurrence in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted once if the token is in the output; 0 is off.
    pub presence_penalty: f32,
    /// The same seed, prompt, version and options give the same tokens. Without one the engine draws one.
    pub seed: Option<u64>,
    /// Candidates, each a sequence with a seed derived from its index.
    pub n: usize,
    /// Added to logits before anything else.
    pub logit_bias: BTreeMap<u32, f32>,
}

/// When a generation ends.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StopConditions {
    /// Output tokens; `None` is up to the end of the context.
    pub max_tokens: Option<usize>,
    /// No stop of any kind before so many output tokens.
    pub min_tokens: usize,
    /// Strings that end the output; not part of it unless `include_stop_str`.
    pub stop: Vec<String>,
    /// Ids that end the output, beside the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Do not stop at the model's own stop ids.
    pub ignore_eos: bool,
    /// Keep the stop string at the end of the text.
    pub include_stop_str: bool,
}

/// What the engine tells about one request, in order. Exactly one of `Done` and `Failed` comes last; a channel that
/// closes without either means that the engine died.
#[derive(Clone, Debug)]
pub enum Event {
    /// The first step that holds the request begins.
    Started(Started),
    /// New text of one candidate. Text may be empty when log-probabilities arrive before a character is complete.
    Delta(Delta),
    /// One candidate is complete.
    Finished(Candidate),
    /// One result of Classify, LabelLikelihood, Embed or Score.
    Output {
        /// Index of the input (or of the continuation).
        index: usize,
        /// The result.
        output: Output,
    },
    /// Everything is delivered.
    Done {
        /// Tokens counted.
        usage: Usage,
        /// Times measured.
        timings: Timings,
    },
    /// The request failed; what came before stays valid but is incomplete.
    Failed(EngineError),
}

/// Facts known when a request's first step begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    /// Time in the queue, without loading the adapter.
    pub queue: Duration,
    /// Time spent waiting for the adapter; zero when it was resident.
    pub adapter_load: Duration,
    /// The seed used (Generate): candidate 0 uses it as it is.
    pub seed: u64,
}

/// New output of one candidate.
#[derive(Clone, Debug, PartialEq)]
pub struct Delta {
    /// Which candidate.
    pub candidate: usize,
    /// Whole characters, never part of a stop string.
    pub text: String,
    /// The tokens sampled since the last delta (their text may come later).
    pub tokens: Vec<u32>,
    /// One for each of `tokens`, if asked for.
    pub logprobs: Vec<TokenLogprob>,
}

/// How a candidate ended. Text and tokens came in the deltas.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Which candidate.
    pub candidate: usize,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The stop string that matched, for [`FinishReason::StopString`].
    pub stop_string: Option<String>,
    /// The id that stopped it, for [`FinishReason::Eos`] and [`FinishReason::StopToken`].
    pub stop_token: Option<u32>,
    /// Tokens it generated, the one that stopped it included.
    pub output_tokens: usize,
}

/// Why a candidate ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// One of the model's own stop ids.
    Eos,
    /// One of the request's stop ids.
    StopToken,
    /// One of the request's stop strings.
    StopString,
    /// `max_tokens` or the end of the context.
    Length,
    /// The constraint is satisfied and nothing may follow.
    Complete,
}

/// A token's log-probability under the model's own distribution, and the most likely alternatives.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The k most likely tokens, best first (ties: lower id first).
    pub top: Vec<(u32, f32)>,
}

/// One result of a request that does not generate.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Scores in label order.
    Classes {
        /// The labels' names.
        labels: Arc<[String]>,
        /// One each: softmax, summing to 1; of several labels a sigmoid each; of regression the value.
        probabilities: Vec<f32>,
        /// What they were made of: head logits, or summed log-probabilities.
        logits: Vec<f32>,
        /// What the head answers; one label, where the labels' likelihood was taken.
        problem: Problem,
        /// The best score is below the head's threshold.
        out_of_scope: bool,
    },
    /// A vector of hidden size.
    Embedding(Vec<f32>),
    /// One log-probability for each continuation token.
    Score(Vec<TokenLogprob>),
}

/// Tokens of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Prompt tokens, counted once whatever n is.
    pub input_tokens: usize,
    /// Generated tokens over all candidates.
    pub output_tokens: usize,
    /// Prompt tokens whose keys and values were there already.
    pub cached_input_tokens: usize,
    /// Adapters that had to be loaded for this request.
    pub adapter_loads: usize,
}

/// Times of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// In the queue, without loading the adapter.
    pub queue: Duration,
    /// Waiting for the adapter.
    pub adapter_load: Duration,
    /// From `received` to the first output token (or result).
    pub time_to_first_token: Duration,
    /// From `received` to the end.
    pub total: Duration,
}

// === impl SamplingParams ===

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: None,
            n: 1,
            logit_bias: BTreeMap::new(),
        }
    }
}

// === impl RequestKind ===

impl RequestKind {
    /// Tokens that the request brings. A prompt that several sequences share counts once.
    pub fn input_tokens(&self) -> usize {
        let sum = |inputs: &[Vec<u32>]| inputs.iter().map(Vec::len).sum();
        match self {
            RequestKind::Generate(generate) => generate.prompt.len(),
            RequestKind::Classify { inputs } | RequestKind::Embed { inputs, .. } => sum(inputs),
            RequestKind::LabelLikelihood { prompts, .. } => sum(prompts),
            RequestKind::Score {
                prompt,
                continuations,
            } => prompt.len() + sum(continuations),
        }
    }
}
