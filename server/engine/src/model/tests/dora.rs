//! DoRA in training: gains follow the factors, and a segment that has them changes nobody else's numbers.

use espalier_adapters::batch::Pass;
use espalier_adapters::linear::{AdapterGrads, row_norms};
use espalier_adapters::ops::{Cpu, Reference};
use espalier_adapters::pace::Unpaced;

use super::*;
use crate::model::tests::precision::kept_weights;
use crate::model::{Dtype, TrainRows};

fn trainable<O: Ops>(model: &Decoder<O>, weights: &AdapterWeights) -> ResidentAdapter<O> {
    ResidentAdapter::trainable(weights, model).unwrap()
}

/// Every site's gains.
fn gains<O: Ops>(model: &Decoder<O>, adapter: &ResidentAdapter<O>) -> Vec<f64> {
    let mut all = Vec::new();
    for (layer, site) in (0..model.layers()).flat_map(|l| Site::ALL.map(|site| (l, site))) {
        let gain = adapter.site(layer, site).and_then(|view| view.gain);
        let mut numbers = vec![O::T::ZERO; model.ops().dims(model.weight(layer, site)).0];
        model.ops().read(gain.unwrap(), &mut numbers);
        all.extend(numbers.iter().map(|gain| gain.to_f64()));
    }
    all
}

/// How far renewed gains are from those of f64 sums over the whole of `W + s B A`, relatively.
pub(crate) fn gains_off<O: Ops>(model: &Decoder<O>) -> f64 {
    let first = random_adapter(model, |_, _| true, true, 2);
    let moved = random_adapter(model, |_, _| true, true, 3);
    let mut adapter = trainable(model, &first);
    let ops = model.ops().apart();
    let mut parameters = vec![O::T::ZERO; adapter.parameter_count()];
    ops.read(trainable(model, &moved).parameters(), &mut parameters);
    let all = 0..adapter.parameter_count();
    ops.write(&parameters, adapter.part_mut(all));
    adapter.renew_gains(model, &ops, &Unpaced);
    ops.wait();
    let served = ResidentAdapter::build(&moved, model).unwrap();
    assert_eq!(
        adapter.weights(&ops).unwrap(),
        moved,
        "magnitudes come back"
    );
    let (found, exact) = (gains(model, &adapter), gains(model, &served));
    let off = found.iter().zip(&exact).map(|(f, e)| (f / e - 1.0).abs());
    off.fold(0.0, f64::max)
}

#[test]
fn gains_follow_the_factors() {
    for family in FAMILIES {
        let off = gains_off(&random_model::<Reference<f64>>(&small(family), 1));
        assert!(off < 1e-10, "{family:?}: {off}");
    }
    let config = small(Family::Llama);
    for (dtype, bound) in Dtype::ALL.map(|d| (d, if d == Dtype::Q8 { 2e-2 } else { 2e-5 })) {
        let model = host().packed(&config, kept_weights(&config, 1, dtype, false));
        let off = gains_off(&model);
        assert!(off < bound, "{dtype}: {off}");
    }
}

#[test]
fn magnitudes_of_w_leave_the_base_as_it_is() {
    let model: Decoder<Cpu> = random_model(&small(Family::Llama), 1);
    let mut weights = random_adapter(&model, |_, _| true, true, 2);
    for ((layer, site), adapter) in &mut weights.sites {
        adapter.b = vec![0.0; adapter.b.len()].into();
        adapter.magnitude = Some(row_norms(model.ops(), model.weight(*layer, *site)));
    }
    let off = gains(&model, &trainable(&model, &weights));
    let off = off
        .iter()
        .fold(0.0f64, |off, gain| off.max((gain - 1.0).abs()));
    assert!(off < 1e-6, "{off}");
}

/// Gradients of five segments: LoRA, DoRA, (IA)3, whole tensors and nobody's rows.
fn together(model: &Decoder<Cpu>, with: [bool; 4]) -> [Vec<f32>; 4] {
    let ops = model.ops();
    let adapters = [
        random_adapter(model, |_, _| true, false, 2),
        random_adapter(model, |_, _| true, true, 2),
        random_scales(model, |_, _| true, 2),
        random_deltas(model, |_| true, 2),
    ];
    let adapters = adapters.map(|weights| Arc::new(trainable(model, &weights)));
    let lens = [7, 9, 6, 8, 5];
    let mut runs = Vec::new();
    let (mut tokens, mut sequences, mut upstream) = (Vec::new(), Vec::new(), Vec::new());
    for (index, len) in lens.into_iter().enumerate() {
        if with.get(index) == Some(&false) {
            continue;
        }
        sequences.push(tokens.len()..tokens.len() + len);
        tokens.extend(random_ids(model.config(), len, index as u64));
        let adapter = adapters.get(index).map(Arc::clone);
        runs.push((len, Mixture::from(adapter)));
        let mut rng = ChaCha8Rng::seed_from_u64(index as u64);
        upstream.extend((0..len * model.config().hidden).map(|_| rng.random_range(-1.0..1.0f32)));
    }
    let segments = Segment::join(runs);
    let pass = Pass::new(ops, model.layers(), &segments, &Unpaced);
    let rows = TrainRows {
        tokens: &tokens,
        sequences: &sequences,
    };
    let (mut saved, mut workspace) = (Saved::new(ops), Workspace::new(ops));
    saved.lowest = Some(0);
    model
        .forward_train(&pass, rows, &mut saved, &mut workspace)
        .unwrap();
    let owner = |segment: &Segment<Cpu>| {
        let part = segment
            .adapters
            .parts()
            .next()
            .map(|(adapter, _)| adapter)?;
        adapters
            .iter()
            .position(|own| std::ptr::eq(own.as_ref(), part))
    };
    let owners: Vec<_> = segments.iter().map(owner).collect();
    let grads = owners
        .iter()
        .map(|owner| owner.map(|o| AdapterGrads::of(ops, &adapters[o])));
    let mut grads: Vec<_> = grads.collect();
    let upstream = written(ops, &upstream);
    model
        .backward(
            &pass,
            rows,
            &mut saved,
            &upstream,
            &mut grads,
            &mut workspace,
        )
        .unwrap();
    [0, 1, 2, 3].map(|own| {
        let at = owners.iter().position(|owner| *owner == Some(own));
        let grads = at.and_then(|at| grads[at].as_ref());
        grads.map(|grads| grads.all().to_vec()).unwrap_or_default()
    })
}

#[test]
fn gradients_are_the_same_alone_and_in_company() {
    let model: Decoder<Cpu> = random_model(&small(Family::Qwen3), 1);
    let all = together(&model, [true; 4]);
    for (own, name) in ["LoRA", "DoRA", "(IA)3", "unfrozen"]
        .into_iter()
        .enumerate()
    {
        let alone = together(&model, [0, 1, 2, 3].map(|other| other == own));
        assert_eq!(all[own], alone[own], "{name} beside the others");
        assert!(
            all[own].iter().any(|gradient| gradient.abs() > 1e-2),
            "{name}"
        );
    }
}
