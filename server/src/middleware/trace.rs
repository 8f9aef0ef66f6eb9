//! The outermost layers: a name for every call, one span, one set of numbers, one shape of error, and no panic that
//! leaves the process. Prompts, texts and keys are never logged: a span holds the method, the request's id and the code.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures::FutureExt;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use tonic::body::Body;
use tonic::{Code, Status};
use tracing::{Instrument, Span};

use super::{Around, Inner, answer};
use crate::method::Method;
use crate::status::{self, Refusal};
use crate::telemetry::metric;

/// The header that carries a call's name in and out.
pub const REQUEST_ID: &str = "x-request-id";

/// A call's name: the client's, if it sent a usable one, else a new one. Logs, errors and replies carry it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestId(pub Arc<str>);

/// The layer that names, times and reports.
#[derive(Debug, Clone)]
pub(crate) struct Trace {
    max_request_id_bytes: usize,
}

/// The layer that catches panics, so that a bug costs one call.
#[derive(Debug, Clone)]
pub(crate) struct CatchPanic;

/// What is written down when a call ends, however it ends.
struct Record {
    method: Method,
    id: RequestId,
    span: Span,
    started: Instant,
    code: Option<Code>,
}

/// A response body that finishes its record with the trailers, or as cancelled when it is dropped before them.
struct Traced {
    inner: Body,
    record: Record,
}

// === impl Trace ===

impl Trace {
    pub(crate) fn new(max_request_id_bytes: usize) -> Self {
        Trace {
            max_request_id_bytes,
        }
    }

    /// Visible ASCII only, so that an id can stand in a header, a log line and a label of a trace.
    fn request_id(&self, headers: &HeaderMap) -> RequestId {
        let usable = |text: &&str| {
            !text.is_empty()
                && text.len() <= self.max_request_id_bytes
                && text.bytes().all(|byte| byte.is_ascii_graphic())
        };
        match headers
            .get(REQUEST_ID)
            .and_then(|value| value.to_str().ok())
            .filter(usable)
        {
            Some(text) => RequestId(Arc::from(text)),
            None => RequestId(Arc::from(uuid::Uuid::now_v7().to_string())),
        }
    }
}

impl Around for Trace {
    async fn around<S: Inner>(self, mut request: Request<Body>, inner: S) -> Response<Body> {
        let id = self.request_id(request.headers());
        let method = Method::of_path(request.uri().path());
        request.extensions_mut().insert(id.clone());
        request.extensions_mut().insert(method);
        metrics::counter!(metric::GRPC_STARTED, "grpc_method" => method.name).increment(1);
        let span = tracing::info_span!("call", method = method.name, request_id = %id.0, tenant = tracing::field::Empty);
        let mut record = Record {
            method,
            id,
            span: span.clone(),
            started: Instant::now(),
            code: None,
        };
        let mut response = answer(inner, request).instrument(span).await;
        if let Ok(value) = HeaderValue::from_str(&record.id.0) {
            response.headers_mut().insert(REQUEST_ID, value);
        }
        record.see(response.headers_mut());
        if record.code.is_some() {
            return response;
        }
        response.map(|inner| Body::new(Traced { inner, record }))
    }
}

// === impl Record ===

