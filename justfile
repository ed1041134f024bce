# Recipes of the project; `just` alone lists them.

export HF_HUB_OFFLINE := env("HF_HUB_OFFLINE", "1")

_default:
    @just --list --unsorted

# the loop on the embedded model: base and prompted rows, healed and plain arms, a table and trajectory.png
demo *ARGS:
    python examples/loop.py {{ARGS}}

# the whole test suite
test *ARGS:
    python -m pytest -n 2 --dist loadfile {{ARGS}}

# lint and types
check:
    ruff check src tests examples
    ruff format --check src tests examples
    mypy src/shl

# the ledger, grouped by regulariser
results *ARGS:
    shl results results.tsv --by reg {{ARGS}}

# write docs/cli.md anew from the commands
cli:
    python -m shl.cli.reference > docs/cli.md

# write the table of architectures in docs/models.md anew
models:
    PYTHONPATH=tests python -m matrix

# write the bundled prompt pools anew from the grammar
pools:
    python -m shl.toy.pools

# glibc is told to keep its memory instead of handing every large tensor back, which is a sixth faster

# train the embedded model anew (about 40 minutes on two cores; continues when killed)
toy OUT="build/toy" *ARGS:
    MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456 \
        python -m shl.toy.trainer --out {{OUT}} {{ARGS}}

# the tables of docs/toy.md, measured anew
card *ARGS:
    python examples/toy_card.py {{ARGS}}

# what peers read and write against ours, each in an environment of its own under build/
interop:
    tests/interop/run

# 24,000 damaged artifacts through every reader (about two minutes)
fuzz *ARGS:
    PYTHONPATH=tests python -m fuzz {{ARGS}}

# every command killed, interrupted, starved of disk, raced and cut off: the full counts (about half an hour)
faults *ARGS:
    PYTHONPATH=tests python -m faults {{ARGS}}

# make of a run folder killed with -9 ten times, then finished: the same files as in peace (about ten minutes)
kills *ARGS:
    PYTHONPATH=tests python -m kills {{ARGS}}

# the regularisers of Q1, and each of them at every scale of its adapter
_frontier:
    @for arm in nll kl_rev-rmse kl_rev-mean kl_fwd-rmse kl_fwd-mean wd100 spectral5 kl_rev-p95 kl_rev-max; do \
        echo $arm; for scale in 0.25 0.5 0.75 1.25 1.5; do echo $arm@$scale; done; done

# every regulariser by five seeds on unfiltered text, base against prev in a second round (two hours of one core; resumes)
u2 RUN="runs/u2" LEDGER="results.tsv":
    PERSONA=authority SPLIT=test SEEDS="${SEEDS:-100 101 102 103 104}" RUN={{RUN}} LEDGER={{LEDGER}} GEN="-n 32 --coeff 0,0.5,0.75,1" \
        LATER="-n 32 --coeff 0,0.1,0.2,0.35" FILTER="--rel-ppl none --rel-tail-ppl none --rel-nats none --max-rep none --max-similarity none --min-tokens 1 --allow-narration --allow-refusal" \
        EVAL="--free 128 --label study=u2" REGS="${REGS:-$(just _frontier) nll@0.9 \
        kl_rev-rmse,kl_rev-rmse-base kl_rev-rmse,kl_rev-rmse-prev kl_rev-rmse,kl_rev-mean-base kl_rev-rmse,kl_rev-mean-prev \
        kl_rev-rmse,kl_fwd-rmse-base kl_rev-rmse,kl_fwd-rmse-prev kl_rev-rmse,kl_fwd-mean-base kl_rev-rmse,kl_fwd-mean-prev \
        kl_rev-rmse,nll kl_rev-rmse,nll@0.5}" \
        examples/sweep
    python examples/matched.py {{LEDGER}} --study u2

# the same arms on text that has passed the filter: is it the filter or the regulariser that heals? (an hour of one core)
u2-filtered RUN="runs/u2-filtered" LEDGER="results.tsv":
    PERSONA=authority SPLIT=test SEEDS="${SEEDS:-100 101 102}" RUN={{RUN}} LEDGER={{LEDGER}} GEN="-n 64 --coeff 0,0.5,0.75,1" \
        EVAL="--free 128 --label study=u2-filtered" REGS="${REGS:-$(just _frontier)}" examples/sweep
    python examples/frontier.py {{LEDGER}} --study u2 u2-filtered

# the study behind docs/results.md: loops, axes, controls, …; goes on where the ledger ends (hours; --list shows what is left)
study *PARTS:
    python examples/study.py {{PARTS}}

# the headline figure, and every table of docs/results.md, from the ledger
tables:
    python examples/frontier.py results.tsv --study u2 u2-filtered -o docs/frontier.png --force
    python examples/headline.py results.tsv --study backtrack --arms healed plain plain@0.5 healed@0.5 short@0.5 short@0.5-prompted short@0.5-selected -o docs/headline.png --force
    python examples/headline.py results.tsv -o docs/headline-gentle.png --force
    python examples/headline.py results.tsv --study backtrack --model toy:rare toy:never --arms plain@0.5 healed@0.5 short@0.5 short@0.5-prompted short@0.5-selected -o docs/headline-variants.png --force
    python examples/headline.py results.tsv --study backtrack-boldness backtrack-humanity --trait enact_{axis} agree_{axis} --arms plain@0.5 healed@0.5 short@0.5 short@0.5-prompted -o docs/headline-axes.png --force
    python examples/tables.py

# what the filter keeps of 160 completions that were labelled by reading
q0:
    python examples/can_we_filter.py

# the healing step against a plain step and TRL's SFTTrainer: speed and memory (half an hour on two idle cores)
bench-train *ARGS:
    python tests/bench/train.py {{ARGS}}

# the decode loop against transformers' generate and a batch-one loop, then extraction against two peers (a quarter of an hour)
bench *ARGS:
    OMP_NUM_THREADS=1 python tests/bench/gen.py --threads 1 {{ARGS}}
    OMP_NUM_THREADS=1 python tests/bench/gen.py --extraction --threads 1 {{ARGS}}
