//! A device that is none: the kernels as plain C++, run thread by thread on the processor (`kernels/emulator`).
//!
//! It does at once what a GPU does in time, and looks harder: ranges must lie in one allocation, memory begins as numbers that are none, blocks and lanes
//! run in the opposite order every other launch. A recording freezes arguments as a GPU's does. It must not know what a kernel computes.

#![allow(
    unsafe_code,
    reason = "the kernels come from a shared library and take pointers"
)]

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fmt::{self, Debug, Formatter};
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use libloading::Library;

use super::driver::{
    Address, Arg, DeviceError, DeviceInfo, Driver, Lane, Launch, MOST_ARGS, Recording,
    VendorProduct, failed,
};
use super::emulated_memory::EmulatedMemory;
use super::recorder::Recorder;

type Run = unsafe extern "C" fn(
    name: *const c_char,
    grid: *const c_uint,
    block: *const c_uint,
    shared: c_uint,
    arguments: *mut *mut c_void,
    count: c_int,
    order: c_int,
    error: *mut c_char,
    error_bytes: usize,
) -> c_int;

type Count = unsafe extern "C" fn(name: *const c_char) -> c_int;
type Bytes = unsafe extern "C" fn(name: *const c_char, index: c_int) -> c_int;

/// What kernels are given begins at multiples of this.
const POINTERS: u64 = 16;

/// The emulator.
pub struct Emulated {
    info: DeviceInfo,
    run: Run,
    count: Count,
    bytes: Bytes,
    memory: Mutex<EmulatedMemory>,
    recorder: Recorder,
    recorded: Mutex<Vec<Work>>,
    /// 0 or 1 by turns.
    order: AtomicI32,
    /// The functions above are in it.
    _library: Library,
}

/// What can be recorded.
#[derive(Clone, Debug)]
enum Work {
    Launch {
        kernel: String,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        args: Vec<Arg>,
    },
    Copy {
        from: Address,
        to: Address,
        bytes: usize,
    },
    Zero {
        at: Address,
        bytes: usize,
    },
}

// === impl Emulated ===

impl Emulated {
    /// Opens the library that `kernels/emulator/build.sh` builds, as a device with `limit` bytes of memory.
    ///
    /// # Errors
    /// [`DeviceError::NoDevice`] if the library cannot be loaded or lacks a function.
    pub fn open(library: &Path, limit: usize) -> Result<Self, DeviceError> {
        let unusable = |error: libloading::Error| DeviceError::NoDevice {
            reason: format!(
                "{}: {error}; build it with adapters/kernels/emulator/build.sh",
                library.display()
            ),
        };
        // SAFETY: the library is ours; its initialisers only list its kernels.
        let loaded = unsafe { Library::new(library) }.map_err(unusable)?;
        // SAFETY: these are the signatures in `emulator.cc`, and the library is kept for as long as the functions.
        let functions = unsafe {
            let run = loaded.get::<Run>("espalier_emulator_launch");
            let count = loaded.get::<Count>("espalier_emulator_arguments");
            let bytes = loaded.get::<Bytes>("espalier_emulator_argument_bytes");
            run.and_then(|run| Ok((*run, *count?, *bytes?)))
        };
        let (run, count, bytes) = functions.map_err(unusable)?;
        Ok(Emulated {
            info: DeviceInfo {
                name: "emulator".to_owned(),
                driver: "none".to_owned(),
                compute: (9, 0),
                total_bytes: limit,
                multiprocessors: 1,
            },
            run,
            count,
            bytes,
            memory: Mutex::new(EmulatedMemory::new(limit)),
            recorder: Recorder::default(),
            recorded: Mutex::default(),
            order: AtomicI32::new(0),
            _library: loaded,
        })
    }

    fn memory(&self) -> MutexGuard<'_, EmulatedMemory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recorded(&self) -> MutexGuard<'_, Vec<Work>> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the work or does it.
    fn take(&self, call: &'static str, lane: Lane, work: Work) -> Result<(), DeviceError> {
        if self.recorder.takes(call, lane)? {
            self.recorded().push(work);
            return Ok(());
        }
        self.perform(&work)
    }

