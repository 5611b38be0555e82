#!/usr/bin/env python3
"""Takes the demo's target images from a task of the mini-VTAB: the first ones of each class, for training and for test.

    demo/take_target.py MINI_VTAB_DIR/dsprites_loc      (after `make mini-vtab`)

It replaces demo/target. The task's classes are where a shape stands, in sixteen columns from left to right.
"""

import json
import shutil
import sys
from pathlib import Path

TRAIN, TEST = 13, 25  # images of each class

task = Path(sys.argv[1])
target = Path(__file__).resolve().parent / "target"
shutil.rmtree(target, ignore_errors=True)
meta = json.loads((task / "meta.json").read_text())
sizes = {}
for split, listed, most in (("train", "train800val200.txt", TRAIN), ("test", "test.txt", TEST)):
    taken, counts = [], {}
    for line in (task / listed).read_text().splitlines():
        path, label = line.rsplit(" ", 1)
        counts[label] = counts.get(label, 0) + 1
        if counts[label] <= most:
            taken.append((path, label))
    (target / "images" / split).mkdir(parents=True)
    lines = []
    for number, (path, label) in enumerate(taken):
        place = f"images/{split}/{number:06d}{Path(path).suffix}"
        shutil.copyfile(task / path, target / place)
        lines.append(f"{place} {label}\n")
    (target / f"{split}.txt").write_text("".join(lines))
    sizes[split] = len(taken)
meta = {
    "name": "location",
    "num_classes": meta["num_classes"],
    "classes": [f"column-{int(name) + 1:02d}" for name in meta["classes"]],
    "license": "own drawings, MIT as the rest of the repository",
    "source": "scripts/mini_vtab/dsprites.py",
    **sizes,
}
(target / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
