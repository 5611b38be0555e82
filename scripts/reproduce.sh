#!/usr/bin/env bash
# Runs `promptweave reproduce` on a suite and puts what came out into docs/reproduction.md; `make reproduce` calls this.
#
#   scripts/reproduce.sh PROFILE SUITE_DIR [OPTION …]      OPTIONs go to `promptweave reproduce`
#
# TABLES and PRECISION in the environment stand in for those of the profile.
#
# Rows, source prompts, tables and pictures are in reproduction/mini-vtab/PROFILE. What has its row is not computed again:
# a run that was broken off goes on, and `--report-only` writes the tables of what there is.
set -euo pipefail
profile=${1:?usage: scripts/reproduce.sh PROFILE SUITE_DIR [OPTION …]}
suite=${2:?usage: scripts/reproduce.sh PROFILE SUITE_DIR [OPTION …]}
shift 2
cd "$(dirname "$0")/.."
promptweave=${PROMPTWEAVE:-target/release/promptweave}
backbone=.assets/vit_s14_focus
precision=f32 tables=main,ablation,spearman
case $profile in
    # bf16: less than half the time, where the processor has it.
    zero-shot) tables=$tables,settings && precision=bf16 ;;
    small)
        backbone=.assets/vit_s14_focus_6x70
        [ -e $backbone/config.json ] ||
            python3 scripts/shrink_backbone.py .assets/vit_s14_focus $backbone --blocks 6 --size 70
        ;;
    full) tables=$tables,scalability,tsne ;;
esac
set -- --backbone $backbone --precision "${PRECISION:-$precision}" --tables "${TABLES:-$tables}" "$@"
out=reproduction/mini-vtab/$profile
"$promptweave" reproduce --profile "$profile" --suite "$suite" --out "$out" "$@"
python3 scripts/publish_reproduction.py "$profile"
