#!/usr/bin/env python3
"""One small ViT, written by each library whose checkpoints the registry imports.

    pip install torch timm transformers safetensors flax
    python scripts/reference/checkpoints.py VISION_TRANSFORMER DINOV2

VISION_TRANSFORMER and DINOV2 are clones of github.com/google-research/vision_transformer and
github.com/facebookresearch/dinov2. Drawn is one set of weights (8 px, patch 4, d = 16, 2 blocks, 2 heads), and each
library's own model is given them, asked for the CLS feature of one image, and saves them as it does. The features
must agree, so the files are the same backbone whatever their names are. Written are, in tests/fixtures/checkpoints/,

  timm/         timm, with LayerScale left out; config.json as timm's models have it on the Hugging Face Hub
  hf_vit/       transformers ViTForImageClassification.save_pretrained
  google/       the flax model of vision_transformer, as npz
  timm_scaled/  timm with LayerScale
  hf_dinov2/    transformers Dinov2Model.save_pretrained
  dinov2/       the state dict of DINOv2's own model, as safetensors
  pickled.npz   a numpy archive of an object array, and
  pickled.pth   torch.save of a state dict: what must be refused
"""
import json, pathlib, shutil, sys
import numpy as np, torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTImageProcessor

OUT = pathlib.Path(__file__).parents[2] / "tests/fixtures/checkpoints"
SIZE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 8, 4, 16, 2, 2, 3


def draw(model, seed):
    dice = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in sorted(model.state_dict().items()):
        scale = value[0].numel() ** -0.5 if value.dim() > 1 else 0.3
        weights[name] = torch.randn(*value.shape, generator=dice) * scale + float("norm" in name and "weight" in name)
    model.load_state_dict(weights)
    return weights


def timm_model(scaled):
    return VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=2,
        num_classes=CLASSES, init_values=1.0 if scaled else None,
    ).eval()


