//! `espalierd` as a user runs it: a process of its own on a fresh data directory, with an operator's key, tenants that
//! have keys of their own, and adapters that were uploaded. Ends with the value.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use espalier_client::{AdapterUpload, Client, ClientConfig, v1};
use tempfile::TempDir;

use crate::Fallible;

/// Loading a model takes seconds, on a busy machine many.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running server.
pub struct Daemon {
    /// Where it listens.
    pub addr: SocketAddr,
    key: String,
    child: Child,
    _data: TempDir,
}

/// A tenant's client, and the adapter that is its own.
#[derive(Clone)]
pub struct Tenant {
    /// Connected with the tenant's key.
    pub client: Client,
    /// `tenants/{t}/adapters/{a}`; none for the base model.
    pub adapter: Option<String>,
}

// === impl Daemon ===

impl Daemon {
    /// Starts the `espalierd` that was built beside this program, and waits until it is ready. `flags` are a user's.
    ///
    /// # Errors
    /// No such program, or a server that ends before it is ready, with what it said.
    pub fn spawn(model: &str, flags: &[String]) -> Fallible<Daemon> {
        let program = std::env::current_exe()?.with_file_name("espalierd");
        let data = tempfile::tempdir()?;
        let (ready, log) = (data.path().join("ready"), data.path().join("log"));
        let key = hex(&rand::random::<[u8; 24]>());
        let mut command = Command::new(&program);
        // Only the flags count: what this process's environment configures is left behind.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("ESPALIER_") {
                command.env_remove(name);
            }
        }
        let mut child = command
            .args(["--model", model, "--listen", "127.0.0.1:0"])
            .args(["--metrics-listen", "off", "--log", "warn"])
            .arg("--data-dir")
            .arg(data.path().join("data"))
            .arg("--ready-file")
            .arg(&ready)
            .args(flags)
            .env("ESPALIER_SERVICE_KEY", &key)
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log)?)
            .spawn()
            .map_err(|error| {
                let program = program.display();
                format!("{program}: {error}; build it first: cargo build --workspace --bins")
            })?;
        let began = Instant::now();
        loop {
            if let Ok(line) = std::fs::read_to_string(&ready) {
                return Ok(Daemon {
                    addr: line.trim().parse()?,
                    key,
                    child,
                    _data: data,
                });
            }
            let ended = child.try_wait()?;
            if ended.is_some() || began.elapsed() > PATIENCE {
                let _ = child.kill();
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                return Err(format!("espalierd did not become ready: {said}").into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The process's id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Registers a tenant, makes a key for it, uploads its adapter with that key and loads it.
    ///
    /// # Errors
    /// What the server refuses.
    pub async fn tenant(&self, name: &str, adapter: Option<&Path>) -> Fallible<Tenant> {
        let operator = self.connect(None, &self.key).await?;
        operator
            .create_tenant(v1::CreateTenantRequest {
                tenant_id: name.to_owned(),
                ..Default::default()
            })
            .await?;
        let made = operator
            .create_api_key(v1::CreateApiKeyRequest {
                parent: format!("tenants/{name}"),
                api_key: Some(v1::ApiKey {
                    role: v1::ApiKeyRole::Tenant.into(),
                    ..Default::default()
                }),
            })
            .await?;
        let client = self.connect(Some(name), &made.secret).await?;
        let Some(dir) = adapter else {
            return Ok(Tenant {
                client,
                adapter: None,
            });
        };
        let adapter = format!("tenants/{name}/adapters/own");
        client
            .upload_adapter(AdapterUpload {
                adapter: adapter.clone(),
                dir: dir.to_owned(),
                profile: None,
                set_aliases: vec!["default".to_owned()],
                validate_only: false,
                create_if_missing: true,
                description: String::new(),
                request_id: String::new(),
            })
            .await?;
        Ok(Tenant {
            client,
            adapter: Some(adapter),
        })
    }

    async fn connect(&self, tenant: Option<&str>, key: &str) -> Fallible<Client> {
        let mut config = ClientConfig::new(format!("http://{}", self.addr));
        config.api_key = Some(key.to_owned());
        config.tenant = tenant.map(str::to_owned);
        Ok(Client::connect(config).await?)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// === impl Tenant ===

impl Tenant {
    /// A greedy generation of exactly `new` tokens after these ids.
    ///
    /// # Errors
    /// A name that the client refuses.
    pub fn request(&self, prompt: &[u32], new: usize) -> Fallible<v1::GenerateRequest> {
        Ok(v1::GenerateRequest {
            target: Some(self.client.target(self.adapter.as_deref())?),
            input: Some(v1::generate_request::Input::TokenIds(v1::TokenIds {
                ids: prompt.to_vec(),
            })),
            sampling: Some(v1::SamplingParams {
                temperature: Some(0.0),
                ..Default::default()
            }),
            stop: Some(v1::StopConditions {
                max_tokens: Some(u32::try_from(new)?),
                ignore_eos: Some(true),
                ..Default::default()
            }),
            ..Default::default()
        })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
