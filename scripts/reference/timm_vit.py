#!/usr/bin/env python3
"""Features and per-sample prompt gradients by timm and autograd: the forward and backward pass that is not ours.

    pip install torch timm safetensors pillow
    python scripts/reference/timm_vit.py .assets/vit_s14_focus

The prompt goes after CLS, before the patches, without a position; the feature is CLS after the final
LayerNorm; each sample's loss is the cross-entropy of a fixed linear head, and its gradient by the prompt
is taken alone, in a loop. All in f64 on f32 weights. Written are

  tests/fixtures/timm_vit/            a random timm VisionTransformer (32 px, patch 8, d = 32, 3 blocks,
    config.json model.safetensors     4 heads, no LayerScale) as a backbone folder;
    reference.json                    prompt [m, d], head, labels of its samples; features [B, d] and
                                      gradients [B, m, d]. Byte i of the samples, [B, 32, 32, 3] on end,
                                      is (i * 2654435761 mod 2^32) >> 24.
  tests/fixtures/vit_s14_focus/gradients.json
                                      the same of the demo backbone, a DINOv2 ViT-S/14 with LayerScale, for
                                      resized.png and its mirror image, to nine digits;
                                      P[t, c] = sin(1 + t*384 + c)/16, W[k, c] = sin(2 + k*384 + c)/16, b = 0.
"""
import json, pathlib, sys
import numpy as np, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

FIXTURES = pathlib.Path(__file__).parents[2] / "tests/fixtures"


def features(vit, images, prompt):
    tokens = vit._pos_embed(vit.patch_embed(images))
    prompt = prompt.expand(len(images), -1, -1)
    tokens = torch.cat([tokens[:, :1], prompt, tokens[:, 1:]], 1)
    return vit.norm(vit.blocks(tokens))[:, 0]


def reference(vit, images, prompt, weight, bias, labels):
    vit = vit.double().eval().requires_grad_(False)
    of_samples, gradients = [], []
    for image, label in zip(images, labels):
        leaf = prompt.clone().requires_grad_()
        feature = features(vit, image[None], leaf)
        logits = feature @ weight.T + bias
        print("probability of the label:", logits.softmax(-1)[0, label].item())
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([label])), leaf)
        of_samples.append(feature[0].detach())
        gradients.append(gradient)
    print("norms of the gradients:", [g.norm().item() for g in gradients])
    return torch.stack(of_samples), torch.stack(gradients)


def normalised(pixels, preprocessing):
    """[B, s, s, 3] bytes -> [B, 3, s, s]."""
    mean, std = (torch.tensor(preprocessing[key], dtype=torch.float64) for key in ("mean", "std"))
    return ((torch.tensor(pixels).double() / 255 - mean) / std).permute(0, 3, 1, 2)


def write(path, digits=None, **content):
    def plain(value):
        numbers = value.flatten().tolist()
        return numbers if digits is None else [float(f"{x:.{digits}g}") for x in numbers]

    content = {key: plain(value) if torch.is_tensor(value) else value for key, value in content.items()}
    path.write_text(json.dumps(content, separators=(",", ":")).replace('],"', '],\n"') + "\n")


def random_vit():
    out = FIXTURES / "timm_vit"
    out.mkdir(parents=True, exist_ok=True)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, mlp_ratio=2, num_classes=0)
    dice = torch.Generator().manual_seed(11)
    draw = lambda *shape: torch.randn(*shape, generator=dice)
    weights = {}
    for name, value in sorted(vit.state_dict().items()):
        # timm's own initialisation is so small that every gradient would vanish.
        scale = 1.5 * value[0].numel() ** -0.5 if name.endswith("weight") and value.dim() > 1 else 0.3
        weights[name] = draw(*value.shape) * scale + float("norm" in name and name.endswith("weight"))
    vit.load_state_dict(weights)
    save_file({name: value.contiguous() for name, value in weights.items()}, out / "model.safetensors")
    preprocessing = {"size": 32, "filter": "bicubic", "antialias": True, "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": "vit_tiny_patch8_32", "embed_dim": 32, "depth": 3, "num_heads": 4, "patch_size": 8}
    config |= {"pos_grid": 4, "norm_eps": 1e-6, "preprocessing": preprocessing}
    (out / "model.safetensors").chmod(0o644)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    labels = [0, 1, 2]
    pixels = (np.arange(3 * 32 * 32 * 3, dtype=np.uint64) * 2654435761 % 2**32 >> 24).astype(np.uint8)
    images = normalised(pixels.reshape(3, 32, 32, 3), preprocessing)
    # The numbers have few digits, so that their text is exact.
    prompt, weight, bias = ((draw(*shape) * 1000).round().double() / 1000 for shape in ((3, 32), (3, 32), (3,)))
    weight = weight / 4
    of_samples, gradients = reference(vit, images, prompt, weight, bias, labels)
    write(out / "reference.json", prompt=prompt, weight=weight, bias=bias, labels=labels, features=of_samples, gradients=gradients)


def demo_vit(folder):
    config = json.loads((folder / "config.json").read_text())
    preprocessing, d = config["preprocessing"], config["embed_dim"]
    weights = load_file(folder / "model.safetensors")
    pos, grid = weights["pos_embed"].double(), preprocessing["size"] // config["patch_size"]
    patches = pos[:, 1:].view(1, config["pos_grid"], config["pos_grid"], d).permute(0, 3, 1, 2)
    # This resamples as the original graph does; timm's resample_abs_pos_embed antialiases.
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False, antialias=False)
    vit = VisionTransformer(
        img_size=preprocessing["size"], patch_size=config["patch_size"], embed_dim=d, depth=config["depth"],
        num_heads=config["num_heads"], init_values=1.0, num_classes=0,
    ).double()
    vit.load_state_dict(weights | {"pos_embed": torch.cat([pos[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], 1)})

    out = FIXTURES / "vit_s14_focus"
    pixels = np.asarray(Image.open(out / "resized.png").convert("RGB"))
    images = normalised(np.stack([pixels, pixels[:, ::-1]]), preprocessing)
    wave = lambda first, rows: torch.sin(first + torch.arange(rows * d, dtype=torch.float64)).view(rows, d) / 16
    labels = [0, 2]
    bias = torch.zeros(3, dtype=torch.float64)
    of_samples, gradients = reference(vit, images, wave(1, 2), wave(2, 3), bias, labels)
    write(out / "gradients.json", digits=9, labels=labels, features=of_samples, gradients=gradients)


random_vit()
demo_vit(pathlib.Path(sys.argv[1]))
