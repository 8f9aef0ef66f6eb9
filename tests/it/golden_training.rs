//! Twenty steps of training by transformers and PEFT, against the trainer: every loss, every gradient norm, and the adapter
//! that comes out.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use espalier_adapters::head::{Activation, Pooling, Problem};
use espalier_adapters::ops::Backend;
use espalier_adapters::pace::Unpaced;
use espalier_adapters::train::dataset::Score;
use espalier_adapters::train::examples::{Example, Examples};
use espalier_adapters::weights::AdapterWeights;
use espalier_engine::model::{Model, load};
use espalier_engine::train::trainer::{
    Decay, HeadOptions, HyperParameters, Method, TrainPlan, Trainer,
};
use serde::Deserialize;

use crate::golden_inference::{Goldens, adapter, given, json, small};

#[derive(Deserialize)]
struct Curve {
    lr: f64,
    weight_decay: f64,
    betas: [f64; 2],
    eps: f64,
    clip: f64,
    lora_plus_ratio: Option<f64>,
    problem_type: Option<Problem>,
    class_weights: Option<Vec<f32>>,
    #[serde(default)]
    hidden_layers: Vec<usize>,
    activation: Option<Activation>,
    #[serde(default)]
    pooling: Pooling,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    batch: Vec<Item>,
    lr: f64,
    loss: f64,
    grad_norm: f64,
}

#[derive(Deserialize)]
struct Item {
    input_ids: Vec<u32>,
    loss_start: Option<usize>,
    label: Option<usize>,
    labels: Option<Vec<usize>>,
    score: Option<f64>,
}

impl Item {
    fn example(&self) -> Example {
        let ids = self.input_ids.clone();
        if let Some(labels) = self.labels.clone() {
            return Example::Labels { ids, labels };
        }
        if let Some(score) = self.score {
            let score = Score::new(score).unwrap();
            return Example::Score { ids, score };
        }
        match (self.loss_start, self.label) {
            (Some(start), _) => Example::Lm {
                learn: (0..ids.len()).map(|i| i >= start).collect(),
                ids,
            },
            (None, label) => Example::Class {
                ids,
                label: label.unwrap(),
            },
        }
    }
}

fn plan(curve: &Curve, dir: &Path, model: &Model) -> TrainPlan {
    let (adapter, mut init) = adapter(&dir.join("init"), model.config());
    let problem = curve.problem_type.unwrap_or_default();
    if let Some(head) = &mut init.head {
        head.settings.problem = problem;
    }
    let items: Vec<Example> = curve
        .steps
        .iter()
        .flat_map(|step| &step.batch)
        .map(Item::example)
        .collect();
    let warmup = curve
        .steps
        .iter()
        .position(|step| (step.lr / curve.lr - 1.0).abs() < 1e-9)
        .unwrap() as u64
        + 1;
    let labels = init.head.as_ref().map(|head| head.labels.clone());
    let method = labels.clone().map_or(Method::Lm, |labels| Method::Class {
        labels,
        head_only: false,
        options: HeadOptions {
            problem,
            class_weights: curve.class_weights.clone(),
            out_of_scope_share: None,
            hidden_layers: curve.hidden_layers.clone(),
            activation: curve.activation,
            pooling: curve.pooling,
            dropout: 0.0,
        },
    });
    TrainPlan {
        method,
        adapter: Some(adapter),
        hp: HyperParameters {
            learning_rate: Some(curve.lr),
            lora_plus_ratio: curve.lora_plus_ratio.unwrap_or(1.0),
            decay: Decay::Constant,
            warmup_steps: Some(warmup),
            weight_decay: curve.weight_decay,
            beta1: curve.betas[0],
            beta2: curve.betas[1],
            epsilon: curve.eps,
            max_grad_norm: Some(curve.clip),
            ..HyperParameters::default()
        },
        seed: 0,
        train: Examples {
            lines: (1..=items.len() as u64).collect(),
            items,
            labels,
        },
        valid: None,
        init: Some(init),
    }
}

