//! Each domain's errors in the table's terms. The matches are exhaustive over our own enums, so that a new variant finds
//! its place before it compiles. What a client cannot act on (a damaged file, a closed database) is INTERNAL or
//! UNAVAILABLE, and its cause goes to the log only.

use std::time::Duration;

use espalier_engine::error::EngineError;
use tonic::Code;

use super::Refusal;
use crate::artifact_store::StoreError;
use crate::database::DatabaseError;
use crate::names::NameError;
use crate::paging::PageError;
use crate::principal::AccessError;
use crate::registry::RegistryError;
use crate::tenants::TenantError;

/// What a client is told to wait when nothing better is known.
const LATER: Duration = Duration::from_secs(1);

impl From<EngineError> for Refusal {
    fn from(error: EngineError) -> Refusal {
        let text = error.to_string();
        match error {
            EngineError::InvalidField { field, reason } => Refusal::invalid_field(field, reason),
            EngineError::ContextLengthExceeded { given, limit, .. } => {
                Refusal::new(Code::InvalidArgument, "CONTEXT_LENGTH_EXCEEDED", text)
                    .with("given", given)
                    .with("limit", limit)
            }
            EngineError::Overloaded {
                waiting,
                limit,
                retry_after,
            } => Refusal::unavailable("SERVER_OVERLOADED", text, retry_after)
                .with("waiting", waiting)
                .with("limit", limit),
            EngineError::Draining => Refusal::unavailable(
                "SERVER_DRAINING",
                "the server is shutting down; another replica answers",
                LATER,
            ),
            // The registry knows the version, so its bytes are missing: a loss, not a misspelt name.
            EngineError::AdapterNotFound { digest } => Refusal::new(
                Code::DataLoss,
                "ARTIFACT_CORRUPT",
                format!("the artifact of version {digest} is missing from the store"),
            )
            .with("digest", digest),
            EngineError::ArtifactCorrupt { digest, detail } => {
                tracing::error!(%digest, detail, "a stored artifact is corrupt");
                Refusal::new(
                    Code::DataLoss,
                    "ARTIFACT_CORRUPT",
                    format!("the stored artifact of version {digest} fails its digest"),
                )
                .with("digest", digest)
            }
            EngineError::AdapterIncompatible { digest, report } => {
                Refusal::new(Code::FailedPrecondition, "ADAPTER_INCOMPATIBLE", text)
                    .with("digest", digest)
                    .with("errors", report.errors())
            }
            EngineError::AdapterSource { digest, detail } => {
                tracing::error!(%digest, detail, "an artifact cannot be fetched");
                Refusal::unavailable(
                    "SOURCE_UNAVAILABLE",
                    format!("the artifact of version {digest} cannot be read just now"),
                    LATER,
                )
                .with("digest", digest)
            }
            EngineError::AdapterSelfCheck { digest, tokens } => {
                Refusal::new(Code::Internal, "NON_FINITE_LOGITS", text)
                    .with("digest", digest)
                    .with("tokens", tokens)
            }
            EngineError::AdapterCapacity {
                digest,
                requested,
                in_use,
                budget,
            } => Refusal::unavailable("ADAPTER_CAPACITY", text, LATER)
                .with("digest", digest)
                .with("requested", requested)
                .with("in_use", in_use)
                .with("budget", budget),
            EngineError::DeviceMemory {
                digest,
                requested,
                free,
            } => Refusal::unavailable("ADAPTER_CAPACITY", text, LATER)
                .with("digest", digest)
                .with("requested", requested)
                .with("free", free),
            EngineError::PinnedCapacity {
                digest,
                requested,
                pinned,
                limit,
            } => Refusal::new(Code::ResourceExhausted, "PINNED_CAPACITY", text)
                .with("digest", digest)
                .with("requested", requested)
                .with("pinned", pinned)
                .with("limit", limit),
            EngineError::AdapterPinned { digest } => {
                Refusal::precondition("RESOURCE_IN_USE", "PINNED", digest.to_string(), text)
            }
            EngineError::AdapterNotResident { digest } => {
                Refusal::precondition("ADAPTER_NOT_RESIDENT", "RESIDENT", digest.to_string(), text)
                    .with("digest", digest)
            }
            EngineError::AdapterInUse { digest, leases } => {
                Refusal::precondition("RESOURCE_IN_USE", "IN_USE", digest.to_string(), text)
                    .with("leases", leases)
            }
            EngineError::DeadlineInQueue { waited_ms } => {
                Refusal::new(Code::DeadlineExceeded, "DEADLINE_IN_QUEUE", text)
                    .with("waited_ms", waited_ms)
            }
            EngineError::DeadlineInDecode { output_tokens } => {
                Refusal::new(Code::DeadlineExceeded, "DEADLINE_IN_DECODE", text)
                    .with("output_tokens", output_tokens)
            }
            EngineError::Cancelled => Refusal::new(Code::Cancelled, "CANCELLED", text),
            EngineError::SlowReader { limit_ms } => {
                Refusal::new(Code::Cancelled, "SLOW_READER", text).with("limit_ms", limit_ms)
            }
            EngineError::NonFiniteLogits { position } => {
                Refusal::new(Code::Internal, "NON_FINITE_LOGITS", text).with("position", position)
            }
            EngineError::ConstraintInvalid { kind, reason } => {
                Refusal::invalid_field(constraint_field(kind), reason).because("CONSTRAINT_INVALID")
            }
            EngineError::ConstraintTooComplex { kind, reason } => {
                Refusal::invalid_field(constraint_field(kind), reason)
                    .because("CONSTRAINT_TOO_COMPLEX")
            }
            EngineError::ConstraintDeadEnd { output_tokens } => {
                Refusal::invalid_field("constraint", text)
                    .because("CONSTRAINT_DEAD_END")
                    .with("output_tokens", output_tokens)
            }
            EngineError::Unsupported { .. } => {
                Refusal::new(Code::Unimplemented, "UNSUPPORTED_BY_MODEL", text)
            }
            EngineError::TrainingCapacity { active, limit } => {
                Refusal::unavailable("TRAINING_CAPACITY", text, LATER)
                    .with("active", active)
                    .with("limit", limit)
            }
            EngineError::TrainingFailed { .. } => {
                Refusal::new(Code::FailedPrecondition, "TRAINING_FAILED", text)
            }
            EngineError::CannotStart { detail } => Refusal::internal(detail),
            EngineError::Stopped => Refusal::unavailable(
                "BACKEND_FAILED",
                "the engine has stopped; another replica answers",
                LATER,
            ),
            EngineError::Internal { detail } => Refusal::internal(detail),
            // The enum is open to other crates: a variant that has no place here yet is ours to fix, not the client's.
            other => Refusal::internal(other),
        }
    }
}

