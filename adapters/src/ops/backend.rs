//! The operations that a server was started with: those of the processor or those of a device, chosen once.
//!
//! Only joins the two: every operation is one line for each. Operands of the other kind are programming errors.

use std::ops::Range;

use super::cuda::Cuda;
use super::{
    AdamWStep, ArenaSize, AttentionGrads, AttentionSaved, AttentionShape, AttentionSpan, Buffer,
    Cpu, Fill, LowRank, Ops, OutOfMemory, Span, TokenDraw, View, ViewMut, Weight, WeightKind,
};
use crate::weights::Numbers;

/// Where the server's operations run.
#[derive(Clone, Debug)]
pub enum Backend {
    /// On the processor.
    Cpu(Cpu),
    /// On a device.
    Cuda(Cuda),
}

/// Something of the processor's or the device's.
#[derive(Clone, Copy, Debug)]
pub enum Of<H, D> {
    /// In the host's memory.
    Host(H),
    /// In the device's.
    Device(D),
}

/// A buffer of either.
type BackendBuf = Of<<Cpu as Ops>::Buf, <Cuda as Ops>::Buf>;
type BackendArena = Of<<Cpu as Ops>::Arena, <Cuda as Ops>::Arena>;
type BackendMatrix = Of<<Cpu as Ops>::Matrix, <Cuda as Ops>::Matrix>;
type BackendFactor<'a> = Of<<Cpu as Ops>::Factor<'a>, <Cuda as Ops>::Factor<'a>>;
type BackendIds<'a> = Of<<Cpu as Ops>::Ids<'a>, <Cuda as Ops>::Ids<'a>>;
type BackendSpans<'a> = Of<<Cpu as Ops>::Spans<'a>, <Cuda as Ops>::Spans<'a>>;
type BackendUpdates<'a> = Of<<Cpu as Ops>::Updates<'a>, <Cuda as Ops>::Updates<'a>>;
type Read<'a> = View<'a, Backend>;
type Write<'a> = ViewMut<'a, Backend>;

// === impl Of ===

impl<H, D> Of<H, D> {
    fn host(self) -> H {
        match self {
            Of::Host(host) => host,
            Of::Device(_) => panic!("an operand of the device among those of the processor"),
        }
    }

    fn device(self) -> D {
        match self {
            Of::Device(device) => device,
            Of::Host(_) => panic!("an operand of the processor among those of the device"),
        }
    }

    fn as_ref(&self) -> Of<&H, &D> {
        match self {
            Of::Host(host) => Of::Host(host),
            Of::Device(device) => Of::Device(device),
        }
    }

    fn as_mut(&mut self) -> Of<&mut H, &mut D> {
        match self {
            Of::Host(host) => Of::Host(host),
            Of::Device(device) => Of::Device(device),
        }
    }
}

impl<H: Buffer, D: Buffer> Buffer for Of<H, D> {
    type View<'a> = Of<H::View<'a>, D::View<'a>>;
    type ViewMut<'a> = Of<H::ViewMut<'a>, D::ViewMut<'a>>;

    fn len(&self) -> usize {
        match self {
            Of::Host(host) => host.len(),
            Of::Device(device) => device.len(),
        }
    }

    fn place(&self) -> u64 {
        match self {
            Of::Host(host) => host.place(),
            Of::Device(device) => device.place(),
        }
    }

    fn part(&self, at: Range<usize>) -> Self::View<'_> {
        match self {
            Of::Host(host) => Of::Host(host.part(at)),
            Of::Device(device) => Of::Device(device.part(at)),
        }
    }

    fn part_mut(&mut self, at: Range<usize>) -> Self::ViewMut<'_> {
        match self {
            Of::Host(host) => Of::Host(host.part_mut(at)),
            Of::Device(device) => Of::Device(device.part_mut(at)),
        }
    }
}

// === impl Backend ===

impl Default for Backend {
    fn default() -> Self {
        Backend::Cpu(Cpu::default())
    }
}

impl Ops for Backend {
    type T = f32;
    type Buf = BackendBuf;
    type Matrix = BackendMatrix;
    type Arena = BackendArena;
    type Factor<'a> = BackendFactor<'a>;
    type Ids<'a> = BackendIds<'a>;
    type Spans<'a> = BackendSpans<'a>;
    type Updates<'a> = BackendUpdates<'a>;

