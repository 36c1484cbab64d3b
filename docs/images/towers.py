"""Draws docs/images/towers.svg: two frozen towers and what joins them.

python docs/images/towers.py
"""

import pathlib

import matplotlib

matplotlib.use('Agg')
from matplotlib import patches
from matplotlib import pyplot as plt

FROZEN, TRAINED, TEXT = '#d9dee4', '#2a7de1', '#2b333b'


def main() -> None:
  """Draws and saves the picture."""
  figure, axes = plt.subplots(figsize=(8.4, 4.6))
  axes.set_xlim(0, 12)
  axes.set_ylim(-0.9, 7.4)
  axes.axis('off')

  def box(x, y, width, text, colour=FROZEN, ink=TEXT):
    axes.add_patch(
      patches.FancyBboxPatch(
        (x, y), width, 0.62, boxstyle='round,pad=0.04', fc=colour, ec='white'
      )
    )
    axes.text(
      x + width / 2, y + 0.31, text, ha='center', va='center', color=ink,
      fontsize=9,
    )  # fmt: skip

  def arrow(start, stop, colour=TEXT):
    axes.annotate(
      '', xy=stop, xytext=start,
      arrowprops={'arrowstyle': '-|>', 'color': colour, 'lw': 1.4},
    )  # fmt: skip

  for i in range(3):
    box(0.6, 1 + 1.1 * i, 2.4, f'm_A block {i}')
  for i in range(5):
    box(8.2, 1 + 1.1 * i, 3, f'm_B block {i}')
  box(8.2, 6.5, 3, 'm_B head')
  box(0.6, 0, 2.4, 'embedding')
  box(8.2, 0, 3, 'embedding')
  for x, top in ((1.8, 3), (9.7, 6)):
    for i in range(top):
      arrow((x, 0.66 + 1.1 * i), (x, 0.96 + 1.1 * i))
  for i in range(3):
    y = 0.55 + 1.15 * i
    box(4.4, y, 2.6, 'projection + cross-attention', TRAINED, 'white')
    arrow((3.06, 3.5), (4.34, y + 0.31), TRAINED)
    arrow((7.06, y + 0.31), (9.6, 0.8 + 1.1 * i), TRAINED)
  axes.text(1.8, 6.6, 'augmenting model\n(frozen)', ha='center', fontsize=10)
  axes.text(5.7, 6.6, 'composition\n(all that is trained)', ha='center',
            fontsize=10, color=TRAINED)  # fmt: skip
  axes.text(9.7, -0.75, 'anchor (frozen)', ha='center', fontsize=10)
  axes.text(1.8, -0.75, 'the same tokens', ha='center', fontsize=9)
  figure.tight_layout()
  figure.savefig(pathlib.Path(__file__).with_name('towers.svg'))


if __name__ == '__main__':
  main()
