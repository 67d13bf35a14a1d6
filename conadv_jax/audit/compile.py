"""Compiles a training step for a slice and reports on the program."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax

from conadv_jax import models
from conadv_jax.audit.hlo.cost import Rates, cost_by_scope, total_cost
from conadv_jax.audit.hlo.program import parse
from conadv_jax.audit.hlo.schedule import collectives, inventory, overlap
from conadv_jax.config import flatten, to_dict
from conadv_jax.data import prefetch
from conadv_jax.devices.topology import Topology
from conadv_jax.experiment import Run

# What a compiler says when a program needs more memory than there is.
_OUT_OF_MEMORY = re.compile(
  r'RESOURCE_EXHAUSTED|exceeds available HBM|hbm', re.I
)
_REQUIRED = re.compile(
  r'(?:total memory required|used|Used) ?(?:for HLO temporaries )?\(?'
  r'(\d+(?:\.\d+)?)([KMGT])'
)
_MEMORY = (
  'peak_memory_in_bytes', 'argument_size_in_bytes',
  'generated_code_size_in_bytes',
)  # fmt: skip
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What XLA says about a step, in plain types; made by `compile_step`.

  Attributes:
    lower_seconds: of tracing.
    compile_seconds: of XLA.
    text: the scheduled program; '' where it needs more memory than there is.
    memory: fields of `memory_analysis()`, bytes of one device.
    costs: `flops` and `bytes accessed` of `cost_analysis()`, of one device.
    error: what XLA said where there is no program.
  """

  lower_seconds: float
  compile_seconds: float
  text: str = ''
  memory: Mapping[str, int] = dataclasses.field(default_factory=dict)
  costs: Mapping[str, float] = dataclasses.field(default_factory=dict)
  error: str = ''


class Lowered(NamedTuple):
  """The traced step, and what that took."""

  step: jax.stages.Lowered
  seconds: float


def lower_step(run: Run) -> Lowered:
  """Traces the step that `train` runs."""
  start = time.monotonic()
  step = run.lower_step()
  return Lowered(step, time.monotonic() - start)


def compile_step(run: Run, lowered: Lowered) -> Compiled:
  """Compiles the traced step for the devices of the run.

  Raises:
    jax.errors.JaxRuntimeError: if XLA fails, except for lack of memory.
  """
  start = time.monotonic()
  try:
    program = lowered.step.compile(compiler_options=run.compiler_options)
  except jax.errors.JaxRuntimeError as error:
    if not _OUT_OF_MEMORY.search(str(error)):
      raise
    seconds = time.monotonic() - start
    return Compiled(lowered.seconds, seconds, error=str(error))
  seconds = time.monotonic() - start
  memory, costs = program.memory_analysis(), program.cost_analysis()
  return Compiled(
    lowered.seconds,
    seconds,
    program.as_text(),
    {name: getattr(memory, name) for name in _MEMORY},
    {name: costs[name] for name in ('flops', 'bytes accessed')},
  )


def report(run: Run, topology: Topology, compiled: Compiled) -> dict[str, Any]:
  """Builds the report on one program, with the keys of the audit's JSON."""
  config = run.config
  limit = topology.generation.hbm_limit_bytes
  result = {
    'method': config.method,
    'model': config.model,
    'batch_size': config.batch_size,
    'examples_per_device': config.batch_size // topology.devices,
    'image_size_px': run.spec.image_shape[0],
    'bn_group_size': config.bn_group_size,
    'staleness_steps': config.staleness_steps,
    'microbatches': config.microbatches,
    'remat': config.remat,
    'shard_optimizer': config.shard_optimizer,
    'grad_allreduce_dtype': config.grad_allreduce_dtype,
    'xla_flags': config.xla_flags,
    'compiler_options': run.compiler_options,
    'topology': topology.label,
    'alias': topology.alias_label,
    'devices': topology.devices,
    'hosts': topology.hosts,
    'host_cores': topology.generation.host_vcpus,
    'mesh': dict(run.mesh.shape),
    'hbm_limit_bytes': limit,
    'flops_analytic': run.flops_per_device(),
    'lower_seconds': compiled.lower_seconds,
    'compile_seconds': compiled.compile_seconds,
    'versions': versions(),
  }
  if compiled.error:
    hbm = state_bytes(run)
    hbm['activations'] = _required_bytes(compiled.error)
    result['error'] = compiled.error.splitlines()[0]
  else:
    hbm = hbm_parts(state_bytes(run), compiled.memory)
    result |= _measured(run, topology, compiled)
  # Not part of the program, but in HBM while it runs.
  hbm['prefetched'] = prefetch.DEPTH * _bytes(run.abstract_batch())
  peak = sum(hbm.values())
  result |= {
    'fits': not compiled.error and peak <= limit,
    'peak_hbm_bytes': peak,
    'hbm': hbm,
  }
  if not result['fits']:
    result['remedies'] = remedies(run, hbm, limit)
  return result | {'config': flatten(to_dict(config))}


