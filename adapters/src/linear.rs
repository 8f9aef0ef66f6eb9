//! A frozen projection with adapters on it, and an adapter as operations like to read it.
//!
//! LoRA: `y = W x + b + s B (A x)`. DoRA (Liu et al., 2024, eq. 5; PEFT's `dora.py`), with the norm taken over
//! each output row: `y = g (W x + s B (A x)) + b` where `g = m / |W + s B A|`. (IA)3: `scale`. Unfrozen: `whole`. It must not know files, names or
//! layers' order: a site is asked for by (layer, site).

mod dora;
mod grads;
mod head;
mod layout;
mod norm;
mod overlay;
mod resident;
mod scale;
mod update;
mod vocabulary;
mod whole;

use std::ops::Range;

use crate::batch::{Pass, Segment, Thin};
use crate::config::{ScaleOn, Site};
use crate::ops::{Buffer, LowRank, Ops, Real, View, ViewMut};
use crate::pace::{Stopped, pieces};

pub use grads::AdapterGrads;
pub use head::HeadTrace;
pub use norm::RmsNorm;
pub use overlay::{Overlay, OverlayBytes};
pub use resident::{BaseSites, BuildError, Misfit, ResidentAdapter, SiteView, Tensor};
pub use update::{merged, row_norms, scaled};
pub use vocabulary::Vocabulary;

use resident::TrainedView;
use scale::ScaleWork;

/// A frozen projection `[out, in]`, its optional bias, and its place in the model. The only type that a block multiplies by.
#[derive(Debug)]
pub struct LoraLinear<O: Ops> {
    weight: O::Matrix,
    bias: Option<O::Buf>,
    layer: usize,
    site: Site,
    outputs: usize,
    inputs: usize,
}

/// Sites that share their input.
const GROUPS: &[&[Site]] = &[
    &[Site::Q, Site::K, Site::V],
    &[Site::O],
    &[Site::Gate, Site::Up],
    &[Site::Down],
];

/// The same sites where dropout gives each an input of its own.
const ALONE: &[&[Site]] = &[
    &[Site::Q],
    &[Site::K],
    &[Site::V],
    &[Site::O],
    &[Site::Gate],
    &[Site::Up],
    &[Site::Down],
];

/// What the adapters of a pass add at every layer, brought once to where operations read it: one list for each group of
/// sites, under the number of its first.
pub(crate) struct PassUpdates<'a, O: Ops> {
    lists: O::Updates<'a>,
    /// Whether a list holds anything.
    filled: Vec<bool>,
}

// === impl PassUpdates ===

impl<'a, O: Ops> PassUpdates<'a, O> {
    pub(crate) fn new(
        ops: &'a O,
        layers: usize,
        segments: &'a [Segment<O>],
        dropout: bool,
    ) -> Self {
        let groups = if dropout { ALONE } else { GROUPS };
        let adapted = segments
            .iter()
            .any(|segment| segment.adapters.parts().next().is_some());
        let sites = if adapted { layers * Site::ALL.len() } else { 0 };
        let mut lists: Vec<Vec<_>> = (0..sites).map(|_| Vec::new()).collect();
        if adapted {
            for layer in 0..layers {
                for group in groups {
                    lists[number(layer, group[0])] = updates(segments, layer, group);
                }
            }
        }
        Self {
            filled: lists.iter().map(|list| !list.is_empty()).collect(),
            lists: ops.updates(lists),
        }
    }

    /// Adds what the list under `number` says.
    fn add(
        &self,
        pass: &Pass<'_, O>,
        number: usize,
        x: View<'_, O>,
        outputs: Vec<ViewMut<'_, O>>,
    ) -> Result<(), Stopped> {
        if self.filled(number) {
            pass.ops.low_rank(x, &self.lists, number, outputs);
            pass.pace.breathe()?;
        }
        Ok(())
    }

    fn filled(&self, number: usize) -> bool {
        self.filled.get(number).is_some_and(|filled| *filled)
    }
}

