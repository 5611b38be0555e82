#!/usr/bin/env python3
"""How soon the API refuses archives and images that are made to fill it up, and what memory that takes: each is sent to a
server of its own, so that the highest memory is that one's. `make bench-hostile` runs this, and fails where one is taken, or
refused later than a second after its last byte, or with more than 512 MiB.
"""

import argparse
import gzip
import http.client
import io
import json
import pathlib
import struct
import sys
import tarfile
import tempfile
import time
import urllib.parse
import zipfile
import zlib

from bench_upload import chunk, memory_mib
from harness import ROOT, BenchError, machine, machine_line, main, say, table, target_folder, write_into_document, write_result

sys.path.insert(0, str(ROOT / "scripts"))
from service import Service  # noqa: E402

SECTION = "bench-hostile"
MAX_S, MAX_MIB = 1.0, 512
EDGE = 60_000
# A square with nearly as many pixels as are accepted, in whole blocks.
ALLOWED = 5_648
PATIENCE_S = 300


def tar(name: str, content: bytes) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    return entry.tobuf() + content + bytes(-len(content) % tarfile.BLOCKSIZE) + bytes(2 * tarfile.BLOCKSIZE)


def many_entries():
    """A tar of a million empty files, in pieces."""
    for start in range(0, 1_000_000, 10_000):
        yield b"".join(tarfile.TarInfo(f"cat/{number:07}.png").tobuf() for number in range(start, start + 10_000))
    yield bytes(2 * tarfile.BLOCKSIZE)


def packed(name: str, content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return out.getvalue()


def nested() -> bytes:
    """As 42.zip: zips in zips, here 16 of 16 with 100 MB of zeros each."""
    inner = packed("0.dll", bytes(100_000_000))
    for name in ("book", "lib"):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for number in range(16):
                archive.writestr(f"{name} {number}.zip", inner)
        inner = out.getvalue()
    return inner


def overlapping(entries: int = 60_000) -> bytes:
    """A zip whose entries all are the same compressed bytes: its directory names them under many names."""
    one = packed("0.png", bytes(10_000_000))
    with zipfile.ZipFile(io.BytesIO(one)) as archive:
        at = archive.start_dir
    local, first = one[:at], one[at : one.index(b"PK\5\6")]
    directory = b"".join(
        first[:28] + struct.pack("<H", 11) + first[30:46] + f"c/{number:05}.png".encode() for number in range(entries)
    )
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, entries, entries, len(directory), len(local), 0)
    return local + directory + end


