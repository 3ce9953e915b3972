"""A headless Chromium for tests of pages: it opens them, and fails on console errors and on requests to elsewhere.

Tests that need it take the fixture `browser`; they are skipped, with the reason, where there is no Chromium
(Debian, Ubuntu: apt-get install chromium chromium-driver).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

PHONE, DESKTOP = (390, 844), (1280, 900)
"""Width and height of the page in CSS pixels."""
_LOCAL = ("data", "blob", "about", "file", "chrome", "chrome-extension", "devtools")


class Browser:
    """One window. `problems` has what a user's console would show, and every request that left the page's own host."""

    def __init__(self, driver: Any):
        self.driver = driver

    def open(self, page: Path | str, size: Sequence[int] = DESKTOP, dark: bool = False) -> None:
        """Opens a file or an address in a page of the given size."""
        self.resize(size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._command("Emulation.setEmulatedMedia", features=[scheme])
        self._address = page.resolve().as_uri() if isinstance(page, Path) else page
        self.driver.get(self._address)

    def resize(self, size: Sequence[int]) -> None:
        """Gives the page this width and height."""
        self._command("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1,
                      mobile=size[0] < 600)  # fmt: skip

    def run(self, script: str, *arguments: Any) -> Any:
        """Runs JavaScript in the page (`return ...` gives its value; arguments are `arguments[0]`, ...)."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, seconds: float = 15.0) -> Any:
        """Waits until the JavaScript gives something true, and returns that."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(lambda _: self.run(script))

    def click(self, selector: str) -> None:
        """Scrolls to the first element of the CSS selector and clicks it as a user would."""
        element = self.find(selector)[0]
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def find(self, selector: str) -> list[Any]:
        """Returns the elements of the CSS selector."""
        return list(self.driver.find_elements("css selector", selector))

    def overflow(self) -> int:
        """Returns by how many pixels the page is wider than its window."""
        return int(self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def screenshot(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))

    def problems(self) -> list[str]:
        """Returns errors and warnings of the console, and requests to other places, since the last call."""
        console = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]
        return console + [f"requested {url}" for url in self._requests() if not self._is_own(url)]

    def _requests(self) -> list[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    def _is_own(self, url: str) -> bool:
        parts, own = urlsplit(url), urlsplit(self._address)
        return parts.scheme in _LOCAL or (parts.scheme, parts.netloc) == (own.scheme, own.netloc)

    def _command(self, name: str, **arguments: Any) -> None:
        self.driver.execute_cdp_cmd(name, arguments)


@contextmanager
def opened() -> Iterator[Browser]:
    """Starts a browser, or skips the test that asks for it."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("needs Chromium and its driver (apt-get install chromium chromium-driver)")
    selenium = pytest.importorskip("selenium", reason="needs selenium")
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    assert selenium
    options = ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars",
                 "--no-first-run", "--disable-background-networking", "--disable-component-update"):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options, ChromeService(chromedriver))
    driver.set_page_load_timeout(60)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
