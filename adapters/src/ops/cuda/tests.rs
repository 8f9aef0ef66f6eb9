//! The proofs in the emulator, and what a full device does.

#![allow(
    clippy::unwrap_used,
    reason = "a test may stop at the first broken promise"
)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::driver::Element;
use super::proof::PROOFS;
use super::*;

/// Memory of an emulated device.
const LIMIT: usize = 1 << 30;

/// The kernels for the processor.
pub(super) fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        build(&here.join("kernels"), &here.join("../target/kernels")).unwrap()
    })
}

fn cuda(element: Element) -> Cuda {
    let driver = Emulated::open(library(), LIMIT).unwrap();
    Cuda::new(Arc::new(driver), element, true).unwrap()
}

#[test]
fn every_operation_equals_the_reference_in_the_emulator() {
    for (name, proof) in PROOFS {
        println!("{name}");
        proof(&cuda);
    }
}

#[test]
fn a_full_device_is_an_error_of_the_one_who_asks() {
    let ops = cuda(Element::Bf16);
    let size = ArenaSize {
        full: LIMIT / 4,
        half: 0,
    };
    let refused = ops.arena(None, size, &mut |_, _| ()).unwrap_err();
    assert_eq!(refused.asked, LIMIT);
    let mut buffer = ops.exact();
    let grow = std::panic::AssertUnwindSafe(|| ops.resize(&mut buffer, LIMIT));
    let panic = std::panic::catch_unwind(grow).unwrap_err();
    assert!(panic.downcast_ref::<OutOfMemory>().is_some());
    let (numbers, mut back) = ([1.0, -2.5], [0.0; 2]);
    let mut small = ops.exact();
    ops.resize(&mut small, 2);
    ops.write(&numbers, small.all_mut());
    ops.read(small.all(), &mut back);
    assert_eq!(back, numbers);
}
