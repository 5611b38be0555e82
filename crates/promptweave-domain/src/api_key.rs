//! API keys as text, `pr_<id>_<secret><checksum>`, and the scopes they have.
//!
//! The id (32 hex digits) names the key's row and is no secret. The secret is 256 random bits (64
//! hex digits). The checksum (8 hex digits) is the CRC-32 of everything before it: a mistyped key
//! is refused without a database query, and scanners for leaked keys can recognise one.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use rand::rngs::SysError;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::clock::secret_bytes;

/// What a key may be used for. No scope includes another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Read everything but keys, projects, webhooks and workers.
    Read,
    /// Register prompts, backbones and datasets, and change them.
    Write,
    /// Start and cancel ensembles, tunings and rankings.
    Run,
    /// Manage keys, projects, webhooks and workers.
    Admin,
}

pub type Scopes = BTreeSet<Scope>;

impl Scope {
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Run, Self::Admin];

    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Run => "run",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a scope; use read, write, run or admin")]
pub struct UnknownScope(String);

impl FromStr for Scope {
    type Err = UnknownScope;

    fn from_str(name: &str) -> Result<Self, UnknownScope> {
        let mut all = Self::ALL.into_iter();
        all.find(|scope| scope.name() == name)
            .ok_or_else(|| UnknownScope(name.to_owned()))
    }
}

/// A note by the key's maker on what the key is for: 1 to 128 characters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyName(String);

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a key's name has 1 to 128 characters")]
pub struct InvalidKeyName;

impl KeyName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for KeyName {
    type Error = InvalidKeyName;

    fn try_from(text: String) -> Result<Self, InvalidKeyName> {
        match text.chars().count() {
            1..=128 => Ok(Self(text)),
            _ => Err(InvalidKeyName),
        }
    }
}

impl FromStr for KeyName {
    type Err = InvalidKeyName;

    fn from_str(text: &str) -> Result<Self, InvalidKeyName> {
        text.to_owned().try_into()
    }
}

impl From<KeyName> for String {
    fn from(name: KeyName) -> String {
        name.0
    }
}

/// A whole key, secret included. It is shown to its owner once and never stored.
pub struct ApiKey {
    id: Uuid,
    secret: [u8; 32],
}

const PREFIX: &str = "pr_";
const CHECKSUM_LEN: usize = 8;

impl ApiKey {
    /// Makes a key with a fresh secret from the operating system's generator.
    pub fn generate(id: Uuid) -> Result<Self, SysError> {
        let secret = secret_bytes()?;
        Ok(Self { id, secret })
    }

    pub fn id(&self) -> Uuid {
        self.id
    }

    /// The readable beginning of a key, which tells it from others.
    pub fn prefix(id: Uuid) -> String {
        format!("{PREFIX}{}", id.simple())
    }

    /// The hash that is stored in place of the secret.
    pub fn secret_sha256(&self) -> [u8; 32] {
        Sha256::digest(self.secret).into()
    }

    /// Whether the stored hash belongs to this key's secret. The comparison takes constant time.
    pub fn matches(&self, secret_sha256: &[u8]) -> bool {
        self.secret_sha256().ct_eq(secret_sha256).into()
    }

    /// The key's text, as its owner sends it.
    pub fn text(&self) -> SecretString {
        let body = format!("{}_{}", Self::prefix(self.id), hex::encode(self.secret));
        format!("{body}{}", checksum(&body)).into()
    }
}

fn checksum(body: &str) -> String {
    format!("{:08x}", crc32fast::hash(body.as_bytes()))
}

/// Prints the id alone: secrets do not go into logs.
impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKey({})", self.id)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedKey {
    #[error("this is not a key: keys look like `pr_<id>_<secret>`")]
    Shape,
    #[error("the key is mistyped or cut off: its checksum does not fit")]
    Checksum,
}

impl FromStr for ApiKey {
    type Err = MalformedKey;

    fn from_str(text: &str) -> Result<Self, MalformedKey> {
        if !text.starts_with(PREFIX) || !text.is_ascii() {
            return Err(MalformedKey::Shape);
        }
        // The checksum is checked first: it tells a typing error better than the parts it garbles.
        let (body, found) = text.split_at(text.len().saturating_sub(CHECKSUM_LEN));
        if checksum(body) != found {
            return Err(MalformedKey::Checksum);
        }
        let (id, digits) = body
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split_once('_'))
            .ok_or(MalformedKey::Shape)?;
        let mut secret = [0; 32];
        hex::decode_to_slice(digits, &mut secret).map_err(|_| MalformedKey::Shape)?;
        let id = Uuid::try_parse(id).map_err(|_| MalformedKey::Shape)?;
        Ok(Self { id, secret })
    }
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;

    fn key() -> (ApiKey, String) {
        let key = ApiKey::generate(Uuid::now_v7()).unwrap();
        let text = key.text().expose_secret().to_owned();
        (key, text)
    }

    #[test]
    fn a_key_reads_back_from_its_own_text() {
        let (key, text) = key();
        let read: ApiKey = text.parse().unwrap();
        assert_eq!(read.id(), key.id());
        assert!(read.matches(&key.secret_sha256()));
        assert!(text.starts_with(&ApiKey::prefix(key.id())));
        assert_eq!(text.len(), 108);
        assert!(!format!("{key:?}").contains(&text[36..100]));
    }

    #[test]
    fn no_two_secrets_are_equal() {
        let id = Uuid::now_v7();
        let [a, b] = [(); 2].map(|()| ApiKey::generate(id).unwrap());
        assert!(!a.matches(&b.secret_sha256()));
        assert!(!a.matches(&[]), "a hash of another length");
    }

    #[test]
    fn every_single_mistyped_character_is_noticed() {
        let (_, text) = key();
        for index in 0..text.len() {
            for other in ['0', 'a', 'z', '_'] {
                let mut mistyped = text.clone();
                mistyped.replace_range(index..=index, &other.to_string());
                if mistyped != text {
                    assert!(mistyped.parse::<ApiKey>().is_err(), "{mistyped}");
                }
            }
            assert!(text[..index].parse::<ApiKey>().is_err(), "cut at {index}");
        }
        for other in [
            format!("{text}0"),
            format!("{text}\u{e9}"),
            text.to_uppercase(),
        ] {
            assert!(other.parse::<ApiKey>().is_err(), "{other}");
        }
        let swapped: String = [&text[..50], &text[51..52], &text[50..51], &text[52..]].concat();
        if swapped != text {
            assert_eq!(
                swapped.parse::<ApiKey>().unwrap_err(),
                MalformedKey::Checksum
            );
        }
    }

    #[test]
    fn a_right_checksum_over_something_else_is_no_key() {
        for body in ["pr_", "pr_1_2", "pr_00000000000070008000000000000001"] {
            let text = format!("{body}{}", checksum(body));
            assert_eq!(
                text.parse::<ApiKey>().unwrap_err(),
                MalformedKey::Shape,
                "{body}"
            );
        }
    }

    #[test]
    fn scopes_are_named_alike_everywhere() {
        for scope in Scope::ALL {
            assert_eq!(serde_json::to_value(scope).unwrap(), scope.name());
            assert_eq!(scope.name().parse(), Ok(scope));
        }
        let error = "Read".parse::<Scope>().unwrap_err().to_string();
        assert!(Scope::ALL.iter().all(|scope| error.contains(scope.name())));
    }
}
