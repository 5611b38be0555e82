#!/usr/bin/env python3
"""Runs the snippets of docs/guide/inference.md with the real timm and transformers, beside `promptweave predict`.

    scripts/test_inference.py PROMPTWEAVE [--write-fixtures DIR]

All three predict the same PNG files of the input size, so that no decoder and no resizing library plays a part. Their log
probabilities must agree to 1e-3, relatively. The backbone is the demo's; `--write-fixtures` makes a tiny one with random
numbers, and keeps it with the files and what the snippets say of it, for the test in continuous integration.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "architecture": "vit_small_patch14_dinov2", "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 14,
    "pos_grid": 5, "norm_eps": 1e-6,
    "preprocessing": {
        "size": 28, "filter": "bicubic", "antialias": True, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    },
}


def snippets():
    """The three blocks of Python: what both libraries share, timm, Hugging Face."""
    text = (ROOT / "docs/guide/inference.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 3, len(blocks)
    shared, timm, hugging_face = blocks
    for of_one in (timm, hugging_face):
        count = sum(1 for line in (shared + of_one).splitlines() if line.strip())
        assert count <= 40, f"a snippet has {count} lines; 40 are the most"
    return shared, timm, hugging_face


def tiny_backbone(folder):
    """A DINOv2 of two blocks with random weights, in timm's names."""
    generator = torch.Generator().manual_seed(1)
    d, patch, side = TINY["embed_dim"], TINY["patch_size"], TINY["pos_grid"]
    shapes = {"cls_token": [1, 1, d], "pos_embed": [1, 1 + side * side, d], "norm.weight": [d], "norm.bias": [d],
              "patch_embed.proj.weight": [d, 3, patch, patch], "patch_embed.proj.bias": [d]}
    for i in range(TINY["depth"]):
        block = {"norm1.weight": [d], "norm1.bias": [d], "attn.qkv.weight": [3 * d, d], "attn.qkv.bias": [3 * d],
                 "attn.proj.weight": [d, d], "attn.proj.bias": [d], "ls1.gamma": [d], "norm2.weight": [d],
                 "norm2.bias": [d], "mlp.fc1.weight": [4 * d, d], "mlp.fc1.bias": [4 * d], "mlp.fc2.weight": [d, 4 * d],
                 "mlp.fc2.bias": [d], "ls2.gamma": [d]}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    weights = {name: torch.randn(shape, generator=generator) * (0.1 if len(shape) > 1 else 0.5)
               for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY, indent=2) + "\n")


def hugging_face_folder(backbone, folder):
    """The backbone as a checkpoint of DINOv2 with the names that are published on the Hub."""
    from transformers import Dinov2Config

    config = json.loads((backbone / "config.json").read_text())
    weights, d = load_file(backbone / "model.safetensors"), config["embed_dim"]
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
             "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm",
             "norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1",
             "mlp.fc2": "mlp.fc2", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
    found = {}
    for name, tensor in weights.items():
        block = re.match(r"blocks\.(\d+)\.(.*)", name)
        prefix, inner = (f"encoder.layer.{block[1]}.", block[2]) if block else ("", name)
        part, _, kind = inner.rpartition(".")
        if part == "attn.qkv":
            for i, one in enumerate(("query", "key", "value")):
                found[f"{prefix}attention.attention.{one}.{kind}"] = tensor[i * d:(i + 1) * d].clone()
        elif inner in names:
            found[prefix + names[inner]] = tensor
        else:
            found[f"{prefix}{names[part]}.{kind}"] = tensor
    size = config["pos_grid"] * config["patch_size"]
    found["embeddings.mask_token"] = torch.zeros(1, d)
    Dinov2Config(
        hidden_size=d, num_hidden_layers=config["depth"], num_attention_heads=config["num_heads"], image_size=size,
        patch_size=config["patch_size"], layer_norm_eps=config["norm_eps"], architectures=["Dinov2Model"],
    ).save_pretrained(folder)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def images(config, folder, count):
    """PNG files of the input size: smooth noise in colours."""
    random, size = numpy.random.default_rng(3), config["preprocessing"]["size"]
    folder.mkdir(parents=True)
    for i in range(count):
        small = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=numpy.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i}.png")


