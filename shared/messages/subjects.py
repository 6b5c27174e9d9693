"""Every subject on the bus, built here and nowhere else.

========================================  =======================  ==============================
subject (under ``banyan.v1.``)            from → to                kind
========================================  =======================  ==============================
``requests.<model>``                      gateway → leader         request/reply
``predict``                               scheduler → predictor    request/reply, queue group
``prefill.<instance>.<verb>``             scheduler → worker       request/reply
``decode.<instance>.<verb>``              scheduler → worker       request/reply
``tokens.to.<gateway>``                   worker → gateway         publish, one per engine step
``tokens.since.<instance>``               gateway → worker         request/reply
``tokens.ack.<instance>``                 gateway → worker         publish
``events.request.<request>``              worker → scheduler       publish, hints
``events.gateway.<gateway>``              leader → gateway         publish, hints
``events.leader``                         leader → everybody       publish
``load.<role>.<instance>``                every service → any      publish, 10 a second (workers)
``snapshot.<instance>``                   leader → that service    request/reply
``kv.<instance>.<verb>``                  worker → kvstore         request/reply
``placement``                             anybody → placer         request/reply, queue group
``control.<instance>.<verb>``             CLI, leader → service    request/reply
========================================  =======================  ==============================

A name becomes one token of a subject: whatever is not a letter, digit, ``_`` or ``-`` is written as
``=`` and two hex digits a byte, so that a model called ``Qwen2.5`` stays one token (``Qwen2=2E5``).
The same tokens are valid in lease keys.
"""

import re

PREFIX = "banyan.v1"
_UNSAFE = re.compile(r"[^A-Za-z0-9_\-]")


def token(name: str) -> str:
    """``name`` as one subject token; distinct names give distinct tokens."""
    if not name:
        raise ValueError("an empty name cannot be part of a subject")
    return _UNSAFE.sub(lambda m: "".join(f"={b:02X}" for b in m[0].encode()), name)


def requests(model: str) -> str:
    """Where the leading scheduler takes and closes requests for ``model``."""
    return f"{PREFIX}.requests.{token(model)}"


def predict() -> str:
    """Where predictors answer (queue group)."""
    return f"{PREFIX}.predict"


def worker(role: str, instance: str, verb: str) -> str:
    """Where one worker takes commands; ``role`` is ``prefill`` or ``decode``."""
    return f"{PREFIX}.{token(role)}.{token(instance)}.{verb}"


def tokens_to(gateway: str) -> str:
    """Where workers publish what they generated for the requests of ``gateway``."""
    return f"{PREFIX}.tokens.to.{token(gateway)}"


def tokens_since(instance: str) -> str:
    """Where a worker answers what it generated from an offset on."""
    return f"{PREFIX}.tokens.since.{token(instance)}"


def tokens_ack(instance: str) -> str:
    """Where a worker learns which outputs it need not keep any longer."""
    return f"{PREFIX}.tokens.ack.{token(instance)}"


def request_events(request_id: str) -> str:
    """What happened to one request, from the workers."""
    return f"{PREFIX}.events.request.{token(request_id)}"


def all_request_events() -> str:
    """What happened to any request."""
    return f"{PREFIX}.events.request.*"


def gateway_events(gateway: str) -> str:
    """What the leader tells the owner of a request."""
    return f"{PREFIX}.events.gateway.{token(gateway)}"


def leader_events() -> str:
    """Where a new leader announces itself."""
    return f"{PREFIX}.events.leader"


def load(role: str, instance: str) -> str:
    """The load reports of one instance."""
    return f"{PREFIX}.load.{token(role)}.{token(instance)}"


def all_load() -> str:
    """The load reports of every instance of every role."""
    return f"{PREFIX}.load.*.*"


def load_of_role(role: str) -> str:
    """The load reports of every instance of ``role``."""
    return f"{PREFIX}.load.{token(role)}.*"


def snapshot(instance: str) -> str:
    """Where a worker or gateway says what it holds."""
    return f"{PREFIX}.snapshot.{token(instance)}"


def kv(instance: str, verb: str) -> str:
    """Where one KV store instance answers."""
    return f"{PREFIX}.kv.{token(instance)}.{verb}"


def placement() -> str:
    """Where the placer answers (queue group)."""
    return f"{PREFIX}.placement"


def control(instance: str, verb: str) -> str:
    """Operator commands to one instance."""
    return f"{PREFIX}.control.{token(instance)}.{verb}"
