"""Writes a model directory in the format of Hugging Face.

  python -m calm_jax.convert --gin_file=runs/convert.gin \
      --gin.MODEL_PATH="'/tmp/x/model'" --gin.OUTPUT_DIR="'/tmp/y'"

Nothing goes to a device: tensors pass from file to file, one at a time.
"""

from collections.abc import Callable
import pathlib

from flax import linen as nn
import jax

from calm_jax import assembly, lora, run_files, trees
from calm_jax.models import directories, export, pretrained
from calm_jax.models.pretrained import ModelSpec


def convert(
  *,
  model: ModelSpec,
  output_dir: str,
  source: str | None = None,
  model_type: str | None = None,
  dtype: str | None = None,
  lora_dir: str | None = None,
  shard_bytes: int = export.SHARD_BYTES,
  summarize_config: Callable[[pathlib.Path], None] | None = None,
) -> None:
  """Converts one model.

  Args:
    model: what is written, with weights = 'pretrained'.
    output_dir: new or empty.
    source: a Hugging Face directory (or hub id) of the same model, whose
      config.json, names and tokenizer are taken over. If None, `model`'s own
      directory, where that is one of Hugging Face.
    model_type: the family to write, if there is no source.
    dtype: what to round to; as stored if None.
    lora_dir: MODEL_DIR of a run that trained LoRA's updates of this model; they
      are added to its weights.
    shard_bytes: a larger file is split, and an index written.
    summarize_config: unused; the directory shall hold the model alone.

  Raises:
    ValueError: see `export.write_hugging_face`; or if weights are damaged.
  """
  del summarize_config
  if model.weights != 'pretrained':
    raise ValueError("Only a model with weights = 'pretrained' is converted.")
  if source is not None and model_type is not None:
    raise ValueError(
      f'source = {source!r} already says the model_type; leave'
      f' {model_type!r} out.'
    )
  where = None if source is None else directories.resolve(source)
  if where is None and model.model_type != pretrained.MODEL_TYPE:
    if model_type not in (None, model.model_type):
      raise ValueError(
        f'{model.path} is a {model.model_type} model; it cannot be written as'
        f' {model_type}.'
      )
    where, model_type = model.path, None
  output = pathlib.Path(output_dir).expanduser()
  tower = assembly.build_tower(model.config)
  shapes = nn.unbox(jax.eval_shape(tower.init_params, jax.random.key(0)))
  opened = pretrained.open_weights(model, trees.flatten(shapes))
  fingerprint = pretrained.fingerprint(model)  # reads, and checks, each byte
  print(f'{opened.report(model.path)}; fingerprint {fingerprint[:16]}')
  tensors = opened.tensors
  if lora_dir is not None:
    updates = pathlib.Path(lora_dir).expanduser()
    config, expected = run_files.read_lora(updates)
    run_files.check_fingerprints(
      expected, {'anchor': fingerprint}, where=updates
    )
    trained = run_files.read_trained(updates, name=run_files.LORA_FILE)
    tensors = lora.merge(tensors, trained, config)
  export.write_hugging_face(
    output,
    config=model.config,
    tensors=tensors,
    vocabulary=model.vocabulary,
    model_type=model_type,
    source=where,
    dtype=dtype,
    shard_bytes=shard_bytes,
  )
  written = pretrained.pretrained_model(output)
  fingerprint = pretrained.fingerprint(written)
  print(f'{output}: {written.model_type}, fingerprint {fingerprint[:16]}')


if __name__ == '__main__':
  from calm_jax import gin_setup

  gin_setup.main('convert')
