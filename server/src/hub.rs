//! `--model`: a path as it is, or `org/name` of the Hugging Face hub, brought into (and read from) the cache that every tool
//! of that house shares. What the hub holds is asked first, so that a moved branch is noticed; when it cannot be asked, a
//! complete copy in the cache will do. This file must not know what is inside a model's files.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use crate::config::Hub;

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Files that say more about a model and need not be there.
const OPTIONAL: &[&str] = &[
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
/// How often a download says how far it is.
const PROGRESS: Duration = Duration::from_secs(5);

/// Why a model cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Neither a path nor a name of the hub.
    #[error(
        "there is no file or directory {spec}; name a .gguf file, a directory with config.json, tokenizer.json and \
         safetensors, a model of the Hugging Face hub (org/name, org/name@revision or org/name:FILE.gguf), or tiny:7 for \
         a small random model to try things with"
    )]
    NoFile {
        /// What was given.
        spec: String,
    },
    /// Not in the cache, and the hub was not to be asked, or did not answer.
    #[error(
        "{repo} is not in the cache {cache} ({missing}), and {why}; download it where the hub can be reached with: \
         hf download {download} (and copy the cache, or set HF_HOME), or give --model the path of a local file or directory"
    )]
    Absent {
        /// The model.
        repo: String,
        /// The cache that was looked into.
        cache: PathBuf,
        /// What is lacking.
        missing: String,
        /// Why the hub does not help.
        why: String,
        /// What to download.
        download: String,
    },
    /// The hub knows no such model, or not for this token.
    #[error(
        "{endpoint} has no model {repo}, or not without a token: {detail}; check the name (org/name), and for a gated or \
         private model set HF_TOKEN"
    )]
    Refused {
        /// The hub.
        endpoint: String,
        /// The model.
        repo: String,
        /// What it said.
        detail: String,
    },
    /// The repository holds nothing that can be served, or several things.
    #[error("{repo}: {what}")]
    Unsuitable {
        /// The model.
        repo: String,
        /// What is wrong, and what to do.
        what: String,
    },
    /// A download broke off.
    #[error(
        "{repo}: {file} could not be downloaded from {endpoint}: {detail}; start again to go on where it stopped"
    )]
    Download {
        /// The model.
        repo: String,
        /// The file.
        file: String,
        /// The hub.
        endpoint: String,
        /// What went wrong.
        detail: String,
    },
}

/// A model on this machine.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Located {
    /// What the loader is given.
    pub(crate) spec: String,
    /// The model's name, where the path does not say it.
    pub(crate) name: Option<String>,
}

impl Located {
    /// A model that no file holds.
    pub(crate) fn built_in(spec: String) -> Self {
        Located { spec, name: None }
    }
}

/// `org/name[@revision][:FILE.gguf]`
#[derive(Debug, Clone, PartialEq, Eq)]
struct Reference {
    repo: String,
    revision: Option<String>,
    file: Option<String>,
}

/// Finds what `--model` names, bringing it from the hub if need be. Blocks, for minutes if the model is large.
///
/// # Errors
/// What is lacking, with the next step.
pub(crate) fn locate(spec: &str, hub: &Hub) -> Result<Located, HubError> {
    if spec.starts_with("tiny:") || std::fs::symlink_metadata(spec).is_ok() {
        return Ok(Located {
            spec: spec.to_owned(),
            name: None,
        });
    }
    let Some(reference) = Reference::parse(spec) else {
        return Err(HubError::NoFile {
            spec: spec.to_owned(),
        });
    };
    let source = Source { hub, reference };
    let path = source.bring()?;
    Ok(Located {
        name: Some(source.name(&path)),
        spec: path.to_string_lossy().into_owned(),
    })
}

// === impl Reference ===

