"""Primitives: what is XLA's to every transformation, and a kernel where a program is compiled for one."""

import functools
from collections.abc import Callable

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def by_kernel_on(platform: str, name: str, by_xla: Callable, by_kernel: Callable) -> Primitive:
    """What is `by_xla` to every transformation, and compiled for a platform of this machine is `by_kernel`.

    Whether a program is compiled or exported shows when it is lowered, which is where a primitive may choose.
    An exported one may run on a machine without the kernel, so it never calls it.

    Args:
      platform: `cpu` or `cuda`.
      name: of the primitive.
      by_xla: a function of arrays and of hashable values given by name, to a tuple of arrays.
      by_kernel: another of the same.
    """
    primitive = _by_xla(name, by_xla)
    fallback, call = (mlir.lower_fun(f, multiple_results=True) for f in (by_xla, by_kernel))

    def on_platform(context, *args, **static):
        exported = context.module_context.lowering_parameters.for_export
        return (fallback if exported else call)(context, *args, **static)

    mlir.register_lowering(primitive, on_platform, platform=platform)
    return primitive


def linear(name: str, by_xla: Callable, n_fixed: int, transpose: Primitive) -> Primitive:
    """A function that is linear in its last arguments, and whose transpose is another primitive.

    Args:
      name: of the primitive.
      by_xla: the function: of fixed arrays, then of those it is linear in, to a tuple of arrays.
      n_fixed: how many are fixed.
      transpose: of the fixed arrays, then of the results' cotangents, to those of the others.
    """
    primitive = _by_xla(name, by_xla)

    def transposed(cotangents, *args, **static):
        fixed, moved = args[:n_fixed], args[n_fixed:]
        back = transpose.bind(*fixed, *(ad.instantiate_zeros(d) for d in cotangents), **static)
        return [None] * n_fixed + [d if ad.is_undefined_primal(a) else None for a, d in zip(moved, back)]

    ad.primitive_transposes[primitive] = transposed
    return primitive


def _by_xla(name: str, by_xla: Callable) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    # One object for equal values: by it jax.jit knows what it has compiled.
    compiled = functools.cache(lambda **static: jax.jit(functools.partial(primitive.bind, **static)))
    primitive.def_impl(lambda *args, **static: compiled(**static)(*args))
    # With all that types say: symbolic sizes, shardings, axes of a shard_map.
    result = lambda *args, **static: jax.make_jaxpr(functools.partial(by_xla, **static))(*args).out_avals
    primitive.def_abstract_eval(result)

    def batched(args, axes, **static):
        results = jax.vmap(functools.partial(by_xla, **static), axes)(*args)
        return results, (0,) * len(results)

    def jvp(primals, tangents, **static):
        moved = [i for i, d in enumerate(tangents) if type(d) is not ad.Zero]

        def of_moved(*values):
            args = dict(enumerate(primals)) | dict(zip(moved, values))
            return tuple(by_xla(*args.values(), **static))

        return jax.jvp(of_moved, [primals[i] for i in moved], [tangents[i] for i in moved])

    batching.primitive_batchers[primitive] = batched
    ad.primitive_jvps[primitive] = jvp
    mlir.register_lowering(primitive, mlir.lower_fun(by_xla, multiple_results=True))
    return primitive
