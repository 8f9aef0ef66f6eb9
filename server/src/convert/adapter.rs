//! Adapters, versions, profiles and reports between the wire and the registry.

use espalier_adapters::profile::{MergePolicy, ServingProfile};
use espalier_adapters::report::{Report, Severity};
use espalier_adapters::version::{AdapterArtifact, VersionDigest};
use espalier_engine::adapter_pool::{AdapterResidency, Merging, ResidencyState};
use espalier_proto::v1;
use prost_types::Timestamp;

use crate::convert::Faults;
use crate::convert::reply::duration;
use crate::convert::request;
use crate::database::now_ms;
use crate::names::{AdapterName, AdapterRef, Alias, TenantId, VersionName, VersionNumber};
use crate::registry::{
    Adapter, AliasChange, Combined, Parent, Provenance, Version, VersionState, VersionSummary,
};
use crate::status::Refusal;

/// Bounds on what a serving profile holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ProfileLimits {
    /// Bytes of system prompt and templates together.
    pub(crate) max_text_bytes: usize,
    /// Stop strings.
    pub(crate) max_stop_strings: usize,
    /// Bytes of one.
    pub(crate) max_stop_string_bytes: usize,
    /// Labels.
    pub(crate) max_labels: usize,
    /// Bytes of one.
    pub(crate) max_label_bytes: usize,
}

/// Unix milliseconds as the wire has them.
pub(crate) fn timestamp(ms: i64) -> Timestamp {
    Timestamp {
        seconds: ms.div_euclid(1000),
        nanos: (ms.rem_euclid(1000) * 1_000_000) as i32,
    }
}

/// The wire's time as Unix milliseconds; `None` when it is out of range.
pub(crate) fn milliseconds(time: &Timestamp) -> Option<i64> {
    (0..1_000_000_000)
        .contains(&time.nanos)
        .then(|| time.seconds.checked_mul(1000))
        .flatten()?
        .checked_add(i64::from(time.nanos / 1_000_000))
}

/// An adapter for the wire.
pub(crate) fn adapter(adapter: Adapter) -> v1::Adapter {
    let name = adapter.name;
    v1::Adapter {
        aliases: adapter
            .aliases
            .into_iter()
            .map(|(alias, number)| v1::AdapterAlias {
                alias: alias.to_string(),
                version: VersionName::new(name.clone(), number).to_string(),
            })
            .collect(),
        name: name.to_string(),
        description: adapter.description,
        latest_version: u64::from(adapter.latest_version),
        version_count: adapter.version_count,
        create_time: Some(timestamp(adapter.create_time)),
        update_time: Some(timestamp(adapter.update_time)),
        etag: adapter.etag,
    }
}

/// A version for the wire.
pub(crate) fn version(version: Version) -> v1::AdapterVersion {
    let state = match version.state {
        VersionState::Active => v1::AdapterVersionState::Active,
        VersionState::Quarantined => v1::AdapterVersionState::Quarantined,
    };
    let content = version.content;
    v1::AdapterVersion {
        name: version.name.to_string(),
        state: state.into(),
        digest: content.digest.to_string(),
        size_bytes: content.size,
        base_model: content.base_name,
        base_digest: content.base_digest,
        config: match &content.summary {
            VersionSummary { unfrozen: true, .. } => None,
            VersionSummary {
                feedforward_modules: Some(_),
                ..
            } => None,
            summary => Some(lora_config(summary)),
        },
        unfreeze: unfreeze_config(&content.summary),
        ia3: ia3_config(&content.summary),
        labels: content.summary.labels.clone(),
        profile: Some(profile_reply(&content.profile)),
        training_job: match &content.provenance {
            Provenance::TrainingJob(name) => name.clone(),
            Provenance::Upload | Provenance::Combination(_) => String::new(),
        },
        combination: match content.provenance {
            Provenance::Combination(made) => Some(combination_reply(made)),
            Provenance::Upload | Provenance::TrainingJob(_) => None,
        },
        aliases: version.aliases.iter().map(Alias::to_string).collect(),
        metrics: content.metrics,
        report: Some(report(&content.report)),
        create_time: Some(timestamp(version.create_time)),
        parts: parts(&content.summary),
        pinned: version.serving.pinned,
        merge_policy: match version.serving.merge_policy {
            MergePolicy::Auto => v1::MergePolicy::Auto,
            MergePolicy::Merged => v1::MergePolicy::Merged,
            MergePolicy::Unmerged => v1::MergePolicy::Unmerged,
        }
        .into(),
    }
}

