//! `espalier adapters`: what a tenant has, a dry run of a directory, files in and out, aliases.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;

use crate::{
    cli::{
        PAGE, Session, all_pages,
        check::Check,
        json,
        output::{Failure, Out, age, bytes},
        residency::{Merge, Pin, Residency, Unpin, Warm},
        sampling::Part,
    },
    error::Error,
    names::{adapter_of, short},
    transfer::AdapterUpload,
    v1,
};

/// List, check, push, pull, delete adapters and move their aliases.
#[derive(Debug, Subcommand)]
pub(crate) enum Adapters {
    /// A tenant's adapters, or one adapter's versions.
    #[command(visible_alias = "ls")]
    List(List),
    /// One adapter or version with all its fields, as JSON.
    Get(Get),
    /// Check a PEFT directory without uploading it; the whole report is printed.
    Check(Check),
    /// Upload a PEFT directory as a new version.
    Push(Push),
    /// Download a version, as a PEFT directory or for another runtime.
    Pull(Pull),
    /// Add up versions, each times its weight, into a new version.
    Combine(Combine),
    /// Delete an adapter or one version.
    #[command(visible_alias = "rm")]
    Delete(Delete),
    /// Point aliases at versions, or remove them, all in one step.
    Alias(Alias),
    /// What is in the server's memory right now.
    Residency(Residency),
    /// Bring a version into memory before anybody asks for it.
    Warm(Warm),
    /// Keep a version in memory, also after a restart.
    Pin(Pin),
    /// Let a pinned version be evicted again.
    Unpin(Unpin),
    /// Say whether a version may be served from merged weights.
    Merge(Merge),
}

impl Adapters {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::List(command) => command.run(session).await,
            Self::Get(command) => command.run(session).await,
            Self::Check(command) => {
                let shape = command.shape_of(&session.client).await;
                command.run(shape, session.out)
            }
            Self::Push(command) => command.run(session).await,
            Self::Pull(command) => command.run(session).await,
            Self::Combine(command) => command.run(session).await,
            Self::Delete(command) => command.run(session).await,
            Self::Alias(command) => command.run(session).await,
            Self::Residency(command) => command.run(session).await,
            Self::Warm(command) => command.run(session).await,
            Self::Pin(command) => command.run(session).await,
            Self::Unpin(command) => command.run(session).await,
            Self::Merge(command) => command.run(session).await,
        }
    }
}

/// A tenant's adapters, or one adapter's versions.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// The adapter whose versions are listed.
    adapter: Option<String>,
}

impl List {
    async fn run(self, session: &Session) -> Result<(), Failure> {
        match &self.adapter {
            Some(name) => list_versions(session, name).await,
            None => list_adapters(session).await,
        }
    }
}

async fn list_adapters(Session { client, out }: &Session) -> Result<(), Failure> {
    let parent = client.names().parent()?;
    let adapters = all_pages(|page_token| async {
        let parent = parent.clone();
        let request = v1::ListAdaptersRequest {
            parent,
            page_size: PAGE,
            page_token,
        };
        let page = client.list_adapters(request).await?;
        Ok((page.adapters, page.next_page_token))
    })
    .await?;
    if out.is_json() {
        return out.documents(&adapters);
    }
    let row = |adapter: &v1::Adapter| {
        let alias = |a: &v1::AdapterAlias| format!("{}={}", a.alias, short(&a.version));
        vec![
            short(&adapter.name).to_owned(),
            adapter.version_count.to_string(),
            adapter
                .aliases
                .iter()
                .map(alias)
                .collect::<Vec<_>>()
                .join(" "),
            age(adapter.update_time.as_ref()),
            adapter.description.clone(),
        ]
    };
    let rows: Vec<_> = adapters.iter().map(row).collect();
    let head = ["ADAPTER", "VERSIONS", "ALIASES", "CHANGED", "DESCRIPTION"];
    out.table(
        &head,
        &rows,
        "no adapters yet; make one with `espalier train` or `espalier adapters push`",
    )
}

