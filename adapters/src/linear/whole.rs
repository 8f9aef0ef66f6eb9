//! Whole tensors that an adapter has in the base's place: `W + d`, packed as the base's are, in the rows that the adapter is for.
//!
//! The deltas `d` are what a file holds and what training changes; `W + d` follows from them, in serving once and in training after
//! each step, by the same additions, so that what is served is what was trained. It must not know which tensors are unfrozen, or why.

use std::collections::BTreeMap;
use std::ops::Range;

use half::bf16;

use super::{
    AdapterGrads, BaseSites, LoraLinear, Misfit, ResidentAdapter, exact_copy, numbers, some_ones,
};
use crate::batch::{Pass, Segment};
use crate::config::{BaseTensor, LayerTensor};
use crate::ops::{Buffer, Ops, Real, View, Weight, WeightKind};
use crate::pace::{Pace, Stopped};
use crate::weights::Delta;

/// Rows of a weight that are read at a time.
const ROWS: usize = 64;

/// Where a delta lies among the parameters.
#[derive(Clone, Debug)]
pub(super) struct DeltaPlace {
    pub(super) at: Range<usize>,
    /// As [`Delta::rows`].
    pub(super) rows: usize,
}

/// Where all lie.
pub(super) type Deltas = BTreeMap<BaseTensor, DeltaPlace>;

/// Tensors in the base's place.
#[derive(Debug)]
pub(super) struct Whole<O: Ops> {
    matrices: BTreeMap<BaseTensor, O::Matrix>,
    /// Biases and norms, working.
    vectors: BTreeMap<BaseTensor, O::Buf>,
}

// === impl Whole ===

impl<O: Ops> Whole<O> {
    pub(super) fn empty() -> Self {
        Self {
            matrices: BTreeMap::new(),
            vectors: BTreeMap::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.matrices.is_empty() && self.vectors.is_empty()
    }

    /// The lowest layer of `layers` that it changes what is read in: `layers` when that is all behind them.
    pub(super) fn lowest_layer(&self, layers: usize) -> Option<usize> {
        let tensors = self.matrices.keys().chain(self.vectors.keys());
        let lowest = tensors.map(|tensor| match tensor {
            BaseTensor::Layer(layer, _) => *layer,
            BaseTensor::Embedding => 0,
            BaseTensor::FinalNorm | BaseTensor::Output => layers,
        });
        lowest.min()
    }

    /// Makes one tensor `W + d`. What the base does not have is left out; see [`check`].
    pub(super) fn set(
        &mut self,
        (base, ops): (&impl BaseSites<O>, &O),
        tensor: BaseTensor,
        delta: &[O::T],
    ) {
        if let Some(matrix) = base.matrix(tensor) {
            self.matrices.insert(tensor, weight(ops, matrix, delta));
        } else if let Some(vector) = base.vector(tensor) {
            let mut sum = vec![O::T::ZERO; delta.len()];
            ops.read(vector, &mut sum);
            sum.iter_mut().zip(delta).for_each(|(w, d)| *w += *d);
            let mut own = ops.working();
            ops.resize(&mut own, sum.len());
            ops.write(&sum, own.all_mut());
            self.vectors.insert(tensor, own);
        }
    }

    pub(super) fn matrix(&self, tensor: BaseTensor) -> Option<&O::Matrix> {
        self.matrices.get(&tensor)
    }

    pub(super) fn vector(&self, tensor: BaseTensor) -> Option<View<'_, O>> {
        self.vectors.get(&tensor).map(Buffer::all)
    }
}

/// The first delta that the base has no tensor for, or one of another size.
pub(super) fn check<O: Ops>(
    full: &BTreeMap<BaseTensor, Delta>,
    base: &impl BaseSites<O>,
) -> Result<(), Misfit> {
    for (tensor, Delta { values: delta, .. }) in full {
        let expected = match (*tensor, base.matrix(*tensor)) {
            (BaseTensor::Layer(layer, _), _) if layer >= base.layers() => {
                Err(format!("layer {layer} of {}", base.layers()))
            }
            (_, Some(matrix)) => {
                let (outputs, inputs) = base.ops().dims(matrix);
                Ok(outputs * inputs)
            }
            (vector, None) if base.vector(vector).is_none() => {
                Err("the base has no such tensor".to_owned())
            }
            (BaseTensor::Layer(layer, LayerTensor::Bias(site)), None) => {
                Ok(base.ops().dims(base.weight(layer, site)).0)
            }
            (BaseTensor::Layer(_, LayerTensor::QNorm | LayerTensor::KNorm), None) => {
                Ok(delta.len())
            }
            (_, None) => Ok(base.hidden()),
        };
        let reason = match expected {
            Err(reason) => reason,
            Ok(expected) if expected != delta.len() => {
                format!(
                    "the delta has {} values, the base needs {expected}",
                    delta.len()
                )
            }
            Ok(_) => continue,
        };
        let path = tensor.path();
        return Err(Misfit { path, reason });
    }
    Ok(())
}