fn combination_reply(made: Combined) -> v1::Combination {
    let parent = |parent: Parent| v1::CombinationParent {
        version: parent.version,
        digest: parent.digest.to_string(),
        weight: parent.weight,
    };
    v1::Combination {
        parents: made.parents.into_iter().map(parent).collect(),
        rank: made.rank,
        relative_error: made.relative_error,
    }
}

/// What is to be added up.
#[derive(Debug)]
pub(crate) struct Combination {
    /// Versions and their weights, all of one tenant.
    pub(crate) terms: Vec<(AdapterRef, f32)>,
    /// What each site is cut to.
    pub(crate) rank: Option<usize>,
}

/// A combination from the wire, of adapters of `tenant` alone.
pub(crate) fn combination(
    tenant: &TenantId,
    request: &v1::CombineAdaptersRequest,
) -> Result<Combination, Refusal> {
    let mut faults = Faults::default();
    let terms = request::weighted("terms", &request.terms, &mut faults);
    if request.terms.is_empty() {
        faults.add("terms", "is empty; name at least one version");
    }
    for (index, (reference, weight)) in terms.iter().enumerate() {
        let owner = &reference.adapter.tenant;
        if owner != tenant {
            let why = format!("belongs to tenants/{owner}, the new version to tenants/{tenant}");
            faults.add(format!("terms[{index}].adapter"), why);
        }
        if *weight == 0.0 {
            let why = "0 adds nothing; leave the adapter out";
            faults.add(format!("terms[{index}].weight"), why);
        }
    }
    if request.rank == Some(0) {
        faults.add(
            "rank",
            "0 must be at least 1; leave it out for the exact sum",
        );
    }
    faults.finish()?;
    let rank = request.rank.map(|rank| rank as usize);
    Ok(Combination { terms, rank })
}

/// What a download brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Export {
    /// The stored files, where PEFT reads them as what they are.
    Peft,
    /// The stored files.
    Stored,
    /// A GGUF adapter.
    GgufLora,
}

/// A download's format from the wire.
pub(crate) fn export(field: &str, given: i32) -> Result<Export, Refusal> {
    match v1::ExportFormat::try_from(given) {
        Ok(v1::ExportFormat::Unspecified | v1::ExportFormat::Peft) => Ok(Export::Peft),
        Ok(v1::ExportFormat::Stored) => Ok(Export::Stored),
        Ok(v1::ExportFormat::GgufLora) => Ok(Export::GgufLora),
        Err(_) => {
            let why = format!("{given} is no format; PEFT, GGUF_LORA and STORED are");
            Err(Refusal::invalid_field(field, why))
        }
    }
}

/// A merge policy from the wire.
pub(crate) fn merge_policy(field: &str, given: v1::MergePolicy) -> Result<MergePolicy, Refusal> {
    match given {
        v1::MergePolicy::Auto => Ok(MergePolicy::Auto),
        v1::MergePolicy::Merged => Ok(MergePolicy::Merged),
        v1::MergePolicy::Unmerged => Ok(MergePolicy::Unmerged),
        v1::MergePolicy::Unspecified => Err(Refusal::invalid_field(
            field,
            "name a policy: AUTO, MERGED or UNMERGED",
        )),
    }
}

