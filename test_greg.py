"""Tests of greg.py, section by section: properties against independent oracles.

pytest                                   a few minutes on two CPU cores
HYPOTHESIS_PROFILE=thorough pytest       many more examples
"""

import ast
import copy
import functools
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, register_random, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import greg

settings.register_profile("quick", deadline=None, max_examples=25, derandomize=True, database=None)
settings.register_profile("thorough", deadline=None, max_examples=500, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
torch.set_num_threads(1)


class TorchRandom:
    """Hypothesis seeds `random` and NumPy, but torch only if it is told how."""

    seed, getstate, setstate = map(
        staticmethod, (torch.manual_seed, torch.get_rng_state, torch.set_rng_state)
    )


torch_random = TorchRandom()  # Hypothesis keeps a weak reference
register_random(torch_random)

HERE = Path(greg.__file__).parent
CPU = torch.device("cpu")
seeds = st.integers(0, 2**32 - 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def pixels(seed, *shape):
    return torch.randint(256, shape, generator=generator(seed), dtype=torch.uint8)


def seeded(seed, build):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def softplus_net(seed, d=6, K=3):
    """Smooth, so that finite differences hold everywhere."""
    layers = nn.Linear(d, 8), nn.Softplus(), nn.Linear(8, K)
    return seeded(seed, lambda: nn.Sequential(*layers)).double()


# ------------------------------------------------------------------------------------- 1  Networks

COUNTS = {  # parameters at K = 10 and K = 100
    "resnet18": (11_173_962, 11_220_132),
    "wrn40_2": (2_243_546, 2_255_156),
    "densenet100": (769_162, 800_032),
    "densenet121": (6_964_106, 7_056_356),
}


@pytest.mark.parametrize("name", COUNTS)
def test_networks_have_the_published_numbers_of_parameters(name):
    for K, count in zip((10, 100), COUNTS[name], strict=True):
        assert sum(p.numel() for p in greg.ARCHS[name](K).parameters()) == count


@pytest.mark.parametrize("name", COUNTS)
def test_a_network_is_its_head_after_its_non_negative_features(name):
    net = seeded(0, lambda: greg.ARCHS[name](7)).eval()
    x = normal(0, 2, 3, 64 if name == "densenet121" else 32, 32, dtype=torch.float32)
    x = x if name != "densenet121" else F.interpolate(x, size=(64, 64))
    with torch.no_grad():
        z = net.features(x)
        assert z.shape == (2, net.fc.in_features) and (z >= 0).all()
        assert torch.equal(net.fc(z), net(x)) and net(x).shape == (2, 7)
        alone = torch.cat([net(part) for part in x.split(1)])
    torch.testing.assert_close(net(x), alone, rtol=1e-4, atol=1e-5)


def disturb(net, seed):
    """Random batch norm statistics and scales, so that no wrong order goes unseen."""
    g = generator(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low in ((m.weight, 0.5), (m.bias, -0.5), (m.running_mean, -0.5)):
                t.data = torch.rand(t.shape, generator=g) + low
            m.running_var.data = torch.rand(m.running_var.shape, generator=g) + 0.5
    return net.eval()


def in_order(net):
    """The weights of each convolution, batch norm and linear layer, in forward order."""
    kinds = nn.Conv2d, nn.BatchNorm2d, nn.Linear
    return iter([m for m in net.modules() if isinstance(m, kinds)])


def bn_relu(x, m):
    return F.relu(F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias))


def test_wide_resnet_follows_the_paper_of_zagoruyko_and_komodakis():
    net = disturb(seeded(1, lambda: greg.wrn(16, 2, 10)), 1)
    layers, x = in_order(net), normal(2, 2, 3, 32, 32, dtype=torch.float32)
    expected = F.conv2d(x, next(layers).weight, padding=1)
    for stride, blocks in (1, 2), (2, 2), (2, 2):
        for b in range(blocks):
            s, bn1, conv1, bn2, conv2 = stride if b == 0 else 1, *[next(layers) for _ in range(4)]
            o = bn_relu(expected, bn1)
            out = F.conv2d(o, conv1.weight, stride=s, padding=1)
            out = F.conv2d(bn_relu(out, bn2), conv2.weight, padding=1)
            shortcut = F.conv2d(o, next(layers).weight, stride=s) if b == 0 else expected
            expected = out + shortcut
    expected = bn_relu(expected, next(layers)).mean((2, 3))
    head = next(layers)
    torch.testing.assert_close(net(x), expected @ head.weight.T + head.bias, rtol=1e-4, atol=1e-4)


def test_densenet_121_is_that_of_torchvision(tmp_path):
    import torchvision

    theirs = disturb(seeded(3, lambda: torchvision.models.densenet121(num_classes=10)), 3)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "tv.pt")
    ours = greg.load_weights(greg.densenet121(10), tmp_path / "tv.pt").eval()
    x = normal(4, 2, 3, 96, 96, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_resnet_18_is_that_of_torchvision_but_for_its_stem(tmp_path):
    import torchvision

    theirs = seeded(5, lambda: torchvision.models.resnet18(num_classes=10))
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    disturb(theirs, 5)
    torch.save(theirs.state_dict(), tmp_path / "tv.pt")
    ours = greg.load_weights(greg.resnet18(10), tmp_path / "tv.pt").eval()
    x = normal(6, 2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["wrn40_2", "densenet100"])
def test_convolutions_start_at_he_standard_deviation(name):
    net = seeded(7, lambda: greg.ARCHS[name](10))
    for m in net.modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 2000:
            std = (2 / (m.kernel_size[0] ** 2 * m.out_channels)) ** 0.5
            assert abs(m.weight.std().item() / std - 1) < 6 / (2 * m.weight.numel()) ** 0.5


@given(st.integers(-5, 45).filter(lambda depth: depth < 10 or (depth - 4) % 6))
def test_a_wide_resnet_of_impossible_depth_is_refused(depth):
    with pytest.raises(ValueError, match="6 n"):
        greg.wrn(depth, 1, 10)


def renamed(state, prefix="", head="fc"):
    return {prefix + k.replace("fc.", head + "."): v for k, v in state.items()}


@pytest.mark.parametrize("head", ["fc", "linear", "classifier"])
@pytest.mark.parametrize("wrap", ["state_dict", "net", None])
def test_weights_load_whatever_the_file_calls_them(tmp_path, head, wrap):
    net = disturb(seeded(8, lambda: greg.wrn(10, 1, 10)), 8)
    state = renamed(net.state_dict(), "module.", head)
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "w.pt")
    other = greg.load_weights(greg.wrn(10, 1, 10), tmp_path / "w.pt").eval()
    x = normal(9, 2, 3, 32, 32, dtype=torch.float32)
    assert torch.equal(net(x), other(x))


def without_counters(state):
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def test_weights_older_than_batch_norm_counters_load(tmp_path):
    net = seeded(10, lambda: greg.wrn(10, 1, 10))
    torch.save(without_counters(net.state_dict()), tmp_path / "w.pt")
    other = greg.load_weights(greg.wrn(10, 1, 10), tmp_path / "w.pt")
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    state = greg.wrn(10, 1, 10).state_dict()
    headless = {k: v for k, v in state.items() if k != "fc.bias"}
    swapped = {k.replace("running_mean", "running_what"): v for k, v in state.items()}
    bad = headless, swapped, greg.wrn(10, 1, 11).state_dict(), greg.wrn(16, 1, 10).state_dict()
    for i, weights in enumerate([*bad, {"net": 3}, [1, 2]]):
        torch.save(weights, tmp_path / f"{i}.pt")
        before = seeded(0, lambda: greg.wrn(10, 1, 10))
        kept = [p.clone() for p in before.parameters()]
        with pytest.raises(ValueError, match=f"{i}.pt"):
            greg.load_weights(before, tmp_path / f"{i}.pt")
        assert all(torch.equal(a, b) for a, b in zip(kept, before.parameters(), strict=True))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        greg.load_weights(greg.wrn(10, 1, 10), tmp_path / "nowhere.pt")


class Hostile:
    def __reduce__(self):
        return (os.mkdir, (str(Hostile.target),))


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(tmp_path):
    Hostile.target = tmp_path / "owned"
    torch.save({"state_dict": Hostile()}, tmp_path / "h.pt")
    with pytest.raises(ValueError, match="safely"):
        greg.load_weights(greg.wrn(10, 1, 10), tmp_path / "h.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="text.pt"):
        greg.load_weights(greg.wrn(10, 1, 10), tmp_path / "text.pt")
    assert not Hostile.target.exists()


# ---------------------------------------------------------------------------- 2  Scores and losses

# Eighths: exactly representable, so that margins are hit and squares are exact.
eighths = st.integers(-320, 80).map(lambda i: i / 8)
score_lists = st.lists(eighths, min_size=1, max_size=12)


@given(seeds, st.integers(1, 6), st.integers(1, 9), st.sampled_from([1e-3, 1.0, 30.0]))
def test_the_energy_score_is_minus_the_logarithm_of_the_sum_of_exponentials(seed, n, K, scale):
    f = scale * normal(seed, n, K)
    expected = [-math.log(math.fsum(map(math.exp, row))) for row in f.tolist()]
    torch.testing.assert_close(greg.energy_score(f), torch.tensor(expected, dtype=f.dtype))
    assert greg.energy_score(f.bfloat16()).dtype == torch.float32


def eq1(s_in, s_aux, m_in, m_aux):
    """Eq. (1) with its indicators, one sample at a time."""
    a = [(s - m_in) ** 2 if s >= m_in else 0.0 for s in s_in]
    b = [(m_aux - s) ** 2 if s <= m_aux else 0.0 for s in s_aux]
    return sum(a) / len(a) + sum(b) / len(b)


@given(score_lists, score_lists, eighths, eighths)
def test_the_energy_loss_is_equation_1(s_in, s_aux, m_in, m_aux):
    a, b = torch.tensor(s_in, dtype=torch.float64), torch.tensor(s_aux, dtype=torch.float64)
    ours = greg.energy_loss(a, b, m_in, m_aux).item()
    assert ours == pytest.approx(eq1(s_in, s_aux, m_in, m_aux), rel=1e-12)


def default_margins():
    s = torch.tensor([-30.0, -25.0, -20.0, -7.0, 0.0])
    return greg.energy_loss(s, s).item(), eq1(s.tolist(), s.tolist(), -25, -7)


def test_the_default_margins_are_those_of_the_released_code():
    ours, expected = default_margins()
    assert ours == pytest.approx(expected)


def eq3_by_differences(net, x, n_in, m_in, m_aux, h=1e-5):
    """Eq. (3) from central differences of S, one coordinate and one sample at a time."""

    def S(v):
        return -torch.logsumexp(net(v[None]), 1).item()

    sums = [0.0, 0.0]
    for i, v in enumerate(x):
        s = S(v)
        if (s <= m_in) if i < n_in else (s >= m_aux):
            g = [(S(v + h * e) - S(v - h * e)) / (2 * h) for e in torch.eye(len(v)).double()]
            sums[i >= n_in] += math.hypot(*g)
    return sums[0] / n_in + sums[1] / (len(x) - n_in)


@given(seeds, st.integers(1, 4), st.integers(1, 4), st.floats(-0.5, 0.5))
def test_the_gradient_loss_is_equation_3(seed, n_in, n_aux, shift):
    net, x = softplus_net(seed), 2 * normal(seed, n_in + n_aux, 6)
    m = greg.energy_score(net(x)).median().item() + shift
    x.requires_grad_()
    ours = greg.gradient_loss(greg.energy_score(net(x)), x, n_in, m, m)
    expected = eq3_by_differences(net, x.detach(), n_in, m, m)
    assert ours.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(seeds, st.integers(1, 4), st.integers(1, 4))
def test_the_released_reduction_is_equation_3_over_the_batch_size(seed, n_in, n_aux):
    net, x = softplus_net(seed), normal(seed, n_in + n_aux, 6).requires_grad_()
    s = greg.energy_score(net(x))
    paper, released = (
        greg.gradient_loss(s, x, n_in, 9, -9, reduction) for reduction in ("paper", "released")
    )
    assert paper.item() > 0
    assert paper.item() == pytest.approx((n_in + n_aux) * released.item(), rel=1e-12)


def released_procedure(net, x, n_in, m_in, m_aux):
    """The released code's term: rows of the Jacobian of the mean-reduced scalar, averaged."""

    def scalar(v):
        s = -torch.logsumexp(net(v), 1)
        return -F.relu(m_in - s[:n_in]).mean() + F.relu(s[n_in:] - m_aux).mean()

    J = torch.autograd.functional.jacobian(scalar, x)
    return J.flatten(1).norm(dim=1).mean()


@given(seeds, st.integers(1, 5))
def test_the_released_reduction_is_the_released_procedure_for_equal_halves(seed, n):
    net, x = softplus_net(seed), normal(seed, 2 * n, 6)
    m = greg.energy_score(net(x)).mean().item()
    expected = released_procedure(net, x, n, m, m)
    x.requires_grad_()
    ours = greg.gradient_loss(greg.energy_score(net(x)), x, n, m, m, "released")
    assert ours.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)


@given(seeds, st.integers(2, 5), st.integers(2, 5))
def test_each_sample_reaches_exactly_one_of_the_two_losses_and_its_parameters(seed, n_in, n_aux):
    """Value and parameter gradient of (1) and (3) are those of their own samples alone."""
    net, x = softplus_net(seed), 3 * normal(seed, n_in + n_aux, 6)
    s = greg.energy_score(net(x)).detach()
    m_in, m_aux = s[:n_in].median().item() + 1e-6, s[n_in:].median().item() - 1e-6
    right = torch.cat([s[:n_in] <= m_in, s[n_in:] >= m_aux])

    def gradients(rows, loss):
        """Gradient of the loss's per-sample terms summed over `rows` with the batch's means."""
        total = torch.zeros((), dtype=torch.float64)
        for i in rows:
            v = x[i : i + 1].clone().requires_grad_()
            si, n = greg.energy_score(net(v)), n_in if i < n_in else n_aux
            if loss == 1:
                total = total + (si - (m_in if i < n_in else m_aux)).square().sum() / n
            else:
                (g,) = torch.autograd.grad(si.sum(), v, create_graph=True)
                total = total + g.norm() / n
        if not len(rows):
            return [torch.zeros_like(p) for p in net.parameters()]
        return torch.autograd.grad(total, list(net.parameters()), allow_unused=True)

    v = x.clone().requires_grad_()
    sv = greg.energy_score(net(v))
    losses = {
        1: greg.energy_loss(sv[:n_in], sv[n_in:], m_in, m_aux),
        3: greg.gradient_loss(sv, v, n_in, m_in, m_aux),
    }
    for loss, rows in (1, (~right).nonzero()[:, 0].tolist()), (3, right.nonzero()[:, 0].tolist()):
        parameters = list(net.parameters())
        ours = torch.autograd.grad(losses[loss], parameters, retain_graph=True, allow_unused=True)
        for a, b in zip(ours, gradients(rows, loss), strict=True):
            a = torch.zeros_like(b) if a is None else a
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@pytest.mark.parametrize("side", ["in", "aux"])
def test_a_score_on_its_margin_is_on_the_right_side(side):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    s = x @ torch.tensor([3.0, 4.0], dtype=torch.float64)  # 11 and 25, gradient of norm 5
    m_in, m_aux = (11.0, 26.0) if side == "in" else (10.0, 25.0)
    assert greg.gradient_loss(s, x, 1, m_in, m_aux).item() == pytest.approx(5.0)
    assert greg.energy_loss(s[:1], s[1:], 11.0, 25.0).item() == 0


@given(seeds)
def test_the_gradient_of_the_penalty_is_that_of_finite_differences(seed):
    net, x, n_in = softplus_net(seed), normal(seed, 5, 6), 2

    def penalty():
        v = x.clone().requires_grad_()
        return greg.gradient_loss(greg.energy_score(net(v)), v, n_in, 9.0, -9.0)

    ours = torch.autograd.grad(penalty(), list(net.parameters()), allow_unused=True)
    for p, g in zip(net.parameters(), ours, strict=True):
        i, h = seed % p.numel(), 1e-5
        flat = p.data.view(-1)
        old = flat[i].item()
        flat[i] = old + h
        up = penalty().item()
        flat[i] = old - h
        down = penalty().item()
        flat[i] = old
        analytic = 0.0 if g is None else g.reshape(-1)[i].item()
        assert analytic == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-7)


def test_a_zero_gradient_has_norm_zero_and_finite_gradients():
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    x = normal(0, 4, 3).requires_grad_()
    norm = greg.gradient_norm(x @ w, x)
    assert torch.equal(norm, torch.zeros(4, dtype=torch.float64))
    norm.sum().backward()
    assert torch.equal(w.grad, torch.zeros(3, dtype=torch.float64))


@given(seeds, st.lists(st.booleans(), min_size=6, max_size=6))
def test_masked_samples_stay_out_of_the_gradient_norm_also_in_training_mode(seed, mask):
    """Where batch norm has every sample feel every other's score."""
    layers = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Linear(8, 4)
    net = seeded(seed, lambda: nn.Sequential(*layers)).double().train()
    x, mask = normal(seed, 6, 3), torch.tensor(mask)
    J = torch.autograd.functional.jacobian(lambda v: greg.energy_score(net(v)), x)  # [6,6,3]
    v = x.clone().requires_grad_()
    ours = greg.gradient_norm(greg.energy_score(net(v)), v, mask)
    torch.testing.assert_close(ours, (J * mask.view(-1, 1, 1)).sum(0).norm(dim=1) * mask)


@given(seeds, st.integers(1, 6))
def test_gradient_norm_is_that_of_each_sample_alone_in_eval_mode(seed, n):
    net, x = softplus_net(seed), normal(seed, n, 6)
    mask = torch.rand(n, generator=generator(seed)) < 0.5
    v = x.clone().requires_grad_()
    ours = greg.gradient_norm(greg.energy_score(net(v)), v, mask)
    for i in range(n):
        w = x[i : i + 1].clone().requires_grad_()
        (g,) = torch.autograd.grad(greg.energy_score(net(w)).sum(), w)
        assert ours[i].item() == pytest.approx(g.norm().item() if mask[i] else 0.0, rel=1e-9)


def test_a_score_without_a_path_to_its_input_is_refused():
    x = torch.randn(3, 2)
    for s in x.sum(1), torch.randn(3, requires_grad=True):
        with pytest.raises(ValueError, match="requires_grad_"):
            greg.gradient_norm(s, x)
    x.requires_grad_()
    with pytest.raises(ValueError, match="auxiliary"):
        greg.gradient_loss(x.sum(1), x, 3)
    with pytest.raises(ValueError, match="reduction"):
        greg.gradient_loss(x.sum(1), x, 1, reduction="mean")


@given(seeds, st.integers(1, 4), st.integers(1, 4), st.sampled_from(["paper", "released"]))
def test_greg_loss_is_the_sum_of_its_terms_from_one_forward(seed, n_in, n_aux, reduction):
    net, x, calls = softplus_net(seed), normal(seed, n_in + n_aux, 6), []
    net.register_forward_hook(lambda *a: calls.append(1))
    y = torch.randint(3, (n_in,), generator=generator(seed))
    s = greg.energy_score(net(x)).detach()
    m_in, m_aux = s.median().item(), s.median().item() - 0.1
    out = greg.greg_loss(net, x[:n_in], y, x[n_in:], m_in, m_aux, 0.3, 0.7, reduction)
    assert len(calls) == 2  # the one above and one more
    p = net(x[:n_in]).softmax(1).tolist()
    ce = -sum(math.log(p[i][y[i]]) for i in range(n_in)) / n_in
    penalty = eq3_by_differences(net, x, n_in, m_in, m_aux)
    penalty /= n_in + n_aux if reduction == "released" else 1
    expected = ce + 0.3 * eq1(s[:n_in].tolist(), s[n_in:].tolist(), m_in, m_aux) + 0.7 * penalty
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)
    terms = out.ce + 0.3 * out.energy + 0.7 * out.gradient
    assert out.loss.item() == pytest.approx(terms.item(), rel=1e-12)
    assert torch.equal(out.scores, greg.energy_score(out.logits))


@pytest.mark.parametrize("m_in,m_aux", [(-25.0, -7.0), (-99.0, 99.0), (99.0, 100.0), (-99, -98.0)])
@pytest.mark.parametrize("autocast", [False, True])
def test_greg_loss_trains_any_network_with_any_mask_empty(m_in, m_aux, autocast):
    points = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    images = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    )
    for net, shape in (points, (2,)), (images, (1, 8, 8)):
        x, y = normal(1, 6, *shape, dtype=torch.float32), torch.tensor([0, 1, 2])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = greg.greg_loss(net, x[:3], y, x[3:], m_in, m_aux)
        assert out.loss.isfinite() and out.scores.dtype == torch.float32
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())
        if m_in == -99 and m_aux == 99:
            assert out.gradient.item() == 0 < out.energy.item()
        if m_in == 99:
            assert out.gradient.item() > 0
        net.zero_grad()


def test_without_the_gradient_term_greg_loss_is_the_energy_fine_tune():
    net, x, y = softplus_net(0), normal(0, 4, 6), torch.tensor([0, 1])
    out = greg.greg_loss(net, x[:2], y, x[2:], lambda_grad=0)
    assert out.gradient.item() == 0 and x.grad is None
    expected = out.ce + 0.1 * greg.energy_loss(out.scores[:2], out.scores[2:])
    assert out.loss.item() == expected.item()


@given(seeds, st.sampled_from(["paper", "released"]), st.booleans())
def test_equation_3_on_a_random_share_of_the_batch_is_unbiased(seed, reduction, images):
    """The mean over all the ways to draw, value and gradient, is that of the whole batch."""
    n_in, n_aux = 3, 4
    net = (nn.Sequential(nn.Flatten(), softplus_net(seed)) if images else softplus_net(seed)).eval()
    x = normal(seed, n_in + n_aux, *((2, 3) if images else (6,)))
    s = greg.energy_score(net(x)).detach()
    margins = s.median().item(), s.median().item() - 0.1
    y = torch.zeros(n_in, dtype=torch.int64)

    def gradients(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, net.parameters())])

    whole = greg.greg_loss(net, x[:n_in], y, x[n_in:], *margins, reduction=reduction)
    expected, estimates, draw = gradients(whole.loss), {}, generator(seed)
    ways = {  # a third and a quarter: one row of each side
        (i, n_in + j) for i in range(n_in) for j in range(n_aux)
    }
    while len(estimates) < len(ways):
        state = draw.get_state()
        rows, n = greg.random_rows(n_in, n_aux, 0.3, draw)
        draw.set_state(state)
        part = greg.greg_loss(
            net, x[:n_in], y, x[n_in:], *margins, reduction=reduction, grad_share=0.3,
            generator=draw,
        )  # fmt: skip
        assert n == 1 and torch.equal(part.scores, whole.scores)
        estimates[tuple(rows.tolist())] = part.gradient.item(), gradients(part.loss)
    assert set(estimates) == ways
    values, at_weights = zip(*estimates.values(), strict=True)
    assert sum(values) / len(ways) == pytest.approx(whole.gradient.item(), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(sum(at_weights) / len(ways), expected)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_running_statistics_are_those_of_one_forward_of_the_whole_batch(share):
    net = seeded(0, lambda: greg.wrn(10, 1, 3)).train()
    x = normal(0, 6, 3, 8, 8, dtype=torch.float32)
    once = copy.deepcopy(net)
    once(x)
    greg.greg_loss(net, x[:2], torch.tensor([0, 1]), x[2:], grad_share=share).loss.backward()
    for (name, a), b in zip(net.named_buffers(), once.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_the_gradient_term_takes_strides_as_lists():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(normal(0, 3, 2, 3, 3))

        def forward(self, x):
            return F.softplus(F.conv2d(x, self.w, stride=[2, 1], padding=[1, 0])).sum((2, 3))

    net, x = Net(), normal(1, 4, 2, 5, 5)
    margins = {"m_in": 1e3, "m_aux": -1e3}  # every sample in both masks
    loss = greg.greg_loss(net, x[:2], torch.tensor([0, 1]), x[2:], lambda_s=0, **margins)
    expected = sum(
        torch.autograd.functional.jacobian(lambda v: greg.energy_score(net(v[None]))[0], v).norm()
        for v in x
    )
    assert loss.gradient.item() == pytest.approx(expected.item() / 2)
    loss.loss.backward()
    assert net.w.grad.isfinite().all()


@given(seeds, st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 1))
def test_the_rows_drawn_for_equation_3_are_distinct_and_of_both_sides(seed, n_in, n_aux, share):
    rows, n = greg.random_rows(n_in, n_aux, share, generator(seed))
    assert len(set(rows.tolist())) == len(rows)
    assert (rows[:n] < n_in).all() and (rows[n:] >= n_in).all() and rows.max() < n_in + n_aux
    for drawn, of in ((n, n_in), (len(rows) - n, n_aux)):
        assert drawn >= 1 and (drawn == 1 or abs(drawn - share * of) <= 0.5)
    for bad in 0.0, -1.0, 1.5:
        with pytest.raises(ValueError, match="share"):
            greg.random_rows(n_in, n_aux, bad)


def test_a_compiled_network_is_refused_where_double_backward_may_be_wrong():
    net = nn.Linear(2, 3)
    compiled = nn.Linear(2, 3)
    compiled.compile()
    x, y = torch.randn(2, 2), torch.tensor([0])
    for bad in torch.compile(net), compiled:
        with pytest.raises(ValueError, match="compile"):
            greg.greg_loss(bad, x[:1], y, x[1:])


class Catenated(nn.Module):
    """[x, one or two functions of x] along `dim`, as DenseNet and Inception have it."""

    def __init__(self, *bodies, dim=1):
        super().__init__()
        self.bodies, self.dim = nn.ModuleList(bodies), dim

    def forward(self, x):
        return torch.cat([x, *(body(x) for body in self.bodies)], self.dim)


def mixed_net(seed, conv, norm, bend, channels_last, training):
    """Strided, dilated, grouped, biased and 'same' convolutions, every norm, in float64."""
    norms = {
        "batch": lambda: nn.BatchNorm2d(4),
        "no average": lambda: nn.BatchNorm2d(4, track_running_stats=False),
        "plain": lambda: nn.BatchNorm2d(4, affine=False),
        "group": lambda: nn.GroupNorm(2, 4),
    }
    bends = {"relu": nn.ReLU(), "in place": nn.ReLU(inplace=True), "smooth": nn.Softplus()}
    layers = [nn.Conv2d(2, 4, 3, bias=False), norms[norm](), bends[bend]]
    layers += [nn.Conv2d(4, 4, 3, **conv), norms[norm](), nn.Tanh()]
    layers += [Catenated(nn.Conv2d(4, 2, 1, bias=False), nn.Conv2d(4, 4, 1)), nn.Flatten()]
    net = nn.Sequential(*layers, nn.LazyLinear(5), nn.BatchNorm1d(5), nn.Softplus())
    net = nn.Sequential(net, Catenated(nn.Linear(5, 3), dim=-1)).double()
    x = normal(seed, 6, 2, 9, 9) + 0.5
    seeded(seed, lambda: net(x))
    for p in net.parameters():
        p.data = normal(seed + p.numel(), *p.shape) * 0.5
    form = torch.channels_last if channels_last else torch.contiguous_format
    return net.to(memory_format=form).train(training), x.to(memory_format=form)


@given(
    seeds,
    st.fixed_dictionaries(
        {"bias": st.booleans(), "groups": st.sampled_from([1, 2]), "dilation": st.integers(1, 2)}
    ),
    st.sampled_from([{"stride": 2, "padding": 1}, {"padding": "same"}, {"padding": (0, 2)}, {}]),
    st.sampled_from(["batch", "no average", "plain", "group"]),
    st.sampled_from(["relu", "in place", "smooth"]),
    st.booleans(),
    st.booleans(),
)
def test_the_fast_double_backward_is_autograds_own(
    seed, conv, more, norm, bend, channels_last, training
):
    fast, x = mixed_net(seed, conv | more, norm, bend, channels_last, training)
    slow, y, results = copy.deepcopy(fast), torch.tensor([0, 3]), []
    ours = greg.greg_loss(fast, x[:2], y, x[2:], 9.0, -9.0)
    v = x.clone().requires_grad_()
    f = slow(v)
    s = greg.energy_score(f)
    loss = F.cross_entropy(f[:2], y) + 0.1 * greg.energy_loss(s[:2], s[2:], 9.0, -9.0)
    loss = loss + greg.gradient_loss(s, v, 2, 9.0, -9.0)
    for net, out in (fast, ours.loss), (slow, loss):
        out.backward()
        results.append([p.grad for p in net.parameters()] + list(net.buffers()))
    assert ours.loss.item() == pytest.approx(loss.item(), rel=1e-9)
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-7, atol=1e-9)


