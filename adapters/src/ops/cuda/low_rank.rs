//! A pass's low-rank updates as the kernels' tables: which rows, which factors, where `A x` goes; two launches for each list.
//!
//! Chunks of rows are the same for every list; only whose factors are read differs. It must not know adapters or layers.

use std::ops::Range;

use super::driver::{Address, Arg, Element};
use super::memory::{CudaView, CudaViewMut};
use super::{Cuda, at};
use crate::ops::LowRank;

/// A factor `[rank, width]` in an adapter's arena.
pub(super) type CudaFactor<'a> = CudaView<'a>;

/// Rows of a chunk at most.
const CHUNK_ROWS: usize = 64;
/// Outputs that a block of `expand` takes.
const EXPAND_OUTPUTS: usize = 128;
/// Ranks that a block of `shrink` takes, and one of `outer`.
const SHRINK_RANKS: usize = 16;
const OUTER_RANKS: usize = 8;
/// `A x` of an update begins at a multiple of so many floats.
const H_ALIGN: usize = 4;

/// The tables of a pass.
#[derive(Debug)]
pub struct CudaUpdates {
    chunks: Address,
    chunk_count: usize,
    lists: Vec<List>,
}

/// One list's tables.
#[derive(Clone, Copy, Debug)]
struct List {
    first: Address,
    updates: Address,
    sites: usize,
    inputs: usize,
    /// The most updates of one segment.
    most: usize,
    /// The highest rank.
    rank: usize,
}

/// Bytes of tables, as the kernels' structures lay them out, and where the last table begins.
#[derive(Default)]
struct Bytes(Vec<u8>, usize);

impl Bytes {
    fn int(&mut self, value: usize) {
        self.0.extend((value as i32).to_le_bytes());
    }

