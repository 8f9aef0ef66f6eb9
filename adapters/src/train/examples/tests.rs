//! Rows against what serving would see, on a small byte-level tokenizer; and the real model's ids where it is there.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod turns;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::profile::ServingProfile;
use crate::text::{ChatTemplate, Message, TemplateSource, Tokenizer, encode_chat};
use crate::train::dataset::{
    ChatMessage, ColumnNames, DataLimits, DataReport, DataRule, Dataset, Format, Role, Row,
    from_rows, parse,
};

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
/// Answers lose their first character once another message follows, as reasoning does in some models' templates.
const FORGETFUL: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last or m.role == 'user' %}{{ m.content }}{% else %}{{ m.content[1:] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
/// Ends no turn with a stop id.
const OPEN: &str = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";

/// GPT-2's byte alphabet, the merge of `a` and `b`, and four control tokens; BOS in front when `bos`.
fn tokenizer(bos: bool) -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    let mut next = 256;
    for byte in 0..=255_u32 {
        let printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let c = if printable {
            byte
        } else {
            next += 1;
            next - 1
        };
        vocab.insert(char::from_u32(c).unwrap().to_string(), json!(byte));
    }
    vocab.insert("ab".into(), json!(256));
    let control = ["<s>", "<|im_start|>", "<|im_end|>", "<eos>"];
    let added: Vec<_> = control
        .iter()
        .zip(257..)
        .map(|(text, id)| {
            json!({"id": id, "content": text, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let post = bos.then(|| {
        json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}}})
    });
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": post,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": ["a b"]},
    });
    Tokenizer::from_json(json.to_string().as_bytes(), Some("<s>"), Some("<eos>")).unwrap()
}

const IM_END: u32 = 259;
const EOS: u32 = 260;

fn template(jinja: &str) -> ChatTemplate {
    let source = TemplateSource {
        jinja: jinja.into(),
        bos_token: None,
        eos_token: None,
    };
    ChatTemplate::new(source).unwrap()
}

fn rows(rows: Vec<Row>) -> Dataset {
    from_rows(rows, &DataLimits::default()).unwrap()
}

fn completion(prompt: &str, completion: &str) -> Row {
    Row::Completion {
        prompt: prompt.into(),
        completion: completion.into(),
    }
}

fn class(text: &str, label: &str) -> Row {
    Row::Class {
        text: text.into(),
        label: label.into(),
    }
}

/// `u...` is a user's message, `a...` a learned answer, `n...` an answer of weight 0, `s...` a system message.
fn chat(messages: &[&str]) -> Row {
    let messages = messages.iter().map(|m| {
        let role = match &m[..1] {
            "s" => Role::System,
            "u" => Role::User,
            _ => Role::Assistant,
        };
        ChatMessage {
            role,
            content: m[1..].to_owned(),
            learn: !m.starts_with('n'),
        }
    });
    Row::Chat {
        messages: messages.collect(),
    }
}

struct Setup {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    profile: ServingProfile,
    stop_ids: Vec<u32>,
    train_on: TrainOn,
    max_tokens: usize,
}

impl Setup {
    fn new() -> Self {
        Self {
            tokenizer: tokenizer(false),
            template: Some(template(CHATML)),
            profile: ServingProfile::default(),
            stop_ids: vec![IM_END, EOS],
            train_on: TrainOn::Assistant,
            max_tokens: 1000,
        }
    }

    fn build(&self, data: &Dataset, labels: Option<&[String]>) -> Result<Examples, DataReport> {
        let encoding = Encoding {
            tokenizer: &self.tokenizer,
            template: self.template.as_ref(),
            profile: &self.profile,
            stop_ids: &self.stop_ids,
            train_on: self.train_on,
            max_tokens: self.max_tokens,
            labels,
            max_findings: 10,
        };
        build(data, &encoding)
    }

