//! Tenants and keys between the wire and the tenant store.

use espalier_proto::v1;

use super::adapter::{milliseconds, timestamp};
use crate::names::{KeyParent, TenantId, TenantName};
use crate::status::Refusal;
use crate::tenants::{ApiKey, KeyRole, NewKey, Tenant};

/// A tenant for the wire.
pub(crate) fn tenant(tenant: Tenant) -> v1::Tenant {
    v1::Tenant {
        name: TenantName(tenant.id).to_string(),
        display_name: tenant.display_name,
        create_time: Some(timestamp(tenant.create_time)),
    }
}

/// A key for the wire, without its secret.
pub(crate) fn api_key(key: ApiKey) -> v1::ApiKey {
    let (role, tenants) = match key.role {
        KeyRole::Tenant => (v1::ApiKeyRole::Tenant, Vec::new()),
        KeyRole::Admin => (v1::ApiKeyRole::Admin, Vec::new()),
        KeyRole::Service(tenants) => (
            v1::ApiKeyRole::Service,
            tenants
                .into_iter()
                .map(|tenant| TenantName(tenant).to_string())
                .collect(),
        ),
    };
    v1::ApiKey {
        name: key.name.to_string(),
        display_name: key.display_name,
        role: role.into(),
        tenants,
        create_time: Some(timestamp(key.create_time)),
        expire_time: key.expire_time.map(timestamp),
        revoke_time: key.revoke_time.map(timestamp),
    }
}

/// A new key from the wire: what role under which parent, and no field that the role does not have.
pub(crate) fn new_key(parent: KeyParent, given: v1::ApiKey) -> Result<NewKey, Refusal> {
    let role = v1::ApiKeyRole::try_from(given.role).map_err(|_| {
        Refusal::invalid_field("api_key.role", format!("{} is no role", given.role))
    })?;
    if role != v1::ApiKeyRole::Service && !given.tenants.is_empty() {
        return Err(Refusal::invalid_field(
            "api_key.tenants",
            "only a SERVICE key lists tenants",
        ));
    }
    let role = match (role, &parent) {
        (v1::ApiKeyRole::Unspecified, KeyParent::Tenant(_)) | (v1::ApiKeyRole::Tenant, _) => {
            KeyRole::Tenant
        }
        (v1::ApiKeyRole::Unspecified, KeyParent::Server) => {
            return Err(Refusal::invalid_field(
                "api_key.role",
                "it must be SERVICE or ADMIN under tenants/-",
            ));
        }
        (v1::ApiKeyRole::Admin, _) => KeyRole::Admin,
        (v1::ApiKeyRole::Service, _) => KeyRole::Service(
            given
                .tenants
                .iter()
                .map(|name| tenant_name("api_key.tenants", name))
                .collect::<Result<_, _>>()?,
        ),
    };
    let expire_time = given
        .expire_time
        .map(|time| {
            milliseconds(&time).ok_or_else(|| {
                Refusal::invalid_field("api_key.expire_time", "it is no time that can be kept")
            })
        })
        .transpose()?;
    Ok(NewKey {
        parent,
        role,
        display_name: given.display_name,
        expire_time,
    })
}

/// `tenants/{t}` in a field.
pub(crate) fn tenant_name(field: &str, text: &str) -> Result<TenantId, Refusal> {
    TenantName::parse(text)
        .map(|name| name.0)
        .map_err(|error| Refusal::invalid_field(field, error.to_string()))
}
