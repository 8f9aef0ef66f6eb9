//! A job's life as a user sees it: what it would take before it starts, put aside and taken up again, and what is told of it at
//! the end.

use std::process::Output;

use espalier_client::{Client, v1};
use espalier_tests::TestServer;
use futures::StreamExt;
use tonic::Code;

use crate::client_side::{
    completions, create, events, inline, start, succeeded, supervised, tenant,
};

const STEPS: u64 = 300;

fn spec(client: &Client, adapter: &str) -> v1::TrainingSpec {
    let row = |at: usize| (format!("row {at} of"), format!(" answer {}", at * 37 % 11));
    let rows: Vec<_> = (0..23).map(row).collect();
    let mut spec = supervised(client, adapter, inline(completions(&rows)), STEPS);
    spec.validation = Some(v1::training_spec::Validation::ValidationFraction(0.2));
    spec
}

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
async fn a_job_put_aside_goes_on_to_the_same_adapter() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let whole = succeeded(&acme, &start(&acme, spec(&acme, "whole")).await).await;

    let job = start(&acme, spec(&acme, "paused")).await;
    for step in [5, 60] {
        until_step(&acme, &job, step).await;
        let paused = acme.pause_training_job(&job).await.unwrap();
        assert_eq!(paused.state(), v1::TrainingJobState::Paused);
        let at = paused.progress.unwrap().step;
        assert!((step..STEPS).contains(&at), "paused at {at}");
        let refused = acme.delete_adapter(v1::DeleteAdapterRequest {
            name: acme.names().adapter("paused").unwrap(),
            ..Default::default()
        });
        assert_eq!(refused.await.unwrap_err().code, Code::FailedPrecondition);
        let still = acme.get_training_job(&job).await.unwrap();
        assert_eq!(still.progress.unwrap().step, at, "it rests");
        acme.resume_training_job(&job).await.unwrap();
    }
    let done = succeeded(&acme, &job).await;
    assert_eq!(done.attempt, 3);
    let digest = async |version: &str| acme.get_adapter_version(version).await.unwrap().digest;
    assert_eq!(digest(&done.version).await, digest(&whole.version).await);
    let early = acme.resume_training_job(&job).await.unwrap_err();
    assert_eq!(early.code, Code::FailedPrecondition, "{early}");
    let late = acme.pause_training_job(&job).await.unwrap_err();
    assert_eq!(late.code, Code::FailedPrecondition, "{late}");
    server.ended().await;
}

#[tokio::test]
async fn a_job_that_would_hold_too_much_is_refused_before_its_first_step() {
    let server = TestServer::start(&[("training_job_bytes", "5MiB")]).await;
    let acme = tenant(server.addr, "acme").await;
    let told = |text: &str| {
        let named = ["training_job_bytes", "5242880", "smaller batch or rank"];
        assert!(named.iter().all(|name| text.contains(name)), "{text}");
    };
    let mut wanted = spec(&acme, "large");
    wanted.lora.as_mut().unwrap().rank = Some(64);
    let mut dry = create(&acme, wanted.clone());
    dry.validate_only = true;
    let refused = acme.create_training_job(dry).await.unwrap_err();
    told(&refused.to_string());
    let job = start(&acme, wanted).await;
    let story = events(&acme, &job, 0).await;
    let step = |event: &v1::TrainingEvent| event.progress.as_ref().is_some_and(|at| at.step > 0);
    assert!(!story.iter().any(step), "{story:?}");
    let failed = acme.get_training_job(&job).await.unwrap();
    assert_eq!(failed.state(), v1::TrainingJobState::Failed);
    told(&failed.error.unwrap().message);
    // Nobody else notices.
    let mut small = spec(&acme, "small");
    small.lora.as_mut().unwrap().rank = Some(1);
    small.hyper_parameters.as_mut().unwrap().batch_size = Some(1);
    succeeded(&acme, &start(&acme, small).await).await;
    server.ended().await;
}

#[tokio::test]
async fn a_job_tells_what_it_would_take_what_was_chosen_and_what_came_of_it() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let mut wanted = spec(&acme, "told");
    wanted.hyper_parameters.as_mut().unwrap().weight_decay = None;
    let mut dry = create(&acme, wanted.clone());
    dry.validate_only = true;
    let reply = acme.create_training_job(dry).await.unwrap();
    let estimate = reply.estimate.unwrap();
    assert_eq!(estimate.unmeasured, "");
    assert!(estimate.duration.is_some() && estimate.tokens_per_second > 0.0);
    assert_eq!(estimate.queue_position, 0);
    // Parameters, gradients, two moments and the best so far, four bytes each, and what passes keep.
    assert!(
        estimate.peak_bytes > 20 * estimate.trained_parameters,
        "{estimate:?}"
    );

    let done = succeeded(&acme, &start(&acme, wanted).await).await;
    let outcome = done.outcome.unwrap();
    assert_eq!(outcome.trained_parameters, estimate.trained_parameters);
    assert_eq!(outcome.peak_bytes, estimate.peak_bytes);
    let (before, after) = (outcome.baseline.unwrap(), outcome.result.unwrap());
    assert_eq!(before.step, 0);
    assert!(after.loss < before.loss && after.step == outcome.kept_step);
    assert!(outcome.quanta > 0 && outcome.held.is_some());
    let version = acme.get_adapter_version(&done.version).await.unwrap();
    assert_eq!(outcome.size_bytes, version.size_bytes);
    let chosen: Vec<&str> = done
        .choices
        .iter()
        .map(|choice| choice.field.as_str())
        .collect();
    assert!(
        chosen.contains(&"hyper_parameters.weight_decay"),
        "{chosen:?}"
    );
    assert!(
        !chosen.contains(&"hyper_parameters.max_steps"),
        "{chosen:?}"
    );
    assert!(done.choices.iter().all(|choice| !choice.reason.is_empty()));
    let lineage = done.lineage.unwrap();
    assert_eq!(lineage.base_digest, version.base_digest);
    assert_eq!(lineage.data_sha256.len(), 64);
    let story = events(&acme, &done.name, 0).await;
    let first = story.iter().find_map(|event| match &event.event {
        Some(v1::training_event::Event::Evaluation(found)) => Some(*found),
        _ => None,
    });
    assert_eq!(first.unwrap().loss, before.loss);

    let dir = tempfile::tempdir().unwrap();
    let report = async |file: &str| -> Output {
        let mut command = tokio::process::Command::new(espalier_tests::espalier());
        command
            .arg("--server")
            .arg(format!("http://{}", server.addr))
            .args(["--tenant", "acme", "jobs", "report", &done.name, "--out"])
            .arg(dir.path().join(file));
        command.output().await.unwrap()
    };
    for file in ["job.html", "job.svg"] {
        let output = report(file).await;
        assert!(output.status.success(), "{output:?}");
        let text = std::fs::read_to_string(dir.path().join(file)).unwrap();
        assert!(text.contains("<polyline class=\"train\"") && text.contains("<circle"));
        assert_eq!(text.contains(&lineage.data_sha256), file == "job.html");
    }
    assert_eq!(report("job.pdf").await.status.code(), Some(2));
    server.ended().await;
}
