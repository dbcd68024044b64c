"""pip install -e . : the packages of this repository, and main.py."""

import setuptools

EXTRAS = {
    'cuda12': ['jax[cuda12]'],
    'cuda13': ['jax[cuda13]'],
    'tpu': ['jax[tpu]'],
    'data': ['tokenizers', 'datasets'],
    'logging': ['tensorboardX', 'wandb'],
    'test': ['pytest', 'ruff', 'mypy', 'tokenizers', 'tensorboardX',
             'matplotlib'],
    'notebook': ['ipykernel', 'ipywidgets', 'matplotlib'],
    'benchmarks': ['matplotlib', 'torch', 'transformers'],
    'oracles': ['torch', 'transformers'],
}

setuptools.setup(
    name='attention-lab',
    version='0.1.0',
    description='Attention variants in JAX, from a notebook to a pod',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=setuptools.find_packages(
        include=['attention*', 'configs*', 'model*', 'train_lib*']),
    py_modules=['main'],
    install_requires=[
        'absl-py', 'flax>=0.12', 'jax>=0.10', 'jaxtyping', 'ml-collections',
        'numpy', 'optax>=0.2.6', 'orbax-checkpoint>=0.11', 'tqdm'],
    extras_require=EXTRAS)
