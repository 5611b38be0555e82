//! Answers kept for clients that send a request again: which request is at work under an `Idempotency-Key`, and its
//! answer. Only the database's clock decides what has expired.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use crate::db::DbError;
use crate::registry::{RegistryError, read_digest};
use promptweave_domain::clock::new_token;
use promptweave_domain::digest::Digest;

/// How long a claim holds without being renewed.
pub const LEASE: Duration = Duration::from_secs(30);
/// How long an answer is kept.
pub const KEEP: Duration = Duration::from_secs(24 * 60 * 60);
/// The most rows that one [`reap`] deletes.
const REAP: i64 = 1000;

/// A request's right to work under its key.
#[derive(Clone, Debug)]
pub struct Claim {
    project_id: Uuid,
    key: String,
    token: Uuid,
}

/// The outcome of claiming a key.
#[derive(Clone, Debug)]
pub enum Claimed {
    /// The key is free: do the work, then call [`Claim::answer`] or [`Claim::release`].
    First(Claim),
    /// Another request with the key is at work.
    InFlight,
    Answered(KeptAnswer),
}

#[derive(Clone, Debug)]
pub struct KeptAnswer {
    /// The request that got this answer.
    pub request: RequestDigest,
    /// HTTP status, 200 to 299.
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

/// The parts of a request that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestDigest {
    pub digest: Digest,
    /// Size of the body in bytes: a longer one need not be read to its end.
    pub size: u64,
}

/// Claims a key. A claim whose lease ran out, or an answer that expired, does not count.
pub async fn claim(
    conn: &mut PgConnection,
    project_id: Uuid,
    key: &str,
) -> Result<Claimed, RegistryError> {
    let token = new_token();
    loop {
        let first = sqlx::query_scalar!(
            r#"
            INSERT INTO idempotency (project_id, key, lease_token, lease_until, expires_at)
            VALUES ($1, $2, $3, now() + make_interval(secs => $4), now() + make_interval(secs => $5))
            ON CONFLICT (project_id, key) DO UPDATE
            SET lease_token    = EXCLUDED.lease_token,
                lease_until    = EXCLUDED.lease_until,
                expires_at     = EXCLUDED.expires_at,
                request_sha256 = NULL,
                request_size   = NULL,
                status         = NULL,
                headers        = NULL,
                body           = NULL
            WHERE idempotency.lease_until < now() OR idempotency.expires_at < now()
            RETURNING true AS "first!"
            "#,
            project_id,
            key,
            token,
            LEASE.as_secs_f64(),
            KEEP.as_secs_f64(),
        )
        .fetch_optional(&mut *conn)
        .await?;
        if first.is_some() {
            let key = key.to_owned();
            return Ok(Claimed::First(Claim {
                project_id,
                key,
                token,
            }));
        }
        // Nothing is found if the key was released in between.
        if let Some(found) = find(conn, project_id, key).await? {
            return Ok(found);
        }
    }
}

async fn find(
    conn: &mut PgConnection,
    project_id: Uuid,
    key: &str,
) -> Result<Option<Claimed>, RegistryError> {
    let found = sqlx::query!(
        r#"
        SELECT request_sha256, request_size, status, body,
               headers AS "headers: Json<BTreeMap<String, String>>"
        FROM idempotency
        WHERE project_id = $1 AND key = $2
        "#,
        project_id,
        key,
    )
    .fetch_optional(conn)
    .await?;
    let Some(row) = found else {
        return Ok(None);
    };
    let (Some(sha256), Some(size), Some(status), Some(headers), Some(body)) = (
        row.request_sha256,
        row.request_size,
        row.status,
        row.headers,
        row.body,
    ) else {
        return Ok(Some(Claimed::InFlight));
    };
    const TABLE: &str = "idempotency";
    Ok(Some(Claimed::Answered(KeptAnswer {
        request: RequestDigest {
            digest: read_digest(TABLE, "request_sha256", &sha256)?,
            size: size
                .try_into()
                .map_err(|_| DbError::unreadable(TABLE, "request_size", size))?,
        },
        status: status
            .try_into()
            .map_err(|_| DbError::unreadable(TABLE, "status", status))?,
        headers: headers.0,
        body,
    })))
}

impl Claim {
    /// Extends the claim by another [`LEASE`]; false if another request has the key.
    pub async fn renew(&self, conn: &mut PgConnection) -> Result<bool, RegistryError> {
        let renewed = sqlx::query!(
            r#"
            UPDATE idempotency
            SET lease_until = now() + make_interval(secs => $4)
            WHERE project_id = $1 AND key = $2 AND lease_token = $3
            "#,
            self.project_id,
            self.key,
            self.token,
            LEASE.as_secs_f64(),
        )
        .execute(conn)
        .await?;
        Ok(renewed.rows_affected() == 1)
    }

    /// Keeps the answer for [`KEEP`]; false if another request has the key.
    pub async fn answer(
        &self,
        conn: &mut PgConnection,
        answer: &KeptAnswer,
    ) -> Result<bool, RegistryError> {
        let kept = sqlx::query!(
            r#"
            UPDATE idempotency
            SET lease_token    = NULL,
                lease_until    = NULL,
                request_sha256 = $4,
                request_size   = $5,
                status         = $6,
                headers        = $7,
                body           = $8,
                expires_at     = now() + make_interval(secs => $9)
            WHERE project_id = $1 AND key = $2 AND lease_token = $3
            "#,
            self.project_id,
            self.key,
            self.token,
            answer.request.digest.as_bytes(),
            answer.request.size as i64,
            answer.status as i16,
            Json(&answer.headers) as _,
            answer.body,
            KEEP.as_secs_f64(),
        )
        .execute(conn)
        .await?;
        Ok(kept.rows_affected() == 1)
    }

    /// Releases the key, as if the request had never come.
    pub async fn release(&self, conn: &mut PgConnection) -> Result<(), RegistryError> {
        sqlx::query!(
            "DELETE FROM idempotency WHERE project_id = $1 AND key = $2 AND lease_token = $3",
            self.project_id,
            self.key,
            self.token,
        )
        .execute(conn)
        .await?;
        Ok(())
    }
}

/// Deletes what expired, a thousand rows at a time; returns how many.
pub async fn reap(conn: &mut PgConnection) -> Result<u64, DbError> {
    let reaped = sqlx::query!(
        r#"
        DELETE FROM idempotency
        WHERE (project_id, key) IN (
            SELECT project_id, key
            FROM idempotency
            WHERE expires_at < now()
            ORDER BY expires_at
            LIMIT $1
            FOR UPDATE SKIP LOCKED
        )
        "#,
        REAP,
    )
    .execute(conn)
    .await?;
    Ok(reaped.rows_affected())
}
