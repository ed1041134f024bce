"""The healing step against a plain step and against TRL's SFTTrainer: tokens a second, and peak memory.

A random Llama of 58 million parameters at a vocabulary of 32,000 (26 million in its eight blocks; with a tied head at
larger ones), prompts of 64 random tokens, completions of 128, float32, LoRA where `shl train` places it.

- shl: the loop of `shl train`, all six epochs with the pass over the reference and what is done once an epoch.
  `idle`: a barrier that stays shut; `open`: one that is open for every sequence of every step; `top-k`: the same with
  the 64 likeliest tokens told apart; `fwd`: the same with kl_fwd; `nll`: none.
- plain: two full forward passes a step, full log-softmax of both, the loss as it is written; PEFT, AdamW.
- trl: SFTTrainer on the same tokens, nll only, in an environment of its own, made at first use.

Every arm runs in a process of its own, the arms in turn, and that again for each repeat. Seconds are those of the
processor, so that a busy machine disturbs little; memory is the process's peak less what it held with the model loaded.

    python tests/bench/train.py --arms shl-idle shl-open plain trl --vocab 32000 262144
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
PROMPT, COMPLETION, RANK, LAYERS = 64, 128, 32, (2, 3, 4, 5, 6)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OPEN = {"tau": 0.0, "lam": 1e-3}  # open from the first step on, and too weak to matter otherwise
SHL: dict[str, dict[str, Any]] = {
    "shl-idle": {"tau": 1e9},
    "shl-open": OPEN,
    "shl-top-k": OPEN | {"ref_top_k": 64},
    "shl-fwd": OPEN | {"reg": "kl_fwd"},
    "shl-nll": {"reg": "nll"},
}
ARMS = (*SHL, "plain", "trl")


def make_model(vocab: int) -> Any:
    """Random weights, wide enough that distributions are not flat."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=vocab > 100_000,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).float().eval().requires_grad_(False)


