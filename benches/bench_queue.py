#!/usr/bin/env python3
"""The job queue beside graphile-worker and procrastinate, on one PostgreSQL server; `make bench-queue` runs this.

    POSTGRES_DURABLE=1 scripts/with_postgres.sh python3 benches/bench_queue.py --peers FOLDER …

Each has a database of its own and is asked in turn, several rounds long, to take jobs in, to claim and complete the jobs
of a filled queue, and to hand one job at a time to a worker that waits. Theirs is a queue and nothing else: a job comes
in by one statement through its own client, and does nothing. Ours comes in over HTTP, where its names are resolved, its
prompts checked against the backbone and its like looked for, and is completed by the transaction that publishes a prompt
of 150 KB with its lineage.
"""

import argparse
import json
import math
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import time

from bench_api import PROMPT_FILE, psql, request, safetensors
from harness import ROOT, BenchError, digits, machine, machine_line, main, say, spread, table, target_folder, with_spread, write_into_document, write_result

sys.path.insert(0, str(ROOT / "scripts"))
from service import Service  # noqa: E402

SECTION = "bench-queue"
OURS, GRAPHILE, PROCRASTINATE = "promptweave", "graphile-worker", "procrastinate"
# 150 KB, the size of a prompt of a ViT-B.
TOKENS, EMBED_DIM = 50, 768
RATES = {
    "enqueue, 1 client": {"mode": "enqueue", "clients": 1},
    "enqueue, 16 clients": {"mode": "enqueue", "clients": 16},
    "claim and complete, 1 worker": {"mode": "complete", "workers": 1},
    "claim and complete, 4 workers": {"mode": "complete", "workers": 4},
}
# Statements that remove the jobs that enqueueing left, so that every other measurement starts with an empty queue.
CLEAR = {
    OURS: "UPDATE job SET state = 'cancelled', finished_at = now() WHERE state = 'queued';",
    GRAPHILE: "DELETE FROM graphile_worker._private_jobs;",
    PROCRASTINATE: "DELETE FROM procrastinate_events; DELETE FROM procrastinate_jobs;",
}
COMMITS = 300


