//! An adapter in memory: aligned, in the layout and the dtypes that operations read, and the same layout for gradients.
//!
//! It must not know projections, batches or files.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::panic_any;

use super::update::dora_gain;
use crate::config::Site;
use crate::ops::{
    self, ARENA_ALIGN, ArenaSize, Backend, Ops, OutOfMemory, Real, Span, View, ViewMut,
};
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

/// Why an adapter cannot be laid out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// It is made for another base.
    #[error(transparent)]
    Misfit(#[from] Misfit),
    /// The device is full.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
}

/// An adapter's numbers in the order in which a step reads them: loading is one build, eviction one free. A and B keep the
/// dtype of their file; gains, the head, and everything that training changes are of full width.
#[derive(Debug)]
pub struct ResidentAdapter<O: Ops = Backend> {
    arena: O::Arena,
    pub(super) size: ArenaSize,
    /// By layer * 7 + site.
    pub(super) sites: Vec<Option<Place<O::T>>>,
    labels: Vec<String>,
    pub(super) head: Option<Range<usize>>,
    bytes: usize,
}

/// Where a site's numbers lie.
#[derive(Clone, Debug)]
pub(super) struct Place<T> {
    rank: usize,
    scale: T,
    pub(super) a: Span,
    pub(super) bt: Span,
    gain: Option<Range<usize>>,
}

/// Which of an adapter's tensors a parameter belongs to: what its learning rate follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tensor {
    /// What an update shrinks by.
    A,
    /// What it expands by.
    B,
    /// A classification head.
    Head,
}

/// One site's numbers.
#[derive(Debug)]
pub struct SiteView<'a, O: Ops> {
    /// Rank, at least 1.
    pub rank: usize,
    /// The factor on `B (A x)`.
    pub scale: O::T,
    /// A `[rank, in]`.
    pub a: O::Factor<'a>,
    /// B transposed `[rank, out]`.
    pub bt: O::Factor<'a>,
    /// DoRA's gain on base and update together, `[out]`.
    pub gain: Option<View<'a, O>>,
}

/// Lays parts one after the other, each at an aligned start.
struct Parts {
    next: usize,
    line: usize,
}

impl Parts {
    fn new(number_bytes: usize) -> Self {
        let line = ARENA_ALIGN / number_bytes;
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
    size: ArenaSize,
}

impl<T: Real> Layout<T> {
    fn of(weights: &AdapterWeights, layers: usize) -> Self {
        let mut sites = vec![None; layers * Site::ALL.len()];
        let mut full = Parts::new(size_of::<T>());
        let mut half = Parts::new(size_of::<u16>());
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
            size: ArenaSize {
                full: full.next,
                half: half.next,
            },
        }
    }

    fn place(&self, layer: usize, site: Site) -> Option<&Place<T>> {
        self.sites
            .get(layer * Site::ALL.len() + site.index())?
            .as_ref()
    }

    /// Bytes of numbers and table.
    fn bytes<O: Ops<T = T>>(&self, ops: &O) -> usize {
        ops.arena_bytes(self.size) + size_of_val(self.sites.as_slice())
    }

    /// Every number into its place. Memory that was never touched is the slow part of it, so all threads touch it; a few sites
    /// at a time, because a step that finds the threads taken works alone.
    fn fill(&self, weights: &AdapterWeights, gains: &Gains<T>, full: &mut [T], half: &mut [u16]) {
        let (mut full, mut half) = (Splitter::new(full), Splitter::new(half));
        let mut fills = Vec::with_capacity(2 * weights.sites.len());
        for (&(layer, site), adapter) in &weights.sites {
            let Some(place) = self.place(layer, site) else {
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
            if let (Some(at), Some(gain)) = (&place.gain, gains.get(&(layer, site))) {
                full.part(at).copy_from_slice(gain);
            }
        }
        if let (Some(at), Some(head)) = (&self.head, &weights.head) {
            let into = full.part(at).iter_mut();
            into.zip(&head.weight)
                .for_each(|(into, w)| *into = T::from_f32(*w));
        }
        full.end();
        half.end();
        for fills in fills.chunks_mut(FILLS) {
            ops::for_each(fills, |(numbers, columns, into)| {
                fill_part(numbers, *columns, into)
            });
        }
    }
}

/// DoRA's gains of the sites that have them.
type Gains<T> = BTreeMap<(usize, Site), Vec<T>>;

/// What DoRA divides by comes from the base's rows.
fn gains<O: Ops>(weights: &AdapterWeights, base: &impl BaseSites<O>, ops: &O) -> Gains<O::T> {
    let sites = weights.sites.iter();
    let gain = |(&(layer, site), adapter): (&(usize, Site), &SiteAdapter)| {
        let magnitude = adapter.magnitude.as_ref()?;
        let gain = dora_gain(ops, base.weight(layer, site), adapter, magnitude);
        Some(((layer, site), gain))
    };
    sites.filter_map(gain).collect()
}

// === impl ResidentAdapter ===

impl<O: Ops> ResidentAdapter<O> {
    /// An adapter that changes nothing, for a base of `layers` layers.
    pub fn empty(ops: &O, layers: usize) -> Self {
        let layout = Layout::of(&AdapterWeights::default(), layers);
        let arena = ops.arena(None, layout.size, &mut |_, _| ());
        Self {
            arena: arena.unwrap_or_else(|error| panic_any(error)),
            size: layout.size,
            bytes: layout.bytes(ops),
            sites: layout.sites,
            labels: Vec::new(),
            head: None,
        }
    }

