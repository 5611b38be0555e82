#!/usr/bin/env bash
# Runs `promptweave-lab reproduce` on a suite and puts its tables into docs/reproduction-tables.md; `make reproduce` calls this.
#
#   scripts/reproduce.sh PROFILE SUITE_DIR [OPTION …]      OPTIONs go to `promptweave-lab reproduce`
#
# TABLES and PRECISION in the environment stand in for those of the profile. With JOBS=N, N processes have a seed and a
# target each, which a GPU has room for, and their rows come together at the end; SEEDS (0,1,2) are theirs.
#
# Rows, source prompts, tables and pictures are in reproduction/mini-vtab/PROFILE. What has its row is not computed again:
# a run that was broken off goes on, and `--report-only` writes the tables of what there is.
set -euo pipefail
profile=${1:?usage: scripts/reproduce.sh PROFILE SUITE_DIR [OPTION …]}
suite=${2:?usage: scripts/reproduce.sh PROFILE SUITE_DIR [OPTION …]}
shift 2
cd "$(dirname "$0")/.."
lab=${PROMPTWEAVE_LAB:-target/release/promptweave-lab}
backbone=.assets/vit_s14_focus
precision=f32 tables=main,ablation,spearman
case $profile in
    # bf16: less than half the time, where the processor has it.
    zero-shot) tables=$tables,settings,scalability,tsne && precision=bf16 ;;
    small)
        backbone=.assets/vit_s14_focus_6x70
        [ -e $backbone/config.json ] ||
            python3 scripts/shrink_backbone.py .assets/vit_s14_focus $backbone --blocks 6 --size 70
        ;;
    full) tables=$tables,scalability,tsne ;;
esac
set -- --backbone $backbone --precision "${PRECISION:-$precision}" --tables "${TABLES:-$tables}" "$@"
out=reproduction/mini-vtab/$profile
failed=0
if [ -n "${JOBS:-}" ]; then
    case " $* " in
        *" --seeds "* | *" --targets "* | *" --tasks "* | *" --report-only "*)
            echo "reproduce: error: with JOBS the processes have a seed and a target each; leave --seeds, --targets, --tasks and --report-only out" >&2
            exit 2
            ;;
    esac
    part() { # SEED/TARGET OPTION …
        local folder=$out/parts/${1/\//-} seed=${1%/*} target=${1#*/}
        shift
        mkdir -p "$folder"
        ln -sfn ../../prompts "$folder/prompts"
        "$lab" reproduce --profile "$profile" --suite "$suite" --out "$folder" "$@" --seeds "$seed" --targets "$target"
    }
    export -f part
    export out profile suite lab
    # Where a part fails, the others' rows count all the same.
    parts() { # OPTION …
        for seed in $(tr , ' ' <<<"${SEEDS:-0,1,2}"); do
            for task in "$suite"/*/; do echo "$seed/$(basename "$task")"; done
        done | xargs -P "$JOBS" -I{} bash -c 'part "$@"' part {} "$@" || failed=1
    }
    mkdir -p "$out/prompts"
    # Source prompts first, each once; and what there is already is not computed again.
    parts "$@" --prompts-only
    rows=()
    if [ -e "$out/results.jsonl" ]; then rows=(--merge "$out/results.jsonl"); fi
    parts "$@" "${rows[@]}"
    set -- "$@" --seeds "${SEEDS:-0,1,2}" --report-only --merge "$out"/parts/*/results.jsonl
fi
"$lab" reproduce --profile "$profile" --suite "$suite" --out "$out" "$@"
python3 scripts/publish_reproduction.py "$profile"
exit $failed
