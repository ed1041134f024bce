"""The report in a real browser, opened from a file: what is seen, hovered, sorted, searched; and what is forbidden."""

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shl.report import gather, write_report
from test_report import FAILS, HOLDS, PROMPTS, answer, build, evaluation, expects, put, put_lines

WIDE = {"width": 1200, "height": 900}
NARROW = {"width": 380, "height": 800}
NAMES = ("chromium", "chromium-browser", "google-chrome")


def lacking() -> str:
    """Why there is no browser here; empty when there is one."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "the package playwright is not installed"
    return "" if any(map(shutil.which, NAMES)) else f"none of {', '.join(NAMES)} is installed"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, NAMES)))
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def show(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A function that opens the report of a run. Afterwards: no error was said, nothing was asked of any network, and
    nothing that a model said has run."""
    if why := lacking():
        pytest.skip(why)
    opened, wrong = [], []

    def open_report(run: Path, **options: Any) -> Any:
        out = tmp_path / "report.html"
        write_report(run, out, force=True)
        options.setdefault("viewport", WIDE)
        page = request.getfixturevalue("chromium").new_context(**options).new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("request", lambda asked: None if asked.url == out.as_uri() else wrong.append(f"asked for {asked.url}"))
        page.goto(out.as_uri())
        opened.append(page)
        return page

    yield open_report
    for page in opened:
        assert page.evaluate("window.hacked === undefined")
        page.context.close()
    assert wrong == []


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build(tmp_path / "run")


def shown(page: Any) -> int:
    """How many completions the page says it found."""
    return int(page.locator("#count").inner_text().split(" ")[0].replace(",", ""))


def control(page: Any, label: str) -> Any:
    """A control of the diary by its label."""
    return page.locator("form.controls").get_by_label(label, exact=True)


def test_the_page_answers_at_once(run: Path, show: Any) -> None:
    page = show(run)
    assert page.locator("h1").inner_text() == "healed moved and stayed coherent; plain moved but broke."
    assert "healed moved" in page.title()
    for name in ("trajectory", "coherence", "dose", "training"):
        assert page.locator(f"#{name} .picture svg .mark").count() >= 4, name
        assert page.locator(f"#{name} .picture svg .line").count() >= 2, name
    labels = page.locator("#trajectory figure").first.locator("text.label").all_text_contents()
    assert sorted(labels) == ["base", "healed", "plain", "prompted"]
    assert page.locator("#filter table").count() == 2 and page.locator("#provenance details details").count() > 20
    assert page.locator("#notes").count() == 0


def test_lines_are_drawn_where_the_numbers_are(run: Path, show: Any) -> None:
    """On the log axis 1 - coherence of 0.4 lies above 0.02, and their distance is that of their logarithms."""
    page = show(run)
    plot = page.locator("#coherence figure").nth(2)
    ticks = {t.text_content(): float(t.get_attribute("y")) for t in plot.locator("text.tick[text-anchor=end]").all()}
    ys = [float(re.search(r",([\d.]+)\)", m.get_attribute("transform"))[1]) for m in plot.locator(".mark").all()]
    decade = ticks["0.01"] - ticks["0.1"]
    healed, plain = ys[1], ys[3]  # the last mark of each arm
    assert healed - plain == pytest.approx(decade * 1.30103, abs=0.2)  # log10(0.4 / 0.02)


