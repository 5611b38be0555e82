//! Labels as files contain them, numbers or names, and their classes.

use std::collections::{BTreeSet, HashMap};

use serde::Deserialize;

use crate::dataset::MAX_CLASSES;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(untagged)]
pub enum Label {
    Number(i64),
    Name(String),
}

/// Why a label belongs to no class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoClass {
    /// The label is below 0; datasets use -1 for a missing label.
    Negative(i64),
    /// The label is at least the number of classes.
    Outside { label: i64, classes: usize },
    /// The label is not among the class names, or is a number while labels are names.
    Unknown { label: String, classes: usize },
}

/// The class names in label order, and each name's position.
pub struct Classes {
    pub names: Vec<String>,
    places: HashMap<String, usize>,
    /// Whether a number is the index of a name, or itself a name like others.
    numbers_are_indices: bool,
}

impl Label {
    /// Parses a label from a text file; `None` if it is neither a number nor a name.
    pub fn of_text(text: &str) -> Option<Self> {
        let text = text.trim();
        match text.parse() {
            Ok(number) => Some(Self::Number(number)),
            Err(_) if text.is_empty() || text.contains(char::is_control) => None,
            Err(_) => Some(Self::Name(text.to_owned())),
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Name(name) => name.clone(),
        }
    }
}

impl Classes {
    /// The classes with the names in `named`. Without names, the classes are the numbers up to the
    /// largest, or the sorted labels if some are names.
    pub fn of<'a>(named: Option<Vec<String>>, labels: impl Iterator<Item = &'a Label>) -> Self {
        let labels: BTreeSet<_> = labels.collect();
        let only_numbers = labels.iter().all(|it| matches!(it, Label::Number(_)));
        let numbers_are_indices = named.is_some() || only_numbers;
        let names = named.unwrap_or_else(|| match labels.last() {
            // A label beyond the limit gets no name, and is refused.
            Some(Label::Number(largest)) => (0..=(*largest).min(MAX_CLASSES as i64 - 1))
                .map(|number| number.to_string())
                .collect(),
            _ => {
                let names: BTreeSet<_> = labels.into_iter().map(Label::text).collect();
                names.into_iter().collect()
            }
        });
        let numbered = names.iter().cloned().enumerate();
        Self {
            places: numbered.map(|(place, name)| (name, place)).collect(),
            names,
            numbers_are_indices,
        }
    }

    pub fn index(&self, label: &Label) -> Result<usize, NoClass> {
        let classes = self.names.len();
        match label {
            Label::Number(number) if *number < 0 => Err(NoClass::Negative(*number)),
            Label::Number(number) if self.numbers_are_indices => {
                let index = usize::try_from(*number).ok();
                index
                    .filter(|index| *index < classes)
                    .ok_or(NoClass::Outside {
                        label: *number,
                        classes,
                    })
            }
            label => {
                let label = label.text();
                let place = self.places.get(&label).copied();
                place.ok_or(NoClass::Unknown { label, classes })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classes(named: Option<&[&str]>, labels: &[Label]) -> Classes {
        let named = named.map(|names| names.iter().map(|&name| name.to_owned()).collect());
        Classes::of(named, labels.iter())
    }

    #[test]
    fn numbers_are_indices_unless_they_stand_among_unnamed_names() {
        let number = |number| Label::of_text(&format!(" {number}\n")).unwrap();
        let name = |name| Label::of_text(name).unwrap();
        let counted = classes(None, &[number(2), number(0)]);
        assert_eq!(counted.names, ["0", "1", "2"]);
        assert_eq!(counted.index(&number(2)), Ok(2));
        let named = classes(Some(&["b", "7"]), &[number(1), name("b")]);
        assert_eq!(named.index(&number(1)), Ok(1));
        assert_eq!(named.index(&name("7")), Err(outside(7, 2)));
        assert_eq!(named.index(&name("b")), Ok(0));
        let mixed = classes(None, &[number(9), name("cat")]);
        assert_eq!(mixed.names, ["9", "cat"]);
        assert_eq!(mixed.index(&number(9)), Ok(0));
        let unknown = NoClass::Unknown {
            label: "1".to_owned(),
            classes: 2,
        };
        assert_eq!(mixed.index(&number(1)), Err(unknown));
    }

    fn outside(label: i64, classes: usize) -> NoClass {
        NoClass::Outside { label, classes }
    }

    #[test]
    fn a_label_below_zero_is_none_and_a_huge_one_makes_no_huge_list() {
        for labels in [
            vec![Label::Number(-1)],
            vec![Label::Number(-1), Label::Name("a".into())],
        ] {
            let classes = classes(None, &labels);
            assert_eq!(
                classes.index(&Label::Number(-1)),
                Err(NoClass::Negative(-1))
            );
        }
        let huge = Label::Number(i64::MAX);
        let classes = classes(None, std::slice::from_ref(&huge));
        assert_eq!(classes.names.len(), MAX_CLASSES);
        assert_eq!(classes.index(&huge), Err(outside(i64::MAX, MAX_CLASSES)));
        assert_eq!(Label::of_text(" \n"), None);
        assert_eq!(Label::of_text("a\nb"), None);
    }
}
