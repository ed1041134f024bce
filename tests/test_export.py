"""GGUF control vectors: there and back is the identity, the gguf package reads ours, and what is not one is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shl.cli import main
from shl.core.errors import InputError, ShlError
from shl.core.vectors import Vector
from shl.export import from_gguf, to_gguf

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")


def vector(blocks=(2, 5), width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Vector({layer: torch.randn(width, generator=generator) for layer in blocks}, {"model": "toy"})


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(1, 60), min_size=1, max_size=5), st.integers(1, 40), st.integers(0, 99))
def test_there_and_back_is_the_identity(tmp_path_factory, blocks, width, seed):
    path, made = tmp_path_factory.mktemp("g") / "v.gguf", vector(sorted(blocks), width, seed)
    assert to_gguf(made, path, "qwen2") == sorted(blocks)
    back = from_gguf(path, "toy")
    assert list(back.layers) == sorted(blocks) and back.meta["model_type"] == "qwen2"
    assert all(torch.equal(back.layers[layer], made.layers[layer]) for layer in blocks)


def test_the_gguf_package_reads_what_llama_cpp_asks_for(tmp_path):
    made = vector()
    to_gguf(made, tmp_path / "v.gguf", "gemma3_text", 0.5)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "gemma3_text"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    assert [t.name for t in reader.tensors] == ["direction.2", "direction.5"]
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and len(tensor.shape) == 1
    assert np.allclose(reader.tensors[0].data, 0.5 * made.layers[2].numpy())
    assert not list(tmp_path.glob(".*"))


def test_block_0_has_no_place(tmp_path):
    made = vector((0, 3))
    with pytest.raises(ShlError, match="block 0"):
        to_gguf(made, tmp_path / "v.gguf", "llama")
    assert to_gguf(made, tmp_path / "v.gguf", "llama", drop_block_0=True) == [3]
    with pytest.raises(ShlError, match="no block is left"):
        to_gguf(vector((0,)), tmp_path / "w.gguf", "llama", drop_block_0=True)
    with pytest.raises(ShlError, match="exists"):
        to_gguf(made, tmp_path / "v.gguf", "llama", drop_block_0=True)


def write(path, arch="controlvector", **tensors):
    writer = gguf.GGUFWriter(path, arch)
    for name, values in tensors.items():
        writer.add_tensor(name.replace("_", "."), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "arch, tensors, said",
    [
        ("llama", {"direction_1": np.ones(4, np.float32)}, "not a control vector"),
        ("controlvector", {"other": np.ones(4, np.float32)}, "other"),
        ("controlvector", {"direction_1": np.ones((2, 4), np.float32)}, "2x4"),
        ("controlvector", {"direction_1": np.ones(4, np.float16)}, "float16"),
        ("controlvector", {"direction_1": np.full(4, np.nan, np.float32)}, "not finite"),
        ("controlvector", {"direction_1": np.ones(4, np.float32), "direction_2": np.ones(5, np.float32)}, "different"),
    ],
)
def test_what_is_no_control_vector_is_refused(tmp_path, arch, tensors, said):
    with pytest.raises(InputError, match=said):
        from_gguf(write(tmp_path / "v.gguf", arch, **tensors))


def test_damaged_bytes_are_refused(tmp_path):
    to_gguf(vector(), tmp_path / "v.gguf", "llama")
    whole = (tmp_path / "v.gguf").read_bytes()
    for size in (0, 3, 20, len(whole) // 2, len(whole) - 40):
        (tmp_path / "torn.gguf").write_bytes(whole[:size])
        with pytest.raises(InputError):
            from_gguf(tmp_path / "torn.gguf")
    with pytest.raises(InputError):
        from_gguf(tmp_path / "nothing.gguf")


def test_the_command_goes_both_ways(tmp_path, capfd, monkeypatch):
    vector().save(tmp_path / "v.safetensors")

    def run(line: str) -> int:
        monkeypatch.setattr("sys.argv", ["shl", "export", *line.replace("@", f"{tmp_path}/").split()])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code or 0

    assert run("@v.safetensors -o @v.gguf") == 0
    assert run("@v.gguf -o @w.safetensors --model toy") == 0
    assert torch.equal(Vector.load(tmp_path / "w.safetensors").layers[2], vector().layers[2])
    assert capfd.readouterr().out == ""
    assert run("@v.gguf -o @x.gguf") == 2
    assert run("@v.gguf -o @x.safetensors --coeff 2") == 2
    assert run("@v.safetensors -o @v.gguf") == 1
