"""Artifacts of strangers: refused before weights are read or rendered harmless, and nothing that they hold is run."""

import ast
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import shl as package
from fuzz.seeds import evaluation, lines, record
from shl import cli, results
from shl.core import console
from shl.core.errors import InputError, Mismatch, ShlError
from shl.core.locate import local_digest
from shl.core.models import load
from shl.core.peft_dir import CONFIG, META, PREFIX, WEIGHTS, peft_config, write_adapter
from shl.core.vectors import Vector

ROOT = Path(package.__file__).parent
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b2J\x7f\x08\u202egnp.exe\r"
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>![x](http://x/y)`</code>"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def shl(monkeypatch, capfd, tmp_path):
    """One command in this process, through the error boundary; code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SHL_MODEL", raising=False)

    def run(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shl", *map(str, argv)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main()
        out, err = capfd.readouterr()
        return int(done.value.code or 0), out, err

    return run


@pytest.fixture
def weightless(monkeypatch, tiny):
    """Reading weights is a failure from here on."""
    tiny()
    monkeypatch.setattr("shl.core.models._read", lambda *a, **k: pytest.fail("weights were read"))


@pytest.fixture
def shut(tiny_model, tmp_path) -> Path:
    """The tiny Llama with a folder in the place of its weights: whoever opens that gets an error of another kind."""
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "shut"))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(OSError, match="directory"):
        local_digest(folder)
    return folder


def make_adapter(folder: Path, parents: tuple = (), **meta: object) -> str:
    """A small adapter for the tiny Llama; returns its digest."""
    module = "model.layers.1.self_attn.q_proj"
    tensors = {
        f"{PREFIX}{module}.lora_A.weight": torch.ones(2, 48),
        f"{PREFIX}{module}.lora_B.weight": torch.ones(48, 2),
    }
    folder.mkdir(parents=True)
    return write_adapter(folder, tensors, peft_config("base", [module], 2, 4.0), {"parents": list(parents), **meta})


def make_vector(path: Path, tiny, hidden: int = 48, layers: tuple[int, ...] = (1, 2), **meta: object) -> Path:
    """A vector for the tiny Llama, with changes."""
    loaded = tiny()
    own = {"model": loaded.ref.id, "revision": None, "model_digest": loaded.digest, "adapters": [], "adapter_paths": [],
           "template": loaded.template_digest, "layers": list(layers)}  # fmt: skip
    Vector({layer: torch.ones(hidden) for layer in layers}, {**own, **meta}).save(path, force=True)
    return path


QUICK = ["-n", "1", "--max-new-tokens", "2", "--coeff", "1", "--no-score", "-q"]
BRIEF = ["-n", "7", "--free", "0", "--json-tokens", "2", "--bootstrap", "2", "-q"]


class TestMismatch:
    """What was made for something else is refused before weights are read, and --allow-mismatch insists."""

    COMMANDS = (["gen", *QUICK], ["eval", "--coeff", "1", *BRIEF], ["dose", "--target-kl", "1"])

    @pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: argv[0])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hidden": 40}, "has 40 numbers for block 1; .* of width 48"),
            ({"layers": (1, 9)}, "for block 9; .* has 4 blocks"),
            ({"model_digest": "sha256:0"}, "made for another model"),
            ({"model_digest": "org/name@abc"}, "made for another model: org/name@abc"),  # so is another revision
            ({"adapters": ["sha256:0"]}, "a chain of 1 adapters, and this is another, of 0"),
        ],
    )
    def test_a_vector(self, shl, tiny, tmp_path, weightless, argv, change, message):
        vector = make_vector(tmp_path / "v.safetensors", tiny, **change)
        code, out, err = shl(argv[0], "--vec", vector, *argv[1:])
        assert code == 1 and not out and re.search(message, err) and "hint: " in err and "Traceback" not in err

    def test_the_file_of_weights_is_never_opened(self, shl, tiny, tmp_path, shut):
        """What a header can tell is told without the weights, not even for their digest."""
        own = {"model": str(shut)}
        made = {"wide": {"hidden": 40}, "deep": {"layers": (1, 9)}, "chained": {"adapters": ["sha256:0"]}}
        for name, change in made.items():
            vector = make_vector(tmp_path / f"{name}.safetensors", tiny, **own, **change)
            for argv in self.COMMANDS:
                code, _, err = shl(argv[0], "--vec", vector, *argv[1:])
                assert code == 1 and "hint: " in err and re.search("the vector has|made with a chain of", err), err
        other = make_vector(tmp_path / "other.safetensors", tiny, model="org/name", model_digest="org/name@1")
        make_adapter(tmp_path / "a", model="org/name", model_digest="org/name@1")
        (tmp_path / "k.jsonl").write_bytes(lines(record(1, **own, coeff=1), record(2, model="toy", coeff=1)))
        refused = (["gen", "--vec", other, *QUICK], ["eval", "--adapter", "a", *BRIEF], ["bake", "a", "-o", "b"])
        for argv in (*((*line, "--model", shut) for line in refused), ["train", "k.jsonl", "-o", "r0"]):
            code, _, err = shl(*argv)
            assert code == 1 and "--allow-mismatch" in err, (argv, err)

    @pytest.mark.parametrize(
        "change", [{"model_digest": "sha256:0"}, {"adapters": ["sha256:0"]}, {"template": "sha256:0"}]
    )
    def test_insisting(self, shl, tiny, tmp_path, change):
        vector = make_vector(tmp_path / "v.safetensors", tiny, **change)
        assert shl("gen", "--vec", vector, *QUICK)[0] == 1
        code, out, err = shl("gen", "--vec", vector, *QUICK, "--allow-mismatch")
        assert code == 0 and json.loads(out)["coeff"] == 1, err

    def test_a_width_that_does_not_fit_cannot_be_insisted_on(self, shl, tiny, tmp_path, weightless):
        vector = make_vector(tmp_path / "v.safetensors", tiny, hidden=40)
        assert shl("gen", "--vec", vector, *QUICK, "--allow-mismatch")[0] == 1

    def test_an_adapter_of_another_base(self, shl, tiny, tmp_path, weightless):
        model = tiny().ref.id
        make_adapter(tmp_path / "a", model="other", model_digest="sha256:0")
        code, _, err = shl("eval", "--model", model, "--adapter", "a", *BRIEF)
        assert code == 1 and "was made for model other" in err and "--allow-mismatch" in err
        make_adapter(tmp_path / "b", model=model, model_digest="sha256:0")  # the same name, other weights
        code, _, err = shl("eval", "--adapter", "b", *BRIEF)
        assert code == 1 and "was trained on" in err and "--allow-mismatch" in err
        make_adapter(tmp_path / "c")  # as plain peft writes it
        (tmp_path / "c" / META).unlink()
        code, _, err = shl("eval", "--model", model, "--adapter", "c", *BRIEF)
        assert code == 1 and "was made for model base" in err

    def test_a_parent_that_was_changed_after_the_fact(self, shl, tiny, tmp_path, weightless):
        digest = make_adapter(tmp_path / "r0", model=tiny().ref.id)
        parent = {"path": "../r0", "digest": digest, "scale": 1.0}
        make_adapter(tmp_path / "r1", parents=(parent,), model=tiny().ref.id)
        path = tmp_path / "r0" / WEIGHTS
        save_file({name: 1.5 * tensor for name, tensor in load_file(path).items()}, path)
        code, _, err = shl("eval", "--adapter", "r1", *BRIEF)
        assert code == 1 and "r0: was changed after it was written" in err
        own = json.loads((tmp_path / "r0" / META).read_text())
        del own["digest"]  # whoever changes the parent may cover it up; what the child recorded still tells
        (tmp_path / "r0" / META).write_text(json.dumps(own))
        code, _, err = shl("eval", "--adapter", "r1", *BRIEF)
        assert code == 1 and "changed since" in err and "--no-parents" in err

    @pytest.mark.parametrize(
        ("change", "what"),
        [({"vector": "sha256:2"}, "vectors"), ({"model": "other"}, "models"), ({"adapters": ["sha256:1"]}, "adapters")],
    )
    def test_records_of_another_origin_mixed_in(self, shl, tiny, tmp_path, monkeypatch, change, what):
        monkeypatch.setattr("shl.core.models.load", lambda *a, **k: pytest.fail("loaded"))
        own = {"model": tiny().ref.id, "coeff": 1.0}
        (tmp_path / "keep.jsonl").write_bytes(lines(record(1, **own), record(2, **own | change)))
        code, _, err = shl("train", "keep.jsonl", "-o", "r0")
        assert code == 1 and f"come from different {what}" in err and "--allow-mismatch" in err

    def test_mixed_vectors_can_be_insisted_on(self, shl, tiny, tmp_path):
        own = {"model": tiny().ref.id, "coeff": 1.0}
        (tmp_path / "keep.jsonl").write_bytes(lines(record(1, **own), record(2, **own, vector="sha256:2")))
        code, _, err = shl("train", "keep.jsonl", "-o", "r0", "--allow-mismatch", "--epochs", 1, "--rank", 1, "-q")
        assert code == 0, err
        assert len(json.loads((tmp_path / "r0" / META).read_text())["vectors"]) == 2

    def test_a_baseline_measured_otherwise(self, shl, tiny, tmp_path, monkeypatch):
        monkeypatch.setattr("shl.eval.evaluate", lambda *a, **k: pytest.fail("measured for nothing"))
        (tmp_path / "base.json").write_text(json.dumps(evaluation()))
        code, _, err = shl("eval", "--model", tiny().ref.id, *BRIEF, "--baseline", "base.json", "-o", "e.json")
        assert code == 1 and "the two evaluations differ in" in err and not (tmp_path / "e.json").exists()


class Bomb:
    """What runs when it is unpickled: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def boom(tmp_path) -> Iterator[Path]:
    """Where a bomb would leave its mark; nothing may."""
    mark = tmp_path / "boom"
    yield mark
    assert not mark.exists(), "code from an artifact was run"


def copy(model: Path, to: Path) -> Path:
    return Path(shutil.copytree(model, to))


class TestNothingIsRun:
    """Pickles, code beside a model, and patterns that would take for ever."""

    def test_a_model_of_pickles(self, tiny_model, tmp_path, boom):
        folder = copy(tiny_model(), tmp_path / "m")
        (folder / "model.safetensors").unlink()
        with (folder / "pytorch_model.bin").open("wb") as handle:
            pickle.dump(Bomb(boom), handle)
        with pytest.raises(ShlError, match="cannot load") as error:
            load(str(folder))
        assert "safetensors" in error.value.hint

    def test_an_adapter_of_pickles(self, shl, tiny, tmp_path, boom):
        make_adapter(tmp_path / "a", model=tiny().ref.id)
        (tmp_path / "a" / WEIGHTS).unlink()
        for name in ("adapter_model.bin", "optimizer.pt"):
            (tmp_path / "a" / name).write_bytes(pickle.dumps(Bomb(boom)))
        code, _, err = shl("eval", "--adapter", "a", *BRIEF)
        assert code == 1 and "is a pickle, which can run code" in err
        assert shl("info", "a")[0] == 1

    @pytest.mark.parametrize("name", ["v.safetensors", "v.pt", "keep.jsonl", "results.tsv", "base.json", "v.gguf"])
    def test_a_pickle_under_any_name(self, shl, tmp_path, boom, name):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(boom)))
        assert shl("info", name)[0] == 1
        for argv in (["gen", "--vec", name], ["filter", name], ["results", name], ["train", name, "-o", "r0"],
                     ["export", name, "-o", "w.safetensors"], ["eval", "--baseline", name]):  # fmt: skip
            code, out, err = shl(*argv)
            assert code in (1, 2) and not out and "Traceback" not in err, err

    def test_code_beside_a_model(self, tiny_model, tmp_path, boom):
        folder = copy(tiny_model(), tmp_path / "m")
        (folder / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(boom)!r})\nclass Evil: pass\n")
        for name, key, value in (
            ("config.json", "AutoModelForCausalLM", "modeling_evil.Evil"),
            ("config.json", "AutoConfig", "modeling_evil.Evil"),
            ("tokenizer_config.json", "AutoTokenizer", ["modeling_evil.Evil", None]),
        ):
            content = json.loads((folder / name).read_text())
            changed = {**content, "auto_map": {key: value}, "model_type": "evil", "tokenizer_class": "Evil"}
            (folder / name).write_text(json.dumps(changed))
            with pytest.raises(ShlError, match="cannot load"):
                load(str(folder))
            (folder / name).write_text(json.dumps(content))
        (folder / "shl.json").write_text(json.dumps({"trust_remote_code": True, "train": {"trust_remote_code": True}}))
        assert load(str(folder)).ref.recommended["trust_remote_code"]  # carried, and never heeded

    @pytest.mark.parametrize(
        "template",
        [
            "{{ cycler.__init__.__globals__.os.mkdir(BOOM) }}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{% for x in range(10**9) %}{{ x }}{% endfor %}",
            "{{ messages.append(1) }}",
            "{{ unknown.attribute.of.nothing }}",
        ],
    )
    def test_a_template_is_in_a_sandbox(self, tiny_model, tmp_path, boom, template):
        folder = copy(tiny_model(), tmp_path / "m")
        (folder / "chat_template.jinja").write_text(template.replace("BOOM", repr(str(boom))))
        with pytest.raises(ShlError, match="chat template"):
            load(str(folder)).render([{"role": "user", "content": "hi"}])

    def test_no_module_can_run_what_it_reads(self):
        banned = {"eval", "exec", "compile", "__import__"}
        for path in ROOT.rglob("*.py"):
            if path.relative_to(ROOT).parts[0] == "toy":
                continue  # the trainer's own checkpoints
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
                    assert not names & {"pickle", "marshal", "shelve", "dill", "joblib", "yaml"}, path
                if isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    keywords = [ast.unparse(keyword) for keyword in node.keywords]
                    # what the processes of one run tell each other is in memory and no artifact
                    own = path.name == "ranks.py" and ast.unparse(node).startswith("torch.load(io.BytesIO(")
                    tensors_only = called == "torch.load" and (own or "weights_only=True" in keywords)
                    unsafe = banned | {"torch.load", "np.load", "numpy.load", "os.system"}
                    assert tensors_only or called not in unsafe, (path, called)
                    for said in keywords:
                        assert said not in ("shell=True", "trust_remote_code=True", "allow_pickle=True"), (path, said)


