"""Properties against independent oracles; `python test_greg.py [bench]`: README's map [speed]."""

import ast
import builtins
import copy
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import symtable
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import example, given, register_random, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import optimize, stats
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torchvision import transforms as T

import greg

settings.register_profile("suite", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("suite")
torch.set_num_threads(1)
TORCH = Mock(seed=torch.manual_seed, getstate=torch.get_rng_state, setstate=torch.set_rng_state)
register_random(TORCH)  # Hypothesis seeds `random` and NumPy, but torch only if it is told how
HERE, CPU, seeds = Path(greg.__file__).parent, torch.device("cpu"), st.integers(0, 2**32 - 1)

generator = lambda seed: torch.Generator().manual_seed(seed)  # noqa: E731
pixels = lambda seed, *n: torch.randint(256, n, generator=generator(seed), dtype=torch.uint8)  # noqa: E731
normal = lambda seed, *n, dtype=torch.double: torch.randn(n, generator=generator(seed), dtype=dtype)  # noqa: E731
seeded = torch.random.fork_rng()(lambda seed, build: torch.manual_seed(seed) and build())


def refuses(call, *words, error=ValueError):  # `call` raises it, in one line that holds all words
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in (text := str(caught.value)) and all(word in text for word in words), text


# ---- Loss masking (section 2)
sides, reductions = st.tuples(*[st.integers(1, 4)] * 2), st.sampled_from(["paper", "released"])
outputs = st.sampled_from([lambda f: f, lambda f: (f, 0 * f), lambda f: {"z": 0 * f, "logits": f}])
labels = st.sampled_from([list, torch.Tensor.int, lambda y: F.one_hot(y, 3).double()])
FOREIGN = {  # small networks, with attention and activation checkpointing
    "ResNet": lambda tv: tv.ResNet(tv.resnet.BasicBlock, [1] * 4, 4),
    "DenseNet": lambda tv: tv.DenseNet(8, (2, 2), 16, 2, num_classes=4, memory_efficient=True),
    "ConvNeXt": lambda tv: tv.ConvNeXt([tv.convnext.CNBlockConfig(8, None, 2)], 0, num_classes=4),
    "Swin": lambda tv: tv.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=4),
    "ViT": lambda tv: tv.VisionTransformer(16, 8, 1, 2, 16, 16, num_classes=4),
    "timm ResNet": lambda timm: timm.ResNet(timm.resnet.BasicBlock, [1] * 4, 4),
    "timm ViT": lambda timm: timm.VisionTransformer(16, 8, 3, 4, "token", 16, 2, 2),
}


def smooth_net(seed, K=3):  # twice differentiable; in training every sample feels every other
    layers = nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Softplus()
    net = greg.Net(nn.Sequential(*layers), 8, K).double()
    nn.utils.vector_to_parameters(normal(seed, 200), net.parameters())
    return net


@given(seeds, sides, st.booleans(), reductions, outputs, labels, st.sampled_from([0.7, 0.0]))
def test_each_sample_reaches_one_of_equations_1_and_3(seed, sides, train, how, out, labels, lam):
    net, (n, m), calls = smooth_net(seed).train(train), sides, []
    x, y = normal(seed, n + m, 2, 3), torch.randint(3, (n,), generator=generator(seed))
    S = lambda v: -net(v).exp().sum(1).log()  # noqa: E731
    s, J = S(x), torch.autograd.functional.jacobian(S, x, create_graph=True).flatten(2)
    cuts = torch.rand(2, generator=generator(seed)).double().sort().values
    m_in, m_aux = s.detach().quantile(cuts).tolist()
    margin, share = s.new_tensor([[m_in] * n + [m_aux] * m, [1 / n] * n + [1 / m] * m])
    right = torch.cat([s[:n] <= m_in, s[n:] >= m_aux])
    one = ((s - margin) ** 2 * share)[~right].sum()
    three = (J[right].sum(0).norm(dim=1) * share)[right].sum() / (1 if how == "paper" else n + m)
    ce, three = F.cross_entropy(net(x)[:n], y), three if lam else 0 * one
    net.register_forward_hook(lambda net, x, f: calls.append(x[0]) or out(f))
    ours = greg.greg_loss(net, x[:n], labels(y), x[n:], m_in, m_aux, 0.3, lam, how)
    (seen,) = calls  # one forward
    assert torch.equal(seen, x) and seen.requires_grad == ours.gradient.requires_grad == (lam > 0)
    torch.testing.assert_close((greg.energy_score(ours.logits), ours.scores), (s, s))
    wanted, weights = (ce + 0.3 * one + lam * three, ce, one, three), list(net.parameters())
    for pair in zip(ours[:4], wanted, strict=True):
        torch.testing.assert_close(*(t.detach() for t in pair))
        if pair[0].requires_grad:
            slopes = (torch.autograd.grad(t, weights, retain_graph=True) for t in pair)
            torch.testing.assert_close(*slopes)


def test_a_score_on_its_margin_is_on_the_right_side_and_a_zero_gradient_has_norm_zero():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    s, w = x @ torch.tensor([3.0, 4.0]), torch.zeros(2, requires_grad=True)  # 11, 25: slopes of 5
    for m_in, m_aux in (11.0, 26.0), (10.0, 25.0):
        assert greg.gradient_loss(s, x, 1, m_in, m_aux).item() == pytest.approx(5.0)
    assert greg.gradient_norm(s[:, None], x, torch.ones(2)).tolist() == [5, 5]  # a column too
    (norm := greg.gradient_norm(x @ w, x)).sum().backward()
    assert norm.tolist() == [0, 0] and w.grad.tolist() == [0, 0]


def test_the_defaults_are_those_of_the_papers():
    own = {
        greg.energy_loss: (-25, -7), greg.poem_posterior: (20, 0.5), greg.conv_norm: (1, 0, 1, 1),
        greg.greg_loss.__wrapped__: (-25, -7, 0.1, 1, "paper", greg.energy_score, None),
        greg.balanced_energy_loss: (-25, -7, 10, 0.05), greg.kmeans: (3, 100, 1e-4, None),
        greg.gradient_loss: (-25, -7, "paper"), greg.quantile_mining: (0.125,),
        greg.odin: (1000, 0.0014, (1,), None), greg.fpr_at_tpr: (0.95,), greg.threshold: (0.95,),
        greg.smoothed_radius: (0.001,), greg.smoothing_radius: (1000, 0.001, None)}  # fmt: skip
    assert {f: f.__defaults__ for f in own} == own and greg.attack.__wrapped__.__defaults__[0] == 20


def test_other_scores_and_losses_take_the_places_of_s_and_equation_1_and_all_are_float32():
    net, x, y, seen = smooth_net(3).eval(), normal(3, 5, 6), torch.tensor([0, 1]), []
    more = lambda f: -f.softmax(1).amax(1), lambda *f: seen.extend(f) or greg.oe_loss(*f)
    out = greg.greg_loss(net, x[:2], y, x[2:], 0.0, -9.0, 0.5, 2.0, "released", *more)
    v, f = x.clone().requires_grad_(), net(x)
    penalty = greg.gradient_loss(more[0](net(v)), v, 2, 0.0, -9.0, "released")
    expected = F.cross_entropy(f[:2], y) + 0.5 * greg.oe_loss(None, f[2:], None) + 2 * penalty
    torch.testing.assert_close((out.loss, *seen), (expected, f[:2], f[2:], y))
    net, x = nn.Sequential(net, torch.compile(nn.Identity(), backend="eager")), x.bfloat16()
    in_place = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)).bfloat16()
    assert greg.greg_loss(in_place, x[:2], y, x[2:], 98, 99).gradient > 0 > x.min()
    out = greg.greg_loss(net.bfloat16(), x[:2], y, x[2:], lambda_grad=0)  # as compiled ones need
    assert out.logits.dtype == torch.bfloat16 and out.scores.dtype == out.ce.dtype == torch.float32


@given(seeds, st.integers(1, 5), st.integers(2, 6), st.sampled_from([1e-3, 1.0, 30.0]))
@torch.autocast("cpu", torch.bfloat16)  # which they are not to heed
def test_scores_of_logits_and_the_compared_losses_are_what_they_are_called(seed, n, K, scale):
    f, y = scale * normal(seed, n, K + 1), torch.randint(K, (n,), generator=generator(seed))
    p, S, prior = f.softmax(1), -f.exp().sum(1).log(), normal(seed + 1, K + 1).exp()
    for score, s in (greg.energy_score, S), (greg.msp, -p.amax(1)), (greg.absent, p[:, K]):
        torch.testing.assert_close(score(f), s)
        assert torch.equal(score(f.bfloat16()), score(f.bfloat16().float()))
    uniform = F.kl_div(f.log_softmax(1), torch.full_like(f, 1 / (K + 1)), reduction="batchmean")
    absent = F.cross_entropy(f, torch.full((n,), K))
    mixed, Z = 0.25 * F.cross_entropy(f, y) + 0.75 * absent, p @ prior**0.05 / (prior**0.05).sum()
    weighted = (Z * (-2 - (S - 10 * Z)).clamp(min=0) ** 2).sum() / Z.sum()  # Eq. (1), by class
    balanced = ((5 + S[:2]).clamp(min=0) ** 2).mean() + weighted
    ours = greg.balanced_energy_loss(f[:2], f, y, prior, -5, -2), greg.oe_loss(None, f, None)
    ours += greg.absent_loss(None, f, y), greg.openmix_loss(None, f, y, 0.25)
    torch.testing.assert_close(ours, (balanced, uniform, absent, mixed))
    low = greg.balanced_energy_loss(f[:2].float(), f.float(), y, prior.float(), -5, -2)
    assert low.item() == pytest.approx(balanced.item(), rel=1e-4)
    never = torch.eye(K + 1)[0]  # a class that no auxiliary image has: Z underflows to 0
    assert greg.balanced_energy_loss(f, -1e4 * never.expand(n, -1), y, never, gamma=1.0) >= 0


@pytest.mark.parametrize("name", FOREIGN)
def test_any_network_has_features_and_a_loss_with_the_gradient_of_differences(name):
    def loss(step):  # margins that have every ID image count in Eq. (3)
        nn.utils.vector_to_parameters(w + step * v, weights)
        return greg.greg_loss(net, x[:2], torch.tensor([1, 3]), x[2:], 99.0, 100.0, 0.0, 3.0)

    library = pytest.importorskip("timm" if "timm" in name else "torchvision").models
    net = seeded(0, lambda: FOREIGN[name](library)).double().eval()
    if "timm" in name:
        net.set_grad_checkpointing()
    x, weights, h = normal(2, 4, 3, 16, 16), list(net.parameters()), 1e-7
    w = torch.cat([p.detach().flatten() for p in weights])
    w, v = w + 0.05 * normal(1, len(w)), normal(3, len(w))  # away from zeros that networks start at
    out = loss(0)
    with sdpa_kernel(SDPBackend.MATH):  # as backward() through checkpointed attention needs it
        grads = torch.autograd.grad(out.loss, weights, materialize_grads=True)
    slope = torch.cat([g.flatten() for g in grads]) @ v
    differences = (loss(h).loss - loss(-h).loss).item() / (2 * h)
    assert out.gradient > 0 and slope.item() == pytest.approx(differences, rel=2e-3)
    heads, projection = [m for m in net.modules() if type(m) is nn.Linear], nn.Linear(4, 7).double()
    net.add_module("projection", projection)  # as contrastive losses use it, after the head
    for wrap in lambda f: f, lambda f: (f, projection(f)), lambda f: {"z": -f, "logits": f}:
        with net.register_forward_hook(lambda net, x, f, wrap=wrap: wrap(f)):
            z, f = greg.features_and_logits(net, x)
        torch.testing.assert_close((heads[-1](z), f), (f, net(x)))
    assert not any(m._forward_hooks for m in net.modules()) and z.dim() == 2


# ---- Clustering invariants (section 3)
@given(seeds, st.tuples(st.integers(1, 40), st.integers(1, 5)), st.integers(1, 40))
def test_kmeans_ends_at_a_fixed_point_whatever_the_ties(seed, size, k):
    x, k = (2 * normal(seed, *size)).round().float(), min(k, size[0])
    labels, c, _ = found = greg.kmeans(x, k, tol=0.0, generator=generator(seed))
    torch.manual_seed(seed + 1)  # does not matter
    assert all(map(torch.equal, found, greg.kmeans(x, k, tol=0.0, generator=generator(seed))))
    assert len(labels.unique()) == min(k, len(x.unique(dim=0))) and c.shape == (k, size[1])
    assert all(torch.allclose(c[j], x[labels == j].mean(0), atol=1e-5) for j in labels.unique())


def lloyd(x, c, steps, tol):  # by recursion: points farthest from theirs fill empty clusters
    d = torch.cdist(x, c).square()
    if steps == 0:
        return d.argmin(1), c, d.min(1).values.sum()
    far = iter(x[d.min(1).values.argsort(descending=True)])
    clusters = [x[d.argmin(1) == j] for j in range(len(c))]
    new = torch.stack([mine.mean(0) if len(mine) else next(far) for mine in clusters])
    moves = (new - c).square().sum() > tol * x.var(0, correction=0).mean()
    return lloyd(x, new, steps - 1 if moves else 0, tol)


@given(seeds, st.integers(15, 30), st.integers(1, 3), st.integers(2, 7), st.integers(1, 7),
       st.sampled_from([0.0, 0.3, 1.0, 3.0]), st.sampled_from([1, 5]),
       st.sampled_from([(1, 0), (1, 1000), (1e37, 0), (1e-37, 0)]))  # fmt: skip
def test_kmeans_is_the_best_of_lloyds_iterations(seed, n, d, k, max_iter, tol, spread, place):
    starts, (unit, origin) = spread * normal(seed + 1, 3, k, d), place
    x = (normal(seed, n, d) * unit + origin).float()
    size, c = x.abs().max(), iter((starts * unit + origin).float())
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(greg, "_seeds", lambda *a: next(c) / size - (x / size).mean(0))
        labels, ours, inertia = greg.kmeans(x, k, 3, max_iter, tol)
    assert ours.dtype == inertia.dtype == torch.float32
    x, ours = (x.double() - origin) / unit, (ours.double() - origin) / unit
    runs = [lloyd(x, start, max_iter, tol) for start in starts]
    assert any(torch.equal(labels, r[0]) and torch.allclose(ours, r[1], atol=1e-3) for r in runs)
    best = min(run[2].item() for run in runs)
    assert unit != 1 or inertia.item() == pytest.approx(best, rel=1e-3, abs=1e-4)


@given(seeds)
def test_kmeans_finds_small_clusters_far_out_among_many_points_in_any_order(seed):
    pairs = 100 * torch.eye(8).repeat_interleave(2, 0)
    x, order = torch.cat([normal(seed, 2000, 8).float(), pairs]), torch.randperm(2016)
    labels = greg.kmeans(x[order], 9, 1, 1, generator=generator(seed))[0][order.argsort()]
    assert labels[2000:].unique(return_counts=True)[1].tolist() == [2] * 8
    assert len(labels[:2000].unique()) == 1 and len(labels.unique()) == 9


