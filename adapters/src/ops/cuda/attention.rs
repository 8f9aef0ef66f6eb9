//! A pass's spans as the attention kernels' tables, and their launches: decoding rows by splits, prompts by walks over their
//! splits, training over flat rows and back.

use super::driver::{Address, Arg, Element};
use super::memory::{CudaView, CudaViewMut};
use super::{Cuda, at};
use crate::ops::{AttentionGrads, AttentionSaved, AttentionShape, AttentionSpan, KvRows, Ops};

/// Positions of one split.
const SPLIT: usize = 128;
/// Queries of a block that decodes, and of one that does not.
const DECODE_QUERIES: usize = 16;
const QUERIES: usize = 64;
/// Positions of a block of the cache; kernels know no other number.
pub const CUDA_BLOCK_SIZE: usize = 16;

/// The tables of a pass's spans.
#[derive(Debug)]
pub struct CudaSpans {
    /// Spans of one row over the paged cache.
    decode: SpanTable,
    /// Spans of more, or flat ones.
    rest: SpanTable,
    /// The block tables, one after the other; unused where spans are flat.
    tables: Address,
    flat: bool,
}

#[derive(Debug, Default)]
struct SpanTable {
    at: Option<Address>,
    count: usize,
    /// The most rows of a span.
    rows: usize,
    /// The most positions that a span sees.
    positions: usize,
}

/// Spans on their way into a table: `struct Span`.
#[derive(Default)]
struct Listed {
    bytes: Vec<u8>,
    table: SpanTable,
}

impl Listed {
    fn push(&mut self, span: &AttentionSpan<'_>, kv: usize) {
        let entry = [span.rows.start, span.rows.len(), span.start, kv];
        let ints = entry.iter().flat_map(|value| (*value as i32).to_le_bytes());
        self.bytes.extend(ints);
        self.table.count += 1;
        self.table.rows = self.table.rows.max(span.rows.len());
        let positions = span.start + span.rows.len();
        self.table.positions = self.table.positions.max(positions);
    }

    /// With empty spans behind, up to `count`, where there are any.
    fn filled_up(mut self, count: usize) -> Self {
        if self.table.count > 0 {
            self.bytes.resize(count * size_of::<[i32; 4]>(), 0);
            self.table.count = count;
        }
        self
    }

    fn bring(mut self, cuda: &Cuda) -> SpanTable {
        if self.table.count > 0 {
            self.table.at = Some(cuda.table(&self.bytes));
        }
        self.table
    }
}

impl SpanTable {
    /// Splits of the longest span: a power of two, so that contexts of about one length make one shape of step.
    fn splits(&self) -> usize {
        self.positions.div_ceil(SPLIT).next_power_of_two()
    }
}

/// The least width of a head that kernels are compiled for and that holds `head_dim`.
fn width(head_dim: usize) -> usize {
    match head_dim {
        0..=64 => 64,
        65..=128 => 128,
        129..=256 => 256,
        wide => panic!("heads of {wide} numbers: the kernels' widest is 256"),
    }
}

/// Shared memory of a kernel: by head width (64, 128, 256), for 16 bits and for f32.
fn shared(kernel: &str, width: usize, element: Element) -> usize {
    let (half, full) = match kernel {
        "split" => ([21760, 42240, 83200], [40192, 79104, 86784]),
        "paged" => ([45056, 88064, 174080], [69632, 137216, 202240]),
        "flat" => ([44032, 84992, 166912], [68608, 134144, 198656]),
        _ => ([27904, 52480, 101632], [52480, 101632, 199936]),
    };
    let sizes = if element == Element::F32 { full } else { half };
    sizes[(width / 128).min(2)]
}

/// Heads, and what they see, as kernels take them.
fn heads(shape: AttentionShape) -> [Arg; 5] {
    [
        at(shape.heads),
        at(shape.kv_heads),
        at(shape.head_dim),
        at(shape.window.unwrap_or(0)),
        Arg::Float(shape.scale() as f32),
    ]
}