def backbone(folder: pathlib.Path):
    """As wide as a ViT-B, and one block deep: no one computes with it."""
    d, patch, grid = EMBED_DIM, 16, 14
    shapes = {"cls_token": [1, 1, d], "pos_embed": [1, 1 + grid * grid, d], "norm.weight": [d], "norm.bias": [d]}
    shapes |= {"patch_embed.proj.weight": [d, 3, patch, patch], "patch_embed.proj.bias": [d]}
    block = {f"{norm}.{part}": [d] for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    for linear, rows, columns in [("attn.qkv", 3 * d, d), ("attn.proj", d, d), ("mlp.fc1", d, d), ("mlp.fc2", d, d)]:
        block |= {f"{linear}.weight": [rows, columns], f"{linear}.bias": [rows]}
    shapes |= {f"blocks.0.{name}": shape for name, shape in block.items()}
    header, size = {}, 0
    for name, shape in shapes.items():
        end = size + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    preprocessing = {"size": patch * grid, "filter": "bicubic", "antialias": True, "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": "vit_bench", "embed_dim": d, "depth": 1, "num_heads": 12, "patch_size": patch, "pos_grid": grid}
    (folder / "config.json").write_text(json.dumps(config | {"norm_eps": 1e-6, "preprocessing": preprocessing}))


def answer(command, plan) -> dict:
    done = subprocess.run([str(part) for part in command], input=json.dumps(plan), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"{command[0]}, {plan}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- The three ---------------------------------------------------------------------------------------------


class Promptweave:
    name = OURS

    def __init__(self, service: Service, database: str, folder: pathlib.Path, load: pathlib.Path, queue: pathlib.Path):
        self.database, self.load, self.queue, self.next = database, load, queue, 1
        v1 = service.url + "/v1"
        key = service.key("read", "write", "run")
        for number, name in enumerate(["first", "second"]):
            request("POST", v1 + "/prompts", {"name": name}, key=key)
            file = safetensors(TOKENS, EMBED_DIM)[:-4] + struct.pack("<f", number)
            request("POST", f"{v1}/prompts/{name}/versions", file, PROMPT_FILE, key)
        request("POST", v1 + "/datasets", {"name": "clipart", "directory": "target"}, key=key)
        request("POST", v1 + "/backbones", {"name": "vit-b16", "directory": "backbone"}, key=key)
        # Each job has another seed, because equal ensembles are one job.
        text = json.dumps(payload("{n}")).replace('"{n}"', "{n}")
        self.step = {"method": "POST", "url": v1 + "/ensembles", "content_type": "application/json", "text": text}
        self.common = {"database": database, "url": self.step["url"], "authorization": f"Bearer {key}", "text": text}
        self.common |= {"blobs": str(folder / "blobs"), "num_tokens": TOKENS}

    def measure(self, plan: dict) -> dict:
        if plan["mode"] == "enqueue":
            load = {"clients": plan["clients"], "keep_alive": True, "seconds": plan["seconds"], "steps": [self.step]}
            found = answer([self.load], load | {"first": self.next, "authorization": self.common["authorization"]})
            if found["errors"]:
                raise BenchError(f"{found['errors']} errors: {found['error']}")
            self.next = found["next"]
        else:
            found = answer([self.queue], self.common | plan | {"first": self.next})
            self.next += plan.get("jobs", 0) + plan.get("samples", 0) + 1
        return found


class Peer:
    def __init__(self, name: str, command: list, database: str):
        self.name, self.command, self.database = name, command, database

    def measure(self, plan: dict) -> dict:
        # This is what our client sends, so that the others send as much.
        return answer(self.command, plan | {"database": self.database, "payload": payload(1)})


def payload(seed) -> dict:
    target = {"dataset": "clipart", "seed": seed}
    return {"backbone": "vit-b16", "target": target, "sources": [{"prompt": "first"}, {"prompt": "second"}]}


# ---- Measuring ---------------------------------------------------------------------------------------------


def commit_ms(database: str) -> float:
    """What one insert waits for here, without any queue: most of it for the disk."""
    psql(database, "CREATE TABLE IF NOT EXISTS bench_commit (n integer);")
    started = time.monotonic()
    psql(database, "INSERT INTO bench_commit VALUES (1);\n" * COMMITS)
    return (time.monotonic() - started) / COMMITS * 1e3


def measure(systems, arguments):
    """Every measurement of every system once a round, so that what else the machine does meets all."""
    rates = {name: {system.name: [] for system in systems} for name in RATES}
    pickup = {system.name: [] for system in systems}
    commits = []
    for number in range(arguments.rounds):
        commits.append(commit_ms(os.environ["DATABASE_URL"]))
        say(f"round {number + 1}: a commit takes {commits[-1]:.2f} ms")
        # Each round starts with another system.
        turn = systems[number % len(systems) :] + systems[: number % len(systems)]
        for name, plan in RATES.items():
            for system in turn:
                found = system.measure(plan | {"seconds": arguments.seconds, "jobs": arguments.jobs})
                rates[name][system.name].append(found["per_second"])
                if plan["mode"] == "enqueue":
                    psql(system.database, CLEAR[system.name])
            say(f"{name}: " + ", ".join(f"{one} {values[-1]:,.0f}/s" for one, values in rates[name].items()))
        for system in turn:
            found = system.measure({"mode": "pickup", "samples": arguments.samples})
            pickup[system.name] += found["took_ms"]
        say("pickup: " + ", ".join(f"{one} p50 {quantile(values, 0.5):.1f} p99 {quantile(values, 0.99):.1f} ms" for one, values in pickup.items()))
    return {"rates": rates, "pickup_ms": pickup, "commit_ms": commits}


def quantile(values, q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def summary(result) -> str:
    names = [OURS, GRAPHILE, PROCRASTINATE]
    median = {name: {one: spread(values) for one, values in found.items()} for name, found in result["rates"].items()}
    rows = []
    for name, found in median.items():
        ratios = [f"{found[OURS]['median'] / found[peer]['median']:.2f}×" for peer in names[1:]]
        rows.append([f"{name}, /s", *(with_spread(found[one]) for one in names), *ratios])
    pickup = {q: {one: quantile(values, q) for one, values in result["pickup_ms"].items()} for q in (0.5, 0.99)}
    for q, found in pickup.items():
        ratios = [f"{found[OURS] / found[peer]:.2f}×" for peer in names[1:]]
        rows.append([f"pickup p{q * 100:.0f}, ms (less is better)", *(digits(found[one]) for one in names), *ratios])
    aims = [
        ("enqueue ≥ 400/s", max(median[name][OURS]["median"] for name in RATES if name.startswith("enqueue")), 400, "/s"),
        ("claim and complete ≥ 300/s", max(median[name][OURS]["median"] for name in RATES if name.startswith("claim")), 300, "/s"),
        ("pickup p50 ≤ 5 ms", -pickup[0.5][OURS], -5, " ms"),
        ("pickup p99 ≤ 20 ms", -pickup[0.99][OURS], -20, " ms"),
    ]
    told = "; ".join(f"{aim}: {'met' if found >= limit else 'missed'}, {digits(abs(found))}{unit}" for aim, found, limit, unit in aims)
    samples = len(result["pickup_ms"][OURS])
    return (
        f"{machine_line(result['machine'])} {GRAPHILE} {result['graphile-worker']}, {PROCRASTINATE} {result['procrastinate']}. "
        f"{result['rounds']} rounds: the median (and range) of {result['seconds']} s of enqueuing and of {result['jobs']} jobs "
        f"completed; pickup of {samples} jobs. One insert alone and its commit take "
        f"{with_spread(spread(result['commit_ms']))} ms here.\n\n"
        f"{table(['', *names, *(f'ours ÷ {peer}' for peer in names[1:])], rows)}\n\nAims: {told}."
    )


def run_all():
    parser = argparse.ArgumentParser(description="the job queue beside graphile-worker and procrastinate")
    parser.add_argument("--peers", type=pathlib.Path, required=True, help="what benches/queue_peers.sh made")
    parser.add_argument("--rounds", type=int, default=3, help="[3]")
    parser.add_argument("--seconds", type=float, default=2.0, help="of enqueuing [2]")
    parser.add_argument("--jobs", type=int, default=400, help="to complete [400]")
    parser.add_argument("--samples", type=int, default=100, help="of the pickup, a round [100]")
    parser.add_argument("--program", type=pathlib.Path, required=True, help="promptweave, built without libtorch")
    parser.add_argument("--load", type=pathlib.Path, required=True, help="the bench binary `api`")
    parser.add_argument("--queue", type=pathlib.Path, required=True, help="the bench binary `queue`")
    arguments = parser.parse_args()
    base, peers = os.environ["DATABASE_URL"], arguments.peers
    databases = {name: f"{base.rsplit('/', 1)[0]}/{name}" for name in ("promptweave", "graphile", "procrastinate")}
    for name in databases:
        psql(base, f"CREATE DATABASE {name};")
    graphile = [peers / "node_modules/.bin/node", ROOT / "benches/queue_graphile.mjs", peers]
    procrastinate = [peers / "python/bin/python", ROOT / "benches/queue_procrastinate.py"]
    with tempfile.TemporaryDirectory(prefix="promptweave-bench-") as name:
        folder = pathlib.Path(name)
        backbone(folder / "backbone")
        options = ["--dataset-root", str(ROOT / "demo"), "--backbone-root", str(folder)]
        with Service(arguments.program.resolve(), folder, *options, database=databases["promptweave"]) as service:
            systems = [
                Promptweave(service, databases["promptweave"], folder, arguments.load, arguments.queue),
                Peer(GRAPHILE, graphile, databases["graphile"]),
                Peer(PROCRASTINATE, procrastinate, databases["procrastinate"]),
            ]
            found = measure(systems, arguments)
    package = json.loads((peers / "node_modules/graphile-worker/package.json").read_text())
    asked = [procrastinate[0], "-c", "import importlib.metadata as m; print(m.version('procrastinate'))"]
    version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    result = {"machine": machine(), "rounds": arguments.rounds, "seconds": arguments.seconds, "jobs": arguments.jobs}
    result |= {"graphile-worker": package["version"], "procrastinate": version} | found
    write_result(target_folder() / SECTION, result)
    text = summary(result)
    say("\n" + text)
    write_into_document(SECTION, text)


if __name__ == "__main__":
    main(run_all)
