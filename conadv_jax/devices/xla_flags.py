"""Sets of compiler options for the training step, by kind of device.

They go with the program that is compiled, not into the environment, so that an
audit compiles with what trains, and config.json records them.
"""

from __future__ import annotations

# Options of libtpu 0.0.42; one that a compiler does not know fails the compile.
#
# v5e has no SparseCore: there an all-reduce is cut in pieces that ride in other
# kernels (continuation fusion), if it has one operand: `grad_buckets`.
_CONTINUATION_FUSION = {
  'xla_enable_async_all_reduce': True,
  'xla_tpu_enable_async_collective_fusion': True,
  'xla_tpu_enable_async_collective_fusion_fuse_all_reduce': True,
  'xla_tpu_enable_async_collective_fusion_multiple_steps': True,
  'xla_tpu_overlap_compute_collective_tc': True,
}
# Later generations have a processor beside the TensorCore that can do it; TPU7x
# does so by default.
_SPARSE_CORE = {
  'xla_enable_async_all_reduce': True,
  'xla_tpu_enable_sparse_core_collective_offload_all_reduce': True,
}
# v2 to v4 know neither: their all-reduces are synchronous, whatever is set.
_OVERLAP = {
  'TPU v5 lite': _CONTINUATION_FUSION,
  'TPU v5': _SPARSE_CORE,
  'TPU v5p': _SPARSE_CORE,
  'TPU v6 lite': _SPARSE_CORE,
  'TPU7x': _SPARSE_CORE,
}
# For the sums between slices, over the data centre network, if they are many:
# one (`grad_buckets`) runs beside other work without.
_MULTISLICE = {
  'xla_tpu_enable_data_parallel_all_reduce_opt': True,
  'xla_tpu_data_parallel_opt_different_sized_ops': True,
}


def compiler_options(name: str, device_kind: str) -> dict[str, bool]:
  """Options of the set `name` ('none', 'overlap', 'multislice').

  Empty on devices for which the set has none, all that are no TPUs among them.
  """
  if name == 'none' or not device_kind.startswith('TPU'):
    return {}
  return dict(
    _MULTISLICE if name == 'multislice' else _OVERLAP.get(device_kind, {})
  )
