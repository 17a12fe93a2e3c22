"""The explorer: a sweep on a local page. Choose λ, read the responses, vote blind, save or publish the soup.

rsoups explore runs/demo
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsoups.common.assets import asset, need
from rsoups.common.errors import RsoupsError
from rsoups.explorer.sweep_folder import SweepFolder
from rsoups.explorer.tasting import Tasting
from rsoups.soups.live import LiveSoup

_LOOPBACK = ["127.0.0.1", "localhost"]
_BLUE, _DARK_BLUE = "#0072b2", "#005a8d"
_OFF = ("share", "ssr_mode", "pwa", "mcp_server", "enable_monitoring", "run_history")  # features of Gradio's launch
# Gradio's scripts and styles are inline and evaluate text; the browser loads nothing from elsewhere and sends nothing there.
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

    The page loads nothing from elsewhere and sends nothing there. Votes are appended to votes.jsonl in the folder; soups are
    saved in its folder soups.

    Args:
        folder: Folder of a sweep, as in `SweepFolder.read`.
        base: Base; the sweep's by default.
        adapters: Ingredients by name; the sweep's by default.
        allow_base_mismatch: Accept ingredients that name other bases.
        host: Address to listen on.
        port: Port; the first free one from 7860 by default.
        publish: Offer saving and publishing. Not for pages that strangers reach: both use this machine's disk and Hub token.

    Raises:
        SettingsError: Gradio or another package of the app is not installed.
        FrontError, AdapterError: As in `SweepFolder.read`.
        RsoupsError: The address or the port cannot be used.
    """
    need("gradio", "app")
    need("sklearn", "app")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported
    from rsoups.explorer.page import Page

    if port is not None:
        _check_port(host, port)
    sweep = SweepFolder.read(folder, base=base, adapters=adapters, allow_base_mismatch=allow_base_mismatch)
    live = LiveSoup.from_pretrained(sweep.base, sweep.adapters, sweep.method, allow_base_mismatch=sweep.base_mismatch)
    page = Page(Tasting(sweep, live), publish).blocks
    if publish and host not in _LOOPBACK:
        print(f"rsoups: everyone who reaches {host} can save soups, and publish them with your token", file=sys.stderr)
    try:
        _, url, _ = page.launch(server_name=host, server_port=port, **_launch_settings(host))
    except OSError:
        raise RsoupsError(f"no port is free on {host}: choose one with --port") from None
    print(f"{url}   (Ctrl-C ends it)", flush=True)
    page.block_thread()


def _check_port(host: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            # As the server does, so that a port can be used again at once.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise RsoupsError(f"cannot listen on {host}, port {port} ({error}): choose another --port") from None


def _launch_settings(host: str) -> dict[str, Any]:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    middleware = [Middleware(_Headers)]
    if host in _LOOPBACK:  # refuse other names, which somebody's DNS may point here
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK))
    return {
        "quiet": True,
        "prevent_thread_lock": True,
        **dict.fromkeys(_OFF, False),
        "footer_links": [],
        "allowed_paths": [],
        "max_file_size": 1,  # byte, against uploads
        "app_kwargs": {"middleware": middleware},
        "css": asset("explorer.css"),
        "theme": gr.themes.Base(
            primary_hue="sky",
            neutral_hue="slate",
            radius_size="lg",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ).set(
            slider_color=_BLUE,
            slider_color_dark="#56b4e9",
            button_primary_background_fill=_BLUE,
            button_primary_background_fill_hover=_DARK_BLUE,
            button_primary_background_fill_dark=_BLUE,
            button_primary_background_fill_hover_dark=_DARK_BLUE,
        ),
    }


class _Headers:
    """Middleware that tells the browser to use this server only."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        await self._app(scope, receive, with_headers)
