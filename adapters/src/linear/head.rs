//! A classification head in memory: states through its stack of fully connected layers to logits, and the way back.
//!
//! Sums are the operations' own; what an activation makes of them is worked out on the host in f64, on every device in the same way:
//! rows are one an example, and few. Each row depends on itself alone. It must not know what logits mean, or whose states they are.

use super::grads::AdapterGrads;
use super::resident::ResidentAdapter;
use crate::head::Activation;
use crate::ops::{Backend, Buffer, Ops, Real, View, ViewMut};

/// What the way back reads of the hidden layers.
#[derive(Debug)]
pub struct HeadTrace<O: Ops = Backend> {
    layers: Vec<LayerTrace<O>>,
    /// Sums on their way to the host, and gradients of sums from there; exact.
    sums: O::Buf,
    /// The gradient of a layer's input `[rows, in]`.
    dinput: O::Buf,
}

/// One hidden layer's.
#[derive(Debug)]
struct LayerTrace<O: Ops> {
    /// Before the activation, `[rows, out]`.
    sums: Vec<O::T>,
    /// Behind it.
    output: O::Buf,
}

// === impl HeadTrace ===

impl<O: Ops> HeadTrace<O> {
    /// Nothing yet.
    pub fn new(ops: &O) -> Self {
        Self {
            layers: Vec::new(),
            sums: ops.exact(),
            dinput: ops.working(),
        }
    }

