//! What gRPC and everything around the engine cost (`cost`), and how evenly tokens come under load (`latency`).
//!
//! `cost` runs the same rows on the engine in a process of its own and through a server, in turn. Client, shell and engine
//! share the machine here, so the ratio of tokens/s charges the shell with the client's work too; the processor time by
//! thread, read from the system, tells the three apart.

mod cost;
mod latency;
mod load;

use clap::{Parser, Subcommand};
use espalier_benches::Fallible;

#[derive(Parser)]
#[command(
    about = "gRPC and the shell beside the engine in process; latencies between tokens under load"
)]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// The same rows over gRPC and in process, in turn; prints the table.
    Cost(Cost),
    /// One run in process, as one JSON line.
    Engine(Cost),
    /// Time between tokens at a share of the peak rate, arrivals by a Poisson process; prints the table.
    Latency(Latency),
}

/// What is measured, by both sides.
#[derive(clap::Args, Clone)]
struct Served {
    /// The model: a GGUF or a Hugging Face directory.
    #[arg(long)]
    model: String,
    /// Precision of the base weights, as espalierd's flag; its default without.
    #[arg(long)]
    dtype: Option<String>,
    /// Further flags of espalierd, as `--flag=--prefill-chunk-tokens=64`.
    #[arg(long, allow_hyphen_values = true)]
    flag: Vec<String>,
    /// Client connections; each is a tenant with a key of its own.
    #[arg(long, default_value_t = 8)]
    connections: usize,
}

#[derive(clap::Args, Clone)]
struct Cost {
    #[command(flatten)]
    served: Served,
    /// Streams at once.
    #[arg(long, default_value_t = 32)]
    streams: usize,
    /// Prompt tokens of each.
    #[arg(long, default_value_t = 32)]
    prompt: usize,
    /// Output tokens of each.
    #[arg(long, default_value_t = 128)]
    new: usize,
    /// How often the two sides take turns.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

#[derive(clap::Args, Clone)]
struct Latency {
    #[command(flatten)]
    served: Served,
    /// Clients of the closed loop that finds the peak rate.
    #[arg(long, default_value_t = 32)]
    clients: usize,
    /// Seconds of each phase.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// The share of the peak rate at which requests arrive.
    #[arg(long, default_value_t = 0.7)]
    share: f64,
    /// How often peak and load take turns.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

fn main() -> Fallible<()> {
    match Args::parse().verb {
        Verb::Cost(options) => cost::run(&options),
        Verb::Engine(options) => cost::engine(&options),
        Verb::Latency(options) => latency::run(&options),
    }
}

// === impl Served ===

impl Served {
    fn flags(&self) -> Vec<String> {
        let dtype = self.dtype.iter().map(|dtype| format!("--dtype={dtype}"));
        dtype.chain(self.flag.iter().cloned()).collect()
    }
}
