//! The operations on a GPU: our kernels (`adapters/kernels`), launched through a [`driver`] that is a real device or the
//! emulator that runs the same kernels on a processor.
//!
//! Activations, keys and values have the working element (bf16, f16 or f32); what is exact is f32; sums are f32. This file
//! joins the parts to the trait: `memory` holds numbers, `matrix` multiplies by frozen weights, `low_rank` and `attention` bring
//! the tables that a pass's kernels read, `tables` says where those lie.

/// A kernel's name for an element, made when this is compiled.
macro_rules! named {
    ($element:expr, $stem:literal) => {
        match $element {
            $crate::ops::cuda::driver::Element::F32 => concat!($stem, "_f32"),
            $crate::ops::cuda::driver::Element::Bf16 => concat!($stem, "_bf16"),
            $crate::ops::cuda::driver::Element::F16 => concat!($stem, "_f16"),
        }
    };
}

mod attention;
pub mod driver;
#[cfg(test)]
mod driver_tests;
mod emulated;
mod emulated_build;
mod emulated_memory;
mod fatbin;
mod gpu;
mod gpu_graph;
mod gpu_kernels;
mod gpu_lane;
mod gpu_memory;
mod gpu_vendor;
mod low_rank;
mod matrix;
mod memory;
pub mod proof;
mod recorder;
mod replay;
mod tables;
#[cfg(test)]
mod tests;

use std::hash::Hash;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{
    AdamWStep, ArenaSize, AttentionGrads, AttentionSaved, AttentionShape, AttentionSpan, Buffer,
    Fill, LowRank, Ops, OutOfMemory, Span, TokenDraw, Weight, WeightKind,
};
use crate::batch;
use crate::weights::Numbers;
use attention::CudaSpans;
use driver::{Address, Arg, DeviceError, DeviceInfo, Driver, Element, Lane, Launch};
use low_rank::{CudaFactor, CudaUpdates};
use matrix::CudaMatrix;
use memory::{CudaBuf, CudaView, CudaViewMut, Memory, must};
use replay::{Replays, Step};
use tables::Tables;

pub use attention::CUDA_BLOCK_SIZE;
pub use emulated::Emulated;
pub use emulated_build::build;
pub use fatbin::FATBIN;
pub use gpu::Gpu;

/// Operations on one device.
#[derive(Clone, Debug)]
pub struct Cuda {
    device: Arc<Device>,
    lane: Lane,
    memory: Arc<Mutex<PassMemory>>,
}

/// What all clones share.
#[derive(Debug)]
struct Device {
    driver: Arc<dyn Driver>,
    /// What activations are made of.
    element: Element,
    /// The same bits in any company: no library that chooses by the number of rows.
    deterministic: bool,
    /// Counts buffers that moved: what was recorded before is about memory that is gone.
    moved: AtomicU64,
    /// For work beside the steps.
    side: Arc<Mutex<PassMemory>>,
    /// Where adapters are laid out on their way to the device.
    staging: Mutex<(Vec<f32>, Vec<u16>)>,
}

/// What a pass uses beside its operands.
#[derive(Debug)]
struct PassMemory {
    tables: Tables,
    scratch: Scratch,
    replays: Replays,
}

/// Numbers between two launches of one operation.
#[derive(Debug)]
struct Scratch {
    /// `A x` of a list of updates.
    h: CudaBuf,
    /// Attention's splits, and their softmaxes' states.
    parts: CudaBuf,
    marks: CudaBuf,
    /// `out . dout` of each head.
    means: CudaBuf,
    /// Sums of blocks, in double precision: two floats each.
    sums: CudaBuf,
    /// Drawn tokens.
    tokens: CudaBuf,
}

/// Ids on the device.
#[derive(Clone, Copy, Debug)]
pub struct CudaIds {
    at: Address,
    count: usize,
}

/// An adapter on the device: exact numbers, then those of 16 bits.
#[derive(Debug)]
pub struct CudaArena {
    memory: Memory,
    size: ArenaSize,
}

/// An `int`.
fn at(value: usize) -> Arg {
    Arg::Int(value as i32)
}

/// Numbers that a thread block of elementwise kernels takes.
const ELEMENTS: usize = 2048;
/// Numbers whose squares one block adds up.
const SQUARES: usize = 4096;

// === impl PassMemory ===