impl Reference {
    fn parse(spec: &str) -> Option<Reference> {
        let (rest, file) = match spec.split_once(':') {
            Some((rest, file)) => (rest, Some(file.to_owned())),
            None => (spec, None),
        };
        let (repo, revision) = match rest.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision.to_owned())),
            None => (rest, None),
        };
        let part = |text: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !text.is_empty()
                && text.len() <= 96
                && text.chars().all(plain)
                && !text.starts_with('.')
        };
        let (org, name) = repo.split_once('/')?;
        let file_ok = file
            .as_deref()
            .is_none_or(|file| is_inside(file) && has_extension(file, "gguf"));
        let revision_ok = revision.as_deref().is_none_or(is_inside);
        // A path to a GGUF file that is not there is no model's name.
        let path = file.is_none() && has_extension(name, "gguf");
        (part(org) && part(name) && file_ok && revision_ok && !path).then(|| Reference {
            repo: repo.to_owned(),
            revision,
            file,
        })
    }

    fn repo(&self) -> Repo {
        let revision = self.revision.clone().unwrap_or_else(|| "main".to_owned());
        Repo::with_revision(self.repo.clone(), RepoType::Model, revision)
    }
}

/// Names come from the command line and from the hub: neither may lead out of the cache.
fn is_inside(path: &str) -> bool {
    !path.is_empty()
        && Path::new(path)
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
}

fn has_extension(file: &str, wanted: &str) -> bool {
    Path::new(file)
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case(wanted))
}

/// One model, in the cache or on its way there.
struct Source<'a> {
    hub: &'a Hub,
    reference: Reference,
}

/// What of a repository is needed.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    /// One file.
    Gguf(String),
    /// A directory with these files; weights in shards when the index is among them.
    Directory(Vec<String>),
}

