//! The private cluster of `up`: made from the PostgreSQL programs installed on the machine, in the data directory, and
//! reachable through a unix socket that only its owner can open.
//!
//! No port is opened, so none can clash and no password is needed: the socket's directory has mode 0700. As root, the
//! programs run as the user `postgres`, because PostgreSQL refuses root. A cluster whose `up` was killed keeps running.
//! The next start locks the data directory, recognises the old postmaster by its working directory, stops it and starts
//! again. A process that is not a postmaster *of this very directory* is never signalled.

mod programs;

use std::fs::{self, DirBuilder, File};
use std::io::{self, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection};
use tokio::process::Child;

use programs::{Owner, Programs};
use promptweave_domain::clock::new_id;
use promptweave_domain::digest::Digest;

/// User and database of the cluster.
const NAME: &str = "promptweave";
/// Prefix of the folders that `initdb` works in.
const UNFINISHED: &str = "data.unfinished-";
/// The port that names the socket's file; nothing listens on TCP.
const PORT: u16 = 5432;
/// The longest socket path: sockaddr_un holds 108 bytes, and the last is 0.
const MAX_SOCKET_PATH: usize = 107;
/// The longest start, which includes recovery after a crash.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// The longest fast shutdown; then an immediate one follows.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

#[derive(Debug, thiserror::Error)]
pub enum PrivatePostgresError {
    #[error(
        "PostgreSQL {} or newer is not installed (looked in {searched}); install it (Debian, \
         Ubuntu: `apt-get install postgresql`), or name the directory of `initdb` and `postgres` \
         with --postgres-bin",
        programs::MIN_MAJOR
    )]
    NotInstalled { searched: String },
    #[error("`{}` holds no PostgreSQL {} or newer", .0.display(), programs::MIN_MAJOR)]
    Unsuitable(PathBuf),
    #[error(
        "the cluster in `{}` was made by PostgreSQL {major}, whose programs are not installed; \
         install postgresql-{major}, or name another --data-dir",
        .dir.display()
    )]
    OtherMajor { dir: PathBuf, major: u32 },
    #[error(
        "running as root needs a user `postgres` for the cluster to run as; create it with \
         `useradd --system postgres`, or run promptweave as an ordinary user"
    )]
    NoOwner,
    #[error(
        "`{}` is in use by another `promptweave up`{}; stop that one, or name another --data-dir",
        .dir.display(), .pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
    )]
    Locked { dir: PathBuf, pid: Option<u32> },
    #[error("cannot use `{}`", .path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("`{}` belongs to somebody else or is open to others", .0.display())]
    Untrusted(PathBuf),
    #[error("{program} failed: {output}")]
    Program {
        program: &'static str,
        output: String,
    },
    #[error("the private database did not start; see `{}`: {tail}", .log.display())]
    NotStarted { log: PathBuf, tail: String },
    #[error("process {pid} does not give up the private database in `{}`", .dir.display())]
    Orphan { pid: u32, dir: PathBuf },
    #[error("cannot reach the private database")]
    Connect(#[from] sqlx::Error),
}

use PrivatePostgresError as Error;

/// Names the path in an I/O error.
fn at(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, source }
}

/// The paths of one cluster.
#[derive(Clone, Debug)]
struct Layout {
    /// The cluster's own files (PGDATA).
    data: PathBuf,
    /// The folder in which `initdb` works, so that an interrupted one leaves no incomplete `data`. The name is new each
    /// time, because programs that an interrupted `initdb` started may keep writing for a moment.
    unfinished: PathBuf,
    /// The socket's directory.
    run: PathBuf,
    log: PathBuf,
}

/// A running cluster; it stops when asked to, or (without waiting) when dropped.
#[derive(Debug)]
pub struct PrivatePostgres {
    postmaster: Child,
    options: PgConnectOptions,
    layout: Layout,
    /// The lock that is held as long as the cluster is ours; the kernel releases it however this process ends.
    _lock: File,
}

