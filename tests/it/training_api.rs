//! Training over a real socket on the tiny model: data in every spelling, jobs that are created once, watched, cancelled,
//! stopped early, and what they leave behind for serving.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use espalier_client::{Client, DatasetUpload, Error, v1};
use espalier_tests::TestServer;
use tonic::Code;
use v1::training_event::Event;
use v1::training_spec::{Method, Validation};

use crate::client_side::{
    answer, classification, client, completions, create, dataset, events, file, greedy, inline,
    labelled, start, streamed, succeeded, supervised, tenant,
};

const ID: &str = "0d6b5a34-5b70-4f4d-9a20-6f6f0c5c0a01";
const TEXTS: [(&str, &str); 8] = [
    ("my card was swallowed", "card"),
    ("the card does not work", "card"),
    ("send me a new card please", "card"),
    ("the card is blocked again", "card"),
    ("where is my transfer", "money"),
    ("the transfer did not arrive", "money"),
    ("money is missing on the account", "money"),
    ("my transfer went to a stranger", "money"),
];

/// Random answers: they can be learned by heart and by nothing else.
fn rows(count: usize) -> Vec<u8> {
    let row = |at: usize| {
        let answer = (at * 7919 + 13) % 1000;
        (format!("question {at}:"), format!(" {answer}"))
    };
    completions(&(0..count).map(row).collect::<Vec<_>>())
}

fn upload(path: std::path::PathBuf, id: &str, format: v1::DataFormat) -> DatasetUpload {
    DatasetUpload {
        parent: "tenants/acme".to_owned(),
        dataset_id: id.to_owned(),
        file: path,
        format,
        request_id: ID.to_owned(),
        ..Default::default()
    }
}

fn reason<T>(result: Result<T, Error>) -> (Code, String) {
    match result {
        Ok(_) => panic!("it was not refused"),
        Err(error) => (error.code, error.reason.clone()),
    }
}

/// The fields that a refusal names.
fn fields<T>(result: Result<T, Error>) -> Vec<String> {
    match result {
        Ok(_) => panic!("it was not refused"),
        Err(error) => {
            assert_eq!(error.code, Code::InvalidArgument, "{error}");
            let named = |violation: &espalier_client::FieldViolation| violation.field.clone();
            error.field_violations.iter().map(named).collect()
        }
    }
}

async fn jobs_of(client: &Client) -> Vec<v1::TrainingJob> {
    let request = v1::ListTrainingJobsRequest {
        parent: client.names().parent().unwrap(),
        ..Default::default()
    };
    client.list_training_jobs(request).await.unwrap().jobs
}

#[tokio::test]
async fn the_same_rows_are_the_same_data_in_every_spelling() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let dir = tempfile::tempdir().unwrap();
    let table = |separator: &str| {
        let mut text = ["id", "body", "team"].join(separator) + "\n";
        for (at, (body, team)) in TEXTS.iter().enumerate() {
            text += &([&at.to_string(), *body, *team].join(separator) + "\n");
        }
        text
    };
    let columns = v1::ColumnNames {
        text: "body".to_owned(),
        label: "team".to_owned(),
        ..Default::default()
    };
    let mut digests = Vec::new();
    for (id, format, content, columns) in [
        ("lines", v1::DataFormat::Jsonl, labelled(&TEXTS), None),
        (
            "commas",
            v1::DataFormat::Csv,
            table(",").into(),
            Some(columns.clone()),
        ),
        (
            "tabs",
            v1::DataFormat::Tsv,
            table("\t").into(),
            Some(columns),
        ),
    ] {
        let mut upload = upload(file(dir.path(), id, &content), id, format);
        upload.columns = columns;
        upload.request_id = String::new();
        let reply = acme.upload_dataset(upload).await.unwrap();
        let stored = reply.dataset.unwrap();
        assert_eq!(stored.name, format!("tenants/acme/datasets/{id}"));
        assert_eq!((stored.kind(), stored.rows), (v1::RowKind::Class, 8));
        assert_eq!(stored.size_bytes, content.len() as u64);
        let counts: Vec<_> = stored.label_counts.clone().into_iter().collect();
        assert_eq!(counts, [("card".to_owned(), 4), ("money".to_owned(), 4)]);
        assert_eq!(acme.get_dataset(&stored.name).await.unwrap(), stored);
        // The unused column is said, not dropped in silence.
        let ignored: Vec<_> = reply.report.unwrap().warnings;
        assert_eq!(ignored.iter().any(|one| one.field == "id"), id != "lines");
        let spec = classification(&acme, id, dataset(&stored.name), true);
        let job = start(&acme, spec).await;
        let version = succeeded(&acme, &job).await.version;
        digests.push(acme.get_adapter_version(&version).await.unwrap().digest);
    }
    assert!(
        digests.iter().all(|digest| *digest == digests[0]),
        "{digests:?}"
    );

    let page = |page_token| v1::ListDatasetsRequest {
        parent: "tenants/acme".to_owned(),
        page_size: 2,
        page_token,
    };
    let first = acme.list_datasets(page(String::new())).await.unwrap();
    let rest = acme
        .list_datasets(page(first.next_page_token))
        .await
        .unwrap();
    let names = |page: &[v1::Dataset]| page.iter().map(|one| one.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&first.datasets).len(), 2);
    assert_eq!(names(&rest.datasets), ["tenants/acme/datasets/tabs"]);
    assert!(rest.next_page_token.is_empty());
    acme.delete_dataset("tenants/acme/datasets/tabs")
        .await
        .unwrap();
    assert_eq!(
        reason(acme.get_dataset("tenants/acme/datasets/tabs").await),
        (Code::NotFound, "DATASET_NOT_FOUND".to_owned())
    );
    server.ended().await;
}

