"""A task as a folder in VTAB-1k's layout, and the digest that says whether it is the right one.

    images/{train,test}/NNNNNN.{png,jpg}
    train800.txt  val200.txt  train800val200.txt  test.txt      lines of `path label`
    meta.json

The digest is taken over all of these files, before the task gets its name.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable

TRAIN, VALIDATION, TEST = 800, 200, 500
TRAIN_ALL = TRAIN + VALIDATION


class SuiteError(Exception):
    pass


@dataclasses.dataclass
class Task:
    """What a task is, and where its images come from: iterables of (Pillow image, label).

    Images may be drawn as they are asked for, from a generator of random numbers that both iterables share: `write`
    takes all of `train` before the first of `test`.
    """

    name: str
    group: str
    classes: list[str]
    license: str
    source: str
    suffix: str
    train: Iterable
    test: Iterable


def write(task, folder):
    """Writes the task into a folder that is not there yet."""
    lists = {}
    for split, images in (("train", task.train), ("test", task.test)):
        (folder / "images" / split).mkdir(parents=True)
        lists[split] = [save(folder, split, number, task.suffix, *item) for number, item in enumerate(images)]
    train, test = lists["train"], lists["test"]
    if (len(train), len(test)) != (TRAIN_ALL, TEST):
        raise SuiteError(f"{task.name}: {len(train)} training and {len(test)} test images came out")
    for name, lines in (
        ("train800", train[:TRAIN]),
        ("val200", train[TRAIN:]),
        ("train800val200", train),
        ("test", test),
    ):
        (folder / f"{name}.txt").write_text("".join(lines))
    meta = {
        "name": task.name,
        "group": task.group,
        "num_classes": len(task.classes),
        "classes": task.classes,
        "license": task.license,
        "source": task.source,
        "train": len(train),
        "test": len(test),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def save(folder, split, number, suffix, image, label):
    """Saves one image; its line for the list."""
    path = f"images/{split}/{number:06d}.{suffix}"
    image.save(folder / path, **({"quality": 92} if suffix == "jpg" else {}))
    return f"{path} {label}\n"


def digest(folder):
    """sha256 over the lines `path sha256` of all files below the folder, sorted by path; None where there is none."""
    if not folder.is_dir():
        return None
    files = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
    lines = (f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for name, path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def put_in_place(task, out, expected):
    """Writes the task beside its place, checks it and renames it; a task that is not the right one is never there."""
    folder, part = out / task.name, out / f".{task.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    write(task, part)
    found = digest(part)
    if found != expected:
        raise SuiteError(f"{task.name}: the digest is {found}, expected {expected}; what was built lies in {part}")
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