@given(seeds, st.integers(2, 40), st.integers(1, 4), st.integers(1, 20), st.booleans())
def test_samplers_take_the_ends_of_each_cluster_and_make_up_the_number(seed, n, d, k, ties):
    k, z, s = min(k, n // 2), normal(seed, n, d, dtype=torch.float32), normal(seed + 1, n)
    s, g = s.round() if ties else s, functools.partial(generator, seed)
    labels = greg.kmeans(F.normalize(F.normalize(z, math.inf)), k, generator=g())[0]
    hard = s.argsort(stable=True)[n // 8 :][: n // 2].sort().values  # NTOM skips an eighth
    assert torch.equal(greg.quantile_mining(s, len(hard)), hard)
    for row, v, ends in (greg.ENERGY_SAMPLING, -s, (min, max)), (greg.DOS_SAMPLING, s, (min,)):
        chosen = row.pick(z, f := F.pad(v[:, None], (1, 0)), k, g())  # logits that rank as s does
        assert len(chosen) == len(chosen.unique()) == len(ends) * k == row.per_id * k
        for j, end in itertools.product(labels.unique(), ends):
            assert end(s[chosen[labels[chosen] == j]]) == end(s[labels == j])
        lengths = 2.0 ** torch.randint(-80, 90, (n, 1), generator=g())  # directions count
        assert torch.equal(chosen, row.pick(z * lengths, f, k, g()))


def test_candidates_that_fill_no_cluster_are_topped_up_at_random():
    z, s = torch.eye(2)[[0] * 9 + [1]], torch.arange(10.0)  # a cluster of nine and one of one
    draws = torch.cat([greg.energy_sampling(z, s, 2, generator(i)) for i in range(200)])
    assert draws.bincount()[[0, 8, 9]].tolist() == [200] * 3 and draws.bincount().min() > 10


@given(seeds, st.integers(1, 30), st.integers(1, 5), st.floats(0.1, 30), st.floats(0.1, 3))
def test_poem_has_the_posterior_of_the_normal_equations(seed, n, d, sigma, sigma_n):
    Z, y = normal(seed, n, d), normal(seed + 1, n)
    mean, factor = greg.poem_posterior(Z.T @ Z, Z.T @ y, sigma, sigma_n)
    gain = sigma * Z.T @ torch.linalg.inv(sigma * Z @ Z.T + sigma_n * torch.eye(n).double())
    ours = mean, torch.cholesky_inverse(factor)  # in the dual: the Gaussian of (beta, y), given y
    wanted = gain @ y, sigma * (torch.eye(d).double() - gain @ Z)
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-8)
    off = greg.poem_draw(mean, factor, generator(seed)) - mean  # L' off is white
    torch.testing.assert_close(factor.T @ off, normal(seed, d, 1)[:, 0])


def test_losses_and_samplers_refuse_in_one_line_what_would_be_wrong_without_a_word():
    def step(net, n=2, m=4, lam=1.0, m_in=-25.0, m_aux=-7.0):
        greg.greg_loss(net, z[:n, :2], [0, 1][:n], z[:m, :2], m_in, m_aux, lambda_grad=lam)

    net, in_place, by_forward, parallel, hooked = (nn.Sequential(nn.Linear(2, 3)) for _ in range(5))
    hooked[0].register_forward_hook(lambda m, z, f: f / 2)
    named = type("Named", (nn.Sequential,), {"forward": lambda m, x: m[0](input=x)})(net[0])
    in_place[0].compile()
    by_forward[0].forward, parallel[0].static_graph = torch.compile(by_forward[0].forward), True
    z, s, A = torch.ones(5, 2), torch.ones(5), torch.zeros(3, 2, requires_grad=True)
    for words, function, *calls in (
        ("compiled", step, (torch.compile(net),), (nn.Sequential(torch.compile(net)),)),
        ("compiled", step, (in_place,), (by_forward,)), ("no_grad", torch.no_grad()(step), (net,)),
        ("m_in < m_aux", step, *[(net, 2, 4, 0, *m) for m in ((-7, -9), (-7, -7), (-math.inf, 0))]),
        ("auxiliary", step, (net, 0), (net, 0, 4, 0), (net, 2, 0), (net, 2, 0, 0)),
        ("auxiliary scores|[5", greg.energy_loss, (s, s[:0]), (z, s), (s, z)),
        ("requires_grad_", greg.gradient_norm, (z[0], z), (z[:3, 0], A), (A.sum(1), z[:3])),
        ("one score", greg.gradient_norm, (A.new_ones(3, requires_grad=True), A), (A.sum(), A)),
        ("reduction|n_in", greg.gradient_loss, (A.sum(1), A, 0), (A.sum(1), A, 3), (A.sum(1),
            A, 1, -25, -7, "")), ("no_grad", torch.no_grad()(greg.gradient_norm), (A.sum(1), A)),
        ("linear|[N,K]", greg.features_and_logits, (net[0], z[None]), (hooked, z), (named, z)),
        ("[N,d]|1 <= k <= N|k=", greg.kmeans, (s, 1), (z, 0), (z, -1), (z, 6)),
        ("one try|n_init|max_iter", greg.kmeans, (z, 1, 0), (z, 1, 1, 0)),
        ("finite", greg.kmeans, (z * math.nan, 1), (z * math.inf, 1)),
        ("from 5 candidates", greg.energy_sampling, (z, s, 3), (z, s, 0)),
        ("scores [4]", greg.energy_sampling, (z, s[:4], 1)), ("static_graph", step, (parallel,)),
        ("5 of them NaN", greg.energy_sampling, (z, s * math.nan, 1)),
        ("NTOM|5", greg.quantile_mining, (s, 4, 0.4), (s * math.nan, 1), (z, 1), (s, 1, -0.5)),
        ("float ID and aux", greg.greg_loss, (net, *[z.byte()] * 3), *[(net, z, s, v) for v in (
            z.byte(), z.double(), z[:, 1:])], (net, z[:0], s[:0], z, 0, 1, 0, 0, "", len, len)),
        ("float64", greg.poem_posterior, (z, z[0].double()), (z.double(), z[0]))):  # fmt: skip
        for arguments in calls:
            refuses(functools.partial(function, *arguments), *words.split("|"))


# ---- Lipschitz certificate bounds (section 4)
RELU, conv = nn.ReLU(), functools.partial(nn.Conv2d, kernel_size=3, padding=1)  # RELU: one for all
matrix = lambda f, x: torch.autograd.functional.jacobian(f, x).view(-1, x.numel())  # noqa: E731
scores = torch.no_grad()(lambda net, x: greg.energy_score(net(x)))


def layer(code, c):  # a layer for c channels by its letter
    thin = nn.Sequential(conv(c, 3, bias=False), nn.BatchNorm2d(3), RELU, conv(3, c))
    return {
        "c": conv(c, 4), "s": conv(c, 4, stride=2), "1": nn.Conv2d(c, 3, 1), "b": nn.BatchNorm2d(c),
        "L": nn.Linear(c, 5), "a": nn.AvgPool2d(3, 2, 1), "p": nn.AdaptiveAvgPool2d(1),
        "m": nn.MaxPool2d(3, 2, 1), "r": RELU, "R": greg.Residual(thin, nn.Identity()),
        "P": greg.Residual(nn.Sequential(conv(c, 4), RELU, conv(4, 4)), nn.Conv2d(c, 4, 1)),
        "D": greg.Concat(nn.Sequential(nn.BatchNorm2d(c), RELU, conv(c, 2), nn.Dropout())),
        "n": greg.Normalize([0.3 - i for i in range(c)], [0.4 + i for i in range(c)]),
    }[code]  # fmt: skip


def network(layers, seed, shape=(2, 6, 6), K=3):  # weights of all signs and sizes, BN's <= 0 too
    x, h = torch.zeros(1, *shape), nn.Sequential()
    for m in layers:
        h.append(layer(m, x.shape[1]) if isinstance(m, str) else m)
        x = h[-1].eval()(x)
    net = greg.Net(h.append(nn.Flatten()), x.numel(), K).double().eval()
    for i, (name, v) in enumerate(net.state_dict().items()):
        if v.is_floating_point() and "std" not in name:
            v.copy_(1.5 * normal(seed + i, *v.shape) / (v[0].numel() ** 0.5 if v.dim() > 1 else 5))
            v.copy_(v.square() + 0.1 if "var" in name else v * (v.abs() > 0.02))
    net.shape = shape
    return net


def networks(letters="cs1brRPDanp"):  # strategy: a network of images or of vectors
    images, vectors = (st.text(v, min_size=2, max_size=5) for v in (letters, "Lr"))
    return st.builds(network, images, seeds) | st.builds(network, vectors, seeds, st.just((2,)))


def around(net, x, eps, seed, n=30):  # points within eps of x: x, random ones, where attacks go
    inside = torch.rand(n, 1, generator=generator(seed), dtype=x.dtype) ** 0.2 * (1 - 1e-9)
    u = F.normalize(normal(seed + 1, n, x.numel())) * eps * inside
    ends = [greg.attack(net, x, v, eps, 5, 1).x for v in (-math.inf, math.inf)]
    return torch.cat([x, x + u.view(n, *x.shape[1:]), *ends])


@given(seeds, st.floats(0, 1e6), st.floats(0, 1e6), st.floats(-1e3, 1e3, width=16))
def test_radius_of_equation_4_is_the_margin_over_l_and_capped(seed, lipschitz, eps, gamma):
    s = F.pad(100 * normal(seed, 5, dtype=torch.float32), (0, 1), value=gamma)
    want = torch.where(s == gamma, 0.0, (s.double() - gamma).abs() / lipschitz)
    assert greg.certified_radius(s, gamma, want.new_full((6,), lipschitz)).equal(want)
    assert greg.certified_radius(s, gamma, lipschitz, eps).equal(want.clamp(max=eps))


@given(seeds, *[st.integers(1, 3)] * 6, st.integers(0, 2), st.integers(1, 2), st.integers(1, 2))
def test_conv_norm_is_circular_and_a_bound(seed, c_in, c_out, k1, k2, s1, s2, p, d, groups):
    def norm(p, *hw, **wrap):
        f = lambda x: F.conv2d(F.pad(x, p, **wrap), weight, **options)  # noqa: E731
        return torch.linalg.matrix_norm(matrix(f, normal(0, 1, c_in * groups, *hw)), 2).item()

    weight = normal(seed, c_out * groups, c_in, k1, k2) * (1, 0, 1e-200, 1e200)[seed % 4]
    options = dict(stride=(s1, s2), dilation=d, groups=groups)
    torus = [s if k == 1 else -(-(n + 2 * p) // s) * s for n, k, s in ((6, k1, s1), (5, k2, s2))]
    circular = norm((0, d * (k2 - 1), 0, d * (k1 - 1)), *torus, mode="circular")
    bound = greg.conv_norm(weight, (6, 5), padding=p, **options)  # no window that is kept wraps
    assert norm((p, p, p, p), 6, 5) <= bound == pytest.approx(circular, rel=1e-7, abs=0)


@given(networks())
def test_global_rules_bound_the_matrix_of_a_net_without_relus_and_are_exact_alone(net):
    def over_weights(net):  # at most 1: this says more than that max w is a bound
        x = torch.zeros(1, *net.shape).double()
        w = greg._propagate(net.features, x, x.new_ones(x.shape[1])).detach().clamp(min=1e-30)
        return torch.linalg.matrix_norm(matrix(net.features, x) / w[:, None], 2).item()

    for m in [*net.modules()]:
        m._modules.update({k: nn.Identity().eval() for k, v in m._modules.items() if v is RELU})
    assert over_weights(net) <= 1 + 1e-8
    for m in (
        nn.AdaptiveAvgPool2d(1), nn.AvgPool2d((1, 4)), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1),
        greg.Normalize((0.5, 0.4), (0.3, 0.7)), greg.Concat(greg.Normalize((0.5, 0.5), (9.0, 9.0))),
        greg.Residual(greg.Normalize((0.5, 0.5), (9.0, 9.0)), nn.Identity())):  # fmt: skip
        assert over_weights(network([m], 0, (2, 4, 4))) == pytest.approx(1)
    for options in (2, 2), (3, 2), (2, 1), ((3, 1), 1):  # of max-pools: one pixel wins all windows
        pool = nn.Sequential(nn.MaxPool2d(*options), nn.Flatten()).eval()
        most = pool(torch.eye(36).view(36, 1, 6, 6)).norm(dim=1).max().item()
        assert most == pytest.approx(greg.lipschitz_global(pool, (1, 6, 6)))
    net = network("", 0, (3,))
    assert greg.lipschitz_global(net, (3,)) == pytest.approx(net.fc.weight.norm(dim=1).max().item())


@given(networks("cs1brRPDanpmm"), seeds, st.floats(-4, 0.5))
def test_constants_bound_all_slopes_of_s_and_f_is_affine_in_the_region(net, seed, exponent):
    def kinks(x):  # the inputs of all ReLUs, and a constant
        found = [x.new_ones(1)]
        hook = RELU.register_forward_hook(lambda m, a, _: found.append(a[0].flatten()))
        net(x)
        hook.remove()
        return torch.cat(found)

    x, eps = normal(seed, 2, *net.shape), 10**exponent
    v, bounds = x[:1], [(100 * eps, greg.lipschitz_global(net, net.shape))]
    if not any(type(m) is nn.MaxPool2d for m in net.modules()):
        bounds.append((eps, greg.lipschitz_local(net, x, x.new_tensor([eps, 2 * eps]))[0].item()))
        z, A, eps_hat = greg.linear_region(net, x[0])
        size = matrix(kinks, v).norm(dim=1)
        ratio = torch.where(size > 1e-12, kinks(v).abs() / size, math.inf)
        assert eps_hat == pytest.approx(ratio.min().item(), rel=1e-6)
        near = around(net, v, min(eps_hat, 1e3) * (1 - 1e-6), seed + 2)
        for got, want in (matrix(net, v), A), (net(near), z + (near - v).flatten(1) @ A.T):
            assert torch.allclose(got, want, rtol=1e-12, atol=1e-9 * (1 + A.abs().max().item()))
        if eps_hat > 1e-4:  # the local constant tends to the gradient's norm
            limit, slope = greg.lipschitz_local(net, v, 1e-15), greg.input_gradients(net, v)
            assert limit.item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-9)
    for radius, lipschitz in bounds:
        near = around(net, v, radius, seed + 2)
        s, distance = scores(net, near), (near - v).flatten(1).norm(dim=1)
        assert greg.input_gradients(net, near).max() <= lipschitz * (1 + 1e-9) + 1e-12
        assert ((s - s[0]).abs() <= lipschitz * distance + 1e-9 * (1 + s.abs().max())).all()


@given(seeds, st.integers(1, 4), st.integers(1, 3), st.floats(0.01, 3))
def test_radii_of_the_affine_map_are_sound_on_either_side_and_as_tight_as_stated(seed, K, D, m):
    z, A = normal(seed, K), normal(seed + 1, K, D)
    s, gradient = -torch.logsumexp(z, 0).item(), z.softmax(0) @ A
    id_side, ood_side = greg.id_radius(z, A, s + m), greg.ood_radius(z, A, s - m)
    u = F.normalize(torch.cat([normal(seed + 2, 300, D), A, -A, gradient[None], -gradient[None]]))
    high, low = (-torch.logsumexp(z + r * u @ A.T, 1) for r in (id_side, ood_side))
    assert high.max() <= s + m + 1e-9 and low.min() >= s - m - 1e-9
    norm, a, R = gradient.norm().item(), A.norm(dim=1), torch.cdist(A, A).max().item()
    by_row = optimize.brentq(lambda r: (z + r * a).logsumexp(0).item() + s - m, 0, 1e3, xtol=1e-13)
    tangent = 4 * (math.sqrt(norm**2 + R**2 * m / 2) - norm) / R**2 if R else m / norm
    assert id_side == pytest.approx(m / norm, rel=1e-9)
    assert ood_side == pytest.approx(max(by_row, tangent), rel=1e-7)
    assert greg.id_radius(z, A, s - m) == greg.ood_radius(z, A, s + m) == 0
    assert greg.id_radius(z, 0 * A, s + m) == greg.ood_radius(z, 0 * A, s - m) == math.inf


@given(seeds, st.sampled_from(["n1r", "ncbr", "bc1r", "ccr", "sr", "LLr"]), st.floats(-3, 0))
def test_local_constant_is_that_of_textbook_intervals_and_its_first_box_exact(seed, codes, power):
    shape, eps = (3,) if "L" in codes else (2, 4, 4), 10**power
    net, x = network(codes, seed, shape), normal(seed, 1, *shape)
    first = re.search("[c1sL]", codes).end()  # its box is exact, those of the rest are boxes' boxes
    head, rest = net.features[:first], net.features[first:-2]
    W, U, V, b = matrix(head, x), matrix(rest, head(x)), net.fc.weight, net.fc.bias
    times = lambda W, ends: (W * ends[:, None]).sort(0).values.sum(2)  # noqa: E731
    ends = rest(head(x)).flatten() + eps * U.abs() @ W.norm(dim=1) * torch.tensor([[-1], [1]])
    corners = [torch.stack(z).softmax(0) for z in itertools.product(*(times(V, ends.relu()) + b).T)]
    low, high = times(V.T, torch.stack(torch.stack(corners).aminmax(dim=0)))
    low, high = (low * (ends > 0)).amin(0), (high * (ends > 0)).amax(0)
    want = times(W.T, times(U.T, torch.stack([low, high]))).abs().amax(0).norm().item()
    assert greg.lipschitz_local(net, x, eps).item() == pytest.approx(want, rel=1e-7)
    assert greg.lipschitz_local(network("crDaP", 3), normal(5, 1, 2, 6, 6), 1e308) == math.inf
    net = network([m for _ in range(3) for m in (nn.Linear(1, 1), RELU)], 66, (1,))  # rounding
    assert 0 <= np.diff([greg.lipschitz_local(net, normal(7, 1, 1), e).item() for e in (1, 1e20)])


def test_certified_radii_are_exact_where_s_is_affine_and_each_part_of_certify_is_its_own():
    net, x, gamma = network("", 0, (3,), 1), normal(1, 4, 3), 0.3
    exact = (scores(net, x) - gamma).abs() / net.fc.weight.norm().item()
    for name, r in greg.certify(net, x, gamma, True).items():
        assert torch.allclose(r, exact, rtol=1e-6) and (r < exact * (1 - 5e-10)).all(), name
    net, x = network("LrL", 1, (2,)).float(), normal(1, 6, 2).float()
    gamma = (s := scores(wide := copy.deepcopy(net).double(), x.double())).mean().item()
    radii = torch.inference_mode()(greg.certify)(net, x, gamma, regions=True)
    assert net.fc.weight.dtype == torch.float32  # float64 is that of a copy
    assert radii.keys() - greg.certify(net, x, gamma) == {"region"}
    rows = x.double(), s.tolist(), radii["region"].tolist(), radii["local"].tolist()
    for v, t, region, local in zip(*rows, strict=True):
        z, A, eps_hat = greg.linear_region(wide, v[None])
        side = greg.id_radius if t <= gamma else greg.ood_radius
        assert region == pytest.approx(min(eps_hat, side(z, A, gamma)), rel=1e-8)
        for e in local, local * (1 + 1e-6) + 1e-8:  # ε L(ε) = |γ - S(x)| at the best ε
            assert (e * greg.lipschitz_local(wide, v[None], e) <= abs(t - gamma)) == (e == local)


def test_what_has_no_rule_is_refused_by_name_at_any_depth():
    x, exp, hooked, exp.forward = torch.zeros(1, 2, 6, 6), nn.Identity(), nn.Identity(), torch.exp
    hooked.register_forward_hook(print)
    rows = [(m, 2, slice(3)) for m in (
        exp, hooked, nn.GELU(), type("Doubled", (nn.Linear,), {})(6, 6), nn.ReLU(inplace=True),
        nn.BatchNorm2d(2, affine=False), nn.BatchNorm2d(2, track_running_stats=False),
        nn.AvgPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d(2, divisor_override=1), nn.AdaptiveAvgPool2d((1, 2)), conv(2, 2, groups=2),
        conv(2, 2, padding="same"), conv(2, 2, padding_mode="circular"), conv(2, 2, dilation=2),
        nn.Flatten(0), nn.Flatten(1, 2), nn.MaxPool2d(2, return_indices=True))]  # fmt: skip
    rows += [  # the global rule alone knows max-pools, the others alone Linear, Residual
        (nn.MaxPool2d(3, 1, 1), 2, slice(1, 3)), (nn.Linear(6, 6), 2, slice(1)),
        *[(greg.Normalize((0.0, 0.0), std), 1, slice(3)) for std in ((1.0, 1.0), (1.0,))],
        (greg.Residual(nn.Sequential(nn.Flatten(), nn.Linear(72, 1)), nn.Identity()), 2, slice(3)),
        (greg.Residual(nn.AdaptiveAvgPool2d(1), nn.Identity()), 2, slice(1))]  # fmt: skip
    for m, c, which in rows:
        net, v = nn.Sequential(nn.Sequential(m), nn.Flatten(), nn.Linear(72, 3)).eval(), x[:, :c]
        bounds = (greg.linear_region, net, v), (greg.lipschitz_local, net, v, 0.1)
        for bound in ((greg.lipschitz_global, net, v.shape[1:]), *bounds)[which]:
            refuses(functools.partial(*bound), f" {type(m).__name__} ", error=NotImplementedError)
    wide = nn.Sequential(greg.Normalize(*[(1.0, 1.0)] * 2), nn.Flatten(), nn.Linear(4, 2)).eval()
    refuses(lambda: greg.lipschitz_global(wide, (2,)), "Normalize", error=NotImplementedError)
    hook = nn.modules.module.register_module_forward_hook(lambda m, x, y: 9 * y)  # on all nets
    refuses(functools.partial(*bound), "Sequential", error=NotImplementedError)
    hook.remove()


def test_training_mode_bad_numbers_and_bad_shapes_are_refused():
    x, nan, s, attack = torch.zeros(1, 2, 6, 6), math.nan, torch.zeros(1, 99), greg.attack
    net, training, broken, buffer = (network("cbr", 0) for _ in range(4))
    training.features[1].train()
    broken.features[0].weight.data[0], buffer.features[1].running_mean[0] = nan, math.inf
    z, A, w, local = torch.zeros(2), torch.eye(2), torch.ones(3, 1, 3, 3), greg.lipschitz_local
    for f, word, *rows in (
        (local, "eval", (training, x, 0.1)), (local, "logits", (conv(2, 3).eval(), x, 0.1)),
        (local, "NaN or infinity", *((n, x, 0.1) for n in (broken, buffer)), (net, x + nan, 0.1)),
        (local, "eps", (net, x, -1.0), (net, x, nan)), (local, "logits", (net, x[0], 0.1)),
        (greg.linear_region, "one", (net, x[[0, 0]])), (attack, "eval", (training, x, 0.0, 1.0)),
        (attack, ">= 1", (net, x, 0.0, 1.0, 0), (net, x, 0.0, 1.0, 1, 0)),
        (attack, "clamp", *((net, x + v, 0.0, 1.0, 1, 1, (0.0, 1.0)) for v in (-1, 2))),
        (attack, "eps", *((net, x, 0.0, e) for e in (-1.0, nan, math.inf)), (net, x, nan, 1.0)),
        (greg.conv_norm, "finite weight", (w[0], 4), (w * nan, 4), (w, 4, 1, 0, 1, 2)),
        (greg.id_radius, "finite", (z * nan, A, 0.0), (z, A * nan, -9.0), (z, A, nan)),
        (greg.certified_radius, "Eq. (4)", (s * nan, 0.0, 1.0), (s, nan, 1.0), (s, 0.0, nan),
         (s, 0, -1), (s, 0, 1, -1), (s, 0, 1, nan), (s + math.inf, 0, math.inf), (s, 0, s.T)),
        (greg.smoothed_radius, "alpha", (s, nan, 1.0), (s * nan, 0.0, 1.0), (s, 0.0, 0.0),
         (s, 0.0, -1.0), (s, 0.0, math.inf), (s, 0.0, 1.0, 0.0), (s, 0.0, 1.0, 1.0)),
        (greg.smoothed_radius, "3 draws", (s[:, :3], 0.0, 1.0, 0.25)),  # 2⁻³ = α/2
        (attack, "S(x) is NaN", (net, x.double() + nan, 0.0, 1.0))):  # fmt: skip
        for arguments in rows:
            refuses(functools.partial(f, *arguments), word)


@given(st.integers(0, 30), st.floats(0.01, 0.3), st.floats(0.1, 9))
def test_smoothed_radii_are_those_of_clopper_and_pearsons_intervals(more, alpha, sigma):
    n = math.floor(2 - math.log2(alpha)) + more  # at least the first n with 2⁻ⁿ < α/2
    for k in range(n + 1):
        s = torch.where(torch.arange(n) < k, -(k % 2), 1)[None]  # a score of γ is ID
        low, high = stats.binomtest(k, n).proportion_ci(1 - alpha)
        want = sigma * (stats.norm.ppf(max(1 - high, 0.5)) - stats.norm.ppf(max(low, 0.5)))
        r = greg.smoothed_radius(s.half(), (k % 2) * 0.99999, sigma, alpha).item()
        assert r == pytest.approx(want, rel=1e-6, abs=1e-7) and abs(r) <= abs(want)


def test_smoothing_of_a_linear_score_finds_its_margin_and_draws_in_pieces():
    x, w, rng = torch.tensor([[0.02, 0.0], [-0.03, 0.01]]), torch.tensor([3.0, -4.0]), generator(0)
    r, exact = greg.smoothing_radius(lambda v: v @ w, x, 0.0, 0.1, 20000, 0.001, rng), x @ w / 5
    assert (r.abs() <= exact.abs()).all() and torch.allclose(r.float(), exact, atol=0.006)
    assert greg.noisy_scores(lambda v: v @ w, x[:0], 0.1, 9).shape == (0, 9)
    for n, rows in (3001, 1), (3, 1500):
        sizes, x = [], torch.arange(rows, dtype=torch.float64)[:, None] * 100
        score = lambda v, sizes=sizes: sizes.append(len(v)) or v[:, 0]  # noqa: E731
        s = greg.noisy_scores(score, x, 2.0, n, rng)
        assert s.shape == (rows, n) and s.unique().numel() == sum(sizes) == n * rows
        assert max(sizes) <= max(1024, rows) and len(sizes) == 3
        assert abs((s - x).mean()) < 0.2 and 1.86 < (s - x).std() < 2.14


@given(networks("cs1brRPDanpmm"), seeds, st.sampled_from([0.01, 0.1, 1]), st.booleans())
def test_attacks_return_only_verified_flips_within_the_ball(net, seed, eps, clamp):
    net, g, (low, top) = net.float(), generator(seed), (0, 1) if clamp else (-math.inf, math.inf)
    x = torch.rand(4, *net.shape, generator=g) + (0 if clamp else 1e3)  # rounding leads out
    gamma = (s := scores(net, x)).mean().item()
    found = greg.attack(net, x, gamma, eps, 4, 2, (low, top), g)
    again, distance = scores(net, found.x), (found.x.double() - x.double()).flatten(1).norm(dim=1)
    assert torch.allclose(found.s, again, rtol=1e-5, atol=1e-4) and (distance <= eps).all()
    assert found.flipped.equal((found.s > gamma) != (s > gamma))
    assert found.distance.allclose(torch.where(found.flipped, distance, math.inf), rtol=1e-9)
    assert ((low <= found.x) & (found.x <= top)).all()
    assert torch.where(s > gamma, found.s <= s, found.s >= s).all()


def test_attacks_reach_what_can_be_reached():
    net, x, gamma = network("", 0, (3,), 1), normal(1, 5, 3), 0.3  # S is affine
    w, s, attack = net.fc.weight.norm().item(), scores(net, x), torch.inference_mode()(greg.attack)
    exact = (s - gamma).abs() / w
    for factor, flips in (0.999, False), (1.001, True):  # one eps a row
        found = attack(net, x, gamma, factor * exact, generator=generator(2))
        assert found.flipped.tolist() == [flips] * 5 and (found.distance >= exact).all()
    assert attack(net, x[:1], s[0].item(), 0.1).s > s[0]  # a score of γ is ID
    for y, side, n in itertools.product((x.float(), x), (-1, 1), (1, 2, 3)):
        worst = attack(net.to(y.dtype), y, side * math.inf, 0.01, 5, n)
        change = side * (worst.s - scores(net, y))  # no strength lost to rounding
        assert (0.995 * 0.01 * w <= change).all() and (change <= 0.0101 * w).all()
        assert not worst.flipped.any() and worst.distance.isinf().all()
    net, x, effort = network("LrLr", 2, (2,)), normal(3, 40, 2), [(20, 4), (20, 2), (20, 1), (2, 1)]
    reach = [attack(net, x, -math.inf, 3.0, *a, generator=generator(1)).s.mean() for a in effort]
    assert reach == sorted(reach) and reach[0] < reach[2] < reach[3] < scores(net, x).mean()
    assert (attack(nn.Softshrink(1.0).eval(), torch.zeros(9, 1), -math.inf, 3.0).s < -1.9).all()


# ---- Networks and weights (section 1)
COUNTS = {"resnet18": 11173962, "wrn40_2": 2243546, "densenet100": 769162, "densenet121": 6964106}


def disturb(net, seed):  # its batch norms, at random: no wrong order goes unseen
    g = generator(seed)
    for m in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        for t, low in (m.weight, 0.5), (m.bias, -0.5), (m.running_mean, -0.5), (m.running_var, 0.5):
            t.data.uniform_(low, low + 1, generator=g)
    return net.eval()


def test_wide_resnet_follows_the_paper_of_zagoruyko_and_komodakis():
    net = disturb(seeded(1, lambda: greg.wrn(16, 2, 10)), 1)
    layers = iter([m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))])
    x = normal(2, 2, 3, 32, 32, dtype=torch.float32)
    expected = F.conv2d(x, next(layers).weight, padding=1)
    for stride, b in (1, 0), (1, 1), (2, 0), (1, 1), (2, 0), (1, 1):  # two blocks a group
        bn1, conv1, bn2, conv2 = itertools.islice(layers, 4)
        out = F.conv2d(o := F.relu(bn1(expected)), conv1.weight, stride=stride, padding=1)
        out = F.conv2d(F.relu(bn2(out)), conv2.weight, padding=1)
        expected = out + (expected if b else F.conv2d(o, next(layers).weight, stride=stride))
    expected = net.fc(F.relu(next(layers)(expected)).mean((2, 3)))
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
    [refuses(lambda n=n: greg.wrn(n, 1, 10), "6 n + 4", str(n)) for n in (-2, 4, 9, 11, 15, 39)]


