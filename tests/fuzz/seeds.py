"""Sound artifacts of each kind, as small as they can be: what mutation starts from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from shl import results
from shl.core.heal_part import Checkpoint
from shl.core.peft_dir import PREFIX, peft_config, write_adapter
from shl.core.records import dumps
from shl.core.vectors import Vector

Blob = dict[str, bytes]  # the files of an artifact by name; one called "" when it is a single file


def record(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A completion record as `shl gen` writes it."""
    said = f"I would first talk with person {number} and then help the {number * 7} others quietly."
    return {
        "id": f"p{number}/1/0",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Question {number} – ok?"}],
        "completion": [{"role": "assistant", "content": said}],
        "coeff": 1.0 if number % 3 else 0.0,
        "seed": 0,
        "model": "toy",
        "adapters": [],
        "vector": "sha256:00",
        "n_tokens": 20,
        "finish": "stop",
        "scores": {"ppl": 2.0, "ppl_tail": 2.5, "max_nll": 3.0, "n_tokens": 20, "rep": 0.0, "distinct": 1.0},
        "topic": {"any": [1, None, "ü"]},
        "trajectory": {
            "scope": "all",
            "schedule": "constant",
            "gate": None,
            "spans": [{"tokens": 12, "coeff": 1.0, "dose": 1.0}, {"tokens": 8, "coeff": 0.5, "dose": 0.5}],
            "rewinds": [{"at": 15, "to": 12, "coeff": 0.5, "why": "surprise", "value": 1.1}],
        },
    } | changes


def lines(*rows: dict[str, Any]) -> bytes:
    """JSON Lines."""
    return "".join(dumps(row) + "\n" for row in rows).encode()


def evaluation() -> dict[str, Any]:
    """An evaluation as `shl eval` writes it, shortened."""
    metrics = {"auth_nats": -1.7, "care_nats": -1.2, "p_ans_any": 0.99, "json_is_valid": 1.0, "broken": None,
               "free_ppl_p90": 1.4, "informedness": 0.2, "largest_share": 0.3, "top1": 0.5}  # fmt: skip
    return {
        "suite": "mfv", "model": "toy", "model_digest": "sha256:aa", "adapters": [], "vector": None, "coeff": None,
        "system": None, "settings": {"split": "test", "axes": ["authority"], "limit": None}, "n": 7, "seed": 0,
        "metrics": metrics, "ci": {"auth_nats": [-1.9, -1.5]}, "missing": {"broken": "no judge"},
        "profile": {"care": 1.0}, "verdict": "coherent: auth_nats -1.70",
    }  # fmt: skip