impl Record {
    /// Takes the code out of headers or trailers, if they hold one, and completes an error's details.
    fn see(&mut self, headers: &mut HeaderMap) {
        let Some(found) = Status::from_header_map(headers) else {
            return;
        };
        self.code = Some(found.code());
        if found.code() == Code::Ok {
            return;
        }
        let complete = status::complete(found, &self.id.0);
        self.code = Some(complete.code());
        if complete.add_header(headers).is_err() {
            tracing::error!(request_id = %self.id.0, "a status does not fit into headers");
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // No code: the client dropped the call before its end.
        let code = self.code.unwrap_or(Code::Cancelled);
        let seconds = self.started.elapsed().as_secs_f64();
        let name = status::code_name(code);
        metrics::histogram!(metric::RPC_DURATION, "rpc_method" => self.method.name, "rpc_status_code" => name).record(seconds);
        let _entered = self.span.enter();
        match code {
            Code::Ok => tracing::debug!(code = name, seconds, "done"),
            Code::Internal | Code::Unknown | Code::DataLoss => {
                tracing::error!(code = name, seconds, "failed")
            }
            _ => tracing::info!(code = name, seconds, "not done"),
        }
    }
}

// === impl Traced ===

impl http_body::Body for Traced {
    type Data = <Body as http_body::Body>::Data;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Status>>> {
        let this = &mut *self;
        let polled = std::panic::catch_unwind(AssertUnwindSafe(|| {
            Pin::new(&mut this.inner).poll_frame(cx)
        }));
        let frame = match polled {
            Ok(frame) => frame,
            Err(panic) => {
                // The broken body is never polled again.
                this.inner = Body::empty();
                let status = Status::from(caught(&*panic, "stream"));
                Poll::Ready(Some(Ok(Frame::trailers(trailers(&status)))))
            }
        };
        match frame {
            Poll::Ready(Some(Ok(mut frame))) => {
                if let Some(trailers) = frame.trailers_mut() {
                    this.record.see(trailers);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) => {
                this.record.code.get_or_insert(Code::Ok);
                Poll::Ready(None)
            }
            other => other,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.inner.size_hint()
    }
}

/// A status as the trailers that end a stream.
pub(super) fn trailers(status: &Status) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if status.add_header(&mut headers).is_err() {
        headers.insert("grpc-status", HeaderValue::from_static("13"));
    }
    headers
}

// === impl CatchPanic ===

impl Around for CatchPanic {
    async fn around<S: Inner>(self, request: Request<Body>, inner: S) -> Response<Body> {
        match AssertUnwindSafe(answer(inner, request))
            .catch_unwind()
            .await
        {
            Ok(response) => response,
            Err(panic) => Status::from(caught(&*panic, "call")).into_http(),
        }
    }
}

/// Counts and logs a panic; the client learns only that the server failed.
pub(crate) fn caught(panic: &(dyn Any + Send), site: &'static str) -> Refusal {
    metrics::counter!(metric::PANICS, "site" => site).increment(1);
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without text");
    Refusal::internal(format!("panic in a {site}: {text}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;
    use crate::middleware::AroundLayer;
    use tonic_types::StatusExt;
    use tower::{ServiceBuilder, ServiceExt};

    async fn call<F>(headers: &[(&'static str, &'static str)], handler: F) -> Response<Body>
    where
        F: Fn() -> Response<Body> + Clone + Send + 'static,
    {
        let stack = ServiceBuilder::new()
            .layer(AroundLayer(Trace::new(32)))
            .layer(AroundLayer(CatchPanic))
            .service_fn(move |_request: Request<Body>| {
                let handler = handler.clone();
                async move { Ok::<_, std::convert::Infallible>(handler()) }
            });
        let mut request = Request::new(Body::empty());
        for (name, value) in headers {
            request
                .headers_mut()
                .insert(*name, HeaderValue::from_static(value));
        }
        stack.oneshot(request).await.unwrap()
    }

    fn id_of(response: &Response<Body>) -> &str {
        response.headers()[REQUEST_ID].to_str().unwrap()
    }

    #[tokio::test]
    async fn a_usable_request_id_is_kept_and_others_are_replaced() {
        let ok = || Response::new(Body::empty());
        assert_eq!(id_of(&call(&[(REQUEST_ID, "abc-1")], ok).await), "abc-1");
        for bad in ["", "has space", "0123456789012345678901234567890123456789"] {
            let response = call(&[(REQUEST_ID, bad)], ok).await;
            assert_ne!(id_of(&response), bad);
            assert_eq!(id_of(&response).len(), 36);
        }
    }

    #[tokio::test]
    async fn a_panic_costs_one_call_and_says_nothing() {
        let response = call(&[(REQUEST_ID, "p1")], || panic!("at the disco")).await;
        let status = Status::from_header_map(response.headers()).unwrap();
        assert_eq!(status.code(), Code::Internal);
        assert!(!status.message().contains("disco"));
        let details = status.get_error_details();
        assert_eq!(details.error_info().unwrap().reason, "INTERNAL");
        assert_eq!(details.request_info().unwrap().request_id, "p1");
    }

    #[tokio::test]
    async fn statuses_of_others_get_error_info_and_request_info() {
        let response = call(&[(REQUEST_ID, "q1")], || {
            Status::out_of_range("message too large").into_http()
        })
        .await;
        let status = Status::from_header_map(response.headers()).unwrap();
        let details = status.get_error_details();
        assert_eq!(details.error_info().unwrap().reason, "MESSAGE_TOO_LARGE");
        assert_eq!(details.request_info().unwrap().request_id, "q1");
    }
}