async fn list_versions(Session { client, out }: &Session, name: &str) -> Result<(), Failure> {
    let parent = client.names().adapter(name)?;
    let versions = all_pages(|page_token| async {
        let parent = adapter_of(&parent).to_owned();
        let request = v1::ListAdapterVersionsRequest {
            parent,
            page_size: PAGE,
            page_token,
        };
        let page = client.list_adapter_versions(request).await?;
        Ok((page.versions, page.next_page_token))
    })
    .await?;
    if out.is_json() {
        return out.documents(&versions);
    }
    let row = |version: &v1::AdapterVersion| {
        let config = version.config.clone().unwrap_or_default();
        let metric = |(name, value): (&String, &f64)| format!("{name}={value:.3}");
        let from = if version.training_job.is_empty() {
            version.combination.as_ref().map_or("upload", |_| "combine")
        } else {
            short(&version.training_job)
        };
        vec![
            short(&version.name).to_owned(),
            version.aliases.join(" "),
            version.digest.chars().take(12).collect(),
            config.rank.map_or("-".to_owned(), |rank| rank.to_string()),
            version.labels.len().to_string(),
            bytes(version.size_bytes),
            version
                .metrics
                .iter()
                .map(metric)
                .collect::<Vec<_>>()
                .join(" "),
            from.to_owned(),
            age(version.create_time.as_ref()),
        ]
    };
    let rows: Vec<_> = versions.iter().map(row).collect();
    let head = [
        "VERSION", "ALIASES", "DIGEST", "RANK", "LABELS", "SIZE", "METRICS", "FROM", "MADE",
    ];
    out.table(&head, &rows, "no versions yet")
}

/// One adapter or version with all its fields.
#[derive(Debug, Args)]
pub(crate) struct Get {
    /// NAME for the adapter, NAME@ALIAS or NAME/VERSION for a version.
    name: String,
}

impl Get {
    async fn run(self, Session { client, out }: &Session) -> Result<(), Failure> {
        let name = client.names().adapter(&self.name)?;
        if adapter_of(&name) == name {
            out.document(&client.get_adapter(&name).await?)
        } else {
            out.document(&client.get_adapter_version(&name).await?)
        }
    }
}

/// Upload a PEFT directory as a new version.
#[derive(Debug, Args)]
pub(crate) struct Push {
    /// Holds `adapter_config.json` and `adapter_model.safetensors`.
    dir: PathBuf,
    /// The adapter that receives it; registered when its name is new. Left out: the directory's name.
    #[arg(long, short)]
    adapter: Option<String>,
    /// An alias that moves to the new version; may be given several times.
    #[arg(long, default_value = "default")]
    alias: Vec<String>,
    /// Move no alias.
    #[arg(long, conflicts_with = "alias")]
    no_alias: bool,
    /// A serving profile: JSON in the form of the contract's ServingProfile.
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// For people; used when the adapter is new.
    #[arg(long, default_value = "")]
    description: String,
    /// Let the server check everything and store nothing.
    #[arg(long)]
    dry_run: bool,
}

impl Push {
    async fn run(self, Session { client, out }: &Session) -> Result<(), Failure> {
        let adapter = match &self.adapter {
            Some(name) => name.clone(),
            None => directory_name(&self.dir)?,
        };
        let profile = self.profile.as_deref().map(read_profile).transpose()?;
        let upload = AdapterUpload {
            adapter: client.names().adapter(&adapter)?,
            dir: self.dir,
            profile,
            set_aliases: if self.no_alias {
                Vec::new()
            } else {
                self.alias
            },
            validate_only: self.dry_run,
            create_if_missing: true,
            description: self.description,
            request_id: String::new(),
        };
        let reply = client.upload_adapter(upload).await?;
        let accepted = reply.report.as_ref().is_none_or(|report| report.accepted);
        if out.is_json() {
            out.document(&reply)?;
        } else {
            print_findings(*out, reply.report.as_ref())?;
            match reply.version {
                Some(version) if !version.name.is_empty() => {
                    out.line(format_args!("{} ({})", version.name, version.digest))?;
                    if !version.aliases.is_empty() {
                        out.remark(format_args!("[now {}]", version.aliases.join(", ")));
                    }
                }
                _ => out.line(if accepted {
                    "would be accepted"
                } else {
                    "would be refused"
                })?,
            }
        }
        if accepted {
            Ok(())
        } else {
            Err(Failure::Refused)
        }
    }
}

