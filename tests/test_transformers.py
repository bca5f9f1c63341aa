"""Products of two secrets, attention, norms, transformers, recurrent layers: against PyTorch, bit by bit the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_capture import Model, random, seeded
from torch import nn

import tacit
from tacit.vision import import_torchvision

Tensor = torch.Tensor
TOKENS, IMAGE = random(3, 4, 8), random(2, 4, 5, 6)


def agrees(model: nn.Module, *inputs: Tensor, relative: float = 0.01, **options: Any) -> tacit.Secure:
    """Secure run and oracle are equal in every bit, and within one per cent of float32."""
    options.setdefault("input_range", (-1, 1))
    secure = tacit.compile(model, inputs if len(inputs) > 1 else inputs[0], **options)
    assert tacit.Plan.parse(str(secure.plan)) == secure.plan
    with torch.no_grad():
        expected = model(*inputs)
    found = secure.check(*inputs)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < relative * expected.abs().max().clamp(min=0.1)
    secure.reference(*inputs, check=True)  # no value leaves its range, and what layers claim to know holds
    run, cost = secure.last_run, secure.plan.cost(batch=len(inputs[0]))
    assert run is not None
    assert (run.rounds, run.online_bytes, run.offline_bytes) == (cost.rounds, cost.online_bytes, cost.offline_bytes)
    return secure


def two(function: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """A function of two linear layers of the input."""
    return Model(lambda m, x: function(m.a(x), m.b(x)), a=nn.Linear(8, 6), b=nn.Linear(8, 6))


PRODUCTS: dict[str, nn.Module] = {
    "product": two(lambda a, b: a * b),
    "product, broadcast": two(lambda a, b: a * b.sum(1, keepdim=True) + (a[:, 0] * b[:, :1].mean(1))[:, None]),
    "square": two(lambda a, b: a * a - b**2),
    "gate": Model(lambda m, x: x * torch.sigmoid(m.a(x.mean(1, keepdim=True))), a=nn.Linear(8, 8)),
    "quotient": two(lambda a, b: a / (1 + b * b)),
    "quotient by a negative": two(lambda a, b: a / (-1 - b.abs())),
    "a constant divided": two(lambda a, b: 2 / (1 + b * b) + torch.ones(6) / (a.abs() + 1)),
    "matmul": two(lambda a, b: a @ b.transpose(1, 2)),
    "matmul, broadcast": two(lambda a, b: a[:, None] @ torch.stack([b, -b], 1).transpose(2, 3)),
    "bmm": two(lambda a, b: torch.bmm(a.transpose(1, 2), b)),
    "baddbmm": two(lambda a, b: torch.baddbmm(a[:, :, :4], a, b.transpose(1, 2))),
    "a constant matrix on either side": Model(lambda m, x: m.w @ x + x[:, :3] @ m.v, w=random(3, 4), v=random(8, 8)),
    "einsum": two(lambda a, b: torch.einsum("bik,bjk->bji", a, b)),
    "einsum of five letters": Model(
        lambda m, x: torch.einsum("bghd,bgkd->bghk", *m.a(x).view(-1, 2, 2, 2, 4).permute(3, 0, 1, 2, 4).unbind(0)),
        a=nn.Linear(8, 8),
    ),
    "einsum with a constant": Model(lambda m, x: torch.einsum("bik,ok->boi", x, m.w), w=random(3, 8)),
    "softmax": Model(lambda m, x: torch.softmax(m.a(x) * 3, -1), a=nn.Linear(8, 5)),
    "softmax along the middle": Model(lambda m, x: m.a(x).softmax(1), a=nn.Linear(8, 5)),
    "softmax of one": Model(lambda m, x: x[:, :1].softmax(1) + x[:, :1]),
    "log softmax": Model(lambda m, x: torch.log_softmax(m.a(x), -1), a=nn.Linear(8, 5)),
    "layer norm": nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16)),
    "layer norm without affine": nn.Sequential(nn.Linear(8, 7), nn.LayerNorm(7, elementwise_affine=False)),
    "layer norm of two dimensions": nn.LayerNorm((4, 8), eps=1e-3),
    "rms norm": nn.Sequential(nn.Linear(8, 16), nn.RMSNorm(16)),
    "standard deviation and variance": Model(
        lambda m, x: torch.cat([x.std(-1, keepdim=True), x.var(2, keepdim=True, correction=0)], 2)
    ),
    "length": Model(lambda m, x: x.norm(dim=-1) + torch.linalg.vector_norm(x, dim=2)),
    "unit length": Model(lambda m, x: F.normalize(x, dim=-1)),
    "cosine similarity": two(lambda a, b: F.cosine_similarity(a, b, dim=-1)),
    "attention": two(lambda a, b: F.scaled_dot_product_attention(a, b, a)),
    "causal attention": two(lambda a, b: F.scaled_dot_product_attention(a, b, b, is_causal=True, scale=0.7)),
    "attention with a mask of truth values": two(
        lambda a, b: F.scaled_dot_product_attention(a, b, b, attn_mask=torch.eye(4, dtype=torch.bool))
    ),
    "attention with infinite scores": two(
        lambda a, b: F.scaled_dot_product_attention(a, b, b, attn_mask=torch.zeros(4, 4).fill_diagonal_(-torch.inf))
    ),
    "scores masked by minus infinity": two(
        lambda a, b: (a @ b.transpose(1, 2)).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf).softmax(-1) @ b
    ),
    "minus infinity added to scores": two(
        lambda a, b: ((a @ b.transpose(1, 2)) / 2 + torch.full((4, 4), -torch.inf).triu(1)).softmax(-1) @ b
    ),
    "a mask in other shapes": two(
        lambda a, b: (
            ((a @ b.transpose(1, 2)).flatten(1) + torch.full((4, 4), -1e9).tril(-2).flatten() + torch.ones(16))
            .view(-1, 4, 4)
            .softmax(-1)
            @ b
        )
    ),
    "masked multi-head attention": Model(
        lambda m, x: m.a(x, x, x, attn_mask=torch.full((4, 4), -torch.inf).triu(1).expand(2 * len(x), 4, 4))[0],
        a=nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    "a matrix for each head": Model(
        lambda m, x: torch.einsum("bhd,hde->bhe", x.view(-1, 4, 2, 4)[:, :, 0], m.w), w=random(4, 4, 3)
    ),
    "log of sums of exponentials": two(lambda a, b: torch.logaddexp(8 * a, b) + torch.logaddexp2(a, torch.zeros(6))),
    "multi-head attention": Model(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(8, 2, batch_first=True)),
    "multi-head attention and its weights": Model(
        lambda m, x: m.a(x, x * 0.5, x)[1], a=nn.MultiheadAttention(8, 2, batch_first=True)
    ),
    "running sum": Model(lambda m, x: m.a(x).cumsum(1), a=nn.Linear(8, 3)),
    "LSTM": Model(lambda m, x: m.a(x)[0], a=nn.LSTM(8, 5, batch_first=True)),
    "LSTM, the last state": Model(lambda m, x: m.a(x)[1][0][-1], a=nn.LSTM(8, 3, batch_first=True)),
    "LSTM of two layers both ways, sequence first": Model(
        lambda m, x: m.a(x.transpose(0, 1))[0].transpose(0, 1), a=nn.LSTM(8, 3, 2, bidirectional=True)
    ),
    "GRU": Model(lambda m, x: m.a(x)[0], a=nn.GRU(8, 5, batch_first=True)),
    "GRU without biases": Model(lambda m, x: m.a(x)[0], a=nn.GRU(8, 5, batch_first=True, bias=False)),
    "RNN": Model(lambda m, x: m.a(x)[0], a=nn.RNN(8, 5, batch_first=True, nonlinearity="relu")),
}
IMAGES: dict[str, nn.Module] = {
    "group norm": nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6)),
    "instance norm": nn.Sequential(nn.Conv2d(4, 3, 3), nn.InstanceNorm2d(3, affine=True)),
    "squeeze and excitation": Model(
        lambda m, x: x * torch.sigmoid(m.b(F.silu(m.a(F.adaptive_avg_pool2d(x, 1))))),
        a=nn.Conv2d(4, 2, 1), b=nn.Conv2d(2, 4, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_norms_attention(name: str) -> None:
    agrees(seeded(PRODUCTS[name]), TOKENS, relative=0.015)


@pytest.mark.parametrize("name", IMAGES)
def test_norms_and_gates_of_images(name: str) -> None:
    agrees(seeded(IMAGES[name]), IMAGE)


@pytest.mark.parametrize("name", ["product", "softmax", "layer norm without affine"])
def test_the_textbook_suite_has_them_too(name: str) -> None:
    agrees(seeded(PRODUCTS[name]), TOKENS, relative=0.02, protocol="securenn")


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}])
def test_a_transformer_encoder(options: dict[str, Any]) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    agrees(seeded(nn.TransformerEncoder(layer, 1)), TOKENS, relative=0.02)


class Bert(nn.Module):
    """transformers' BERT, small, with random weights, and a linear layer on what it pools."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.BertConfig(vocab_size=40, max_position_embeddings=8, **sizes)
        self.bert, self.head = transformers.BertModel(config), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.bert(input_ids=ids).pooler_output)
        return out