class TestFolders:
    """Links and names that lead out of a folder; shards that are missing or somewhere else."""

    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS, META, "log.jsonl"])
    @pytest.mark.parametrize("absolute", [True, False])
    def test_links_out_of_an_adapter(self, shl, tiny, tmp_path, name, absolute):
        make_adapter(tmp_path / "a", model=tiny().ref.id)
        (tmp_path / "a" / "log.jsonl").write_text('{"epoch": 0}\n')
        outside = tmp_path / f"secret-{name}"
        (tmp_path / "a" / name).rename(outside)
        (tmp_path / "a" / name).symlink_to(outside if absolute else Path("..", outside.name))
        code, out, err = shl("info", "a")
        assert code == 1 and "link to a file outside" in err and not out
        if name != "log.jsonl":  # nothing but info reads it
            code, _, err = shl("eval", "--adapter", "a", *BRIEF)
            assert code == 1 and "link to a file outside" in err

    def test_a_link_to_nowhere_and_to_a_device(self, shl, tiny, tmp_path):
        make_adapter(tmp_path / "a", model=tiny().ref.id)
        (tmp_path / "a" / WEIGHTS).unlink()
        (tmp_path / "a" / WEIGHTS).symlink_to("/dev/zero")
        assert shl("eval", "--adapter", "a", *BRIEF)[0] == 1
        (tmp_path / "a" / WEIGHTS).unlink()
        os.mkfifo(tmp_path / "a" / WEIGHTS)  # reading it would wait for ever
        assert shl("eval", "--adapter", "a", *BRIEF)[0] == 1

    @pytest.mark.parametrize("module", ["../../x", "/etc/x", "model.layers.99.mlp.up_proj", "model.embed_tokens"])
    def test_tensors_of_no_module(self, tiny, tmp_path, module):
        folder = tmp_path / "a"
        make_adapter(folder)
        (folder / META).unlink()
        both = {f"{PREFIX}{module}.lora_{side}.weight": tensor for side, tensor in
                (("A", torch.ones(2, 48)), ("B", torch.ones(48, 2)))}  # fmt: skip
        save_file(both, folder / WEIGHTS)
        with pytest.raises(Mismatch, match="does not have in that shape"):
            load(tiny().ref.id, [str(folder)])

    def test_a_shard_outside_the_folder(self, tiny_model, tmp_path):
        folder = copy(tiny_model(), tmp_path / "m")
        (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
        names = dict.fromkeys(load_file(tmp_path / "elsewhere.safetensors"), "../elsewhere.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        with pytest.raises(InputError, match="which is no file of this folder"):
            load(str(folder))

    def test_weights_that_are_missing_are_not_made_up(self, tiny_model, tmp_path):
        folder = copy(tiny_model(), tmp_path / "m")
        tensors = load_file(folder / "model.safetensors")
        tensors.pop("model.layers.1.self_attn.q_proj.weight")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ShlError, match=r"1 of its weights are missing.*layers\.1\.self_attn\.q_proj"):
            load(str(folder))

    @pytest.mark.parametrize("damage", [lambda d: d[:2000], lambda d: b"\xff" * 16 + d[16:], lambda d: b""])
    def test_damaged_weights(self, tiny_model, tmp_path, damage: Callable[[bytes], bytes]):
        folder = copy(tiny_model(), tmp_path / "m")
        path = folder / "model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(ShlError, match="cannot load") as error:
            load(str(folder))
        assert "\n" not in error.value.message and error.value.hint

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "llama", "hidden_size": "wide"}', "\0"])
    def test_a_damaged_configuration(self, tiny_model, tmp_path, content):
        folder = copy(tiny_model(), tmp_path / "m")
        (folder / "config.json").write_text(content)
        with pytest.raises(ShlError):
            load(str(folder))


