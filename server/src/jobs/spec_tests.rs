//! Tests of what a job is asked to do.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use super::*;

#[test]
fn a_method_is_stored_with_its_options_and_read_as_the_first_jobs_wrote_it() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Stored {
        #[serde(deserialize_with = "stored_method")]
        method: JobMethod,
    }
    let read = |text: &str| serde_json::from_str::<Stored>(text).unwrap().method;
    let supervised = |train_on| JobMethod::Supervised { train_on };
    assert_eq!(
        read(r#"{"method": "supervised"}"#),
        supervised(TrainOn::Assistant)
    );
    let head = r#"{"method": {"classification": {"head_only": true, "labels": ["a"]}}}"#;
    assert!(
        matches!(read(head), JobMethod::Classification { head_only: true, labels, .. } if labels == ["a"])
    );
    for method in [
        supervised(TrainOn::LastAssistant),
        supervised(TrainOn::All),
        JobMethod::Unsupervised {
            window_tokens: Some(77),
        },
    ] {
        let stored = Stored { method };
        let text = serde_json::to_string(&stored).unwrap();
        assert_eq!(serde_json::from_str::<Stored>(&text).unwrap(), stored);
    }
    assert!(serde_json::from_str::<Stored>(r#"{"method": "unsupervised?"}"#).is_err());
}

#[test]
fn perplexity_is_of_raw_text_alone_and_never_infinite() {
    let text = JobMethod::Unsupervised {
        window_tokens: None,
    };
    assert!((text.perplexity(4.0_f64.ln()).unwrap() - 4.0).abs() < 1e-12);
    assert_eq!(text.perplexity(1e6), Some(f64::MAX));
    let supervised = JobMethod::Supervised {
        train_on: TrainOn::All,
    };
    assert_eq!(supervised.perplexity(1.0), None);
}
