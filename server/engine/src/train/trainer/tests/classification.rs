//! Heads of every problem: what they learn, what is fitted when they end, and what is refused.

use espalier_adapters::head::{Activation, HeadSettings, Pooling, Problem};
use espalier_adapters::train::dataset::Score;
use espalier_adapters::train::examples::Example;
use espalier_adapters::train::quality::Quality;

use super::*;

fn answered(count: usize, seed: u64, answer: impl Fn(Vec<u32>) -> Example) -> Examples {
    let (given, labels) = classes(count, seed);
    let items = given.items.iter().map(|item| answer(item.ids().to_vec()));
    let items = items.collect();
    examples(items, Some(labels))
}

/// Every residue that the last token has by 2 and by 3: a label each.
fn several(ids: Vec<u32>) -> Example {
    let last = *ids.last().unwrap();
    let labels = [last.is_multiple_of(2), last.is_multiple_of(3), last > 35];
    let labels = (0..3).filter(|label| labels[*label]).collect();
    Example::Labels { ids, labels }
}

fn number(ids: Vec<u32>) -> Example {
    let score = Score::new(f64::from(*ids.last().unwrap()) / 35.0 - 1.0).unwrap();
    Example::Score { ids, score }
}

fn with(problem: Problem, plan: TrainPlan) -> TrainPlan {
    let Method::Class {
        head_only, labels, ..
    } = plan.method
    else {
        panic!("a head")
    };
    let labels = match problem {
        Problem::Regression => vec!["score".to_owned()],
        _ => labels,
    };
    let options = HeadOptions {
        problem,
        out_of_scope_share: (problem == Problem::SingleLabel).then_some(0.1),
        ..HeadOptions::default()
    };
    TrainPlan {
        method: Method::Class {
            labels,
            head_only,
            options,
        },
        ..plan
    }
}

pub(super) fn labels_plan(head_only: bool) -> TrainPlan {
    let plan = with(Problem::MultiLabel, class_plan(head_only));
    TrainPlan {
        train: answered(40, 1, several),
        valid: Some(answered(20, 2, several)),
        ..plan
    }
}

pub(super) fn score_plan(head_only: bool) -> TrainPlan {
    let plan = with(Problem::Regression, class_plan(head_only));
    TrainPlan {
        train: answered(40, 1, number),
        valid: Some(answered(20, 2, number)),
        ..plan
    }
}

/// A head with hidden layers.
pub(super) fn deep_plan(head_only: bool) -> TrainPlan {
    let mut plan = with(Problem::SingleLabel, class_plan(head_only));
    if let Method::Class { options, .. } = &mut plan.method {
        options.hidden_layers = vec![16, 8];
        options.activation = Some(if head_only {
            Activation::Tanh
        } else {
            Activation::Gelu
        });
    }
    plan
}

/// A head on the mean of all states, whose inputs are dropped now and then.
pub(super) fn mean_plan(head_only: bool) -> TrainPlan {
    let mut plan = deep_plan(head_only);
    if let Method::Class { options, .. } = &mut plan.method {
        options.pooling = Pooling::Mean;
        options.dropout = 0.2;
    }
    plan
}

fn evals(events: &[TrainEvent]) -> Vec<EvalReport> {
    let eval = |event: &TrainEvent| match event {
        TrainEvent::Eval(eval) => Some(*eval),
        _ => None,
    };
    events.iter().filter_map(eval).collect()
}

fn settings(on: &Under<Backend>, finished: &Finished) -> HeadSettings {
    let shape = model(on).config().base_shape();
    let read = peft::read(&finished.artifact, &shape, &peft::Limits::default());
    read.unwrap().1.head.unwrap().settings
}

#[test]
fn every_problem_is_learnt_and_told() {
    let on = host();
    for head_only in [false, true] {
        for mut plan in [
            with(Problem::SingleLabel, class_plan(head_only)),
            labels_plan(head_only),
            score_plan(head_only),
        ] {
            plan.hp.epochs = Some(8);
            let (finished, events) = finish(&mut Trainer::new(model(&on), plan).unwrap(), &Unpaced);
            let summary = &finished.summary;
            assert!(
                summary.last_loss < 0.9 * summary.first_loss,
                "{head_only} {summary:?}"
            );
            let held = summary.held_out.as_ref().unwrap();
            assert_eq!(held.examples, 20);
            assert_eq!(settings(&on, &finished), held.settings);
            let best = summary.best.unwrap();
            let kept = evals(&events).into_iter().find(|e| e.step == best.step);
            let kept = kept.unwrap();
            // The result is that of the evaluation whose weights are kept.
            assert_eq!(held.quality.macro_f1(), kept.macro_f1);
            match &held.quality {
                Quality::SingleLabel { confusion, .. } => {
                    assert_eq!(held.quality.accuracy(), Some(kept.accuracy));
                    assert_eq!(confusion.iter().sum::<u64>(), 20);
                    assert!(held.settings.temperature.is_some());
                    assert!(held.log_loss.unwrap() <= kept.loss + 1e-3, "{held:?}");
                    assert!(held.settings.out_of_scope_below.is_some());
                }
                Quality::MultiLabel { .. } => {
                    assert_eq!(held.quality.accuracy(), Some(kept.accuracy));
                    assert_eq!(held.settings.temperature, None);
                }
                Quality::Regression {
                    mean_squared_error, ..
                } => assert!((mean_squared_error / kept.loss - 1.0).abs() < 1e-6),
            }
        }
    }
}

