//! The table of servers: eight adapters at once, and one row with one adapter, beside transformers + PEFT and a llama.cpp
//! server with the same adapters. Output tokens per second from the moment of asking to the last token.

use std::path::PathBuf;
use std::process::Command;

use espalier_benches::Fallible;
use espalier_benches::turns::{figures, last_json_line, median, pairs};
use serde_json::Value;

use super::{NEW, PROMPT, Serve};

/// Output tokens per second, as each side's line calls them.
const PEFT_KEY: &str = "end_to_end_out_tok_s";
const KEY: &str = "e2e_out_tok_s";

/// One comparison: adapters at once, the peer, and the ratio that is wanted.
struct Contest {
    adapters: usize,
    peer: Peer,
    wanted: f64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Peer {
    Peft,
    Llama,
}

pub(crate) fn run(options: &Serve) -> Fallible<()> {
    let llama = options.llama_server.is_some();
    let contests: Vec<Contest> = [
        (8, Peer::Peft, 4.0),
        (8, Peer::Llama, 3.0),
        (1, Peer::Llama, 1.2),
    ]
    .into_iter()
    .filter(|(_, peer, _)| llama || *peer == Peer::Peft)
    .map(|(adapters, peer, wanted)| Contest {
        adapters,
        peer,
        wanted,
    })
    .collect();
    let dtypes: Vec<Option<&str>> = if options.dtype.is_empty() {
        vec![None]
    } else {
        options.dtype.iter().map(|d| Some(d.as_str())).collect()
    };
    // By contest: the peer's rounds; by contest and precision: ours.
    let mut theirs: Vec<Vec<f64>> = vec![Vec::new(); contests.len()];
    let mut ours: Vec<Vec<Vec<f64>>> = vec![vec![Vec::new(); dtypes.len()]; contests.len()];
    for round in 1..=options.sides.rounds {
        eprintln!("round {round} of {}", options.sides.rounds);
        let mut asked: Vec<(usize, usize, f64)> = Vec::new();
        for (c, contest) in contests.iter().enumerate() {
            theirs[c].push(peer(options, contest)?);
            for (d, dtype) in dtypes.iter().enumerate() {
                // Two contests with as many adapters stand beside the same run of ours.
                let known = asked
                    .iter()
                    .find(|(n, of, _)| (*n, *of) == (contest.adapters, d));
                let figure = match known {
                    Some((_, _, figure)) => *figure,
                    None => espalier(options, contest.adapters, *dtype)?,
                };
                asked.push((contest.adapters, d, figure));
                ours[c][d].push(figure);
            }
        }
    }
    print_table(&contests, &dtypes, &theirs, &ours);
    if !llama {
        println!("\nno llama.cpp server was given, so nothing stands beside one");
    }
    Ok(())
}

fn print_table(
    contests: &[Contest],
    dtypes: &[Option<&str>],
    theirs: &[Vec<f64>],
    ours: &[Vec<Vec<f64>>],
) {
    println!(
        "| output tok/s, {PROMPT} in / {NEW} out | peer | Espalier over gRPC | ratio | wanted | rounds |"
    );
    println!("|---|---|---|---|---|---|");
    for ((contest, theirs), by_dtype) in contests.iter().zip(theirs).zip(ours) {
        for (dtype, ours) in dtypes.iter().zip(by_dtype) {
            let (n, name) = (contest.adapters, contest.peer.name());
            let dtype = dtype.unwrap_or("default dtype");
            println!(
                "| {n} tenants x {n} adapters, {dtype}, beside {name} | {:.1} | {:.1} | {:.2} | {} | {} |",
                median(theirs),
                median(ours),
                median(ours) / median(theirs),
                contest.wanted,
                pairs(theirs, ours)
            );
        }
    }
}

fn espalier(options: &Serve, adapters: usize, dtype: Option<&str>) -> Fallible<f64> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["tenants", "--model", &options.sides.model]);
    if let Some(dtype) = dtype {
        command.args(["--dtype", dtype]);
    }
    command.args((0..adapters).map(|i| options.sides.adapters.join(format!("a{i}"))));
    figure(last_json_line(command)?, KEY)
}

fn peer(options: &Serve, contest: &Contest) -> Fallible<f64> {
    let sides = &options.sides;
    let mut command = Command::new(&sides.python);
    match contest.peer {
        Peer::Peft => {
            // The peer decodes one token more than it is told.
            let new = (NEW - 1).to_string();
            command
                .arg(&sides.peer)
                .arg("generate")
                .arg(&sides.hf)
                .args((0..contest.adapters).map(|i| sides.adapters.join(format!("a{i}"))))
                .args(["--new", &new]);
            figure(last_json_line(command)?, PEFT_KEY)
        }
        Peer::Llama => {
            let files = given(&options.llama_files)?;
            command
                .arg(given(&options.llama_peer)?)
                .arg(given(&options.llama_server)?)
                .arg(files.join("base.gguf"))
                .arg(contest.adapters.to_string())
                .args((0..contest.adapters).map(|i| files.join(format!("a{i}.gguf"))));
            figure(last_json_line(command)?, KEY)
        }
    }
}

fn given(path: &Option<PathBuf>) -> Fallible<&PathBuf> {
    Ok(path
        .as_ref()
        .ok_or("the llama.cpp server needs its files")?)
}

fn figure(line: Value, key: &str) -> Fallible<f64> {
    Ok(figures(&[line], key)?[0])
}

// === impl Peer ===

impl Peer {
    fn name(self) -> &'static str {
        match self {
            Peer::Peft => "transformers + PEFT (f32, no server)",
            Peer::Llama => "a llama.cpp server (Q8_0)",
        }
    }
}
