"""Models by name: a missing one is told at once and without a network, and the cache serves by revision."""

import shutil
import socket
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from shl.cli import main
from shl.core.errors import ShlError
from shl.core.hub import cache_only
from shl.core.locate import find
from shl.core.models import load

COMMIT, NAME = "ab" * 20, "someone/tiny"


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to open a connection fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def cache(tmp_path, monkeypatch, tiny_model):
    """A cache of the hub that holds one model at one commit, which is its main branch."""
    home = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    shutil.copytree(tiny_model(), home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def online(monkeypatch, answer=None):
    """As if the hub could be asked, and gave this answer."""

    def model_info(self, name, revision=None, timeout=None):
        assert timeout, "a question without an end"
        if answer is not None:
            raise answer

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", model_info)


def refused(kind):
    """An error of the hub's library, without a response to make it from."""
    return kind.__new__(kind)


@pytest.mark.parametrize("name", ["./nowhere", "runs/r3/baked", "tests/nowhere", "someone/nothing", "nothing"])
def test_a_missing_model_is_told_without_a_network(no_network, monkeypatch, name, capsys):
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setattr("sys.argv", ["shl", "vector", "--model", name, "--pos", "x", "-o", "never.safetensors"])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == 1 and "shl: error: " in said and "hint: give a folder" in said


def test_a_folder_inside_a_folder_here_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("runs/base").id == "runs/base"
    (tmp_path / "runs").mkdir()
    with pytest.raises(ShlError, match="no model at runs/base"):
        find("runs/base")


def test_the_cache_serves_offline_by_branch_and_by_commit(no_network, cache):
    for revision in (None, "main", COMMIT):
        loaded = load(NAME, device="cpu", revision=revision)
        assert loaded.digest == f"{NAME}@{COMMIT}" and loaded.ref.revision == revision
    with pytest.raises(ShlError, match=f"{NAME} at v2 is no folder here and not in the cache, and HF_HUB_OFFLINE"):
        load(NAME, device="cpu", revision="v2")


def test_a_commit_in_the_cache_is_not_asked_for(no_network, cache, monkeypatch):
    online(monkeypatch, AssertionError("asked"))
    assert cache_only(find(NAME, COMMIT)) is True


def test_a_hub_that_cannot_be_reached_is_asked_once(cache, monkeypatch, capsys):
    online(monkeypatch, ConnectionError("no route"))
    assert cache_only(find(NAME)) is True
    assert "the hub cannot be asked (no route)" in capsys.readouterr().err
    with pytest.raises(ShlError, match=r"^other/model is no folder here, and the hub cannot be asked: no route"):
        cache_only(find("other/model"))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, "is gated"),
        (RepositoryNotFoundError, "no model on the hub"),
        (RevisionNotFoundError, "has no revision v9"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(cache, monkeypatch, kind, message):
    online(monkeypatch, refused(kind))
    with pytest.raises(ShlError, match=message) as error:
        cache_only(find("other/model", "v9"))
    assert error.value.hint


def test_what_the_hub_has_may_be_fetched(monkeypatch):
    online(monkeypatch)
    assert cache_only(find("other/model")) is False
