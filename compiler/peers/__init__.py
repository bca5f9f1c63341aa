"""Other systems for secure inference beside Tacit; each runs in an environment of its own, never in Tacit's."""

from pathlib import Path

# Where `make peers` installs them, in the working directory.
INTERPRETERS = {peer: Path(".peers") / peer / "bin" / "python" for peer in ("crypten", "spu")}
