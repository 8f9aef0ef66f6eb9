//! An adapter in memory: aligned, in the layout and the dtypes that operations read, and the same layout for gradients.
//!
//! It must not know projections, batches or files.

use std::ops::Range;

use half::slice::HalfBitsSliceExt;

use super::update::dora_gain;
use crate::config::Site;
use crate::ops::{self, Factor, Ops, Real};
use crate::weights::{AdapterWeights, Numbers, ScoreHead, SiteAdapter};

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

/// An adapter's numbers in the order in which a step reads them: loading is one build, eviction one free. A and B keep the
/// dtype of their file; gains, the head, and everything that training changes are of full width.
#[derive(Clone, Debug)]
pub struct ResidentAdapter<T = f32> {
    full: Arena<T>,
    /// Factors of 16 bits; which of the two kinds, each place says.
    half: Arena<u16>,
    /// By layer * 7 + site.
    sites: Vec<Option<Place<T>>>,
    labels: Vec<String>,
    head: Option<Range<usize>>,
}

/// Where a site's numbers lie.
#[derive(Clone, Debug)]
struct Place<T> {
    rank: usize,
    scale: T,
    a: Span,
    bt: Span,
    gain: Option<Range<usize>>,
}

/// Where a factor lies: the arena's part, and how to read it.
#[derive(Clone, Debug)]
enum Span {
    Full(Range<usize>),
    Bf16(Range<usize>),
    F16(Range<usize>),
}

/// One site's numbers.
#[derive(Clone, Copy, Debug)]
pub struct SiteView<'a, T> {
    /// Rank, at least 1.
    pub rank: usize,
    /// The factor on `B (A x)`.
    pub scale: T,
    /// A `[rank, in]`.
    pub a: Factor<'a, T>,
    /// B transposed `[rank, out]`.
    pub bt: Factor<'a, T>,
    /// DoRA's gain on base and update together, `[out]`.
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

/// A spare allocation may be larger than needed by one part in so many.
const SLACK: usize = 16;

// === impl Arena ===

impl<T: Copy + Default> Arena<T> {
    /// Numbers in a cache line.
    const LINE: usize = ALIGN_BYTES / size_of::<T>();

    fn zeros(len: usize) -> Self {
        Self::in_spare(Vec::new(), len)
    }

    /// Room for `len` numbers, in `spare` if it is about as large as needed. Whoever fills it writes all of it.
    fn in_spare(mut spare: Vec<T>, len: usize) -> Self {
        let needed = Self::allocated(len);
        let fits = needed..=needed + needed / SLACK;
        let storage = if fits.contains(&spare.capacity()) {
            spare.resize(needed, T::default());
            spare
        } else {
            vec![T::default(); needed]
        };
        let past = storage.as_ptr() as usize % ALIGN_BYTES;
        let offset = if len == 0 {
            0
        } else {
            (ALIGN_BYTES - past) % ALIGN_BYTES / size_of::<T>()
        };
        Self {
            storage,
            offset,
            len,
        }
    }

    /// Numbers allocated for `len` aligned ones.
    fn allocated(len: usize) -> usize {
        if len == 0 { 0 } else { len + Self::LINE }
    }

    fn all(&self) -> &[T] {
        &self.storage[self.offset..self.offset + self.len]
    }

    fn all_mut(&mut self) -> &mut [T] {
        &mut self.storage[self.offset..self.offset + self.len]
    }
}

/// Lays parts one after the other, each at an aligned start.
struct Parts {
    next: usize,
    line: usize,
}

impl Parts {
    fn new(line: usize) -> Self {
        Self { next: 0, line }
    }

    fn part(&mut self, len: usize) -> Range<usize> {
        let start = self.next;
        self.next = (start + len).next_multiple_of(self.line);
        start..start + len
    }
}

/// Where everything goes, before there is memory for it.
struct Layout<T> {
    sites: Vec<Option<Place<T>>>,
    head: Option<Range<usize>>,
    full: usize,
    half: usize,
}

