"""The same modules for Linen projects: classes that take the same arguments, without `rngs`.

    layer = sparse_flax.linen.SparseSelfAttention(
        width=512, num_heads=8, pattern=patterns.Strided(128))
    variables = layer.init(jax.random.key(0), x)
    y = layer.apply(variables, x)

`nn.remat`, `nn.scan` and inheritance take them. Weights are plain arrays under "params", or boxes
where an initializer makes boxes, as those of `nn.with_partitioning` do. `apply` takes what the
originals are called with: `dropout_key`, `segment_ids` and so on. `nn.remat` of a class traces
those arguments, which `score_fn` and `block_size` cannot be: remat a module of yours that has them.
"""

import inspect
from collections.abc import Callable
from typing import Any

from flax import core
from flax import errors
from flax import linen as nn
from flax import nnx
from flax import traverse_util

from pallas_kernels import api
from sparse_flax import model as model_lib


class _Twin(nn.Module):
  """Linen's side of an NNX class; its fields are the arguments of that class but `rngs`."""

  def __post_init__(self):
    super().__post_init__()
    api.load_backend(self.implementation)  # here nothing is being traced yet

  def __call__(self, *args, **kwargs):
    return self.nnx_module()(*args, **kwargs)

  def nnx_module(self) -> nnx.Module:
    """The NNX module with the weights of this one: for its other methods."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: self._build(nnx.Rngs(0))), nnx.Param)
    if self.is_initializing() and not any(self.has_variable("params", name) for name in shapes):
      for name, value in self._initial_weights().items():
        self.put_variable("params", name, value)
    for name in shapes:
      if not self.has_variable("params", name):
        raise errors.ScopeParamNotFoundError(name, self.scope.path_text)
    weights = {name: self.get_variable("params", name) for name in shapes}
    weights = core.unfreeze(core.meta.unbox(weights))
    return nnx.merge(graphdef, nnx.restore_int_paths(weights))

  def _initial_weights(self) -> dict:
    module, weights = self._build(nnx.Rngs(params=self.make_rng("params"))), {}
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
      box, value = variable.get_metadata().get("linen_box"), variable[...]
      weights[tuple(map(str, path))] = value if box is None else box.replace_boxed(value)
    return traverse_util.unflatten_dict(weights)

  def _build(self, rngs: nnx.Rngs) -> nnx.Module:
    fields = {name: getattr(self, name) for name in _arguments(self.original)}
    made = lambda name, x: _unboxed(x) if name.endswith("_init") and callable(x) else x
    return self.original(**{name: made(name, x) for name, x in fields.items()}, rngs=rngs)


def _arguments(original: type[nnx.Module]) -> dict[str, inspect.Parameter]:
  parameters = inspect.signature(original.__init__).parameters
  return {name: one for name, one in parameters.items() if name not in ("self", "rngs")}


def _unboxed(init: Callable) -> Callable:
  """An initializer of Linen as NNX takes it: a box becomes metadata of the variable."""

  def run(*args):
    made = init(*args)
    if not isinstance(made, core.meta.AxisMetadata):
      return made
    return nnx.VariableMetadata(made.unbox(), metadata={"linen_box": made.replace_boxed(None)})

  return run


def _twin(original: type[nnx.Module]) -> type[nn.Module]:
  parameters = _arguments(original)
  defaults = {name: one.default for name, one in parameters.items() if one.default != one.empty}
  in_order = sorted(parameters, key=lambda name: name in defaults)  # as dataclasses want it
  namespace = {
    "__annotations__": dict.fromkeys(in_order, Any),
    "__doc__": f"Linen twin of sparse_flax.{original.__name__}.\n\n{original.__init__.__doc__}",
    "__module__": __name__,
    "original": original,
  }
  return type(original.__name__, (_Twin,), namespace | defaults)


SparseSelfAttention = _twin(model_lib.SparseSelfAttention)
SparseCrossAttention = _twin(model_lib.SparseCrossAttention)
SparseTransformer = _twin(model_lib.SparseTransformer)
