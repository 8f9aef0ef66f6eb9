//! The way back: one request's events, either gathered into a reply or passed on as a stream. Dropping `Events` drops
//! the engine's receiver, which is how a client that went away cancels its work; the deadline is watched here too,
//! because a stuck step must not keep a client waiting beyond it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_adapters::text::Tokenizer;
use espalier_engine::error::EngineError;
use espalier_engine::request::{
    Candidate, Event, FinishReason, Output, Priority, Timings, TokenLogprob, Usage,
};
use espalier_proto::v1;
use espalier_proto::v1::generate_chunk::Event as Chunk;
use futures::Stream;
use tokio::sync::mpsc;

use super::tools::{Readers, ToolUse};
use crate::convert::{count, reply};
use crate::services::Call;
use crate::status::Refusal;
use crate::telemetry::metric;

/// What is done, as the OpenTelemetry conventions name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Generate,
    Chat,
    Classify,
    Embed,
    Score,
}

/// The events of one request, with its deadline and its numbers.
pub(super) struct Events {
    receiver: mpsc::Receiver<Event>,
    deadline: Option<Instant>,
    /// When waiting for the first step has lasted too long. Bulk work waits as long as it takes.
    patience: Option<Instant>,
    started: bool,
    output_tokens: usize,
    readers: Readers,
    record: Record,
}

/// Written down when the request ends, however it ends.
struct Record {
    operation: Operation,
    model: String,
    priority: Priority,
    received: Instant,
    error: Option<&'static str>,
    finished: bool,
}

/// Everything that a request gave, gathered.
#[derive(Debug, Default)]
pub(super) struct Collected {
    pub(super) candidates: BTreeMap<usize, Gathered>,
    outputs: BTreeMap<usize, Output>,
    pub(super) usage: Usage,
    pub(super) timings: Timings,
}

/// One candidate, gathered.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    text: String,
    pub(super) tokens: Vec<u32>,
    logprobs: Vec<TokenLogprob>,
    tool_calls: Vec<v1::ToolCall>,
    end: Option<Candidate>,
}

// === impl Events ===

impl Events {
    pub(super) fn new(
        receiver: mpsc::Receiver<Event>,
        call: &Call,
        operation: Operation,
        model: &str,
        max_wait: Duration,
    ) -> Self {
        let record = Record {
            operation,
            model: model.to_owned(),
            priority: call.priority,
            received: call.received,
            error: None,
            finished: false,
        };
        Events {
            receiver,
            deadline: call.deadline,
            patience: (call.priority == Priority::Interactive).then(|| call.received + max_wait),
            started: false,
            output_tokens: 0,
            readers: Readers::new(None),
            record,
        }
    }

    /// The same, with tool calls read out of the texts.
    pub(super) fn with_tools(mut self, tools: Option<ToolUse>) -> Self {
        self.readers = Readers::new(tools);
        self
    }

    /// The next event; an error is the last thing that comes.
    async fn next(&mut self) -> Result<Event, Refusal> {
        // Only waiting is limited by patience: a request that runs has its deadline.
        let limit = match (self.started, self.deadline) {
            (true, deadline) => deadline,
            (false, deadline) => deadline.into_iter().chain(self.patience).min(),
        };
        let event = match limit {
            None => self.receiver.recv().await,
            Some(limit) => tokio::select! {
                biased;
                event = self.receiver.recv() => event,
                () = tokio::time::sleep_until(limit.into()) => {
                    let refusal = if self.deadline == Some(limit) { self.late() } else { self.waited() };
                    return Err(self.fail(refusal));
                }
            },
        };
        match event {
            Some(Event::Failed(error)) => Err(self.fail(Refusal::from(error))),
            None => Err(self.fail(Refusal::from(EngineError::Stopped))),
            Some(event) => {
                self.note(&event);
                Ok(event)
            }
        }
    }

