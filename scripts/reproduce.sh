#!/usr/bin/env bash
# Runs `promptweave-lab reproduce` on a suite and puts its tables into docs/reproduction-tables.md; `make reproduce` calls this.
#
#   scripts/reproduce.sh PROFILE SUITE_DIR [OPTION …]      OPTIONs go to `promptweave-lab reproduce`
#
# The variables TABLES and PRECISION override the profile's. With JOBS=N, N processes run at a time, each with one seed
# and one target (a GPU has room for several), and their rows are joined at the end; SEEDS (0,1,2) gives their seeds.
#
# Rows, source prompts, tables and pictures go to reproduction/mini-vtab/PROFILE. A row that exists is not computed
# again, so an interrupted run continues; `--report-only` writes the tables from the existing rows.
set -euo pipefail
profile=${1:?usage: scripts/reproduce.sh PROFILE SUITE_DIR [OPTION …]}
suite=${2:?usage: scripts/reproduce.sh PROFILE SUITE_DIR [OPTION …]}
shift 2
cd "$(dirname "$0")/.."
lab=${PROMPTWEAVE_LAB:-target/release/promptweave-lab}
backbone=.assets/vit_s14_focus
precision=f32 tables=main,ablation,spearman
case $profile in
    # bf16 takes less than half the time if the processor has it.
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
    # If a part fails, the rows of the others still count.
    parts() { # OPTION …
        for seed in $(tr , ' ' <<<"${SEEDS:-0,1,2}"); do
            for task in "$suite"/*/; do echo "$seed/$(basename "$task")"; done
        done | xargs -P "$JOBS" -I{} bash -c 'part "$@"' part {} "$@" || failed=1
    }
    mkdir -p "$out/prompts"
    # Source prompts come first, once each; existing ones are not computed again.
    parts "$@" --prompts-only
    rows=()
    if [ -e "$out/results.jsonl" ]; then rows=(--merge "$out/results.jsonl"); fi
    parts "$@" "${rows[@]}"
    set -- "$@" --seeds "${SEEDS:-0,1,2}" --report-only --merge "$out"/parts/*/results.jsonl
fi
"$lab" reproduce --profile "$profile" --suite "$suite" --out "$out" "$@"
python3 scripts/publish_reproduction.py "$profile"
exit $failed
