//! What transformers and PEFT compute, against the decoder: logits, log-probabilities, greedy tokens, heads, merged weights,
//! ids and chat prompts.
//!
//! Runs on the project's small goldens, always, and on the directory `ESPALIER_GOLDEN` (default `../shared/golden`
//! beside the repository) with the model `ESPALIER_MODEL`, when both are there.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;

use espalier_adapters::batch::Segment;
use espalier_adapters::config::{BaseTensor, LayerTensor, Site};
use espalier_adapters::linear::{merged, scaled};
use espalier_adapters::ops::cuda::driver::Element;
use espalier_adapters::ops::cuda::{self, Cuda, Emulated};
use espalier_adapters::ops::{Backend, Buffer, Ops};
use espalier_adapters::peft;
use espalier_adapters::text::Message;
use espalier_adapters::weights::AdapterWeights;
use espalier_engine::model::{
    BaseSites, Batch, Buf, KvCache, LoadedModel, Model, ModelConfig, ModelWeights, ResidentAdapter,
    SeqSpan, Workspace, load,
};
use serde::Deserialize;

/// A directory of goldens and the model that they were made with.
pub(crate) struct Goldens {
    pub(crate) dir: PathBuf,
    pub(crate) model: String,
}

/// The project's own small goldens.
pub(crate) fn small() -> Goldens {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    Goldens {
        model: dir.join("model").display().to_string(),
        dir,
    }
}

/// The goldens that the environment names; says so when they are not there.
pub(crate) fn given() -> Option<Goldens> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/golden");
    let dir = std::env::var_os("ESPALIER_GOLDEN").map_or(beside, PathBuf::from);
    let Ok(model) = std::env::var("ESPALIER_MODEL") else {
        eprintln!("skipped: ESPALIER_MODEL names no model");
        return None;
    };
    if !dir.join("base.json").is_file() {
        eprintln!(
            "skipped: no goldens in {}; ESPALIER_GOLDEN names another directory",
            dir.display()
        );
        return None;
    }
    Some(Goldens { dir, model })
}

pub(crate) fn json<T: for<'de> Deserialize<'de>>(path: &Path) -> T {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

pub(crate) fn adapter(
    dir: &Path,
    config: &ModelConfig,
) -> (espalier_adapters::config::AdapterConfig, AdapterWeights) {
    let limits = peft::Limits::default();
    let artifact = peft::from_dir(dir, &limits).unwrap();
    let read = peft::read(&artifact, &config.base_shape(), &limits);
    let (config, weights, _) =
        read.unwrap_or_else(|report| panic!("{}: {report:?}", dir.display()));
    (config, weights)
}

/// The adapters of a golden directory, by name.
fn adapters(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir.join("adapters")).unwrap();
    let mut dirs: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    dirs.sort();
    dirs
}

#[derive(Deserialize)]
struct Case {
    text: String,
    input_ids: Vec<u32>,
    #[serde(flatten)]
    expected: Expected,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Expected {
    Tokens(Tokens),
    Head { logits: Vec<f32>, probs: Vec<f32> },
}

#[derive(Deserialize)]
struct Tokens {
    last_logits_index: Vec<usize>,
    last_logits: Vec<f32>,
    top10_ids: Vec<usize>,
    top10_logits: Vec<f32>,
    prompt_logprobs: Vec<f64>,
    greedy_ids: Vec<u32>,
    greedy_margins: Vec<f32>,
}

/// One sequence's states after the final norm, in prefill chunks as a server would cut them.
fn states(model: &Model, ids: &[u32], adapter: Option<&Arc<ResidentAdapter>>) -> Vec<f32> {
    let blocks = ids.len().div_ceil(16);
    let ops = model.ops();
    let mut kv = KvCache::new(ops, model.config(), blocks, 16);
    let table: Vec<u32> = (0..blocks as u32).rev().collect();
    let mut workspace = Workspace::new(ops);
    let mut states = Vec::new();
    for (index, tokens) in ids.chunks(300).enumerate() {
        let spans = [SeqSpan {
            rows: 0..tokens.len(),
            start_pos: index * 300,
            block_table: &table,
        }];
        let segments = [Segment {
            rows: 0..tokens.len(),
            adapters: adapter.cloned().into(),
        }];
        let batch = Batch {
            tokens,
            spans: &spans,
            segments: &segments,
            overlays: &[],
        };
        states.extend(read(model, model.forward(&batch, &mut kv, &mut workspace)));
    }
    states
}

/// Numbers of the model's operations, on the host.
fn read(model: &Model, numbers: &Buf) -> Vec<f32> {
    let mut host = vec![0.0; numbers.len()];
    model.ops().read(numbers.all(), &mut host);
    host
}

/// Numbers of the host, where the model's operations work.
fn written(model: &Model, host: &[f32]) -> Buf {
    let mut numbers = model.ops().working();
    model.ops().resize(&mut numbers, host.len());
    model.ops().write(host, numbers.all_mut());
    numbers
}

/// The logits of states.
fn logits(model: &Model, states: &[f32], adapter: Option<&Arc<ResidentAdapter>>) -> Vec<f32> {
    let (ops, config) = (model.ops(), model.config());
    let mut logits = ops.exact();
    ops.resize(&mut logits, states.len() / config.hidden * config.vocab);
    let segments = [Segment {
        rows: 0..states.len() / config.hidden,
        adapters: adapter.cloned().into(),
    }];
    model.logits(&written(model, states), &segments, &mut logits);
    read(model, &logits)
}

fn log_softmax_at(logits: &[f32], id: u32) -> f64 {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|x| f64::from(x - highest).exp()).sum();
    f64::from(logits[id as usize] - highest) - total.ln()
}

