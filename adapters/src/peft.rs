//! PEFT's adapter files, in and out.
//!
//! What is read is honoured exactly or refused with a report of every finding; nothing is skipped in silence. What is
//! written PEFT loads, and reads back here as the same values. This file must not know tenants, stores or models.

mod config_file;
mod directory;
mod full;
mod keys;
mod read;
mod tensor_file;
mod write;

use serde::{Deserialize, Serialize};

pub use directory::{from_dir, to_dir};
pub use read::{base_name_warning, read, read_labels};
pub use write::write;

use crate::report::{Finding, Report, Rule, Severity};

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
            max_list: 1024,
            max_findings: 1000,
        }
    }
}

/// Where the checks leave their findings.
struct Checker<'a> {
    limits: &'a Limits,
    report: Report,
}

impl Checker<'_> {
    fn error(
        &mut self,
        subject: impl Into<String>,
        rule: Rule,
        found: impl Into<String>,
        expected: impl Into<String>,
        next_step: &str,
    ) {
        self.push(
            Severity::Error,
            subject.into(),
            rule,
            [found.into(), expected.into()],
            next_step,
        );
    }

    fn warning(
        &mut self,
        subject: impl Into<String>,
        rule: Rule,
        found: impl Into<String>,
        expected: impl Into<String>,
        next_step: &str,
    ) {
        self.push(
            Severity::Warning,
            subject.into(),
            rule,
            [found.into(), expected.into()],
            next_step,
        );
    }

    fn push(
        &mut self,
        severity: Severity,
        subject: String,
        rule: Rule,
        values: [String; 2],
        next_step: &str,
    ) {
        let [found, expected] = values;
        let next_step = next_step.to_owned();
        let finding = Finding {
            severity,
            subject,
            rule,
            found,
            expected,
            next_step,
        };
        self.report.push(finding, self.limits.max_findings);
    }
}

#[cfg(test)]
mod tests;
