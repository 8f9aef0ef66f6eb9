//! `espalierd check` as a program, on the processor and in a tiny shape: the tables have their rows, the last line is JSON, and a
//! GPU that is not there is said to be so.

use std::process::Output;

use serde_json::{Value, json};

fn check(args: &[&str]) -> Output {
    let mut command = espalier_tests::espalierd_command();
    command.arg("check").args(args);
    command.output().unwrap()
}

/// The rows of the line of JSON.
fn rows(part: &str, args: &[&str]) -> Vec<Value> {
    let output = check(&[&[part], args].concat());
    let (said, errors) = (output.stdout, String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8(said).unwrap();
    assert!(output.status.success(), "{said}{errors}");
    let report: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert_eq!(
        (&report["part"], &report["cut"]),
        (&json!(part), &json!(false))
    );
    assert!(report["device"].is_string());
    report["rows"].as_array().unwrap().clone()
}

const TINY: [&str; 4] = ["--device", "cpu", "--synthetic", "tiny-2l"];

#[test]
fn serving_is_measured() {
    let rows = rows("serve", &TINY);
    let of = |step: &str| {
        rows.iter()
            .filter(|row| row["step"] == step)
            .collect::<Vec<_>>()
    };
    let cases: Vec<_> = of("decode")
        .iter()
        .map(|row| {
            (
                row["rows"].as_u64().unwrap(),
                row["adapters"].as_u64().unwrap(),
            )
        })
        .collect();
    let expected = [
        (1, 0),
        (1, 1),
        (4, 0),
        (4, 1),
        (4, 4),
        (16, 0),
        (16, 1),
        (16, 4),
        (16, 16),
    ];
    assert_eq!(cases, expected);
    for row in of("decode").into_iter().chain(of("prompt")) {
        assert!(row["tokens/s"].as_f64().unwrap() > 0.0, "{row}");
    }
    assert_eq!((of("prompt").len(), of("cold adapter").len()), (3, 1));
    // Six projections of 2 layers and a tied head, 128 tokens of 2 layers' keys and values, one adapter.
    let read = of("decode")[1]["GB to read"].as_f64().unwrap();
    let base = (2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 160) + 512 * 64) * 4;
    let adapter = 2 * 16 * (3 * (64 + 64) + (64 + 32) + 3 * (64 + 160)) * 2;
    let most = (base + adapter + 128 * 2 * 2 * 32 * 4) as f64 * 1e-9;
    assert!((read / most - 1.0).abs() < 0.1, "{read}, not {most}");
}

#[test]
fn training_is_measured() {
    let rows = rows("train", &TINY);
    let row = |step: &str| rows.iter().find(|row| row["step"] == step).unwrap();
    let (first, later) = (&row("first")["loss"], &row("others")["loss"]);
    assert!(later.as_f64() < first.as_f64(), "{first} to {later}");
    assert!(row("trained to served")["ms"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_gpu_that_is_not_there_is_said_to_be_so() {
    if espalier_engine::device::open(espalier_engine::device::DeviceChoice::Cuda(0), None, false)
        .is_ok()
    {
        return;
    }
    let rows = rows("tests", &[]);
    assert_eq!(rows.len(), 1);
    assert!(rows[0]["not run"].is_string(), "{rows:?}");
    let output = check(&["tests", "--device", "cuda"]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && errors.contains("device cuda: "),
        "{errors}"
    );
}
