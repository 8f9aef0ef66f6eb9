//! Where the base lives: `--device`, and what must fit there.
//!
//! Knows devices and bytes; nothing of requests. The plan is made before a weight is read, printed, and obeyed: whoever takes
//! memory later has a budget of it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use espalier_adapters::ops::cuda::driver::{DeviceError, Element};
use espalier_adapters::ops::cuda::{Cuda, FATBIN, Gpu};
use espalier_adapters::ops::{Backend, Ops, WeightKind};

use crate::config::{BLOCK_SIZE, EngineConfig};
use crate::model::weights::Slot;
use crate::model::{Dtype, ModelConfig};

/// What `--device` chooses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU if there is one that the kernels run on, else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A GPU, by number.
    Cuda(usize),
}

/// A name that is no device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no device; auto, cpu, cuda and cuda:N are")]
pub struct UnknownDevice(String);

/// Why the device that was asked for is not there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device {choice}: {error}; choose --device cpu, or auto to take a GPU where there is one")]
pub struct NoDevice {
    choice: DeviceChoice,
    error: DeviceError,
}

/// What does not fit the device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the plan does not fit the device: {plan}; lower kv_cache_bytes, adapter_cache_bytes, merged_bytes or \
     training_activation_bytes, or choose --dtype q8"
)]
pub struct NoRoom {
    plan: Box<MemoryPlan>,
}

/// Bytes of a device and who may take them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Free before anything was loaded.
    pub free: usize,
    /// The base's weights.
    pub base: usize,
    /// Keys and values.
    pub kv: usize,
    /// Adapters.
    pub adapters: usize,
    /// Merged copies.
    pub merged: usize,
    /// Training jobs: activations, logits, optimizers.
    pub training: usize,
    /// Buffers of a step.
    pub workspace: usize,
}

/// Share of the free memory that the plan leaves to the driver, the allocator's gaps and the libraries' workspaces.
const SPARE: f64 = 0.05;

/// What training may save of a micro-batch where nothing is configured: a processor's, and a device's share.
const HOST_ACTIVATIONS: usize = 512 << 20;
const DEVICE_ACTIVATIONS_SHARE: f64 = 0.1;
/// Keys and values on a processor where nothing is configured.
const HOST_KV: usize = 512 << 20;

// === impl DeviceChoice ===

impl FromStr for DeviceChoice {
    type Err = UnknownDevice;

