"""What a gin file may name.

Entry points are imported when asked for, and TensorFlow when batches are.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from calm_jax import (
  batches,
  connections,
  guards,
  lora,
  optimizers,
  quantization,
  sampling,
  sandbox,
  sharding,
)
from calm_jax.models import config as model_config
from calm_jax.models import layers, number_embeddings, pretrained
from calm_jax.tasks import code, codexglue, flores, gsm8k
from calm_jax.tasks import mixture as mixture_lib


def seqio_batches(
  *,
  mixture_or_task_name: str | mixture_lib.Mixture,
  task_feature_lengths: Mapping[str, int],
  split: str = 'train',
  pack: bool = True,
  shuffle: bool = True,
  truncate: Literal['error', 'skip'] = 'error',
  cache_dir: str | None = None,
  streams: int = 1,
  shapes_only: bool = False,
  **run: Any,
):
  """See `calm_jax.data.seqio_batches`; imports TensorFlow when called.

  With `shapes_only` it reads no data, and returns one batch of padding.
  """
  if shapes_only:
    return batches.blank(task_feature_lengths, **run)
  from calm_jax import data

  return data.seqio_batches(
    mixture_or_task_name,
    task_feature_lengths=task_feature_lengths,
    split=split,
    pack=pack,
    shuffle=shuffle,
    truncate=truncate,
    cache_dir=cache_dir,
    streams=streams,
    **run,
  )


def task_vocabulary(mixture_or_task_name: str):
  """See `calm_jax.data.task_vocabulary`; imports TensorFlow when called."""
  from calm_jax import data

  return data.task_vocabulary(mixture_or_task_name)


def configurables() -> dict[str, Callable[..., Any]]:
  """Maps names in gin files to functions and classes."""
  from calm_jax import (
    array_batches,
    cache,
    convert,
    evaluate,
    evaluation,
    import_t5x,
    infer,
    plan,
    report,
    sweep,
    train,
    train_step,
  )

  return {
    'train': train.train,
    'evaluate': evaluate.evaluate,
    'infer': infer.infer,
    'report': report.report,
    'sweep': sweep.sweep,
    'import_t5x': import_t5x.import_t5x,
    'convert': convert.convert,
    'cache': cache.cache,
    'plan': plan.plan,
    'seqio_batches': seqio_batches,
    'npz_batches': array_batches.npz_batches,
    'task_vocabulary': task_vocabulary,
    'Evaluator': evaluation.Evaluator,
    'SeqIOTask': evaluation.SeqIOTask,
    'DecodingConfig': sampling.DecodingConfig,
    'ModelSpec': pretrained.ModelSpec,
    'pretrained_model': pretrained.pretrained_model,
    'QuantizationConfig': quantization.QuantizationConfig,
    'NumberEmbeddings': number_embeddings.NumberEmbeddings,
    'TransformerConfig': model_config.TransformerConfig,
    'RopeScaling': layers.RopeScaling,
    'LoraConfig': lora.LoraConfig,
    'CompositionConfig': connections.CompositionConfig,
    'Connection': connections.Connection,
    'LayerMapping.every': connections.LayerMapping.every,
    'LayerMapping.evenly_spaced': connections.LayerMapping.evenly_spaced,
    'LayerMapping.early': connections.LayerMapping.early,
    'LayerMapping.late': connections.LayerMapping.late,
    'LayerMapping.middle': connections.LayerMapping.middle,
    'LayerMapping.explicit': connections.LayerMapping.explicit,
    'OptimizerConfig': optimizers.OptimizerConfig,
    'StepConfig': train_step.StepConfig,
    'Guards': guards.Guards,
    'make_mesh': sharding.make_mesh,
    'Flores': flores.Flores,
    'GSM8K': gsm8k.GSM8K,
    'MGSM': gsm8k.MGSM,
    'HumanEval': code.HumanEval,
    'MBPP': code.MBPP,
    'Sandbox': sandbox.Sandbox,
    'CodeToText': codexglue.CodeToText,
    'TextFile': mixture_lib.TextFile,
    'Part': mixture_lib.Part,
    'Mixture': mixture_lib.Mixture,
  }