def rows(args: argparse.Namespace, batches: int = 1) -> list[tuple[list[int], list[int]]]:
    """Prompts and completions as ids, so many batches of them."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, args.vocab[0], (args.batch * batches, PROMPT + COMPLETION), generator=generator).tolist()
    return [(row[:PROMPT], row[PROMPT:]) for row in ids]


class Meter:
    """Processor and wall time of some steps, and the memory that they took beyond what was there before."""

    def __init__(self) -> None:
        self._held = self._peak = _resident()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self.start()

    def start(self) -> None:
        """Begin to count time here."""
        self._began = time.perf_counter(), time.process_time()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, _resident())

    def result(self, steps: int, args: argparse.Namespace) -> dict[str, float]:
        """What was counted, for so many steps."""
        wall, used = (
            now - then for now, then in zip((time.perf_counter(), time.process_time()), self._began, strict=True)
        )
        self._stop.set()
        self._watcher.join()
        tokens = steps * args.batch * COMPLETION
        return {"cpu": tokens / used, "wall": tokens / wall, "peak": (self._peak - self._held) / 1e6,
                "all": self._peak / 1e6}  # fmt: skip


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as handle:
        return int(handle.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def modules() -> list[str]:
    """The linear maps of the middle blocks, by the names that both PEFT and shl know them by."""
    inner = [f"{'self_attn' if name in LINEAR[:4] else 'mlp'}.{name}" for name in LINEAR]
    return [f"model.layers.{block}.{name}" for block in LAYERS for name in inner]


def run_shl(args: argparse.Namespace) -> dict[str, float]:
    """The loop of `shl train`, without what belongs to files of text."""
    from bare import bare, trained

    from shl.core.defaults import TrainConfig

    loaded = bare(make_model(args.vocab[0]))
    cfg = TrainConfig(rank=RANK, epochs=args.epochs, batch_size=args.batch, holdout=0.0, **SHL[args.arm])
    meter = Meter()
    run = trained(loaded, cfg, rows(args, args.batches), modules())
    found = meter.result(run.step, args)
    active = run.good.rows[-1]["barrier_active"]
    return found | {"active": active if active is not None else 0.0}


def run_plain(args: argparse.Namespace) -> dict[str, float]:
    """One step as it is written in the formula."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(args.vocab[0]), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=modules()))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    ids = torch.tensor([prompt + completion for prompt, completion in rows(args)])

    def step() -> None:
        log_p = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        with torch.no_grad(), model.disable_adapter():
            log_q = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        nll = -log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)[:, PROMPT - 1 :]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)[:, PROMPT - 1 :]
        barrier = ((kl.square().mean(1) + 1e-12).sqrt() - 0.5).relu()
        (nll.mean() + barrier.mean()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    meter = Meter()
    for number in range(args.steps + 1):
        if number == 1:  # the first warms up
            meter.start()
        step()
    return meter.result(args.steps, args)


def run_trl(args: argparse.Namespace) -> dict[str, float]:
    """SFTTrainer over the same tokens, with the same adapter and optimiser."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(args.vocab[0])}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2")
    data = [{"input_ids": a + b, "completion_mask": [0] * len(a) + [1] * len(b)} for a, b in rows(args)]
    meter: list[Meter] = []

    class Clock(TrainerCallback):
        def on_step_end(self, settings: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                meter[0].start()

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, per_device_train_batch_size=args.batch, max_steps=args.steps + 1, learning_rate=1e-4,
            adam_beta2=0.95, report_to="none", save_strategy="no", logging_strategy="no", use_cpu=True, bf16=False,
            gradient_checkpointing=False, completion_only_loss=True, packing=False, disable_tqdm=True,
            dataloader_num_workers=0, seed=0,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=make_model(args.vocab[0]), args=settings, train_dataset=Dataset.from_list(data),
            processing_class=tokenizer, callbacks=[Clock()],
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=modules(), lora_dropout=0.0),
        )  # fmt: skip
        meter.append(Meter())
        trainer.train()
        return meter[0].result(args.steps, args)


# --- the comparison ---


def trl_python(folder: Path) -> str:
    """The interpreter of TRL's own environment, made when it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.13.0", "trl", "peft"], check=True)
    return str(python)


def child(arm: str, vocab: int, args: argparse.Namespace) -> dict[str, float]:
    """One arm in a process of its own."""
    python = trl_python(args.trl) if arm == "trl" else sys.executable
    command = [python, __file__, "--arm", arm, "--vocab", str(vocab)]
    for name in ("batch", "batches", "steps", "epochs"):
        command += [f"--{name}", str(getattr(args, name))]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{arm} failed: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> int:
    """Run the arms in turn and print a markdown table for each vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["shl-idle", "shl-open", "plain", "trl"])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=6, help="of shl")
    parser.add_argument("--batches", type=int, default=2, help="of an epoch of shl")
    parser.add_argument("--steps", type=int, default=2, help="of the others, after one that warms up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trl", type=Path, default=Path("build/trl-env"), help="TRL's environment")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        run = run_shl if args.arm in SHL else run_plain if args.arm == "plain" else run_trl
        print(json.dumps(run(args)))
        return 0
    for vocab in args.vocab:
        found: dict[str, list[dict[str, float]]] = {}
        for repeat in range(args.repeats):
            for arm in args.arms:
                found.setdefault(arm, []).append(child(arm, vocab, args))
                print(f"vocabulary {vocab}, repeat {repeat}: {arm} {found[arm][-1]}", file=sys.stderr)
        print(table(vocab, found, args))
    return 0


def table(vocab: int, found: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> str:
    """Medians, and medians of the ratios within a repeat to the arms that are not shl."""
    rivals = [arm for arm in found if arm not in SHL]
    heads = ["arm", "tokens / CPU s", "tokens / s", "step MB", "process MB", "barrier active"]
    heads += [f"{what} {rival}" for rival in rivals for what in ("speed x", "memory x")]
    lines = [f"Vocabulary {vocab}, batch {args.batch}, {args.batches} an epoch, {args.repeats} repeats", ""]
    lines.append("| " + " | ".join(heads) + " |")
    lines.append("| --- |" + " ---: |" * (len(heads) - 1))
    for arm, runs in found.items():
        middle = {name: median(run[name] for run in runs) for name in ("cpu", "wall", "peak", "all")}
        cells = [arm, *(f"{middle[name]:.0f}" for name in ("cpu", "wall", "peak", "all"))]
        cells.append(f"{runs[-1]['active']:.0%}" if "active" in runs[-1] else "-")
        for rival in rivals:
            pairs = list(zip(runs, found[rival], strict=True))
            cells += [f"{median(a['cpu'] / b['cpu'] for a, b in pairs):.2f}",
                      f"{median(a['peak'] / b['peak'] for a, b in pairs):.2f}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
