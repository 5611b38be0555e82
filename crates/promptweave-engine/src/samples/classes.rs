//! Numbering of the classes that are present among some labels.

/// The distinct labels, in order.
pub fn present<L: Ord + Copy>(labels: &[L]) -> Vec<L> {
    let mut classes = labels.to_vec();
    classes.sort_unstable();
    classes.dedup();
    classes
}

/// Each label's position among those present, and their number.
pub fn numbered<L: Ord + Copy>(labels: &[L]) -> (Vec<usize>, usize) {
    let present = present(labels);
    let place = |label| present.binary_search(label).expect("it is present");
    (labels.iter().map(place).collect(), present.len())
}
