//! Runs on a tiny random model: cutting, pausing and resuming change no bit; heads and adapters learn.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod classification;
mod device;
mod whole;

use std::cell::Cell;

use espalier_adapters::config::{BaseTensor, FullConfig, Ia3Config, LayerTensor, Site};
use espalier_adapters::pace::Unpaced;
use espalier_adapters::train::examples::Examples;
use espalier_adapters::weights::{Delta, SiteScale};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::model::tests::precision::kept_weights;
use crate::model::tests::{Under, host, random_adapter, small};
use crate::model::{Dtype, Family, Saved};

fn model(on: &Under<Backend>) -> Arc<Model> {
    Arc::new(on.model(&(on.sizes)(Family::Qwen3), 1))
}

fn examples(items: Vec<Example>, labels: Option<Vec<String>>) -> Examples {
    Examples {
        lines: (1..=items.len() as u64).collect(),
        items,
        labels,
    }
}

/// Sequences that count upwards, so that there is something to learn.
fn sequences(count: usize, seed: u64) -> Examples {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut sequence = || {
        let (start, len) = (rng.random_range(0..50u32), rng.random_range(4..14usize));
        let ids: Vec<u32> = (0..len as u32).map(|i| (start + i * 3) % 70).collect();
        let learn = (0..len).map(|i| i > 1).collect();
        Example::Lm { ids, learn }
    };
    examples((0..count).map(|_| sequence()).collect(), None)
}

/// The last token decides.
fn classes(count: usize, seed: u64) -> (Examples, Vec<String>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let labels: Vec<String> = ["even", "odd", "third"].map(str::to_owned).to_vec();
    let mut example = || {
        let ids: Vec<u32> = (0..rng.random_range(2..8))
            .map(|_| rng.random_range(0..70))
            .collect();
        let label = ids.last().map_or(0, |id| *id as usize % 3);
        Example::Class { ids, label }
    };
    (
        examples(
            (0..count).map(|_| example()).collect(),
            Some(labels.clone()),
        ),
        labels,
    )
}

fn hp() -> HyperParameters {
    HyperParameters {
        learning_rate: Some(1e-2),
        weight_decay: 0.1,
        batch_size: 4,
        epochs: Some(2),
        checkpoint_steps: Some(2),
        eval_steps: Some(3),
        ..HyperParameters::default()
    }
}

fn lm_plan() -> TrainPlan {
    let lora = LoraConfig {
        lora_dropout: 0.1,
        ..LoraConfig::new(3, 5.0, &[Site::Q, Site::V, Site::Down])
    };
    TrainPlan {
        method: Method::Lm,
        adapter: Some(lora.into()),
        hp: hp(),
        seed: 9,
        train: sequences(18, 1),
        valid: Some(sequences(5, 2)),
        init: None,
    }
}

fn dora_plan() -> TrainPlan {
    let lora = LoraConfig {
        use_dora: true,
        ..LoraConfig::new(3, 5.0, &[Site::Q, Site::O, Site::Down])
    };
    TrainPlan {
        adapter: Some(lora.into()),
        hp: HyperParameters {
            lora_plus_ratio: 2.0,
            ..hp()
        },
        ..lm_plan()
    }
}

fn ia3_plan() -> TrainPlan {
    TrainPlan {
        adapter: Some(Ia3Config::default().into()),
        hp: HyperParameters {
            learning_rate: Some(0.05),
            ..hp()
        },
        ..lm_plan()
    }
}

fn full_plan() -> TrainPlan {
    TrainPlan {
        adapter: Some(FullConfig::new(vec![1]).into()),
        ..lm_plan()
    }
}

fn class_plan(head_only: bool) -> TrainPlan {
    let (train, labels) = classes(40, 1);
    let (valid, _) = classes(20, 2);
    let lora = (!head_only).then(|| LoraConfig::new(2, 4.0, &Site::ALL));
    TrainPlan {
        method: Method::Class {
            labels,
            head_only,
            options: HeadOptions::default(),
        },
        adapter: lora.map(AdapterConfig::from),
        valid: Some(valid),
        train,
        ..lm_plan()
    }
}

