"""One service with its own database, workers and files on a cluster, and clients that ask it for ensembles."""

import http.client
import json
import os
import pathlib
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.parse

from cluster import Cluster
from faults import Faults

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path += [str(ROOT / "scripts"), str(ROOT / "benches")]
from bench_api import PROMPT_FILE, safetensors  # noqa: E402
from service import Service  # noqa: E402

FIXTURES = ROOT / "tests" / "fixtures"
# The width of the backbone of tests/fixtures/timm_vit.
WIDTH = 32
SOURCES = ["digits", "flowers"]
# The time allowed for claiming a lost job again, in seconds beyond the lease.
MARGIN_S = 5
BETWEEN_LOOKS_S = 0.02
ANSWER_TIMEOUT_S = 75


class Broken(Exception):
    """A promise is, or nothing can be said about it."""


def wait_until(true, limit_s: float, what: str):
    """The first answer of `true` that is one."""
    deadline = time.monotonic() + limit_s
    while not (found := true()):
        if time.monotonic() > deadline:
            raise Broken(f"after {limit_s:.0f} s still not: {what}")
        time.sleep(BETWEEN_LOOKS_S)
    return found


class Unreachable(Exception):
    """No answer, or none that says anything about the request: it may be sent again."""


class Api:
    def __init__(self, url: str, key: str):
        self.address, self.key = urllib.parse.urlsplit(url).netloc, key

    def call(self, method: str, path: str, body=None, **headers: str) -> tuple[int, dict]:
        """Status and answer, of whatever kind but a 5xx."""
        kind = {"content-type": "application/json"} if body is not None else {}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {self.key}"} | kind | {name.replace("_", "-"): it for name, it in headers.items()}
        connection = http.client.HTTPConnection(self.address, timeout=ANSWER_TIMEOUT_S)
        try:
            connection.request(method, f"/v1{path}", data, headers)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(repr(error)) from None
        finally:
            connection.close()
        if answer.status >= 500:
            raise Unreachable(content.decode(errors="replace"))
        is_json = "json" in answer.headers.get("content-type", "")
        return answer.status, json.loads(content) if is_json else {"content": content}

    def patiently(self, method: str, path: str, body=None, limit_s=90.0, **headers: str) -> tuple[int, dict]:
        """As `call`, asking again for as long as the service or its database is away."""
        last = ""

        def answered():
            nonlocal last
            try:
                return self.call(method, path, body, **headers)
            except Unreachable as error:
                last = str(error)
                return None

        try:
            return wait_until(answered, limit_s, f"an answer to {method} {path}")
        except Broken as error:
            raise Broken(f"{error}: {last}") from None

    def ok(self, method: str, path: str, body=None, **headers: str) -> dict:
        status, answer = self.patiently(method, path, body, **headers)
        if status >= 300:
            raise Broken(f"{method} {path}: {status} {answer}")
        return answer

    def ended(self, job: str, limit_s=120.0) -> dict:
        """The ensemble when it is over."""
        deadline = time.monotonic() + limit_s
        while True:
            found = self.ok("GET", f"/ensembles/{job}?wait=10")
            if found["state"] in ("succeeded", "failed", "cancelled"):
                return found
            if time.monotonic() > deadline:
                raise Broken(f"ensemble {job} is {found['state']} after {limit_s:.0f} s")


