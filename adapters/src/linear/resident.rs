//! An adapter in memory: one aligned allocation in the layout that operations read, and the same layout for gradients.
//!
//! It must not know projections, batches or files.

use std::ops::Range;

use crate::config::Site;
use crate::ops::{Ops, Real};
use crate::weights::{AdapterWeights, ScoreHead, SiteAdapter};

/// The frozen weights that an adapter is made for.
pub trait BaseSites<O: Ops> {
    /// The operations that the weights are packed for.
    fn ops(&self) -> &O;
    /// Number of layers.
    fn layers(&self) -> usize;
    /// The frozen weight of a site.
    fn weight(&self, layer: usize, site: Site) -> &O::Matrix;
    /// Numbers in the state that a classification head reads.
    fn hidden(&self) -> usize;
}

/// An adapter does not fit the base.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path} does not fit the base: {reason}")]
pub struct Misfit {
    /// The module, as PEFT names it.
    pub path: String,
    /// What is wrong, with both numbers.
    pub reason: String,
}

/// A's, B's and gains of one adapter in one aligned allocation: loading is one build, eviction one free.
#[derive(Clone, Debug)]
pub struct ResidentAdapter<T = f32> {
    arena: Arena<T>,
    /// By layer * 7 + site.
    sites: Vec<Option<Place<T>>>,
    labels: Vec<String>,
    head: Option<Range<usize>>,
}

/// Where a site's numbers lie in the arena.
#[derive(Clone, Debug)]
struct Place<T> {
    rank: usize,
    scale: T,
    a: Range<usize>,
    bt: Range<usize>,
    gain: Option<Range<usize>>,
}

/// One site's numbers.
#[derive(Clone, Copy, Debug)]
pub struct SiteView<'a, T> {
    /// Rank, at least 1.
    pub rank: usize,
    /// The factor on `B (A x)`.
    pub scale: T,
    /// A `[rank, in]`.
    pub a: &'a [T],
    /// B transposed `[rank, out]`; with a gain, already multiplied by it.
    pub bt: &'a [T],
    /// DoRA's gain on the base's output, `[out]`.
    pub gain: Option<&'a [T]>,
}

/// Numbers on a cache line's boundary. Parts begin on one too; what lies between is zero for ever.
#[derive(Clone, Debug)]
struct Arena<T> {
    storage: Vec<T>,
    offset: usize,
    len: usize,
}

const ALIGN_BYTES: usize = 64;

// === impl Arena ===

impl<T: Real> Arena<T> {
    fn zeros(len: usize) -> Self {
        let slack = ALIGN_BYTES / size_of::<T>();
        let storage = vec![T::ZERO; len + slack];
        let past = storage.as_ptr() as usize % ALIGN_BYTES;
        let offset = (ALIGN_BYTES - past) % ALIGN_BYTES / size_of::<T>();
        Self {
            storage,
            offset,
            len,
        }
    }

    fn all(&self) -> &[T] {
        &self.storage[self.offset..self.offset + self.len]
    }

    fn all_mut(&mut self) -> &mut [T] {
        &mut self.storage[self.offset..self.offset + self.len]
    }
}

/// Lays parts one after the other, each at an aligned start.
struct Layout {
    next: usize,
    step: usize,
}

impl Layout {
    fn new<T>() -> Self {
        Self {
            next: 0,
            step: ALIGN_BYTES / size_of::<T>(),
        }
    }

    fn part(&mut self, len: usize) -> Range<usize> {
        let start = self.next;
        self.next = (start + len).next_multiple_of(self.step);
        start..start + len
    }
}

// === impl ResidentAdapter ===

impl<T: Real> ResidentAdapter<T> {
    /// An adapter that changes nothing, for a base of `layers` layers.
    pub fn empty(layers: usize) -> Self {
        let sites = vec![None; layers * Site::ALL.len()];
        Self {
            arena: Arena::zeros(0),
            sites,
            labels: Vec::new(),
            head: None,
        }
    }

    /// Lays out an adapter for a base. DoRA's norms read the base's rows, so this takes as long as reading the
    /// adapted weights once.
    ///
    /// # Errors
    /// [`Misfit`] with the first site whose sizes are not the base's.
    pub fn build<O: Ops<T = T>>(
        weights: &AdapterWeights,
        base: &impl BaseSites<O>,
    ) -> Result<Self, Misfit> {
        check(weights, base)?;
        let mut layout = Layout::new::<T>();
        let mut resident = Self::empty(base.layers());
        for (&(layer, site), adapter) in &weights.sites {
            let (outputs, inputs) = base.ops().dims(base.weight(layer, site));
            resident.sites[layer * Site::ALL.len() + site.index()] = Some(Place {
                rank: adapter.r,
                scale: T::from_f32(adapter.scale),
                a: layout.part(adapter.r * inputs),
                bt: layout.part(adapter.r * outputs),
                gain: adapter.magnitude.as_ref().map(|_| layout.part(outputs)),
            });
        }
        if let Some(head) = &weights.head {
            resident.labels.clone_from(&head.labels);
            resident.head = Some(layout.part(head.weight.len()));
        }
        resident.arena = Arena::zeros(layout.next);
        for (&(layer, site), adapter) in &weights.sites {
            resident.fill(layer, site, adapter, base);
        }
        if let (Some(head), Some(range)) = (&weights.head, resident.head.clone()) {
            copy_f32(&head.weight, &mut resident.arena.all_mut()[range]);
        }
        Ok(resident)
    }

