"""Tree-structured sparse feed-forward layers in JAX and Flax.

The legend of dimension letters, used as suffixes of array names (`x_TE` is an
array of shape [T, E]) and as the subscripts of einsum strings:

    B  batch                        E  model width
    C  context positions            P  trees
    T  tokens (B * C flattened)     D  depth of a tree (decisions on a path)
    V  vocabulary                   L  levels, D + 1
    H  attention heads              N  nodes of a tree, 2 ** L - 1
    K  width of a head              W  units of a node
    X  experts                      U  units of a tree
    S  shared, always-on units      F  units of a layer, P * U + S
                                    A  active units of a token

Two more appear inside one function only: J for the nodes of one level
(2 ** l of them) and R for the deciding nodes of a tree (the first
2 ** D - 1 in heap order; the bottom level decides nothing).
"""

__version__ = "0.1.0"
