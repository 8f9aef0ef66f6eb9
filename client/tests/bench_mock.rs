//! `espalier bench` as a program against a small OpenAI-compatible server that is told when to
//! be slow: what the load tester says must be what the server did.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::{
    net::SocketAddr,
    path::Path,
    process::{Command, Output},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};

/// What the server does with a completion.
#[derive(Clone, Default)]
struct Manners {
    /// Before the first token.
    first: Duration,
    /// Before each further token.
    token: Duration,
    /// Nothing is answered between these, counted from the first completion.
    stall: Option<(Duration, Duration)>,
    /// Every so many completions is refused.
    refuse_every: Option<usize>,
}

/// What the server has seen.
#[derive(Default)]
struct Seen {
    began: Option<Instant>,
    bodies: Vec<Value>,
}

struct Server {
    addr: SocketAddr,
    seen: Arc<Mutex<Seen>>,
    // Dropped with the test; its tasks end with it.
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    fn start(manners: Manners) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let addr = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let shared = Arc::clone(&seen);
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                // Else each small event waits for the acknowledgement of the one before it.
                socket.set_nodelay(true).unwrap();
                let (manners, seen) = (manners.clone(), Arc::clone(&shared));
                tokio::spawn(async move {
                    // A client that goes away ends its connection, and no test.
                    let _ = serve(socket, manners, seen).await;
                });
            }
        });
        Self {
            addr,
            seen,
            _runtime: runtime,
        }
    }

    fn bodies(&self) -> Vec<Value> {
        self.seen.lock().unwrap().bodies.clone()
    }

    /// Runs the load tester on it.
    fn bench(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_espalier"))
            .args([
                "bench",
                "--target",
                &format!("openai=http://{}/v1", self.addr),
            ])
            .args(args)
            .env_remove("OPENAI_API_KEY")
            .output()
            .unwrap()
    }

    /// The same, which must exit as expected; its JSON.
    #[track_caller]
    fn result(&self, args: &[&str], exit: i32) -> Value {
        let output = self.bench(&[args, &["--json"]].concat());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{errors}");
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

async fn serve(socket: TcpStream, manners: Manners, seen: Arc<Mutex<Seen>>) -> std::io::Result<()> {
    let mut socket = BufReader::new(socket);
    loop {
        let mut head = String::new();
        if socket.read_line(&mut head).await? == 0 {
            return Ok(());
        }
        let mut length = 0;
        loop {
            let mut line = String::new();
            socket.read_line(&mut line).await?;
            if line.trim().is_empty() {
                break;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        socket.read_exact(&mut body).await?;
        if head.starts_with("GET /v1/models ") {
            let text = r#"{"object": "list", "data": [{"id": "mock-1"}]}"#;
            whole(&mut socket, "200 OK", text).await?;
            continue;
        }
        let body: Value = serde_json::from_slice(&body).unwrap();
        let (number, since) = {
            let mut seen = seen.lock().unwrap();
            let began = *seen.began.get_or_insert_with(Instant::now);
            seen.bodies.push(body.clone());
            (seen.bodies.len(), began.elapsed())
        };
        if let Some((from, to)) = manners.stall
            && (from..to).contains(&since)
        {
            tokio::time::sleep(to - since).await;
        }
        if manners
            .refuse_every
            .is_some_and(|every| number % every == 0)
        {
            let text = r#"{"error": {"type": "overloaded", "message": "come back later"}}"#;
            whole(&mut socket, "503 Service Unavailable", text).await?;
            continue;
        }
        stream(&mut socket, &manners, &body).await?;
    }
}

async fn whole(socket: &mut BufReader<TcpStream>, status: &str, text: &str) -> std::io::Result<()> {
    let length = text.len();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    );
    socket.write_all((head + text).as_bytes()).await?;
    socket.flush().await
}

async fn stream(
    socket: &mut BufReader<TcpStream>,
    manners: &Manners,
    body: &Value,
) -> std::io::Result<()> {
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    socket.write_all(head.as_bytes()).await?;
    let tokens = body["max_tokens"].as_u64().unwrap();
    for number in 0..tokens {
        let wait = if number == 0 {
            manners.first
        } else {
            manners.token
        };
        tokio::time::sleep(wait).await;
        let text = if body["messages"].is_array() {
            r#"{"choices": [{"delta": {"content": " w"}}]}"#
        } else {
            r#"{"choices": [{"text": " w", "index": 0}]}"#
        };
        event(socket, text).await?;
    }
    let usage = format!(
        r#"{{"choices": [], "usage": {{"prompt_tokens": 7, "completion_tokens": {tokens}, "prompt_tokens_details": {{"cached_tokens": 3}}}}}}"#
    );
    event(socket, &usage).await?;
    event(socket, "[DONE]").await?;
    socket.write_all(b"0\r\n\r\n").await?;
    socket.flush().await
}

async fn event(socket: &mut BufReader<TcpStream>, data: &str) -> std::io::Result<()> {
    let text = format!("data: {data}\n\n");
    let chunk = format!("{:x}\r\n{text}\r\n", text.len());
    socket.write_all(chunk.as_bytes()).await?;
    socket.flush().await
}

fn number(result: &Value, key: &str) -> f64 {
    let found = result.pointer(key).and_then(Value::as_f64);
    found.unwrap_or_else(|| panic!("{key} in {result:#}"))
}

#[test]
fn latencies_are_those_of_the_server() {
    let server = Server::start(Manners {
        first: Duration::from_millis(60),
        token: Duration::from_millis(10),
        ..Manners::default()
    });
    let args = [
        "--clients",
        "2",
        "-n",
        "10",
        "--warmup-requests",
        "2",
        "--input",
        "9",
        "--output",
        "5",
    ];
    let result = server.result(&args, 0);
    assert_eq!(number(&result, "/completed"), 10.0);
    assert_eq!(number(&result, "/warmup_requests"), 2.0);
    assert_eq!(number(&result, "/total_output_tokens"), 50.0);
    assert_eq!(number(&result, "/total_input_tokens"), 70.0);
    assert_eq!(number(&result, "/cached_input_tokens"), 30.0);
    let near = |key: &str, at_least: f64| {
        let found = number(&result, key);
        assert!(
            (at_least..at_least + 60.0).contains(&found),
            "{key}: {found}"
        );
    };
    near("/p50_ttft_ms", 60.0);
    near("/p50_tpot_ms", 10.0);
    near("/p50_itl_ms", 10.0);
    near("/p50_e2el_ms", 100.0);
    assert_eq!(result["model_id"], "mock-1");
    assert_eq!(result["backend"], "openai");
    let bodies = server.bodies();
    assert_eq!(bodies.len(), 12);
    assert_eq!(bodies[0]["model"], "mock-1");
    assert_eq!(bodies[0]["ignore_eos"], true);
    assert_eq!(
        bodies[0]["prompt"]
            .as_str()
            .unwrap()
            .split_whitespace()
            .count(),
        9
    );
}

#[test]
fn a_stall_shows_in_every_request_that_was_due_in_it() {
    // No answer for a second in the middle of three; a request is due every 20 ms.
    let server = Server::start(Manners {
        stall: Some((Duration::from_secs(1), Duration::from_secs(2))),
        ..Manners::default()
    });
    let args = [
        "--rate",
        "50",
        "--arrivals",
        "constant",
        "--duration",
        "3s",
        "--output",
        "1",
    ];
    let result = server.result(&[&args[..], &["--max-in-flight", "4"]].concat(), 0);
    assert_eq!(number(&result, "/completed"), 150.0);
    // A third of the requests was due in the stall, and waited for half a second on average. A
    // client that stops sending while it waits would report four slow requests.
    let p90 = number(&result, "/p90_e2el_ms");
    assert!((600.0..1500.0).contains(&p90), "p90 {p90}");
    let mean = number(&result, "/mean_e2el_ms");
    assert!((120.0..700.0).contains(&mean), "mean {mean}");
    // With four places the client itself had to hold requests back, and says so.
    assert!(number(&result, "/send_lag_ms/max") > 700.0);
    // Counted from sending, as others do, the same test looks harmless.
    assert!(number(&result, "/e2el_from_send_ms/p90") < 300.0);
}

#[test]
fn failures_are_counted_by_reason_and_objectives_set_the_exit_status() {
    let server = Server::start(Manners {
        refuse_every: Some(5),
        ..Manners::default()
    });
    let args = [
        "-n",
        "20",
        "--output",
        "2",
        "--slo",
        "errors<1%",
        "--slo",
        "ttft:p99<10s",
    ];
    let result = server.result(&args, 7);
    assert_eq!(number(&result, "/failed"), 4.0);
    assert_eq!(number(&result, "/errors/overloaded/count"), 4.0);
    assert_eq!(result["objectives"][0]["met"], false);
    assert_eq!(result["objectives"][1]["met"], true);
    let server = Server::start(Manners {
        refuse_every: Some(1),
        ..Manners::default()
    });
    let output = server.bench(&["-n", "3"]);
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        errors.contains("no request completed") && errors.contains("overloaded"),
        "{errors}"
    );
}

#[test]
fn adapters_are_models_or_fields_of_the_server() {
    let server = Server::start(Manners::default());
    let list = [
        "-n",
        "4",
        "--output",
        "1",
        "--op",
        "chat",
        "--adapters",
        "a[0-1]",
    ];
    let drawn = ["--popularity", "round-robin", "--openai-model", "base"];
    server.result(&[&list[..], &drawn[..]].concat(), 0);
    let models: Vec<Value> = server
        .bodies()
        .iter()
        .map(|body| body["model"].clone())
        .collect();
    assert_eq!(models, ["a0", "a1", "a0", "a1"]);
    let server = Server::start(Manners::default());
    let body = r#"{"lora": [{"id": "{adapter_index}", "scale": 1.0}]}"#;
    let template = [&list[..], &drawn[..], &["--openai-body", body]].concat();
    let result = server.result(&template, 0);
    let bodies = server.bodies();
    assert_eq!(bodies[1]["model"], "base");
    assert_eq!(bodies[1]["lora"][0]["id"], 1);
    assert_eq!(result["adapters"][0]["name"], "a0");
}

#[test]
fn a_seed_fixes_what_is_sent() {
    let prompts = |seed: &str| -> Vec<String> {
        let server = Server::start(Manners::default());
        let args = [
            "-n",
            "5",
            "--output",
            "1",
            "--seed",
            seed,
            "--input",
            "uniform:4..30",
        ];
        server.result(&args, 0);
        let text = |body: &Value| body["prompt"].as_str().unwrap().to_owned();
        server.bodies().iter().map(text).collect()
    };
    let first = prompts("3");
    assert_eq!(first, prompts("3"));
    assert_ne!(first, prompts("4"));
}

#[test]
fn everything_that_is_written_can_be_read_again() {
    let server = Server::start(Manners::default());
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    for number in ["1", "2"] {
        let out = [
            "--out",
            &path(&format!("{number}.json")),
            "--hist",
            &path(&format!("{number}.hlog")),
        ]
        .map(str::to_owned);
        let files = [
            "--csv",
            &path("requests.csv"),
            "--html",
            &path("report.html"),
        ]
        .map(str::to_owned);
        let all: Vec<&str> = out.iter().chain(&files).map(String::as_str).collect();
        server.result(
            &[&["-n", "8", "--output", "3", "--seed", number][..], &all].concat(),
            0,
        );
    }
    let program = |args: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_espalier"))
            .arg("bench")
            .args(args)
            .output()
            .unwrap()
    };
    let merged = program(&["merge", &path("1.hlog"), &path("2.hlog"), "--json"]);
    let merged: Value = serde_json::from_slice(&merged.stdout).unwrap();
    assert_eq!(number(&merged, "/completed"), 16.0);
    assert_eq!(number(&merged, "/total_output_tokens"), 48.0);
    assert!(number(&merged, "/p99_ttft_ms") > 0.0);
    let rows = std::fs::read_to_string(path("requests.csv")).unwrap();
    assert_eq!(rows.lines().count(), 9);
    let page = std::fs::read_to_string(path("report.html")).unwrap();
    assert!(page.contains("\"model_id\":\"mock-1\""));
    assert!(
        program(&["report", &path("1.json"), "-o", &path("again.html")])
            .status
            .success()
    );
    let output = program(&["compare", &path("1.json"), &path("2.json")]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success()
            && text.contains("p99_ttft_ms")
            && text.contains("seed: 1 then, 2 now"),
        "{text}"
    );
    worse(&path("1.json"), Path::new(&path("slow.json")));
    let args = [
        "compare",
        &path("1.json"),
        &path("slow.json"),
        "--fail-if-worse",
        "10%",
    ];
    assert_eq!(program(&args).status.code(), Some(7));
}