#[tokio::test]
async fn every_bad_line_is_reported_with_number_field_and_reason() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let dir = tempfile::tempdir().unwrap();
    let bad = [
        r#"{"text": "fine", "label": "a"}"#,
        r#"{"text": "no label"}"#,
        r#"not json"#,
        r#"{"text": "", "label": "a"}"#,
        r#"{"text": "fine too", "label": "b"}"#,
        r#"{"text": 7, "label": "b"}"#,
        r#"{"prompt": "another", "completion": " kind"}"#,
    ]
    .join("\n");
    let expected = [
        (2, "label", "missing_field"),
        (3, "", "json"),
        (4, "text", "empty"),
        (6, "text", "field_type"),
        (7, "", "mixed_kinds"),
    ];
    let check = |report: v1::DataReport| {
        let found: Vec<_> = report
            .problems
            .iter()
            .map(|one| (one.line, one.field.as_str(), one.rule.as_str()))
            .collect();
        assert_eq!(found, expected);
        assert!(report.problems.iter().all(|one| !one.reason.is_empty()));
        assert_eq!((report.problem_count, report.rows), (5, 0));
    };
    let path = file(dir.path(), "bad.jsonl", bad.as_bytes());
    let mut wanted = upload(path, "bad", v1::DataFormat::Jsonl);
    let stored = acme.upload_dataset(wanted.clone()).await;
    let found = fields(stored);
    assert_eq!(found.len(), expected.len(), "{found:?}");
    assert_eq!(found[0], "data[line 2].label");
    wanted.validate_only = true;
    let dry = acme.upload_dataset(wanted).await.unwrap();
    assert!(dry.dataset.is_none());
    check(dry.report.unwrap());

    let spec = classification(&acme, "never", inline(bad.into_bytes()), true);
    let mut request = create(&acme, spec);
    let found = fields(acme.create_training_job(request.clone()).await);
    assert_eq!(found[0], "spec.data[line 2].label");
    request.validate_only = true;
    let dry = acme.create_training_job(request).await.unwrap();
    assert!(dry.job.is_none());
    check(dry.report.unwrap());
    assert!(jobs_of(&acme).await.is_empty());
    server.ended().await;
}

#[tokio::test]
async fn a_request_id_makes_a_dataset_and_a_job_once() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let globex = tenant(server.addr, "globex").await;
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "rows.jsonl", &rows(4));
    let same = upload(path, "rows", v1::DataFormat::Jsonl);
    let first = acme.upload_dataset(same.clone()).await.unwrap().dataset;
    let again = acme.upload_dataset(same.clone()).await.unwrap().dataset;
    assert_eq!(first, again);
    let mut other = same.clone();
    other.dataset_id = "others".to_owned();
    let reused = (Code::InvalidArgument, "REQUEST_ID_REUSED".to_owned());
    assert_eq!(reason(acme.upload_dataset(other).await), reused);
    let mut fresh = same;
    fresh.request_id = String::new();
    assert_eq!(
        reason(acme.upload_dataset(fresh).await),
        (Code::AlreadyExists, "DATASET_EXISTS".to_owned())
    );

    let mut request = create(&acme, supervised(&acme, "a", inline(rows(4)), 2));
    request.request_id = ID.to_owned();
    let call = || acme.create_training_job(request.clone());
    // At the same moment, as two retries that overlap.
    let (one, two, three) = tokio::join!(call(), call(), call());
    let name = one.unwrap().job.unwrap().name;
    assert_eq!(two.unwrap().job.unwrap().name, name);
    assert_eq!(three.unwrap().job.unwrap().name, name);
    succeeded(&acme, &name).await;
    assert_eq!(call().await.unwrap().job.unwrap().name, name);
    let mut changed = request.clone();
    changed.spec.as_mut().unwrap().seed = Some(12);
    assert_eq!(reason(acme.create_training_job(changed).await), reused);
    // Another tenant's ids are its own.
    let mut theirs = create(&globex, supervised(&globex, "a", inline(rows(4)), 2));
    theirs.request_id = ID.to_owned();
    globex.create_training_job(theirs).await.unwrap();
    assert_eq!(jobs_of(&acme).await.len(), 1);
    server.ended().await;
}

