//! Which turns of a row are learned, and what serving would have rendered before them.

use super::*;

/// System, two turns, and a third whose answer has weight 0 unless `last` says otherwise.
fn talk(last: &str) -> Row {
    chat(&["sbe", "uhi", "ayo", "uno", "nok", "uso", last])
}

const TALK: &str = "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\nend<|im_end|>\n";

fn trained_on(train_on: TrainOn) -> Setup {
    Setup {
        train_on,
        ..Setup::new()
    }
}

#[test]
fn the_ids_before_every_answer_are_those_that_serving_renders() {
    let mut setup = Setup::new();
    // A system prompt of the profile stands in requests and rows alike.
    setup.profile.system_prompt = Some("be <|im_end|> kind".into());
    let spoken = [
        Message::new("system", "be <|im_end|> kind"),
        Message::new("user", "hi ab"),
        Message::new("assistant", "yo"),
        Message::new("user", "no"),
        Message::new("assistant", "ok ab"),
        Message::new("user", "so?"),
        Message::new("assistant", "end"),
    ];
    let row = chat(&["uhi ab", "ayo", "uno", "aok ab", "uso?", "aend"]);
    for train_on in [TrainOn::Assistant, TrainOn::LastAssistant, TrainOn::All] {
        setup.train_on = train_on;
        let examples = setup.build(&rows(vec![row.clone()]), None).unwrap();
        let [Example::Lm { ids, learn }] = &examples.items[..] else {
            panic!("not one example")
        };
        for answer in [2, 4, 6] {
            let template = setup.template.as_ref().unwrap();
            let before = &spoken[..answer];
            let served = encode_chat(&setup.tokenizer, template, before, &[], true).unwrap();
            assert_eq!(ids[..served.len()], served, "{train_on:?}, answer {answer}");
            let learned = (learn[served.len() - 1], learn[served.len()]);
            let want = match train_on {
                TrainOn::Assistant => (false, true),
                TrainOn::LastAssistant => (false, answer == 6),
                TrainOn::All => (true, true),
            };
            assert_eq!(learned, want, "{train_on:?}, answer {answer}");
        }
    }
}

#[test]
fn the_turns_that_are_named_are_learned() {
    let told = |train_on, row| trained_on(train_on).told(row);
    let answers = ["yo<|im_end|>", "end<|im_end|>"].map(str::to_owned);
    assert_eq!(
        told(TrainOn::Assistant, talk("aend")),
        [(TALK.to_owned(), answers.to_vec())]
    );
    assert_eq!(
        told(TrainOn::LastAssistant, talk("aend")),
        [(TALK.to_owned(), answers[1..].to_vec())]
    );
    // All but the first token and the message of weight 0, with what the template writes around it.
    let learned = TALK.replacen("<|im_start|>", "", 1);
    let (before, behind) = learned
        .split_once("<|im_start|>assistant\nok<|im_end|>\n")
        .unwrap();
    assert_eq!(
        told(TrainOn::All, talk("aend")),
        [(TALK.to_owned(), vec![before.to_owned(), behind.to_owned()])]
    );
    // A stop id where the template writes none, learned as its message is.
    let mut open = trained_on(TrainOn::All);
    open.template = Some(template(OPEN));
    let said = "user: hi\nassistant: yo\n<eos>";
    assert_eq!(
        open.told(chat(&["uhi", "ayo"])),
        [(said.to_owned(), vec![said[1..].to_owned()])]
    );
}

#[test]
fn the_last_answer_of_weight_0_leaves_nothing() {
    let data = rows(vec![talk("nend")]);
    assert_eq!(
        only(trained_on(TrainOn::LastAssistant).build(&data, None)),
        (1, "messages".into(), DataRule::NothingToLearn)
    );
    assert!(trained_on(TrainOn::Assistant).build(&data, None).is_ok());
    let [(_, learned)] = &trained_on(TrainOn::All).told(talk("nend"))[..] else {
        panic!("not one example")
    };
    assert!(learned[1].ends_with("so<|im_end|>\n"), "{learned:?}");
}

