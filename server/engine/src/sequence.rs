//! What the engine remembers of a request while it lives: its way back, its lease, its times, and for each of its
//! sequences what is to be made of the model's output. The tokens themselves are with the scheduler.

use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_adapters::batch::Mixture;
use espalier_adapters::text::StreamDecoder;
use espalier_adapters::version::VersionDigest;
use tokio::sync::mpsc;

use crate::adapter_pool::AdapterLease;
use crate::constraint;
use crate::detokenizer::StopFilter;
use crate::error::EngineError;
use crate::handle::Ticket;
use crate::merger::MergedWeights;
use crate::metrics;
use crate::pooling::Pooled;
use crate::request::{
    Event, Priority, Started, StopConditions, TargetVersion, Timings, TokenLogprob, Usage,
};
use crate::sampler::Sampler;
use crate::scheduler::SequenceId;

/// Events kept free for one sequence's step: a delta and its end.
const EVENTS_PER_SEQUENCE: usize = 2;
/// Events kept free for the request: its start and its end, and one to say why it failed.
const EVENTS_PER_REQUEST: usize = 3;

/// One request for its whole life; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RequestKey(pub(crate) u64);

/// A request that waits or runs.
pub(crate) struct ActiveRequest {
    pub(crate) id: String,
    pub(crate) tenant: Arc<str>,
    pub(crate) priority: Priority,
    /// The versions that answer, with their weights.
    pub(crate) target: Vec<TargetVersion>,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) deadline: Option<Instant>,
    pub(crate) received: Instant,
    pub(crate) submitted: Instant,
    /// Held until the first step.
    pub(crate) ticket: Option<Ticket>,
    /// One for each version of the target, held until the end; none for the base model or while an adapter loads.
    pub(crate) leases: Vec<AdapterLease>,
    /// What is added to the base: the leased adapters with their weights.
    pub(crate) adapters: Mixture,
    /// Which of the target's versions were there at the last look (bit by bit), and how often one had gone again.
    pub(crate) gathered: (u32, u32),
    pub(crate) seed: u64,
    pub(crate) adapter_load: Duration,
    /// When its first step began.
    pub(crate) started: Option<Instant>,
    pub(crate) queue: Duration,
    pub(crate) first_output: Option<Instant>,
    pub(crate) last_output: Option<Instant>,
    pub(crate) usage: Usage,
    /// Those that have not ended.
    pub(crate) open: Vec<SequenceId>,
    /// Since when the reader has left no room for any of them.
    pub(crate) blocked_since: Option<Instant>,
    /// For label likelihood: each prompt's labels' summed log-probabilities, as they become known.
    pub(crate) likelihoods: Vec<Vec<Option<f64>>>,
    pub(crate) labels: Arc<[String]>,
}

/// One row of tokens in the KV cache, and its purpose.
pub(crate) struct Sequence {
    pub(crate) request: RequestKey,
    /// Whether its prompt is not yet counted as cached or computed: a prompt that several share counts once.
    pub(crate) brings_prompt: bool,
    pub(crate) task: Task,
}

/// What is made of a sequence's states.
pub(crate) enum Task {
    /// The last state gives the next token.
    Generate(Box<Generation>),
    /// One state goes through the adapter's head.
    Classify { index: usize, pooled: Pooled },
    /// One state is the answer.
    Embed {
        index: usize,
        normalize: bool,
        pooled: Pooled,
    },
    /// Each state from the last of the prompt on scores the token that follows.
    Score(Continuation),
}

/// A candidate in the making.
pub(crate) struct Generation {
    pub(crate) candidate: usize,
    pub(crate) sampler: Sampler,
    pub(crate) decoder: StreamDecoder,
    pub(crate) filter: StopFilter,
    pub(crate) rules: Arc<StopRules>,
    /// Where its text stands in the request's constraint.
    pub(crate) constraint: Option<constraint::Candidate>,
    pub(crate) outputs: usize,
}

/// When a candidate ends; shared by all of a request.
pub(crate) struct StopRules {
    pub(crate) conditions: StopConditions,
    /// The model's stop ids; empty with `ignore_eos`.
    pub(crate) eos: Vec<u32>,
    /// All ids that stop.
    pub(crate) banned_early: Vec<u32>,
    /// The model's stop ids where they must not end a constrained text as long as it can go on (`ignore_eos`).
    pub(crate) banned_always: Vec<u32>,
    /// Output tokens, the context's end included.
    pub(crate) max_tokens: usize,
    pub(crate) logprobs: Option<usize>,
}

/// Given tokens whose log-probabilities are wanted. The last one needs no state, so it is not among the sequence's tokens.
pub(crate) struct Continuation {
    /// Index of the continuation (Score), or `prompt * labels + label`.
    pub(crate) index: usize,
    /// The tokens to score follow this many.
    pub(crate) from: usize,
    pub(crate) targets: Vec<u32>,
    pub(crate) scored: Vec<TokenLogprob>,
    /// Part of a label likelihood rather than of a Score.
    pub(crate) label: bool,
}

// === impl ActiveRequest ===

