//! One text's way through a grammar: which tokens may come next, and what a token changes. A thin cover over
//! llguidance's parser that turns its stop reasons and panics into three kinds of fault.

use llguidance::api::{StopReason, TopLevelGrammar};
use llguidance::panic_utils::catch_unwind;
use llguidance::{ParserFactory, TokenParser};
use toktrie::SimpleVob;

/// What a parser's message ends in when it is told to be brief.
const BRIEF: &str = "<non-verbose/>";

/// The tokens that may come next, one bit each.
#[derive(Debug, Clone)]
pub(crate) struct TokenSet(SimpleVob);

/// A parser somewhere in a text.
pub(super) struct Machine(Box<TokenParser>);

/// Why a machine cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// No token continues the text, and the text is not complete.
    DeadEnd,
    /// A limit of work or states was reached.
    TooComplex(String),
    /// A panic, or a token that the mask had not allowed.
    Broken(String),
}

// === impl TokenSet ===

impl TokenSet {
    /// Takes every other token's logit away.
    pub(crate) fn restrict(&self, logits: &mut [f32]) {
        let words = self.0.as_slice();
        for (chunk, &word) in logits.chunks_mut(32).zip(words) {
            if word == u32::MAX {
                continue;
            }
            for (bit, logit) in chunk.iter_mut().enumerate() {
                if word & (1 << bit) == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        let known = (words.len() * 32).min(logits.len());
        logits[known..].fill(f32::NEG_INFINITY);
    }

    /// Whether every token of the set is among `others`.
    pub(crate) fn is_within(&self, others: &[u32]) -> bool {
        self.0.num_set() <= others.len() && self.0.iter().all(|token| others.contains(&token))
    }

    #[cfg(test)]
    pub(crate) fn allows(&self, token: u32) -> bool {
        self.0.is_allowed(token)
    }
}

// === impl Machine ===

impl Machine {
    /// Compiles a grammar.
    ///
    /// # Errors
    /// The parser's own words.
    pub(super) fn new(factory: &ParserFactory, grammar: TopLevelGrammar) -> Result<Self, String> {
        let compile = std::panic::AssertUnwindSafe(|| factory.create_parser(grammar));
        let mut parser = catch_unwind(compile).map_err(|error| brief(&error.to_string()))?;
        parser.start_without_prompt();
        Ok(Machine(Box::new(parser)))
    }

    /// The same place in the text with the lexer's tables shared: what one finds out, the other knows.
    pub(super) fn sibling(&self) -> Self {
        Machine(self.0.clone())
    }

    /// The same place in the text with tables of its own, so that no other request can fill them.
    pub(super) fn stranger(&self) -> Self {
        Machine(Box::new(self.0.deep_clone()))
    }

    /// The tokens that may come next, the model's stop ids among them where the text may end.
    ///
    /// # Errors
    /// A [`Fault`]; the machine is of no use afterwards.
    pub(super) fn mask(&mut self) -> Result<TokenSet, Fault> {
        self.guarded(|parser| parser.compute_mask().map_err(|error| error.to_string()))
            .map(TokenSet)
    }

    /// Goes on by a token of the mask. True when the text is complete and nothing may follow.
    ///
    /// # Errors
    /// As [`Machine::mask`].
    pub(super) fn commit(&mut self, token: u32) -> Result<bool, Fault> {
        self.guarded(|parser| {
            let taken = parser.consume_token(token);
            taken
                .and_then(|_| parser.check_stop())
                .map_err(|error| error.to_string())
        })
    }

    /// Whether the text so far is complete and nothing may follow.
    ///
    /// # Errors
    /// As [`Machine::mask`].
    pub(super) fn is_complete(&mut self) -> Result<bool, Fault> {
        self.guarded(|parser| parser.check_stop().map_err(|error| error.to_string()))
    }

    /// Bytes of the lexer's tables.
    pub(super) fn bytes(&self) -> usize {
        self.0.parser.lexer_stats().num_bytes
    }

    fn guarded<T>(
        &mut self,
        work: impl FnOnce(&mut TokenParser) -> Result<T, String>,
    ) -> Result<T, Fault> {
        let parser = &mut *self.0;
        let worked = catch_unwind(std::panic::AssertUnwindSafe(|| Ok(work(parser))));
        let result = worked.unwrap_or_else(|panic| Err(panic.to_string()));
        result.map_err(|error| {
            let text = brief(&error);
            match self.0.stop_reason() {
                StopReason::NoExtension | StopReason::NoExtensionBias => Fault::DeadEnd,
                StopReason::LexerTooComplex | StopReason::ParserTooComplex => {
                    Fault::TooComplex(text)
                }
                _ => Fault::Broken(text),
            }
        })
    }
}

/// The first part of a message: what follows are the parser's tables, or a panic's backtrace.
fn brief(text: &str) -> String {
    let end = text.find("<backtrace>").unwrap_or(text.len());
    text[..end].replace(BRIEF, "").trim().to_owned()
}
