//! From the model's states to tokens, text and results, and from those to events.
//!
//! Every event has its place in the channel before the step begins, so nothing here waits for a reader.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use super::{Engine, StepOutput};
use crate::classify;
use crate::error::EngineError;
use crate::metrics;
use crate::request::{Candidate, Delta, Event, FinishReason, Output, Pooling, TokenLogprob};
use crate::sampler::token_logprob;
use crate::scheduler::{Plan, SequenceId};
use crate::sequence::{Generation, RequestKey, Task};

/// Rows of logits held at once when continuations are scored: a row is as long as the vocabulary.
const SCORED_ROWS: usize = 32;

/// How a candidate ended, and by what.
struct End {
    reason: FinishReason,
    stop_string: Option<String>,
    stop_token: Option<u32>,
}

impl Engine {
    pub(super) fn postprocess(&mut self, plan: &Plan, outputs: Vec<StepOutput>) {
        self.scheduler.complete(plan);
        let states = std::mem::take(&mut self.states);
        let mut logits = std::mem::take(&mut self.logits);
        let sampling = self.gather_sampling(&outputs, &states);
        logits.clear();
        if !sampling.is_empty() {
            logits.extend_from_slice(self.runner.logits(&sampling));
        }
        let mut rows = logits.chunks_exact_mut(self.model.config.vocab);
        for output in outputs {
            let id = output.item.id;
            let Some(range) = output.states else {
                self.fail_sequence(id, "its step panicked");
                continue;
            };
            let row = if self.samples(id, &range) {
                rows.next()
            } else {
                None
            };
            let advance =
                AssertUnwindSafe(|| self.advance(id, &states[range], row, output.item.completes));
            if catch_unwind(advance).is_err() {
                self.totals.panics += 1;
                metrics::panic_caught("postprocess");
                self.fail_sequence(id, "its postprocessing panicked");
            }
        }
        self.states = states;
        self.logits = logits;
    }

    /// The states from which tokens are sampled, one after the other: one product for all of them.
    fn gather_sampling(&self, outputs: &[StepOutput], states: &[f32]) -> Vec<f32> {
        let mut gathered = Vec::new();
        for output in outputs {
            if let Some(range) = output
                .states
                .clone()
                .filter(|range| self.samples(output.item.id, range))
            {
                gathered.extend_from_slice(&states[range]);
            }
        }
        gathered
    }

    fn samples(&self, id: SequenceId, states: &Range<usize>) -> bool {
        let generates = |task: &Task| matches!(task, Task::Generate(_));
        !states.is_empty()
            && self
                .sequences
                .get(&id)
                .is_some_and(|sequence| generates(&sequence.task))
    }

    fn fail_sequence(&mut self, id: SequenceId, detail: &str) {
        if let Some(key) = self.sequences.get(&id).map(|sequence| sequence.request) {
            self.fail(
                key,
                EngineError::Internal {
                    detail: detail.to_owned(),
                },
            );
        }
    }

    /// Makes of one sequence's new states what its task asks for.
    fn advance(
        &mut self,
        id: SequenceId,
        states: &[f32],
        logits: Option<&mut [f32]>,
        completes: bool,
    ) {
        // A sibling that failed in this step has taken the whole request with it.
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        let (key, position) = (sequence.request, sequence.tokens.len());
        if !states.iter().all(|state| state.is_finite()) {
            return self.fail(key, EngineError::NonFiniteLogits { position });
        }
        match &mut sequence.task {
            Task::Generate(_) => {
                if let Some(logits) = logits {
                    self.advance_generation(id, key, logits);
                }
            }
            Task::Classify { index } if completes => {
                let index = *index;
                self.classify(key, index, states);
                self.finish(id, key);
            }
            Task::Embed {
                sum,
                pooling,
                normalize,
                index,
            } => {
                if *pooling == Pooling::Mean {
                    classify::add_states(sum, states);
                }
                if completes {
                    let mut vector = match pooling {
                        Pooling::Last => states.to_vec(),
                        Pooling::Mean => classify::mean(sum, position),
                    };
                    if *normalize {
                        classify::normalize(&mut vector);
                    }
                    let index = *index;
                    self.deliver(key, index, Output::Embedding(vector));
                    self.finish(id, key);
                }
            }
            Task::Score(_) => {
                self.score(id, key, states);
                if completes {
                    self.finish_continuation(id, key);
                }
            }
            Task::Classify { .. } => {}
        }
    }

