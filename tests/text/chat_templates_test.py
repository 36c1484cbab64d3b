"""Tests of calm_jax.text.chat_templates and chat_process."""

import time

import pytest

from calm_jax import vocabularies
from calm_jax.text import chat_templates
from tests import tokens

MESSAGES = [
  {'role': 'system', 'content': ' Be <brief>. '},
  {'role': 'user', 'content': 'Größe "x"?\n'},
]


def _render(template, *, time_limit_s=10.0, **variables):
  variables = {'messages': MESSAGES, **variables}
  return chat_templates.render(
    {'default': template}, None, variables, time_limit_s=time_limit_s
  )


def test_what_templates_expect():
  template = """
{%- for message in messages -%}
  {%- if loop.index0 == 5 -%}{%- break -%}{%- endif -%}
  {{ loop.index }}{{ message.role }}: {{ message['content'] | trim }}
    {% if loop.last %}
last
    {% endif %}
{%- endfor %}
{% generation %}{{ {'a<b': 'é', 'z': none} | tojson }}{% endgeneration %}
{{ {'b': [1], 'a': 2} | tojson(indent=1, sort_keys=true) }}
{{- strftime_now('%Y') | length }}{{ missing }}{{ tools is none }}"""
  assert _render(template, tools=None) == (
    '1system: Be <brief>.\n2user: Größe "x"?\nlast\n'
    '{"a<b": "é", "z": null}{\n "a": 2,\n "b": [\n  1\n ]\n}4True'
  )


@pytest.mark.parametrize(
  'template, error',
  [
    ("{{ ''.__class__ }}", "access to '__class__' of a str"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", 'SecurityError'),
    ("{{ ''['__class__'] }}", 'SecurityError'),
    ("{{ '' | attr('__class__') }}", 'SecurityError'),
    ("{{ [''] | map(attribute='__class__') | list }}", 'SecurityError'),
    ("{{ '{0.__class__}'.format(1) }}", 'SecurityError'),
    ("{{ ('{0.__class__}' | attr('format'))(1) }}", 'SecurityError'),
    ('{{ cycler.__init__.__globals__.os }}', 'SecurityError'),
    ('{{ raise_exception.__globals__ }}', 'SecurityError'),
    ('{{ messages.append(1) }}', 'SecurityError'),
    ("{% include '/etc/passwd' %}", 'no loader'),
    ("{% import '/etc/passwd' as x %}", 'no loader'),
    (
      "{{ raise_exception('no system role') }}",
      'TemplateError: no system role',
    ),
    ('{% if %}', 'TemplateSyntaxError'),
    ('{{ missing.attribute }}', "'missing' is undefined"),
    ('{% for i in range(10**9) %}{% endfor %}', 'Range too big'),
    ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", '4000000 chara'),
    ("{{ ('a' * 10**10) | length }}", 'more than 512 MiB'),
    ("{{ ('a' | center(10**10)) | length }}", 'more than 512 MiB'),
    ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'without end'),
  ],
)
def test_what_templates_may_not(template, error):
  with pytest.raises(ValueError, match=error):
    _render(template)


def test_time_is_limited():
  start = time.monotonic()
  loops = '{% for i in range(99999) %}' * 3 + '{% endfor %}' * 3
  with pytest.raises(ValueError, match=r'had not ended after 0\.7 s'):
    _render(loops, time_limit_s=0.7)
  assert time.monotonic() - start < 5