    /// (text of all ids, texts of the learned runs) of each example.
    fn told(&self, row: Row) -> Vec<(String, Vec<String>)> {
        let examples = self
            .build(&rows(vec![row]), None)
            .unwrap_or_else(|r| panic!("{r}"));
        examples
            .items
            .iter()
            .map(|example| self.tell(example))
            .collect()
    }

    fn tell(&self, example: &Example) -> (String, Vec<String>) {
        let Example::Lm { ids, learn } = example else {
            panic!("not a text")
        };
        assert_eq!(ids.len(), learn.len());
        assert!(!learn[0], "nothing predicts the first id");
        let mut runs: Vec<Vec<u32>> = Vec::new();
        for i in 0..ids.len() {
            if learn[i] && !learn[i - 1] {
                runs.push(Vec::new());
            }
            if learn[i] {
                runs.last_mut().unwrap().push(ids[i]);
            }
        }
        let text = |ids: &[u32]| self.tokenizer.decode(ids, false).unwrap();
        (text(ids), runs.iter().map(|run| text(run)).collect())
    }
}

fn only(report: Result<Examples, DataReport>) -> (u64, String, DataRule) {
    let report = report.expect_err("must be refused");
    assert_eq!(report.error_count(), 1, "{report}");
    let f = &report.errors[0];
    (f.line, f.field.clone(), f.rule)
}

#[test]
fn a_completion_is_learned_to_its_end_and_nothing_before_it() {
    let mut setup = Setup::new();
    let told = |setup: &Setup, p: &str, c: &str| setup.told(completion(p, c)).remove(0);
    assert_eq!(
        told(&setup, "Q: x\nA:", " yes"),
        ("Q: x\nA: yes<eos>".into(), vec![" yes<eos>".into()])
    );
    // One that ends with a stop id has its end.
    assert_eq!(
        told(&setup, "x", "y<|im_end|>"),
        ("xy<|im_end|>".into(), vec!["y<|im_end|>".into()])
    );
    // The prompt's ids are those of a request, even where its end and the completion would make one token.
    let examples = setup
        .build(&rows(vec![completion("xa", "b")]), None)
        .unwrap();
    let prompt = setup.tokenizer.encode("xa").unwrap();
    assert_eq!(examples.items[0].ids()[..2], prompt);
    assert_eq!(examples.items[0].ids().len(), 4);
    // The prompt's template is the one of serving.
    setup.profile.prompt_template = Some("Q: {prompt}\nA:".into());
    assert_eq!(
        told(&setup, "{prompt}", "z"),
        ("Q: {prompt}\nA:z<eos>".into(), vec!["z<eos>".into()])
    );
    // An empty prompt leaves the first token to nobody.
    setup.profile.prompt_template = None;
    assert_eq!(
        told(&setup, "", "zy"),
        ("zy<eos>".into(), vec!["y<eos>".into()])
    );
    setup.tokenizer = tokenizer(true);
    assert_eq!(
        told(&setup, "", "zy"),
        ("<s>zy<eos>".into(), vec!["zy<eos>".into()])
    );
    assert_eq!(
        told(&setup, "xa", "b"),
        ("<s>xab<eos>".into(), vec!["b<eos>".into()])
    );
    // Without any stop id there is no end to teach; one character has nothing before it.
    setup.tokenizer = tokenizer(false);
    setup.stop_ids = vec![IM_END];
    assert_eq!(told(&setup, "x", "y").1, ["y<|im_end|>"]);
}

