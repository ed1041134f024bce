"""What is written about the command line is what the command line does: docs/cli.md, examples, README, completion."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from shl.cli import app, reference
from shl.core import pools

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PARSERS = vars(get_command(app))["commands"]
PAGES = [ROOT / "README.md", ROOT / "src/shl/data/run/README.md"]
PAGES += sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "cli.md")  # which is made, not written
WRITTEN = {one.name: one.examples for one in reference.commands()}
ENDS = {"|", "||", "&&", ";", "&", "(", ")", ">", ">>", "<", "2>"}


def invocations(line: str) -> Iterator[list[str]]:
    """The words of every `shl COMMAND …` in a line of shell, those inside $(…) too."""
    while inner := re.search(r"\$\(([^()]*)\)", line):
        yield from invocations(inner[1])
        line = line.replace(inner[0], "1")
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split, words.commenters = True, "#"
    found: list[str] | None = None
    for word in [*words, ";"]:
        if word == "shl" and found is None:
            found = []
        elif word in ENDS:
            if found:
                yield found
            found = None
        elif found is not None:
            found.append(word)


def parse(words: list[str]) -> dict[str, object]:
    """What the real parser makes of a command line; nothing is run. Raises on wrong usage."""
    name, *rest = words
    with PARSERS[name].make_context(name, list(rest)) as context:
        return dict(context.params)


class TestPage:
    """docs/cli.md."""

    def test_it_is_what_the_commands_say_now(self):
        page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
        assert page == reference.page(), "docs/cli.md is out of date: run just cli"

    def test_it_does_not_depend_on_terminal_or_environment(self):
        pages = set()
        for env in ({"COLUMNS": "20", "TERM": "dumb", "LC_ALL": "C"}, {"COLUMNS": "400", "FORCE_COLOR": "1"}):
            env |= {"PYTHONHASHSEED": env["COLUMNS"], "SHL_MODEL": "other"}
            command = [sys.executable, "-m", "shl.cli.reference"]
            pages.add(subprocess.run(command, env=os.environ | env, capture_output=True, check=True).stdout)
        assert {page.decode("utf-8") for page in pages} == {reference.page()}

    @pytest.mark.parametrize("name", list(PARSERS))
    def test_every_option_and_argument_stands_in_its_section(self, name):
        _, _, rest = reference.page().partition(f"## shl {name}\n")
        section = rest.partition("\n## ")[0]
        for parameter in PARSERS[name].params:
            if parameter.param_type_name == "argument":
                flag = parameter.metavar or parameter.name.upper()
            else:
                flag = parameter.opts[0]
            assert f"`{flag}`" in section and (not parameter.required or "required" in section), flag
        for flag in re.findall(r"`(--?[a-z][a-z0-9-]*)`", section):  # and nothing else does
            assert any(flag in parameter.opts for one in PARSERS.values() for parameter in one.params), flag

    def test_commands_that_can_end_below_a_gate_say_so(self):
        source = Path(reference.__file__).parent.parent
        steps = {name: source / f"{name}.py" for name in PARSERS}
        gated = {
            name for name, file in steps.items() if file.is_file() and "raise BelowGate(" in file.read_text("utf-8")
        }
        assert gated and gated <= set(reference.GATES)
        for name in reference.GATES:
            assert f"Exit code 3: {reference.GATES[name]}." in reference.page().partition(f"## shl {name}\n")[2]


class TestExamples:
    """No example can go stale: each is read by the command's own parser."""

    def test_every_command_has_two(self):
        assert list(WRITTEN) == list(PARSERS)
        assert {len(lines) for lines in WRITTEN.values()} == {2}

    @pytest.mark.parametrize(("name", "line"), [(name, line) for name, lines in WRITTEN.items() for line in lines])
    def test_it_parses(self, name, line):
        found = list(invocations(line))
        assert any(words[0] == name for words in found)
        for words in found:
            asked = parse(words)
            if asked.get("persona"):
                assert pools.persona(str(asked["persona"])).name == asked["persona"]

    @pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
    def test_lines_of_the_documentation_parse(self, path):
        for line in re.findall(r"^(?:    )?(shl \w.*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            for words in invocations(line):
                parse(words)

    @pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
    def test_flags_that_prose_names_exist(self, path):
        for name, rest in re.findall(r"`shl (\w+) ([^`]+)`", path.read_text(encoding="utf-8")):
            known = {flag for parameter in PARSERS[name].params for flag in parameter.opts}
            said = re.findall(r"(?<!\S)\[?(--[a-z][a-z0-9-]*)", rest.partition("|")[0])
            assert set(said) <= known, f"shl {name} {rest}"

    def test_a_wrong_line_is_noticed(self):
        with pytest.raises(Exception, match="--coef"):
            parse(["gen", "--vec", "v.safetensors", "--coef", "1"])
        with pytest.raises(typer.BadParameter):
            parse(["gen", "--max-new-tokens", "many"])
        line = (
            "shl gen --vec v --coeff 0,$(shl dose --vec v --survival 0.5) | shl filter > keep && shl train keep -o r0"
        )
        assert [words[0] for words in invocations(line)] == ["dose", "gen", "filter", "train"]


class TestCompletion:
    """Completion of the shell, which must answer while somebody holds down the tab key."""

    def shell(self, line: str, home: Path, **env: str) -> str:
        told = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(home)}
        # the command is not the last one, so that bash does not become it and typer sees which shell asks
        done = subprocess.run(
            ["bash", "-c", f"{line}; true"], env=os.environ | told | env, capture_output=True, text=True
        )
        return done.stdout

    def test_the_script_is_printed(self, tmp_path):
        script = self.shell("shl --show-completion", tmp_path)
        assert "complete " in script and "_SHL_COMPLETE" in script
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0

    def test_it_installs_into_the_home_and_bash_then_completes(self, tmp_path):
        self.shell("shl --install-completion", tmp_path)
        assert "shl" in (tmp_path / ".bashrc").read_text(encoding="utf-8")
        function = "$(complete -p shl | sed 's/.*-F \\(\\S*\\).*/\\1/')"
        line = f"source ~/.bashrc; COMP_WORDS=(shl exp) COMP_CWORD=1; {function} shl; echo ${{COMPREPLY[@]}}"
        assert self.shell(line, tmp_path).split() == ["export"]

    @pytest.mark.parametrize(
        ("typed", "offered"),
        [
            ("shl ", list(PARSERS)),
            ("shl gen --sch", ["--schedule"]),
            ("shl gen --schedule ", ["constant", "exp", "linear"]),
        ],
    )
    def test_it_offers_what_fits_without_heavy_imports(self, typed, offered):
        probe = (
            "import json, sys; sys.argv = ['shl']\n"
            "from shl.cli import main\n"
            "try: main()\n"
            "except SystemExit: pass\n"
            "print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
        )
        words = shlex.split(typed) + ([""] if typed.endswith(" ") else [])
        env = {"_SHL_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
        done = subprocess.run(
            [sys.executable, "-c", probe], env=os.environ | env, capture_output=True, text=True, check=True
        )
        assert sorted(done.stdout.split()) == sorted(offered)
        assert not {"torch", "transformers", "peft", "numpy"} & set(json.loads(done.stderr))
