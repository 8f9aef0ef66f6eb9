//! Builds the kernels for the processor: once for each state of their sources, whoever asks.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use super::driver::{DeviceError, failed};

/// The library of the kernels in `kernels`, built into `to` unless one of these very sources is there. It takes a C++ compiler
/// and a minute.
///
/// # Errors
/// [`DeviceError::Failed`] with what the compiler said.
pub fn build(kernels: &Path, to: &Path) -> Result<PathBuf, DeviceError> {
    fs::create_dir_all(to).map_err(failed("create_dir_all"))?;
    let lock = File::create(to.join("lock")).map_err(failed("create"))?;
    // Tests ask from several processes; all but the first wait here and find what it built.
    lock.lock().map_err(failed("lock"))?;
    let digest = digest(kernels)?;
    let (stamp, library) = (to.join("sources"), to.join("libespalier_kernels.so"));
    if fs::read_to_string(&stamp).is_ok_and(|built| built == digest) && library.exists() {
        return Ok(library);
    }
    let script = kernels.join("emulator/build.sh");
    let output = Command::new(&script).arg(to).output();
    let output = output.map_err(failed("emulator/build.sh"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed("emulator/build.sh")(format!(
            "{said} (it needs a C++ compiler)"
        )));
    }
    fs::write(&stamp, digest).map_err(failed("write"))?;
    Ok(library)
}

/// Over names and bytes of all sources.
fn digest(kernels: &Path) -> Result<String, DeviceError> {
    let mut files = Vec::new();
    for directory in [kernels.to_path_buf(), kernels.join("emulator")] {
        for entry in fs::read_dir(directory).map_err(failed("read_dir"))? {
            let path = entry.map_err(failed("read_dir"))?.path();
            if path.is_file() {
                files.push(path);
            }
        }
    }
    files.sort();
    let mut digest = Sha256::new();
    for file in files {
        digest.update(file.as_os_str().as_encoded_bytes());
        digest.update(fs::read(&file).map_err(failed("read"))?);
    }
    Ok(hex::encode(digest.finalize()))
}
