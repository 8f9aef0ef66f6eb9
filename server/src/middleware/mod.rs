//! The layers that every call passes, each one an `Around`: an async function that gets the request and the rest of the
//! stack. The tower plumbing (readiness, cloning, boxing) is written once here and nowhere else. Nothing here may know
//! what a call means; `stack` says in which order the layers stand and why.

pub(crate) mod admission;
pub(crate) mod auth;
pub(crate) mod deadline;
pub(crate) mod trace;

pub(crate) use admission::ItemPermit;
pub use admission::{Gate, TenantPermit};
pub use deadline::{Deadline, Received};
pub use trace::{REQUEST_ID, RequestId};

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::body::Body;
use tower::{Layer, Service};

/// What a layer wraps: everything further in.
pub(crate) trait Inner:
    Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send> + Send + 'static
{
}

impl<S> Inner for S where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send>
        + Send
        + 'static
{
}

/// One layer's behaviour.
pub(crate) trait Around: Clone + Send + Sync + 'static {
    /// Answers the request, usually by calling `inner`, which is ready.
    fn around<S: Inner>(
        self,
        request: Request<Body>,
        inner: S,
    ) -> impl Future<Output = Response<Body>> + Send;
}

/// An `Around` as a tower layer.
#[derive(Debug, Clone)]
pub(crate) struct AroundLayer<A>(pub(crate) A);

/// An `Around` as a tower service.
#[derive(Debug, Clone)]
pub(crate) struct AroundService<A, S> {
    around: A,
    inner: S,
}

impl<A: Around, S> Layer<S> for AroundLayer<A> {
    type Service = AroundService<A, S>;

    fn layer(&self, inner: S) -> Self::Service {
        AroundService {
            around: self.0.clone(),
            inner,
        }
    }
}

impl<A: Around, S: Inner + Clone> Service<Request<Body>> for AroundService<A, S> {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // The instance that was polled ready must be the one that is called; its clone takes its place.
        let clone = self.inner.clone();
        let ready = std::mem::replace(&mut self.inner, clone);
        let around = self.around.clone();
        Box::pin(async move { Ok(around.around(request, ready).await) })
    }
}

/// Calls the rest of the stack; its error type has no values.
pub(crate) async fn answer<S: Inner>(mut inner: S, request: Request<Body>) -> Response<Body> {
    match inner.call(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}