/// Writes the same result with half the throughput.
fn worse(from: &str, to: &Path) {
    let mut result: Value = serde_json::from_str(&std::fs::read_to_string(from).unwrap()).unwrap();
    result["output_throughput"] = (number(&result, "/output_throughput") / 2.0).into();
    std::fs::write(to, result.to_string()).unwrap();
}

#[test]
fn sweeps_and_searches_give_a_step_a_load() {
    let server = Server::start(Manners {
        first: Duration::from_millis(20),
        ..Manners::default()
    });
    let args = ["--output", "2", "--duration", "400ms"];
    let result = server.result(&[&args[..], &["--sweep", "20,40"]].concat(), 0);
    let loads: Vec<f64> = result["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|step| number(step, "/step/load"))
        .collect();
    assert_eq!(loads, [20.0, 40.0]);
    let search = ["--search", "10..40", "--slo", "ttft:p50<10s"];
    let result = server.result(&[&args[..], &search[..]].concat(), 0);
    assert_eq!(number(&result, "/search/load"), 40.0);
    assert_eq!(result["search"]["is_bounded"], false);
    let search = ["--search-clients", "1..4", "--slo", "ttft:p50<1ms"];
    let result = server.result(&[&args[..], &search[..]].concat(), 7);
    assert!(result["search"]["load"].is_null());
}

#[test]
fn wrong_options_name_the_flag_and_the_next_step() {
    let check = |args: &[&str], exit: i32, hints: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_espalier"))
            .args(["bench", "--target", "openai=http://127.0.0.1:1"])
            .args(args)
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{args:?}: {errors}");
        for hint in hints {
            assert!(errors.contains(hint), "{args:?}: {hint} in {errors}");
        }
    };
    check(&["--rate", "0"], 2, &["--rate", "above 0"]);
    check(&["--duration", "30"], 2, &["--duration", "30s"]);
    check(&["--input", "normal:5"], 2, &["--input", "lognormal:"]);
    check(&["--slo", "ttft<1s"], 2, &["--slo", "ttft:p99<200ms"]);
    check(&["--search", "1..9"], 2, &["--search", "--slo"]);
    check(
        &["--op", "classify", "--labels", "a,b"],
        2,
        &["--op", "generate, chat or embed"],
    );
    check(&["--rate", "1..9"], 2, &["--rate", "--duration"]);
    check(
        &["--out", "/no/such/dir/x.json"],
        2,
        &["/no/such/dir", "directory"],
    );
    check(&[], 1, &["cannot reach", "is the server running"]);
}
