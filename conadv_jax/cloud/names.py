"""What may be a name; everything else is refused before anything is run."""

from __future__ import annotations

import re

from conadv_jax.base.errors import ConfigError

# field -> (pattern, in words)
_NAMES = {
  'name': (
    r'[a-z]([-a-z0-9]{0,36}[a-z0-9])?',
    'a lower-case letter, then at most 37 of a-z, 0-9 and dashes',
  ),
  'project': (
    r'([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]',
    '6 to 30 of a-z, 0-9 and dashes: the id, not the name',
  ),
  'zone': (r'[a-z]+-[a-z]+\d+-[a-z0-9]+', 'such as europe-west4-a'),
  'hosts': (
    r'([a-z_][\w-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*',
    'names or addresses with commas between, each as HOST or USER@HOST',
  ),
  'job': (r'[a-z0-9][a-z0-9_-]{0,39}', 'at most 40 of a-z, 0-9, _ and dashes'),
  'commit': (r'\w[\w./~^-]*', 'a commit, tag or branch'),
  'type': (r'[A-Za-z0-9]+[:-][0-9x]+', 'such as v5litepod-256'),
  'runtime_version': (r'[a-z0-9][a-z0-9.-]*', 'such as tpu-ubuntu2204-base'),
  'bucket': (
    r'gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/[\w./=+-]*)?',
    'gs://BUCKET/PATH of letters, digits and ._-/=+',
  ),
}  # fmt: skip


def check(field: str, value: str) -> str:
  """Returns `value` if it can be one of `field`.

  Raises:
    ConfigError: if it has characters that a name has not, such as spaces.
  """
  pattern, words = _NAMES[field]
  if not re.fullmatch(pattern, value, re.ASCII):
    raise ConfigError(f'{field}={value!r}: must be {words}')
  return value
