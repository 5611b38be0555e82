"""What the API's document does not tell schemathesis: which bytes are a prompt file, and what is there already."""

import gzip
import io
import itertools
import json
import os
import re
import struct
import tarfile
import uuid
import zipfile

import schemathesis
from hypothesis import strategies as st

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "F64": 8}


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None = None) -> bytes:
    header, data = {}, b""
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def tensor(draw, shape: list[int]):
    count = 1
    for size in shape:
        count *= size
    dtype = draw(st.sampled_from(["F32", "F32", "F16", "BF16"]))
    # Two bytes, repeated: mostly finite numbers, sometimes infinities and NaN.
    value = draw(st.binary(min_size=2, max_size=2))
    return dtype, shape, (value * SIZES[dtype])[: SIZES[dtype]] * count


@st.composite
def prompt_files(draw) -> bytes:
    """Prompt files that are right, and prompt files with one thing wrong."""
    tokens, width, classes = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 384])), draw(st.integers(1, 3))
    tensors = {"prompt_embeddings": draw(tensor([tokens, width]))}
    if draw(st.booleans()):
        tensors["head.weight"] = draw(tensor([classes, width]))
        tensors["head.bias"] = draw(tensor([classes]))
    if draw(st.booleans()):
        tensors["deep_prompt_embeddings"] = draw(tensor([draw(st.integers(1, 3)), tokens, width]))
    fault = draw(st.sampled_from([None, None, None, "name", "dtype", "shape", "cut", "longer", "metadata"]))
    metadata = None
    if fault == "name":
        tensors[draw(st.text(max_size=8))] = draw(tensor([1]))
    elif fault == "dtype":
        tensors["prompt_embeddings"] = ("F64", [1, 1], b"\0" * 8)
    elif fault == "shape":
        sizes = draw(st.lists(st.sampled_from([0, 1, 2, 2**31, 2**63]), max_size=4))
        tensors["prompt_embeddings"] = ("F32", sizes, b"\0" * 4)
    elif fault == "metadata":
        metadata = draw(st.dictionaries(st.sampled_from(["promptweave", "format", "x"]), st.text(max_size=20), max_size=2))
    file = safetensors(tensors, metadata)
    if fault == "cut":
        file = file[: draw(st.integers(0, len(file)))]
    elif fault == "longer":
        file += draw(st.binary(min_size=1, max_size=16))
    return file


@st.composite
def foreign_files(draw) -> bytes:
    """What people upload by mistake."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    rest = draw(st.binary(max_size=64))
    return draw(st.sampled_from([out.getvalue(), b"\x80\x04\x95" + rest, b"\x93NUMPY\x01\x00" + rest, b"", rest]))


@st.composite
def tars(draw) -> bytes:
    """Folders of PEFT adapters, and archives with one thing wrong."""
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2, "token_dim": 2}
    if draw(st.booleans()):
        config[draw(st.sampled_from([*config, "other"]))] = draw(st.sampled_from([None, 0, -1, 3, "LORA", [], {}, 2**70]))
    model = safetensors({"prompt_embeddings": draw(tensor([2, 2]))}, draw(st.sampled_from([None, {"format": "pt"}])))
    files = [("adapter_config.json", json.dumps(config).encode()), ("adapter_model.safetensors", model)]
    files += draw(st.lists(st.tuples(st.sampled_from(["README.md", "../x", "adapter_model.bin", "adapter_config.json"]), st.binary(max_size=8)), max_size=2))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        if draw(st.integers(0, 9)) == 0:
            entry = tarfile.TarInfo("link")
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(entry)
    content = out.getvalue()
    return content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 9)) == 0 else content


prompts = st.one_of(prompt_files(), prompt_files(), foreign_files())
schemathesis.openapi.media_type("application/vnd.prompt+safetensors", prompts)
schemathesis.openapi.media_type("application/x-tar", st.one_of(tars(), tars(), foreign_files()))
schemathesis.openapi.media_type("application/gzip", st.one_of(tars().map(gzip.compress), foreign_files()))
schemathesis.openapi.media_type("application/zip", foreign_files())
schemathesis.openapi.media_type("application/octet-stream", st.one_of(prompts, tars()))


# ---- What exists --------------------------------------------------------------------------------------

NAMES = ["dtd", "svhn", "food", "vit-s14"]
ENSEMBLES = os.environ.get("FUZZ_ENSEMBLES", "").split()
KEY = os.environ.get("FUZZ_KEY_ID", "")
IDEMPOTENCY_KEY = re.compile("[!-~]{1,255}")
REQUESTS = itertools.count(1)


@schemathesis.hook
def flatmap_path_parameters(context, path_parameters):
    """Every second request is about something that exists."""
    known = {}
    if "name" in (path_parameters or {}):
        known["name"] = st.sampled_from(NAMES)
    if "ref" in (path_parameters or {}):
        known["ref"] = st.just("1")
    if "id" in (path_parameters or {}) and "/ensembles/" in context.operation.path and ENSEMBLES:
        known["id"] = st.sampled_from(ENSEMBLES)
    return st.one_of(st.just(path_parameters), st.fixed_dictionaries(known).map(lambda found: path_parameters | found)) if known else st.just(path_parameters)


@schemathesis.hook
def before_call(context, case, kwargs):
    """Does not revoke the key that the run itself uses, sends no digest of a body that has no bytes yet, and mostly a new
    Idempotency-Key: with the few that come up by chance, most requests would end as a reuse of another's."""
    if case.path_parameters and str(case.path_parameters.get("id", "")).replace("-", "") == KEY:
        case.path_parameters["id"] = str(uuid.UUID(int=0))
    # A request that is wrong on purpose stays as it is.
    if not case.headers or not case.meta or not case.meta.generation.mode.is_positive:
        return
    headers = case.headers
    headers.pop("content-digest", None)
    if IDEMPOTENCY_KEY.fullmatch(headers.get("idempotency-key") or "") and (count := next(REQUESTS)) % 4:
        headers["idempotency-key"] = f"{count}-{headers['idempotency-key']}"[:255]
