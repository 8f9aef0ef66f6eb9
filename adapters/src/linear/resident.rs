//! An adapter in memory: aligned, in the layout and the dtypes that operations read.
//!
//! It must not know projections, batches or files.

use std::ops::Range;
use std::panic::panic_any;

use super::dora::Norms;
use super::layout::{ByRow, HiddenPlace, Layout, Place, ScalePlace, columns_as_rows};
use super::update::{dora_gain, row_squares};
use super::whole::{self, Deltas, Whole};
use crate::config::{BaseTensor, Site};
use crate::head::HeadSettings;
use crate::ops::{Backend, Ops, OutOfMemory, Real, Span, View, ViewMut};
use crate::pace::Unpaced;
use crate::weights::{AdapterWeights, Delta, HiddenLayer, ScoreHead, SiteAdapter, SiteScale};

/// The frozen weights that an adapter is made for.
pub trait BaseSites<O: Ops> {
    /// The operations that the weights are packed for.
    fn ops(&self) -> &O;
    /// Number of layers.
    fn layers(&self) -> usize;
    /// The frozen weight of a site.
    fn weight(&self, layer: usize, site: Site) -> &O::Matrix;
    /// A frozen tensor that [is a matrix](BaseTensor::is_matrix); `None` where the base has none.
    fn matrix(&self, tensor: BaseTensor) -> Option<&O::Matrix>;
    /// A frozen bias or norm, working; `None` where the base has none.
    fn vector(&self, tensor: BaseTensor) -> Option<View<'_, O>>;
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
    /// Numbers of full width that may be trained.
    pub(super) parameters: usize,
    /// By layer * 7 + site.
    pub(super) sites: Vec<Option<Place<O::T>>>,
    /// By layer * 7 + site; empty where nothing is scaled.
    pub(super) scales: Vec<Option<ScalePlace>>,
    /// Tensors in the base's place.
    pub(super) whole: Whole<O>,
    /// Where their deltas lie; in training alone.
    pub(super) deltas: Deltas,
    /// Of DoRA in training.
    pub(super) norms: Option<Norms>,
    labels: Vec<String>,
    pub(super) settings: HeadSettings,
    pub(super) hidden: Vec<HiddenPlace>,
    pub(super) head: Option<Range<usize>>,
    bytes: usize,
}

/// Which of an adapter's tensors a parameter belongs to: what its learning rate follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tensor {
    /// What an update shrinks by.
    A,
    /// What it expands by.
    B,
    /// DoRA's lengths of output rows.
    Magnitude,
    /// A vector of (IA)3.
    Scale,
    /// The delta of a whole tensor.
    Whole,
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

/// What training reads at a site.
pub(super) struct TrainedView<'a, O: Ops> {
    /// Rank, at least 1.
    pub(super) rank: usize,
    /// The factor on `B (A x)`.
    pub(super) scale: O::T,
    /// A `[rank, in]`.
    pub(super) a: View<'a, O>,
    /// B transposed `[rank, out]`.
    pub(super) bt: View<'a, O>,
    /// `1 / |W + s B A|`, `[out]`, where a magnitude is trained.
    pub(super) inverse: Option<View<'a, O>>,
}

/// `of(site, adapter, magnitude)` of the sites with DoRA.
fn by_row<T>(
    weights: &AdapterWeights,
    of: impl Fn((usize, Site), &SiteAdapter, &[f32]) -> Vec<T>,
) -> ByRow<T> {
    let sites = weights.sites.iter();
    let rows = sites.filter_map(|(at, adapter)| {
        let magnitude = adapter.magnitude.as_ref()?;
        Some((*at, of(*at, adapter, magnitude)))
    });
    rows.collect()
}

// === impl ResidentAdapter ===

impl<O: Ops> ResidentAdapter<O> {
    /// An adapter that changes nothing, for a base of `layers` layers.
    pub fn empty(ops: &O, layers: usize) -> Self {
        let layout = Layout::served(&AdapterWeights::default(), layers);
        let arena = ops.arena(None, layout.size, &mut |_, _| ());
        Self {
            arena: arena.unwrap_or_else(|error| panic_any(error)),
            parameters: 0,
            bytes: layout.bytes(ops),
            sites: layout.sites,
            scales: layout.scales,
            whole: Whole::empty(),
            deltas: layout.deltas,
            norms: None,
            labels: Vec::new(),
            settings: HeadSettings::default(),
            hidden: Vec::new(),
            head: None,
        }
    }

