#!/usr/bin/env python3
"""Writes tests/fixtures/formats: small files as the programs write them that people train and save prompts with.

    $(scripts/peft_python.sh) scripts/write_format_fixtures.py

adapters/NAME/   as peft's save_pretrained leaves them (the README aside); LoRA and prefix tuning are to be refused
vpt/             as the parameters of the VPT repository's PromptedTransformer are named, in safetensors
foreign/         one prompt in what is not safetensors; every one of them is to be refused by its first bytes
"""

import bz2
import gzip
import io
import lzma
import pickle
import shutil
import tarfile
import warnings
import zipfile
from pathlib import Path

import h5py
import numpy as np
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

OUT = Path(__file__).resolve().parent.parent / "tests/fixtures/formats"
WIDTH, TOKENS, BLOCKS = 8, 3, 4


def adapters() -> None:
    """The base model only gives the width: prompt tuning knows nothing else of it."""

    def save(name: str, config, dtype=torch.float32) -> None:
        sizes = GPT2Config(n_layer=1, n_head=2, n_embd=WIDTH, vocab_size=16, n_positions=16, bos_token_id=0,
                           eos_token_id=0)
        model = get_peft_model(GPT2LMHeadModel(sizes), config)
        if dtype != torch.float32:
            model.prompt_encoder.to(dtype)
        folder = OUT / "adapters" / name
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        (folder / "adapter_model.safetensors").chmod(0o644)

    def tuning():
        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)

    save("prompt_tuning", tuning())
    save("prompt_tuning_bf16", tuning(), torch.bfloat16)
    save("prompt_tuning_f16", tuning(), torch.float16)
    save("prefix_tuning", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    save("lora", LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=["c_attn"], fan_in_fan_out=True))


def vpt() -> None:
    folder = OUT / "vpt"
    folder.mkdir(parents=True)
    prompt, deep = torch.randn(1, TOKENS, WIDTH), torch.randn(BLOCKS - 1, TOKENS, WIDTH)
    save_file({"prompt_embeddings": prompt}, folder / "shallow.safetensors")
    save_file({"prompt_embeddings": prompt, "deep_prompt_embeddings": deep}, folder / "deep.safetensors")
    # These are the names in a state dict of the whole model.
    names = {f"enc.transformer.{name}": value for name, value in
             {"prompt_embeddings": prompt, "deep_prompt_embeddings": deep}.items()}
    save_file(names, folder / "state_dict_names.safetensors")
    # This is what its trainer saves after an epoch.
    foreign = OUT / "foreign"
    foreign.mkdir(parents=True, exist_ok=True)
    torch.save({"shallow_prompt": prompt.numpy(), "deep_prompt": deep.numpy()}, foreign / "vpt_prompt_ep1.pth")


def foreign() -> None:
    folder = OUT / "foreign"
    prompt = torch.randn(2, WIDTH)
    array = prompt.numpy()
    names = {"prompt_embeddings": prompt}
    torch.save(names, folder / "torch.pt")
    torch.save(names, folder / "torch_legacy.pt", _use_new_zipfile_serialization=False)
    module = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    module.save(folder / "torchscript.pt")
    for protocol in range(6):
        (folder / f"list_{protocol}.pkl").write_bytes(pickle.dumps(array.tolist(), protocol))
        (folder / f"dict_{protocol}.pkl").write_bytes(pickle.dumps({"prompt_embeddings": array.tolist()}, protocol))
        (folder / f"array_{protocol}.pkl").write_bytes(pickle.dumps(array, protocol))
    np.save(folder / "array.npy", array)
    np.save(folder / "objects.npy", np.array([{"prompt": 1}, None], dtype=object), allow_pickle=True)
    np.savez(folder / "arrays.npz", prompt_embeddings=array)
    np.savez_compressed(folder / "arrays_compressed.npz", prompt_embeddings=array)
    with h5py.File(folder / "array.h5", "w") as file:
        file["prompt_embeddings"] = array
    save_file(names, folder / "prompt.safetensors")
    whole = (folder / "prompt.safetensors").read_bytes()
    (folder / "prompt.safetensors").unlink()
    (folder / "prompt.safetensors.gz").write_bytes(gzip.compress(whole, mtime=0))
    (folder / "prompt.safetensors.bz2").write_bytes(bz2.compress(whole))
    (folder / "prompt.safetensors.xz").write_bytes(lzma.compress(whole))
    with zipfile.ZipFile(folder / "prompt.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo("prompt.safetensors"), whole)
    with tarfile.open(folder / "prompt.tar", "w") as archive:
        entry = tarfile.TarInfo("prompt.safetensors")
        entry.size = len(whole)
        archive.addfile(entry, io.BytesIO(whole))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.manual_seed(0)
    shutil.rmtree(OUT, ignore_errors=True)
    adapters()
    vpt()
    foreign()
    for path in sorted(OUT.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:7d}  {path.relative_to(OUT)}")
