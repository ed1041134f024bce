#!/usr/bin/env bash
# The loop as a plain script: RUN=runs/mine ROUNDS=4 PERSONA=principle examples/loop.sh
#
# A stage whose output is there is skipped: the same line again continues after any interruption, and a larger ROUNDS
# goes on from the last round. The variables below come from the environment.
# shellcheck disable=SC2086 # options are split at spaces
set -euo pipefail

export SHL_MODEL=${MODEL:-${SHL_MODEL:-toy}}
PERSONA=${PERSONA:-principle} # a bundled persona
AXIS=${AXIS:-authority}       # which free answers are read
ROUNDS=${ROUNDS:-4}
SEED=${SEED:-0}
ARM=${ARM:-healed}
RUN=${RUN:-runs/shell}
LEDGER=${LEDGER:-$RUN/results.tsv}
# further options of each command, split at spaces; with GEN='--coeff auto' each round searches its own dose
VECTOR=${VECTOR:-} GEN=${GEN:--n 32} FILTER=${FILTER:-} TRAIN=${TRAIN:---reg kl_rev} EVAL=${EVAL:---free 128}

evaluate() { # evaluate FILE ARM OPTIONS…: scores, the answers behind them, and a row in the ledger
    [ -e "$1" ] || shl eval --axis "$AXIS" --seed "$SEED" $EVAL --append "$LEDGER" --label "seed=$SEED" \
        --label "arm=$2" "${@:3}" --force -o "$1"
}

mkdir -p "$RUN"
evaluate "$RUN/base.json" base --per-row "$RUN/base.samples.jsonl"
evaluate "$RUN/prompted.json" prompted --persona "$PERSONA" --baseline "$RUN/base.json" \
    --per-row "$RUN/prompted.samples.jsonl"

chain=none # the newest adapter, which brings those before it along
for ((round = 0; round < ROUNDS; round++)); do
    here=$RUN/$ARM/r$round
    mkdir -p "$here"
    [ -e "$here/v.safetensors" ] ||
        shl vector --persona "$PERSONA" --adapter "$chain" --seed "$SEED" $VECTOR -o "$here/v.safetensors"
    # a pipe that broke off leaves a part, never a file that looks complete
    [ -e "$here/keep.jsonl" ] || {
        shl gen --vec "$here/v.safetensors" --seed $((100 * SEED + round)) $GEN |
            shl filter --vec "$here/v.safetensors" $FILTER --rejects "$here/rejects.jsonl" --force >"$here/keep.part"
        mv "$here/keep.part" "$here/keep.jsonl"
    }
    [ -e "$here/adapter" ] || shl train "$here/keep.jsonl" --adapter "$chain" --seed "$SEED" $TRAIN -o "$here/adapter"
    evaluate "$here/eval.json" "$ARM" --label "round=$round" --adapter "$here/adapter" --baseline "$RUN/base.json" \
        --per-row "$here/samples.jsonl"
    chain=$here/adapter
done

shl plot "$RUN" --force -o "$RUN/trajectory.png"
shl report "$RUN" --force -o "$RUN/report.html"
