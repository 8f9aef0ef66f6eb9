//! A client in another language: the Python example of the docs against a running server, and every proto through plain
//! protoc. Both need a Python with grpcio, which scripts/test.sh makes.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use espalier_client::v1;
use espalier_tests::TestServer;

use crate::adapter_api::two_tenants;
use crate::client_side::{SERVICE_KEY, classification, inline, labelled, start, succeeded};

const EXAMPLE: &str = "examples/python_client.py";

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn python() -> Option<PathBuf> {
    let found = std::env::var_os("ESPALIER_PYTHON").map(PathBuf::from);
    if found.is_none() {
        eprintln!(
            "skipped: ESPALIER_PYTHON names no Python with grpcio (scripts/test.sh makes one)"
        );
    }
    found
}

/// Runs the example as its first line says, from the repository's root.
async fn example(python: &Path, addr: SocketAddr, key: &str, args: [&str; 2]) -> Output {
    let mut command = Command::new(python);
    command.current_dir(root()).arg(EXAMPLE).args(args);
    command.env("ESPALIER_SERVER", format!("http://{addr}"));
    command.env("ESPALIER_API_KEY", key);
    tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_example_classifies_and_says_what_is_wrong() {
    let Some(python) = python() else { return };
    let server = TestServer::start(&[("service_key", SERVICE_KEY)]).await;
    let (acme, _) = two_tenants(&server).await;
    let rows = [
        ("where is my parcel", "parcel"),
        ("the parcel is lost", "parcel"),
        ("pay me back", "refund"),
        ("i want a refund", "refund"),
    ];
    let mut spec = classification(&acme, "tickets", inline(labelled(&rows)), true);
    spec.hyper_parameters.as_mut().unwrap().learning_rate = Some(0.05);
    spec.hyper_parameters.as_mut().unwrap().head_learning_rate = Some(0.05);
    let job = start(&acme, spec).await;
    let version = succeeded(&acme, &job).await.version;
    assert_eq!(version, "tenants/acme/adapters/tickets/versions/1");

    let key = v1::CreateApiKeyRequest {
        parent: "tenants/acme".to_owned(),
        api_key: None,
    };
    let admin = crate::client_side::client(server.addr, "acme", Some(SERVICE_KEY)).await;
    let key = admin.create_api_key(key).await.unwrap().secret;
    let adapter = "tenants/acme/adapters/tickets";
    let output = example(&python, server.addr, &key, [adapter, "i want a refund"]).await;
    let (said, wrong) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{wrong}");
    assert!(
        said.starts_with("refund (0.") || said.starts_with("refund (1."),
        "{said}"
    );
    assert!(said.trim_end().ends_with(&version), "{said}");

    let output = example(
        &python,
        server.addr,
        &key,
        ["tenants/acme/adapters/none", "hello"],
    )
    .await;
    let (said, wrong) = (text(&output.stdout), text(&output.stderr));
    assert!(!output.status.success() && said.is_empty(), "{said}");
    assert!(
        wrong.contains("NOT_FOUND") && wrong.contains("tenants/acme/adapters/none"),
        "{wrong}"
    );
    let output = example(&python, server.addr, "esp_not_a_key", [adapter, "hello"]).await;
    assert!(
        text(&output.stderr).contains("UNAUTHENTICATED"),
        "{}",
        text(&output.stderr)
    );
    server.ended().await;
}

#[test]
fn plain_protoc_compiles_every_proto() {
    let Some(python) = python() else { return };
    let out = tempfile::tempdir().unwrap();
    let set = out.path().join("set.binpb");
    let dir = root().join("proto/espalier/v1");
    let mut protos: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .map(|name| format!("espalier/v1/{name}"))
        .collect();
    protos.sort();
    assert!(protos.len() >= 6, "{protos:?}");
    let mut python = Command::new(python);
    python
        .current_dir(root())
        .args(["-m", "grpc_tools.protoc", "--proto_path=proto"]);
    python
        .arg("--include_imports")
        .arg(format!("--descriptor_set_out={}", set.display()));
    python.arg(format!("--python_out={}", out.path().display()));
    python.arg(format!("--grpc_python_out={}", out.path().display()));
    let output = python.args(&protos).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    // Unused imports and the like are said on a successful run.
    assert_eq!(text(&output.stderr), "");
    use prost::Message as _;
    let compiled = std::fs::read(set).unwrap();
    let compiled = prost_types::FileDescriptorSet::decode(compiled.as_slice()).unwrap();
    let names: Vec<&str> = compiled.file.iter().map(|file| file.name()).collect();
    assert!(
        protos.iter().all(|proto| names.contains(&proto.as_str())),
        "{names:?}"
    );
    for file in compiled
        .file
        .iter()
        .filter(|file| file.package() == "espalier.v1")
    {
        let options = file.options.as_ref().unwrap();
        assert!(
            !options.go_package().is_empty() && !options.java_package().is_empty(),
            "{}",
            file.name()
        );
    }
}
