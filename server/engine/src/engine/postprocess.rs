//! From the model's states to tokens, text and results, and from those to events.
//!
//! Every event has its place in the channel before the step begins, so nothing here waits for a reader.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use espalier_adapters::head::Problem;
use espalier_adapters::ops::{TokenDraw, for_each};

use super::{Engine, StepOutput};
use crate::classify;
use crate::constraint::{self, Masker, Progress};
use crate::error::EngineError;
use crate::metrics;
use crate::model_runner::{Choice, OwnedStates};
use crate::request::{Candidate, Delta, Event, FinishReason, Output, Priority, TokenLogprob};
use crate::sampler::token_logprob;
use crate::scheduler::SequenceId;
use crate::sequence::{Generation, RequestKey, Sequence, Task};

/// Rows of logits held at once when continuations are scored: a row is as long as the vocabulary.
const SCORED_ROWS: usize = 32;

/// How a candidate ended, and by what.
struct End {
    reason: FinishReason,
    stop_string: Option<String>,
    stop_token: Option<u32>,
}

/// What became of a generation's row of logits.
struct Drawn {
    id: SequenceId,
    next: Result<Next, EngineError>,
}

/// A generation's next token, and what may be shown for it.
struct Next {
    token: u32,
    logprob: Option<TokenLogprob>,
    text: String,
    end: Option<End>,
}

/// A generation out of the book while its token is chosen.
struct Draw {
    sequence: Sequence,
    /// Tokens of the sequence so far.
    position: usize,
    /// The context is full after this token.
    last: bool,
    drawn: Drawn,
}

impl Draw {
    fn plain(&self) -> Option<TokenDraw> {
        match &self.sequence.task {
            Task::Generate(generation) => generation.plain(),
            _ => None,
        }
    }
}

impl Engine {
    pub(super) fn postprocess(&mut self, outputs: Vec<StepOutput>) {
        let mut drawn = self.draw_tokens(&outputs).into_iter().peekable();
        for output in outputs {
            let id = output.item.id;
            let Some(states) = output.states else {
                self.fail_sequence(id, "its step panicked");
                continue;
            };
            self.scheduler.complete(&output.item);
            let drawn = drawn.next_if(|drawn| drawn.id == id);
            let advance =
                AssertUnwindSafe(|| self.advance(id, states, drawn, output.item.completes));
            if catch_unwind(advance).is_err() {
                self.totals.panics += 1;
                metrics::panic_caught("postprocess");
                self.fail_sequence(id, "its postprocessing panicked");
            }
        }
    }