impl Source<'_> {
    /// The path to load.
    fn bring(&self) -> Result<PathBuf, HubError> {
        if self.hub.offline {
            return self.cached("HF_HUB_OFFLINE forbids to ask the hub".to_owned());
        }
        let token = self.hub.token.reveal().map(str::to_owned);
        let api = ApiBuilder::from_cache(Cache::new(self.hub.cache.clone()))
            .with_endpoint(self.hub.endpoint.clone())
            .with_token(token)
            .with_progress(false)
            .with_retries(3)
            .build()
            .map_err(|error| self.absent("no client", &error.to_string()))?;
        let repo = self.reference.repo();
        let info = match api.repo(repo.clone()).info() {
            Ok(info) => info,
            Err(ApiError::RequestError(error)) if is_answer(&error) => {
                return Err(HubError::Refused {
                    endpoint: self.hub.endpoint.clone(),
                    repo: self.reference.repo.clone(),
                    detail: error.to_string(),
                });
            }
            Err(error) => {
                return self.cached(format!("{} did not answer: {error}", self.hub.endpoint));
            }
        };
        let names: BTreeSet<String> = info
            .siblings
            .into_iter()
            .map(|file| file.rfilename)
            .filter(|name| is_inside(name))
            .collect();
        let path = match self.choose(&names)? {
            Choice::Gguf(file) => self.fetch(&api, &info.sha, &file)?,
            Choice::Directory(files) => self.fetch_directory(&api, &info.sha, files)?,
        };
        // The branch's name, for the next time that the hub cannot be asked.
        if let Err(error) = self.cache().repo(repo).create_ref(&info.sha) {
            tracing::warn!(%error, "the cache does not remember which commit the revision is");
        }
        Ok(path)
    }

    /// What of the files to take.
    fn choose(&self, names: &BTreeSet<String>) -> Result<Choice, HubError> {
        if let Some(file) = &self.reference.file {
            return if names.contains(file) {
                Ok(Choice::Gguf(file.clone()))
            } else {
                let there = list(names.iter().filter(|name| has_extension(name, "gguf")));
                Err(self.unsuitable(format!(
                    "there is no file {file}; its GGUF files are: {there}"
                )))
            };
        }
        let has = |name: &str| names.contains(name);
        let weights = [INDEX, WEIGHTS].into_iter().find(|name| has(name));
        if let (Some(weights), true, true) = (weights, has(CONFIG), has(TOKENIZER)) {
            let files = [CONFIG, TOKENIZER, weights].into_iter();
            let more = OPTIONAL.iter().copied().filter(|name| has(name));
            return Ok(Choice::Directory(
                files.chain(more).map(str::to_owned).collect(),
            ));
        }
        let mut ggufs = names.iter().filter(|name| has_extension(name, "gguf"));
        match (ggufs.next(), ggufs.next()) {
            (Some(only), None) => Ok(Choice::Gguf(only.clone())),
            (Some(_), Some(_)) => {
                let there = list(names.iter().filter(|name| has_extension(name, "gguf")));
                let repo = &self.reference.repo;
                Err(self.unsuitable(format!(
                    "it has several GGUF files; name one as {repo}:FILE: {there}"
                )))
            }
            (None, _) => Err(self.unsuitable(format!(
                "it has neither {CONFIG}, {TOKENIZER} and {WEIGHTS} (or its index) nor a GGUF file; choose a repository \
                 in one of these forms"
            ))),
        }
    }

    fn fetch_directory(
        &self,
        api: &Api,
        commit: &str,
        files: Vec<String>,
    ) -> Result<PathBuf, HubError> {
        for file in &files {
            let path = self.fetch(api, commit, file)?;
            if file == INDEX {
                for shard in self.shards(&path)? {
                    self.fetch(api, commit, &shard)?;
                }
            }
        }
        Ok(self.snapshot(commit))
    }

    /// One file of a commit, from the cache or the hub.
    fn fetch(&self, api: &Api, commit: &str, file: &str) -> Result<PathBuf, HubError> {
        let path = self.snapshot(commit).join(file);
        if path.is_file() {
            return Ok(path);
        }
        let id = self.reference.repo.clone();
        let repo = Repo::with_revision(id, RepoType::Model, commit.to_owned());
        let progress = Logged::default();
        let fetched = api.repo(repo).download_with_progress(file, progress);
        fetched.map_err(|error| HubError::Download {
            repo: self.reference.repo.clone(),
            file: file.to_owned(),
            endpoint: self.hub.endpoint.clone(),
            detail: error.to_string(),
        })
    }

    /// The files that an index of shards names.
    fn shards(&self, index: &Path) -> Result<BTreeSet<String>, HubError> {
        let wrong = |why: String| self.unsuitable(format!("{INDEX}: {why}"));
        let text = std::fs::read(index).map_err(|error| wrong(error.to_string()))?;
        let index: serde_json::Value =
            serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        let map = index.get("weight_map").and_then(|map| map.as_object());
        let map = map.ok_or_else(|| wrong("it has no weight_map".to_owned()))?;
        map.values()
            .map(|shard| match shard.as_str() {
                Some(name) if is_inside(name) => Ok(name.to_owned()),
                _ => Err(wrong(format!("{shard} is no name of a file"))),
            })
            .collect()
    }

    // --- without the hub ---

    /// A complete copy in the cache.
    fn cached(&self, why: String) -> Result<PathBuf, HubError> {
        let Some(snapshot) = self.known_snapshot() else {
            return Err(self.absent("nothing of it", &why));
        };
        let mut names = BTreeSet::new();
        files_below(&snapshot, Path::new(""), &mut names);
        let choice = self
            .choose(&names)
            .map_err(|error| self.absent(&error.to_string(), &why))?;
        let path = match choice {
            Choice::Gguf(file) => snapshot.join(file),
            Choice::Directory(files) => {
                if files.iter().any(|file| file == INDEX) {
                    let shards = self.shards(&snapshot.join(INDEX))?;
                    let missing = list(shards.iter().filter(|shard| !names.contains(*shard)));
                    if !missing.is_empty() {
                        return Err(self.absent(&format!("it lacks {missing}"), &why));
                    }
                }
                snapshot
            }
        };
        tracing::info!(model = %self.reference.repo, path = %path.display(), %why, "taken from the cache");
        Ok(path)
    }

    /// The directory of the commit that the revision was when the hub was last asked.
    fn known_snapshot(&self) -> Option<PathBuf> {
        let revision = self.reference.revision.as_deref().unwrap_or("main");
        let root = self.hub.cache.join(self.reference.repo().folder_name());
        let commit = std::fs::read_to_string(root.join("refs").join(revision))
            .map_or_else(|_| revision.to_owned(), |commit| commit.trim().to_owned());
        let snapshot = self.snapshot(&commit);
        (is_inside(&commit) && snapshot.is_dir()).then_some(snapshot)
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        let repo = self.cache().repo(self.reference.repo());
        repo.pointer_path(commit)
    }

    fn cache(&self) -> Cache {
        Cache::new(self.hub.cache.clone())
    }

    /// The model's own name: the path in the cache ends in a commit.
    fn name(&self, path: &Path) -> String {
        let stem = path.file_stem().map(|stem| stem.to_string_lossy());
        let repo = self.reference.repo.rsplit('/').next();
        match stem {
            Some(stem) if has_extension(&path.to_string_lossy(), "gguf") => stem.into_owned(),
            _ => repo.unwrap_or_default().to_owned(),
        }
    }

    fn absent(&self, missing: &str, why: &str) -> HubError {
        let Reference {
            repo,
            revision,
            file,
        } = &self.reference;
        let file = file.as_ref().map(|file| format!(" {file}"));
        let revision = revision.as_ref().map(|name| format!(" --revision {name}"));
        HubError::Absent {
            repo: repo.clone(),
            cache: self.hub.cache.clone(),
            missing: missing.to_owned(),
            why: why.to_owned(),
            download: format!(
                "{repo}{}{}",
                file.unwrap_or_default(),
                revision.unwrap_or_default()
            ),
        }
    }

    fn unsuitable(&self, what: String) -> HubError {
        HubError::Unsuitable {
            repo: self.reference.repo.clone(),
            what,
        }
    }
}

