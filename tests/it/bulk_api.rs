//! Bulk jobs over a real socket: a file in, a file out, each line once whatever happens to the server in between.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use espalier_client::Client;
use espalier_client::bulk::BulkUpload;
use espalier_proto::v1;
use espalier_tests::{Daemon, TINY, TestServer, espalier, espalierd_command};
use serde_json::{Value, json};
use tokio_stream::StreamExt;
use tonic::Code;

use crate::adapter_api::two_tenants;
use crate::client_side::{SERVICE_KEY, client, register};

/// A file of lines.
fn write(path: &Path, lines: &[Value]) {
    let text: Vec<String> = lines.iter().map(Value::to_string).collect();
    std::fs::write(path, text.join("\n")).unwrap();
}

fn read(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "whole lines only");
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn upload(client: &Client, operation: v1::BulkOperation, file: &Path) -> BulkUpload {
    BulkUpload {
        parent: client.names().parent().unwrap(),
        operation,
        file: file.to_owned(),
        ..Default::default()
    }
}

/// Follows a job to its end.
async fn ended(client: &Client, name: &str) -> v1::BulkJob {
    let mut jobs = client.watch_bulk_job(name).await.unwrap();
    let mut last = None;
    let mut done = 0;
    while let Some(job) = jobs.next().await {
        let job = job.unwrap();
        let now = job.progress.unwrap().done;
        assert!(now >= done, "progress never goes back: {done}, {now}");
        done = now;
        last = Some(job);
    }
    last.unwrap()
}

fn generate_line(index: usize, tokens: usize) -> Value {
    json!({"key": format!("line-{index}"), "request": {
        "text": format!("text number {index}"),
        "sampling": {"temperature": 0},
        "stop": {"max_tokens": tokens, "ignoreEos": true},
    }})
}

#[tokio::test]
async fn a_file_is_answered_line_by_line_as_single_calls_would_be() {
    let server = TestServer::start(&[]).await;
    let client = client(server.addr, "acme", None).await;
    register(&client, "acme").await;
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let lines: Vec<Value> = (0..30)
        .map(|index| generate_line(index, 1 + (index * 7) % 23))
        .collect();
    write(&input, &lines);
    let created = client
        .create_bulk_job(upload(&client, v1::BulkOperation::Generate, &input))
        .await
        .unwrap();
    assert_eq!(created.items, 30);
    let job = ended(&client, &created.job.unwrap().name).await;
    assert_eq!(job.state(), v1::BulkJobState::Succeeded);
    let progress = job.progress.unwrap();
    assert_eq!((progress.done, progress.failed), (30, 0));
    let (bytes, complete) = client
        .download_bulk_results(&job.name, &output)
        .await
        .unwrap();
    assert_eq!((bytes, complete), (progress.output_bytes, true));
    let answers = read(&output);
    let mut tokens = 0;
    for (line, answer) in lines.iter().zip(&answers) {
        assert_eq!(line["key"], answer["key"], "line n answers line n");
        let alone = client
            .generate(crate::inference_api::generate(
                line["request"]["text"].as_str().unwrap(),
                u32::try_from(line["request"]["stop"]["max_tokens"].as_u64().unwrap()).unwrap(),
            ))
            .await
            .unwrap();
        let candidate = &answer["response"]["candidates"][0];
        assert_eq!(candidate["text"], alone.candidates[0].text.as_str());
        tokens += candidate["token_ids"].as_array().unwrap().len() as u64;
    }
    assert_eq!(tokens, progress.output_tokens);
    // A part of the output is completed, not fetched again.
    let whole = std::fs::read(&output).unwrap();
    std::fs::write(&output, &whole[..100]).unwrap();
    client
        .download_bulk_results(&job.name, &output)
        .await
        .unwrap();
    assert_eq!(std::fs::read(&output).unwrap(), whole);
    client.delete_bulk_job(&job.name).await.unwrap();
    let gone = client.get_bulk_job(&job.name).await.unwrap_err();
    assert_eq!(
        (gone.code, gone.reason.as_str()),
        (Code::NotFound, "BULK_JOB_NOT_FOUND")
    );
    server.ended().await;
}

