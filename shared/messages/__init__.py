"""Every wire type and every subject. ``CODEC`` knows them all."""

from shared.messages import kv, load, placement, predict, requests, subjects, tokens, workers
from shared.messages.base import ErrorReply, Message, MessageCodec
from shared.messages.registry import CODEC

__all__ = [
    "CODEC",
    "ErrorReply",
    "Message",
    "MessageCodec",
    "kv",
    "load",
    "placement",
    "predict",
    "requests",
    "subjects",
    "tokens",
    "workers",
]