#[tokio::test]
async fn a_dry_run_says_what_a_job_would_be_and_leaves_nothing() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let mut spec = supervised(&acme, "a", inline(rows(9)), 5);
    spec.seed = None;
    spec.validation = Some(Validation::ValidationFraction(0.34));
    let mut request = create(&acme, spec);
    request.validate_only = true;
    let dry = acme.create_training_job(request.clone()).await.unwrap();
    let quoted = dry.job.unwrap();
    assert!(quoted.name.is_empty() && quoted.create_time.is_none());
    assert!(jobs_of(&acme).await.is_empty());
    let stats = quoted.data_stats.clone().unwrap();
    assert_eq!((stats.train_examples, stats.validation_examples), (6, 3));
    let spec = quoted.spec.unwrap();
    assert!(spec.seed.is_some(), "a drawn seed is named");
    let hyper = spec.hyper_parameters.unwrap();
    assert!(hyper.adam_beta2 == Some(0.999) && hyper.max_grad_norm == Some(1.0));
    assert_eq!(spec.lora.as_ref().unwrap().target_modules.len(), 7);

    request.validate_only = false;
    request.spec.as_mut().unwrap().seed = spec.seed;
    let real = acme
        .create_training_job(request)
        .await
        .unwrap()
        .job
        .unwrap();
    assert_eq!(real.spec, Some(spec));
    assert_eq!(real.data_stats, Some(stats));
    succeeded(&acme, &real.name).await;
    server.ended().await;
}

#[tokio::test]
async fn a_watch_is_taken_up_from_any_number() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let mut spec = supervised(&acme, "a", inline(rows(9)), 12);
    spec.validation = Some(Validation::ValidationFraction(0.3));
    let hyper = spec.hyper_parameters.as_mut().unwrap();
    (hyper.eval_every_steps, hyper.checkpoint_every_steps) = (Some(4), Some(5));
    let job = start(&acme, spec).await;
    // Two that watch it live, one from the middle.
    let (all, tail) = tokio::join!(events(&acme, &job, 0), events(&acme, &job, 6));
    for (event, number) in all.iter().zip(1..) {
        assert_eq!((event.sequence, event.job.as_str()), (number, job.as_str()));
    }
    assert_eq!(tail, all[5..]);
    assert_eq!(events(&acme, &job, 0).await, all, "after the end");
    assert_eq!(events(&acme, &job, 9).await, all[8..]);
    assert!(events(&acme, &job, all.len() as u64 + 1).await.is_empty());

    let count = |is: fn(&Event) -> bool| {
        all.iter()
            .filter(|e| e.event.as_ref().is_some_and(is))
            .count()
    };
    assert_eq!(count(|e| matches!(e, Event::Step(_))), 12);
    // One of what it starts from, then every fourth step.
    assert_eq!(count(|e| matches!(e, Event::Evaluation(_))), 4);
    assert!(count(|e| matches!(e, Event::Checkpoint(_))) >= 2);
    assert_eq!(count(|e| matches!(e, Event::Published(_))), 1);
    let losses: Vec<f64> = all
        .iter()
        .filter_map(|event| match &event.event {
            Some(Event::Step(step)) => Some(step.loss),
            _ => None,
        })
        .collect();
    assert!(losses[11] < losses[0], "nothing was learned: {losses:?}");
    let job = acme.get_training_job(&job).await.unwrap();
    assert_eq!(job.last_sequence, all.len() as u64);
    assert_eq!(job.attempt, 1);
    server.ended().await;
}