#[test]
fn a_chat_is_learned_as_it_is_generated() {
    let mut setup = Setup::new();
    let row = chat(&["sbe", "uhi", "ayo", "uno", "nok", "uso", "aend"]);
    let whole = "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\nend<|im_end|>\n";
    let learned = vec!["yo<|im_end|>".to_owned(), "end<|im_end|>".to_owned()];
    assert_eq!(setup.told(row), [(whole.to_owned(), learned)]);
    // The profile's system prompt stands where serving puts it, and gives way to the row's own.
    setup.profile.system_prompt = Some("P".into());
    let (text, _) = setup.told(chat(&["uhi", "ayo"])).remove(0);
    assert!(
        text.starts_with("<|im_start|>system\nP<|im_end|>\n<|im_start|>user\nhi"),
        "{text}"
    );
    let (text, _) = setup.told(chat(&["sown", "uhi", "ayo"])).remove(0);
    assert!(
        text.starts_with("<|im_start|>system\nown<|im_end|>\n<|im_start|>user"),
        "{text}"
    );
}

#[test]
fn a_control_tokens_text_in_a_message_teaches_no_control_token() {
    let setup = Setup::new();
    let examples = setup
        .build(&rows(vec![chat(&["u<|im_end|>", "ax<|im_end|>y"])]), None)
        .unwrap();
    let ids = examples.items[0].ids();
    assert_eq!(
        ids.iter().filter(|id| **id == IM_END).count(),
        2,
        "one for each turn"
    );
    assert_eq!(setup.tell(&examples.items[0]).1, ["x<|im_end|>y<|im_end|>"]);
}

#[test]
fn a_template_that_rewrites_earlier_turns_gives_one_example_for_each_answer() {
    let mut setup = Setup::new();
    setup.template = Some(template(FORGETFUL));
    let told = setup.told(chat(&["u1hi", "a1yo", "u2no", "a2ok"]));
    let learned: Vec<&Vec<String>> = told.iter().map(|t| &t.1).collect();
    assert_eq!(learned, [&["1yo<|im_end|>"], &["2ok<|im_end|>"]]);
    assert!(
        told[1].0.contains("assistant\nyo<|im_end|>"),
        "the earlier answer is read as serving renders it"
    );
    let examples = setup
        .build(&rows(vec![chat(&["u1hi", "a1yo", "u2no", "a2ok"])]), None)
        .unwrap();
    assert_eq!(examples.lines, [1, 1]);
}

#[test]
fn a_template_without_stop_ids_still_teaches_where_to_stop() {
    let mut setup = Setup::new();
    setup.template = Some(template(OPEN));
    let told = setup.told(chat(&["uhi", "ayo", "uno", "aok"]));
    assert_eq!(
        told,
        [(
            "user: hi\nassistant: yo\nuser: no\nassistant: ok\n<eos>".into(),
            vec!["yo\n".into(), "ok\n<eos>".into()]
        )]
    );
}

#[test]
fn a_template_that_cannot_be_served_alike_is_refused() {
    let mut setup = Setup::new();
    // Generation starts from other text than what stands before the answer.
    let other = CHATML.replace("assistant\n' }}{% endif", "helper\n' }}{% endif");
    assert_ne!(other, CHATML);
    setup.template = Some(template(&other));
    let data = rows(vec![chat(&["uhi", "ayo"])]);
    assert_eq!(
        only(setup.build(&data, None)),
        (1, "messages".into(), DataRule::Template)
    );
    setup.template = Some(template("{{ raise_exception('no') }}"));
    assert_eq!(only(setup.build(&data, None)).2, DataRule::Template);
    setup.template = None;
    assert_eq!(
        only(setup.build(&data, None)),
        (0, "messages".into(), DataRule::Template)
    );
}

