//! Formats below f32 in a whole model: batch-mates stay invisible, plain formats are f32 on rounded weights, blocks are near it.

use espalier_adapters::ops::Weight;

use super::*;
use crate::model::Dtype;

/// The random weights of `seed` with matrices kept in `dtype`, or, `wide`, as f32 of the same numbers.
pub(crate) fn kept_weights(
    config: &ModelConfig,
    seed: u64,
    dtype: Dtype,
    wide: bool,
) -> ModelWeights {
    let mut weights = random_weights(config, seed);
    for slot in Slot::all(config) {
        if let [_, inputs] = *slot.shape(config).as_slice() {
            let weight = weights.take(slot).unwrap();
            let kept = dtype.keep(weight, inputs);
            weights.keep(
                slot,
                if wide {
                    Weight::F32(kept.into_f32())
                } else {
                    kept
                },
            );
        }
    }
    weights
}

#[test]
fn rows_do_not_know_each_other_in_any_format() {
    no_format_knows_neighbours(&host(), &Dtype::ALL);
}

pub(crate) fn no_format_knows_neighbours<O: Ops>(on: &Under<O>, formats: &[Dtype]) {
    let config = (on.sizes)(Family::Qwen2);
    for &dtype in formats {
        let model = on.packed(&config, kept_weights(&config, 1, dtype, false));
        let adapter = Some(resident(
            &model,
            &random_adapter(&model, |_, _| true, false, 2),
        ));
        let asked = |len: usize, seed: u64, adapter: &Option<Arc<ResidentAdapter<O>>>| Asked {
            ids: random_ids(&config, len, seed),
            adapters: adapter.clone().into(),
        };
        let whole = on.states(&model, &[asked(33, 3, &adapter)], 33).remove(0);
        for chunk in [1, 2, 7] {
            let cut = on
                .states(&model, &[asked(33, 3, &adapter)], chunk)
                .remove(0);
            assert_eq!(cut, whole, "{dtype} in chunks of {chunk}");
        }
        let mixed = [
            asked(33, 3, &adapter),
            asked(20, 4, &None),
            asked(9, 5, &adapter),
        ];
        assert_eq!(
            on.states(&model, &mixed, 8)[0],
            whole,
            "{dtype} beside others"
        );
    }
}

#[test]
fn formats_compute_what_they_stand_for() {
    let config = small(Family::Llama);
    let ids = random_ids(&config, 21, 6);
    let on = host();
    let kept = |dtype, wide| on.packed(&config, kept_weights(&config, 2, dtype, wide));
    let exact = on.logits(&kept(Dtype::F32, false), &ids, None);
    let typical = exact.iter().map(|x| f64::from(x.abs())).sum::<f64>() / exact.len() as f64;
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::Q8] {
        let (model, wide) = (kept(dtype, false), kept(dtype, true));
        assert!(model.bytes() < wide.bytes(), "{dtype} is smaller");
        let (narrow, wide) = (on.logits(&model, &ids, None), on.logits(&wide, &ids, None));
        if dtype == Dtype::Q8 {
            let off = distance(&narrow, &wide);
            assert!(off > 0.0 && off < 0.2 * typical, "{off} of {typical}");
        } else {
            assert_eq!(
                narrow, wide,
                "{dtype} has the bits of f32 on rounded weights"
            );
        }
        let off = distance(&narrow, &exact);
        assert!(
            off > 0.0 && off < 0.3 * typical,
            "{dtype}: {off} of {typical}"
        );
    }
}
