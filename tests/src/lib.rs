//! The harness: a server in this process, or `espalierd` as a child, over real sockets on free ports, with the seeded
//! tiny model. It must not know what a test is about.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use espalier_server::config::Config;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};

/// The model of tests: random, seeded, ready in milliseconds.
pub const TINY: &str = "tiny:7";
/// Nothing here should take so long; it is there so that a hang fails instead of hanging the build.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server in this process.
pub struct TestServer {
    /// Where it listens.
    pub addr: SocketAddr,
    /// Where its state lies.
    pub data: TempDir,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), espalier_server::ServeError>>,
}

impl TestServer {
    /// Starts with these settings over the harness's own (tiny model, temporary data directory, free port).
    ///
    /// # Panics
    /// When the server does not start.
    pub async fn start(settings: &[(&str, &str)]) -> TestServer {
        let data =
            tempfile::tempdir().unwrap_or_else(|error| panic!("a temporary directory: {error}"));
        Self::start_in(data, settings).await
    }

    /// The same on a data directory that exists, as after a restart.
    ///
    /// # Panics
    /// When the server does not start.
    pub async fn start_in(data: TempDir, settings: &[(&str, &str)]) -> TestServer {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap_or_else(|error| panic!("a free port: {error}"));
        let addr = listener
            .local_addr()
            .unwrap_or_else(|error| panic!("an address: {error}"));
        let path = data.path().to_string_lossy().into_owned();
        let mut pairs = vec![
            ("model", TINY),
            ("data_dir", path.as_str()),
            ("metrics_listen", "off"),
        ];
        pairs.extend(["kv_cache_bytes", "adapter_cache_bytes"].map(|key| (key, "64MiB")));
        pairs.extend_from_slice(settings);
        let config = Config::from_pairs(&pairs).unwrap_or_else(|error| panic!("{error}"));
        let server = espalier_server::Server::build(config, &listener)
            .await
            .unwrap_or_else(|error| panic!("{error}"));
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(server.run(listener, async {
            let _ = stopped.await;
        }));
        TestServer {
            addr,
            data,
            stop: Some(stop),
            task,
        }
    }

    /// A connection.
    ///
    /// # Panics
    /// When there is none.
    pub async fn channel(&self) -> Channel {
        connect(self.addr).await
    }

    /// Tells the server to stop; it drains until [`TestServer::ended`].
    pub fn begin_stop(&mut self) {
        drop(self.stop.take());
    }

    /// Waits until everything is down and gives the data directory back.
    ///
    /// # Panics
    /// When the server failed, or is not down in time.
    pub async fn ended(mut self) -> TempDir {
        self.begin_stop();
        match tokio::time::timeout(PATIENCE, self.task).await {
            Ok(Ok(Ok(()))) => self.data,
            Ok(Ok(Err(error))) => panic!("the server failed: {error}"),
            Ok(Err(error)) => panic!("the server's task failed: {error}"),
            Err(_) => panic!("the server did not stop"),
        }
    }
}

/// Connects, trying until the server answers.
///
/// # Panics
/// When it does not within a minute.
pub async fn connect(addr: SocketAddr) -> Channel {
    let endpoint =
        Endpoint::from_shared(format!("http://{addr}")).unwrap_or_else(|error| panic!("{error}"));
    let began = Instant::now();
    loop {
        match endpoint.connect().await {
            Ok(channel) => return channel,
            Err(error) if began.elapsed() > PATIENCE => panic!("cannot connect to {addr}: {error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// `espalierd` as a child process; killed when dropped.
pub struct Daemon {
    /// Where it listens.
    pub addr: SocketAddr,
    child: Child,
}

impl Daemon {
    /// Starts the binary on a data directory, waits until it is ready. `args` are flags, as a user writes them.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn spawn(data: &Path, args: &[&str]) -> Daemon {
        let ready = data.join("ready");
        let _ = std::fs::remove_file(&ready);
        let mut child = espalierd_command()
            .args(["--listen", "127.0.0.1:0", "--metrics-listen", "off"])
            .arg("--data-dir")
            .arg(data)
            .arg("--ready-file")
            .arg(&ready)
            .args(args)
            // glibc's arenas, one a thread, keep what each had at its worst; with one, a process's size says what it holds.
            .env("MALLOC_ARENA_MAX", "1")
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap_or_else(|error| panic!("espalierd does not start: {error}"));
        let began = Instant::now();
        loop {
            if let Ok(line) = std::fs::read_to_string(&ready) {
                let addr = line
                    .trim()
                    .parse()
                    .unwrap_or_else(|error| panic!("the ready file says {line:?}: {error}"));
                return Daemon { addr, child };
            }
            if let Ok(Some(status)) = child.try_wait() {
                panic!("espalierd ended before it was ready: {status}");
            }
            assert!(
                began.elapsed() < PATIENCE,
                "espalierd is not ready after {PATIENCE:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The process's id, to signal it.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Ends it at once, as a power cut would.
    ///
    /// # Panics
    /// When the operating system refuses.
    pub fn kill(mut self) {
        self.child
            .kill()
            .unwrap_or_else(|error| panic!("kill: {error}"));
        self.child
            .wait()
            .unwrap_or_else(|error| panic!("wait: {error}"));
    }

    /// Asks it to stop with SIGTERM and waits; says whether it ended with success.
    ///
    /// # Panics
    /// When it does not end.
    pub fn terminate(mut self) -> bool {
        let id = self.child.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &id]).status();
        assert!(
            sent.is_ok_and(|status| status.success()),
            "SIGTERM was not sent"
        );
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            if let Ok(Some(status)) = self.child.try_wait() {
                return status.success();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("espalierd did not stop after SIGTERM");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A command that runs `espalierd` with nothing of what this process's environment configures: a test says what it wants.
///
/// # Panics
/// When the program is not there.
pub fn espalierd_command() -> Command {
    let mut command = Command::new(espalierd());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ESPALIER_") {
            command.env_remove(name);
        }
    }
    command
}

/// The server's program.
///
/// # Panics
/// When it is not beside the tests, where cargo puts it.
pub fn espalierd() -> PathBuf {
    program("espalierd-under-test")
}

/// The command-line client's program.
///
/// # Panics
/// When it is not beside the tests, where cargo puts it.
pub fn espalier() -> PathBuf {
    program("espalier-under-test")
}

fn program(name: &str) -> PathBuf {
    let tests = std::env::current_exe().unwrap_or_else(|error| panic!("this test's path: {error}"));
    let found = tests
        .ancestors()
        .skip(1)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "{name} is not beside {}; run the tests with cargo",
            tests.display()
        )
    })
}
