"""Scaling of a configuration: what its compiled steps say of other slices."""

from __future__ import annotations

from typing import Any

import jax

from conadv_jax import experiment
from conadv_jax.audit import sweep, topology
from conadv_jax.audit.scaling import predict as scaling
from conadv_jax.audit.scaling import report as scaling_report
from conadv_jax.audit.topology import Topology
from conadv_jax.config import Config
from conadv_jax.method import optim

# Examples per device of the second program, which tells fixed from growing
# cost; also those of MLPerf's step.
_FEW = 8


def study(
  config: Config, where: Topology, audit: sweep.Audit
) -> scaling_report.Study:
  """Weak and strong scaling of `config` on the generation of `where`.

  From its step at as many examples per device as on `where`, and at a few. The
  model of time is checked, and calibrated, with the baseline on v3.
  """
  run = experiment.build(config, topology.load_devices(where))
  each = config.batch_size // where.devices // config.microbatches
  baseline = sweep.with_method(config, 'baseline')
  anchor_slice = topology.parse('v3-1024')
  return scaling_report.study(
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
) -> scaling.StepCost:
  """From programs for `examples` and for a few examples per device.

  Batch-norm groups are local in both; what they exchange where they are not is
  counted, not compiled.
  """
  programs = []
  for each in sorted({examples, max(1, min(_FEW, examples // 2))}):
    trial = sweep.with_fields(
      config,
      batch_size=each * where.devices,
      bn_group_size=each,
      microbatches=1,
    )
    found = audit(trial, where)
    programs.append(
      scaling.Compiled(
        each, found['flops_per_device'], found['hbm_bytes_per_device']
      )
    )
  run = experiment.build(config, topology.load_devices(where))
  params = run.abstract_state().params
  return scaling.StepCost.from_compiled(
    *programs,
    gradient_bytes=4 * sum(leaf.size for leaf in jax.tree.leaves(params)),
    batch_norm=batch_norm_cost(config, params),
  )


def batch_norm_cost(config: Config, params: Any) -> scaling.BatchNormCost:
  """What groups that span devices exchange in a step, or microbatch.

  Mean and mean square of each channel and view forward, their gradients
  backward, in the update and in every step of the attack, in float32.
  """
  channels = [
    leaf.shape[1]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if optim.path_name(path).endswith('/scale')
  ]
  attacks = config.attack.steps if config.is_adversarial else 0
  return scaling.BatchNormCost(
    group_size=config.bn_group_size,
    all_reduces=2 * len(channels) * (1 + attacks),
    bytes=2 * 2 * 4 * sum(channels) * (len(config.views) + attacks),
  )