def graph_of(t):
    """Names of all the functions that a tensor was made by."""
    seen, todo = {}, [t.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen[node] = node.name()
            todo += [parent for parent, _ in node.next_functions]
    return set(seen.values())


@pytest.mark.parametrize("arch", ["resnet18", "wrn10_1", "densenet100"])
def test_the_networks_of_the_paper_run_on_the_fast_double_backward(arch):
    net, x = greg.build(arch, 3).train(), torch.rand(4, 3, 32, 32)
    names = graph_of(greg.greg_loss(net, x[:2], torch.tensor([0, 1]), x[2:], 9.0, -9.0).gradient)
    slow = {"ConvolutionBackward0", "NativeBatchNormBackward0", "CatBackward0", "ReluBackward0"}
    assert not names & slow
    assert {"_Conv2dBackwardBackward", "_BatchNormBackwardBackward"} <= names
    assert "_ReLUBackwardBackward" in names


def test_relu_in_place_stays_in_place_on_the_fast_double_backward():
    x = torch.tensor([-1.0, 2.0])
    with greg.FastDoubleBackward():
        F.relu(x, inplace=True)
    assert x.tolist() == [0, 2]


def test_a_second_gradient_of_the_weights_is_refused_not_wrong():
    net, x = greg.build("wrn10_1", 3).train(), torch.rand(4, 3, 32, 32).requires_grad_()
    conv, norm = (
        next(m for m in net.features[1].modules() if isinstance(m, kind)).weight
        for kind in (nn.Conv2d, nn.BatchNorm2d)
    )
    for weight in conv, norm:
        with greg.FastDoubleBackward():
            f = net(x)
        g = torch.autograd.grad(f.square().sum(), [x, weight], create_graph=True)
        with pytest.raises(RuntimeError, match="only once"):
            (g[0].sum() * g[1].sum()).backward()


@pytest.mark.parametrize("norm", [False, True])
def test_a_third_derivative_is_refused_not_wrong(norm):
    """Also where the loss is linear in the image gradient, so that nothing else would notice."""
    layers = [nn.BatchNorm2d(2)] if norm else [nn.Conv2d(2, 2, 3, bias=False), nn.Softplus()]
    net, x = nn.Sequential(*layers, nn.Softplus()).double(), normal(0, 3, 2, 4, 4).requires_grad_()
    with greg.FastDoubleBackward():
        s = net(x).sum()
    (g,) = torch.autograd.grad(s, x, create_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad((g * normal(1, *x.shape)).sum(), layers[0].weight, create_graph=True)


def test_the_fast_double_backward_under_autocast_is_autograds_own_up_to_bfloat16():
    net = greg.build("wrn10_1", 3).train()
    x, y, grads = torch.rand(8, 3, 32, 32), torch.tensor([0, 1, 2, 0]), []
    for fast in True, False:
        v = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            if fast:
                gradient = greg.greg_loss(net, x[:4], y, x[4:], 9.0, -9.0).gradient
            else:
                gradient = greg.gradient_loss(greg.energy_score(net(v)), v, 4, 9.0, -9.0)
        g = torch.autograd.grad(gradient, list(net.parameters()), allow_unused=True)
        grads.append(torch.cat([t.flatten() for t in g if t is not None]))
    assert (grads[0] - grads[1]).norm() < 0.05 * grads[1].norm()


@given(seeds, st.integers(1, 5), st.integers(2, 6))
def test_outlier_exposure_is_the_divergence_from_uniform(seed, n, K):
    f = normal(seed, n, K)
    p = f.softmax(1)
    kl = (math.log(1 / K) - p.log()).mean(1).mean()  # KL(uniform ‖ p)
    assert greg.oe_loss(f, f, None).item() == pytest.approx(kl.item(), rel=1e-9, abs=1e-12)


@given(seeds, st.integers(1, 5), st.integers(2, 6))
def test_absent_and_openmix_losses_at_the_ends_of_their_mixture(seed, n, K):
    f, y = normal(seed, n, K + 1), torch.randint(K, (n,), generator=generator(seed))
    last = torch.full((n,), K)
    absent = F.cross_entropy(f, last).item()
    assert greg.absent_loss(f, f, y).item() == pytest.approx(absent, rel=1e-12)
    mixed = [greg.openmix_loss(f, f, y, torch.tensor(lam)).item() for lam in (1.0, 0.0, 0.25)]
    ends = F.cross_entropy(f, y).item(), absent
    expected = [*ends, 0.25 * ends[0] + 0.75 * ends[1]]
    assert mixed == pytest.approx(expected, rel=1e-6)


@given(seeds, st.integers(1, 5), st.integers(1, 5), st.integers(2, 5))
def test_balanced_energy_is_a_weighted_equation_1(seed, n, m, K):
    f_in, f_aux = 4 * normal(seed, n, K), 4 * normal(seed + 1, m, K)
    prior = torch.rand(K, generator=generator(seed)).double() + 0.1
    q = [p**0.05 for p in prior.tolist()]
    q = [v / sum(q) for v in q]
    Z = [sum(p * v for p, v in zip(row, q, strict=True)) for row in f_aux.softmax(1).tolist()]
    S = [-math.log(sum(map(math.exp, row))) for row in f_aux.tolist()]
    aux = sum(z * max(0, -2 - (s - 10 * z)) ** 2 for z, s in zip(Z, S, strict=True)) / sum(Z)
    S_in = [-math.log(sum(map(math.exp, row))) for row in f_in.tolist()]
    expected = sum(max(0, s + 5) ** 2 for s in S_in) / n + aux
    ours = greg.balanced_energy_loss(f_in, f_aux, None, prior, m_in=-5.0, m_aux=-2.0)
    assert ours.item() == pytest.approx(expected, rel=1e-9)


# ------------------------------------------------------------------------------------- 3  Sampling

sizes = st.tuples(st.integers(1, 40), st.integers(1, 5))


def points(seed, n, d, kind):
    """Points of several kinds: general, with many duplicates, on a line, far from the origin."""
    x = normal(seed, n, d, dtype=torch.float32)
    if kind == "duplicates":
        x = x[torch.randint(max(1, n // 3), (n,), generator=generator(seed))]
    if kind == "line":
        x = x * torch.eye(d)[0]
    return x + 1000 if kind == "far" else x


kinds = st.sampled_from(["general", "duplicates", "line", "far"])


@given(seeds, sizes, st.integers(1, 40), kinds, st.integers(1, 3))
def test_kmeans_ends_at_a_fixed_point(seed, size, k, kind, n_init):
    x, k = points(seed, *size, kind), min(k, size[0])
    labels, c, inertia = greg.kmeans(x, k, n_init, tol=0.0, generator=generator(seed))
    d = torch.cdist(x.double(), c.double()).square()
    scale = (x.double() - x.double().mean(0)).square().sum() + 1e-3
    assert labels.dtype == torch.int64 and c.shape == (k, size[1])
    own = d.gather(1, labels[:, None])[:, 0]
    assert (own - d.min(1).values).max() <= 1e-5 * scale
    assert inertia.item() == pytest.approx(own.sum().item(), rel=1e-3, abs=1e-5 * scale.item())
    for j in labels.unique():
        torch.testing.assert_close(c[j], x[labels == j].mean(0), rtol=1e-5, atol=1e-3)
    distinct = len(x.unique(dim=0))
    assert len(labels.unique()) == min(k, distinct)


@given(seeds, st.integers(5, 60), st.integers(1, 4), st.integers(2, 5))
def test_inertia_never_rises_and_is_the_best_of_the_restarts(seed, n, d, k):
    x = points(seed, n, d, "general")
    inertias = [
        greg.kmeans(x, k, 3, max_iter=i, tol=0.0, generator=generator(seed))[2].item()
        for i in range(1, 8)
    ]
    assert all(a >= b - 1e-4 for a, b in itertools.pairwise(inertias))
    whole = greg.kmeans(x, k, 3, tol=0.0, generator=generator(seed))[2].item()
    c = greg._kmeans_plus_plus(x - x.mean(0), k, 3, generator(seed))
    for restart in c:  # an independent Lloyd from each of the same starts
        start = restart.double()
        for _ in range(100):
            own = torch.cdist((x - x.mean(0)).double(), start).argmin(1)
            means = [(x - x.mean(0)).double()[own == j] for j in range(k)]
            if any(len(m) == 0 for m in means):
                break
            start = torch.stack([m.mean(0) for m in means])
        else:
            inertia = torch.cdist((x - x.mean(0)).double(), start).min(1).values.square().sum()
            assert whole <= inertia.item() + 1e-3


def brute_force_inertia(x, k):
    """The optimum over all partitions of a few points."""
    best = math.inf
    for labels in itertools.product(range(k), repeat=len(x)):
        parts = [x[[i for i, label in enumerate(labels) if label == j]] for j in range(k)]
        best = min(best, sum(((p - p.mean(0)) ** 2).sum().item() for p in parts if len(p)))
    return best


@given(seeds, st.integers(1, 3))
def test_kmeans_finds_the_optimum_of_a_few_points(seed, k):
    x = normal(seed, 6, 2)
    inertia = greg.kmeans(x, k, n_init=30, tol=0.0, generator=generator(seed))[2].item()
    assert inertia == pytest.approx(brute_force_inertia(x, k), rel=1e-9, abs=1e-12)


@given(seeds, st.integers(6, 40), st.integers(1, 4), st.integers(1, 5))
def test_kmeans_does_not_depend_on_the_order_of_well_separated_points(seed, n, d, k):
    g = generator(seed)
    centres = 100 * torch.eye(8)[:k, :]
    x = centres[torch.arange(n) % k] + torch.rand(n, 8, generator=g)
    labels, _, inertia = greg.kmeans(x, min(k, n), generator=generator(seed))
    order = torch.randperm(n, generator=g)
    permuted, _, same = greg.kmeans(x[order], min(k, n), generator=generator(seed + 1))
    assert same.item() == pytest.approx(inertia.item(), rel=1e-4)
    together = labels[:, None] == labels[None]
    assert torch.equal(together[order][:, order], permuted[:, None] == permuted[None])


@given(seeds, sizes, st.integers(1, 40))
def test_kmeans_is_a_function_of_its_generator_and_of_nothing_global(seed, size, k):
    x, k = points(seed, *size, "general"), min(k, size[0])
    a = greg.kmeans(x, k, generator=generator(seed))
    torch.manual_seed(seed + 1)
    with torch.autocast("cpu", torch.bfloat16):
        b = greg.kmeans(x, k, generator=generator(seed))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True)) and a[1].dtype == x.dtype


def test_an_empty_cluster_moves_to_the_farthest_point():
    x = torch.tensor([[0.0], [1.0], [10.0]])
    c = torch.tensor([[[0.5], [100.0], [200.0]]])
    labels, distance = greg._nearest(x, c)
    assert labels.tolist() == [[0, 0, 0]]
    moved = greg._means(x, c, labels, distance)[0, :, 0].tolist()
    assert moved[1:] == [10.0, 0.0] and moved[0] == pytest.approx(11 / 3)


def test_kmeans_of_many_points_is_that_of_all_of_them():
    """More than fit in a block of distances, against loops in float64."""
    x, c = normal(0, 5000, 3, dtype=torch.float32), normal(1, 3, 100, 3, dtype=torch.float32)
    labels, distance = greg._nearest(x, c)
    means = greg._means(x, c, labels, distance)
    for r in range(3):
        d = torch.cdist(x.double(), c[r].double()).square()
        assert (d.gather(1, labels[r][:, None])[:, 0] - d.min(1).values).max() <= 1e-5
        torch.testing.assert_close(distance[r].double(), d.min(1).values, rtol=1e-4, atol=1e-5)
        for j in labels[r].unique():
            torch.testing.assert_close(means[r, j], x[labels[r] == j].mean(0))


@given(seeds)
def test_kmeans_finds_small_clusters_far_out_among_many_points(seed):
    """The sample that centroids start from must not miss six pairs among 2,000 points."""
    pairs = 100 * torch.eye(6).repeat_interleave(2, 0)
    x = torch.cat([normal(seed, 2000, 6, dtype=torch.float32), pairs])
    labels = greg.kmeans(x, 7, generator=generator(seed))[0]
    assert labels[2000:].unique(return_counts=True)[1].tolist() == [2] * 6


def test_kmeans_is_as_good_as_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    x = F.normalize(normal(0, 300, 20, dtype=torch.float32).relu())
    theirs, ours = [], []
    for seed in range(5):
        theirs.append(cluster.KMeans(30, n_init=3, random_state=seed).fit(x.numpy()).inertia_)
        ours.append(greg.kmeans(x, 30, generator=generator(seed))[2].item())
    assert sum(ours) <= 1.02 * sum(theirs)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_kmeans_refuses_impossible_numbers_of_clusters(k):
    with pytest.raises(ValueError, match="k"):
        greg.kmeans(torch.randn(3, 2), k)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_kmeans_refuses_points_that_are_not_finite(value):
    with pytest.raises(ValueError, match="finite"):
        greg.kmeans(torch.tensor([[0.0], [value]]), 1)
    with pytest.raises(ValueError, match="need x"):
        greg.kmeans(torch.randn(3), 1)


@given(seeds, st.integers(2, 40), st.integers(1, 4), st.integers(1, 20), st.booleans())
def test_energy_sampling_takes_both_ends_of_each_cluster_and_2k_in_all(seed, n, d, k, ties):
    k = min(k, n // 2)
    z, s = normal(seed, n, d, dtype=torch.float32), normal(seed + 1, n)
    s = s.round() if ties else s
    chosen = greg.energy_sampling(z, s, k, generator(seed))
    assert len(chosen) == 2 * k == len(set(chosen.tolist()))
    labels = greg.kmeans(F.normalize(z), k, generator=generator(seed))[0]
    for j in labels.unique():
        members = (labels == j).nonzero()[:, 0]
        values = s[chosen[torch.isin(chosen, members)]]
        assert values.min() == s[members].min() and values.max() == s[members].max()
    scaled = greg.energy_sampling(z * 3, s, k, generator(seed))
    assert len(scaled) == 2 * k
    assert torch.equal(chosen, greg.energy_sampling(z, s, k, generator(seed)))


def test_clusters_are_those_of_directions_not_of_lengths():
    angle = torch.tensor([0.0, 0.01, 1.5, 1.51])
    z = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([[1.0], [50.0], [1.0], [50.0]])
    s = torch.tensor([0.0, 1.0, 2.0, 3.0])
    labels = greg._clusters(z, s, 2, 4, generator(0))
    assert labels[0] == labels[1] != labels[2] == labels[3]


def test_candidates_that_fill_no_cluster_are_topped_up_at_random():
    z = torch.tensor([[1.0, 0.0]] * 9 + [[0.0, 1.0]])  # a cluster of nine and one of one
    s = torch.arange(10.0)
    counts = torch.zeros(10)
    for seed in range(300):
        counts[greg.energy_sampling(z, s, 2, generator(seed))] += 1
    assert counts[[0, 8, 9]].tolist() == [300, 300, 300]
    assert counts[1:8].sum() == 300 and counts[1:8].min() > 15  # 43 expected


@pytest.mark.parametrize("sample,k", [(greg.energy_sampling, 3), (greg.dos_sampling, 6)])
def test_more_samples_than_candidates_are_refused(sample, k):
    with pytest.raises(ValueError, match="candidates"):
        sample(torch.randn(5, 2), torch.randn(5), k)
    with pytest.raises(ValueError, match="NaN"):
        sample(torch.randn(5, 2), torch.full((5,), math.nan), 2)


@given(seeds, st.integers(1, 30), st.integers(1, 30))
def test_dos_takes_the_lowest_of_each_cluster(seed, n, k):
    k, z, s = min(k, n), normal(seed, n, 3, dtype=torch.float32), normal(seed + 1, n)
    chosen = greg.dos_sampling(z, s, k, generator(seed))
    assert len(chosen) == k == len(set(chosen.tolist()))
    labels = greg.kmeans(F.normalize(z), k, generator=generator(seed))[0]
    lowest = {min((labels == j).nonzero()[:, 0].tolist(), key=lambda i: s[i]) for j in labels}
    assert lowest <= set(chosen.tolist())


@given(seeds, st.integers(8, 60), st.sampled_from([0.0, 0.125, 0.5]))
def test_ntom_skips_the_hardest_and_takes_the_next(seed, N, q):
    s, first = normal(seed, N), int(q * N)
    n = (N - first) // 2 + 1
    ranked = sorted(range(N), key=lambda i: s[i])
    assert set(greg.quantile_mining(s, n, q).tolist()) == set(ranked[first : first + n])
    with pytest.raises(ValueError, match="skips"):
        greg.quantile_mining(s, N - first + 1, q)


@given(seeds, st.integers(1, 30), st.integers(1, 5), st.floats(0.1, 30), st.floats(0.1, 3))
def test_poem_has_the_posterior_of_the_normal_equations(seed, n, d, sigma, sigma_n):
    Z, y = normal(seed, n, d), normal(seed + 1, n)
    mean, factor = greg.poem_posterior(Z.T @ Z, Z.T @ y, sigma, sigma_n)
    # The same in the dual: condition the Gaussian of (beta, y) on y.
    gain = sigma * Z.T @ torch.linalg.inv(sigma * Z @ Z.T + sigma_n * torch.eye(n).double())
    covariance = sigma * torch.eye(d).double() - gain @ (sigma * Z)
    torch.testing.assert_close(mean, gain @ y, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(torch.cholesky_inverse(factor), covariance, rtol=1e-6, atol=1e-8)


def test_poem_in_one_dimension_and_the_spread_of_its_draws():
    four, six = torch.tensor([[4.0]]).double(), torch.tensor([6.0]).double()
    mean, factor = greg.poem_posterior(four, six, 2.0, 0.5)
    assert mean.item() == pytest.approx((6 / 0.5) / (4 / 0.5 + 1 / 2))
    draws = torch.stack([greg.poem_draw(mean, factor, generator(i)) for i in range(4000)])
    assert draws.mean().item() == pytest.approx(mean.item(), abs=0.03)
    assert draws.var().item() == pytest.approx(1 / 8.5, rel=0.1)
    gram = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    mean, factor = greg.poem_posterior(gram, torch.zeros(2).double(), 20.0, 0.5)
    draws = torch.stack([greg.poem_draw(mean, factor, generator(i)) for i in range(6000)])
    expected = torch.linalg.inv(gram.double() / 0.5 + torch.eye(2).double() / 20)
    torch.testing.assert_close(draws.T.cov(), expected, rtol=0.15, atol=0.02)


# ------------------------------------------------------------------------------- 5  Post-hoc scores


def head(seed, n=6, d=5, K=4):
    z, W, b = normal(seed, n, d).relu(), normal(seed + 1, K, d), normal(seed + 2, K)
    return z, W, b


@given(seeds, st.integers(1, 6), st.integers(2, 6))
def test_msp_and_absent_are_softmax_probabilities(seed, n, K):
    f = normal(seed, n, K)
    e = [[math.exp(v) for v in row] for row in f.tolist()]
    msp, absent = [-max(r) / sum(r) for r in e], [r[-1] / sum(r) for r in e]
    assert greg.msp(f).tolist() == pytest.approx(msp)
    assert greg.absent(f).tolist() == pytest.approx(absent)


@given(seeds, st.sampled_from([1.0, 10.0, 1000.0]))
def test_odin_steps_up_the_predicted_probability_and_is_msp_without_a_step(seed, T):
    net, x = softplus_net(seed), normal(seed, 4, 6).view(4, 6, 1, 1)
    net = nn.Sequential(nn.Flatten(), net)
    torch.testing.assert_close(greg.odin(net, x, T, 0.0), greg.msp(net(x) / T))
    std = [0.5, 1, 2, 4, 1, 1]
    moved, h = x.clone(), 1e-6
    for i, j in itertools.product(range(4), range(6)):  # by differences, a coordinate at a time
        up, down = x[i : i + 1].clone(), x[i : i + 1].clone()
        up[0, j], down[0, j] = up[0, j] + h, down[0, j] - h
        c = net(x[i : i + 1]).argmax()
        rises = (net(up) / T).log_softmax(1)[0, c] >= (net(down) / T).log_softmax(1)[0, c]
        moved[i, j] += (0.01 if rises else -0.01) / std[j]
    ours = greg.odin(net, x, T, 0.01, std)
    torch.testing.assert_close(ours, greg.msp(net(moved) / T), rtol=1e-6, atol=1e-9)
    assert all(p.grad is None for p in net.parameters())


@given(seeds, st.integers(1, 40), st.floats(0, 100))
def test_percentiles_are_those_of_numpy(seed, n, p):
    v = normal(seed, n)
    assert greg.percentile(v, p).item() == pytest.approx(
        np.percentile(v.numpy(), p), rel=1e-9, abs=1e-12
    )


@given(seeds, st.sampled_from([0.0, 50.0, 90.0]))
def test_react_and_dice_by_loops(seed, p):
    z, W, b = head(seed)
    assert torch.equal(greg.react(z, W, b, math.inf), greg.energy_score(z @ W.T + b))
    clipped = torch.tensor([[min(v, 0.7) for v in row] for row in z.tolist()]).double()
    torch.testing.assert_close(greg.react(z, W, b, 0.7), greg.energy_score(clipped @ W.T + b))
    mean = z.mean(0)
    V = sorted(W[k, j].item() * mean[j].item() for k in range(4) for j in range(5))
    cut = np.percentile(V, p)
    mask = greg.dice_mask(mean, W, p)
    assert mask.sum() == sum(v > cut for v in V)
    f = torch.zeros(6, 4).double()
    for i, k in itertools.product(range(6), range(4)):
        f[i, k] = b[k] + sum(z[i, j] * W[k, j] for j in range(5) if mask[k, j])
    torch.testing.assert_close(greg.dice(z, W, b, mask), greg.energy_score(f))


@given(seeds, st.sampled_from([0.0, 30.0, 90.0]), st.sampled_from([0.0, 30.0, 90.0]))
def test_line_has_the_attributions_of_autograd_on_the_true_label(seed, p_a, p_w):
    z, W, b = head(seed, n=12)
    y = torch.arange(12) % 4
    s = torch.zeros(4, 5).double()
    for i in range(12):  # its official code: one backward pass for each sample
        h = z[i].clone().requires_grad_()
        (g,) = torch.autograd.grad((W @ h + b)[y[i]], h)
        s[y[i]] += (h * g).detach() / 3
    means = torch.stack([z[y == c].mean(0) for c in range(4)])
    ours = greg.line(z, W, b, greg.line_fit(means, W, p_a, p_w), 0.8)
    for i in range(12):
        h = z[i].clamp(max=0.8)
        c = (W @ h + b).argmax()
        m = s[c] > np.percentile(s[c].numpy(), p_a) + 1e-12
        V = s[c].abs() * W
        M = V > np.percentile(V.numpy(), p_w) + 1e-12
        f = (W * M) @ (h * m) + b
        assert ours[i].item() == pytest.approx(-torch.logsumexp(f, 0).item(), rel=1e-9)


@given(seeds)
def test_masking_whole_columns_never_raises_the_spectral_norm(seed):
    """Section 5 of the paper, on LINe's activation masks."""
    z, W, _ = head(seed)
    fit = greg.line_fit(z[:4], W, 40.0, 40.0)
    norm = torch.linalg.matrix_norm(W, 2)
    for c in range(4):
        mask = fit.s[c] > fit.activation[c]
        assert torch.linalg.matrix_norm(W * mask, 2) <= norm + 1e-12


def test_masking_single_weights_can_raise_the_spectral_norm():
    W, mask = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert torch.linalg.matrix_norm(W * mask, 2) > 1.1 * torch.linalg.matrix_norm(W, 2)


def test_fitting_needs_every_class():
    net = greg.wrn(10, 1, 3)
    with pytest.raises(ValueError, match="class"):
        greg.fit_scores(net, torch.rand(4, 64), torch.tensor([0, 0, 1, 1]), greg.PostHoc())


# -------------------------------------------------------------------------------------- 6  Metrics

tied = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e3, 1e3, allow_subnormal=False))
ended = st.one_of(tied, st.sampled_from([math.inf, -math.inf]))
samples = st.lists(ended, min_size=1, max_size=30)


def brute_fpr(s_in, s_out, share):
    """The least FPR over all thresholds that accept at least this share of ID."""
    rates = []
    for t in {*s_in, *s_out}:
        if Fraction(sum(s <= t for s in s_in), len(s_in)) >= share:
            rates.append(Fraction(sum(s <= t for s in s_out), len(s_out)))
    return min(rates)


@given(samples, samples, st.sampled_from(["0.95", "0.9", "0.5", "1"]))
@example([float(i) for i in range(20)], [float(i) for i in range(20)], "0.95")
@example([1.0] * 20, [1.0] * 20, "0.95")
def test_fpr_is_the_least_over_all_thresholds(s_in, s_out, share):
    ours = greg.fpr_at_tpr(torch.tensor(s_in), torch.tensor(s_out), float(share))
    f32 = [torch.tensor(v).tolist() for v in (s_in, s_out)]
    assert ours == pytest.approx(float(brute_fpr(*f32, Fraction(share))), abs=1e-12)


@given(samples, st.sampled_from(["0.95", "0.9", "0.5", "1"]))
def test_the_threshold_is_an_id_score_and_the_smallest_that_accepts_enough(s_in, share):
    gamma = greg.threshold(np.array(s_in), float(share))
    assert gamma in s_in
    accepted = Fraction(sum(s <= gamma for s in s_in), len(s_in))
    assert accepted >= Fraction(share)
    smaller = [s for s in s_in if s < gamma]
    assert Fraction(len(smaller), len(s_in)) < Fraction(share)


@given(samples, samples)
def test_auroc_is_the_share_of_ordered_pairs_with_ties_half(s_in, s_out):
    pairs = sum(Fraction((a < b) * 2 + (a == b), 2) for a in s_in for b in s_out)
    ours = greg.auroc(np.array(s_in), np.array(s_out))
    assert ours == pytest.approx(float(pairs / (len(s_in) * len(s_out))), abs=1e-12)
    assert ours + greg.auroc(np.array(s_out), np.array(s_in)) == pytest.approx(1, abs=1e-12)


@given(samples, samples)
def test_aupr_is_the_step_sum_of_precision_over_recall(s_pos, s_neg):
    total, recall = 0.0, 0.0
    for t in sorted({*s_pos}):
        tp, fp = sum(s <= t for s in s_pos), sum(s <= t for s in s_neg)
        total, recall = total + (tp / len(s_pos) - recall) * tp / (tp + fp), tp / len(s_pos)
    assert greg.aupr(np.array(s_pos), np.array(s_neg)) == pytest.approx(total, abs=1e-12)


@given(samples, samples)
def test_metrics_are_those_of_scikit_learn(s_in, s_out):
    metrics = pytest.importorskip("sklearn.metrics")
    s = [max(-1e6, min(1e6, v)) for v in (*s_in, *s_out)]  # it refuses infinities
    label, s = [1] * len(s_in) + [0] * len(s_out), np.array(s)
    a, b = s[: len(s_in)], s[len(s_in) :]
    assert greg.auroc(a, b) == pytest.approx(metrics.roc_auc_score(label, -s), abs=1e-12)
    ap = metrics.average_precision_score(label, -s)
    assert greg.aupr(a, b) == pytest.approx(ap, abs=1e-12)
    fpr, tpr, _ = metrics.roc_curve(label, -s, drop_intermediate=False)
    assert greg.fpr_at_tpr(a, b) == pytest.approx(fpr[(tpr >= 0.95 - 1e-12).argmax()], abs=1e-12)


integers = st.lists(st.integers(-9, 9), min_size=1, max_size=25)


@given(integers, integers)
def test_metrics_do_not_change_under_increasing_maps_or_reordering(a, b):
    a, b = torch.tensor(a), torch.tensor(b)
    before = greg.ood_metrics(a, b)
    assert greg.ood_metrics(a.double() ** 3 + 7, b.double() ** 3 + 7) == before
    flipped = greg.ood_metrics(a.flip(0), b.flip(0))
    assert flipped == pytest.approx(before)


def test_metrics_on_the_cases_on_which_the_peers_differ():
    up = torch.arange(1.0, 21.0)
    cases = {  # name: (ID, OOD, FPR95, AUROC, AUPR-in, AUPR-out), scores low = ID
        "perfect": (-up - 20, -up, 0, 1, 1, 1),
        "constant": (torch.ones(20), torch.ones(20), 1, 0.5, 0.5, 0.5),
        "saturated": (
            -torch.ones(20),
            -torch.tensor([1.0] * 10 + [0.3] * 10),
            *(0.5, 0.75, 2 / 3, 0.75),
        ),
        "plateau": (-up, torch.full((20,), -1.5), 0, 0.95, 0.975, 0.9524),
        "ten": (-up[:10], torch.full((10,), -1.5), 1, 0.9, 0.95, 0.9091),
        "paired": (up, up, 0.95, 0.5, 0.5, 0.5),
        "imbalanced": (
            -torch.arange(1.0, 1001),
            -torch.tensor([0, 500.5, 2000]),
            *(2 / 3, 0.5, 0.9928, 0.3357),
        ),
        "worst": (-up, -up - 100, 1, 0, 0.3192, 0.3192),
        "infinite": (
            -torch.tensor([1.0] * 19 + [math.inf]),
            torch.tensor([math.inf] * 10 + [-math.inf] * 10),
            *(0.5, 0.5125, 0.6379, 0.75),
        ),
    }
    for name, (s_in, s_out, *expected) in cases.items():
        m = greg.ood_metrics(s_in, s_out)
        got = [m[k] for k in ("fpr95", "auroc", "aupr_in", "aupr_out")]
        assert got == pytest.approx(expected, abs=5e-5), name
        assert (m["n_in"], m["n_out"]) == (len(s_in), len(s_out))


def test_the_ood_positive_fpr_is_the_one_of_openood():
    m = greg.ood_metrics(torch.arange(100.0), torch.arange(100.0) + 10)
    assert m["fpr95_ood_positive"] == pytest.approx(0.85)  # 95 % of OOD are at or above 15


def test_scores_that_float32_rounds_together_are_told_apart_in_float64():
    a = torch.tensor([1.0], dtype=torch.float64)
    assert greg.auroc(a, a + 1e-12) == 1.0


@pytest.mark.parametrize("metric", [greg.fpr_at_tpr, greg.auroc, greg.aupr])
def test_nan_and_empty_scores_are_refused_by_the_name_of_their_set(metric):
    ok, bad = torch.randn(5), torch.tensor([0.0, math.nan])
    for wrong, name in itertools.product((bad, ok[:0]), ("cats", "dogs")):
        pair = (wrong, ok) if name == "cats" else (ok, wrong)
        with pytest.raises(ValueError, match=name):
            metric(*pair, names=("cats", "dogs"))
    for tpr in 0.0, 1.5:
        with pytest.raises(ValueError, match="tpr"):
            greg.threshold(ok, tpr)


def test_a_million_scores_take_no_quadratic_memory():
    s = normal(0, 1_000_000, dtype=torch.float32)
    assert greg.auroc(s, s) == 0.5
    assert greg.fpr_at_tpr(s, s) == pytest.approx(0.95)


# ---------------------------------------------------------------------------------- 4  Certificates

# -------------------------------------------------------------------------------- random networks


def randn(g, *shape):
    return torch.randn(shape, generator=g, dtype=torch.float64)


def uniform(g, low, high):
    return low + (high - low) * torch.rand((), generator=g).item()


LAYERS = "c s d g 1 b r l R P D m M a n".split()


def layer(code, c, g):
    """A layer of c channels by its letter, and its number of output channels."""
    conv3 = lambda a, b, **k: nn.Conv2d(a, b, 3, **{"padding": 1} | k)  # noqa: E731
    if code in "csdg":
        options = {"c": {}, "s": {"stride": 2}, "d": {"dilation": 2, "padding": 2}, "g": {}}[code]
        return conv3(c, 4, groups=2 if code == "g" and c % 2 == 0 else 1, **options), 4
    if code == "R":
        body = [conv3(c, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), conv3(3, c)]
        return greg.Residual(nn.Sequential(*body, nn.BatchNorm2d(c)), nn.Identity()), c
    if code == "P":
        body = nn.Sequential(conv3(c, 4), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 1))
        return greg.Residual(body, nn.Conv2d(c, 4, 1)), 4
    if code == "D":
        return greg.Concat(nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), conv3(c, 2))), c + 2
    if code == "n":
        mean = tuple(uniform(g, -1, 1) for _ in range(c))
        return greg.Normalize(mean, tuple(uniform(g, 0.3, 2) for _ in range(c))), c
    return {
        "1": (nn.Conv2d(c, 3, 1), 3), "b": (nn.BatchNorm2d(c), c), "r": (nn.ReLU(), c),
        "l": (nn.LeakyReLU(0.1), c), "m": (nn.MaxPool2d(3, 2, 1), c),
        "M": (nn.MaxPool2d(2, 1), c), "a": (nn.AvgPool2d(2, 1), c),
    }[code]  # fmt: skip


