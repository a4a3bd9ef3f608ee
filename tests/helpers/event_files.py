"""Reads TensorBoard's event files."""

import pathlib
import struct

from tensorboardX.proto import event_pb2


def values(folder: pathlib.Path) -> dict[tuple[str, int], object]:
  """What was written, as protocol buffers, by (name, step)."""
  found = {}
  for path in sorted(folder.glob("events*")):
    content, at = path.read_bytes(), 0
    while at < len(content):  # length, its checksum, the event, its checksum
      (size,) = struct.unpack_from("<Q", content, at)
      event = event_pb2.Event.FromString(content[at + 12 : at + 12 + size])
      found |= {(value.tag, event.step): value for value in event.summary.value}
      at += size + 16
  return found
