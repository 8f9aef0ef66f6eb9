//! The whole decoder's backward pass against finite differences in f64.

use std::ops::Range;

use espalier_adapters::batch::{Dropout, Pass};
use espalier_adapters::linear::{AdapterGrads, Tensor};
use espalier_adapters::ops::Reference;
use espalier_adapters::pace::{Pace, Stopped, Unpaced};
use espalier_adapters::train::loss::{Learning, LossBuffers, Target, linear_cross_entropy};

use super::*;

type Plain = Reference<f64>;

/// Cuts everything in the smallest pieces.
struct Breathless;

impl Pace for Breathless {
    fn breathe(&self) -> Result<(), Stopped> {
        Ok(())
    }

    fn quantum_flops(&self) -> usize {
        1 << 12
    }
}

struct Run<'a> {
    model: &'a Decoder<Plain>,
    tokens: Vec<u32>,
    sequences: Vec<Range<usize>>,
    upstream: Vec<f64>,
    /// Tokens to be predicted, in the place of `upstream`.
    targets: Vec<Target>,
    dropout: Option<Dropout>,
    inputs_only: bool,
}

impl Run<'_> {
    /// `sum(states * upstream)` or the cross-entropy of the targets, and its gradient in the adapter's parameters.
    fn loss(&self, adapter: &Arc<ResidentAdapter<Plain>>, gradient: bool) -> (f64, Vec<f64>) {
        let segments = [Segment {
            rows: 0..self.tokens.len(),
            adapters: Some(Arc::clone(adapter)).into(),
        }];
        let (ops, layers) = (self.model.ops(), self.model.layers());
        let pass =
            Pass::new(ops, layers, &segments, &Breathless).with_dropout(self.dropout.as_ref());
        let rows = TrainRows {
            tokens: &self.tokens,
            sequences: &self.sequences,
        };
        let mut saved = Saved::new(ops);
        saved.lowest = adapter.lowest_layer();
        saved.inputs_only = self.inputs_only;
        let mut workspace = Workspace::new(ops);
        let states = self
            .model
            .forward_train(&pass, rows, &mut saved, &mut workspace)
            .unwrap();
        let mut grads = vec![Some(AdapterGrads::of(ops, adapter))];
        let mut upstream = written(ops, &self.upstream);
        let loss = if self.targets.is_empty() {
            let states = read(ops, states);
            states.iter().zip(&self.upstream).map(|(y, w)| y * w).sum()
        } else {
            upstream.fill(0.0);
            let vocabulary = &self.model.vocabulary;
            let own = vocabulary.own_output(adapter);
            let learning = Learning {
                states: &mut upstream,
                output: grads[0].as_mut().zip(Some(vocabulary.output_tensor())),
            };
            let (head, targets) = (own.unwrap_or(self.model.head()), &self.targets);
            let (on, buffers) = ((ops, &Breathless as &dyn Pace), &mut LossBuffers::new(ops));
            let judged =
                linear_cross_entropy(on, head, states, targets, Some(learning), buffers).unwrap();
            let weighted = judged.iter().zip(targets);
            weighted.map(|(j, t)| j.loss * f64::from(t.weight)).sum()
        };
        if gradient {
            self.model
                .backward(
                    &pass,
                    rows,
                    &mut saved,
                    &upstream,
                    &mut grads,
                    &mut workspace,
                )
                .unwrap();
        }
        let grads_of = grads[0].as_mut().unwrap();
        grads_of.settle(ops);
        (loss, grads[0].as_ref().unwrap().all().to_vec())
    }
}

fn run(model: &Decoder<Plain>) -> Run<'_> {
    let config = model.config();
    let tokens = random_ids(config, 13, 3);
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let upstream = (0..13 * config.hidden)
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    Run {
        model,
        tokens,
        sequences: vec![0..8, 8..13],
        upstream,
        targets: Vec::new(),
        dropout: None,
        inputs_only: false,
    }
}

/// DoRA's norms are held fixed: gains follow a magnitude that moves, and no factor.
fn check(name: &str, run: &Run<'_>, adapter: &AdapterWeights) {
    let mut adapter = Arc::new(ResidentAdapter::trainable(adapter, run.model).unwrap());
    let magnitudes: Vec<Range<usize>> = adapter
        .tensors()
        .filter(|(_, tensor)| *tensor == Tensor::Magnitude)
        .map(|(range, _)| range)
        .collect();
    let (_, gradient) = run.loss(&adapter, true);
    let largest = gradient.iter().fold(0.0f64, |a, g| a.max(g.abs()));
    assert!(largest > 1e-2, "{name}: a gradient of zeros proves nothing");
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let (mut checked, mut lengths) = (0, 0);
    // A power of two: sums with snapped weights are exact in the single precision that weights are packed in.
    let h = 1.0 / 8192.0;
    while checked < 150 {
        let index = rng.random_range(0..gradient.len());
        // What lies between the parts of the arena is nobody's.
        if gradient[index] == 0.0 {
            continue;
        }
        let at = adapter.parameters()[index];
        let mut value = |offset: f64| {
            let parameter = Arc::get_mut(&mut adapter).unwrap();
            parameter.part_mut(index..index + 1)[0] = at + offset;
            if magnitudes.iter().any(|range| range.contains(&index)) {
                parameter.renew_gains(run.model, run.model.ops(), &Unpaced);
            }
            parameter.renew_whole(run.model, run.model.ops(), &Unpaced);
            run.loss(&adapter, false).0
        };
        let near = value(h) - value(-h);
        let far = value(2.0 * h) - value(-2.0 * h);
        value(0.0);
        let slope = (8.0 * near - far) / (12.0 * h);
        let off = (slope - gradient[index]).abs();
        assert!(
            off <= 1e-6 * largest,
            "{name}[{index}]: {slope}, not {}",
            gradient[index]
        );
        checked += 1;
        lengths += usize::from(magnitudes.iter().any(|range| range.contains(&index)));
    }
    assert!(
        magnitudes.is_empty() || lengths > 10,
        "{name}: {lengths} magnitudes"
    );
}

