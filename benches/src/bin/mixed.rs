//! What adapters cost a decode step: rows that each have an adapter of their own beside the same rows on the base alone, and the base alone with a thousand
//! adapters registered beside none. All in this process, in turns; the bound is what the bytes require.
//!
//! A step is the model's pass over one token of every row and the logits of all of them.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use espalier_adapters::batch::Segment;
use espalier_adapters::config::{LoraConfig, Site};
use espalier_adapters::ops::{Backend, Ops};
use espalier_adapters::peft;
use espalier_adapters::version::{AdapterArtifact, VersionDigest};
use espalier_adapters::weights::{AdapterWeights, Numbers, SiteAdapter};
use espalier_benches::Fallible;
use espalier_benches::ceilings::Probe;
use espalier_benches::turns::median;
use espalier_engine::adapter_loader::{AdapterSource, SourceError};
use espalier_engine::config::EngineConfig;
use espalier_engine::handle::EngineHandle;
use espalier_engine::model::{
    BaseSites, Batch, Buf, Dtype, KvCache, Model, ModelConfig, ResidentAdapter, SeqSpan, Workspace,
    load_as,
};
use espalier_engine::request::{Event, Generate, Priority, Request, RequestKind, StopConditions};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Tokens in every row's cache before the step.
const CONTEXT: usize = 128;
/// The adapters' rank, on every linear layer.
const RANK: usize = 16;
const BLOCK_SIZE: usize = 16;
/// What a step may cost beyond its bytes.
const MARGIN: f64 = 1.10;

#[derive(Parser)]
#[command(about = "What adapters cost a decode step, beside the bytes that it must read")]
struct Args {
    /// The model: a GGUF or a Hugging Face directory.
    #[arg(long)]
    model: String,
    /// How often the sides take turns; medians count.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Steps in one turn.
    #[arg(long, default_value_t = 8)]
    steps: usize,
    /// Rows, each with an adapter of its own.
    #[arg(long, value_delimiter = ',', default_value = "8,32")]
    rows: Vec<usize>,
    /// Formats of the base's weights.
    #[arg(long, value_delimiter = ',', default_value = "f32,q8,stored")]
    dtype: Vec<Dtype>,
    /// Adapters registered for the last table; 0 leaves it out.
    #[arg(long, default_value_t = 1000)]
    registered: usize,
}

fn main() -> Fallible<()> {
    let args = Args::parse();
    let ceilings = Probe::new().measure();
    println!("{ceilings}");
    for dtype in &args.dtype {
        steps(&args, *dtype, ceilings.bytes)?;
    }
    if args.registered > 0 {
        registered(&args)?;
    }
    Ok(())
}

// === steps ===

fn steps(args: &Args, dtype: Dtype, bandwidth: f64) -> Fallible<()> {
    let loaded = load_as(&args.model, dtype)?;
    let model = Model::new(Backend::default(), loaded.config, loaded.weights)?;
    let most = args.rows.iter().copied().max().unwrap_or(0);
    let weights: Vec<_> = (0..most as u64)
        .map(|seed| adapter(model.config(), seed))
        .collect();
    let parameters = weights.first().map_or(0, AdapterWeights::parameters);
    let narrow = resident(&model, &weights)?;
    let wide: Vec<_> = weights.into_iter().map(AdapterWeights::widened).collect();
    let full = resident(&model, &wide)?;
    drop(wide);

    let base = model.bytes() as f64;
    println!(
        "\nbase in {dtype}: {:.1} MB; an adapter: rank {RANK} on all linear layers, {:.2} M parameters; {CONTEXT} tokens of context; {} rounds of {} steps",
        base * 1e-6,
        parameters as f64 * 1e-6,
        args.rounds,
        args.steps
    );
    println!(
        "| rows x adapters | in | base alone, ms | with adapters, ms | ratio | allowed | | the adapters' bytes | the base's |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for &rows in &args.rows {
        let mut step = Step::new(&model, rows);
        let sides = [None, Some(&narrow[..rows]), Some(&full[..rows])];
        let mut times: [Vec<f64>; 3] = Default::default();
        for round in 0..=args.rounds {
            for (times, adapters) in times.iter_mut().zip(sides) {
                let seconds = step.turn(args.steps, adapters);
                // The first round warms up.
                if round > 0 {
                    times.push(seconds);
                }
            }
        }
        let [alone, narrow, full] = &times;
        for (name, bytes, times) in [("bf16", 2.0, narrow), ("f32", 4.0, full)] {
            let numbers = (rows * parameters) as f64;
            let allowed = MARGIN * (base + 2.0 * numbers) / base;
            let ratios: Vec<f64> = times
                .iter()
                .zip(alone)
                .map(|(with, alone)| with / alone)
                .collect();
            let (ratio, alone, with) = (median(&ratios), median(alone), median(times));
            // Of the same rounds as the ratio: the machine's pace changes from one to the next.
            let extra = (ratio - 1.0) * alone;
            let rate = bytes * numbers / extra;
            println!(
                "| {rows} x {rows} | {name} | {:.2} | {:.2} | {ratio:.3} | {allowed:.3} | {} | {:.0} MB in {:.2} ms, {:.1} GB/s, {:.0} % of the bandwidth | {:.1} GB/s |",
                alone * 1e3,
                with * 1e3,
                if ratio <= allowed { "pass" } else { "miss" },
                bytes * numbers * 1e-6,
                extra * 1e3,
                rate * 1e-9,
                100.0 * rate / bandwidth,
                base / alone * 1e-9,
            );
        }
    }
    Ok(())
}

