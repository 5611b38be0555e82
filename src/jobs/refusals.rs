//! The reasons why a request cannot become a job, all of them together, each with its place in the request.

use crate::registry::RegistryError;
use promptweave_domain::compatibility::Incompatible;
use promptweave_domain::objective::InvalidObjective;

#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// At least one refusal.
    #[error("{}", .0.iter().map(|refusal| refusal.detail.as_str()).collect::<Vec<_>>().join("; "))]
    Refused(Vec<Refusal>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// A stable code in snake_case.
    pub code: &'static str,
    /// JSON pointer into the request.
    pub pointer: String,
    pub detail: String,
}

/// A refusal as the result of a check.
pub(super) fn refuse<T>(
    code: &'static str,
    pointer: impl Into<String>,
    detail: impl Into<String>,
) -> Result<T, Refusal> {
    let (pointer, detail) = (pointer.into(), detail.into());
    Err(Refusal {
        code,
        pointer,
        detail,
    })
}

/// A check of what goes together, with the place in the request.
pub(super) fn compatible<T>(
    pointer: impl Into<String>,
    checked: Result<T, Incompatible>,
) -> Result<T, Refusal> {
    checked.or_else(|Incompatible { code, detail }| refuse(code.name(), pointer, detail))
}

/// The mistakes of one request so far. Checks that do not depend on them still run.
#[derive(Debug, Default)]
pub struct Refusals(Vec<Refusal>);

impl Refusals {
    /// The result of a check, or `None` with its mistake noted.
    pub fn note<T>(&mut self, checked: Result<T, Refusal>) -> Option<T> {
        match checked {
            Ok(value) => Some(value),
            Err(refusal) => {
                self.add(refusal);
                None
            }
        }
    }

    /// Adds a refusal, unless its place has one already, which may have caused it.
    pub fn add(&mut self, refusal: Refusal) {
        if self.0.iter().all(|told| told.pointer != refusal.pointer) {
            self.0.push(refusal);
        }
    }

    /// Adds the mistakes in the request's field `objective`.
    pub fn of_objective(&mut self, mistakes: impl IntoIterator<Item = InvalidObjective>) {
        for invalid in mistakes {
            self.add(Refusal {
                code: "invalid_objective",
                pointer: format!("/objective/{}", invalid.field.replace('.', "/")),
                detail: invalid.to_string(),
            });
        }
    }

    /// Returns what was made of the request, if it has no mistake. If nothing was made, there is one.
    pub fn finish<T>(self, made: Option<T>) -> Result<T, PlanError> {
        match made {
            Some(made) if self.0.is_empty() => Ok(made),
            _ => Err(PlanError::Refused(self.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_are_told_together_and_one_of_each_place() {
        let mut refusals = Refusals::default();
        assert_eq!(refusals.note(Ok(3)), Some(3));
        for (pointer, detail) in [("/a", "one"), ("/b", "two"), ("/a", "of one")] {
            assert_eq!(refusals.note::<()>(refuse("wrong", pointer, detail)), None);
        }
        let Err(error) = refusals.finish(Some(())) else {
            panic!("it has mistakes");
        };
        assert_eq!(error.to_string(), "one; two");
        assert!(Refusals::default().finish(Some(())).is_ok());
    }
}
