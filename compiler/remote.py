"""The compiled model among networked parties: a client's predictions, an owner's push."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from tacit.ir.given import path_of
from tacit.ir.plan import Plan
from tacit.runtime.leaving import stops_at_exit
from tacit.secure import check_inputs, decode_answer, encode_inputs, load

if TYPE_CHECKING:
    from tacit.runtime.net.client import Client, Served

Tensor = torch.Tensor
PathLike = str | os.PathLike[str]


class Remote:
    """A client's connection to the parties of a deployment; `predict` may be called by several threads at once."""

    def __init__(self, client: Client, dtype: torch.dtype = torch.float32) -> None:
        self.last_run: Served | None = None
        self._client = client
        self._dtype = dtype

    @property
    @stops_at_exit
    def plan(self) -> Plan:
        """What the parties run; raises PartyError or RefusedError where they cannot be asked."""
        return self._client.plan

    @stops_at_exit
    def predict(self, *inputs: Any, timeout: float | None = None, **named: Any) -> Any:
        """The model's answer for a batch, which nobody but this client learns; same arguments as the model.

        Arguments may be given by position or by name. What the plan calls a named tuple comes as one with the same
        fields, and a dataclass as a dictionary whose entries are attributes too.

        Raises InputError before anything is shared if an input does not fit, RefusedError with the reason a party
        gave, PartyError naming the party at fault; within `timeout` seconds, at most the deployment's limit.
        """
        plan = self.plan
        encoded = encode_inputs(plan, check_inputs(plan, inputs, named))
        answer, self.last_run = self._client.infer(encoded, timeout)
        return decode_answer(plan, answer, self._dtype)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(deployment: PathLike, identity: PathLike, *, plan: Plan | None = None) -> Remote:
    """A client of the parties in a deployment file, with the certificate and key in the folder `identity`.

    Connections open at first use. `plan` pins what the parties have to run; otherwise their own is taken, as far as
    P0 and P1 agree on it. Raises DeploymentError where the files do not fit.
    """
    from tacit.runtime.net.client import Client
    from tacit.runtime.net.deployment import load_deployment, load_identity

    found = load_deployment(path_of(deployment, "a deployment"))
    return Remote(Client(found, load_identity(found, path_of(identity, "an identity")), plan))


@stops_at_exit
def push(deployment: PathLike, identity: PathLike, model: PathLike) -> int:
    """Share a saved model's weights between P0 and P1 as the owner; returns the bytes that were sent.

    Returns once requests are served. Raises DeploymentError, PlanError, WeightsError, RefusedError or PartyError.
    """
    from tacit.runtime.net.deployment import load_deployment, load_identity
    from tacit.runtime.net.pushing import push as push_model

    found, secure = load_deployment(path_of(deployment, "a deployment")), load(model)
    owner = load_identity(found, path_of(identity, "an identity"))
    return push_model(found, owner, secure.plan, secure.weights).bytes