def randomise(net, g):
    """Weights of every sign and size, batch norms of negative and zero scale, dead units."""
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.weight.data = randn(g, *m.weight.shape) / m.weight[0].numel() ** 0.5 * 1.5
            if m.bias is not None:
                m.bias.data = randn(g, *m.bias.shape) * 0.5
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.weight.data, m.bias.data = randn(g, m.num_features), randn(g, m.num_features) * 0.5
            m.running_mean = randn(g, m.num_features) * 0.3
            m.running_var = randn(g, m.num_features).square() + 0.1
            if uniform(g, 0, 1) < 0.3:
                m.weight.data[0], m.bias.data[0] = 0, -1
    return net.double().eval()


def conv_net(codes, seed, side=5, gap=True):
    g, c, layers = generator(seed), 2, []
    for code in codes:
        if code in "Ma" and side == 1:  # nothing left to pool
            continue
        m, c = layer(code, c, g)
        layers.append(m)
        side = side - 1 if code in "Ma" else -(-side // 2) if code in "sm" else side
    pool = [nn.AdaptiveAvgPool2d(1)] if gap else []
    d = c if gap else c * side**2
    return randomise(greg.Net(nn.Sequential(*layers, *pool, nn.Flatten()), d, 3), g)


def mlp(codes, seed, d=2, K=3):
    g, layers, c = generator(seed), [], d
    for code in codes:
        m = {"L": nn.Linear(c, 5), "B": nn.BatchNorm1d(c), "r": nn.ReLU(), "l": nn.LeakyReLU(0.1)}
        layers.append(m[code])
        c = 5 if code == "L" else c
    return randomise(nn.Sequential(*layers, nn.Linear(c, K)), g)


nets = st.one_of(
    st.builds(
        lambda codes, seed, gap: (conv_net(codes, seed, gap=gap), (2, 5, 5), seed),
        st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4),
        seeds,
        st.booleans(),
    ),
    st.builds(
        lambda codes, seed: (mlp(codes, seed), (2,), seed),
        st.lists(st.sampled_from("LLBrl"), min_size=1, max_size=5),
        seeds,
    ),
)


def scores(net, x):
    with torch.no_grad():
        return greg.energy_score(net(x))


def tolerance(*values):
    return 1e-9 * (1 + max(v.abs().max().item() for v in values))


def around(net, x, eps, g, n=40):
    """Points within eps of x [1,...]: on the sphere, inside it, and where attacks on S go."""
    u = randn(g, n, *x.shape[1:])
    u = u / u.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
    radius = torch.rand(n, generator=g, dtype=torch.float64) ** 0.2
    inside = x + eps * u * radius.clamp(max=1 - 1e-9).view(-1, *[1] * (x.dim() - 1))
    attacked = [greg.attack_scores(net, x, eps, v, steps=6, generator=g)[0] for v in (-1, 1)]
    return torch.cat([x, inside, *attacked])


def dense(f, shape):
    """The matrix of a linear map, column by column."""
    x = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return f(x).flatten(1).T


# ----------------------------------------------------------------------------------------- Eq. (4)


@given(seeds, st.floats(0, 1e6), st.floats(0, 1e6), st.floats(-1e3, 1e3))
def test_radius_of_equation_4_is_the_margin_over_l_and_capped(seed, lipschitz, eps, gamma):
    s = torch.cat([randn(generator(seed), 5) * 100, torch.tensor([gamma], dtype=torch.float64)])
    r = greg.certified_radius(s, gamma, lipschitz, eps)
    assert r.shape == s.shape and r.dtype == torch.float64 and r[-1] == 0
    for value, v in zip(r.tolist(), s.tolist(), strict=True):
        margin = abs(v - gamma)
        want = 0 if margin == 0 else min(eps, margin / lipschitz if lipschitz else math.inf)
        assert value == pytest.approx(want, rel=1e-12)
    larger = greg.certified_radius(s, gamma, 2 * lipschitz + 1, eps)
    assert (larger <= r).all() and (r <= greg.certified_radius(s, gamma, lipschitz)).all()


@pytest.mark.parametrize(
    "s, gamma, lipschitz, eps",
    [
        ([math.nan], 0.0, 1.0, 1.0),
        ([1.0], math.nan, 1.0, 1.0),
        ([1.0], 0.0, math.nan, 1.0),
        ([1.0], 0.0, -1.0, 1.0),
        ([1.0], 0.0, 1.0, -1.0),
        ([1.0], 0.0, 1.0, math.nan),
        ([1.0, math.inf], 0.0, math.inf, 1.0),
    ],
)
def test_radius_refuses_nan_and_negative_constants(s, gamma, lipschitz, eps):
    with pytest.raises(ValueError):
        greg.certified_radius(torch.tensor(s), gamma, lipschitz, eps)


# ------------------------------------------------------------------------- norms, layer by layer


@given(
    seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3),
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.integers(1, 2),
)  # fmt: skip
def test_conv_norm_bounds_the_dense_matrix_and_equals_the_circular_one(
    seed, c_in, c_out, k1, k2, s1, s2, p, d, groups
):
    hw, weight = (5, 4), randn(generator(seed), c_out * groups, c_in, k1, k2)
    if d * (max(k1, k2) - 1) + 1 > 4 + 2 * p:
        return
    options = {"stride": (s1, s2), "dilation": d, "groups": groups}

    def zero_padded(x):
        return torch.nn.functional.conv2d(x, weight, padding=p, **options)

    bound = greg.conv_norm(weight, hw, padding=p, **options)
    assert torch.linalg.matrix_norm(dense(zero_padded, (c_in * groups, *hw)), 2) <= bound

    def torus(n, k, s):  # the documented size
        return -(-(s if k == 1 else max(n + 2 * p, d * (k - 1) + 1)) // s) * s

    sizes = torus(hw[0], k1, s1), torus(hw[1], k2, s2)

    def circular(x):
        x = torch.nn.functional.pad(x, (0, d * (k2 - 1), 0, d * (k1 - 1)), mode="constant")
        for dim, (n, k) in enumerate(zip(sizes, (k1, k2), strict=True), start=2):
            extra = d * (k - 1)
            for i in range(extra):
                x.select(dim, n + i).copy_(x.select(dim, i % n))
        return torch.nn.functional.conv2d(x, weight, **options)

    exact = torch.linalg.matrix_norm(dense(circular, (c_in * groups, *sizes)), 2).item()
    assert bound == pytest.approx(exact, rel=1e-7)


def test_the_torus_of_the_image_size_is_no_upper_bound_for_zero_padding():
    weight = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 1, 1, 2)
    true = torch.linalg.matrix_norm(
        dense(lambda x: torch.nn.functional.conv2d(x, weight, padding=(0, 1)), (1, 1, 3)), 2
    )
    naive = torch.fft.fft(weight.flatten(), n=3).abs().max()
    assert naive < true - 0.1 and true <= greg.conv_norm(weight, (1, 3), padding=(0, 1))
    square = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)[None, None]
    true = torch.linalg.matrix_norm(
        dense(lambda x: torch.nn.functional.conv2d(x, square, padding=1), (1, 3, 3)), 2
    )
    assert torch.fft.fft2(square, s=(3, 3)).abs().max() < true
    assert true <= greg.conv_norm(square, 3, padding=1)


@given(seeds, st.floats(-10, 10), st.integers(1, 2))
def test_conv_norm_scales_with_the_kernel_and_is_the_largest_of_its_groups(seed, a, stride):
    w = randn(generator(seed), 4, 2, 3, 3)
    norm = greg.conv_norm(w, 4, stride, 1)
    assert greg.conv_norm(a * w, 4, stride, 1) == pytest.approx(abs(a) * norm, rel=1e-7, abs=1e-12)
    halves = [greg.conv_norm(v, 4, stride, 1) for v in (w[:2], w[2:])]
    assert greg.conv_norm(w, 4, stride, 1, groups=2) == pytest.approx(max(halves), rel=1e-7)
    assert norm <= math.hypot(*halves) * (1 + 1e-6)


def test_conv_norm_refuses_bad_weights():
    for w in torch.ones(2, 3, 3), torch.full((1, 1, 3, 3), math.nan), torch.ones(3, 1, 3, 3):
        with pytest.raises(ValueError):
            greg.conv_norm(w, 4, groups=2)


def rule(layers, shape):
    """The largest weight after the layers, as a bound on their Lipschitz constant."""
    net = nn.Sequential(*layers).double().eval()
    steps = greg._exact(net)
    w = torch.ones(shape[0], dtype=torch.float64)
    with torch.no_grad():
        return greg._propagate(steps, torch.zeros(1, *shape, dtype=torch.float64), w)[1]


