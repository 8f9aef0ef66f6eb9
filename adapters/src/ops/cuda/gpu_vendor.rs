//! Products by the vendor's library, cuBLAS, where it is installed.
//!
//! It is as fast as the device, but chooses its order of additions by the number of rows: who promises the row rule does not come here.

#![allow(unsafe_code, reason = "the library takes pointers")]

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::cublas::{result, sys};
use cudarc::driver::CudaStream;

use super::driver::{Address, DeviceError, Element, Lane, ProductKind, VendorProduct, failed};
use super::gpu_memory::GpuMemory;
use super::recorder::Recorder;

/// What the library may use for itself: without it, it would allocate, which no recording can hold.
const WORKSPACE: usize = 32 << 20;

/// A handle for each lane, made when it is first needed.
#[derive(Debug, Default)]
pub(super) struct GpuVendor {
    present: OnceLock<bool>,
    lanes: [Mutex<Option<Handle>>; 2],
}

#[derive(Debug)]
struct Handle {
    handle: sys::cublasHandle_t,
    workspace: Address,
}

// SAFETY: a handle may be used from any thread, by one at a time: it is behind a lock.
unsafe impl Send for Handle {}

// === impl GpuVendor ===

impl GpuVendor {
    pub(super) fn product(
        &self,
        lane: Lane,
        stream: &CudaStream,
        memory: &GpuMemory,
        recorder: &Recorder,
        product: &VendorProduct,
    ) -> Result<bool, DeviceError> {
        let elements = product.to == product.from || product.to == Element::F32;
        if !elements || !*self.present.get_or_init(present) {
            return Ok(false);
        }
        let lane = &self.lanes[lane as usize];
        let mut handle = lane.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = match &mut *handle {
            Some(handle) => handle,
            empty => {
                recorder.refuse("the first product of a lane")?;
                empty.insert(Handle::new(stream, memory)?)
            }
        };
        handle.multiply(product).map(|()| true)
    }

    /// Ends the library; returns the memory that it had.
    pub(super) fn close(&mut self) -> Vec<(Address, usize)> {
        let handles = self.lanes.iter_mut().filter_map(|lane| {
            let handle = lane.get_mut().unwrap_or_else(PoisonError::into_inner);
            handle.take()
        });
        handles
            .map(|handle| (handle.workspace, WORKSPACE))
            .collect()
    }
}

fn present() -> bool {
    // SAFETY: the library is the vendor's; loading it runs its initialisers.
    unsafe { sys::is_culib_present() }
}

// === impl Handle ===

impl Handle {
    fn new(stream: &CudaStream, memory: &GpuMemory) -> Result<Self, DeviceError> {
        let workspace = memory.allocate(WORKSPACE)?;
        let handle = result::create_handle().map_err(failed("cublasCreate"))?;
        let handle = Handle { handle, workspace };
        let stream = stream.cu_stream().cast();
        // SAFETY: handle and stream live. The stream comes before the workspace, which a new stream would take away.
        unsafe { result::set_stream(handle.handle, stream) }.map_err(failed("cublasSetStream"))?;
        // SAFETY: the workspace is as long as it is said to be, aligned, and this handle's alone.
        unsafe { sys::cublasSetWorkspace_v2(handle.handle, workspace.0 as *mut c_void, WORKSPACE) }
            .result()
            .map_err(failed("cublasSetWorkspace"))?;
        // No TF32, and sums of parts in f32 too.
        let mode = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        // SAFETY: the handle lives.
        unsafe { sys::cublasSetMathMode(handle.handle, mode) }
            .result()
            .map_err(failed("cublasSetMathMode"))?;
        Ok(handle)
    }

    /// The library thinks in columns: a row-major matrix is its transpose there, so that `y^T = W x^T` forward and `y^T += W^T x^T` backward.
    fn multiply(&self, product: &VendorProduct) -> Result<(), DeviceError> {
        use sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
        let (from, to) = product.widths();
        let [rows, from, to, inputs] =
            [product.rows, from, to, product.inputs].map(c_int::try_from);
        let (Ok(rows), Ok(from), Ok(to), Ok(inputs)) = (rows, from, to, inputs) else {
            return Err(failed("cublasGemmEx")("a side of the product is too long"));
        };
        if rows == 0 {
            return Ok(());
        }
        let (turn, keep) = match product.kind {
            ProductKind::Forward => (CUBLAS_OP_T, 0.0f32),
            ProductKind::Backward => (CUBLAS_OP_N, 1.0f32),
        };
        // SAFETY: the leading dimensions are the widths of rows; callers give matrices of these shapes that stay allocated until the work is done; the
        // factors are f32, as sums are, and are read before the call returns.
        unsafe {
            result::gemm_ex(
                self.handle,
                turn,
                CUBLAS_OP_N,
                to,
                rows,
                from,
                ptr::from_ref(&1.0f32).cast(),
                product.w.0 as *const c_void,
                data(product.from),
                inputs,
                product.x.0 as *const c_void,
                data(product.from),
                from,
                ptr::from_ref(&keep).cast(),
                product.y.0 as *mut c_void,
                data(product.to),
                to,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(failed("cublasGemmEx"))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle is used nowhere else. An error would leave nothing to do.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn data(element: Element) -> sys::cudaDataType {
    match element {
        Element::F32 => sys::cudaDataType::CUDA_R_32F,
        Element::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        Element::F16 => sys::cudaDataType::CUDA_R_16F,
    }
}
