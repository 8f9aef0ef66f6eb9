//! One lane of a GPU: a stream, and the pinned memory through which bytes reach it and leave it.
//!
//! The device copies only from and to pinned memory while the processor goes on, so everything passes through some of it. Uploads go round a ring and
//! wait only where it meets bytes that are still on their way. It must not know what the bytes are.

#![allow(
    unsafe_code,
    reason = "the device copies to and from memory behind pointers"
)]

use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};

use super::driver::{Address, DeviceError, failed};

/// An upload's ring is cut in parts: a part is used again when everything in it has arrived.
const UPLOAD_PART: usize = 4 << 20;
const UPLOAD_PARTS: usize = 4;
/// Downloads alternate between two parts, so that one is emptied while the other is filled.
const DOWNLOAD_PART: usize = 1 << 20;
const DOWNLOAD_PARTS: usize = 2;
/// Uploads begin at multiples of this.
const LINE: usize = 64;

#[derive(Debug)]
pub(super) struct GpuLane {
    pub(super) stream: Arc<CudaStream>,
    uploads: Mutex<Uploads>,
    downloads: Mutex<Pinned>,
    /// The kernel launched last: what fails is told about long after its launch.
    last: Mutex<String>,
}

/// Memory of the processor that the device can reach, in parts with an event each.
#[derive(Debug)]
struct Pinned {
    at: *mut u8,
    part: usize,
    passed: Vec<CudaEvent>,
    context: Arc<CudaContext>,
}

#[derive(Debug)]
struct Uploads {
    ring: Pinned,
    /// The part that is being filled, and how far.
    part: usize,
    filled: usize,
}

// SAFETY: the memory belongs to the value alone, and the driver may be called from any thread.
unsafe impl Send for Pinned {}

// === impl GpuLane ===

impl GpuLane {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self, DeviceError> {
        let ring = Pinned::new(context, UPLOAD_PART, UPLOAD_PARTS)?;
        let downloads = Pinned::new(context, DOWNLOAD_PART, DOWNLOAD_PARTS)?;
        Ok(GpuLane {
            stream: context.new_stream().map_err(failed("cuStreamCreate"))?,
            uploads: Mutex::new(Uploads {
                ring,
                part: 0,
                filled: 0,
            }),
            downloads: Mutex::new(downloads),
            last: Mutex::default(),
        })
    }

    pub(super) fn upload(&self, from: &[u8], to: Address) -> Result<(), DeviceError> {
        let mut uploads = self.uploads.lock().unwrap_or_else(PoisonError::into_inner);
        let mut done = 0;
        while done < from.len() {
            let to = to.plus(done);
            done += uploads.push(&from[done..], to, &self.stream)?;
        }
        Ok(())
    }

    pub(super) fn download(&self, from: Address, to: &mut [u8]) -> Result<(), DeviceError> {
        let downloads = self
            .downloads
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut before: Option<(usize, &mut [u8])> = None;
        for (index, bytes) in to.chunks_mut(downloads.part).enumerate() {
            let part = index % DOWNLOAD_PARTS;
            let from = from.plus(index * downloads.part);
            downloads.fetch(part, from, bytes.len(), &self.stream)?;
            if let Some((part, bytes)) = before.replace((part, bytes)) {
                let delivered = downloads.deliver(part, bytes);
                delivered.map_err(|error| self.after(error))?;
            }
        }
        before
            .map_or(Ok(()), |(part, bytes)| downloads.deliver(part, bytes))
            .map_err(|error| self.after(error))
    }

    pub(super) fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: the stream lives, and callers give ranges of memory that stays allocated until the work is done.
        unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, self.stream.cu_stream()) }
            .map_err(failed("cuMemcpyDtoDAsync"))
    }

    pub(super) fn zero(&self, at: Address, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: as for `copy`.
        unsafe { result::memset_d8_async(at.0, 0, bytes, self.stream.cu_stream()) }
            .map_err(failed("cuMemsetD8Async"))
    }

    pub(super) fn wait(&self) -> Result<(), DeviceError> {
        self.stream
            .synchronize()
            .map_err(failed("cuStreamSynchronize"))
            .map_err(|error| self.after(error))
    }

    pub(super) fn launched(&self, kernel: &str) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.clear();
        last.push_str(kernel);
    }

    /// The error, and after which kernel it was found.
    fn after(&self, error: DeviceError) -> DeviceError {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match error {
            DeviceError::Failed { call, reason } if !last.is_empty() => {
                failed(call)(format!("{reason}; the last kernel launched was {last}"))
            }
            other => other,
        }
    }
}

