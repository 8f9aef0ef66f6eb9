//! From a constraint's text to a machine: on two threads of its own, because a hard schema takes a second and neither
//! the engine nor the server's calls may wait for it. Work is bounded by fuel, so that a thread always comes back; the
//! time limit bounds what a caller waits. A constraint that came too late is still kept: a second try finds it.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use espalier_adapters::text::Tokenizer;
use llguidance::ParserFactory;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use toktrie::InferenceCapabilities;

use super::cache::{Cache, Key};
use super::machine::{Fault, Machine};
use super::{Constraint, ConstraintLimits, ConstraintSource, Prepared, STACK_BYTES, vocabulary};
use crate::error::EngineError;
use crate::handle::RETRY_AFTER;
use crate::metrics;

const THREADS: usize = 2;
/// What JSON may have between its parts: one space, or a line break and an indent. Without an upper end a model could
/// write spaces until its tokens are used up.
const JSON_SPACE: &str = r"\x20|\x0A[\x20\x09]{0,32}";
/// Bytes of a compiled grammar beside its lexer's tables, for each byte of its text: estimated.
const GRAMMAR_BYTES_PER_BYTE: usize = 64;

/// The way to the compiler's threads, which end with the last clone.
#[derive(Clone)]
pub(crate) struct Compiler {
    shared: Arc<Shared>,
    queue: SyncSender<Job>,
}

struct Shared {
    tokenizer: Arc<Tokenizer>,
    vocab: usize,
    stop_ids: Vec<u32>,
    limits: ConstraintLimits,
    /// The trie of the vocabulary and its slices, made for the first constraint, because most servers never see one.
    factory: OnceLock<Result<ParserFactory, String>>,
    cache: Mutex<Cache>,
}

struct Job {
    key: Key,
    source: ConstraintSource,
    reply: oneshot::Sender<Result<Constraint, EngineError>>,
}

// === impl Compiler ===

impl Compiler {
    /// Starts the threads. `vocab` and `stop_ids` are the model's.
    pub(crate) fn start(
        tokenizer: Arc<Tokenizer>,
        vocab: usize,
        stop_ids: Vec<u32>,
        limits: ConstraintLimits,
    ) -> std::io::Result<Self> {
        let (queue, jobs) = sync_channel(limits.max_waiting);
        let shared = Arc::new(Shared {
            tokenizer,
            vocab,
            stop_ids,
            cache: Mutex::new(Cache::new(limits.cache_entries, limits.cache_bytes)),
            limits,
            factory: OnceLock::new(),
        });
        let jobs = Arc::new(Mutex::new(jobs));
        for _ in 0..THREADS {
            let (shared, jobs) = (Arc::clone(&shared), Arc::clone(&jobs));
            std::thread::Builder::new()
                .name("constraints".to_owned())
                .stack_size(STACK_BYTES)
                .spawn(move || while shared.serve(&jobs) {})?;
        }
        Ok(Compiler { shared, queue })
    }

    /// Compiles a constraint, or takes it from the cache.
    ///
    /// # Errors
    /// [`EngineError::ConstraintInvalid`], [`EngineError::ConstraintTooComplex`], [`EngineError::Overloaded`] when too
    /// many wait.
    pub(crate) async fn compile(
        &self,
        tenant: &str,
        source: ConstraintSource,
    ) -> Result<Constraint, EngineError> {
        let limits = &self.shared.limits;
        if source.bytes() > limits.max_bytes {
            let reason = format!(
                "has {} bytes, the limit is {} bytes",
                source.bytes(),
                limits.max_bytes
            );
            return Err(source.too_complex(reason));
        }
        let key = Key::new(tenant, &source);
        if let Some(found) = self.shared.cached(&key) {
            metrics::constraint_lookup(true);
            return Ok(found);
        }
        metrics::constraint_lookup(false);
        let late = source.too_complex(format!(
            "is not compiled after {} ms, the limit of time; try again later or make it smaller",
            limits.compile_timeout.as_millis()
        ));
        let (reply, answer) = oneshot::channel();
        let job = Job { key, source, reply };
        self.queue.try_send(job).map_err(|refused| match refused {
            TrySendError::Full(_) => EngineError::Overloaded {
                waiting: limits.max_waiting,
                limit: limits.max_waiting,
                retry_after: RETRY_AFTER,
            },
            TrySendError::Disconnected(_) => EngineError::Stopped,
        })?;
        match tokio::time::timeout(limits.compile_timeout, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(EngineError::Stopped),
            Err(_) => Err(late),
        }
    }
}

#[cfg(test)]
impl Compiler {
    pub(super) fn cached(&self) -> usize {
        self.shared.cache().entries()
    }

    pub(super) fn has(&self, tenant: &str, source: &ConstraintSource) -> bool {
        self.shared.cache().get(&Key::new(tenant, source)).is_some()
    }
}

// === impl Shared ===

