"""Hugging Face checkpoints of the GPT-2 and OPT families into our parameters, and back, bit for bit.

    their directory   config.json and model.safetensors, or shards with model.safetensors.index.json
    here              ModelSpec and variables; what only the way back needs is in `origin`, plain JSON values

`families.py` says which tensor stands where, `family_config.py` reads their config.json. A tensor is copied
from its file into its place in our stacked leaves, one at a time: beyond the model itself an import holds
one copy of one tensor, and a way back likewise.

Names may have parts that wrappers add (`module.`, `_orig_mod.`), a token table may be stored as the head
only, a head may be a table of its own, float64 is rounded. Refused by name: other structures (OPT-350m: norms
after the layers, embeddings of another width), quantised weights, NaN and infinities, pickles. Causal masks,
which old GPT-2 files carry beside their weights, are left out. OPT's two rows before position 0 have no use
and no place here: `origin` keeps them for the way back.

Example:
  >>> from tree_ffn.huggingface import pretrained
  >>> model = pretrained.load("tests/huggingface/fixtures/opt_relu", param_dtype="keep")
  >>> pretrained.save("exported/opt", model.spec, model.variables, model.origin)   # doctest: +SKIP
"""

from tree_ffn.huggingface.families import FAMILIES
from tree_ffn.huggingface.pretrained_export import save
from tree_ffn.huggingface.pretrained_import import STORED, Pretrained, load

__all__ = ["FAMILIES", "STORED", "Pretrained", "load", "save"]
