//! Adapters beyond memory: throughput and time to first token against the number of rank-4 adapters under Zipf(1.0) with
//! room for 50, a cold adapter's first token beside a warm one's, and what 10,000 registered adapters cost at rest.
//!
//! Everything is measured in one run, points in turn, medians of the rounds. Artifacts lie in a real store on the disk
//! and come through the real loader; the third part asks a real `espalierd` over gRPC.

mod cold;
mod rest;
mod served;
mod zipf;

use std::path::PathBuf;

use clap::Parser;
use espalier_benches::Fallible;

#[derive(Parser)]
#[command(
    about = "Adapters beyond memory: throughput against their number, cold beside warm, and 10,000 at rest"
)]
struct Args {
    /// The base: a GGUF or a Hugging Face directory.
    #[arg(long, env = "ESPALIER_MODEL")]
    model: String,
    /// Rounds of every point; medians count.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of one point in one round.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Pairs of cold and warm.
    #[arg(long, default_value_t = 15)]
    pairs: usize,
    /// Parts to run: zipf, cold, rest.
    #[arg(long, value_delimiter = ',', default_value = "zipf,cold,rest")]
    parts: Vec<String>,
    /// The server of the third part; left out: beside this program.
    #[arg(long)]
    espalierd: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> Fallible<()> {
    let args = Args::parse();
    let runs = |part: &str| args.parts.iter().any(|given| given == part);
    if runs("zipf") {
        zipf::run(&args).await?;
    }
    if runs("cold") {
        cold::run(&args).await?;
    }
    if runs("rest") {
        rest::run(&args).await?;
    }
    Ok(())
}

/// The last line of a part.
fn verdict(what: &str, failures: &[String]) {
    if failures.is_empty() {
        println!("PASS: {what}");
    } else {
        println!("MISS: {what}: {}", failures.join("; "));
    }
}