@pytest.mark.parametrize(
    "make, exact",
    [
        (lambda: [nn.AdaptiveAvgPool2d(1)], True),
        (lambda: [nn.AvgPool2d(2)], True),
        (lambda: [nn.AvgPool2d(3, 2, 1)], False),
        (lambda: [nn.BatchNorm2d(2)], True),
        (lambda: [greg.Normalize((0.5, 0.4), (0.3, 0.7))], True),
        (lambda: [nn.Flatten()], True),
        (lambda: [greg.Residual(nn.Identity(), nn.Identity())], True),
        (lambda: [greg.Concat(nn.Identity())], True),
        (lambda: [greg.Residual(nn.Conv2d(2, 2, 3, padding=1), nn.Identity())], False),
        (lambda: [greg.Residual(nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1))], False),
        (lambda: [greg.Residual(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))], False),
        (lambda: [greg.Concat(nn.Conv2d(2, 3, 3, padding=1))], False),
        (lambda: [nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)], False),
        (lambda: [nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3, 2, 1)], False),
        (lambda: [nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3, padding=1, groups=2)], False),
        (lambda: [nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 5), nn.BatchNorm1d(5)], False),
    ],
)
def test_each_rule_bounds_the_dense_matrix_and_some_are_exact(make, exact):
    for seed in range(8):
        net = randomise(nn.Sequential(*make()), generator(seed))
        zero = net(torch.zeros(1, 2, 4, 4, dtype=torch.float64))
        matrix = dense(lambda x, net=net, zero=zero: net(x) - zero, (2, 4, 4)).detach()
        w = rule(net, (2, 4, 4))
        # The map over diag(w) is 1-Lipschitz, which is more than that max w bounds its norm.
        rows = w.repeat_interleave(len(matrix) // len(w)).clamp(min=1e-30)[:, None]
        norm = torch.linalg.matrix_norm(matrix / rows, 2).item()
        assert norm <= 1 + 1e-8
        assert not exact or norm == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("kernel, stride, bound", [(2, 2, 1), (3, 2, 2), (2, 1, 2), (3, 1, 3)])
def test_the_max_pool_rule_counts_the_windows_that_share_a_pixel(kernel, stride, bound):
    assert rule([nn.MaxPool2d(kernel, stride)], (1, 6, 6)).item() == pytest.approx(bound)
    spike = torch.zeros(1, 1, 6, 6)
    most = 0.0
    for i in range(36):
        spike.zero_().view(-1)[i] = 1
        most = max(most, nn.MaxPool2d(kernel, stride)(spike).norm().item())
    assert most == pytest.approx(bound)  # attained: one pixel wins them all


# ----------------------------------------------------------------------------------------- global


@given(nets, st.floats(-6, 3))
def test_global_constant_bounds_all_differences_and_gradients_of_s(drawn, exponent):
    net, shape, seed = drawn
    g = generator(seed + 1)
    lipschitz = greg.lipschitz_global(net, shape)
    x = randn(g, 30, *shape).requires_grad_()
    s = greg.energy_score(net(x))
    (gradient,) = torch.autograd.grad(s.sum(), x)
    assert gradient.flatten(1).norm(dim=1).max() <= lipschitz * (1 + 1e-9)
    y = x.detach() + 10**exponent * randn(g, 30, *shape)
    t, distance = scores(net, y), (y - x.detach()).flatten(1).norm(dim=1)
    assert ((t - s).abs() <= lipschitz * distance + tolerance(s, t)).all()


@given(seeds, st.integers(1, 4))
def test_global_constant_of_a_linear_net_is_its_longest_row_and_attained(seed, K):
    net = randomise(nn.Sequential(nn.Linear(4, K)), generator(seed))
    rows = net[0].weight.detach().norm(dim=1)
    lipschitz = greg.lipschitz_global(net, (4,))
    assert lipschitz == pytest.approx(rows.max().item(), rel=1e-8)
    best = net[0].weight[rows.argmax()].detach()
    far = (1e6 * best)[None].requires_grad_()  # there its logit dominates
    (g,) = torch.autograd.grad(greg.energy_score(net(far)).sum(), far)
    assert g.norm().item() == pytest.approx(lipschitz, rel=1e-6)


@given(nets)
def test_with_relus_removed_the_exact_constant_is_below_the_bound(drawn):
    net, shape, _ = drawn
    lipschitz = greg.lipschitz_global(net, shape)
    for m in net.modules():
        for name, child in m.named_children():
            if type(child) in (nn.ReLU, nn.LeakyReLU):
                setattr(m, name, nn.Identity().eval())
    if any(type(m) is nn.MaxPool2d for m in net.modules()):
        return
    A = greg.linear_region(net, torch.zeros(1, *shape)).A
    assert A.norm(dim=1).max() <= lipschitz * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("shape, make", [
    ((3, 32, 32), lambda: greg.wrn(10, 1, 10)),
    ((3, 64, 64), lambda: greg.Net(nn.Sequential(
        nn.Conv2d(3, 6, 7, 2, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        *greg._dense_blocks(6, (2, 2), 3)[0], *greg._pool(12)), 12, 5)),
])  # fmt: skip
def test_global_constant_covers_the_blocks_of_section_1(shape, make):
    net = randomise(make(), generator(0))
    x = randn(generator(1), 4, *shape).requires_grad_()
    (g,) = torch.autograd.grad(greg.energy_score(net(x)).sum(), x)
    assert g.flatten(1).norm(dim=1).max() <= greg.lipschitz_global(net, shape) < math.inf


# ---------------------------------------------------------------------------------- linear region


def pattern(net, x, tops=None):
    """What may not change its sign in the linear region, from hooks and the modules' inputs.

    tops: the max-pools' winners so far; found here if the list is empty, else held.
    """
    found, handles, tops = [], [], [] if tops is None else tops
    held = iter(list(tops))

    def hook(m, args, _):
        v = args[0]
        if type(m) is nn.MaxPool2d:
            p = m.padding
            pad = torch.nn.functional.pad(v, (p, p, p, p), value=-1e300)
            k, s = m.kernel_size, m.stride
            w = pad.unfold(2, k, s).unfold(3, k, s).flatten(4)
            top = next(held, None)
            if top is None:
                top = w.argmax(4, keepdim=True)
                tops.append(top)
            v = w.gather(4, top) - w
            v = v.masked_fill(torch.zeros_like(v).scatter(4, top, 1).bool(), 1e300)
        found.append(v.flatten(1))

    for m in net.modules():
        if type(m) in (nn.ReLU, nn.LeakyReLU, nn.MaxPool2d):
            handles.append(m.register_forward_hook(hook))
    net(x)
    for h in handles:
        h.remove()
    return torch.cat(found, 1) if found else x.new_zeros(len(x), 0)


@given(nets)
def test_region_is_where_f_is_affine_and_its_radius_that_of_an_independent_oracle(drawn):
    net, shape, seed = drawn
    g = generator(seed + 2)
    x = randn(g, 1, *shape)
    z, A, eps_hat = greg.linear_region(net, x, chunk=7)
    assert torch.allclose(z, net(x)[0].detach(), rtol=0, atol=tolerance(z))
    p = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(greg.energy_score(net(p)).sum(), p)
    assert torch.allclose(-(z.softmax(0) @ A), gradient.flatten(), rtol=0, atol=tolerance(A))
    tops = []
    v = pattern(net, x, tops)[0].detach()
    if not len(v):
        assert eps_hat == math.inf
        return
    J = torch.autograd.functional.jacobian(lambda y: pattern(net, y)[0], x).flatten(1)
    size = J.norm(dim=1)
    ratio = torch.where(size > 1e-12, v.abs() / size, math.inf)
    assert eps_hat == pytest.approx(ratio.min().item(), rel=1e-6)
    if not 1e-6 < eps_hat < 1e6:
        return
    for u in around(net, x, eps_hat * (1 - 1e-6), g) - x:
        assert torch.allclose(net(x + u)[0], z + A @ u.flatten(), rtol=0, atol=tolerance(z))
    j = ratio.argmin()
    out = x - (eps_hat * (1 + 1e-4) * v[j].sign() * J[j] / size[j]).view_as(x)
    inside = x + (out - x) * (1 - 2e-4)  # some neuron changes its sign just outside, none inside
    assert (pattern(net, out, tops)[0] * v < 0).any()
    assert not (pattern(net, inside, tops)[0] * v < 0).any()


def test_region_takes_one_input_with_or_without_a_batch_dimension():
    net = conv_net("crMl", 0)
    x = randn(generator(1), 2, 5, 5)
    assert greg.linear_region(net, x).eps_hat == greg.linear_region(net, x[None]).eps_hat
    with pytest.raises(ValueError):
        greg.linear_region(net, torch.stack([x, x]))


@given(seeds, st.integers(1, 4), st.integers(1, 3), st.floats(-2, 2))
def test_radii_of_the_affine_map_are_sound_and_the_dual_is_the_exact_id_distance(seed, K, D, shift):
    g, shift = generator(seed), round(shift, 3)
    z, A = randn(g, K), randn(g, K, D)
    s = -torch.logsumexp(z, 0).item()
    gamma = s + shift
    radius = greg.id_radius(z, A, gamma) if shift >= 0 else greg.ood_radius(z, A, gamma)
    u = randn(g, 500, D)
    u = torch.cat([u, A, -A, (z.softmax(0) @ A)[None], -(z.softmax(0) @ A)[None]])
    u = u / u.norm(dim=1, keepdim=True).clamp(min=1e-30)

    def worst(r):
        t = -torch.logsumexp(z + r * u @ A.T, 1)
        return (t.max() - gamma if shift >= 0 else gamma - t.min()).item()

    assert worst(min(radius, 1e3)) <= 1e-9 * (1 + abs(gamma))
    m, norm = abs(shift), (z.softmax(0) @ A).norm().item()
    if shift < 0:
        assert greg.id_radius(z, A, gamma) == 0
        assert radius >= m / A.norm(dim=1).max().item() * (1 - 1e-9)
    elif shift > 0:
        assert greg.ood_radius(z, A, gamma) == 0
        assert radius == pytest.approx(m / norm, rel=1e-9)
        best = greg.id_radius(z, A, gamma, steps=40)
        assert best >= radius and worst(min(best, 1e3)) <= 1e-9 * (1 + abs(gamma))


def test_the_dual_reaches_the_exact_distance_on_a_line():
    A, z, gamma = torch.tensor([[1.0], [-2.0]]).double(), torch.tensor([2.0, 0.0]).double(), -2.05
    u = torch.linspace(-5, 5, 2_000_001, dtype=torch.float64)
    s = -torch.logsumexp(z + u[:, None] * A.T, 1)
    exact = u[s > gamma].abs().min().item()
    assert greg.id_radius(z, A, gamma) < 0.99 * exact
    assert 0.999 * exact < greg.id_radius(z, A, gamma, steps=500) <= exact + 1e-5


def test_the_gradient_norm_certifies_no_ood_sample():
    A, z = torch.tensor([[3.0], [-3.0]]), torch.zeros(2)
    s, gamma = -math.log(2), -2.0
    assert (z.softmax(0) @ A).norm() == 0  # so the paper's radius is infinite on the OOD side,
    t = -torch.logsumexp(z + torch.tensor([[0.7]]) @ A.T, 1).item()
    assert s > gamma > t  # and S is below γ at u = 0.7 already
    exact = math.acosh(math.exp(-gamma) / 2) / 3
    assert 0.4 * exact < greg.ood_radius(z, A, gamma) <= exact


@given(seeds, st.integers(2, 4))
def test_ood_radius_is_the_exact_root_where_all_rows_are_alike(seed, K):
    g = generator(seed)
    row, z = randn(g, 1, 3), randn(g, K)
    m = 1.5
    radius = greg.ood_radius(z, row.expand(K, 3), -torch.logsumexp(z, 0).item() - m)
    assert radius == pytest.approx(m / row.norm().item(), rel=1e-9)


# ------------------------------------------------------------------------------------------ local


@given(seeds, st.floats(0, 2), st.sampled_from(["relu", "leaky", "pool", "pool3"]))
def test_interval_rules_contain_values_and_vector_jacobian_products(seed, size, kind):
    g = generator(seed)
    m = {"relu": nn.ReLU(), "leaky": nn.LeakyReLU(0.3), "pool": nn.MaxPool2d(2)}.get(kind)
    m = m or nn.MaxPool2d(3, 2, 1)
    c, r = randn(g, 1, 2, 4, 4).requires_grad_(), (size * randn(g, 1, 2, 4, 4).abs())
    r.requires_grad_()
    out_c, out_r = greg._box([m], c, r)
    v_c, v_r = randn(g, *out_c.shape), randn(g, *out_c.shape).abs() * uniform(g, 0, 1)
    g_c, g_r = torch.autograd.grad((out_c, out_r), (c, r), (v_c, v_r))
    reached_low, reached_high = out_c.detach() + 1e9, out_c.detach() - 1e9
    for i in range(40):
        t = torch.rand(c.shape, generator=g, dtype=torch.float64) * 2 - 1
        t = t.sign() if i % 2 else t
        x = (c + t * r).detach().requires_grad_()
        y = m(x)
        assert ((y - out_c).abs() <= out_r + 1e-12).all()
        w = torch.rand(v_c.shape, generator=g, dtype=torch.float64) * 2 - 1
        (back,) = torch.autograd.grad(y, x, v_c + (w.sign() if i % 3 else w) * v_r)
        assert ((back - g_c).abs() <= g_r + 1e-12).all()
        reached_low, reached_high = reached_low.minimum(y), reached_high.maximum(y)
    for t in -1, 1:  # monotone layers: the corners attain the bounds
        y = m(c + t * r)
        assert torch.allclose(y, out_c + t * out_r, rtol=0, atol=1e-12)


def test_the_derivative_interval_of_a_kink_is_attained_at_both_ends():
    c, r = torch.tensor([[0.0, 2.0, -2.0]]).double(), torch.ones(1, 3).double()
    c.requires_grad_(), r.requires_grad_()
    out = greg._box([nn.LeakyReLU(0.25)], c, r)
    one = torch.ones(1, 3).double()
    g_c, g_r = torch.autograd.grad(out, (c, r), (one, 0 * one))
    assert (g_c - g_r).tolist() == [[0.25, 1, 0.25]] and (g_c + g_r).tolist() == [[1, 1, 0.25]]


@given(seeds, st.integers(1, 4))
def test_softmax_bounds_contain_the_box_and_are_attained(seed, K):
    g = generator(seed)
    low = randn(g, 1, K) * 3
    high = low + randn(g, 1, K).abs()
    a, b = greg._softmax_bounds(low, high)
    for _ in range(20):
        z = low + (high - low) * torch.rand(1, K, generator=g, dtype=torch.float64)
        p = z.softmax(1)
        assert (a - 1e-12 <= p).all() and (p <= b + 1e-12).all()
    for i in range(K):
        corner = high.clone()
        corner[0, i] = low[0, i]
        assert corner.softmax(1)[0, i].item() == pytest.approx(a[0, i].item(), abs=1e-12)
        corner = low.clone()
        corner[0, i] = high[0, i]
        assert corner.softmax(1)[0, i].item() == pytest.approx(b[0, i].item(), abs=1e-12)


@given(nets, st.floats(-4, 0.5))
def test_local_constant_bounds_gradients_and_differences_on_the_ball_and_grows(drawn, exponent):
    net, shape, seed = drawn
    g, eps = generator(seed + 3), 10**exponent
    x = randn(g, 1, *shape)
    lipschitz = greg.lipschitz_local(net, x, eps).item()
    near = around(net, x, eps, g).requires_grad_()
    s = greg.energy_score(net(near))
    (gradient,) = torch.autograd.grad(s.sum(), near)
    assert gradient.flatten(1).norm(dim=1).max() <= lipschitz * (1 + 1e-9) + 1e-12
    distance = (near - x).detach().flatten(1).norm(dim=1)
    assert ((s - s[0]).abs() <= lipschitz * distance + tolerance(s)).all()
    assert lipschitz <= greg.lipschitz_local(net, x, 2 * eps).item() * (1 + 1e-9)
    low, high = greg.score_bounds(net, x, eps, greg.lipschitz_global(net, shape))
    assert (low - tolerance(s) <= s).all() and (s <= high + tolerance(s)).all()


@given(nets)
def test_local_constant_tends_to_the_gradient_norm(drawn):
    net, shape, seed = drawn
    x = randn(generator(seed + 4), 1, *shape)
    if greg.linear_region(net, x).eps_hat < 1e-4:
        return
    p = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(greg.energy_score(net(p)).sum(), p)
    lipschitz = greg.lipschitz_local(net, x, 1e-12).item()
    assert lipschitz == pytest.approx(gradient.norm().item(), rel=1e-5, abs=1e-9)


@given(seeds, st.floats(0.01, 3), st.booleans())
def test_the_box_of_the_first_layer_is_exact_for_the_ball(seed, eps, normalised):
    g = generator(seed)
    head = [greg.Normalize((0.1, 0.2), (0.5, 0.8))] if normalised else []
    relu_off = nn.Conv2d(2, 3, 3, padding=1)  # one unit at a time is at the edge of switching on
    net = randomise(
        nn.Sequential(*head, relu_off, nn.ReLU(), nn.Flatten(), nn.Linear(48, 1)), generator(seed)
    )
    x = randn(g, 1, 2, 4, 4)
    pre = nn.Sequential(*head, net[len(head)])
    J = torch.autograd.functional.jacobian(lambda y: pre(y)[0].flatten(), x).flatten(1)
    j = int(uniform(g, 0, 48))
    for factor in 1 - 1e-6, 1 + 1e-6:  # the unit's upper end just below, just above zero
        relu = net[len(head)]
        value = pre(x).flatten()[j].item()
        with torch.no_grad():
            relu.bias -= value + eps * factor * J[j].norm().item()
        net[-1].weight.data.zero_()
        net[-1].weight.data[0, j] = 1.0
        lipschitz = greg.lipschitz_local(net, x, eps).item()
        assert lipschitz == pytest.approx(0 if factor > 1 else J[j].norm().item(), rel=1e-6)


def test_local_constants_of_a_batch_are_those_of_its_rows():
    net, x = conv_net("crDmP", 3), randn(generator(5), 4, 2, 5, 5)
    eps = torch.tensor([0.0, 0.01, 0.1, 1.0], dtype=torch.float64)
    together = greg.lipschitz_local(net, x, eps)
    alone = torch.cat([greg.lipschitz_local(net, x[i : i + 1], eps[i]) for i in range(4)])
    assert torch.allclose(together, alone, rtol=1e-9)
    with pytest.raises(ValueError):
        greg.lipschitz_local(net, x, -1.0)


# ----------------------------------------------------------------- all together, and the refusals


@given(nets, st.floats(-2, 2))
def test_certified_radius_is_below_the_attack_distance_and_no_sample_in_it_flips(drawn, shift):
    net, shape, seed = drawn
    g = generator(seed + 5)
    x = randn(g, 3, *shape)
    gamma = scores(net, x).mean().item() + shift
    found = greg.certify(net, x, gamma, id_steps=5)
    s = scores(net, x)
    assert found.side == ["ID" if v <= gamma else "OOD" for v in s.tolist()]
    distance = greg.attack_distance(net, x, gamma, 3.0, rounds=2, steps=4, generator=g)
    for i, (radius, name) in enumerate(zip(found.radius.tolist(), found.bound, strict=True)):
        assert radius == max(r[i].item() for r in found.radii.values())
        assert radius == found.radii[name][i] and radius <= distance[i] + 1e-12
        if 1e-9 < radius < math.inf and abs(s[i] - gamma) > 1e-6:
            near = scores(net, around(net, x[i : i + 1], radius, g))
            assert ((near <= gamma) == (s[i] <= gamma)).all()


def test_the_local_radius_spends_exactly_the_margin_where_the_constant_is_flat():
    net = randomise(nn.Sequential(nn.Linear(3, 1)), generator(0))  # K = 1: S is affine
    x, gamma = randn(generator(1), 4, 3), 0.3
    exact = (scores(net, x) - gamma).abs() / net[0].weight.norm().item()
    for name, r in greg.certify(net, x, gamma).radii.items():
        assert torch.allclose(r, exact, rtol=1e-6), name


def test_guaranteed_auroc_is_below_the_attacked_and_that_below_the_clean_one():
    net, g = mlp("LrL", 4, d=4), generator(6)
    s_in, x_out = scores(net, randn(g, 60, 4)), 1 + randn(g, 60, 4)
    s_out = scores(net, x_out)
    before = greg.auroc(s_in, s_out)
    for eps in 0.01, 0.1, 0.5:
        low, _ = greg.score_bounds(net, x_out, eps, greg.lipschitz_global(net, (4,)))
        near, attacked = greg.attack_scores(net, x_out, eps, -1, generator=g)
        assert (low <= attacked).all() and (attacked <= s_out).all()
        assert torch.equal(scores(net, near), attacked)
        found = greg.auroc(s_in, low), greg.auroc(s_in, attacked), greg.auroc(s_in, s_out)
        assert found[0] <= found[1] <= found[2] and found[1] <= before
        rates = [greg.fpr_at_tpr(s_in, v) for v in (low, attacked, s_out)]
        assert rates[0] >= rates[1] >= rates[2]
        before = found[1] + 0.05


def test_a_float32_network_gets_the_certificates_of_its_float64_copy():
    net = conv_net("cbrRm", 7).float()
    x = randn(generator(8), 3, 2, 5, 5).float()
    gamma = scores(net, x).mean().item()
    a, b = greg.certify(net, x, gamma), greg.certify(net.double(), x.double(), gamma)
    assert torch.allclose(a.radius, b.radius, rtol=1e-9) and a.radius.dtype == torch.float64
    assert next(net.parameters()).dtype == torch.float64 and not net.training
    a = greg.attack(net.float(), x, gamma, 1.0, generator=generator(1))
    t = scores(net.double(), a.x.double())
    assert ((t > gamma) == (scores(net, x.double()) > gamma))[~a.flipped].all()
    assert torch.allclose(t, a.s.double(), atol=1e-4)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


REFUSED = {
    "gelu": nn.GELU(), "sigmoid": nn.Sigmoid(), "softmax": nn.Softmax(1), "subclass": Doubled(2, 2),
    "slope": nn.LeakyReLU(2.0), "circular": nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
    "same": nn.Conv2d(2, 2, 3, padding="same"), "batch statistics": nn.BatchNorm2d(
        2, track_running_stats=False), "group norm": nn.GroupNorm(1, 2),
    "dilated pool": nn.MaxPool2d(2, 1, dilation=2), "ceil": nn.AvgPool2d(2, ceil_mode=True),
    "border": nn.AvgPool2d(2, padding=1, count_include_pad=False), "grid": nn.AdaptiveAvgPool2d(2),
    "end": nn.Flatten(2), "negative slope": nn.LeakyReLU(-0.1),
    "ceil max": nn.MaxPool2d(2, ceil_mode=True), "divisor": nn.AvgPool2d(2, divisor_override=1),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("deep", [False, True])
def test_what_has_no_rule_is_refused(name, deep):
    m = REFUSED[name]
    net = nn.Sequential(greg.Residual(nn.Sequential(m), nn.Identity()) if deep else m).eval()
    x = torch.zeros(1, 2, 4, 4)
    for certificate in (
        lambda: greg.lipschitz_global(net, (2, 4, 4)),
        lambda: greg.linear_region(net, x),
        lambda: greg.lipschitz_local(net, x, 0.1),
        lambda: greg.certify(net, x, 0.0, lipschitz=1.0),
    ):
        with pytest.raises(NotImplementedError):
            certificate()


def test_a_module_that_occurs_twice_is_two_layers_and_an_unused_one_is_none():
    relu, twice = nn.ReLU(), randomise(nn.Linear(3, 3), generator(2))
    chain = nn.Sequential(twice, relu, twice, relu, nn.Linear(3, 2))
    net = randomise(greg.Net(chain, 2, 4), generator(0)).double()
    net.extra = nn.Linear(5, 5).eval()
    x, g = randn(generator(1), 20, 3), generator(3)
    torch.testing.assert_close(greg._exact_scores(net, x), scores(net, x))
    gamma = scores(net, x).median().item() + 1e-3
    found, distance = greg.certify(net, x, gamma), greg.attack_distance(net, x, gamma, 3.0)
    assert (found.radius <= distance).all() and distance.isfinite().any()
    lipschitz = greg.lipschitz_global(net, (3,))
    near = around(net, x[:1], 0.5, g)
    assert ((scores(net, near) - scores(net, x[:1])).abs() <= 0.5 * lipschitz).all()
    body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))
    with pytest.raises(NotImplementedError):  # in place, it overwrites the shortcut's input
        greg.lipschitz_global(nn.Sequential(greg.Residual(body, nn.Identity())).eval(), (3,))


def test_inputs_that_are_not_finite_get_no_certificate():
    net, x = mlp("LrL", 0, d=3), torch.tensor([[0.0, math.nan, 0.0]])
    z, A = torch.zeros(2), torch.eye(2)
    for call in (
        lambda: greg.linear_region(net, x),
        lambda: greg.linear_region(net, x.nan_to_num(math.inf)),
        lambda: greg.lipschitz_local(net, x, 0.1),
        lambda: greg.certify(net, x, 0.0),
        lambda: greg.id_radius(z * math.nan, A, 0.0),
        lambda: greg.ood_radius(z, A * math.nan, -9.0),
        lambda: greg.ood_radius(z, A, math.nan),
        lambda: greg.score_bounds(net, x.nan_to_num(0.0), 0.1, -1.0),
        lambda: greg.smoothed_radius(torch.zeros(1, 5), math.nan, 1.0),
        lambda: greg.smoothed_radius(torch.zeros(1, 5), 0.0, -1.0),
    ):
        with pytest.raises(ValueError):
            call()


def test_certificates_and_attacks_need_no_gradient_mode_and_attacks_eval_mode():
    net, x = mlp("LrL", 0, d=3), randn(generator(0), 5, 3)
    with torch.no_grad():
        inside = greg.certify(net, x, 0.0), greg.attack(net, x, 0.0, 1.0, generator=generator(1))
    outside = greg.certify(net, x, 0.0), greg.attack(net, x, 0.0, 1.0, generator=generator(1))
    assert torch.equal(inside[0].radius, outside[0].radius)
    assert torch.equal(inside[1].x, outside[1].x)
    with pytest.raises(ValueError, match="eval mode"):
        greg.attack(nn.Sequential(net, nn.Dropout()).train(), x, 0.0, 1.0)


def test_training_mode_hooks_and_broken_weights_are_refused():
    x = torch.zeros(1, 2, 5, 5)
    for certificate in (
        lambda net: greg.lipschitz_global(net, (2, 5, 5)),
        lambda net: greg.linear_region(net, x),
        lambda net: greg.lipschitz_local(net, x, 0.1),
        lambda net: greg.certify(net, x, 0.0),
    ):
        net = conv_net("cbr", 0)
        net.features[1].train()
        with pytest.raises(ValueError, match="eval"):
            certificate(net)
        net.eval().features[0].weight.data[0] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            certificate(net)
        net = conv_net("cbr", 0)
        net.features[2].register_forward_hook(lambda m, args, out: 2 * out)
        with pytest.raises(NotImplementedError):
            certificate(net)
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Linear(5, 5)).eval()
    for certificate in (
        lambda: greg.lipschitz_global(net, (2, 5, 5)),
        lambda: greg.linear_region(net, x),
        lambda: greg.lipschitz_local(net, x, 0.1),
    ):
        with pytest.raises((ValueError, NotImplementedError)):
            certificate()


# -------------------------------------------------------------------------------------- smoothing


@given(st.integers(1, 40), st.floats(0.001, 0.3), st.floats(0.01, 0.99))
def test_clopper_pearson_covers_by_enumeration_of_all_counts(n, alpha, p):
    k = torch.arange(n + 1)
    low = greg._binomial_lower(k, n, alpha)
    assert low[0] == 0 and (low.diff() > 0).all() and (low <= k / n).all()
    chance = [math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)]
    assert (
        sum(c for c, bound in zip(chance, low.tolist(), strict=True) if bound > p) <= alpha + 1e-9
    )
    assert low[-1].item() == pytest.approx(alpha ** (1 / n), rel=2e-9)
    for i in range(1, n + 1):  # the bound is where the tail is alpha
        q = low[i].item()
        tail = sum(math.comb(n, j) * q**j * (1 - q) ** (n - j) for j in range(i, n + 1))
        assert tail == pytest.approx(alpha, rel=1e-6)


@given(st.integers(2, 60), st.floats(0.01, 0.3), st.floats(0.02, 0.98))
def test_a_smoothed_radius_is_too_large_with_probability_at_most_alpha(n, alpha, p):
    s = torch.ones(n + 1, n)
    for k in range(n + 1):
        s[k, :k] = -1
    signed = greg.smoothed_radius(s, 0.0, 1.0, alpha)
    true = -torch.special.ndtri(torch.tensor(p, dtype=torch.float64)).item()  # ID iff p > 1/2
    chance = [math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)]
    wrong = [r < min(true, 0) - 1e-9 or r > max(true, 0) + 1e-9 for r in signed.tolist()]
    assert sum(c for c, w in zip(chance, wrong, strict=True) if w) <= alpha + 1e-9
    assert (signed.diff() <= 0).all() and torch.allclose(signed, -signed.flip(0))
    assert torch.allclose(greg.smoothed_radius(s, 0.0, 2.0, alpha), 2 * signed)


def test_smoothing_of_a_linear_score_finds_its_margin():
    def score(x):
        return x @ torch.tensor([3.0, -4.0]).to(x)

    x, sigma = torch.tensor([[0.02, 0.0], [-0.03, 0.01], [0.0, 0.0], [5.0, 0.0]]), 0.1
    r = greg.smoothing_radius(score, x, 0.0, sigma, 20000, 0.001, generator(0))
    exact = score(x) / 5
    assert (r[:2].abs() <= exact[:2].abs()).all() and (r[:2].sign() == exact[:2].sign()).all()
    assert torch.allclose(r[:2].float(), exact[:2], atol=0.006)
    assert r[2] == 0 and 0.3 < r[3] < 0.5  # capped by n: every draw agreed
    s = greg.noisy_scores(score, x, sigma, 100, generator(1), chunk=9)
    assert s.shape == (4, 100)
    for bad in 0.0, 1.0:
        with pytest.raises(ValueError):
            greg.smoothed_radius(s, 0.0, sigma, bad)
    with pytest.raises(ValueError):
        greg.smoothed_radius(s * math.nan, 0.0, sigma)


# ---------------------------------------------------------------------------------------- attacks


