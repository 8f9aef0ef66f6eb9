//! Sources, precedence, faults: each with a case that fails.

use super::*;

#[test]
fn defaults_are_valid_and_printable_as_their_own_file() {
    let config = Config::from_pairs(&[]).unwrap();
    let mut raw = Raw::default();
    raw.add_file(&config.to_toml(), PathBuf::from("printed.toml"))
        .unwrap();
    assert_eq!(
        raw.0.len(),
        SETTINGS
            .iter()
            .filter(|setting| !setting.secret || setting.default.is_empty())
            .count()
    );
    let again = Config::from_raw(&raw).unwrap();
    for setting in SETTINGS {
        assert_eq!(
            config.shown(setting.key),
            again.shown(setting.key),
            "{}",
            setting.key
        );
    }
}

#[test]
fn keys_are_unique() {
    let mut keys: Vec<_> = SETTINGS.iter().map(|setting| setting.key).collect();
    keys.sort_unstable();
    let all = keys.len();
    keys.dedup();
    assert_eq!(keys.len(), all);
}

#[test]
fn environment_beats_file_and_flag_beats_both() {
    let mut raw = Raw::default();
    raw.add_file(
        "max_inputs = 7\nmax_labels = 8\nmax_messages = 9\n",
        PathBuf::from("a.toml"),
    )
    .unwrap();
    let env = BTreeMap::from([
        ("ESPALIER_MAX_LABELS".into(), "18".into()),
        ("ESPALIER_MAX_MESSAGES".into(), "19".into()),
    ]);
    raw.add_environment(&env).unwrap();
    raw.0.insert(
        "max_messages",
        ("29".into(), Source::Flag("--max-messages".into())),
    );
    let config = Config::from_raw(&raw).unwrap();
    assert_eq!(
        (
            config.limits.max_inputs,
            config.limits.max_labels,
            config.limits.max_messages
        ),
        (7, 18, 29)
    );
    let printed = config.to_toml();
    assert!(
        printed.contains("max_inputs = 7  # file a.toml"),
        "{printed}"
    );
    assert!(printed.contains("max_labels = 18  # environment ESPALIER_MAX_LABELS"));
    assert!(printed.contains("max_messages = 29  # flag --max-messages"));
    assert!(printed.contains("max_candidates = 16  # default"));
}

#[test]
fn every_fault_is_listed_with_value_and_limit() {
    let error = Config::from_pairs(&[
        ("max_candidates", "129"),
        ("max_inputs", "many"),
        ("training_quantum", "0s"),
    ])
    .unwrap_err();
    assert_eq!(error.faults.len(), 3, "{error}");
    assert!(
        error
            .faults
            .iter()
            .any(|f| f.contains("max_candidates: 129") && f.contains("1 to 128")),
        "{error}"
    );
    assert!(
        error
            .faults
            .iter()
            .any(|f| f.contains("max_inputs: \"many\"")),
        "{error}"
    );
    assert!(
        error
            .faults
            .iter()
            .any(|f| f.contains("training_quantum: 0s") && f.contains("1ms")),
        "{error}"
    );
    assert!(Config::from_pairs(&[("max_candidates", "128")]).is_ok());
}

#[test]
fn misspelt_names_are_errors_with_a_suggestion() {
    let error = Config::from_pairs(&[("max_input", "3")])
        .unwrap_err()
        .to_string();
    assert!(error.contains("did you mean max_inputs?"), "{error}");
    let env = BTreeMap::from([("ESPALIER_MAX_LABLES".to_owned(), "3".to_owned())]);
    assert!(Raw::default().add_environment(&env).is_err());
    let env = BTreeMap::from([("ESPALIER_GOLDEN".to_owned(), "somewhere".to_owned())]);
    assert!(Raw::default().add_environment(&env).is_ok());
}

#[test]
fn secrets_are_never_printed() {
    let key = "0123456789abcdef0123456789abcdef";
    let config = Config::from_pairs(&[("service_key", key)]).unwrap();
    assert!(!config.to_toml().contains(key) && !format!("{config:?}").contains(key));
    assert_eq!(config.service_key().unwrap().as_deref(), Some(key));
    let error = Config::from_pairs(&[("service_key", "short-secret")])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("24 to 512") && !error.contains("short-secret"),
        "{error}"
    );
}

#[test]
fn the_command_line_is_well_formed() {
    command().debug_assert();
}

#[test]
fn what_is_told_to_callers_names_no_place_and_no_key() {
    let config = Config::from_pairs(&[
        ("service_key", "0123456789abcdef0123456789abcdef"),
        ("max_sequences", "17"),
    ])
    .unwrap();
    let told = config.of_serving();
    assert_eq!(told["max_sequences"], "17");
    assert_eq!(told["adapter_cache_bytes"], "1GiB");
    for key in [
        "service_key",
        "service_key_file",
        "data_dir",
        "listen",
        "model",
    ] {
        assert!(!told.contains_key(key), "{key}");
    }
    assert!(
        told.values()
            .all(|value| !value.contains("0123456789abcdef"))
    );
}