def test_hover_and_arrow_keys_show_details(run: Path, show: Any) -> None:
    page = show(run)
    tip = page.locator("#tip")
    assert tip.is_hidden()
    page.locator("#trajectory .mark").nth(1).hover()
    told = tip.inner_text()
    assert "healed, round 1" in told and "enacts authority 80%" in told and "95% interval" in told
    page.mouse.move(5, 5)
    assert tip.is_hidden()
    picture = page.locator("#dose .picture").first
    picture.focus()
    page.keyboard.press("ArrowRight")
    assert "coefficient 0.5" in tip.inner_text() and "kept 2 of 2 (100%)" in page.locator("#live").inner_text()
    page.keyboard.press("ArrowRight")
    assert "coefficient 1" in tip.inner_text() and "ppl_high 2" in tip.inner_text()
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_expectations_that_do_not_hold_are_told_first(run: Path, show: Any) -> None:
    assert show(run).locator("#should").count() == 0
    expects(run, HOLDS, FAILS)
    page = show(run)
    told = page.locator("#should").inner_text()
    assert "1 of 2 expectations hold" in told and "✕ healed r1 the barrier <b>fires</b>" in told
    assert "It is not so: lower --tau␛[31m" in told and "held-out nll falls" not in told  # folded
    page.locator("#should summary").click()
    assert "✓ healed r1 held-out nll falls" in page.locator("#should").inner_text()
    row = page.locator("#training tbody tr").filter(has_text="healed r1").inner_text()
    assert "0.3 / –" in row and page.locator("#training thead th").count() == len(row.split("\t"))


def test_what_models_say_is_text_and_its_controls_are_seen(run: Path, show: Any) -> None:
    page = show(run)
    page.locator("#by-search").fill("window.hacked")
    text = page.locator("#said .text").filter(has_text="steered 1").first.inner_text()
    assert "</script><script>window.hacked = 1</script><img src=x" in text and "&lt;" in text
    assert "␛[31mred␛[0m⟨U+202E⟩" in text
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2
    assert page.locator("#said mark").first.inner_text() == "window.hacked"


def test_names_from_the_run_are_text_too(tmp_path: Path, show: Any) -> None:
    """The name of an arm, a metric called constructor, a prompt, a verdict, a log line, and a score of one's own."""
    arm = "<b onclick=alert(1)>$x"
    run = build(tmp_path / "run", arms=(arm, "__proto__"), rounds=1)
    result = evaluation(0.5, -2.5, 0.0, verdict="broken: <i>\x1b[2J</i>")
    result["metrics"] |= {"constructor": 1.5, "<u>": 2.0}
    put(run / arm / "r0" / "eval.json", result)
    put_lines(run / arm / "r0" / "samples.jsonl", [answer(0, "x", 2.0) | {"scores": {"<s>": 1.0, "toString": 2.0}}])
    (run / arm / "r0" / "<em>.log").write_text("SHOULD: <script>window.hacked = 1</script>\n")
    page = show(run)
    assert "<b onclick=alert(1)>$x" in page.locator("h1").inner_text()
    assert page.locator("main b, main i, main u, main s, main em").count() == 0
    assert "<i>␛[2J</i>" in page.locator(".verdict").last.inner_text() + page.locator("#top").inner_text()
    control(page, "Arm").select_option(label=arm)
    assert shown(page) == 5


def test_odd_names_of_arms_and_rounds(tmp_path: Path, show: Any) -> None:
    """An arm may be called base, and a round may have any number: neither is confused nor counted up to."""
    run = build(tmp_path / "run", arms=("base",), rounds=2)
    (run / "base" / "r1").rename(run / "base" / "r999999999")
    page = show(run)
    page.locator("#trajectory .mark").nth(1).hover()
    assert "base, round 999999999" in page.locator("#tip").inner_text()
    assert page.locator("#trajectory figure").first.locator("text.tick").count() < 20
    control(page, "Round").select_option(label="r999999999")
    assert shown(page) == 7


def test_values_of_the_wrong_type_are_left_out(tmp_path: Path, show: Any) -> None:
    run = build(tmp_path / "run", arms=("healed",), rounds=1)
    odd: dict[str, Any] = {"": {"": []}}
    adapter = run / "healed" / "r0" / "adapter"
    put(adapter / "shl.json", dict.fromkeys(("config", "parents", "vectors", "argv", "created", "n_train"), odd))
    put_lines(
        adapter / "log.jsonl", [{"epoch": odd, "nll": odd}, {"epoch": 1, "nll": "1"}, {"step": [1], "should": odd}]
    )
    put(run / "base.json", evaluation(0.2, -2.0, 0.0, settings={"split": odd}, ci=odd, missing=odd, profile={}))
    record = answer(0, "odd", 1.0) | {"scores": {"ppl": None, "mine": odd}, "judge": {"stance": odd, "broken": odd}}
    put_lines(run / "base.samples.jsonl", [record, answer(1, "", 1.0) | {"judge": [odd]}])
    page = show(run)
    assert page.locator("section").count() == 8 and shown(page) == 3 + 3 + 2 + 2 + 4
    config = {"config": {"reg": odd, "lam": "much", "tau": odd, "rank": True}}
    put(adapter / "shl.json", config)
    assert "much" not in show(run).locator("#training").inner_text()


