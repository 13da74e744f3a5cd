"""The decoder against its equations: written out once more in float64, and the numbers that came out.

The weights come from a formula, so that nothing but this file is needed. The numbers were computed by `steps` below, which takes
nothing from `etrm` and agrees with what the official program answered on its own random weights (`test_official_decoder`).
"""
import numpy as np
import pytest
import torch

from etrm.model.decoder import Decoder, DecoderConfig
from etrm.model.losses import trm_loss

SIZES = dict(canvas=3, hidden_size=16, num_heads=2, L_layers=2, H_cycles=3, L_cycles=2, puzzle_emb_len=2, halt_max_steps=4)
SHAPES = {'embed_tokens.embedding_weight': (12, 16), 'lm_head.weight': (12, 16), 'q_head.weight': (2, 16), 'q_head.bias': (2,), 'H_init': (16,), 'L_init': (16,)}
for layer in (0, 1):
    SHAPES |= {f'L_level.layers.{layer}.{name}': shape for name, shape in {
        'self_attn.qkv_proj.weight': (48, 16), 'self_attn.o_proj.weight': (16, 16),
        'mlp.gate_up_proj.weight': (512, 16), 'mlp.down_proj.weight': (16, 256)}.items()}
INPUTS = torch.tensor([[2, 3, 1, 4, 5, 1, 1, 1, 0], [11, 7, 9, 2, 2, 2, 8, 3, 6], [5, 1, 0, 1, 1, 0, 0, 0, 0]])
LABELS = torch.tensor([[3, 2, 1, 5, 4, 1, 1, 1, -100], [7, 7, 7, 2, 2, 2, 8, 8, 8], [4, 4, 1, 1, 1, 1, -100, -100, -100]])

LOGITS = [  # of sample 1, place 4, after each supervision step
    [.441985, -.615011, -.83808, 1.349827, -1.896879, .265667, -.322901, -.879073, .232823, -.51115, .005302, -1.598729],
    [-.071975, -.342439, -1.499736, -.114777, -.917601, -.309278, -.679123, -.547341, .978143, -.500412, 1.16277, -2.214892],
    [.229947, .414506, -.96591, -.134446, -.010456, -1.048661, -1.226878, .156227, 1.341735, -.362154, 1.682202, -1.946966]]
SIZE = [.940356, .975256, .987283]  # root mean square of all logits
Q = [[[-1.529543, -.007611], [-1.797529, .841827], [-1.848208, -.353484]],  # halt and continue of each sample
     [[-1.319024, -.624388], [-2.641464, -.115119], [-1.677208, -.455581]],
     [[-1.255165, -.922426], [-2.510933, -.562069], [-1.959276, -.345211]]]
LOSS = [[2.516686, 2.841594, 2.698094], [2.592201, 2.549882, 2.612506], [2.595676, 2.427948, 2.539137]]
GRADIENT = {'embed_tokens.embedding_weight': .279769, 'lm_head.weight': .998816, 'q_head.weight': .253528, 'q_head.bias': .0760494,
    'L_level.layers.0.self_attn.qkv_proj.weight': .903839, 'L_level.layers.0.self_attn.o_proj.weight': .678211,
    'L_level.layers.0.mlp.gate_up_proj.weight': .811346, 'L_level.layers.0.mlp.down_proj.weight': 1.92151,
    'L_level.layers.1.self_attn.qkv_proj.weight': .853623, 'L_level.layers.1.self_attn.o_proj.weight': .745222,
    'L_level.layers.1.mlp.gate_up_proj.weight': .720882, 'L_level.layers.1.mlp.down_proj.weight': 1.87123, 'context': .0993977}


def wave(shape, phase, size):
    "Numbers without pattern or randomness, root mean square `size`."
    i = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return (2**.5 * size * torch.sin(phase + .7 * i + .013 * i * i)).reshape(shape)


def weights():
    "Every tensor of the decoder, of about the size it starts with."
    return {name: wave(shape, 2. * k, 1. if name.endswith('_init') else shape[-1]**-.5) for k, (name, shape) in enumerate(SHAPES.items())}


def context(): return wave((3, 2, 16), 50., 16**-.5)


def rms(x): return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def exact(x): return x


def bfloat16(x): return x.bfloat16().to(x.dtype)


