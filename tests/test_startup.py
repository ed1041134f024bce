"""Every --help answers without anything heavy, has examples, and shows each default."""

import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from shl import cli
from shl.core import defaults

COMMANDS = [
    "vector",
    "gen",
    "filter",
    "train",
    "bake",
    "eval",
    "dose",
    "score",
    "results",
    "plot",
    "report",
    "info",
    "export",
    "new",
]
HEAVY = {"torch", "transformers", "peft", "safetensors", "matplotlib", "numpy", "accelerate"}

PROBE = """
import json, sys
sys.argv = ["shl", *sys.argv[1:]]
from shl.cli import main
try:
    main()
except SystemExit as done:
    code = done.code
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def helped(*argv: str) -> tuple[str, set[str]]:
    done = subprocess.run([sys.executable, "-c", PROBE, *argv], capture_output=True, text=True, check=True)
    code, modules = json.loads(done.stderr)
    assert code == 0
    return done.stdout, {name.partition(".")[0] for name in modules}


def test_help_lists_the_commands_in_pipeline_order_and_is_light():
    text, modules = helped("--help")
    listed = re.findall(r"^  (\w+)  +\S", text.partition("Commands:")[2], re.MULTILINE)
    assert listed == COMMANDS
    assert not modules & HEAVY


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps_without_heavy_imports(name):
    text, modules = helped(name, "--help")
    assert not modules & HEAVY
    examples = text.partition("Examples:\n")[2].strip().splitlines()
    assert len(examples) == 2 and all(f"shl {name}" in line for line in examples)
    assert "None" not in text


def test_version_and_no_arguments():
    assert helped("--version")[0].strip() == cli.__version__
    done = subprocess.run([sys.executable, "-m", "shl"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Commands:" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "config", "unsaid"),
    [
        ("vector", defaults.VectorConfig, set()),
        ("gen", defaults.GenConfig, {"block"}),
        ("filter", defaults.FilterConfig, set()),
        ("train", defaults.TrainConfig, set()),
        ("eval", defaults.EvalConfig, set()),
    ],
)
def test_help_shows_every_default(name, config, unsaid):
    text, _ = helped(name, "--help")
    squeezed = " ".join(text.split())
    for field in fields(config):
        value = field.default
        if field.name in unsaid or isinstance(value, bool) or value is None or value == ():
            continue
        plain = (
            ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) if isinstance(value, tuple) else value
        )
        plain = f"{plain:g}" if isinstance(plain, float) else str(plain)
        assert f"[{plain}]" in squeezed, f"shl {name} --help does not show {field.name} = {plain}"
