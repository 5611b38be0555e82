#!/usr/bin/env bash
# Builds the mini-VTAB suite (docs/mini_vtab.md). It can be run again at any time, and does only what is missing.
#
#   scripts/mini_vtab.sh OUT_DIR                     all ten tasks
#   scripts/mini_vtab.sh OUT_DIR --tasks fashion     only these, with commas between
#   scripts/mini_vtab.sh OUT_DIR --packages DIR      with packages that were fetched by hand
#
# Its environment (119 MB) is made once, under ${XDG_CACHE_HOME:-~/.cache}/promptweave. The versions are fixed, because
# the images are: another Pillow may scale and compress to other bytes.
set -euo pipefail

case ${1:-} in
'' | -*)
    echo "usage: scripts/mini_vtab.sh OUT_DIR [--tasks A,B] [--packages DIR]" >&2
    exit 2
    ;;
esac
out=$1
shift

kept=${XDG_CACHE_HOME:-$HOME/.cache}/promptweave/mini-vtab-numpy-2.4.6-pillow-13.0.0
if [ ! -x "$kept/bin/python" ]; then
    echo "mini-VTAB: making $kept" >&2
    new=$kept.part
    rm -rf "$new"
    mkdir -p "$(dirname "$kept")"
    python3 -m venv "$new"
    "$new/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all: \
        numpy==2.4.6 pillow==13.0.0 >&2
    "$new/bin/python" -c 'import numpy, PIL.Image' >&2
    mv "$new" "$kept"
fi
# The matrices are small, and tasks are built in parallel already.
export OPENBLAS_NUM_THREADS=1
exec "$kept/bin/python" "$(dirname "$0")/mini_vtab/build.py" --out "$out" "$@"
