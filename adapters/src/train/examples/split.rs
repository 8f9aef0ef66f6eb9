//! Which examples are held out for validation: a pure function of the seed and the examples.
//!
//! This file must not know what the examples are for.

use std::collections::HashMap;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::{Example, Examples};

impl Examples {
    /// Holds out about `fraction` of the examples: (for training, for validation). With `stratified` each class gives its share.
    ///
    /// Examples of one line (the windows of a document) stay together, and so do examples of the same ids: else validation would
    /// measure memory. Where no such group is small enough for the share, the smallest is held out if it is no more than half.
    /// Training keeps at least one example (of each class, if stratified); validation is `None` when nothing is left for it.
    /// Both keep the order and the labels.
    #[must_use]
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "counts of examples are far below 2^52, and the share is between 0 and them"
    )]
    pub fn split(self, seed: u64, fraction: f64, stratified: bool) -> (Self, Option<Self>) {
        let groups = self.groups();
        let mut classes: Vec<Vec<&Vec<usize>>> = Vec::new();
        for group in &groups {
            let class = match &self.items[group[0]] {
                Example::Class { label, .. } if stratified => *label,
                _ => 0,
            };
            classes.resize_with(classes.len().max(class + 1), Vec::new);
            classes[class].push(group);
        }
        let mut held = vec![false; self.items.len()];
        let (mut wanted, mut taken) = (0.0, 0_usize);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for mut class in classes {
            shuffle(&mut class, &mut rng);
            let size: usize = class.iter().map(|g| g.len()).sum();
            // What rounding leaves over goes to the next class, so that many small ones still give their share.
            wanted += size as f64 * fraction.clamp(0.0, 1.0);
            let share = (wanted.round() as usize).saturating_sub(taken);
            for i in held_out(&class, share, size / 2).into_iter().flatten() {
                held[*i] = true;
                taken += 1;
            }
        }
        self.divide(&held)
    }

    /// Examples that must not be parted, in the order of their first one.
    fn groups(&self) -> Vec<Vec<usize>> {
        let (mut by_line, mut by_ids) = (HashMap::new(), HashMap::new());
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for (i, (item, line)) in self.items.iter().zip(&self.lines).enumerate() {
            let known = [by_line.get(line).copied(), by_ids.get(item.ids()).copied()];
            let group = known.into_iter().flatten().min().unwrap_or(groups.len());
            if group == groups.len() {
                groups.push(Vec::new());
            }
            for other in known.into_iter().flatten().filter(|other| *other != group) {
                // The example joins two groups: the later one moves into the earlier.
                let moved = std::mem::take(&mut groups[other]);
                for member in &moved {
                    by_line.insert(&self.lines[*member], group);
                    by_ids.insert(self.items[*member].ids(), group);
                }
                groups[group].extend(moved);
            }
            by_line.insert(line, group);
            by_ids.insert(item.ids(), group);
            groups[group].push(i);
        }
        groups.retain(|group| !group.is_empty());
        groups
    }

    fn divide(self, held: &[bool]) -> (Self, Option<Self>) {
        let empty = || Self {
            items: Vec::new(),
            lines: Vec::new(),
            labels: self.labels.clone(),
        };
        let (mut train, mut valid) = (empty(), empty());
        for ((item, line), held) in self.items.into_iter().zip(self.lines).zip(held) {
            let side = if *held { &mut valid } else { &mut train };
            side.items.push(item);
            side.lines.push(line);
        }
        let some = !valid.items.is_empty();
        (train, some.then_some(valid))
    }
}

/// The groups behind the first that fill a share, each whole; if none is small enough, the smallest of at most `bound` examples.
fn held_out<'a>(groups: &[&'a Vec<usize>], share: usize, bound: usize) -> Vec<&'a Vec<usize>> {
    let mut left = share;
    let mut chosen = Vec::new();
    for group in groups.iter().skip(1) {
        if group.len() <= left {
            left -= group.len();
            chosen.push(*group);
        }
    }
    if share > 0 && chosen.is_empty() && groups.len() > 1 {
        let smallest = groups.iter().min_by_key(|group| group.len());
        chosen.extend(smallest.filter(|group| group.len() <= bound).copied());
    }
    chosen
}

/// Fisher and Yates, written out so that a seed means the same split with every version of the random library.
fn shuffle<T>(items: &mut [T], rng: &mut ChaCha8Rng) {
    for i in (1..items.len()).rev() {
        let j = rng.random::<u64>() % (i as u64 + 1);
        // Below `i + 1`, so it fits.
        items.swap(i, usize::try_from(j).unwrap_or(i));
    }
}
