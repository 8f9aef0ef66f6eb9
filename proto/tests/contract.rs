//! The contract may grow and must not break: every fact of the descriptor set stands on a
//! line of `golden/espalier.v1.txt`. A line that is gone is a breaking change; a new line is
//! an addition, which the author accepts by writing the golden anew.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::{collections::BTreeSet, fs, path::PathBuf};

use prost::Message;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    ServiceDescriptorProto,
    field_descriptor_proto::{Label, Type},
};

const GOLDEN: &str = "golden/espalier.v1.txt";
const UPDATE: &str = "ESPALIER_UPDATE_GOLDEN";

/// One line a fact, sorted, so that a difference names what changed.
fn listing(set: &FileDescriptorSet) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    let ours = |file: &&FileDescriptorProto| file.package() == "espalier.v1";
    for file in set.file.iter().filter(ours) {
        for message in &file.message_type {
            list_message(&mut lines, file.package(), message);
        }
        for item in &file.enum_type {
            list_enum(&mut lines, file.package(), item);
        }
        for service in &file.service {
            list_service(&mut lines, file.package(), service);
        }
        let options = file.options.clone().unwrap_or_default();
        lines.insert(format!(
            "file {} go {} java {}.{} multiple {}",
            file.name(),
            options.go_package(),
            options.java_package(),
            options.java_outer_classname(),
            options.java_multiple_files(),
        ));
    }
    lines
}

fn list_message(lines: &mut BTreeSet<String>, scope: &str, message: &DescriptorProto) {
    let name = format!("{scope}.{}", message.name());
    lines.insert(format!("message {name}"));
    for field in &message.field {
        let kind = match field.r#type() {
            Type::Message | Type::Enum => field.type_name().trim_start_matches('.').to_owned(),
            scalar => scalar
                .as_str_name()
                .trim_start_matches("TYPE_")
                .to_lowercase(),
        };
        let label = match (field.label(), field.proto3_optional()) {
            (Label::Repeated, _) => "repeated ",
            (_, true) => "optional ",
            _ => "",
        };
        // A synthetic oneof stands behind each `optional`; it is no part of the contract.
        let oneof = match field.oneof_index {
            Some(at) if !field.proto3_optional() => {
                format!(" in {}", message.oneof_decl[at as usize].name())
            }
            _ => String::new(),
        };
        lines.insert(format!(
            "field {name}.{} = {} {label}{kind}{oneof}",
            field.name(),
            field.number()
        ));
    }
    for nested in &message.nested_type {
        list_message(lines, &name, nested);
    }
    for item in &message.enum_type {
        list_enum(lines, &name, item);
    }
}

fn list_enum(lines: &mut BTreeSet<String>, scope: &str, item: &EnumDescriptorProto) {
    for value in &item.value {
        lines.insert(format!(
            "enum {scope}.{}.{} = {}",
            item.name(),
            value.name(),
            value.number()
        ));
    }
}

fn list_service(lines: &mut BTreeSet<String>, scope: &str, service: &ServiceDescriptorProto) {
    let stream = |yes: bool| if yes { "stream " } else { "" };
    for method in &service.method {
        lines.insert(format!(
            "rpc {scope}.{}/{} ({}{}) returns ({}{})",
            service.name(),
            method.name(),
            stream(method.client_streaming()),
            method.input_type().trim_start_matches('.'),
            stream(method.server_streaming()),
            method.output_type().trim_start_matches('.'),
        ));
    }
}

fn current() -> FileDescriptorSet {
    FileDescriptorSet::decode(espalier_proto::FILE_DESCRIPTOR_SET).unwrap()
}

/// What is gone, then what is new.
fn difference(golden: &BTreeSet<String>, now: &BTreeSet<String>) -> (Vec<String>, Vec<String>) {
    (
        golden.difference(now).cloned().collect(),
        now.difference(golden).cloned().collect(),
    )
}

