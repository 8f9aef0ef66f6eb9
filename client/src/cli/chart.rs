//! A loss curve in the terminal: the training loss as a braille line (two by four dots a
//! character), evaluations as marks on it, two axes. Knows numbers only.

/// What is drawn.
#[derive(Clone, Debug, Default)]
pub(crate) struct Curve {
    /// (step, loss) of each optimizer step.
    pub(crate) train: Vec<(f64, f64)>,
    /// (step, loss) of each evaluation.
    pub(crate) validation: Vec<(f64, f64)>,
}

/// Characters across and down, without the axes.
const WIDTH: usize = 60;
const HEIGHT: usize = 10;
/// Dots of a braille character across and down.
const DOTS: (usize, usize) = (2, 4);
/// The bit of each dot, by row and column (Unicode, block Braille Patterns).
const BITS: [[u32; 2]; 4] = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]];
const MARK: char = '●';

/// The range of an axis, never empty.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    low: f64,
    high: f64,
}

// === impl Range ===

impl Range {
    pub(crate) fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut range: Option<Self> = None;
        for value in values {
            let old = range.unwrap_or(Self {
                low: value,
                high: value,
            });
            range = Some(Self {
                low: old.low.min(value),
                high: old.high.max(value),
            });
        }
        let mut range = range?;
        if range.high - range.low < f64::EPSILON * range.high.abs().max(1.0) {
            // One value alone lies in the middle.
            range = Self {
                low: range.low - 0.5,
                high: range.high + 0.5,
            };
        }
        Some(range)
    }

    /// Which of `count` places a value falls on.
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "clamped to the places of a small grid"
    )]
    fn place(self, value: f64, count: usize) -> usize {
        let last = count.saturating_sub(1) as f64;
        (self.part(value) * last).round().clamp(0.0, last) as usize
    }

    /// Where a value lies: 0 at the low end, 1 at the high one.
    pub(crate) fn part(self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    /// The value at a part of the way.
    pub(crate) fn at(self, part: f64) -> f64 {
        self.low + part * (self.high - self.low)
    }

    fn middle(self) -> f64 {
        f64::midpoint(self.low, self.high)
    }
}

// === impl Curve ===

impl Curve {
    /// The points that can be drawn.
    pub(crate) fn finite(&self) -> Self {
        let finite = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
            points
                .iter()
                .copied()
                .filter(|(x, y)| x.is_finite() && y.is_finite())
                .collect()
        };
        Self {
            train: finite(&self.train),
            validation: finite(&self.validation),
        }
    }
}

/// The curve as lines of text; `None` with fewer than two points.
pub(crate) fn render(curve: &Curve) -> Option<String> {
    let Curve { train, validation } = curve.finite();
    if train.len() + validation.len() < 2 {
        return None;
    }
    let all = || train.iter().chain(&validation);
    let x = Range::of(all().map(|point| point.0))?;
    let y = Range::of(all().map(|point| point.1))?;
    let mut grid = Grid::default();
    grid.line(&columns(&train, x, y));
    let mut rows = grid.rows();
    for (at_x, at_y) in &validation {
        rows[HEIGHT - 1 - y.place(*at_y, HEIGHT)][x.place(*at_x, WIDTH)] = MARK;
    }
    Some(with_axes(
        &rows,
        x,
        y,
        !train.is_empty(),
        !validation.is_empty(),
    ))
}

/// The mean of the points on each column of dots, as (column, row from above): many steps
/// share a column, and their mean shows the trend where all of them would show a blot.
fn columns(points: &[(f64, f64)], x: Range, y: Range) -> Vec<(usize, usize)> {
    let mut sums = vec![(0.0, 0_u32); WIDTH * DOTS.0];
    for (at_x, at_y) in points {
        let sum = &mut sums[x.place(*at_x, WIDTH * DOTS.0)];
        *sum = (sum.0 + at_y, sum.1 + 1);
    }
    let last = HEIGHT * DOTS.1 - 1;
    let filled = sums.iter().enumerate().filter(|(_, sum)| sum.1 > 0);
    let place = |mean: f64| last - y.place(mean, last + 1);
    filled
        .map(|(column, sum)| (column, place(sum.0 / f64::from(sum.1))))
        .collect()
}

/// Braille dots.
struct Grid {
    cells: Vec<[u32; WIDTH]>,
}

impl Default for Grid {
    fn default() -> Self {
        Self {
            cells: vec![[0; WIDTH]; HEIGHT],
        }
    }
}

// === impl Grid ===

impl Grid {
    fn dot(&mut self, column: usize, row: usize) {
        let bit = BITS[row % DOTS.1][column % DOTS.0];
        self.cells[row / DOTS.1][column / DOTS.0] |= bit;
    }

