"""The explorer: a sweep on a page of one's own machine. Choose λ, read what it writes, vote blind, save or publish the soup.

rsoups explore runs/demo
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsoups.common.assets import asset
from rsoups.common.errors import RsoupsError
from rsoups.explorer.sweep_folder import SweepFolder
from rsoups.explorer.tasting import Tasting
from rsoups.soups.live import LiveSoup

_LOOPBACK = ["127.0.0.1", "localhost"]
# Scripts and styles of Gradio are inline and build functions from text; nothing may come from, or go to, elsewhere.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; form-action 'self'"


def explore(
    folder: str | Path | None,
    *,
    base: str | None = None,
    adapters: Mapping[str, str] | None = None,
    allow_base_mismatch: bool = False,
    host: str = "127.0.0.1",
    port: int | None = None,
    publish: bool = True,
) -> None:
    """Serve the explorer of a sweep until interrupted.

    The page loads nothing from elsewhere and sends nothing elsewhere. Votes are appended to votes.jsonl in the folder, soups
    are saved in its soups.

    Args:
        folder: Of a sweep: records.jsonl, and what `SweepFolder.read` finds from there.
        base: The sweep's by default.
        adapters: By name, the sweep's by default.
        allow_base_mismatch: Accept ingredients that name other bases.
        host: Address to listen on.
        port: The first free one from 7860 by default.
        publish: Offer saving and publishing. Not for pages that strangers reach: they act with this machine's disk and its
            Hub token.

    Raises:
        FrontError, AdapterError: As `SweepFolder.read`.
        RsoupsError: Gradio is not installed, or the address or the port cannot be had.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        from rsoups.explorer.page import Page
    except ModuleNotFoundError as error:
        raise RsoupsError(f"the explorer needs {error.name}: pip install 'rsoups[app]'") from None
    if port is not None:
        _check_port(host, port)
    found = SweepFolder.read(folder, base=base, adapters=adapters, allow_base_mismatch=allow_base_mismatch)
    live = LiveSoup.from_pretrained(
        found.base, found.adapters, method=found.method, allow_base_mismatch=found.base_mismatch
    )
    page = Page(Tasting(found, live), publish).blocks
    if publish and host not in _LOOPBACK:
        words = "is not this machine alone: whoever reaches it can save soups, and publish them with your token"
        print(f"rsoups: {host} {words}", file=sys.stderr)
    try:
        _, url, _ = page.launch(server_name=host, server_port=port, **_launch_settings(host))
    except OSError:
        raise RsoupsError(f"no port is free on {host}: choose one with --port") from None
    print(f"{url}   (Ctrl-C ends it)", flush=True)
    page.block_thread()


def _check_port(host: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as the server does: no wait after the last one
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise RsoupsError(f"cannot listen on {host}, port {port} ({error}): choose another --port") from None


def _launch_settings(host: str) -> dict[str, Any]:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    middleware = [Middleware(_Headers)]
    if host in _LOOPBACK:  # another name, which someone's DNS leads here, is refused
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK))
    return {
        "quiet": True,
        "prevent_thread_lock": True,
        "share": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "enable_monitoring": False,
        "run_history": False,
        "footer_links": [],
        "allowed_paths": [],
        "max_file_size": 1,  # byte: nothing is uploaded
        "app_kwargs": {"middleware": middleware},
        "css": asset("explorer.css"),
        "theme": gr.themes.Base(
            primary_hue="sky",
            neutral_hue="slate",
            radius_size="lg",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ).set(
            slider_color="#0072b2",
            slider_color_dark="#56b4e9",
            button_primary_background_fill="#0072b2",
            button_primary_background_fill_hover="#005a8d",
            button_primary_background_fill_dark="#0072b2",
            button_primary_background_fill_hover_dark="#005a8d",
        ),
    }


class _Headers:
    """Tells the browser, on every answer, to keep to this server."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        await self._app(scope, receive, with_headers)
