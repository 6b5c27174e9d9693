"""The ``banyan`` command. Each command imports what it needs when it runs: ``--help`` is quick."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from cli import completion
from cli.keys import keys_app
from cli.options import (
    COMMAND,
    MACHINE,
    MODEL,
    SUITE,
    DeviceOption,
    DtypeOption,
    JsonOption,
    KVCacheDtypeOption,
    ModelOption,
    NatsUrlOption,
    NatsUserOption,
    QuantizationOption,
    UrlOption,
    option,
)
from shared.errors import BanyanError

ROOT = Path(__file__).resolve().parents[1]

app = typer.Typer(name="banyan", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(keys_app)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"banyan {_version()}")
        raise typer.Exit


def _version() -> str:
    """The version of this checkout, or of the package where there is no checkout."""
    import tomllib
    from importlib.metadata import version

    project = ROOT / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text())["project"]["version"])
    return version("banyan")


@app.callback()
def banyan(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Serve large language models with prefill and decode apart."""


@app.command()
def up(
    model: ModelOption = None,
    served_model_name: Annotated[
        str | None,
        option("served-model-name", MODEL, "What clients call it; by default its name."),
    ] = None,
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    kv_cache_dtype: KVCacheDtypeOption = "auto",
    max_model_len: Annotated[
        int | None,
        option("max-model-len", MODEL, "Longest context in tokens; by default the model's.", min=1),
    ] = None,
    prefill: Annotated[int, option("prefill", SUITE, "Prefill workers.", min=0)] = 1,
    decode: Annotated[int, option("decode", SUITE, "Decode workers.", min=0)] = 1,
    kvstore: Annotated[int, option("kvstore", SUITE, "Stores of the KV cache.", min=0)] = 1,
    scheduler: Annotated[int, option("scheduler", SUITE, "Schedulers; one leads.", min=1)] = 1,
    gateway: Annotated[
        int, option("gateway", SUITE, "Gateways, on ports from --port up.", min=1)
    ] = 1,
    predictor: Annotated[int, option("predictor", SUITE, "Length predictors.", min=0)] = 1,
    placer: Annotated[int, option("placer", SUITE, "Placers.", min=0)] = 1,
    policy: Annotated[
        str | None,
        option(
            "policy",
            SUITE,
            "Batching policy of the scheduler.",
            autocompletion=completion.policies,
        ),
    ] = None,
    host: Annotated[str, option("host", SUITE, "Where gateways listen.")] = "127.0.0.1",
    port: Annotated[int, option("port", SUITE, "Port of the gateway.", min=1, max=65535)] = 8000,
    tp: Annotated[int, option("tp", MACHINE, "Devices a worker; only 1 for now.", min=1)] = 1,
    device: DeviceOption = "auto",
    memory_fraction: Annotated[
        float | None,
        option(
            "memory-fraction",
            MACHINE,
            "Share of each device's memory for all workers on it; by default 0.9 of a GPU, 0.5 of "
            "the host.",
            min=0.001,
            max=1.0,
        ),
    ] = None,
    transport: Annotated[
        Literal["auto", "ucx", "tcp"], option("transport", MACHINE, "How KV travels.")
    ] = "auto",
    json_logs: Annotated[bool, option("json-logs", COMMAND, "Log JSON.")] = False,
    log_dir: Annotated[
        Path | None, option("log-dir", COMMAND, "For the logs; by default under ~/.cache/banyan.")
    ] = None,
    ready_file: Annotated[
        Path | None, option("ready-file", COMMAND, "Write a JSON here when ready.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Start the whole suite on this machine; Ctrl-C stops it."""
    from cli.models import resolve_model
    from cli.plan import UpOptions
    from cli.up import UpRequest, run_up

    if tp != 1:
        raise typer.BadParameter(
            "a worker on several devices is not supported yet, only 1", param_hint="--tp"
        )
    found = resolve_model(model)
    counts = {"gateway": gateway, "scheduler": scheduler, "predictor": predictor}
    counts |= {"prefill": prefill, "decode": decode, "kvstore": kvstore, "placer": placer}
    options = UpOptions(
        model_dir=found.directory,
        served_model_name=served_model_name or found.name,
        counts=counts,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        device=device,
        memory_fraction=memory_fraction,
        max_model_len=max_model_len,
        policy=policy,
        transport=transport,
        host=host,
        port=port,
        json_logs=json_logs,
    )
    request = UpRequest(suite=options, log_dir=log_dir, ready_file=ready_file, as_json=as_json)
    raise typer.Exit(run_up(request))


@app.command()
def chat(
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Ask this, print the answer, leave.")
    ] = None,
    url: UrlOption = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Which model; by default the one served.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest answer in tokens.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest.")
    ] = 0.3,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="BANYAN_API_KEY",
            help="If the gateway asks for one. The variable is seen by fewer eyes.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; needs -m.")] = False,
) -> None:
    """Talk to the model; without -m in turns, until Ctrl-D."""
    from cli.chat import ChatRequest, run_chat

    if as_json and message is None:
        raise typer.BadParameter("needs a message to answer: -m TEXT", param_hint="--json")
    request = ChatRequest(
        url=url or _default_url(),
        message=message,
        model=model,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        api_key=api_key,
        as_json=as_json,
    )
    raise typer.Exit(run_chat(request, sys.stdout, sys.stderr))


