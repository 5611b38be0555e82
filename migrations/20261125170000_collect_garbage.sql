-- Letting go of files that nothing refers to, and of statistics after the time the operator keeps them.

-- Set on a job whose statistics were let go: they cannot be downloaded nor solved from any more.
ALTER TABLE job ADD COLUMN statistics_deleted_at timestamptz;
-- Which statistics are still referred to, and which are due.
CREATE INDEX job_statistics_digest_idx ON job (statistics_digest)
    WHERE statistics_digest IS NOT NULL AND statistics_deleted_at IS NULL;
CREATE INDEX job_statistics_due_idx ON job (finished_at)
    WHERE statistics_digest IS NOT NULL AND statistics_deleted_at IS NULL;
