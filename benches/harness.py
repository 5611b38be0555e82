"""What the benchmarks' drivers share: building, PyTorch, running a process with its peak memory, and docs/performance.md."""

import datetime
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PERFORMANCE = ROOT / "docs" / "performance.md"


class BenchError(Exception):
    pass


def say(text=""):
    print(text, flush=True)


def target_folder():
    return pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))


def build(*cargo_options):
    """Builds the bench binary `backbone` and promptweave; their paths."""
    command = ["cargo", *cargo_options, "build", "--release", "--bench", "backbone", "--bin", "promptweave"]
    command.append("--message-format=json-render-diagnostics")
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise BenchError("the build failed")
    messages = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {m["target"]["name"]: m["executable"] for m in messages if m.get("executable")}
    return found["backbone"], found["promptweave"]


def run(command, env=None):
    """Runs a process to its end: its standard output, and the most memory it held, in MiB. What it says on standard
    error is shown where it fails."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        files = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
        process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env=os.environ | (env or {}), **files)
        # Popen's own wait would not tell the memory of this one process.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            err.seek(0)
            command = " ".join(map(str, command))
            raise BenchError(f"`{command}` ended with status {process.returncode}:\n{err.read().rstrip()}")
        out.seek(0)
        return out.read(), usage.ru_maxrss / 1024


def json_line(command, env=None):
    """As `run`, of a process that prints one line of JSON."""
    out, memory = run(command, env)
    return json.loads(out.splitlines()[-1]) | {"memory_mib": memory}


def pytorch():
    """The Python of an environment with PyTorch, made where it is missing; that takes a while and says so."""
    script = ROOT / "benches" / "pytorch.sh"
    done = subprocess.run([script], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"{script} ended with status {done.returncode}; PYTORCH may name a Python that has torch 2.11")
    return done.stdout.strip()


def fast_mkl(folder):
    """A library whose one function tells MKL that this is a processor it knows; None without a C compiler."""
    compiler = shutil.which("cc")
    if not compiler:
        say("no `cc`: the row with MKL's fast path is left out")
        return None
    library = folder / "fast_mkl.so"
    source = b"int mkl_serv_intel_cpu_true(void) { return 1; }\n"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=source, check=True)
    return library


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def digits(value, count=3):
    """`count` significant digits, without an exponent: 1234.5 is 1,234 and 0.01234 is 0.0123."""
    if value == 0:
        return "0"
    decimals = max(0, count - 1 - int(f"{value:e}".split("e")[1]))
    return f"{value:,.{decimals}f}"


def with_spread(values, write=digits):
    return f"{write(values['median'])} ({write(values['min'])}–{write(values['max'])})"


def table(header, rows):
    """A Markdown table that is also readable as it is; every column but the first to the right."""
    rows = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    padded = [[cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))] for row in rows]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [padded[0], rule, *padded[1:]])


def machine():
    """The processor, what it can do, and what was measured."""
    cpu = pathlib.Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", cpu)
    flags = set(re.search(r"flags\s*: (.*)", cpu)[1].split()) if "flags" in cpu else set()
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "processor": name[1] if name else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def machine_line(of):
    return (
        f"{of['processor']}, {of['cores']} cores ({', '.join(of['instructions'])}); commit `{of['commit']}`, {of['date']}."
    )


def write_result(folder, result):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "result.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    say(f"wrote {path}")


def write_into_document(section, text, document=PERFORMANCE):
    """Puts `text` between the markers of `section`."""
    begin, end = f"<!-- {section}: made by `make {section}` -->", f"<!-- end of {section} -->"
    before = document.read_text()
    if before.count(begin) != 1 or before.count(end) != 1:
        raise BenchError(f"{document} has no markers `{begin}` and `{end}`")
    head, tail = before.split(begin)[0], before.split(end)[1]
    document.write_text(f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}")
    say(f"wrote {document}")


def main(of):
    try:
        of()
    except BenchError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
