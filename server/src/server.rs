//! The server put together: state opened, model loaded, engine started, services behind their layers; then run until it
//! is told to stop, and taken down in order. Tests start it in their own process with `serve` on port 0.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_engine::EngineHandle;
use espalier_engine::device::{self, MemoryPlan, NoDevice, NoRoom};
use espalier_engine::error::EngineError;
use espalier_engine::model::error::ModelError;
use espalier_engine::model::{Dtype, WeightFormats};
use espalier_proto::v1;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tonic::codec::CompressionEncoding;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;

use crate::artifact_store::{ArtifactStore, StoreError};
use crate::bulk::{BulkError, BulkStore};
use crate::config::{Config, ConfigError};
use crate::database::{DataDirLock, Database, DatabaseError};
use crate::datasets::DatasetStore;
use crate::hub::{self, HubError, Located};
use crate::jobs::{self, JobError, JobService};
use crate::registry::Registry;
use crate::services::Shell;
use crate::services::adapter::residency::restore_pins;
use crate::services::adapter::{AdapterService, artifact_limits};
use crate::services::bulk::BulkService;
use crate::services::inference::InferenceService;
use crate::services::model::ModelService;
use crate::services::tenant::TenantService;
use crate::services::training::TrainingService;
use crate::shutdown::{Phase, within};
use crate::source::StoredAdapters;
use crate::tenants::{AccessPolicy, TenantError, TenantStore};
use crate::{health, stack};

mod limits;

/// After the cut, connections only have to close.
const CLOSING: Duration = Duration::from_secs(2);

/// Messages carry a little more than the bytes they are about.
const ENVELOPE: usize = 64 * 1024;