fn parts(summary: &VersionSummary) -> Vec<v1::ArtifactPartInfo> {
    summary
        .parts
        .iter()
        .map(|part| v1::ArtifactPartInfo {
            part: match part.file.as_str() {
                AdapterArtifact::CONFIG_FILE => v1::ArtifactPart::Config,
                AdapterArtifact::WEIGHTS_FILE => v1::ArtifactPart::Weights,
                AdapterArtifact::HEAD_FILE => v1::ArtifactPart::Head,
                _ => v1::ArtifactPart::Labels,
            }
            .into(),
            size_bytes: part.size,
            sha256: part.sha256.clone(),
        })
        .collect()
}

fn lora_config(summary: &VersionSummary) -> v1::LoraConfig {
    v1::LoraConfig {
        rank: Some(summary.rank),
        alpha: Some(summary.alpha as f32),
        dropout: Some(summary.dropout as f32),
        target_modules: summary.target_modules.clone(),
        use_rslora: Some(summary.use_rslora),
        use_dora: Some(summary.use_dora),
        rank_pattern: summary.rank_pattern.iter().cloned().collect(),
        alpha_pattern: summary
            .alpha_pattern
            .iter()
            .map(|(pattern, alpha)| (pattern.clone(), *alpha as f32))
            .collect(),
        layers_to_transform: summary.layers.clone(),
    }
}

fn unfreeze_config(summary: &VersionSummary) -> Option<v1::UnfreezeConfig> {
    summary.unfrozen.then(|| v1::UnfreezeConfig {
        whole_model: false,
        last_layers: None,
        layers: summary.layers.clone(),
        modules: summary.target_modules.clone(),
    })
}

fn ia3_config(summary: &VersionSummary) -> Option<v1::Ia3Config> {
    let feedforward_modules = summary.feedforward_modules.clone()?;
    Some(v1::Ia3Config {
        target_modules: summary.target_modules.clone(),
        feedforward_modules,
    })
}

/// A report for the wire.
pub(crate) fn report(report: &Report) -> v1::ValidationReport {
    v1::ValidationReport {
        accepted: report.is_ok(),
        findings: report
            .findings
            .iter()
            .map(|finding| v1::Finding {
                severity: match finding.severity {
                    Severity::Error => v1::Severity::Error,
                    Severity::Warning => v1::Severity::Warning,
                }
                .into(),
                subject: finding.subject.clone(),
                rule: finding.rule.as_str().to_owned(),
                found: finding.found.clone(),
                expected: finding.expected.clone(),
                next_step: finding.next_step.clone(),
            })
            .collect(),
        omitted_errors: report.omitted_errors as u64,
        omitted_warnings: report.omitted_warnings as u64,
    }
}

/// A profile for the wire; what it does not set stays unset.
pub(crate) fn profile_reply(profile: &ServingProfile) -> v1::ServingProfile {
    let sampling = v1::SamplingParams {
        temperature: profile.temperature,
        top_p: profile.top_p,
        top_k: profile.top_k,
        min_p: profile.min_p,
        repetition_penalty: profile.repetition_penalty,
        frequency_penalty: profile.frequency_penalty,
        presence_penalty: profile.presence_penalty,
        seed: profile.seed,
        ..v1::SamplingParams::default()
    };
    let stop = v1::StopConditions {
        max_tokens: profile.max_tokens,
        stop: profile.stop.clone().unwrap_or_default(),
        ..v1::StopConditions::default()
    };
    v1::ServingProfile {
        system_prompt: profile.system_prompt.clone(),
        chat_template: profile.chat_template.clone(),
        sampling: (sampling != v1::SamplingParams::default()).then_some(sampling),
        stop: (stop != v1::StopConditions::default()).then_some(stop),
        labels: profile.labels.clone().unwrap_or_default(),
        prompt_template: profile.prompt_template.clone(),
    }
}