/// The field of a request as the contract spells it; the engine knows a constraint by its kind.
fn constraint_field(kind: &str) -> String {
    match kind {
        "constraint" => kind.to_owned(),
        kind => format!("constraint.{kind}"),
    }
}

impl From<AccessError> for Refusal {
    fn from(error: AccessError) -> Refusal {
        let text = error.to_string();
        match error {
            AccessError::CredentialsMissing => {
                Refusal::new(Code::Unauthenticated, "CREDENTIALS_MISSING", text)
            }
            AccessError::CredentialsInvalid => {
                Refusal::new(Code::Unauthenticated, "CREDENTIALS_INVALID", text)
            }
            AccessError::PermissionDenied {
                permission,
                resource,
            } => Refusal::new(Code::PermissionDenied, "PERMISSION_DENIED", text)
                .with("permission", permission)
                .with("resource", resource),
        }
    }
}

impl From<NameError> for Refusal {
    fn from(error: NameError) -> Refusal {
        Refusal::invalid_field("name", error.to_string())
    }
}

impl From<PageError> for Refusal {
    fn from(error: PageError) -> Refusal {
        let text = error.to_string();
        match error {
            PageError::NegativeSize { given } => {
                Refusal::invalid_field("page_size", text).with("value", given)
            }
            PageError::BadToken => Refusal::invalid_field("page_token", text),
        }
    }
}

