"""The tutorial is typed as it stands, block by block in an empty folder; links of the documentation lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TEXT = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder after all blocks were typed into one shell, and what each of them printed."""
    folder = tmp_path_factory.mktemp("tutorial")
    mark = "=== block ==="
    script = "".join(f"echo '{mark}' | tee /dev/stderr\n{block}" for block in BLOCKS)
    env = {name: value for name, value in os.environ.items() if name != "SHL_MODEL"}
    env |= {"PATH": f"{BIN}:{env['PATH']}", "HF_HUB_OFFLINE": "1"}
    command = ["bash", "-eu", "-o", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True)
    reached = done.stdout.split(mark + "\n")[1:]
    assert done.returncode == 0, f"{BLOCKS[len(reached) - 1]}\n{done.stderr.rpartition(mark)[2]}"
    return folder, reached


def test_every_block_runs_and_the_reader_sees_answers(typed):
    _, printed = typed
    assert len(printed) == len(BLOCKS)
    for block, text in zip(BLOCKS, printed, strict=True):
        for count in re.findall(r"\bshow (\d+)", block):
            assert len(re.findall(r"^[\d.]* \S+ ['\"].{10,}['\"]$", text, re.MULTILINE)) >= int(count), text


def test_the_files_that_it_names_are_there_and_no_others(typed):
    folder, _ = typed
    named = re.findall(r"(?:-o|>|--rejects|--per-row|--append) ([\w.]+)", "".join(BLOCKS))
    left = {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}
    assert left == set(named)


def test_it_goes_through_the_six_verbs_in_order():
    verbs = re.findall(r"\bshl (vector|gen|filter|train|bake|eval)\b", "".join(BLOCKS))
    assert list(dict.fromkeys(verbs)) == ["vector", "gen", "filter", "train", "bake", "eval"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        other = page.parent / target if target else page
        assert other.exists(), f"{page.name}: {target}"
        if anchor and other.suffix == ".md":
            heads = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page.name}: {target}#{anchor}"


def test_the_tutorial_is_linked_from_both_front_pages():
    assert "docs/tutorial.md" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(tutorial.md)" in (ROOT / "docs/README.md").read_text(encoding="utf-8")
