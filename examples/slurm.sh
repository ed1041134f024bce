#!/usr/bin/env bash
#SBATCH --job-name=shl
#SBATCH --array=0-4
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --output=shl-%A_%a.log
#
# One seed for each task of an array: MODEL=google/gemma-3-4b-it RUN=runs/gemma sbatch examples/slurm.sh
#
# Submit it from the project's folder, on a file system that all nodes see. Each task runs examples/sweep for its own seed,
# into its own folder and its own ledger, so that tasks share nothing but the vector's model. A task that was cut off goes on
# when the same line is submitted again: what is finished is not made again. Compute nodes often have no network, so the
# model is fetched before, where there is one: hf download google/gemma-3-4b-it
#
# Afterwards: awk 'FNR > 1 && NR > FNR {print; next} NR == FNR' "$RUN"/results-*.tsv > "$RUN/results.tsv"
#             shl results "$RUN/results.tsv" --by reg
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
seed=${SLURM_ARRAY_TASK_ID:?submit this with sbatch, or set SLURM_ARRAY_TASK_ID to a seed}
export RUN=${RUN:-runs/sweep} SEEDS=$seed HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export LEDGER=$RUN/results-$seed.tsv
mkdir -p "$RUN"
exec "${SWEEP:-examples/sweep}"
