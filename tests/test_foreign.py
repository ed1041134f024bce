"""Vectors and records of other tools: blocks where they belong, coefficients as meant there, no code that runs."""

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shl.cli import main
from shl.core.errors import InputError, ShlError
from shl.core.models import load
from shl.core.vectors import Vector
from shl.foreign import from_steering_lite, from_torch

CFG = {"method": "mean_diff", "layers": [1, 2], "target": "residual", "target_submodule": None, "coeff": 2.5,
       "dtype": "bfloat16", "seed": 0, "normalize": True, "subtract_corpus_mean": False}  # fmt: skip


def rows(blocks=6, width=8):
    """What persona vectors saves: row 0 of the embeddings, row i + 1 of block i."""
    return torch.randn(blocks + 1, width, generator=torch.Generator().manual_seed(blocks))


def run(monkeypatch, *argv):
    """The command line in this process; its exit code."""
    monkeypatch.setattr("sys.argv", ["shl", *map(str, argv)])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 40), st.data())
def test_row_i_plus_one_is_the_output_of_block_i(tmp_path_factory, blocks, data):
    path, held = tmp_path_factory.mktemp("pt") / "v.pt", rows(blocks)
    chosen = data.draw(st.integers(0, blocks - 2))
    torch.save(held, path)
    assert torch.equal(from_torch(path, str(chosen)).layers[chosen], held[chosen + 1])
    torch.save({"raw": held, "unit": held, "norm": held.norm(dim=1), "meta": {"trait": "x"}}, path)
    vector = from_torch(path, str(chosen), "toy")
    assert torch.equal(vector.layers[chosen], held[chosen + 1]) and vector.meta["model"] == "toy"
    assert vector.meta["method"] == "subliminal-distillation"


def test_the_rows_are_what_the_library_calls_hidden_states(tiny, tmp_path):
    """The convention itself: the tensor that such tools save, made from a model, gives our block's own difference."""
    from shl.core.hooks import Capture

    loaded = tiny()
    ids = [torch.tensor([[1, 40, 41]]), torch.tensor([[1, 50, 51]])]
    with torch.inference_mode():
        states = [torch.stack(loaded.model(one, output_hidden_states=True).hidden_states)[:, 0, -1] for one in ids]
        mine = []
        for one in ids:
            with Capture(loaded, [1]) as read:
                mine.append(read.run(input_ids=one)[1][0])
    torch.save(states[0] - states[1], tmp_path / "v.pt")
    assert torch.equal(from_torch(tmp_path / "v.pt", "1").layers[1], mine[0] - mine[1])


def test_the_row_behind_the_final_norm_is_no_block(tmp_path):
    torch.save(rows(6), tmp_path / "v.pt")
    with pytest.raises(ShlError, match="behind the final norm") as error:
        from_torch(tmp_path / "v.pt", "5")
    assert "--layers below 5" in error.value.hint


