"""Configs with some fields changed, and what is wrong with them."""

import pytest

from conadv_jax.base.errors import ConfigError
from conadv_jax.config import default_config, from_config_dict


def values_of(fields=None):
  """The defaults as nested dicts, with dotted `fields` set."""
  values = default_config().to_dict()
  for name, value in (fields or {}).items():
    *groups, leaf = name.split('.')
    node = values
    for group in groups:
      node = node[group]
    node[leaf] = value
  return values


def load(fields=None):
  return from_config_dict(values_of(fields))


def error_of(fields):
  with pytest.raises(ConfigError) as info:
    load(fields)
  return str(info.value)
