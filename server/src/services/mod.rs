//! The tonic services: convert, call, map. What they share is the caller's side of a call (who, until when, under which
//! name) and the handles behind it; the work itself is the engine's, the registry's and the jobs'.

pub mod adapter;
mod control;
pub mod inference;
pub mod model;
pub mod tenant;
pub mod training;

use std::sync::Arc;
use std::time::Instant;

use espalier_engine::EngineHandle;
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

/// One call, as the layers found it.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) id: Arc<str>,
    pub(crate) principal: Principal,
    pub(crate) deadline: Option<Instant>,
    pub(crate) received: Instant,
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
            },
            message,
        ))
    }
}
