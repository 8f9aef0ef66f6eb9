//! Jobs whose micro-batches share passes: each ends in the adapter that it makes alone.

use std::sync::Arc;

use espalier_adapters::config::{FullConfig, Ia3Config, LoraConfig, Site};
use espalier_adapters::train::examples::{Example, Examples};
use espalier_adapters::version::AdapterArtifact;

use super::fixture::{Fixture, fixture, prompt, small};
use super::sampled;
use super::training::to_end;
use crate::config::EngineConfig;
use crate::train::trainer::{HeadOptions, HyperParameters, Method};
use crate::train::{
    JobEvent, TrainEvent, TrainPlan, TrainingImpact, TrainingJob, TrainingSubmission,
};

const STEPS: u64 = 40;

/// Jobs that differ in everything; those with one dropout rate can meet.
fn plan(number: u64) -> TrainPlan {
    let labels = vec!["left".to_owned(), "right".to_owned()];
    let class = number == 2;
    let example = |i: u64| {
        let ids = prompt(1000 * number + i, 3 + ((number + i) % 5) as usize);
        match class {
            true => Example::Class {
                label: ids[0] as usize % 2,
                ids,
            },
            false => Example::Lm {
                learn: (0..ids.len()).map(|p| p > i as usize % 2).collect(),
                ids,
            },
        }
    };
    let items: Vec<_> = (0..9 + number).map(example).collect();
    let sites = [Site::Q, Site::V, Site::Down, Site::Up, Site::O];
    let sites = &sites[number as usize % 3..];
    let lora = LoraConfig {
        lora_dropout: if number < 3 { 0.1 } else { 0.0 },
        layers_to_transform: (number == 4).then(|| vec![1]),
        use_dora: number == 5,
        ..LoraConfig::new(2 + number as usize, 8.0, sites)
    };
    TrainPlan {
        method: match class {
            true => Method::Class {
                labels: labels.clone(),
                head_only: false,
                options: HeadOptions::default(),
            },
            false => Method::Lm,
        },
        adapter: Some(match number {
            6 => Ia3Config::default().into(),
            7 => FullConfig::new(vec![1]).into(),
            8 => FullConfig {
                modules: vec!["embed_tokens".to_owned(), "norm".to_owned()],
                ..FullConfig::new(vec![0, 1])
            }
            .into(),
            _ => lora.into(),
        }),
        hp: HyperParameters {
            learning_rate: Some(2e-3 * (1.0 + number as f64)),
            weight_decay: 0.1,
            max_steps: Some(STEPS),
            epochs: Some(1_000),
            batch_size: 2 + number as usize % 2,
            ..HyperParameters::default()
        },
        seed: number,
        train: Examples {
            lines: (1..=items.len() as u64).collect(),
            items,
            labels: class.then_some(labels),
        },
        valid: None,
        init: None,
    }
}

fn start(fixture: &Fixture, number: u64) -> TrainingJob {
    let submission = TrainingSubmission {
        job: number.to_string(),
        tenant: Arc::from(format!("tenant-{}", number % 3)),
        plan: plan(number),
        checkpoint: None,
    };
    fixture.engine.train(submission).unwrap()
}

fn end(job: &mut TrainingJob) -> (AdapterArtifact, TrainingImpact) {
    match to_end(job).2 {
        Some(JobEvent::Finished { finished, impact }) => (finished.artifact, impact),
        other => panic!("{other:?}"),
    }
}

fn config() -> EngineConfig {
    EngineConfig {
        max_training_jobs: 10,
        ..small()
    }
}

#[test]
fn jobs_in_company_end_as_they_do_alone() {
    let quiet = fixture(config());
    let alone: Vec<_> = (0..9)
        .map(|number| end(&mut start(&quiet, number)))
        .collect();
    assert!(alone.iter().all(|(_, impact)| impact.shared_passes == 0));

    let together = fixture(config());
    let ask = || together.ask(Some(0), sampled(prompt(5, 10), 5, 20));
    let before = ask();
    let mut jobs: Vec<_> = (0..9).map(|number| start(&together, number)).collect();
    let mut cancelled = start(&together, 9);
    let during = ask();
    while !matches!(
        cancelled.events.blocking_recv(),
        Some(JobEvent::Progress(TrainEvent::Step(_)))
    ) {}
    cancelled.control.cancel();
    assert!(matches!(
        to_end(&mut cancelled).2,
        Some(JobEvent::Cancelled)
    ));
    let mut shared = 0;
    for (number, (job, (expected, _))) in jobs.iter_mut().zip(&alone).enumerate() {
        let (found, impact) = end(job);
        assert_eq!(&found, expected, "job {number}, bit for bit");
        shared += impact.shared_passes;
    }
    // Which of them meet is the machine's affair: on a busy one the first may end before the last begins.
    assert!(shared > STEPS, "{shared} passes shared by six jobs");
    assert_eq!(during.results(), before.results());
    assert_eq!(ask().results(), before.results());
}
