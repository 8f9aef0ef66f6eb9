//! Serving, measured: decode steps beside the bytes that they must read, prompts beside the products that they need, and the
//! way of an adapter from the host's memory to the device's.
//!
//! A step is the pass, the logits and the draw of every row's likeliest token. Each row has blocks of its own, filled with
//! copies of one computed prompt, and each adapter has memory of its own, with the same numbers in all of them: what is read is
//! never read twice.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_adapters::ops::Ops;
use espalier_adapters::weights::AdapterWeights;
use espalier_engine::model::{BaseSites, ResidentAdapter};
use serde_json::json;

use super::base::{Base, RANK, tokens};
use super::ceilings::Ceilings;
use super::report::Report;
use super::sequences::{Run, Sequences};
use crate::config::Config;

type Adapters = Vec<Arc<ResidentAdapter>>;

/// Sequences of a prompt pass: with adapters each has its own.
const PROMPTS: usize = 16;

/// The share of free memory that keys and values may take.
const KV_SHARE: f64 = 0.8;

/// Loads of an adapter of which the median counts.
const LOADS: usize = 5;

pub(super) fn run(config: &Config, budget: Duration) -> Result<ExitCode, Box<dyn Error>> {
    let began = Instant::now();
    let base = Base::open(config)?;
    let report = Report::start(
        "serve",
        base.about(),
        budget.saturating_sub(began.elapsed()),
    );
    let ceilings = Ceilings::measure(&base, &report);
    let weights = base.adapter(1);
    loads(&base, &weights, &report);
    let most = base.scale.adapters.iter().copied().max().unwrap_or(0);
    let mut adapters = Vec::new();
    report.row(json!({"adapters": most, "rank": RANK}), || {
        adapters = resident(&base, &weights, most)?;
        let bytes: usize = adapters.iter().map(|adapter| adapter.bytes()).sum();
        Ok(json!({"bytes": bytes}))
    });
    decodes(&base, &adapters, ceilings, &report);
    prompts(&base, &adapters, ceilings, &report);
    Ok(report.finish())
}

/// So many adapters in memory, each in a place of its own.
pub(super) fn resident(
    base: &Base,
    weights: &AdapterWeights,
    count: usize,
) -> Result<Adapters, Box<dyn Error>> {
    let build = |_| {
        Ok(Arc::new(ResidentAdapter::build(
            weights,
            base.model.as_ref(),
        )?))
    };
    (0..count).map(build).collect()
}

/// From the host's memory to one that steps may use.
fn loads(base: &Base, weights: &AdapterWeights, report: &Report) {
    report.row(json!({"step": "cold adapter"}), || {
        let (mut ms, mut bytes) = (Vec::new(), 0);
        for _ in 0..LOADS {
            let began = Instant::now();
            let adapter = ResidentAdapter::build(weights, base.model.as_ref())?;
            base.model.ops().beside().wait();
            ms.push(began.elapsed().as_secs_f64() * 1e3);
            bytes = adapter.bytes();
        }
        Ok(json!({"bytes": bytes, "first ms": ms[0], "ms": median(ms)}))
    });
}

// === decode ===

fn decodes(base: &Base, adapters: &Adapters, ceilings: Ceilings, report: &Report) {
    let Some(most) = most_rows(base) else {
        return report.not_run("decode: no memory for one sequence");
    };
    let mut sequences = None;
    let context = base.scale.context;
    report.row(json!({"sequences": most, "context": context}), || {
        let began = Instant::now();
        sequences = Some(filled(base, most));
        Ok(json!({"filled in s": began.elapsed().as_secs_f64()}))
    });
    let Some(mut sequences) = sequences else {
        return;
    };
    for rows in base.scale.rows.iter().copied().filter(|rows| *rows <= most) {
        let mut alone = f64::NAN;
        let counts = base.scale.adapters.iter().copied();
        for count in counts.filter(|count| *count <= rows.min(adapters.len())) {
            let about = json!({"step": "decode", "rows": rows, "adapters": count});
            let chosen = &adapters[..count];
            report.row(about, || {
                let seconds = decode(base, &mut sequences, rows, chosen);
                if count == 0 {
                    alone = seconds;
                }
                let adapted: usize = chosen.iter().map(|adapter| adapter.bytes()).sum();
                let kept = rows * context * base.token_bytes();
                let bytes = (base.read_bytes() + kept + adapted) as f64;
                Ok(json!({
                    "ms": seconds * 1e3,
                    "tokens/s": rows as f64 / seconds,
                    "GB to read": bytes * 1e-9,
                    "share of bandwidth": bytes / seconds / ceilings.bandwidth,
                    "ratio": seconds / alone,
                }))
            });
        }
    }
}