/// Bytes that the tensors will take: those of matrices in bf16 where the base is, and in single precision otherwise.
pub(super) fn bytes<O: Ops>(full: &BTreeMap<BaseTensor, Delta>, base: &impl BaseSites<O>) -> usize {
    let ops = base.ops();
    let tensor = |tensor: BaseTensor, len: usize| match base.matrix(tensor) {
        Some(matrix) => {
            let (outputs, inputs) = ops.dims(matrix);
            // Layouts fill outputs up to whole panels.
            let numbers = outputs.next_multiple_of(32) * inputs;
            match ops.kind(matrix) {
                WeightKind::Bf16 => numbers * size_of::<bf16>(),
                _ => numbers * size_of::<O::T>(),
            }
        }
        None => len * ops.working_bytes(),
    };
    full.iter()
        .map(|(at, delta)| tensor(*at, delta.values.len()))
        .sum()
}

/// Blocks of rows of a base weight, exact and on the host.
fn by_rows<O: Ops>(ops: &O, weight: &O::Matrix, mut of: impl FnMut(Range<usize>, &[O::T])) {
    let (outputs, inputs) = ops.dims(weight);
    let ids: Vec<u32> = (0..outputs as u32).collect();
    let mut gathered = ops.exact();
    let mut rows = Vec::new();
    let mut first = 0;
    for ids in ids.chunks(ROWS) {
        ops.resize(&mut gathered, ids.len() * inputs);
        ops.gather(weight, ops.ids(ids), gathered.all_mut());
        rows.resize(gathered.len(), O::T::ZERO);
        ops.read(gathered.all(), &mut rows);
        of(first..first + rows.len(), &rows);
        first += rows.len();
    }
}

/// `W + d`, in the base's format where that is plain; never in blocks again.
fn weight<O: Ops>(ops: &O, base: &O::Matrix, delta: &[O::T]) -> O::Matrix {
    let (outputs, inputs) = ops.dims(base);
    let mut sum = Vec::with_capacity(delta.len());
    by_rows(ops, base, |at, rows| {
        let pairs = rows.iter().zip(&delta[at]);
        sum.extend(pairs.map(|(w, d)| (*w + *d).to_f32()));
    });
    let sum = match ops.kind(base) {
        WeightKind::Bf16 => Weight::Bf16(sum.into_iter().map(bf16::from_f32).collect()),
        _ => Weight::F32(sum),
    };
    ops.pack_weight(&sum, outputs, inputs)
}

// === impl ResidentAdapter ===

impl<O: Ops> ResidentAdapter<O> {
    /// Whether it holds a delta of this tensor to be trained.
    pub fn trains(&self, tensor: BaseTensor) -> bool {
        self.deltas.contains_key(&tensor)
    }

    /// Takes the whole tensors of the deltas as they are now. Does nothing to an adapter that serves or has none. Breathes between
    /// tensors, but is not left half done: whether the work is still wanted is asked again by whoever goes on.
    pub fn renew_whole(&mut self, base: &impl BaseSites<O>, ops: &O, pace: &dyn Pace) {
        let deltas = std::mem::take(&mut self.deltas);
        for (tensor, DeltaPlace { at, .. }) in &deltas {
            ops.begin_pass();
            let mut delta = vec![O::T::ZERO; at.len()];
            ops.read(self.part(at.clone()), &mut delta);
            self.whole.set((base, ops), *tensor, &delta);
            let _asked_again_later = pace.breathe();
        }
        self.deltas = deltas;
    }

    /// `d -= factor W` of every delta: with the optimizer's own decay of `d`, the decay of `W + d`.
    pub fn decay_whole(&mut self, base: &impl BaseSites<O>, ops: &O, factor: O::T) {
        let deltas = std::mem::take(&mut self.deltas);
        let mut one = ops.exact();
        ops.resize(&mut one, 1);
        ops.write(&[O::T::ONE], one.all_mut());
        let mut block = ops.exact();
        for (tensor, DeltaPlace { at, .. }) in &deltas {
            ops.begin_pass();
            if let Some(matrix) = base.matrix(*tensor) {
                by_rows(ops, matrix, |rows, numbers| {
                    ops.resize(&mut block, numbers.len());
                    ops.write(numbers, block.all_mut());
                    let part = self.part_mut(at.start + rows.start..at.start + rows.end);
                    ops.outer(one.all(), block.all(), 1, -factor, part);
                });
            } else if let Some(vector) = base.vector(*tensor) {
                ops.outer(one.all(), vector, 1, -factor, self.part_mut(at.clone()));
            }
        }
        self.deltas = deltas;
    }
}

