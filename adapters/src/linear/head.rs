//! A classification head in memory: states through its stack of fully connected layers to logits, and the way back.
//!
//! Sums are the operations' own; what an activation makes of them is worked out on the host in f64, on every device in the same way:
//! rows are one an example, and few. Each row depends on itself alone. It must not know what logits mean, or whose states they are.

use super::grads::AdapterGrads;
use super::resident::ResidentAdapter;
use crate::batch::Dropout;
use crate::head::Activation;
use crate::ops::{Backend, Buffer, Ops, Real, View, ViewMut};

/// What the way back reads of a head's layers.
#[derive(Debug)]
pub struct HeadTrace<O: Ops = Backend> {
    /// Of the states' numbers and of each hidden layer's outputs, where some are dropped.
    dropout: Option<Dropout>,
    /// The states `[rows, hidden]`, or what dropout left of them.
    states: O::Buf,
    layers: Vec<LayerTrace<O>>,
    /// Sums on their way to the host, and gradients of sums from there; exact.
    sums: O::Buf,
    /// Outputs and gradients of outputs on the far side of dropout from `dinput` and the layers' own.
    undropped: O::Buf,
    /// The gradient of a layer's input `[rows, in]`.
    dinput: O::Buf,
}

/// One hidden layer's.
#[derive(Debug)]
struct LayerTrace<O: Ops> {
    /// Before the activation, `[rows, out]`.
    sums: Vec<O::T>,
    /// Behind it and behind dropout.
    output: O::Buf,
}

/// What layer `index` of a head reads: the states, or the outputs of the layer below.
fn input<'a, O: Ops>(states: &'a O::Buf, layers: &'a [LayerTrace<O>], index: usize) -> View<'a, O> {
    let below = index.checked_sub(1).and_then(|below| layers.get(below));
    below.map_or(states, |below| &below.output).all()
}

// === impl HeadTrace ===

impl<O: Ops> HeadTrace<O> {
    /// Nothing yet.
    pub fn new(ops: &O) -> Self {
        Self {
            dropout: None,
            states: ops.working(),
            layers: Vec::new(),
            sums: ops.exact(),
            undropped: ops.working(),
            dinput: ops.working(),
        }
    }

