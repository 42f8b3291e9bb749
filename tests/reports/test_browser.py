"""A report full of hostile texts in a real browser: no script runs, no request leaves."""

import html
import http.server
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.reports.comparison_page import render_comparison_page
from align.reports.run_page import render_run_page
from tests.reports.test_comparison_page import report as comparison
from tests.reports.test_report import report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """(address, paths requested so far) of a local web server."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Note the path."""
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}", asked
        listening.shutdown()


def attack(address: str) -> str:
    """Text that runs a script and requests files if it is parsed as HTML."""
    mark = "document.documentElement.id='pwned'"
    return (
        f"</p></pre></title><script>{mark};fetch('{address}/fetch')</script><script src='{address}/script'></script>"
        f"<img src='{address}/image' onerror=\"{mark}\"><iframe src='{address}/frame'></iframe><svg onload=\"{mark}\">"
        f"<link rel=stylesheet href='{address}/style'><style>body{{background:url({address}/background)}}</style>"
    )


def opened(page: str, folder: Path) -> str:
    """The document as headless Chromium sees it two seconds later."""
    assert BROWSER is not None
    file = folder / "page.html"
    file.write_text(page)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=2000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert "</html>" in done.stdout, done.stderr
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")
def test_a_page_of_hostile_texts_in_a_browser(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    """Escaping alone is enough, the policy alone is enough, and without both the attack of this test works."""
    address, asked = server
    evil, hostile = attack(address), report()
    hostile["samples"][0]["prompt"] = evil
    hostile["samples"][0]["completions"] = {evil: {"text": evil, "reward": 1.0}}
    hostile["run"] |= {"name": evil, "command": evil}
    hostile["run"]["config"] = {"output_dir": evil}
    hostile["reward_model"]["backbone"] = evil
    hostile["margins"]["note"] = evil
    page = render_run_page(hostile)
    found = opened(page, tmp_path)
    assert "pwned'" in found and 'id="pwned"' not in found and asked == []

    policy = re.search(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", page)
    assert policy is not None
    unescaped = "<!doctype html><html><head>{}</head><body><p>{}</p></body></html>"
    assert 'id="pwned"' not in opened(unescaped.format(policy.group(), evil), tmp_path) and asked == []

    assert 'id="pwned"' in opened(unescaped.format("", evil), tmp_path) and "/image" in asked


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")
def test_the_search_keeps_the_prompts_with_every_word(tmp_path: Path) -> None:
    """The script of the page, driven by another one that types; the policy, which forbids that one, is removed."""
    found = comparison()
    for k, sample in enumerate(found["reward"]["samples"]):
        sample["prompt"] = f"Prompt {k}"
        sample["completions"]["dpo"]["text"] = "A KIND word" if k == 1 else "a word"
    found["comparisons"] = {}
    page = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", render_comparison_page(found))
    typed = "field.value = 'kind prompt'; field.dispatchEvent(new Event('input'));"
    dumped = opened(page.replace("</body>", f"<script>{typed}</script></body>"), tmp_path)
    articles = re.findall(r"<article( hidden=\"\")?>", dumped)
    assert articles == [' hidden=""', "", ' hidden=""'] and ">1 of 3 prompts<" in dumped
    assert 'hidden="" aria-label="search' not in opened(page, tmp_path)  # with scripts the field is there
    run = render_run_page(report())
    assert 'hidden aria-label="search' in run and 'hidden="" aria-label="search' not in opened(run, tmp_path)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")
@pytest.mark.parametrize("width", [360, 1600])
def test_the_comparison_page_is_never_wider_than_its_window(tmp_path: Path, width: int) -> None:
    page = html.escape(render_comparison_page(comparison()))
    measured = "r = f.contentDocument.documentElement; document.title = r.scrollWidth - r.clientWidth"
    frame = f'<iframe id="f" style="border:0;width:{width}px" onload="{measured}" srcdoc="{page}"></iframe>'
    frame = f"<html><head><title></title></head><body>{frame}</body></html>"
    assert "<title>0</title>" in opened(frame, tmp_path)


def test_every_page_has_the_policy() -> None:
    templates = sorted((Path(__file__).parents[2] / "align" / "reports" / "templates").glob("*.j2"))
    assert len(templates) >= 3
    for template in templates:
        text = template.read_text()
        assert "Content-Security-Policy" in text and "default-src 'none'" in text and "|safe" not in text, template
        assert "| safe" not in text and "autoescape" not in text, template
