//! Batch-mates are invisible, bit for bit; merged weights do what adapters do.

use espalier_adapters::linear::merged;
use espalier_adapters::ops::Backend;

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
        site.a.pop();
    }
    let misfit = ResidentAdapter::build(&wrong, &model).unwrap_err();
    assert!(
        misfit.to_string().contains("model.layers.1.mlp.up_proj"),
        "{misfit}"
    );
}
