//! Batch-mates are invisible, bit for bit; merged weights do what adapters do.

use espalier_adapters::config::LayerTensor;
use espalier_adapters::linear::merged;
use espalier_adapters::ops::Cpu;
use espalier_adapters::weights::Numbers;
use half::{bf16, f16};

use super::*;

fn part<O: Ops>(
    config: &ModelConfig,
    len: usize,
    seed: u64,
    adapter: &Option<Arc<ResidentAdapter<O>>>,
) -> Asked<O> {
    Asked {
        ids: random_ids(config, len, seed),
        adapters: adapter.clone().into(),
    }
}

#[test]
fn rows_do_not_depend_on_how_many_there_are() {
    rows_do_not_know_how_many_there_are(&host(), &FAMILIES);
}

pub(crate) fn rows_do_not_know_how_many_there_are<O: Ops>(on: &Under<O>, families: &[Family]) {
    for &family in families {
        let config = (on.sizes)(family);
        let model = on.model(&config, 1);
        let adapter = Some(resident(
            &model,
            &random_adapter(&model, |_, _| true, false, 2),
        ));
        let whole = on
            .states(&model, &[part(&config, 33, 3, &adapter)], 33)
            .remove(0);
        for chunk in [1, 2, 7] {
            let cut = on
                .states(&model, &[part(&config, 33, 3, &adapter)], chunk)
                .remove(0);
            assert_eq!(cut, whole, "{family:?} in chunks of {chunk}");
        }
        let logits = logits_of(&model, &[(&whole, &Mixture::default())]);
        for rows in [1, 2, 7] {
            let some = logits_of(
                &model,
                &[(&whole[..rows * config.hidden], &Mixture::default())],
            );
            assert_eq!(some.len(), rows * config.vocab);
            assert_eq!(some, logits[..some.len()], "logits of {rows} rows");
        }
    }
}

#[test]
fn a_mixed_batch_is_each_alone() {
    mixed_is_alone(&host());
}

pub(crate) fn mixed_is_alone<O: Ops>(on: &Under<O>) {
    let config = (on.sizes)(Family::Qwen2);
    let model = on.model(&config, 1);
    let all = Some(resident(
        &model,
        &random_adapter(&model, |_, _| true, false, 2),
    ));
    let some = Some(resident(
        &model,
        &random_adapter(&model, |layer, site| layer > 0 && site != Site::K, false, 3),
    ));
    let dora = Some(resident(
        &model,
        &random_adapter(&model, |_, _| true, true, 4),
    ));
    let ia3 = Some(resident(&model, &random_scales(&model, |_, _| true, 5)));
    let whole = Some(resident(&model, &random_deltas(&model, |_| true, 6)));
    let top = |tensor| match tensor {
        BaseTensor::Layer(layer, part) => layer == 1 && part != LayerTensor::AttnNorm,
        BaseTensor::FinalNorm => true,
        BaseTensor::Embedding | BaseTensor::Output => false,
    };
    let other = Some(resident(&model, &random_deltas(&model, top, 7)));
    let lens = [
        (6, &whole),
        (8, &other),
        (7, &ia3),
        (5, &all),
        (19, &all),
        (1, &some),
        (12, &None),
        (9, &dora),
        (4, &ia3),
        (5, &whole),
        (3, &None),
    ];
    let mixed: Vec<Asked<O>> = lens
        .iter()
        .enumerate()
        .map(|(i, (len, adapter))| part(&config, *len, i as u64, adapter))
        .collect();
    for chunk in [4, 32] {
        let together = on.states(&model, &mixed, chunk);
        let states = together.iter().map(Vec::as_slice);
        let parts = states.zip(mixed.iter().map(|part| &part.adapters));
        let logits = logits_of(&model, &parts.collect::<Vec<_>>());
        let mut logits = logits.chunks_exact(config.vocab);
        for (index, part) in mixed.iter().enumerate() {
            let one = Asked {
                ids: part.ids.clone(),
                adapters: part.adapters.clone(),
            };
            let alone = &on.states(&model, std::slice::from_ref(&one), 32)[0];
            assert_eq!(alone, &together[index], "sequence {index}");
            for row in logits_of(&model, &[(alone, &one.adapters)]).chunks_exact(config.vocab) {
                assert_eq!(Some(row), logits.next(), "logits of sequence {index}");
            }
        }
    }
    let bare = Asked {
        ids: mixed[4].ids.clone(),
        adapters: Mixture::default(),
    };
    assert!(
        distance(
            &on.states(&model, &[bare], 32)[0],
            &on.states(&model, &mixed, 32)[4]
        ) > 1e-2,
        "adapters change states"
    );
}

#[test]
fn sixteen_bits_serve_as_their_widened_copy() {
    sixteen_bits_are_their_widened_copy(&host());
}

