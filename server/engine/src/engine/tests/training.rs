//! Training beside serving: both go on, and neither changes what the other computes.

use std::sync::Arc;
use std::time::Duration;

use espalier_adapters::config::{LoraConfig, Site};
use espalier_adapters::train::examples::{Example, Examples};

use super::fixture::{Fixture, collect, eventually, fixture, prompt, small};
use super::sampled;
use crate::config::EngineConfig;
use crate::error::EngineError;
use crate::train::trainer::{HyperParameters, Method};
use crate::train::{JobEvent, TrainEvent, TrainPlan, TrainingJob, TrainingSubmission};

fn plan(steps: u64) -> TrainPlan {
    let items: Vec<_> = (0..12)
        .map(|i| {
            let ids = prompt(100 + i, 24);
            let learn = (0..ids.len()).map(|position| position >= 8).collect();
            Example::Lm { ids, learn }
        })
        .collect();
    TrainPlan {
        method: Method::Lm,
        adapter: Some(LoraConfig::new(4, 8.0, &[Site::Q, Site::V, Site::Down]).into()),
        hp: HyperParameters {
            max_steps: Some(steps),
            epochs: Some(1_000_000),
            batch_size: 4,
            ..HyperParameters::default()
        },
        seed: 3,
        train: Examples {
            lines: (1..=items.len() as u64).collect(),
            items,
            labels: None,
        },
        valid: None,
        init: None,
    }
}

pub(super) fn start(
    fixture: &Fixture,
    tenant: &str,
    steps: u64,
    checkpoint: Option<Vec<u8>>,
) -> TrainingJob {
    let submission = TrainingSubmission {
        job: "job".to_owned(),
        tenant: Arc::from(tenant),
        plan: plan(steps),
        checkpoint,
    };
    fixture.engine.train(submission).unwrap()
}

/// The losses of a job's steps.
pub(super) fn losses(fixture: &Fixture, steps: u64) -> Vec<f64> {
    let mut job = start(fixture, "acme", steps, None);
    let mut losses = Vec::new();
    while let Some(event) = job.events.blocking_recv() {
        match event {
            JobEvent::Progress(TrainEvent::Step(report)) => losses.push(report.loss),
            JobEvent::Failed(error) => panic!("{error}"),
            _ => {}
        }
    }
    losses
}

/// Steps seen, the last checkpoint, and the last event.
pub(super) fn to_end(job: &mut TrainingJob) -> (u64, Option<Vec<u8>>, Option<JobEvent>) {
    let (mut steps, mut checkpoint, mut last) = (0, None, None);
    while let Some(event) = job.events.blocking_recv() {
        match &event {
            JobEvent::Progress(TrainEvent::Step(report)) => steps = report.step,
            JobEvent::Progress(TrainEvent::Checkpoint { bytes, .. }) => {
                checkpoint = Some(bytes.clone())
            }
            _ => {}
        }
        last = Some(event);
    }
    (steps, checkpoint, last)
}