    /// What [`ResidentAdapter::bytes`] will be once these weights are built for a base of `layers` layers.
    pub fn bytes_for(ops: &O, weights: &AdapterWeights, layers: usize) -> usize {
        Layout::<O::T>::of(weights, layers).bytes(ops)
    }

    /// Lays out an adapter for a base. DoRA's norms read the base's rows, so this takes as long as reading the
    /// adapted weights once.
    ///
    /// # Errors
    /// [`BuildError::Misfit`] with the first site whose sizes are not the base's; [`BuildError::OutOfMemory`].
    pub fn build(weights: &AdapterWeights, base: &impl BaseSites<O>) -> Result<Self, BuildError> {
        Self::build_in(None, weights, base)
    }

    /// The same in the memory of an adapter that nobody needs any more, if that is about as large: memory that the system has to
    /// find and clear first costs more than the numbers' way into it.
    ///
    /// # Errors
    /// As [`ResidentAdapter::build`].
    pub fn build_in(
        spare: Option<Self>,
        weights: &AdapterWeights,
        base: &impl BaseSites<O>,
    ) -> Result<Self, BuildError> {
        check(weights, base)?;
        let ops = base.ops().beside();
        let layout = Layout::of(weights, base.layers());
        let gains = gains(weights, base, &ops);
        let arena = ops.arena(
            spare.map(|spare| spare.arena),
            layout.size,
            &mut |full, half| {
                layout.fill(weights, &gains, full, half);
            },
        )?;
        let labels = weights.head.as_ref().map(|head| head.labels.clone());
        Ok(Self {
            arena,
            size: layout.size,
            bytes: layout.bytes(&ops),
            sites: layout.sites,
            labels: labels.unwrap_or_default(),
            head: layout.head,
        })
    }

    /// The adapter's numbers at a site, if it adapts it.
    pub fn site(&self, layer: usize, site: Site) -> Option<SiteView<'_, O>> {
        let place = self.place(layer, site)?;
        let gain = place.gain.clone();
        Some(SiteView {
            rank: place.rank,
            scale: place.scale,
            a: O::factor(&self.arena, &place.a),
            bt: O::factor(&self.arena, &place.bt),
            gain: gain.map(|gain| O::numbers(&self.arena, gain)),
        })
    }

    /// A and B transposed of a site, as training has them.
    ///
    /// # Panics
    /// On factors of 16 bits, which training widens before it begins.
    pub(super) fn trained(&self, layer: usize, site: Site) -> Option<(View<'_, O>, View<'_, O>)> {
        let place = self.place(layer, site)?;
        match (&place.a, &place.bt) {
            (Span::Full(a), Span::Full(bt)) => Some((
                O::numbers(&self.arena, a.clone()),
                O::numbers(&self.arena, bt.clone()),
            )),
            _ => panic!("only factors of full width are trained"),
        }
    }

    fn place(&self, layer: usize, site: Site) -> Option<&Place<O::T>> {
        self.sites
            .get(layer * Site::ALL.len() + site.index())?
            .as_ref()
    }

