"On a GPU: the same answers as on the CPU, and everything stays there until it is to be counted."
import pytest
import torch

from etrm.contexts import SEARCH_RULES, noise, search
from etrm.decoder import Decoder, DecoderConfig
from etrm.devices import device_of
from etrm.losses import stablemax_cross_entropy

pytestmark = pytest.mark.cuda

SMALL = DecoderConfig(canvas=3, hidden_size=32, num_heads=4, H_cycles=1, L_cycles=2, puzzle_emb_len=2, forward_dtype='float32')


def test_auto_takes_the_gpu():
    assert device_of().type == 'cuda' and device_of('cpu').type == 'cpu'


def test_noise_is_that_of_the_cpu():
    contexts, tasks = torch.randn(4, 2, 8), torch.arange(4)
    found = []
    for device in ('cpu', 'cuda'):
        torch.manual_seed(0)
        found.append(noise(contexts.to(device), tasks.to(device)).cpu())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize('rule', SEARCH_RULES)
def test_a_search_goes_where_it_goes_on_the_cpu(rule):
    torch.manual_seed(0)
    decoder = Decoder(SMALL)
    demos = torch.randint(2, 12, (2, 3, 9)), torch.randint(2, 12, (2, 3, 9)), torch.ones(2, 3, dtype=torch.bool)
    there = lambda device: search(decoder.to(device), *demos, torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(1)), stablemax_cross_entropy, steps=3, rule=rule)
    (contexts, losses), (on_gpu, losses_there) = there('cpu'), there('cuda')
    assert on_gpu.device.type == losses_there.device.type == 'cuda'
    torch.testing.assert_close(on_gpu.cpu(), contexts, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(losses_there.cpu(), losses, atol=1e-3, rtol=1e-3)
