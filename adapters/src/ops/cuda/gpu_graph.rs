//! A recording of a GPU: what a stream was given, as one graph.

#![allow(unsafe_code, reason = "graphs are handles of the driver's")]

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::driver::{DeviceError, failed};

/// A stream that records. Whatever happens, it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Capture<'a> {
    stream: &'a CudaStream,
    ended: bool,
}

#[derive(Debug)]
pub(super) struct Graph {
    context: Arc<CudaContext>,
    /// A graph's calls must follow each other.
    graph: Mutex<sys::CUgraphExec>,
}

// SAFETY: the graph belongs to the context, and the driver may be called from any thread.
unsafe impl Send for Graph {}
// SAFETY: as above; the handle is behind a lock.
unsafe impl Sync for Graph {}

// === impl Capture ===

impl<'a> Capture<'a> {
    /// Other threads may allocate and wait meanwhile: only this one is watched.
    pub(super) fn begin(stream: &'a CudaStream) -> Result<Self, DeviceError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream
            .begin_capture(mode)
            .map_err(failed("cuStreamBeginCapture"))?;
        Ok(Capture {
            stream,
            ended: false,
        })
    }

    pub(super) fn end(mut self) -> Result<Graph, DeviceError> {
        let recorded = self.stop().map_err(failed("cuStreamEndCapture"))?;
        // SAFETY: the graph was recorded just now.
        let graph =
            unsafe { result::graph::instantiate(recorded, sys::CUgraphInstantiate_flags(0)) };
        discard(recorded);
        Ok(Graph {
            context: Arc::clone(self.stream.context()),
            graph: Mutex::new(graph.map_err(failed("cuGraphInstantiate"))?),
        })
    }

    fn stop(&mut self) -> Result<sys::CUgraph, DriverError> {
        self.ended = true;
        // SAFETY: the stream lives; a capture that broke ends here too.
        let recorded = unsafe { result::stream::end_capture(self.stream.cu_stream()) }?;
        if recorded.is_null() {
            return Err(DriverError(
                sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
            ));
        }
        Ok(recorded)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if !self.ended
            && let Ok(recorded) = self.stop()
        {
            discard(recorded);
        }
    }
}

fn discard(recorded: sys::CUgraph) {
    // SAFETY: the graph is used nowhere else; what was made from it is its own. An error would leave nothing to do.
    let _ = unsafe { result::graph::destroy(recorded) };
}

// === impl Graph ===

impl Graph {
    /// Brings the graph to the device, so that its first run need not.
    pub(super) fn upload(&self, stream: &CudaStream) -> Result<(), DeviceError> {
        let graph = self.graph.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: graph and stream live.
        unsafe { result::graph::upload(*graph, stream.cu_stream()) }
            .map_err(failed("cuGraphUpload"))
    }

    pub(super) fn launch(&self, stream: &CudaStream) -> Result<(), DeviceError> {
        let graph = self.graph.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: graph and stream live; runs of one graph follow each other on the stream.
        unsafe { result::graph::launch(*graph, stream.cu_stream()) }
            .map_err(failed("cuGraphLaunch"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let graph = *self.graph.get_mut().unwrap_or_else(PoisonError::into_inner);
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the handle is used nowhere else; a run that is under way ends first. An error would leave nothing to do.
            let _ = unsafe { result::graph::exec_destroy(graph) };
        }
    }
}
