r"""CIFAR-10: does ConAdv give ResNet-18 back what a large batch loses?

Rates are chosen on 5,000 of the training examples that searches leave out, with
as many runs for the baseline as for ConAdv; the arms train on all 50,000.

Prepare: python scripts/prepare_cifar.py --archive=cifar-10-binary.tar.gz
Run:     python -m conadv_jax.study --study=cifar10 --workdir=runs/cifar10_study
Needs:   an accelerator; the time is not measured
"""

from conadv_jax.study.design import Arm, Figure, Search, Study

SMALL, LARGE = 256, 4096
RATES = (4.0, 8.0, 16.0)  # at LARGE; at SMALL a quarter, by the square root
ARMS = {
  f'{method}_{size}': {'method': method, 'batch_size': size}
  for method, size in (
    ('baseline', SMALL), ('baseline', LARGE), ('conadv', LARGE),
  )
}  # fmt: skip
SEARCHED = {'dataset.train_split': 'train[:45000]', 'eval.attack': 'none'}

STUDY = Study(
  config='cifar10',
  fields={
    'optimizer.base_batch_size': LARGE,
    'eval.attack': 'all',
    'eval.every_steps': 0,
    'eval.train_split': 'train[:45000]',
    'attack_stats_every_steps': 0,
  },
  validation='train[45000:]',
  test='test',
  searches={
    arm: Search(fields | SEARCHED, {'optimizer.learning_rate': RATES})
    for arm, fields in ARMS.items()
  },
  arms={
    arm: Arm(fields, 3, search=arm, line=fields['method'])
    for arm, fields in ARMS.items()
  },
  small=f'baseline_{SMALL}',
  large=f'baseline_{LARGE}',
  recover=(f'conadv_{LARGE}',),
  figures={'batch_size': Figure(tuple(ARMS))},
)