fn directory_name(dir: &Path) -> Result<String, Failure> {
    let whole = dir
        .canonicalize()
        .map_err(|e| Failure::from(Error::file(dir, &e)))?;
    let name = whole
        .file_name()
        .map(|name| name.to_string_lossy().to_lowercase());
    name.ok_or_else(|| Failure::Usage("the directory has no name: pass --adapter".to_owned()))
}

pub(crate) fn read_profile(path: &Path) -> Result<v1::ServingProfile, Error> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::file(path, &error))?;
    json::parse(&path.display().to_string(), &text)
}

fn print_findings(out: Out, report: Option<&v1::ValidationReport>) -> Result<(), Failure> {
    for finding in report.map(|report| &report.findings).into_iter().flatten() {
        let severity = finding
            .severity()
            .as_str_name()
            .trim_start_matches("SEVERITY_")
            .to_lowercase();
        let mut text = format!(
            "{severity} [{}] {}: found {}",
            finding.rule, finding.subject, finding.found
        );
        if !finding.expected.is_empty() {
            text.push_str(&format!(", expected {}", finding.expected));
        }
        if !finding.next_step.is_empty() {
            text.push_str(&format!("; {}", finding.next_step));
        }
        out.line(text)?;
    }
    Ok(())
}

/// What a download becomes.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Format {
    /// A PEFT directory, byte for byte as it was uploaded or trained.
    #[default]
    Peft,
    /// A GGUF adapter, for llama.cpp's --lora beside a GGUF of the same base.
    Gguf,
    /// The stored files, also where only the server reads them: a head with hidden layers.
    Stored,
}

/// Download a version, as a PEFT directory or for another runtime.
#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// NAME, NAME@ALIAS or NAME/VERSION.
    name: String,
    /// Where it goes: a directory for peft and stored, a file for gguf. Left out: the adapter's name, for gguf with .gguf behind it.
    to: Option<PathBuf>,
    /// The format.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Pull {
    async fn run(self, Session { client, out }: &Session) -> Result<(), Failure> {
        let name = client.names().adapter(&self.name)?;
        let own = short(adapter_of(&name));
        let (to, version) = match self.format {
            Format::Peft => {
                let dir = self.to.unwrap_or_else(|| PathBuf::from(own));
                let version = client.download_adapter(&name, &dir).await?;
                (dir, version)
            }
            Format::Stored => {
                let dir = self.to.unwrap_or_else(|| PathBuf::from(own));
                let version = client.download_stored(&name, &dir).await?;
                (dir, version)
            }
            Format::Gguf => {
                let file = self.to.unwrap_or_else(|| format!("{own}.gguf").into());
                let version = client.download_gguf(&name, &file).await?;
                (file, version)
            }
        };
        if out.is_json() {
            return out.document(&version);
        }
        let size = version.parts.iter().map(|part| part.size_bytes).sum();
        out.line(format_args!("{} in {}", version.name, to.display()))?;
        out.remark(format_args!("[{}, digest {}]", bytes(size), version.digest));
        Ok(())
    }
}

/// Add up versions, each times its weight, into a new version.
#[derive(Debug, Args)]
pub(crate) struct Combine {
    /// The adapter that gets the new version; registered when its name is new.
    adapter: String,
    /// A version and its weight: NAME, NAME@ALIAS or NAME/VERSION, and =WEIGHT unless it is 1.
    #[arg(required = true, value_name = "ADAPTER[=WEIGHT]", value_parser = Part::parse)]
    terms: Vec<Part>,
    /// Cut each module to this rank; left out, the sum is exact and its rank the sum of the ranks.
    #[arg(long)]
    rank: Option<u32>,
    /// An alias that moves to the new version; may be given several times.
    #[arg(long)]
    alias: Vec<String>,
    /// For people; used when the adapter is new.
    #[arg(long, default_value = "")]
    description: String,
}

