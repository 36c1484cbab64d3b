"""The process in which one chat template is rendered; see chat_templates.

It imports nothing of calm_jax: it is started by its path. What it allows:
jinja2's immutable sandbox, 512 MiB of memory, 4 million characters of output,
no file (a limit of the operating system: none can be opened any more), no
time beyond what its parent grants.
"""

import contextlib
import datetime
import json
import sys

import jinja2
import jinja2.debug
import jinja2.ext
import jinja2.sandbox

MAX_CHARACTERS = 4 * 10**6
_MEMORY_BYTES = 512 * 2**20
_CPU_S = 60
# What Python imports at first use must be there before no file can be opened.
_WARM_UP = "{{ strftime_now('%d %b %Y') }}{{ ['é'] | tojson }}{{ lipsum(n=1) }}"


class _Generation(jinja2.ext.Extension):
  """`{% generation %}` marks what the assistant said: without effect here."""

  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return jinja2.nodes.Scope(body).set_lineno(line)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  def unsafe_undefined(self, obj, attribute):
    # By default it renders as an empty text if nothing else is done with it.
    raise jinja2.exceptions.SecurityError(
      f'access to {attribute!r} of a {type(obj).__name__} is unsafe'
    )


def _refuse(message):
  raise jinja2.exceptions.TemplateError(str(message))


def _to_json(
  value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
):
  """Unlike jinja2's own, does not escape HTML."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _strftime_now(form):
  return datetime.datetime.now().strftime(form)


def render(template, variables):
  """Returns the text of a template."""
  environment = _Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _refuse
  environment.globals['strftime_now'] = _strftime_now
  pieces, total = [], 0
  for piece in environment.from_string(template).generate(**variables):
    pieces.append(piece)
    total += len(piece)
    if total > MAX_CHARACTERS:
      raise ValueError(f'it writes more than {MAX_CHARACTERS} characters')
  return ''.join(pieces)


def _limit():
  try:
    import resource
  except ImportError:  # Not on Windows; there only the time is limited.
    return
  limits = {
    resource.RLIMIT_AS: _MEMORY_BYTES,
    resource.RLIMIT_CPU: _CPU_S,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_NOFILE: 0,
    resource.RLIMIT_NPROC: 0,
    resource.RLIMIT_CORE: 0,
  }
  for kind, limit in limits.items():
    with contextlib.suppress(OSError, ValueError):  # Not on every system.
      resource.setrlimit(kind, (limit, limit))


def main():
  """Reads a job from standard input, and answers on standard output."""
  job = json.load(sys.stdin)
  render(_WARM_UP, {})
  _limit()
  try:
    answer = {'text': render(job['template'], job['variables'])}
  except MemoryError:
    answer = {'error': f'it needs more than {_MEMORY_BYTES >> 20} MiB'}
  except RecursionError:
    answer = {'error': 'it calls itself without end'}
  except Exception as error:
    answer = {'error': f'{type(error).__name__}: {error}'[:500]}
  sys.stdout.write(json.dumps(answer))
