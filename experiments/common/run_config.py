"""The config of a run as results rows have it, for `record.public_config`."""

from types import SimpleNamespace

from tree_ffn.models import spec_to_dict
from tree_ffn.plain import namespace
from tree_ffn.training.plan import resolved


def finetuned_config(config, start) -> SimpleNamespace:
    """A config of fine-tuning.

    The model is the start's, and not of the config, which has one by default; the start is told by how it was
    converted, and not by its place.

    Args:
      config: with a section `finetune`.
      start: the run or export that it began with, or the run itself, which has the same model.
    """
    values = resolved(config)
    del values["ffn"]  # of no layer
    finetune = {**values["finetune"], "converted": start.meta.get("converted")}
    return SimpleNamespace(**{**values, "model": spec_to_dict(start.model), "finetune": finetune})


def config_of(run):
    """The config of a run; of a fine-tuned one, with the model that it has; of a conversion, with how."""
    values, made = resolved(run.config), run.meta.get("converted")
    if "finetune" in values:
        return finetuned_config(run.config, run)
    if not made or run.meta["step"]:
        return run.config
    made = {name: value for name, value in made.items() if name != "step"}  # as `convert_all` records it
    return namespace({**values, "seed": made["seed"], "convert": made})
