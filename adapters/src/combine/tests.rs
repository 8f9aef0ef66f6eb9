//! Sums against the dense sums that they stand for, cuts against singular values that are known beforehand, and refusals.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::config::BaseShape;
use crate::peft;

const SHAPE: BaseShape = BaseShape {
    layers: 2,
    hidden: 16,
    intermediate: 24,
    heads: 4,
    kv_heads: 2,
    head_dim: 4,
    vocab: 40,
    tied_embeddings: false,
};

fn adapter(seed: u64, r: usize, scale: f32, sites: &[(usize, Site)]) -> AdapterWeights {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut numbers =
        |count: usize| -> Vec<f32> { (0..count).map(|_| random.random::<f32>() - 0.5).collect() };
    let sites = sites.iter().map(|&(layer, site)| {
        let (inputs, outputs) = SHAPE.dims(site);
        let adapter = SiteAdapter {
            r,
            scale,
            a: numbers(r * inputs).into(),
            b: numbers(outputs * r).into(),
            magnitude: None,
        };
        ((layer, site), adapter)
    });
    AdapterWeights {
        sites: sites.collect(),
        ..AdapterWeights::default()
    }
}

fn term<'a>(name: &'a str, weights: &'a AdapterWeights, factor: f64) -> Term<'a> {
    Term {
        name,
        weights,
        factor,
    }
}

