//! Numbers in a device's memory: allocations that free themselves, buffers that grow, and parts of them as kernels take them.

use std::marker::PhantomData;
use std::ops::Range;
use std::panic::panic_any;
use std::sync::Arc;

use half::{bf16, f16};

use super::driver::{Address, Arg, DeviceError, Driver, Element, Lane};
use crate::ops::{Buffer, OutOfMemory};

/// An allocation.
#[derive(Debug)]
pub(super) struct Memory {
    driver: Arc<dyn Driver>,
    at: Address,
    bytes: usize,
}

/// Numbers of one element, of a length that may change: what a buffer held before it grew is lost.
#[derive(Debug)]
pub struct CudaBuf {
    memory: Option<Memory>,
    element: Element,
    len: usize,
}

/// Some numbers of a buffer.
#[derive(Clone, Copy, Debug)]
pub struct CudaView<'a> {
    pub(super) at: Address,
    pub(super) element: Element,
    pub(super) len: usize,
    buffer: PhantomData<&'a CudaBuf>,
}

/// Some numbers of a buffer, to be written.
#[derive(Debug)]
pub struct CudaViewMut<'a> {
    pub(super) at: Address,
    pub(super) element: Element,
    pub(super) len: usize,
    buffer: PhantomData<&'a mut CudaBuf>,
}

/// The result, or the end of this step or job: whoever runs them catches it.
pub(super) fn must<T>(result: Result<T, DeviceError>) -> T {
    match result {
        Ok(value) => value,
        Err(DeviceError::OutOfMemory { asked, free }) => panic_any(OutOfMemory { asked, free }),
        Err(error) => panic!("{error}"),
    }
}

// === impl Element ===

impl Element {
    /// Bytes of one number.
    pub(super) fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::Bf16 | Element::F16 => 2,
        }
    }

    /// As kernels' names have it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Element::F32 => "f32",
            Element::Bf16 => "bf16",
            Element::F16 => "f16",
        }
    }

    /// Numbers of the host as this element's bytes, rounded to nearest.
    pub(super) fn encode(self, numbers: &[f32]) -> Vec<u8> {
        match self {
            Element::F32 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Element::Bf16 => {
                let narrow = numbers.iter().map(|x| bf16::from_f32(*x));
                narrow.flat_map(bf16::to_le_bytes).collect()
            }
            Element::F16 => {
                let narrow = numbers.iter().map(|x| f16::from_f32(*x));
                narrow.flat_map(f16::to_le_bytes).collect()
            }
        }
    }

    /// The way back.
    pub(super) fn decode(self, bytes: &[u8], numbers: &mut [f32]) {
        match self {
            Element::F32 => {
                for (number, bytes) in numbers.iter_mut().zip(bytes.as_chunks().0) {
                    *number = f32::from_le_bytes(*bytes);
                }
            }
            Element::Bf16 => {
                for (number, bytes) in numbers.iter_mut().zip(bytes.as_chunks().0) {
                    *number = bf16::from_le_bytes(*bytes).to_f32();
                }
            }
            Element::F16 => {
                for (number, bytes) in numbers.iter_mut().zip(bytes.as_chunks().0) {
                    *number = f16::from_le_bytes(*bytes).to_f32();
                }
            }
        }
    }
}

// === impl Memory ===

impl Memory {
    pub(super) fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            driver: Arc::clone(driver),
            at: driver.allocate(bytes)?,
            bytes,
        })
    }

    /// Memory that holds `bytes`.
    pub(super) fn holding(
        driver: &Arc<dyn Driver>,
        lane: Lane,
        bytes: &[u8],
    ) -> Result<Self, DeviceError> {
        let memory = Self::new(driver, bytes.len())?;
        driver.upload(lane, bytes, memory.at)?;
        Ok(memory)
    }

    pub(super) fn at(&self, byte: usize) -> Address {
        Address(self.at.0 + byte as u64)
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.driver.free(self.at, self.bytes);
    }
}

// === impl CudaBuf ===

impl CudaBuf {
    pub(super) fn empty(element: Element) -> Self {
        Self {
            memory: None,
            element,
            len: 0,
        }
    }

    /// Gives it a length; whether it moved. Growing takes an eighth more than was asked for, so that it seldom happens.
    pub(super) fn resize(
        &mut self,
        driver: &Arc<dyn Driver>,
        len: usize,
    ) -> Result<bool, DeviceError> {
        let bytes = len * self.element.bytes();
        let small = |memory: &Memory| memory.bytes < bytes;
        let moves = self.memory.as_ref().is_none_or(small);
        if moves {
            let room = if self.memory.is_some() {
                bytes + bytes / 8
            } else {
                bytes
            };
            self.memory = None;
            self.memory = Some(Memory::new(driver, room)?);
        }
        self.len = len;
        Ok(moves)
    }

    fn address(&self, at: &Range<usize>) -> Address {
        assert!(
            at.start <= at.end && at.end <= self.len,
            "numbers {at:?} of {}",
            self.len
        );
        match &self.memory {
            Some(memory) => memory.at(at.start * self.element.bytes()),
            None => Address::NULL,
        }
    }
}

impl Buffer for CudaBuf {
    type View<'a> = CudaView<'a>;
    type ViewMut<'a> = CudaViewMut<'a>;

    fn len(&self) -> usize {
        self.len
    }

    fn place(&self) -> u64 {
        self.address(&(0..0)).0
    }

    fn part(&self, at: Range<usize>) -> CudaView<'_> {
        CudaView::new(self.address(&at), self.element, at.len())
    }

    fn part_mut(&mut self, at: Range<usize>) -> CudaViewMut<'_> {
        CudaViewMut::new(self.address(&at), self.element, at.len())
    }
}

// === impl CudaView, CudaViewMut ===

impl CudaView<'_> {
    pub(super) fn new(at: Address, element: Element, len: usize) -> Self {
        Self {
            at,
            element,
            len,
            buffer: PhantomData,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.len * self.element.bytes()
    }
}

impl CudaViewMut<'_> {
    pub(super) fn new(at: Address, element: Element, len: usize) -> Self {
        Self {
            at,
            element,
            len,
            buffer: PhantomData,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.len * self.element.bytes()
    }
}

impl From<CudaView<'_>> for Arg {
    fn from(view: CudaView<'_>) -> Self {
        Arg::At(view.at)
    }
}

impl From<&CudaViewMut<'_>> for Arg {
    fn from(view: &CudaViewMut<'_>) -> Self {
        Arg::At(view.at)
    }
}
