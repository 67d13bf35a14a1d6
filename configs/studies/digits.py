r"""Digits: what a large batch costs, and whether ConAdv gives it back.

Fixed before the runs:
  - Learning rates are tuned for each method at each batch size: three values,
    two apart, and more where the best is at an end. A search trains on 80 % of
    the training examples and is judged by the other 287, on which the loss
    decides between equal accuracies. It has as many updates as an arm.
  - Arms train on all training examples, with five seeds. The 360 test examples
    are used once, at the end.
  - Batch norm over groups of 32 in every arm, so that the batch size does not
    change its noise.
  - 40 epochs for all, which is 90 updates at a batch of 640: an arm that fits
    less than 99 % of its training examples is named in the report.

Run:     python -m conadv_jax.study --study=digits --processes=2 \
           --workdir=results/studies/digits
Needs:   an hour of two cores: 96 runs of 15 to 80 s of one core, and those that
         the searches add
"""

from conadv_jax.study.design import Arm, Figure, Search, Study

METHODS = ('baseline', 'disadv', 'conadv')
# Around the square-root rule of the recipe: 2.5, 5, 8 and 11.
RATES = {
  32: (1.0, 2.0, 4.0),
  128: (2.0, 4.0, 8.0),
  320: (4.0, 8.0, 16.0),
  640: (4.0, 8.0, 16.0),
}
CELLS = [(method, size) for method in METHODS for size in RATES]


def fields(method: str, batch_size: int, **more) -> dict:
  return {
    'method': method,
    'batch_size': batch_size,
    **{name.replace('__', '.'): value for name, value in more.items()},
  }


def search(method: str, batch_size: int) -> Search:
  part = 'train[:80%]'
  return Search(
    fields(
      method, batch_size, epochs=50.0, schedule__warmup_epochs=6.25,
      dataset__train_split=part, eval__train_split=part, eval__attack='none',
    ),
    {'optimizer.learning_rate': RATES[batch_size]},
  )  # fmt: skip


def arm(method: str, batch_size: int) -> Arm:
  return Arm(
    fields(method, batch_size, eval__train_split='train', eval__attack='all'),
    seeds=5,
    search=f'{method}_{batch_size}',
    line=method,
  )


STUDY = Study(
  config='digits',
  fields={
    'epochs': 40.0,
    'bn_group_size': 32,
    'optimizer.scaling': 'none',
    'log_every_steps': 90,
    'attack_stats_every_steps': 0,
    'eval.every_steps': 0,
    'checkpoint.every_steps': 0,
  },
  validation='train[80%:]',
  test='test',
  searches={f'{m}_{size}': search(m, size) for m, size in CELLS},
  arms={f'{m}_{size}': arm(m, size) for m, size in CELLS},
  small='baseline_32',
  large='baseline_640',
  recover=('conadv_640', 'disadv_640'),
  equivalent=(('conadv_640', 'disadv_640', 1.0),),
  min_train_top1=99.0,
  figures={'batch_size': Figure(tuple(f'{m}_{size}' for m, size in CELLS))},
)