#[test]
fn a_rewriting_template_has_one_last_answer_and_no_place_for_weight_0() {
    let mut setup = trained_on(TrainOn::LastAssistant);
    setup.template = Some(template(FORGETFUL));
    let told = setup.told(chat(&["u1hi", "a1yo", "u2no", "a2ok"]));
    assert_eq!(told[0].1, ["2ok<|im_end|>"]);
    assert_eq!(told.len(), 1);
    setup.train_on = TrainOn::All;
    let told = setup.told(chat(&["u1hi", "a1yo", "u2no", "a2ok"]));
    assert!(told[0].1[0].contains("assistant\nyo<|im_end|>"), "{told:?}");
    let data = rows(vec![chat(&["u1hi", "n1yo", "u2no", "a2ok"])]);
    assert_eq!(
        only(setup.build(&data, None)),
        (1, "messages".into(), DataRule::Template)
    );
}

#[test]
fn completions_are_learned_with_their_prompt_when_all_is() {
    let told = |train_on, prompt: &str| {
        let mut setup = trained_on(train_on);
        setup.tokenizer = tokenizer(true);
        setup.told(completion(prompt, "xab")).remove(0).1
    };
    assert_eq!(told(TrainOn::Assistant, "Q"), ["xab<eos>"]);
    assert_eq!(told(TrainOn::LastAssistant, "Q"), ["xab<eos>"]);
    assert_eq!(told(TrainOn::All, "Q"), ["Qxab<eos>"]);
    assert_eq!(told(TrainOn::All, ""), ["xab<eos>"]);
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
fn an_instruction_is_a_chat_of_two_messages() {
    let mut setup = Setup::new();
    assert_eq!(
        setup.told(instruction("Count", "", "1<|im_end|>")),
        setup.told(chat(&["uCount", "a1<|im_end|>"]))
    );
    assert_eq!(
        setup.told(instruction("Sum", "1\n2", "3")),
        setup.told(chat(&["uSum\n\n1\n2", "a3"]))
    );
    setup.max_tokens = 5;
    let data = rows(vec![instruction("a", "", "b")]);
    assert_eq!(
        only(setup.build(&data, None)),
        (1, "instruction".into(), DataRule::TooLong)
    );
    setup.template = None;
    let report = setup
        .build(&rows(vec![instruction("a", "", "b")]), None)
        .unwrap_err();
    assert!(report.to_string().contains("no chat template"), "{report}");
    assert!(
        report.to_string().contains("use prompt/completion"),
        "{report}"
    );
}

fn text(text: &str) -> Row {
    Row::Text { text: text.into() }
}

#[test]
fn a_document_is_learned_once_and_to_its_end() {
    let mut setup = Setup::new();
    setup.tokenizer = tokenizer(true);
    assert_eq!(
        setup.told(text("xab\ny")),
        [("<s>xab\ny<eos>".into(), vec!["xab\ny<eos>".into()])]
    );
    // Seven ids make six targets; windows of 4 hold three of them.
    setup.max_tokens = 4;
    let told = setup.told(text("uvwxy"));
    assert_eq!(
        told,
        [
            ("<s>uvw".into(), vec!["uvw".into()]),
            ("wxy<eos>".into(), vec!["xy<eos>".into()])
        ]
    );
    let data = rows(vec![text("uvwxy"), text("z")]);
    let examples = setup.build(&data, None).unwrap();
    assert_eq!(examples.lines, [1, 1, 2]);
    // One token and no stop id to follow it.
    let mut setup = Setup::new();
    setup.stop_ids = vec![EOS];
    setup.tokenizer = tokenizer(false);
    assert_eq!(setup.told(text("x"))[0].1, ["<eos>"]);
    assert_eq!(
        only(setup.build(&rows(vec![text("<eos>")]), None)),
        (1, "text".into(), DataRule::NothingToLearn)
    );
}
