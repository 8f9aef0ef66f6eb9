//! `espalierd check`: what this program does on this machine, proved and measured. Each part prints a table as it goes and ends
//! with one line of JSON.
//!
//! It runs the model by itself: nothing of the server takes part, and no request is made.

mod base;
mod ceilings;
mod peer;
mod proofs;
mod report;
mod sequences;
mod serve;
mod train;

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use crate::config::Config;

/// What a part may take; whoever starts it gives it eight minutes.
const BUDGET: Duration = Duration::from_secs(465);

/// A part of the check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Every operation of the GPU against the reference, and a small model against the processor's.
    Tests,
    /// What a decode step, a long prompt and an adapter's arrival take.
    Serve,
    /// What training takes.
    Train,
    /// The same by Python's libraries, beside this program's.
    Peer,
}

/// Runs a part on the device and with the model that the configuration names; without a model, with one of a known shape.
///
/// # Errors
/// When the device that was asked for is not there, or the model cannot be loaded.
pub fn run(part: Part, config: &Config) -> Result<ExitCode, Box<dyn Error>> {
    match part {
        Part::Tests => proofs::run(config, BUDGET),
        Part::Serve => serve::run(config, BUDGET),
        Part::Train => train::run(config, BUDGET),
        Part::Peer => peer::run(config, BUDGET),
    }
}
