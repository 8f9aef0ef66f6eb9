//! Which modules a configuration adapts, with what rank and scale: PEFT's matching rules, applied to every site of a base.
//!
//! Source: `check_target_module_exists` and `get_pattern_key` of PEFT 0.21. Patterns are untrusted. They run on an
//! engine without backtracking, and each is compiled, applied to all sites and dropped, so that memory is bounded by one
//! pattern. This file must not know files or tensors.

use std::collections::BTreeMap;

use regex::bytes::{Regex, RegexBuilder};

use super::{Ia3Config, LoraConfig, Modules, ScaleOn, Site};
use crate::error::AdapterError;

/// Bytes that one compiled pattern may take, and again its lazily built automaton.
const COMPILED_BYTES: usize = 256 << 10;

/// Bytes of the longest pattern that is compiled.
pub const MAX_PATTERN_BYTES: usize = 1024;

/// What the configuration says about one adapted site.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SitePlan {
    /// Rank.
    pub r: usize,
    /// Alpha.
    pub alpha: f64,
    /// The factor on B A x.
    pub scale: f32,
}

impl LoraConfig {
    /// Every site that this configuration adapts in a base of so many layers.
    ///
    /// # Errors
    /// Every pattern that cannot be compiled.
    pub fn plan(
        &self,
        layers: usize,
    ) -> Result<BTreeMap<(usize, Site), SitePlan>, Vec<AdapterError>> {
        let mut errors = Vec::new();
        let sites: Vec<(usize, Site)> = (0..layers)
            .flat_map(|layer| Site::ALL.map(|site| (layer, site)))
            .collect();
        let paths: Vec<String> = sites
            .iter()
            .map(|(layer, site)| site.path(*layer))
            .collect();

        let mut targeted = self.targeted(&paths, &mut errors);
        if let Some(modules) = &self.exclude_modules {
            let excluded = matching(modules, "exclude_modules", &paths, &mut errors);
            targeted
                .iter_mut()
                .zip(&excluded)
                .for_each(|(t, e)| *t &= !e.hit);
        }
        let ranks = first_hits(&self.rank_pattern, "rank_pattern", &paths, &mut errors);
        let alphas = first_hits(&self.alpha_pattern, "alpha_pattern", &paths, &mut errors);
        if !errors.is_empty() {
            return Err(errors);
        }
        let plans = (0..sites.len()).filter(|i| targeted[*i]).map(|i| {
            let r = ranks[i].copied().unwrap_or(self.r);
            let alpha = alphas[i].copied().unwrap_or(self.lora_alpha);
            let scale = self.scaling(r, alpha);
            (sites[i], SitePlan { r, alpha, scale })
        });
        Ok(plans.collect())
    }

    /// Targets before exclusion, with the rule on layers. PEFT applies that rule only to modules matched by suffix.
    fn targeted(&self, paths: &[String], errors: &mut Vec<AdapterError>) -> Vec<bool> {
        let found = matching(&self.target_modules, "target_modules", paths, errors);
        let Some(layers) = self.layers_to_transform.as_ref().filter(|l| !l.is_empty()) else {
            return found.iter().map(|m| m.hit).collect();
        };
        let numbers = self.layer_numbers(paths, errors);
        let pairs = found.iter().zip(numbers);
        pairs
            .map(|(m, number)| m.exact || m.hit && number.is_some_and(|n| layers.contains(&n)))
            .collect()
    }

    /// The layer number of each path as `layers_pattern` finds it; without a pattern, the first number in the path.
    fn layer_numbers(
        &self,
        paths: &[String],
        errors: &mut Vec<AdapterError>,
    ) -> Vec<Option<usize>> {
        let any = vec![r"[^.]*".to_owned()];
        let patterns = self
            .layers_pattern
            .as_ref()
            .filter(|p| !p.is_empty())
            .unwrap_or(&any);
        let mut numbers = vec![None; paths.len()];
        let mut decided = vec![false; paths.len()];
        for pattern in patterns {
            let whole = format!(r"\A(?:^|.*?\.){pattern}\.(?P<idx>[0-9]+)\.");
            let Some(regex) = compile("layers_pattern", pattern, &whole, errors) else {
                continue;
            };
            for (i, path) in paths
                .iter()
                .enumerate()
                .filter(|(i, _)| !decided[*i])
                .collect::<Vec<_>>()
            {
                // The first pattern that matches decides, even when it captured no number, as in PEFT.
                let Some(found) = regex.captures(path.as_bytes()) else {
                    continue;
                };
                decided[i] = true;
                let digits = found
                    .name("idx")
                    .and_then(|m| std::str::from_utf8(m.as_bytes()).ok());
                numbers[i] = digits.and_then(|d| d.parse().ok());
            }
        }
        numbers
    }
}

