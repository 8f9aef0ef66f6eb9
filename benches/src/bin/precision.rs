//! What each format of the base costs and gives, on a real model: speed beside the machine's ceilings, and quality beside f32.
//!
//! `precision --model M.gguf` prints decode at one row and prefill of 512 tokens for every `--dtype`, beside ceilings that are measured in the same
//! rounds; with `--python` also torch's f32 prefill, taking turns. `--quality` compares logits with f32 over a text. Sides alternate, medians count.

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Device, Module, Tensor};
use clap::Parser;
use espalier_adapters::batch::Segment;
use espalier_adapters::config::Site;
use espalier_adapters::ops::{self, Cpu, Ops, Weight, WeightKind};
use espalier_adapters::peft;
use espalier_adapters::text::Tokenizer;
use espalier_engine::model::{
    BaseSites, Batch, Dtype, KvCache, Model, ResidentAdapter, SeqSpan, Workspace, load_as,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// Tokens of the prompt whose prefill is measured.
const PROMPT: usize = 512;
/// Tokens before the first measured decode step.
const CONTEXT: usize = 64;
/// Decode steps of one round; the median counts.
const STEPS: usize = 15;
/// Tokens of one KV block.
const BLOCK: usize = 16;
/// Tokens of one piece of text in the quality table.
const PIECE: usize = 256;

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
    /// A Python with torch and transformers, to measure its f32 prefill.
    #[arg(long)]
    python: Option<PathBuf>,
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
        quality(&args)
    } else if args.rivals {
        rivals(args.rounds)
    } else {
        speed(&args)
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Seconds of one run.
fn seconds(run: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    run();
    begin.elapsed().as_secs_f64()
}

// === ceilings ===

/// What the machine can do at most, in one round.
#[derive(Clone, Copy)]
struct Ceilings {
    bytes: f64,
    f32: f64,
    i8: f64,
}

/// Does `work` on as many threads as operations use; returns the sum of what they return over the seconds of all.
fn rate(work: impl Fn(usize) -> f64 + Sync) -> f64 {
    let mut best = 0.0_f64;
    for _ in 0..3 {
        let begin = Instant::now();
        let done: f64 = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..ops::threads())
                .map(|t| {
                    let work = &work;
                    scope.spawn(move || work(t))
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or(f64::NAN))
                .sum()
        });
        best = best.max(done / begin.elapsed().as_secs_f64());
    }
    best
}

/// The sum of one part of memory, four streams at a time, so that the hardware's prefetchers are not the limit.
fn sum(part: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 16];
    for page in part.chunks_exact(1 << 16) {
        let (left, right) = page.split_at(page.len() / 2);
        let (a, b) = left.split_at(left.len() / 2);
        let (c, d) = right.split_at(right.len() / 2);
        let lines = a.chunks_exact(16).zip(b.chunks_exact(16));
        for ((a, b), (c, d)) in lines.zip(c.chunks_exact(16).zip(d.chunks_exact(16))) {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum += (a[i] + b[i]) + (c[i] + d[i]);
            }
        }
    }
    sums.iter().sum()
}

impl Ceilings {
    fn measure(cpu: Cpu, memory: &[f32]) -> Self {
        let share = memory.len() / ops::threads();
        Ceilings {
            bytes: rate(|t| {
                let part = &memory[t * share..(t + 1) * share];
                black_box(sum(part));
                size_of_val(part) as f64
            }),
            f32: rate(|_| cpu.burn_f32(1000) as f64),
            i8: rate(|_| cpu.burn_i8(1000) as f64),
        }
    }
}

// === one model ===