/// One of each kind of run.
fn every_plan() -> [TrainPlan; 15] {
    [
        lm_plan(),
        dora_plan(),
        ia3_plan(),
        full_plan(),
        whole::plan(),
        class_plan(false),
        class_plan(true),
        classification::labels_plan(false),
        classification::labels_plan(true),
        classification::score_plan(false),
        classification::score_plan(true),
        classification::deep_plan(false),
        classification::deep_plan(true),
        classification::mean_plan(false),
        classification::mean_plan(true),
    ]
}

fn finish(trainer: &mut Trainer, pace: &dyn Company) -> (Finished, Vec<TrainEvent>) {
    let mut events = Vec::new();
    let finished = trainer.run(pace, &mut |event| events.push(event)).unwrap();
    (finished, events)
}

fn steps(events: &[TrainEvent]) -> Vec<StepReport> {
    events
        .iter()
        .filter_map(|event| {
            if let TrainEvent::Step(step) = event {
                Some(*step)
            } else {
                None
            }
        })
        .collect()
}

/// Cuts work in pieces as small as can be.
struct Fine;

impl Company for Fine {}

impl Pace for Fine {
    fn breathe(&self) -> Result<(), Stopped> {
        Ok(())
    }

    fn quantum_flops(&self) -> usize {
        1 << 12
    }
}

#[test]
fn cutting_changes_no_bit() {
    cuts_change_no_bit(&host());
}

pub(crate) fn cuts_change_no_bit(on: &Under<Backend>) {
    for plan in [
        lm_plan(),
        dora_plan(),
        ia3_plan(),
        full_plan(),
        whole::plan(),
    ] {
        cuts_of_a_plan_change_no_bit(on, &plan);
    }
}

fn cuts_of_a_plan_change_no_bit(on: &Under<Backend>, whole_plan: &TrainPlan) {
    let mut trainer = Trainer::new(model(on), whole_plan.clone()).unwrap();
    let (whole, events) = finish(&mut trainer, &Unpaced);
    let row = Saved::row_bytes(&on.ops, model(on).config(), 3);
    for (activation_bytes, pace) in [
        (512 << 20, &Fine as &dyn Company),
        (30 * row, &Unpaced),
        (20 * row, &Fine),
        (5 * row, &Unpaced),
    ] {
        let mut plan = whole_plan.clone();
        plan.hp.activation_bytes = activation_bytes;
        let (cut, cut_events) = finish(&mut Trainer::new(model(on), plan).unwrap(), pace);
        assert_eq!(
            steps(&cut_events),
            steps(&events),
            "{activation_bytes} bytes"
        );
        assert_eq!(cut.artifact, whole.artifact, "{activation_bytes} bytes");
    }
    let reports = steps(&events);
    assert_eq!(reports.len(), 10);
    assert_eq!(reports[4].targets + reports[5].targets, {
        let targets = |batch: Vec<usize>| -> usize {
            batch
                .iter()
                .map(|i| lm_plan().train.items[*i].targets())
                .sum()
        };
        let trainer = Trainer::new(model(on), lm_plan()).unwrap();
        (targets(trainer.batch(4)) + targets(trainer.batch(5))) as u64
    });
    assert!(whole.summary.last_loss < whole.summary.first_loss);
}

#[test]
fn packed_losses_are_those_of_each_alone() {
    packed_is_alone(&host());
}