// === impl Uploads ===

impl Uploads {
    /// Sends as much as fits into the part; returns how much.
    fn push(
        &mut self,
        from: &[u8],
        to: Address,
        stream: &CudaStream,
    ) -> Result<usize, DeviceError> {
        if self.filled >= self.ring.part {
            self.turn(stream)?;
        }
        let bytes = from.len().min(self.ring.part - self.filled);
        let at = self.ring.place(self.part, self.filled);
        self.filled += bytes.next_multiple_of(LINE);
        // SAFETY: the place lies in the ring with `bytes` after it, and no copy reads there: `turn` waited for those that did.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), at, bytes) };
        // SAFETY: as for `GpuLane::copy`; the ring outlives the copy, for the lanes are waited for before anything of a GPU is dropped.
        unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, at.cast(), bytes, stream.cu_stream()) }
            .result()
            .map_err(failed("cuMemcpyHtoDAsync"))?;
        Ok(bytes)
    }

    /// Goes to the next part and waits until what was in it has arrived.
    fn turn(&mut self, stream: &CudaStream) -> Result<(), DeviceError> {
        self.ring.mark(self.part, stream)?;
        self.part = (self.part + 1) % UPLOAD_PARTS;
        self.ring.wait(self.part)?;
        self.filled = 0;
        Ok(())
    }
}

// === impl Pinned ===

impl Pinned {
    fn new(context: &Arc<CudaContext>, part: usize, parts: usize) -> Result<Self, DeviceError> {
        let passed = (0..parts).map(|_| context.new_event(None));
        let passed: Result<Vec<_>, DriverError> = passed.collect();
        let passed = passed.map_err(failed("cuEventCreate"))?;
        // SAFETY: the context is bound; the memory is given back once, on drop.
        let at = unsafe { result::malloc_host(part * parts, 0) };
        Ok(Pinned {
            at: at.map_err(failed("cuMemHostAlloc"))?.cast(),
            part,
            passed,
            context: Arc::clone(context),
        })
    }

    /// Byte `byte` of part `part`.
    fn place(&self, part: usize, byte: usize) -> *mut u8 {
        self.at.wrapping_add(part * self.part + byte)
    }

    /// Lets the part's event pass once the stream's work until here is done.
    fn mark(&self, part: usize, stream: &CudaStream) -> Result<(), DeviceError> {
        self.passed[part]
            .record(stream)
            .map_err(failed("cuEventRecord"))
    }

    fn wait(&self, part: usize) -> Result<(), DeviceError> {
        self.passed[part]
            .synchronize()
            .map_err(failed("cuEventSynchronize"))
    }

    /// Begins to bring bytes into a part.
    fn fetch(
        &self,
        part: usize,
        from: Address,
        bytes: usize,
        stream: &CudaStream,
    ) -> Result<(), DeviceError> {
        let at: *mut c_void = self.place(part, 0).cast();
        // SAFETY: the part holds `bytes`; copies into it follow each other on the stream, and it is read after its event only. The ring outlives the
        // copy, as for uploads.
        unsafe { sys::cuMemcpyDtoHAsync_v2(at, from.0, bytes, stream.cu_stream()) }
            .result()
            .map_err(failed("cuMemcpyDtoHAsync"))?;
        self.mark(part, stream)
    }

    /// Waits for a part and copies it out.
    fn deliver(&self, part: usize, to: &mut [u8]) -> Result<(), DeviceError> {
        self.wait(part)?;
        // SAFETY: the part holds these bytes, and the copy that wrote them is done.
        unsafe { ptr::copy_nonoverlapping(self.place(part, 0), to.as_mut_ptr(), to.len()) };
        Ok(())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the memory came from `malloc_host`, and no copy is under way when a GPU is dropped. An error would leave nothing to do.
            let _ = unsafe { result::free_host(self.at.cast()) };
        }
    }
}