impl Ia3Config {
    /// Every site that this configuration scales in a base of so many layers, and on which side.
    ///
    /// # Errors
    /// Every pattern that cannot be compiled.
    pub fn plan(
        &self,
        layers: usize,
    ) -> Result<BTreeMap<(usize, Site), ScaleOn>, Vec<AdapterError>> {
        let mut errors = Vec::new();
        let sites: Vec<(usize, Site)> = (0..layers)
            .flat_map(|layer| Site::ALL.map(|site| (layer, site)))
            .collect();
        let paths: Vec<String> = sites
            .iter()
            .map(|(layer, site)| site.path(*layer))
            .collect();
        let targets = matching(&self.target_modules, "target_modules", &paths, &mut errors);
        let excluded = self.exclude_modules.as_ref().map(|modules| {
            let field = "exclude_modules";
            matching(modules, field, &paths, &mut errors)
        });
        let inputs = feedforward(&self.feedforward_modules, &paths, &mut errors);
        if !errors.is_empty() {
            return Err(errors);
        }
        let taken = |i: usize| targets[i].hit && !excluded.as_ref().is_some_and(|e| e[i].hit);
        let plan = (0..sites.len()).filter(|i| taken(*i)).map(|i| {
            let on = if inputs[i] {
                ScaleOn::Inputs
            } else {
                ScaleOn::Outputs
            };
            (sites[i], on)
        });
        Ok(plan.collect())
    }
}

/// Which modules are feedforward. Source: `_check_target_module_feedforward`, which asks for the end of a path, at a dot or not.
fn feedforward(modules: &Modules, paths: &[String], errors: &mut Vec<AdapterError>) -> Vec<bool> {
    match modules {
        Modules::List(names) => {
            let ends = |path: &String| names.iter().any(|name| path.ends_with(name.as_str()));
            paths.iter().map(ends).collect()
        }
        other => {
            let found = matching(other, "feedforward_modules", paths, errors);
            found.iter().map(|found| found.hit).collect()
        }
    }
}

/// How one module was matched.
#[derive(Clone, Copy, Default)]
struct Match {
    hit: bool,
    /// By its whole path in a list.
    exact: bool,
}

fn matching(
    modules: &Modules,
    field: &'static str,
    paths: &[String],
    errors: &mut Vec<AdapterError>,
) -> Vec<Match> {
    let all = |hit| vec![Match { hit, exact: false }; paths.len()];
    match modules {
        Modules::Nothing => all(false),
        Modules::AllLinear => all(true),
        Modules::Pattern(pattern) => {
            let whole = format!(r"\A(?:{pattern})\z");
            let regex = compile(field, pattern, &whole, errors);
            let hit = |path: &String| regex.as_ref().is_some_and(|r| r.is_match(path.as_bytes()));
            let matched = paths.iter().map(|p| Match {
                hit: hit(p),
                exact: false,
            });
            matched.collect()
        }
        Modules::List(names) => {
            let matched = paths.iter().map(|path| {
                let exact = names.contains(path);
                Match {
                    hit: exact || names.iter().any(|n| is_suffix(path, n)),
                    exact,
                }
            });
            matched.collect()
        }
    }
}

/// Whether `path` ends with `.` and `name`.
fn is_suffix(path: &str, name: &str) -> bool {
    path.strip_suffix(name)
        .is_some_and(|head| head.ends_with('.'))
}

/// For each path the value of the first pattern that matches its end at a module boundary.
fn first_hits<'a, T>(
    table: &'a [(String, T)],
    field: &'static str,
    paths: &[String],
    errors: &mut Vec<AdapterError>,
) -> Vec<Option<&'a T>> {
    let mut hits = vec![None; paths.len()];
    for (pattern, value) in table {
        let whole = format!(r"\A(?:.*\.)?(?:{pattern})\z");
        let Some(regex) = compile(field, pattern, &whole, errors) else {
            continue;
        };
        for (hit, path) in hits.iter_mut().zip(paths) {
            if hit.is_none() && regex.is_match(path.as_bytes()) {
                *hit = Some(value);
            }
        }
    }
    hits
}

