r"""Digits: what a large batch costs, and whether ConAdv gives it back.

Run:     python -m conadv_jax.study --study=digits --workdir=runs/digits_study
Needs:   two hours of two cores
Result:  results/studies/digits
"""

from conadv_jax.study.design import Arm, Figure, Search, Study

SIZES = (32, 128, 320, 640)
METHODS = ('baseline', 'disadv', 'conadv')
RATES = (1.0, 2.0, 4.0, 8.0, 16.0)


def fields(method: str, batch_size: int) -> dict:
  return {'method': method, 'batch_size': batch_size}


STUDY = Study(
  config='digits',
  fields={
    'eval.attack': 'all',
    'eval.every_steps': 0,
    'eval.train_split': 'train[:80%]',
    'attack_stats_every_steps': 0,
    'checkpoint.every_steps': 0,
    'optimizer.scaling': 'none',
  },
  validation='train[80%:]',
  test='test',
  searches={
    f'{method}_{size}': Search(
      fields(method, size) | {'dataset.train_split': 'train[:80%]'},
      {'optimizer.learning_rate': RATES},
    )
    for method in METHODS
    for size in SIZES
  },
  arms={
    f'{method}_{size}': Arm(
      fields(method, size), 8, search=f'{method}_{size}', line=method
    )
    for method in METHODS
    for size in SIZES
  },
  small='baseline_32',
  large='baseline_640',
  recover=('conadv_640', 'disadv_640'),
  equivalent=(('conadv_640', 'disadv_640', 1.0),),
  figures={
    'batch_size': Figure(tuple(f'{m}_{s}' for m in METHODS for s in SIZES)),
  },
)