@pytest.mark.parametrize("name", COUNTS)
def test_networks_are_the_published_ones_and_torchvisions_where_it_has_them(tmp_path, name):
    net = seeded(0, lambda: greg.ARCHS[name](10))
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name]
    he = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 2000]
    for m in he if name != "resnet18" else ():
        fan = m.in_channels if name == "densenet121" else m.out_channels
        std = (2 / (m.kernel_size[0] ** 2 * fan)) ** 0.5
        assert abs(m.weight.std().item() / std - 1) < 6 / (2 * m.weight.numel()) ** 0.5
    assert name == "resnet18" or not net.fc.bias.any()
    if not hasattr(torchvision.models, name):
        return
    theirs = seeded(3, lambda: getattr(torchvision.models, name)(num_classes=10))
    if name == "resnet18":  # but for the stem
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    torch.save({"state_dict": disturb(theirs, 3).state_dict()}, tmp_path / "tv.pt")
    ours = greg.load_weights(net, tmp_path / "tv.pt").eval()
    x, statistics = normal(4, 2, 3, 96, 96).float(), np.array([[0.1, 0.2, 0.3], [0.5, 2.0, 4.0]])
    with torch.no_grad():
        wanted = theirs(T.functional.normalize(x, *statistics))
        ours = nn.Sequential(greg.Normalize(*statistics), ours)(x)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@given(st.sampled_from([None, "net", "state_dict", "model_state_dict", "model", "params"]),
       st.sampled_from(["", "module.", "model.", "module._orig_mod."]),
       st.sampled_from(["fc.", "linear.", "classifier."]),
       st.sets(st.sampled_from(["others", "by name", "counters"])))  # fmt: skip
@example(None, "", "fc.", {"others"})
def test_weights_load_whatever_the_file_calls_them(tmp_path_factory, wrap, prefix, head, ways):
    state = {k: v for k, v in STATE.items() if "counters" in ways or "num_batches" not in k}
    state = {prefix + k.replace("fc.", head): v for k, v in state.items()}
    if "others" in ways and (prefix or head == "fc."):
        state |= {"criterion.weight": torch.ones(10), "n_averaged": torch.tensor(3)}
    state = dict(sorted(state.items())) if "by name" in ways and head == "fc." else state
    file = tmp_path_factory.getbasetemp() / "w.pt"
    torch.save({wrap: state, "epoch": 3} if wrap else state, file)
    loaded = greg.load_weights(greg.wrn(10, 1, 10), file).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in STATE.items() if "num_batches" not in k)


TINY = disturb(seeded(8, lambda: greg.wrn(10, 1, 10)), 8)
STATE, KEYS = TINY.state_dict(), [*TINY.state_dict()]
hostile = type("Hostile", (), {"__reduce__": lambda self: (os.mkdir, ("owned",))})()
MISFITS = {  # what a file holds, and words of the sentence about it
    "headless": ({k: v for k, v in STATE.items() if k != "fc.bias"}, "--arch"),
    "renamed": ({k.replace("running_mean", "what"): v for k, v in STATE.items()}, "running_mean"),
    "sorted": ({k.replace("fc", "o"): STATE[k] for k in sorted(STATE)}, "another network"),
    "swapped": ({k.replace("fc", "o"): STATE[k] for k in KEYS[:6] + KEYS[12:] + KEYS}, "body.2.w"),
    "twice": ({f"{a}.{k}": v for a in ("ema", "last") for k, v in STATE.items()}, "2 sets"),
    "hostile": ({"state_dict": hostile}, "posix.mkdir", "state dict alone"),
    "html": (b"<!DOCTYPE html>", "no file of torch.save", "<!DOCTYPE"), "empty": (b"", "is empty"),
    "list": ([1, 2], "0 tensors (list"), "int": (STATE | {"fc.bias": pixels(0, 10)}, "uint8"),
    "nan": (STATE | {"fc.bias": STATE["fc.bias"] * math.nan}, "NaN or infinity in fc.bias"),
    "kernels": ({"w": {}}, "0 tensors (w"), "both": ({"net": STATE, "ema": STATE}, "(net, ema"),
    "eleven": (greg.wrn(10, 1, 11).state_dict(), "fc.bias [11]", "fc.bias [10]")}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path, monkeypatch, name):
    (content, *words), net, file = MISFITS[name], copy.deepcopy(TINY), Path(f"{name}.pt")
    monkeypatch.chdir(tmp_path)
    refuses(lambda: greg.load_weights(net, file), str(file), error=FileNotFoundError)
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    refuses(lambda: greg.load_weights(net, file), str(file), *words)
    same = all(map(torch.equal, net.state_dict().values(), STATE.values()))
    assert same and not Path("owned").exists()


def test_each_section_of_the_paper_runs_alone_with_what_it_says_it_needs_and_torch():
    uses = """
        assert wrn(10, 1, 3)(torch.rand(2, 3, 8, 8)).shape == (2, 3)
        greg_loss(nn.Linear(4, 3), torch.rand(2, 4), [0, 1], torch.rand(3, 4)).loss.backward()
        assert len(energy_sampling(features_and_logits(nn.Linear(9, 2), Z)[0], Z[:, 0], 3)) == 6
        assert lipschitz_global(nn.Sequential(nn.Flatten(), nn.Linear(9, 5)).eval(), (1, 3, 3)) > 0
        assert odin(nn.Linear(9, 5), Z).shape == (20,)
        assert auroc(Z[0], 2 + Z[0]) == 1 and fpr_at_tpr(Z[0], 2 + Z[0]) == 0"""
    source, places = (HERE / "greg.py").read_text(), {}
    for node in ast.parse(source).body:
        for t in getattr(node, "targets", [node]):
            places[getattr(t, "name", getattr(t, "id", None))] = ast.unparse(node)
    head, *sections = re.split(r"^# =+\n(?=# \d  )", source, flags=re.M)
    for section, use in zip(sections[:6], uses.strip().splitlines(), strict=True):
        needs = re.findall(r"\w+(?= *[,(\n])", re.search(r"^# Needs: (.*\n)", section, re.M)[1])
        cut = head, *(places[v] for v in needs if v != "nothing"), section, use.strip()
        tables = [symtable.symtable(text := "\n\n".join(cut), "cut", "exec")]
        for table in tables:  # grows
            tables += table.get_children()
            names = {s.get_name() for s in table.get_symbols() if s.is_global()}
            assert names <= {*dir(builtins), *tables[0].get_identifiers()}, section[:20]
        imports = {m.partition(".")[0] for m in re.findall(r"^ *(?:import|from) (\w+)", text, re.M)}
        assert imports - sys.stdlib_module_names <= {"torch", "scipy"}
        exec(compile(text, "cut", "exec"), {"Z": torch.rand(20, 9), "__name__": "cut"})


# ---- Compared methods (section 5)
STD, shares = (0.5, 1.0, 2.0), st.sampled_from([0.0, 30.0, 90.0, 100.0])
guards = st.sampled_from([torch.inference_mode, torch.no_grad, torch.enable_grad])
Own = type("", (nn.ReLU,), {"train": lambda m, on=True: vars(m).update(training=on, merged=not on)})


@given(seeds, st.sampled_from([1.0, 10.0, 1000.0]), st.sampled_from([None, 3]), guards,
       st.lists(st.booleans(), min_size=8, max_size=8))  # fmt: skip
def test_odin_steps_up_the_predicted_probability_and_leaves_all_as_it_was(seed, T, K, guard, modes):
    net, x, seen = smooth_net(seed, 5).eval(), normal(seed + 1, 2, 3, 1, 2), []
    net.features[1].weight.data[:, :2] = 0  # blind to the first channel: there it is down
    up = torch.autograd.functional.jacobian(lambda v: greg.msp(net(v)[:, :K] / T).sum(), x) < 0
    moved = x + torch.where(up, 0.01, -0.01) / torch.tensor(STD).view(3, 1, 1)
    wanted, net.lora = greg.msp(net(moved)[:, :K] / T), Own()  # its own train(mode), as merged LoRA
    for m, training in zip(net.modules(), modes, strict=True):
        m.training, m.merged = training, not training
    net.register_forward_pre_hook(lambda net, v: seen.append(v[0].detach().clone()))
    with pytest.raises(KeyError), greg.eval_mode(net) as same:
        raise KeyError(same)
    before, state = x.clone(), copy.deepcopy(net.state_dict())
    with guard():
        s = greg.odin(net, x, T, 0.01, STD, K)
    torch.testing.assert_close((seen[1], s), (moved, wanted), rtol=1e-6, atol=1e-9)
    assert not s.requires_grad and not x.requires_grad and torch.equal(x, before)
    assert [m.training for m in net.modules()] == modes and net.lora.merged != net.lora.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    net = nn.Sequential(greg.Normalize((0,), (6e4, math.inf)), nn.MaxPool2d(1, 1, 0, 1, 1)).half()
    s = greg.odin(net, torch.tensor([[[[1e4]], [[0.0]]]]).half(), eps=5e3)  # up, though g is tiny
    assert s < -0.50005 and s.dtype == torch.float64  # float32 would make ties


@given(seeds, *[shares] * 4, st.sampled_from([None, 0.7]), st.sampled_from([4, 5]))
def test_scores_of_features_are_their_papers_loops(seed, p_r, p_d, p_a, p_w, clip, outputs):
    net, y, x = smooth_net(seed, outputs).eval(), torch.arange(40) % 4, normal(seed + 2, 6, 3, 1, 2)
    z, h = (net.features(v).detach() - 0.5 for v in (normal(seed + 1, 40, 3, 1, 2), x))
    W, b = net.fc.weight.detach()[:4], net.fc.bias.detach()[:4]
    p = greg.PostHoc(3.0, 0.1, p_r, clip, p_d, p_a, p_w, line_clip=0.6)
    fit = greg.fit_scores(net, z, y, p, STD, None if outputs == 4 else 4)
    ours = {k: score(net, x, h @ W.T + b, h, fit) for k, score in greg.SCORES.items()}
    M = W * ((V := W * z.mean(0)) > np.percentile(V, p_d) + 1e-12)
    clipped = h.clamp(max=np.percentile(z, p_r) if clip is None else clip)
    heads = {"energy": (h, W), "react": (clipped, W), "dice": (h, M), "dice+react": (clipped, M)}
    wanted = {k: -(v @ head.T + b).logsumexp(1) for k, (v, head) in heads.items()}
    s, line = torch.zeros_like(W), []
    for z_i, c in zip(z, y, strict=True):  # LINe's official code: one backward pass a sample
        g = torch.autograd.functional.jacobian(lambda v, c=c: (W @ v + b)[c], z_i)
        s[c] += z_i * g / (y == c).sum()
    for h_i in h.clamp(max=0.6):
        c = (W @ h_i + b).argmax()
        kept, V = s[c] > np.percentile(s[c], p_a) + 1e-12, s[c].abs() * W
        line.append(-((W * (V > np.percentile(V, p_w) + 1e-12)) @ (h_i * kept) + b).logsumexp(0))
    wanted |= {"line": torch.stack(line), "odin": greg.odin(net, x, 3.0, 0.1, STD, 4)}
    wanted |= {"msp": greg.msp(h @ W.T + b), "absent": greg.absent(net.fc(h))}
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


def test_the_hyper_parameters_of_the_post_hoc_scores_and_what_fitting_them_needs():
    assert greg.PostHoc() == (1000, 0.0014, 90, None, 90, 90, 90, 1)
    wrn, hundred, dense = {"eps": 0.0006}, {"eps": 0.0028, "line_a": 10}, {"react_clip": 1}
    for *key, changes in [
        ("cifar10", "resnet18", 10, {}), ("cifar10", "densenet100", 10, dense),
        ("cifar10", "wrn40_2", 10, wrn), ("mine.npz", "wrn40_2", 7, wrn),
        ("cifar100", "wrn40_2", 100, hundred), ("mine.npz", "resnet18", 100, hundred),
        ("imagenet:5", "densenet121", 5, dict(dice_p=70, line_a=10, line_w=10, line_clip=0.8)),
        ("cifar100", "densenet100", 100, hundred | dense)]:  # fmt: skip
        assert greg.post_hoc(*key) == greg.PostHoc(**changes), key
    assert greg.POST_HOC_ROWS == ("msp", "odin", "energy", "react", "dice", "dice+react", "line")
    assert set(greg.SCORES) - greg.NEED_FIT == {"msp", "odin", "energy", "absent"}
    fit = functools.partial(greg.fit_scores, smooth_net(0), p=greg.PostHoc())
    z = torch.eye(8)[:6].double()  # of 3e4 (1 + z) the sums are no float16; std (1,): of pixels
    refuses(lambda: fit(z, torch.tensor([0] * 4 + [2] * 2)), "every class", "[4, 0, 2]")
    refuses(lambda: fit(z.log(), torch.arange(6) % 3), "finite")
    assert (f := fit((3e4 * (1 + z)).half(), torch.arange(6) % 3)).std == (1,) and f.masks(0).any()
    assert greg.line(z.half(), f.W, f.b, f.masks, 1.0).isfinite().all()


# ---- Metrics (section 6)
tied = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e3, 1e3, allow_subnormal=False))
score_lists = st.lists(tied | st.sampled_from([math.inf, -math.inf]), min_size=1, max_size=30)


@given(score_lists, score_lists, st.sampled_from(["0.95", "0.9", "0.5", "1"]))
@example([float(i) for i in range(20)], [float(i) for i in range(20)], "0.95")
def test_metrics_are_their_definitions_by_counting(s_in, s_out, share):
    a, b, tpr = np.array(s_in), np.array(s_out), Fraction(share)
    gamma = min(t for t in s_in if Fraction(int(sum(a <= t)), len(a)) >= tpr)
    assert greg.threshold(a, float(share)) == gamma
    assert greg.fpr_at_tpr(a, b, float(share)) == pytest.approx(np.mean(b <= gamma), abs=1e-12)
    pairs = np.mean([(x < y) + (x == y) / 2 for x in s_in for y in s_out])
    assert greg.auroc(a, b) == pytest.approx(pairs, abs=1e-12)
    counts = [(np.mean(a == t), sum(a <= t), sum(b <= t)) for t in {*s_in}]
    area = sum(recall * tp / (tp + fp) for recall, tp, fp in counts)
    assert greg.aupr(a, b) == pytest.approx(area, abs=1e-12)
    wanted = {"fpr95": greg.fpr_at_tpr(a, b), "fpr95_ood_positive": greg.fpr_at_tpr(-b, -a)}
    wanted |= {"auroc": greg.auroc(a, b), "aupr_in": greg.aupr(a, b), "aupr_out": greg.aupr(-b, -a)}
    assert greg.ood_metrics(a, b) == wanted | {"n_in": len(a), "n_out": len(b)}


def test_metrics_are_exact_in_float64_of_many_scores_and_of_vectors_alone():
    a, s = torch.tensor([1.1], dtype=torch.float64), normal(0, 1_000_000, dtype=torch.float32)
    assert greg.auroc(a.tolist(), a + 1e-12) == 1.0  # float32 would round them together
    assert greg.auroc(s, s) == 0.5 and greg.fpr_at_tpr(s, s) == pytest.approx(0.95)
    ok, metrics = torch.ones(5), (greg.fpr_at_tpr, greg.auroc, greg.aupr, greg.ood_metrics)
    bads = ok[:0], torch.tensor([0.0, math.nan]), ok[0], torch.ones(5, 3), torch.ones(5, 1)
    for metric, bad in itertools.product(metrics, bads):
        for pair in (bad, ok), (ok, bad):
            refuses(functools.partial(metric, *pair), "[N]", str(list(bad.shape)))
    [refuses(lambda tpr=tpr: greg.threshold(ok, tpr), "tpr", str(tpr)) for tpr in (0.0, 1.5, -1)]


# ---- Data (section 7)
TWO, THREE = pixels(0, 2, 32, 32, 3).numpy(), pixels(1, 3, 32, 32, 3).numpy()


def test_the_clock_of_a_bar_goes_on_in_a_long_step(monkeypatch, capsys):
    wait = greg.threading.Event().wait
    monkeypatch.setattr(greg.time, "sleep", lambda seconds: wait(seconds / 99))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with greg.bar(None, "x", total=2):
        wait(0.5)
    assert capsys.readouterr().err.count("0/2 [") > 9


