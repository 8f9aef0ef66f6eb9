//! The device as the operations see it: memory, queues of work, kernels by name.
//!
//! Two things stand behind it: a GPU, and the emulator that runs the same kernels on a processor. It must not know what a kernel computes.

use std::any::Any;
use std::fmt::{self, Debug, Display, Formatter};

/// The most arguments that a kernel takes.
pub const MOST_ARGS: usize = 24;

/// A place in the device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(pub u64);

/// Which queue of the device work goes to: work of one lane runs in order. A lane is used by one thread at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Steps and training.
    Main,
    /// Copies of adapters that arrive meanwhile.
    Side,
}

/// What a kernel takes: plain numbers and addresses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    /// A pointer; [`Address::NULL`] is one too.
    At(Address),
    /// An `int`.
    Int(i32),
    /// A `long long`.
    Long(i64),
    /// An `unsigned long long`.
    Unsigned(u64),
    /// A `float`.
    Float(f32),
}

/// One run of a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// Its name in the module.
    pub kernel: &'a str,
    /// Blocks in each direction, none of them 0.
    pub grid: [u32; 3],
    /// Threads in a block.
    pub block: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
    /// In the kernel's order, at most [`MOST_ARGS`].
    pub args: &'a [Arg],
}

/// What numbers are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// `float`.
    F32,
    /// `__nv_bfloat16`.
    Bf16,
    /// `__half`.
    F16,
}

/// Which product of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProductKind {
    /// `y = x W^T`: `x [rows, inputs]`, `y [rows, outputs]`.
    Forward,
    /// `y += x W`: `x [rows, outputs]` is a gradient, and so is `y [rows, inputs]`.
    Backward,
}

/// A product for the vendor's library, row-major, its sums in f32.
#[derive(Clone, Copy, Debug)]
pub struct VendorProduct {
    /// Which one.
    pub kind: ProductKind,
    /// The rows that are multiplied.
    pub x: Address,
    /// The weight `[outputs, inputs]`.
    pub w: Address,
    /// Where the product goes.
    pub y: Address,
    /// Rows of `x` and `y`.
    pub rows: usize,
    /// The weight's columns.
    pub inputs: usize,
    /// The weight's rows.
    pub outputs: usize,
    /// The elements of `x` and `w`.
    pub from: Element,
    /// The elements of `y`: those of `x`, or f32.
    pub to: Element,
}

/// What there is to say about a device.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// The version of CUDA that its driver knows.
    pub driver: String,
    /// Its compute capability.
    pub compute: (i32, i32),
    /// Its memory.
    pub total_bytes: usize,
    /// Its multiprocessors.
    pub multiprocessors: usize,
}

/// What a device can fail with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// There is no GPU, or none that the kernels run on.
    #[error("no usable GPU: {reason}")]
    NoDevice {
        /// Why, and what to do about it.
        reason: String,
    },
    /// The device's memory is full.
    #[error("{asked} bytes of device memory were asked for, {free} are free")]
    OutOfMemory {
        /// Bytes asked for.
        asked: usize,
        /// Bytes that were free.
        free: usize,
    },
    /// A call failed.
    #[error("{call}: {reason}")]
    Failed {
        /// The call.
        call: &'static str,
        /// Why.
        reason: String,
    },
    /// The module lacks a kernel.
    #[error("the device's module has no kernel {name}")]
    NoKernel {
        /// Its name.
        name: String,
    },
    /// The binary was built without kernels.
    #[error("this binary has no GPU kernels: build it with scripts/build-cuda.sh")]
    NoKernels,
}

/// Work that was recorded once and can be replayed by the device that recorded it.
pub struct Recording(Box<dyn Any + Send + Sync>);

/// A device. Every method may be called from any thread.
///
/// Memory that work uses stays allocated until the work is done. An empty range may be anywhere, also at [`Address::NULL`].
pub trait Driver: Debug + Send + Sync {
    /// What there is to say about the device.
    fn info(&self) -> &DeviceInfo;

    /// Bytes that can still be allocated.
    ///
    /// # Errors
    /// What the device says.
    fn free_bytes(&self) -> Result<usize, DeviceError>;

