//! An NVIDIA GPU: one device, two lanes, one module of kernels.
//!
//! The driver's library is looked for when a GPU is opened, so that one binary runs with and without it. The parts stand beside: lanes, memory, kernels,
//! graphs, the vendor's products. It must not know what a kernel computes.

#![allow(unsafe_code, reason = "the driver's library is loaded and asked")]

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DriverError, sys};

use super::driver::{
    Address, DeviceError, DeviceInfo, Driver, Lane, Launch, Recording, VendorProduct, failed,
};
use super::gpu_graph::{Capture, Graph};
use super::gpu_kernels::GpuKernels;
use super::gpu_lane::GpuLane;
use super::gpu_memory::GpuMemory;
use super::gpu_vendor::GpuVendor;
use super::recorder::Recorder;

use sys::CUdevice_attribute as Attribute;

/// The kernels are compiled for this and whatever came after it.
const LEAST_COMPUTE: (i32, i32) = (8, 0);
/// The version of CUDA that has everything which is called here, as the driver counts.
const LEAST_CUDA: i32 = 12_040;

/// An open GPU. What it allocated and recorded must be gone before it is dropped.
#[derive(Debug)]
pub struct Gpu {
    info: DeviceInfo,
    main: GpuLane,
    side: GpuLane,
    kernels: GpuKernels,
    vendor: GpuVendor,
    memory: GpuMemory,
    recorder: Recorder,
    context: Arc<CudaContext>,
}

// === impl Gpu ===

impl Gpu {
    /// Opens device `ordinal` with the kernels of a fat binary.
    ///
    /// # Errors
    /// [`DeviceError::NoKernels`] if there is nothing in it, [`DeviceError::NoDevice`] with the next step, or what the driver says.
    pub fn open(ordinal: usize, fatbin: &[u8]) -> Result<Self, DeviceError> {
        if fatbin.is_empty() {
            return Err(DeviceError::NoKernels);
        }
        let context = context(ordinal)?;
        let info = info(&context).map_err(failed("cuDeviceGetAttribute"))?;
        if info.compute < LEAST_COMPUTE {
            let ((major, minor), name) = (info.compute, &info.name);
            return Err(no_device(format!(
                "{name} has compute capability {major}.{minor}, the kernels need 8.0"
            )));
        }
        Ok(Gpu {
            info,
            main: GpuLane::new(&context)?,
            side: GpuLane::new(&context)?,
            kernels: GpuKernels::new(&context, fatbin)?,
            vendor: GpuVendor::default(),
            memory: GpuMemory::new(&context)?,
            recorder: Recorder::default(),
            context,
        })
    }

    fn lane(&self, lane: Lane) -> &GpuLane {
        match lane {
            Lane::Main => &self.main,
            Lane::Side => &self.side,
        }
    }

    fn streams(&self) -> [&CudaStream; 2] {
        [&self.main.stream, &self.side.stream]
    }

    /// Lets this thread speak to the device.
    fn bind(&self) -> Result<(), DeviceError> {
        self.context
            .bind_to_thread()
            .map_err(failed("cuCtxSetCurrent"))
    }

    /// What `run` sends to the main lane.
    fn capture(
        &self,
        run: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<Graph, DeviceError> {
        let capture = Capture::begin(&self.main.stream)?;
        run()?;
        let graph = capture.end()?;
        graph.upload(&self.main.stream)?;
        Ok(graph)
    }
}

impl Driver for Gpu {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&self) -> Result<usize, DeviceError> {
        self.bind()?;
        self.memory.free_bytes()
    }

    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError> {
        self.recorder.refuse("allocate")?;
        if bytes == 0 {
            return Ok(Address::NULL);
        }
        self.bind()?;
        self.memory.allocate(bytes)
    }

    fn free(&self, at: Address, _bytes: usize) {
        if at != Address::NULL && self.bind().is_ok() {
            // Whoever gives memory back cannot do anything about an error; the next call that waits meets it again.
            let _ = self.memory.free(at, &self.recorder, self.streams());
        }
    }

    fn upload(&self, lane: Lane, from: &[u8], to: Address) -> Result<(), DeviceError> {
        self.recorder.refuse_on("upload", lane)?;
        self.bind()?;
        self.lane(lane).upload(from, to)
    }

    fn download(&self, lane: Lane, from: Address, to: &mut [u8]) -> Result<(), DeviceError> {
        self.recorder.refuse_on("download", lane)?;
        self.bind()?;
        self.lane(lane).download(from, to)
    }

    fn copy(
        &self,
        lane: Lane,
        from: Address,
        to: Address,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        self.recorder.takes("copy", lane)?;
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        self.lane(lane).copy(from, to, bytes)
    }

