"""Files of a benchmark: rows kept from an earlier run, JSON, CSV, PNG."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError


def settings(args: argparse.Namespace, free: Sequence[str]) -> dict[str, Any]:
  """What a result depends on: all flags but those `free` to differ."""
  free = {'output', 'quick', 'resume', *free}
  return {name: x for name, x in vars(args).items() if name not in free}


def kept_rows(args: argparse.Namespace, settings: dict) -> list[dict]:
  """Rows of an earlier run with the same settings, if they are asked for."""
  if not args.resume or not args.output.exists():
    return []
  old = json.loads(args.output.read_text())
  if old['settings'] != settings:
    raise ConfigError(f'{args.output}: --resume: made with other settings')
  return old['rows']


def write(
  report: dict[str, Any], columns: Sequence[str], path: epath.Path
) -> None:
  """Writes FILE.json, and `columns` of its rows to FILE.csv."""
  path.parent.mkdir(parents=True, exist_ok=True)
  storage.write_text(path, json.dumps(report, indent=1) + '\n')
  text = io.StringIO()
  writer = csv.DictWriter(
    text, columns, extrasaction='ignore', lineterminator='\n'
  )
  writer.writeheader()
  writer.writerows(report['rows'])
  storage.write_text(path.with_suffix('.csv'), text.getvalue())


def new_figure(path: epath.Path, size: tuple[float, float]) -> Any:
  """A figure for `path`; None, with the reason printed, if there can be none.

  A machine that is lent for a measurement may have no matplotlib.
  """
  try:
    from matplotlib.figure import Figure
  except ImportError:
    print(f'no {path.name}: matplotlib is not installed')
    return None
  return Figure(figsize=size, layout='constrained')


def save_figure(figure: Any, path: epath.Path) -> None:
  with path.open('wb') as file:
    figure.savefig(file, format='png', dpi=120)


def title(report: dict[str, Any]) -> str:
  """What was measured on what."""
  settings, machine = report['settings'], report['machine']
  return (
    f'{settings["model"]}, {settings["resolution"]} px, {settings["dtype"]}, '
    f'{machine["devices"]} x {machine["device"]}'
  )


def cell(value: float | None, digits: int = 2, unit: str = '') -> str:
  return '' if value is None else f'{value:.{digits}f}{unit}'
