//! The server's memory over a real socket: warming, pinning within a share and across a restart, and what a deletion
//! gives back.

use espalier_client::{Client, v1};
use espalier_tests::TestServer;
use tonic::Code;
use v1::ResidencyLevel;

use crate::adapter_api::{push, reason};
use crate::client_side::{answer, client, tenant};

async fn level(client: &Client, name: &str) -> ResidencyLevel {
    let name = client.names().adapter(name).unwrap();
    client.get_residency(&name).await.unwrap().level()
}

async fn memory(client: &Client) -> v1::ListResidencyResponse {
    let request = v1::ListResidencyRequest {
        parent: client.names().parent().unwrap(),
        ..Default::default()
    };
    client.list_residency(request).await.unwrap()
}

#[tokio::test]
async fn a_version_is_warmed_before_anybody_asks_and_leaves_when_deleted() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let version = push(&acme, "a", 0).await;
    let disk = acme.get_residency(&version.name).await.unwrap();
    assert_eq!(disk.level(), ResidencyLevel::Disk);
    assert_eq!((disk.bytes, disk.last_used_time), (0, None));
    assert!(memory(&acme).await.residency.is_empty());

    let warm = acme
        .warm_adapter_version(&version.name, true)
        .await
        .unwrap();
    assert_eq!(warm.level(), ResidencyLevel::Resident);
    assert!(warm.bytes > 0 && !warm.pinned && warm.leases == 0);
    assert_eq!(warm.digest, version.digest);
    let (_, by) = answer(&acme, Some("a"), "once upon", 4).await;
    assert_eq!(by, std::slice::from_ref(&version.name));
    let used = acme.get_residency(&version.name).await.unwrap();
    assert_eq!(used.requests, warm.requests + 1);

    // Without waiting it comes a moment later.
    let second = push(&acme, "b", 1).await;
    acme.warm_adapter_version(&second.name, false)
        .await
        .unwrap();
    while level(&acme, "b").await != ResidencyLevel::Resident {
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    let (code, _) = reason(
        acme.warm_adapter_version("tenants/acme/adapters/no", true)
            .await,
    );
    assert_eq!(code, Code::NotFound);

    assert_eq!(memory(&acme).await.residency.len(), 2);
    let delete = v1::DeleteAdapterRequest {
        name: acme.names().adapter("b").unwrap(),
        etag: String::new(),
        force: true,
    };
    acme.delete_adapter(delete).await.unwrap();
    let held = memory(&acme).await;
    assert_eq!(held.residency.len(), 1);
    assert_eq!(
        held.used_bytes, warm.bytes,
        "a deleted adapter takes nothing"
    );
    server.ended().await;
}

#[tokio::test]
async fn a_pin_holds_within_its_share_and_over_a_restart() {
    let settings = [
        ("adapter_cache_bytes", "1MiB"),
        ("max_pinned_share", "0.08"),
    ];
    let server = TestServer::start(&settings).await;
    let acme = tenant(server.addr, "acme").await;
    // Large ones, so that the second does not fit beside the first in a twelfth of the budget.
    let versions = [push(&acme, "a", 2).await, push(&acme, "b", 5).await];
    let pinned = acme.pin_adapter_version(&versions[0].name).await.unwrap();
    assert!(pinned.pinned && pinned.level() == ResidencyLevel::Resident);
    let held = memory(&acme).await;
    assert_eq!(held.pinned_bytes, pinned.bytes);
    assert_eq!(held.pinned_budget_bytes, 83_886);
    assert!(2 * pinned.bytes > held.pinned_budget_bytes, "{pinned:?}");
    let (code, why) = reason(acme.pin_adapter_version(&versions[1].name).await);
    assert_eq!(
        (code, why.as_str()),
        (Code::ResourceExhausted, "PINNED_CAPACITY")
    );
    assert!(
        !acme
            .get_adapter_version(&versions[1].name)
            .await
            .unwrap()
            .pinned
    );
    assert!(
        acme.get_adapter_version(&versions[0].name)
            .await
            .unwrap()
            .pinned
    );
    let policy = v1::MergePolicy::Unmerged;
    let kept = acme
        .set_merge_policy(&versions[0].name, policy)
        .await
        .unwrap();
    assert!(
        kept.pinned && kept.merge_policy() == policy,
        "one change leaves the other"
    );

    drop(acme);
    let server = TestServer::start_in(server.ended().await, &settings).await;
    let acme = client(server.addr, "acme", None).await;
    // It comes in the background of the start.
    loop {
        let place = acme.get_residency(&versions[0].name).await.unwrap();
        if place.pinned {
            assert_eq!(place.level(), ResidencyLevel::Resident);
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    assert_eq!(level(&acme, "b").await, ResidencyLevel::Disk);
    let version = acme.get_adapter_version(&versions[0].name).await.unwrap();
    assert_eq!(version.merge_policy(), policy);
    let place = acme.unpin_adapter_version(&versions[0].name).await.unwrap();
    assert!(!place.pinned);
    assert_eq!(memory(&acme).await.pinned_bytes, 0);
    acme.pin_adapter_version(&versions[1].name).await.unwrap();
    server.ended().await;
}
