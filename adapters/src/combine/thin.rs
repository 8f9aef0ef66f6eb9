//! Singular values and vectors of a product of two thin matrices, without ever forming the product: each factor is made orthonormal
//! (Gram and Schmidt, twice), and what remains between the two is as small as the rank and decomposed by one-sided Jacobi rotations
//! (Hestenes 1958). All in f64.

/// Rotations settle within about ten rounds; this bound is never met.
const MAX_ROUNDS: usize = 60;

/// A column that keeps less than this of its length is a combination of those before it.
const DEPENDENT: f64 = 1e-13;

/// `U S V'` of `B A`, singular values descending.
pub(super) struct Singular {
    values: Vec<f64>,
    /// Columns `[out]`, of length one, in the order of `values`.
    left: Vec<Vec<f64>>,
    /// Columns `[in]`.
    right: Vec<Vec<f64>>,
}

/// Decomposes `B A`, with A `[rank, in]` and B `[out, rank]` row-major.
pub(super) fn decompose(a: &[f64], b: &[f64], rank: usize) -> Singular {
    let inputs = a.len() / rank;
    let rows = a.chunks_exact(inputs).map(<[f64]>::to_vec).collect();
    let columns = (0..rank)
        .map(|k| b.iter().skip(k).step_by(rank).copied().collect())
        .collect();
    let (right, ra) = orthonormal(rows);
    let (left, rb) = orthonormal(columns);
    // B A = left (rb ra') right': column j of the core is the sum over k of rb[k] ra[k][j].
    let column = |j: usize| {
        let mut column = vec![0.0; rank];
        for (rb, ra) in rb.iter().zip(&ra) {
            axpy(&mut column, ra[j], rb);
        }
        column
    };
    let mut core: Vec<Vec<f64>> = (0..rank).map(column).collect();
    let turns = rotate(&mut core);
    let mut order: Vec<(f64, usize)> = core.iter().map(|column| norm(column)).zip(0..).collect();
    order.sort_by(|x, y| y.0.total_cmp(&x.0));
    let spread = |basis: &[Vec<f64>], by: &[f64], scale: f64| {
        let mut column = vec![0.0; basis.first().map_or(0, Vec::len)];
        for (basis, by) in basis.iter().zip(by) {
            axpy(&mut column, scale * by, basis);
        }
        column
    };
    let inverse = |value: f64| if value > 0.0 { 1.0 / value } else { 0.0 };
    Singular {
        left: order
            .iter()
            .map(|&(value, j)| spread(&left, &core[j], inverse(value)))
            .collect(),
        right: order
            .iter()
            .map(|&(_, j)| spread(&right, &turns[j], 1.0))
            .collect(),
        values: order.into_iter().map(|(value, _)| value).collect(),
    }
}

impl Singular {
    /// The sum of squares of the singular values from `first` on: the squared norm of what they make.
    pub(super) fn squares(&self, first: usize) -> f64 {
        self.values[first.min(self.values.len())..]
            .iter()
            .map(|value| value * value)
            .sum()
    }

    /// The best A `[rank, in]` and B `[out, rank]` of a lower rank, each with the root of the singular values.
    pub(super) fn factors(&self, rank: usize) -> (Vec<f64>, Vec<f64>) {
        let roots: Vec<f64> = self.values[..rank]
            .iter()
            .map(|value| value.sqrt())
            .collect();
        let rows = self.right.iter().zip(&roots);
        let a = rows
            .flat_map(|(row, root)| row.iter().map(move |x| root * x))
            .collect();
        let outputs = self.left.first().map_or(0, Vec::len);
        let cell = |at: usize, k: usize| roots[k] * self.left[k][at];
        let b = (0..outputs)
            .flat_map(|at| (0..rank).map(move |k| cell(at, k)))
            .collect();
        (a, b)
    }
}

/// An orthonormal basis of the columns, a zero column for each that depends on earlier ones, and for each column its coordinates.
fn orthonormal(mut columns: Vec<Vec<f64>>) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let count = columns.len();
    let mut coordinates = vec![vec![0.0; count]; count];
    for (k, place) in coordinates.iter_mut().enumerate() {
        let (before, rest) = columns.split_at_mut(k);
        let column = &mut rest[0];
        let length = norm(column);
        // The second round removes what rounding left of the first.
        for _ in 0..2 {
            for (basis, coordinate) in before.iter().zip(place.iter_mut()) {
                let along = dot(basis, column);
                axpy(column, -along, basis);
                *coordinate += along;
            }
        }
        let own = norm(column);
        let scale = if own > DEPENDENT * length {
            1.0 / own
        } else {
            0.0
        };
        column.iter_mut().for_each(|x| *x *= scale);
        place[k] = own * f64::from(u8::from(scale > 0.0));
    }
    (columns, coordinates)
}

/// Turns pairs of columns until all are orthogonal to each other; gives back the columns of the turn, `before * turn = after`.
fn rotate(columns: &mut [Vec<f64>]) -> Vec<Vec<f64>> {
    let count = columns.len();
    let mut turn: Vec<Vec<f64>> = (0..count)
        .map(|k| (0..count).map(|j| f64::from(u8::from(j == k))).collect())
        .collect();
    for _ in 0..MAX_ROUNDS {
        let mut turned = false;
        for p in 0..count {
            for q in p + 1..count {
                let (x, y) = (dot(&columns[p], &columns[p]), dot(&columns[q], &columns[q]));
                let between = dot(&columns[p], &columns[q]);
                if between.abs() <= f64::EPSILON * (x * y).sqrt() {
                    continue;
                }
                turned = true;
                let slope = (y - x) / (2.0 * between);
                let tangent = slope.signum() / (slope.abs() + slope.hypot(1.0));
                let cosine = 1.0 / tangent.hypot(1.0);
                for columns in [&mut *columns, &mut turn[..]] {
                    let (head, tail) = columns.split_at_mut(q);
                    for (x, y) in head[p].iter_mut().zip(&mut tail[0]) {
                        let (old_x, old_y) = (*x, *y);
                        *x = cosine * (old_x - tangent * old_y);
                        *y = cosine * (tangent * old_x + old_y);
                    }
                }
            }
        }
        if !turned {
            break;
        }
    }
    turn
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn norm(x: &[f64]) -> f64 {
    dot(x, x).sqrt()
}

/// Adds `factor * x` to `sum`.
fn axpy(sum: &mut [f64], factor: f64, x: &[f64]) {
    sum.iter_mut()
        .zip(x)
        .for_each(|(sum, x)| *sum += factor * x);
}
