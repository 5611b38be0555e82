#!/usr/bin/env python3
"""What memory the API's process takes while a large dataset is uploaded: a tar of PNG images that are made as they are
sent, so that nothing but the service holds them; `make bench-upload` runs this.

Each image is noise, 1000 × 700, which does not compress: its size in the archive is its size in memory.
"""

import argparse
import http.client
import json
import pathlib
import random
import struct
import sys
import tarfile
import tempfile
import time
import urllib.parse
import zlib

from harness import ROOT, BenchError, machine, machine_line, main, say, table, target_folder, write_into_document, write_result

sys.path.insert(0, str(ROOT / "scripts"))
from service import Service  # noqa: E402

SECTION = "bench-upload"
WIDTH, HEIGHT = 1000, 700
# Longest that the upload may take, in seconds.
PATIENCE_S = 1800


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(noise: random.Random) -> bytes:
    rows = b"".join(b"\0" + noise.randbytes(3 * WIDTH) for _ in range(HEIGHT))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def archive(mebibytes: int):
    """A tar of two classes in pieces, one image each."""
    noise = random.Random(0)
    sent = number = 0
    while sent < mebibytes << 20:
        image = png(noise)
        entry = tarfile.TarInfo(f"train/{'cat' if number % 2 else 'dog'}/{number:06}.png")
        entry.size = len(image)
        piece = entry.tobuf() + image + bytes(-len(image) % tarfile.BLOCKSIZE)
        sent, number = sent + len(piece), number + 1
        yield piece
    yield bytes(2 * tarfile.BLOCKSIZE)


def memory_mib(pid: int, what: str) -> float:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(what))


def upload(service: Service, key: str, mebibytes: int) -> dict:
    address = urllib.parse.urlsplit(service.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=PATIENCE_S)
    sent = 0

    def counted():
        nonlocal sent
        for piece in archive(mebibytes):
            sent += len(piece)
            yield piece

    headers = {"authorization": f"Bearer {key}", "content-type": "application/x-tar"}
    started = time.monotonic()
    connection.request("POST", "/v1/datasets/noise/versions", counted(), headers, encode_chunked=True)
    sent_s = time.monotonic() - started
    answer = connection.getresponse()
    body = json.loads(answer.read())
    if answer.status != 201:
        raise BenchError(f"{answer.status} {body}")
    return {
        "mib": sent / (1 << 20),
        "images": sum(body["class_counts"]["train"]),
        "sent_s": sent_s,
        "all_s": time.monotonic() - started,
    }


def summary(result) -> str:
    header = ["archive, MiB", "images", "sent in, s", "answered after, s", "RSS before, MiB", "highest RSS, MiB"]
    rows = []
    for row in result["rows"]:
        figures = [row["images"], row["sent_s"], row["all_s"], row["before_mib"], row["highest_mib"]]
        rows.append([f"{row['mib']:,.0f}"] + [f"{figure:,.0f}" for figure in figures])
    return f"{machine_line(result['machine'])}\n\n{table(header, rows)}"


def run_all():
    parser = argparse.ArgumentParser(description="memory while a dataset is uploaded")
    parser.add_argument("--program", type=pathlib.Path, required=True, help="promptweave, built without libtorch")
    parser.add_argument("--mebibytes", type=int, nargs="*", default=[64, 2048])
    arguments = parser.parse_args()
    rows = []
    for mebibytes in arguments.mebibytes:
        with tempfile.TemporaryDirectory(prefix="promptweave-bench-") as folder:
            options = ["--request-timeout-s", str(PATIENCE_S)]
            with Service(arguments.program.resolve(), pathlib.Path(folder), *options) as service:
                key, pid = service.key("write"), service.process.pid
                before = memory_mib(pid, "VmRSS")
                row = upload(service, key, mebibytes)
                rows.append(row | {"before_mib": before, "highest_mib": memory_mib(pid, "VmHWM")})
        say(json.dumps(rows[-1]))
    result = {"machine": machine(), "rows": rows}
    write_result(target_folder() / SECTION, result)
    text = summary(result)
    say("\n" + text)
    write_into_document(SECTION, text)


if __name__ == "__main__":
    main(run_all)
