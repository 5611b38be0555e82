"""The database goes away: restarted again and again under load, and killed while files are uploaded."""

import hashlib
import random
import threading
import time

from audit import Audit, write
from stage import SOURCES, Broken, Stage, prompt_file, wait_until

EVERY_S = 5.0
OVER_WITHIN_S = 60.0
CLIENTS = 4


class Restarts:
    """Clients ask for ensembles while PostgreSQL is restarted in immediate mode."""

    def __init__(self, stage: Stage, count: int):
        self.stage, self.count = stage, count
        self.expected: dict[str, tuple[str, ...]] = {}
        self.results: dict[str, dict] = {}
        self.failures: list[str] = []
        self.over = threading.Event()
        self.seeds = iter(range(1, 1_000_000))
        self.lock = threading.Lock()

    def client(self):
        try:
            while not self.over.is_set():
                with self.lock:
                    seed = next(self.seeds)
                job = self.stage.new_job(seed)
                self.expected[job] = ("succeeded",)
                if self.stage.api.ended(job, OVER_WITHIN_S + self.count * EVERY_S)["state"] == "succeeded":
                    self.results[job] = self.stage.api.ok("GET", f"/ensembles/{job}/result")
        except Broken as error:
            self.failures.append(str(error))

    def run(self) -> dict:
        clients = [threading.Thread(target=self.client) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        for number in range(1, self.count + 1):
            # This pause paces the load; it does not wait for anything.
            time.sleep(EVERY_S)
            self.stage.cluster.restart()
        last = time.monotonic()
        self.over.set()
        for client in clients:
            client.join()
        left = "SELECT count(*) FROM job WHERE state IN ('queued', 'running')"
        all_over = lambda: self.stage.cluster.sql(self.stage.database, left) == "0"  # noqa: E731
        broken = list(self.failures)
        try:
            wait_until(all_over, OVER_WITHIN_S, "an end of every ensemble")
        except Broken as error:
            broken.append(str(error))
        over_after = time.monotonic() - last
        judged = Audit(self.stage).judge(self.expected, self.results)
        broken += [f"lost: {it}" for it in judged["lost"]] + [f"twice: {it}" for it in judged["duplicates"]]
        if over_after > OVER_WITHIN_S:
            broken.append(f"the last ensemble ended {over_after:.0f} s after the last restart")
        return {
            "restarts": self.count, "jobs": judged["jobs"], "over_after": over_after, "lost": len(judged["lost"]),
            "duplicates": len(judged["duplicates"]), "broken": broken,
        }


class Uploads:
    """PostgreSQL is killed (kill -9) right after some upload was acknowledged."""

    def __init__(self, stage: Stage, kills: int, seed: int):
        self.stage, self.kills, self.random = stage, kills, random.Random(seed)
        # Maps the sha256 of what was sent to the version.
        self.acknowledged: dict[str, int] = {}
        self.kill_at = 0
        self.due, self.up_again = threading.Event(), threading.Event()
        self.over = threading.Event()
        self.failures: list[str] = []
        self.lock = threading.Lock()

    def client(self, seed: int):
        numbers = random.Random(seed)
        try:
            while not self.over.is_set():
                file = prompt_file(numbers)
                version = self.stage.upload(SOURCES[0], file)["version"]
                with self.lock:
                    self.acknowledged[hashlib.sha256(file).hexdigest()] = version
                    if len(self.acknowledged) == self.kill_at:
                        self.stage.cluster.kill()
                        self.due.set()
        except Broken as error:
            self.failures.append(str(error))
            self.due.set()

    def run(self) -> dict:
        clients = [threading.Thread(target=self.client, args=(number,)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        for _ in range(self.kills):
            with self.lock:
                self.kill_at = len(self.acknowledged) + self.random.randint(1, 100)
            self.due.wait()
            self.due.clear()
            self.stage.cluster.start()
        self.over.set()
        for client in clients:
            client.join()
        unreadable = []
        for digest, version in self.acknowledged.items():
            status, answer = self.stage.api.patiently("GET", f"/prompts/{SOURCES[0]}/versions/{version}/content")
            if status != 200 or hashlib.sha256(answer["content"]).hexdigest() != digest:
                unreadable.append({"digest": digest, "version": version, "status": status})
        write(self.stage.folder / "uploads.json", {"acknowledged": self.acknowledged, "unreadable": unreadable})
        broken = self.failures + [f"unreadable: {it}" for it in unreadable]
        return {"kills": self.kills, "uploads": len(self.acknowledged), "unreadable": len(unreadable), "broken": broken}
