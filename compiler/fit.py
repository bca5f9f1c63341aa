"""What a model and its weights have to be before the model is exported."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from tacit.ir.errors import CompileError

Tensor = torch.Tensor
FLOATS = (torch.float32, torch.float64)
_QUANTISED = "compile the model before quantising it"
_WATCHED = (
    "compile the float model instead, from before prepare() or prepare_qat(), with the trained weights: "
    "model.load_state_dict(state, strict=False)"
)


def require_fit(model: torch.nn.Module) -> None:
    """Evaluation mode, Python modules, and weights that are there; raises CompileError naming the module or weight."""
    for name, module in model.named_modules():
        _require_fit_module(f"module '{name or type(model).__name__}'", module)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        reason = misfit(name, value)
        if reason:
            raise CompileError(reason)


def _require_fit_module(where: str, module: torch.nn.Module) -> None:
    kind, home = type(module).__name__, type(module).__module__
    if isinstance(module, torch.jit.ScriptModule):
        raise CompileError(
            f"{where} is TorchScript, which torch.export does not read: compile the torch.nn.Module that it was made "
            "from, with its weights, as in model.load_state_dict(script.state_dict())"
        )
    if "torch.ao.quantization" in home:
        raise CompileError(f"{where} belongs to quantisation ({kind}), and observes or rounds values: {_WATCHED}")
    if "quantized" in home:
        raise CompileError(f"{where} is quantised ({kind}); {_QUANTISED}")
    if "torch.distributed" in home or "torch.nn.parallel.distributed" in home:
        raise CompileError(
            f"{where} spreads the model over processes ({kind}): compile the module inside of it (model.module), with "
            "whole weights"
        )
    if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and module.max_norm is not None:
        raise CompileError(
            f"{where} shortens rows of its table as they are read (max_norm), and a plan keeps nothing for the next "
            "call. Shorten all of them before: with torch.no_grad(): "
            f"module.weight.copy_(torch.renorm(module.weight, {module.norm_type:g}, 0, {module.max_norm:g})); "
            "module.max_norm = None"
        )
    if module.training:
        raise CompileError(f"the model is in training mode ({where}); call model.eval() first")


def is_of_a_trace(value: Tensor) -> bool:
    """Whether it stands for a tensor while PyTorch traces or derives, and has no numbers of its own."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(value)
    return wrapped or isinstance(value, FakeTensor)


def misfit(name: str, value: Tensor) -> str:
    """Why a weight cannot be compiled, and the remedy; "" where it can."""
    if is_lazy(value):
        return f"'{name}' is not initialised, as its module is lazy: call model(example) once before"
    if is_of_a_trace(value):
        return (
            f"'{name}' has no values, as it was kept from an earlier trace, or belongs to a gradient: create the model "
            "anew, and keep no tensor of a call in it"
        )
    if "torch.distributed" in type(value).__module__:
        return f"'{name}' is spread over processes ({type(value).__name__}): compile a model with whole weights"
    if value.is_meta:
        return (
            f"'{name}' has no values (it is on the device 'meta'): load them before, with "
            "model.load_state_dict(state, assign=True)"
        )
    if value.is_quantized:
        return f"'{name}' is quantised; {_QUANTISED}"
    if value.layout != torch.strided:
        return f"'{name}' is sparse ({value.layout}); convert it with to_dense()"
    if value.is_complex():
        return f"'{name}' is {value.dtype}: write real and imaginary parts as two tensors"
    if value.is_floating_point() and value.dtype not in FLOATS:
        return f"'{name}' is {value.dtype}; weights are float32 or float64: convert with model.float()"
    return ""
