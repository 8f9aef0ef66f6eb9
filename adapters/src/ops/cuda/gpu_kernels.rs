//! The kernels of a GPU's module: looked up once by name, launched with plain arguments.

#![allow(unsafe_code, reason = "a launch takes pointers to its arguments")]

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::driver::{DeviceError, Launch, MOST_ARGS, failed};

use sys::CUfunction_attribute as Attribute;

/// Shared memory, static and dynamic, that a kernel gets without asking.
const UNASKED: u32 = 48 << 10;

#[derive(Debug)]
pub(super) struct GpuKernels {
    context: Arc<CudaContext>,
    module: sys::CUmodule,
    known: Mutex<HashMap<String, Kernel>>,
}

#[derive(Clone, Copy, Debug)]
struct Kernel {
    function: sys::CUfunction,
    /// Dynamic shared memory that a launch may ask for as it stands.
    room: u32,
    /// How many arguments there are and the bytes of each, where the driver tells.
    sizes: Option<(usize, [u8; MOST_ARGS])>,
}

// SAFETY: modules and functions belong to the context, and the driver may be called from any thread.
unsafe impl Send for GpuKernels {}
// SAFETY: as above; the table is behind a lock.
unsafe impl Sync for GpuKernels {}

// === impl GpuKernels ===

impl GpuKernels {
    /// Loads a module. The driver picks the code for its device.
    pub(super) fn new(context: &Arc<CudaContext>, fatbin: &[u8]) -> Result<Self, DeviceError> {
        // Aligned as words are, and ended by a zero as text of PTX must be.
        let mut image = vec![0u64; fatbin.len() / 8 + 1];
        for (word, bytes) in image.iter_mut().zip(fatbin.chunks(8)) {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_ne_bytes(padded);
        }
        // SAFETY: the image is whole, and the driver copies what it needs.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
        let advice =
            "if the kernels were built for a newer CUDA than the driver's, update the driver";
        let module =
            module.map_err(|error| failed("cuModuleLoadData")(format!("{error}; {advice}")))?;
        Ok(GpuKernels {
            context: Arc::clone(context),
            module,
            known: Mutex::new(HashMap::new()),
        })
    }

    pub(super) fn launch(
        &self,
        stream: &CudaStream,
        launch: &Launch<'_>,
    ) -> Result<(), DeviceError> {
        let kernel = self.kernel(launch)?;
        // The driver takes arguments without counting them.
        if let Some((count, sizes)) = &kernel.sizes {
            launch.fits(&sizes[..*count])?;
        }
        let mut values = launch.values()?;
        let mut pointers = [ptr::null_mut::<c_void>(); MOST_ARGS];
        for (pointer, value) in pointers.iter_mut().zip(&mut values) {
            *pointer = ptr::from_mut(value).cast();
        }
        let (grid, block) = (launch.grid.into(), (launch.block, 1, 1));
        let stream = stream.cu_stream();
        // SAFETY: there is a pointer for each argument, the values behind them outlive the call, which copies them, and their sizes were checked;
        // callers keep the memory that the arguments name.
        unsafe {
            result::launch_kernel(
                kernel.function,
                grid,
                block,
                launch.shared,
                stream,
                &mut pointers,
            )
        }
        .map_err(|error| launch.failed(error))
    }

    /// The kernel, with room for the shared memory that the launch asks for.
    fn kernel(&self, launch: &Launch<'_>) -> Result<Kernel, DeviceError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let kernel = match known.get_mut(launch.kernel) {
            Some(kernel) => kernel,
            None => known
                .entry(launch.kernel.to_owned())
                .or_insert(relaxed(|| self.find(launch))?),
        };
        if launch.shared > kernel.room {
            let wanted = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = launch.shared.cast_signed();
            // SAFETY: the function belongs to the module.
            unsafe { result::function::set_function_attribute(kernel.function, wanted, bytes) }
                .map_err(|error| launch.failed(error))?;
            kernel.room = launch.shared;
        }
        Ok(*kernel)
    }

    fn find(&self, launch: &Launch<'_>) -> Result<Kernel, DeviceError> {
        let missing = || DeviceError::NoKernel {
            name: launch.kernel.to_owned(),
        };
        let name = CString::new(launch.kernel).map_err(|_| missing())?;
        // SAFETY: the module is loaded for as long as this value lives.
        let function = unsafe { result::module::get_function(self.module, name) };
        let function = function.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_NOT_FOUND => missing(),
            _ => failed("cuModuleGetFunction")(error),
        })?;
        let fixed = Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        // SAFETY: the function belongs to the module.
        let fixed = unsafe { result::function::get_function_attribute(function, fixed) }
            .map_err(failed("cuFuncGetAttribute"))?;
        Ok(Kernel {
            function,
            room: UNASKED.saturating_sub(fixed.unsigned_abs()),
            sizes: sizes(function),
        })
    }
}

impl Drop for GpuKernels {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: nothing runs any more when a GPU is dropped. An error would leave nothing to do.
            let _ = unsafe { result::module::unload(self.module) };
        }
    }
}

/// The bytes of each argument, or nothing where the driver does not tell or there are more than a launch can have.
fn sizes(function: sys::CUfunction) -> Option<(usize, [u8; MOST_ARGS])> {
    let mut sizes = [0; MOST_ARGS];
    for count in 0..=MOST_ARGS {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: both places outlive the call.
        match unsafe { sys::cuFuncGetParamInfo(function, count, &mut offset, &mut size) }.result() {
            Ok(()) => *sizes.get_mut(count)? = u8::try_from(size).ok()?,
            Err(DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE)) => {
                return Some((count, sizes));
            }
            Err(_) => return None,
        }
    }
    None
}

/// Does what a thread may otherwise not do while it records: loading code can need memory.
fn relaxed<R>(f: impl FnOnce() -> R) -> R {
    let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: the place outlives the call, which puts the thread's own mode there. It cannot fail with a valid mode.
    let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) };
    let result = f();
    // SAFETY: as above; the thread has its own mode again.
    let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) };
    result
}