impl ActiveRequest {
    /// Takes the leases of the whole target, in its order.
    ///
    /// # Errors
    /// [`EngineError::InvalidField`] when these adapters cannot answer together: DoRA's gain, (IA)3's vectors and whole tensors change
    /// what the base makes, so they have neither weight nor company.
    pub(crate) fn hold(&mut self, leases: Vec<AdapterLease>) -> Result<(), EngineError> {
        let field = "target";
        let plain = matches!(self.target[..], [alone] if alone.weight == 1.0);
        let gains = leases.iter().position(|lease| !lease.adapter.only_adds());
        if let Some(index) = gains.filter(|_| !plain) {
            let digest = self.target[index].digest;
            let adapter = &leases[index].adapter;
            let kind = match (adapter.has_whole(), adapter.has_gains()) {
                (true, _) => "an unfrozen version, whose tensors stand in the base model's place",
                (false, true) => "a DoRA adapter, whose gain scales the base model's output too",
                (false, false) => {
                    "an (IA)3 adapter, whose vectors scale the base model's output too"
                }
            };
            let reason = format!("{digest} is {kind}: name it alone, with weight 1");
            return Err(EngineError::InvalidField { field, reason });
        }
        let parts = leases.iter().zip(&self.target);
        let parts = parts.map(|(lease, target)| (Arc::clone(&lease.adapter), target.weight));
        let mixture = Mixture::new(parts.collect());
        self.leases = leases;
        self.adapters = match self.merged() {
            // The update is in the weights already.
            Some(_) => Mixture::default(),
            None => mixture,
        };
        Ok(())
    }

    /// The version that answers alone and as it is.
    pub(crate) fn alone(&self) -> Option<VersionDigest> {
        match self.target[..] {
            [alone] if alone.weight == 1.0 => Some(alone.digest),
            _ => None,
        }
    }

    /// The weights that answer in the base's place, as they were when the request was admitted.
    pub(crate) fn merged(&self) -> Option<&Arc<MergedWeights>> {
        self.alone()?;
        self.leases.first().and_then(AdapterLease::merged)
    }

    /// The adapter whose head classifies.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] unless exactly one has a head.
    pub(crate) fn head(&self) -> Result<&AdapterLease, EngineError> {
        let unsupported = |what: &str| EngineError::Unsupported {
            what: what.to_owned(),
        };
        let mut heads = self.leases.iter().filter(|lease| !lease.labels.is_empty());
        let head = heads.next().ok_or_else(|| {
            unsupported("no adapter of the target has a classification head; name labels to score them by likelihood")
        })?;
        match heads.next() {
            None => Ok(head),
            Some(_) => Err(unsupported(
                "several adapters of the target have a classification head, and only one can answer",
            )),
        }
    }

    /// Sequences that may run while the reader has not taken more: every event of a step has its place before the step
    /// begins, so that sending never waits.
    pub(crate) fn sequences_with_room(&self) -> usize {
        self.events.capacity().saturating_sub(EVENTS_PER_REQUEST) / EVENTS_PER_SEQUENCE
    }

    /// Sends an event for which there is room. A reader that is gone is noticed before the next step.
    pub(crate) fn send(&self, event: Event) {
        let _ = self.events.try_send(event);
    }
}

// === impl Task ===

impl Task {
    /// Forgets what was computed: the sequence lost its blocks and begins again. A generation keeps its tokens, and
    /// with them everything that it has sent.
    pub(crate) fn restart(&mut self) {
        match self {
            Task::Generate(_) => {}
            Task::Classify { pooled, .. } | Task::Embed { pooled, .. } => pooled.restart(),
            Task::Score(continuation) => continuation.scored.clear(),
        }
    }

    /// How many of the first tokens' states nobody wants, whatever is known of the sequence: they may come from the prefix
    /// cache.
    pub(crate) fn reusable(&self) -> usize {
        match self {
            Task::Classify { pooled, .. } | Task::Embed { pooled, .. } => pooled.reusable(),
            Task::Score(continuation) => continuation.from - 1,
            Task::Generate(_) => usize::MAX,
        }
    }

    /// The rows of a chunk (`start..start + rows`, ending at the last token if `completes`) whose states are wanted,
    /// counted from the chunk's first.
    pub(crate) fn wanted(
        &self,
        start: usize,
        rows: usize,
        completes: bool,
    ) -> std::ops::Range<usize> {
        match self {
            Task::Classify { pooled, .. } | Task::Embed { pooled, .. } => {
                pooled.wanted(rows, completes)
            }
            Task::Score(continuation) => {
                (continuation.from - 1).saturating_sub(start).min(rows)..rows
            }
            Task::Generate(_) if completes => rows - 1..rows,
            Task::Generate(_) => rows..rows,
        }
    }
}

// === times ===

impl ActiveRequest {
    /// The first step that holds one of its sequences begins.
    pub(crate) fn start(&mut self, now: Instant) {
        if self.started.is_some() {
            return;
        }
        self.started = Some(now);
        self.ticket = None;
        self.queue = (now - self.submitted).saturating_sub(self.adapter_load);
        // Bulk work waits by design: it would hide how long calls wait.
        if self.priority == Priority::Interactive {
            metrics::queued(self.queue);
        }
        self.send(Event::Started(Started {
            queue: self.queue,
            adapter_load: self.adapter_load,
            seed: self.seed,
        }));
    }

    /// Books the time of a token or result.
    pub(crate) fn note_output(&mut self, now: Instant) {
        match self.last_output.replace(now) {
            None => self.first_output = Some(now),
            Some(before) if self.priority == Priority::Interactive => {
                metrics::between_tokens(now - before);
            }
            Some(_) => {}
        }
    }

    pub(crate) fn deadline_error(&self, now: Instant) -> EngineError {
        if self.started.is_some() {
            EngineError::DeadlineInDecode {
                output_tokens: self.usage.output_tokens,
            }
        } else {
            let waited = (now - self.submitted).as_millis();
            EngineError::DeadlineInQueue {
                waited_ms: u64::try_from(waited).unwrap_or(u64::MAX),
            }
        }
    }

    pub(crate) fn timings(&self, now: Instant) -> Timings {
        Timings {
            queue: self.queue,
            adapter_load: self.adapter_load,
            time_to_first_token: self
                .first_output
                .unwrap_or(now)
                .saturating_duration_since(self.received),
            total: now.saturating_duration_since(self.received),
        }
    }
}
