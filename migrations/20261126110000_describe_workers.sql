-- What a worker computes with; workers that drain, and those that cannot start.

ALTER TABLE worker
    -- NVIDIA's, e.g. `580.65.06`; null without one.
    ADD COLUMN driver       text,
    -- Of the devices together; the machine's for a CPU. Null where nobody tells.
    ADD COLUMN memory_bytes bigint,
    -- Its version.
    ADD COLUMN libtorch     text,
    -- Why it ended; null where it was asked to.
    ADD COLUMN reason       text,
    -- `idle`, `busy` (has a job), `draining` (claims nothing more, and ends with what it has), `stopped` (has
    -- ended) or `defunct` (several starts in a row have failed: somebody has to look).
    DROP CONSTRAINT worker_state_check,
    ADD CONSTRAINT worker_state_check  CHECK (state IN ('idle', 'busy', 'draining', 'stopped', 'defunct')),
    ADD CONSTRAINT worker_memory_check CHECK (memory_bytes > 0),
    ADD CONSTRAINT worker_reason_check CHECK (
        CASE state WHEN 'defunct' THEN reason IS NOT NULL WHEN 'stopped' THEN true ELSE reason IS NULL END
    );
