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

ROOT = Path(__file__).resolve().parent.parent
HTML, README = ROOT / 'docs/_build/html', ROOT / 'README.md'
ELSEWHERE = ('12_full_scale', '14_comparisons')  # no chapters: the guide and the comparisons
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
PHONE, DESKTOP = 390, 1400  # pixels
PARTS = ['Chapters', 'How-to', 'Reference', 'Results', 'Comparisons', 'Glossary', 'Log of records', 'Changelog', 'All names']


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

CHAPTERS = sorted(p.stem for p in HTML.glob('[0-9]*_*.html'))
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
    for width in (PHONE, DESKTOP):
        page.set_viewport_size(dict(width=width, height=844))
        assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert page.title().strip()
    assert page.locator('article h1').count() == 1 or name == 'search.html'
    assert page.evaluate("[...document.querySelectorAll('article img')].filter(i => !i.alt.trim() || !i.complete || !i.naturalWidth).map(i => i.src)") == []
    assert re.findall(r'\w*Box\(children=.*|.*\d+%\|.*', '\n'.join(page.locator('article').all_inner_texts())) == []  # no widget that nothing drives, no bar that stands still
    inside = [u.split('#') for u in page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)") if u.startswith(site)]
    dead = [u for u, *anchor in inside if not (HTML / (u[len(site):].split('?')[0] or 'index.html')).exists()]
    assert dead == []
    here = [anchor[0] for u, *anchor in inside if anchor and anchor[0] and u == urljoin(site, name)]
    assert [a for a in here if not page.evaluate('id => !!document.getElementById(decodeURIComponent(id))', a)] == []


def test_home_is_the_readme(page, site):
    page.goto(site)
    headings = [line[3:] for line in README.read_text().splitlines() if line.startswith('## ')]
    assert [h.removesuffix('#').strip() for h in page.locator('article h2').all_inner_texts()] == headings
    commands = page.locator('article table').first.inner_text()
    assert 'make run' in commands and 'make test' in commands
    assert page.locator('article img[src*="diagram"]').first.is_visible()


def test_the_side_bar_has_its_parts_and_opens_them(page, site):
    page.set_viewport_size(dict(width=DESKTOP, height=844))
    page.goto(site)
    bar = page.locator('.bd-sidebar-primary nav')
    assert bar.locator('li.toctree-l1 > a').all_inner_texts()[1:] == PARTS  # the first is home
    assert bar.locator('li.toctree-l2 a:visible').count() == 0
    chapters = bar.locator('li.toctree-l1', has=page.locator('a', has_text=re.compile('^Chapters$')))
    chapters.locator('.toctree-toggle').first.click()
    titles = chapters.locator('li.toctree-l2 > a').all_inner_texts()
    assert [t[:2] for t in titles] == [c[:2] for c in CHAPTERS if c not in ELSEWHERE]


def test_results_has_each_chapter_with_its_answer(page, site):
    page.goto(site + 'results.html')
    sections = page.locator('article section section')
    numbers = [h[:2] for h in sections.locator('h2').all_inner_texts()]
    assert numbers == [c[:2] for c in CHAPTERS if c not in ELSEWHERE]
    assert [n for n, s in zip(numbers, sections.all()) if len(s.locator('p').first.inner_text()) < 40] == []
    page.locator('article details').first.evaluate('e => e.open = true')
    assert page.locator('article details table').first.is_visible() and page.locator('article table').count() > 40


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


@pytest.mark.parametrize('name', [*CHAPTERS, 'api/3_model/04_encoders'])
def test_each_chapter_opens_in_jupyterlab_and_says_how(page, site, name):
    page.goto(f'{site}{name}.html')
    lab, how = (page.locator('article p.live a').nth(i) for i in (0, 1))
    assert lab.get_attribute('href').endswith(f'/lab/tree/{name}.ipynb')
    how.click()
    assert 'make lab' in page.locator('#open-a-chapter-in-jupyterlab').inner_text()
