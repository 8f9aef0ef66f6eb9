//! What each format of the base costs and gives, on a real model: speed beside the machine's ceilings, and quality beside f32.
//!
//! `precision --model M.gguf` prints decode at one row and prefill of 512 tokens for every `--dtype`, beside ceilings that are measured in the same
//! rounds; with `--python` also torch's f32 prefill, taking turns. `--quality` compares logits with f32 over a text. Sides alternate, medians count.

mod quality;
mod rivals;

use std::hint::black_box;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use espalier_adapters::batch::Segment;
use espalier_adapters::config::Site;
use espalier_adapters::ops::{self, Backend, Buffer, Ops};
use espalier_benches::Fallible;
use espalier_benches::ceilings::{Ceilings, Probe};
use espalier_benches::turns::median;
use espalier_engine::model::{
    BaseSites, Batch, Buf, Dtype, KvCache, Model, ResidentAdapter, SeqSpan, Workspace, load_as,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

/// Tokens of the prompt whose prefill is measured.
const PROMPT: usize = 512;
/// Tokens before the first measured decode step.
const CONTEXT: usize = 64;
/// Decode steps of one round; the median counts.
const STEPS: usize = 15;
/// Tokens of one KV block.
const BLOCK: usize = 16;

#[derive(Parser)]
#[command(
    about = "Size, speed and quality of every format of the base, beside the machine's ceilings"
)]
struct Args {
    /// The model: a GGUF or a Hugging Face directory.
    #[arg(long)]
    model: String,
    /// Formats, by default all.
    #[arg(long, value_delimiter = ',')]
    dtypes: Vec<Dtype>,
    /// Rounds in which every side has a turn.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// KL divergence, agreement and loss instead of speed.
    #[arg(long)]
    quality: bool,
    /// Our products beside candle's, plain and quantised, instead of a model's speed.
    #[arg(long)]
    rivals: bool,
    /// Text for the quality table: JSON lines of instructions with instances (`seed_tasks.jsonl`).
    #[arg(long, default_value = "../shared/data/seed_tasks.jsonl")]
    text: PathBuf,
    /// Pieces of text.
    #[arg(long, default_value_t = 8)]
    pieces: usize,
    /// A PEFT directory whose loss is measured too.
    #[arg(long)]
    adapter: Vec<PathBuf>,
    /// A Python with torch and transformers, to measure its f32 prefill; with `--rivals` its libraries' products.
    #[arg(long)]
    python: Option<PathBuf>,
    /// The script of those products.
    #[arg(long, default_value = "benches/blas.py")]
    blas: PathBuf,
    /// The peer's script.
    #[arg(long, default_value = "../shared/peers/peft_peer.py")]
    peer: PathBuf,
    /// The model as a Hugging Face directory, for the peer.
    #[arg(long)]
    hf: Option<PathBuf>,
}

fn main() -> Fallible<()> {
    let mut args = Args::parse();
    if args.dtypes.is_empty() {
        args.dtypes = Dtype::ALL.to_vec();
    }
    if args.quality {
        quality::table(&args)
    } else if args.rivals {
        rivals::table(&args)
    } else {
        speed(&args)
    }
}

/// Seconds of one run.
fn seconds(run: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    run();
    begin.elapsed().as_secs_f64()
}

// === one model ===

/// A model in one format, with what a run needs.
struct Side {
    dtype: Dtype,
    model: Model,
    kv: KvCache,
    workspace: Workspace,
    logits: Buf,
    table: Vec<u32>,
}

/// What one round measured.
struct Measured {
    /// Seconds of a decode step with its logits.
    decode: f64,
    /// Seconds of a prefill of 512 tokens with the last one's logits.
    prefill: f64,
    /// Seconds of its projections alone.
    projections: f64,
}

impl Side {
    fn load(spec: &str, dtype: Dtype) -> Fallible<Self> {
        let loaded = load_as(spec, dtype)?;
        let model = Model::new(Backend::default(), loaded.config, loaded.weights)?;
        let blocks = PROMPT / BLOCK + 8;
        let mut logits = model.ops().exact();
        model.ops().resize(&mut logits, model.config().vocab);
        Ok(Side {
            dtype,
            kv: KvCache::new(model.ops(), model.config(), blocks, BLOCK),
            workspace: Workspace::new(model.ops()),
            logits,
            table: (0..blocks as u32).collect(),
            model,
        })
    }