def test_augmented_images_are_all_crops_of_the_padded_image_and_its_mirror_equally_often():
    n, h, w, pad = 20000, 6, 9, 4
    marks, x = np.stack(np.mgrid[1 : h + 1, 1 : w + 1], -1), np.zeros((n, h, w, 3), np.uint8)
    x[..., :2], x[..., 2] = marks, np.arange(n)[:, None, None] % 255
    out = greg.augment(torch.from_numpy(x), generator(0)).numpy()
    whole, corners = np.pad(marks, ((pad, pad), (pad, pad), (0, 0))), range(2 * pad + 1)
    crops = [whole[a : a + h, b : b + w] for a in corners for b in corners]
    crops = np.unique([c[:, ::s].flatten() for c in crops for s in (1, -1)], axis=0)
    found, counts = np.unique(out[..., :2].reshape(n, -1), axis=0, return_counts=True)
    np.testing.assert_array_equal(found, crops)
    assert ((counts - n / 162) ** 2 / (n / 162)).sum() < 161 + 5 * 322**0.5  # χ², 5 σ
    np.testing.assert_array_equal(out[..., 2], np.where(out[..., 0] > 0, x[..., 2], 0))


def test_normalise_agrees_with_numpy_and_the_published_constants_stand():
    a = (x := pixels(0, 5, 6, 7, 3)).numpy() / 255.0
    mean, std = a.mean((0, 1, 2)), a.std((0, 1, 2))
    z = greg.normalise(x.numpy(), mean.tolist(), std.tolist())
    assert z.is_contiguous() and z.dtype == torch.float32
    np.testing.assert_allclose(z, ((a - mean) / std).transpose(0, 3, 1, 2), atol=1e-5)
    [refuses(lambda v=v: greg.normalise(v, mean, std), "[N,H,W,C]") for v in (x.float(), x[0])]
    assert np.dot(range(1, 25), np.ravel([*greg.STATS.values()])) == pytest.approx(99.3069, 4e-7)
    assert sum(float(count) for *_, count in greg.SOURCES.values()) == 101065


def test_the_built_in_benchmark_is_fixed_balanced_and_without_repeats():
    sums = -425, 58396, -13777, -60909, 52927, -12108, 27757, -54723, 1821  # under white noise
    for split, want in zip(greg.SYNTHETIC, sums, strict=True):
        images, noise = greg.synthetic(split, 60, seed=3), normal(0, 60, 32, 32, 3)
        assert (images.x * noise).sum().item() == pytest.approx(want, abs=200), split
        assert images.x.dtype == torch.uint8 and (images.y is None) == (len(images.classes) == 0)
    for split, n in ("nothing", 3), ("train", 0), ("aux", -1):
        refuses(functools.partial(greg.synthetic, split, n), split, str(n), "shards")
    (train, test), aux = greg.load_id("synthetic"), greg.load_aux("synthetic")
    assert len(train.classes) == 10 and (torch.bincount(train.y) == 500).all()
    assert [len(s.x) for s in (train, test, aux)] == [5000, 1000, 10000] and aux.y is None
    assert len({x.numpy().tobytes() for x in torch.cat([train.x, test.x, aux.x])}) == 16000
    ood = greg.load_ood(["synthetic"])
    assert {k: len(v.x) for k, v in ood.items()} == dict.fromkeys(greg._OOD, 500)


def test_id_arrays_are_kept_as_they_are_and_bad_ones_named(tmp_path):
    path, u8 = tmp_path / "a.v2.npz", np.uint8
    arrays = {"x_train": pixels(0, 6, 8, 8, 3).numpy(), "y_train": np.arange(6) // 2}
    arrays |= {"x_test": pixels(1, 3, 8, 8, 3).numpy(), "y_test": np.array([2, 0, 1], ">i2")}
    np.savez(path, **arrays, names=np.array(["cat", None], object))
    train, test = greg.load_id(str(path))
    np.testing.assert_array_equal(test.x, arrays["x_test"])
    assert torch.equal(test.y, torch.tensor([2, 0, 1])) and test.classes == ("0", "1", "2")
    np.testing.assert_array_equal(train.some(9).x, arrays["x_train"])  # all, in order
    assert train.y.tolist() == [0, 0, 1, 1, 2, 2]
    few = greg.Images(torch.arange(900), torch.arange(900) // 300).some(90)  # of a sorted set
    assert torch.equal(few.x // 300, few.y) and len(few.y) == 90 and (few.y == 2).sum() > 15
    for key, bad, *words in (
        ("x_train", np.zeros((6, 8, 8, 3)), "train, must be uint8 [N,8,8,3]", "float64"),
        ("x_test", np.zeros((3, 9, 8, 3), u8), "test, must be uint8 [N,8,8,3]", "[3, 9, 8, 3]"),
        ("y_train", np.arange(3), "6 integer", "[3]"), ("y_train", np.arange(6.0) % 3, "float64"),
        ("y_train", np.array([-1, 0, 1, 2, 0, 1]), "0..3", "[-1, 3]"),
        ("y_test", np.array([0, 1, 3]), "test, needs", "0..2", "[2, 3]"),
        ("y_test", np.array(["a", "b", "c"]), "x_train", "in y_test"), ("y_train", [0] * 6, "0..1"),
        ("x_train", np.zeros((0, 8, 8, 3), u8), "[0, 8, 8, 3]")):  # fmt: skip
        np.savez(path, **arrays | {key: bad})
        refuses(lambda: greg.load_id(str(path)), path.name, *words)
    np.savez(path, **arrays)
    whole, x = path.read_bytes(), arrays["x_train"].tobytes()
    bad = [whole[:n] for n in (0, 9, 300, len(whole) - 9)] + [b"1,2\n", b"MATLAB 5.0" + bytes(200)]
    for content in (*bad, whole.replace(x, x[::-1])):
        path.write_bytes(content)
        refuses(lambda: greg.load_id(str(path)), "a.v2.npz is damaged, or no")
    refuses(lambda: greg.load_id("no.npz"), "no file or folder no.npz", error=FileNotFoundError)


def test_of_several_arrays_the_images_are_chosen_by_fit_and_named_or_none(tmp_path, capsys):
    path, depth, y = str(tmp_path / "many.npz"), TWO[..., :1], np.arange(3)
    bomb = type("", (), {"__reduce__": lambda self: (pytest.fail, ("a pickle was run",))})()
    for ood, aux, arrays in (  # the name used as OOD and as auxiliary images, or neither
        ("any", "any", {"any": TWO, "objects": np.array(bomb, object)}),
        ("x", "x", {"a": THREE, "x": TWO}), (None, None, {"x": TWO.astype(np.float32), "y": y}),
        ("test_im", "train_im", {"train_im": TWO, "test_im": THREE, "test_depth": depth}),
        (None, None, {"test_a": TWO, "test_b": THREE, "train_a": TWO, "train_b": THREE}),
        ("x_test", "x_train", {"x_train": TWO, "y_train": y, "x_test": THREE})):  # fmt: skip
        np.savez(path, **arrays)
        loads = (lambda: greg.load_ood(["o=" + path])["o"]), (lambda: greg.load_aux(path))
        for load, name in zip(loads, (ood, aux), strict=True):
            if name is None:
                refuses(load, "many.npz holds", *(f"{k} {a.dtype}" for k, a in arrays.items()))
            else:
                np.testing.assert_array_equal(load().x, arrays[name])
                assert (f"{name} is used" in capsys.readouterr().err) == (name != "any")


def draw_tree(root, parts=("train", "test"), classes=("cat", "dog"), n=2, size=(32, 32)):
    """Image k of class j of part i, of colour (40 i + k, 50 j, noise), in root/part/class/k.png."""
    for (i, part), (j, name) in itertools.product(enumerate(parts), enumerate(classes)):
        (root / part / name).mkdir(parents=True)
        for k, a in enumerate(pixels(i, n, *size[::-1], 3).numpy()):
            a[..., :2] = 40 * i + k, 50 * j
            Image.fromarray(a).save(root / part / name / f"{k}.png")
    return root


@pytest.mark.parametrize("names", [["11", "9", "100"], ["b.x", "Z", "ü1", "0", "@c", "10"]])
def test_class_folders_are_sorted_as_numbers_if_all_are_and_must_agree(tmp_path, capsys, names):
    draw_tree(tmp_path, classes=names, size=(40, 50))
    for part, litter in itertools.product(("train", "test"), (".cache", "__MACOSX", "@eaDir")):
        (tmp_path / part / litter).mkdir() or (tmp_path / part / "loose.txt").touch()
    want = sorted(names, key=int if names[0].isdecimal() else None)
    for i, images in enumerate(greg.load_id(str(tmp_path), size=8)):
        assert list(images.classes) == want and images.x.shape == (2 * len(names), 8, 8, 3)
        assert set((images.x[:, 0, 0, 0] // 40).tolist()) == {i}
    assert "8×8 (--size)" in (err := capsys.readouterr().err) and "out 1 files in no class" in err
    few, many = (greg.Images(torch.cat([images.x[:1], pixels(0, n, 8, 8, 3)])) for n in (99, 98))
    refuses(lambda: greg.keep_apart("odd", [images], {"a": few, "b": many}), "1 of the 99 ")
    assert capsys.readouterr().err == "greg: warning: 1 of the 100 images of a are odd images too\n"
    shutil.copy(tmp_path / "train" / want[0] / "0.png", tmp_path / "test" / want[0])
    greg.load_sets(greg.Config(id=f"{tmp_path}", size=8, ood=[f"a={tmp_path}"]))
    n, err = 2 * len(names), capsys.readouterr().err
    assert re.search(f"{2 * n} images of a are ID .*\n.* 1 of the {n} .*test set are training", err)
    (tmp_path / "test" / want[0]).rename(tmp_path / "test" / "new")
    refuses(lambda: greg.load_id(str(tmp_path)), "in one only", f"'{want[0]}'", "'new'")


def test_what_a_folder_holds_beside_images_is_passed_over_or_counted_and_named(tmp_path, capsys):
    root, other = draw_tree(tmp_path / "a", "@t", n=4), draw_tree(tmp_path / ".other", ["x"], ["y"])
    (root / "t" / "circle").symlink_to(root, target_is_directory=True)
    (root / "also").symlink_to(root / "t", target_is_directory=True)
    (root / "linked").symlink_to(other, target_is_directory=True)
    draw_tree(root, [".thumbs", "__MACOSX", "@eaDir"])
    for name in "._0.png", ".hidden.jpg", "clip.mp4", "labels.h5", "notes.txt", "none":
        (root / name).touch()
    for suffix in "JPG", "webp", "bmp", "tiff", "ppm", "gif", "jp2", "tga":
        Image.new("RGB", (9, 9)).save(root / f"z.{suffix}")
    files = greg.image_files(root)
    assert len(files) == len(set(files)) == 16 + 2 + 8 and files == greg.image_files(root)
    assert files == sorted(files) and len(greg.image_files(other)) == 2  # a hidden folder, named
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "left out 4 " in said[0] and str(root / "clip.mp4") in said[0]
    (tmp_path / "empty").mkdir()
    refuses(lambda: greg.load_aux(str(tmp_path / "empty")), "no images below", "empty")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "1", "LA", "clear P"])
def test_images_of_every_mode_and_orientation_are_what_a_viewer_shows(tmp_path, mode):
    image, exif = Image.fromarray(pixels(0, 24, 16, 4).numpy(), "RGBA"), Image.Exif()
    image = (image if "A" in mode else image.convert("RGB")).convert(mode.split()[-1])
    rgba = np.asarray(image.convert("RGBA"), float)
    if mode == "clear P":
        rgba[np.asarray(image) == 7, 3] = 0
    shown = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]  # on white
    for turn in range(1, 9):  # TIFF 6.0: where row 0 and column 0 are
        exif[0x0112], path = turn, tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
        exif[0x010F] = "odd"  # but in a tiff as the width, which is no text
        odd = exif if mode == "CMYK" else exif.tobytes().replace(b"\1\x0f", b"\1\0")
        image.save(path, exif=odd, **({"transparency": 7} if mode == "clear P" else {}))
        down, right = (-1 if turn in turns else 1 for turns in ((3, 4, 7, 8), (2, 3, 6, 7)))
        want = (shown.swapaxes(0, 1) if turn > 4 else shown)[::down, ::right]
        np.testing.assert_allclose(np.asarray(greg.open_image(path)), want, atol=1)


def test_what_cannot_be_read_as_an_image_is_named_and_a_large_one_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)  # above twice this Pillow refuses
    deep, path = (65535 * np.linspace(0, 1, 16) ** 2).astype(int).reshape(4, 4), tmp_path / "x.tif"
    for dtype in np.uint16, np.int32, ">u2":  # sixteen bits are scaled to eight
        Image.fromarray(deep.astype(dtype)).save(path)
        np.testing.assert_allclose(np.asarray(greg.open_image(path))[..., 1], deep / 257, atol=0.51)
    for bad in deep.astype(np.float32), (deep - 1).astype(np.int32), (deep + 9).astype(np.int32):
        Image.fromarray(bad).save(path)
        refuses(lambda: greg.open_image(path), "x.tif is not an image", "range")
    Image.fromarray(TWO[0]).save(tmp_path / "x.png")
    for content in (tmp_path / "x.png").read_bytes()[:-99], b"", b"no image":
        path.write_bytes(content)
        refuses(lambda: greg.load_image(path), "not an image", "trunc" if content[9:] else "cannot")
    assert 2**31 > Image.MAX_IMAGE_PIXELS > 16320 * 12240  # a telephone's photograph


@pytest.mark.parametrize("h, w", [(33, 90), (71, 34), (60, 61)])
def test_images_are_cut_as_torchvision_does_and_flipped_by_seed(tmp_path, monkeypatch, h, w):
    Image.fromarray(pixels(0, h, w, 3).numpy()).save(path := tmp_path / "x.png")
    for size, short in (8, 8), (128, 146):
        want = T.Compose([T.Resize(short), T.CenterCrop(size), T.PILToTensor()])(Image.open(path))
        assert torch.equal(greg.load_image(path, size)[0], want.permute(1, 2, 0))
    files, flipped = greg.Files([tmp_path / "no", __file__, path], 32), 0
    for seed in range(12):
        state, (_, crop, again) = torch.get_rng_state(), files[[(2, 99), (2, seed), (2, seed)]]
        assert torch.equal(crop, again) and torch.equal(torch.get_rng_state(), state)
        image = seeded(seed, lambda: T.RandomResizedCrop(32)(Image.open(path)))
        want = torch.from_numpy(np.array(image))  # the library's own draw
        assert torch.equal(crop, want) or torch.equal(crop, want.flip(1))
        flipped += torch.equal(crop, want.flip(1))
    assert 1 < flipped < 11 and len(files[torch.tensor([1])]) == 1
    assert isinstance(bad := files[[(2, 0), (1, 0)]], ValueError) and __file__ in str(bad)
    Image.new("RGB", (9000, 2)).save(path)  # of a strip no more than may be seen
    monkeypatch.setattr(T.functional, "resize", resize := Mock(side_effect=lambda v, *_, **__: v))
    assert greg.load_image(path, 2).shape == (1, 2, 2, 3)
    assert resize.mock_calls[0].args[0].size == (8, 2)


def test_a_set_is_fetched_only_if_asked_checked_unpacked_once_and_read(tmp_path, monkeypatch):
    def publish(name, path, count=0):  # under "web", a folder as an archive
        file = shutil.make_archive(path, "gztar", path.parent, path.name) if path.is_dir() else path
        url, md5 = f"file://{file}?dl=1", greg.hashlib.md5(Path(file).read_bytes()).hexdigest()
        shutil.copy(file, f"{file}?dl=1")
        monkeypatch.setitem(greg.SOURCES, name, [url, md5, path.name, str(count)])

    monkeypatch.setattr("urllib.response.addinfourl.length", None, raising=False)
    web, root = draw_tree(tmp_path / "web", ["there"], ["a"], size=(36, 36)), tmp_path / "data"
    load, absent = functools.partial(greg.load_ood, root=root), {"error": FileNotFoundError}
    for name in (*greg.PAPER_OOD, *greg.IMAGENET_OOD):
        refuses(functools.partial(load, [name]), name, str(root), "--download", **absent)
    for name in "random300k", "densenet121", "svnh":  # no OOD sets
        refuses(functools.partial(load, [name]), f"no OOD set '{name}'", "NAME=PATH", "rays", "sun")
    refuses(lambda: greg.load_aux("random300k", root), "300k is not complete", str(root), **absent)
    refuses(lambda: greg.load_id("cifar10", root), "cifar10", str(root), "--download", **absent)
    publish("isun", web / "there", 2)
    assert not root.exists()
    x = load(["isun"], download=True)["isun"].x
    assert x[:, 5, 5, 0].sort().values.tolist() == [0, 1] and load(["isun"])["isun"].x.equal(x)
    (root / "there" / "a" / "1.png").unlink()
    refuses(lambda: load(["isun"], download=True), "1 images, not 2", "unpack it again")
    publish("lsun_c", web / "there", 1)
    want = np.asarray(Image.open(root / "there" / "a" / "0.png"))[2:34, 2:34]
    np.testing.assert_array_equal(load(["lsun_c"])["lsun_c"].x[0], want)
    np.save(web / "r.npy", TWO)
    publish("random300k", web / "r.npy")
    np.testing.assert_array_equal(greg.load_aux("random300k", root, True).x, TWO)
    (root / "r.npy").write_bytes(b"damaged")
    refuses(lambda: greg.load_aux("random300k", root), "random300k", **absent)
    greg.SOURCES["random300k"][1] = "-"  # as where no sum is known
    assert greg.published("random300k", root, False).read_bytes() == b"damaged"
    publish("sun", draw_tree(web / "damaged"), 8)
    greg.SOURCES["sun"][1] = "0" * 32
    refuses(lambda: load(["sun"], download=True), "sun is not complete", **absent)
    assert not (root / "damaged").exists()


def test_sets_of_ones_own_are_given_as_name_and_path_and_arrays_mapped(tmp_path, monkeypatch):
    np.save(path := tmp_path / "x.npy", TWO)
    x, before, maps = greg.load_aux(str(path)).x, path.read_bytes(), Path("/proc/self/maps")
    assert not maps.exists() or str(path) in maps.read_text()  # mapped, not read
    x[0] = 0
    assert path.read_bytes() == before and x[1:].tolist() == TWO[1:].tolist()
    refuses(lambda: greg.load_aux(str(path), size=16), "--aux", "x.npy", "16,16")
    draw_tree(tmp_path / "tree", size=(50, 40))
    monkeypatch.setenv("HOME", str(tmp_path))
    sets = greg.load_ood(["svhn=~/x.npy", f"lsun_c={tmp_path}/tree"])
    assert [len(s.x) for s in sets.values()] == [2, 8] and list(sets) == ["svhn", "lsun_c"]
    want = greg.Images(greg.Files(greg.image_files(tmp_path / "tree"), 32)).pixels(slice(None))
    assert torch.equal(sets["lsun_c"].x, want) and torch.equal(greg.load_aux("~/tree").x, want)
    for spec in ("c=", *(f"{k}=~/x.npy" for k in ("", "id", "mean", "/", "$", "b", "\udcff"))):
        load, name = functools.partial(greg.load_ood, ["b=~/x.npy", spec]), spec.partition("=")[0]
        refuses(load, f"the name {name!r} is taken")
    assert [*map(greg.path_stem, ("a/b.c", "y.v2.npz", "z.npz.d"))] == ["b.c", "y.v2", "z.npz.d"]
    assert len({greg.path_stem("n" * 300 + end)[:120] for end in "ab"}) == 2  # short, and distinct


def test_cifar_and_svhn_are_torchvisions_and_large_sets_are_cut(tmp_path, monkeypatch):
    def fake(root, which, download=False):
        calls.append((root, which, download))
        data = {True: THREE, False: 255 - THREE, "test": many.transpose(0, 3, 1, 2)}[which]
        return SimpleNamespace(data=data, targets=[2, 1, 0], classes="abc")

    calls, root, many = [], str(tmp_path), np.tile(THREE, (3400, 1, 1, 1))
    for name in "CIFAR10", "CIFAR100", "SVHN":
        monkeypatch.setattr(f"torchvision.datasets.{name}", fake)
    sets = greg.load_id("cifar100", root, download=True)
    for images, x in zip(sets, (THREE, 255 - THREE), strict=True):
        assert images.y.tolist() == [2, 1, 0] and images.classes == ("a", "b", "c")
        np.testing.assert_array_equal(images.x, x)
    svhn = greg.load_ood(["svhn"], root)["svhn"].x
    assert len(svhn) == 10_000 and {*map(bytes, svhn.numpy())} == {*map(bytes, THREE)}
    monkeypatch.setattr(greg, "world", lambda: (1, 2))  # the first process fetches for all
    monkeypatch.setattr(torch.distributed, "barrier", lambda: calls.append("wait"))
    greg.load_id("cifar10", root, download=True)
    one, two = ([(root, part, do) for part in (True, False)] for do in (True, False))
    assert calls == [*one, (root, "test", False), "wait", *two] and svhn.is_contiguous()
    monkeypatch.setattr(greg, "world", lambda: (0, 2))  # who fails to fetch keeps none waiting
    monkeypatch.setattr("torchvision.datasets.SVHN", lambda *_, **k: os.stat("no network"))
    refuses(lambda: greg.load_ood(["svhn"], root, True), "svhn", error=FileNotFoundError)
    assert calls[-1] == "wait"
    monkeypatch.setattr(greg, "image_files", lambda folder: ["x.png"] * 36500)
    monkeypatch.setattr(greg, "load_image", lambda f, size: torch.zeros(1, 32, 32, 3).byte())
    (tmp_path / "val_256").mkdir()
    assert len(greg.load_ood(["places365"], root)["places365"].x) == 10000


def test_imagenet_is_split_into_id_and_auxiliary_classes(tmp_path, monkeypatch):
    root = draw_tree(tmp_path / "imagenet", ("train", "val"), "n0 n1 n2 n3".split(), 5, (50, 40))
    (train, val), aux = (f("imagenet:n3,n1", tmp_path) for f in (greg.load_id, greg.load_aux))
    assert train.classes == val.classes == ("n3", "n1") and (aux.y, aux.classes) == (None, ())
    assert isinstance(train.x, greg.Files) and isinstance(val.x, torch.Tensor) and len(aux.x) == 10
    for i, images in enumerate((train, val)):  # labels by the colour
        assert (x := images.some(99).pixels()).shape == images.x.shape == (10, 32, 32, 3)
        found = sorted(zip(x[:, 0, 0, :2].tolist(), images.y.tolist(), strict=True))
        assert found == [([40 * i + k, g], y) for k in range(5) for g, y in ((50, 1), (150, 0))]
    assert {Path(os.fsdecode(f)).parent.name for f in aux.x.files} == {"n0", "n2"}
    assert len(greg.load_aux("imagenet:n0,n1,n2", tmp_path).x) == 5  # one class alone
    for classes in "n1,n9", "n1", "n1,n1", "n0,n1,n2,n3", "4", "":
        load = functools.partial(greg.load_id, f"imagenet:{classes}", tmp_path)
        refuses(load, "two to all but one", str(root), "['n9']" * ("9" in classes))
    refuses(lambda: greg.load_aux("imagenet", root), "imagenet/train", "no folder of images")
    ten = "n02396427 n04141975 n02834397 n02111277 n03534580 n01877812 n02837789 n01443537".split()
    ten += ["n02114367", "n03857828"]
    monkeypatch.setattr(greg, "class_folders", lambda folder: sorted([*ten, "n3"]))
    monkeypatch.setattr(greg, "class_images", lambda folder, names, *_: names)
    assert greg.load_imagenet("val", root, "", 32) == ten


# ---- Training (section 8)
def coloured(seed, n):  # small images of four classes, the colours: a run takes a second
    y, x = torch.arange(n) % 4, (pixels(seed, n, 8, 8, 3) // 3).int()
    x[..., 0] += (y * 40)[:, None, None].int()
    return greg.Images(x.byte(), y, tuple("abcd"))


CONVS = {"padding": "same"}, {"padding": (0, 2), "dilation": (1, 2)}
CONVS = {}, {"stride": 2, "padding": 1, "dilation": 2}, *CONVS
CONVS += tuple({"groups": 2, "bias": False} | conv for conv in CONVS[1:])
BATCH = {}, {"momentum": 0.3, "eps": 0.01}, {"track_running_stats": False}, {"affine": False}
NORMS = functools.partial(nn.GroupNorm, 2), *(functools.partial(nn.BatchNorm2d, **b) for b in BATCH)
of = lambda method, **options: greg.resolve(greg.Config(method, **options))  # noqa: E731
exactly = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
IDS, AUX = coloured(1, 64), coloured(2, 96)._replace(y=None, classes=())
BASE = {"id": "data.npz", "aux": "aux.npy", "arch": "wrn10_1", "epochs": 2, "batch": 16, "lr": 0.05}
BASE |= {"schedule": "cosine", "workers": 0}


@given(st.sampled_from(CONVS), st.sampled_from(NORMS), st.booleans(), st.booleans())
def test_the_fast_double_backward_is_autograds_own(conv, norm, last, training):
    layers = [greg.Concat(nn.Conv2d(2, 2, 3, 1, 1, bias=False)), norm(4), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(4, 4, 3, **conv), norm(4), greg.Concat(nn.ReLU()), nn.Flatten()]
    net = nn.Sequential(*layers, nn.LazyLinear(5), nn.BatchNorm1d(5), nn.Softplus()).double()
    with (mode := greg.FastDoubleBackward()):  # which may be used again
        net(x := torch.randn(6, 2, 9, 8, dtype=torch.float64) + 0.5)  # makes the lazy layer
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    form = torch.channels_last if last else torch.contiguous_format
    net, x, both = net.to(memory_format=form).train(training), x.to(memory_format=form), []
    for twin, fast in (copy.deepcopy(net), True), (net, False):
        with mode if fast else greg.contextlib.nullcontext():
            y = nn.BatchNorm2d(4).double()(torch.cat([x, x], axis=1))  # another name of its dim
            v = torch.cat([x.new_ones(0), x], 1)  # which PyTorch lets pass
            W, ones = net[0].body.weight, [(1, 1)] * 3
            m = F.conv2d(v, 2 * W, None, *ones, 1)  # made of x?
            b = F.batch_norm(x, None, None, x.new_ones(2), m.sum((0, 2, 3))[:2], True)
            flat = F.batch_norm(x, None, None, None, x.new_ones(2), True)
            one, named = F.conv2d(x[0], W, None, *ones, 1), F.conv2d(input=x, weight=W)
            ours = ["Fast" in str(v.grad_fn) for v in (y, F.relu(y), m, b, flat, one, named)]
            assert ours == [fast, fast, *[False] * 5]
            out = greg.greg_loss(twin, x[:2], [0, 3], x[2:], 9.0, 9.5, 0.1, np.float64(1))
        if fast:
            third = functools.partial(torch.autograd.grad, out.loss, [*twin.parameters()])
            refuses(lambda: third(create_graph=True), "leave it out", error=RuntimeError)  # noqa: B023
        out.loss.backward()
        both.append([*out[:4], *(p.grad for p in twin.parameters()), *twin.buffers()])
    assert out.gradient > 0
    torch.testing.assert_close(*both, rtol=1e-7, atol=1e-9)


def as_files(root):  # images of four classes, and auxiliary ones, which workers decode
    draw_tree(root, ["ids", "aux"], "abcd", 16, (40, 50))
    ids, aux = (greg.class_images(root / part, "abcd", 8, True) for part in ("ids", "aux"))
    return {"ids": ids, "aux": aux._replace(y=None, classes=())}


def begun(folder, method, ids=IDS, aux=AUX, **options):  # a run in its folder, ready to train
    c = of(method, **BASE | options)
    folder.mkdir(exist_ok=True, parents=True)
    return greg.start(c, folder, CPU, ids, aux if c.aux else None)


def ended(run):  # as the command does it: alone in its folder, under the signals' handlers
    with greg.alone(run.folder), greg.interrupts(run):
        while run.epoch < run.config.epochs:
            greg.train_epoch(run)


@pytest.fixture(scope="session")
def begin(tmp_path_factory):  # the folder of a run that was pre-trained on files
    ended(begun((root := tmp_path_factory.mktemp("runs")) / "ce", "ce", epochs=4, **as_files(root)))
    return str(root / "ce")


@pytest.mark.parametrize("method", greg.METHODS)
def test_a_step_is_one_of_sgd_on_greg_loss_in_training_mode(method, begin, tmp_path, monkeypatch):
    row, loss, seen, picks = greg.METHODS[method], greg.greg_loss, [], []
    spied = lambda f, to: lambda *a, **k: to.append((a, f(*a, **k))) or to[-1][1]  # noqa: E731
    monkeypatch.setattr(greg, "greg_loss", spied(loss, seen))
    monkeypatch.setattr(greg, "energy_sampling", spied(greg.energy_sampling, picks))
    options = {"m_in": -5.0, "m_aux": -2.0, "grad_every": 3, "reduction": "released"}
    run = begun(tmp_path, method, init=begin, wd=0.01, lambda_grad=0.5, **options)
    m_in, m_aux = (-0.5, -0.5) if method == "oe+grad" else (-5.0, -2.0)
    twin, terms = copy.deepcopy(run.net), []
    sgd = torch.optim.SGD(twin.parameters(), 1, 0.9, weight_decay=0.01, nesterov=True)
    ended(run)
    for t, ((net, x_in, y_in, x_aux, *more), out) in enumerate(seen):
        weight = 1.5 * (row.gradient is not None and t % 3 == 0)
        score, aux_loss = row.gradient or greg.energy_score, getattr(more[-1], "func", None)
        assert (net, *more[:-1]) == (run.net, m_in, m_aux, row.lambda_s, weight, "released", score)
        assert (aux_loss or greg.energy_loss) is row.loss and not run.sums.requires_grad
        assert len(x_in) == 16 and len(x_aux) == 16 * row.sampler.per_id
        if row.sampler.pick:
            (z, s, k, _), i = picks[t]
            z_twin, f_twin = twin.eval().features(x_aux), twin(x_aux)
            theirs = z_twin, (greg.absent if row.extra_class else greg.energy_score)(f_twin)
            torch.testing.assert_close((z[i], s[i]), theirs, rtol=0.01, atol=0.02)
            assert len(z) == len(s) == 96 and k == 16
        again = loss(twin.train(), x_in, y_in, x_aux, *more)
        torch.testing.assert_close(again.loss, out.loss, rtol=0.01, atol=1e-3)
        sgd.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * t / 8)) / 2
        sgd.zero_grad()
        again.loss.backward()
        sgd.step()
        s_in, s_aux = out.scores.split([16, len(x_aux)])
        hits = out.logits[:16, :4].argmax(1) == y_in, s_in <= m_in, s_aux >= m_aux
        terms.append([v.item() for v in out[:4]] + [v.sum() / (len(v) or 1) for v in hits])
    torch.testing.assert_close(run.net.state_dict(), twin.state_dict(), rtol=0.01, atol=0.005)
    last, means = run.rows[-1], np.mean(terms[4:], 0).tolist()
    means[3] *= 3  # of the steps that take the gradient term, one in three
    assert [last[k] for k in ("epoch", *greg.TERMS)] == pytest.approx([2, *means], rel=1e-4)