impl Shared {
    /// Takes one job; false when nobody can send any more.
    fn serve(&self, jobs: &Mutex<Receiver<Job>>) -> bool {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { key, source, reply }) = job else {
            return false;
        };
        // Many may have asked for the same while the first one's was compiled.
        let result = match self.cached(&key) {
            Some(found) => Ok(found),
            None => {
                let since = Instant::now();
                let compiled = self.compile(&source);
                metrics::constraint_compiled(compiled.as_ref().err(), since.elapsed());
                compiled.map(|prepared| self.keep(key, &source, prepared))
            }
        };
        let _ = reply.send(result);
        true
    }

    /// The request's own copy: what its texts make the lexer find out fills no other request's tables.
    fn cached(&self, key: &Key) -> Option<Constraint> {
        let found = self.cache().get(key)?;
        Some(own(&found))
    }

    fn keep(&self, key: Key, source: &ConstraintSource, prepared: Prepared) -> Constraint {
        let bytes = prepared.machine.bytes() + GRAMMAR_BYTES_PER_BYTE * source.bytes();
        let prepared = Arc::new(prepared);
        let mut cache = self.cache();
        cache.put(key, Arc::clone(&prepared), bytes);
        metrics::constraint_cache(cache.entries(), cache.bytes());
        drop(cache);
        own(&prepared)
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn compile(&self, source: &ConstraintSource) -> Result<Prepared, EngineError> {
        let factory = self.factory.get_or_init(|| self.factory());
        let factory = factory.as_ref().map_err(|detail| EngineError::Internal {
            detail: detail.clone(),
        })?;
        let grammar = grammar(source)?;
        let mut machine =
            Machine::new(factory, grammar).map_err(|reason| refused(source, reason))?;
        let unusable = |fault| match fault {
            Fault::DeadEnd => source.invalid("cannot be satisfied: no token may come first"),
            Fault::TooComplex(reason) => source.too_complex(reason),
            Fault::Broken(reason) => source.invalid(reason),
        };
        if machine.is_complete().map_err(unusable)? {
            return Err(source.invalid("allows only the empty text"));
        }
        let first = Arc::new(machine.mask().map_err(unusable)?);
        if first.is_within(&self.stop_ids) {
            return Err(source.invalid("allows only the empty text"));
        }
        Ok(Prepared { machine, first })
    }

    fn factory(&self) -> Result<ParserFactory, String> {
        let build = std::panic::AssertUnwindSafe(|| {
            let words = vocabulary::vocabulary(&self.tokenizer, self.vocab, &self.stop_ids);
            let slices = SlicedBiasComputer::general_slices();
            let mut factory =
                ParserFactory::new(&words, InferenceCapabilities::default(), &slices)?;
            factory.quiet();
            *factory.limits_mut() = ParserLimits {
                initial_lexer_fuel: self.limits.compile_fuel,
                step_lexer_fuel: self.limits.token_fuel,
                step_max_items: self.limits.token_items,
                max_lexer_states: self.limits.max_lexer_states,
                max_grammar_size: self.limits.max_grammar_symbols,
                verbose_errors: false,
                ..ParserLimits::default()
            };
            Ok(factory)
        });
        llguidance::panic_utils::catch_unwind(build)
            .map_err(|error| format!("the vocabulary cannot be made a trie: {error}"))
    }
}

fn own(prepared: &Prepared) -> Constraint {
    Constraint(Arc::new(Prepared {
        machine: prepared.machine.stranger(),
        first: Arc::clone(&prepared.first),
    }))
}

/// The parser says in words which limit it ran into.
fn refused(source: &ConstraintSource, reason: String) -> EngineError {
    let limits = ["too big", "too large", "fuel", "too many", "limit"];
    if limits.iter().any(|word| reason.contains(word)) {
        source.too_complex(reason)
    } else {
        source.invalid(reason)
    }
}

fn grammar(source: &ConstraintSource) -> Result<TopLevelGrammar, EngineError> {
    if source.bytes() == 0 {
        return Err(source.invalid("is empty"));
    }
    match source {
        ConstraintSource::JsonSchema(text) => {
            let schema: Value = serde_json::from_str(text)
                .map_err(|error| source.invalid(format!("is not JSON: {error}")))?;
            Ok(TopLevelGrammar::from_json_schema(spaced_schema(schema)))
        }
        ConstraintSource::Regex(text) => {
            let text = unanchored(text);
            if text.chars().rev().take_while(|&c| c == '\\').count() % 2 == 1 {
                return Err(source.invalid("ends in a single backslash"));
            }
            Ok(TopLevelGrammar::from_regex(text))
        }
        ConstraintSource::Choices(choices) => {
            if let Some(index) = choices.iter().position(String::is_empty) {
                return Err(source.invalid(format!("the text at {index} is empty")));
            }
            let escaped: Vec<String> = choices.iter().map(|choice| escaped(choice)).collect();
            Ok(TopLevelGrammar::from_regex(&escaped.join("|")))
        }
        ConstraintSource::Grammar(text) => Ok(TopLevelGrammar::from_lark(text.clone())),
    }
}

/// A schema with our rule for space, unless it brings rules of its own: for a `%json` part of a grammar, which the
/// parser would otherwise let grow by spaces without end.
pub fn spaced_schema(mut schema: Value) -> Value {
    if let Value::Object(fields) = &mut schema {
        fields
            .entry("x-guidance")
            .or_insert_with(|| json!({ "whitespace_pattern": JSON_SPACE }));
    }
    schema
}

/// The whole output is matched, so `^` in front and `$` at the end say nothing; beside alternatives they would.
fn unanchored(text: &str) -> &str {
    if text.contains('|') {
        return text;
    }
    let text = text.strip_prefix('^').unwrap_or(text);
    match text.strip_suffix('$') {
        Some(rest) if !rest.ends_with('\\') => rest,
        _ => text,
    }
}

/// A text as a regex that matches it alone.
fn escaped(text: &str) -> String {
    let mut regex = String::with_capacity(text.len() + 8);
    for character in text.chars() {
        if r"\.+*?()|[]{}^$#&-~".contains(character) {
            regex.push('\\');
        }
        regex.push(character);
    }
    regex
}