    /// Memory for both lanes, at a multiple of 256 bytes, its contents unspecified. No bytes are at [`Address::NULL`].
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`]; [`DeviceError::Failed`] inside a recording.
    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError>;

    /// Gives memory back once the work that both lanes have by now is done. It does not wait.
    fn free(&self, at: Address, bytes: usize);

    /// Copies to the device. `from` may be reused at return.
    ///
    /// # Errors
    /// What the device says; always inside a recording.
    fn upload(&self, lane: Lane, from: &[u8], to: Address) -> Result<(), DeviceError>;

    /// Copies from the device after all earlier work of the lane, and waits for it.
    ///
    /// # Errors
    /// What the device says, also about earlier work; always inside a recording.
    fn download(&self, lane: Lane, from: Address, to: &mut [u8]) -> Result<(), DeviceError>;

    /// Copies within the device. The ranges do not overlap.
    ///
    /// # Errors
    /// What the device says.
    fn copy(&self, lane: Lane, from: Address, to: Address, bytes: usize)
    -> Result<(), DeviceError>;

    /// Fills with zero bytes.
    ///
    /// # Errors
    /// What the device says.
    fn zero(&self, lane: Lane, at: Address, bytes: usize) -> Result<(), DeviceError>;

    /// Queues a run of a kernel.
    ///
    /// # Errors
    /// [`DeviceError::NoKernel`], arguments of other sizes than the kernel's, or what the device says.
    fn launch(&self, lane: Lane, launch: &Launch<'_>) -> Result<(), DeviceError>;

    /// Waits for all work of the lane.
    ///
    /// # Errors
    /// What the device says about that work; always inside a recording.
    fn wait(&self, lane: Lane) -> Result<(), DeviceError>;

    /// Work that `run` sends to the main lane is recorded and not done. That is launches, copies, zeroes and products: whatever needs an
    /// answer, and allocation, is an error inside `run`. Other threads may use the side lane, allocate and free meanwhile. What `run` does
    /// should have been done once before, so that every kernel is loaded.
    ///
    /// # Errors
    /// The error of `run`, or what the device says.
    fn record(
        &self,
        run: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<Recording, DeviceError>;

    /// Queues what was recorded on the main lane, with the arguments that it had then.
    ///
    /// # Errors
    /// What the device says; always inside a recording.
    fn replay(&self, recording: &Recording) -> Result<(), DeviceError>;

    /// Queues a product by the vendor's library. `false` where there is none, or none for these elements: nothing was done then.
    ///
    /// # Errors
    /// What the library says; inside a recording also when it is the first product of the lane.
    fn product(&self, lane: Lane, product: &VendorProduct) -> Result<bool, DeviceError>;
}

/// Makes the reason that a call gave an error of ours.
pub(super) fn failed<E: Display>(call: &'static str) -> impl FnOnce(E) -> DeviceError {
    move |reason| DeviceError::Failed {
        call,
        reason: reason.to_string(),
    }
}

impl Address {
    /// Nowhere.
    pub const NULL: Address = Address(0);

    /// So many bytes further on.
    #[must_use]
    pub const fn plus(self, bytes: usize) -> Self {
        Address(self.0 + bytes as u64)
    }
}

impl Arg {
    /// Its bytes in memory, and how many of them count.
    pub(super) fn bytes(self) -> ([u8; 8], usize) {
        let wide = |bytes| (bytes, 8);
        let narrow = |bytes: [u8; 4]| {
            let mut padded = [0; 8];
            padded[..4].copy_from_slice(&bytes);
            (padded, 4)
        };
        match self {
            Arg::At(Address(at)) => wide(at.to_ne_bytes()),
            Arg::Int(value) => narrow(value.to_ne_bytes()),
            Arg::Long(value) => wide(value.to_ne_bytes()),
            Arg::Unsigned(value) => wide(value.to_ne_bytes()),
            Arg::Float(value) => narrow(value.to_ne_bytes()),
        }
    }
}

impl Launch<'_> {
    /// The arguments as the places that a launch points at, or what is wrong with them.
    pub(super) fn values(&self) -> Result<[u64; MOST_ARGS], DeviceError> {
        let mut values = [0; MOST_ARGS];
        if self.args.len() > MOST_ARGS {
            return Err(self.failed(format!("{} arguments", self.args.len())));
        }
        for (value, arg) in values.iter_mut().zip(self.args) {
            *value = u64::from_ne_bytes(arg.bytes().0);
        }
        Ok(values)
    }

    /// Compares the arguments with the bytes of those that the kernel takes.
    pub(super) fn fits(&self, sizes: &[u8]) -> Result<(), DeviceError> {
        let (count, given) = (sizes.len(), self.args.len());
        if given != count {
            return Err(self.failed(format!("takes {count} arguments, not {given}")));
        }
        let wrong = |(arg, size): (&Arg, &u8)| arg.bytes().1 != usize::from(*size);
        let Some(at) = self.args.iter().zip(sizes).position(wrong) else {
            return Ok(());
        };
        let (arg, size) = (self.args[at], sizes[at]);
        Err(self.failed(format!("argument {at} has {size} bytes, given was {arg:?}")))
    }

    /// The failure of this launch.
    pub(super) fn failed(&self, reason: impl Display) -> DeviceError {
        let (kernel, grid, block, shared) = (self.kernel, self.grid, self.block, self.shared);
        failed("launch")(format!(
            "{kernel} (grid {grid:?}, block {block}, shared {shared}): {reason}"
        ))
    }
}

impl VendorProduct {
    /// The width of a row of `x` and of a row of `y`.
    pub fn widths(&self) -> (usize, usize) {
        match self.kind {
            ProductKind::Forward => (self.inputs, self.outputs),
            ProductKind::Backward => (self.outputs, self.inputs),
        }
    }
}

impl Recording {
    pub(super) fn new(work: impl Any + Send + Sync) -> Self {
        Recording(Box::new(work))
    }

    /// The work, or an error if it is of another kind of device.
    pub(super) fn work<T: Any>(&self) -> Result<&T, DeviceError> {
        let other = || failed("replay")("another kind of device made the recording");
        self.0.downcast_ref().ok_or_else(other)
    }
}

impl Debug for Recording {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recording").finish_non_exhaustive()
    }
}
