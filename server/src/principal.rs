//! One caller, as the authentication layer found it; carried with the request and asked before anything is looked up.
//!
//! The rule of authorisation is one line: a caller may touch a tenant's resources when its key is that tenant's or a service
//! key. It is asked before existence is checked, so that a refusal says nothing about what exists. This file must not know
//! how keys are stored (`tenants`) or how refusals look on the wire (`status`).

use crate::names::{ApiKeyId, TenantId};

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    /// The server has no key at all and listens on loopback only: the caller is trusted with everything.
    LocalAnonymous,
    /// Tenant keys exist but no service key yet, the server listens on loopback only, and the caller showed no key: it may
    /// manage tenants and keys (otherwise the first tenant's key would lock the operator out) and nothing else.
    LocalBootstrap,
    /// A key of one tenant.
    Tenant {
        /// The only tenant it may act for.
        tenant: TenantId,
        /// The key, for logs and limits.
        key: ApiKeyId,
    },
    /// A service's key: acts for every tenant, which the resource's name says, and manages tenants and keys.
    Service {
        /// The key, for logs and limits.
        key: ApiKeyId,
    },
}

/// Why a caller may not do what it asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// The call needs a key and came without one.
    #[error("the request carries no API key: send it as metadata 'authorization: Bearer <key>'")]
    CredentialsMissing,
    /// The key is not one of ours, is revoked, or its secret is wrong: which of these is not said.
    #[error("the API key is not valid")]
    CredentialsInvalid,
    /// The key is good but not for this resource.
    #[error("permission '{permission}' denied on resource '{resource}' (or it might not exist)")]
    PermissionDenied {
        /// What was asked, for example `tenant.use`.
        permission: &'static str,
        /// The tenant or server part it was asked on.
        resource: String,
    },
}

impl Principal {
    /// May the caller use the resources of `tenant`? The answer does not depend on whether the tenant exists.
    pub fn authorize(&self, tenant: &TenantId) -> Result<(), AccessError> {
        match self {
            Self::LocalAnonymous | Self::Service { .. } => Ok(()),
            Self::Tenant { tenant: own, .. } if own == tenant => Ok(()),
            Self::LocalBootstrap => Err(AccessError::CredentialsMissing),
            Self::Tenant { .. } => Err(AccessError::PermissionDenied {
                permission: "tenant.use",
                resource: format!("tenants/{tenant}"),
            }),
        }
    }

    /// May the caller use what belongs to no tenant: the base model, its tokenizer, the server's description?
    pub fn authorize_base(&self) -> Result<(), AccessError> {
        match self {
            Self::LocalBootstrap => Err(AccessError::CredentialsMissing),
            _ => Ok(()),
        }
    }

    /// May the caller create tenants and service keys, and list all tenants?
    pub fn authorize_admin(&self) -> Result<(), AccessError> {
        match self {
            Self::LocalAnonymous | Self::LocalBootstrap | Self::Service { .. } => Ok(()),
            Self::Tenant { .. } => Err(AccessError::PermissionDenied {
                permission: "tenants.manage",
                resource: "tenants".to_owned(),
            }),
        }
    }

    /// May the caller make, list and revoke the keys of `tenant`?
    pub fn authorize_keys(&self, tenant: &TenantId) -> Result<(), AccessError> {
        match self {
            Self::LocalBootstrap => Ok(()),
            _ => self.authorize(tenant),
        }
    }

    /// The tenant of a tenant key; `None` for callers that act for many.
    pub fn tenant(&self) -> Option<&TenantId> {
        match self {
            Self::Tenant { tenant, .. } => Some(tenant),
            _ => None,
        }
    }

    /// The key that was shown, if any.
    pub fn key(&self) -> Option<&ApiKeyId> {
        match self {
            Self::Tenant { key, .. } | Self::Service { key } => Some(key),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    fn id(text: &str) -> TenantId {
        TenantId::parse(text).unwrap()
    }

    #[test]
    fn a_tenant_key_reaches_its_own_tenant_only() {
        let caller = Principal::Tenant {
            tenant: id("acme"),
            key: ApiKeyId::parse("k1").unwrap(),
        };
        assert_eq!(caller.authorize(&id("acme")), Ok(()));
        assert!(matches!(
            caller.authorize(&id("globex")),
            Err(AccessError::PermissionDenied { .. })
        ));
        assert!(caller.authorize_admin().is_err());
        assert!(caller.authorize_keys(&id("globex")).is_err());
        assert!(caller.authorize_base().is_ok());
    }

    #[test]
    fn a_bootstrap_caller_manages_tenants_and_nothing_else() {
        let caller = Principal::LocalBootstrap;
        assert!(caller.authorize_admin().is_ok());
        assert!(caller.authorize_keys(&id("acme")).is_ok());
        assert_eq!(
            caller.authorize(&id("acme")),
            Err(AccessError::CredentialsMissing)
        );
        assert_eq!(
            caller.authorize_base(),
            Err(AccessError::CredentialsMissing)
        );
    }
}
