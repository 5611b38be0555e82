"""One request, sent by many clients at once: one ensemble."""

import threading
import uuid

from stage import Broken, Stage, wait_until


def at_once(stage: Stage, clients: int, seed: int, force: bool, **headers: str) -> tuple[set[str], list[str]]:
    """The ensembles that the clients were answered with, and what went wrong."""
    barrier, lock = threading.Barrier(clients), threading.Lock()
    answered: list[str] = []
    failures: list[str] = []

    def done():
        status, answer = stage.post(seed, force, **headers)
        # The first request with this key is at work; `Retry-After` says to ask again.
        return None if status == 409 else (status, answer)

    def client():
        barrier.wait()
        try:
            status, answer = wait_until(done, 60, "an answer that is no 409")
        except Broken as error:
            status, answer = 0, str(error)
        with lock:
            if status in (200, 202):
                answered.append(answer["id"])
            else:
                failures.append(f"{status} {answer}")

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return set(answered), failures


def run(stage: Stage, clients: int, seed: int) -> dict:
    broken, jobs = [], []
    # Once the requests are recognised by their content; once only by their key, because `force` would have them all
    # computed.
    by_key = {"idempotency_key": str(uuid.UUID(int=seed))}
    for number, (force, headers) in enumerate([(False, {}), (True, by_key)]):
        before = int(stage.cluster.sql(stage.database, "SELECT count(*) FROM job"))
        answered, failures = at_once(stage, clients, 1_000_000 + 2 * seed + number, force, **headers)
        made = int(stage.cluster.sql(stage.database, "SELECT count(*) FROM job")) - before
        jobs.append(made)
        broken += failures
        if made != 1 or len(answered) != 1:
            broken.append(f"{clients} equal requests made {made} ensembles and were answered with {len(answered)}")
    return {"clients": clients, "jobs": jobs, "broken": broken}
