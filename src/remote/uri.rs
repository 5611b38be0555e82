//! The URIs that a client may ask to be fetched: only what the operator allows.

use std::fmt;
use std::str::FromStr;

use url::Url;

/// `https://host/path`, `s3://bucket/key` or `hf://…`, in the one spelling that the URL standard gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceUri(Url);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no source: expected `https://…`, `s3://bucket/key` or `hf://…`, without user name, fragment, \
     `%2E`, `%2F` or `%5C`"
)]
pub struct InvalidSource(String);

impl FromStr for SourceUri {
    type Err = InvalidSource;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidSource(text.chars().take(256).collect());
        let url = Url::parse(text).map_err(|_| invalid())?;
        let path = url.path().to_ascii_lowercase();
        // A server may decode these, and then mean another path than the allowed one.
        let hides = ["%2e", "%2f", "%5c", "\\", "//"]
            .iter()
            .any(|it| path.contains(it));
        let known = ["https", "http", "s3", "hf"].contains(&url.scheme());
        let bare =
            url.username().is_empty() && url.password().is_none() && url.fragment().is_none();
        if hides || !known || !bare || url.host_str().is_none_or(str::is_empty) {
            return Err(invalid());
        }
        Ok(Self(url))
    }
}

impl fmt::Display for SourceUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl SourceUri {
    pub fn url(&self) -> &Url {
        &self.0
    }

    /// Whether the URI is `allowed` or below it. A prefix ends at a `/` of the path: `https://a.org/data` does not
    /// allow `https://a.org/database`.
    fn is_below(&self, allowed: &Self) -> bool {
        let (uri, allowed) = (self.0.as_str(), allowed.0.as_str());
        let rest = uri.strip_prefix(allowed);
        rest.is_some_and(|rest| {
            rest.is_empty() || allowed.ends_with('/') || rest.starts_with(['/', '@'])
        })
    }
}

/// The operator's list (`--allow-uri`).
#[derive(Clone, Debug, Default)]
pub struct AllowedUris(Vec<SourceUri>);

impl AllowedUris {
    pub fn new(allowed: Vec<SourceUri>) -> Self {
        Self(allowed)
    }

    pub fn allow(&self, uri: &SourceUri) -> bool {
        self.0.iter().any(|allowed| uri.is_below(allowed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> SourceUri {
        text.parse().unwrap()
    }

    #[test]
    fn only_what_is_below_a_prefix_is_allowed() {
        let allowed = [
            "https://a.org/data",
            "s3://bucket/sets/",
            "hf://datasets/org",
        ]
        .map(uri);
        let allowed = AllowedUris::new(allowed.to_vec());
        for text in [
            "https://a.org/data",
            "https://A.org:443/data/x.tar",
            "https://a.org/x/../data/y",
            "s3://bucket/sets/food.tar",
            "hf://datasets/org/food@main",
        ] {
            assert!(allowed.allow(&uri(text)), "{text}");
        }
        for text in [
            "https://a.org/database/x",
            "https://a.org/data/../x",
            "https://a.org:444/data/x",
            "https://a.org.evil.org/data/x",
            "http://a.org/data/x",
            "s3://bucket/sets/../secret",
            "s3://bucket2/sets/x",
            "hf://datasets/organisation/food",
            "hf://org/food",
        ] {
            assert!(!allowed.allow(&uri(text)), "{text}");
        }
        assert!(!AllowedUris::default().allow(&uri("https://a.org/")));
    }

    #[test]
    fn what_hides_where_it_leads_is_no_source() {
        for text in [
            "",
            "data/x.tar",
            "file:///etc/passwd",
            "ftp://a.org/x",
            "data:text/plain,x",
            "https://user@a.org/x",
            "https://a.org/x#y",
            "https://a.org/data/%2e%2e%2fx",
            "https://a.org/data/..%2Fx",
            "https://a.org/data//x",
            "s3://bucket/a%5cb",
            "s3:///key",
            "hf:org/name",
        ] {
            assert!(text.parse::<SourceUri>().is_err(), "{text}");
        }
    }
}
