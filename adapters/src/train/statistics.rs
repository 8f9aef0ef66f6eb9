//! What is to be known of a job's data before it starts: how much there is to learn, what would be refused, what repeats or
//! contradicts itself, and what of the validation rows stands among those to train on.
//!
//! This file must not know files, tokenizers or limits beyond the numbers that it is given.

use std::collections::{BTreeMap, HashSet};

use super::dataset::{Row, repeats};
use super::examples::{Example, Examples, TokenStats, TooLong};

/// The rows of one side, what they became, and which of them became nothing because they are too long.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// The rows.
    pub rows: Vec<&'a Row>,
    /// Their examples.
    pub examples: &'a Examples,
    /// Those that have more tokens than allowed.
    pub too_long: &'a [TooLong],
}

/// Numbers of a job's data. Unless said otherwise they are of the rows to train on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Examples and their tokens, without rows that are too long.
    pub tokens: TokenStats,
    /// Tokens that are read and not learned; 0 where a class is learned.
    pub masked: u64,
    /// Examples to measure on and their tokens, without rows that are too long.
    pub validation: TokenStats,
    /// Tokens of one example at most.
    pub limit: u64,
    /// Rows that are too long, those to measure on included.
    pub too_long: u64,
    /// Tokens of the longest of them.
    pub longest_refused: u64,
    /// Those of them whose first learned token lies behind the limit: shortening the answer would not help.
    pub prompt_alone: u64,
    /// Rows that repeat an earlier one.
    pub duplicates: u64,
    /// Rows whose text came before with another label.
    pub conflicting_labels: u64,
    /// Rows by label; empty without labels.
    pub label_counts: BTreeMap<String, u64>,
    /// Rows to measure on that are to train on too.
    pub leaked: u64,
    /// Rows to measure on whose text is to train on too once case and white space are set aside; without those that leaked.
    pub nearly_leaked: u64,
}

impl Statistics {
    /// The numbers of rows to train on and to measure on, of at most `limit` tokens an example.
    #[must_use]
    pub fn of(train: &Part<'_>, valid: Option<&Part<'_>>, limit: usize) -> Self {
        let tokens = train.examples.stats();
        let repeats = repeats(train.rows.iter().copied());
        let too_long = || {
            let of_valid = valid.map_or(&[][..], |valid| valid.too_long);
            train.too_long.iter().chain(of_valid)
        };
        let (leaked, nearly_leaked) = valid.map_or((0, 0), |valid| leaks(&train.rows, &valid.rows));
        Self {
            tokens,
            masked: masked(train.examples),
            validation: valid.map_or(TokenStats::default(), |valid| valid.examples.stats()),
            limit: limit as u64,
            too_long: too_long().count() as u64,
            longest_refused: too_long().map(|row| row.tokens as u64).max().unwrap_or(0),
            prompt_alone: too_long().filter(|row| row.prompt >= limit).count() as u64,
            duplicates: repeats.same.len() as u64,
            conflicting_labels: repeats.conflicting.len() as u64,
            label_counts: label_counts(train.rows.iter().copied()),
            leaked,
            nearly_leaked,
        }
    }
}

/// Rows by label, of rows that have labels; a row with several counts for each.
pub fn label_counts<'a>(rows: impl Iterator<Item = &'a Row>) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for row in rows {
        let labels = match row {
            Row::Class { label, .. } => std::slice::from_ref(label),
            Row::Labels { labels, .. } => labels,
            _ => &[],
        };
        for label in labels {
            *counts.entry(label.clone()).or_insert(0) += 1;
        }
    }
    counts
}

fn masked(examples: &Examples) -> u64 {
    let of = |example: &Example| match example {
        Example::Lm { learn, .. } => learn.iter().filter(|learn| !**learn).count() as u64,
        Example::Class { .. } | Example::Labels { .. } | Example::Score { .. } => 0,
    };
    examples.items.iter().map(of).sum()
}

/// Rows to measure on that are among those to train on: the same, and the same but for case and white space.
fn leaks(train: &[&Row], valid: &[&Row]) -> (u64, u64) {
    let known: HashSet<&Row> = train.iter().copied().collect();
    let texts: HashSet<String> = train.iter().map(|row| folded(row)).collect();
    let (same, other): (Vec<&Row>, Vec<&Row>) = valid.iter().partition(|row| known.contains(*row));
    let near = other.iter().filter(|row| texts.contains(&folded(row)));
    (same.len() as u64, near.count() as u64)
}

