#!/usr/bin/env python3
"""Visual prompt tuning in plain PyTorch: what `make bench-tuning` compares `promptweave tune` with.

Written as one would who knows PyTorch: no gradients for the backbone's weights, fused attention, no graph before the prompt
joins in, images decoded, scaled and normalised once and kept in memory (before the clock), AdamW's fused step, all threads.
Prompt, order of batches, learning rates and their schedule are those of `promptweave tune` by default, so that both go the
same way.

Prints one line of JSON: seconds and cross-entropy of every epoch. With --resize it writes the images at the model's size
instead, so that both decode the same pixels. Needs torch 2.11, safetensors, Pillow and numpy.
"""

import argparse
import itertools
import json
import math
import pathlib
import time

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from chacha20 import shuffles, uniform
from plain_pytorch import Vit

TOKENS, BATCH = 10, 32
PROMPT_LEARNING_RATE, HEAD_LEARNING_RATE, WEIGHT_DECAY = 2e-3, 1e-2, 1e-4


def listed(folder):
    """Paths and labels of the training list."""
    return [line.rsplit(" ", 1) for line in (folder / "train.txt").read_text().splitlines()]


def resized(path, size):
    return Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def write_resized(folder, size, out):
    (out / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (path, label) in enumerate(listed(folder)):
        lines.append(f"images/{i:05}.png {label}\n")
        resized(folder / path, size).save(out / "images" / f"{i:05}.png")
    (out / "train.txt").write_text("".join(lines))
    (out / "meta.json").write_bytes((folder / "meta.json").read_bytes())


def images(folder, preprocessing):
    """[N, 3, s, s] and their labels."""
    lines, size = listed(folder), preprocessing["size"]
    pixels = [torch.from_numpy(numpy.array(resized(folder / path, size))).permute(2, 0, 1) for path, _ in lines]
    mean, std = (torch.tensor(preprocessing[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (torch.stack(pixels) / 255 - mean) / std, torch.tensor([int(label) for _, label in lines])


class Tuning(nn.Module):
    """VPT-shallow: a prompt between the CLS token and the patches, and a linear head on the CLS token's feature."""

    def __init__(self, vit, config, num_classes, seed):
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)
        d, patch = config["embed_dim"], config["patch_size"]
        bound = math.sqrt(6 / (3 * patch * patch + d))
        initial = torch.tensor(uniform(seed, TOKENS * d), dtype=torch.float64) * bound
        self.prompt = nn.Parameter(initial.float().view(TOKENS, d))
        self.head = nn.Linear(d, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch):
        with torch.no_grad():
            patch_tokens = self.vit.patch_tokens(batch)
        return self.head(self.vit(patch_tokens, self.prompt.expand(len(batch), -1, -1)))


def rate(step, steps_per_epoch, epochs):
    """One epoch of linear warm-up, then half a cosine."""
    if step < steps_per_epoch:
        return (step + 1) / steps_per_epoch
    done = (step - steps_per_epoch) / max(1, (epochs - 1) * steps_per_epoch)
    return 0.5 * (1 + math.cos(math.pi * done))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", type=pathlib.Path, required=True, help="folder with config.json and model.safetensors")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder with meta.json and train.txt")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--resize", type=pathlib.Path, metavar="OUT", help="write the images at the model's size into OUT, and end")
    args = parser.parse_args()
    config = json.loads((args.backbone / "config.json").read_text())
    if args.resize:
        write_resized(args.data, config["preprocessing"]["size"], args.resize)
        return
    torch.set_num_threads(args.threads)
    pixels, labels = images(args.data, config["preprocessing"])
    classes = json.loads((args.data / "meta.json").read_text())["classes"]
    vit = Vit(config, load_file(args.backbone / "model.safetensors"))
    model = Tuning(vit, config, len(classes), seed=0)
    steps_per_epoch = math.ceil(len(pixels) / BATCH)
    groups = [
        {"params": [model.prompt], "lr": PROMPT_LEARNING_RATE},
        {"params": model.head.parameters(), "lr": HEAD_LEARNING_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps_per_epoch, args.epochs))
    orders = [torch.tensor(order) for order in itertools.islice(shuffles(len(pixels), seed=0), args.epochs)]

    seconds, cross_entropy = [], []
    for order in orders:
        begun, total = time.perf_counter(), 0.0
        for rows in order.split(BATCH):
            loss = F.cross_entropy(model(pixels[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        seconds.append(time.perf_counter() - begun)
        cross_entropy.append(total / len(pixels))
    print(json.dumps({"images": len(pixels), "seconds": seconds, "cross_entropy": cross_entropy, "version": torch.__version__}))


if __name__ == "__main__":
    main()