    /// The next tokens of all generations that have a state for one: one product, then row beside row.
    fn draw_tokens(&mut self, outputs: &[StepOutput]) -> Vec<Drawn> {
        let max_sequence = self.model.max_sequence_tokens;
        let mut drawing = Vec::with_capacity(outputs.len());
        let mut draws: Vec<Draw> = Vec::with_capacity(outputs.len());
        for output in outputs {
            let id = output.item.id;
            let Some(states) = output.states.clone().filter(|states| !states.is_empty()) else {
                continue;
            };
            let generates = |sequence: &Sequence| matches!(sequence.task, Task::Generate(_));
            if !self.sequences.get(&id).is_some_and(generates) {
                continue;
            }
            // Out of the book for a moment, so that threads may share them out.
            if let Some(sequence) = self.sequences.remove(&id) {
                let position = self.scheduler.tokens(id).len();
                let next = Err(EngineError::Internal {
                    detail: "its sampling panicked".to_owned(),
                });
                draws.push(Draw {
                    sequence,
                    position,
                    last: position + 1 >= max_sequence,
                    drawn: Drawn { id, next },
                });
                drawing.push(states);
            }
        }
        if !draws.is_empty() {
            let plain: Vec<_> = draws.iter().map(Draw::plain).collect();
            let states: Vec<_> = drawing
                .into_iter()
                .zip(&draws)
                .map(|(rows, draw)| {
                    let request = self.requests.get(&draw.sequence.request);
                    let adapters = request.map(|request| &request.adapters);
                    OwnedStates { rows, adapters }
                })
                .collect();
            let choices = self.runner.choose(&states, &plain);
            self.clock.lap(|times| &mut times.logits);
            draw_rows(choices, &mut draws, &self.masker);
            self.clock.lap(|times| &mut times.sampling);
        }
        let back = |draw: Draw| {
            self.sequences.insert(draw.drawn.id, draw.sequence);
            draw.drawn
        };
        draws.into_iter().map(back).collect()
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

    /// Makes of one sequence's new states what its task asks for. What is read of them here is finite; of those that give
    /// logits, the logits tell.
    fn advance(
        &mut self,
        id: SequenceId,
        rows: Range<usize>,
        drawn: Option<Drawn>,
        completes: bool,
    ) {
        // A sibling that failed in this step has taken the whole request with it.
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        let (key, position) = (sequence.request, self.scheduler.tokens(id).len());
        let states = match &sequence.task {
            Task::Classify { .. } | Task::Embed { .. } => self.runner.read_states(rows.clone()),
            Task::Generate(_) | Task::Score(_) => Vec::new(),
        };
        if !states.iter().all(|state| state.is_finite()) {
            return self.fail(key, EngineError::NonFiniteLogits { position });
        }
        match &mut sequence.task {
            Task::Generate(_) => {
                if let Some(drawn) = drawn {
                    self.advance_generation(key, drawn);
                }
            }
            Task::Classify { index, pooled } => {
                let index = *index;
                if let Some(state) = pooled.add(states, completes.then_some(position)) {
                    self.classify(key, index, &state);
                    self.finish(id, key);
                }
            }
            Task::Embed {
                index,
                normalize,
                pooled,
            } => {
                let (index, normalize) = (*index, *normalize);
                if let Some(mut vector) = pooled.add(states, completes.then_some(position)) {
                    if normalize {
                        classify::normalize(&mut vector);
                    }
                    self.deliver(key, index, Output::Embedding(vector));
                    self.finish(id, key);
                }
            }
            Task::Score(_) => {
                self.score(id, key, rows);
                if completes {
                    self.finish_continuation(id, key);
                }
            }
        }
    }

    // --- generation ---

    fn advance_generation(&mut self, key: RequestKey, drawn: Drawn) {
        let id = drawn.id;
        let next = match drawn.next {
            Ok(next) => next,
            Err(error) => return self.fail(key, error),
        };
        let Some(Sequence {
            task: Task::Generate(generation),
            ..
        }) = self.sequences.get(&id)
        else {
            return;
        };
        let token = next.token;
        let delta = Delta {
            candidate: generation.candidate,
            text: next.text,
            tokens: vec![token],
            logprobs: next.logprob.into_iter().collect(),
        };
        let finished = next.end.map(|end| Candidate {
            candidate: generation.candidate,
            finish_reason: end.reason,
            stop_string: end.stop_string,
            stop_token: end.stop_token,
            output_tokens: generation.outputs,
        });
        self.totals.output_tokens += 1;
        metrics::output_token();
        if let Some(request) = self.requests.get_mut(&key) {
            request.usage.output_tokens += 1;
            request.note_output(Instant::now());
            request.send(Event::Delta(delta));
        }
        match finished {
            None => self.scheduler.push_token(id, token),
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
        let Ok(head) = request.head() else { return };
        let logits = self.runner.score(&head.adapter, state);
        let labels = Arc::clone(&request.labels);
        let settings = head.adapter.head_settings();
        let (answer, problem) = (settings.answer(&logits), settings.problem);
        self.deliver(
            key,
            index,
            Output::Classes {
                labels,
                probabilities: answer.scores,
                logits,
                problem,
                out_of_scope: answer.out_of_scope,
            },
        );
    }

    /// Each state scores the next target.
    fn score(&mut self, id: SequenceId, key: RequestKey, rows: Range<usize>) {
        let vocab = self.model.config.vocab;
        for first in rows.clone().step_by(SCORED_ROWS) {
            let some = first..rows.end.min(first + SCORED_ROWS);
            let request = self.requests.get(&key);
            let states = OwnedStates {
                rows: some,
                adapters: request.map(|request| &request.adapters),
            };
            let logits = self.runner.logits(std::slice::from_ref(&states));
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
                let position = self.scheduler.tokens(id).len();
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
                    problem: Problem::SingleLabel,
                    out_of_scope: false,
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
            if request.priority == Priority::Interactive {
                metrics::request_done(&usage, &timings);
            }
            request.send(Event::Done { usage, timings });
            self.requests.remove(&key);
        }
    }
}

/// Chooses a token for each draw, one beside the other. A panic costs its own request.
fn draw_rows(choices: Vec<Choice<'_>>, draws: &mut [Draw], masker: &Masker) {
    let draw = |(choice, draw): &mut (Choice<'_>, &mut Draw)| {
        let next = AssertUnwindSafe(|| match &mut draw.sequence.task {
            Task::Generate(generation) => {
                Some(generation.next(choice, draw.position, draw.last, masker))
            }
            _ => None,
        });
        match catch_unwind(next) {
            Ok(Some(next)) => draw.drawn.next = next,
            Ok(None) => {}
            Err(_) => metrics::panic_caught("sampling"),
        }
    };
    let mut both: Vec<_> = choices.into_iter().zip(draws).collect();
    for_each(&mut both, draw);
}

// === impl Generation ===

impl Generation {
    /// How a device draws the next token; `None` where more is asked for than a draw from the logits as they are.
    fn plain(&self) -> Option<TokenDraw> {
        let rules = &self.rules;
        let banned = !rules.banned_always.is_empty()
            || (self.outputs < rules.conditions.min_tokens && !rules.banned_early.is_empty());
        if rules.logprobs.is_some() || self.constraint.is_some() || banned {
            return None;
        }
        self.sampler.plain(self.outputs)
    }

    /// Chooses a token for a sequence of `position` tokens; a row of logits is changed. `last`: the context is full after it.
    fn next(
        &mut self,
        choice: &mut Choice<'_>,
        position: usize,
        last: bool,
        masker: &Masker,
    ) -> Result<Next, EngineError> {
        let (token, logprob) = match choice {
            Choice::Row(logits) => self.sample(logits, position)?,
            Choice::Drawn(Some(token)) => (*token, None),
            Choice::Drawn(None) => return Err(EngineError::NonFiniteLogits { position }),
        };
        let progress = self.commit(token, masker)?;
        let (text, end) = self.append(token, progress, last);
        Ok(Next {
            token,
            logprob,
            text,
            end,
        })
    }

    /// The next token of a sequence of `position` tokens.
    fn sample(
        &mut self,
        logits: &mut [f32],
        position: usize,
    ) -> Result<(u32, Option<TokenLogprob>), EngineError> {
        let own = self.rules.logprobs.map(|_| logits.to_vec());
        let early = self.outputs < self.rules.conditions.min_tokens;
        let mut banned: &[u32] = if early {
            &self.rules.banned_early
        } else {
            &self.rules.banned_always
        };
        let outputs = self.outputs;
        let allowed = self.constraint.as_mut().map(constraint::Candidate::allowed);
        let allowed = allowed.transpose().map_err(|fault| fault.at(outputs))?;
        // Where a constrained text can only end, it ends, whatever was asked for.
        if allowed.as_ref().is_some_and(|set| set.is_within(banned)) {
            banned = &[];
        }
        let sampled = self.sampler.sample(logits, banned, allowed.as_deref());
        let token = sampled.map_err(|_| EngineError::NonFiniteLogits { position })?;
        let logprob = own
            .zip(self.rules.logprobs)
            .map(|(own, top)| token_logprob(&own, token, top));
        Ok((token, logprob))
    }

    /// Takes a token into the constraint, unless it ends the text.
    fn commit(&mut self, token: u32, masker: &Masker) -> Result<Progress, EngineError> {
        let outputs = self.outputs + 1;
        let rules = &self.rules;
        let ends = rules.eos.contains(&token) || rules.conditions.stop_token_ids.contains(&token);
        match &mut self.constraint {
            Some(constraint) if !ends => constraint
                .commit(token, masker)
                .map_err(|fault| fault.at(outputs)),
            _ => Ok(Progress::Open),
        }
    }

    /// Text that may be shown after `token`, and whether this was the end. `last`: the context is full.
    fn append(&mut self, token: u32, progress: Progress, last: bool) -> (String, Option<End>) {
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
        let full = self.outputs >= rules.max_tokens || last;
        if full || progress == Progress::Complete {
            let end = End {
                reason: match progress {
                    Progress::Complete => FinishReason::Complete,
                    Progress::Open => FinishReason::Length,
                },
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