impl PrivatePostgres {
    /// Starts the cluster of `data_dir`, and first creates it if it does not exist.
    ///
    /// # Errors
    /// If another `up` uses the directory, the programs are missing, or PostgreSQL fails.
    pub async fn start(data_dir: &Path, bin: Option<&Path>) -> Result<Self, Error> {
        fs::create_dir_all(data_dir).map_err(at(data_dir))?;
        let data_dir = fs::canonicalize(data_dir).map_err(at(data_dir))?;
        let lock = lock(&data_dir)?;
        let owner = Owner::of_cluster()?;
        let layout = Layout::prepare(&data_dir, &owner)?;
        let programs = Programs::find(bin, owner, &layout.data)?;

        if !layout.data.exists() {
            programs.initdb(&layout).await?;
        }
        stop_orphan(&layout).await?;
        let options = PgConnectOptions::new_without_pgpass()
            .socket(&layout.run)
            .port(PORT)
            .username(NAME)
            .database(NAME);
        // This is complete before the first wait: from here on, dropping it stops the postmaster.
        let mut postgres = Self {
            postmaster: programs.postgres(&layout)?,
            options,
            layout,
            _lock: lock,
        };
        postgres.wait_until_ready().await?;
        Ok(postgres)
    }

    /// Waits until the database [`NAME`] answers, and creates it if it does not exist.
    async fn wait_until_ready(&mut self) -> Result<(), Error> {
        let layout = self.layout.clone();
        let not_started = || Error::NotStarted {
            log: layout.log.clone(),
            tail: fs::read_to_string(&layout.log)
                .ok()
                .and_then(|log| log.trim_end().lines().last().map(str::to_owned))
                .unwrap_or_default(),
        };
        let started = Instant::now();
        let maintenance = self.options.clone().database("postgres");
        let mut connection = loop {
            match maintenance.connect().await {
                Ok(connection) => break connection,
                Err(_) if started.elapsed() > START_TIMEOUT => return Err(not_started()),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
            if let Ok(Some(_)) = self.postmaster.try_wait() {
                return Err(not_started());
            }
        };
        // CREATE DATABASE has no IF NOT EXISTS; no other process can create it, because we hold the lock.
        let exists = sqlx::query_scalar!("SELECT true FROM pg_database WHERE datname = $1", NAME)
            .fetch_optional(&mut connection)
            .await?;
        if exists.is_none() {
            sqlx::raw_sql("CREATE DATABASE promptweave")
                .execute(&mut connection)
                .await?;
        }
        connection.close().await?;
        Ok(())
    }

    /// The `DATABASE_URL` of the cluster; it works only for this user and root.
    pub fn url(&self) -> String {
        self.options.to_url_lossy().to_string()
    }

    /// The directory of the cluster's own files (PGDATA).
    pub fn directory(&self) -> &Path {
        &self.layout.data
    }

    /// Process id of the postmaster.
    pub fn process_id(&self) -> Option<u32> {
        self.postmaster.id()
    }

    /// Waits for the postmaster to end, which it should not do unasked.
    pub async fn exited(&mut self) -> io::Result<ExitStatus> {
        self.postmaster.wait().await
    }

    /// Shuts down fast: sessions end, and everything is on disk. If that takes long, shuts down immediately.
    pub async fn stop(mut self) -> io::Result<()> {
        for signal in [Signal::INT, Signal::QUIT, Signal::KILL] {
            self.signal(signal);
            if let Ok(ended) = tokio::time::timeout(STOP_TIMEOUT, self.postmaster.wait()).await {
                ended?;
                break;
            }
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        // `id` is None once the process is reaped, so a reused pid is never signalled.
        if let Some(pid) = self.postmaster.id().and_then(pid) {
            // The process may have ended a moment ago, which is fine.
            let _ = kill_process(pid, signal);
        }
    }
}

impl Drop for PrivatePostgres {
    fn drop(&mut self) {
        self.signal(Signal::INT);
    }
}

fn pid(id: u32) -> Option<Pid> {
    Pid::from_raw(id.try_into().ok()?)
}

fn lock(data_dir: &Path) -> Result<File, Error> {
    let path = data_dir.join("up.lock");
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(at(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            let pid = fs::read_to_string(&path)
                .ok()
                .and_then(|text| text.trim().parse().ok());
            return Err(Error::Locked {
                dir: data_dir.to_owned(),
                pid,
            });
        }
        Err(fs::TryLockError::Error(source)) => return Err(Error::Io { path, source }),
    }
    let write = |file: &mut File| {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())
    };
    write(&mut file).map_err(at(&path))?;
    Ok(file)
}

impl Layout {
    /// Chooses the directories, and creates those that are missing with the right owner and mode.
    fn prepare(data_dir: &Path, owner: &Owner) -> Result<Self, Error> {
        let base = Self::base(data_dir, owner)?;
        private_dir(&base, owner)?;
        let mut run = base.join("run");
        let socket = socket(&run);
        if socket.as_os_str().len() > MAX_SOCKET_PATH {
            let name = Digest::of(base.as_os_str().as_encoded_bytes()).hex();
            run = PathBuf::from("/tmp").join(format!("{NAME}-{}", &name[..12]));
        }
        private_dir(&run, owner)?;
        Ok(Self {
            data: base.join("data"),
            unfinished: base.join(format!("{UNFINISHED}{}", new_id())),
            run,
            log: base.join("server.log"),
        })
    }