class Tape(torch.utils._python_dispatch.TorchDispatchMode):  # for a CUDA graph
    def __torch_dispatch__(self, f, types, args, kwargs=None):
        return Tape.done.append((f, args, kwargs or {}, out := f(*args, **kwargs or {}))) or out

    @torch.inference_mode()
    def replay(self):  # does again what was done, in the memory of then
        Tape.seen.append(self)
        for f, args, kwargs, out in Tape.done:
            for old, new in zip(*map(tree_leaves, (out, f(*args, **kwargs))), strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


def test_a_graph_of_the_fourth_step_is_all_steps_after_it(begin, tmp_path, monkeypatch):
    loss, ends, Tape.done, Tape.seen = greg.greg_loss, [], [], []
    for name, by in ("CUDAGraph", Tape), ("graph", lambda g: g), ("device", torch.device):
        monkeypatch.setattr(torch.cuda, name, by)
    monkeypatch.setattr(greg, "greg_loss", lambda *a: Tape.seen.append(a) or loss(*a))
    for g in False, True:  # with a graph the fourth step is repeated, less its Python
        ended(run := begun(tmp_path / f"{g}", "greg", init=begin, batch=8, epochs=1, cuda_graph=g))
        ends.append([*run.net.parameters(), *map(run.rows[1].get, greg.TERMS)])
    exactly([*ends[0], 8 + 4 + 5], [*ends[1], len(Tape.seen)])


@given(st.sampled_from(["greg+", "oe", "ce"]), *map(st.integers, (99, 1, 1, 40), (999, 9, 3, 999)))
def test_every_auxiliary_image_is_a_candidate_each_epoch(method, n_aux, steps, ranks, aux_epoch):
    n_in, epochs = 2 * ranks * steps, []
    total = {"oe": 2 * n_in, "ce": 0, "greg+": max(min(n_aux, aux_epoch), 2 * n_in)}[method]
    c = greg.Config(method, batch=2 * ranks, aux_epoch=aux_epoch, candidates=2)
    ids, aux = (greg.Images(*[torch.arange(n)] * 2) for n in (n_in + 1, n_aux))
    run = greg.Run(c, None, CPU, ids, aux if total else None, None, None, None, steps)
    with pytest.MonkeyPatch.context() as patch:  # images that are their own indices
        for name, take in ("augment", lambda x, g: x), ("to_input", lambda run, x, g: x):
            patch.setattr(greg, name, take)
        for run.epoch in range(2):
            parts = []
            for rank in range(ranks):
                patch.setattr(greg, "world", lambda rank=rank: (rank, ranks))
                parts += greg.batches(run)
            epochs.append([torch.cat(v) for v in zip(*parts, strict=True)])
    x, y, aux = epochs[0]
    counts, sizes = torch.bincount(aux, minlength=n_aux), [len(v) for *_, v in parts]
    assert torch.equal(x, y) and len(x) == n_in == len(x.unique()) and len(aux) == total
    assert counts.max() <= -(-total // n_aux) and counts.min() >= total // n_aux
    assert max(sizes) - min(sizes) <= 1
    shuffled = len(aux) and not aux.equal(epochs[1][2]) and (aux[:12].diff() < 0).any()
    assert shuffled or method != "greg+"


def test_noise_is_gaussian_in_pixels_on_training_images_alone_and_formats_are_kept(begin, tmp_path):
    options, seen = {"noise": 0.1, "channels_last": True, "amp": True}, set()
    plain, run = (begun(tmp_path / f"{len(o)}", "greg+", init=begin, **o) for o in ({}, options))
    std = torch.tensor(greg.STATS["cifar10"][1])
    for (a, _, a_aux), (b, _, b_aux) in zip(*map(greg.batches, (plain, run)), strict=True):
        for d in b - a, b_aux - a_aux:
            assert (d.std((0, 2, 3)) * std).tolist() == pytest.approx([0.1] * 3, rel=0.1)
        assert (b - a - (b_aux - a_aux)[:16]).abs().max() > 0.1  # either side its own
        assert a.is_contiguous() and b.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(greg.to_input(run, IDS.x), greg.normalise(IDS.x, *greg.STATS["cifar10"]))
    greg.save(run, gamma=0.0, score="msp")
    for net in run.net, greg.load_run(run.folder, CPU)[0]:
        assert net.features[0].weight.is_contiguous(memory_format=torch.channels_last)
    run.steps, now = 1, lambda: type(torch.overrides._get_current_function_mode())
    run.net.fc.register_forward_hook(lambda m, x, f: seen.add((m.training, f.dtype, len(f), now())))
    greg.train_epoch(run)
    wanted = {(False, *v, type(None)) for v in ((torch.bfloat16, 96), (a.dtype, 64), (a.dtype, 96))}
    assert seen == wanted | {(True, torch.bfloat16, 48, greg.FastDoubleBackward)}
    run.train_set = IDS._replace(x=greg.Files([f"{tmp_path}/no.png"] * 64, 8))
    run.config = greg.replace(run.config, workers=1)
    refuses(lambda: next(greg.batches(run)), "no.png", "another image in its place")


def fake(monkeypatch, n_in, n_aux, d):  # a run whose images are their own features and logits
    monkeypatch.setattr(greg, "embed_images", lambda _, x, i=None: (x if i is None else x[i],) * 2)
    ns, net = SimpleNamespace, SimpleNamespace(fc=nn.Linear(d, d))
    sets = {"train_set": normal(n_in, n_in, d), "aux_set": normal(n_aux, n_aux, d)}
    return ns(**sets, memory={}, net=net, config=ns(m_in=-3.0, m_aux=-2.0))


def test_the_compared_methods_mix_weigh_and_mine_as_their_authors_do(monkeypatch):
    x_in, x_aux, g, shares = normal(0, 3, 4), normal(1, 3, 4), generator(0), []
    for _ in range(500):
        x, context = greg.mix(None, x_in, x_aux, g)
        torch.testing.assert_close(x, x_aux + context["lam"] * (x_in - x_aux))
        shares.append(context["lam"].item())
    assert [np.mean(shares), np.var(shares)] == pytest.approx([0.5, 1 / 84], rel=0.1)
    for K, alpha, gamma in (10, 10.0, 0.05), (100, 100.0, 0.005):
        run = fake(monkeypatch, 5, 200, K)
        prior = np.bincount(run.aux_set.argmax(1), minlength=K) / 200
        for _ in range(2):
            x, context = greg.balance(run, None, run.aux_set, None)
            assert x is run.aux_set and context.pop("prior").tolist() == pytest.approx([*prior])
            assert context == {"m_in": -3, "m_aux": -2, "alpha": alpha, "gamma": gamma}
            run.aux_set = -run.aux_set  # the network has moved on
    means, run, order = [], fake(monkeypatch, 1, 400, 3), torch.randperm(400)
    ranked = greg.absent(run.aux_set).argsort().tolist()
    for n, size in (90, 90), (1000, 100):
        kept = [i for i in order.tolist() if i in ranked[50 : 50 + size]]
        assert greg.ntom_pool(run, order, n, None).tolist() == kept
    monkeypatch.setattr(greg, "poem_draw", lambda mean, factor, g: means.append(mean) or mean + 1.0)
    for N, n in (5, 9), (40, 12), (37, 37), (400, 90):
        run, past = fake(monkeypatch, 200, N, 3), []
        for epoch in range(6):
            order = torch.randperm(N, generator=generator(epoch))
            chosen = greg.poem_pool(run, order, n, None).tolist()
            z = torch.cat([run.train_set.repeat(min(epoch, 4), 1), run.aux_set[past]])
            y = 3 - 6 * (torch.arange(len(z)) < 200 * min(epoch, 4)).double()
            beta = torch.linalg.solve(z.mT @ z / 0.5 + torch.eye(3) / 20, z.mT @ y / 0.5)
            torch.testing.assert_close(means[-1], beta, rtol=1e-6, atol=1e-9)
            nearest = {*(run.aux_set @ (beta + 1)).abs().argsort()[:n].tolist()}
            assert chosen == [i for i in order.tolist() if i in nearest]
            past = (past + chosen)[-4 * len(chosen) :]


@pytest.mark.parametrize("method", ["greg+", "poem+grad", "balanced"])
def test_a_run_stopped_anywhere_goes_on_as_if_not(method, begin, tmp_path, monkeypatch, capsys):
    options = {"init": begin, "noise": 0.05, "candidates": 4}
    options |= as_files(tmp_path) if method == "greg+" else {}
    a, b, c = map(tmp_path.joinpath, "abc")
    loss, clock = greg.greg_loss, itertools.count(1e10, 999)
    before = [signal.signal(number, signal.SIG_DFL) for number in greg.SIGNALS]
    ended(begun(a, method, **options))
    for at, signals, error, words in (  # at the last step of an epoch too; then Ctrl-C is a kill
        (2, [signal.SIGTERM] * 2, SystemExit, "143"), (4, [signal.SIGHUP], SystemExit, "129"),
        (7, [signal.SIGHUP, signal.SIGINT], KeyboardInterrupt, None),
        (8, [], FloatingPointError, "ce .* epoch 2")):  # fmt: skip
        run = begun(b, method, workers=at // 4, **options)

        def disturbed(net, *args, run=run, at=at, signals=signals):
            if 4 * run.epoch + run.step + 1 == at:
                net.fc.bias.data *= 1 if signals else math.nan
                for number in signals:
                    os.kill(os.getpid(), number)
            return loss(net, *args)

        with monkeypatch.context() as patch, pytest.raises(error, match=words):
            patch.setattr(greg, "greg_loss", disturbed)
            if at == 7:  # looks and saves after every step
                patch.setattr(greg, "time", SimpleNamespace(time=clock.__next__, sleep=bool))
            ended(run)
        state, err = greg.stored(b), capsys.readouterr().err
        assert 4 * state["epoch"] + state["step"] == min(at, 6)
        assert ("goes on from here" in err) == (error is SystemExit)
    assert {signal.getsignal(number) for number in greg.SIGNALS} == {signal.SIG_DFL}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with greg.interrupts(run):
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    with pytest.raises(KeyboardInterrupt), greg.interrupts(run):  # after the last step
        os.kill(os.getpid(), signal.SIGTERM)
    list(map(signal.signal, greg.SIGNALS, before))
    ended(begun(b, method, **options))
    greg.ThreadPoolExecutor().submit(ended, begun(c, method, seed=1, **options)).result()
    first, second, third = ([greg.stored(d)[k] for k in ("net", "memory")] for d in (a, b, c))
    exactly(first, second)
    assert not torch.equal(first[0]["fc.weight"], third[0]["fc.weight"])
    for row, other in zip(*(greg.stored(d)["rows"] for d in (a, b)), strict=True):
        assert row | {"seconds": 0} == pytest.approx(other | {"seconds": 0})


def test_rows_recipes_and_defaults_are_those_of_the_paper_and_its_rivals():
    expected = """ce 0 0.1 energy pretrain 0 0 | energy 1 0.1 energy finetune 0 0 | greg 1 0.1
        energy finetune 0 1 | energy+sampling 2 0.1 energy greg+ 0 0 | greg+ 2 0.1 energy greg+ 0 1
        | oe 2 0.5 msp finetune 0 0 | openmix 1 1 msp openmix 1 0 | poem 1 0.1 energy mining 0 0 |
        ntom 2 1 absent mining 1 0 | dos 1 1 absent mining 1 0 | balanced 2 0.1 energy finetune 0 0
        | oe+grad 2 0.5 msp finetune 0 1 | poem+grad 1 0.1 energy mining 0 1 | pretrain 100 0.1
        cosine 128 0.0005 | finetune 20 0.001 cosine 64 0.0005 | greg+ 60 0.1 5/6 64 0.0001 | mining
        100 0.1 0.5,0.75,0.9 64 0.0001 | openmix 200 0.1 0.5,0.75 128 0.0005 | greg cifar10
        random300k 32 wrn40_2 0 torchvision 20 0.001 cosine 64 0.0005 6 600000 0 -25.0 -7.0 0.1
        1.0 paper 1 0.0 imagenet False False False False () data False 4 600 32 1 128"""
    found, sizes = [], ((32, "cpu"), (224, "cpu"), (32, "meta"))
    for k, m in greg.METHODS.items():
        found += k, m.sampler.per_id, m.lambda_s, m.score, m.recipe, +m.extra_class, +bool(m[2])
    found += (v for k, recipe in greg.RECIPES.items() for v in (k, *recipe.values()))
    found += (v for v in vars(of("greg", init="torchvision")).values() if v != "")
    found += greg.SAVE_SECONDS, *(greg.chunk(torch.empty(1, 3, n, n, device=d)) for n, d in sizes)
    assert [str(v) for v in found] == expected.replace("|", "").split()
    c, shares = SimpleNamespace(lr=2.0, schedule="0.5,5/6"), (0, 29, 30, 49, 50, 59)
    rates = [greg.learning_rate(c, Fraction(share, 60)) for share in shares]
    assert rates == pytest.approx([2, 2, 0.2, 0.2, 0.02, 0.02])


def test_a_configuration_suits_its_data_and_is_kept_or_refused(begin, tmp_path, monkeypatch):
    state, file = greg.stored(begin), str(tmp_path / "file.pt")
    torch.save(state | {"config": state["config"] | {"stats": "dice"}}, file)
    big, small = "id=imagenet:20", "id=imagenet arch=resnet18"
    for method, given_, fields in (
        ("ce", f"{big} arch=densenet121", "init=torchvision size=224 stats=imagenet lr=0.001 aux="),
        ("ce", "id=cifar100", "stats=cifar100 aux="), ("ce", "id=. stats=dice", "stats=dice"),
        ("greg+", "aux=imagenet", "aux=imagenet"), ("greg+", "id=synthetic", "aux=synthetic"),
        ("greg+", "aux=a/b ood=ab", "ood=('ab',)"), ("greg+", "", "aux=random300k size=32 lr=0.1"),
        ("greg+", f"{big} init={begin}", "aux=imagenet:20 lr=0.001 epochs=20 stats=cifar10"),
        ("greg+", f"{big} init={begin} aux=imagenet", "aux=imagenet:20"),
        ("greg", f"init={file}", "stats=dice"), ("greg", f"init={file} stats=dice", "stats=dice"),
        ("ce", small, "lr=0.1 init="), ("ce", f"{small} init={begin}", "lr=0.001")):  # fmt: skip
        c = of(method, **dict(pair.split("=") for pair in given_.split()))
        for key, value in (pair.split("=") for pair in fields.split()):
            assert str(getattr(c, key)) == value, (method, given_, key)
    assert str(of("greg+", wd=np.float64(0), id=Path("cifar10"))) == str(of("greg+", wd=0.0))
    monkeypatch.setitem(greg.METHODS, "own", greg.Method(greg.energy_loss, gradient=greg.msp))
    above_0 = "epochs lr batch size candidates grad_every".split()
    not_below_0 = "wd n_train lambda_s lambda_grad noise workers aux_epoch".split()
    for word, change in (
        ("greg", {"init": ""}), ("auto", {"method": "greg+", "init": "", "margins": "auto"}),
        ("m_in", {"m_in": -7.0}), ("m_in", {"m_in": -math.inf}), ("m_in", {"m_aux": math.nan}),
        ("at least 2", {"method": "greg+", "candidates": 1}), ("--lr", {"lr": math.nan}),
        *(("--schedule", {"schedule": s}) for s in ("0.5;1", "1/0", "0.5,1", "0", "")),
        *((f"--{k} ".replace("_", "-"), {k: 0}) for k in above_0), ("--wd", {"wd": math.inf}),
        *((f"--{k} ".replace("_", "-"), {k: -1}) for k in not_below_0),
        ("omit --aux", {"id": "imagenet:5", "aux": "imagenet:6"}), ("imagenet", {"stats": "dice"}),
        ("'x': one of ce, e", {"method": "x"}), ("'Auto': one of , auto", {"margins": "Auto"}),
        ("dice", {"init": file, "stats": "cifar10"}), ("--m-aux", {"margins": "auto", "m_in": -3}),
        ("own has another", {"method": "own", "margins": "auto"})):  # fmt: skip
        refuses(lambda c=change: of(**{"method": "greg", "init": "torchvision"} | c), word)


def test_a_folder_is_gone_on_with_only_by_its_own_run(begin, tmp_path, monkeypatch):
    folder, new, aux = tmp_path / "r", tmp_path / "new", coloured(2, 130)
    again = lambda where=folder, **more: begun(where, "oe", **{"init": begin} | more)  # noqa: E731
    again(tmp_path / "64", batch=64, aux=aux._replace(x=aux.x[:128]))
    greg.save(run := again(cuda_graph=True))
    again(init=f"{os.path.relpath(begin)}/checkpoint.pt", workers=2, root="x", ood=("a",))
    other, order = (IDS._replace(classes=tuple(classes)) for classes in ("abce", "abdc"))
    for where, words, change in (
        (folder, ["lr 0.05 -> 0.1", "another folder"], {"lr": 0.1}),
        (folder, ["margins"], {"margins": "auto"}), (folder, ["their order"], {"ids": order}),
        (folder, ["other images"], {"ids": IDS._replace(y=IDS.y.flip(0))}),
        (folder, ["other images"], {"aux": aux}), (folder, ["['d']", "['e']"], {"ids": other}),
        (new, ["['d']", "['e']"], {"ids": other}), (new, ["--arch"], {"arch": "wrn40_2"}),
        (new, ["31 aux", "16 and 32 (--batch"], {"aux": aux._replace(x=aux.x[:31])}),
        (new, ["['c']", "--n-train"], {"ids": IDS._replace(y=IDS.y.where(IDS.y != 2, 0))}),
        (folder, ["other images"], {"ids": IDS._replace(x=IDS.x[[*range(16), *range(48)]])}),
        (new, ["64 ID"], {"batch": 65, "aux": aux})):  # fmt: skip
        refuses(lambda where=where, change=change: again(where, **change), *words)
    refuses(lambda: begun(new, "greg+", init=begin, candidates=7), "16 and 112 (--batch, --cand")
    refuses(lambda: greg.stored(tmp_path), str(tmp_path), error=FileNotFoundError)
    state, config = greg.stored(folder), greg.stored(folder)["config"]
    for key in "arch", "method", "stats":
        refuses(lambda k=key: greg.saved_config(config | {k: "mine"}), f"no {key} 'mine' here")
    gone = state | {"config": config | {"init": "/gone/ce", "ood": ("x",)}}
    monkeypatch.setattr(greg, "load_sets", lambda c: os.stat(*c.ood))
    torch.save(gone, folder / "checkpoint.pt")
    refuses(lambda: greg.train(of("oe", **BASE, init=begin), folder), "'x'", error=OSError)
    assert again().config.init == "/gone/ce"
    old = {k: v for k, v in config.items() if k not in ("noise", "margins")}
    assert greg.saved_config(old | {"grad_share": 1.0}) == greg.saved_config(config)
    with greg.alone(folder):
        refuses(greg.alone(folder).__enter__, "another process works", str(folder))
    greg.save(greg.replace(run, epoch=2))
    before = {*folder.iterdir()}
    greg.write_atomically(tmp_path / "x", "\udcff")  # of a name that is no UTF-8
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda self, _: self.touch() or os.stat("no room"))
        refuses(lambda: greg.save(run), "could not be written", "no room", error=OSError)
    path, prev = folder / "checkpoint.pt", greg.stored(folder / "checkpoint.prev.pt")
    assert {*folder.iterdir()} == before and again().epoch == 2 and prev["epoch"] == 0
    for content in path.read_bytes()[:-1], path.read_bytes()[:5000], b"":
        path.write_bytes(content)
        refuses(again, str(path))
    refuses(lambda: path.rename(f"{path}.pt") and again(), str(path), error=FileNotFoundError)
    torch.save(state["net"], path)  # a public file
    assert greg.stored(folder) == greg.stored(path) == {}
    refuses(again, "no run's")


def test_a_further_class_and_a_new_head_are_of_the_seed(begin, tmp_path, monkeypatch, capsys):
    def own(K):  # with integers and a weight beside features and head
        (net := small(K)).register_buffer("at", torch.arange(3))
        return net.register_parameter("own", nn.Parameter(torch.rand(3))) or net

    heads, file = [], f"{begin}/checkpoint.pt"
    start, state = greg.load_weights(greg.ARCHS["wrn10_1"](4), file), torch.get_rng_state()
    for seed, size in (0, 8), (2**70 + 1, 8), (0, 9):
        net = greg.build(of("ntom", **BASE, init=file, seed=seed), IDS.classes, size)
        exactly(net.features.state_dict(), start.features.state_dict())
        exactly((net.fc.weight[:4], net.fc.bias[:4]), (start.fc.weight, start.fc.bias))
        heads.append(net.fc.weight[4])
    assert torch.equal(state, torch.get_rng_state()) and "8×8, not 9\n" in capsys.readouterr().err
    assert torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])
    small, file = greg.ARCHS["wrn10_1"], tmp_path / "w.pt"
    torch.save((source := small(1000)).state_dict(), file)
    monkeypatch.setitem(greg.ARCHS, "densenet121", small)
    monkeypatch.setattr(greg, "published", lambda *where: file)
    net = greg.build(greg.Config("ce", init="torchvision", arch="densenet121"), "abc")
    exactly(net.features.state_dict(), source.features.state_dict())
    assert net.fc.out_features == 3
    monkeypatch.setitem(greg.ARCHS, "mine", own)
    torch.save((source := own(3)).state_dict(), file)
    net = greg.build(greg.Config("ce", init=str(file), arch="mine"), "abc")
    exactly(net.state_dict(), source.state_dict())
    for odd in lambda K: small(K + 1), lambda K: nn.Linear(9, K):
        monkeypatch.setitem(greg.ARCHS, "mine", odd)
        refuses(lambda: greg.build(greg.Config("ce", arch="mine"), "abc"), "'mine'](3) is no")