def test_the_process_has_no_files_and_no_environment(tmp_path, monkeypatch):
  """Even a template that has left the sandbox reads and writes nothing."""
  monkeypatch.setenv('SECRET', 'x')
  hole = tmp_path / 'chat_process.py'
  text = chat_templates._CHILD.read_text()
  assert 'jinja2.sandbox.ImmutableSandboxedEnvironment' in text
  # The same process, with a template engine that allows everything.
  text = text.replace(
    'jinja2.sandbox.ImmutableSandboxedEnvironment', 'jinja2.Environment'
  )
  hole.write_text(text)
  monkeypatch.setattr(chat_templates, '_CHILD', hole)
  builtins = 'cycler.__init__.__globals__.__builtins__'
  assert _render(f'{{{{ {builtins}.len("four") }}}}') == '4'
  environ = f"{builtins}['__import__']('os').environ.keys() | list"
  assert 'SECRET' not in _render(f'{{{{ {environ} }}}}')
  target = tmp_path / 'written'
  for call in ("open('/etc/passwd').read()", f"open('{target}', 'w')"):
    with pytest.raises(ValueError, match='Too many open files'):
      _render(f'{{{{ {builtins}.{call} }}}}')
  for call in (
    "'subprocess').check_output('id')",
    "'socket').socket()",
    "'os').listdir('/')",
  ):
    with pytest.raises(ValueError, match='Too many open files'):
      _render(f"{{{{ {builtins}['__import__']({call} }}}}")
  # A shell that starts cannot load its libraries.
  shell = f"'os').system('echo a > {target}')"
  assert _render(f"{{{{ {builtins}['__import__']({shell} }}}}") != '0'
  assert not target.exists()


def test_messages_must_be_plain_data():
  with pytest.raises(ValueError, match='must be plain data'):
    _render('x', messages=[{'role': object()}])


def test_where_templates_lie(tmp_path):
  read = chat_templates.read_templates
  assert read(tmp_path, {}) == {}
  tokens.write_json(tmp_path / 'chat_template.json', {'chat_template': 'json'})
  assert read(tmp_path, {}) == {'default': 'json'}
  assert read(tmp_path, {'chat_template': 'config'}) == {'default': 'config'}
  named = [
    {'name': 'default', 'template': 'one'},
    {'name': 'rag', 'template': 'two'},
  ]
  assert read(tmp_path, {'chat_template': named})['rag'] == 'two'
  (tmp_path / 'chat_template.jinja').write_text('jinja')
  more = tmp_path / 'additional_chat_templates'
  more.mkdir()
  (more / 'tool_use.jinja').write_text('tools')
  found = read(tmp_path, {'chat_template': named})
  assert found == {'default': 'jinja', 'rag': 'two', 'tool_use': 'tools'}
  for wrong in (7, [7], [{'name': 'a'}], [{'name': 'a', 'template': 1}]):
    with pytest.raises(ValueError, match='it must be a string, or a list'):
      read(tmp_path, {'chat_template': wrong})


def test_which_template_is_taken():
  templates = {'default': 'D', 'tool_use': 'T', 'rag': 'R'}
  take = chat_templates.render
  assert take(templates, None, {'tools': None}) == 'D'
  assert take(templates, None, {'tools': [{}]}) == 'T'
  assert take(templates, 'rag', {}) == 'R'
  assert take({'only': 'O'}, None, {}) == 'O'
  with pytest.raises(ValueError, match=r"no chat template 'x'; .*\['default'"):
    take(templates, 'x', {})
  with pytest.raises(ValueError, match='the model has none'):
    take({}, None, {})


def test_a_rendered_chat_has_one_bos(tmp_path):
  tokenizer, settings = tokens.llama3()
  settings['chat_template'] = (
    '{{ bos_token }}{% if tools is not none %}tools{% endif %}'
    '{% for m in messages %}<|start_header_id|>{{ m.role }}'
    '<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}'
    '{% if add_generation_prompt %}<|start_header_id|>assistant'
    '<|end_header_id|>\n\n{% endif %}'
  )
  tokens.write(tmp_path, tokenizer, settings)
  vocabulary = vocabularies.load_vocabulary(tmp_path)
  text = vocabulary.apply_chat_template(MESSAGES[1:])
  assert text == (
    '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n'
    'Größe "x"?\n<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
  )
  ids = vocabulary.encode_chat(MESSAGES[1:], add_generation_prompt=False)
  assert ids.count(vocabulary.bos_id) == 1
  assert vocabularies.with_bos(vocabulary, ids) == ids
  id_of = tokenizer.token_to_id
  assert (ids[1], ids[-1]) == (
    id_of('<|start_header_id|>'),
    id_of('<|eot_id|>'),
  )
  vocabulary.save(tmp_path / 'copy')
  loaded = vocabularies.load_vocabulary(tmp_path / 'copy')
  assert loaded.apply_chat_template(MESSAGES[1:]) == text
