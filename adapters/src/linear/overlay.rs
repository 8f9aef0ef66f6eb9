//! An adapter's sites with its update added in: what takes the base weights' place for the rows that it answers.
//!
//! Built from the pristine base, beside it: the base is read and never written, so neither it nor any other adapter
//! changes by a bit, and giving a copy up needs no subtraction. It must not know when copying pays.

use half::bf16;

use super::{BaseSites, ResidentAdapter};
use crate::config::Site;
use crate::ops::{Buffer, Ops, Real, Weight, WeightKind};

/// Rows of a weight that are merged at a time.
const ROWS: usize = 64;

/// Merged weights of the adapted sites; the others are the base's.
#[derive(Debug)]
pub struct Overlay<M> {
    /// By layer * 7 + site.
    sites: Vec<Option<M>>,
    bytes: usize,
}

/// What a step reads with and without a merged copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlayBytes {
    /// Bytes of the copy.
    pub merged: usize,
    /// Bytes of the base's weights at the same sites.
    pub replaced: usize,
}

impl OverlayBytes {
    /// Of a copy that is yet to be made: in bf16 where the base is, else in single precision; never quantised again.
    pub fn of<O: Ops>(adapter: &ResidentAdapter<O>, base: &impl BaseSites<O>) -> Self {
        let mut bytes = Self {
            merged: 0,
            replaced: 0,
        };
        for (layer, site) in adapted(adapter, base) {
            let weight = base.weight(layer, site);
            let (outputs, inputs) = base.ops().dims(weight);
            // Layouts fill outputs up to whole panels.
            bytes.merged += outputs.next_multiple_of(32)
                * inputs
                * match base.ops().kind(weight) {
                    WeightKind::Bf16 => size_of::<bf16>(),
                    _ => size_of::<O::T>(),
                };
            bytes.replaced += base.ops().bytes(weight);
        }
        bytes
    }
}

impl<M> Overlay<M> {
    /// Merges an adapter: at each site `W + s B A`, or DoRA's `g (W + s B A)`, the sums in the operations' type and the
    /// update summed before it is added. `None` when `go_on` said no, which is asked before each site.
    pub fn build<O: Ops<Matrix = M>>(
        adapter: &ResidentAdapter<O>,
        base: &impl BaseSites<O>,
        go_on: impl Fn() -> bool,
    ) -> Option<Self> {
        let mut sites: Vec<Option<M>> =
            (0..base.layers() * Site::ALL.len()).map(|_| None).collect();
        let mut bytes = 0;
        for (layer, site) in adapted(adapter, base) {
            if !go_on() {
                return None;
            }
            let merged = merge(adapter, base, layer, site)?;
            bytes += base.ops().bytes(&merged);
            sites[layer * Site::ALL.len() + site.index()] = Some(merged);
        }
        Some(Self { sites, bytes })
    }

    /// The merged weight of a site, if the adapter adapts it.
    pub fn site(&self, layer: usize, site: Site) -> Option<&M> {
        self.sites
            .get(layer * Site::ALL.len() + site.index())?
            .as_ref()
    }

    /// Bytes of all merged weights.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

fn adapted<'a, O: Ops>(
    adapter: &'a ResidentAdapter<O>,
    base: &'a impl BaseSites<O>,
) -> impl Iterator<Item = (usize, Site)> + 'a {
    (0..base.layers())
        .flat_map(|layer| Site::ALL.map(|site| (layer, site)))
        .filter(move |(layer, site)| adapter.site(*layer, *site).is_some())
}

fn merge<O: Ops>(
    adapter: &ResidentAdapter<O>,
    base: &impl BaseSites<O>,
    layer: usize,
    site: Site,
) -> Option<O::Matrix> {
    let view = adapter.site(layer, site)?;
    let (ops, weight) = (base.ops().beside(), base.weight(layer, site));
    let (outputs, inputs) = ops.dims(weight);
    let ids: Vec<u32> = (0..outputs as u32).collect();
    let mut gathered = ops.exact();
    let mut rows = vec![O::T::ZERO; outputs * inputs];
    let mut update = vec![O::T::ZERO; inputs];
    let widened = |factor| -> Vec<O::T> {
        let numbers = ops.read_factor(factor);
        numbers
            .to_f32()
            .iter()
            .map(|n| O::T::from_f32(*n))
            .collect()
    };
    let (a, bt) = (widened(view.a), widened(view.bt));
    let gain = view.gain.map(|gain| {
        let mut host = vec![O::T::ZERO; outputs];
        ops.read(gain, &mut host);
        host
    });
    for (ids, rows) in ids.chunks(ROWS).zip(rows.chunks_mut(ROWS * inputs)) {
        ops.resize(&mut gathered, rows.len());
        ops.gather(weight, ops.ids(ids), gathered.all_mut());
        ops.read(gathered.all(), rows);
        for (output, row) in ids.iter().zip(rows.chunks_exact_mut(inputs)) {
            let output = *output as usize;
            update.fill(O::T::ZERO);
            for (b, a) in bt.chunks_exact(outputs).zip(a.chunks_exact(inputs)) {
                let b = b[output];
                update.iter_mut().zip(a).for_each(|(u, a)| *u += b * *a);
            }
            row.iter_mut()
                .zip(&update)
                .for_each(|(w, u)| *w += view.scale * *u);
            if let Some(gain) = &gain {
                row.iter_mut().for_each(|w| *w *= gain[output]);
            }
        }
    }
    let rows = rows.iter().map(|w| w.to_f32());
    let merged = match ops.kind(weight) {
        WeightKind::Bf16 => Weight::Bf16(rows.map(bf16::from_f32).collect()),
        _ => Weight::F32(rows.collect()),
    };
    Some(ops.pack_weight(&merged, outputs, inputs))
}