/// Compiles `whole`, PEFT's wrapping of a user's pattern. Paths are ASCII, so ASCII classes decide the same as Python's.
fn compile(
    field: &'static str,
    pattern: &str,
    whole: &str,
    errors: &mut Vec<AdapterError>,
) -> Option<Regex> {
    let reason = if pattern.len() > MAX_PATTERN_BYTES {
        format!("has {} bytes, limit {MAX_PATTERN_BYTES}", pattern.len())
    } else {
        let built = RegexBuilder::new(whole)
            .unicode(false)
            .size_limit(COMPILED_BYTES)
            .dfa_size_limit(COMPILED_BYTES)
            .nest_limit(64)
            .build();
        match built {
            Ok(regex) => return Some(regex),
            Err(regex::Error::CompiledTooBig(limit)) => {
                format!("is too large when compiled, limit {limit} bytes")
            }
            Err(_) => {
                "cannot be compiled (look-around and back-references are not supported)".into()
            }
        }
    };
    let pattern = pattern.chars().take(80).collect();
    errors.push(AdapterError::Pattern {
        field,
        pattern,
        reason,
    });
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn list(names: &[&str]) -> Modules {
        Modules::List(names.iter().map(|n| (*n).to_owned()).collect())
    }

    fn config(target_modules: Modules) -> LoraConfig {
        LoraConfig {
            target_modules,
            ..LoraConfig::new(4, 6.0, &[])
        }
    }

    fn sites(config: &LoraConfig, layers: usize) -> Vec<(usize, Site)> {
        config.plan(layers).unwrap().into_keys().collect()
    }

    #[test]
    fn a_list_matches_whole_paths_and_suffixes_at_a_dot() {
        let c = config(list(&[
            "q_proj",
            "mlp.up_proj",
            "model.layers.1.self_attn.k_proj",
            "roj",
            "proj",
        ]));
        let want = [
            (0, Site::Q),
            (0, Site::Up),
            (1, Site::Q),
            (1, Site::K),
            (1, Site::Up),
        ];
        assert_eq!(sites(&c, 2), want);
    }

    #[test]
    fn a_string_must_match_the_whole_path() {
        let c = config(Modules::Pattern(
            r"model\.layers\.(0|11)\..*\.(q_proj|down_proj)".into(),
        ));
        let want = [
            (0, Site::Q),
            (0, Site::Down),
            (11, Site::Q),
            (11, Site::Down),
        ];
        assert_eq!(sites(&c, 12), want);
        assert!(sites(&config(Modules::Pattern("q_proj".into())), 2).is_empty());
        // An alternation may not escape the anchors.
        assert!(sites(&config(Modules::Pattern("model|q_proj".into())), 2).is_empty());
    }

    #[test]
    fn exclusion_wins_over_targets() {
        let mut c = config(Modules::AllLinear);
        c.exclude_modules = Some(list(&["mlp.gate_proj", "model.layers.0.self_attn.q_proj"]));
        let found = sites(&c, 2);
        assert_eq!(found.len(), 11);
        assert!(found.contains(&(1, Site::Q)) && !found.contains(&(0, Site::Q)));
        c.exclude_modules = Some(Modules::Pattern(r".*\.mlp\..*".into()));
        assert_eq!(sites(&c, 2).len(), 8);
    }

    #[test]
    fn layers_restrict_suffix_matches_but_not_whole_paths() {
        let mut c = config(list(&["v_proj", "model.layers.0.self_attn.o_proj"]));
        c.layers_to_transform = Some(vec![2, 10]);
        assert_eq!(sites(&c, 12), [(0, Site::O), (2, Site::V), (10, Site::V)]);
        c.layers_pattern = Some(vec!["h".into(), "layers".into()]);
        assert_eq!(sites(&c, 12), [(0, Site::O), (2, Site::V), (10, Site::V)]);
        c.layers_pattern = Some(vec!["h".into()]);
        assert_eq!(sites(&c, 12), [(0, Site::O)]);
        c.layers_to_transform = Some(vec![]);
        assert_eq!(sites(&c, 2).len(), 3);
    }

    #[test]
    fn the_first_pattern_in_file_order_decides_rank_and_alpha() {
        let mut c = config(Modules::AllLinear);
        c.rank_pattern = vec![
            (r"layers\.(0|2)\.self_attn\.q_proj".into(), 7),
            ("q_proj".into(), 3),
            (r".*\.q_proj".into(), 5),
        ];
        c.alpha_pattern = vec![("up_proj".into(), 9.0), ("proj".into(), 100.0)];
        let plan = c.plan(3).unwrap();
        assert_eq!([0, 1, 2].map(|l| plan[&(l, Site::Q)].r), [7, 3, 7]);
        assert_eq!(plan[&(0, Site::K)].r, 4);
        assert_eq!(plan[&(1, Site::Up)].alpha, 9.0);
        assert_eq!(plan[&(1, Site::K)].alpha, 6.0, "'proj' is no module name");
        assert_eq!(plan[&(0, Site::Q)].scale, (6.0_f64 / 7.0) as f32);
        c.use_rslora = true;
        assert_eq!(
            c.plan(3).unwrap()[&(0, Site::Q)].scale,
            (6.0 / 7.0_f64.sqrt()) as f32
        );
    }

    #[test]
    fn every_bad_pattern_is_named() {
        let mut c = config(Modules::Pattern("(?=x)".into()));
        c.exclude_modules = Some(Modules::Pattern("(".into()));
        c.rank_pattern = vec![("x{1000}{1000}".into(), 1), ("a".repeat(2000), 1)];
        c.alpha_pattern = vec![(r"(a)\1".into(), 1.0)];
        let errors = c.plan(1).unwrap_err();
        let text: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(text.len(), 5, "{text:#?}");
        assert!(text.iter().any(|t| t.contains("2000 bytes, limit 1024")));
        assert!(text.iter().any(|t| t.contains("too large when compiled")));
    }

    #[test]
    fn a_pattern_built_to_explode_stays_linear() {
        let c = config(Modules::Pattern(format!("{}$", "(.*a)".repeat(12))));
        assert!(c.plan(64).is_ok());
    }
}
