#!/usr/bin/env python3
"""greg: Gradient-Regularized Out-of-Distribution Detection, the paper as one module.

Sharifi et al., ECCV 2024, arXiv 2404.12368. "Section" means the paper's; this file's parts are 1-9:
1-6 (method, certificates, rivals, metrics) import torch alone, one function SciPy; "# Needs:" names
what each takes of other parts; 7-9 run them. GReg alone, to be read first: 2, 3 and of 8 `Sampler`,
`Method`, METHODS "greg", "greg+", RECIPES "finetune", "greg+", `embed`, `batches`, `train_epoch`.

    1  Networks            3.1, 6.1         f(x) = W h(x) + b: ResNet-18, WRN-40-2, DenseNet
    2  Scores and losses   3.2, 4.1         S = -LSE(f), Eq. (1), Eq. (3), GReg
    3  Sampling            4.2, Alg. 1      features of any network, K-Means, energy-based sampling
    4  Certificates        5, Eq. (4)       certified radii, smoothing, attacks
    5  Compared methods    2.1, 2.2         MSP, ODIN, ReAct, DICE, LINe; OE, NTOM, POEM, DOS, ...
    6  Metrics             6.1              FPR95, AUROC; AUPR, which the paper has not
    7  Data                6.1              CIFAR, ImageNet, auxiliary and OOD sets, yours, built-in
    8  Training            4, 6.1           the table of methods, the loop, checkpoints, speed
    9  Evaluation          6                evaluate, predict, Tables 1-6, figures, command line

Notation: S, s the score, LOW MEANS ID everywhere; margins m_in, m_aux; f logits, z = h(x) features
(in 4: logits); ID iff s <= gamma; N images, n ID, m auxiliary; K classes, d features, k clusters.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import copy
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Rng = torch.Generator | None
Score = Callable[[Tensor], Tensor]  # logits [N,K] -> [N]; in 4, for smoothing: images -> [N]

# ==================================================================================================
# 1  Networks: f(x) = W h(x) + b (Sections 3.1 and 6.1)
# Needs: nothing


class Net(nn.Module):
    """f(x) = W h(x) + b (Section 3.1): `features` is h, [N,C,H,W] -> [N,d]; `fc` holds W and b."""

    def __init__(self, features: nn.Module, d: int, K: int):
        super().__init__()
        self.features, self.fc = features, nn.Linear(d, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class Residual(nn.Module):
    """x -> body(x) + shortcut(x); without a shortcut body(x) + x."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None):
        super().__init__()
        self.body, self.shortcut = body, nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class Concat(Residual):
    """x -> [x, body(x)] along the channels: a Residual that joins instead of adding."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.shortcut(x), self.body(x)], dim=1)


class Normalize(nn.Module):
    """(x - mean) / std for x [N,C,H,W] in [0,1], as a layer that can stand before a Net."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        for name, v in ("mean", mean), ("std", std):
            self.register_buffer(name, torch.tensor(v, dtype=torch.float).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _conv(c_in, c_out, kernel, stride=1):
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)


def _bn_relu_conv(c_in, c_out, kernel, stride=1):
    return [nn.BatchNorm2d(c_in), nn.ReLU(), _conv(c_in, c_out, kernel, stride)]


