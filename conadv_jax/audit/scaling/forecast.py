"""Forecasts a configuration on other slices from steps compiled for one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import traverse_util

from conadv_jax import experiment
from conadv_jax.audit import libtpu, sweep
from conadv_jax.audit.scaling.predict import BatchNormCost, Compiled, StepCost
from conadv_jax.audit.scaling.study import Study, make_study
from conadv_jax.config import Config
from conadv_jax.devices import topology
from conadv_jax.devices.topology import Topology
from conadv_jax.method import sam

# Examples per device of the second program, which tells fixed from growing
# cost; also those of MLPerf's step.
_FEW = 8


def study(config: Config, where: Topology, audit: sweep.Audit) -> Study:
  """Predicts the scaling of `config` on the generation of `where`.

  Compiles its step at as many examples per device as on `where`, and at a few.
  The baseline on v3 checks and calibrates the model of time.
  """
  run = experiment.build(config, libtpu.load_devices(where))
  each = config.batch_size // where.devices // config.microbatches
  baseline = sweep.with_method(config, 'baseline')
  anchor_slice = topology.parse('v3-1024')
  return make_study(
    step_cost(config, where, each, audit),
    where.generation,
    examples_per_device=each * config.microbatches,
    batch_size=config.batch_size,
    examples_to_train=round(config.epochs * run.spec.num_train),
    max_examples_per_device=each,
    anchor_cost=step_cost(baseline, anchor_slice, 96, audit),
  )


def step_cost(
  config: Config, where: Topology, examples: int, audit: sweep.Audit
) -> StepCost:
  """Compiles programs for `examples` and for a few examples per device.

  Batch-norm groups stay within a device in both. What larger groups exchange is
  computed, see `batch_norm_cost`.
  """
  programs, groups = [], dataclasses.asdict(config.sam)
  for each in sorted({examples, max(1, min(_FEW, examples // 2))}):
    trial = sweep.with_fields(
      config,
      batch_size=each * where.devices,
      bn_group_size=each,
      microbatches=1,
      sam=groups | {'group_size': each * sam.in_groups(config)},
    )
    found = audit(trial, where)
    programs.append(
      Compiled(each, found['flops_per_device'], found['hbm_bytes_per_device'])
    )
  # Of the trial: the batch of `config` need not divide over `where`.
  run = experiment.build(trial, libtpu.load_devices(where))
  state = run.abstract_state()
  summed = [state.params]
  if config.ascends and not sam.in_groups(config):
    summed.append(sam.chosen(config, state.params))
  return StepCost.from_compiled(
    *programs,
    gradient_bytes=4 * sum(leaf.size for leaf in jax.tree.leaves(summed)),
    batch_norm=batch_norm_cost(config, state.batch_stats),
  )


def batch_norm_cost(config: Config, batch_stats: Any) -> BatchNormCost:
  """Computes what groups that span devices exchange per step, or microbatch.

  In float32, the mean and the mean square of each channel and view in the
  forward pass, and their gradients in the backward pass, of the update, of
  every step of the attack, and of an ascent.
  """
  channels = [
    leaf.shape[1]
    for path, leaf in traverse_util.flatten_dict(batch_stats).items()
    if path[-1] == 'mean'
  ]
  attacks = config.attack.steps if config.is_adversarial else 0
  views = len(config.views) + attacks + len(config.ascent_views)
  return BatchNormCost(
    group_size=config.bn_group_size,
    all_reduces=2 * len(channels) * (1 + attacks + config.ascends),
    bytes=2 * 2 * 4 * sum(channels) * views,
  )
