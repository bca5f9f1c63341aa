"""Language models at full size, in a process of their own: what compiling and running one takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
TOKENS = 16
# Compiled from and run on one sequence: CPU seconds of the compiler, GB of the whole process, all three parties in it.
LIMITS = {"bert": (30, 5e9), "gpt2": (35, 6e9)}
CHILD = """
import json, sys, time, warnings
import torch
from tacit.vision import import_torchvision
import_torchvision()
import transformers
import tacit
from tacit.machine import peak_memory

torch.manual_seed(0)
if sys.argv[1] == "bert":
    model = transformers.BertForSequenceClassification(transformers.BertConfig()).eval()
else:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False)).eval()
parameters = sum(p.numel() for p in model.parameters())
tokens = torch.randint(0, model.config.vocab_size, (1, int(sys.argv[2])))
begin = time.process_time()
with warnings.catch_warnings():
    warnings.simplefilter("ignore", tacit.RangeWarning)
    secure = tacit.compile(model, tokens)
seconds = time.process_time() - begin
with torch.no_grad():
    wanted = model(tokens).logits
off = float((secure(tokens).logits - wanted).abs().max() / wanted.abs().max())
print(json.dumps({"parameters": parameters, "seconds": seconds, "peak": peak_memory(), "off": off}))
"""


@pytest.mark.parametrize("name", LIMITS)
def test_a_language_model_compiles_and_runs_within_its_limits(name: str) -> None:
    command = [sys.executable, "-c", CHILD, name, str(TOKENS)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=900).stdout)
    seconds, memory = LIMITS[name]
    assert found["parameters"] > 100e6
    assert found["off"] < 2**-7, found
    assert found["seconds"] < seconds and found["peak"] < memory, found
