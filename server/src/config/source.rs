//! Where values come from, still as text: a file, the environment, pairs. Misspelt names are faults here, because a limit
//! that is silently ignored is worse than none. This file must not know what a setting means.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::{ConfigError, SETTINGS, Setting, Source};
use crate::setting::Value;

/// The values as text, by setting, with their sources.
#[derive(Debug, Default)]
pub(super) struct Raw(pub(super) BTreeMap<&'static str, (String, Source)>);

// === impl Raw ===

impl Raw {
    pub(super) fn add_file(&mut self, text: &str, path: PathBuf) -> Result<(), ConfigError> {
        let table: toml::Table = text.parse().map_err(|error| {
            ConfigError::one(format!("{} is not TOML: {error}", path.display()))
        })?;
        let mut faults = Vec::new();
        for (key, value) in table {
            let Some(setting) = find(&key) else {
                faults.push(unknown(&key, &path.display().to_string()));
                continue;
            };
            let text = match value {
                toml::Value::String(text) => text,
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Float(number) => number.to_string(),
                toml::Value::Boolean(on) => on.to_string(),
                other => {
                    faults.push(format!(
                        "{key}: a {} in {}, expected one value",
                        other.type_str(),
                        path.display()
                    ));
                    continue;
                }
            };
            self.0
                .insert(setting.key, (text, Source::File(path.clone())));
        }
        if faults.is_empty() {
            Ok(())
        } else {
            Err(ConfigError { faults })
        }
    }

    /// Variables that look like ours and are not are errors: a misspelt limit must not be silently ignored.
    pub(super) fn add_environment(
        &mut self,
        env: &BTreeMap<String, String>,
    ) -> Result<(), ConfigError> {
        /// Read by the client and by the test harness; espalierd leaves them alone.
        const OTHERS: &[&str] = &[
            "CONFIG",
            "GOLDEN",
            "SERVER",
            "API_KEY",
            "TENANT",
            "MODEL_CACHE",
            "CACHE",
            "PYTHON",
            "DEADLINE",
            "TEST",
            "BENCH",
            "DEMO",
        ];
        let mut faults = Vec::new();
        for (name, value) in env {
            let Some(rest) = name.strip_prefix("ESPALIER_") else {
                continue;
            };
            match SETTINGS.iter().find(|setting| setting.variable() == *name) {
                Some(setting) => {
                    self.0.insert(
                        setting.key,
                        (value.clone(), Source::Environment(name.clone())),
                    );
                }
                None if OTHERS.iter().any(|other| rest.starts_with(other)) => {}
                None => faults.push(unknown(
                    &rest.to_lowercase(),
                    &format!("the environment ({name})"),
                )),
            }
        }
        if faults.is_empty() {
            Ok(())
        } else {
            Err(ConfigError { faults })
        }
    }

    /// One setting; a fault is noted and the default stands in, so that all faults are found in one go.
    pub(super) fn read<T: Value>(
        &self,
        key: &'static str,
        default: &str,
        range: Option<(&str, &str)>,
        faults: &mut Vec<String>,
    ) -> T {
        let (text, source) = match self.0.get(key) {
            Some((text, source)) => (text.as_str(), Some(source)),
            None => (default, None),
        };
        let from = source.map_or("the default".to_owned(), Source::to_string);
        match T::parse(text) {
            Ok(value) => {
                let bounds = range.map(|(min, max)| (T::parse(min), T::parse(max)));
                if let (Some((Ok(min), Ok(max))), Some((low, high))) = (bounds, range)
                    && !value.within(&min, &max)
                {
                    faults.push(format!("{key}: {text} (from {from}) is outside {low} to {high}; choose a value between"));
                }
                value
            }
            Err(expected) => {
                let shown = if T::SECRET { "a value" } else { text };
                faults.push(format!(
                    "{key}: \"{shown}\" (from {from}) is not {expected}"
                ));
                T::parse(default)
                    .unwrap_or_else(|_| unreachable!("defaults parse: a test reads every one"))
            }
        }
    }

    pub(super) fn sources(&self) -> BTreeMap<&'static str, Source> {
        self.0
            .iter()
            .map(|(key, (_, source))| (*key, source.clone()))
            .collect()
    }
}

pub(super) fn find(key: &str) -> Option<&'static Setting> {
    let key = key.replace('-', "_");
    SETTINGS.iter().find(|setting| setting.key == key)
}

pub(super) fn unknown(key: &str, place: &str) -> String {
    let near = SETTINGS
        .iter()
        .map(|setting| (distance(setting.key, key), setting.key))
        .min()
        .filter(|(distance, _)| *distance <= 3)
        .map_or(
            "espalierd config lists all settings".to_owned(),
            |(_, near)| format!("did you mean {near}?"),
        );
    format!("{key}: no such setting (in {place}); {near}")
}

/// Edit distance, for "did you mean".
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let up = row[j + 1];
            row[j + 1] = (diagonal + usize::from(x != *y))
                .min(up + 1)
                .min(row[j] + 1);
            diagonal = up;
        }
    }
    row[b.len()]
}