#[tokio::test]
async fn a_cancelled_job_ends_at_once_and_publishes_nothing() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let job = start(&acme, supervised(&acme, "a", inline(rows(40)), 900)).await;
    let seen = events(&acme, &job, 0);
    let cancel = async {
        loop {
            let found = acme.get_training_job(&job).await.unwrap();
            if found.progress.is_some_and(|progress| progress.step > 2) {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        acme.cancel_training_job(&job).await.unwrap()
    };
    let (seen, cancelled) = tokio::join!(seen, cancel);
    assert_eq!(cancelled.state(), v1::TrainingJobState::Cancelled);
    assert_eq!(
        seen.last().unwrap().state(),
        v1::TrainingJobState::Cancelled
    );
    assert_eq!(
        reason(acme.cancel_training_job(&job).await),
        (Code::FailedPrecondition, "INVALID_JOB_STATE".to_owned())
    );
    let after = acme.get_training_job(&job).await.unwrap();
    assert!(after.version.is_empty() && after.progress.unwrap().step < 900);
    assert_eq!(after.last_sequence, seen.len() as u64);
    let request = greedy(&acme, Some("a"), "x", 1);
    assert_eq!(reason(acme.generate(request).await).0, Code::NotFound);
    server.ended().await;
}

#[tokio::test]
async fn a_trained_head_answers_classify_with_and_without_lora_below_it() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let ask = |adapter: Option<&str>, labels: &[&str]| v1::ClassifyRequest {
        target: Some(acme.target(adapter).unwrap()),
        texts: TEXTS.iter().map(|(text, _)| (*text).to_owned()).collect(),
        labels: labels.iter().map(|label| (*label).to_owned()).collect(),
        ..Default::default()
    };
    for (adapter, head_only) in [("head", true), ("deep", false)] {
        let mut spec = classification(&acme, adapter, inline(labelled(&TEXTS)), head_only);
        let hyper = spec.hyper_parameters.as_mut().unwrap();
        hyper.head_learning_rate = Some(0.05);
        hyper.learning_rate = Some(if head_only { 0.05 } else { 5e-3 });
        let job = start(&acme, spec).await;
        let job = succeeded(&acme, &job).await;
        assert_eq!(job.data_stats.unwrap().labels, ["card", "money"]);
        let reply = acme.classify(ask(Some(adapter), &[])).await.unwrap();
        assert_eq!(reply.method(), v1::ClassifyMethod::Head);
        assert_eq!(reply.effective.unwrap().adapters[0].version, job.version);
        for (result, (text, label)) in reply.results.iter().zip(&TEXTS) {
            assert_eq!(result.label, *label, "{adapter} on {text:?}: {result:?}");
            let sum: f32 = result.scores.iter().map(|one| one.probability).sum();
            assert!((sum - 1.0).abs() < 1e-5 && result.scores.len() == 2);
        }
        let version = acme.get_adapter_version(&job.version).await.unwrap();
        assert_eq!(version.labels, ["card", "money"]);
        let config = version.config.unwrap();
        assert_eq!(config.target_modules.is_empty(), head_only);
        let others = acme.classify(ask(Some(adapter), &["red", "blue"])).await;
        assert_eq!(fields(others), ["labels"]);
    }
    assert_eq!(fields(acme.classify(ask(None, &[])).await), ["labels"]);
    server.ended().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_version_goes_live_between_two_requests_and_never_inside_one() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let teach = async |answer: &str| {
        let row = |at: usize| (format!("case {at}"), format!(" {answer}"));
        let rows: Vec<_> = (0..6).map(row).collect();
        let job = start(
            &acme,
            supervised(&acme, "a", inline(completions(&rows)), 20),
        )
        .await;
        succeeded(&acme, &job).await.version
    };
    let first = teach("one one one").await;
    let stop = Arc::new(AtomicBool::new(false));
    let listener = {
        let (acme, stop) = (acme.clone(), Arc::clone(&stop));
        tokio::spawn(async move {
            let mut heard = Vec::new();
            while !stop.load(Ordering::SeqCst) {
                heard.push(streamed(&acme, greedy(&acme, Some("a"), "case 3", 40)).await);
            }
            heard
        })
    };
    let second = teach("two two two").await;
    // What is live when the job says so is what the next request gets.
    let (text, now) = answer(&acme, Some("a"), "case 3", 40).await;
    assert_eq!(now, std::slice::from_ref(&second));
    stop.store(true, Ordering::SeqCst);
    let heard = listener.await.unwrap();
    let short = |version: &str| {
        version
            .strip_prefix("tenants/acme/adapters/")
            .unwrap()
            .to_owned()
    };
    let (old, by_name) = answer(&acme, Some(&short(&first)), "case 3", 40).await;
    assert_eq!(by_name, std::slice::from_ref(&first));
    assert_ne!(old, text);
    let mut versions = Vec::new();
    for (said, by) in &heard {
        let expected = if by[0] == first { &old } else { &text };
        assert_eq!(said, expected, "{by:?} did not answer alone");
        versions.push(by[0].clone());
    }
    assert_eq!(versions[0], first);
    assert!(versions.is_sorted(), "the default went back: {versions:?}");
    let adapter = acme.get_adapter("tenants/acme/adapters/a").await.unwrap();
    assert_eq!((adapter.latest_version, adapter.version_count), (2, 2));
    assert_eq!(adapter.aliases[0].version, second);
    server.ended().await;
}