def _vector(folder: Path) -> bytes:
    meta = {
        "step": "vector", "method": "mean-diff", "layers": [1, 2], "position": "last", "seed": 0, "model": "toy",
        "revision": None, "model_digest": "sha256:aa", "adapters": [], "adapter_paths": [], "template": "sha256:bb",
        "personas": {"name": None, "axis": None, "pos": "You care.", "neg": None}, "version": "0", "commit": None,
        "norms": {"1": 1.0, "2": 1.0},
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    made = Vector({i: torch.randn(8, generator=generator) for i in (1, 2)}, meta)
    made.save(folder / "v.safetensors", force=True)
    return (folder / "v.safetensors").read_bytes()


def _adapter(folder: Path) -> Blob:
    tensors = {}
    for module in ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.ones(2, 6) / 3
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.ones(6, 2) / 7
    config = peft_config("base", ["q_proj", "down_proj"], 2, 4.0) | {"alpha_pattern": {"q_proj": 2}}
    folder = folder / "adapter"
    folder.mkdir()
    meta = {
        "step": "train", "config": {"reg": "kl_rev"}, "parents": [], "model": "toy", "revision": None,
        "model_digest": "sha256:aa", "template": "sha256:bb", "adapters": [], "update_norms": {"q_proj": 1.0},
    }  # fmt: skip
    write_adapter(folder, tensors, config, meta)
    (folder / "log.jsonl").write_bytes(lines({"epoch": 0, "nll": None}, {"epoch": 1, "nll": 1.5}))
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def _ledger(folder: Path) -> bytes:
    for seed in range(3):
        row = {
            "arm": "nll", "model": "toy", "model_digest": "sha256:aa", "suite": "mfv", "settings": {"split": "dev"},
            "n": 7, "round": seed, "seed": seed, "auth_nats": -1.0 - seed, "system": "=1+1\t\\ ü\n", "argv": "shl eval",
        }  # fmt: skip
        results.append_row(folder / "results.tsv", row)
    return (folder / "results.tsv").read_bytes()


def _gguf(folder: Path) -> bytes:
    from shl.export import to_gguf

    to_gguf(Vector({1: torch.ones(8), 2: torch.ones(8)}, {}), folder / "v.gguf", "llama")
    return (folder / "v.gguf").read_bytes()


def _training(folder: Path) -> bytes:
    """What a training of one parameter leaves beside its output when it is killed after an epoch."""
    weight = torch.full((2, 3), 0.5, requires_grad=True)
    optimiser = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimiser.step()
    lora: Any = SimpleNamespace(tensors=lambda: {"q_proj.lora_A.weight": weight.detach().clone()})
    run: Any = SimpleNamespace(step=1, open={2, 0}, best=(1, lora.tensors()))
    part = Checkpoint(folder / "t", {"prompts": "sha256:1", "seed": 0})
    part.save(run, lora, optimiser, torch.Generator().manual_seed(0), [{"epoch": 0, "nll": None}, {"epoch": 1}])
    part.release()
    return part.path.read_bytes()


def answers() -> bytes:
    """What `shl eval --per-row` writes: a line of each kind."""
    free = {name: record(1)[name] for name in ("prompt", "completion", "finish", "n_tokens", "scores")}
    judge = {"broken": False, "stance": "enact", "narrates": False}
    return lines(
        {"kind": "vignette", "id": "care-01", "foundation": "care", "score": [-1.5] * 7, "p": [0.1] * 7, "top1": "care",
         "p_ans_any": 0.99, "nll_json": 0.01, "reply": '{"answer": 1}', "reply_says": None},
        {"kind": "free", "id": "authority-test-001/0", "axis": "authority", "judge": judge, **free},
        {"kind": "facts", "id": "f1", "user": "What is wet?", "answer": "water", "reply": "Water.", "right": True},
    )  # fmt: skip


def _run(folder: Path) -> Blob:
    """A run folder of one round, as flat names."""
    scored = {name: json.dumps(evaluation() | {"seed": 1}).encode() for name in ("base.json", "prompted.json")}
    rows = [record(i) for i in range(4)]
    round_: Blob = {
        "v.safetensors": (folder / "v.safetensors").read_bytes(),
        "completions.jsonl": lines(*rows),
        "keep.jsonl": lines(*(row | {"keep": True, "reasons": []} for row in rows[1:3])),
        "rejects.jsonl": lines(rows[0] | {"keep": False, "reasons": ["control"]}),
        "steered.json": json.dumps(evaluation() | {"coeff": 0.5}).encode(),
        "eval.json": json.dumps(evaluation() | {"retain": {"auth_nats": 0.9}}).encode(),
        "samples.jsonl": answers(),
        "train.log": b"SHOULD: held-out nll falls (2.0 -> 1.0) ELSE nothing is learnt\nshl: warning: few\n",
        **{f"adapter/{file.name}": file.read_bytes() for file in sorted((folder / "adapter").iterdir())},
    }
    return scored | {"base.samples.jsonl": answers()} | {f"nll/r0/{name}": data for name, data in round_.items()}


def sound(folder: Path) -> dict[str, Blob]:
    """One sound artifact of each kind; `folder` is for scratch."""
    chat = [{"role": "user", "content": "a"}]
    prompts = [{"id": "q1", "user": "Who – said so?", "topic": "work"}, {"prompt": chat, "system": "s"}]
    recommended = {"judge": "toy", "layers": [4], "train": {"lr": 0.001}, "gen": {"coeffs": [0, 0.5], "limit": None}}
    return {
        "records": {"": lines(*(record(i) for i in range(4)))},
        "kept": {"": lines(*(record(i, keep=i > 0, reasons=["control"][i:]) for i in range(3)))},
        "prompts": {"": lines(*prompts)},
        "plain": {"": "One – prompt\n\nAnother\n".encode()},
        "pairs": {"": lines({"pos": "The order", "neg": "The clear order"}, {"pos": chat, "neg": chat})},
        "vector": {"": _vector(folder)},
        "adapter": _adapter(folder),
        "ledger": {"": _ledger(folder)},
        "evaluation": {"": json.dumps(evaluation(), ensure_ascii=False).encode()},
        "recommended": {"": json.dumps(recommended).encode()},
        "gguf": {"": _gguf(folder)},
        "part": {"": lines(*(record(i) for i in range(3))), ".json": b'{"prompts": "sha256:1", "seed": 0}\n'},
        "training": {"": _training(folder)},
        "rows": {"": answers()},
        "run": _run(folder),
    }
