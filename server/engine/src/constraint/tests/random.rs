//! Random regexes and schemas whose texts end, and a validator of the schemas' part of the language.

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

/// A pattern in the part of the language that the regex crate and the grammar's share.
pub(crate) fn regex(rng: &mut ChaCha8Rng) -> String {
    fn part(rng: &mut ChaCha8Rng, depth: usize) -> String {
        let atoms = [
            "a", "b", "7", "-", "é", r"\.", r"\d", "[a-f0-9]", "[^x\\n]", "and", r"\w", "\"", "/",
        ];
        if depth == 0 {
            return (*atoms.choose(rng).unwrap()).to_owned();
        }
        let inner = part(rng, depth - 1);
        match rng.random_range(0..5) {
            0 => format!("{inner}{}", part(rng, depth - 1)),
            1 => format!("(?:{inner}|{})", part(rng, depth - 1)),
            2 => format!("(?:{inner})?"),
            3 => format!("(?:{inner}){{1,3}}"),
            _ => format!("({inner}){{2}}{}", part(rng, 0)),
        }
    }
    let depth = rng.random_range(1..5);
    part(rng, depth)
}

/// A schema of `depth` levels.
pub(crate) fn schema(rng: &mut ChaCha8Rng, depth: usize) -> Value {
    let kinds = if depth == 0 { 6 } else { 9 };
    match rng.random_range(0..kinds) {
        0 => json!({"type": "boolean"}),
        1 => json!({"type": "null"}),
        2 => {
            let low = rng.random_range(-50..50);
            json!({"type": "integer", "minimum": low, "maximum": low + rng.random_range(0..300)})
        }
        3 => {
            let low = rng.random_range(0..4);
            json!({"type": "string", "minLength": low, "maxLength": low + rng.random_range(0..6)})
        }
        4 => json!({"enum": ["red", "gr\"een", 7, null, {"a": [1, "é"]}]}),
        5 => json!({"type": "string", "pattern": "^[A-Z]{2}-\\d{1,4}$"}),
        6 => {
            let low = rng.random_range(0..3);
            json!({"type": "array", "items": schema(rng, depth - 1), "minItems": low, "maxItems": low + rng.random_range(0..3)})
        }
        7 => json!({"anyOf": [schema(rng, depth - 1), schema(rng, depth - 1)]}),
        _ => {
            let names = ["name", "the age", "é", "x\"y", "tags"];
            let count = rng.random_range(1..=names.len());
            let mut properties = Map::new();
            let mut required = Vec::new();
            for name in &names[..count] {
                properties.insert((*name).to_owned(), schema(rng, depth - 1));
                if rng.random() {
                    required.push(*name);
                }
            }
            json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
        }
    }
}

/// JSON Schema's rules for the keywords that [`schema`] uses.
pub(crate) fn satisfies(value: &Value, schema: &Value) -> bool {
    if let Some(options) = schema["anyOf"].as_array() {
        return options.iter().any(|option| satisfies(value, option));
    }
    if let Some(values) = schema["enum"].as_array() {
        return values.contains(value);
    }
    let size = |key: &str| schema[key].as_u64().map(|size| size as usize);
    let within = |found: usize, low: &str, high: &str| {
        size(low).is_none_or(|low| found >= low) && size(high).is_none_or(|high| found <= high)
    };
    match schema["type"].as_str().unwrap() {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        // `-0` is an integer to JSON Schema and no i64 to serde_json.
        "integer" => value.as_f64().is_some_and(|found| {
            found.fract() == 0.0
                && schema["minimum"].as_f64().is_none_or(|low| found >= low)
                && schema["maximum"].as_f64().is_none_or(|high| found <= high)
        }),
        "string" => value.as_str().is_some_and(|found| {
            let pattern = schema["pattern"].as_str();
            within(found.chars().count(), "minLength", "maxLength")
                && pattern.is_none_or(|pattern| regex::Regex::new(pattern).unwrap().is_match(found))
        }),
        "array" => value.as_array().is_some_and(|found| {
            within(found.len(), "minItems", "maxItems")
                && found.iter().all(|item| satisfies(item, &schema["items"]))
        }),
        "object" => value.as_object().is_some_and(|found| {
            let required = schema["required"].as_array().unwrap();
            let properties = schema["properties"].as_object().unwrap();
            required
                .iter()
                .all(|name| found.contains_key(name.as_str().unwrap()))
                && found.iter().all(|(name, item)| {
                    properties.get(name).is_some_and(|own| satisfies(item, own))
                })
        }),
        other => panic!("{other}"),
    }
}

#[test]
fn the_validator_can_say_no() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer", "maximum": 3}}, "required": ["a"]});
    for (value, expected) in [
        (json!({"a": 3}), true),
        (json!({"a": 4}), false),
        (json!({}), false),
        (json!({"a": 1, "b": 2}), false),
        (json!([]), false),
    ] {
        assert_eq!(satisfies(&value, &schema), expected, "{value}");
    }
}