#[test]
fn without_validation_nothing_is_fitted() {
    let on = host();
    let mut plan = with(Problem::SingleLabel, class_plan(true));
    plan.valid = None;
    let (finished, _) = finish(&mut Trainer::new(model(&on), plan).unwrap(), &Unpaced);
    assert_eq!(finished.summary.held_out, None);
    assert_eq!(finished.artifact.head_json, None);
    let mut plan = labels_plan(true);
    plan.valid = None;
    let (finished, _) = finish(&mut Trainer::new(model(&on), plan).unwrap(), &Unpaced);
    assert_eq!(settings(&on, &finished).problem, Problem::MultiLabel);
}

/// A label that counts twice is an example that comes twice.
#[test]
fn a_weight_of_two_is_an_example_twice() {
    let on = host();
    let mut plan = class_plan(false);
    let items = plan.train.items[..6].to_vec();
    let doubled = |example: &Example| matches!(example, Example::Class { label: 1, .. });
    assert!(items.iter().any(doubled) && !items.iter().all(doubled));
    let mut twice = items.clone();
    twice.extend(items.iter().filter(|item| doubled(item)).cloned());
    let mut plain = Trainer::new(model(&on), plan.clone()).unwrap();
    let repeated = plain.step_on(&twice, &Unpaced).unwrap();
    let Method::Class { options, .. } = &mut plan.method else {
        panic!("a head")
    };
    options.class_weights = Some(vec![1.0, 2.0, 1.0]);
    let mut weighted = Trainer::new(model(&on), plan).unwrap();
    let weighted = weighted.step_on(&items, &Unpaced).unwrap();
    for (found, expected) in [
        (weighted.loss, repeated.loss),
        (weighted.grad_norm, repeated.grad_norm),
    ] {
        assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
    }
    let unweighted = plain.step_on(&items, &Unpaced).unwrap();
    assert!((unweighted.loss / repeated.loss - 1.0).abs() > 1e-3);
}

#[test]
fn what_a_problem_has_no_use_for_is_refused() {
    let on = host();
    let refused = |change: &dyn Fn(&mut TrainPlan)| {
        let mut plan = score_plan(true);
        change(&mut plan);
        Trainer::new(model(&on), plan).unwrap_err().to_string()
    };
    let options = |plan: &mut TrainPlan, change: &dyn Fn(&mut HeadOptions)| {
        if let Method::Class { options, .. } = &mut plan.method {
            change(options);
        }
    };
    let width = refused(&|plan| options(plan, &|o| o.hidden_layers = vec![12]));
    assert!(
        width.contains("hidden_layers") && width.contains("12"),
        "{width}"
    );
    let init = {
        let trained = Trainer::new(model(&on), score_plan(true)).unwrap();
        trained.weights()
    };
    let stack = refused(&|plan| {
        plan.init = Some(init.clone());
        options(plan, &|o| {
            o.hidden_layers = vec![8];
            o.activation = Some(Activation::Relu);
        });
    });
    assert!(
        stack.contains("no hidden layers") && stack.contains("8 with relu"),
        "{stack}"
    );
    let weights = refused(&|plan| options(plan, &|o| o.class_weights = Some(vec![1.0])));
    assert!(weights.contains("class_weights"), "{weights}");
    let share = refused(&|plan| options(plan, &|o| o.out_of_scope_share = Some(0.1)));
    assert!(share.contains("out_of_scope_share"), "{share}");
    let kind = refused(&|plan| plan.train = classes(4, 1).0);
    assert!(kind.contains("regression"), "{kind}");
    let kind = refused(&|plan| options(plan, &|o| o.problem = Problem::MultiLabel));
    assert!(kind.contains("multi_label"), "{kind}");
}