/// `sum of factor * s B A` at one place, `[out, in]`.
fn dense(terms: &[Term<'_>], key: (usize, Site)) -> Vec<f64> {
    let (inputs, outputs) = SHAPE.dims(key.1);
    let mut sum = vec![0.0; outputs * inputs];
    for term in terms {
        let Some(site) = term.weights.sites.get(&key) else {
            continue;
        };
        let (a, b) = (site.a.to_f32(), site.b.to_f32());
        for (at, sum) in sum.iter_mut().enumerate() {
            let (row, column) = (at / inputs, at % inputs);
            let products = (0..site.r)
                .map(|k| f64::from(b[row * site.r + k]) * f64::from(a[k * inputs + column]));
            *sum += term.factor * f64::from(site.scale) * products.sum::<f64>();
        }
    }
    sum
}

fn largest(x: &[f64], y: &[f64]) -> f64 {
    x.iter()
        .zip(y)
        .fold(0.0, |most, (x, y)| f64::max(most, (x - y).abs()))
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// What PEFT would load of it is the same.
fn reads_back(combined: &Combined) {
    let artifact = peft::write(&combined.config, &combined.weights).unwrap();
    let limits = peft::Limits::default();
    let (_, weights, _) = peft::read(&artifact, &SHAPE, &limits).unwrap();
    assert_eq!(weights, combined.weights);
}

#[test]
fn a_sum_is_the_dense_sum_whatever_the_ranks_and_sites() {
    let everywhere = |site| [(0, site), (1, site)];
    let first = adapter(
        1,
        3,
        2.5,
        &[everywhere(Site::Q), everywhere(Site::Down)].concat(),
    );
    let second = adapter(
        2,
        5,
        0.75,
        &[(0, Site::Q), (1, Site::Down), (1, Site::Gate)],
    );
    let third = adapter(3, 1, 4.0, &everywhere(Site::Q));
    let terms = [
        term("a", &first, 0.7),
        term("b", &second, -1.5),
        term("c", &third, 3.0),
    ];
    let combined = combine(&terms, None).unwrap();
    assert_eq!(combined.relative_error, 0.0);
    let ranks: Vec<usize> = combined.weights.sites.values().map(|site| site.r).collect();
    assert_eq!(ranks, [9, 3, 4, 5, 8]);
    for key in combined.weights.sites.keys() {
        let (sum, wanted) = (
            dense(&[term("", &combined.weights, 1.0)], *key),
            dense(&terms, *key),
        );
        assert!(largest(&sum, &wanted) < 1e-6 * norm(&wanted), "{key:?}");
    }
    reads_back(&combined);
    // The same modules in every layer need no list of paths.
    let combined = combine(&[term("a", &first, 0.7)], None).unwrap();
    assert_eq!(
        combined.config.target_modules,
        Modules::sites(&[Site::Q, Site::Down])
    );
    reads_back(&combined);
}

/// Columns of the discrete cosine transform: orthonormal, and no two alike.
fn cosine(size: usize, column: usize) -> Vec<f64> {
    let n = size as f64;
    let scale = (if column == 0 { 1.0 } else { 2.0 } / n).sqrt();
    let angle = |at: usize| std::f64::consts::PI * (at as f64 + 0.5) * column as f64 / n;
    (0..size).map(|at| scale * angle(at).cos()).collect()
}

/// Singular values that are known because the vectors are: two adapters hold them in turn, under factors and scales of their own.
#[test]
fn a_cut_loses_the_tail_of_the_singular_values_and_nothing_more() {
    let values = [9.0, 7.0, 4.0, 2.5, 1.0, 0.5];
    let key = (1, Site::Down);
    let (inputs, outputs) = SHAPE.dims(key.1);
    let half = |parity: usize, scale: f32, factor: f64| {
        let own: Vec<usize> = (0..6).filter(|k| k % 2 == parity).collect();
        let a: Vec<f32> = own
            .iter()
            .flat_map(|k| cosine(inputs, *k))
            .map(|x| x as f32)
            .collect();
        let columns: Vec<Vec<f64>> = own.iter().map(|k| cosine(outputs, k + 3)).collect();
        let cell = |row: usize, at: usize| {
            (values[own[at]] * columns[at][row] / (f64::from(scale) * factor)) as f32
        };
        let b: Vec<f32> = (0..outputs)
            .flat_map(|row| (0..3).map(move |at| (row, at)))
            .map(|(row, at)| cell(row, at))
            .collect();
        let site = SiteAdapter {
            r: 3,
            scale,
            a: a.into(),
            b: b.into(),
            magnitude: None,
        };
        AdapterWeights {
            sites: [(key, site)].into(),
            ..AdapterWeights::default()
        }
    };
    let (even, odd) = (half(0, 2.0, 0.5), half(1, 0.25, -3.0));
    let terms = [term("even", &even, 0.5), term("odd", &odd, -3.0)];
    let whole = dense(&terms, key);
    for rank in 1..=5 {
        let combined = combine(&terms, Some(rank)).unwrap();
        assert_eq!(combined.weights.sites[&key].r, rank);
        let tail = norm(&values[rank..]);
        let wanted = tail / norm(&values);
        assert!(
            (combined.relative_error - wanted).abs() < 1e-6,
            "rank {rank}: {}",
            combined.relative_error
        );
        let cut = dense(&[term("", &combined.weights, 1.0)], key);
        let lost: Vec<f64> = whole.iter().zip(&cut).map(|(x, y)| x - y).collect();
        assert!(
            (norm(&lost) - tail).abs() < 1e-5,
            "rank {rank}: {} {tail}",
            norm(&lost)
        );
        reads_back(&combined);
    }
    let full = combine(&terms, Some(6)).unwrap();
    assert_eq!(full.weights, combine(&terms, None).unwrap().weights);
    assert_eq!(full.relative_error, 0.0);
}

#[test]
fn what_depends_on_each_other_and_what_cancels_is_cut_without_loss() {
    let one = adapter(4, 4, 1.5, &[(0, Site::V), (1, Site::Up)]);
    let twice = combine(&[term("a", &one, 0.5), term("b", &one, 1.5)], Some(4)).unwrap();
    assert!(twice.relative_error < 1e-7, "{}", twice.relative_error);
    for key in one.sites.keys() {
        let (sum, wanted) = (
            dense(&[term("", &twice.weights, 1.0)], *key),
            dense(&[term("", &one, 2.0)], *key),
        );
        assert!(largest(&sum, &wanted) < 1e-5, "{key:?}");
    }
    let none = combine(&[term("a", &one, 1.0), term("b", &one, -1.0)], Some(2)).unwrap();
    for (key, site) in &none.weights.sites {
        assert!(
            site.a
                .to_f32()
                .iter()
                .chain(&*site.b.to_f32())
                .all(|x| x.is_finite())
        );
        assert!(norm(&dense(&[term("", &none.weights, 1.0)], *key)) < 1e-6);
    }
    // More directions than the matrix has columns.
    let wide = [
        adapter(5, 14, 1.0, &[(0, Site::K)]),
        adapter(6, 13, 1.0, &[(0, Site::K)]),
    ];
    let terms = [term("a", &wide[0], 1.0), term("b", &wide[1], 1.0)];
    let cut = combine(&terms, Some(8)).unwrap();
    assert!(
        cut.relative_error < 1e-7,
        "K has 8 rows: {}",
        cut.relative_error
    );
    let (sum, wanted) = (
        dense(&[term("", &cut.weights, 1.0)], (0, Site::K)),
        dense(&terms, (0, Site::K)),
    );
    assert!(largest(&sum, &wanted) < 1e-5);
}

#[test]
fn heads_and_what_is_no_sum() {
    let plain = adapter(7, 2, 1.0, &[(0, Site::Q), (1, Site::Q)]);
    let head = ScoreHead {
        labels: vec!["no".to_owned(), "yes".to_owned()],
        weight: vec![0.25; 32],
        ..ScoreHead::default()
    };
    let classifier = AdapterWeights {
        head: Some(head.clone()),
        ..plain.clone()
    };
    let combined = combine(&[term("a", &plain, 1.0), term("b", &classifier, 0.1)], None).unwrap();
    assert_eq!(combined.weights.head, Some(head));
    reads_back(&combined);
    let two = combine(
        &[term("a", &classifier, 1.0), term("b", &classifier, 0.1)],
        None,
    );
    assert!(
        two.unwrap_err()
            .to_string()
            .starts_with("a and b both have")
    );
    let mut dora = plain.clone();
    dora.sites.get_mut(&(1, Site::Q)).unwrap().magnitude = Some(vec![1.0; 16]);
    let text = combine(&[term("d", &dora, 1.0)], None)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("d: model.layers.1.self_attn.q_proj"),
        "{text}"
    );
    let large = adapter(8, 300, 1.0, &[(0, Site::V)]);
    let text = combine(&[term("a", &large, 1.0), term("b", &large, 1.0)], Some(4))
        .unwrap_err()
        .to_string();
    assert!(text.contains("600, limit 512"), "{text}");
    assert_eq!(combine(&[], None).unwrap_err(), CombineError::Nothing);
}
