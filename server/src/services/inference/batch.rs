//! Batch streams: many items over one call, each an inference request of its own that is answered under its key, in order
//! of completion. An item that fails is answered with its status; only what breaks the stream itself (bytes that are no
//! message, its deadline, a drain) ends it, and then after the items that are open. Dropping the stream drops its tasks,
//! and with them their sequences. This file must not know what an item asks for.

use std::collections::HashSet;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use espalier_engine::request::Priority;
use espalier_proto::{rpc, v1};
use futures::FutureExt;
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;
use tonic::{Code, Status, Streaming};
use tracing::Instrument;

use super::{Chunks, InferenceService};
use crate::middleware::trace::caught;
use crate::services::Call;
use crate::shutdown::Phase;
use crate::status::{self, Refusal};
use crate::telemetry::metric;

/// What differs between the batch methods.
pub(super) trait Item: Send + 'static {
    /// The request of the method for one.
    type Request: Send + 'static;
    /// Its reply.
    type Response: Send + 'static;
    /// A reply under its key.
    type Reply: Send + 'static;
    /// For metrics.
    const OPERATION: &'static str;

    fn split(self) -> (String, Option<Self::Request>);
    fn reply(key: String, result: Result<Self::Response, rpc::Status>) -> Self::Reply;
    fn answer(
        service: &InferenceService,
        call: &Call,
        request: Self::Request,
    ) -> impl Future<Output = Result<Self::Response, Refusal>> + Send;
}

/// Answers a stream of items.
pub(super) fn answer<I: Item>(
    service: InferenceService,
    call: Call,
    items: Streaming<I>,
) -> Chunks<I::Reply> {
    let batch = Batch {
        service,
        call: Call {
            priority: Priority::Bulk,
            ..call
        },
        items: Some(items),
        open: JoinSet::new(),
        number: 0,
        seen: HashSet::new(),
        end: None,
    };
    Box::pin(futures::stream::unfold(Some(batch), |state| async move {
        let mut batch = state?;
        match batch.next().await? {
            Ok(reply) => Some((Ok(reply), Some(batch))),
            Err(status) => Some((Err(status), None)),
        }
    }))
}

/// One stream.
struct Batch<I: Item> {
    service: InferenceService,
    /// The stream's; every item has one of its own, made after it.
    call: Call,
    /// `None` after the client's half-close.
    items: Option<Streaming<I>>,
    open: JoinSet<Answered<I>>,
    /// Items so far.
    number: usize,
    /// Digests of the keys, so that long keys cost no more than short ones.
    seen: HashSet<[u8; 16]>,
    /// With what the stream ends once no item is open: nothing more is read.
    end: Option<Status>,
}

/// An item that is done.
struct Answered<I: Item> {
    key: String,
    id: Arc<str>,
    result: Result<I::Response, Refusal>,
}

// === impl Batch ===