#[tokio::test]
async fn a_job_that_gets_no_better_stops_early_and_keeps_its_best() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let mut spec = supervised(&acme, "a", inline(rows(24)), 400);
    spec.validation = Some(Validation::ValidationFraction(0.25));
    let hyper = spec.hyper_parameters.as_mut().unwrap();
    hyper.eval_every_steps = Some(5);
    hyper.early_stopping_patience = Some(2);
    let job = start(&acme, spec).await;
    let job = succeeded(&acme, &job).await;
    let progress = job.progress.unwrap();
    assert!(progress.step < 400, "it ran to its end");
    let all = events(&acme, &job.name, 0).await;
    let mut evaluations = Vec::new();
    let mut published = None;
    for event in all {
        match event.event {
            Some(Event::Evaluation(found)) => evaluations.push(found),
            Some(Event::Published(found)) => published = Some(found),
            _ => {}
        }
    }
    let best = evaluations
        .iter()
        .min_by(|a, b| a.loss.total_cmp(&b.loss))
        .unwrap();
    assert_eq!(progress.best_step, Some(best.step));
    assert_eq!(published.unwrap().step, best.step);
    assert_eq!(evaluations.last().unwrap().step, best.step + 10);
    let version = acme.get_adapter_version(&job.version).await.unwrap();
    assert_eq!(version.metrics["loss"], best.loss);
    assert_eq!(version.training_job, job.name);
    server.ended().await;
}

