"""All ops, by family. Importing this package fills the registry."""

from tacit.ir.ops import comparison, linear, local, model, nonlinear, roles, securenn

__all__ = ["comparison", "linear", "local", "model", "nonlinear", "roles", "securenn"]
