"""The decoder against what the official program wrote down: tensors, answers, losses, gradients, predictions.

The fixture's weights are random, and sixteen steps of recursion amplify rounding about a thousandfold: 5e-6 in the logits of step 0 is
5e-3 at step 15, in the fixture itself (against float64) as in any other float32 run; a wrong number of cycles is off by 4 from the first
step on. So the answers are compared twice. As this processor computes them: steps 0 and 1, losses and gradients of a training step within
1e-4, later steps within what rounding may have become. And in a process of their own that is held to AVX2, as the fixture's was: where
step 0 agrees there to the last bit (not every processor's AVX2 kernels add in the same order), 1e-4 is a fair demand at every step.
"""
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from etrm.training.checkpoints import load_checkpoint, read_tensors
from etrm.training.weights import compare_decoders
from etrm.model.decoder import Decoder
from etrm.model.losses import trm_loss
from test_recursion import steps as by_equations

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT.parent/'shared'/'fixtures'/'official_trm_small'
pytestmark = pytest.mark.skipif(not FIXTURE.is_dir(), reason=f'no official decoder fixture at {FIXTURE}')
PREFIX, CANVAS, FAULT = '_orig_mod.model.inner.', 10, 6  # FAULT: an L_cycles that is not the checkpoint's 4
AVX2 = dict(ATEN_CPU_CAPABILITY='avx2', MKL_ENABLE_INSTRUCTIONS='AVX2', ONEDNN_MAX_CPU_ISA='AVX2', OMP_NUM_THREADS='1')
TOLERANCE = 1e-4
ROUNDED = 3e-2  # the same for late steps where kernels add in another order: 1.5e-3 to 1.1e-2 were seen in the logits, 1.1e-3 in q


def load(): return load_checkpoint(FIXTURE/'step_1', canvas=CANVAS)


def expectation(): return torch.load(FIXTURE/'expected.pt', weights_only=True)


def with_cycles(decoder, cycles):
    "The same weights under another L_cycles, which runs without complaint."
    other = Decoder(decoder.config.with_(L_cycles=cycles))
    other.load_state_dict(decoder.state_dict())
    return other.eval()


def evaluate(decoder, table, batch, steps):
    "Logits, q_halt and summed losses of every supervision step in evaluation."
    found, carry, context = [], decoder.initial_carry(len(batch['inputs'])), table(batch['puzzle_identifiers'])
    for _ in range(steps):
        with torch.no_grad(): carry, logits, (q_halt, _) = decoder(carry, batch['inputs'], context)
        loss, sums = trm_loss(logits, q_halt, batch['labels'])
        found.append(dict(logits=logits, q_halt_logits=q_halt, loss=loss.sum(), lm_loss=sums['lm_loss'].sum(), q_halt_loss=sums['q_halt_loss'].sum()))
    return found


def train(decoder, table, batch):
    "One training step from a fresh carry: losses are summed over the batch, the gradient is that of their mean."
    decoder.train().requires_grad_(True); table.train()
    context = table(batch['puzzle_identifiers'])
    carry, logits, (q_halt, _) = decoder(decoder.initial_carry(len(context)), batch['inputs'], context)
    loss, sums = trm_loss(logits, q_halt, batch['labels'])
    loss.mean().backward()
    halted, totals = carry.halted, ('lm_loss', 'q_halt_loss')  # the official program counts metrics where a slot halts, losses everywhere
    metrics = {name: (s if name in totals else s[halted]).sum() for name, s in sums.items()} | dict(steps=carry.steps[halted].sum())
    return dict(loss=loss.detach().sum(), metrics=metrics, grad_norm={n: p.grad.norm() for n, p in decoder.named_parameters()},
                context_grad=table.touched[1].grad)


def compute():
    "Everything the tests compare, in this process."
    decoder, table, _ = load()
    batch = {name: values.long() for name, values in expectation()['batch'].items()}
    return dict(capability=torch.backends.cpu.get_cpu_capability(), eval=evaluate(decoder, table, batch, steps=16),
                fault=evaluate(with_cycles(decoder, FAULT), table, batch, steps=1), train=train(decoder, table, batch))


@pytest.fixture(scope='module')
def expected(): return expectation()


@pytest.fixture(scope='module')
def native(): return compute()