    fn long(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    fn float(&mut self, value: f32) {
        self.0.extend(value.to_le_bytes());
    }

    /// `struct Chunk`.
    fn chunk(&mut self, segment: usize, row: usize, rows: usize, offset: usize) {
        for value in [segment, row, rows, offset] {
            self.int(value);
        }
    }

    /// `struct Update`.
    fn update(&mut self, update: &LowRank<CudaFactor<'_>, f32>, h: usize) {
        self.long(update.a.at.0);
        self.long(update.bt.at.0);
        self.long(h as u64);
        self.int(update.rank);
        self.float(update.scale);
        self.int(factor_type(update.a.element));
        self.int(factor_type(update.bt.element));
    }

    /// Where the next table begins: tables are as long as powers of two, so that their places seldom change.
    fn next_table(&mut self) -> usize {
        let len = self.0.len() - self.1;
        self.1 += len.next_power_of_two().max(16);
        self.0.resize(self.1, 0);
        self.1
    }
}

fn factor_type(element: Element) -> usize {
    match element {
        Element::F32 => 0,
        Element::Bf16 => 1,
        Element::F16 => 2,
    }
}

/// The distinct rows of all updates, in order.
fn segments(lists: &[Vec<LowRank<CudaFactor<'_>, f32>>]) -> Vec<Range<usize>> {
    let mut segments: Vec<Range<usize>> = lists
        .iter()
        .flatten()
        .map(|update| update.rows.clone())
        .filter(|rows| !rows.is_empty())
        .collect();
    segments.sort_by_key(|rows| rows.start);
    segments.dedup();
    let apart = segments.windows(2).all(|pair| pair[0].end <= pair[1].start);
    assert!(apart, "segments that overlap: {segments:?}");
    segments
}

fn chunks(segments: &[Range<usize>], bytes: &mut Bytes) -> usize {
    let mut count = 0_usize;
    for (segment, rows) in segments.iter().enumerate() {
        for offset in (0..rows.len()).step_by(CHUNK_ROWS) {
            let size = CHUNK_ROWS.min(rows.len() - offset);
            bytes.chunk(segment, rows.start + offset, size, offset);
            count += 1;
        }
    }
    // Chunks without rows fill up to a power of two, so that few grids recur.
    let filled = if count == 0 {
        0
    } else {
        count.next_power_of_two()
    };
    (count..filled).for_each(|_| bytes.chunk(0, 0, 0, 0));
    filled
}

/// Where a list's tables begin in `bytes`, and the floats that its `A x` take.
fn list(
    updates: &[LowRank<CudaFactor<'_>, f32>],
    segments: &[Range<usize>],
    bytes: &mut Bytes,
) -> (List, usize) {
    let sites = updates.iter().map(|u| u.output + 1).max().unwrap_or(0);
    let mut floats = 0;
    let mut places = Vec::with_capacity(updates.len());
    let mut first = Vec::with_capacity(segments.len() * sites + 1);
    let mut next = 0;
    for rows in segments {
        for site in 0..sites {
            first.push(next);
            while updates
                .get(next)
                .is_some_and(|u| u.rows == *rows && u.output == site)
            {
                places.push(floats);
                floats = (floats + rows.len() * updates[next].rank).next_multiple_of(H_ALIGN);
                next += 1;
            }
        }
    }
    first.push(next);
    assert_eq!(
        next,
        updates.len(),
        "updates in the order of rows and outputs"
    );
    let most = first.windows(sites + 1).step_by(sites.max(1));
    let most = most.map(|w| w[sites] - w[0]).max().unwrap_or(0);
    let first_at = bytes.next_table();
    first.iter().for_each(|value| bytes.int(*value));
    let updates_at = bytes.next_table();
    for (update, h) in updates.iter().zip(places) {
        bytes.update(update, h);
    }
    let list = List {
        first: Address(first_at as u64),
        updates: Address(updates_at as u64),
        sites,
        inputs: updates.first().map_or(0, |u| u.a.len / u.rank),
        most,
        rank: updates.iter().map(|u| u.rank).max().unwrap_or(0),
    };
    (list, floats)
}

impl Cuda {
    /// Brings the lists' tables, in one piece.
    pub(super) fn bring_updates(&self, lists: &[Vec<LowRank<CudaFactor<'_>, f32>>]) -> CudaUpdates {
        let segments = segments(lists);
        let mut bytes = Bytes::default();
        let chunk_count = chunks(&segments, &mut bytes);
        let mut floats = 0;
        let mut made: Vec<List> = Vec::with_capacity(lists.len());
        for updates in lists {
            let (list, own) = list(updates, &segments, &mut bytes);
            floats = floats.max(own);
            made.push(list);
        }
        if chunk_count == 0 {
            return CudaUpdates {
                chunks: Address::NULL,
                chunk_count,
                lists: Vec::new(),
            };
        }
        self.scratch(|scratch| &mut scratch.h, floats);
        let base = self.table(&bytes.0);
        for list in &made {
            self.note((
                list.first.0,
                list.updates.0,
                list.sites,
                list.most,
                list.rank,
            ));
        }
        self.note(chunk_count);
        for list in &mut made {
            list.first = base.plus(list.first.0 as usize);
            list.updates = base.plus(list.updates.0 as usize);
        }
        CudaUpdates {
            chunks: base,
            chunk_count,
            lists: made,
        }
    }

    /// What one list adds to its outputs.
    pub(super) fn add_updates(
        &self,
        x: CudaView<'_>,
        updates: &CudaUpdates,
        list: usize,
        outputs: &[CudaViewMut<'_>],
    ) {
        let Some(list) = updates.lists.get(list).filter(|list| list.most > 0) else {
            return;
        };
        let (inputs, rows) = (list.inputs, x.len / list.inputs);
        let h = self.scratch(|scratch| &mut scratch.h, 0);
        let tables = [
            Arg::At(updates.chunks),
            Arg::At(list.first),
            Arg::At(list.updates),
            at(list.sites),
        ];
        let x_args = [x.into(); 3];
        let shrink = [&tables[..], &x_args, &[at(inputs); 3], &[Arg::At(h)]].concat();
        let grid = [
            updates.chunk_count,
            list.most,
            list.rank.div_ceil(SHRINK_RANKS),
        ];
        self.launch(named!(x.element, "shrink"), grid, 256, 0, &shrink);
        let widths: Vec<usize> = outputs.iter().map(|y| y.len / rows).collect();
        let blocks = widths.iter().take(list.sites);
        let blocks = blocks.map(|width| width.div_ceil(EXPAND_OUTPUTS)).sum();
        let of = |i: usize| i.min(outputs.len() - 1);
        let y: [Arg; 3] = std::array::from_fn(|i| (&outputs[of(i)]).into());
        let wide: [Arg; 3] = std::array::from_fn(|i| at(widths[of(i)]));
        let expand = [&tables[..], &[Arg::At(h)], &y, &wide].concat();
        let grid = [updates.chunk_count, blocks, 1];
        self.launch(named!(outputs[0].element, "expand"), grid, 128, 0, &expand);
    }

    /// The tables of one update of all rows.
    fn alone(&self, update: &LowRank<CudaFactor<'_>, f32>) -> (Address, Address, Address, usize) {
        let segments = [update.rows.clone()];
        let mut bytes = Bytes::default();
        let count = chunks(&segments, &mut bytes);
        let (list, _) = list(std::slice::from_ref(update), &segments, &mut bytes);
        let base = self.table(&bytes.0);
        let within = |at: Address| base.plus(at.0 as usize);
        (base, within(list.first), within(list.updates), count)
    }

    /// `h = x A^T`.
    pub(super) fn shrink_alone(
        &self,
        x: CudaView<'_>,
        a: CudaFactor<'_>,
        rank: usize,
        h: &CudaViewMut<'_>,
    ) {
        let rows = h.len / rank.max(1);
        if rows == 0 {
            return;
        }
        let (chunks, first, updates, count) = self.alone(&LowRank {
            rows: 0..rows,
            output: 0,
            rank,
            scale: 1.0,
            a,
            bt: a,
        });
        let inputs = at(x.len / rows);
        let (x_at, element) = (x.into(), x.element);
        let args = [
            Arg::At(chunks),
            Arg::At(first),
            Arg::At(updates),
            at(1),
            x_at,
            x_at,
            x_at,
            inputs,
            inputs,
            inputs,
            h.into(),
        ];
        let grid = [count, 1, rank.div_ceil(SHRINK_RANKS)];
        self.launch(named!(element, "shrink"), grid, 256, 0, &args);
    }

    /// `y += scale * h Bt`.
    pub(super) fn expand_alone(
        &self,
        h: CudaView<'_>,
        bt: CudaFactor<'_>,
        rank: usize,
        scale: f32,
        y: &CudaViewMut<'_>,
    ) {
        let rows = h.len / rank.max(1);
        if rows == 0 {
            return;
        }
        let (chunks, first, updates, count) = self.alone(&LowRank {
            rows: 0..rows,
            output: 0,
            rank,
            scale,
            a: bt,
            bt,
        });
        let width = y.len / rows;
        let args = [
            Arg::At(chunks),
            Arg::At(first),
            Arg::At(updates),
            at(1),
            h.into(),
            y.into(),
            y.into(),
            y.into(),
            at(width),
            at(width),
            at(width),
        ];
        let grid = [count, width.div_ceil(EXPAND_OUTPUTS), 1];
        self.launch(named!(y.element, "expand"), grid, 128, 0, &args);
    }

    /// `dw += scale * h^T x`.
    pub(super) fn outer_alone(
        &self,
        h: CudaView<'_>,
        x: CudaView<'_>,
        rank: usize,
        scale: f32,
        dw: &CudaViewMut<'_>,
    ) {
        let rows = h.len / rank.max(1);
        if rows == 0 {
            return;
        }
        let width = dw.len / rank;
        let mut entry = Bytes::default();
        entry.long(0);
        entry.long(dw.at.0);
        for value in [0, rows, rank, 0] {
            entry.int(value);
        }
        entry.float(scale);
        entry.int(0);
        let (entry, x_at) = (Arg::At(self.table(&entry.0)), x.into());
        let wide = at(width);
        let args = [entry, x_at, x_at, x_at, wide, wide, wide, h.into()];
        let grid = [width.div_ceil(128), rank.div_ceil(OUTER_RANKS), 1];
        self.launch(named!(x.element, "outer"), grid, 128, 0, &args);
    }
}
