//! Processor time of a process by thread name, from Linux's `/proc`: what the engine's threads spent and what everything
//! around them did. The kernel counts in ticks of 10 ms, so measure seconds, not milliseconds.

use std::collections::BTreeMap;

use crate::Fallible;

/// Ticks in a second, as Linux shows times to programs on every platform.
const TICKS: f64 = 100.0;

/// Threads whose work is the model's: its loop, the pool of operations, loading of adapters, training.
const ENGINE: [&str; 4] = ["engine", "espalier-ops-", "adapter-loader", "trainer-"];

/// Seconds by thread name; threads of one name are added up.
#[derive(Clone, Debug, Default)]
pub struct ProcessorTime(pub BTreeMap<String, f64>);

// === impl ProcessorTime ===

impl ProcessorTime {
    /// What the living threads of a process have spent so far.
    ///
    /// # Errors
    /// No such process, or no Linux.
    pub fn of(process: u32) -> Fallible<Self> {
        let mut times = BTreeMap::new();
        for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
            let path = thread?.path().join("stat");
            // A thread may end while the list is read.
            let Ok(line) = std::fs::read_to_string(&path) else {
                continue;
            };
            let (name, seconds) = parse(&line).ok_or_else(|| format!("cannot read {path:?}"))?;
            *times.entry(name).or_default() += seconds;
        }
        Ok(ProcessorTime(times))
    }

    /// Spent since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let spent = self.0.iter().map(|(name, seconds)| {
            let earlier = before.0.get(name).copied().unwrap_or(0.0);
            (name.clone(), (seconds - earlier).max(0.0))
        });
        ProcessorTime(spent.filter(|(_, seconds)| *seconds > 0.0).collect())
    }

    /// Adds another stretch.
    pub fn add(&mut self, other: &Self) {
        for (name, seconds) in &other.0 {
            *self.0.entry(name.clone()).or_default() += seconds;
        }
    }

    /// All threads.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.0.values().sum()
    }

    /// The threads that compute.
    #[must_use]
    pub fn engine(&self) -> f64 {
        let computes = |name: &str| ENGINE.iter().any(|prefix| name.starts_with(prefix));
        self.0
            .iter()
            .filter(|(name, _)| computes(name))
            .map(|(_, seconds)| seconds)
            .sum()
    }

    /// Everything else.
    #[must_use]
    pub fn shell(&self) -> f64 {
        self.total() - self.engine()
    }
}

impl std::fmt::Display for ProcessorTime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let each: Vec<String> = self
            .0
            .iter()
            .map(|(name, seconds)| format!("{name} {seconds:.2} s"))
            .collect();
        f.write_str(&each.join(", "))
    }
}

/// Name and seconds of a `stat` line. The name stands in parentheses and may hold any character, parentheses too.
fn parse(line: &str) -> Option<(String, f64)> {
    let (open, close) = (line.find('(')?, line.rfind(')')?);
    let mut rest = line.get(close + 1..)?.split_whitespace();
    // Fields 14 and 15 of the line; the state, field 3, is the first after the name.
    let user: f64 = rest.nth(11)?.parse().ok()?;
    let system: f64 = rest.next()?.parse().ok()?;
    Some((line[open + 1..close].to_owned(), (user + system) / TICKS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_may_hold_anything() {
        let line = "7 (a) (b 1) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0";
        assert_eq!(parse(line), Some(("a) (b 1".to_owned(), 2.0)));
    }

    #[test]
    fn only_named_threads_are_the_engine() {
        let time = |pairs: &[(&str, f64)]| {
            ProcessorTime(pairs.iter().map(|(n, s)| ((*n).to_owned(), *s)).collect())
        };
        let before = time(&[("engine", 1.0), ("shell", 0.5)]);
        let after = time(&[("engine", 2.0), ("espalier-ops-1", 3.0), ("shell", 0.75)]);
        let spent = after.since(&before);
        assert_eq!((spent.engine(), spent.shell()), (4.0, 0.25));
    }
}
