//! Who is asked: an Espalier server, or any that speaks OpenAI's HTTP. Each sends one call once,
//! without retries, and says when its tokens came. It knows no schedule and keeps no statistics.

mod espalier;
mod openai;
mod sse;

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

pub(crate) use espalier::{Access, Espalier, Sampling};
pub(crate) use openai::{OpenAi, Setup, Template};
use serde_json::Value;

use crate::{bench::workload::Call, error::Error};

/// A server to ask.
#[derive(Debug)]
pub(crate) enum Target {
    Espalier(Box<Espalier>),
    OpenAi(Box<OpenAi>),
}

/// What one call brought.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reply {
    /// When the first token came; none for calls that are answered in one message.
    pub(crate) first: Option<Instant>,
    /// When the last one came.
    pub(crate) last: Option<Instant>,
    /// Microseconds between messages that brought tokens.
    pub(crate) gaps: Vec<u32>,
    pub(crate) input_tokens: u32,
    pub(crate) output_tokens: u32,
    pub(crate) cached_tokens: u32,
    /// What the server itself measured.
    pub(crate) server: ServerTimes,
}

/// Microseconds as the server reports them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct ServerTimes {
    pub(crate) queue: Option<u32>,
    pub(crate) adapter_load: Option<u32>,
    pub(crate) first_token: Option<u32>,
    pub(crate) total: Option<u32>,
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// The stable reason of the server's ErrorInfo, or one of this side's, or a code.
    pub(crate) reason: String,
    pub(crate) message: String,
}

impl Refusal {
    fn new(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            message: message.into(),
        }
    }

    fn deadline(limit: std::time::Duration) -> Self {
        Self::from(Error::deadline(limit))
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let reason = if error.reason.is_empty() {
            format!("{:?}", error.code)
        } else {
            error.reason.clone()
        };
        Self::new(reason, error.message.clone())
    }
}

/// Tokens received so far over all calls, for whoever looks on.
#[derive(Debug, Default)]
pub(crate) struct Tokens(AtomicU64);

impl Tokens {
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self, tokens: u64) {
        self.0.fetch_add(tokens, Ordering::Relaxed);
    }
}

/// The moments at which tokens come, taken as they come.
#[derive(Debug, Default)]
struct Clock {
    first: Option<Instant>,
    last: Option<Instant>,
    gaps: Vec<u32>,
}

impl Clock {
    fn expecting(tokens: u32) -> Self {
        Self {
            gaps: Vec::with_capacity(tokens.min(4096) as usize),
            ..Self::default()
        }
    }

    /// A message with tokens has come.
    fn tick(&mut self) {
        let now = Instant::now();
        match self.last {
            Some(last) => {
                let gap = now.duration_since(last).as_micros();
                self.gaps.push(u32::try_from(gap).unwrap_or(u32::MAX));
            }
            None => self.first = Some(now),
        }
        self.last = Some(now);
    }
}

// === impl Target ===

impl Target {
    /// One call, once.
    pub(crate) async fn send(&self, call: Call) -> Result<Reply, Refusal> {
        match self {
            Self::Espalier(target) => target.send(call).await,
            Self::OpenAi(target) => target.send(call).await,
        }
    }

    /// What the server says of itself, for the report.
    pub(crate) async fn describe(&self) -> Value {
        match self {
            Self::Espalier(target) => target.describe().await,
            Self::OpenAi(target) => target.describe().await,
        }
    }

    /// vLLM's name for the kind of server.
    pub(crate) fn backend(&self) -> &'static str {
        match self {
            Self::Espalier(_) => "espalier",
            Self::OpenAi(_) => "openai",
        }
    }

    pub(crate) fn tokens(&self) -> &Tokens {
        match self {
            Self::Espalier(target) => &target.tokens,
            Self::OpenAi(target) => &target.tokens,
        }
    }

    pub(crate) fn connections(&self) -> Option<usize> {
        match self {
            Self::Espalier(target) => Some(target.connections()),
            // HTTP/1.1 opens as many as there are calls in flight.
            Self::OpenAi(_) => None,
        }
    }
}
