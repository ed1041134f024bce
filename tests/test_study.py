"""The study: a job whose rows are in the ledger is not run again, rows go over as they stand, figures and tables."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shl import results
from small import small_model

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))
LITTLE = "--coeff 0 0.4 0.6 --prompts 4 --words 2 --min-keep 1 --free 2"
import headline  # noqa: E402
import study  # noqa: E402


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The embedded model, which here recommends to do as little as possible of everything."""
    return small_model(tmp_path_factory.mktemp("model"))


def run(script: str, *options: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(EXAMPLES / script), *map(str, options)]
    return subprocess.run(line, cwd=cwd, text=True, capture_output=True)


def row(arm: str, seed: int, auth: float, broken: float, turn: int | None = None, **more: object) -> dict[str, object]:
    facts = {"study": "loops", "model": "toy", "arm": arm, "seed": str(seed), "round": turn, "p_ans_any": 0.999}
    return facts | {"auth_nats": auth, "broken": broken, "informedness": 0.2, "enact_authority": 0.5} | more


@pytest.fixture
def ledger(tmp_path):
    """Two seeds: healed stays whole, plain goes further and breaks in its second round."""
    path = tmp_path / "results.tsv"
    for seed in (100, 101):
        for one in (
            row("base", seed, -2.0, 0.1),
            row("prompted", seed, -3.0, 0.05),
            row("healed", seed, -2.4, 0.11, 0),
            row("healed", seed, -2.6, 0.12, 1),
            row("plain", seed, -2.5 - 0.1 * (seed - 100), 0.12, 0),
            row("plain", seed, -2.9, 0.6, 1),
        ):
            results.append_row(path, one)
    results.append_row(
        path, {"study": "loops", "model": "toy", "arm": "plain", "seed": "100", "round": 2, "verdict": "stopped: x"}
    )
    return path


@pytest.mark.parametrize("text", ["100", "-2.071", "1e-05", "1.0", "", "true", "sha256:1", "nan", "1_0", "07", "'=x"])
def test_a_cell_is_taken_over_as_it_stands(text):
    assert results.cell(study.number(results.uncell(text))) == text


