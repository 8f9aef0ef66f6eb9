//! The tonic services: convert, call, map. What they share is the caller's side of a call (who, until when, under which
//! name) and the handles behind it; the work itself is the engine's, the registry's and the jobs'.

pub(crate) mod adapter;
pub(crate) mod bulk;
mod control;
pub(crate) mod inference;
pub(crate) mod model;
pub(crate) mod tenant;
pub(crate) mod training;

use std::sync::Arc;
use std::time::Instant;

use espalier_engine::EngineHandle;
use espalier_engine::request::Priority;
use tonic::Request;

use crate::config::Config;
use crate::convert::reply::Base;
use crate::middleware::{Deadline, Gate, Received, RequestId};
use crate::principal::Principal;
use crate::registry::Registry;
use crate::shutdown::Lifecycle;
use crate::status::Refusal;

/// What the services work with.
#[derive(Clone)]
pub(crate) struct Shell {
    pub(crate) config: Arc<Config>,
    pub(crate) engine: EngineHandle,
    pub(crate) registry: Registry,
    pub(crate) gate: Gate,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) base: Base,
}

impl Shell {
    pub(crate) fn new(config: Arc<Config>, engine: EngineHandle, registry: Registry) -> Self {
        let lifecycle = Lifecycle::default();
        Shell {
            base: Base {
                name: model_name(&engine.model().name),
                digest: engine.model().digest.clone(),
            },
            gate: Gate::new(
                &config.admission,
                config.bulk.max_bulk_in_flight,
                lifecycle.clone(),
            ),
            registry,
            engine,
            lifecycle,
            config,
        }
    }
}

/// `models/{m}` from the name in the file, whose spelling is anybody's.
fn model_name(name: &str) -> String {
    let mut id = String::new();
    for character in name.to_lowercase().chars() {
        match character {
            'a'..='z' | '0'..='9' | '.' => id.push(character),
            _ if id.ends_with('-') || id.is_empty() => {}
            _ => id.push('-'),
        }
    }
    let id: String = id.chars().take(63).collect();
    let id = id.trim_matches(['-', '.']);
    format!("models/{}", if id.is_empty() { "base" } else { id })
}

/// One call, as the layers found it.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) id: Arc<str>,
    pub(crate) principal: Principal,
    pub(crate) deadline: Option<Instant>,
    pub(crate) received: Instant,
    /// Bulk work waits where a single call is turned away.
    pub(crate) priority: Priority,
    /// Whether it takes a place among its tenant's calls; a check that asks nothing of the engine does not.
    pub(crate) counted: bool,
}

impl Call {
    /// Takes the message out of a request, and with it what the layers left in its extensions.
    ///
    /// # Errors
    /// When a layer is missing from the stack, which denies instead of letting somebody in.
    pub(crate) fn of<T>(request: Request<T>) -> Result<(Call, T), Refusal> {
        let (_, mut extensions, message) = request.into_parts();
        let principal = extensions.remove::<Principal>();
        let id = extensions.remove::<RequestId>();
        let (Some(principal), Some(RequestId(id))) = (principal, id) else {
            return Err(Refusal::internal(
                "a call came past the layers that name and authenticate it",
            ));
        };
        let received = extensions
            .remove::<Received>()
            .map_or_else(Instant::now, |Received(at)| at);
        let deadline = extensions.remove::<Deadline>().and_then(|Deadline(at)| at);
        Ok((
            Call {
                id,
                principal,
                deadline,
                received,
                priority: Priority::Interactive,
                counted: true,
            },
            message,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_names_are_made_of_plain_characters() {
        assert_eq!(
            model_name("SmolLM2 135M Instruct"),
            "models/smollm2-135m-instruct"
        );
        assert_eq!(model_name("tiny:7"), "models/tiny-7");
        assert_eq!(model_name("../../etc"), "models/etc");
        assert_eq!(model_name("名"), "models/base");
        assert_eq!(model_name(&"a".repeat(100)).len(), "models/".len() + 63);
    }
}