@given(nets, st.sampled_from(["l2", "linf"]), st.floats(0.01, 1), st.booleans())
def test_attacks_return_only_verified_flips_within_the_ball(drawn, norm, eps, clamp):
    net, shape, seed = drawn
    net = net.float()
    g = generator(seed + 6)
    x = torch.rand(4, *shape, generator=g)
    s = scores(net, x)
    gamma = s.mean().item()
    clamp = (0.0, 1.0) if clamp else None
    found = greg.attack(net, x, gamma, eps, norm, steps=4, clamp=clamp, generator=g)
    again, distance = scores(net, found.x), (found.x - x).flatten(1).double()
    distance = distance.norm(dim=1) if norm == "l2" else distance.abs().amax(1)
    assert torch.equal(found.s, again) and (distance <= eps).all()
    assert torch.equal(found.flipped, (again > gamma) != (s > gamma))
    assert torch.equal(found.distance, torch.where(found.flipped, distance, math.inf))
    assert clamp is None or (found.x.min() >= 0 and found.x.max() <= 1)
    assert (torch.where(s > gamma, s - again, again - s) >= 0).all()
    smallest = greg.attack_distance(net, x, gamma, eps, 3, norm, steps=4, generator=generator(seed))
    assert ((smallest <= eps) | smallest.isinf()).all()


def test_attack_distance_of_an_affine_score_is_its_margin_in_both_norms():
    net = randomise(nn.Sequential(nn.Linear(3, 1)), generator(0))
    x, gamma = randn(generator(1), 5, 3), 0.3
    w, margin = net[0].weight.detach(), (scores(net, x) - 0.3).abs()
    for norm, dual in ("l2", w.norm()), ("linf", w.abs().sum()):
        exact = margin / dual
        found = greg.attack_distance(net, x, gamma, 20.0, 20, norm, generator=generator(2))
        assert (found >= exact * (1 - 1e-9)).all() and torch.allclose(found, exact, rtol=0.01)
        assert greg.attack_distance(net, x, gamma, exact.min().item() / 2, norm=norm).isinf().all()
    for norm, dual in ("l2", w.norm()), ("linf", w.abs().sum()):  # no strength lost to rounding
        y, t = x.float(), scores(net.float(), x.float())
        worst = greg.attack_scores(net, y, 0.01, 1, norm, steps=5)[1]
        assert (worst - t >= 0.995 * 0.01 * dual).all()
    for bad in {"norm": "l1"}, {"steps": 0}, {"restarts": 0}:
        with pytest.raises(ValueError):
            greg.attack(net, y, gamma, 1.0, **bad)


def test_the_report_orders_clean_attacked_and_certified_metrics(tmp_path):
    net, g = mlp("LrL", 4, d=4), generator(0)
    sets = {"near": 0.5 + randn(g, 40, 4), "far": 3 + randn(g, 40, 4)}
    report = greg.certify_report(net, randn(g, 40, 4), sets, (0.05, 0.3), 0.2, 100, clamp=None)
    for results in report["sets"].values():
        rows = results["rows"]
        clean = rows[0.0]["attacked"]
        for eps in 0.05, 0.3:
            attacked, certified = rows[eps]["attacked"], rows[eps]["certified"]
            assert clean["fpr95"] <= attacked["fpr95"] <= certified["fpr95"]
            assert clean["auroc"] >= attacked["auroc"] >= certified["auroc"]
        assert rows[0.05]["smoothed"]["fpr95"] <= rows[0.3]["smoothed"]["fpr95"]
    assert report["id_rejected"][0.05] <= report["id_rejected"][0.3] + 0.05
    text = greg.certify_table(report)
    assert "| near | 0.05 |" in text and "nan" not in text
    greg.certify_figure(report, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_figure_1_draws_both_nets_and_no_attack_is_inside_a_certified_ball(tmp_path):
    results = greg.figure_1(tmp_path / "figure_1.png", steps=60, points=5)
    assert len(results) == 2 and (tmp_path / "figure_1.png").stat().st_size > 5000
    for row in results.values():
        ratios = [
            v for k, v in row.items() if k.split()[-1] in ("global", "local", "region", "best")
        ]
        assert len(ratios) == 8 and all(v >= 1 or math.isnan(v) for v in ratios)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def toy_head(K, d, seed=0):
    """A network of features and fc alone: x [N,3,2,2] -> h = relu(A x), in float64."""
    net = greg.Net(nn.Sequential(nn.Flatten(), nn.Linear(12, d), nn.ReLU()), d, K).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(noise(*p.shape, seed=seed + i))
    return net.eval()


def fitted(K=4, d=6, seed=0, n=60, **hyper):
    net = toy_head(K, d, seed)
    z = net.features(noise(n, 3, 2, 2, seed=seed + 50)).detach()
    y = torch.arange(n) % K
    return net, z, y, greg.fit_scores(net, z, y, greg.PostHoc(**hyper))


def row_score(name, net, x, fit=None):
    z = net.features(x).detach()
    return greg.SCORES[name](net, x, net.fc(z).detach(), z, fit).detach()


class FakeTrainer:
    """A trainer's part that pools see: features that are given, logits equal to them."""

    def __init__(self, z_in, z_aux):
        self.train_set, self.aux_set, self.memory = z_in, z_aux, {}
        self.net = SimpleNamespace(fc=nn.Linear(z_in.shape[1], 2))

    def embed_images(self, images, i=None):
        z = images if i is None else images[i]
        return z, z


@pytest.mark.parametrize("score", ["msp", "absent", "energy_score"])
def test_scores_of_half_precision_logits_are_computed_in_float32(score):
    f = (5 * noise(50, 10)).bfloat16()
    s = getattr(greg, score)(f)
    assert s.dtype == torch.float32
    assert torch.equal(s, getattr(greg, score)(f.float()))


def test_odin_moves_pixels_without_gradient_down_by_a_full_step():
    seen = []

    class Blind(nn.Module):
        def forward(self, x):
            seen.append(x.detach().clone())
            return x[:, 0, 0, :1] * torch.tensor([1.0, -1.0])

    x = torch.ones(1, 3, 2, 2)
    greg.odin(Blind(), x, T=1.0, eps=0.1, std=(0.1, 0.2, 0.4))
    step = seen[1] - x
    assert step[0, 0, 0, 0] == pytest.approx(1.0)  # the pixel that counts goes up
    assert step[0, 1].eq(-0.5).all() and step[0, 2].eq(-0.25).all()  # sign(0) = +1


def test_odin_leaves_no_trace_in_network_or_images():
    net, x = toy_head(4, 6), noise(5, 3, 2, 2)
    before = x.clone()
    with torch.no_grad():
        s = greg.odin(net, x)
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(x, before) and not x.requires_grad and not s.requires_grad


@given(seeds, st.integers(1, 7))
@settings(max_examples=10)
def test_no_score_depends_on_how_images_are_batched(seed, split):
    net, _, _, fit = fitted(seed=seed)
    x = noise(8, 3, 2, 2, seed=seed + 9)
    for name in greg.SCORES:
        s = row_score(name, net, x, fit)
        parts = [row_score(name, net, part, fit) for part in x.split(split)]
        assert s.shape == (8,) and s.isfinite().all()
        assert torch.allclose(s, torch.cat(parts), rtol=1e-9, atol=1e-12), name


def test_low_means_id_for_every_score():
    """A head that is sure of large features: scaling the features down raises every score."""
    net, z, y, _ = fitted(K=4, d=6)
    with torch.no_grad():
        net.features = nn.Flatten()
        net.fc = nn.Linear(6, 4).double()
        net.fc.weight.copy_(torch.tensor(np.eye(4, 6)))
        net.fc.bias.zero_()
    x_in = 5 * torch.tensor(np.eye(4, 6))[torch.arange(40) % 4] + 0.1
    hyper = greg.PostHoc(T=10.0, react_p=100.0, dice_p=50.0, line_w=50.0, line_clip=10.0)
    fit = greg.fit_scores(net, x_in, torch.arange(40) % 4, hyper)
    for name in greg.POST_HOC_ROWS:
        assert (row_score(name, net, x_in, fit) < row_score(name, net, 0.1 * x_in, fit)).all(), name


def test_a_fixed_clip_of_react_replaces_its_percentile():
    net, z, y, _ = fitted()
    net.features = nn.Flatten()
    z = z.abs()
    for hyper, clip in (
        (greg.PostHoc(react_p=100.0), z.max()),
        (greg.PostHoc(react_clip=0.3), 0.3),
    ):
        s = row_score("react", net, z, greg.fit_scores(net, z, y, hyper))
        assert torch.allclose(s, greg.energy_score(net.fc(z.clamp(max=clip))))


def test_fitting_refuses_features_that_are_not_finite():
    net, z, y, _ = fitted()
    z[3, 2] = math.nan
    with pytest.raises(ValueError, match="finite"):
        greg.fit_scores(net, z, y, greg.PostHoc())


def test_an_absent_class_does_not_change_the_post_hoc_scores_of_the_others():
    net, z, y, fit = fitted(K=4)
    more = greg.Net(net.features, 6, 5).double()
    with torch.no_grad():
        more.fc.weight[:4], more.fc.bias[:4] = net.fc.weight, net.fc.bias
    fit_more = greg.fit_scores(more, z, y, greg.PostHoc(), K=4)
    x = noise(8, 3, 2, 2, seed=9)
    for name in "react", "dice", "dice+react", "line":
        assert torch.allclose(row_score(name, more, x, fit_more), row_score(name, net, x, fit))


def test_hyper_parameters_go_by_data_and_network_and_else_by_class_count():
    assert greg.post_hoc("cifar10", "densenet100", 10).eps == 0.0014
    assert greg.post_hoc("cifar10", "wrn40_2", 10).eps == 0.0006
    assert greg.post_hoc("cifar100", "densenet100", 100).line_a == 10
    assert greg.post_hoc("cifar100", "densenet100", 100).react_clip == 1
    assert greg.post_hoc("mine.npz", "densenet100", 100).line_a == 10
    assert greg.post_hoc("mine.npz", "wrn40_2", 7) == greg.POST_HOC["cifar10", "wrn40_2"]
    assert greg.post_hoc("imagenet", "densenet121", 10).line_clip == 0.8


@given(seeds, st.floats(0, 99))
def test_pruning_weights_never_raises_the_bound_from_absolute_values(seed, p):
    """‖W ⊙ M‖₂ <= ‖|W|‖₂ and ‖W ⊙ M‖_F <= ‖W‖_F for every mask, DICE's among them."""
    W, m = noise(5, 8, seed=seed), noise(8, seed=seed + 1).abs()
    masked = W * greg.dice_mask(m, W, p)
    for weights, kind in ((W.abs(), 2), (W, "fro")):
        norm = torch.linalg.matrix_norm(weights, kind)
        assert torch.linalg.matrix_norm(masked, kind) <= norm * (1 + 1e-12)


def test_openmix_mixes_equal_indices_by_a_beta_10_10_share():
    from scipy.stats import beta, kstest

    x_in, x_aux, g = noise(3, 4), noise(3, 4, seed=1), generator(0)
    shares = []
    for _ in range(2000):
        x, context = greg.mix(None, x_in, x_aux, g)
        shares.append(context["lam"].item())
        assert torch.allclose(x, x_aux + shares[-1] * (x_in - x_aux))
    assert kstest(shares, beta(10, 10).cdf).pvalue > 0.01


def test_balanced_energy_is_finite_where_all_outliers_are_of_a_class_of_prior_zero():
    f = torch.zeros(4, 3)
    f[:, 1] = 200
    f.requires_grad_()
    loss = greg.balanced_energy_loss(torch.zeros(4, 3), f, None, torch.tensor([1.0, 0.0, 0.0]))
    (g,) = torch.autograd.grad(loss, f)
    assert loss.isfinite() and g.isfinite().all()


def test_poem_refuses_sums_in_single_precision():
    with pytest.raises(ValueError, match="float64"):
        greg.poem_posterior(torch.eye(3), torch.zeros(3))


@given(seeds, st.integers(5, 40), st.integers(1, 60))
@settings(max_examples=15)
def test_poem_pools_are_the_nearest_to_a_boundary_from_the_normal_equations(seed, N, n):
    trainer = FakeTrainer(noise(20, 3, seed=seed), noise(N, 3, seed=seed + 1))
    used = []

    def draw(mean, factor, generator):
        used.append((mean, factor))
        return mean + 1.0

    past = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greg, "poem_draw", draw)
        for epoch in range(6):
            order = torch.randperm(N, generator=generator(seed + epoch))
            chosen = greg.poem_pool(trainer, order, n, generator(seed))
            z_in = trainer.train_set.repeat(min(epoch, 4), 1)
            z = torch.cat([z_in, *(trainer.aux_set[i] for i in past)])
            y = torch.full((len(z),), 3.0, dtype=z.dtype)
            y[: len(z_in)] = -3
            A = z.mT @ z / 0.5 + torch.eye(3, dtype=z.dtype) / 20
            beta = torch.linalg.solve(A, z.mT @ y / 0.5)
            assert torch.allclose(used[-1][0], beta, rtol=1e-6, atol=1e-9)
            distance = (trainer.aux_set @ (beta + 1.0)).abs()
            assert set(chosen.tolist()) == set(distance.argsort()[:n].tolist())
            past = [*past, chosen][-4:]


def test_poem_bears_features_of_low_rank():
    g = generator(0)
    z_in = torch.rand(20_000, 10, generator=g) @ torch.rand(10, 128, generator=g)
    trainer = FakeTrainer(z_in, z_in[:500] + 0.01)
    for _ in range(3):
        assert len(greg.poem_pool(trainer, torch.randperm(500, generator=g), 200, g)) == 200


@pytest.mark.parametrize("pool", ["ntom_pool", "poem_pool"])
def test_an_epochs_outliers_come_in_random_order_not_sorted_by_score(pool, monkeypatch):
    trainer, beta = FakeTrainer(noise(40, 3), noise(400, 3, seed=1)), noise(3, seed=3)
    monkeypatch.setattr(greg, "poem_draw", lambda mean, factor, generator: beta)
    order = torch.randperm(400, generator=generator(2))
    z = trainer.aux_set[getattr(greg, pool)(trainer, order, 90, generator(0))]
    s = greg.absent(z) if pool == "ntom_pool" else (z @ beta).abs()
    rank = s.argsort().argsort().double()
    assert len(s) == 90
    assert abs(torch.corrcoef(torch.stack([rank, torch.arange(90.0).double()]))[0, 1]) < 0.4


@pytest.mark.parametrize("pool", ["ntom_pool", "poem_pool"])
def test_a_small_auxiliary_set_gives_a_smaller_pool(pool):
    trainer = FakeTrainer(noise(40, 3), noise(30, 3, seed=1))
    chosen = getattr(greg, pool)(
        trainer, torch.randperm(30, generator=generator(2)), 1000, generator(0)
    )
    assert 0 < len(chosen) <= 30 and len(set(chosen.tolist())) == len(chosen)


def test_balanced_energy_takes_its_authors_settings_and_the_startings_networks_prior():
    for K, alpha, gamma in (10, 10.0, 0.05), (100, 100.0, 0.005):
        trainer = FakeTrainer(noise(5, K), noise(200, K, seed=1))
        trainer.net = SimpleNamespace(fc=nn.Linear(3, K))
        trainer.config = SimpleNamespace(m_in=-25.0, m_aux=-7.0)
        _, context = greg.balance(trainer, None, trainer.aux_set, generator(0))
        assert (context["alpha"], context["gamma"]) == pytest.approx((alpha, gamma))
        counts = np.bincount(trainer.aux_set.argmax(1).numpy(), minlength=K)
        assert context["prior"].tolist() == pytest.approx((counts / 200).tolist())


# ---------------------------------------------------------------------------------------- 7  Data

# ------------------------------------------------------------------------------------ augmentation


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(5, 9), st.integers(5, 9))
def test_every_augmented_image_is_a_crop_of_the_padded_image_or_its_mirror(seed, n, h, w):
    x, pad = pixels(seed, n, h, w, 3), 4
    out = greg.augment(x, generator(seed + 1), pad)
    padded = np.zeros((n, h + 2 * pad, w + 2 * pad, 3), np.uint8)
    padded[:, pad : pad + h, pad : pad + w] = x.numpy()
    for i in range(n):
        crops = [
            padded[i, a : a + h, b : b + w] for a in range(2 * pad + 1) for b in range(2 * pad + 1)
        ]
        assert any(
            np.array_equal(out[i].numpy(), c) or np.array_equal(out[i].numpy(), c[:, ::-1])
            for c in crops
        )


def test_all_81_offsets_occur_equally_often_and_half_of_the_images_are_flipped():
    n, marks = 20000, torch.arange(1, 257, dtype=torch.int32)[:256].sub(1).byte().view(1, 16, 16, 1)
    out = greg.augment(marks.expand(n, 16, 16, 3), generator(0), pad=4)[:, :, :, 0].int()
    middle = out[:, 8, 8]  # the pixel at row 8, column 8 of the crop comes from inside the image
    flipped = out[:, 8, 9] < middle
    assert abs(flipped.float().mean() - 0.5) < 4 * 0.5 / n**0.5
    # crop column 8 shows image column 8 + dx - 4, or 7 + dx - 4 from the mirrored crop
    dy, dx = middle // 16 - 4, middle % 16 - torch.where(flipped, 3, 4)
    counts = torch.bincount(dy * 9 + dx, minlength=81)
    assert len(counts) == 81
    expected = n / 81
    assert ((counts - expected).square() / expected).sum() < 80 + 5 * (2 * 80) ** 0.5  # χ², 5 σ


@given(st.integers(0, 2**32))
def test_augmentation_is_a_function_of_its_generator_and_no_two_images_need_agree(seed):
    x = pixels(seed, 1, 32, 32, 3).expand(64, -1, -1, -1)
    a, b = (greg.augment(x, generator(seed)) for _ in range(2))
    assert torch.equal(a, b)
    assert len(a.flatten(1).unique(dim=0)) > 16
    assert not torch.equal(a, greg.augment(x, generator(seed + 1)))


@given(st.integers(0, 2**32))
def test_normalise_agrees_with_numpy_in_float64(seed):
    x = pixels(seed, 5, 6, 7, 3)
    a = x.numpy() / 255.0
    mean, std = (tuple(f((0, 1, 2)).tolist()) for f in (a.mean, a.std))
    z = greg.normalise(x, mean, std)
    want = ((a - a.mean((0, 1, 2))) / a.std((0, 1, 2))).transpose(0, 3, 1, 2)
    assert z.is_contiguous() and z.dtype == torch.float32
    np.testing.assert_allclose(z.numpy(), want, atol=1e-5)
    unit = torch.from_numpy(a).float().permute(0, 3, 1, 2)
    torch.testing.assert_close(greg.Normalize(mean, std)(unit), z, atol=1e-5, rtol=1e-5)


@given(st.integers(0, 2**32))
def test_a_batch_is_the_normalised_rows_it_was_asked_for(seed):
    x, index = pixels(seed, 9, 8, 8, 3), torch.tensor([7, 2, 2])
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    assert torch.equal(greg.batch(x, index, mean, std), greg.normalise(x[index], mean, std))


# --------------------------------------------------------------------------------------- synthetic


@given(st.sampled_from(list(greg.SYNTHETIC)), st.integers(1, 40), st.integers(0, 10**6))
def test_the_synthetic_benchmark_is_a_function_of_split_size_and_seed(split, n, seed):
    a, b = (greg.synthetic(split, n, seed) for _ in range(2))
    assert a.x.shape == (n, 32, 32, 3) and a.x.dtype == torch.uint8
    assert torch.equal(a.x, b.x) and not torch.equal(a.x, greg.synthetic(split, n, seed + 1).x)
    assert (a.y is not None) == (split in ("train", "test"))
    assert a.y is None or torch.equal(a.y, b.y)


def test_synthetic_classes_are_balanced_and_no_image_is_in_two_splits():
    train = greg.synthetic("train", 503)
    assert set(torch.bincount(train.y, minlength=10).tolist()) == {50, 51}
    images = torch.cat([greg.synthetic(split, 200).x for split in greg.SYNTHETIC]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)


def test_synthetic_families_of_id_auxiliary_and_ood_sets_are_disjoint():
    families = [set(greg.SYNTHETIC[s][0]) for s in ("train", "aux", *greg._OOD)]
    assert len(set().union(*families)) == sum(map(len, families)) == 10 + 6 + 6
    assert greg.SYNTHETIC["test"][0] == greg.SYNTHETIC["train"][0]


def test_synthetic_outlines_are_the_edge_of_the_filled_shape_without_its_middle():
    t = torch.linspace(-1, 1, 101)
    u, v = t.expand(1, 101, 101), t[:, None].expand(1, 101, 101)
    for shape in greg._SHAPES:
        fill, edge = (greg._distance(name, u, v, None) < 0 for name in (shape, "outlined " + shape))
        assert fill[0, 50, 50] and not edge[0, 50, 50]
        assert (fill | ~edge).all() and 0.25 * fill.sum() < edge.sum() < 0.95 * fill.sum()


@pytest.mark.parametrize("split,n", [("nothing", 3), ("train", 0)])
def test_synthetic_refuses_unknown_splits_and_no_images(split, n):
    with pytest.raises(ValueError):
        greg.synthetic(split, n)


def test_synthetic_is_loaded_by_name_with_its_six_families_as_ood_sets():
    train, test = greg.load_id("synthetic")
    assert len(train.x) > len(test.x) and greg.load_aux("synthetic").y is None
    sets, left_out = greg.load_ood(["synthetic"])
    assert list(sets) == list(greg._OOD) and left_out == []
    _, left_out = greg.load_ood(["rays", "cells"])
    assert left_out == ["crescents", "spirals", "strokes", "shards"]


# ------------------------------------------------------------------------------ arrays and folders


def save_id(path, **changes):
    arrays = {
        "x_train": pixels(0, 6, 8, 8, 3).numpy(),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": pixels(1, 3, 8, 8, 3).numpy(),
        "y_test": np.array([2, 0, 1], np.uint8),
    }
    arrays |= changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


def test_id_arrays_come_back_as_they_were_saved(tmp_path):
    arrays = save_id(tmp_path / "mine.npz")
    for part, split in zip(
        ("train", "test"), greg.load_id(str(tmp_path / "mine.npz")), strict=True
    ):
        np.testing.assert_array_equal(split.x, arrays["x_" + part])
        np.testing.assert_array_equal(split.y, arrays["y_" + part])
        assert split.name == "mine" and split.y.dtype == torch.int64


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"x_train": np.zeros((6, 8, 8, 3), np.float32)}, "x_train must be uint8"),
        ({"x_train": np.zeros((6, 3, 8, 8), np.uint8)}, "x_train must be uint8"),
        ({"x_train": np.zeros((0, 8, 8, 3), np.uint8)}, "x_train must be uint8"),
        ({"x_test": np.zeros((3, 9, 8, 3), np.uint8)}, "differ"),
        ({"y_train": np.arange(5)}, "6 integer labels"),
        ({"y_train": np.zeros(6, np.float32)}, "6 integer labels"),
        ({"y_train": np.array([-1, 0, 1, 2, 0, 1])}, "must be in 0..2"),
        ({"y_train": np.array([1, 2, 3, 1, 2, 3])}, "no image of class"),
        ({"y_test": np.array([0, 1, 3])}, "must be in 0..2, got 0..3"),
        ({"y_test": None}, "y_test"),
        ({"y_train": np.array([0, 1, 2, 0, 1, None])}, "cannot|can be read"),
    ],
)
def test_malformed_id_arrays_are_refused_and_the_array_named(tmp_path, changes, words):
    save_id(tmp_path / "bad.npz", **changes)
    with pytest.raises(ValueError, match=words) as error:
        greg.load_id(str(tmp_path / "bad.npz"))
    assert "bad.npz" in str(error.value)


@given(st.floats(0, 0.999), st.sampled_from([".npy", ".npz"]))
def test_a_truncated_array_file_is_refused_and_named(tmp_path_factory, share, suffix):
    path = tmp_path_factory.mktemp("cut") / ("x" + suffix)
    (np.save if suffix == ".npy" else np.savez)(path, pixels(0, 4, 32, 32, 3).numpy())
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(ValueError, match="x.np. is not"):
        greg.load_aux(str(path))


def test_an_npy_is_mapped_not_read_and_never_written(tmp_path):
    x = pixels(0, 4, 32, 32, 3).numpy()
    np.save(tmp_path / "x.npy", x)
    images = greg.load_aux(str(tmp_path / "x.npy"))
    before = (tmp_path / "x.npy").read_bytes()
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path / "x.npy") in maps.read_text()
    np.testing.assert_array_equal(images.x, x)
    images.x[0] = 0
    assert (tmp_path / "x.npy").read_bytes() == before


def test_an_npz_gives_its_x_or_its_first_array_and_sizes_must_fit(tmp_path):
    a, b = pixels(0, 2, 32, 32, 3), pixels(1, 2, 32, 32, 3)
    np.savez(tmp_path / "two.npz", a=a, x=b)
    np.savez(tmp_path / "one.npz", a=a)
    assert torch.equal(greg.load_aux(str(tmp_path / "two.npz")).x, b)
    assert torch.equal(greg.load_aux(str(tmp_path / "one.npz")).x, a)
    with pytest.raises(ValueError, match="one.npz has images .*16×16"):
        greg.load_aux(str(tmp_path / "one.npz"), size=16)
    np.savez(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="none.npz holds no"):
        greg.load_aux(str(tmp_path / "none.npz"))


