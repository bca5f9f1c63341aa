"""Strategies for random small networks of nearly all supported layers: of images, of sequences, of tokens.

All of them are continuous functions of their input, so that a rounding never decides between far answers: choices meet
where they change over, and of sorting only values are used. Divisors and what logarithms and roots are taken of stay
away from zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from test_capture import random, seeded
from torch import nn

Tensor = torch.Tensor
Draw = st.DrawFn
Shape = tuple[int, ...]
Function = Callable[[Tensor], Tensor]


def _first_removed(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0
    return y


def _doubled_in_place(x: Tensor) -> Tensor:
    y = x * 1.0
    y[..., -1:] *= 2
    return y.add_(0.125)


# Of values of any shape with at least two dimensions behind the batch, to values of the same shape.
ALIKE: dict[str, Function] = {
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, 1),
    "clamp": lambda x: x.clamp(-0.7, 0.4),
    "abs": lambda x: x.abs(),
    "scale": lambda x: 0.3 - x * 0.75,
    "centre": lambda x: x - x.mean(1, keepdim=True),
    "sum": lambda x: x - 0.25 * x.sum(-1, keepdim=True),
    "running sum": lambda x: x.cumsum(-1) * 0.5,
    "exp": lambda x: x.clamp(-2, 1).exp(),
    "exp2 and expm1": lambda x: torch.exp2(x.clamp(-2, 1)) - torch.expm1(x.clamp(-1, 0.5)),
    "log": lambda x: (F.softplus(x) + 0.25).log(),
    "log1p and log2": lambda x: torch.log1p(x.abs()) - torch.log2(x.clamp(min=0) + 0.5),
    "sqrt": lambda x: (x.abs() + 0.125).sqrt(),
    "rsqrt": lambda x: (x.clamp(min=0) + 0.25).rsqrt(),
    "reciprocal": lambda x: 1 / (x.abs() + 0.5),
    "quotient": lambda x: x / (1 + x * x),
    "quotient of two": lambda x: x.flip(-1) / (0.5 + x.abs()),
    "sine": lambda x: torch.sin(x) - torch.cos(x.clamp(-1, 1)),
    "erf": lambda x: torch.erf(x),
    "square": lambda x: x.clamp(-2, 2) ** 2,
    "cube": lambda x: x.clamp(-1, 1) ** 3,
    "product": lambda x: x * x.flip(-1).clamp(-1, 1),
    "softmax": lambda x: x.softmax(-1),
    "softmax along the first": lambda x: x.softmax(1),
    "log softmax": lambda x: x.log_softmax(-1),
    "spread": lambda x: x * (x.var(-1, keepdim=True, correction=0) + 0.25).rsqrt(),
    "length": lambda x: x / (1 + x.norm(dim=-1, keepdim=True)),
    "similarity": lambda x: x * F.cosine_similarity(x + 2, x.flip(-1) + 2, dim=-1)[..., None],
    "smaller": lambda x: torch.minimum(x, x.flip(-1)),
    "larger of a number": lambda x: torch.maximum(x, torch.full((1,), 0.25, dtype=x.dtype)),
    "amax": lambda x: x - x.amax(-1, keepdim=True),
    "amin": lambda x: x + x.amin(1, keepdim=True),
    "values of max": lambda x: x * 0.5 - x.max(1, keepdim=True).values,
    "where": lambda x: torch.where(x > 0.1, 2 * x - 0.2, 0.1 - x),
    "where at or below": lambda x: torch.where(x <= -0.2, -0.2, x),
    "a bit": lambda x: (x > 0).to(x.dtype) * x - (x < 0.5) * (x - 0.5),
    "logic": lambda x: torch.where((x > -0.5) & ~(x >= 0.5), x, x.clamp(-0.5, 0.5)),
    "masked": lambda x: x.masked_fill(x < 0, 0.0),
    "sign": lambda x: x.sign() * x,
    "threshold": lambda x: F.threshold(x, 0.2, 0.2),
    "sort": lambda x: x.sort(-1).values,
    "sort along the first": lambda x: x.sort(1, descending=True).values,
    "median": lambda x: x - x.median(-1, keepdim=True).values,
    "largest": lambda x: x - x.topk(1, 1).values,
    "split": lambda x: torch.cat(x.split(2, 1)[::-1], 1) - torch.cat(x.chunk(2, 1)[::-1], 1),
    "select": lambda x: x.select(1, -1)[:, None] * 0.5 + x[:, :1],
    "index": lambda x: x[:, list(range(x.shape[1]))[::-1]] - x,
    "index select": lambda x: x.index_select(-1, torch.arange(x.shape[-1]).roll(1)),
    "expand": lambda x: x[:, :1].expand_as(x) - x,
    "unbind": lambda x: torch.stack([y * 0.5 for y in x.unbind(1)], 1),
    "stack": lambda x: torch.stack([x, 0.5 - x], 1).amax(1),
    "written": _first_removed,
    "in place": _doubled_in_place,
    "outer": lambda x: (
        torch.einsum("bik,bjk->bij", x.flatten(2), x.flatten(2)).softmax(-1) @ x.flatten(2) if x.dim() == 3 else x
    ),
}
# To other shapes; of images, N x C x H x W, and of sequences, N x L x F.
OF_IMAGES: dict[str, Function] = {
    "swap": lambda x: x.transpose(-1, -2),
    "pad": lambda x: F.pad(x, (1, 0, 0, 2)),
    "pad by a value": lambda x: F.pad(x, (1, 1), value=0.5),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 0), mode="reflect"),
    "replicate": lambda x: F.pad(x, (2, 0, 0, 1), mode="replicate"),
    "every other": lambda x: x[:, :, ::2],
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "channels as rows": lambda x: x.transpose(1, 2),
    "rows as channels, folded": lambda x: x.flatten(1, 2)[:, None],
    "top three": lambda x: x.topk(3, 3).values,
    "smallest two": lambda x: x.topk(2, 2, largest=False).values,
}
UP_SAMPLING: dict[str, Function] = {
    "up": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest to a size": lambda x: F.interpolate(x, size=(5, 4)),
    "bicubic": lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic"),
}
OF_SEQUENCES: dict[str, Function] = {
    "turned": lambda x: x.transpose(1, 2),
    "products": lambda x: x @ x.transpose(1, 2) * 0.3,
    "products by einsum": lambda x: torch.einsum("bik,bjk->bji", x, x * 0.5),
    "twice as long": lambda x: torch.cat([x, 0.5 - x], 1),
    "repeat": lambda x: x.repeat_interleave(2, 2),
    "two best": lambda x: x.topk(2, 1).values,
    "shorter": lambda x: x[:, 1:],
    "heads": lambda x: x[..., None].expand(-1, -1, -1, 2).permute(0, 1, 3, 2).flatten(2),
    "padded": lambda x: F.pad(x, (0, 0, 1, 0)),
    "linear up-sampling": lambda x: F.interpolate(x, scale_factor=1.5, mode="linear"),
}
FUNCTIONS = {**ALIKE, **{f"image: {k}": f for k, f in (OF_IMAGES | UP_SAMPLING).items()}} | {
    f"sequence: {k}": f for k, f in OF_SEQUENCES.items()
}


class Apply(nn.Module):
    """A function of one tensor, by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.name](x)

    def extra_repr(self) -> str:
        return self.name