def digest_of(promptweave, backbone):
    """The digest of a backbone, as `promptweave tune` writes it into a prompt file."""
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "target"
        config = json.loads((backbone / "config.json").read_text())
        for split in ("train", "test"):
            for name in ("a", "b"):
                images(config, target / split / name, 2)
        prompt = Path(scratch) / "prompt.safetensors"
        subprocess.run([promptweave, "tune", "--backbone", backbone, "--target", target, "--task", "noise", "--epochs", "1",
                        "--num-tokens", "2", "--out", prompt], check=True, stdout=subprocess.DEVNULL)
        with safe_open(prompt, "pt") as file:
            return json.loads(file.metadata()["promptweave"])


def models(promptweave, backbone, folder):
    """A prompt with a head, and an ensemble of it, another prompt and the backbone without a prompt."""
    about = digest_of(promptweave, backbone)
    d = json.loads((backbone / "config.json").read_text())["embed_dim"]
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    classes, stated = ["ant", "bee", "cat"], {key: about[key] for key in ("backbone_digest", "preprocessing_id")}
    heads = [{"head.weight": 0.3 * draw(3, d), "head.bias": draw(3)} for _ in range(3)]
    prompts = [draw(2, d), draw(4, d), None]
    metadata = {"classes": classes, "format": 1, "origin": "composed", **stated}
    folder.mkdir(parents=True)
    keep = lambda name, tensors, about: save_file(
        tensors, folder / name, metadata={"promptweave": json.dumps(about, sort_keys=True)})
    keep("prompt.safetensors", {"prompt_embeddings": prompts[0], **heads[0]}, metadata)
    tensors = {f"{i}.{name}": value for i, head in enumerate(heads) for name, value in head.items()}
    tensors |= {f"{i}.prompt_embeddings": prompt for i, prompt in enumerate(prompts) if prompt is not None}
    member = lambda name, weight: {"digest": None, "prompt": name, "version": None, "weight": weight}
    keep("ensemble.safetensors", tensors, {
        "classes": classes, "epsilon": 0.01, "format": 1, "kind": "ensemble", "sharpness": 2.5, **stated,
        "members": [member("one", 0.5), member("two", 0.375), member(None, 0.125)],
    })


def by_promptweave(promptweave, backbone, model, paths):
    kind = "--ensemble" if model.name.startswith("ensemble") else "--prompt"
    done = subprocess.run([promptweave, "predict", "--backbone", backbone, kind, model, "--top-k", "3", "--format", "jsonl",
                           *paths], check=True, stdout=subprocess.PIPE, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    p = [{row["class"]: row["probability"], row["class_2"]: row["probability_2"], row["class_3"]: row["probability_3"]}
         for row in rows]
    return [[p_of[name] for name in ("ant", "bee", "cat")] for p_of in p]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("promptweave", type=Path)
    parser.add_argument("--write-fixtures", type=Path, metavar="DIR")
    args = parser.parse_args()
    promptweave = args.promptweave.resolve()
    shared, timm, hugging_face = snippets()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        work = Path(scratch)
        if args.write_fixtures:
            tiny_backbone(work / "backbone")
        else:
            os.symlink(ROOT / ".assets/vit_s14_focus", work / "backbone")
        config = json.loads((work / "backbone/config.json").read_text())
        images(config, work / "images", 4)
        shutil.copy(work / "images/0.png", "a.png")
        shutil.copy(work / "images/1.png", "b.png")
        models(promptweave, work / "backbone", work / "models")
        shutil.copy(work / "models/prompt.safetensors", "composed.safetensors")
        hugging_face_folder(work / "backbone", work / "dinov2")
        paths = sorted((work / "images").iterdir())
        expected = {}
        for library, of_it in (("timm", timm), ("Hugging Face", hugging_face)):
            there = {}
            exec(shared + of_it, there)
            for name in ("prompt", "ensemble"):
                model = work / f"models/{name}.safetensors"
                classes, log_p = there["predict"](model, there["pixels"](paths))
                assert classes == ["ant", "bee", "cat"], classes
                ours = torch.tensor(by_promptweave(promptweave, work / "backbone", model, paths)).log()
                difference = ((log_p - ours).abs() / log_p.abs().clamp_min(1e-3)).max().item()
                print(f"{library}, {name}: the largest relative difference of log p is {difference:.1e}")
                if difference > 1e-3:
                    sys.exit(f"inference: error: {library} and promptweave disagree on the {name}")
                expected.setdefault(name, log_p.tolist())
        if args.write_fixtures:
            out = ROOT / args.write_fixtures
            shutil.rmtree(out, ignore_errors=True)
            for part in ("backbone", "images", "models"):
                shutil.copytree(work / part, out / part)
            (out / "log_p.json").write_text(json.dumps(expected, indent=1) + "\n")
            print(f"wrote {out}")


if __name__ == "__main__":
    main()
