"""What the shell offers for an argument that is begun. Reads files only: a Tab cannot wait.

``banyan --install-completion`` has the shell ask.
"""


def instances(incomplete: str) -> list[tuple[str, str]]:
    """Instances of the suites that run here, each with where it runs; the bus is none of them."""
    from cli.state import running_suites

    return [
        (instance, f"of the suite at {suite.url}")
        for suite in running_suites()
        for instance in sorted(suite.pids)
        if instance.startswith(incomplete) and not instance.startswith("nats-")
    ]


def urls(incomplete: str) -> list[tuple[str, str]]:
    """Gateways of the suites that run here, each with the model that it serves."""
    from cli.state import running_suites

    return [
        (url, suite.model)
        for suite in running_suites()
        for url in suite.urls
        if url.startswith(incomplete)
    ]


def policies(incomplete: str) -> list[str]:
    """Batching policies of the scheduler."""
    from shared.core.policies import POLICIES

    return [name for name in sorted(POLICIES) if name.startswith(incomplete)]
