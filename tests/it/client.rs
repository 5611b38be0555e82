//! `promptweave push | pull | ls | verify`: the program itself against a server on a socket.

use std::fs;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use promptweave::db::MIGRATOR;
use promptweave::http::rate_limit::RateLimit;
use promptweave::registry::DEFAULT_PROJECT;
use promptweave_domain::api_key::Scope;
use promptweave_domain::digest::Digest;
use serde_json::{Value, json};
use sqlx::PgPool;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::process::Command;

use crate::app::{TestApp, prompt_file};
use crate::ensembles::{Worker, furnished};
use crate::fixtures::{FakeComposer, Script};

/// A registry, and a shell in its own directory.
struct Shell {
    app: TestApp,
    url: String,
    key: String,
    dir: TempDir,
}

/// How a command ended.
#[derive(Debug)]
struct Ended {
    status: i32,
    stdout: String,
    stderr: String,
}

impl Shell {
    async fn new(pool: PgPool) -> Self {
        Self::over(TestApp::new(pool)).await
    }

    async fn over(app: TestApp) -> Self {
        let key = app.make_key(DEFAULT_PROJECT, &Scope::ALL).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = app.router.clone();
        let service = router.into_make_service_with_connect_info::<SocketAddr>();
        tokio::spawn(async { axum::serve(listener, service).await });
        let dir = tempfile::tempdir().unwrap();
        Self { app, url, key, dir }
    }

    /// Writes a prompt file; the numbers in it differ by `seed`.
    fn file(&self, name: &str, seed: u64) -> (PathBuf, Digest) {
        let path = self.dir.path().join(name);
        let bytes = prompt_file(seed).to_bytes();
        fs::write(&path, &bytes).unwrap();
        (path, Digest::of(&bytes))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_promptweave"));
        command
            .args(args)
            .env("PROMPTWEAVE_SERVER", &self.url)
            .env("PROMPTWEAVE_API_KEY", &self.key)
            .env_remove("PROMPTWEAVE_API_KEY_FILE")
            .current_dir(self.dir.path());
        command
    }

    async fn run(&self, args: &[&str]) -> Ended {
        ended(&mut self.command(args)).await
    }

    /// Runs a command that succeeds; returns its stdout.
    async fn ok(&self, args: &[&str]) -> String {
        let ended = self.run(args).await;
        assert_eq!(ended.status, 0, "{args:?}: {ended:?}");
        ended.stdout
    }

    /// Runs a command that ends with this status; returns its stderr.
    async fn fails(&self, status: i32, args: &[&str]) -> String {
        let ended = self.run(args).await;
        assert_eq!(ended.status, status, "{args:?}: {ended:?}");
        assert_eq!(ended.stdout, "");
        ended.stderr
    }

    /// The names of the directory's files.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        let name = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
        let mut names: Vec<_> = entries.map(|entry| name(entry.unwrap())).collect();
        names.sort();
        names
    }
}

