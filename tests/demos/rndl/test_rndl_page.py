"""The page, as a browser shows it."""

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from rndl_glue import ADVERSARIES, EXPECTED, Report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
in_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs Chromium (Debian's packages chromium and chromium-driver)",
)


def test_the_page_needs_nothing_from_elsewhere(report: Report) -> None:
    page = report.html.read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.search(
        r"<script|<link|<img|@import|url\(|src=|https?://(?!www\.w3\.org/2000/svg)", page
    )
    assert set(re.findall(r'href="(.)', page)) == {"#"}


@pytest.fixture(scope="module")
def browser(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1500,1000",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.get(report.html.as_uri())
        yield driver
    finally:
        driver.quit()


def elements(browser: Any, selector: str) -> list[Any]:
    found: list[Any] = browser.find_elements("css selector", selector)
    return found


@in_browser
def test_the_matrix_in_the_browser(browser: Any) -> None:
    """Read as a person reads it: the visible text under the visible headings."""
    headings, rows = browser.execute_script(
        """
        const seen = (one) => one.checkVisibility() ? one.innerText.trim() : "";
        const all = (where, selector) => [...where.querySelectorAll(selector)];
        const matrix = document.getElementById("matrix");
        return [
          all(matrix, "thead tr:nth-child(2) th").map(seen),
          all(matrix, "tbody tr").map((row) => all(row, "th, td").map(seen)),
        ];
        """
    )
    assert len(headings) == len(ADVERSARIES)
    assert headings[:5] == ["nothing", "ECDH", "ML-KEM", "ECDH + ML-KEM", "signatures"]
    titles = [row[0] for row in rows]
    assert titles[:10:2] == [
        "X25519",
        "X25519MLKEM768",
        "X25519 + QKD",
        "X25519MLKEM768 + QKD",
        "X25519MLKEM768 + QKD, PSK",
    ]
    assert set(titles[1:10:2]) == {"resumed"}
    assert titles[10:] == ["X25519MLKEM768, fresh", "X25519MLKEM768 + QKD, fresh"]
    expected = iter(EXPECTED.values())
    for _, *cells in rows:
        words = [cell.split() for cell in cells]
        assert [one[0] for one in words] == [
            "read" if next(expected) else "safe" for _ in ADVERSARIES
        ]
        assert all(one[1] == "lacks" for one in words if one[0] == "safe")
    assert elements(browser, ".outcome")[0].text == "204 of 204 cells as predicted"


@in_browser
def test_a_cell_shows_what_the_adversary_saw(browser: Any, report: Report) -> None:
    assert [one for one in elements(browser, "section.case") if one.is_displayed()] == []
    row, adversary = "x25519mlkem768-qkd", "ticket-key-both"
    [cell] = elements(browser, f'td[data-row="{row}"][data-adversary="{adversary}"] a')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
    cell.click()
    [case] = [one for one in elements(browser, "section.case") if one.is_displayed()]
    first, resumed = case.find_elements("css selector", "figure")
    verdicts = report.verdicts(row, adversary)
    assert [one["decrypted"] for one in verdicts] == [False, True]
    assert first.find_element("css selector", ".state").text == "safe"
    assert "MISSING" in first.text
    assert verdicts[0]["missing"][0].removeprefix("QKD key ") in first.text
    assert (
        resumed.find_element("css selector", "blockquote").text
        == (verdicts[1]["to_server"] + verdicts[1]["to_client"]).strip()
    )
    pictures = case.find_elements("css selector", "svg")
    assert len(pictures) == 4
    assert all(picture.size["height"] > 100 for picture in pictures)


@in_browser
def test_nothing_is_cut_off(browser: Any) -> None:
    """Every text of a picture lies within it, and the page is no wider than the window."""
    outside = browser.execute_script(
        """
        const bad = [];
        for (const svg of document.querySelectorAll("svg")) {
          const box = svg.getBoundingClientRect();
          if (box.width == 0) continue;
          for (const text of svg.querySelectorAll("text")) {
            const at = text.getBoundingClientRect();
            if (at.left < box.left - 1 || at.right > box.right + 1 || at.bottom > box.bottom + 1)
              bad.push(text.textContent);
          }
        }
        return bad;
        """
    )
    assert outside == []
    widths = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    assert len(set(browser.execute_script(widths))) == 1


@in_browser
def test_light_and_dark(browser: Any) -> None:
    """Both are there, and words stand out from what is behind them (WCAG 2, contrast of 4.5)."""
    grounds = set()
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        for selector in ("body", "td.safe a", "td.decrypted a", "td.safe .why", ".outcome"):
            front, back = browser.execute_script(
                """
                let one = document.querySelector(arguments[0]);
                const front = getComputedStyle(one).color;
                let back = "";
                while (one && (back = getComputedStyle(one).backgroundColor).endsWith(" 0)"))
                  one = one.parentElement;
                return [front, back];
                """,
                selector,
            )
            assert contrast(front, back) >= 4.5, (scheme, selector, front, back)
            grounds.add((scheme, back))
    assert len({back for _, back in grounds}) == len(grounds), "the schemes differ"


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@in_browser
def test_the_browser_fetched_the_page_and_nothing_else(browser: Any, report: Report) -> None:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [
        event["params"]["request"]["url"].partition("#")[0]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
        # The browser's own first page fetches much.
        and not event["params"]["documentURL"].startswith("chrome")
    ]
    assert sent == [report.html.as_uri()]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
