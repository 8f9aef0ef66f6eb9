//! Tests of keys, doors and tenants.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use super::*;

const LIMITS: TenantLimits = TenantLimits {
    max_tenants: 5,
    max_keys: 3,
    max_display_name_bytes: 20,
    max_id_length: 63,
};

async fn open(
    dir: &tempfile::TempDir,
    service_key: Option<&str>,
    loopback_only: bool,
) -> TenantStore {
    let policy = AccessPolicy {
        service_key: service_key.map(str::to_owned),
        loopback_only,
    };
    let database = Database::open(dir.path()).unwrap();
    TenantStore::open(database, LIMITS, &policy).await.unwrap()
}

fn id(text: &str) -> TenantId {
    TenantId::parse(text).unwrap()
}

fn tenant_key(tenant: &str) -> NewKey {
    NewKey {
        parent: KeyParent::Tenant(id(tenant)),
        role: KeyRole::Tenant,
        display_name: "k".into(),
        expire_time: None,
    }
}

fn server_key(role: KeyRole) -> NewKey {
    NewKey {
        parent: KeyParent::Server,
        role,
        ..tenant_key("x")
    }
}

fn is_missing(result: Result<Principal, TenantError>) -> bool {
    matches!(
        result,
        Err(TenantError::Access(AccessError::CredentialsMissing))
    )
}

fn is_invalid(result: Result<Principal, TenantError>) -> bool {
    matches!(
        result,
        Err(TenantError::Access(AccessError::CredentialsInvalid))
    )
}

#[tokio::test]
async fn the_door_closes_step_by_step_and_stays_closed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None, true).await;
    assert_eq!(
        store.authenticate(None).await.unwrap(),
        Principal::LocalAnonymous
    );
    store
        .create_tenant(id("acme"), String::new(), None)
        .await
        .unwrap();
    let (key, credential) = store.create_key(tenant_key("acme")).await.unwrap();
    assert_eq!(
        store.authenticate(None).await.unwrap(),
        Principal::LocalBootstrap
    );
    let caller = store.authenticate(Some(&credential)).await.unwrap();
    assert_eq!(caller.tenant(), Some(&id("acme")));
    let (admin, _) = store.create_key(server_key(KeyRole::Admin)).await.unwrap();
    assert!(is_missing(store.authenticate(None).await));
    for name in [admin.name, key.name] {
        store.revoke_key(name).await.unwrap();
    }
    assert!(
        is_missing(store.authenticate(None).await),
        "revoking opened the server"
    );
    let again = open(&dir, None, true).await;
    assert!(is_missing(again.authenticate(None).await));
    assert!(!again.is_open());
}

#[tokio::test]
async fn anonymous_callers_need_loopback_and_no_configured_key() {
    let dir = tempfile::tempdir().unwrap();
    assert!(is_missing(
        open(&dir, None, false).await.authenticate(None).await
    ));
    let store = open(&dir, Some("correct horse"), true).await;
    assert!(is_missing(store.authenticate(None).await));
    assert!(is_invalid(store.authenticate(Some("correct hors")).await));
    let caller = store.authenticate(Some("correct horse")).await.unwrap();
    assert_eq!(caller, Principal::Admin { key: None });
}

#[tokio::test]
async fn a_credential_is_whole_or_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None, true).await;
    store
        .create_tenant(id("acme"), String::new(), None)
        .await
        .unwrap();
    let (key, credential) = store.create_key(tenant_key("acme")).await.unwrap();
    assert_eq!(credential.len(), 4 + 12 + 1 + 64);
    for at in 0..credential.len() {
        let mut bad = credential.clone().into_bytes();
        bad[at] = if bad[at] == b'0' { b'1' } else { b'0' };
        let bad = String::from_utf8(bad).unwrap();
        assert!(
            is_invalid(store.authenticate(Some(&bad)).await),
            "byte {at}"
        );
    }
    for bad in [
        "",
        "esp_",
        "esp__",
        "é",
        &credential[..80],
        &format!("{credential}0"),
    ] {
        assert!(is_invalid(store.authenticate(Some(bad)).await), "{bad:?}");
    }
    let file = std::fs::read(dir.path().join("espalier.db-wal")).unwrap();
    let secret = credential.rsplit('_').next().unwrap().as_bytes();
    assert!(
        !file.windows(secret.len()).any(|w| w == secret),
        "the secret is on the disk"
    );
    store.authenticate(Some(&credential)).await.unwrap();
    store.revoke_key(key.name.clone()).await.unwrap();
    assert!(is_invalid(store.authenticate(Some(&credential)).await));
    let first = store.revoke_key(key.name).await.unwrap().revoke_time;
    assert!(first.is_some());
}

