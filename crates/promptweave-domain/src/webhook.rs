//! Webhooks as Standard Webhooks (standardwebhooks.com) defines them: the events, the receiver's
//! URL, the secret, and the schedule of retries.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use rand::rngs::SysError;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use url::Url;
use utoipa::ToSchema;

use crate::clock::{jitter, secret_bytes};

/// An event that a webhook may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub enum EventType {
    #[serde(rename = "ensemble.succeeded")]
    EnsembleSucceeded,
    #[serde(rename = "ensemble.failed")]
    EnsembleFailed,
    #[serde(rename = "ensemble.cancelled")]
    EnsembleCancelled,
    #[serde(rename = "tuning.succeeded")]
    TuningSucceeded,
    #[serde(rename = "tuning.failed")]
    TuningFailed,
    #[serde(rename = "tuning.cancelled")]
    TuningCancelled,
    #[serde(rename = "ranking.succeeded")]
    RankingSucceeded,
    #[serde(rename = "ranking.failed")]
    RankingFailed,
    #[serde(rename = "ranking.cancelled")]
    RankingCancelled,
    #[serde(rename = "prediction.succeeded")]
    PredictionSucceeded,
    #[serde(rename = "prediction.failed")]
    PredictionFailed,
    #[serde(rename = "prediction.cancelled")]
    PredictionCancelled,
}

/// The event that is sent when a webhook's owner asks for it, whatever events the webhook has
/// chosen.
pub const TEST_EVENT: &str = "webhook.test";

impl EventType {
    pub const ALL: [Self; 12] = [
        Self::EnsembleSucceeded,
        Self::EnsembleFailed,
        Self::EnsembleCancelled,
        Self::TuningSucceeded,
        Self::TuningFailed,
        Self::TuningCancelled,
        Self::RankingSucceeded,
        Self::RankingFailed,
        Self::RankingCancelled,
        Self::PredictionSucceeded,
        Self::PredictionFailed,
        Self::PredictionCancelled,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::EnsembleSucceeded => "ensemble.succeeded",
            Self::EnsembleFailed => "ensemble.failed",
            Self::EnsembleCancelled => "ensemble.cancelled",
            Self::TuningSucceeded => "tuning.succeeded",
            Self::TuningFailed => "tuning.failed",
            Self::TuningCancelled => "tuning.cancelled",
            Self::RankingSucceeded => "ranking.succeeded",
            Self::RankingFailed => "ranking.failed",
            Self::RankingCancelled => "ranking.cancelled",
            Self::PredictionSucceeded => "prediction.succeeded",
            Self::PredictionFailed => "prediction.failed",
            Self::PredictionCancelled => "prediction.cancelled",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|event| event.name() == name)
    }
}

