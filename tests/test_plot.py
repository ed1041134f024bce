"""The figures: what is drawn where, from rows, ledgers, run folders, records and logs."""

import json
import warnings
from pathlib import Path

import pytest

from shl import plot as figures
from shl.core.errors import InputError, ShlError
from shl.core.records import write_record
from shl.plot import dose, style, training
from shl.plot import path as plot
from test_report import build, put, put_lines


@pytest.fixture(autouse=True)
def no_warning():
    """Nothing that matplotlib complains about is drawn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def row(arm: str, turn: int | str, auth: float, **more: object) -> dict:
    metrics = {"auth_nats": auth, "care_nats": -1.0 - turn if isinstance(turn, int) else -1.4, "p_ans_any": 0.99}
    return {"arm": arm, "round": turn, **metrics, "json_is_valid": 1.0, "free_ppl_p90": 1.6, **more}


ROWS = [
    row("base", "", -1.7),
    row("prompted", "", -3.0),
    row("kl_rev", 0, -2.8),
    row("kl_rev", 1, -3.1),
    row("nll", 0, -3.4, free_ppl_p90=74.0),
]


def test_rounds_are_sorted_and_seeds_averaged() -> None:
    rows = [row("nll", 1, -4.0, seed=0), row("nll", 0, -2.0), row("nll", 1, -3.0, seed=1)]
    _, (path,) = plot._gather(rows)
    assert path.rounds == [0, 1]
    assert path.values["auth_nats"] == [-2.0, -3.5]


def test_ledger_text_and_gaps_are_read() -> None:
    rows = [
        {name: str(value) for name, value in row("nll", 0, -2.0).items()} | {"broken": ""},
        row("nll", 1, -3.0) | {"auth_nats": None},
    ]
    points, (path,) = plot._gather(rows)
    assert points == {}
    assert path.values["auth_nats"] == [-2.0, None] and "broken" not in path.values


@pytest.mark.parametrize(
    "steered",
    [
        row("nll", 0, -9.0, kind="steered"),  # of a run folder
        row("nll-steered", "0", -9.0, vector="sha256:v", coeff="0.5"),  # of its ledger
        row("nll", 0, -9.0, vector="sha256:v", coeff=0.5),  # of a ledger with labels of one's own
    ],
)
def test_steered_and_healed_are_distinguished(steered: dict) -> None:
    """A steered row never enters the path: it is a hollow mark, joined to what healing made of it."""
    points, paths = plot._gather([row("base", "", -1.7), row("nll", 0, -2.0), row("steered", "", -8.0), steered])
    assert [(path.arm, path.values["auth_nats"]) for path in paths] == [("nll", [-2.0])]
    assert paths[0].steered[0]["auth_nats"] == -9.0
    figure = plot._draw(points, paths)
    plane, panel = figure.axes[:2]
    drawn = {tuple(line.get_xdata()): (line.get_linestyle(), line.get_markerfacecolor()) for line in plane.lines}
    assert drawn[-1.7, -2.0][0] == "-" and drawn[-9.0, -2.0][0] == ":" and drawn[-9.0,][1] == "white"
    assert [line.get_markerfacecolor() for line in panel.lines][1] == "white"
    assert "steered, before healing" in {text.get_text() for text in figure.legends[0].get_texts()}


def test_what_the_figure_shows() -> None:
    figure = plot._draw(*plot._gather(ROWS))
    plane, *panels = figure.axes
    lines = {tuple(line.get_xdata()) for line in plane.lines}
    assert {(-1.7, -2.8, -3.1), (-1.7, -3.4), (-1.7,), (-3.0,)} == lines  # paths start at base; the two points
    assert sorted(note.get_text() for note in plane.texts) == ["0", "0", "1"]
    assert [panel.get_title(loc="left") for panel in panels] == [plot._LABELS[n] for n in plot.PANELS if n != "broken"]
    assert list(panels[0].lines[0].get_ydata()) == pytest.approx([0.01, 0.01])
    assert list(panels[1].lines[0].get_ydata()) == [style.FLOOR] * 2  # perfect, at the edge of the log axis
    assert list(panels[2].lines[1].get_ydata()) == [74.0]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"kl_rev", "nll", "base", "prompted"}


def test_no_two_of_fourteen_arms_look_alike() -> None:
    looks = {(look["color"], look["marker"], look["linestyle"]) for look in map(style.look, range(14))}
    assert len(looks) == 14


def test_round_labels_that_coincide_are_written_once() -> None:
    rows = [row("nll", turn, -3.0) | {"care_nats": -1.0} for turn in range(3)]
    plane = plot._draw(*plot._gather(rows)).axes[0]
    assert [note.get_text() for note in plane.texts] == ["0,1,2"]


def sheets(tmp_path: Path) -> dict:
    """A figure of each kind."""
    run = build(tmp_path / "run", rounds=3)
    found = [one for one in training._read(run)]
    curves, levels = dose._gather([run])
    return {
        "trajectory": plot._draw(*plot._gather(ROWS)),
        "training": style.sheet(training._panels(found, ["healed", "plain"]), ["healed", "plain"], "Training"),
        "dose": style.sheet(dose._panels(curves, levels), ["healed", "plain"], "D"),
    }


@pytest.mark.parametrize("kind", ["trajectory", "training", "dose"])
def test_nothing_overlaps(tmp_path, kind: str) -> None:
    figure = sheets(tmp_path)[kind]
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [figure.legends[0].get_window_extent()]
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_suffix_is_the_format(tmp_path, suffix: str, start: bytes) -> None:
    out = tmp_path / f"t.{suffix}"
    plot.trajectory(ROWS, out)
    assert out.read_bytes().startswith(start)
    with pytest.raises(ShlError):
        plot.trajectory(ROWS, out)
    before = out.read_bytes()
    plot.trajectory(ROWS, out, force=True)
    assert out.read_bytes() == before  # no time, no random id


@pytest.mark.parametrize("values", [[], [0.0], [-1.0, -1.0], [2.0, 3.0], [0.1]])
@pytest.mark.parametrize("log", [False, True])
def test_limits_are_apart_and_hold_what_is_drawn(values: list[float], log: bool) -> None:
    values = [abs(value) or 1.0 for value in values] if log else values
    panel = style.Panel("t", "x", [style.Line(0, list(enumerate(values)))], log=log)
    if values:
        low, high = panel.limits()
        assert low < min(values) and max(values) < high and (low > 0 or not log)
    assert panel.drawn() == bool(values)


def test_a_run_folder_is_read(tmp_path) -> None:
    def put(name: str, one: dict) -> None:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        metrics = {name: value for name, value in one.items() if name not in ("arm", "round")}
        file.write_text(json.dumps({"metrics": metrics, "model_digest": "d"}))

    put("base.json", row("", "", -1.7))
    put("prompted.json", row("", "", -3.0))
    for turn in (0, 1, 10):
        put(f"nll/r{turn}/eval.json", row("", 0, -2.0 - turn / 10))
        put(f"nll/r{turn}/steered.json", row("", 0, -9.0))
    rows = figures.rows_of(tmp_path)
    points, (path,) = plot._gather(rows)
    assert set(points) == {"base", "prompted"}
    assert path.arm == "nll" and path.rounds == [0, 1, 10]
    assert path.values["auth_nats"] == [-2.0, -2.1, -3.0]
    plot.trajectory(tmp_path, tmp_path / "trajectory.png")
    assert (tmp_path / "trajectory.png").stat().st_size > 10_000


def test_mistakes_are_told(tmp_path) -> None:
    with pytest.raises(ShlError, match=r"cannot draw to .*t\.gif"):
        plot.trajectory(ROWS, tmp_path / "t.gif")
    with pytest.raises(ShlError, match="nothing to plot"):
        plot.trajectory([], tmp_path / "t.png")
    with pytest.raises(InputError, match="no evaluations"):
        plot.trajectory(tmp_path, tmp_path / "t.png")
    with pytest.raises(ShlError, match="different models"):
        plot.trajectory([row("a", 0, -1.0, model_digest="x"), row("a", 1, -1.0, model_digest="y")], tmp_path / "t.png")
    assert not list(tmp_path.iterdir())


# --- the dose ---


def test_the_dose_curves_of_a_run_are_those_of_its_records(tmp_path) -> None:
    """A filtered round: what was kept of each coefficient, and how its text reads; a control is never kept."""
    run = build(tmp_path / "run", rounds=2)
    curves, levels = dose._gather([run])
    assert [(curve.arm, curve.round) for curve in curves] == [(a, r) for a in ("healed", "plain") for r in (0, 1)]
    assert curves[0].values["kept"] == {0.5: 1.0, 1.0: 0.0}
    assert curves[0].values["ppl_p50"] == {0.0: 1.2, 0.5: 1.3, 1.0: 90.0}
    assert levels["base"]["auth_nats"] == -2.0 and levels["prompted"]["auth_nats"] == -4.0
    put(run / "healed" / "r0" / "steered.json",
        {"metrics": {"auth_nats": -3.5, "enact_authority": 0.7}, "coeff": 0.8, "vector": "sha256:v"})  # fmt: skip
    curves, _ = dose._gather([run])
    assert curves[0].values["auth_nats"] == {0.8: -3.5} and curves[0].values["enact_authority"] == {0.8: 0.7}


def test_the_rounds_of_a_pipe_are_read_from_what_the_filter_wrote(tmp_path) -> None:
    """examples/loop.sh keeps keep.jsonl and rejects.jsonl: together they are the completions."""
    run = build(tmp_path / "run", arms=("healed",), rounds=1)
    whole, _ = dose._gather([run])
    folder = run / "healed" / "r0"
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = {json.loads(line)["id"] for line in (folder / "keep.jsonl").read_text(encoding="utf-8").splitlines()}
    put_lines(folder / "rejects.jsonl", [row for row in rows if row["id"] not in kept])
    (folder / "completions.jsonl").unlink()
    piped, _ = dose._gather([run])
    assert piped[0].values == whole[0].values


def test_a_ledger_gives_a_curve_of_each_arm_with_base_as_a_level() -> None:
    rows = [row("base", "", -1.7)]
    rows += [row("steered", "", -2.0 - c, vector="v", coeff=str(c), seed=s) for c in (0.5, 1.0) for s in (0, 1)]
    rows += [row("healed", 0, -2.5)]
    curves, levels = dose._gather(rows)
    assert [curve.arm for curve in curves] == ["steered"] and curves[0].values["auth_nats"] == {0.5: -2.5, 1.0: -3.0}
    panels = {panel.title: panel for panel in dose._panels(curves, levels)}
    assert panels["ln p(authority)"].levels == [(-1.7, "-")]
    assert panels["ln p(authority)"].ticks == [(0.5, "0.5"), (1.0, "1")]
    assert panels["1 - answer mass"].lines[0].spots == [(0.5, pytest.approx(0.01)), (1.0, pytest.approx(0.01))]


def test_records_carry_their_own_verdicts(tmp_path) -> None:
    record = {"prompt": [{"role": "user", "content": "?"}], "completion": [{"role": "assistant", "content": "x"}]}
    with open(tmp_path / "c.jsonl", "w", encoding="utf-8") as handle:
        for i, (coeff, keep) in enumerate([(0, False), (1, True), (1, False), (2, False)]):
            write_record(handle, {"id": str(i), "coeff": coeff, "keep": keep, "scores": {"ppl": 1.0 + coeff}, **record})
    (curve,), _ = dose._gather([tmp_path / "c.jsonl"])
    ppl = {0.0: 1.0, 1.0: 2.0, 2.0: 3.0}
    assert curve.arm == "c"
    assert curve.values == {"kept": {1.0: 0.5, 2.0: 0.0}, "ppl_p50": ppl, "ppl_p90": ppl}


# --- training ---


def test_training_curves_are_the_logs(tmp_path) -> None:
    run = build(tmp_path / "run", rounds=2)
    found = training._read(run)
    panel = training._panel("holdout_nll", found, ["healed", "plain"])
    healed = [line for line in panel.lines if line.arm == 0]
    assert [y for _, y in healed[0].spots] == pytest.approx([1.1, 0.55, 1.1 / 3])
    assert healed[1].spots[0][0] == 1.0 and healed[0].spots[-1][0] < 1.0  # a stretch for each round
    assert [name for _, name in panel.ticks] == ["r0", "r1"]
    assert not any(line.spots for line in training._panel("barrier_active", found, ["healed", "plain"]).lines[2:])
    (alone,) = training._read(run / "healed" / "r0" / "adapter")
    assert [x for x, _ in training._panel("nll", [alone], ["adapter"]).lines[0].spots] == [0, 1, 2]


@pytest.mark.parametrize("kind", list(figures.KINDS))
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_every_kind_draws_a_run(tmp_path, kind: str, suffix: str) -> None:
    run = build(tmp_path / "run", rounds=2)
    figures.KINDS[kind](run, tmp_path / f"f.{suffix}")
    assert (tmp_path / f"f.{suffix}").stat().st_size > 10_000


@pytest.mark.parametrize("kind", list(figures.KINDS))
def test_nothing_to_draw_is_told(tmp_path, kind: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShlError):
        figures.KINDS[kind](tmp_path / "empty", tmp_path / "f.png")
    with pytest.raises(ShlError):
        figures.KINDS[kind]([], tmp_path / "f.png")
    assert not (tmp_path / "f.png").exists()
