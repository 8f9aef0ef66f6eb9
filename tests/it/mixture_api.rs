//! Several adapters in one request, over the wire: what is named answers, in its order and with its weights, or nothing does.

use espalier_client::{Client, v1};
use espalier_tests::TestServer;
use tonic::Code;

use crate::adapter_api::{push, reason, refused, two_tenants};
use crate::client_side::{SERVICE_KEY, answer, greedy, tenant};

fn mixed(client: &Client, adapters: &[(&str, f32)]) -> v1::GenerateRequest {
    let parts = adapters.iter().map(|&(name, weight)| (name, Some(weight)));
    v1::GenerateRequest {
        target: Some(client.mixture(parts).unwrap()),
        ..greedy(client, None, "once upon", 16)
    }
}

#[tokio::test]
async fn a_mixture_answers_and_the_reply_names_all_of_it() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let versions = [push(&acme, "a", 0).await, push(&acme, "b", 1).await];
    let ask = async |parts: &[(&str, f32)]| {
        let reply = acme.generate(mixed(&acme, parts)).await.unwrap();
        let applied = reply.effective.unwrap().adapters;
        (reply.candidates[0].text.clone(), applied)
    };
    let (text, applied) = ask(&[("a", 0.75), ("b/1", -0.5)]).await;
    let named: Vec<_> = applied
        .iter()
        .map(|one| (one.version.as_str(), one.digest.as_str(), one.weight))
        .collect();
    let [a, b] = &versions;
    assert_eq!(
        named,
        [
            (a.name.as_str(), a.digest.as_str(), 0.75),
            (b.name.as_str(), b.digest.as_str(), -0.5)
        ]
    );
    assert_eq!(ask(&[("a@default", 0.75), ("b", -0.5)]).await.0, text);
    let (whole, base) = (
        answer(&acme, Some("a"), "once upon", 16).await.0,
        answer(&acme, None, "once upon", 16).await.0,
    );
    assert!(text != whole && text != base && whole != base);
    assert_eq!(ask(&[("a", 1.0)]).await.0, whole);
    assert_eq!(ask(&[("a", 0.0), ("b", 0.0)]).await.0, base);
    server.ended().await;
}

#[tokio::test]
async fn what_cannot_be_mixed_is_refused_by_field() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    push(&acme, "a", 0).await;
    push(&acme, "b", 1).await;
    let invalid = (Code::InvalidArgument, "INVALID_FIELD".to_owned());
    let twice = [("a", 1.0), ("b", 1.0), ("a/1", 0.5)];
    for (parts, field) in [
        (&twice[..], "target.adapters[2].adapter"),
        (&[("a", 1.0), ("b", 9.0)], "target.adapters[1].weight"),
        (&[("a", f32::NAN)], "target.adapters[0].weight"),
        (&[("a", 0.5); 9], "target.adapters"),
    ] {
        let error = refused(acme.generate(mixed(&acme, parts)).await);
        assert_eq!((error.code, error.reason.clone()), invalid, "{field}");
        assert!(error.to_string().contains(field), "{error}");
    }
    // Never a part of what was asked for.
    let unknown = acme
        .generate(mixed(&acme, &[("a", 1.0), ("none", 1.0)]))
        .await;
    assert_eq!(reason(unknown).0, Code::NotFound);
    server.ended().await;
}

#[tokio::test]
async fn a_stranger_s_adapter_is_in_no_mixture() {
    let server = TestServer::start(&[("service_key", SERVICE_KEY)]).await;
    let (acme, globex) = two_tenants(&server).await;
    push(&acme, "a", 0).await;
    push(&globex, "b", 1).await;
    let foreign = [("a", 1.0), ("tenants/globex/adapters/b", 1.0)];
    let answered = acme.generate(mixed(&acme, &foreign)).await;
    assert_eq!(reason(answered).0, Code::InvalidArgument);
    let led = [("tenants/globex/adapters/b", 1.0)];
    let answered = acme.generate(mixed(&acme, &led)).await;
    assert_eq!(reason(answered).0, Code::PermissionDenied);
    server.ended().await;
}