impl<T: Real> Layout<T> {
    fn of(weights: &AdapterWeights, layers: usize) -> Self {
        let mut sites = vec![None; layers * Site::ALL.len()];
        let mut full = Parts::new(Arena::<T>::LINE);
        let mut half = Parts::new(Arena::<u16>::LINE);
        for (&(layer, site), adapter) in &weights.sites {
            let mut span = |numbers: &Numbers| match numbers {
                Numbers::F32(numbers) => Span::Full(full.part(numbers.len())),
                Numbers::Bf16(numbers) => Span::Bf16(half.part(numbers.len())),
                Numbers::F16(numbers) => Span::F16(half.part(numbers.len())),
            };
            let (a, bt) = (span(&adapter.a), span(&adapter.b));
            sites[layer * Site::ALL.len() + site.index()] = Some(Place {
                rank: adapter.r,
                scale: T::from_f32(adapter.scale),
                a,
                bt,
                gain: adapter.magnitude.as_ref().map(|m| full.part(m.len())),
            });
        }
        let head = weights
            .head
            .as_ref()
            .map(|head| full.part(head.weight.len()));
        Self {
            sites,
            head,
            full: full.next,
            half: half.next,
        }
    }

    fn bytes(&self) -> usize {
        Arena::<T>::allocated(self.full) * size_of::<T>()
            + Arena::<u16>::allocated(self.half) * size_of::<u16>()
            + size_of_val(self.sites.as_slice())
    }
}

// === impl SiteView ===

impl<'a, T: Copy> SiteView<'a, T> {
    /// A and B transposed as training has them.
    ///
    /// # Panics
    /// On factors of 16 bits, which training widens before it begins.
    pub fn full(&self) -> (&'a [T], &'a [T]) {
        match (self.a, self.bt) {
            (Factor::Full(a), Factor::Full(bt)) => (a, bt),
            _ => panic!("only factors of full width are trained"),
        }
    }
}

// === impl ResidentAdapter ===

impl<T: Real> ResidentAdapter<T> {
    /// An adapter that changes nothing, for a base of `layers` layers.
    pub fn empty(layers: usize) -> Self {
        let layout = Layout::of(&AdapterWeights::default(), layers);
        Self::laid_out(layout, Vec::new(), None)
    }

    fn laid_out(layout: Layout<T>, labels: Vec<String>, spare: Option<Self>) -> Self {
        let (full, half) = spare.map_or_else(Default::default, |spare| {
            (spare.full.storage, spare.half.storage)
        });
        Self {
            full: Arena::in_spare(full, layout.full),
            half: Arena::in_spare(half, layout.half),
            sites: layout.sites,
            labels,
            head: layout.head,
        }
    }

    /// What [`ResidentAdapter::bytes`] will be once these weights are built for a base of `layers` layers.
    pub fn bytes_for(weights: &AdapterWeights, layers: usize) -> usize {
        Layout::<T>::of(weights, layers).bytes()
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
        Self::build_in(None, weights, base)
    }

    /// The same in the memory of an adapter that nobody needs any more, if that is about as large: memory that the system has to
    /// find and clear first costs more than the numbers' way into it.
    ///
    /// # Errors
    /// As [`ResidentAdapter::build`].
    pub fn build_in<O: Ops<T = T>>(
        spare: Option<Self>,
        weights: &AdapterWeights,
        base: &impl BaseSites<O>,
    ) -> Result<Self, Misfit> {
        check(weights, base)?;
        let labels = weights.head.as_ref().map(|head| head.labels.clone());
        let layout = Layout::of(weights, base.layers());
        let mut resident = Self::laid_out(layout, labels.unwrap_or_default(), spare);
        resident.fill(weights);
        for (&(layer, site), adapter) in &weights.sites {
            resident.fill_gain(layer, site, adapter, base);
        }
        if let (Some(head), Some(range)) = (&weights.head, resident.head.clone()) {
            copy_f32(&head.weight, &mut resident.full.all_mut()[range]);
        }
        Ok(resident)
    }