fn near(what: &str, found: f64, expected: f64, tolerance: f64) {
    assert!(
        (found - expected).abs() <= tolerance,
        "{what}: {found}, not {expected}"
    );
}

/// One prompt: its greedy continuation is given, not chosen, so that one near tie does not spoil all that follows.
fn check_tokens(
    model: &Model,
    name: &str,
    ids: &[u32],
    golden: &Tokens,
    adapter: Option<&Arc<ResidentAdapter>>,
) {
    let continued: Vec<u32> = [ids, &golden.greedy_ids].concat();
    let states = states(model, &continued[..continued.len() - 1], adapter);
    let (width, vocab) = (model.config().hidden, model.config().vocab);
    for (chunk, states) in states.chunks(64 * width).enumerate() {
        let logits = logits(model, states, adapter);
        for (row, logits) in logits.chunks_exact(vocab).enumerate() {
            let position = chunk * 64 + row;
            if position + 1 < ids.len() {
                let found = log_softmax_at(logits, ids[position + 1]);
                near(
                    &format!("{name} log-probability {position}"),
                    found,
                    golden.prompt_logprobs[position],
                    5e-4,
                );
                continue;
            }
            if position + 1 == ids.len() {
                let all = golden.last_logits_index.iter().chain(&golden.top10_ids);
                for (id, expected) in all.zip(golden.last_logits.iter().chain(&golden.top10_logits))
                {
                    near(
                        &format!("{name} logit {id}"),
                        logits[*id].into(),
                        (*expected).into(),
                        5e-4,
                    );
                }
            }
            let greedy = position + 1 - ids.len();
            if golden.greedy_margins[greedy] > 1e-3 {
                let best = (0..vocab)
                    .max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
                    .unwrap();
                assert_eq!(
                    best as u32, golden.greedy_ids[greedy],
                    "{name} greedy token {greedy}"
                );
            }
        }
    }
}

fn check_head(
    model: &Model,
    name: &str,
    ids: &[u32],
    (logits, probs): (&[f32], &[f32]),
    adapter: &Arc<ResidentAdapter>,
) {
    let states = states(model, ids, Some(adapter));
    let last = written(model, &states[states.len() - model.config().hidden..]);
    let mut found = model.ops().exact();
    model.ops().resize(&mut found, adapter.labels().len());
    adapter.score(model.ops(), (last.all(), 1), found.all_mut());
    let found = read(model, &found);
    assert_eq!(
        (found.len(), found.len()),
        (logits.len(), probs.len()),
        "{name}"
    );
    for (label, (expected_logit, expected)) in logits.iter().zip(probs).enumerate() {
        let probability = log_softmax_at(&found, label as u32).exp();
        near(
            &format!("{name} logit of label {label}"),
            found[label].into(),
            (*expected_logit).into(),
            5e-4,
        );
        near(
            &format!("{name} probability of label {label}"),
            probability,
            (*expected).into(),
            1e-4,
        );
    }
}

