//! Tests of versions, aliases, the cache of resolved names and what survives a crash.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use espalier_adapters::version::AdapterArtifact;

use super::*;
use crate::artifact_store::{BlobDigest, StoreError};
use crate::names::ApiKeyId;

const LIMITS: RegistryLimits = RegistryLimits {
    max_adapters: 3,
    max_versions: 40,
    max_aliases: 3,
    max_description_bytes: 16,
    max_id_length: 63,
    cache_entries: 64,
};

struct Bench {
    registry: Registry,
    store: ArtifactStore,
    _dir: Arc<tempfile::TempDir>,
}

async fn bench() -> Bench {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let bench = reopen(&dir);
    bench
        .registry
        .inner
        .database
        .write(|tx| {
            tx.execute(
                "INSERT INTO tenants VALUES ('acme', '', 0), ('globex', '', 0)",
                [],
            )?;
            Ok::<_, DatabaseError>(())
        })
        .await
        .unwrap();
    bench
}

fn reopen(dir: &Arc<tempfile::TempDir>) -> Bench {
    let store = ArtifactStore::open(dir.path()).unwrap();
    let database = Database::open(dir.path()).unwrap();
    Bench {
        registry: Registry::new(database, store.clone(), LIMITS),
        store,
        _dir: Arc::clone(dir),
    }
}

fn name(text: &str) -> AdapterName {
    AdapterName::parse(&format!("tenants/acme/adapters/{text}")).unwrap()
}

fn reference(text: &str) -> AdapterRef {
    AdapterRef::parse(&format!("tenants/acme/adapters/{text}")).unwrap()
}

fn alias(text: &str) -> Alias {
    Alias::parse(text).unwrap()
}

fn number(n: u32) -> VersionNumber {
    VersionNumber::new(n).unwrap()
}

fn content(byte: u8) -> NewVersion {
    NewVersion {
        digest: VersionDigest::from_bytes([byte; 32]),
        size: 7,
        base_name: "tiny".into(),
        base_digest: "00".into(),
        profile: ServingProfile {
            temperature: Some(0.25),
            ..ServingProfile::default()
        },
        summary: VersionSummary {
            rank: 8,
            labels: vec!["no".into(), "yes".into()],
            ..VersionSummary::default()
        },
        report: Report::default(),
        provenance: Provenance::Upload,
        metrics: [("loss".to_owned(), 0.5)].into(),
    }
}

fn publish(adapter: &str, byte: u8, aliases: AliasPlan) -> Publish {
    Publish {
        adapter: name(adapter),
        create: Some(String::new()),
        version: content(byte),
        aliases,
        request: None,
    }
}

fn admin() -> Principal {
    Principal::LocalAnonymous
}

#[tokio::test]
async fn a_name_resolves_to_the_moved_alias_at_once() {
    let bench = bench().await;
    let registry = &bench.registry;
    for byte in 1..=2 {
        let plan = AliasPlan::DefaultIfAbsent;
        registry.publish(publish("a", byte, plan)).await.unwrap();
    }
    let wanted = reference("a");
    for _ in 0..2 {
        let found = registry.resolve(&admin(), &wanted).await.unwrap();
        assert_eq!(found.name.to_string(), "tenants/acme/adapters/a/versions/1");
        assert_eq!(found.labels, ["no", "yes"]);
        assert_eq!(found.profile.temperature, Some(0.25));
    }
    assert_eq!(registry.inner.cache.len(), 1);
    let change = AliasChange {
        set: vec![(Alias::default_alias(), number(2))],
        ..AliasChange::default()
    };
    registry.set_aliases(name("a"), change).await.unwrap();
    let found = registry.resolve(&admin(), &wanted).await.unwrap();
    assert_eq!(found.digest, VersionDigest::from_bytes([2; 32]));
    let fixed = registry
        .resolve(&admin(), &reference("a/versions/1"))
        .await
        .unwrap();
    assert_eq!(fixed.digest, VersionDigest::from_bytes([1; 32]));
}

