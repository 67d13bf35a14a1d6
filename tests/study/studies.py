"""A small study, and a program that plays its trainings."""

from conadv_jax.study.design import Arm, Study

# Validation accuracy has its best at rate 8 and epsilon 2; test accuracy tells
# the arms apart; one arm fails, one is not finite.
FAKE = """
import json, os, pathlib, sys
flags = dict(f.lstrip('-').split('=', 1) for f in sys.argv[1:])
flags = {k.removeprefix('config.'): v for k, v in flags.items()}
path = pathlib.Path(flags['workdir'])
with open(path.parents[3] / 'calls.txt', 'a') as file:
  file.write(str(path.relative_to(path.parents[3])) + '\\n')
method = flags['method']
if method == os.environ.get('FAIL'):
  print('reading ...\\nerror: the disk is on fire')
  sys.exit(1)
if method == 'autoaugment':
  print('error: the loss is not finite')
  sys.exit(4)
rate = float(flags.get('optimizer.learning_rate', 8))
epsilon = float(flags.get('attack.epsilon', 2))
top1 = 90 - abs(rate - 8) - abs(epsilon - 2)
if flags['dataset.eval_split'] == 'test':
  seed = int(flags['seed'])
  batch = int(flags['batch_size'])
  top1 = 80 + 0.1 * seed - (2 if batch > 64 else 0) + (method == 'conadv')
summary = dict(
  steps=10, epochs=1.5, top1=top1, train_top1=99.5, train_loss=0.1,
  robust_top1_by_attack={'fgsm': top1 / 2}, images_per_sec=1.0, seconds=2.0,
  nonfinite_steps=0, spike_steps=0, flops=3e15,
)
(path / 'summary.json').write_text(json.dumps(summary))
"""

STUDY = """
from conadv_jax.study.design import Arm, Figure, Search, Study

def fields(method, batch_size):
  return {'method': method, 'batch_size': batch_size}

STUDY = Study(
  config='digits',
  fields={'epochs': 6.0},
  validation='train[80%:]',
  test='test',
  searches={
    'small': Search(
      fields('baseline', 64),
      {'optimizer.learning_rate': (2.0, 4.0, 8.0, 16.0),
       'optimizer.weight_decay': (1e-4, 2e-4)},
    ),
    'conadv': Search(
      fields('conadv', 640),
      {'optimizer.learning_rate': (1.0, 2.0, 4.0, 8.0),
       'attack.epsilon': (4.0, 8.0)},
    ),
  },
  arms={
    'baseline_64': Arm(fields('baseline', 64), 3, 'small', 'baseline'),
    'baseline_640': Arm(fields('baseline', 640), 3, 'small', 'baseline'),
    'conadv_640': Arm(fields('conadv', 640), 3, 'conadv', 'conadv'),
    'autoaugment_640': Arm(fields('autoaugment', 640), 1),
  },
  small='baseline_64',
  large='baseline_640',
  min_train_top1=99.6,
  recover=('conadv_640',),
  equivalent=(('conadv_640', 'baseline_64', 0.5),),
  figures={'batch_size': Figure(('baseline_64', 'baseline_640', 'conadv_640'))},
)
"""


def make(**changes):
  arms = {
    'a': Arm({'method': 'baseline'}, 2),
    'b': Arm({'method': 'conadv', 'batch_size': 640}, 1),
  }
  values = dict(config='digits', validation='v', test='t', arms=arms) | changes
  return Study(**values)


def fake_row(cell):
  return {
    'cell': cell.name, 'phase': cell.phase, 'arm': cell.arm, 'seed': 0,
    'status': 'done', 'digest': cell.digest, 'top1': 1.0, 'steps': 1,
    'seconds': 1.0,
  }  # fmt: skip
