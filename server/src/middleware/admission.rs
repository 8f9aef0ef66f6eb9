//! Who may enter: calls beyond the limits are turned away at once, because a queue in front of the engine's own queue
//! would only hide the wait. A permit is held until the response's last byte, for streams too. Also the place where a
//! drain bites: new calls are turned away, and what is left at the end is cut. This file must not know what a call does.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use http_body::Frame;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tonic::Status;
use tonic::body::Body;

use super::trace::trailers;
use super::{Around, Inner, answer};
use crate::config;
use crate::method::{Kind, Method};
use crate::principal::Principal;
use crate::shutdown::{Lifecycle, Phase};
use crate::status::Refusal;
use crate::telemetry::metric;

/// The gate, shared by the layer and by services that learn a call's tenant from its body.
#[derive(Debug, Clone)]
pub struct Gate(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    calls: Arc<Semaphore>,
    watchers: Arc<Semaphore>,
    /// Items of batch streams and bulk jobs that may be in the engine.
    bulk: Arc<Semaphore>,
    per_tenant: usize,
    tenants: Mutex<HashMap<(Class, Arc<str>), usize>>,
    /// A tenant's place became free.
    freed: Notify,
    limits: config::Admission,
    lifecycle: Lifecycle,
}

/// What is counted: a batch stream holds a place of its own, and each of its items one among the tenant's calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Class {
    Call,
    BatchStream,
}

/// One call's place among its tenant's calls; given back on drop.
#[derive(Debug)]
pub struct TenantPermit {
    gate: Gate,
    key: (Class, Arc<str>),
}

/// A bulk item's place among its tenant's calls, and its place in the engine.
#[derive(Debug)]
pub(crate) struct ItemPermit {
    _tenant: TenantPermit,
    _place: Option<OwnedSemaphorePermit>,
}

/// A response body that keeps the call's places until it ends, and ends when the server cuts it.
struct Guarded {
    inner: Body,
    cut: Pin<Box<dyn Future<Output = ()> + Send>>,
    _permits: (Option<OwnedSemaphorePermit>, Option<TenantPermit>),
}

// === impl Gate ===

impl Gate {
    /// A gate with the configured limits.
    pub fn new(limits: &config::Admission, bulk: usize, lifecycle: Lifecycle) -> Self {
        Gate(Arc::new(Shared {
            calls: Arc::new(Semaphore::new(limits.max_in_flight)),
            watchers: Arc::new(Semaphore::new(limits.max_watchers)),
            bulk: Arc::new(Semaphore::new(bulk)),
            per_tenant: limits.max_in_flight_per_tenant,
            tenants: Mutex::default(),
            freed: Notify::new(),
            limits: limits.clone(),
            lifecycle,
        }))
    }

    /// A place among the tenant's calls.
    ///
    /// # Errors
    /// RATE_LIMIT_EXCEEDED when all are taken: it is the tenant's own load, another replica would not help it.
    pub fn enter_tenant(&self, tenant: &str) -> Result<TenantPermit, Refusal> {
        self.enter_as(Class::Call, tenant)
    }

    fn enter_as(&self, class: Class, tenant: &str) -> Result<TenantPermit, Refusal> {
        let limit = self.0.per_tenant;
        self.take(class, tenant, limit).map_err(|running| {
            outcome("quota");
            let what = match class {
                Class::Call => "calls",
                Class::BatchStream => "batch streams",
            };
            let message = format!(
                "tenants/{tenant} has {running} {what} in flight, the limit max_in_flight_per_tenant is {limit}"
            );
            Refusal::quota(
                "RATE_LIMIT_EXCEEDED",
                format!("tenants/{tenant}"),
                message,
                Some(self.0.limits.retry_after),
            )
            .with("limit", limit)
            .with("quota_metric", "calls_in_flight")
        })
    }

    /// A bulk item waits for its places instead of being turned away. Bulk items leave a quarter of the tenant's calls
    /// to its single calls.
    pub(crate) async fn enter_item(&self, tenant: &str) -> ItemPermit {
        let limit = self.0.per_tenant - self.0.per_tenant / 4;
        let tenant = loop {
            let freed = self.0.freed.notified();
            tokio::pin!(freed);
            // Listening begins before looking, so that no place is missed.
            freed.as_mut().enable();
            if let Ok(permit) = self.take(Class::Call, tenant, limit) {
                break permit;
            }
            freed.await;
        };
        ItemPermit {
            _tenant: tenant,
            // The semaphore is never closed.
            _place: self.0.bulk.clone().acquire_owned().await.ok(),
        }
    }

