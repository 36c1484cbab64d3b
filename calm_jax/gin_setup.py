"""The only importer of gin: what gin files may name, and stricter checks.

gin itself accepts a mistyped macro, a binding that nothing reads, an unfilled
REQUIRED and a value of the wrong type. `configure` accepts none of them, and
says so before the program has allocated anything.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import difflib
import inspect
import os
import pathlib
import re
import sys
import types
import typing
from typing import Any, Literal

from absl import app, flags, logging
import gin
from gin import config as gin_config

from calm_jax import (
  connections,
  distributed,
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

_INCLUDE = re.compile(r"""^include\s+['"](?P<path>[^'"]+)['"]\s*(#.*)?$""")
_REQUIRED = '%gin.REQUIRED'


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
  **run: Any,
):
  """See `calm_jax.data.seqio_batches`; imports TensorFlow when called."""
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


def register() -> None:
  """Makes known to gin what a gin file may name; more than once is fine."""
  from calm_jax import (
    array_batches,
    cache,
    convert,
    evaluate,
    evaluation,
    import_t5x,
    infer,
    report,
    sweep,
    train,
    train_step,
  )

  named = {
    'train': train.train,
    'evaluate': evaluate.evaluate,
    'infer': infer.infer,
    'report': report.report,
    'sweep': sweep.sweep,
    'import_t5x': import_t5x.import_t5x,
    'convert': convert.convert,
    'cache': cache.cache,
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
  for name, target in named.items():
    module, _, last = name.rpartition('.')
    selector = f'calm_jax.{name}'
    if selector not in gin_config._REGISTRY:
      gin.external_configurable(
        target, name=last, module=f'calm_jax.{module}'.rstrip('.')
      )


def configure(
  entry: str,
  *,
  gin_files: Sequence[str],
  bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
) -> Callable[..., Any]:
  """Parses gin files and returns the configured entry function.

  Args:
    entry: 'train', 'evaluate', 'infer', 'report', 'sweep', 'convert', 'cache'
      or 'import_t5x'.
    gin_files: paths, sought as given, in `search_paths`, then in the package.
    bindings: 'NAME = value' statements, applied last.
    search_paths: folders.

  Raises:
    ValueError: if a file or name is not found, a macro or binding is not used
      by `entry`, something required is missing, or a value has the wrong type.
  """
  gin.clear_config()
  register()
  for file in gin_files:
    _parse_file(find_gin_file(file, search_paths), search_paths)
  for binding in bindings:
    _parse(binding, where=f'--gin.{binding.replace(" = ", "=", 1)}')
  used = dict(_reachable(entry))
  _check_unused(entry, used)
  _check_values(entry, used)
  gin.finalize()
  return gin.get_configurable(entry)


def find_gin_file(path: str, search_paths: Sequence[str]) -> pathlib.Path:
  """Returns the first existing file; ValueError lists where it was sought."""
  here = pathlib.Path(__file__).parent
  folders = ['', *search_paths, here / 'gin_files', here.parent / 'gin']
  tried = [pathlib.Path(folder) / path for folder in folders]
  for candidate in tried:
    if candidate.is_file():
      return candidate
  raise ValueError(
    f'The gin file {path!r} was not found. Tried: '
    + ', '.join(str(candidate) for candidate in tried)
    + '. Add its folder with --gin_search_paths.'
  )


def _parse_file(path: pathlib.Path, search_paths: Sequence[str]) -> None:
  """Parses one file, following its includes ourselves.

  gin's own include crashes on 'a/b.gin' if a folder `a` can be imported.
  """
  chunk: list[str] = []
  lines = path.read_text().splitlines()
  for number, line in enumerate(lines, start=1):
    include = _INCLUDE.match(line)
    if include:
      _parse('\n'.join(chunk), where=str(path))
      chunk = [''] * number  # keeps the line numbers of errors
      _parse_file(find_gin_file(include['path'], search_paths), search_paths)
    else:
      chunk.append(line)
  _parse('\n'.join(chunk), where=str(path))


def _parse(text: str, *, where: str) -> None:
  try:
    gin.parse_config(text)
  except (ValueError, SyntaxError, TypeError, ImportError, AttributeError) as e:
    raise ValueError(f'{where}: {e}') from e


# --- What an entry function reaches ------------------------------------------


def _reachable(entry: str) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
  """Yields the (scope, selector) sections that a call of `entry` reads."""
  todo = [('', gin_config._REGISTRY.get_match(entry).selector)]
  seen = set()
  while todo:
    scope, selector = todo.pop()
    if (scope, selector) in seen:
      continue
    seen.add((scope, selector))
    parts = scope.split('/') if scope else []
    scopes = ['/'.join(parts[:i]) for i in range(len(parts) + 1)]
    for key in ((outer, selector) for outer in scopes):
      section = gin_config._CONFIG.get(key, {})
      if section:
        yield key, section
      for reference in gin_config.iterate_references(section):
        inner = '/'.join(reference.scopes) or scope
        todo.append((inner, reference.configurable.selector))


def _check_unused(entry: str, used: Mapping[tuple[str, str], Any]) -> None:
  unused = [key for key in gin_config._CONFIG if key not in used]
  macros = [scope for scope, selector in unused if selector == 'gin.macro']
  names = [s for s, selector in gin_config._CONFIG if selector == 'gin.macro']
  if macros:
    near = difflib.get_close_matches(
      macros[0], [n for n in names if n not in macros], n=1
    )
    hint = f' Did you mean {near[0]}?' if near else ''
    raise ValueError(
      f'The macro {macros[0]} is set, and nothing that {entry} uses reads'
      f' it.{hint} Known here: {sorted(set(names) - set(macros))}.'
    )
  if unused:
    scope, selector = unused[0]
    name = selector.removeprefix('calm_jax.')
    parameters = sorted(gin_config._CONFIG[unused[0]])
    raise ValueError(
      f'The binding {"/".join(filter(None, (scope, name)))}.{parameters[0]} is'
      f' set, and {entry} does not use it. Refer to @{name}, or remove it.'
    )


def _check_values(entry: str, used: Mapping[tuple[str, str], Any]) -> None:
  """Checks REQUIRED, missing arguments, and types of plain values."""
  for (scope, selector), section in used.items():
    target = gin_config._REGISTRY[selector].wrapped
    for name, value in section.items():
      shown = scope if selector == 'gin.macro' else f'{selector}.{name}'
      shown = shown.removeprefix('calm_jax.')
      if repr(value) == _REQUIRED:  # of a macro, its own section tells
        raise ValueError(
          f"{shown} is required and not set. Give it: --gin.{shown}='...'."
        )
      value = _follow_macros(value)
      if selector != 'gin.macro':
        expected = _type_hints(target).get(name, Any)
        if not _fits(value, expected):
          raise ValueError(
            f'{shown} = {value!r} has the wrong type: expected'
            f' {_type_name(expected)}.'
          )
  selector = gin_config._REGISTRY.get_match(entry).selector
  given = used.get(('', selector), {})
  parameters = inspect.signature(gin_config._REGISTRY[selector].wrapped)
  for name, parameter in parameters.parameters.items():
    if parameter.default is parameter.empty and name not in given:
      raise ValueError(
        f'{entry}.{name} is not set. Set it in a gin file, or use one of the'
        ' files under runs/ that do.'
      )


def _follow_macros(value: Any) -> Any:
  """Returns what a macro stands for, if it stands for a plain value."""
  while (
    isinstance(value, gin_config.ConfigurableReference)
    and value.configurable.selector == 'gin.macro'
  ):
    section = gin_config._CONFIG.get(value.config_key, {})
    if 'value' not in section:
      raise ValueError(
        f'The macro {value!r} is used and not set. Set it:'
        f' --gin.{"/".join(value.scopes)}=...'
      )
    value = section['value']
  return value


def _type_hints(target: Callable[..., Any]) -> dict[str, Any]:
  function = target.__init__ if inspect.isclass(target) else target
  return typing.get_type_hints(function)


def _fits(value: Any, expected: Any) -> bool:
  """Whether a plain value fits an annotation; what we cannot judge, fits."""
  if isinstance(value, gin_config.ConfigurableReference) or expected is Any:
    return True
  origin, arguments = typing.get_origin(expected), typing.get_args(expected)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, one) for one in arguments)
  if origin is Literal:
    return value in arguments
  if expected is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  if expected is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if origin is tuple:
    return isinstance(value, tuple | list)
  if origin is not None and inspect.isclass(origin):
    return isinstance(value, origin)
  if inspect.isclass(expected) and not getattr(expected, '_is_protocol', False):
    return isinstance(value, expected)
  return True


