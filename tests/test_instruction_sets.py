"""The native kernels as compiled for lesser processors than this one: ILORA_ISA says how much may be used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ilora

if reason := ilora.op.backends.why_not("native", "cpu"):
    pytest.skip(reason, allow_module_level=True)
TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


@pytest.mark.parametrize("most", ["baseline", "avx2", "avx512"])
def test_every_edge_under_every_instruction_set(most):
    """Where the processor itself has less, that is what runs."""
    code = "from test_backends import EDGES, test_edges\nfor edge in EDGES: test_edges(('native', 'cpu'), edge)"
    environment = {"ILORA_ISA": most, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (TESTS, ROOT)))}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_name_is_an_error():
    code = "import torch, ilora; x = torch.ones(2, 4); g = torch.ones(1, 1)\n"
    code += "ilora.ilora_linear(x, torch.ones(3, 4), None, x[:1], torch.ones(3, 1), g, 1.0, backend='native')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"ILORA_ISA": "sse9"}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "ILORA_ISA=sse9: expected baseline, avx2 or avx512" in done.stderr
