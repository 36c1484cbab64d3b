"""The shape of the tree: floors, doorways, sizes.

Run: pytest tests/repo_test.py

The table below is the one of docs/design.md, section 1. A new module gets a
place in it, or the first test fails.
"""

import ast
import functools
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'calm_jax'

# A module imports from lower floors; the table below allows the few others.
FLOORS = (
  'array_types trees hlo value_types paths',
  'masks losses chunked_loss embedding_noise sharding distributed replicas'
  ' quantization vocabularies text.files text.settings text.added_tokens'
  ' text.ends text.chat_process text.chat_templates text.base'
  ' text.byte_vocabularies text.sentencepiece_vocabulary'
  ' text.tokenizers_vocabulary alignment',
  'models.layers models.config models.kernels models.attention'
  ' models.transformer'
  ' models.encoder models.stacking models.number_embeddings models.pretrained'
  ' models.config_fields models.rope_fields models.family_tables'
  ' models.tensor_names models.families models.directories models.weights'
  ' models.weight_files models.export models.sizes',
  'connections cross_attention sources composed_cache lora composition',
  'optimizers train_state batches array_batches stream_batches prefetch data'
  ' seqio_texts seqio_mixtures seqio_cache feature_converters checkpoints'
  ' metrics flops assembly run_files namespaces sandbox guards profiling',
  'train_step sampling decoding beam_search generation scoring evaluation',
  'model run_stages api attention_maps evaluate infer train convert import_t5x'
  ' cache reporting.runs reporting.scores reporting.pictures reporting.page'
  ' reporting.sections report jobs sweep planning.chips planning.traffic'
  ' planning.traced planning.layout planning.figures planning.moves plan'
  ' configurables gin_setup',
  'contrib.t5x contrib.lm_eval',
)
# What a module may import of its own floor.
WITHIN_A_FLOOR = {
  'sharding': '',
  'chunked_loss': 'losses',
  'quantization': 'sharding',
  'alignment': 'vocabularies',
  'text.settings': 'text.files',
  'text.chat_templates': 'text.files',
  'text.base': 'text.chat_templates text.settings',
  'text.byte_vocabularies': 'text.added_tokens text.base text.chat_templates'
  ' text.settings',
  'text.sentencepiece_vocabulary': 'text.added_tokens text.base'
  ' text.chat_templates text.ends text.files text.settings',
  'text.tokenizers_vocabulary': 'text.base text.chat_templates text.ends'
  ' text.files text.settings',
  'vocabularies': 'text.base text.byte_vocabularies text.files text.settings'
  ' text.sentencepiece_vocabulary text.tokenizers_vocabulary',
  'models.config': 'models.layers',
  'models.attention': 'models.config models.kernels models.layers',
  'models.transformer': 'models.attention models.config models.kernels'
  ' models.layers',
  'models.weight_files': 'models.directories models.weights',
  'models.export': 'models.config models.directories models.families'
  ' models.pretrained'
  ' models.weight_files models.weights',
  'models.pretrained': 'models.layers models.config models.number_embeddings'
  ' models.kernels'
  ' models.directories models.families models.weights'
  ' models.weight_files models.sizes',
  'models.rope_fields': 'models.config_fields models.layers',
  'models.tensor_names': 'models.config models.family_tables',
  'models.families': 'models.config models.config_fields models.family_tables'
  ' models.rope_fields models.tensor_names',
  'models.encoder': 'models.attention models.transformer',
  'models.stacking': 'models.transformer',
  'models.sizes': 'models.config models.families',
  'cross_attention': 'connections',
  'composition': 'composed_cache connections cross_attention lora sources',
  'checkpoints': 'train_state',
  'run_files': 'metrics',
  'sandbox': 'namespaces',
  'data': 'batches seqio_cache seqio_mixtures seqio_texts stream_batches',
  'seqio_mixtures': 'seqio_texts',
  'array_batches': 'batches',
  'stream_batches': 'batches',
  'prefetch': 'batches',
  'decoding': 'sampling',
  'beam_search': 'decoding sampling',
  'generation': 'beam_search decoding sampling',
  'scoring': 'decoding generation',
  'api': 'model',
  'run_stages': 'model',
  'train': 'model run_stages',
  'evaluation': 'generation sampling',
  'evaluate': 'api model',
  'infer': 'evaluate model',
  'import_t5x': 'model',
  'attention_maps': 'model',
  'reporting.scores': 'reporting.runs',
  'reporting.pictures': 'reporting.runs reporting.scores',
  'reporting.page': 'reporting.scores',
  'reporting.sections': 'attention_maps reporting.page reporting.pictures'
  ' reporting.runs reporting.scores',
  'report': 'attention_maps evaluate reporting.page reporting.pictures'
  ' reporting.runs reporting.scores reporting.sections',
  'sweep': 'jobs report reporting.runs reporting.scores',
  'configurables': 'cache convert evaluate import_t5x infer plan report sweep'
  ' train',
  'gin_setup': 'configurables',
  'planning.layout': 'run_stages train',
  'planning.figures': 'planning.chips planning.layout planning.traced'
  ' planning.traffic',
  'planning.moves': 'planning.chips planning.figures planning.layout',
  'plan': 'planning.chips planning.figures planning.layout planning.moves',
}
# These import nothing of ours.
NO_FLOOR = {
  '__init__',
  'contrib.__init__',
  'models.__init__',
  'planning.__init__',
  'reporting.__init__',
  'text.__init__',
}
SEQIO = {
  'data',
  'feature_converters',
  'seqio_cache',
  'seqio_mixtures',
  'seqio_texts',
}
# Who may import a library at all, be it inside a function.
DOORWAYS = {
  'jinja2': {'text.chat_process'},
  'gin': {'gin_setup'},
  'absl': {'gin_setup'},
  'orbax': {'checkpoints'},
  'seqio': {*SEQIO, 'contrib.t5x'},
  'tensorflow': SEQIO,
  't5x': {'contrib.t5x'},
  'lm_eval': {'contrib.lm_eval'},
  'qwix': {'quantization'},
  'torch': set(),
  'transformers': set(),
}
# From the command to the gradient, in the order of reading.
READING_PATH = (
  'train train_step composition cross_attention models.transformer'
  ' models.attention losses'
).split()
MAX_FILE, MAX_FUNCTION, MAX_READING_PATH = 400, 80, 1500
LONGER_FUNCTIONS = {('train', 'train'): 150}