#[tokio::test]
async fn what_a_job_may_not_ask_is_refused_by_its_field() {
    let settings = [
        ("max_inline_rows", "9"),
        ("max_rank", "8"),
        ("max_steps", "50"),
        ("max_epochs", "100"),
        ("max_batch_size", "6"),
        ("max_example_tokens", "64"),
    ];
    let server = TestServer::start(&settings).await;
    let acme = tenant(server.addr, "acme").await;
    let check = async |change: &dyn Fn(&mut v1::TrainingSpec)| {
        let mut spec = supervised(&acme, "a", inline(rows(9)), 50);
        change(&mut spec);
        let mut request = create(&acme, spec);
        request.validate_only = true;
        acme.create_training_job(request).await
    };
    let hyper = |spec: &mut v1::TrainingSpec, change: fn(&mut v1::HyperParameters)| {
        change(spec.hyper_parameters.as_mut().unwrap());
    };
    let lora = |spec: &mut v1::TrainingSpec, change: fn(&mut v1::LoraConfig)| {
        change(spec.lora.as_mut().unwrap());
    };
    // At every limit.
    check(&|spec| {
        hyper(spec, |hyper| hyper.batch_size = Some(6));
        lora(spec, |lora| lora.rank = Some(8));
    })
    .await
    .unwrap();
    type Change<'a> = &'a dyn Fn(&mut v1::TrainingSpec);
    let cases: [(&str, Change<'_>); 13] = [
        ("spec.method", &|spec| spec.method = None),
        ("spec.data", &|spec| spec.data = None),
        ("spec.adapter", &|spec| spec.adapter = "a".to_owned()),
        ("spec.adapter", &|spec| {
            spec.adapter = "tenants/globex/adapters/a".to_owned()
        }),
        ("spec.data", &|spec| spec.data = Some(inline(rows(10)))),
        ("spec.data", &|spec| {
            spec.method = Some(Method::Classification(Default::default()))
        }),
        ("hyper_parameters.schedule", &|spec| {
            hyper(spec, |h| h.schedule = 77)
        }),
        ("hyper_parameters.max_steps", &|spec| {
            hyper(spec, |h| h.max_steps = Some(51))
        }),
        ("hyper_parameters.batch_size", &|spec| {
            hyper(spec, |h| h.batch_size = Some(7))
        }),
        ("hyper_parameters.max_example_tokens", &|spec| {
            hyper(spec, |h| h.max_example_tokens = Some(65));
        }),
        ("hyper_parameters.epochs", &|spec| {
            hyper(spec, |h| h.epochs = Some(101.0))
        }),
        ("lora.rank", &|spec| lora(spec, |l| l.rank = Some(9))),
        ("lora.target_modules", &|spec| {
            lora(spec, |l| l.target_modules = vec!["lm_head".to_owned()])
        }),
    ];
    for (field, change) in cases {
        let reply = check(change).await;
        // A dry run reports rows; everything else is refused as it would be.
        if let Ok(reply) = &reply {
            assert!(
                reply.job.is_none() && field == "spec.data",
                "{field}: accepted"
            );
            continue;
        }
        let found = fields(reply);
        assert!(
            found.iter().all(|one| one.contains(field)),
            "{field}: {found:?}"
        );
    }
    let mut spec = supervised(&acme, "a", inline(rows(4)), 2);
    if let Some(v1::training_data::Source::Inline(rows)) = &mut spec.data.as_mut().unwrap().source {
        rows.format = 99;
    }
    let found = fields(acme.create_training_job(create(&acme, spec)).await);
    assert_eq!(found, ["spec.data.inline.format"]);
    server.ended().await;
}

#[tokio::test]
async fn quotas_of_jobs_and_datasets_hold_and_another_tenant_sees_nothing() {
    let settings = [
        ("max_jobs_per_tenant", "2"),
        ("max_datasets_per_tenant", "1"),
        ("max_dataset_bytes", "8KiB"),
        ("max_dataset_rows", "20"),
        ("service_key", crate::client_side::SERVICE_KEY),
    ];
    let server = TestServer::start(&settings).await;
    let (acme, globex) = crate::adapter_api::two_tenants(&server).await;
    // Long enough not to end before it is cancelled.
    let job = || {
        let mut spec = supervised(&acme, "a", inline(rows(20)), 2000);
        spec.hyper_parameters.as_mut().unwrap().batch_size = Some(1);
        create(&acme, spec)
    };
    let first = acme
        .create_training_job(job())
        .await
        .unwrap()
        .job
        .unwrap()
        .name;
    let second = acme
        .create_training_job(job())
        .await
        .unwrap()
        .job
        .unwrap()
        .name;
    assert_eq!(
        reason(acme.create_training_job(job()).await),
        (Code::ResourceExhausted, "QUOTA_EXCEEDED".to_owned())
    );
    let denied = Code::PermissionDenied;
    assert_eq!(reason(globex.get_training_job(&first).await).0, denied);
    assert_eq!(reason(globex.cancel_training_job(&first).await).0, denied);
    assert_eq!(reason(globex.watch_training_job(&first, 0).await).0, denied);
    for name in [first, second] {
        acme.cancel_training_job(&name).await.unwrap();
    }

    let dir = tempfile::tempdir().unwrap();
    let send = async |id: &str, content: Vec<u8>| {
        let mut upload = upload(file(dir.path(), id, &content), id, v1::DataFormat::Jsonl);
        upload.request_id = String::new();
        acme.upload_dataset(upload).await
    };
    assert_eq!(fields(send("many", rows(21)).await), ["data[line 21]"]);
    assert_eq!(
        reason(send("large", rows(400)).await),
        (Code::InvalidArgument, "ARTIFACT_TOO_LARGE".to_owned())
    );
    send("one", rows(20)).await.unwrap();
    assert_eq!(
        reason(send("two", rows(20)).await),
        (Code::ResourceExhausted, "QUOTA_EXCEEDED".to_owned())
    );
    let theirs = globex.get_dataset("tenants/acme/datasets/one").await;
    let missing = globex.get_dataset("tenants/acme/datasets/none").await;
    assert_eq!(reason(theirs), (denied, "PERMISSION_DENIED".to_owned()));
    assert_eq!(reason(missing), (denied, "PERMISSION_DENIED".to_owned()));
    let nobody = client(server.addr, "acme", None).await;
    assert_eq!(
        reason(nobody.get_dataset("tenants/acme/datasets/one").await),
        (Code::Unauthenticated, "CREDENTIALS_MISSING".to_owned())
    );
    server.ended().await;
}