    /// What [`ResidentAdapter::bytes`] will be once these weights are built for a base.
    pub fn bytes_for(weights: &AdapterWeights, base: &impl BaseSites<O>) -> usize {
        let layout = Layout::<O::T>::served(weights, base.layers());
        layout.bytes(base.ops()) + whole::bytes(&weights.full, base)
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
        let gains = by_row(weights, |(layer, site), adapter, magnitude| {
            dora_gain(&ops, base.weight(layer, site), adapter, magnitude)
        });
        let layout = Layout::served(weights, base.layers());
        let mut adapter = Self::laid(spare, weights, &ops, layout, &gains)?;
        for (tensor, delta) in &weights.full {
            let delta = delta.values.iter();
            let delta: Vec<O::T> = delta.map(|d| O::T::from_f32(*d)).collect();
            adapter.whole.set((base, &ops), *tensor, &delta);
        }
        // Steps read them on a queue of their own.
        ops.wait();
        adapter.bytes += whole::bytes(&weights.full, base);
        Ok(adapter)
    }

    /// Lays out an adapter to be trained: DoRA's magnitudes are parameters, and its gains are those of
    /// [`ResidentAdapter::renew_gains`]. For whoever holds the machine, as one who runs a step does.
    ///
    /// # Errors
    /// As [`ResidentAdapter::build`].
    pub fn trainable(
        weights: &AdapterWeights,
        base: &impl BaseSites<O>,
    ) -> Result<Self, BuildError> {
        check(weights, base)?;
        let ops = base.ops().beside();
        let squares = by_row(weights, |(layer, site), _, _| {
            row_squares(&ops, base.weight(layer, site))
        });
        let layout = Layout::trained(weights, base.layers());
        let mut adapter = Self::laid(None, weights, &ops, layout, &squares)?;
        let ops = base.ops().apart();
        adapter.renew_gains(base, &ops, &Unpaced);
        adapter.renew_whole(base, &ops, &Unpaced);
        Ok(adapter)
    }

    fn laid(
        spare: Option<Self>,
        weights: &AdapterWeights,
        ops: &O,
        layout: Layout<O::T>,
        by_row: &ByRow<O::T>,
    ) -> Result<Self, OutOfMemory> {
        let spare = spare.map(|spare| spare.arena);
        let arena = ops.arena(spare, layout.size, &mut |full, half| {
            layout.fill(weights, by_row, full, half);
        })?;
        let head = weights.head.as_ref();
        let known = head.map(|head| (head.labels.clone(), head.settings.clone()));
        let (labels, settings) = known.unwrap_or_default();
        Ok(Self {
            arena,
            parameters: layout.parameters,
            bytes: layout.bytes(ops),
            sites: layout.sites,
            scales: layout.scales,
            whole: Whole::empty(),
            deltas: layout.deltas,
            norms: layout.norms,
            labels,
            settings,
            hidden: layout.hidden,
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

    /// A site as training has it.
    ///
    /// # Panics
    /// On factors of 16 bits, which training widens before it begins.
    pub(super) fn trained(&self, layer: usize, site: Site) -> Option<TrainedView<'_, O>> {
        let place = self.place(layer, site)?;
        let (Span::Full(a), Span::Full(bt)) = (&place.a, &place.bt) else {
            panic!("only factors of full width are trained");
        };
        let magnitude = place.magnitude.as_ref().zip(self.norms.as_ref());
        let inverse = magnitude.map(|(at, norms)| norms.beside(at, &norms.inverses));
        Some(TrainedView {
            rank: place.rank,
            scale: place.scale,
            a: self.part(a.clone()),
            bt: self.part(bt.clone()),
            inverse: inverse.map(|at| self.part(at)),
        })
    }

    pub(super) fn place(&self, layer: usize, site: Site) -> Option<&Place<O::T>> {
        self.sites
            .get(layer * Site::ALL.len() + site.index())?
            .as_ref()
    }

    /// Names of the head's rows; empty without a head.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// What the head's logits mean.
    pub fn head_settings(&self) -> &HeadSettings {
        &self.settings
    }

    /// The head's last layer `[labels, hidden]`.
    pub fn head(&self) -> Option<View<'_, O>> {
        self.head
            .clone()
            .map(|range| O::numbers(&self.arena, range))
    }

    /// Bytes held: those of each number as it is stored, alignment, and the table of places.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The lowest layer that reads what is adapted: 0 of the embedding table, and the number of layers of what is behind them all.
    pub fn lowest_layer(&self) -> Option<usize> {
        let layers = self.sites.len() / Site::ALL.len();
        let updated = self.sites.iter().position(Option::is_some);
        let scaled = self.scales.iter().position(Option::is_some);
        let first = updated.into_iter().chain(scaled).min();
        let first = first.map(|i| i / Site::ALL.len());
        let whole = self.whole.lowest_layer(layers);
        first.into_iter().chain(whole).min()
    }

    /// Whether all that it does is to add to what the base makes, so that others can add to it too and a merged weight can take its
    /// place: neither DoRA's gains, nor (IA)3's vectors, nor whole tensors.
    pub fn only_adds(&self) -> bool {
        !self.has_gains() && self.can_merge()
    }

    /// Whether all that it changes are weights of projections, so that a merged copy of those does the same: neither (IA)3's
    /// vectors, which scale biases too, nor whole tensors, which are such a copy already.
    pub fn can_merge(&self) -> bool {
        self.scales.is_empty() && !self.has_whole()
    }

    /// Whether whole tensors stand in the base's place.
    pub fn has_whole(&self) -> bool {
        !self.whole.is_empty()
    }

    /// Whether a site has DoRA's magnitude.
    pub fn has_gains(&self) -> bool {
        self.sites
            .iter()
            .flatten()
            .any(|place| place.gain.is_some())
    }

    /// How many numbers of full width may be trained, those between the parts included.
    pub fn parameter_count(&self) -> usize {
        self.parameters
    }

    /// Every number, in the layout that [`AdapterGrads`] shares: for the optimizer. The adapter was built from
    /// [`AdapterWeights::widened`] numbers; others are not changed by training.
    pub fn parameters(&self) -> View<'_, O> {
        self.part(0..self.parameters)
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
        let places = self.sites.iter().flatten();
        let magnitudes =
            places.filter_map(|place| Some((place.magnitude.clone()?, Tensor::Magnitude)));
        let scales = self.scales.iter().flatten();
        let scales = scales.map(|place| (place.at.clone(), Tensor::Scale));
        let whole = self.deltas.values();
        let whole = whole.map(|place| (place.at.clone(), Tensor::Whole));
        let hidden = self.hidden.iter();
        let hidden = hidden.flat_map(|place| [place.weight.clone(), place.bias.clone()]);
        let head = hidden.chain(self.head.clone());
        let head = head.map(|at| (at, Tensor::Head));
        factors
            .flatten()
            .chain(magnitudes)
            .chain(scales)
            .chain(whole)
            .chain(head)
    }

