//! With the feature `cuda`, compiles the kernels into one fat binary: for compute 8.0 and 9.0, and as PTX that the driver of any
//! newer device compiles. Without it, nothing is needed and nothing done.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Machine code for these, and PTX of the oldest.
const TARGETS: [&str; 3] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_80,code=compute_80",
];

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-env-changed=NVCC");
    println!("cargo::rerun-if-env-changed=ESPALIER_FATBIN");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("kernels.fatbin");
    match env::var_os("ESPALIER_FATBIN") {
        Some(built) => {
            if let Err(error) = fs::copy(&built, &out) {
                panic!("ESPALIER_FATBIN = {}: {error}", built.display());
            }
        }
        None => compile(&out),
    }
}

fn compile(out: &Path) {
    let nvcc = env::var("NVCC").unwrap_or_else(|_| "nvcc".to_owned());
    let mut command = Command::new(&nvcc);
    command.args([
        "-std=c++17",
        "-O3",
        "-fmad=false",
        "-fatbin",
        "--compress-mode=size",
    ]);
    for target in TARGETS {
        command.args(["-gencode", target]);
    }
    command.arg("kernels/all.cu").arg("-o").arg(out);
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{nvcc}: {status}"),
        Err(error) => {
            panic!("{nvcc}: {error}; scripts/build-cuda.sh brings a compiler, NVCC names another")
        }
    }
}
