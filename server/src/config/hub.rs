//! Where models of the Hugging Face hub come from and are kept: the variables that every tool of that house reads, with
//! their meanings. They are no settings of ours, so they stand in no table. This file must not know what a model is.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::setting::Secret;

/// The hub's own public address.
const ENDPOINT: &str = "https://huggingface.co";

/// The hub as the environment describes it.
#[derive(Debug, Clone)]
pub struct Hub {
    /// `HF_HUB_CACHE`, else `HF_HOME/hub`, else `~/.cache/huggingface/hub` (under `XDG_CACHE_HOME` when that is set).
    pub cache: PathBuf,
    /// `HF_HUB_OFFLINE`: never ask the hub.
    pub offline: bool,
    /// `HF_TOKEN`, else what stands in `HF_TOKEN_PATH`, else in `HF_HOME/token`.
    pub token: Secret,
    /// `HF_ENDPOINT`.
    pub endpoint: String,
}

impl Hub {
    pub(super) fn from_environment(env: &BTreeMap<String, String>) -> Hub {
        let get = |name: &str| env.get(name).filter(|value| !value.is_empty());
        let caches = get("XDG_CACHE_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let home = get("HOME").map_or(PathBuf::from("."), PathBuf::from);
            home.join(".cache")
        });
        let home = get("HF_HOME").map_or_else(|| caches.join("huggingface"), PathBuf::from);
        let token_path = get("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let stored = || std::fs::read_to_string(token_path).ok();
        let token = get("HF_TOKEN").cloned().or_else(stored);
        let on = |value: &String| {
            ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str())
        };
        Hub {
            cache: get("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            offline: get("HF_HUB_OFFLINE").is_some_and(on),
            token: Secret::new(token.unwrap_or_default().trim()),
            endpoint: get("HF_ENDPOINT")
                .map_or(ENDPOINT, String::as_str)
                .trim_end_matches('/')
                .to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(pairs: &[(&str, &str)]) -> Hub {
        let pairs = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        Hub::from_environment(&pairs.collect())
    }

    #[test]
    fn the_nearest_variable_wins() {
        let cache = |pairs: &[(&str, &str)]| hub(pairs).cache.display().to_string();
        assert_eq!(cache(&[("HOME", "/h")]), "/h/.cache/huggingface/hub");
        let xdg = [("HOME", "/h"), ("XDG_CACHE_HOME", "/x")];
        assert_eq!(cache(&xdg), "/x/huggingface/hub");
        let home = [("HOME", "/h"), ("HF_HOME", "/f")];
        assert_eq!(cache(&home), "/f/hub");
        let own = [("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")];
        assert_eq!(cache(&own), "/c");
        assert_eq!(hub(&[]).endpoint, ENDPOINT);
        assert_eq!(hub(&[("HF_ENDPOINT", "http://m/")]).endpoint, "http://m");
        assert!(hub(&[("HF_HUB_OFFLINE", "1")]).offline);
        assert!(!hub(&[("HF_HUB_OFFLINE", "0")]).offline);
        let token = hub(&[("HF_TOKEN", "hf_secret")]);
        assert_eq!(token.token.reveal(), Some("hf_secret"));
        assert!(!format!("{token:?}").contains("hf_secret"));
    }
}