#[tokio::test]
async fn keys_expire_and_service_keys_list_tenants() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None, true).await;
    for tenant in ["acme", "globex"] {
        store
            .create_tenant(id(tenant), String::new(), None)
            .await
            .unwrap();
    }
    let mut soon = tenant_key("acme");
    soon.expire_time = Some(now_ms() + 80);
    let (_, credential) = store.create_key(soon.clone()).await.unwrap();
    store.authenticate(Some(&credential)).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(120)).await;
    assert!(is_invalid(store.authenticate(Some(&credential)).await));
    assert!(matches!(
        store.create_key(soon).await,
        Err(TenantError::InvalidField { .. })
    ));
    let role = KeyRole::Service([id("globex")].into());
    let (_, credential) = store.create_key(server_key(role.clone())).await.unwrap();
    let caller = store.authenticate(Some(&credential)).await.unwrap();
    assert!(caller.authorize(&id("globex")).is_ok());
    assert!(caller.authorize(&id("acme")).is_err());
    let wrong = NewKey {
        role,
        ..tenant_key("acme")
    };
    assert!(store.create_key(wrong).await.is_err());
    assert!(store.create_key(server_key(KeyRole::Tenant)).await.is_err());
    let unknown = KeyRole::Service([id("nobody")].into());
    assert!(matches!(
        store.create_key(server_key(unknown)).await,
        Err(TenantError::TenantNotFound { .. })
    ));
}

#[tokio::test]
async fn limits_hold_at_and_over() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None, true).await;
    for n in 0..5 {
        let name = "x".repeat(20);
        store
            .create_tenant(id(&format!("t{n}")), name, None)
            .await
            .unwrap();
    }
    let over = store.create_tenant(id("t5"), String::new(), None).await;
    assert!(matches!(
        over,
        Err(TenantError::Limit {
            value: 6,
            limit: 5,
            ..
        })
    ));
    let long = store.create_tenant(id("t6"), "x".repeat(21), None).await;
    assert!(matches!(
        long,
        Err(TenantError::Limit {
            value: 21,
            limit: 20,
            ..
        })
    ));
    for _ in 0..3 {
        store.create_key(tenant_key("t0")).await.unwrap();
    }
    assert!(matches!(
        store.create_key(tenant_key("t0")).await,
        Err(TenantError::Limit {
            value: 4,
            limit: 3,
            ..
        })
    ));
    store.create_key(tenant_key("t1")).await.unwrap();
}

#[tokio::test]
async fn a_request_id_makes_creation_repeatable() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None, true).await;
    let request = |payload: u8| {
        Some(RequestKey {
            tenant: "-".into(),
            method: "CreateTenant",
            request_id: "r".into(),
            payload: [payload; 32],
        })
    };
    let first = store
        .create_tenant(id("acme"), "A".into(), request(1))
        .await
        .unwrap();
    let again = store
        .create_tenant(id("acme"), "A".into(), request(1))
        .await
        .unwrap();
    assert_eq!(first, again);
    assert!(matches!(
        store
            .create_tenant(id("acme"), "B".into(), request(2))
            .await,
        Err(TenantError::RequestIdReused { .. })
    ));
    assert!(matches!(
        store.create_tenant(id("acme"), "A".into(), None).await,
        Err(TenantError::TenantExists { .. })
    ));
    store.delete_tenant(id("acme"), false).await.unwrap();
    store
        .create_tenant(id("acme"), "A".into(), request(1))
        .await
        .unwrap();
}

#[tokio::test]
async fn lists_are_paged_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, None, true).await;
    for tenant in ["c", "a", "e", "b", "d"] {
        store
            .create_tenant(id(tenant), String::new(), None)
            .await
            .unwrap();
    }
    let mut seen = Vec::new();
    let mut after = None;
    loop {
        let page = store
            .list_tenants(PageRequest { size: 2, after })
            .await
            .unwrap();
        seen.extend(page.items.into_iter().map(|t| t.id.to_string()));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(seen, ["a", "b", "c", "d", "e"]);
}