/// Tensors by name.
fn tensors(weights: &AdapterWeights) -> BTreeMap<String, Cow<'_, [f32]>> {
    let sites = weights.sites.iter().flat_map(|((layer, site), adapter)| {
        let path = site.path(*layer);
        let magnitude = adapter.magnitude.as_ref();
        let factors = [
            (format!("{path}.lora_A"), adapter.a.to_f32()),
            (format!("{path}.lora_B"), adapter.b.to_f32()),
        ];
        let magnitude = magnitude.map(|m| (format!("{path}.magnitude"), m.as_slice().into()));
        factors.into_iter().chain(magnitude)
    });
    let scales = weights.scales.iter().map(|((layer, site), scale)| {
        let name = format!("{}.ia3_l", site.path(*layer));
        (name, scale.l.as_slice().into())
    });
    let head = weights
        .head
        .as_ref()
        .map(|head| ("score".to_owned(), head.weight.as_slice().into()));
    let hidden = weights.head.iter().flat_map(|head| &head.hidden);
    let hidden = hidden.enumerate().flat_map(|(index, layer)| {
        [("weight", &layer.weight), ("bias", &layer.bias)].map(|(part, values)| {
            (
                format!("score.hidden.{index}.{part}"),
                values.as_slice().into(),
            )
        })
    });
    let full = weights
        .full
        .iter()
        .map(|(tensor, delta)| (tensor.path(), delta.values.as_slice().into()));
    sites
        .chain(scales)
        .chain(full)
        .chain(hidden)
        .chain(head)
        .collect()
}

/// The relative Frobenius error of each tensor's update, ascending.
fn update_errors(
    start: &AdapterWeights,
    ours: &AdapterWeights,
    theirs: &AdapterWeights,
) -> Vec<(f64, String)> {
    let (start, ours, theirs) = (tensors(start), tensors(ours), tensors(theirs));
    assert_eq!(
        ours.keys().collect::<Vec<_>>(),
        theirs.keys().collect::<Vec<_>>()
    );
    let norm = |left: &[f32], right: &[f32]| -> f64 {
        left.iter()
            .zip(right)
            .map(|(l, r)| (f64::from(*l) - f64::from(*r)).powi(2))
            .sum::<f64>()
            .sqrt()
    };
    let error = |(name, theirs): (&String, &Cow<'_, [f32]>)| {
        (
            norm(&ours[name], theirs) / norm(theirs, &start[name]),
            name.clone(),
        )
    };
    let mut errors: Vec<(f64, String)> = theirs.iter().map(error).collect();
    errors.sort_by(|a, b| a.0.total_cmp(&b.0));
    errors
}

fn check_curve(model: &Arc<Model>, dir: &Path) {
    let name = dir.file_name().unwrap().to_string_lossy().into_owned();
    let curve: Curve = json(&dir.join("curve.json"));
    let plan = plan(&curve, dir, model);
    let start = plan.init.clone().unwrap();
    let mut trainer = Trainer::new(Arc::clone(model), plan).unwrap();
    for (index, step) in curve.steps.iter().enumerate() {
        let batch: Vec<Example> = step.batch.iter().map(Item::example).collect();
        let report = trainer.step_on(&batch, &Unpaced).unwrap();
        let pairs = [
            ("learning rate", report.learning_rate, step.lr),
            ("loss", report.loss, step.loss),
            ("gradient norm", report.grad_norm, step.grad_norm),
        ];
        for (what, found, expected) in pairs {
            let off = (found / expected - 1.0).abs();
            assert!(
                off <= 1e-4,
                "{name} step {index}: {what} {found}, not {expected}"
            );
        }
    }
    let (_, theirs) = adapter(&dir.join("final"), model.config());
    let errors = update_errors(&start, &trainer.weights(), &theirs);
    let (median, worst) = (&errors[errors.len() / 2], &errors[errors.len() - 1]);
    eprintln!(
        "{name}: update off by {:.1e} (median), {:.1e} (worst, {})",
        median.0, worst.0, worst.1
    );
    assert!(
        median.0 <= 5e-4,
        "{name}: the median update is off by {}",
        median.0
    );
    assert!(
        worst.0 <= 2e-2,
        "{name}: the update of {} is off by {}",
        worst.1,
        worst.0
    );
}

fn model(path: &str) -> Arc<Model> {
    let loaded = load(path).unwrap();
    Arc::new(Model::new(Backend::default(), loaded.config, loaded.weights).unwrap())
}

fn check(goldens: &Goldens) {
    let usual = model(&goldens.model);
    let mut curves: Vec<_> = std::fs::read_dir(&goldens.dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    curves.retain(|path| path.join("curve.json").is_file());
    curves.sort();
    assert!(!curves.is_empty(), "no curve in {}", goldens.dir.display());
    for dir in &curves {
        // A way to train that needs another base has it beside.
        let own = dir.join("model");
        if own.is_dir() {
            check_curve(&model(&own.display().to_string()), dir);
        } else {
            check_curve(&usual, dir);
        }
    }
}

#[test]
fn small_curves() {
    check(&small());
}

#[test]
fn given_curves() {
    if let Some(goldens) = given() {
        check(&goldens);
    }
}
