r"""Fashion-MNIST at 14x14: does ConAdv give back what a large batch loses?

Fixed before the runs:
  - 10,240 training examples, 1,024 of each class; choices are made on 10,000
    others; the 10,000 test examples are used once, at the end.
  - One network, one length for all arms but `baseline_long`: 72 epochs, at
    which a pilot of one seed fitted the training examples (99 %) in every arm.
    An attack only costs where a network does not fit them yet.
  - Batch norm over groups of 128 in every arm, so that the batch size does not
    change its noise. No augmentation but that of the arms `aa`.
  - Searches of five runs: three learning rates, two apart, and then weight
    decay where nothing is perturbed, epsilon where images are, rho where
    weights are. Batches of 512 and 2,560 take what was chosen at 1,280, with
    the rate scaled by the square root.
  - The gap is that of the baseline between 128 and 1,280. ConAdv is asked
    whether it gives it back, and whether one step of staleness costs less than
    0.3 points.

Prepare: python scripts/prepare_fashion_mnist.py --balanced
Run:     python -m conadv_jax.study --study=fashion_mnist --processes=2 \
           --workdir=results/studies/fashion_mnist
Needs:   about twenty hours of two cores
"""

from conadv_jax.study.design import Arm, Figure, Search, Study

# Parts of a batch that stay in a CPU's cache; the results are the same. On a
# GPU: --config.microbatches=1.
PARTS = {128: 1, 512: 2, 1280: 5, 2560: 10}


def fields(method: str, batch_size: int = 1280, **more) -> dict:
  return {
    'method': method,
    'batch_size': batch_size,
    'microbatches': PARTS[batch_size],
    **{name.replace('__', '.'): value for name, value in more.items()},
  }


def search(rates: tuple[float, ...], grid: dict, fields: dict) -> Search:
  return Search(
    fields | {'eval.attack': 'none'},
    {'optimizer.learning_rate': rates} | grid,
  )


RHO = {'sam.rho': (0.05, 0.1, 0.2)}
DECAY = {'optimizer.weight_decay': (5e-5, 1e-4, 2e-4)}
EPSILON = {'attack.epsilon': (2.0, 4.0, 8.0)}
SMALL = {'optimizer__base_batch_size': 128}
NESTEROV = {
  'optimizer__name': 'sgd',
  'optimizer__nesterov': True,
}
LAMB = {'optimizer__name': 'lamb'}
NOISE = {'attack__preset': 'random_signs'}
RATES = (4.0, 8.0, 16.0)

# The gap, and what gives it back.
CLAIM = {
  'baseline_128': Arm(
    fields('baseline', 128, **SMALL), 8, 'baseline_128', 'baseline'
  ),
  'baseline_512': Arm(fields('baseline', 512), 3, 'baseline', 'baseline'),
  'baseline_1280': Arm(fields('baseline'), 8, 'baseline', 'baseline'),
  'baseline_2560': Arm(fields('baseline', 2560), 3, 'baseline', 'baseline'),
  'conadv_512': Arm(fields('conadv', 512), 3, 'conadv', 'conadv'),
  'conadv_1280': Arm(fields('conadv'), 8, 'conadv', 'conadv'),
  'conadv_2560': Arm(fields('conadv', 2560), 3, 'conadv', 'conadv'),
  'disadv_1280': Arm(fields('disadv'), 5, 'conadv'),
  'noise_1280': Arm(fields('conadv', **NOISE), 5, 'conadv'),
  'baseline_long': Arm(fields('baseline', epochs=192.0), 5, 'baseline'),
  'autoaugment_1280': Arm(fields('autoaugment'), 5, 'autoaugment'),
  'conadv_aa_1280': Arm(fields('conadv_aa'), 5, 'conadv_aa'),
  'nesterov_1280': Arm(fields('baseline', **NESTEROV), 5, 'nesterov'),
  'lamb_1280': Arm(fields('baseline', **LAMB), 5, 'lamb'),
}
# Weights perturbed, instead of images and with them.
WEIGHTS = {
  'sam_1280': Arm(fields('sam'), 8, 'consam'),
  'consam_1280': Arm(fields('consam'), 8, 'consam'),
  'sampa_1280': Arm(fields('sampa'), 8, 'sampa'),
  'msam_1280': Arm(fields('msam'), 8, 'msam'),
  'random_1280': Arm(fields('random'), 8, 'consam'),
  'conadv_consam_1280': Arm(fields('conadv_consam'), 8, 'conadv_consam'),
}
ARMS = {
  **CLAIM,
  # Staleness; tau = 0 and 1 are disadv_1280 and conadv_1280
  **{
    f'tau_{tau}': Arm(fields('conadv', staleness_steps=tau), 3, 'conadv')
    for tau in (2, 4, 8, 16)
  },
  # The attack.
  **{
    f'epsilon_{epsilon:g}': Arm(
      fields('conadv', attack__epsilon=epsilon), 3, 'conadv'
    )
    for epsilon in (1.0, 2.0, 4.0, 8.0, 16.0)
  },
  'random_start': Arm(
    fields('conadv', attack__random_start_prob=1.0), 3, 'conadv'
  ),
  'targeted': Arm(fields('conadv', attack__targeted=True), 3, 'conadv'),
  'attack_eval_mode': Arm(
    fields('conadv', attack__train_mode=False), 3, 'conadv'
  ),
  'shared_bn': Arm(fields('conadv_shared_bn'), 3, 'conadv'),
  **WEIGHTS,
}