#[tokio::test]
async fn a_lookup_that_began_before_a_move_does_not_fill_the_cache_after_it() {
    let bench = bench().await;
    let registry = &bench.registry;
    registry
        .publish(publish("a", 1, AliasPlan::DefaultIfAbsent))
        .await
        .unwrap();
    let stale = registry.resolve(&admin(), &reference("a")).await.unwrap();
    let before = registry.inner.changes.load(Ordering::SeqCst);
    registry
        .publish(publish(
            "a",
            2,
            AliasPlan::Set(vec![Alias::default_alias()]),
        ))
        .await
        .unwrap();
    registry.remember(&reference("a"), &stale, before);
    let found = registry.resolve(&admin(), &reference("a")).await.unwrap();
    assert_eq!(found.name.number, number(2));
}

#[tokio::test]
async fn what_is_unknown_or_foreign_never_resolves() {
    let bench = bench().await;
    let registry = &bench.registry;
    registry
        .publish(publish("a", 1, AliasPlan::Set(vec![])))
        .await
        .unwrap();
    let resolve =
        |text: &'static str| async move { registry.resolve(&admin(), &reference(text)).await };
    assert!(matches!(
        resolve("b").await,
        Err(RegistryError::AdapterNotFound { .. })
    ));
    assert!(matches!(
        resolve("a").await,
        Err(RegistryError::AliasNotFound { .. })
    ));
    assert!(matches!(
        resolve("a@xx").await,
        Err(RegistryError::AliasNotFound { .. })
    ));
    assert!(matches!(
        resolve("a/versions/2").await,
        Err(RegistryError::VersionNotFound { .. })
    ));
    let nobody = AdapterRef::parse("tenants/nobody/adapters/a").unwrap();
    assert!(matches!(
        registry.resolve(&admin(), &nobody).await,
        Err(RegistryError::TenantNotFound { .. })
    ));
    let globex = Principal::Tenant {
        tenant: TenantId::parse("globex").unwrap(),
        key: ApiKeyId::parse("k").unwrap(),
    };
    // Cached or not, there or not: the same refusal.
    registry
        .resolve(&admin(), &reference("a/versions/1"))
        .await
        .unwrap();
    for text in ["a/versions/1", "a/versions/9", "zzz"] {
        let error = registry
            .resolve(&globex, &reference(text))
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "permission 'tenant.use' denied on resource 'tenants/acme' (or it might not exist)"
        );
    }
}

#[tokio::test]
async fn racing_publishers_get_different_numbers_and_one_default() {
    let bench = bench().await;
    let tasks: Vec<_> = (0..20u8)
        .map(|byte| {
            let registry = bench.registry.clone();
            tokio::spawn(async move {
                let plan = AliasPlan::Set(vec![Alias::default_alias()]);
                registry.publish(publish("a", byte, plan)).await.unwrap()
            })
        })
        .collect();
    let mut numbers = Vec::new();
    for task in tasks {
        numbers.push(task.await.unwrap().name.number.get());
    }
    numbers.sort_unstable();
    assert_eq!(numbers, (1..=20).collect::<Vec<_>>());
    let found = bench
        .registry
        .resolve(&admin(), &reference("a"))
        .await
        .unwrap();
    assert_eq!(found.name.number, number(20));
}