impl PassMemory {
    fn new(driver: &Arc<dyn Driver>) -> Result<Arc<Mutex<Self>>, DeviceError> {
        let exact = || CudaBuf::empty(Element::F32);
        Ok(Arc::new(Mutex::new(Self {
            tables: Tables::new(driver)?,
            scratch: Scratch {
                h: exact(),
                parts: exact(),
                marks: exact(),
                means: exact(),
                sums: exact(),
                tokens: exact(),
            },
            replays: Replays::default(),
        })))
    }
}

// === impl CudaArena ===

impl CudaArena {
    /// Where the numbers of 16 bits begin.
    fn half_at(size: ArenaSize) -> usize {
        (size.full * size_of::<f32>()).next_multiple_of(256)
    }

    fn exact(&self, at: &Range<usize>) -> Address {
        assert!(
            at.start <= at.end && at.end <= self.size.full,
            "numbers {at:?} of {}",
            self.size.full
        );
        self.memory.at(at.start * size_of::<f32>())
    }

    fn half(&self, at: &Range<usize>) -> Address {
        assert!(
            at.start <= at.end && at.end <= self.size.half,
            "numbers {at:?} of {}",
            self.size.half
        );
        self.memory
            .at(Self::half_at(self.size) + at.start * size_of::<u16>())
    }
}

// === impl Cuda ===

impl Cuda {
    /// Operations on a device. `element`: what activations are made of. `deterministic`: the same bits in any company.
    ///
    /// # Errors
    /// [`DeviceError`] when there is no room for the tables.
    pub fn new(
        driver: Arc<dyn Driver>,
        element: Element,
        deterministic: bool,
    ) -> Result<Self, DeviceError> {
        let (memory, side) = (PassMemory::new(&driver)?, PassMemory::new(&driver)?);
        Ok(Self {
            device: Arc::new(Device {
                driver,
                element,
                deterministic,
                moved: AtomicU64::new(0),
                side,
                staging: Mutex::default(),
            }),
            lane: Lane::Main,
            memory,
        })
    }

    /// What there is to say about the device.
    pub fn info(&self) -> &DeviceInfo {
        self.device.driver.info()
    }

    /// What activations are made of.
    pub fn element(&self) -> Element {
        self.device.element
    }

    /// Bytes of the device that nobody holds.
    ///
    /// # Errors
    /// What the device says.
    pub fn free_bytes(&self) -> Result<usize, DeviceError> {
        self.device.driver.free_bytes()
    }

    fn memory(&self) -> MutexGuard<'_, PassMemory> {
        // It is whole between any two operations, so a panic elsewhere does not spoil it.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Scratch of at least `floats` floats.
    fn scratch(&self, of: impl FnOnce(&mut Scratch) -> &mut CudaBuf, floats: usize) -> Address {
        let mut memory = self.memory();
        let buffer = of(&mut memory.scratch);
        if buffer.len() < floats && must(buffer.resize(&self.device.driver, floats)) {
            self.device.moved.fetch_add(1, Ordering::Relaxed);
        }
        buffer.all().at
    }

    /// The pass's launches depend on this.
    fn note(&self, what: impl Hash) {
        self.memory().replays.note(what);
    }

    fn table(&self, bytes: &[u8]) -> Address {
        let mut memory = self.memory();
        let PassMemory {
            tables, replays, ..
        } = &mut *memory;
        let at = must(tables.bring(self.device.driver.as_ref(), self.lane, bytes));
        replays.note(at.0);
        at
    }

    /// Queues a kernel; a grid without blocks is nothing to do.
    fn launch(&self, kernel: &str, grid: [usize; 3], block: u32, shared: usize, args: &[Arg]) {
        if grid.contains(&0) {
            return;
        }
        let launch = Launch {
            kernel,
            grid: grid.map(|blocks| blocks as u32),
            block,
            shared: shared as u32,
            args,
        };
        must(self.device.driver.launch(self.lane, &launch));
    }

    /// A kernel with a block for each row.
    fn by_row(&self, kernel: &str, rows: usize, args: &[Arg]) {
        self.launch(kernel, [rows, 1, 1], 256, 0, args);
    }

    /// A kernel over numbers one by one, whose count is the last argument.
    fn by_number(&self, kernel: &str, count: usize, args: &[Arg]) {
        let args = [args, &[Arg::Long(count as i64)]].concat();
        self.launch(kernel, [count.div_ceil(ELEMENTS), 1, 1], 256, 0, &args);
    }
}