/// Why the server could not start or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An address that others can reach, and no key to keep them out.
    #[error(
        "listen: {addr} can be reached from other machines, but no API key is configured; set service_key_file (or \
         ESPALIER_SERVICE_KEY), or listen on 127.0.0.1 and create a key first with: espalier tenants create NAME"
    )]
    OpenToTheWorld {
        /// The address.
        addr: SocketAddr,
    },
    /// What `--model` names cannot be had.
    #[error("model: {0}")]
    Hub(#[from] HubError),
    /// The model's files.
    #[error("model: {0}")]
    Model(#[from] ModelError),
    /// The GPU that was asked for.
    #[error(transparent)]
    Device(#[from] NoDevice),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] NoRoom),
    /// The engine.
    #[error("engine: {0}")]
    Engine(#[from] EngineError),
    /// The database under the data directory.
    #[error("data_dir: {0}")]
    Database(#[from] DatabaseError),
    /// The artifacts under the data directory.
    #[error("data_dir: {0}")]
    Store(#[from] StoreError),
    /// The keys in the database.
    #[error("data_dir: {0}")]
    Tenants(#[from] TenantError),
    /// The jobs in the database.
    #[error("data_dir: {0}")]
    Jobs(#[from] JobError),
    /// The bulk jobs under the data directory.
    #[error("data_dir: {0}")]
    Bulk(#[from] BulkError),
    /// The operating system.
    #[error("{action}: {cause}")]
    Io {
        /// What was being done.
        action: String,
        /// What it said.
        cause: std::io::Error,
    },
    /// The transport.
    #[error("the gRPC server failed: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// A thread of the runtime.
    #[error("a task of the server failed: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// A server that is ready to run.
pub struct Server {
    shell: Shell,
    routes: Routes,
    keys: TenantStore,
    jobs: JobService,
    bulk: BulkStore,
    health: tonic_health::server::HealthReporter,
    about: About,
    /// Held as long as the server lives, so that a second one cannot work on the same directory.
    lock: DataDirLock,
}

/// What an operator wants to see at once; its `Display` is the start-up block.
#[derive(Debug, Clone)]
pub struct About {
    /// Name of the base model.
    pub model: String,
    /// SHA-256 (hex) of its source weights.
    pub digest: String,
    /// Where it lives.
    pub device: String,
    /// How that device's memory is shared out, where it is planned.
    pub plan: Option<MemoryPlan>,
    /// What its matrices were asked to be kept in.
    pub dtype: Dtype,
    /// What they are kept in, and their bytes.
    pub formats: WeightFormats,
    /// Tokens of one sequence.
    pub context: usize,
    /// Where it listens.
    pub listen: SocketAddr,
    /// The metrics page.
    pub metrics: Option<SocketAddr>,
    /// Where its state lies.
    pub data_dir: PathBuf,
    /// Whether a call without a key is answered.
    pub open: bool,
    /// Time from start to ready.
    pub startup: Duration,
}

/// Builds a server on the listener and runs it until `shutdown` resolves; returns when everything is down.
///
/// # Errors
/// As [`Server::build`] and [`Server::run`].
pub async fn serve(
    config: Config,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    Server::build(config, &listener)
        .await?
        .run(listener, shutdown)
        .await
}

// === impl Server ===

impl Server {
    /// Opens the state, loads the model, starts the engine and puts the services together. Nothing is answered yet.
    ///
    /// # Errors
    /// Whatever keeps the server from starting, with the setting that it comes from.
    pub async fn build(config: Config, listener: &TcpListener) -> Result<Server, ServeError> {
        let began = Instant::now();
        let config = Arc::new(config);
        limit_threads(config.engine.threads);
        let listen = listener.local_addr().map_err(|cause| ServeError::Io {
            action: "listen".to_owned(),
            cause,
        })?;
        let loopback = is_loopback(listen.ip());
        let lock = DataDirLock::take(&config.server.data_dir)?;
        let database = Database::open(&config.server.data_dir)?;
        let store = ArtifactStore::open(&config.server.data_dir)?;
        let policy = AccessPolicy {
            service_key: config.service_key()?,
            loopback_only: loopback,
        };
        let keys =
            TenantStore::open(database.clone(), limits::tenant_limits(&config), &policy).await?;
        if !loopback && policy.service_key.is_none() && !keys.has_keys() {
            return Err(ServeError::OpenToTheWorld { addr: listen });
        }
        let datasets = DatasetStore::new(
            database.clone(),
            store.clone(),
            limits::dataset_limits(&config),
        );
        let bulk = BulkStore::open(
            database.clone(),
            &config.server.data_dir,
            limits::bulk_limits(&config),
        )
        .await?;
        let registry = Registry::new(
            database.clone(),
            store.clone(),
            limits::registry_limits(&config),
        );
        // Before anything can store a blob: what a crash left without a name goes.
        registry.sweep().await.map_err(JobError::from)?;
        let source = StoredAdapters::new(store.clone(), registry.clone(), Handle::current());
        let (engine, device) = start_engine(&config, source).await?;
        let shell = Shell::new(config, engine, registry);
        let parts = jobs::Parts {
            database,
            store: store.clone(),
            registry: shell.registry.clone(),
            datasets: datasets.clone(),
            base: trained_base(&shell),
            limits: limits::job_limits(&shell.config, &shell.engine),
            artifact_limits: artifact_limits(&shell.config),
        };
        let jobs = JobService::start(parts, Arc::new(shell.engine.clone())).await?;
        let (health, health_service) = tonic_health::server::health_reporter();
        health::report(&health, ServingStatus::NotServing).await;
        let about = About::of(&shell, device, listen, keys.is_open(), began.elapsed());
        crate::telemetry::build_info(&about.model);
        // Beside the first requests: a start does not wait for what was pinned.
        tokio::spawn(restore_pins(shell.engine.clone(), shell.registry.clone()));
        let state = State {
            keys: keys.clone(),
            store,
            datasets,
            jobs: jobs.clone(),
            bulk: bulk.clone(),
        };
        let routes = routes(&shell, state, Routes::new(health_service));
        Ok(Server {
            shell,
            routes,
            keys,
            jobs,
            bulk,
            health,
            about,
            lock,
        })
    }

    /// What to tell the operator.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// Answers calls until `shutdown` resolves, then drains within the configured times.
    ///
    /// # Errors
    /// A transport that fails, or a ready file that cannot be written.
    pub async fn run(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), ServeError> {
        let Server {
            shell,
            routes,
            keys,
            jobs,
            bulk,
            health,
            about,
            lock: _lock,
        } = self;
        let config = Arc::clone(&shell.config);
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let router = stack::server(&config.http)
            .layer(stack::layers(&config, keys, shell.gate.clone()))
            .add_routes(routes);
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let mut serving = tokio::spawn(router.serve_with_incoming_shutdown(incoming, async {
            let _ = stopped.await;
        }));
        shell.lifecycle.advance(Phase::Serving);
        let probe = tokio::spawn(health::watch(
            health,
            shell.engine.clone(),
            shell.lifecycle.clone(),
        ));
        let ready = ReadyFile::write(&config, about.listen)?;
        tokio::select! {
            ended = &mut serving => return Ok(ended??),
            () = shutdown => {}
        }
        drop(ready);
        shell.lifecycle.advance(Phase::LameDuck);
        tokio::time::sleep(config.server.lame_duck).await;
        shell.lifecycle.advance(Phase::Draining);
        let _ = stop.send(());
        jobs.stop();
        bulk.stop();
        drain(&shell, config.server.drain_timeout).await;
        shell.lifecycle.advance(Phase::Cut);
        let _ = probe.await;
        match tokio::time::timeout(CLOSING, &mut serving).await {
            Ok(ended) => ended??,
            Err(_) => serving.abort(),
        }
        Ok(())
    }
}

/// Lets running calls finish and training reach a checkpoint; whatever is left after `limit` is cut by the caller.
async fn drain(shell: &Shell, limit: Duration) {
    let engine = async {
        if let Err(error) = shell.engine.drain(limit).await {
            tracing::warn!(%error, "the engine did not drain");
        }
    };
    // The engine ends its own work at the limit; a moment more, so that its last events reach their streams.
    let both = async {
        tokio::join!(engine, shell.gate.idle());
    };
    if !within(limit + Duration::from_millis(500), both).await {
        tracing::warn!(
            limit_ms = limit.as_millis(),
            "calls were still running at the end of drain_timeout and are cut"
        );
    }
}

/// What the control services stand on.
struct State {
    keys: TenantStore,
    store: ArtifactStore,
    datasets: DatasetStore,
    jobs: JobService,
    bulk: BulkStore,
}

/// A generated service with the message limit and compressed requests.
macro_rules! limited {
    ($server:path, $service:expr, $bytes:expr) => {{
        use $server as Generated;
        Generated::new($service)
            .max_decoding_message_size($bytes)
            .accept_compressed(CompressionEncoding::Gzip)
    }};
}

fn routes(shell: &Shell, state: State, routes: Routes) -> Routes {
    let config = &shell.config;
    let bytes = config.limits.max_message_bytes.as_usize();
    let chunk = config.adapters.max_chunk_bytes.as_usize() + ENVELOPE;
    let keys = state.keys.clone();
    let inference = InferenceService::new(shell.clone());
    let bulk = BulkService::start(state.bulk, inference.clone(), Arc::clone(config));
    let model = ModelService::new(shell.clone(), move || !keys.is_open());
    let adapter = AdapterService::new(
        shell.registry.clone(),
        state.store,
        shell.engine.clone(),
        Arc::clone(config),
        shell.base.name.clone(),
    );
    let training = TrainingService::new(
        state.jobs,
        state.datasets,
        shell.registry.clone(),
        Arc::clone(config),
    );
    let tenant = TenantService::new(
        state.keys,
        shell.registry.clone(),
        config.catalog.clone(),
        config.limits.clone(),
    );
    let mut routes = routes
        .add_service(limited!(
            v1::inference_service_server::InferenceServiceServer,
            inference,
            bytes
        ))
        .add_service(limited!(
            v1::model_service_server::ModelServiceServer,
            model,
            bytes
        ))
        .add_service(limited!(
            v1::adapter_service_server::AdapterServiceServer,
            adapter,
            bytes.max(chunk)
        ))
        .add_service(limited!(
            v1::training_service_server::TrainingServiceServer,
            training,
            bytes.max(chunk)
        ))
        .add_service(limited!(
            v1::bulk_service_server::BulkServiceServer,
            bulk,
            bytes.max(chunk)
        ))
        .add_service(limited!(
            v1::tenant_service_server::TenantServiceServer,
            tenant,
            bytes
        ));
    if config.server.reflection {
        routes = with_reflection(routes);
    }
    routes
}

/// The base as training sees it.
fn trained_base(shell: &Shell) -> jobs::Base {
    let model = shell.engine.model();
    jobs::Base {
        name: model.name.clone(),
        resource: shell.base.name.clone(),
        digest: model.digest.clone(),
        shape: model.config.base_shape(),
        family: model.config.family,
        max_tokens: model.max_sequence_tokens,
        tokenizer: Arc::clone(&model.tokenizer),
        template: model.template.clone(),
        stop_ids: model.stop_ids.clone(),
    }
}

/// Both protocol versions: older tools only speak v1alpha.
fn with_reflection(mut routes: Routes) -> Routes {
    let builder = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(espalier_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    match (builder().build_v1(), builder().build_v1alpha()) {
        (Ok(v1), Ok(v1alpha)) => routes = routes.add_service(v1).add_service(v1alpha),
        (Err(error), _) | (_, Err(error)) => {
            tracing::error!(%error, "reflection is off: the descriptor set does not read back")
        }
    }
    routes
}

/// Operations run on the process's one team of threads; several servers in a process (tests) share it, so the first one decides.
fn limit_threads(threads: usize) {
    if let Err(in_force) = espalier_adapters::ops::set_threads(threads) {
        tracing::warn!(
            threads,
            in_force,
            "the setting threads comes too late for this process"
        );
    }
}

/// The device that serves, and how its memory is shared out; a processor's is not.
#[derive(Debug, Clone)]
struct DeviceReport {
    device: String,
    plan: Option<MemoryPlan>,
}

/// Loading a model takes seconds of reading and multiplying, so it happens off the runtime's threads.
async fn start_engine(
    config: &Arc<Config>,
    source: StoredAdapters,
) -> Result<(EngineHandle, DeviceReport), ServeError> {
    let config = Arc::clone(config);
    let started = tokio::task::spawn_blocking(move || {
        let server = &config.server;
        // Asked first: a GPU that is not there should not cost a model's loading.
        let (ops, dtype) = device::open(server.device, server.dtype.0, server.deterministic)?;
        let located = match server.synthetic.as_str() {
            "" => hub::locate(&server.model, &config.hub)?,
            name => Located::built_in(format!("synthetic:{name}")),
        };
        let mut model = espalier_engine::model::load_as(&located.spec, dtype)?;
        if let Some(name) = located.name {
            model.name = name;
        }
        let mut engine = limits::engine_config(&config, &ops, &model.config);
        let report = DeviceReport {
            device: device::about(&ops),
            plan: device::plan(&ops, dtype, &model.config, &mut engine)?,
        };
        let handle = EngineHandle::start(engine, ops, model, Arc::new(source))?;
        Ok::<_, ServeError>((handle, report))
    });
    started.await?
}

fn is_loopback(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => {
            ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback())
        }
    }
}

// === impl About ===

impl About {
    fn of(
        shell: &Shell,
        report: DeviceReport,
        listen: SocketAddr,
        open: bool,
        startup: Duration,
    ) -> About {
        About {
            device: report.device,
            plan: report.plan,
            model: shell.engine.model().name.clone(),
            digest: shell.base.digest.clone(),
            dtype: shell.engine.model().dtype,
            formats: shell.engine.model().formats.clone(),
            context: shell.engine.model().max_sequence_tokens,
            listen,
            metrics: shell.config.server.metrics_listen.0,
            data_dir: shell.config.server.data_dir.clone(),
            open,
            startup,
        }
    }
}

impl fmt::Display for About {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = self.digest.get(..12).unwrap_or(&self.digest);
        writeln!(
            f,
            "espalierd {} is ready after {:.1} s",
            env!("CARGO_PKG_VERSION"),
            self.startup.as_secs_f64()
        )?;
        writeln!(
            f,
            "  model    {} ({short}..., {} tokens a sequence)",
            self.model, self.context
        )?;
        writeln!(
            f,
            "  weights  {}: {:.1} MiB, {}",
            self.dtype,
            self.formats.bytes() as f64 / f64::from(1 << 20),
            self.formats
        )?;
        writeln!(f, "  device   {}", self.device)?;
        if let Some(plan) = &self.plan {
            writeln!(f, "  memory   {plan}")?;
        }
        writeln!(f, "  listens  {}", self.listen)?;
        match self.metrics {
            Some(addr) => writeln!(f, "  metrics  http://{addr}/metrics")?,
            None => writeln!(f, "  metrics  off")?,
        }
        writeln!(f, "  data     {}", self.data_dir.display())?;
        if self.open {
            write!(
                f,
                "  access   open, because no key is configured: only this machine can connect (see service_key)"
            )
        } else {
            write!(f, "  access   every call needs an API key")
        }
    }
}

/// The file that tells scripts where the server listens; gone again when the server stops taking calls.
struct ReadyFile(Option<PathBuf>);

impl ReadyFile {
    fn write(config: &Config, listen: SocketAddr) -> Result<ReadyFile, ServeError> {
        let Some(path) = &config.server.ready_file.0 else {
            return Ok(ReadyFile(None));
        };
        let fail = |cause| ServeError::Io {
            action: format!("ready_file: cannot write {}", path.display()),
            cause,
        };
        // Renamed into place, so that a script that waits for the file never reads half a line.
        let part = path.with_extension("part");
        std::fs::write(&part, format!("{listen}\n")).map_err(fail)?;
        std::fs::rename(&part, path).map_err(fail)?;
        Ok(ReadyFile(Some(path.clone())))
    }
}

impl Drop for ReadyFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_recognised_in_both_families() {
        for (ip, expected) in [
            ("127.0.0.1", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("0.0.0.0", false),
            ("::", false),
            ("10.0.0.1", false),
        ] {
            assert_eq!(
                is_loopback(ip.parse().unwrap_or(IpAddr::from([0, 0, 0, 0]))),
                expected,
                "{ip}"
            );
        }
    }
}