impl<I: Item> Batch<I> {
    /// The next reply, the status that ends the stream, or its end.
    async fn next(&mut self) -> Option<Result<I::Reply, Status>> {
        let bulk = &self.service.asker.shell.config.bulk;
        let (window, idle) = (bulk.max_batch_window, bulk.batch_idle_timeout);
        let lifecycle = self.service.asker.shell.lifecycle.clone();
        let deadline = self.call.deadline;
        loop {
            let reads = self.end.is_none() && self.items.is_some() && self.open.len() < window;
            if !reads && self.open.is_empty() {
                return self.end.take().map(Err);
            }
            let silent = reads && self.open.is_empty();
            let (items, open) = (&mut self.items, &mut self.open);
            let read = async {
                match items {
                    Some(items) => items.message().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = until(deadline), if deadline.is_some() => return Some(Err(self.late())),
                Some(done) = open.join_next() => {
                    if let Some(reply) = self.done(done) {
                        return Some(Ok(reply));
                    }
                }
                message = read, if reads => match message {
                    Ok(Some(item)) => {
                        if let Some(reply) = self.begin(item) {
                            return Some(Ok(reply));
                        }
                    }
                    Ok(None) => self.items = None,
                    Err(status) => self.end = Some(status),
                },
                () = lifecycle.reached(Phase::Draining), if reads => {
                    self.end = Some(draining(&self.service));
                }
                () = tokio::time::sleep(idle), if silent => {
                    let message = format!("the client sent no item for {idle:?}, the limit batch_idle_timeout");
                    return Some(Err(Refusal::new(Code::DeadlineExceeded, "STREAM_IDLE", message).into()));
                }
            }
        }
    }

    /// Starts an item, or answers it at once when its key cannot be used.
    fn begin(&mut self, item: I) -> Option<I::Reply> {
        let limits = &self.service.asker.shell.config;
        let (key, request) = item.split();
        self.number += 1;
        let id: Arc<str> = format!("{}.{}", self.call.id, self.number).into();
        if self.number > limits.bulk.max_batch_items {
            let limit = limits.bulk.max_batch_items;
            let message = format!(
                "the stream has more than {limit} items, the limit max_batch_items; open another stream"
            );
            let refusal = Refusal::new(Code::ResourceExhausted, "BATCH_ITEMS_EXCEEDED", message);
            self.end = Some(refusal.with("limit", limit).into());
            return None;
        }
        let max = limits.limits.max_request_id_bytes;
        let (key, faulty) = self.check_key(key, max);
        let request = match (faulty, request) {
            (Some(why), _) => {
                return Some(self.refused(key, &id, Refusal::invalid_field("key", why)));
            }
            (None, None) => {
                let why = "is missing; every item has a key and a request";
                return Some(self.refused(key, &id, Refusal::invalid_field("request", why)));
            }
            (None, Some(request)) => request,
        };
        let call = Call {
            id: Arc::clone(&id),
            received: Instant::now(),
            ..self.call.clone()
        };
        let service = self.service.clone();
        let task = async move {
            let work = AssertUnwindSafe(I::answer(&service, &call, request)).catch_unwind();
            let result = work
                .await
                .unwrap_or_else(|panic| Err(caught(&*panic, "batch item")));
            Answered { key, id, result }
        };
        self.open.spawn(task.in_current_span());
        None
    }

    /// The key, cut to what is allowed, and what is wrong with it.
    fn check_key(&mut self, mut key: String, max: usize) -> (String, Option<String>) {
        let digest: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        let (short, _) = digest.split_at(16);
        let fresh = self.seen.insert(short.try_into().unwrap_or_default());
        let bytes = key.len();
        if bytes > max {
            key.truncate(key.floor_char_boundary(max));
            return (
                key,
                Some(format!("{bytes} bytes, the limit is {max} bytes")),
            );
        }
        if bytes == 0 {
            let why = "is missing; it names the item in the replies";
            return (key, Some(why.to_owned()));
        }
        let why = (!fresh).then(|| format!("{key:?} was used before in this stream"));
        (key, why)
    }

    fn refused(&self, key: String, id: &str, refusal: Refusal) -> I::Reply {
        count::<I>(refusal.reason());
        let status = status::complete(refusal.into(), id);
        I::reply(key, Err(status::in_message(&status)))
    }

    /// The reply of an item that is done. A drain ends the stream instead: the client sends what has no reply elsewhere.
    fn done(&mut self, done: Result<Answered<I>, tokio::task::JoinError>) -> Option<I::Reply> {
        let Answered { key, id, result } = match done {
            Ok(answered) => answered,
            // Panics are caught inside the task, and nobody aborts one but the drop of this set.
            Err(error) => {
                self.end = Some(Refusal::internal(error).into());
                return None;
            }
        };
        match result {
            Ok(response) => {
                count::<I>("ok");
                Some(I::reply(key, Ok(response)))
            }
            Err(refusal) if refusal.reason() == "SERVER_DRAINING" => {
                self.end = Some(draining(&self.service));
                None
            }
            Err(refusal) => Some(self.refused(key, &id, refusal)),
        }
    }

    fn late(&self) -> Status {
        let open = self.open.len();
        let after = self.call.received.elapsed().as_millis();
        let message = format!("the deadline passed after {after} ms with {open} items open");
        Refusal::new(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", message)
            .with("open_items", open)
            .into()
    }
}

async fn until(deadline: Option<Instant>) {
    if let Some(deadline) = deadline {
        tokio::time::sleep_until(deadline.into()).await;
    }
}

fn draining(service: &InferenceService) -> Status {
    let retry = service.asker.shell.config.admission.retry_after;
    let message =
        "the server is shutting down; send the items that have no reply to another replica";
    Refusal::unavailable("SERVER_DRAINING", message, retry).into()
}

fn count<I: Item>(outcome: &'static str) {
    metrics::counter!(metric::BULK_ITEMS, "operation" => I::OPERATION, "outcome" => outcome)
        .increment(1);
}

// === impl Item ===

impl Item for v1::BatchGenerateRequest {
    type Request = v1::GenerateRequest;
    type Response = v1::GenerateResponse;
    type Reply = v1::BatchGenerateResponse;
    const OPERATION: &'static str = "generate";

    fn split(self) -> (String, Option<Self::Request>) {
        (self.key, self.request)
    }

    fn reply(key: String, result: Result<Self::Response, rpc::Status>) -> Self::Reply {
        use v1::batch_generate_response::Result::{Error, Response};
        let result = Some(result.map_or_else(Error, Response));
        v1::BatchGenerateResponse { key, result }
    }

    async fn answer(
        service: &InferenceService,
        call: &Call,
        request: Self::Request,
    ) -> Result<Self::Response, Refusal> {
        service.answer_generate(call, request).await
    }
}

impl Item for v1::BatchClassifyRequest {
    type Request = v1::ClassifyRequest;
    type Response = v1::ClassifyResponse;
    type Reply = v1::BatchClassifyResponse;
    const OPERATION: &'static str = "classify";

    fn split(self) -> (String, Option<Self::Request>) {
        (self.key, self.request)
    }

    fn reply(key: String, result: Result<Self::Response, rpc::Status>) -> Self::Reply {
        use v1::batch_classify_response::Result::{Error, Response};
        let result = Some(result.map_or_else(Error, Response));
        v1::BatchClassifyResponse { key, result }
    }

    async fn answer(
        service: &InferenceService,
        call: &Call,
        request: Self::Request,
    ) -> Result<Self::Response, Refusal> {
        service.answer_classify(call, request).await
    }
}
