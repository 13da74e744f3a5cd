"""The front page: its Python runs as printed, its size, what it may not be full of."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text()


def test_its_python_runs_as_printed(monkeypatch):
    monkeypatch.chdir(ROOT)
    (snippet,) = re.findall(r'```python\n(.*?)```', README, re.S)
    names = {}
    exec(compile(snippet, 'README.md', 'exec'), names)
    config = names['config'].decoder
    assert names['logits'].shape == (1, 25, config.vocab_size)
    assert names['context'].shape == (1, config.puzzle_emb_len, config.hidden_size)


def test_it_can_be_read_in_a_minute():
    assert 4000 <= len(README.encode()) <= 7168
    assert len(re.findall(r'\d of \d', README)) <= 20


@pytest.mark.parametrize('command', re.findall(r'^(make \w+)', README, re.M))
def test_its_commands_are_targets(command):
    assert re.search(rf'^{command.split()[1]}:', (ROOT / 'Makefile').read_text(), re.M)


def test_its_links_lead_somewhere():
    links = re.findall(r'\]\((?!https?:|#)([^)#]+)', README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []
