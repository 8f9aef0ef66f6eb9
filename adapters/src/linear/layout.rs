//! Where an adapter's numbers go in its arena, and how they get there.
//!
//! It must not know what operations make of them.

use std::collections::BTreeMap;
use std::ops::Range;

use super::dora::Norms;
use super::whole::{DeltaPlace, Deltas};
use crate::config::{ScaleOn, Site};
use crate::ops::{self, ARENA_ALIGN, ArenaSize, Ops, Real, Span};
use crate::weights::{AdapterWeights, Numbers};

/// Where a site's numbers lie.
#[derive(Clone, Debug)]
pub(super) struct Place<T> {
    pub(super) rank: usize,
    pub(super) scale: T,
    pub(super) a: Span,
    pub(super) bt: Span,
    /// DoRA's magnitude, where it is trained.
    pub(super) magnitude: Option<Range<usize>>,
    /// DoRA's gain.
    pub(super) gain: Option<Range<usize>>,
}

/// Where (IA)3's vector of a site lies.
#[derive(Clone, Debug)]
pub(super) struct ScalePlace {
    pub(super) on: ScaleOn,
    /// The vector, among the parameters.
    pub(super) at: Range<usize>,
}

/// Where a hidden layer of a head lies, among the parameters.
#[derive(Clone, Debug)]
pub(super) struct HiddenPlace {
    /// `[out, in]`.
    pub(super) weight: Range<usize>,
    /// `[out]`.
    pub(super) bias: Range<usize>,
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

/// Numbers by output row of the sites with DoRA: gains of an adapter that serves, the base's squared norms of one in training.
pub(super) type ByRow<T> = BTreeMap<(usize, Site), Vec<T>>;

/// Where everything goes, before there is memory for it: what may be trained first, then what follows from it.
pub(super) struct Layout<T> {
    pub(super) sites: Vec<Option<Place<T>>>,
    /// By layer * 7 + site; empty where nothing is scaled.
    pub(super) scales: Vec<Option<ScalePlace>>,
    /// Of whole tensors in training.
    pub(super) deltas: Deltas,
    /// Below the head.
    pub(super) hidden: Vec<HiddenPlace>,
    pub(super) head: Option<Range<usize>>,
    pub(super) size: ArenaSize,
    /// Numbers of full width that may be trained, those between the parts included.
    pub(super) parameters: usize,
    /// Of DoRA in training.
    pub(super) norms: Option<Norms>,
}

impl<T: Real> Layout<T> {
    /// Of an adapter that serves: gains stand for DoRA's magnitudes.
    pub(super) fn served(weights: &AdapterWeights, layers: usize) -> Self {
        let (mut layout, mut full) = Self::factors(weights, layers);
        layout.scales(weights, &mut full);
        layout.end_parameters(weights, &mut full);
        for (place, magnitude) in layout.magnitudes(weights) {
            place.gain = Some(full.part(magnitude.len()));
        }
        layout.size.full = full.next;
        layout
    }

    /// Of an adapter in training: magnitudes are among the parameters, and gains follow from them.
    pub(super) fn trained(weights: &AdapterWeights, layers: usize) -> Self {
        let (mut layout, mut full) = Self::factors(weights, layers);
        let first = full.next;
        for (place, magnitude) in layout.magnitudes(weights) {
            place.magnitude = Some(full.part(magnitude.len()));
        }
        let magnitudes = first..full.next;
        layout.scales(weights, &mut full);
        let deltas = weights.full.iter();
        let deltas = deltas.map(|(tensor, delta)| {
            let at = full.part(delta.values.len());
            let rows = delta.rows;
            (*tensor, DeltaPlace { at, rows })
        });
        layout.deltas = deltas.collect();
        layout.end_parameters(weights, &mut full);
        if !magnitudes.is_empty() {
            let len = magnitudes.len();
            let norms = Norms {
                magnitudes,
                gains: full.part(len),
                inverses: full.part(len),
                squares: full.part(len),
            };
            for place in layout.sites.iter_mut().flatten() {
                let at = place.magnitude.as_ref();
                place.gain = at.map(|at| norms.beside(at, &norms.gains));
            }
            layout.norms = Some(norms);
        }
        layout.size.full = full.next;
        layout
    }