    /// Begins a pass over states `[rows, width]`.
    fn begin(
        &mut self,
        ops: &O,
        (states, rows, dropout): (View<'_, O>, usize, Option<&Dropout>),
        width: usize,
    ) {
        self.layers.clear();
        self.dropout = dropout.cloned();
        ops.resize(&mut self.states, rows * width);
        let to = self.states.all_mut();
        match dropout {
            None => ops.copy(states, to),
            Some(Dropout { rate, row_keys }) => ops.dropout(states, row_keys, 0, *rate, to, false),
        }
    }

    /// Through one layer `(W, b)`.
    fn layer(
        &mut self,
        ops: &O,
        rows: usize,
        (weight, bias, outputs): (View<'_, O>, View<'_, O>, usize),
        activation: Activation,
    ) {
        let (index, len) = (self.layers.len(), rows * outputs);
        ops.resize(&mut self.sums, len);
        let read = input(&self.states, &self.layers, index);
        ops.shrink(read, weight, outputs, self.sums.all_mut());
        ops.add_bias(bias, self.sums.all_mut());
        let mut sums = vec![O::T::ZERO; len];
        ops.read(self.sums.all(), &mut sums);
        let made = sums.iter();
        let made = made.map(|sum| O::T::from_f64(activation.of(sum.to_f64())));
        let made: Vec<O::T> = made.collect();
        let mut output = ops.working();
        ops.resize(&mut output, len);
        match &self.dropout {
            None => ops.write(&made, output.all_mut()),
            Some(Dropout { rate, row_keys }) => {
                ops.resize(&mut self.undropped, len);
                ops.write(&made, self.undropped.all_mut());
                let whole = self.undropped.all();
                ops.dropout(whole, row_keys, index + 1, *rate, output.all_mut(), false);
            }
        }
        self.layers.push(LayerTrace { sums, output });
    }
}

// === impl ResidentAdapter ===

impl<O: Ops> ResidentAdapter<O> {
    /// The head's logits: `states [rows, hidden]` after the final norm, `out [rows, labels]`, exact. Does nothing without a
    /// head.
    pub fn score(&self, ops: &O, (states, rows): (View<'_, O>, usize), out: ViewMut<'_, O>) {
        let mut trace = HeadTrace::new(ops);
        self.score_traced(ops, (states, rows, None), &mut trace, out);
    }

    /// The same, noting what [`ResidentAdapter::score_backward`] reads; with dropout, which has one key for each row, before every
    /// layer.
    pub fn score_traced(
        &self,
        ops: &O,
        (states, rows, dropout): (View<'_, O>, usize, Option<&Dropout>),
        trace: &mut HeadTrace<O>,
        out: ViewMut<'_, O>,
    ) {
        let Some(head) = self.head() else { return };
        let labels = self.labels().len();
        trace.begin(ops, (states, rows, dropout), self.head_inputs());
        if let Some(activation) = self.settings.activation {
            for place in &self.hidden {
                let (weight, bias) = (place.weight.clone(), place.bias.clone());
                let outputs = bias.len();
                let layer = (self.part(weight), self.part(bias), outputs);
                trace.layer(ops, rows, layer, activation);
            }
        }
        let read = input(&trace.states, &trace.layers, trace.layers.len());
        ops.shrink(read, head, labels, out);
    }

    /// Numbers of a state that the head reads; 0 without a head.
    fn head_inputs(&self) -> usize {
        let first = self.hidden.first();
        let of_first = first.map(|place| place.weight.len() / place.bias.len());
        let of_score = || self.head.as_ref().map(|at| at.len() / self.labels().len());
        of_first.or_else(of_score).unwrap_or(0)
    }

    /// For `dlogits [rows, labels]`, exact, adds the gradient of every layer to `grads`, and with `dstates [rows, hidden]` that of
    /// the states to it. `trace` is of the forward pass.
    pub fn score_backward(
        &self,
        ops: &O,
        dlogits: View<'_, O>,
        trace: &mut HeadTrace<O>,
        grads: &mut AdapterGrads<O>,
        dstates: Option<ViewMut<'_, O>>,
    ) {
        let (Some(head), Some(at), one) = (self.head(), self.head.clone(), O::T::ONE) else {
            return;
        };
        let labels = self.labels().len();
        let HeadTrace {
            dropout,
            states,
            layers,
            sums,
            undropped,
            dinput,
        } = trace;
        let read = input(states, layers, layers.len());
        ops.outer(dlogits, read, labels, one, grads.part_mut(at));
        for (index, place) in self.hidden.iter().enumerate().rev() {
            let Some(activation) = self.settings.activation else {
                return;
            };
            let len = layers[index].sums.len();
            let outputs = place.bias.len();
            ops.resize(dinput, len);
            ops.clear(dinput.all_mut());
            match self.hidden.get(index + 1) {
                None => ops.expand(dlogits, head, labels, one, dinput.all_mut()),
                Some(above) => {
                    let weight = self.part(above.weight.clone());
                    ops.expand(sums.all(), weight, above.bias.len(), one, dinput.all_mut());
                }
            }
            let mut slopes = vec![O::T::ZERO; len];
            match dropout {
                None => ops.read(dinput.all(), &mut slopes),
                Some(Dropout { rate, row_keys }) => {
                    ops.resize(undropped, len);
                    let whole = undropped.all_mut();
                    ops.dropout(dinput.all(), row_keys, index + 1, *rate, whole, false);
                    ops.read(undropped.all(), &mut slopes);
                }
            }
            for (slope, sum) in slopes.iter_mut().zip(&layers[index].sums) {
                *slope = O::T::from_f64(slope.to_f64() * activation.slope(sum.to_f64()));
            }
            ops.resize(sums, len);
            ops.write(&slopes, sums.all_mut());
            let read = input(states, layers, index);
            let dweight = grads.part_mut(place.weight.clone());
            ops.outer(sums.all(), read, outputs, one, dweight);
            let mut dbias = vec![O::T::ZERO; outputs];
            ops.read(grads.part(place.bias.clone()), &mut dbias);
            for row in slopes.chunks_exact(outputs) {
                let pairs = dbias.iter_mut().zip(row);
                pairs.for_each(|(sum, slope)| *sum += *slope);
            }
            ops.write(&dbias, grads.part_mut(place.bias.clone()));
        }
        let Some(dstates) = dstates else { return };
        let Some(Dropout { rate, row_keys }) = dropout else {
            return self.expand_first(ops, (dlogits, sums), dstates);
        };
        ops.resize(dinput, states.len());
        ops.clear(dinput.all_mut());
        self.expand_first(ops, (dlogits, sums), dinput.all_mut());
        ops.dropout(dinput.all(), row_keys, 0, *rate, dstates, true);
    }

    /// `dinput += W^T` of the first layer on the gradients of its sums: `dsums`, or of a head of one layer `dlogits`.
    fn expand_first(
        &self,
        ops: &O,
        (dlogits, dsums): (View<'_, O>, &O::Buf),
        dinput: ViewMut<'_, O>,
    ) {
        let one = O::T::ONE;
        match (self.hidden.first(), self.head()) {
            (Some(first), _) => {
                let weight = self.part(first.weight.clone());
                ops.expand(dsums.all(), weight, first.bias.len(), one, dinput);
            }
            (None, Some(head)) => ops.expand(dlogits, head, self.labels().len(), one, dinput),
            (None, None) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::config::{BaseTensor, Site};
    use crate::head::HeadSettings;
    use crate::linear::BaseSites;
    use crate::ops::Reference;
    use crate::weights::{AdapterWeights, HiddenLayer, ScoreHead};

    const HIDDEN: usize = 16;
    const ROWS: usize = 5;

    /// A base that a head alone stands on.
    struct Bare(Reference<f64>);

    impl BaseSites<Reference<f64>> for Bare {
        fn ops(&self) -> &Reference<f64> {
            &self.0
        }
        fn layers(&self) -> usize {
            0
        }
        fn weight(&self, _: usize, _: Site) -> &<Reference<f64> as Ops>::Matrix {
            panic!("no layer has weights")
        }
        fn matrix(&self, _: BaseTensor) -> Option<&<Reference<f64> as Ops>::Matrix> {
            None
        }
        fn vector(&self, _: BaseTensor) -> Option<View<'_, Reference<f64>>> {
            None
        }
        fn hidden(&self) -> usize {
            HIDDEN
        }
    }

    fn head(widths: &[usize], activation: Option<Activation>) -> ScoreHead {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(8);
        let mut drawn = |count| (0..count).map(|_| rng.random_range(-0.7..0.7)).collect();
        let (mut inputs, mut hidden) = (HIDDEN, Vec::new());
        for outputs in widths {
            let (weight, bias) = (drawn(outputs * inputs), drawn(*outputs));
            hidden.push(HiddenLayer { weight, bias });
            inputs = *outputs;
        }
        let weight = drawn(3 * inputs);
        ScoreHead {
            labels: ["a", "b", "c"].map(str::to_owned).to_vec(),
            hidden,
            weight,
            settings: HeadSettings {
                hidden_layers: widths.to_vec(),
                activation,
                ..HeadSettings::default()
            },
        }
    }

    /// `sum of c * logits` and the logits, with parameters and states as they are.
    fn value(
        adapter: &ResidentAdapter<Reference<f64>>,
        (states, factors, dropout): (&[f64], &[f64], Option<&Dropout>),
    ) -> (f64, Vec<f64>) {
        let ops = Reference::<f64>::default();
        let (mut trace, mut logits) = (HeadTrace::new(&ops), vec![0.0; factors.len()]);
        adapter.score_traced(&ops, (states, ROWS, dropout), &mut trace, &mut logits);
        let sum = logits.iter().zip(factors).map(|(l, c)| l * c).sum();
        (sum, logits)
    }

    fn check(widths: &[usize], activation: Option<Activation>, dropout: Option<&Dropout>) {
        let ops = Reference::<f64>::default();
        let weights = AdapterWeights {
            head: Some(head(widths, activation)),
            ..AdapterWeights::default()
        };
        let mut adapter = ResidentAdapter::trainable(&weights, &Bare(ops)).unwrap();
        assert_eq!(adapter.weights(&ops), Some(weights));
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(9);
        let mut drawn = |count: usize| -> Vec<f64> {
            (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
        };
        let (mut states, factors) = (drawn(ROWS * HIDDEN), drawn(ROWS * 3));
        let (mut trace, mut logits) = (HeadTrace::new(&ops), vec![0.0; factors.len()]);
        adapter.score_traced(&ops, (&states, ROWS, dropout), &mut trace, &mut logits);
        let mut grads = AdapterGrads::of(&ops, &adapter);
        let mut dstates = vec![0.0; states.len()];
        adapter.score_backward(
            &ops,
            factors.as_slice(),
            &mut trace,
            &mut grads,
            Some(&mut dstates),
        );
        let step = 1e-5;
        let near = |found: f64, up: f64, down: f64, what: &str| {
            let slope = (up - down) / (2.0 * step);
            let off = (found - slope).abs() / slope.abs().max(1e-2);
            assert!(
                off < 1e-6,
                "{widths:?} {activation:?} {what}: {found} not {slope}"
            );
        };
        for at in 0..adapter.parameter_count() {
            let mut moved = |by: f64| {
                adapter.part_mut(at..at + 1)[0] += by;
                let value = value(&adapter, (&states, &factors, dropout)).0;
                adapter.part_mut(at..at + 1)[0] -= by;
                value
            };
            let (up, down) = (moved(step), moved(-step));
            near(
                grads.part(at..at + 1)[0],
                up,
                down,
                &format!("parameter {at}"),
            );
        }
        for at in 0..states.len() {
            let mut moved = |by: f64| {
                states[at] += by;
                let value = value(&adapter, (&states, &factors, dropout)).0;
                states[at] -= by;
                value
            };
            let (up, down) = (moved(step), moved(-step));
            near(dstates[at], up, down, &format!("state {at}"));
        }
    }

    #[test]
    fn gradients_of_every_layer_are_those_of_finite_differences() {
        let some = Dropout {
            rate: 0.3,
            row_keys: (0..ROWS as u64)
                .map(|row| Dropout::row_key(5, 1, row, 0))
                .collect(),
        };
        for dropout in [None, Some(&some)] {
            check(&[], None, dropout);
            for activation in [Activation::Relu, Activation::Gelu, Activation::Tanh] {
                check(&[8], Some(activation), dropout);
                check(&[24, 8, 16], Some(activation), dropout);
            }
        }
    }

    #[test]
    fn what_is_dropped_is_a_share_of_every_layers_input() {
        let ops = Reference::<f64>::default();
        let weights = AdapterWeights {
            head: Some(head(&[512], Some(Activation::Tanh))),
            ..AdapterWeights::default()
        };
        let adapter = ResidentAdapter::build(&weights, &Bare(ops)).unwrap();
        let (states, mut trace) = (vec![1.0; 64 * HIDDEN], HeadTrace::new(&ops));
        let dropout = Dropout {
            rate: 0.25,
            row_keys: (0..64).map(|row| Dropout::row_key(6, 1, row, 0)).collect(),
        };
        let on = (states.as_slice(), 64, Some(&dropout));
        adapter.score_traced(&ops, on, &mut trace, &mut [0.0; 64 * 3]);
        let dropped = |numbers: &[f64]| {
            let zeros = numbers.iter().filter(|number| **number == 0.0).count();
            zeros as f64 / numbers.len() as f64
        };
        // Of 1,024 and of 32,768 numbers.
        assert!((dropped(&trace.states) - 0.25).abs() < 0.05);
        assert!((dropped(&trace.layers[0].output) - 0.25).abs() < 0.01);
        let kept = trace.states.iter().filter(|number| **number != 0.0);
        assert!(
            kept.into_iter()
                .all(|number| (number - 4.0 / 3.0).abs() < 1e-6)
        );
    }

    #[test]
    fn a_row_answers_the_same_alone_and_in_company() {
        let ops = Reference::<f64>::default();
        let weights = AdapterWeights {
            head: Some(head(&[24, 8], Some(Activation::Gelu))),
            ..AdapterWeights::default()
        };
        let adapter = ResidentAdapter::build(&weights, &Bare(ops)).unwrap();
        let states: Vec<f64> = (0..ROWS * HIDDEN).map(|i| (i as f64 * 0.7).sin()).collect();
        let (_, together) = value(&adapter, (&states, &[1.0; ROWS * 3], None));
        for (row, state) in states.chunks_exact(HIDDEN).enumerate() {
            let mut alone = vec![0.0; 3];
            adapter.score(&ops, (state, 1), &mut alone);
            assert_eq!(alone, together[row * 3..][..3], "row {row}");
        }
    }
}