    /// The directory `postgres/` in the data directory. If the cluster's user cannot reach root's data directory (under
    /// a home of mode 0700, say), it is a directory of `/var/lib/promptweave`, whose name the data directory stores.
    fn base(data_dir: &Path, owner: &Owner) -> Result<PathBuf, Error> {
        if owner.can_reach(data_dir) {
            return Ok(data_dir.join("postgres"));
        }
        let note = data_dir.join("postgres.path");
        if let Ok(path) = fs::read_to_string(&note) {
            return Ok(PathBuf::from(path.trim_end()));
        }
        let parent = Path::new("/var/lib").join(NAME);
        fs::create_dir_all(&parent).map_err(at(&parent))?;
        let base = parent.join(format!("cluster-{}", new_id()));
        fs::write(&note, format!("{}\n", base.display())).map_err(at(&note))?;
        tracing::info!(
            data_dir = %data_dir.display(), cluster = %base.display(),
            "the database's user cannot reach the data directory, the cluster goes elsewhere"
        );
        Ok(base)
    }
}

/// Creates a directory that only the cluster's owner can enter, or checks that an existing one is such.
fn private_dir(dir: &Path, owner: &Owner) -> Result<(), Error> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => return chown(dir, owner.uid, owner.gid).map_err(at(dir)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(at(dir)(error)),
    }
    // Links are not followed: in /tmp anybody could have made one.
    let found = fs::symlink_metadata(dir).map_err(at(dir))?;
    let uid = owner
        .uid
        .unwrap_or_else(|| rustix::process::geteuid().as_raw());
    if !found.is_dir() || found.uid() != uid || found.mode() & 0o077 != 0 {
        return Err(Error::Untrusted(dir.to_owned()));
    }
    Ok(())
}

/// The path of the socket's file in the directory `run`, as PostgreSQL names it.
fn socket(run: &Path) -> PathBuf {
    run.join(format!(".s.PGSQL.{PORT}"))
}

/// Stops the postmaster that a killed `up` left, if there is one, and removes what would keep the next one from
/// starting.
async fn stop_orphan(layout: &Layout) -> Result<(), Error> {
    let data = &layout.data;
    let pid_file = data.join("postmaster.pid");
    if let Some(Ok(id)) = holder(&pid_file)
        && is_postgres_of(id, data)
    {
        end_postmaster(id, data).await?;
    }
    // The sessions of a killed postmaster end by themselves a moment later.
    let asked = Instant::now();
    while asked.elapsed() < STOP_TIMEOUT && any_postgres_of(data) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut socket_lock = socket(&layout.run).into_os_string();
    socket_lock.push(".lock");
    release_from_stranger(&pid_file)?;
    release_from_stranger(Path::new(&socket_lock))
}

/// The process id at the beginning of a PostgreSQL lock file. None if there is no such file, Err if the file has no
/// such number.
fn holder(lock_file: &Path) -> Option<Result<u32, ()>> {
    let text = fs::read_to_string(lock_file).ok()?;
    let id = text.lines().next().map(|line| line.trim().parse());
    Some(id.and_then(Result::ok).ok_or(()))
}

