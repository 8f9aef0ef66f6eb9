//! Time between tokens at a share of the peak rate: first the peak, from clients that never pause, then arrivals at the
//! share of it, in turn.

use espalier_benches::Fallible;
use espalier_benches::daemon::Daemon;
use espalier_benches::turns::{median, quantile};

use super::Latency;
use super::load::{closed, open};

/// What one round showed.
struct Round {
    peak: f64,
    median: f64,
    p99: f64,
    first: f64,
    late: f64,
    gaps: usize,
}

pub(crate) fn run(options: &Latency) -> Fallible<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let local = tokio::task::LocalSet::new();
    let daemon = Daemon::spawn(&options.served.model, &options.served.flags())?;
    let rounds = local.block_on(&runtime, measure(options, &daemon))?;
    let of = |value: fn(&Round) -> f64| {
        let values: Vec<f64> = rounds.iter().map(value).collect();
        median(&values)
    };
    let ratio = of(|round| round.p99 / round.median);
    let wanted = if ratio < 3.0 { "met" } else { "missed" };
    println!(
        "| {:.0} % of peak, Poisson arrivals, 64-192 in / 32-96 out, {} | median of {} rounds |",
        100.0 * options.share,
        options.served.dtype.as_deref().unwrap_or("default dtype"),
        rounds.len()
    );
    println!("|---|---|");
    println!(
        "| peak, requests/s ({} clients) | {:.2} |",
        options.clients,
        of(|round| round.peak)
    );
    println!(
        "| time to first token, median, ms | {:.1} |",
        1e3 * of(|round| round.first)
    );
    println!(
        "| between tokens, median, ms | {:.1} |",
        1e3 * of(|round| round.median)
    );
    println!(
        "| between tokens, p99, ms | {:.1} |",
        1e3 * of(|round| round.p99)
    );
    println!("| p99 / median (wanted below 3: {wanted}) | {ratio:.2} |");
    println!(
        "| gaps measured in a round | {:.0} |",
        of(|round| round.gaps as f64)
    );
    println!(
        "| latest arrival behind its plan, ms | {:.1} |",
        1e3 * of(|round| round.late)
    );
    Ok(())
}

async fn measure(options: &Latency, daemon: &Daemon) -> Fallible<Vec<Round>> {
    let mut tenants = Vec::new();
    for i in 0..options.served.connections {
        tenants.push(daemon.tenant(&format!("tenant-{i}"), None).await?);
    }
    let mut rounds = Vec::new();
    for number in 0..options.rounds {
        let seed = 1 + number as u64;
        let peak = closed(&tenants, options.clients, options.seconds, seed).await?;
        let opened = open(
            &tenants,
            options.share * peak,
            options.seconds,
            500_000 + seed,
        )
        .await?;
        let round = Round {
            peak,
            median: median(&opened.gaps),
            p99: quantile(&opened.gaps, 0.99),
            first: median(&opened.first),
            late: opened.late,
            gaps: opened.gaps.len(),
        };
        eprintln!(
            "round {}: peak {:.2}/s, between tokens {:.1} ms, p99 {:.1} ms",
            number + 1,
            round.peak,
            1e3 * round.median,
            1e3 * round.p99
        );
        rounds.push(round);
    }
    Ok(rounds)
}
