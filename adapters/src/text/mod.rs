//! Text to ids and back: the tokenizer and chat template of a base model, from GGUF metadata or Hugging Face files.
//! Knows no model, no adapter and no request. A conversation becomes ids here and nowhere else, so that what trains and what serves
//! cannot differ, and so that the text of a message can never become a control token.

mod added;
mod calls;
mod stream;
mod template;
mod tokenizer;
pub mod tools;
mod vocabulary;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tool_tests;

pub use calls::{CallReader, Read, WrittenCall};
pub use stream::StreamDecoder;
pub use template::{ChatTemplate, Message, TemplateSource};
pub use tokenizer::{Tokenizer, byte_spelling};
pub use tools::{Tool, ToolCall, ToolFormat};

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use added::Protected;

/// Private-use characters that no known text uses.
const MARKS: RangeInclusive<char> = '\u{F0000}'..='\u{FFFFD}';

/// Why a tokenizer or template cannot be built or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// The file's metadata breaks a rule.
    #[error(transparent)]
    Gguf(#[from] crate::gguf::GgufError),
    /// The file cannot be read.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The tokenizer is malformed or of a kind that is not supported.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The template does not compile.
    #[error("chat template: {0}")]
    Template(String),
    /// The template refuses this conversation, or exceeds its limits on it.
    #[error("chat template on this conversation: {0}")]
    Render(String),
    /// A role is no plain word, so a template could be made to write control tokens through it.
    #[error("role {role:?} of message {index}: must be 1 to {limit} letters, digits, '_' or '-'")]
    Role {
        /// The role as given.
        role: String,
        /// The message's position, from 0.
        index: usize,
        /// The longest role, in bytes.
        limit: usize,
    },
    /// A token id that the tokenizer does not have.
    #[error("token id {id}: the vocabulary has {vocab} ids, 0 to {}", vocab.saturating_sub(1))]
    Id {
        /// The id.
        id: u32,
        /// The number of ids.
        vocab: usize,
    },
}

/// Renders a conversation and encodes it. Control tokens come from the template alone: where a message's content, a tool's
/// definition or a call's argument spells one, it stays text. No BOS is added, since the template writes its own where the model wants one, as in transformers.
///
/// # Errors
/// [`TextError`] when the template refuses the conversation or exceeds its limits, or a role is no plain word.
pub fn encode_chat(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    tools: &[Tool],
    add_generation_prompt: bool,
) -> Result<Vec<u32>, TextError> {
    let mark = free_mark(template, messages, tools);
    let marks = |text: &str| tokenizer.mark_controls(text, mark);
    let messages: Vec<Message> = messages.iter().map(|m| m.map_texts(&marks)).collect();
    let tools: Vec<Tool> = tools.iter().map(|tool| tool.map_texts(&marks)).collect();
    let rendered = template.render(&messages, &tools, add_generation_prompt)?;
    let (text, protected) = Protected::take_marks(&rendered, mark);
    tokenizer.encode_protected(&text, &protected)
}

/// A private-use character that neither the conversation nor the template contains: it travels through the template in front of
/// every control token that a message spells, and says where the template's own text ends.
fn free_mark(template: &ChatTemplate, messages: &[Message], tools: &[Tool]) -> char {
    let taken = RefCell::new(BTreeSet::new());
    let note = |text: &str| {
        let private = text.chars().filter(|mark| MARKS.contains(mark));
        taken.borrow_mut().extend(private);
        String::new()
    };
    note(template.source());
    for message in messages {
        message.map_texts(&note);
    }
    for tool in tools {
        tool.map_texts(&note);
    }
    let taken = taken.into_inner();
    // A text that uses all of the 65,534 characters of plane 15 is longer than any context, so the fallback is unreachable in use.
    MARKS
        .into_iter()
        .find(|mark| !taken.contains(mark))
        .unwrap_or('\u{10FFFD}')
}