def attention(x, qkv, out, heads, r=exact):
    "Every place reads every other; queries and keys are turned by their place first."
    B, N, D = x.shape
    d = D // heads
    q, k, v = r(x @ r(qkv).T).reshape(B, N, 3, heads, d).permute(2, 0, 3, 1, 4)
    angle = torch.arange(N, dtype=x.dtype)[:, None] * 10000. ** (-2 * torch.arange(d // 2, dtype=x.dtype) / d)
    def turned(t):
        a, b = t[..., :d // 2], t[..., d // 2:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    scores = torch.einsum('bhnd,bhmd->bhnm', r(turned(q)), r(turned(k))) / d**.5
    weight = (scores - scores.amax(-1, keepdim=True)).exp()
    read = r(weight) @ v / weight.sum(-1, keepdim=True)  # torch's kernels round the weights before they divide
    return r(r(read).transpose(1, 2).reshape(B, N, D) @ r(out).T)


def block(x, w, layer, heads, r=exact):
    part = lambda name: w[f'L_level.layers.{layer}.{name}.weight']
    x = r(rms(r(x + attention(x, part('self_attn.qkv_proj'), part('self_attn.o_proj'), heads, r))))
    gate, up = r(x @ r(part('mlp.gate_up_proj')).T).tensor_split(2, -1)
    return r(rms(r(x + r(r(r(gate / (1 + (-gate).exp())) * up) @ r(part('mlp.down_proj')).T))))


def steps(w, inputs, context, number, heads, H_cycles, L_cycles, r=exact):
    "Logits and both q of each supervision step; gradients pass through each step's last H cycle only. `r` rounds what is kept in `forward_dtype`."
    f = lambda x: block(block(x, w, 0, heads, r), w, 1, heads, r)
    T, D = context.shape[1:]
    e = r(D**.5 * r(torch.cat([context, w['embed_tokens.embedding_weight'][inputs]], 1)))
    z_H, z_L = r(w['H_init']).expand_as(e), r(w['L_init']).expand_as(e)
    for _ in range(number):
        for cycle in range(H_cycles):
            z_H, z_L = z_H.detach(), z_L.detach()
            for _ in range(L_cycles): z_L = f(r(z_L + r(z_H + e)))
            z_H = f(r(z_H + z_L))
        yield r(z_H[:, T:] @ r(w['lm_head.weight']).T), z_H[:, 0] @ w['q_head.weight'].T + w['q_head.bias']


def losses(logits, q, labels):
    "Per sample: mean stablemax cross-entropy of the labelled places, and half the halting loss."
    asked = labels != -100
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits.clamp(max=0)))
    p = (s / s.sum(-1, keepdim=True)).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    right = ((logits.argmax(-1) == labels) | ~asked).all(-1).to(q.dtype)
    halting = -(right * torch.sigmoid(q).log() + (1 - right) * torch.sigmoid(-q).log())
    return -(p.log() * asked).sum(-1) / asked.sum(-1) + .5 * halting


def by_equations():
    "What the equations give after each of three steps, and the gradient of the first step's mean loss."
    w, c = {n: t.requires_grad_(not n.endswith('_init')) for n, t in weights().items()}, context().requires_grad_()
    answers = list(steps(w, INPUTS, c, 3, *(SIZES[k] for k in ('num_heads', 'H_cycles', 'L_cycles'))))
    each = [losses(logits, q[:, 0], LABELS) for logits, q in answers]
    each[0].mean().backward()
    return answers, each, {n: t.grad for n, t in w.items() if t.requires_grad} | dict(context=c.grad)


def by_decoder():
    "The same from the package."
    decoder = Decoder(DecoderConfig(**SIZES, forward_dtype='float32'))
    decoder.load_state_dict({n: t.float() for n, t in weights().items()})
    c = context().float().requires_grad_()
    carry, answers, each = decoder.initial_carry(3), [], []
    for _ in range(3):
        carry, logits, q = decoder(carry, INPUTS, c)
        answers.append((logits, torch.stack(q, -1)))
        each.append(trm_loss(logits, q[0], LABELS)[0])
        carry.halted[:] = False
    each[0].mean().backward()
    return answers, each, {n: p.grad for n, p in decoder.named_parameters()} | dict(context=c.grad)



@pytest.mark.parametrize('source', [by_equations, by_decoder])
def test_answers_losses_and_gradients(source):
    answers, each, gradients = source()
    assert [logits[1, 4].tolist() for logits, _ in answers] == [pytest.approx(row, abs=2e-5) for row in LOGITS]
    assert [logits.square().mean().sqrt().item() for logits, _ in answers] == pytest.approx(SIZE, abs=1e-5)
    for (_, q), wanted in zip(answers, Q): assert q.tolist() == [pytest.approx(row, abs=1e-5) for row in wanted]
    for loss, wanted in zip(each, LOSS): assert loss.tolist() == pytest.approx(wanted, abs=1e-5)
    assert {name: g.norm().item() for name, g in gradients.items()} == pytest.approx(GRADIENT, rel=2e-5)


def test_the_decoder_agrees_with_the_equations_everywhere():
    for (logits, q), (wanted, wanted_q) in zip(by_decoder()[0], by_equations()[0]):
        torch.testing.assert_close(logits.double(), wanted, rtol=0, atol=2e-5)
        torch.testing.assert_close(q.double(), wanted_q, rtol=0, atol=2e-5)


@pytest.mark.parametrize('key, other', [('L_cycles', 3), ('H_cycles', 2)])
def test_another_number_of_cycles_is_noticed(key, other, monkeypatch):
    monkeypatch.setitem(SIZES, key, other)
    assert by_decoder()[0][0][0][1, 4].tolist() != pytest.approx(LOGITS[0], abs=.05)


def test_bfloat16_rounds_where_the_official_program_does():
    "What a block makes is rounded at each sum and norm; norms, rotary places and attention compute in more digits."
    decoder = Decoder(DecoderConfig(**SIZES, forward_dtype='bfloat16'))
    decoder.load_state_dict({n: t.float() for n, t in weights().items()})
    x = bfloat16(wave((3, 11, 16), 5., 1.))
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): found = decoder.L_level.layers[0](x.bfloat16(), (decoder.cos, decoder.sin))
    rounded, wide = (block(x, weights(), 0, 2, r) for r in (bfloat16, exact))
    assert found.dtype == torch.bfloat16
    assert (found.double() == rounded).double().mean() > .9  # .96: the rest is a last bit apart, for sums are made in float32
    assert (found.double() == bfloat16(wide)).double().mean() < .7  # rounded at the end only