    /// The states of some rows of one sequence.
    fn states(
        &mut self,
        tokens: &[u32],
        start: usize,
        adapter: Option<&Arc<ResidentAdapter>>,
    ) -> Vec<f32> {
        let place = (&mut self.kv, &self.table[..], start);
        let states = forward(&self.model, place, tokens, adapter, &mut self.workspace);
        read(&self.model, states)
    }

    /// Runs rows and computes the logits of the last one; returns the likeliest token.
    fn step(&mut self, tokens: &[u32], start: usize) -> u32 {
        let place = (&mut self.kv, &self.table[..], start);
        let states = forward(&self.model, place, tokens, None, &mut self.workspace);
        let hidden = self.model.config().hidden;
        let last = states.part(states.len() - hidden..states.len());
        let (ops, head) = (self.model.ops(), self.model.head());
        ops.matmul(last, head, self.logits.all_mut());
        let best = match self.model.ops().on_host(&mut self.logits) {
            Some(logits) => best(logits),
            None => best(&read(&self.model, &self.logits)),
        };
        best as u32
    }

    fn measure(&mut self, prompt: &[u32]) -> Measured {
        self.step(&prompt[..CONTEXT], 0);
        let mut token = prompt[CONTEXT];
        let steps: Vec<f64> = (0..STEPS)
            .map(|i| seconds(|| token = self.step(&[token], CONTEXT + i)))
            .collect();
        Measured {
            decode: median(&steps),
            prefill: seconds(|| {
                black_box(self.step(prompt, 0));
            }),
            projections: self.projections(),
        }
    }

    /// Seconds of all projections of all layers over 512 rows.
    fn projections(&self) -> f64 {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let config = self.model.config();
        let wide = config.intermediate.max(config.hidden).max(config.q_width());
        let x: Vec<f32> = (0..PROMPT * wide)
            .map(|_| rng.random_range(-1.0..1.0))
            .collect();
        let ops = self.model.ops();
        let (x, mut y) = (written(&self.model, &x), ops.working());
        ops.resize(&mut y, PROMPT * wide);
        seconds(|| {
            for layer in 0..config.layers {
                for site in Site::ALL {
                    let weight = self.model.weight(layer, site);
                    let (outputs, inputs) = ops.dims(weight);
                    let (x, y) = (x.part(0..PROMPT * inputs), y.part_mut(0..PROMPT * outputs));
                    ops.matmul(x, weight, y);
                }
            }
            ops.wait();
        })
    }

    /// Operations of the projections of one token.
    fn projection_flops(&self) -> f64 {
        let config = self.model.config();
        let sites = (0..config.layers).flat_map(|layer| Site::ALL.map(|site| (layer, site)));
        let weights: usize = sites
            .map(|(layer, site)| {
                let (outputs, inputs) = self.model.ops().dims(self.model.weight(layer, site));
                outputs * inputs
            })
            .sum();
        2.0 * weights as f64
    }
}

/// The states of some rows of one sequence, from `start` on, in the cache's blocks of a table.
fn forward<'w>(
    model: &Model,
    (kv, table, start): (&mut KvCache, &[u32], usize),
    tokens: &[u32],
    adapter: Option<&Arc<ResidentAdapter>>,
    workspace: &'w mut Workspace,
) -> &'w Buf {
    let spans = [SeqSpan {
        rows: 0..tokens.len(),
        start_pos: start,
        block_table: table,
    }];
    let segments = [Segment {
        rows: 0..tokens.len(),
        adapters: adapter.cloned().into(),
    }];
    let batch = Batch {
        tokens,
        spans: &spans,
        segments: &segments,
        overlays: &[],
    };
    model.forward(&batch, kv, workspace)
}

/// Numbers of the model's operations, on the host.
fn read(model: &Model, numbers: &Buf) -> Vec<f32> {
    let mut host = vec![0.0; numbers.len()];
    model.ops().read(numbers.all(), &mut host);
    host
}

/// Numbers of the host, where the model's operations work.
fn written(model: &Model, host: &[f32]) -> Buf {
    let mut numbers = model.ops().working();
    model.ops().resize(&mut numbers, host.len());
    model.ops().write(host, numbers.all_mut());
    numbers
}

