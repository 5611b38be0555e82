#!/usr/bin/env bash
# Trains the demo's source prompts: demo/prompts/<task>.safetensors.
#
#   demo/tune_sources.sh MINI_VTAB_DIR      (about a minute per task on two free cores)
#
# MINI_VTAB_DIR holds the mini-VTAB's tasks in the VTAB-1k layout. All prompts start from one initial
# prompt (--init-seed 0), so that their tokens are in one order.
set -euo pipefail
data=${1:?usage: demo/tune_sources.sh MINI_VTAB_DIR}
cd "$(dirname "$0")/.."
promptweave=${PROMPTWEAVE:-target/release/promptweave}
for task in emoji fashion digits_scene clevr_count dsprites_ori smallnorb_azi; do
  "$promptweave" tune --backbone .assets/vit_s14_focus --target "$data/$task" \
    --out "demo/prompts/$task.safetensors" --max-samples 400 --epochs 5 --threads 2
done
