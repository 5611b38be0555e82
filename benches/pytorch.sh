#!/usr/bin/env bash
# An environment with PyTorch 2.11 for benches/plain_pytorch.py and plain_tuning.py; prints its Python. Made once, under
# ${XDG_CACHE_HOME:-~/.cache}/promptweave, with a download of about 2 GB from PyPI: its wheel is the CUDA build, which
# does not load without NVIDIA's libraries even without a GPU. Libraries that it can do without are left out.
set -euo pipefail

kept=${XDG_CACHE_HOME:-$HOME/.cache}/promptweave/pytorch-2.11.0
if [ ! -x "$kept/bin/python" ]; then
    echo "pytorch: making $kept" >&2
    new=$kept.part
    rm -rf "$new"
    # It cannot be moved later: a virtual environment's scripts contain its path.
    python3 -m venv "$new"
    # pip builds and unpacks in TMPDIR; /tmp may be small.
    mkdir "$new/tmp"
    TMPDIR=$new/tmp "$new/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps \
        torch==2.11.0 typing_extensions sympy mpmath networkx jinja2 markupsafe filelock fsspec numpy safetensors \
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85 nvidia-cublas==13.1.0.3 nvidia-cudnn-cu13==9.19.0.56 \
        nvidia-cufft==12.0.0.61 nvidia-cufile==1.15.1.6 nvidia-curand==10.4.0.35 nvidia-cusparse==12.6.3.3 \
        nvidia-cusparselt-cu13==0.8.0 nvidia-nccl-cu13==2.28.9 nvidia-nvjitlink==13.0.88 nvidia-nvshmem-cu13==3.4.5 >&2
    rm -rf "$new/tmp"
    "$new/bin/python" -c 'import torch, safetensors' >&2
    mv "$new" "$kept"
fi
# An environment that was made only for plain_pytorch.py lacks this package.
"$kept/bin/python" -c 'import PIL' 2>/dev/null ||
    "$kept/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps pillow==13.0.0 >&2
echo "$kept/bin/python"
