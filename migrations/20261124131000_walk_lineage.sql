-- Lineage as a graph that is walked both ways.

-- What the parent was to the child; a source's weight is α.
ALTER TABLE lineage
    ADD COLUMN role text NOT NULL DEFAULT 'source',
    ADD CONSTRAINT lineage_role_check CHECK (role IN ('source'));
ALTER TABLE lineage ALTER COLUMN role DROP DEFAULT;

-- "What was made from this one?", the newest first: ids sort by the time they were made.
CREATE INDEX lineage_parent_child_idx ON lineage (project_id, parent, child);
DROP INDEX lineage_parent_idx;