#[test]
fn training_and_serving_go_on_together_and_do_not_meet() {
    let quiet = fixture(EngineConfig::default());
    let mut alone = start(&quiet, "a", 12, None);
    let (
        _,
        _,
        Some(JobEvent::Finished {
            finished: expected, ..
        }),
    ) = to_end(&mut alone)
    else {
        panic!()
    };
    let kind = || sampled(prompt(5, 10), 5, 60);
    let expected_reply = quiet.ask(Some(0), kind());

    let busy = fixture(EngineConfig {
        training_quantum: Duration::from_millis(2),
        ..small()
    });
    let mut jobs: Vec<_> = ["a", "b"]
        .into_iter()
        .map(|tenant| start(&busy, tenant, 12, None))
        .collect();
    for _ in 0..4 {
        let receivers: Vec<_> = (0..3).map(|_| busy.submit(Some(0), kind())).collect();
        for receiver in receivers {
            assert_eq!(collect(receiver).results(), expected_reply.results());
        }
    }
    let (mut held, mut quanta) = (Duration::ZERO, 0);
    for job in &mut jobs {
        let (steps, _, last) = to_end(job);
        let Some(JobEvent::Finished { finished, impact }) = last else {
            panic!("{last:?}")
        };
        assert_eq!(steps, 12);
        assert_eq!(
            finished.artifact, expected.artifact,
            "the same adapter, bit for bit"
        );
        // A job that was the other's guest from its first pass to its last held nothing of its own.
        assert!(impact.shared_passes > 0 || impact.held > Duration::ZERO);
        assert!(impact.waited > Duration::ZERO, "{impact:?}");
        held += impact.held;
        quanta += impact.quanta;
    }
    assert!(held > Duration::ZERO && quanta > 1, "{held:?}, {quanta}");
    eventually("jobs gone", || busy.engine.stats().training_jobs == 0);
}

#[test]
fn a_cancelled_job_ends_and_frees_its_place() {
    let fixture = fixture(EngineConfig {
        max_training_jobs: 1,
        ..small()
    });
    let mut job = start(&fixture, "a", 1_000_000, None);
    let refused = fixture.engine.train(TrainingSubmission {
        job: "second".to_owned(),
        tenant: Arc::from("b"),
        plan: plan(1),
        checkpoint: None,
    });
    assert!(matches!(
        refused,
        Err(EngineError::TrainingCapacity {
            active: 1,
            limit: 1
        })
    ));
    while !matches!(
        job.events.blocking_recv(),
        Some(JobEvent::Progress(TrainEvent::Step(_)))
    ) {}
    job.control.cancel();
    assert!(matches!(to_end(&mut job).2, Some(JobEvent::Cancelled)));
    eventually("place free", || fixture.engine.stats().training_jobs == 0);
    let unread = start(&fixture, "a", 1_000_000, None);
    drop(unread);
    eventually("nobody watches", || {
        fixture.engine.stats().training_jobs == 0
    });
}

#[test]
fn a_plan_that_cannot_be_carried_out_fails_with_the_reason() {
    let fixture = fixture(EngineConfig::default());
    let mut bad = plan(3);
    bad.adapter = None;
    let submission = TrainingSubmission {
        job: "bad".to_owned(),
        tenant: Arc::from("a"),
        plan: bad,
        checkpoint: None,
    };
    let mut job = fixture.engine.train(submission).unwrap();
    let (_, _, last) = to_end(&mut job);
    assert!(
        matches!(
            last,
            Some(JobEvent::Failed(EngineError::TrainingFailed { .. }))
        ),
        "{last:?}"
    );
}

#[test]
fn a_drained_job_goes_on_to_the_same_end() {
    let whole = fixture(EngineConfig::default());
    let (
        _,
        _,
        Some(JobEvent::Finished {
            finished: expected, ..
        }),
    ) = to_end(&mut start(&whole, "a", 40, None))
    else {
        panic!()
    };
    let first = fixture(EngineConfig::default());
    let mut job = start(&first, "a", 40, None);
    while !matches!(
        job.events.blocking_recv(),
        Some(JobEvent::Progress(TrainEvent::Step(_)))
    ) {}
    let engine = first.engine.clone();
    let drain = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime
            .block_on(engine.drain(Duration::from_secs(20)))
            .unwrap();
    });
    let (_, checkpoint, last) = to_end(&mut job);
    drain.join().unwrap();
    assert!(matches!(last, Some(JobEvent::Suspended)), "{last:?}");
    let second = fixture(EngineConfig::default());
    let mut resumed = start(&second, "a", 40, Some(checkpoint.unwrap()));
    let (_, _, Some(JobEvent::Finished { finished, .. })) = to_end(&mut resumed) else {
        panic!()
    };
    assert_eq!(finished.artifact, expected.artifact);
}
