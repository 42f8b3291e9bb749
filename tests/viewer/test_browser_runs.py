"""Judging, and runs that go on, in a real headless Chromium."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import expect

from align.viewer.decisions import read_decisions
from align.viewer.queues import queue_order
from align.viewer.sources import open_table
from align.viewer.table import PairTable
from tests.viewer.helpers import frame, write
from tests.viewer.live import Tab, idle, needs_browser, open_first, served, settled

pytestmark = needs_browser
TABLE = frame(200, seed=5)
REPORT = (
    "<!doctype html><title>r</title><p id=said>a report</p><script>document.getElementById('said').textContent += "
    "' with a script'; try { parent.document.title = 'pwned' } catch (error) {}</script>"
)


@pytest.mark.slow
def test_the_random_queue_is_judged_in_its_order(tab: Tab, tmp_path: Path) -> None:
    """Keys that come faster than the pairs never judge a pair that was not shown; the page says what they come to."""
    file = write(TABLE, tmp_path / "t.parquet")
    (tmp_path / "s").mkdir()
    order = queue_order(PairTable(open_table(str(file), {}, "train", tmp_path / "s"), tmp_path / "s"), "random")
    with served(file, scratch=tmp_path / "s") as address:
        page = tab.open(address)
        page.get_by_role("link", name="Judge").click()
        page.get_by_role("button", name="Random pairs").click()
        expect(page.locator("#pair h2")).to_have_text(f"p{order[0]}")
        for turn in range(40):
            page.keyboard.press("2" if turn % 4 == 0 else "1")
        settled(page)
        made = list(read_decisions([tmp_path / "decisions.jsonl"]).decisions.values())
        assert 1 <= len(made) <= 40
        assert [one["pair"] for one in made] == [f"p{row}" for row in order[: len(made)]]
        expect(page.locator("#pair h2")).to_have_text(f"p{order[len(made)]}")
        page.get_by_role("link", name="Judge").click()
        expect(page.locator("#judge")).to_contain_text(f"{len(made)} pair")
        flips = sum(one["action"] == "flip" for one in made)
        share = f"{100 * flips / len(made):.1f}".removesuffix(".0")
        expect(page.locator("#judge tbody tr").first.locator("td").first).to_contain_text(f"{share}%")
        page.get_by_role("button", name="Go on").click()
        expect(page.locator("#pair h2")).to_have_text(f"p{order[len(made)]}")


@pytest.mark.slow
def test_a_training_is_followed_without_a_reload(tab: Tab, tmp_path: Path) -> None:
    training = tmp_path / "demo" / "train-dpo.partial"
    training.mkdir(parents=True)
    live = training / "live.jsonl"
    rows = [{"loss": 0.7 - 0.01 * k, "step": 10 * k, "of": 100, "at": 1000.0 + k} for k in range(1, 6)]
    live.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    with served(write(TABLE, tmp_path / "t.parquet"), scratch=tmp_path / "s", runs=(tmp_path / "demo",)) as address:
        page = tab.open(address)
        page.get_by_role("link", name="Runs (1)").click()
        expect(page.locator("#runs .card")).to_contain_text("step 20 of 100")
        expect(page.locator(".curve[data-title=Loss] .legend")).to_contain_text("0.68")
        live.write_text("".join(json.dumps(row) + "\n" for row in rows))
        expect(page.locator("#runs .card")).to_contain_text("step 50 of 100, about 5 s left", timeout=10_000)
        expect(page.locator(".curve[data-title=Loss] .legend")).to_contain_text("0.65")
        training.rename(training.with_name("train-dpo"))
        (training.with_name("train-dpo") / "manifest.json").write_text('{"seconds": 5}')
        (tmp_path / "demo" / "report.html").write_text(REPORT)
        page.get_by_role("button", name="Report").click(timeout=10_000)
        report = page.frame_locator("iframe")
        expect(report.locator("#said")).to_have_text("a report with a script")
        assert page.title() == "align view"


@pytest.mark.slow
def test_what_was_typed_survives_a_refusal(tab: Tab, tmp_path: Path) -> None:
    """A note about a pair on which another tab has decided meanwhile comes back when the note is opened again."""
    with served(write(TABLE, tmp_path / "t.parquet"), scratch=tmp_path / "s") as address:
        page, other = tab.open(address), tab.context.new_page()
        tab.watch(other)
        page.route("**/api/events*", lambda route: route.abort())
        page.reload()
        idle(page)
        open_first(page)
        page.keyboard.press("n")
        page.keyboard.type("long thoughts 12 u")
        tab.open(address, other)
        open_first(other)
        other.keyboard.press("4")
        settled(other)
        page.keyboard.press("Control+Enter")
        expect(page.locator(".problem[data-code=decision-stale]")).to_contain_text("note of pair p0 is not saved")
        expect(page.locator(".act.drop")).to_have_attribute("aria-pressed", "true")
        page.locator("#pair h2").click()
        page.keyboard.press("n")
        expect(page.locator(".editor textarea")).to_have_value("long thoughts 12 u")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#pair .note")).to_have_text("long thoughts 12 u")


@pytest.mark.slow
def test_texts_of_every_kind_are_rendered(tab: Tab, tmp_path: Path) -> None:
    """Turns, tool calls, code, Arabic; whole words are marked in every script; an edit of messages stays messages."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": '{"a": 1}'}}]}
    prompt = [{"role": "user", "content": "run `ls`\n\n```python\nprint(1)\n```"}, call]
    prompt.append({"role": "tool", "content": '{"found": 2}'})
    table = TABLE[:20].astype(object)
    table["prompt"] = [json.dumps(prompt)] * 20
    table["chosen"] = [json.dumps([{"role": "assistant", "content": "تعطّل القطار ولم أستطع الاتصال"}])] * 20
    table["rejected"] = [json.dumps([{"role": "assistant", "content": "تعطّلت السيارة ولم أستطع الاتصال"}])] * 20
    with served(write(table.infer_objects(), tmp_path / "t.parquet"), scratch=tmp_path / "s") as address:
        page = tab.open(address)
        open_first(page)
        assert page.locator(".prompt .turn h4").all_inner_texts() == ["user", "assistant", "tool"]
        expect(page.locator(".prompt pre[data-language=python]")).to_have_text("print(1)")
        expect(page.locator(".prompt .tool")).to_contain_text('"a": 1')
        expect(page.locator(".prompt .turn[data-role=tool] pre")).to_contain_text('"found": 2')
        assert page.locator(".response.chosen ins").all_inner_texts() == ["تعطّل", "القطار"]
        direction = "getComputedStyle(document.querySelector('.response.chosen p')).direction"
        assert page.evaluate(direction) == "rtl"
        page.keyboard.press("e")
        page.get_by_label("chosen, assistant").fill("other")
        page.keyboard.press("Control+Enter")
        settled(page)
        expect(page.locator(".response.chosen .turn").first).to_contain_text("other")
        after = next(iter(read_decisions([tmp_path / "decisions.jsonl"]).decisions.values()))["after"]
        assert after["edits"] == {"chosen": [{"role": "assistant", "content": "other"}]}


def test_a_full_disk_is_said_and_nothing_is_lost(tab: Tab, tmp_path: Path) -> None:
    body = json.dumps({"error": {"code": "disk-full", "message": "the disk is full; NOT saved", "hint": "free some"}})
    with served(write(TABLE, tmp_path / "t.parquet"), scratch=tmp_path / "s") as address:
        page = tab.open(address)
        open_first(page)
        page.route("**/api/decide*", lambda route: route.fulfill(status=507, body=body))
        page.keyboard.press("2")
        expect(page.locator(".problem[data-code=disk-full]")).to_contain_text("NOT saved")
        expect(page.locator("#saved")).to_have_text("1 not saved yet")
        page.unroute("**/api/decide*")
        page.get_by_role("button", name="Try again").click()
        settled(page)
        expect(page.locator(".problem")).to_have_count(0)
        made = list(read_decisions([tmp_path / "decisions.jsonl"]).decisions.values())
        assert [(one["pair"], one["action"]) for one in made] == [("p0", "flip")]