pub(crate) fn packed_is_alone(on: &Under<Backend>) {
    let plan = lm_plan();
    let model = model(on);
    let weights = random_adapter(&model, |_, _| true, false, 3);
    let adapter = ResidentAdapter::build(&weights, model.as_ref()).unwrap();
    let mut learner = Learner::new(model, (adapter, Objective::default()), (1 << 20, 0.0), 1);
    let numbered = numbered(&plan.train.items);
    let mut judge = |some: &[Numbered<'_>]| learner.judge(some, &Unpaced).unwrap().0;
    let together = judge(&numbered);
    let mut alone = LossSum::default();
    numbered
        .iter()
        .for_each(|one| alone.add(judge(std::slice::from_ref(one))));
    assert!((together.loss - alone.loss).abs() < 1e-9 * alone.loss);
    assert_eq!(
        (together.targets, together.correct),
        (alone.targets, alone.correct)
    );
    learner.clear_gradients();
    let learnt = learner.learn(&numbered, (1, 1.0), &Unpaced).unwrap();
    assert_eq!(learnt, together, "training and judging compute one loss");
}

#[test]
fn resumed_is_uninterrupted() {
    breaks_change_no_bit(&host());
}

pub(crate) fn breaks_change_no_bit(on: &Under<Backend>) {
    for plan in every_plan() {
        let mut plan = plan;
        plan.hp.epochs = Some(2);
        let (whole, events) = finish(
            &mut Trainer::new(model(on), plan.clone()).unwrap(),
            &Unpaced,
        );
        let checkpoints = events.iter().filter_map(|event| match event {
            TrainEvent::Checkpoint { step, bytes } => Some((*step, bytes.clone())),
            _ => None,
        });
        let mut tried = 0;
        for (step, bytes) in checkpoints {
            let mut resumed = Trainer::resume(model(on), plan.clone(), &bytes).unwrap();
            assert_eq!(resumed.steps_done(), step);
            let (end, rest) = finish(&mut resumed, &Unpaced);
            assert_eq!(end.artifact, whole.artifact, "resumed after {step}");
            assert_eq!(end.summary, whole.summary);
            assert_eq!(steps(&rest), steps(&events)[step as usize..]);
            tried += 1;
        }
        assert!(tried > 2);
        let other = TrainPlan {
            seed: plan.seed + 1,
            ..plan.clone()
        };
        let bytes = Trainer::new(model(on), other)
            .unwrap()
            .checkpoint()
            .unwrap();
        let refused = Trainer::resume(model(on), plan, &bytes).unwrap_err();
        assert!(matches!(refused, TrainError::Checkpoint(_)), "{refused}");
    }
}

/// Stops at the n-th breath.
struct StopsAt(Cell<usize>);

impl Company for StopsAt {}

impl Pace for StopsAt {
    fn breathe(&self) -> Result<(), Stopped> {
        let left = self.0.get();
        self.0.set(left.saturating_sub(1));
        if left == 0 { Err(Stopped) } else { Ok(()) }
    }
}

#[test]
fn a_stopped_run_goes_on() {
    stopped_runs_go_on(&host());
}

pub(crate) fn stopped_runs_go_on(on: &Under<Backend>) {
    let (whole, _) = finish(&mut Trainer::new(model(on), lm_plan()).unwrap(), &Unpaced);
    let mut trainer = Trainer::new(model(on), lm_plan()).unwrap();
    let mut stops = 0;
    loop {
        match trainer.run(&StopsAt(Cell::new(200)), &mut |_| ()) {
            Err(TrainError::Stopped(_)) => stops += 1,
            end => {
                assert_eq!(end.unwrap().artifact, whole.artifact);
                break;
            }
        }
    }
    assert!(stops > 3, "stopped {stops} times");
}

/// Stops once in every evaluation, a few breaths after it began.
#[derive(Default)]
struct StopsInEvaluations {
    breaths_left: Cell<Option<usize>>,
    stopped_last: Cell<bool>,
}

impl Company for StopsInEvaluations {
    fn alone(&self) {
        let left = (!self.stopped_last.take()).then_some(2);
        self.breaths_left.set(left);
    }
}

impl Pace for StopsInEvaluations {
    fn breathe(&self) -> Result<(), Stopped> {
        match self.breaths_left.take() {
            Some(0) => {
                self.stopped_last.set(true);
                Err(Stopped)
            }
            left => {
                self.breaths_left.set(left.map(|left| left - 1));
                Ok(())
            }
        }
    }
}

#[test]
fn a_run_stopped_in_an_evaluation_makes_up_for_it() {
    let on = &host();
    let mut plan = class_plan(false);
    plan.hp.early_stopping_patience = Some(2);
    let evaluations = |events: &[TrainEvent]| {
        let of = |event: &TrainEvent| match event {
            TrainEvent::Eval(report) => Some(*report),
            _ => None,
        };
        events.iter().filter_map(of).collect::<Vec<_>>()
    };
    let mut trainer = Trainer::new(model(on), plan.clone()).unwrap();
    let (whole, events) = finish(&mut trainer, &Unpaced);
    let expected = evaluations(&events);
    assert_eq!(expected[0].step, 0, "what it starts from is measured");
    assert!(!expected[0].best);
    let baseline = whole.summary.baseline.unwrap();
    assert_eq!(baseline.loss, expected[0].loss);

    let mut seen = Vec::new();
    let mut trainer = Trainer::new(model(on), plan.clone()).unwrap();
    let pace = StopsInEvaluations::default();
    let mut in_evaluations = 0;
    let end = loop {
        match trainer.run(&pace, &mut |event| seen.push(event)) {
            Err(TrainError::Stopped(_)) => {
                let due = trainer.eval_due(trainer.steps_done());
                let done = trainer.state.evaluated == Some(trainer.steps_done());
                in_evaluations += usize::from(due && !done);
                let bytes = trainer.checkpoint().unwrap();
                trainer = Trainer::resume(model(on), plan.clone(), &bytes).unwrap();
            }
            end => break end.unwrap(),
        }
    };
    assert_eq!(in_evaluations, expected.len());
    assert_eq!(evaluations(&seen), expected);
    assert_eq!(end.artifact, whole.artifact);
    assert_eq!(end.summary, whole.summary);
}

#[test]
fn without_shuffling_every_epoch_has_the_order_of_the_data() {
    let mut plan = lm_plan();
    plan.hp.batch_size = 2;
    let order = |plan: &TrainPlan| {
        let trainer = Trainer::new(model(&host()), plan.clone()).unwrap();
        let epoch = plan.train.items.len().div_ceil(2) as u64;
        (0..2 * epoch)
            .flat_map(|step| trainer.batch(step))
            .collect::<Vec<_>>()
    };
    let shuffled = order(&plan);
    plan.hp.shuffle = false;
    let count = plan.train.items.len();
    assert_eq!(order(&plan), (0..count).chain(0..count).collect::<Vec<_>>());
    assert_ne!(shuffled, order(&plan));
}

#[test]
fn heads_and_adapters_learn_and_the_best_is_kept() {
    runs_learn_and_keep_the_best(&host());
}

pub(crate) fn runs_learn_and_keep_the_best(on: &Under<Backend>) {
    for head_only in [true, false] {
        let mut plan = class_plan(head_only);
        plan.hp = HyperParameters {
            epochs: Some(if head_only { 60 } else { 12 }),
            learning_rate: Some(2e-2),
            weight_decay: 0.0,
            ..hp()
        };
        let mut trainer = Trainer::new(model(on), plan).unwrap();
        let (finished, events) = finish(&mut trainer, &Unpaced);
        let best = finished.summary.best.unwrap();
        assert!(
            finished.summary.last_loss < 0.5 * finished.summary.first_loss,
            "{:?}",
            finished.summary
        );
        let losses: Vec<EvalReport> = events
            .iter()
            .filter_map(|event| {
                if let TrainEvent::Eval(eval) = event {
                    Some(*eval)
                } else {
                    None
                }
            })
            .collect();
        let least = losses
            .iter()
            .min_by(|a, b| a.loss.total_cmp(&b.loss))
            .unwrap();
        assert_eq!(
            (best.step, best.loss, finished.summary.kept_step),
            (least.step, least.loss, least.step)
        );
        let shape = model(on).config().base_shape();
        let (config, weights, _) =
            peft::read(&finished.artifact, &shape, &peft::Limits::default()).unwrap();
        assert_eq!(
            weights.head.as_ref().unwrap().labels,
            ["even", "odd", "third"]
        );
        assert_eq!(weights.sites.is_empty(), head_only, "{config:?}");
        let kept = ResidentAdapter::build(&weights, model(on).as_ref()).unwrap();
        let (valid, _) = classes(20, 2);
        let objective = Objective::of(&class_plan(head_only).method);
        let mut learner = Learner::new(model(on), (kept, objective), (1 << 20, 0.0), 1);
        let (again, _) = learner.judge(&numbered(&valid.items), &Unpaced).unwrap();
        assert!(
            (again.mean() - best.loss).abs() < 1e-6,
            "the artifact is the best: {} {}",
            again.mean(),
            best.loss
        );
    }
}

/// The magnitudes of every site, one after the other.
fn magnitudes(weights: &AdapterWeights) -> Vec<f32> {
    let sites = weights.sites.values();
    sites
        .flat_map(|site| site.magnitude.clone().unwrap_or_default())
        .collect()
}

#[test]
fn a_dora_adapter_is_trained_served_and_trained_again() {
    let on = host();
    let mut trainer = Trainer::new(model(&on), dora_plan()).unwrap();
    let before = magnitudes(&trainer.weights());
    let (finished, _) = finish(&mut trainer, &Unpaced);
    assert!(finished.summary.last_loss < finished.summary.first_loss);
    let shape = model(&on).config().base_shape();
    let (config, weights, _) =
        peft::read(&finished.artifact, &shape, &peft::Limits::default()).unwrap();
    assert!(config.lora().unwrap().use_dora);
    let moved = before.iter().zip(magnitudes(&weights));
    assert!(moved.filter(|(b, a)| **b != *a).count() > before.len() / 2);

    // What is served is what was judged.
    let served = ResidentAdapter::build(&weights, model(&on).as_ref()).unwrap();
    let mut learner = Learner::new(
        model(&on),
        (served, Objective::default()),
        (1 << 20, 0.0),
        1,
    );
    let valid = dora_plan().valid.unwrap();
    let (again, _) = learner.judge(&numbered(&valid.items), &Unpaced).unwrap();
    let best = finished.summary.best.unwrap();
    assert!(
        (again.mean() - best.loss).abs() < 1e-5 * best.loss,
        "{} {}",
        again.mean(),
        best.loss
    );

    let next = TrainPlan {
        init: Some(weights),
        ..dora_plan()
    };
    let (further, _) = finish(
        &mut Trainer::new(model(&on), next.clone()).unwrap(),
        &Unpaced,
    );
    assert!(further.summary.first_loss < finished.summary.first_loss);
    let plain = TrainPlan {
        adapter: lm_plan().adapter,
        ..next.clone()
    };
    let drawn = TrainPlan {
        init: Some(random_adapter(&model(&on), |_, _| true, false, 3)),
        ..next
    };
    for (plan, expected) in [
        (
            plain,
            "has a magnitude at model.layers.0.self_attn.q_proj: set use_dora to true",
        ),
        (
            drawn,
            "has no magnitude at model.layers.0.self_attn.q_proj: set use_dora to false",
        ),
    ] {
        let error = Trainer::new(model(&on), plan).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn an_ia3_adapter_is_trained_served_and_trained_again() {
    let on = host();
    let mut trainer = Trainer::new(model(&on), ia3_plan()).unwrap();
    let (finished, _) = finish(&mut trainer, &Unpaced);
    assert!(finished.summary.last_loss < finished.summary.first_loss);
    let shape = model(&on).config().base_shape();
    let (config, weights, _) =
        peft::read(&finished.artifact, &shape, &peft::Limits::default()).unwrap();
    assert_eq!(config, Ia3Config::default().into());
    let moved = |scale: &SiteScale| scale.l.iter().all(|l| *l != 1.0 && (l - 1.0).abs() < 0.9);
    assert!(weights.scales.values().all(moved), "every number learns");

    // What is served is what was judged.
    let served = ResidentAdapter::build(&weights, model(&on).as_ref()).unwrap();
    let served = (served, Objective::default());
    let mut learner = Learner::new(model(&on), served, (1 << 20, 0.0), 1);
    let valid = ia3_plan().valid.unwrap();
    let (again, _) = learner.judge(&numbered(&valid.items), &Unpaced).unwrap();
    let best = finished.summary.best.unwrap();
    assert_eq!(again.mean(), best.loss);

    let next = TrainPlan {
        init: Some(weights),
        ..ia3_plan()
    };
    let (further, _) = finish(
        &mut Trainer::new(model(&on), next.clone()).unwrap(),
        &Unpaced,
    );
    assert!(further.summary.first_loss < finished.summary.first_loss);
    let digest = |plan: &TrainPlan| plan.digest(model(&on).config());
    assert_ne!(
        digest(&next),
        digest(&ia3_plan()),
        "a checkpoint knows its start"
    );
    let otherwise = TrainPlan {
        adapter: lm_plan().adapter,
        ..next.clone()
    };
    let doubled = TrainPlan {
        hp: HyperParameters {
            lora_plus_ratio: 2.0,
            ..hp()
        },
        ..ia3_plan()
    };
    for (plan, expected) in [
        (otherwise, "init: is another way to adapt"),
        (doubled, "lora_plus_ratio: 2 is for LoRA's factors"),
    ] {
        let error = Trainer::new(model(&on), plan).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn layers_are_unfrozen_served_and_trained_again() {
    let on = host();
    let mut trainer = Trainer::new(model(&on), full_plan()).unwrap();
    let (finished, _) = finish(&mut trainer, &Unpaced);
    assert!(finished.summary.last_loss < finished.summary.first_loss);
    let shape = model(&on).config().base_shape();
    let (config, weights, _) =
        peft::read(&finished.artifact, &shape, &peft::Limits::default()).unwrap();
    assert_eq!(config, FullConfig::new(vec![1]).into());
    let inside = |tensor: &BaseTensor| matches!(tensor, BaseTensor::Layer(1, _));
    assert!(weights.full.keys().all(inside));
    let norm = BaseTensor::Layer(1, LayerTensor::QNorm);
    assert!(weights.full.contains_key(&norm), "{config:?}");
    let moved = |delta: &Delta| delta.values.iter().filter(|d| **d != 0.0).count();
    let still = |delta: &&Delta| moved(delta) < delta.values.len();
    assert_eq!(
        weights.full.values().filter(still).count(),
        0,
        "every number learns"
    );

    // What is served is what was judged.
    let served = ResidentAdapter::build(&weights, model(&on).as_ref()).unwrap();
    assert_eq!(
        served.bytes(),
        ResidentAdapter::bytes_for(&weights, model(&on).as_ref())
    );
    assert!(served.bytes() >= 4 * weights.parameters());
    let served = (served, Objective::default());
    let mut learner = Learner::new(model(&on), served, (1 << 20, 0.0), 1);
    let valid = full_plan().valid.unwrap();
    let (again, _) = learner.judge(&numbered(&valid.items), &Unpaced).unwrap();
    assert_eq!(again.mean(), finished.summary.best.unwrap().loss);

    let next = TrainPlan {
        init: Some(weights),
        ..full_plan()
    };
    let digest = |plan: &TrainPlan| plan.digest(model(&on).config());
    assert_ne!(
        digest(&next),
        digest(&full_plan()),
        "a checkpoint knows its start"
    );
    let (further, _) = finish(&mut Trainer::new(model(&on), next).unwrap(), &Unpaced);
    assert!(further.summary.first_loss < finished.summary.first_loss);
    let mut beyond = full_plan();
    beyond.adapter = Some(FullConfig::new(vec![3]).into());
    let error = Trainer::new(model(&on), beyond).unwrap_err().to_string();
    assert!(
        error.contains("does not exist: layer 3 of a base with 3 layers"),
        "{error}"
    );
}

#[test]
fn patience_ends_a_run() {
    let mut plan = lm_plan();
    plan.hp = HyperParameters {
        learning_rate: Some(0.3),
        epochs: Some(200),
        eval_steps: Some(1),
        early_stopping_patience: Some(3),
        ..hp()
    };
    let (finished, _) = finish(&mut Trainer::new(model(&host()), plan).unwrap(), &Unpaced);
    assert!(
        finished.summary.stopped_early && finished.summary.steps < 900,
        "{:?}",
        finished.summary
    );
    assert_eq!(finished.summary.steps, finished.summary.kept_step + 3);
}

#[test]
fn plans_that_cannot_be_carried_out_say_why() {
    type Change = fn(&mut TrainPlan);
    let cases: [(&str, Change); 10] = [
        (
            "lora_plus_ratio: 0 is not above 0 and at most 1000",
            |plan| plan.hp.lora_plus_ratio = 0.0,
        ),
        ("lora_plus_ratio: NaN", |plan| {
            plan.hp.lora_plus_ratio = f64::NAN
        }),
        ("batch_size: 0", |plan| plan.hp.batch_size = 0),
        ("learning_rate: -1", |plan| {
            plan.hp.learning_rate = Some(-1.0)
        }),
        ("lora_dropout: 0.1 with use_dora", |plan| {
            if let Some(AdapterConfig::Lora(lora)) = &mut plan.adapter {
                lora.use_dora = true;
            }
        }),
        ("train: holds no example", |plan| plan.train.items.clear()),
        ("train: token 70", |plan| {
            plan.train.items.push(Example::Lm {
                ids: vec![1, 70],
                learn: vec![false, true],
            });
        }),
        ("valid: an example has no token to learn", |plan| {
            let example = Example::Lm {
                ids: vec![1, 2],
                learn: vec![false, false],
            };
            plan.valid
                .iter_mut()
                .for_each(|valid| valid.items.push(example.clone()));
        }),
        ("train: an example has 257 tokens, not 1..=256", |plan| {
            plan.train.items.push(Example::Lm {
                ids: vec![1; 257],
                learn: vec![true; 257],
            });
        }),
        ("adapter: is missing", |plan| plan.adapter = None),
    ];
    for (expected, change) in cases {
        let mut plan = lm_plan();
        change(&mut plan);
        let error = Trainer::new(model(&host()), plan).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}, not {expected}");
    }
    let mut diverging = lm_plan();
    diverging.hp.learning_rate = Some(1.0);
    diverging.hp.epochs = Some(100);
    diverging.hp.max_grad_norm = None;
    diverging.init = Some({
        let mut weights = random_adapter(&model(&host()), |_, _| true, false, 3);
        for site in weights.sites.values_mut() {
            site.a = site.a.to_f32().iter().map(|a| a * 1e30).collect();
        }
        weights
    });
    let error = Trainer::new(model(&host()), diverging)
        .unwrap()
        .run(&Unpaced, &mut |_| ())
        .unwrap_err();
    assert!(matches!(error, TrainError::NotFinite { .. }), "{error}");
}

/// On rounded plain weights the very same adapter as on their f32 copy; on blocks, whose forward pass rounds rows too, nearly the same losses.
#[test]
fn training_works_on_every_format() {
    let config = small(Family::Qwen3);
    for dtype in Dtype::ALL {
        let run = |wide: bool| {
            let weights = kept_weights(&config, 1, dtype, wide);
            let model = Arc::new(host().packed(&config, weights));
            let mut plan = lm_plan();
            plan.hp.epochs = Some(6);
            finish(&mut Trainer::new(model, plan).unwrap(), &Unpaced)
        };
        let ((narrow, events), (wide, wide_events)) = (run(false), run(true));
        let losses =
            |events: &[TrainEvent]| steps(events).iter().map(|s| s.loss).collect::<Vec<_>>();
        let (losses, expected) = (losses(&events), losses(&wide_events));
        assert!(
            losses[losses.len() - 1] < 0.9 * losses[0],
            "{dtype} learns: {losses:?}"
        );
        if dtype == Dtype::Q8 {
            assert_ne!(narrow.artifact, wide.artifact);
            for (loss, expected) in losses.iter().zip(&expected) {
                assert!(
                    (loss - expected).abs() < 0.05 * expected,
                    "{loss}, not {expected}"
                );
            }
        } else {
            assert_eq!(narrow.artifact, wide.artifact, "{dtype}");
        }
    }
}

/// Loses shares now and then, as when the job that runs the pass fails.
#[derive(Default)]
struct Loses(Cell<usize>);

impl Pace for Loses {
    fn breathe(&self) -> Result<(), Stopped> {
        Ok(())
    }
}

impl Company for Loses {
    fn pass(&self, share: Share, run: RunPass<'_>) -> Result<Share, Interrupted> {
        let number = self.0.get();
        self.0.set(number + 1);
        let share = by_itself(share, run)?;
        match [0, 2, 6, 7, 15].contains(&number) {
            true => Err(Interrupted::Lost),
            false => Ok(share),
        }
    }
}

#[test]
fn a_step_whose_share_was_lost_begins_anew() {
    let on = host();
    let (whole, events) = finish(&mut Trainer::new(model(&on), lm_plan()).unwrap(), &Unpaced);
    // Two micro-batches a step, so that gradients of the first are there when the second is lost.
    let mut plan = lm_plan();
    plan.hp.activation_bytes = 20 * Saved::row_bytes(&on.ops, model(&on).config(), 3);
    let loses = Loses::default();
    let mut trainer = Trainer::new(model(&on), plan).unwrap();
    let (found, again) = finish(&mut trainer, &loses);
    assert!(loses.0.get() > 2 * steps(&events).len());
    assert_eq!(found.artifact, whole.artifact);
    assert_eq!(steps(&again), steps(&events));
}

fn diagnoses(events: &[TrainEvent]) -> Vec<(u64, Diagnosis)> {
    let diagnosis = |event: &TrainEvent| match event {
        TrainEvent::Diagnosis { step, diagnosis } => Some((*step, diagnosis.clone())),
        _ => None,
    };
    events.iter().filter_map(diagnosis).collect()
}

/// A token that sees itself alone attends to itself alone, whatever its query and key are.
#[test]
fn modules_that_learn_nothing_are_named() {
    let mut plan = class_plan(false);
    for example in &mut plan.train.items {
        if let Example::Class { ids, .. } = example {
            ids.truncate(1);
        }
    }
    let (_, events) = finish(&mut Trainer::new(model(&host()), plan).unwrap(), &Unpaced);
    let found = diagnoses(&events);
    let [(1, Diagnosis::SilentModules { modules, of })] = &found[..] else {
        panic!("{found:?}");
    };
    assert_eq!(*of, 3 * Site::ALL.len());
    let attention = modules
        .iter()
        .filter(|m| m.ends_with("q_proj") || m.ends_with("k_proj"));
    assert_eq!((modules.len(), attention.count()), (6, 6), "{modules:?}");
    let (_, events) = finish(
        &mut Trainer::new(model(&host()), lm_plan()).unwrap(),
        &Unpaced,
    );
    assert_eq!(diagnoses(&events), []);
}

#[test]
fn a_run_without_any_gradient_ends() {
    let mut plan = lm_plan();
    plan.adapter = Some(LoraConfig::new(2, 4.0, &[Site::Q, Site::K]).into());
    for example in &mut plan.train.items {
        if let Example::Lm { ids, learn } = example {
            ids.truncate(2);
            *learn = vec![false, true];
        }
    }
    let ended = Trainer::new(model(&host()), plan)
        .unwrap()
        .run(&Unpaced, &mut |_| ());
    let error = ended.unwrap_err();
    assert!(
        matches!(error, TrainError::NoGradient { step: 1 }),
        "{error}"
    );
}

#[test]
fn a_loss_that_runs_away_is_told() {
    // A head's logits know no bound, as those of the output head do behind the last norm.
    let mut plan = class_plan(false);
    plan.hp.learning_rate = Some(1.0);
    plan.hp.warmup_steps = Some(0);
    let (_, events) = finish(&mut Trainer::new(model(&host()), plan).unwrap(), &Unpaced);
    let found = diagnoses(&events);
    assert!(
        matches!(&found[..], [(_, Diagnosis::Diverging { .. }), ..]),
        "{found:?}"
    );
}
