//! Versions added up over the wire: the new version answers as the mixture of its terms does, remembers what it was made of, and holds
//! nothing of anybody else's.

use espalier_client::{Client, v1};
use espalier_tests::TestServer;
use tonic::Code;

use crate::adapter_api::{push, reason, refused, two_tenants};
use crate::client_side::{SERVICE_KEY, client, greedy, tenant};

fn sum(
    client: &Client,
    into: &str,
    terms: &[(&str, f32)],
    rank: Option<u32>,
) -> v1::CombineAdaptersRequest {
    let terms = terms.iter().map(|&(name, weight)| (name, Some(weight)));
    v1::CombineAdaptersRequest {
        parent: client.names().adapter(into).unwrap(),
        terms: client.mixture(terms).unwrap().adapters,
        rank,
        create_if_missing: true,
        ..Default::default()
    }
}

/// Greedy tokens with the log-probabilities of the three best at each place.
async fn said(client: &Client, target: v1::InferenceTarget) -> (Vec<u32>, Vec<f64>) {
    let request = v1::GenerateRequest {
        target: Some(target),
        logprobs: Some(v1::LogprobOptions { top: 3 }),
        ..greedy(client, None, "once upon", 16)
    };
    let candidate = client.generate(request).await.unwrap().candidates.remove(0);
    let places = candidate.logprobs.iter();
    let values = places.flat_map(|one| one.top.iter().map(|top| f64::from(top.logprob)));
    (candidate.token_ids, values.collect())
}

fn furthest(x: &[f64], y: &[f64]) -> f64 {
    assert_eq!(x.len(), y.len());
    x.iter()
        .zip(y)
        .fold(0.0, |most, (x, y)| f64::max(most, (x - y).abs()))
}

#[tokio::test]
async fn a_sum_answers_as_its_mixture_and_says_what_it_is_made_of() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let versions = [push(&acme, "a", 0).await, push(&acme, "b", 1).await];
    let terms = [("a", 0.75), ("b/1", -0.5)];
    let mut request = sum(&acme, "c", &terms, None);
    request.request_id = "11111111-2222-4333-8444-555555555555".to_owned();
    let made = acme.combine_adapters(request.clone()).await.unwrap();
    assert_eq!(made.name, "tenants/acme/adapters/c/versions/1");
    assert_eq!(made.aliases, ["default"]);
    assert_eq!(acme.combine_adapters(request).await.unwrap(), made);
    let combination = made.combination.clone().unwrap();
    assert_eq!((combination.rank, combination.relative_error), (None, 0.0));
    for ((parent, version), weight) in combination.parents.iter().zip(&versions).zip([0.75, -0.5]) {
        assert_eq!(
            (&parent.version, &parent.digest, parent.weight),
            (&version.name, &version.digest, weight)
        );
    }
    // Ranks 3 and 4, and the second has no weights on q.
    assert_eq!(made.config.as_ref().unwrap().rank, Some(7));

    let target = |parts: &[(&str, f32)]| {
        acme.mixture(parts.iter().map(|&(name, weight)| (name, Some(weight))))
            .unwrap()
    };
    let mixture = said(&acme, target(&terms)).await;
    let whole = said(&acme, target(&[("c", 1.0)])).await;
    assert_eq!(whole.0, mixture.0);
    assert!(
        furthest(&whole.1, &mixture.1) < 1e-5,
        "{}",
        furthest(&whole.1, &mixture.1)
    );
    let base = said(&acme, target(&[])).await;
    assert!(base.0 != whole.0, "the sum changes nothing");

    // Cut to what it has it is the same, cut below it is not, and says by how much.
    let full = acme
        .combine_adapters(sum(&acme, "full", &terms, Some(7)))
        .await
        .unwrap();
    assert_eq!(full.digest, made.digest);
    let cut = acme
        .combine_adapters(sum(&acme, "cut", &terms, Some(5)))
        .await
        .unwrap();
    let (error, rank) = (
        cut.combination.unwrap().relative_error,
        cut.config.unwrap().rank,
    );
    assert!(rank == Some(5) && error > 1e-3 && error < 1.0, "{error}");
    let rough = said(&acme, target(&[("cut", 1.0)])).await;
    assert!(rough.0 != whole.0 || furthest(&rough.1, &whole.1) > 1e-4);

    drop(acme);
    let server = TestServer::start_in(server.ended().await, &[]).await;
    let acme = client(server.addr, "acme", None).await;
    assert_eq!(acme.get_adapter_version(&made.name).await.unwrap(), made);
    server.ended().await;
}

#[tokio::test]
async fn what_cannot_be_added_up_is_refused_and_leaves_nothing() {
    let server = TestServer::start(&[("service_key", SERVICE_KEY), ("max_rank", "6")]).await;
    let (acme, globex) = two_tenants(&server).await;
    for (name, seed) in [("a", 0), ("b", 1), ("h", 2), ("i", 5)] {
        push(&acme, name, seed).await;
    }
    push(&globex, "theirs", 0).await;
    let foreign = "tenants/globex/adapters/theirs";
    for (terms, rank, code, part) in [
        (
            &[("a", 1.0), (foreign, 1.0)][..],
            None,
            Code::InvalidArgument,
            "terms[1].adapter",
        ),
        (
            &[(foreign, 1.0)],
            None,
            Code::InvalidArgument,
            "terms[0].adapter",
        ),
        (
            &[("a", 1.0), ("a/1", 1.0)],
            None,
            Code::InvalidArgument,
            "terms[1].adapter",
        ),
        (
            &[("a", 1.0), ("b", 0.0)],
            None,
            Code::InvalidArgument,
            "terms[1].weight",
        ),
        (
            &[("a", 9.0)],
            None,
            Code::InvalidArgument,
            "terms[0].weight",
        ),
        (&[("a", 1.0)], Some(0), Code::InvalidArgument, "rank"),
        (&[("a", 1.0), ("none", 1.0)], None, Code::NotFound, "none"),
        (
            &[("h", 1.0), ("i", 1.0)],
            None,
            Code::FailedPrecondition,
            "both have a classification head",
        ),
        (
            &[("a", 1.0), ("b", 1.0)],
            None,
            Code::FailedPrecondition,
            "add up to 7, limit 6",
        ),
    ] {
        let error = refused(acme.combine_adapters(sum(&acme, "new", terms, rank)).await);
        assert_eq!(error.code, code, "{error}");
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
    let mut empty = sum(&acme, "new", &[("a", 1.0)], None);
    empty.terms.clear();
    assert_eq!(
        reason(acme.combine_adapters(empty).await).0,
        Code::InvalidArgument
    );
    let theirs = sum(
        &globex,
        "tenants/acme/adapters/new",
        &[("theirs", 1.0)],
        None,
    );
    assert_eq!(
        reason(globex.combine_adapters(theirs).await).0,
        Code::PermissionDenied
    );
    assert_eq!(
        reason(acme.get_adapter("tenants/acme/adapters/new").await).0,
        Code::NotFound
    );
    // One head stays as it is.
    let headed = acme
        .combine_adapters(sum(&acme, "new", &[("a", 0.5), ("h", 0.5)], Some(6)))
        .await;
    assert_eq!(headed.unwrap().labels, ["bug", "praise", "question"]);
    server.ended().await;
}
