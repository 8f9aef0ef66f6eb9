//! From options to a test: tenants and adapters by name, the words' costs from the server's own
//! tokenizer, the pattern and extent of the load. What cannot be is said here, before anything is sent.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use crate::{
    bench::{
        arrival::{Rate, Spread},
        beside::{Beside, Work},
        prompt::{self, Words},
        schedule::{Extent, Pattern, Source},
        summary::Judging,
        target::{Access, Espalier, OpenAi, Sampling, Setup, Target},
        trace,
        workload::{Ingredients, Operation, Prefix, Prompts, Tenant, Workload},
    },
    cli::{
        Global, all_pages,
        bench::args::{Kind, LoadArgs, RunArgs},
        output::Failure,
    },
    client::{Client, ClientConfig},
    v1,
};

/// No list names more.
const MOST_NAMES: usize = 1_000_000;

/// What a test without an end of its own lasts.
const DEFAULT_DURATION: Duration = Duration::from_secs(30);

/// A test that can begin.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) target: Arc<Target>,
    pub(crate) workload: Workload,
    pub(crate) pattern: Pattern,
    pub(crate) extent: Extent,
    pub(crate) judging: Judging,
    pub(crate) max_in_flight: usize,
    spread: Spread,
    beside: Vec<Beside>,
}

fn usage(flag: &str, error: impl std::fmt::Display) -> Failure {
    Failure::Usage(format!("{flag}: {error}"))
}

// === impl Plan ===

impl Plan {
    pub(crate) async fn of(args: &RunArgs, global: &Global) -> Result<Self, Failure> {
        check_together(args)?;
        let rows = match &args.load.trace {
            Some(path) => {
                let (unit, speed) = (args.load.trace_unit, args.load.trace_speed);
                let rows = trace::read(path, unit, speed).map_err(Failure::Usage)?;
                Some(Arc::new(rows))
            }
            None => None,
        };
        let keys = match &args.work.tenant_keys {
            Some(path) => tenant_keys(path)?,
            None => BTreeMap::new(),
        };
        let mut tenants = tenants(args, global, &keys, rows.as_deref()).await?;
        adapters(args, global, &keys, rows.as_deref(), &mut tenants).await?;
        let target = connect(args, global, keys, &tenants).await?;
        let prompts = prompts(args, &target).await?;
        let extent = extent(&args.load, rows.is_some());
        let pattern = pattern(&args.load, extent, &tenants, rows.clone())?;
        let parts = Ingredients {
            seed: args.work.seed,
            mix: args.work.op.clone(),
            prompts,
            output: args.work.output,
            tenants,
            base_share: args.work.base_share,
            trace: rows,
        };
        Ok(Self {
            target: Arc::new(target),
            workload: Workload::new(parts, args.work.popularity),
            pattern,
            extent,
            judging: Judging {
                objectives: args.output.slo.clone(),
                goals: args.output.goodput.clone(),
            },
            max_in_flight: args.load.max_in_flight,
            spread: args.load.arrivals,
            beside: args.load.beside.clone(),
        })
    }

    /// An open loop at this rate.
    pub(crate) fn pattern_at(&self, rate: f64) -> Pattern {
        let source = Source {
            tenant: None,
            rate: Rate::steady(rate),
        };
        Pattern::Open {
            spread: self.spread,
            sources: vec![source],
        }
    }

    /// Begins what goes on beside the requests, for the first tenant.
    pub(crate) fn begin_work(&self) -> Result<Option<Work>, Failure> {
        match &*self.target {
            Target::Espalier(server) if !self.beside.is_empty() => {
                Ok(Some(Work::begin(&self.beside, server.client(0))?))
            }
            _ => Ok(None),
        }
    }
}

