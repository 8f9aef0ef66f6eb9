//! The same rows on the engine in process and through a server, in turn.

use std::process::Command;

use espalier_benches::Fallible;
use espalier_benches::daemon::{Daemon, Tenant};
use espalier_benches::in_process::{Row, batch, prompts, start};
use espalier_benches::processor_time::ProcessorTime;
use espalier_benches::turns::{figures, last_json_line, median, pairs};
use espalier_engine::config::EngineConfig;
use espalier_engine::model::Dtype;
use serde_json::{Value, json};

use super::Cost;
use super::load::stream;

/// Rows that both sides run before the measured ones.
const WARM_NEW: usize = 4;

#[tokio::main(flavor = "current_thread")]
pub(crate) async fn run(options: &Cost) -> Fallible<()> {
    let daemon = Daemon::spawn(&options.served.model, &options.served.flags())?;
    let mut tenants = Vec::new();
    for i in 0..options.served.connections {
        tenants.push(daemon.tenant(&format!("tenant-{i}"), None).await?);
    }
    let (mut inside, mut over) = (Vec::new(), Vec::new());
    let mut threads = ProcessorTime::default();
    for round in 0..options.rounds {
        eprintln!("round {} of {}", round + 1, options.rounds);
        let other = options.clone();
        // Off this thread, which answers the server's pings meanwhile.
        inside.push(tokio::task::spawn_blocking(move || in_process(&other)).await??);
        let (line, spent) = over_grpc(options, &daemon, &tenants, 1000 + round as u64).await?;
        eprintln!("  {line}");
        over.push(line);
        threads.add(&spent);
    }
    print_table(options, &inside, &over)?;
    println!("\nthe server's threads over all rounds: {threads}");
    Ok(())
}

fn print_table(options: &Cost, inside: &[Value], over: &[Value]) -> Fallible<()> {
    let (streams, prompt, new) = (options.streams, options.prompt, options.new);
    let dtype = options.served.dtype.as_deref().unwrap_or("default dtype");
    println!(
        "| {streams} streams, {prompt} in / {new} out, {dtype} | in process | over gRPC | ratio | rounds |"
    );
    println!("|---|---|---|---|---|");
    let row = |name: &str, key: &str| -> Fallible<()> {
        let (inside, over) = (figures(inside, key)?, figures(over, key)?);
        println!(
            "| {name} | {:.2} | {:.2} | {:.3} | {} |",
            median(&inside),
            median(&over),
            median(&over) / median(&inside),
            pairs(&inside, &over)
        );
        Ok(())
    };
    row("output tok/s, client on the same cores", "tok_s")?;
    row("engine's processor time, us/token", "engine_us")?;
    let shell = figures(over, "shell_share")?;
    let wanted = if median(&shell) < 0.03 {
        "met"
    } else {
        "missed"
    };
    println!(
        "| the shell's share of the server's processor time (wanted below 3 %: {wanted}) | | {:.2} % | | {} |",
        100.0 * median(&shell),
        percents(&shell)
    );
    println!(
        "| the shell's processor time, us/token | | {:.1} | | |",
        median(&figures(over, "shell_us")?)
    );
    println!(
        "| the client's processor time, us/token | | {:.1} | | |",
        median(&figures(over, "client_us")?)
    );
    Ok(())
}

fn percents(shares: &[f64]) -> String {
    let each: Vec<String> = shares
        .iter()
        .map(|share| format!("{:.2} %", 100.0 * share))
        .collect();
    each.join(", ")
}

// === over gRPC ===

async fn over_grpc(
    options: &Cost,
    daemon: &Daemon,
    tenants: &[Tenant],
    seed: u64,
) -> Fallible<(Value, ProcessorTime)> {
    streams(options, tenants, WARM_NEW, seed).await?;
    let (server, client) = (
        ProcessorTime::of(daemon.id())?,
        ProcessorTime::of(std::process::id())?,
    );
    let begin = std::time::Instant::now();
    streams(options, tenants, options.new, seed + 500).await?;
    let seconds = begin.elapsed().as_secs_f64();
    let server = ProcessorTime::of(daemon.id())?.since(&server);
    let client = ProcessorTime::of(std::process::id())?.since(&client);
    let tokens = (options.streams * options.new) as f64;
    let line = json!({
        "side": "grpc",
        "tok_s": tokens / seconds,
        "engine_us": 1e6 * server.engine() / tokens,
        "shell_us": 1e6 * server.shell() / tokens,
        "client_us": 1e6 * client.total() / tokens,
        "shell_share": server.shell() / server.total(),
    });
    Ok((line, server))
}

async fn streams(options: &Cost, tenants: &[Tenant], new: usize, seed: u64) -> Fallible<()> {
    let prompts = prompts(options.streams, options.prompt, seed);
    let all = prompts.iter().enumerate().map(|(i, prompt)| {
        let tenant = &tenants[i % tenants.len()];
        stream(tenant, prompt, new)
    });
    futures::future::try_join_all(all).await?;
    Ok(())
}

// === in process ===

fn in_process(options: &Cost) -> Fallible<Value> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["engine", "--model", &options.served.model]);
    if let Some(dtype) = &options.served.dtype {
        command.args(["--dtype", dtype]);
    }
    command.args(["--streams", &options.streams.to_string()]);
    command.args(["--prompt", &options.prompt.to_string()]);
    command.args(["--new", &options.new.to_string()]);
    last_json_line(command)
}

#[tokio::main(flavor = "current_thread")]
pub(crate) async fn engine(options: &Cost) -> Fallible<()> {
    let config = EngineConfig {
        // As many blocks as the server's default of 512 MiB gives this model.
        kv_blocks: 728,
        ..EngineConfig::default()
    };
    let dtype = match &options.served.dtype {
        Some(name) => name.parse()?,
        None => Dtype::F32,
    };
    let (engine, _) = start(&options.served.model, dtype, config, &[])?;
    let rows = |seed| -> Vec<Row> {
        let prompts = prompts(options.streams, options.prompt, seed);
        prompts.into_iter().map(|prompt| (None, prompt)).collect()
    };
    batch(&engine, &rows(1), WARM_NEW).await?;
    let before = ProcessorTime::of(std::process::id())?;
    let seconds = batch(&engine, &rows(2), options.new).await?;
    let spent = ProcessorTime::of(std::process::id())?.since(&before);
    let tokens = (options.streams * options.new) as f64;
    println!(
        "{}",
        json!({
            "side": "engine",
            "tok_s": tokens / seconds,
            "engine_us": 1e6 * spent.engine() / tokens,
            "other_us": 1e6 * spent.shell() / tokens,
        })
    );
    Ok(())
}