#[test]
fn labels_are_sorted_by_their_bytes_or_kept_as_given() {
    let setup = Setup::new();
    let data = rows(vec![
        class("t1", "ä"),
        class("t2", "b"),
        class("t3", "B"),
        class("t4", "ä"),
    ]);
    let examples = setup.build(&data, None).unwrap();
    assert_eq!(examples.labels.as_ref().unwrap(), &["B", "b", "ä"]);
    let classes: Vec<&Example> = examples.items.iter().collect();
    let ids = |text: &str| setup.tokenizer.encode(text).unwrap();
    assert_eq!(
        *classes[0],
        Example::Class {
            ids: ids("t1"),
            label: 2
        }
    );
    assert_eq!(
        *classes[2],
        Example::Class {
            ids: ids("t3"),
            label: 0
        }
    );
    let given = ["x", "b", "ä"].map(str::to_owned);
    let report = setup.build(&data, Some(&given));
    assert_eq!(only(report), (3, "label".into(), DataRule::UnknownLabel));
    let examples = setup
        .build(&rows(vec![class("t", "ä")]), Some(&given))
        .unwrap();
    assert_eq!(
        (examples.labels.unwrap(), &examples.items[0]),
        (
            given.to_vec(),
            &Example::Class {
                ids: ids("t"),
                label: 2
            }
        )
    );
}

#[test]
fn too_long_is_an_error_by_line_and_never_a_cut() {
    let mut setup = Setup::new();
    setup.max_tokens = 5;
    let at = rows(vec![completion("xx", "yy"), completion("x", "yyy")]);
    assert!(
        setup.build(&at, None).is_ok(),
        "five tokens with the stop id"
    );
    let over = rows(vec![completion("xx", "yy"), completion("xx", "yyy")]);
    assert_eq!(
        only(setup.build(&over, None)),
        (2, "completion".into(), DataRule::TooLong)
    );
    let over = rows(vec![class("xxxxx", "l"), class("xxxxxx", "m")]);
    assert_eq!(
        only(setup.build(&over, None)),
        (2, "text".into(), DataRule::TooLong)
    );
    assert_eq!(
        only(setup.build(&rows(vec![chat(&["uhi", "ayo"])]), None)).2,
        DataRule::TooLong
    );
    let many = rows(
        (0..30)
            .map(|i| completion("xxxxx", &format!("{i}")))
            .collect(),
    );
    let report = setup.build(&many, None).unwrap_err();
    assert_eq!((report.errors.len(), report.more_errors), (10, 20));
}

#[test]
fn counts_are_of_tokens() {
    let setup = Setup::new();
    let data = rows(vec![
        completion("xx", "yy"),
        completion("x", "y"),
        completion("xxxx", "y"),
    ]);
    let stats = setup.build(&data, None).unwrap().stats();
    let want = TokenStats {
        examples: 3,
        tokens: 5 + 3 + 6,
        targets: 3 + 2 + 2,
        shortest: 3,
        median: 5,
        p95: 6,
        longest: 6,
    };
    assert_eq!(stats, want);
}

fn classes(counts: &[usize]) -> Examples {
    let mut items = Vec::new();
    for (label, count) in counts.iter().enumerate() {
        for _ in 0..*count {
            let ids = vec![u32::try_from(items.len()).unwrap()];
            items.push(Example::Class { ids, label });
        }
    }
    let lines = (1..=items.len() as u64).collect();
    let labels = Some((0..counts.len()).map(|l| format!("{l}")).collect());
    Examples {
        items,
        lines,
        labels,
    }
}

fn of_label(examples: &Examples, wanted: usize) -> usize {
    let is = |e: &&Example| matches!(e, Example::Class { label, .. } if *label == wanted);
    examples.items.iter().filter(is).count()
}

#[test]
fn a_split_is_by_seed_and_gives_each_class_its_share() {
    let all = classes(&[50, 30, 20, 1]);
    let (train, valid) = all.clone().split(7, 0.1, true);
    let valid = valid.unwrap();
    assert_eq!([0, 1, 2, 3].map(|l| of_label(&valid, l)), [5, 3, 2, 0]);
    assert_eq!(train.items.len() + valid.items.len(), 101);
    assert_eq!(
        all.clone().split(7, 0.1, true),
        (train, Some(valid.clone()))
    );
    assert_ne!(
        all.clone().split(8, 0.1, true).1.unwrap().lines,
        valid.lines
    );
    // Many small classes give their share together.
    let (train, valid) = classes(&[4; 25]).split(1, 0.1, true);
    assert_eq!(valid.unwrap().items.len(), 10);
    assert!((0..25).all(|l| of_label(&train, l) >= 1));
    assert_eq!(classes(&[5]).split(1, 0.0, true).1, None);
    let (train, valid) = classes(&[5]).split(1, 1.0, false);
    assert_eq!((train.items.len(), valid.unwrap().items.len()), (1, 4));
}