/// What no single option can know.
fn check_together(args: &RunArgs) -> Result<(), Failure> {
    let is_openai = matches!(args.server.target, Kind::OpenAi(_));
    if is_openai && args.work.op.has(Operation::Classify) {
        let why = "an OpenAI target cannot classify; use generate, chat or embed";
        return Err(usage("--op", why));
    }
    if is_openai && args.work.tenants.is_some() {
        return Err(usage(
            "--tenants",
            "an OpenAI target knows no tenants; leave it out",
        ));
    }
    if is_openai && !args.load.beside.is_empty() {
        let why = "an OpenAI target knows neither training nor uploads; leave it out";
        return Err(usage("--beside", why));
    }
    if args.work.adapters.is_none() && args.work.base_share > 0.0 {
        let why =
            "without --adapters every request asks the base model; name adapters or leave it out";
        return Err(usage("--base-share", why));
    }
    let needs_labels = args.work.op.has(Operation::Classify)
        && args.work.labels.is_empty()
        && (args.work.adapters.is_none() || args.work.base_share > 0.0);
    if needs_labels && args.load.trace.is_none() {
        let why = "the base model has no labels of its own; name them with --labels yes,no";
        return Err(usage("--op classify", why));
    }
    if let (Some((from, to)), None) = (args.load.rate, args.load.duration)
        && from != to
    {
        return Err(usage(
            "--rate",
            "a ramp needs to know over how long; add --duration",
        ));
    }
    if let (Some((from, to)), None) = (args.load.clients, args.load.duration)
        && from != to
    {
        return Err(usage(
            "--clients",
            "a ramp needs to know over how long; add --duration",
        ));
    }
    Ok(())
}

fn extent(load: &LoadArgs, is_trace: bool) -> Extent {
    // A trace ends by itself.
    let is_endless = load.duration.is_none() && load.requests.is_none() && !is_trace;
    Extent {
        warmup: load.warmup,
        warmup_requests: load.warmup_requests,
        duration: load.duration.or(is_endless.then_some(DEFAULT_DURATION)),
        requests: load.requests,
    }
}

fn pattern(
    load: &LoadArgs,
    extent: Extent,
    tenants: &[Tenant],
    rows: Option<Arc<Vec<trace::Row>>>,
) -> Result<Pattern, Failure> {
    if let Some(rows) = rows {
        return Ok(Pattern::Trace(rows));
    }
    let over = extent.end().unwrap_or_default();
    let rate = |(from, to)| {
        if from == to {
            Rate::steady(from)
        } else {
            Rate { from, to, over }
        }
    };
    let mut sources = Vec::new();
    for (name, range) in &load.tenant_rate {
        let place = tenants.iter().position(|tenant| tenant.name == *name);
        let tenant = place.ok_or_else(|| {
            usage(
                "--tenant-rate",
                format!("{name:?} is not among the tenants of --tenants"),
            )
        })?;
        sources.push(Source {
            tenant: Some(tenant),
            rate: rate(*range),
        });
    }
    if let Some(range) = load.rate {
        sources.push(Source {
            tenant: None,
            rate: rate(range),
        });
    }
    if sources.is_empty() {
        let (from, to) = load.clients.unwrap_or((1, 1));
        return Ok(Pattern::Closed { from, to });
    }
    Ok(Pattern::Open {
        spread: load.arrivals,
        sources,
    })
}

/// `a,b[0-3]` as names.
fn names(flag: &str, list: &str) -> Result<Vec<String>, Failure> {
    let mut names = Vec::new();
    for part in list
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        let Some((head, rest)) = part.split_once('[') else {
            names.push(part.to_owned());
            continue;
        };
        let wrong = || {
            usage(
                flag,
                format!("{part:?} is no range; write for example a[0-63]"),
            )
        };
        let (range, tail) = rest.split_once(']').ok_or_else(wrong)?;
        let (from, to) = range.split_once('-').ok_or_else(wrong)?;
        let read = |text: &str| text.parse::<usize>().map_err(|_| wrong());
        let (from, to) = (read(from)?, read(to)?);
        if from > to || to - from >= MOST_NAMES {
            let why = format!("{part:?} must go up, over at most {MOST_NAMES} names");
            return Err(usage(flag, why));
        }
        names.extend((from..=to).map(|number| format!("{head}{number}{tail}")));
    }
    if names.is_empty() {
        return Err(usage(
            flag,
            "names nothing; write for example a,b or a[0-63]",
        ));
    }
    Ok(names)
}

