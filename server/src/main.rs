//! `espalierd`: arguments to configuration to telemetry to server; then run until a signal, and drain. Everything that
//! could be tested lies in the library.

use std::process::ExitCode;

use espalier_server::config::{Config, Invocation};
use espalier_server::{Server, shutdown, telemetry};
use tokio::net::TcpListener;

fn main() -> ExitCode {
    let config = match Config::from_command_line(std::env::args_os()) {
        Ok(Invocation::Print(config)) => {
            print!("{}", config.to_toml());
            return ExitCode::SUCCESS;
        }
        Ok(Invocation::Completions(script)) => {
            print!("{script}");
            return ExitCode::SUCCESS;
        }
        Ok(Invocation::Check(part, config)) => {
            return espalier_server::check::run(part, &config)
                .unwrap_or_else(|error| fail(&*error));
        }
        Ok(Invocation::Merge(merge, hub)) => {
            return match merge.run(&hub) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&*error),
            };
        }
        Ok(Invocation::Serve(config)) => *config,
        Err(error) => return fail(&error),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .thread_name("shell")
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    match runtime.block_on(run(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&*error),
    }
}

async fn run(config: Config) -> Result<(), Box<dyn std::error::Error>> {
    telemetry::log(&config.server)?;
    telemetry::metrics(&config.server)?;
    // Bound before the model is loaded: an address that is taken should not cost a minute's wait.
    let addr = config.server.listen;
    let listener = TcpListener::bind(addr).await.map_err(|error| {
        format!("listen: cannot bind {addr}: {error}; choose another address with --listen")
    })?;
    let signal = shutdown::signal()?;
    let server = Server::build(config, &listener).await?;
    println!("{}", server.about());
    let stop = async {
        let name = signal.await;
        tracing::info!(signal = name, "stopping");
    };
    Ok(server.run(listener, stop).await?)
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("espalierd: {error}");
    ExitCode::FAILURE
}