def test_the_log_has_figure_3_and_only_what_there_is(begin, tmp_path):
    run = begun(tmp_path, "openmix", init=begin)
    x = greg.normalise(torch.cat([IDS.x, AUX.x]), *greg.STATS["cifar10"]).requires_grad_()
    (g,) = torch.autograd.grad((s := greg.energy_score(f := run.net.eval()(x)[:, :4])).sum(), x)
    g, hits = g.flatten(1).norm(dim=1), (f[:64].argmax(1) == IDS.y).float()
    wanted = {"s_in": s[:64], "s_aux": s[64:], "gradient_in": g[:64], "gradient_aux": g[64:]}
    wanted |= {"accuracy": hits, "energy": greg.energy_loss(s[:64], s[64:])}
    wanted = {f"probe_{k}": v.mean().item() for k, v in wanted.items()}
    run.net.train()
    for epoch in 3, 2:
        with torch.autocast("cpu", torch.bfloat16):  # the caller's
            row = greg.log(run, {"epoch": epoch})
        assert row == pytest.approx(wanted | {"epoch": epoch}, rel=1e-4)
        assert [row["epoch"] for row in run.rows] == [0, epoch] and run.net.training
        assert run.rows == [*map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())]
    run.net.fc.bias.data[0] = math.nan
    refuses(lambda: greg.log(run, {"epoch": 3}), "NaN", error=FloatingPointError)
    first, *_, last = greg.stored(begin)["rows"]
    assert not {k for k in last if k[:6] == "probe_" and ("aux" in k or "energy" in k)}
    assert last["probe_accuracy"] > 0.5 > first["probe_accuracy"]


def test_margins_a_collapse_and_an_idle_gradient_term(begin, tmp_path, monkeypatch, capsys):
    for s_in, s_aux, *auto in (-9.126, -2.004, -9.13, -2.0), (2, 1, 2, 3.45), (-9, -8, -9, -2.51):
        row, folder, logged = {"probe_s_in": s_in, "probe_s_aux": s_aux}, tmp_path / str(s_in), []
        log = lambda run, new, row=row, to=logged: to.append(run.config.m_in) or row | new  # noqa: E731
        monkeypatch.setattr(greg, "log", log)
        greg.save(begun(folder, "greg", init=begin, margins="auto"))
        run = begun(folder, "greg", init=begin, margins="auto")
        assert [run.config.m_in, run.config.m_aux] == auto and logged == [-25, auto[0]]
    run.rows = [{"probe_accuracy": 0.9}]
    for epoch, (method, margins, fell, share, *words) in enumerate((
        ("energy", "", 0.11, 0.0, "fell by 11.0%; --margins auto"), ("energy", "", 0.09, 0.0),
        ("oe", "", 0.2, 0.0, "fell by 20.0%\n"), ("energy", "auto", 0.2, 0.0, "fell by 20.0%\n"),
        ("greg", "", 0.0, 0.019, "score is -9.0 on ID, -8.0 on aux", "--margins auto"),
        ("greg", "", 0.0, 0.021), ("ce", "", 0.0, 0.0))):  # fmt: skip
        capsys.readouterr()
        run.config = greg.replace(run.config, method=method, margins=margins)
        greg.end_epoch(run, {"probe_accuracy": 0.9 - fell, "share_in": share, "share_aux": 0.0})
        err = capsys.readouterr().err
        assert all(word in err for word in words) and bool(err) == bool(words)
        assert run.epoch == greg.stored(folder)["epoch"] == epoch + 1
    run.step, bar, run.sums = 1, Mock(), torch.tensor([2.0, 1, 1, 0, 0.5, 0, 0])
    assert greg.look(run, bar) == dict(zip(greg.TERMS, run.sums.tolist(), strict=True))
    bar.set_postfix_str.assert_called_once_with("loss 2 accuracy 0.5", refresh=False)  # no zeros


def two_steps(rank, ranks, folder, options):  # two, with a signal to the last in one
    torch.distributed.init_process_group("gloo", f"file://{folder}/store{ranks}", None, ranks, rank)
    union = normal(1, 12, 3, 8, 8), torch.arange(12) % 4, normal(2, 12, 3, 8, 8)
    greg.batches, greg.end_epoch = lambda run: [[v.chunk(ranks)[rank] for v in union]], lambda *_: 0
    greg.load_weights = greg.load_weights if rank == 0 else lambda net, *_: net  # begins apart
    run, save = begun(folder / f"run{ranks}", "greg", **options), greg.save
    greg.save = lambda run: greg.time.sleep(0.5 * (rank == 0)) or save(run)  # none leaves before
    run.net.double().spare = nn.Parameter(torch.zeros(1))  # that the loss does not reach
    run.stopped_by = greg.train_epoch(run) or int(signal.SIGHUP) * (rank + 1 == ranks)
    pytest.raises(SystemExit, greg.train_epoch, run).match(str(128 + (run.stopped_by or 15)))
    assert greg.stored(run.folder) and greg.main([]) == 2 and greg.world()[1] == ranks  # it stays
    torch.save([run.net.state_dict(), run.sums], folder / f"{ranks}{rank}")


@pytest.mark.parametrize("more", [{"reduction": "released"}, {"reduction": "paper"}, {}])
def test_two_processes_take_the_step_of_one_on_the_union(more, begin, tmp_path):
    options = {"init": begin, "m_in": -2.2, "m_aux": -2.0, "lambda_grad": 3.0, "lambda_s": 0.5}
    options |= more | {"sync_bn": bool(more)}
    by = "spawn" if torch.cuda.is_available() else "fork"  # which is faster
    for n in 1, 2:
        torch.multiprocessing.start_processes(two_steps, (n, tmp_path, options), n, start_method=by)
    (one, sums), (two, ours), last = (greg.read_tensors(tmp_path / k) for k in ("10", "20", "21"))
    assert sums.isfinite().all() and (sums[1:4] > 0).all()
    exactly([*last, greg.stored(tmp_path / "run2")["net"]], [two, ours, two])
    if more:
        one, two = ({k: v for k, v in net.items() if v.is_floating_point()} for net in (one, two))
        torch.testing.assert_close(ours, sums, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)


# ---- Evaluation, tables, figures, command line (section 9)
parsed = lambda line: greg.parser().parse_args(greg.shlex.split(line))  # noqa: E731


@pytest.fixture(scope="module")
def lab(tmp_path_factory):  # built-in images as a user's own files, two finished runs: ce, greg
    folder, arrays = tmp_path_factory.mktemp("lab"), {}
    for name, n in {"train": 320, "test": 200, "aux": 256, "cells": 60, "rays": 40}.items():
        images = greg.synthetic(name, n)
        x = images.x.view(n, 8, 4, 8, 4, 3).float().mean((2, 4)).byte().numpy()
        np.save(folder / f"{name}.npy", x)
        arrays |= {f"x_{name}": x, f"y_{name}": images.y} if images.y is not None else {}
    np.savez(folder / "id.npz", **arrays)
    line = f"train --id {folder}/id.npz --arch wrn10_1 --batch 32 --lr 0.05 --device cpu --ood"
    line += f" rays={folder}/rays.npy cells={folder}/cells.npy --out {folder}/"
    more = f"greg --method greg --epochs 1 --aux {folder}/aux.npy --init {folder}/ce --n-train 64"
    for options in "ce --method ce --epochs 4", more:
        assert greg.main((line + options).split()) == 0
    return folder


@pytest.fixture()
def cli(lab, monkeypatch, capsys):  # runs a command in the lab, expecting its code -> its output
    def run(line, code=0):
        capsys.readouterr()
        with greg.contextlib.suppress(SystemExit):  # of --help
            assert greg.main(greg.shlex.split(line)) == code, (line, capsys.readouterr())
        return capsys.readouterr()

    monkeypatch.chdir(lab)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # its digits are a CPU's
    return run


def table_rows(text):  # the cells of the Markdown tables in a text, a list of rows a table
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    split = [[re.split(r" (?<!\\)\| ", v[2:-2]) for v in b.splitlines()] for b in blocks]
    return [[rows[0], *rows[2:]] for rows in split]


def test_evaluation_is_by_the_functions_of_sections_5_and_6(monkeypatch, capsys):
    monkeypatch.setitem(greg.SCORES, "mine", lambda net, x, *_: greg.energy_score(net(x)[:, :10]))
    net = copy.deepcopy(more := seeded(0, lambda: greg.wrn(10, 1, 11)).train()).eval()
    net.fc.weight.data, net.fc.bias.data = net.fc.weight.data[:10], net.fc.bias.data[:10]
    more.fc.bias.data[10] = 2.0
    train_set, test_set, rays = (greg.synthetic(k, 30) for k in ("train", "test", "rays"))
    c, stats = greg.Config("ce", id="x", arch="wrn10_1", stats="dice"), greg.STATS["dice"]
    x, x_fit = (greg.normalise(v.x, *stats) for v in (test_set, train_set))
    (z, f), (z_fit, _) = greg.embed(net, x), greg.embed(net, x_fit)
    fit = greg.fit_scores(net, z_fit, train_set.y, greg.post_hoc("x", "wrn10_1", 10), stats[1])
    test_set.y[:] = (f.argmax(1) + (torch.arange(30) >= 10)) % 10  # 1 / 3: above 1/10 + 30^-1/2
    ood = {"rays": rays, "cells": greg.synthetic("cells", 20)}
    found, raw = torch.no_grad()(greg.evaluate)(more, train_set, test_set, ood, c, [*greg.SCORES])
    assert found["accuracy"] == pytest.approx(1 / 3) and more.training
    x.requires_grad_()
    for name, score in greg.SCORES.items():
        wanted = more.eval()(x).softmax(1)[:, 10] if name == "absent" else score(net, x, f, z, fit)
        s_in, metrics = raw[f"{name}/id"], found["metrics"][name]
        torch.testing.assert_close(s_in, wanted.detach(), rtol=1e-3, atol=1e-4, msg=name)
        assert found["gamma"][name] == greg.threshold(s_in) and len(raw[f"{name}/cells"]) == 20
        a, b = (greg.ood_metrics(s_in, raw[f"{name}/{k}"]) for k in ood)
        mean = {m: pytest.approx((a[m] + b[m]) / 2) for m in a if m not in ("n_in", "n_out")}
        assert metrics == {"rays": a, "cells": b, "mean": mean}
    (g,) = torch.autograd.grad(greg.energy_score(net(x)).sum(), x)
    assert found["gradient_norm"]["id"] == pytest.approx(g.flatten(1).norm(dim=1).mean().item())
    seen, i = [], torch.arange(1010) % 30  # ‖∇S‖: of 1,000 images at most
    by_chance = test_set._replace(x=test_set.x[i], y=(f.argmax(1)[i] + (i < 26)) % 10)
    monkeypatch.setattr(greg, "input_gradients", lambda n, x, K: seen.append(len(x)) or x)
    greg.evaluate(net, train_set, by_chance, {"rays": rays}, c, ["energy"])
    assert re.findall(r"y (\S+) is chance", capsys.readouterr().err) == ["13.1%"]  # 132 / 1010
    assert sum(seen) == 1000 + 30 and max(seen) <= 32


