//! The command line: arguments in, calls of the client, text or JSON out. Only this module
//! and those below it print; the environment is read by clap alone.

mod adapters;
mod bench;
mod bulk;
mod chart;
mod chat;
mod check;
mod classification;
mod completions;
mod data;
mod documents;
mod generate;
mod infer;
mod jobs;
pub(crate) mod json;
mod output;
mod progress;
mod report;
mod residency;
mod sampling;
mod statistics;
mod status;
mod svg;
mod tenants;
mod train;

use std::{process::ExitCode, time::Duration};

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::{
    client::{Client, ClientConfig, Timeouts},
    error::Error,
    v1,
};
use output::{Failure, Out};

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 server not reached or busy,
4 no or wrong key, 5 not there, 6 the job failed or was cancelled, 7 a load test missed an
objective or got worse, 130 interrupted.";

/// Talk to an Espalier server: ask models and adapters, train adapters, look after them.
#[derive(Debug, Parser)]
#[command(name = "espalier", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Connection and output")]
struct Global {
    /// Address of the server.
    #[arg(
        long,
        global = true,
        env = "ESPALIER_SERVER",
        default_value = "http://127.0.0.1:7411"
    )]
    server: String,
    /// API key.
    #[arg(long, global = true, env = "ESPALIER_API_KEY", hide_env_values = true)]
    key: Option<String>,
    /// Tenant that short names belong to. Without it, the only tenant that the key may act for.
    #[arg(long, global = true, env = "ESPALIER_TENANT")]
    tenant: Option<String>,
    /// Seconds that a call may take, in place of a limit by kind of call.
    #[arg(long, global = true, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
    /// Print JSON: one document, or one line a message for streams. Errors are JSON too, on stderr.
    #[arg(long, global = true)]
    json: bool,
    /// Print results only, no remarks on stderr.
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Continue a raw text.
    Generate(generate::Generate),
    /// Answer a message, or hold a conversation.
    Chat(chat::Chat),
    /// Choose among labels, by an adapter's head or by likelihood.
    Classify(infer::Classify),
    /// Turn texts into vectors.
    Embed(infer::Embed),
    /// Log-probabilities of continuations.
    Score(infer::Score),
    /// Text to token ids.
    Tokenize(infer::Tokenize),
    /// Token ids to text.
    Detokenize(infer::Detokenize),
    /// List, check, push, pull, delete adapters and move their aliases.
    #[command(subcommand)]
    Adapters(adapters::Adapters),
    /// Push, list and delete datasets.
    #[command(subcommand)]
    Data(data::Data),
    /// Create, list and delete tenants and their keys.
    #[command(subcommand)]
    Tenants(tenants::Tenants),
    /// Train an adapter from a file of examples, and watch it.
    Train(Box<train::Train>),
    /// List, watch, put aside, cancel and report on training jobs.
    #[command(subcommand)]
    Jobs(jobs::Jobs),
    /// Answer a file of requests, durably and at the lowest priority.
    #[command(subcommand)]
    Bulk(bulk::Bulk),
    /// What the server is, has and does.
    Status(status::Status),
    /// Put load on a server and measure: latencies, throughput, goodput.
    Bench(Box<bench::Bench>),
    /// Print a script that completes commands and options in a shell.
    Completions(completions::Completions),
}

/// What every command gets.
#[derive(Clone)]
pub(crate) struct Session {
    client: Client,
    out: Out,
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let out = Out::new(cli.global.json, cli.global.quiet);
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            let text = format!("no asynchronous runtime: {error}");
            return out.fail(&Failure::Local(text));
        }
    };
    let outcome = runtime.block_on(run(cli, out));
    // A thread that still reads a terminal must not keep the process.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => out.fail(&failure),
    }
}