#[tokio::test]
async fn every_bad_line_is_named_before_anything_runs() {
    let server =
        TestServer::start(&[("max_bulk_rows", "8"), ("max_bulk_input_bytes", "2KiB")]).await;
    let client = client(server.addr, "acme", None).await;
    register(&client, "acme").await;
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.jsonl");
    let good = generate_line(1, 3);
    let text = [
        good.to_string(),
        "{not json".to_owned(),
        good.to_string(),
        json!({"key": "a", "request": {"text": "x", "sampling": {"temperature": -1}}}).to_string(),
        json!({"key": "b", "request": {"texts": ["x"]}}).to_string(),
        json!({"key": "c", "request": {"text": "x", "target": {}}}).to_string(),
    ]
    .join("\n");
    std::fs::write(&input, &text).unwrap();
    let ask = |validate_only| BulkUpload {
        validate_only,
        ..upload(&client, v1::BulkOperation::Generate, &input)
    };
    let reply = client.create_bulk_job(ask(true)).await.unwrap();
    let found: Vec<_> = reply
        .findings
        .iter()
        .map(|finding| (finding.line, finding.field.as_str()))
        .collect();
    let expected = [
        (2, ""),
        (3, "key"),
        (4, "request"),
        (5, "request"),
        (6, "request.target"),
    ];
    assert_eq!(found, expected, "{:?}", reply.findings);
    assert!(reply.job.is_none());
    let error = client.create_bulk_job(ask(false)).await.unwrap_err();
    assert_eq!(error.code, Code::InvalidArgument);
    for part in ["input[line 2]", "input[line 3].key", "input[line 6]"] {
        assert!(error.message.contains(part), "{part} in {}", error.message);
    }
    let list = v1::ListBulkJobsRequest {
        parent: client.names().parent().unwrap(),
        ..Default::default()
    };
    assert!(client.list_bulk_jobs(list).await.unwrap().jobs.is_empty());
    // Limits.
    write(
        &input,
        &(0..9).map(|i| generate_line(i, 1)).collect::<Vec<_>>(),
    );
    let error = client.create_bulk_job(ask(false)).await.unwrap_err();
    assert!(error.message.contains("limit of 8"), "{}", error.message);
    std::fs::write(&input, "x".repeat(3000)).unwrap();
    let error = client.create_bulk_job(ask(false)).await.unwrap_err();
    assert_eq!(error.reason, "ARTIFACT_TOO_LARGE", "{}", error.message);
    server.ended().await;
}

#[tokio::test]
async fn a_job_is_its_tenants_own_and_holds_its_version() {
    let server = TestServer::start(&[("service_key", SERVICE_KEY)]).await;
    let (acme, globex) = two_tenants(&server).await;
    let version = crate::adapter_api::push(&acme, "tickets", 5).await;
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.jsonl");
    let lines: Vec<Value> = (0..400).map(|index| generate_line(index, 100)).collect();
    write(&input, &lines);
    let mut ask = upload(&acme, v1::BulkOperation::Generate, &input);
    ask.target = Some(acme.target(Some("tickets")).unwrap());
    ask.request_id = "once".to_owned();
    let job = acme
        .create_bulk_job(ask.clone())
        .await
        .unwrap()
        .job
        .unwrap();
    assert_eq!(job.adapter_version, version.name);
    let again = acme.create_bulk_job(ask).await.unwrap().job.unwrap();
    assert_eq!(again.name, job.name, "a repetition makes no second job");
    let foreign = globex.get_bulk_job(&job.name).await.unwrap_err();
    assert_eq!(foreign.code, Code::PermissionDenied);
    let mut theirs = upload(&globex, v1::BulkOperation::Generate, &input);
    theirs.target = Some(acme.target(Some("tickets")).unwrap());
    let error = globex.create_bulk_job(theirs).await.unwrap_err();
    assert!(
        error.message.contains("does not belong"),
        "{}",
        error.message
    );
    let delete = v1::DeleteAdapterRequest {
        name: acme.names().adapter("tickets").unwrap(),
        force: true,
        ..Default::default()
    };
    let error = acme.delete_adapter(delete.clone()).await.unwrap_err();
    assert!(error.message.contains("bulkJobs/"), "{}", error.message);
    let early = acme.delete_bulk_job(&job.name).await.unwrap_err();
    assert_eq!(early.reason, "INVALID_JOB_STATE");
    let cancelled = acme.cancel_bulk_job(&job.name).await.unwrap();
    assert_eq!(cancelled.state(), v1::BulkJobState::Cancelled);
    assert_eq!(
        ended(&acme, &job.name).await.state(),
        v1::BulkJobState::Cancelled
    );
    acme.delete_adapter(delete).await.unwrap();
    server.ended().await;
}