    /// Names of the head's rows; empty without a head.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// The head `[labels, hidden]`.
    pub fn head(&self) -> Option<View<'_, O>> {
        self.head
            .clone()
            .map(|range| O::numbers(&self.arena, range))
    }

    /// The head's logits: `hidden [rows, hidden]` after the final norm, `out [rows, labels]`, exact. Does nothing without a
    /// head.
    pub fn score(&self, ops: &O, hidden: View<'_, O>, out: ViewMut<'_, O>) {
        if let Some(head) = self.head() {
            ops.shrink(hidden, head, self.labels.len(), out);
        }
    }

    /// Bytes held: those of each number as it is stored, alignment, and the table of places.
    pub fn bytes(&self) -> usize {
        self.bytes
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

    /// How many numbers there are of full width, those between the parts included.
    pub fn parameter_count(&self) -> usize {
        self.size.full
    }

    /// Every number, in the layout that [`AdapterGrads`] shares: for the optimizer. The adapter was built from
    /// [`AdapterWeights::widened`] numbers; others are not changed by training.
    pub fn parameters(&self) -> View<'_, O> {
        self.part(0..self.size.full)
    }

    /// Some of [`ResidentAdapter::parameters`].
    pub fn part(&self, at: Range<usize>) -> View<'_, O> {
        O::numbers(&self.arena, at)
    }

    /// Some of [`ResidentAdapter::parameters`], to be changed between steps.
    pub fn part_mut(&mut self, at: Range<usize>) -> ViewMut<'_, O> {
        O::numbers_mut(&mut self.arena, at)
    }

    /// The trained tensors and where they lie among the parameters, ascending.
    pub fn tensors(&self) -> impl Iterator<Item = (Range<usize>, Tensor)> {
        let factors = self.sites.iter().flatten().flat_map(|place| {
            let full = |span: &Span, tensor| match span {
                Span::Full(at) => Some((at.clone(), tensor)),
                Span::Bf16(_) | Span::F16(_) => None,
            };
            [full(&place.a, Tensor::A), full(&place.bt, Tensor::B)]
        });
        let head = self.head.clone().map(|at| (at, Tensor::Head));
        factors.flatten().chain(head)
    }

    /// Where the head lies among the parameters.
    pub fn head_range(&self) -> Option<Range<usize>> {
        self.head.clone()
    }

    /// The adapter as a file would hold it. DoRA's magnitude went into its gain and is not given back: `None`.
    pub fn weights(&self, ops: &O) -> Option<AdapterWeights> {
        let mut parameters = vec![O::T::ZERO; self.size.full];
        ops.read(self.parameters(), &mut parameters);
        self.weights_with(ops, &parameters)
    }

    /// The same if its [`ResidentAdapter::parameters`] were these.
    pub fn weights_with(&self, ops: &O, parameters: &[O::T]) -> Option<AdapterWeights> {
        if self.has_gains() {
            return None;
        }
        let stored = |span: &Span| match span {
            Span::Full(at) => parameters[at.clone()].iter().map(|n| n.to_f32()).collect(),
            narrow => ops.read_factor(O::factor(&self.arena, narrow)),
        };
        let mut weights = AdapterWeights::default();
        for (index, place) in self.sites.iter().enumerate() {
            let Some(place) = place else { continue };
            let at = (index / Site::ALL.len(), Site::ALL[index % Site::ALL.len()]);
            let bt = stored(&place.bt);
            let adapter = SiteAdapter {
                r: place.rank,
                scale: place.scale.to_f32(),
                a: stored(&place.a),
                b: columns_as_rows(&bt, bt.len() / place.rank),
                magnitude: None,
            };
            weights.sites.insert(at, adapter);
        }
        weights.head = self.head.clone().map(|head| ScoreHead {
            labels: self.labels.clone(),
            weight: parameters[head].iter().map(|w| w.to_f32()).collect(),
        });
        Some(weights)
    }
}

/// Columns of `numbers [_, columns]` as rows.
fn columns_as_rows(numbers: &Numbers, columns: usize) -> Numbers {
    fn out<E: Copy + Default>(from: &[E], columns: usize) -> Vec<E> {
        let mut into = vec![E::default(); from.len()];
        turned(from, columns, &mut into, |n| *n);
        into
    }
    match numbers {
        Numbers::F32(numbers) => Numbers::F32(out(numbers, columns)),
        Numbers::Bf16(numbers) => Numbers::Bf16(out(numbers, columns)),
        Numbers::F16(numbers) => Numbers::F16(out(numbers, columns)),
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
