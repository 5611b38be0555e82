-- A version is a prompt, or an ensemble of prompts with their heads. Where a prompt has tokens, a depth and a data type,
-- an ensemble has members.

ALTER TABLE prompt_version
    ADD COLUMN kind        text NOT NULL DEFAULT 'prompt',
    -- Forward passes of the backbone for each image.
    ADD COLUMN num_members integer,
    ALTER COLUMN num_tokens DROP NOT NULL,
    ALTER COLUMN depth      DROP NOT NULL,
    ALTER COLUMN dtype      DROP NOT NULL,
    ADD CONSTRAINT prompt_version_kind_check CHECK (
        CASE kind
            WHEN 'prompt' THEN num_nulls(num_tokens, depth, dtype) = 0 AND num_members IS NULL
            WHEN 'ensemble' THEN num_nonnulls(num_tokens, depth, dtype) = 0 AND num_members IS NOT NULL
            ELSE false
        END),
    ADD CONSTRAINT prompt_version_num_members_check CHECK (num_members > 0),
    -- A job publishes at most one version of each kind.
    DROP CONSTRAINT prompt_version_produced_by_job_key,
    ADD CONSTRAINT prompt_version_produced_by_job_key UNIQUE (project_id, produced_by_job, kind);

ALTER TABLE prompt_version ALTER COLUMN kind DROP DEFAULT;

-- The weights of a composed prompt's sources sum to 1. Those of an ensemble's sources may sum to less, for the backbone
-- without a prompt has the rest. Checked at commit, when all edges of a child are there.
CREATE OR REPLACE FUNCTION lineage_check_weight_sum() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    total double precision;
    least double precision;
BEGIN
    SELECT sum(weight) INTO total FROM lineage
    WHERE project_id = NEW.project_id AND child = NEW.child;
    SELECT CASE kind WHEN 'ensemble' THEN 0 ELSE 1 - 1e-6 END INTO least FROM prompt_version
    WHERE project_id = NEW.project_id AND id = NEW.child;
    IF total NOT BETWEEN least AND 1 + 1e-6 THEN
        RAISE EXCEPTION 'weights of prompt version % sum to %, not to 1', NEW.child, total
            USING ERRCODE = 'check_violation', TABLE = 'lineage',
                  CONSTRAINT = 'lineage_weight_sum_check';
    END IF;
    RETURN NULL;
END $$;
