"""What every feed-forward layer reports beside its output."""

from typing import NamedTuple

import jax


class Info(NamedTuple):
    """What a feed-forward layer reports beside its output.

    Attributes:
      leaf_TP: int32, what every token chose: the leaf (0 .. 2^D - 1, in a pruned tree too) it reached in each
        of P trees, [T, P]; the K chosen experts, [T, K]; of a dense layer [T, 0].
    """

    leaf_TP: jax.Array