    /// One more of `class` for the tenant, unless it has `limit` of them: then how many it has.
    fn take(&self, class: Class, tenant: &str, limit: usize) -> Result<TenantPermit, usize> {
        let mut tenants = self
            .0
            .tenants
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let key = (class, Arc::from(tenant));
        let running = tenants.get(&key).copied().unwrap_or(0);
        if running >= limit {
            return Err(running);
        }
        tenants.insert(key.clone(), running + 1);
        drop(tenants);
        Ok(TenantPermit {
            gate: self.clone(),
            key,
        })
    }

    /// Resolves when no call is in flight; watchers and health do not count.
    pub(crate) async fn idle(&self) {
        let all = u32::try_from(self.0.limits.max_in_flight).unwrap_or(u32::MAX);
        let _ = self.0.calls.acquire_many(all).await;
    }

    /// A place on this server.
    fn enter(&self, kind: Kind) -> Result<Option<OwnedSemaphorePermit>, Refusal> {
        let (places, limit, name) = match kind {
            Kind::Health => return Ok(None),
            Kind::Watch => (&self.0.watchers, self.0.limits.max_watchers, "max_watchers"),
            _ => (&self.0.calls, self.0.limits.max_in_flight, "max_in_flight"),
        };
        let retry = self.0.limits.retry_after;
        match self.0.lifecycle.phase() {
            Phase::Starting => return Err(starting(retry)),
            Phase::Draining | Phase::Cut => {
                outcome("draining");
                return Err(draining(retry));
            }
            Phase::Serving | Phase::LameDuck => {}
        }
        places.clone().try_acquire_owned().map(Some).map_err(|_| {
            outcome("queue_full");
            let message = format!("the server has {limit} calls in flight, the limit {name}; try again or ask another replica");
            Refusal::unavailable("SERVER_OVERLOADED", message, retry).with("limit", limit)
        })
    }
}

impl Drop for TenantPermit {
    fn drop(&mut self) {
        let mut tenants = self
            .gate
            .0
            .tenants
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = tenants.get_mut(&self.key) {
            *running -= 1;
            if *running == 0 {
                tenants.remove(&self.key);
            }
        }
        drop(tenants);
        self.gate.0.freed.notify_waiters();
    }
}

impl Around for Gate {
    async fn around<S: Inner>(self, request: Request<Body>, inner: S) -> Response<Body> {
        let kind = request
            .extensions()
            .get::<Method>()
            .copied()
            .unwrap_or_default()
            .kind;
        let tenant = request
            .extensions()
            .get::<Principal>()
            .and_then(Principal::tenant);
        let permits = self.enter(kind).and_then(|place| {
            let counted = tenant.filter(|_| !matches!(kind, Kind::Health | Kind::Watch));
            let class = match kind {
                Kind::Batch => Class::BatchStream,
                _ => Class::Call,
            };
            Ok((
                place,
                counted
                    .map(|tenant| self.enter_as(class, tenant.as_str()))
                    .transpose()?,
            ))
        });
        let permits = match permits {
            Ok(permits) => permits,
            Err(refusal) => return Status::from(refusal).into_http(),
        };
        // A watch would hold up the drain for its whole length, and its client can resume it elsewhere by number.
        let last = if kind == Kind::Watch {
            Phase::Draining
        } else {
            Phase::Cut
        };
        let mut cut: Pin<Box<dyn Future<Output = ()> + Send>> =
            Box::pin(self.0.lifecycle.reached(last));
        tokio::select! {
            biased;
            response = answer(inner, request) => {
                response.map(|inner| Body::new(Guarded { inner, cut, _permits: permits }))
            }
            () = &mut cut => Status::from(draining(self.0.limits.retry_after)).into_http(),
        }
    }
}

fn starting(retry: Duration) -> Refusal {
    Refusal::unavailable("SERVER_STARTING", "the server is loading its model", retry)
}

fn draining(retry: Duration) -> Refusal {
    Refusal::unavailable(
        "SERVER_DRAINING",
        "the server is shutting down; another replica answers",
        retry,
    )
}

fn outcome(outcome: &'static str) {
    metrics::counter!(metric::ADMISSION, "outcome" => outcome).increment(1);
}

// === impl Guarded ===

