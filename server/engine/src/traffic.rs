//! Who the traffic is for, and whether a merged copy would pay: decayed counters of computed rows and of steps, and a rule
//! over them. No tensors, no threads, no clock of its own, so that it is tested by hand-made traffic.
//!
//! A step reads its weights once, whatever it computes, and at few rows a step that is all it costs. A version with a
//! merged copy saves its own bytes in steps that it has to itself; in steps that it shares, the copy is read *beside* the
//! base. So a copy pays when `alone (replaced + adapter - merged) > shared (merged - adapter)`, with `alone` and `shared`
//! the counts of such steps. On a quantised base the copy is larger than what it replaces and the adapter together, and
//! the rule never says yes.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use espalier_adapters::linear::OverlayBytes;
use espalier_adapters::profile::MergePolicy;
use espalier_adapters::version::VersionDigest;

/// Steps (decayed) that must have been seen before anything is judged by them.
const EVIDENCE: f64 = 32.0;

/// Counters are decayed this often, not at every step.
const TICK: Duration = Duration::from_millis(50);

/// A version of fewer rows is forgotten.
const FORGOTTEN: f64 = 0.01;

/// Decayed counts of one version.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    rows: f64,
    alone: f64,
    shared: f64,
}

/// What a version has in memory, and what its owner wants.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) policy: MergePolicy,
    pub(crate) adapter_bytes: usize,
    pub(crate) copy: OverlayBytes,
}

/// Decayed counters of all traffic.
#[derive(Debug)]
pub(crate) struct Traffic {
    half_life: Duration,
    /// Share of all rows from which a version dominates.
    share: f64,
    versions: HashMap<VersionDigest, Counts>,
    rows: f64,
    steps: f64,
    last: Option<Instant>,
}

impl Traffic {
    pub(crate) fn new(half_life: Duration, share: f64) -> Self {
        Traffic {
            half_life,
            share,
            versions: HashMap::new(),
            rows: 0.0,
            steps: 0.0,
            last: None,
        }
    }

    /// Books a step: the rows of each version (each once) and of the base model.
    pub(crate) fn step(
        &mut self,
        versions: &[(VersionDigest, usize)],
        base_rows: usize,
        now: Instant,
    ) {
        self.decay(now);
        let rows: usize = versions.iter().map(|(_, rows)| rows).sum::<usize>() + base_rows;
        self.rows += rows as f64;
        self.steps += 1.0;
        let alone = versions.len() == 1 && base_rows == 0;
        for (digest, rows) in versions {
            let counts = self.versions.entry(*digest).or_default();
            counts.rows += *rows as f64;
            if alone {
                counts.alone += 1.0;
            } else {
                counts.shared += 1.0;
            }
        }
    }

    fn decay(&mut self, now: Instant) {
        let last = *self.last.get_or_insert(now);
        let passed = now.saturating_duration_since(last);
        if passed < TICK {
            return;
        }
        self.last = Some(now);
        let kept = 0.5_f64.powf(passed.as_secs_f64() / self.half_life.as_secs_f64());
        self.rows *= kept;
        self.steps *= kept;
        self.versions.retain(|_, counts| {
            counts.rows *= kept;
            counts.alone *= kept;
            counts.shared *= kept;
            counts.rows > FORGOTTEN
        });
    }

    /// The version's part of all rows.
    pub(crate) fn share_of(&self, digest: &VersionDigest) -> f64 {
        let rows = self.versions.get(digest).map_or(0.0, |counts| counts.rows);
        if self.rows > 0.0 {
            rows / self.rows
        } else {
            0.0
        }
    }

    /// Versions seen lately, those with most rows first.
    pub(crate) fn busiest(&self) -> Vec<VersionDigest> {
        let mut versions: Vec<_> = self.versions.iter().collect();
        versions.sort_by(|a, b| b.1.rows.total_cmp(&a.1.rows).then(a.0.cmp(b.0)));
        versions.into_iter().map(|(digest, _)| *digest).collect()
    }

    /// Whether a copy should be made.
    pub(crate) fn promotes(&self, digest: &VersionDigest, candidate: &Candidate) -> bool {
        match candidate.policy {
            MergePolicy::Merged => self.versions.contains_key(digest),
            MergePolicy::Unmerged => false,
            MergePolicy::Auto => {
                self.steps >= EVIDENCE
                    && self.share_of(digest) >= self.share
                    && self.saving(digest, candidate) > 0.0
            }
        }
    }