fn tenant_keys(path: &Path) -> Result<BTreeMap<String, String>, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| usage("--tenant-keys", format!("{}: {error}", path.display())))?;
    let mut keys = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut words = line.split(|c: char| c.is_whitespace() || c == '=' || c == ',');
        let mut words = words.by_ref().filter(|word| !word.is_empty());
        match (words.next(), words.next(), words.next()) {
            (Some(tenant), Some(key), None) => keys.insert(tenant.to_owned(), key.to_owned()),
            // Not quoted: it may hold a key.
            _ => {
                let why = format!(
                    "line {} of {} is not `TENANT KEY`",
                    number + 1,
                    path.display()
                );
                return Err(usage("--tenant-keys", why));
            }
        };
    }
    Ok(keys)
}

/// Who asks: those that are named anywhere, else the tenant of the connection.
async fn tenants(
    args: &RunArgs,
    global: &Global,
    keys: &BTreeMap<String, String>,
    rows: Option<&Vec<trace::Row>>,
) -> Result<Vec<Tenant>, Failure> {
    let mut found = match &args.work.tenants {
        Some(list) => names("--tenants", list)?,
        None if !args.load.tenant_rate.is_empty() => args
            .load
            .tenant_rate
            .iter()
            .map(|(name, _)| name.clone())
            .collect(),
        None => keys.keys().cloned().collect(),
    };
    for tenant in rows
        .into_iter()
        .flatten()
        .filter_map(|row| row.tenant.as_ref())
    {
        if !found.contains(tenant) {
            found.push(tenant.clone());
        }
    }
    if found.is_empty() {
        let own = match (&global.tenant, &args.server.target) {
            (Some(tenant), _) => tenant.clone(),
            (None, Kind::OpenAi(_)) => String::new(),
            (None, Kind::Espalier) => own_tenant(global).await?,
        };
        found.push(own);
    }
    let tenant = |name| Tenant {
        name,
        adapters: Vec::new(),
    };
    Ok(found.into_iter().map(tenant).collect())
}

/// The only tenant of the connection's key; empty when it has none or several.
async fn own_tenant(global: &Global) -> Result<String, Failure> {
    let client = crate::cli::own_tenant(crate::cli::connect(global).await?).await;
    let parent = client.names().parent().unwrap_or_default();
    Ok(parent.trim_start_matches("tenants/").to_owned())
}

async fn adapters(
    args: &RunArgs,
    global: &Global,
    keys: &BTreeMap<String, String>,
    rows: Option<&Vec<trace::Row>>,
    tenants: &mut [Tenant],
) -> Result<(), Failure> {
    match args.work.adapters.as_deref() {
        Some("all") if matches!(args.server.target, Kind::Espalier) => {
            for tenant in tenants.iter_mut() {
                tenant.adapters = all_adapters(global, keys, &tenant.name).await?;
            }
        }
        Some(list) => {
            let listed = names("--adapters", list)?;
            for tenant in tenants.iter_mut() {
                tenant.adapters.clone_from(&listed);
            }
        }
        None => {}
    }
    for row in rows.into_iter().flatten() {
        let Some(adapter) = row.adapter.as_ref().filter(|name| !name.is_empty()) else {
            continue;
        };
        for tenant in tenants.iter_mut() {
            let is_its_own = row.tenant.as_ref().is_none_or(|name| *name == tenant.name);
            if is_its_own && !tenant.adapters.contains(adapter) {
                tenant.adapters.push(adapter.clone());
            }
        }
    }
    Ok(())
}

