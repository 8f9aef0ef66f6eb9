//! The options of `espalier bench`, as they are written. What they mean together is `plan`'s.

use std::{path::PathBuf, time::Duration};

use clap::Args;

use crate::bench::{
    arrival::Spread,
    beside::Beside,
    distribution::Lengths,
    objective::{Goal, Objective},
    popularity::Popularity,
    quantity,
    target::Template,
    workload::Mix,
};

/// Everything about one test, but for the connection's own options.
#[derive(Clone, Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) server: ServerArgs,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) work: WorkArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Who is asked.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Server")]
pub(crate) struct ServerArgs {
    /// `espalier` (the server of --server), or `openai=URL` for vLLM, llama.cpp or any server
    /// with that interface.
    #[arg(long, default_value = "espalier", value_parser = kind)]
    pub(crate) target: Kind,
    /// Connections that requests take turns on (OpenAI targets: as many as requests in flight).
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = |t: &str| quantity::count(t, 1024))]
    pub(crate) connections: usize,
    /// Key of an OpenAI target.
    #[arg(
        long,
        env = "OPENAI_API_KEY",
        hide_env_values = true,
        value_name = "KEY"
    )]
    pub(crate) openai_key: Option<String>,
    /// Base model of an OpenAI target. Without it, the first that the server lists.
    #[arg(long, value_name = "NAME")]
    pub(crate) openai_model: Option<String>,
    /// Fields added to every request of an OpenAI target, as a JSON object. "{adapter}" stands for
    /// the adapter's name, "{adapter_index}" for its place in --adapters; with either of them the
    /// model's name stays the base's. For llama.cpp: {"lora": [{"id": "{adapter_index}", "scale": 1}]}
    #[arg(long, value_name = "JSON", value_parser = Template::parse)]
    pub(crate) openai_body: Option<Template>,
}

/// Which kind of server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Espalier,
    OpenAi(String),
}

fn kind(text: &str) -> Result<Kind, String> {
    match text.split_once('=') {
        None if text == "espalier" => Ok(Kind::Espalier),
        Some(("openai", url)) if url.starts_with("http://") || url.starts_with("https://") => {
            Ok(Kind::OpenAi(url.to_owned()))
        }
        Some(("openai", url)) => Err(format!("{url:?} is no URL; write openai=http://HOST:PORT")),
        _ => Err("write espalier, or openai=http://HOST:PORT".to_owned()),
    }
}

