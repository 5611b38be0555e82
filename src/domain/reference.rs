//! How resources are named, and how a version of one is referred to.
//!
//! | reference | means |
//! |---|---|
//! | `name` | the newest version that is not deprecated |
//! | `name:3` | version 3 |
//! | `name@sha256:<hex>` | the version with these bytes |

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::digest::Digest;

/// A prompt's, backbone's or data set's name: `[a-z0-9][a-z0-9._-]{0,127}`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ResourceName(String);

impl ResourceName {
    /// The rule, as the database and the API document state it.
    pub const PATTERN: &'static str = "^[a-z0-9][a-z0-9._-]{0,127}$";

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Which version of a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VersionSelector {
    /// The newest that is not deprecated.
    Newest,
    /// Counted from 1.
    Number(i32),
    Digest(Digest),
}

/// A version of a prompt or a data set.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reference {
    pub name: ResourceName,
    pub version: VersionSelector,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidReference {
    #[error(
        "`{0}` is not a name: expected 1 to 128 of a-z, 0-9, `.`, `_` and `-`, beginning with a \
         letter or a digit"
    )]
    Name(String),
    #[error("`{0}` is not a version: expected a number from 1 or `sha256:` and 64 hex digits")]
    Version(String),
    #[error(
        "`{0}` reads as an alias, and aliases are not supported yet; refer to a version as `name`, \
         `name:3` or `name@sha256:<hex>`"
    )]
    Alias(String),
}

impl VersionSelector {
    /// Roughly what it looks like alone in a path; the API document states it.
    pub const PATTERN: &'static str = "^([a-z0-9][a-z0-9._-]{0,127}|sha256:[0-9a-f]{64})$";
}

impl FromStr for ResourceName {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let valid = text.len() <= 128
            && text.starts_with(plain)
            && text.chars().all(|c| plain(c) || "._-".contains(c));
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidReference::Name(text.to_owned()))
        }
    }
}

/// A selector as it stands alone in a path: `3` or `sha256:<hex>`.
impl FromStr for VersionSelector {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        let invalid = || InvalidReference::Version(text.to_owned());
        if text.starts_with("sha256") {
            return text.parse().map(Self::Digest).map_err(|_| invalid());
        }
        if !text.is_empty() && text.chars().all(|c| c.is_ascii_digit()) {
            let number = text.parse().map_err(|_| invalid())?;
            return if number >= 1 {
                Ok(Self::Number(number))
            } else {
                Err(invalid())
            };
        }
        match text.parse::<ResourceName>() {
            Ok(_) => Err(InvalidReference::Alias(text.to_owned())),
            Err(_) => Err(invalid()),
        }
    }
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        let (name, version) = match (text.split_once('@'), text.split_once(':')) {
            (Some((name, digest)), _) => match digest.parse() {
                Ok(digest) => (name, VersionSelector::Digest(digest)),
                Err(_) => return Err(InvalidReference::Version(digest.to_owned())),
            },
            (None, Some((name, version))) => match version.parse()? {
                // `name:sha256:…` is a slip of the pen for `name@sha256:…`.
                VersionSelector::Digest(_) => {
                    return Err(InvalidReference::Version(version.to_owned()));
                }
                version => (name, version),
            },
            (None, None) => (text, VersionSelector::Newest),
        };
        Ok(Self {
            name: name.parse()?,
            version,
        })
    }
}

impl fmt::Display for ResourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.version {
            VersionSelector::Newest => write!(f, "{}", self.name),
            VersionSelector::Number(number) => write!(f, "{}:{number}", self.name),
            VersionSelector::Digest(digest) => write!(f, "{}@{digest}", self.name),
        }
    }
}

impl TryFrom<String> for ResourceName {
    type Error = InvalidReference;

    fn try_from(text: String) -> Result<Self, InvalidReference> {
        text.parse()
    }
}

impl From<ResourceName> for String {
    fn from(name: ResourceName) -> String {
        name.0
    }
}

impl TryFrom<String> for Reference {
    type Error = InvalidReference;

    fn try_from(text: String) -> Result<Self, InvalidReference> {
        text.parse()
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> String {
        reference.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_read_back_from_their_own_text() {
        let digest = Digest::of(b"x");
        for (text, version) in [
            ("cifar-100".to_owned(), VersionSelector::Newest),
            ("cifar-100:12".to_owned(), VersionSelector::Number(12)),
            (
                format!("cifar-100@{digest}"),
                VersionSelector::Digest(digest),
            ),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference.name.as_str(), "cifar-100");
            assert_eq!(reference.version, version);
            assert_eq!(reference.to_string(), text);
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let refusal = |text: &str| text.parse::<Reference>().unwrap_err();
        assert!(matches!(refusal("x:production"), InvalidReference::Alias(a) if a == "production"));
        assert!(matches!(refusal("x:0"), InvalidReference::Version(_)));
        assert!(matches!(
            refusal("x:99999999999"),
            InvalidReference::Version(_)
        ));
        assert!(matches!(
            refusal("x@sha256:abc"),
            InvalidReference::Version(_)
        ));
        assert!(matches!(refusal("x@3"), InvalidReference::Version(_)));
        let digest = Digest::of(b"x");
        assert!(matches!(
            refusal(&format!("x:{digest}")),
            InvalidReference::Version(_)
        ));
        for name in ["", "Big", "-x", "../etc", "a/b", "ü", &"a".repeat(129)] {
            assert!(matches!(refusal(name), InvalidReference::Name(_)), "{name}");
        }
    }
}
