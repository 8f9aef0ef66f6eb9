//! Espalier beside what people run today, in one run on one machine: transformers + PEFT without a server (`compare`),
//! and eight tenants over gRPC beside PEFT and a llama.cpp server (`serve`).
//!
//! Each side runs as a process of its own, so that memory and threads are its own; the sides take turns, and the tables
//! show medians and ratios. `benches/run-peers.sh` prepares what they need.

mod compare;
mod engine;
mod rivals;
mod tenants;

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use espalier_benches::Fallible;

/// Prompt tokens of each row, as the peers' default.
const PROMPT: usize = 128;
/// Decoded tokens of each row, as the peers' default.
const NEW: usize = 32;
/// Timed repeats inside one process; the median counts, as in the peers.
const REPEATS: usize = 3;

#[derive(Parser)]
#[command(about = "Espalier beside its peers, alternating, ratios of medians")]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Engine and trainer beside transformers + PEFT, in turn; prints the table.
    Compare(Compare),
    /// Eight tenants over gRPC beside PEFT's mixed batch and a llama.cpp server, in turn; prints the table.
    Serve(Serve),
    /// One row for each adapter directory: prefill and decode tokens per second, as one JSON line.
    Generate {
        /// The model: a GGUF or a Hugging Face directory.
        #[arg(long)]
        model: String,
        /// PEFT directories, one row each.
        adapters: Vec<PathBuf>,
    },
    /// One tenant for each adapter directory, each with a request at the same time, through a server: output tokens per
    /// second, as one JSON line.
    Tenants {
        /// The model: a GGUF or a Hugging Face directory.
        #[arg(long)]
        model: String,
        /// Precision of the base weights, as espalierd's flag; its default without.
        #[arg(long)]
        dtype: Option<String>,
        /// PEFT directories, one tenant each.
        adapters: Vec<PathBuf>,
    },
    /// LoRA r = 16 on all linear layers, every token in the loss: tokens per second, as one JSON line.
    Train {
        /// The model: a GGUF or a Hugging Face directory.
        #[arg(long)]
        model: String,
        /// Sequences in a batch.
        #[arg(long, default_value_t = 8)]
        rows: usize,
        /// Tokens in a sequence.
        #[arg(long, default_value_t = 128)]
        tokens: usize,
        /// Instead: prompts and completions, one JSON object a line, eight a batch, the completions in the loss.
        #[arg(long)]
        data: Option<PathBuf>,
    },
}

#[derive(clap::Args)]
struct Compare {
    /// The model that Espalier loads.
    #[arg(long)]
    model: String,
    /// The same model as a Hugging Face directory, for the peer.
    #[arg(long)]
    hf: PathBuf,
    /// A directory of PEFT directories a0, a1, ...
    #[arg(long)]
    adapters: PathBuf,
    /// A Python with torch, transformers and peft.
    #[arg(long)]
    python: PathBuf,
    /// peft_peer.py
    #[arg(long)]
    peer: PathBuf,
    /// Short texts to train on besides, as prompts and completions, one JSON object a line.
    #[arg(long)]
    data: Option<PathBuf>,
    /// How often the two sides take turns.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

#[derive(clap::Args)]
struct Serve {
    #[command(flatten)]
    sides: Compare,
    /// Precisions of Espalier's base weights, one column each; espalierd's default without.
    #[arg(long)]
    dtype: Vec<String>,
    /// A llama.cpp server; left out of the table without.
    #[arg(long, requires_all = ["llama_peer", "llama_files"])]
    llama_server: Option<PathBuf>,
    /// llama_server_peer.py
    #[arg(long)]
    llama_peer: Option<PathBuf>,
    /// A directory with base.gguf (Q8_0) and the adapters a0.gguf, a1.gguf, ...
    #[arg(long)]
    llama_files: Option<PathBuf>,
}

fn main() -> Fallible<()> {
    match Args::parse().verb {
        Verb::Compare(options) => compare::run(&options),
        Verb::Serve(options) => rivals::run(&options),
        Verb::Generate { model, adapters } => engine::generate(&model, &adapters),
        Verb::Tenants {
            model,
            dtype,
            adapters,
        } => tenants::run(&model, dtype.as_deref(), &adapters),
        Verb::Train {
            model,
            rows,
            tokens,
            data,
        } => engine::train(&model, (rows, tokens), data.as_deref()),
    }
}