def draw_tree(root, parts=("train", "test"), classes=("cat", "dog"), size=(32, 32)):
    for i, part in enumerate(parts):
        for j, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for k in range(2):
                color = (40 * i + 10 * k, 100 * j, 7)
                Image.new("RGB", size, color).save(root / part / name / f"{k}.png")


def test_an_image_folder_has_sorted_classes_and_the_pixels_of_its_files(tmp_path):
    draw_tree(tmp_path, classes=("dog", "cat"))
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"junk that macOS leaves behind")
    train, test = greg.load_id(str(tmp_path))
    assert train.classes == test.classes == ("cat", "dog")  # 0 and 1, in a mixed order
    pairs = {(int(y), *x) for x, y in zip(train.x[:, 0, 0].tolist(), train.y, strict=True)}
    assert pairs == {(0, 0, 100, 7), (0, 10, 100, 7), (1, 0, 0, 7), (1, 10, 0, 7)}
    assert {(int(y), *x) for x, y in zip(test.x[:, 0, 0].tolist(), test.y, strict=True)} >= {
        (0, 40, 100, 7)
    }


def test_folders_without_images_or_with_other_classes_are_refused_and_named(tmp_path):
    draw_tree(tmp_path)
    (tmp_path / "train" / "cow").mkdir()
    with pytest.raises(ValueError, match="train/cow"):
        greg.load_id(str(tmp_path))
    (tmp_path / "train" / "cow").rmdir()
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "hog")
    with pytest.raises(ValueError, match="same class"):
        greg.load_id(str(tmp_path))
    (tmp_path / "test").rename(tmp_path / "tset")
    with pytest.raises(FileNotFoundError, match="test"):
        greg.load_id(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images below .*empty"):
        greg.load_aux(str(tmp_path / "empty"))


def test_a_corrupt_image_among_good_ones_is_named(tmp_path):
    draw_tree(tmp_path)
    path = tmp_path / "train" / "dog" / "1.png"
    for content in (path.read_bytes()[:60], b"", b"not an image"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="dog/1.png is not an image"):
            greg.load_id(str(tmp_path))


@given(st.integers(0, 2**32), st.sampled_from(["L", "RGBA", "CMYK", "P", "1", "LA"]))
def test_images_of_every_mode_become_rgb(tmp_path_factory, seed, mode):
    path = tmp_path_factory.mktemp("mode") / ("x.tif" if mode == "CMYK" else "x.png")
    image = Image.fromarray(pixels(seed, 32, 32, 3).numpy()).convert(mode)
    image.save(path)
    want = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(greg.load_image(path, 32)[0], want)


def test_sixteen_bit_images_are_refused_rather_than_clipped(tmp_path):
    Image.fromarray(np.full((32, 32), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="deep.png.*8 bits"):
        greg.load_image(tmp_path / "deep.png", 32)


def test_an_image_is_resized_on_its_short_side_and_cropped_in_the_middle(tmp_path):
    a = np.zeros((64, 128, 3), np.uint8)
    a[:, 32:96] = 200  # the middle square
    Image.fromarray(a).save(tmp_path / "wide.png")
    x = greg.load_image(tmp_path / "wide.png", 32)
    assert x.shape == (1, 32, 32, 3) and (x[:, :, 1:-1] == 200).all()
    small = greg.load_image(tmp_path / "wide.png", 32, resize=False)
    np.testing.assert_array_equal(small[0], a[16:48, 48:80])
    with pytest.raises(ValueError, match="smaller than the crop"):
        greg.load_image(tmp_path / "wide.png", 65, resize=False)
    with pytest.raises(FileNotFoundError, match="absent.png"):
        greg.load_image(tmp_path / "absent.png", 32)


# ---------------------------------------------------------------------------------- published sets


@pytest.mark.parametrize("name", list(greg.SOURCES))
def test_an_absent_set_is_an_error_that_says_what_is_missing_and_what_to_do(tmp_path, name):
    load = {"cifar10": greg.load_id, "cifar100": greg.load_id, "random300k": greg.load_aux}
    with pytest.raises(FileNotFoundError) as error:
        load.get(name, lambda n, root: greg.load_ood([n], root))(name, tmp_path)
    text, source = str(error.value), greg.SOURCES[name]
    file = tmp_path / source.url.split("?")[0].rsplit("/")[-1]
    option = "PATH" if name in load else f"--ood {name}=PATH"
    assert all(part in text for part in (str(file), source.url, "--download", option))
    assert not list(tmp_path.iterdir())


def publish(at, name, members, monkeypatch, **source):
    """A tar.gz of (name, bytes), entered as the source of a set."""
    file = at / f"{name}.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        for member, content in members:
            add(tar, member, content)
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    url = f"http://localhost:1/{file.name}?dl=1"
    new = greg.Source(url, md5, "unpacked", 2)._replace(**source)
    monkeypatch.setitem(greg.SOURCES, name, new)
    return file


def add(tar, name, content=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(content), link
    tar.addfile(info, io.BytesIO(content))


def png(value, size=(32, 32)):
    out = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(out, "PNG")
    return out.getvalue()


def test_a_set_is_fetched_only_on_request_checked_unpacked_once_and_read(tmp_path, monkeypatch):
    web, root = tmp_path / "web", tmp_path / "data"
    web.mkdir()
    members = [("top/a.png", png(1)), ("top/sub/b.png", png(2)), ("top/list.txt", b"no image")]
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(web))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/isun.tar.gz?dl=1"
        publish(web, "isun", members, monkeypatch, url=url)
        with pytest.raises(FileNotFoundError, match="--download"):
            greg.load_ood(["isun"], root)
        assert not root.exists()
        sets, left_out = greg.load_ood(["isun"], root, download=True)
        server.shutdown()
    assert sets["isun"].x[:, 5, 5, 0].tolist() == [1, 2]
    assert left_out == [name for name in greg.PAPER_OOD if name != "isun"]
    assert (root / "unpacked" / "sub" / "b.png").exists() and not (root / "unpacked/top").exists()
    (root / "isun.tar.gz").unlink()
    assert len(greg.load_ood(["isun"], root)[0]["isun"].x) == 2  # needs no archive any more


def test_a_failed_download_says_so_and_leaves_no_file_that_looks_whole(tmp_path, monkeypatch):
    publish(tmp_path, "isun", [], monkeypatch, url="http://127.0.0.1:1/isun.tar.gz?dl=1")
    (tmp_path / "isun.tar.gz").unlink()
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        greg.load_ood(["isun"], tmp_path, download=True)
    assert not [p for p in tmp_path.iterdir() if p.name != ".lock"]


def test_a_set_that_is_there_needs_no_right_to_write(tmp_path, monkeypatch):
    content = pixels(0, 3, 32, 32, 3).numpy()
    np.save(tmp_path / "random300k.npy", content)
    md5 = hashlib.md5((tmp_path / "random300k.npy").read_bytes()).hexdigest()
    source = greg.Source("https://nowhere/random300k.npy", md5)
    monkeypatch.setitem(greg.SOURCES, "random300k", source)
    before = sorted(tmp_path.iterdir())
    np.testing.assert_array_equal(greg.load_aux("random300k", tmp_path).x, content)
    assert sorted(tmp_path.iterdir()) == before


def test_a_wrong_checksum_is_refused_before_anything_is_unpacked(tmp_path, monkeypatch):
    publish(tmp_path, "isun", [("a.png", png(1))], monkeypatch, md5="0" * 32)
    with pytest.raises(ValueError, match="isun.tar.gz is damaged or another file: md5"):
        greg.load_ood(["isun"], tmp_path)
    assert not (tmp_path / "unpacked").exists()


def test_a_folder_that_lost_images_is_refused(tmp_path, monkeypatch):
    publish(tmp_path, "isun", [("a.png", png(1)), ("b.png", png(2))], monkeypatch, count=3)
    with pytest.raises(ValueError, match="has 2 images, isun has 3"):
        greg.load_ood(["isun"], tmp_path)


def test_lsun_c_is_cropped_and_the_other_sets_are_resized(tmp_path, monkeypatch):
    image = np.zeros((36, 36, 3), np.uint8)
    image[2:34, 2:34] = pixels(0, 32, 32, 3).numpy()
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    for name in ("lsun_c", "lsun_r"):
        members = [("a.png", out.getvalue())]
        publish(tmp_path, name, members, monkeypatch, count=1, folder=name)
    sets, _ = greg.load_ood(["lsun_c", "lsun_r"], tmp_path)
    np.testing.assert_array_equal(sets["lsun_c"].x[0], image[2:34, 2:34])
    assert not torch.equal(sets["lsun_r"].x, sets["lsun_c"].x)


def test_places365_is_always_the_same_ten_thousand(tmp_path, monkeypatch):
    folder = tmp_path / "val_256"
    folder.mkdir()
    for i in range(10050):
        (folder / f"{i:05d}.jpg").touch()
    chosen = []
    monkeypatch.setitem(greg.SOURCES, "places365", greg.SOURCES["places365"]._replace(count=10050))

    def decode(files, size, resize, skip):
        chosen.append(files)
        x = torch.zeros(len(files), size, size, 3, dtype=torch.uint8)
        return greg.Images(x, None, "")

    monkeypatch.setitem(greg.__dict__, "_decode", decode)
    for _ in range(2):
        greg.load_ood(["places365"], tmp_path)
    assert chosen[0] == chosen[1] and len(set(chosen[0])) == len(chosen[0]) == 10000
    places = [int(path.stem) for path in chosen[0][:1000]]  # the first stand for all
    assert 4500 < sum(places) / 1000 < 5500


def test_the_first_images_of_a_folder_of_folders_stand_for_all(tmp_path):
    for i in range(5):
        (tmp_path / str(i)).mkdir()
        for j in range(8):
            Image.new("RGB", (8, 8), (40 * i, j, 0)).save(tmp_path / str(i) / f"{j}.png")
    a, b = (greg.load_ood([f"mine={tmp_path}"], size=8)[0]["mine"].x for _ in range(2))
    assert torch.equal(a, b) and len(a[:, 0, 0].unique(dim=0)) == 40
    assert len(a[:16, 0, 0, 0].unique()) == 5


def test_available_takes_the_sets_that_are_there_and_names_the_others(tmp_path, monkeypatch):
    publish(tmp_path, "isun", [("a.png", png(1)), ("b.png", png(2))], monkeypatch)
    sets, left_out = greg.load_ood(["available"], tmp_path)
    assert list(sets) == ["isun"] and left_out == list(greg.PAPER_OOD[:-1])


def test_ood_sets_of_ones_own_are_given_as_name_and_path(tmp_path):
    np.save(tmp_path / "x.npy", pixels(0, 2, 32, 32, 3))
    draw_tree(tmp_path / "tree", size=(50, 40))
    sets, left_out = greg.load_ood([f"svhn={tmp_path}/x.npy", f"mine={tmp_path}/tree"])
    assert [len(s.x) for s in sets.values()] == [2, 8] and "svhn" not in left_out
    with pytest.raises(ValueError, match="twice"):
        greg.load_ood([f"a={tmp_path}/x.npy", f"a={tmp_path}/x.npy"])
    with pytest.raises(ValueError, match="no OOD set 'shvn'.*svhn"):
        greg.load_ood(["shvn"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        greg.load_ood(["a=nowhere"])


def test_the_300k_file_must_have_its_published_checksum(tmp_path):
    np.save(tmp_path / "300K_random_images.npy", pixels(0, 2, 32, 32, 3))
    with pytest.raises(ValueError, match="300K_random_images.npy is damaged or another"):
        greg.load_aux("random300k", tmp_path)


# ---------------------------------------------------------------------------------------- archives

HOSTILE = {
    "parent": ("../evil", tarfile.REGTYPE, ""),
    "deep parent": ("a/../../evil", tarfile.REGTYPE, ""),
    "absolute": ("{outside}/evil", tarfile.REGTYPE, ""),
    "symbolic link": ("link", tarfile.SYMTYPE, "/etc/passwd"),
    "inner link": ("link", tarfile.SYMTYPE, "good"),
    "hard link": ("link", tarfile.LNKTYPE, "good"),
    "device": ("device", tarfile.CHRTYPE, ""),
    "pipe": ("pipe", tarfile.FIFOTYPE, ""),
    "outer folder": ("../evil", tarfile.DIRTYPE, ""),
}


@pytest.mark.parametrize("trick", list(HOSTILE))
def test_a_hostile_archive_is_refused_whole_and_writes_nothing_outside(tmp_path, trick):
    name, kind, link = HOSTILE[trick]
    (tmp_path / "work").mkdir()
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        add(tar, "good", b"1")
        add(tar, name.format(outside=tmp_path), kind=kind, link=link)
    with pytest.raises(ValueError, match="bad.tar is hostile"):
        greg.extract(tmp_path / "bad.tar", tmp_path / "work" / "set")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["bad.tar", "work"]


@given(st.floats(0, 0.99), st.sampled_from(["w", "w:gz", "w:xz", "w:bz2"]))
def test_a_truncated_archive_is_refused_and_leaves_nothing(tmp_path_factory, share, mode):
    tmp_path = tmp_path_factory.mktemp("cut")
    with tarfile.open(tmp_path / "cut.tar", mode) as tar:
        add(tar, "top/a", pixels(0, 30000).numpy().tobytes())
    whole = 30000 if mode == "w" else (tmp_path / "cut.tar").stat().st_size
    os.truncate(tmp_path / "cut.tar", int(share * whole))  # a plain tar ends in padding
    with pytest.raises(ValueError, match="cut.tar is damaged"):
        greg.extract(tmp_path / "cut.tar", tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["cut.tar"]


def test_an_archive_keeps_its_contents_but_no_modes(tmp_path):
    with tarfile.open(tmp_path / "ok.tar.gz", "w:gz") as tar:
        add(tar, "top", kind=tarfile.DIRTYPE)
        info = tarfile.TarInfo("./top/setuid")
        info.size, info.mode = 3, 0o4777
        tar.addfile(info, io.BytesIO(b"abc"))
        add(tar, "top/sub/b", b"de")
    greg.extract(tmp_path / "ok.tar.gz", tmp_path / "set")
    assert (tmp_path / "set/setuid").read_bytes() == b"abc"
    assert (tmp_path / "set/sub/b").read_bytes() == b"de"
    assert not (tmp_path / "set/setuid").stat().st_mode & 0o4111


def test_cifar_is_read_from_the_layout_and_names_that_torchvision_has(tmp_path, monkeypatch):
    import pickle

    from torchvision.datasets import CIFAR10

    x = pixels(0, 12, 3, 32, 32)
    members, md5 = [], {}
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = {"data": x[2 * k : 2 * k + 2].reshape(2, -1).numpy(), "labels": [k, 9 - k]}
        members.append((f"cifar-10-batches-py/{name}", pickle.dumps(rows)))
        md5[name] = hashlib.md5(members[-1][1]).hexdigest()
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    members.append(("cifar-10-batches-py/batches.meta", meta))
    lists = [[n, md5[n]] for n in md5]
    monkeypatch.setattr(CIFAR10, "train_list", lists[:5])
    monkeypatch.setattr(CIFAR10, "test_list", lists[5:])
    checked = CIFAR10.meta | {"md5": hashlib.md5(meta).hexdigest()}
    monkeypatch.setattr(CIFAR10, "meta", checked)
    publish(tmp_path, "cifar10", members, monkeypatch, folder="cifar-10-batches-py")
    train, test = greg.load_id("cifar10", tmp_path)
    assert torch.equal(train.x.permute(0, 3, 1, 2), x[:10]) and train.y.tolist()[:4] == [0, 9, 1, 8]
    assert torch.equal(test.x.permute(0, 3, 1, 2), x[10:]) and test.y.tolist() == [5, 4]
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"damage")
    with pytest.raises(ValueError, match="cifar-10-batches-py is damaged"):
        greg.load_id("cifar10", tmp_path)


# ImageNet: a small tree of real JPEG files.

TREE = ("n01", "n02", "n03", "n04")


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """ROOT with imagenet/train|val/WNID/*.JPEG of many sizes and modes, and an OOD folder."""
    root = tmp_path_factory.mktemp("root")
    g = np.random.default_rng(0)

    def draw(path, colour, mode="RGB"):
        w, h = g.integers(40, 80, 2)
        noise = g.normal(0, 25, (h // 8 + 1, w // 8 + 1, 3)) + np.array(colour)
        image = Image.fromarray(noise.clip(0, 255).astype("uint8")).resize((int(w), int(h)))
        path.parent.mkdir(parents=True, exist_ok=True)
        image.convert(mode).save(path, "JPEG", quality=95)

    for part, n in ("train", 12), ("val", 4):
        for c, name in enumerate(TREE):
            for i in range(n):
                mode = {1: "L", 2: "CMYK"}.get(i, "RGB")
                draw(
                    root / "imagenet" / part / name / f"{i}.JPEG", (60 * c, 200 - 60 * c, 99), mode
                )
    for i in range(6):
        draw(root / "sea" / f"{i}.JPEG", (10, 40, 200))
    return root


def test_the_number_ten_gives_the_ten_classes_of_the_released_code(tmp_path):
    for i in range(1000):
        (tmp_path / f"n{i:04d}").mkdir()
    positions = [342, 778, 443, 256, 601, 104, 445, 1, 269, 688]  # among the 1,000 sorted names
    ten = greg.imagenet_classes(tmp_path, "10")
    assert ten == [f"n{i:04d}" for i in positions]
    assert greg.imagenet_classes(tmp_path, "20")[:10] == ten
    for name in greg._TEN.split():
        (tmp_path / name).mkdir()
    assert greg.imagenet_classes(tmp_path) == greg._TEN.split()


def test_imagenet_classes_are_refused_if_they_are_not_there(tree, tmp_path):
    train = tree / "imagenet" / "train"
    assert greg.imagenet_classes(train, "n03,n01") == ["n03", "n01"]
    (tmp_path / "list").write_text("n02\nn04\n")
    assert greg.imagenet_classes(train, str(tmp_path / "list")) == ["n02", "n04"]
    for classes, words in ("", "no class 'n02396427'"), ("n01,n09", "no class 'n09'"):
        with pytest.raises(ValueError, match=words):
            greg.imagenet_classes(train, classes)
    for classes in "n01", "n01,n01", "4", "1":
        with pytest.raises(ValueError, match="two or more of the 4 classes"):
            greg.imagenet_classes(train, classes)
    with pytest.raises(FileNotFoundError, match="train"):
        greg.load_id("imagenet", tmp_path)
    (tmp_path / "imagenet" / "train" / "n01").mkdir(parents=True)
    (tmp_path / "imagenet" / "train" / "n02").mkdir()
    (tmp_path / "imagenet" / "train" / "n03").mkdir()
    with pytest.raises(ValueError, match="no images below .*n01"):
        greg.load_id("imagenet:n01,n02", tmp_path)


def test_imagenet_is_split_into_id_and_auxiliary_classes(tree):
    train, val = greg.load_id("imagenet:n03,n01", tree, size=32)
    aux = greg.load_aux("imagenet:n03,n01", tree, size=32)
    assert train.classes == val.classes == ("n03", "n01")
    assert train.x.shape == (24, 32, 32, 3) and val.x.shape == (8, 32, 32, 3)
    for x, y in zip(train.x.files, train.y, strict=True):
        assert f"/train/{train.classes[y]}/" in x.decode()
    assert {Path(f.decode()).parent.name for f in aux.x.files} == {"n02", "n04"}
    assert len(aux.x) == 24 and aux.y is None
    assert (train.y.diff() < 0).any(), "in order of class"


def test_files_are_what_load_image_reads_and_crops_are_torchvisions(tree):
    from torchvision.transforms import RandomResizedCrop

    files = greg.load_aux("imagenet:n03,n01", tree, size=32).x
    paths = [f.decode() for f in files.files]
    index = torch.tensor([5, 0, 7])
    want = torch.cat([greg.load_image(paths[i], 32) for i in index])
    assert torch.equal(files[index], want) and torch.equal(files[:2], files[torch.arange(2)])
    assert torch.equal(files.select(index)[torch.tensor([0])], want[:1])
    flipped = 0
    for seed in range(12):
        crop, image = files.crop(3, seed)[0], Image.open(paths[3]).convert("RGB")
        assert torch.equal(crop, files.crop(3, seed)[0])
        torch.manual_seed(seed)
        other = RandomResizedCrop(32, antialias=True)(image)  # the library's own draw
        other = torch.from_numpy(np.array(other))
        assert torch.equal(crop, other) or torch.equal(crop, other.flip(1))
        flipped += torch.equal(crop, other.flip(1))
    assert 1 < flipped < 11


def test_the_raw_path_decodes_the_same_crops(tree):
    """Bytes decoded in one call (on a GPU where there is one), against Pillow's."""
    files = greg.load_aux("imagenet:n03,n01", tree, size=32).x
    for start in range(0, 24, 4):  # RGB, grey and CMYK
        parts = [(files, list(range(start, start + 4)), [7, 8, 9, 10])]
        x, _, error = greg.Stream(parts)[0]
        raw, lengths, _ = greg.Stream(parts, raw=True)[0]
        y, _, _ = greg.Stream(parts, raw=True).decode(0, raw, lengths, "cpu")
        assert not error and x.shape == y.shape and x.dtype == y.dtype
        assert (x.float() - y.float()).abs().mean() < 1.5


def test_the_raw_path_names_a_damaged_file(tree, tmp_path):
    (tmp_path / "empty.JPEG").touch()
    files = greg.Files([tmp_path / "empty.JPEG"], torch.zeros(1), 32)
    stream = greg.Stream([(files, [0], [0])], raw=True)
    raw, lengths, _ = stream[0]
    assert "empty.JPEG is not an image" in stream.decode(0, raw, lengths, "cpu")[2]


def test_a_corrupt_file_is_named_and_replaced_by_one_of_its_class_only_if_asked(
    tree, capsys, monkeypatch
):
    train, _ = greg.load_id("imagenet:n03,n01", tree, size=32)
    path, i = Path(train.x.files[4].decode()), torch.tensor([4])
    content = path.read_bytes()
    try:
        path.write_bytes(content[:300])
        with pytest.raises(ValueError, match=f"{path}.*--skip-corrupt"):
            train.x[i]
        x, _, error = greg.Stream([(train.x, [4], [0])])[0]
        assert str(path) in error
        kept, _ = greg.load_id("imagenet:n03,n01", tree, size=32, skip_corrupt=True)
        same = [j for j in range(24) if train.y[j] == train.y[4] and j != 4]
        after = min(same, key=lambda j: (j < 4, j))
        assert torch.equal(kept.x[i], train.x[torch.tensor([after])])
        assert kept.x.corrupt == {str(path)}
        names = [path, path.with_name("absent.JPEG")]
        decoded = greg._decode([path, path.with_name("0.JPEG")], 32, skip=True)
        assert decoded[1].tolist() == [1] and "left out 1 corrupt files" in capsys.readouterr().err
        with pytest.raises(FileNotFoundError):  # a file that is gone is no damaged one
            greg._decode(names[1:], 32, skip=True)
        monkeypatch.setattr(Image, "open", lambda path: open("/proc/self/mem").read())
        with pytest.raises(OSError, match="Input/output error"):  # nor is a disk that fails
            greg._decode(names[:1], 32, skip=True)
    finally:
        path.write_bytes(content)


# ------------------------------------------------------------------------------------- 8  Training


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The built-in images at 8×8, as a user's own files: a run takes seconds."""
    folder = tmp_path_factory.mktemp("data")

    def shrink(split, n):
        images = greg.synthetic(split, n)
        x = images.x.view(n, 8, 4, 8, 4, 3).float().mean((2, 4)).byte()
        return x.numpy(), None if images.y is None else images.y.numpy()

    (x_train, y_train), (x_test, y_test) = shrink("train", 320), shrink("test", 200)
    np.savez(folder / "id.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    for name, n in ("aux", 256), ("cells", 60), ("rays", 40):
        np.save(folder / f"{name}.npy", shrink(name, n)[0])
    return folder


def small(method, files, **options):
    """A run of a few seconds."""
    base = {"id": str(files / "id.npz"), "aux": str(files / "aux.npy"), "arch": "wrn10_1"}
    base |= {"epochs": 2, "batch": 16, "lr": 0.05, "n_train": 64, "schedule": "cosine", "wd": 5e-4}
    return greg.Config(method, **base | options)


def trainer(config, folder):
    config = greg.resolve(config)
    train_set = greg._on(CPU, greg.load_id(config.id)[0], config.n_train)
    aux = greg.load_aux(config.aux, size=8) if config.aux else None
    return greg.Trainer(config, folder, train_set, aux)


def sets(files):
    return [f"cells={files}/cells.npy", f"rays={files}/rays.npy"]


@pytest.fixture(scope="session")
def pretrained(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "ce"
    config = small("ce", files, n_train=320, epochs=4)
    greg.train(config, folder, CPU, greg.DataOptions(ood=sets(files)))
    return folder


def started_from(pretrained, method, **options):
    files = Path(greg.read_results(pretrained)["config"]["id"]).parent
    return small(method, files, init=str(pretrained), **options)


@pytest.mark.parametrize("method", greg.METHODS)
def test_every_row_of_methods_lowers_its_own_loss(method, pretrained, tmp_path):
    t = trainer(started_from(pretrained, method), tmp_path)
    t.shuffle()
    t.net.train()
    losses = [t.train_step()[0].item() for _ in range(8)]  # the same step: the same images
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def test_a_row_written_by_a_user_runs(pretrained, tmp_path, monkeypatch):
    row = greg.Method(greg.absent_loss, greg.ENERGY_SAMPLING, greg.Gradient(greg.absent, 0.5, 0.5))
    row = greg.replace(row, score="absent", extra_class=True)
    monkeypatch.setitem(greg.METHODS, "mine", row)
    t = trainer(started_from(pretrained, "mine"), tmp_path)
    t.run()
    assert t.epoch == 2 and t.net.fc.out_features == 11


def test_a_step_of_greg_is_greg_loss(pretrained, tmp_path, monkeypatch):
    t = trainer(started_from(pretrained, "greg"), tmp_path)
    t.shuffle()
    seen = []
    loss = greg.greg_loss
    monkeypatch.setattr(greg, "greg_loss", lambda *a, **k: seen.append(a) or loss(*a, **k))
    before = {k: v.clone() for k, v in t.net.state_dict().items()}
    terms = t.train_step()
    net, x_in, y_in, x_aux = seen[0][:4]
    again = greg.wrn(10, 1, 10)
    again.load_state_dict(before)
    out = loss(again.train(net.training), x_in, y_in, x_aux)
    torch.testing.assert_close(torch.stack(out[:4]), terms[:4], rtol=1e-5, atol=1e-6)
    assert len(x_in) == len(x_aux) == 16


def test_the_lazy_penalty_comes_every_nth_step_with_n_fold_weight(
    pretrained, tmp_path, monkeypatch
):
    config = greg.replace(started_from(pretrained, "greg"), grad_every=3, lambda_grad=0.5)
    t = trainer(config, tmp_path)
    t.shuffle()
    weights, loss = [], greg.greg_loss

    def spy(net, x_in, y_in, x_aux, m_in, m_aux, lambda_s, lambda_grad, *more, **options):
        out = loss(net, x_in, y_in, x_aux, m_in, m_aux, lambda_s, lambda_grad, *more, **options)
        weights.append((lambda_grad, out.gradient.item()))
        return out

    monkeypatch.setattr(greg, "greg_loss", spy)
    terms = []
    for t.epoch, t.step in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]:
        t.steps = 4
        terms.append(t.train_step())
    assert [w for w, _ in weights] == [1.5, 0, 0, 1.5, 0]  # over the epochs' borders
    logged = [row[greg.TERMS.index("gradient")].item() for row in terms]
    assert logged == pytest.approx([3 * g for _, g in weights]) and logged[0] > 0 == logged[1]


@pytest.mark.parametrize("option,step", [("amp_candidates", False), ("amp", True)])
def test_amp_candidates_leaves_the_step_itself_in_float32(option, step, pretrained, tmp_path):
    t = trainer(greg.replace(started_from(pretrained, "greg+"), **{option: True}), tmp_path)
    t.shuffle()
    t.net.train()
    seen = []  # candidates are embedded in eval mode
    t.net.fc.register_forward_hook(lambda m, _, out: seen.append((m.training, out.dtype)))
    t.train_step()
    assert [(mode, dtype == torch.bfloat16) for mode, dtype in seen] == [
        (False, True),
        (True, step),
    ]


@pytest.mark.parametrize("share,rows", [(1.0, []), (0.25, [8])])
def test_a_share_of_the_images_costs_a_forward_of_their_own(
    share, rows, pretrained, tmp_path, monkeypatch
):
    t = trainer(greg.replace(started_from(pretrained, "greg"), grad_share=share), tmp_path)
    t.shuffle()
    t.net.train()
    seen = []
    t.net.register_forward_hook(lambda net, x, out: seen.append(len(x[0])))
    assert t.train_step()[3].item() > 0
    assert seen == [32, *rows]


@pytest.mark.parametrize("method,candidates", [("greg+", 96), ("dos", 96)])
def test_a_step_sees_the_candidates_of_the_paper(
    method, candidates, pretrained, tmp_path, monkeypatch
):
    """k = ID batch size; 2k (DOS: k) of six times as many candidates, 384 for a batch of 64."""
    t = trainer(started_from(pretrained, method), tmp_path)
    t.shuffle()
    seen, embed = [], greg.embed
    monkeypatch.setattr(greg, "embed", lambda net, x, amp: seen.append(len(x)) or embed(net, x))
    x = t.auxiliary(generator(0))
    assert seen == [candidates] and len(x) == (32 if method == "greg+" else 16)


def test_features_come_in_chunks_and_do_not_depend_on_them():
    net, x, seen = greg.build("wrn10_1", 3), torch.rand(70, 3, 32, 32), []
    whole = greg.embed(net, x, chunk=70)
    net.features.register_forward_hook(lambda net, x, out: seen.append(len(out)))
    for chunk, sizes in (None, [32, 32, 6]), (50, [50, 20]):
        for ours, expected in zip(greg.embed(net, x, chunk=chunk), whole, strict=True):
            assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)
        assert seen == sizes and net.training
        seen.clear()


@given(st.integers(100, 3000), st.integers(1, 12), st.integers(1, 3))
def test_every_auxiliary_image_is_a_candidate_each_epoch(n_aux, steps, world):
    """Section 6.1, "so that no auxiliary sample is missed", over all steps and ranks."""
    seen = []
    t = object.__new__(greg.Trainer)
    t.config = greg.resolve(greg.Config("greg+"))
    t.config = greg.replace(t.config, batch=2 * world)
    t.method, t.device, t.share = greg.METHODS["greg+"], CPU, 2
    t.steps, t.world, t.order_aux = steps, world, torch.randperm(n_aux)
    t.aux_set = greg.Images(torch.empty(n_aux, 0), None, "")
    for step in range(steps):
        for t.rank in range(world):
            seen.append(t.index("aux", t.plan(step)["aux"])[1])
    counts = torch.bincount(torch.cat(seen), minlength=n_aux)
    total = max(n_aux, 6 * t.config.batch * steps)
    assert counts.min() >= total // n_aux and counts.max() <= -(-total // n_aux)
    assert max(map(len, seen)) - min(map(len, seen)) <= 1


def weights(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return torch.cat([v.double().flatten() for v in state["net"].values()])


def test_a_seed_fixes_a_run_and_another_seed_changes_it(pretrained, tmp_path):
    runs = [("a", 0), ("b", 0), ("c", 1)]
    for name, seed in runs:
        torch.manual_seed(hash(name) % 1000)  # the global generator plays no part
        trainer(started_from(pretrained, "greg+", seed=seed), tmp_path / name).run()
    a, b, c = (weights(tmp_path / name) for name, _ in runs)
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("method", ["greg+", "poem+grad", "ntom", "balanced"])
@pytest.mark.parametrize("stop_at", [(0, 2), (0, 3), (1, 1)])
def test_a_run_stopped_anywhere_and_resumed_equals_one_that_was_not(
    method, stop_at, pretrained, tmp_path, monkeypatch
):
    config = started_from(pretrained, method)
    trainer(config, tmp_path / "whole").run()
    t = trainer(config, tmp_path / "stopped")
    step = t.train_step

    def stopping():
        t.stopped_by = 15 if (t.epoch, t.step) == stop_at else 0
        return step()

    monkeypatch.setattr(t, "train_step", stopping)
    with pytest.raises(SystemExit, match="goes on from here"):
        t.run()
    resumed = trainer(config, tmp_path / "stopped")
    resumed.run()
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    logs = [(tmp_path / n / "log.jsonl").read_text().splitlines() for n in ("whole", "stopped")]
    for a, b in zip(*logs, strict=True):
        a, b = json.loads(a), json.loads(b)
        assert a | {"seconds": 0} == pytest.approx(b | {"seconds": 0})


TRAIN = "train --method greg --arch wrn10_1 --epochs 3 --batch 16 --lr 0.05 --n-train 320"


def command(*words, **options):
    """greg.py as a process."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(HERE / "greg.py"), *map(str, words)]
    return subprocess.Popen(
        line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(number, files, pretrained, tmp_path):
    config = started_from(pretrained, "greg", epochs=3, n_train=320, schedule=None, wd=None)
    trainer(config, tmp_path / "whole").run()
    words = [*TRAIN.split(), "--id", files / "id.npz", "--aux", files / "aux.npy"]
    words += ["--init", pretrained, "--ood", *sets(files), "--out", tmp_path / "killed"]
    process = command(*words)
    for _ in range(600):
        time.sleep(0.1)
        if (tmp_path / "killed" / "checkpoint.pt").exists() or process.poll() is not None:
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGTERM and process.returncode:
        assert "goes on from here" in err and "Traceback" not in err
    assert command(*words).wait(timeout=120) == 0
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert not list((tmp_path / "killed").glob("*.tmp"))


@pytest.mark.parametrize("left", [0, 1, 500, 5000, -1])
def test_the_checkpoint_before_a_damaged_one_is_used_and_said(pretrained, tmp_path, capsys, left):
    config = started_from(pretrained, "energy")
    trainer(config, tmp_path).run()
    whole = weights(tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:left])
    t = trainer(config, tmp_path)
    t.run()
    assert "damaged" in capsys.readouterr().err and torch.equal(weights(tmp_path), whole)
    for name in "checkpoint.pt", "checkpoint.prev.pt":
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no intact checkpoint"):
        trainer(config, tmp_path).run()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    greg.write_json(path, {"a": 1})

    def fails(number):
        raise OSError("No space left on device")

    with monkeypatch.context() as m, pytest.raises(OSError, match="make room"):
        m.setattr(os, "fsync", fails)
        greg.write_atomically(path, "half", keep="value.prev.json")
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(ValueError):
        greg.write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("limit", [0, 1, 4096, 100_000])
def test_a_full_disk_is_reported_and_loses_nothing(limit, pretrained, tmp_path):
    """A limit on the size of files stands for a disk without room."""
    import resource

    t = trainer(started_from(pretrained, "energy"), tmp_path)
    t.run()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="could not be written .*intact"):
            t.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@settings(max_examples=8)
@given(delays=st.lists(st.floats(0, 0.6), min_size=1, max_size=3))
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(
    delays, pretrained, tmp_path_factory
):
    config = started_from(pretrained, "greg+", epochs=3)
    folder, fork = tmp_path_factory.mktemp("killed"), multiprocessing.get_context("fork")

    def victim():
        tqdm.set_lock(threading.RLock())  # its own: we would wait for what it dies with forever
        trainer(config, folder).run()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greg, "SAVE_SECONDS", 0)  # after every step
        patch.setattr(greg, "SYNC_STEPS", 1)
        for delay in delays:
            process = fork.Process(target=victim)
            process.start()
            process.join(delay)
            process.kill()
            process.join()
        trainer(config, folder).run()
    whole = whole_run(config, folder.parent)
    assert torch.equal(weights(folder), whole)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"] == 3


@functools.cache
def whole_run(config, parent):
    """The weights of a run that nothing disturbed."""
    folder = parent / "undisturbed"
    trainer(config, folder).run()
    return weights(folder)


def streamed(tree, **options):
    """A run on the small ImageNet tree, at 32×32."""
    base = {"id": "imagenet:n03,n01", "arch": "wrn10_1", "size": 32, "epochs": 2, "batch": 8}
    return greg.Config(**base | {"lr": 0.01, "candidates": 2, "aux_epoch": 20} | options)


def stream_trainer(config, folder, tree, **data):
    config, data = greg.resolve(config), greg.DataOptions(root=str(tree), **data)
    train_set = greg.load_id(config.id, tree, size=32)[0]
    aux = greg.load_aux(config.aux, tree, size=32)
    return greg.Trainer(config, folder, train_set, aux, CPU, data)


@pytest.mark.parametrize("method", ["greg+", "energy"])
def test_streamed_training_is_the_same_for_any_workers_chunks_and_stops(
    method, pretrained, tree, tmp_path, monkeypatch
):
    config = streamed(tree, method=method, init=str(pretrained))
    config = greg.replace(config, init=str(tmp_path / "start.pt"))
    torch.save(seeded(3, lambda: greg.wrn(10, 1, 2)).state_dict(), config.init)
    stream_trainer(config, tmp_path / "a", tree, workers=0).run()
    monkeypatch.setattr(greg, "STREAM_CHUNK", 3)
    t = stream_trainer(config, tmp_path / "b", tree, workers=2)
    step = t.train_step

    def stopping():
        t.stopped_by = 15 if (t.epoch, t.step) == (1, 1) else 0
        return step()

    monkeypatch.setattr(t, "train_step", stopping)
    with pytest.raises(SystemExit):
        t.run()
    stream_trainer(config, tmp_path / "b", tree, workers=1).run()
    assert torch.equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    t = stream_trainer(config, tmp_path / "c", tree, workers=0, candidate_chunk=3)
    t.run()  # eval-mode features in other chunks: equal up to float error
    torch.testing.assert_close(
        weights(tmp_path / "a"), weights(tmp_path / "c"), rtol=0.02, atol=1e-3
    )


def test_fewer_auxiliary_images_than_a_step_needs_are_refused(files, pretrained, tmp_path):
    np.save(tmp_path / "few.npy", np.load(files / "aux.npy")[:15])
    with pytest.raises(ValueError, match="15 auxiliary images, a step needs 32"):
        trainer(started_from(pretrained, "oe", aux=str(tmp_path / "few.npy")), tmp_path / "run")


def test_options_that_cannot_work_are_refused(tree):
    for options in {"workers": -1}, {"candidate_chunk": 0}, {"decode": "cuda"}:
        if not (options.get("decode") and torch.cuda.is_available()):
            with pytest.raises(ValueError, match="--"):
                greg.DataOptions(**options)
    base = {"id": "imagenet:n03,n01", "init": "x"}
    for config, words in (
        ({"method": "energy", "aux": "imagenet:n02,n04"}, "leave --aux out"),
        ({"method": "ce", "arch": "densenet121", "size": 16}, "32 pixels"),
        ({"method": "energy", "init": ""}, "--init"),
    ):
        with pytest.raises(ValueError, match=words):
            greg.resolve(greg.Config(**base | config))


def test_imagenet_is_a_fine_tune_of_torchvisions_densenet_and_its_auxiliary_set_the_rest(tmp_path):
    resolved = greg.resolve(greg.Config("ce", id="imagenet:20", arch="densenet121"))
    assert (resolved.init, resolved.size, resolved.stats) == ("torchvision", 224, "imagenet")
    assert resolved.lr == greg.RECIPES["finetune"]["lr"]
    assert greg.resolve(greg.Config("ce", id="imagenet", arch="resnet18")).lr == 0.1  # from scratch
    for aux in "", "imagenet":
        config = greg.Config("greg+", id="imagenet:20", arch="densenet121", init="x", aux=aux)
        assert greg.resolve(config).aux == "imagenet:20"
    assert greg.post_hoc("imagenet:20", "densenet121", 20) == greg.POST_HOC["imagenet"]
    file = tmp_path / Path(greg._DENSENET121).name
    data = greg.DataOptions(root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="--download"):
        greg.build("densenet121", 3, "torchvision", data=data)
    source = seeded(5, lambda: greg.densenet121(1000))
    torch.save(source.state_dict(), file)
    with pytest.raises(ValueError, match="SHA-256"):
        greg.build("densenet121", 3, "torchvision", data=data)
    with pytest.MonkeyPatch.context() as patch:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
        patch.setattr(greg, "_DENSENET121", f"https://x/densenet121-{digest}.pth")
        file.rename(tmp_path / f"densenet121-{digest}.pth")
        net = greg.build("densenet121", 3, "torchvision", data=data)
    for a, b in zip(net.features.parameters(), source.features.parameters(), strict=True):
        assert torch.equal(a, b)
    assert net.fc.out_features == 3


def rank_of_a_run(rank, config, folder, tree):
    """One of two processes of a run without synchronised batch norm: its network at the end."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=2)
    t = stream_trainer(config, folder / "run", tree, workers=0)
    t.run()
    torch.save(t.net.state_dict(), folder / f"rank{rank}.pt")
    n = 7
    whole = torch.arange(3 * n).view(n, 3)
    assert torch.equal(greg.gathered(whole[rank::2], n), whole)


def test_all_processes_end_with_the_network_that_is_saved(tree, tmp_path):
    """Running statistics too: else every rank would score its share by another network."""
    config = streamed(tree, method="greg+", init=str(tmp_path / "start.pt"), epochs=1)
    torch.save(seeded(3, lambda: greg.wrn(10, 1, 2)).state_dict(), config.init)
    torch.multiprocessing.start_processes(
        rank_of_a_run, (config, tmp_path, tree), nprocs=2, start_method="fork"
    )
    nets = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    nets.append(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["net"])
    for k in nets[0]:
        assert torch.equal(nets[0][k], nets[1][k]) and torch.equal(nets[0][k], nets[2][k])


def step_of_a_rank(rank, ranks, mode, folder):
    """One process of a step: the gradients of greg_loss on its share of the batch."""
    torch.set_num_threads(1)
    if ranks > 1:
        store = f"file://{folder}/store{mode}"
        torch.distributed.init_process_group("gloo", store, rank=rank, world_size=ranks)
    net = seeded(0, lambda: greg.wrn(10, 1, 4)).double()
    if mode == "synchronised" and ranks > 1:
        greg.synchronise(net)
    net.train(mode == "synchronised")
    plain = seeded(0, lambda: greg.wrn(10, 1, 4)).double().train(net.training)
    model = nn.parallel.DistributedDataParallel(net) if ranks > 1 else net
    x_in, x_aux = normal(1, 12, 3, 8, 8), normal(2, 12, 3, 8, 8)
    y = torch.arange(12) % 4
    m = greg.energy_score(plain(torch.cat([x_in, x_aux]))).median().item()
    share = slice(12 * rank // ranks, 12 * (rank + 1) // ranks)
    out = greg.greg_loss(model, x_in[share], y[share], x_aux[share], m, m)
    out.loss.backward()
    assert out.gradient > 0 and out.energy > 0
    if rank == 0:
        state = [p.grad for p in net.parameters()] + list(net.buffers())
        torch.save(state, folder / f"{mode}{ranks}.pt")


@pytest.mark.parametrize("mode", ["synchronised", "fixed"])
def test_a_step_of_two_processes_is_that_of_one_on_the_union(mode, tmp_path):
    """With batch statistics synchronised, or fixed (eval mode), and with the gradient term."""
    step_of_a_rank(0, 1, mode, tmp_path)
    torch.multiprocessing.start_processes(
        step_of_a_rank, (2, mode, tmp_path), nprocs=2, start_method="fork"
    )
    one, two = (torch.load(tmp_path / f"{mode}{n}.pt", weights_only=True) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_folder_of_another_configuration_is_refused(pretrained, tmp_path):
    trainer(started_from(pretrained, "energy"), tmp_path).run()
    with pytest.raises(ValueError, match="lr 0.05 -> 0.1"):
        trainer(started_from(pretrained, "energy", lr=0.1), tmp_path).run()


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(pretrained, tmp_path):
    t = trainer(started_from(pretrained, "greg", epochs=3), tmp_path)
    step = t.train_step

    def poisoned():
        if (t.epoch, t.step) == (1, 2):
            t.net.fc.weight.data[0, 0] = math.nan
        return step()

    t.train_step = poisoned
    with pytest.raises(FloatingPointError, match="ce term is nan at epoch 2, step 3"):
        t.run()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["epoch"] == 1 and all(v.isfinite().all() for v in saved["net"].values())


def test_an_accuracy_that_collapses_is_warned_about_with_margins(pretrained, tmp_path, capsys):
    t = trainer(started_from(pretrained, "energy", lr=0.5, lambda_s=100.0), tmp_path)
    t.folder.mkdir(exist_ok=True)
    t.log({"epoch": 0, "probe_accuracy": 0.9, "probe_s_in": -4.5, "probe_s_aux": -2.25})
    row = {"epoch": 1, "probe_accuracy": 0.79}
    greg.warn_of_collapse(tmp_path, row, t.config)
    assert "--m-in -4.5 --m-aux -2.2" in capsys.readouterr().err
    greg.warn_of_collapse(tmp_path, row, greg.replace(t.config, method="oe"))
    err = capsys.readouterr().err
    assert "fell from" in err and "margins" not in err  # OE has none
    greg.warn_of_collapse(tmp_path, row | {"probe_accuracy": 0.81}, t.config)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "change,message",
    [
        ({"method": "grog"}, "one of ce"),
        ({"arch": "vgg"}, "one of resnet18"),
        ({"init": ""}, "--init"),
        ({"m_in": -5.0}, "m_in < m_aux"),
        ({"batch": 0}, "positive"),
        ({"schedule": "0.5;1"}, "schedule"),
        ({"schedule": "1/0"}, "schedule"),
        ({"schedule": "50,75"}, "schedule"),
        ({"stats": "mnist"}, "stats"),
        ({"reduction": "mean"}, "reduction"),
        ({"method": "greg+", "candidates": 1}, "candidates"),
        ({"n_train": -1}, "n-train"),
    ],
)
def test_configurations_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        greg.resolve(greg.replace(greg.Config("greg", init="x"), **change))


def test_recipes_are_those_of_section_6_1():
    greg_, plus = (greg.resolve(greg.Config(m, init="x")) for m in ("greg", "greg+"))
    assert (greg_.epochs, greg_.schedule) == (20, "cosine")
    assert (greg_.lambda_s, greg_.lambda_grad) == (plus.lambda_s, plus.lambda_grad) == (0.1, 1)
    assert (plus.epochs, plus.lr, plus.aux) == (60, 0.1, "random300k")
    rates = [greg.learning_rate(plus, epoch / 60) for epoch in range(60)]
    assert rates == [0.1] * 50 + [pytest.approx(0.01)] * 10
    assert greg.learning_rate(greg_, 0) == greg_.lr
    assert greg.learning_rate(greg_, 0.5) == pytest.approx(greg_.lr / 2)


# ------------------------------------------------- 9  Evaluation, tables, figures, command line


def test_results_are_the_metrics_of_the_saved_scores(files, pretrained):
    results = greg.read_results(pretrained)
    test_set, net = greg.load_id(str(files / "id.npz"))[1], greg.load_run(pretrained, CPU)[0]
    x = greg.normalise(test_set.x, *greg.STATS["cifar10"])
    with torch.no_grad():
        logits = net(x)
    assert results["accuracy"] == (logits.argmax(1) == test_set.y).double().mean().item()
    with np.load(pretrained / "scores.npz") as scores:
        torch.testing.assert_close(torch.from_numpy(scores["energy/id"]), greg.energy_score(logits))
        for score, found in results["metrics"].items():
            s_in = scores[f"{score}/id"]
            assert results["gamma"][score] == greg.threshold(s_in)
            for name in "rays", "cells":
                assert found[name] == greg.ood_metrics(s_in, scores[f"{score}/{name}"])
            mean = (found["rays"]["fpr95"] + found["cells"]["fpr95"]) / 2
            assert found["mean"]["fpr95"] == pytest.approx(mean)
    assert set(results["metrics"]) == set(greg.POST_HOC_ROWS)
    x.requires_grad_()
    (g,) = torch.autograd.grad(greg.energy_score(net(x)).sum(), x)
    norm = g.flatten(1).norm(dim=1).mean().item()
    assert results["gradient_norm"]["id"] == pytest.approx(norm, rel=1e-4)
    assert "svhn" in results["left_out"]


def test_odin_at_a_high_temperature_ties_no_scores():
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), noise(3000, 3, 2, 2).float()
    s = greg.odin(net, x, 1000.0, 0.0)
    assert len(s.unique()) == len(x) == len(net(x).unique(dim=0))


def test_a_test_set_of_another_arithmetic_gives_the_same_odin(files, pretrained):
    """ODIN's step is eps in [0,1] pixels: with the normalisation inside, no std is needed."""
    net = greg.load_run(pretrained, CPU)[0]
    x, (mean, std) = greg.load_id(str(files / "id.npz"))[1].x[:20], greg.STATS["cifar10"]
    inside = nn.Sequential(greg.Normalize(mean, std), net)
    a = greg.odin(net, greg.normalise(x, mean, std), 1000.0, 0.0014, std)
    b = greg.odin(inside, x.permute(0, 3, 1, 2) / 255, 1000.0, 0.0014)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_predict_decides_by_the_threshold_of_fpr95(files, pretrained, tmp_path):
    images = greg.load_id(str(files / "id.npz"))[1].x[:12]
    paths = [str(tmp_path / f"{i}.png") for i in range(12)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.numpy()).save(path)
    net, state = greg.load_run(pretrained, CPU)
    with torch.no_grad():
        s = greg.energy_score(net(greg.normalise(images, *greg.STATS["cifar10"])))
    rows = greg.predict(pretrained, paths, CPU)
    for row, value in zip(rows, s.tolist(), strict=True):
        assert row["score"] == pytest.approx(value, rel=1e-4)
        assert row["decision"] == ("ID" if row["score"] <= state["gamma"] else "OOD")
        assert row["class"] in map(str, range(10))
    with pytest.raises(FileNotFoundError, match="no image"):
        greg.predict(pretrained, [str(tmp_path / "absent.png")], CPU)


def test_predict_refuses_a_score_that_needs_training_images(pretrained, tmp_path):
    state = torch.load(pretrained / "checkpoint.pt", weights_only=True) | {"score": "react"}
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="react"):
        greg.predict(tmp_path, [], CPU)


def test_class_K_plus_1_counts_for_its_own_score_alone():
    """Every other score of a network with it is that of the network without."""
    images = greg.synthetic("test", 20)
    more = seeded(0, lambda: greg.wrn(10, 1, 11)).eval()
    net = copy.deepcopy(more)
    net.fc = nn.Linear(64, 10)
    net.fc.weight.data, net.fc.bias.data = more.fc.weight.data[:10], more.fc.bias.data[:10]
    names = [name for name in greg.SCORES if name != "absent"]
    config = greg.Config("ce", id="synthetic", arch="wrn10_1", stats="cifar10")
    train_set = greg.synthetic("train", 100)
    a, b = (
        greg.score_images(v, images, 10, "cifar10", names, greg.fit_to(v, train_set, config))[0]
        for v in (net, more)
    )
    for name in names:
        torch.testing.assert_close(a[name], b[name], msg=name)
    f = more(greg.normalise(images.x, *greg.STATS["cifar10"])).detach()
    absent = greg.score_images(more, images, 10, "cifar10", ["absent"])[0]["absent"]
    torch.testing.assert_close(absent, f.softmax(1)[:, 10], rtol=1e-4, atol=1e-6)


def test_options_of_the_gradient_term_leave_the_other_methods_runs_alone():
    line = "table 1 --archs wrn40_2 --seeds 0 --methods energy greg --runs r"
    plain, other = (
        greg.table_runs(greg.parser().parse_args([*line.split(), *words]))
        for words in ([], ["--reduction", "released", "--lambda-grad", "3"])
    )
    changed = [folder for folder, config in other.items() if plain.get(folder) != config]
    assert [folder.parent.name for folder in changed] == ["greg-released"] and len(other) == 3
    assert other[changed[0]].lambda_grad == 3 and "ce" in other[changed[0]].init


def test_an_unfinished_run_has_no_threshold_to_predict_with(pretrained, tmp_path):
    trainer(started_from(pretrained, "energy"), tmp_path).run()
    with pytest.raises(ValueError, match="not finished"):
        greg.predict(tmp_path, [], CPU)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        greg.predict(tmp_path / "nowhere", [], CPU)


CUT = "--archs wrn10_1 --seeds 0 1 --epochs 1 --batch 16 --n-train 160 --methods energy greg"


def test_a_cut_down_table_runs_resumes_and_says_what_it_was_made_on(files, tmp_path, capsys):
    line = ["table", "1", *CUT.split(), "--runs", str(tmp_path), "--ood", *sets(files)]
    line += ["--id", str(files / "id.npz"), "--aux", str(files / "aux.npy")]
    assert greg.main(line) == 0
    first = capsys.readouterr().out
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("results.json")}
    assert len(stamps) == 6  # cross-entropy, energy and GReg with two seeds
    (tmp_path / "id/wrn10_1/greg/seed1/results.json").unlink()
    assert greg.main(line) == 0
    assert capsys.readouterr().out == first
    again = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("results.json")}
    assert sum(again[p] != t for p, t in stamps.items()) == 1
    assert "4 of 20 cells not run" in first and first.count("not run") == 1 + 4
    assert f"auxiliary {files}/aux.npy" in first and "left out: svhn" in first
    cells = json.loads((tmp_path / "table_1.json").read_text())
    cell = next(c for c in cells if c["row"] == "GReg" and c["column"][3] == "fpr95")
    runs = [greg.read_results(tmp_path / f"id/wrn10_1/greg/seed{s}") for s in (0, 1)]
    expected = [100 * r["metrics"]["energy"]["mean"]["fpr95"] for r in runs]
    assert cell["seeds"] == expected
    assert f"{np.mean(expected):.2f} ± {np.std(expected, ddof=1):.2f}" in first
    assert greg.main(["table", "--runs", str(tmp_path)]) == 0
    assert "| wrn10_1 | greg | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize("number", greg.PAPER)
def test_every_cell_of_the_paper_has_a_row_of_methods_and_a_score(number, tmp_path, capsys):
    for method, score, figures in greg.PAPER[number].values():
        assert method in greg.METHODS and score in greg.SCORES
        assert len(figures.split()) == len(greg.COLUMNS[number])
        assert all(0 < float(v) < 100 for v in figures.split())
    assert greg.main(["table", str(number), "--read", "--runs", str(tmp_path)]) == 0
    assert "not run (" in capsys.readouterr().out


def test_averages_of_table_3_are_those_of_its_columns():
    """A check on the figures copied from the paper: its averages round the mean of four sets."""
    for label, (_, _, figures) in greg.PAPER[3].items():
        v = [float(x) for x in figures.split()]
        if label not in ("GReg", "GReg+", "Energy score", "ReAct", "MSP", "Energy loss", "LINe"):
            assert sum(v[0:8:2]) / 4 == pytest.approx(v[8], abs=0.05)


def test_eval_reads_a_public_weights_file(files, pretrained, tmp_path, capsys):
    net = greg.load_run(pretrained, CPU)[0]
    torch.save({"state_dict": renamed(net.state_dict(), "module.", "linear")}, tmp_path / "w.pt")
    line = f"eval --weights {tmp_path}/w.pt --arch wrn10_1 --id {files}/id.npz --out {tmp_path}"
    assert greg.main([*line.split(), "--scores", "msp,energy,line", "--ood", *sets(files)]) == 0
    ours, theirs = greg.read_results(tmp_path), greg.read_results(pretrained)
    for score in "msp", "energy", "line":
        for name, value in theirs["metrics"][score]["cells"].items():
            assert ours["metrics"][score]["cells"][name] == pytest.approx(value, abs=0.02)
    assert greg.main(["eval", str(pretrained), "--ood", *sets(files)]) == 0


def test_a_score_that_is_asked_for_twice_is_taken_once(files, pretrained, tmp_path):
    line = ["eval", str(pretrained), "--ood", sets(files)[0], "--out", str(tmp_path)]
    assert greg.main([*line, "--scores", "energy,msp,energy"]) == 0
    found = greg.read_results(tmp_path)["metrics"]
    theirs = greg.read_results(pretrained)["metrics"]["energy"]
    assert list(found) == ["energy", "msp"]
    name = sets(files)[0].split("=")[0]
    assert found["energy"][name] == theirs[name]


def test_eval_refuses_what_a_network_or_a_run_does_not_have(files, pretrained, capsys):
    for words, message in (
        (["--scores", "absent", "--ood", *sets(files)], "no class K"),
        (["--scores", "absurd"], "unknown score"),
        (["--arch", "resnet18"], "a run knows its own"),
        (["--ood", "available"], "no OOD set"),
        (["--ood", f"id={files}/aux.npy"], "cannot be named 'id'"),
        (["--ood", f"mean={files}/aux.npy"], "cannot be named 'mean'"),
        (["--ood", f"a/b={files}/aux.npy"], "cannot be named 'a/b'"),
    ):
        assert greg.main(["eval", str(pretrained), "--root", "nowhere", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_finished_run_does_not_pass_for_an_evaluation_on_other_sets(files, pretrained):
    config = greg.Config(**greg.read_results(pretrained)["config"])
    done = greg.train(config, pretrained, CPU, greg.DataOptions(ood=(sets(files)[0],)))
    assert done == greg.read_results(pretrained)
    with pytest.raises(ValueError, match="other OOD sets"):
        greg.train(config, pretrained, CPU, greg.DataOptions(ood=("svhn",)))


def test_a_run_that_was_evaluated_twice_is_one_seed(pretrained):
    r = greg.read_results(pretrained)
    old = r | {"config": {k: v for k, v in r["config"].items() if k != "grad_every"}}
    assert greg.results_table([r, old]) == greg.results_table([r])  # an older greg.py wrote it


def test_on_imagenet_every_method_of_a_table_has_its_start():
    words = "table 1 --id imagenet --archs densenet121 --methods openmix greg --seeds 0"
    configs = list(greg.table_runs(greg.parser().parse_args(words.split())).values())
    assert [c.method for c in configs] == ["ce", "openmix", "greg"]
    assert [greg.resolve(c).init != "" for c in configs] == [True] * 3


def test_reading_a_table_refuses_runs_of_another_configuration(files, pretrained, tmp_path, capsys):
    folder = tmp_path / "id/wrn10_1/ce/seed0"
    folder.mkdir(parents=True)
    c = greg.read_results(pretrained)["config"]
    shutil.copy(pretrained / "results.json", folder)
    line = f"table 1 --read --runs {tmp_path} --archs wrn10_1 --methods ce --seeds 0 --id {c['id']}"
    line += f" --batch {c['batch']} --lr {c['lr']} --n-train {c['n_train']} --wd {c['wd']}"
    line += f" --schedule {c['schedule']} --epochs "
    assert greg.main([*line.split(), str(c["epochs"])]) == 0
    assert "not run (52.56)" not in capsys.readouterr().out
    assert greg.main([*line.split(), "77"]) == 2
    assert "-> 77" in capsys.readouterr().err


def test_runs_that_differ_in_more_than_the_seed_are_different_rows(pretrained):
    r = greg.read_results(pretrained)
    other = r | {"config": r["config"] | {"lr": 0.5, "seed": 7}}
    seed = r | {"config": r["config"] | {"seed": 7}}
    rows = [len(greg.results_rows([r, s])) // len(r["metrics"]) for s in (seed, other)]
    assert rows == [1, 2]


def test_images_in_order_of_class_are_mixed_and_others_left_alone():
    y = torch.arange(12) // 4
    x = y.byte().view(-1, 1, 1, 1).expand(-1, 2, 2, 3)
    mixed = greg._mixed(greg.Images(x, y, "sorted"))
    assert torch.equal(mixed.x[:, 0, 0, 0].long(), mixed.y) and len(mixed.y[:6].unique()) == 3
    assert torch.equal(mixed.y.sort().values, y)
    left = greg._mixed(greg.Images(x.flip(0), y.flip(0), "not sorted"))
    assert torch.equal(left.y, y.flip(0))


def test_images_of_another_size_than_the_id_images_are_refused(files):
    with pytest.raises(ValueError, match="auxiliary set synthetic has images .*8×8"):
        greg.load_aux("synthetic", size=8)
    with pytest.raises(ValueError, match="the OOD set strokes"):
        greg.load_ood(["strokes"], size=8)


def test_certify_is_of_the_energy_score_at_the_threshold_of_the_run(
    files, pretrained, tmp_path, capsys
):
    line = ["certify", str(pretrained), "--images", "8", "--draws", "20", "--eps", "0.1"]
    line += ["--ood", *sets(files), "--out", str(tmp_path)]
    assert greg.main(line) == 0
    report = json.loads((tmp_path / "certificates.json").read_text())
    assert report["gamma"] == greg.read_results(pretrained)["gamma"]["energy"]
    assert (tmp_path / "certificates.png").exists() and "| cells | 0.1 |" in capsys.readouterr().out
    state = torch.load(pretrained / "checkpoint.pt", weights_only=True)
    torch.save(state | {"score": "msp"}, tmp_path / "checkpoint.pt")
    assert greg.main(["certify", str(tmp_path)]) == 2


def test_figures_are_written(pretrained, tmp_path, capsys):
    trainer(started_from(pretrained, "energy"), tmp_path / "energy").run()
    for words in ("3", tmp_path / "energy"), ("scores", pretrained):
        out = tmp_path / f"{words[0]}.png"
        assert greg.main(["figure", *map(str, words), "--out", str(out)]) == 0
        assert Image.open(out).size[0] > 500
    assert greg.main(["figure", "3", str(pretrained)]) == 2


@pytest.mark.parametrize(
    "line,message",
    [
        ("train --method greg --id synthetic", "--init"),
        ("train --method ce --id nowhere.npz", "nowhere.npz"),
        ("train --method ce", "--download"),
        ("train --method ce --id synthetic --device cuda:99", "device"),
        ("eval", "--weights"),
        ("eval --weights x.pt --id synthetic --scores best", "unknown score"),
        ("predict nowhere a.png", "nowhere"),
        ("table --runs nowhere", "nowhere"),
        ("figure scores nowhere", "nowhere"),
        ("figure scores a b", "one run folder"),
        ("bench --rounds 0", "--rounds"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(line, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "x.pt" in line:
        torch.save(greg.wrn40_2(10).state_dict(), "x.pt")
    assert greg.main(line.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize("size", ["foo", "5,2", "3,3,5", "5,0,2", "9,2,-2"])
def test_sizes_of_kmeans_that_cannot_be_are_refused(size, capsys):
    with pytest.raises(SystemExit) as e:
        greg.main(["bench", "--kmeans", size])
    assert e.value.code == 2 and size in capsys.readouterr().err.splitlines()[-1]


def test_unknown_options_and_help(capsys):
    with pytest.raises(SystemExit) as e:
        greg.main(["train", "--no-such-option"])
    assert e.value.code == 2
    for name in "demo", "train", "eval", "predict", "table", "figure":
        with pytest.raises(SystemExit) as e:
            greg.main([name, "--help"])
        assert e.value.code == 0
    with pytest.raises(SystemExit):
        greg.main(["train", "--help"])
    assert "ID images a step = clusters k" in capsys.readouterr().out


# ------------------------------------------------------------------------- scripts and README


def bash(*words, **env):
    out = subprocess.run(
        ["bash", *map(str, words)], capture_output=True, text=True, env=os.environ | env
    )
    return out.returncode, out.stdout, out.stderr


def test_the_script_explains_itself_and_refuses_what_it_does_not_know(tmp_path):
    code, out, _ = bash(HERE / "run_cifar.sh", "--help")
    assert code == 0 and "usage" in out
    for words in [], ["cifar11"], ["demo", "--dry"]:
        code, out, err = bash(HERE / "run_cifar.sh", *words)
        assert code == 2 and "usage" in err


@pytest.mark.parametrize("job", ["demo", "cifar10", "cifar100"])
def test_a_dry_run_prints_commands_that_parse_and_runs_nothing(job, tmp_path):
    env = {"RUNS": str(tmp_path / "a b"), "SEEDS": "0 3", "OOD": "svhn x=y.npy", "EXTRA": "--amp"}
    code, out, _ = bash(HERE / "run_cifar.sh", job, "--dry-run", **env)
    assert code == 0 and not list(tmp_path.iterdir())
    lines = [line for line in out.splitlines() if line.startswith("+ ")]
    assert lines
    for line in lines:
        words = line[line.index("greg.py") + 8 :].replace("a b", "a_b").split(" ")
        args = greg.parser().parse_args(words)
        if job != "demo":
            assert args.seeds == [0, 3] and args.amp and args.ood == ["svhn", "x=y.npy"]


IMAGENET = {"CLASSES": "n03,n01", "ARCHS": "wrn10_1", "METHODS": "oe", "SEEDS": "0", "WORKERS": "1"}
IMAGENET |= {"EXTRA": "--size 32 --epochs 1 --batch 8 --lr 0.01 --sync-bn", "OMP_NUM_THREADS": "1"}


def test_the_imagenet_script_runs_with_one_process_and_with_two(tree, tmp_path):
    env = IMAGENET | {"PYTHON": sys.executable, "IMAGENET": str(tree / "imagenet")}
    env |= {"ROOT": str(tmp_path / "data"), "OOD": f"sea={tree}/sea"}
    tables = []
    for gpus in "1", "2":
        runs = tmp_path / gpus
        code, out, err = bash(HERE / "run_imagenet.sh", GPUS=gpus, RUNS=str(runs), **env)
        assert code == 0, err
        assert "Table 3" in out and "Traceback" not in err
        tables.append(json.loads((runs / "table_3.json").read_text()))
    ran = [[c["seeds"] for c in table if c["seeds"]] for table in tables]
    assert len(ran[0]) == len(ran[1]) == 14  # MSP to LINe and OE: mean FPR95 and AUROC
    folders = [tmp_path / n / "imagenet:n03,n01" / "wrn10_1" / "ce" / "seed0" for n in "12"]
    one, two = map(weights, folders)  # of the same images, in one batch or in two halves
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_the_imagenet_script_explains_itself_and_a_dry_run_runs_nothing(tmp_path):
    code, out, _ = bash(HERE / "run_imagenet.sh", "--help")
    assert code == 0 and "usage" in out
    for words, env in (["--dry"], {}), (["", "--dry-run"], {}), ([], {"GPUS": "0,1"}):
        code, _, err = bash(HERE / "run_imagenet.sh", *words, **env)
        assert code == 2 and "usage" in err
    env = {"RUNS": str(tmp_path / "runs"), "ROOT": str(tmp_path / "data"), "GPUS": "8"}
    code, out, _ = bash(HERE / "run_imagenet.sh", "--dry-run", CLASSES="20", EXTRA="--amp", **env)
    assert code == 0 and not list(tmp_path.iterdir()) and "--nproc_per_node=8" in out
    args = greg.parser().parse_args(out.split()[out.split().index("table") :])
    assert (args.number, args.id, args.amp) == (3, "imagenet:20", True)
    assert all(c.id == "imagenet:20" for c in greg.table_runs(args).values())
    code, _, err = bash(HERE / "run_imagenet.sh", IMAGENET=str(tmp_path / "none"), **env)
    assert code == 2 and "no folder" in err


PAPER_MAP = [  # what in the paper, which definitions
    ("f(x) = W h(x) + b, Section 3.1", ["Net", "resnet18", "wrn40_2", "densenet100"]),
    ("S(x) = −LSE(f(x)), Section 3.2", ["energy_score"]),
    ("Eq. (1), energy loss", ["energy_loss"]),
    ("Eq. (3), gradient loss", ["gradient_norm", "gradient_loss"]),
    ("L = L_CE + λ_S L_S + λ_∇S L_∇S, Section 4.1", ["greg_loss"]),
    ("Algorithm 1, energy-based sampling", ["kmeans", "energy_sampling"]),
    ("Eq. (4), certified radius", ["certified_radius"]),
    ("L_S, Section 5", ["lipschitz_global", "lipschitz_local"]),
    ("f(x') = Ax' + b on B(x, ε̂), Section 5", ["linear_region", "id_radius", "ood_radius"]),
    ("post-hoc methods, Section 2.1", ["msp", "odin", "react", "dice", "line"]),
    ("FPR95, AUROC, Section 6.1", ["fpr_at_tpr", "auroc"]),
    ("training protocol, Section 6.1", ["METHODS", "RECIPES", "Trainer"]),
    ("Tables 1–6", ["PAPER", "paper_table"]),
    ("Figures 1 and 3", ["figure_1", "figure_3"]),
]


def paper_map():
    """The README's table of equations, definitions and their lines."""
    lines = {}
    for node in ast.parse((HERE / "greg.py").read_text()).body:
        names = [getattr(node, "name", None)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [getattr(t, "id", None) for t in targets]
        lines |= {name: (node.lineno, node.end_lineno) for name in names}
    rows = []
    for what, names in PAPER_MAP:
        code = ", ".join(f"`{name}`" for name in names)
        links = ["[{0}–{1}](greg.py#L{0}-L{1})".format(*lines[name]) for name in names]
        rows.append(f"| {what} | {code} | {', '.join(links)} |")
    return "\n".join(rows)


class Flops(TorchDispatchMode):
    """Counts the arithmetic of convolutions and matrix products by PyTorch's own formulas."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def test_steps_do_no_more_arithmetic_than_bench_counts():
    methods = ["ce", "energy", "greg", "energy+sampling", "greg+", "dos"]
    jobs, passes = greg.bench_steps("wrn10_1", 2, methods, CPU)
    flops = {}
    for name, job in jobs.items():
        with Flops() as counter:
            job()
        flops[name] = counter.total
    for name in jobs:  # a plain step alone leaves out the gradient at the images: 1 %
        ratio = passes[name] / passes["ce"]
        assert flops[name] / flops["ce"] == pytest.approx(ratio, rel=0.03)


def test_bench_prints_a_row_for_every_job(monkeypatch, capsys):
    monkeypatch.setattr(greg.time, "sleep", lambda seconds: None)
    for name in "bench_augment", "bench_metrics":  # of fewer images and scores
        job = getattr(greg, name)
        monkeypatch.setattr(greg, name, lambda n, device, job=job: job(50, device))
    line = "bench --archs wrn10_1 --batch 2 --rounds 1 --methods ce greg+ --amp --parts"
    line += " --kmeans 30,3,4"
    assert greg.main(line.split()) == 0
    table = [row.split(" | ") for row in capsys.readouterr().out.splitlines() if row[:2] == "| "]
    jobs = [row[1] for row in table[2:]]
    assert jobs[:2] == ["ce", "greg+"] and jobs.count("greg+") == 4
    assert {"ours", "torchvision, image by image", "the sort alone"} <= set(jobs)
    assert all(float(row[4]) > 0 for row in table[2:])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_for_the_next_tensors():
    """Page faults of making and freeing tensors of 64 MiB, before and after."""
    script = """
import greg, resource, torch

def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

before = faults()
greg.keep_freed_memory()
faults()
print(before, faults())
"""
    out = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True)
    before, after = map(int, out.stdout.split())
    assert after < before / 10


def test_an_older_glibc_and_another_library_are_provided_for(monkeypatch):
    """glibc before 2.35 refuses a threshold of 1 GiB (returns 0): there no block may be mapped."""
    calls = []

    def mallopt(option, value):
        calls.append((option, value))
        return option != -3

    monkeypatch.setattr(greg.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    greg.keep_freed_memory()
    assert calls == [(-3, 2**30), (-4, 0), (-1, -1)]
    monkeypatch.setattr(greg.ctypes, "CDLL", lambda name: SimpleNamespace())
    greg.keep_freed_memory()


@pytest.mark.parametrize(
    "line,device,kept",
    [
        ("bench --rounds 0", "cpu", True),
        ("bench --rounds 0 --system-allocator", "cpu", False),
        ("predict nowhere image.png", "cpu", True),
        ("predict nowhere image.png", "cuda", False),
    ],
)
def test_commands_on_a_cpu_keep_freed_memory(line, device, kept, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(greg, "keep_freed_memory", lambda: called.append(True))
    monkeypatch.setattr(greg, "pick_device", lambda name: torch.device(device))
    assert greg.main(line.split()) == 2  # after the choice of the device
    assert bool(called) == kept


def test_the_released_baseline_is_the_released_procedure(monkeypatch):
    """Features of all candidates in one forward, then two forwards in training mode."""

    class KMeans:
        def __init__(self, k, n_init):
            self.k = k

        def fit(self, z):
            self.labels_ = np.arange(len(z)) % self.k
            return self

    for name in "sklearn", "sklearn.cluster":
        module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None))
        module.KMeans = KMeans
        monkeypatch.setitem(sys.modules, name, module)
    net, seen = greg.build("wrn10_1", 3), []
    net.features.register_forward_hook(lambda m, x, out: seen.append((len(out), m.training)))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x, y, candidates = torch.rand(8, 3, 32, 32), torch.arange(8) % 3, torch.rand(48, 3, 32, 32)
    greg.released_step(net, optimizer, x, y, candidates)
    assert seen == [(48, False), (24, True), (24, True)]


def test_the_map_of_the_readme_is_that_of_the_module():
    assert f"<!-- map -->\n{paper_map()}\n<!-- /map -->" in (HERE / "README.md").read_text()


def fenced(language):
    text = (HERE / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_commands_in_the_readme_parse():
    blocks = fenced("bash")
    # The shell itself expands loops and variables; a function in python's place prints its words.
    scripts = [f'python() {{ echo "$*"; }}\n{b}' for b in blocks if "python greg.py" in b]
    codes, printed, _ = zip(*(bash("-euc", script) for script in scripts), strict=True)
    calls = "".join(printed).splitlines()
    assert not any(codes) and len(calls) >= 30
    for call in calls:
        script, *words = call.split()
        assert script == "greg.py"
        greg.parser().parse_args(words)
    for line in (line for block in blocks for line in block.splitlines()):
        if "run_cifar.sh" in line:
            assert bash("-c", line + " --dry-run")[0] == 0


def test_the_loop_of_the_readme_runs():
    net = seeded(0, lambda: greg.wrn(10, 1, 10))
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    x = normal(0, 28, 3, 8, 8, dtype=torch.float32)
    loaders = {"id_loader": [(x[:4], torch.arange(4))], "auxiliary_loader": [x[4:]]}
    before = net.fc.weight.clone()
    exec(fenced("python")[0], {"net": net, "optimizer": optimizer} | loaders)
    assert not torch.equal(before, net.fc.weight)


def test_a_new_row_of_the_readme_is_a_method(monkeypatch):
    monkeypatch.setattr(greg, "METHODS", dict(greg.METHODS))
    exec(fenced("python")[1], {})
    assert isinstance(greg.METHODS["mine"], greg.Method)


if __name__ == "__main__":  # rewrite the map
    readme = (HERE / "README.md").read_text()
    head, rest = readme.split("<!-- map -->\n")
    tail = rest[rest.index("<!-- /map -->") :]
    (HERE / "README.md").write_text(f"{head}<!-- map -->\n{paper_map()}\n{tail}")