#[test]
fn contract_only_grows() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(GOLDEN);
    let golden: BTreeSet<String> = fs::read_to_string(&path)
        .unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect();
    let now = listing(&current());
    let (gone, new) = difference(&golden, &now);
    if std::env::var_os(UPDATE).is_some() {
        let mut text = now.into_iter().collect::<Vec<_>>().join("\n");
        text.push('\n');
        fs::write(&path, text).unwrap();
        return;
    }
    assert!(
        gone.is_empty(),
        "breaking change of espalier.v1: clients that are out there know\n  {}\n\
         Keep it, or (before a release only) write the golden anew with {UPDATE}=1 cargo test -p espalier-proto",
        gone.join("\n  ")
    );
    assert!(
        new.is_empty(),
        "espalier.v1 has grown by\n  {}\n\
         Accept it with {UPDATE}=1 cargo test -p espalier-proto and commit {GOLDEN}",
        new.join("\n  ")
    );
}

#[test]
fn every_kind_of_break_is_seen() {
    type Change = fn(&mut FileDescriptorSet);
    fn file<'a>(set: &'a mut FileDescriptorSet, name: &str) -> &'a mut FileDescriptorProto {
        let name = format!("espalier/v1/{name}.proto");
        set.file.iter_mut().find(|f| f.name() == name).unwrap()
    }
    let golden = listing(&current());
    let breaks: [(&str, Change); 6] = [
        ("renumbered", |set| {
            file(set, "types").message_type[0].field[0].number = Some(77);
        }),
        ("retyped", |set| {
            let kind = Type::Bytes as i32;
            file(set, "types").message_type[0].field[1].r#type = Some(kind);
        }),
        ("optional lost", |set| {
            let sampling = file(set, "types")
                .message_type
                .iter_mut()
                .find(|m| m.name() == "SamplingParams")
                .unwrap();
            sampling.field[0].proto3_optional = Some(false);
            sampling.field[0].oneof_index = None;
        }),
        ("message removed", |set| {
            file(set, "model").message_type.pop();
        }),
        ("enum value removed", |set| {
            file(set, "types").enum_type[0].value.pop();
        }),
        ("streaming changed", |set| {
            let service = &mut file(set, "inference").service[0];
            service.method[1].server_streaming = Some(false);
        }),
    ];
    for (what, change) in breaks {
        let mut set = current();
        change(&mut set);
        let (gone, _) = difference(&golden, &listing(&set));
        assert!(!gone.is_empty(), "{what} was not seen");
    }
    let mut set = current();
    let message = &mut file(&mut set, "model").message_type[0];
    let mut field = message.field[0].clone();
    field.name = Some("added".to_owned());
    field.number = Some(99);
    message.field.push(field);
    let (gone, new) = difference(&golden, &listing(&set));
    assert!(gone.is_empty() && new.len() == 1, "{gone:?} {new:?}");
}

#[test]
fn enums_begin_with_unspecified_and_carry_their_prefix() {
    for file in current()
        .file
        .iter()
        .filter(|f| f.package() == "espalier.v1")
    {
        for item in &file.enum_type {
            let mut prefix = String::new();
            for letter in item.name().chars() {
                if letter.is_uppercase() && !prefix.is_empty() {
                    prefix.push('_');
                }
                prefix.extend(letter.to_uppercase());
            }
            assert_eq!(item.value[0].name(), format!("{prefix}_UNSPECIFIED"));
            assert_eq!(item.value[0].number(), 0);
            for value in &item.value {
                assert!(value.name().starts_with(&prefix), "{}", value.name());
            }
        }
    }
}

#[test]
fn every_item_of_the_protos_is_commented() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("espalier/v1");
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let mut previous = "";
        for (at, line) in text.lines().enumerate() {
            let code = line.trim();
            let declares = ["message ", "enum ", "service ", "rpc ", "oneof "]
                .iter()
                .any(|word| code.starts_with(word))
                || (line.starts_with("  ") && code.contains(" = ") && code.ends_with(';'));
            assert!(
                !declares || previous.trim().starts_with("//"),
                "{}:{}: no comment above: {code}",
                path.display(),
                at + 1
            );
            previous = line;
        }
    }
}
