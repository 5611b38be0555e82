//! The way to Postgres: the pool, the migrations, and what can go wrong in words of this layer.

use std::time::Duration;

use sqlx::PgPool;
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions, PgQueryResult};

/// The schema, embedded: `MIGRATOR.run(&pool)` brings a database up to date.
pub static MIGRATOR: Migrator = sqlx::migrate!();

/// How the pool behaves. The defaults suit one API or worker process.
#[derive(Clone, Debug)]
pub struct PoolSettings {
    pub max_connections: u32,
    /// How long a request waits for a connection before it is told that the database is gone. Too
    /// low and a short restart of the database shows as errors; too high and clients hang.
    pub acquire_timeout: Duration,
    /// Longest single statement. Uploads write about 1 MB, so anything near this is a fault.
    pub statement_timeout: Duration,
}

impl Default for PoolSettings {
    fn default() -> Self {
        Self {
            max_connections: 10,
            acquire_timeout: Duration::from_secs(3),
            statement_timeout: Duration::from_secs(30),
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
        // A process stopped in the middle of a transaction must not hold its locks for ever.
        (
            "idle_in_transaction_session_timeout",
            milliseconds(settings.statement_timeout * 2),
        ),
    ]);
    PgPoolOptions::new()
        .max_connections(settings.max_connections)
        .acquire_timeout(settings.acquire_timeout)
        .idle_timeout(Duration::from_secs(300))
        .connect_lazy_with(options)
}

#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// Nothing is wrong with the request: the same one may pass in a moment.
    #[error("the database cannot be reached")]
    Unavailable(#[source] sqlx::Error),
    /// Valid in JSON and in UTF-8, and yet Postgres stores it nowhere.
    #[error("a text holds the character U+0000")]
    NulCharacter(#[source] sqlx::Error),
    #[error("a statement failed")]
    Statement(#[source] sqlx::Error),
    /// A value that only a bug or a hand in the database can have put there.
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
            // 08: connection exceptions; 57P01..57P03: shut down, crashed, starting up;
            // 53300: too many connections.
            Database(database) => database.code().is_some_and(|code| {
                code.starts_with("08") || code.starts_with("57P0") || code == "53300"
            }),
            _ => false,
        };
        let code = error.as_database_error().and_then(|e| e.code());
        // 22021: in a text; 22P05: in a jsonb.
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

impl DbError {
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

/// Turns the violation of a named constraint into an error of the caller's own.
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
        self.map_err(|failure| match &failure {
            sqlx::Error::Database(database) if database.constraint() == Some(constraint) => error(),
            _ => DbError::from(failure).into(),
        })
    }
}

/// Every guarded UPDATE checks its row count.
pub fn expect_one_row(result: PgQueryResult) -> Result<(), DbError> {
    match result.rows_affected() {
        1 => Ok(()),
        other => Err(DbError::RowCount(other)),
    }
}