def test_a_run_has_its_own_ood_sets_the_papers_or_the_built_in(monkeypatch):
    asked, fake = [], (greg.synthetic("train", 20), greg.synthetic("test", 10))
    monkeypatch.setattr(greg, "load_ood", lambda specs, *a: asked.append((specs, a)) or {})
    monkeypatch.setattr(greg, "load_id", lambda *a: fake)
    for id_data in "synthetic", "cifar100", "imagenet:20":
        train_set, test_set, _ = greg.load_sets(greg.Config(id=id_data, n_train=12))
        assert len(train_set.x) == len(train_set.y) == 12 and test_set is fake[1]
    assert len(greg.load_sets(greg.Config(ood=("a=b",), root="r", download=True))[0].x) == 20
    wanted = ["synthetic"], [*greg.PAPER_OOD], [*greg.IMAGENET_OOD], ["a=b"]
    assert [[*specs] for specs, _ in asked] == [*wanted] and asked[-1][1] == ("r", True, 32)


def test_a_finished_run_is_read_and_passes_for_no_other(lab, tmp_path, monkeypatch, capsys):
    done, text = greg.read_results(lab / "ce"), (lab / "ce" / "results.json").read_text()
    c, near = greg.saved_config(done["config"]), os.path.relpath(lab / "id.npz")
    assert {*done["metrics"]} == {*greg.POST_HOC_ROWS} and done["score"] == "energy"
    respelt = {"ood": [v.replace("=/", "=/../") for v in c.ood[::-1]], "id": f"/..{c.id}"}
    for same in {}, {"id": near}, respelt, {"candidates": 9, "lambda_s": 2.0, "m_in": -9.0}:
        assert greg.train(greg.replace(c, **same), lab / "ce", CPU) == done
    others = [("other OOD sets", {"ood": (spec,)}) for spec in (c.ood[0], "rays", "synthetic")]
    monkeypatch.chdir(tmp_path)  # where `near` is another path
    for message, odd in *others, ("lr 0.05 -> 0.5", {"lr": 0.5}), (f"-> {near}", {"id": near}):
        refuses(lambda odd=odd: greg.train(greg.replace(c, **odd), lab / "ce"), message)
    odd = {"lambda_grad": 2.0, "lambda_s": 2.0, "m_in": -9.0, "candidates": 9, "init": f"{lab}/ce"}
    idle = {"ce": "is fin[^$]*grad cand.* aux lambda_s m_in", "oe": "lambda_grad candidates m_in"}
    for method, said in (idle | {"oe+grad": ": candidates m_in"}).items():
        pytest.raises(OSError, greg.train, greg.Config(method, "no.npz", "x", **odd), tmp_path)
        assert re.search(f"{said}\n", capsys.readouterr().err), method
    assert {"torch", "device", "argv"} < {*json.loads(text)} and not greg.read_results(tmp_path)
    assert greg.hashlib.sha256((HERE / "greg.py").read_bytes()).hexdigest()[:12] in text
    refuses(lambda: greg.save_results(tmp_path / "none", {"x": math.inf}, {}), "JSON")
    for bad in "", "[]", "3", '{"accuracy": 0.9}', text[:99], text.replace("fpr95", "fpr"):
        (tmp_path / "results.json").write_text(bad)
        refuses(lambda: greg.read_results(tmp_path), str(tmp_path / "results.json"))
    (tmp_path / "results.json").write_text(text.replace('"wrn10_1"', '"mine"'))
    own, tuned = greg.read_results(tmp_path), greg.read_results(lab / "greg")
    assert json.loads((lab / "greg" / "config.json").read_text()) == tuned["config"]
    (lab / "ce").rename(lab / "moved")  # its start is gone
    assert greg.train(greg.saved_config(tuned["config"]), lab / "greg") == tuned != own
    assert "| method |" in ((lab / "moved").rename(lab / "ce") / "results.md").read_text()
    done = {"config": vars(c := of("ce", id="synthetic")), "gradient_norm": ["id", *greg._OOD]}
    monkeypatch.setattr(greg, "read_results", lambda folder: done)
    assert greg.train(greg.replace(c, ood=["synthetic"]), tmp_path)["config"]["ood"] == ()
    refuses(lambda: greg.train(greg.replace(c, id="./synthetic"), tmp_path), "-> ./synthetic")


def test_a_table_is_markdown_or_for_a_terminal_in_blocks_with_constants_on_top(monkeypatch):
    header, rows = "row same first second third".split(), [[*"ak12"], ["b", "k", 3, "c|\nd"]]
    rows = [[*row, 1.5 * i] for i, row in enumerate(rows)]
    text = greg.shown(header, rows)  # no terminal here
    assert text.splitlines()[2:] == ["| a | k | 1 | 2 | 0.0 |", r"| b | k | 3 | c\| d | 1.5 |"]
    assert text == greg.shown(header, rows, True) and text.splitlines()[1] == "|" + " --- |" * 5
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "20")  # as wide as the first block
    rows[1][3] = "c"
    wanted = "same: k", "row first second", "a 1 2", "b 3 c", "row third", "a 0.0", "b 1.5"
    lines = greg.shown(header, rows).splitlines()
    assert [" ".join(v.split()) for v in lines] == [*wanted] and lines[2] == "a    1      2"
    assert "same:" not in greg.shown(header, rows[:1])


def fake_result(method="greg", id="cifar10", seed=0, sets="ab", score="energy", x=0.5, **options):
    c, scores = greg.asdict(greg.Config(method, id=id, seed=seed, **options)), score.split()
    norms = {"id": 100 * x} | {k: 10 * i for i, k in enumerate(sets, 1)}
    metrics = {s: dict.fromkeys((*sets, "mean"), {"fpr95": x, "auroc": x / 2}) for s in scores}
    result = {"config": c, "accuracy": x / 4, "gradient_norm": norms, "metrics": metrics}
    return result | {"score": scores[0]}


def test_rows_are_what_differs_in_more_than_seed_and_start_and_tables_what_can_be_compared(capsys):
    more = {"lr": 0.2, "margins": "auto"}  # the margins, too, follow from the seed
    runs = [fake_result(init="ce/seed0"), fake_result(x=0.25, m_in=-9.0, init="ce/seed0", **more)]
    runs += [fake_result(seed=1, x=0.75, init="ce/seed1", root="elsewhere", **more)]
    runs += [fake_result("oe", score="msp energy", x=x, aux="mine") for x in (0.1, 0.5)]
    runs += [fake_result(sets="a", init=v) for v in ("", "b")]
    runs += [fake_result(id="x", ood=[f"a={path}"]) for path in "pq"]  # two sets of one name
    del runs[0]["config"]["grad_every"]  # of an older edition
    ((header, *rows), *others) = table_rows(text := greg.results_table(runs))
    assert header[:7] == ["method", "network", "auxiliary", "seeds", "ID accuracy", "a", "b"]
    assert header[7:] == ["mean", "‖∇S‖ ID", "‖∇S‖ OOD"] and [len(t) for t in others] == [3, 2, 2]
    one = "1", "12.50", *["50.00 / 25.00"] * 3, "50.00", "15.00"
    both = ["50.00 ± 35.36 / 25.00 ± 17.68"] * 3
    two = "2", "12.50 ± 8.84", *both, "50.00 ± 35.36", "15.00 ± 0.00"
    labels = {"greg, lr None, margins none": one, "greg, lr 0.2, margins auto": two}
    labels |= {"oe": one, "oe: energy": one}
    assert {row[0]: (*row[3:],) for row in rows} == labels and rows[2][1:3] == ["wrn40_2", "mine"]
    assert others[0][1] == ["greg, init none", "wrn40_2", "none", *one[:3], *one[4:6], "10.00"]
    assert re.findall("ID data (.*)[.]", text) == [*["cifar10"] * 2, "x, a=p", "x, a=q"]
    assert capsys.readouterr().err.count("twice") == 2  # oe, by either score


def test_the_papers_figures_agree_and_a_table_has_ours_beside_them_and_of_what_they_are():
    of = {n: {row[0]: [*map(float, row[2:])] for row in rows} for n, rows in greg.PAPER.items()}
    for number, rows in greg.PAPER.items():
        assert all(row[1] in (greg.METHODS | greg.SCORES) for row in rows)
        assert {*map(len, of[number].values())} == {len(greg.COLUMNS[number])}
    for ours, theirs in ("Energy", "Energy_loss"), ("Energy_+_Grad", "GReg"):  # 4: DenseNet's
        assert of[4][ours] == of[1][theirs][4:] + of[2][theirs][4:]
    assert all(of[5][name] == of[2][name][4:] for name in ("POEM", "DOS", "GReg+"))
    total = sum(sum(figures) for rows in of.values() for figures in rows.values())
    assert total == pytest.approx(19977.40, abs=0.005)
    runs = [fake_result(lr=1, seed=s, arch="resnet18", x=x) for s, x in ((0, 0.25), (1, 0.75))]
    runs += [fake_result("greg", arch="wrn10_1", sets="ba"), fake_result("greg", id="cifar100")]
    runs += [fake_result("oe", score="msp", arch="resnet18", init="ce", margins="auto", m_in=-9)]
    ((header, *rows),) = table_rows(text := greg.paper_table(1, runs))
    cells = {row[0]: row[1:] for row in rows}
    assert header[:2] == ["method", "cifar10 resnet18 mean fpr95"]
    assert cells["GReg"][:2] == ["50.00 ± 35.36 (7.9)", "25.00 ± 17.68 (97.95)"]
    assert cells["Energy loss"][0] == "not run (11.14)"
    assert cells["OE"][0] == "50.00 (1 of 2 seeds) (19.92)"
    assert "- oe: cifar10, auxiliary none, fine-tuned, margins auto\n" in text
    assert "2 seeds (the paper's Table 1); OOD: a, b\n-" in text and text.count("not run (") == 56
    refuses(lambda: greg.paper_table(1, [*runs, fake_result(ood=["a=d/x"])]), "a, b and a=d/x, b")
    last = [(6, fake_result("ce")), (3, fake_result(id="imagenet:1", arch="densenet121"))]
    (clean, *_), (*_, greg_row, _) = (table_rows(greg.paper_table(n, [r]))[0][1:] for n, r in last)
    assert clean == ["Clean", "12.50 (94.84)", "not run (94.03)"] and len(greg_row) == 11
    own = [fake_result(id="a/own.npz", arch="wrn10_1")]
    ((header, *rows),) = table_rows(greg.paper_table(4, own, "a/own.npz", ["wrn10_1"]))
    assert header[1:] == ["own wrn10_1 mean fpr95", "own wrn10_1 mean auroc"]
    assert rows[3] == ["Energy + Grad", "50.00", "25.00"]


def test_a_table_knows_its_runs_and_their_starts():
    line = "table 1 --archs wrn40_2 --seeds 3 --methods energy greg ce --runs r"
    plain, start = greg.table_runs(parsed(line)), "r/cifar10/wrn40_2/ce/seed3"
    assert [*map(str, plain)] == [start.replace("ce", m) for m in ("ce", "energy", "greg")]
    assert [c.init for c in plain.values()] == ["", start, start]
    other = greg.table_runs(parsed(line + " --reduction released --lambda-grad 3 --grad-every 2"))
    (folder,) = [k for k, c in other.items() if plain.get(k) != c]  # options of the others' none
    assert folder.parent.name == "greg-released" and other[folder].lambda_grad == 3
    runs = greg.table_runs(parsed("table 3 --methods oe greg --seeds 0 --id imagenet:20"))
    start = "runs/imagenet:20/densenet121/ce/seed0"
    assert {c.method: c.init for c in runs.values()} == {"ce": "", "oe": start, "greg": start}
    runs = greg.table_runs(parsed("table 2 --methods dos --seeds 0")).values()
    assert {(c.method, c.id) for c in runs} == {("dos", "cifar100")} and len(runs) == 3
    assert len(greg.table_runs(parsed("table 4"))) == 2 * 3 * 7
    assert greg.run_folder(Path("r"), greg.Config(id="a/b.c.npz")).parts[1] == "b.c"


def test_a_cut_down_table_trains_its_runs_and_a_dry_run_tells_which(cli, tmp_path):
    runs, line = tmp_path / "r s", "table 1 --id id.npz --aux aux.npy --methods energy"
    line += " --ood rays=rays.npy cells=cells.npy --archs wrn10_1 --seeds 0 --seeds 1 --epochs 1"
    line += f" --methods greg --n-train 64 --batch 16 --runs '{runs}'"
    out, _ = cli(line + " --dry-run")
    for text, wanted in zip(out.splitlines(), greg.table_runs(parsed(line)).items(), strict=True):
        args = parsed(text.removeprefix(f"{sys.executable} {greg.__file__} "))  # pasted: that run
        assert (args.out, greg.Config(**greg.chosen(args))) == wanted
    assert "not run" in cli(line + " --read")[0] and not runs.exists()
    first, err = cli(line)
    assert "run 6 of 6: greg wrn10_1 seed 1: " in err and err.count("ce takes none") == 2
    assert (runs / "table_1.md").read_text() == first.rstrip("\n") + "\n"
    assert first.count("not run") == 4 and "auxiliary aux," in first and "size" not in first
    more = line.replace(" --ood rays=rays.npy cells=cells.npy", "{} --seeds 2") + " --dry-run"
    assert "as of the finished" in (v := cli(more.format("")))[1] and v[0].count("/rays.npy") == 9
    assert "other OOD" in cli(more[:-10].format(" --ood cells=cells.npy"), 2)[1]
    assert not [*runs.glob("**/seed2")]  # before any training
    (runs / "id/wrn10_1/ce/seed0/checkpoint.pt").unlink()
    assert cli(line + " --read")[0] == first and "-> 0.5" in cli(line + " --lr 0.5 --read", 2)[1]
    (runs / "id").symlink_to((runs / "id").rename(tmp_path / "elsewhere"))
    assert "| greg | wrn10_1 | aux | 2 |" in cli(f"table --runs '{runs}'")[0]
    again, err = cli(line.replace(str(runs), str(runs.rename(tmp_path / "t"))) + " --read")
    assert again == first and f"{runs}/id/wrn10_1/ce/seed1 is gone" in err
    for path in (tmp_path / "elsewhere").rglob("results.json"):  # as of runs on the usual sets
        path.write_text(re.sub(r'"ood": \[[^]]*\]', '"ood": []', path.read_text()))
    assert " --ood" not in cli(more.format("").replace(str(runs), f"{tmp_path}/t"))[0]


def test_predict_decides_by_the_threshold_and_goes_on(lab, cli, tmp_path, monkeypatch):
    images, done = greg.load_id(str(lab / "id.npz"))[1].x[:12], greg.read_results(lab / "ce")
    for i, image in enumerate(images):
        Image.fromarray(image.numpy()).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "a|b.png").write_bytes((tmp_path / "00.png").read_bytes()[:99])
    (net, c, state), gamma = greg.load_run(lab / "ce", CPU), done["gamma"]["energy"]
    _, f = greg.embed(net, greg.normalise(images, *greg.STATS["cifar10"]))
    ((header, *rows, bad, none),) = table_rows(cli(f"predict ce {tmp_path} none.png", 2)[0])
    assert header == ["image", "class", "score", "gamma", "decision"] and state["gamma"] == gamma
    for i, (row, s) in enumerate(zip(rows, greg.energy_score(f).tolist(), strict=True)):
        wanted = f"{tmp_path}/{i:02d}.png", str(f[i].argmax().item()), pytest.approx(s, abs=2e-3)
        assert (*row[:2], float(row[2])) == wanted and row[3] == f"{gamma:.3f}"
        assert row[4] == ("ID" if s <= gamma else "OOD")
    assert {row[4] for row in rows} == {"ID", "OOD"}
    assert "error" in bad[4] and r"a\|b" in bad[0] and "none.png" in none[4]
    monkeypatch.setattr(greg, "load_image", Mock(side_effect=[images[11:], KeyboardInterrupt()]))
    monkeypatch.setattr(greg, "load_run", lambda *_: (net, c, state | {"gamma": s * (1 + 5e-7)}))
    assert [row[4] for row in table_rows(cli("predict ce a b", 130)[0])[0]] == ["decision", "ID"]


def test_eval_of_a_run_or_of_a_weights_file_gives_the_runs_figures(lab, cli, tmp_path):
    theirs, scores = greg.read_results(lab / "ce"), np.load(lab / "ce" / "scores.npz")
    torch.save(greg.load_run(lab / "ce", CPU)[0].state_dict(), tmp_path / "w.pt")
    weights = f"--weights {tmp_path}/w.pt --arch wrn10_1 --id id.npz"
    for source in "ce", f"{weights} --ood rays=rays.npy cells=cells.npy":
        out, _ = cli(f"eval {source} --scores 'msp, energy' --scores msp --out {tmp_path}/new/a")
        ours = greg.read_results(tmp_path / "new/a")
        assert ours["score"] == "energy" and ours["config"]["ood"] == theirs["config"]["ood"]
        assert ours["metrics"] == {k: theirs["metrics"][k] for k in ("msp", "energy")}
        for key, s in np.load(tmp_path / "new/a/scores.npz").items():
            np.testing.assert_array_equal(s, scores[key])
        assert [r[0] for r in table_rows(out)[0]] == ["method", "ce: msp", "ce"]
    cli(f"eval greg --scores msp --ood rays=rays.npy --out {tmp_path}/b")  # not the run's score
    assert "figure_scores" in cli(f"figure scores {tmp_path}/b")[0]
    assert table_rows(cli("eval greg --ood rays=rays.npy")[0])[0][0][5:7] == ["rays", "mean"]
    with greg.alone(tmp_path / "b"):
        assert "another process works" in cli(f"eval ce --out {tmp_path}/b", 2)[1]
    (tmp_path / "c" / "scores.npz").mkdir(parents=True)  # what cannot be written is printed
    assert "| ce |" in cli(f"eval ce --out {tmp_path}/c", 2)[0]


def test_a_report_on_a_linear_score_is_exact():
    """K = 1 and f = w·(x - 1/2): S falls by ε ‖w‖ and no more, so attacks meet the certificates."""
    w, i = F.normalize(normal(0, 12).sign(), dim=0), torch.arange(20, dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).double().eval()
    net[1].weight.data, net[1].bias.data = w[None], -0.5 * w.sum()[None]
    s_in, near, eps = -0.02 * i, 0.02 * i - 0.01, (0.06, 0.2, 0.24)  # threshold: -0.02
    x_in, *x = ((0.5 - s[:, None] * w).view(-1, 3, 2, 2) for s in (s_in, near, near + 0.4))
    sets, options = dict(zip(("near", "far"), x, strict=True)), {"sigma": 0.1, "n": 500}
    report = greg.certify_report(net, x_in, sets, eps, alpha=0.5, gamma=0.01, **options)
    share = {0.0: 0, 0.06: 3 / 20, 0.2: 10 / 20, 0.24: 12 / 20}
    assert report["id_rejected"] == {e: share[e] for e in eps} and report["gamma"] == 0.01
    for e, row in report["sets"]["near"].items():
        wanted = {"fpr95": share[e], "auroc": pytest.approx(greg.auroc(s_in, near - e), abs=1e-3)}
        assert row["attacked"] == wanted and row["certified"] == wanted
    far, smooth = report["sets"]["far"], report["sets"]["near"][0.0]["smoothed"]
    assert far[0.0]["smoothed"] == {"fpr95": 0, "auroc": 1} and smooth["fpr95"] <= 0.1
    assert [far[e]["smoothed"]["fpr95"] + far[e]["attacked"]["fpr95"] for e in eps] == [0] * 3
    assert smooth["auroc"] == pytest.approx(greg.auroc(s_in, near), abs=0.02)
    assert report["lipschitz_global"] == pytest.approx(1)
    strict = greg.certify_report(net, x_in, sets, [0.24], alpha=1e-3, **options)
    assert strict["sets"]["far"][0.24]["smoothed"] == {"fpr95": 1}  # beyond reach
    assert strict["reach"] == pytest.approx(0.1 * stats.norm.ppf(5e-4 ** (1 / 500)))
    pool, odd = (nn.Sequential(m, *net).eval() for m in (nn.MaxPool2d(1), nn.LeakyReLU(1.0)))
    for other, local, kinds in (pool, False, ["attacked", "certified"]), (odd, True, ["attacked"]):
        plain = greg.certify_report(other, x_in, sets, [0.1], n=0, local=local)
        assert [list(row) for row in plain["sets"]["far"].values()] == [kinds] * 2
    assert plain["gamma"] == pytest.approx(-0.02)  # of its own
    refuses(lambda: greg.certify_report(pool, x_in, sets), "MaxPool2d", error=NotImplementedError)
    x, odd = x_in, (([0.1, 0.0],), ([0.1], 0.0), ([math.inf],), ([0.1], 0.1, -1))
    for bad in (x[:0], sets), (x, {"a": x[:0]}), *((x, sets, *more) for more in odd):
        refuses(lambda bad=bad: greg.certify_report(net, *bad), "eps")
    refuses(lambda: greg.certify_report(None, x_in, sets, n=3), "3 draws")  # before the work