/// A decode step of so many rows, each after `CONTEXT` tokens of its own.
struct Step<'a> {
    model: &'a Model,
    kv: KvCache,
    tables: Vec<Vec<u32>>,
    tokens: Vec<u32>,
    workspace: Workspace,
    logits: Buf,
}

impl<'a> Step<'a> {
    fn new(model: &'a Model, rows: usize) -> Self {
        let (ops, config) = (model.ops(), model.config());
        let mut logits = ops.exact();
        ops.resize(&mut logits, rows * config.vocab);
        let mut random = ChaCha8Rng::seed_from_u64(7);
        let blocks = (CONTEXT + 1).div_ceil(BLOCK_SIZE);
        let tables = (0..rows)
            .map(|row| {
                (0..blocks)
                    .map(|block| (block * rows + row) as u32)
                    .collect()
            })
            .collect();
        let mut step = Step {
            model,
            kv: KvCache::new(ops, config, rows * blocks, BLOCK_SIZE),
            tables,
            tokens: (0..rows)
                .map(|_| random.random_range(100..40_000))
                .collect(),
            workspace: Workspace::new(ops),
            logits,
        };
        for row in 0..rows {
            let prompt: Vec<u32> = (0..CONTEXT)
                .map(|_| random.random_range(100..40_000))
                .collect();
            let spans = [SeqSpan {
                rows: 0..CONTEXT,
                start_pos: 0,
                block_table: &step.tables[row],
            }];
            let batch = Batch {
                tokens: &prompt,
                spans: &spans,
                segments: &[],
                overlays: &[],
            };
            model.forward(&batch, &mut step.kv, &mut step.workspace);
        }
        step
    }

    /// Seconds of one step, the mean of `steps`.
    fn turn(&mut self, steps: usize, adapters: Option<&[Arc<ResidentAdapter>]>) -> f64 {
        let spans: Vec<_> = (0..self.tokens.len())
            .map(|row| SeqSpan {
                rows: row..row + 1,
                start_pos: CONTEXT,
                block_table: &self.tables[row],
            })
            .collect();
        let began = Instant::now();
        for _ in 0..steps {
            let runs = (0..self.tokens.len()).map(|row| (1, adapters.map(|all| all[row].clone())));
            let segments = Segment::join(runs);
            let batch = Batch {
                tokens: &self.tokens,
                spans: &spans,
                segments: &segments,
                overlays: &[],
            };
            let (model, kv, workspace) = (self.model, &mut self.kv, &mut self.workspace);
            let hidden = model.forward(&batch, kv, workspace);
            model.logits(hidden, &segments, &mut self.logits);
            model.ops().wait();
            black_box(&self.logits);
        }
        began.elapsed().as_secs_f64() / steps as f64
    }
}

/// Random numbers of a trained adapter's size, stored in bf16.
fn adapter(config: &ModelConfig, seed: u64) -> AdapterWeights {
    let base = config.base_shape();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut numbers = |len: usize| -> Numbers {
        let numbers = (0..len).map(|_| bf16::from_f32(random.random_range(-0.02..0.02)));
        Numbers::Bf16(numbers.collect())
    };
    let sites = (0..base.layers).flat_map(|layer| Site::ALL.map(|site| (layer, site)));
    let sites = sites.map(|(layer, site)| {
        let (inputs, outputs) = base.dims(site);
        let adapter = SiteAdapter {
            r: RANK,
            scale: 2.0,
            a: numbers(RANK * inputs),
            b: numbers(outputs * RANK),
            magnitude: None,
        };
        ((layer, site), adapter)
    });
    AdapterWeights {
        sites: sites.collect(),
        ..AdapterWeights::default()
    }
}

fn resident(model: &Model, weights: &[AdapterWeights]) -> Fallible<Vec<Arc<ResidentAdapter>>> {
    let build = |weights| Ok(Arc::new(ResidentAdapter::build(weights, model)?));
    weights.iter().map(build).collect()
}

// === a thousand registered ===

/// One artifact under as many names as wanted.
struct Registry(HashMap<VersionDigest, AdapterArtifact>);

impl AdapterSource for Registry {
    fn fetch(&self, digest: &VersionDigest, _: Vec<u8>) -> Result<AdapterArtifact, SourceError> {
        self.0.get(digest).cloned().ok_or(SourceError::NotFound)
    }
}

/// Rows of the base alone.
const BASE_ROWS: usize = 8;
/// Their tokens.
const BASE_TOKENS: usize = 48;
/// Adapters that are in memory beside them.
const IN_MEMORY: usize = 32;

