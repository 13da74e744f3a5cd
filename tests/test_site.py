"""The docs site in a real browser; `make test-browser` builds it and runs this."""
import functools
import http.server
import os
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import urljoin

import pytest

HTML = Path(__file__).parent.parent / 'docs/_build/html'
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
PHONE = 390  # pixels


def missing() -> str:
    "What keeps these tests from running, in words; empty if nothing does."
    try: import playwright  # noqa: F401
    except ImportError: return 'playwright is not installed: make test-browser installs it'
    if not CHROMIUM: return 'no Chromium on the path: install it, as by apt-get install chromium'
    return '' if (HTML / 'index.html').exists() else 'the site is not built: make docs'


if why := missing():
    if os.environ.get('REQUIRE_BROWSER'): raise RuntimeError(why)
    pytest.skip(why, allow_module_level=True)

from playwright.sync_api import sync_playwright  # noqa: E402

PAGES = sorted(p.relative_to(HTML).as_posix() for p in HTML.rglob('*.html') if '_static' not in p.parts)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def site():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


@pytest.fixture(scope='module')
def browser():
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, site):
    "A page that notes errors and every request that leaves the site."
    page = browser.new_page()
    page.errors, page.outside = [], []
    page.on('console', lambda m: page.errors.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: page.errors.append(str(e)))
    page.on('request', lambda r: page.outside.append(r.url) if not r.url.startswith((site, 'data:')) else None)
    yield page
    page.close()


@pytest.mark.parametrize('name', PAGES)
def test_page(page, site, name):
    page.set_viewport_size(dict(width=PHONE, height=844))
    page.goto(site + name)
    assert page.errors == [] and page.outside == []
    assert page.evaluate('document.documentElement.scrollWidth') <= PHONE
    assert page.evaluate("[...document.querySelectorAll('article img')].filter(i => !i.alt.trim() || !i.complete || !i.naturalWidth).map(i => i.src)") == []
    assert re.findall(r'\w*Box\(children=.*|.*\d+%\|.*', '\n'.join(page.locator('article').all_inner_texts())) == []  # no widget that nothing drives, no bar that stands still
    inside = [u.split('#') for u in page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)") if u.startswith(site)]
    dead = [u for u, *anchor in inside if not (HTML / (u[len(site):].split('?')[0] or 'index.html')).exists()]
    assert dead == []
    here = [anchor[0] for u, *anchor in inside if anchor and anchor[0] and u == urljoin(site, name)]
    assert [a for a in here if not page.evaluate('id => !!document.getElementById(decodeURIComponent(id))', a)] == []


def test_home_shows_the_verdicts_and_their_figure(page, site):
    page.goto(site)
    aims, verdicts = (page.locator('article table').nth(i) for i in range(2))
    assert aims.locator('tbody tr').count() == 5 and 'compositions, with search' in aims.inner_text()
    assert verdicts.locator('tbody tr').count() >= 7 and 'Is the encoder too weak?' in verdicts.inner_text()
    assert page.locator('article img[src*="state"]').first.is_visible()


def test_search_finds_a_term_without_the_network(page, site):
    page.goto(site + 'search.html?q=stablemax')
    page.wait_for_selector('#search-results li')
    assert any('losses' in a for a in page.eval_on_selector_all('#search-results li a', 'all => all.map(a => a.href)'))
    assert page.outside == [] and page.errors == []


def test_dark_and_light_differ(browser, site):
    colours = []
    for scheme in ('light', 'dark'):
        page = browser.new_page(color_scheme=scheme)
        page.goto(site)
        colours.append(page.evaluate('getComputedStyle(document.body).backgroundColor'))
        page.close()
    assert colours[0] != colours[1]


def test_each_notebook_page_opens_its_notebook(page, site):
    page.goto(site + '03_frozen_decoder.html')
    assert page.locator('a', has_text='Open in JupyterLab').first.get_attribute('href').endswith('/lab/tree/03_frozen_decoder.ipynb')
