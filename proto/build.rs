//! Compiles the protos with protox, so that a build needs no protoc, and hands the
//! descriptor set to the library for reflection. Knows nothing of what the messages mean.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const PROTOS: [&str; 8] = [
    "espalier/v1/types.proto",
    "espalier/v1/inference.proto",
    "espalier/v1/adapter.proto",
    "espalier/v1/training.proto",
    "espalier/v1/bulk.proto",
    "espalier/v1/tenant.proto",
    "espalier/v1/model.proto",
    "google/rpc/error_details.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=espalier");
    println!("cargo::rerun-if-changed=google");
    let mut descriptors = protox::compile(PROTOS, ["."])?;
    let mut prost = tonic_prost_build::Config::new();
    // Every message knows its full name, by which its descriptor is found.
    prost.enable_type_names();
    tonic_prost_build::configure()
        // Maps in one order, so that replies and goldens can be compared.
        .btree_map(".")
        .compile_fds_with_config(descriptors.clone(), prost)?;
    // Comments are for code generators; reflection does without.
    for file in &mut descriptors.file {
        file.source_code_info = None;
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("espalier.bin"), descriptors.encode_to_vec())?;
    Ok(())
}
