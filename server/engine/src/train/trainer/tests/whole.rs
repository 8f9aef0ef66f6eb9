//! The whole of a base in training, with an output head of its own and with one that is the embedding table too.

use crate::model::BaseSites as _;

use super::*;

/// The first layers, which every base of the tests has, and what stands outside of one with an output head of its own; at a rate
/// for whole tensors, which are not small beside their base.
pub(super) fn plan() -> TrainPlan {
    let mut plan = of(FullConfig {
        modules: BaseTensor::OUTSIDE.map(|t| t.module().to_owned()).to_vec(),
        ..FullConfig::new(vec![0, 1])
    });
    plan.hp.learning_rate = Some(2e-3);
    plan
}

fn of(config: FullConfig) -> TrainPlan {
    TrainPlan {
        adapter: Some(config.into()),
        ..lm_plan()
    }
}

/// A base whose embedding table is its output head.
fn tied() -> Arc<Model> {
    let on = host();
    let model = Arc::new(on.model(&(on.sizes)(Family::Llama), 1));
    assert!(model.config().tie_embeddings);
    model
}

#[test]
fn one_table_in_two_places_is_cut_without_a_bit_of_difference() {
    let model = tied();
    let plan = of(FullConfig::whole(&model.config().base_shape()));
    let run = |activation_bytes: usize, pace: &dyn Company| {
        let mut plan = plan.clone();
        plan.hp.activation_bytes = activation_bytes;
        let mut trainer = Trainer::new(Arc::clone(&model), plan).unwrap();
        finish(&mut trainer, pace).0.artifact
    };
    let whole = run(512 << 20, &Unpaced);
    let row = Saved::row_bytes(model.ops(), model.config(), 3);
    assert_eq!(run(20 * row, &Fine), whole);
    assert_eq!(run(5 * row, &Unpaced), whole);
}

#[test]
fn what_stands_outside_of_layers_learns_alone() {
    let untied = model(&host());
    for (model, modules) in [
        (tied(), [("embed_tokens", 0.01), ("norm", 0.05)].as_slice()),
        (
            untied,
            [("embed_tokens", 0.01), ("norm", 0.05), ("lm_head", 0.01)].as_slice(),
        ),
    ] {
        for (module, rate) in modules {
            let config = FullConfig {
                modules: vec![(*module).to_owned()],
                ..FullConfig::new(Vec::new())
            };
            let mut plan = of(config);
            plan.hp.learning_rate = Some(*rate);
            let mut trainer = Trainer::new(Arc::clone(&model), plan).unwrap();
            let (finished, _) = finish(&mut trainer, &Unpaced);
            let summary = &finished.summary;
            assert!(summary.last_loss < summary.first_loss, "{module}");
            let shape = model.config().base_shape();
            let read = peft::read(&finished.artifact, &shape, &peft::Limits::default());
            let (_, weights, _) = read.unwrap();
            let [(tensor, delta)] = weights.full.iter().collect::<Vec<_>>()[..] else {
                panic!("{:?}", weights.full.keys());
            };
            assert_eq!(tensor.module(), *module);
            // A row of a table that no text has is not looked up, but every row is compared with.
            let seen = *tensor == BaseTensor::Embedding && !shape.tied_embeddings;
            let still = delta.values.iter().filter(|d| **d == 0.0).count();
            assert!(seen || still == 0, "{still} numbers of {module} stay");

            // What is served is what was judged.
            let served = ResidentAdapter::build(&weights, model.as_ref()).unwrap();
            let bytes = ResidentAdapter::bytes_for(&weights, model.as_ref());
            assert_eq!(served.bytes(), bytes);
            let served = (served, Objective::default());
            let mut learner = Learner::new(Arc::clone(&model), served, (1 << 20, 0.0), 1);
            let valid = lm_plan().valid.unwrap();
            let (again, _) = learner.judge(&numbered(&valid.items), &Unpaced).unwrap();
            assert_eq!(again.mean(), summary.best.unwrap().loss, "{module}");
        }
    }
}

#[test]
fn a_head_that_the_base_does_not_have_is_refused() {
    let config = FullConfig {
        modules: vec!["lm_head".to_owned()],
        ..FullConfig::new(Vec::new())
    };
    let error = Trainer::new(tied(), of(config)).unwrap_err().to_string();
    let expected = "lm_head.weight does not exist: a base whose output head is its embedding table";
    assert!(error.contains(expected), "{error}");
}