/// Short names of a tenant's adapters that have a version to ask.
async fn all_adapters(
    global: &Global,
    keys: &BTreeMap<String, String>,
    tenant: &str,
) -> Result<Vec<String>, Failure> {
    let mut config = ClientConfig::new(&global.server);
    config.api_key = keys.get(tenant).or(global.key.as_ref()).cloned();
    config.tenant = (!tenant.is_empty()).then(|| tenant.to_owned());
    let client = Client::connect(config).await?;
    let parent = client.names().parent()?;
    let call = |page_token| {
        let request = v1::ListAdaptersRequest {
            parent: parent.clone(),
            page_size: crate::cli::PAGE,
            page_token,
        };
        let client = &client;
        async move {
            let page = client.list_adapters(request).await?;
            Ok((page.adapters, page.next_page_token))
        }
    };
    let found = all_pages(call).await?;
    let short = |adapter: v1::Adapter| {
        let name = adapter.name.rsplit('/').next().unwrap_or_default();
        name.to_owned()
    };
    let names: Vec<String> = found.into_iter().map(short).collect();
    if names.is_empty() {
        let why = format!("{parent} has no adapter; push one with `espalier adapters push`");
        return Err(usage("--adapters all", why));
    }
    Ok(names)
}

async fn connect(
    args: &RunArgs,
    global: &Global,
    keys: BTreeMap<String, String>,
    tenants: &[Tenant],
) -> Result<Target, Failure> {
    let timeout = global.timeout.unwrap_or(Duration::from_secs(120));
    let sampling = Sampling {
        temperature: Some(args.work.temperature),
        ignore_eos: !args.work.stop_at_eos,
    };
    match &args.server.target {
        Kind::Espalier => {
            let access = Access {
                endpoint: global.server.clone(),
                key: global.key.clone(),
                keys,
                connections: args.server.connections,
                timeout,
            };
            let labels = args.work.labels.clone();
            let target = Espalier::connect(&access, tenants, labels, sampling).await?;
            Ok(Target::Espalier(Box::new(target)))
        }
        Kind::OpenAi(url) => {
            let setup = Setup {
                url: url.clone(),
                key: args.server.openai_key.clone(),
                model: args.server.openai_model.clone(),
                tenants: tenants.to_vec(),
                template: args.server.openai_body.clone().unwrap_or_default(),
                sampling,
                timeout,
            };
            let target = OpenAi::connect(setup).await.map_err(Failure::Local)?;
            Ok(Target::OpenAi(Box::new(target)))
        }
    }
}

async fn prompts(args: &RunArgs, target: &Target) -> Result<Prompts, Failure> {
    if let Some(path) = &args.work.prompts {
        let prompts = prompt::read(path).map_err(Failure::Usage)?;
        return Ok(Prompts::File(Arc::new(prompts)));
    }
    let words = match target {
        Target::Espalier(server) => server.words().await?,
        Target::OpenAi(_) => Words::guessed(),
    };
    Ok(Prompts::Synthetic {
        words,
        input: args.work.input,
        prefix: args.work.shared_prefix.map(|tokens| Prefix {
            tokens,
            count: args.work.prefixes,
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_hold_names_and_ranges() {
        let list = names("--adapters", "x, a[8-10]b,y@canary").unwrap();
        assert_eq!(list, ["x", "a8b", "a9b", "a10b", "y@canary"]);
        for wrong in ["", "a[3-1]", "a[x-2]", "a[1", "a[0-99999999]"] {
            assert!(names("--adapters", wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn keys_are_read_and_never_quoted_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        std::fs::write(&path, "# tenants\nacme secret1\nglobex=secret2\n\n").unwrap();
        let keys = tenant_keys(&path).unwrap();
        assert_eq!(keys["acme"], "secret1");
        assert_eq!(keys["globex"], "secret2");
        std::fs::write(&path, "secret3\n").unwrap();
        let Err(Failure::Usage(text)) = tenant_keys(&path) else {
            panic!("a line without a tenant")
        };
        assert!(
            text.contains("line 1") && !text.contains("secret3"),
            "{text}"
        );
    }
}