#[test]
fn every_family_and_site() {
    for family in FAMILIES {
        let model = random_model::<Plain>(
            &ModelConfig {
                layers: 2,
                ..small(family)
            },
            1,
        );
        let adapter = random_adapter(&model, |_, _| true, false, 2);
        check(family.as_str(), &run(&model), &adapter);
    }
}

#[test]
fn upper_layers_single_sites_dropout_and_recomputation() {
    let model = random_model::<Plain>(&small(Family::Qwen3), 1);
    let upper = random_adapter(&model, |layer, _| layer > 0, false, 2);
    check("upper layers", &run(&model), &upper);
    let some = random_adapter(
        &model,
        |layer, site| layer == 1 && matches!(site, Site::K | Site::Down),
        false,
        2,
    );
    check("k and down", &run(&model), &some);
    check(
        "recomputed",
        &Run {
            inputs_only: true,
            ..run(&model)
        },
        &upper,
    );
    let row_keys = (0..13).map(|row| Dropout::row_key(1, 2, 3, row)).collect();
    let dropout = Some(Dropout {
        rate: 0.3,
        row_keys,
    });
    let dropped = Run {
        dropout,
        ..run(&model)
    };
    check("dropout", &dropped, &upper);
    let resident = resident(&model, &upper);
    assert_ne!(
        dropped.loss(&resident, false).0,
        run(&model).loss(&resident, false).0
    );
    let recomputed = Run {
        inputs_only: true,
        ..run(&model)
    };
    assert_eq!(
        recomputed.loss(&resident, true),
        run(&model).loss(&resident, true),
        "recomputing changes no bit"
    );
}

#[test]
fn weight_decomposed() {
    for family in [Family::Qwen2, Family::Llama] {
        let model = random_model::<Plain>(
            &ModelConfig {
                layers: 2,
                ..small(family)
            },
            1,
        );
        let all = random_adapter(&model, |_, _| true, true, 2);
        check("DoRA", &run(&model), &all);
        let some = |layer, site| layer == 1 && matches!(site, Site::Q | Site::Up);
        let some = random_adapter(&model, some, true, 2);
        check("DoRA in part", &run(&model), &some);
    }
}

#[test]
fn scaled() {
    for family in FAMILIES {
        let model = random_model::<Plain>(
            &ModelConfig {
                layers: 2,
                ..small(family)
            },
            1,
        );
        check(
            "(IA)3",
            &run(&model),
            &random_scales(&model, |_, _| true, 2),
        );
        let some = |layer, site| layer == 1 && matches!(site, Site::Q | Site::K | Site::Down);
        check(
            "(IA)3 in part",
            &run(&model),
            &random_scales(&model, some, 3),
        );
    }
}

/// A model whose numbers are multiples of 2^-13.
fn snapped_model(family: Family) -> Decoder<Plain> {
    let config = ModelConfig {
        layers: 2,
        ..small(family)
    };
    let mut weights = random_weights(&config, 1);
    for slot in Slot::all(&config) {
        let numbers = weights.take(slot).unwrap().into_f32();
        weights.set(slot, numbers.into_iter().map(snapped).collect());
    }
    Decoder::new(Plain::default(), config, weights).unwrap()
}

#[test]
fn unfrozen() {
    for family in FAMILIES {
        let model = snapped_model(family);
        let inside = |tensor| matches!(tensor, BaseTensor::Layer(..));
        let all = random_deltas(&model, inside, 2);
        check("unfrozen", &run(&model), &all);
        let on_top = |tensor| matches!(tensor, BaseTensor::Layer(1, _));
        let top = random_deltas(&model, on_top, 3);
        check("unfrozen on top", &run(&model), &top);
        // Few numbers, each of which is looked at: biases and norms beside matrices would hardly be drawn.
        let vector = |tensor: BaseTensor| !tensor.is_matrix();
        check("vectors", &run(&model), &random_deltas(&model, vector, 4));
        let predicts = Run {
            targets: (0..13)
                .filter(|row| row % 5 != 2)
                .map(|row| Target {
                    row,
                    label: (7 * row % 11) as u32,
                    weight: [0.5, 1.0, -0.25][row % 3],
                })
                .collect(),
            // Tokens that come again, so that rows of the table are summed.
            tokens: random_ids(model.config(), 13, 3)
                .iter()
                .map(|id| id % 6)
                .collect(),
            ..run(&model)
        };
        check("whole", &predicts, &random_deltas(&model, |_| true, 5));
        for outside in BaseTensor::OUTSIDE {
            let alone = random_deltas(&model, |tensor| tensor == outside, 6);
            if !alone.full.is_empty() {
                check(outside.module(), &predicts, &alone);
            }
        }
        let again = Run {
            inputs_only: true,
            ..run(&model)
        };
        check("recomputed", &again, &top);
    }
}
