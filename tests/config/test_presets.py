"""A method is a preset: any views, routes, staleness and attack work."""

import json

import helpers
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conadv_jax import evaluate, experiment, methods, train
from conadv_jax.checkpoints.checkpoint import Checkpoints
from conadv_jax.config import from_config_dict
from conadv_jax.export.export import export
from conadv_jax.method.state import copied
from conadv_jax.methods import ASCENTS, Method
from configs import digits


@pytest.fixture(scope='module', autouse=True)
def tiny_network():
  with helpers.tiny_network():
    yield


@st.composite
def drawn_methods(draw):
  """Any subset of views in any order, each on any of three routes."""
  views = draw(
    st.lists(st.sampled_from(('clean', 'aa', 'adv')), min_size=1, unique=True)
  )
  routes = [draw(st.sampled_from(('clean', 'aa', 'adv'))) for _ in views]
  pairs = tuple(zip(views, routes, strict=True))
  ascents = list(ASCENTS) if views != ['adv'] else ['none']
  ascent = draw(st.sampled_from(ascents))
  ages = (1,) if ascent == 'lookahead' else (0, 1, 2)
  if 'adv' not in views and ascent not in ('gradient', 'lookahead'):
    return Method(pairs, ascent=ascent)
  attacked = draw(st.sampled_from(('clean', 'aa')))
  return Method(pairs, draw(st.sampled_from(ages)), attacked, ascent=ascent)


def config_of(method, patch, **fields):
  """The digits recipe with `method`, registered as `drawn`."""
  patch.setitem(methods.METHODS, 'drawn', method)
  values = digits.get_config('batch_size=32')
  values.update_from_flattened_dict(
    {
      'method': 'drawn',
      'model': 'tiny',
      'bn_group_size': 8,
      'max_steps': 2,
      'log_every_steps': 1,
      'eval.every_steps': 0,
      'attack_stats_every_steps': 1,
      'plots': False,
    }
    | fields
  )
  return from_config_dict(values)


@pytest.mark.slow
@given(
  method=drawn_methods(),
  attack=st.sampled_from(sorted(methods.ATTACKS)),
  microbatches=st.sampled_from((1, 2)),
)
@settings(max_examples=25, deadline=None)
def test_any_preset_traces(method, attack, microbatches):
  with pytest.MonkeyPatch.context() as patch:
    fields = {'attack.preset': attack, 'microbatches': microbatches}
    config = config_of(method, patch, **fields)
    run = experiment.build(config, jax.devices()[:2])
    batch = run.abstract_batch()
    assert set(batch) == {*method.fed_views, 'label'}
    state, values = jax.eval_shape(
      run.step_fn, run.abstract_state(), batch, batch
    )
    like = run.abstract_state()
    assert jax.tree.structure(state) == jax.tree.structure(like)
    for view, _ in method.views:
      assert values[f'loss_{view}'].shape == ()
    rows = {x.shape[0] for x in jax.tree.leaves(state.batch_stats)}
    assert rows == {len(method.routes)}


CASES = {
  'adv_on_the_clean_route-tau2': (
    Method((('clean', 'clean'), ('adv', 'clean')), 2),
    {'attack.preset': 'paper'},
  ),
  'adv_alone_on_a_route_of_its_own': (Method((('adv', 'adv'),), 1), {}),
  'aa_and_adv_of_aa-tau0': (
    Method((('adv', 'adv'), ('aa', 'clean')), 0, attacked='aa'),
    {'attack.preset': 'pgd', 'microbatches': 2},
  ),
  'aa_on_adv-clean_fed_only': (
    Method((('aa', 'adv'), ('adv', 'aa')), 1),
    {'eval.attack': 'paper,pgd', 'attack.update_batch_stats': True},
  ),
  'one_of_five_on_adv': (
    Method((('clean', 'clean'), ('adv', 'adv')), 0, adv_every=5),
    {'batch_size': 80, 'bn_group_size': 2, 'attack.preset': 'rs_fgsm'},
  ),
}


def leaves_of(config, workdir, step):
  run = experiment.build(config)
  checkpoints = Checkpoints(workdir, keep=3)
  _, state, _ = checkpoints.restore(run.abstract_state(), step)
  checkpoints.close()
  return jax.tree.leaves(state)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.slow
def test_a_preset_trains_resumes_evaluates_and_exports(name, tmp_path):
  method, fields = CASES[name]
  with pytest.MonkeyPatch.context() as patch:
    config = config_of(method, patch, **fields)
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    assert np.isfinite(train.train(config, str(whole))['top1'])
    train.train(config_of(method, patch, **fields, max_steps=1), str(parts))
    train.train(config, str(parts))
    for a, b in zip(
      leaves_of(config, whole, 2), leaves_of(config, parts, 2), strict=True
    ):
      np.testing.assert_array_equal(a, b)

    rows = evaluate.evaluate(['evaluate', f'--workdir={whole}'])
    assert [row['attack'] for row in rows][:1] == ['none']
    assert rows[0]['route'] == config.eval.route
    file = tmp_path / 'network.safetensors'
    export(['export', f'--workdir={whole}', f'--output={file}'])
    card = json.loads((tmp_path / 'network.json').read_text())
    assert card['format'] == 'safetensors'


def test_the_next_batch_is_attacked_in_the_view_that_the_preset_names():
  """Only the attacked view and the labels reach the perturbation."""
  method = Method((('clean', 'clean'), ('aa', 'aa'), ('adv', 'adv')), 1, 'aa')
  with pytest.MonkeyPatch.context() as patch:
    run = experiment.build(config_of(method, patch), jax.devices()[:1])
    state, batch = run.init_state(), helpers.random_batches
    config = run.config
    first, second, other = batch(config, 3, spec=run.spec)
    step = run.jit_step()
    base, _ = step(copied(state), first, second)
    for view, moves in (('clean', False), ('aa', True)):
      changed = second | {view: other[view]}
      new, _ = step(copied(state), first, changed)
      equal = helpers.bits(new.perturbation) == helpers.bits(base.perturbation)
      assert equal != moves, view