/// Removes a lock file left by a crash whose process id now belongs to an unrelated process: PostgreSQL would take that
/// process for its own and refuse to start. If no process has the id, PostgreSQL handles the file itself.
fn release_from_stranger(lock_file: &Path) -> Result<(), Error> {
    match holder(lock_file) {
        None => Ok(()),
        Some(Ok(id)) if !Path::new(&format!("/proc/{id}")).exists() => Ok(()),
        Some(_) => match fs::remove_file(lock_file) {
            // The postmaster was about to end, and has ended.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(at(lock_file)),
        },
    }
}

async fn end_postmaster(id: u32, data: &Path) -> Result<(), Error> {
    tracing::warn!(
        pid = id,
        "stopping the database that a killed `up` has left running"
    );
    for signal in [Signal::INT, Signal::QUIT] {
        if let Some(pid) = pid(id) {
            let _ = kill_process(pid, signal);
        }
        let asked = Instant::now();
        while asked.elapsed() < STOP_TIMEOUT {
            if !is_postgres_of(id, data) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    Err(Error::Orphan {
        pid: id,
        dir: data.to_owned(),
    })
}

/// Whether a process is a postmaster of `data` or one of its sessions: these have the data directory as their `cwd`.
fn is_postgres_of(pid: u32, data: &Path) -> bool {
    let link = |name| fs::read_link(format!("/proc/{pid}/{name}"));
    link("cwd").is_ok_and(|cwd| cwd == data)
        && link("exe").is_ok_and(|exe| exe.file_name().is_some_and(|name| name == "postgres"))
}

fn any_postgres_of(data: &Path) -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .any(|id| is_postgres_of(id, data))
}

/// Removes what interrupted runs of `initdb` left next to `layout.data`.
fn remove_unfinished(layout: &Layout) {
    let base = layout.data.parent().into_iter();
    for entry in base
        .filter_map(|base| fs::read_dir(base).ok())
        .flatten()
        .flatten()
    {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED)
            && let Err(error) = fs::remove_dir_all(entry.path())
        {
            // The folder only takes disk space; the next start tries again.
            tracing::warn!(path = %entry.path().display(), %error, "cannot be removed");
        }
    }
}

impl Programs {
    async fn initdb(&self, layout: &Layout) -> Result<(), Error> {
        tracing::info!(directory = %layout.data.display(), "making the private database");
        remove_unfinished(layout);
        let output = self
            .command("initdb")
            .arg("--pgdata")
            .arg(&layout.unfinished)
            .args(["--username", NAME, "--auth", "trust", "--no-instructions"])
            .args(["--encoding", "UTF8", "--locale", "C"])
            .kill_on_drop(true)
            .output()
            .await
            .map_err(at(&self.dir.join("initdb")))?;
        if !output.status.success() {
            return Err(Error::Program {
                program: "initdb",
                output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            });
        }
        fs::rename(&layout.unfinished, &layout.data).map_err(at(&layout.data))
    }

    fn postgres(&self, layout: &Layout) -> Result<Child, Error> {
        // The log is only of this run; PostgreSQL writes to both streams.
        let log = File::create(&layout.log).map_err(at(&layout.log))?;
        let run = layout.run.display().to_string().replace('"', "\"\"");
        self.command("postgres")
            .arg("-D")
            .arg(&layout.data)
            .args(["-c", "listen_addresses=", "-c", &format!("port={PORT}")])
            // The value is a list, so quotes protect a comma or a blank in the path.
            .args(["-c", &format!("unix_socket_directories=\"{run}\"")])
            .args(["-c", &format!("cluster_name={NAME}")])
            .stdin(Stdio::null())
            .stderr(log.try_clone().map_err(at(&layout.log))?)
            .stdout(log)
            // Ctrl-C in a terminal is meant for `up`, which stops the database last.
            .process_group(0)
            .spawn()
            .map_err(at(&self.dir.join("postgres")))
    }
}
