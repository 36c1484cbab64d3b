"""Finds added tokens in a text, for tokenizers that do not do so themselves."""

from collections.abc import Iterator, Mapping
import re

import tokenizers


class AddedTokens:
  """Tokens that are found in the text before it is tokenized."""

  def __init__(self, tokens: Mapping[int, tokenizers.AddedToken]):
    self.ids = {token.content: index for index, token in tokens.items()}
    patterns = []
    # The longest first: a token may begin with another.
    for content, index in sorted(self.ids.items(), key=lambda i: -len(i[0])):
      token = tokens[index]
      pattern = f'(?P<t{index}>{re.escape(content)})'
      if token.single_word:
        pattern = rf'(?<!\w){pattern}(?!\w)'
      left, right = r'\s*' * token.lstrip, r'\s*' * token.rstrip
      patterns.append(f'{left}{pattern}{right}')
    self._pattern = re.compile('|'.join(patterns)) if patterns else None

  def split(self, text: str) -> Iterator[tuple[int, int, int | None]]:
    """Yields the (start, end, id) of each stretch of a text, in order.

    The id is None where there is no added token. No stretch is empty.
    """
    done = 0
    for match in self._pattern.finditer(text) if self._pattern else ():
      if done < match.start():
        yield done, match.start(), None
      yield match.start(), match.end(), int(match.lastgroup[1:])
      done = match.end()
    if done < len(text):
      yield done, len(text), None