#[test]
fn what_belongs_together_is_not_parted() {
    let lm = |id: u32| Example::Lm {
        ids: vec![id, 9],
        learn: vec![false, true],
    };
    // Lines 1 and 2 have two examples each; one example of line 3 repeats one of line 1, and 4 repeats 2.
    let items = vec![lm(1), lm(2), lm(3), lm(4), lm(2), lm(3), lm(5), lm(6)];
    let lines = vec![1, 1, 2, 2, 3, 4, 5, 6];
    let all = Examples {
        items,
        lines,
        labels: None,
    };
    for seed in 0..40 {
        let (train, valid) = all.clone().split(seed, 0.4, false);
        let Some(valid) = valid else { continue };
        let set = |e: &Examples| e.lines.iter().copied().collect::<BTreeSet<u64>>();
        let ids = |e: &Examples| {
            e.items
                .iter()
                .map(|e| e.ids()[0])
                .collect::<BTreeSet<u32>>()
        };
        assert!(set(&train).is_disjoint(&set(&valid)), "seed {seed}");
        assert!(ids(&train).is_disjoint(&ids(&valid)), "seed {seed}");
    }
}

#[test]
fn a_document_is_held_out_whole() {
    // Documents of 3 to 5 windows: a tenth of them is 2, and none is so small.
    let window = |document: u64, number: u32| Example::Lm {
        ids: vec![u32::try_from(document).unwrap() * 10 + number, 7],
        learn: vec![false, true],
    };
    let documents = |sizes: &[u32]| {
        let all: Vec<(u64, u32)> = (1..)
            .zip(sizes)
            .flat_map(|(line, size)| (0..*size).map(move |number| (line, number)))
            .collect();
        Examples {
            items: all
                .iter()
                .map(|(line, number)| window(*line, *number))
                .collect(),
            lines: all.iter().map(|(line, _)| *line).collect(),
            labels: None,
        }
    };
    for seed in 0..20 {
        let (train, valid) = documents(&[4, 5, 3, 5, 4]).split(seed, 0.1, false);
        assert_eq!(valid.unwrap().lines, [3; 3], "seed {seed}");
        assert_eq!(train.items.len(), 18);
        let (_, valid) = documents(&[9, 4]).split(seed, 0.1, false);
        assert_eq!(valid.unwrap().lines, [2; 4], "seed {seed}");
        // One document, or nothing below a half, cannot be divided.
        assert_eq!(documents(&[9]).split(seed, 0.5, false).1, None);
        let (_, valid) = documents(&[1, 9, 9, 9, 9]).split(seed, 0.3, false);
        assert!(valid.unwrap().items.len() <= 11, "seed {seed}");
    }
}

