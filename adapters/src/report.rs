//! The result of checking an adapter: every finding at once, so that a user repairs a file in one round.
//!
//! This file must not know how a check is done, only how findings are kept and told.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Whether a finding refuses the adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// The adapter cannot be honoured exactly and is refused.
    Error,
    /// The adapter is honoured; this should still be known.
    Warning,
}

/// Which rule a finding breaks. The snake-case name is stable and may be matched by programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// A part, the header, a pattern or a list is over its limit.
    Limit,
    /// The file is not what its name says: a pickle, an archive, an empty file.
    FileFormat,
    /// Not valid JSON, or a key given twice.
    Json,
    /// A field has a value of the wrong type or outside its range.
    FieldValue,
    /// A key of `adapter_config.json` that we do not know.
    UnknownField,
    /// A method or option that we do not compute.
    Unsupported,
    /// The saved weights fit only a base that was changed when they were initialised.
    InitChangedBase,
    /// A pattern that cannot be compiled.
    Pattern,
    /// The safetensors header contradicts itself or the file's length.
    Header,
    /// A tensor that no part of the adapter explains.
    UnknownTensor,
    /// Weights of a module that the configuration does not target.
    OutsideTargets,
    /// A targeted module, half of a pair, a magnitude or a head has no tensor.
    MissingTensor,
    /// The configuration targets nothing in this base.
    NoTargets,
    /// A layer that the base does not have.
    Layer,
    /// A data type other than F32, F16 and BF16.
    Dtype,
    /// A shape that does not fit base and configuration.
    Shape,
    /// A rank that does not fit the configuration, or is over the limit.
    Rank,
    /// NaN or infinity.
    NotFinite,
    /// `labels.json` does not fit the head.
    Labels,
    /// `head.json` does not describe the head.
    Head,
    /// The adapter names a base other than this one.
    BaseModel,
}

impl Rule {
    /// The stable snake-case name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::FileFormat => "file_format",
            Self::Json => "json",
            Self::FieldValue => "field_value",
            Self::UnknownField => "unknown_field",
            Self::Unsupported => "unsupported",
            Self::InitChangedBase => "init_changed_base",
            Self::Pattern => "pattern",
            Self::Header => "header",
            Self::UnknownTensor => "unknown_tensor",
            Self::OutsideTargets => "outside_targets",
            Self::MissingTensor => "missing_tensor",
            Self::NoTargets => "no_targets",
            Self::Layer => "layer",
            Self::Dtype => "dtype",
            Self::Shape => "shape",
            Self::Rank => "rank",
            Self::NotFinite => "not_finite",
            Self::Labels => "labels",
            Self::Head => "head",
            Self::BaseModel => "base_model",
        }
    }
}

/// One thing found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Whether it refuses the adapter.
    pub severity: Severity,
    /// The tensor, or the field of `adapter_config.json`, or the file.
    pub subject: String,
    /// The rule.
    pub rule: Rule,
    /// What is there.
    pub found: String,
    /// What would be right.
    pub expected: String,
    /// What the user can do.
    pub next_step: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        let (rule, subject) = (self.rule.as_str(), &self.subject);
        write!(f, "{severity} [{rule}] {subject}: found {}", self.found)?;
        if !self.expected.is_empty() {
            write!(f, ", expected {}", self.expected)?;
        }
        if !self.next_step.is_empty() {
            write!(f, "; {}", self.next_step)?;
        }
        Ok(())
    }
}

/// Everything found in one adapter, in the order of the checks, errors and warnings together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The findings, up to the limit.
    pub findings: Vec<Finding>,
    /// Errors beyond the limit on findings.
    pub omitted_errors: usize,
    /// Warnings beyond the limit on findings.
    pub omitted_warnings: usize,
}

impl Report {
    /// The number of errors, listed or not.
    #[must_use]
    pub fn errors(&self) -> usize {
        self.count(Severity::Error) + self.omitted_errors
    }

    /// The number of warnings, listed or not.
    #[must_use]
    pub fn warnings(&self) -> usize {
        self.count(Severity::Warning) + self.omitted_warnings
    }

    /// Whether the adapter may be used.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.errors() == 0
    }

    /// Adds a finding; beyond `limit` only its number is kept, so that a hostile file cannot grow the report.
    pub fn push(&mut self, finding: Finding, limit: usize) {
        if self.findings.len() < limit {
            self.findings.push(finding);
        } else if finding.severity == Severity::Error {
            self.omitted_errors += 1;
        } else {
            self.omitted_warnings += 1;
        }
    }

    fn count(&self, severity: Severity) -> usize {
        self.findings
            .iter()
            .filter(|f| f.severity == severity)
            .count()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} errors, {} warnings", self.errors(), self.warnings())?;
        for finding in &self.findings {
            write!(f, "\n  {finding}")?;
        }
        let omitted = self.omitted_errors + self.omitted_warnings;
        if omitted > 0 {
            write!(f, "\n  and {omitted} more")?;
        }
        Ok(())
    }
}

impl std::error::Error for Report {}
