#!/usr/bin/env python3
"""The registry beside MLflow's, on one PostgreSQL server; `make bench-api` runs this.

    POSTGRES_DURABLE=1 scripts/with_postgres.sh python3 benches/bench_api.py --mlflow PYTHON

Both run as their documentation starts them, each with a database of its own, and are asked for the same things in turn:
to register a prompt of 150 KB, to read a version's record, to list, to filter by a tag, to download; with 100, 10,000 and
100,000 versions in the registry (MLflow without the last), by one client and by 16, over connections that are kept and
connections that are not. Registering in MLflow is the least there is: the artifact's upload and the version's record, in a run that is there already.
"""

import argparse
import json
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

from harness import ROOT, BenchError, digits, machine, machine_line, main, say, table, target_folder, write_into_document, write_result

sys.path.insert(0, str(ROOT / "scripts"))
from service import Service  # noqa: E402

SECTION = "bench-api"
SIZES = [100, 10_000, 100_000]
MLFLOW_SIZES = SIZES[:2]
MODES = [(clients, keep_alive) for clients in (1, 16) for keep_alive in (True, False)]
PER_PROMPT = 10
TOKENS, EMBED_DIM = 50, 768
PROMPT_FILE = "application/vnd.prompt+safetensors"
OURS, THEIRS = "promptweave", "MLflow"


