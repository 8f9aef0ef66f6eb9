//! `espalier tenants`: tenants and the keys that act for them.

use clap::{Args, Subcommand};
use serde_json::json;

use crate::{
    cli::{
        PAGE, Session,
        adapters::deleted,
        all_pages, json,
        output::{Failure, age},
    },
    names::short,
    v1::{self, ApiKeyRole},
};

/// Create, list and delete tenants and their keys.
#[derive(Debug, Subcommand)]
pub(crate) enum Tenants {
    /// Register a tenant and print a key of it, this once.
    Create(Create),
    /// The tenants that the key may act for.
    #[command(visible_alias = "ls")]
    List(List),
    /// Delete a tenant.
    #[command(visible_alias = "rm")]
    Delete(Delete),
    /// Make, list and revoke keys.
    #[command(subcommand)]
    Keys(Keys),
}

/// Register a tenant.
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Its id: a-z, 0-9 and -.
    tenant: String,
    /// For people.
    #[arg(long, default_value = "")]
    display_name: String,
    /// Make no key.
    #[arg(long)]
    no_key: bool,
}

/// The tenants that the key may act for.
#[derive(Debug, Args)]
pub(crate) struct List {}

/// Delete a tenant.
#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// The tenant.
    tenant: String,
    /// Delete all that it owns too.
    #[arg(long)]
    force: bool,
}

/// Make, list and revoke keys.
#[derive(Debug, Subcommand)]
pub(crate) enum Keys {
    /// Make a key and print it, this once.
    Create(CreateKey),
    /// Keys, without their secrets.
    #[command(visible_alias = "ls")]
    List(ListKeys),
    /// End a key at once.
    Revoke(Revoke),
}

/// Make a key.
#[derive(Debug, Args)]
pub(crate) struct CreateKey {
    /// Whose key. Left out with --service and --admin.
    #[arg(required_unless_present_any = ["service", "admin"])]
    tenant: Option<String>,
    /// A key that may act for many tenants.
    #[arg(long, conflicts_with_all = ["tenant", "admin"])]
    service: bool,
    /// For --service: the tenants that it may act for; left out: all.
    #[arg(long, value_delimiter = ',', requires = "service")]
    only: Vec<String>,
    /// A key that may manage tenants and keys too.
    #[arg(long, conflicts_with = "tenant")]
    admin: bool,
    /// For people.
    #[arg(long, default_value = "")]
    display_name: String,
}

/// Keys, without their secrets.
#[derive(Debug, Args)]
pub(crate) struct ListKeys {
    /// Whose keys; left out: the service and admin keys.
    tenant: Option<String>,
}

/// End a key at once.
#[derive(Debug, Args)]
pub(crate) struct Revoke {
    /// `tenants/T/apiKeys/K`, as `keys list` shows it.
    key: String,
}

impl Tenants {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let Session { client, out } = session;
        match self {
            Self::Create(command) => command.run(session).await,
            Self::List(_) => list(session).await,
            Self::Delete(Delete { tenant, force }) => {
                let name = client.names().tenant(&tenant);
                client.delete_tenant(&name, force).await?;
                deleted(*out, &name)
            }
            Self::Keys(Keys::Create(command)) => command.run(session).await,
            Self::Keys(Keys::List(command)) => command.run(session).await,
            Self::Keys(Keys::Revoke(Revoke { key })) => {
                let key = client
                    .revoke_api_key(&client.names().api_key(&key)?)
                    .await?;
                if out.is_json() {
                    return out.document(&key);
                }
                out.line(format_args!("revoked {}", key.name))
            }
        }
    }
}