/// When requests come, and for how long.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Load")]
pub(crate) struct LoadArgs {
    /// Open loop: requests a second, sent at moments of their own whatever the server does.
    /// FROM..TO changes it in a straight line over the test.
    #[arg(long, value_name = "RATE", value_parser = |t: &str| quantity::range(t, quantity::rate))]
    pub(crate) rate: Option<(f64, f64)>,
    /// Open loop with a rate for each tenant: NAME=RATE, several times.
    #[arg(long, value_name = "NAME=RATE", value_parser = tenant_rate, conflicts_with = "rate")]
    pub(crate) tenant_rate: Vec<(String, (f64, f64))>,
    /// How an open loop's moments are spread: poisson, constant, or gamma:SHAPE (below 1: bursts).
    #[arg(long, default_value = "poisson", value_parser = spread)]
    pub(crate) arrivals: Spread,
    /// Closed loop: so many clients, each with one request at a time. FROM..TO adds or removes
    /// clients over the test.
    #[arg(long, value_name = "N", value_parser = |t: &str| quantity::range(t, clients), conflicts_with_all = ["rate", "tenant_rate"])]
    pub(crate) clients: Option<(usize, usize)>,
    /// Replay a recorded trace: JSONL or CSV with timestamp and, where there are,
    /// input_length, output_length, adapter, tenant, operation, prompt.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["rate", "tenant_rate", "clients"])]
    pub(crate) trace: Option<PathBuf>,
    /// Open loop at one rate after the other, each for the duration: 1,2,4,8
    #[arg(long, value_name = "RATES", value_delimiter = ',', value_parser = quantity::rate, conflicts_with_all = ["rate", "tenant_rate", "clients", "trace"])]
    pub(crate) sweep: Vec<f64>,
    /// Closed loop with one number of clients after the other: 1,2,4,8
    #[arg(long, value_name = "COUNTS", value_delimiter = ',', value_parser = clients, conflicts_with_all = ["rate", "tenant_rate", "clients", "trace", "sweep"])]
    pub(crate) sweep_clients: Vec<usize>,
    /// Find the highest rate between these at which every --slo holds; each try takes the
    /// warm-up and the duration: 1..50
    #[arg(long, value_name = "FROM..TO", value_parser = |t: &str| quantity::range(t, quantity::rate), conflicts_with_all = ["rate", "tenant_rate", "clients", "trace", "sweep", "sweep_clients"])]
    pub(crate) search: Option<(f64, f64)>,
    /// Find the highest number of clients of a closed loop: 1..64
    #[arg(long, value_name = "FROM..TO", value_parser = |t: &str| quantity::range(t, clients), conflicts_with_all = ["rate", "tenant_rate", "clients", "trace", "sweep", "sweep_clients", "search"])]
    pub(crate) search_clients: Option<(usize, usize)>,
    /// Unit of bare numbers in the trace's timestamps: s or ms.
    #[arg(long, default_value = "s", value_parser = unit)]
    pub(crate) trace_unit: Duration,
    /// Replay so many times as fast.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = |t: &str| quantity::positive(t, 1e4))]
    pub(crate) trace_speed: f64,
    /// Send for so long after the warm-up. Without it and --requests: 30s.
    #[arg(long, short = 'd', value_name = "SPAN", value_parser = quantity::duration)]
    pub(crate) duration: Option<Duration>,
    /// Measure at most so many requests.
    #[arg(long, short = 'n', value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) requests: Option<u64>,
    /// Do not measure requests of so long a time at the start.
    #[arg(long, value_name = "SPAN", default_value = "0s", value_parser = quantity::duration)]
    pub(crate) warmup: Duration,
    /// Do not measure so many first requests.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) warmup_requests: u64,
    /// The most requests in flight. One that has to wait for this is late, and its latency and
    /// the report say so.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = |t: &str| quantity::count(t, 1_000_000))]
    pub(crate) max_in_flight: usize,
    /// Work that goes on beside the requests, several times:
    /// train:file=FILE,adapter=NAME[,jobs=1][,steps=100][,method=sft|classify|head],
    /// upload:dir=DIR,adapter=NAME[,every=5s], alias:adapter=NAME@ALIAS,versions=1/2[,every=1s]
    #[arg(long, value_name = "WORK")]
    pub(crate) beside: Vec<Beside>,
}

fn clients(text: &str) -> Result<usize, String> {
    quantity::count(text, 100_000)
}

fn tenant_rate(text: &str) -> Result<(String, (f64, f64)), String> {
    let (name, rate) = text
        .split_once('=')
        .ok_or_else(|| format!("{text:?} is not NAME=RATE; write for example acme=2.5"))?;
    Ok((name.to_owned(), quantity::range(rate, quantity::rate)?))
}

fn spread(text: &str) -> Result<Spread, String> {
    match text.split_once(':').unwrap_or((text, "")) {
        ("poisson", "") => Ok(Spread::Poisson),
        ("constant", "") => Ok(Spread::Constant),
        ("gamma", shape) => Ok(Spread::Gamma(
            quantity::positive(shape, 1e3).map_err(|error| format!("gamma's shape {error}"))?,
        )),
        _ => Err("write poisson, constant or gamma:0.5".to_owned()),
    }
}

fn unit(text: &str) -> Result<Duration, String> {
    match text {
        "s" => Ok(Duration::from_secs(1)),
        "ms" => Ok(Duration::from_millis(1)),
        _ => Err("write s or ms".to_owned()),
    }
}

