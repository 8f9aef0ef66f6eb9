//! What ten thousand registered adapters cost a server that nobody asks for them.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use espalier_adapters::config::BaseShape;
use espalier_adapters::peft;
use espalier_benches::Fallible;
use espalier_benches::turns::median;
use espalier_client::{AdapterUpload, Client, ClientConfig, v1};

use crate::served::artifact;
use crate::{Args, verdict};

/// `espalierd` as a child, killed when dropped.
struct Daemon {
    child: Child,
    addr: String,
    startup: Duration,
}

impl Daemon {
    fn spawn(program: &Path, data: &Path) -> Fallible<Daemon> {
        let ready = data.join("ready");
        let _ = std::fs::remove_file(&ready);
        let began = Instant::now();
        let child = Command::new(program)
            .args([
                "--model",
                "tiny:1",
                "--listen",
                "127.0.0.1:0",
                "--metrics-listen",
                "off",
            ])
            .args(["--log", "error"])
            .arg("--data-dir")
            .arg(data)
            .arg("--ready-file")
            .arg(&ready)
            .stdout(Stdio::null())
            .spawn()?;
        let mut daemon = Daemon {
            child,
            addr: String::new(),
            startup: Duration::ZERO,
        };
        while began.elapsed() < Duration::from_secs(60) {
            if let Ok(line) = std::fs::read_to_string(&ready) {
                daemon.startup = began.elapsed();
                daemon.addr = format!("http://{}", line.trim());
                return Ok(daemon);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err("espalierd did not become ready".into())
    }

    async fn client(&self) -> Fallible<Client> {
        let mut config = ClientConfig::new(self.addr.clone());
        config.tenant = Some("bench".to_owned());
        Ok(Client::connect(config).await?)
    }

    /// Megabytes in memory now.
    fn resident(&self) -> Fallible<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(kib.ok_or("no VmRSS")?.parse::<f64>()? / 1024.0)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) async fn run(args: &Args) -> Fallible<()> {
    let beside = std::env::current_exe()?.with_file_name("espalierd");
    let program = args.espalierd.clone().unwrap_or(beside);
    let shape = espalier_engine::model::load("tiny:1")?.config.base_shape();
    let data = tempfile::tempdir()?;
    println!("\n## What registered adapters cost at rest (tiny model, a real server over gRPC)\n");
    println!(
        "| registered | ready after, ms | resident after the start, MB | after one request, MB | registering one, ms |\n|---|---|---|---|---|"
    );
    let mut registered = 0;
    let mut table = Vec::new();
    for count in [0, 2_000, 10_000] {
        let mut each = None;
        if count > registered {
            let daemon = Daemon::spawn(&program, data.path())?;
            let client = daemon.client().await?;
            if registered == 0 {
                let tenant = v1::CreateTenantRequest {
                    tenant_id: "bench".to_owned(),
                    ..Default::default()
                };
                client.create_tenant(tenant).await?;
            }
            let began = Instant::now();
            register(&client, &shape, registered..count).await?;
            each = Some(began.elapsed().as_secs_f64() * 1e3 / (count - registered) as f64);
            registered = count;
        }
        let mut starts = Vec::new();
        let (mut idle, mut busy) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let daemon = Daemon::spawn(&program, data.path())?;
            starts.push(daemon.startup.as_secs_f64() * 1e3);
            idle.push(daemon.resident()?);
            let client = daemon.client().await?;
            let target = (count > 0).then(|| v1::InferenceTarget {
                adapters: vec![v1::AdapterWeight {
                    adapter: format!("tenants/bench/adapters/a{}", count - 1),
                    weight: None,
                }],
                tenant: String::new(),
            });
            let request = v1::GenerateRequest {
                target,
                ..generate("once upon a time")
            };
            client.generate(request).await?;
            busy.push(daemon.resident()?);
        }
        println!(
            "| {count} | {:.0} | {:.1} | {:.1} | {} |",
            median(&starts),
            median(&idle),
            median(&busy),
            each.map_or("-".to_owned(), |each| format!("{each:.2}"))
        );
        table.push((median(&starts), median(&busy)));
    }
    let mut failures = Vec::new();
    let (more_time, more_memory) = (table[2].0 - table[0].0, table[2].1 - table[0].1);
    if more_time > 250.0 {
        failures.push(format!("{more_time:.0} ms of start-up"));
    }
    if more_memory > 16.0 {
        failures.push(format!("{more_memory:.1} MB"));
    }
    verdict(
        &format!(
            "10,000 registered adapters cost {more_memory:+.1} MB and {more_time:+.0} ms of start-up (allowed 16 MB, 250 ms)"
        ),
        &failures,
    );
    Ok(())
}

fn generate(prompt: &str) -> v1::GenerateRequest {
    v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Text(prompt.to_owned())),
        stop: Some(v1::StopConditions {
            max_tokens: Some(4),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Through the upload as any client does it; fifty contents, shared in turn.
async fn register(client: &Client, shape: &BaseShape, ids: std::ops::Range<usize>) -> Fallible<()> {
    let mut kinds = Vec::new();
    for kind in 0..50 {
        let dir = tempfile::tempdir()?;
        peft::to_dir(&artifact(shape, 2, (ids.start + kind) as u64)?, dir.path())?;
        kinds.push(dir);
    }
    let next = std::sync::atomic::AtomicUsize::new(ids.start);
    let workers = (0..4).map(|_| async {
        loop {
            let id = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if id >= ids.end {
                return Ok::<_, String>(());
            }
            let upload = AdapterUpload {
                adapter: format!("tenants/bench/adapters/a{id}"),
                dir: kinds[id % kinds.len()].path().to_owned(),
                set_aliases: vec!["default".to_owned()],
                create_if_missing: true,
                ..Default::default()
            };
            let mut tries = 0;
            while let Err(error) = client.upload_adapter(upload.clone()).await {
                tries += 1;
                if tries > 100 {
                    return Err(error.to_string());
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
    futures::future::try_join_all(workers).await?;
    Ok(())
}