@pytest.fixture(scope='module')
def answers(native, expected, tmp_path_factory):
    "Computed with AVX2 kernels, in a process that is told so before torch is loaded."
    if platform.machine().lower() not in ('x86_64', 'amd64') or not native['capability'].startswith('AVX'):
        pytest.skip(f"late steps to 1e-4 take AVX2's rounding, this processor has {native['capability']}: they are checked within {ROUNDED}")
    out = tmp_path_factory.mktemp('official')/'answers.pt'
    done = subprocess.run([sys.executable, __file__, str(out)], env=os.environ | AVX2 | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(out, weights_only=True)
    if not torch.equal(found['eval'][0]['logits'], expected['eval'][0]['logits']):
        pytest.skip(f"late steps to 1e-4 take kernels that round as the fixture's, this processor's AVX2 ones don't: they are checked within {ROUNDED}")
    return found


def check_logits(found, expected, steps=None, atol=TOLERANCE):
    "Logits agree at every step the official program wrote them down for (or at those of `steps`)."
    given = [i for i, x in enumerate(expected) if 'logits' in x and (steps is None or i in steps)]
    assert given
    for i in given: torch.testing.assert_close(found[i]['logits'], expected[i]['logits'], rtol=0, atol=atol, msg=lambda m: f'step {i}: {m}')


def close(found, expected):
    "Relative agreement; the absolute part is for a q that happens to lie near zero."
    torch.testing.assert_close(found.double(), expected.double(), rtol=TOLERANCE, atol=1e-6)


def test_all_tensors_are_equal():
    decoder, table, config = load()
    raw = {n.removeprefix(PREFIX): t for n, t in torch.load(FIXTURE/'step_1', weights_only=True).items()}
    official_table = raw.pop('puzzle_emb.weights')
    assert (config['arch']['L_cycles'], decoder.config.L_cycles, decoder.config.puzzle_emb_len) == (4, 4, 4)
    for other in (raw, read_tensors(FIXTURE/'step_1')['decoder']):
        assert [row['verdict'] for row in compare_decoders(decoder.state_dict(), other)] == ['equal'] * 14
    assert torch.equal(table.weights, official_table)


def test_first_steps_agree_on_any_processor(native, expected):
    check_logits(native['eval'], expected['eval'], steps=(0, 1))


def test_bfloat16_agrees_within_its_rounding(expected):
    "The fixture is of float32. One supervision step in bfloat16 is 3% off in the logits and .1% in the loss; seen: .030 and .0010."
    decoder, table, _ = load()
    half = Decoder(decoder.config.with_(forward_dtype='bfloat16')).eval()
    half.load_state_dict(decoder.state_dict())
    found = evaluate(half, table, {name: values.long() for name, values in expected['batch'].items()}, steps=1)[0]
    wanted = expected['eval'][0]
    assert found['logits'].dtype == torch.bfloat16
    assert (found['logits'].float() - wanted['logits']).norm() < .05 * wanted['logits'].norm()
    torch.testing.assert_close(found['loss'].double(), wanted['loss'].double(), rtol=.005, atol=0)


def test_the_equations_of_test_recursion_agree(expected):
    decoder, table, _ = load()
    w, c = {n: t.detach().double() for n, t in decoder.state_dict().items()}, decoder.config
    context = table(expected['batch']['puzzle_identifiers'].long()).detach().double()
    found = by_equations(w, expected['batch']['inputs'].long(), context, 2, c.num_heads, c.H_cycles, c.L_cycles)
    for (logits, q), wanted in zip(found, expected['eval']):
        torch.testing.assert_close(logits, wanted['logits'].double(), rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(q[:, 0], wanted['q_halt_logits'].double(), rtol=0, atol=TOLERANCE)


def test_late_steps_agree_within_rounding_on_any_processor(native, expected):
    check_logits(native['eval'], expected['eval'], atol=ROUNDED)
    assert len(native['eval']) == len(expected['eval']) == 16
    for found, wanted in zip(native['eval'], expected['eval']):
        torch.testing.assert_close(found['q_halt_logits'], wanted['q_halt_logits'], rtol=0, atol=ROUNDED)
        for name in ('loss', 'lm_loss', 'q_halt_loss'): torch.testing.assert_close(found[name].double(), wanted[name].double(), rtol=1e-3, atol=0)
    assert (native['eval'][-1]['logits'].argmax(-1) != expected['preds']).float().mean() < .01  # 600 cells: another answer for one whose best two logits nearly tie


def test_logits_agree_at_every_given_step(answers, expected):
    assert [i for i, x in enumerate(expected['eval']) if 'logits' in x] == [0, 1, 15]
    check_logits(answers['eval'], expected['eval'])


@pytest.mark.parametrize('name', ['q_halt_logits', 'loss', 'lm_loss', 'q_halt_loss'])
def test_every_step_has_the_official_q_and_losses(answers, expected, name):
    assert len(answers['eval']) == len(expected['eval']) == 16
    for found, wanted in zip(answers['eval'], expected['eval']): close(found[name], wanted[name])


def test_predictions_are_equal(answers, expected):
    assert torch.equal(answers['eval'][-1]['logits'].argmax(-1), expected['preds'])


def test_training_loss_and_metrics(native, expected):
    found, wanted = native['train'], expected['train']
    close(found['loss'], wanted['loss'])
    assert found['metrics'].keys() == wanted['metrics'].keys()
    for name, value in wanted['metrics'].items(): close(found['metrics'][name], value)


def test_gradients(native, expected):
    found, wanted = native['train'], expected['train']
    norms = {name.removeprefix(PREFIX): norm for name, norm in wanted['grad_norm'].items()}
    assert found['grad_norm'].keys() == norms.keys()
    for name, norm in norms.items(): assert found['grad_norm'][name].item() == pytest.approx(norm.item(), rel=TOLERANCE), name
    difference, size = (found['context_grad'] - wanted['context_grad']).norm(dim=1), wanted['context_grad'].norm(dim=1)
    assert (difference <= TOLERANCE * size).all(), difference / size


def test_another_number_of_cycles_is_noticed(native, expected):
    with pytest.raises(AssertionError, match='step 0'): check_logits(native['fault'], expected['eval'], steps=(0,), atol=ROUNDED)


if __name__ == '__main__': torch.save(compute(), sys.argv[1])
