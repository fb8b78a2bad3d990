"""The report in a browser: what its tests ask of a page. Needs selenium."""

import json
import shutil

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

CONTRAST = """
const luminance = (rgb) => {
  const part = rgb.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255);
  const [r, g, b] = part.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (colour !== "rgba(0, 0, 0, 0)") return colour;
  }
};
const own = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
const counts = (n) => own(n) && n.checkVisibility() && !n.disabled && n.tagName !== "I";
return [...document.querySelectorAll("body *")].filter(counts).map((node) => {
    const [a, b] = [getComputedStyle(node).color, behind(node)].map(luminance);
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.outerHTML.slice(0, 90)];
}).filter(([contrast]) => contrast < 4.5);
"""
"""JavaScript: the texts on the screen with less contrast than 4.5, and what it is."""
CUT = """
const scrolls = (node) => getComputedStyle(node).overflowX !== "visible";
const hides = (node) => node.scrollWidth > node.clientWidth + 1 && scrolls(node);
const counts = (node) => node.checkVisibility() && node.clientWidth > 1;
const seen = [...document.querySelectorAll("body *")].filter(counts);
const beyond = (node) => node.getBoundingClientRect().right > innerWidth + 1;
return seen.filter((node) => beyond(node) || hides(node)).map((node) => node.outerHTML.slice(0, 90));
"""
"""JavaScript: what sticks out of the window, or is wider than the box that it scrolls in."""

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1300,1000",
)  # fmt: skip


def open_chromium(folder):
    """Starts it without a window and with an empty profile; downloads and profile go to `folder`."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # With both paths given, Selenium does not look for a driver to download.
    return webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))


class Page:
    """The report in a browser, with the few questions that the tests ask."""

    def __init__(self, browser, path):
        self.browser, self.path = browser, path

    def load(self):
        self.browser.get(self.path.as_uri())
        return self

    def emulate(self, width, scheme):
        """Makes the window as wide as a screen with this colour scheme."""
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        return self

    def run(self, script, *values):
        return self.browser.execute_script(script, *values)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def choose(self, selector, text):
        Select(self.one(selector)).select_by_visible_text(text)

    def texts(self, selector):
        """As in the document, whether on the screen or not."""
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map((n) => n.textContent)", selector
        )

    def style(self, element, name):
        return self.run("return getComputedStyle(arguments[0])[arguments[1]]", element, name)

    def colours(self):
        return [self.style(token, "backgroundColor") for token in self.all("#prompts .token")]

    def requests(self):
        """What the browser asked for since the last call."""
        entries = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        sent = [e["params"] for e in entries if e["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]