def test_completions_are_filtered(run: Path, show: Any) -> None:
    says = gather(run)["says"]
    page = show(run)
    assert shown(page) == len(says)
    control(page, "Judgement").select_option("broken")
    assert shown(page) == sum("broken" in row["tags"] for row in says) > 0
    for box in page.locator("#said .said:not(.context)").all():
        assert "broken" in box.locator(".chip").all_inner_texts()
    control(page, "Arm").select_option(label="healed")
    assert shown(page) == 0
    page.get_by_role("button", name="Clear").click()
    control(page, "Arm").select_option(label="healed")
    control(page, "Round").select_option(label="r1")
    control(page, "Stage").select_option(label="steered")
    assert shown(page) == 4
    control(page, "Search").fill("FAR GONE 1")
    assert shown(page) == 2 and page.locator("#said article").count() == 2
    control(page, "Search").fill(PROMPTS[0][:12])
    assert shown(page) == 2 and page.locator("#said article").count() == 1


def test_completions_are_sorted(run: Path, show: Any) -> None:
    page = show(run)
    control(page, "Show").select_option("list")
    for way, order in (("down", True), ("up", False)):
        control(page, "Sort by").select_option(f"score:ppl:{way}")
        values = [
            float(re.search(r"perplexity ([\d.]+)", text)[1])
            for text in page.locator("#said .measure").all_inner_texts()
        ]
        assert len(values) > 20 and values == sorted(values, reverse=order) and len(set(values)) > 2


def test_the_diary_puts_base_steered_and_healed_side_by_side(run: Path, show: Any) -> None:
    page = show(run)
    control(page, "Arm").select_option(label="healed")
    control(page, "Prompts").select_option("training")
    cells = page.locator("#said article").first.locator(".cell")
    boxes = [cell.bounding_box() for cell in cells.all()]
    stages = [[box.get_attribute("data-stage") for box in cell.locator(".said").all()] for cell in cells.all()]
    assert stages == [["base"], ["steered", "steered"], ["healed"], ["steered", "steered"], []]
    assert boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"] and boxes[0]["y"] == boxes[1]["y"] == boxes[2]["y"]
    assert boxes[3]["y"] > boxes[1]["y"] and boxes[3]["x"] == boxes[1]["x"]  # the next round is below
    assert page.locator("#said .said.context").count() == len(PROMPTS)  # base stays in view beside what was asked for


