//! One caller, as the authentication layer found it; carried with the request and asked before anything is looked up.
//!
//! The rule of authorisation is one line: a caller may touch a tenant's resources when its key is that tenant's or a service
//! key. It is asked before existence is checked, so that a refusal says nothing about what exists. This file must not know
//! how keys are stored (`tenants`) or how refusals look on the wire (`status`).

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::names::{ApiKeyId, TenantId};

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    /// The server has no key at all and listens on loopback only: the caller is trusted with everything.
    LocalAnonymous,
    /// Keys exist but no admin key yet, the server listens on loopback only, and the caller showed no key: it may
    /// manage tenants and keys (otherwise the first tenant's key would lock the operator out) and nothing else.
    LocalBootstrap,
    /// A key of one tenant.
    Tenant {
        /// The only tenant it may act for.
        tenant: TenantId,
        /// The key, for logs and limits.
        key: ApiKeyId,
    },
    /// A service's key: acts for many tenants; which one, the resource's name says.
    Service {
        /// The key, for logs and limits.
        key: ApiKeyId,
        /// The tenants that it may act for; `None` is all of them.
        tenants: Option<Arc<BTreeSet<TenantId>>>,
    },
    /// An admin key, or the service key of the configuration: every tenant, and the management of tenants and keys.
    Admin {
        /// The key; `None` is the configured one.
        key: Option<ApiKeyId>,
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
        let allowed = match self {
            Self::LocalBootstrap => return Err(AccessError::CredentialsMissing),
            Self::LocalAnonymous | Self::Admin { .. } => true,
            Self::Tenant { tenant: own, .. } => own == tenant,
            Self::Service { tenants, .. } => {
                tenants.as_ref().is_none_or(|some| some.contains(tenant))
            }
        };
        if allowed {
            Ok(())
        } else {
            Err(AccessError::PermissionDenied {
                permission: "tenant.use",
                resource: format!("tenants/{tenant}"),
            })
        }
    }

    /// May the caller use what belongs to no tenant: the base model, its tokenizer, the server's description?
    pub fn authorize_base(&self) -> Result<(), AccessError> {
        match self {
            Self::LocalBootstrap => Err(AccessError::CredentialsMissing),
            _ => Ok(()),
        }
    }

    /// May the caller create, list and delete tenants, and make keys?
    pub fn authorize_admin(&self) -> Result<(), AccessError> {
        match self {
            Self::LocalAnonymous | Self::LocalBootstrap | Self::Admin { .. } => Ok(()),
            Self::Tenant { .. } | Self::Service { .. } => Err(AccessError::PermissionDenied {
                permission: "tenants.manage",
                resource: "tenants".to_owned(),
            }),
        }
    }

    /// May the caller read `tenant` and list its keys?
    pub fn authorize_tenant_read(&self, tenant: &TenantId) -> Result<(), AccessError> {
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

    /// The stored key that was shown, if any.
    pub fn key(&self) -> Option<&ApiKeyId> {
        match self {
            Self::Tenant { key, .. } | Self::Service { key, .. } => Some(key),
            Self::Admin { key } => key.as_ref(),
            Self::LocalAnonymous | Self::LocalBootstrap => None,
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
        assert!(caller.authorize_tenant_read(&id("globex")).is_err());
        assert!(caller.authorize_base().is_ok());
    }

    #[test]
    fn a_service_key_reaches_the_tenants_it_lists_and_manages_none() {
        let key = ApiKeyId::parse("k2").unwrap();
        let some = Principal::Service {
            key: key.clone(),
            tenants: Some(Arc::new([id("acme"), id("initech")].into())),
        };
        assert!(some.authorize(&id("initech")).is_ok());
        assert!(some.authorize(&id("globex")).is_err());
        assert!(some.authorize_admin().is_err());
        let all = Principal::Service { key, tenants: None };
        assert!(all.authorize(&id("globex")).is_ok());
    }

    #[test]
    fn a_bootstrap_caller_manages_tenants_and_nothing_else() {
        let caller = Principal::LocalBootstrap;
        assert!(caller.authorize_admin().is_ok());
        assert!(caller.authorize_tenant_read(&id("acme")).is_ok());
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
