//! A figure over the steps of a run, in bounded memory.

use serde_json::{Value, json};

/// The most points of a curve: more than a chart has pixels for.
const MOST: usize = 800;

/// A figure over steps. Once it has [`MOST`] points, neighbours become one, so that a run of a
/// million steps costs no more than a short one.
#[derive(Debug, Default)]
pub(super) struct Curve {
    points: Vec<Point>,
    /// Figures that a point holds, except the last, which may be filling up.
    stride: usize,
}

/// Figures of neighbouring steps.
#[derive(Debug, Clone, Copy)]
struct Point {
    /// The last of their steps.
    step: u64,
    sum: f64,
    count: usize,
    min: f64,
    max: f64,
}

impl Point {
    fn join(&mut self, next: &Self) {
        self.step = next.step;
        self.sum += next.sum;
        self.count += next.count;
        self.min = self.min.min(next.min);
        self.max = self.max.max(next.max);
    }
}

impl Curve {
    /// Adds the figure of a step, later than those before.
    pub(super) fn add(&mut self, step: u64, figure: f64) {
        let point = Point { step, sum: figure, count: 1, min: figure, max: figure };
        match self.points.last_mut() {
            Some(last) if last.count < self.stride => last.join(&point),
            _ => self.points.push(point),
        }
        if self.points.len() > MOST {
            self.halve();
        }
    }

    fn halve(&mut self) {
        let pair = |pair: &[Point]| {
            let mut joined = pair[0];
            pair[1..].iter().for_each(|next| joined.join(next));
            joined
        };
        self.points = self.points.chunks(2).map(pair).collect();
        self.stride = self.stride.max(1) * 2;
    }

    /// `[step, figure]` for each point, or `[step, mean, least, most]` where it stands for several.
    pub(super) fn to_json(&self) -> Value {
        let row = |point: &Point| match point.count {
            1 => json!([point.step, rounded(point.sum)]),
            count => json!([
                point.step,
                rounded(point.sum / count as f64),
                rounded(point.min),
                rounded(point.max)
            ]),
        };
        self.points.iter().map(row).collect()
    }
}

/// Six significant digits: what a chart can show, in half the bytes.
fn rounded(figure: f64) -> f64 {
    format!("{figure:.5e}").parse().unwrap_or(figure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_steps_stay_few_points_with_their_mean_and_extremes() {
        let mut curve = Curve::default();
        for step in 1..=1_000_000_u64 {
            curve.add(step, if step == 4321 { 500.0 } else { (step % 2) as f64 });
        }
        assert!((MOST / 2..=MOST).contains(&curve.points.len()), "{}", curve.points.len());
        assert_eq!(curve.points.iter().map(|point| point.count).sum::<usize>(), 1_000_000);
        assert!(curve.points.is_sorted_by_key(|point| point.step));
        assert_eq!(curve.points.last().map(|point| point.step), Some(1_000_000));
        let most: Vec<f64> = curve.points.iter().map(|point| point.max).collect();
        assert_eq!(most.iter().filter(|&&max| max == 500.0).count(), 1, "a spike stays visible");
        assert!(curve.to_json().to_string().len() < 40_000);
    }

    #[test]
    fn few_points_stay_as_they_are() {
        let mut curve = Curve::default();
        curve.add(10, 0.123_456_789);
        curve.add(20, 2e-5);
        assert_eq!(curve.to_json(), json!([[10, 0.123_457], [20, 2e-5]]));
    }
}
