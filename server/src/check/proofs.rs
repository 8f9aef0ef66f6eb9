//! The GPU proved: every operation against the reference, and a small model's greedy tokens against the processor's, alone and
//! with adapters, in steps that are recorded and replayed.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_adapters::ops::cuda::driver::{Driver, Element};
use espalier_adapters::ops::cuda::{Cuda, FATBIN, Gpu, proof};
use espalier_adapters::ops::{Backend, Ops};
use espalier_engine::device::{self, DeviceChoice};
use espalier_engine::model::{BaseSites, Dtype, Model, ResidentAdapter, load_as};
use serde_json::{Value, json};

use super::base::{adapter, tokens};
use super::report::{Found, Report};
use super::sequences::{Run, Sequences};
use crate::config::Config;

const MODEL: &str = "tiny:7";

/// Tokens of the prompt, and decode steps after it.
const PROMPT: usize = 37;
const STEPS: usize = 48;

/// Logits of the processor that are nearer than this may change places.
const MARGIN: f32 = 1e-3;

/// As large as makes a difference to every token.
const ADAPTER_BOUND: f32 = 0.1;

/// What runs together: the base, or an adapter by number.
const CASES: [(&str, &[Option<usize>]); 4] = [
    ("base", &[None]),
    ("first adapter", &[Some(0)]),
    ("second adapter", &[Some(1)]),
    ("together", &[None, Some(0), Some(1), Some(0)]),
];

pub(super) fn run(config: &Config, budget: Duration) -> Result<ExitCode, Box<dyn Error>> {
    let choice = config.server.device;
    let number = match choice {
        DeviceChoice::Cpu => {
            let report = Report::start("tests", choice.to_string(), budget);
            report.not_run("the proofs are of a GPU, and --device is cpu");
            return Ok(report.finish());
        }
        DeviceChoice::Auto => 0,
        DeviceChoice::Cuda(number) => number,
    };
    match Gpu::open(number, FATBIN) {
        Ok(gpu) => prove(Arc::new(gpu), budget),
        Err(error) if choice == DeviceChoice::Auto => {
            let report = Report::start("tests", "no device".to_owned(), budget);
            report.not_run(&error.to_string());
            Ok(report.finish())
        }
        Err(error) => Err(format!("device {choice}: {error}").into()),
    }
}

fn prove(driver: Arc<dyn Driver>, budget: Duration) -> Result<ExitCode, Box<dyn Error>> {
    let cuda = Cuda::new(Arc::clone(&driver), Element::F32, true)?;
    let device = device::about(&Backend::Cuda(cuda));
    let report = Report::start("tests", device, budget);
    operations(&driver, &report);
    model(&driver, &report);
    Ok(report.finish())
}

/// Both ways that products may go: by our kernels alone, which keep the row rule, and by the vendor's library.
fn operations(driver: &Arc<dyn Driver>, report: &Report) {
    for deterministic in [true, false] {
        for (name, prove) in proof::PROOFS {
            if !deterministic && *name == "row rule" {
                continue;
            }
            let about = json!({"proof": name, "deterministic": deterministic});
            report.row(about, || {
                let began = Instant::now();
                prove(&|element| open(driver, element, deterministic));
                Ok(json!({"ok": true, "s": began.elapsed().as_secs_f64()}))
            });
        }
    }
}

fn open(driver: &Arc<dyn Driver>, element: Element, deterministic: bool) -> Cuda {
    let opened = Cuda::new(Arc::clone(driver), element, deterministic);
    opened.unwrap_or_else(|error| panic!("{error}"))
}

// === the model ===

/// A model with its two adapters.
struct Side {
    model: Model,
    adapters: Vec<Arc<ResidentAdapter>>,
}

impl Side {
    fn new(ops: Backend) -> Result<Self, Box<dyn Error>> {
        let loaded = load_as(MODEL, Dtype::F32)?;
        let model = Model::new(ops, loaded.config, loaded.weights)?;
        let [first, second] = [1, 2].map(|seed| adapter(&model, seed, ADAPTER_BOUND));
        // One of 16 bits and one of 32.
        let build = |weights| ResidentAdapter::build(&weights, &model).map(Arc::new);
        let adapters = vec![build(first)?, build(second.widened())?];
        Ok(Side { model, adapters })
    }

    fn pass(
        &self,
        sequences: &mut Sequences<'_>,
        case: &[Option<usize>],
        start: usize,
        tokens: &[Vec<u32>],
    ) -> Vec<f32> {
        let runs: Vec<Run<'_>> = case
            .iter()
            .zip(tokens)
            .enumerate()
            .map(|(sequence, (adapter, tokens))| Run {
                sequence,
                tokens,
                start,
                adapter: adapter.map(|number| Arc::clone(&self.adapters[number])),
            })
            .collect();
        sequences.pass(&runs);
        sequences.read_logits()
    }
}