/// Segment by segment, as adapters lie in memory; what adds to the same rows and output stands together.
fn updates<'a, O: Ops>(
    segments: &'a [Segment<O>],
    layer: usize,
    group: &[Site],
) -> Vec<LowRank<O::Factor<'a>, O::T>> {
    let mut updates = Vec::new();
    for segment in segments {
        for (output, site) in group.iter().enumerate() {
            for (adapter, weight) in segment.adapters.parts() {
                if let Some(view) = adapter.site(layer, *site) {
                    updates.push(LowRank {
                        rows: segment.rows.clone(),
                        output,
                        rank: view.rank,
                        scale: O::T::from_f32(weight) * view.scale,
                        a: view.a,
                        bt: view.bt,
                    });
                }
            }
        }
    }
    updates
}

fn number(layer: usize, site: Site) -> usize {
    layer * Site::ALL.len() + site.index()
}

/// Projections that share their input `x [rows, in]`, each into its `y [rows, out]`: the bases once over all rows, then every
/// segment's updates of all of them in one list, then gains, biases and (IA)3's vectors.
///
/// # Errors
/// [`Stopped`] when the pace says so.
pub fn forward<O: Ops, const N: usize>(
    pass: &Pass<'_, O>,
    projections: [&LoraLinear<O>; N],
    x: &O::Buf,
    mut outputs: [&mut O::Buf; N],
    thin: &mut Thin<O>,
) -> Result<(), Stopped> {
    for (projection, y) in projections.iter().zip(&mut outputs) {
        let x = projection.scaled_input(pass, x, &mut thin.scaled);
        projection.base(pass, x, y)?;
    }
    match pass.dropout {
        None => {
            let views = outputs.iter_mut().map(|output| output.all_mut());
            let number = projections[0].number();
            pass.updates.add(pass, number, x.all(), views.collect())?;
        }
        Some(dropout) => {
            for (projection, y) in projections.iter().zip(&mut outputs) {
                let number = projection.number();
                if !pass.updates.filled(number) {
                    continue;
                }
                let (masked, keys) = (&mut thin.masked, &dropout.row_keys);
                pass.ops.resize(masked, x.len());
                pass.ops
                    .dropout(x.all(), keys, number, dropout.rate, masked.all_mut(), false);
                let output = vec![y.all_mut()];
                pass.updates.add(pass, number, masked.all(), output)?;
            }
        }
    }
    for (projection, y) in projections.iter().zip(outputs) {
        projection.finish(pass, y);
    }
    Ok(())
}

// === impl LoraLinear ===

impl<O: Ops> LoraLinear<O> {
    /// A projection by a packed weight.
    pub fn new(ops: &O, weight: O::Matrix, bias: Option<&[f32]>, at: (usize, Site)) -> Self {
        let (outputs, inputs) = ops.dims(&weight);
        let bias = bias.map(|bias| {
            let numbers: Vec<O::T> = bias.iter().map(|b| O::T::from_f32(*b)).collect();
            let mut bias = ops.working();
            ops.resize(&mut bias, numbers.len());
            ops.write(&numbers, bias.all_mut());
            bias
        });
        Self {
            weight,
            bias,
            layer: at.0,
            site: at.1,
            outputs,
            inputs,
        }
    }

