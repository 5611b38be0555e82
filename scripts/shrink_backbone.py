#!/usr/bin/env python3
"""A smaller backbone out of a folder with `config.json` and `model.safetensors` (timm's names): its first blocks, at a
smaller image size.

    python3 scripts/shrink_backbone.py .assets/vit_s14_focus .assets/vit_s14_focus_6x70 --blocks 6 --size 70

What is left has the bytes that it had; the final norm was trained on the last block's output, so this is a backbone to
compare methods on at a third of the cost, and no good one. Position embeddings are resampled when it is loaded, as ever.
"""

import argparse
import json
import os
import pathlib
import re
import struct
import sys


def read_header(file):
    (length,) = struct.unpack("<Q", file.read(8))
    return json.loads(file.read(length)), 8 + length


def first_blocks(header, blocks):
    """Names of the tensors of the first blocks and of what is outside of blocks, in the order of their names."""

    def is_kept(name):
        block = re.match(r"blocks\.(\d+)\.", name)
        return name != "__metadata__" and (block is None or int(block[1]) < blocks)

    return sorted(filter(is_kept, header))


def shrink(source, target, blocks):
    with open(source, "rb") as file:
        header, start = read_header(file)
        kept, offset = {}, 0
        names = first_blocks(header, blocks)
        for name in names:
            begin, end = header[name]["data_offsets"]
            kept[name] = header[name] | {"data_offsets": [offset, offset + end - begin]}
            offset += end - begin
        encoded = json.dumps(kept, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with open(target, "wb") as out:
            out.write(struct.pack("<Q", len(encoded)) + encoded)
            for name in names:
                begin, end = header[name]["data_offsets"]
                file.seek(start + begin)
                out.write(file.read(end - begin))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("target", type=pathlib.Path)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--size", type=int, required=True, help="pixels an edge, a multiple of the patch")
    args = parser.parse_args()
    config = json.loads((args.source / "config.json").read_text())
    if not 1 <= args.blocks <= config["depth"]:
        sys.exit(f"error: --blocks must lie in 1..={config['depth']}")
    if args.size < config["patch_size"] or args.size % config["patch_size"]:
        sys.exit(f"error: --size must be a multiple of the patch, {config['patch_size']}")
    config["architecture"] += f"_first{args.blocks}"
    config["depth"] = args.blocks
    config["preprocessing"]["size"] = args.size
    args.target.mkdir(parents=True, exist_ok=True)
    # config.json goes last and by a rename: a folder with it is complete.
    shrink(args.source / "model.safetensors", args.target / "model.safetensors.part", args.blocks)
    os.replace(args.target / "model.safetensors.part", args.target / "model.safetensors")
    (args.target / "config.json.part").write_text(json.dumps(config, indent=2) + "\n")
    os.replace(args.target / "config.json.part", args.target / "config.json")
    print(f"{args.target}: {args.blocks} blocks, {args.size} pixels")


if __name__ == "__main__":
    main()