def _measured(
  run: Run, topology: Topology, compiled: Compiled
) -> dict[str, Any]:
  """The part of the report that needs a compiled program."""
  generation = topology.generation
  rates = Rates(generation.peak_flops_per_sec, generation.hbm_bytes_per_sec)
  program = parse(compiled.text)
  by_scope = cost_by_scope(program, rates)
  seconds = sum(scope['seconds'] for scope in by_scope.values())
  images_per_sec = run.config.batch_size / seconds
  total = total_cost(program, rates)
  # XLA's counts include elementwise arithmetic and memory on the chip, but the
  # body of a loop only once.
  once = total_cost(program, rates, loops_once=True)
  flops, accessed = compiled.costs['flops'], compiled.costs['bytes accessed']
  return {
    'flops_per_device': flops * total.flops / once.flops,
    'flops_of_products': total.flops,
    'flops_ratio': total.flops / run.flops_per_device(),
    'bytes_accessed_per_device': (
      accessed * total.accessed_bytes / once.accessed_bytes
    ),
    'hbm_bytes_per_device': sum(s['bytes'] for s in by_scope.values()),
    'roofline_seconds': seconds,
    'by_scope': by_scope,
    'images_per_sec_bound': images_per_sec,
    'images_per_sec_per_host': images_per_sec / topology.hosts,
    'collectives': inventory(collectives(program, rates)),
    'overlap': overlap(program, rates),
  }


# ---- Memory ------------------------------------------------------------------


def state_bytes(run: Run) -> dict[str, int]:
  """Counts bytes per device of what outlives a step, without padding."""
  state, batch = run.abstract_state(), run.abstract_batch()
  batches = 2 if run.config.staleness_steps else 1
  return {
    'parameters': _bytes((state.params, state.batch_stats)),
    'optimizer': _bytes(state.opt_state),
    'snapshots': _bytes(state.snapshots),
    'average': _bytes(state.ema),
    'images': batches * _bytes(batch),
    'perturbation': _bytes(state.perturbation),
  }


def hbm_parts(
  parts: Mapping[str, int], memory: Mapping[str, int]
) -> dict[str, int]:
  """Adds to the bytes of `state_bytes` what else is in HBM at the peak.

  `padding` is what the layout of the arguments adds; `activations` is the rest:
  temporaries, outputs that are not in place, gradients.
  """
  code = memory['generated_code_size_in_bytes']
  padding = max(0, memory['argument_size_in_bytes'] - sum(parts.values()))
  known = sum(parts.values()) + padding
  return dict(parts) | {
    'padding': padding,
    'code': code,
    'activations': max(0, memory['peak_memory_in_bytes'] - known - code),
  }


def remedies(
  run: Run, parts: Mapping[str, int], limit_bytes: int
) -> list[dict[str, Any]]:
  """Lists options that lower the peak, the cheapest that fits first.

  `saves_bytes` are estimates. They assume that activations shrink with the
  number of microbatches, and that the inputs of blocks are a quarter of them.
  """
  config = run.config
  total = sum(parts.values())
  activations = parts['activations']
  found = []

  def add(option: str, saves: float, cost: str) -> None:
    found.append(
      {
        'option': option,
        'saves_bytes': int(saves),
        'peak_hbm_bytes': int(total - saves),
        'fits': total - saves <= limit_bytes,
        'cost': cost,
      }
    )

  groups = config.batch_size // config.bn_group_size
  for count in range(config.microbatches + 1, groups + 1):
    whole_groups = groups % count == 0 and (
      groups // count % run.mesh.shape['data'] == 0
    )
    if not whole_groups:
      continue
    saves = activations * (1 - config.microbatches / count)
    add(f'microbatches={count}', saves, 'no arithmetic; smaller kernels')
    if found[-1]['fits']:
      break
  if config.remat == 'none' and 'remat' in models.get(config.model).options:
    add('remat=blocks', 0.75 * activations, 'one more forward pass per view')
  if not config.shard_optimizer and run.mesh.shape['data'] > 1:
    share = 1 - 1 / run.mesh.shape['data']
    add(
      'shard_optimizer=True',
      share * parts['optimizer'],
      'one all-gather a step',
    )
  if config.dtype == 'float32':
    add('dtype=bfloat16', activations / 2, 'rounding of activations')
  if config.batch_size > run.mesh.size:
    halved = activations + parts['images'] + parts['perturbation']
    add('twice the devices', halved / 2, 'a larger slice')
  return sorted(found, key=lambda r: not r['fits'])


def _bytes(tree: Any) -> int:
  """Of what one device holds of the abstract arrays in `tree`."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _required_bytes(error: str) -> int:
  match = _REQUIRED.search(error)
  return round(float(match[1]) * _UNITS[match[2]]) if match else 0


def versions() -> dict[str, str]:
  """Versions of the installed packages that determine the program."""
  found = {}
  for name in ('jax', 'jaxlib', 'libtpu', 'flax', 'optax'):
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue  # libtpu, which TPU_LIBRARY_PATH may stand in for
  return found