    /// Every A and B into its place. Memory that was never touched is the slow part of it, so all threads touch it; a few sites
    /// at a time, because a step that finds the threads taken works alone.
    fn fill(&mut self, weights: &AdapterWeights) {
        let (mut full, mut half) = (
            Splitter::new(self.full.all_mut()),
            Splitter::new(self.half.all_mut()),
        );
        let mut fills = Vec::with_capacity(2 * weights.sites.len());
        for (&(layer, site), adapter) in &weights.sites {
            let Some(place) = &self.sites[layer * Site::ALL.len() + site.index()] else {
                continue;
            };
            // B is kept transposed; A has one column in this sense, so it is copied.
            let factors = [
                (&adapter.a, &place.a, 1),
                (&adapter.b, &place.bt, place.rank),
            ];
            for (numbers, span, columns) in factors {
                let into = match span {
                    Span::Full(at) => Part::Full(full.part(at)),
                    Span::Bf16(at) | Span::F16(at) => Part::Half(half.part(at)),
                };
                fills.push((numbers, columns, into));
            }
        }
        full.end();
        half.end();
        for fills in fills.chunks_mut(FILLS) {
            ops::for_each(fills, |(numbers, columns, into)| {
                fill_part(numbers, *columns, into)
            });
        }
    }

    /// What DoRA divides by, from the base's rows.
    fn fill_gain<O: Ops<T = T>>(
        &mut self,
        layer: usize,
        site: Site,
        adapter: &SiteAdapter,
        base: &impl BaseSites<O>,
    ) {
        let at = self.place(layer, site).and_then(|place| place.gain.clone());
        if let (Some(at), Some(magnitude)) = (at, &adapter.magnitude) {
            let gain = dora_gain(base.ops(), base.weight(layer, site), adapter, magnitude);
            self.full.all_mut()[at].copy_from_slice(&gain);
        }
    }

    /// The adapter's numbers at a site, if it adapts it.
    pub fn site(&self, layer: usize, site: Site) -> Option<SiteView<'_, T>> {
        let place = self.place(layer, site)?;
        Some(SiteView {
            rank: place.rank,
            scale: place.scale,
            a: self.factor(&place.a),
            bt: self.factor(&place.bt),
            gain: place.gain.clone().map(|gain| &self.full.all()[gain]),
        })
    }

    fn factor(&self, span: &Span) -> Factor<'_, T> {
        let half = |at: &Range<usize>| &self.half.all()[at.clone()];
        match span {
            Span::Full(at) => Factor::Full(&self.full.all()[at.clone()]),
            Span::Bf16(at) => Factor::Bf16(half(at).reinterpret_cast()),
            Span::F16(at) => Factor::F16(half(at).reinterpret_cast()),
        }
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
        self.head.clone().map(|range| &self.full.all()[range])
    }

    /// The head's logits: `hidden [rows, hidden]` after the final norm, `out [rows, labels]`. Does nothing without a head.
    pub fn score<O: Ops<T = T>>(&self, ops: &O, hidden: &[T], out: &mut [T]) {
        if let Some(head) = self.head() {
            ops.shrink(hidden, head, self.labels.len(), T::ONE, out);
        }
    }

    /// Bytes held: those of each number as it is stored, alignment, and the table of places.
    pub fn bytes(&self) -> usize {
        size_of_val(self.full.storage.as_slice())
            + size_of_val(self.half.storage.as_slice())
            + size_of_val(self.sites.as_slice())
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

    /// Every number, in the layout that [`AdapterGrads`] shares: for the optimizer. The adapter was built from
    /// [`AdapterWeights::widened`] numbers; others are not changed by training.
    pub fn parameters(&self) -> &[T] {
        self.full.all()
    }

    /// As [`ResidentAdapter::parameters`], to be changed between steps.
    pub fn parameters_mut(&mut self) -> &mut [T] {
        self.full.all_mut()
    }

    /// Where the head lies among the parameters.
    pub fn head_range(&self) -> Option<Range<usize>> {
        self.head.clone()
    }

    /// The adapter as a file would hold it. DoRA's magnitude went into its gain and is not given back: `None`.
    pub fn weights(&self) -> Option<AdapterWeights> {
        if self.has_gains() {
            return None;
        }
        let mut weights = AdapterWeights::default();
        for (index, place) in self.sites.iter().enumerate() {
            let Some(place) = place else { continue };
            let at = (index / Site::ALL.len(), Site::ALL[index % Site::ALL.len()]);
            let outputs = self.factor(&place.bt).len() / place.rank;
            let adapter = SiteAdapter {
                r: place.rank,
                scale: place.scale.to_f32(),
                a: self.numbers(&place.a, 1),
                b: self.numbers(&place.bt, outputs),
                magnitude: None,
            };
            weights.sites.insert(at, adapter);
        }
        weights.head = self.head().map(|head| ScoreHead {
            labels: self.labels.clone(),
            weight: head.iter().map(|w| w.to_f32()).collect(),
        });
        Some(weights)
    }

    /// A span's numbers, its columns as rows.
    fn numbers(&self, span: &Span, columns: usize) -> Numbers {
        fn out<E, N: Copy + Default>(from: &[E], columns: usize, of: impl Fn(&E) -> N) -> Vec<N> {
            let mut into = vec![N::default(); from.len()];
            turned(from, columns, &mut into, of);
            into
        }
        match self.factor(span) {
            Factor::Full(numbers) => Numbers::F32(out(numbers, columns, |n| n.to_f32())),
            Factor::Bf16(numbers) => Numbers::Bf16(out(numbers, columns, |n| *n)),
            Factor::F16(numbers) => Numbers::F16(out(numbers, columns, |n| *n)),
        }
    }
}

