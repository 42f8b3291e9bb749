"""The page of the viewer in a real headless Chromium: what it shows is what numpy counts, and no decision is lost."""

from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd
import pytest
from playwright.sync_api import Browser, expect

from align.commands.apply_decisions import apply_decisions
from align.config import PairsSection
from align.viewer.decisions import read_decisions
from tests.viewer.helpers import frame, write
from tests.viewer.live import Tab, brush, idle, needs_browser, open_first, saved, served, settled, shown_ids

pytestmark = needs_browser
TABLE = frame(600, seed=3)
HOSTILE = (
    "</p></pre><script>document.title='pwned'</script><img src='http://127.0.0.1:9/x' "
    "onerror=\"document.title='pwned'\">\"><svg onload=\"document.title='pwned'\"><iframe src='http://127.0.0.1:9/y'></iframe>"
)
EVENTS = "/api/events"


def test_a_brush_filters_to_the_rows_that_numpy_counts(tab: Tab, tmp_path: Path) -> None:
    with served(write(TABLE, tmp_path / "t.parquet"), scratch=tmp_path / "s") as address:
        page = tab.open(address)
        low, high = brush(page, "quality", 0.1, 0.3)
        inside = TABLE[(TABLE["quality"] >= low) & (TABLE["quality"] <= high)]
        assert 0 < len(inside) < len(TABLE)
        expect(page.locator("#count b")).to_have_text(str(len(inside)))
        assert shown_ids(page) == list(inside["id"])[: len(shown_ids(page))]
        more = brush(page, "margin", 0.4, 0.6)
        both = inside[(inside["margin"] >= more[0]) & (inside["margin"] <= more[1])]
        expect(page.locator("#count b")).to_have_text(str(len(both)))

        page.locator('.histogram[data-column="margin"] input').first.fill("1")  # the same by the keyboard
        page.keyboard.press("Tab")
        fewer = inside[(inside["margin"] >= 1) & (inside["margin"] <= more[1])]
        expect(page.locator("#count b")).to_have_text(str(len(fewer)))

        page.locator("#toolbar").get_by_label("Order by").select_option("quality")
        idle(page)
        expect(page.locator("regular-table th[aria-sort=ascending]")).to_be_visible()
        assert shown_ids(page) == list(fewer.sort_values("quality")["id"])[: len(shown_ids(page))]
        page.reload()
        expect(page.locator("#count b")).to_have_text(str(len(fewer)))
        assert "#/" in page.url and "token" not in page.url
        page.go_back()
        page.get_by_role("button", name="clear all").click()
        expect(page.locator("#count b")).to_have_text("600")


def test_search_in_exact_and_any_case_and_names(tab: Tab, tmp_path: Path) -> None:
    texts = TABLE["prompt"] + "\n" + TABLE["chosen"] + "\n" + TABLE["rejected"]
    with served(write(TABLE, tmp_path / "t.parquet"), scratch=tmp_path / "s") as address:
        page = tab.open(address)
        page.keyboard.press("/")
        page.keyboard.type("gamma beta")
        page.keyboard.press("Enter")
        expect(page.locator("#count b")).to_have_text(str(int(texts.str.contains("gamma beta").sum())))
        page.get_by_label("any case").check()
        expected = texts.str.lower().str.contains("gamma beta")
        assert expected.sum() > 0
        expect(page.locator("#count b")).to_have_text(str(int(expected.sum())))
        page.get_by_role("button", name="Filter", exact=False).first.click()
        page.locator(".menu fieldset", has_text="group").get_by_label("a", exact=False).first.check()
        expect(page.locator("#count b")).to_have_text(str(int((expected & (TABLE["group"] == "a")).sum())))
        assert page.locator("#toolbar .chip").count() == 2


