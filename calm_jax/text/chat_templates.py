"""Chat templates: where they lie, and their rendering in a process of its own.

A template is a program that comes with a model. It runs in jinja2's sandbox,
in a fresh process without files, network or environment and with little
memory, which is ended when its time is up (`calm_jax.text.chat_process`).
"""

from collections.abc import Mapping
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from calm_jax.text import files

TIME_LIMIT_S = 10.0
_MAX_BYTES = 2**20
_CHILD = pathlib.Path(__file__).with_name('chat_process.py')
# Isolated: neither the working directory nor the environment is looked at.
_START = 'import runpy, sys; sys.path[:] = sys.argv[2:];' + (
  'runpy.run_path(sys.argv[1])["main"]()'
)
# Without these some Pythons do not start, or tell another time.
_ENVIRONMENT = ('LD_LIBRARY_PATH', 'SYSTEMROOT', 'TZ')


def read_templates(
  directory: pathlib.Path, config: Mapping[str, Any]
) -> dict[str, str]:
  """Returns the chat templates of a model by name.

  Files win over `chat_template` in tokenizer_config.json: chat_template.jinja
  ('default'), additional_chat_templates/NAME.jinja, chat_template.json.

  Args:
    directory: of the model.
    config: its tokenizer_config.json.

  Raises:
    ValueError: if a template is no text.
  """
  templates = _from_setting(config.get('chat_template'))
  if not templates:
    beside = files.read_json(directory / 'chat_template.json')
    templates = _from_setting(beside.get('chat_template'))
  found = [directory / 'chat_template.jinja']
  found += sorted((directory / 'additional_chat_templates').glob('*.jinja'))
  for file in found:
    if files.exists(file):
      name = 'default' if file == found[0] else file.stem
      templates[name] = files.read_text(file, limit=_MAX_BYTES)
  return templates


def _from_setting(setting: Any) -> dict[str, str]:
  if setting is None:
    return {}
  if isinstance(setting, str):
    return {'default': setting}
  try:
    templates = {entry['name']: entry['template'] for entry in setting}
    if all(isinstance(t, str) for t in (*templates, *templates.values())):
      return templates
  except (TypeError, KeyError):
    pass
  raise ValueError(
    f'chat_template is {str(setting)[:80]!r}; it must be a string, or a list '
    "of objects with 'name' and 'template'. Copy the file again from the model."
  )


def as_setting(templates: Mapping[str, str]) -> str | list[dict[str, str]]:
  """Returns what `chat_template` in tokenizer_config.json is to be."""
  if templates.keys() == {'default'}:
    return templates['default']
  return [{'name': n, 'template': text} for n, text in templates.items()]


def render(
  templates: Mapping[str, str],
  name: str | None,
  variables: Mapping[str, Any],
  *,
  time_limit_s: float = TIME_LIMIT_S,
) -> str:
  """Renders one of a model's templates.

  Args:
    templates: what the model has, by name.
    name: which; None is 'tool_use' where there is one and tools are given, and
      else 'default' or the only one.
    variables: what the template sees; plain data, as in JSON.
    time_limit_s: after how many seconds it is ended.

  Raises:
    ValueError: if there is no such template, or it does not come to an end
      within its limits, or does what it may not.
  """
  if name is None:
    tools = variables.get('tools') and 'tool_use' in templates
    only = next(iter(templates)) if len(templates) == 1 else 'default'
    name = 'tool_use' if tools else only
  if name not in templates:
    raise ValueError(
      f'There is no chat template {name!r}; the model has '
      f'{sorted(templates) or "none"}. Name one of these, or use a model that '
      'was trained on chats.'
    )
  try:
    job = json.dumps({'template': templates[name], 'variables': variables})
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'Messages and variables of a chat template must be plain data ({error});'
      ' use strings, numbers, lists and dictionaries.'
    ) from error
  command = [sys.executable, '-I', '-c', _START, str(_CHILD), *sys.path]
  try:
    done = subprocess.run(
      command,
      input=job.encode('ascii'),
      capture_output=True,
      timeout=time_limit_s,
      cwd=os.sep,
      env={k: os.environ[k] for k in _ENVIRONMENT if k in os.environ},
    )
    answer = json.loads(done.stdout)
  except subprocess.TimeoutExpired:
    answer = {'error': f'it had not ended after {time_limit_s:g} s'}
  except ValueError:  # No answer: the process was ended from outside.
    answer = {
      'error': f'its process ended with code {done.returncode}: '
      + done.stderr.decode('utf-8', 'replace')[-300:]
    }
  if 'error' in answer:
    raise ValueError(
      f'The chat template {name!r} failed: {answer["error"]}. Correct the '
      'messages if it refuses them; otherwise the template is at fault.'
    )
  return answer['text']
