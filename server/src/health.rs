//! `grpc.health.v1`: SERVING means that a call would be answered. The model is warm, the server does not drain, and the
//! engine's thread answers: a probe goes through its command channel and back, because a process can look alive while
//! its engine hangs. A full queue is not ill health; taking a busy server out of rotation would move its load to others.

use std::time::Duration;

use espalier_engine::EngineHandle;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::method::contract;
use crate::shutdown::{Lifecycle, Phase};

/// Time between two probes.
const PERIOD: Duration = Duration::from_secs(1);
/// A step takes milliseconds; an engine that has not answered for so long is stuck.
const PATIENCE: Duration = Duration::from_secs(30);

/// The services that health knows, beside the empty name for the whole server.
fn services() -> Vec<String> {
    let mut names: Vec<String> = contract().into_iter().map(|(service, _)| service).collect();
    names.dedup();
    names.push(String::new());
    names
}

/// Says the same of every service: they share one engine.
pub(crate) async fn report(reporter: &HealthReporter, status: ServingStatus) {
    for service in services() {
        reporter.set_service_status(service, status).await;
    }
}

/// Watches engine and phase until the server drains; run as a task.
pub(crate) async fn watch(reporter: HealthReporter, engine: EngineHandle, lifecycle: Lifecycle) {
    let mut lame_duck = std::pin::pin!(lifecycle.reached(Phase::LameDuck));
    let mut healthy = None;
    loop {
        let probe = async {
            let alive = matches!(
                tokio::time::timeout(PATIENCE, engine.probe()).await,
                Ok(Ok(()))
            );
            let warm = lifecycle.phase() >= Phase::Serving;
            (alive, alive && warm)
        };
        let (alive, now) = tokio::select! {
            () = &mut lame_duck => break,
            seen = probe => seen,
        };
        if healthy != Some(now) {
            if !alive {
                tracing::error!("the engine does not answer; health says NOT_SERVING");
            }
            report(
                &reporter,
                if now {
                    ServingStatus::Serving
                } else {
                    ServingStatus::NotServing
                },
            )
            .await;
            healthy = Some(now);
        }
        tokio::select! {
            () = &mut lame_duck => break,
            () = tokio::time::sleep(PERIOD) => {}
        }
    }
    report(&reporter, ServingStatus::NotServing).await;
}