fn check_cases(model: &Model, name: &str, cases: &[Case], adapter: Option<&Arc<ResidentAdapter>>) {
    for case in cases {
        let start: String = case.text.chars().take(20).collect();
        let name = format!("{name} {start:?}");
        match &case.expected {
            Expected::Tokens(golden) => {
                check_tokens(model, &name, &case.input_ids, golden, adapter)
            }
            Expected::Head { logits, probs } => {
                check_head(
                    model,
                    &name,
                    &case.input_ids,
                    (logits, probs),
                    adapter.unwrap(),
                );
            }
        }
    }
}

fn merge(mut weights: ModelWeights, adapter: &AdapterWeights) -> ModelWeights {
    let layers = weights.layers.iter();
    let norms = layers.map(|layer| (layer.attn_norm.clone(), layer.mlp_norm.clone()));
    let mut norms: Vec<_> = norms.collect();
    let mut change = |(layer, site): &(usize, Site), of: &dyn Fn(&[f32]) -> Vec<f32>| {
        let layer = &mut weights.layers[*layer];
        let weight = match site {
            Site::Q => &mut layer.q,
            Site::K => &mut layer.k,
            Site::V => &mut layer.v,
            Site::O => &mut layer.o,
            Site::Gate => &mut layer.gate,
            Site::Up => &mut layer.up,
            Site::Down => &mut layer.down,
        };
        *weight = of(weight);
    };
    for (at, delta) in &adapter.sites {
        change(at, &|weight| merged(weight, delta));
    }
    for (at, scale) in &adapter.scales {
        change(at, &|weight| scaled(weight, scale));
    }
    let (mut embed, mut norm) = (weights.embed.clone(), weights.norm.clone());
    for (tensor, delta) in &adapter.full {
        let sum = |weight: &[f32]| -> Vec<f32> {
            let pairs = weight.iter().zip(&delta.values);
            pairs.map(|(w, d)| w + d).collect()
        };
        match tensor {
            BaseTensor::Layer(layer, LayerTensor::Weight(site)) => change(&(*layer, *site), &sum),
            BaseTensor::Layer(layer, LayerTensor::AttnNorm) => {
                norms[*layer].0 = sum(&norms[*layer].0);
            }
            BaseTensor::Layer(layer, LayerTensor::MlpNorm) => {
                norms[*layer].1 = sum(&norms[*layer].1);
            }
            BaseTensor::Embedding => embed = sum(&embed),
            BaseTensor::FinalNorm => norm = sum(&norm),
            other => panic!("a tied Llama has no {other:?}"),
        }
    }
    (weights.embed, weights.norm) = (embed, norm);
    for (layer, (attn, mlp)) in weights.layers.iter_mut().zip(norms) {
        (layer.attn_norm, layer.mlp_norm) = (attn, mlp);
    }
    weights
}

/// The last logits of base and adapter against those of a base that the adapter was merged into.
fn check_merged(
    loaded: &LoadedModel,
    model: &Model,
    name: &str,
    adapter: &AdapterWeights,
    ids: &[u32],
) {
    let resident = Arc::new(ResidentAdapter::build(adapter, model).unwrap());
    let merged = Model::new(
        Backend::default(),
        loaded.config.clone(),
        merge(loaded.weights.clone(), adapter),
    )
    .unwrap();
    let last = |model: &Model, adapter| {
        let states = states(model, ids, adapter);
        logits(
            model,
            &states[states.len() - model.config().hidden..],
            adapter,
        )
    };
    let (ours, theirs) = (last(model, Some(&resident)), last(&merged, None));
    for (id, (found, expected)) in ours.iter().zip(&theirs).enumerate() {
        near(
            &format!("{name} merged, logit {id}"),
            (*found).into(),
            (*expected).into(),
            5e-4,
        );
    }
    let base = last(model, None);
    assert!(
        base.iter().zip(&ours).any(|(b, o)| (b - o).abs() > 1e-3),
        "{name} changes nothing"
    );
}

#[derive(Deserialize)]
struct Texts {
    texts: Vec<TextCase>,
    chats: Vec<ChatCase>,
}

