"""Where in the bytes of a text each token ends."""

from collections.abc import Sequence
import itertools
import unicodedata


def ends_of(
  text: str,
  *,
  spans: Sequence[tuple[int, int]],
  token_bytes: Sequence[bytes | None],
) -> list[int]:
  """Returns how many bytes of `text` must be read to know each token.

  Tokenizers tell the characters of a token, which is too coarse where several
  tokens share a character, and wrong for spaces that they invent. So wherever
  the bytes of the tokens are those of the text, they are counted; elsewhere (a
  normaliser changed the text) the spans decide.

  Args:
    text: what was encoded.
    spans: the characters (start, end) of each token.
    token_bytes: the bytes each token stands for; None for one that was found
      in the text as a whole, such as a special token.

  Returns:
    For each token a number of UTF-8 bytes. It never decreases, and the last is
    at most the length of the text.
  """
  byte_at = [0, *itertools.accumulate(len(c.encode('utf-8')) for c in text)]
  spans = [
    (byte_at[start], byte_at[end]) for start, end in _widened(text, spans)
  ]
  data = text.encode('utf-8')
  ends = []
  first, start = 0, 0  # Of the stretch of text since the last whole token.
  for i in range(len(spans) + 1):
    if i < len(spans) and token_bytes[i] is not None:
      continue
    stop = spans[i][0] if i < len(spans) else len(data)
    ends += _stretch(data, start, stop, spans[first:i], token_bytes[first:i])
    if i < len(spans):
      ends.append(spans[i][1])
      first, start = i + 1, spans[i][1]
  return list(itertools.accumulate(ends, max))


def _widened(text, spans):
  """Adds to spans the characters behind them that a normaliser may have used.

  Where it composes characters it counts the first of them only, and where it
  sorts the marks on a letter it counts them as they were. White space that no
  token claims was dropped, and belongs to none.
  """
  claimed = {i for start, end in spans for i in range(start, end)}
  for start, end in spans:
    while start < end < len(text) and (
      unicodedata.combining(text[end])
      or not (end in claimed or text[end].isspace())
    ):
      end += 1
    yield start, end


def _stretch(data, start, stop, spans, token_bytes) -> list[int]:
  """Returns the ends of tokens that cover data[start:stop], ordinary text."""
  exact = _count(data[start:stop], token_bytes)
  if exact is not None:
    return [start + end for end in exact]
  ends = []
  for low, high in _groups(spans):
    begin = min(span[0] for span in spans[low:high])
    end = max(span[1] for span in spans[low:high])
    exact = _count(data[begin:end], token_bytes[low:high])
    if exact is None:
      ends += [span[1] for span in spans[low:high]]
    else:
      ends += [begin + end for end in exact]
  return ends


def _groups(spans):
  """Cuts tokens into runs whose spans overlap."""
  low, reach = 0, 0
  for i, (begin, end) in enumerate(spans):
    if i > low and begin >= reach:
      yield low, i
      low = i
    reach = max(reach, end)
  if spans:
    yield low, len(spans)


def _count(data: bytes, token_bytes: Sequence[bytes]) -> list[int] | None:
  """Returns the ends of tokens whose bytes are `data`; None if they are not.

  The first token may begin with a space that is not in the text.
  """
  joined = b''.join(token_bytes)
  invented = len(joined) - len(data)
  if invented not in (0, 1) or joined != b' ' * invented + data:
    return None
  lengths = map(len, token_bytes)
  return [max(0, e - invented) for e in itertools.accumulate(lengths)]