    /// The adapter as a file would hold it. DoRA's magnitude goes into its gain and a delta into its tensor unless they are trained,
    /// and are not given back then: `None`.
    pub fn weights(&self, ops: &O) -> Option<AdapterWeights> {
        let mut parameters = vec![O::T::ZERO; self.parameters];
        ops.read(self.parameters(), &mut parameters);
        self.weights_with(ops, &parameters)
    }

    /// The same if its [`ResidentAdapter::parameters`] were these.
    pub fn weights_with(&self, ops: &O, parameters: &[O::T]) -> Option<AdapterWeights> {
        let whole = self.has_whole() && self.deltas.is_empty();
        if whole || self.has_gains() && self.norms.is_none() {
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
                magnitude: place.magnitude.clone().map(|at| {
                    let magnitude = parameters[at].iter();
                    magnitude.map(|m| m.to_f32()).collect()
                }),
            };
            weights.sites.insert(at, adapter);
        }
        for (index, place) in self.scales.iter().enumerate() {
            let Some(ScalePlace { on, at }) = place else {
                continue;
            };
            let l = parameters[at.clone()].iter().map(|l| l.to_f32()).collect();
            let key = (index / Site::ALL.len(), Site::ALL[index % Site::ALL.len()]);
            weights.scales.insert(key, SiteScale { on: *on, l });
        }
        for (tensor, place) in &self.deltas {
            let values = parameters[place.at.clone()].iter().map(|d| d.to_f32());
            let delta = Delta {
                rows: place.rows,
                values: values.collect(),
            };
            weights.full.insert(*tensor, delta);
        }
        let numbers = |at: &Range<usize>| {
            let numbers = parameters[at.clone()].iter();
            numbers.map(|n| n.to_f32()).collect()
        };
        weights.head = self.head.clone().map(|head| ScoreHead {
            labels: self.labels.clone(),
            settings: self.settings.clone(),
            hidden: self
                .hidden
                .iter()
                .map(|place| HiddenLayer {
                    weight: numbers(&place.weight),
                    bias: numbers(&place.bias),
                })
                .collect(),
            weight: numbers(&head),
        });
        Some(weights)
    }
}

fn check<O: Ops>(weights: &AdapterWeights, base: &impl BaseSites<O>) -> Result<(), Misfit> {
    whole::check(&weights.full, base)?;
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
    for (&(layer, site), scale) in &weights.scales {
        let path = site.path(layer);
        if layer >= base.layers() {
            let reason = format!("layer {layer} of {}", base.layers());
            return Err(Misfit { path, reason });
        }
        let (outputs, inputs) = base.ops().dims(base.weight(layer, site));
        let (found, expected) = (scale.l.len(), scale.on.width((inputs, outputs)));
        if found != expected {
            let reason = format!("l has {found} values, the projection needs {expected}");
            return Err(Misfit { path, reason });
        }
    }
    let head = weights.head.as_ref();
    match head.and_then(|head| head.misfit(base.hidden())) {
        Some((path, reason)) => Err(Misfit { path, reason }),
        None => Ok(()),
    }
}
