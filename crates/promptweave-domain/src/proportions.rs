//! Accuracies as proportions of a sample: their intervals, and the difference of two on the same samples.

/// The 97.5 % quantile of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// The 95 % interval of a proportion, `successes` of `n` > 0 (Wilson 1927).
pub fn wilson(successes: usize, n: usize) -> [f64; 2] {
    let (n, z2) = (n as f64, Z * Z);
    let p = successes as f64 / n;
    let centre = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    [(centre - half).max(0.0), (centre + half).min(1.0)]
}

/// Two predictions of the same samples: how often one alone is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paired {
    /// Samples that the first alone has right.
    pub first: usize,
    /// Samples that the second alone has right.
    pub second: usize,
    /// All samples, more than 0.
    pub n: usize,
}

impl Paired {
    /// Compares two predictions sample by sample: whether each is right.
    ///
    /// # Panics
    /// If there are no samples, or not as many of both.
    pub fn of(first: &[bool], second: &[bool]) -> Self {
        assert!(first.len() == second.len() && !first.is_empty());
        let alone = |a: &[bool], b: &[bool]| a.iter().zip(b).filter(|(a, b)| **a && !**b).count();
        Self {
            first: alone(first, second),
            second: alone(second, first),
            n: first.len(),
        }
    }

    /// The first's accuracy minus the second's.
    pub fn difference(self) -> f64 {
        (self.first as f64 - self.second as f64) / self.n as f64
    }

    /// The 95 % interval of the difference, after half a sample is added to each of the four cells (Agresti & Min 2005).
    pub fn interval(self) -> [f64; 2] {
        let (b, c) = (self.first as f64 + 0.5, self.second as f64 + 0.5);
        let n = self.n as f64 + 2.0;
        let centre = (b - c) / n;
        let half = Z * ((b + c) - (b - c).powi(2) / n).sqrt() / n;
        [(centre - half).max(-1.0), (centre + half).min(1.0)]
    }

    /// The two-sided p-value of equal accuracies: McNemar's test, exact.
    pub fn p_value(self) -> f64 {
        let (fewer, n) = (self.first.min(self.second), self.first + self.second);
        // P(X ≤ fewer) of a fair coin thrown n times, from the logarithms of its terms.
        let mut log_term = -(n as f64) * std::f64::consts::LN_2;
        let mut tail = log_term.exp();
        for k in 1..=fewer {
            log_term += ((n - k + 1) as f64 / k as f64).ln();
            tail += log_term.exp();
        }
        (2.0 * tail).min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9, "{found}, not {expected}");
    }

    /// Values of scipy 1.17: `binomtest(k, n).proportion_ci(method="wilson")` and `binomtest(min(b, c), b + c).pvalue`.
    #[test]
    fn intervals_and_p_values_are_scipys() {
        for (k, n, low, high) in [
            (81, 263, 0.255_288_519_878_274_2, 0.366_209_576_982_800_04),
            (0, 10, 0.0, 0.277_532_799_862_889_3),
        ] {
            let [a, b] = wilson(k, n);
            close(a, low);
            close(b, high);
        }
        for (first, second, p) in [(12, 5, 0.143_463_134_765_625), (0, 0, 1.0), (3, 3, 1.0)] {
            let paired = Paired {
                first,
                second,
                n: 100,
            };
            close(paired.p_value(), p);
        }
        // A thousand throws do not overflow.
        let many = Paired {
            first: 620,
            second: 380,
            n: 5000,
        };
        assert!(many.p_value() > 0.0 && many.p_value() < 1e-12);
    }

    #[test]
    fn a_difference_is_that_of_the_accuracies_and_its_interval_turns_with_it() {
        let a = [true, true, false, true, false, true];
        let b = [true, false, false, false, true, true];
        let paired = Paired::of(&a, &b);
        assert_eq!((paired.first, paired.second), (2, 1));
        close(paired.difference(), 1.0 / 6.0);
        let turned = Paired::of(&b, &a);
        let ([low, high], [other_low, other_high]) = (paired.interval(), turned.interval());
        close(low, -other_high);
        close(high, -other_low);
        assert!(low < paired.difference() && paired.difference() < high);
        assert_eq!(paired.p_value(), turned.p_value());
    }
}
