//! Access to Postgres: the pool, the migrations, and errors in the terms of this layer.

use std::time::Duration;

use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions, PgQueryResult};
use sqlx::{Connection, PgPool};

/// The schema, embedded: `MIGRATOR.run(&pool)` brings a database up to date.
pub static MIGRATOR: Migrator = sqlx::migrate!();

/// Settings of the pool. The defaults suit one API or worker process.
#[derive(Clone, Debug)]
pub struct PoolSettings {
    pub max_connections: u32,
    /// How long a request waits for a connection before it counts the database as unreachable. Too low: a short restart
    /// of the database shows as errors. Too high: clients hang.
    pub acquire_timeout: Duration,
    /// The longest time of one statement. Uploads write about 1 MB, so a statement that takes this long is a fault.
    pub statement_timeout: Duration,
    /// How long a session may be idle inside a transaction. A process that froze there, or whose machine is gone, holds
    /// its locks until the server ends the session.
    pub idle_in_transaction_timeout: Duration,
}

/// How long an idle connection is assumed to be alive.
const UNTESTED: Duration = Duration::from_secs(1);

impl Default for PoolSettings {
    fn default() -> Self {
        Self {
            max_connections: 10,
            acquire_timeout: Duration::from_secs(3),
            statement_timeout: Duration::from_secs(30),
            idle_in_transaction_timeout: Duration::from_secs(60),
        }
    }
}

/// A pool that connects on first use, so that a process starts, and recovers, without its database.
pub fn pool(options: PgConnectOptions, settings: &PoolSettings) -> PgPool {
    let milliseconds = |limit: Duration| limit.as_millis().to_string();
    let options = options.application_name("promptweave").options([
        (
            "statement_timeout",
            milliseconds(settings.statement_timeout),
        ),
        ("lock_timeout", milliseconds(settings.statement_timeout / 3)),
        (
            "idle_in_transaction_session_timeout",
            milliseconds(settings.idle_in_transaction_timeout),
        ),
    ]);
    PgPoolOptions::new()
        .max_connections(settings.max_connections)
        .acquire_timeout(settings.acquire_timeout)
        .idle_timeout(Duration::from_secs(300))
        // Testing a connection before each use costs as much as reading a row, so one that was used a moment ago is
        // assumed to be alive.
        .test_before_acquire(false)
        .before_acquire(|connection, metadata| {
            Box::pin(async move {
                if metadata.idle_for > UNTESTED {
                    connection.ping().await?;
                }
                Ok(true)
            })
        })
        .connect_lazy_with(options)
}

#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// A transient error: the same request may succeed in a moment.
    #[error("the database is not available")]
    Unavailable(#[source] sqlx::Error),
    /// A NUL character: valid in JSON and in UTF-8, but Postgres cannot store it.
    #[error("a text holds the character U+0000")]
    NulCharacter(#[source] sqlx::Error),
    #[error("a statement failed")]
    Statement(#[source] sqlx::Error),
    /// A stored value that only a bug or a manual change can have caused.
    #[error("column `{column}` of table `{table}` holds {value}, which cannot be read")]
    Unreadable {
        table: &'static str,
        column: &'static str,
        value: String,
    },
    #[error("expected to change one row, changed {0}")]
    RowCount(u64),
}

impl From<sqlx::Error> for DbError {
    fn from(error: sqlx::Error) -> Self {
        use sqlx::Error::{Database, Io, PoolClosed, PoolTimedOut, Tls, WorkerCrashed};
        let unavailable = match &error {
            Io(_) | Tls(_) | PoolTimedOut | PoolClosed | WorkerCrashed => true,
            Database(database) => database.code().is_some_and(|code| is_transient(&code)),
            _ => false,
        };
        let code = error.as_database_error().and_then(|e| e.code());
        // SQLSTATE 22021 is for a text, 22P05 for a jsonb.
        let nul_character = matches!(code.as_deref(), Some("22021" | "22P05"));
        if unavailable {
            Self::Unavailable(error)
        } else if nul_character {
            Self::NulCharacter(error)
        } else {
            Self::Statement(error)
        }
    }
}

/// Whether an SQLSTATE describes the server's state rather than the statement.
fn is_transient(code: &str) -> bool {
    const CLASSES: [&str; 3] = [
        "08", // connection exceptions
        "53", // insufficient resources: disk full, out of memory, too many connections
        "58", // errors outside of PostgreSQL: I/O
    ];
    const CODES: [&str; 9] = [
        "25P03", // idle in a transaction for too long
        "40001", // serialization failure
        "40P01", // deadlock
        "55P03", // lock not available
        "57014", // query cancelled, also by `statement_timeout`
        "57P01", // shut down by an administrator
        "57P02", // shut down by a crash
        "57P03", // starting up
        "57P05", // idle session timeout
    ];
    CODES.contains(&code) || CLASSES.iter().any(|class| code.starts_with(class))
}

impl DbError {
    /// Whether a constraint (SQLSTATE class 23) refused the rows; it will refuse them again.
    pub fn is_refused_by_constraint(&self) -> bool {
        match self {
            Self::Statement(sqlx::Error::Database(database)) => {
                database.code().is_some_and(|code| code.starts_with("23"))
            }
            _ => false,
        }
    }

    pub fn unreadable(
        table: &'static str,
        column: &'static str,
        value: impl std::fmt::Debug,
    ) -> Self {
        Self::Unreadable {
            table,
            column,
            value: format!("{value:?}"),
        }
    }
}

/// Turns the violation of a named constraint into the caller's own error.
pub trait OnConstraint<T> {
    fn on_constraint<E: From<DbError>>(
        self,
        constraint: &str,
        error: impl FnOnce() -> E,
    ) -> Result<T, E>;
}

impl<T> OnConstraint<T> for Result<T, sqlx::Error> {
    fn on_constraint<E: From<DbError>>(
        self,
        constraint: &str,
        error: impl FnOnce() -> E,
    ) -> Result<T, E> {
        self.map_err(|failure| match violates(&failure, constraint) {
            true => error(),
            false => DbError::from(failure).into(),
        })
    }
}

/// Whether a named constraint refused the rows.
pub fn violates(error: &sqlx::Error, constraint: &str) -> bool {
    error
        .as_database_error()
        .is_some_and(|error| error.constraint() == Some(constraint))
}

/// Checks that one row changed. Every guarded UPDATE calls this.
pub fn expect_one_row(result: PgQueryResult) -> Result<(), DbError> {
    match result.rows_affected() {
        1 => Ok(()),
        other => Err(DbError::RowCount(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_by_itself_is_told_from_what_a_statement_did_wrong() {
        let transient = [
            "08006", "25P03", "40001", "40P01", "53100", "53200", "53300", "55P03", "57014",
            "57P01", "57P02", "57P03", "58030",
        ];
        for code in transient {
            assert!(is_transient(code), "{code}");
        }
        // These are a constraint, a text with U+0000, a missing table, and a dropped database.
        for code in ["23505", "23514", "22021", "42P01", "57P04"] {
            assert!(!is_transient(code), "{code}");
        }
    }

    #[test]
    fn a_lost_connection_is_unavailable_and_a_missing_row_is_not() {
        let lost = sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
        assert!(matches!(DbError::from(lost), DbError::Unavailable(_)));
        let missing = DbError::from(sqlx::Error::RowNotFound);
        assert!(matches!(missing, DbError::Statement(_)));
        assert!(!missing.is_refused_by_constraint());
    }
}
