#!/usr/bin/env python3
"""The backbone's part of a composition in plain PyTorch: what `make bench-engine` compares promptweave with.

Written as one would who knows PyTorch and wants the answer, not a benchmark: batched, in eval mode, no gradients for
weights, the prompt expanded to a leaf [B, m, d] so that one backward pass gives every sample its own gradient, fused
attention, no graph in the feature pass, patch tokens once a batch and not once a prompt, the batch size that is fastest
here, all threads.

The job, for M prompts and N images: a feature pass (the heads need every feature before the first loss), then a
gradient pass with the cross-entropy of a given linear head on the CLS token. Per-sample gradients go into the products
Σ_n g̃_in ∘ g̃_jn (g̃ less its mean over the prompts) in f64.

Prints one line of JSON. Needs torch 2.11 and safetensors.
"""

import argparse
import json
import pathlib
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn


class Attention(nn.Module):
    def __init__(self, d, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x):
        batch, n, d = x.shape
        qkv = self.qkv(x).view(batch, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, n, d))


class Mlp(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        self.fc2 = nn.Linear(hidden, d)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, d, num_heads, hidden, eps, layer_scale):
        super().__init__()
        scale = LayerScale if layer_scale else nn.Identity
        self.norm1 = nn.LayerNorm(d, eps)
        self.attn = Attention(d, num_heads)
        self.ls1 = scale(d)
        self.norm2 = nn.LayerNorm(d, eps)
        self.mlp = Mlp(d, hidden)
        self.ls2 = scale(d)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, d, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, d, patch, patch)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class Vit(nn.Module):
    """Names as timm has them, so that the checkpoint loads as it is."""

    def __init__(self, config, weights):
        super().__init__()
        d, eps = config["embed_dim"], config["norm_eps"]
        hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
        layer_scale = "blocks.0.ls1.gamma" in weights
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.pos_embed = nn.Parameter(torch.zeros_like(weights["pos_embed"]))
        self.patch_embed = PatchEmbed(d, config["patch_size"])
        self.blocks = nn.Sequential(
            *[Block(d, config["num_heads"], hidden, eps, layer_scale) for _ in range(config["depth"])]
        )
        self.norm = nn.LayerNorm(d, eps)
        self.load_state_dict(weights)
        grid = config["preprocessing"]["size"] // config["patch_size"]
        self.pos_embed.data = resampled(self.pos_embed.data, config["pos_grid"], grid)

    def patch_tokens(self, images):
        """[B, 3, s, s] → [B, g², d]"""
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def forward(self, patch_tokens, prompt):
        """Patch tokens and one prompt a sample [B, m, d] → CLS features [B, d]."""
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(patch_tokens), -1, -1)
        x = self.blocks(torch.cat([cls, prompt, patch_tokens], 1))
        return self.norm(x[:, 0])


def resampled(pos_embed, old, new):
    if old == new:
        return pos_embed
    grid = pos_embed[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)], 1)


class Job:
    def __init__(self, args):
        folder = pathlib.Path(args.backbone)
        config = json.loads((folder / "config.json").read_text())
        self.dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.precision]
        self.vit = Vit(config, load_file(folder / "model.safetensors")).eval().requires_grad_(False).to(self.dtype)
        inputs = load_file(args.inputs)
        preprocessing = config["preprocessing"]
        self.mean = torch.tensor(preprocessing["mean"]).view(1, 3, 1, 1)
        self.std = torch.tensor(preprocessing["std"]).view(1, 3, 1, 1)
        self.pixels = inputs["pixels"][: args.samples]
        self.labels = inputs["labels"][: args.samples]
        self.prompts = inputs["prompts"].to(self.dtype)
        self.weight, self.bias = inputs["head.weight"], inputs["head.bias"]

    def batches(self, size):
        for start in range(0, len(self.pixels), size):
            pixels = self.pixels[start : start + size].permute(0, 3, 1, 2)
            images = ((pixels / 255.0 - self.mean) / self.std).to(self.dtype)
            with torch.no_grad():
                tokens = self.vit.patch_tokens(images)
            yield tokens, self.labels[start : start + size]

    @torch.no_grad()
    def features(self, size):
        """[M, N, d]"""
        batches = []
        for tokens, _ in self.batches(size):
            prompts = [prompt.expand(len(tokens), -1, -1) for prompt in self.prompts]
            batches.append(torch.stack([self.vit(tokens, prompt).float() for prompt in prompts]))
        return torch.cat(batches, 1)

    def gradients(self, size):
        """Yields [M, B, m·d], batch by batch."""
        for tokens, labels in self.batches(size):
            of_batch = []
            for prompt in self.prompts:
                leaf = prompt.expand(len(tokens), -1, -1).contiguous().requires_grad_()
                logits = F.linear(self.vit(tokens, leaf).float(), self.weight, self.bias)
                loss = F.cross_entropy(logits, labels, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, leaf)
                of_batch.append(gradient.flatten(1))
            yield torch.stack(of_batch)

    def products(self, batches):
        """Σ_n g̃_in ∘ g̃_jn for i ≤ j, [M(M+1)/2, m·d] in f64."""
        total = 0
        for gradients in batches:
            gradients = gradients.double()
            gradients -= gradients.mean(0, keepdim=True)
            total = total + torch.cat([(gradients[i:] * gradients[i]).sum(1) for i in range(len(gradients))])
        return total

    def answers(self, size):
        """Features [M, N, d], Γ = S Sᵀ over the prompts' pairs, and √(mean over samples of ‖g‖²) [M]."""
        n = len(self.pixels)
        batches = list(self.gradients(size))
        s = self.products(batches) / (n - 1)
        rms = torch.cat(batches, 1).double().square().sum((1, 2)).div(n).sqrt()
        return {"features": self.features(size), "gram": (s @ s.T).flatten().float(), "rms": rms.float()}

    def run(self, size):
        """Seconds of the two passes."""
        start = time.perf_counter()
        self.features(size)
        middle = time.perf_counter()
        self.products(self.gradients(size))
        return middle - start, time.perf_counter() - middle


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", required=True, help="folder with config.json and model.safetensors")
    parser.add_argument("--inputs", required=True, help="safetensors: pixels, labels, prompts, head.weight, head.bias")
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--batch", required=True, help="images at once; of several, comma-separated, the best is reported")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--dump", help="write features, Γ and the gradients' root mean squares here, and time nothing")
    args = parser.parse_args()
    job = Job(args)
    sizes = [int(size) for size in args.batch.split(",")]
    if args.dump:
        save_file(job.answers(sizes[0]), args.dump)
        return
    pairs = len(job.pixels) * len(job.prompts)
    best = None
    for size in sizes:
        # The first batch pays for choosing kernels and filling allocators.
        pixels, prompts = job.pixels, job.prompts
        job.pixels, job.prompts = pixels[:size], prompts[:1]
        job.run(size)
        job.pixels, job.prompts = pixels, prompts
        features, gradients = job.run(size)
        if best is None or features + gradients < best["seconds"]:
            best = {"seconds": features + gradients, "features": features, "gradients": gradients, "batch": size}
    print(json.dumps(best | {"pairs": pairs, "threads": torch.get_num_threads(), "version": torch.__version__}))


if __name__ == "__main__":
    main()