def hf_names(weights, scaled):
    """timm's names and tensors as the files of transformers have them."""
    plain = {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm",
        "attn.proj": "attention.output.dense",
    }
    plain |= (
        {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"} if scaled else
        {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense",
         "mlp.fc2": "output.dense", "head": "classifier"}
    )
    out = {}
    for name, value in weights.items():
        block, _, rest = name.removeprefix("blocks.").partition(".") if name.startswith("blocks.") else ("", "", name)
        start = f"encoder.layer.{block}." if block else ""
        stem, _, last = rest.rpartition(".")
        if stem == "attn.qkv":
            for part, piece in zip(("query", "key", "value"), value.chunk(3)):
                out[f"{start}attention.attention.{part}.{last}"] = piece.clone()
        else:
            out[start + (plain.get(rest) or f"{plain.get(stem, stem)}.{last}")] = value
    return out


def give_and_save(model, weights, folder):
    """Through a file of its own, since transformers renames as it loads."""
    model.save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    model = type(model).from_pretrained(folder).eval()
    model.save_pretrained(folder)
    return model


def flax_model(weights, source, folder):
    sys.path.insert(0, source)
    import flax, jax, ml_collections
    from flax.training.checkpoints import convert_pre_linen
    from vit_jax.models_vit import VisionTransformer as FlaxViT

    transformer = ml_collections.ConfigDict(dict(mlp_dim=2 * WIDTH, num_heads=HEADS, num_layers=DEPTH, dropout_rate=0.0))
    model = FlaxViT(num_classes=CLASSES, patches=ml_collections.ConfigDict({"size": (PATCH, PATCH)}),
                    transformer=transformer, hidden_size=WIDTH)
    initial = model.init(jax.random.PRNGKey(0), np.zeros((1, SIZE, SIZE, 3), np.float32), train=False)["params"]
    flat = flax.traverse_util.flatten_dict(initial, sep="/")
    # The published files have flax's names from before linen; the model's own loader converts them.
    before_linen = {"LayerNorm_1": "LayerNorm_2", "MlpBlock_0": "MlpBlock_3",
                    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1"}
    given = {}
    for name, value in flat.items():
        name = "/".join(before_linen.get(part, part) for part in name.split("/"))
        given[name] = from_timm(name, weights).astype(np.float32).reshape(value.shape)
    np.savez(folder / "model.npz", **given)
    saved = dict(np.load(folder / "model.npz"))
    params = convert_pre_linen(flax.traverse_util.unflatten_dict(saved, sep="/"))
    params = jax.tree.map(np.asarray, flax.core.unfreeze(params))
    return lambda images: np.asarray(
        model.apply({"params": params}, images.permute(0, 2, 3, 1).numpy(), train=False))


def from_timm(name, weights):
    w = {key: value.numpy() for key, value in weights.items()}
    whole = {
        "cls": w["cls_token"], "Transformer/posembed_input/pos_embedding": w["pos_embed"],
        "embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0), "embedding/bias": w["patch_embed.proj.bias"],
        "head/kernel": w["head.weight"].T, "head/bias": w["head.bias"],
        "Transformer/encoder_norm/scale": w["norm.weight"], "Transformer/encoder_norm/bias": w["norm.bias"],
    }
    if name in whole:
        return whole[name]
    _, block, layer, *rest = name.split("/")
    block = "blocks." + block.removeprefix("encoderblock_") + "."
    last = "bias" if rest[-1] == "bias" else "weight"
    if layer == "MultiHeadDotProductAttention_1" and rest[0] != "out":
        third = ["query", "key", "value"].index(rest[0])
        value = np.split(w[f"{block}attn.qkv.{last}"], 3)[third]
    else:
        stem = {"LayerNorm_0": "norm1", "LayerNorm_2": "norm2", "MultiHeadDotProductAttention_1": "attn.proj",
                "Dense_0": "mlp.fc1", "Dense_1": "mlp.fc2"}[rest[0] if layer == "MlpBlock_3" else layer]
        value = w[f"{block}{stem}.{last}"]
    return value.T


def dinov2_model(weights, source):
    sys.path.insert(0, source)
    from functools import partial
    from dinov2.layers import MemEffAttention, NestedTensorBlock
    from dinov2.models.vision_transformer import DinoVisionTransformer

    model = DinoVisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=2, init_values=1.0,
        block_chunks=0, block_fn=partial(NestedTensorBlock, attn_class=MemEffAttention),
    ).eval()
    missing, unexpected = model.load_state_dict({k: v for k, v in weights.items() if not k.startswith("head.")}, strict=False)
    assert missing == ["mask_token"] and not unexpected, (missing, unexpected)
    return model


def folder(name):
    (OUT / name).mkdir(parents=True)
    return OUT / name


def main(vision_transformer, dinov2):
    shutil.rmtree(OUT, ignore_errors=True)
    images = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    for scaled in (False, True):
        model = timm_model(scaled)
        weights = draw(model, 7)
        features = {"timm": model.forward_head(model.forward_features(images), pre_logits=True)}
        out = folder("timm_scaled" if scaled else "timm")
        model.pretrained_cfg = {
            "architecture": "vit_tiny_patch4_8", "input_size": (3, SIZE, SIZE), "interpolation": "bicubic",
            "crop_pct": 0.9, "mean": (0.5,) * 3, "std": (0.5,) * 3, "num_classes": CLASSES,
        }
        save_for_hf(model, out, safe_serialization=True)
        sizes = dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, image_size=SIZE, patch_size=PATCH)
        if scaled:
            out = folder("hf_dinov2")
            hf = Dinov2Model(Dinov2Config(mlp_ratio=2, **sizes))
            named = hf_names({k: v for k, v in weights.items() if not k.startswith("head.")}, True)
            hf = give_and_save(hf, named | {"embeddings.mask_token": torch.zeros(1, WIDTH)}, out)
            features["transformers"] = hf(images).last_hidden_state[:, 0]
            meta = dinov2_model(weights, dinov2)
            features["dinov2"] = meta(images)
            out = folder("dinov2")
            save_file({k: v.contiguous() for k, v in meta.state_dict().items()}, out / "model.safetensors")
        else:
            out = folder("hf_vit")
            hf = ViTForImageClassification(ViTConfig(intermediate_size=2 * WIDTH, num_labels=CLASSES, layer_norm_eps=1e-6, **sizes))
            named = {k if k.startswith("classifier") else f"vit.{k}": v for k, v in hf_names(weights, False).items()}
            hf = give_and_save(hf, named, out)
            features["transformers"] = hf.vit(images).last_hidden_state[:, 0]
            ViTImageProcessor(size={"height": SIZE, "width": SIZE}, resample=3).save_pretrained(out)
            logits = flax_model(weights, vision_transformer, folder("google"))(images)
            # flax's GELU is the tanh approximation; all others' is exact.
            np.testing.assert_allclose(logits, model(images).detach().numpy(), atol=5e-4)
        for library, feature in features.items():
            difference = (feature - features["timm"]).abs().max().item()
            print(f"LayerScale {scaled}: {library} differs from timm by {difference:.1e}")
            assert difference < 1e-5
    np.savez(OUT / "pickled.npz", cls=np.array([{"a": 1}], dtype=object))
    torch.save(weights, OUT / "pickled.pth")
    for file in OUT.rglob("*"):
        if file.is_file():
            file.chmod(0o644)


main(*sys.argv[1:])