    fn late(&self) -> Refusal {
        Refusal::from(if self.started {
            EngineError::DeadlineInDecode {
                output_tokens: self.output_tokens,
            }
        } else {
            EngineError::DeadlineInQueue {
                waited_ms: u64::try_from(self.record.received.elapsed().as_millis())
                    .unwrap_or(u64::MAX),
            }
        })
    }

    fn waited(&self) -> Refusal {
        let waited = self.record.received.elapsed().as_millis();
        let message = format!(
            "the request waited {waited} ms for its first step, the limit is max_queue_wait"
        );
        Refusal::unavailable("SERVER_OVERLOADED", message, Duration::from_secs(1))
            .with("waited_ms", waited)
    }

    fn fail(&mut self, refusal: Refusal) -> Refusal {
        self.record.error = Some(refusal.reason());
        self.receiver.close();
        refusal
    }

    fn note(&mut self, event: &Event) {
        match event {
            Event::Started(_) => self.started = true,
            Event::Delta(delta) => self.output_tokens += delta.tokens.len(),
            Event::Done { .. } => self.record.finished = true,
            Event::Finished(_) | Event::Output { .. } | Event::Failed(_) => {}
        }
    }

    /// Waits for the end.
    pub(super) async fn collect(mut self) -> Result<Collected, Refusal> {
        let mut all = Collected::default();
        loop {
            match self.next().await? {
                Event::Started(_) | Event::Failed(_) => {}
                Event::Delta(mut delta) => {
                    let calls = self.readers.read(&mut delta);
                    let candidate = all.candidates.entry(delta.candidate).or_default();
                    candidate.text.push_str(&delta.text);
                    candidate.tokens.extend(delta.tokens);
                    candidate.logprobs.extend(delta.logprobs);
                    candidate.tool_calls.extend(calls);
                }
                Event::Finished(end) => {
                    let candidate = all.candidates.entry(end.candidate).or_default();
                    let (text, calls) = self.readers.finish(end.candidate);
                    candidate.text.push_str(&text);
                    candidate.tool_calls.extend(calls);
                    candidate.end = Some(end);
                }
                Event::Output { index, output } => {
                    all.outputs.insert(index, output);
                }
                Event::Done { usage, timings } => {
                    all.usage = usage;
                    all.timings = timings;
                    return Ok(all);
                }
            }
        }
    }

    /// The events as chunks; ends after `ended` or after the first error.
    pub(super) fn into_stream(
        self,
        tokenizer: Arc<Tokenizer>,
    ) -> impl Stream<Item = Result<Chunk, Refusal>> + Send {
        let start = Some((self, 0usize, None::<Chunk>));
        futures::stream::unfold(start, move |state| {
            let tokenizer = Arc::clone(&tokenizer);
            async move {
                let (mut events, mut longest, ready) = state?;
                if let Some(chunk) = ready {
                    return Some((Ok(chunk), Some((events, longest, None))));
                }
                loop {
                    let chunk = match events.next().await {
                        Err(refusal) => return Some((Err(refusal), None)),
                        Ok(Event::Delta(mut delta)) => {
                            let calls = events.readers.read(&mut delta);
                            Chunk::Delta(reply::delta(delta, calls, &tokenizer))
                        }
                        Ok(Event::Finished(end)) => {
                            longest = longest.max(end.output_tokens);
                            let (text, tool_calls) = events.readers.finish(end.candidate);
                            let index = count(end.candidate);
                            let finished = Chunk::Finished(reply::finished(end));
                            if text.is_empty() && tool_calls.is_empty() {
                                finished
                            } else {
                                // What was held back comes before the end.
                                let last = v1::TokenDelta {
                                    index,
                                    text,
                                    tool_calls,
                                    ..Default::default()
                                };
                                let next = Some((events, longest, Some(finished)));
                                return Some((Ok(Chunk::Delta(last)), next));
                            }
                        }
                        Ok(Event::Done { usage, timings }) => {
                            let ended = v1::StreamEnded {
                                usage: Some(reply::usage(usage)),
                                timings: Some(reply::timings(timings, longest)),
                            };
                            return Some((Ok(Chunk::Ended(ended)), None));
                        }
                        // The stream's own first message has said that it began.
                        Ok(Event::Started(_) | Event::Output { .. } | Event::Failed(_)) => continue,
                    };
                    return Some((Ok(chunk), Some((events, longest, None))));
                }
            }
        })
    }
}

