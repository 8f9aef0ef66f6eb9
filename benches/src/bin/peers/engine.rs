//! Our side without a server: mixed rows through the whole engine, and the trainer, each in a process of its own so that
//! peak memory is its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use espalier_adapters::config::{LoraConfig, Site};
use espalier_adapters::ops::Backend;
use espalier_adapters::pace::Unpaced;
use espalier_adapters::train::examples::{Example, Examples};
use espalier_benches::Fallible;
use espalier_benches::in_process::{batch, prompts, start};
use espalier_benches::turns::median;
use espalier_engine::config::EngineConfig;
use espalier_engine::model::{Dtype, Model};
use espalier_engine::train::trainer::{HyperParameters, Method, TrainEvent, TrainPlan, Trainer};
use rand::{Rng, SeedableRng};
use serde_json::json;

use super::{NEW, PROMPT, REPEATS};

#[tokio::main(flavor = "current_thread")]
pub(crate) async fn generate(model: &str, directories: &[PathBuf]) -> Fallible<()> {
    let config = EngineConfig {
        max_num_batched_tokens: 1024,
        ..EngineConfig::default()
    };
    let (engine, digests) = start(model, Dtype::F32, config, directories)?;
    let n = digests.len();
    // A draw of its own for each batch: a prompt that was seen before may be found in the prefix cache.
    let mut seed = 0;
    let mut timed = async |new: usize| {
        seed += 1;
        let prompts = prompts(n, PROMPT, seed);
        let rows: Vec<_> = digests.iter().copied().map(Some).zip(prompts).collect();
        batch(&engine, &rows, new).await
    };
    timed(2).await?;
    let (mut first, mut whole) = (Vec::new(), Vec::new());
    for _ in 0..REPEATS {
        first.push(timed(1).await?);
        whole.push(timed(NEW + 1).await?);
    }
    let (first, whole, n) = (median(&first), median(&whole), n as f64);
    println!(
        "{}",
        json!({
            "peer": "espalier", "rows": n, "adapters": n, "dtype": "float32",
            "prefill_tok_s": n * PROMPT as f64 / first,
            "decode_tok_s": n * NEW as f64 / (whole - first),
            "end_to_end_out_tok_s": n * (NEW + 1) as f64 / whole,
            "peak_rss_gib": peak_rss_gib()?,
        })
    );
    Ok(())
}

/// The highest resident set of this process so far.
fn peak_rss_gib() -> Fallible<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(kib.ok_or("no VmHWM in /proc/self/status")?.parse::<f64>()? / f64::from(1 << 20))
}

/// Steps that are timed, after one that is not.
const STEPS: u64 = 4;

pub(crate) fn train(model: &str, rows: usize, tokens: usize) -> Fallible<()> {
    let loaded = espalier_engine::model::load(model)?;
    let model = Arc::new(Model::new(
        Backend::default(),
        loaded.config,
        loaded.weights,
    )?);
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    let items: Vec<Example> = (0..rows)
        .map(|_| Example::Lm {
            ids: (0..tokens)
                .map(|_| random.random_range(100..40_000))
                .collect(),
            learn: (0..tokens).map(|i| i > 0).collect(),
        })
        .collect();
    let plan = TrainPlan {
        method: Method::Lm,
        lora: Some(LoraConfig::new(16, 32.0, &Site::ALL)),
        hp: HyperParameters {
            batch_size: rows,
            epochs: Some(STEPS + 1),
            checkpoint_steps: Some(0),
            ..HyperParameters::default()
        },
        seed: 0,
        train: Examples {
            lines: (1..=rows as u64).collect(),
            labels: None,
            items,
        },
        valid: None,
        init: None,
    };
    let (mut seconds, mut last) = (Vec::new(), Instant::now());
    let mut loss = 0.0;
    Trainer::new(model, plan)?.run(&Unpaced, &mut |event| {
        if let TrainEvent::Step(step) = event {
            seconds.push(last.elapsed().as_secs_f64());
            last = Instant::now();
            loss = step.loss;
        }
    })?;
    println!(
        "{}",
        json!({
            "peer": "espalier", "shape": [rows, tokens], "dtype": "float32", "last_loss": loss,
            "train_tok_s": (rows * tokens) as f64 / median(&seconds[1..]),
            "peak_rss_gib": peak_rss_gib()?,
        })
    );
    Ok(())
}
