"""The experiment's notebook in a real JupyterLab, driven as its user would, in a real browser; `make test-browser` runs this."""
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / 'docs/_build/screenshots'
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
NOTEBOOK = '03_frozen_decoder.ipynb'
SETTINGS = "settings = ('tasks.max_eval_groups=400', 'evaluation.others=50')"  # a line of it
LONGEST = 45 * 60  # seconds for Run All, which takes some 8 minutes on two idle cores
QUIET = {  # JupyterLab asks at its first start whether to fetch news
    '@jupyterlab/apputils-extension/notification.jupyterlab-settings': dict(fetchNews='false', checkForUpdates=False),
    '@jupyterlab/notebook-extension/tracker.jupyterlab-settings': dict(windowingMode='none')}  # all cells are in the page


def missing() -> str:
    "What keeps these tests from running, in words; empty if nothing does."
    absent = [m for m in ('playwright', 'jupyterlab', 'ipywidgets') if not importlib.util.find_spec(m)]
    if absent: return f'{absent[0]} is not installed: make test-browser installs it'
    return '' if CHROMIUM else 'no Chromium on the path: install it, as by apt-get install chromium'


if why := missing():
    if os.environ.get('REQUIRE_BROWSER'): raise RuntimeError(why)
    pytest.skip(why, allow_module_level=True)
if not os.environ.get('REQUIRE_BROWSER'): pytest.skip('takes minutes: make test-browser runs it', allow_module_level=True)

from playwright.sync_api import sync_playwright  # noqa: E402


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A copy of what the notebook reads, so that nothing of the user's is written."
    folder = tmp_path_factory.mktemp('lab')
    for name in ('nbs', 'checkpoints'): shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('runs', '.ipynb_checkpoints'))
    for name, values in QUIET.items():
        (file := folder / 'jupyter/settings' / name).parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def environment(folder: Path) -> dict:
    "Jupyter's own folders in the copy, and the checkout's library rather than an installed one."
    own = {'JUPYTER_CONFIG_DIR': 'config', 'JUPYTER_DATA_DIR': 'data', 'JUPYTER_RUNTIME_DIR': 'runtime', 'IPYTHONDIR': 'ipython',
           'JUPYTERLAB_SETTINGS_DIR': 'settings', 'JUPYTERLAB_WORKSPACES_DIR': 'workspaces'}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    kept = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'MPLBACKEND')}  # as for a user
    return kept | {k: str(folder / 'jupyter' / v) for k, v in own.items()} | {'PYTHONPATH': path, 'WANDB_MODE': 'disabled'}


@pytest.fixture(scope='module')
def server(folder):
    port, token = free_port(), secrets.token_hex(16)
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={folder / "nbs"}']
    with open(folder / 'server.log', 'w') as log: process = subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: answers(f'http://127.0.0.1:{port}/api/status?token={token}', process, folder), 120, 'JupyterLab to start')
        yield SimpleNamespace(url=f'http://127.0.0.1:{port}/', token=token)
    finally:
        process.terminate()  # it ends its kernels
        process.wait(60)


def answers(url: str, process, folder: Path) -> bool:
    if process.poll() is not None: raise RuntimeError(f'JupyterLab ended by itself:\n{(folder / "server.log").read_text()[-2000:]}')
    try: return urllib.request.urlopen(url, timeout=5).status == 200
    except urllib.error.HTTPError: raise
    except OSError: return False  # not yet


def wait_for(ready, seconds: float, what: str):
    "The first true answer of `ready`; an error that names what did not come."
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := ready(): return found
        time.sleep(.5)
    raise TimeoutError(f'waited {seconds} s for {what}')


@pytest.fixture(scope='module')
def page(server):
    "The notebook, open, with a kernel that is ready."
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=1300, height=1000))
        page.goto(f'{server.url}lab/tree/{NOTEBOOK}?token={server.token}')
        page.wait_for_selector('.jp-Notebook .jp-CodeCell', timeout=120_000)
        page.get_by_text('(ipykernel) | Idle').wait_for(timeout=120_000)
        yield page
        browser.close()


@pytest.fixture(scope='module')
def finished(page, folder):
    "Run All by its menu, to the end: what the bars showed on the way, and the notebook as it was saved."
    bars, before = set(), files_of_checkout()
    page.locator('.lm-MenuBar-itemLabel', has_text=re.compile('^Run$')).click()
    page.locator('.lm-Menu-itemLabel', has_text=re.compile('^Run All Cells$')).click()
    wait_for(lambda: running(page), 60, 'the first cell to run')
    wait_for(lambda: bars.update(re.findall(r'train.*?(\d+)/(\d+)', text_of(page, '.jp-OutputArea'), re.S)) or not running(page), LONGEST, 'Run All to finish')
    return SimpleNamespace(bars={int(at) for at, total in bars if total == '800'}, notebook=saved(page, folder), before=before)


def running(page) -> int: return page.locator('.jp-InputPrompt', has_text='[*]').count()