pub(crate) fn sixteen_bits_are_their_widened_copy<O: Ops>(on: &Under<O>) {
    let config = (on.sizes)(Family::Llama);
    let model = on.model(&config, 1);
    for dora in [false, true] {
        let mut stored =
            random_adapter(&model, |layer, site| layer != 1 || site != Site::O, dora, 2);
        for (index, site) in stored.sites.values_mut().enumerate() {
            let bf16 = |n: &Numbers| n.to_f32().iter().map(|n| bf16::from_f32(*n)).collect();
            let f16 = |n: &Numbers| n.to_f32().iter().map(|n| f16::from_f32(*n)).collect();
            (site.a, site.b) = match index % 3 {
                0 => (Numbers::Bf16(bf16(&site.a)), Numbers::Bf16(bf16(&site.b))),
                1 => (Numbers::F16(f16(&site.a)), Numbers::F16(f16(&site.b))),
                _ => (Numbers::Bf16(bf16(&site.a)), site.b.clone()),
            };
        }
        let (narrow, wide) = (
            resident(&model, &stored),
            resident(&model, &stored.clone().widened()),
        );
        for adapter in [&narrow, &wide] {
            let weights = if adapter.bytes() == narrow.bytes() {
                stored.clone()
            } else {
                stored.clone().widened()
            };
            let bytes = ResidentAdapter::bytes_for(&weights, &model);
            assert_eq!(bytes, adapter.bytes(), "known before it is built");
        }
        assert!(narrow.bytes() < wide.bytes());
        if !dora {
            assert_eq!(
                narrow.weights(&on.ops),
                Some(stored),
                "given back as stored"
            );
        }
        let run = |adapter: &Arc<ResidentAdapter<O>>| {
            on.states(&model, &[part(&config, 19, 3, &Some(adapter.clone()))], 7)
        };
        assert_eq!(run(&narrow), run(&wide), "widening is exact");
    }
}

fn matrix(layer: &mut LayerWeights, site: Site) -> &mut Vec<f32> {
    match site {
        Site::Q => &mut layer.q,
        Site::K => &mut layer.k,
        Site::V => &mut layer.v,
        Site::O => &mut layer.o,
        Site::Gate => &mut layer.gate,
        Site::Up => &mut layer.up,
        Site::Down => &mut layer.down,
    }
}

#[test]
fn merged_is_unmerged() {
    merged_does_what_the_adapter_does(&host());
}

pub(crate) fn merged_does_what_the_adapter_does<O: Ops>(on: &Under<O>) {
    let config = (on.sizes)(Family::Qwen2);
    let model = on.model(&config, 1);
    for dora in [false, true] {
        let adapter = random_adapter(
            &model,
            |layer, site| layer != 1 || site != Site::Up,
            dora,
            2,
        );
        let mut weights = random_weights(&config, 1);
        for ((layer, site), delta) in &adapter.sites {
            let weight = matrix(&mut weights.layers[*layer], *site);
            *weight = merged(weight, delta);
        }
        let ids = random_ids(&config, 21, 5);
        let unmerged = on.logits(&model, &ids, Some(resident(&model, &adapter)));
        let merged = on.packed(&config, weights);
        let off = distance(&unmerged, &on.logits(&merged, &ids, None));
        assert!(off < on.tolerance, "merged is off by {off} (DoRA: {dora})");
        assert!(
            distance(&unmerged, &on.logits(&model, &ids, None)) > 1e-2,
            "the adapter changes logits"
        );
    }
}

/// Base weights with `sum of weight * s B A` added, in f64.
fn with_sum(config: &ModelConfig, parts: &[(&AdapterWeights, f32)]) -> ModelWeights {
    let mut weights = random_weights(config, 1);
    for (adapter, weight) in parts {
        for ((layer, site), delta) in &adapter.sites {
            let matrix = matrix(&mut weights.layers[*layer], *site);
            let scaled = SiteAdapter {
                scale: delta.scale * weight,
                ..delta.clone()
            };
            *matrix = merged(matrix, &scaled);
        }
    }
    weights
}

#[test]
fn a_mixture_is_the_sum_of_its_parts() {
    mixtures_are_sums(&host());
}