/// `kill -9` in the middle, several times: the output is what an undisturbed run gives.
#[tokio::test]
async fn a_killed_job_ends_with_every_key_once() {
    let data = tempfile::tempdir().unwrap();
    let args = ["--model", TINY, "--max-batch-window", "8"];
    let daemon = || Daemon::spawn(data.path(), &args);
    let mut running = daemon();
    let acme = client(running.addr, "acme", None).await;
    register(&acme, "acme").await;
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let lines: Vec<Value> = (0..1500)
        .map(|index| generate_line(index, 20 + (index * 13) % 60))
        .collect();
    write(&input, &lines);
    let job = acme
        .create_bulk_job(upload(&acme, v1::BulkOperation::Generate, &input))
        .await
        .unwrap()
        .job
        .unwrap();
    let mut seen = BTreeSet::new();
    for kill in 0..3 {
        let client = client(running.addr, "acme", None).await;
        // Once more than before is durable, the server goes.
        let before = seen.last().copied().unwrap_or(0);
        loop {
            let found = client.get_bulk_job(&job.name).await.unwrap();
            let done = found.progress.unwrap().done;
            assert!(done < 1500, "kill {kill} came after the end");
            if done > before {
                seen.insert(done);
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        running.kill();
        running = daemon();
    }
    let client = client(running.addr, "acme", None).await;
    let found = ended(&client, &job.name).await;
    assert_eq!(found.state(), v1::BulkJobState::Succeeded, "{found:?}");
    client
        .download_bulk_results(&job.name, &output)
        .await
        .unwrap();
    let answers = read(&output);
    let keys: Vec<_> = answers.iter().map(|answer| answer["key"].clone()).collect();
    let expected: Vec<_> = lines.iter().map(|line| line["key"].clone()).collect();
    assert_eq!(keys, expected, "each key once, in the order of the input");
    for (line, answer) in lines.iter().zip(&answers) {
        let wanted = line["request"]["stop"]["max_tokens"].as_u64().unwrap();
        let ids = &answer["response"]["candidates"][0]["token_ids"];
        assert_eq!(ids.as_array().unwrap().len() as u64, wanted, "{answer}");
    }
    let stopped = seen.into_iter().map(|done| done.to_string());
    println!(
        "killed after {} lines",
        stopped.collect::<Vec<_>>().join(", ")
    );
    running.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_runs_a_file_and_completes_itself() {
    let server = TestServer::start(&[]).await;
    let client = client(server.addr, "acme", None).await;
    register(&client, "acme").await;
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let line = |key: &str, text: &str| json!({"key": key, "request": {"texts": [text], "labels": ["yes", "no"]}});
    write(&input, &[line("k1", "one"), line("k2", "two")]);
    let address = format!("http://{}", server.addr);
    let run = |args: &[&str]| {
        Command::new(espalier())
            .args(["--server", &address, "--tenant", "acme"])
            .args(args)
            .output()
            .unwrap()
    };
    let (input_text, output_text) = (input.to_str().unwrap(), output.to_str().unwrap());
    let options = ["--operation", "classify", "--input", input_text];
    let mut args = vec!["bulk", "run", "--output", output_text];
    args.extend(options);
    let done = run(&args);
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{done:?}");
    assert!(
        text.contains("2/2 lines answered, 0 with an error"),
        "{text}"
    );
    let answers: BTreeMap<String, Value> = read(&output)
        .into_iter()
        .map(|answer| (answer["key"].as_str().unwrap().to_owned(), answer))
        .collect();
    assert_eq!(answers.len(), 2);
    let scores = &answers["k2"]["response"]["results"][0]["scores"];
    assert_eq!(scores.as_array().unwrap().len(), 2);
    let again = run(&args);
    assert_eq!(
        again.status.code(),
        Some(2),
        "an output is never overwritten"
    );
    std::fs::write(&input, "{}\n").unwrap();
    let mut check = vec!["bulk", "create", "--validate-only"];
    check.extend(options);
    let checked = run(&check);
    assert_eq!(checked.status.code(), Some(1));
    let text = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(text.contains("line 1: key: it is missing"), "{text}");
    let listed = String::from_utf8_lossy(&run(&["bulk", "list"]).stdout).into_owned();
    assert!(
        listed.contains("succeeded") && listed.contains("2/2"),
        "{listed}"
    );
    server.ended().await;
}

/// Every shell gets a script; bash says whether it can read its own.
#[test]
fn completion_scripts_are_scripts() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        for mut program in [Command::new(espalier()), espalierd_command()] {
            let done = program.args(["completions", shell]).output().unwrap();
            assert!(done.status.success(), "{shell}: {done:?}");
            let script = String::from_utf8(done.stdout).unwrap();
            let known = ["classify", "--max-batched-tokens", "max-batched-tokens"];
            assert!(known.iter().any(|word| script.contains(word)), "{shell}");
            if shell != "bash" {
                continue;
            }
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), script).unwrap();
            let read = Command::new("bash").arg("-n").arg(file.path()).output();
            let read = read.unwrap();
            assert!(read.status.success() && read.stderr.is_empty(), "{read:?}");
        }
    }
}

/// A model that cannot be had ends the program with what to do.
#[test]
fn a_model_that_is_not_there_says_what_to_do() {
    let home = tempfile::tempdir().unwrap();
    for (model, expected) in [
        ("nobody/nothing", "hf download nobody/nothing"),
        ("absent.gguf", "there is no file or directory absent.gguf"),
    ] {
        let done = espalierd_command()
            .args(["--model", model, "--listen", "127.0.0.1:0"])
            .args(["--metrics-listen", "off", "--data-dir"])
            .arg(home.path().join("data"))
            .env("HF_HOME", home.path())
            .env("HF_HUB_OFFLINE", "1")
            .output()
            .unwrap();
        assert!(!done.status.success());
        let text = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(text.contains(expected), "{text}");
    }
}
