//! From `perf script`'s stacks to shares of a step. Only stacks of the engine's thread count: it leads every operation.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::{Fallible, find_source};

/// The rows of the table, in its order.
const PARTS: [&str; 17] = [
    "projections q, k, v",
    "projection o",
    "projections gate, up",
    "projection down",
    "head (logits)",
    "adapters (low-rank updates)",
    "attention",
    "**projections, adapters, attention, head**",
    "norms, rope, SwiGLU, residuals",
    "embedding, keys and values to their blocks",
    "sampler",
    "text (detokenizer, stop strings)",
    "scheduler, prefix cache",
    "results and events",
    "commands, readers, statistics",
    "other",
    "*of all of these, waiting for the other thread's share of an operation*",
];
const PRODUCTS: &str = PARTS[7];
const WAITING: &str = PARTS[16];

/// One function on a stack and the line of its source.
struct Frame<'a> {
    function: &'a str,
    source: &'a str,
}

/// Columns of shares, as Markdown.
pub(super) fn table(columns: &[String], sources: &Path) -> Fallible<()> {
    let mut lines = Lines {
        root: sources,
        files: HashMap::new(),
    };
    let (mut names, mut shares) = (Vec::new(), Vec::new());
    for column in columns {
        let (name, file) = column.split_once('=').ok_or("a column is NAME=FILE")?;
        let text = std::fs::read_to_string(file)?;
        let (mut counts, mut waiting) = (BTreeMap::<&str, usize>::new(), 0);
        for stack in text.split("\n\n") {
            let frames = frames(stack);
            if let Some(part) = part(&frames, &mut lines) {
                *counts.entry(part).or_default() += 1;
                waiting += usize::from(waits(&frames));
            }
        }
        let products = PARTS[..7].iter().filter_map(|part| counts.get(part)).sum();
        let whole: usize = counts.values().sum();
        counts.insert(PRODUCTS, products);
        counts.insert(WAITING, waiting);
        names.push(format!("{name} ({whole} samples)"));
        shares.push((counts, whole.max(1)));
    }
    println!("| share of a step, % | {} |", names.join(" | "));
    println!("|---|{}", "---|".repeat(names.len()));
    for part in PARTS {
        let cells = shares.iter().map(|(counts, whole)| {
            let count = counts.get(part).copied().unwrap_or(0);
            format!("{:.1}", 100.0 * count as f64 / *whole as f64)
        });
        println!("| {part} | {} |", cells.collect::<Vec<_>>().join(" | "));
    }
    Ok(())
}

/// The frames of one sample, innermost first: an address and a function, then the line.
fn frames(stack: &str) -> Vec<Frame<'_>> {
    let mut frames: Vec<Frame<'_>> = Vec::new();
    for line in stack.lines() {
        if let Some(rest) = line.strip_prefix('\t') {
            let function = rest
                .trim_start()
                .split_once(' ')
                .map_or("", |(_, name)| name);
            frames.push(Frame {
                function,
                source: "",
            });
        } else if let Some(frame) = frames.last_mut() {
            frame.source = line.trim();
        }
    }
    frames
}

/// Where in a step the engine's thread is; `None` on all other threads.
fn part(frames: &[Frame<'_>], lines: &mut Lines<'_>) -> Option<&'static str> {
    let has = |words: &[&str]| {
        let names = |frame: &Frame<'_>| words.iter().any(|word| frame.function.contains(word));
        frames.iter().any(names)
    };
    if !has(&["run_until_drained"]) {
        return None;
    }
    if has(&["draw_rows"]) {
        let text = [
            "StreamDecoder",
            "tokenizers::",
            "StopFilter",
            "Generation::append",
        ];
        let text = has(&text);
        return Some(if text {
            "text (detokenizer, stop strings)"
        } else {
            "sampler"
        });
    }
    if has(&["Decoder<O>::logits", "ModelRunner::logits"]) {
        return Some("head (logits)");
    }
    if let Some(part) = in_decoder(frames, &has, lines) {
        return Some(part);
    }
    // Functions that were inlined stand without their paths.
    let rest: [(&[&str], &str); 3] = [
        (
            &["schedule", "BlockManager", "PrefixCache"],
            "scheduler, prefix cache",
        ),
        (&["postprocess", "advance"], "results and events"),
        (
            &["drain_commands", "publish_stats", "TrainingWorker"],
            "commands, readers, statistics",
        ),
    ];
    let found = rest.iter().find(|(words, _)| has(words));
    Some(found.map_or("other", |(_, part)| part))
}

/// Whether the stack is in the team's own code with no task in it: the leader has done its share, or hands out a job.
fn waits(frames: &[Frame<'_>]) -> bool {
    let within = |name| move |frame: &Frame<'_>| frame.function.contains(name);
    let team = frames.iter().position(within("cpu_team"));
    team.is_some_and(|at| !frames[..at].iter().any(within("espalier")))
}

fn in_decoder(
    frames: &[Frame<'_>],
    has: &impl Fn(&[&str]) -> bool,
    lines: &mut Lines<'_>,
) -> Option<&'static str> {
    if has(&[
        "low_rank",
        "cpu_thin",
        "linear::updates",
        "shrink",
        "expand",
    ]) {
        return Some("adapters (low-rank updates)");
    }
    if has(&["store_key", "store_values"]) {
        return Some("embedding, keys and values to their blocks");
    }
    if has(&["cpu_attention", "Ops>::attention"]) {
        return Some("attention");
    }
    if has(&[
        "rms_norm",
        "norm_row",
        "rope",
        "Rope",
        "swiglu",
        "cpu_rows",
        "Ops>::add",
    ]) {
        return Some("norms, rope, SwiGLU, residuals");
    }
    if has(&["gather", "scatter", "Decoder<O>::embed"]) {
        return Some("embedding, keys and values to their blocks");
    }
    if has(&["linear::forward", "LoraLinear<O>"]) {
        // The block's line that asked for the projection names it.
        let asked = frames.iter().find(|frame| {
            frame.source.starts_with("attention.rs:") || frame.source.starts_with("mlp.rs:")
        });
        let statement = asked
            .map(|frame| lines.statement(frame.source))
            .unwrap_or_default();
        for (words, part) in [
            ("self.q", "projections q, k, v"),
            ("self.o", "projection o"),
            ("self.gate", "projections gate, up"),
            ("self.down", "projection down"),
        ] {
            if statement.contains(words) {
                return Some(part);
            }
        }
    }
    None
}

/// Source files, read once.
struct Lines<'a> {
    root: &'a Path,
    files: HashMap<String, Vec<String>>,
}

impl Lines<'_> {
    /// The line that `attention.rs:187 (inlined)` names and those after it, to the end of the statement.
    fn statement(&mut self, source: &str) -> String {
        let place = source.split(' ').next().unwrap_or_default();
        let Some((name, number)) = place.split_once(':') else {
            return String::new();
        };
        let root = self.root;
        let lines = self.files.entry(name.to_owned()).or_insert_with(|| {
            let text = find_source(root, name).and_then(|path| std::fs::read_to_string(path).ok());
            text.map_or_else(Vec::new, |text| text.lines().map(str::to_owned).collect())
        });
        let first = number.parse::<usize>().unwrap_or(0).saturating_sub(1);
        let mut statement = String::new();
        for line in lines.iter().skip(first) {
            statement.push_str(line);
            if line.trim_end().ends_with(';') {
                break;
            }
        }
        statement
    }
}
