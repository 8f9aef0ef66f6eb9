//! Batch-mates are invisible, bit for bit; merged weights do what adapters do.

use espalier_adapters::linear::merged;
use espalier_adapters::ops::Backend;
use espalier_adapters::weights::Numbers;
use half::{bf16, f16};

use super::*;

fn part(
    config: &ModelConfig,
    len: usize,
    seed: u64,
    adapter: &Option<Arc<ResidentAdapter>>,
) -> Asked<f32> {
    Asked {
        ids: random_ids(config, len, seed),
        adapter: adapter.clone(),
    }
}

#[test]
fn rows_do_not_depend_on_how_many_there_are() {
    for family in FAMILIES {
        let config = small(family);
        let model: Model = random_model(&config, 1);
        let adapter = Some(resident(
            &model,
            &random_adapter(&model, |_, _| true, false, 2),
        ));
        let whole = states(&model, &[part(&config, 33, 3, &adapter)], 33).remove(0);
        for chunk in [1, 2, 7] {
            let cut = states(&model, &[part(&config, 33, 3, &adapter)], chunk).remove(0);
            assert_eq!(cut, whole, "{family:?} in chunks of {chunk}");
        }
        let mut logits = vec![0.0; 33 * config.vocab];
        model.logits(&whole, &mut logits);
        for rows in [1, 2, 7] {
            let mut some = vec![0.0; rows * config.vocab];
            model.logits(&whole[..rows * config.hidden], &mut some);
            assert_eq!(some, logits[..some.len()], "logits of {rows} rows");
        }
    }
}

#[test]
fn a_mixed_batch_is_each_alone() {
    let config = small(Family::Qwen2);
    let model: Model = random_model(&config, 1);
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
    let lens = [
        (5, &all),
        (19, &all),
        (1, &some),
        (12, &None),
        (9, &dora),
        (3, &None),
    ];
    let mixed: Vec<Asked<f32>> = lens
        .iter()
        .enumerate()
        .map(|(i, (len, adapter))| part(&config, *len, i as u64, adapter))
        .collect();
    for chunk in [4, 32] {
        let together = states(&model, &mixed, chunk);
        for (index, part) in mixed.iter().enumerate() {
            let one = Asked {
                ids: part.ids.clone(),
                adapter: part.adapter.clone(),
            };
            assert_eq!(
                states(&model, &[one], 32)[0],
                together[index],
                "sequence {index}"
            );
        }
    }
    let bare = Asked {
        ids: mixed[1].ids.clone(),
        adapter: None,
    };
    assert!(
        distance(
            &states(&model, &[bare], 32)[0],
            &states(&model, &mixed, 32)[1]
        ) > 1e-2,
        "adapters change states"
    );
}

#[test]
fn sixteen_bits_serve_as_their_widened_copy() {
    let config = small(Family::Llama);
    let model: Model = random_model(&config, 1);
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
            let bytes = ResidentAdapter::<f32>::bytes_for(&weights, config.layers);
            assert_eq!(bytes, adapter.bytes(), "known before it is built");
        }
        assert!(narrow.bytes() < wide.bytes());
        if !dora {
            assert_eq!(narrow.weights(), Some(stored), "given back as stored");
        }
        let run = |adapter: &Arc<ResidentAdapter>| {
            states(&model, &[part(&config, 19, 3, &Some(adapter.clone()))], 7)
        };
        assert_eq!(run(&narrow), run(&wide), "widening is exact");
    }
}

#[test]
fn merged_is_unmerged() {
    let config = small(Family::Qwen2);
    let model: Model = random_model(&config, 1);
    for dora in [false, true] {
        let adapter = random_adapter(
            &model,
            |layer, site| layer != 1 || site != Site::Up,
            dora,
            2,
        );
        let mut weights = random_weights(&config, 1);
        for ((layer, site), delta) in &adapter.sites {
            let layer = &mut weights.layers[*layer];
            let weight = match site {
                Site::Q => &mut layer.q,
                Site::K => &mut layer.k,
                Site::V => &mut layer.v,
                Site::O => &mut layer.o,
                Site::Gate => &mut layer.gate,
                Site::Up => &mut layer.up,
                Site::Down => &mut layer.down,
            };
            *weight = merged(weight, delta);
        }
        let ids = random_ids(&config, 21, 5);
        let unmerged = logits(&model, &ids, Some(resident(&model, &adapter)));
        let merged: Decoder<Backend> = Decoder::new(config.clone(), weights).unwrap();
        let off = distance(&unmerged, &logits(&merged, &ids, None));
        assert!(off < 1e-4, "merged is off by {off} (DoRA: {dora})");
        assert!(
            distance(&unmerged, &logits(&model, &ids, None)) > 1e-2,
            "the adapter changes logits"
        );
    }
}

#[test]
fn an_adapter_comes_back_as_it_went_in() {
    let model: Model = random_model(&small(Family::Llama), 1);
    let adapter = random_adapter(&model, |layer, _| layer != 2, false, 2);
    assert_eq!(resident(&model, &adapter).weights(), Some(adapter.clone()));
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