/// The logits of states.
fn logits(model: &Model, states: &[f32]) -> Vec<f32> {
    let (ops, config) = (model.ops(), model.config());
    let mut logits = ops.exact();
    ops.resize(&mut logits, states.len() / config.hidden * config.vocab);
    model.logits(&written(model, states), &[], &mut logits);
    read(model, &logits)
}

fn best(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = i;
        }
    }
    best
}

// === speed ===

fn speed(args: &Args) -> Fallible<()> {
    let probe = Probe::new();
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let prompt: Vec<u32> = (0..PROMPT).map(|_| rng.random_range(100..40_000)).collect();
    let mut sides = args
        .dtypes
        .iter()
        .map(|dtype| Side::load(&args.model, *dtype))
        .collect::<Fallible<Vec<_>>>()?;
    let mut ceilings = Vec::new();
    let mut rounds: Vec<Vec<(Ceilings, Measured)>> = sides.iter().map(|_| Vec::new()).collect();
    let mut torch = Vec::new();
    for _ in 0..args.rounds {
        for (side, rounds) in sides.iter_mut().zip(&mut rounds) {
            // Measured beside each side: on a shared machine the ceiling moves from one second to the next.
            let ceiling = probe.measure();
            ceilings.push(ceiling);
            rounds.push((ceiling, side.measure(&prompt)));
        }
        torch.extend(torch_prefill(args)?);
    }
    let all = |f: fn(&Ceilings) -> f64| median(&ceilings.iter().map(f).collect::<Vec<_>>());
    let middle = Ceilings {
        bytes: all(|c| c.bytes),
        f32: all(|c| c.f32),
        i8: all(|c| c.i8),
    };
    println!("medians of {} measurements: {middle}", ceilings.len());
    let torch = (!torch.is_empty()).then(|| median(&torch));
    if let Some(torch) = torch {
        println!("torch f32, prefill of {PROMPT}: {torch:.0} tok/s");
    }
    println!(
        "| dtype | matrices, MiB | decode, ms | tok/s | of the read bandwidth | prefill of {PROMPT}, ms | tok/s | projections, GOP/s | of their peak | torch's prefill |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for (side, rounds) in sides.iter().zip(&rounds) {
        print_speed(side, rounds, torch);
    }
    Ok(())
}

fn print_speed(side: &Side, rounds: &[(Ceilings, Measured)], torch: Option<f64>) {
    let of = |f: &dyn Fn(&Ceilings, &Measured) -> f64| {
        median(&rounds.iter().map(|(c, m)| f(c, m)).collect::<Vec<_>>())
    };
    let bytes = side.model.bytes() as f64;
    let flops = side.projection_flops() * PROMPT as f64;
    let whole = matches!(side.dtype, Dtype::Q8 | Dtype::Stored);
    let (decode, prefill) = (of(&|_, m| m.decode), of(&|_, m| m.prefill));
    let peak = of(&|c, m| flops / m.projections / if whole { c.i8 } else { c.f32 });
    println!(
        "| {} | {:.1} | {:.2} | {:.1} | {:.0} % | {:.1} | {:.0} | {:.0} | {:.0} % of {} | {} |",
        side.dtype,
        bytes / f64::from(1 << 20),
        decode * 1e3,
        1.0 / decode,
        100.0 * of(&|c, m| bytes / m.decode / c.bytes),
        prefill * 1e3,
        PROMPT as f64 / prefill,
        flops / of(&|_, m| m.projections) * 1e-9,
        100.0 * peak,
        if whole { "int8" } else { "f32" },
        torch.map_or("not measured".to_owned(), |torch| format!(
            "{:.2} x",
            PROMPT as f64 / prefill / torch
        )),
    );
}

/// Tokens per second of torch's f32 prefill, once, in a process of its own.
fn torch_prefill(args: &Args) -> Fallible<Option<f64>> {
    let (Some(python), Some(hf)) = (&args.python, &args.hf) else {
        return Ok(None);
    };
    let prompt = PROMPT.to_string();
    let output = Command::new(python)
        .arg(&args.peer)
        .arg("generate")
        .arg(hf)
        .args(["--rows", "1", "--prompt", &prompt, "--new", "1"])
        .args(["--threads", &ops::threads().to_string()])
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().last().ok_or("the peer printed nothing")?;
    let value: Value = serde_json::from_str(line)?;
    Ok(Some(
        value["prefill_tok_s"]
            .as_f64()
            .ok_or("the peer named no prefill_tok_s")?,
    ))
}
