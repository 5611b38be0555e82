//! References to blobs. `gc` may delete a blob without a reference, while a request may be about to refer to the same
//! blob. An advisory lock on the digest settles which of the two comes first:
//!
//! ```text
//!   new reference                       gc
//!   put the blob, or find it there      find it old and without a reference
//!   begin, lock shared                  begin, lock exclusively
//!   does it (still) exist?              has it (still) no reference?
//!   insert the row, commit              delete it, commit
//! ```

use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::blobs::BlobStore;
use crate::registry::RegistryError;
use promptweave_domain::digest::Digest;

/// Keeps a blob in the store until the transaction ends; by then a row must refer to it.
///
/// # Errors
/// [`RegistryError::BlobGone`] if `gc` was faster; putting the blob again helps.
pub async fn hold(
    conn: &mut PgConnection,
    blobs: &BlobStore,
    digest: &Digest,
) -> Result<(), RegistryError> {
    sqlx::query!("SELECT pg_advisory_xact_lock_shared($1)", lock_key(digest))
        .execute(conn)
        .await?;
    if blobs.exists(digest).await? {
        Ok(())
    } else {
        Err(RegistryError::BlobGone(*digest))
    }
}

/// Locks a blob exclusively, which keeps new references away until the transaction ends.
pub async fn lock_alone(conn: &mut PgConnection, digest: &Digest) -> Result<(), RegistryError> {
    sqlx::query!("SELECT pg_advisory_xact_lock($1)", lock_key(digest))
        .execute(conn)
        .await?;
    Ok(())
}

/// Digests with the same first bytes share a lock, which does no harm.
fn lock_key(digest: &Digest) -> i64 {
    let (first, _) = digest.as_bytes().split_first_chunk().expect("32 bytes");
    i64::from_be_bytes(*first)
}

/// Those of `digests` that no row of any project refers to.
pub async fn unreferenced(
    conn: &mut PgConnection,
    digests: &[Digest],
) -> Result<Vec<Digest>, RegistryError> {
    let asked: Vec<Vec<u8>> = digests.iter().map(|it| it.as_bytes().to_vec()).collect();
    let referenced = sqlx::query_scalar!(
        r#"
        SELECT EXISTS (SELECT FROM backbone b WHERE b.model_sha256 = asked.digest)
            OR EXISTS (SELECT FROM dataset_version d WHERE d.digest = asked.digest)
            OR EXISTS (
                SELECT FROM job_shard s WHERE s.state = 'succeeded' AND s.digest = asked.digest
            )
            OR EXISTS (SELECT FROM job_checkpoint c WHERE c.digest = asked.digest)
            OR EXISTS (
                SELECT FROM job j
                WHERE j.file_digest = asked.digest AND j.file_deleted_at IS NULL
            )
            -- To be solved again from, by a job that was posted while they were there.
            OR EXISTS (
                SELECT FROM job j
                WHERE j.state IN ('queued', 'running')
                  AND j.spec #>> '{solved_from,statistics}' = 'sha256:' || encode(asked.digest, 'hex')
            ) AS "referenced!"
        FROM unnest($1::bytea[]) WITH ORDINALITY AS asked (digest, position)
        ORDER BY asked.position
        "#,
        &asked,
    )
    .fetch_all(conn)
    .await?;
    let free = digests.iter().zip(referenced).filter(|(_, yes)| !yes);
    Ok(free.map(|(digest, _)| *digest).collect())
}

/// Deletes small blobs, which are rows, that no prompt version refers to; with `dry_run`, only counts them. Returns
/// their number and bytes. Publishing locks the row that it refers to.
pub async fn collect_rows(
    conn: &mut PgConnection,
    created_before: OffsetDateTime,
    dry_run: bool,
) -> Result<(u64, u64), RegistryError> {
    let rows = sqlx::query!(
        r#"
        WITH free AS (
            SELECT sha256, size
            FROM blob b
            WHERE b.created_at < $1
              AND NOT EXISTS (SELECT FROM prompt_version v WHERE v.sha256 = b.sha256)
            FOR UPDATE OF b
        ), deleted AS (
            DELETE FROM blob WHERE NOT $2 AND sha256 IN (SELECT sha256 FROM free)
        )
        SELECT count(*) AS "count!", coalesce(sum(size), 0)::bigint AS "bytes!" FROM free
        "#,
        created_before,
        dry_run,
    )
    .fetch_one(conn)
    .await?;
    Ok((rows.count as u64, rows.bytes as u64))
}
