#!/usr/bin/env bash
# Trains the demo's source prompts: demo/prompts/<task>.safetensors.
#
#   demo/tune_sources.sh MINI_VTAB_DIR      (three minutes per task on two free cores that have bf16)
#
# MINI_VTAB_DIR holds the mini-VTAB's tasks in the VTAB-1k layout. All prompts start from one initial prompt (init seed
# 0), so that their tokens are in one order. They are prompts of the tuning grid (scripts/tuning_grid.py): trained on a
# task's 800 training images, for 15 epochs at a prompt learning rate of 0.02.
set -euo pipefail
data=$(realpath "${1:?usage: demo/tune_sources.sh MINI_VTAB_DIR}")
cd "$(dirname "$0")/.."
grid=.assets/tuning-grid
scripts/tuning_grid.py "$data" "$grid" --settings rate-0.02 --precision bf16 --threads 2 \
  --promptweave "${PROMPTWEAVE:-target/release/promptweave}" \
  --tasks emoji,fashion,digits_scene,clevr_count,dsprites_ori,smallnorb_azi
for file in "$grid"/*-rate-0.02-0.safetensors; do
  cp "$file" "demo/prompts/$(basename "$file" -rate-0.02-0.safetensors).safetensors"
done
