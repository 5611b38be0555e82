-- Answers to requests that came with an `Idempotency-Key`, so that the same request sent again has the
-- same answer and no second effect. A row is claimed before the work begins, and filled when it ends.

CREATE TABLE idempotency (
    project_id     uuid        NOT NULL,
    -- The client's own.
    key            text        NOT NULL,
    -- The request at work on it. When its process is gone, the lease runs out and another may begin.
    lease_token    uuid,
    lease_until    timestamptz,
    -- sha256 over method, path, query and body, and how long the body was.
    request_sha256 bytea,
    request_size   bigint,
    -- The answer, always a 2xx; others are not kept, so that they can be tried again.
    status         smallint,
    -- {"location": "…", …}: the headers a client reads.
    headers        jsonb,
    body           bytea,
    -- A day after the answer.
    expires_at     timestamptz NOT NULL,
    CONSTRAINT idempotency_pkey            PRIMARY KEY (project_id, key),
    CONSTRAINT idempotency_project_id_fkey FOREIGN KEY (project_id) REFERENCES project (id),
    CONSTRAINT idempotency_key_check       CHECK (octet_length(key) BETWEEN 1 AND 255),
    CONSTRAINT idempotency_lease_check     CHECK ((lease_token IS NULL) = (lease_until IS NULL)),
    -- Either at work or answered.
    CONSTRAINT idempotency_answer_check    CHECK (
        num_nulls(request_sha256, request_size, status, headers, body)
        = CASE WHEN lease_token IS NULL THEN 0 ELSE 5 END
    ),
    CONSTRAINT idempotency_status_check    CHECK (status BETWEEN 200 AND 299),
    CONSTRAINT idempotency_request_sha256_check CHECK (octet_length(request_sha256) = 32)
);
-- Reaping.
CREATE INDEX idempotency_expires_at_idx ON idempotency (expires_at);
