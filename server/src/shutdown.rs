//! How the server comes up and goes down: its phase, seen by everybody who has to act on it.
//!
//! Going down has three steps. Lame duck: health says NOT_SERVING and everything still works, so that a balancer can
//! look away. Draining: no new calls, running ones finish, training stops at a checkpoint. Cut: what is left ends with
//! SERVER_DRAINING. This file must not know what is served.

use std::time::Duration;

use tokio::sync::watch;

/// What the server is doing; it only ever moves down this list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The model is being loaded.
    Starting,
    /// Calls are answered.
    Serving,
    /// Calls are answered, health says NOT_SERVING.
    LameDuck,
    /// New calls are turned away, running ones finish.
    Draining,
    /// Running calls are cut.
    Cut,
}

/// The phase, to read, await and advance. Clones share it.
#[derive(Debug, Clone)]
pub struct Lifecycle(watch::Sender<Phase>);

impl Default for Lifecycle {
    fn default() -> Self {
        Lifecycle(watch::Sender::new(Phase::Starting))
    }
}

impl Lifecycle {
    /// The current phase.
    pub fn phase(&self) -> Phase {
        *self.0.borrow()
    }

    /// Moves on; moving back is ignored, so that two signals cannot fight.
    pub fn advance(&self, to: Phase) {
        self.0.send_if_modified(|phase| {
            let moves = to > *phase;
            if moves {
                tracing::info!(from = ?*phase, ?to, "phase");
                *phase = to;
            }
            moves
        });
    }

    /// Resolves once the phase is `phase` or later.
    pub fn reached(&self, phase: Phase) -> impl Future<Output = ()> + Send + 'static {
        let mut receiver = self.0.subscribe();
        async move {
            // An error means that the sender is gone, and with it the server: that is as late as it gets.
            let _ = receiver.wait_for(|now| *now >= phase).await;
        }
    }
}

/// Resolves when the process is asked to stop: SIGTERM, SIGINT (Ctrl-C).
///
/// # Errors
/// When the operating system refuses a signal handler.
pub fn signal() -> std::io::Result<impl Future<Output = &'static str> + Send> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    })
}

/// Waits for `work`, at most so long; says whether it ended by itself.
pub(crate) async fn within(limit: Duration, work: impl Future<Output = ()>) -> bool {
    tokio::time::timeout(limit, work).await.is_ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    #[tokio::test]
    async fn phases_move_forward_only_and_wake_waiters() {
        let lifecycle = Lifecycle::default();
        let waiter = tokio::spawn(lifecycle.reached(Phase::Draining));
        lifecycle.advance(Phase::Serving);
        lifecycle.advance(Phase::LameDuck);
        lifecycle.advance(Phase::Serving);
        assert_eq!(lifecycle.phase(), Phase::LameDuck);
        assert!(!waiter.is_finished());
        lifecycle.advance(Phase::Cut);
        waiter.await.unwrap();
        assert!(within(Duration::from_secs(1), lifecycle.reached(Phase::Draining)).await);
    }
}