    fn fill<O: Ops<T = T>>(
        &mut self,
        layer: usize,
        site: Site,
        adapter: &SiteAdapter,
        base: &impl BaseSites<O>,
    ) {
        let Some(place) = self.sites[layer * Site::ALL.len() + site.index()].clone() else {
            return;
        };
        let arena = self.arena.all_mut();
        copy_f32(&adapter.a, &mut arena[place.a]);
        let outputs = place.bt.len() / place.rank;
        let bt = &mut arena[place.bt.clone()];
        for (output, row) in adapter.b.chunks_exact(place.rank).enumerate() {
            for (r, b) in row.iter().enumerate() {
                bt[r * outputs + output] = T::from_f32(*b);
            }
        }
        let (Some(at), Some(magnitude)) = (place.gain, &adapter.magnitude) else {
            return;
        };
        let gain: Vec<T> = dora_gain(base.ops(), base.weight(layer, site), adapter, magnitude);
        for row in arena[place.bt].chunks_exact_mut(outputs) {
            row.iter_mut().zip(&gain).for_each(|(b, gain)| *b *= *gain);
        }
        arena[at].copy_from_slice(&gain);
    }

    /// The adapter's numbers at a site, if it adapts it.
    pub fn site(&self, layer: usize, site: Site) -> Option<SiteView<'_, T>> {
        let place = self.place(layer, site)?;
        let arena = self.arena.all();
        Some(SiteView {
            rank: place.rank,
            scale: place.scale,
            a: &arena[place.a.clone()],
            bt: &arena[place.bt.clone()],
            gain: place.gain.clone().map(|gain| &arena[gain]),
        })
    }

    fn place(&self, layer: usize, site: Site) -> Option<&Place<T>> {
        self.sites
            .get(layer * Site::ALL.len() + site.index())?
            .as_ref()
    }

    /// Names of the head's rows; empty without a head.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// The head `[labels, hidden]`.
    pub fn head(&self) -> Option<&[T]> {
        self.head.clone().map(|range| &self.arena.all()[range])
    }

    /// The head's logits: `hidden [rows, hidden]` after the final norm, `out [rows, labels]`. Does nothing without a head.
    pub fn score<O: Ops<T = T>>(&self, ops: &O, hidden: &[T], out: &mut [T]) {
        if let Some(head) = self.head() {
            ops.shrink(hidden, head, self.labels.len(), T::ONE, out);
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        size_of_val(self.arena.storage.as_slice()) + size_of_val(self.sites.as_slice())
    }

    /// The lowest adapted layer.
    pub fn lowest_layer(&self) -> Option<usize> {
        self.sites
            .iter()
            .position(Option::is_some)
            .map(|i| i / Site::ALL.len())
    }

    /// Whether a site has DoRA's magnitude.
    pub fn has_gains(&self) -> bool {
        self.sites
            .iter()
            .flatten()
            .any(|place| place.gain.is_some())
    }

    /// Every number, in the layout that [`AdapterGrads`] shares: for the optimizer.
    pub fn parameters(&self) -> &[T] {
        self.arena.all()
    }

    /// As [`ResidentAdapter::parameters`], to be changed between steps.
    pub fn parameters_mut(&mut self) -> &mut [T] {
        self.arena.all_mut()
    }

    /// Where the head lies among the parameters.
    pub fn head_range(&self) -> Option<Range<usize>> {
        self.head.clone()
    }

    /// The adapter as a file would hold it. DoRA's B was multiplied by its gain and is not given back: `None`.
    pub fn weights(&self) -> Option<AdapterWeights> {
        if self.has_gains() {
            return None;
        }
        let arena = self.arena.all();
        let mut weights = AdapterWeights::default();
        for (index, place) in self.sites.iter().enumerate() {
            let Some(place) = place else { continue };
            let bt = &arena[place.bt.clone()];
            let outputs = bt.len() / place.rank;
            let b = (0..bt.len())
                .map(|i| bt[i % place.rank * outputs + i / place.rank].to_f32())
                .collect();
            let adapter = SiteAdapter {
                r: place.rank,
                scale: place.scale.to_f32(),
                a: arena[place.a.clone()].iter().map(|a| a.to_f32()).collect(),
                b,
                magnitude: None,
            };
            let at = (index / Site::ALL.len(), Site::ALL[index % Site::ALL.len()]);
            weights.sites.insert(at, adapter);
        }
        weights.head = self.head().map(|head| ScoreHead {
            labels: self.labels.clone(),
            weight: head.iter().map(|w| w.to_f32()).collect(),
        });
        Some(weights)
    }
}

fn copy_f32<T: Real>(from: &[f32], to: &mut [T]) {
    for (from, to) in from.iter().zip(to) {
        *to = T::from_f32(*from);
    }
}