def modules():
  """Maps 'models.layers' to its file."""
  return {
    '.'.join(file.relative_to(PACKAGE).with_suffix('').parts): file
    for file in sorted(PACKAGE.rglob('*.py'))
  }


def our_files():
  return [*modules().values(), *sorted((ROOT / 'tasks').rglob('*.py'))]


@functools.cache
def tree_of(file):
  return ast.parse(file.read_text())


def is_main_block(node):
  return (
    isinstance(node, ast.If)
    and ast.unparse(node.test) == "__name__ == '__main__'"
  )


def imports(file):
  """Lists every dotted name a file imports, outside its main block.

  `from a import b` counts as 'a.b': b may be a module.
  """
  found = []
  todo = [node for node in tree_of(file).body if not is_main_block(node)]
  while todo:
    node = todo.pop()
    todo += ast.iter_child_nodes(node)
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{file}: relative import, line {node.lineno}'
      found += [f'{node.module}.{alias.name}' for alias in node.names]
  return found


def is_task(name):
  return name.split('.')[:2] == ['calm_jax', 'tasks']


def own_imports(file):
  """Lists the modules of calm_jax that a file imports, but for tasks."""
  ours = set()
  for name in imports(file):
    if name.split('.')[0] != 'calm_jax' or is_task(name):
      continue
    parts = name.split('.')[1:]
    while parts and '.'.join(parts) not in modules():
      parts.pop()
    ours.add('.'.join(parts) or '__init__')
  return ours


def floor_of():
  return {
    name: number
    for number, floor in enumerate(FLOORS)
    for name in floor.split()
  }


def test_every_module_has_a_floor():
  assert set(modules()) - NO_FLOOR == set(floor_of())


