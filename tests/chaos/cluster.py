"""A PostgreSQL cluster of one's own that waits for the disk as a real one does, and can be restarted and killed."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

START_TIMEOUT_S = 30


def programs() -> pathlib.Path:
    """Where `initdb` and `pg_ctl` are: as scripts/with_postgres.sh finds them."""
    if named := os.environ.get("PROMPTWEAVE_POSTGRES_BIN"):
        return pathlib.Path(named)
    folders = [pathlib.Path(found).parent] if (found := shutil.which("initdb")) else []
    folders += sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"), key=lambda it: float(it.parent.name))
    found = [folder for folder in folders if (folder / "initdb").exists() and (folder / "pg_ctl").exists()]
    if not found:
        raise SystemExit("PostgreSQL's server is not installed; scripts/setup.sh does it")
    return found[-1]


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


class Cluster:
    """Runs until the end of its `with` block."""

    def __init__(self, folder: pathlib.Path):
        self.bin, self.folder, self.port = programs(), folder, free_port()
        self.folder.mkdir(parents=True)
        # PostgreSQL refuses to run as root; Debian's package brings a user for it.
        self.as_owner = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self.as_owner:
            shutil.chown(self.folder, "postgres")
        self.run("initdb", "--username", "postgres", "--auth", "trust", "--encoding", "UTF8", "--locale", "C")
        self.start()

    def run(self, program: str, *arguments: str, check=True) -> bool:
        command = [*self.as_owner, str(self.bin / program), "-D", str(self.folder / "data"), *arguments]
        # This is not a pipe, because the server would hold it open.
        with open(self.folder / "commands.log", "a") as log:
            done = subprocess.run(command, cwd="/", stdout=log, stderr=log, check=False)
        if check and done.returncode != 0:
            raise SystemExit(f"{program} failed: {(self.folder / 'commands.log').read_text()}")
        return done.returncode == 0

    def start(self):
        settings = f"-c listen_addresses=127.0.0.1 -p {self.port} -c unix_socket_directories={self.folder} -c max_connections=300"
        arguments = ["start", "--wait", "-l", str(self.folder / "data" / "server.log"), "-o", settings]
        deadline = time.monotonic() + START_TIMEOUT_S
        # After a kill the shared memory stays in use until the last backend has noticed.
        while not self.run("pg_ctl", *arguments, check=False):
            if time.monotonic() > deadline:
                raise SystemExit(f"PostgreSQL does not start: {self.folder / 'data' / 'server.log'}")
            time.sleep(0.1)

    def restart(self):
        """In immediate mode: every backend is killed, and the log is read again at the start."""
        self.run("pg_ctl", "stop", "--mode", "immediate", "--wait")
        self.start()

    def kill(self):
        """kill -9 of the server; `start` brings it back."""
        os.kill(int((self.folder / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)

    def url(self, database: str) -> str:
        return f"postgres://postgres@127.0.0.1:{self.port}/{database}"

    def sql(self, database: str, statement: str) -> str:
        command = [str(self.bin / "psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", self.url(database), "-c", statement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"psql: {done.stderr.strip()}")
        return done.stdout.strip()

    def rows(self, database: str, query: str) -> list[dict]:
        found = self.sql(database, f"SELECT coalesce(json_agg(row), '[]') FROM ({query}) AS row")
        return json.loads(found)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.run("pg_ctl", "stop", "--mode", "immediate", check=False)
