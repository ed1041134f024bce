"""Provenance: digests depend on content alone, and safetensors files have the same bytes for the same content."""

import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from shl.core import provenance, seeds, tensors
from shl.core.errors import InputError, ShlError

VALUES = {"layer1.v": torch.arange(4.0), "layer0.v": torch.ones(2, 3, dtype=torch.bfloat16)}


def write(path, values=VALUES, meta=None, **extra):
    metadata = {"shl": provenance.canonical(meta or {"model": "toy"}), **extra}
    tensors.save_safetensors(path, values, metadata, force=True)
    return path


def test_same_content_same_bytes(tmp_path):
    extra = {f"key{i}": "é" for i in range(6)}
    first = provenance.digest_file(write(tmp_path / "a", **extra))
    again = {provenance.digest_file(write(tmp_path / "a", **dict(reversed(extra.items())))) for _ in range(8)}
    assert again == {first}


def test_readable_by_the_library(tmp_path):
    path = write(tmp_path / "a", cfg='{"method": "mean-diff"}')
    back = load_file(path)
    assert all(torch.equal(back[name], value) for name, value in VALUES.items())
    with safe_open(path, "pt") as handle:
        assert handle.metadata() == {"shl": '{"model":"toy"}', "cfg": '{"method": "mean-diff"}'}


def test_the_header_is_read_without_torch(tmp_path):
    path = write(tmp_path / "a")
    code = (
        "import sys; from shl.core import provenance as p\n"
        f"print(p.read_header({str(path)!r})['model'], p.digest_tensors({str(path)!r}))\n"
        "assert not {'torch', 'safetensors'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["toy", provenance.digest_tensors(path)]


def test_saved_with_a_plain_mode_and_never_silently_replaced(tmp_path):
    path = write(tmp_path / "a")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    with pytest.raises(ShlError, match="exists already"):
        tensors.save_safetensors(path, VALUES)


def test_the_digest_covers_values_and_header_but_not_when_and_how(tmp_path):
    meta = {"model": "toy", "created": "now", "argv": ["shl"], "commit": "abc", "version": "1"}
    digest = provenance.digest_tensors(write(tmp_path / "a"), meta)
    reordered = dict(reversed(VALUES.items()))
    later = meta | {"created": "later", "argv": [], "commit": None, "version": "2"}
    assert provenance.digest_tensors(write(tmp_path / "b", reordered), later) == digest
    assert provenance.digest_tensors(tmp_path / "a", meta | {"model": "other"}) != digest
    nudged = VALUES | {"layer1.v": VALUES["layer1.v"] + 1e-6}
    assert provenance.digest_tensors(write(tmp_path / "c", nudged), meta) != digest


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:4], lambda d: b"\xff" * 64, lambda d: b""])
def test_damaged_files_are_user_errors(tmp_path, damage):
    path = write(tmp_path / "a")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError):
        provenance.read_safetensors(path)


def test_a_foreign_file_is_named_as_such(tmp_path):
    tensors.save_safetensors(tmp_path / "a", VALUES, {"format": "pt"})
    with pytest.raises(InputError, match="not written by shl"):
        provenance.read_header(tmp_path / "a")


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=5))
def test_canonical_json_does_not_know_the_order_of_keys(value):
    assert provenance.canonical(value) == provenance.canonical(dict(reversed(value.items())))
    assert json.loads(provenance.canonical(value)) == value


def test_a_header_says_who_made_it():
    made = provenance.header("vector", {"layers": "0.45:0.55"}, ["sha256:0"])
    assert made["step"] == "vector" and made["parents"] == ["sha256:0"]
    assert {"version", "commit", "argv", "created"} <= made.keys()
    assert provenance.stable(made).keys() == {"step", "config", "parents"}


@given(st.integers(0, 2**40), st.lists(st.text(max_size=6), max_size=3))
def test_seeds_are_stable_and_in_range(seed, parts):
    value = seeds.seed_of(seed, *parts)
    assert 0 <= value < 2**63
    assert value == seeds.seed_of(seed, *parts)


def test_seeds_tell_names_apart():
    named = [(0, "a", "b"), (0, "ab"), (1, "a", "b"), (0, "a", "b", ""), (0,)]
    assert len({seeds.seed_of(*name) for name in named}) == len(named)
    assert seeds.seed_of(0, "p/1/0") == 8141633798599731273  # the seeds of published files must not change
