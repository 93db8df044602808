"""The models stand on jax, flax and numpy alone."""

import subprocess
import sys


def test_models_need_no_training_packages():
    code = (
        "import sys\n"
        "from tree_ffn.inference import decode\nfrom tree_ffn.models import cost, export, from_config\n"
        "unwanted = {'ml_collections', 'tensorflow_datasets', 'grain', 'optax', 'orbax', 'safetensors', "
        "'tokenizers', 'configs', 'experiments'} & set(sys.modules)\n"
        "assert not unwanted, unwanted"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