/// Factors that are filled at a time.
const FILLS: usize = 16;

/// A part of an arena, before its numbers are there.
enum Part<'a, T> {
    Full(&'a mut [T]),
    Half(&'a mut [u16]),
}

/// Gives out ascending parts of a slice; what lies between becomes zero.
struct Splitter<'a, T> {
    rest: &'a mut [T],
    given: usize,
}

impl<'a, T: Copy + Default> Splitter<'a, T> {
    fn new(rest: &'a mut [T]) -> Self {
        Self { rest, given: 0 }
    }

    fn part(&mut self, at: &Range<usize>) -> &'a mut [T] {
        let rest = std::mem::take(&mut self.rest);
        let (gap, rest) = rest.split_at_mut(at.start - self.given);
        gap.fill(T::default());
        let (part, rest) = rest.split_at_mut(at.len());
        (self.rest, self.given) = (rest, at.end);
        part
    }

    fn end(self) {
        self.rest.fill(T::default());
    }
}

/// Columns of `numbers [_, columns]` become rows of a part.
fn fill_part<T: Real>(numbers: &Numbers, columns: usize, into: &mut Part<'_, T>) {
    match (numbers, into) {
        (Numbers::F32(numbers), Part::Full(into)) => {
            turned(numbers, columns, into, |n| T::from_f32(*n));
        }
        (Numbers::Bf16(numbers), Part::Half(into)) => {
            turned(numbers, columns, into, |n| n.to_bits());
        }
        (Numbers::F16(numbers), Part::Half(into)) => {
            turned(numbers, columns, into, |n| n.to_bits());
        }
        _ => unreachable!("the layout was made of these numbers"),
    }
}

/// Rows of a factor that are turned at a time.
const TURNED_ROWS: usize = 64;

/// Columns of `from [_, columns]` become rows of `into [columns, _]`.
fn turned<E, N>(from: &[E], columns: usize, into: &mut [N], of: impl Fn(&E) -> N) {
    if columns == 1 {
        into.iter_mut()
            .zip(from)
            .for_each(|(into, from)| *into = of(from));
        return;
    }
    let rows = from.len() / columns;
    // A strip of rows at a time stays in the first-level cache for all of its columns.
    for first in (0..rows).step_by(TURNED_ROWS) {
        let strip = &from[first * columns..(first + TURNED_ROWS).min(rows) * columns];
        for (column, into) in into.chunks_exact_mut(rows).enumerate() {
            let column = strip[column..].iter().step_by(columns);
            for (into, from) in into[first..].iter_mut().zip(column) {
                *into = of(from);
            }
        }
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
        let arena = Arena::zeros(adapter.full.len);
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
        let (Span::Full(a), Span::Full(bt)) = (place.a.clone(), place.bt.clone()) else {
            return None;
        };
        let (before, after) = self.arena.all_mut().split_at_mut(bt.start);
        Some((&mut before[a], &mut after[..bt.len()]))
    }
}
