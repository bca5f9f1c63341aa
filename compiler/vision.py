"""torchvision beside a CPU build of torch: its compiled operators do not load there, and we need none of them."""

from types import ModuleType

import torch

from tacit.ir.errors import CompileError


def import_torchvision() -> ModuleType:
    """The torchvision module; where the plain import fails, its missing operators are declared first."""
    try:
        import torchvision
    except ModuleNotFoundError:
        raise CompileError("this needs torchvision: pip install 'tacit[examples]'") from None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        import_torchvision.library = library  # type: ignore[attr-defined]  # it lives as long as the process
        import torchvision
    module: ModuleType = torchvision
    return module