    /// Through one layer `(W, b)`: `input [rows, in]`.
    fn layer(
        &mut self,
        ops: &O,
        (input, rows): (Option<View<'_, O>>, usize),
        (weight, bias, outputs): (View<'_, O>, View<'_, O>, usize),
        activation: Activation,
    ) {
        let len = rows * outputs;
        ops.resize(&mut self.sums, len);
        let sums = self.sums.all_mut();
        match (input, self.layers.last()) {
            (Some(input), _) => ops.shrink(input, weight, outputs, sums),
            (None, Some(below)) => ops.shrink(below.output.all(), weight, outputs, sums),
            (None, None) => return,
        }
        ops.add_bias(bias, self.sums.all_mut());
        let mut sums = vec![O::T::ZERO; len];
        ops.read(self.sums.all(), &mut sums);
        let made = sums.iter();
        let made = made.map(|sum| O::T::from_f64(activation.of(sum.to_f64())));
        let mut output = ops.working();
        ops.resize(&mut output, len);
        ops.write(&made.collect::<Vec<_>>(), output.all_mut());
        self.layers.push(LayerTrace { sums, output });
    }
}

// === impl ResidentAdapter ===

impl<O: Ops> ResidentAdapter<O> {
    /// The head's logits: `states [rows, hidden]` after the final norm, `out [rows, labels]`, exact. Does nothing without a
    /// head.
    pub fn score(&self, ops: &O, (states, rows): (View<'_, O>, usize), out: ViewMut<'_, O>) {
        let mut trace = HeadTrace::new(ops);
        self.score_traced(ops, (states, rows), &mut trace, out);
    }

    /// The same, noting what [`ResidentAdapter::score_backward`] reads.
    pub fn score_traced(
        &self,
        ops: &O,
        (states, rows): (View<'_, O>, usize),
        trace: &mut HeadTrace<O>,
        out: ViewMut<'_, O>,
    ) {
        let Some(head) = self.head() else { return };
        trace.layers.clear();
        if let Some(activation) = self.settings.activation {
            for (index, place) in self.hidden.iter().enumerate() {
                let input = (index == 0).then_some(states);
                let (weight, bias) = (place.weight.clone(), place.bias.clone());
                let outputs = bias.len();
                let layer = (self.part(weight), self.part(bias), outputs);
                trace.layer(ops, (input, rows), layer, activation);
            }
        }
        let labels = self.labels().len();
        match trace.layers.last() {
            Some(last) => ops.shrink(last.output.all(), head, labels, out),
            None => ops.shrink(states, head, labels, out),
        }
    }

    /// For `dlogits [rows, labels]`, exact, adds the gradient of every layer to `grads`, and with `dstates [rows, hidden]` that of
    /// the states to it. `trace` is of [`ResidentAdapter::score_traced`] on the same states.
    pub fn score_backward(
        &self,
        ops: &O,
        (states, dlogits): (View<'_, O>, View<'_, O>),
        trace: &mut HeadTrace<O>,
        grads: &mut AdapterGrads<O>,
        dstates: Option<ViewMut<'_, O>>,
    ) {
        let (Some(head), Some(at), one) = (self.head(), self.head.clone(), O::T::ONE) else {
            return;
        };
        let labels = self.labels().len();
        let HeadTrace {
            layers,
            sums,
            dinput,
        } = trace;
        let dhead = grads.part_mut(at);
        match layers.last() {
            Some(last) => ops.outer(dlogits, last.output.all(), labels, one, dhead),
            None => ops.outer(dlogits, states, labels, one, dhead),
        }
        let Some(activation) = self.settings.activation else {
            if let Some(dstates) = dstates {
                ops.expand(dlogits, head, labels, one, dstates);
            }
            return;
        };
        for (index, place) in self.hidden.iter().enumerate().rev() {
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
            ops.read(dinput.all(), &mut slopes);
            for (slope, sum) in slopes.iter_mut().zip(&layers[index].sums) {
                *slope = O::T::from_f64(slope.to_f64() * activation.slope(sum.to_f64()));
            }
            ops.resize(sums, len);
            ops.write(&slopes, sums.all_mut());
            let dweight = grads.part_mut(place.weight.clone());
            match index.checked_sub(1) {
                Some(below) => {
                    let input = layers[below].output.all();
                    ops.outer(sums.all(), input, outputs, one, dweight);
                }
                None => ops.outer(sums.all(), states, outputs, one, dweight),
            }
            let mut dbias = vec![O::T::ZERO; outputs];
            ops.read(grads.part(place.bias.clone()), &mut dbias);
            for row in slopes.chunks_exact(outputs) {
                let pairs = dbias.iter_mut().zip(row);
                pairs.for_each(|(sum, slope)| *sum += *slope);
            }
            ops.write(&dbias, grads.part_mut(place.bias.clone()));
        }
        if let (Some(dstates), Some(first)) = (dstates, self.hidden.first()) {
            let weight = self.part(first.weight.clone());
            ops.expand(sums.all(), weight, first.bias.len(), one, dstates);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::config::{LayerTensor, Site};
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
        fn vector(&self, _: usize, _: LayerTensor) -> Option<View<'_, Reference<f64>>> {
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
        (states, factors): (&[f64], &[f64]),
    ) -> (f64, Vec<f64>) {
        let ops = Reference::<f64>::default();
        let mut logits = vec![0.0; factors.len()];
        adapter.score(&ops, (states, ROWS), &mut logits);
        let sum = logits.iter().zip(factors).map(|(l, c)| l * c).sum();
        (sum, logits)
    }

    fn check(widths: &[usize], activation: Option<Activation>) {
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
        adapter.score_traced(&ops, (&states, ROWS), &mut trace, &mut logits);
        let mut grads = AdapterGrads::of(&ops, &adapter);
        let mut dstates = vec![0.0; states.len()];
        let on = (states.as_slice(), factors.as_slice());
        adapter.score_backward(&ops, on, &mut trace, &mut grads, Some(&mut dstates));
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
                let value = value(&adapter, (&states, &factors)).0;
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
                let value = value(&adapter, (&states, &factors)).0;
                states[at] -= by;
                value
            };
            let (up, down) = (moved(step), moved(-step));
            near(dstates[at], up, down, &format!("state {at}"));
        }
    }

    #[test]
    fn gradients_of_every_layer_are_those_of_finite_differences() {
        check(&[], None);
        for activation in [Activation::Relu, Activation::Gelu, Activation::Tanh] {
            check(&[8], Some(activation));
            check(&[24, 8, 16], Some(activation));
        }
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
        let (_, together) = value(&adapter, (&states, &[1.0; ROWS * 3]));
        for (row, state) in states.chunks_exact(HIDDEN).enumerate() {
            let mut alone = vec![0.0; 3];
            adapter.score(&ops, (state, 1), &mut alone);
            assert_eq!(alone, together[row * 3..][..3], "row {row}");
        }
    }
}
