"""torchvision beside a CPU build of torch: its compiled operators do not load there, and we need none of them."""

from types import ModuleType

import torch


def import_torchvision() -> ModuleType:
    """The torchvision module; where the plain import fails, its missing operators are declared first."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torchvision.library = library  # type: ignore[attr-defined]  # it lives as long as the process
        import torchvision
    module: ModuleType = torchvision
    return module