async fn run(cli: Cli, out: Out) -> Result<(), Failure> {
    let global = cli.global;
    // It opens its own connections, and some of its forms need none.
    if let Command::Bench(bench) = cli.command {
        return bench.run(&global, out).await;
    }
    // The commands that can do without a server.
    if let Command::Adapters(adapters::Adapters::Check(check)) = cli.command {
        let shape = match connect(&global).await {
            Ok(client) => check.shape_of(&client).await,
            Err(error) => Err(error),
        };
        return check.run(shape, out);
    }
    if let Command::Completions(command) = cli.command {
        return command.run(Cli::command(), out);
    }
    let mut client = connect(&global).await?;
    if global.tenant.is_none() && cli.command.needs_tenant() {
        client = own_tenant(client).await;
    }
    let session = Session { client, out };
    match cli.command {
        Command::Generate(command) => command.run(&session).await,
        Command::Chat(command) => command.run(&session).await,
        Command::Classify(command) => command.run(&session).await,
        Command::Embed(command) => command.run(&session).await,
        Command::Score(command) => command.run(&session).await,
        Command::Tokenize(command) => command.run(&session).await,
        Command::Detokenize(command) => command.run(&session).await,
        Command::Adapters(command) => command.run(&session).await,
        Command::Data(command) => command.run(&session).await,
        Command::Tenants(command) => command.run(&session).await,
        Command::Train(command) => command.run(&session).await,
        Command::Jobs(command) => command.run(&session).await,
        Command::Bulk(command) => command.run(&session).await,
        Command::Status(command) => command.run(&session).await,
        // Answered above.
        Command::Bench(_) | Command::Completions(_) => Ok(()),
    }
}

// === impl Command ===

impl Command {
    /// Whether short names may occur, so that it is worth asking whose they are.
    fn needs_tenant(&self) -> bool {
        match self {
            Self::Tenants(_) | Self::Status(_) | Self::Detokenize(_) => false,
            Self::Bench(_) | Self::Completions(_) => false,
            Self::Generate(command) => command.adapter.needs_tenant(),
            Self::Chat(command) => command.adapter.needs_tenant(),
            Self::Classify(command) => command.adapter.needs_tenant(),
            Self::Embed(command) => command.adapter.needs_tenant(),
            Self::Score(command) => command.adapter.needs_tenant(),
            Self::Tokenize(command) => command.adapter.needs_tenant(),
            Self::Adapters(_) | Self::Bulk(_) | Self::Data(_) | Self::Train(_) | Self::Jobs(_) => {
                true
            }
        }
    }
}

async fn connect(global: &Global) -> Result<Client, Error> {
    let mut config = ClientConfig::new(&global.server);
    config.api_key.clone_from(&global.key);
    config.tenant.clone_from(&global.tenant);
    if let Some(limit) = global.timeout {
        config.timeouts = Timeouts::all(limit);
    }
    Client::connect(config).await
}

/// The tenant of a key that has only one. When that cannot be said, the call that needs a
/// tenant explains how to name one.
async fn own_tenant(client: Client) -> Client {
    let request = v1::ListTenantsRequest {
        page_size: 2,
        ..Default::default()
    };
    match client.list_tenants(request).await {
        Ok(page) if page.tenants.len() == 1 => client.for_tenant(&page.tenants[0].name),
        _ => client,
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let value: f64 = text
        .parse()
        .map_err(|_| format!("{text:?} is no number of seconds"))?;
    if value > 0.0 && value <= 1e6 {
        Ok(Duration::from_secs_f64(value))
    } else {
        Err(format!("{text} is not above 0 and at most 1000000"))
    }
}

/// Gathers all pages of a list: `call` gets the token of each page and gives items and the next token.
async fn all_pages<T, F, Fut>(mut call: F) -> Result<Vec<T>, Error>
where
    F: FnMut(String) -> Fut,
    Fut: Future<Output = Result<(Vec<T>, String), Error>>,
{
    let mut items = Vec::new();
    let mut token = String::new();
    loop {
        let (page, next) = call(token).await?;
        items.extend(page);
        if next.is_empty() {
            return Ok(items);
        }
        token = next;
    }
}

/// Items on a page of a list that is read to its end.
const PAGE: i32 = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn seconds_have_bounds() {
        assert_eq!(seconds("1.5"), Ok(Duration::from_millis(1500)));
        for wrong in ["0", "-1", "nan", "inf", "x", "1e9"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