/// A row's text in lower case with single spaces; of a class without its label, because the text alone gives the answer away.
fn folded(row: &Row) -> String {
    let parts: Vec<&str> = match row {
        Row::Completion { prompt, completion } => vec![prompt, completion],
        Row::Chat { messages } => messages.iter().map(|m| m.content.as_str()).collect(),
        Row::Class { text, .. }
        | Row::Labels { text, .. }
        | Row::Score { text, .. }
        | Row::Text { text } => vec![text],
        Row::Instruction {
            instruction,
            input,
            output,
        } => vec![instruction, input, output],
    };
    let words: Vec<&str> = parts
        .iter()
        .flat_map(|part| part.split_whitespace())
        .collect();
    words.join(" ").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(text: &str, label: &str) -> Row {
        let [text, label] = [text, label].map(str::to_owned);
        Row::Class { text, label }
    }

    fn completion(prompt: &str, completion: &str) -> Row {
        let [prompt, completion] = [prompt, completion].map(str::to_owned);
        Row::Completion { prompt, completion }
    }

    /// An example of so many tokens, of which the last ones are learned.
    fn lm(tokens: usize, learned: usize) -> Example {
        Example::Lm {
            ids: vec![7; tokens],
            learn: (0..tokens).map(|at| at >= tokens - learned).collect(),
        }
    }

    fn examples(items: Vec<Example>) -> Examples {
        Examples {
            lines: (1..=items.len() as u64).collect(),
            items,
            labels: None,
        }
    }

    fn part<'a>(rows: &'a [Row], examples: &'a Examples, too_long: &'a [TooLong]) -> Part<'a> {
        Part {
            rows: rows.iter().collect(),
            examples,
            too_long,
        }
    }

    fn long(line: u64, tokens: usize, prompt: usize) -> TooLong {
        TooLong {
            line,
            tokens,
            prompt,
        }
    }

    #[test]
    fn tokens_are_counted_by_what_is_done_with_them() {
        let rows: Vec<Row> = (0..40).map(|i| completion(&i.to_string(), "x")).collect();
        // 1 to 40 tokens, of which at most 3 are learned, and never the first.
        let train = examples((1..=40).map(|n: usize| lm(n, 3.min(n - 1))).collect());
        let valid = examples(vec![lm(9, 2), lm(4, 1)]);
        let measured = [completion("v", "x"), completion("w", "x")];
        let refused = [long(50, 70, 10), long(51, 99, 64), long(52, 80, 63)];
        let also = [long(3, 66, 65)];
        let found = Statistics::of(
            &part(&rows, &train, &refused),
            Some(&part(&measured, &valid, &also)),
            64,
        );
        let learned = 1 + 2 + 3 * 37;
        let want = TokenStats {
            examples: 40,
            tokens: 820,
            targets: learned,
            shortest: 1,
            median: 21,
            p95: 38,
            longest: 40,
        };
        assert_eq!((found.tokens, found.masked), (want, 820 - learned));
        assert_eq!(
            (found.validation.examples, found.validation.tokens),
            (2, 13)
        );
        assert_eq!(
            (found.limit, found.too_long, found.longest_refused),
            (64, 4, 99)
        );
        assert_eq!(found.prompt_alone, 2, "64 fill the limit, 63 do not");
        assert_eq!(
            (found.duplicates, found.leaked, found.nearly_leaked),
            (0, 0, 0)
        );
    }

    #[test]
    fn rows_that_repeat_contradict_or_leak_are_counted() {
        let rows = [
            class("a b", "x"),
            class("a b", "x"),
            class("a b", "y"),
            class("c", "y"),
            class("a b", "x"),
            class("d", "x"),
        ];
        let items = |count| {
            let class = |i| Example::Class {
                ids: vec![i, 1, 2],
                label: 0,
            };
            examples((0..count).map(class).collect())
        };
        let measured = [
            class("c", "y"),      // the same
            class("A\n b ", "z"), // near, whatever its label
            class("c", "x"),      // near: the text is there
            class("ab", "x"),     // no
        ];
        let (train, valid) = (items(6), items(4));
        let found = Statistics::of(
            &part(&rows, &train, &[]),
            Some(&part(&measured, &valid, &[])),
            10,
        );
        assert_eq!((found.duplicates, found.conflicting_labels), (2, 1));
        let counts: Vec<_> = found.label_counts.into_iter().collect();
        assert_eq!(counts, [("x".to_owned(), 4), ("y".to_owned(), 2)]);
        assert_eq!((found.leaked, found.nearly_leaked), (1, 2));
        assert_eq!((found.masked, found.tokens.targets), (0, 6));
    }

    #[test]
    fn near_is_the_same_whole_row_for_what_is_generated() {
        let rows = [
            completion("Where is it?", " There."),
            completion("a", "b c"),
        ];
        let measured = [
            completion("where  IS it?", "there."),
            completion("Where is it?", " Here."),
            completion("a b", "c"),
            completion("a", "b c"),
        ];
        let none = examples(Vec::new());
        let found = Statistics::of(
            &part(&rows, &none, &[]),
            Some(&part(&measured, &none, &[])),
            10,
        );
        assert_eq!((found.leaked, found.nearly_leaked), (1, 2));
    }
}
