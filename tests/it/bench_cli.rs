//! `espalier bench` as a program on a server with the tiny model: a mix of operations over
//! adapters and tenants, the keys of its JSON, its exit status, and work beside the requests.

use std::process::Output;

use espalier_tests::TestServer;
use serde_json::Value;

use crate::adapter_api::push;
use crate::client_side::{SERVICE_KEY, client, labelled, register, tenant};

/// Runs the load tester on a server; the server lives in this process, so the wait is off its threads.
async fn bench(server: &TestServer, key: Option<&str>, args: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(espalier_tests::espalier());
    command
        .arg("bench")
        .args(["--server", &format!("http://{}", server.addr)])
        .args(args)
        .env_remove("ESPALIER_TENANT")
        .env_remove("ESPALIER_API_KEY");
    if let Some(key) = key {
        command.args(["--key", key]);
    }
    command.output().await.unwrap()
}

async fn result(server: &TestServer, key: Option<&str>, args: &[&str], exit: i32) -> Value {
    let output = bench(server, key, &[args, &["--json"]].concat()).await;
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(exit), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The keys that tools for `vllm bench serve` read.
fn vllm_keys() -> Vec<String> {
    let mut keys: Vec<String> = [
        "date",
        "backend",
        "model_id",
        "num_prompts",
        "request_rate",
        "burstiness",
        "max_concurrency",
        "duration",
        "completed",
        "failed",
        "total_input_tokens",
        "total_output_tokens",
        "request_throughput",
        "request_goodput",
        "output_throughput",
        "total_token_throughput",
        "max_output_tokens_per_s",
        "max_concurrent_requests",
    ]
    .map(str::to_owned)
    .to_vec();
    for metric in ["ttft", "tpot", "itl", "e2el"] {
        for statistic in ["mean", "median", "std", "p50", "p90", "p99"] {
            keys.push(format!("{statistic}_{metric}_ms"));
        }
    }
    keys
}

#[tokio::test]
async fn a_mix_over_adapters_has_all_keys_and_counts_what_the_server_counted() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    for (name, seed) in [("a0", 3), ("a1", 4)] {
        push(&acme, name, seed).await;
    }
    let args = [
        "--tenant",
        "acme",
        "--adapters",
        "a[0-1]",
        "--popularity",
        "zipf:1",
        "--base-share",
        "25%",
        "--op",
        "generate:6,embed:1,classify:1",
        "--labels",
        "yes,no",
        "--rate",
        "200",
        "-n",
        "60",
        "--warmup-requests",
        "10",
        "--input",
        "uniform:8..24",
        "--output",
        "uniform:2..9",
        "--slo",
        "errors<1%",
        "--goodput",
        "e2e:60s",
    ];
    let found = result(&server, None, &args, 0).await;
    for key in vllm_keys() {
        assert!(found.get(&key).is_some(), "{key} is missing");
    }
    assert_eq!(found["completed"], 60, "{}", found["errors"]);
    assert_eq!(found["warmup_requests"], 10);
    assert_eq!(found["good_requests"], 60);
    assert!(found["p99_ttft_ms"].as_f64().unwrap() > 0.0);
    assert!(
        found["server_queue_ms"]["count"] == 60,
        "the server's own times"
    );
    let model = &found["server"]["model"];
    assert_eq!(model["digest"].as_str().unwrap().len(), 64);
    assert!(model["dtype"].is_string());
    let info = &found["server"]["info"];
    assert!(info["build"].as_str().unwrap().contains("program "));
    assert_eq!(info["configuration"]["kv_cache_bytes"], "64MiB");
    let sum = |parts: &str| -> u64 {
        let parts = found[parts].as_array().unwrap();
        parts
            .iter()
            .map(|part| part["completed"].as_u64().unwrap())
            .sum()
    };
    assert_eq!((sum("operations"), sum("adapters")), (60, 60));
    let names: Vec<_> = found["adapters"]
        .as_array()
        .unwrap()
        .iter()
        .map(|part| &part["name"])
        .collect();
    assert!(
        names.contains(&&Value::from("base")) && names.contains(&&Value::from("a1")),
        "{names:?}"
    );
    // The schedule was kept by this client, or the report says how late it was.
    assert_eq!(found["send_lag_ms"]["count"], 60);
}

#[tokio::test]
async fn a_missed_objective_is_an_exit_status_of_its_own() {
    let server = TestServer::start(&[]).await;
    tenant(server.addr, "acme").await;
    let args = [
        "--tenant",
        "acme",
        "-n",
        "5",
        "--output",
        "3",
        "--slo",
        "ttft:p50<1us",
    ];
    let found = result(&server, None, &args, 7).await;
    assert_eq!(found["objectives_met"], false);
    let missing = ["--tenant", "acme", "-n", "3", "--adapters", "nobody"];
    let output = bench(&server, None, &missing).await;
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("ADAPTER_NOT_FOUND"), "{errors}");
}

#[tokio::test]
async fn tenants_have_rates_of_their_own_and_work_goes_on_beside() {
    let server = TestServer::start(&[("service_key", SERVICE_KEY)]).await;
    for name in ["t0", "t1"] {
        let admin = client(server.addr, name, Some(SERVICE_KEY)).await;
        register(&admin, name).await;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rows.jsonl");
    std::fs::write(&file, labelled(&[("good day", "a"), ("bad night", "b")])).unwrap();
    let work = format!(
        "train:file={},adapter=beside,steps=5,method=head",
        file.display()
    );
    let args = [
        "--tenant-rate",
        "t0=60",
        "--tenant-rate",
        "t1=20",
        "--duration",
        "3s",
        "--output",
        "4",
        "--beside",
        &work,
        "--op",
        "generate,chat",
    ];
    let found = result(&server, Some(SERVICE_KEY), &args, 0).await;
    let tenants = found["tenants"].as_array().unwrap();
    assert_eq!(tenants[0]["name"], "t0");
    let count = |place: usize| tenants[place]["completed"].as_f64().unwrap();
    assert!((1.8..5.0).contains(&(count(0) / count(1))), "{tenants:?}");
    let train = &found["beside"]["train"];
    assert!(train["completed"].as_u64().unwrap() > 0, "{train}");
    assert_eq!(train["failed"], 0, "{train}");
}