    fn loss_rows(&self) -> usize {
        match self {
            Backend::Cpu(cpu) => cpu.loss_rows(),
            Backend::Cuda(cuda) => cuda.loss_rows(),
        }
    }

    fn loss_outputs(&self) -> usize {
        match self {
            Backend::Cpu(cpu) => cpu.loss_outputs(),
            Backend::Cuda(cuda) => cuda.loss_outputs(),
        }
    }

    fn beside(&self) -> Self {
        match self {
            Backend::Cpu(cpu) => Backend::Cpu(cpu.beside()),
            Backend::Cuda(cuda) => Backend::Cuda(cuda.beside()),
        }
    }

    fn apart(&self) -> Self {
        match self {
            Backend::Cpu(cpu) => Backend::Cpu(cpu.apart()),
            Backend::Cuda(cuda) => Backend::Cuda(cuda.apart()),
        }
    }

    fn working(&self) -> BackendBuf {
        match self {
            Backend::Cpu(cpu) => Of::Host(cpu.working()),
            Backend::Cuda(cuda) => Of::Device(cuda.working()),
        }
    }

    fn exact(&self) -> BackendBuf {
        match self {
            Backend::Cpu(cpu) => Of::Host(cpu.exact()),
            Backend::Cuda(cuda) => Of::Device(cuda.exact()),
        }
    }

    fn working_bytes(&self) -> usize {
        match self {
            Backend::Cpu(cpu) => cpu.working_bytes(),
            Backend::Cuda(cuda) => cuda.working_bytes(),
        }
    }

    fn resize(&self, buffer: &mut BackendBuf, len: usize) {
        match self {
            Backend::Cpu(cpu) => cpu.resize(buffer.as_mut().host(), len),
            Backend::Cuda(cuda) => cuda.resize(buffer.as_mut().device(), len),
        }
    }

    fn write(&self, from: &[f32], to: Write<'_>) {
        match self {
            Backend::Cpu(cpu) => cpu.write(from, to.host()),
            Backend::Cuda(cuda) => cuda.write(from, to.device()),
        }
    }

    fn read(&self, from: Read<'_>, to: &mut [f32]) {
        match self {
            Backend::Cpu(cpu) => cpu.read(from.host(), to),
            Backend::Cuda(cuda) => cuda.read(from.device(), to),
        }
    }