    fn perform(&self, work: &Work) -> Result<(), DeviceError> {
        match work {
            Work::Launch {
                kernel,
                grid,
                block,
                shared,
                args,
            } => self.run(&Launch {
                kernel,
                grid: *grid,
                block: *block,
                shared: *shared,
                args,
            }),
            Work::Copy { from, to, bytes } if *bytes > 0 => {
                let memory = self.memory();
                let from = memory.range("copy", *from, *bytes)?;
                let to = memory.range("copy", *to, *bytes)?;
                if from.addr().abs_diff(to.addr()) < *bytes {
                    return Err(failed("copy")("the ranges overlap"));
                }
                // SAFETY: both ranges lie in allocations that live while the memory is locked, and do not overlap.
                unsafe { ptr::copy_nonoverlapping(from, to, *bytes) };
                Ok(())
            }
            Work::Zero { at, bytes } if *bytes > 0 => {
                let memory = self.memory();
                let at = memory.range("zero", *at, *bytes)?;
                // SAFETY: the range lies in an allocation that lives while the memory is locked.
                unsafe { at.write_bytes(0, *bytes) };
                Ok(())
            }
            Work::Copy { .. } | Work::Zero { .. } => Ok(()),
        }
    }

    /// The kernel's name, if there is such a kernel and it takes these arguments.
    fn check(&self, launch: &Launch<'_>) -> Result<CString, DeviceError> {
        let missing = || DeviceError::NoKernel {
            name: launch.kernel.to_owned(),
        };
        let name = CString::new(launch.kernel).map_err(|_| missing())?;
        // SAFETY: the name ends with a zero and outlives the call.
        let count = unsafe { (self.count)(name.as_ptr()) };
        if count < 0 {
            return Err(missing());
        }
        // SAFETY: as above.
        let bytes = |index| unsafe { (self.bytes)(name.as_ptr(), index) } as u8;
        let sizes: Vec<u8> = (0..count).map(bytes).collect();
        launch.fits(&sizes)?;
        Ok(name)
    }

    fn run(&self, launch: &Launch<'_>) -> Result<(), DeviceError> {
        let name = self.check(launch)?;
        let memory = self.memory();
        for (index, arg) in launch.args.iter().enumerate() {
            let Arg::At(at) = *arg else { continue };
            let wrong = |why: String| launch.failed(format!("argument {index}: {why}"));
            if at.0 % POINTERS != 0 {
                return Err(wrong(format!("{:#x} is no multiple of {POINTERS}", at.0)));
            }
            if at != Address::NULL {
                let known = memory.known("launch", at);
                known.map_err(|error| wrong(error.to_string()))?;
            }
        }
        self.call(&name, launch)?;
        memory.check().map_err(|stray| launch.failed(stray))
    }

    /// Runs the kernel. The caller holds the memory.
    fn call(&self, name: &CStr, launch: &Launch<'_>) -> Result<(), DeviceError> {
        let mut values = launch.values()?;
        let mut pointers = [ptr::null_mut::<c_void>(); MOST_ARGS];
        for (pointer, value) in pointers.iter_mut().zip(&mut values) {
            *pointer = ptr::from_mut(value).cast();
        }
        let mut error: [c_char; 512] = [0; 512];
        let block = [launch.block, 1, 1];
        let order = self.order.fetch_xor(1, Ordering::Relaxed);
        // SAFETY: the arrays outlive the call, there are as many pointers as arguments, and each points at eight bytes; callers keep the memory that
        // the arguments name.
        let refused = unsafe {
            (self.run)(
                name.as_ptr(),
                launch.grid.as_ptr(),
                block.as_ptr(),
                launch.shared,
                pointers.as_mut_ptr(),
                launch.args.len() as c_int,
                order,
                error.as_mut_ptr(),
                error.len(),
            )
        };
        if refused == 0 {
            return Ok(());
        }
        // SAFETY: the reason is cut to the array and ends with a zero.
        let reason = unsafe { CStr::from_ptr(error.as_ptr()) };
        Err(launch.failed(reason.to_string_lossy()))
    }
}