class Side(nn.Module):
    """A branch beside its input: added, concatenated, the larger of both, multiplied, or chosen by sign."""

    HOW = ("add", "cat", "larger", "product", "choice")

    def __init__(self, body: nn.Module, how: str) -> None:
        super().__init__()
        self.body, self.how = body, how

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.how == "add":
            return x + y
        if self.how == "cat":
            return torch.cat([x, y], 1)
        if self.how == "larger":
            return torch.maximum(x, y)
        if self.how == "product":
            return x * torch.tanh(y)
        return torch.where(x > 0, x * torch.sigmoid(y), x * 0.5)

    def extra_repr(self) -> str:
        return self.how


class Attend(nn.Module):
    """Attention among the pixels of an image, added to it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(channels, 4), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)
        query = self.query(pixels)
        found = F.scaled_dot_product_attention(query, query, self.value(pixels))
        return x + found.transpose(1, 2).reshape(x.shape)


class Gate(nn.Module):
    """Squeeze and excitation: every channel times a number between 0 and 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]


class Around(nn.Module):
    """A module between two moves of elements."""

    MOVES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Shape], Tensor]]] = {
        "rows of pixels": (lambda x: x.flatten(2), lambda y, s: y.view(y.shape[0], y.shape[1], *s[2:])),
        "one deep": (lambda x: x[:, :, None], lambda y, s: y.flatten(1, 2)),
        "channels first": (lambda x: x.transpose(1, 2), lambda y, s: y.transpose(1, 2)),
        "channels last": (lambda x: x.movedim(1, -1), lambda y, s: y.movedim(-1, 1)),
        "first of several": (lambda x: x, lambda y, s: y[0]),
        "batch second": (lambda x: x.transpose(0, 1), lambda y, s: y[0].transpose(0, 1)),
    }

    def __init__(self, how: str, body: nn.Module) -> None:
        super().__init__()
        self.how, self.body = how, body

    def forward(self, x: Tensor) -> Tensor:
        before, after = self.MOVES[self.how]
        return after(self.body(before(x)), x.shape)

    def extra_repr(self) -> str:
        return self.how