def test_a_job_is_run_once_and_its_rows_are_taken_over(small, tmp_path):
    """The ledger decides: with the run folder gone nothing is run; what another arm needs is not asked twice."""
    options = (
        "loops",
        "--models",
        small,
        "--arms",
        "plain",
        "--seeds",
        3,
        "--rounds",
        1,
        "--split",
        "dev",
        "--jobs",
        1,
    )
    listed = run("study.py", *options, "--list", cwd=tmp_path).stdout.splitlines()
    assert [line.rpartition("--arms")[2].strip() for line in listed] == ["", "plain"]
    args = ("--ledger", "all.tsv", "--run", "run")
    results.append_row(tmp_path / "all.tsv", row("base", 3, -2.0, 0.1, model=str(small), study="loops-dev"))
    done = run("study.py", *options, *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = results.read_rows(tmp_path / "all.tsv")
    assert [one["arm"] for one in rows] == ["base", "prompted", "plain"]
    shutil.rmtree(tmp_path / "run")
    again = run("study.py", *options, *args, cwd=tmp_path)
    assert again.returncode == 0 and "0 of 2 jobs" in again.stderr
    assert results.read_rows(tmp_path / "all.tsv") == rows


def test_rows_are_committed_as_they_come(ledger, tmp_path, monkeypatch):
    """A commit for each job that has new rows, of the ledger alone."""
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.org")
    repo = tmp_path / "repo"
    repo.mkdir()
    subprocess.run(["git", "init", "-q", str(repo)], check=True)
    (repo / "other").write_text("x")
    args = argparse.Namespace(parts=[], ledger=str(repo / "results.tsv"), commit=True)
    job = study.Job("loops toy 100 plain", (), {})
    for _ in range(2):
        study.Study(args).take(job, ledger)
    said = subprocess.run(
        ["git", "-C", str(repo), "log", "--format=%s", "--stat"], text=True, capture_output=True
    ).stdout
    assert said.count("Rows: loops toy 100 plain") == 1 and "results.tsv" in said and "other" not in said
    assert results.read_rows(repo / "results.tsv") == results.read_rows(ledger)


def test_one_round_scripts_leave_their_rows_once(small, tmp_path):
    """Size, course, filter and price of the data, then robustness of what was trained; asked again, nothing is run."""
    given = f"--model {small} --split dev --seed 3 --free 2 --ledger all.tsv".split()
    parts = "--parts size course filter price --sizes 8 10 --epochs 1 --most 8 --doses 0.5 --strong 0.4 --mixed 0.4 0.6"
    parts += " --prompts 8 --out data"
    trained = "--arm healed=data/n10-e1-c0.5/adapter --conditions plain long --out robust"
    lines = [("data.py", *given, *parts.split()), ("robust.py", *given, *trained.split())]
    for line in lines:
        done = run(*line, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "| healed | enact_authority |" in done.stdout
    rows = results.read_rows(tmp_path / "all.tsv")
    arms = [(one["arm"], one["condition"]) for one in rows]
    sizes, courses = ["n8-e1-c0.5", "n10-e1-c0.5"], ["constant", "linear", "exp", "gate", "backtrack"]
    filtered = [f"{arm}-{which}" for which in ("all", "kept") for arm in ("steered", "nll", "kl_rev")]
    plain = [arm for arm, condition in arms if not condition]
    assert plain == ["base", "prompted", *sizes, *courses, *filtered, "priced"]
    shift = {one["arm"]: float(one["auth_nats"]) - float(rows[0]["auth_nats"]) for one in rows if not one["condition"]}
    retained = {one["arm"]: float(one["retain.auth_nats"]) for one in rows if one["arm"] in filtered[1:3]}
    assert retained == pytest.approx({arm: shift[arm] / shift["steered-all"] for arm in filtered[1:3]}, rel=1e-3)
    assert arms[-6:] == [(arm, condition) for arm in ("base", "prompted", "healed") for condition in ("plain", "long")]
    priced = next(one for one in rows if one["arm"] == "priced")
    assert float(priced["price_prompted"]) > 0 and float(priced["price_steered"]) > 0
    plain, long = (json.loads(one["settings"]) for one in rows[-2:])
    assert "before" not in plain and long.pop("before").startswith("sha256:") and long == plain
    for line in lines:
        assert run(*line, cwd=tmp_path).returncode == 0
    assert results.read_rows(tmp_path / "all.tsv") == rows


def test_reach_and_survival(ledger):
    found = headline.Shifts(results.read_rows(ledger), "loops", "toy", "auth_nats")
    assert found.reach("healed") == pytest.approx({"100": 0.6, "101": 0.6})
    assert found.reach("plain") == pytest.approx({"100": 0.5, "101": 0.6})  # its second round is beyond base + 2 points
    assert found.survived("healed") == {"100": 2, "101": 2} and found.survived("plain") == {"100": 1, "101": 1}
    lines = headline.table(found, ("plain",)).splitlines()
    assert lines[2].startswith("| healed | +0.60 ± 0.00 | 60% | +0.05 ± 0.64 | all 2, all 2 |")


def test_a_difference_to_a_one_round_control(ledger):
    found = headline.Shifts(results.read_rows(ledger), "loops", "toy", "auth_nats")
    assert headline.controls_of(results.read_rows(ledger), "controls", "toy", "auth_nats") is None
    for arm, auth, turn in (("base", -2.0, None), ("prompted", -3.0, None), ("distilled", -2.35, 0)):
        results.append_row(ledger, row(arm, 100, auth, 0.1, turn, study="controls"))
    controls = headline.controls_of(results.read_rows(ledger), "controls", "toy", "auth_nats")
    lines = headline.table(found, ("plain", "distilled", "nobody"), controls).splitlines()
    # the one seed that both have
    assert lines[2].startswith("| healed | +0.60 ± 0.00 | 60% | +0.05 ± 0.64 | +0.25 | - |")


def test_judgments_that_tell_too_little_do_not_count(ledger):
    results.append_row(ledger, row("loose", 100, -2.9, 0.1, 0, informedness=0.1))
    assert headline.Shifts(results.read_rows(ledger), "loops", "toy", "auth_nats").reach("loose") == {"100": 0.0}


def test_the_figure_is_drawn(ledger, tmp_path):
    results.append_row(ledger, row("base", 100, -2.0, 0.1, study="controls"))
    results.append_row(ledger, row("prompted", 100, -3.0, 0.1, study="controls"))
    for draw, dose in enumerate((0.25, 0.5)):
        results.append_row(ledger, row(f"raw@{dose}", 100, -2 - dose, dose, 0, study="controls"))
        results.append_row(ledger, row("random", 100, -2.0, 0.4, 0, study="controls", draw=str(draw)))
    done = run("headline.py", ledger, "-o", "h.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "h.png").read_bytes()[:4] == b"\x89PNG"
    assert "| healed | +0.60" in done.stdout
    # controls that were not read for a trait are none; a row of panels for each study, the trait by its name
    for axis in ("boldness", "humanity"):
        for arm, said in (("base", 0.3), ("prompted", 0.9), ("healed", 0.8)):
            turn = 0 if arm == "healed" else None
            more = {"study": f"loops-{axis}", f"enact_{axis}": said}
            results.append_row(ledger, row(arm, 100, -2.0, 0.1, turn, **more))
    studies = ("--study", "loops-boldness", "loops-humanity", "--trait", "enact_{axis}", "-o", "axes.png")
    done = run("headline.py", ledger, *studies, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "axes.png").exists() and done.stdout.count("| healed | +0.50 | 83% |") == 2
    assert "toy, enact_boldness\n" in done.stdout and "toy, enact_humanity\n" in done.stdout


def test_tables_are_written_between_their_marks(ledger, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table reach -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    options = ("--ledger", ledger, "--page", page)
    assert run("tables.py", *options, "--check", cwd=tmp_path).returncode == 1
    assert run("tables.py", *options, cwd=tmp_path).returncode == 0
    assert run("tables.py", *options, "--check", cwd=tmp_path).returncode == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- table reach -->\n| arm |") and text.endswith("<!-- end -->\nafter\n")
    page.write_text("<!-- table none -->\n<!-- end -->\n", encoding="utf-8")
    assert "there is no table none" in run("tables.py", *options, cwd=tmp_path).stderr


def test_the_page_shows_what_the_ledger_says():
    done = run("tables.py", "--check", cwd=ROOT)
    assert done.returncode == 0, done.stderr
