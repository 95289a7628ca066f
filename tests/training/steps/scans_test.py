"""Scans with late gradients, against JAX's own differentiation; run where there is JAX."""

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed; make test-backends runs this")
from jax import numpy as jnp  # noqa: E402 - after it is known to be there

from training.steps.scans import with_late_gradients  # noqa: E402 - likewise

STEPS, BATCH, INPUTS, UNITS = 5, 3, 2, 4


def arguments(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"inputs": (INPUTS, UNITS), "recurrent": (UNITS, UNITS), "bias": (UNITS,), "output": (UNITS, INPUTS)}
    weights = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    return weights, rng.normal(size=(STEPS, BATCH, INPUTS)).astype("float32")


def recurrent(weights, sequences, *, reverse=False):
    """A recurrent network; its recurrent weights also have a part in the output by themselves, and a step counts."""
    step_size = jnp.array(2)

    def step(carry, inputs):
        hidden, count = carry
        hidden = jnp.tanh(inputs @ weights["inputs"] + hidden @ weights["recurrent"] + weights["bias"])
        outputs = hidden @ weights["output"] + weights["recurrent"].sum() * count
        return (hidden, count + step_size), outputs

    (hidden, _), outputs = jax.lax.scan(step, (jnp.zeros((BATCH, UNITS)), 0), sequences, reverse=reverse)
    return jnp.square(outputs).sum() + hidden.sum()


def carried(jaxpr):
    """Shapes of what the scans of a jaxpr carry from step to step: each step's other results are stacked."""
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    pairs = [zip(scan.outvars, scan.params["jaxpr"].jaxpr.outvars, strict=True) for scan in scans]
    return [whole.aval.shape for each in pairs for whole, step in each if whole.aval.shape == step.aval.shape]


@pytest.mark.parametrize("reverse", [False, True])
def test_values_and_gradients_are_the_same(reverse):
    def function(weights, sequences):
        return recurrent(weights, sequences, reverse=reverse)

    expected = jax.value_and_grad(function, argnums=(0, 1))(*arguments())
    found = jax.jit(jax.value_and_grad(with_late_gradients(function), argnums=(0, 1)))(*arguments())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4), found, expected)


def test_no_gradient_of_a_product_is_summed_in_the_loop():
    plain = carried(jax.make_jaxpr(jax.grad(recurrent))(*arguments()).jaxpr)
    late = carried(jax.make_jaxpr(jax.grad(with_late_gradients(recurrent)))(*arguments()).jaxpr)
    assert {(INPUTS, UNITS), (UNITS, INPUTS)} <= set(plain)
    assert not {(INPUTS, UNITS), (UNITS, INPUTS)} & set(late)


def test_what_does_not_multiply_by_weights_is_left_as_it_is():
    def function(values):
        return jax.lax.scan(lambda total, value: (total * value, total), 1.0, values)[0]

    values = np.array([2.0, 3.0, 4.0], "float32")
    assert str(jax.make_jaxpr(with_late_gradients(function))(values)) == str(jax.make_jaxpr(function)(values))
    np.testing.assert_allclose(jax.grad(with_late_gradients(function))(values), [12, 8, 6])


@pytest.mark.parametrize("constants", [0, 2])
@pytest.mark.parametrize("carry", [0, 1, 3])
@pytest.mark.parametrize("scanned", [0, 2])
def test_a_scan_s_inputs_are_told_apart(constants, carry, scanned):
    """Constants, what is carried, what is scanned over: with none of each, and with some that the body does not use."""
    weights = [np.eye(UNITS, dtype="float32") * (index + 2) for index in range(constants)]
    first = [np.full((BATCH, UNITS), index + 1, "float32") for index in range(carry)]
    xs = [np.full((STEPS, BATCH, UNITS), index + 1, "float32") for index in range(scanned)]

    def function(weights, first, xs):
        def step(state, inputs):
            rows = sum([*state, *inputs], jnp.ones((BATCH, UNITS), "float32"))
            for weight in weights[:1]:
                rows = jnp.tanh(rows @ weight)
            return [rows + old for old in state[:1]] + state[1:], rows

        last, rows = jax.lax.scan(step, first, xs, length=STEPS)
        return sum((jnp.square(value).sum() for value in last), jnp.square(rows).sum())

    expected = jax.value_and_grad(function, argnums=(0, 1, 2))(weights, first, xs)
    found = jax.value_and_grad(with_late_gradients(function), argnums=(0, 1, 2))(weights, first, xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4), found, expected)


def test_arguments_and_results_keep_their_structure():
    def function(tree):
        return {"sum": tree["a"] + tree["b"][0], "pair": (tree["a"], 3)}

    found = with_late_gradients(function)({"a": jnp.ones(2), "b": [jnp.ones(2)]})
    assert found["pair"][1] == 3
    np.testing.assert_array_equal(found["sum"], [2, 2])
