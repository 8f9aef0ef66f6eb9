//! `espalierd merge`: the base with one adapter merged into it, as a Hugging Face directory for other runtimes. An operator's command
//! on files: a merged model is as large as its base, and no server needs to run for it.

use std::error::Error;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use espalier_adapters::peft;
use espalier_engine::model::{Dtype, FileNumbers, load_as, write_merged};

use crate::config::Hub;
use crate::hub;

/// Write the base with an adapter merged into it, as a Hugging Face directory.
#[derive(Debug, Clone, Args)]
pub struct Merge {
    /// The base, as the server takes it: a .gguf file, a Hugging Face directory, or ORG/NAME[@REVISION][:FILE.gguf] of its hub.
    #[arg(long)]
    model: String,
    /// The adapter: a PEFT directory, as `espalier adapters pull` writes it.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The directory to write; it must not be there yet, or be empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Type of the written numbers. Left out: f32 for a base in f32, bf16 for one in 16 bits or quantised.
    #[arg(long, value_enum)]
    dtype: Option<Numbers>,
}

/// The types by the names that people type.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Numbers {
    /// Four bytes: what is served in f32, bit for bit but for the order of additions.
    F32,
    /// Two bytes: the merged weights rounded, as most models are published.
    Bf16,
}

impl Merge {
    /// Loads, merges, writes and says what was written. `hub` is where models come from that no path names.
    ///
    /// # Errors
    /// A base or an adapter that cannot be read or do not fit, and a directory that cannot be written.
    pub fn run(&self, hub: &Hub) -> Result<(), Box<dyn Error>> {
        let limits = peft::Limits::default();
        // Read first: a misspelt directory should not cost a model's loading.
        let artifact = peft::from_dir(&self.adapter, &limits)?;
        let spec = hub::locate(&self.model, hub)?.spec;
        let base = load_as(&spec, Dtype::Stored)?;
        let read = peft::read(&artifact, &base.config.base_shape(), &limits);
        let (_, weights, report) = read.map_err(|report| report.to_string())?;
        if report.warnings() > 0 {
            eprintln!("{report}");
        }
        let (numbers, why) = match (self.dtype, base.single_precision) {
            (Some(Numbers::F32), _) => (FileNumbers::F32, ""),
            (Some(Numbers::Bf16), _) => (FileNumbers::Bf16, ""),
            (None, true) => (FileNumbers::F32, " as the base is"),
            (None, false) => (
                FileNumbers::Bf16,
                " because the base is in 16 bits or quantised; --dtype f32 rounds nothing",
            ),
        };
        let source = Some(Path::new(&spec)).filter(|path| path.is_dir());
        let written = write_merged(base, source, &weights, numbers, &self.out)?;
        let mib = written.bytes as f64 / f64::from(1 << 20);
        let name = match written.numbers {
            FileNumbers::F32 => "f32",
            FileNumbers::Bf16 => "bf16",
        };
        println!(
            "{}: {} tensors, {mib:.1} MiB in {name}{why}",
            self.out.display(),
            written.tensors
        );
        Ok(())
    }
}