/// A profile from the wire, every field in its range. `at` is the field's path.
pub(crate) fn profile(
    at: &str,
    profile: Option<v1::ServingProfile>,
    limits: &ProfileLimits,
) -> Result<ServingProfile, Refusal> {
    let Some(given) = profile else {
        return Ok(ServingProfile::default());
    };
    let sampling = given.sampling.unwrap_or_default();
    let stop = given.stop.unwrap_or_default();
    let mut faults = Faults::default();
    if given.chat_template.is_some() {
        faults.add(
            format!("{at}.chat_template"),
            "templates of adapters are not accepted by this server",
        );
    }
    if sampling.n.is_some() || !sampling.logit_bias.is_empty() {
        faults.add(
            format!("{at}.sampling"),
            "n and logit_bias belong to a request, not to a profile",
        );
    }
    if stop.min_tokens.is_some()
        || !stop.stop_token_ids.is_empty()
        || stop.ignore_eos.is_some()
        || stop.include_stop.is_some()
    {
        faults.add(
            format!("{at}.stop"),
            "only max_tokens and stop belong to a profile",
        );
    }
    check_sampling(at, &sampling, &mut faults);
    check_texts(
        at,
        &given.system_prompt,
        &given.prompt_template,
        limits,
        &mut faults,
    );
    faults.limit(
        format!("{at}.stop.stop"),
        stop.stop.len(),
        limits.max_stop_strings,
        "strings",
    );
    for text in &stop.stop {
        if text.is_empty() {
            faults.add(format!("{at}.stop.stop"), "a stop string is empty");
        }
        faults.limit(
            format!("{at}.stop.stop"),
            text.len(),
            limits.max_stop_string_bytes,
            "bytes",
        );
    }
    faults.limit(
        format!("{at}.labels"),
        given.labels.len(),
        limits.max_labels,
        "labels",
    );
    for label in &given.labels {
        if label.is_empty() {
            faults.add(format!("{at}.labels"), "a label is empty");
        }
        faults.limit(
            format!("{at}.labels"),
            label.len(),
            limits.max_label_bytes,
            "bytes",
        );
    }
    if stop.max_tokens == Some(0) {
        faults.add(format!("{at}.stop.max_tokens"), "0 must be at least 1");
    }
    faults.finish()?;
    Ok(ServingProfile {
        system_prompt: given.system_prompt,
        chat_template: None,
        prompt_template: given.prompt_template,
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        frequency_penalty: sampling.frequency_penalty,
        presence_penalty: sampling.presence_penalty,
        seed: sampling.seed,
        stop: (!stop.stop.is_empty()).then_some(stop.stop),
        max_tokens: stop.max_tokens,
        labels: (!given.labels.is_empty()).then_some(given.labels),
    })
}

fn check_sampling(at: &str, sampling: &v1::SamplingParams, faults: &mut Faults) {
    let mut range = |name: &str, value: Option<f32>, low: f32, high: f32| {
        if let Some(value) = value
            && !(low..=high).contains(&value)
        {
            faults.add(
                format!("{at}.sampling.{name}"),
                format!("{value} is outside {low} to {high}"),
            );
        }
    };
    range("temperature", sampling.temperature, 0.0, 100.0);
    range("top_p", sampling.top_p, f32::MIN_POSITIVE, 1.0);
    range("min_p", sampling.min_p, 0.0, 1.0);
    range(
        "repetition_penalty",
        sampling.repetition_penalty,
        0.01,
        100.0,
    );
    range(
        "frequency_penalty",
        sampling.frequency_penalty,
        -100.0,
        100.0,
    );
    range("presence_penalty", sampling.presence_penalty, -100.0, 100.0);
}

fn check_texts(
    at: &str,
    system_prompt: &Option<String>,
    prompt_template: &Option<String>,
    limits: &ProfileLimits,
    faults: &mut Faults,
) {
    for (name, text) in [
        ("system_prompt", system_prompt),
        ("prompt_template", prompt_template),
    ] {
        let bytes = text.as_ref().map_or(0, String::len);
        faults.limit(
            format!("{at}.{name}"),
            bytes,
            limits.max_text_bytes,
            "bytes",
        );
    }
    if let Some(template) = prompt_template
        && template.matches(ServingProfile::PROMPT).count() != 1
    {
        faults.add(
            format!("{at}.prompt_template"),
            "it must hold {prompt} exactly once",
        );
    }
}