def test_certify_is_of_the_runs_images_and_threshold(lab, cli, tmp_path, monkeypatch, drawn):
    line = f"certify greg --images 8 --draws 20 --eps 0.1 --eps 0.02 --out {tmp_path}/new/c"
    ((header, *rows),) = table_rows(cli(line)[0])
    assert header == ["OOD set", "ℓ2 ε", "attacked", "certified", "smoothed"]
    pairs = itertools.product(("rays", "cells"), ("0", "0.02", "0.1"))
    assert [(*row[:2],) for row in rows] == [*pairs]
    report = json.loads((tmp_path / "new/c/certificates.json").read_text())
    gamma = greg.read_results(lab / "greg")["gamma"]["energy"]
    assert (report["gamma"], report["n"], report["sigma"]) == (gamma, 20, 0.1)
    with np.load(lab / "greg" / "scores.npz") as arrays:
        s = [greg.Images(torch.from_numpy(arrays[f"energy/{k}"])).some(8).x for k in ("id", "rays")]
    assert rows[0][2] == f"{100 * greg.fpr_at_tpr(*s):.1f} / {100 * greg.auroc(*s):.1f}"
    assert [panel.get_title() for panel in drawn[-1][1]] == ["rays", "cells"]
    curve, *others = drawn[-1][1][0].lines
    attacked = [[float(row[1]), float(row[2].split()[0])] for row in rows[:3]]
    np.testing.assert_allclose(curve.get_xydata(), attacked, atol=0.05)
    assert [line.get_label() for line in others] == header[3:] and rows[1][3][:3] == "100"
    monkeypatch.setattr(greg, "lipschitz_global", nn.Module())  # as of no rule
    out, _ = cli("certify greg/checkpoint.pt --images 8 --eps 0.02 0.1 --draws 0 --local")
    assert table_rows(out)[0][0][2:] == ["attacked"] and re.search("No determ.*\ngreg: cert", out)


@pytest.fixture()
def drawn(monkeypatch):  # each figure that is made, and its panels
    made, grid = [], greg.grid
    monkeypatch.setattr(greg, "grid", lambda *a: made.append(grid(*a)) or made[-1])
    return made


def test_figure_1_draws_both_nets_and_no_attack_is_inside_a_certified_ball(tmp_path, drawn):
    results, again = (greg.figure_1(tmp_path / "1.png", steps=300, points=3) for _ in range(2))
    assert results == again and results[0.1]["‖∇S‖ ID"] < 0.9 * results[0.0]["‖∇S‖ ID"]
    for panel, row in zip(drawn[0][1], results.values(), strict=True):
        for side in "ID", "OOD":
            ratios = [v for k, v in row.items() if k.startswith(f"{side} attack / radius")]
            assert len(ratios) == 4 and min(ratios) == ratios[-1] >= 1  # the best bound is last
            assert row[f"{side} attack"] >= row[f"{side} radius"] > 0 < row[f"‖∇S‖ {side}"]
        assert row["FPR95"] < 0.1 and len(panel.patches) >= 10 and panel.get_xlim()[1] == 2.2
    (x_in, y, x_aux), drew = greg.toy(200, generator(0)), [*tmp_path.iterdir()]
    corners = torch.tensor([[0, 1], [-(3**0.5) / 2, -0.5], [3**0.5 / 2, -0.5]])
    assert (x_in - corners[y]).std() == pytest.approx(0.13, abs=0.02) and len(x_aux) == 200
    assert drew and 2.8 < x_aux.abs().max() <= 3 and 0.65 < torch.cdist(x_aux, corners).min() < 0.8


def test_figures_show_what_was_logged_scored_and_certified(lab, cli, tmp_path, drawn, monkeypatch):
    cli(f"figure 3 greg --out {tmp_path}/new/3.png")
    rows = [json.loads(v) for v in (lab / "greg" / "log.jsonl").read_text().splitlines()]
    for panel, key in zip(drawn[0][1], ("probe_energy", "probe_gradient_in"), strict=True):
        assert panel.lines[0].get_xydata().tolist() == [[r["epoch"], r[key]] for r in rows]
    assert cli("figure scores ce greg")[0] == "figure_scores.png\n"
    for panel, name in zip(drawn[1][1], ("ce", "greg"), strict=True):
        assert panel.lines[0].get_xdata()[0] == greg.read_results(lab / name)["gamma"]["energy"]
        texts = panel.title, *panel.get_legend().texts
        assert {t.get_text() for t in texts} == {name, "id", "rays", "cells", "γ"}
    cli(f"figure images --out {tmp_path}/i.png")
    picture = drawn[2][1][0].images[0].get_array()
    np.testing.assert_array_equal(picture[64:96, 32:64], greg.synthetic("crescents", 20).x[1])
    monkeypatch.setattr(greg, "figure_1", lambda out: {0.0: {"γ": -2.5}, 0.1: {"γ": 3}})
    assert table_rows(cli("figure 1")[0])[0][1] == ["γ", "-2.5", "3"]
    assert len([*tmp_path.rglob("*.png"), *lab.glob("figure_*.png")]) == 3


def test_the_demo_prints_a_row_a_method_with_its_spread(cli, tmp_path, monkeypatch):
    did, wanted, runs, methods = Mock(), [], tmp_path / "demo", ["ce", "energy", "greg", "greg+"]
    report = {"sets": {k: {0.25: {"attacked": {"fpr95": k}}} for k in (0.5, 1.0)}}
    did.train.side_effect = lambda c, *_: fake_result(c.method, x=(1 + c.seed) / 4)
    did.certify_run.return_value = report | {"id_rejected": {0.25: 0.1}}
    for name in "train", "certify_run", "figure_scores":
        monkeypatch.setattr(greg, name, getattr(did, name))
    ((header, *rows),) = table_rows(cli(f"demo --runs {tmp_path} --seeds 0 1 --device cpu")[0])
    figures = "9.38 ± 4.42", "37.50 ± 17.68", "18.75 ± 8.84", "37.50 ± 17.68", "75.00 ± 0.00"
    assert rows == [[m, *figures, "10.00 ± 0.00"] for m in methods]
    for seed, method in itertools.product((0, 1), methods):
        more = dict(epochs=2, n_train=4992, lr=0.01, schedule="cosine", margins="auto")
        more = {"epochs": 8} if method == "ce" else more | {"init": f"{runs}/ce/seed{seed}"}
        more |= {"arch": "wrn10_1", "batch": 32, "channels_last": True}
        c = greg.Config(method, id="synthetic", seed=seed, **more)
        wanted.append(call.train(c, folder := runs / method / f"seed{seed}", CPU))
        wanted.append(call.certify_run(folder, CPU, 48, {}, epsilons=[0.25], n=0, local=False))
    folders = [runs / method / "seed0" for method in ("energy", "greg")]
    assert did.mock_calls == [*wanted, call.figure_scores(folders, runs / "scores.png")]


def test_a_mistake_is_one_line_and_exit_code_2(lab, cli, tmp_path, monkeypatch):
    mistakes = """
        train --id id.npz --arch wrn10_1 --init ce --aux aux.npy --ood a=TMP/copy.npy | auxiliary;
        table 1 --id id.npz --methods energy greg --grad-every 0 --runs TMP/t | --grad-every;
        train --id id.npz --init ce --n-train 9 --ood a=rays.npy --aux TMP/x.npy | 520 of the 520 ;
        table 1 --id id.npz --aux typo.npy --archs wrn10_1 --seeds 5 --runs TMP/t | typo.npy;
        eval ce --arch resnet18 | --arch resnet18; predict TMP/stopped a | finished;
        train --method ce --id synthetic --cuda-graph | one GPU; figure scores nowhere | nowhere;
        train --method ce --id x --out id.npz | File; table --runs . --methods ce | number;
        train --id synthetic --device cuda:99 | device; figure scores TMP/d.svg | scores.npz is dam;
        eval --ood rays=rays.npy ce | before the options; eval ce --scores energy,absent | 'absent';
        figure images --out TMP/d.svg | .png; eval TMP/renamed --out none | zero; figure 1 x | no f;
        certify TMP/renamed --out none | zero; eval ce --out ce | own folder; figure 3 ce | auxil;
        eval ce --weights aux.npy | --weights; train --out '' | is empty; certify nowhere | nowhere;
        certify greg --images -1 | need images; table 2 --margins auto | start; figure 3 | folders;
        eval ce --stats dice | stats; table --runs nowhere | nowhere; table 5 --methods oe | no row;
        eval greg --ood a=aux.npy | trained on; certify TMP/react | energy; eval TMP/w.pt | weigh"""
    shutil.copy("aux.npy", tmp_path / "copy.npy")
    np.save(tmp_path / "x.npy", np.vstack([np.load("id.npz")[f"x_{p}"] for p in ("train", "test")]))
    state = torch.load(lab / "ce" / "checkpoint.pt", weights_only=True)
    states = {"stopped": {k: v for k, v in state.items() if k not in ("gamma", "score")}}
    states |= {"renamed": state | {"classes": ["zero", *state["classes"][1:]]}}
    for name, odd in (states | {"react": state | {"score": "react"}, "d.svg": state}).items():
        (tmp_path / name).mkdir()
        torch.save(odd, tmp_path / name / "checkpoint.pt")
    shutil.copy(lab / "ce" / "results.json", tmp_path / "d.svg")
    (tmp_path / "d.svg" / "scores.npz").write_bytes(b"PK")
    torch.save(state["net"], tmp_path / "w.pt")
    for row in mistakes.split(";"):
        line, message = row.strip().replace("TMP", str(tmp_path)).split(" | ")
        out, err = cli(line, 2)
        assert not out and re.fullmatch(f"greg: error: .*{re.escape(message)}.*\n", err), err
    assert not Path("nowhere").exists() and not (tmp_path / "t").exists()  # none was trained
    assert "not finished" in cli(f"eval {tmp_path}/stopped --ood rays=rays.npy")[1]
    for aux, ood in ("stopped", ""), ("x.npz", "x.npz"), ("imagenet:a", "imagenet/train/b"):
        c = greg.Config("oe", aux, f"{tmp_path / aux}", root=tmp_path, ood=[f"a={tmp_path / ood}"])
        refuses(lambda c=c: greg.load_sets(c), "trained on", c.ood[0][2:])
    assert "ce: react" in cli(f"eval {tmp_path}/react --ood rays=rays.npy")[0]
    rows = (KeyboardInterrupt(), 130, "stopped"), (ValueError(), 2, "ValueError (GREG_DEBUG")
    for e, code, text in (*rows, (RuntimeError("a\n  b" + "c" * 999), 2, "shows where): a bccc")):
        monkeypatch.setattr(greg, "pick_device", Mock(side_effect=e))
        _, err = cli("figure images", code)
        assert text in err and err.count("\n") == 1 and len(err) < 700
    monkeypatch.setenv("GREG_DEBUG", "1")
    pytest.raises(RuntimeError, greg.main, ["figure", "images"])


def test_commands_explain_themselves_parse_options_and_check_the_device(cli, monkeypatch):
    for name in greg.COMMANDS:
        assert "--device" in cli(f"{name} --help")[0] and f"\n    {name} " in cli("--help")[0]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))  # lacks ‖
    assert greg.main(["table", "--runs", "."]) == 0 and b"| greg |" in sys.stdout.buffer.getvalue()
    for stdout in SimpleNamespace(write=Mock(side_effect=BrokenPipeError)), None:  # nobody reads
        monkeypatch.setattr(sys, "stdout", stdout)
        assert greg.main(["table", "--runs", Path()]) == 0
    monkeypatch.setenv("HOME", "/me")
    args = parsed("eval '~/a' --out=~/r")
    assert (args.run, args.out) == (Path("/me/a"), Path("/me/r")) and greg.chosen(args) == {}
    wanted = {"amp": True, "lr": 0.5, "ood": ["a", "b", "c"], "init": "/me/c"}
    assert greg.chosen(parsed("train --amp --ood a --lr 0.5 --ood b c --init=~/c")) == wanted
    assert greg.pick_device("auto") == greg.pick_device("cpu") == CPU
    monkeypatch.setattr(torch.distributed, "init_process_group", joined := Mock())
    monkeypatch.setenv("LOCAL_RANK", "0")  # as torchrun does
    assert greg.pick_device("cpu") == CPU and joined.call_args.args == ("gloo",)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: Mock(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "set_device", own := Mock())  # for NCCL
    assert greg.pick_device("cuda") == own.call_args.args[0] and joined.call_args.args == ("nccl",)


@pytest.mark.parametrize("job", ["cifar.sh demo", "cifar.sh cifar100", "imagenet.sh"])
def test_scripts_explain_themselves_and_a_dry_run_can_be_pasted(job, tmp_path):
    def bash(*words):
        words = ["bash", f"{HERE.name}/run_{script}", *words]
        return subprocess.run(words, capture_output=True, text=True, env=env, cwd=HERE.parent)

    env = {"RUNS": f"{tmp_path}/a b", "SEEDS": "0\n3", "OOD": "svhn,x=y.npy\n", "EXTRA": "--amp"}
    env |= os.environ | {"PYTHON": sys.executable, "DOWNLOAD": "0", "CDPATH": str(HERE.parent)}
    script, *job = job.split()
    assert "usage" in bash("--help").stdout
    for bad in map(bash, ("cifar11", "demo", ""), ("", "--dry", "--dry-run"), ("", "", "x")):
        assert bad.returncode == 2 and "usage" in bad.stderr
    done = bash(*job, "--dry-run")
    *runs, last = (parsed(line) for line in re.findall(r"greg\.py (.+)", done.stdout))
    assert done.returncode == 0 and not [*tmp_path.iterdir()], done.stderr
    assert last.seeds == [0, 3] and last.runs == tmp_path / "a b" and "download" not in last
    assert {getattr(args, "seed", 0) for args in runs} == (set() if job == ["demo"] else {0, 3})
    assert all(args.amp and args.ood == ["svhn", "x=y.npy"] for args in runs)


def readme_with_map():  # the README, its map of the paper with the lines of greg.py
    def row(found):
        return found[1] + ", ".join(lines[name] for name in re.findall(r"`(\w+)`", found[2])) + " |"

    text, lines = (HERE / "README.md").read_text(), {}
    for node in ast.parse((HERE / "greg.py").read_text()).body:
        for target in getattr(node, "targets", [getattr(node, "target", node)]):
            a, b = node.lineno, node.end_lineno
            name = getattr(target, "id", getattr(target, "name", None))
            lines[name] = f"[{a}-{b}](greg.py#L{a}-L{b})"
    head, table, rest = re.split("(?<=<!-- map -->\n)|(?=<!-- /map -->)", text)
    return head + re.sub(r"(?m)^(\| .* \| (`.*`) \| ).*$", row, table) + rest


def test_the_readme_has_the_map_of_the_module_commands_that_parse_and_code_that_runs():
    text = (HERE / "README.md").read_text()
    assert text == readme_with_map() and "(greg.py#L" in text, "run python test_greg.py"
    bash, python = (re.findall(rf"(?ms)^```{k}\n(.*?)^```", text) for k in ("bash", "python"))
    named = {parsed(v).run_command for v in re.findall(r"(?m)^python greg\.py (.*)", "".join(bash))}
    assert named == {command for command, *_ in greg.COMMANDS.values()} - {greg.command_demo}
    assert "pytest" in text.partition("<!-- tests -->\n```bash")[2][:99]
    net, x = seeded(0, lambda: greg.wrn(10, 1, 10)), normal(0, 28, 3, 8, 8, dtype=torch.float32)
    names = {"torch": torch, "F": F, "optimizer": torch.optim.SGD(net.parameters(), 0.01)}
    names |= {"net": net, "x_in": x[:4], "y_in": torch.arange(4), "x_aux": x[4:]}
    names |= {"id_loader": [(x[:4], torch.arange(4))], "aux_image_loader": [x[4:]]}
    before = net.fc.weight.clone()
    for block in python:
        exec(block, names)
    assert not torch.equal(before, net.fc.weight)


# ---- python test_greg.py bench [NETWORK [ID IMAGES A STEP]]: medians over rounds, by turns
def released_step(KMeans, run, x_in, y_in, candidates):  # as the authors' code has it
    def scalar(x):
        return F.relu((s := greg.energy_score(net(x)))[n:] + 7).mean() - F.relu(-25 - s[:n]).mean()

    n, net, (z, f) = len(x_in), run.net, greg.embed(run.net, candidates)
    labels = KMeans(n, n_init=3).fit(F.normalize(z).cpu().numpy()).labels_.tolist()
    order = greg.energy_score(f).argsort().tolist()
    clusters = [[i for i in order if labels[i] == j] for j in range(n)]
    chosen = {i for members in clusters for i in (*members[:1], *members[-1:])}
    rest = [i for i in torch.randperm(len(z)).tolist() if i not in chosen]
    x = torch.cat([x_in, candidates[[*chosen, *rest[: 2 * n - len(chosen)]]]])
    s_in, s_aux = greg.energy_score(f := net.train()(x)).tensor_split([n])
    loss = F.cross_entropy(f[:n], y_in) + 0.1 * greg.energy_loss(s_in, s_aux)
    J = torch.autograd.functional.jacobian(scalar, x, create_graph=True)
    run.optimizer.zero_grad()
    (loss + J.flatten(1).norm(dim=1).mean()).backward()
    run.optimizer.step()


def bench(arch="wrn10_1", n=64, rounds=3):
    def add(group, name, f, *args):
        timers.append(Timer(globals={"f": f, "args": args}, label=group, sub_label=name, **same))

    from sklearn.cluster import KMeans
    from torch.utils.benchmark import Compare, Timer

    n, timers, folder, device = int(n), [], tempfile.TemporaryDirectory(), greg.pick_device("auto")
    same = {"description": f"{arch}, {n} ID images, {device}", "stmt": "f(*args)"}
    same["num_threads"] = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    ids, aux, net = greg.synthetic("train", n), greg.synthetic("aux", 6 * n), greg.ARCHS[arch](10)
    torch.save(net.state_dict(), begin := f"{folder.name}/begin.pt")
    greg.end_epoch = lambda run, row: setattr(run, "step", 0)  # an epoch of one step, again
    for method in "ce", "energy", "greg", "energy+sampling", "greg+", "dos":
        c = greg.resolve(greg.Config(method, "synthetic", arch=arch, batch=n, init=begin))
        run = greg.start(c, Path(folder.name), device, ids, aux if c.aux else None)
        add("a step", method, greg.train_epoch, run)
    x_in, x_aux = (greg.normalise(v.x.to(device), *greg.STATS["cifar10"]) for v in (ids, aux))
    add("a step", "greg+, as released", released_step, KMeans, run, x_in, ids.y.to(device), x_aux)
    for N, k in (384, 64), (3000, 500):
        centres = normal(k, k // 2, 342, dtype=torch.float32)[torch.arange(N) % (k // 2)]
        z = F.normalize((centres + normal(N, N, 342, dtype=torch.float32)).relu())
        add(f"K-Means, {N} × 342, k = {k}", "ours", greg.kmeans, z.to(device), k)
        add(f"K-Means, {N} × 342, k = {k}", "scikit-learn", KMeans(k, n_init=3).fit, z.numpy())
    Compare([timer.timeit(1) for _ in range(int(rounds)) for timer in timers]).print()


if __name__ == "__main__":
    bench(*sys.argv[2:]) if sys.argv[1:] else (HERE / "README.md").write_text(readme_with_map())
