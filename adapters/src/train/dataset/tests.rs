//! Files of every form, and every rule broken once.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;

use super::*;

fn jsonl(text: &str) -> Result<Dataset, DataReport> {
    parse(
        text.as_bytes(),
        Format::Jsonl,
        &ColumnNames::default(),
        &DataLimits::default(),
    )
}

fn csv(text: &str) -> Result<Dataset, DataReport> {
    parse(
        text.as_bytes(),
        Format::Csv,
        &ColumnNames::default(),
        &DataLimits::default(),
    )
}

fn class(text: &str, label: &str) -> Row {
    Row::Class {
        text: text.into(),
        label: label.into(),
    }
}

fn completion(prompt: &str, completion: &str) -> Row {
    Row::Completion {
        prompt: prompt.into(),
        completion: completion.into(),
    }
}

/// (line, field, rule) of each error.
fn errors(report: &DataReport) -> Vec<(u64, &str, DataRule)> {
    report
        .errors
        .iter()
        .map(|f| (f.line, f.field.as_str(), f.rule))
        .collect()
}

#[test]
fn the_three_kinds_are_read_with_their_lines() {
    let data = jsonl("\u{feff}{\"text\": \"a\\nb\", \"label\": \"x\"}\r\n\r\n{\"label\": \"y\", \"text\": \"ü\"}").unwrap();
    assert_eq!(
        (data.kind, data.rows),
        (Kind::Class, vec![class("a\nb", "x"), class("ü", "y")])
    );
    assert_eq!(data.lines, [1, 3]);
    let data = jsonl("{\"prompt\": \"\", \"completion\": \" c\"}\n").unwrap();
    assert_eq!(data.rows, [completion("", " c")]);
    let chat = r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a", "weight": 0}, {"role": "user", "content": "v"},
        {"role": "assistant", "content": "b", "weight": 1, "tool_calls": null}]}"#;
    let data = jsonl(&chat.replace('\n', " ")).unwrap();
    let Row::Chat { messages } = &data.rows[0] else {
        panic!("no chat")
    };
    let learned: Vec<bool> = messages.iter().map(|m| m.learn).collect();
    assert_eq!(learned, [true, true, false, true, true]);
    assert_eq!(
        (messages[4].role, messages[4].content.as_str()),
        (Role::Assistant, "b")
    );
    assert_eq!(data.report, DataReport::default());
}

#[test]
fn tables_are_read_by_column_name_with_quotes_and_line_breaks() {
    let data = csv("\u{feff}label,text\r\nx,\"a, \"\"b\"\"\r\nc\"\r\n\r\n\ny,d\r\n").unwrap();
    assert_eq!(data.rows, [class("a, \"b\"\r\nc", "x"), class("d", "y")]);
    assert_eq!(data.lines, [2, 6]);
    let columns = ColumnNames {
        label: "category".into(),
        ..ColumnNames::default()
    };
    let tsv = parse(
        b"text\tcategory\nwhy, oh\tq\n",
        Format::Tsv,
        &columns,
        &DataLimits::default(),
    )
    .unwrap();
    assert_eq!(tsv.rows, [class("why, oh", "q")]);
    let data = csv("prompt,completion\np,c").unwrap();
    assert_eq!(data.rows, [completion("p", "c")]);
}

fn text(text: &str) -> Row {
    Row::Text { text: text.into() }
}

fn instruction(instruction: &str, input: &str, output: &str) -> Row {
    let [instruction, input, output] = [instruction, input, output].map(str::to_owned);
    Row::Instruction {
        instruction,
        input,
        output,
    }
}

