"""A `promptweave serve` of one's own, for scripts that scripts/with_postgres.sh gives a database."""

import os
import pathlib
import re
import selectors
import subprocess
import sys
import time
import urllib.error
import urllib.request

START_TIMEOUT_S = 60


class Service:
    """On a free port if no other is named, with the database that DATABASE_URL names. Stops at the end of its `with` block."""

    def __init__(self, program, folder: pathlib.Path, *options: str, database: str | None = None, listen: str = "127.0.0.1:0"):
        self.program = str(program)
        self.environment = os.environ | {"PROMPTWEAVE_LOG": "warn"}
        if database:
            self.environment["DATABASE_URL"] = database
        subprocess.run([self.program, "migrate"], check=True, env=self.environment)
        command = [self.program, "serve", "--listen", listen, "--data-dir", str(folder), *options]
        self.log = open(folder / "service.log", "a+")
        environment = self.environment | {"PROMPTWEAVE_LOG": "info"}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=self.log, text=True)
        try:
            self.url = self.announced()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def announced(self) -> str:
        """The address, from the line that the service prints when it listens."""
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            if not waiting.select(START_TIMEOUT_S):
                sys.exit("the service does not start")
        found = re.search(r"http://[^\s/]+", self.process.stdout.readline())
        if not found:
            sys.exit(f"the service does not start:\n{self.errors()}")
        return found[0]

    def wait_until_ready(self):
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                urllib.request.urlopen(self.url + "/readyz", timeout=START_TIMEOUT_S).close()
                return
            except urllib.error.URLError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"the service does not start:\n{self.errors()}")
                time.sleep(0.05)

    def key(self, *scopes: str) -> str:
        """A new API key of the default project."""
        command = [self.program, "keys", "create", "--name", "script"]
        for scope in scopes:
            command += ["--scope", scope]
        return subprocess.run(command, check=True, env=self.environment, stdout=subprocess.PIPE, text=True).stdout.strip()

    def errors(self) -> str:
        """What it logged of errors so far."""
        self.log.seek(0)
        return "".join(line for line in self.log if " ERROR " in line or "rror:" in line)

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
