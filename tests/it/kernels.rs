//! The CUDA kernels as plain C++: every one of them against loops in double precision, in an emulator that finds races and stray
//! writes (`adapters/kernels/emulator`). No GPU is needed, and none is proven by it.

use std::path::Path;
use std::process::Command;

#[test]
fn every_kernel_computes_what_its_operation_says() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../adapters/kernels");
    let built = tempfile::tempdir().unwrap();
    let run = |command: &mut Command, next: &str| {
        let output = command
            .output()
            .unwrap_or_else(|error| panic!("{command:?}: {error}; {next}"));
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(output.status.success(), "{command:?}: {said}");
        said.into_owned()
    };
    let build = kernels.join("emulator/build.sh");
    run(
        Command::new(build).arg(built.path()),
        "install a C++ compiler (g++)",
    );
    let said = run(&mut Command::new(built.path().join("check")), "");
    print!("{said}");
}