def test_deciding_undoing_and_reloading(tab: Tab, tmp_path: Path) -> None:
    """By the keyboard alone: flip, note, edit, undo; a reload keeps the pair and what was decided."""
    with served(write(TABLE, tmp_path / "t.parquet"), scratch=tmp_path / "s") as address:
        page = tab.open(address)
        page.locator("regular-table").focus()
        for key in ("ArrowDown", "ArrowDown", "Enter"):
            page.keyboard.press(key)
        expect(page.locator("#pair h2")).to_have_text("p2")
        page.keyboard.press("2")
        expect(page.locator(".act.flip")).to_have_attribute("aria-pressed", "true")
        expect(page.locator(".response.chosen h3")).to_contain_text("rejected by you")
        page.keyboard.press("n")
        page.keyboard.type("odd שלום")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#pair .note")).to_have_text("odd שלום")
        page.keyboard.press("e")
        page.locator(".editor textarea[aria-label=chosen]").fill("better words\n")
        page.keyboard.press("Control+Enter")
        expect(page.locator(".response.chosen h3")).to_contain_text("edited")
        settled(page)
        state = {"label": "flip", "note": "odd שלום", "edits": {"chosen": "better words\n"}}
        assert saved(tmp_path) == {"p2": state}
        page.keyboard.press("u")
        settled(page)
        expect(page.locator(".response.chosen h3")).not_to_contain_text("edited")
        page.reload()
        expect(page.locator("#pair h2")).to_have_text("p2")
        expect(page.locator(".act.flip")).to_have_attribute("aria-pressed", "true")
        expect(page.locator("#row-2 td").first).to_contain_text("flip")
        page.keyboard.press("j")
        expect(page.locator("#pair h2")).to_have_text("p3")
        assert saved(tmp_path) == {"p2": {**state, "edits": {}}}
    apply_decisions(PairsSection(path=str(tmp_path / "t.parquet")), [tmp_path / "decisions.jsonl"], tmp_path / "out")
    row = pd.read_parquet(tmp_path / "out" / "pairs.parquet").set_index("id").loc["p2"]
    assert (row["chosen"], row["rejected"]) == (TABLE.loc[2, "rejected"], TABLE.loc[2, "chosen"])


def test_a_selection_is_decided_at_once(tab: Tab, tmp_path: Path) -> None:
    with served(write(TABLE, tmp_path / "t.parquet"), scratch=tmp_path / "s") as address:
        page = tab.open(address)
        page.locator("regular-table").focus()
        page.keyboard.press("Space")
        for _ in range(3):
            page.keyboard.press("Shift+ArrowDown")
        expect(page.locator("#selection b")).to_have_text("4 pairs selected")
        page.keyboard.press("4")
        expect(page.locator("#row-3 td").first).to_contain_text("drop")
        settled(page)
        assert {key: one["label"] for key, one in saved(tmp_path).items()} == dict.fromkeys(
            ["p0", "p1", "p2", "p3"], "drop"
        )
        page.keyboard.press("u")
        settled(page)
        expect(page.locator("#row-3 td").first).not_to_contain_text("drop")
        assert {one["label"] for one in saved(tmp_path).values()} == {None}


def test_two_tabs_see_each_other_and_say_a_conflict(tab: Tab, tmp_path: Path) -> None:
    """What one tab decides shows in the other; who decides about what has changed meanwhile is told."""
    with served(write(TABLE, tmp_path / "t.parquet"), scratch=tmp_path / "s") as address:
        first, second = tab.open(address), tab.context.new_page()
        tab.watch(second)
        tab.open(address, second)
        open_first(first)
        open_first(second)
        first.keyboard.press("2")
        expect(second.locator(".act.flip")).to_have_attribute("aria-pressed", "true")
        second.route(f"**{EVENTS}*", lambda route: route.abort())
        second.reload()  # deaf from here on
        expect(second.locator(".act.flip")).to_have_attribute("aria-pressed", "true")
        first.keyboard.press("4")
        expect(first.locator(".act.drop")).to_have_attribute("aria-pressed", "true")
        second.keyboard.press("1")
        expect(second.locator(".problem[data-code=decision-stale]")).to_contain_text("keep of pair p0 is not saved")
        expect(second.locator(".act.drop")).to_have_attribute("aria-pressed", "true")
        assert saved(tmp_path)["p0"]["label"] == "drop"
        second.keyboard.press("1")  # now that both have seen it
        settled(second)
        expect(second.locator(".act.keep")).to_have_attribute("aria-pressed", "true")
        assert saved(tmp_path)["p0"]["label"] == "keep"


def test_decisions_outlive_the_server_and_a_reload(tab: Tab, tmp_path: Path) -> None:
    """Decided while the server is away, one after another; saved once, in order, when it is back."""
    file = write(TABLE, tmp_path / "t.parquet")
    with served(file, scratch=tmp_path / "s") as address:
        page = tab.open(address)
        open_first(page)
        page.keyboard.press("1")
        expect(page.locator("#row-0 td").first).to_contain_text("✓ keep")
    port = urlsplit(address).port
    assert port is not None
    page.keyboard.press("2")
    page.keyboard.press("3")
    expect(page.locator("#saved")).to_have_text("2 not saved yet")
    expect(page.locator(".problem[data-code=connection]").first).to_contain_text(f"--port {port}")
    expect(page.locator("#pair .status")).to_contain_text("tie: not saved yet")
    with served(file, scratch=tmp_path / "s2", port=port):
        expect(page.locator("#saved")).to_have_text("")
        expect(page.locator(".act.tie")).to_have_attribute("aria-pressed", "true")
        ledger = read_decisions([tmp_path / "decisions.jsonl"])
        assert [one["action"] for one in ledger.decisions.values()] == ["keep", "flip", "tie"]
        expect(page.locator(".problem")).to_have_count(0)
    page.keyboard.press("4")
    expect(page.locator("#saved")).to_have_text("1 not saved yet")
    write(TABLE[1:], file)
    with served(file, scratch=tmp_path / "s3", port=port):  # the same row is another pair now
        expect(page.locator(".problem[data-code=other-pair]")).to_contain_text("drop of pair p0 is not saved")
        settled(page)
        assert list(saved(tmp_path)) == ["p0"] and saved(tmp_path)["p0"]["label"] == "tie"