async fn ended(command: &mut Command) -> Ended {
    let output = command.output().await.unwrap();
    Ended {
        status: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_is_pushed_is_listed_pulled_and_verified(pool: PgPool) {
    let shell = Shell::new(pool).await;
    let (first, one) = shell.file("one.safetensors", 1);
    let (second, two) = shell.file("two.safetensors", 2);

    // The prompt is created if it does not exist.
    let said = shell.ok(&["push", "one.safetensors", "dtd"]).await;
    assert_eq!(said, "dtd: created the prompt\ndtd: created version 1\n");
    let again = shell.ok(&["push", "one.safetensors", "dtd"]).await;
    assert_eq!(again, "dtd: these bytes are version 1 already\n");

    // An alias is created, stays, and moves.
    let pointed = shell
        .ok(&["push", "one.safetensors", "dtd:production"])
        .await;
    assert!(pointed.ends_with("dtd:production: points to version 1\n"));
    let stays = shell
        .ok(&["push", "one.safetensors", "dtd:production"])
        .await;
    assert!(stays.ends_with("dtd:production: points to version 1 already\n"));
    let moved = shell
        .ok(&["push", "two.safetensors", "dtd:production"])
        .await;
    assert_eq!(
        moved,
        "dtd: created version 2\ndtd:production: moved from version 1 to version 2\n"
    );

    // Every form of reference works.
    let by_digest = format!("dtd@{one}");
    for (reference, expected) in [
        ("dtd", &second),
        ("dtd:1", &first),
        ("dtd:production", &second),
        (by_digest.as_str(), &first),
    ] {
        shell.ok(&["pull", reference, "-o", "out"]).await;
        let out = shell.dir.path().join("out");
        assert!(read(&out) == read(expected), "{reference}");
        let mode = fs::metadata(&out).unwrap().permissions().mode();
        assert_eq!(mode & 0o600, 0o600);
        fs::remove_file(&out).unwrap();
        let file = expected.to_str().unwrap();
        let verified = shell.ok(&["verify", file, reference]).await;
        assert!(verified.contains("is version"), "{verified}");
    }

    // For other bytes, the message has both digests, and where the registry has the file's.
    let differs = shell.fails(1, &["verify", "one.safetensors", "dtd"]).await;
    for part in [
        one.to_string().as_str(),
        &two.to_string(),
        "version 2 has",
        "it is version 1",
    ] {
        assert!(differs.contains(part), "{part}: {differs}");
    }
    shell.file("three.safetensors", 3);
    let nowhere = shell
        .fails(1, &["verify", "three.safetensors", "dtd:1"])
        .await;
    assert!(
        nowhere.contains("no version of `dtd` has these bytes"),
        "{nowhere}"
    );

    let versions = shell.ok(&["ls", "dtd"]).await;
    let lines: Vec<_> = versions.lines().collect();
    assert_eq!(lines.len(), 3);
    assert!(lines[1].starts_with("2 ") && lines[1].contains("production"));
    assert!(lines[1].contains(&two.to_string()));
    assert!(lines[2].starts_with("1 ") && lines[2].contains(&one.to_string()));
    let json = shell.ok(&["ls", "dtd", "--json"]).await;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json[0]["digest"], two.to_string());
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn lists_have_all_pages_and_filters(pool: PgPool) {
    let shell = Shell::new(pool).await;
    for number in 0..203 {
        let domain = if number % 100 == 7 {
            "texture"
        } else {
            "other\u{1b}[2J"
        };
        let prompt = json!({"name": format!("p{number:03}"), "tags": {"domain": domain}});
        shell.app.post("/v1/prompts", &prompt).await.ok(201);
    }
    let all = shell.ok(&["ls"]).await;
    let names = |text: &str| -> Vec<String> {
        let lines = text.lines().skip(1);
        lines.map(|line| line[..4].to_owned()).collect()
    };
    let expected: Vec<_> = (0..203).map(|number| format!("p{number:03}")).collect();
    assert_eq!(names(&all), expected);
    assert!(!all.contains('\u{1b}'), "no tag writes to the terminal");
    let some = shell.ok(&["ls", "--tag", "domain=texture"]).await;
    assert_eq!(names(&some), ["p007", "p107"]);
    let json = shell.ok(&["ls", "--json", "--tag", "domain=texture"]).await;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json[1]["name"], "p107");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn a_pull_writes_what_is_right_or_nothing(pool: PgPool) {
    let shell = Shell::new(pool).await;
    let (file, digest) = shell.file("one.safetensors", 1);
    shell.ok(&["push", "one.safetensors", "dtd"]).await;

    // The file gets its own name, and pulling again changes nothing.
    let said = shell.ok(&["pull", "dtd"]).await;
    assert!(said.starts_with("dtd-1.safetensors is version 1 of `dtd`, sha256:"));
    let said = shell.ok(&["pull", "dtd"]).await;
    assert_eq!(said, "dtd-1.safetensors is version 1 of `dtd` already\n");
    fs::create_dir(shell.dir.path().join("folder")).unwrap();
    shell.ok(&["pull", "dtd", "-o", "folder"]).await;
    assert!(shell.dir.path().join("folder/dtd-1.safetensors").is_file());

    // An existing file with other content is replaced only if that is asked for.
    let out = shell.dir.path().join("out");
    fs::write(&out, "mine").unwrap();
    let refused = shell.fails(2, &["pull", "dtd", "-o", "out"]).await;
    assert!(refused.contains("--force"), "{refused}");
    assert_eq!(read(&out), b"mine");
    shell.ok(&["pull", "dtd", "-o", "out", "--force"]).await;
    assert!(read(&out) == read(&file));

    // Bytes that are damaged in the registry are refused, and no part of them stays.
    sqlx::query("UPDATE blob SET bytes = overlay(bytes placing '\\x00'::bytea from octet_length(bytes)) WHERE sha256 = $1")
        .bind(&digest.as_bytes()[..])
        .execute(&shell.app.state.pool)
        .await
        .unwrap();
    let before = shell.names();
    let refused = shell.fails(2, &["pull", "dtd", "-o", "damaged"]).await;
    assert!(refused.contains("is not version 1"), "{refused}");
    assert!(refused.contains(&digest.to_string()), "{refused}");
    shell
        .fails(2, &["pull", "dtd", "-o", "out", "--force"])
        .await;
    assert!(read(&out) == read(&file));
    assert_eq!(shell.names(), before);
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn what_goes_wrong_is_said_with_a_way_out_and_a_status(pool: PgPool) {
    let shell = Shell::new(pool).await;
    shell.file("one.safetensors", 1);
    let missing = shell.fails(3, &["pull", "dtd"]).await;
    assert_eq!(
        missing,
        "error: there is no prompt `dtd` (prompt_not_found)\n"
    );

    // A refused file creates no prompt.
    fs::write(shell.dir.path().join("text"), "not a prompt").unwrap();
    let refused = shell.fails(3, &["push", "text", "dtd"]).await;
    assert!(refused.contains("(not_safetensors)"), "{refused}");
    assert_eq!(shell.ok(&["ls", "--json"]).await, "[]\n");
    let version = shell.fails(2, &["push", "one.safetensors", "dtd:3"]).await;
    assert!(version.contains("numbers versions itself"), "{version}");
    let absent = shell.fails(2, &["push", "absent", "dtd"]).await;
    assert!(absent.contains("cannot read `absent`"), "{absent}");
    let empty = json!({"name": "empty"});
    shell.app.post("/v1/prompts", &empty).await.ok(201);
    let none = shell.fails(2, &["pull", "empty"]).await;
    assert!(none.contains("prompt `empty` has no version"), "{none}");

    // A protected alias does not move, but the version is published.
    shell.ok(&["push", "one.safetensors", "dtd:fixed"]).await;
    let body = json!({"version": 1, "protected": true}).to_string();
    let protect = axum::http::Request::put("/v1/prompts/dtd/aliases/fixed")
        .header("if-match", "*")
        .header("content-type", "application/json")
        .body(body.into())
        .unwrap();
    shell.app.send(protect).await.ok(200);
    shell.file("two.safetensors", 2);
    let stays = shell.run(&["push", "two.safetensors", "dtd:fixed"]).await;
    assert_eq!(
        (stays.status, stays.stdout.as_str()),
        (3, "dtd: created version 2\n")
    );
    assert!(stays.stderr.contains("(alias_protected)"), "{stays:?}");

    // No key, one in a file, and one without the scope.
    let mut without = shell.command(&["ls"]);
    let without = ended(without.env_remove("PROMPTWEAVE_API_KEY")).await;
    assert_eq!(without.status, 3);
    assert!(without.stderr.contains("(unauthenticated)"), "{without:?}");
    assert!(without.stderr.contains("--api-key-file"), "{without:?}");
    fs::write(shell.dir.path().join("key"), format!("{}\n", shell.key)).unwrap();
    let mut named = shell.command(&["ls", "--api-key-file", "key"]);
    assert_eq!(
        ended(named.env("PROMPTWEAVE_API_KEY", "wrong"))
            .await
            .status,
        0
    );
    let key = shell.app.make_key(DEFAULT_PROJECT, &[Scope::Read]).await;
    let mut reads = shell.command(&["push", "two.safetensors", "dtd"]);
    let reads = ended(reads.env("PROMPTWEAVE_API_KEY", key)).await;
    assert!(reads.stderr.contains("(scope_missing)"), "{reads:?}");
    let key = shell.app.make_key(DEFAULT_PROJECT, &[Scope::Write]).await;
    let mut writes = shell.command(&["push", "two.safetensors", "other"]);
    let writes = ended(writes.env("PROMPTWEAVE_API_KEY", key)).await;
    assert_eq!(
        writes.status, 0,
        "to upload, nothing need be read: {writes:?}"
    );

    // Nobody listens, and then somebody else does.
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", gone.local_addr().unwrap());
    drop(gone);
    let unreachable = shell.fails(4, &["ls", "--server", &url]).await;
    assert!(
        unreachable.starts_with(&format!("error: cannot reach {url}/;")),
        "{unreachable}"
    );
    let elsewhere = format!("{}/docs", shell.url);
    let other = shell.fails(3, &["ls", "--server", &elsewhere]).await;
    assert!(other.contains("(route_not_found)"), "{other}");
    let nonsense = shell.fails(2, &["ls", "--server", "localhost:8080"]).await;
    assert!(nonsense.contains("http://"), "{nonsense}");
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn an_ensemble_is_posted_watched_and_stopped(pool: PgPool) {
    let shell = Shell::over(furnished(pool).await).await;
    let create = [
        "ensemble",
        "create",
        "pets",
        "--source",
        "digits",
        "--source",
        "flowers:1",
    ];
    let with = |more: &[&'static str]| [&create[..], more].concat();
    let plan = shell.ok(&with(&["--dry-run"])).await;
    let plan: Value = serde_json::from_str(&plan).unwrap();
    assert_eq!(plan["cost"]["image_passes"], 6);
    let refused = shell.fails(3, &with(&["--max-samples", "1"])).await;
    assert!(refused.contains("(invalid_max_samples)"), "{refused}");
    let wrong = shell.fails(2, &with(&["--objective", "{\"t\": 1}"])).await;
    assert!(wrong.contains("unknown field `t`"), "{wrong}");

    let fake = FakeComposer::playing([Script::Refuse]);
    let worker = Worker::start(&shell.app, &fake);
    let failed = shell.run(&with(&["--watch"])).await;
    assert_eq!(failed.status, 1, "{failed:?}");
    let id = failed.stdout.trim();
    let reason = "the ensemble failed: sample 3 has NaN (not_finite)";
    assert!(failed.stderr.contains(reason), "{failed:?}");
    assert!(failed.stderr.contains("\nstarted {"), "{failed:?}");
    let early = shell.fails(3, &["ensemble", "result", id]).await;
    assert!(early.contains("ensemble_failed"), "{early}");

    let done = shell.ok(&with(&["--output", "composed", "--watch"])).await;
    let (id, weights) = done.split_once('\n').unwrap();
    assert_eq!(
        weights,
        "SOURCE     WEIGHT  STANDARD ERROR\n\
         digits:1   0.2500\n\
         flowers:1  0.7500\n\
         composed prompt: composed:1\n"
    );
    assert_eq!(shell.ok(&["ensemble", "result", id]).await, weights);
    let whole = shell.ok(&["ensemble", "result", id, "--json"]).await;
    let whole: Value = serde_json::from_str(&whole).unwrap();
    assert_eq!(whole["source_weights"][1]["weight"], 0.75);
    // The same was computed before, so it is the same ensemble.
    let again = shell.ok(&with(&["--output", "composed"])).await;
    assert_eq!(again.trim(), id);
    worker.stop().await;

    let waiting = shell.ok(&with(&["--force"])).await;
    let id = waiting.trim();
    let cancelled = shell.ok(&["ensemble", "cancel", id]).await;
    assert_eq!(cancelled, format!("{id}: cancelled\n"));
    let watched = shell.run(&["ensemble", "watch", id]).await;
    assert_eq!(watched.status, 1, "{watched:?}");
    assert!(watched.stderr.contains("the ensemble was cancelled"));
}

#[sqlx::test(migrator = "MIGRATOR")]
async fn who_is_told_to_come_later_does(pool: PgPool) {
    let limit = RateLimit {
        per_second: 1.0,
        burst: NonZeroU32::MIN,
    };
    let app = TestApp::with_settings(pool, |settings| settings.rate_limit = Some(limit));
    let shell = Shell::over(app).await;
    let begun = Instant::now();
    for _ in 0..3 {
        shell.ok(&["ls"]).await;
    }
    // The first request was sent at once, and each of the others a second later than it could have been.
    assert!(begun.elapsed() >= Duration::from_secs(2));
}
