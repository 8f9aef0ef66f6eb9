//! One test from its plan to its figures, and what all tests together mean for the exit status.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use crate::{
    bench::{
        cpu,
        driver::{Drive, Stop},
        record::{Recorder, Row},
        summary::Summary,
    },
    cli::{
        bench::{Ended, live::Live, plan::Plan},
        output::{Failure, Out},
    },
};

/// A finished test, with what only the driver knows.
pub(crate) struct Tested {
    pub(crate) summary: Summary,
    /// Every measured request.
    pub(crate) rows: Vec<Row>,
    /// Reasons that the rows name by their place.
    pub(crate) reasons: Vec<String>,
    /// Processor seconds of this process.
    pub(crate) cpu: Option<f64>,
    pub(crate) began: SystemTime,
    pub(crate) interrupted: bool,
}

/// Ctrl-C ends the test, not the program: what was measured is printed. A second one ends both.
pub(crate) fn stop_on_ctrl_c() -> Stop {
    let stop = Stop::new();
    let set = stop.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            set.set();
        }
        if tokio::signal::ctrl_c().await.is_ok() {
            std::process::exit(130);
        }
    });
    stop
}

/// `title` stands before the live view where several tests follow each other.
pub(crate) async fn test(plan: &Plan, stop: &Stop, out: Out, title: String) -> Tested {
    let cpu_before = cpu::seconds();
    let began = SystemTime::now();
    // The first moments of a schedule must not pass while the driver starts.
    let recorder = Arc::new(Recorder::new(Instant::now() + Duration::from_millis(5)));
    let live = Live::show(
        out,
        title,
        Arc::clone(&recorder),
        Arc::clone(&plan.target),
        plan.extent,
    );
    let drive = Drive {
        target: Arc::clone(&plan.target),
        workload: Arc::new(plan.workload.clone()),
        pattern: plan.pattern.clone(),
        extent: plan.extent,
        max_in_flight: plan.max_in_flight,
        stop: stop.clone(),
        recorder: Arc::clone(&recorder),
    };
    drive.run().await;
    let elapsed = recorder.start().elapsed();
    drop(live);
    let interrupted = stop.is_set();
    let mut measured = recorder.take();
    let summary = Summary::of(
        &measured,
        plan.extent,
        interrupted.then_some(elapsed),
        &plan.workload.tenants,
        &plan.judging,
    );
    let cpu = cpu_before
        .zip(cpu::seconds())
        .map(|(before, after)| after - before);
    Tested {
        summary,
        rows: std::mem::take(&mut measured.rows),
        reasons: measured.reasons,
        cpu,
        began,
        interrupted,
    }
}

/// Success, or the worst of what happened.
pub(crate) fn outcome(ended: &Ended, got_worse: bool) -> Result<(), Failure> {
    if ended.tested.iter().any(|tested| tested.interrupted) {
        return Err(Failure::Interrupted);
    }
    if let Some(empty) = ended
        .tested
        .iter()
        .find(|tested| tested.summary.completed == 0)
    {
        return Err(Failure::Local(why_empty(&empty.summary)));
    }
    let missed = ended.is_judged && ended.tested.iter().any(|tested| !tested.summary.is_met());
    if missed || got_worse {
        return Err(Failure::Missed);
    }
    Ok(())
}

fn why_empty(summary: &Summary) -> String {
    let common = summary
        .failures
        .iter()
        .max_by_key(|(_, failures)| failures.count);
    match common {
        Some((reason, failures)) => format!(
            "no request completed; {} failed, most with {reason}: {}",
            summary.failed, failures.example
        ),
        None => {
            "no request was due in the measured time; raise --duration or --rate, or lower --warmup"
                .to_owned()
        }
    }
}
