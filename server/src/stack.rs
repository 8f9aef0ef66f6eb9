//! What every call passes on its way in, as one list, and the HTTP/2 server around it. Order is meaning here: each line
//! says why it stands where it stands.

use tonic::transport::Server;
use tower::ServiceBuilder;
use tower::layer::util::{Identity, Stack};

use crate::config::{Config, Http};
use crate::middleware::auth::Authenticate;
use crate::middleware::deadline::SetDeadline;
use crate::middleware::trace::{CatchPanic, Trace};
use crate::middleware::{AroundLayer, Gate};
use crate::tenants::TenantStore;

/// The list below, as tower spells it: the last one added is the innermost.
pub(crate) type Layers = Stack<
    AroundLayer<Gate>,
    Stack<
        AroundLayer<Authenticate>,
        Stack<
            AroundLayer<SetDeadline>,
            Stack<AroundLayer<CatchPanic>, Stack<AroundLayer<Trace>, Identity>>,
        >,
    >,
>;

/// The layers, outermost first.
pub(crate) fn layers(config: &Config, keys: TenantStore, gate: Gate) -> ServiceBuilder<Layers> {
    ServiceBuilder::new()
        // Outermost, because every answer, also a refusal of the layers below, must carry the request's id and be counted.
        .layer(AroundLayer(Trace::new(config.limits.max_request_id_bytes)))
        // Around everything that could panic, and inside the trace, so that a caught panic is counted like any error.
        .layer(AroundLayer(CatchPanic))
        // Before anything that may wait: the clock starts when the call arrives.
        .layer(AroundLayer(SetDeadline::new(&config.admission)))
        // Outside the router, so that it denies by default: a method that is added later cannot be forgotten.
        .layer(AroundLayer(Authenticate::new(keys)))
        // After authentication, because it counts by tenant and strangers must not use up places; before the services,
        // because a call that is turned away must cost nothing.
        .layer(AroundLayer(gate))
}

/// tonic's server with the limits that it leaves unset. Its own timeout, concurrency limit and load shedding stay off:
/// they answer CANCELLED and RESOURCE_EXHAUSTED where the contract says DEADLINE_EXCEEDED and UNAVAILABLE.
pub(crate) fn server(http: &Http) -> Server {
    let mut server = Server::builder()
        .max_concurrent_streams(http.max_concurrent_streams)
        .http2_max_header_list_size(u32::try_from(http.max_header_list_bytes.0).unwrap_or(u32::MAX))
        .http2_max_pending_accept_reset_streams(Some(http.max_pending_resets))
        .http2_keepalive_interval(Some(http.keepalive_interval))
        .http2_keepalive_timeout(Some(http.keepalive_timeout));
    if !http.max_connection_age.is_zero() {
        server = server
            .max_connection_age(http.max_connection_age)
            .max_connection_age_grace(http.connection_age_grace);
    }
    server
}
