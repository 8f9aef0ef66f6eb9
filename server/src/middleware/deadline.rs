//! Every call gets a deadline: the client's `grpc-timeout`, or the default of its kind of method.
//!
//! tonic would answer an expired timeout with CANCELLED and would forget it once a stream has begun, so the header is
//! read here, carried in the request's extensions, enforced here for unary calls and by the engine and the services for
//! streams. This file must not know how work is scheduled.

use std::time::{Duration, Instant};

use http::{Request, Response};
use tonic::body::Body;
use tonic::{Code, Status};

use super::{Around, Inner, answer};
use crate::config::Admission;
use crate::method::{Kind, Method};
use crate::status::Refusal;

/// When the answer is worth nothing any more. `None`: a stream of bytes or events, which ends by its own rules.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(pub Option<Instant>);

/// When the server saw the request, for timings.
#[derive(Debug, Clone, Copy)]
pub struct Received(pub Instant);

/// tonic's own timer starts a little before ours and answers CANCELLED; ours has to ring first.
const AHEAD_OF_TONIC: Duration = Duration::from_millis(5);

/// The services say more in their own deadline errors (was it in the queue?), so the net below waits a moment for them.
const BEHIND_SERVICES: Duration = Duration::from_millis(2);

/// The layer.
#[derive(Debug, Clone)]
pub(crate) struct SetDeadline {
    generate: Duration,
    classify: Duration,
    control: Duration,
    longest: Duration,
}

impl SetDeadline {
    pub(crate) fn new(admission: &Admission) -> Self {
        SetDeadline {
            generate: admission.generate_deadline,
            classify: admission.classify_deadline,
            control: admission.control_deadline,
            longest: admission.max_deadline,
        }
    }

    fn default_of(&self, kind: Kind) -> Option<Duration> {
        match kind {
            Kind::Generate => Some(self.generate),
            Kind::Infer => Some(self.classify),
            Kind::Control | Kind::Unknown => Some(self.control),
            Kind::Batch | Kind::Transfer | Kind::Watch | Kind::Health => None,
        }
    }

    fn deadline(&self, received: Instant, kind: Kind, asked: Option<Duration>) -> Option<Instant> {
        let given = match (asked, kind) {
            (Some(asked), Kind::Generate | Kind::Infer) => Some(asked.min(self.longest)),
            (Some(asked), _) => Some(asked),
            (None, _) => self.default_of(kind),
        }?;
        received.checked_add(given - AHEAD_OF_TONIC.min(given / 10))
    }
}

impl Around for SetDeadline {
    async fn around<S: Inner>(self, mut request: Request<Body>, inner: S) -> Response<Body> {
        let received = Instant::now();
        let method = request
            .extensions()
            .get::<Method>()
            .copied()
            .unwrap_or_default();
        let asked = match request.headers().get("grpc-timeout").map(parse) {
            None => None,
            Some(Some(asked)) => Some(asked),
            Some(None) => {
                let why = "not a gRPC timeout: up to 8 digits and one of H, M, S, m, u, n";
                return Status::from(Refusal::invalid_field("grpc-timeout", why)).into_http();
            }
        };
        let deadline = self.deadline(received, method.kind, asked);
        request.extensions_mut().insert(Deadline(deadline));
        request.extensions_mut().insert(Received(received));
        let Some(deadline) = deadline else {
            return answer(inner, request).await;
        };
        tokio::select! {
            biased;
            response = answer(inner, request) => response,
            () = tokio::time::sleep_until((deadline + BEHIND_SERVICES).into()) => {
                let message = format!("the deadline passed after {} ms", received.elapsed().as_millis());
                Status::from(Refusal::new(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", message)).into_http()
            }
        }
    }
}

/// `TimeoutValue TimeoutUnit` of the gRPC specification: at most eight digits, so that nothing here can overflow.
fn parse(value: &http::HeaderValue) -> Option<Duration> {
    let text = value.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;
    use crate::config::Config;

    #[test]
    fn timeouts_follow_the_specification() {
        let parse = |text: &'static str| parse(&http::HeaderValue::from_static(text));
        assert_eq!(parse("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(parse("99999999S"), Some(Duration::from_secs(99_999_999)));
        assert_eq!(parse("1500m"), Some(Duration::from_millis(1500)));
        assert_eq!(parse("0n"), Some(Duration::ZERO));
        for wrong in ["", "S", "1", "1s", "-1S", "+1S", "999999999S", "1.5S", "S1"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_client_may_shorten_but_not_exceed_the_longest() {
        let config =
            Config::from_pairs(&[("max_deadline", "10s"), ("generate_deadline", "4s")]).unwrap();
        let layer = SetDeadline::new(&config.admission);
        let now = Instant::now();
        let left = |kind, asked: Option<u64>| {
            layer
                .deadline(now, kind, asked.map(Duration::from_secs))
                .map(|at| (at - now).as_secs_f64().round())
        };
        assert_eq!(left(Kind::Generate, None), Some(4.0));
        assert_eq!(left(Kind::Generate, Some(2)), Some(2.0));
        assert_eq!(left(Kind::Generate, Some(60)), Some(10.0));
        assert_eq!(left(Kind::Watch, None), None);
        assert_eq!(left(Kind::Watch, Some(60)), Some(60.0));
    }
}