#[derive(Deserialize)]
struct TextCase {
    text: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct ChatCase {
    messages: Vec<ChatMessage>,
    rendered: String,
}

#[derive(Deserialize)]
struct ChatMessage {
    role: String,
    content: String,
}

fn check_texts(loaded: &LoadedModel, texts: &Texts) {
    for case in &texts.texts {
        assert_eq!(
            loaded.tokenizer.encode(&case.text).unwrap(),
            case.ids,
            "{:?}",
            case.text
        );
    }
    for case in &texts.chats {
        let messages: Vec<Message> = case
            .messages
            .iter()
            .map(|m| Message::new(m.role.clone(), m.content.clone()))
            .collect();
        let template = loaded.template.as_ref().unwrap();
        assert_eq!(
            template.render(&messages, &[], true).unwrap(),
            case.rendered
        );
    }
}

fn check(goldens: &Goldens, ops: Backend) {
    let loaded = load(&goldens.model).unwrap();
    check_texts(&loaded, &json(&goldens.dir.join("tokenizer.json")));
    let (config, weights) = (loaded.config.clone(), loaded.weights.clone());
    let model = Model::new(ops, config, weights).unwrap();
    let base: Vec<Case> = json(&goldens.dir.join("base.json"));
    for case in &base {
        assert_eq!(
            loaded.tokenizer.encode(&case.text).unwrap(),
            case.input_ids,
            "{:?}",
            case.text
        );
    }
    check_cases(&model, "base", &base, None);
    let shortest = base.iter().min_by_key(|case| case.input_ids.len()).unwrap();
    for dir in adapters(&goldens.dir) {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let (_, weights) = adapter(&dir, &loaded.config);
        let resident = Arc::new(ResidentAdapter::build(&weights, &model).unwrap());
        let cases: Vec<Case> = json(&dir.join("expected.json"));
        check_cases(&model, &name, &cases, Some(&resident));
        check_merged(&loaded, &model, &name, &weights, &shortest.input_ids);
    }
}

/// Runs `espalierd merge` and says what it said.
fn merged_by_command(model: &str, adapter: &Path, out: &Path, more: &[&str]) -> Output {
    let mut command = espalier_tests::espalierd_command();
    command
        .args(["merge", "--model", model, "--adapter"])
        .arg(adapter);
    command.arg("--out").arg(out).args(more).output().unwrap()
}

/// What `espalierd merge` writes is read by our own loader and answers, without any adapter, as PEFT does with it: tokens, template and
/// all. DoRA, rsLoRA, patterns and bf16 factors are among the goldens.
#[test]
fn merged_directories_answer_as_peft() {
    let goldens = small();
    let base = load(&goldens.model).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for adapter_dir in adapters(&goldens.dir) {
        let name = adapter_dir
            .file_name()
            .unwrap()
            .to_string_lossy()
            .into_owned();
        let out = dir.path().join(&name);
        let ran = merged_by_command(&goldens.model, &adapter_dir, &out, &[]);
        assert!(
            ran.status.success(),
            "{name}: {}",
            String::from_utf8_lossy(&ran.stderr)
        );
        let said = String::from_utf8_lossy(&ran.stdout).into_owned();
        assert!(said.contains("f32 as the base is"), "{said}");
        if name == "seq_cls" {
            check_classifier(&base, &adapter_dir, &out);
            continue;
        }
        let loaded = load(&out.display().to_string()).unwrap();
        assert_eq!(loaded.config, base.config, "{name}");
        check_texts(&loaded, &json(&goldens.dir.join("tokenizer.json")));
        let model = Model::new(Backend::default(), loaded.config, loaded.weights).unwrap();
        let cases: Vec<Case> = json(&adapter_dir.join("expected.json"));
        check_cases(&model, &name, &cases, None);
    }
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        adapters(&goldens.dir).len(),
        "something stayed behind"
    );
}

/// A classifier is no base, so our loader says that; its head and labels are those of the adapter, its body the merged one.
fn check_classifier(base: &LoadedModel, adapter_dir: &Path, out: &Path) {
    let config: serde_json::Value = json(&out.join("config.json"));
    assert_eq!(config["architectures"][0], "LlamaForSequenceClassification");
    assert_eq!(
        (
            &config["id2label"]["4"],
            config["label2id"]["LABEL_4"].as_u64()
        ),
        (&"LABEL_4".into(), Some(4))
    );
    assert_eq!(config["pad_token_id"], 2);
    let (_, weights) = adapter(adapter_dir, &base.config);
    let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |name: &str| -> Vec<f32> {
        let bytes = file.tensor(name).unwrap().data().to_vec();
        bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect()
    };
    let head = weights.head.as_ref().unwrap();
    assert_eq!(tensor("score.weight"), head.weight);
    let q = merged(&base.weights.layers[1].q, &weights.sites[&(1, Site::Q)]);
    assert_eq!(tensor("model.layers.1.self_attn.q_proj.weight"), q);
    assert_ne!(q, base.weights.layers[1].q);
    assert_eq!(tensor("model.norm.weight"), base.weights.norm);
    assert!(load(&out.display().to_string()).is_err());
}

