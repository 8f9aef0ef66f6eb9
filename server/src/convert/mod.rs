//! Where the wire's types and the engine's meet: requests are checked and turned into plain values on the way in, events
//! into messages on the way out. Nothing behind this module sees a proto type, and nothing here does any work.

pub(crate) mod adapter;
pub(crate) mod bulk;
pub(crate) mod chat;
pub(crate) mod classification;
pub(crate) mod outcome;
pub(crate) mod reply;
pub(crate) mod request;
pub(crate) mod tenant;
pub(crate) mod training;
mod ways;

use crate::status::Refusal;

/// Collects what is wrong with a request, so that one answer tells all of it.
#[derive(Debug, Default)]
pub(crate) struct Faults(Vec<(String, String)>);

impl Faults {
    /// Notes one field; `why` names value and limit.
    pub(crate) fn add(&mut self, field: impl Into<String>, why: impl Into<String>) {
        self.0.push((field.into(), why.into()));
    }

    /// Notes the field when the value is over the limit. `what` is what is counted: bytes, entries.
    pub(crate) fn limit(
        &mut self,
        field: impl Into<String>,
        value: usize,
        limit: usize,
        what: &str,
    ) {
        if value > limit {
            self.add(field, format!("{value} {what}, the limit is {limit}"));
        }
    }

    /// Everything noted, as one refusal.
    pub(crate) fn finish(self) -> Result<(), Refusal> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Refusal::invalid_fields(self.0))
        }
    }
}

/// A number of the wire, where it has no sign of its own to overflow into.
pub(crate) fn count(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
