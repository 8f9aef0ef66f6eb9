//! From logits to one token: bias, penalties, temperature, truncation, a seeded draw; and the log-probabilities asked for.
//!
//! candle-transformers' `LogitsProcessor` is the oracle of greedy and penalties in the tests, and not the path: it has no
//! min-p, no bias and no counts, copies each row into tensors, sorts the whole vocabulary, panics on NaN, and draws from
//! a generator whose sequence its crate may change. Here the same seed gives the same tokens on every machine.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

use rand::Rng;
use rand::SeedableRng;
use rand_chacha::ChaCha12Rng;

use crate::request::{SamplingParams, TokenLogprob};

/// A logit was NaN or infinite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NonFinite;

/// The state of one candidate's sampling.
pub(crate) struct Sampler {
    params: SamplingParams,
    rng: ChaCha12Rng,
    /// Tokens of the prompt; kept only when the repetition penalty needs them.
    prompt: HashSet<u32>,
    /// How often each token is in the output; kept only when a penalty needs it.
    counts: HashMap<u32, u32>,
    /// `(logit, token)` of those that may be drawn; kept to spare an allocation per token.
    candidates: Vec<(f32, u32)>,
}

// === impl Sampler ===

impl Sampler {
    /// The sampler of candidate `candidate`: every candidate has its own stream of the seed's generator, and the first
    /// one's does not depend on how many there are.
    pub(crate) fn new(params: SamplingParams, seed: u64, candidate: u64, prompt: &[u32]) -> Self {
        let mut rng = ChaCha12Rng::seed_from_u64(seed);
        rng.set_stream(candidate);
        let prompt = if params.repetition_penalty == 1.0 {
            HashSet::new()
        } else {
            prompt.iter().copied().collect()
        };
        Sampler {
            params,
            rng,
            prompt,
            counts: HashMap::new(),
            candidates: Vec::new(),
        }
    }

    /// Chooses a token from one row of logits, which is changed. `banned` cannot be chosen, unless nothing else is left.
    ///
    /// # Errors
    /// [`NonFinite`] when a logit is NaN or infinite.
    pub(crate) fn sample(&mut self, logits: &mut [f32], banned: &[u32]) -> Result<u32, NonFinite> {
        if !logits.iter().all(|logit| logit.is_finite()) {
            return Err(NonFinite);
        }
        self.adjust(logits, banned);
        let token = if self.params.temperature <= 0.0 {
            greedy(logits)
        } else {
            self.draw(logits)
        };
        if self.has_penalty() {
            *self.counts.entry(token).or_default() += 1;
        }
        Ok(token)
    }

    fn has_penalty(&self) -> bool {
        let params = &self.params;
        params.repetition_penalty != 1.0
            || params.frequency_penalty != 0.0
            || params.presence_penalty != 0.0
    }

    fn adjust(&self, logits: &mut [f32], banned: &[u32]) {
        for (&token, &bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        if self.params.repetition_penalty != 1.0 {
            for token in self.prompt.iter().chain(
                self.counts
                    .keys()
                    .filter(|token| !self.prompt.contains(token)),
            ) {
                if let Some(logit) = logits.get_mut(*token as usize) {
                    // Keskar et al. 2019 (CTRL) section 4.1, in transformers' form for negative logits.
                    let penalty = self.params.repetition_penalty;
                    *logit = if *logit > 0.0 {
                        *logit / penalty
                    } else {
                        *logit * penalty
                    };
                }
            }
        }
        for (&token, &count) in &self.counts {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit -=
                    self.params.frequency_penalty * count as f32 + self.params.presence_penalty;
            }
        }
        for &token in banned {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    fn draw(&mut self, logits: &[f32]) -> u32 {
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if best == f32::NEG_INFINITY {
            return greedy(logits);
        }
        let temperature = f64::from(self.params.temperature);
        // The largest weight is 1, so nothing overflows however small the temperature is.
        let weight = |logit: f32| ((f64::from(logit) - f64::from(best)) / temperature).exp();
        let threshold: f64 = self.rng.random();
        if self.params.top_k == 0 && self.params.top_p >= 1.0 {
            let least = f64::from(self.params.min_p);
            let kept = logits
                .iter()
                .map(|&logit| weight(logit))
                .map(|weight| if weight < least { 0.0 } else { weight });
            return pick(kept.zip(0..), threshold);
        }
        self.truncate(logits, &weight);
        pick(
            self.candidates
                .iter()
                .map(|&(logit, token)| (weight(logit), token)),
            threshold,
        )
    }

    /// Leaves in `candidates`, best first (ties: lower id first), those within top-k, then top-p, then min-p. The
    /// cumulated probabilities of top-p are those after top-k, as in transformers.
    fn truncate(&mut self, logits: &[f32], weight: &impl Fn(f32) -> f64) {
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend(logits.iter().copied().zip(0..));
        let limit = if self.params.top_k == 0 {
            candidates.len()
        } else {
            self.params.top_k.min(candidates.len())
        };
        let least = f64::from(self.params.min_p);
        let total: f64 = if limit == candidates.len() {
            logits.iter().map(|&logit| weight(logit)).sum()
        } else {
            select_best(candidates, limit);
            candidates.truncate(limit);
            candidates.sort_unstable_by(by_logit);
            candidates.iter().map(|&(logit, _)| weight(logit)).sum()
        };
        let wanted = f64::from(self.params.top_p) * total;
        // Few candidates hold most of the mass, so the whole vocabulary is rarely sorted.
        let (mut sorted, mut cumulated, mut kept) = (0, 0.0, 0);
        'blocks: while sorted < candidates.len() {
            let block = (sorted.max(64) * 4).min(candidates.len() - sorted);
            let rest = &mut candidates[sorted..];
            select_best(rest, block);
            rest[..block].sort_unstable_by(by_logit);
            for &(logit, _) in &rest[..block] {
                let weight = weight(logit);
                if kept > 0 && (cumulated >= wanted || weight < least) {
                    break 'blocks;
                }
                cumulated += weight;
                kept += 1;
            }
            sorted += block;
        }
        candidates.truncate(kept);
    }
}

fn by_logit(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// Brings the `count` best to the front, in any order.
fn select_best(candidates: &mut [(f32, u32)], count: usize) {
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, by_logit);
    }
}

