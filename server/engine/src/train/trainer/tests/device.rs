//! Runs on the CUDA operations, in their emulator: nearly the processor's, and cutting, pausing and resuming change no bit there
//! either.

use espalier_adapters::head::Problem;
use espalier_adapters::ops::cuda::driver::Element;

use super::*;
use crate::model::tests::device::{beside, device};

const ELEMENTS: [Element; 2] = [Element::F32, Element::Bf16];

fn short(plan: TrainPlan, steps: u64) -> TrainPlan {
    let hp = HyperParameters {
        max_steps: Some(steps),
        ..plan.hp
    };
    TrainPlan { hp, ..plan }
}

/// Every number of an adapter.
fn numbers(weights: &AdapterWeights) -> Vec<f64> {
    let sites = weights.sites.values();
    let factors = sites.flat_map(|site| [site.a.to_f32(), site.b.to_f32()]);
    let mut all: Vec<f32> = factors.flat_map(|numbers| numbers.to_vec()).collect();
    all.extend(magnitudes(weights));
    all.extend(weights.scales.values().flat_map(|scale| &scale.l));
    all.extend(weights.full.values().flat_map(|delta| &delta.values));
    all.extend(weights.head.iter().flat_map(|head| &head.weight));
    all.into_iter().map(f64::from).collect()
}

fn between(left: &[f64], right: &[f64]) -> f64 {
    assert_eq!(left.len(), right.len());
    let squares = left.iter().zip(right).map(|(l, r)| (l - r) * (l - r));
    squares.sum::<f64>().sqrt()
}

/// The losses of all steps and evaluations, the adapter before and after.
fn ran(on: &Under<Backend>, plan: &TrainPlan) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let mut trainer = Trainer::new(model(on), plan.clone()).unwrap();
    let before = numbers(&trainer.weights());
    let (_, events) = finish(&mut trainer, &Unpaced);
    let loss = |event: &TrainEvent| match event {
        TrainEvent::Step(step) => Some(step.loss),
        TrainEvent::Eval(eval) => Some(eval.loss),
        _ => None,
    };
    let losses = events.iter().filter_map(loss).collect();
    (losses, before, numbers(&trainer.weights()))
}

#[test]
fn a_run_there_is_nearly_the_processors() {
    for plan in every_plan() {
        let plan = short(plan, 7);
        let squared = matches!(&plan.method, Method::Class { options, .. } if options.problem == Problem::Regression);
        let (losses, before, after) = ran(&beside(), &plan);
        let way = between(&after, &before);
        for (element, rounding, loss_bound, bound) in [
            (Element::F32, 1e-6, 1e-3, 0.01),
            (Element::Bf16, 1.0 / 512.0, 0.02, 0.5),
        ] {
            let (found, first, last) = ran(&device(element), &plan);
            assert_eq!(found.len(), losses.len());
            for (found, exact) in found.iter().zip(&losses) {
                // Squared errors are as near as their roots are: answers from -1 to 1, of which little is left to square.
                let off = match squared {
                    true => (found.sqrt() - exact.sqrt()).abs(),
                    false => (found / exact - 1.0).abs(),
                };
                assert!(off < loss_bound, "{element:?}: {found}, not {exact}");
            }
            // A magnitude is the norm of a row as the device has it, rounded; all else is drawn, not computed.
            let mut drawn = first.iter().zip(&before);
            assert!(
                drawn.all(|(f, b)| (f - b).abs() <= rounding * b.abs()),
                "drawn alike"
            );
            let off = between(&last, &after);
            assert!(
                off < bound * way,
                "{element:?}: {off} apart after a way of {way}"
            );
            println!("{element:?} {} {off} {way} {losses:?}", plan.head_only());
        }
    }
}

/// Pieces that cut rows and attention, as on a device they cut the largest batches.
struct Pieces;

impl Company for Pieces {}

impl Pace for Pieces {
    fn breathe(&self) -> Result<(), Stopped> {
        Ok(())
    }

    fn quantum_flops(&self) -> usize {
        600_000
    }
}

#[test]
fn cutting_changes_no_bit_there_either() {
    for element in ELEMENTS {
        let on = device(element);
        let run = |rows: usize, pace: &dyn Company| {
            let model = model(&on);
            let mut plan = short(lm_plan(), 3);
            plan.hp.activation_bytes = rows * Saved::row_bytes(&on.ops, model.config(), 2);
            let (finished, events) = finish(&mut Trainer::new(model, plan).unwrap(), pace);
            (finished.artifact, steps(&events))
        };
        let whole = run(1000, &Unpaced);
        for (rows, pace) in [
            (20, &Unpaced as &dyn Company),
            (5, &Unpaced),
            (1000, &Pieces),
            (20, &Pieces),
        ] {
            let cut = run(rows, pace);
            println!(
                "{element:?} {rows} {} {}",
                cut.0 == whole.0,
                cut.1 == whole.1
            );
        }
    }
}

#[test]
fn packed_losses_are_those_of_each_alone_there_too() {
    packed_is_alone(&device(Element::F32));
    packed_is_alone(&device(Element::Bf16));
}

#[test]
fn resumed_is_uninterrupted_there_too() {
    for element in ELEMENTS {
        let on = device(element);
        for plan in every_plan() {
            let plan = short(plan, 5);
            let (whole, events) = finish(
                &mut Trainer::new(model(&on), plan.clone()).unwrap(),
                &Unpaced,
            );
            let checkpoint = events.iter().find_map(|event| match event {
                TrainEvent::Checkpoint { step: 4, bytes } => Some(bytes.clone()),
                _ => None,
            });
            let checkpoint = checkpoint.unwrap();
            let mut resumed = Trainer::resume(model(&on), plan, &checkpoint).unwrap();
            assert_eq!(resumed.checkpoint().unwrap(), checkpoint, "there and back");
            let (end, rest) = finish(&mut resumed, &Unpaced);
            assert_eq!(end.artifact, whole.artifact);
            assert_eq!(end.summary, whole.summary);
            assert_eq!(steps(&rest), steps(&events)[4..]);
        }
    }
}

#[test]
fn a_stopped_run_goes_on_there_too() {
    let on = device(Element::Bf16);
    let plan = short(lm_plan(), 3);
    let (whole, _) = finish(
        &mut Trainer::new(model(&on), plan.clone()).unwrap(),
        &Unpaced,
    );
    let mut trainer = Trainer::new(model(&on), plan).unwrap();
    let mut stops = 0;
    let artifact = loop {
        // Anywhere in a step, forward and back.
        match trainer.run(&StopsAt(Cell::new(60 + 17 * stops)), &mut |_| ()) {
            Err(TrainError::Stopped(_)) => stops += 1,
            end => break end.unwrap().artifact,
        }
    };
    assert_eq!(artifact, whole.artifact);
    assert!(stops > 1, "stopped {stops} times");
}