impl http_body::Body for Guarded {
    type Data = <Body as http_body::Body>::Data;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Status>>> {
        let this = &mut *self;
        match Pin::new(&mut this.inner).poll_frame(cx) {
            Poll::Pending if !this.inner.is_end_stream() => {}
            ready => return ready,
        }
        match this.cut.as_mut().poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) => {
                // Dropping the body drops the stream's guard, which cancels its work.
                this.inner = Body::empty();
                this.cut = Box::pin(std::future::pending());
                Poll::Ready(Some(Ok(Frame::trailers(trailers(&Status::from(
                    draining(Duration::from_secs(1)),
                ))))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;
    use crate::config::Config;
    use tonic::Code;

    fn gate(pairs: &[(&str, &str)]) -> (Gate, Lifecycle) {
        let lifecycle = Lifecycle::default();
        lifecycle.advance(Phase::Serving);
        (
            Gate::new(
                &Config::from_pairs(pairs).unwrap().admission,
                3,
                lifecycle.clone(),
            ),
            lifecycle,
        )
    }

    #[test]
    fn the_server_takes_exactly_its_limit() {
        let (gate, _) = gate(&[("max_in_flight", "2"), ("max_watchers", "1")]);
        let first = gate.enter(Kind::Generate).unwrap();
        let _second = gate.enter(Kind::Control).unwrap();
        let refusal = gate.enter(Kind::Infer).unwrap_err();
        assert_eq!(
            (refusal.code(), refusal.reason()),
            (Code::Unavailable, "SERVER_OVERLOADED")
        );
        assert!(refusal.message().contains('2') && refusal.message().contains("max_in_flight"));
        let _watch = gate.enter(Kind::Watch).unwrap();
        assert!(
            gate.enter(Kind::Watch)
                .unwrap_err()
                .message()
                .contains("max_watchers")
        );
        assert!(gate.enter(Kind::Health).unwrap().is_none());
        drop(first);
        assert!(gate.enter(Kind::Infer).is_ok());
    }

    #[test]
    fn a_tenant_takes_exactly_its_limit_and_others_do_not_notice() {
        let (gate, _) = gate(&[("max_in_flight_per_tenant", "2")]);
        let mut held = vec![
            gate.enter_tenant("a").unwrap(),
            gate.enter_tenant("a").unwrap(),
        ];
        let refusal = gate.enter_tenant("a").unwrap_err();
        assert_eq!(
            (refusal.code(), refusal.reason()),
            (Code::ResourceExhausted, "RATE_LIMIT_EXCEEDED")
        );
        assert!(gate.enter_tenant("b").is_ok());
        held.pop();
        assert!(gate.enter_tenant("a").is_ok());
        held.clear();
        assert!(
            gate.0.tenants.lock().unwrap().is_empty(),
            "a tenant without calls leaves nothing behind"
        );
    }

    #[tokio::test]
    async fn bulk_items_wait_and_leave_room_for_calls() {
        let (gate, _) = gate(&[("max_in_flight_per_tenant", "4")]);
        let stream = gate.enter_as(Class::BatchStream, "a").unwrap();
        let mut items = Vec::new();
        for _ in 0..3 {
            items.push(gate.enter_item("a").await);
        }
        let waits = gate.clone();
        let fourth = tokio::spawn(async move { waits.enter_item("a").await });
        tokio::task::yield_now().await;
        assert!(!fourth.is_finished(), "three quarters are taken");
        let call = gate.enter_tenant("a").unwrap();
        let other = gate.clone();
        // The other tenant has places, the engine has not: three items are in it.
        let other = tokio::spawn(async move { other.enter_item("b").await });
        tokio::task::yield_now().await;
        assert!(!other.is_finished());
        drop(call);
        tokio::task::yield_now().await;
        assert!(!fourth.is_finished(), "a call's place is not for bulk");
        items.pop();
        drop(other.await.unwrap());
        drop((fourth.await.unwrap(), items, stream));
        assert!(gate.0.tenants.lock().unwrap().is_empty());
        assert_eq!(gate.0.bulk.available_permits(), 3);
    }

    #[test]
    fn a_draining_server_turns_calls_away_but_not_in_its_lame_duck_time() {
        let (gate, lifecycle) = gate(&[]);
        lifecycle.advance(Phase::LameDuck);
        assert!(gate.enter(Kind::Generate).is_ok());
        lifecycle.advance(Phase::Draining);
        assert_eq!(
            gate.enter(Kind::Generate).unwrap_err().reason(),
            "SERVER_DRAINING"
        );
        assert!(gate.enter(Kind::Health).is_ok());
    }
}
