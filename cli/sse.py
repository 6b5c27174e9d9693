"""Server-sent events, as far as the OpenAI API uses them. No I/O."""

from collections.abc import Iterable, Iterator


def event_data(lines: Iterable[str]) -> Iterator[str]:
    """The data of each event in ``lines`` (without their line feeds).

    Several ``data`` lines of one event are joined by line feeds; comments and other fields are
    skipped. An event that the stream ends in the middle of is not reported.
    """
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield "\n".join(data)
            data = []
            continue
        name, _, value = line.partition(":")
        if name == "data":
            data.append(value.removeprefix(" "))
