r"""Trains the baseline and ConAdv on digits at a large batch; compares them.

Run:  python scripts/quickstart.py [--output=runs/quickstart] [--batch_size=320]

Every part is a command that you can run yourself; it is printed before it runs.
Run it again to resume a run that was stopped; finished runs are kept.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
METHODS = ('baseline', 'conadv')


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--output', type=os.path.expanduser, default='runs/quickstart'
  )
  parser.add_argument('--batch_size', type=int, default=320)
  args = parser.parse_args()

  start = time.monotonic()
  output = pathlib.Path(args.output)
  for method in METHODS:
    run(method, args.batch_size, output / method)
  summaries = {
    method: json.loads((ROOT / output / method / 'summary.json').read_text())
    for method in METHODS
  }
  print(f'\n{report(summaries)}\n')
  print('Pictures:')
  for path in sorted((ROOT / output).glob('*/plots/*.png')):
    print(f'  {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}')
  print(f'Curves: tensorboard --logdir={output}')
  print(f'Took {time.monotonic() - start:.0f} s.')


def run(method: str, batch_size: int, workdir: pathlib.Path) -> None:
  """Runs one training command; if it fails, exits with its status."""
  arguments = [
    f'--config=digits:method={method},batch_size={batch_size}',
    f'--workdir={workdir}',
  ]
  command = ['python', '-m', 'conadv_jax.train', *arguments]
  print(f'\n$ {" ".join(command)}', flush=True)
  process = subprocess.Popen([sys.executable, *command[1:]], cwd=ROOT)
  # Ctrl-C reaches the run by itself, SIGTERM does not; both let it save.
  before = {
    signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
    signal.SIGTERM: signal.signal(
      signal.SIGTERM, lambda *_: process.terminate()
    ),
  }
  status = process.wait()
  for number, handler in before.items():
    signal.signal(number, handler)
  if status:
    sys.exit(status)


def report(summaries: dict[str, dict]) -> str:
  """A table: accuracy, robust accuracy and time per step of each method."""
  epsilon = summaries['conadv']['robust_epsilon']
  lines = [
    'method      clean top-1 %'
    + f'FGSM top-1 %, {epsilon:g} of 255'.rjust(26)
    + 'ms per step'.rjust(13)
  ]
  step_ms = {}
  for method, s in summaries.items():
    step_ms[method] = 1000 * s['batch_size'] / s['images_per_sec']
    lines.append(
      f'{method:<10}{s["top1"]:>15.2f}'
      f'{s["robust_top1_by_attack"]["fgsm"]:>26.2f}{step_ms[method]:>13.1f}'
    )
  ratio = step_ms['conadv'] / step_ms['baseline']
  lines.append(
    f'A ConAdv step took {ratio:.2f}x the time of a baseline step; its '
    'arithmetic is 2.67x.'
  )
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