impl Cuda {
    /// Brings the spans' tables.
    pub(super) fn bring_spans(&self, spans: &[AttentionSpan<'_>]) -> CudaSpans {
        let (mut decode, mut rest) = (Listed::default(), Listed::default());
        let mut tables: Vec<u8> = Vec::new();
        let mut flat = false;
        for span in spans.iter().filter(|span| !span.rows.is_empty()) {
            match span.kv {
                KvRows::Flat { first } => {
                    flat = true;
                    rest.push(span, first);
                }
                KvRows::Paged { table, block_size } => {
                    assert_eq!(
                        block_size, CUDA_BLOCK_SIZE,
                        "positions of a block of the cache"
                    );
                    let first = tables.len() / size_of::<u32>();
                    let seen = (span.start + span.rows.len()).div_ceil(block_size);
                    let seen = table[..seen].iter().flat_map(|block| block.to_le_bytes());
                    tables.extend(seen);
                    let list = if span.rows.len() == 1 {
                        &mut decode
                    } else {
                        &mut rest
                    };
                    list.push(span, first);
                }
            }
        }
        let count = self.padded(decode.table.count);
        let decode = decode.filled_up(count);
        for table in [&decode.table, &rest.table] {
            self.note((table.count, table.rows, table.splits()));
        }
        CudaSpans {
            decode: decode.bring(self),
            rest: rest.bring(self),
            tables: match tables.is_empty() {
                true => Address::NULL,
                false => self.table(&tables),
            },
            flat,
        }
    }

    pub(super) fn attend(
        &self,
        shape: AttentionShape,
        [q, k, v]: [CudaView<'_>; 3],
        spans: &CudaSpans,
        out: &CudaViewMut<'_>,
        lse: Option<&CudaViewMut<'_>>,
    ) {
        if let Some(table) = spans.decode.at {
            self.decode(shape, [q, k, v], spans, table, out);
        }
        let Some(table) = spans.rest.at else { return };
        let (width, element) = (width(shape.head_dim), q.element);
        let shares = (spans.rest.rows * shape.heads / shape.kv_heads).div_ceil(QUERIES);
        let grid = [spans.rest.count, shape.kv_heads * shares, 1];
        let kind = if spans.flat { "flat" } else { "paged" };
        let name = format!("attend_{kind}_{width}_{}", element.name());
        let mut args = vec![q.into(), k.into(), v.into()];
        if !spans.flat {
            args.push(Arg::At(spans.tables));
        }
        args.push(Arg::At(table));
        args.extend(heads(shape));
        args.push(out.into());
        if spans.flat {
            args.push(lse.map_or(Arg::At(Address::NULL), Arg::from));
        }
        self.launch(&name, grid, 128, shared(kind, width, element), &args);
    }

    /// Rows that decode: a block for each split, and then what joins them.
    fn decode(
        &self,
        shape: AttentionShape,
        [q, k, v]: [CudaView<'_>; 3],
        spans: &CudaSpans,
        table: Address,
        out: &CudaViewMut<'_>,
    ) {
        let (width, element, count) = (width(shape.head_dim), q.element, spans.decode.count);
        let splits = spans.decode.splits();
        let queries = count * shape.heads * splits;
        let parts = self.scratch(|scratch| &mut scratch.parts, queries * shape.head_dim);
        let marks = self.scratch(|scratch| &mut scratch.marks, 2 * queries);
        let [heads_arg, kv_heads, head_dim, window, scale] = heads(shape);
        let args = [
            q.into(),
            k.into(),
            v.into(),
            Arg::At(spans.tables),
            Arg::At(table),
            heads_arg,
            kv_heads,
            head_dim,
            window,
            scale,
            Arg::At(parts),
            Arg::At(marks),
        ];
        let shares = (shape.heads / shape.kv_heads).div_ceil(DECODE_QUERIES);
        let grid = [splits, shape.kv_heads * shares, count];
        let name = format!("attend_split_{width}_{}", element.name());
        self.launch(&name, grid, 32, shared("split", width, element), &args);
        let args = [
            Arg::At(parts),
            Arg::At(marks),
            Arg::At(table),
            heads_arg,
            kv_heads,
            head_dim,
            window,
            at(splits),
            out.into(),
        ];
        let name = named!(element, "attend_combine");
        self.launch(name, [count, shape.heads, 1], 128, 0, &args);
    }

    pub(super) fn attend_backward(
        &self,
        shape: AttentionShape,
        saved: AttentionSaved<CudaView<'_>>,
        spans: &CudaSpans,
        dout: CudaView<'_>,
        grads: &AttentionGrads<CudaViewMut<'_>>,
    ) {
        let Some(table) = spans.rest.at else { return };
        assert!(spans.flat, "nothing trains on a paged cache");
        let AttentionSaved { q, k, v, out, lse } = saved;
        let (width, element) = (width(shape.head_dim), q.element);
        let count = out.len / shape.head_dim;
        let means = Arg::At(self.scratch(|scratch| &mut scratch.means, count));
        let args = [
            out.into(),
            dout.into(),
            means,
            at(shape.head_dim),
            Arg::Long(count as i64),
        ];
        let name = named!(element, "attention_mean");
        self.launch(name, [count.div_ceil(8), 1, 1], 256, 0, &args);
        let mut args = vec![
            q.into(),
            k.into(),
            v.into(),
            lse.into(),
            means,
            dout.into(),
            Arg::At(table),
        ];
        args.extend(heads(shape));
        let bytes = shared("backward", width, element);
        let halves = if width == 256 { 2 } else { 1 };
        let grid = [
            spans.rest.positions.div_ceil(QUERIES),
            shape.kv_heads,
            halves * spans.rest.count,
        ];
        let keys = [&args[..], &[(&grads.dk).into(), (&grads.dv).into()]].concat();
        let name = format!("attention_backward_keys_{width}_{}", element.name());
        self.launch(&name, grid, 128, bytes, &keys);
        let shares = (spans.rest.rows * shape.heads / shape.kv_heads).div_ceil(QUERIES);
        let grid = [spans.rest.count, shape.kv_heads * shares, 1];
        args.push((&grads.dq).into());
        let name = format!("attention_backward_queries_{width}_{}", element.name());
        self.launch(&name, grid, 128, bytes, &args);
    }
}