    fn on_host<'a>(&self, buffer: &'a mut BackendBuf) -> Option<&'a mut [f32]> {
        match self {
            Backend::Cpu(cpu) => cpu.on_host(buffer.as_mut().host()),
            Backend::Cuda(cuda) => cuda.on_host(buffer.as_mut().device()),
        }
    }

    fn clear(&self, view: Write<'_>) {
        match self {
            Backend::Cpu(cpu) => cpu.clear(view.host()),
            Backend::Cuda(cuda) => cuda.clear(view.device()),
        }
    }

    fn copy(&self, from: Read<'_>, to: Write<'_>) {
        match self {
            Backend::Cpu(cpu) => cpu.copy(from.host(), to.host()),
            Backend::Cuda(cuda) => cuda.copy(from.device(), to.device()),
        }
    }

    fn copy_within(&self, buffer: &mut BackendBuf, from: Range<usize>, to: usize) {
        match self {
            Backend::Cpu(cpu) => cpu.copy_within(buffer.as_mut().host(), from, to),
            Backend::Cuda(cuda) => cuda.copy_within(buffer.as_mut().device(), from, to),
        }
    }

    fn wait(&self) {
        match self {
            Backend::Cpu(cpu) => cpu.wait(),
            Backend::Cuda(cuda) => cuda.wait(),
        }
    }

    fn quantum_flops(&self) -> usize {
        match self {
            Backend::Cpu(cpu) => cpu.quantum_flops(),
            Backend::Cuda(cuda) => cuda.quantum_flops(),
        }
    }

    fn begin_pass(&self) {
        match self {
            Backend::Cpu(cpu) => cpu.begin_pass(),
            Backend::Cuda(cuda) => cuda.begin_pass(),
        }
    }

    fn padded(&self, rows: usize) -> usize {
        match self {
            Backend::Cpu(cpu) => cpu.padded(rows),
            Backend::Cuda(cuda) => cuda.padded(rows),
        }
    }

    fn recurring(&self, over: &[u64], run: &mut dyn FnMut()) {
        match self {
            Backend::Cpu(cpu) => cpu.recurring(over, run),
            Backend::Cuda(cuda) => cuda.recurring(over, run),
        }
    }

    fn ids<'a>(&self, ids: &'a [u32]) -> BackendIds<'a> {
        match self {
            Backend::Cpu(cpu) => Of::Host(cpu.ids(ids)),
            Backend::Cuda(cuda) => Of::Device(cuda.ids(ids)),
        }
    }

    fn spans<'a>(&self, spans: Vec<AttentionSpan<'a>>) -> BackendSpans<'a> {
        match self {
            Backend::Cpu(cpu) => Of::Host(cpu.spans(spans)),
            Backend::Cuda(cuda) => Of::Device(cuda.spans(spans)),
        }
    }

    fn updates<'a>(
        &'a self,
        lists: Vec<Vec<LowRank<BackendFactor<'a>, f32>>>,
    ) -> BackendUpdates<'a> {
        match self {
            Backend::Cpu(cpu) => Of::Host(cpu.updates(each(lists, Of::host))),
            Backend::Cuda(cuda) => Of::Device(cuda.updates(each(lists, Of::device))),
        }
    }

    fn arena(
        &self,
        spare: Option<BackendArena>,
        size: ArenaSize,
        fill: Fill<'_, f32>,
    ) -> Result<BackendArena, OutOfMemory> {
        match self {
            Backend::Cpu(cpu) => cpu.arena(spare.map(Of::host), size, fill).map(Of::Host),
            Backend::Cuda(cuda) => cuda
                .arena(spare.map(Of::device), size, fill)
                .map(Of::Device),
        }
    }

    fn arena_bytes(&self, size: ArenaSize) -> usize {
        match self {
            Backend::Cpu(cpu) => cpu.arena_bytes(size),
            Backend::Cuda(cuda) => cuda.arena_bytes(size),
        }
    }

    fn numbers(arena: &BackendArena, at: Range<usize>) -> Read<'_> {
        match arena {
            Of::Host(arena) => Of::Host(Cpu::numbers(arena, at)),
            Of::Device(arena) => Of::Device(Cuda::numbers(arena, at)),
        }
    }

    fn numbers_mut(arena: &mut BackendArena, at: Range<usize>) -> Write<'_> {
        match arena {
            Of::Host(arena) => Of::Host(Cpu::numbers_mut(arena, at)),
            Of::Device(arena) => Of::Device(Cuda::numbers_mut(arena, at)),
        }
    }

    fn factor<'a>(arena: &'a BackendArena, span: &Span) -> BackendFactor<'a> {
        match arena {
            Of::Host(arena) => Of::Host(Cpu::factor(arena, span)),
            Of::Device(arena) => Of::Device(Cuda::factor(arena, span)),
        }
    }

    fn read_factor(&self, factor: BackendFactor<'_>) -> Numbers {
        match self {
            Backend::Cpu(cpu) => cpu.read_factor(factor.host()),
            Backend::Cuda(cuda) => cuda.read_factor(factor.device()),
        }
    }

    fn pack(&self, weight: &[f32], outputs: usize, inputs: usize) -> BackendMatrix {
        match self {
            Backend::Cpu(cpu) => Of::Host(cpu.pack(weight, outputs, inputs)),
            Backend::Cuda(cuda) => Of::Device(cuda.pack(weight, outputs, inputs)),
        }
    }

    fn pack_weight(&self, weight: &Weight, outputs: usize, inputs: usize) -> BackendMatrix {
        match self {
            Backend::Cpu(cpu) => Of::Host(cpu.pack_weight(weight, outputs, inputs)),
            Backend::Cuda(cuda) => Of::Device(cuda.pack_weight(weight, outputs, inputs)),
        }
    }

    fn kind(&self, weight: &BackendMatrix) -> WeightKind {
        match self {
            Backend::Cpu(cpu) => cpu.kind(weight.as_ref().host()),
            Backend::Cuda(cuda) => cuda.kind(weight.as_ref().device()),
        }
    }

    fn dims(&self, weight: &BackendMatrix) -> (usize, usize) {
        match self {
            Backend::Cpu(cpu) => cpu.dims(weight.as_ref().host()),
            Backend::Cuda(cuda) => cuda.dims(weight.as_ref().device()),
        }
    }

    fn bytes(&self, weight: &BackendMatrix) -> usize {
        match self {
            Backend::Cpu(cpu) => cpu.bytes(weight.as_ref().host()),
            Backend::Cuda(cuda) => cuda.bytes(weight.as_ref().device()),
        }
    }

    fn gather(&self, weight: &BackendMatrix, ids: BackendIds<'_>, out: Write<'_>) {
        match self {
            Backend::Cpu(cpu) => cpu.gather(weight.as_ref().host(), ids.host(), out.host()),
            Backend::Cuda(cuda) => {
                cuda.gather(weight.as_ref().device(), ids.device(), out.device())
            }
        }
    }

    fn matmul_part(
        &self,
        x: Read<'_>,
        weight: &BackendMatrix,
        outputs: Range<usize>,
        y: Write<'_>,
    ) {
        match self {
            Backend::Cpu(cpu) => {
                cpu.matmul_part(x.host(), weight.as_ref().host(), outputs, y.host())
            }
            Backend::Cuda(cuda) => {
                cuda.matmul_part(x.device(), weight.as_ref().device(), outputs, y.device())
            }
        }
    }

    fn matmul_backward_part(
        &self,
        dy: Read<'_>,
        weight: &BackendMatrix,
        outputs: Range<usize>,
        dx: Write<'_>,
    ) {
        match self {
            Backend::Cpu(cpu) => {
                cpu.matmul_backward_part(dy.host(), weight.as_ref().host(), outputs, dx.host())
            }
            Backend::Cuda(cuda) => cuda.matmul_backward_part(
                dy.device(),
                weight.as_ref().device(),
                outputs,
                dx.device(),
            ),
        }
    }

    fn shrink(&self, x: Read<'_>, a: Read<'_>, rank: usize, h: Write<'_>) {
        match self {
            Backend::Cpu(cpu) => cpu.shrink(x.host(), a.host(), rank, h.host()),
            Backend::Cuda(cuda) => cuda.shrink(x.device(), a.device(), rank, h.device()),
        }
    }

    fn expand(&self, h: Read<'_>, bt: Read<'_>, rank: usize, scale: f32, y: Write<'_>) {
        match self {
            Backend::Cpu(cpu) => cpu.expand(h.host(), bt.host(), rank, scale, y.host()),
            Backend::Cuda(cuda) => cuda.expand(h.device(), bt.device(), rank, scale, y.device()),
        }
    }

    fn outer(&self, h: Read<'_>, x: Read<'_>, rank: usize, scale: f32, dw: Write<'_>) {
        match self {
            Backend::Cpu(cpu) => cpu.outer(h.host(), x.host(), rank, scale, dw.host()),
            Backend::Cuda(cuda) => cuda.outer(h.device(), x.device(), rank, scale, dw.device()),
        }
    }

    fn low_rank(
        &self,
        x: Read<'_>,
        updates: &BackendUpdates<'_>,
        list: usize,
        outputs: Vec<Write<'_>>,
    ) {
        let outputs = outputs.into_iter();
        match self {
            Backend::Cpu(cpu) => {
                let updates = updates.as_ref().host();
                cpu.low_rank(x.host(), updates, list, outputs.map(Of::host).collect());
            }
            Backend::Cuda(cuda) => {
                let updates = updates.as_ref().device();
                cuda.low_rank(x.device(), updates, list, outputs.map(Of::device).collect());
            }
        }
    }

    fn dropout(
        &self,
        x: Read<'_>,
        row_keys: &[u64],
        site: usize,
        rate: f32,
        out: Write<'_>,
        add: bool,
    ) {
        match self {
            Backend::Cpu(cpu) => cpu.dropout(x.host(), row_keys, site, rate, out.host(), add),
            Backend::Cuda(cuda) => {
                cuda.dropout(x.device(), row_keys, site, rate, out.device(), add)
            }
        }
    }

    fn rms_norm(&self, x: Read<'_>, weight: Read<'_>, eps: f64, y: Write<'_>) {
        match self {
            Backend::Cpu(cpu) => cpu.rms_norm(x.host(), weight.host(), eps, y.host()),
            Backend::Cuda(cuda) => cuda.rms_norm(x.device(), weight.device(), eps, y.device()),
        }
    }

    fn add_rms_norm(
        &self,
        x: Read<'_>,
        residual: &mut BackendBuf,
        weight: Read<'_>,
        eps: f64,
        y: Write<'_>,
    ) {
        match self {
            Backend::Cpu(cpu) => cpu.add_rms_norm(
                x.host(),
                residual.as_mut().host(),
                weight.host(),
                eps,
                y.host(),
            ),
            Backend::Cuda(cuda) => cuda.add_rms_norm(
                x.device(),
                residual.as_mut().device(),
                weight.device(),
                eps,
                y.device(),
            ),
        }
    }

    fn rms_norm_backward(
        &self,
        x: Read<'_>,
        weight: Read<'_>,
        eps: f64,
        dy: Read<'_>,
        dx: Write<'_>,
    ) {
        match self {
            Backend::Cpu(cpu) => {
                cpu.rms_norm_backward(x.host(), weight.host(), eps, dy.host(), dx.host())
            }
            Backend::Cuda(cuda) => {
                cuda.rms_norm_backward(x.device(), weight.device(), eps, dy.device(), dx.device())
            }
        }
    }

    fn rope(&self, x: Write<'_>, head_dim: usize, cos: Read<'_>, sin: Read<'_>, inverse: bool) {
        match self {
            Backend::Cpu(cpu) => cpu.rope(x.host(), head_dim, cos.host(), sin.host(), inverse),
            Backend::Cuda(cuda) => {
                cuda.rope(x.device(), head_dim, cos.device(), sin.device(), inverse)
            }
        }
    }

    fn swiglu(&self, gate: Read<'_>, up: Read<'_>, y: Write<'_>) {
        match self {
            Backend::Cpu(cpu) => cpu.swiglu(gate.host(), up.host(), y.host()),
            Backend::Cuda(cuda) => cuda.swiglu(gate.device(), up.device(), y.device()),
        }
    }

    fn swiglu_backward(&self, gate: Write<'_>, up: Write<'_>, dy: Read<'_>) {
        match self {
            Backend::Cpu(cpu) => cpu.swiglu_backward(gate.host(), up.host(), dy.host()),
            Backend::Cuda(cuda) => cuda.swiglu_backward(gate.device(), up.device(), dy.device()),
        }
    }

    fn add(&self, x: Read<'_>, y: Write<'_>) {
        match self {
            Backend::Cpu(cpu) => cpu.add(x.host(), y.host()),
            Backend::Cuda(cuda) => cuda.add(x.device(), y.device()),
        }
    }

    fn add_bias(&self, bias: Read<'_>, y: Write<'_>) {
        match self {
            Backend::Cpu(cpu) => cpu.add_bias(bias.host(), y.host()),
            Backend::Cuda(cuda) => cuda.add_bias(bias.device(), y.device()),
        }
    }

    fn scale_columns(&self, gain: Read<'_>, y: Write<'_>) {
        match self {
            Backend::Cpu(cpu) => cpu.scale_columns(gain.host(), y.host()),
            Backend::Cuda(cuda) => cuda.scale_columns(gain.device(), y.device()),
        }
    }

    fn multiply(&self, x: Read<'_>, y: Write<'_>) {
        match self {
            Backend::Cpu(cpu) => cpu.multiply(x.host(), y.host()),
            Backend::Cuda(cuda) => cuda.multiply(x.device(), y.device()),
        }
    }

    fn take_rows(&self, from: Read<'_>, rows: BackendIds<'_>, out: Write<'_>) {
        match self {
            Backend::Cpu(cpu) => cpu.take_rows(from.host(), rows.host(), out.host()),
            Backend::Cuda(cuda) => cuda.take_rows(from.device(), rows.device(), out.device()),
        }
    }

    fn add_rows(&self, x: Read<'_>, rows: BackendIds<'_>, y: Write<'_>) {
        match self {
            Backend::Cpu(cpu) => cpu.add_rows(x.host(), rows.host(), y.host()),
            Backend::Cuda(cuda) => cuda.add_rows(x.device(), rows.device(), y.device()),
        }
    }

    fn store_keys(
        &self,
        from: Read<'_>,
        head_dim: usize,
        rows: BackendIds<'_>,
        block_size: usize,
        k: Write<'_>,
    ) {
        match self {
            Backend::Cpu(cpu) => {
                cpu.store_keys(from.host(), head_dim, rows.host(), block_size, k.host())
            }
            Backend::Cuda(cuda) => cuda.store_keys(
                from.device(),
                head_dim,
                rows.device(),
                block_size,
                k.device(),
            ),
        }
    }

    fn store_values(
        &self,
        from: Read<'_>,
        head_dim: usize,
        rows: BackendIds<'_>,
        block_size: usize,
        v: Write<'_>,
    ) {
        match self {
            Backend::Cpu(cpu) => {
                cpu.store_values(from.host(), head_dim, rows.host(), block_size, v.host())
            }
            Backend::Cuda(cuda) => cuda.store_values(
                from.device(),
                head_dim,
                rows.device(),
                block_size,
                v.device(),
            ),
        }
    }

    fn attention(
        &self,
        shape: AttentionShape,
        q: Read<'_>,
        k: Read<'_>,
        v: Read<'_>,
        spans: &BackendSpans<'_>,
        out: Write<'_>,
        lse: Option<Write<'_>>,
    ) {
        match self {
            Backend::Cpu(cpu) => {
                let (spans, lse) = (spans.as_ref().host(), lse.map(Of::host));
                cpu.attention(shape, q.host(), k.host(), v.host(), spans, out.host(), lse);
            }
            Backend::Cuda(cuda) => {
                let (spans, lse) = (spans.as_ref().device(), lse.map(Of::device));
                let (q, k, v) = (q.device(), k.device(), v.device());
                cuda.attention(shape, q, k, v, spans, out.device(), lse);
            }
        }
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        saved: AttentionSaved<Read<'_>>,
        spans: &BackendSpans<'_>,
        dout: Read<'_>,
        grads: AttentionGrads<Write<'_>>,
    ) {
        match self {
            Backend::Cpu(cpu) => {
                let (saved, grads) = (saved.map(Of::host), grads.map(Of::host));
                let spans = spans.as_ref().host();
                cpu.attention_backward(shape, saved, spans, dout.host(), grads);
            }
            Backend::Cuda(cuda) => {
                let (saved, grads) = (saved.map(Of::device), grads.map(Of::device));
                let spans = spans.as_ref().device();
                cuda.attention_backward(shape, saved, spans, dout.device(), grads);
            }
        }
    }

    fn draw(&self, logits: Read<'_>, draws: &[TokenDraw]) -> Option<Vec<Option<u32>>> {
        match self {
            Backend::Cpu(cpu) => cpu.draw(logits.host(), draws),
            Backend::Cuda(cuda) => cuda.draw(logits.device(), draws),
        }
    }

    fn cross_entropy(
        &self,
        logits: Read<'_>,
        labels: BackendIds<'_>,
        weights: Read<'_>,
        gradient: Write<'_>,
        judged: Write<'_>,
    ) {
        match self {
            Backend::Cpu(cpu) => cpu.cross_entropy(
                logits.host(),
                labels.host(),
                weights.host(),
                gradient.host(),
                judged.host(),
            ),
            Backend::Cuda(cuda) => cuda.cross_entropy(
                logits.device(),
                labels.device(),
                weights.device(),
                gradient.device(),
                judged.device(),
            ),
        }
    }

    fn sum_of_squares(&self, numbers: Read<'_>) -> f64 {
        match self {
            Backend::Cpu(cpu) => cpu.sum_of_squares(numbers.host()),
            Backend::Cuda(cuda) => cuda.sum_of_squares(numbers.device()),
        }
    }

    fn adamw(
        &self,
        step: &AdamWStep,
        params: Write<'_>,
        grads: Read<'_>,
        mean: Write<'_>,
        square: Write<'_>,
    ) {
        match self {
            Backend::Cpu(cpu) => cpu.adamw(
                step,
                params.host(),
                grads.host(),
                mean.host(),
                square.host(),
            ),
            Backend::Cuda(cuda) => cuda.adamw(
                step,
                params.device(),
                grads.device(),
                mean.device(),
                square.device(),
            ),
        }
    }
}

/// The same updates with other factors.
fn each<'a, F>(
    lists: Vec<Vec<LowRank<BackendFactor<'a>, f32>>>,
    factor: impl Fn(BackendFactor<'a>) -> F,
) -> Vec<Vec<LowRank<F, f32>>> {
    let list = |list: Vec<LowRank<BackendFactor<'a>, f32>>| {
        list.into_iter().map(|update| update.map(&factor)).collect()
    };
    lists.into_iter().map(list).collect()
}