    /// The frozen bias, working.
    pub fn bias(&self) -> Option<View<'_, O>> {
        self.bias.as_ref().map(Buffer::all)
    }

    /// The frozen weight.
    pub fn weight(&self) -> &O::Matrix {
        &self.weight
    }

    /// Width of a row of `y`.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Width of a row of `x`.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// `y = W x`, with another weight in the base's place for rows that one covers: adjacent rows of one weight in one
    /// product, so that each weight is read once.
    fn base(&self, pass: &Pass<'_, O>, x: &O::Buf, y: &mut O::Buf) -> Result<(), Stopped> {
        let rows = x.len() / self.inputs;
        let (mut from, mut at) = (0, 0);
        let mut weight = &self.weight;
        for (covered, other) in self.others(pass) {
            let base = (at..covered.start, &self.weight);
            for (rows, next) in [base, (covered.clone(), other)] {
                if !rows.is_empty() && !std::ptr::eq(weight, next) {
                    self.product(pass, weight, from..rows.start, (x, &mut *y))?;
                    (from, weight) = (rows.start, next);
                }
            }
            at = covered.end;
        }
        if at < rows && !std::ptr::eq(weight, &self.weight) {
            self.product(pass, weight, from..at, (x, &mut *y))?;
            (from, weight) = (at, &self.weight);
        }
        self.product(pass, weight, from..rows, (x, y))
    }

    /// Rows that another weight than the base's covers, in row order: a merged one, or a segment's own.
    fn others<'a>(
        &'a self,
        pass: &'a Pass<'_, O>,
    ) -> impl Iterator<Item = (Range<usize>, &'a O::Matrix)> {
        let merged = pass.overlays.iter().map(|covered| {
            let merged = covered.overlay.site(self.layer, self.site);
            (covered.rows.clone(), merged.unwrap_or(&self.weight))
        });
        let own = pass.segments.iter();
        let own = own.filter_map(|segment| Some((segment.rows.clone(), self.own(segment)?)));
        let (mut merged, mut own) = (merged.peekable(), own.peekable());
        std::iter::from_fn(move || match (merged.peek(), own.peek()) {
            (Some((m, _)), Some((o, _))) if o.start < m.start => own.next(),
            (None, _) => own.next(),
            _ => merged.next(),
        })
    }

    fn product(
        &self,
        pass: &Pass<'_, O>,
        weight: &O::Matrix,
        rows: Range<usize>,
        (x, y): (&O::Buf, &mut O::Buf),
    ) -> Result<(), Stopped> {
        let first = rows.start;
        for (rows, part) in pieces(pass.pace, rows.len(), self.outputs, self.inputs) {
            let rows = first + rows.start..first + rows.end;
            let y = y.part_mut(numbers(&rows, self.outputs));
            let x = x.part(numbers(&rows, self.inputs));
            pass.ops.matmul_part(x, weight, part, y);
            pass.pace.breathe()?;
        }
        Ok(())
    }

    /// DoRA's gains, the bias, and (IA)3's vectors.
    fn finish(&self, pass: &Pass<'_, O>, y: &mut O::Buf) {
        self.gain(pass, y);
        self.add_bias(pass, y);
        self.scale(pass, y);
    }

    /// `y *= gain` in the rows that DoRA's gains are for.
    fn gain(&self, pass: &Pass<'_, O>, y: &mut O::Buf) {
        for segment in pass.segments {
            for (adapter, _) in segment.adapters.parts() {
                let view = adapter.site(self.layer, self.site);
                if let Some(gain) = view.and_then(|view| view.gain) {
                    let rows = numbers(&segment.rows, self.outputs);
                    pass.ops.scale_columns(gain, y.part_mut(rows));
                }
            }
        }
    }

    fn number(&self) -> usize {
        number(self.layer, self.site)
    }

    /// `dx += ` the gradient of `x` (skipped when nobody below needs it), and each segment's dA, dB and dm into the gradients
    /// that stand at the segment's index. `x` is the forward pass's input, `dy [rows, out]` the gradient of its output.
    ///
    /// # Errors
    /// [`Stopped`] when the pace says so.
    ///
    /// # Panics
    /// On a segment with factors of 16 bits, which the trainer widens, or with more than one adapter.
    pub fn backward(
        &self,
        pass: &Pass<'_, O>,
        (x, dy): (&O::Buf, &O::Buf),
        mut dx: Option<&mut O::Buf>,
        grads: &mut [Option<AdapterGrads<O>>],
        thin: &mut Thin<O>,
    ) -> Result<(), Stopped> {
        let Thin {
            h,
            dh,
            masked,
            gained,
            direction,
            scaled,
            exact_rows: _,
            ones,
        } = thin;
        let inner = self.inner_gradient(pass, dy, gained);
        let work = ScaleWork {
            scaled,
            product: direction,
            ones,
        };
        self.scale_backward(pass, (x, dy, inner), dx.as_deref_mut(), grads, work)?;
        self.whole_gradients(pass, (x, inner), grads, (&mut *direction, &mut *ones))?;
        for (index, segment) in pass.segments.iter().enumerate() {
            let Some(trained) = self.trained(segment) else {
                continue;
            };
            let TrainedView {
                rank, scale, a, bt, ..
            } = trained;
            let rows = &segment.rows;
            let inner = inner.part(numbers(rows, self.outputs));
            pass.ops.resize(h, rows.len() * rank);
            pass.ops.resize(dh, rows.len() * rank);
            pass.ops.shrink(inner, bt, rank, dh.all_mut());
            let grad = grads.get_mut(index).and_then(Option::as_mut);
            let at = grad.as_ref().and_then(|grad| grad.site(self.number()));
            if let (Some(grad), Some(at)) = (grad, at) {
                let dropped = self.dropped(pass, x, rows, masked);
                pass.ops.shrink(dropped, a, rank, h.all_mut());
                let dbt = grad.part_mut(at.bt);
                pass.ops.outer(h.all(), inner, rank, scale, dbt);
                let da = grad.part_mut(at.a);
                pass.ops.outer(dh.all(), dropped, rank, scale, da);
                if let Some(dm) = at.magnitude {
                    let (dm, work) = (grad.part_mut(dm), (&mut *direction, &mut *ones));
                    self.magnitude_gradient(pass, (x, dy), rows, (&trained, h), work, dm)?;
                }
            }
            if let Some(dx) = dx.as_deref_mut() {
                self.delta_gradient(pass, &trained, rows, dx, (dh, masked));
            }
            pass.pace.breathe()?;
        }
        Ok(())
    }

    /// `dx += dy W` of some rows.
    fn product_backward(
        &self,
        pass: &Pass<'_, O>,
        rows: Range<usize>,
        (dy, dx): (&O::Buf, &mut O::Buf),
    ) -> Result<(), Stopped> {
        for (rows, weight) in self.cut(pass, rows) {
            let first = rows.start;
            for (rows, part) in pieces(pass.pace, rows.len(), self.outputs, self.inputs) {
                let rows = first + rows.start..first + rows.end;
                let dx = dx.part_mut(numbers(&rows, self.inputs));
                let dy = dy.part(numbers(&rows, self.outputs));
                pass.ops.matmul_backward_part(dy, weight, part, dx);
                pass.pace.breathe()?;
            }
        }
        Ok(())
    }

    /// The gradient of `W x + s B A x`: `dy`, times the gains and the vectors on outputs in the rows that they are for.
    fn inner_gradient<'a>(
        &self,
        pass: &Pass<'_, O>,
        dy: &'a O::Buf,
        gained: &'a mut O::Buf,
    ) -> &'a O::Buf {
        let gains = |segment: &Segment<O>| {
            let mut views = segment
                .adapters
                .parts()
                .map(|(a, _)| a.site(self.layer, self.site));
            views.any(|view| view.is_some_and(|view| view.gain.is_some()))
                || self.vector(segment, ScaleOn::Outputs).is_some()
        };
        if !pass.segments.iter().any(gains) {
            return dy;
        }
        pass.ops.resize(gained, dy.len());
        pass.ops.copy(dy.all(), gained.all_mut());
        self.gain(pass, gained);
        self.scale(pass, gained);
        gained
    }

    /// dm of a segment, the norms held fixed: `dm += ` the sum over its rows of `dy (W x + s B h) / |W + s B A|`.
    fn magnitude_gradient(
        &self,
        pass: &Pass<'_, O>,
        (x, dy): (&O::Buf, &O::Buf),
        rows: &Range<usize>,
        (trained, h): (&TrainedView<'_, O>, &O::Buf),
        (direction, ones): (&mut O::Buf, &mut O::Buf),
        dm: ViewMut<'_, O>,
    ) -> Result<(), Stopped> {
        let Some(inverse) = trained.inverse else {
            return Ok(());
        };
        let (ops, at) = (pass.ops, numbers(rows, self.outputs));
        ops.resize(direction, dy.len());
        self.product(pass, &self.weight, rows.clone(), (x, direction))?;
        let y = direction.part_mut(at.clone());
        ops.expand(h.all(), trained.bt, trained.rank, trained.scale, y);
        ops.scale_columns(inverse, direction.part_mut(at.clone()));
        ops.multiply(dy.part(at.clone()), direction.part_mut(at.clone()));
        let ones = some_ones(ops, ones, rows.len());
        ops.outer(ones, direction.part(at), 1, O::T::ONE, dm);
        Ok(())
    }

    /// The input of A in a segment's rows: `x` itself, or `x` after dropout.
    fn dropped<'a>(
        &self,
        pass: &Pass<'_, O>,
        x: &'a O::Buf,
        rows: &Range<usize>,
        masked: &'a mut O::Buf,
    ) -> View<'a, O> {
        let x = x.part(numbers(rows, self.inputs));
        let Some(dropout) = pass.dropout else {
            return x;
        };
        let keys = &dropout.row_keys[rows.clone()];
        pass.ops.resize(masked, rows.len() * self.inputs);
        let out = masked.all_mut();
        pass.ops
            .dropout(x, keys, self.number(), dropout.rate, out, false);
        masked.all()
    }

    /// What a segment trains at this site.
    fn trained<'a>(&self, segment: &'a Segment<O>) -> Option<TrainedView<'a, O>> {
        let mut parts = segment.adapters.parts();
        let (adapter, weight) = parts.next()?;
        assert!(
            parts.next().is_none() && weight == 1.0,
            "a mixture is served, not trained"
        );
        adapter.trained(self.layer, self.site)
    }

    /// `dx += ` what comes through A (and dropout), of `dh`.
    fn delta_gradient(
        &self,
        pass: &Pass<'_, O>,
        trained: &TrainedView<'_, O>,
        rows: &Range<usize>,
        dx: &mut O::Buf,
        (dh, masked): (&O::Buf, &mut O::Buf),
    ) {
        let TrainedView { rank, scale, a, .. } = *trained;
        let dx = dx.part_mut(numbers(rows, self.inputs));
        let Some(dropout) = pass.dropout else {
            return pass.ops.expand(dh.all(), a, rank, scale, dx);
        };
        pass.ops.resize(masked, rows.len() * self.inputs);
        pass.ops.clear(masked.all_mut());
        pass.ops.expand(dh.all(), a, rank, scale, masked.all_mut());
        let keys = &dropout.row_keys[rows.clone()];
        pass.ops
            .dropout(masked.all(), keys, self.number(), dropout.rate, dx, true);
    }
}

/// An exact copy `[rows, width]` of working numbers.
pub(crate) fn exact_copy<O: Ops>(
    ops: &O,
    from: View<'_, O>,
    (rows, width): (usize, usize),
    (to, ones): (&mut O::Buf, &mut O::Buf),
) {
    some_ones(ops, ones, width);
    ops.resize(to, rows * width);
    ops.clear(to.all_mut());
    ops.add_bias(ones.part(0..width), to.all_mut());
    ops.multiply(from, to.all_mut());
}

/// So many ones, exact, from a buffer that is kept filled with them.
fn some_ones<'a, O: Ops>(ops: &O, ones: &'a mut O::Buf, count: usize) -> View<'a, O> {
    if ones.len() < count {
        ops.resize(ones, count);
        ops.write(&vec![O::T::ONE; count], ones.all_mut());
    }
    ones.part(0..count)
}

/// Where rows of a width lie.
fn numbers(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}
