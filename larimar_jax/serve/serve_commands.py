"""`larimar serve`; see cli.py. What is heavy to import is imported inside."""

import ipaddress
import sys
import warnings
from pathlib import Path


class WarmUpFailed(RuntimeError):
    """A model whose programs could not be compiled."""


def serve(
    *,
    model: str = "smol",
    data: str = "larimar-memories",
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: str | None = None,
    cors: tuple[str, ...] = (),
) -> None:
    """Serve memories over one model, by the API of OpenAI's completions and by a page.

    Only this host can reach it, unless --host names another address. SIGTERM ends it once what has begun
    is done.

    Args:
      model NAME: a checkpoint that ships, or the path of one
      data DIR: the memories' files, a journal each
      host ADDRESS: where it listens; 0.0.0.0 is every address of this host
      port N: and on which port
      token_file FILE: lines of TOKEN NAME MEMORY=read|write …; without it everyone may do everything
      cors ORIGIN: pages elsewhere that may send requests, such as https://example.org
    Example: larimar serve --data memories --port 8000
    """
    try:
        import uvicorn

        from larimar_jax.serve import app
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: pip install 'larimar-jax[serve]'."
        raise ImportError(message) from error
    from larimar_jax import config, pipeline, scope
    from larimar_jax.serve.access import Access

    access = Access() if token_file is None else Access.from_file(token_file)
    local = _is_loopback(host)
    if access.is_open and not local:
        print(f"anyone who reaches {host} can read and write: see --token-file", file=sys.stderr)
    config.cache_programs()
    warnings.simplefilter("ignore", scope.NearDuplicate)  # what it warns of is the event's note
    hosts = ("localhost", "127.0.0.1", host) if local and access.is_open else ("*",)
    options = dict(access=access, hosts=hosts, cors=cors)
    application = app.build(pipeline.load(model), Path(data), **options)
    served = application.state.served
    # Warnings go where logging sends them: uvicorn would set it up anew, and close handlers of others.
    options = dict(host=host, port=port, server_header=False, timeout_graceful_shutdown=30)
    options |= dict(log_level="warning", log_config=None)
    server = uvicorn.Server(uvicorn.Config(application, **options))
    served.stop = lambda: setattr(server, "should_exit", True)
    print(f"http://{host}:{port}", flush=True)
    server.run()
    if served.failure is not None:
        raise WarmUpFailed(
            f"the programs of usual requests could not be compiled ({served.failure}), and the server "
            "has ended. Too little memory is likely: free some, or serve a smaller model."
        ) from served.failure


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
