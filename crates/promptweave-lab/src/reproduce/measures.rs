//! The statistics of the tables: means with deviations, paired differences with intervals, rank
//! correlations.

use statrs::distribution::{ContinuousCDF as _, StudentsT};

/// Mean and sample standard deviation (0 of one number).
pub fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (
        mean,
        if values.len() > 1 {
            (squares / (n - 1.0)).sqrt()
        } else {
            0.0
        },
    )
}

/// Half the width of Student's 95 % interval of the mean; `None` for fewer than two numbers.
pub fn half_interval(values: &[f64]) -> Option<f64> {
    let n = values.len() as f64;
    let (_, deviation) = mean_and_deviation(values);
    let student = StudentsT::new(0.0, 1.0, n - 1.0).ok()?;
    Some(student.inverse_cdf(0.975) * deviation / n.sqrt())
}

/// Spearman's rank correlation, with ties at their average rank; `None` if one side is constant.
pub fn spearman(x: &[f64], y: &[f64]) -> Option<f64> {
    let (x, y) = (ranks(x), ranks(y));
    let (mean_x, mean_y) = (mean_and_deviation(&x).0, mean_and_deviation(&y).0);
    let product = |a: &[f64], ma: f64, b: &[f64], mb: f64| -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - ma) * (b - mb)).sum()
    };
    let size = product(&x, mean_x, &x, mean_x) * product(&y, mean_y, &y, mean_y);
    (size > 0.0).then(|| product(&x, mean_x, &y, mean_y) / size.sqrt())
}

/// The ranks of the values, from 1 up.
fn ranks(values: &[f64]) -> Vec<f64> {
    let rank = |value: &f64| {
        let below = values.iter().filter(|other| *other < value).count();
        let equal = values.iter().filter(|other| *other == value).count();
        below as f64 + (equal as f64 + 1.0) / 2.0
    };
    values.iter().map(rank).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ranks 3, 1.5, 1.5, 5, 4 and 3, 1, 2, 4.5, 4.5; Student's t at 0.975 with four degrees of freedom from tables.
    #[test]
    fn they_are_what_is_found_by_hand() {
        let x = [0.1, 0.0, 0.0, 0.5, 0.4];
        let y = [3.0, 1.0, 2.0, 9.0, 9.0];
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} {b}");
        close(spearman(&x, &y).unwrap(), 9.0 / 9.5);
        assert_eq!(spearman(&x, &[1.0; 5]), None);
        close(spearman(&x, &x).unwrap(), 1.0);
        let (mean, deviation) = mean_and_deviation(&x);
        close(mean, 0.2);
        close(deviation, 0.055f64.sqrt());
        close(
            half_interval(&x).unwrap(),
            2.776445105198 * (0.055f64 / 5.0).sqrt(),
        );
        assert_eq!(half_interval(&x[..1]), None);
    }
}
