#!/usr/bin/env python3
"""One job shared by several workers, with the real engine on the demo's images; `make bench-workers` runs this, and
`make test` in short.

    scripts/with_postgres.sh python3 benches/bench_workers.py [--short] PROMPTWEAVE

Every worker has one thread. Measured: one worker alone, two that share, two of which the one that has the job is killed in
the middle, and one that is killed in the middle and started again. The weights of all must be those of the first within
1e-6, and two must take less time than one; otherwise it fails. Python's standard library is enough.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

from harness import ROOT, BenchError, digits, machine, machine_line, main, say, table, target_folder, write_into_document, write_result

sys.path.insert(0, str(ROOT / "scripts"))

from service import Service  # noqa: E402

SECTION = "bench-workers"
LEASE_S = 5
# The size of a shard of the demo's 200 images and 6 prompts: eight shards in each phase.
MIN_SHARD_PAIRS = 150
TOLERANCE = 1e-6
FINISHED = ("succeeded", "failed", "cancelled")


class Api:
    def __init__(self, service, key):
        self.url, self.key = service.url, key

    def call(self, method, path, body=None, kind="application/json"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        headers = {"authorization": f"Bearer {self.key}"} | ({"content-type": kind} if data else {})
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise BenchError(f"{method} {path}: {error.code} {error.read().decode(errors='replace')}") from None

    def fill(self):
        self.call("POST", "/v1/backbones", {"name": "vit-s14", "directory": "vit_s14_focus"})
        self.call("POST", "/v1/datasets", {"name": "clipart", "directory": "target"})
        self.sources = []
        for file in sorted((ROOT / "demo" / "prompts").glob("*.safetensors")):
            self.call("POST", "/v1/prompts", {"name": file.stem})
            path = f"/v1/prompts/{file.stem}/versions"
            self.call("POST", path, file.read_bytes(), "application/vnd.prompt+safetensors")
            self.sources.append({"prompt": file.stem})

    def post(self, images, **more):
        target = {"dataset": "clipart", "max_samples": images}
        # The weights are those of a mixture: if one source had all the weight, the runs would not differ.
        asked = {"backbone": "vit-s14", "target": target, "sources": self.sources, "objective": {"method": "hgprompt"}, "force": True}
        return self.call("POST", "/v1/ensembles", asked | more)["id"]

    def wait(self, job, until):
        """The ensemble, once `until` is true of it."""
        deadline = time.monotonic() + 900
        while time.monotonic() < deadline:
            ensemble = self.call("GET", f"/v1/ensembles/{job}")
            if ensemble["state"] in ("failed", "cancelled"):
                raise BenchError(f"the ensemble {ensemble['state']}: {ensemble['error']}")
            if until(ensemble):
                return ensemble
            time.sleep(0.05)
        raise BenchError(f"the ensemble is still {ensemble['state']}")

    def events(self, job):
        return self.call("GET", f"/v1/ensembles/{job}/events")["items"]


class Workers:
    """Worker processes of one thread each, with a cache of files of their own and no cache of results."""

    def __init__(self, promptweave, folder, stack):
        self.promptweave, self.folder, self.stack = promptweave, folder, stack
        self.running = []

    def start(self, count):
        for _ in range(count):
            own = pathlib.Path(tempfile.mkdtemp(prefix="worker-", dir=self.folder))
            # The files are where the server has them; only the cache is the worker's own.
            (own / "blobs").symlink_to(self.folder / "blobs")
            command = [self.promptweave, "worker", "--device", "cpu", "--threads", "1", "--cache-gib", "0"]
            command += ["--data-dir", own, "--lease-s", str(LEASE_S), "--min-shard-pairs", str(MIN_SHARD_PAIRS)]
            with open(own / "log", "w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            self.stack.callback(process.kill)
            self.running.append(process)

    def wait_until_ready(self, api, count):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            live = [worker for worker in api.call("GET", "/v1/workers")["items"] if worker["live"]]
            pids = {process.pid: process for process in self.running}
            if sum(worker["pid"] in pids for worker in live) >= count:
                return {worker["id"]: pids[worker["pid"]] for worker in live if worker["pid"] in pids}
            time.sleep(0.05)
        raise BenchError("the workers do not start")

    def stop(self):
        for process in self.running:
            process.send_signal(signal.SIGTERM)
        for process in self.running:
            process.wait()
        self.running = []


def measure(api, workers, images, count, kill, **more):
    """A job by `count` workers, of which the one that has it is killed once half of the gradients are there."""
    workers.start(count)
    by_id = workers.wait_until_ready(api, count)
    started = time.monotonic()
    job = api.post(images, **more)
    killed = None
    if kill:
        half = lambda e: e["phase"] == "gradients" and e["progress"]["done"] * 2 >= e["progress"]["total"]  # noqa: E731
        api.wait(job, lambda e: e["state"] == "succeeded" or half(e))
        owner = [event for event in api.events(job) if event["kind"] == "started"][-1]["data"]["worker"]
        by_id[owner].kill()
        by_id[owner].wait()
        workers.running.remove(by_id[owner])
        killed = time.monotonic()
        if count == 1:
            workers.start(1)
    ensemble = api.wait(job, lambda e: e["state"] == "succeeded")
    seconds = time.monotonic() - started
    workers.stop()
    events = api.events(job)
    shards = [event["data"] for event in events if event["kind"] == "shard"]
    if kill and ensemble["attempt"] < 2:
        raise BenchError("the job had ended before its worker was killed")
    result = api.call("GET", f"/v1/ensembles/{job}/result")
    return {
        "seconds": seconds,
        "after_the_kill": killed and time.monotonic() - killed,
        "attempts": ensemble["attempt"],
        "shards": len(shards),
        # Each shard is stored once, whatever happens.
        "distinct_shards": len({(shard["phase"], shard["index"]) for shard in shards}),
        "workers": len({shard["worker"] for shard in shards}),
        "estimates": sum(event["kind"] == "estimate" for event in events),
        "early_stop": result.get("early_stop"),
        "weights": {source["prompt"]: source["weight"] for source in result["source_weights"]},
    }


def difference(a, b):
    return max(abs(a["weights"][name] - b["weights"][name]) for name in a["weights"])


def bench():
    parser = argparse.ArgumentParser(description="one job shared by several workers")
    parser.add_argument("promptweave", type=pathlib.Path)
    parser.add_argument("--short", action="store_true", help="a few images, and no figures in docs/performance.md")
    arguments = parser.parse_args()
    images = 80 if arguments.short else 200
    runs = {
        "one worker": (1, False),
        "two workers": (2, False),
        "two workers, the owner killed half-way": (2, True),
    }
    if not arguments.short:
        runs["one worker, killed half-way and started again"] = (1, True)
    found = {}
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="promptweave-workers-")))
        roots = ["--backbone-root", str(ROOT / ".assets"), "--dataset-root", str(ROOT / "demo")]
        promptweave = arguments.promptweave.resolve()
        service = stack.enter_context(Service(promptweave, folder, *roots))
        api = Api(service, service.key("read", "write", "run", "admin"))
        api.fill()
        workers = Workers(promptweave, folder, stack)
        for name, (count, kill) in runs.items():
            found[name] = measure(api, workers, images, count, kill)
            say(f"  {name:48} {found[name]['seconds']:7.1f} s")
        if not arguments.short:
            found["two workers, `early_stopping` 0.05"] = measure(api, workers, images, 2, False, early_stopping={"max_standard_error": 0.05})

    alone = found["one worker"]
    for name, of in found.items():
        of["difference"] = difference(alone, of)
        # This comparison also refuses NaN. A run that stops early has other weights, on purpose.
        if not of["early_stop"] and not of["difference"] <= TOLERANCE:
            raise BenchError(f"α of `{name}` differs by {of['difference']:.1e}, more than {TOLERANCE:.0e}")
        if of["shards"] != of["distinct_shards"]:
            raise BenchError(f"`{name}` stored a shard twice")
    ratio = alone["seconds"] / found["two workers"]["seconds"]
    cores = len(os.sched_getaffinity(0))
    say(f"two workers are {ratio:.2f} times as fast as one; largest difference of a weight {max(of['difference'] for of in found.values() if not of['early_stop']):.1e}")
    # The short form does not judge this: it may fail on a machine that does other things too.
    if not arguments.short and cores > 1 and not ratio > 1:
        raise BenchError("two workers are no faster than one")
    if arguments.short:
        return
    on = machine()
    write_result(target_folder() / SECTION, {"machine": on, "images": images, "runs": found})
    rows = [
        [
            name,
            digits(of["seconds"]),
            digits(of["seconds"] / alone["seconds"]),
            of["attempts"],
            of["shards"],
            of["workers"],
            f"{of['difference']:.1e}",
        ]
        for name, of in found.items()
    ]
    header = ["", "s", "of one worker's", "attempts", "shards stored", "by workers", "largest difference of a weight"]
    text = f"{machine_line(on)} {images} images, 6 prompts, ViT-S/14 at 98 px; one thread a worker, lease {LEASE_S} s.\n\n{table(header, rows)}"
    for stop in (of["early_stop"] for of in found.values() if of["early_stop"]):
        text += f"\n\nThe last stopped when the gradients of {stop['samples']} of {stop['total_samples']} images were taken, at a standard error of {stop['max_standard_error']:.3f}."
    write_into_document(SECTION, text)


if __name__ == "__main__":
    main(bench)
