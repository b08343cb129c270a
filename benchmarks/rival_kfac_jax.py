"""kfac-jax's adaptive optimizer on an autoencoder: `python rival_kfac_jax.py PROBLEM.npz SETTING.json RESULT.json`.

A script of its own, for an environment that has numpy, jax and kfac-jax (0.0.8 runs with jax 0.8.3, not with newer
ones); `kfac_triton.benchmarks.rival` writes the problem and reads the result. The clock counts steps and fetching their
batches, compilation left out: a throwaway run of the same compiled functions goes first.

PROBLEM.npz: `images` (n, d) float32, `judged` (m, d) float32, `order` (steps, batch) int32, and for layer i of the
autoencoder `weight_i` (d_out, d_in), `bias_i` (d_out,). SETTING.json: seconds, points (evaluations), initial_damping,
gaussian.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np

L2 = 1e-5
WARM_STEPS = 11  # inverses are refreshed at the first, sixth and eleventh; every branch is compiled before

Parameters = list[tuple[jax.Array, jax.Array]]


def outputs(parameters: Parameters, x: jax.Array) -> jax.Array:
    """Logistic units between the layers but at the code in the middle and at the end."""
    code = len(parameters) // 2 - 1
    for i, (weight, bias) in enumerate(parameters):
        x = x @ weight + bias
        if i not in (code, len(parameters) - 1):
            x = jax.nn.sigmoid(x)
    return x


def objective(gaussian: bool) -> Any:
    def loss(parameters: Parameters, batch: jax.Array) -> jax.Array:
        z = outputs(parameters, batch)
        if gaussian:
            kfac_jax.register_normal_predictive_distribution(z, batch)
            nll = 0.5 * jnp.sum((z - batch) ** 2)
        else:
            kfac_jax.register_multi_bernoulli_predictive_distribution(z, batch)
            nll = jnp.sum(jax.nn.softplus(z) - batch * z)
        squares = sum(jnp.sum(p**2) for layer in parameters for p in layer)
        return nll / len(batch) + 0.5 * L2 * squares

    return loss


def main(problem: str, setting: str, result: str) -> None:
    with open(setting) as file:
        asked = json.load(file)
    data = np.load(problem)
    images, order = data["images"], data["order"]
    layers = sum(name.startswith("weight_") for name in data.files)
    initial = [(data[f"weight_{i}"].T, data[f"bias_{i}"]) for i in range(layers)]
    judged = jnp.asarray(data["judged"])
    picture = (lambda z: z) if asked["gaussian"] else jax.nn.sigmoid
    error = jax.jit(lambda parameters: jnp.sum((picture(outputs(parameters, judged)) - judged) ** 2) / len(judged))
    optimizer = kfac_jax.Optimizer(
        value_and_grad_func=jax.value_and_grad(objective(asked["gaussian"])),
        l2_reg=L2,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=asked["initial_damping"],
        damping_adaptation_decay=0.95,
        curvature_ema=0.95,
        inverse_update_period=5,
        num_burnin_steps=5,
    )

    def batches() -> Any:
        for rows in order:
            yield jnp.asarray(images[rows])

    def fresh() -> tuple[Parameters, Any, Any]:
        parameters = [(jnp.array(weight), jnp.array(bias)) for weight, bias in initial]
        state = optimizer.init(parameters, jax.random.PRNGKey(0), next(batches()))
        return parameters, state, batches()

    began = time.perf_counter()
    parameters, state, stream = fresh()
    for step in range(WARM_STEPS):
        parameters, state, _ = optimizer.step(parameters, state, jax.random.PRNGKey(step), data_iterator=stream)
    error(parameters).block_until_ready()
    compilation = time.perf_counter() - began

    parameters, state, stream = fresh()
    seconds, step, points = 0.0, 0, [[0.0, 0, float(error(parameters))]]
    while seconds < asked["seconds"]:
        start = time.perf_counter()
        parameters, state, _ = optimizer.step(parameters, state, jax.random.PRNGKey(step), data_iterator=stream)
        jax.block_until_ready(parameters)
        seconds += time.perf_counter() - start
        step += 1
        if seconds >= len(points) * asked["seconds"] / asked["points"]:
            points.append([seconds, step, float(error(parameters))])
    versions = {"jax": jax.__version__, "kfac_jax": kfac_jax.__version__}
    with open(result, "w") as file:
        json.dump({"points": points, "seconds": seconds, "steps": step, "warm_up": compilation, **versions}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
