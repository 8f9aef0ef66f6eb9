//! A loss curve as a picture: the training loss as a line, evaluations as points joined, two axes. Knows numbers only; what
//! is drawn stands in one element, so that it is a file of its own and a part of a page alike.

use std::fmt::Write as _;

use crate::cli::chart::{Curve, Range, number};

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 320.0;
/// Room for the axes: left, top, right, below.
const MARGIN: [f64; 4] = [64.0, 16.0, 16.0, 40.0];
/// Lines across.
const TICKS: u32 = 4;
/// Points of the training line at most; more share their mean.
const POINTS: usize = 380;

/// The picture; `None` with fewer than two points.
pub(crate) fn render(curve: &Curve) -> Option<String> {
    let curve = curve.finite();
    if curve.train.len() + curve.validation.len() < 2 {
        return None;
    }
    let all = || curve.train.iter().chain(&curve.validation);
    let axes = Axes {
        x: Range::of(all().map(|point| point.0))?,
        y: Range::of(all().map(|point| point.1))?,
    };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         aria-label=\"loss by step\" font-family=\"system-ui, sans-serif\" font-size=\"12\">\n\
         <style>.grid{{stroke:#8883;stroke-width:1}}.text{{fill:#778}}.train{{fill:none;stroke:#2f6fde;stroke-width:1.6}}\
         .valid{{fill:none;stroke:#d9762b;stroke-width:1.6;stroke-dasharray:4 3}}.mark{{fill:#d9762b}}</style>\n"
    );
    axes.draw(&mut svg);
    axes.line(&mut svg, "train", &shared(&curve.train));
    axes.line(&mut svg, "valid", &curve.validation);
    for point in &curve.validation {
        let (x, y) = axes.place(*point);
        let title = format!("step {:.0}: {}", point.0, number(point.1));
        let mark = "<circle class=\"mark\" r=\"3.5\"";
        let _ = writeln!(
            svg,
            "{mark} cx=\"{x:.1}\" cy=\"{y:.1}\"><title>{title}</title></circle>"
        );
    }
    legend(&mut svg, &curve);
    svg.push_str("</svg>\n");
    Some(svg)
}

/// Neighbours' means, so that many steps are a line and no blot.
fn shared(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let together = points.len().div_ceil(POINTS).max(1);
    let mean = |part: &[(f64, f64)]| {
        #[allow(clippy::cast_precision_loss, reason = "a few points")]
        let count = part.len() as f64;
        let sum = part
            .iter()
            .fold((0.0, 0.0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
        (sum.0 / count, sum.1 / count)
    };
    points.chunks(together).map(mean).collect()
}

fn legend(svg: &mut String, curve: &Curve) {
    let names = [
        ("train", "training", !curve.train.is_empty()),
        ("valid", "validation", !curve.validation.is_empty()),
    ];
    let mut right = WIDTH - MARGIN[2];
    for (class, name, _) in names.iter().rev().filter(|(_, _, there)| *there) {
        let (from, y) = (right - 96.0, MARGIN[1] + 6.0);
        let _ = writeln!(
            svg,
            "<path class=\"{class}\" d=\"M{from:.0} {y}h22\"/><text class=\"text\" x=\"{:.0}\" y=\"{}\">{name}</text>",
            from + 28.0,
            y + 4.0,
        );
        right = from;
    }
}

struct Axes {
    x: Range,
    y: Range,
}

// === impl Axes ===

impl Axes {
    fn place(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let [left, top, right, below] = MARGIN;
        (
            left + self.x.part(x) * (WIDTH - left - right),
            top + (1.0 - self.y.part(y)) * (HEIGHT - top - below),
        )
    }

    fn draw(&self, svg: &mut String) {
        let [left, top, right, below] = MARGIN;
        for tick in 0..=TICKS {
            let part = f64::from(tick) / f64::from(TICKS);
            let y = top + (1.0 - part) * (HEIGHT - top - below);
            let x = left + part * (WIDTH - left - right);
            let _ = writeln!(
                svg,
                "<path class=\"grid\" d=\"M{left} {y:.1}H{:.0}\"/>\
                 <text class=\"text\" text-anchor=\"end\" x=\"{:.0}\" y=\"{:.1}\">{}</text>\
                 <text class=\"text\" text-anchor=\"middle\" x=\"{x:.1}\" y=\"{:.0}\">{:.0}</text>",
                WIDTH - right,
                left - 8.0,
                y + 4.0,
                number(self.y.at(part)),
                HEIGHT - below + 18.0,
                self.x.at(part),
            );
        }
        let (x, y) = (WIDTH / 2.0, HEIGHT - 6.0);
        let _ = writeln!(
            svg,
            "<text class=\"text\" text-anchor=\"middle\" x=\"{x}\" y=\"{y}\">step</text>"
        );
    }

    fn line(&self, svg: &mut String, class: &str, points: &[(f64, f64)]) {
        let places: Vec<String> = points
            .iter()
            .map(|point| self.place(*point))
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        if places.len() > 1 {
            let _ = writeln!(
                svg,
                "<polyline class=\"{class}\" points=\"{}\"/>",
                places.join(" ")
            );
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn a_falling_loss_falls_and_evaluations_are_marked() {
        let train = (1..=2000_u32).map(|step| (f64::from(step), 4.0 / f64::from(step)));
        let curve = Curve {
            train: train.chain([(2001.0, f64::NAN)]).collect(),
            validation: vec![(0.0, 4.0), (2000.0, 0.5)],
        };
        let svg = render(&curve).unwrap();
        assert_eq!(svg.matches("<circle").count(), 2);
        let line = svg
            .lines()
            .find(|line| line.contains("polyline class=\"train\""))
            .unwrap();
        let heights: Vec<f64> = line
            .split_once("points=\"")
            .unwrap()
            .1
            .trim_end_matches("\"/>")
            .split(' ')
            .map(|point| point.split_once(',').unwrap().1.parse().unwrap())
            .collect();
        assert!(heights.len() <= POINTS && heights.len() > POINTS / 2);
        // Down the page is a lower loss.
        assert!(heights.is_sorted() && heights[0] < heights[heights.len() - 1]);
        assert!(!svg.contains("NaN"));
        assert_eq!(render(&Curve::default()), None);
    }
}