#[tokio::test]
async fn alias_changes_are_all_or_nothing_and_guarded_by_etag() {
    let bench = bench().await;
    let registry = &bench.registry;
    registry
        .publish(publish("a", 1, AliasPlan::DefaultIfAbsent))
        .await
        .unwrap();
    let before = registry.get_adapter(name("a")).await.unwrap();
    let change = |set: Vec<(Alias, VersionNumber)>, etag: &str| AliasChange {
        set,
        remove: vec![],
        etag: (!etag.is_empty()).then(|| etag.to_owned()),
    };
    let half = change(
        vec![(alias("canary"), number(1)), (alias("blue"), number(9))],
        "",
    );
    assert!(matches!(
        registry.set_aliases(name("a"), half).await,
        Err(RegistryError::VersionNotFound { .. })
    ));
    let after = registry.get_adapter(name("a")).await.unwrap();
    assert_eq!(
        (&after.aliases, &after.etag),
        (&before.aliases, &before.etag)
    );
    let moved = registry
        .set_aliases(
            name("a"),
            change(vec![(alias("canary"), number(1))], &before.etag),
        )
        .await
        .unwrap();
    assert_ne!(moved.etag, before.etag);
    assert!(matches!(
        registry
            .set_aliases(name("a"), change(vec![], &before.etag))
            .await,
        Err(RegistryError::EtagMismatch { .. })
    ));
    let many = vec![(alias("bb"), number(1)), (alias("cc"), number(1))];
    assert!(matches!(
        registry.set_aliases(name("a"), change(many, "")).await,
        Err(RegistryError::Limit {
            value: 4,
            limit: 3,
            ..
        })
    ));
    assert_eq!(
        registry.get_adapter(name("a")).await.unwrap().aliases.len(),
        2
    );
}

#[tokio::test]
async fn a_version_in_use_stays_and_numbers_are_never_given_again() {
    let bench = bench().await;
    let registry = &bench.registry;
    let artifact = AdapterArtifact {
        config_json: b"{}".to_vec(),
        safetensors: b"x".to_vec(),
        labels_json: None,
        head_json: None,
    };
    let pin = bench.store.put_artifact(&artifact).unwrap();
    let mut first = publish("a", 0, AliasPlan::DefaultIfAbsent);
    first.version.digest = artifact.digest();
    let first = registry.publish(first).await.unwrap().name;
    drop(pin);
    assert!(matches!(
        registry.delete_version(first.clone()).await,
        Err(RegistryError::InUse { .. })
    ));
    registry
        .publish(publish(
            "a",
            2,
            AliasPlan::Set(vec![Alias::default_alias()]),
        ))
        .await
        .unwrap();
    registry
        .resolve(&admin(), &reference("a/versions/1"))
        .await
        .unwrap();
    registry.delete_version(first).await.unwrap();
    assert!(
        registry
            .resolve(&admin(), &reference("a/versions/1"))
            .await
            .is_err()
    );
    assert!(matches!(
        bench.store.get_artifact(&artifact.digest()),
        Err(StoreError::NotFound { .. })
    ));
    let third = registry
        .publish(publish("a", 3, AliasPlan::Set(vec![])))
        .await
        .unwrap();
    assert_eq!(third.name.number, number(3));
    assert!(matches!(
        registry.delete_adapter(name("a"), None, false).await,
        Err(RegistryError::InUse { .. })
    ));
    registry
        .delete_adapter(name("a"), None, true)
        .await
        .unwrap();
    assert!(matches!(
        registry.resolve(&admin(), &reference("a")).await,
        Err(RegistryError::AdapterNotFound { .. })
    ));
}

#[tokio::test]
async fn a_request_id_publishes_once() {
    let bench = bench().await;
    let registry = &bench.registry;
    let with = |payload: u8| Publish {
        request: Some(RequestKey {
            tenant: "acme".into(),
            method: "UploadAdapterVersion",
            request_id: "r".into(),
            payload: [payload; 32],
        }),
        ..publish("a", 1, AliasPlan::DefaultIfAbsent)
    };
    let first = registry.publish(with(1)).await.unwrap();
    let again = registry.publish(with(1)).await.unwrap();
    assert_eq!(first.name, again.name);
    let key = with(1).request.unwrap();
    assert_eq!(
        registry.published_before(key).await.unwrap().unwrap().name,
        first.name
    );
    assert!(matches!(
        registry.publish(with(2)).await,
        Err(RegistryError::RequestIdReused { .. })
    ));
    assert_eq!(
        registry.get_adapter(name("a")).await.unwrap().version_count,
        1
    );
}

