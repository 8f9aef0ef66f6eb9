//! Formats below f32 in a whole model: batch-mates stay invisible, plain formats are f32 on rounded weights, blocks are near it.

use espalier_adapters::ops::Weight;

use super::*;
use crate::model::Dtype;

/// The random model of `seed` with its matrices kept in `dtype`, or, `wide`, as f32 of the same numbers.
pub(crate) fn kept_model(config: &ModelConfig, seed: u64, dtype: Dtype, wide: bool) -> Model {
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
    Decoder::new(config.clone(), weights).unwrap()
}

#[test]
fn rows_do_not_know_each_other_in_any_format() {
    let config = small(Family::Qwen2);
    for dtype in Dtype::ALL {
        let model = kept_model(&config, 1, dtype, false);
        let adapter = Some(resident(
            &model,
            &random_adapter(&model, |_, _| true, false, 2),
        ));
        let asked = |len: usize, seed: u64, adapter: &Option<Arc<ResidentAdapter>>| Asked {
            ids: random_ids(&config, len, seed),
            adapters: adapter.clone().into(),
        };
        let whole = states(&model, &[asked(33, 3, &adapter)], 33).remove(0);
        for chunk in [1, 2, 7] {
            let cut = states(&model, &[asked(33, 3, &adapter)], chunk).remove(0);
            assert_eq!(cut, whole, "{dtype} in chunks of {chunk}");
        }
        let mixed = [
            asked(33, 3, &adapter),
            asked(20, 4, &None),
            asked(9, 5, &adapter),
        ];
        assert_eq!(states(&model, &mixed, 8)[0], whole, "{dtype} beside others");
    }
}

#[test]
fn formats_compute_what_they_stand_for() {
    let config = small(Family::Llama);
    let ids = random_ids(&config, 21, 6);
    let exact = logits(&kept_model(&config, 2, Dtype::F32, false), &ids, None);
    let typical = exact.iter().map(|x| f64::from(x.abs())).sum::<f64>() / exact.len() as f64;
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::Q8] {
        let model = kept_model(&config, 2, dtype, false);
        let wide = kept_model(&config, 2, dtype, true);
        assert!(model.bytes() < wide.bytes(), "{dtype} is smaller");
        let (narrow, wide) = (logits(&model, &ids, None), logits(&wide, &ids, None));
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
