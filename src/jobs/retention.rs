//! Statistics are for looking closer and for solving again; after some time an operator may want the space.

use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::db::DbError;

/// Lets go of the statistics of jobs that ended before; says of how many. `gc` deletes the files then.
pub async fn let_statistics_go(
    conn: &mut PgConnection,
    finished_before: OffsetDateTime,
) -> Result<u64, DbError> {
    let let_go = sqlx::query!(
        r#"
        UPDATE job
        SET statistics_deleted_at = now()
        WHERE statistics_digest IS NOT NULL
          AND statistics_deleted_at IS NULL
          AND finished_at < $1
        "#,
        finished_before,
    )
    .execute(conn)
    .await?;
    Ok(let_go.rows_affected())
}
