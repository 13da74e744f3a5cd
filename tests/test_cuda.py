"On a GPU: the same answers as on the CPU, and everything stays there until it is to be counted."
import pytest
import torch

from etrm.apps.bench import format_rows, measure
from etrm.apps.bench_steps import Setup, random_tasks, training_step
from etrm.data.stream import Stream
from etrm.data.puzzles import puzzle_data
from etrm.model.contexts import PuzzleEmbedding, noise
from etrm.data.queries import Demos
from etrm.search.search import SEARCH_RULES, SearchConfig, search
from etrm.model.decoder import COMPILED, Decoder, DecoderConfig
from etrm.basics.devices import device_of
from etrm.training.trainer import TrainConfig, Trainer

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
    demos = Demos(torch.randint(2, 12, (2, 3, 9)), torch.randint(2, 12, (2, 3, 9)), torch.ones(2, 3, dtype=torch.bool))
    start, three = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(1)), SearchConfig(steps=3, rule=rule)
    there = lambda device: search(decoder.to(device), demos, start, three)
    (contexts, losses), (on_gpu, losses_there) = there('cpu'), there('cuda')
    assert on_gpu.device.type == losses_there.device.type == 'cuda'
    torch.testing.assert_close(on_gpu.cpu(), contexts, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(losses_there.cpu(), losses, atol=1e-3, rtol=1e-3)


def updates(parts: str, n: int = 4):
    "Logged losses and the decoder's weights after some updates of a table and its decoder."
    data = puzzle_data(random_tasks(3, n=4, pairs=6), 3)
    torch.manual_seed(0)
    decoder, table = Decoder(SMALL), PuzzleEmbedding(data.num_identifiers, 64, 2, 32, init_std=1.)
    trainer = Trainer(decoder.cuda(), table.cuda(), Stream(data, 16), TrainConfig(steps=n, global_batch_size=16, compile=parts, optim=dict(lr=1e-3, lr_warmup_steps=1)))
    losses = []
    for _ in range(n): losses.append(trainer.step()[0]['train/lm_loss'].clone())
    answers = decoder.eval()(decoder.initial_carry(5), torch.full((5, 9), 3, device='cuda'), torch.ones(5, 2, 32, device='cuda'))[1]
    return torch.stack(losses), answers.detach().clone()


@pytest.mark.parametrize('parts', COMPILED[1:])
def test_what_is_compiled_trains_and_answers_as_what_is_not(parts):
    for found, wanted in zip(updates(parts), updates('no')): torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize('parts', COMPILED[1:])
def test_a_search_through_a_compiled_decoder(parts):
    torch.manual_seed(0)
    decoder, demos = Decoder(SMALL).cuda(), Demos(torch.randint(2, 12, (2, 3, 9)), torch.randint(2, 12, (2, 3, 9)), torch.ones(2, 3, dtype=torch.bool))
    start, three = torch.randn(2, 2, 32), SearchConfig(steps=3)
    wanted = search(decoder, demos, start, three)
    decoder.compile_parts(parts)
    for found, value in zip(search(decoder, demos, start, three), wanted): torch.testing.assert_close(found, value, atol=1e-3, rtol=1e-3)


OFFICIAL = 33.5 * 2**30  # bytes of the official program's compiled step at its own shape, batch 192, measured on an H200


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.mem_get_info()[1] < 45e9, reason='a step at the official shape takes some 35 GB')
def test_memory_of_a_step_at_the_official_shape():
    step = training_step(Setup(DecoderConfig(), 192, 'cuda', 'blocks'))
    step(); torch.cuda.reset_peak_memory_stats()
    step()
    assert torch.cuda.max_memory_allocated() <= OFFICIAL, f'{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB'


def test_the_bench_runs_there(capsys):
    rows = measure(.05, {'small': (SMALL, 8), 'small, bfloat16': (SMALL.with_(forward_dtype='bfloat16'), 8)}, ('no', 'blocks'), 'cuda')
    assert len(rows) == 2 * 2 * 8 and all(r['samples_per_second'] > 0 and r['memory'] > 0 for r in rows)
    assert all(0 <= r['outside'] <= 1 for r in rows if 'training' in r['step'])
    assert torch.cuda.get_device_name() in format_rows(rows, 'cuda')