/// A model in one format, with what a run needs.
struct Side {
    dtype: Dtype,
    model: Model,
    kv: KvCache,
    workspace: Workspace,
    logits: Vec<f32>,
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
        let model = Model::new(loaded.config, loaded.weights)?;
        let blocks = PROMPT / BLOCK + 8;
        Ok(Side {
            dtype,
            kv: KvCache::new(model.config(), blocks, BLOCK),
            workspace: Workspace::new(),
            logits: vec![0.0; model.config().vocab],
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
    ) -> &[f32] {
        let spans = [SeqSpan {
            rows: 0..tokens.len(),
            start_pos: start,
            block_table: &self.table,
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
        self.model
            .forward(&batch, &mut self.kv, &mut self.workspace)
    }

    /// Runs rows and computes the logits of the last one; returns the likeliest token.
    fn step(&mut self, tokens: &[u32], start: usize) -> u32 {
        let hidden = self.model.config().hidden;
        let states = self.states(tokens, start, None);
        let last = states[states.len() - hidden..].to_vec();
        self.model.logits(&last, &mut self.logits);
        best(&self.logits) as u32
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
        let mut y = vec![0.0; PROMPT * wide];
        let ops = self.model.ops();
        seconds(|| {
            for layer in 0..config.layers {
                for site in Site::ALL {
                    let weight = self.model.weight(layer, site);
                    let (outputs, inputs) = ops.dims(weight);
                    ops.matmul(&x[..PROMPT * inputs], weight, &mut y[..PROMPT * outputs]);
                }
            }
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
    let cpu = Cpu::default();
    let memory = vec![1.0_f32; 256 << 20 >> 2];
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
            let ceiling = Ceilings::measure(cpu, &memory);
            ceilings.push(ceiling);
            rounds.push((ceiling, side.measure(&prompt)));
        }
        torch.extend(torch_prefill(args)?);
    }
    let all = |f: fn(&Ceilings) -> f64| median(&ceilings.iter().map(f).collect::<Vec<_>>());
    println!(
        "{} with {} threads; medians of {} measurements: {:.1} GB/s read, {:.0} GFLOP/s f32, {:.0} GOP/s int8",
        cpu.path(),
        ops::threads(),
        ceilings.len(),
        all(|c| c.bytes) * 1e-9,
        all(|c| c.f32) * 1e-9,
        all(|c| c.i8) * 1e-9
    );
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

// === rivals ===

/// Weights in turn, so that they come from memory as they do in a model and not from a cache.
const COLD_BYTES: usize = 128 << 20;

/// A product by weight number `turn`.
type Product<'a> = Box<dyn FnMut(usize) + 'a>;

/// Products of 1 and 512 rows with the model's largest projections, ours and candle's in turn.
fn rivals(rounds: usize) -> Fallible<()> {
    println!("| weight, rows | path | ms | GB/s | GOP/s |");
    println!("|---|---|---|---|---|");
    for (outputs, inputs) in [(1536, 576), (576, 1536)] {
        for rows in [1, PROMPT] {
            rivals_at(rounds, outputs, inputs, rows)?;
        }
    }
    Ok(())
}

fn rivals_at(rounds: usize, outputs: usize, inputs: usize, rows: usize) -> Fallible<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut random =
        |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
    let (weight, x) = (random(outputs * inputs), random(rows * inputs));
    let theirs_x = Tensor::from_slice(&x, (rows, inputs), &Device::Cpu)?;
    let theirs_weight = Tensor::from_slice(&weight, (outputs, inputs), &Device::Cpu)?;
    let ops = Cpu::default();
    let mut paths: Vec<(String, usize, Product<'_>)> = Vec::new();
    for kind in [
        WeightKind::F32,
        WeightKind::Bf16,
        WeightKind::F16,
        WeightKind::Q8_0,
    ] {
        let kept = Weight::F32(weight.clone()).rounded(kind, inputs);
        let one = ops.pack_weight(&kept, outputs, inputs);
        let bytes = ops.bytes(&one);
        let copies: Vec<_> = (0..(COLD_BYTES / bytes).max(1))
            .map(|_| one.clone())
            .collect();
        let (x, mut y) = (&x, vec![0.0; rows * outputs]);
        let run = move |turn: usize| ops.matmul(x, &copies[turn % copies.len()], &mut y);
        paths.push((format!("ours, {kind}"), bytes, Box::new(run)));
    }
    let bytes = 4 * outputs * inputs;
    let copies = (0..(COLD_BYTES / bytes).max(1))
        .map(|_| theirs_weight.copy())
        .collect::<Result<Vec<_>, _>>()?;
    let input = &theirs_x;
    let run = move |turn: usize| {
        let product = copies[turn % copies.len()]
            .t()
            .and_then(|weight| input.matmul(&weight));
        black_box(product.is_ok());
    };
    paths.push(("candle, f32".to_owned(), bytes, Box::new(run)));
    for kind in [GgmlDType::Q8_0, GgmlDType::Q4_1] {
        let one = QTensor::quantize(&theirs_weight, kind)?;
        let bytes = one.storage_size_in_bytes();
        let copies = (0..(COLD_BYTES / bytes).max(1))
            .map(|_| QMatMul::from_qtensor(QTensor::quantize(&theirs_weight, kind)?))
            .collect::<Result<Vec<_>, _>>()?;
        let run = move |turn: usize| {
            black_box(copies[turn % copies.len()].forward(input).is_ok());
        };
        paths.push((format!("candle, {kind:?}"), bytes, Box::new(run)));
    }
    let mut times: Vec<Vec<f64>> = paths.iter().map(|_| Vec::new()).collect();
    let repeats = if rows == 1 { 200 } else { 8 };
    for round in 0..rounds {
        for ((_, _, run), times) in paths.iter_mut().zip(&mut times) {
            let all = seconds(|| (0..repeats).for_each(|i| run(round * repeats + i)));
            times.push(all / repeats as f64);
        }
    }
    for ((name, bytes, _), times) in paths.iter().zip(&times) {
        let time = median(times);
        println!(
            "| [{outputs}, {inputs}] x {rows} | {name} | {:.3} | {:.1} | {:.0} |",
            time * 1e3,
            *bytes as f64 / time * 1e-9,
            2.0 * (rows * inputs * outputs) as f64 / time * 1e-9
        );
    }
    Ok(())
}

// === quality ===

/// Sums over positions of one format beside f32.
#[derive(Clone, Default)]
struct Quality {
    positions: usize,
    divergence: f64,
    agreed: usize,
    loss: f64,
}

fn quality(args: &Args) -> Fallible<()> {
    let tokenizer = load_as(&args.model, Dtype::Stored)?.tokenizer;
    let pieces = pieces(&tokenizer, args)?;
    println!(
        "{} pieces of {PIECE} tokens of {}",
        pieces.len(),
        args.text.display()
    );
    println!(
        "| dtype | adapter | matrices, MiB | KL to f32, nats | same top token | loss | loss beside f32 |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut exact = Side::load(&args.model, Dtype::F32)?;
    for dtype in &args.dtypes {
        let mut side = Side::load(&args.model, *dtype)?;
        let bytes = side.model.bytes() as f64 / f64::from(1 << 20);
        for adapter in std::iter::once(None).chain(args.adapter.iter().map(Some)) {
            let (resident, of_exact) = match adapter {
                None => (None, None),
                Some(dir) => (
                    Some(resident(dir, &side.model)?),
                    Some(resident(dir, &exact.model)?),
                ),
            };
            let (mut own, mut base) = (Quality::default(), Quality::default());
            for ids in &pieces {
                let wanted = exact.states(ids, 0, of_exact.as_ref()).to_vec();
                let found = side.states(ids, 0, resident.as_ref()).to_vec();
                compare(&exact, &side, ids, (&wanted, &found), (&mut base, &mut own));
            }
            let n = own.positions as f64;
            println!(
                "| {dtype} | {} | {bytes:.1} | {:.5} | {:.2} % | {:.4} | {:+.4} |",
                adapter
                    .and_then(|dir| dir.file_name())
                    .map_or("none".into(), |name| name.to_string_lossy()),
                own.divergence / n,
                100.0 * own.agreed as f64 / n,
                own.loss / n,
                (own.loss - base.loss) / n,
            );
        }
    }
    Ok(())
}

fn resident(dir: &Path, model: &Model) -> Fallible<Arc<ResidentAdapter>> {
    let limits = peft::Limits::default();
    let artifact = peft::from_dir(dir, &limits)?;
    let (_, weights, _) = peft::read(&artifact, &model.config().base_shape(), &limits)
        .map_err(|report| format!("{}: {report:?}", dir.display()))?;
    Ok(Arc::new(ResidentAdapter::build(&weights, model)?))
}

/// Adds one piece's positions: `f32` beside the format, position by position.
fn compare(
    exact: &Side,
    side: &Side,
    ids: &[u32],
    (wanted, found): (&[f32], &[f32]),
    (base, own): (&mut Quality, &mut Quality),
) {
    const ROWS: usize = 32;
    let config = exact.model.config();
    let (mut p, mut q) = (Vec::new(), Vec::new());
    let rows = ids.len() - 1;
    for first in (0..rows).step_by(ROWS) {
        let count = ROWS.min(rows - first);
        let part = first * config.hidden..(first + count) * config.hidden;
        p.resize(count * config.vocab, 0.0);
        q.resize(count * config.vocab, 0.0);
        exact.model.logits(&wanted[part.clone()], &mut p);
        side.model.logits(&found[part], &mut q);
        let both = p
            .chunks_exact(config.vocab)
            .zip(q.chunks_exact(config.vocab));
        for (i, (p, q)) in both.enumerate() {
            let label = ids[first + i + 1] as usize;
            let (p_total, q_total) = (log_total(p), log_total(q));
            for (p, q) in p.iter().zip(q) {
                let (p, q) = (f64::from(*p) - p_total, f64::from(*q) - q_total);
                own.divergence += p.exp() * (p - q);
            }
            own.positions += 1;
            own.agreed += usize::from(best(p) == best(q));
            own.loss += q_total - f64::from(q[label]);
            base.loss += p_total - f64::from(p[label]);
        }
    }
}

/// The logarithm of the sum of exponentials.
fn log_total(logits: &[f32]) -> f64 {
    let highest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let total: f64 = logits.iter().map(|x| (f64::from(*x) - highest).exp()).sum();
    highest + total.ln()
}

/// Instructions with their outputs, one after the other, cut in pieces.
fn pieces(tokenizer: &Tokenizer, args: &Args) -> Fallible<Vec<Vec<u32>>> {
    let text = std::fs::read_to_string(&args.text)
        .map_err(|error| format!("{}: {error}", args.text.display()))?;
    let mut all = String::new();
    for line in text.lines() {
        let row: Value = serde_json::from_str(line)?;
        let fields = [
            &row["instruction"],
            &row["instances"][0]["input"],
            &row["instances"][0]["output"],
        ];
        for field in fields.into_iter().filter_map(Value::as_str) {
            all.push_str(field);
            all.push('\n');
        }
        all.push('\n');
    }
    let ids = tokenizer.encode(&all)?;
    Ok(ids
        .chunks_exact(PIECE)
        .take(args.pieces)
        .map(<[u32]>::to_vec)
        .collect())
}
