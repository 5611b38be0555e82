//! The whole of `up`, with a stand-in for the worker program: what it starts, and that all of it stops.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use clap::Parser;
use promptweave::cli::UpArgs;
use promptweave::shutdown::Shutdown;
use promptweave::up::run_with;
use tempfile::TempDir;
use tokio::process::Command;
use tokio::task::JoinHandle;

#[derive(Parser)]
struct Options {
    #[command(flatten)]
    up: UpArgs,
}

fn options(data_dir: &Path, port: u16) -> UpArgs {
    let listen = format!("127.0.0.1:{port}");
    let args = [
        "up",
        "--listen",
        &listen,
        "--data-dir",
        data_dir.to_str().unwrap(),
    ];
    Options::parse_from(args).up
}

fn reachable() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// A worker that only notes its starts and its orderly ends.
fn stand_in(notes: &Path) -> Command {
    let script = "echo start $$ \"$DATABASE_URL\" >> \"$0\"; cat > /dev/null; echo end >> \"$0\"";
    let mut command = Command::new("sh");
    command.arg("-c").arg(script).arg(notes);
    command
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let patience = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(90), patience)
        .await
        .expect(what);
}

struct Up {
    shutdown: Shutdown,
    task: JoinHandle<anyhow::Result<()>>,
    port: u16,
}

impl Up {
    fn start(data_dir: &Path, notes: &Path) -> Self {
        let (shutdown, port) = (Shutdown::default(), free_port());
        let up = run_with(options(data_dir, port), stand_in(notes), shutdown.clone());
        Self {
            shutdown,
            task: tokio::spawn(up),
            port,
        }
    }

    async fn get(&self, path: &str) -> reqwest::Result<reqwest::Response> {
        let url = format!("http://127.0.0.1:{}{path}", self.port);
        crate::app::http_client().get(url).send().await
    }

    async fn status_with(&self, key: &str, path: &str) -> u16 {
        let url = format!("http://127.0.0.1:{}{path}", self.port);
        let request = crate::app::http_client().get(url).bearer_auth(key.trim());
        request.send().await.unwrap().status().as_u16()
    }

    async fn stop(self) {
        self.shutdown.soft.cancel();
        self.task.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn everything_starts_is_kept_running_and_stops_in_order() {
    let dir = reachable();
    let notes = dir.path().join("notes");
    let read = || fs::read_to_string(&notes).unwrap_or_default();
    let starts = || {
        read()
            .lines()
            .filter(|line| line.starts_with("start"))
            .count()
    };

    let up = Up::start(&dir.path().join("data"), &notes);
    until("the worker's start", || starts() == 1).await;
    assert_eq!(up.get("/readyz").await.unwrap().status(), 200);
    assert_eq!(up.get("/docs/").await.unwrap().status(), 200);
    assert_eq!(up.get("/v1/prompts").await.unwrap().status(), 401);
    let file = dir.path().join("data/api-key");
    assert_eq!(
        fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let key = fs::read_to_string(&file).unwrap();
    assert_eq!(up.status_with(&key, "/v1/prompts").await, 200);
    // The worker has what it needs to reach the database.
    let line = read();
    let mut words = line.split_whitespace().skip(1);
    let pid: i32 = words.next().unwrap().parse().unwrap();
    let url = words.next().unwrap();
    sqlx::PgPool::connect(url).await.unwrap().close().await;

    // A dead worker is replaced, and nothing else changes.
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    until("another worker", || starts() == 2).await;
    assert_eq!(up.get("/readyz").await.unwrap().status(), 200);

    // A second `up` on the same directory is refused by name.
    let port = free_port();
    let second = options(&dir.path().join("data"), port);
    let refused = run_with(second, stand_in(&notes), Shutdown::default())
        .await
        .unwrap_err();
    let text = promptweave_domain::error_chain::chain(refused.as_ref());
    assert!(
        text.contains("in use by another `promptweave up`"),
        "{text}"
    );

    let (port, url) = (up.port, url.to_owned());
    up.stop().await;
    assert!(
        read().ends_with("end\n"),
        "the worker was asked to stop, and waited for"
    );
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
    assert!(sqlx::PgPool::connect(&url).await.is_err());

    // It starts again with the existing data.
    let up = Up::start(&dir.path().join("data"), &notes);
    until("the worker's start", || starts() == 3).await;
    assert_eq!(fs::read_to_string(&file).unwrap(), key);
    assert_eq!(up.status_with(&key, "/v1/prompts").await, 200);
    up.stop().await;

    // A key that opens nothing any more is replaced: the directory's owner always gets in.
    fs::write(&file, key.replace("pr_", "pr_0")).unwrap();
    let up = Up::start(&dir.path().join("data"), &notes);
    until("the worker's start", || starts() == 4).await;
    let other = fs::read_to_string(&file).unwrap();
    assert_eq!(
        fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert_eq!(up.status_with(&other, "/v1/prompts").await, 200);
    up.stop().await;
}

#[tokio::test]
async fn without_keys_only_this_machine_may_reach_it() {
    let dir = reachable();
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:80"] {
        let mut open = options(dir.path(), 0);
        open.http.no_auth = true;
        open.http.listen = address.parse().unwrap();
        let worker = stand_in(&dir.path().join("notes"));
        let error = run_with(open, worker, Shutdown::default()).await;
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains("--no-auth") && text.contains(address),
            "{text}"
        );
    }
    // It was refused before anything was created.
    assert!(!dir.path().join("postgres").exists());
}
