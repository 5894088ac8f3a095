"""The page in headless Chromium: upload, ask, drag the budget; nothing is loaded from elsewhere."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.serving import ScriptedWorker, encoded_image, serving, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def until(condition: Callable[[], object]) -> None:
    """Wait for the page. Playwright's own waits evaluate code, which the page's policy forbids."""
    wait_until(condition, 20, "the page")


@pytest.fixture
def url(app: Any) -> Iterator[str]:
    with serving(app) as address:
        yield address


@pytest.fixture
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed (Debian: apt-get install chromium)")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_policy_allows_only_code_of_the_page(url: str) -> None:
    response = httpx.get(url)
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy and "*" not in policy and "http" not in policy
    html = response.text
    assert not re.search(r"(src|href)=|https?://|@import|\son\w+=", html), "an external resource"
    assert html.count("<script>") == html.count("<style>") == 1


def test_ask_about_an_image(url: str, browser: Any, worker: ScriptedWorker, tmp_path: Path) -> None:
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))

    page.goto(url)
    assert page.is_hidden("#shown"), "an empty page shows a broken image"
    # the slider starts at the model's smallest budget: one of its four layers always runs
    until(lambda: page.get_attribute("#budget", "min") == "0.25")
    path = tmp_path / "red.png"
    path.write_bytes(encoded_image((40, 30)))
    page.set_input_files("#image", path)
    until(lambda: page.is_visible("#shown"))
    assert page.evaluate("document.getElementById('shown').naturalWidth") == 40
    page.fill("#question", "what is in the picture ?")
    page.click("#ask")
    until(lambda: page.is_visible("#cost"))
    assert page.inner_text("#answer") == "red and blue"
    [ask] = worker.asks
    assert ask.budget == "1" and ask.image_key
    assert page.locator("#layers span").count() == 4
    assert page.locator("#layers .always").count() == 1
    assert page.locator("#layers i.on").count() == 2, "the plan is on, off, on"
    assert "3 of 4 ran" in page.inner_text("#ran")
    assert "2 of 3 units on" in page.inner_text("#ran")
    assert " ms" in page.inner_text("#whole") and " ms" in page.inner_text("#first")

    # Dragging the budget sends the request again.
    page.focus("#budget")
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    assert page.inner_text("#shownbudget") == "0.60"
    until(lambda: page.inner_text("#used").startswith("0.60"))
    assert worker.asks[-1].budget == "0.6"

    page.check("#auto")
    page.click("#ask")
    until(lambda: page.inner_text("#used").startswith("0.75"))
    assert worker.asks[-1].budget is None, "the budget is chosen by the load"

    assert all(address.startswith((url, "blob:")) for address in requested)
    assert problems == []


def test_errors_are_shown_as_text(url: str, browser: Any, worker: ScriptedWorker) -> None:
    worker.refuse = ValueError("<img src=x onerror=alert(1)> is not a budget")
    page = browser.new_page()
    page.goto(url)
    page.fill("#question", "left ?")
    page.keyboard.press("Enter")
    until(lambda: page.inner_text("#problem"))
    assert page.inner_text("#problem") == "<img src=x onerror=alert(1)> is not a budget"
    worker.refuse, worker.tokens = None, ("<b>", "bold</b>")
    page.click("#ask")
    until(lambda: page.is_visible("#cost"))
    assert page.inner_text("#answer") == "<b>bold</b>"
    assert page.inner_text("#problem") == ""


def test_stop_button_frees_the_row(url: str, browser: Any, worker: ScriptedWorker) -> None:
    worker.pause, worker.tokens = 0.1, ("a ",) * 100
    page = browser.new_page()
    page.goto(url)
    page.fill("#question", "left ?")
    page.click("#ask")
    until(lambda: len(page.inner_text("#answer")) > 4)
    page.click("#stop")
    until(lambda: worker.cancelled)
    assert worker.cancelled == [worker.asks[0].id]
