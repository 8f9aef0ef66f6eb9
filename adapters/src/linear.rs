//! A frozen projection with adapters on it, and an adapter as operations like to read it.
//!
//! LoRA: `y = W x + b + s B (A x)`. DoRA (Liu et al., 2024, eq. 5; PEFT's `dora.py`), with the norm taken over
//! each output row: `y = g (W x + s B (A x)) + b` where `g = m / |W + s B A|`. It must not know files, names or layers'
//! order: a site is asked for by (layer, site).

mod overlay;
mod resident;
mod update;

use std::ops::Range;

use crate::batch::{Pass, Segment, Thin, sized};
use crate::config::Site;
use crate::ops::{LowRank, Ops, Real};
use crate::pace::{Stopped, pieces};

pub use overlay::{Overlay, OverlayBytes};
pub use resident::{AdapterGrads, BaseSites, Misfit, ResidentAdapter, SiteView};
pub use update::merged;

/// A frozen projection `[out, in]`, its optional bias, and its place in the model. The only type that a block multiplies by.
#[derive(Debug)]
pub struct LoraLinear<O: Ops> {
    weight: O::Matrix,
    bias: Option<Vec<O::T>>,
    layer: usize,
    site: Site,
    outputs: usize,
    inputs: usize,
}

/// Projections that share their input `x [rows, in]`, each into its `y [rows, out]`: the bases once over all rows, then every
/// segment's updates of all of them in one list, then gains and biases.
///
/// # Errors
/// [`Stopped`] when the pace says so.
pub fn forward<O: Ops, const N: usize>(
    pass: &Pass<'_, O>,
    projections: [&LoraLinear<O>; N],
    x: &[O::T],
    mut outputs: [&mut [O::T]; N],
    thin: &mut Thin<O::T>,
) -> Result<(), Stopped> {
    for (projection, y) in projections.iter().zip(&mut outputs) {
        projection.base(pass, x, y)?;
    }
    match pass.dropout {
        None => {
            let updates = updates(pass, &projections);
            if !updates.is_empty() {
                pass.ops.low_rank(x, &updates, &mut outputs);
                pass.pace.breathe()?;
            }
        }
        Some(dropout) => {
            // Each site drops inputs of its own, so no two updates share an input.
            let masked = sized(&mut thin.masked, x.len());
            for update in updates(pass, &projections) {
                let projection = projections[update.output];
                let rows = update.rows.clone();
                let inputs = rows.start * projection.inputs..rows.end * projection.inputs;
                let site = projection.number();
                dropout.apply(rows, site, &x[inputs.clone()], &mut masked[inputs], false);
                pass.ops.low_rank(masked, &[update], &mut outputs);
                pass.pace.breathe()?;
            }
        }
    }
    for (projection, y) in projections.iter().zip(outputs) {
        projection.finish(pass, y);
    }
    Ok(())
}

