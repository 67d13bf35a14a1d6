"""The files of a report, which replace no report of something else."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from conadv_jax.audit import report, report_html
from conadv_jax.base import fields
from conadv_jax.base.errors import ConfigError
from conadv_jax.config import Config, to_dict
from conadv_jax.devices.topology import Topology

_PAGES = {
  '.json': lambda result: json.dumps(result, indent=2) + '\n',
  '.md': report.markdown,
  '.html': report_html.html,
}


def asked(
  config: Config, topologies: Sequence[Topology], options: argparse.Namespace
) -> dict[str, Any]:
  """What a report answers: its configuration, and lists that can grow."""
  sizes = options.batch_sizes if options.sweep else ''
  flags = ('compare', 'sweep', 'scaling')
  return {
    'config': fields.flatten(to_dict(config)),
    'topology': [where.label for where in topologies],
    'batch_sizes': sizes.split(',') if sizes else [str(config.batch_size)],
    'flags': [name for name in flags if getattr(options, name)],
  }


def check_free(stem: epath.Path, question: Mapping[str, Any]) -> None:
  """Raises ConfigError if files named `stem` answer another question.

  Those of the same question may be replaced, also by those of one that asks
  for more: programs that were compiled for it are not compiled again.
  """
  there = [path for path in map(_page(stem), _PAGES) if path.exists()]
  if not there:
    return
  differs = _lost(there[0], question)
  if differs:
    raise ConfigError(
      f'--output={stem.parent}: this would replace {there[0].name} there, '
      f'{differs}; use another directory, or remove that file'
    )


def write_json(path: epath.Path, result: Mapping[str, Any]) -> None:
  """Writes the report to a file that the user has named."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(_PAGES['.json'](result))
  print(f'wrote {path}')


def write_pages(stem: epath.Path, result: Mapping[str, Any]) -> None:
  """Writes the report as JSON, Markdown and HTML."""
  stem.parent.mkdir(parents=True, exist_ok=True)
  for kind, page in _PAGES.items():
    path = _page(stem)(kind)
    path.write_text(page(result))
    print(f'wrote {path}')


def _page(stem: epath.Path):
  # Names have dots, of which `with_suffix` would take the last.
  return lambda kind: stem.parent / (stem.name + kind)


def _lost(path: epath.Path, question: Mapping[str, Any]) -> str:
  """What of the report at `path` another would not have; '' is nothing."""
  try:
    before = json.loads(path.read_text())['asked']
    config, new = before['config'], json.loads(json.dumps(question))
    grown = {
      name: before[name] for name in ('topology', 'batch_sizes', 'flags')
    }
  except (OSError, ValueError, KeyError, TypeError):
    return 'which does not say what it is a report of'
  changed = [
    f'{name}={old!r}'
    for name, (old, _) in sorted(
      fields.differences(config, new['config']).items()
    )
    # Of a sweep, the batches are the list.
    if not (name == 'batch_size' and 'sweep' in grown['flags'])
  ]
  changed += [
    f'{name}={item}'
    for name, items in grown.items()
    for item in items
    if item not in new[name]
  ]
  return f'a report of {", ".join(changed)}' if changed else ''
