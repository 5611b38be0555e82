-- The queue: the job row *is* the public resource, and everything a worker writes names its lease.
--
--             claim                    finish
--   queued ─────────► running ─┬─────────────► succeeded
--     ▲ │               │      ├─ refused, ────► failed
--     │ │ cancel        │      │  attempts exhausted
--     │ └─────────┐     │      │
--     │           ▼     │      │ cancel requested and noticed
--     │       cancelled ◄──────┘
--     └─────────────────┘ lease lost, retry, graceful stop
--
-- Only this database's now() decides time: no clock of a worker is trusted.

CREATE TABLE worker (
    -- Made at each start of a process: a restarted worker is a new one.
    id          uuid        NOT NULL,
    host        text        NOT NULL,
    pid         integer     NOT NULL,
    -- `cpu`, `cuda:0`, …
    device      text        NOT NULL,
    -- promptweave's own.
    version     text        NOT NULL,
    -- `idle`, `busy` (has a job) or `stopped` (said goodbye).
    state       text        NOT NULL,
    started_at  timestamptz NOT NULL DEFAULT now(),
    last_seen   timestamptz NOT NULL DEFAULT now(),
    -- When its engine last answered, at start and while idle. Last seen is not the same: a process
    -- can be alive with a dead device.
    selftest_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT worker_pkey        PRIMARY KEY (id),
    CONSTRAINT worker_state_check CHECK (state IN ('idle', 'busy', 'stopped'))
);
CREATE INDEX worker_last_seen_idx ON worker (last_seen);