#[tokio::main(flavor = "current_thread")]
async fn registered(args: &Args) -> Fallible<()> {
    let load = || load_as(&args.model, Dtype::F32);
    let config = || EngineConfig {
        // Nobody takes the second row's events before the first row's are all there.
        event_buffer: 4 * BASE_TOKENS,
        ..EngineConfig::default()
    };
    let nothing = Arc::new(Registry(HashMap::new()));
    let bare = EngineHandle::start(config(), Backend::default(), load()?, nothing)?;
    let loaded = load()?;
    let lora = LoraConfig::new(4, 8.0, &[Site::Q, Site::V]);
    let registry = (0..args.registered as u64)
        .map(|seed| {
            let artifact = small(&loaded.config, &lora, seed)?;
            Ok((artifact.digest(), artifact))
        })
        .collect::<Fallible<HashMap<_, _>>>()?;
    let digests: Vec<_> = registry.keys().copied().take(IN_MEMORY).collect();
    let full = EngineHandle::start(
        config(),
        Backend::default(),
        loaded,
        Arc::new(Registry(registry)),
    )?;
    for digest in &digests {
        full.activate(*digest).await?;
    }
    let mut times: [Vec<f64>; 2] = Default::default();
    let mut answers = Vec::new();
    for round in 0..=args.rounds {
        for (times, engine) in times.iter_mut().zip([&bare, &full]) {
            let (seconds, answer) = base_only(engine, round as u64).await?;
            if round > 0 {
                times.push(seconds);
            }
            answers.push(answer);
        }
    }
    let same = answers.chunks_exact(2).all(|pair| pair[0] == pair[1]);
    let ratios: Vec<f64> = times[1]
        .iter()
        .zip(&times[0])
        .map(|(full, bare)| full / bare)
        .collect();
    println!(
        "\nbase only, {BASE_ROWS} rows, {BASE_TOKENS} tokens each: nothing registered {:.1} ms, {} adapters registered and {} in memory {:.1} ms, ratio {:.3}; tokens and the bits of their {TOP} best log-probabilities {}",
        median(&times[0]) * 1e3,
        args.registered,
        digests.len(),
        median(&times[1]) * 1e3,
        median(&ratios),
        if same { "equal" } else { "DIFFER" }
    );
    Ok(())
}

/// Alternatives whose log-probabilities are compared.
const TOP: usize = 5;

/// An artifact of rank 4 on q and v, no two alike.
fn small(config: &ModelConfig, lora: &LoraConfig, seed: u64) -> Fallible<AdapterArtifact> {
    let base = config.base_shape();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut numbers = |len: usize| -> Numbers {
        (0..len)
            .map(|_| random.random_range(-0.02f32..0.02))
            .collect()
    };
    let plans = lora
        .plan(base.layers)
        .map_err(|errors| format!("{errors:?}"))?;
    let sites = plans.into_iter().map(|((layer, site), plan)| {
        let (inputs, outputs) = base.dims(site);
        let adapter = SiteAdapter {
            r: plan.r,
            scale: plan.scale,
            a: numbers(plan.r * inputs),
            b: numbers(outputs * plan.r),
            magnitude: None,
        };
        ((layer, site), adapter)
    });
    let weights = AdapterWeights {
        sites: sites.collect(),
        ..AdapterWeights::default()
    };
    Ok(peft::write(lora, &weights)?)
}

/// Everything that a row said: tokens, and the bits of the best log-probabilities at each.
type Answer = Vec<(u32, Vec<(u32, u32)>)>;

/// Seconds until all rows have their tokens, and what they said.
async fn base_only(engine: &EngineHandle, seed: u64) -> Fallible<(f64, Vec<Answer>)> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let began = Instant::now();
    let mut streams = Vec::new();
    for row in 0..BASE_ROWS {
        streams.push(engine.submit(Request {
            id: format!("row-{row}"),
            tenant: Arc::from("bench"),
            target: Vec::new(),
            require_resident: false,
            priority: Priority::Interactive,
            kind: RequestKind::Generate(Generate {
                prompt: (0..16).map(|_| random.random_range(100..40_000)).collect(),
                stop: StopConditions {
                    max_tokens: Some(BASE_TOKENS),
                    ignore_eos: true,
                    ..StopConditions::default()
                },
                logprobs: Some(TOP),
                ..Generate::default()
            }),
            deadline: None,
            received: began,
        })?);
    }
    let mut answers = vec![Answer::new(); BASE_ROWS];
    for (answer, mut stream) in answers.iter_mut().zip(streams) {
        loop {
            match stream.recv().await.ok_or("the engine stopped")? {
                Event::Delta(delta) => answer.extend(delta.logprobs.into_iter().map(|token| {
                    let top = token
                        .top
                        .iter()
                        .map(|(id, logprob)| (*id, logprob.to_bits()));
                    (token.token, top.collect())
                })),
                Event::Done { .. } => break,
                Event::Failed(error) => return Err(error.into()),
                _ => {}
            }
        }
    }
    Ok((began.elapsed().as_secs_f64(), answers))
}
