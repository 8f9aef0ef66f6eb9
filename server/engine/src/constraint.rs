//! Constrained output: a JSON schema, regex, list of choices or grammar as a set of tokens that may come next. The
//! grammars, their derivatives and the walk over the vocabulary are llguidance's; here is what surrounds them: the
//! model's words, limits, threads and a cache.
//!
//! ```text
//! server --source--> compiler (threads of its own, bounded queue, cache) --Constraint--> request
//! engine thread:  restrict logits, sample, commit ... --machine--> masker (one thread, during the forward) --mask-->
//! ```
//!
//! Knows no proto and no tool format. A constraint's text comes from a client: whatever it makes the parser do is
//! bounded in bytes, fuel, states and time, and a panic costs the one request.

mod cache;
mod candidate;
mod compiler;
mod machine;
mod masker;
mod vocabulary;

#[cfg(test)]
pub(crate) mod tests;

use std::sync::Arc;
use std::time::Duration;

pub(crate) use candidate::{Candidate, Progress};
pub(crate) use compiler::Compiler;
pub use compiler::spaced_schema;
pub(crate) use machine::TokenSet;
use machine::{Fault, Machine};
pub(crate) use masker::Masker;

use crate::error::EngineError;

/// Stack of the threads that run the parser, whose recursion follows the depth of a client's grammar: reserved, and
/// touched only by deep ones.
const STACK_BYTES: usize = 128 << 20;

/// What the output must match, from its first character to its last.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ConstraintSource {
    /// A JSON value that satisfies this JSON schema.
    JsonSchema(String),
    /// A text that this regular expression matches as a whole.
    Regex(String),
    /// One of these texts.
    Choices(Vec<String>),
    /// A text of this grammar, in llguidance's dialect of Lark.
    Grammar(String),
}

/// A compiled constraint, ready for one request: its candidates each go through it on their own. Cheap to clone.
#[derive(Clone)]
pub struct Constraint(Arc<Prepared>);

/// A machine at its beginning, and the tokens with which an output may begin.
struct Prepared {
    machine: Machine,
    first: Arc<TokenSet>,
}

/// Bounds of constraints: what a client may send, how much work one may cause, and what is kept.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConstraintLimits {
    /// Bytes of a constraint's text.
    pub max_bytes: usize,
    /// How long a request waits for its constraint, the compiler's queue included.
    pub compile_timeout: Duration,
    /// Constraints that may wait for the compiler.
    pub max_waiting: usize,
    /// Work of compiling, in steps of the lexer's construction (about 50,000 a millisecond).
    pub compile_fuel: u64,
    /// Symbols of a compiled grammar.
    pub max_grammar_symbols: usize,
    /// Work of one token's mask, in steps of the lexer (about 14,000 a millisecond).
    pub token_fuel: u64,
    /// Items that the parser may make for one token's mask (about 20,000 a millisecond).
    pub token_items: usize,
    /// States of the lexer, which grow while a text is generated: about 2 KB each.
    pub max_lexer_states: usize,
    /// Compiled constraints kept.
    pub cache_entries: usize,
    /// Their bytes, estimated.
    pub cache_bytes: usize,
}

// === impl ConstraintLimits ===

impl Default for ConstraintLimits {
    fn default() -> Self {
        ConstraintLimits {
            max_bytes: 64 << 10,
            compile_timeout: Duration::from_secs(5),
            max_waiting: 64,
            compile_fuel: 1_000_000,
            max_grammar_symbols: 200_000,
            token_fuel: 100_000,
            token_items: 50_000,
            max_lexer_states: 20_000,
            cache_entries: 256,
            cache_bytes: 64 << 20,
        }
    }
}

// === impl ConstraintSource ===

impl ConstraintSource {
    /// The kind's name, as errors and metrics say it.
    pub fn kind(&self) -> &'static str {
        match self {
            ConstraintSource::JsonSchema(_) => "json_schema",
            ConstraintSource::Regex(_) => "regex",
            ConstraintSource::Choices(_) => "choices",
            ConstraintSource::Grammar(_) => "grammar",
        }
    }

    /// Bytes of its text.
    pub fn bytes(&self) -> usize {
        match self {
            ConstraintSource::JsonSchema(text)
            | ConstraintSource::Regex(text)
            | ConstraintSource::Grammar(text) => text.len(),
            ConstraintSource::Choices(choices) => choices.iter().map(String::len).sum(),
        }
    }

    fn invalid(&self, reason: impl Into<String>) -> EngineError {
        EngineError::ConstraintInvalid {
            kind: self.kind(),
            reason: reason.into(),
        }
    }

    fn too_complex(&self, reason: impl Into<String>) -> EngineError {
        EngineError::ConstraintTooComplex {
            kind: self.kind(),
            reason: reason.into(),
        }
    }
}

// === impl Constraint ===

impl Constraint {
    /// The state of one candidate, at its beginning.
    pub(crate) fn candidate(&self) -> Candidate {
        Candidate::new(self.0.machine.sibling(), Arc::clone(&self.0.first))
    }
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint").finish_non_exhaustive()
    }
}

// === impl Fault ===

impl Fault {
    /// What a request is told whose output cannot go on after `output_tokens`.
    pub(crate) fn at(self, output_tokens: usize) -> EngineError {
        match self {
            Fault::DeadEnd => EngineError::ConstraintDeadEnd { output_tokens },
            Fault::TooComplex(reason) => EngineError::ConstraintTooComplex {
                kind: "constraint",
                reason: format!("after {output_tokens} output tokens: {reason}"),
            },
            Fault::Broken(detail) => EngineError::Internal { detail },
        }
    }
}