/// The largest number of rows whose keys and values fit.
fn most_rows(base: &Base) -> Option<usize> {
    let room = base
        .free_bytes()
        .map(|free| (free as f64 * KV_SHARE) as usize);
    let each = (base.scale.context + 1).next_multiple_of(16) * base.token_bytes();
    let rows = base.scale.rows.iter().copied();
    rows.filter(|rows| room.is_none_or(|room| rows * each <= room))
        .max()
}

/// Sequences with the context that decode steps follow.
pub(super) fn filled(base: &Base, count: usize) -> Sequences<'_> {
    let context = base.scale.context;
    let mut sequences = Sequences::new(&base.model, count, context + 1);
    sequences.fill(&tokens(base.model.config().vocab, 3, context));
    sequences
}

/// Median seconds of a step of the first `rows` sequences, shared out evenly among adapters.
pub(super) fn decode(
    base: &Base,
    sequences: &mut Sequences<'_>,
    rows: usize,
    adapters: &[Arc<ResidentAdapter>],
) -> f64 {
    let tokens = tokens(base.model.config().vocab, 4, rows);
    let runs: Vec<Run<'_>> = (0..rows)
        .map(|row| Run {
            sequence: row,
            tokens: &tokens[row..=row],
            start: base.scale.context,
            adapter: adapters.get(row * adapters.len() / rows).cloned(),
        })
        .collect();
    let (warm_up, steps) = (base.scale.warm_up, base.scale.steps);
    timed(sequences, &runs, warm_up, steps)
}

/// Median seconds of a pass.
fn timed(sequences: &mut Sequences<'_>, runs: &[Run<'_>], warm_up: usize, passes: usize) -> f64 {
    let mut seconds = Vec::new();
    for pass in 0..warm_up + passes {
        let began = Instant::now();
        sequences.pass(runs);
        sequences.draw();
        if pass >= warm_up {
            seconds.push(began.elapsed().as_secs_f64());
        }
    }
    median(seconds)
}

pub(super) fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}

// === prompts ===

fn prompts(base: &Base, adapters: &Adapters, ceilings: Ceilings, report: &Report) {
    let all = base.scale.prompt;
    for (sequences, adapted) in [(1, 0), (PROMPTS, 0), (PROMPTS, PROMPTS)] {
        let about = json!({
            "step": "prompt", "tokens": all, "sequences": sequences, "adapters": adapted
        });
        report.row(about, || {
            let chosen = adapters
                .get(..adapted)
                .ok_or("the adapters are not there")?;
            let seconds = prompt(base, sequences, chosen);
            let rate = prompt_operations(base, sequences) / seconds;
            Ok(json!({
                "ms": seconds * 1e3,
                "tokens/s": all as f64 / seconds,
                "TFLOP/s": rate * 1e-12,
                "share of products": rate / ceilings.products,
            }))
        });
    }
}

fn prompt(base: &Base, count: usize, adapters: &[Arc<ResidentAdapter>]) -> f64 {
    let each = base.scale.prompt / count;
    let tokens = tokens(base.model.config().vocab, 5, count * each);
    let runs: Vec<Run<'_>> = (0..count)
        .map(|sequence| Run {
            sequence,
            tokens: &tokens[sequence * each..(sequence + 1) * each],
            start: 0,
            adapter: adapters.get(sequence).cloned(),
        })
        .collect();
    let mut sequences = Sequences::new(&base.model, count, each);
    timed(&mut sequences, &runs, 1, base.scale.steps.div_ceil(4))
}

/// Multiplications and additions of the base's projections, the logits of each last row, and causal attention; what adapters
/// add is not counted.
fn prompt_operations(base: &Base, sequences: usize) -> f64 {
    let config = base.model.config();
    let (tokens, count) = (base.scale.prompt as f64, sequences as f64);
    let head = (config.vocab * config.hidden) as f64;
    let layers = base.multiplied() as f64 - head;
    let pairs = tokens * (tokens / count) / 2.0;
    let attention = 4.0 * config.layers as f64 * config.q_width() as f64 * pairs;
    2.0 * (layers * tokens + head * count) + attention
}