impl Combine {
    async fn run(self, Session { client, out }: &Session) -> Result<(), Failure> {
        let parts = self.terms.iter().map(Part::weighted);
        let request = v1::CombineAdaptersRequest {
            parent: client.names().adapter(&self.adapter)?,
            terms: client.mixture(parts)?.adapters,
            rank: self.rank,
            set_aliases: self.alias,
            create_if_missing: true,
            description: self.description,
            ..Default::default()
        };
        let version = client.combine_adapters(request).await?;
        if out.is_json() {
            return out.document(&version);
        }
        out.line(format_args!("{} ({})", version.name, version.digest))?;
        let made = version.combination.unwrap_or_default();
        for parent in &made.parents {
            let digest: String = parent.digest.chars().take(12).collect();
            out.line(format_args!(
                "  {} x {} ({digest})",
                parent.weight,
                short(&parent.version)
            ))?;
        }
        let rank = version.config.and_then(|config| config.rank).unwrap_or(0);
        out.remark(format_args!(
            "[rank {rank}, relative error {:.3e}]",
            made.relative_error
        ));
        Ok(())
    }
}

/// Delete an adapter or one version.
#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// NAME for the adapter, NAME/VERSION for a version.
    name: String,
    /// Delete an adapter's versions and aliases too.
    #[arg(long)]
    force: bool,
}

impl Delete {
    async fn run(self, Session { client, out }: &Session) -> Result<(), Failure> {
        let name = client.names().adapter(&self.name)?;
        if name.contains('@') {
            return Err(Failure::Usage(format!(
                "{} names an alias: `espalier adapters alias NAME --remove ALIAS` removes one",
                self.name
            )));
        }
        if name.contains("/versions/") {
            client.delete_adapter_version(&name).await?;
        } else {
            let request = v1::DeleteAdapterRequest {
                name: name.clone(),
                etag: String::new(),
                force: self.force,
            };
            client.delete_adapter(request).await?;
        }
        deleted(*out, &name)
    }
}

/// What every deletion prints.
pub(crate) fn deleted(out: Out, name: &str) -> Result<(), Failure> {
    if out.is_json() {
        return out.json_document(&json!({"deleted": name}));
    }
    out.line(format_args!("deleted {name}"))
}

/// Point aliases at versions, or remove them.
#[derive(Debug, Args)]
pub(crate) struct Alias {
    /// The adapter.
    adapter: String,
    /// ALIAS=VERSION, with the version's number.
    #[arg(value_parser = assignment)]
    set: Vec<(String, String)>,
    /// An alias to remove; may be given several times.
    #[arg(long, value_name = "ALIAS")]
    remove: Vec<String>,
    /// Refuse unless the adapter still has this etag (`espalier adapters get` shows it).
    #[arg(long, default_value = "")]
    etag: String,
}

impl Alias {
    async fn run(self, Session { client, out }: &Session) -> Result<(), Failure> {
        let name = client.names().adapter(&self.adapter)?;
        let adapter = if self.set.is_empty() && self.remove.is_empty() {
            client.get_adapter(&name).await?
        } else {
            let request = v1::SetAdapterAliasesRequest {
                name,
                set: BTreeMap::from_iter(self.set),
                remove: self.remove,
                etag: self.etag,
            };
            client.set_adapter_aliases(request).await?
        };
        if out.is_json() {
            return out.document(&adapter);
        }
        let row = |alias: &v1::AdapterAlias| vec![alias.alias.clone(), alias.version.clone()];
        let rows: Vec<_> = adapter.aliases.iter().map(row).collect();
        out.table(&["ALIAS", "VERSION"], &rows, "no aliases")
    }
}

fn assignment(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((alias, version)) if !alias.is_empty() && !version.is_empty() => {
            Ok((alias.to_owned(), version.to_owned()))
        }
        _ => Err(format!("{text:?} is not ALIAS=VERSION")),
    }
}