def safetensors(tokens: int, width: int) -> bytes:
    size = tokens * width * 4
    header = {"prompt_embeddings": {"dtype": "F32", "shape": [tokens, width], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + struct.pack("<f", 0.25) * (tokens * width)


def request(method: str, url: str, body=None, kind="application/json", key=None):
    """The answer's JSON; for what is set up before anything is measured."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = ({"content-type": kind} if data else {}) | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=60) as answer:
            content = answer.read()
    except urllib.error.HTTPError as error:
        raise BenchError(f"{method} {url}: {error.code} {error.read().decode(errors='replace')}") from None
    return json.loads(content) if content else None


# ---- The two -----------------------------------------------------------------------------------------------


def psql(database: str, sql: str):
    done = subprocess.run(["psql", "-qv", "ON_ERROR_STOP=1", database], input=sql, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise BenchError(done.stderr)


class Promptweave:
    name = OURS

    def __init__(self, service: Service, database: str, file: pathlib.Path):
        self.service, self.database, self.filled = service, database, 0
        self.key = service.key("read", "write")
        self.pid = service.process.pid
        v1 = service.url + "/v1"
        request("POST", v1 + "/prompts", {"name": "bench"}, key=self.key)
        request("POST", v1 + "/prompts/bench/versions", file.read_bytes(), PROMPT_FILE, self.key)
        get = lambda path: [{"method": "GET", "url": v1 + path}]  # noqa: E731
        upload = {"method": "POST", "url": v1 + "/prompts/bench/versions", "content_type": PROMPT_FILE, "file": str(file)}
        self.steps = {
            "register": [upload],
            "read": get("/prompts/bench/versions/1"),
            "list": get("/prompts?page_size=50"),
            "download": get("/prompts/bench/versions/1/content"),
        }
        listing = request("GET", service.url + "/openapi.json")["paths"]["/v1/prompts"]["get"]
        if any(parameter["name"] == "tag" for parameter in listing["parameters"]):
            self.steps["filter"] = get("/prompts?page_size=50&tag=" + urllib.parse.quote("kind=rare"))

    def fill(self, versions: int):
        """Up to so many versions of one token, ten to a prompt; every hundredth prompt has the rare tag."""
        file = safetensors(1, 8)
        psql(
            self.database,
            f"""
            CREATE TEMPORARY TABLE new AS
            SELECT i, '\\x{file[:-4].hex()}'::bytea || substring(int8send(i) from 6 for 3) || '\\x3f'::bytea AS bytes
            FROM generate_series({self.filled}, {versions - 1}) AS i;
            INSERT INTO prompt (id, project_id, name, tags)
            SELECT gen_random_uuid(), '00000000-0000-7000-8000-000000000001', 'fill-' || lpad(p::text, 6, '0'),
                   jsonb_build_object('kind', CASE WHEN p % 100 = 0 THEN 'rare' ELSE 'common' END)
            FROM generate_series({self.filled // PER_PROMPT}, {versions // PER_PROMPT - 1}) AS p;
            INSERT INTO blob (sha256, bytes) SELECT sha256(bytes), bytes FROM new;
            INSERT INTO prompt_version
                (id, project_id, prompt_id, version, sha256, origin, num_tokens, embed_dim, depth, dtype, kind)
            SELECT gen_random_uuid(), p.project_id, p.id, i % {PER_PROMPT} + 1, sha256(bytes), 'uploaded', 1, 8, 'shallow', 'f32',
                   'prompt'
            FROM new JOIN prompt p ON p.name = 'fill-' || lpad((i / {PER_PROMPT})::text, 6, '0');
            ANALYZE;
            """,
        )
        self.filled = versions


class Mlflow:
    """`mlflow server` with the number of workers that it takes by itself."""

    name = THEIRS
    key = None

    def __init__(self, python: str, folder: pathlib.Path, database: str, file: pathlib.Path):
        self.database, self.filled = database, 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--backend-store-uri", database, "--artifacts-destination", str(folder / "artifacts")]
        self.log = open(folder / "mlflow.log", "w+")
        # The process has a session of its own, because its workers must end with it.
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, cwd=folder, start_new_session=True)
        self.url = f"http://127.0.0.1:{port}"
        try:
            self.prepare(file)
        except BaseException:
            self.stop()
            raise

    def prepare(self, file: pathlib.Path):
        self.wait()
        api = self.url + "/api/2.0/mlflow"
        # A file must belong to a run, or its version is refused; one run serves all files.
        run = request("POST", api + "/runs/create", {"experiment_id": "0"})["run"]["info"]
        source, run_id = run["artifact_uri"], run["run_id"]
        artifacts = self.url + "/api/2.0/mlflow-artifacts/artifacts" + urllib.parse.urlsplit(source).path
        request("POST", api + "/registered-models/create", {"name": "bench"})
        request("PUT", artifacts + "/0/prompt.safetensors", file.read_bytes(), "application/octet-stream")
        request("POST", api + "/model-versions/create", {"name": "bench", "source": source + "/0", "run_id": run_id})
        get = lambda url: [{"method": "GET", "url": url}]  # noqa: E731
        put = {"method": "PUT", "url": artifacts + "/{n}/prompt.safetensors", "file": str(file)}
        put["content_type"] = "application/octet-stream"
        record = {"method": "POST", "url": api + "/model-versions/create", "content_type": "application/json"}
        record["text"] = json.dumps({"name": "bench", "source": source + "/{n}", "run_id": run_id})
        search = api + "/registered-models/search?max_results=50"
        self.steps = {
            "register": [put, record],
            "read": get(api + "/model-versions/get?name=bench&version=1"),
            "list": get(search),
            "filter": get(search + "&filter=" + urllib.parse.quote("tags.kind = 'rare'")),
            "download": get(artifacts + "/0/prompt.safetensors"),
        }

    def wait(self):
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(self.url + "/health", timeout=10).close()
                return
            except (urllib.error.URLError, ConnectionError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.log.seek(0)
                    raise BenchError(f"MLflow does not start:\n{self.log.read()[-3000:]}") from None
                time.sleep(0.2)

    def fill(self, versions: int):
        psql(
            self.database,
            f"""
            INSERT INTO registered_models (workspace, name, creation_time, last_updated_time)
            SELECT 'default', 'fill-' || lpad(p::text, 6, '0'), 1.8e12, 1.8e12
            FROM generate_series({self.filled // PER_PROMPT}, {versions // PER_PROMPT - 1}) AS p;
            INSERT INTO registered_model_tags (workspace, name, key, value)
            SELECT 'default', 'fill-' || lpad(p::text, 6, '0'), 'kind', CASE WHEN p % 100 = 0 THEN 'rare' ELSE 'common' END
            FROM generate_series({self.filled // PER_PROMPT}, {versions // PER_PROMPT - 1}) AS p;
            INSERT INTO model_versions
                (workspace, name, version, creation_time, last_updated_time, current_stage, source, status)
            SELECT 'default', 'fill-' || lpad((i / {PER_PROMPT})::text, 6, '0'), i % {PER_PROMPT} + 1, 1.8e12, 1.8e12, 'None',
                   'mlflow-artifacts:/fill/' || i, 'READY'
            FROM generate_series({self.filled}, {versions - 1}) AS i;
            ANALYZE;
            """,
        )
        self.filled = versions

    def stop(self):
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()


# ---- Measuring ---------------------------------------------------------------------------------------------


class Load:
    def __init__(self, program: str):
        self.program, self.next = program, 1

    def __call__(self, system, operation: str, clients: int, keep_alive: bool, seconds: float):
        plan = {"clients": clients, "keep_alive": keep_alive, "seconds": seconds, "first": self.next}
        plan |= {"steps": system.steps[operation], "authorization": f"Bearer {system.key}" if system.key else None}
        done = subprocess.run([self.program], input=json.dumps(plan), capture_output=True, text=True, check=True)
        report = json.loads(done.stdout)
        self.next = report["next"]
        if report["errors"] or not report["rounds"]:
            raise BenchError(f"{system.name}, {operation}, {clients} clients: {report['errors']} errors: {report['error']}")
        return report


def peak_rss_mib(pid: int) -> float:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def measure(systems, load: Load, seconds: float):
    """One after the other in every setting, so that what else the machine does meets both."""
    rows, memory = [], None
    for size in SIZES:
        present = [system for system in systems if system.name == OURS or size in MLFLOW_SIZES]
        for system in present:
            system.fill(size)
            for operation in system.steps:
                load(system, operation, 1, True, 0.3)
        for operation in ["register", "read", "list", "filter", "download"]:
            for clients, keep_alive in MODES:
                asked = [system for system in present if operation in system.steps]
                found = {system.name: load(system, operation, clients, keep_alive, seconds) for system in asked}
                row = {"versions": size, "operation": operation, "clients": clients, "keep_alive": keep_alive} | found
                rows.append(row)
                say(f"{size:7,d} {operation:9s} {clients:2d} {'keep' if keep_alive else 'close':5s} " + ", ".join(
                    f"{name} {one['per_second']:,.0f}/s p50 {one['p50_ms']:.1f} ms" for name, one in found.items()))
                if operation == "register" and clients == 16:
                    memory = max(memory or 0, peak_rss_mib(systems[0].pid))
    return rows, memory


def summary(result) -> str:
    lines = []
    for row in result["rows"]:
        ours, theirs = row.get(OURS), row.get(THEIRS)
        if not ours:
            continue
        ratio = f"{ours['per_second'] / theirs['per_second']:.1f}×" if theirs else "–"
        cells = [f"{row['operation']}, {row['versions']:,} versions, {row['clients']}, {'kept' if row['keep_alive'] else 'closed'}"]
        for one in (ours, theirs):
            cells += [digits(one["per_second"]), digits(one["p50_ms"]), digits(one["p95_ms"])] if one else ["–"] * 3
        lines.append([*cells, ratio])
    header = ["operation, versions, clients, connection", "promptweave /s", "p50 ms", "p95 ms", "MLflow /s", "p50 ms", "p95 ms", "ratio of /s"]
    return (
        f"{machine_line(result['machine'])} Each setting {result['seconds']} s, one system after the other; "
        f"promptweave (the build without libtorch) checks an API key on every request, MLflow {result['mlflow']} none.\n\n"
        f"{table(header, lines)}\n\n"
        f"Peak RSS of the API's process while 16 clients upload: {result['rss_mib']:.0f} MiB."
    )


def run_all():
    parser = argparse.ArgumentParser(description="the registry beside MLflow's")
    parser.add_argument("--mlflow", required=True, help="Python of an environment with MLflow")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each setting [1.5]")
    parser.add_argument("--program", type=pathlib.Path, required=True, help="promptweave, built without libtorch")
    parser.add_argument("--load", type=pathlib.Path, required=True, help="the bench binary `api`")
    arguments = parser.parse_args()
    base = os.environ["DATABASE_URL"]
    with tempfile.TemporaryDirectory(prefix="promptweave-bench-") as name:
        folder = pathlib.Path(name)
        file = folder / "prompt.safetensors"
        file.write_bytes(safetensors(TOKENS, EMBED_DIM))
        databases = [f"{base.rsplit('/', 1)[0]}/{one}" for one in ("promptweave", "mlflow")]
        psql(base, "CREATE DATABASE promptweave;")
        psql(base, "CREATE DATABASE mlflow;")
        mlflow = Mlflow(arguments.mlflow, folder, databases[1].replace("postgres://", "postgresql://"), file)
        try:
            with Service(arguments.program.resolve(), folder, database=databases[0]) as service:
                ours = Promptweave(service, databases[0], file)
                rows, memory = measure([ours, mlflow], Load(str(arguments.load)), arguments.seconds)
        finally:
            mlflow.stop()
    version = subprocess.run([arguments.mlflow, "-c", "import mlflow; print(mlflow.__version__)"], capture_output=True, text=True, check=True)
    result = {"machine": machine(), "seconds": arguments.seconds, "mlflow": version.stdout.strip(), "rss_mib": memory, "rows": rows}
    write_result(target_folder() / SECTION, result)
    text = summary(result)
    say("\n" + text)
    write_into_document(SECTION, text)


if __name__ == "__main__":
    main(run_all)
