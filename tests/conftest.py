"What all tests have in common: those that need a GPU are skipped, with the reason, where there is none."
import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line('markers', 'cuda: needs a GPU that torch can use')


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available(): return
    for item in items:
        if 'cuda' in item.keywords: item.add_marker(pytest.mark.skip(reason='this machine has no GPU that torch can use'))
