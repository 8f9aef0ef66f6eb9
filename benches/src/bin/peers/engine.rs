//! Our side without a server: mixed rows through the whole engine, and the trainer, each in a process of its own so that
//! peak memory is its own.

use std::path::{Path, PathBuf};
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
use espalier_engine::model::{Dtype, LoadedModel, Model};
use espalier_engine::train::trainer::{HyperParameters, Method, TrainPlan, Trainer};
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

/// Steps that are timed, after one that is not; the peer's `--repeats`.
pub(crate) const STEPS: usize = 9;

/// Rows of a step with real texts, as the peer has them.
const ROWS: usize = 8;

/// Trains on given batches: `[rows, tokens]` of random ids with every token in the loss, or the rows of a file of prompts and
/// completions with the completions in the loss.
pub(crate) fn train(
    model: &str,
    (rows, tokens): (usize, usize),
    data: Option<&Path>,
) -> Fallible<()> {
    let loaded = espalier_engine::model::load(model)?;
    let batches = match data {
        Some(file) => texts(&loaded, file)?,
        None => vec![random(rows, tokens); STEPS + 1],
    };
    let model = Arc::new(Model::new(
        Backend::default(),
        loaded.config,
        loaded.weights,
    )?);
    let plan = TrainPlan {
        method: Method::Lm,
        adapter: Some(LoraConfig::new(16, 32.0, &Site::ALL).into()),
        hp: HyperParameters {
            checkpoint_steps: Some(0),
            ..HyperParameters::default()
        },
        seed: 0,
        train: Examples {
            lines: (1..=batches[0].len() as u64).collect(),
            labels: None,
            items: batches[0].clone(),
        },
        valid: None,
        init: None,
    };
    let mut trainer = Trainer::new(model, plan)?;
    let (mut rates, mut loss) = (Vec::new(), 0.0);
    for batch in &batches {
        let began = Instant::now();
        let step = trainer.step_on(batch, &Unpaced)?;
        rates.push(step.tokens as f64 / began.elapsed().as_secs_f64());
        loss = step.loss;
    }
    let longest = batches[0].iter().map(|example| example.ids().len()).max();
    println!(
        "{}",
        json!({
            "peer": "espalier", "shape": [batches[0].len(), longest], "data": data, "dtype": "float32",
            "last_loss": loss, "train_tok_s": median(&rates[1..]), "peak_rss_gib": peak_rss_gib()?,
        })
    );
    Ok(())
}

fn random(rows: usize, tokens: usize) -> Vec<Example> {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    let mut row = || Example::Lm {
        ids: (0..tokens)
            .map(|_| random.random_range(100..40_000))
            .collect(),
        learn: (0..tokens).map(|i| i > 0).collect(),
    };
    (0..rows).map(|_| row()).collect()
}

#[derive(serde::Deserialize)]
struct Row {
    prompt: String,
    completion: String,
}

/// The first rows of a file, prompt and completion tokenised one by one as the peer does.
fn texts(loaded: &LoadedModel, file: &Path) -> Fallible<Vec<Vec<Example>>> {
    let lines = std::fs::read_to_string(file)?;
    let mut examples = Vec::new();
    for line in lines.lines().take(ROWS * (STEPS + 1)) {
        let row: Row = serde_json::from_str(line)?;
        let mut ids = loaded.tokenizer.encode(&row.prompt)?;
        let start = ids.len();
        ids.extend(loaded.tokenizer.encode(&row.completion)?);
        let learn = (0..ids.len()).map(|i| i >= start).collect();
        examples.push(Example::Lm { ids, learn });
    }
    if examples.len() < ROWS * (STEPS + 1) {
        return Err(format!(
            "{} has less than {} rows",
            file.display(),
            ROWS * (STEPS + 1)
        )
        .into());
    }
    Ok(examples.chunks(ROWS).map(<[Example]>::to_vec).collect())
}
