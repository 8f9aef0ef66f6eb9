//! Beside transformers + PEFT, both without a server: mixed-adapter prefill and decode, and training, in speed and memory.

use std::path::PathBuf;
use std::process::Command;

use espalier_benches::Fallible;
use espalier_benches::turns::{figures, last_json_line, median, pairs};
use serde_json::Value;

use super::engine::STEPS;
use super::{Compare, NEW, PROMPT};

pub(crate) fn run(options: &Compare) -> Fallible<()> {
    let adapters: Vec<PathBuf> = (0..8)
        .map(|i| options.adapters.join(format!("a{i}")))
        .collect();
    let steps = [PathBuf::from("--repeats"), STEPS.to_string().into()];
    let mut rows: [Vec<Value>; 6] = Default::default();
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        rows[0].push(peer(options, "generate", &adapters)?);
        rows[1].push(ours(options, "generate", &adapters)?);
        rows[2].push(peer(options, "train", &[])?);
        rows[3].push(ours(options, "train", &[])?);
        if let Some(data) = &options.data {
            let data = [PathBuf::from("--data"), data.clone()];
            rows[4].push(peer(options, "train", &[&data[..], &steps].concat())?);
            rows[5].push(ours(options, "train", &data)?);
        }
    }
    println!(
        "| 8 rows x 8 adapters (r 16), {PROMPT} in / {NEW} out; training 8 x 128, r 16 | PEFT | Espalier | ratio | rounds |"
    );
    println!("|---|---|---|---|---|");
    let [
        peer_generate,
        our_generate,
        peer_train,
        our_train,
        peer_short,
        our_short,
    ] = rows;
    for (name, key, peer, ours) in [
        (
            "prefill, tok/s",
            "prefill_tok_s",
            &peer_generate,
            &our_generate,
        ),
        (
            "decode, tok/s",
            "decode_tok_s",
            &peer_generate,
            &our_generate,
        ),
        (
            "serving, peak GiB",
            "peak_rss_gib",
            &peer_generate,
            &our_generate,
        ),
        ("training, tok/s", "train_tok_s", &peer_train, &our_train),
        (
            "training, peak GiB",
            "peak_rss_gib",
            &peer_train,
            &our_train,
        ),
        (
            "training on short texts, tok/s",
            "train_tok_s",
            &peer_short,
            &our_short,
        ),
    ] {
        if peer.is_empty() {
            continue;
        }
        let (peer, ours) = (figures(peer, key)?, figures(ours, key)?);
        println!(
            "| {name} | {:.2} | {:.2} | {:.2} | {} |",
            median(&peer),
            median(&ours),
            median(&ours) / median(&peer),
            pairs(&peer, &ours)
        );
    }
    Ok(())
}

fn peer(options: &Compare, verb: &str, adapters: &[PathBuf]) -> Fallible<Value> {
    let mut command = Command::new(&options.python);
    command
        .arg(&options.peer)
        .arg(verb)
        .arg(&options.hf)
        .args(adapters);
    last_json_line(command)
}

fn ours(options: &Compare, verb: &str, adapters: &[PathBuf]) -> Fallible<Value> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg(verb)
        .arg("--model")
        .arg(&options.model)
        .args(adapters);
    last_json_line(command)
}
