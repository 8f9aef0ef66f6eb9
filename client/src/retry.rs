//! When and how often a call is made again: UNAVAILABLE only, exponential waits with jitter,
//! the server's own wait where it names one, and a budget shared by all calls of a client, so
//! that a fleet of clients cannot multiply the load of a server that is down.
//! Knows no calls: it is asked with an error and answers with a wait.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use crate::error::Error;

/// The numbers of the policy.
#[derive(Clone, Debug, PartialEq)]
pub struct RetryPolicy {
    /// Attempts of one call, the first included; 1 never retries.
    pub max_attempts: u32,
    /// The wait before the second attempt.
    pub initial_backoff: Duration,
    /// No computed wait is longer. The server may ask for longer ones.
    pub max_backoff: Duration,
    /// Growth of the wait from one attempt to the next.
    pub multiplier: f64,
    /// A wait is varied by this part up and down.
    pub jitter: f64,
    /// Size of the budget: a failure takes one from it, and at half of it retries stop.
    pub budget: f64,
    /// What a success gives back to the budget.
    pub budget_refill: f64,
}

impl Default for RetryPolicy {
    /// The numbers of the gRPC service configuration that the project documents.
    fn default() -> Self {
        Self {
            max_attempts: 4,
            initial_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(1),
            multiplier: 2.0,
            jitter: 0.2,
            budget: 10.0,
            budget_refill: 0.1,
        }
    }
}

/// A policy and what is left of its budget.
#[derive(Debug)]
pub(crate) struct Retry {
    policy: RetryPolicy,
    left: Mutex<f64>,
}

impl Retry {
    pub(crate) fn new(policy: RetryPolicy) -> Self {
        let left = Mutex::new(policy.budget);
        Self { policy, left }
    }

    /// Records a success.
    pub(crate) fn succeeded(&self) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        *left = (*left + self.policy.budget_refill).min(self.policy.budget);
    }

    /// Records a failed attempt; the wait before the next one, or `None` to give up.
    /// `attempt` counts from 1, `remaining` is what is left of the deadline, `dice` is in 0..1.
    pub(crate) fn failed(
        &self,
        error: &Error,
        attempt: u32,
        remaining: Option<Duration>,
        dice: f64,
    ) -> Option<Duration> {
        if error.code != tonic::Code::Unavailable {
            return None;
        }
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        *left = (*left - 1.0).max(0.0);
        let spent = *left <= self.policy.budget / 2.0;
        if spent || !error.is_retryable() || attempt >= self.policy.max_attempts {
            return None;
        }
        let wait = self.wait(error, attempt, dice);
        // An attempt that begins after the deadline helps nobody.
        remaining.is_none_or(|time| wait < time).then_some(wait)
    }

    fn wait(&self, error: &Error, attempt: u32, dice: f64) -> Duration {
        let power = i32::try_from(attempt - 1).unwrap_or(i32::MAX);
        let grown = self.policy.initial_backoff.as_secs_f64() * self.policy.multiplier.powi(power);
        let capped = grown.min(self.policy.max_backoff.as_secs_f64());
        let varied = capped * (1.0 + self.policy.jitter * (2.0 * dice - 1.0));
        // Never sooner than the server asks.
        Duration::from_secs_f64(varied).max(error.retry_after.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use tonic::{Code, Status};

    use super::*;

    fn unavailable() -> Error {
        Error::from(Status::unavailable("full"))
    }

    #[test]
    fn waits_grow_within_the_cap_and_the_jitter() {
        let retry = Retry::new(RetryPolicy {
            max_attempts: 20,
            budget: 1000.0,
            ..RetryPolicy::default()
        });
        let wait = |attempt, dice| retry.failed(&unavailable(), attempt, None, dice);
        let ms = |value| Some(Duration::from_secs_f64(value));
        assert_eq!(wait(1, 0.5), ms(0.1));
        assert_eq!(wait(2, 0.5), ms(0.2));
        assert_eq!(wait(10, 0.5), ms(1.0));
        assert_eq!(wait(1, 0.0), ms(0.1 * 0.8));
        assert_eq!(wait(1, 1.0), ms(0.1 * 1.2));
    }

    #[test]
    fn only_unavailable_is_retried() {
        let retry = Retry::new(RetryPolicy::default());
        for code in 1..=16 {
            let code = Code::from(code);
            let error = Error::from(Status::new(code, "no"));
            let again = retry.failed(&error, 1, None, 0.5).is_some();
            assert_eq!(again, code == Code::Unavailable, "{code:?}");
        }
    }

    #[test]
    fn attempts_and_deadline_end_it() {
        let retry = Retry::new(RetryPolicy::default());
        assert!(retry.failed(&unavailable(), 4, None, 0.5).is_none());
        let short = Some(Duration::from_millis(99));
        assert!(retry.failed(&unavailable(), 1, short, 0.5).is_none());
    }

    #[test]
    fn the_servers_wait_wins_when_it_is_longer() {
        let retry = Retry::new(RetryPolicy::default());
        let mut error = unavailable();
        error.retry_after = Some(Duration::from_secs(7));
        assert_eq!(retry.failed(&error, 1, None, 0.5), error.retry_after);
        error.retry_forbidden = true;
        assert_eq!(retry.failed(&error, 1, None, 0.5), None);
    }

    #[test]
    fn the_budget_stops_retries_until_successes_refill_it() {
        let retry = Retry::new(RetryPolicy::default());
        let granted = (0..20)
            .filter(|_| retry.failed(&unavailable(), 1, None, 0.5).is_some())
            .count();
        assert_eq!(granted, 4, "10 tokens: at half of them retries stop");
        for _ in 0..70 {
            retry.succeeded();
        }
        assert!(retry.failed(&unavailable(), 1, None, 0.5).is_some());
    }
}