impl Create {
    async fn run(self, session: &Session) -> Result<(), Failure> {
        let Session { client, out } = session;
        let request = v1::CreateTenantRequest {
            tenant_id: self.tenant.trim_start_matches("tenants/").to_owned(),
            tenant: Some(v1::Tenant {
                display_name: self.display_name,
                ..Default::default()
            }),
            request_id: String::new(),
        };
        let tenant = client.create_tenant(request).await?;
        let key = if self.no_key {
            None
        } else {
            let request = v1::CreateApiKeyRequest {
                parent: tenant.name.clone(),
                api_key: Some(v1::ApiKey {
                    role: ApiKeyRole::Tenant.into(),
                    ..Default::default()
                }),
            };
            Some(client.create_api_key(request).await?)
        };
        if out.is_json() {
            let key = key.as_ref().map(json::value);
            return out.json_document(&json!({"tenant": json::value(&tenant), "key": key}));
        }
        out.remark(format_args!("{} is registered", tenant.name));
        match key {
            Some(key) => print_secret(session, &key),
            None => out.line(tenant.name),
        }
    }
}

/// The secret alone on stdout, so that it can be captured; the warning beside it.
fn print_secret(session: &Session, key: &v1::CreateApiKeyResponse) -> Result<(), Failure> {
    let name = key.api_key.as_ref().map_or("", |key| key.name.as_str());
    session
        .out
        .remark(format_args!("the secret of {name}, shown this once:"));
    session.out.line(&key.secret)?;
    session.out.remark("use it with --key or ESPALIER_API_KEY");
    Ok(())
}

impl CreateKey {
    async fn run(self, session: &Session) -> Result<(), Failure> {
        let Session { client, out } = session;
        let names = client.names();
        let role = match (self.admin, self.service) {
            (true, _) => ApiKeyRole::Admin,
            (_, true) => ApiKeyRole::Service,
            _ => ApiKeyRole::Tenant,
        };
        let parent = match &self.tenant {
            Some(tenant) => names.tenant(tenant),
            None => "tenants/-".to_owned(),
        };
        let request = v1::CreateApiKeyRequest {
            parent,
            api_key: Some(v1::ApiKey {
                display_name: self.display_name,
                role: role.into(),
                tenants: self
                    .only
                    .iter()
                    .map(|tenant| names.tenant(tenant))
                    .collect(),
                ..Default::default()
            }),
        };
        let key = client.create_api_key(request).await?;
        if out.is_json() {
            return out.document(&key);
        }
        print_secret(session, &key)
    }
}

impl ListKeys {
    async fn run(self, Session { client, out }: &Session) -> Result<(), Failure> {
        let parent = client.names().tenant(self.tenant.as_deref().unwrap_or("-"));
        let keys = all_pages(|page_token| async {
            let parent = parent.clone();
            let request = v1::ListApiKeysRequest {
                parent,
                page_size: PAGE,
                page_token,
            };
            let page = client.list_api_keys(request).await?;
            Ok((page.api_keys, page.next_page_token))
        })
        .await?;
        if out.is_json() {
            return out.documents(&keys);
        }
        let row = |key: &v1::ApiKey| {
            let role = key
                .role()
                .as_str_name()
                .trim_start_matches("API_KEY_ROLE_")
                .to_lowercase();
            let state = if key.revoke_time.is_some() {
                "revoked"
            } else {
                "active"
            };
            vec![
                key.name.clone(),
                role,
                state.to_owned(),
                age(key.create_time.as_ref()),
                key.display_name.clone(),
            ]
        };
        let rows: Vec<_> = keys.iter().map(row).collect();
        out.table(
            &["KEY", "ROLE", "STATE", "MADE", "DISPLAY NAME"],
            &rows,
            "no keys",
        )
    }
}

async fn list(Session { client, out }: &Session) -> Result<(), Failure> {
    let tenants = all_pages(|page_token| async {
        let request = v1::ListTenantsRequest {
            page_size: PAGE,
            page_token,
        };
        let page = client.list_tenants(request).await?;
        Ok((page.tenants, page.next_page_token))
    })
    .await?;
    if out.is_json() {
        return out.documents(&tenants);
    }
    let row = |tenant: &v1::Tenant| {
        let name = short(&tenant.name).to_owned();
        vec![
            name,
            age(tenant.create_time.as_ref()),
            tenant.display_name.clone(),
        ]
    };
    let rows: Vec<_> = tenants.iter().map(row).collect();
    let empty = "no tenants yet; `espalier tenants create NAME` registers one";
    out.table(&["TENANT", "MADE", "DISPLAY NAME"], &rows, empty)
}