/// Whether the hub said no, rather than nothing; a status of its own trouble is nothing too.
fn is_answer(error: &impl std::fmt::Display) -> bool {
    error.to_string().starts_with("http status: 4")
}

fn list<'a>(names: impl Iterator<Item = &'a String>) -> String {
    names.map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// Names of the files below a directory, as paths from there.
fn files_below(root: &Path, prefix: &Path, names: &mut BTreeSet<String>) {
    let Ok(entries) = std::fs::read_dir(root.join(prefix)) else {
        return;
    };
    for entry in entries.flatten() {
        let path = prefix.join(entry.file_name());
        // A link whose blob is gone is no file.
        match std::fs::metadata(root.join(&path)) {
            Ok(about) if about.is_dir() => files_below(root, &path, names),
            Ok(_) => {
                names.insert(path.to_string_lossy().into_owned());
            }
            Err(_) => {}
        }
    }
}

/// Says in the log how far a download is.
#[derive(Default)]
struct Logged {
    file: String,
    size: usize,
    done: usize,
    said: Option<Instant>,
}

impl Progress for Logged {
    fn init(&mut self, size: usize, filename: &str) {
        (self.file, self.size, self.done) = (filename.to_owned(), size, 0);
        if self.said.is_none() {
            tracing::info!(file = filename, bytes = size, "downloading");
        }
        self.said = Some(Instant::now());
    }

    fn update(&mut self, size: usize) {
        self.done += size;
        if self.said.is_none_or(|at| at.elapsed() >= PROGRESS) {
            self.said = Some(Instant::now());
            let percent = self.done * 100 / self.size.max(1);
            tracing::info!(file = %self.file, percent, done = self.done, bytes = self.size, "downloading");
        }
    }

    fn finish(&mut self) {
        tracing::info!(file = %self.file, bytes = self.size, "downloaded");
    }
}

#[cfg(test)]
mod tests;
