"""Takes pictures of the site in headless Chromium, light and dark, wide and narrow.

After `python -m sphinx docs build/docs`, with Debian's Chromium or another one:

    pip install playwright
    python docs/screenshots.py [--chromium /usr/bin/chromium] [page ...]

They are for someone to look at, in `build/screenshots`. What a script can see is
checked here: nothing is fetched from elsewhere, no page is wider than its window, no
picture is missing, no TeX is left over.
"""

import argparse
import pathlib
import sys

from playwright.sync_api import Page, sync_playwright

ROOT = pathlib.Path(__file__).parents[1]
SITE = ROOT / "build" / "docs"
PICTURES = ROOT / "build" / "screenshots"
WIDTHS = (400, 1400)
SCHEMES = ("light", "dark")
HEIGHT = 6000  # of a picture at most, in CSS pixels

# What is wider than the window and cannot be scrolled by itself; pictures without
# pixels; text in which TeX is left.
FAULTS = """
() => {
  const found = [];
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth + 1) {
    found.push(`page is ${root.scrollWidth} wide`);
  }
  for (const image of document.images) {
    if (image.offsetParent && image.complete && !image.naturalWidth) {
      found.push(`no picture: ${image.src}`);
    }
  }
  const article = document.querySelector("article");
  const prose = article.cloneNode(true);
  prose.querySelectorAll("pre, code, mjx-container, script").forEach(e => e.remove());
  const tex = prose.textContent.match(/\\$\\$|\\\\(frac|sum|log|sigma|partial|mathrm)/);
  if (tex) found.push(`raw TeX: ${tex[0]}`);
  return found;
}
"""


def look_at(page: Page, path: pathlib.Path, picture: pathlib.Path) -> list[str]:
    """Takes the picture of a page and returns what is wrong with it."""
    faults: list[str] = []
    fetched = [
        lambda request: (
            faults.append(f"fetched {request.url}")
            if not request.url.startswith(("file:", "data:"))
            else None
        ),
        lambda request: faults.append(f"not there: {request.url}"),
    ]
    page.on("request", fetched[0])
    page.on("requestfailed", fetched[1])
    page.goto(path.as_uri())
    page.evaluate("window.MathJax?.startup?.promise")
    page.remove_listener("request", fetched[0])
    page.remove_listener("requestfailed", fetched[1])
    faults += page.evaluate(FAULTS)
    height = min(HEIGHT, page.evaluate("document.documentElement.scrollHeight"))
    page.set_viewport_size({"width": page.viewport_size["width"], "height": height})
    page.screenshot(path=picture)
    return faults


def main() -> int:
    """Looks at every page, or at those that are named."""
    parser = argparse.ArgumentParser(description="Takes screenshots of the site.")
    parser.add_argument("pages", nargs="*", help="index, numerics, ...; all if none")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    skipped = {"genindex.html", "search.html", "py-modindex.html"}
    paths = [SITE / f"{name}.html" for name in arguments.pages] or [
        path
        for path in sorted(SITE.rglob("*.html"))
        if path.name not in skipped and "_static" not in path.parts
    ]
    PICTURES.mkdir(parents=True, exist_ok=True)
    count = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=arguments.chromium,
            args=["--no-sandbox", "--disable-background-networking"],
        )
        for scheme in SCHEMES:
            for width in WIDTHS:
                context = browser.new_context(
                    viewport={"width": width, "height": 900}, color_scheme=scheme
                )
                page = context.new_page()
                for path in paths:
                    name = f"{path.stem}-{scheme}-{width}.png"
                    page.set_viewport_size({"width": width, "height": 900})
                    for fault in look_at(page, path, PICTURES / name):
                        count += 1
                        print(f"{name}: {fault}")
                context.close()
        browser.close()
    print(f"{len(paths)} pages in {PICTURES.relative_to(ROOT)}, {count} faults")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