    /// Joins the points, which come by column, with straight lines.
    fn line(&mut self, points: &[(usize, usize)]) {
        if let [(column, row)] = points {
            self.dot(*column, *row);
        }
        for pair in points.windows(2) {
            let [(from_x, from_y), (to_x, to_y)] = [pair[0], pair[1]];
            let steps = (to_x - from_x).max(from_y.abs_diff(to_y)).max(1);
            for step in 0..=steps {
                // Rounded to the nearest dot, in whole numbers.
                let mix = |a: usize, b: usize| {
                    (a * (steps - step) * 2 + b * step * 2 + steps) / (steps * 2)
                };
                self.dot(mix(from_x, to_x), mix(from_y, to_y));
            }
        }
    }

    fn rows(&self) -> Vec<Vec<char>> {
        let letter = |bits: &u32| match bits {
            0 => ' ',
            bits => char::from_u32(0x2800 + bits).unwrap_or(' '),
        };
        self.cells
            .iter()
            .map(|row| row.iter().map(letter).collect())
            .collect()
    }
}

fn with_axes(rows: &[Vec<char>], x: Range, y: Range, train: bool, validation: bool) -> String {
    let mut text = String::new();
    for (at, row) in rows.iter().enumerate() {
        let label = match at {
            0 => number(y.high),
            at if at == HEIGHT / 2 => number(y.middle()),
            at if at == HEIGHT - 1 => number(y.low),
            _ => String::new(),
        };
        let tick = if label.is_empty() { '│' } else { '┤' };
        let line: String = row.iter().collect();
        text.push_str(format!("{label:>9} {tick}{line}").trim_end());
        text.push('\n');
    }
    text.push_str(&format!("{:>9} └{}\n", "", "─".repeat(WIDTH)));
    let (low, high) = (format!("{:.0}", x.low), format!("{:.0} steps", x.high));
    let gap = WIDTH.saturating_sub(low.len() + high.len());
    text.push_str(&format!("{:>9}  {low}{}{high}\n", "loss", " ".repeat(gap)));
    let legend = match (train, validation) {
        (true, true) => format!("⣀⠤⠒⠉ training   {MARK} validation"),
        (true, false) => "⣀⠤⠒⠉ training".to_owned(),
        _ => format!("{MARK} validation"),
    };
    text.push_str(&format!("{:>9}  {legend}", ""));
    text
}

/// A number in at most nine characters.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        0.001..10000.0 => format!("{value:.4}").chars().take(7).collect(),
        _ => format!("{value:.2e}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    fn falling(steps: u32) -> Vec<(f64, f64)> {
        (1..=steps)
            .map(|step| (f64::from(step), 4.0 / f64::from(step)))
            .collect()
    }

    #[test]
    fn a_falling_loss_falls_on_the_chart() {
        let curve = Curve {
            train: falling(500),
            validation: vec![(500.0, 0.008)],
        };
        let text = render(&curve).unwrap();
        let lines: Vec<Vec<char>> = text.lines().map(|line| line.chars().collect()).collect();
        assert_eq!(lines.len(), HEIGHT + 3);
        let height = |column: usize| {
            let braille = |row: &usize| {
                let letter = lines[*row].get(11 + column).copied().unwrap_or(' ');
                ('\u{2801}'..='\u{28ff}').contains(&letter) || letter == MARK
            };
            (0..HEIGHT).find(braille).unwrap()
        };
        assert!(height(0) < height(10), "{text}");
        assert_eq!(height(40), HEIGHT - 1, "{text}");
        assert_eq!(lines[HEIGHT - 1][11 + WIDTH - 1], MARK, "{text}");
        assert!(text.contains("500 steps") && text.contains("validation"));
    }

    #[test]
    fn odd_input_is_no_panic() {
        let point = |y| vec![(1.0, y)];
        assert_eq!(render(&Curve::default()), None);
        assert_eq!(
            render(&Curve {
                train: point(1.0),
                ..Default::default()
            }),
            None
        );
        let nan = Curve {
            train: vec![(1.0, f64::NAN), (2.0, 1.0), (3.0, f64::INFINITY)],
            ..Default::default()
        };
        assert_eq!(render(&nan), None);
        let flat = Curve {
            train: vec![(1.0, 2.0), (2.0, 2.0)],
            ..Default::default()
        };
        assert!(render(&flat).unwrap().contains("2.5000"));
        let same_step = Curve {
            train: vec![(7.0, 2.0), (7.0, 1.0)],
            ..Default::default()
        };
        assert!(render(&same_step).is_some());
        let tiny = Curve {
            train: vec![(1.0, -1e300), (2.0, 1e300)],
            ..Default::default()
        };
        assert!(render(&tiny).is_some());
    }

    #[test]
    fn numbers_fit_their_place() {
        for value in [0.0, 1.0, -1.0, 0.00001, 123.456, 9999.9, 1e9, -1e-30, 1e300] {
            assert!(number(value).len() <= 9, "{value}: {}", number(value));
        }
    }
}
