//! Retention of statistics: they allow a closer look and solving again, but an operator may want their space after some
//! time.

use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::db::DbError;

/// Releases the statistics of jobs that ended before a time, and returns how many. `gc` then deletes the files.
pub async fn let_statistics_go(
    conn: &mut PgConnection,
    finished_before: OffsetDateTime,
) -> Result<u64, DbError> {
    let let_go = sqlx::query!(
        r#"
        UPDATE job
        SET file_deleted_at = now()
        WHERE kind = 'ensemble'
          AND file_digest IS NOT NULL
          AND file_deleted_at IS NULL
          AND finished_at < $1
        "#,
        finished_before,
    )
    .execute(conn)
    .await?;
    Ok(let_go.rows_affected())
}
