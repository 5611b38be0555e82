//! The only source of the current time, of new ids and of random numbers: `clippy.toml` forbids all others. Durations
//! are measured with `Instant`, which is not meant.
//!
//! Leases and retries of the queue follow the database's clock.

#![expect(
    clippy::disallowed_methods,
    reason = "the one place that may call them"
)]

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use rand::TryRng as _;
use rand::rngs::{SysError, SysRng};
use time::OffsetDateTime;
use uuid::Uuid;

/// A UUID version 7, which sorts by creation time.
pub fn new_id() -> Uuid {
    SystemClock.new_id()
}

/// A UUID version 4, for a lease: nobody can guess it.
pub fn new_token() -> Uuid {
    Uuid::new_v4()
}

/// Random bytes of the operating system's generator, for a secret.
pub fn secret_bytes<const N: usize>() -> Result<[u8; N], SysError> {
    let mut bytes = [0; N];
    SysRng.try_fill_bytes(&mut bytes)?;
    Ok(bytes)
}

/// A uniformly random number of the range, to spread what would happen at once.
pub fn jitter(range: Range<f64>) -> f64 {
    rand::random_range(range)
}

/// The current time, as files have it.
pub fn file_time() -> SystemTime {
    SystemTime::now()
}

pub trait Clock: Debug + Send + Sync {
    fn now(&self) -> OffsetDateTime;
    /// A UUID version 7, which sorts by creation time.
    fn new_id(&self) -> Uuid;
}

#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> OffsetDateTime {
        OffsetDateTime::now_utc()
    }

    fn new_id(&self) -> Uuid {
        Uuid::now_v7()
    }
}

/// A clock that stands still until told otherwise; its ids count up.
#[derive(Debug)]
pub struct MockClock(Mutex<(OffsetDateTime, u64)>);

impl Default for MockClock {
    fn default() -> Self {
        let start = OffsetDateTime::from_unix_timestamp(1_800_000_000).expect("within range");
        Self(Mutex::new((start, 0)))
    }
}

impl MockClock {
    pub fn advance(&self, by: Duration) {
        self.0.lock().expect("never poisoned").0 += by;
    }
}

impl Clock for MockClock {
    fn now(&self) -> OffsetDateTime {
        self.0.lock().expect("never poisoned").0
    }

    fn new_id(&self) -> Uuid {
        let mut state = self.0.lock().expect("never poisoned");
        state.1 += 1;
        let millis = state.0.unix_timestamp() as u64 * 1000 + u64::from(state.0.millisecond());
        let mut counter = [0; 10];
        counter[2..].copy_from_slice(&state.1.to_be_bytes());
        uuid::Builder::from_unix_timestamp_millis(millis, &counter).into_uuid()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_both_clocks_are_version_7_and_sort_by_time() {
        let mock = MockClock::default();
        let first = mock.new_id();
        assert!(first < mock.new_id());
        mock.advance(Duration::from_millis(1));
        assert!(first < mock.new_id());
        assert_eq!(first.get_version_num(), 7);
        assert_eq!(SystemClock.new_id().get_version_num(), 7);
    }
}