fn model(driver: &Arc<dyn Driver>, report: &Report) {
    for deterministic in [true, false] {
        for (name, case) in CASES {
            let about = json!({"model": MODEL, "runs": name, "deterministic": deterministic});
            report.row(about, || {
                let host = Side::new(Backend::default())?;
                let ops = open(driver, Element::F32, deterministic);
                let device = Side::new(Backend::Cuda(ops))?;
                compare(&host, &device, case, (PROMPT, STEPS))
            });
        }
    }
}

/// Both sides read the processor's tokens, so that one difference does not make the next.
fn compare(
    host: &Side,
    device: &Side,
    case: &[Option<usize>],
    (prompt, steps): (usize, usize),
) -> Found {
    let vocab = host.model.config().vocab;
    let room = prompt + steps;
    let mut host_sequences = Sequences::new(&host.model, case.len(), room);
    let mut device_sequences = Sequences::new(&device.model, case.len(), room);
    let prompt = |row: usize| tokens(vocab, row as u64, prompt);
    let mut next: Vec<Vec<u32>> = (0..case.len()).map(prompt).collect();
    let mut tally = Tally::default();
    let mut start = 0;
    for _ in 0..steps {
        let expected = host.pass(&mut host_sequences, case, start, &next);
        let found = device.pass(&mut device_sequences, case, start, &next);
        start += next[0].len();
        next.clear();
        for (expected, found) in expected.chunks(vocab).zip(found.chunks(vocab)) {
            next.push(vec![tally.row(expected, found)]);
        }
    }
    device.model.ops().wait();
    tally.found()
}

/// How two sides agree.
#[derive(Default)]
struct Tally {
    tokens: usize,
    near: usize,
    wrong: usize,
    difference: f32,
}

impl Tally {
    /// Counts a row, and says the expected token.
    fn row(&mut self, expected: &[f32], found: &[f32]) -> u32 {
        let (best, margin) = likeliest(expected);
        self.tokens += 1;
        if margin <= MARGIN {
            self.near += 1;
        } else if likeliest(found).0 != best {
            self.wrong += 1;
        }
        for (expected, found) in expected.iter().zip(found) {
            let difference = (expected - found).abs();
            // A number that is none is no maximum.
            if difference > self.difference || difference.is_nan() {
                self.difference = difference;
            }
        }
        best
    }

    fn found(&self) -> Found {
        let Tally {
            tokens,
            near,
            wrong,
            difference,
        } = *self;
        if wrong > 0 || difference.is_nan() {
            return Err(
                format!("{wrong} of {tokens} tokens differ, logits by {difference}").into(),
            );
        }
        let difference = f64::from(difference);
        let found: Value =
            json!({"ok": true, "tokens": tokens, "too near": near, "difference": difference});
        Ok(found)
    }
}

/// The likeliest token, and how far the next one is below it.
fn likeliest(logits: &[f32]) -> (u32, f32) {
    let (mut best, mut second) = ((0, f32::NEG_INFINITY), f32::NEG_INFINITY);
    for (token, logit) in logits.iter().enumerate() {
        if *logit > best.1 {
            second = best.1;
            best = (token as u32, *logit);
        } else {
            second = second.max(*logit);
        }
    }
    (best.0, best.1 - second)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use std::path::Path;

    use espalier_adapters::ops::cuda::{Emulated, build};

    use super::*;

    /// The check of the model in the emulator: that a GPU is there is no part of it.
    #[test]
    fn a_model_on_a_device_says_what_the_processors_does() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let library = build(&root.join("adapters/kernels"), &root.join("target/kernels")).unwrap();
        let driver: Arc<dyn Driver> = Arc::new(Emulated::open(&library, 64 << 20).unwrap());
        let host = Side::new(Backend::default()).unwrap();
        let device = Side::new(Backend::Cuda(open(&driver, Element::F32, true))).unwrap();
        // A step, one that is recorded, one that is replayed: the emulator takes seconds for each.
        let (case, lengths) = ([None, Some(0), Some(1)], (1, 3));
        let found = compare(&host, &device, &case, lengths).unwrap();
        assert_eq!(found["tokens"], 9);
        // An adapter in another's place would be noticed.
        let swapped = [None, Some(1), Some(0)];
        let vocab = host.model.config().vocab;
        let mut one = Sequences::new(&host.model, 3, 1);
        let mut other = Sequences::new(&host.model, 3, 1);
        let prompts = vec![vec![17]; 3];
        let expected = host.pass(&mut one, &case, 0, &prompts);
        let found = host.pass(&mut other, &swapped, 0, &prompts);
        let mut tally = Tally::default();
        tally.row(&expected[vocab..2 * vocab], &found[vocab..2 * vocab]);
        assert!(tally.difference > 0.1, "{}", tally.difference);
    }
}