@app.command()
def status(
    url: UrlOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until Ctrl-C.")] = False,
    nats_url: NatsUrlOption = None,
    nats_user: NatsUserOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show every instance of the suite and its load."""
    from cli.bus import find_bus
    from cli.status import run_status

    address = find_bus(url, nats_url=nats_url, user=nats_user)
    raise typer.Exit(run_status(address, as_json=as_json, watch=watch, output=sys.stdout))


@app.command()
def drain(
    instance: Annotated[
        str,
        typer.Argument(
            help="As `banyan status` names it, or as much of that as is unique.",
            autocompletion=completion.instances,
        ),
    ],
    url: UrlOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended.")] = False,
    timeout_s: Annotated[
        float | None,
        typer.Option("--timeout-s", min=0.1, help="Wait no longer than this; needs --wait."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Even if nobody else can do its work.")
    ] = False,
    nats_url: NatsUrlOption = None,
    nats_user: NatsUserOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have an instance finish or hand over what it has, and end."""
    from cli.bus import find_bus
    from cli.drain import DrainRequest, run_drain

    if timeout_s is not None and not wait:
        raise typer.BadParameter("needs --wait", param_hint="--timeout-s")
    address = find_bus(url, nats_url=nats_url, user=nats_user)
    request = DrainRequest(
        instance=instance, wait=wait, timeout_s=timeout_s, force=force, as_json=as_json
    )
    raise typer.Exit(run_drain(address, request, sys.stdout, sys.stderr))


@app.command()
def profile(
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    kv_cache_dtype: KVCacheDtypeOption = "auto",
    device: DeviceOption = "auto",
    num_threads: Annotated[
        int | None,
        option("num-threads", MACHINE, "Torch threads, as many as the worker has.", min=1),
    ] = None,
    budget_s: Annotated[
        float, typer.Option("--budget-s", min=1.0, help="Measure for so many seconds at most.")
    ] = 120.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The file to write; by default latency-<model>.json."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure prefill and decode here, and fit the latency model to it."""
    from cli.models import resolve_model
    from cli.profile import ProfileRequest, run_profile

    request = ProfileRequest(
        model=resolve_model(model),
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        device=device,
        num_threads=num_threads,
        budget_s=budget_s,
        out=out,
        as_json=as_json,
    )
    raise typer.Exit(run_profile(request, sys.stdout, sys.stderr))


def _default_url() -> str:
    """The gateway of the suite that runs here; where there is none, the usual address."""
    from cli.errors import CommandFailed
    from cli.state import DEFAULT_PORT, find_suite

    suite = find_suite(None)
    if suite is None:
        return f"http://127.0.0.1:{os.environ.get('BANYAN_PORT') or DEFAULT_PORT}"
    if not suite.is_ready:
        raise CommandFailed(
            f"the suite at {suite.url} still starts: `banyan status --watch` shows how far it is"
        )
    return suite.url


def main() -> NoReturn:
    """Run the command line; errors of ours are one line on stderr and exit code 1."""
    try:
        app(prog_name="banyan")
    except BanyanError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:  # `banyan status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