#[test]
fn a_text_without_label_is_a_document() {
    let data = jsonl("{\"text\": \"a\\nb\", \"meta\": 1}\n{\"text\": \"c\"}").unwrap();
    assert_eq!(
        (data.kind, data.rows),
        (Kind::Text, vec![text("a\nb"), text("c")])
    );
    assert_eq!(data.report.warnings[0].field, "meta");
    assert_eq!(csv("text\n\"a\n,b\"\n").unwrap().rows, [text("a\n,b")]);
    let whole = "# Title\r\n\r\n{\"text\": 3}\n";
    let read = |bytes: &[u8], limits| parse(bytes, Format::Text, &ColumnNames::default(), &limits);
    let limits = DataLimits {
        max_document_bytes: whole.len(),
        max_line_bytes: 2,
        ..DataLimits::default()
    };
    let data = read(whole.as_bytes(), limits).unwrap();
    assert_eq!((data.rows, data.lines), (vec![text(whole)], vec![1]));
    let refused = |bytes: &[u8]| {
        let report = read(bytes, limits).unwrap_err();
        (report.errors[0].rule, report.error_count())
    };
    assert_eq!(
        refused(format!("{whole}.").as_bytes()),
        (DataRule::Limit, 1)
    );
    assert_eq!(refused(b"a\xff"), (DataRule::Utf8, 1));
    assert_eq!(refused(b" \n"), (DataRule::Empty, 1));
    assert_eq!(refused(b""), (DataRule::Empty, 1));
    // A label that is missing among labelled rows is missing, and a text beside columns of other names may have one.
    let report = jsonl("{\"text\": \"a\", \"label\": \"x\"}\n{\"text\": \"b\"}").unwrap_err();
    assert_eq!(errors(&report), [(2, "label", DataRule::MissingField)]);
    let report = jsonl("{\"text\": \"b\"}\n{\"text\": \"a\", \"label\": \"x\"}").unwrap_err();
    assert_eq!(errors(&report), [(2, "", DataRule::MixedKinds)]);
    // A line may be as long as a document when it is one, and only then.
    let long = DataLimits {
        max_line_bytes: 40,
        max_document_bytes: 100,
        ..DataLimits::default()
    };
    let line = |line: String| {
        parse(
            line.as_bytes(),
            Format::Jsonl,
            &ColumnNames::default(),
            &long,
        )
    };
    let many = "x".repeat(80);
    assert!(line(format!("{{\"text\": \"{many}\"}}")).is_ok());
    let report = line(format!("{{\"text\": \"{many}xxxxxxxxxx\"}}")).unwrap_err();
    assert_eq!(errors(&report), [(1, "", DataRule::Limit)]);
    let report = line(format!(
        "{{\"prompt\": \"\", \"completion\": \"{}\"}}",
        "x".repeat(20)
    ));
    assert_eq!(errors(&report.unwrap_err()), [(1, "", DataRule::Limit)]);
}

#[test]
fn instructions_may_have_an_input() {
    let want = [instruction("a", "", "b"), instruction("c", "d", "e")];
    let data = jsonl(
        "{\"instruction\": \"a\", \"output\": \"b\"}\n{\"instruction\": \"c\", \"input\": \"d\", \"output\": \"e\"}",
    );
    let data = data.unwrap();
    assert_eq!((data.kind, &data.rows[..]), (Kind::Instruction, &want[..]));
    let data = csv("output,instruction,input\nb,a,\ne,c,d\n").unwrap();
    assert_eq!(
        (&data.rows[..], data.report),
        (&want[..], DataReport::default())
    );
    assert_eq!(
        csv("output,instruction\nb,a\n").unwrap().rows[..],
        want[..1]
    );
    let columns = ColumnNames {
        instruction: "task".into(),
        input: "given".into(),
        output: "answer".into(),
        ..ColumnNames::default()
    };
    let tsv = b"task\tgiven\tanswer\nc\td\te\n";
    let data = parse(tsv, Format::Tsv, &columns, &DataLimits::default()).unwrap();
    assert_eq!(data.rows[..], want[1..]);
    let report = csv("instruction,input\na,b\n").unwrap_err();
    assert_eq!(errors(&report), [(1, "output", DataRule::Header)]);
}

