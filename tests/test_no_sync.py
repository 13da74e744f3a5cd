"""Nothing in an update asks the device for a value, which would make the CPU wait for a GPU: only logging, saving and evaluation do."""
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from etrm.model.contexts import PuzzleEmbedding
from etrm.data.puzzles import puzzle_data
from etrm.data.stream import Stream
from etrm.model.decoder import Decoder, DecoderConfig
from etrm.model.encoders import DemoEncoder, EncoderConfig
from etrm.experiments.encoder_training import search_refinement
from etrm.experiments.regression import EmbeddingLosses
from etrm.search.search import SearchConfig
from etrm.training.extras import contrast, Extras
from etrm.tasks.task import Pair, Task
from etrm.training.trainer import TrainConfig, Trainer

SMALL = DecoderConfig(canvas=4, hidden_size=32, num_heads=2, L_layers=1, H_cycles=2, L_cycles=1, puzzle_emb_len=2, halt_max_steps=3, forward_dtype='float32')
WAITS = {'_local_scalar_dense', 'item', 'is_nonzero', 'equal', 'nonzero', 'masked_select', 'unique_dim', '_unique', '_unique2', 'bincount', 'repeat_interleave'}
SOURCES = {
    'table': dict(),
    'table, frozen decoder': dict(freeze_decoder=True, optim=dict(puzzle_emb_rule='normalised', grad_clip=1.)),
    'encoder': dict(),
    'encoder, frozen decoder': dict(freeze_decoder=True, optim=dict(grad_clip=1., ema_rate=0.)),
    'encoder near embeddings': dict(),
    'encoder with contrast': dict(),
    'encoder that is searched': dict(),
}


class Asked(AssertionError):
    "Someone wanted a value."


class NobodyAsks(TorchDispatchMode):
    "Inside, operations that would wait for a GPU fail, on any device."
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix('aten::')
        by_mask = name in ('index', 'index_put', 'index_put_') and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in WAITS or by_mask: raise Asked(name)
        return function(*args, **(kwargs or {}))


def make_trainer(kind: str, device: str) -> Trainer:
    rng = np.random.default_rng(0)
    grid = lambda: rng.integers(0, 10, rng.integers(1, 5, size=2))
    data = puzzle_data([Task(f'{i}', tuple(Pair(grid(), grid()) for _ in range(6)), ()) for i in range(4)], 4, 3)
    torch.manual_seed(0)
    c, table = TrainConfig(global_batch_size=16, steps=20, **SOURCES[kind]), PuzzleEmbedding(data.num_identifiers, 64, 2, 32, noise=.1, init_std=1.)
    source = table if 'table' in kind else DemoEncoder(EncoderConfig(canvas=4, hidden_size=32, num_heads=2, puzzle_emb_len=2, encoder_num_layers=1, variational='set'))
    losses = EmbeddingLosses(table.contexts()).to(device).requires_grad_(False)
    decoder, source = Decoder(SMALL).to(device), source.to(device)
    extras = {'encoder near embeddings': lambda: Extras(context_losses=(lambda context, batch: sum(losses(context, batch['puzzle_identifiers'] - 1).values()),)),
              'encoder with contrast': lambda: Extras(batch_losses=(contrast(source, 1.),)),
              'encoder that is searched': lambda: Extras(refine=search_refinement(decoder, SearchConfig(steps=2, rule='normalised')))}
    stream = Stream(data, 16, num_demos=0 if 'table' in kind else 4, translate=True)
    return Trainer(decoder, source, stream, c, extras.get(kind, Extras)())


@pytest.mark.parametrize('kind', SOURCES)
def test_no_operation_waits(kind):
    trainer = make_trainer(kind, 'cpu')
    trainer.step()
    with NobodyAsks(): trainer.step()


@pytest.mark.parametrize('kind', SOURCES)
def test_no_value_is_there_to_be_asked_for(kind, monkeypatch):
    "On a device that computes shapes only, each way to a value is an error: `tolist`, `cpu`, `numpy` too."
    monkeypatch.setattr(torch, 'autocast', lambda *args, enabled: nullcontext())  # it does not know that device
    trainer = make_trainer(kind, 'meta')
    for _ in range(2): metrics, context = trainer.step()
    assert context.device.type == 'meta'
    assert {v.device.type for k, v in metrics.items() if k != 'train/lr'} == {'meta'}


@pytest.mark.cuda
@pytest.mark.parametrize('kind', SOURCES)
def test_ten_updates_without_waiting_for_the_gpu(kind):
    trainer = make_trainer(kind, 'cuda')
    for _ in range(2): trainer.step()  # what is made once may wait
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(10): trainer.step()
    finally: torch.cuda.set_sync_debug_mode('default')


def test_a_wait_is_seen():
    t = torch.arange(3)
    for ask in (lambda: t.sum().item(), lambda: bool(t.any()), lambda: t.unique(), lambda: t[t > 1], lambda: t.nonzero(), lambda: torch.equal(t, t)):
        with pytest.raises(Asked), NobodyAsks(): ask()
