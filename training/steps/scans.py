"""Scans of JAX that find the gradients of their weights after the loop.

Differentiated as it stands, a scan adds to the gradient of every weight in every step, multiplies by the weights
transposed anew each time, and keeps from the way there whatever the way back asks for. `with_late_gradients` rewrites a
function's scans: the loop leaves what went into each product with a weight and what comes back for its result, from
which one product finds the gradient for all steps at once; the weights are transposed once; and what is only arithmetic
on something that is kept is computed again.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import numpy as jnp
from jax.extend import core

# [rows, inputs] times [inputs, outputs].
_MATRIX_PRODUCT = (((1,), (0,)), ((), ()))
# Primitives that cost less than reading back what they gave.
_CHEAP = frozenset(
    [
        *("add", "add_any", "sub", "mul", "neg", "abs", "square", "integer_pow", "max", "min", "clamp", "copy"),
        *("eq", "ne", "ge", "gt", "le", "lt", "and", "or", "not", "is_finite", "select_n", "convert_element_type"),
        *("broadcast_in_dim", "concatenate", "dynamic_slice", "expand_dims", "pad", "reshape", "slice", "split"),
        *("squeeze", "stop_gradient", "transpose"),
    ]
)

_Rule = Callable[[Any, list[Any]], Sequence[Any]]


def with_late_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, to be differentiated in reverse mode at less cost where it scans.

    Args:
        function: of arrays, in any structure, to arrays.
    """

    @functools.wraps(function)
    def rewritten(*arguments: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(arguments), {"scan": _late_scan})
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return rewritten


def _evaluate(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], rules: Mapping[str, _Rule]) -> list[Any]:
    """Runs a jaxpr, some of its primitives by rules."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        run = rules.get(equation.primitive.name, _run)
        values |= zip(equation.outvars, run(equation, [value(atom) for atom in equation.invars]), strict=True)
    return [value(atom) for atom in jaxpr.outvars]


def _run(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    """An equation as it stands."""
    params = equation.primitive.get_bind_params(equation.params)
    results: Any = equation.primitive.bind(*inputs, **params)
    return results if equation.primitive.multiple_results else [results]


def _late_scan(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    """A scan with a gradient of its own, if there are products with weights in it."""
    params, body = equation.params, equation.params["jaxpr"]
    count, carried = _leading(equation, body)
    weights = body.jaxpr.invars[:count]
    products = [product for product in body.jaxpr.eqns if _is_product(product, weights)]
    if not products:
        return _run(equation, inputs)
    places = [weights.index(product.invars[1]) for product in products]

    def run(consts: Any, carry: Any, xs: Any) -> Any:
        return _run(equation, [*consts, *carry, *xs])

    def forward(consts: Any, carry: Any, xs: Any) -> Any:
        results = [product.outvars[0].aval for product in products]
        probes = [jnp.zeros((params["length"], *result.shape), result.dtype) for result in results]
        loop = functools.partial(_probed_scan, params, products, places)
        results, pull_back, seen = jax.vjp(loop, consts, carry, xs, probes, has_aux=True)
        return results, (pull_back, seen)

    def backward(kept: Any, upstream: Any) -> Any:
        pull_back, seen = kept
        consts, carry, xs, probes = pull_back(upstream)
        for place, rows, results in zip(places, seen, probes, strict=True):
            consts[place] += _rows(rows).T @ _rows(results)
        return consts, carry, xs

    scan = jax.custom_vjp(run)
    scan.defvjp(forward, backward)
    results: Sequence[Any] = scan(inputs[:count], inputs[count:carried], inputs[carried:])
    return results


def _leading(equation: Any, body: Any) -> tuple[int, int]:
    """How many of a scan's inputs are constants; how many are constants or carried.

    Told by shapes, since versions of JAX name it differently: what is scanned over has an axis more than in the body.
    """

    def alike(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))

    whole, carry = alike(equation.invars, body.jaxpr.invars), alike(equation.outvars, body.jaxpr.outvars)
    return whole - carry, whole


def _probed_scan(
    params: Any, products: list[Any], places: list[int], consts: Any, carry: Any, xs: Any, probes: Any
) -> tuple[list[Any], list[Any]]:
    """The scan; its products take their gradient to the probes, ``[steps, rows, outputs]`` each, not to the weights.

    Returns:
        What the scan gives, and what went into each product: ``[steps, rows, inputs]``.
    """
    body = params["jaxpr"]
    weights = [jax.lax.stop_gradient(consts[place]) for place in places]
    turned = [weight.T for weight in weights]

    def step(carry: Any, x: Any) -> Any:
        inputs, step_probes = x
        seen: list[Any] = []

        def multiply(equation: Any, operands: list[Any]) -> Sequence[Any]:
            index = next((index for index, product in enumerate(products) if product is equation), None)
            if index is None:
                return _run(equation, operands)
            seen.append(operands[0])
            return [_late_product(operands[0], weights[index], turned[index], step_probes[index])]

        results = _evaluate(body.jaxpr, body.consts, [*consts, *carry, *inputs], {"dot_general": multiply})
        return results[: len(carry)], (results[len(carry) :], seen)

    # A scan keeps its steps apart by itself: no need to stop the compiler from finding common expressions.
    step = jax.checkpoint(step, prevent_cse=False, policy=lambda primitive, *_, **__: primitive.name not in _CHEAP)
    how = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, seen) = jax.lax.scan(step, carry, (xs, probes), **how)
    return [*carry, *ys], seen


def _is_product(equation: Any, weights: Sequence[Any]) -> bool:
    """Whether it is ``rows @ weight``, of a matrix that comes up in the loop and one of the weights."""
    if equation.primitive.name != "dot_general" or equation.params["dimension_numbers"] != _MATRIX_PRODUCT:
        return False
    rows, weight = equation.invars
    matrices = weight in weights and rows not in weights and rows.aval.ndim == weight.aval.ndim == 2
    plain = equation.params["precision"] is None and equation.outvars[0].aval.dtype == rows.aval.dtype
    return matrices and plain and rows.aval.dtype == weight.aval.dtype


def _rows(values: Any) -> Any:
    """All steps' rows in one matrix: a sum over two axes would have XLA transpose them first."""
    return values.reshape(-1, values.shape[-1])


def _multiply(rows: Any, weight: Any, turned: Any, probe: Any) -> Any:
    """``rows @ weight``; what comes back for it goes to the probe, and by the weight transposed to the rows."""
    del turned, probe
    return rows @ weight


def _multiply_forward(rows: Any, weight: Any, turned: Any, probe: Any) -> Any:
    return _multiply(rows, weight, turned, probe), turned


def _multiply_backward(turned: Any, upstream: Any) -> Any:
    return upstream @ turned, None, None, upstream


_late_product = jax.custom_vjp(_multiply)
_late_product.defvjp(_multiply_forward, _multiply_backward)