// === impl Collected ===

impl Collected {
    /// Adds another request's numbers; requests of one call run side by side, so times are not summed.
    pub(super) fn add(&mut self, other: &Collected) {
        self.usage.input_tokens += other.usage.input_tokens;
        self.usage.output_tokens += other.usage.output_tokens;
        self.usage.cached_input_tokens += other.usage.cached_input_tokens;
        self.usage.adapter_loads += other.usage.adapter_loads;
        let longer = |a: Duration, b: Duration| a.max(b);
        self.timings = Timings {
            queue: longer(self.timings.queue, other.timings.queue),
            adapter_load: longer(self.timings.adapter_load, other.timings.adapter_load),
            time_to_first_token: longer(
                self.timings.time_to_first_token,
                other.timings.time_to_first_token,
            ),
            total: longer(self.timings.total, other.timings.total),
        };
    }

    pub(super) fn classes(&self) -> Result<Vec<v1::Classification>, Refusal> {
        self.each(|output| match output {
            Output::Classes {
                labels,
                probabilities,
                logits,
                problem,
                out_of_scope,
            } => Some(reply::classes(
                labels,
                (probabilities, logits),
                (*problem, *out_of_scope),
            )),
            Output::Embedding(_) | Output::Score(_) => None,
        })
    }

    pub(super) fn embeddings(&self) -> Result<Vec<Vec<f32>>, Refusal> {
        self.each(|output| match output {
            Output::Embedding(vector) => Some(vector.clone()),
            Output::Classes { .. } | Output::Score(_) => None,
        })
    }

    pub(super) fn scores(&self) -> Result<Vec<Vec<TokenLogprob>>, Refusal> {
        self.each(|output| match output {
            Output::Score(tokens) => Some(tokens.clone()),
            Output::Classes { .. } | Output::Embedding(_) => None,
        })
    }

    /// Outputs in the order of the inputs.
    fn each<T>(&self, read: impl Fn(&Output) -> Option<T>) -> Result<Vec<T>, Refusal> {
        self.outputs
            .values()
            .map(|output| {
                read(output)
                    .ok_or_else(|| Refusal::internal("the engine gave an output of another kind"))
            })
            .collect()
    }
}

// === impl Gathered ===

impl Gathered {
    pub(super) fn to_proto(&self, index: usize, tokenizer: &Tokenizer) -> v1::Candidate {
        let reason = self
            .end
            .as_ref()
            .map_or(FinishReason::Length, |end| end.finish_reason);
        v1::Candidate {
            index: count(index),
            text: self.text.clone(),
            token_ids: self.tokens.clone(),
            finish_reason: reply::finish_reason(reason).into(),
            stop_match: self
                .end
                .as_ref()
                .and_then(|end| end.stop_string.clone())
                .unwrap_or_default(),
            logprobs: self
                .logprobs
                .iter()
                .map(|entry| reply::logprob(entry, tokenizer))
                .collect(),
            tool_calls: self.tool_calls.clone(),
        }
    }
}

// === impl Record ===

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Operation::Generate => "text_completion",
            Operation::Chat => "chat",
            Operation::Classify => "classify",
            Operation::Embed => "embeddings",
            Operation::Score => "score",
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // Bulk items are counted by those who send them; their waits say nothing about how the server answers calls.
        if self.priority == Priority::Bulk {
            return;
        }
        let outcome = match self.error {
            Some(reason) => reason,
            None if self.finished => "",
            None => "CANCELLED",
        };
        metrics::histogram!(
            metric::GEN_AI_DURATION,
            "gen_ai_operation_name" => self.operation.name(),
            "gen_ai_request_model" => self.model.clone(),
            "error_type" => outcome
        )
        .record(self.received.elapsed().as_secs_f64());
    }
}
