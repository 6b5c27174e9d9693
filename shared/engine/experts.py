"""How many tokens each expert of a mixture-of-experts model was given."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

# What transformers' modules of experts call the experts chosen for each token,
# ``[num_tokens, top_k]``.
CHOICES = ("top_k_index", "router_indices")


class ExpertLoad:
    """Counts on the device, for each layer, the tokens that go to each of its experts.

    A hook on the layer's module of experts adds to the counts, which costs a few small kernels
    and never waits for the device. Rows that pad a batch are counted like tokens. Layers without
    experts, or with experts of a kind that is told nothing but its tokens (Llama 4, JetMoe), are
    left out.
    """

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        found: dict[int, tuple[nn.Module, int, str]] = {}
        for index, layer in enumerate(layers):
            choices = ((module, _choice(module)) for module in layer.modules())
            choice = next(((module, *at) for module, at in choices if at is not None), None)
            if choice is not None:
                found[index] = choice
        # One more each, for ids that mean "no expert", which some routers give out.
        sizes = [_num_experts(module) + 1 for module, *_ in found.values()]
        self._all = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self._sizes = dict(zip(found, sizes, strict=True))
        views = self._all.split_with_sizes(sizes)
        for (module, position, name), counts in zip(found.values(), views, strict=True):
            module.register_forward_pre_hook(_Counter(counts, position, name), with_kwargs=True)

    def reset(self) -> None:
        """Count from zero again."""
        self._all.zero_()

    def tokens_per_expert(self) -> dict[int, tuple[int, ...]]:
        """By layer, how many tokens each of its experts was given; waits for the device once."""
        counts, start = self._all.tolist(), 0
        loads: dict[int, tuple[int, ...]] = {}
        for layer, size in self._sizes.items():
            loads[layer] = tuple(counts[start : start + size - 1])
            start += size
        return loads


class _Counter:
    """A hook before a module of experts, whose ``position``-th argument is called ``name``."""

    def __init__(self, counts: Tensor, position: int, name: str) -> None:
        self._counts = counts
        self._no_expert = len(counts) - 1
        self._one = torch.ones(1, dtype=torch.int64, device=counts.device)
        self._position = position
        self._name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[self._position] if len(args) > self._position else kwargs[self._name]
        chosen: Tensor = given.flatten().to(torch.int64).clamp(max=self._no_expert)
        # Unlike bincount this has an output of known size, so the device is not waited for.
        self._counts.scatter_add_(0, chosen, self._one.expand_as(chosen))


def _choice(module: nn.Module) -> tuple[int, str] | None:
    """Position and name of the argument with the chosen experts; ``None`` for other modules."""
    if not hasattr(module, "num_experts"):
        return None
    parameters = list(inspect.signature(module.forward).parameters)
    found = next((name for name in CHOICES if name in parameters), None)
    return None if found is None else (parameters.index(found), found)


def _num_experts(module: nn.Module) -> int:
    number: Any = module.num_experts
    return int(number)
