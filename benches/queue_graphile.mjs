// graphile-worker's side of `make bench-queue` (benches/bench_queue.py): jobs that do nothing, by its own client and its
// own worker, with the settings that it has by itself.
//
//     node benches/queue_graphile.mjs PEERS_FOLDER <plan.json

import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

const require = createRequire(join(process.argv[2], "package.json"));
const { Logger, makeWorkerUtils, run } = require("graphile-worker");
const pg = require("pg");

const PAUSE_MS = 20;
const plan = JSON.parse(readFileSync(0, "utf8"));
const logger = new Logger(() => (level, message) => level === "error" && console.error(message));

function pool(max) {
  const made = new pg.Pool({ connectionString: plan.database, max });
  // It asks for handlers; what breaks shows where it is awaited.
  made.on("error", () => {});
  made.on("connect", (client) => client.on("error", () => {}));
  return made;
}

async function enqueue() {
  const pgPool = pool(plan.clients);
  const utils = await makeWorkerUtils({ pgPool, logger });
  await utils.migrate();
  const took = [];
  const client = async (end) => {
    while (performance.now() < end) {
      const sent = performance.now();
      await utils.addJob("nothing", plan.payload);
      took.push(performance.now() - sent);
    }
  };
  await Promise.all(Array.from({ length: plan.clients }, () => utils.withPgClient((it) => it.query("SELECT 1"))));
  const started = performance.now();
  const end = started + plan.seconds * 1e3;
  await Promise.all(Array.from({ length: plan.clients }, () => client(end)));
  const seconds = (performance.now() - started) / 1e3;
  await utils.release();
  await pgPool.end();
  took.sort((a, b) => a - b);
  return { per_second: took.length / seconds, p50_ms: took[Math.floor(took.length / 2)] };
}

async function complete() {
  const pgPool = pool(Math.max(10, plan.workers + 2));
  const utils = await makeWorkerUtils({ pgPool, logger });
  await utils.migrate();
  const job = { identifier: "nothing", payload: plan.payload };
  await utils.addJobs(Array(plan.jobs).fill(job));
  await utils.release();
  let [started, done] = [null, 0];
  const runner = await run({ pgPool, logger, noHandleSignals: true, concurrency: plan.workers, taskList: { nothing: () => {} } });
  // Told once the row is written.
  const seconds = await new Promise((resolve) => {
    runner.events.on("job:start", () => (started ??= performance.now()));
    runner.events.on("job:complete", () => {
      done += 1;
      if (done === plan.jobs) resolve((performance.now() - started) / 1e3);
    });
  });
  await runner.stop();
  await pgPool.end();
  return { per_second: done / seconds };
}

async function pickup() {
  const pgPool = pool(10);
  let has;
  const nothing = () => has(performance.now());
  const runner = await run({ pgPool, logger, noHandleSignals: true, concurrency: 1, taskList: { nothing } });
  const took = [];
  for (let n = 0; n <= plan.samples; n++) {
    await sleep(PAUSE_MS);
    const picked = new Promise((resolve) => (has = resolve));
    const sent = performance.now();
    const [, at] = await Promise.all([runner.addJob("nothing", plan.payload), picked]);
    // The first may find a worker that does not listen yet.
    if (n > 0) took.push(at - sent);
  }
  await sleep(PAUSE_MS);
  await runner.stop();
  await pgPool.end();
  return { took_ms: took };
}

console.log(JSON.stringify(await { enqueue, complete, pickup }[plan.mode]()));
process.exit(0);
