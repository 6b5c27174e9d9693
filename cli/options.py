"""Options that several commands share, each written once."""

from typing import Annotated, Any, Literal

import typer

from cli import completion

SUITE, MODEL, MACHINE, COMMAND, BUS = "Suite", "Model", "Machine", "Command", "Bus"
"""The panels of ``--help``."""


def option(name: str, panel: str, help_text: str, **settings: Any) -> Any:
    """An option that is also the variable ``BANYAN_<NAME>``."""
    variable = f"BANYAN_{name.upper().replace('-', '_')}"
    return typer.Option(
        f"--{name}", envvar=variable, rich_help_panel=panel, help=help_text, **settings
    )


ModelOption = Annotated[
    str | None,
    option("model", MODEL, "Directory or Hugging Face id. By default the bundled one."),
]
DtypeOption = Annotated[
    Literal["auto", "bf16", "fp32"], option("dtype", MODEL, "Type of weights and KV.")
]
QuantizationOption = Annotated[
    Literal["int8", "int4"] | None,
    option("quantization", MODEL, "Weights of fewer bits; needs the extra 'quant'."),
]
KVCacheDtypeOption = Annotated[
    Literal["auto", "int8", "fp8"],
    option("kv-cache-dtype", MODEL, "Eight bits a number of the KV cache, or like --dtype."),
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], option("device", MACHINE, "Where to compute.")
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar="BANYAN_URL",
        help="A gateway; by default that of the suite running here.",
        autocompletion=completion.urls,
    ),
]
NatsUrlOption = Annotated[
    str | None,
    option("nats-url", BUS, "The bus of a suite that `banyan up` did not start here."),
]
NatsUserOption = Annotated[
    str | None,
    option("nats-user", BUS, "Its user; the password comes from BANYAN_NATS_PASSWORD."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