pub(crate) fn mixtures_are_sums<O: Ops>(on: &Under<O>) {
    let config = (on.sizes)(Family::Qwen2);
    let model = on.model(&config, 1);
    // Ranks differ by site, sites by adapter, and no weight or scale is 1.
    let (left, right, third) = (
        random_adapter(&model, |layer, _| layer != 1, false, 2),
        random_adapter(&model, |_, site| site != Site::V, false, 3),
        random_adapter(
            &model,
            |_, site| site == Site::V || site == Site::Down,
            false,
            4,
        ),
    );
    let ids = random_ids(&config, 21, 5);
    let logits_of = |adapters: Mixture<O>| {
        let ids = ids.clone();
        let hidden = on.states(&model, &[Asked { ids, adapters }], 7).remove(0);
        logits_of(&model, &[(&hidden, &Mixture::default())])
    };
    let residents = [&left, &right, &third].map(|adapter| resident(&model, adapter));
    let mixture = |weights: [f32; 3]| {
        Mixture::new(residents.iter().cloned().zip(weights).collect::<Vec<_>>())
    };
    let weights = [0.7, -0.4, 1.5];
    let mixed = logits_of(mixture(weights));
    let alone = |parts: &[(&AdapterWeights, f32)]| {
        let merged = on.packed(&config, with_sum(&config, parts));
        on.logits(&merged, &ids, None)
    };
    let sum = alone(&[(&left, 0.7), (&right, -0.4), (&third, 1.5)]);
    let off = distance(&mixed, &sum);
    assert!(off < on.tolerance, "the mixture is off by {off}");
    // What a mistake would compute is far away: a part left out, or weights exchanged.
    for wrong in [
        alone(&[(&left, 0.7), (&third, 1.5)]),
        alone(&[(&left, -0.4), (&right, 0.7), (&third, 1.5)]),
        alone(&[(&left, 1.0), (&right, 1.0), (&third, 1.0)]),
    ] {
        assert!(distance(&mixed, &wrong) > 1e-2);
    }
    // One adapter with a weight is that adapter with another scale; weight 0 is the base, bit for bit.
    let half = logits_of(Mixture::new(vec![(residents[0].clone(), 0.5)]));
    assert!(distance(&half, &alone(&[(&left, 0.5)])) < on.tolerance);
    assert_eq!(
        logits_of(mixture([0.0, 0.0, -0.0])),
        on.logits(&model, &ids, None)
    );
}

#[test]
fn a_mixture_is_the_same_alone_and_in_any_batch() {
    mixtures_do_not_know_their_batch(&host());
}

pub(crate) fn mixtures_do_not_know_their_batch<O: Ops>(on: &Under<O>) {
    let config = (on.sizes)(Family::Llama);
    let model = on.model(&config, 1);
    let one = resident(&model, &random_adapter(&model, |_, _| true, false, 2));
    let two = resident(
        &model,
        &random_adapter(&model, |layer, _| layer > 0, false, 3),
    );
    let both = |l, r| Mixture::new(vec![(one.clone(), l), (two.clone(), r)]);
    let asked: Vec<Asked<O>> = [
        (9, both(0.7, 0.3)),
        (1, both(0.7, 0.3)),
        (17, Some(two.clone()).into()),
        (30, both(0.3, 0.7)),
        (4, Mixture::default()),
        (
            2,
            Mixture::new(vec![(two.clone(), 0.3), (one.clone(), 0.7)]),
        ),
    ]
    .into_iter()
    .enumerate()
    .map(|(seed, (len, adapters))| Asked {
        ids: random_ids(&config, len, seed as u64),
        adapters,
    })
    .collect();
    for chunk in [1, 5, 32] {
        let together = on.states(&model, &asked, chunk);
        for (part, together) in asked.iter().zip(&together) {
            let alone = Asked {
                ids: part.ids.clone(),
                adapters: part.adapters.clone(),
            };
            assert_eq!(&on.states(&model, &[alone], 32)[0], together);
        }
    }
}

#[test]
fn memory_of_another_adapter_leaves_no_trace() {
    let model: Decoder<Cpu> = random_model(&small(Family::Llama), 1);
    for dora in [false, true] {
        let adapter = random_adapter(&model, |layer, _| layer != 2, dora, 2);
        let fresh = resident(&model, &adapter);
        // As large, so that its memory is taken; as a whole, nothing of it is right.
        let spare = random_adapter(&model, |layer, _| layer != 2, dora, 3);
        let mut spare = ResidentAdapter::build(&spare, &model).unwrap();
        let memory = spare.parameters().as_ptr();
        spare.part_mut(0..spare.parameter_count()).fill(f32::NAN);
        let again = ResidentAdapter::build_in(Some(spare), &adapter, &model).unwrap();
        assert_eq!(
            again.parameters().as_ptr(),
            memory,
            "the memory was not used again"
        );
        assert_eq!(again.parameters(), fresh.parameters());
        for site in Site::ALL {
            let gain = |adapter: &'_ ResidentAdapter<Cpu>| {
                adapter.site(0, site).unwrap().gain.map(<[f32]>::to_vec)
            };
            assert_eq!(gain(&again), gain(&fresh), "{site:?}");
        }
        assert_eq!(again.bytes(), fresh.bytes());
    }
}

#[test]
fn an_adapter_comes_back_as_it_went_in() {
    adapters_come_back(&host());
}

pub(crate) fn adapters_come_back<O: Ops>(on: &Under<O>) {
    let model = on.model(&(on.sizes)(Family::Llama), 1);
    let adapter = random_adapter(&model, |layer, _| layer != 2, false, 2);
    let found = resident(&model, &adapter).weights(&on.ops);
    assert_eq!(found, Some(adapter.clone()));
    let mut wrong = adapter;
    if let Some(site) = wrong.sites.get_mut(&(1, Site::Up)) {
        site.a = site.a.to_f32().iter().copied().skip(1).collect();
    }
    let misfit = ResidentAdapter::build(&wrong, &model).unwrap_err();
    assert!(
        misfit.to_string().contains("model.layers.1.mlp.up_proj"),
        "{misfit}"
    );
}
