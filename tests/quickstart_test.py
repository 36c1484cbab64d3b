"""docs/quickstart.ipynb runs from its top to its end, and learns.

Run: pytest tests/quickstart_test.py
"""

import base64
import json
import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / 'docs' / 'quickstart.ipynb'
STEPS = 250
TELL = """
import json
print(json.dumps({
  'losses': losses, 'accuracies': accuracies, 'before': before, 'after': after,
  'wanted': [one['targets'] for one in unseen],
}))
"""


def outputs(cells):
  return [output for cell in cells for output in cell.get('outputs', [])]


@pytest.mark.slow
@pytest.mark.entry
def test_it_runs_and_learns(tmp_path):
  """With fewer steps than readers take; an error in a cell is raised."""
  reason = "the notebook is NOT run: pip install -e '.[test]'"
  nbclient = pytest.importorskip('nbclient', reason=reason)
  nbformat = pytest.importorskip('nbformat', reason=reason)
  pytest.importorskip('ipykernel', reason=reason)
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      cell.outputs = []
  notebook.cells.append(nbformat.v4.new_code_cell(TELL))
  # Not the settings of tests, which compile fast and compute slowly.
  slow = ('XLA_FLAGS', 'JAX_NUM_CPU_DEVICES')
  env = {name: one for name, one in os.environ.items() if name not in slow}
  env['CALM_JAX_QUICKSTART_STEPS'] = str(STEPS)
  env['IPYTHONDIR'] = str(tmp_path)
  nbclient.NotebookClient(
    notebook,
    timeout=300,
    kernel_name='python3',
    resources={'metadata': {'path': str(ROOT)}},
  ).execute(env=env)

  (told,) = outputs(notebook.cells[-1:])
  told = json.loads(told.text)
  assert len(told['losses']) == STEPS
  assert told['losses'][-1] < told['losses'][0] / 3
  assert told['accuracies'][-1] > min(told['accuracies'][:50]) + 0.1
  # Before, it answers with a word; after, most often with numbers.
  begins = lambda text: text.split()[:1]
  assert not any(begins(text)[0].isdigit() for text in told['before'])
  digits = [begins(text)[0].isdigit() for text in told['after'] if begins(text)]
  assert sum(digits) > 0.5 * len(told['after'])
  # And the first of 99 numbers is right far more often than by luck.
  right = [
    begins(text) == begins(wanted)
    for text, wanted in zip(told['after'], told['wanted'], strict=True)
  ]
  assert sum(right) > 0.2 * len(right)
  images = [
    one for one in outputs(notebook.cells) if 'image/png' in one.get('data', {})
  ]
  assert len(images) == 2  # the curves and the attention map


def test_what_readers_see_is_whole_and_small():
  cells = json.loads(NOTEBOOK.read_text())['cells']
  code = [cell for cell in cells if cell['cell_type'] == 'code']
  assert [cell['execution_count'] for cell in code] == [
    *range(1, len(code) + 1)
  ]
  assert NOTEBOOK.stat().st_size < 250_000
  images = 0
  for output in outputs(cells):
    assert output['output_type'] != 'error'
    if 'image/png' in output.get('data', {}):
      images += 1
      assert len(base64.b64decode(output['data']['image/png'])) < 100_000
  assert images == 2