    fn zero(&self, lane: Lane, at: Address, bytes: usize) -> Result<(), DeviceError> {
        self.recorder.takes("zero", lane)?;
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        self.lane(lane).zero(at, bytes)
    }

    fn launch(&self, lane: Lane, launch: &Launch<'_>) -> Result<(), DeviceError> {
        self.recorder.takes("launch", lane)?;
        self.bind()?;
        let lane = self.lane(lane);
        self.kernels.launch(&lane.stream, launch)?;
        lane.launched(launch.kernel);
        Ok(())
    }

    fn wait(&self, lane: Lane) -> Result<(), DeviceError> {
        self.recorder.refuse_on("wait", lane)?;
        self.bind()?;
        self.lane(lane).wait()
    }

    fn record(
        &self,
        run: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<Recording, DeviceError> {
        self.bind()?;
        let turn = self.memory.begin(&self.recorder)?;
        let graph = self.capture(run);
        let ended = self.memory.end(turn, self.streams());
        let recording = Recording::new(graph?);
        ended.map(|()| recording)
    }

    fn replay(&self, recording: &Recording) -> Result<(), DeviceError> {
        self.recorder.refuse_on("replay", Lane::Main)?;
        self.bind()?;
        recording.work::<Graph>()?.launch(&self.main.stream)
    }

    fn product(&self, lane: Lane, product: &VendorProduct) -> Result<bool, DeviceError> {
        self.recorder.takes("product", lane)?;
        self.bind()?;
        let stream = &self.lane(lane).stream;
        self.vendor
            .product(lane, stream, &self.memory, &self.recorder, product)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        // The parts are dropped after this, when nothing of theirs is under way.
        let waited = self.main.wait().and(self.side.wait());
        for (workspace, bytes) in self.vendor.close() {
            self.free(workspace, bytes);
        }
        // A device that failed has nothing under way either, and nobody is left to be told.
        let _ = waited.and(self.memory.settle());
    }
}

/// The device's own context, which all who use the device in this process share.
fn context(ordinal: usize) -> Result<Arc<CudaContext>, DeviceError> {
    // SAFETY: the library is the driver's; loading it runs its initialisers.
    if !unsafe { sys::is_culib_present() } {
        return Err(no_device(
            "the driver's library libcuda.so.1 cannot be loaded: install NVIDIA's driver, or start the container with its GPUs (--gpus all)",
        ));
    }
    let context = CudaContext::new(ordinal).map_err(|error| {
        no_device(format!(
            "device {ordinal} cannot be opened: {error}; see what nvidia-smi and CUDA_VISIBLE_DEVICES say"
        ))
    })?;
    let version = version().map_err(failed("cuDriverGetVersion"))?;
    if version < LEAST_CUDA {
        let (found, needed) = (named(version), named(LEAST_CUDA));
        return Err(no_device(format!(
            "the driver knows {found}, {needed} is needed: update NVIDIA's driver"
        )));
    }
    if !context.has_async_alloc() {
        return Err(no_device(format!(
            "device {ordinal} has no memory pools: a virtual GPU may have to be configured for them"
        )));
    }
    Ok(context)
}

/// The version of CUDA that the driver knows.
fn version() -> Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: the place outlives the call.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(version)
}

fn named(version: i32) -> String {
    format!("CUDA {}.{}", version / 1000, version % 1000 / 10)
}

fn info(context: &CudaContext) -> Result<DeviceInfo, DriverError> {
    let multiprocessors = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    Ok(DeviceInfo {
        name: context.name()?,
        driver: named(version()?),
        compute: context.compute_capability()?,
        total_bytes: context.total_mem()?,
        multiprocessors: multiprocessors.unsigned_abs() as usize,
    })
}

fn no_device(reason: impl Into<String>) -> DeviceError {
    DeviceError::NoDevice {
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binary_without_kernels_says_how_to_build_them() {
        let error = Gpu::open(0, &[]).unwrap_err();
        assert_eq!(error, DeviceError::NoKernels);
        assert!(error.to_string().contains("scripts/build-cuda.sh"));
    }

    #[test]
    fn without_a_gpu_the_error_says_what_to_do() {
        // A machine that has one refuses these kernels instead.
        match Gpu::open(0, b"no kernels at all") {
            Err(DeviceError::NoDevice { reason }) => {
                let steps = ["NVIDIA's driver", "nvidia-smi", "compute", "pools"];
                assert!(steps.iter().any(|step| reason.contains(step)), "{reason}");
            }
            Err(DeviceError::Failed { call, .. }) => assert_eq!(call, "cuModuleLoadData"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_device_that_no_machine_has_is_an_error() {
        let error = Gpu::open(4096, b"no kernels at all").unwrap_err();
        assert!(matches!(error, DeviceError::NoDevice { .. }), "{error}");
    }
}