    fn from_str(text: &str) -> Result<Self, UnknownDevice> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            other => other
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| UnknownDevice(other.to_owned())),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(0) => f.write_str("cuda"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// Opens the device, and says in which format the base is kept: as asked, else f32 on a processor and bf16 on a GPU.
///
/// # Errors
/// [`NoDevice`] when a GPU was asked for by name and there is none, or no kernels for it in this binary.
pub fn open(
    choice: DeviceChoice,
    dtype: Option<Dtype>,
    deterministic: bool,
) -> Result<(Backend, Dtype), NoDevice> {
    let number = match choice {
        DeviceChoice::Cpu => None,
        DeviceChoice::Auto => Some(0),
        DeviceChoice::Cuda(number) => Some(number),
    };
    let opened = number.map(|number| on_gpu(number, dtype.unwrap_or(Dtype::Bf16), deterministic));
    match opened {
        Some(Ok(cuda)) => Ok((Backend::Cuda(cuda), dtype.unwrap_or(Dtype::Bf16))),
        Some(Err(error)) if choice != DeviceChoice::Auto => Err(NoDevice { choice, error }),
        found => {
            if let Some(Err(error)) = found {
                tracing::info!(%error, "serving on the processor");
            }
            Ok((Backend::default(), dtype.unwrap_or(Dtype::F32)))
        }
    }
}

fn on_gpu(number: usize, dtype: Dtype, deterministic: bool) -> Result<Cuda, DeviceError> {
    let gpu = Gpu::open(number, FATBIN)?;
    Cuda::new(Arc::new(gpu), element(dtype), deterministic)
}

/// What activations are made of beside weights of a format.
fn element(dtype: Dtype) -> Element {
    match dtype {
        Dtype::F32 => Element::F32,
        Dtype::F16 => Element::F16,
        Dtype::Bf16 | Dtype::Q8 | Dtype::Stored => Element::Bf16,
    }
}

/// The device in a line: for the start's report.
pub fn about(ops: &Backend) -> String {
    match ops {
        Backend::Cpu(cpu) => format!("cpu ({})", cpu.path()),
        Backend::Cuda(cuda) => {
            let info = cuda.info();
            format!(
                "{} ({:.1} GiB, compute {}.{}, CUDA {})",
                info.name,
                gib(info.total_bytes),
                info.compute.0,
                info.compute.1,
                info.driver
            )
        }
    }
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Fills in what was left open (`kv_blocks` and `training_activation_bytes` of 0), and checks that all of it fits the device. A
/// processor's memory is the operator's business: no plan.
///
/// # Errors
/// [`NoRoom`] with the plan.
pub fn plan(
    ops: &Backend,
    dtype: Dtype,
    model: &ModelConfig,
    config: &mut EngineConfig,
) -> Result<Option<MemoryPlan>, NoRoom> {
    let block = block_bytes(ops, model);
    let Backend::Cuda(cuda) = ops else {
        if config.training_activation_bytes == 0 {
            config.training_activation_bytes = HOST_ACTIVATIONS;
        }
        if config.kv_blocks == 0 {
            config.kv_blocks = (HOST_KV / block.max(1)).max(1);
        }
        return Ok(None);
    };
    let free = cuda.free_bytes().unwrap_or(0);
    if config.training_activation_bytes == 0 {
        config.training_activation_bytes = (free as f64 * DEVICE_ACTIVATIONS_SHARE) as usize;
    }
    let mut plan = MemoryPlan {
        free,
        base: base_bytes(dtype, model),
        kv: config.kv_blocks * block,
        adapters: config.adapter_bytes,
        merged: config.merged_bytes,
        training: training_bytes(ops, model, config),
        workspace: workspace_bytes(ops, model, config),
    };
    let usable = (free as f64 * (1.0 - SPARE)) as usize;
    if config.kv_blocks == 0 {
        config.kv_blocks = usable.saturating_sub(plan.taken()) / block.max(1);
        plan.kv = config.kv_blocks * block;
    }
    if config.kv_blocks == 0 || plan.taken() > usable {
        return Err(NoRoom {
            plan: Box::new(plan),
        });
    }
    Ok(Some(plan))
}

/// Bytes of one block of keys and values, over all layers.
pub fn block_bytes(ops: &Backend, model: &ModelConfig) -> usize {
    2 * model.layers * BLOCK_SIZE * model.kv_width() * ops.working_bytes()
}

fn base_bytes(dtype: Dtype, model: &ModelConfig) -> usize {
    let numbers: usize = Slot::all(model)
        .into_iter()
        .map(|slot| slot.shape(model).iter().product::<usize>())
        .sum();
    let angles = model.context_length * model.head_dim * size_of::<f32>();
    angles
        + match dtype {
            Dtype::F32 => 4 * numbers,
            Dtype::Q8 => numbers * WeightKind::Q8_0.block_bytes() / espalier_adapters::ops::BLOCK,
            Dtype::Bf16 | Dtype::F16 | Dtype::Stored => 2 * numbers,
        }
}

/// Widths of all buffers that a row of a step or a micro-batch passes through.
fn row_widths(model: &ModelConfig) -> usize {
    4 * model.hidden + 5 * model.q_width() + 5 * model.kv_width() + 5 * model.intermediate
}

fn workspace_bytes(ops: &Backend, model: &ModelConfig, config: &EngineConfig) -> usize {
    let rows = config.max_num_batched_tokens * row_widths(model) * ops.working_bytes();
    let logits = config.max_num_seqs * model.vocab * size_of::<f32>();
    let splits = config.max_sequence_tokens.div_ceil(128).next_power_of_two();
    let parts = config.max_num_seqs * model.heads * splits * (model.head_dim + 2);
    rows + logits + parts * size_of::<f32>()
}

/// Of all jobs at once: saved activations, the buffers beside them, logits, and adapters with gradients and moments.
fn training_bytes(ops: &Backend, model: &ModelConfig, config: &EngineConfig) -> usize {
    let saved = config.training_activation_bytes;
    let row = 2
        * model.layers
        * (model.hidden + model.q_width() + model.kv_width() + model.intermediate)
        * ops.working_bytes();
    let rows = saved / row.max(1);
    let buffers = rows * row_widths(model) * ops.working_bytes();
    let logits = ops.loss_rows() * model.vocab * (size_of::<f32>() + ops.working_bytes());
    config.max_training_jobs * (saved + buffers + logits)
}

// === impl MemoryPlan ===

impl MemoryPlan {
    /// Bytes that are spoken for.
    pub fn taken(&self) -> usize {
        self.base + self.kv + self.adapters + self.merged + self.training + self.workspace
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.1} GiB free; base {:.1}, keys and values {:.1}, adapters {:.1}, merged {:.1}, training {:.1}, workspace {:.1}",
            gib(self.free),
            gib(self.base),
            gib(self.kv),
            gib(self.adapters),
            gib(self.merged),
            gib(self.training),
            gib(self.workspace)
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn names_go_both_ways() {
        for name in ["auto", "cpu", "cuda", "cuda:3"] {
            let choice: DeviceChoice = name.parse().unwrap();
            assert_eq!(choice.to_string(), name);
        }
        let error = "gpu".parse::<DeviceChoice>().unwrap_err();
        assert!(error.to_string().contains("cuda:N"), "{error}");
    }

    #[test]
    fn without_a_gpu_auto_is_the_processor_and_cuda_says_why_not() {
        if Gpu::open(0, FATBIN).is_ok() {
            return;
        }
        let (ops, dtype) = open(DeviceChoice::Auto, None, false).unwrap();
        assert!(matches!(ops, Backend::Cpu(_)));
        assert_eq!(dtype, Dtype::F32);
        let error = open(DeviceChoice::Cuda(0), None, false).unwrap_err();
        assert!(error.to_string().contains("--device cpu"), "{error}");
    }
}
