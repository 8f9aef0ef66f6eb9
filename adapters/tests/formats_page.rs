//! The examples of `docs/formats.md`, read as a user's files would be.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use espalier_adapters::config::{BaseShape, Site};
use espalier_adapters::head::HeadSettings;
use espalier_adapters::peft::{Limits, read, to_dir, write};
use espalier_adapters::profile::ServingProfile;
use espalier_adapters::train::dataset::{
    ColumnNames, DataLimits, DataReport, Dataset, Format, parse,
};
use espalier_adapters::version::AdapterArtifact;
use espalier_adapters::weights::{AdapterWeights, SiteAdapter};

const PAGE: &str = include_str!("../../docs/formats.md");

/// The fenced blocks with this info string.
fn blocks(info: &str) -> Vec<&'static str> {
    let open = format!("```{info}\n");
    let found = PAGE
        .split(open.as_str())
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap());
    found.collect()
}

fn one(info: &str) -> &'static str {
    let [block] = blocks(info)[..] else {
        panic!("not one block '{info}'")
    };
    block
}

fn rows(text: &str, format: Format) -> Result<Dataset, DataReport> {
    parse(
        text.as_bytes(),
        format,
        &ColumnNames::default(),
        &DataLimits::default(),
    )
}

#[test]
fn the_data_reads_without_a_warning() {
    let files = blocks("jsonl").into_iter().map(|b| (b, Format::Jsonl));
    let files: Vec<_> = files
        .chain(blocks("csv").into_iter().map(|b| (b, Format::Csv)))
        .collect();
    assert_eq!(files.len(), 8);
    for (text, format) in files {
        let data = rows(text, format).unwrap_or_else(|r| panic!("{text}: {r}"));
        assert_eq!((data.rows.len(), data.report), (2, DataReport::default()));
    }
}

#[test]
fn the_bad_lines_are_answered_as_shown() {
    let report = rows(one("jsonl bad"), Format::Jsonl).unwrap_err();
    assert_eq!(report.to_string(), one("text report").trim_end());
}

#[test]
fn the_head_settings_are_read() {
    let head = HeadSettings::read(one("json head").as_bytes()).unwrap();
    assert_eq!(
        (head.temperature, head.out_of_scope_below),
        (Some(1.37), Some(0.42))
    );
}

#[test]
fn the_profile_is_one() {
    let profile: ServingProfile = serde_json::from_str(one("json profile")).unwrap();
    assert_eq!(profile.raw_prompt("x"), "Q: x\nA:");
    assert_eq!(
        (profile.temperature, profile.max_tokens),
        (Some(0.2), Some(64))
    );
}

#[test]
fn the_configuration_is_read_and_its_digest_is_pythons() {
    let base = BaseShape {
        layers: 4,
        hidden: 16,
        intermediate: 24,
        heads: 2,
        kv_heads: 1,
        head_dim: 8,
        vocab: 5,
        tied_embeddings: false,
    };
    let config_json = one("json adapter_config").as_bytes().to_vec();
    // The configuration as read from the page, with weights that fit it.
    let empty = AdapterArtifact {
        config_json,
        safetensors: Vec::new(),
        labels_json: None,
        head_json: None,
    };
    assert!(read(&empty, &base, &Limits::default()).is_err());
    let mut config =
        espalier_adapters::config::LoraConfig::new(8, 16.0, &[Site::Q, Site::V, Site::Up]);
    config.use_rslora = true;
    config.layers_to_transform = Some(vec![2, 3]);
    config.rank_pattern = vec![(r"layers\.3\.self_attn\.q_proj".to_owned(), 4)];
    config.alpha_pattern = vec![("up_proj".to_owned(), 8.0)];
    let sites = config
        .plan(base.layers)
        .unwrap()
        .into_iter()
        .map(|((layer, site), plan)| {
            let (inputs, outputs) = base.dims(site);
            let (a, b) = (vec![0.5; plan.r * inputs], vec![-0.25; outputs * plan.r]);
            (
                (layer, site),
                SiteAdapter {
                    r: plan.r,
                    scale: plan.scale,
                    a: a.into(),
                    b: b.into(),
                    magnitude: None,
                },
            )
        });
    let weights = AdapterWeights {
        sites: sites.collect(),
        ..AdapterWeights::default()
    };
    let written = write(&config, &weights).unwrap();
    let artifact = AdapterArtifact {
        config_json: empty.config_json,
        ..written
    };
    let (config_read, weights_read, _) = read(&artifact, &base, &Limits::default()).unwrap();
    assert_eq!((config_read, weights_read), (config.into(), weights));

    let dir = tempfile::tempdir().unwrap();
    to_dir(&artifact, dir.path()).unwrap();
    let python = std::env::var_os("ESPALIER_PYTHON").unwrap_or_else(|| "python3".into());
    let Ok(run) = Command::new(python)
        .args(["-c", one("python digest")])
        .arg(dir.path())
        .output()
    else {
        eprintln!("not checked: no python3 (ESPALIER_PYTHON names one) to compute the digest with");
        return;
    };
    assert!(
        run.status.success(),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
    assert_eq!(
        String::from_utf8(run.stdout).unwrap().trim(),
        artifact.digest().to_string()
    );
}
