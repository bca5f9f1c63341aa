"""An activation that PyTorch does not have, compiled and run encrypted: all that a new layer needs, from outside.

The layer is Snake, x + sin(a x)^2 / a (Ziyin, Hartwig, Ueda, NeurIPS 2020), written as an operator of its own.
"""

import torch
from torch import Tensor, nn

import tacit
from tacit.ir.functions import register_function
from tacit.ir.ops.approximated import Function
from tacit.ir.ops.layer import Layer


# --- the operator, as PyTorch wants it ---
@torch.library.custom_op("example::snake", mutates_args=())
def snake(x: Tensor, a: float) -> Tensor:
    return x + torch.sin(a * x) ** 2 / a


@snake.register_fake
def _(x: Tensor, a: float) -> Tensor:
    return torch.empty_like(x)


# --- the layer, as Tacit wants it ---
register_function("snake", lambda x, a: x + torch.sin(a * x) ** 2 / a)


class SnakeLayer(Layer):
    """Written into the plan as one function of each element; range analysis fits polynomials to it."""

    aten = ("example.snake.default",)
    batch_anywhere = True

    @classmethod
    def capture(cls, graph, **k):
        return graph.emit(Function("snake", (k["a"],)), k["x"])


# --- a network with it ---
class Snake(nn.Module):
    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = a

    def forward(self, x: Tensor) -> Tensor:
        return snake(x, self.a)


def main() -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), Snake(1.5), nn.Linear(32, 4)).eval()
    x = torch.rand(100, 10)
    secure = tacit.compile(model, x, input_range=(0, 1))
    answer = secure.check(x)  # encrypted, and equal to the clear oracle bit for bit
    with torch.no_grad():
        error = float((answer - model(x)).abs().max())
    (line,) = [node for node in secure.plan.nodes if node.op.name == "spline"]
    print(f"snake as {len(line.op.knots) + 1} polynomials; logits of 100 inputs within {error:.1e} of PyTorch")
    return error


if __name__ == "__main__":
    main()
