"""
Make the pictures of the demo in docs/images, in a Chromium, with the embedded model and the example pictures.

    python -m scripts.make_screenshots
"""

import tempfile
from pathlib import Path

from tests.demo_server import ROOT, Visitor, running_browser, running_demo

PICTURES = {"Enlarge": ("cat.png", "After"), "Compare": ("coffee.jpg", "UPLiFT")}
"""By tab: the example, and the label of the last picture that appears."""

WIDTH, HEIGHT = 1200, 790


def main() -> None:
    """Write docs/images/demo-enlarge.png and docs/images/demo-compare.png."""
    with tempfile.TemporaryDirectory() as folder, running_demo(Path(folder)) as demo, running_browser() as browser:
        for tab, (example, label) in PICTURES.items():
            visitor = Visitor(browser, demo, width=WIDTH, height=HEIGHT, tab=tab)
            visitor.page.set_default_timeout(600_000)
            visitor.choose(ROOT / "examples" / example)
            visitor.press(tab)
            visitor.pixels(label)
            visitor.panel.locator(".figures table").wait_for()
            visitor.page.mouse.move(0, 0)
            visitor.page.wait_for_timeout(1000)  # transitions end
            visitor.page.screenshot(path=ROOT / "docs" / "images" / f"demo-{tab.lower()}.png")
            visitor.page.context.close()


if __name__ == "__main__":
    main()