    /// Whether a copy that is there should be given up. What is wanted MERGED stays until its room is needed.
    pub(crate) fn demotes(&self, digest: &VersionDigest, candidate: &Candidate) -> bool {
        match candidate.policy {
            MergePolicy::Merged => false,
            MergePolicy::Unmerged => true,
            MergePolicy::Auto => {
                // Without any traffic nothing speaks for or against it.
                self.steps >= EVIDENCE
                    && (self.share_of(digest) < self.share / 2.0
                        || self.saving(digest, candidate) < 0.0)
            }
        }
    }

    /// Bytes that all counted steps would have read less with a copy.
    fn saving(&self, digest: &VersionDigest, candidate: &Candidate) -> f64 {
        let counts = self.versions.get(digest).copied().unwrap_or_default();
        let [adapter, merged, replaced] = [
            candidate.adapter_bytes,
            candidate.copy.merged,
            candidate.copy.replaced,
        ]
        .map(|bytes| bytes as f64);
        counts.alone * (replaced + adapter - merged) - counts.shared * (merged - adapter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: u8) -> VersionDigest {
        VersionDigest::from_bytes([n; 32])
    }

    fn candidate(policy: MergePolicy, replaced: usize) -> Candidate {
        Candidate {
            policy,
            adapter_bytes: 5,
            copy: OverlayBytes {
                merged: 100,
                replaced,
            },
        }
    }

    fn traffic() -> (Traffic, Instant) {
        (Traffic::new(Duration::from_secs(10), 0.5), Instant::now())
    }

    #[test]
    fn who_has_the_steps_to_itself_is_merged_and_demoted_when_traffic_moves() {
        let (mut traffic, start) = traffic();
        let f32_base = candidate(MergePolicy::Auto, 100);
        let at = |ms: u64| start + Duration::from_millis(ms);
        for step in 0..20 {
            traffic.step(&[(digest(1), 8)], 0, at(step * 10));
        }
        assert!(!traffic.promotes(&digest(1), &f32_base), "too little seen");
        for step in 20..100 {
            traffic.step(&[(digest(1), 8)], 0, at(step * 10));
        }
        assert!(traffic.promotes(&digest(1), &f32_base));
        assert!(!traffic.demotes(&digest(1), &f32_base));
        assert!(
            !traffic.promotes(&digest(1), &candidate(MergePolicy::Unmerged, 100)),
            "its owner does not want it"
        );
        assert_eq!(traffic.busiest(), [digest(1)]);
        // Another one takes over for three half-lives.
        for step in 0..3_000 {
            traffic.step(&[(digest(2), 8)], 0, at(1_000 + step * 10));
        }
        assert!(traffic.share_of(&digest(1)) < 0.2);
        assert!(traffic.demotes(&digest(1), &f32_base));
        assert!(traffic.promotes(&digest(2), &f32_base));
    }

    #[test]
    fn shared_steps_and_quantised_bases_do_not_pay() {
        let (mut traffic, start) = traffic();
        for step in 0..200_u64 {
            let now = start + Duration::from_millis(step);
            // In one step of ten a row of the base runs along.
            traffic.step(&[(digest(1), 8)], usize::from(step % 10 == 0), now);
        }
        assert!(traffic.share_of(&digest(1)) > 0.98);
        assert!(
            !traffic.promotes(&digest(1), &candidate(MergePolicy::Auto, 100)),
            "180 x 5 bytes saved, 20 x 95 lost"
        );
        let (mut traffic, start) = self::traffic();
        for _ in 0..200 {
            traffic.step(&[(digest(1), 8)], 0, start);
        }
        assert!(traffic.promotes(&digest(1), &candidate(MergePolicy::Auto, 100)));
        assert!(
            !traffic.promotes(&digest(1), &candidate(MergePolicy::Auto, 27)),
            "an 8-bit base: 27 + 5 bytes become 100"
        );
        assert!(traffic.promotes(&digest(1), &candidate(MergePolicy::Merged, 27)));
        assert!(!traffic.promotes(&digest(2), &candidate(MergePolicy::Merged, 27)));
    }
}