    // --- generation ---

    fn advance_generation(&mut self, id: SequenceId, key: RequestKey, logits: &mut [f32]) {
        let max_sequence = self.model.max_sequence_tokens;
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        let position = sequence.tokens.len();
        let Task::Generate(generation) = &mut sequence.task else {
            return;
        };
        let sampled = generation.sample(logits);
        let Ok((token, logprob)) = sampled else {
            return self.fail(key, EngineError::NonFiniteLogits { position });
        };
        let (text, end) = generation.append(token, position + 1 >= max_sequence);
        let delta = Delta {
            candidate: generation.candidate,
            text,
            tokens: vec![token],
            logprobs: logprob.into_iter().collect(),
        };
        let finished = end.map(|end| Candidate {
            candidate: generation.candidate,
            finish_reason: end.reason,
            stop_string: end.stop_string,
            stop_token: end.stop_token,
            output_tokens: generation.outputs,
        });
        sequence.tokens.push(token);
        self.totals.output_tokens += 1;
        metrics::output_token();
        if let Some(request) = self.requests.get_mut(&key) {
            request.usage.output_tokens += 1;
            request.note_output(Instant::now());
            request.send(Event::Delta(delta));
        }
        match finished {
            None => self.scheduler.push_token(id),
            Some(candidate) => {
                if let Some(request) = self.requests.get(&key) {
                    request.send(Event::Finished(candidate));
                }
                self.finish(id, key);
            }
        }
    }

    // --- classify and score ---

    fn classify(&mut self, key: RequestKey, index: usize, state: &[f32]) {
        let Some(request) = self.requests.get(&key) else {
            return;
        };
        let Some(lease) = &request.lease else { return };
        let logits = self.runner.score(&lease.adapter, state);
        let labels = Arc::clone(&request.labels);
        let wide: Vec<f64> = logits.iter().map(|logit| f64::from(*logit)).collect();
        let probabilities = classify::softmax(&wide);
        self.deliver(
            key,
            index,
            Output::Classes {
                labels,
                probabilities,
                logits,
            },
        );
    }

    /// Each state scores the next target.
    fn score(&mut self, id: SequenceId, key: RequestKey, states: &[f32]) {
        let vocab = self.model.config.vocab;
        for states in states.chunks(SCORED_ROWS * self.runner.hidden_size()) {
            let logits = self.runner.logits(states);
            let Some(sequence) = self.sequences.get_mut(&id) else {
                return;
            };
            let Task::Score(continuation) = &mut sequence.task else {
                return;
            };
            let mut finite = true;
            for row in logits.chunks_exact(vocab) {
                let Some(&target) = continuation.targets.get(continuation.scored.len()) else {
                    break;
                };
                let scored = token_logprob(row, target, 0);
                finite &= scored.logprob.is_finite();
                continuation.scored.push(scored);
            }
            if !finite {
                let position = sequence.tokens.len();
                return self.fail(key, EngineError::NonFiniteLogits { position });
            }
        }
    }

