"""procrastinate's side of `make bench-queue` (benches/bench_queue.py): jobs that do nothing, by its own asynchronous client
and its own worker, with the settings that it has by itself. Reads a plan as JSON and prints one line of JSON."""

import asyncio
import json
import logging
import sys
import time

import procrastinate

# procrastinate warns of an app in the main program, which only matters if workers import it.
logging.getLogger("procrastinate").setLevel(logging.ERROR)
PAUSE_S = 0.02
plan = json.load(sys.stdin)
clients = plan.get("clients", plan.get("workers", 1))
# One more connection than it works with, for listening.
app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=plan["database"], min_size=clients + 1, max_size=max(10, clients + 2)))
happened = []


@app.task(name="nothing")
async def nothing(**_):
    happened.append(time.perf_counter())
    if waiting := plan.get("waiting"):
        waiting.set_result(happened[-1])


async def enqueue():
    took = []

    async def client(end):
        while time.perf_counter() < end:
            sent = time.perf_counter()
            await nothing.defer_async(**plan["payload"])
            took.append(time.perf_counter() - sent)

    started = time.perf_counter()
    end = started + plan["seconds"]
    await asyncio.gather(*(client(end) for _ in range(clients)))
    seconds = time.perf_counter() - started
    took.sort()
    return {"per_second": len(took) / seconds, "p50_ms": took[len(took) // 2] * 1e3}


async def complete():
    await nothing.batch_defer_async(*[plan["payload"]] * plan["jobs"])
    await app.run_worker_async(wait=False, concurrency=plan["workers"], install_signal_handlers=False)
    seconds = time.perf_counter() - happened[0]
    if len(happened) != plan["jobs"]:
        sys.exit(f"{len(happened)} jobs were completed, not {plan['jobs']}")
    return {"per_second": len(happened) / seconds}


async def pickup():
    worker = asyncio.create_task(app.run_worker_async(concurrency=1, install_signal_handlers=False))
    took = []
    for n in range(plan["samples"] + 1):
        await asyncio.sleep(PAUSE_S)
        plan["waiting"] = asyncio.get_running_loop().create_future()
        sent = time.perf_counter()
        _, at = await asyncio.gather(nothing.defer_async(**plan["payload"]), plan["waiting"])
        # The first job may find a worker that does not listen yet.
        if n > 0:
            took.append((at - sent) * 1e3)
    await asyncio.sleep(PAUSE_S)
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)
    return {"took_ms": took}


async def main():
    async with app.open_async():
        if not await app.check_connection_async():
            await app.schema_manager.apply_schema_async()
        print(json.dumps(await {"enqueue": enqueue, "complete": complete, "pickup": pickup}[plan["mode"]]()))


asyncio.run(main())