def png(edge: int) -> bytes:
    header = struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def jpeg(edge: int, progressive: bool, colours: int = 3) -> bytes:
    """No colour subsampled, and a first scan of zeros: every coefficient has to be kept, and none is there."""
    quantisation = b"\xff\xdb\0\x43\0" + b"\1" * 64
    frame = struct.pack(">HHBHHB", 0xFFC2 if progressive else 0xFFC0, 8 + 3 * colours, 8, edge, edge, colours)
    components = range(1, colours + 1)
    frame += b"".join(bytes([component, 0x11, 0]) for component in components)
    # One code of one bit, for a difference of zero (and in the second table for the end of a block).
    codes = b"".join(b"\xff\xc4\0\x14" + kind + b"\1" + bytes(15) + b"\0" for kind in (b"\0", b"\x10"))
    last = 0 if progressive else 63
    scan = b"\xff\xda\0" + bytes([6 + 2 * colours, colours]) + b"".join(bytes([component, 0]) for component in components)
    scan += bytes([0, last, 0])
    # Only the beginning of the larger ones is written; nothing should read further.
    blocks = min(edge // 8, 1024) ** 2
    bits = colours * blocks * (1 if progressive else 2)
    return b"\xff\xd8" + quantisation + frame + codes + scan + bytes(bits // 8) + b"\xff\xd9"


def gif(edge: int) -> bytes:
    screen = struct.pack("<HHBBB", edge, edge, 0x80, 0, 0) + bytes(6)
    image = b"," + struct.pack("<HHHHB", 0, 0, edge, edge, 0) + b"\2\2\x4c\1\0"
    return b"GIF89a" + screen + image + b";"


def webp(edge: int) -> bytes:
    canvas = b"\0\0\0\0" + (edge - 1).to_bytes(3, "little") * 2
    body = b"WEBP" + b"VP8X" + struct.pack("<I", len(canvas)) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp(edge: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, edge, edge, 1, 24, 0, 0, 0, 0, 0, 0)


def corpus():
    """What is sent: a name, its bytes or pieces of them, and whether the image in it may be taken."""
    yield "tar of a million files", many_entries(), False
    yield "the same, gzip", gzip.compress(b"".join(many_entries()), 1), False
    yield "zips in zips (as 42.zip)", nested(), False
    yield "zip of 60,000 overlapping files", overlapping(), False
    yield "tar.gz of 5 GB of zeros", gzip.compress(tar("cat/1.png", bytes(1 << 30)) * 5, 1), False
    yield f"PNG, {EDGE} × {EDGE}", tar("cat/1.png", png(EDGE)), False
    yield f"JPEG, {EDGE} × {EDGE}", tar("cat/1.jpg", jpeg(EDGE, False)), False
    yield f"progressive JPEG, {EDGE} × {EDGE}", tar("cat/1.jpg", jpeg(EDGE, True)), False
    yield f"GIF, {EDGE} × {EDGE}", tar("cat/1.gif", gif(EDGE)), False
    yield f"WebP, {EDGE} × {EDGE}", tar("cat/1.webp", webp(EDGE)), False
    yield f"BMP, {EDGE} × {EDGE}", tar("cat/1.bmp", bmp(EDGE)), False
    yield "progressive JPEG, 8192 × 8192", tar("cat/1.jpg", jpeg(8192, True)), False
    for colours in (3, 4):
        yield f"progressive JPEG, {ALLOWED} × {ALLOWED}, {colours} colours (allowed)", tar("cat/1.jpg", jpeg(ALLOWED, True, colours)), True
    yield f"JPEG, {ALLOWED} × {ALLOWED} (allowed)", tar("cat/1.jpg", jpeg(ALLOWED, False)), True


def send(service: Service, key: str, body) -> dict:
    address = urllib.parse.urlsplit(service.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=PATIENCE_S)
    headers = {"authorization": f"Bearer {key}"}
    pieces = [body] if isinstance(body, bytes) else body
    connection.request("POST", "/v1/datasets/hostile/versions", pieces, headers, encode_chunked=True)
    sent = time.monotonic()
    answer = connection.getresponse()
    text = json.loads(answer.read())
    seconds = time.monotonic() - sent
    return {"status": answer.status, "code": text.get("code", "taken"), "detail": text.get("detail", ""), "seconds": seconds}


def summary(result) -> str:
    header = ["what is sent", "answer", "after, s", "highest RSS, MiB"]
    rows = [
        [row["name"], f"{row['status']} {row['code']}", f"{row['seconds']:.2f}", f"{row['highest_mib']:,.0f}"]
        for row in result["rows"]
    ]
    return f"{machine_line(result['machine'])}\n\n{table(header, rows)}"


def run_all():
    parser = argparse.ArgumentParser(description="how hostile uploads are refused")
    parser.add_argument("--program", type=pathlib.Path, required=True, help="promptweave, built without libtorch")
    arguments = parser.parse_args()
    rows, broken = [], []
    for name, body, may_be_taken in corpus():
        with tempfile.TemporaryDirectory(prefix="promptweave-bench-") as folder:
            with Service(arguments.program.resolve(), pathlib.Path(folder)) as service:
                row = {"name": name} | send(service, service.key("write"), body)
                row["highest_mib"] = memory_mib(service.process.pid, "VmHWM")
                if row["status"] >= 500:
                    broken.append(f"{name}: {row['status']}: {service.errors()}")
        say(json.dumps(row))
        rows.append(row)
        if row["status"] < 300 and not may_be_taken:
            broken.append(f"{name}: it was taken")
        if row["highest_mib"] > MAX_MIB:
            broken.append(f"{name}: {row['highest_mib']:.0f} MiB")
        if row["seconds"] > MAX_S and not may_be_taken:
            broken.append(f"{name}: answered after {row['seconds']:.2f} s")
    result = {"machine": machine(), "rows": rows}
    write_result(target_folder() / SECTION, result)
    text = summary(result)
    say("\n" + text)
    write_into_document(SECTION, text)
    if broken:
        raise BenchError("; ".join(broken))


if __name__ == "__main__":
    main(run_all)