#[test]
fn a_base_of_16_bits_is_merged_in_16_bits_and_nothing_is_overwritten() {
    let goldens = small();
    let adapter_dir = goldens.dir.join("adapters/patterns");
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let text = |path: &Path| path.display().to_string();
    let run = |model: &str, out: &str, more: &[&str]| {
        let ran = merged_by_command(model, &adapter_dir, &path(out), more);
        let said = [ran.stdout, ran.stderr].concat();
        (ran.status.success(), String::from_utf8(said).unwrap())
    };
    assert!(run(&goldens.model, "half", &["--dtype", "bf16"]).0);
    let (fine, said) = run(&text(&path("half")), "twice", &[]);
    assert!(
        fine && said.contains("bf16 because the base is in 16 bits"),
        "{said}"
    );
    let half = load(&text(&path("half"))).unwrap();
    assert!(!half.single_precision);
    let whole = load(&goldens.model).unwrap();
    let (_, weights) = adapter(&adapter_dir, &whole.config);
    let wanted = merged(&whole.weights.layers[0].q, &weights.sites[&(0, Site::Q)]);
    // Eight bits of precision, and no number is further from its own than half a step.
    for (found, wanted) in half.weights.layers[0].q.iter().zip(&wanted) {
        assert_eq!(found.to_bits() & 0xffff, 0);
        assert!((found - wanted).abs() <= wanted.abs() / 256.0);
    }

    let (fine, said) = run(&goldens.model, "half", &[]);
    assert!(!fine && said.contains("is not empty"), "{said}");
    let (fine, said) = run("tiny:7", "other", &[]);
    assert!(!fine && said.contains("expected"), "{said}");
    assert!(!path("other").exists());
    // A model that has no files of its own becomes one that has.
    let bare = dir.path().join("none");
    std::fs::create_dir(&bare).unwrap();
    let (fine, _) = run("tiny:7", "none", &[]);
    assert!(!fine && std::fs::read_dir(&bare).unwrap().count() == 0);
}

/// A device's operations in the kernels' emulator.
fn emulated(element: Element) -> Backend {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let library = cuda::build(&root.join("adapters/kernels"), &root.join("target/kernels"));
    let driver = Emulated::open(&library.unwrap(), 4 << 30).unwrap();
    Backend::Cuda(Cuda::new(Arc::new(driver), element, true).unwrap())
}

/// The cases whose prompt has at most so many tokens: the emulator takes about two seconds for each token of a real model.
fn short(cases: Vec<Case>, tokens: usize) -> Vec<Case> {
    let few = |case: &Case| case.input_ids.len() <= tokens;
    cases.into_iter().filter(few).collect()
}

/// Divergence of one set of weights in bf16 from f32.
#[derive(Deserialize)]
struct Divergence {
    /// Mean Kullback-Leibler divergence, in nats.
    mean: f64,
    positions: usize,
}

/// How far `rough` strays from `exact`; the greedy token must be the same wherever its margin is above 0.5.
fn divergence(exact: &Side<'_>, rough: &Side<'_>, name: &str, cases: &[Case]) -> Divergence {
    let (mut total, mut positions) = (0.0, 0);
    for case in cases {
        let Expected::Tokens(golden) = &case.expected else {
            continue;
        };
        let mut ids = [&case.input_ids[..], &golden.greedy_ids].concat();
        ids.pop();
        let vocab = exact.model.config().vocab;
        let (exact, rough) = (exact.logits(&ids), rough.logits(&ids));
        let rows = exact.chunks_exact(vocab).zip(rough.chunks_exact(vocab));
        for (position, (exact, rough)) in rows.enumerate() {
            let each = (0..vocab as u32).map(|id| {
                let expected = log_softmax_at(exact, id);
                expected.exp() * (expected - log_softmax_at(rough, id))
            });
            total += each.sum::<f64>();
            positions += 1;
            let Some(greedy) = (position + 1).checked_sub(case.input_ids.len()) else {
                continue;
            };
            if golden.greedy_margins[greedy] > 0.5 {
                let best = (0..vocab).max_by(|a, b| rough[*a].total_cmp(&rough[*b]));
                let (found, expected) = (best.unwrap() as u32, golden.greedy_ids[greedy]);
                assert_eq!(found, expected, "{name} greedy token {greedy}");
            }
        }
    }
    Divergence {
        mean: total / positions as f64,
        positions,
    }
}