STUDY = Study(
  config='fashion_mnist_14px',
  fields={
    'epochs': 72.0,
    'optimizer.base_batch_size': 1280,
    'eval.attack': 'all',
    'eval.train_split': 'train[:10240]',
    'attack_stats_every_steps': 0,
    'log_every_steps': 48,
    'checkpoint.every_steps': 192,
    'checkpoint.keep': 1,
  },
  validation='train[10240:20240]',
  test='test',
  searches={
    'baseline_128': search(
      (2.0, 4.0, 8.0), DECAY, fields('baseline', 128, **SMALL)
    ),
    'baseline': search(RATES, DECAY, fields('baseline')),
    'conadv': search(RATES, EPSILON, fields('conadv')),
    'autoaugment': search(RATES, DECAY, fields('autoaugment')),
    'conadv_aa': search(RATES, EPSILON, fields('conadv_aa')),
    'nesterov': search(
      (0.25, 0.5, 1.0), DECAY, fields('baseline', **NESTEROV)
    ),
    'lamb': search((0.01, 0.02, 0.04), DECAY, fields('baseline', **LAMB)),
    'consam': search(RATES, RHO, fields('consam')),
    'sampa': search(RATES, RHO, fields('sampa')),
    'msam': search(RATES, {'sam.rho': (0.3, 1.0, 3.0)}, fields('msam')),
    'conadv_consam': search(RATES, RHO, fields('conadv_consam')),
  },
  arms=ARMS,
  small='baseline_128',
  large='baseline_1280',
  recover=('conadv_1280', 'consam_1280', 'conadv_consam_1280'),
  equivalent=(
    ('conadv_1280', 'disadv_1280', 0.3),
    ('consam_1280', 'sam_1280', 0.3),
  ),
  min_train_top1=99.0,
  analyse=('--what=curvature,sharpness', '--probes=20'),
  analysed=(*CLAIM, *WEIGHTS),
  figures={
    'batch_size': Figure(
      tuple(a for a in ARMS if a.startswith(('baseline_', 'conadv_')))[:7]
    ),
    'rivals': Figure(
      (
        'baseline_128', 'baseline_1280', 'conadv_1280', 'disadv_1280',
        'noise_1280', 'baseline_long', 'autoaugment_1280', 'conadv_aa_1280',
        'nesterov_1280', 'lamb_1280',
      ),
      axis='',
    ),
    'weights': Figure(
      (
        'baseline_128', 'baseline_1280', 'conadv_1280', 'sam_1280',
        'consam_1280', 'sampa_1280', 'msam_1280', 'random_1280',
        'conadv_consam_1280',
      ),
      axis='',
    ),
    'staleness': Figure(
      ('disadv_1280', 'conadv_1280', 'tau_2', 'tau_4', 'tau_8', 'tau_16'),
      axis='staleness_steps',
      line='conadv',
    ),
    'epsilon': Figure(
      tuple(a for a in ARMS if a.startswith('epsilon_')),
      axis='attack.epsilon',
      line='conadv',
    ),
    'attack': Figure(
      (
        'baseline_1280', 'conadv_1280', 'random_start', 'targeted',
        'attack_eval_mode', 'shared_bn', 'noise_1280',
      ),
      axis='',
    ),
  },
)  # fmt: skip
