"""The operator's console, served by itself."""

from __future__ import annotations

import ipaddress
import logging
import socket
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tallystick.cli.app import address as database_address
from tallystick.cli.app import app, invocation, out
from tallystick.config import ConsoleAccess
from tallystick.database import connect, engine
from tallystick.errors import ConfigError
from tallystick.schema import verify, with_stored_mapping

if TYPE_CHECKING:
    from tallystick.web.console import SignIn

SHUTDOWN_S = 5  # the longest wait for open connections after Ctrl-C


@app.command(rich_help_panel="Trust")
def serve(
    ctx: typer.Context,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.", metavar="IP")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The port; 0 takes a free one.")] = 8420,
    allow_actions: Annotated[
        bool,
        typer.Option(
            "--allow-actions", help="Let operators grant and refund credits; without it the console is read-only."
        ),
    ] = False,
    hash_password: Annotated[
        bool, typer.Option("--hash-password", help="Ask for a password, print its hash for the settings, and stop.")
    ] = False,
) -> None:
    r"""Serve the operator's console: balances, ledgers, pending purchases, audits, migrations.

    By default only this machine can reach it, with a link that is printed and works once. For access from elsewhere,
    name operators or a reverse proxy under \[console] in the settings.
    """
    try:
        import uvicorn  # noqa: PLC0415 - an extra, which takes half a second to import

        from tallystick.web import console  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(f"the console needs {error.name}. Run: pip install 'tallystick[web]'") from None

    if hash_password:
        password = typer.prompt("Password", hide_input=True, confirmation_prompt=True)
        sys.stdout.write(f"{console.hash_password(password)}\n")
        return

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with invocation(ctx).database() as config, _listen(host, port) as listening:
        ip, port = listening.getsockname()[:2]
        local = ipaddress.ip_address(ip).is_loopback  # also for a host name
        sign_in, address = _sign_in(config.console, host, port, local=local)
        where = database_address(config)
        pools = {
            url: engine(url, pool_size=5, pool_pre_ping=True) for url in (where, config.database_url_replica or where)
        }
        try:
            # without actions the primary is not needed
            with connect(where if allow_actions else [*pools][-1]) as conn:
                verify(conn)
                config = with_stored_mapping(conn, config)  # noqa: PLW2901 - the same, with the database's mapping
            pages = console.console(
                config,
                engine=pools[where],
                replica=pools[config.database_url_replica] if config.database_url_replica else None,
                sign_in=sign_in,
                address=address,
                allow_actions=allow_actions,
            )
            if isinstance(sign_in, console.LocalLink):
                out.print(f"The console is at {address}/enter?token={sign_in.token}", markup=False)
                out.print("The link works once, within 15 minutes. Stop with Ctrl-C.")
            else:
                out.print(f"The console is at {address}/. Stop with Ctrl-C.", markup=False)
            # The peer's address decides on access, so uvicorn must not take it from a header; and its access log would
            # contain the link's token.
            settings = uvicorn.Config(
                pages,
                proxy_headers=False,
                server_header=False,
                access_log=False,
                log_level="warning",
                lifespan="off",
                timeout_graceful_shutdown=SHUTDOWN_S,
            )
            uvicorn.Server(settings).run(sockets=[listening])
        finally:
            for pool in pools.values():
                pool.dispose()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:  # UnicodeError for an invalid host name
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', error)}. Choose another with: --port",
        ) from None
    # Connections inherit it. A response is two writes; without it the second waits 40 ms for the first's ACK.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _sign_in(access: ConsoleAccess, host: str, port: int, *, local: bool) -> tuple[SignIn, str]:
    """The way operators sign in, and the console's address. Raises ConfigError if the settings do not choose them."""
    from tallystick.web.console import LocalLink, Passwords, TrustedProxy  # noqa: PLC0415 - as above

    here = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if not (access.operators or access.proxy_peers):
        if not local:
            raise ConfigError(
                f"listening on {host} would open the console to a network, but no operator is named. Name operators or "
                "proxy_peers under [console] in the settings, or leave out --host",
                key="console",
            )
        return LocalLink(), here
    if access.address is None and not local:
        raise ConfigError(
            f"listening on {host} needs the address at which people open the console. "
            'Set address = "https://…" under [console] in the settings',
            key="console.address",
        )
    if access.proxy_peers:
        return TrustedProxy(access.proxy_peers, header=access.proxy_header), access.address or here
    return Passwords(access.operators), access.address or here
