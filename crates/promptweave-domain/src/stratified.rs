//! A choice of samples that keeps every class and its share.

use std::collections::BTreeMap;

use crate::digest::Digest;

/// Chooses at most `max_samples` of `labels`, seeded and stratified. Returns sorted positions.
///
/// Classes keep their share (largest remainder), and every class keeps at least one sample if
/// `max_samples` allows. Within a class the samples with the smallest sha256(seed, position) are
/// taken. So the choice depends on no random generator's version, and a larger `max_samples` only
/// adds samples to a class.
pub fn stratified_subset(labels: &[usize], max_samples: usize, seed: u64) -> Vec<usize> {
    if labels.len() <= max_samples {
        return (0..labels.len()).collect();
    }
    let mut by_class: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (position, label) in labels.iter().enumerate() {
        by_class.entry(*label).or_default().push(position);
    }
    let key = |position: usize| {
        let mut text = seed.to_le_bytes().to_vec();
        text.extend((position as u64).to_le_bytes());
        Digest::of(&text)
    };
    let sizes: Vec<usize> = by_class.values().map(Vec::len).collect();
    let mut chosen: Vec<usize> = by_class
        .into_values()
        .zip(shares(&sizes, max_samples))
        .flat_map(|(mut positions, share)| {
            positions.sort_by_cached_key(|p| key(*p));
            positions.truncate(share);
            positions
        })
        .collect();
    chosen.sort_unstable();
    chosen
}

/// Splits `total` (less than the sum of `sizes`) in proportion to `sizes`. Each share is the floor
/// of the exact share, but at least 1; the largest remainders get one more. What the raised shares
/// cost is taken from the largest shares.
fn shares(sizes: &[usize], total: usize) -> Vec<usize> {
    let all: usize = sizes.iter().sum();
    let mut shares: Vec<usize> = sizes.iter().map(|s| (s * total / all).max(1)).collect();
    let mut by_remainder: Vec<usize> = (0..sizes.len()).collect();
    by_remainder.sort_by_key(|&c| (std::cmp::Reverse(sizes[c] * total % all), c));
    for &class in by_remainder.iter().cycle().take(sizes.len() * 2) {
        if shares.iter().sum::<usize>() < total && shares[class] < sizes[class] {
            shares[class] += 1;
        }
    }
    while shares.iter().sum::<usize>() > total {
        let largest = (0..shares.len())
            .rev()
            .max_by_key(|&c| shares[c])
            .expect("not empty");
        shares[largest] -= 1;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_subset_keeps_every_class_and_its_share() {
        let labels: Vec<usize> = (0..1000).map(|i| if i < 5 { 2 } else { i % 2 }).collect();
        let subset = stratified_subset(&labels, 100, 7);
        assert_eq!(subset.len(), 100);
        assert!(subset.is_sorted());
        let count = |class| subset.iter().filter(|&&i| labels[i] == class).count();
        assert_eq!(count(2), 1);
        assert!(count(0).abs_diff(count(1)) <= 1);
        assert_eq!(subset, stratified_subset(&labels, 100, 7));
        assert_ne!(subset, stratified_subset(&labels, 100, 8));
        assert_eq!(
            stratified_subset(&labels[..10], 100, 7),
            (0..10).collect::<Vec<_>>()
        );
    }
}
