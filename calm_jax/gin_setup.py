"""The only importer of gin, and stricter than it.

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
from typing import Any

from absl import app, flags, logging
import gin
from gin import config as gin_config

from calm_jax import configurables, distributed, replicas, value_types

_INCLUDE = re.compile(r"""^include\s+['"](?P<path>[^'"]+)['"]\s*(#.*)?$""")
_REQUIRED = '%gin.REQUIRED'
# An entry function that reads what another one would be called with, and the
# macros that it can do without: it writes nothing, and reads no data.
_READS = {'plan': 'train'}
_NOT_READ = {'plan': ('MODEL_DIR', 'MIXTURE_OR_TASK_NAME')}
# What is told without a traceback.
_TOLD = (ValueError, OSError, FloatingPointError, replicas.DivergenceError)


def register() -> None:
  """Makes known to gin what a gin file may name; more than once is fine."""
  for name, target in configurables.configurables().items():
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
    entry: 'train', 'evaluate', 'infer', 'report', 'sweep', 'convert', 'plan',
      'cache' or 'import_t5x'.
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
  for macro in _NOT_READ.get(entry, ()):
    section = gin_config._CONFIG.get((macro, 'gin.macro'), {})
    if repr(section.get('value')) == _REQUIRED:
      _parse(f"{macro} = 'not read by {entry}'", where=entry)
  for binding in bindings:
    _parse(binding, where=f'--gin.{binding.replace(" = ", "=", 1)}')
  used = dict(_reachable(entry))
  _check_unset(used)
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
  todo = [('', _selector(name)) for name in _called(entry)]
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


def _check_unset(used: Mapping[tuple[str, str], Any]) -> None:
  """Raises ValueError if a value is a macro that is not set."""
  for section in used.values():
    for value in section.values():
      _follow_macros(value)


def _called(entry: str) -> list[str]:
  return [entry, _READS[entry]] if entry in _READS else [entry]


def _selector(name: str) -> str:
  return gin_config._REGISTRY.get_match(name).selector


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
      if selector == 'gin.macro':
        continue
      if isinstance(value, gin_config.ConfigurableReference):
        value_types.check_reference(
          target, name, shown=shown, is_called=value.evaluate
        )
      else:
        value_types.check(value, target, name, shown=shown)
  for called in _called(entry):
    given = used.get(('', _selector(called)), {})
    target = gin_config._REGISTRY[_selector(called)].wrapped
    for name, parameter in inspect.signature(target).parameters.items():
      if parameter.default is parameter.empty and name not in given:
        raise ValueError(
          f'{called}.{name} is not set. Set it in a gin file, or use one of the'
          ' files under runs/ that do.'
        )


def _follow_macros(value: Any) -> Any:
  """Returns what a macro stands for, if it stands for a plain value."""
  seen = set()
  while (
    isinstance(value, gin_config.ConfigurableReference)
    and value.configurable.selector == 'gin.macro'
  ):
    if value.config_key in seen:
      raise ValueError(
        f'The macro {value!r} stands for itself, by way of'
        f' {sorted(scope for scope, _ in seen)}. Give one of them a value.'
      )
    seen.add(value.config_key)
    section = gin_config._CONFIG.get(value.config_key, {})
    if 'value' not in section:
      raise ValueError(
        f'The macro {value!r} is used and not set. Set it:'
        f' --gin.{"/".join(value.scopes)}=...'
      )
    value = section['value']
  return value


# --- Command line ------------------------------------------------------------


def write_operative_config(directory: pathlib.Path) -> None:
  """Writes what was read of the configuration to `config.gin`."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / 'config.gin').write_text(gin.operative_config_str())


def settings_of(name: str) -> dict[str, Any]:
  """Returns what gin would call a function with, references resolved."""
  return gin.get_bindings(name)


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
      'settings_of': settings_of,
      'config': gin.config_str(),
    }
    wanted = inspect.signature(function).parameters
    function(**{name: offered[name] for name in offered if name in wanted})
  except _TOLD as error:
    if os.environ.get('CALM_JAX_TRACEBACK'):
      raise
    sys.exit(f'error: {error}\n(CALM_JAX_TRACEBACK=1 shows where it arose.)')
