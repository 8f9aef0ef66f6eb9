//! A GPU's memory: one pool that keeps what it once had.
//!
//! Allocation and release have streams of their own, so that who allocates waits for nobody's work: a release passes behind both lanes, and what it
//! gives back is used again once it has passed. It must not know what lies in the memory.

#![allow(unsafe_code, reason = "the pool is a handle of the driver's")]

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};

use super::driver::{Address, DeviceError, failed};
use super::recorder::{Recorder, Turn};

use sys::CUmemPool_attribute as Attribute;

/// What a stream is waited for with.
type Streams<'a> = [&'a CudaStream; 2];

#[derive(Debug)]
pub(super) struct GpuMemory {
    context: Arc<CudaContext>,
    pool: sys::CUmemoryPool,
    allocations: Arc<CudaStream>,
    releases: Mutex<Releases>,
}

#[derive(Debug)]
struct Releases {
    stream: Arc<CudaStream>,
    /// One for each lane.
    passed: [CudaEvent; 2],
    /// What waits for the end of a recording: an event on the main lane would become a part of it.
    later: Vec<Address>,
}

// SAFETY: the pool belongs to the device, and the driver may be called from any thread.
unsafe impl Send for GpuMemory {}
// SAFETY: as above.
unsafe impl Sync for GpuMemory {}

// === impl GpuMemory ===

impl GpuMemory {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self, DeviceError> {
        // SAFETY: the device is the context's.
        let pool = unsafe { result::device::get_default_mem_pool(context.cu_device()) };
        let stream = || context.new_stream().map_err(failed("cuStreamCreate"));
        let event = || context.new_event(None).map_err(failed("cuEventCreate"));
        let memory = GpuMemory {
            context: Arc::clone(context),
            pool: pool.map_err(failed("cuDeviceGetDefaultMemPool"))?,
            allocations: stream()?,
            releases: Mutex::new(Releases {
                stream: stream()?,
                passed: [event()?, event()?],
                later: Vec::new(),
            }),
        };
        let mut everything = u64::MAX;
        memory.set(
            Attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            &mut everything,
        )?;
        // Otherwise an allocation could wait for a release, and with it for the main lane, while other memory is free.
        let mut never: c_int = 0;
        memory.set(
            Attribute::CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES,
            &mut never,
        )?;
        Ok(memory)
    }

    /// What the device has free, and what the pool keeps unused.
    pub(super) fn free_bytes(&self) -> Result<usize, DeviceError> {
        let (free, _) = self
            .context
            .mem_get_info()
            .map_err(failed("cuMemGetInfo"))?;
        let reserved = self.amount(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let used = self.amount(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok(free + reserved.saturating_sub(used))
    }

    pub(super) fn allocate(&self, bytes: usize) -> Result<Address, DeviceError> {
        let full = |error: &DriverError| error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        let at = match self.take(bytes) {
            Err(error) if full(&error) => {
                self.gather()?;
                self.take(bytes)
            }
            taken => taken,
        };
        match at {
            Err(error) if full(&error) => Err(DeviceError::OutOfMemory {
                asked: bytes,
                free: self.free_bytes()?,
            }),
            at => at.map_err(failed("cuMemAllocFromPoolAsync")),
        }
    }

    /// Memory that is valid for every stream: the stream that allocates is waited for, and has no other work.
    fn take(&self, bytes: usize) -> Result<Address, DriverError> {
        let stream = &self.allocations;
        // SAFETY: pool and stream live as long as this value.
        let at = unsafe { result::mem_pool::alloc_async(self.pool, bytes, stream.cu_stream()) }?;
        stream.synchronize()?;
        Ok(Address(at))
    }

    /// Waits for all releases.
    pub(super) fn settle(&self) -> Result<(), DeviceError> {
        let stream = Arc::clone(&self.releases().stream);
        stream.synchronize().map_err(failed("cuStreamSynchronize"))
    }

    /// Waits for all releases and gives the device back what the pool has unused, in pieces that did not fit.
    fn gather(&self) -> Result<(), DeviceError> {
        self.settle()?;
        // SAFETY: the pool is the device's own.
        unsafe { result::mem_pool::trim_to(self.pool, 0) }.map_err(failed("cuMemPoolTrimTo"))
    }

    pub(super) fn free(
        &self,
        at: Address,
        recorder: &Recorder,
        lanes: Streams<'_>,
    ) -> Result<(), DeviceError> {
        let mut releases = self.releases();
        releases.later.push(at);
        if recorder.busy() {
            return Ok(());
        }
        releases.go(lanes)
    }

    /// Begins a recording: from now on nothing is queued behind the lanes.
    pub(super) fn begin<'a>(&self, recorder: &'a Recorder) -> Result<Turn<'a>, DeviceError> {
        let _still = self.releases();
        recorder.begin()
    }

    /// Ends a recording.
    pub(super) fn end(&self, turn: Turn<'_>, lanes: Streams<'_>) -> Result<(), DeviceError> {
        let mut releases = self.releases();
        drop(turn);
        releases.go(lanes)
    }

    fn releases(&self) -> MutexGuard<'_, Releases> {
        self.releases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set<T>(&self, attribute: Attribute, value: &mut T) -> Result<(), DeviceError> {
        let value: *mut c_void = ptr::from_mut(value).cast();
        // SAFETY: the value has the type that the attribute has: `new` is the only caller.
        unsafe { result::mem_pool::set_attribute(self.pool, attribute, value) }
            .map_err(failed("cuMemPoolSetAttribute"))
    }

    fn amount(&self, attribute: Attribute) -> Result<usize, DeviceError> {
        let mut value = 0u64;
        // SAFETY: amounts of memory are 64 bits wide.
        unsafe {
            result::mem_pool::get_attribute(self.pool, attribute, ptr::from_mut(&mut value).cast())
        }
        .map_err(failed("cuMemPoolGetAttribute"))?;
        Ok(value as usize)
    }
}

// === impl Releases ===

impl Releases {
    /// Queues what there is behind the work that the lanes have now.
    fn go(&mut self, lanes: Streams<'_>) -> Result<(), DeviceError> {
        if self.later.is_empty() {
            return Ok(());
        }
        for (event, lane) in self.passed.iter().zip(lanes) {
            event.record(lane).map_err(failed("cuEventRecord"))?;
            self.stream
                .wait(event)
                .map_err(failed("cuStreamWaitEvent"))?;
        }
        for at in self.later.drain(..) {
            // SAFETY: the address came from `allocate`, its owner gave it up, and the stream waits for all work that may use it.
            unsafe { result::free_async(at.0, self.stream.cu_stream()) }
                .map_err(failed("cuMemFreeAsync"))?;
        }
        Ok(())
    }
}
