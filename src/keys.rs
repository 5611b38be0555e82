//! `promptweave keys`: creates, lists and revokes keys directly in the database, including the first one. It also has
//! the key that `up` keeps for its user.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::Context;
use secrecy::{ExposeSecret, SecretString};
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::cli::{KeysArgs, KeysCommand};
use crate::registry::DEFAULT_PROJECT;
use crate::registry::api_keys;
use crate::registry::api_keys::StoredKey;
use crate::registry::projects;
use crate::registry::projects::Project;
use promptweave_domain::api_key::{ApiKey, KeyName, Scope, Scopes};
use promptweave_domain::clock::{Clock, SystemClock};
use promptweave_domain::reference::ResourceName;

/// The longest list that is still useful for people.
const MAX_LISTED: i64 = 1000;

/// Runs `promptweave keys`. Answers go to stdout, so that `key=$(promptweave keys create …)` works.
pub async fn run(args: KeysArgs) -> anyhow::Result<()> {
    let pool = args.database.pool()?;
    let conn = &mut *pool.acquire().await.context("cannot reach the database")?;
    match args.command {
        KeysCommand::Create {
            scope,
            project,
            create_project,
            name,
        } => {
            let project = match projects::find(conn, &project).await? {
                None if create_project => projects::create(conn, &project).await?,
                found => found.with_context(|| no_project(&project))?,
            };
            let key = create(conn, project.id, &name, &scope.into_iter().collect()).await?;
            eprintln!("a key of project `{}`, shown this once:", project.name);
            println!("{}", key.expose_secret());
        }
        KeysCommand::List { project } => {
            let project = existing(conn, &project).await?;
            for key in api_keys::list(conn, project.id, None, MAX_LISTED).await? {
                println!("{}", line(&key));
            }
        }
        KeysCommand::Revoke { id, project } => {
            let project = existing(conn, &project).await?;
            anyhow::ensure!(
                api_keys::revoke(conn, project.id, id).await?,
                "project `{}` has no key {id}; `promptweave keys list` shows what there is",
                project.name
            );
        }
    }
    Ok(())
}

fn line(key: &StoredKey) -> String {
    let state = match key.revoked_at {
        Some(_) => "revoked",
        None => "active",
    };
    let scopes: Vec<_> = key.scopes.iter().map(|scope| scope.name()).collect();
    format!("{}  {state:7}  {}  {}", key.id, scopes.join(","), key.name)
}

async fn existing(conn: &mut PgConnection, name: &ResourceName) -> anyhow::Result<Project> {
    let found = projects::find(conn, name).await?;
    found.with_context(|| no_project(name))
}

fn no_project(name: &ResourceName) -> String {
    format!("there is no project `{name}`; `promptweave keys create --create-project` makes one")
}

/// Creates and stores a key; the returned key is the only copy of its secret.
async fn create(
    conn: &mut PgConnection,
    project_id: Uuid,
    name: &KeyName,
    scopes: &Scopes,
) -> anyhow::Result<SecretString> {
    let key = ApiKey::generate(SystemClock.new_id())?;
    api_keys::insert(conn, project_id, &key, name, scopes).await?;
    Ok(key.text())
}

/// Makes sure that `file` has a working key with every scope, for the file's owner. A valid key stays; otherwise a new
/// one is written and returned.
pub async fn keep(conn: &mut PgConnection, file: &Path) -> anyhow::Result<Option<SecretString>> {
    let context = || format!("cannot keep an API key in `{}`", file.display());
    let text = match fs::read_to_string(file) {
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        text => text.with_context(context)?,
    };
    if let Ok(key) = text.trim().parse()
        && api_keys::authenticate(conn, &key).await?.is_some()
    {
        return Ok(None);
    }
    // The file is written before the commit: a key that nobody has must not be valid.
    let mut transaction = conn.begin().await?;
    let name = "kept by promptweave up".parse()?;
    let key = create(&mut transaction, DEFAULT_PROJECT, &name, &Scope::ALL.into()).await?;
    write(file, &key).with_context(context)?;
    transaction.commit().await?;
    Ok(Some(key))
}

/// Writes the file completely or not at all, readable by its owner only.
fn write(file: &Path, key: &SecretString) -> std::io::Result<()> {
    let dir = file.parent().unwrap_or(Path::new("."));
    let mut temporary = tempfile::Builder::new()
        .prefix(".api-key-")
        .tempfile_in(dir)?;
    writeln!(temporary, "{}", key.expose_secret())?;
    temporary.as_file().sync_all()?;
    temporary.persist(file)?;
    Ok(())
}