/// A set of at least one event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeSet<EventType>", into = "BTreeSet<EventType>")]
pub struct EventTypes(BTreeSet<EventType>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a webhook is told of one event at least; leave `event_types` out for all of them")]
pub struct NoEventTypes;

impl EventTypes {
    pub fn names(&self) -> Vec<String> {
        self.0.iter().map(|event| event.name().to_owned()).collect()
    }
}

impl Default for EventTypes {
    fn default() -> Self {
        Self(EventType::ALL.into())
    }
}

impl TryFrom<BTreeSet<EventType>> for EventTypes {
    type Error = NoEventTypes;

    fn try_from(events: BTreeSet<EventType>) -> Result<Self, NoEventTypes> {
        if events.is_empty() {
            return Err(NoEventTypes);
        }
        Ok(Self(events))
    }
}

impl From<EventTypes> for BTreeSet<EventType> {
    fn from(events: EventTypes) -> Self {
        events.0
    }
}

// ---- Receiver ------------------------------------------------------------------------------

/// The URL where a receiver listens. Its path may be the receiver's secret, so it goes into no log.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct WebhookUrl(Url);

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidWebhookUrl {
    #[error("this is not a URL")]
    Unreadable(#[from] url::ParseError),
    #[error("a webhook's URL begins with https:// or http://")]
    Scheme,
    #[error("a webhook's URL has no user and no password; receivers know us by the signature")]
    Credentials,
    #[error("a webhook's URL has at most {} characters", WebhookUrl::MAX_LEN)]
    TooLong,
}

impl WebhookUrl {
    pub const MAX_LEN: usize = 2048;

    pub fn url(&self) -> &Url {
        &self.0
    }
}

impl FromStr for WebhookUrl {
    type Err = InvalidWebhookUrl;

    fn from_str(text: &str) -> Result<Self, InvalidWebhookUrl> {
        let url: Url = text.parse()?;
        if !matches!(url.scheme(), "https" | "http") {
            return Err(InvalidWebhookUrl::Scheme);
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(InvalidWebhookUrl::Credentials);
        }
        if url.as_str().len() > Self::MAX_LEN {
            return Err(InvalidWebhookUrl::TooLong);
        }
        Ok(Self(url))
    }
}

impl TryFrom<String> for WebhookUrl {
    type Error = InvalidWebhookUrl;

    fn try_from(text: String) -> Result<Self, InvalidWebhookUrl> {
        text.parse()
    }
}

impl From<WebhookUrl> for String {
    fn from(url: WebhookUrl) -> Self {
        url.0.into()
    }
}

/// Prints the host alone.
impl fmt::Debug for WebhookUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WebhookUrl({:?})", self.0.host_str())
    }
}

// ---- Signatures ----------------------------------------------------------------------------

/// The secret that signs the messages to one receiver, `whsec_<base64>`.
#[derive(Clone, Deserialize)]
#[serde(try_from = "String")]
pub struct WebhookSecret(Vec<u8>);

const PREFIX: &str = "whsec_";

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a secret is `whsec_` and 24 to 64 random bytes in base64; leave it out to be given one")]
pub struct InvalidSecret;

impl WebhookSecret {
    /// Makes a secret with the operating system's generator.
    pub fn generate() -> Result<Self, SysError> {
        let bytes: [u8; 32] = secret_bytes()?;
        Ok(Self(bytes.to_vec()))
    }

    pub fn text(&self) -> SecretString {
        format!("{PREFIX}{}", STANDARD.encode(&self.0)).into()
    }

    /// The header `webhook-signature` of a message sent at `timestamp`, in seconds since 1970.
    pub fn sign(&self, id: &str, timestamp: i64, body: &str) -> String {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(format!("{id}.{timestamp}.{body}").as_bytes());
        format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
    }
}

impl FromStr for WebhookSecret {
    type Err = InvalidSecret;