def test_hostile_texts_are_texts(tab: Tab, tmp_path: Path) -> None:
    """Nothing runs, nothing is asked for elsewhere (the fixture checks), and the text is there to read."""
    table = frame(30)
    table.loc[0, ["prompt", "chosen", "rejected", "group"]] = [
        HOSTILE,
        f"{HOSTILE} one",
        f"{HOSTILE} two",
        HOSTILE[:150],
    ]
    table["list"] = [[HOSTILE]] * len(table)
    table = table.rename(columns={"quality": "<img src=x onerror=alert(1)>"})
    with served(write(table, tmp_path / "t.parquet"), scratch=tmp_path / "s") as address:
        page = tab.open(address)
        open_first(page)
        expect(page.locator(".response.chosen")).to_contain_text("<svg onload=")
        expect(page.locator(".response.chosen ins")).to_have_text("one")
        page.locator("summary", has_text="Other columns").click()
        page.get_by_role("button", name="Filter", exact=False).first.click()
        page.keyboard.press("Escape")
        page.keyboard.press("n")
        page.keyboard.type(HOSTILE)
        page.keyboard.press("Control+Enter")
        expect(page.locator("#pair .note")).to_contain_text("<script>")
        page.get_by_role("link", name="Judge").click()
        expect(page.locator("#judge h2").first).to_be_visible()
        assert page.title() == "align view"
        assert page.locator("main script, main img, main svg, main iframe, #problems img").count() == 0
        assert {urlsplit(one).netloc for one in tab.asked if one.startswith("http")} == {urlsplit(address).netloc}


@pytest.mark.slow
def test_a_changed_table_and_a_stale_token_are_said(tab: Tab, tmp_path: Path) -> None:
    file = write(TABLE, tmp_path / "t.parquet")
    with served(file, scratch=tmp_path / "s") as address:
        page = tab.open(address)
        write(TABLE.iloc[:50], file)
        expect(page.locator(".problem[data-code=table-changed]")).to_be_visible()
        page.get_by_role("button", name="Reload the table").click()
        expect(page.locator("#count")).to_have_text("50 of 50 pairs")
        expect(page.locator(".problem")).to_have_count(0)
        page.evaluate("sessionStorage.setItem('token', 'x'.repeat(20))")
        page.reload()
        problem = page.locator(".problem[data-code=view-token]").first
        expect(problem).to_contain_text("paste it here")
        problem.get_by_role("textbox").fill(address)
        problem.get_by_role("button", name="Go on").click()
        expect(page.locator("#count")).to_have_text("50 of 50 pairs")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(360, False), (1280, True), (1920, False)])
def test_no_sideways_scroll_and_a_name_for_every_control(
    browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 740}, color_scheme="dark" if dark else "light")
    tab = Tab(context)
    with served(write(TABLE, tmp_path / "t.parquet"), scratch=tmp_path / "s") as address:
        page = tab.open(address)
        rows = page.locator("regular-table tbody tr").count()
        assert rows >= 12
        open_first(page)
        for _ in range(2):
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("document.getElementById('pair').scrollWidth") <= width
            unnamed = page.evaluate(
                "[...document.querySelectorAll('button, input, select, textarea, a')].filter((one) => "
                "one.checkVisibility() && !one.textContent.trim() && !one.ariaLabel && !one.closest('label')).length"
            )
            assert unnamed == 0
            page.keyboard.press("e")
        context.close()
    assert tab.errors == []


def test_the_page_is_small() -> None:
    from align.viewer.server import FILES

    assert sum(file.stat().st_size for name, file in FILES.items() if not name.endswith(".txt")) < 500_000
    for name, file in FILES.items():
        text = file.read_text(encoding="utf-8")
        if not name.startswith("vendor/") and name.endswith(".js"):
            assert "innerHTML" not in text and "http://" not in text.replace("http://127.0.0.1:PORT", ""), name
            assert len(text.splitlines()) <= 400, name