#[test]
fn labels_may_be_numbers_or_booleans_but_all_alike() {
    let data = jsonl("{\"text\": \"a\", \"label\": 3}\n{\"text\": \"b\", \"label\": 12}").unwrap();
    assert_eq!(data.rows, [class("a", "3"), class("b", "12")]);
    let report =
        jsonl("{\"text\": \"a\", \"label\": 3}\n{\"text\": \"b\", \"label\": \"x\"}").unwrap_err();
    assert_eq!(errors(&report), [(2, "label", DataRule::FieldType)]);
    let report = jsonl("{\"text\": \"a\", \"label\": 3.5}").unwrap_err();
    assert_eq!(errors(&report), [(1, "label", DataRule::FieldType)]);
}

#[test]
fn every_bad_line_is_told_with_its_number_and_field() {
    let chat = |messages: &str| format!("{{\"messages\": {messages}}}");
    let user = r#"{"role": "user", "content": "u"}"#;
    let answer = r#"{"role": "assistant", "content": "a"}"#;
    let cases = [
        ("{".to_owned(), "", DataRule::Json),
        ("[1]".to_owned(), "", DataRule::Json),
        (
            r#"{"text": "a", "text": "b", "label": "x"}"#.into(),
            "",
            DataRule::Json,
        ),
        (r#"{"txt": "a"}"#.into(), "", DataRule::MissingField),
        (
            r#"{"text": "a", "label": null}"#.into(),
            "label",
            DataRule::MissingField,
        ),
        (r#"{"text": " \n"}"#.into(), "text", DataRule::Empty),
        (
            r#"{"instruction": "a"}"#.into(),
            "output",
            DataRule::MissingField,
        ),
        (
            r#"{"instruction": "a", "output": ""}"#.into(),
            "output",
            DataRule::Empty,
        ),
        (
            r#"{"instruction": "a", "output": "b", "input": 3}"#.into(),
            "input",
            DataRule::FieldType,
        ),
        (
            r#"{"instruction": "a", "output": "b", "text": "c"}"#.into(),
            "",
            DataRule::MixedKinds,
        ),
        (r#"{"label": "a"}"#.into(), "text", DataRule::MissingField),
        (
            r#"{"text": null, "label": "a"}"#.into(),
            "text",
            DataRule::MissingField,
        ),
        (
            r#"{"text": ["a"], "label": "a"}"#.into(),
            "text",
            DataRule::FieldType,
        ),
        (
            r#"{"text": "", "label": "a"}"#.into(),
            "text",
            DataRule::Empty,
        ),
        (
            r#"{"text": "a", "label": ""}"#.into(),
            "label",
            DataRule::Empty,
        ),
        (
            r#"{"text": "a", "label": "b\nc"}"#.into(),
            "label",
            DataRule::FieldType,
        ),
        (
            format!(r#"{{"text": "a", "label": "{}"}}"#, "b".repeat(257)),
            "label",
            DataRule::Limit,
        ),
        (
            r#"{"prompt": "a"}"#.into(),
            "completion",
            DataRule::MissingField,
        ),
        (
            r#"{"prompt": "a", "completion": ""}"#.into(),
            "completion",
            DataRule::Empty,
        ),
        (
            r#"{"prompt": [], "completion": "a"}"#.into(),
            "prompt",
            DataRule::FieldType,
        ),
        (
            r#"{"prompt": "a", "completion": "b", "label": true}"#.into(),
            "",
            DataRule::Unsupported,
        ),
        (
            r#"{"prompt": "a", "completion": "b", "text": "c"}"#.into(),
            "",
            DataRule::MixedKinds,
        ),
        (chat("3"), "messages", DataRule::FieldType),
        (chat("[]"), "messages", DataRule::Empty),
        (chat("[3]"), "messages[0]", DataRule::FieldType),
        (chat(&format!("[{user}]")), "messages", DataRule::Role),
        (chat(&format!("[{answer}]")), "messages[0]", DataRule::Role),
        (
            chat(&format!("[{user}, {user}]")),
            "messages[1]",
            DataRule::Role,
        ),
        (
            chat(&format!("[{user}, {answer}, {user}]")),
            "messages",
            DataRule::Role,
        ),
        (
            chat(&format!(
                "[{user}, {{\"role\": \"system\", \"content\": \"\"}}]"
            )),
            "messages[1]",
            DataRule::Role,
        ),
        (
            chat(&format!(
                "[{user}, {{\"role\": \"tool\", \"content\": \"\"}}]"
            )),
            "messages[1].role",
            DataRule::Role,
        ),
        (
            chat(&format!("[{user}, {{\"content\": \"\"}}]")),
            "messages[1].role",
            DataRule::Role,
        ),
        (
            chat(&format!(
                "[{user}, {{\"role\": \"assistant\", \"content\": null}}]"
            )),
            "messages[1].content",
            DataRule::FieldType,
        ),
        (
            chat(&format!(
                "[{user}, {{\"role\": \"assistant\", \"content\": \"\"}}]"
            )),
            "messages[1]",
            DataRule::Empty,
        ),
        (
            chat(&format!(
                "[{user}, {{\"role\": \"assistant\", \"content\": \"a\", \"weight\": 0.5}}]"
            )),
            "messages[1].weight",
            DataRule::Weight,
        ),
        (
            chat(r#"[{"role": "user", "content": "u", "weight": 1}]"#),
            "messages[0].weight",
            DataRule::Weight,
        ),
        (
            chat(&format!(
                "[{user}, {{\"role\": \"assistant\", \"content\": \"a\", \"weight\": 0}}]"
            )),
            "messages",
            DataRule::NothingToLearn,
        ),
        (
            chat(&format!(
                "[{user}, {{\"role\": \"assistant\", \"content\": \"a\", \"tool_calls\": []}}]"
            )),
            "messages[1].tool_calls",
            DataRule::Unsupported,
        ),
        (
            format!("{{\"messages\": [{user}, {answer}], \"tools\": [1]}}"),
            "tools",
            DataRule::Unsupported,
        ),
    ];
    for (text, field, rule) in cases {
        let report = jsonl(&format!("\n{text}\n")).unwrap_err();
        assert_eq!(errors(&report), [(2, field, rule)], "{text}: {report}");
    }
    let report = parse(
        b"{\"text\": \"\xff\", \"label\": \"a\"}",
        Format::Jsonl,
        &ColumnNames::default(),
        &DataLimits::default(),
    );
    assert_eq!(errors(&report.unwrap_err()), [(1, "", DataRule::Utf8)]);
    assert_eq!(
        errors(&jsonl(" \n\n").unwrap_err()),
        [(0, "", DataRule::TooFewRows)]
    );
}

#[test]
fn all_bad_lines_come_in_one_report_and_the_rest_is_counted() {
    let text = "{\"text\": \"a\", \"label\": \"x\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"text\": \"\", \"label\": \"\"}\nno\n";
    let report = jsonl(text).unwrap_err();
    let want = [
        (2, "", DataRule::MixedKinds),
        (3, "text", DataRule::Empty),
        (3, "label", DataRule::Empty),
        (4, "", DataRule::Json),
    ];
    assert_eq!(errors(&report), want);
    let limits = DataLimits {
        max_findings: 3,
        ..DataLimits::default()
    };
    let many = "no\n".repeat(10);
    let report = parse(
        many.as_bytes(),
        Format::Jsonl,
        &ColumnNames::default(),
        &limits,
    )
    .unwrap_err();
    assert_eq!(
        (
            report.errors.len(),
            report.more_errors,
            report.error_count()
        ),
        (3, 7, 10)
    );
    assert!(report.to_string().contains("and 7 more errors"), "{report}");
}

#[test]
fn bad_tables_are_told() {
    for (text, want) in [
        ("", (0, "", DataRule::TooFewRows)),
        ("text,label\n", (0, "", DataRule::TooFewRows)),
        ("text,category\na,b\n", (1, "label", DataRule::Header)),
        ("text,label,text\na,b,c\n", (1, "text", DataRule::Header)),
        ("a,b\n1,2\n", (1, "", DataRule::Header)),
        ("messages\n[]\n", (1, "messages", DataRule::Header)),
        (
            "prompt,completion,label\na,b,c\n",
            (1, "", DataRule::Unsupported),
        ),
        ("text,label\na,b,c\n", (2, "", DataRule::Record)),
        ("text,label\na,b\nc\n", (3, "", DataRule::Record)),
        ("text,label\na,b\n\"c,d\ne,f\n", (3, "", DataRule::Record)),
        // Without the rule on quotes this one would be a row that has swallowed another.
        ("label,text\nx,\"a\ny,b\n", (2, "", DataRule::Record)),
        ("text,label\na,\n", (2, "label", DataRule::Empty)),
    ] {
        let report = csv(text).unwrap_err();
        assert_eq!(errors(&report), [want], "{text:?}: {report}");
    }
    let latin1 = parse(
        b"text,label\na,b\n\xe9,b\n",
        Format::Csv,
        &ColumnNames::default(),
        &DataLimits::default(),
    );
    assert_eq!(errors(&latin1.unwrap_err()), [(3, "", DataRule::Utf8)]);
    let report = csv("text,category\na,b\n").unwrap_err();
    assert!(
        report.errors[0].reason.contains("it has: text, category"),
        "{report}"
    );
}

#[test]
fn what_is_taken_but_doubtful_is_a_warning() {
    let data = csv("id,text,label\n1,a,x\n2,a,x\n3,a,y\n4,b,X\n5,c,y \n6,a,x\n").unwrap();
    let warnings: Vec<(u64, DataRule, &str)> = data
        .report
        .warnings
        .iter()
        .map(|f| (f.line, f.rule, f.reason.as_str()))
        .collect();
    assert_eq!(data.rows.len(), 6);
    assert!(
        warnings.iter().any(|w| w.1 == DataRule::IgnoredField),
        "{warnings:?}"
    );
    let duplicate = warnings
        .iter()
        .find(|w| w.1 == DataRule::Duplicate)
        .unwrap();
    assert_eq!((duplicate.0, &duplicate.2[..2]), (3, "2 "), "{warnings:?}");
    assert!(
        warnings
            .iter()
            .any(|w| w.1 == DataRule::ConflictingLabel && w.0 == 4),
        "{warnings:?}"
    );
    assert_eq!(
        warnings
            .iter()
            .filter(|w| w.1 == DataRule::SuspiciousLabel)
            .count(),
        2,
        "{warnings:?}"
    );
    let data = jsonl("{\"text\": \"a\", \"label\": \"x\", \"id\": 1}\n{\"text\": \"b\", \"label\": \"x\", \"id\": 1}").unwrap();
    assert_eq!(data.report.warnings[0].field, "id");
    assert!(data.report.warnings[0].reason.contains("2 rows"));
}

#[test]
fn limits_hold_exactly() {
    let text = "{\"text\": \"a\", \"label\": \"x\"}\n{\"text\": \"b\", \"label\": \"y\"}\n";
    let at = DataLimits {
        max_bytes: text.len(),
        max_line_bytes: text.lines().next().unwrap().len(),
        max_rows: 2,
        max_labels: 2,
        max_label_bytes: 1,
        ..DataLimits::default()
    };
    let read = |limits| {
        parse(
            text.as_bytes(),
            Format::Jsonl,
            &ColumnNames::default(),
            &limits,
        )
    };
    assert!(read(at).is_ok());
    for below in [
        DataLimits {
            max_bytes: at.max_bytes - 1,
            ..at
        },
        DataLimits {
            max_line_bytes: at.max_line_bytes - 1,
            ..at
        },
        DataLimits { max_rows: 1, ..at },
        DataLimits {
            max_labels: 1,
            ..at
        },
        DataLimits {
            max_label_bytes: 0,
            ..at
        },
    ] {
        let report = read(below).unwrap_err();
        assert!(
            report.errors.iter().all(|f| f.rule == DataRule::Limit),
            "{report}"
        );
    }
    let chat = r#"{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}"#;
    let few = DataLimits {
        max_messages: 1,
        ..DataLimits::default()
    };
    let report = parse(
        chat.as_bytes(),
        Format::Jsonl,
        &ColumnNames::default(),
        &few,
    )
    .unwrap_err();
    assert_eq!(errors(&report), [(1, "messages", DataRule::Limit)]);
}

#[test]
fn rows_that_come_inline_obey_the_same_rules() {
    let limits = DataLimits {
        max_rows: 3,
        ..DataLimits::default()
    };
    let good = vec![class("a", "x"), class("b", "y")];
    let data = from_rows(good.clone(), &limits).unwrap();
    assert_eq!((data.rows, data.lines), (good, vec![1, 2]));
    let bad = vec![class("a", "x"), class("", "y"), completion("p", "c")];
    let report = from_rows(bad, &limits).unwrap_err();
    assert_eq!(
        errors(&report),
        [(2, "text", DataRule::Empty), (3, "", DataRule::MixedKinds)]
    );
    let many = vec![class("a", "x"); 4];
    assert_eq!(
        errors(&from_rows(many, &limits).unwrap_err()),
        [(4, "", DataRule::Limit)]
    );
    assert!(from_rows(Vec::new(), &limits).is_err());
}

proptest! {
    #[test]
    fn any_rows_survive_each_format(rows in prop::collection::vec(("\\PC{1,20}(\r?\n\\PC{0,5})?", "[a-zé ,\"]{1,8}"), 1..8)) {
        let rows: Vec<Row> = rows.into_iter().map(|(t, l)| class(&t, &l)).collect();
        let mut jsonl = String::new();
        let (mut csv, mut tsv) = (csv::Writer::from_writer(Vec::new()), csv::WriterBuilder::new().delimiter(b'\t').from_writer(Vec::new()));
        csv.write_record(["text", "label"]).unwrap();
        tsv.write_record(["text", "label"]).unwrap();
        for row in &rows {
            let Row::Class { text, label } = row else { unreachable!() };
            jsonl += &serde_json::json!({"text": text, "label": label}).to_string();
            jsonl += "\n";
            csv.write_record([text, label]).unwrap();
            tsv.write_record([text, label]).unwrap();
        }
        let files = [
            (Format::Jsonl, jsonl.into_bytes()),
            (Format::Csv, csv.into_inner().unwrap()),
            (Format::Tsv, tsv.into_inner().unwrap()),
        ];
        for (format, bytes) in files {
            let data = parse(&bytes, format, &ColumnNames::default(), &DataLimits::default())
                .map_err(|r| TestCaseError::fail(format!("{format:?}: {r}")))?;
            prop_assert_eq!(&data.rows, &rows, "{:?}", format);
        }
    }

    #[test]
    fn any_bytes_are_rows_or_a_report(bytes in any::<Vec<u8>>(), prefix in 0..6_usize) {
        let starts: [&[u8]; 6] = [b"", b"text\n", b"instruction,output\n", b"text,label\n", b"{\"text\": \"a\", \"label\": \"x\"}\n", b"prompt\tcompletion\n\""];
        let bytes = [starts[prefix], &bytes].concat();
        for format in [Format::Jsonl, Format::Csv, Format::Tsv, Format::Text] {
            match parse(&bytes, format, &ColumnNames::default(), &DataLimits::default()) {
                Ok(data) => prop_assert!(!data.rows.is_empty() && data.rows.len() == data.lines.len()),
                Err(report) => prop_assert!(report.error_count() > 0),
            }
        }
    }
}

#[test]
fn banking77_reads_whole() {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data");
    let path = std::path::Path::new(default).join("banking77/train.csv");
    let Ok(bytes) = std::fs::read(&path) else {
        eprintln!("skipped: no {}", path.display());
        return;
    };
    let columns = ColumnNames {
        label: "category".into(),
        ..ColumnNames::default()
    };
    let data = parse(&bytes, Format::Csv, &columns, &DataLimits::default())
        .unwrap_or_else(|r| panic!("{r}"));
    assert_eq!(data.rows.len(), 10_003);
    let labels: std::collections::BTreeSet<&str> = data
        .rows
        .iter()
        .map(|r| match r {
            Row::Class { label, .. } => label.as_str(),
            _ => panic!("not a class"),
        })
        .collect();
    assert_eq!(labels.len(), 77);
}
