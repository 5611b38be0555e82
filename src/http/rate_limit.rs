//! Rate limits: how many requests per second, and how many at once, a client may make. Clients are told apart by API
//! key, or by address if there is no valid key.
//!
//! The counters belong to this process, and their number is bounded: one per existing key, and [`ADDRESSES`] for all
//! addresses. The headers follow draft-ietf-httpapi-ratelimit-headers-10.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::time::Duration;

use axum::extract::ConnectInfo;
use axum::http::{Extensions, HeaderName, HeaderValue, StatusCode};
use axum::response::Response;
use governor::clock::{Clock, DefaultClock};
use governor::middleware::{StateInformationMiddleware, StateSnapshot};
use governor::state::keyed::DefaultKeyedStateStore;
use governor::{Quota, RateLimiter};
use uuid::Uuid;

use crate::http::error::Problem;

const LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// The number of counters for addresses. Addresses with the same hash share one, so that no number of them fills the
/// memory.
const ADDRESSES: u64 = 1 << 16;

/// What the operator allows each client.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RateLimit {
    /// Requests per second in the long run; above 0.
    pub per_second: f64,
    /// Requests that a client may make at once after a pause.
    pub burst: NonZeroU32,
}

impl RateLimit {
    /// The time between two requests in the long run.
    fn period(self) -> Duration {
        Duration::from_secs_f64(self.per_second.recip()).max(Duration::from_nanos(1))
    }

    /// The time until so many requests are available again, in seconds.
    fn restored(self, requests: u32) -> u64 {
        (self.period() * requests).as_secs_f64().ceil() as u64
    }
}

/// The clients that share a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Client {
    Key(Uuid),
    /// A hash of the address.
    Address(u64),
}

type Counters =
    RateLimiter<Client, DefaultKeyedStateStore<Client>, DefaultClock, StateInformationMiddleware>;

#[derive(Debug)]
pub(super) struct Limiter {
    limit: RateLimit,
    counters: Counters,
    /// The hash has a random key, so that nobody can choose whose counter to exhaust.
    hasher: RandomState,
}

/// What is left to a client after a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Left {
    limit: RateLimit,
    requests: u32,
}

impl Limiter {
    pub fn new(limit: RateLimit) -> Self {
        let quota = Quota::with_period(limit.period()).expect("not 0");
        Self {
            limit,
            counters: RateLimiter::keyed(quota.allow_burst(limit.burst)).with_middleware(),
            hasher: RandomState::new(),
        }
    }

    /// Counts one request of `client`, or refuses it.
    pub fn count(&self, client: Client) -> Result<Left, Problem> {
        match self.counters.check_key(&client) {
            Ok(state) => Ok(self.left(&state)),
            Err(refused) => {
                let wait = refused.wait_time_from(self.counters.clock().now());
                let seconds = (wait.as_secs_f64().ceil() as u32).max(1);
                let detail = format!(
                    "more than {} requests a second, after {} at once; the next is answered in \
                     {seconds} s",
                    self.limit.per_second, self.limit.burst
                );
                let code = "rate_limited";
                let problem =
                    Problem::new(StatusCode::TOO_MANY_REQUESTS, code, detail).retry_after(seconds);
                let [limit, policy] = self.none_left().headers();
                Err(problem.header(LIMIT, limit).header(POLICY, policy))
            }
        }
    }

    /// The client at the other end of the connection. `x-forwarded-for` is ignored, so behind a proxy all clients
    /// without keys share one counter. An IPv6 client is its /64.
    pub fn address(&self, extensions: &Extensions) -> Client {
        let network: Option<u128> =
            extensions
                .get::<ConnectInfo<SocketAddr>>()
                .map(|ConnectInfo(peer)| match peer.ip().to_canonical() {
                    IpAddr::V4(ip) => ip.to_bits().into(),
                    IpAddr::V6(ip) => ip.to_bits() & (u128::MAX << 64),
                });
        Client::Address(self.hasher.hash_one(network) % ADDRESSES)
    }

    fn left(&self, state: &StateSnapshot) -> Left {
        Left {
            limit: self.limit,
            requests: state.remaining_burst_capacity(),
        }
    }

    fn none_left(&self) -> Left {
        Left {
            limit: self.limit,
            requests: 0,
        }
    }
}

impl Left {
    pub fn describe(self, response: &mut Response) {
        let [limit, policy] = self.headers();
        response.headers_mut().insert(LIMIT, limit);
        response.headers_mut().insert(POLICY, policy);
    }

    /// `ratelimit` and `ratelimit-policy`: q requests in w seconds; r are left, and all are available again after t
    /// seconds.
    fn headers(self) -> [HeaderValue; 2] {
        let burst = self.limit.burst.get();
        let (window, reset) = (
            self.limit.restored(burst).max(1),
            self.limit.restored(burst.saturating_sub(self.requests)),
        );
        [
            format!("\"default\";r={};t={reset}", self.requests),
            format!("\"default\";q={burst};w={window}"),
        ]
        .map(|text| HeaderValue::try_from(text).expect("plain characters"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter() -> Limiter {
        Limiter::new(RateLimit {
            per_second: 0.001,
            burst: NonZeroU32::new(3).unwrap(),
        })
    }

    fn peer(address: &str) -> Extensions {
        let mut extensions = Extensions::new();
        let address = SocketAddr::new(address.parse().unwrap(), 1234);
        extensions.insert(ConnectInfo(address));
        extensions
    }

    #[test]
    fn a_client_is_refused_after_its_burst_and_another_is_not() {
        let limiter = limiter();
        let [one, two] = [(); 2].map(|()| Client::Key(Uuid::new_v4()));
        let left: Vec<_> = (0..3)
            .map(|_| limiter.count(one).unwrap().requests)
            .collect();
        assert_eq!(left, [2, 1, 0]);
        let problem = limiter.count(one).unwrap_err();
        assert_eq!(problem.code(), "rate_limited");
        assert!(limiter.count(two).is_ok());
    }

    #[test]
    fn the_headers_say_what_there_is_what_is_left_and_when_all_is_back() {
        let left = limiter().count(Client::Address(0)).unwrap();
        let [limit, policy] = left.headers();
        assert_eq!(policy, "\"default\";q=3;w=3000");
        assert_eq!(limit, "\"default\";r=2;t=1000");
    }

    #[test]
    fn an_address_is_its_network_and_all_of_them_have_so_many_counters() {
        let limiter = limiter();
        let client = |address: &str| limiter.address(&peer(address));
        assert_eq!(client("2001:db8::1"), client("2001:db8::ffff:1"));
        assert_eq!(client("192.0.2.1"), client("::ffff:192.0.2.1"));
        assert!(
            (0..100).any(|n| client(&format!("2001:db8:{n}::1")) != client("192.0.2.1")),
            "addresses have counters of their own"
        );
        for n in 0..200_000u32 {
            let address = IpAddr::from(n.to_be_bytes());
            // The request is counted even if it is refused.
            let _ = limiter.count(limiter.address(&peer(&address.to_string())));
        }
        assert!(limiter.counters.len() as u64 <= ADDRESSES);
    }
}
