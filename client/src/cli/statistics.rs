//! What a dry run says of the rows, as a small table.

use crate::{
    cli::output::{Failure, Out, aligned},
    v1::{DataStatistics, TokenCounts},
};

/// Labels that are shown; JSON has them all.
const SHOWN: usize = 20;

/// Prints what is known of a job's rows; nothing that is nothing.
pub(crate) fn print(out: Out, found: &DataStatistics) -> Result<(), Failure> {
    for line in aligned(&[], &lines(found)) {
        out.line(line)?;
    }
    Ok(())
}

fn lines(found: &DataStatistics) -> Vec<Vec<String>> {
    let tokens = |counts: Option<TokenCounts>| {
        let counts = counts.unwrap_or_default();
        format!(
            "{} tokens: shortest {}, median {}, 95 % up to {}, longest {}",
            counts.total, counts.shortest, counts.median, counts.p95, counts.longest
        )
    };
    let mut rows = vec![(
        "to train on",
        format!("{} examples, {}", found.examples, tokens(found.tokens)),
    )];
    if found.validation_examples > 0 {
        let text = format!(
            "{} examples, {}",
            found.validation_examples,
            tokens(found.validation_tokens)
        );
        rows.push(("to measure on", text));
    }
    let learned = match found.label_counts.is_empty() {
        true => format!(
            "{} tokens, {} only read",
            found.learned_tokens, found.masked_tokens
        ),
        false => format!(
            "a label each of {}: {}",
            found.label_counts.len(),
            labels(found)
        ),
    };
    rows.push(("learned", learned));
    if found.too_long_rows > 0 {
        let text = format!(
            "{} rows over {} tokens, the longest {}; in {} the prompt alone fills them",
            found.too_long_rows,
            found.max_example_tokens,
            found.longest_refused_tokens,
            found.prompt_too_long_rows
        );
        rows.push(("too long", text));
    }
    if found.duplicate_rows > 0 {
        let text = format!("{} rows repeat an earlier one", found.duplicate_rows);
        rows.push(("duplicates", text));
    }
    if found.conflicting_labels > 0 {
        let text = format!("{} texts have another label too", found.conflicting_labels);
        rows.push(("conflicts", text));
    }
    if found.leaked_rows + found.nearly_leaked_rows > 0 {
        let text = format!(
            "{} rows to measure on are trained on too, {} more but for case and white space",
            found.leaked_rows, found.nearly_leaked_rows
        );
        rows.push(("leakage", text));
    }
    let row = |(name, text): (&str, String)| vec![name.to_owned(), text];
    rows.into_iter().map(row).collect()
}

/// The most frequent labels first.
fn labels(found: &DataStatistics) -> String {
    let mut labels: Vec<(&String, &u64)> = found.label_counts.iter().collect();
    labels.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), *name));
    let mut parts: Vec<String> = labels
        .iter()
        .take(SHOWN)
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    if labels.len() > SHOWN {
        parts.push(format!("and {} more", labels.len() - SHOWN));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_told_and_nothing_else() {
        let counts = |total| TokenCounts {
            total,
            shortest: 3,
            median: 12,
            p95: 30,
            longest: 41,
        };
        let mut found = DataStatistics {
            examples: 20,
            tokens: Some(counts(260)),
            learned_tokens: 90,
            masked_tokens: 170,
            ..Default::default()
        };
        let told = |found: &DataStatistics| aligned(&[], &lines(found));
        assert_eq!(
            told(&found),
            [
                "to train on  20 examples, 260 tokens: shortest 3, median 12, 95 % up to 30, longest 41",
                "learned      90 tokens, 170 only read",
            ]
        );
        found.validation_examples = 4;
        found.validation_tokens = Some(counts(50));
        (found.too_long_rows, found.max_example_tokens) = (3, 64);
        (found.longest_refused_tokens, found.prompt_too_long_rows) = (99, 2);
        (found.duplicate_rows, found.conflicting_labels) = (5, 6);
        (found.leaked_rows, found.nearly_leaked_rows) = (0, 7);
        for at in 0..22_u64 {
            found.label_counts.insert(format!("l{at:02}"), at / 10 + 1);
        }
        let text = told(&found).join("\n");
        for part in [
            "to measure on  4 examples, 50 tokens",
            "a label each of 22: l20 3, l21 3, l10 2",
            "l06 1, l07 1, and 2 more",
            "3 rows over 64 tokens, the longest 99; in 2 the",
            "duplicates     5 rows",
            "conflicts      6 texts",
            "0 rows to measure on are trained on too, 7 more but",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