/// A list of aliases, each once.
pub(crate) fn aliases(field: &str, given: &[String]) -> Result<Vec<Alias>, Refusal> {
    let mut aliases = Vec::new();
    for text in given {
        let alias = Alias::parse(text).map_err(|e| Refusal::invalid_field(field, e.to_string()))?;
        if aliases.contains(&alias) {
            return Err(Refusal::invalid_field(
                field,
                format!("{alias} is named twice"),
            ));
        }
        aliases.push(alias);
    }
    Ok(aliases)
}

/// An alias change from the wire. A version is a number or a full name of this adapter.
pub(crate) fn alias_change(
    name: &AdapterName,
    request: &v1::SetAdapterAliasesRequest,
) -> Result<AliasChange, Refusal> {
    let invalid = |field: &str, why: String| Refusal::invalid_field(field, why);
    let mut set = Vec::new();
    for (alias, version) in &request.set {
        let alias = Alias::parse(alias).map_err(|e| invalid("set", e.to_string()))?;
        let number = if version.contains('/') {
            let full = VersionName::parse(version).map_err(|e| invalid("set", e.to_string()))?;
            if full.adapter != *name {
                return Err(invalid(
                    "set",
                    format!("{version} is not a version of {name}"),
                ));
            }
            full.number
        } else {
            VersionNumber::parse(version).map_err(|e| invalid("set", e.to_string()))?
        };
        set.push((alias, number));
    }
    let remove = aliases("remove", &request.remove)?;
    if let Some((alias, _)) = set.iter().find(|(alias, _)| remove.contains(alias)) {
        return Err(invalid("remove", format!("{alias} is set too")));
    }
    Ok(AliasChange {
        set,
        remove,
        etag: (!request.etag.is_empty()).then(|| request.etag.clone()),
    })
}

/// One version's place in the engine's memory.
pub(crate) fn residency(name: &VersionName, found: &AdapterResidency) -> v1::AdapterResidency {
    let (level, error) = match &found.state {
        ResidencyState::Loading => (v1::ResidencyLevel::Loading, String::new()),
        ResidencyState::Resident => (v1::ResidencyLevel::Resident, String::new()),
        ResidencyState::Failed(error) => (
            v1::ResidencyLevel::Failed,
            Refusal::from(error.clone()).message().to_owned(),
        ),
    };
    let idle = i64::try_from(found.idle.as_millis()).unwrap_or(i64::MAX);
    v1::AdapterResidency {
        version: name.to_string(),
        digest: found.digest.to_string(),
        level: level.into(),
        bytes: found.bytes as u64,
        leases: u32::try_from(found.leases).unwrap_or(u32::MAX),
        error,
        last_used_time: Some(timestamp(now_ms().saturating_sub(idle))),
        pinned: found.pinned,
        requests: found.requests,
        load_duration: Some(duration(found.load_duration)),
        merge_state: match found.merging {
            Merging::No => v1::MergeState::Unspecified,
            Merging::Underway => v1::MergeState::Merging,
            Merging::Merged { .. } => v1::MergeState::Merged,
        }
        .into(),
        merged_bytes: match found.merging {
            Merging::Merged { bytes } => bytes as u64,
            Merging::No | Merging::Underway => 0,
        },
    }
}

/// The place of a version that is stored and not in memory.
pub(crate) fn on_disk(name: &VersionName, digest: VersionDigest) -> v1::AdapterResidency {
    v1::AdapterResidency {
        version: name.to_string(),
        digest: digest.to_string(),
        level: v1::ResidencyLevel::Disk.into(),
        ..v1::AdapterResidency::default()
    }
}