class Shifted(nn.Module):
    """A number of its own for every place, and a factor for every feature, as positional encodings have them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shift, self.factor = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.shift


class SelfAttention(nn.Module):
    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.body = nn.MultiheadAttention(features, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x, x, x, need_weights=False)[0]
        return out


class Head(nn.Module):
    """Features and logits of what a body gives, in the structure that `results` names; maybe of a second input too.

    gain: what the body's weights were multiplied by, so that values leave the ranges in which functions are nearly
    linear; an error inside the body grows as much.
    """

    RESULTS = ("logits", "log softmax", "sorted", "pair", "dictionary")

    def __init__(
        self, body: nn.Module, pool: nn.Module, features: int, act: nn.Module, extra: int, results: str
    ) -> None:
        super().__init__()
        self.body, self.pool, self.act, self.results = body, pool, act, results
        self.wide, self.logits = nn.Linear(features + extra, 5), nn.Linear(5, 3)
        self.gain = 1

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        pooled = self.pool(self.body(x)).flatten(1)
        hidden = self.act(self.wide(pooled if other is None else torch.cat([pooled, other], 1)))
        logits = self.logits(hidden)
        if self.results == "log softmax":
            return logits.log_softmax(1)
        if self.results == "sorted":
            return logits.topk(2, 1).values
        if self.results == "pair":
            return logits, hidden
        return {"logits": logits, "of": [pooled.mean(1), hidden.amax(1)]} if self.results == "dictionary" else logits

    def extra_repr(self) -> str:
        return self.results


@st.composite
def activations(draw: Draw, channels: int) -> nn.Module:
    kinds = [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.PReLU(channels), nn.Hardtanh(-0.5, 0.8), nn.Hardsigmoid()]
    kinds += [nn.Softshrink(0.2), nn.RReLU(), nn.Identity()]
    curved = [nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.GELU(), nn.ELU(), nn.Softplus(), nn.Hardswish(), nn.Mish()]
    curved += [nn.GELU("tanh"), nn.SELU(), nn.CELU(0.5), nn.LogSigmoid(), nn.Tanhshrink(), nn.Softsign()]
    return draw(st.sampled_from(kinds + curved))


def _named(draw: Draw, prefix: str, names: Iterable[str], shares: tuple[int, int]) -> nn.Module:
    """One of these functions; of every so many only one, so that each comes up often in some part of a suite."""
    chosen = [n for i, n in enumerate(names) if i % shares[1] == shares[0]] or [next(iter(names))]
    return Apply(prefix + draw(st.sampled_from(chosen)))


@st.composite
def image_layer(draw: Draw, shape: Shape, shares: tuple[int, int]) -> nn.Module:
    """One layer for images of that shape."""
    c, h, w = shape
    small = min(h, w) < 4
    kinds = ["conv", "depthwise", "transposed", "norm", "pool", "act", "side", "group norm", "attention", "gate"]
    functions = ["alike", "apply", "alike", "apply", "alike", "alike"]
    kind = draw(st.sampled_from([*functions, *kinds, "other dimensions", "linear", "shifted"]))
    if kind in ("conv", "depthwise") or (kind == "transposed" and h * w > 40):
        groups = c if kind == "depthwise" else 1
        outputs = c * draw(st.integers(1, 2)) if groups > 1 else draw(st.integers(1, 4))
        stride = 1 if small else draw(st.integers(1, 2))
        mode = draw(st.sampled_from(("zeros", "reflect", "replicate", "circular")))
        bias = draw(st.booleans())
        return nn.Conv2d(
            c, outputs, 3, stride, 1, groups=groups, bias=bias, padding_mode=mode if h * w > 9 else "zeros"
        )
    if kind == "transposed":
        return nn.ConvTranspose2d(c, draw(st.integers(1, 3)), 2, draw(st.integers(1, 2)))
    if kind == "norm":
        return draw(st.sampled_from((nn.BatchNorm2d(c), nn.InstanceNorm2d(c, eps=0.1, affine=True),
                                     nn.LayerNorm((h, w), eps=0.1), nn.RMSNorm((c, h, w), eps=0.1))))  # fmt: skip
    if kind == "group norm":
        return nn.GroupNorm(1, c, eps=0.1)
    if kind in ("attention", "gate"):
        return Attend(c) if kind == "attention" and h * w <= 30 else Gate(c)
    if kind == "pool" and not small:
        stride, padding, ceil = draw(st.integers(1, 2)), draw(st.integers(0, 1)), draw(st.booleans())
        pools = (nn.MaxPool2d(2, stride, padding, ceil_mode=ceil), nn.AdaptiveMaxPool2d((2, 3)),
                 nn.AvgPool2d(2, stride, padding, ceil, draw(st.booleans())), nn.AdaptiveAvgPool2d((3, 2)))  # fmt: skip
        return draw(st.sampled_from(pools))
    if kind == "side":
        return Side(nn.Conv2d(c, c, 3, padding=1), draw(st.sampled_from(Side.HOW)))
    if kind == "other dimensions":
        line, cube = nn.Conv1d(c, 2, 3, padding=1), nn.Conv3d(c, 3, (1, 2, 2), padding=(1, 0, 1))
        return draw(st.sampled_from((Around("rows of pixels", line), Around("one deep", cube))))
    if kind == "linear":
        return Around("channels last", nn.Linear(c, draw(st.integers(1, 4))))
    if kind == "shifted":
        return Shifted((c, h, w))
    if kind == "apply":
        return _named(draw, "image: ", [*OF_IMAGES, *(UP_SAMPLING if h * w < 30 else ())], shares)
    return _named(draw, "", ALIKE, shares) if kind == "alike" else draw(activations(c))


@st.composite
def sequence_layer(draw: Draw, shape: Shape, shares: tuple[int, int]) -> nn.Module:
    """One layer for sequences of that shape, length x features."""
    length, features = shape
    kinds = ["linear", "norm", "conv", "pool", "side", "act", "shifted", "attention", "recurrent", "encoder"]
    kind = draw(st.sampled_from(["alike", "apply", "alike", "apply", "alike", "alike", *kinds]))
    heads = 2 if features % 2 == 0 else 1
    if kind == "linear":
        return nn.Linear(features, draw(st.integers(2, 6)), bias=draw(st.booleans()))
    if kind == "norm":
        norms = (nn.LayerNorm(features, eps=0.1), nn.RMSNorm(features, eps=0.1), nn.LayerNorm(shape, eps=0.1))
        return draw(st.sampled_from((*norms, nn.BatchNorm1d(length))))
    if kind == "conv" and length > 1:
        outputs, stride = draw(st.integers(1, 4)), draw(st.integers(1, 2))
        convs = (nn.Conv1d(features, outputs, 2, stride, padding=1), nn.ConvTranspose1d(features, outputs, 2, stride))
        return Around("channels first", draw(st.sampled_from(convs)))
    if kind == "pool" and features > 2:
        return draw(st.sampled_from((nn.MaxPool1d(2, 1), nn.AvgPool1d(2, 2), nn.AdaptiveAvgPool1d(2),
                                     nn.AdaptiveMaxPool1d(3))))  # fmt: skip
    if kind == "side":
        return Side(nn.Linear(features, features), draw(st.sampled_from(Side.HOW)))
    if kind == "shifted":
        return Shifted(shape)
    if kind == "attention":
        return SelfAttention(features, heads)
    if kind == "recurrent" and length <= 4:
        size = draw(st.integers(2, 4))
        if draw(st.booleans()):
            return Around("batch second", nn.GRU(features, size))
        cells = (nn.LSTM(features, size, batch_first=True), nn.GRU(features, size, batch_first=True),
                 nn.RNN(features, size, batch_first=True, nonlinearity=draw(st.sampled_from(("tanh", "relu")))),
                 nn.LSTM(features, 2, batch_first=True, bidirectional=True))  # fmt: skip
        return Around("first of several", draw(st.sampled_from(cells)))
    if kind == "encoder":
        first, act = draw(st.booleans()), draw(st.sampled_from(("relu", "gelu")))
        layer = nn.TransformerEncoderLayer(
            features, heads, 6, batch_first=True, norm_first=first, activation=act, layer_norm_eps=0.1
        )
        return layer
    if kind == "apply":
        return _named(draw, "sequence: ", OF_SEQUENCES, shares)
    return _named(draw, "", ALIKE, shares) if kind == "alike" else draw(activations(length))


Network = tuple[Head, tuple[Tensor, ...]]


def _stacked(
    draw: Draw, y: Tensor, layer: Callable[[Shape], st.SearchStrategy[nn.Module]], most: int, largest: int
) -> tuple[nn.Sequential, Tensor]:
    """Some layers, and what they make of an example."""
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(2, most))):
        made = seeded(draw(layer(tuple(y.shape[1:]))))
        try:
            with torch.no_grad():
                y = made(y)
        except (RuntimeError, ValueError):  # what PyTorch itself does not take at that size is left out
            continue
        layers.append(made)
        if y[0].numel() > largest:
            break
    return nn.Sequential(*layers or [nn.Identity()]), y


def _finished(draw: Draw, body: nn.Module, pool: nn.Module, y: Tensor, inputs: list[Tensor]) -> Network:
    with torch.no_grad():
        features = pool(y).flatten(1).shape[1]
    extra = 2 if draw(st.integers(0, 5)) == 5 else 0
    results = draw(st.sampled_from(Head.RESULTS))
    model = seeded(Head(body, pool, features, draw(activations(5)), extra, results))
    model.gain = draw(st.sampled_from((1, 1, 3)))
    with torch.no_grad():
        for value in body.parameters():
            value.mul_(model.gain)
    return model, (*inputs, *([random(2, extra, seed=3)] if extra else []))


@st.composite
def of_images(draw: Draw, shares: tuple[int, int] = (0, 1)) -> Network:
    """A few image layers, then features and logits."""
    shape = draw(st.integers(1, 3)), draw(st.integers(3, 7)), draw(st.integers(3, 7))
    x = random(2, *shape, seed=draw(st.integers(0, 9)))
    body, y = _stacked(draw, x, lambda shape: image_layer(shape, shares), 5, 400)
    return _finished(draw, body, nn.AdaptiveAvgPool2d(draw(st.integers(1, 2))), y, [x])


@st.composite
def of_sequences(draw: Draw, shares: tuple[int, int] = (0, 1)) -> Network:
    """A few layers of length x features, after an embedding of tokens maybe, then features and logits."""
    length, features = draw(st.integers(2, 5)), draw(st.integers(2, 6))
    x, seed = random(2, length, features, seed=0), draw(st.integers(0, 9))
    tokens = draw(st.integers(0, 3)) == 3
    body, y = _stacked(draw, x, lambda shape: sequence_layer(shape, shares), 4, 120)
    pool = draw(st.sampled_from((nn.AdaptiveAvgPool1d(1), nn.AdaptiveMaxPool1d(2), nn.Flatten())))
    if not tokens:
        return _finished(draw, body, pool, y, [random(2, length, features, seed=seed)])
    indices = torch.randint(0, 7, (2, length), generator=torch.Generator().manual_seed(seed))
    return _finished(draw, nn.Sequential(nn.Embedding(7, features), body), pool, y, [indices])
