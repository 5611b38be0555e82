#!/usr/bin/env python3
"""Tunes a prompt for every task of a suite with every setting of a grid, and measures each on the held-out images.

    scripts/tuning_grid.py SUITE_DIR OUT_DIR [--promptweave FILE] [--precision bf16] [--threads 2] [--settings A,B] [--tasks A,B]

A prompt is tuned on a task's `train800` images and measured on its `val200` images. The test images are not read.
OUT_DIR gets a prompt file per task and setting, and a row for each in `grid.jsonl`. A row that exists is not computed
again, so an interrupted run continues. `--report` prints the table of the existing rows and computes nothing.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# The order is that of the runs: the expected default first, for its prompts are the strong sources of the suite.
SETTINGS = {
    "rate-0.02": {},
    "rate-0.05": {"prompt_learning_rate": 0.05},
    "rate-0.007": {"prompt_learning_rate": 0.007},
    "rate-0.002": {"prompt_learning_rate": 0.002},
    "head-0.003": {"head_learning_rate": 0.003},
    "epochs-30": {"epochs": 30},
    "batch-64": {"batch_size": 64},
}
BASE = {"prompt_learning_rate": 0.02, "head_learning_rate": 0.01, "epochs": 15, "batch_size": 32}


def held_out_folder(task, scratch):
    """The task with `val200` in the place of the test images, and without `val200` among the training images."""
    folder = Path(scratch) / task.name
    folder.mkdir()
    os.symlink(task / "images", folder / "images")
    shutil.copy(task / "train800.txt", folder / "train800val200.txt")
    shutil.copy(task / "val200.txt", folder / "test.txt")
    return folder


def run(args, task, setting, prompt):
    """The row of one setting on one task."""
    options = BASE | SETTINGS[setting]
    common = ["--backbone", args.backbone, "--precision", args.precision, "--threads", str(args.threads)]
    with tempfile.TemporaryDirectory(dir=args.out) as scratch:
        folder = held_out_folder(task, scratch)
        before = time.monotonic()
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        flags += ["--init-seed", str(args.seed), "--seed", str(args.seed)]
        tuned = subprocess.run(
            [args.promptweave, "tune", *common, "--target", folder, "--task", task.name, "--out", prompt, *flags],
            check=True, stdout=subprocess.PIPE, text=True,
        )
        seconds = time.monotonic() - before
        evaluated = subprocess.run(
            [args.promptweave, "evaluate", *common, "--target", folder, "--prompt", prompt],
            check=True, stdout=subprocess.PIPE, text=True,
        )
    accuracy = re.search(r"test accuracy ([0-9.]+)", tuned.stdout)
    if not accuracy:
        sys.exit(f"tuning grid: error: `promptweave tune` printed no test accuracy: {tuned.stdout}")
    return {
        "task": task.name, "setting": setting, "seed": args.seed, **options, "precision": args.precision,
        "held_out_accuracy": float(accuracy[1]),
        "closed_form_held_out_accuracy": json.loads(evaluated.stdout)["eval_accuracy"],
        "seconds": round(seconds, 1),
    }


def report(rows):
    """A table with a row for each task and a column for each setting: held-out accuracies of the tuned head, in per cent."""
    table = {}
    for row in rows:
        table.setdefault(row["task"], {})[row["setting"]] = 100 * row["held_out_accuracy"]
    settings = [name for name in SETTINGS if any(name in accuracies for accuracies in table.values())]
    print("| task | " + " | ".join(settings) + " |\n|---|" + "---:|" * len(settings))
    for task, accuracies in sorted(table.items()):
        cells = [f"{accuracies[name]:.1f}" if name in accuracies else "" for name in settings]
        print(f"| `{task}` | " + " | ".join(cells) + " |")
    whole = [accuracies for accuracies in table.values() if set(settings) <= set(accuracies)]
    if len(whole) > 1:
        cells = [f"{sum(accuracies[name] for accuracies in whole) / len(whole):.1f}" for name in settings]
        print(f"| mean of {len(whole)} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--promptweave", default="target/release/promptweave")
    parser.add_argument("--backbone", default=".assets/vit_s14_focus")
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial prompt and of the batches")
    parser.add_argument("--tasks", help="only these, with commas between [default: all]")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    path = args.out / "grid.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not args.report:
        args.out.mkdir(parents=True, exist_ok=True)
        done = {(row["task"], row["setting"], row["seed"]) for row in rows}
        tasks = sorted(folder for folder in args.suite.resolve().iterdir() if (folder / "train800.txt").exists())
        if args.tasks:
            wanted = args.tasks.split(",")
            missing = set(wanted) - {task.name for task in tasks}
            if missing:
                sys.exit(f"tuning grid: error: {args.suite} has no task {', '.join(sorted(missing))}")
            tasks = [task for task in tasks if task.name in wanted]
        for setting in args.settings.split(","):
            for task in tasks:
                if (task.name, setting, args.seed) in done:
                    continue
                row = run(args, task, setting, args.out / f"{task.name}-{setting}-{args.seed}.safetensors")
                rows.append(row)
                with path.open("a") as file:
                    print(json.dumps(row), file=file)
    report(rows)


if __name__ == "__main__":
    main()
