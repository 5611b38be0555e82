-- What may change about a prompt, its deletion, and what it is found by.

ALTER TABLE prompt
    -- Free JSON.
    ADD COLUMN metadata   jsonb NOT NULL DEFAULT '{}',
    -- The model card, in Markdown.
    ADD COLUMN card       text  NOT NULL DEFAULT '',
    -- Set on one that is deleted: it is shown nowhere and its name is not given again, but its versions
    -- stay for the lineage that they are in, and for being restored.
    ADD COLUMN deleted_at timestamptz,
    ADD CONSTRAINT prompt_metadata_check CHECK (jsonb_typeof(metadata) = 'object');

-- What prompts are found by: a row for everything that a filter may ask for, in the order of the list that
-- it answers, so that a page is read from the index whatever the number of prompts. Kept by the triggers
-- below; nobody else writes it. A deleted prompt has none.
--
--   ''                 every prompt
--   tag:<key>          has the tag
--   tag:<key>=<value>  has the tag with that value
--   alias:<alias>      has the alias
--   backbone:<hex>     has a version for the backbone of that digest, not deprecated
--   task:<task>        has a version tuned on that task, not deprecated; of the task 512 characters
CREATE TABLE prompt_facet (
    project_id uuid NOT NULL,
    facet      text NOT NULL COLLATE "C",
    name       text NOT NULL COLLATE "C",
    CONSTRAINT prompt_facet_pkey PRIMARY KEY (project_id, facet, name)
);
-- Its order is that of the facet ''.
DROP INDEX IF EXISTS prompt_name_idx;

CREATE FUNCTION version_facets(of prompt_version) RETURNS SETOF text
LANGUAGE sql IMMUTABLE AS $$
    SELECT 'backbone:' || encode(of.backbone_digest, 'hex') WHERE of.backbone_digest IS NOT NULL
    UNION ALL
    SELECT 'task:' || left(of.task, 512) WHERE of.task IS NOT NULL
$$;

CREATE FUNCTION prompt_facets(of prompt) RETURNS SETOF text
LANGUAGE sql STABLE AS $$
    SELECT facet
    FROM (
        SELECT ''
        UNION
        SELECT 'tag:' || key FROM jsonb_each_text(of.tags)
        UNION
        SELECT 'tag:' || key || '=' || value FROM jsonb_each_text(of.tags)
        UNION
        SELECT 'alias:' || a.name FROM alias a WHERE a.project_id = of.project_id AND a.prompt_id = of.id
        UNION
        SELECT f.facet
        FROM prompt_version v, version_facets(v) AS f (facet)
        WHERE v.project_id = of.project_id AND v.prompt_id = of.id AND v.deprecated_at IS NULL
    ) AS facets (facet)
    WHERE of.deleted_at IS NULL
$$;

CREATE FUNCTION keep_prompt_facets() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        DELETE FROM prompt_facet f
        USING (SELECT prompt_facets(OLD) EXCEPT SELECT prompt_facets(NEW)) AS gone (facet)
        WHERE f.project_id = OLD.project_id AND f.name = OLD.name AND f.facet = gone.facet;
    END IF;
    INSERT INTO prompt_facet (project_id, facet, name)
    SELECT NEW.project_id, facet, NEW.name FROM prompt_facets(NEW) AS had (facet)
    ON CONFLICT DO NOTHING;
    RETURN NULL;
END $$;

CREATE TRIGGER prompt_facets
    AFTER INSERT OR UPDATE OF tags, deleted_at ON prompt
    FOR EACH ROW EXECUTE FUNCTION keep_prompt_facets();

CREATE FUNCTION keep_version_facets() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.deprecated_at IS NULL THEN
        INSERT INTO prompt_facet (project_id, facet, name)
        SELECT p.project_id, had.facet, p.name
        FROM prompt p, version_facets(NEW) AS had (facet)
        WHERE p.project_id = NEW.project_id AND p.id = NEW.prompt_id AND p.deleted_at IS NULL
        ON CONFLICT DO NOTHING;
    ELSE
        DELETE FROM prompt_facet f
        USING prompt p
        WHERE p.project_id = NEW.project_id AND p.id = NEW.prompt_id
          AND f.project_id = p.project_id AND f.name = p.name
          AND f.facet IN (SELECT version_facets(NEW) EXCEPT SELECT prompt_facets(p));
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER version_facets
    AFTER INSERT OR UPDATE OF deprecated_at ON prompt_version
    FOR EACH ROW EXECUTE FUNCTION keep_version_facets();

CREATE FUNCTION keep_alias_facet() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO prompt_facet (project_id, facet, name)
        SELECT p.project_id, 'alias:' || NEW.name, p.name
        FROM prompt p
        WHERE p.project_id = NEW.project_id AND p.id = NEW.prompt_id AND p.deleted_at IS NULL
        ON CONFLICT DO NOTHING;
    ELSE
        DELETE FROM prompt_facet f
        USING prompt p
        WHERE p.project_id = OLD.project_id AND p.id = OLD.prompt_id
          AND f.project_id = p.project_id AND f.name = p.name AND f.facet = 'alias:' || OLD.name;
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER alias_facet
    AFTER INSERT OR DELETE ON alias
    FOR EACH ROW EXECUTE FUNCTION keep_alias_facet();

INSERT INTO prompt_facet (project_id, facet, name)
SELECT p.project_id, f.facet, p.name
FROM prompt p, prompt_facets(p) AS f (facet);
