-- Public words were renamed, and an objective became one of its method: what jobs have stored is written anew, so that it
-- can be read. `spec_digest` stays: it told equal computations apart by the old words, and none of them is answered for a
-- new request.

-- `o` with the key `old` called `new`.
CREATE FUNCTION pg_temp.renamed(o jsonb, old text, new text) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN o ? old THEN (o - old) || jsonb_build_object(new, o -> old) ELSE o END
$$;

-- `o` with `part` of it, where there is one, put through one renaming.
CREATE FUNCTION pg_temp.renamed_in(o jsonb, part text, old text, new text) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN jsonb_typeof(o -> part) = 'object'
            THEN o || jsonb_build_object(part, pg_temp.renamed(o -> part, old, new))
        WHEN jsonb_typeof(o -> part) = 'array'
            THEN o || jsonb_build_object(part, (
                SELECT coalesce(jsonb_agg(pg_temp.renamed(item, old, new) ORDER BY place), '[]')
                FROM jsonb_array_elements(o -> part) WITH ORDINALITY AS items (item, place)))
        ELSE o
    END
$$;

-- A word by its new name, or itself.
CREATE FUNCTION pg_temp.word(word text) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE word
        WHEN 'hgprompt' THEN 'hgprompt_cv'
        WHEN 'hgprompt_paper' THEN 'hgprompt'
        WHEN 'inv' THEN 'standard'
        WHEN 'log_me' THEN 'logme'
        WHEN 'R1' THEN 'mixture_weighted'
        WHEN 'R2' THEN 'mixture_uniform'
        WHEN 'R3' THEN 'fishr'
        ELSE word
    END
$$;

-- `o` with the word of the key `key` by its new name.
CREATE FUNCTION pg_temp.reworded(o jsonb, key text) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN jsonb_typeof(o -> key) = 'string' THEN o || jsonb_build_object(key, pg_temp.word(o ->> key))
        ELSE o
    END
$$;

-- An ensemble's objective: the options of its method beside `method`, and those without effect under `experimental`.
CREATE FUNCTION pg_temp.objective(o jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
    WITH named AS (SELECT pg_temp.word(coalesce(o ->> 'method', 'hgprompt')) AS method)
    SELECT jsonb_strip_nulls(
        jsonb_build_object(
            'method', method,
            'h_score', pg_temp.reworded(o -> 'h_score', 'mode'),
            'head', o -> 'head',
            'align_tokens', o -> 'align_tokens',
            'experimental', nullif(jsonb_strip_nulls(jsonb_build_object(
                'entropy', o -> 'entropy',
                'refine', o -> 'refine',
                'uniform_mix', o -> 'uniform_share',
                'scale', o -> 'scale',
                'anchor_seed', o -> 'anchor')), '{}')
        )
        || CASE WHEN method = 'single_best' THEN jsonb_build_object('by', pg_temp.word(o #>> '{single_best,by}'))
                ELSE jsonb_build_object('fallback', o -> 'fallback') END
        || CASE WHEN method IN ('hgprompt', 'hgprompt_cv') THEN jsonb_build_object('trade_off', CASE
                WHEN o ->> 'alignment_weight' IS NULL THEN o -> 'trade_off'
                ELSE jsonb_build_object('alignment_weight', o -> 'alignment_weight') END)
                ELSE '{}' END
        || CASE WHEN method IN ('hgprompt', 'hgprompt_cv', 'alignment_only') THEN jsonb_build_object('alignment',
                pg_temp.reworded(pg_temp.renamed(pg_temp.renamed(
                    o -> 'alignment', 'reading', 'variant'), 'gradient_norm', 'gradient_normalization'), 'variant'))
                ELSE '{}' END
        || CASE WHEN method = 'spot' THEN coalesce(o -> 'spot', '{}') ELSE '{}' END
        || CASE WHEN method IN ('spot', 'panda', 'attempt')
                THEN jsonb_build_object('target_epochs', o #> '{target_tuning,epochs}') ELSE '{}' END
    )
    FROM named
$$;

UPDATE job SET spec = pg_temp.renamed_in(spec, 'target', 'skip_bad', 'skip_unreadable')
WHERE spec #> '{target,skip_bad}' IS NOT NULL;

UPDATE job
SET spec = jsonb_set(
    pg_temp.renamed(
        pg_temp.renamed(pg_temp.renamed_in(spec, 'stop_when', 'weight_se', 'max_standard_error'), 'stop_when', 'early_stopping'),
        'resolved_from', 'solved_from'),
    '{objective}', pg_temp.objective(spec -> 'objective'))
WHERE kind = 'ensemble';

UPDATE job
SET spec = jsonb_set(spec, '{objective}', jsonb_strip_nulls(jsonb_build_object(
    'h_score', pg_temp.reworded(spec #> '{objective,h_score}', 'mode'),
    'target_epochs', spec #> '{objective,target_tuning,epochs}')))
WHERE kind = 'ranking';

UPDATE job
SET result = pg_temp.renamed_in(result, 'sources', 'log_me', 'logme')
WHERE kind = 'ranking' AND result IS NOT NULL;

-- An ensemble's result, from the inside out.
UPDATE job
SET result = result
    || jsonb_build_object('diagnostics', pg_temp.renamed(
        pg_temp.renamed_in(result -> 'diagnostics', 'per_source', 'log_me', 'logme'), 'composed', 'composed_score'))
    || jsonb_build_object('provenance', pg_temp.renamed(result -> 'provenance', 'resolved_from', 'solved_from'))
WHERE kind = 'ensemble' AND result IS NOT NULL;

UPDATE job
SET result = jsonb_set(result, '{method}', pg_temp.reworded(
    pg_temp.renamed(pg_temp.renamed(pg_temp.renamed(pg_temp.renamed(
        pg_temp.renamed_in(result -> 'method', 'uniform_shares', 'uniform_share', 'uniform_mix'),
        'uniform_share', 'uniform_mix'), 'uniform_shares', 'uniform_mix_candidates'),
        'scales', 'scale_candidates'), 'anchor', 'anchor_seed'),
    'name'))
WHERE kind = 'ensemble' AND result ? 'method';

UPDATE job
SET result = pg_temp.renamed(pg_temp.renamed(pg_temp.renamed(
    pg_temp.renamed_in(pg_temp.renamed_in(pg_temp.renamed_in(result,
        'early_stop', 'of', 'total_samples'), 'early_stop', 'asked', 'requested'),
        'early_stop', 'weight_se', 'max_standard_error'),
    'composed', 'composed_prompt'), 'path', 'pareto_path'), 'optima', 'local_optima')
WHERE kind = 'ensemble' AND result IS NOT NULL;
