#!/usr/bin/env python3
"""The real PEFT on both sides of a running server; `make test-peft` runs this.

    scripts/with_postgres.sh $(scripts/peft_python.sh) scripts/test_peft.py PROMPTWEAVE

in    what peft trained for a step and saved is imported; the version has the same numbers, bit by bit
out   what was uploaded is exported, and PeftModel.from_pretrained loads it; the model's prompt has the same numbers,
      and the model runs with it
"""

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load, load_file, save
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

WIDTH, TOKENS = 32, 5


def base():
    sizes = GPT2Config(n_layer=2, n_head=4, n_embd=WIDTH, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(sizes)


class Server:
    """promptweave serve on a free port, with the database of with_postgres.sh."""

    def __init__(self, program: str, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.url = f"http://{address}"
        subprocess.run([program, "migrate"], check=True, env=os.environ | {"PROMPTWEAVE_LOG": "error"})
        options = ["--listen", address, "--data-dir", str(folder), "--no-auth"]
        self.process = subprocess.Popen([program, "serve", *options], env=os.environ | {"PROMPTWEAVE_LOG": "warn"})
        deadline = time.monotonic() + 60
        while True:
            try:
                self.get("/readyz")
                return
            except urllib.error.URLError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    sys.exit("the server does not start")
                time.sleep(0.05)

    def request(self, path: str, body=None, kind="application/json") -> bytes:
        request = urllib.request.Request(self.url + path, data=body, headers={"content-type": kind} if body else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            sys.exit(f"{path}: {error.status} {error.read().decode()}")

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()


def packed(folder: Path) -> bytes:
    """As `tar -c -C FOLDER .` packs it, README and all."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.add(folder, arcname=".")
    return out.getvalue()


def same(what: str, one: torch.Tensor, other: torch.Tensor) -> None:
    integers = {4: torch.int32, 2: torch.int16}[one.element_size()]
    assert one.dtype == other.dtype and one.shape == other.shape, (what, one.dtype, other.dtype, one.shape, other.shape)
    assert torch.equal(one.detach().contiguous().view(integers), other.detach().contiguous().view(integers)), what
    print(f"ok  {what}: {tuple(one.shape)} {one.dtype}, every bit the same")


def from_peft(server: Server, folder: Path, dtype: torch.dtype) -> None:
    name = f"from-peft-{str(dtype).split('.')[1]}"
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
    model = get_peft_model(base(), config)
    # One step of training, so that the prompt is not at its initial value.
    tokens = torch.arange(8)[None]
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.optim.SGD(model.prompt_encoder.parameters(), lr=0.1).step()
    model.prompt_encoder.to(dtype)
    model.save_pretrained(folder)
    trained = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]

    answer = server.request(f"/v1/prompts/import-peft?name={name}&task=count", packed(folder), "application/x-tar")
    assert json.loads(answer)["num_tokens"] == TOKENS
    content = load(server.request(f"/v1/prompts/{name}/versions/1/content"))
    same(f"{name} imported", content["prompt_embeddings"], trained)
    exported(server, name, trained, folder.with_name(f"{folder.name}-again"))


def exported(server: Server, name: str, prompt: torch.Tensor, folder: Path) -> PeftModel:
    """Exports version 1, loads it with PEFT and compares."""
    tar = server.request(f"/v1/prompts/{name}/versions/1/peft")
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        archive.extractall(folder, filter="data")
    config = PeftConfig.from_pretrained(folder)
    assert (config.num_virtual_tokens, config.token_dim) == tuple(prompt.shape), config
    same(f"{name} exported", load_file(folder / "adapter_model.safetensors")["prompt_embeddings"], prompt)
    model = PeftModel.from_pretrained(base(), folder)
    loaded = model.prompt_encoder["default"].embedding.weight
    # PEFT holds a prompt in f32 whatever it was saved in; widening changes no number.
    same(f"{name} loaded by PeftModel", loaded.float(), prompt.float())
    return model


def from_us(server: Server, folder: Path) -> None:
    prompt = torch.randn(TOKENS, WIDTH)
    head = {"head.weight": torch.randn(3, WIDTH), "head.bias": torch.zeros(3)}
    server.request("/v1/prompts", json.dumps({"name": "own"}).encode())
    # This has VPT's leading axis and a head, which PEFT does not have.
    file = save({"prompt_embeddings": prompt[None], **head})
    server.request("/v1/prompts/own/versions", file, "application/vnd.prompt+safetensors")
    model = exported(server, "own", prompt, folder)
    saved = folder.with_name("saved")
    model.save_pretrained(saved)
    server.request("/v1/prompts/import-peft?name=back", packed(saved), "application/x-tar")
    content = load(server.request("/v1/prompts/back/versions/1/content"))
    same("own, exported, loaded, saved and imported", content["prompt_embeddings"], prompt)

    # With a task, the model runs with the prompt: every position sees it.
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    torch.manual_seed(1)
    bare = base().eval()
    tokens = torch.arange(8)[None]
    without = bare(input_ids=tokens).logits
    within = PeftModel.from_pretrained(bare, folder).eval()(input_ids=tokens).logits
    assert within.shape[1] == TOKENS + 8 and not torch.allclose(within[:, TOKENS:], without)
    print("ok  own: a model runs with the exported prompt")


def main() -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(sys.argv[1], folder / "data")
        try:
            for dtype in [torch.float32, torch.float16, torch.bfloat16]:
                from_peft(server, folder / f"peft-{dtype}", dtype)
            from_us(server, folder / "own")
        finally:
            server.process.terminate()
            server.process.wait()


if __name__ == "__main__":
    main()