    fn from_str(text: &str) -> Result<Self, InvalidSecret> {
        let encoded = text.strip_prefix(PREFIX).ok_or(InvalidSecret)?;
        let bytes = STANDARD.decode(encoded).map_err(|_| InvalidSecret)?;
        if !(24..=64).contains(&bytes.len()) {
            return Err(InvalidSecret);
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for WebhookSecret {
    type Error = InvalidSecret;

    fn try_from(text: String) -> Result<Self, InvalidSecret> {
        text.parse()
    }
}

impl fmt::Debug for WebhookSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WebhookSecret(…)")
    }
}

// ---- Retries -------------------------------------------------------------------------------

/// The pauses between tries, in seconds. They are short within the first half hour, so that a
/// receiver that was down for ten minutes has everything soon after. The later ones stretch over
/// more than three days.
const PAUSES: [u64; 16] = {
    const MINUTE: u64 = 60;
    const HOUR: u64 = 60 * MINUTE;
    [
        5,
        15,
        30,
        MINUTE,
        2 * MINUTE,
        3 * MINUTE,
        5 * MINUTE,
        5 * MINUTE,
        10 * MINUTE,
        30 * MINUTE,
        2 * HOUR,
        5 * HOUR,
        10 * HOUR,
        14 * HOUR,
        20 * HOUR,
        24 * HOUR,
    ]
};

/// How long to wait after try number `attempt`, give or take a fifth, so that messages that failed
/// together are not retried together. `None` after the last try.
pub fn pause(attempt: i32) -> Option<Duration> {
    let index = usize::try_from(attempt).ok()?.checked_sub(1)?;
    let seconds = *PAUSES.get(index)?;
    Some(Duration::from_secs(seconds).mul_f64(jitter(0.8..1.2)))
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;

    /// The example from the tests of Standard Webhooks' own libraries.
    #[test]
    fn the_signature_is_that_of_standard_webhooks() {
        let secret: WebhookSecret = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD".parse().unwrap();
        let body = r#"{"email":"test@example.com","username":"test_user"}"#;
        assert_eq!(
            secret.sign("msg_27UH4WbU6Z5A5EzD8u03UvzRbpk", 1_649_367_553, body),
            "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw="
        );
    }

    #[test]
    fn a_secret_reads_back_from_its_text_and_others_are_refused() {
        let secret = WebhookSecret::generate().unwrap();
        let text = secret.text();
        let read: WebhookSecret = text.expose_secret().parse().unwrap();
        assert_eq!(read.sign("a", 1, "b"), secret.sign("a", 1, "b"));
        let other = WebhookSecret::generate().unwrap();
        assert_ne!(other.sign("a", 1, "b"), secret.sign("a", 1, "b"));
        assert!(!format!("{secret:?}").contains(&text.expose_secret()[6..]));
        let of = |len: usize| format!("{PREFIX}{}", STANDARD.encode(vec![7; len]));
        for good in [24, 64] {
            assert!(of(good).parse::<WebhookSecret>().is_ok(), "{good}");
        }
        for bad in [
            of(23),
            of(65),
            of(32).replace(PREFIX, ""),
            of(32).replace('=', ""),
            "whsec_".to_owned(),
            "whsec_not base64".to_owned(),
        ] {
            assert!(bad.parse::<WebhookSecret>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_url_is_of_the_web_and_carries_no_credentials() {
        for good in [
            "https://receiver.example/hook?x=1",
            "http://receiver.example:8080",
            "http://[2606:4700::1111]/",
        ] {
            assert!(good.parse::<WebhookUrl>().is_ok(), "{good}");
        }
        let long = format!("https://receiver.example/{}", "x".repeat(2048));
        for (bad, reason) in [
            ("ftp://receiver.example/", InvalidWebhookUrl::Scheme),
            ("file:///etc/passwd", InvalidWebhookUrl::Scheme),
            (
                "https://me@receiver.example/",
                InvalidWebhookUrl::Credentials,
            ),
            (
                "https://:word@receiver.example/",
                InvalidWebhookUrl::Credentials,
            ),
            (&long, InvalidWebhookUrl::TooLong),
        ] {
            assert_eq!(bad.parse::<WebhookUrl>(), Err(reason), "{bad}");
        }
        for bad in ["", "receiver.example", "https://", "https:///"] {
            assert!(bad.parse::<WebhookUrl>().is_err(), "{bad}");
        }
    }

    #[test]
    fn pauses_grow_cover_days_and_end() {
        let total: u64 = PAUSES.iter().sum();
        assert!(total > 3 * 24 * 3600, "{total}");
        assert!(PAUSES.is_sorted());
        for (index, seconds) in PAUSES.iter().enumerate() {
            let pause = pause(index as i32 + 1).unwrap().as_secs_f64();
            let middle = *seconds as f64;
            assert!((middle * 0.8..middle * 1.2).contains(&pause), "{index}");
        }
        assert_eq!(pause(PAUSES.len() as i32 + 1), None);
        assert_eq!(pause(0), None);
    }

    #[test]
    fn events_are_named_alike_everywhere_and_none_is_no_choice() {
        for event in EventType::ALL {
            assert_eq!(serde_json::to_value(event).unwrap(), event.name());
            assert_eq!(EventType::from_name(event.name()), Some(event));
        }
        assert!(serde_json::from_str::<EventTypes>("[]").is_err());
        assert!(serde_json::from_str::<EventTypes>(r#"["webhook.test"]"#).is_err());
    }
}