class Worker:
    """A place for a worker: when its process ends, another is started at once."""

    def __init__(self, stage: "Stage", number: int):
        self.stage, self.number = stage, number
        # The job that it claimed last.
        self.job: str | None = None
        self.stopping = False
        self.folder = stage.folder / f"worker-{number}"
        self.folder.mkdir()
        # The blob store is shared, but each worker has its own cache of inputs.
        (self.folder / "blobs").symlink_to(stage.folder / "blobs")
        self.log = open(self.folder / "worker.log", "a")
        self.start()
        threading.Thread(target=self.supervise, daemon=True).start()

    def start(self):
        stage = self.stage
        # Its stdin ends with this harness, however that ends.
        command = [str(stage.program), "worker", "--stop-with-stdin", "--data-dir", str(self.folder)]
        command += ["--lease-s", str(stage.lease_s), "--compose-ms", str(stage.compose_ms)]
        command += ["--shared"] if stage.shares else []
        environment = os.environ | {"DATABASE_URL": stage.database_url}
        with stage.faults.starting:
            if self.stopping:
                return
            self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=self.log)
            process = self.process
            stage.faults.decisions[process.pid] = lambda point, job: self.reached(process, point, job)

    def supervise(self):
        while not self.stopping:
            process = self.process
            process.wait()
            self.stage.faults.decisions.pop(process.pid, None)
            process.stdin.close()
            self.start()

    def reached(self, process: subprocess.Popen, point: str, job: str | None) -> str:
        if point == "claimed":
            self.job = job
        return self.stage.decide(self, process, point, job)

    def stop(self):
        with self.stage.faults.starting:
            self.stopping = True
        self.process.kill()
        self.process.wait()


class Stage:
    """`decide` may be set: it is called with a worker (None: the server), its process, the point it has reached and the
    job. Ends with its `with` block."""

    def __init__(self, cluster: Cluster, faults: Faults, program: pathlib.Path, folder: pathlib.Path, *,
                 workers: int, lease_s: int, compose_ms: int, options: tuple[str, ...] = (), shares: bool = False):
        self.cluster, self.faults, self.program, self.folder = cluster, faults, program, folder
        self.lease_s, self.compose_ms, self.options, self.shares = lease_s, compose_ms, options, shares
        self.database = folder.name.replace("-", "_")
        self.database_url = cluster.url(self.database)
        self.decide = lambda worker, process, point, job: ""
        self.stopping = False
        (folder / "blobs").mkdir(parents=True)
        cluster.sql("postgres", f"CREATE DATABASE {self.database}")
        self.serve("127.0.0.1:0")
        self.api = Api(self.service.url, self.service.key("read", "write", "run", "admin"))
        self.fill()
        threading.Thread(target=self.supervise, daemon=True).start()
        self.workers = [Worker(self, number) for number in range(workers)]

    def serve(self, listen: str):
        roots = ("--dataset-root", str(FIXTURES), "--backbone-root", str(FIXTURES))
        self.service = Service(self.program, self.folder, *roots, *self.options, database=self.database_url, listen=listen)
        process = self.service.process
        self.faults.decisions[process.pid] = lambda point, job: self.decide(None, process, point, job)

    def supervise(self):
        while True:
            self.service.process.wait()
            if self.stopping:
                return
            self.serve(self.api.address)

    def fill(self):
        """A backbone, a dataset and prompts, all tiny."""
        self.api.ok("POST", "/datasets", {"name": "pets", "directory": "parquet"})
        backbone = self.api.ok("POST", "/backbones", {"name": "tiny", "directory": "timm_vit"})
        self.made_for = f"backbone_digest={backbone['digest']}&preprocessing_id={backbone['preprocessing_id']}"
        for name in SOURCES:
            self.api.ok("POST", "/prompts", {"name": name})
            self.upload(name, prompt_file(random.Random(name)))

    def upload(self, name: str, file: bytes) -> dict:
        return self.api.ok("POST", f"/prompts/{name}/versions?{self.made_for}", file, content_type=PROMPT_FILE)

    def post(self, seed: int, force=True, **headers: str) -> tuple[int, dict]:
        target = {"dataset": "pets", "seed": seed}
        body = {"backbone": "tiny", "target": target, "sources": [{"prompt": name} for name in SOURCES], "force": force}
        return self.api.patiently("POST", "/ensembles", body, **headers)

    def new_job(self, seed: int) -> str:
        status, answer = self.post(seed)
        if status >= 300:
            raise Broken(f"an ensemble was refused: {status} {answer}")
        return answer["id"]

    def rows(self, query: str) -> list[dict]:
        return self.cluster.rows(self.database, query)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self.workers:
            worker.stop()
        self.stopping = True
        self.service.process.send_signal(signal.SIGKILL)
        self.service.stop()


def prompt_file(numbers: random.Random) -> bytes:
    """Two tokens; no two files of one generator are the same."""
    return safetensors(2, WIDTH)[:-4] + struct.pack("<f", numbers.random())
