"""Examples that cannot be used: named once, counted, and limited."""

from __future__ import annotations

import json
import threading
from typing import Any

from etils import epath

from conadv_jax.base import storage
from conadv_jax.base.errors import DataError

# So many bad examples of a split are allowed whatever its size, if any are: one
# bad file should not end the run on a set of a few hundred.
FEWEST = 3


class Quarantine:
  """The bad examples of a run, and when there are too many of them.

  Each is a line of a JSON Lines file: `split` (`train`, `eval`, or the slice of
  others that are evaluated), `id`, `place` (file and place in it) and `reason`
  (why it cannot be used). A file of an earlier start is read first, so that the
  count continues.

  Attributes:
    path: of that file; None keeps the list in memory only.
  """

  def __init__(self, path: Any = None, *, max_share: float = 0.0):
    """Reads `path` if it is there.

    Args:
      path: JSON Lines file, appended to.
      max_share: of the examples of a split that may be bad, in [0, 1); FEWEST
        may be bad in any case, but not all of them, unless it is 0.
    """
    self.path = None if path is None else epath.Path(path)
    self._max_share = max_share
    self._known: dict[tuple[str, int], dict[str, Any]] = {}
    self._lock = threading.Lock()  # train and eval may come from two threads
    if self.path is not None and self.path.exists():
      text = storage.read(self.path.read_text, self.path)
      for line in text.splitlines():
        row = json.loads(line)
        self._known[row['split'], row['id']] = row

  def __len__(self) -> int:
    """Distinct bad examples, of all splits."""
    return len(self._known)

  def count(self, split: str) -> int:
    """Distinct bad examples of one split."""
    return sum(1 for known, _ in self._known if known == split)

  def add(
    self, split: str, example_id: int, place: str, reason: str, of: int
  ) -> None:
    """Notes that an example of `split`, which has `of` of them, is bad.

    Raises:
      DataError: if more of the split are now known to be bad than are allowed.
    """
    key = (split, int(example_id))
    row = {'split': split, 'id': key[1], 'place': place, 'reason': reason}
    with self._lock:
      if key in self._known:
        return
      self._known[key] = row
      self._write()
      count = self.count(split)
    print(f'bad example {key[1]} of {split}: {place}: {reason}', flush=True)
    if count > self._allowed(of):
      where = f'; all are in {self.path}' if self.path else ''
      raise DataError(
        f'{count} of the {of} examples of {split!r} cannot be used, which is'
        f' more than dataset.max_bad_share={self._max_share:g} allows'
        f' ({int(self._allowed(of))}); the last'
        f' is {place}: {reason}{where}. Mend the files, or raise'
        ' dataset.max_bad_share'
      )

  def _allowed(self, of: int) -> float:
    """How many of a split of `of` examples may be bad."""
    if not self._max_share:
      return 0
    return min(max(self._max_share * of, FEWEST), of - 1)

  def _write(self) -> None:
    if self.path is None:
      return
    # Whole, through a temporary file: it is short, and a bucket cannot append.
    text = ''.join(json.dumps(row) + '\n' for row in self._known.values())
    storage.write_text(self.path, text)