CREATE TABLE job (
    id                  uuid        NOT NULL,
    project_id          uuid        NOT NULL,
    -- `ensemble`; later also `tuning`, `ranking`.
    kind                text        NOT NULL,
    state               text        NOT NULL DEFAULT 'queued',
    -- The phase in work, or the one it stopped in.
    phase               text,
    -- Smaller is claimed first.
    priority            integer     NOT NULL,
    -- Not before; the backoff after an error is stored here.
    run_at              timestamptz NOT NULL DEFAULT now(),
    -- Attempts begun, without those a stopping worker gave back.
    attempt             integer     NOT NULL DEFAULT 0,
    max_attempts        integer     NOT NULL,
    -- A fresh token for each attempt: every write of a worker names it, so that one who lost the
    -- job cannot touch it.
    lease_token         uuid,
    lease_until         timestamptz,
    -- Who has it, or had it last.
    worker_id           uuid,
    cancel_requested_at timestamptz,
    -- {"phase", "done", "total"}
    progress            jsonb,
    -- When the numbers last moved; renewing a lease does not move them.
    progress_at         timestamptz,
    -- Everything resolved: digests, versions, settings.
    spec                jsonb       NOT NULL,
    -- Equal digests, equal answers.
    spec_digest         bytea       NOT NULL,
    result              jsonb,
    -- `statistics.safetensors` in the blob store.
    statistics_digest   bytea,
    -- {"code", "detail"}: of a failed job, or of the last attempt of one that waits for another.
    error               jsonb,
    created_at          timestamptz NOT NULL DEFAULT now(),
    -- Of the first attempt.
    started_at          timestamptz,
    finished_at         timestamptz,
    CONSTRAINT job_pkey              PRIMARY KEY (id),
    CONSTRAINT job_id_key            UNIQUE (project_id, id),
    CONSTRAINT job_project_id_fkey   FOREIGN KEY (project_id) REFERENCES project (id),
    CONSTRAINT job_worker_id_fkey    FOREIGN KEY (worker_id) REFERENCES worker (id),
    CONSTRAINT job_kind_check        CHECK (kind IN ('ensemble')),
    CONSTRAINT job_state_check
        CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    CONSTRAINT job_phase_check
        CHECK (phase IN ('features', 'heads', 'gradients', 'solve', 'verify')),
    CONSTRAINT job_attempt_check     CHECK (attempt BETWEEN 0 AND max_attempts),
    CONSTRAINT job_lease_check       CHECK (
        (state = 'running') = (lease_token IS NOT NULL)
        AND (state = 'running') = (lease_until IS NOT NULL)
        AND (state <> 'running' OR worker_id IS NOT NULL)
    ),
    CONSTRAINT job_finished_at_check
        CHECK ((state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
    CONSTRAINT job_result_check      CHECK (
        (state = 'succeeded') = (result IS NOT NULL)
        AND (state = 'succeeded') = (statistics_digest IS NOT NULL)
    ),
    CONSTRAINT job_error_check       CHECK (state <> 'failed' OR error IS NOT NULL),
    CONSTRAINT job_spec_digest_check CHECK (octet_length(spec_digest) = 32),
    CONSTRAINT job_statistics_digest_check CHECK (octet_length(statistics_digest) = 32)
);
-- The claim reads from the front of this one.
CREATE INDEX job_queued_idx      ON job (priority, run_at, id) WHERE state = 'queued';
-- Reaping: leases in the order they run out.
CREATE INDEX job_running_idx     ON job (lease_until) WHERE state = 'running';
CREATE INDEX job_spec_digest_idx ON job (project_id, spec_digest);

-- A part of one phase. A phase is one shard for now and the job's own lease covers it, so that the
-- lease columns here stay null; later shards of samples are what workers claim.
CREATE TABLE job_shard (
    job_id      uuid        NOT NULL,
    phase       text        NOT NULL,
    index       integer     NOT NULL,
    state       text        NOT NULL DEFAULT 'queued',
    attempt     integer     NOT NULL DEFAULT 0,
    lease_token uuid,
    lease_until timestamptz,
    started_at  timestamptz,
    finished_at timestamptz,
    CONSTRAINT job_shard_pkey        PRIMARY KEY (job_id, phase, index),
    CONSTRAINT job_shard_job_id_fkey FOREIGN KEY (job_id) REFERENCES job (id),
    CONSTRAINT job_shard_index_check CHECK (index >= 0),
    CONSTRAINT job_shard_state_check CHECK (state IN ('queued', 'running', 'succeeded')),
    CONSTRAINT job_shard_phase_check
        CHECK (phase IN ('features', 'heads', 'gradients', 'solve', 'verify')),
    CONSTRAINT job_shard_lease_check CHECK ((lease_token IS NULL) = (lease_until IS NULL)),
    CONSTRAINT job_shard_finished_at_check
        CHECK ((state = 'succeeded') = (finished_at IS NOT NULL))
);

-- One row a claim; the token tells attempts apart, as a number that was given back is used again.
CREATE TABLE job_attempt (
    lease_token uuid        NOT NULL,
    job_id      uuid        NOT NULL,
    attempt     integer     NOT NULL,
    worker_id   uuid        NOT NULL,
    started_at  timestamptz NOT NULL DEFAULT now(),
    ended_at    timestamptz,
    outcome     text,
    error       jsonb,
    CONSTRAINT job_attempt_pkey           PRIMARY KEY (lease_token),
    CONSTRAINT job_attempt_job_id_fkey    FOREIGN KEY (job_id) REFERENCES job (id),
    CONSTRAINT job_attempt_worker_id_fkey FOREIGN KEY (worker_id) REFERENCES worker (id),
    CONSTRAINT job_attempt_outcome_check  CHECK (
        outcome IN ('succeeded', 'failed', 'retried', 'cancelled', 'lost', 'released')
    ),
    CONSTRAINT job_attempt_ended_at_check CHECK ((ended_at IS NULL) = (outcome IS NULL))
);
CREATE INDEX job_attempt_job_id_idx ON job_attempt (job_id);

-- What happened to a job, in order. Written in the transaction that made it happen, which holds the
-- job's row, so that numbers have no gaps and a reader never sees a later one first.
CREATE TABLE job_event (
    job_id uuid        NOT NULL,
    seq    integer     NOT NULL,
    at     timestamptz NOT NULL DEFAULT now(),
    kind   text        NOT NULL,
    data   jsonb       NOT NULL,
    CONSTRAINT job_event_pkey        PRIMARY KEY (job_id, seq),
    CONSTRAINT job_event_job_id_fkey FOREIGN KEY (job_id) REFERENCES job (id),
    CONSTRAINT job_event_seq_check   CHECK (seq >= 1),
    CONSTRAINT job_event_kind_check  CHECK (kind IN (
        'queued', 'started', 'phase', 'retried', 'lost', 'released',
        'cancel_requested', 'cancelled', 'failed', 'succeeded'
    ))
);

ALTER TABLE prompt_version
    ADD CONSTRAINT prompt_version_produced_by_job_fkey
    FOREIGN KEY (project_id, produced_by_job) REFERENCES job (project_id, id);

-- α sums to 1. Checked at commit, when all edges of a child are there.
CREATE FUNCTION lineage_check_weight_sum() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    total double precision;
BEGIN
    SELECT sum(weight) INTO total FROM lineage
    WHERE project_id = NEW.project_id AND child = NEW.child;
    IF total NOT BETWEEN 1 - 1e-6 AND 1 + 1e-6 THEN
        RAISE EXCEPTION 'weights of prompt version % sum to %, not to 1', NEW.child, total
            USING ERRCODE = 'check_violation', TABLE = 'lineage',
                  CONSTRAINT = 'lineage_weight_sum_check';
    END IF;
    RETURN NULL;
END $$;

CREATE CONSTRAINT TRIGGER lineage_weight_sum_check
    AFTER INSERT OR UPDATE ON lineage
    DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION lineage_check_weight_sum();