/// A model with or without an adapter.
struct Side<'a> {
    model: &'a Model,
    adapter: Option<Arc<ResidentAdapter>>,
}

impl<'a> Side<'a> {
    fn new(model: &'a Model, weights: Option<&AdapterWeights>) -> Self {
        let build = |weights| Arc::new(ResidentAdapter::build(weights, model).unwrap());
        Self {
            model,
            adapter: weights.map(build),
        }
    }

    /// `[ids, vocab]`.
    fn logits(&self, ids: &[u32]) -> Vec<f32> {
        let adapter = self.adapter.as_ref();
        logits(self.model, &states(self.model, ids, adapter), adapter)
    }
}

/// A device in bf16 strays from f32 at most 1.2 times as far as torch in bf16 did, over base and adapters, on prompts of at
/// most `tokens` tokens: those that `bf16_kl.py` was told to take.
fn check_bf16(goldens: &Goldens, torch: &str, tokens: usize) {
    let loaded = load(&goldens.model).unwrap();
    let make = |ops| Model::new(ops, loaded.config.clone(), loaded.weights.clone()).unwrap();
    let (exact, rough) = (make(Backend::default()), make(emulated(Element::Bf16)));
    let torch: BTreeMap<String, Divergence> = json(&small().dir.join(torch));
    let (mut ours, mut theirs) = (0.0, 0.0);
    for (name, torch) in &torch {
        let dir = goldens.dir.join("adapters").join(name);
        let (weights, cases) = match name.as_str() {
            "base" => (None, json(&goldens.dir.join("base.json"))),
            _ => (
                Some(adapter(&dir, &loaded.config).1),
                json(&dir.join("expected.json")),
            ),
        };
        let sides = [&exact, &rough].map(|model| Side::new(model, weights.as_ref()));
        let found = divergence(&sides[0], &sides[1], name, &short(cases, tokens));
        eprintln!("{name}: {:.3e} nats, torch {:.3e}", found.mean, torch.mean);
        assert_eq!(found.positions, torch.positions, "{name}");
        ours += found.mean;
        theirs += torch.mean;
    }
    assert!(ours <= 1.2 * theirs, "{ours:.3e} nats, torch {theirs:.3e}");
}

#[test]
fn small_goldens() {
    check(&small(), Backend::default());
}

#[test]
fn small_goldens_on_a_device() {
    check(&small(), emulated(Element::F32));
}

#[test]
fn small_goldens_on_a_device_in_bf16() {
    check_bf16(&small(), "bf16.json", 64);
}

#[test]
fn given_goldens() {
    if let Some(goldens) = given() {
        check(&goldens, Backend::default());
    }
}

#[test]
#[ignore = "emulates a GPU on a real model for some minutes; ask for it by name"]
fn given_goldens_on_a_device() {
    let Some(goldens) = given() else { return };
    let loaded = load(&goldens.model).unwrap();
    let model = Model::new(emulated(Element::F32), loaded.config, loaded.weights).unwrap();
    let cases = short(json(&goldens.dir.join("base.json")), 12);
    check_cases(&model, "base", &cases, None);
    for dir in adapters(&goldens.dir) {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let (_, weights) = adapter(&dir, model.config());
        let resident = Arc::new(ResidentAdapter::build(&weights, &model).unwrap());
        let cases = short(json(&dir.join("expected.json")), 6);
        check_cases(&model, &name, &cases, Some(&resident));
    }
}

#[test]
#[ignore = "emulates a GPU on a real model for some minutes; ask for it by name"]
fn given_goldens_on_a_device_in_bf16() {
    if let Some(goldens) = given() {
        check_bf16(&goldens, "bf16_given.json", 12);
    }
}
