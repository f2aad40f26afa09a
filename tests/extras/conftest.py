"""What several tests of extras need."""

import shutil

import pytest


@pytest.fixture(scope="module")
def browser():
    """Chromium: the system's, or the one that `playwright install chromium` brings."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=path)
        except api.Error as error:
            pytest.skip("no Chromium that starts (Debian: apt-get install chromium; elsewhere: "
                        f"playwright install chromium): {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()