fn check<O: Ops>(weights: &AdapterWeights, base: &impl BaseSites<O>) -> Result<(), Misfit> {
    for (&(layer, site), adapter) in &weights.sites {
        let misfit = |reason: String| {
            Err(Misfit {
                path: site.path(layer),
                reason,
            })
        };
        if layer >= base.layers() {
            return misfit(format!("layer {layer} of {}", base.layers()));
        }
        let (outputs, inputs) = base.ops().dims(base.weight(layer, site));
        let sizes = [
            ("A", adapter.a.len(), adapter.r * inputs),
            ("B", adapter.b.len(), adapter.r * outputs),
            (
                "magnitude",
                adapter.magnitude.as_ref().map_or(outputs, Vec::len),
                outputs,
            ),
        ];
        for (name, found, expected) in sizes {
            if found != expected || adapter.r == 0 {
                return misfit(format!(
                    "{name} has {found} values, rank {} needs {expected}",
                    adapter.r
                ));
            }
        }
    }
    let head = weights
        .head
        .as_ref()
        .map(|head| (head.weight.len(), head.labels.len() * base.hidden()));
    match head {
        Some((found, expected)) if found != expected => {
            let reason = format!("{found} values, the labels and the hidden size need {expected}");
            Err(Misfit {
                path: "score".to_owned(),
                reason,
            })
        }
        _ => Ok(()),
    }
}

/// `m / |W + s B A|` by output row. Sums in f64: the base is as it is stored, the gain as exact as f32 can be.
fn dora_gain<O: Ops>(
    ops: &O,
    weight: &O::Matrix,
    adapter: &SiteAdapter,
    magnitude: &[f32],
) -> Vec<O::T> {
    let (outputs, inputs) = ops.dims(weight);
    let mut row = vec![O::T::ZERO; inputs];
    let gain = |output: usize| {
        ops.gather(weight, &[output as u32], &mut row);
        let row: Vec<f64> = row.iter().map(|w| w.to_f64()).collect();
        f64::from(magnitude[output]) / norm(&updated(row, output, adapter))
    };
    (0..outputs).map(gain).map(O::T::from_f64).collect()
}

fn norm(row: &[f64]) -> f64 {
    row.iter().map(|w| w * w).sum::<f64>().sqrt()
}

/// Row `output` of `W + s B A`, given that of `W`.
fn updated(mut row: Vec<f64>, output: usize, adapter: &SiteAdapter) -> Vec<f64> {
    let inputs = row.len();
    let b = &adapter.b[output * adapter.r..][..adapter.r];
    for (b, a) in b.iter().zip(adapter.a.chunks_exact(inputs)) {
        let factor = f64::from(adapter.scale) * f64::from(*b);
        row.iter_mut()
            .zip(a)
            .for_each(|(w, a)| *w += factor * f64::from(*a));
    }
    row
}

/// The weight `[out, in]` that alone does what base and adapter do together: `W + s B A`, or DoRA's
/// `m (W + s B A) / |W + s B A|`.
pub fn merged(weight: &[f32], adapter: &SiteAdapter) -> Vec<f32> {
    let inputs = adapter.a.len() / adapter.r;
    let rows = weight.chunks_exact(inputs).enumerate();
    rows.flat_map(|(output, row)| {
        let row = updated(row.iter().map(|w| f64::from(*w)).collect(), output, adapter);
        let gain = adapter
            .magnitude
            .as_ref()
            .map_or(1.0, |m| f64::from(m[output]) / norm(&row));
        row.into_iter().map(move |w| (gain * w) as f32)
    })
    .collect()
}

/// Gradients of an adapter's parameters, in its layout.
#[derive(Clone, Debug)]
pub struct AdapterGrads<T = f32> {
    arena: Arena<T>,
    sites: Vec<Option<Place<T>>>,
    head: Option<Range<usize>>,
}

impl<T: Real> AdapterGrads<T> {
    /// Zeros in the layout of `adapter`.
    pub fn of(adapter: &ResidentAdapter<T>) -> Self {
        let arena = Arena::zeros(adapter.arena.len);
        Self {
            arena,
            sites: adapter.sites.clone(),
            head: adapter.head.clone(),
        }
    }

    /// Every gradient, in the order of [`ResidentAdapter::parameters`].
    pub fn all(&self) -> &[T] {
        self.arena.all()
    }

    /// As [`AdapterGrads::all`], to be scaled or cleared.
    pub fn all_mut(&mut self) -> &mut [T] {
        self.arena.all_mut()
    }

    /// The head's gradient.
    pub fn head_mut(&mut self) -> Option<&mut [T]> {
        self.head
            .clone()
            .map(|range| &mut self.arena.all_mut()[range])
    }

    /// (dA, dB transposed) of a site.
    pub(super) fn site_mut(&mut self, index: usize) -> Option<(&mut [T], &mut [T])> {
        let place = self.sites.get(index)?.as_ref()?;
        let (a, bt) = (place.a.clone(), place.bt.clone());
        let (before, after) = self.arena.all_mut().split_at_mut(bt.start);
        Some((&mut before[a], &mut after[..bt.len()]))
    }
}
