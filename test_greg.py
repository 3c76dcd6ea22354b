"""Tests of greg.py, section by section: properties against independent oracles.

pytest                                   a few minutes on two CPU cores
HYPOTHESIS_PROFILE=thorough pytest       many more examples
"""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, register_random, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

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


def test_a_compiled_network_is_refused_where_double_backward_may_be_wrong():
    net = nn.Linear(2, 3)
    compiled = nn.Linear(2, 3)
    compiled.compile()
    x, y = torch.randn(2, 2), torch.tensor([0])
    for bad in torch.compile(net), compiled:
        with pytest.raises(ValueError, match="compile"):
            greg.greg_loss(bad, x[:1], y, x[1:])


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
    mean, factor = greg.poem_posterior(torch.tensor([[4.0]]), torch.tensor([6.0]), 2.0, 0.5)
    assert mean.item() == pytest.approx((6 / 0.5) / (4 / 0.5 + 1 / 2))
    draws = torch.stack([greg.poem_draw(mean, factor, generator(i)) for i in range(4000)])
    assert draws.mean().item() == pytest.approx(mean.item(), abs=0.03)
    assert draws.var().item() == pytest.approx(1 / 8.5, rel=0.1)
    gram = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    mean, factor = greg.poem_posterior(gram, torch.zeros(2), 20.0, 0.5)
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
    assert greg.percentile(v, p) == pytest.approx(np.percentile(v.numpy(), p), rel=1e-9, abs=1e-12)


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
    activation, weight = greg.line_masks(means, W, p_a, p_w)
    ours = greg.line(z, W, b, activation, weight, 0.8)
    for i in range(12):
        h = z[i].clamp(max=0.8)
        c = (W @ h + b).argmax()
        m = s[c] > np.percentile(s[c].numpy(), p_a) + 1e-12
        V = s[c].abs() * W
        M = V > np.percentile(V.numpy(), p_w) + 1e-12
        f = (W * M) @ (h * m) + b
        assert ours[i].item() == pytest.approx(-torch.logsumexp(f, 0).item(), rel=1e-9)


@given(seeds)
def test_masking_weights_by_whole_rows_or_columns_never_raises_the_spectral_norm(seed):
    """Section 5 of the paper on LINe's activation masks; it is not true of single weights."""
    z, W, b = head(seed)
    activation, _ = greg.line_masks(z[:4], W, 40.0, 40.0)
    norm = torch.linalg.matrix_norm(W, 2)
    for mask in activation:
        assert torch.linalg.matrix_norm(W * mask, 2) <= norm + 1e-12


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
    monkeypatch.setattr(greg, "greg_loss", lambda *a: seen.append(a) or loss(*a))
    before = {k: v.clone() for k, v in t.net.state_dict().items()}
    terms = t.train_step()
    net, x_in, y_in, x_aux = seen[0][:4]
    again = greg.wrn(10, 1, 10)
    again.load_state_dict(before)
    out = loss(again.train(net.training), x_in, y_in, x_aux)
    torch.testing.assert_close(torch.stack(out[:4]), terms[:4], rtol=1e-5, atol=1e-6)
    assert len(x_in) == len(x_aux) == 16


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


@given(st.integers(100, 3000), st.integers(1, 12), st.integers(1, 3))
def test_every_auxiliary_image_is_a_candidate_each_epoch(n_aux, steps, world):
    """Section 6.1, "so that no auxiliary sample is missed", over all steps and ranks."""
    seen = []
    t = object.__new__(greg.Trainer)
    t.config = greg.resolve(greg.Config("greg+"))
    t.config = greg.replace(t.config, batch=2 * world)
    t.method, t.device, t.share = greg.METHODS["greg+"], CPU, 2
    t.steps, t.world, t.order_aux = steps, world, torch.randperm(n_aux)
    t.aux_set, t.net = None, None
    t.batch = lambda images, i, g: seen.append(i) or torch.zeros(len(i), 1)
    sampler = greg.Sampler(2, lambda f, z, k, g: torch.arange(2 * k))
    t.method = greg.replace(t.method, sampler=sampler)
    t.config = greg.replace(t.config)
    embed, greg.embed = greg.embed, lambda net, x, amp: (x, x)
    try:
        for t.step in range(steps):
            for t.rank in range(world):
                t.auxiliary(None)
    finally:
        greg.embed = embed
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
@pytest.mark.parametrize("stop_at", [(0, 2), (1, 1)])
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


def test_the_checkpoint_before_a_damaged_one_is_used_and_said(pretrained, tmp_path, capsys):
    config = started_from(pretrained, "energy")
    trainer(config, tmp_path).run()
    whole = weights(tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000])
    t = trainer(config, tmp_path)
    t.run()
    assert "damaged" in capsys.readouterr().err and torch.equal(weights(tmp_path), whole)
    for name in "checkpoint.pt", "checkpoint.prev.pt":
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no intact checkpoint"):
        trainer(config, tmp_path).run()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    greg.write_json(path, {"a": 1})

    def fails(temporary):
        temporary.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError):
        greg.write_atomically(path, fails, keep="value.prev.json")
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(ValueError):
        greg.write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}


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
        ({"stats": "mnist"}, "stats"),
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
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(line, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "x.pt" in line:
        torch.save(greg.wrn40_2(10).state_dict(), "x.pt")
    assert greg.main(line.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and "Traceback" not in err


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
