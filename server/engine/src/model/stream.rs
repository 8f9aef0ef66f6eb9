//! The residual stream: what every half of a block reads and adds to.
//!
//! What a half adds waits for the norm that reads the sum, so that both are one operation. Between two halves no sum is left
//! undone without the stream knowing it.

use espalier_adapters::batch::Pass;
use espalier_adapters::linear::RmsNorm;
use espalier_adapters::ops::{Buffer, Ops};

/// The residual stream of a pass, `[rows, hidden]`.
#[derive(Debug)]
pub(crate) struct Stream<O: Ops> {
    x: O::Buf,
    delta: O::Buf,
    /// Whether `delta` is still to be added to `x`.
    waits: bool,
}

impl<O: Ops> Stream<O> {
    pub(crate) fn new(ops: &O) -> Self {
        Self {
            x: ops.working(),
            delta: ops.working(),
            waits: false,
        }
    }

    /// Room for the numbers with which a pass begins.
    pub(crate) fn begin(&mut self, ops: &O, len: usize) -> &mut O::Buf {
        ops.resize(&mut self.x, len);
        ops.resize(&mut self.delta, len);
        self.waits = false;
        &mut self.x
    }

    /// Adds what waits, and norms the sum.
    pub(crate) fn norm(&mut self, pass: &Pass<'_, O>, norm: &RmsNorm<O>, y: &mut O::Buf) {
        if std::mem::take(&mut self.waits) {
            norm.forward_sum(pass, &self.delta, &mut self.x, y);
        } else {
            norm.forward(pass, &self.x, y);
        }
    }

    /// The sum, as the last norm read it.
    pub(crate) fn sum(&self) -> &O::Buf {
        &self.x
    }

    /// Where what is added next is to be written.
    pub(crate) fn added(&mut self) -> &mut O::Buf {
        self.waits = true;
        &mut self.delta
    }

    /// Keeps the sum for the backward pass.
    pub(crate) fn keep(&self, ops: &O, kept: &mut O::Buf) {
        ops.resize(kept, self.x.len());
        ops.copy(self.x.all(), kept.all_mut());
    }
}