// === impl LoraLinear ===

impl<O: Ops> LoraLinear<O> {
    /// The weight that a segment has in the base's place. It is never one of several adapters: see [`crate::batch::Mixture`].
    pub(super) fn own<'a>(&self, segment: &'a Segment<O>) -> Option<&'a O::Matrix> {
        let (adapter, _) = segment.adapters.parts().next()?;
        let tensor = BaseTensor::weight(self.layer, self.site);
        adapter.whole.matrix(tensor)
    }

    /// The bias that a segment has in the base's place.
    fn own_bias<'a>(&self, segment: &'a Segment<O>) -> Option<View<'a, O>> {
        let (adapter, _) = segment.adapters.parts().next()?;
        let tensor = BaseTensor::Layer(self.layer, LayerTensor::Bias(self.site));
        adapter.whole.vector(tensor)
    }

    /// `y += b`, with a segment's own bias in its rows.
    pub(super) fn add_bias(&self, pass: &Pass<'_, O>, y: &mut O::Buf) {
        let Some(bias) = &self.bias else { return };
        let mut done = 0;
        for segment in pass.segments {
            let Some(own) = self.own_bias(segment) else {
                continue;
            };
            let before = numbers(&(done..segment.rows.start), self.outputs);
            if !before.is_empty() {
                pass.ops.add_bias(bias.all(), y.part_mut(before));
            }
            let rows = numbers(&segment.rows, self.outputs);
            pass.ops.add_bias(own, y.part_mut(rows));
            done = segment.rows.end;
        }
        let rest = done * self.outputs..y.len();
        if !rest.is_empty() {
            pass.ops.add_bias(bias.all(), y.part_mut(rest));
        }
    }

    /// Some rows, cut where another weight begins.
    pub(super) fn cut<'a>(
        &'a self,
        pass: &'a Pass<'_, O>,
        rows: Range<usize>,
    ) -> Vec<(Range<usize>, &'a O::Matrix)> {
        let mut cut = Vec::new();
        let mut done = rows.start;
        for segment in pass.segments {
            let (start, end) = (segment.rows.start.max(done), segment.rows.end.min(rows.end));
            if let (true, Some(own)) = (start < end, self.own(segment)) {
                cut.extend((done < start).then_some((done..start, &self.weight)));
                cut.push((start..end, own));
                done = end;
            }
        }
        cut.extend((done < rows.end).then_some((done..rows.end, &self.weight)));
        cut
    }

    /// `dW += dy^T x` and `db += ` the sum of `dy`, of the segments that train them.
    pub(super) fn whole_gradients(
        &self,
        pass: &Pass<'_, O>,
        (x, dy): (&O::Buf, &O::Buf),
        grads: &mut [Option<AdapterGrads<O>>],
        (exact, ones): (&mut O::Buf, &mut O::Buf),
    ) -> Result<(), Stopped> {
        let ops = pass.ops;
        let flops = 2 * self.outputs * self.inputs;
        let most = (pass.pace.quantum_flops() / flops).max(1);
        for (segment, grads) in pass.segments.iter().zip(grads) {
            let Some(grads) = grads else { continue };
            let place = |tensor| grads.delta(BaseTensor::Layer(self.layer, tensor));
            let (weight, bias) = (
                place(LayerTensor::Weight(self.site)),
                place(LayerTensor::Bias(self.site)),
            );
            if let Some(at) = bias {
                let ones = some_ones(ops, ones, segment.rows.len());
                let dy = dy.part(numbers(&segment.rows, self.outputs));
                ops.outer(ones, dy, 1, O::T::ONE, grads.part_mut(at));
            }
            let Some(at) = weight else { continue };
            for start in segment.rows.clone().step_by(most) {
                let rows = start..(start + most).min(segment.rows.end);
                let dy = dy.part(numbers(&rows, self.outputs));
                exact_copy(ops, dy, (rows.len(), self.outputs), (exact, ones));
                let x = x.part(numbers(&rows, self.inputs));
                let dw = grads.part_mut(at.clone());
                ops.outer(exact.all(), x, self.outputs, O::T::ONE, dw);
                pass.pace.breathe()?;
            }
        }
        Ok(())
    }
}