def _net(layers, d, K, fan):
    """The layers, BN-ReLU, global mean, head of bias 0; He initialisation by `fan`."""
    pool = [nn.BatchNorm2d(d), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = Net(nn.Sequential(*layers, *pool), d, K)
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        nn.init.kaiming_normal_(conv.weight, mode=fan, nonlinearity="relu")
    nn.init.zeros_(net.fc.bias)
    return net


def resnet18(K: int) -> Net:
    """ResNet-18 (He et al. 2016), 3×3 stem for 32×32 images, d = 512; PyTorch's initialisation."""
    layers, c_in = [_conv(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU()], 64
    for c in 64, 64, 128, 128, 256, 256, 512, 512:
        stride = 1 if c == c_in else 2
        body = [_conv(c_in, c, 3, stride), *_bn_relu_conv(c, c, 3), nn.BatchNorm2d(c)]
        shortcut = [] if c == c_in else [_conv(c_in, c, 1, stride), nn.BatchNorm2d(c)]  # [] is x
        layers += [Residual(nn.Sequential(*body), nn.Sequential(*shortcut)), nn.ReLU()]
        c_in = c
    return Net(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 512, K)


def wrn(depth: int, width: int, K: int) -> Net:
    """Wide ResNet (Zagoruyko & Komodakis 2016) without dropout, d = 64·width, depth = 6·n + 4."""
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6 n + 4 (10, 16, 22, 28, ...), got {depth}")
    layers, c_in, n = [_conv(3, 16, 3)], 16, (depth - 4) // 6
    for stage, block in itertools.product(range(3), range(n)):
        c, stride = 16 * width * 2**stage, (2 if stage and not block else 1)
        body = [*_bn_relu_conv(c_in, c, 3, stride), *_bn_relu_conv(c, c, 3)]
        if c_in == c:
            layers += [Residual(nn.Sequential(*body))]
        else:  # where shapes change, the shortcut too starts after the first BN-ReLU
            layers += [*body[:2], Residual(nn.Sequential(*body[2:]), _conv(c_in, c, 1, stride))]
        c_in = c
    return _net(layers, 64 * width, K, "fan_out")


def wrn40_2(K: int) -> Net:
    """WRN-40-2, d = 128: assumed to be the paper's WRN-40."""
    return wrn(40, 2, K)


def _densenet(layers, c, blocks, growth, K, fan):
    """DenseNet-BC (Huang et al. 2017) from c channels: bottlenecks 4·growth, transitions halve."""
    for b, n in enumerate(blocks):
        if b:
            layers += [*_bn_relu_conv(c, c // 2, 1), nn.AvgPool2d(2)]
            c //= 2
        for _ in range(n):
            body = [*_bn_relu_conv(c, 4 * growth, 1), *_bn_relu_conv(4 * growth, growth, 3)]
            layers += [Concat(nn.Sequential(*body))]
            c += growth
    return _net(layers, c, K, fan)


def densenet100(K: int) -> Net:
    """DenseNet-BC, 100 layers, growth 12, d = 342: assumed to be the paper's "DenseNet-101"."""
    return _densenet([_conv(3, 24, 3)], 24, (16, 16, 16), 12, K, "fan_out")


def densenet121(K: int) -> Net:
    """DenseNet-121 for 224×224 images, d = 1024; in torchvision's order, so its weights fit."""
    stem = [_conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return _densenet(stem, 64, (6, 12, 24, 16), 32, K, "fan_in")


ARCHS = {net.__name__: net for net in (resnet18, wrn40_2, densenet100, densenet121)}
ARCHS["wrn10_1"] = lambda K: wrn(10, 1, K)  # small enough for a CPU; not in the paper


# ==================================================================================================
# 2  Scores and losses (Sections 3.2 and 4.1)
# Needs: nothing


def energy_score(logits: Tensor) -> Tensor:
    """S(x) = -LSE(f(x)) (Section 3.2), low for ID: logits [N,K] -> [N], in float32 or wider."""
    return -logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(dim=1)


def energy_loss(s_in: Tensor, s_aux: Tensor, m_in: float = -25.0, m_aux: float = -7.0) -> Tensor:
    """Eq. (1): mean 1[s_in >= m_in] (s_in - m_in)² + mean 1[s_aux <= m_aux] (m_aux - s_aux)² (means
    over all of s_in [n] and s_aux [m], zeros too) -> scalar. Margins: from the paper's code."""
    if not all(s.numel() == len(s) > 0 for s in (s_in, s_aux)):
        raise ValueError(f"need ID and auxiliary scores, got {[*s_in.shape]} and {[*s_aux.shape]}")
    return F.relu(s_in - m_in).square().mean() + F.relu(m_aux - s_aux).square().mean()


def gradient_norm(s: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """mask_i ‖∂(Σ_j mask_j s_j)/∂x_i‖₂ for all i, differentiable; s [N] or [N,1], x [N,...] -> [N].

    mask: 0 or 1. In eval mode s_i depends on x_i alone: mask_i ‖∇S(x_i)‖. In training mode batch
    norm ties s_j to every x_i: mask_j drops s_j, mask_i the norm. ValueError: gradients off."""
    if not (x.requires_grad and s.requires_grad and torch.is_grad_enabled()):
        raise ValueError("∇S needs x.requires_grad_() first, no torch.no_grad(), or lambda_grad=0")
    mask = torch.ones_like(s) if mask is None else mask.to(s.dtype).view_as(s)
    (g,) = torch.autograd.grad((s * mask).sum(), x, create_graph=True, allow_unused=True)
    if g is None or s.numel() != len(x):
        raise ValueError("need one score for each x, computed from it, not under torch.no_grad()")
    return torch.linalg.vector_norm(g.flatten(1), dim=1) * mask.flatten()  # at g = 0, ∇‖g‖ is 0


def gradient_loss(
    s: Tensor, x: Tensor, n_in: int, m_in: float = -25.0, m_aux: float = -7.0, reduction="paper"
) -> Tensor:
    """Eq. (3): mean ‖1[s_in <= m_in] ∇S(x_in)‖ + mean ‖1[s_aux >= m_aux] ∇S(x_aux)‖.

    Norm 0 where Eq. (1) still pushes. Of s [N] and x [N,...] the first n_in are ID. In training
    mode ∇S is `gradient_norm`'s. "released": Eq. (3) / len(s), the scale of the authors' code."""
    if reduction not in ("paper", "released") or not 0 < n_in < len(s):
        raise ValueError(f"need paper or released, 0 < n_in < N: {reduction=}, {n_in=}, {len(s)=}")
    norm = gradient_norm(s, x, torch.cat([s[:n_in] <= m_in, s[n_in:] >= m_aux]))
    return (norm[:n_in].mean() + norm[n_in:].mean()) / (1 if reduction == "paper" else len(s))


def _logits(f):  # logits, (logits, ...) or {"logits": ...} -> logits
    return f["logits"] if isinstance(f, Mapping) else f[0] if isinstance(f, (tuple, list)) else f


# The objective, its terms unweighted (energy: Eq. (1) or aux_loss), logits [n+m,K], scores [n+m].
GregLoss = namedtuple("GregLoss", "loss ce energy gradient logits scores")


@sdpa_kernel(SDPBackend.MATH)  # fused attention has no second derivative, which Eq. (3) needs
def greg_loss(
    net: nn.Module, x_in: Tensor, y_in: Tensor, x_aux: Tensor, m_in: float = -25.0,
    m_aux: float = -7.0, lambda_s: float = 0.1, lambda_grad: float = 1.0, reduction: str = "paper",
    score: Score = energy_score, aux_loss: Callable[..., Tensor] | None = None,
) -> GregLoss:  # fmt: skip
    """GReg (Section 4.1): L = L_CE + lambda_s · Eq. (1) + lambda_grad · Eq. (3), in one forward.

    x_in [n,...], y_in [n] labels or [n,K] probabilities, x_aux [m,...]. `net`: any module giving
    logits [n+m,K], as such, first in a tuple, or as "logits" in a mapping. For other methods (Table
    4) aux_loss(f_in, f_aux, y_in) replaces Eq. (1); `score` replaces S (low for ID; m_in, m_aux on
    its scale). ∇S is with respect to x as passed (normalised, say); no gradient flows back into x.
    ValueError: x_in empty; x_aux empty for (1), at lambda_s = 0 too, or (3); m_in >= m_aux for (1);
    sizes or dtypes that differ, or integers; for (3) a part of `net` compiled, or in DDP with
    static_graph. Checkpointed attention: backward() too under `sdpa_kernel(SDPBackend.MATH)`."""
    if aux_loss is None and not -math.inf < m_in < m_aux < math.inf:
        raise ValueError(f"need finite m_in < m_aux (low means ID), got {m_in}, {m_aux}")
    n, kinds = len(x_in), [f"{x.dtype} {[*x.shape[1:]]}" for x in (x_in, x_aux)]
    if not n or kinds[0] != kinds[1] or not x_in.is_floating_point():
        raise ValueError(f"need float ID and auxiliary images of one size: {n} ID, {kinds}")
    for m in net.modules() if lambda_grad else ():
        # Marks of torch.compile(m), m.compile(), DDP(static_graph=True); then compile(m.forward).
        marks = [getattr(m, k, None) for k in ("_orig_mod", "_compiled_call_impl", "static_graph")]
        if any(marks) or hasattr(getattr(m, "forward", None), "get_compiler_config"):
            raise ValueError(f"{type(m).__name__} is compiled or has static_graph: Eq. (3) is lost")
    x = torch.cat([x_in, x_aux]).detach().requires_grad_(bool(lambda_grad))
    f = _logits(net(x.clone()))  # a copy: net's first layer may work in place
    s, y_in = score(f), torch.as_tensor(y_in, device=f.device)
    y_in = y_in if y_in.is_floating_point() else y_in.long()  # float: probabilities
    f_in, f_aux = f.to(s.dtype).split([n, len(x_aux)])  # S is float32, under autocast too
    ce = F.cross_entropy(f_in, y_in)
    energy = aux_loss(f_in, f_aux, y_in) if aux_loss else energy_loss(s[:n], s[n:], m_in, m_aux)
    gradient = gradient_loss(s, x, n, m_in, m_aux, reduction) if lambda_grad else ce.new_zeros(())
    return GregLoss(ce + lambda_s * energy + lambda_grad * gradient, ce, energy, gradient, f, s)


# ==================================================================================================
# 3  Sampling (Section 4.2, Algorithm 1)
# Needs: _logits (2)


def features_and_logits(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """z = h(x) [N,d], f(x) [N,K]: input and output of the linear layer that the network ends in.
    ValueError if f is not that layer's own tensor (f / T, say); f changed in place goes unseen."""
    caught = []  # (layer, positional inputs, output) of linear layers, before other hooks alter it
    with contextlib.ExitStack() as hooks:
        for m in (m for m in net.modules() if isinstance(m, nn.Linear)):
            hooks.enter_context(m.register_forward_hook(lambda *a: caught.append(a), prepend=True))
        f = _logits(net(x))
    for _, args, output in caught:
        if args and output is f and f.dim() == 2:  # args is () if z was passed by keyword
            return args[0], f
    raise ValueError(f"{type(net).__name__} gives no [N,K] of a linear layer, or is compiled")


@contextlib.contextmanager
def eval_mode(net: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside, and after it every module in the mode that it had before."""
    modes = [(m, m.training) for m in net.modules()]
    try:
        yield net.eval()
    finally:
        for m, training in modes:
            m.train(training)  # not the flag alone: LoRA's train() undoes what its eval() did
        for m, training in modes:  # again: train() recurses, so a later parent may reset a child
            m.training = training


def energy_sampling(z: Tensor, s: Tensor, k: int, generator: Rng = None, ends=(0, -1)) -> Tensor:
    """Algorithm 1, lines 2-8 (1: `features_and_logits`): z [N,d], s [N] -> len(ends)·k indices.

    Of each of k = n_ID clusters of normalised z the lowest s (ends 0), meant for Eq. (1), and the
    highest (-1), for Eq. (3); but `greg_loss` gives all 2k to both, and their margins decide. What
    clusters of one or none lack is drawn from the rest, and comes last. All distinct. ends=(0,), s
    = `absent`(f): DOS (Jiang et al. 2024). ValueError: N < len(ends)·k, NaN in s, z not finite."""
    n = len(ends) * k
    if s.shape != z.shape[:1] or k < 1 or n > len(s) or s.isnan().any():
        of = f"{len(z)} candidates (scores {list(s.shape)}, {int(s.isnan().sum())} of them NaN)"
        raise ValueError(f"cannot draw {n} from {of} in {k} clusters")
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    z_hat = F.normalize(F.normalize(z, p=math.inf, eps=1e-30))  # line 2; max first: no overflow
    labels, _, _ = kmeans(z_hat, k, generator=generator)  # line 3
    order, chosen = s.argsort(stable=True), torch.zeros_like(s, dtype=torch.bool)
    for j in labels.unique():  # line 4
        ranked = order[labels[order] == j]  # line 5: I, by score
        chosen[ranked[list(ends)]] = True  # line 6
    lottery = torch.rand(len(s), generator=generator, device=s.device)
    return (lottery + 2 * chosen).topk(n).indices  # line 8: the chosen (>= 2), then others (< 1)


# ---- K-Means, line 3 of Algorithm 1.
def kmeans(
    x: Tensor, k: int, n_init: int = 3, max_iter: int = 100, tol=1e-4, generator: Rng = None
) -> tuple[Tensor, Tensor, Tensor]:
    """K-Means (Lloyd 1982): x [N,d] -> labels [N] int64, centroids [k,d], inertia (a scalar).

    The best of `n_init` tries, in float32 or float64; each ends when the squared moves of all its
    centroids sum to at most tol times the mean variance of a feature. Labels: the nearest centroid.
    An empty cluster moves to the point farthest from its nearest centroid. With fewer distinct
    points than k, or at max_iter, some stay empty. ValueError: x not finite; k < 1, > N."""
    if x.dim() != 2 or not 1 <= k <= len(x) or min(n_init, max_iter) < 1 or not x.isfinite().all():
        got = f"x {[*x.shape]}, {(~x.isfinite()).sum()} not finite, {k=}, {n_init=}, {max_iter=}"
        raise ValueError(f"need finite x [N,d], 1 <= k <= N and at least one try, got {got}")
    runs = []
    with torch.autocast(x.device.type, enabled=False):
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        scale = x.abs().max().clamp(min=torch.finfo(x.dtype).tiny)  # so that no square overflows
        centre = (x / scale).mean(0)
        x = x / scale - centre  # centred, else ‖x‖² - 2 x·c + ‖c‖² cancels
        square = x.square().sum(1)
        for _ in range(n_init):
            c, moved = _seeds(x, square, k, generator), math.inf
            for i in range(max_iter + 1):  # the last pass only assigns, so that labels fit c
                nearest, labels = torch.addmm(c.square().sum(1), x, c.mT, alpha=-2).min(1)
                distance = nearest + square  # squared: ‖x - c‖² = (‖c‖² - 2 x·c) + ‖x‖²
                if i == max_iter or moved <= tol * square.mean() / x.shape[1]:
                    break
                member = F.one_hot(labels, k).to(x.dtype)  # [N,k]
                size = member.sum(0)
                means = member.mT @ x / size[:, None]
                means[size == 0] = x[distance.topk(int((size == 0).sum())).indices]  # farthest
                moved, c = (means - c).square().sum(), means
            runs.append((distance.sum().item(), labels, c))
    _, labels, c = min(runs, key=lambda run: run[0])
    return labels, (c + centre) * scale, ((x - c[labels]) * scale).square().sum()


def _seeds(x, square, k, generator):
    """Greedy k-means++ (Arthur & Vassilvitskii 2007) -> [k,d]; x centred, square = ‖x‖². For speed
    only among 16·k points (or all), drawn ∝ square + its mean (odds of Bachem et al. 2018); the
    first is seed one. Each next: draw 2 + ⌊ln k⌋ ∝ squared distance to the nearest seed, keep the
    one that leaves the least sum of these. Memory: two [16·k,16·k] matrices, 2 GiB at k = 1,000."""
    weight = square.mean() + square + 1e-30  # 1e-30: if all x are equal
    sample = x[torch.multinomial(weight, min(16 * k, len(x)), generator=generator)]
    distances = torch.cdist(sample, sample).square()
    chosen, closest, tries = [sample[0]], distances[0], 2 + int(math.log(k))
    for _ in range(1, k):
        i = torch.multinomial(closest + 1e-30, tries, replacement=True, generator=generator)
        nearer = torch.minimum(distances[i], closest)  # [tries,sample]: `closest`, if i were a seed
        best = nearer.sum(1).argmin()
        closest = nearer[best]
        chosen.append(sample[i[best]])
    return torch.stack(chosen)


# ==================================================================================================
# 4  Certificates (Section 5, Eq. (4))
# Needs: Net, Residual, Concat, Normalize (1), energy_score, _logits (2), and SciPy for smoothing.

# Eq. (4) wants L_S: `lipschitz_global` gives it for all x, `lipschitz_local` for a ball. Where the
# network is linear, `linear_region` with `id_radius`, `ood_radius` needs none. `certify`: all.
# "Sound": true of the network in real arithmetic with the stored weights, in eval mode, in the
# units of its input. Against float64's rounding norms go up by 1e-9, radii of `certify` and the
# shares of smoothing down, boxes up by 1e-14: enough unless sums cancel, not for a float32 network.
_UP, _DOWN = 1 + 1e-9, 1 - 1e-9
Region = namedtuple("Region", "z A eps_hat")  # of `linear_region`
# Inputs x' found, their scores [N], whether the decision flipped, ‖x' - x‖ (inf if it did not).
Attack = namedtuple("Attack", "x s flipped distance")


def certified_radius(s: Tensor, gamma: float, lipschitz: Any, eps: Any = math.inf) -> Tensor:
    """Eq. (4): ε* = min(ε, |γ - S(x)| / L_S) [N] in float64, on either side of γ, 0 on it.

    Sound on B(x, ε*), for OOD its interior, if S is lipschitz-Lipschitz on B(x, ε). ‖∇S(x)‖ will
    do for ID inside the linear region (`id_radius`). L_S, eps: one or [N], never below 0."""
    wide = functools.partial(torch.as_tensor, dtype=torch.float64, device=s.device)
    s, gamma, lipschitz, eps = map(wide, (s.detach(), gamma, lipschitz, eps))
    margin = (s - gamma).abs()
    radius = torch.where(margin == 0, 0.0, margin / lipschitz).minimum(eps)
    if radius.shape != s.shape or not ((radius >= 0).all() and (lipschitz >= 0).all()):
        raise ValueError("NaN in Eq. (4), L_S or eps below 0, or not one for each of s")
    return radius


# ---- Layers with a rule (max pools: only for all x): types, and the value each option must have.
_DIAGONAL, _pair = (nn.BatchNorm2d, Normalize), nn.modules.utils._pair
_KNOWN = *_DIAGONAL, nn.Conv2d, nn.Linear, nn.ReLU, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten
_KNOWN += nn.Identity, nn.Dropout, nn.Sequential, Net, Residual, Concat
_OPTIONS = {"inplace": False, "ceil_mode": False, "return_indices": False, "padding_mode": "zeros"}
_OPTIONS |= {"start_dim": 1, "end_dim": -1, "count_include_pad": True, "divisor_override": None}
_OPTIONS |= {"dilation": 1, "groups": 1, "affine": True, "output_size": 1}


def _demand(m, known):
    if not known:
        raise NotImplementedError(f"no rule for {type(m).__name__} with this shape, options, hooks")


def _exact(net, x, *also):
    """A float64 copy of `net`, if its layers all have a rule or are of `also`, in eval mode."""
    for m in net.modules():  # exact types: a subclass, a hook, another forward may compute anything
        _demand(m, type(m) in (*_KNOWN, *also))
        _demand(m, all(getattr(m, k, v) in (v, (v, v)) for k, v in _OPTIONS.items()))
        _demand(m, not any(callable(v) or (v and k.endswith("hooks")) for k, v in vars(m).items()))
        _demand(m, getattr(m, "running_var", 0) is not None)  # None: statistics of the batch
        _demand(m, not isinstance(getattr(m, "padding", 0), str))  # "same" may pad unevenly
    _demand(net, not any(v for k, v in vars(nn.modules.module).items() if k.endswith("_hooks")))
    if any(m.training for m in net.modules()):
        raise ValueError("certificates hold in eval mode; call net.eval() first")
    if not all(v.isfinite().all() for v in (*net.parameters(), *net.buffers(), x)):
        raise ValueError("NaN or infinity in the network or its input: nothing can be certified")
    net = copy.deepcopy(net).double()
    if x.dim() not in (2, 4) or net(x[:1].detach().double()).dim() != 2:
        raise ValueError("need inputs [N,C,H,W] or [N,D], and a network that returns logits [N,K]")
    return net


def _layers(m):
    """The layers of m in forward order; one that is used twice is listed twice."""
    parts = m if type(m) is nn.Sequential else (m.features, m.fc) if type(m) is Net else None
    return [m] if parts is None else [v for part in parts for v in _layers(part)]


def _linear(m, x, entries):
    """An affine layer W x + b on x, without b and with entries(W) for W: W itself, |W| or W²."""
    if type(m) is nn.Conv2d:
        return F.conv2d(x, entries(m.weight), None, m.stride, m.padding)
    if type(m) is nn.Linear:
        return F.linear(x, entries(m.weight))
    if type(m) is nn.BatchNorm2d:
        return x * entries(m.weight * (m.running_var + m.eps).rsqrt()).view(-1, 1, 1)
    if type(m) is Normalize:
        _demand(m, m(x).shape == x.shape)  # nothing is broadcast
        return x * entries(1 / m.std)
    return m(x)  # pools, Flatten, ...: |W| = W; only `lipschitz_local` squares, and no pools


def _carry(net, c, r, relu, entries, tiny=0.0):  # r: derivatives of c (region) or its radii (local)
    """Affine layers: W c + b and entries(W) (r + tiny (|c| + r)); ReLUs: relu(c, r)."""
    for m in _layers(net):
        if type(m) is nn.ReLU:
            c, r = relu(c, r)
        elif type(m) in (Residual, Concat):
            join = torch.add if type(m) is Residual else lambda *both: torch.cat(both, 1)
            both = [_carry(v, c, r, relu, entries, tiny) for v in (m.shortcut, m.body)]
            _demand(m, both[0][0].dim() == both[1][0].dim())  # else rows are taken for pixels
            c, r = map(join, *both)
        else:  # to autograd r stays entries(W) r: no gradient through the rounding's part
            c, r = m(c), _linear(m, r + tiny * (c.abs() + r).detach(), entries)
    return c, r


# ---- Global: |S(x) - S(y)| <= L ‖x - y‖ for all x, y.
def conv_norm(weight: Tensor, hw: Any, stride=1, padding=0, dilation=1, groups: int = 1) -> float:
    """An upper bound on the spectral norm of a zero-padded convolution of hw images, sound.

    It is a part of the circular one on a torus of sides s m >= hw + 2 padding, whose norm is no
    smaller. In Fourier space (Sedghi et al. 2019) that has m blocks: frequency b of the output is,
    by stride s, the mean of k̂ x̂ over frequencies b + a m, a < s. ValueError for bad weights."""
    if weight.dim() != 4 or len(weight) % groups or not weight.isfinite().all():
        raise ValueError(f"need a finite weight [c_out,c_in/groups,k,k], got {list(weight.shape)}")
    w, sizes = weight.detach().cpu().double(), []
    axes = w.shape[2:], *map(_pair, (hw, stride, padding, dilation))
    for k, n, s, p, d in zip(*axes, strict=True):
        n = s if k == 1 else max(n + 2 * p, d * (k - 1) + 1)  # 1×1: k̂ is constant, one b will do
        sizes += [s, math.ceil(n / s)]  # a side s m >= n: s frequencies alias at each of m
    (s1, m1, s2, m2), (d1, d2), (k1, k2) = sizes, _pair(dilation), w.shape[2:]
    torus = w.new_zeros(*w.shape[:2], s1 * m1, s2 * m2)
    torus[..., ::d1, ::d2][..., :k1, :k2] = w
    k_hat = torch.fft.fft2(torus).view(groups, len(w) // groups, -1, s1, m1, s2, m2)
    blocks = k_hat[..., : m2 // 2 + 1].permute(4, 6, 0, 1, 2, 3, 5).flatten(4)  # the rest: conj.
    return torch.linalg.svdvals(blocks).max().item() / math.sqrt(s1 * s2) * _UP


def _propagate(net, x, w):
    """w' [C]: for x = diag(w) g + const, g 1-Lipschitz in the input, net(x) = diag(w') g' + const.

    x: any input, for its shapes. Pools of n: mean² <= Σ x² / n, max² <= Σ x². Branches: diag(v) g
    is diag(t v) g/t, diag(w) h is diag(u w) h/u, (g/t, h/u) is 1-Lipschitz if 1/t² + 1/u² = 1."""
    for m in _layers(net):
        y, hw = m(x), x.shape[2:]
        if type(m) in (Residual, Concat):
            _demand(m, type(m) is Concat or m.shortcut(x).shape == m.body(x).shape)
            v, w = _propagate(m.shortcut, x, w), _propagate(m.body, x, w)
            ratio = (w.norm() / v.norm()).nan_to_num(1.0).clamp(1e-6, 1e6)  # any > 0 is sound
            t, u = (1 + ratio).sqrt(), (1 + 1 / ratio).sqrt()
            w = (v * t).hypot(w * u) if type(m) is Residual else torch.cat([v * t, w * u])
        elif type(m) is nn.Linear:
            _demand(m, x.dim() == 2)
            w = w.new_full(y.shape[1:], conv_norm((m.weight * w)[..., None, None], 1))
        elif type(m) is nn.Conv2d:
            norm = conv_norm(m.weight * w[:, None, None], hw, m.stride, m.padding)
            w = w.new_full(y.shape[1:2], norm)
        elif type(m) in _DIAGONAL:
            w = _linear(m, w.view(1, -1, *[1] * (x.dim() - 2)), torch.abs).flatten()
        elif type(m) in (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d):  # the last: all of hw
            size, stride = (_pair(getattr(m, k, hw)) for k in ("kernel_size", "stride"))
            windows = math.prod(math.ceil(k / s) for k, s in zip(size, stride, strict=True))
            w = w * math.sqrt(windows / (1 if type(m) is nn.MaxPool2d else math.prod(size)))
        elif type(m) is nn.Flatten:
            w = w.repeat_interleave(hw.numel())
        x = y
    return w


@torch.no_grad()
def lipschitz_global(net: nn.Module, shape: Sequence[int]) -> float:
    """An upper bound on the Lipschitz constant of S on inputs of shape (C,H,W) or (D,), sound.

    As -∂S/∂h = Wᵀp, p = softmax(f), the last layer counts its longest row, not ‖W‖₂. Vacuous for
    deep networks. NotImplementedError, as in all of these, if a layer has no rule."""
    x = next(net.parameters(), torch.zeros(())).new_zeros(1, *shape, dtype=torch.float64)
    layers = _layers(_exact(net, x, nn.MaxPool2d))
    last = layers.pop() if layers and type(layers[-1]) is nn.Linear else None
    w = _propagate(nn.Sequential(*layers), x, x.new_ones(shape[0]))
    return (w if last is None else (last.weight * w).norm(dim=1)).max().item() * _UP


# ---- Inside the linear region, where f(x + u) = z + A u and S(x + u) = -LSE(z + A u) is concave.
@torch.no_grad()
def linear_region(net: nn.Module, x: Tensor) -> Region:
    """z [K], A [K,D], ε̂ (a float) of one input: f(x + u) = z + A u for all ‖u‖ <= ε̂, sound.

    Under x's ReLU pattern, pre-activation j is a_j + g_j·u; the first to change sign sets
    ε̂ = min_j |a_j| / ‖g_j‖, 0 on a boundary. x [C,H,W], [D] or a batch of one; D derivatives."""
    x = (x if x.dim() in (2, 4) else x[None]).detach().double()
    if len(x) != 1:
        raise ValueError(f"the linear region is that of one input, got {len(x)}")
    net, ratios = _exact(net, x), [math.inf]

    def relu(a, g):  # a [1,...], g [D,...]; where g_j = 0, a_j is constant here and no boundary
        size = g.norm(dim=0)
        ratios.append(torch.where(size > 0, a[0].abs() / size, math.inf).min().item())
        return a.relu(), g * (a > 0)

    basis = torch.eye(x.numel(), dtype=x.dtype, device=x.device).view(-1, *x.shape[1:])
    z, columns = _carry(net, x, basis, relu, lambda weight: weight)
    return Region(z[0], columns.T, min(ratios))


def _tangent(z, A, gamma):
    """z and A in float64, S - γ at u = 0, ‖∇S‖ there."""
    z, A = z.detach().double(), A.detach().double()
    if not (z.isfinite().all() and A.isfinite().all() and math.isfinite(gamma)):
        raise ValueError("z, A and gamma must be finite, got NaN or infinity")
    return z, A, (-torch.logsumexp(z, 0) - gamma).item(), (z.softmax(0) @ A).norm().item()


def id_radius(z: Tensor, A: Tensor, gamma: float) -> float:
    """Eq. (4) with L_S = ‖∇S‖, to cap by ε̂; 0 unless S < γ. Sound, as S is below its tangent."""
    _, _, m, slope = _tangent(z, A, gamma)
    return 0.0 if m >= 0 else -m / slope if slope else math.inf


def ood_radius(z: Tensor, A: Tensor, gamma: float) -> float:
    """A radius within which -LSE(z + A u) >= γ, to cap by ε̂; 0 if u = 0 is not OOD. Sound.

    Not (S - γ) / ‖∇S‖: for A = [[3], [-3]], z = 0 the gradient vanishes, yet S falls on both sides.
    The larger r of two: of LSE(z_i + r ‖A_i‖) = -γ, as |A_i u| <= r ‖A_i‖; of r ‖∇S‖ + R² r² / 8 =
    S - γ, as log E_p e^v <= E_p v + (max v - min v)² / 8 (Hoeffding), p = softmax(z), v = A u."""
    z, A, m, slope = _tangent(z, A, gamma)
    if m <= 0:
        return 0.0
    R = torch.pdist(A).max().item() if len(A) > 1 else 0.0  # max v - min v <= R r
    a = A.norm(dim=1)
    low, high = 0.0, ((-gamma - z) / a).min().item()  # high: one term of LSE alone reaches -γ
    for _ in range(70):
        r = (low + high) / 2
        low, high = (r, high) if torch.logsumexp(z + r * a, 0) <= -gamma else (low, r)
    half = (slope + math.sqrt(slope * slope + R * R * m / 2)) / 2
    return max(low, m / half) if half else math.inf  # r = m / half: the root, uncancelled


# ---- Local: |S(x + u) - S(x)| <= L ‖u‖ for ‖u‖ <= ε, by intervals of centres c and radii r: affine
# layers give Wc + b and |W|r, and autograd, back through these, Wᵀ g_c and |W|ᵀ g_r.
class _Gate(torch.autograd.Function):
    """ReLU of the box c ± r. Backward, no derivative: all slopes times all gradients g_c ± g_r."""

    @staticmethod
    def forward(ctx, c, r):
        low, high = c - r, c + r
        ctx.min, ctx.max = (low > 0).to(c.dtype), (high >= 0).to(c.dtype)  # slopes
        return (low.relu() + high.relu()) / 2, (high.relu() - low.relu()) / 2

    @staticmethod
    def backward(ctx, g_c, g_r):
        a, b = g_c - g_r, g_c + g_r  # each end times its worse slope
        a, b = torch.minimum(a * ctx.min, a * ctx.max), torch.maximum(b * ctx.min, b * ctx.max)
        return (a + b) / 2, (b - a) / 2


@torch.inference_mode(False)  # with gradients, whatever the caller's mode
def lipschitz_local(net: nn.Module, x: Tensor, eps: float | Tensor) -> Tensor:
    """L [N] such that S is L-Lipschitz on B(x_i, eps_i): x [N,...], eps a number or [N]. Sound.

    Intervals hold all activations on the ball, hence all ReLU slopes and, backward, all
    gradients of S (mean value theorem). Tends to ‖∇S‖ as eps -> 0 where no pre-activation is 0:
    the paper's argument as a theorem. Vacuous in deep networks, infinite if intervals overflow."""
    x = x.clone().detach().double().requires_grad_()
    layers = _layers(_exact(net, x))
    eps = torch.as_tensor(eps, dtype=x.dtype, device=x.device).clone().expand(len(x))
    if not (eps >= 0).all():
        raise ValueError("eps must be >= 0")
    r = (1e-14 * x.detach().abs()).requires_grad_()  # of rounding; eps joins behind the first W
    c, squares, leaves = x, torch.ones_like(x), (x, r)  # squares: ‖row of M‖², c = M x + const
    while layers and type(layers[0]) in (*_DIAGONAL, nn.Flatten, nn.Conv2d, nn.Linear):
        m = layers.pop(0)  # a u with ‖u‖ <= eps moves entry j of c by at most eps ‖row j of M‖
        c, r, squares = m(c), _linear(m, r, torch.abs), _linear(m, squares, torch.square)
        if type(m) in (nn.Conv2d, nn.Linear):  # a second W would mix rows of M
            break
    r = r + eps.view([-1] + [1] * (c.dim() - 1)) * squares.sqrt()
    c, r = _carry(nn.Sequential(*layers), c, r, _Gate.apply, torch.abs, 1e-14)
    low, high = (c - r).detach(), (c + r).detach()  # of the logits z; rest_i: LSE of the others
    own = torch.eye(c.shape[1], dtype=torch.bool, device=c.device)  # -∂S/∂z_i = σ(z_i - rest_i)
    rest = [torch.where(own, -math.inf, z[:, None]).logsumexp(2) for z in (high, low)]
    low, high = (low - rest[0]).sigmoid(), (high - rest[1]).sigmoid()  # now of -∂S/∂z
    g_c, g_r = torch.autograd.grad((c, r), leaves, ((low + high) / 2, (high - low) / 2))
    return ((g_c.abs() + g_r).flatten(1).norm(dim=1) * _UP).nan_to_num(math.inf, math.inf).detach()


def certify(net: nn.Module, x: Tensor, gamma: float, regions: bool = False) -> dict[str, Tensor]:
    """Name of a bound -> sound radii [N] within which S <= γ stays true, or false, of x [N,...].

    "global", "local" (best ε <= 1e3) and, if `regions`, "region" (D derivatives an input)."""
    s = energy_score(_exact(net, x)(x.double())).detach()
    low, high = 0 * s, torch.full_like(s, 1e3)  # bisection, as ε L(ε) never falls with ε
    for _ in range(40):
        eps = (low + high) / 2
        holds = certified_radius(s, gamma, lipschitz_local(net, x, eps)) >= eps
        low, high = torch.where(holds, eps, low), torch.where(holds, high, eps)
    radii = {"global": certified_radius(s, gamma, lipschitz_global(net, x.shape[1:])), "local": low}
    if regions:
        cells = [linear_region(net, v[None]) for v in x]
        inside = [id_radius(z, A, gamma) + ood_radius(z, A, gamma) for z, A, _ in cells]  # one is 0
        radii["region"] = s.new_tensor([c.eps_hat for c in cells]).minimum(s.new_tensor(inside))
    return {name: r * _DOWN for name, r in radii.items()}


# ---- Randomised smoothing: a certificate for networks of any depth, but of another detector.
@torch.no_grad()
def noisy_scores(score: Score, x: Tensor, sigma: float, n: int, generator: Rng = None) -> Tensor:
    """`score` of images x [N,...] under n draws of N(0, σ²): [N,n]; its medians: the smoothed S."""
    rows = []
    for draws in torch.arange(n).split(max(1, 1024 // max(1, len(x)))):  # some 1024 images a time
        noise = x.new_empty(len(draws), *x.shape).normal_(generator=generator)
        rows.append(score((x + sigma * noise).flatten(0, 1)).view(len(draws), len(x)))
    return torch.cat(rows).T


def smoothed_radius(s: Tensor, gamma: float, sigma: float, alpha: float = 0.001) -> Tensor:
    """Signed radius [N] of the detector "ID iff P(S(x + σZ) <= γ) > 1/2", by its scores s [N,n].

    -R: ID within R of x; +R: OOD; 0: undecided. R = σ Φ⁻¹(p), p the Clopper-Pearson lower bound for
    the winning side (Cohen et al. 2019). R is too large with probability at most alpha, unless γ
    comes from s. ValueError for too few draws, or bad numbers."""
    from scipy.stats import beta

    n, k = s.shape[1], (s.double() <= gamma).sum(1).cpu().double()
    if not (0 < alpha < 1 and 0 < sigma < math.inf) or s.isnan().any() or math.isnan(gamma):
        raise ValueError("need 0 < alpha < 1, 0 < sigma < inf, and no NaN in scores or gamma")
    if 0.5**n >= alpha / 2:
        raise ValueError(f"{n} draws decide nothing at alpha = {alpha}, even where all agree")
    p_id, p_ood = (torch.as_tensor(beta.ppf(alpha / 2, v, n - v + 1)) for v in (k, n - k))
    p_id, p_ood = ((p.nan_to_num(0.0) * _DOWN).clamp(min=0.5) for p in (p_id, p_ood))
    return sigma * (torch.special.ndtri(p_ood) - torch.special.ndtri(p_id)).to(s.device)


def smoothing_radius(
    score: Score, x: Tensor, gamma: float, sigma: float, n=1000, alpha=0.001, generator: Rng = None
) -> Tensor:
    """`smoothed_radius` [N] of x; score: [M,...] -> [M], in eval mode; γ: of medians, not of S."""
    return smoothed_radius(noisy_scores(score, x, sigma, n, generator), gamma, sigma, alpha)


@torch.inference_mode(False)  # with gradients, whatever the caller's mode
def attack(
    net: nn.Module, x: Tensor, gamma: float, eps: float | Tensor, steps=20, restarts=2,
    clamp: tuple[float, float] = (-math.inf, math.inf), generator: Rng = None,
) -> Attack:  # fmt: skip
    """Projected gradients on S toward the wrong side of γ within eps (ℓ2): the worst x' found.

    S and ‖x' - x‖ <= eps are those of x' as rounded and clamped. Failure proves nothing. γ = -inf
    lowers S of all x, +inf raises it, with no flips. Start 1 is x, others random; steps fall from
    eps / 2 (starts 1, 3, ...) or 2 eps. clamp=(0, 1): images. ValueError: bad eps, x, γ, S."""
    x, eps = x.clone().detach(), torch.as_tensor(eps, dtype=torch.float64, device=x.device)
    odd = not ((eps >= 0) & (eps < math.inf)).all() or ((x.clamp(*clamp) - x).abs() > 0).any()
    odd = odd or math.isnan(gamma) or min(steps, restarts) < 1
    if odd or any(m.training for m in net.modules()):
        raise ValueError("need 0 <= eps < inf, γ not NaN, x in clamp, steps, restarts >= 1, eval()")
    limit = (eps.expand(len(x)) * (1 - 1e-4))[:, None]  # rounding x' must not lead out
    worst, s_worst, distance = x.clone(), energy_score(_logits(net(x))).detach(), 0.0 * limit[:, 0]
    if s_worst.isnan().any():
        raise ValueError("S(x) is NaN: nothing to attack")
    sign = torch.where(s_worst > gamma, -1.0, 1.0)  # OOD: S down; ID: S up
    for restart in range(restarts):
        u = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        u = F.normalize(u.flatten(1).double()) * limit * (restart > 0)
        for t in range(steps + 1):
            u = F.normalize(u, eps=1e-30) * u.norm(dim=1, keepdim=True).minimum(limit)  # project
            near = (x + u.view_as(x)).to(x.dtype).clamp(*clamp).requires_grad_()
            s = energy_score(_logits(net(near)))
            (g,) = torch.autograd.grad((sign * s).sum(), near)
            u = (near.detach().double() - x).flatten(1)  # what rounding and clamping left of u
            i = (sign * s > sign * s_worst) & (u.norm(dim=1) <= eps)  # the rows that improve
            worst[i], s_worst[i], distance[i] = near.detach()[i], s.detach()[i], u.norm(dim=1)[i]
            step = (2.0 if restart % 2 else 0.5) * (1 - t / (steps + 1))
            u = u + step * limit * F.normalize(g.flatten(1).double(), eps=1e-30)
    flipped = (s_worst > gamma) == (sign > 0)
    return Attack(worst, s_worst, flipped, torch.where(flipped, distance, math.inf))


# ==================================================================================================
# 5  Compared methods: post-hoc scores, low = ID (Section 2.1), losses and samplers (2.2)
# Needs: energy_score, _logits (2), eval_mode (3)


def msp(logits: Tensor) -> Tensor:
    """Maximum softmax probability (Hendrycks & Gimpel 2017), negated: [N,K] -> [N]."""
    return -logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1).amax(1)


def absent(logits: Tensor) -> Tensor:
    """Probability of the last, "absent" class of a K+1 head (Chen et al. 2021): [N,K+1] -> [N]."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)[:, -1]


def odin(
    net: nn.Module, x: Tensor, T=1000.0, eps=0.0014, std=(1.0,), K: int | None = None
) -> Tensor:
    """ODIN (Liang et al. 2018): x [N,C,H,W] normalised -> [N], in eval mode. MSP of the first K
    logits (default: all) at temperature T, of x moved by eps on the scale of [0,1] pixels (eps /
    std in units of x), so that the predicted class's probability rises."""
    with eval_mode(net), torch.inference_mode(False):  # with gradients, whatever the caller's mode
        x = x.clone().detach().requires_grad_()
        f = _logits(net(x))[:, :K] / T
        loss = F.cross_entropy(f, f.argmax(1), reduction="sum")
        (g,) = torch.autograd.grad(T * loss, x)  # T times: 1 / T may underflow float16
        step = eps / x.new_tensor(std).view([1, -1] + [1] * (x.dim() - 2))
        f = _logits(net(x - step * torch.where(g < 0, -1.0, 1.0).to(x.dtype)))[:, :K].detach()
    return msp(f.double() / T)  # at T = 1000, float32 would make ties


def percentile(v: Tensor, p: float) -> Tensor:
    """NumPy's (linear) percentile p of all entries, in float64; torch.quantile takes 16 M only."""
    v, position = v.flatten(), p / 100 * (v.numel() - 1)
    low = math.floor(position)  # `kthvalue` counts from 1
    a, b = (v.kthvalue(min(i, v.numel())).values.double() for i in (low + 1, low + 2))
    return a + (position - low) * (b - a)


def react(z: Tensor, W: Tensor, b: Tensor, clip: Tensor | float) -> Tensor:
    """ReAct (Sun et al. 2021): energy score of the features clipped from above; z [N,d] -> [N]."""
    return energy_score(F.linear(z.to(W.dtype).clamp(max=clip), W, b))


def dice(z: Tensor, W: Tensor, b: Tensor, mask: Tensor, clip: Tensor | float = math.inf) -> Tensor:
    """DICE (Sun & Li 2022): energy score through the masked head; with a clip, on top of ReAct."""
    return react(z, W * mask, b, clip)


def line_masks(z_class: Tensor, W: Tensor, p_a: float, p_w: float) -> Callable[[int], Tensor]:
    """LINe's masks of the head from the class means z_class [K,d], E[h | y = c]: c -> [K,d]. The
    Shapley values E[h_j ∂f_c/∂h_j | y = c] are V = W ⊙ z_class. Class c keeps weight (i, j) if
    V_cj is above the p_a-th percentile of V_c, and |V_cj| W_ij above its p_w-th over all i, j."""
    V = W * z_class
    least_a = torch.stack([percentile(v, p_a) for v in V])
    least_w = torch.stack([percentile(v.abs() * W, p_w) for v in V])
    return lambda c: (V[c] > least_a[c]) & (V[c].abs() * W > least_w[c])


def line(z: Tensor, W: Tensor, b: Tensor, masks: Callable, clip: Tensor | float) -> Tensor:
    """LINe (Ahn et al. 2023): DICE on ReAct, with the mask of ReAct's class; z [N,d] -> [N]."""
    predicted = F.linear(z.to(W.dtype).clamp(max=clip), W, b).argmax(1)
    s = z.new_empty(len(z), dtype=torch.promote_types(W.dtype, torch.float32))
    for c in predicted.unique().tolist():  # one class at a time: no K×K×d tensor is needed
        rows = predicted == c
        s[rows] = dice(z[rows], W, b, masks(c), clip)
    return s


class PostHoc(NamedTuple):
    """Hyper-parameters of the post-hoc scores."""

    T: float = 1000.0  # ODIN, its paper
    eps: float = 0.0014  # ODIN, its paper: DenseNet on CIFAR-10
    react_p: float = 90.0  # percentile of the ID activations; ReAct, its paper
    react_clip: float | None = None  # a fixed clip in its place
    dice_p: float = 90.0  # DICE, its scripts for CIFAR
    line_a: float = 90.0  # activation mask; LINe, its scripts: DenseNet on CIFAR-10
    line_w: float = 90.0  # weight mask, likewise
    line_clip: float = 1.0  # likewise


# Keys: ID data, or ID data and network; the paper gives no values. Where a source lacks a network,
# its values for DenseNet serve ResNet-18 and WRN, those for ResNet-50 (DICE, LINe) DenseNet-121. On
# DenseNet-BC, ReAct has LINe's clip: most features are near 0, and a percentile clips the rest.
POST_HOC: dict[str | tuple[str, str], PostHoc] = {
    "cifar10": PostHoc(),
    ("cifar10", "wrn40_2"): PostHoc(eps=0.0006),  # ATOM's code; ODIN: 0 to 0.0014 by OOD set
    ("cifar10", "densenet100"): PostHoc(react_clip=1.0),
    "cifar100": PostHoc(eps=0.0028, line_a=10.0),  # ODIN's and LINe's for DenseNet
    ("cifar100", "densenet100"): PostHoc(eps=0.0028, line_a=10.0, react_clip=1.0),
    "imagenet": PostHoc(dice_p=70.0, line_a=10.0, line_w=10.0, line_clip=0.8),  # eps: CIFAR-10's
}


def post_hoc(id_data: str, arch: str, K: int) -> PostHoc:
    """Hyper-parameters for ID data, network and class count; other data go by the class count."""
    kind = id_data.partition(":")[0]
    known = kind if kind in POST_HOC else "cifar100" if K == 100 else "cifar10"
    return POST_HOC.get((known, arch), POST_HOC[known])


# PostHoc p, std of pixels; where fitted: K-class head W, b, clip (ReAct), mask (DICE), masks (LINe)
Fit = namedtuple("Fit", "p std W b clip mask masks", defaults=[None] * 5)


def fit_scores(
    net: nn.Module, z: Tensor, y: Tensor, p: PostHoc, std: Sequence = (1,), K: int | None = None
) -> Fit:
    """Fit ReAct, DICE and LINe to training features z [N,d] (test transform) and labels y [N]. Only
    the first K outputs of net.fc count (default: all); an "absent" class has no training images.
    ValueError if a class has no sample or a feature is not finite."""
    W, b = net.fc.weight.detach()[:K], net.fc.bias.detach()[:K]
    z = z.to(torch.promote_types(z.dtype, torch.float32))  # sums over a set overflow in float16
    one_hot = F.one_hot(y.long(), len(W)).to(z.dtype)
    n, V = one_hot.sum(0), W * z.mean(0)  # the contributions that DICE ranks
    if (n == 0).any() or not z.isfinite().all():
        raise ValueError(f"need finite features of every class; {n.long().tolist()} a class")
    masks = line_masks(one_hot.mT @ z / n[:, None], W, p.line_a, p.line_w)
    clip = percentile(z, p.react_p) if p.react_clip is None else z.new_tensor(p.react_clip)
    return Fit(p, std, W, b, clip, V > percentile(V, p.dice_p), masks)


# Score of (net, normalised images x, logits f of the K classes, features z, fit), each row by the
# name in --scores. Class K+1, where there is one, counts for "absent" alone.
SCORES: dict[str, Callable[[nn.Module, Tensor, Tensor, Tensor, Fit], Tensor]] = {
    "msp": lambda net, x, f, z, fit: msp(f),
    "odin": lambda net, x, f, z, fit: odin(net, x, fit.p.T, fit.p.eps, fit.std, f.shape[1]),
    "energy": lambda net, x, f, z, fit: energy_score(f),
    "react": lambda net, x, f, z, fit: react(z, fit.W, fit.b, fit.clip),
    "dice": lambda net, x, f, z, fit: dice(z, fit.W, fit.b, fit.mask),
    "dice+react": lambda net, x, f, z, fit: dice(z, fit.W, fit.b, fit.mask, fit.clip),
    "line": lambda net, x, f, z, fit: line(z, fit.W, fit.b, fit.masks, fit.p.line_clip),
    "absent": lambda net, x, f, z, fit: absent(net.fc(z)),
}
POST_HOC_ROWS = tuple(name for name in SCORES if name != "absent")
NEED_FIT = {"react", "dice", "dice+react", "line"}  # and your rows that use W, clip, ... of fit


# ---- Auxiliary losses, in place of Eq. (1): of ID and auxiliary logits, labels, ... -> scalar.
def oe_loss(f_in: Tensor, f_aux: Tensor, y_in: Tensor) -> Tensor:
    """Outlier Exposure (Hendrycks et al. 2019): the mean of KL(uniform ‖ softmax f_aux)."""
    return (f_aux.logsumexp(1) - f_aux.mean(1)).mean() - math.log(f_aux.shape[1])


def absent_loss(f_in: Tensor, f_aux: Tensor, y_in: Tensor) -> Tensor:
    """NTOM (Chen et al. 2021) and DOS (Jiang et al. 2024): cross-entropy of f_aux to class K+1."""
    return -f_aux.log_softmax(1)[:, -1].mean()


def openmix_loss(f_in: Tensor, f_aux: Tensor, y_in: Tensor, lam: Tensor) -> Tensor:
    """OpenMix (Zhu et al. 2023): f_aux = f(lam x_in + (1 - lam) x_aux), targets mixed likewise."""
    return lam * F.cross_entropy(f_aux, y_in) + (1 - lam) * absent_loss(f_in, f_aux, y_in)


def balanced_energy_loss(
    f_in: Tensor, f_aux: Tensor, y_in: Tensor, prior: Tensor, m_in=-25.0, m_aux=-7.0,
    alpha=10.0, gamma=0.05,
) -> Tensor:  # fmt: skip
    """Balanced energy (Choi et al. 2023): Eq. (1), its auxiliary term Σ_j w_j relu(m_j - s_j)² with
    m_j = m_aux + alpha Z_j, w_j = Z_j / Σ Z, Z_j = Σ_k softmax(f_j)_k share_k and share_k ∝
    prior_k^gamma; prior [K]: the shares of the classes among auxiliary images."""
    share = prior**gamma / (prior**gamma).sum()
    Z = (f_aux.softmax(1) * share).sum(1)  # not softmax @ share: autocast would do that in bfloat16
    weight = F.normalize(Z, p=1.0, dim=0, eps=1e-30)  # Z / Σ Z; not NaN where all underflow to 0
    aux = (weight * F.relu(m_aux + alpha * Z - energy_score(f_aux)).square()).sum()
    return F.relu(energy_score(f_in) - m_in).square().mean() + aux


# ---- Samplers, in place of Algorithm 1.
def quantile_mining(s: Tensor, n: int, q: float = 0.125) -> Tensor:
    """NTOM (Chen et al. 2021): indices of the n lowest p_{K+1} after the share q of the lowest."""
    first = int(q * len(s))
    if s.dim() != 1 or not 0 <= first <= first + n <= len(s) or s.isnan().any():
        raise ValueError(f"NTOM needs {first} + {n} scores [N] without NaN, got {list(s.shape)}")
    return s.argsort(stable=True)[first : first + n].sort().values


def poem_posterior(gram: Tensor, zy: Tensor, var=20.0, var_noise=0.5) -> tuple[Tensor, Tensor]:
    """POEM (Ming et al. 2022): Bayesian regression of targets y (ID < 0 < OOD) on features Z. gram
    = Z'Z [d,d], zy = Z'y [d], variances of prior and noise -> the posterior's mean [d] and the
    Cholesky factor of its precision. In float64: Z'Z is nearly of low rank."""
    if gram.dtype != torch.float64 or zy.dtype != torch.float64:
        raise ValueError(f"sum Z'Z and Z'y in float64, not {gram.dtype} and {zy.dtype}")
    precision = gram / var_noise + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) / var
    factor = torch.linalg.cholesky(precision)
    return torch.cholesky_solve(zy[:, None] / var_noise, factor)[:, 0], factor


def poem_draw(mean: Tensor, factor: Tensor, generator: Rng = None) -> Tensor:
    """A sample [d] of the posterior: L'⁻¹ ε, L the factor, ε ~ N(0, I), has covariance (L L')⁻¹."""
    noise = torch.randn(len(mean), 1, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + torch.linalg.solve_triangular(factor.mT, noise, upper=True)[:, 0]


# ==================================================================================================
# 6  Metrics (Section 6.1)
# Needs: nothing


def _vector(s):
    s = torch.as_tensor(s, dtype=torch.float64).detach()
    if s.dim() != 1 or len(s) == 0 or s.isnan().any():
        raise ValueError(f"need scores [N], N >= 1, got {list(s.shape)} with {s.isnan().sum()} NaN")
    return s


def threshold(s_in: Tensor, tpr: float = 0.95) -> float:
    """γ: the ⌈tpr·n⌉-th smallest of s_in, the least score with a share tpr of s_in at or below it.
    ValueError unless 0 < tpr <= 1 and, as for all metrics, s_in is a vector without NaN."""
    s_in, share = _vector(s_in), Fraction(str(float(tpr)))  # in floats 0.55 · 100 > 55
    if not 0 < share <= 1:
        raise ValueError(f"tpr must be in (0, 1], got {tpr}")
    return s_in.sort().values[math.ceil(share * len(s_in)) - 1].item()


def fpr_at_tpr(s_in: Tensor, s_out: Tensor, tpr: float = 0.95) -> float:
    """The share of s_out at or below the `threshold` for tpr: a tie with γ passes for ID."""
    return (_vector(s_out) <= threshold(s_in, tpr)).double().mean().item()


def auroc(s_in: Tensor, s_out: Tensor) -> float:
    """P(s_in < s_out) + P(s_in = s_out) / 2: the Mann-Whitney statistic with exact counts."""
    s_in, s_out = _vector(s_in).sort().values, _vector(s_out)
    less, at_most = (torch.searchsorted(s_in, s_out, right=r).sum() for r in (False, True))
    return int(less + at_most) / (2 * len(s_in) * len(s_out))


def aupr(s_pos: Tensor, s_neg: Tensor) -> float:
    """Average precision, low scores positive: the precision at each of s_pos, averaged."""
    s_pos, s_neg = _vector(s_pos).sort().values, _vector(s_neg).sort().values
    tp, fp = (torch.searchsorted(s, s_pos, right=True).double() for s in (s_pos, s_neg))
    return (tp / (tp + fp)).mean().item()


def ood_metrics(s_in: Tensor, s_out: Tensor) -> dict[str, float]:
    """All metrics as fractions, and counts; ID positive, but in aupr_out and fpr95_ood_positive."""
    s_in, s_out = _vector(s_in), _vector(s_out)
    both = {"aupr_in": aupr(s_in, s_out), "aupr_out": aupr(-s_out, -s_in)}  # negated, low is OOD
    rates = {"fpr95": fpr_at_tpr(s_in, s_out), "fpr95_ood_positive": fpr_at_tpr(-s_out, -s_in)}
    return {**rates, "auroc": auroc(s_in, s_out), **both, "n_in": len(s_in), "n_out": len(s_out)}


# ==================================================================================================
# 7  Data (Section 6.1)


# ---- Processes and messages.
def world() -> tuple[int, int]:
    """(rank, number of processes) once `pick_device` has joined torchrun's; else (0, 1)."""
    on = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if on else (0, 1)


def say(text: str, to: Any = None) -> None:
    """Print, by the first process alone; that the reader has left (a closed pipe) is no error."""
    if world()[0] == 0:
        try:
            print(text.rstrip("\n"), file=to, flush=True)
        except BrokenPipeError:  # there may be results still to save
            sys.stdout = open(os.devnull, "w") if to is None else sys.stdout


def remark(text: object) -> None:
    """A message to the user, on stderr: no part of what a script reads."""
    say(f"greg: {text}", sys.stderr or io.StringIO())


def bar(items: Any, what: str, **options: Any) -> Any:
    """A progress bar around `items` (None: one step, for `with`), with the time left."""
    from tqdm import tqdm

    options |= {"delay": 0.1, "leave": False, "dynamic_ncols": True}
    progress = tqdm(items, what, disable=world()[0] > 0 or not sys.stderr, **options)

    def tick():  # the clock goes on in a long step too, until the bar is closed
        while not progress.disable:
            time.sleep(0.5)
            progress.delay = 0  # else close() takes it for never drawn, and leaves it there
            progress.refresh()

    if getattr(sys.stderr, "isatty", bool)():  # a terminal; bool() is False
        threading.Thread(target=tick, daemon=True).start()
    return progress


# ---- Images in memory.
class Images(NamedTuple):
    """A data set: x [N,H,W,3] uint8 or `Files`, y [N] labels or None, names of the classes."""

    x: Any
    y: Tensor | None = None
    classes: tuple[str, ...] = ()

    def some(self, n: int) -> Images:
        """n of the images, or all: random ones (sets may be sorted), the same at each call."""
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(0))
        i = order[: max(n, 0)].sort().values
        return self._replace(x=self.x[i], y=None if self.y is None else self.y[i])

    def pixels(self, index: slice | Tensor = slice(None)) -> Tensor:
        """The pixels of the images `index`, uint8 [n,H,W,3]; files by `load_image`, in threads."""
        if not isinstance(x := self.x[index], Files):
            return x
        with ThreadPoolExecutor() as pool:
            images = pool.map(lambda f: load_image(os.fsdecode(f), x.shape[1]), x.files)
            return torch.cat(list(bar(images, "decode", total=len(x))))


STATS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {  # mean and std of each channel
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "dice": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # public checkpoints: DICE, LINe
}


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """[N,H,W,C] uint8 -> (x / 255 - mean) / std, [N,C,H,W] float32; ValueError for others."""
    if (x := torch.as_tensor(x)).dtype != torch.uint8 or x.dim() != 4:
        raise ValueError(f"normalise takes uint8 images [N,H,W,C], got {x.dtype} {[*x.shape]}")
    x = x.permute(0, 3, 1, 2).contiguous().float().div_(255)
    return x.sub_(x.new_tensor(mean).view(-1, 1, 1)).div_(x.new_tensor(std).view(-1, 1, 1))


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random crop of the zero-padded image, then a flip with p = 1/2: [N,H,W,C] uint8 -> same."""
    (n, h, w, _), pad = x.shape, 4
    dy, dx = torch.randint(2 * pad + 1, (2, n, 1), generator=generator).to(x.device)
    flip = torch.randint(2, (n, 1), generator=generator).to(x.device).bool()
    i, row, col = (torch.arange(k, device=x.device) for k in (n, h, w))
    rows, cols = row + dy, torch.where(flip, w - 1 - col, col) + dx
    return F.pad(x, (0, 0, pad, pad, pad, pad))[i[:, None, None], rows[:, :, None], cols[:, None]]


# ---- The built-in benchmark: shapes of random place, size, angle, colour, texture and noise.
_ID = tuple(o + s for o in ("", "outlined ") for s in "disc triangle square star cross".split())
_OOD = ("crescents", "spirals", "strokes", "rays", "cells", "shards")
_AUX = ("lobes", "curves", "fields", "waves", "unions")
SYNTHETIC = {"train": _ID, "test": _ID, "aux": _AUX} | {k: (k,) for k in _OOD}
_to_32 = functools.partial(F.interpolate, size=32, mode="bicubic")


def _distance(family, z, draw):
    """Signed distance, or a function of its sign, < 0 inside, of complex z; draw: `synthetic`'s."""
    r, a, x, y, Z, pi = z.abs(), z.angle(), z.real.abs(), z.imag.abs(), z[:, None], math.pi
    if family.startswith("outlined "):  # inwards from the edge
        return (_distance(family.removeprefix("outlined "), z, draw) + 0.12).abs() - 0.12
    if family in ("triangle", "square", "star"):  # n tips, r = 1; b: angle, tip to edge's normal
        n, b = {"triangle": (3, pi / 3), "square": (4, pi / 4), "star": (5, 1.236)}[family]
        return r * ((a % (2 * pi / n) - pi / n).abs() - b).cos() - math.cos(b)
    if family == "cross":
        return torch.maximum(torch.maximum(x, y) - 0.95, torch.minimum(x, y) - 0.3)
    if family == "crescents":
        return torch.maximum(r - 0.85, 0.85 - (z + draw(0.35, 0.8)).abs())
    if family == "lobes":  # a superformula: 6 lobes or more, ID has 5 at most
        m, p = draw(6, 13).floor(), draw(1, 4)
        sides = torch.stack([(m * a / 4).cos(), (m * a / 4).sin()]) * 2**0.5
        return r - sides.abs().pow(2 + p * draw(1, 3)).mean(0).pow(-1 / p)
    if family in ("fields", "curves"):  # odd about the image's centre: none is one closed figure
        f = sum(draw(0, 1) * _to_32(draw(-1, 1, k * k).view(-1, 1, k, k))[:, 0] for k in (4, 9))
        f = f - f.flip(1, 2)
        f = f / f.std((1, 2), keepdim=True) / 5
        return f if family == "fields" else torch.maximum(f.abs() - 0.04, r - draw(0.8, 1.5))
    if family == "waves":
        rate, turn = draw(2, 9, 3), torch.exp(1j * draw(0, 2 * pi, 3))
        return (((Z * turn).real * rate + draw(0, 2 * pi, 3)).sin() / rate).sum(1)
    if family == "unions":  # of five blobs and bars, on a ring
        angle = draw(0, 0.6, 5) + 0.4 * pi * torch.arange(5)[:, None, None]
        p = (Z - torch.polar(draw(0.3, 1.1, 5), angle)) * torch.exp(1j * draw(0, pi, 5))
        bars = torch.maximum(p.real.abs() - draw(0.2, 0.9, 5), p.imag.abs() - draw(0.05, 0.15, 5))
        return torch.where(draw(0, 1, 5) < 0.5, p.abs() - draw(0.1, 0.5, 5), bars).amin(1)
    if family == "spirals":
        pitch = draw(0.6, 0.9)
        return torch.maximum((((r / pitch - a / (2 * pi)) % 1 - 0.5).abs() - 0.15) * pitch, r - 1)
    if family == "strokes":
        a, b = torch.complex(draw(-1, 1, 8), draw(-1, 1, 8)).chunk(2, 1)  # ends of four segments
        return (Z - a - ((Z - a) / (b - a)).real.clamp(0, 1) * (b - a)).abs().amin(1) - 0.12
    if family == "cells":  # the walls between them
        d = (Z - torch.complex(draw(-1, 1, 6), draw(-1, 1, 6))).abs().sort(1).values
        return torch.maximum(d[:, 1] - d[:, 0] - 0.12, r - 1)
    if family == "shards":  # three lines; the sign changes across each
        d = (Z * torch.exp(1j * draw(0, 2 * pi, 3))).real - draw(-0.6, 0.6, 3)
        return d.abs().amin(1) * d.sign().prod(1)
    if family == "rays":
        return torch.sin(a * (n := draw(3, 7).floor())) * r / n
    return r - 0.85  # disc


def synthetic(split: str, n: int | None = None, seed: int = 0) -> Images:
    """n images 32×32 of the built-in benchmark, fixed by the arguments; ValueError for no split."""
    n = {"train": 5000, "test": 1000, "aux": 10000}.get(split, 500) if n is None else n
    if split not in SYNTHETIC or n < 1:
        raise ValueError(f"{n} of {split!r}: synthetic has 1 or more of {', '.join(SYNTHETIC)}")
    g = torch.Generator().manual_seed(seed * len(SYNTHETIC) + list(SYNTHETIC).index(split))
    families, t = SYNTHETIC[split], (torch.arange(32) + 0.5) / 16 - 1
    y, x = torch.randperm(n, generator=g) % len(families), torch.empty(n, 32, 32, 3).byte()
    for k, family in enumerate(families[:n]):  # so many are in y

        def draw(low, high, *shape, mine=y == k):  # uniform [images of the family, *shape, 1, 1]
            return torch.rand(int(mine.sum()), *shape, 1, 1, generator=g) * (high - low) + low

        size, back, at = draw(0.6, 0.85), draw(0, 1, 3), draw(-0.2, 0.2) + 1j * draw(-0.2, 0.2)
        front = (back + draw(0.25, 0.75, 3)) % 1  # never too like the background
        z = (t + 1j * t[:, None] - at) / torch.polar(size, draw(0, 2 * math.pi))
        inside = (0.5 - 16 * size * _distance(family, z, draw)).clamp(0, 1)  # 16 pixels a unit
        grain = _to_32(torch.randn(len(z), 6, 8, 8, generator=g) * draw(0, 0.1, 6), mode="bilinear")
        image = torch.lerp(back + grain[:, :3], front + grain[:, 3:], inside[:, None])
        image += torch.randn(image.shape, generator=g) * draw(0, 0.05, 1)
        x[y == k] = (image.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    return Images(x, y, families) if families is _ID else Images(x)


# ---- Files: images and folders of them, arrays; checks of a set and between sets.
def open_image(path: str | Path) -> Any:
    """An image file as RGB, as a viewer shows it: upright, on white; ValueError if it is none."""
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = max(2**29, Image.MAX_IMAGE_PIXELS or math.inf)  # for photographs
    with open(path, "rb") as file:
        try:
            image = Image.open(file)
            image.getexif()  # Pillow keeps what it read, so that exif_transpose still turns, and
            image.info.pop("exif", None)  # without the bytes does not rewrite tags, odd ones too
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # more than 8 bits a channel: convert("RGB") clips
                low, high = image.convert("I").getextrema()
                if image.mode == "F" or low < 0 or high > 65535:
                    raise ValueError(f"mode {image.mode} has no known range")
                image = image.convert("I").point(lambda v: v / 257 + 0.5).convert("L")
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
        except Exception as e:  # Pillow's decoders raise whatever they stumble over
            why = str(e).partition(" <_io")[0] or repr(e)  # without the file object
            raise ValueError(f"{path} is not an image that can be read: {why}") from None


def load_image(path: str | Path, size: int = 32) -> Tensor:
    """An image file, resized (short side: size, from 128 on size · 256 / 224); of it the centre
    [1,size,size,3] uint8. Raises as `open_image`."""
    from torchvision.transforms import functional as T

    image, short = open_image(path), (size if size < 128 else size * 256 // 224)
    h, w = (min(v, 4 * min(image.size)) for v in image.size[::-1])  # of a strip its middle
    image = T.resize(T.center_crop(image, [h, w]), short, antialias=True)
    return T.pil_to_tensor(T.center_crop(image, size)).permute(1, 2, 0)[None].contiguous()


LITTER = ("__MACOSX", "@eaDir")  # folders that archives and servers add


def image_files(folder: str | Path) -> list[str]:
    """All images below a folder, sorted, but hidden ones; files of other kinds are counted."""
    from PIL import Image

    kinds, seen, paths = Image.registered_extensions(), {}, []
    known = {*Image.OPEN, "MPO"} - {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # have no decoder
    for at, folders, names in os.walk(folder, onerror=remark, followlinks=True):
        first = seen.setdefault(os.path.realpath(at), at)  # path to it: links can go in circles
        folders[:] = [f for f in sorted(folders) if at == first and f[0] != "." and f not in LITTER]
        paths += [str(Path(at, n)) for n in names if at == first and n[0] != "."]
    kept = sorted(p for p in paths if kinds.get(Path(p).suffix.lower()) in known)
    if other := sorted({*paths} - {*kept}):
        remark(f"{folder}: left out {len(other)} files that are no images: {other[0]} …")
    if not kept:
        raise ValueError(f"no images below {folder}, such as .png, .jpg or .webp files")
    return kept


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of numbers of an .npz, or of an .npy as "x" (mapped); ValueError if it is none."""
    import numpy as np

    if not os.access(path, os.R_OK):
        raise FileNotFoundError(f"no file or folder {path} to read, nor a set of that name for it")
    arrays = {}
    try:
        loaded = np.load(path, mmap_mode="c", allow_pickle=False)  # pickles run code
        loaded = {"x": loaded} if isinstance(loaded, np.ndarray) else loaded
        for name in loaded:
            with contextlib.suppress(ValueError, TypeError):  # objects or text beside the numbers
                a = loaded[name]  # made native if need be; else no copy: it stays mapped
                arrays[name] = torch.from_numpy(a.astype(a.dtype.newbyteorder("="), copy=False))
    except Exception:  # zip, zlib and NumPy each raise their own
        raise ValueError(f"{path} is damaged, or no .npy or .npz of numbers") from None
    return arrays


def check_set(images: Images, size: int, what: str) -> Images:
    """The set, its labels int64; ValueError naming what is wrong with it."""
    x, y, classes = images
    if x.dtype != torch.uint8 or tuple(x.shape[1:]) != (size, size, 3) or not len(x):
        raise ValueError(f"{what} must be uint8 [N,{size},{size},3], got {x.dtype} {list(x.shape)}")
    if y is None:
        return images
    if y.shape != (len(x),) or y.is_floating_point():
        raise ValueError(f"{what} needs {len(x)} integer labels, got {y.dtype} {list(y.shape)}")
    K = max(2, len(classes))  # of one class cross-entropy is 0
    if odd := sorted({*y.tolist()} ^ {*range(K)})[:9]:
        raise ValueError(f"{what} needs all labels 0..{K - 1}; missing or beyond: {odd}")
    return images._replace(y=y.long())


def keep_apart(kind: str, known: Sequence[Images], others: dict, most: float = 0.01) -> None:
    """Remark if `others` have images of `known`; ValueError if over a share `most`. No `Files`."""
    seen = {hash(v.tobytes()) for s in known if torch.is_tensor(s.x) for v in s.x.numpy()}
    for name, images in others.items():
        x = images.x.numpy() if torch.is_tensor(images.x) else ()
        both = sum(hash(v.tobytes()) in seen for v in x)
        text = f"{both} of the {len(x)} images of {name} are {kind} images too"
        if both > most * len(x):
            raise ValueError(text)
        if both:
            remark(f"warning: {text}")


class Files(torch.utils.data.Dataset):
    """Images that stay files, as uint8 [N,s,s,3]: x[slice or tensor] is another such set, x[[(i,
    seed), ...]] a batch [n,s,s,3] of random crops and flips, or the error of `open_image`."""

    def __init__(self, files: Any, size: int):
        import numpy as np

        self.files = np.array([os.fsencode(f) for f in files])  # workers would copy a list
        self.shape, self.dtype = (len(files), size, size, 3), torch.uint8

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        from torchvision import transforms as T

        if not isinstance(index, list):  # a slice or a tensor
            return Files(self.files[torch.arange(len(self))[index].tolist()], self.shape[1])
        steps = T.RandomResizedCrop(self.shape[1]), T.RandomHorizontalFlip(), T.PILToTensor()
        crop, crops = T.Compose(steps), []
        try:
            with torch.random.fork_rng(devices=[]):
                for i, seed in index:
                    torch.default_generator.manual_seed(seed)
                    crops.append(crop(open_image(os.fsdecode(self.files[i]))))
        except (ValueError, OSError) as e:
            return e  # `batches` raises it; raised in a worker it would keep all workers alive
        return torch.stack(crops).permute(0, 2, 3, 1).contiguous()


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders in `folder`, sorted, as numbers if all are; ValueError if < 2."""
    entries = [p for p in sorted(folder.glob("[!.]*")) if p.name not in LITTER]
    if len(names := [p.name for p in entries if p.is_dir()]) < 2:
        raise ValueError(f"{folder} has no folder of images for each of two classes or more")
    if loose := [p.name for p in entries if p.is_file()]:
        remark(f"{folder}: left out {len(loose)} files in no class folder: {loose[0]} …")
    return sorted(names, key=int if all(n.isdecimal() for n in names) else None)


def class_images(folder: Path, names: Sequence[str], size: int, lazy: bool = False) -> Images:
    """The labelled images of the named class folders below a folder, decoded or (lazy) as files."""
    found = [(f, y) for y, n in enumerate(names) for f in image_files(folder / n)]
    files, y = zip(*found, strict=True)
    images = Images(Files(files, size), torch.tensor(y), tuple(names))
    return images if lazy else images._replace(x=images.pixels())


# ---- Published sets: name, address, md5 (or -), what it becomes below the root, images (or 0).
_DB, _MOS = "https://www.dropbox.com/s/", "http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset"
_VGG, _MIT = "https://www.robots.ox.ac.uk/~vgg/data/dtd/download", "http://data.csail.mit.edu"
_CAL, _TORCH = "https://people.eecs.berkeley.edu/~hendrycks", "https://download.pytorch.org/models"
_SOURCES = f"""
textures {_VGG}/dtd-r1.0.1.tar.gz fff73e5086ae6bdbea199a49dfb8a4c1 dtd 5640
places365 {_MIT}/places/places365/val_256.tar e27b17d8d44f4af9a78502beb927f808 val_256 36500
lsun_c {_DB}fhtsw1m3qxlwj6h/LSUN.tar.gz?dl=1 458a0a0ab8e5f1cb4516d7400568e460 LSUN 1e4
lsun_r {_DB}moqh2wh8696c3yl/LSUN_resize.tar.gz?dl=1 278b7b31c8cb7e804a1465a8ce03a2dc LSUN_resize 1e4
isun {_DB}ssz7qxfqae0cca5/iSUN.tar.gz?dl=1 be77b0f2c26fda898afac5f99645ee70 iSUN 8925
inaturalist {_MOS}/iNaturalist.tar.gz 5be6ea8aa027d7b631916427b32cb335 iNaturalist 1e4
sun {_MOS}/SUN.tar.gz 8469c3ada62211477954ec1be53b12d0 SUN 1e4
places {_MOS}/Places.tar.gz b5cb5eba2754ae2a28beea8718db699a Places 1e4
random300k {_CAL}/300K_random_images.npy 64ca64357de98351f28454274a112dc3 300K_random_images.npy 0
densenet121 {_TORCH}/densenet121-a639ec97.pth - densenet121-a639ec97.pth 0"""
SOURCES = {name: rest for name, *rest in map(str.split, _SOURCES.strip().splitlines())}
PAPER_OOD = ("svhn", "textures", "places365", "lsun_c", "lsun_r", "isun")  # of Tables 1 and 2
IMAGENET_OOD = ("inaturalist", "sun", "places", "textures")  # of Table 3


def published(name: str, root: str | Path, download: bool) -> Any:
    """The path of a published set; for CIFAR torchvision's [train, test], for SVHN its [test]. If
    asked, the first process downloads. A file's md5, if known, is checked. FileNotFoundError."""
    from torchvision import datasets

    rank, ranks = world()
    parts = ["test"] if name == "svhn" else [True, False]  # SVHN's split=, CIFAR's train=
    download = download and rank == 0
    try:
        if rank > 0:  # until the first process has it and comes to `finally`
            torch.distributed.barrier()
        if name not in SOURCES:
            return [getattr(datasets, name.upper())(str(root), p, download=download) for p in parts]
        url, md5, target, _ = (None if v == "-" else v for v in SOURCES[name])
        path, file, web = Path(root, target), Path(url.partition("?")[0]).name, datasets.utils
        if download and not path.exists():
            fetch = web.download_url if target == file else web.download_and_extract_archive
            fetch(url, str(root), filename=file, md5=md5)
        if not path.is_dir() and not web.check_integrity(path, md5):
            raise OSError(f"{path}, of {url}, is absent, or damaged: then delete it")
        return path
    except (OSError, RuntimeError) as e:
        raise FileNotFoundError(f"{name} is not complete in {root}: {e} (--download)") from None
    finally:
        if rank == 0 and ranks > 1:
            torch.distributed.barrier()


def load_imagenet(part: str, root: Path, classes: str, size: int) -> Images:
    """ImageNet's "train" (files) or "val" of classes "A,B" or the authors' ten; "aux": the rest."""
    known, five = class_folders(root / "train"), "n02396427,n04141975,n02834397,n02111277,n03534580"
    names = (classes or five + ",n01877812,n02837789,n01443537,n02114367,n03857828").split(",")
    odd = sorted({*names} - {*known})[:3]
    if odd or not 2 <= len({*names}) == len(names) < len(known):
        raise ValueError(f"imagenet:NAMES: two to all but one of {root}/train, once; odd: {odd}")
    if part == "aux":
        part, names = "train", [n for n in known if n not in names]
    return class_images(root / part, names, size, part == "train")


def load_id(name: str, root: Any = "data", download: bool = False, size: int = 32) -> tuple:
    """Training and test `Images`: cifar10, cifar100, synthetic, imagenet[:CLASSES]; an .npz with
    x_train, y_train, x_test, y_test (at its size); or a folder train|test/CLASS, made size×size."""
    (kind, _, classes), path = str(name).partition(":"), Path(name).expanduser()
    if name == "synthetic":
        return synthetic("train"), synthetic("test")
    if kind == "imagenet":
        sets = [load_imagenet(p, Path(root, kind), classes, size) for p in ("train", "val")]
    elif name in ("cifar10", "cifar100"):
        both, tensor = published(name, root, download), torch.tensor
        sets = [Images(tensor(s.data), tensor(s.targets), tuple(s.classes)) for s in both]
    elif path.is_dir():
        names = class_folders(path / "train")
        if odd := sorted({*names} ^ {*class_folders(path / "test")})[:9]:
            raise ValueError(f"{path}/train and test: class folders that are in one only: {odd!a}")
        remark(f"the images of {path} become {size}×{size} (--size); classes: {names[:3]} ...")
        sets = [class_images(path / part, names, size) for part in ("train", "test")]
    else:
        arrays, keys = read_arrays(path), ("x_train", "y_train", "x_test", "y_test")
        if missing := [k for k in keys if k not in arrays]:
            raise ValueError(f"{path} has {[*arrays]} and needs numbers in {', '.join(missing)}")
        x, names = arrays["x_train"], tuple(map(str, range(len(arrays["y_train"].unique()))))
        sets = [Images(arrays[f"x_{p}"], arrays[f"y_{p}"], names) for p in ("train", "test")]
        size = x.shape[2] if x.dim() == 4 else size
    return check_set(sets[0], size, f"{name}, train,"), check_set(sets[1], size, f"{name}, test,")


def unlabelled(what: Any, root: Any, download: bool, size: int, split: str) -> Images:
    """Images of a built-in or published set (str), or of a Path: a folder, an .npy, or an .npz: its
    one uint8 [N,H,W,3], or of several that named x or with `split` in it. ValueError if not one."""
    if what in SYNTHETIC:
        return synthetic(what)
    where = what.expanduser() if isinstance(what, Path) else published(what, root, download)
    if isinstance(where, list):  # SVHN
        x = torch.from_numpy(where[0].data).permute(0, 2, 3, 1).contiguous()
        return Images(x).some(10_000)  # of each set (Section 6.1)
    if where.is_dir():
        files = image_files(where)
        if what in SOURCES and len(files) != (count := float(SOURCES[what][3])):
            raise ValueError(f"{where} has {len(files)} images, not {count:.0f}: unpack it again")
        edge = 2 if what == "lsun_c" else 0  # its images are 36×36: cropped
        some = Images(Files(files, size + 2 * edge)).some(10_000 if what in SOURCES else len(files))
        return Images(some.pixels()[:, edge : edge + size, edge : edge + size])
    arrays = read_arrays(where)
    uint8 = [k for k, a in arrays.items() if a.dtype == torch.uint8 and a.shape[3:] == (3,)]
    fits = uint8 if len(uint8) == 1 else [k for k in uint8 if k == "x" or split in k]
    has = ", ".join(f"{k} {str(a.dtype)[6:]} {[*a.shape]}" for k, a in arrays.items()) or "nothing"
    if len(fits) != 1:
        raise ValueError(f"{where} holds {has}: need a uint8 [N,H,W,3], one named x or {split}")
    if len(arrays) > 1:
        remark(f"{where} holds {has}: {fits[0]} is used")
    return Images(arrays[fits[0]])


def load_aux(name: str, root: Any = "data", download: bool = False, size: int = 32) -> Images:
    """Auxiliary outliers: "random300k", "synthetic", a path (see `unlabelled`), or the training
    images of all ImageNet classes but those of imagenet or imagenet:CLASSES, as files."""
    kind, _, names = name.partition(":")
    if kind == "imagenet":
        return Images(load_imagenet("aux", Path(root, kind), names, size).x)
    what = {"synthetic": "aux", "random300k": name}.get(name, Path(name))  # a str names a set
    return check_set(unlabelled(what, root, download, size, "train"), size, f"--aux {name}")


def load_ood(specs: list[str], root: Any = "data", download: bool = False, size: int = 32) -> dict:
    """OOD test sets by name. A spec: one of PAPER_OOD, IMAGENET_OOD or _OOD, "synthetic" (all of
    _OOD), or NAME=PATH. ValueError: no such set, a name twice, "id" or "mean"."""
    sets, known = {}, sorted({*PAPER_OOD, *IMAGENET_OOD, *_OOD})
    for item in itertools.chain(*(_OOD if spec == "synthetic" else [spec] for spec in specs)):
        name, equals, path = item.partition("=")
        odd = not path or name in ("", "id", "mean") or {*"/$"} & {*name} or not name.isprintable()
        if name in sets or (equals and odd):
            raise ValueError(f"--ood {item}: the name {name!r} is taken or unfit, or has no path")
        if not path and name not in known:
            raise ValueError(f"no OOD set {name!r}: NAME=PATH, synthetic, {', '.join(known)}")
        images = unlabelled(Path(path) if path else name, root, download, size, "test")
        sets[name] = check_set(images, size, f"--ood {item}")
    return sets


# ==================================================================================================
# 8  Training (Sections 4 and 6.1)


class Sampler(NamedTuple):
    """A step's auxiliary images: random, picked from its candidates, or out of the epoch's pool."""

    per_id: int = 1  # images for each ID image; 0: no auxiliary data
    pick: Callable[..., Tensor] | None = None  # (z, f, k = ID images, rng) -> k · per_id indices
    pool: Callable[..., Tensor] | None = None  # (run, order, n, rng) -> at most n of order


class Method(NamedTuple):
    """A training method: auxiliary loss × sampler × gradient term × score, and its recipe."""

    loss: Callable[..., Tensor]  # `greg_loss`'s aux_loss; energy_loss: Eq. (1), without options
    sampler: Sampler = Sampler()
    gradient: Score | None = None  # S, of all outputs, of Eq. (3), then of (1) too; None: no (3)
    score: str = "energy"  # a name in --scores, for tests alone: tells ID from OOD
    recipe: str = "finetune"
    lambda_s: float = 0.1
    extra_class: bool = False  # K + 1 outputs, the last one for "absent"
    prepare: Callable[..., tuple] | None = None  # (run, x_in, x_aux, rng) -> x_aux, loss's options
    margins: tuple[float, float] | None = None  # in place of --m-in, --m-aux


def ntom_pool(run: Run, order: Tensor, n: int, generator: Rng) -> Tensor:
    """NTOM's outliers of the epoch, a quarter of the auxiliary images at most."""
    p_absent = absent(embed_images(run, run.aux_set, order)[1])
    return order[quantile_mining(p_absent, min(n, max(1, len(order) // 4)))]


def poem_pool(run: Run, order: Tensor, n: int, generator: Rng) -> Tensor:
    """POEM's outliers of the epoch, as `order` has them: the n nearest to a random boundary."""
    # Regress on current features: target 3 for the outliers chosen in the last four epochs, -3
    # for the ID images, each counted once per such epoch. In the first epoch: the prior.
    buffer, n, d = run.memory.get("buffer", order[:0]), min(n, len(order)), run.net.fc.in_features
    gram, zy = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    sides = (run.train_set, None, len(buffer) // n, -3.0), (run.aux_set, buffer, 1, 3.0)
    for images, i, times, target in sides if len(buffer) else ():
        z = embed_images(run, images, i)[0].double()
        gram += times * (z.mT @ z)
        zy += times * target * z.sum(0)
    beta = poem_draw(*poem_posterior(gram, zy), generator)
    z = embed_images(run, run.aux_set, order)[0]
    chosen = order[(z @ beta.to(z.dtype)).abs().argsort(stable=True)[:n].sort().values]
    run.memory["buffer"] = torch.cat([buffer, chosen])[-4 * n :]
    return chosen


def mix(run: Run, x_in: Tensor, x_aux: Tensor, generator: Rng) -> tuple[Tensor, dict]:
    """OpenMix: lam x_in + (1 - lam) x_aux; lam ~ Beta(10, 10) as tenth smallest of 19 uniform."""
    lam = torch.rand(19, generator=generator, device=x_in.device).sort().values[9]
    return lam * x_in + (1 - lam) * x_aux, {"lam": lam}


def balance(run: Run, x_in: Tensor, x_aux: Tensor, generator: Rng) -> tuple[Tensor, dict]:
    """Balanced energy's prior: the shares of classes that the start predicts on all of --aux."""
    c, K = run.config, run.net.fc.out_features
    if "prior" not in run.memory:
        classes = embed_images(run, run.aux_set)[1].argmax(1)
        run.memory["prior"] = torch.bincount(classes, minlength=K) / len(classes)
    prior = run.memory["prior"].to(x_aux.device)  # below, alpha and gamma as the authors have them
    return x_aux, dict(m_in=c.m_in, m_aux=c.m_aux, prior=prior, alpha=K, gamma=0.5 / K)


# k = --batch / processes: each process clusters its own candidates.
ENERGY_SAMPLING = Sampler(2, lambda z, f, k, g: energy_sampling(z, energy_score(f), k, g))
DOS_SAMPLING = Sampler(1, lambda z, f, k, g: energy_sampling(z, absent(f), k, g, ends=(0,)))
# lambda_s: OE 0.5, its paper; K+1 classes 1, their code; the rest 0.1, Section 6.1. Auxiliary
# images for each ID image: as each method's code has it, but energy 1 as GReg.
METHODS = {  # loss, sampler, gradient, score, recipe, lambda_s, extra_class, prepare, margins
    "ce": Method(lambda f_in, *_: f_in.new_zeros(()), Sampler(0), recipe="pretrain"),
    "energy": Method(energy_loss),
    "greg": Method(energy_loss, gradient=energy_score),
    "energy+sampling": Method(energy_loss, ENERGY_SAMPLING, recipe="greg+"),
    "greg+": Method(energy_loss, ENERGY_SAMPLING, energy_score, recipe="greg+"),
    "oe": Method(oe_loss, Sampler(2), score="msp", lambda_s=0.5),
    "openmix": Method(openmix_loss, Sampler(), None, "msp", "openmix", 1, True, mix),
    "poem": Method(energy_loss, Sampler(1, pool=poem_pool), recipe="mining"),
    "ntom": Method(absent_loss, Sampler(2, pool=ntom_pool), None, "absent", "mining", 1, True),
    "dos": Method(absent_loss, DOS_SAMPLING, None, "absent", "mining", 1, True),
    "balanced": Method(balanced_energy_loss, Sampler(2), prepare=balance),
    # The paper gives no margins for OE's score in Eq. (3): here max softmax 1/2 tells ID from OOD.
    "oe+grad": Method(oe_loss, Sampler(2), msp, score="msp", lambda_s=0.5, margins=(-0.5, -0.5)),
    "poem+grad": Method(energy_loss, Sampler(1, pool=poem_pool), energy_score, recipe="mining"),
}

# SGD, Nesterov momentum 0.9. "finetune" (on ImageNet of all, "ce" if it has a start): 6.1, lr and
# wd the energy authors', batch the paper's code. "greg+": 6.1, batch, wd: defaults of that code.
# "pretrain": energy's and OE's code; "mining": NTOM's, POEM's, DOS's; "openmix": its, + Nesterov.
RECIPES = {
    "pretrain": {"epochs": 100, "lr": 0.1, "schedule": "cosine", "batch": 128, "wd": 5e-4},
    "finetune": {"epochs": 20, "lr": 0.001, "schedule": "cosine", "batch": 64, "wd": 5e-4},
    "greg+": {"epochs": 60, "lr": 0.1, "schedule": "5/6", "batch": 64, "wd": 1e-4},
    "mining": {"epochs": 100, "lr": 0.1, "schedule": "0.5,0.75,0.9", "batch": 64, "wd": 1e-4},
    "openmix": {"epochs": 200, "lr": 0.1, "schedule": "0.5,0.75", "batch": 128, "wd": 5e-4},
}
FREE = ("cuda_graph", "ood", "root", "download", "workers")  # may differ when a run goes on


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of `Config` and what argparse is told of it."""
    return field(default=default, metadata={"help": help} | more)


@dataclass(frozen=True)
class Config:
    """The options of a run. `resolve` fills in None, and "" where data or start imply a value."""

    method: str = option("greg", "training method", choices=METHODS)
    id: str = option("cifar10", "ID data: cifar10, cifar100, synthetic, imagenet[:CLASSES], a path")
    aux: str = option("", "auxiliary data: random300k, synthetic, imagenet, a path (by --id)")
    size: int = option(None, "side of images from files (224 for imagenet, else 32)")
    arch: str = option("wrn40_2", "network", choices=ARCHS)
    seed: int = option(0, "fixes initialisation, order, augmentation and sampling")
    init: str = option("", "run folder or weights file to start from (fine-tuning needs one)")
    epochs: int = option(None, "passes over the ID data (recipe)")
    lr: float = option(None, "initial learning rate (recipe)")
    schedule: str = option(None, "cosine, or shares of the run after which lr falls (recipe)")
    batch: int = option(None, "ID images a step = clusters k, over all processes (recipe)")
    wd: float = option(None, "weight decay (recipe)")
    candidates: int = option(6, "when sampling: least candidates an ID image (over --aux-epoch)")
    aux_epoch: int = option(600_000, "when sampling: auxiliary images an epoch (or all)")
    n_train: int = option(0, "train (eval: fit scores) on N random ID images (0: all)")
    margins: str = option("", "auto: from the start's mean scores", choices=("", "auto"))
    m_in: float = option(-25.0, "margin of ID scores, Eqs. (1) and (3)")
    m_aux: float = option(-7.0, "margin of auxiliary scores, Eqs. (1) and (3)")
    lambda_s: float = option(None, "weight of the auxiliary loss (method)")
    lambda_grad: float = option(1.0, "weight of Eq. (3), for methods that have it")
    reduction: str = option("paper", "Eq. (3), or Eq. (3) / N", choices=("paper", "released"))
    grad_every: int = option(1, "Eq. (3) in every N-th step only, with N-fold weight")
    noise: float = option(0.0, "std of Gaussian noise on training pixels in [0,1] (for smoothing)")
    stats: str = option("", "normalisation (start's, ID data's, or cifar10)", choices=("", *STATS))
    amp: bool = option(False, "bfloat16 autocast")
    sync_bn: bool = option(False, "batch statistics over all processes of torchrun")
    channels_last: bool = option(False, "channels-last memory format")
    cuda_graph: bool = option(False, "replay steps as a CUDA graph (not of openmix, balanced)")
    ood: Sequence[str] = option((), "OOD sets: names, NAME=PATH (by the run, or --id)")
    root: str = option("data", "folder of the data sets")
    download: bool = option(False, "fetch the sets that are absent")
    workers: int = option(4, "processes that decode ID images, and as many for auxiliary ones")


def fine_tunes(method: str, id_data: str) -> bool:
    """Whether a method needs a pre-trained network: on ImageNet all but ce (Section 6.1)."""
    imagenet = id_data.partition(":")[0] == "imagenet"
    return METHODS[method].recipe == "finetune" or (imagenet and method != "ce")


def one_spelling(path: Any) -> str:
    """A path that exists as an absolute one, and a run's file as the run; names stay."""
    path = os.path.expanduser(str(path))
    if os.path.exists(path) and path not in (*STATS, "synthetic", "random300k", "torchvision"):
        path = os.path.realpath(path)
    return path.removesuffix("/checkpoint.pt")


def with_whole_paths(c: Config) -> Config:
    """`c` with each path in one spelling: it is the same run from every folder."""
    specs = [c.ood] if isinstance(c.ood, str) else c.ood
    parts = [v.partition("=") for s in specs for v in (_OOD if s == "synthetic" else [s])]
    ood = tuple(name + equals + one_spelling(path) for name, equals, path in parts)
    return replace(c, ood=ood, **{k: one_spelling(vars(c)[k]) for k in "id aux init root".split()})


def resolve(c: Config, had: str | None = None) -> Config:
    """`c` with None and "" filled in by data, method and recipe; ValueError for bad options.
    `had`: the normalisation that the weights had so far; if None, --init's is read."""
    plain = {k: v.item() for k, v in vars(c).items() if hasattr(v, "item")}  # NumPy scalars
    c = with_whole_paths(replace(c, **plain))
    for f in (f for f in fields(c) if "choices" in f.metadata):
        if (value := getattr(c, f.name)) not in f.metadata["choices"]:
            raise ValueError(f"no {f.name} {value!r}: one of {', '.join(f.metadata['choices'])}")
    method, kind, init = METHODS[c.method], c.id.partition(":")[0], c.init
    if not init and (kind, c.method, c.arch) == ("imagenet", "ce", "densenet121"):
        init = "torchvision"
    tunes, per_id = fine_tunes(c.method, c.id), method.sampler.per_id  # 0: no auxiliary data
    # On ImageNet "ce" with a start uses the short recipe: little but the head is new.
    fill = RECIPES["finetune" if tunes or (kind == "imagenet" and init) else method.recipe]
    fill = fill | {"lambda_s": method.lambda_s, "size": 224 if kind == "imagenet" else 32}
    fill = {k: v for k, v in fill.items() if getattr(c, k) is None}
    usual = c.id if kind in ("synthetic", "imagenet") else "random300k"
    aux = c.id if kind == c.aux == "imagenet" else c.aux or usual  # imagenet:A,B: all but A, B
    if init and not had:
        had = "imagenet" if init == "torchvision" else stored(init).get("config", {}).get("stats")
    stats = c.stats or had or (kind if kind in STATS else "cifar10")
    c = replace(c, init=init, stats=stats, aux=aux if per_id else "", **fill)
    learning_rate(c, 0)  # raises for a bad --schedule
    positive = "epochs lr batch size candidates grad_every".split()
    numbers = {f.name: getattr(c, f.name) for f in fields(c) if f.type in ("int", "float")}
    del numbers["m_in"], numbers["m_aux"]  # which may be negative
    low = [k for k, v in numbers.items() if not 0 <= v < math.inf or (k in positive and not v)]
    known = {*SCORES} - NEED_FIT - (set() if method.extra_class else {"absent"})
    no_start = not init and (tunes or c.margins and (method.gradient or method.loss is energy_loss))
    own = method.gradient not in (None, energy_score) and not method.margins
    others = kind == c.aux.partition(":")[0] == "imagenet" and c.aux != c.id  # can overlap
    for wrong, text in (
        (low, f"--{' --'.join(low)} too small, or no number".replace("_", "-")),
        (had not in (None, stats), f"--stats {stats}: the run, or its start, has {had}"),
        (method.sampler.pick and c.candidates < per_id, f"--candidates must be at least {per_id}"),
        (c.margins and (c.m_in, c.m_aux) != (-25, -7), "--margins auto sets --m-in and --m-aux"),
        (not -math.inf < c.m_in < c.m_aux < math.inf, f"need m_in < m_aux: {c.m_in}, {c.m_aux}"),
        (c.margins and own, f"--margins auto is of the energy score, {c.method} has another"),
        (others, f"--aux {c.aux} is not --id's and may share its images: omit --aux"),
        (method.score not in known, f"METHODS: no score {method.score!r} for it: {sorted(known)}"),
        (no_start, f"{c.method if tunes else '--margins auto'} needs a pre-trained start: --init"),
    ):
        if wrong:
            raise ValueError(text)
    return c


def learning_rate(c: Config, t: Fraction) -> float:
    """Learning rate at the share t in [0, 1) of the run: cosine to 0, or / 10 at each share."""
    if c.schedule == "cosine":
        return c.lr * (1 + math.cos(math.pi * t)) / 2
    with contextlib.suppress(ValueError, ZeroDivisionError):  # where the text holds no fractions
        shares = [Fraction(share) for share in c.schedule.split(",")]
        if all(0 < share < 1 for share in shares):
            return c.lr * 0.1 ** sum(t >= share for share in shares)
    raise ValueError(f'--schedule is "cosine" or shares as "0.5,3/4", not {c.schedule}')


def hashed(*key: object) -> int:
    """A seed that is a function of `key` alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")


def rng(device: torch.device | str, *key: object) -> torch.Generator:
    """A generator that is a function of `key` alone: no generator's state need be saved."""
    return torch.Generator(device).manual_seed(hashed(*key))


# ---- What a run leaves in its folder.
def write_atomically(path: Path, content: str | bytes | memoryview, keep: str = "") -> None:
    """The first process writes a file, whole or not at all; `keep`: a name for the old one."""
    if world()[0] > 0:
        return
    temp = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temp.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
        if keep and path.exists():
            write_atomically(path.with_name(keep), path.read_bytes())
        os.replace(temp, path)
    except OSError as e:
        raise OSError(f"{path} could not be written ({e}); an old one is intact") from e
    finally:
        temp.unlink(missing_ok=True)


def read_tensors(path: str | Path) -> Any:
    """What torch.save wrote to a file (of a folder: checkpoint.pt), without running code in it."""
    path = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    content = path.read_bytes()
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as e:
        other = re.search(r"GLOBAL ([\w.]+)", str(e))
        what = "is no file of torch.save, or a damaged one" if content else "is empty"
        what = f"has an object of {other[1]}: save its state dict alone" if other else what
        raise ValueError(f"{path} {what}; it starts with {content[:9]!r}") from None


def load_weights(net: nn.Module, path: str | Path, state: Any = None) -> nn.Module:
    """Load a checkpoint of ours or of the field's public ones into `net`; every weight or an error.

    By name, below any prefix or beside other submodules, else by position: code bases name the same
    layers differently but list them in forward order. The last part of a name and the shape must
    agree. ValueError for what does not fit, OSError without the file."""
    if state and "gamma" not in state:  # a run's, read by the caller; its end saves gamma too
        remark(f"warning: {path} is not finished: its weights so far are used")
    state = state or read_tensors(path)
    wraps = {*"net state_dict model_state_dict model params weights ema model_ema".split()}
    while isinstance(state, dict) and len(inside := wraps & {*state}) == 1:  # of two none is chosen
        state = state[inside.pop()]
    ours, theirs = (  # but for batch norm's counters, which old files lack
        {str(k): v for k, v in d.items() if torch.is_tensor(v) and "batches_tracked" not in str(k)}
        for d in (net.state_dict(), state if isinstance(state, dict) else {})
    )
    # Tried: all of the file; its parts that we have too; each part. Kept: as many tensors as ours.
    part = {k: k.partition(".")[0] for k in (*ours, *theirs)}  # "module.fc.bias" -> "module"
    wanted = {part[k] for k in theirs}, {part[k] for k in ours}, *({part[k]} for k in theirs)
    found = {tuple(k for k in theirs if part[k] in parts) for parts in wanted}  # without repeats
    found = [keys for keys in found if len(keys) == len(ours)]
    if len(found) != 1:
        keys = [*map(str, theirs or state)] if isinstance(state, dict) else [type(state).__name__]
        has = f"{path} has {len(theirs)} tensors ({', '.join(keys[:3])}, ...)"
        fit = f"{len(found)} sets of which fit the network's {len(ours)}"
        raise ValueError(f"{has}, {fit}: another network (--arch), or two in one file?")
    pairs = dict(zip(sorted(ours), sorted(found[0]), strict=True))  # our name -> theirs
    if not all(their.endswith(our) for our, their in pairs.items()):  # other names: by position
        pairs = dict(zip(ours, found[0], strict=True))
    for our, their in pairs.items():
        old, new = ours[our], theirs[their]
        displaced = our in theirs and their != our  # our name is there too, for another tensor
        if displaced or their.rsplit(".")[-1] != our.rsplit(".")[-1] or new.shape != old.shape:
            shapes = f"{list(new.shape)}, the network's {our} {list(old.shape)}"
            raise ValueError(f"{path} is of another network or class count: {their} {shapes}")
        if new.is_floating_point() != old.is_floating_point() or not new.isfinite().all():
            raise ValueError(f"{path} has {new.dtype}, NaN or infinity in {their}: it diverged?")
    net.load_state_dict({a: theirs[b] for a, b in pairs.items()}, strict=False)  # less counters
    return net


def stored(path: str | Path) -> dict[str, Any]:
    """The checkpoint of a run's folder or file, as `save` wrote it; {} of other tensors."""
    state = read_tensors(Path(path).expanduser())  # it finds the checkpoint of a folder
    return state if isinstance(state, dict) and {"config", "net", "classes"} <= {*state} else {}


def saved_config(saved: dict[str, Any], to_run: bool = True) -> Config:
    """A run's configuration, `to_run` or just to show; options it lacks have their defaults."""
    known = {f.name: saved[f.name] for f in fields(Config) if f.name in saved}
    for key, table in ("arch", ARCHS), ("method", METHODS), ("stats", STATS):
        if to_run and known.get(key) not in table:
            raise ValueError(f"no {key} {known.get(key)!r} here, which the run was made with")
    return Config(**known)


def check_same(c: Config, saved: dict[str, Any], folder: Path) -> None:
    """ValueError naming what differs from the folder's run; a path that is gone has moved."""
    free, differ = {*FREE, *(("m_in", "m_aux") if c.margins else ())}, []
    for key, old in asdict(saved_config(saved)).items():
        new = getattr(c, key)
        if key in free or old == new:  # numbers too: 1 == 1.0
            continue
        gone = os.path.isabs(str(old)) and not os.path.exists(old)
        if gone and Path(old).name == Path(new).name:
            remark(f"{old} is gone: {new} is taken for it")
        else:
            differ.append(f"{key} {old} -> {new}")
    if differ:
        raise ValueError(f"{folder} differs, {', '.join(differ)}: its options or another folder")


def check_classes(saved: dict[str, Any], classes: Sequence[str], size: int, where: Any) -> None:
    """ValueError if stored weights were learnt on other classes; a remark if on another size."""
    if (old := list(saved.get("classes", classes))) != (new := list(classes)):
        gone, more = ([k for k in a if k not in b][:5] for a, b in ((old, new), (new, old)))
        raise ValueError(f"{where} had other classes, or their order: gone {gone!a}, new {more!a}")
    if (trained := saved.get("size", size)) != size:
        remark(f"warning: {where} was trained on images of {trained}×{trained}, not {size}")


@contextlib.contextmanager
def interrupts(run: Run) -> Iterator[None]:
    """SIGTERM, SIGHUP and Ctrl-C let the step end, save and stop; a second Ctrl-C stops at once."""

    def stop(number: int, frame: object) -> None:
        run.stopped_by = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # SIGTERM often comes twice

    with contextlib.ExitStack() as before:
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup, embedded
                before.callback(signal.signal, number, signal.signal(number, stop))  # the old one
        yield
    if run.stopped_by:  # since the last `look`; `end_epoch` has saved
        raise KeyboardInterrupt


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One run at a time in a folder, made if need be; ValueError for a second."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            import fcntl

            if world()[0] == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process works in {folder}: wait or use another") from None
        except (ImportError, OSError) as e:  # Windows, and file systems without locks
            remark(f"warning: {folder} cannot be locked ({e}): begin no second run in it")
        yield


# ---- The network.
@torch.random.fork_rng(devices=[])  # the caller's generator stays as it is
def build(c: Config, classes: Sequence[str], size: int = 32) -> Net:
    """The network a run begins with: --init's (K outputs); the rest (head, K+1st) by --seed."""
    K, outputs = len(classes), len(classes) + METHODS[c.method].extra_class
    torch.default_generator.manual_seed(c.seed % 2**63)  # the CPU's alone
    net = ARCHS[c.arch](outputs)
    if not isinstance(net, Net) or net.fc.bias is None or len(net.fc.bias) != outputs:
        raise ValueError(f"ARCHS[{c.arch!r}]({outputs}) is no greg.Net of so many outputs, biased")
    if (c.init, c.arch) == ("torchvision", "densenet121"):
        weights = published("densenet121", c.root, c.download)
        net.features = load_weights(ARCHS[c.arch](1000), weights).features
    elif c.init:
        saved = stored(c.init)
        check_classes(saved, classes, size, c.init)
        given = load_weights(ARCHS[c.arch](K), Path(c.init).expanduser(), saved)
        net.fc.weight.data[:K], net.fc.bias.data[:K] = given.fc.weight.data, given.fc.bias.data
        given.fc, net = net.fc, given
    return net


def chunk(x: Tensor | Files, gpu: int = 128, device: torch.device | None = None) -> int:
    """How many of x at once: 32 of 3×32×32 fit a CPU's cache; or enough to keep a GPU busy."""
    return max(1, 98304 // math.prod(x.shape[1:])) if (device or x.device).type == "cpu" else gpu


def embed(net: nn.Module, x: Tensor, amp: bool = False) -> tuple[Tensor, Tensor]:
    """`features_and_logits` in eval mode, no gradients, by chunks; float32, whatever the net's."""
    with eval_mode(net), torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, amp):
        pairs = [features_and_logits(net, part) for part in x.split(chunk(x, 512))]
    return tuple(torch.cat(v).float() for v in zip(*pairs, strict=True))


@torch.inference_mode(False)  # with gradients, whatever the caller's mode
def input_gradients(net: nn.Module, x: Tensor, K: int | None = None) -> Tensor:
    """‖∇S(x_i)‖₂ in eval mode for each of x [N,...], in its space; S of K logits (None: all)."""
    with eval_mode(net), torch.autocast(x.device.type, enabled=False):
        x = x.clone().detach().requires_grad_()
        return gradient_norm(energy_score(net(x)[:, :K]), x).detach()


def embed_images(run: Run, images: Images, i: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Features and logits of images i (None: all), not augmented, in the CPU's memory."""
    i = torch.arange(len(images.x)) if i is None else i
    inputs = (to_input(run, images.pixels(part)) for part in bar(i.split(512), "embed"))
    pairs = [[v.cpu() for v in embed(run.net, x, run.config.amp)] for x in inputs]
    return tuple(torch.cat(v) for v in zip(*pairs, strict=True))


# ---- The loop.
CODE = hashlib.sha256(Path(globals().get("__file__", os.devnull)).read_bytes()).hexdigest()[:12]
SAVE_SECONDS = 600  # between saves within an epoch
SIGNALS = signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows
TERMS = ("loss", "ce", "auxiliary", "gradient", "accuracy", "share_in", "share_aux")


@dataclass
class Run:
    """A run: its data, network and optimiser, and where it stands."""

    config: Config
    folder: Path
    device: torch.device
    train_set: Images
    aux_set: Images | None
    net: Net
    optimizer: torch.optim.Optimizer
    sums: Tensor  # of TERMS, over the steps of the epoch
    steps: int  # of an epoch
    marks: dict[str, Any] = field(default_factory=dict)  # what tells its data from others
    epoch: int = 0
    step: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)  # of samplers and losses
    rows: list[dict[str, float]] = field(default_factory=list)  # of log.jsonl
    stopped_by: int = 0  # number of the signal
    saved_at: float = field(default_factory=time.time)


def start(c: Config, folder: Path, device: torch.device, ids: Images, aux: Images | None) -> Run:
    """A new run, or the folder's at the step where it stopped; ValueError if it is another."""
    ranks, sampler, size = world()[1], METHODS[c.method].sampler, ids.x.shape[1]
    need = c.batch * (c.candidates if sampler.pick else sampler.per_id)
    if c.batch % ranks or len(ids.x) < c.batch or (aux and len(aux.x) < need):
        has = f"{len(ids.x)} ID and {len(aux.x) if aux else 0} auxiliary images, {ranks} processes"
        raise ValueError(f"{has}: a step takes {c.batch} and {need} (--batch, --candidates)")
    if none := [k for i, k in enumerate(ids.classes) if not (ids.y == i).any()]:
        raise ValueError(f"no training images of the classes {none[:5]}: a larger --n-train")
    begun = any((folder / f"checkpoint{k}.pt").exists() for k in ("", ".prev"))  # then no --init
    some = [s.x[:: len(s.x) // 16 or 1].tolist() for s in (ids, aux) if s and torch.is_tensor(s.x)]
    marks = {"labels": hashed(ids.y.tolist()), "pixels": hashed(some)}  # some: 16 or more of each
    marks |= {"n_aux": len(aux.x) if aux else 0, "classes": [*ids.classes], "size": size}
    net = build(replace(c, init="") if begun else c, ids.classes, size).to(device)
    for v in net.state_dict().values() if ranks > 1 else ():
        torch.distributed.broadcast(v, 0)  # of networks that --seed does not fix
    for m in net.modules() if c.sync_bn and ranks > 1 else ():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if type(m) is not nn.BatchNorm2d or None in (m.bias, m.momentum, m.running_var):
                raise ValueError(f"--sync-bn is for plain nn.BatchNorm2d, not {m}: leave it out")
            m.__class__ = SyncBatchNorm2d
    net = net.to(memory_format=torch.channels_last) if c.channels_last else net
    with bar(None, "set up", total=1):  # PyTorch's first optimiser imports a lot
        sgd = torch.optim.SGD(net.parameters(), c.lr, 0.9, weight_decay=c.wd, nesterov=True)
    sums, steps = torch.zeros(len(TERMS), device=device), len(ids.x) // c.batch
    run = Run(c, folder, device, ids, aux, net, sgd, sums, steps, marks)
    if begun:
        if not (state := stored(folder)):
            raise ValueError(f"{folder}/checkpoint.pt is no run's: choose another folder")
        check_same(c, state["config"], folder)
        check_classes(state, ids.classes, size, folder)
        if any(state.get(k, v) != v for k, v in marks.items()):
            raise ValueError(f"{folder} was trained on other images: another number, or order")
        net.load_state_dict(state["net"])
        sgd.load_state_dict(state["optimizer"])
        sums += state["sums"].to(device)
        run.config = replace(c, **{k: state["config"][k] for k in ("m_in", "m_aux", "init")})
        return replace(run, **{k: state[k] for k in ("epoch", "step", "memory", "rows")})
    row = log(run, {"epoch": 0})
    if c.margins and aux and not METHODS[c.method].margins:
        # The start's means, as the energy authors advise, but >= 0.72 |m_in| apart, as -25 and -7.
        s_in, s_aux = row["probe_s_in"], row["probe_s_aux"]
        m_in, m_aux = round(s_in, 2), round(max(s_aux, s_in + 0.72 * abs(s_in) + 0.01), 2)
        run.config = replace(c, m_in=m_in, m_aux=m_aux)
        remark(f"{folder}: --m-in {m_in} --m-aux {m_aux}")
        log(run, {"epoch": 0})  # once more, with these
    return run


def save(run: Run, **more: Any) -> None:
    """Write all that a resumed run needs; the checkpoint before stays, as checkpoint.prev.pt."""
    state = {k: getattr(run, k) for k in ("memory", "rows", "epoch", "step", "sums")}
    state |= run.marks | more | {"config": asdict(run.config)}
    state |= {"net": run.net.state_dict(), "optimizer": run.optimizer.state_dict()}
    content = io.BytesIO()  # torch.save raises RuntimeError on a full disk
    torch.save(state, content)
    write_atomically(run.folder / "checkpoint.pt", content.getbuffer(), "checkpoint.prev.pt")
    run.saved_at = time.time()


def to_input(run: Run, x: Tensor, generator: Rng = None) -> Tensor:
    """uint8 [n,H,W,C] -> the network's input [n,C,H,W], with --noise if there is a generator."""
    x = normalise(x.to(run.device, non_blocking=True), *STATS[run.config.stats])
    if run.config.noise and generator:
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        x += run.config.noise * noise / x.new_tensor(STATS[run.config.stats][1]).view(-1, 1, 1)
    return x.contiguous(memory_format=torch.channels_last) if run.config.channels_last else x


def _leave_signals(worker):
    for number in SIGNALS:  # often sent to the whole group: the parent saves
        signal.signal(number, signal.SIG_IGN)


def batches(run: Run) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """x_in, y_in, x_aux (or its candidates) of each step that is left of the epoch: functions of
    seed, epoch, step, rank, ranks and pool, not of workers or stops. Each order of images is cut
    into steps · ranks parts: at step t process r takes part t · ranks + r."""
    c, (rank, ranks), sampler = run.config, world(), METHODS[run.config.method].sampler
    g, ids, aux = rng("cpu", c.seed, run.epoch, "order"), run.train_set, run.aux_set
    parts = range(run.step * ranks + rank, run.steps * ranks, ranks)  # of this process

    def cut(order, n, of=run.steps * ranks):  # ours of `of` parts of n indices, `order` repeated
        return [order[torch.arange(n * i // of, n * (i + 1) // of) % len(order)] for i in parts]

    def crops(kind, images, order, n):
        key, pairs = (c.seed, run.epoch, kind), zip(parts, cut(order, n), strict=True)
        if isinstance(images.x, Files):  # workers crop a step's lot, [(index, crop's seed), ...]
            lots = ([(j, hashed(*key, i, p)) for p, j in enumerate(at.tolist())] for i, at in pairs)
            more = {"num_workers": c.workers, "worker_init_fn": _leave_signals}
            stream = torch.utils.data.DataLoader(images.x, batch_size=None, sampler=lots, **more)
        else:
            stream = (augment(images.x[at].to(run.device), rng("cpu", *key, i)) for i, at in pairs)
        for i, x in zip(parts, stream, strict=True):
            if isinstance(x, Exception):  # of a worker: a file that is no image
                raise ValueError(f"{x}: put another image in its place and go on")
            yield to_input(run, x, rng(run.device, *key, i, "noise"))

    n, order = c.batch * run.steps, torch.randperm(len(ids.x), generator=g)
    streams = [crops("in", ids, order, n), (ids.y[at].to(run.device) for at in cut(order, n))]
    if aux:
        n_aux, pool = n * sampler.per_id, torch.randperm(len(aux.x), generator=g)
        if sampler.pool and not run.step:  # by the network at the epoch's start; then it is kept
            run.memory["pool"] = sampler.pool(run, pool[:400_000], n_aux, g)  # as POEM and NTOM
        pool = run.memory.get("pool", pool)
        if sampler.pick:
            n_aux = max(min(len(pool), c.aux_epoch), c.candidates * n)  # 6.1: all (CIFAR), or 600K
        streams.append(crops("aux", aux, pool, n_aux))
    for x_in, y_in, *x_aux in zip(*streams, strict=True):
        yield x_in, y_in, x_aux[0] if aux else x_in[:0]  # no auxiliary data: no images


def train_epoch(run: Run) -> None:
    """The rest of the current epoch by L = L_CE + λ_S L_S + λ_∇S L_∇S (Section 4.1)."""
    c, method, (rank, ranks), began = run.config, METHODS[run.config.method], world(), time.time()
    (m_in, m_aux), S = method.margins or (c.m_in, c.m_aux), method.gradient or energy_score

    def differentiate(x_in, y_in, x_aux, **options):  # -> the step's TERMS; sets weights' .grad
        aux_loss = None if method.loss is energy_loss else functools.partial(method.loss, **options)
        # --grad-every n: in each n-th step, n-fold (lazy regularisation, Karras et al. 2020).
        on = method.gradient and (run.epoch * run.steps + run.step) % c.grad_every == 0
        fold = c.grad_every if on else 0  # factor of lambda_grad in this step; 0: no Eq. (3)
        fold /= ranks if c.reduction == "released" else 1  # N of all ranks: greg_loss's times ranks
        rest = m_in, m_aux, c.lambda_s, c.lambda_grad * fold, c.reduction, S, aux_loss  # in order
        run.net.train()
        with torch.autocast(run.device.type, torch.bfloat16, c.amp), FastDoubleBackward():
            out = greg_loss(run.net, x_in, y_in, x_aux, *rest)  # the mode saves time alone
        run.optimizer.zero_grad()  # in here, as a CUDA graph owns the .grad that it makes
        out.loss.backward()
        hit = out.logits[: len(y_in), : len(run.train_set.classes)].argmax(1) == y_in
        s_in, s_aux = out.scores.split([len(x_in), len(x_aux)])
        shares = [v.sum() / max(1, len(v)) for v in (hit, s_in <= m_in, s_aux >= m_aux)]
        terms = *out[:3], out.gradient * fold, *shares  # in the order of TERMS
        return torch.stack([v.float() for v in terms]).detach()  # no graph outlives the step

    step = Graphed(differentiate) if c.cuda_graph and not method.prepare else differentiate
    what = f"{c.method} {c.arch} seed {c.seed} {run.epoch + 1}/{c.epochs}"
    progress, looked = bar(batches(run), what, total=run.steps, initial=run.step), began
    for x_in, y_in, x_aux in progress:  # x_aux: to train on, or to pick from
        g, t = rng(run.device, c.seed, run.epoch, run.step, rank), Fraction(run.step, run.steps)
        if method.sampler.pick:  # Algorithm 1
            z, f = embed(run.net, x_aux, c.amp)
            x_aux = x_aux[method.sampler.pick(z, f, len(x_in), g)]
        x_aux, options = method.prepare(run, x_in, x_aux, g) if method.prepare else (x_aux, {})
        run.sums += average(step(x_in, y_in, x_aux, **options))  # L_CE, Eqs. (1), (3), backward
        for v in [*(p.grad for p in run.net.parameters()), *run.net.buffers()] if ranks > 1 else ():
            if v is not None and v.is_floating_point():  # one gradient and one set of statistics
                v.copy_(average(v))
        run.optimizer.param_groups[0]["lr"] = learning_rate(c, (run.epoch + t) / c.epochs)
        run.optimizer.step()
        run.step += 1
        if ranks > 1 or run.stopped_by or time.time() > looked + 1:  # all ranks at the same steps
            look(run, progress)
            looked = time.time()
    end_epoch(run, look(run, progress) | {"seconds": time.time() - began})


def look(run: Run, progress: Any) -> dict[str, float]:
    """Check, show and return the mean TERMS of the epoch so far; save if due, stop if asked to."""
    means = dict(zip(TERMS, (run.sums / run.step).tolist(), strict=True))
    if bad := [k for k in (*TERMS[1:], "loss") if not math.isfinite(means[k])]:  # last: their sum
        where = f"not finite in epoch {run.epoch + 1}, step {run.step} of {run.folder}"
        why = "--lr (or, if in use, --lambda-grad) is too large, or --stats not the start's"
        raise FloatingPointError(f"the {bad[0]} term is {where}: {why}")
    some = [f"{k} {v:.2g}" for k, v in means.items() if v and k not in ("ce", "auxiliary")]
    progress.set_postfix_str(" ".join(some), refresh=False)
    stop = average(torch.tensor(float(run.stopped_by), device=run.device))  # of any rank
    if stop or time.time() - run.saved_at > SAVE_SECONDS:
        save(run)
    if stop:  # all processes, though the signal may have met one
        progress.close()
        average(stop).item()  # waits until the first has saved: torchrun stops all if one leaves
        number = run.stopped_by or int(signal.SIGTERM)
        remark(f"signal {number}, saved {run.folder}: the command goes on from here")
        raise SystemExit(128 + number)
    return means


def end_epoch(run: Run, row: dict[str, float]) -> None:
    """Log, save, and warn if the accuracy collapses or the gradient term is off."""
    c, method = run.config, METHODS[run.config.method]
    run.epoch, run.step = run.epoch + 1, 0
    run.sums.zero_()
    row = log(run, row | {"epoch": run.epoch})
    save(run)
    how = "" if c.margins or method.loss is not energy_loss else "; --margins auto may help"
    if c.init and (fell := run.rows[0]["probe_accuracy"] - row["probe_accuracy"]) > 0.1:
        remark(f"warning: accuracy on training images fell by {fell:.1%}{how}")
    if method.gradient and c.lambda_grad and max(row["share_in"], row["share_aux"]) < 0.02:
        s = f"{row['probe_s_in']:.1f} on ID, {row['probe_s_aux']:.1f} on auxiliary images"
        remark(f"warning: the gradient term is off; the mean energy score is {s}{how}")


def log(run: Run, row: dict[str, float]) -> dict[str, float]:
    """Add to `row`, for Figure 3 and warnings, measures of 256 images in eval mode; log it."""
    s, sets = {}, {"in": run.train_set} | ({"aux": run.aux_set} if run.aux_set else {})
    K = len(run.train_set.classes)  # without "absent"
    for kind, images in sets.items():
        images = images.some(256)
        x = to_input(run, images.pixels())
        logits, parts = embed(run.net, x)[1][:, :K], bar(x.split(chunk(x)), f"probe {kind}")
        norms, s[kind] = [input_gradients(run.net, v, K) for v in parts], energy_score(logits)
        row[f"probe_s_{kind}"] = s[kind].mean().item()
        row[f"probe_gradient_{kind}"] = torch.cat(norms).mean().item()
        if kind == "in":
            row["probe_accuracy"] = (logits.argmax(1).cpu() == images.y).float().mean().item()
    if run.aux_set:
        row["probe_energy"] = energy_loss(*s.values(), run.config.m_in, run.config.m_aux).item()
    if not all(map(math.isfinite, row.values())):  # `look` saw the loss before the last update
        raise FloatingPointError(f"{run.folder}: weights are NaN or too large (--lr), or margins")
    run.rows = [*(r for r in run.rows if r["epoch"] < row["epoch"]), row]
    write_atomically(run.folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in run.rows))
    return row


# ---- The same step, faster, and over several processes: none of it is in the paper.
class FastDoubleBackward(torch.overrides.TorchFunctionMode):
    """`with FastDoubleBackward(): loss = ...` is faster, equal up to rounding: PyTorch's own double
    backward makes many passes for batch norm, convolves with kernels as large as the image, and
    adds up zeros for ReLU and concatenation. Inside, create_graph=True gives gradients in images
    alone, none in weights; after it, create_graph=True is a RuntimeError."""

    over = False  # has the with block ended?

    def __exit__(self, *error):
        self.over = True
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):  # in place of each function
        table = {F.batch_norm: _batch_norm, F.conv2d: _conv2d, torch.cat: _cat, F.relu: _relu}
        rules = table[func](*args, **kwargs or {}) if func in table and args else None
        return _Fast.apply(self, *rules) if rules else func(*args, **kwargs or {})


class _Fast(torch.autograd.Function):
    """forward(*inputs) is y, *more, and backward(create_graph, g, *inputs[:kept], *more) the
    gradients in the inputs, g being that in y: toward ∇S if create_graph, else of the loss."""

    @staticmethod
    def forward(ctx, mode, kept, forward, backward, *inputs):
        y, *more = forward(*inputs)
        ctx.save_for_backward(*inputs[:kept], *more)
        ctx.mode, ctx.gradients, mode.over = mode, backward, False  # a mode may be entered again
        return y

    @staticmethod
    def backward(ctx, g):
        create_graph = torch.is_grad_enabled()
        if create_graph and ctx.mode.over:
            raise RuntimeError("FastDoubleBackward differentiates ∇S at images, once: leave it out")
        return None, None, None, None, *ctx.gradients(create_graph, g, *ctx.saved_tensors)


def _relu(x, inplace=False):
    grad_x = lambda _, g, y: [torch.ops.aten.threshold_backward(g, y.detach(), 0)]  # noqa: E731
    return None if inplace else (0, lambda x: [x.relu()] * 2, grad_x, x)  # y, and y to be saved


def _cat(tensors, dim=0, **other):
    fits = not other and len({(t.dtype, t.dim()) for t in tensors}) < 2
    sizes = fits and [t.shape[dim] for t in tensors]
    return fits and (0, lambda *x: [torch.cat(x, dim)], lambda _, g: g.split(sizes, dim), *tensors)


def _conv2d(x, weight, bias=None, *options, **other):
    # As nn.Conv2d calls it; weights made of images would need their gradient.
    by_layer = bias is None and not other and [*map(type, options)] == [tuple, tuple, tuple, int]
    by_layer = by_layer and x.dim() == 4 and not weight.grad_fn

    def backward(create_graph, g, x, weight):
        stride, padding, dilation, groups = options
        if not create_graph:  # else in x alone, by a convolution, whose own derivatives are cheap
            more = None, *options[:3], False, (0, 0), groups, (True, True, False)
            return torch.ops.aten.convolution_backward(g, x, weight, *more)[:2]
        sizes = zip(x.shape[2:], g.shape[2:], weight.shape[2:], *options[:3], strict=True)
        out_pad = [n + 2 * p - d * (k - 1) - 1 - s * (m - 1) for n, m, k, s, p, d in sizes]
        return F.conv_transpose2d(g, weight, None, stride, padding, out_pad, groups, dilation), None

    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x, weight = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, weight))
    return by_layer and (2, lambda x, w: [F.conv2d(x, w, None, *options)], backward, x, weight)


def _batch_norm(x, m, v, weight=None, bias=None, training=False, **more):  # momentum, eps
    fits = training and weight is not None and bias is not None and x.numel() > x.shape[1]
    if not fits or weight.grad_fn or bias.grad_fn or x.shape[1:-2] != weight.shape:  # [N,C,H,W]
        return None

    def backward(create_graph, *saved):
        if not create_graph:
            return _batch_norm_backward(*saved)
        rule = FastDoubleBackward, 5, _batch_norm_backward, _batch_norm_twice  # 5: saves all inputs
        return _Fast.apply(*rule, *saved), None, None  # in x alone

    return 2, lambda *t: torch.native_batch_norm(*t, m, v, True, **more), backward, x, weight, bias


def _batch_norm_backward(g, x, w, mean, r, in_all=True):
    """w r P(g), r = 1 / std, P(g) = g - mean(g) - x̂ mean(g x̂); the sums of g x̂ and of g."""
    options = None, None, mean, r, True, 0.0, (in_all, True, in_all)
    return torch.ops.aten.native_batch_norm_backward(g, x, w, *options)


@torch.autograd.function.once_differentiable
def _batch_norm_twice(create_graph, v, g, x, w, mean, r, sum_gx, sum_g):
    """The gradients of w r P(g), itself the gradient in x of y = w x̂ + bias, x̂ = (x - mean(x)) r.
    Let v be the one arriving at w r P(g), and a = mean g, b = mean g x̂, c = mean v x̂, d = mean v,
    q = mean v g - a d - b c over the m entries of a channel. P is symmetric, so that w r P(v)
    arrives at g, m r q at w, and -w r² (c (g - a) + b (v - d) + (q - 2 b c) x̂) at x."""
    grad_g, sum_vx, sum_v = _batch_norm_backward(v, x, w, mean, r)
    m, one, scale = x.numel() // len(w), torch.ones_like(r), -w * r * r
    sum_vg = _batch_norm_backward(v, g, w, 0 * one, one, False)[1]  # its x̂ is (g - 0) · 1
    a, b, c, d, vg = (total / m for total in (sum_g, sum_gx, sum_vx, sum_v, sum_vg))
    q = vg - a * d - b * c
    slope = (q - 2 * b * c) * r  # grad_x = scale (shift + c g + b v + slope x)
    shift = -(c * a + b * d + slope * mean)
    shift, c, b, slope = ((scale * t)[:, None, None] for t in (shift, c, b, slope))
    grad_x = torch.addcmul(shift, g, c).addcmul_(v, b).addcmul_(x, slope)
    return grad_g, grad_x.to(x.dtype), m * r * q, None, None


class Graphed:
    """f of tensors of fixed shapes, from the fourth call on replayed as a CUDA graph: thousands of
    launches become one, and f's Python runs no more. The next call writes over what it returned."""

    def __init__(self, f: Callable[..., Any]):
        self.f, self.calls = f, 0

    def __call__(self, *x: Tensor) -> Any:
        self.calls += 1
        if self.calls < 4:  # plain calls, in which libraries set themselves up
            return self.f(*x)
        if self.calls == 4:  # this runs nothing yet
            self.x, self.graph = [t.clone() for t in x], torch.cuda.CUDAGraph()
            with torch.cuda.device(x[0].device), torch.cuda.graph(self.graph):
                self.out = self.f(*self.x)
        for held, new in zip(self.x, x, strict=True):
            held.copy_(new)
        self.graph.replay()
        return self.out


def average(t: Tensor) -> Tensor:
    """The mean of t over all processes, with all its derivatives, which are such means too."""

    def mean(t):
        t = t / world()[1]
        torch.distributed.all_reduce(t)
        return [t]

    rule = FastDoubleBackward, 0, mean, lambda _, g: [average(g)]  # no mode: the class's `over`
    return _Fast.apply(*rule, t) if world()[1] > 1 else t


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, of equal size, twice differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        n, over = world()[1] * x.numel() / x.shape[1], {"dim": (0, 2, 3), "keepdim": True}
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # float32 under autocast too
        mean = average(wide.mean(**over))
        var = average((wide - mean).square().mean(**over))
        self.running_mean.lerp_(mean.detach().flatten(), self.momentum)
        self.running_var.lerp_(var.detach().flatten() * (n / (n - 1)), self.momentum)
        factor = self.weight[:, None, None] * (var + self.eps).rsqrt()
        return ((wide - mean) * factor + self.bias[:, None, None]).to(x.dtype)


# ==================================================================================================
# 9  Evaluation, tables, figures, command line (Section 6)


def score_images(net: Net, x: Tensor, K: int, fit: Fit, names: Sequence[str]) -> dict[str, Tensor]:
    """The predicted "class" and the named scores of normalised images [N,C,H,W], each [N]."""
    z, f = embed(net, x)
    f = f[:, :K]
    with eval_mode(net):  # for rows of SCORES that you add; ours set the mode themselves
        return {"class": f.argmax(1)} | {k: SCORES[k](net, x, f, z, fit).detach() for k in names}


def evaluate(
    net: Net, train_set: Images, test_set: Images, ood: dict, c: Config, names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Results (Section 6): ID accuracy; of each score γ, metrics on each OOD set and their mean; of
    each set the mean ‖∇S‖ of 1,000 images. And raw scores and classes, "score/set", "class/set"."""
    K, device, raw, norms = len(test_set.classes), net.fc.weight.device, {}, {}
    fit = Fit(post_hoc(c.id, c.arch, K), STATS[c.stats][1])

    def parts(images, what):
        for i in bar(torch.arange(len(images.x)).split(chunk(images.x, device=device)), what):
            yield normalise(images.pixels(i).to(device), *STATS[c.stats])

    if NEED_FIT & {*names}:
        z = torch.cat([embed(net, x)[0] for x in parts(train_set, "fit the scores")])
        fit = fit_scores(net, z, train_set.y.to(device), fit.p, fit.std, K)
    for key, images in {"id": test_set, **ood}.items():
        rows = [score_images(net, x, K, fit, names) for x in parts(images, f"score {key}")]
        raw |= {f"{k}/{key}": torch.cat([row[k] for row in rows]).cpu() for k in rows[0]}
        few = parts(images.some(1000), f"‖∇S‖ {key}")
        norms[key] = torch.cat([input_gradients(net, x, K) for x in few]).mean().item()
    accuracy = (raw["class/id"] == test_set.y.cpu()).double().mean().item()
    if accuracy <= 1 / K + len(test_set.x) ** -0.5:  # > 2 σ, as σ <= 1 / (2 √N)
        remark(f"warning: ID accuracy {accuracy:.1%} is chance: other --stats, or other labels?")
    metrics = {n: {k: ood_metrics(raw[f"{n}/id"], raw[f"{n}/{k}"]) for k in ood} for n in names}
    keys = "fpr95", "auroc", "aupr_in", "aupr_out", "fpr95_ood_positive"
    for sets in metrics.values():
        sets["mean"] = {k: statistics.fmean(m[k] for m in sets.values()) for k in keys}
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    results = {"config": asdict(c), "score": METHODS[c.method].score, "accuracy": accuracy}
    results |= {"gamma": {n: threshold(raw[f"{n}/id"]) for n in names}, "metrics": metrics}
    results |= {"gradient_norm": norms, "device": card, "processes": world()[1], "argv": sys.argv}
    results |= {"torch": torch.__version__, "python": platform.python_version(), "greg": CODE}
    return results, raw


def load_sets(c: Config) -> tuple[Images, Images, dict[str, Images]]:
    """A run's ID training and test images, OOD sets (or the usual); ValueError: in --aux's path."""
    imagenet = "imagenet" in (v.partition(":")[0] for v in (c.id, c.aux))
    used = one_spelling(Path(c.root, "imagenet/train") if imagenet else c.aux)
    for path in (Path(one_spelling(v.partition("=")[2])) for v in c.ood if used and "=" in v):
        if path.is_relative_to(used) or (Path(used).is_dir() and Path(used).is_relative_to(path)):
            raise ValueError(f"--ood {path}: shares a path with {used}, trained on: use another")
    own = {"synthetic": ["synthetic"], "imagenet": IMAGENET_OOD}.get(c.id.split(":")[0], PAPER_OOD)
    with bar(None, "read the data", total=1):
        train_set, test_set = load_id(c.id, c.root, c.download, c.size)
        ood = load_ood(c.ood or own, c.root, c.download, train_set.x.shape[1])
        keep_apart("ID", (train_set, test_set), ood, 1.0)  # 1: a remark, never an error
        keep_apart("training", (train_set,), {"the ID test set": test_set}, 1.0)
    return train_set.some(c.n_train) if c.n_train else train_set, test_set, ood


def train(config: Config, folder: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Train `config` in `folder`, or go on there; evaluate, save. A finished run is only read."""
    folder, device = Path(folder).expanduser(), torch.device(device)
    done, file = read_results(folder), folder / "checkpoint.pt"
    had = (done or (stored(file) if file.exists() else {})).get("config", {})  # of a run begun here
    c = resolve(replace(config, ood=config.ood or had.get("ood", ())), had.get("stats"))
    m = METHODS[c.method]  # below: options, by name -> does this method use them?
    on = {"lambda_grad reduction grad_every": m.gradient, "candidates aux_epoch": m.sampler.pick}
    margins = not m.margins and (m.loss is energy_loss or m.gradient or m.prepare)
    on |= {"aux lambda_s": c.aux, "m_in m_aux margins": margins, "cuda_graph": not m.prepare}
    unused = " ".join(names for names, used in on.items() if not used).split()  # options
    if idle := [k for k in unused if getattr(config, k) != getattr(Config, k)]:  # yet given
        remark(f"of no effect, as {c.method} takes none: {' '.join(idle)}")
        c = replace(c, **{k: m.lambda_s if k == "lambda_s" else getattr(Config, k) for k in idle})
    if done:
        check_same(c, done["config"], folder)
        own = with_whole_paths(saved_config(done["config"])).ood or [*done["gradient_norm"]][1:]
        if c.ood and {*c.ood} != {*own}:
            raise ValueError(f"{folder} is finished on other OOD sets: greg.py eval {folder} --ood")
        remark(f"{folder} is finished: its results are read")
        return done | {"config": done["config"] | {"id": c.id}}  # as it is spelled now
    if c.cuda_graph and (device.type != "cuda" or world()[1] > 1 or c.grad_every > 1):
        raise ValueError("--cuda-graph needs one GPU, one process, and --grad-every 1")
    with alone(folder):
        train_set, test_set, ood = load_sets(replace(c, n_train=0))  # to be compared whole
        aux = load_aux(c.aux, c.root, c.download, train_set.x.shape[1]) if c.aux else None
        with bar(None, "compare the sets", total=1):
            keep_apart("ID", (train_set, test_set), {"--aux": aux} if aux else {})
            keep_apart("auxiliary", (aux,) if aux else (), ood)
        train_set = train_set.some(c.n_train) if c.n_train else train_set
        run = start(c, folder, device, train_set, aux)
        write_atomically(folder / "config.json", json.dumps(asdict(run.config), indent=1))
        with interrupts(run):
            while run.epoch < c.epochs:
                train_epoch(run)
        names = [*dict.fromkeys([METHODS[c.method].score, *(() if c.aux else POST_HOC_ROWS)])]
        results, raw = evaluate(run.net, train_set, test_set, ood, run.config, names)
        save(run, gamma=results["gamma"][results["score"]], score=results["score"])
        save_results(folder, results, raw)
    return results


def save_results(folder: Path, results: dict[str, Any], raw: dict[str, Tensor]) -> None:
    """scores.npz, results.md, and last results.json, which marks a run as finished."""
    import numpy as np

    arrays, text = io.BytesIO(), json.dumps(results, indent=1, allow_nan=False)  # or raises
    np.savez_compressed(arrays, **{key: s.numpy() for key, s in raw.items()})
    try:
        write_atomically(folder / "scores.npz", arrays.getbuffer())
        write_atomically(folder / "results.md", results_table([results], file=True))
        write_atomically(folder / "results.json", text)
    except OSError:
        say(results_table([results]))  # so that they are not lost
        raise
    if world()[1] > 1:  # another run may start from these files
        torch.distributed.barrier()


def read_results(folder: Path) -> dict[str, Any] | None:
    """The results of a finished run, None of an unfinished one; ValueError for another's file."""
    path, keys = folder / "results.json", "config accuracy gamma gradient_norm metrics score"
    try:
        if not path.exists():
            return None
        results = json.loads(path.read_text(encoding="utf-8"))
        results_table([results])  # only to raise
        return {k: results[k] for k in keys.split()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged or not greg's ({e}): move it away") from None


@torch.random.fork_rng(devices=[])  # the caller's generator stays as it is
def load_run(folder: Any, device: Any) -> tuple[Net, Config, dict[str, Any]]:
    """A finished run's network in eval mode, configuration, checkpoint; ValueError for others."""
    if (state := stored(folder)).get("score") not in SCORES:  # saved with the threshold
        raise ValueError(f"{folder} is no finished run of greg.py train, or SCORES lacks its score")
    config = saved_config(state["config"])
    net = load_weights(ARCHS[config.arch](len(state["net"]["fc.bias"])), folder, state)
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    return net.to(device, memory_format=layout).eval(), config, state


# ---- Certificates of a run.
def certify_report(
    net: nn.Module, x_in: Tensor, x_out: dict[str, Tensor], epsilons=(0.05, 0.1, 0.25, 0.5),
    sigma=0.1, n=500, alpha=0.001, local=True, gamma: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """["sets"][name][ε][kind]: FPR95 and AUROC under ℓ2 perturbations of OOD inputs up to ε.
    net: on [0,1] pixels, eval mode; x_in [N,...]; x_out, name -> [M,...]. Kinds: "attacked": PGD;
    "certified": bounds, global and, if `local`, local; without a global rule of a layer left out,
    without a local one an error; "smoothed" (n > 0): another detector, S its median under noise,
    AUROC at ε = 0 alone, a radius, "reach" at most, true with probability 1-alpha. FPR95: at each
    detector's threshold on x_in. "id_rejected": of x_in under attack, those over gamma (or S's)."""
    bad = n < 0 or not all(0 < v < math.inf for v in (sigma, *epsilons))
    if bad or not all(map(len, (x_in, *x_out.values()))):
        raise ValueError("certificates need images of each set, 0 < eps < inf, sigma > 0, n >= 0")
    reach = -smoothed_radius(torch.zeros(1, n), 0.0, sigma, alpha).item() if n else 0.0  # all agree
    g, lipschitz, exact = rng(x_in.device, "certificates"), None, None

    def score(x, net=net):  # in parts: the noise makes many images of one
        return torch.cat([energy_score(net(part)).detach() for part in x.split(chunk(x, 1024))])

    def over(f, x, *args):
        return torch.cat([f(part, *args) for part in bar(x.split(chunk(x)), f.__name__)])

    def attacked(x, eps, side=-math.inf):  # γ = -inf lowers S, as OOD images need; +inf raises it
        return attack(net, x, side, eps, clamp=(0.0, 1.0), generator=g).s

    def certified(x, eps):
        slope = lipschitz_local(net, x, eps).clamp(max=lipschitz) if local else lipschitz
        return score(x.double(), exact) - eps * slope * _UP

    def smoothed(x):
        return noisy_scores(score, x, sigma, n, g)

    def metrics(s_in, s):
        return {"fpr95": fpr_at_tpr(s_in, s), "auroc": auroc(s_in, s)}

    kinds = {"attacked": attacked}
    with contextlib.suppress(NotImplementedError), bar(None, "global bound", total=1):
        lipschitz = lipschitz_global(net, x_in.shape[1:])
        kinds["certified"], exact = certified, copy.deepcopy(net).double()
    if local and lipschitz is not None:
        over(certified, x_in[:1], 0.0)  # raises for layers that only the global bound knows
    s_in, smooth_in = over(score, x_in), (over(smoothed, x_in).median(1).values if n else None)
    gamma = threshold(s_in) if gamma is None else gamma
    raised = {e: over(attacked, x_in, e, math.inf) > gamma for e in epsilons}
    report = {"gamma": gamma, "lipschitz_global": lipschitz, "sigma": sigma, "n": n, "reach": reach}
    report |= {"id_rejected": {e: v.double().mean().item() for e, v in raised.items()}, "sets": {}}
    for name, x in x_out.items():
        rows = report["sets"][name] = {0.0: dict.fromkeys(kinds, metrics(s_in, over(score, x)))}
        rows |= {e: {k: metrics(s_in, over(f, x, e)) for k, f in kinds.items()} for e in epsilons}
        if n:
            draws = over(smoothed, x)
            rows[0.0]["smoothed"] = metrics(smooth_in, draws.median(1).values)
            radius = smoothed_radius(draws, threshold(smooth_in), sigma, alpha)
            for eps in epsilons:
                rows[eps]["smoothed"] = {"fpr95": (radius <= eps).double().mean().item()}
    return report


def certify_run(folder: Any, device: Any, n_images: int, given: dict, **options: Any) -> dict:
    """`certify_report` of a run on `n_images` of each set; `given`: other data options."""
    net, c, state = load_run(folder, device)
    if state["score"] != "energy" or METHODS[c.method].extra_class:
        raise ValueError(f"{folder}: its score is not the energy of its classes, the one certified")
    _, test_set, ood = load_sets(replace(c, **given))
    check_classes(state, test_set.classes, test_set.x.shape[1], folder)
    model = nn.Sequential(Normalize(*STATS[c.stats]), net).to(device).eval()
    few = {name: v.some(n_images).pixels() for name, v in {"id": test_set, **ood}.items()}
    x = {name: normalise(v.to(device), (0,), (1,)) for name, v in few.items()}  # x / 255
    return certify_report(model, x.pop("id"), x, gamma=state["gamma"], **options)


# ---- Tables.
def shown(header: Sequence[str], rows: Sequence[Sequence[Any]], file: bool = False) -> str:
    """A table in Markdown; for a terminal (no `file`) padded, wrapped, constant columns on top."""
    if file or not getattr(sys.stdout, "isatty", bool)():  # a logger may lack isatty
        rows = header, ["---"] * len(header), *rows
        cells = ([str(v).replace("|", "\\|").replace("\n", " ") for v in row] for row in rows)
        return "".join(f"| {' | '.join(row)} |\n" for row in cells)
    columns = [[str(v) for v in column] for column in zip(header, *rows, strict=True)]
    same = [c for c in columns[1:] if len(rows) > 1 and len({*c[1:]}) == 1]
    first, *others = ([v.ljust(max(map(len, c)) + 2) for v in c] for c in columns if c not in same)
    blocks = [[f"{c[0]}: {c[1]}" for c in same], first]  # constants; then parts of the width
    for column in others:
        if len(blocks[-1][0] + column[0]) > shutil.get_terminal_size().columns:
            blocks.append(first)
        blocks[-1] = [a + b for a, b in zip(blocks[-1], column, strict=True)]
    return "".join(line.rstrip() + "\n" for line in itertools.chain(*blocks))


def mean_std(values: Sequence[float]) -> str:
    """ "mean ± sample standard deviation", in percent; of a single seed just its value."""
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.2f}{deviation}"


def results_table(results: Sequence[dict[str, Any]], file: bool = False) -> str:
    """A table for each ID data and choice of OOD sets, a row a method with its options. Runs that
    differ by seed alone (so in start and auto margins) share a row; of one seed the last counts."""
    text, tables = "", {}  # tables[ID data, paths, *sets][method, options][seed]: a row's cells
    for r in results:
        c = saved_config(r["config"], to_run=False)
        free = ("seed", *FREE, *(("m_in", "m_aux") if c.margins else ()))
        init = re.sub(r"seed\d+", "seed", c.init)  # each seed's own pre-training
        alike = replace(c, init=init, **{k: getattr(Config, k) for k in free})
        paths = tuple(sorted(v for v in c.ood if "=" in v))
        g_in, *g_out = (v / 100 for v in r["gradient_norm"].values())  # mean_std gives %
        for score, sets in r["metrics"].items():
            name = c.method + ("" if score == r["score"] else f": {score}")
            pairs = ([m["fpr95"], m["auroc"]] for m in sets.values())
            seeds = tables.setdefault((c.id, paths, *sets), {}).setdefault((name, alike), {})
            if c.seed in seeds:
                remark(f"warning: {name}, seed {c.seed}, is there twice, with the same options")
            seeds[c.seed] = [[r["accuracy"]], *pairs, [g_in], [statistics.fmean(g_out)]]
    for (data, paths, *sets), rows in tables.items():
        lines = []
        for (name, c), seeds in rows.items():
            others = [vars(o) for n, o in rows if n == name]
            own = {k: v for k, v in vars(c).items() if any(o[k] != v for o in others)}
            label = [name, *(f"{k} {'none' if v == '' else v}" for k, v in own.items())]
            by_cell = zip(*seeds.values(), strict=True)  # seed, cell, figure -> cell, seed, figure
            cells = (" / ".join(map(mean_std, zip(*cell, strict=True))) for cell in by_cell)
            lines.append([", ".join(label), c.arch, path_stem(c.aux or "none"), len(seeds), *cells])
        header = ["method", "network", "auxiliary", "seeds", "ID accuracy", *sets]
        text += shown([*header, "‖∇S‖ ID", "‖∇S‖ OOD"], lines, file)
        text += f"\nFPR95 / AUROC in %; ID data {', '.join((data, *paths))}.\n"
    return text


# Tables: a head "number data networks sets metrics", whose product is COLUMNS, and rows "label name
# figures", one a line or after a |; name: a method, or a score of the runs of ce.
_PAPER = """\
1 cifar10 resnet18,wrn40_2,densenet100 mean fpr95,auroc | MSP msp 58.04 90.49 51.52 90.8 52.56 91.7
ODIN odin 34.46 91.59 35.23 89.82 24.88 94.42 | Energy_score ce 39.32 92.24 33.4 91.76 28.99 94.09
ReAct react 39.44 92.30 37.54 91.49 25.83 95.27 | DICE dice 42.40 91.25 34.12 91.74 26.37 94.61
LINe line 45.25 90.59 36.27 90.2 14.84 96.95 | OE oe 19.92 95.71 21.12 95.55 21.76 95.8
Energy_loss energy 11.14 97.53 13.11 97.14 11.26 97.43
OpenMix openmix 22.24 96.26 21.92 96 22.86 95.65 | GReg greg 7.9 97.95 7.95 98.1 7.93 98.12
2 cifar100 resnet18,wrn40_2,densenet100 mean fpr95,auroc
MSP msp 74.66 80.10 80.39 75.37 85.87 68.78 | ODIN odin 64.00 84.33 67.95 79.86 69.97 81.55
Energy_score ce 68.46 84.15 74.15 79.26 78.91 76.12 | ReAct react 59.38 87.59 70.65 80.2 76.27 80.1
DICE dice 77.29 80.35 72.32 79.62 69.80 80.50 | LINe line 72.09 82.93 67.5 80.9 35.16 88.72
OE oe 77.32 63.89 74.22 65.70 60.52 84.21 | Energy_loss energy 62.77 84.05 65.62 80.18 64.37 83.86
POEM poem 61.11 82.43 62.58 79.74 59.33 79.81 | OpenMix openmix 59.64 88.09 73.12 79.23 67.29 84.47
DOS dos 54.62 88.30 45.26 90.76 34.92 93.22 | GReg greg 59.6 82.92 58.26 86.56 56.29 87.35
GReg+ greg+ 50.78 88.75 48.12 91.02 30.55 93.38
3 imagenet densenet121 inaturalist,sun,places,textures,mean fpr95,auroc
MSP msp 62.6 87.09 64.3 86.64 62.3 86.72 78.3 75.03 66.87 83.87
ODIN odin 48.5 92.07 53.9 90.77 49.3 91.06 69.6 80.77 55.32 88.66
Energy_score ce 54 90.77 52.5 90.7 46.6 91.37 73.1 77.54 56.55 87.59
ReAct react 51.88 91.52 52.48 90.81 49.56 90.92 64.61 83.77 54.63 89.25
DICE dice 32.86 93.6 41.35 92.9 45.82 91.58 65.2 78.61 46.3 89.17
LINe line 29.47 93.77 37.29 92.85 38.85 92.16 52.32 86.38 39.48 91.29
OE oe 34.56 92.75 54.63 89.75 54.86 89.05 76.2 75.55 55.06 86.78
Energy_loss energy 18.44 95.91 50.19 90.37 49.32 90.47 62.96 77.78 45.23 88.63
DOS dos 61.63 88.68 42.69 93.23 45.49 93.37 47.45 92.63 49.31 91.97
GReg greg 29.54 94.94 45.86 92.53 45.35 92.06 68.29 80.98 47.26 90.13
GReg+ greg+ 24.11 95 33.98 92.31 32.89 92.7 49.32 88.22 35.08 92.06
4 cifar10,cifar100 densenet100 mean fpr95,auroc | OE oe 21.76 95.8 60.52 84.21
OE_+_Grad oe+grad 18.79 96.32 62.54 84.71 | Energy energy 11.26 97.43 64.37 83.86
Energy_+_Grad greg 7.93 98.12 56.29 87.35 | POEM poem 29.15 94.18 59.33 79.81
POEM_+_Grad poem+grad 23.87 95.41 47.94 86.63
5 cifar100 densenet100 mean fpr95,auroc | POEM poem 59.33 79.81 | DOS dos 34.92 93.22
Energy_only_clustering energy+sampling 31.77 93.20 | GReg+ greg+ 30.55 93.38
6 cifar10 wrn40_2,densenet100 ID accuracy | Clean ce 94.84 94.03 | Energy_loss energy 88.15 91.82
GReg greg 89.55 92.14 | DOS dos 78.90 87.06 | GReg+ greg+ 83.06 89.89"""
_TABLES = [[row.split() for row in re.split(r"[|\n]", t)] for t in re.split(r"\n(?=\d)", _PAPER)]
PAPER = {int(head[0]): rows for head, *rows in _TABLES}
COLUMNS = {int(n): [*itertools.product(*(v.split(",") for v in row))] for (n, *row), *_ in _TABLES}
SEEDS = [0, 1, 2]  # where --seeds names none


def paper_table(number: int, results: Sequence[dict], id_data="", archs=(), file=True) -> str:
    """Table `number`: ours, mean ± std over seeds (the paper's); below, what ours was made on."""
    given = one_spelling(id_data)  # by which runs are found
    columns = ((given or c[0], a or c[1], *c[2:]) for a in archs or [""] for c in COLUMNS[number])
    columns = [*dict.fromkeys(columns)]  # without repeats
    rows, notes, sets, found = [], set(), set(), {}
    for r in results:
        c, own = r["config"], {v.partition("=")[0]: v for v in r["config"]["ood"]}  # NAME=PATH
        sets.add(", ".join(sorted(own.get(k, k) for k in r["gradient_norm"] if k != "id")))
        found.setdefault((one_spelling(c["id"]), c["arch"], c["method"]), []).append(r)
        note = f"- {c['method']}: {path_stem(c['id'])}, auxiliary {path_stem(c['aux'] or 'none')}, "
        note += "fine-tuned" if c["init"] else "from scratch"
        said = {*"method id aux arch seed init size".split(), *FREE}
        said |= {"m_in", "m_aux"} if c.get("margins") else set()  # of each seed its own
        more = [f", {k} {v}" for k, v in c.items() if k not in said and v != getattr(Config, k, 0)]
        notes.add(note + "".join(more) + "\n")
    if len(sets) > 1:
        raise ValueError(f"runs have different OOD sets, {' and '.join(sorted(sets))}: move some")
    most = max(map(len, found.values()), default=0)
    for label, name, *figures in PAPER[number]:
        method, score = (name, METHODS[name].score) if name in METHODS else ("ce", name)
        paper, row = dict(zip(COLUMNS[number], figures, strict=True)), [label.replace("_", " ")]
        for data, arch, key, metric in columns:
            runs, theirs = found.get((data, arch, method), ()), paper.get((data, arch, key, metric))
            cells = (r["metrics"].get(score, {}) | {"ID": r} for r in runs)  # for Table 6
            values = [v[key][metric] for v in cells if key in v]
            few = f" ({len(values)} of {most} seeds)" if len(values) < most else ""
            ours = mean_std(values) + few if values else "not run"
            row.append(f"{ours} ({theirs})" if theirs else ours)
        rows.append(row)
    header = ["method", *(" ".join((path_stem(c[0]).partition(":")[0], *c[1:])) for c in columns)]
    text = f"In %, mean ± std, {most} seeds (the paper's Table {number}); OOD: {''.join(sets)}\n"
    return f"{shown(header, rows, file)}\n{text}{''.join(sorted(notes))}"


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of Config among the arguments that were given."""
    return {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}


def path_stem(name: str) -> str:
    """The last part of a path, less a final .npy or .npz; if long, its beginning and a hash."""
    stem = re.sub(r"\.np[yz]$", "", Path(name).resolve().name)
    return stem if len(stem) < 200 else f"{stem[:99]}-{hashed(stem):x}"  # imagenet:A,B,C,...


def run_folder(runs: Path, c: Config) -> Path:
    """runs/ID/network/method/seedN, -released after a method with Eq. (3) at that scale."""
    released = "-released" if c.reduction == "released" and METHODS[c.method].gradient else ""
    return runs / path_stem(c.id) / c.arch / f"{c.method}{released}" / f"seed{c.seed}"


def table_runs(args: argparse.Namespace) -> dict[Path, Config]:
    """The runs that a table needs, by their folders, pre-training before what starts from it."""
    given, known = chosen(args), [m if m in METHODS else "ce" for _, m, *_ in PAPER[args.number]]
    methods = args.methods or known
    if odd := sorted({*methods} - {*known}):
        raise ValueError(f"table {args.number} has no row of {odd}, but of {sorted({*known})}")
    columns = itertools.product(args.archs or [""], COLUMNS[args.number])
    pairs = dict.fromkeys((given.get("id") or c[0], arch or c[1]) for arch, c in columns)
    runs, starts = {}, ["ce"] if any(fine_tunes(m, d) for m in methods for d, _ in pairs) else []
    for (data, arch), seed, m in itertools.product(pairs, args.seeds or SEEDS, starts + methods):
        c = Config(**given | {"id": data, "arch": arch, "seed": seed, "method": m})
        if fine_tunes(m, data):
            c = replace(c, init=str(run_folder(args.runs, replace(c, method="ce"))))
        if not METHODS[m].gradient:  # these mean nothing to it
            c = replace(c, lambda_grad=1.0, reduction="paper", grad_every=1)
        runs[run_folder(args.runs, c)] = c
    return runs


# ---- Figures.
def grid(count: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure, and its panels, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def curves(panels: dict[str, dict[str, list[tuple]]], path: Path, x: str, y: str = "") -> None:
    """Draw a panel for each title, in it a line (x, y), ... for each label."""
    figure, axes = grid(len(panels), 4.5, 3.2)
    for panel, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, points in lines.items():
            panel.plot(*zip(*points, strict=True), label=label.replace("$", r"\$"))
        panel.set(title=title, xlabel=x, ylabel=y)
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def figure_3(folders: Sequence[Path], path: Path) -> None:
    """Figure 3: energy loss, and ‖∇S‖ of ID images, of `log`, by epoch; a line for each run."""
    energy, slope = {}, {}
    for folder in folders:
        if not (rows := [row for row in stored(folder).get("rows", ()) if "probe_energy" in row]):
            raise ValueError(f"{folder} has no log of a run with auxiliary data")
        energy[str(folder)] = [(row["epoch"], row["probe_energy"]) for row in rows]
        slope[str(folder)] = [(row["epoch"], row["probe_gradient_in"]) for row in rows]
    curves({"energy loss, Eq. (1)": energy, "mean ‖∇S‖ on ID images": slope}, path, "epoch")


def figure_scores(folders: Sequence[Path], path: Path) -> None:
    """Histograms of the score on ID and on each OOD set, with the threshold γ, a panel a run."""
    figure, axes = grid(len(folders), 6, 3.5)
    for panel, folder in zip(axes, folders, strict=True):
        if not (results := read_results(folder)):
            raise FileNotFoundError(f"{folder} holds no finished run: no results.json")
        arrays = read_arrays(folder / "scores.npz")
        score = next(k for k in (results["score"], *results["metrics"]) if k in results["metrics"])
        sets = {k: arrays[f"{score}/{k}"] for k in results["gradient_norm"]}
        panel.hist([*sets.values()], 80, density=True, label=[*sets], histtype="step")
        panel.axvline(results["gamma"][score], color="black", linestyle="--", label="γ")
        panel.set(title=str(folder).replace("$", r"\$"), xlabel="S (low: ID)", ylabel="density")
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def figure_images(path: Path) -> None:
    """The built-in benchmark, a row a split: ID classes, auxiliary images, OOD families."""
    names, (figure, (panel,)) = [k for k in SYNTHETIC if k != "train"], grid(1, 8, 3.4)
    rows = torch.stack([synthetic(name, 20).x for name in names])
    panel.imshow(rows.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1).numpy())
    panel.set(xticks=[], yticks=range(16, 32 * len(rows), 32), yticklabels=names)
    figure.savefig(path, dpi=150)


def toy(n: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The plane: n points of three ID clusters, their labels, and n auxiliary points around."""
    y, angle = torch.randint(3, (n,), generator=g), torch.arange(3) * 2 * math.pi / 3 + math.pi / 2
    centres = torch.stack([angle.cos(), angle.sin()], 1)
    x_aux = 6 * torch.rand(8 * n, 2, generator=g) - 3
    x_in = centres[y] + 0.13 * torch.randn(n, 2, generator=g)
    return x_in, y, x_aux[torch.cdist(x_aux, centres).amin(1) > 0.65][:n]


def train_toy(lambda_grad: float, seed: int = 0, steps: int = 1500) -> nn.Module:
    """A 2-32-32-3 network on the toy by GReg; margins -6, -2 and a λ_∇S of 0.1 suit its logits."""
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    for p in net.parameters():
        p.data = (torch.rand(p.shape, generator=g) * 2 - 1) / p.shape[-1] ** 0.5
    progress = bar(range(steps), f"train with λ_∇S = {lambda_grad:g}")  # before a slow import
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0, steps)
    for _ in progress:
        optimiser.zero_grad()
        greg_loss(net, *toy(128, g), -6.0, -2.0, 0.1, lambda_grad).loss.backward()
        optimiser.step()
        decay.step()
    return net.double().eval()


def figure_1(path: Path, seed: int = 0, steps: int = 1500, points: int = 40) -> dict[float, dict]:
    """Figure 1, left: S on a plane, γ, certified balls, attacks (dotted), drawn to `path`. By λ_∇S:
    FPR95, γ and, of ID and OOD, mean ‖∇S‖, median certified radius, attack distance and ratios."""
    from matplotlib.patches import Circle

    (figure, axes), results = grid(2, 4.75, 4.4), {}
    axis = torch.linspace(-2.2, 2.2, 200, dtype=torch.float64)
    for panel, lambda_grad in zip(axes, (0.0, 0.1), strict=True):
        net, g = train_toy(lambda_grad, seed, steps), torch.Generator().manual_seed(seed + 1)
        x_in, _, x_out = (v.double() for v in toy(500, g))
        at = x_in, x_out, torch.cartesian_prod(axis, axis)
        s_in, s_out, surface = (energy_score(net(x)).detach() for x in at)
        gamma, surface = threshold(s_in), surface.view(200, 200).T
        result = results[lambda_grad] = {"FPR95": fpr_at_tpr(s_in, s_out), "γ": gamma}
        image = panel.contourf(axis, axis, surface, torch.linspace(-9, 0, 28), extend="both")
        figure.colorbar(image, ax=panel, label="S")
        panel.contour(axis, axis, surface, [gamma], colors="red")
        sides = {"ID": (x_in[s_in <= gamma], "white"), "OOD": (x_out[s_out > gamma], "black")}
        for side, (x, colour) in sides.items():
            result[f"‖∇S‖ {side}"] = input_gradients(net, x).mean().item()
            x = x[(x.abs() < 2).all(1)][:points]
            radii = certify(net, x, gamma, True)
            sizes = torch.logspace(-2, 0.55, 120).repeat_interleave(len(x))  # size j: all x, once
            found = attack(net, x.repeat(120, 1), gamma, sizes, generator=g)
            distance = found.distance.view(120, -1).amin(0)
            best = radii["best"] = torch.stack([*radii.values()]).amax(0)
            ratios = {f"attack / radius, {k}": distance / r for k, r in radii.items()}
            for k, v in {"radius": best, "attack": distance, **ratios}.items():
                result[f"{side} {k}"] = v.median().item()
            panel.plot(*x[:8].T, ".", color=colour, markersize=3)
            for circles, style in (best, "-"), (distance.nan_to_num(posinf=0.0), ":"):
                for centre, r in zip(x[:8].tolist(), circles[:8].tolist(), strict=True):
                    panel.add_patch(Circle(centre, r, fill=False, ls=style, ec=colour, lw=0.8))
        title = f"$\\lambda_{{\\nabla S}}$ = {lambda_grad:g}: ID white, OOD black, γ red; "
        panel.set_title(title + "certified solid, attacked dotted", fontsize=7)
        panel.set(aspect="equal", xlim=(-2.2, 2.2), ylim=(-2.2, 2.2))
    figure.savefig(path, dpi=150)
    return results


# ---- The command line; the docstring of a command is its help.
def command_demo(args: argparse.Namespace) -> None:
    """pre-train, fine-tune and attack on built-in images, in some minutes a seed"""
    runs, cells, seeds = args.runs / "demo", {}, args.seeds or SEEDS
    short = {"epochs": 2, "n_train": 156 * 32, "lr": 0.01, "schedule": "cosine", "margins": "auto"}
    for seed, method in itertools.product({*seeds}, ("ce", "energy", "greg", "greg+")):
        folder, first = (runs / m / f"seed{seed}" for m in (method, "ce"))
        more = {"epochs": 8} if method == "ce" else short | {"init": str(first)}
        more |= {"arch": "wrn10_1", "batch": 32, "channels_last": True}
        r = train(Config(method, id="synthetic", seed=seed, **more), folder, args.device)
        report = certify_run(folder, args.device, 48, {}, epsilons=[0.25], n=0, local=False)
        hit = statistics.fmean(v[0.25]["attacked"]["fpr95"] for v in report["sets"].values())
        mean, norm = r["metrics"]["energy"]["mean"], r["gradient_norm"]["id"] / 100
        row = r["accuracy"], mean["fpr95"], mean["auroc"], norm, hit, report["id_rejected"][0.25]
        cells.setdefault(method, []).append(row)
    header = "method", "ID accuracy", "FPR95", "AUROC", "‖∇S‖ ID", "attacked: FPR95", "ID rejected"
    say(shown(header, [[m, *map(mean_std, zip(*v, strict=True))] for m, v in cells.items()]))
    say(f"""In %, but for ‖∇S‖; six OOD families; seeds {seeds}; 48 a set attacked, ℓ2 0.25. See:
the energy loss should lower FPR95; the gradient term (greg) ‖∇S‖, and so what attacks achieve.""")
    figure_scores([runs / m / f"seed{seeds[0]}" for m in ("energy", "greg")], runs / "scores.png")
    say(f"{runs}: the runs, and scores.png, the scores of energy and greg with γ")


def command_train(args: argparse.Namespace) -> None:
    """train a method, or go on with it, and evaluate it"""
    config = Config(**chosen(args))
    folder = args.out or run_folder(args.runs, config)
    say(results_table([train(config, folder, args.device)]))
    say(f"{folder}: results.json, results.md, scores.npz, log.jsonl, checkpoint.pt")


def command_eval(args: argparse.Namespace) -> None:
    """evaluate a run, or a weights file, on OOD sets by any scores"""
    source, given = args.run or args.weights, chosen(args)
    state = stored(source) if source else {}
    if (args.run and args.weights) or not (state or args.weights and {"arch", "id"} <= {*given}):
        raise ValueError("need either a run, before the options, or --weights, --arch and --id")
    if args.out and (args.out / "checkpoint.pt").exists():
        raise ValueError("--out is a run's own folder: its results are those of its training")
    c = saved_config(state["config"]) if state else resolve(Config("ce", init=str(source), **given))
    if odd := [k for k in ("arch", "stats") if given.get(k, getattr(c, k)) != getattr(c, k)]:
        raise ValueError(f"--{odd[0]} {given[odd[0]]}: {source} has {getattr(c, odd[0])}")
    c = with_whole_paths(replace(c, **given, init=str(source)))
    scores = ",".join(args.scores or [state.get("score", METHODS[c.method].score)])
    names = [*dict.fromkeys(name.strip() for name in scores.split(","))]
    known = [name for name in SCORES if name != "absent" or METHODS[c.method].extra_class]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no score {unknown[0]!r} of this network; one of {', '.join(known)}")
    with alone(args.out) if args.out else contextlib.nullcontext():
        train_set, test_set, ood = load_sets(c)
        check_classes(state, test_set.classes, test_set.x.shape[1], source)
        net = ARCHS[c.arch](len(test_set.classes) + METHODS[c.method].extra_class)
        net = load_weights(net, source, state).to(args.device)
        results, raw = evaluate(net, train_set, test_set, ood, c, names)
        if args.out:
            save_results(args.out, results, raw)
        say(results_table([results]))


def command_predict(args: argparse.Namespace) -> int:
    """class, score and ID/OOD decision of images; exit code 2 if one could not be read"""
    net, c, state = load_run(args.run, args.device)
    gamma, name, classes = state["gamma"], state["score"], state["classes"]
    fit, lines, code = Fit(post_hoc(c.id, c.arch, len(classes)), STATS[c.stats][1]), [], 0
    paths = [f for p in args.images for f in (image_files(p) if p.is_dir() else [str(p)])]
    try:
        for path in bar(paths, "predict"):
            try:
                x = normalise(load_image(path, state["size"]).to(args.device), *STATS[c.stats])
                k, s = (v.item() for v in score_images(net, x, len(classes), fit, [name]).values())
                same = math.isclose(s, gamma, rel_tol=1e-6)  # γ's own image, rounded otherwise
                row = classes[k], f"{s:.3f}", f"{gamma:.3f}", "ID" if s <= gamma or same else "OOD"
            except (OSError, ValueError) as e:
                row, code = ("", "", f"{gamma:.3f}", f"error: {e}"), 2
            lines.append([path, *row])
    finally:  # after Ctrl-C too
        say(shown(["image", "class", "score", "gamma", "decision"], lines))
    return code


def command_table(args: argparse.Namespace) -> None:
    """run what a table of the paper needs, and print it; or print all finished runs"""
    if args.number is None:
        if chosen(args) or args.methods or args.archs or args.dry_run or args.seeds:
            raise ValueError("options choose among the runs of a table: name its number, 1 to 6")
        at = sorted(glob.iglob("**/results.json", root_dir=args.runs, recursive=True))  # links too
        if not (results := [read_results((args.runs / p).parent) for p in at]):
            raise FileNotFoundError(f"no finished run below {args.runs}; greg.py train makes one")
        return say(results_table(results))
    runs, results = table_runs(args), []
    done = {folder: r for folder in runs if (r := read_results(folder))}
    paper_table(args.number, [*done.values()])  # only to raise, for mixed OOD sets
    ood = next((v for r in done.values() if (v := r["config"]["ood"])), ())  # new runs take these
    if ood and "ood" not in chosen(args):
        remark(f"OOD sets, as of the finished runs: {' '.join(ood)}")
    runs = {f: replace(runs[f], ood=runs[f].ood or ood) for f in [*done, *runs]}  # done: first
    plans = {f: resolve(c, c.stats or "cifar10") for f, c in runs.items()}  # stats: no --init yet
    new = {(p.id, p.aux): p for f, p in plans.items() if p.aux and f not in done}
    for p in () if args.read or args.dry_run else new.values():  # only to raise, before hours of ce
        load_aux(p.aux, p.root, p.download, load_id(p.id, p.root, p.download, p.size)[0].x.shape[1])
    for i, (folder, c) in enumerate(runs.items(), 1):
        if args.dry_run:
            words = [sys.executable, globals().get("__file__", "greg.py"), "train", "--out", folder]
            for f in fields(Config):
                if (v := getattr(c, f.name)) != f.default:
                    words += ["--" + f.name.replace("_", "-"), *(v if isinstance(v, list) else [v])]
            say(shlex.join(str(word) for word in words if word is not True))
        elif not args.read or folder in done:
            remark(f"run {i} of {len(runs)}: {c.method} {c.arch} seed {c.seed}: {folder}")
            results.append(train(c, folder, args.device))  # a finished run is only compared with c
    if not args.dry_run:
        ours = args.number, results, chosen(args).get("id", ""), args.archs
        say(paper_table(*ours, file=False))
        if not args.read:
            write_atomically(args.runs / f"table_{args.number}.md", paper_table(*ours))


def command_certify(args: argparse.Namespace) -> None:
    """attack and certify a run's decisions: a table, and a figure of the curves"""
    load_run(args.run, "cpu")  # raises for none, before a folder is made
    folder = args.out or (args.run.parent if args.run.is_file() else args.run)
    options = {"epsilons": sorted({*args.eps})} if args.eps else {}
    options |= {"sigma": args.sigma, "n": args.draws, "local": args.local}
    with alone(folder):
        report = certify_run(args.run, args.device, args.images, chosen(args), **options)
    cells, panels = [], {}
    for name, rows in report["sets"].items():
        panels[name] = {k: [(e, 100 * r[k]["fpr95"]) for e, r in rows.items()] for k in rows[0.0]}
        for eps, row in rows.items():
            pairs = (" / ".join(f"{100 * v:.1f}" for v in pair.values()) for pair in row.values())
            cells.append([name, f"{eps:g}", *pairs])
    say(shown(["OOD set", "ℓ2 ε", *row], cells))  # every row has the same keys
    rejected = ", ".join(f"{100 * v:.1f} at {eps:g}" for eps, v in report["id_rejected"].items())
    reach = f" Smoothing certifies to ε = {report['reach']:.3g} at most." if args.draws else ""
    say(f"FPR95 (γ of these) / AUROC, %. Attacked ID over the run's γ: {rejected}.{reach}")
    if "certified" not in row:
        say("No deterministic certificate: the network has layers without a rule.")
    write_atomically(folder / "certificates.json", json.dumps(report, indent=1, allow_nan=False))
    curves(panels, folder / "certificates.png", "ℓ2 ε in [0,1] pixels", "FPR95 in %")
    say(f"{folder}: certificates.json, certificates.png")


def command_figure(args: argparse.Namespace) -> None:
    """draw Figure 1, Figure 3, histograms of the scores, or the built-in images"""
    out = args.out or Path(f"figure_{args.which}.png")
    if out.suffix.lower() not in (".png", ".pdf", ".svg") or out.is_dir():
        raise ValueError(f"--out {out} is a folder, or ends in none of .png, .pdf, .svg")
    out.parent.mkdir(parents=True, exist_ok=True)
    draw = {"1": figure_1, "3": figure_3, "scores": figure_scores, "images": figure_images}
    of_runs = args.which in ("3", "scores")
    if of_runs != bool(args.folders):
        raise ValueError(f"figure {args.which} takes {'run folders' if of_runs else 'no folder'}")
    if rows := draw[args.which](*([args.folders] if of_runs else []), out):
        lines = [[key, *(f"{row[key]:.3g}" for row in rows.values())] for key in rows[0.0]]
        say(shown(["", *(f"λ_∇S = {v:g}" for v in rows)], lines))
    say(str(out))


ARGUMENTS: dict[str, dict[str, Any]] = {  # what argparse is told of all but Config's fields
    "--device": dict(default="auto", help="cpu, cuda, cuda:1, ... (default: auto)"),
    "--runs": dict(type="path", default=Path("runs"), help="folder of run folders (default: runs)"),
    "--out": dict(type="path", help="where to write (the run's folder; figure: .; eval: no file)"),
    "run": dict(type="path", help="folder of a run"),
    "[run]": dict(type="path", nargs="?", help="folder of a run"),
    "--weights": dict(type="path", help="a weights file, ours or a public one"),
    "--scores": dict(action="append", help=f"comma-separated: {', '.join(SCORES)} (the method's)"),
    "images": dict(type="path", nargs="+", help="image files, or folders of them"),
    "number": dict(type=int, nargs="?", choices=PAPER, help="1 to 6 (all finished runs)"),
    "--read": dict(action="store_true", help="print what is finished of these runs, run nothing"),
    "--dry-run": dict(action="store_true", help="print the runs as commands, run nothing"),
    "--seeds": dict(type=int, nargs="+", action="extend", help="seeds (0 1 2)"),
    "--archs": dict(nargs="+", action="extend", choices=ARCHS, help="other networks"),
    "--methods": dict(nargs="+", action="extend", choices=METHODS, help="some of its methods"),
    "--images": dict(type=int, default=200, help="images of each set, at random (default: 200)"),
    "--eps": dict(type=float, nargs="+", action="extend", help="ℓ2 radii (0.05 0.1 0.25 0.5)"),
    "--sigma": dict(type=float, default=0.1, help="noise of smoothing (default: 0.1)"),
    "--draws": dict(type=int, default=500, help="draws an image; 0: no smoothing (500)"),
    "--local": dict(action="store_true", help="local bounds too (networks of few layers)"),
    "which": dict(choices=["1", "3", "scores", "images"], help="the figure"),
    "folders": dict(type="path", nargs="*", help="run folders (figures 3, scores)"),
}
# Command -> function, arguments, the fields of Config that it takes ("*": all but those named).
_RUNS, _SETS = "number --runs --read --dry-run --seeds --archs --methods", "ood root download"
COMMANDS: dict[str, tuple[Callable, str, str]] = {
    "demo": (command_demo, "--runs --seeds", ""),
    "train": (command_train, "--runs --out", "*"),
    "eval": (command_eval, "[run] --weights --scores --out", _SETS + " id arch stats size n_train"),
    "predict": (command_predict, "run images", ""),
    "table": (command_table, _RUNS, "* method arch seed init"),
    "certify": (command_certify, "run --images --eps --sigma --draws --local --out", _SETS + " id"),
    "figure": (command_figure, "which folders --out", ""),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors, for `main`."""

    def error(self, message: str) -> Any:
        raise ValueError(f"{message} ({self.prog} --help; what has no -- goes before the options)")


def parser() -> Parser:
    """The command line, from ARGUMENTS, COMMANDS and the fields of Config."""
    top = Parser(prog="greg.py", description=(__doc__ or "").split("\n\n")[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    kinds = {"bool": {"action": "store_true"}, "Sequence[str]": {"nargs": "+", "action": "extend"}}
    kinds |= {"int": {"type": int}, "float": {"type": float}, "str": {"type": os.path.expanduser}}
    for name, (command, words, wanted) in COMMANDS.items():
        p = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        p.set_defaults(run_command=command)
        p.register("type", "path", lambda text: Path(text).expanduser())
        for word in ("--device " + words).split():
            p.add_argument(word.strip("[]"), **ARGUMENTS[word])
        for f in fields(Config):
            if (f.name in wanted.split()) != ("*" in wanted):  # listed, or with "*" not listed
                more = {**f.metadata, **kinds[f.type], "default": argparse.SUPPRESS}
                more["help"] += f" (default: {f.default})" if f.default and name == "train" else ""
                p.add_argument("--" + f.name.replace("_", "-"), **more)
    return top


def pick_device(name: str) -> torch.device:
    """A usable torch device; "auto" is the GPU where there is one. Joins torchrun's processes."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    local = os.environ.get("LOCAL_RANK")
    try:
        device = torch.zeros(0, device=f"cuda:{local}" if local and name == "cuda" else name).device
        if local and not torch.distributed.is_initialized():
            if cuda := device.type == "cuda":
                torch.cuda.set_device(device)
            remark(f"process {os.environ.get('RANK')} waits for the others")
            slow = 8 * torch.distributed.default_pg_timeout  # others wait where the first downloads
            torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=slow)
            atexit.register(lambda: world()[1] > 1 and torch.distributed.destroy_process_group())
    except (RuntimeError, AssertionError, ValueError) as e:
        raise ValueError(f"no device {name!r}, or torchrun's processes do not meet: {e}") from None
    return device


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what goes wrong is one line on stderr, with GREG_DEBUG=1 a traceback."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):  # a terminal without λ gets a replacement, not an error
            stream.reconfigure(errors="replace")
    try:
        if "" in (words := [*map(str, sys.argv[1:] if argv is None else argv)]):  # Path("") is "."
            raise ValueError("an argument is empty: a variable that is not set?")
        args = parser().parse_args(words)
        args.device = pick_device(args.device)
        if getattr(sys.stderr, "isatty", bool)():  # a sign of life: more imports take seconds
            remark(f"on {args.device}")
        return args.run_command(args) or 0
    except KeyboardInterrupt:
        reason, code = "stopped; what was saved stays", 130
    except Exception as e:
        if os.environ.get("GREG_DEBUG"):
            raise
        known = ValueError, OSError, FloatingPointError, ImportError, NotImplementedError
        plain = str(e) and isinstance(e, known)
        kind = "" if plain else f"{type(e).__name__} (GREG_DEBUG=1 shows where): "
        reason, code = kind + " ".join(str(e).split())[:600], 2
    print(f"greg: error: {reason}", file=sys.stderr or io.StringIO())
    return code


if __name__ == "__main__":
    sys.exit(main())