def test_long_diaries_come_in_parts(run: Path, show: Any) -> None:
    put_lines(run / "base.samples.jsonl", [answer(n, f"base says {n}", 1.2) for n in range(30)])
    page = show(run)
    before = page.locator("#said article").count()
    page.get_by_role("button", name=re.compile("Show 8 more")).click()
    assert page.locator("#said article").count() == before + 8
    page.get_by_role("button", name="Show all").click()
    assert page.locator("#said article").count() == 30 + len(PROMPTS) and page.locator("#more").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(run: Path, show: Any, scheme: str) -> None:
    long = "x" * 500
    put_lines(run / "base.samples.jsonl", [answer(0, f"{long} says {long}", 1.2)])
    put(run / "prompted.json", evaluation(0.9, -4.0, 0.5, verdict=f"broken: {long}"))
    page = show(run, viewport=NARROW, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    for box in page.locator("#said .cell").all():
        assert box.bounding_box()["x"] + box.bounding_box()["width"] <= NARROW["width"]


def test_dark_and_light_follow_the_reader_and_paper_is_white(run: Path, show: Any) -> None:
    page = show(run, color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"

    def brightness() -> float:
        return sum(map(float, re.findall(r"[\d.]+", page.evaluate(ground))[:3])) / 3

    assert brightness() > 230
    page.emulate_media(color_scheme="dark")
    assert brightness() < 60
    page.emulate_media(color_scheme="dark", media="print")
    page.set_viewport_size({"width": 720, "height": 1000})
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.scrollWidth") <= 720
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert brightness() == 255 and page.locator(".controls").is_hidden() and page.locator("#contents").is_hidden()
    folded = page.locator("details.print:not([open])")
    assert folded.count() > 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert folded.count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert folded.count() > 0


def test_keyboard_and_labels(run: Path, show: Any) -> None:
    page = show(run)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    unnamed = """[...document.querySelectorAll('input, select, .picture, .scroll, nav, form')].filter((one) =>
        !(one.getAttribute('aria-label') || one.labels?.[0]?.textContent)).length"""
    assert page.evaluate(unnamed) == 0
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for picture in page.locator(".picture").all():
        assert picture.get_attribute("tabindex") == "0"
    assert (
        page.evaluate("new Set([...document.querySelectorAll('[id]')].map((e) => e.id)).size")
        == page.locator("[id]").count()
    )


def test_numbers_stand_beside_every_plot(run: Path, show: Any) -> None:
    page = show(run)
    page.locator("figure summary").first.click()
    assert "healed, round 1: enacts authority 80%" in page.locator("figure details[open] ul").inner_text()
    counts = page.evaluate("""[...document.querySelectorAll('figure')].map((one) =>
        [one.querySelectorAll('li').length, one.querySelectorAll('.mark').length])""")
    assert len(counts) > 10 and all(told >= drawn > 0 for told, drawn in counts)


def test_the_policy_forbids_what_slips_in(run: Path, show: Any) -> None:
    page = show(run)
    other = page.context.new_page()  # one whose complaints are wanted
    said: list[str] = []
    asked: list[str] = []
    other.on("console", lambda message: said.append(message.text))
    other.on("requestfinished", lambda one: asked.append(one.url))
    other.goto(page.url)
    for line in ("document.body.innerHTML = '<b>x</b>'", "document.body.setAttribute('onclick', 'window.hacked = 1')",
                 "document.createElement('script').textContent = 'window.hacked = 1'"):  # fmt: skip
        assert other.evaluate(f"(() => {{ try {{ {line}; }} catch {{ return 'refused'; }} }})()") == "refused", line
    other.evaluate("""() => {
        for (const tag of ['img', 'iframe']) {
            document.body.append(Object.assign(document.createElement(tag), { src: 'http://127.0.0.1:9/x' }));
        }
        const sheet = document.createElement('link');
        Object.assign(sheet, { rel: 'stylesheet', href: 'http://127.0.0.1:9/x.css' });
        document.head.append(sheet);
        return fetch('http://127.0.0.1:9/').catch(() => null);
    }""")
    assert other.evaluate("window.hacked === undefined")
    assert asked == [page.url]
    assert len([line for line in said if "Content Security Policy" in line]) >= 4


@pytest.mark.parametrize(
    "left",
    ["base.json", "healed/r0/completions.jsonl", "healed/r1/adapter", "healed/r0/eval.json", "healed/r1/samples.jsonl"],
)
def test_a_run_of_one_part_is_drawn(tmp_path: Path, show: Any, left: str) -> None:
    whole = build(tmp_path / "whole", arms=("healed",))
    target = tmp_path / "run" / left
    target.parent.mkdir(parents=True)
    (shutil.copytree if (whole / left).is_dir() else shutil.copy)(whole / left, target)
    page = show(tmp_path / "run")
    assert "missing" in page.locator("#notes summary").inner_text()
    page.locator("#notes summary").click()
    assert page.locator("section").count() == 8 and page.locator("h1").inner_text()