def _type_name(expected: Any) -> str:
  return expected.__name__ if inspect.isclass(expected) else str(expected)


# --- Command line ------------------------------------------------------------


def write_operative_config(directory: pathlib.Path) -> None:
  """Writes what was read of the configuration to `config.gin`."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / 'config.gin').write_text(gin.operative_config_str())


def config_of(
  entry: str, gin_files: Sequence[str], bindings: Sequence[str]
) -> str:
  """Returns what `configure` reads, as one gin text; its errors are its own."""
  configure(entry, gin_files=gin_files, bindings=bindings)
  return gin.config_str()


def main(entry: str) -> None:
  """Runs an entry point from the command line, with T5X's flags."""
  flags.DEFINE_multi_string('gin_file', None, 'A gin file; may be repeated.')
  flags.DEFINE_multi_string(
    'gin_bindings', [], 'NAME = value; --gin.NAME=value is the same.'
  )
  flags.DEFINE_list('gin_search_paths', [], 'Folders to look for gin files in.')
  flags.mark_flag_as_required('gin_file')
  logging.set_verbosity(logging.WARNING)  # JAX tells of every missing backend
  argv = [
    re.sub(r'^--gin\.([^=]+)=(.*)$', r'--gin_bindings=\1 = \2', arg, flags=re.S)
    for arg in sys.argv
  ]
  app.run(lambda rest: _run(entry, rest), argv=argv)


def _run(entry: str, rest: Sequence[str]) -> None:
  try:
    if len(rest) > 1:
      raise ValueError(f'Unknown arguments {rest[1:]}; flags begin with --.')
    function = configure(
      entry,
      gin_files=flags.FLAGS.gin_file,
      bindings=flags.FLAGS.gin_bindings,
      search_paths=flags.FLAGS.gin_search_paths,
    )
    distributed.initialize(os.environ, several=entry == 'train')
    offered = {
      'summarize_config': write_operative_config,
      'configure': config_of,
      'config': gin.config_str(),
    }
    wanted = inspect.signature(function).parameters
    function(**{name: offered[name] for name in offered if name in wanted})
  except (ValueError, OSError, FloatingPointError) as error:
    if os.environ.get('CALM_JAX_TRACEBACK'):
      raise
    sys.exit(f'error: {error}\n(CALM_JAX_TRACEBACK=1 shows where it arose.)')
