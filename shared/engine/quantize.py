"""Weights of eight or four bits, by torchao; and what a quantised checkpoint needs to be read."""

from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from shared.errors import ConfigError, UnsupportedModel

# Numbers of a weight that share a scale; the first that divides its rows is taken.
INT4_GROUP_SIZES = (64, 32)
INT4_OUT_FEATURES = 16  # torch's int4 kernel on CPUs takes multiples of this only
INT8_IN_FEATURES = 16  # and its int8 kernel of this; it reads past the end of others
INT8_ALIGNMENT = 32  # bytes
# Where bf16 matrices are multiplied in hardware, unpacking pays from so many rows on.
MAX_PACKED_ROWS = 8
MIN_QUANTISED_SHARE = 0.5

# Of a checkpoint's ``quant_method``: modules to import, and the packages that have them.
CHECKPOINT_PACKAGES = {
    "torchao": {"torchao": "torchao"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "awq": {"accelerate": "accelerate", "gptqmodel": "gptqmodel"},
}


class Int8Linear(nn.Linear):
    """A linear layer with a torchao int8 weight, run by torch's packed kernel where that is faster.

    torchao itself widens the whole weight at every call. Takes bf16 on a CPU; results for a row do
    not depend on the others of a batch of up to ``max_packed_rows``, nor beyond it.
    """

    max_packed_rows: int | None

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, both bf16."""
        weight: Any = self.weight
        rows = input.reshape(-1, input.shape[-1]).contiguous()
        is_aligned = rows.data_ptr() % INT8_ALIGNMENT == 0
        limit = self.max_packed_rows
        if (limit is not None and rows.shape[0] > limit) or not is_aligned:
            return functional.linear(input, weight, self.bias)
        scales = weight.scale.flatten().to(rows.dtype)
        output = torch._weight_int8pack_mm(rows, weight.qdata, scales)
        if self.bias is not None:
            output += self.bias
        return output.view(*input.shape[:-1], -1)


def require_packages(path: Path, config: PreTrainedConfig) -> bool:
    """Whether the checkpoint in ``path`` is quantised.

    Raises ``UnsupportedModel`` for a method that transformers does not know (and would ignore), and
    naming the packages that it needs and that are not installed. Of methods not listed here
    transformers itself says what it needs.
    """
    declared: dict[str, object] | None = getattr(config, "quantization_config", None)
    if declared is None:
        return False
    method = str(declared.get("quant_method"))
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING and not method.startswith("bitsandbytes"):
        raise UnsupportedModel(f"{path} is quantised with {method}, which transformers cannot read")
    modules = CHECKPOINT_PACKAGES.get(method, {})
    missing = [package for module, package in modules.items() if find_spec(module) is None]
    if missing:
        raise UnsupportedModel(
            f"{path} is quantised with {method}; transformers reads that with "
            f"{' and '.join(modules.values())}, of which {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed"
        )
    return True


def require_torchao(method: str) -> None:
    """Raise ``ConfigError`` naming the extra if torchao is not installed."""
    if find_spec("torchao") is None:
        raise ConfigError(
            f"quantization={method!r}: needs the package torchao, which is not installed; "
            "the extra 'quant' has it (pip install -e '.[quant]')"
        )


def quantize(
    model: PreTrainedModel, method: str, device: torch.device, *, has_bf16_hardware: bool
) -> PreTrainedModel:
    """Quantise the weights of a model's layers, ``method`` ``int8`` or ``int4``, to ``device``.

    int8 has one scale a row of the weight, int4 (bf16 models only) a scale and a zero for each of
    its groups of ``INT4_GROUP_SIZES``. Changed are linear layers, and for int8 the experts of
    mixtures; embedding, norms, routers and output head stay as they are, and so do linear layers
    of a shape that the kernels cannot take. Layers move to ``device`` one after the other, so that
    it never has to hold the whole model in its old type. Raises ``ConfigError`` without torchao,
    ``UnsupportedModel`` if less than half of the weights could be quantised.
    """
    require_torchao(method)
    quantize_ = _torchao().quantize_
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    full_bytes = quantised_bytes = 0
    for module in list(model.modules()):
        if not isinstance(module, nn.Linear) or module is head:
            continue
        full_bytes += module.weight.nbytes
        scheme = _int8_scheme() if method == "int8" else _int4_scheme(module, device)
        if scheme is None:
            continue
        quantised_bytes += module.weight.nbytes
        module.to(device)
        quantize_(module, scheme)
        if method == "int8":
            _use_packed_kernel(module, device, has_bf16_hardware)
    experts = _expert_weights(model)
    expert_bytes = sum(weight.nbytes for weight in experts.values())
    full_bytes += expert_bytes
    if experts and method == "int8":
        quantised_bytes += expert_bytes
        _quantise_experts(model, experts, device)
    if quantised_bytes < MIN_QUANTISED_SHARE * full_bytes:
        raise UnsupportedModel(
            f"quantization={method!r}: of {full_bytes} bytes of weights in the layers of this "
            f"{type(model).__name__} only {quantised_bytes} have a shape that {method} takes"
            + ("; the experts of mixtures can be int8 only" if experts else "")
        )
    return cast(PreTrainedModel, model.to(device))  # type: ignore[arg-type]


def stored_bytes(model: nn.Module) -> int:
    """Memory of all parameters and of the packed weights that some methods keep as buffers."""
    packed = (buffer for buffer in model.buffers() if not buffer.is_floating_point())
    storages = {
        tensor.data_ptr(): tensor.nbytes
        for weight in (*model.parameters(), *packed)
        for tensor in _plain_tensors(weight)
    }
    return sum(storages.values())


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors behind one that stands for several."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain_tensors(getattr(tensor, name))


def _torchao(name: str = "torchao.quantization") -> Any:
    return import_module(name)


def _int8_scheme() -> Any:
    return _torchao().Int8WeightOnlyConfig(set_inductor_config=False)


def _int4_scheme(linear: nn.Linear, device: torch.device) -> Any | None:
    """How to quantise ``linear``; ``None`` if the kernels cannot take its shape."""
    group_size = next((size for size in INT4_GROUP_SIZES if linear.in_features % size == 0), None)
    if group_size is None or linear.out_features % INT4_OUT_FEATURES:
        return None
    if device.type == "cpu":
        int4 = _torchao("torchao.prototype.quantization.int4")
        return int4.PrototypeInt4WeightOnlyConfig(group_size=group_size, set_inductor_config=False)
    formats = _torchao("torchao.quantization.quantize_.workflows").Int4PackingFormat
    return _torchao().Int4WeightOnlyConfig(
        group_size=group_size,
        int4_packing_format=formats.TILE_PACKED_TO_4D,
        set_inductor_config=False,
    )


def _use_packed_kernel(linear: nn.Linear, device: torch.device, has_bf16_hardware: bool) -> None:
    weight: Any = linear.weight
    fits = linear.in_features % INT8_IN_FEATURES == 0 and type(linear) is nn.Linear
    if device.type != "cpu" or weight.dtype != torch.bfloat16 or not fits:
        return
    if weight.qdata.data_ptr() % INT8_ALIGNMENT == 0:
        linear.__class__ = Int8Linear
        cast(Int8Linear, linear).max_packed_rows = MAX_PACKED_ROWS if has_bf16_hardware else None


def _expert_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights ``[num_experts, out_features, in_features]``, as transformers keeps them."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and ".experts." in name
    }


def _quantise_experts(model: PreTrainedModel, names: Iterable[str], device: torch.device) -> None:
    """Put a list of int8 weights, one an expert, in the place of each stack of experts."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        quantised = nn.ParameterList()
        for weight in getattr(module, attribute):
            linear = nn.Linear(1, 1, bias=False)
            linear.weight = nn.Parameter(weight.to(device), requires_grad=False)
            _torchao().quantize_(linear, _int8_scheme())
            quantised.append(linear.weight)
        delattr(module, attribute)
        setattr(module, attribute, quantised)
    # One expert after the other: the grouped kernels do not take quantised weights.
    model.set_experts_implementation("eager")
