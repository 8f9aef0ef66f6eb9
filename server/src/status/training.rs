//! Errors of datasets and jobs, training and bulk, in the table's terms.

use std::time::Duration;

use espalier_adapters::train::dataset::DataReport;
use tonic::Code;

use super::Refusal;
use super::domain::{in_use, limited, reused};
use crate::bulk::BulkError;
use crate::datasets::DatasetError;
use crate::jobs::JobError;

/// Field violations that one answer carries at most: a status must fit in a header. `validate_only` gives them all.
const MAX_VIOLATIONS: usize = 25;

/// Bad lines as field violations: number, field and reason each.
fn bad_data(at: &str, report: &DataReport) -> Refusal {
    let mut fields: Vec<(String, String)> = report
        .errors
        .iter()
        .take(MAX_VIOLATIONS)
        .map(|finding| {
            let mut field = at.to_owned();
            if finding.line > 0 {
                field.push_str(&format!("[line {}]", finding.line));
            }
            if !finding.field.is_empty() {
                field.push_str(&format!(".{}", finding.field));
            }
            (field, finding.reason.chars().take(200).collect())
        })
        .collect();
    let more = report.error_count().saturating_sub(fields.len() as u64);
    if more > 0 {
        let why = format!("and {more} more; validate_only lists them");
        fields.push((at.to_owned(), why));
    }
    Refusal::invalid_fields(fields)
        .with("problem_count", report.error_count())
        .with("warning_count", report.warning_count())
}

impl From<DatasetError> for Refusal {
    fn from(error: DatasetError) -> Refusal {
        let text = error.to_string();
        match error {
            DatasetError::TenantNotFound { name } => {
                Refusal::not_found("TENANT_NOT_FOUND", "tenant", name.to_string())
            }
            DatasetError::NotFound { name } => {
                Refusal::not_found("DATASET_NOT_FOUND", "dataset", name.to_string())
            }
            DatasetError::Exists { name } => {
                Refusal::already_exists("DATASET_EXISTS", "dataset", name.to_string())
            }
            DatasetError::InUse { name, by } => in_use(name.to_string(), by, text),
            DatasetError::Data(report) => bad_data("data", &report),
            DatasetError::Limit { what, value, limit } => limited(what, value, limit, text),
            DatasetError::RequestIdReused { request_id } => reused(request_id, text),
            DatasetError::Store(error) => error.into(),
            DatasetError::Database(error) => error.into(),
        }
    }
}

impl From<JobError> for Refusal {
    fn from(error: JobError) -> Refusal {
        let text = error.to_string();
        match error {
            JobError::TenantNotFound { name } => {
                Refusal::not_found("TENANT_NOT_FOUND", "tenant", name.to_string())
            }
            JobError::NotFound { name } => {
                Refusal::not_found("TRAINING_JOB_NOT_FOUND", "training job", name.to_string())
            }
            JobError::Data { field, report, .. } => bad_data(&field, &report),
            JobError::InvalidField { field, reason } => Refusal::invalid_field(field, reason),
            JobError::Incompatible {
                version,
                expected,
                found,
            } => Refusal::new(Code::FailedPrecondition, "ADAPTER_INCOMPATIBLE", text)
                .with("resource", version)
                .with("expected", expected)
                .with("found", found),
            JobError::InvalidState { name, state } => {
                Refusal::precondition("INVALID_JOB_STATE", "STATE", name.to_string(), text)
                    .with("state", state)
            }
            JobError::Limit { what, value, limit } => limited(what, value, limit, text),
            JobError::RequestIdReused { request_id } => reused(request_id, text),
            JobError::Dataset(error) => error.into(),
            JobError::Registry(error) => error.into(),
            JobError::Stopping => {
                Refusal::unavailable("SERVER_DRAINING", text, Duration::from_secs(1))
            }
            JobError::Store(error) => error.into(),
            JobError::Engine(error) => error.into(),
            JobError::Database(error) => error.into(),
        }
    }
}

impl From<BulkError> for Refusal {
    fn from(error: BulkError) -> Refusal {
        let text = error.to_string();
        match error {
            BulkError::TenantNotFound { name } => {
                Refusal::not_found("TENANT_NOT_FOUND", "tenant", name.to_string())
            }
            BulkError::NotFound { name } => {
                Refusal::not_found("BULK_JOB_NOT_FOUND", "bulk job", name.to_string())
            }
            BulkError::Exists { name } => {
                Refusal::already_exists("BULK_JOB_EXISTS", "bulk job", name.to_string())
            }
            BulkError::InvalidState { name, state, .. } => {
                Refusal::precondition("INVALID_JOB_STATE", "STATE", name.to_string(), text)
                    .with("state", state)
            }
            BulkError::Limit { what, value, limit } => limited(what, value, limit, text),
            BulkError::RequestIdReused { request_id } => reused(request_id, text),
            BulkError::Registry(error) => error.into(),
            BulkError::Stopping => {
                Refusal::unavailable("SERVER_DRAINING", text, Duration::from_secs(1))
            }
            BulkError::File { .. } => Refusal::internal(text),
            BulkError::Database(error) => error.into(),
        }
    }
}