def test_a_bert_of_secret_tokens() -> None:
    ids = torch.randint(0, 40, (3, 5), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    secure = agrees(Bert().eval(), ids, calibration=ids.repeat(32, 1), relative=0.02)
    (line,) = [n for n in secure.plan.nodes if n.op.name == "one_hot"]
    assert line.type.shape[-1] == 40
    with pytest.raises(tacit.InputError, match="integers"):
        secure(ids.float())
    with pytest.raises(tacit.InputError, match="outside the range"):
        secure(ids + 38)


def test_indices_may_be_computed() -> None:
    agrees(Model(lambda m, x: m.e(x.argmax(1)), e=nn.Embedding(8, 3)).eval(), random(3, 8))


def vision(name: str) -> nn.Module:
    models = import_torchvision().models
    torch.manual_seed(0)
    if name == "vit":
        model = models.VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=5)
        nn.init.normal_(model.heads.head.weight)
        nn.init.normal_(model.class_token)
        return model.eval()
    options: dict[str, Any] = {}
    if name == "swin v2":
        block = models.swin_transformer.SwinTransformerBlockV2
        options = {"block": block, "downsample_layer": models.swin_transformer.PatchMergingV2}
    model = models.SwinTransformer([4, 4], 8, [2], [2], [2, 2], num_classes=5, **options)
    return model.eval()


@pytest.mark.parametrize("name", ["vit", "swin", "swin v2"])
def test_small_vision_transformers(name: str) -> None:
    images = random(2, 3, 16, 16)
    agrees(vision(name), images, calibration=images.repeat(32, 1, 1, 1))
