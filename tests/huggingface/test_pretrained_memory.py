"""An import holds the model and at most two copies of its largest tensor.

Measured with a float16 checkpoint of OPT-1.3B's shape in 3 files (results/import_memory.txt; Python 3.11):

    python -m tests.huggingface.pretrained_memory --size=1.3b --directory=PATH --param_dtype=keep

    param_dtype   model        largest tensor   most allocated   beyond the model   largest resident memory
    keep          2,631.5 MB   205.9 MB         2,846.7 MB       1.04 copies        2,903.0 MB
    float32       5,263.0 MB   205.9 MB         5,477.8 MB       1.04 copies        5,531.7 MB
"""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("param_dtype", ["keep", "float32"])
def test_an_import_holds_little_beside_the_model(repository, tmp_path, param_dtype):
    command = [
        sys.executable, "-m", "tests.huggingface.pretrained_memory", f"--directory={tmp_path}/opt",
        "--size=test", f"--param_dtype={param_dtype}", "--shard_bytes=2000000",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=repository, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["model_bytes"] > 5 * figures["largest_tensor_bytes"]
    assert figures["copies_beyond_model"] <= 2
    assert not os.path.exists(f"{tmp_path}/opt")