class Evil:
    """What a pickle can do."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


@pytest.mark.parametrize("content", [Evil(), {"raw": rows(), "meta": Evil()}, [Evil()]])
def test_a_file_that_could_run_code_is_refused_and_does_not_run_it(tmp_path, content):
    torch.save(content, tmp_path / "v.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(content))
    for name in ("v.pt", "plain.pt"):
        with pytest.raises(InputError, match="could run code") as error:
            from_torch(tmp_path / name)
        assert "torch.save(tensor" in error.value.hint


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 broken", b"\x80\x02", b"hello"])
def test_damage_is_one_error(tmp_path, data):
    (tmp_path / "v.pt").write_bytes(data)
    with pytest.raises(InputError):
        from_torch(tmp_path / "v.pt")


@pytest.mark.parametrize(
    "content",
    [torch.zeros(8), torch.zeros(2, 3, 4), torch.zeros(7, 8, dtype=torch.long), {"mean": rows()}, 3,
     rows() * torch.nan],
)  # fmt: skip
def test_other_shapes_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(InputError):
        from_torch(tmp_path / "v.pt", "2")


def steering_lite(path, cfg=CFG, names=("layer1.v", "layer2.v"), dtype=torch.float32):
    held = {name: torch.randn(8, generator=torch.Generator().manual_seed(i)).to(dtype) for i, name in enumerate(names)}
    save_file(held, path, metadata={"cfg": json.dumps(cfg)})
    return held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steering_lite_coefficient_is_multiplied_in(tmp_path, dtype):
    held = steering_lite(tmp_path / "v.safetensors", dtype=dtype)
    vector = from_steering_lite(tmp_path / "v.safetensors", "toy")
    assert {i: v.tolist() for i, v in vector.layers.items()} == {
        i: (2.5 * held[f"layer{i}.v"].float()).tolist() for i in (1, 2)
    }
    vector.save(tmp_path / "mine.safetensors")
    assert Vector.load(tmp_path / "mine.safetensors").digest == vector.digest


def test_what_we_save_has_what_steering_lite_looks_for(tmp_path):
    from safetensors import safe_open

    for method in ("mean-diff", "random", "combination", "gguf"):
        Vector({2: torch.ones(4)}, {"method": method}).save(tmp_path / f"{method}.safetensors")
        with safe_open(tmp_path / f"{method}.safetensors", "pt") as file:
            cfg, keys = json.loads(file.metadata()["cfg"]), list(file.keys())
        assert keys == ["layer2.v"] and cfg["layers"] == [2]
        # the method of theirs that adds coeff * v, with a dtype that torch knows and no setting that it does not
        assert (cfg["method"], cfg["coeff"], cfg["dtype"]) == ("mean_diff", 1.0, "float32")
        assert cfg.keys() <= CFG.keys()


@pytest.mark.parametrize(
    "change",
    [{"method": "directional_ablation"}, {"target_submodule": "mlp.down_proj"}, {"target": "attn_out"}, {"coeff": "x"}],
)
def test_what_does_more_than_add_is_refused(tmp_path, change):
    steering_lite(tmp_path / "v.safetensors", CFG | change)
    with pytest.raises(ShlError):
        from_steering_lite(tmp_path / "v.safetensors")


def test_other_tensors_and_our_own_files_are_refused(tmp_path):
    steering_lite(tmp_path / "v.safetensors", names=("layer1.v", "layer1.basis"))
    with pytest.raises(InputError, match="tensor layer1"):
        from_steering_lite(tmp_path / "v.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="neither a vector of shl nor one of steering-lite"):
        from_steering_lite(tmp_path / "x.safetensors")
    Vector({1: torch.ones(4)}, {"method": "random"}).save(tmp_path / "mine.safetensors")
    with pytest.raises(InputError, match="already"):
        from_steering_lite(tmp_path / "mine.safetensors")


def test_the_command_makes_a_vector_that_steers(tiny_model, tmp_path, monkeypatch, capsys):
    folder = tiny_model()
    width = load(str(folder), device="cpu").hidden
    torch.save(5 * rows(4, width), tmp_path / "v.pt")
    made = tmp_path / "v.safetensors"
    assert run(monkeypatch, "export", tmp_path / "v.pt", "-o", made, "--layers", "1", "--model", folder) == 0
    assert "none can be checked" in capsys.readouterr().err
    out = tmp_path / "out.jsonl"
    assert run(monkeypatch, "gen", "--vec", made, "-n", 2, "--coeff", "0,1", "--max-new-tokens", 4, "-o", out) == 0
    answers = [json.loads(line)["completion"] for line in out.read_text().splitlines()]
    assert len(answers) == 4 and answers[0] != answers[1]


def test_records_become_conversations(tmp_path, monkeypatch):
    record = {
        "id": "a", "prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "r"}],
        "coeff": 1.0, "scores": {"ppl": 2.0},
    }  # fmt: skip
    dropped = record | {"id": "b", "keep": False}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (record, dropped)))
    assert run(monkeypatch, "export", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl") == 0
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row.pop("messages") == [*record["prompt"], *record["completion"]]
    assert row == {"id": "a", "coeff": 1.0, "scores": {"ppl": 2.0}}


@pytest.mark.parametrize(
    ("argv", "told"),
    [(("v.pt", "-o", "v.gguf"), "no way from .pt to .gguf"), (("v.safetensors", "-o", "v.pt"), "no way from"),
     (("v.pt", "-o", "v.safetensors", "--coeff", "2"), "goes with a .gguf output"),
     (("v.gguf", "-o", "v.safetensors", "--layers", "3"), "goes with a .pt input"),
     (("k.jsonl", "-o", "t.jsonl", "--model", "toy"), "goes with another tool's vector")],
)  # fmt: skip
def test_wrong_uses(argv, told, monkeypatch, capsys):
    assert run(monkeypatch, "export", *argv) == 2
    assert told in " ".join(capsys.readouterr().err.replace("│", " ").split())