#[tokio::test]
async fn everything_answered_is_there_after_a_crash_and_orphans_are_not() {
    let bench = bench().await;
    let kept = bench.store.put(b"a version's bytes").unwrap();
    let mut version = publish("a", 0, AliasPlan::DefaultIfAbsent);
    version.version.digest = VersionDigest::from_bytes(kept.digest().0);
    let published = bench.registry.publish(version).await.unwrap();
    let orphan = BlobDigest::of(b"stored, never named");
    drop(bench.store.put(b"stored, never named").unwrap());
    // A crash closes nothing, so the first handles stay open.
    let again = reopen(&bench._dir);
    again.registry.sweep().await.unwrap();
    let found = again.registry.get_version(reference("a")).await.unwrap();
    assert_eq!(found.name, published.name);
    assert_eq!(found.content.metrics["loss"], 0.5);
    assert_eq!(found.aliases, [Alias::default_alias()]);
    assert!(again.store.get(kept.digest()).is_ok());
    assert!(matches!(
        again.store.get(orphan),
        Err(StoreError::NotFound { .. })
    ));
}

#[tokio::test]
async fn a_quarantined_version_says_so() {
    let bench = bench().await;
    let registry = &bench.registry;
    registry
        .publish(publish("a", 1, AliasPlan::DefaultIfAbsent))
        .await
        .unwrap();
    registry.resolve(&admin(), &reference("a")).await.unwrap();
    let digest = VersionDigest::from_bytes([1; 32]);
    registry
        .quarantine(digest, "bytes changed".into())
        .await
        .unwrap();
    assert!(matches!(
        registry.resolve(&admin(), &reference("a")).await,
        Err(RegistryError::VersionNotActive {
            state: VersionState::Quarantined,
            ..
        })
    ));
    let change = AliasChange {
        set: vec![(alias("xx"), number(1))],
        ..AliasChange::default()
    };
    assert!(matches!(
        registry.set_aliases(name("a"), change).await,
        Err(RegistryError::VersionNotActive { .. })
    ));
}

#[tokio::test]
async fn limits_and_pages() {
    let bench = bench().await;
    let registry = &bench.registry;
    for id in ["b", "a", "c"] {
        registry
            .create_adapter(name(id), "x".repeat(16), None)
            .await
            .unwrap();
    }
    assert!(matches!(
        registry
            .create_adapter(name("d"), String::new(), None)
            .await,
        Err(RegistryError::Limit {
            value: 4,
            limit: 3,
            ..
        })
    ));
    assert!(matches!(
        registry
            .create_adapter(name("a"), String::new(), None)
            .await,
        Err(RegistryError::AdapterExists { .. })
    ));
    let tenant = TenantId::parse("acme").unwrap();
    let page = PageRequest {
        size: 2,
        after: None,
    };
    let page = registry.list_adapters(tenant.clone(), page).await.unwrap();
    assert_eq!(page.next.as_deref(), Some("b"));
    let rest = PageRequest {
        size: 2,
        after: page.next,
    };
    let rest = registry.list_adapters(tenant, rest).await.unwrap();
    assert_eq!((rest.items.len(), rest.next), (1, None));
    for byte in 0..40 {
        registry
            .publish(publish("a", byte, AliasPlan::Set(vec![])))
            .await
            .unwrap();
    }
    assert!(matches!(
        registry
            .publish(publish("a", 99, AliasPlan::Set(vec![])))
            .await,
        Err(RegistryError::Limit {
            value: 41,
            limit: 40,
            ..
        })
    ));
    let page = PageRequest {
        size: 15,
        after: None,
    };
    let page = registry.list_versions(name("a"), page).await.unwrap();
    assert_eq!(page.items[0].name.number, number(40));
    let rest = PageRequest {
        size: 100,
        after: page.next,
    };
    let rest = registry.list_versions(name("a"), rest).await.unwrap();
    assert_eq!(
        (rest.items.len(), rest.items[0].name.number),
        (25, number(25))
    );
}
