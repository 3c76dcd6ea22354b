#!/usr/bin/env python3
"""greg: Gradient-Regularized Out-of-Distribution Detection, the paper as one module.

Sharifi, Entesari, Safaei, Patel, Fazlyab: "Gradient-Regularized Out-of-Distribution Detection",
ECCV 2024, arXiv 2404.12368. Sections follow the paper's order and use its symbols; a section uses
only sections above it, and the line under its banner says which.

    §  section             paper            holds
    1  Networks            3.1, 6.1         f(x) = W h(x) + b: ResNet-18, WRN-40-2, DenseNet
    2  Scores and losses   3.2, 4.1         S = -LSE(f), Eq. (1), Eq. (3), GReg
    3  Sampling            4.2, Alg. 1      K-Means, energy-based sampling, compared samplers
    4  Certificates        5, Eq. (4)       certified radii, attacks
    5  Post-hoc scores     2.1              MSP, ODIN, ReAct, DICE, LINe
    6  Metrics             6.1              FPR95, AUROC, AUPR
    7  Data                6.1              CIFAR, auxiliary and OOD sets, your own, synthetic
    8  Training            4, 6.1           the table of methods, the loop, checkpoints
    9  Evaluation          6                evaluate, predict, Tables 1-6, figures, command line

Notation: S or s the score, LOW MEANS ID everywhere; s_in, s_aux scores of in-distribution and
auxiliary samples; m_in, m_aux the margins; lambda_s, lambda_grad the weights; z = h(x) features;
k clusters; gamma the decision threshold (ID iff s <= gamma). Shapes: N samples, K classes,
d features, C×H×W images.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import functools
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import math
import os
import platform
import shutil
import signal
import statistics
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    import numpy as np


# ==================================================================================================
# 1  Networks: f(x) = W h(x) + b (Sections 3.1 and 6.1)
# Needs: nothing
# ==================================================================================================


class Net(nn.Module):
    """f(x) = W h(x) + b (Section 3.1): `features` is h, [N,C,H,W] -> [N,d]; `fc` holds W and b."""

    def __init__(self, features: nn.Module, d: int, K: int):
        super().__init__()
        self.features, self.fc = features, nn.Linear(d, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class Residual(nn.Module):
    """x -> body(x) + shortcut(x)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class Concat(nn.Module):
    """x -> [x, body(x)] along the channels."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], dim=1)


class Normalize(nn.Module):
    """(x - mean) / std for x [N,C,H,W] in [0,1]: in front of a net it makes radii pixel units."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)


def _bn_relu_conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.BatchNorm2d(c_in), nn.ReLU(), _conv(c_in, c_out, kernel, stride)]


def _pool(d: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(d), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def _init(net: Net, mode: str) -> Net:
    """He initialisation of the convolutions; fan recomputed for each of them.

    The DenseNet-BC copied through the field's code bases takes the fan of another loop variable
    (every weight ~ N(0, 2/16)), and its fresh eval-mode logits reach 1e28.
    """
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode=mode, nonlinearity="relu")
    nn.init.zeros_(net.fc.bias)
    return net