    fn finish_continuation(&mut self, id: SequenceId, key: RequestKey) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        let Task::Score(continuation) = &mut sequence.task else {
            return;
        };
        let (index, label) = (continuation.index, continuation.label);
        let scored = std::mem::take(&mut continuation.scored);
        if label {
            let sum = scored.iter().map(|token| f64::from(token.logprob)).sum();
            self.note_likelihood(key, index, sum);
        } else {
            self.deliver(key, index, Output::Score(scored));
        }
        self.finish(id, key);
    }

    /// When the last label of a prompt is known, the prompt is classified.
    fn note_likelihood(&mut self, key: RequestKey, index: usize, sum: f64) {
        let Some(request) = self.requests.get_mut(&key) else {
            return;
        };
        let labels = Arc::clone(&request.labels);
        let prompt = index / labels.len();
        let Some(sums) = request.likelihoods.get_mut(prompt) else {
            return;
        };
        sums[index % labels.len()] = Some(sum);
        let known: Option<Vec<f64>> = sums.iter().copied().collect();
        if let Some(sums) = known {
            let probabilities = classify::softmax(&sums);
            let logits = sums.iter().map(|sum| *sum as f32).collect();
            self.deliver(
                key,
                prompt,
                Output::Classes {
                    labels,
                    probabilities,
                    logits,
                },
            );
        }
    }

    fn deliver(&mut self, key: RequestKey, index: usize, output: Output) {
        if let Some(request) = self.requests.get_mut(&key) {
            request.note_output(Instant::now());
            request.send(Event::Output { index, output });
        }
    }

    // --- the end ---

    /// Ends a sequence; the last one ends its request.
    fn finish(&mut self, id: SequenceId, key: RequestKey) {
        self.scheduler.finish(id);
        self.sequences.remove(&id);
        let Some(request) = self.requests.get_mut(&key) else {
            return;
        };
        request.open.retain(|open| *open != id);
        if request.open.is_empty() {
            let (usage, timings) = (request.usage, request.timings(Instant::now()));
            metrics::request_done(&usage, &timings);
            request.send(Event::Done { usage, timings });
            self.requests.remove(&key);
        }
    }
}

// === impl Generation ===

impl Generation {
    fn sample(
        &mut self,
        logits: &mut [f32],
    ) -> Result<(u32, Option<TokenLogprob>), crate::sampler::NonFinite> {
        let own = self.rules.logprobs.map(|_| logits.to_vec());
        let early = self.outputs < self.rules.conditions.min_tokens;
        let banned: &[u32] = if early { &self.rules.banned_early } else { &[] };
        let token = self.sampler.sample(logits, banned)?;
        let logprob = own
            .zip(self.rules.logprobs)
            .map(|(own, top)| token_logprob(&own, token, top));
        Ok((token, logprob))
    }

    /// Text that may be shown after `token`, and whether this was the end. `last`: the context is full.
    fn append(&mut self, token: u32, last: bool) -> (String, Option<End>) {
        self.outputs += 1;
        let rules = Arc::clone(&self.rules);
        let is_eos = rules.eos.contains(&token);
        if is_eos || rules.conditions.stop_token_ids.contains(&token) {
            let reason = if is_eos {
                FinishReason::Eos
            } else {
                FinishReason::StopToken
            };
            let end = End {
                reason,
                stop_string: None,
                stop_token: Some(token),
            };
            return self.close(String::new(), end);
        }
        // Only an id beyond the tokenizer's vocabulary has no text; models may have such rows.
        let piece = self.decoder.step(token).unwrap_or_default();
        if self.outputs >= rules.max_tokens || last {
            let end = End {
                reason: FinishReason::Length,
                stop_string: None,
                stop_token: None,
            };
            return self.close(piece, end);
        }
        if self.outputs < rules.conditions.min_tokens {
            return (self.filter.pass(&piece), None);
        }
        let filtered = self.filter.push(&piece);
        let end = filtered.matched.map(|index| self.stopped_by(index));
        (filtered.text, end)
    }

    /// The last text: what was held back, and characters that will never be whole. A stop string may still end it.
    fn close(&mut self, piece: String, end: End) -> (String, Option<End>) {
        let tokenizer_rest = self.decoder.clone().finish();
        let filtered = self.filter.push(&(piece + &tokenizer_rest));
        let mut text = filtered.text;
        if let Some(index) = filtered.matched {
            return (text, Some(self.stopped_by(index)));
        }
        text.push_str(&self.filter.finish());
        (text, Some(end))
    }

    fn stopped_by(&self, index: usize) -> End {
        let stop_string = self.rules.conditions.stop.get(index).cloned();
        End {
            reason: FinishReason::StopString,
            stop_string,
            stop_token: None,
        }
    }
}
