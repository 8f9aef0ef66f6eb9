//! The kernels as the driver loads them; none in a binary that was built without the feature `cuda`.

/// For compute 8.0, 9.0, and PTX.
#[cfg(feature = "cuda")]
pub const FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));
/// None.
#[cfg(not(feature = "cuda"))]
pub const FATBIN: &[u8] = &[];