impl Ops for Cuda {
    type T = f32;
    type Buf = CudaBuf;
    type Matrix = CudaMatrix;
    type Arena = CudaArena;
    type Factor<'a> = CudaFactor<'a>;
    type Ids<'a> = CudaIds;
    type Spans<'a> = CudaSpans;
    type Updates<'a> = CudaUpdates;

    /// 512 rows of 128,256 logits are 394 MB with their gradients, and enough rows for the matrix units.
    fn loss_rows(&self) -> usize {
        512
    }

    /// Sums stay in registers, so that there is nothing to gain from parts.
    fn loss_outputs(&self) -> usize {
        usize::MAX
    }

    // --- memory ---

    fn beside(&self) -> Self {
        Self {
            lane: Lane::Side,
            memory: Arc::clone(&self.device.side),
            ..self.clone()
        }
    }

    fn apart(&self) -> Self {
        Self {
            memory: must(PassMemory::new(&self.device.driver)),
            ..self.clone()
        }
    }

    fn working(&self) -> CudaBuf {
        CudaBuf::empty(self.device.element)
    }

    fn exact(&self) -> CudaBuf {
        CudaBuf::empty(Element::F32)
    }

    fn working_bytes(&self) -> usize {
        self.device.element.bytes()
    }

    fn resize(&self, buffer: &mut CudaBuf, len: usize) {
        if must(buffer.resize(&self.device.driver, len)) {
            self.device.moved.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn write(&self, from: &[f32], to: CudaViewMut<'_>) {
        assert_eq!(from.len(), to.len, "a number for each place");
        let bytes = to.element.encode(from);
        must(self.device.driver.upload(self.lane, &bytes, to.at));
    }

    fn read(&self, from: CudaView<'_>, to: &mut [f32]) {
        assert_eq!(from.len, to.len(), "a place for each number");
        let mut bytes = vec![0; from.bytes()];
        must(self.device.driver.download(self.lane, from.at, &mut bytes));
        from.element.decode(&bytes, to);
    }

    fn on_host<'a>(&self, _: &'a mut CudaBuf) -> Option<&'a mut [f32]> {
        None
    }

    fn clear(&self, view: CudaViewMut<'_>) {
        must(self.device.driver.zero(self.lane, view.at, view.bytes()));
    }

    fn copy(&self, from: CudaView<'_>, to: CudaViewMut<'_>) {
        assert_eq!(
            (from.len, from.element),
            (to.len, to.element),
            "copies are alike"
        );
        let bytes = from.bytes();
        must(self.device.driver.copy(self.lane, from.at, to.at, bytes));
    }

    fn copy_within(&self, buffer: &mut CudaBuf, from: Range<usize>, to: usize) {
        let len = from.len();
        let (from, bytes) = (buffer.part(from).at, buffer.part(to..to + len).bytes());
        let to = buffer.part_mut(to..to + len).at;
        must(self.device.driver.copy(self.lane, from, to, bytes));
    }

    fn wait(&self) {
        must(self.device.driver.wait(self.lane));
    }

    /// At 500 TFLOP/s; less than this is not worth a launch.
    fn quantum_flops(&self) -> usize {
        1 << 40
    }

    fn begin_pass(&self) {
        let mut memory = self.memory();
        memory.tables.begin();
        memory.replays.begin();
    }

    fn padded(&self, rows: usize) -> usize {
        match rows {
            0..=8 => rows.next_power_of_two(),
            9..=64 => rows.next_multiple_of(8),
            _ => rows.next_multiple_of(32),
        }
    }

    fn recurring(&self, over: &[u64], run: &mut dyn FnMut()) {
        let driver = self.device.driver.as_ref();
        let moved = self.device.moved.load(Ordering::Relaxed);
        let step = {
            let replays = &mut self.memory().replays;
            replays.note(over);
            replays.step(moved)
        };
        match step {
            Step::Replay(recording) => must(driver.replay(&recording)),
            Step::Run => run(),
            Step::Record => {
                let recording = Arc::new(must(driver.record(&mut || {
                    run();
                    Ok(())
                })));
                must(driver.replay(&recording));
                self.memory().replays.recorded(recording);
            }
        }
    }

