#!/usr/bin/env python3
"""Attacks the queue: real processes, an engine that computes nothing, and faults at named points. `make chaos` runs this
and writes its part of docs/reliability.md; `make chaos-short` takes a few minutes and is part of `make test`.

    python3 tests/chaos/run.py PROMPTWEAVE-CHAOS [--short] [--seed N] [--out FOLDER] [--only SCENARIO,…]

It ends with one line, and with an error where a promise is broken. What was done and seen is in the folder.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import cancels  # noqa: E402
import kills  # noqa: E402
import outages  # noqa: E402
import repeats  # noqa: E402
import shared  # noqa: E402
import stops  # noqa: E402
import webhooks  # noqa: E402
from audit import write  # noqa: E402
from cluster import Cluster  # noqa: E402
from faults import POINTS, Faults  # noqa: E402
from stage import ROOT, Stage  # noqa: E402

from harness import machine, machine_line, say, table, target_folder, write_into_document  # noqa: E402

SECTION = "chaos"
DOCUMENT = ROOT / "docs" / "reliability.md"
IN_TURN = ["kills", "shared", "stops", "cancels", "repeats", "restarts", "uploads"]
BESIDE = "slow"


@dataclasses.dataclass
class Size:
    """How much of everything."""

    kills: int
    kills_of_shared: int
    kills_with_long_lease: int
    stops: list[str]
    cancels: int
    cancel_limits_s: tuple[float, float]
    clients: int
    restarts: int
    database_kills: int
    receiver_down_s: float


LONG = Size(620, 100, 20, stops.POINTS * 3, 200, cancels.LIMITS_S, 50, 24, 20, 600)
# The machine may be building something else at the same time.
SHORT = Size(25, 8, 0, stops.SHORT, 20, tuple(5 * it for it in cancels.LIMITS_S), 50, 3, 3, 0)


class Run:
    """One after the other on two clusters: on the first nothing happens to the database. Beside them, in a long run, what
    takes long and computes little."""

    def __init__(self, arguments, size: Size, faults: Faults, steady: Cluster, shaken: Cluster):
        self.arguments, self.size, self.faults, self.steady, self.shaken = arguments, size, faults, steady, shaken
        self.found: dict[str, dict] = {}

    def stage(self, cluster: Cluster, name: str, **settings) -> Stage:
        return Stage(cluster, self.faults, self.arguments.program.resolve(), self.arguments.out / name, **settings)

    def scenario(self, name: str, run):
        started = time.monotonic()
        try:
            found = run()
        except (Exception, SystemExit) as error:  # whatever it is, nothing was shown
            traceback.print_exc()
            found = {"broken": [f"{type(error).__name__}: {error}"]}
        found["seconds"] = time.monotonic() - started
        self.found[name] = found
        rest = {key: it for key, it in found.items() if key != "broken"}
        say(f"{name}: {rest}" + "".join(f"\n  BROKEN: {it}" for it in found["broken"]))

    def kills(self):
        with self.stage(self.steady, "kills", workers=4, lease_s=2, compose_ms=1000) as stage:
            return kills.at_every_point(stage, self.size.kills, self.arguments.seed)

    def shared(self):
        with self.stage(self.steady, "shared", workers=6, lease_s=2, compose_ms=2000, shares=True) as stage:
            return shared.run(stage, self.size.kills_of_shared, self.arguments.seed)

    def stops(self):
        with self.stage(self.steady, "stops", workers=3, lease_s=2, compose_ms=1000) as stage:
            return stops.run(stage, self.size.stops, self.arguments.seed)

    def cancels(self):
        with self.stage(self.steady, "cancels", workers=2, lease_s=30, compose_ms=1500) as stage:
            return cancels.Cancels(stage, self.size.cancels, self.arguments.seed, self.size.cancel_limits_s).run()

    def repeats(self):
        with self.stage(self.steady, "repeats", workers=1, lease_s=30, compose_ms=500) as stage:
            return repeats.run(stage, self.size.clients, self.arguments.seed)

    def restarts(self):
        with self.stage(self.shaken, "restarts", workers=3, lease_s=5, compose_ms=1000) as stage:
            return outages.Restarts(stage, self.size.restarts).run()

    def uploads(self):
        with self.stage(self.shaken, "uploads", workers=0, lease_s=30, compose_ms=1000) as stage:
            return outages.Uploads(stage, self.size.database_kills, self.arguments.seed).run()

    def slow(self):
        """With the default lease; and a receiver of webhooks that is down meanwhile, and for longer."""
        with self.stage(self.steady, "slow", workers=5, lease_s=30, compose_ms=1000, options=webhooks.OPTIONS) as stage:
            silence = webhooks.Silence(stage, self.size.receiver_down_s)
            self.scenario("long lease", lambda: kills.with_long_lease(stage, self.size.kills_with_long_lease, self.arguments.seed))
            self.scenario("webhooks", silence.run)
        return {"broken": []}

    def all(self):
        chosen = self.arguments.only or [*IN_TURN, *([BESIDE] if self.size.kills_with_long_lease else [])]
        beside = threading.Thread(target=self.scenario, args=(BESIDE, self.slow))
        if BESIDE in chosen:
            beside.start()
        for name in IN_TURN:
            if name in chosen:
                self.scenario(name, getattr(self, name))
        if BESIDE in chosen:
            beside.join()


def rows(found: dict[str, dict]):
    """Of the table: the promise, how it was attacked, what was seen, and whether it was kept."""
    for name, promise, attack, seen in [
        ("kills", "a killed worker's job goes on elsewhere", "{kills} × kill -9 at {places} points, lease 2 s",
         "{jobs} jobs, {lost} lost; claimed again after {p50:.1f} s (p50), {p99:.1f} s (p99), {max:.1f} s (at most)"),
        ("shared", "a job that several workers share loses a shard at most, and none is there twice",
         "{kills} × kill -9, {of_the_job} of them of the owner, lease 2 s",
         "{jobs} jobs, {helped} of them by several workers, {lost} lost, {duplicates} duplicate results"),
        ("long lease", "the same with the default lease", "{kills} × kill -9, lease 30 s",
         "{jobs} jobs, {lost} lost; claimed again after {p50:.1f} s (p50), {p99:.1f} s (p99)"),
        ("stops", "no second result from a worker that comes back", "{stops} × SIGSTOP past the lease, another finishes, SIGCONT",
         "{duplicates} duplicate results, {lost} lost; claimed again after {max:.1f} s at most"),
        ("restarts", "the database may go away", "{restarts} × restart in immediate mode, one every 5 s, under load",
         "{jobs} jobs, {lost} lost; all over {over_after:.1f} s after the last"),
        ("uploads", "what was acknowledged is there", "{kills} × kill -9 of PostgreSQL right after an upload",
         "{uploads} acknowledged, {unreadable} unreadable"),
        ("cancels", "a cancelled job stops", "{cancels} cancels at random times",
         "waiting: {queued_max:.3f} s at most; running: {running_max:.2f} s at most"),
        ("repeats", "equal requests, one job", "{clients} at once; and under one Idempotency-Key", "{jobs[0]} job; {jobs[1]} job"),
        ("webhooks", "every webhook is delivered", "receiver down for {down_s:.0f} s",
         "{delivered} of {ended} ends delivered {after_s:.0f} s after its return"),
    ]:
        it = found.get(name)
        if it is None:
            continue
        kept = "no" if it["broken"] else "yes"
        if it.get("skipped"):
            yield promise, attack.split("{")[0] + "…", "not run: this service has no webhooks", "–"
        elif len(it) <= 2:
            yield promise, "–", "it broke off", "no"
        else:
            it = it | {"places": len(POINTS)}
            yield promise, attack.format(**it), seen.format(**it), kept


def last_line(found: dict[str, dict]) -> str:
    def total(what: str, *names: str) -> int:
        return sum(it.get(what, 0) for name, it in found.items() if not names or name in names)

    p99 = found.get("kills", {}).get("p99", 0.0)
    killed = total("kills", "kills", "shared", "long lease")
    return f"{killed} kills, {total('lost')} lost, {total('duplicates')} duplicate results, re-claim p99 {p99:.1f} s"


def main():
    parser = argparse.ArgumentParser(description="attacks the queue, and says whether its promises hold")
    parser.add_argument("program", type=pathlib.Path, help="promptweave-chaos")
    parser.add_argument("--short", action="store_true", help="a few minutes; writes no document")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=target_folder() / SECTION, help="what was seen; emptied first")
    parser.add_argument("--only", type=lambda text: text.split(","), help=", ".join([*IN_TURN, BESIDE]))
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)
    arguments.out = arguments.out.resolve()
    # The cluster's owner may not enter every folder, and a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="promptweave-chaos-") as folder:
        os.chmod(folder, 0o755)
        folder = pathlib.Path(folder)
        os.environ["PROMPTWEAVE_FAILPOINTS"] = str(folder / "faults")
        with Faults(folder / "faults") as faults, Cluster(folder / "steady") as steady, Cluster(folder / "shaken") as shaken:
            run = Run(arguments, SHORT if arguments.short else LONG, faults, steady, shaken)
            run.all()
    write(arguments.out / "result.json", run.found)
    text = table(["promise", "attack", "seen", "kept"], list(rows(run.found)))
    say(f"\n{text}\n\nraw events: {arguments.out}")
    if not arguments.short and not arguments.only:
        text = f"{machine_line(machine())} Seed {arguments.seed}.\n\n{text}\n\n`{last_line(run.found)}`"
        write_into_document(SECTION, text, DOCUMENT)
    say(last_line(run.found))
    if any(it["broken"] for it in run.found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
