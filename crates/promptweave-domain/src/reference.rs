//! Names of resources, and references to a version of one.
//!
//! | reference | means |
//! |---|---|
//! | `name` | the newest version that is not deprecated |
//! | `name:3` | version 3 |
//! | `name:production` | the version that the alias `production` points to; datasets have none |
//! | `name@sha256:<hex>` | the version with these bytes |

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// The most characters of a name.
pub const MAX_NAME_LENGTH: usize = 128;

/// The name of a prompt, backbone or dataset: `[a-z0-9][a-z0-9._-]{0,127}`.
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

/// A movable name of one of a prompt's versions. It is a [`ResourceName`] that reads neither as a
/// number nor as a digest: it is not all digits and does not begin with `sha256`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AliasName(String);

impl AliasName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A choice of one version of a resource.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum VersionSelector {
    /// The newest version that is not deprecated.
    Newest,
    /// The version with this number, counted from 1.
    Number(i32),
    Alias(AliasName),
    Digest(Digest),
}

/// A version of a prompt or a dataset.
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
    #[error(
        "`{0}` is not a version: expected a number from 1, an alias, or `sha256:` and 64 hex digits"
    )]
    Version(String),
    #[error(
        "`{0}` is not an alias: expected 1 to 128 of a-z, 0-9, `.`, `_` and `-`, beginning with a \
         letter or a digit, not all digits and not beginning with `sha256`"
    )]
    Alias(String),
}

impl VersionSelector {
    /// The pattern of a selector alone in a path, as the API document states it. It is a little
    /// wider than what is parsed.
    pub const PATTERN: &'static str = "^([a-z0-9][a-z0-9._-]{0,127}|sha256:[0-9a-f]{64})$";
}

impl FromStr for ResourceName {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let valid = text.len() <= MAX_NAME_LENGTH
            && text.starts_with(plain)
            && text.chars().all(|c| plain(c) || "._-".contains(c));
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidReference::Name(text.to_owned()))
        }
    }
}

impl FromStr for AliasName {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        let reads_otherwise =
            text.starts_with("sha256") || text.chars().all(|c| c.is_ascii_digit());
        match text.parse::<ResourceName>() {
            Ok(_) if !reads_otherwise => Ok(Self(text.to_owned())),
            _ => Err(InvalidReference::Alias(text.to_owned())),
        }
    }
}

/// Parses a selector alone in a path: `3`, `production` or `sha256:<hex>`.
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
        text.parse().map(Self::Alias).map_err(|_| invalid())
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

impl fmt::Display for AliasName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            VersionSelector::Newest => write!(f, "{}", self.name),
            VersionSelector::Number(number) => write!(f, "{}:{number}", self.name),
            VersionSelector::Alias(alias) => write!(f, "{}:{alias}", self.name),
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

impl TryFrom<String> for AliasName {
    type Error = InvalidReference;

    fn try_from(text: String) -> Result<Self, InvalidReference> {
        text.parse()
    }
}

impl From<AliasName> for String {
    fn from(alias: AliasName) -> String {
        alias.0
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
    use proptest::prelude::*;

    use super::*;

    fn reference() -> impl Strategy<Value = Reference> {
        let name = "[a-z0-9][a-z0-9._-]{0,127}";
        let alias = name.prop_filter_map("reads otherwise", |text| text.parse().ok());
        let version = prop_oneof![
            Just(VersionSelector::Newest),
            (1..=i32::MAX).prop_map(VersionSelector::Number),
            alias.prop_map(VersionSelector::Alias),
            any::<[u8; 32]>().prop_map(|b| VersionSelector::Digest(Digest::from_bytes(b))),
        ];
        (name, version).prop_map(|(name, version)| Reference {
            name: name.parse().unwrap(),
            version,
        })
    }

    proptest! {
        #[test]
        fn references_read_back_from_their_own_text(reference in reference()) {
            let text = reference.to_string();
            prop_assert_eq!(text.parse::<Reference>().unwrap(), reference);
        }

        #[test]
        fn what_reads_as_a_reference_is_written_as_one(text in "[a-z0-9:@._-]{1,20}|\\PC{0,20}") {
            if let Ok(reference) = text.parse::<Reference>() {
                let written = reference.to_string();
                // Numbers may have leading zeros.
                prop_assert_eq!(written.parse::<Reference>().unwrap(), reference);
            }
        }
    }

    #[test]
    fn each_form_has_its_meaning() {
        let digest = Digest::of(b"x");
        for (text, version) in [
            ("cifar-100".to_owned(), VersionSelector::Newest),
            ("cifar-100:12".to_owned(), VersionSelector::Number(12)),
            (
                "cifar-100:production".to_owned(),
                VersionSelector::Alias(AliasName("production".into())),
            ),
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
        let digest = Digest::of(b"x");
        let colon = format!("x:{digest}");
        for version in [
            "x:0",
            "x:99999999999",
            "x:",
            "x:A",
            "x:sha256",
            "x:sha256-1",
            "x:a:b",
            "x@sha256:abc",
            "x@3",
            "x@production",
            &colon,
        ] {
            assert!(
                matches!(refusal(version), InvalidReference::Version(_)),
                "{version}"
            );
        }
        for name in ["", "Big", "-x", "../etc", "a/b", "ü", &"a".repeat(129)] {
            assert!(matches!(refusal(name), InvalidReference::Name(_)), "{name}");
        }
        for alias in ["", "3", "007", "sha256", "sha256:1", "Prod", "a/b"] {
            let refused = alias.parse::<AliasName>().unwrap_err();
            assert!(matches!(refused, InvalidReference::Alias(_)), "{alias}");
        }
    }
}
