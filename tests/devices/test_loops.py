"""Loops are unrolled for a CPU, and as `jax.lax` has them for others."""

import types

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conadv_jax import experiment
from conadv_jax.devices import loops


def of(platform):
  device = types.SimpleNamespace(platform=platform)
  return loops.of_mesh(types.SimpleNamespace(devices=np.array([device])))


def add_row(carry, row):
  return jnp.sin(carry) + row, None


ROWS = jnp.arange(6.0).reshape(3, 2)
LOOPS = {
  'scan': (
    lambda x: loops.scan(add_row, x, ROWS, 3),
    lambda x: jax.lax.scan(add_row, x, ROWS)[0],
  ),
  'repeat': (
    lambda x: loops.repeat(3, jnp.sin, x),
    lambda x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x), x),
  ),
}


@pytest.mark.parametrize('name', LOOPS)
def test_other_platforms_have_the_loop_of_jax(name):
  ours, plain = LOOPS[name]
  texts = []
  for fn in (ours, plain):
    with of('tpu'):
      texts.append(jax.jit(lambda x, fn=fn: fn(x)).lower(ROWS[0]).as_text())
  assert texts[0] == texts[1]
  assert 'stablehlo.while' in texts[0]


@pytest.mark.parametrize('name', LOOPS)
def test_a_cpu_has_no_loop_and_the_same_result(name):
  ours, plain = LOOPS[name]
  with of('cpu'):
    lowered = jax.jit(lambda x: ours(x)).lower(ROWS[0])
  assert 'stablehlo.while' not in lowered.as_text()
  found = lowered.compile()(ROWS[0])
  np.testing.assert_allclose(found, jax.jit(plain)(ROWS[0]), rtol=1e-6)


@pytest.mark.parametrize('name', LOOPS)
def test_a_long_loop_stays_one(name, monkeypatch):
  monkeypatch.setattr(loops, '_MOST', 2)
  with of('cpu'):
    lowered = jax.jit(lambda x: LOOPS[name][0](x)).lower(ROWS[0])
  assert 'stablehlo.while' in lowered.as_text()


@pytest.mark.slow
def test_a_step_of_parts_and_of_an_attack_of_several_steps_has_no_loop():
  config = helpers.make_config(
    {
      'batch_size': 8,
      'bn_group_size': 4,
      'microbatches': 2,
      'attack.preset': 'pgd',
      'attack.steps': 3,
    }
  )
  run = experiment.build(config, jax.devices()[:1])
  text = run.lower_step().as_text()
  found = [line for line in text.splitlines() if 'stablehlo.while' in line]
  assert found  # random bits are drawn in loops
  assert not [line for line in found if 'f32' in line]