class TestHarmless:
    """Text from a model or a stranger on a terminal, in a table, on a page, in a spreadsheet."""

    def harmless(self, *texts: str) -> None:
        for text in texts:
            assert not OBEYED.search(text), OBEYED.findall(text)

    def test_records_of_every_command(self, shl, tmp_path):
        said = [
            {"role": "assistant", "content": f"I would talk with them first. {ESCAPES}{MARKUP} And then I would help."}
        ]
        row = record(1, id=f"p{ESCAPES}/1/0", completion=said, finish=ESCAPES, model=f"toy{ESCAPES}", topic=ESCAPES)
        (tmp_path / "c.jsonl").write_bytes(lines(row, row | {"n_tokens": 1}))
        (tmp_path / "c.jsonl").write_text(
            json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8"
        )  # raw C1 and bidi
        absolute = ["--max-ppl", "50", "--max-tail-ppl", "80", "--min-tokens", "1"]
        for argv in (["filter", "c.jsonl", *absolute], ["filter", "c.jsonl", "--all", *absolute], ["info", "c.jsonl"],
                     ["info", "c.jsonl", "--json"], ["filter", "c.jsonl"], ["train", "c.jsonl", "-o", f"r{ESCAPES}"],
                     ["filter", "c.jsonl", "--where", "nope>1", *absolute]):  # fmt: skip
            code, out, err = shl(*argv)
            self.harmless(out, err)
            assert code in (0, 1) and "Traceback" not in err, err
        assert json.loads(shl("filter", "c.jsonl", *absolute)[1])["completion"] == said  # nothing is lost

    def test_a_vector_and_an_adapter(self, shl, tiny, tmp_path):
        personas = {"name": ESCAPES, "axis": None, "pos": ESCAPES + MARKUP, "neg": None}
        vector = make_vector(tmp_path / "v.safetensors", tiny, personas=personas, method=ESCAPES)
        make_adapter(tmp_path / "a", model=ESCAPES, config={ESCAPES: ESCAPES, "reg": MARKUP})
        for argv in (["info", vector], ["info", vector, "--json"], ["info", "a"], ["eval", "--adapter", "a", *BRIEF],
                     ["gen", "--vec", vector, *QUICK, "--model", "toy"]):  # fmt: skip
            _, out, err = shl(*argv)
            self.harmless(out, err)

    def test_tables_and_notes(self, shl, tmp_path):
        line = f"shl eval --system '``{MARKUP}{ESCAPES}\n| x'"
        row = {"arm": f"nll{ESCAPES}|{MARKUP}", "model": ESCAPES + MARKUP, "settings": {"x": "`" + MARKUP},
               "seed": ESCAPES, "auth_nats": -1.0, "argv": line, "suite": "x\n# y"}  # fmt: skip
        results.append_row(tmp_path / "results.tsv", row)
        code, out, err = shl("results")
        assert code == 0
        self.harmless(out, err)
        outside = re.sub(r"(?<!\\)(`+) ?.*? ?\1", "", out)  # what stands in code is text wherever it is rendered
        assert "<" not in outside and "![" not in outside.replace("!\\[", "") and out.count("\n# ") == 0
        header, _, cells = (line for line in outside.split("\n") if line.startswith("|"))
        assert len(re.findall(r"(?<!\\)\|", header)) == len(re.findall(r"(?<!\\)\|", cells))
        self.harmless(shl("info", "results.tsv")[1], shl("results", "--by", ESCAPES)[2])

    def test_a_picture_of_any_arm(self, shl, tmp_path):
        for arm in (f"$\\frac{{{ESCAPES}", MARKUP, "_hidden", "$x$"):
            row = {"arm": arm, "round": 0, "auth_nats": -1.0, "care_nats": -1.0, "p_ans_any": 0.9}
            results.append_row(tmp_path / "results.tsv", row)
        code, _, err = shl("plot", "results.tsv", "-o", "t.svg")
        assert code == 0, err
        page = (tmp_path / "t.svg").read_text(encoding="utf-8")
        assert "<script" not in page and "onerror=alert(2)>" not in page

    def test_formulas_in_the_ledger(self, shl, tmp_path):
        formulas = [
            "=cmd|' /C calc'!A0",
            "+1+1",
            "-2+3",
            "@SUM(1)",
            "\t=1",
            "\r=1",
            "\n=1",
            " =1",
            "\uff1d1",
            "'=1",
            "=\0",
        ]
        for i, formula in enumerate(formulas):
            results.append_row(tmp_path / "results.tsv", {"arm": formula, f"{formula}{i}": formula, "n": -1.5})
        for line in (tmp_path / "results.tsv").read_text(encoding="utf-8").splitlines():
            for cell in line.split("\t"):
                assert cell == "-1.5" or not re.match(r"\s*[=+\-@\uff1d\t\r\0]", cell), cell
        assert [row["arm"] for row in results.read_rows(tmp_path / "results.tsv")] == formulas
        self.harmless(shl("results")[1])

    def test_what_is_said_is_plain(self, capfd):
        console.set_level()
        console.note(ESCAPES)
        console.warn(ESCAPES)
        console.table(ESCAPES, [ESCAPES], [[ESCAPES]], ESCAPES)
        err = capfd.readouterr().err
        self.harmless(err)
        assert err.count("owned") == 6
        assert (
            console.plain("é 漢 👩‍👩‍👧 ﷺ\n", lines=True) == "é 漢 👩‍👩‍👧 ﷺ\n" and console.plain("\n\x1b") == "\\n\\x1b"
        )

    def test_arguments_that_are_no_text(self, shl, tiny, tmp_path):
        odd = "\udcff\ud800"
        argv = ["eval", "--model", tiny().ref.id, *BRIEF, "--append", "results.tsv"]
        code, _, err = shl(*argv, "-o", "e.json", "--label", f"note={odd}")
        assert code == 0 and "Traceback" not in err, err
        assert results.read_rows(tmp_path / "results.tsv")[0]["note"] == "\ufffd\ufffd"
        code, _, err = shl(*argv, "-o", "f.json", "--system", odd)
        assert code in (0, 1) and "Traceback" not in err, err