def text_of(page, selector: str) -> str: return '\n'.join(page.locator(selector).all_inner_texts())


def saved(page, folder: Path) -> dict:
    "The notebook's file after File, Save."
    file = folder / 'nbs' / NOTEBOOK
    before = file.stat().st_mtime_ns
    page.keyboard.press('Control+s')
    wait_for(lambda: file.stat().st_mtime_ns != before, 60, f'{NOTEBOOK} to be saved')
    return json.loads(file.read_text())


def code_cells(notebook: dict) -> list: return [c for c in notebook['cells'] if c['cell_type'] == 'code']


def test_run_all_finishes_without_an_error(finished):
    cells = code_cells(finished.notebook)
    errors = [f'{o["ename"]}: {o["evalue"]}' for c in cells for o in c['outputs'] if o['output_type'] == 'error']
    assert errors == []
    assert [c['execution_count'] for c in cells] == list(range(1, len(cells) + 1))


def test_progress_shows_while_it_trains(finished):
    assert len([at for at in finished.bars if 0 < at < 800]) >= 3, f'the bar was seen at {sorted(finished.bars)}'


def test_figures_appear(finished, page):
    in_file = sum('image/png' in o.get('data', {}) for c in code_cells(finished.notebook) for o in c['outputs'])
    committed = sum('image/png' in o.get('data', {}) for c in code_cells(json.loads((ROOT / 'nbs' / NOTEBOOK).read_text())) for o in c['outputs'])
    assert in_file == committed >= 8
    drawn = page.evaluate("[...document.querySelectorAll('.jp-RenderedImage img')].filter(i => i.complete && i.naturalWidth > 100).length")
    assert drawn == in_file


def shown(page) -> SimpleNamespace:
    "The explorer's picture and its words."
    picture = page.locator('.jupyter-widgets img[alt*="the answer is"]')
    return SimpleNamespace(picture=picture.get_attribute('src'), words=picture.get_attribute('alt'))


def changed(page, before) -> SimpleNamespace:
    wait_for(lambda: shown(page).picture != before.picture, 120, "the explorer's picture to change")
    return shown(page)


def test_the_explorer_answers_to_its_menus_and_its_slider(finished, page):
    first, (sets, tasks) = shown(page), (page.locator('.widget-dropdown select').nth(i) for i in (0, 1))
    tasks.select_option(index=1)
    other_task = changed(page, first)
    sets.select_option('variants')
    other_set = changed(page, other_task)
    page.locator('.widget-slider .noUi-handle').focus()
    page.keyboard.press('ArrowLeft')
    other_step = changed(page, other_set)
    steps = [int(re.search(r'after step (\d+)', s.words)[1]) for s in (other_set, other_step)]
    assert steps[1] == steps[0] - 1
    assert len({first.words.split(':')[0], other_task.words.split(':')[0], other_set.words.split(':')[0]}) == 3
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.locator('.jp-OutputArea-child', has=page.locator('.widget-slider')).last.screenshot(path=SHOTS / 'explorer.png')
    page.screenshot(path=SHOTS / 'jupyterlab.png')


def files_of_checkout() -> set: return {p.relative_to(ROOT) for kind in ('nbs/**/*', 'checkpoints/**/*') for p in ROOT.glob(kind)}


def digests(run: Path) -> dict: return {p.relative_to(run).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(run.rglob('*')) if p.is_file()}


def run_cell(page, holds: str, replacement: tuple[str, str] | None = None):
    "Click into the cell that holds some code, change it or not, Shift+Enter, wait."
    editor = page.locator('.jp-CodeCell .cm-content', has_text=holds).first
    editor.click()
    if replacement:
        text = editor.inner_text().replace(*replacement)
        page.keyboard.press('Control+a')
        page.keyboard.insert_text(text)
    page.keyboard.press('Shift+Enter')
    time.sleep(1)
    wait_for(lambda: not running(page), 600, f'the cell with {holds!r} to finish')


def test_another_setting_run_again_leaves_the_first_record_as_it_was(finished, page, folder):
    runs = folder / 'runs'
    assert [p.name for p in sorted(runs.iterdir())] == ['notebook-001']
    before = digests(runs / 'notebook-001')
    assert 'record.jsonl' in before and 'results.json' in before
    others = "settings = ('train.steps=20', 'train.log_every=5')"
    run_cell(page, "config = load_config('cfg_test_frozen_decoder', settings)", (SETTINGS, others))
    run_cell(page, "folder = new_run_folder('../runs', 'notebook')")
    assert [p.name for p in sorted(runs.iterdir())] == ['notebook-001', 'notebook-002']
    assert digests(runs / 'notebook-001') == before
    last = json.loads((runs / 'notebook-002/record.jsonl').read_text().splitlines()[-1])
    assert last['step'] == 20
    assert not [o for c in code_cells(saved(page, folder)) for o in c['outputs'] if o['output_type'] == 'error']


def test_no_file_appears_in_the_checkout(finished): assert files_of_checkout() == finished.before
