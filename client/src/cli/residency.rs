//! `espalier adapters residency|warm|pin|unpin|merge`: what is in the server's memory, and what is to be.

use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::{
    cli::{
        PAGE, Session, all_pages,
        output::{Failure, Out, age, bytes, seconds_of},
    },
    v1,
};

const HEAD: [&str; 9] = [
    "VERSION",
    "LEVEL",
    "SIZE",
    "IN USE",
    "REQUESTS",
    "LOAD",
    "MERGED",
    "LAST USED",
    "ERROR",
];

/// What is in the server's memory right now.
#[derive(Debug, Args)]
pub(crate) struct Residency {
    /// One version only (NAME, NAME@ALIAS or NAME/VERSION), also when it is not in memory.
    name: Option<String>,
}

impl Residency {
    pub(crate) async fn run(self, Session { client, out }: &Session) -> Result<(), Failure> {
        if let Some(name) = &self.name {
            let name = client.names().adapter(name)?;
            return show(*out, client.get_residency(&name).await?);
        }
        let parent = client.names().parent()?;
        let memory = std::sync::Mutex::new(v1::ListResidencyResponse::default());
        let residency = all_pages(|page_token| async {
            let parent = parent.clone();
            let request = v1::ListResidencyRequest {
                parent,
                page_size: PAGE,
                page_token,
            };
            let mut page = client.list_residency(request).await?;
            let (entries, next) = (
                std::mem::take(&mut page.residency),
                std::mem::take(&mut page.next_page_token),
            );
            *memory
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner) = page;
            Ok((entries, next))
        })
        .await?;
        if out.is_json() {
            return out.documents(&residency);
        }
        let rows: Vec<_> = residency.iter().map(row).collect();
        out.table(&HEAD, &rows, "nothing of this tenant is in memory")?;
        let memory = memory
            .into_inner()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        out.remark(format_args!(
            "[all tenants: {} of {} used, {} of {} pinned, {} of {} merged]",
            bytes(memory.used_bytes),
            bytes(memory.budget_bytes),
            bytes(memory.pinned_bytes),
            bytes(memory.pinned_budget_bytes),
            bytes(memory.merged_bytes),
            bytes(memory.merged_budget_bytes),
        ));
        Ok(())
    }
}

/// Bring a version into memory.
#[derive(Debug, Args)]
pub(crate) struct Warm {
    /// NAME, NAME@ALIAS or NAME/VERSION; several may be named.
    #[arg(required = true)]
    names: Vec<String>,
    /// Do not wait until it is there.
    #[arg(long)]
    no_wait: bool,
}

impl Warm {
    pub(crate) async fn run(self, Session { client, out }: &Session) -> Result<(), Failure> {
        for name in &self.names {
            let name = client.names().adapter(name)?;
            show(
                *out,
                client.warm_adapter_version(&name, !self.no_wait).await?,
            )?;
        }
        Ok(())
    }
}

/// Keep a version in memory.
#[derive(Debug, Args)]
pub(crate) struct Pin {
    /// NAME, NAME@ALIAS or NAME/VERSION: the version that it means now.
    name: String,
}

impl Pin {
    pub(crate) async fn run(self, Session { client, out }: &Session) -> Result<(), Failure> {
        let name = client.names().adapter(&self.name)?;
        show(*out, client.pin_adapter_version(&name).await?)
    }
}

/// Let a version be evicted again.
#[derive(Debug, Args)]
pub(crate) struct Unpin {
    /// NAME, NAME@ALIAS or NAME/VERSION.
    name: String,
}

impl Unpin {
    pub(crate) async fn run(self, Session { client, out }: &Session) -> Result<(), Failure> {
        let name = client.names().adapter(&self.name)?;
        show(*out, client.unpin_adapter_version(&name).await?)
    }
}

/// The policies by the names that people type.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Policy {
    /// While it dominates traffic and that pays.
    Auto,
    /// From the first request on, as far as the server's budget goes.
    Merged,
    /// Never.
    Unmerged,
}

/// Say whether a version may be served from merged weights.
#[derive(Debug, Args)]
pub(crate) struct Merge {
    /// NAME, NAME@ALIAS or NAME/VERSION.
    name: String,
    /// When.
    policy: Policy,
}

impl Merge {
    pub(crate) async fn run(self, Session { client, out }: &Session) -> Result<(), Failure> {
        let name = client.names().adapter(&self.name)?;
        let policy = match self.policy {
            Policy::Auto => v1::MergePolicy::Auto,
            Policy::Merged => v1::MergePolicy::Merged,
            Policy::Unmerged => v1::MergePolicy::Unmerged,
        };
        let version = client.set_merge_policy(&name, policy).await?;
        if out.is_json() {
            return out.document(&version);
        }
        let policy = version.merge_policy().as_str_name();
        let policy = policy.trim_start_matches("MERGE_POLICY_").to_lowercase();
        out.line(format_args!("{} is {policy}", version.name))
    }
}

fn show(out: Out, entry: v1::AdapterResidency) -> Result<(), Failure> {
    if out.is_json() {
        return out.document(&entry);
    }
    out.table(&HEAD, &[row(&entry)], "")
}

fn row(entry: &v1::AdapterResidency) -> Vec<String> {
    let level = entry.level().as_str_name();
    let mut level = level.trim_start_matches("RESIDENCY_LEVEL_").to_lowercase();
    if entry.pinned {
        level.push_str(", pinned");
    }
    let load = entry.load_duration.as_ref().map_or(0.0, seconds_of);
    let merged = match entry.merge_state() {
        v1::MergeState::Unspecified => "-".to_owned(),
        v1::MergeState::Merging => "merging".to_owned(),
        v1::MergeState::Merged => bytes(entry.merged_bytes),
    };
    vec![
        entry.version.clone(),
        level,
        bytes(entry.bytes),
        entry.leases.to_string(),
        entry.requests.to_string(),
        format!("{:.1?}", Duration::from_secs_f64(load.max(0.0))),
        merged,
        age(entry.last_used_time.as_ref()),
        entry.error.clone(),
    ]
}