impl Driver for Emulated {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&self) -> Result<usize, DeviceError> {
        Ok(self.memory().free_bytes())
    }

    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError> {
        self.recorder.refuse("allocate")?;
        if bytes == 0 {
            return Ok(Address::NULL);
        }
        self.memory().allocate(bytes)
    }

    fn free(&self, at: Address, bytes: usize) {
        if at == Address::NULL {
            return;
        }
        let freed = self.memory().free(at, bytes);
        if let Err(error) = freed
            && !std::thread::panicking()
        {
            panic!("{error}");
        }
    }

    fn upload(&self, lane: Lane, from: &[u8], to: Address) -> Result<(), DeviceError> {
        self.recorder.refuse_on("upload", lane)?;
        if from.is_empty() {
            return Ok(());
        }
        let memory = self.memory();
        let to = memory.range("upload", to, from.len())?;
        // SAFETY: the range lies in an allocation that lives while the memory is locked, and `from` does not.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        Ok(())
    }

    fn download(&self, lane: Lane, from: Address, to: &mut [u8]) -> Result<(), DeviceError> {
        self.recorder.refuse_on("download", lane)?;
        if to.is_empty() {
            return Ok(());
        }
        let memory = self.memory();
        let from = memory.range("download", from, to.len())?;
        // SAFETY: as for `upload`; all of the allocation was written when it began.
        unsafe { ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn copy(
        &self,
        lane: Lane,
        from: Address,
        to: Address,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        self.take("copy", lane, Work::Copy { from, to, bytes })
    }

    fn zero(&self, lane: Lane, at: Address, bytes: usize) -> Result<(), DeviceError> {
        self.take("zero", lane, Work::Zero { at, bytes })
    }

    fn launch(&self, lane: Lane, launch: &Launch<'_>) -> Result<(), DeviceError> {
        self.check(launch)?;
        let work = Work::Launch {
            kernel: launch.kernel.to_owned(),
            grid: launch.grid,
            block: launch.block,
            shared: launch.shared,
            args: launch.args.to_vec(),
        };
        self.take("launch", lane, work)
    }

    fn wait(&self, lane: Lane) -> Result<(), DeviceError> {
        self.recorder.refuse_on("wait", lane)
    }

    fn record(
        &self,
        run: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<Recording, DeviceError> {
        let turn = self.recorder.begin()?;
        self.recorded().clear();
        run()?;
        let work = std::mem::take(&mut *self.recorded());
        drop(turn);
        Ok(Recording::new(work))
    }

    fn replay(&self, recording: &Recording) -> Result<(), DeviceError> {
        self.recorder.refuse_on("replay", Lane::Main)?;
        let work = recording.work::<Vec<Work>>()?;
        work.iter().try_for_each(|work| self.perform(work))
    }

    fn product(&self, lane: Lane, _product: &VendorProduct) -> Result<bool, DeviceError> {
        self.recorder.takes("product", lane).map(|_| false)
    }
}

impl Debug for Emulated {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Emulated")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::driver_tests::{self, Kernel};
    use crate::ops::cuda::tests::library;

    const LIMIT: usize = 64 << 20;

    fn emulator(limit: usize) -> Emulated {
        Emulated::open(library(), limit).unwrap()
    }

    fn reason(result: Result<(), DeviceError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn it_does_what_every_device_does() {
        driver_tests::all(&emulator(LIMIT));
    }

    #[test]
    fn a_library_that_is_not_there_is_an_error_with_a_next_step() {
        let error = Emulated::open(Path::new("/no/such/library.so"), LIMIT).unwrap_err();
        assert!(error.to_string().contains("build.sh"), "{error}");
    }

    #[test]
    fn ranges_lie_in_one_allocation() {
        let emulator = emulator(LIMIT);
        let at = emulator.allocate(48).unwrap();
        let beyond = reason(emulator.upload(Lane::Main, &[0; 40], at.plus(16)));
        assert!(beyond.contains("run 8 beyond its end"), "{beyond}");
        let nowhere = reason(emulator.zero(Lane::Main, Address(16), 1));
        assert!(nowhere.contains("lies in no allocation"), "{nowhere}");
        let overlap = reason(emulator.copy(Lane::Main, at, at.plus(8), 16));
        assert!(overlap.contains("overlap"), "{overlap}");
        emulator.free(at, 48);
        let gone = reason(emulator.zero(Lane::Main, at, 1));
        assert!(gone.contains("lies in no allocation"), "{gone}");
        assert_eq!(emulator.free_bytes(), Ok(LIMIT));
    }

    #[test]
    fn memory_begins_as_numbers_that_are_none() {
        let emulator = emulator(LIMIT);
        let at = emulator.allocate(64).unwrap();
        let mut bytes = [0; 64];
        emulator.download(Lane::Main, at, &mut bytes).unwrap();
        assert!(
            bytes
                .as_chunks()
                .0
                .iter()
                .all(|x| f32::from_ne_bytes(*x).is_nan())
        );
        emulator.free(at, 64);
    }

    #[test]
    fn a_kernel_that_writes_beyond_an_allocation_is_found_out() {
        let emulator = emulator(LIMIT);
        let (x, y) = (
            emulator.allocate(64).unwrap(),
            emulator.allocate(60).unwrap(),
        );
        emulator.zero(Lane::Main, x, 64).unwrap();
        emulator.zero(Lane::Main, y, 60).unwrap();
        let cast = Kernel::new(
            "cast_f32_bf16",
            16,
            &[Arg::At(x), Arg::At(y), Arg::Long(16)],
        );
        emulator.launch(Lane::Main, &cast.launch()).unwrap();
        let stray = Kernel::new(
            "cast_f32_bf16",
            16,
            &[Arg::At(x), Arg::At(y.plus(32)), Arg::Long(16)],
        );
        let stray = reason(emulator.launch(Lane::Main, &stray.launch()));
        assert!(
            stray.contains("wrote") && stray.contains("cast_f32_bf16"),
            "{stray}"
        );
    }

    #[test]
    fn a_pointer_within_sixteen_bytes_is_refused() {
        let emulator = emulator(LIMIT);
        let at = emulator.allocate(64).unwrap();
        let args = [Arg::At(at), Arg::At(at.plus(4)), Arg::Long(8)];
        let kernel = Kernel::new("add_f32", 8, &args);
        let error = reason(emulator.launch(Lane::Main, &kernel.launch()));
        assert!(
            error.contains("argument 1") && error.contains("multiple of 16"),
            "{error}"
        );
    }

    #[test]
    fn an_address_that_was_never_given_out_is_no_argument() {
        let emulator = emulator(LIMIT);
        let host = [0u8; 64];
        let at = Arg::At(Address(host.as_ptr().addr() as u64));
        let kernel = Kernel::new("add_f32", 16, &[at, at, Arg::Long(16)]);
        let error = reason(emulator.launch(Lane::Main, &kernel.launch()));
        assert!(error.contains("argument 0"), "{error}");
    }

    #[test]
    fn an_allocation_that_was_freed_fails_the_replay() {
        let emulator = emulator(LIMIT);
        let at = emulator.allocate(64).unwrap();
        let recording = emulator
            .record(&mut || emulator.zero(Lane::Main, at, 64))
            .unwrap();
        emulator.replay(&recording).unwrap();
        emulator.free(at, 64);
        let error = reason(emulator.replay(&recording));
        assert!(error.contains("lies in no allocation"), "{error}");
    }
}
