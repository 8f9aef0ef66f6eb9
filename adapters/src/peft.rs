//! PEFT's adapter files, in and out.
//!
//! What is read is honoured exactly or refused with a report of every finding. This file must not know tenants, stores
//! or models.

use serde::{Deserialize, Serialize};

/// Bounds on an adapter's files; each is named by the finding that it causes. All are checked before memory is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Bytes of `adapter_config.json`.
    pub max_config_bytes: usize,
    /// Bytes of `labels.json`.
    pub max_labels_bytes: usize,
    /// Bytes of `adapter_model.safetensors`.
    pub max_weights_bytes: usize,
    /// Bytes of its JSON header.
    pub max_header_bytes: usize,
    /// Rank of any site.
    pub max_rank: usize,
    /// Rows of a head.
    pub max_labels: usize,
    /// Bytes of one pattern or module name.
    pub max_pattern_bytes: usize,
    /// Entries of a list or table of modules, layers or patterns.
    pub max_list: usize,
    /// Findings listed in the report; the rest are counted.
    pub max_findings: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_config_bytes: 1 << 20,
            max_labels_bytes: 1 << 20,
            max_weights_bytes: 2 << 30,
            max_header_bytes: 4 << 20,
            max_rank: 256,
            max_labels: 4096,
            max_pattern_bytes: 1024,
            max_list: 1024,
            max_findings: 1000,
        }
    }
}