/// The most likely token; the lowest id among equals.
fn greedy(logits: &[f32]) -> u32 {
    let mut best = (f32::NEG_INFINITY, 0);
    for (&logit, token) in logits.iter().zip(0..) {
        if logit > best.0 {
            best = (logit, token);
        }
    }
    best.1
}

/// The token at which the cumulated weight passes the share `threshold` of the whole.
fn pick(weights: impl Iterator<Item = (f64, u32)> + Clone, threshold: f64) -> u32 {
    let total: f64 = weights.clone().map(|(weight, _)| weight).sum();
    let (target, mut cumulated, mut last) = (threshold * total, 0.0, 0);
    for (weight, token) in weights {
        if weight > 0.0 {
            cumulated += weight;
            last = token;
            if cumulated > target {
                break;
            }
        }
    }
    last
}

/// The logarithm of the sum of exponentials, in f64.
pub(crate) fn log_sum_exp(logits: &[f32]) -> f64 {
    let best = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    best + logits
        .iter()
        .map(|&logit| (f64::from(logit) - best).exp())
        .sum::<f64>()
        .ln()
}

/// A token's log-probability and the `top` most likely ones, of logits as the model gave them.
pub(crate) fn token_logprob(logits: &[f32], token: u32, top: usize) -> TokenLogprob {
    let norm = log_sum_exp(logits);
    let logprob = |logit: f32| (f64::from(logit) - norm) as f32;
    let mut best: Vec<(f32, u32)> = Vec::new();
    if top > 0 {
        best.extend(logits.iter().copied().zip(0..));
        let count = top.min(best.len());
        select_best(&mut best, count);
        best.truncate(count);
        best.sort_unstable_by(by_logit);
    }
    TokenLogprob {
        token,
        logprob: logits
            .get(token as usize)
            .map_or(f32::NEG_INFINITY, |&logit| logprob(logit)),
        top: best
            .into_iter()
            .map(|(logit, token)| (token, logprob(logit)))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;
    use candle_core::{Device, Tensor};
    use candle_transformers::generation::{LogitsProcessor, Sampling};
    use proptest::prelude::*;
    use rand::Rng;

    fn row(seed: u64, vocab: usize) -> Vec<f32> {
        let mut rng = ChaCha12Rng::seed_from_u64(seed);
        (0..vocab).map(|_| rng.random_range(-6.0..6.0)).collect()
    }

    fn draws(params: &SamplingParams, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(params.clone(), 7, 0, &[]);
        (0..count)
            .map(|_| sampler.sample(&mut logits.to_vec(), &[]).unwrap())
            .collect()
    }

    fn hot() -> SamplingParams {
        SamplingParams {
            temperature: 1.0,
            ..SamplingParams::default()
        }
    }

    proptest! {
        #[test]
        fn greedy_is_candles(seed in any::<u64>(), vocab in 1..200_usize) {
            let logits = row(seed, vocab);
            let tensor = Tensor::new(logits.as_slice(), &Device::Cpu).unwrap();
            let expected = LogitsProcessor::from_sampling(0, Sampling::ArgMax).sample(&tensor).unwrap();
            prop_assert_eq!(draws(&SamplingParams::default(), &logits, 1), vec![expected]);
        }

        #[test]
        fn the_repetition_penalty_is_candles(seed in any::<u64>(), prompt in prop::collection::vec(0..50_u32, 0..20)) {
            let mut logits = row(seed, 50);
            let tensor = Tensor::new(logits.as_slice(), &Device::Cpu).unwrap();
            let expected = candle_transformers::utils::apply_repeat_penalty(&tensor, 1.7, &prompt).unwrap();
            let params = SamplingParams { repetition_penalty: 1.7, ..SamplingParams::default() };
            Sampler::new(params, 0, 0, &prompt).adjust(&mut logits, &[]);
            prop_assert_eq!(logits, expected.to_vec1::<f32>().unwrap());
        }

        /// Against a plain sort of everything.
        #[test]
        fn truncation_keeps_exactly_its_set(
            seed in any::<u64>(), vocab in 1..900_usize, top_k in 0..40_usize, top_p in 0.01..1.0_f32, min_p in 0.0..0.3_f32,
            temperature in 0.1..3.0_f32,
        ) {
            let logits = row(seed, vocab);
            let params = SamplingParams { temperature, top_k, top_p, min_p, ..SamplingParams::default() };
            let mut all: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
            all.sort_by(by_logit);
            all.truncate(if top_k == 0 { vocab } else { top_k });
            let weight = |logit: f32| (f64::from(logit - all[0].0) / f64::from(temperature)).exp();
            let total: f64 = all.iter().map(|&(logit, _)| weight(logit)).sum();
            let (mut expected, mut cumulated) = (Vec::new(), 0.0);
            for &(logit, token) in &all {
                if !expected.is_empty() && (cumulated >= f64::from(top_p) * total || weight(logit) < f64::from(min_p)) {
                    break;
                }
                cumulated += weight(logit);
                expected.push(token);
            }
            let best = all[0].0;
            let mut sampler = Sampler::new(params, 0, 0, &[]);
            sampler.truncate(&logits, &|logit| (f64::from(logit - best) / f64::from(temperature)).exp());
            let kept: Vec<u32> = sampler.candidates.iter().map(|&(_, token)| token).collect();
            // A sum in another order may stand on the other side of the edge by one token.
            prop_assert!(kept.len().abs_diff(expected.len()) <= 1);
            let common = kept.len().min(expected.len());
            prop_assert_eq!(&kept[..common], &expected[..common]);
        }
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.0_f32, 1.0, 2.0, -1.0];
        let norm = log_sum_exp(&logits);
        let drawn = draws(&hot(), &logits, 20_000);
        for (token, &logit) in logits.iter().enumerate() {
            let share = drawn
                .iter()
                .filter(|&&drawn| drawn as usize == token)
                .count() as f64
                / 20_000.0;
            let expected = (f64::from(logit) - norm).exp();
            assert!(
                (share - expected).abs() < 0.015,
                "token {token}: {share} for {expected}"
            );
        }
    }

    #[test]
    fn a_seed_is_a_sequence_and_candidates_differ() {
        let logits = row(3, 500);
        let params = hot();
        let tokens = |seed, candidate| -> Vec<u32> {
            let mut sampler = Sampler::new(params.clone(), seed, candidate, &[]);
            (0..20)
                .map(|_| sampler.sample(&mut logits.clone(), &[]).unwrap())
                .collect()
        };
        assert_eq!(tokens(5, 0), tokens(5, 0));
        assert_ne!(tokens(5, 0), tokens(5, 1));
        assert_ne!(tokens(5, 0), tokens(6, 0));
        // Written down, so that an update of the generator cannot change users' texts unseen.
        assert_eq!(tokens(5, 0)[..4], PINNED);
    }

    const PINNED: [u32; 4] = [132, 2, 161, 274];

    #[test]
    fn penalties_bias_and_bans_count() {
        let logits = [5.0_f32, 4.0, 3.0, 0.0];
        let params = SamplingParams {
            frequency_penalty: 0.6,
            presence_penalty: 0.5,
            ..SamplingParams::default()
        };
        // 5, then 3.9 below 4, then 2.9 for token 1 and 3.9 for token 0, ...
        assert_eq!(draws(&params, &logits, 4), [0, 1, 0, 0]);
        let params = SamplingParams {
            logit_bias: [(3, 9.0)].into(),
            ..SamplingParams::default()
        };
        assert_eq!(draws(&params, &logits, 1), [3]);
        let mut sampler = Sampler::new(SamplingParams::default(), 0, 0, &[]);
        assert_eq!(sampler.sample(&mut logits.to_vec(), &[0, 1]), Ok(2));
        assert_eq!(sampler.sample(&mut [1.0, f32::NAN], &[]), Err(NonFinite));
    }

    #[test]
    fn logprobs_are_of_the_models_own_distribution() {
        let logprob = token_logprob(&[1.0, 3.0, 2.0, 3.0], 2, 3);
        let norm = log_sum_exp(&[1.0, 3.0, 2.0, 3.0]) as f32;
        assert!((logprob.logprob - (2.0 - norm)).abs() < 1e-6);
        assert_eq!(
            logprob
                .top
                .iter()
                .map(|&(token, _)| token)
                .collect::<Vec<_>>(),
            [1, 3, 2]
        );
    }
}