/// What requests hold.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Requests")]
pub(crate) struct WorkArgs {
    /// generate, chat, classify or embed, or several with weights: generate:8,classify:2
    #[arg(long, default_value = "generate", value_name = "MIX")]
    pub(crate) op: Mix,
    /// Input tokens: 128, uniform:64..256, normal:128,32 or lognormal:128,0.5
    #[arg(long, default_value = "128", value_name = "LENGTHS")]
    pub(crate) input: Lengths,
    /// Output tokens, the same way.
    #[arg(long, default_value = "32", value_name = "LENGTHS")]
    pub(crate) output: Lengths,
    /// Prompts from a file, in turn: one a line, or JSONL with `prompt` or `messages`.
    #[arg(long, value_name = "FILE", conflicts_with = "input")]
    pub(crate) prompts: Option<PathBuf>,
    /// Begin every synthetic input with so many tokens that others share.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1_048_576), conflicts_with = "prompts")]
    pub(crate) shared_prefix: Option<u32>,
    /// How many different shared beginnings there are.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) prefixes: u32,
    /// Adapters, most popular first: a,b@canary,c/3 or a[0-63], or `all` of each tenant's.
    #[arg(long, value_name = "LIST")]
    pub(crate) adapters: Option<String>,
    /// uniform, zipf:1.0, round-robin or hot:0.9 (the first one's share).
    #[arg(long, default_value = "uniform")]
    pub(crate) popularity: Popularity,
    /// Share of requests that ask the base model.
    #[arg(long, value_name = "SHARE", default_value = "0", value_parser = quantity::share)]
    pub(crate) base_share: f64,
    /// Tenants that ask in turn: acme,globex or t[0-7]. Needs a service key, or --tenant-keys.
    #[arg(long, value_name = "LIST")]
    pub(crate) tenants: Option<String>,
    /// A file with a tenant and its key on each line.
    #[arg(long, value_name = "FILE")]
    pub(crate) tenant_keys: Option<PathBuf>,
    /// Labels that Classify chooses among. Without them, those of the adapter.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub(crate) labels: Vec<String>,
    /// Sampling temperature; 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temperature: f32,
    /// Let the model end before the output length that was drawn.
    #[arg(long)]
    pub(crate) stop_at_eos: bool,
    /// The same seed gives the same moments and the same requests.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
}

/// What is judged and written.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Objectives and reports")]
pub(crate) struct OutputArgs {
    /// Exit with 7 unless this holds: ttft:p99<200ms, tpot:mean<50ms, itl:p99.9<1s, e2e:max<3s,
    /// errors<1%. Several times.
    #[arg(long, value_name = "OBJECTIVE")]
    pub(crate) slo: Vec<Objective>,
    /// Count as goodput only requests with ttft:200ms, tpot:50ms, e2e:3s. Several times; without
    /// it the limits of --slo count.
    #[arg(long, value_name = "GOAL")]
    pub(crate) goodput: Vec<Goal>,
    /// Write the result as JSON, with the keys of `vllm bench serve`.
    #[arg(long, short = 'o', value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Write the report: one HTML file with its charts, which needs no network.
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// Write a CSV row for each request.
    #[arg(long, value_name = "FILE")]
    pub(crate) csv: Option<PathBuf>,
    /// Write the histograms, for `espalier bench merge` or any reader of HdrHistogram's logs.
    #[arg(long, value_name = "FILE")]
    pub(crate) hist: Option<PathBuf>,
    /// Print ratios to the JSON of an earlier test.
    #[arg(long, value_name = "FILE")]
    pub(crate) compare: Option<PathBuf>,
    /// With --compare: exit with 7 when a figure is worse by more than this: 10%
    #[arg(long, value_name = "SHARE", value_parser = quantity::share, requires = "compare")]
    pub(crate) fail_if_worse: Option<f64>,
    /// Words that the JSON and the report carry, to know this test by.
    #[arg(long, value_name = "TEXT")]
    pub(crate) label: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_kinds_and_rates_are_read_or_explained() {
        assert_eq!(spread("gamma:0.5"), Ok(Spread::Gamma(0.5)));
        assert!(spread("gamma").is_err() && spread("often").is_err());
        assert_eq!(
            kind("openai=http://h:1"),
            Ok(Kind::OpenAi("http://h:1".to_owned()))
        );
        assert!(kind("openai=h:1").is_err_and(|error| error.contains("http://")));
        assert!(kind("vllm").is_err());
        assert_eq!(tenant_rate("a=1..3"), Ok(("a".to_owned(), (1.0, 3.0))));
        assert!(tenant_rate("a").is_err() && tenant_rate("a=0").is_err());
    }
}
