//! Kill -9 at any moment of a job: what comes out at the end is, bit for bit, what an undisturbed run makes.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use espalier_client::{Client, v1};
use espalier_tests::{Daemon, TINY};
use futures::StreamExt;

use crate::client_side::{
    client, completions, events, inline, start, succeeded, supervised, tenant,
};

const STEPS: u64 = 240;
const KILLS: u64 = 20;

fn daemon(data: &Path) -> Daemon {
    let flags = ["--model", TINY, "--kv-cache-bytes", "16MiB"];
    Daemon::spawn(data, &flags)
}

fn spec(client: &Client) -> v1::TrainingSpec {
    let row = |at: usize| {
        let (prompt, completion) = (format!("row {at} of"), format!(" answer {}", at * 37 % 11));
        (prompt, completion)
    };
    let rows: Vec<_> = (0..23).map(row).collect();
    let mut spec = supervised(client, "resumed", inline(completions(&rows)), STEPS);
    // Everything that has a state of its own between two steps takes part.
    spec.validation = Some(v1::training_spec::Validation::ValidationFraction(0.2));
    let hyper = spec.hyper_parameters.as_mut().unwrap();
    hyper.checkpoint_every_steps = Some(5);
    hyper.eval_every_steps = Some(17);
    hyper.gradient_accumulation_steps = Some(2);
    hyper.schedule = v1::LearningRateSchedule::Cosine.into();
    spec.lora.as_mut().unwrap().dropout = Some(0.1);
    spec
}

async fn digest(client: &Client, job: &str) -> String {
    let job = succeeded(client, job).await;
    let version = client.get_adapter_version(&job.version).await.unwrap();
    version.digest
}

/// Follows the job until it has done so many steps.
async fn until_step(client: &Client, job: &str, step: u64) {
    let mut replies = client.watch_training_job(job, 0).await.unwrap();
    while let Some(event) = replies.next().await {
        if event.unwrap().progress.is_some_and(|at| at.step >= step) {
            return;
        }
    }
    panic!("{job} ended before step {step}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_killed_anywhere_ends_as_if_it_had_not_been() {
    let undisturbed = {
        let data = tempfile::tempdir().unwrap();
        let daemon = daemon(data.path());
        let client = tenant(daemon.addr, "acme").await;
        let job = start(&client, spec(&client)).await;
        digest(&client, &job).await
    };

    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let mut random = u64::from(now.subsec_nanos()) | 1;
    let data = tempfile::tempdir().unwrap();
    let mut running = daemon(data.path());
    let acme = tenant(running.addr, "acme").await;
    let job = start(&acme, spec(&acme)).await;
    let mut moments = Vec::new();
    for kill in 0..KILLS {
        // xorshift: somewhere in this kill's part of the run, near no checkpoint in particular.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let step = kill * STEPS / (KILLS + 1) + 1 + random % (STEPS / (KILLS + 1) - 1);
        moments.push(step);
        let client = client(running.addr, "acme", None).await;
        until_step(&client, &job, step).await;
        running.kill();
        running = daemon(data.path());
    }
    let client = client(running.addr, "acme", None).await;
    assert_eq!(
        digest(&client, &job).await,
        undisturbed,
        "killed at steps {moments:?}"
    );
    let story = events(&client, &job, 0).await;
    for (event, number) in story.iter().zip(1..) {
        assert_eq!(event.sequence, number, "killed at steps {moments:?}");
    }
    let told = client.get_training_job(&job).await.unwrap();
    // A kill before the job's turn has come again is no attempt.
    assert!(
        (2..=KILLS + 1).contains(&u64::from(told.attempt)),
        "{told:?}"
    );
}