@pytest.mark.parametrize('name', modules())
def test_a_module_imports_from_lower_floors_only(name):
  if name in NO_FLOOR:
    assert not own_imports(modules()[name])
    return
  floors = floor_of()
  same_floor = set()
  for other in own_imports(modules()[name]):
    assert floors[other] <= floors[name], f'{name} imports {other} from above'
    if floors[other] == floors[name]:
      same_floor.add(other)
  assert same_floor == set(WITHIN_A_FLOOR.get(name, '').split())


def test_tasks_stand_above_the_library():
  """configurables names them, those that are plain Python only."""
  for name, file in modules().items():
    tasks = {one for one in imports(file) if is_task(one)}
    assert not tasks or name == 'configurables', f'{name} imports {tasks}'
  for task in filter(is_task, imports(modules()['configurables'])):
    file = ROOT / 'tasks' / f'{task.split(".")[2]}.py'
    roots = {name.split('.')[0] for name in imports(file)}
    assert own_imports(file) <= {'sandbox'}, file
    assert not {'jax', 'seqio', 'tensorflow'} & roots, file


def test_nothing_imports_in_a_circle():
  graph = {name: own_imports(file) for name, file in modules().items()}
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_gin_setup_is_imported_by_main_blocks_only():
  """And a main block does nothing but hand over to it."""
  for name, file in modules().items():
    assert 'gin_setup' not in own_imports(file)
    for block in filter(is_main_block, tree_of(file).body):
      assert [ast.unparse(line) for line in block.body] == [
        'from calm_jax import gin_setup',
        f"gin_setup.main('{name}')",
      ]


@pytest.mark.parametrize('library', DOORWAYS)
def test_doorways(library):
  users = {
    name
    for name, file in modules().items()
    if library in {imported.split('.')[0] for imported in imports(file)}
  }
  assert users <= DOORWAYS[library]


def test_tasks_are_imported_by_one_name():
  """By two names, each task would be registered twice."""
  for file in our_files():
    assert 'tasks' not in {name.split('.')[0] for name in imports(file)}, file


@pytest.mark.parametrize(
  'file', our_files(), ids=lambda f: str(f.relative_to(ROOT))
)
def test_sizes(file):
  lines = file.read_text().splitlines()
  assert len(lines) <= MAX_FILE
  for node in ast.walk(tree_of(file)):
    if isinstance(node, ast.FunctionDef):
      limit = LONGER_FUNCTIONS.get((file.stem, node.name), MAX_FUNCTION)
      assert node.end_lineno - node.lineno + 1 <= limit, node.name


def test_the_reading_path_is_short():
  lengths = {
    name: len(modules()[name].read_text().splitlines()) for name in READING_PATH
  }
  assert len(lengths) <= 7
  assert sum(lengths.values()) <= MAX_READING_PATH, lengths


def test_no_utils_and_nothing_that_shadows_gin():
  names = [path.name for path in our_files()]
  assert not {'utils.py', 'util.py', 'helpers.py'} & set(names)
  assert not list((ROOT / 'gin').rglob('*.py'))


def run_python(code):
  """Runs a fresh interpreter in the root of the repository."""
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.split()


def test_gin_is_the_library_in_the_root_of_the_repository():
  assert run_python('import gin; print(callable(gin.parse_config))') == ['True']


def test_importing_calm_jax_is_free():
  code = 'import sys, calm_jax; print("jax" in sys.modules, *dir(calm_jax))'
  jax_is_there, *_ = run_python(code)
  assert jax_is_there == 'False'


@pytest.mark.slow
def test_training_and_the_interface_import_no_tensorflow():
  code = (
    'import sys, calm_jax, calm_jax.train, calm_jax.infer, calm_jax.gin_setup\n'
    'import calm_jax.report\n'
    'calm_jax.compose\n'
    'print(*{name.split(".")[0] for name in sys.modules})'
  )
  loaded = set(run_python(code))
  assert 'calm_jax' in loaded
  assert not {'tensorflow', 'seqio', 'torch', 'transformers'} & loaded
