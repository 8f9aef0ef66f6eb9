//! What can go wrong with adapter files outside of a validation report.
//!
//! A file that was read and found wanting is a `Report`; these are the errors before and beside it.

use std::path::PathBuf;

/// An error about an adapter's files or values.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// Not a version digest.
    #[error("version digest '{found}' is not 64 lower-case hexadecimal digits")]
    Digest {
        /// What was given, cut.
        found: String,
    },
    /// A directory lacks a file that an adapter needs.
    #[error("{path} is missing: {next_step}")]
    Missing {
        /// The file.
        path: PathBuf,
        /// What to do about it.
        next_step: &'static str,
    },
    /// A file that we do not open: a symbolic link, a directory, a device.
    #[error("{path} is not a regular file")]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// A file over its limit.
    #[error("{path} has {bytes} bytes, limit {limit}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A pattern of the configuration that cannot be compiled, or is over its limit.
    #[error("{field}: pattern '{pattern}' {reason}")]
    Pattern {
        /// The field of `adapter_config.json`.
        field: &'static str,
        /// The pattern, cut.
        pattern: String,
        /// Why.
        reason: String,
    },
    /// Configuration and weights that contradict each other, so that the files written would not read back the same.
    #[error("{subject}: {found}, expected {expected}")]
    Inconsistent {
        /// Field or module.
        subject: String,
        /// What it is.
        found: String,
        /// What it would have to be.
        expected: String,
    },
}
