"""Ways to cut the products around attention, to be measured one by one."""

import functools

from pallas_kernels.residual.outer import Cut
from pallas_kernels.residual.plan import Sizes

# Other ways to cut a product, by kernel; those that do not fit a shape say so in their rows.
_STREAMS = (Sizes(), Sizes(behind=2), Sizes(together=2))
_stays = functools.partial(Sizes, columns=128, stays=True)
_STAYS = (
  Sizes(stays=True, stages=6),
  Sizes(stays=True, stages=6, behind=2),
  Sizes(stays=True, stages=3, ahead=2, behind=2),
  _stays(stages=6),
  _stays(stages=8, ahead=2, behind=2),
  _stays(stages=5, ahead=2),
  _stays(stages=8, ahead=2, behind=2, consumers=3),
  _stays(stages=5, behind=2, consumers=3),
  _stays(stages=4, consumers=3),
)
# A of several blocks' columns is copied once: what it costs the cache is shared by them.
_BESIDE = (
  _stays(stages=6, beside=2),
  _stays(stages=7, beside=2),
  _stays(stages=8, beside=2),
  _stays(stages=8, ahead=2, behind=2, beside=2),
  _stays(stages=5, ahead=2, beside=2),
  _stays(stages=6, behind=2, beside=2),
  _stays(stages=4, consumers=3, beside=2),
  _stays(stages=5, behind=2, consumers=3, beside=2),
  _stays(stages=6, beside=4),
  _stays(stages=7, beside=4),
  _stays(stages=5, ahead=2, beside=4),
  _stays(stages=4, consumers=3, beside=4),
  Sizes(behind=2, beside=2),
)
# The next tile's rows are on their way from memory meanwhile.
_far = functools.partial(_stays, prefetch=True)
_FAR = (
  Sizes(behind=2, prefetch=True),
  Sizes(prefetch=True),
  _far(stages=5, ahead=2),
  _far(stages=6),
  _far(stages=8, ahead=2, behind=2),
  _far(stages=4, consumers=3),
  _far(stages=5, behind=2, consumers=3),
  _far(stages=6, beside=2),
  _far(stages=7, beside=2),
  _far(stages=5, ahead=2, beside=2),
  _far(stages=4, consumers=3, beside=2),
  _far(stages=8, ahead=2, behind=2, beside=2),
  # Steps are half as long: less of the ring is held by the products under way.
  _far(depth=32, stages=12),
  _far(depth=32, stages=12, beside=2),
  _stays(depth=32, stages=12, beside=2),
)
_twice = functools.partial(Sizes, twice=True, in_turn=True)
_TWICE = (
  dict(depth=32, stages=6),
  dict(depth=32, stages=6, prefetch=True),
  dict(depth=32, stages=6, behind=2, prefetch=True),
  dict(depth=64, stages=3),
  dict(depth=64, stages=3, prefetch=True),
  dict(depth=64, stages=3, behind=2, prefetch=True),
  dict(depth=32, stages=5, ahead=2, prefetch=True),
)
_BACK = (
  Sizes(depth=32, stages=5),
  Sizes(depth=32, stages=4, ahead=2, together=2),
  Sizes(depth=32, stages=5, together=2),
  Sizes(depth=32, stages=5, prefetch=True),
  Sizes(together=2),
  Sizes(prefetch=True),
  Sizes(columns=128, stages=4),
  Sizes(columns=128, stages=4, prefetch=True),
  Sizes(columns=128, stages=4, beside=2),
  Sizes(columns=128, stages=4, beside=2, prefetch=True),
  Sizes(in_turn=True),
  Sizes(depth=32, stages=6, in_turn=True),
  Sizes(stages=3, in_turn=True, prefetch=True),
  Sizes(stages=3, in_turn=True, behind=2),
  _stays(stages=3),
)
_CUTS = (
  Cut(stages=3),
  Cut(step=32, stages=9),
  Cut(step=32, stages=7),
  Cut(height=128),
)
# Results share places, so that the ring has more.
_TURNS = (
  _far(stages=7, behind=2, in_turn=True),
  _far(stages=7, behind=2, in_turn=True, beside=2),
  _stays(stages=10, in_turn=True),
  _far(stages=10, in_turn=True),
)
CANDIDATES: dict[str, tuple[Sizes, ...] | tuple[Cut, ...]] = {
  "enter_gradients": (
    *_CUTS,
    Cut(ranges=32),
    Cut(ranges=22),
    Cut(ranges=11),
    Cut(height=128, width=256),
    Cut(height=128, width=256, ranges=11),
  ),
  "leave_gradients": (*_CUTS, Cut(ranges=12), Cut(ranges=26)),
  "enter": _STREAMS + _STAYS + _BESIDE + _FAR + _TURNS,
  "drop_add_attention": _STREAMS + _STAYS + _BESIDE + _FAR,
  "widen": _STREAMS + _STAYS + _BESIDE + _FAR + _TURNS,
  "drop_add": (
    *_STREAMS,
    Sizes(depth=32, stages=6),
    Sizes(ahead=2, behind=2, prefetch=True),
    Sizes(prefetch=True),
    Sizes(depth=32, stages=6, together=2),
    Sizes(ahead=2, behind=2, together=2),
  ),
  "narrow_back": _STREAMS + _STAYS + _BESIDE + _FAR,
  "widen_back": _BACK,
  "multiply": _STREAMS + _STAYS + _BESIDE + _FAR + _TURNS,
  "enter_back": (
    Sizes(depth=32, together=2),
    Sizes(depth=32, prefetch=True),
    Sizes(depth=32, beside=2),
    Sizes(depth=32, beside=2, prefetch=True),
    *(_twice(**how) for how in _TWICE),
    *(_twice(beside=2, **how) for how in _TWICE),
  ),
}
