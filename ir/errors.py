"""The errors a user can meet, and the drawing of a plan around the line at fault."""

from collections.abc import Sequence


class TacitError(Exception):
    """Base of every error that Tacit raises on purpose."""


class CompileError(TacitError):
    """The model cannot be compiled as it is; the message names the layer and the remedy."""


class CompilerBug(TacitError):
    """The compiler itself failed; the message names the folder with what a report needs, without weights or inputs."""


class PlanError(TacitError):
    """A plan is malformed: text that does not parse, a type that does not hold, a broken seal.

    `line` is the number of the line at fault, 0 where it is none in particular.
    """

    line: int = 0


class InputError(TacitError, ValueError):
    """An input does not fit the plan: shape, dtype, NaN or infinity, outside the declared range."""


class RangeError(TacitError):
    """A value left the range that the plan states for it; the message names the layer."""


class WeightsError(TacitError):
    """A weight file is damaged, or belongs to another plan."""


class ProtocolError(TacitError):
    """A party failed, disappeared, or sent something that the plan does not provide for."""


class PartyError(ProtocolError):
    """A networked party did not answer, disconnected or broke the protocol; the message names the party."""


class RefusedError(TacitError):
    """A networked party refused what was asked of it; the message is the reason it gave."""


class DeploymentError(TacitError):
    """A deployment file, a certificate or a key is missing, malformed or does not fit."""


class PrecisionWarning(UserWarning):
    """Some answers are not as accurate as promised, however many bits there are; the message names the layer."""


class RangeWarning(UserWarning):
    """Ranges of values were measured on few inputs, not proved; the message says on how many."""


class DivergenceError(TacitError):
    """The secure run and the clear oracle disagree; the message names the first node."""


_WRITTEN = 128  # bits of a number that is written out
_LONGEST = 1000  # characters of a line that is drawn: those of our own are shorter


def shortened(text: str, most: int = 80) -> str:
    """A text that came from elsewhere, as a message quotes it."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def number(value: int) -> str:
    """A number that came from elsewhere: Python refuses to write one of thousands of digits."""
    return str(value) if value.bit_length() <= _WRITTEN else f"a number of {value.bit_length()} bits"


def drawn(lines: Sequence[str], culprit: int, message: str) -> PlanError:
    """The error of a line, drawn."""
    error = PlanError(draw(lines, culprit, message))
    error.line = culprit + 1
    return error


def draw(lines: Sequence[str], culprit: int, message: str, *, context: int = 3) -> str:
    """`message`, then the lines around `culprit` with carets under it."""
    first, last = max(0, culprit - context), min(len(lines), culprit + context + 1)
    out = [message, ""]
    for i in range(first, last):
        line = shortened(lines[i], _LONGEST)
        out.append(f"  {i + 1:>4} | {line}")
        if i == culprit:
            indent = len(line) - len(line.lstrip())
            out.append("       | " + " " * indent + "^" * max(1, len(line.strip())))
    return "\n".join(out)
