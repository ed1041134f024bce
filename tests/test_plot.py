"""The trajectory plot: what is drawn where, from rows, ledgers and run folders."""

import json

import pytest

from shl import plot
from shl.core.errors import InputError, ShlError


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


def test_ledger_text_and_gaps_are_read_and_steered_rows_left_out() -> None:
    rows = [
        {name: str(value) for name, value in row("nll", 0, -2.0).items()} | {"broken": ""},
        row("nll", 1, -3.0) | {"auth_nats": None},
        row("steered", 0, -9.0),
        row("nll", 0, -9.0, kind="steered"),
    ]
    points, (path,) = plot._gather(rows)
    assert points == {}
    assert path.values["auth_nats"] == [-2.0, None] and "broken" not in path.values


def test_what_the_figure_shows() -> None:
    figure = plot._draw(*plot._gather(ROWS))
    plane, *panels = figure.axes
    lines = {tuple(line.get_xdata()) for line in plane.lines}
    assert {(-1.7, -2.8, -3.1), (-1.7, -3.4), (-1.7,), (-3.0,)} == lines  # paths start at base; the two points
    assert sorted(note.get_text() for note in plane.texts) == ["0", "0", "1"]
    assert [panel.get_title(loc="left") for panel in panels] == [plot._LABELS[n] for n in plot.PANELS if n != "broken"]
    assert list(panels[0].lines[0].get_ydata()) == pytest.approx([0.01, 0.01])
    assert list(panels[1].lines[0].get_ydata()) == [plot.FLOOR] * 2  # perfect, at the edge of the log axis
    assert list(panels[2].lines[1].get_ydata()) == [74.0]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"kl_rev", "nll", "base", "prompted"}


def test_round_labels_that_coincide_are_written_once() -> None:
    rows = [row("nll", turn, -3.0) | {"care_nats": -1.0} for turn in range(3)]
    plane = plot._draw(*plot._gather(rows)).axes[0]
    assert [note.get_text() for note in plane.texts] == ["0,1,2"]


def test_nothing_overlaps() -> None:
    figure = plot._draw(*plot._gather(ROWS))
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
    plot.trajectory(ROWS, out, force=True)


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
    rows = plot.rows_of(tmp_path)
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