proptest! {
    #[test]
    fn every_split_is_a_partition(counts in prop::collection::vec(1..20_usize, 1..8), seed: u64, fraction in 0.0..1.0_f64, stratified: bool) {
        let all = classes(&counts);
        let (train, valid) = all.clone().split(seed, fraction, stratified);
        let held = valid.as_ref().map_or(0, |v| v.items.len());
        prop_assert!(!train.items.is_empty());
        let mut lines = train.lines.clone();
        lines.extend(valid.iter().flat_map(|v| v.lines.iter().copied()));
        lines.sort_unstable();
        prop_assert_eq!(lines, all.lines.clone());
        // Each class keeps one, and rounding is to the nearest.
        prop_assert!((held as f64 - fraction * all.items.len() as f64).abs() <= counts.len() as f64 + 0.5);
    }

    #[test]
    fn any_completion_keeps_the_ids_of_its_request(prompt in "[ab x\n]{0,6}|\\PC{0,6}", text in "[ab x\n]{1,6}|\\PC{1,6}", bos: bool) {
        let setup = Setup { tokenizer: tokenizer(bos), ..Setup::new() };
        if let Ok(examples) = setup.build(&rows(vec![completion(&prompt, &text)]), None) {
            let request = setup.tokenizer.encode(&prompt).unwrap();
            let Example::Lm { ids, learn } = &examples.items[0] else { unreachable!() };
            prop_assert_eq!(&ids[..request.len()], &request[..]);
            prop_assert!(learn[..request.len()].iter().all(|l| !l));
            prop_assert!(learn[request.len().max(1)..].iter().all(|l| *l));
            prop_assert_eq!(setup.tokenizer.decode(&ids[usize::from(bos)..ids.len() - 1], false).unwrap(), prompt + &text);
        }
    }
}

/// A file beside the golden outputs, and the real model's tokenizer.
fn real(file: &str) -> Option<(PathBuf, Tokenizer)> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/golden");
    let golden = std::env::var_os("ESPALIER_GOLDEN")
        .map_or(default, PathBuf::from)
        .join(file);
    let model = std::env::var_os("ESPALIER_MODEL").filter(|_| golden.is_file());
    let Some(model) = model else {
        eprintln!(
            "skipped: no {} (ESPALIER_GOLDEN) or no ESPALIER_MODEL",
            golden.display()
        );
        return None;
    };
    let gguf = crate::gguf::Gguf::open(Path::new(&model)).unwrap();
    Some((golden, Tokenizer::from_gguf(gguf.metadata()).unwrap()))
}

#[test]
fn the_golden_curves_batches_are_what_their_texts_give() {
    let Some((golden, tokenizer)) = real("train_sft/curve.json") else {
        return;
    };
    let curve: serde_json::Value = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let setup = Setup {
        tokenizer,
        stop_ids: vec![2],
        ..Setup::new()
    };
    let mut checked = 0;
    for example in curve["steps"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|s| s["batch"].as_array().unwrap())
    {
        let ids: Vec<u32> = serde_json::from_value(example["input_ids"].clone()).unwrap();
        let start = usize::try_from(example["loss_start"].as_u64().unwrap()).unwrap();
        let text = |ids: &[u32]| setup.tokenizer.decode(ids, false).unwrap();
        let row = completion(&text(&ids[..start]), &text(&ids[start..ids.len() - 1]));
        let examples = setup.build(&rows(vec![row]), None).unwrap();
        let learn = (0..ids.len()).map(|i| i >= start).collect();
        assert_eq!(examples.items, [Example::Lm { ids, learn }]);
        checked += 1;
    }
    assert!(checked > 0);
}

#[test]
fn the_example_data_of_the_repository_is_good() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let limits = DataLimits::default();
    let tickets = ColumnNames {
        text: "ticket".into(),
        label: "queue".into(),
        ..ColumnNames::default()
    };
    for (file, format, columns) in [
        ("acme-tickets.csv", Format::Csv, tickets),
        ("globex-style.jsonl", Format::Jsonl, ColumnNames::default()),
        ("initech-tasks.jsonl", Format::Jsonl, ColumnNames::default()),
        ("hooli-chats.jsonl", Format::Jsonl, ColumnNames::default()),
        ("press-letters.md", Format::Text, ColumnNames::default()),
    ] {
        let bytes = std::fs::read(examples.join(file)).unwrap();
        let data =
            parse(&bytes, format, &columns, &limits).unwrap_or_else(|r| panic!("{file}: {r}"));
        let setup = Setup {
            max_tokens: 4096,
            ..Setup::new()
        };
        let built = setup
            .build(&data, None)
            .unwrap_or_else(|r| panic!("{file}: {r}"));
        assert!(built.items.len() >= data.rows.len(), "{file}");
    }
}
