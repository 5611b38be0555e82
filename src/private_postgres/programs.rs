//! Finds the PostgreSQL programs of the private cluster, and the user that they run as.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command as StdCommand;

use tokio::process::Command;

use crate::private_postgres::PrivatePostgresError as Error;

/// The oldest major version that the schema supports.
pub const MIN_MAJOR: u32 = 15;

/// The user that the cluster runs as: this process's own, or `postgres` for root.
#[derive(Clone, Debug)]
pub struct Owner {
    /// None for this process's own user.
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

impl Owner {
    pub fn of_cluster() -> Result<Self, Error> {
        if !rustix::process::geteuid().is_root() {
            return Ok(Self {
                uid: None,
                gid: None,
            });
        }
        // This asks `id` instead of /etc/passwd, because users may come from a directory service.
        let id = |which| {
            let output = StdCommand::new("id")
                .args([which, "postgres"])
                .output()
                .ok()?;
            String::from_utf8(output.stdout).ok()?.trim().parse().ok()
        };
        match (id("-u"), id("-g")) {
            (Some(uid), Some(gid)) => Ok(Self {
                uid: Some(uid),
                gid: Some(gid),
            }),
            _ => Err(Error::NoOwner),
        }
    }

    /// Whether that user may enter `dir`, according to all of the system's rules.
    pub fn can_reach(&self, dir: &Path) -> bool {
        let mut test = StdCommand::new("test");
        test.arg("-x").arg(dir).current_dir("/");
        self.become_owner(&mut test);
        test.status().is_ok_and(|status| status.success())
    }

    fn become_owner(&self, command: &mut StdCommand) {
        use std::os::unix::process::CommandExt;
        if let (Some(uid), Some(gid)) = (self.uid, self.gid) {
            command.uid(uid).gid(gid);
        }
    }
}

/// One installation of PostgreSQL.
#[derive(Clone, Debug)]
pub struct Programs {
    pub dir: PathBuf,
    pub owner: Owner,
}

impl Programs {
    /// The programs in `bin`, or else the newest installed ones. Once `data` holds a cluster, they must have its major
    /// version.
    pub fn find(bin: Option<&Path>, owner: Owner, data: &Path) -> Result<Self, Error> {
        let candidates = match bin {
            Some(dir) => BTreeSet::from([dir.to_owned()]),
            None => installed(),
        };
        let suitable: Vec<(u32, PathBuf)> = candidates
            .into_iter()
            .filter_map(|dir| Some((major(&dir).filter(|found| *found >= MIN_MAJOR)?, dir)))
            .collect();
        let needed: Option<u32> = fs::read_to_string(data.join("PG_VERSION"))
            .ok()
            .and_then(|text| text.trim().parse().ok());
        let found = match needed {
            Some(needed) => suitable.iter().find(|(major, _)| *major == needed),
            None => suitable.iter().max(),
        };
        match (found, needed, bin) {
            (Some((_, dir)), ..) => Ok(Self {
                dir: dir.clone(),
                owner,
            }),
            (None, Some(major), _) => Err(Error::OtherMajor {
                dir: data.to_owned(),
                major,
            }),
            (None, None, Some(dir)) => Err(Error::Unsuitable(dir.to_owned())),
            (None, None, None) => Err(Error::NotInstalled {
                searched: "/usr/lib/postgresql/*/bin, /usr/pgsql-*/bin and PATH".to_owned(),
            }),
        }
    }

    /// A command that runs the program as the cluster's owner, without this process's `PG…` variables.
    pub fn command(&self, program: &str) -> Command {
        let mut command = StdCommand::new(self.dir.join(program));
        self.owner.become_owner(&mut command);
        // The owner may not be allowed into the current directory.
        command.current_dir("/").env("LC_ALL", "C");
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"PG") {
                command.env_remove(name);
            }
        }
        Command::from(command)
    }
}

/// Directories that may hold the programs; Debian keeps them off PATH.
fn installed() -> BTreeSet<PathBuf> {
    let versions = |parent: &str, prefix: &str| {
        let entries = fs::read_dir(parent).into_iter().flatten().flatten();
        let prefix = prefix.to_owned();
        entries
            .filter(move |entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .map(|entry| entry.path().join("bin"))
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    versions("/usr/lib/postgresql", "")
        .chain(versions("/usr", "pgsql-"))
        .chain(std::env::split_paths(&path))
        .collect()
}

/// The major version of the programs in `dir`; None unless both are there.
fn major(dir: &Path) -> Option<u32> {
    if !dir.join("initdb").is_file() {
        return None;
    }
    let output = StdCommand::new(dir.join("postgres"))
        .arg("--version")
        .output()
        .ok()?;
    // Examples: `postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)`, `postgres (PostgreSQL) 18beta1`.
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.split(' ').nth(2)?;
    let digits = version
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(version.len());
    version[..digits].parse().ok()
}
