//! Training, measured: optimizer steps over random tokens, the memory that they take, and the way of what was learnt into a
//! decode step.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_adapters::config::{LoraConfig, Site};
use espalier_adapters::ops::Ops;
use espalier_adapters::pace::Unpaced;
use espalier_adapters::train::examples::{Example, Examples};
use espalier_engine::model::{BaseSites, ResidentAdapter};
use espalier_engine::train::TrainPlan;
use espalier_engine::train::trainer::{HyperParameters, Method, Trainer};
use serde_json::json;

use super::base::{Base, RANK, tokens};
use super::ceilings::Ceilings;
use super::report::{Found, Report};
use super::sequences::{Run, Sequences};
use super::serve::median;
use crate::config::Config;

/// A run with what was seen of it.
pub(super) struct Training<'a> {
    base: &'a Base,
    trainer: Trainer,
    batch: Vec<Example>,
    free_before: Option<usize>,
    least_free: Option<usize>,
}

pub(super) fn run(config: &Config, budget: Duration) -> Result<ExitCode, Box<dyn Error>> {
    let began = Instant::now();
    let base = Base::open(config)?;
    let report = Report::start(
        "train",
        base.about(),
        budget.saturating_sub(began.elapsed()),
    );
    let ceilings = Ceilings::measure(&base, &report);
    let mut training = Training::new(&base, config)?;
    let (examples, each) = (base.scale.examples, base.scale.example_tokens);
    let about = |step: &str| json!({"step": step, "rank": RANK, "examples": examples, "tokens of each": each});
    report.row(about("first"), || training.first());
    report.row(about("others"), || training.others(ceilings));
    report.row(json!({"step": "memory"}), || {
        Ok(json!({"GB above the base": training.peak_gb()}))
    });
    report.row(json!({"step": "trained to served"}), || training.serve());
    Ok(report.finish())
}

impl<'a> Training<'a> {
    pub(super) fn new(base: &'a Base, config: &Config) -> Result<Self, Box<dyn Error>> {
        let (vocab, scale) = (base.model.config().vocab, base.scale);
        let example = |number: usize| Example::Lm {
            ids: tokens(vocab, 10 + number as u64, scale.example_tokens),
            learn: (0..scale.example_tokens).map(|at| at > 0).collect(),
        };
        let batch: Vec<Example> = (0..scale.examples).map(example).collect();
        let plan = TrainPlan {
            method: Method::Lm,
            adapter: Some(LoraConfig::new(RANK, 2.0 * RANK as f64, &Site::ALL).into()),
            hp: HyperParameters {
                batch_size: scale.examples,
                epochs: Some(1000),
                activation_bytes: base.activation_bytes(config),
                ..HyperParameters::default()
            },
            seed: 1,
            train: Examples {
                items: batch.clone(),
                lines: (0..scale.examples as u64).collect(),
                labels: None,
            },
            valid: None,
            init: None,
        };
        let free_before = base.free_bytes();
        Ok(Training {
            base,
            trainer: Trainer::new(Arc::clone(&base.model), plan)?,
            batch,
            free_before,
            least_free: free_before,
        })
    }

    /// Seconds of one step, and its loss.
    fn step(&mut self) -> Result<(f64, f64), Box<dyn Error>> {
        let began = Instant::now();
        let report = self.trainer.step_on(&self.batch, &Unpaced)?;
        self.base.model.ops().wait();
        let seconds = began.elapsed().as_secs_f64();
        // Buffers stay for the next step, so nothing that was taken is missed here.
        self.least_free = self.least_free.min(self.base.free_bytes());
        Ok((seconds, report.loss))
    }

    /// The first one, whose buffers grow.
    pub(super) fn first(&mut self) -> Found {
        let (seconds, loss) = self.step()?;
        Ok(json!({"ms": seconds * 1e3, "loss": loss}))
    }

    /// Tokens a second of the steps after it. Forward and back are 4 operations for each parameter and token: the base's own
    /// gradients are not needed.
    pub(super) fn others(&mut self, ceilings: Ceilings) -> Found {
        let mut seconds = Vec::new();
        let mut loss = f64::NAN;
        for _ in 0..self.base.scale.train_steps {
            let (took, found) = self.step()?;
            seconds.push(took);
            loss = found;
        }
        let seconds = median(seconds);
        let tokens: usize = self.batch.iter().map(|example| example.ids().len()).sum();
        let rate = 4.0 * self.base.multiplied() as f64 * tokens as f64 / seconds;
        Ok(json!({
            "ms": seconds * 1e3,
            "loss": loss,
            "tokens/s": tokens as f64 / seconds,
            "TFLOP/s": rate * 1e-12,
            "share of products": rate / ceilings.products,
        }))
    }

    /// What the run takes of the device beside the base.
    pub(super) fn peak_gb(&self) -> Option<f64> {
        let taken = self.free_before?.saturating_sub(self.least_free?);
        Some(taken as f64 * 1e-9)
    }

    /// From the last optimizer step to a decode step that has used what it learnt.
    fn serve(&mut self) -> Found {
        let model = &self.base.model;
        let tokens = tokens(model.config().vocab, 9, 2);
        let mut sequences = Sequences::new(model, 1, tokens.len());
        let run = |adapter: Option<Arc<ResidentAdapter>>, at: usize| Run {
            sequence: 0,
            tokens: &tokens[at..=at],
            start: at,
            adapter,
        };
        sequences.pass(&[run(None, 0)]);
        sequences.draw();
        let began = Instant::now();
        let weights = self.trainer.weights();
        let read = began.elapsed();
        let adapter = Arc::new(ResidentAdapter::build(&weights, model.as_ref())?);
        let built = began.elapsed();
        sequences.pass(&[run(Some(adapter), 1)]);
        sequences.draw();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        Ok(json!({"read ms": ms(read), "built ms": ms(built), "ms": ms(began.elapsed())}))
    }
}
