//! Deleting a prompt, which only hides it: its versions stay for the lineage they are part of, its name stays taken,
//! and it can be restored.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::db::expect_one_row;
use crate::registry::RegistryError;
use crate::registry::prompts::Prompt;
use promptweave_domain::reference::ResourceName;

/// Deletes a prompt that nothing refers to. The caller has locked it ([`lock`](crate::registry::prompts::lock)).
///
/// # Errors
/// [`RegistryError::PromptInUse`] if one of its aliases is protected, another prompt was composed or tuned from one of
/// its versions, or a job that has not ended names it.
pub async fn delete(
    conn: &mut PgConnection,
    project_id: Uuid,
    prompt: &Prompt,
) -> Result<(), RegistryError> {
    if let Some(user) = user(conn, project_id, prompt).await? {
        return Err(RegistryError::PromptInUse {
            prompt: prompt.name.clone(),
            user,
        });
    }
    let deleted = sqlx::query!(
        r#"
        UPDATE prompt
        SET deleted_at = now(), revision = revision + 1
        WHERE project_id = $1 AND id = $2 AND deleted_at IS NULL
        "#,
        project_id,
        prompt.id,
    )
    .execute(conn)
    .await?;
    Ok(expect_one_row(deleted)?)
}

/// Something that refers to a prompt, in the words of an error message.
async fn user(
    conn: &mut PgConnection,
    project_id: Uuid,
    prompt: &Prompt,
) -> Result<Option<String>, RegistryError> {
    let users = sqlx::query_scalar!(
        r#"
        (SELECT format('its alias `%s` is protected', a.name) AS "user!"
         FROM alias a
         WHERE a.project_id = $1 AND a.prompt_id = $2 AND a.protected
         LIMIT 1)
        UNION ALL
        (SELECT format(CASE l.role WHEN 'start' THEN '`%s:%s` was tuned from it' ELSE '`%s:%s` was composed of it' END,
                       child_prompt.name, child.version)
         FROM prompt_version mine
         JOIN lineage l ON l.project_id = mine.project_id AND l.parent = mine.id
         JOIN prompt_version child ON child.project_id = l.project_id AND child.id = l.child
         JOIN prompt child_prompt
           ON child_prompt.project_id = child.project_id AND child_prompt.id = child.prompt_id
         WHERE mine.project_id = $1 AND mine.prompt_id = $2
           AND child.prompt_id <> $2 AND child_prompt.deleted_at IS NULL
         LIMIT 1)
        UNION ALL
        (SELECT format('%s %s is %s and names it', j.kind, j.id, j.state)
         FROM job j
         WHERE j.project_id = $1
           AND j.state IN ('queued', 'running')
           AND (j.spec @> jsonb_build_object('sources', jsonb_build_array(jsonb_build_object('prompt', $3::text)))
                OR j.spec #>> '{start,prompt}' = $3
                OR j.spec ->> 'output' = $3)
         LIMIT 1)
        "#,
        project_id,
        prompt.id,
        prompt.name.as_str(),
    )
    .fetch_all(conn)
    .await?;
    Ok(users.into_iter().next())
}

/// Restores a deleted prompt with everything it had; does nothing if it is not deleted or does not exist.
pub async fn restore(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &ResourceName,
) -> Result<(), RegistryError> {
    sqlx::query!(
        r#"
        UPDATE prompt
        SET deleted_at = NULL, revision = revision + 1
        WHERE project_id = $1 AND name = $2 AND deleted_at IS NOT NULL
        "#,
        project_id,
        name.as_str(),
    )
    .execute(conn)
    .await?;
    Ok(())
}