impl From<DatabaseError> for Refusal {
    fn from(error: DatabaseError) -> Refusal {
        match error {
            DatabaseError::Closed => Refusal::unavailable(
                "BACKEND_FAILED",
                "the database is closed; another replica answers",
                LATER,
            ),
            DatabaseError::Sqlite(_)
            | DatabaseError::Open { .. }
            | DatabaseError::InUse { .. }
            | DatabaseError::TooNew { .. }
            | DatabaseError::Damaged { .. } => Refusal::internal(error),
        }
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Refusal {
        match error {
            StoreError::NotFound { digest } => Refusal::new(
                Code::DataLoss,
                "ARTIFACT_CORRUPT",
                format!("blob {digest} is missing from the store"),
            )
            .with("digest", digest),
            StoreError::Corrupt { digest, .. } => Refusal::new(
                Code::DataLoss,
                "ARTIFACT_CORRUPT",
                format!("blob {digest} fails its digest"),
            )
            .with("digest", digest),
            StoreError::Io { .. } => Refusal::internal(error),
        }
    }
}

impl From<RegistryError> for Refusal {
    fn from(error: RegistryError) -> Refusal {
        let text = error.to_string();
        match error {
            RegistryError::Access(error) => error.into(),
            RegistryError::TenantNotFound { name } => {
                Refusal::not_found("TENANT_NOT_FOUND", "tenant", name.to_string())
            }
            RegistryError::AdapterNotFound { name } => {
                Refusal::not_found("ADAPTER_NOT_FOUND", "adapter", name.to_string())
            }
            RegistryError::VersionNotFound { name } => Refusal::not_found(
                "ADAPTER_VERSION_NOT_FOUND",
                "adapter version",
                name.to_string(),
            ),
            RegistryError::AliasNotFound { adapter, alias } => Refusal::not_found(
                "ADAPTER_ALIAS_NOT_FOUND",
                "adapter alias",
                format!("{adapter}@{alias}"),
            ),
            RegistryError::AdapterExists { name } => {
                Refusal::already_exists("ADAPTER_EXISTS", "adapter", name.to_string())
            }
            RegistryError::VersionNotActive { name, state, .. } => Refusal::precondition(
                "ADAPTER_VERSION_NOT_ACTIVE",
                "STATE",
                name.to_string(),
                text,
            )
            .with("state", state),
            RegistryError::InUse { resource, by } => in_use(resource, by, text),
            RegistryError::EtagMismatch {
                name,
                given,
                current,
            } => Refusal::new(Code::Aborted, "ETAG_MISMATCH", text)
                .with("resource", name)
                .with("given", given)
                .with("current", current),
            RegistryError::RequestIdReused { request_id } => reused(request_id, text),
            RegistryError::Limit { what, value, limit } => limited(what, value, limit, text),
            RegistryError::Database(error) => error.into(),
        }
    }
}

impl From<TenantError> for Refusal {
    fn from(error: TenantError) -> Refusal {
        let text = error.to_string();
        match error {
            TenantError::Access(error) => error.into(),
            TenantError::TenantNotFound { name } => {
                Refusal::not_found("TENANT_NOT_FOUND", "tenant", name.to_string())
            }
            TenantError::KeyNotFound { name } => {
                Refusal::not_found("API_KEY_NOT_FOUND", "api key", name.to_string())
            }
            TenantError::TenantExists { name } => {
                Refusal::already_exists("TENANT_EXISTS", "tenant", name.to_string())
            }
            TenantError::TenantInUse { name, what } => in_use(name.to_string(), what, text),
            TenantError::InvalidField { field, reason } => Refusal::invalid_field(field, reason),
            TenantError::RequestIdReused { request_id } => reused(request_id, text),
            TenantError::Limit { what, value, limit } => limited(what, value, limit, text),
            TenantError::Database(error) => error.into(),
        }
    }
}

/// A resource that something else still needs.
pub(super) fn in_use(resource: String, by: String, text: String) -> Refusal {
    Refusal::precondition("RESOURCE_IN_USE", "IN_USE", resource.clone(), text)
        .with("resource", resource)
        .with("by", by)
}

/// A request id that stands for something else already.
pub(super) fn reused(request_id: String, text: String) -> Refusal {
    Refusal::new(Code::InvalidArgument, "REQUEST_ID_REUSED", text).with("request_id", request_id)
}

/// A length is the sender's to shorten; a count is the tenant's quota.
pub(super) fn limited(what: &'static str, value: usize, limit: usize, text: String) -> Refusal {
    let refusal = if ["bytes", "length", "characters", "size"]
        .iter()
        .any(|unit| what.contains(unit))
    {
        Refusal::invalid_field(what, text)
    } else {
        Refusal::quota("QUOTA_EXCEEDED", what, text, None)
    };
    refusal.with("value", value).with("limit", limit)
}

impl From<espalier_adapters::report::Report> for Refusal {
    /// An adapter that was checked and refused: the first finding in the message, the counts in the metadata.
    fn from(report: espalier_adapters::report::Report) -> Refusal {
        Refusal::precondition(
            "ADAPTER_INCOMPATIBLE",
            "ADAPTER",
            "adapter",
            report.to_string(),
        )
        .with("errors", report.errors())
    }
}