def resnet18(K: int) -> Net:
    """ResNet-18 (He et al. 2016) with the 3×3 stem for 32×32 images, d = 512."""

    def block(c_in: int, c: int, stride: int) -> nn.Module:
        body = [_conv(c_in, c, 3, stride), nn.BatchNorm2d(c), nn.ReLU(), _conv(c, c, 3)]
        plain = stride == 1 and c_in == c
        project = nn.Sequential(_conv(c_in, c, 1, stride), nn.BatchNorm2d(c))
        shortcut = nn.Identity() if plain else project
        return nn.Sequential(Residual(nn.Sequential(*body, nn.BatchNorm2d(c)), shortcut), nn.ReLU())

    layers, c_in = [_conv(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU()], 64
    for c, stride in (64, 1), (128, 2), (256, 2), (512, 2):
        layers += [block(c_in, c, stride), block(c, c, 1)]
        c_in = c
    return Net(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 512, K)


def wrn(depth: int, width: int, K: int) -> Net:
    """Wide ResNet (Zagoruyko & Komodakis 2016), no dropout as in the released code, d = 64 width.

    Raises ValueError unless depth = 6 n + 4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6 n + 4 (10, 16, 22, 28, 40, ...), got {depth}")
    layers, c_in = [_conv(3, 16, 3)], 16
    for c, first_stride in (16 * width, 1), (32 * width, 2), (64 * width, 2):
        for i in range((depth - 4) // 6):
            stride = first_stride if i == 0 else 1
            first, rest = _bn_relu_conv(c_in, c, 3, stride), _bn_relu_conv(c, c, 3)
            if stride == 1 and c_in == c:
                layers += [Residual(nn.Sequential(*first, *rest), nn.Identity())]
            else:  # the shortcut branches off after the first BN-ReLU where shapes change
                body = nn.Sequential(first[2], *rest)
                layers += [*first[:2], Residual(body, _conv(c_in, c, 1, stride))]
            c_in = c
    return _init(Net(nn.Sequential(*layers, *_pool(c_in)), c_in, K), mode="fan_out")


def wrn40_2(K: int) -> Net:
    """WRN-40-2, d = 128: the paper's WRN-40."""
    return wrn(40, 2, K)


def _dense_blocks(c: int, blocks: tuple[int, ...], growth: int) -> tuple[list[nn.Module], int]:
    """DenseNet-BC (Huang et al. 2017): bottlenecks of 4·growth, transitions that halve."""
    layers = []
    for b, n in enumerate(blocks):
        for _ in range(n):
            body = [*_bn_relu_conv(c, 4 * growth, 1), *_bn_relu_conv(4 * growth, growth, 3)]
            layers += [Concat(nn.Sequential(*body))]
            c += growth
        if b < len(blocks) - 1:
            layers += [*_bn_relu_conv(c, c // 2, 1), nn.AvgPool2d(2)]
            c //= 2
    return layers, c


def densenet100(K: int) -> Net:
    """DenseNet-BC with 100 layers and growth 12, d = 342: the paper's "DenseNet-101"."""
    layers, d = _dense_blocks(24, (16, 16, 16), growth=12)
    return _init(Net(nn.Sequential(_conv(3, 24, 3), *layers, *_pool(d)), d, K), mode="fan_out")


def densenet121(K: int) -> Net:
    """DenseNet-121 for 224×224 images, d = 1024; equal to torchvision's, whose weights it loads."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers, d = _dense_blocks(64, (6, 12, 24, 16), growth=32)
    features = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *layers, *_pool(d))
    return _init(Net(features, d, K), mode="fan_in")


ARCHS: dict[str, Callable[[int], Net]] = {
    "resnet18": resnet18,
    "wrn40_2": wrn40_2,
    "densenet100": densenet100,
    "densenet121": densenet121,
    "wrn10_1": lambda K: wrn(10, 1, K),  # small enough for a CPU; not in the paper
    "wrn16_1": lambda K: wrn(16, 1, K),
}


def load_weights(net: Net, path: str) -> Net:
    """Load a checkpoint of ours or of the field's public ones into `net`; every weight or an error.

    Public files (energy_ood, outlier-exposure, DICE/LINe/POEM, GReg, torchvision) name the same
    layers differently; but all list them in forward order. So names are matched by position, and
    each pair must agree in role (the name's last part) and in shape. (A non-strict load, as in the
    released code, leaves a head of another name at random without a word.)

    Raises FileNotFoundError without the file, ValueError for anything that does not fit.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    content = io.BytesIO(Path(path).read_bytes())  # so that what fails below is the content's fault
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as e:
        message = f"{path} is not a checkpoint of plain tensors that can be read safely: {e}"
        raise ValueError(message.splitlines()[0]) from None
    for key in ("net", "state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors")
    counters = "num_batches_tracked"  # absent from files older than PyTorch 0.4.1
    theirs = {k: v for k, v in state.items() if not k.endswith(counters)}
    ours = {k: v for k, v in net.state_dict().items() if not k.endswith(counters)}
    if len(theirs) != len(ours):
        raise ValueError(f"{path} has {len(theirs)} tensors, the network {len(ours)}")
    for (a, x), (b, y) in zip(theirs.items(), ours.items(), strict=True):
        if a.rsplit(".")[-1] != b.rsplit(".")[-1] or x.shape != y.shape:
            shapes = f"{tuple(x.shape)} where the network has {b} {tuple(y.shape)}"
            raise ValueError(f"{path} is of another network or class count: {a} {shapes}")
    net.load_state_dict(net.state_dict() | dict(zip(ours, theirs.values(), strict=True)))
    return net


# ==================================================================================================
# 2  Scores and losses (Sections 3.2 and 4.1)
# Needs: nothing
# ==================================================================================================


def energy_score(logits: Tensor) -> Tensor:
    """S(x) = -LSE(f(x)) (Section 3.2), low for ID: logits [N,K] -> [N], in float32 or wider.

    Half precision is widened first: rounding scores to bfloat16 alone moves FPR95 by a point.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return -torch.logsumexp(logits.to(wide), dim=1)


def energy_loss(s_in: Tensor, s_aux: Tensor, m_in: float = -25.0, m_aux: float = -7.0) -> Tensor:
    """Eq. (1): mean 1[s_in >= m_in] (s_in - m_in)² + mean 1[s_aux <= m_aux] (m_aux - s_aux)².

    Only samples on the wrong side of their margin count. s_in [n], s_aux [m] -> scalar.
    The default margins are those of the released code.
    """
    return F.relu(s_in - m_in).square().mean() + F.relu(m_aux - s_aux).square().mean()


def gradient_norm(s: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """‖∂(Σ_j mask_j s_j)/∂x_i‖₂ · mask_i for each sample: [N], differentiable once more.

    s [N] scores computed from x [N,...], which must have required grad beforehand; mask [N] bool.
    Where the gradient is zero the norm is 0 and so is its gradient (a square root of the sum of
    squares would give NaN). In training mode batch norm couples the samples, so that row i also
    feels the others' scores: masking before and after keeps masked samples out of both. In eval
    mode row i is ‖∇S(x_i)‖ exactly. Raises ValueError if s does not depend on x.
    """
    if not (x.requires_grad and s.requires_grad):
        raise ValueError("call x.requires_grad_() before the forward pass that computes s")
    keep = torch.ones_like(s) if mask is None else mask.to(s.dtype)
    (g,) = torch.autograd.grad((s * keep).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(g.reshape(len(x), -1), dim=1) * keep


def gradient_loss(
    s: Tensor,
    x: Tensor,
    n_in: int,
    m_in: float = -25.0,
    m_aux: float = -7.0,
    reduction: str = "paper",
) -> Tensor:
    """Eq. (3): mean ‖1[s_in <= m_in] ∇S(x_in)‖ + mean ‖1[s_aux >= m_aux] ∇S(x_aux)‖.

    Only samples already on the right side of their margin count: the complement of Eq. (1).
    s [N] scores of x [N,...], the first n_in rows in-distribution -> scalar, differentiable in the
    weights. The released code differentiates the mean instead of each sample's score and averages
    over all N rows, so that its term is Eq. (3) / N: reduction="released".
    """
    if reduction not in ("paper", "released"):
        raise ValueError(f'reduction must be "paper" or "released", got {reduction!r}')
    if not 0 < n_in < len(s):
        raise ValueError(f"need ID and auxiliary samples, got n_in={n_in} of {len(s)}")
    norm = gradient_norm(s, x, torch.cat([s[:n_in] <= m_in, s[n_in:] >= m_aux]))
    loss = norm[:n_in].mean() + norm[n_in:].mean()
    return loss if reduction == "paper" else loss / len(s)


class GregLoss(NamedTuple):
    """What `greg_loss` returns: the objective, its three terms, the forward pass behind them."""

    loss: Tensor
    ce: Tensor
    energy: Tensor
    gradient: Tensor
    logits: Tensor
    scores: Tensor


def greg_loss(
    net: nn.Module,
    x_in: Tensor,
    y_in: Tensor,
    x_aux: Tensor,
    m_in: float = -25.0,
    m_aux: float = -7.0,
    lambda_s: float = 0.1,
    lambda_grad: float = 1.0,
    reduction: str = "paper",
    score: Callable[[Tensor], Tensor] = energy_score,
    aux_loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    grad_share: float = 1.0,
    generator: torch.Generator | None = None,
) -> GregLoss:
    """GReg (Section 4.1): L = L_CE + lambda_s · Eq. (1) + lambda_grad · Eq. (3), in one forward.

    x_in [n,...], y_in [n] int64 labels, x_aux [m,...]; `net` is any module that returns logits
    [n+m,K]. (The released code runs the network twice a step, updating batch statistics twice.)
    The gradient term on another method (Table 4): its `aux_loss(f_in, f_aux, y_in)` of the logits
    in the place of Eq. (1), and its `score` of the logits, low for ID, in the place of S.
    grad_share < 1 estimates Eq. (3) on that share of x_in and of x_aux, drawn at random, in a
    forward of their own: cheaper, noisier, unbiased but for batch norm, whose statistics in
    training mode are then those of the images drawn (and are not kept).
    Raises ValueError for a compiled net: double backward through one has been silently wrong.
    """
    compiled = hasattr(net, "_orig_mod") or getattr(net, "_compiled_call_impl", None)
    if lambda_grad and compiled:
        raise ValueError("the gradient term needs the plain network, not a torch.compile'd one")
    n_in, x = len(x_in), torch.cat([x_in, x_aux]).detach()
    fast = FastDoubleBackward()
    with fast if lambda_grad else contextlib.nullcontext():
        if lambda_grad and grad_share < 1:
            rows, n_g = random_rows(n_in, len(x_aux), grad_share, generator, x.device)
            x_g, logits = x[rows].requires_grad_(), net(x)
            # On copies of its buffers: batch statistics move once a step.
            buffers = {name: b.clone() for name, b in net.named_buffers()}
            s, s_g = score(logits), score(torch.func.functional_call(net, buffers, x_g))
        else:
            x_g, n_g = x.requires_grad_(lambda_grad != 0), n_in
            logits = net(x)
            s = s_g = score(logits)
    wide = logits.to(s.dtype)
    ce = F.cross_entropy(wide[:n_in], y_in)
    if aux_loss is None:
        energy = energy_loss(s[:n_in], s[n_in:], m_in, m_aux)
    else:
        energy = aux_loss(wide[:n_in], wide[n_in:], y_in)
    gradient = s.new_zeros(())
    if lambda_grad:
        with fast.images_only():
            gradient = gradient_loss(s_g, x_g, n_g, m_in, m_aux, reduction)
        if reduction == "released":
            gradient = gradient * (len(s_g) / len(s))  # / N, the whole batch
    loss = ce + lambda_s * energy + lambda_grad * gradient
    return GregLoss(loss, ce, energy, gradient, logits, s)


def random_rows(
    n_in: int,
    n_aux: int,
    share: float,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, int]:
    """That share of the first n_in rows of a batch and of the n_aux after them, and how many of
    the first: distinct, uniformly drawn, at least one of each. ValueError for a share outside
    (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"the share of images for the gradient term is in (0, 1], got {share}")
    sides = [
        torch.randperm(n, generator=generator, device=device)[: max(1, round(share * n))]
        for n in (n_in, n_aux)
    ]
    return torch.cat([sides[0], sides[1] + n_in]), len(sides[0])


def oe_loss(f_in: Tensor, f_aux: Tensor, y_in: Tensor) -> Tensor:
    """Outlier Exposure (Hendrycks et al. 2019): cross-entropy of f_aux to uniform, minus ln K."""
    return (torch.logsumexp(f_aux, 1) - f_aux.mean(1)).mean() - math.log(f_aux.shape[1])


def absent_loss(f_in: Tensor, f_aux: Tensor, y_in: Tensor) -> Tensor:
    """NTOM (Chen et al. 2021) and DOS (Jiang et al. 2024): cross-entropy of f_aux to class K+1."""
    return -f_aux.log_softmax(1)[:, -1].mean()


def openmix_loss(f_in: Tensor, f_aux: Tensor, y_in: Tensor, lam: Tensor) -> Tensor:
    """OpenMix (Zhu et al. 2023): mixed images are their ID image's class for the share lam of
    their mixture, and class K+1 for the rest. f_aux [n,K+1] of lam x_in + (1 - lam) x_aux."""
    return lam * F.cross_entropy(f_aux, y_in) + (1 - lam) * absent_loss(f_in, f_aux, y_in)


def balanced_energy_loss(
    f_in: Tensor,
    f_aux: Tensor,
    y_in: Tensor,
    prior: Tensor,
    m_in: float = -25.0,
    m_aux: float = -7.0,
    alpha: float = 10.0,
    gamma: float = 0.05,
) -> Tensor:
    """Balanced energy (Choi et al. 2023): Eq. (1) with auxiliary samples weighted by class.

    Z = Σ_k p_k prior_k^gamma / Σ_j prior_j^gamma is large for the classes that are frequent among
    auxiliary images, prior [K]: those weigh more, and their margin moves by alpha Z. The default
    alpha and gamma are the authors' for CIFAR-10.
    """
    q = prior**gamma / (prior**gamma).sum()
    Z = f_aux.softmax(1) @ q
    aux = F.relu(m_aux - (energy_score(f_aux) - alpha * Z)).square()
    aux = (F.normalize(Z, p=1.0, dim=0) * aux).sum()  # 0, not NaN, where every Z underflows to 0
    return F.relu(energy_score(f_in) - m_in).square().mean() + aux


# What Eq. (3) costs beyond its arithmetic is the double backward of batch norm, which PyTorch
# composes of some thirty passes over the activations, that of convolutions, where it takes the
# weight's gradient for a convolution with kernels as large as the image, and zeros that it adds up
# for ReLU and concatenations. Here these four are written out; a step takes a quarter to a half
# less time. Without this part everything works, slower.


class FastDoubleBackward(TorchFunctionMode):
    """Inside `with FastDoubleBackward() as fast:` run the network whose gradient is penalised.

    Serves any network that calls F.batch_norm, F.conv2d, F.relu and torch.cat, as the layers of
    torch.nn do; what they do in place, with a bias or with padding "same" stays PyTorch's. Values
    and gradients stay the same up to rounding, the gradient's gradient included; a third is
    refused. `with fast.images_only():` promises that a backward pass inside asks for the gradient
    with respect to images only, so that the weights' needs no computing.
    """

    weights = True

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        fast = {
            F.conv2d: self._conv2d, F.batch_norm: _batch_norm, F.relu: _relu, torch.cat: _cat
        }.get(func)  # fmt: skip
        out = fast(*args, **(kwargs or {})) if fast else NotImplemented
        return func(*args, **(kwargs or {})) if out is NotImplemented else out

    def _conv2d(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if bias is not None or isinstance(padding, str) or input.dim() != 4:
            return NotImplemented
        device = input.device.type
        if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
            input, weight = (t.to(torch.get_autocast_dtype(device)) for t in (input, weight))
        return _Conv2d.apply(input, weight, self, (stride, padding, dilation, groups))

    @contextlib.contextmanager
    def images_only(self) -> Iterator[None]:
        self.weights = False
        try:
            yield
        finally:
            self.weights = True


def _conv2d_backward(g, x, weight, options, which):
    """The gradients of Σ g conv(x, weight) with respect to x and to weight, of those asked for."""
    stride, padding, dilation, groups = options
    sizes = [(v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)]
    kernel = torch.ops.aten.convolution_backward
    return kernel(g, x, weight, None, *sizes, False, (0, 0), groups, (*which, False))[:2]


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, fast, options):
        ctx.save_for_backward(x, weight)
        ctx.fast, ctx.options = fast, options
        return F.conv2d(x, weight, None, *options)

    @staticmethod
    def backward(ctx, g):
        which = True, ctx.fast.weights and ctx.needs_input_grad[1]
        return *_Conv2dBackward.apply(g, *ctx.saved_tensors, ctx.options, which), None, None


class _Conv2dBackward(torch.autograd.Function):
    """at_x = conv'(g, weight) and at_weight = conv''(x, g); both are linear in either argument."""

    @staticmethod
    def forward(ctx, g, x, weight, options, which):
        ctx.save_for_backward(g, x, weight)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return _conv2d_backward(g, x, weight, options, which)

    @staticmethod
    def backward(ctx, v, v_weight):
        if torch.is_grad_enabled() or v is None or v_weight is not None:
            raise RuntimeError(_TWICE)
        g, x, weight = ctx.saved_tensors
        which = False, ctx.needs_input_grad[2]
        at_weight = _conv2d_backward(g, v, weight, ctx.options, which)[1]
        return F.conv2d(v, weight, None, *ctx.options), None, at_weight, None, None


_TWICE = "FastDoubleBackward differentiates the gradient, with respect to images, only once"


def _relu(input, inplace=False):
    return NotImplemented if inplace else _ReLU.apply(input)


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return _ReLUBackward.apply(g, *ctx.saved_tensors)


class _ReLUBackward(torch.autograd.Function):
    """g where y > 0: constant in y, for which PyTorch would add up zeros as large as y."""

    @staticmethod
    def forward(ctx, g, y):
        ctx.save_for_backward(y)
        return torch.ops.aten.threshold_backward(g, y, 0)

    @staticmethod
    def backward(ctx, v):
        return _ReLUBackward.apply(v, *ctx.saved_tensors), None


def _cat(tensors, dim=0, **more):
    if more or len({(t.dtype, t.dim()) for t in tensors}) > 1:
        return NotImplemented
    return _Cat.apply(dim, *tensors)


class _Cat(torch.autograd.Function):
    """Its gradient's gradient is another concatenation, not a sum of zero-filled tensors."""

    @staticmethod
    def forward(ctx, dim, *tensors):
        ctx.dim, ctx.sizes = dim, [t.shape[dim] for t in tensors]
        return torch.cat(tensors, dim)

    @staticmethod
    def backward(ctx, g):
        return None, *_Split.apply(g, ctx.dim, ctx.sizes)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, dim, sizes):
        ctx.dim = dim
        return g.split(sizes, dim)

    @staticmethod
    def backward(ctx, *v):
        return torch.cat(v, ctx.dim), None, None


def _batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    if not training or weight is None or bias is None or input.numel() == input.shape[1]:
        return NotImplemented
    return _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)


def _batch_norm_backward(g, x, w, mean, r, which=(True, True, True)):
    """w r P(g) with P(g) = g - mean(g) - x̂ mean(g x̂), and the sums of g x̂ and of g: one kernel."""
    kernel = torch.ops.aten.native_batch_norm_backward
    return kernel(g, x, w, None, None, mean, r, True, 0.0, which)


class _BatchNorm(torch.autograd.Function):
    """y = w x̂ + b with x̂ = (x - mean(x)) r and r = (var(x) + eps)^(-1/2)."""

    @staticmethod
    def forward(ctx, x, w, b, running_mean, running_var, momentum, eps):
        running = running_mean, running_var
        y, mean, r = torch.native_batch_norm(x, w, b, *running, True, momentum, eps)
        ctx.save_for_backward(x, w, mean, r)
        return y

    @staticmethod
    def backward(ctx, g):
        return *_BatchNormBackward.apply(g, *ctx.saved_tensors), None, None, None, None


class _BatchNormBackward(torch.autograd.Function):
    """The gradient of batch norm, and the gradient of that.

    Let v be what arrives for w r P(g), and a = mean g, b = mean g x̂, c = mean v x̂, d = mean v,
    q = mean v g - a d - b c over the m entries of a channel. P is symmetric, so that w r P(v)
    arrives at g, m r q at w, and -w r² (c (g - a) + b (v - d) + (q - 2 b c) x̂) at x.
    """

    @staticmethod
    def forward(ctx, g, x, w, mean, r):
        at_x, at_w, at_b = _batch_norm_backward(g, x, w, mean, r)
        m = x.numel() // x.shape[1]
        ctx.save_for_backward(g, x, w, mean, r, at_b / m, at_w / m)
        ctx.set_materialize_grads(False)
        return at_x, at_w, at_b

    @staticmethod
    def backward(ctx, v, v_w, v_b):
        if torch.is_grad_enabled() or v is None or v_w is not None or v_b is not None:
            raise RuntimeError(_TWICE)
        g, x, w, mean, r, a, b = ctx.saved_tensors
        m, zero, one = x.numel() // x.shape[1], torch.zeros_like(mean), torch.ones_like(r)
        at_g, c, d = _batch_norm_backward(v, x, w, mean, r)
        vg = _batch_norm_backward(v, g, w, zero, one, (False, True, False))[1]  # Σ v g, one pass
        c, d = c / m, d / m
        q = vg / m - a * d - b * c
        slope = (q - 2 * b * c) * r
        shift = -(c * a + b * d + slope * mean)
        shape = (-1, *[1] * (x.dim() - 2))
        shift, c, b, slope = ((-w * r * r * t).view(shape) for t in (shift, c, b, slope))
        at_x = torch.addcmul(shift, g, c).addcmul_(v, b).addcmul_(x, slope)
        return at_g, at_x.to(x.dtype), m * r * q, None, None


# ==================================================================================================
# 3  Sampling (Section 4.2, Algorithm 1)
# Needs: nothing
# ==================================================================================================


def kmeans(
    x: Tensor,
    k: int,
    n_init: int = 3,
    max_iter: int = 100,
    tol: float = 1e-4,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """K-Means (Lloyd 1982): x [N,d] -> labels [N] int64, centroids [k,d], inertia (a scalar).

    The best of `n_init` restarts, run as one batch on the device of x, in float32 or float64. A
    restart stops when no label changes, or when the sum of its squared centroid shifts is at most
    tol times the mean variance of a feature. The labels returned are the nearest of the centroids
    returned. An empty cluster moves to the point farthest from its centroid; with fewer than k
    distinct points some clusters stay empty.

    Raises ValueError unless x is [N,d], finite, and 1 <= k <= N, n_init >= 1, max_iter >= 1.
    """
    if x.dim() != 2 or not 1 <= k <= len(x) or n_init < 1 or max_iter < 1:
        message = f"need x [N,d] and 1 <= k <= N, got x {list(x.shape)} and k={k}"
        raise ValueError(f"{message}, n_init={n_init}, max_iter={max_iter}")
    if not x.isfinite().all():
        raise ValueError("K-Means needs finite points; x has NaN or infinite entries")
    with torch.autocast(x.device.type, enabled=False):
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        mean = x.mean(0)
        x = x - mean  # small numbers: ‖x - c‖² = ‖x‖² - 2 x·c + ‖c‖² would cancel otherwise
        c = _kmeans_plus_plus(x, k, n_init, generator)
        enough = tol * x.square().mean()
        labels, distance = _nearest(x, c)
        on = torch.arange(n_init, device=x.device)  # the restarts that have not converged
        for i in range(1, max_iter + 1):
            old_labels, old_c = labels[on], c[on]
            c[on] = _means(x, old_c, old_labels, distance[on])
            labels[on], distance[on] = _nearest(x, c[on])
            # Asking a GPU for the answer stalls it, so ask it only now and then.
            if x.device.type == "cpu" or i % 5 == 0:
                same = (labels[on] == old_labels).all(1)
                on = on[~(same | ((c[on] - old_c).square().sum((1, 2)) <= enough))]
                if len(on) == 0:
                    break
        best = distance.sum(1).argmin()
        labels, c = labels[best], c[best]
        return labels, c + mean, (x - c[labels]).square().sum()


def _kmeans_plus_plus(x: Tensor, k: int, R: int, generator: torch.Generator | None) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007), R times at once: [R,k,d].

    The next centroid is the best of 2 + ⌊ln k⌋ points drawn with probability ∝ squared distance
    to the nearest centroid so far, as in scikit-learn. They come from a sample of about 16 for
    each cluster, one half of it ∝ squared distance to the mean, so that small clusters far out are
    in it (Bachem et al. 2018): Lloyd's iterations, over all points, make up for the difference.
    """
    trials, most = 2 + int(math.log(k)), max(2 * k, min(16 * k, 4096))
    if len(x) > most:
        square = x.square().sum(1)
        lottery = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype).log()
        x = x[(lottery / (square.mean() + square)).topk(most).indices]
    N, square = len(x), x.square().sum(1)
    distances = torch.addmm(square, x, x.mT, alpha=-2).add_(square[:, None]).clamp_(min=0)
    u = torch.rand(k, R, trials, generator=generator, device=x.device, dtype=x.dtype)
    r = torch.arange(R, device=x.device)
    chosen = [(u[0, :, 0] * N).long().clamp(max=N - 1)]
    closest = distances[chosen[0]]
    for t in range(1, k):
        cumulative = closest.cumsum(1)
        i = torch.searchsorted(cumulative, u[t] * cumulative[:, -1:]).clamp_(max=N - 1)
        rows = distances.index_select(0, i.flatten()).view(R, trials, N)
        nearer = torch.minimum(rows, closest[:, None])
        best = nearer.sum(2).argmin(1)
        closest = nearer[r, best]
        chosen.append(i[r, best])
    return x[torch.stack(chosen, 1)]


def _nearest(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Label of and squared distance to the nearest centroid: x [N,d], c [R,k,d] -> [R,N] twice.

    In blocks of points whose distances a CPU's cache holds: twice as fast as all at once.
    """
    R, k, _ = c.shape
    square, c = c.square().sum(2).flatten(), c.flatten(0, 1).mT
    blocks = [
        torch.addmm(square, part, c, alpha=-2).view(-1, R, k).min(2)
        for part in x.split(max(1, 2**20 // (R * k)))
    ]
    distance, labels = (torch.cat(v) for v in zip(*blocks, strict=True))
    return labels.mT, (distance.mT + x.square().sum(1)).clamp_(min=0)


def _means(x: Tensor, c: Tensor, labels: Tensor, distance: Tensor) -> Tensor:
    """Mean of each cluster's points [R,k,d]; the e-th empty cluster takes the e-th farthest point.

    As the means of "bags" of rows: scattered additions have no fixed order on a GPU.
    """
    R, k, _ = c.shape
    number = torch.arange(R * k, device=x.device)  # of a cluster, over all restarts
    cluster, order = (labels + number[::k, None]).flatten().sort(stable=True)
    first = torch.searchsorted(cluster, number)
    means = F.embedding_bag(order % len(x), x, first, mode="mean").view_as(c)
    empty = (torch.searchsorted(cluster, number, right=True) == first).view(R, k, 1)
    far = x[distance.topk(k, dim=1).indices]
    e = (empty.cumsum(1) - 1).clamp(min=0).expand_as(c)
    return torch.where(empty, far.gather(1, e), means)


def _extremes(labels: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Masks [N] of each cluster's sample of lowest and of highest score; ties: the first, last."""
    order = s.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]  # by cluster, and by score within it
    change = labels[order].diff() != 0
    edge = change.new_ones(1)
    lowest, highest = torch.zeros_like(labels, dtype=torch.bool), torch.zeros_like(labels).bool()
    lowest[order], highest[order] = torch.cat([edge, change]), torch.cat([change, edge])
    return lowest, highest


def _top_up(chosen: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Indices of the chosen samples (a mask), topped up at random to n distinct ones."""
    lottery = torch.rand(len(chosen), generator=generator, device=chosen.device)
    return (lottery + 2 * chosen).topk(n).indices


def _clusters(z: Tensor, s: Tensor, k: int, n: int, generator: torch.Generator | None) -> Tensor:
    """K-Means labels of the normalised features ẑ = z / ‖z‖ (Algorithm 1, lines 2 and 3)."""
    if len(z) != len(s) or not 1 <= k or n > len(s):
        message = f"cannot draw {n} from {len(z)} candidates ({len(s)} scores) in {k} clusters"
        raise ValueError(f"{message}: give more candidates or a smaller k")
    if s.isnan().any():
        raise ValueError("the candidates' scores have NaN: the network has diverged")
    z_hat = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)))
    return kmeans(z_hat, k, generator=generator)[0]


def energy_sampling(
    z: Tensor, s: Tensor, k: int, generator: torch.Generator | None = None
) -> Tensor:
    """Algorithm 1: 2k distinct indices into the candidates, given features z [N,d], scores s [N].

    From each of k clusters of the normalised features the candidate of lowest score, for Eq. (1),
    and that of highest score, for Eq. (3). A cluster of one gives one: as in the released code
    the number is made up at random from the rest. Raises ValueError if 2k > N or a score is NaN.
    """
    lowest, highest = _extremes(_clusters(z, s, k, 2 * k, generator), s)
    return _top_up(lowest | highest, 2 * k, generator)


def dos_sampling(z: Tensor, s: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
    """DOS (Jiang et al. 2024): from each of k clusters the lowest score, here p_{K+1}: k indices.

    z [N,d] features, s [N] scores; the number is made up at random. Raises as `energy_sampling`.
    """
    lowest, _ = _extremes(_clusters(z, s, k, k, generator), s)
    return _top_up(lowest, k, generator)


def quantile_mining(s: Tensor, n: int, q: float = 0.125) -> Tensor:
    """NTOM (Chen et al. 2021): the n samples of lowest score, here p_{K+1}, after a share q [N].

    The very hardest outliers are skipped. The indices come in ascending order: by rank, the hard
    ones would all be seen first. Raises ValueError if fewer than n are left or a score is NaN.
    """
    first = int(q * len(s))
    if first + n > len(s):
        raise ValueError(f"NTOM skips {first} of {len(s)} auxiliary images: {n} more are not there")
    if s.isnan().any():
        raise ValueError("the auxiliary scores have NaN: the network has diverged")
    return s.argsort(stable=True)[first : first + n].sort().values


def poem_posterior(
    gram: Tensor, zy: Tensor, sigma: float = 20.0, sigma_n: float = 0.5
) -> tuple[Tensor, Tensor]:
    """POEM (Ming et al. 2022): Bayesian regression of the ID/OOD boundary on features, in float64.

    gram = Z'Z [d,d], zy = Z'y [d], prior variance sigma, noise variance sigma_n -> the posterior's
    mean [d] and the lower Cholesky factor [d,d] of its precision Z'Z / sigma_n + I / sigma. (The
    released POEM multiplies the covariance by sigma once more, and shifts all targets by one draw
    of the noise.) Raises ValueError unless gram was summed in float64: features of a trained
    network are nearly of low rank, so that float32 sums are not positive definite.
    """
    if gram.dtype != torch.float64 or zy.dtype != torch.float64:
        raise ValueError(f"sum Z'Z and Z'y in float64, not {gram.dtype} and {zy.dtype}")
    precision = gram / sigma_n + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) / sigma
    factor = torch.linalg.cholesky(precision)
    return torch.cholesky_solve(zy[:, None] / sigma_n, factor)[:, 0], factor


def poem_draw(mean: Tensor, factor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A sample of the boundary's weights [d] from the posterior of `poem_posterior`."""
    noise = torch.randn(len(mean), 1, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + torch.linalg.solve_triangular(factor.mT, noise, upper=True)[:, 0]


# ==================================================================================================
# 4  Certificates (Section 5, Eq. (4))
# Needs: Net, Residual, Concat, Normalize (1), energy_score (2)
# ==================================================================================================

# "Sound" is a statement on the network in real arithmetic with the stored weights, in eval mode,
# in the units of its input. Everything is computed in float64, norms are rounded up and radii down
# by 1e-9. That covers rounding where sums do not cancel to nine digits; float32, TF32 or half
# precision at test time add an error that is not covered.
_UP, _DOWN = 1 + 1e-9, 1 - 1e-9


def _check_finite(**tensors: Tensor | float) -> None:
    for name, v in tensors.items():
        if not torch.as_tensor(v).isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")


def certified_radius(
    s: Tensor, gamma: float, lipschitz: float | Tensor, eps: float | Tensor = math.inf
) -> Tensor:
    """Eq. (4): ε* = min(ε, |γ - S(x)| / L_S) [N] in float64, on either side of γ, 0 on it.

    Sound if S is lipschitz-Lipschitz on B(x, ε): |S(x') - S(x)| <= L_S ‖x' - x‖ < |γ - S(x)| keeps
    the decision for ‖x' - x‖ < ε* (at ε* itself an OOD sample's S may be γ, which is ID). The
    paper's L_S = ‖∇S(x)‖ is in general no such constant for OOD samples: where f is affine S is
    concave and falls faster away from x (see `ood_radius`).
    Raises ValueError for NaN, or a negative lipschitz or eps.
    """
    s = torch.as_tensor(s, dtype=torch.float64).detach()
    gamma, lipschitz, eps = (
        torch.as_tensor(v, dtype=s.dtype, device=s.device) for v in (gamma, lipschitz, eps)
    )
    if (lipschitz < 0).any() or (eps < 0).any():
        raise ValueError("the Lipschitz constant and eps must not be negative")
    margin = (s - gamma).abs()
    radius = torch.where(margin == 0, 0 * lipschitz.nan_to_num(0), margin / lipschitz)
    if any(v.isnan().any() for v in (s, gamma, lipschitz, eps, radius)):
        raise ValueError("NaN among the scores, the threshold, the Lipschitz constants or eps")
    return torch.minimum(radius, eps)


# ---- What the certificates know: the blocks of section 1 and these layers; others are refused.

_DIAGONAL = nn.BatchNorm1d, nn.BatchNorm2d, Normalize
_AFFINE = *_DIAGONAL, nn.Conv2d, nn.Linear, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten
_SKIPPED = nn.Identity, nn.Dropout, nn.Dropout2d
# The options for which the rules below were derived. (In place, ReLU would overwrite an input that
# a shortcut or the caller still holds.)
_RULES: dict[type, Callable[[Any], bool]] = {
    nn.Conv2d: lambda m: m.padding_mode == "zeros" and not isinstance(m.padding, str),
    nn.BatchNorm1d: lambda m: m.running_var is not None,
    nn.BatchNorm2d: lambda m: m.running_var is not None,
    nn.AvgPool2d: lambda m: m.count_include_pad and not m.ceil_mode and m.divisor_override is None,
    nn.AdaptiveAvgPool2d: lambda m: m.output_size in (1, (1, 1)),
    nn.MaxPool2d: lambda m: m.dilation in (1, (1, 1)) and not m.ceil_mode and not m.return_indices,
    nn.Flatten: lambda m: (m.start_dim, m.end_dim) == (1, -1),
    nn.ReLU: lambda m: not m.inplace,
    nn.LeakyReLU: lambda m: 0 <= m.negative_slope <= 1 and not m.inplace,
    **dict.fromkeys(
        (nn.Linear, Normalize, *_SKIPPED, Net, nn.Sequential, Residual, Concat), lambda m: True
    ),
}


def _steps(net: nn.Module) -> list[nn.Module]:
    """The layers in order, `Net` and `Sequential` unrolled, without what does nothing in eval mode.

    Types are compared exactly: a subclass may compute anything. A module that occurs twice is two
    steps, which `children()` would make one.
    """
    altered = net._forward_hooks or net._forward_pre_hooks or "forward" in vars(net)
    if altered or not _RULES.get(type(net), lambda m: False)(net):
        raise NotImplementedError(f"no certificate for {net}: its rule is not known here")
    for child in net.children():
        _steps(child)  # refused now if it is not known, at any depth
    if type(net) in (Net, nn.Sequential):
        parts = [net.features, net.fc] if type(net) is Net else net
        return [m for part in parts for m in _steps(part)]
    return [] if type(net) in _SKIPPED else [net]


def _exact(net: nn.Module) -> list[nn.Module]:
    """The steps of a float64 copy in eval mode. ValueError for training mode or NaN weights."""
    if any(m.training for m in net.modules()):
        raise ValueError("certificates hold in eval mode; call net.eval() first")
    if not all(v.isfinite().all() for v in (*net.parameters(), *net.buffers())):
        raise ValueError("the network has NaN or infinite weights")
    return _steps(copy.deepcopy(net).double().requires_grad_(False))


def _scale(m: nn.Module) -> Tensor:
    """The channel factors of batch norm in eval mode, or of Normalize: [C]."""
    if type(m) is Normalize:
        return 1 / m.std.flatten()
    factor = (m.running_var + m.eps).rsqrt()
    return factor if m.weight is None else m.weight * factor


def _linear(m: nn.Module, x: Tensor, f: Callable[[Tensor], Tensor] = lambda w: w) -> Tensor:
    """An affine layer without its constant and with f of its weights, such as their modulus."""
    if type(m) is nn.Conv2d:
        return F.conv2d(x, f(m.weight), None, m.stride, m.padding, m.dilation, m.groups)
    if type(m) is nn.Linear:
        if x.dim() != 2:
            raise NotImplementedError(f"Linear on {x.dim()} dimensions; put a Flatten before it")
        return F.linear(x, f(m.weight))
    if type(m) in _DIAGONAL:
        return x * f(_scale(m)).view(-1, *[1] * (x.dim() - 2))
    return m(x)  # pools and Flatten: weights >= 0, no constant


def _windows(m: nn.MaxPool2d, x: Tensor, fill: float) -> Tensor:
    """The windows of a max-pool: [N,C,H,W] -> [N,C,k²,L]."""
    (p, q), kernel = _pair(m.padding), _pair(m.kernel_size)
    patches = F.unfold(F.pad(x, (q, q, p, p), value=fill), kernel, stride=_pair(m.stride))
    return patches.view(len(x), x.shape[1], -1, patches.shape[2])


def _pair(v: int | Sequence[int]) -> tuple[int, int]:
    return (v, v) if isinstance(v, int) else tuple(v)


# ---- Global: |S(x) - S(y)| <= L ‖x - y‖ for all x, y.


def conv_norm(
    weight: Tensor,
    hw: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> float:
    """An upper bound on the spectral norm of a zero-padded convolution of hw images, sound.

    Extend the image by zeros to a torus of at least hw + 2 padding: no window that is kept wraps,
    so the convolution is the circular one between an extension and a restriction, both of norm 1.
    That one is block-diagonal in Fourier space (Sedghi et al. 2019), a stride s putting s² blocks
    side by side. (On a torus of size hw it would be no upper bound: [1, -1] on 3 pixels.)
    Raises ValueError for a weight that is not a finite [c_out, c_in / groups, k, k].
    """
    if weight.dim() != 4 or len(weight) % groups or not weight.isfinite().all():
        raise ValueError(f"need a finite weight [c_out,c_in/groups,k,k], got {list(weight.shape)}")
    w, sizes = weight.detach().double(), []
    size = w.abs().max().clamp(min=1e-300)  # divided out, for squares neither vanish nor overflow
    pairs = map(_pair, (hw, stride, padding, dilation))
    for k, n, s, p, d in zip(w.shape[2:], *pairs, strict=True):
        n = s if k == 1 else max(n + 2 * p, d * (k - 1) + 1)  # 1×1: all frequencies are alike
        sizes.append((s, -(-n // s)))
    (s1, m1), (s2, m2) = sizes
    d1, d2 = _pair(dilation)
    spread = w.new_zeros(*w.shape[:2], d1 * (w.shape[2] - 1) + 1, d2 * (w.shape[3] - 1) + 1)
    spread[..., ::d1, ::d2] = w / size
    k_hat = torch.fft.fft2(spread, s=(s1 * m1, s2 * m2))
    k_hat = k_hat.view(groups, len(w) // groups, -1, s1, m1, s2, m2)[..., : m2 // 2 + 1]  # conj.
    blocks = k_hat.permute(4, 6, 0, 1, 2, 3, 5).flatten(4)
    tall = blocks.shape[-2] > blocks.shape[-1]
    gram = blocks.mH @ blocks if tall else blocks @ blocks.mH
    largest = torch.linalg.eigvalsh(gram)[..., -1].max().clamp(min=0) / (s1 * s2)
    return (size * largest.sqrt()).item() * _UP


def _split(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(t w, t' v) with 1/t² + 1/t'² = 1, so that two 1-Lipschitz maps over them make one."""
    rho = (v.norm() / w.norm()).nan_to_num(1.0).clamp(1e-6, 1e6)  # any rho > 0 is sound
    return w * (1 + rho).sqrt(), v * (1 + 1 / rho).sqrt()


def _weigh(m: nn.Module, x: Tensor, w: Tensor, after: nn.Module | None) -> tuple[Tensor, bool]:
    """w after a convolution or linear layer; True if the batch norm `after` it is in it already.

    Its factors s go into this layer's weight (a = 1) or, since they commute with ReLU, into w
    (a = 0): the smaller result counts.
    """
    weight = m.weight if m.weight.dim() == 4 else m.weight[:, :, None, None]
    conv = type(m) is nn.Conv2d
    options = (m.stride, m.padding, m.dilation, m.groups) if conv else ()
    groups, hw = (m.groups, x.shape[2:]) if conv else (1, 1)
    w_in = w.view(groups, 1, -1).expand(-1, len(weight) // groups, -1).flatten(0, 1)
    weight = weight * w_in[:, :, None, None]
    fold = type(after) in _DIAGONAL
    s = _scale(after).abs() if fold else w.new_ones(len(weight))
    exponents = (0.0, 1.0) if fold else (0.0,)
    norms = [conv_norm(weight * (s**a)[:, None, None, None], hw, *options) for a in exponents]
    folds = [norm * s ** (1 - a) for norm, a in zip(norms, exponents, strict=True)]
    return min(folds, key=lambda v: v.norm().item()), fold


def _propagate(steps: list[nn.Module], x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """x and the channel weights w [C] after the steps: the map is diag(w) · (a 1-Lipschitz one).

    That w stays through ReLU, whose Jacobian is diagonal too, is what makes the bound tight.
    """
    folded = False
    for m, after in zip(steps, [*steps[1:], None], strict=False):
        if type(m) in (Residual, Concat):
            y, w_body = _propagate(_steps(m.body), x, w)
            z, w_skip = _propagate(_steps(m.shortcut), x, w) if type(m) is Residual else (x, w)
            w_skip, w_body = _split(w_skip, w_body)
            x = z + y if type(m) is Residual else torch.cat([z, y], 1)
            w = torch.hypot(w_skip, w_body) if type(m) is Residual else torch.cat([w_skip, w_body])
            continue
        if type(m) in (nn.Conv2d, nn.Linear):
            w, folded = _weigh(m, x, w, after)
        elif type(m) in _DIAGONAL:
            w, folded = (w, False) if folded else (w * _scale(m).abs(), False)
        elif type(m) is nn.AvgPool2d:
            kernel = w.new_ones(1, 1, *_pair(m.kernel_size))
            w = w * conv_norm(kernel / kernel.numel(), x.shape[2:], m.stride, m.padding)
        elif type(m) is nn.AdaptiveAvgPool2d:
            w = w / x[0, 0].numel() ** 0.5
        elif type(m) is nn.MaxPool2d:  # a pixel is in so many windows
            windows = zip(_pair(m.kernel_size), _pair(m.stride), strict=True)
            w = w * math.prod(-(-k // s) for k, s in windows) ** 0.5
        elif type(m) is nn.Flatten:
            w = w.repeat_interleave(x[0, 0].numel())
        x = _linear(m, x) if type(m) in _AFFINE else m(x)
    return x, w


@torch.no_grad()
def lipschitz_global(net: nn.Module, shape: Sequence[int]) -> float:
    """An upper bound on the Lipschitz constant of S on inputs of shape (C,H,W) or (D,), sound.

    Layer by layer (see `_propagate`); at the end ∇S = -Wᵀp · ∇h is a convex combination of rows of
    the last layer W, so ‖∇S‖ <= max_i ‖W_i‖ · L_h. Useful for a few layers, vacuous for deep
    networks: on the paper's, untrained, it exceeds ‖∇S‖ by five (ResNet-18) to forty powers of ten.
    Raises ValueError in training mode, NotImplementedError for a layer that it does not know.
    """
    steps = _exact(net)
    x = next(iter(net.parameters()), torch.zeros(())).new_zeros(1, *shape, dtype=torch.float64)
    last = steps.pop() if steps and type(steps[-1]) is nn.Linear else None
    x, w = _propagate(steps, x, x.new_ones(shape[0]))
    if x.dim() != 2:
        raise ValueError(f"the network returns {list(x.shape)}, not logits [N,K]")
    return (w if last is None else (last.weight * w).norm(dim=1)).max().item() * _UP


# ---- Inside the linear region, where f(x + u) = z + A u and S(x + u) = -LSE(z + A u) is concave.


class Region(NamedTuple):
    """Logits z [K], their Jacobian A [K,D], and the radius ε̂ within which it does not change."""

    z: Tensor
    A: Tensor
    eps_hat: float


@torch.no_grad()
def linear_region(net: nn.Module, x: Tensor, chunk: int = 256) -> Region:
    """The linear region of one input (Section 5): f(x + u) = z + A u for all ‖u‖ <= ε̂, sound.

    With the activation pattern of x, all pre-activations are affine, a_j + g_j·u, as is each gap of
    a max-pool's winner to a rival; so the pattern holds where they keep their signs, and ε̂ =
    min_j |a_j| / ‖g_j‖ is the exact radius of that cell. x [C,H,W] or [D], or a batch of one; g_j
    comes from pushing the D unit vectors through the network, `chunk` at once.
    """
    steps = _exact(net)
    x = x.detach().double()
    _check_finite(x=x)
    x = x if x.dim() in (2, 4) else x[None]
    if len(x) != 1:
        raise ValueError(f"the linear region is that of one input, got {len(x)}")
    columns, squares = [], 0
    for unit in torch.eye(x.numel(), dtype=x.dtype, device=x.device).split(chunk):
        kinks: list[tuple[Tensor, Tensor]] = []
        z, g = _tangent(steps, x, unit.view(-1, *x.shape[1:]), kinks)
        columns.append(g)
        squares = squares + torch.cat([s for _, s in kinks]) if kinks else None
    A, eps_hat = torch.cat(columns).T, math.inf
    if kinks:
        a, norm = torch.cat([a for a, _ in kinks]), squares.sqrt()
        # g_j = 0: constant on the cell, so it is no boundary of it.
        eps_hat = torch.where(norm > 0, a.abs() / norm, math.inf).min().item()
    return Region(z[0], A, eps_hat)


def _tangent(
    steps: list[nn.Module], a: Tensor, g: Tensor, kinks: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The value a [1,...] and directional derivatives g [n,...] after the steps.

    To kinks go what may not change its sign, and the sum of squares of its derivatives, flat.
    """
    for m in steps:
        if type(m) in _AFFINE:
            a, g = m(a), _linear(m, g)
        elif type(m) is nn.MaxPool2d:
            v, h, shape = _windows(m, a, -math.inf), _windows(m, g, 0.0), m(a).shape[1:]
            top, winner = v.max(2, keepdim=True)
            h_top = h.gather(2, winner.expand(len(h), -1, -1, -1))
            gap = (top - v).scatter(2, winner, math.inf)
            kinks.append((gap.flatten(), (h_top - h).square().sum(0).flatten()))
            a, g = top.view(1, *shape), h_top.view(-1, *shape)
        elif type(m) is Concat:
            b, h = _tangent(_steps(m.body), a, g, kinks)
            a, g = torch.cat([a, b], 1), torch.cat([g, h], 1)
        elif type(m) is Residual:
            b, h = _tangent(_steps(m.body), a, g, kinks)
            a, g = _tangent(_steps(m.shortcut), a, g, kinks)
            a, g = a + b, g + h
        else:
            kinks.append((a.flatten(), g.square().sum(0).flatten()))
            g = torch.where(a > 0, g, g * getattr(m, "negative_slope", 0.0))
            a = m(a)
    return a, g


@torch.enable_grad()
def id_radius(z: Tensor, A: Tensor, gamma: float, steps: int = 0) -> float:
    """A radius within which -LSE(z + A u) <= γ; 0 if u = 0 is not ID. Cap it by ε̂. Sound.

    With steps = 0 the paper's Eq. (4) with L_S = ‖∇S‖: (γ - S) / ‖∇S‖. That is the case q =
    softmax(z) of a bound for every q in the simplex: by Fenchel's inequality LSE(v) >= q·v + H(q),
    so that -LSE(z + A u) <= γ while ‖u‖ <= (γ + q·z + H(q)) / ‖Aᵀq‖. With steps > 0 it is raised
    over q by gradient ascent; its maximum is exact. Raises ValueError for NaN or infinity.
    """
    z, A = z.detach().double(), A.detach().double()
    _check_finite(z=z, A=A, gamma=gamma)
    theta, radius = z.clone().requires_grad_(), 0.0
    if gamma + torch.logsumexp(z, 0) <= 0:
        return radius
    optimiser = torch.optim.Adam([theta], lr=0.1, maximize=True)
    for _ in range(steps + 1):
        log_q = theta.log_softmax(0)
        q = log_q.exp()
        height, slope = gamma + (q * (z - log_q)).sum(), (q @ A).norm()
        r = height / slope
        if not r > 0:
            break
        radius = max(radius, r.item())
        if radius == math.inf:
            break
        optimiser.zero_grad()
        r.log().backward()
        optimiser.step()
    return radius


def ood_radius(z: Tensor, A: Tensor, gamma: float) -> float:
    """A radius within which -LSE(z + A u) >= γ; 0 if u = 0 is not OOD. Cap it by ε̂. Sound.

    Not |γ - S| / ‖∇S‖: for A = [[3], [-3]], z = 0 the gradient vanishes, yet S falls on both sides.
    The best of: the largest r with LSE(z_i + r ‖A_i‖) <= -γ (> m / max_i ‖A_i‖ with m = S - γ);
    and the r at which S - r ‖∇S‖ - R² r² / 8 = γ, R = max_ij ‖A_i - A_j‖: by Hoeffding's lemma,
    LSE(z + v) - LSE(z) = log E_p e^v <= p·v + (max v - min v)² / 8 with p = softmax(z).
    """
    z, A = z.detach().double(), A.detach().double()
    _check_finite(z=z, A=A, gamma=gamma)
    m, a = (-torch.logsumexp(z, 0) - gamma).item(), A.norm(dim=1)
    if m <= 0:
        return 0.0
    if a.max() == 0:
        return math.inf
    low, high = m / a.max().item(), ((-gamma - z) / a).min().item()
    for _ in range(60):
        r = (low + high) / 2
        low, high = (r, high) if torch.logsumexp(z + r * a, 0) <= -gamma else (low, r)
    g = (z.softmax(0) @ A).norm().item()
    R = torch.cdist(A, A, compute_mode="donot_use_mm_for_euclid_dist").max().item()
    root = g + math.sqrt(g * g + R * R * m / 2)
    return max(low, 2 * m / root) if root else math.inf


# ---- Local: |S(x + u) - S(x)| <= L ‖u‖ for ‖u‖ <= ε, by intervals forward and backward.


class _Gate(torch.autograd.Function):
    """The interval given, and back, cotangent interval times derivative interval [low, high] >= 0.

    An interval is a pair centre c, radius r, and so is its cotangent: for affine layers autograd
    then turns (c, r) -> (W c, |W| r) into (g_c, g_r) -> (Wᵀ g_c, |W|ᵀ g_r), the interval gradient.
    """

    @staticmethod
    def forward(ctx, c, r, out_c, out_r, low, high):
        ctx.save_for_backward(low, high)
        return out_c, out_r

    @staticmethod
    def backward(ctx, g_c, g_r):
        low, high = ctx.saved_tensors
        a, b = g_c - g_r, g_c + g_r
        a, b = torch.minimum(a * low, a * high), torch.maximum(b * low, b * high)
        return (a + b) / 2, (b - a) / 2, None, None, None, None


def _box(steps: list[nn.Module], c: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Intervals [c - r, c + r] after the steps, each [N,...]."""
    for m in steps:
        low, high = c - r, c + r
        if type(m) in _AFFINE:
            c, r = m(c), _linear(m, r, torch.abs)
        elif type(m) is nn.MaxPool2d:
            shape = m(c).shape
            low, high = _windows(m, low, -math.inf), _windows(m, high, -math.inf)
            c, r = _windows(m, c, 0.0), _windows(m, r, 0.0)
            bottom, top = (v.amax(2, keepdim=True).detach() for v in (low, high))
            may_win = (high >= bottom).to(c.dtype)
            wins = may_win * (may_win.sum(2, keepdim=True) == 1)
            c, r = _Gate.apply(c, r, (bottom + top) / 2, (top - bottom) / 2, wins, may_win)
            c, r = c.view(shape), r.view(shape)
        elif type(m) is Concat:
            b, h = _box(_steps(m.body), c, r)
            c, r = torch.cat([c, b], 1), torch.cat([r, h], 1)
        elif type(m) is Residual:
            b, h = _box(_steps(m.body), c, r)
            c, r = _box(_steps(m.shortcut), c, r)
            c, r = c + b, r + h
        else:
            slope = c.new_full((), getattr(m, "negative_slope", 0.0))
            slopes = [torch.where(v, slope.new_ones(()), slope) for v in (low > 0, high >= 0)]
            bottom, top = m(low).detach(), m(high).detach()
            c, r = _Gate.apply(c, r, (bottom + top) / 2, (top - bottom) / 2, *slopes)
    return c, r


@torch.enable_grad()
def lipschitz_local(net: nn.Module, x: Tensor, eps: float | Tensor) -> Tensor:
    """L [N] such that S is L-Lipschitz on B(x_i, eps_i): x [N,...], eps a number or [N]. Sound.

    Intervals contain every activation on the ball (the first layer's exactly), hence every
    derivative of ReLU, hence, backward, every gradient of S, whose norm bounds S by the mean value
    theorem for locally Lipschitz functions. Tends to ‖∇S(x)‖ as eps -> 0: the paper's argument as
    a theorem. Infinite where the intervals overflow, as they do in deep networks.
    """
    steps = _exact(net)
    x = x.detach().double().requires_grad_()
    _check_finite(x=x)
    eps = torch.as_tensor(eps, dtype=x.dtype, device=x.device).expand(len(x))
    if not (eps >= 0).all():
        raise ValueError("eps must be >= 0")
    zero = torch.zeros_like(x, requires_grad=True)
    c, r, axes = x, zero, eps.square().view(-1, *[1] * (x.dim() - 1)).expand_as(x)
    while steps and type(steps[0]) in (*_DIAGONAL, nn.Flatten, nn.Conv2d, nn.Linear):
        m = steps.pop(0)  # an ellipsoid while the layers are diagonal; one more gives the exact box
        c, r, axes = m(c), _linear(m, r, torch.abs), _linear(m, axes, torch.square)
        if type(m) in (nn.Conv2d, nn.Linear):
            break
    c, r = _box(steps, c, r + axes.sqrt())
    low, high = _softmax_bounds((c - r).detach(), (c + r).detach())
    g_c, g_r = torch.autograd.grad((c, r), (x, zero), ((low + high) / 2, (high - low) / 2))
    bound = (g_c.abs() + g_r).flatten(1).norm(dim=1) * _UP
    finite = c.isfinite().all(1) & r.isfinite().all(1) & bound.isfinite()
    return torch.where(finite, bound, math.inf).detach()


def _softmax_bounds(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds on softmax(z)_i for low <= z <= high: z_i at one end, the rest at the other."""

    def others(v: Tensor) -> Tensor:
        own = torch.eye(v.shape[1], dtype=torch.bool, device=v.device)
        return v[:, None].expand(-1, v.shape[1], -1).masked_fill(own, -math.inf).logsumexp(2)

    return (low - others(high)).sigmoid(), (high - others(low)).sigmoid()


def score_bounds(
    net: nn.Module, x: Tensor, eps: float, lipschitz: float = math.inf
) -> tuple[Tensor, Tensor]:
    """Bounds [N] below and above S on B(x_i, eps): S(x) ∓ ε min(L_global, L_local). Sound.

    FPR95 and AUROC of (s_in, lower bounds of s_out) are then guaranteed: no perturbation of the
    OOD inputs by eps makes the detector worse. lipschitz: what `lipschitz_global` returned.
    """
    if not lipschitz >= 0:
        raise ValueError(f"a Lipschitz constant is not negative, got {lipschitz}")
    s = _exact_scores(net, x)
    change = eps * lipschitz_local(net, x, eps).clamp(max=lipschitz) * _UP
    return s - change, s + change


@torch.no_grad()
def _exact_scores(net: nn.Module, x: Tensor) -> Tensor:
    _check_finite(x=x)
    return energy_score(nn.Sequential(*_exact(net))(x.double()))


class Certificate(NamedTuple):
    """Radius [N], side ("ID" or "OOD") and bound of each input; radii of all bounds, by name."""

    radius: Tensor
    side: list[str]
    bound: list[str]
    radii: dict[str, Tensor]


def certify(
    net: nn.Module,
    x: Tensor,
    gamma: float,
    lipschitz: float | None = None,
    regions: bool = True,
    id_steps: int = 100,
) -> Certificate:
    """The largest sound radius within which the decision S <= γ on each x [N,...] does not change.

    Bounds: "global" (`lipschitz_global`, or pass it), "local" (`lipschitz_local`) and, if regions,
    "region" (`linear_region`; costs D directions an input, so leave it out for images).
    """
    s = _exact_scores(net, x)
    if lipschitz is None:
        lipschitz = lipschitz_global(net, x.shape[1:])
    radii = {"global": certified_radius(s, gamma, lipschitz), "local": _local_radius(net, x, gamma)}
    if regions:
        cells = [linear_region(net, v[None]) for v in x]
        inside = [
            id_radius(c.z, c.A, gamma, id_steps) if v <= gamma else ood_radius(c.z, c.A, gamma)
            for c, v in zip(cells, s, strict=True)
        ]
        radii["region"] = s.new_tensor(
            [min(c.eps_hat, r) for c, r in zip(cells, inside, strict=True)]
        )
    radii = {name: r * _DOWN for name, r in radii.items()}
    radius, best = torch.stack(list(radii.values())).max(0)
    names = list(radii)
    side = ["ID" if v <= gamma else "OOD" for v in s.tolist()]
    return Certificate(radius, side, [names[i] for i in best.tolist()], radii)


def _local_radius(net: nn.Module, x: Tensor, gamma: float, points: int = 32) -> Tensor:
    """r [N] at which ∫₀ʳ L(t) dt reaches |γ - S(x)|, L(t) being `lipschitz_local` on B(x, t).

    Sound: S changes by at most that along a ray; and L grows with t, so that on each cell of a grid
    its value at the far end is a bound.
    """
    margin = (_exact_scores(net, x) - gamma).abs()
    top = certified_radius(margin, 0.0, lipschitz_local(net, x, 0.0)).clamp(max=1e3)
    grid = torch.logspace(-9, 0, points).to(margin)[:, None] * top
    width = grid.diff(dim=0, prepend=torch.zeros_like(grid[:1]))
    slope = lipschitz_local(net, x.repeat(points, *[1] * (x.dim() - 1)), grid.flatten()).view_as(
        grid
    )
    spent = torch.cat([torch.zeros_like(margin)[None], (slope * width).cumsum(0)[:-1]])
    return ((margin - spent).clamp(min=0) / slope).nan_to_num(0.0).minimum(width).sum(0)


# ---- Randomised smoothing: the only certificate that says something on the paper's networks.


def _binomial_lower(k: Tensor, n: int, alpha: float) -> Tensor:
    """Clopper-Pearson: the largest p (to 1e-9, from below) with P(Bin(n, p) >= k) <= alpha."""
    j = torch.arange(n + 1, dtype=torch.float64, device=k.device)
    log_choose = math.lgamma(n + 1) - torch.lgamma(j + 1) - torch.lgamma(n - j + 1)
    values, index = k.unique(return_inverse=True)
    log_choose = log_choose.where(j >= values[:, None], -math.inf)
    low, high = torch.zeros_like(values, dtype=torch.float64), values.double() / n
    for _ in range(60):
        p = ((low + high) / 2)[:, None].clamp(1e-300, 1 - 1e-16)
        tail = torch.logsumexp(log_choose + j * p.log() + (n - j) * (-p).log1p(), 1)
        ok = tail <= math.log(alpha)
        low, high = torch.where(ok, p[:, 0], low), torch.where(ok, high, p[:, 0])
    return torch.where(values == 0, 0.0, low * _DOWN)[index]


@torch.no_grad()
def noisy_scores(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    sigma: float,
    n: int,
    generator: torch.Generator | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Scores of x [N,...] under n draws of N(0, σ²) noise: [N,n]. Their medians: the smoothed S."""
    rows, size = [], max(1, chunk // len(x))
    for i in range(0, n, size):
        shape = min(size, n - i), *x.shape
        noise = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
        rows.append(score((x + sigma * noise).flatten(0, 1)).view(shape[:2]))
    return torch.cat(rows).T


def smoothed_radius(s: Tensor, gamma: float, sigma: float, alpha: float = 0.001) -> Tensor:
    """Signed radius [N] of the smoothed detector from its `noisy_scores` s [N,n]; -R: ID within R.

    Low means ID here too, so that radii can be ranked and thresholded as scores are.

    The smoothed detector says ID iff P(S(x + σZ) <= γ) > 1/2. If p̲ > 1/2 bounds that probability
    from below, it says ID within R = σ Φ⁻¹(p̲) (Cohen et al. 2019, by the Neyman-Pearson lemma);
    for OOD in the same way: +R. With p̲ of Clopper-Pearson at alpha / 2 for either side, a radius is
    too large with probability at most alpha for each input. 0: undecided. γ must not come from s.
    """
    n = s.shape[1]
    if not 0 < alpha < 1 or not sigma > 0 or n == 0 or s.isnan().any() or math.isnan(gamma):
        raise ValueError("need 0 < alpha < 1, sigma > 0, n > 0, and no NaN in scores or gamma")
    k = (s <= gamma).sum(1)
    low, high = (_binomial_lower(v, n, alpha / 2).clamp(min=0.5) for v in (k, n - k))
    return sigma * (torch.special.ndtri(high) - torch.special.ndtri(low))


def smoothing_radius(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    gamma: float,
    sigma: float,
    n: int = 1000,
    alpha: float = 0.001,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Signed certified ℓ2 radius [N] of the smoothed detector (`smoothed_radius`), -R: ID within R.

    score: any function [M,...] -> [M]. This certifies another detector than S: choose γ on smoothed
    scores (medians of `noisy_scores`), and report its clean FPR95 and AUROC too.
    """
    return smoothed_radius(noisy_scores(score, x, sigma, n, generator), gamma, sigma, alpha)


# ---- Attacks: upper bounds on the same radii.


def _size(u: Tensor, norm: str) -> Tensor:
    """‖u_i‖ in ℓ2 or ℓ∞, in float64: [N]."""
    return torch.linalg.vector_norm(
        u.flatten(1).double(), ord={"l2": 2, "linf": math.inf}[norm], dim=1
    )


def _direction(g: Tensor, norm: str) -> Tensor:
    """The u with ‖u‖ = 1 that raises g·u most."""
    return g.sign() if norm == "linf" else F.normalize(g.flatten(1), dim=1, eps=1e-30).view_as(g)


@torch.enable_grad()
def attack_scores(
    net: nn.Module,
    x: Tensor,
    eps: float | Tensor,
    sign: float | Tensor,
    norm: str = "l2",
    steps: int = 20,
    restarts: int = 2,
    clamp: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The x' within eps of x with the largest sign·S found, and S(x') [N], by projected gradients.

    sign +1 makes ID look OOD, -1 OOD look ID. PGD on S = -LSE, not on a softmax that saturates;
    the first start is x, others are random; steps shrink linearly from eps / 2, in every other
    restart from 2 eps, since a long step on a rough S leads nowhere. An x' counts if
    ‖x' - x‖ as computed from the rounded x' is at most eps; clamp=(0, 1) keeps images images.
    Raises ValueError unless norm is "l2" or "linf", and in training mode, where S is no function.
    """
    if norm not in ("l2", "linf") or steps < 1 or restarts < 1:
        raise ValueError(f'need norm "l2" or "linf", steps and restarts >= 1; got {norm!r}')
    if any(m.training for m in net.modules()):
        raise ValueError("attacks are on the network in eval mode; call net.eval() first")
    x = x.detach()
    ones = [1] * (x.dim() - 1)
    exact_eps = torch.as_tensor(eps, dtype=torch.float64, device=x.device).expand(len(x))
    eps = exact_eps.to(x.dtype)
    sign = torch.as_tensor(sign, dtype=x.dtype, device=x.device).expand(len(x))
    limit = (eps * (1 - 1e-4)).view(-1, *ones)  # rounding x' must not lead out of the ball
    worst, s_worst = x, energy_score(net(x)).detach()
    for restart in range(restarts):
        u = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        u = _direction(u, norm) * limit * (restart > 0)
        for t in range(steps + 1):
            if norm == "linf":
                near = x + u.clamp(-limit, limit)
            else:
                near = x + u * (limit / _size(u, norm).view_as(limit).clamp(min=1e-30)).clamp(max=1)
            near = (near if clamp is None else near.clamp(*clamp)).to(x.dtype).requires_grad_()
            s = energy_score(net(near))
            (g,) = torch.autograd.grad((sign * s).sum(), near)
            near, s = near.detach(), s.detach()
            better = (sign * s > sign * s_worst) & (_size(near - x, norm) <= exact_eps)
            worst = torch.where(better.view(-1, *ones), near, worst)
            s_worst = torch.where(better, s, s_worst)
            step = 2 * 4.0 ** (restart % 2 - 1) * (1 - t / (steps + 1))
            u = near - x + step * limit * _direction(g, norm)
    return worst, s_worst


class Attack(NamedTuple):
    """Inputs x' found, their scores, whether the decision flipped, ‖x' - x‖ (inf if it did not)."""

    x: Tensor
    s: Tensor
    flipped: Tensor
    distance: Tensor


def attack(
    net: nn.Module, x: Tensor, gamma: float, eps: float | Tensor, norm: str = "l2", **options
) -> Attack:
    """PGD on S toward the wrong side of γ within eps; options as for `attack_scores`.

    A flip is verified on the x' returned; a failed attack proves nothing.
    """
    with torch.no_grad():
        ood = energy_score(net(x)) > gamma
    near, s = attack_scores(net, x, eps, 1 - 2.0 * ood, norm, **options)
    flipped = (s > gamma) != ood
    return Attack(near, s, flipped, torch.where(flipped, _size(near - x, norm), math.inf))


def attack_distance(
    net: nn.Module,
    x: Tensor,
    gamma: float,
    eps: float,
    rounds: int = 12,
    norm: str = "l2",
    **options,
) -> Tensor:
    """The smallest ‖x' - x‖ of a verified flip, by bisection over (0, eps]: [N], inf if none."""
    best = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    low, high = torch.zeros_like(best), torch.full_like(best, eps)
    for i in range(rounds):
        middle = high if i == 0 else (low + high) / 2
        found = attack(net, x, gamma, middle, norm, **options)
        best = torch.minimum(best, found.distance)
        low = torch.where(found.flipped, low, middle)
        high = torch.where(found.flipped, torch.minimum(middle, best), high)
    return best


# ==================================================================================================
# 5  Post-hoc scores (Section 2.1), low = ID
# Needs: Net (1), energy_score (2)
# ==================================================================================================


def _probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)


def msp(logits: Tensor) -> Tensor:
    """Maximum softmax probability (Hendrycks & Gimpel 2017), negated: [N,K] -> [N]."""
    return -_probabilities(logits).amax(1)


def absent(logits: Tensor) -> Tensor:
    """Probability of the last, "absent" class of a K+1 head (Chen et al. 2021): [N,K+1] -> [N]."""
    return _probabilities(logits)[:, -1]


def odin(
    net: Callable[[Tensor], Tensor],
    x: Tensor,
    T: float = 1000.0,
    eps: float = 0.0014,
    std: Sequence[float] = (1.0,),
) -> Tensor:
    """ODIN (Liang et al. 2018): x [N,C,H,W] normalised -> [N].

    MSP at temperature T of x moved by eps, in [0,1] pixels (so eps / std in the units of x), in
    the direction that raises the predicted class's probability.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        f = net(x) / T
        (g,) = torch.autograd.grad(F.cross_entropy(f, f.argmax(1), reduction="sum"), x)
    step = eps / torch.tensor(std, dtype=x.dtype, device=x.device).view(1, -1, *[1] * (x.dim() - 2))
    with torch.no_grad():
        f = net(x - step * torch.where(g < 0, -1.0, 1.0).to(x.dtype))
        return msp(f.double() / T)  # at T = 1000, float32 would make ties


def percentile(v: Tensor, p: float) -> Tensor:
    """NumPy's (linear) percentile p of all entries, a scalar in float64.

    torch.quantile refuses more than 16 M entries, and sorting 25 M takes ten times as long.
    """
    v, position = v.flatten(), p / 100 * (v.numel() - 1)
    low = math.floor(position)
    a, b = (v.kthvalue(min(i, v.numel())).values.double() for i in (low + 1, low + 2))
    return a + (position - low) * (b - a)


def react(z: Tensor, W: Tensor, b: Tensor, clip: Tensor | float) -> Tensor:
    """ReAct (Sun et al. 2021): energy score of the features clipped from above; z [N,d] -> [N]."""
    return energy_score(z.clamp(max=clip) @ W.mT + b)


def dice(z: Tensor, W: Tensor, b: Tensor, mask: Tensor, clip: Tensor | float = math.inf) -> Tensor:
    """DICE (Sun & Li 2022): energy score through the masked head; with a clip, on top of ReAct."""
    return react(z, W * mask, b, clip)


def dice_mask(z_mean: Tensor, W: Tensor, p: float) -> Tensor:
    """The contributions W ⊙ E[h(x)] above their p-th percentile: z_mean [d], W [K,d] -> [K,d]."""
    V = W * z_mean
    return V > percentile(V, p)


class Line(NamedTuple):
    """What LINe knows of the classes: contributions s [K,d] and two thresholds for each class."""

    s: Tensor
    activation: Tensor
    weight: Tensor

    def mask(self, W: Tensor, c: int) -> Tensor:
        """Class c's weight mask with its activation mask on the columns: [K,d]."""
        return (self.s[c].abs() * W > self.weight[c]) & (self.s[c] > self.activation[c])


def line_fit(z_class: Tensor, W: Tensor, p_a: float, p_w: float) -> Line:
    """LINe's contributions and thresholds from the class means z_class [K,d] of E[h | y = c].

    The contribution of a feature to class c, E[h_j ∂f_c/∂h_j | y = c] (first-order Shapley), is
    W_c ⊙ E[h | y = c] for a linear head: no backward pass for each sample.
    """
    s = W * z_class
    activation = torch.stack([percentile(s_c, p_a) for s_c in s])
    return Line(s, activation, torch.stack([percentile(s_c.abs() * W, p_w) for s_c in s]))


def line(z: Tensor, W: Tensor, b: Tensor, fit: Line, clip: Tensor | float) -> Tensor:
    """LINe (Ahn et al. 2023): DICE and ReAct with the predicted class's mask; z [N,d] -> [N].

    One class at a time, so that no K×K×d tensor is needed.
    """
    predicted = (z.clamp(max=clip) @ W.mT + b).argmax(1)
    s = z.new_empty(len(z), dtype=torch.promote_types(z.dtype, torch.float32))
    for c in predicted.unique().tolist():
        rows = predicted == c
        s[rows] = dice(z[rows], W, b, fit.mask(W, c), clip)
    return s


class PostHoc(NamedTuple):
    """Hyper-parameters of the post-hoc scores."""

    T: float = 1000.0  # ODIN, its paper
    eps: float = 0.0014  # ODIN, its paper: DenseNet on CIFAR-10; the GReg release: everywhere
    react_p: float = 90.0  # percentile of the ID activations; ReAct, its paper
    react_clip: float | None = None  # a fixed clip in its place
    dice_p: float = 90.0  # DICE, its scripts for CIFAR
    line_a: float = 90.0  # activation mask; LINe, its scripts: DenseNet on CIFAR-10
    line_w: float = 90.0  # weight mask, likewise
    line_clip: float = 1.0  # likewise


# By ID data, or by ID data and network. The paper says nothing of these. No source has LINe on
# ResNet-18 or WRN: they take DenseNet's values. On ImageNet DICE and LINe publish ResNet-50 alone,
# with all 1,000 classes: DenseNet-121 with ten takes these (with ReAct, DICE's authors keep nine
# tenths of the weights there; here DICE + ReAct has DICE's mask). ReAct has no CIFAR network but
# ResNet-18; on DenseNet-BC, most of whose features are near zero, its percentile clips nearly all
# that is left (at 0.4, FPR95 on SVHN over 90 %): there the clip is LINe's, for the same checkpoint.
POST_HOC: dict[str | tuple[str, str], PostHoc] = {
    "cifar10": PostHoc(),
    ("cifar10", "wrn40_2"): PostHoc(eps=0.0006),  # ATOM's code; ODIN: 0.0005 to 0.0011 by OOD set
    ("cifar10", "densenet100"): PostHoc(react_clip=1.0),
    "cifar100": PostHoc(eps=0.0028, line_a=10.0),  # ODIN, LINe: DenseNet; ODIN has WRN around it
    ("cifar100", "densenet100"): PostHoc(eps=0.0028, line_a=10.0, react_clip=1.0),
    "imagenet": PostHoc(dice_p=70.0, line_a=10.0, line_w=10.0, line_clip=0.8),
}


def post_hoc(id: str, arch: str, K: int) -> PostHoc:
    """Hyper-parameters for ID data, network and class count; other data go by the class count."""
    id = id.partition(":")[0]
    known = id if id in POST_HOC else "cifar100" if K == 100 else "cifar10"
    return POST_HOC.get((known, arch), POST_HOC[known])


class Fit(NamedTuple):
    """The K-class head and what the post-hoc scores learn: one pass, no gradients."""

    p: PostHoc
    std: Sequence[float]
    W: Tensor
    b: Tensor
    clip: Tensor
    mask: Tensor
    line: Line


def fit_scores(
    net: Net,
    z: Tensor,
    y: Tensor,
    p: PostHoc,
    std: Sequence[float] = (1.0,),
    K: int | None = None,
) -> Fit:
    """Fit ReAct, DICE and LINe to training features z [N,d] (test transform) and labels y [N].

    Only the first K outputs count (default: all); an "absent" class has no training images.
    ReAct's percentile is of these features too; its code takes 2,000 validation images.
    Raises ValueError if a class has no sample or a feature is not finite.
    """
    W, b = net.fc.weight.detach()[:K], net.fc.bias.detach()[:K]
    one_hot = F.one_hot(y, len(W)).to(z.dtype)
    n = one_hot.sum(0)
    if (n == 0).any() or not z.isfinite().all():
        counts = n.long().tolist()
        raise ValueError(f"need finite training features of every class; {counts} per class")
    fitted = line_fit(one_hot.mT @ z / n[:, None], W, p.line_a, p.line_w)
    mask = dice_mask(z.mean(0), W, p.dice_p)
    clip = percentile(z, p.react_p) if p.react_clip is None else z.new_tensor(p.react_clip)
    return Fit(p, std, W, b, clip, mask, fitted)


# Score of (net, normalised images x, logits f of the K classes, features z, fit), each row by the
# name in --scores. Class K+1, where there is one, counts for "absent" alone.
SCORES: dict[str, Callable[[Net, Tensor, Tensor, Tensor, Fit], Tensor]] = {
    "msp": lambda net, x, f, z, fit: msp(f),
    "odin": lambda net, x, f, z, fit: odin(
        lambda v: net(v)[:, : f.shape[1]], x, fit.p.T, fit.p.eps, fit.std
    ),
    "energy": lambda net, x, f, z, fit: energy_score(f),
    "react": lambda net, x, f, z, fit: react(z, fit.W, fit.b, fit.clip),
    "dice": lambda net, x, f, z, fit: dice(z, fit.W, fit.b, fit.mask),
    "dice+react": lambda net, x, f, z, fit: dice(z, fit.W, fit.b, fit.mask, fit.clip),
    "line": lambda net, x, f, z, fit: line(z, fit.W, fit.b, fit.line, fit.p.line_clip),
    "absent": lambda net, x, f, z, fit: absent(net.fc(z)),
}
POST_HOC_ROWS = ("msp", "odin", "energy", "react", "dice", "dice+react", "line")
NEED_FIT = {"odin", "react", "dice", "dice+react", "line"}


# ==================================================================================================
# 6  Metrics (Section 6.1)
# Needs: nothing
# ==================================================================================================


def _checked(s: Tensor, name: str) -> Tensor:
    """Scores as a flat float64 tensor; empty or NaN is an error that names the set."""
    s = torch.as_tensor(s).detach().flatten().double()
    if len(s) == 0:
        raise ValueError(f"no {name} scores: a metric needs at least one sample on each side")
    if s.isnan().any():
        raise ValueError(f"{int(s.isnan().sum())} of {len(s)} {name} scores are NaN")
    return s


def threshold(s_in: Tensor, tpr: float = 0.95, name: str = "ID") -> float:
    """γ: the smallest value of s_in at or below which a share of at least tpr of s_in falls.

    Integer arithmetic (⌈tpr·n⌉-th smallest score), no interpolation: γ is a decision rule that
    `predict` can use. Raises ValueError for empty or NaN scores or tpr outside (0, 1].
    """
    s_in, share = _checked(s_in, name), Fraction(str(float(tpr)))
    if not 0 < share <= 1:
        raise ValueError(f"tpr must be in (0, 1], got {tpr}")
    return s_in.sort().values[math.ceil(share * len(s_in)) - 1].item()


def fpr_at_tpr(
    s_in: Tensor, s_out: Tensor, tpr: float = 0.95, names: tuple[str, str] = ("ID", "OOD")
) -> float:
    """FPR95 (Section 6.1): the share of OOD accepted, s <= γ, where γ accepts 95 % of ID.

    ID is positive and ties count against us, so that a constant score gives 1, not 0. Peers'
    rules: the released code takes the recall nearest to 95 % (it may be below), DOS and ReAct
    accept strictly (saturated scores look perfect), OpenOOD and pytorch-ood take OOD as positive.
    """
    return (_checked(s_out, names[1]) <= threshold(s_in, tpr, names[0])).double().mean().item()


def auroc(s_in: Tensor, s_out: Tensor, names: tuple[str, str] = ("ID", "OOD")) -> float:
    """P(s_in < s_out) + P(s_in = s_out) / 2: the Mann-Whitney statistic with exact counts."""
    s_in, s_out = _checked(s_in, names[0]), _checked(s_out, names[1]).sort().values
    below, not_above = (torch.searchsorted(s_out, s_in, right=r).sum() for r in (False, True))
    pairs = len(s_in) * len(s_out)
    return (2 * pairs - int(below) - int(not_above)) / (2 * pairs)


def aupr(s_pos: Tensor, s_neg: Tensor, names: tuple[str, str] = ("ID", "OOD")) -> float:
    """Average precision where low scores are positive: Σ (R_i - R_{i-1}) P_i over thresholds.

    It depends on the ratio of positives to negatives, so print both counts beside it.
    """
    s_pos, s_neg = _checked(s_pos, names[0]).sort().values, _checked(s_neg, names[1]).sort().values
    tp = torch.searchsorted(s_pos, s_pos, right=True).double()
    fp = torch.searchsorted(s_neg, s_pos, right=True).double()
    return (tp / (tp + fp)).mean().item()


def ood_metrics(s_in: Tensor, s_out: Tensor, name: str = "OOD") -> dict[str, float]:
    """All metrics of one OOD set, as fractions, with the counts that AUPR depends on."""
    s_in, s_out = _checked(s_in, "ID"), _checked(s_out, name)
    return {
        "fpr95": fpr_at_tpr(s_in, s_out),
        "auroc": auroc(s_in, s_out),
        "aupr_in": aupr(s_in, s_out),
        "aupr_out": aupr(-s_out, -s_in),
        "fpr95_ood_positive": fpr_at_tpr(-s_out, -s_in),  # what OpenOOD and pytorch-ood print
        "n_in": len(s_in),
        "n_out": len(s_out),
    }


# ==================================================================================================
# 7  Data (Section 6.1)
# Needs: nothing
# ==================================================================================================


class Images(NamedTuple):
    """A data set: x [N,H,W,3] uint8, y [N] int64 labels or None, its name, its classes' names."""

    x: Tensor | Files
    y: Tensor | None
    name: str
    classes: tuple[str, ...] = ()


Stats = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
STATS: dict[str, Stats] = {  # as the released code has them, but for "dice"
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": (_IMAGENET_MEAN, (0.229, 0.224, 0.225)),
    # ReAct, DICE and LINe trained their public CIFAR checkpoints, of 10 and of 100 classes, so:
    "dice": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


def normalise(x: Tensor, mean: Tensor | tuple, std: Tensor | tuple) -> Tensor:
    """[N,H,W,C] uint8 -> (x / 255 - mean) / std as [N,C,H,W] float32, contiguous."""
    on = {"dtype": torch.float32, "device": x.device}
    mean, std = (torch.as_tensor(v, **on).view(-1, 1, 1) for v in (mean, std))
    return x.permute(0, 3, 1, 2).contiguous().float().div_(255).sub_(mean).div_(std)


def augment(x: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Random crop of the zero-padded image, then a flip with p = 1/2: [N,H,W,C] uint8 -> same.

    One gather on the device of x. The generator may live elsewhere: with one on the CPU every
    device makes the same crops.
    """
    n, h, w, _ = x.shape
    on = {"generator": generator, "device": generator.device}
    dy, dx = torch.randint(2 * pad + 1, (2, n, 1), **on).to(x.device)
    flip = torch.randint(2, (n, 1), **on).to(x.device).bool()
    row, col = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    rows, cols = row + dy, torch.where(flip, w - 1 - col, col) + dx
    padded = F.pad(x, (0, 0, pad, pad, pad, pad))
    return padded[torch.arange(n, device=x.device)[:, None, None], rows[:, :, None], cols[:, None]]


def batch(
    x: Tensor,
    index: Tensor,
    mean: Tensor | tuple,
    std: Tensor | tuple,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Rows `index` of x [N,H,W,C] as normalised float [n,C,H,W] on a device.

    Only these rows are read and moved, so that x may be a memory-mapped file.
    """
    return normalise(x[index.to(x.device)].to(device, non_blocking=True), mean, std)


# The built-in benchmark: figures under random place, size, angle, colour, texture and noise.
_SHAPES = ("disc", "triangle", "square", "star", "cross")
_ID = _SHAPES + tuple("outlined " + shape for shape in _SHAPES)
_AUX = ("field", "blobs", "amoeba", "bar", "ramp", "checkers")
_OOD = ("crescents", "spirals", "strokes", "rays", "cells", "shards")
SYNTHETIC: dict[str, tuple[tuple[str, ...], int]] = {  # split -> its families, number of images
    "train": (_ID, 5000),
    "test": (_ID, 2000),
    "aux": (_AUX, 10000),
    **{family: ((family,), 1000) for family in _OOD},
}


def _star(r: Tensor, a: Tensor, tips: int, notch: float) -> Tensor:
    """A star with tips at radius 1 and notches at radius `notch`; cos(π / tips) is a polygon's."""
    half = math.pi / tips
    ex, ey = notch * math.cos(half) - 1, notch * math.sin(half)  # the edge from tip to notch
    a = (torch.remainder(a + half, 2 * half) - half).abs()
    return ((r * a.cos() - 1) * ey - r * a.sin() * ex) / math.hypot(ex, ey)


def _upsample(coarse: Tensor) -> Tensor:
    return F.interpolate(coarse, size=(32, 32), mode="bilinear")


def _distance(family: str, u: Tensor, v: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """Signed distance, negative inside, to a figure of radius about 1; u, v -> [n,32,32]."""
    r, a = torch.hypot(u, v), torch.atan2(v, u)
    match family:
        case "disc":
            return r - 0.85
        case "triangle":
            return _star(r, a, 3, 0.5)
        case "square":
            return _star(r, a, 4, math.sqrt(0.5))
        case "star":
            return _star(r, a, 5, 0.4)
        case "cross":
            long, short = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
            return torch.maximum(long - 0.95, short - 0.3)
        case "field":
            return _upsample(draw(-1, 1, 36).reshape(-1, 1, 6, 6))[:, 0]
        case "blobs":
            d = torch.hypot(u[:, None] - draw(-1, 1, 5), v[:, None] - draw(-1, 1, 5))
            return (d - draw(0.15, 0.45, 5)).amin(1)
        case "amoeba":
            bumps = (draw(-0.15, 0.15) * torch.cos(k * a + draw(0, 7)) for k in range(2, 7))
            return r - 0.7 - sum(bumps)
        case "bar":
            return torch.maximum(u.abs() - 1.2, v.abs() - draw(0.1, 0.3))
        case "ramp":
            return u * draw(0.02, 0.2)
        case "checkers":
            f = draw(3, 7)
            return torch.sin(u * f) * torch.sin(v * f) / f
        case "crescents":
            return torch.maximum(r - 0.85, 0.85 - torch.hypot(u + draw(0.35, 0.8), v))
        case "spirals":
            pitch = draw(0.6, 0.9)
            arm = (torch.remainder(r / pitch - a / (2 * math.pi), 1) - 0.5).abs() - 0.15
            return torch.maximum(arm * pitch, r - 1)
        case "strokes":
            ax, ay, bx, by = draw(-1, 1, 4, 3).unbind(1)
            dx, dy, pu, pv = bx - ax, by - ay, u[:, None] - ax, v[:, None] - ay
            t = ((pu * dx + pv * dy) / (dx**2 + dy**2 + 1e-6)).clamp(0, 1)
            return torch.hypot(pu - t * dx, pv - t * dy).amin(1) - 0.12
        case "rays":
            n = draw(3, 7).floor()
            return torch.sin(a * n) * r / n
        case "cells":
            d = torch.hypot(u[:, None] - draw(-1, 1, 6), v[:, None] - draw(-1, 1, 6))
            first, second = d.topk(2, dim=1, largest=False).values.unbind(1)
            return torch.maximum(second - first - 0.12, r - 1)
        case "shards":  # three lines; the sign changes across each
            angle = draw(0, 2 * math.pi, 3)
            d = u[:, None] * angle.cos() + v[:, None] * angle.sin() - draw(-0.6, 0.6, 3)
            return d.abs().amin(1) * d.sign().prod(1)
        case _:  # "outlined ...", inwards from the edge
            return (_distance(family.removeprefix("outlined "), u, v, draw) + 0.12).abs() - 0.12


def _render(family: str, n: int, g: torch.Generator) -> Tensor:
    def draw(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, 1, 1, generator=g) * (high - low) + low

    def texture() -> Tensor:
        return _upsample(torch.randn(n, 3, 8, 8, generator=g) * draw(0, 0.1, 1))

    t = (torch.arange(32) + 0.5) / 16 - 1
    x, y = t - draw(-0.2, 0.2), t[:, None] - draw(-0.2, 0.2)
    size, angle = draw(0.6, 0.85), draw(0, 2 * math.pi)
    u, v = (x * angle.cos() + y * angle.sin()) / size, (y * angle.cos() - x * angle.sin()) / size
    mask = (0.5 - 16 * size * _distance(family, u, v, draw)).clamp(0, 1)  # 16 pixels a unit
    back = draw(0, 1, 3)
    front = torch.remainder(back + draw(0.25, 0.75, 3), 1)  # never too like the background
    image = torch.lerp(back + texture(), front + texture(), mask[:, None])
    image += torch.randn(image.shape, generator=g) * draw(0, 0.05, 1)
    return (image.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)


def synthetic(split: str, n: int | None = None, seed: int = 0) -> Images:
    """The built-in benchmark: n images 32×32 of "train", "test", "aux" or an OOD family.

    The ten ID classes are five shapes, filled or outlined; auxiliary and OOD images show other
    families, drawn the same way. A function of (split, n, seed). Raises ValueError for an unknown
    split or n < 1.
    """
    if split not in SYNTHETIC:
        raise ValueError(f"synthetic has {', '.join(SYNTHETIC)}, not {split!r}")
    families, n = SYNTHETIC[split][0], SYNTHETIC[split][1] if n is None else n
    if n < 1:
        raise ValueError(f"need at least one image, got n={n}")
    g = torch.Generator().manual_seed(seed * len(SYNTHETIC) + list(SYNTHETIC).index(split))
    y = torch.randperm(n, generator=g) % len(families)
    x = torch.empty(n, 32, 32, 3, dtype=torch.uint8)
    for k, family in enumerate(families[:n]):
        x[y == k] = _render(family, int((y == k).sum()), g)
    name = split if split in _OOD else f"synthetic {split}"
    return Images(x, y, name, families) if families is _ID else Images(x, None, name)


class Source(NamedTuple):
    """A published set: its file has the name in the URL, and lies below the root."""

    url: str
    md5: str
    folder: str = ""  # what the archive becomes, as torchvision has it; "": the file is read itself
    count: int = 0  # images in the folder


_KRIZ, _VGG = "https://www.cs.toronto.edu/~kriz/", "https://www.robots.ox.ac.uk/~vgg/data/dtd/"
_NG, _MIT = "http://ufldl.stanford.edu/housenumbers/", "http://data.csail.mit.edu/places/"
_BOX, _BERKELEY = "https://www.dropbox.com/s/", "https://people.eecs.berkeley.edu/~hendrycks/"
_MOS = "http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset/"
SOURCES: dict[str, Source] = {
    # file and md5 as in torchvision
    "cifar10": Source(
        _KRIZ + "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py"
    ),
    "cifar100": Source(
        _KRIZ + "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python"
    ),
    "svhn": Source(_NG + "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
    "textures": Source(
        _VGG + "download/dtd-r1.0.1.tar.gz", "fff73e5086ae6bdbea199a49dfb8a4c1", "dtd/dtd", 5640
    ),
    "places365": Source(
        _MIT + "places365/val_256.tar", "e27b17d8d44f4af9a78502beb927f808", "val_256", 36500
    ),
    # the files of ODIN, md5 as in pytorch-ood and detectors
    "lsun_c": Source(
        _BOX + "fhtsw1m3qxlwj6h/LSUN.tar.gz?dl=1", "458a0a0ab8e5f1cb4516d7400568e460", "LSUN", 10000
    ),
    "lsun_r": Source(
        _BOX + "moqh2wh8696c3yl/LSUN_resize.tar.gz?dl=1",
        "278b7b31c8cb7e804a1465a8ce03a2dc",
        "LSUN_resize",
        10000,
    ),
    "isun": Source(
        _BOX + "ssz7qxfqae0cca5/iSUN.tar.gz?dl=1", "be77b0f2c26fda898afac5f99645ee70", "iSUN", 8925
    ),
    # the 10,000 images each of MOS, md5 as in detectors
    "inaturalist": Source(
        _MOS + "iNaturalist.tar.gz", "5be6ea8aa027d7b631916427b32cb335", "iNaturalist", 10000
    ),
    "sun": Source(_MOS + "SUN.tar.gz", "8469c3ada62211477954ec1be53b12d0", "SUN", 10000),
    "places": Source(_MOS + "Places.tar.gz", "b5cb5eba2754ae2a28beea8718db699a", "Places", 10000),
    # outlier-exposure's; md5 as in pytorch-ood
    "random300k": Source(_BERKELEY + "300K_random_images.npy", "64ca64357de98351f28454274a112dc3"),
}
PAPER_OOD = ("svhn", "textures", "places365", "lsun_c", "lsun_r", "isun")  # of Tables 1 and 2
IMAGENET_OOD = ("inaturalist", "sun", "places", "textures")  # of Table 3


def extract(archive: str | Path, folder: str | Path) -> None:
    """Unpack a tar archive as `folder`, all of it or nothing; a single top folder is `folder`.

    Raises ValueError for an archive that is damaged, or has a member that would land outside the
    folder or is neither file nor folder (links, devices). Only names and contents are taken over.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as parent:
        inside = Path(parent).resolve() / "files"
        inside.mkdir()
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    _unpack(tar, member, inside)
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as e:
            raise ValueError(f"{archive} is damaged or incomplete ({e}): fetch it again") from None
        top = list(inside.iterdir())
        (top[0] if len(top) == 1 and top[0].is_dir() else inside).rename(folder)


def _unpack(tar: tarfile.TarFile, member: tarfile.TarInfo, inside: Path) -> None:
    target = (inside / member.name).resolve()
    if not target.is_relative_to(inside):
        raise ValueError(f"{tar.name} is hostile: its member {member.name!r} leaves the folder")
    if not (member.isfile() or member.isdir()):
        raise ValueError(f"{tar.name} is hostile: {member.name!r} is neither file nor folder")
    (target if member.isdir() else target.parent).mkdir(parents=True, exist_ok=True)
    if member.isfile():
        with tar.extractfile(member) as source, open(target, "wb") as copy:
            shutil.copyfileobj(source, copy)


@contextlib.contextmanager
def _alone(root: str | Path) -> Iterator[None]:
    """One process at a time fetches and unpacks below a root."""
    import fcntl

    with open(Path(root) / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _locate(name: str, root: str | Path, download: bool) -> Path:
    """The folder or file of a published set; fetched only if asked, checked before it is used."""
    source = SOURCES[name]
    file, target = Path(root) / Path(source.url.split("?")[0]).name, Path(root) / source.folder
    if source.folder and target.is_dir():
        return target
    if not file.exists() and not download:
        raise FileNotFoundError(f"{name}: no {file}. It comes from {source.url}; {_advice(name)}")
    Path(root).mkdir(parents=True, exist_ok=True)
    ready = file.exists() and not source.folder  # nothing to write: the root may be read-only
    with contextlib.nullcontext() if ready else _alone(root):
        if not (source.folder and target.is_dir()):
            _fetch(name, file)
            if source.folder:
                extract(file, target)
    return target if source.folder else file


def _advice(name: str) -> str:
    option = {"cifar10": "--id", "cifar100": "--id", "random300k": "--aux"}.get(name, "--ood")
    own = f"{option} {name}=PATH" if option == "--ood" else f"{option} PATH"
    return f"put it there, run again with --download, or give images of your own: {own}"


def _fetch(name: str, file: Path) -> None:
    """The file of a published set, of the published md5."""
    from torchvision.datasets.utils import calculate_md5

    if not file.exists():
        _download(SOURCES[name].url, file, _advice(name))
    if (md5 := calculate_md5(file)) != (published := SOURCES[name].md5):
        message = f"{file} is damaged or another file: md5 {md5}, published {published}"
        raise ValueError(f"{message}; delete it and fetch it again")


def _download(url: str, file: Path, advice: str) -> None:
    """The file of a URL, complete or not at all."""
    try:
        torch.hub.download_url_to_file(url, str(file))
    except OSError as e:
        message = f"{url} could not be fetched to {file} ({e}); {advice}"
        raise FileNotFoundError(message) from None


def _open(path: str | Path) -> Any:
    """An image file as RGB, by Pillow: greyscale, palettes and CMYK too."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # the conversion to 8 bits would clip, not scale
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {path}") from None
    except Exception as e:  # Pillow's decoders raise whatever they stumble over
        if isinstance(e, OSError) and e.errno:  # the system's fault, not the file's
            raise
        raise ValueError(f"{path} is not an image that can be read: {e}") from None


def load_image(path: str | Path, size: int = 32, resize: bool = True) -> Tensor:
    """An image file as RGB, short side resized (bilinear), centre crop: [1,size,size,3] uint8.

    The short side becomes `size`; of large images (size >= 128) size · 256 / 224, as is usual on
    ImageNet. Raises FileNotFoundError without the file, ValueError naming one that cannot be read.
    """
    from torchvision.transforms import functional as T

    image = _open(path)
    if not resize and min(image.size) < size:
        raise ValueError(f"{path} is {image.size}, smaller than the crop of {size}×{size}")
    if resize:
        image = T.resize(image, size if size < 128 else size * 256 // 224, antialias=True)
    return T.pil_to_tensor(T.center_crop(image, size)).permute(1, 2, 0)[None].contiguous()


def _files(folder: Path) -> list[Path]:
    suffixes = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"}
    found = (p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    files = sorted(p for p in found if not p.name.startswith("."))
    if not files:
        raise ValueError(f"no images below {folder}: expected {', '.join(sorted(suffixes))} files")
    return files


def _decode(
    files: Sequence[Path], size: int, resize: bool = True, skip: bool = False
) -> tuple[Tensor, Tensor]:
    """All files in memory, and their positions: with `skip`, of those that can be read."""
    x, corrupt = torch.empty(len(files), size, size, 3, dtype=torch.uint8), []

    def read(i: int) -> bool:
        try:
            x[i] = load_image(files[i], size, resize)[0]
            return True
        except ValueError as e:
            if not skip:
                raise ValueError(f"{e}; --skip-corrupt leaves such files out") from None
            corrupt.append(str(files[i]))
            return False

    with ThreadPoolExecutor() as pool:
        good = torch.tensor(list(pool.map(read, range(len(files)))))
    report_corrupt(corrupt)
    if not good.any():
        raise ValueError(f"none of the {len(files)} images around {files[0]} can be read")
    return x if good.all() else x[good], good.nonzero()[:, 0]


def report_corrupt(names: Collection[str]) -> None:
    """Name and count the files that --skip-corrupt left out."""
    if names:
        more = ", ..." if len(names) > 5 else ""
        text = ", ".join(sorted(names)[:5]) + more
        print(f"warning: left out {len(names)} corrupt files: {text}", file=sys.stderr)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz, or of an .npy as "x", memory-mapped and never pickled."""
    import numpy as np

    try:
        loaded = np.load(path, mmap_mode="c", allow_pickle=False)
        return {"x": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as e:
        why = "it holds pickled objects, which could run code" if "pickle" in str(e) else e
        raise ValueError(f"{path} is not a NumPy file that can be read: {why}") from None


def _pixels(array: np.ndarray, path: Path, name: str = "x") -> Tensor:
    if array.dtype != "uint8" or array.ndim != 4 or array.shape[3] != 3 or not array.size:
        got = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"{path}: {name} must be uint8 [N,H,W,3], got {got}")
    return torch.from_numpy(array)


def _labels(array: np.ndarray, n: int, classes: int | None, path: Path, name: str) -> Tensor:
    if array.shape != (n,) or array.dtype.kind not in "iu":
        got = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"{path}: {name} must be {n} integer labels, one an image, got {got}")
    y = torch.from_numpy(array.astype("int64"))
    K = int(y.max()) + 1 if classes is None else classes
    if y.min() < 0 or y.max() >= K:
        raise ValueError(f"{path}: {name} must be in 0..{K - 1}, got {y.min()}..{y.max()}")
    if classes is None and (absent := set(range(K)) - set(y.unique().tolist())):
        first = sorted(absent)[:9]
        raise ValueError(f"{path}: {name} goes to {K - 1} but has no image of class {first}")
    return y


def _id_arrays(path: Path) -> tuple[Images, Images]:
    arrays = _arrays(path)
    wanted = ("x_train", "y_train", "x_test", "y_test")
    if missing := [k for k in wanted if k not in arrays]:
        raise ValueError(f"{path} has arrays {list(arrays)}; ID data also need {missing}")
    x, x_test = (_pixels(arrays[k], path, k) for k in ("x_train", "x_test"))
    if x.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"{path}: x_train {list(x.shape)} and x_test {list(x_test.shape)} differ")
    y = _labels(arrays["y_train"], len(x), None, path, "y_train")
    y_test = _labels(arrays["y_test"], len(x_test), int(y.max()) + 1, path, "y_test")
    if x.shape[1] != x.shape[2]:
        raise ValueError(f"{path}: images must be square, got {list(x.shape[1:3])}")
    classes = tuple(str(c) for c in range(int(y.max()) + 1))
    train, test = Images(x, y, path.stem, classes), Images(x_test, y_test, path.stem, classes)
    return _mixed(train), _mixed(test)


def _mixed(images: Images) -> Images:
    """Images in order of class are put in a fixed random one: the first N stand for them all."""
    if (images.y.diff() < 0).any():
        return images
    order = torch.randperm(len(images.y), generator=torch.Generator().manual_seed(0))
    x = images.x.select(order) if isinstance(images.x, Files) else images.x[order]
    return images._replace(x=x, y=images.y[order])


def _id_folder(path: Path, size: int, skip: bool) -> tuple[Images, Images]:
    splits, classes = [], None
    for part in (path / "train", path / "test"):
        if not part.is_dir():
            raise FileNotFoundError(f"no {part}: ID images are in {path}/train|test/CLASS/*.png")
        names = _subfolders(part)
        if not names or names != (classes or names):
            raise ValueError(f"{part} must have the same class folders as train, has {names[:9]}")
        classes, (files, y) = names, _class_files(part, names)
        x, kept = _decode(files, size, skip=skip)
        splits.append(_mixed(Images(x, y[kept], path.name, tuple(names))))
    return splits[0], splits[1]


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")


def _class_files(folder: Path, names: Sequence[str]) -> tuple[list[Path], Tensor]:
    """The image files below folder/CLASS for each class, and their labels."""
    files = [_files(folder / name) for name in names]
    y = torch.arange(len(names)).repeat_interleave(torch.tensor([len(f) for f in files]))
    return [f for part in files for f in part], y


# The released code's ten ID classes; it takes the first of a fixed permutation of all 1,000.
_TEN = (
    "n02396427 n04141975 n02834397 n02111277 n03534580 n01877812 n02837789 n01443537 n02114367 "
    "n03857828"
)


class Files:
    """Images that stay files, for sets beyond memory: a lazy uint8 [N,size,size,3].

    x[i], of a slice or indices, has them as `load_image`, by threads; `crop` is a random crop for
    training. A file that cannot be read is a ValueError that names it. With skip_corrupt the next
    one of the same class takes its place, and its name goes to `corrupt`.
    """

    def __init__(self, files: Sequence[Path], y: Tensor, size: int, skip_corrupt: bool = False):
        import numpy as np

        # One array, not a million objects, whose reference counts would copy it to every worker.
        self.files, self.y = np.array([os.fsencode(f) for f in files]), y
        self.size, self.skip_corrupt, self.corrupt = size, skip_corrupt, set()
        self.shape, self.device = (len(files), size, size, 3), torch.device("cpu")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        with ThreadPoolExecutor() as pool:
            index = torch.arange(len(self))[index].tolist()
            return torch.cat(list(pool.map(lambda i: self._read(load_image, i), index)))

    def content(self, i: int) -> Tensor:
        """The bytes of file i."""
        content = bytearray(Path(os.fsdecode(self.files[i])).read_bytes())
        # frombuffer refuses an empty file; one zero byte is no image either.
        return torch.frombuffer(content or bytearray(1), dtype=torch.uint8)

    def select(self, index: slice | Tensor) -> Files:
        """Some of the files, in the order of the index."""
        some = copy.copy(self)
        some.files, some.y = self.files[index], self.y[index]
        some.shape = (len(some.files), *self.shape[1:])
        return some

    def crop(self, i: int, seed: int) -> Tensor:
        """The random crop (8 to 100 % of the area) and flip of a seed: [1,size,size,3] uint8."""
        return self._read(lambda path, size: random_crop(_open(path), size, seed), i)

    def _read(self, load: Callable[[str, int], Tensor], i: int) -> Tensor:
        j = i
        while True:
            path = os.fsdecode(self.files[j])
            try:
                return load(path, self.size)
            except ValueError as e:
                if not self.skip_corrupt:
                    raise ValueError(f"{e}; --skip-corrupt leaves such files out") from None
            self.corrupt.add(path)
            same = (self.y == self.y[i]).nonzero()[:, 0]
            j = int(same[(torch.searchsorted(same, j) + 1) % len(same)])
            if j == i:
                raise ValueError(f"no file of the class of {path} can be read")


def random_crop(image: Any, size: int, seed: int) -> Tensor:
    """torchvision's RandomResizedCrop and flip as a function of the seed: [1,size,size,3] uint8.

    `image` is Pillow's or a uint8 tensor [3,H,W] on any device: the crop is the same.
    """
    from torchvision.transforms import RandomResizedCrop
    from torchvision.transforms import functional as T

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        box = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        flip = torch.rand(()) < 0.5
    image = T.resized_crop(image, *box, [size, size], antialias=True)
    image = T.hflip(image) if flip else image
    image = image if isinstance(image, Tensor) else T.pil_to_tensor(image)
    return image.permute(1, 2, 0)[None].contiguous()


def imagenet_classes(folder: Path, classes: str = "") -> list[str]:
    """ID classes among ImageNet's: the released code's ten (""), a number N, or names.

    N: the first by the released code's permutation of the sorted folders (for 10 of 1,000 its ten).
    Names: with commas, or a file of them. ValueError for a class without a folder.
    """
    import numpy as np

    if not folder.is_dir():
        raise FileNotFoundError(
            f"no {folder}: ImageNet is read from imagenet/train|val/WNID/*.JPEG"
        )
    known = _subfolders(folder)
    if classes.isdigit():
        rank = np.random.RandomState(1993).permutation(len(known))  # those of the lowest ranks
        names = [known[i] for i in rank.argsort()[: int(classes)]]
    else:
        is_file = "," not in classes and Path(classes).is_file()
        text = Path(classes).read_text() if is_file else classes or _TEN
        names = text.replace(",", " ").split()
    if absent := [name for name in names if name not in known]:
        raise ValueError(
            f"{folder} has no class {absent[0]!r} ({len(known)} others); choose ID "
            "classes with --id imagenet:NAME,NAME or imagenet:NUMBER"
        )
    if not 2 <= len(names) < len(known) or len(set(names)) < len(names):
        raise ValueError(
            f"need two or more of the {len(known)} classes, each once, and some left "
            f"over as auxiliary data; got {len(names)}"
        )
    return names


def load_imagenet(
    part: str, root: Path, classes: str = "", size: int = 224, skip: bool = False
) -> Images:
    """ImageNet's "train" or "val" images of the ID classes, or "aux": training images of the rest.

    root/train/WNID/*.JPEG and root/val/WNID/*.JPEG, as torchvision has them too. "val" is decoded,
    the others stay files.
    """
    names, folder = imagenet_classes(root / "train", classes), root / part
    if part == "aux":
        folder = root / "train"
        names = [name for name in _subfolders(folder) if name not in names]
    files, y = _class_files(folder, names)
    if part == "val":
        x, kept = _decode(files, size, skip=skip)
        return _mixed(Images(x, y[kept], "imagenet", tuple(names)))
    images = _mixed(Images(Files(files, y, size, skip), y, "imagenet", tuple(names)))
    return images._replace(y=None, classes=()) if part == "aux" else images


def load_id(
    name: str,
    root: str | Path = "data",
    download: bool = False,
    size: int = 32,
    skip_corrupt: bool = False,
) -> tuple[Images, Images]:
    """In-distribution training and test images: a name or a path.

    Names: cifar10, cifar100, synthetic, imagenet or imagenet:CLASSES (see
    `imagenet_classes`), below root/imagenet. A path is an .npz with x_train, y_train, x_test,
    y_test, or a folder train|test/CLASS/*.png. Files become size×size. Raises FileNotFoundError for
    a set that is not there, saying where it comes from; ValueError for one that is damaged.
    """
    kind, _, classes = name.partition(":")
    if kind == "imagenet":
        folder, options = Path(root) / "imagenet", (classes, size, skip_corrupt)
        train, test = (load_imagenet(part, folder, *options) for part in ("train", "val"))
        return train, test
    if name == "synthetic":
        return synthetic("train"), synthetic("test")
    if name in ("cifar10", "cifar100"):
        from torchvision.datasets import CIFAR10, CIFAR100

        folder, make = _locate(name, root, download), CIFAR10 if name == "cifar10" else CIFAR100
        try:
            sets = [make(str(root), train=train) for train in (True, False)]
        except RuntimeError:
            raise ValueError(f"{folder} is damaged (md5): delete it and fetch it again") from None
        a, b = (
            Images(torch.from_numpy(s.data), torch.tensor(s.targets), name, tuple(s.classes))
            for s in sets
        )
        return a, b
    path = _existing(name, "cifar10, cifar100, synthetic, imagenet")
    return _id_folder(path, size, skip_corrupt) if path.is_dir() else _id_arrays(path)


def _existing(path: str | Path, known: str) -> Path:
    if not Path(path).exists():
        raise FileNotFoundError(f"no file or folder {path}; the names are {known}")
    return Path(path)


def _shuffled(files: list[Path]) -> list[Path]:
    """In a fixed random order: the first N of a folder of folders stand for all of it."""
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    return [files[i] for i in order.tolist()]


def _unlabelled(path: Path, size: int, name: str, skip: bool = False) -> Images:
    """Images of an .npy, an .npz (its x, or else its first array) or below a folder."""
    if path.is_dir():
        return Images(_decode(_shuffled(_files(path)), size, skip=skip)[0], None, name)
    arrays = _arrays(path)
    if not arrays:
        raise ValueError(f"{path} holds no array")
    return Images(_pixels(arrays.get("x", next(iter(arrays.values()))), path), None, name)


def _check_size(images: Images, size: int, what: str) -> None:
    if images.x.shape[1:3] != (size, size):
        got = f"{list(images.x.shape[1:3])}, the ID images {size}×{size}"
        raise ValueError(f"{what} has images {got}: resize one of them")


def load_aux(
    name: str,
    root: str | Path = "data",
    download: bool = False,
    size: int = 32,
    skip_corrupt: bool = False,
) -> Images:
    """Auxiliary outliers: "random300k" (memory-mapped), "synthetic", or a path as in `load_ood`.

    imagenet or imagenet:CLASSES: the training images of all classes but these, as files.
    """
    kind, _, classes = name.partition(":")
    if kind == "imagenet":
        return load_imagenet("aux", Path(root) / "imagenet", classes, size, skip_corrupt)
    if name == "synthetic":
        images = synthetic("aux")
    elif name == "random300k":
        images = _unlabelled(_locate(name, root, download), size, name)
    else:
        path = _existing(name, "random300k, synthetic, imagenet")
        images = _unlabelled(path, size, path.stem, skip_corrupt)
    _check_size(images, size, f"the auxiliary set {name}")
    return images


def _published_ood(name: str, root: str | Path, download: bool, size: int, skip: bool) -> Images:
    place = _locate(name, root, download)
    if name == "svhn":
        from torchvision.datasets import SVHN

        x = torch.from_numpy(SVHN(str(root), split="test").data).permute(0, 2, 3, 1).contiguous()
        return Images(x, None, name)
    files = _files(place)
    if len(files) != (count := SOURCES[name].count):
        message = f"{place} has {len(files)} images, {name} has {count}"
        raise ValueError(f"{message}: delete the folder and unpack or fetch it again")
    files = _shuffled(files)
    if name == "places365":  # 10,000 of them, as the paper has; always the same
        files = files[:10000]
    # LSUN-C has larger images (36×36 in ODIN's file): cropped, not resized, as in the released code
    return Images(_decode(files, size, name != "lsun_c", skip)[0], None, name)


def load_ood(
    specs: Sequence[str],
    root: str | Path = "data",
    download: bool = False,
    size: int = 32,
    skip_corrupt: bool = False,
    benchmark: Sequence[str] = PAPER_OOD,
) -> tuple[dict[str, Images], list[str]]:
    """OOD test sets by name, and the benchmark's sets that are left out, for tables to say so.

    A spec is one of PAPER_OOD or IMAGENET_OOD; "available", those of the benchmark that are there;
    "synthetic", all six families; or NAME=PATH, an .npy or .npz of uint8 [N,H,W,3] or a folder of
    images at any depth (resized and centre-cropped). Raises FileNotFoundError for a set that is not
    there, saying where it comes from; ValueError for one that is damaged or malformed, or named
    twice.
    """
    sets, groups = {}, {"synthetic": _OOD, "available": benchmark}
    expected = _OOD if set(specs) <= {"synthetic", *_OOD} else benchmark
    for spec in specs:
        for name in groups.get(spec, [spec]):
            name, _, path = name.partition("=")
            if name in sets:
                raise ValueError(f"the OOD set {name} is given twice")
            if path and (name in ("", "id", "mean") or "/" in name):  # columns of the tables
                raise ValueError(f"an OOD set cannot be named {name!r}: give --ood another NAME")
            try:
                sets[name] = _load_ood(name, path, root, download, size, skip_corrupt)
            except FileNotFoundError:
                if spec != "available":
                    raise
    if not sets:
        known = ", ".join(benchmark)
        raise ValueError(f"no OOD set to evaluate on: name some with --ood ({known})")
    for name, images in sets.items():
        _check_size(images, size, f"the OOD set {name}")
    return sets, [name for name in expected if name not in sets]


def _load_ood(
    name: str, path: str, root: str | Path, download: bool, size: int, skip: bool
) -> Images:
    published = dict.fromkeys((*PAPER_OOD, *IMAGENET_OOD))
    known = ", ".join((*published, "available", "synthetic", *_OOD, "NAME=PATH"))
    if path:
        return _unlabelled(_existing(path, known), size, name, skip)
    if name in _OOD:
        return synthetic(name)
    if name not in published:
        raise ValueError(f"no OOD set {name!r}; there are {known}")
    return _published_ood(name, root, download, size, skip)


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of `Config` or `DataOptions`, and what argparse is told of it."""
    return field(default=default, metadata={"help": help} | more)


@dataclass(frozen=True)
class DataOptions:
    """Where data sets lie, whether absent ones may be fetched, how files are read."""

    root: str = option("data", "folder of the data sets")
    download: bool = option(False, "fetch the sets that are absent")
    ood: Sequence[str] = option(
        (),
        "OOD sets: names, or name=path for .npy, .npz or a folder (default: the paper's)",
        nargs="*",
        metavar="NAME[=PATH]",
    )
    skip_corrupt: bool = option(False, "name damaged image files and go on without")
    workers: int = option(4, "processes that decode")
    decode: str = option(
        "cpu",
        "where to decode JPEG files of a training stream; what the GPU cannot goes through Pillow",
        choices=["cpu", "cuda"],
    )
    candidate_chunk: int = option(512, "most candidates in one forward: fewer need less memory")

    def __post_init__(self):
        if self.workers < 0 or self.candidate_chunk < 1:
            raise ValueError("need --workers >= 0 and --candidate-chunk >= 1")
        if self.decode == "cuda" and not torch.cuda.is_available():
            raise ValueError("--decode cuda needs a GPU that torch can use; leave it out")

    def load(self, id: str, size: int) -> tuple[Images, Images, dict[str, Images], list[str]]:
        """ID training and test images, the OOD sets, and the names of those left out."""
        train_set, test_set = load_id(
            id, self.root, self.download, size=size, skip_corrupt=self.skip_corrupt
        )
        size = train_set.x.shape[1]
        benchmark = IMAGENET_OOD if id.partition(":")[0] == "imagenet" else PAPER_OOD
        names = self.ood or (["synthetic"] if id == "synthetic" else benchmark)
        options = self.root, self.download, size, self.skip_corrupt, benchmark
        return train_set, test_set, *load_ood(names, *options)


# ==================================================================================================
# 8  Training (Sections 4 and 6.1)
# Needs: everything above
# ==================================================================================================


def no_loss(f_in: Tensor, f_aux: Tensor, y_in: Tensor) -> Tensor:
    """The auxiliary loss of plain cross-entropy: zero."""
    return f_in.new_zeros(())


@dataclass(frozen=True)
class Sampler:
    """Which auxiliary images a step sees: `share` of them for each ID image.

    `pick(logits, z, k, generator)` chooses k · share among the candidates of a step, by their
    logits and features z; without it they are drawn at random. `pool(trainer, order, n,
    generator)` chooses, once an epoch, n of the auxiliary set (given in random order).
    """

    share: int = 1
    pick: Callable[[Tensor, Tensor, int, torch.Generator], Tensor] | None = None
    pool: Callable[[Trainer, Tensor, int, torch.Generator], Tensor] | None = None


@dataclass(frozen=True)
class Gradient:
    """The score whose gradient is penalised by Eq. (3), and its margins; None: those of Eq. (1)."""

    score: Callable[[Tensor], Tensor] = energy_score
    m_in: float | None = None
    m_aux: float | None = None


@dataclass(frozen=True)
class Method:
    """A row of the tables: auxiliary loss × sampler × gradient term × score, and its recipe."""

    loss: Callable[..., Tensor] | None = None  # None: Eq. (1)
    sampler: Sampler = Sampler()
    gradient: Gradient | None = None
    score: str = "energy"
    recipe: str = "finetune"
    lambda_s: float = 0.1
    extra_class: bool = False  # K + 1 outputs, the last one for "absent"
    prepare: Callable[..., tuple[Tensor, dict[str, Any]]] | None = None  # before the forward pass


# Samplers and preparations that need more than a step's candidates.


def ntom_pool(trainer: Trainer, order: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """NTOM's outliers of the epoch, mined from 400,000 auxiliary images.

    At most a quarter of them, the share that the released code keeps; the epoch then goes over a
    small set more than once. `order` is random, and so is that of the result.
    """
    order = order[:400_000]
    p_absent = absent(trainer.embed_images(trainer.aux_set, order)[0])
    return order[quantile_mining(p_absent, min(n, len(order) // 4))]


def poem_pool(trainer: Trainer, order: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """POEM's outliers of the epoch: of 400,000 the n nearest to a boundary drawn at random.

    The regression is on the ID images (target -3), once for each epoch remembered, and on the
    outliers of the last four epochs (target 3); these are kept as indices, their features
    computed anew.
    """
    order, buffer = order[:400_000], trainer.memory.get("buffer", order[:0])
    n, d = min(n, len(order)), trainer.net.fc.in_features
    gram, zy = order.new_zeros(d, d, dtype=torch.float64), order.new_zeros(d, dtype=torch.float64)
    id_part = trainer.train_set, None, len(buffer) // n, -3.0
    for images, i, times, target in (id_part, (trainer.aux_set, buffer, 1, 3.0)):
        if len(buffer):
            z = trainer.embed_images(images, i)[1].double()
            gram += times * (z.mT @ z)
            zy += times * target * z.sum(0)
    beta = poem_draw(*poem_posterior(gram, zy), generator)
    z = trainer.embed_images(trainer.aux_set, order)[1]
    nearest = (z @ beta.to(z.dtype)).abs().argsort(stable=True)[:n]
    chosen = order[nearest.sort().values]  # in the random order, not the nearest first
    trainer.memory["buffer"] = torch.cat([buffer, chosen])[-4 * n :]
    return chosen


def mix(
    trainer: Trainer, x_in: Tensor, x_aux: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, Any]]:
    """OpenMix's images lam x_in + (1 - lam) x_aux, with lam ~ Beta(10, 10) once a step.

    Beta(10, 10) is the distribution of the tenth smallest of 19 uniform numbers.
    """
    lam = torch.rand(19, generator=generator, device=x_in.device).sort().values[9]
    return lam * x_in + (1 - lam) * x_aux, {"lam": lam}


def balance(
    trainer: Trainer, x_in: Tensor, x_aux: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, Any]]:
    """Balanced energy's class prior: the classes that the network at the start gives outliers.

    The authors' alpha and gamma are 10 and 0.05 for CIFAR-10, 100 and 0.005 for CIFAR-100: in
    both K and 1 / (2 K).
    """
    c, K = trainer.config, trainer.net.fc.out_features
    if "prior" not in trainer.memory:
        logits, _ = trainer.embed_images(trainer.aux_set)
        trainer.memory["prior"] = torch.bincount(logits.argmax(1), minlength=K) / len(logits)
    margins = {"m_in": c.m_in, "m_aux": c.m_aux}
    return x_aux, {"prior": trainer.memory["prior"], "alpha": K, "gamma": 0.5 / K, **margins}


ENERGY_SAMPLING = Sampler(2, lambda f, z, k, g: energy_sampling(z, energy_score(f), k, g))
DOS_SAMPLING = Sampler(1, lambda f, z, k, g: dos_sampling(z, absent(f), k, g))
# The paper leaves open what "correctly detected" is for the score of OE, the maximum softmax
# probability p: here p >= 1/2 for ID and p <= 1/2 for auxiliary images.
OE_GRADIENT = Gradient(msp, m_in=-0.5, m_aux=-0.5)
# lambda_s: OE 0.5, its paper; K+1 classes 1, their released code; the rest 0.1, Section 6.1. The
# margins of every energy loss are those of the released code of GReg, DOS and POEM, -25 and -7
# (energy and balanced energy have their own: -23, -5 on CIFAR-10 and -27, -5 on CIFAR-100).
METHODS = {
    # The paper's own line.
    "ce": Method(loss=no_loss, sampler=Sampler(0), recipe="pretrain"),
    "energy": Method(),
    "greg": Method(gradient=Gradient()),
    "energy+sampling": Method(sampler=ENERGY_SAMPLING, recipe="greg+"),
    "greg+": Method(sampler=ENERGY_SAMPLING, gradient=Gradient(), recipe="greg+"),
    # The compared methods.
    "oe": Method(oe_loss, Sampler(2), score="msp", lambda_s=0.5),
    "openmix": Method(
        openmix_loss, prepare=mix, score="msp", recipe="openmix", lambda_s=1, extra_class=True
    ),
    "poem": Method(sampler=Sampler(1, pool=poem_pool), recipe="mining"),
    "ntom": Method(
        absent_loss, Sampler(2, pool=ntom_pool), None, "absent", "mining", 1, extra_class=True
    ),
    "dos": Method(absent_loss, DOS_SAMPLING, None, "absent", "mining", 1, extra_class=True),
    "balanced": Method(balanced_energy_loss, Sampler(2), prepare=balance),
    # Table 4.
    "oe+grad": Method(oe_loss, Sampler(2), OE_GRADIENT, score="msp", lambda_s=0.5),
    "poem+grad": Method(sampler=Sampler(1, pool=poem_pool), gradient=Gradient(), recipe="mining"),
}

RECIPES = {
    # Pre-training is not described in the paper: the energy and OE authors' baseline.
    "pretrain": {"epochs": 100, "lr": 0.1, "schedule": "cosine", "batch": 128, "wd": 5e-4},
    # Section 6.1: 20 epochs, SGD, cosine. Left open there: learning rate and weight decay are the
    # energy authors' for the same fine-tune, the batch is the released code's default.
    "finetune": {"epochs": 20, "lr": 0.001, "schedule": "cosine", "batch": 64, "wd": 5e-4},
    # Section 6.1: 50 epochs at 0.1, 10 at 0.01. Left open: batch and decay of the released code.
    "greg+": {"epochs": 60, "lr": 0.1, "schedule": "5/6", "batch": 64, "wd": 1e-4},
    # The released code of NTOM, POEM and DOS.
    "mining": {"epochs": 100, "lr": 0.1, "schedule": "0.5,0.75,0.9", "batch": 64, "wd": 1e-4},
    # OpenMix's released code (which has no Nesterov momentum).
    "openmix": {"epochs": 200, "lr": 0.1, "schedule": "0.5,0.75", "batch": 128, "wd": 5e-4},
}


@dataclass(frozen=True)
class Config:
    """One training run. A None is filled from the method's recipe by `resolve`."""

    method: str = option("greg", "row of METHODS")
    id: str = option(
        "cifar10",
        "ID data: cifar10, cifar100, synthetic, imagenet[:CLASSES], an .npz file or a folder",
    )
    aux: str = option(
        "",
        "auxiliary data: random300k, synthetic, imagenet (the other classes), .npy/.npz or a folder"
        " (default: what goes with the ID data)",
    )
    size: int | None = option(None, "side of images from files (224 for imagenet, else 32)")
    arch: str = option("wrn40_2", "network: one of ARCHS")
    seed: int = option(0, "fixes initialisation, order, augmentation and sampling")
    init: str = option("", "run folder or weights file to start from (fine-tuning needs one)")
    epochs: int | None = option(None, "passes over the ID data (recipe)")
    lr: float | None = option(None, "initial learning rate (recipe)")
    schedule: str | None = option(
        None, "cosine, or shares of the run after which lr falls (recipe)"
    )
    batch: int | None = option(None, "ID images a step = clusters k (recipe)")
    wd: float | None = option(None, "weight decay (recipe)")
    candidates: int = option(6, "least auxiliary candidates for each ID image when sampling")
    aux_epoch: int = option(
        600_000,
        "auxiliary images an epoch when sampling, drawn afresh (all, if fewer; at least"
        " --candidates for each ID image)",
    )
    n_train: int = option(0, "cut the ID training set to its first N images (0: all)")
    n_aux: int = option(0, "cut the auxiliary set to its first N images (0: all)")
    m_in: float = option(-25.0, "margin of ID scores, Eqs. (1) and (3)")
    m_aux: float = option(-7.0, "margin of auxiliary scores, Eqs. (1) and (3)")
    lambda_s: float | None = option(None, "weight of the auxiliary loss (method)")
    lambda_grad: float = option(1.0, "weight of Eq. (3), for methods that have it")
    reduction: str = option("paper", "paper: Eq. (3); released: Eq. (3) / N, as the released code")
    grad_every: int = option(1, "Eq. (3) in every N-th step only, with N-fold weight")
    grad_share: float = option(1.0, "share of a batch on which Eq. (3) is estimated, in (0, 1]")
    stats: str = option(
        "", "normalisation: a key of STATS (default: the start's, the ID data's, else cifar10)"
    )
    amp: bool = option(False, "bfloat16 autocast")
    amp_candidates: bool = option(False, "bfloat16 where auxiliary images are only chosen among")
    sync_bn: bool = option(False, "batch statistics over all processes of torchrun")
    channels_last: bool = option(False, "channels-last memory format")


def fine_tunes(method: str, id: str) -> bool:
    """Whether a method starts from a pre-trained network: on ImageNet all do (Section 6.1)."""
    imagenet = id.partition(":")[0] == "imagenet"
    return METHODS[method].recipe == "finetune" or (imagenet and method != "ce")


def resolve(config: Config) -> Config:
    """Fill in what the method's recipe gives and check the whole; ValueError for what cannot be."""
    for name, table in (("method", METHODS), ("arch", ARCHS)):
        if getattr(config, name) not in table:
            raise ValueError(f"unknown {name} {getattr(config, name)!r}; one of {', '.join(table)}")
    method = METHODS[config.method]
    kind = config.id.partition(":")[0]
    init = config.init
    if (kind, config.method, config.arch) == ("imagenet", "ce", "densenet121"):
        init = init or "torchvision"
    tuned = fine_tunes(config.method, config.id)
    short = tuned or (kind == "imagenet" and init)  # there "ce" gives DenseNet-121 a new head
    fill = RECIPES["finetune" if short else method.recipe] | {"lambda_s": method.lambda_s}
    fill["size"] = 224 if kind == "imagenet" else 32
    fill = {k: v for k, v in fill.items() if getattr(config, k) is None}
    if not method.sampler.share:
        fill["aux"] = ""
    elif config.aux in ("", "imagenet"):
        fill["aux"] = config.id if kind in ("synthetic", "imagenet") else config.aux or "random300k"
    if not config.stats:  # normalisation belongs to a network: a fine-tune keeps its start's
        start = Path(config.init, "config.json")
        known = config.init and start.is_file()
        stats = json.loads(start.read_text())["stats"] if known else kind
        fill["stats"] = stats if stats in STATS else "cifar10"
    return check_config(replace(config, init=init, **fill))


def check_config(config: Config) -> Config:
    """The configuration, filled in, as it is; ValueError for what cannot be."""
    method, kind = METHODS[config.method], config.id.partition(":")[0]
    if kind == "imagenet" and config.aux.startswith("imagenet") and config.aux != config.id:
        raise ValueError(f"--aux {config.aux} has classes of --id {config.id}: leave --aux out")
    for name in "epochs", "lr", "batch", "candidates", "aux_epoch", "size", "grad_every":
        if getattr(config, name) <= 0:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} must be positive, got {getattr(config, name)}")
    if not 0 < config.grad_share <= 1:
        raise ValueError(f"--grad-share must be in (0, 1], got {config.grad_share}")
    try:
        shares = () if config.schedule == "cosine" else config.schedule.split(",")
        if not all(0 < Fraction(share) < 1 for share in shares):
            raise ValueError
    except (ValueError, ZeroDivisionError):
        message = f'--schedule must be "cosine" or shares as "0.5,0.75", got {config.schedule!r}'
        raise ValueError(message) from None
    if config.reduction not in ("paper", "released"):
        raise ValueError(f"--reduction must be paper or released, got {config.reduction!r}")
    if config.candidates < method.sampler.share:
        raise ValueError(
            f"--candidates must be at least {method.sampler.share} for {config.method}"
        )
    if config.arch == "densenet121" and config.size < 32:
        raise ValueError(f"densenet121 needs images of 32 pixels or more, got --size {config.size}")
    if config.n_train < 0 or config.n_aux < 0:
        raise ValueError("--n-train and --n-aux are numbers of images, 0 for all")
    if config.stats not in STATS:
        raise ValueError(f"unknown --stats {config.stats!r}; one of {', '.join(STATS)}")
    if config.m_in >= config.m_aux:
        raise ValueError(f"need m_in < m_aux (low means ID), got {config.m_in}, {config.m_aux}")
    if fine_tunes(config.method, config.id) and not config.init:
        raise ValueError(f"{config.method} fine-tunes a pre-trained network: name it with --init")
    return config


def learning_rate(config: Config, t: float | Fraction) -> float:
    """Learning rate at the share t in [0, 1) of the run: cosine to 0, or a tenth at each share."""
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * t)) / 2
    return config.lr * 0.1 ** sum(t >= Fraction(share) for share in config.schedule.split(","))


def rng(device: torch.device | str, *key: object) -> torch.Generator:
    """A generator that is a function of `key` alone.

    All randomness of step t in epoch e comes from (seed, e, t), so that a resumed run repeats an
    undisturbed one without any generator's state being saved.
    """
    return torch.Generator(device).manual_seed(hashed(*key))


def hashed(*key: object) -> int:
    """A seed that is a function of `key` alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")


def world() -> tuple[int, int]:
    """(rank, number of processes): (0, 1) unless torchrun started us."""
    on = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if on else (0, 1)


def write_atomically(path: Path, content: str | bytes | memoryview, keep: str = "") -> None:
    """Write a temporary file, flush it to the disk, rename it: `path` is never half-written.

    Text is UTF-8. The file that was there before is kept under the name `keep`, if one is given. A
    write that fails leaves it as it was, and no temporary file.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        temporary.unlink(missing_ok=True)
        what = f"{path} could not be written ({e.strerror or e})"
        raise OSError(f"{what}; what was saved before is intact: make room and run again") from e
    if keep and path.exists():
        os.replace(path, path.with_name(keep))
    os.replace(temporary, path)


def write_json(path: Path, value: object) -> None:
    """`value` as readable JSON, atomically; NaN is refused."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest intact checkpoint of a run folder, None if there is none.

    A damaged one is reported and the one before it is used; ValueError if both are damaged.
    """
    names = [folder / name for name in ("checkpoint.pt", "checkpoint.prev.pt")]
    names = [path for path in names if path.exists()]
    for path in names:
        content = io.BytesIO(path.read_bytes())  # so that what fails below is damage
        try:
            return torch.load(content, map_location="cpu", weights_only=True)
        except Exception as e:
            print(f"warning: {path} is damaged ({repr(e)[:200]})", file=sys.stderr)
    if names:
        raise ValueError(f"no intact checkpoint in {folder}; delete the folder to start again")
    return None


_DENSENET121 = "https://download.pytorch.org/models/densenet121-a639ec97.pth"


def torchvision_weights(root: str | Path, download: bool) -> Path:
    """torchvision's DenseNet-121, 1,000 classes; its name holds the first digits of its SHA-256."""
    path, advice = Path(root) / Path(_DENSENET121).name, "or start from other weights with --init"
    if not path.exists():
        if not download:
            message = f"no {path}: run again with --download, or put {_DENSENET121} there"
            raise FileNotFoundError(f"{message}; {advice}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(root):
            if not path.exists():  # another process may have fetched it meanwhile
                _download(_DENSENET121, path, advice)
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem[-8:]):
        raise ValueError(f"{path} is damaged (SHA-256); delete it and fetch it again")
    return path


def build(
    arch: str,
    K: int,
    init: str = "",
    seed: int = 0,
    extra: int = 0,
    data: DataOptions | None = None,
) -> Net:
    """Network `arch` with K + extra outputs, from `seed`, or from a run folder or weights file.

    `init` has K outputs; a further one starts from the seed. "torchvision": DenseNet-121 trained
    on ImageNet, with a new head.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ARCHS[arch](K + extra)
    if init == "torchvision":
        if arch != "densenet121":
            raise ValueError(f"--init torchvision is a densenet121, not a {arch}")
        data = data or DataOptions()
        weights = torchvision_weights(data.root, data.download)
        net.features = load_weights(ARCHS[arch](1000), str(weights)).features
    elif init:
        path = Path(init) / "checkpoint.pt" if Path(init).is_dir() else Path(init)
        start = load_weights(ARCHS[arch](K), str(path))
        net.features.load_state_dict(start.features.state_dict())
        net.fc.weight.data[:K], net.fc.bias.data[:K] = start.fc.weight.data, start.fc.bias.data
    return net


def embed(
    net: Net, x: Tensor, amp: bool = False, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [N,K] and features z = h(x) [N,d] in eval mode without gradients, chunk by chunk.

    On a CPU in chunks of 32: activations of CIFAR's images then stay near its cache, which can
    halve the time of a forward of all at once.
    """
    training, chunk = net.training, chunk or (32 if x.device.type == "cpu" else 1024)
    net.eval()
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        z = torch.cat([net.features(part) for part in x.split(chunk)])
        logits = net.fc(z)
    net.train(training)
    return logits.float(), z.float()


def _on(device: torch.device, images: Images, n: int) -> Images:
    """The first n images (0: all) on the device; files stay files."""
    cut, y = slice(n or None), images.y
    x = images.x.select(cut) if isinstance(images.x, Files) else images.x[cut].to(device)
    return images._replace(x=x, y=None if y is None else y[cut].to(device))


class Stream:
    """Random crops of files, decoded ahead of time by a DataLoader's workers, chunk by chunk.

    A part is (files, indices, seeds of the crops). With raw, the bytes come undecoded, one file
    after the other, with their lengths. What cannot be read is passed on as the error's text: a
    worker's own error would reach the user as a stack trace.
    """

    def __init__(self, parts: Sequence[tuple[Files, list[int], list[int]]], raw: bool = False):
        self.parts, self.raw = parts, raw

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, j: int) -> tuple[Tensor, set[str] | list[int], str]:
        files, index, seeds = self.parts[j]
        try:
            if self.raw:
                content = [files.content(i) for i in index]
                return torch.cat(content), [len(c) for c in content], ""
            pairs = zip(index, seeds, strict=True)
            return torch.cat([files.crop(i, seed) for i, seed in pairs]), files.corrupt, ""
        except (ValueError, OSError) as e:
            return torch.empty(0), files.corrupt, str(e)

    def decode(self, j: int, raw: Tensor, lengths: list[int], device: str) -> tuple:
        """Chunk j from its bytes on the device, with the same crops.

        A chunk with a file that the device cannot decode goes through Pillow.
        """
        from torchvision.io import ImageReadMode, decode_jpeg

        files, _, seeds = self.parts[j]
        try:
            images = decode_jpeg(list(raw.split(lengths)), mode=ImageReadMode.RGB, device=device)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            return Stream(self.parts)[j]
        pairs = zip(images, seeds, strict=True)
        return torch.cat([random_crop(image, files.size, seed) for image, seed in pairs]), set(), ""

    def read(self, data: DataOptions) -> Iterator[tuple[Tensor, set[str], str]]:
        """The chunks in their order."""
        ahead = {"prefetch_factor": 4} if data.workers else {}
        loader = torch.utils.data.DataLoader(
            self, batch_size=None, num_workers=data.workers, collate_fn=_same,
            worker_init_fn=_leave_signals_to_the_parent, **ahead,
        )  # fmt: skip
        for j, (x, more, error) in enumerate(loader):
            yield (
                self.decode(j, x, more, data.decode) if self.raw and not error else (x, more, error)
            )


def _same(v: Any) -> Any:
    return v


def _leave_signals_to_the_parent(worker: int) -> None:
    for number in signal.SIGINT, signal.SIGTERM:  # often sent to the whole group
        signal.signal(number, signal.SIG_IGN)


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its derivative, and that one's."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return _Sum.apply(g)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, of equal size.

    PyTorch's SyncBatchNorm has no double backward, which the gradient term needs.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        shape, R = (1, -1, 1, 1), world()[1]
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            mean = _Sum.apply(wide.mean((0, 2, 3))) / R
            wide = wide - mean.view(shape)
            var = _Sum.apply(wide.square().mean((0, 2, 3))) / R
            n = R * x.numel() / x.shape[1]
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
                self.num_batches_tracked += 1
            factor = self.weight * (var + self.eps).rsqrt()
            return (wide * factor.view(shape) + self.bias.view(shape)).to(x.dtype)


def synchronise(net: Net) -> Net:
    """The same network, same weights, with `SyncBatchNorm2d` for every batch norm."""
    for m in net.modules():
        if type(m) is nn.BatchNorm2d:
            m.__class__ = SyncBatchNorm2d
    return net


def average_buffers(net: Net) -> None:
    """Give every process the mean running statistics, so that all of them score alike."""
    buffers = [b for b in net.buffers() if b.is_floating_point()]
    flat = torch.cat(buffers)
    torch.distributed.all_reduce(flat)
    flat /= world()[1]
    for b, mean in zip(buffers, flat.split([len(b) for b in buffers]), strict=True):
        b.copy_(mean)


def gathered(part: Tensor, n: int) -> Tensor:
    """The whole [n,...] on every process, of which each has the rows rank::world, on the CPU."""
    size, part = world()[1], part.detach().cpu()
    if size == 1:
        return part
    parts: list[Tensor] = [part] * size
    torch.distributed.all_gather_object(parts, part)
    whole = part.new_empty(n, *part.shape[1:])
    for rank, rows in enumerate(parts):
        whole[rank::size] = rows
    return whole


def saved_config(saved: dict[str, Any]) -> Config:
    """The configuration of a run, which may be older than some of the options."""
    return resolve(Config(**{f.name: saved[f.name] for f in fields(Config) if f.name in saved}))


def check_same(config: Config, saved: dict[str, Any], folder: Path) -> None:
    """ValueError that names what differs, if a folder's run is not of this configuration."""
    ours, saved = asdict(config), asdict(saved_config(saved))
    differ = [f"{k} {saved[k]} -> {v}" for k, v in ours.items() if saved[k] != v]
    if differ:
        what = ", ".join(differ)
        raise ValueError(f"{folder} holds another run ({what}); choose another folder")


SYNC_STEPS = 20  # steps between two looks at the loss
STREAM_CHUNK = 32  # files decoded by a worker at a time
SAVE_SECONDS = 600  # within an epoch; at its end in any case
TERMS = ("loss", "ce", "auxiliary", "gradient", "accuracy", "share_in", "share_aux")


class Trainer:
    """One run: its data, network and optimiser, and the position (epoch, step) to go on from.

    Started by torchrun, each rank takes its share of every ID batch and of its candidates, which
    it clusters on its own: Algorithm 1 clusters a mini-batch, and a rank's mini-batch is its
    share. The gradient of the mean over ranks is that of one process on the union, where batch
    statistics are synchronised (`sync_bn`) or fixed.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        train_set: Images,
        aux_set: Images | None,
        device: torch.device | None = None,
        data: DataOptions | None = None,
    ):
        self.config, self.method, self.data = config, METHODS[config.method], data or DataOptions()
        self.folder, self.device, self.train_set = folder, device or train_set.x.device, train_set
        self.aux_set, (self.rank, self.world) = aux_set, world()
        self.share = config.batch // self.world  # ID images of this rank and step
        self.steps = len(train_set.x) // config.batch
        if config.batch % self.world or not self.steps:
            n = len(train_set.x)
            raise ValueError(f"{n} ID images, {self.world} processes: no batch of {config.batch}")
        need = self.method.sampler.share * config.batch
        if aux_set and len(aux_set.x) < need:
            n = len(aux_set.x)
            raise ValueError(f"{n} auxiliary images, a step needs {need}: more, or a smaller batch")
        K, extra = len(train_set.classes), int(self.method.extra_class)
        net = build(config.arch, K, config.init, config.seed, extra, self.data).to(self.device)
        self.net = synchronise(net) if config.sync_bn and self.world > 1 else net
        if config.channels_last:
            self.net.to(memory_format=torch.channels_last)
        self.model = self.net
        if self.world > 1:
            self.model = nn.parallel.DistributedDataParallel(self.net, broadcast_buffers=False)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), config.lr, 0.9, weight_decay=config.wd, nesterov=True
        )
        self.memory: dict[str, Tensor] = {}  # what a sampler or a loss carries between epochs
        self.sums = torch.zeros(len(TERMS), device=self.device)
        self.epoch = self.step = self.stopped_by = 0
        self.saved, self.corrupt, self.reported = time.time(), set(), set()

    def save(self, **more: Any) -> None:
        """Write all that a resumed run needs; the checkpoint before it stays as .prev.pt.

        Generators are functions of (seed, epoch, step, rank), so none has a state to save.
        """
        if self.rank == 0:
            state = {"config": asdict(self.config), "classes": list(self.train_set.classes)}
            state |= {"size": self.train_set.x.shape[1], "net": self.net.state_dict()}
            state |= {"optimizer": self.optimizer.state_dict(), "memory": self.memory}
            state |= {"epoch": self.epoch, "step": self.step, "sums": self.sums} | more
            content = io.BytesIO()  # torch.save to a full disk would raise no OSError
            torch.save(state, content)
            path = self.folder / "checkpoint.pt"
            write_atomically(path, content.getbuffer(), keep="checkpoint.prev.pt")
        self.saved = time.time()

    def resume(self) -> bool:
        """Go on from the folder's checkpoint if there is one; its configuration must be ours."""
        state = load_checkpoint(self.folder)
        if state is None:
            return False
        check_same(self.config, state["config"], self.folder)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.sums = state["sums"].to(self.device)
        self.memory = {k: v.to(self.device) for k, v in state["memory"].items()}
        return True

    def input(self, x: Tensor) -> Tensor:
        """uint8 [n,H,W,C] -> the network's input, float [n,C,H,W]."""
        x = normalise(x, *STATS[self.config.stats])
        return x.contiguous(memory_format=torch.channels_last) if self.config.channels_last else x

    def embed(self, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and features of uint8 images that come in parts: no more are floats at once."""
        amp = self.config.amp or self.config.amp_candidates
        out = [embed(self.net, self.input(x.to(self.device)), amp) for x in parts]
        logits, z = (torch.cat(t) for t in zip(*out, strict=True))
        return logits, z

    def embed_images(self, images: Images, i: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits and features of images i (all) as they are, without augmentation."""
        i = torch.arange(len(images.x)) if i is None else i
        parts = i.to(images.x.device).split(self.data.candidate_chunk)
        return self.embed(images.x[j] for j in parts)

    def shuffle(self) -> None:
        """This epoch's order of the ID and auxiliary images; a sampler's pool chooses among them.

        The pool depends on the network at the epoch's start, so a run stopped within the epoch
        keeps it in `memory`.
        """
        g = rng(self.device, self.config.seed, self.epoch, "order")
        n, sampler = len(self.train_set.x), self.method.sampler
        self.order_in = torch.randperm(n, generator=g, device=self.device)
        if self.aux_set is None:
            return
        n = len(self.aux_set.x)
        self.order_aux = torch.randperm(n, generator=g, device=self.device)
        if sampler.pool and self.step:
            self.order_aux = self.memory["pool"]
        elif sampler.pool:
            n = sampler.share * self.config.batch * self.steps
            self.order_aux = self.memory["pool"] = sampler.pool(self, self.order_aux, n, g)

    def plan(self, step: int) -> dict[str, Tensor]:
        """Positions of this rank's ID and auxiliary images of a step in the epoch's orders.

        The auxiliary images of an epoch are cut into one part for each step and rank.
        """
        c, sampler = self.config, self.method.sampler
        first = step * c.batch + self.rank * self.share
        positions = {"in": torch.arange(first, first + self.share)}
        if sampler.share:
            total = sampler.share * c.batch * self.steps
            if sampler.pick:  # the whole set each epoch (Section 6.1); a small one several times
                n = min(len(self.order_aux), c.aux_epoch)
                total = max(n, c.candidates * c.batch * self.steps)
            parts, part = self.steps * self.world, step * self.world + self.rank
            positions["aux"] = torch.arange(total * part // parts, total * (part + 1) // parts)
        return positions

    def index(self, kind: str, positions: Tensor) -> tuple[Images, Tensor]:
        """The set of a kind, and its images at these positions of the epoch's order."""
        images = self.train_set if kind == "in" else self.aux_set
        order = self.order_in if kind == "in" else self.order_aux
        i = order[positions.to(order.device) % len(order)]
        return images, i.to(images.x.device)

    def open_stream(self) -> None:
        """Have the files of the epoch's remaining steps decoded ahead, in the order of use."""
        parts, key = [], (self.config.seed, self.epoch)
        sets = {"in": self.train_set, "aux": self.aux_set}
        kinds = [k for k, images in sets.items() if images and isinstance(images.x, Files)]
        plans = (self.plan(step) for step in range(self.step, self.steps)) if kinds else ()
        for plan in plans:
            for kind in kinds:
                for p in plan[kind].split(STREAM_CHUNK):
                    seeds = [hashed(*key, kind, q) for q in p.tolist()]
                    parts.append((sets[kind].x, self.index(kind, p)[1].tolist(), seeds))
        self.stream = Stream(parts, self.data.decode != "cpu").read(self.data)

    def fetch(self, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """This step's images of a kind, cropped and flipped: uint8 [n,H,W,C], and their indices."""
        positions = self.plan(self.step)[kind]
        images, i = self.index(kind, positions)
        if not isinstance(images.x, Files):
            return augment(images.x[i].to(self.device, non_blocking=True), generator), i
        rows = []
        for _ in positions.split(STREAM_CHUNK):
            x, corrupt, error = next(self.stream)
            if error:
                raise ValueError(error)
            self.corrupt |= corrupt
            rows.append(x.to(self.device, non_blocking=True))
        return torch.cat(rows), i

    def auxiliary(self, generator: torch.Generator) -> Tensor:
        """This step's auxiliary images: drawn at random, or picked among its candidates."""
        rows, sampler = self.fetch("aux", generator)[0], self.method.sampler
        if sampler.pick:
            logits, z = self.embed(rows.split(self.data.candidate_chunk))
            rows = rows[sampler.pick(logits, z, self.share, generator)]
        return self.input(rows)

    def energy_loss(self, f_in: Tensor, f_aux: Tensor, y_in: Tensor) -> Tensor:
        """Eq. (1) with this run's margins, whatever score and margins the gradient term has."""
        s_in, s_aux = energy_score(f_in), energy_score(f_aux)
        return energy_loss(s_in, s_aux, self.config.m_in, self.config.m_aux)

    def train_step(self) -> Tensor:
        """One step of L = L_CE + λ_S L_S + λ_∇S L_∇S; returns TERMS as one tensor, no sync."""
        c, method, n = self.config, self.method, self.share
        generator = rng(self.device, c.seed, self.epoch, self.step, self.rank)
        rows, i = self.fetch("in", generator)
        x_in, y_in = self.input(rows), self.train_set.y[i.to(self.device)]
        x_aux = self.auxiliary(generator) if method.sampler.share else x_in[:0]
        aux_loss = method.loss or self.energy_loss
        if method.prepare:
            x_aux, context = method.prepare(self, x_in, x_aux, generator)
            aux_loss = functools.partial(method.loss, **context)
        gradient = method.gradient or Gradient()
        m_in = c.m_in if gradient.m_in is None else gradient.m_in
        m_aux = c.m_aux if gradient.m_aux is None else gradient.m_aux
        # The penalty every n-th step with n-fold weight has the same gradient on average, from
        # n times fewer, n times larger terms ("lazy regularisation", Karras et al. 2020).
        fold = 0 if (self.epoch * self.steps + self.step) % c.grad_every else c.grad_every
        lambda_grad = c.lambda_grad * fold if method.gradient else 0.0
        if c.reduction == "released":  # Eq. (3) / N with the N of all ranks
            lambda_grad /= self.world
        with torch.autocast(self.device.type, torch.bfloat16, enabled=c.amp):
            out = greg_loss(
                self.model, x_in, y_in, x_aux, m_in, m_aux, c.lambda_s, lambda_grad, c.reduction,
                score=gradient.score, aux_loss=aux_loss, grad_share=c.grad_share,
                generator=generator,
            )  # fmt: skip
        self.optimizer.zero_grad()
        out.loss.backward()
        t = Fraction(self.epoch * self.steps + self.step, c.epochs * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(c, t)
        self.optimizer.step()
        if self.world > 1:
            average_buffers(self.net)
        K = len(self.train_set.classes)
        correct = (out.logits[:n, :K].argmax(1) == y_in).float().mean()
        share_in = (out.scores[:n] <= m_in).float().mean()
        share_aux = (out.scores[n:] >= m_aux).float().sum() / max(1, len(x_aux))
        terms = *out[:3], fold * out.gradient, correct, share_in, share_aux
        return torch.stack([term.detach().float() for term in terms])

    def run_epoch(self) -> dict[str, float]:
        """The rest of the current epoch -> its mean TERMS. A signal saves and stops the run."""
        from tqdm import tqdm

        self.shuffle()
        self.open_stream()
        self.net.train()
        name, recent = f"{self.config.method} {self.epoch + 1}/{self.config.epochs}", []
        every = 1 if isinstance(self.train_set.x, Files) else SYNC_STEPS  # its steps are long
        bar = tqdm(total=self.steps, initial=self.step, desc=name, disable=self.rank > 0)
        with bar:
            while self.step < self.steps:
                recent.append(self.train_step())
                self.step += 1
                stop = self.stopped_by and self.world == 1  # ranks must stop together, below
                if len(recent) == every or self.step == self.steps or stop:
                    self.check(torch.stack(recent))  # the only host sync
                    recent = []
                    bar.update(self.step - bar.n)
                    bar.set_postfix({k: f"{v:.3g}" for k, v in self.means().items()})
                    if self.stopped_by:
                        self.save()
                        message = f"stopped by signal {self.stopped_by} and saved in {self.folder}"
                        raise SystemExit(f"{message}; the same command goes on from here")
                    if time.time() - self.saved > SAVE_SECONDS and self.step < self.steps:
                        self.save()
        for images in filter(None, (self.train_set, self.aux_set)):
            self.corrupt |= getattr(images.x, "corrupt", set())
        report_corrupt(self.corrupt - self.reported)
        self.reported |= self.corrupt
        return self.means()

    def means(self) -> dict[str, float]:
        """The mean TERMS of the epoch so far."""
        return dict(zip(TERMS, (self.sums / self.step).tolist(), strict=True))

    def check(self, terms: Tensor) -> None:
        """Add up the terms of the last steps; FloatingPointError for one that is not finite."""
        if self.world > 1:  # every rank sees the same means, and any rank's signal
            flag = torch.tensor(self.stopped_by, device=self.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            torch.distributed.all_reduce(terms)
            self.stopped_by, terms = int(flag), terms / self.world
        bad = ~terms.isfinite()
        if bad.any():
            row = int(bad.any(1).nonzero()[0])
            names = [name for name, b in zip(TERMS, bad[row].tolist(), strict=True) if b]
            name = (names[1:] or names)[0]  # the first part that is not finite, else their sum
            where = f"epoch {self.epoch + 1}, step {self.step - len(terms) + row + 1}"
            raise FloatingPointError(
                f"the {name} term is {terms[row, TERMS.index(name)]:g} at {where}; usual causes: "
                "a learning rate or lambda_grad that is too large, or weights trained with another "
                f"normalisation (--stats). What was saved before stays in {self.folder}"
            )
        self.sums += terms.sum(0)

    def probe(self) -> dict[str, float]:
        """Figure 3, on fixed images in eval mode: energy loss, ‖∇S‖, mean scores, accuracy."""
        self.net.eval()
        sets = {"in": self.train_set} | ({"aux": self.aux_set} if self.aux_set else {})
        row, s, stats = {}, {}, STATS[self.config.stats]
        for k, images in sets.items():
            x = normalise(images.x[:256].to(self.device), *stats)
            logits = embed(self.net, x)[0]
            s[k] = energy_score(logits)
            row[f"probe_s_{k}"] = s[k].mean()
            row[f"probe_gradient_{k}"] = input_gradients(self.net, x).mean()
            if k == "in":
                correct = logits[:, : len(images.classes)].argmax(1) == images.y[:256]
                row["probe_accuracy"] = correct.float().mean()
        if "aux" in s:
            margins = self.config.m_in, self.config.m_aux
            row["probe_energy"] = energy_loss(s["in"], s["aux"], *margins)
        return {k: v.item() for k, v in row.items()}

    def log(self, row: dict[str, float]) -> None:
        """Append to log.jsonl; rows after the checkpoint that was resumed from are replaced."""
        if self.rank:
            return
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        lines = [line for line in lines if json.loads(line)["epoch"] < row["epoch"]]
        write_atomically(path, "".join(line + "\n" for line in [*lines, json.dumps(row)]))

    def run(self) -> None:
        """Train from where the folder's checkpoint stands, or from the start, to the last epoch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.resume():
            self.log({"epoch": 0} | self.probe())
        if self.rank == 0:
            write_json(self.folder / "config.json", asdict(self.config) | environment())
        with interrupts(self):
            while self.epoch < self.config.epochs:
                start = time.time()
                row = self.run_epoch()
                self.epoch, self.step = self.epoch + 1, 0
                self.sums.zero_()
                row = {"epoch": self.epoch} | row | self.probe()
                self.log(row | {"seconds": time.time() - start})
                self.save()
                if self.rank == 0:
                    warn_of_collapse(self.folder, row, self.config)


def chunk_of(size: int, most: int = 250) -> int:
    """How many images of this side fit in memory with their gradients (10 GB, DenseNet-121)."""
    return min(most, max(1, most * 128**2 // size**2))


def input_gradients(net: nn.Module, x: Tensor) -> Tensor:
    """‖∇S(x_i)‖₂ for each of x [N,...] in the space of x; `net` must be in eval mode."""
    norms = []
    for part in x.split(chunk_of(x.shape[-1])):
        part = part.detach().requires_grad_()
        (g,) = torch.autograd.grad(energy_score(net(part)).sum(), part)
        norms.append(torch.linalg.vector_norm(g.flatten(1), dim=1))
    return torch.cat(norms)


def warn_of_collapse(folder: Path, row: dict[str, float], config: Config) -> None:
    """ID accuracy more than 10 points below its start: say so, and suggest other margins.

    The energy authors' advice: margins near the pre-trained network's mean scores.
    """
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    before, now = first["probe_accuracy"], row["probe_accuracy"]
    if config.init and now < before - 0.1:
        advice = ""
        if METHODS[config.method].loss in (None, balanced_energy_loss):
            margins = f"--m-in {first['probe_s_in']:.1f} --m-aux {first['probe_s_aux']:.1f}"
            advice = f"; margins nearer to the pre-trained mean scores are kinder: {margins}"
        fell = f"accuracy on 256 training images fell from {before:.1%} to {now:.1%}"
        print(f"warning: {fell}{advice}", file=sys.stderr)


@contextlib.contextmanager
def interrupts(trainer: Trainer) -> Iterator[None]:
    """SIGTERM and Ctrl-C let the running step end, save and stop; a second one stops at once."""

    def stop(number: int, frame: object) -> None:
        if trainer.stopped_by:
            raise KeyboardInterrupt
        trainer.stopped_by = number

    old = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def environment() -> dict[str, Any]:
    """What produced a result besides its configuration."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device or platform.machine(),
        "processes": world()[1],
        "greg": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12],
        "argv": " ".join(sys.argv),
    }


# ==================================================================================================
# 9  Evaluation, tables, figures, command line (Section 6)
# Needs: everything above
# ==================================================================================================


def score_images(
    net: Net, images: Images, K: int, stats: str, names: Sequence[str], fit: Fit | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Every named score [N] of a set of images, on the CPU, and the predicted of K classes [N]."""
    device, (rank, size), n = net.fc.weight.device, world(), len(images.x)
    columns: dict[str, list[Tensor]] = {name: [] for name in ("class", *names)}
    chunk = chunk_of(images.x.shape[1])
    for i in torch.arange(n)[rank::size].split(chunk):  # each process its share of the images
        x = batch(images.x, i, *STATS[stats], device)
        logits, z = embed(net, x)
        columns["class"].append(logits[:, :K].argmax(1))
        for name in names:
            columns[name].append(SCORES[name](net, x, logits[:, :K], z, fit).detach())
    scores = {name: gathered(torch.cat(parts), n) for name, parts in columns.items()}
    return scores, scores.pop("class")


def fit_to(net: Net, train_set: Images, config: Config) -> Fit:
    """Fit the post-hoc scores to the training images, as they are at test time."""
    device, stats = net.fc.weight.device, STATS[config.stats]
    parts = torch.arange(len(train_set.x)).split(chunk_of(train_set.x.shape[1]))
    z = torch.cat([embed(net, batch(train_set.x, i, *stats, device))[1] for i in parts])
    K = len(train_set.classes)
    p = post_hoc(config.id, config.arch, K)
    return fit_scores(net, z, train_set.y.to(device), p, stats[1], K)


def evaluate(
    net: Net,
    train_set: Images,
    test_set: Images,
    ood: dict[str, Images],
    config: Config,
    names: Sequence[str],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Section 6: ID accuracy, and for each score the metrics on each OOD set and their mean.

    Returns the results, with γ = the threshold of FPR95 for each score and the mean ‖∇S‖ over
    1,000 images of each set (S of all outputs, K+1 included), and the raw scores by "score/set".
    """
    net.eval()
    fit = fit_to(net, train_set, config) if NEED_FIT & set(names) else None
    K = len(train_set.classes)
    raw, gamma, norms, metrics = {}, {}, {}, {name: {} for name in names}
    for key, images in {"id": test_set, **ood}.items():
        scores, classes = score_images(net, images, K, config.stats, names, fit)
        first = torch.arange(min(1000, len(images.x)))
        x = batch(images.x, first, *STATS[config.stats], net.fc.weight.device)
        norms[key] = input_gradients(net, x).mean().item()
        raw |= {f"{name}/{key}": s for name, s in scores.items()}
        if key == "id":
            accuracy = (classes == images.y.cpu()).double().mean().item()
            gamma = {name: threshold(s) for name, s in scores.items()}
            continue
        for name, s in scores.items():
            metrics[name][key] = ood_metrics(raw[f"{name}/id"], s, key)
    for sets in metrics.values():
        keys = "fpr95", "auroc", "aupr_in", "aupr_out", "fpr95_ood_positive"
        sets["mean"] = {k: sum(m[k] for m in sets.values()) / len(sets) for k in keys}
    results = {"accuracy": accuracy, "gamma": gamma, "gradient_norm": norms, "metrics": metrics}
    return results, raw


def save_results(folder: Path, results: dict[str, Any], raw: dict[str, Tensor]) -> None:
    """scores.npz, results.md, and last results.json, which marks a run as finished."""
    import numpy as np

    arrays = io.BytesIO()
    np.savez_compressed(arrays, **{key: s.numpy() for key, s in raw.items()})
    write_atomically(folder / "scores.npz", arrays.getbuffer())
    write_atomically(folder / "results.md", results_table([results]))
    write_json(folder / "results.json", results)


def read_results(folder: Path) -> dict[str, Any] | None:
    """The results of a finished run, None of an unfinished one."""
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def train(config: Config, folder: Path, device: torch.device, data: DataOptions) -> dict[str, Any]:
    """Train `config` in `folder`, evaluate, save -> the results.

    Goes on from the folder's checkpoint; a finished run is only read. ValueError if the folder
    holds a run of another configuration.
    """
    config = resolve(config)
    done = read_results(folder)
    if done is not None:
        check_same(config, done["config"], folder)
        asked = {spec.partition("=")[0] for spec in data.ood} - {"synthetic", "available"}
        if not asked <= set(done["gradient_norm"]):
            message = f"{folder} is finished, on other OOD sets; evaluate it on {', '.join(asked)}"
            raise ValueError(f"{message} with greg.py eval")
        return done
    train_set, test_set, ood, left_out = data.load(config.id, config.size)
    size, aux = train_set.x.shape[1], None
    if METHODS[config.method].sampler.share:
        options = {"size": size, "skip_corrupt": data.skip_corrupt}
        aux = load_aux(config.aux, data.root, data.download, **options)
        aux = _on(device, aux, config.n_aux)
    train_set = _on(device, train_set, config.n_train)
    trainer = Trainer(config, folder, train_set, aux, device, data)
    trainer.run()
    score = METHODS[config.method].score
    names = [score] if config.aux else POST_HOC_ROWS
    results, raw = evaluate(trainer.net, trainer.train_set, test_set, ood, config, names)
    results |= {"config": asdict(config), "left_out": left_out, "score": score}
    trainer.save(gamma=results["gamma"][score], score=score)
    if trainer.rank == 0:
        save_results(folder, results | environment(), raw)
    if trainer.world > 1:  # another run may start from these files
        torch.distributed.barrier()
    return results


VARIANTS = (  # an option of Config, its usual value, and what a row with another is called
    ("reduction", "paper", ", {}"),
    ("lambda_grad", 1, ", λ_∇S = {:g}"),
    ("grad_every", 1, ", every {} steps"),
    ("grad_share", 1, ", {:g} of the images"),
)


def results_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs that differ in the seed alone become one row: {column: {seed: value}}.

    A run that was evaluated twice is one seed, with the values that come later in `results`.
    """
    rows: dict[str, dict[str, Any]] = {}
    for r in results:
        c = {f.name: r["config"].get(f.name, f.default) for f in fields(Config)}
        seed = c.pop("seed"), c.pop("init")
        for score, sets in r["metrics"].items():
            name = c["method"] + ("" if score == r["score"] else f": {score}")
            name += "".join(text.format(c[k]) for k, usual, text in VARIANTS if c[k] != usual)
            row = rows.setdefault(json.dumps([c, name]), {"name": name, "arch": c["arch"]})
            norms = {k: v for k, v in r["gradient_norm"].items() if k != "id"}
            cells = {"accuracy": r["accuracy"], "grad_in": r["gradient_norm"]["id"]}
            cells["grad_out"] = sum(norms.values()) / len(norms)
            for set_name, m in sets.items():
                cells |= {f"{set_name} FPR95": m["fpr95"], f"{set_name} AUROC": m["auroc"]}
            for column, value in cells.items():
                row.setdefault(column, {})[seed] = value
    return list(rows.values())


def mean_std(values: Iterable[float], scale: float = 100) -> str:
    """ "mean ± sample standard deviation", in percent; of a single seed just its value."""
    values = [scale * v for v in values]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """FPR95 / AUROC on each OOD set and their mean, ID accuracy and ‖∇S‖, one row a method."""
    rows = results_rows(results)
    sets = list(dict.fromkeys(k[:-6] for row in rows for k in row if k.endswith(" FPR95")))
    sets = [k for k in sets if k != "mean"] + ["mean"]
    header = ["network", "method", "seeds", "ID accuracy", *sets, "‖∇S‖ ID", "‖∇S‖ OOD"]
    lines = []
    for row in rows:
        cells = [
            " / ".join(
                mean_std(row[f"{k} {m}"].values()) if f"{k} {m}" in row else "not run"
                for m in ("FPR95", "AUROC")
            )
            for k in sets
        ]
        norms = [mean_std(row[k].values(), scale=1) for k in ("grad_in", "grad_out")]
        accuracy = mean_std(row["accuracy"].values())
        lines.append([row["arch"], row["name"], len(row["accuracy"]), accuracy, *cells, *norms])
    data = sorted(
        {f"ID {r['config']['id']}, auxiliary {r['config']['aux'] or 'none'}" for r in results}
    )
    left_out = sorted({name for r in results for name in r["left_out"]})
    note = f"Cells: FPR95 / AUROC in %. Data: {'; '.join(data)}."
    if left_out:
        note += f" Left out: {', '.join(left_out)}."
    return markdown(header, lines) + "\n" + note + "\n"


def load_run(
    folder: Path, device: torch.device, finished: bool = False
) -> tuple[Net, dict[str, Any]]:
    """A run's network in eval mode and its checkpoint. FileNotFoundError without one."""
    state = load_checkpoint(folder)
    if state is None:
        raise FileNotFoundError(f"no checkpoint in {folder}; train there first: greg.py train")
    if finished and "gamma" not in state:
        raise ValueError(f"{folder} is not finished, so it has no threshold; train it to its end")
    net = build(state["config"]["arch"], len(state["net"]["fc.bias"]))
    net.load_state_dict(state["net"])
    return net.to(device).eval(), state


def predict(folder: Path, paths: Sequence[str], device: torch.device) -> list[dict[str, Any]]:
    """Class, score S, threshold γ and ID/OOD decision (ID iff S <= γ) of each image file."""
    net, state = load_run(folder, device, finished=True)
    config, gamma, name, rows = state["config"], state["gamma"], state["score"], []
    if name in NEED_FIT:
        message = f"{folder} is scored by {name}, which needs training images"
        raise ValueError(f"{message}: greg.py eval does that, predict has none")
    K = len(state["classes"])
    for path in paths:
        images = Images(load_image(path, state["size"]), None, path)
        scores, classes = score_images(net, images, K, config["stats"], [name])
        s = scores[name].item()
        label = state["classes"][classes.item()]
        decision = "ID" if s <= gamma else "OOD"
        rows.append(
            {"image": path, "class": label, "score": s, "gamma": gamma, "decision": decision}
        )
    return rows


def figure_3(folders: Sequence[Path], path: Path) -> None:
    """Figure 3: energy loss and ‖∇S‖ over training, one line a run, from each run's log.jsonl."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for folder in folders:
        if not (folder / "log.jsonl").exists():
            raise FileNotFoundError(f"no log.jsonl in {folder}; a run of greg.py train writes it")
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        epochs = [row["epoch"] for row in rows]
        if "probe_energy" not in rows[0]:
            raise ValueError(f"{folder} trained without auxiliary data: it has no energy loss")
        left.plot(epochs, [row["probe_energy"] for row in rows], label=str(folder))
        right.plot(epochs, [row["probe_gradient_in"] for row in rows], label=str(folder))
    left.set(xlabel="epoch", ylabel="energy loss, Eq. (1)")
    right.set(xlabel="epoch", ylabel="mean ‖∇S‖ on ID images")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def figure_scores(folder: Path, path: Path) -> None:
    """Histograms of the score S on ID and on each OOD set, with the threshold γ."""
    import numpy as np
    from matplotlib.figure import Figure

    results = read_results(folder)
    if results is None:
        raise FileNotFoundError(f"{folder} holds no finished run: no results.json")
    score = results["score"]
    with np.load(folder / "scores.npz") as arrays:
        sets = {k.split("/")[1]: arrays[k] for k in arrays if k.split("/")[0] == score}
    edges = np.histogram_bin_edges(np.concatenate(list(sets.values())), bins=80)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, s in sets.items():
        filled = {"histtype": "stepfilled", "alpha": 0.3} if name == "id" else {"histtype": "step"}
        axes.hist(s, edges, density=True, label=name, **filled)
    axes.axvline(results["gamma"][score], color="black", linestyle="--", label="γ")
    axes.set(xlabel="score S (low: ID)", ylabel="density")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


# The paper's tables: row -> (method, test score, its figures in the order of COLUMNS).
PAPER: dict[int, dict[str, tuple[str, str, str]]] = {
    1: {
        "MSP": ("ce", "msp", "58.04 90.49 51.52 90.8 52.56 91.7"),
        "ODIN": ("ce", "odin", "34.46 91.59 35.23 89.82 24.88 94.42"),
        "Energy score": ("ce", "energy", "39.32 92.24 33.4 91.76 28.99 94.09"),
        "ReAct": ("ce", "react", "39.44 92.30 37.54 91.49 25.83 95.27"),
        "DICE": ("ce", "dice", "42.40 91.25 34.12 91.74 26.37 94.61"),
        "LINe": ("ce", "line", "45.25 90.59 36.27 90.2 14.84 96.95"),
        "OE": ("oe", "msp", "19.92 95.71 21.12 95.55 21.76 95.8"),
        "Energy loss": ("energy", "energy", "11.14 97.53 13.11 97.14 11.26 97.43"),
        "OpenMix": ("openmix", "msp", "22.24 96.26 21.92 96 22.86 95.65"),
        "GReg": ("greg", "energy", "7.9 97.95 7.95 98.1 7.93 98.12"),
    },
    2: {
        "MSP": ("ce", "msp", "74.66 80.10 80.39 75.37 85.87 68.78"),
        "ODIN": ("ce", "odin", "64.00 84.33 67.95 79.86 69.97 81.55"),
        "Energy score": ("ce", "energy", "68.46 84.15 74.15 79.26 78.91 76.12"),
        "ReAct": ("ce", "react", "59.38 87.59 70.65 80.2 76.27 80.1"),
        "DICE": ("ce", "dice", "77.29 80.35 72.32 79.62 69.80 80.50"),
        "LINe": ("ce", "line", "72.09 82.93 67.5 80.9 35.16 88.72"),
        "OE": ("oe", "msp", "77.32 63.89 74.22 65.70 60.52 84.21"),
        "Energy loss": ("energy", "energy", "62.77 84.05 65.62 80.18 64.37 83.86"),
        "POEM": ("poem", "energy", "61.11 82.43 62.58 79.74 59.33 79.81"),
        "OpenMix": ("openmix", "msp", "59.64 88.09 73.12 79.23 67.29 84.47"),
        "DOS": ("dos", "absent", "54.62 88.30 45.26 90.76 34.92 93.22"),
        "GReg": ("greg", "energy", "59.6 82.92 58.26 86.56 56.29 87.35"),
        "GReg+": ("greg+", "energy", "50.78 88.75 48.12 91.02 30.55 93.38"),
    },
    3: {
        "MSP": ("ce", "msp", "62.6 87.09 64.3 86.64 62.3 86.72 78.3 75.03 66.87 83.87"),
        "ODIN": ("ce", "odin", "48.5 92.07 53.9 90.77 49.3 91.06 69.6 80.77 55.32 88.66"),
        "Energy score": ("ce", "energy", "54 90.77 52.5 90.7 46.6 91.37 73.1 77.54 56.55 87.59"),
        "ReAct": ("ce", "react", "51.88 91.52 52.48 90.81 49.56 90.92 64.61 83.77 54.63 89.25"),
        "DICE": ("ce", "dice", "32.86 93.6 41.35 92.9 45.82 91.58 65.2 78.61 46.3 89.17"),
        "LINe": ("ce", "line", "29.47 93.77 37.29 92.85 38.85 92.16 52.32 86.38 39.48 91.29"),
        "OE": ("oe", "msp", "34.56 92.75 54.63 89.75 54.86 89.05 76.2 75.55 55.06 86.78"),
        "Energy loss": (
            "energy",
            "energy",
            "18.44 95.91 50.19 90.37 49.32 90.47 62.96 77.78 45.23 88.63",
        ),
        "DOS": ("dos", "absent", "61.63 88.68 42.69 93.23 45.49 93.37 47.45 92.63 49.31 91.97"),
        "GReg": ("greg", "energy", "29.54 94.94 45.86 92.53 45.35 92.06 68.29 80.98 47.26 90.13"),
        "GReg+": ("greg+", "energy", "24.11 95 33.98 92.31 32.89 92.7 49.32 88.22 35.08 92.06"),
    },
    4: {
        "OE": ("oe", "msp", "21.76 95.8 60.52 84.21"),
        "OE + Grad": ("oe+grad", "msp", "18.79 96.32 62.54 84.71"),
        "Energy": ("energy", "energy", "11.26 97.43 64.37 83.86"),
        "Energy + Grad": ("greg", "energy", "7.93 98.12 56.29 87.35"),
        "POEM": ("poem", "energy", "29.15 94.18 59.33 79.81"),
        "POEM + Grad": ("poem+grad", "energy", "23.87 95.41 47.94 86.63"),
    },
    5: {
        "POEM": ("poem", "energy", "59.33 79.81"),
        "DOS": ("dos", "absent", "34.92 93.22"),
        "Energy only clustering": ("energy+sampling", "energy", "31.77 93.20"),
        "GReg+": ("greg+", "energy", "30.55 93.38"),
    },
    6: {
        "Clean": ("ce", "energy", "94.84 94.03"),
        "Energy loss": ("energy", "energy", "88.15 91.82"),
        "GReg": ("greg", "energy", "89.55 92.14"),
        "DOS": ("dos", "absent", "78.90 87.06"),
        "GReg+": ("greg+", "energy", "83.06 89.89"),
    },
}
CIFAR_ARCHS = "resnet18", "wrn40_2", "densenet100"
BOTH = "fpr95", "auroc"
# Columns of each table: (ID data, network, OOD set, metric).
COLUMNS = {
    1: [("cifar10", arch, "mean", m) for arch in CIFAR_ARCHS for m in BOTH],
    2: [("cifar100", arch, "mean", m) for arch in CIFAR_ARCHS for m in BOTH],
    3: [("imagenet", "densenet121", key, m) for key in (*IMAGENET_OOD, "mean") for m in BOTH],
    4: [(id, "densenet100", "mean", m) for id in ("cifar10", "cifar100") for m in BOTH],
    5: [("cifar100", "densenet100", "mean", m) for m in BOTH],
    6: [("cifar10", arch, "", "accuracy") for arch in ("wrn40_2", "densenet100")],
}


def table_columns(number: int, id: str = "", archs: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """The columns of a table, on other ID data or other networks where these are given."""
    columns = COLUMNS[number]
    if archs:
        columns = [(c[0], a, *c[2:]) for a in archs for c in columns if c[1] == columns[0][1]]
    return [(id or c[0], *c[1:]) for c in columns]


def cell_values(
    results: Sequence[dict[str, Any]], method: str, score: str, column: tuple[str, ...]
) -> list[float]:
    """A table cell: one value in percent for each finished seed; empty if there is none."""
    id, arch, key, metric = column
    values = []
    for r in results:
        if tuple(r["config"][k] for k in ("id", "arch", "method")) != (id, arch, method):
            continue
        if metric == "accuracy":
            values.append(100 * r["accuracy"])
        elif key in r["metrics"].get(score, {}):
            values.append(100 * r["metrics"][score][key][metric])
    return values


def paper_table(
    number: int, results: Sequence[dict[str, Any]], id: str = "", archs: Sequence[str] = ()
) -> tuple[str, list[dict[str, Any]]]:
    """Table `number` as Markdown and as JSON rows: ours, mean ± std over seeds, (the paper's)."""
    columns, lines, cells = table_columns(number, id, archs), [], []
    for label, (method, score, figures) in PAPER[number].items():
        paper, line = dict(zip(COLUMNS[number], figures.split(), strict=True)), [label]
        for column in columns:
            values = cell_values(results, method, score, column)
            figure = paper.get(column)
            ours = mean_std(values, scale=1) if values else "not run"
            line.append(ours if figure is None else f"{ours} ({figure})")
            cells.append(
                {"row": label, "column": column, "seeds": values, "paper": figure and float(figure)}
            )
        lines.append(line)
    missing = sum(not cell["seeds"] for cell in cells)
    header = [
        "method",
        *(" ".join(filter(None, (Path(c[0]).stem.partition(":")[0], *c[1:]))) for c in columns),
    ]
    text = f"Table {number}: ours in %, mean ± std over seeds (the paper's figure). "
    text += f"{missing} of {len(cells)} cells not run.\n\n{markdown(header, lines)}"
    used = {method for method, *_ in PAPER[number].values()}
    notes = {data_note(r) for r in results if r["config"]["method"] in used}
    return text + "".join(f"\n- {note}" for note in sorted(notes)) + "\n", cells


def data_note(r: dict[str, Any]) -> str:
    """Which data and how much training a result was made on."""
    c = r["config"]
    size = f" (first {c['n_train']})" if c["n_train"] else ""
    aux = f", auxiliary {c['aux']}" if c["aux"] else ""
    start = "fine-tuned" if c["init"] else "from scratch"
    left = f"; left out: {', '.join(r['left_out'])}" if r["left_out"] else ""
    epochs = f"{c['epochs']} epochs" if c["epochs"] > 1 else "1 epoch"
    ood = ", ".join(k for k in r["gradient_norm"] if k != "id")
    return f"{c['method']}: ID {c['id']}{size}{aux}, {start}, {epochs}; OOD {ood}{left}"


def table_runs(args: argparse.Namespace) -> dict[Path, Config]:
    """The runs that a table needs, by their folders, pre-training before what starts from it."""
    methods = args.methods or list({method: None for method, *_ in PAPER[args.number].values()})
    columns, runs = table_columns(args.number, args.id, args.archs), {}
    if any(fine_tunes(method, id) for method in methods for id, *_ in columns):
        methods = ["ce", *(m for m in methods if m != "ce")]
    of_gradient = {name for name, *_ in VARIANTS}  # options that mean nothing to the others
    for id, arch in dict.fromkeys(c[:2] for c in columns):
        for seed in args.seeds:
            run = given(Config, args) | {"id": id, "arch": arch, "seed": seed}
            start = run_folder(args.runs, Config(**run | {"method": "ce"}))
            for method in methods:
                init = str(start) if fine_tunes(method, id) else ""
                void = set() if METHODS[method].gradient else of_gradient
                own = {k: v for k, v in run.items() if k not in void}
                config = Config(**own | {"method": method, "init": init})
                runs[run_folder(args.runs, config)] = config
    return runs


def _score(net: nn.Module, x: Tensor, chunk: int = 512) -> Tensor:
    with torch.no_grad():
        return torch.cat([energy_score(net(v)) for v in x.split(chunk)])


def worst_scores(
    net: nn.Module,
    x: Tensor,
    sign: float,
    epsilons: Sequence[float],
    clamp: tuple[float, float] | None,
    generator: torch.Generator,
) -> dict[float, Tensor]:
    """The worst S found by attacks within each eps: a larger ball holds what a smaller one does."""
    options = {"steps": 20, "clamp": clamp, "generator": generator}
    worst, found = sign * _score(net, x), {}
    for eps in sorted(epsilons):
        parts = [attack_scores(net, v, eps, sign, **options)[1] for v in x.split(512)]
        worst = torch.maximum(worst, sign * torch.cat(parts))
        found[eps] = sign * worst
    return found


def lowest_scores(net: nn.Module, x: Tensor, eps: float, lipschitz: float, local: bool) -> Tensor:
    """Lower bounds of S on B(x_i, eps) from the global constant and, if `local`, the local one."""
    if local:
        return torch.cat([score_bounds(net, v, eps, lipschitz)[0] for v in x.split(64)])
    return torch.cat([_exact_scores(net, v) for v in x.split(64)]) - eps * lipschitz


def certify_report(
    net: nn.Module,
    x_in: Tensor,
    x_out: dict[str, Tensor],
    epsilons: Sequence[float] = (0.05, 0.1, 0.25, 0.5),
    sigma: float = 0.1,
    n: int = 500,
    alpha: float = 0.001,
    local: bool = True,
    clamp: tuple[float, float] | None = (0.0, 1.0),
    gamma: float | None = None,
) -> dict[str, Any]:
    """Clean, attacked and certified FPR95/AUROC of OOD sets under ℓ2 perturbations of OOD inputs.

    net: on [0,1] pixels (Normalize in front), eval mode; x_in [N,...] and x_out, name -> [M,...].
    "attacked" is what PGD found, "certified" what no attack can do to S (lower bounds, global and,
    if `local`, local). "smoothed" is another detector with a threshold of its own, from medians
    under other noise; at ε > 0 it is certified, for each input with probability 1 - alpha. Also the
    share of ID inputs that the attack gets rejected at gamma, if given; FPR95 is always at the γ of
    x_in itself, which is also gamma's default.
    """
    draws = torch.Generator(x_in.device).manual_seed(0)
    lipschitz = lipschitz_global(net, x_in.shape[1:])
    s_in = _score(net, x_in)
    gamma = threshold(s_in) if gamma is None else gamma

    def noisy(x: Tensor) -> Tensor:
        score = lambda v: energy_score(net(v))  # noqa: E731
        return torch.cat([noisy_scores(score, v, sigma, n, draws) for v in x.split(64)])

    def metrics(s: Tensor, s_ref: Tensor) -> dict[str, float]:
        return {"fpr95": fpr_at_tpr(s_ref, s), "auroc": auroc(s_ref, s)}

    smooth_in = noisy(x_in).median(1).values
    smooth_gamma = threshold(smooth_in)
    radius_in = smoothed_radius(noisy(x_in), smooth_gamma, sigma, alpha)
    report: dict[str, Any] = {"gamma": gamma, "smoothed_gamma": smooth_gamma, "sets": {}}
    report |= {"lipschitz_global": lipschitz, "sigma": sigma, "n": n, "alpha": alpha}
    worst = worst_scores(net, x_in, 1.0, epsilons, clamp, draws)
    report["id_rejected"] = {eps: (s > gamma).double().mean().item() for eps, s in worst.items()}
    report["mean_radius_id"] = (-radius_in).clamp(min=0).mean().item()
    for name, x in x_out.items():
        noise = noisy(x)
        radius = smoothed_radius(noise, smooth_gamma, sigma, alpha)
        clean = metrics(_score(net, x), s_in)
        smoothed = metrics(noise.median(1).values, smooth_in)
        rows = {0.0: {"attacked": clean, "certified": clean, "smoothed": smoothed}}
        for eps, s_worst in worst_scores(net, x, -1.0, epsilons, clamp, draws).items():
            rows[eps] = {
                "attacked": metrics(s_worst, s_in),
                "certified": metrics(lowest_scores(net, x, eps, lipschitz, local), s_in.double()),
                "smoothed": {"fpr95": (radius <= eps).double().mean().item()},
            }
        report["sets"][name] = {"rows": rows, "mean_radius": radius.clamp(min=0).mean().item()}
    return report


def certify_table(report: dict[str, Any]) -> str:
    """The report as Markdown: FPR95 / AUROC in %, one row for each set and eps."""

    def cell(v: dict[str, float]) -> str:
        return " / ".join(f"{100 * v[k]:.1f}" for k in ("fpr95", "auroc") if k in v)

    kinds = "attacked", "certified", "smoothed"
    lines = [
        [name, f"{eps:g}", *(cell(row[k]) for k in kinds)]
        for name, results in report["sets"].items()
        for eps, row in results["rows"].items()
    ]
    rejected = ", ".join(f"{100 * v:.1f} at {e:g}" for e, v in report["id_rejected"].items())
    radii = ", ".join(f"{k} {v['mean_radius']:.3f}" for k, v in report["sets"].items())
    header = ["OOD set", "ℓ2 ε", "attacked", "certified", f"smoothed, σ = {report['sigma']:g}"]
    return (
        markdown(header, lines)
        + f"\nFPR95 / AUROC in %; ε = 0 is clean. ID rejected under attack, %: {rejected}.\n"
        + f"Mean radius of smoothing: ID {report['mean_radius_id']:.3f}, {radii}.\n"
    )


def certify_figure(report: dict[str, Any], path: Path) -> None:
    """FPR95 over ε, a panel for each OOD set: attacked below, certified above."""
    from matplotlib.figure import Figure

    sets = report["sets"]
    figure = Figure(figsize=(3.2 * len(sets), 3), layout="constrained")
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    for axes, (name, v) in zip(panels, sets.items(), strict=True):
        for kind, style in ("attacked", "C3-"), ("certified", "C0-"), ("smoothed", "C2--"):
            axes.plot(list(v["rows"]), [100 * r[kind]["fpr95"] for r in v["rows"].values()], style)
        axes.set(title=name, xlabel="ℓ2 ε in [0,1] pixels", ylim=(-3, 103))
    figure.axes[0].set_ylabel("FPR95 in %")
    figure.axes[-1].legend(["attacked", "certified", "smoothed, certified"], fontsize=7)
    figure.savefig(path, dpi=150)


def toy(n: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The plane: n points of three ID clusters, their labels, and n auxiliary points around."""
    y = torch.randint(3, (n,), generator=g)
    angle = y * (2 * math.pi / 3) + math.pi / 2
    centre = torch.stack([angle.cos(), angle.sin()], 1)
    x_in = centre + 0.13 * torch.randn(n, 2, generator=g)
    x_aux = 6 * torch.rand(8 * n, 2, generator=g) - 3
    centres = torch.stack([centre[(y == k).nonzero()[0, 0]] for k in range(3)])
    return x_in, y, x_aux[torch.cdist(x_aux, centres).amin(1) > 0.65][:n]


def train_toy(lambda_grad: float, seed: int = 0, steps: int = 1500) -> nn.Module:
    """A 2-32-32-3 network on the toy by GReg; margins -6 and -2 suit its small logits."""
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    for p in net.parameters():
        p.data = (torch.rand(p.shape, generator=g) * 2 - 1) / p.shape[-1] ** 0.5
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        x_in, y, x_aux = toy(128, g)
        optimiser.zero_grad()
        greg_loss(net, x_in, y, x_aux, -6.0, -2.0, 0.1, lambda_grad).loss.backward()
        optimiser.step()
    return net.double().eval()


def figure_1(path: Path, seed: int = 0, steps: int = 1500, points: int = 40) -> dict[str, Any]:
    """Figure 1 as an experiment: S on the plane, γ, certified balls (solid) and attacks (dotted).

    Draws `path`; returns, without and with the gradient term, FPR95, mean ‖∇S‖, and for either side
    the median ratio of attack distance to certified radius of each bound: 1 would be exact.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    figure, results = Figure(figsize=(9.5, 4.4), layout="constrained"), {}
    axis = torch.linspace(-2.2, 2.2, 200, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    for axes, lambda_grad in zip(figure.subplots(1, 2), (0.0, 0.1), strict=True):
        net, g = train_toy(lambda_grad, seed, steps), torch.Generator().manual_seed(seed + 1)
        x_in, _, x_out = (v.double() for v in toy(500, g))
        s_in, s_out = _score(net, x_in), _score(net, x_out)
        gamma = threshold(s_in)
        result = {"fpr95": fpr_at_tpr(s_in, s_out), "gamma": gamma}
        result |= {"ID gradient": input_gradients(net, x_in).mean().item()}
        result |= {"OOD gradient": input_gradients(net, x_out).mean().item()}
        surface = _score(net, grid).view(200, 200).T
        levels = torch.linspace(-9, 0, 28)
        image = axes.contourf(axis, axis, surface, levels, extend="both")
        figure.colorbar(image, ax=axes, label="S")
        axes.contour(axis, axis, surface, [gamma], colors="white", linewidths=1.5)
        for side, x in ("ID", x_in[s_in <= gamma]), ("OOD", x_out[s_out > gamma]):
            x = x[(x.abs() < 2).all(1)][:points]
            found, distance = certify(net, x, gamma), attack_distance(net, x, gamma, 3.0)
            radii = found.radii | {"best": found.radius}
            for name, r in radii.items():
                result[f"{side} {name}"] = (distance / r).median().item()
            result[f"{side} radius"] = found.radius.median().item()
            result[f"{side} attack"] = distance.median().item()
            colour = "white" if side == "ID" else "black"
            drawn = (v[:8].tolist() for v in (x, found.radius, distance))
            for p, r, d in zip(*drawn, strict=True):
                axes.plot(*p, ".", color=colour, markersize=3)
                for radius, style in (r, "-"), (d, ":"):
                    if radius < math.inf:
                        axes.add_patch(Circle(p, radius, fill=False, ls=style, ec=colour, lw=0.8))
        axes.set(
            title=f"λ_∇S = {lambda_grad:g}", aspect="equal", xlim=(-2.2, 2.2), ylim=(-2.2, 2.2)
        )
        results[lambda_grad] = result
    figure.savefig(path, dpi=150)
    return results


def released_step(
    net: Net, optimizer: torch.optim.Optimizer, x_in: Tensor, y_in: Tensor, candidates: Tensor
) -> None:
    """A GReg+ step by the released code's procedure, as a baseline for `bench`.

    scikit-learn's clustering with Python loops over the clusters, two forwards in training mode,
    and the Jacobian of the mean-reduced scalar.
    """
    from sklearn.cluster import KMeans

    n = len(x_in)
    f, z = embed(net, candidates, chunk=len(candidates))
    s = energy_score(f).tolist()
    labels = KMeans(n, n_init=3).fit(F.normalize(z).cpu().numpy()).labels_.tolist()
    chosen = set()
    for j in range(n):
        members = sorted((i for i in range(len(s)) if labels[i] == j), key=s.__getitem__)
        chosen |= {*members[:1], *members[-1:]}
    rest = torch.randperm(len(s)).tolist()
    fill = [i for i in rest if i not in chosen][: 2 * n - len(chosen)]
    x = torch.cat([x_in, candidates[[*chosen, *fill]]])

    def scalar(x: Tensor) -> Tensor:
        s = energy_score(net(x))
        return -F.relu(-25 - s[:n]).mean() + F.relu(s[n:] + 7).mean()

    f = net(x)
    s = energy_score(f)
    loss = F.cross_entropy(f[:n], y_in) + 0.1 * energy_loss(s[:n], s[n:])
    J = torch.autograd.functional.jacobian(scalar, x, create_graph=True)
    loss = loss + J.flatten(1).norm(dim=1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


Job = Callable[[], object]


def interleave(jobs: dict[str, Job], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every job in every round, after a round to warm up.

    The jobs take turns, so that all of them feel whatever else the machine is doing, with a pause
    in which the last one's idle threads stop spinning: scikit-learn's are not PyTorch's.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(rounds + 1):
        for name, job in jobs.items():
            time.sleep(0.3)
            start = time.perf_counter()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def bench_steps(
    arch: str, n: int, methods: Sequence[str], device: torch.device, **layout: bool
) -> tuple[dict[str, Job], dict[str, float]]:
    """A training step of each method on synthetic images, and the released procedure's GReg+.

    And what each costs by counting, in forward passes of one image: a training pass is 3 (forward,
    and backward to activations and to weights), the gradient term 3 more (backward to the images,
    and its own two backward products), a candidate 1. The released procedure runs the network
    once more for its gradient term. Methods with a pool are counted without it.
    """
    train_set, aux_set = (
        _on(device, synthetic("train"), 4 * n),
        _on(device, synthetic("aux"), 12 * n),
    )
    jobs: dict[str, Job] = {}
    passes: dict[str, float] = {}
    for method in methods:
        config = resolve(Config(method, id="synthetic", arch=arch, batch=n, init="none", **layout))
        trainer = Trainer(replace(config, init=""), Path(), train_set, aux_set)
        trainer.shuffle()
        trainer.net.train()
        row = METHODS[method]
        jobs[method] = trainer.train_step
        passes[method] = n * (6 if row.gradient else 3) * (1 + row.sampler.share)
        passes[method] += 6 * n if row.sampler.pick else 0

    def released() -> None:
        g, i = rng(device, 0), torch.arange(6 * n, device=device)
        x_in = trainer.input(augment(train_set.x[i[:n]], g))
        candidates = trainer.input(augment(aux_set.x[i], g))
        released_step(trainer.net, trainer.optimizer, x_in, train_set.y[:n], candidates)

    if importlib.util.find_spec("sklearn") and not any(layout.values()):  # in float32, as it is
        jobs["greg+, released procedure"] = released
        passes["greg+, released procedure"] = n * 9 * 3 + 6 * n
    return jobs, passes


def bench_kmeans(N: int, d: int, k: int, device: torch.device) -> tuple[dict, dict[str, list]]:
    """K-Means on N normalised features, ours and scikit-learn's, and the inertias they find."""
    g = rng(device, N, d)
    centres = torch.randn(k // 2, d, generator=g, device=device).relu()
    which = torch.randint(k // 2, (N,), generator=g, device=device)
    x = F.normalize(centres[which] + torch.randn(N, d, generator=g, device=device).relu())
    inertia: dict[str, list[float]] = {"ours": [], "scikit-learn": []}
    jobs: dict[str, Job] = {
        "ours": lambda: inertia["ours"].append(kmeans(x, k, generator=g)[2].item())
    }
    if importlib.util.find_spec("sklearn"):
        from sklearn.cluster import KMeans

        def theirs() -> None:
            inertia["scikit-learn"].append(float(KMeans(k, n_init=3).fit(host).inertia_))

        host = x.cpu().numpy()
        jobs["scikit-learn"] = theirs
    return jobs, inertia


def bench_augment(n: int, device: torch.device) -> dict[str, Job]:
    """Crops and flips of n images, torchvision's one image at a time, and a copy of the bytes."""
    from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip

    x, g = synthetic("aux", n).x.to(device), rng(device, n)
    one, rows = Compose([RandomCrop(32, 4), RandomHorizontalFlip()]), x.permute(0, 3, 1, 2)
    return {
        "ours": lambda: augment(x, g),
        "torchvision, image by image": lambda: torch.stack([one(row) for row in rows]),
        "a copy of the bytes": x.clone,
    }


def bench_metrics(n: int, device: torch.device) -> dict[str, Job]:
    """All metrics of n + n scores, the same by scikit-learn, and the sort of the scores alone."""
    s_in, s_out = torch.randn(2, n, generator=rng(device, n), device=device)
    s_out += 1
    jobs: dict[str, Job] = {"ours": lambda: ood_metrics(s_in, s_out)}
    if importlib.util.find_spec("sklearn"):
        from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

        def theirs() -> None:
            s = torch.cat([s_in, s_out]).cpu().numpy()
            y = torch.arange(2 * n).numpy() < n
            roc_auc_score(y, -s), average_precision_score(y, -s), average_precision_score(~y, s)
            roc_curve(y, -s), roc_curve(~y, s)  # FPR95, either side positive

        jobs["scikit-learn"] = theirs
    return jobs | {"the sort alone": torch.cat([s_in, s_out]).sort}


def command_bench(args: argparse.Namespace) -> None:
    """Medians and spreads of our steps and parts, as ratios within one interleaved run."""
    if args.rounds < 1:
        raise ValueError(f"--rounds must be positive, got {args.rounds}")
    device, rows = args.device, []

    def add(what: str, jobs: dict[str, Job], passes: dict[str, float] | None = None) -> None:
        seconds = interleave(jobs, args.rounds, device)
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        first = next(iter(middle))
        for name, values in seconds.items():
            spread = f"{1e3 * min(values):.1f}-{1e3 * max(values):.1f}"
            ratio = f"{middle[name] / middle[first]:.2f}"
            count = f"{passes[name] / passes[first]:.2f}" if passes else ""
            rows.append([what, name, f"{1e3 * middle[name]:.1f}", spread, ratio, count])

    layouts = [(), ("channels_last",)]
    if args.amp:
        layouts += [("channels_last", "amp_candidates"), ("channels_last", "amp")]
    for arch, layout in itertools.product(args.archs, layouts):
        options = dict.fromkeys(layout, True)
        jobs, passes = bench_steps(arch, args.batch, args.methods, device, **options)
        what = ", ".join([arch, f"{args.batch} ID images", *layout])
        add(f"step, {what.replace('amp', 'bf16')}", jobs, passes)
    for N, d, k in args.kmeans:
        jobs, inertia = bench_kmeans(N, d, k, device)
        add(f"K-Means, N = {N}, d = {d}, k = {k}", jobs)
        rows[-1][0] += "; mean inertia " + ", ".join(
            f"{sum(v) / len(v):.2f}" for v in inertia.values() if v
        )
    if args.parts:
        add("crops and flips of 1,024 images", bench_augment(1024, device))
        add("all metrics of 1,000,000 + 1,000,000 scores", bench_metrics(1_000_000, device))
    header = ["what", "job", "median ms", "spread ms", "ratio", "by counting"]
    where = f"{environment()['device']}, {torch.get_num_threads()} threads"
    where += f", torch {torch.__version__}, {args.rounds} rounds; float32 where not said otherwise."
    if device.type == "cpu" and args.system_allocator:
        where += " The system's allocator, as it is."
    print(f"{markdown(header, rows)}\n{where}")
    if not importlib.util.find_spec("sklearn"):
        print("Without scikit-learn its baselines are left out (pip install scikit-learn).")


DEMO = {"id": "synthetic", "arch": "wrn10_1", "batch": 32}  # for two CPU cores and a few minutes


def command_demo(args: argparse.Namespace) -> None:
    """Pre-train, fine-tune with and without the gradient term and sampling, and print a table."""
    data, start = DataOptions(), args.runs / "ce"
    results = [train(Config("ce", epochs=8, **DEMO), start, args.device, data)]
    short = {"epochs": 2, "n_train": 2560, "lr": 0.01, "schedule": "cosine", "init": str(start)}
    for method in "energy", "greg", "greg+":
        config = Config(method, **DEMO, **short)
        results.append(train(config, args.runs / method, args.device, data))
    results[0] |= {"metrics": {"energy": results[0]["metrics"]["energy"]}}
    print(results_table(results))
    print(f"Runs, logs and raw scores: {args.runs}. One seed, built-in synthetic images.")


def command_train(args: argparse.Namespace) -> None:
    """Train one run, or go on with it, and print its results."""
    config = Config(**given(Config, args))
    folder = args.out or run_folder(args.runs, config)
    results = train(config, folder, args.device, DataOptions(**given(DataOptions, args)))
    if world()[0] == 0:
        print(results_table([results]))
        print(f"{folder}: results.json, results.md, scores.npz, log.jsonl, checkpoint.pt")


def given(cls: type, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of Config or DataOptions among the arguments."""
    return {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}


def run_folder(runs: Path, config: Config) -> Path:
    """runs/ID/network/method/seedN."""
    released = config.reduction == "released" and METHODS[config.method].gradient
    method = config.method + ("-released" if released else "")
    id = Path(config.id).stem
    id = id if len(id) < 100 else f"{id[:40]}-{hashed(id):x}"  # a long list of classes
    return runs / id / config.arch / method / f"seed{config.seed}"


def command_eval(args: argparse.Namespace) -> None:
    """Evaluate a run, or weights without one, by the scores asked for."""
    if bool(args.run) == bool(args.weights):
        raise ValueError("name either a run folder, or --weights FILE with its --arch and --id")
    if args.run:
        if args.arch or args.id or args.stats:
            raise ValueError("--arch, --id and --stats belong to --weights; a run knows its own")
        net, state = load_run(args.run, args.device)
        config, score = saved_config(state["config"]), state.get("score", "energy")
    else:
        known = {k: getattr(args, k) for k in ("arch", "id", "stats") if getattr(args, k)}
        config, score = replace(resolve(Config("ce", **known)), init=args.weights), "energy"
    names = list(dict.fromkeys(args.scores.split(","))) if args.scores else [score]
    if unknown := [name for name in names if name not in SCORES]:
        raise ValueError(f"unknown score {unknown[0]!r}; one of {', '.join(SCORES)}")
    train_set, test_set, ood, left_out = DataOptions(**given(DataOptions, args)).load(
        config.id, config.size
    )
    train_set, K = _on(args.device, train_set, config.n_train), len(train_set.classes)
    if args.weights:
        net = build(config.arch, K, args.weights).to(args.device)
    if "absent" in names and net.fc.out_features == K:
        raise ValueError(f"{', '.join(names)}: this network has no class K + 1 to score")
    results, raw = evaluate(net, train_set, test_set, ood, config, names)
    results |= {"config": asdict(config), "left_out": left_out, "score": score} | environment()
    if world()[0]:
        return
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        save_results(args.out, results, raw)
    print(results_table([results]))


def command_predict(args: argparse.Namespace) -> None:
    """Print class, score, γ and decision of each image file."""
    rows = predict(args.run, args.images, args.device)
    print(
        markdown(
            list(rows[0]),
            [[f"{v:.3f}" if isinstance(v, float) else v for v in row.values()] for row in rows],
        )
    )


def command_table(args: argparse.Namespace) -> None:
    """Run what a table of the paper needs and print it, or print every finished run."""
    if args.number is None:
        results = [json.loads(p.read_text()) for p in sorted(args.runs.rglob("results.json"))]
        if not results:
            raise FileNotFoundError(f"no finished run below {args.runs}; greg.py train makes one")
        print(results_table(results))
        return
    runs = table_runs(args)
    for folder, config in runs.items():
        if not args.read:
            train(config, folder, args.device, DataOptions(**given(DataOptions, args)))
        elif done := read_results(folder):
            check_same(resolve(config), done["config"], folder)
    if world()[0]:
        return
    results = [r for r in map(read_results, runs) if r]
    text, cells = paper_table(args.number, results, args.id, args.archs)
    args.runs.mkdir(parents=True, exist_ok=True)
    path = args.runs / f"table_{args.number}.json"
    write_json(path, cells)
    write_atomically(path.with_suffix(".md"), text)
    print(f"{text}\n{path}")


def command_certify(args: argparse.Namespace) -> None:
    """Attack and certify a run: a table, and a figure of the curves."""
    net, state = load_run(args.run, args.device, finished=True)
    config = saved_config(state["config"])
    if state["score"] != "energy":
        raise ValueError(f"{args.run} does not decide by S = -LSE(f), the score certified here")
    _, test_set, ood, _ = DataOptions(**given(DataOptions, args)).load(config.id, config.size)

    def pixels(images: Images) -> Tensor:
        return images.x[: args.images].to(args.device).permute(0, 3, 1, 2).float() / 255

    net = nn.Sequential(Normalize(*STATS[config.stats]).to(args.device), net).eval()
    report = certify_report(
        net,
        pixels(test_set),
        {name: pixels(images) for name, images in ood.items()},
        args.eps,
        args.sigma,
        args.draws,
        local=args.local,
        gamma=state["gamma"],
    )
    folder = args.out or args.run
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "certificates.json", report)
    certify_figure(report, folder / "certificates.png")
    print(f"{certify_table(report)}\n{folder}: certificates.json, certificates.png")


def command_figure(args: argparse.Namespace) -> None:
    """Draw Figure 1, Figure 3 or the histograms of the scores."""
    out = args.out or Path(f"figure_{args.which}.png")
    if args.which != "1" and not args.folders:
        raise ValueError(f"figure {args.which} is drawn from run folders: name them")
    if args.which == "scores" and len(args.folders) > 1:
        raise ValueError("figure scores is drawn from one run folder")
    if args.which == "1":
        rows = figure_1(out)
        names = list(rows[0.0])
        lines = [[name, *(f"{row[name]:.3g}" for row in rows.values())] for name in names]
        print(markdown(["", *(f"λ_∇S = {v:g}" for v in rows)], lines))
    elif args.which == "3":
        figure_3(args.folders, out)
    else:
        figure_scores(args.folders[0], out)
    print(out)


def add_options(
    p: argparse.ArgumentParser, cls: type, without: Sequence[str] = (), **defaults: Any
) -> None:
    """One option for each field of Config or DataOptions."""
    types = {"int": int, "float": float}
    for f in fields(cls):
        if f.name in without:
            continue
        more, default = dict(f.metadata), defaults.get(f.name, f.default)
        kind = f.type.split(" ")[0]
        if kind == "bool":
            more["action"] = "store_true"
        else:
            more |= {"type": types.get(kind, str), "default": default}
            more["help"] += "" if default in (None, "", ()) else f" (default: {default})"
        p.add_argument("--" + f.name.replace("_", "-"), **more)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="greg.py", description=__doc__.split("\n\n")[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], None], text: str, runs: str = "",
        out: str = "",
    ) -> argparse.ArgumentParser:  # fmt: skip
        p = commands.add_parser(name, help=text, description=text)
        p.set_defaults(run_command=run)
        p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
        if runs:
            text = "folder of run folders (default: %(default)s)"
            p.add_argument("--runs", type=Path, default=Path(runs), help=text)
        if out:
            p.add_argument("--out", type=Path, help=out)
        return p

    text = "pre-train, fine-tune and tabulate on synthetic images"
    add("demo", command_demo, text, runs="runs/demo")
    text = "train a method, evaluate it, save everything in a run folder"
    out = "run folder (default: RUNS/ID/ARCH/METHOD/seedN)"
    p = add("train", command_train, text, runs="runs", out=out)
    add_options(p, Config)
    add_options(p, DataOptions)
    text = "evaluate a run, or a weights file, on OOD sets"
    out = "folder for results.json, results.md, scores.npz"
    p = add("eval", command_eval, text, out=out)
    p.add_argument("run", type=Path, nargs="?", help="run folder")
    p.add_argument("--weights", default="", help="a weights file, ours or a public one")
    p.add_argument("--arch", choices=ARCHS, help="its network (default: wrn40_2)")
    p.add_argument("--id", default="", help="its ID data (default: cifar10)")
    p.add_argument("--stats", default="", help="its normalisation: a key of STATS")
    p.add_argument("--scores", default="", help=f"comma-separated: {', '.join(SCORES)}")
    add_options(p, DataOptions, without=TRAINING_ONLY)
    p = add("predict", command_predict, "class, score, threshold and ID/OOD decision of images")
    p.add_argument("run", type=Path, help="folder of a finished run")
    p.add_argument("images", nargs="+", help="image files")
    text = "run what a table of the paper needs, and print it"
    p = add("table", command_table, text, runs="runs")
    p.add_argument("number", type=int, nargs="?", choices=PAPER, help="1 to 6; none: all runs")
    p.add_argument("--read", action="store_true", help="print what is finished, run nothing")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    p.add_argument("--archs", nargs="+", default=[], choices=ARCHS, help="other networks")
    p.add_argument("--methods", nargs="+", default=[], choices=METHODS, help="some of its methods")
    add_options(p, Config, without=("method", "arch", "seed", "init"), id="")
    add_options(p, DataOptions)
    text = "attack and certify a run's decisions under perturbations"
    p = add("certify", command_certify, text, out="folder of the report (default: the run's)")
    add_certify_arguments(p)
    add_options(p, DataOptions, without=TRAINING_ONLY)
    text = "time steps and clustering against the released procedure"
    add_bench_arguments(add("bench", command_bench, text))
    p = add("figure", command_figure, "draw a figure", out="PNG file")
    p.add_argument("which", choices=["1", "3", "scores"], help="Figure 1 or 3, or histograms")
    p.add_argument("folders", type=Path, nargs="*", help="run folders (3), a run folder (scores)")
    return top


TRAINING_ONLY = "workers", "decode", "candidate_chunk"  # fields of DataOptions


def add_certify_arguments(p: argparse.ArgumentParser) -> None:
    """The options of `certify`."""
    p.add_argument("run", type=Path, help="folder of a finished run")
    p.add_argument("--images", type=int, default=200, help="images of each set (default: 200)")
    p.add_argument("--eps", type=float, nargs="+", default=[0.05, 0.1, 0.25, 0.5], help="ℓ2 radii")
    p.add_argument("--sigma", type=float, default=0.1, help="noise of smoothing (default: 0.1)")
    p.add_argument("--draws", type=int, default=500, help="noise draws an image (default: 500)")
    p.add_argument("--local", action="store_true", help="local bounds too (networks of few layers)")


def add_bench_arguments(p: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    p.add_argument("--archs", nargs="+", choices=ARCHS, default=["wrn40_2", "densenet100"])
    p.add_argument("--batch", type=int, default=32, help="ID images a step (default: 32)")
    p.add_argument("--rounds", type=int, default=7, help="repetitions (default: 7)")
    p.add_argument("--amp", action="store_true", help="the steps with bfloat16 too")
    p.add_argument("--parts", action="store_true", help="augmentation and metrics too")
    text = "leave the C library's memory allocation as it is (CPU), for all jobs"
    p.add_argument("--system-allocator", action="store_true", help=text)
    sizes, text = [(384, 342, 64), (3000, 1024, 64)], "sizes of K-Means (default: %(default)s)"
    p.add_argument("--kmeans", nargs="*", type=_sizes, metavar="N,d,k", default=sizes, help=text)
    p.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["energy", "greg", "greg+"], help="steps"
    )


def _sizes(text: str) -> tuple[int, int, int]:
    """ "N,d,k" -> three integers."""
    words = text.split(",")
    N, d, k = map(int, words) if [w.isdecimal() for w in words] == [True] * 3 else (0, 0, 0)
    if not (0 < d and 0 < k <= N):
        raise argparse.ArgumentTypeError(f"need N,d,k such as 384,342,64 with k <= N, got {text!r}")
    return N, d, k


def pick_device(name: str) -> torch.device:
    """A usable torch device; "auto" is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if "LOCAL_RANK" in os.environ:  # started by torchrun
        local = int(os.environ["LOCAL_RANK"])
        name = f"cuda:{local}" if name.startswith("cuda") else name
    try:
        device = torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"no device {name!r} here: {str(e).splitlines()[0]}") from None
    if "LOCAL_RANK" in os.environ and not torch.distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except RuntimeError as e:
            reason = f"{str(e).splitlines()[0]}; another --master-port may be free"
            raise ValueError(f"the processes of torchrun do not meet: {reason}") from None
    return device


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones; elsewhere nothing happens.

    By default it returns blocks above 32 MiB to the system at once, so that every step waits for
    fresh pages: with DenseNet-BC-100 on a CPU a third of its time. For the rest of the process,
    which stays at its peak of memory.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        if not mallopt(-3, 2**30):  # M_MMAP_THRESHOLD: smaller blocks come from the heap,
            mallopt(-4, 0)  # M_MMAP_MAX, where an older glibc refuses that: all blocks do,
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: and it does not shrink


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    args = parser().parse_args(argv)
    try:
        args.device = pick_device(args.device)
        if args.device.type == "cpu" and not getattr(args, "system_allocator", False):
            keep_freed_memory()
        args.run_command(args)
        return 0
    except (ValueError, OSError, FloatingPointError, ImportError) as e:
        reason = " ".join(str(e).split())
    except torch.cuda.OutOfMemoryError:
        reason = "the GPU's memory is too small: --amp, --candidate-chunk or --batch"
    except RuntimeError as e:
        words = ("gloo", "Gloo", "NCCL", "onnection closed", "onnection reset", "Broken pipe")
        lost = "a decoding worker" if "DataLoader worker" in str(e) else "a process"
        if lost == "a process" and not (world()[1] > 1 and any(word in str(e) for word in words)):
            raise
        reason = f"{lost} was lost ({str(e).splitlines()[0][:200]})"
        reason += "; the same command goes on from the last checkpoint"
    finally:
        if world()[1] > 1:
            torch.distributed.destroy_process_group()
    print(f"greg: error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