    /// Places for A and B.
    fn factors(weights: &AdapterWeights, layers: usize) -> (Self, Parts) {
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
                magnitude: None,
                gain: None,
            });
        }
        let layout = Self {
            sites,
            scales: Vec::new(),
            deltas: Deltas::new(),
            hidden: Vec::new(),
            head: None,
            size: ArenaSize {
                full: 0,
                half: half.next,
            },
            parameters: 0,
            norms: None,
        };
        (layout, full)
    }

    /// Places for the vectors of (IA)3.
    fn scales(&mut self, weights: &AdapterWeights, full: &mut Parts) {
        if weights.scales.is_empty() {
            return;
        }
        self.scales = vec![None; self.sites.len()];
        for (&(layer, site), scale) in &weights.scales {
            self.scales[layer * Site::ALL.len() + site.index()] = Some(ScalePlace {
                on: scale.on,
                at: full.part(scale.l.len()),
            });
        }
    }

    /// The head is the last of the parameters.
    fn end_parameters(&mut self, weights: &AdapterWeights, full: &mut Parts) {
        let head = weights.head.as_ref();
        let hidden = head.iter().flat_map(|head| &head.hidden);
        let hidden = hidden.map(|layer| HiddenPlace {
            weight: full.part(layer.weight.len()),
            bias: full.part(layer.bias.len()),
        });
        self.hidden = hidden.collect();
        self.head = head.map(|head| full.part(head.weight.len()));
        self.parameters = full.next;
    }

    /// The places of sites that have a magnitude, and it.
    fn magnitudes<'a>(
        &'a mut self,
        weights: &'a AdapterWeights,
    ) -> impl Iterator<Item = (&'a mut Place<T>, &'a [f32])> {
        let magnitudes = weights.sites.values().map(|site| site.magnitude.as_ref());
        let pairs = self.sites.iter_mut().flatten().zip(magnitudes);
        pairs.filter_map(|(place, magnitude)| Some((place, magnitude?.as_slice())))
    }

    /// Bytes of numbers and table.
    pub(super) fn bytes<O: Ops<T = T>>(&self, ops: &O) -> usize {
        ops.arena_bytes(self.size)
            + size_of_val(self.sites.as_slice())
            + size_of_val(self.scales.as_slice())
    }

    /// Every number into its place. Memory that was never touched is the slow part of it, so all threads touch it; a few sites
    /// at a time, because a step that finds the threads taken works alone.
    pub(super) fn fill(
        &self,
        weights: &AdapterWeights,
        by_row: &ByRow<T>,
        full: &mut [T],
        half: &mut [u16],
    ) {
        let (mut full, mut half) = (Splitter::new(full), Splitter::new(half));
        let mut fills = Vec::with_capacity(2 * weights.sites.len());
        let placed = || self.sites.iter().flatten().zip(&weights.sites);
        for (place, (_, adapter)) in placed() {
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
        let widened = |from: &[f32], into: &mut [T]| {
            let pairs = into.iter_mut().zip(from);
            pairs.for_each(|(into, from)| *into = T::from_f32(*from));
        };
        for (place, (_, adapter)) in placed() {
            if let (Some(at), Some(magnitude)) = (&place.magnitude, &adapter.magnitude) {
                widened(magnitude, full.part(at));
            }
        }
        for (place, scale) in self.scales.iter().flatten().zip(weights.scales.values()) {
            widened(&scale.l, full.part(&place.at));
        }
        for (tensor, place) in &self.deltas {
            if let Some(delta) = weights.full.get(tensor) {
                widened(&delta.values, full.part(&place.at));
            }
        }
        if let (Some(at), Some(head)) = (&self.head, &weights.head) {
            for (place, layer) in self.hidden.iter().zip(&head.hidden) {
                widened(&layer.weight, full.part(&place.weight));
                widened(&layer.bias, full.part(&place.bias));
            }
            widened(&head.weight, full.part(at));
        }
        for (place, (site, _)) in placed() {
            if let (Some(at), Some(numbers)) = (self.by_row(place), by_row.get(site)) {
                full.part(&at).copy_from_slice(numbers);
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

    /// Where a site's part of [`ByRow`] goes.
    fn by_row(&self, place: &Place<T>) -> Option<Range<usize>> {
        match (&self.norms, &place.magnitude) {
            (Some(norms), Some(at)) => Some(norms.beside(at, &norms.squares)),
            _ => place.gain.clone(),
        }
    }
}

/// Columns of `numbers [_, columns]` as rows.
pub(super) fn columns_as_rows(numbers: &Numbers, columns: usize) -> Numbers {
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