    fn ids(&self, ids: &[u32]) -> CudaIds {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        self.note(ids.len());
        CudaIds {
            at: self.table(&bytes),
            count: ids.len(),
        }
    }

    fn spans<'a>(&self, spans: Vec<AttentionSpan<'a>>) -> CudaSpans {
        self.bring_spans(&spans)
    }

    fn updates<'a>(&'a self, lists: Vec<Vec<LowRank<CudaFactor<'a>, f32>>>) -> CudaUpdates {
        self.bring_updates(&lists)
    }

    // --- adapters ---

    fn arena(
        &self,
        spare: Option<CudaArena>,
        size: ArenaSize,
        fill: Fill<'_, f32>,
    ) -> Result<CudaArena, OutOfMemory> {
        let room = self.arena_bytes(size);
        let side = self.beside();
        let driver = &side.device.driver;
        let memory = match spare.map(|spare| spare.memory) {
            Some(memory) if memory.bytes() == room => Ok(memory),
            _ => Memory::new(driver, room),
        };
        let memory = match memory {
            Err(DeviceError::OutOfMemory { asked, free }) => {
                return Err(OutOfMemory { asked, free });
            }
            other => must(other),
        };
        let staging = &side.device.staging;
        let mut staging = staging.lock().unwrap_or_else(PoisonError::into_inner);
        let (full, half) = &mut *staging;
        full.resize(size.full, 0.0);
        half.resize(size.half, 0);
        fill(full, half);
        let half_at = memory.at(CudaArena::half_at(size));
        must(driver.upload(side.lane, bytemuck::cast_slice(full), memory.at(0)));
        must(driver.upload(side.lane, bytemuck::cast_slice(half), half_at));
        must(driver.wait(side.lane));
        Ok(CudaArena { memory, size })
    }

    fn arena_bytes(&self, size: ArenaSize) -> usize {
        CudaArena::half_at(size) + size.half * size_of::<u16>()
    }

    fn numbers(arena: &CudaArena, at: Range<usize>) -> CudaView<'_> {
        CudaView::new(arena.exact(&at), Element::F32, at.len())
    }

    fn numbers_mut(arena: &mut CudaArena, at: Range<usize>) -> CudaViewMut<'_> {
        CudaViewMut::new(arena.exact(&at), Element::F32, at.len())
    }

    fn factor<'a>(arena: &'a CudaArena, span: &Span) -> CudaFactor<'a> {
        let (address, element, at) = match span {
            Span::Full(at) => (arena.exact(at), Element::F32, at),
            Span::Bf16(at) => (arena.half(at), Element::Bf16, at),
            Span::F16(at) => (arena.half(at), Element::F16, at),
        };
        CudaView::new(address, element, at.len())
    }

    fn read_factor(&self, factor: CudaFactor<'_>) -> Numbers {
        let mut host = vec![0.0; factor.len];
        self.read(factor, &mut host);
        // Back to what they were stored as: each widened exactly.
        match factor.element {
            Element::F32 => Numbers::F32(host),
            Element::Bf16 => Numbers::Bf16(host.into_iter().map(half::bf16::from_f32).collect()),
            Element::F16 => Numbers::F16(host.into_iter().map(half::f16::from_f32).collect()),
        }
    }

    // --- frozen weights ---

    fn pack(&self, weight: &[f32], outputs: usize, inputs: usize) -> CudaMatrix {
        let weight = Weight::F32(weight.to_vec());
        must(CudaMatrix::pack(
            self,
            &weight,
            (outputs, inputs),
            Element::F32,
        ))
    }

    fn pack_weight(&self, weight: &Weight, outputs: usize, inputs: usize) -> CudaMatrix {
        let plain = self.device.element;
        must(CudaMatrix::pack(self, weight, (outputs, inputs), plain))
    }

    fn kind(&self, weight: &CudaMatrix) -> WeightKind {
        weight.kind
    }

    fn dims(&self, weight: &CudaMatrix) -> (usize, usize) {
        (weight.outputs, weight.inputs)
    }

    fn bytes(&self, weight: &CudaMatrix) -> usize {
        weight.bytes()
    }

    fn gather(&self, weight: &CudaMatrix, ids: CudaIds, out: CudaViewMut<'_>) {
        assert_eq!(out.len, ids.count * weight.inputs, "a row for each id");
        let name = format!("gather_{}_{}", weight.name(), out.element.name());
        let [numbers, scales] = weight.args();
        let args = [
            numbers,
            scales,
            Arg::At(ids.at),
            (&out).into(),
            at(weight.inputs),
        ];
        self.by_row(&name, ids.count, &args);
    }

    fn matmul_part(
        &self,
        x: CudaView<'_>,
        weight: &CudaMatrix,
        outputs: Range<usize>,
        y: CudaViewMut<'_>,
    ) {
        assert_eq!(outputs, 0..weight.outputs, "a device does all outputs");
        self.product(x, weight, &y);
    }

    fn matmul_backward_part(
        &self,
        dy: CudaView<'_>,
        weight: &CudaMatrix,
        outputs: Range<usize>,
        dx: CudaViewMut<'_>,
    ) {
        assert_eq!(outputs, 0..weight.outputs, "a device does all outputs");
        self.product_backward(dy, weight, &dx);
    }

    // --- low rank ---

    fn shrink(&self, x: CudaView<'_>, a: CudaView<'_>, rank: usize, h: CudaViewMut<'_>) {
        self.shrink_alone(x, a, rank, &h);
    }

    fn expand(
        &self,
        h: CudaView<'_>,
        bt: CudaView<'_>,
        rank: usize,
        scale: f32,
        y: CudaViewMut<'_>,
    ) {
        self.expand_alone(h, bt, rank, scale, &y);
    }

    fn outer(
        &self,
        h: CudaView<'_>,
        x: CudaView<'_>,
        rank: usize,
        scale: f32,
        dw: CudaViewMut<'_>,
    ) {
        self.outer_alone(h, x, rank, scale, &dw);
    }

    fn low_rank(
        &self,
        x: CudaView<'_>,
        updates: &CudaUpdates,
        list: usize,
        outputs: Vec<CudaViewMut<'_>>,
    ) {
        self.add_updates(x, updates, list, &outputs);
    }

    fn dropout(
        &self,
        x: CudaView<'_>,
        row_keys: &[u64],
        site: usize,
        rate: f32,
        out: CudaViewMut<'_>,
        add: bool,
    ) {
        let keys: Vec<u8> = row_keys.iter().flat_map(|key| key.to_le_bytes()).collect();
        let args = [
            x.into(),
            Arg::At(self.table(&keys)),
            Arg::Unsigned(site as u64),
            Arg::Unsigned(batch::bar(rate)),
            Arg::Float(1.0 / (1.0 - rate)),
            (&out).into(),
            at(x.len / row_keys.len().max(1)),
            at(usize::from(add)),
        ];
        self.by_row(named!(x.element, "dropout"), row_keys.len(), &args);
    }

    // --- row by row ---

    fn rms_norm(&self, x: CudaView<'_>, weight: CudaView<'_>, eps: f64, y: CudaViewMut<'_>) {
        let args = [
            x.into(),
            weight.into(),
            Arg::Float(eps as f32),
            (&y).into(),
            at(weight.len),
        ];
        self.by_row(named!(x.element, "rms_norm"), x.len / weight.len, &args);
    }

    fn add_rms_norm(
        &self,
        x: CudaView<'_>,
        residual: &mut CudaBuf,
        weight: CudaView<'_>,
        eps: f64,
        y: CudaViewMut<'_>,
    ) {
        let args = [
            x.into(),
            (&residual.all_mut()).into(),
            weight.into(),
            Arg::Float(eps as f32),
            (&y).into(),
            at(weight.len),
        ];
        let name = named!(x.element, "add_rms_norm");
        self.by_row(name, x.len / weight.len, &args);
    }

    fn rms_norm_backward(
        &self,
        x: CudaView<'_>,
        weight: CudaView<'_>,
        eps: f64,
        dy: CudaView<'_>,
        dx: CudaViewMut<'_>,
    ) {
        let args = [
            x.into(),
            weight.into(),
            Arg::Float(eps as f32),
            dy.into(),
            (&dx).into(),
            at(weight.len),
        ];
        let name = named!(x.element, "rms_norm_backward");
        self.by_row(name, x.len / weight.len, &args);
    }

    fn rope(
        &self,
        x: CudaViewMut<'_>,
        head_dim: usize,
        cos: CudaView<'_>,
        sin: CudaView<'_>,
        inverse: bool,
    ) {
        let rows = 2 * cos.len / head_dim;
        if rows == 0 {
            return;
        }
        let width = x.len / rows;
        let args = [
            (&x).into(),
            cos.into(),
            sin.into(),
            at(width),
            at(width / head_dim),
            at(head_dim),
            Arg::Float(if inverse { -1.0 } else { 1.0 }),
        ];
        self.by_row(named!(x.element, "rope"), rows, &args);
    }

    fn swiglu(&self, gate: CudaView<'_>, up: CudaView<'_>, y: CudaViewMut<'_>) {
        let args = [gate.into(), up.into(), (&y).into()];
        self.by_number(named!(gate.element, "swiglu"), gate.len, &args);
    }

    fn swiglu_backward(&self, gate: CudaViewMut<'_>, up: CudaViewMut<'_>, dy: CudaView<'_>) {
        let args = [(&gate).into(), (&up).into(), dy.into()];
        self.by_number(named!(dy.element, "swiglu_backward"), dy.len, &args);
    }

    fn add(&self, x: CudaView<'_>, y: CudaViewMut<'_>) {
        assert_eq!(
            (x.len, x.element),
            (y.len, y.element),
            "both sides of a sum are alike"
        );
        self.by_number(named!(x.element, "add"), x.len, &[x.into(), (&y).into()]);
    }

    fn add_bias(&self, bias: CudaView<'_>, y: CudaViewMut<'_>) {
        let args = [bias.into(), (&y).into(), at(bias.len)];
        self.by_row(named!(y.element, "add_bias"), y.len / bias.len, &args);
    }

    fn scale_columns(&self, gain: CudaView<'_>, y: CudaViewMut<'_>) {
        let args = [gain.into(), (&y).into(), at(gain.len)];
        self.by_row(named!(y.element, "scale_columns"), y.len / gain.len, &args);
    }

    fn multiply(&self, x: CudaView<'_>, y: CudaViewMut<'_>) {
        assert_eq!(
            (x.len, Element::F32),
            (y.len, y.element),
            "a product is exact and as long as its factor"
        );
        self.by_number(
            named!(x.element, "multiply"),
            x.len,
            &[x.into(), (&y).into()],
        );
    }

    fn take_rows(&self, from: CudaView<'_>, rows: CudaIds, out: CudaViewMut<'_>) {
        let width = out.len / rows.count.max(1);
        let name = match out.element {
            Element::F32 => "gather_f32_f32",
            Element::Bf16 => "gather_bf16_bf16",
            Element::F16 => "gather_f16_f16",
        };
        let none = Arg::At(Address::NULL);
        let args = [
            from.into(),
            none,
            Arg::At(rows.at),
            (&out).into(),
            at(width),
        ];
        self.by_row(name, rows.count, &args);
    }

    fn add_rows(&self, x: CudaView<'_>, rows: CudaIds, y: CudaViewMut<'_>) {
        let width = x.len / rows.count.max(1);
        let args = [x.into(), Arg::At(rows.at), (&y).into(), at(width)];
        self.by_row(named!(x.element, "add_rows"), rows.count, &args);
    }

    // --- attention ---

    fn store_keys(
        &self,
        from: CudaView<'_>,
        head_dim: usize,
        rows: CudaIds,
        block_size: usize,
        k: CudaViewMut<'_>,
    ) {
        self.store(
            named!(from.element, "store_keys"),
            from,
            (head_dim, block_size),
            rows,
            &k,
        );
    }

    fn store_values(
        &self,
        from: CudaView<'_>,
        head_dim: usize,
        rows: CudaIds,
        block_size: usize,
        v: CudaViewMut<'_>,
    ) {
        self.store(
            named!(from.element, "store_values"),
            from,
            (head_dim, block_size),
            rows,
            &v,
        );
    }

    fn attention(
        &self,
        shape: AttentionShape,
        q: CudaView<'_>,
        k: CudaView<'_>,
        v: CudaView<'_>,
        spans: &CudaSpans,
        out: CudaViewMut<'_>,
        lse: Option<CudaViewMut<'_>>,
    ) {
        self.attend(shape, [q, k, v], spans, &out, lse.as_ref());
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        saved: AttentionSaved<CudaView<'_>>,
        spans: &CudaSpans,
        dout: CudaView<'_>,
        grads: AttentionGrads<CudaViewMut<'_>>,
    ) {
        self.attend_backward(shape, saved, spans, dout, &grads);
    }

    fn draw(&self, logits: CudaView<'_>, draws: &[TokenDraw]) -> Option<Vec<Option<u32>>> {
        let mut table = Vec::with_capacity(32 * draws.len());
        for draw in draws {
            table.extend(draw.temperature.to_le_bytes());
            table.extend(draw.top_p.to_le_bytes());
            table.extend(draw.min_p.to_le_bytes());
            table.extend(draw.top_k.to_le_bytes());
            table.extend(draw.seed.to_le_bytes());
            table.extend(draw.counter.to_le_bytes());
        }
        let tokens = self.scratch(|scratch| &mut scratch.tokens, draws.len());
        let args = [
            logits.into(),
            Arg::At(self.table(&table)),
            Arg::At(tokens),
            at(logits.len / draws.len().max(1)),
        ];
        self.launch("sample", [draws.len(), 1, 1], 1024, 0, &args);
        let mut bytes = vec![0; draws.len() * size_of::<i32>()];
        let driver = &self.device.driver;
        must(driver.download(self.lane, tokens, &mut bytes));
        let (tokens, _) = bytes.as_chunks();
        let token = |bytes: &[u8; 4]| u32::try_from(i32::from_le_bytes(*bytes)).ok();
        Some(tokens.iter().map(token).collect())
    }

    // --- loss and optimizer ---

    fn cross_entropy(
        &self,
        logits: CudaView<'_>,
        labels: CudaIds,
        weights: CudaView<'_>,
        gradient: CudaViewMut<'_>,
        judged: CudaViewMut<'_>,
    ) {
        let args = [
            logits.into(),
            Arg::At(labels.at),
            weights.into(),
            (&gradient).into(),
            (&judged).into(),
            at(logits.len / labels.count.max(1)),
        ];
        let name = named!(gradient.element, "cross_entropy");
        self.launch(name, [labels.count, 1, 1], 512, 0, &args);
    }

    fn sum_of_squares(&self, numbers: CudaView<'_>) -> f64 {
        let count = numbers.len.div_ceil(SQUARES);
        if count == 0 {
            return 0.0;
        }
        // The sums of the blocks, and after them, at a pointer's boundary, the sum of all.
        let place = count.next_multiple_of(2);
        let sums = self.scratch(|scratch| &mut scratch.sums, 2 * (place + 1));
        let total = sums.plus(place * size_of::<f64>());
        let args = [numbers.into(), Arg::Long(numbers.len as i64), Arg::At(sums)];
        self.launch("sum_of_squares", [count, 1, 1], 256, 0, &args);
        let args = [Arg::At(sums), Arg::Long(count as i64), Arg::At(total)];
        self.launch("sum_of_sums", [1, 1, 1], 256, 0, &args);
        let mut bytes = [0; size_of::<f64>()];
        must(self.device.driver.download(self.lane, total, &mut bytes));
        f64::from_le_bytes(bytes)
    }

    fn adamw(
        &self,
        step: &AdamWStep,
        params: CudaViewMut<'_>,
        grads: CudaView<'_>,
        mean: CudaViewMut<'_>,
        square: CudaViewMut<'_>,
    ) {
        let count = grads.len;
        let numbers = [
            step.scale,
            step.keep1,
            1.0 - step.keep1,
            step.keep2,
            1.0 - step.keep2,
            step.root,
            step.epsilon,
            step.shrink,
            step.size,
        ];
        let mut args = vec![
            (&params).into(),
            grads.into(),
            (&mean).into(),
            (&square).into(),
            Arg::Long(count as i64),
        ];
        args.extend(numbers.map(|number| Arg::Float(number as f32)));
        self.launch("adamw", [count.div_ceil(256), 1, 1], 256, 0, &args);
    }
}

impl Cuda {
    /// Rows into the paged cache, keys or values as `kernel` says.
    fn store(
        &self,
        kernel: &str,
        from: CudaView<'_>,
        (head_dim, block_size): (usize, usize),
        rows: CudaIds,
        cache: &CudaViewMut<'_>,
    ) {
        assert_eq!(
            block_size, CUDA_BLOCK_SIZE,
            "positions of a block of the cache"
        );
        let width = from.len / rows.count.max(1);
        let args = [
            from.into(),
            Arg::At(rows.at),
            cache.into(),
            at(width),
            at(width / head_dim),
            at(head_dim),
        ];
        self.by_row(kernel, rows.count, &args);
    }
}