/// Segment by segment, as adapters lie in memory; what adds to the same rows and output stands together.
fn updates<'a, O: Ops>(
    pass: &Pass<'a, O>,
    projections: &[&LoraLinear<O>],
) -> Vec<LowRank<'a, O::T>> {
    let mut updates = Vec::new();
    for segment in pass.segments {
        for (output, projection) in projections.iter().enumerate() {
            for (adapter, weight) in segment.adapters.parts() {
                if let Some(view) = adapter.site(projection.layer, projection.site) {
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

// === impl LoraLinear ===

impl<O: Ops> LoraLinear<O> {
    /// A projection by a packed weight.
    pub fn new(ops: &O, weight: O::Matrix, bias: Option<&[f32]>, at: (usize, Site)) -> Self {
        let (outputs, inputs) = ops.dims(&weight);
        Self {
            weight,
            bias: bias.map(|bias| bias.iter().map(|b| O::T::from_f32(*b)).collect()),
            layer: at.0,
            site: at.1,
            outputs,
            inputs,
        }
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

    /// `y = W x`, with the merged weight in the base's place for rows that one covers: adjacent rows of one weight in one
    /// product, so that each weight is read once.
    fn base(&self, pass: &Pass<'_, O>, x: &[O::T], y: &mut [O::T]) -> Result<(), Stopped> {
        let rows = x.len() / self.inputs;
        let (mut from, mut at) = (0, 0);
        let mut weight = &self.weight;
        for covered in pass.overlays {
            let base = (at..covered.rows.start, &self.weight);
            let merged = covered.overlay.site(self.layer, self.site);
            let merged = (covered.rows.clone(), merged.unwrap_or(&self.weight));
            for (rows, next) in [base, merged] {
                if !rows.is_empty() && !std::ptr::eq(weight, next) {
                    self.product(pass, weight, from..rows.start, (x, &mut *y))?;
                    (from, weight) = (rows.start, next);
                }
            }
            at = covered.rows.end;
        }
        if at < rows && !std::ptr::eq(weight, &self.weight) {
            self.product(pass, weight, from..at, (x, &mut *y))?;
            (from, weight) = (at, &self.weight);
        }
        self.product(pass, weight, from..rows, (x, y))
    }

    fn product(
        &self,
        pass: &Pass<'_, O>,
        weight: &O::Matrix,
        rows: Range<usize>,
        (x, y): (&[O::T], &mut [O::T]),
    ) -> Result<(), Stopped> {
        if rows.is_empty() {
            return Ok(());
        }
        let x = &x[rows.start * self.inputs..rows.end * self.inputs];
        let y = &mut y[rows.start * self.outputs..rows.end * self.outputs];
        for (r, part) in pieces(pass.pace, rows.len(), self.outputs, self.inputs) {
            let x = &x[r.start * self.inputs..r.end * self.inputs];
            let y = &mut y[r.start * self.outputs..r.end * self.outputs];
            pass.ops.matmul_part(x, weight, part, y);
            pass.pace.breathe()?;
        }
        Ok(())
    }

    /// DoRA's gains and the bias.
    fn finish(&self, pass: &Pass<'_, O>, y: &mut [O::T]) {
        for segment in pass.segments {
            for (adapter, _) in segment.adapters.parts() {
                let view = adapter.site(self.layer, self.site);
                if let Some(gain) = view.and_then(|view| view.gain) {
                    let rows = segment.rows.start * self.outputs..segment.rows.end * self.outputs;
                    pass.ops.scale_columns(gain, &mut y[rows]);
                }
            }
        }
        if let Some(bias) = &self.bias {
            pass.ops.add_bias(bias, y);
        }
    }

    /// The input of A: `x` itself, or `x` after dropout.
    fn dropped<'a>(
        &self,
        pass: &Pass<'_, O>,
        x: &'a [O::T],
        rows: &Range<usize>,
        masked: &'a mut Vec<O::T>,
    ) -> &'a [O::T] {
        match pass.dropout {
            None => x,
            Some(dropout) => {
                let masked = sized(masked, x.len());
                dropout.apply(rows.clone(), self.number(), x, masked, false);
                masked
            }
        }
    }

    fn number(&self) -> usize {
        self.layer * Site::ALL.len() + self.site.index()
    }

    /// `dx += ` the gradient of `x` (skipped when nobody below needs it), and each segment's dA and dB into the gradients
    /// that stand at the segment's index. `x` is the forward pass's input, `dy [rows, out]` the gradient of its output.
    ///
    /// # Errors
    /// [`Stopped`] when the pace says so.
    ///
    /// # Panics
    /// On a segment with DoRA's gains, which the trainer refuses before, with factors of 16 bits, which it widens, or with more
    /// than one adapter.
    pub fn backward(
        &self,
        pass: &Pass<'_, O>,
        (x, dy): (&[O::T], &[O::T]),
        mut dx: Option<&mut [O::T]>,
        grads: &mut [Option<AdapterGrads<O::T>>],
        thin: &mut Thin<O::T>,
    ) -> Result<(), Stopped> {
        let rows = dy.len() / self.outputs;
        if let Some(dx) = dx.as_deref_mut() {
            for (r, part) in pieces(pass.pace, rows, self.outputs, self.inputs) {
                let dy = &dy[r.start * self.outputs..r.end * self.outputs];
                let dx = &mut dx[r.start * self.inputs..r.end * self.inputs];
                pass.ops.matmul_backward_part(dy, &self.weight, part, dx);
                pass.pace.breathe()?;
            }
        }
        for (index, segment) in pass.segments.iter().enumerate() {
            let Some(view) = self.trained(segment) else {
                continue;
            };
            assert!(
                view.gain.is_none(),
                "the backward pass of DoRA is not there, the trainer refuses it"
            );
            let r = segment.rows.clone();
            let inputs = r.start * self.inputs..r.end * self.inputs;
            let dy = &dy[r.start * self.outputs..r.end * self.outputs];
            let (a, bt) = view.full();
            let Thin { h, dh, masked } = thin;
            let (h, dh) = (
                sized(h, r.len() * view.rank),
                sized(dh, r.len() * view.rank),
            );
            pass.ops.shrink(dy, bt, view.rank, view.scale, dh);
            let grad = grads.get_mut(index).and_then(Option::as_mut);
            if let Some((da, dbt)) = grad.and_then(|grad| grad.site_mut(self.number())) {
                let x = self.dropped(pass, &x[inputs.clone()], &r, masked);
                pass.ops.shrink(x, a, view.rank, O::T::ONE, h);
                pass.ops.outer(h, dy, view.rank, view.scale, dbt);
                pass.ops.outer(dh, x, view.rank, O::T::ONE, da);
            }
            if let Some(dx) = dx.as_deref_mut() {
                self.delta_gradient(pass, (a, view.rank), dh, &r, (&mut dx[inputs], masked));
            }
            pass.pace.breathe()?;
        }
        Ok(())
    }

    /// What a segment trains at this site.
    fn trained<'a>(&self, segment: &'a Segment<O::T>) -> Option<SiteView<'a, O::T>> {
        let mut parts = segment.adapters.parts();
        let (adapter, weight) = parts.next()?;
        assert!(
            parts.next().is_none() && weight == 1.0,
            "a mixture is served, not trained"
        );
        adapter.site(self.layer, self.site)
    }

    /// `dx += ` what comes through A (and dropout).
    fn delta_gradient(
        &self,
        pass: &Pass<'_, O>,
        (a, rank): (&[O::T], usize),
        dh: &[O::T],
        rows: &Range<usize>,
        (dx, masked): (&mut [O::T], &mut Vec<O::T>),
    ) {
        match pass.dropout {
            None => pass.ops.expand(dh, a, rank, O::T::ONE, dx),
            Some(dropout) => {
                let through = sized(masked, dx.len());
                through.fill(O::T::ZERO);
                pass.ops.expand(dh, a, rank, O::T::ONE, through);
                dropout.apply(rows.clone(), self.number(), through, dx, true);
            }
        }
    }
}
